"""Pictures: matplotlib, axes in and axes out, the same colours for the same things everywhere."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bnn import calibration
from bnn.errors import DataError
from bnn.prediction import Prediction

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito (2008): told apart by colour-blind readers and in grey.
TOTAL, EPISTEMIC, TRUTH, IDEAL = "#56B4E9", "#0072B2", "#D55E00", "#444444"
SERIES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")


def _axes(ax: "Axes | None") -> "Axes":
    if ax is not None:
        return ax
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(5, 4), layout="constrained")[1]


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
    """
    observed = np.asarray(y)
    if prediction.probs is not None:
        raise DataError("plots.truth draws numbers; for labels use plots.reliability.")
    if prediction.mean.shape != observed.shape or observed.ndim != 1:
        raise DataError(
            f"The prediction has rows {tuple(prediction.mean.shape)} and y has {observed.shape}."
        )
    ax = _axes(ax)
    lower, upper = (bound.numpy() for bound in prediction.interval(level))
    mean = prediction.mean.numpy()
    inside = (observed >= lower) & (observed <= upper)
    drawn = (("inside", inside, EPISTEMIC, "o"), ("outside", ~inside, TRUTH, "X"))
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
    ax.plot(ends, ends, color=IDEAL, lw=1, ls="--", label="prediction = truth")
    unit = f" ({unit})" if unit else ""
    ax.set(xlabel=f"observed{unit}", ylabel=f"predicted{unit}", title=title)
    _legend_below(ax)
    return ax


def coverage(
    predictions: Prediction | dict[str, Prediction],
    y: Any,
    *,
    title: str = "",
    ax: "Axes | None" = None,
) -> "Axes":
    """Observed share of rows inside central intervals, at every level; calibrated is diagonal.

    The grey band holds 95 % of calibrated predictions of this many independent rows (binomial).

    Args:
        predictions: one, or several by name.
        y: observations, (row, *).
        title: above the axes.
        ax: where to draw; default a new figure.

    Raises:
        DataError: y is a label, or has other rows than the prediction.
    """
    named = {"": predictions} if isinstance(predictions, Prediction) else predictions
    observed = torch.as_tensor(np.asarray(y))
    if any(prediction.probs is not None for prediction in named.values()):
        raise DataError("plots.coverage draws numbers; for labels use plots.reliability.")
    levels = torch.linspace(0.05, 0.95, 19)
    ax = _axes(ax)
    noise = 1.96 * (levels * (1 - levels) / max(observed.numel(), 1)).sqrt()
    ax.fill_between(
        levels,
        (levels - noise).clamp(0, 1),
        (levels + noise).clamp(0, 1),
        color="0.88",
        label=f"chance, {len(observed)} rows",
    )
    ax.plot([0, 1], [0, 1], color=IDEAL, lw=1, ls="--", label="calibrated")
    for i, (name, prediction) in enumerate(named.items()):
        share: Tensor = calibration.interval_coverage(prediction.y, observed, levels)
        look: dict[str, Any] = {
            "color": SERIES[i % len(SERIES)],
            "marker": MARKERS[i % len(MARKERS)],
        }
        ax.plot(levels, share, lw=1.5, ms=4, label=name or "observed", **look)
    ax.set(
        xlabel="level of the interval (probability)",
        ylabel="share of rows inside (frequency)",
        title=title,
        xlim=(0, 1),
        ylim=(0, 1),
    )
    ax.set_aspect("equal")
    ax.legend(loc="upper left", frameon=False, fontsize="small")
    return ax


def reliability(
    predictions: Prediction | dict[str, Prediction],
    y: Any,
    *,
    bins: int = 10,
    title: str = "",
    ax: "Axes | None" = None,
) -> "Axes":
    """Share of right labels against the probability stated for them, in bins of equal count.

    See `calibration.reliability`.

    Args:
        predictions: one, or several by name, of rows whose observation is a label.
        y: labels, (row,).
        bins: most bins; fewer where rows are few.
        title: above the axes.
        ax: where to draw; default a new figure.

    Raises:
        DataError: y is not a label, or has other rows than the prediction.
    """
    named = {"": predictions} if isinstance(predictions, Prediction) else predictions
    observed = torch.as_tensor(np.asarray(y))
    ax = _axes(ax)
    ax.plot([0, 1], [0, 1], color=IDEAL, lw=1, ls="--", label="calibrated")
    for i, (name, prediction) in enumerate(named.items()):
        if prediction.probs is None:
            raise DataError("plots.reliability draws labels; for numbers use plots.coverage.")
        label = prediction.probs.argmax(-1)
        if label.shape != observed.shape or observed.ndim != 1:
            raise DataError(
                f"The prediction has rows {tuple(label.shape)} and y has {tuple(observed.shape)}."
            )
        most = min(bins, max(len(observed) // 10, 1))
        curve = calibration.reliability(prediction.probs, observed, bins=most)
        error = (curve.observed - curve.lower, curve.upper - curve.observed)
        look: dict[str, Any] = {
            "color": SERIES[i % len(SERIES)],
            "marker": MARKERS[i % len(MARKERS)],
        }
        look |= {"lw": 1.5, "ms": 5, "capsize": 2, "label": name or "observed"}
        ax.errorbar(curve.stated, curve.observed, error, **look)
    ax.set(
        xlabel="stated probability of the predicted label",
        ylabel="share of right labels (95 % interval)",
        title=title,
        xlim=(0, 1.02),
        ylim=(0, 1.05),
    )
    ax.legend(loc="lower right", frameon=False, fontsize="small")
    return ax


def _legend_below(ax: "Axes") -> None:
    ax.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False, fontsize="small"
    )
