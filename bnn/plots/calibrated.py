"""Do stated probabilities come true? Coverage, PIT, reliability, and ranks of simulations."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from bnn import calibration
from bnn.arrays import tensor
from bnn.calibration import Uniformity
from bnn.errors import DataError
from bnn.plots import _style as style
from bnn.prediction import Prediction
from bnn.simulation import SBC

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHORT = 12  # characters of a name for which a corner has room
_POINTS = 50  # at which the distribution of PIT values is looked at


def coverage(
    predictions: Prediction | Mapping[str, Prediction],
    y: Any,
    *,
    title: str = "",
    ax: "Axes | None" = None,
) -> "Axes":
    """Observed share of rows inside central intervals, at every level; calibrated is diagonal.

    By PIT values, so that calibrated counts are on the diagonal too. The grey band holds 95 % of
    calibrated predictions of this many independent rows (binomial); outputs of one row count as
    one, so that it is no narrower than chance where they go together.

    Args:
        predictions: one, or several by name.
        y: observations, (row, *).
        title: above the axes.
        ax: where to draw; default a new figure.

    Raises:
        DataError: y is a label, or has other rows than the prediction.

    Example:
        >>> import bnn
        >>> x = torch.linspace(-1, 1, 30)[:, None]
        >>> ax = coverage(bnn.prior_predictive(bnn.models.linear(1), x, draws=50), x[:, 0])
    """
    named = style.named(predictions)
    observed = tensor(y, "y").cpu()
    for prediction in named.values():
        style.numbers_only(prediction, "coverage", "reliability")
    levels = torch.linspace(0.05, 0.95, 19)
    shares = {
        name: calibration.pit_coverage(prediction.outcomes, observed, levels).cpu()
        for name, prediction in named.items()
    }
    ax = style.axes(ax)
    noise = 1.96 * (levels * (1 - levels) / max(len(observed), 1)).sqrt()
    ax.fill_between(
        levels,
        (levels - noise).clamp(0, 1),
        (levels + noise).clamp(0, 1),
        color=style.CHANCE,
        label=f"chance, {len(observed)} rows",
    )
    ax.plot([0, 1], [0, 1], color=style.IDEAL, lw=1, ls="--", label="calibrated")
    for i, (name, share) in enumerate(shares.items()):
        ax.plot(levels, share, lw=1.5, ms=4, label=name or "observed", **style.look(i))
    ax.set(
        xlabel="level of the interval (probability)",
        ylabel="share of rows inside (frequency)",
        title=title,
        xlim=(0, 1),
        ylim=(0, 1),
    )
    ax.set_aspect("equal")
    _legend_in_the_empty_corner(ax, shares, levels)
    return ax


def _fills_a_corner(names: Collection[str]) -> bool:
    """True of a legend too large to stand inside the axes: of many names, or of long ones."""
    return len(names) > 4 or max(len(str(name)) for name in names) > _SHORT


def _legend_in_the_empty_corner(ax: "Axes", shares: Mapping[str, Tensor], levels: Tensor) -> None:
    """Above the diagonal where the curves lie below it, and the other way round."""
    above = max(float((share - levels).max()) for share in shares.values())
    below = max(float((levels - share).max()) for share in shares.values())
    if min(above, below) > 0.25 or _fills_a_corner(shares):
        style.legend_below(ax)
        return
    corner = "upper left" if above <= below else "lower right"
    ax.legend(loc=corner, frameon=False, fontsize="small")


def pit(
    predictions: Any,
    y: Any = None,
    *,
    level: float = 0.95,
    title: str = "",
    ax: "Axes | None" = None,
) -> "Axes":
    """Distribution of PIT values less the uniform one; calibrated is flat at 0.

    A curve first above 0 and then below says that predictions are too narrow, first below and then
    above that they are too wide; one above 0 throughout that observations lie lower than predicted.
    The band is simultaneous: a calibrated prediction leaves it anywhere with probability 1 - level,
    if rows are independent.

    Args:
        predictions: one, or several by name, of rows whose observation is a number; or without y
            PIT values themselves, (row,), such as `calibration.loo_pit(...)`, alike.
        y: observations, (row,).
        level: of the band.
        title: above the axes.
        ax: where to draw; default a new figure.

    Raises:
        DataError: y is a label or has other rows; values outside 0..1; rows that differ.

    Example:
        >>> import bnn
        >>> x = torch.linspace(-1, 1, 30)[:, None]
        >>> ax = pit({"prior": bnn.prior_predictive(bnn.models.linear(1), x, draws=50)}, x[:, 0])
    """
    tests, count = {}, 0
    for name, given in style.named(predictions).items():
        if y is None:
            values, cells = _values(given), _POINTS
        else:
            style.numbers_only(given, "pit", "reliability")
            style.one_number_a_row(given, "pit")
            values = calibration.pit(given.outcomes, y)
            draws = given.outcomes.shape[0] * given.outcomes.shape[1]
            # y has S + 1 places among S draws, a cell for each where they are few
            values, cells = (draws * values + 0.5) / (draws + 1), min(draws + 1, _POINTS)
        tests[name or "observed"] = calibration.uniformity(
            values.flatten(), cells=cells, level=level
        )
        count = values.numel()
    ax = style.axes(ax)
    _departures(ax, tests, f"{level:.0%} of calibrated, {count} rows")
    ax.set(xlabel="PIT value (probability)", title=title)
    style.legend_below(ax)
    return ax


def _values(given: Any) -> Tensor:
    if isinstance(given, Prediction):
        raise DataError("plots.pit needs the observations of a prediction: plots.pit(p, y).")
    return tensor(given, "PIT values")


def sbc(
    result: SBC,
    *,
    quantities: "tuple[str, ...] | list[str] | None" = None,
    level: float = 0.95,
    title: str = "",
    ax: "Axes | None" = None,
) -> "Axes":
    """Distribution of the ranks of `bnn.sbc` less the uniform one; a right method is flat at 0.

    A curve first above 0 and then below says that posteriors are too narrow, first below and then
    above that they are too wide; one above 0 throughout that draws lie too high. The band is
    simultaneous over ranks, for one quantity at a time: of twenty right curves one leaves it.

    Args:
        result: of `bnn.sbc`.
        quantities: to draw, of `result.quantities`; default all.
        level: of the band.
        title: above the axes; default the verdict.
        ax: where to draw; default a new figure.

    Raises:
        DataError: there is no such quantity.

    Example:
        >>> import bnn
        >>> ranks = torch.arange(40)[:, None] % 20
        >>> result = bnn.SBC(ranks, ("sigma",), 19, torch.zeros(1), {}, 0.0)
        >>> ax = sbc(result)
    """
    style.require(result, SBC, "sbc", "the result of bnn.sbc")
    names = result.quantities if quantities is None else tuple(quantities)
    if unknown := [name for name in names if name not in result.quantities]:
        raise DataError(f"There is no {unknown}; ranked were {', '.join(result.quantities)}.")
    places = (result.ranks.double() + 0.5) / (result.draws + 1)
    tests = {
        name: calibration.uniformity(
            places[:, result.quantities.index(name)], cells=result.draws + 1, level=level
        )
        for name in names
    }
    ax = style.axes(ax)
    _departures(ax, tests, f"{level:.0%} of right methods, {len(places)} replicates")
    verdict = "uniform" if result.uniform else "not uniform"
    ax.set(
        xlabel=f"rank of the truth / {result.draws + 1}",
        title=title or f"ranks {verdict}: p {result.told_p}",
    )
    style.legend_below(ax, 2 if len(tests) < 6 else 3)
    return ax


def _departures(ax: "Axes", tests: Mapping[str, Uniformity], chance: str) -> None:
    """Each distribution function less the uniform one, and the band, that is the same for all."""
    first = next(iter(tests.values()))
    for test in tests.values():
        if not torch.equal(test.lower, first.lower):
            raise DataError("Predictions with other numbers of rows or draws have other bands.")
    points = np.concatenate([[0.0], first.points.double().numpy(), [1.0]])
    edge = lambda values: np.concatenate([[0.0], values.double().numpy(), [0.0]])
    lower, upper = edge(first.lower - first.points), edge(first.upper - first.points)
    ax.fill_between(points, lower, upper, color=style.CHANCE, lw=0, label=chance)
    ax.axhline(0, color=style.IDEAL, lw=1, ls="--")
    for i, (name, test) in enumerate(tests.items()):
        drawn = edge(test.share - test.points)
        colour = style.SERIES[i % len(style.SERIES)]
        dash = ("-", "--", "-.", ":")[i // len(style.SERIES) % 4]
        ax.plot(points, drawn, lw=1.5, label=name, ls=dash, color=colour)
    reach = 1.1 * max(np.abs(line.get_ydata()).max() for line in ax.get_lines())
    reach = max(reach, 1.2 * float(np.abs([lower, upper]).max()))
    ax.set(ylabel="share below, less the uniform one", xlim=(0, 1), ylim=(-reach, reach))


def reliability(
    predictions: Prediction | Mapping[str, Prediction],
    y: Any,
    *,
    bins: int = 10,
    band: Literal["rows", "posterior"] = "rows",
    title: str = "",
    ax: "Axes | None" = None,
) -> "Axes":
    """Share of right labels against the probability stated for them, in bins of equal count.

    See `calibration.reliability`. The bars are what chance leaves open of a share of so few rows
    (Wilson's 95 % interval); or what the posterior does: the bar then holds the share that 95 % of
    the draws find in the bin, each by its own probabilities, and need not hold the point.

    Args:
        predictions: one, or several by name, of rows whose observation is a label.
        y: labels, (row,).
        bins: most bins; fewer where rows are few.
        band: where the bars come from, "rows" or "posterior".
        title: above the axes.
        ax: where to draw; default a new figure.

    Raises:
        DataError: y is not a label, or has other rows than the prediction; an unknown band.
        ModelError: the bars of the posterior, and no probabilities at its draws.

    Example:
        >>> import bnn
        >>> x = torch.linspace(-1, 1, 30)[:, None]
        >>> prediction = bnn.prior_predictive(bnn.models.mlp_classification(1, 2), x, draws=50)
        >>> ax = reliability(prediction, (x[:, 0] > 0).long(), band="posterior")
    """
    if band not in ("rows", "posterior"):
        raise DataError(f'band is {band!r}. Pass "rows" or "posterior".')
    observed = tensor(y, "y").cpu()
    curves = {}
    for name, prediction in style.named(predictions).items():
        style.require(prediction, Prediction, "reliability", "posterior.predict(x)")
        if prediction.probs is None:
            raise DataError("plots.reliability draws labels; for numbers use plots.coverage.")
        label = prediction.probs.argmax(-1)
        if label.shape != observed.shape or observed.ndim != 1:
            raise DataError(
                f"The prediction has rows {tuple(label.shape)} and y has {tuple(observed.shape)}."
            )
        most = min(bins, max(len(observed) // 10, 1))
        draws = prediction.draw_probs if band == "posterior" else None
        curves[name] = calibration.reliability(prediction.probs, observed, bins=most, draws=draws)
    ax = style.axes(ax)
    ax.plot([0, 1], [0, 1], color=style.IDEAL, lw=1, ls="--", label="calibrated")
    for i, (name, curve) in enumerate(curves.items()):
        stated, share, lower, upper = (
            each.cpu() for each in (curve.stated, curve.observed, curve.lower, curve.upper)
        )
        look = style.look(i) | {"lw": 1.5, "ms": 5, "label": name or "observed"}
        if band == "rows":
            ax.errorbar(
                stated, share, torch.stack([share - lower, upper - share]), capsize=2, **look
            )
            continue
        ax.plot(stated, share, **look)
        label = f"{name}: draws" if name else "draws"
        colour = style.tint(str(look["color"]))
        ax.vlines(stated, lower, upper, color=colour, lw=4, zorder=1, label=label)
    ax.set(
        xlabel="stated probability of the predicted label",
        ylabel="share of right labels (95 % " + ("interval)" if band == "rows" else "of draws)"),
        title=title,
        xlim=(0, 1.02),
        ylim=(0, 1.05),
    )
    least = min(float(curve.stated.min()) for curve in curves.values())
    if _fills_a_corner(curves) or least < (0.4 if band == "rows" else 0.5):
        style.legend_below(ax)
    else:
        ax.legend(loc="upper left", frameon=False, fontsize="small")
    return ax
