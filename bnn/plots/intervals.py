"""Numbers with their intervals: along an input, and against the truth."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bnn.arrays import probability, tensor
from bnn.errors import DataError
from bnn.plots import _style as style
from bnn.prediction import Prediction

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FEW = 400  # draws: the ends of an interval that are read off fewer are ragged


def band(
    prediction: Prediction,
    data: Sequence[Any] | None = None,
    *,
    column: int = 0,
    level: float = 0.9,
    unit: str = "",
    label: str = "x",
    title: str = "",
    ax: "Axes | None" = None,
) -> "Axes":
    """Mean along an input, with two central intervals: of the mean function, and of observations.

    The inner one is epistemic: what more rows would take away. The outer one adds the noise, so
    that what it has beyond the inner is aleatoric. Both are read off the draws; of fewer than 400,
    as of an ensemble's mean functions, they are those of a Gaussian with their variance.

    Args:
        prediction: of rows whose observation is a number, such as `posterior.predict(grid)`.
        data: (x, y) to draw as points, x (row,) or (row, column).
        column: of the first input, to draw along; hold the others fixed in the rows predicted.
        level: of both intervals.
        unit: what y is measured in.
        label: of the input, its unit included.
        title: above the axes.
        ax: where to draw; default a new figure.

    Raises:
        DataError: y is a label or several numbers; there is no such input; x and y differ in rows.

    Example:
        >>> import bnn
        >>> x = torch.linspace(-1, 1, 30)[:, None]
        >>> ax = band(bnn.prior_predictive(bnn.models.linear(1), x, draws=50), (x, x[:, 0]))
    """
    style.numbers_only(prediction, "band", "decomposition")
    style.one_number_a_row(prediction, "band")
    level = float(probability(level))
    x, order = style.column_of(prediction, column, "band")
    points = style.points(data, column, "band")
    ax = style.axes(ax)
    mean = prediction.mean.cpu().double()
    spread = prediction.epistemic.cpu().double()
    outer = _interval(prediction.outcomes, mean, prediction.total.cpu().double(), level)
    inner = _interval(_expected(prediction), mean, spread, level)
    drawn = (
        (outer, style.ALEATORIC, "of y: with noise"),
        (inner, style.EPISTEMIC, "of the mean: epistemic"),
    )
    for (lower, upper), colour, name in drawn:
        ax.fill_between(
            x[order],
            lower[order],
            upper[order],
            color=style.tint(colour),
            lw=0,
            label=f"{level:.0%} interval {name}",
        )
    ax.plot(x[order], mean.numpy()[order], color=style.EPISTEMIC, lw=1.5, label="mean")
    if points is not None:
        ax.plot(*points, ".", color=style.DATA, ms=4, label=f"data, {len(points[0])} rows")
    ax.set(xlabel=label, ylabel=style.within("y", unit), title=title)
    ax.margins(x=0.01)
    style.legend_below(ax)
    return ax


def _expected(prediction: Prediction) -> Tensor | None:
    """Draws of E[y | x, draw], where f is that: its moments are then those of the prediction."""
    f = prediction.f.flatten(0, 1).cpu().double()
    mean, spread = prediction.mean.cpu().double(), prediction.epistemic.cpu().double()
    if f.shape[1:] != mean.shape:
        return None
    scale = spread.mean().sqrt() + 1e-3 * mean.abs().mean()
    same = (f.mean(0) - mean).abs().max() < 1e-2 * scale
    wide = (f.var(0, correction=0) - spread).abs().max() < 1e-2 * scale**2
    return prediction.f if bool(same & wide) else None


def _interval(
    draws: Tensor | None, mean: Tensor, variance: Tensor, level: float
) -> tuple[np.ndarray, np.ndarray]:
    if draws is not None and draws.shape[0] * draws.shape[1] >= _FEW:
        ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
        lower, upper = np.quantile(draws.flatten(0, 1).cpu().double().numpy(), ends.numpy(), axis=0)
        return lower, upper
    z = float(torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)))
    half = z * variance.sqrt()
    return (mean - half).numpy(), (mean + half).numpy()


def truth(
    prediction: Prediction,
    y: Any,
    *,
    level: float = 0.9,
    unit: str = "",
    title: str = "",
    ax: "Axes | None" = None,
) -> "Axes":
    """Predictions against the truth, each with its central predictive interval.

    Args:
        prediction: of rows whose observation is a number, y (row,).
        y: observations, (row,).
        level: of the intervals.
        unit: what y is measured in, for the axis labels.
        title: above the axes.
        ax: where to draw; default a new figure.

    Raises:
        DataError: y is a label, or has another number of rows.

    Example:
        >>> import bnn
        >>> x = torch.linspace(-1, 1, 30)[:, None]
        >>> ax = truth(bnn.prior_predictive(bnn.models.linear(1), x, draws=50), x[:, 0], unit="m")
    """
    observed = tensor(y, "y").cpu().numpy()
    style.numbers_only(prediction, "truth", "reliability")
    style.one_number_a_row(prediction, "truth")
    if prediction.mean.shape != observed.shape or observed.ndim != 1:
        raise DataError(
            f"The prediction has rows {tuple(prediction.mean.shape)} and y has {observed.shape}."
        )
    ax = style.axes(ax)
    lower, upper = (bound.cpu().numpy() for bound in prediction.interval(level))
    mean = prediction.mean.cpu().numpy()
    inside = (observed >= lower) & (observed <= upper)
    drawn = (("inside", inside, style.SERIES[0], "o"), ("outside", ~inside, style.TRUTH, "X"))
    for name, rows, colour, marker in drawn:
        ax.vlines(observed[rows], lower[rows], upper[rows], color=colour, alpha=0.35, lw=1)
        ax.scatter(
            observed[rows],
            mean[rows],
            s=16,
            color=colour,
            marker=marker,
            label=f"{name} its {level:.0%} interval ({rows.sum()})",
            zorder=3,
        )
    ends = [min(observed.min(), lower.min()), max(observed.max(), upper.max())]
    ax.plot(ends, ends, color=style.IDEAL, lw=1, ls="--", label="prediction = truth")
    xlabel, ylabel = style.within("observed", unit), style.within("predicted", unit)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    style.legend_below(ax)
    return ax
