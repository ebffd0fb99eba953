"""What uncertainty is made of, and what it is worth: its parts, and the rows that it refuses."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from bnn.errors import DataError
from bnn.plots import _style as style
from bnn.prediction import Prediction
from bnn.selective import RiskCoverage

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def decomposition(
    prediction: Prediction,
    *,
    column: int | None = None,
    unit: str = "",
    label: str = "x",
    title: str = "",
    ax: "Axes | None" = None,
) -> "Axes":
    """Aleatoric and epistemic uncertainty, one on the other, and their sum.

    Variances for numbers; for labels entropies: the mean over draws of the label's entropy, and
    what the label would tell of the weights.

    Args:
        prediction: of numbers or labels, one a row.
        column: of the first input, to draw along. Default: along the input where it is one number,
            else over rows in the order of their total.
        unit: what y is measured in; variances are in its square.
        label: of the input, its unit included.
        title: above the axes.
        ax: where to draw; default a new figure.

    Raises:
        DataError: rows of several outputs; no such column; a noise without variance.

    Example:
        >>> import bnn, torch
        >>> x = torch.linspace(-1, 1, 30)[:, None]
        >>> ax = decomposition(bnn.prior_predictive(bnn.models.linear(1), x, draws=50), unit="m")
    """
    style.require(prediction, Prediction, "decomposition", "posterior.predict(x)")
    style.one_number_a_row(prediction, "decomposition")
    parts = [v.cpu().double().numpy() for v in (prediction.aleatoric, prediction.epistemic)]
    total = parts[0] + parts[1]
    if not np.isfinite(total).all():
        raise DataError("The model's noise has no variance, so that it has no such parts.")
    if column is None and prediction.inputs and _one_number(prediction):
        column = 0
    if column is None:
        x, order, label = np.arange(len(total)), np.argsort(total), "rows, by their total"
    else:
        x, order = style.column_of(prediction, column, "decomposition")
        x = x[order]
    ax = style.axes(ax)
    below = parts[0][order]
    told, what = ("aleatoric: noise", "epistemic: the weights"), "variance of y"
    if prediction.probs is not None:
        told = ("aleatoric: mean entropy", "epistemic: mutual information")
        what = "entropy of the label (nats)"
    elif unit:
        what = f"variance of y ({unit if unit.isalpha() else f'({unit})'}²)"
    edges = ((0 * below, below, style.ALEATORIC), (below, total[order], style.EPISTEMIC))
    for (lower, upper, colour), name in zip(edges, told, strict=True):
        ax.fill_between(x, lower, upper, color=style.tint(colour), lw=0, label=name)
    ax.plot(x, total[order], color=style.TOTAL, lw=1.2, label="total")
    ax.set(xlabel=label, ylabel=what, title=title, ylim=(0, None))
    ax.margins(x=0.01)
    style.legend_below(ax)
    return ax


def _one_number(prediction: Prediction) -> bool:
    first = prediction.inputs[0]
    return first.ndim == 1 or (first.ndim == 2 and first.shape[1] == 1)


def risk_coverage(
    curves: RiskCoverage | Mapping[str, RiskCoverage],
    *,
    risk: str = "mean loss",
    unit: str = "",
    title: str = "",
    ax: "Axes | None" = None,
) -> "Axes":
    """Mean loss of the rows kept, against their share; a good score rises from the left to the end.

    Args:
        curves: of `bnn.selective.risk_coverage`, one or several by name.
        risk: what the loss is, such as "error rate".
        unit: of the loss.
        title: above the axes.
        ax: where to draw; default a new figure.

    Raises:
        TypeError: other things than curves.

    Example:
        >>> import bnn
        >>> curve = bnn.selective.risk_coverage([0.1, 0.2, 0.9], [0.0, 0.0, 1.0])
        >>> ax = risk_coverage({"entropy": curve}, risk="error rate")
    """
    named = style.named(curves)
    for curve in named.values():
        style.require(curve, RiskCoverage, "risk_coverage", "bnn.selective.risk_coverage(...)")
    ax = style.axes(ax)
    ends = [float(curve.risk[-1]) for curve in named.values()]
    alike = np.allclose(ends, ends[0])  # several scores of one model
    for i, (name, curve) in enumerate(named.items()):
        told = f"{name}: area {curve.area:.3g}" if name else f"area {curve.area:.3g}"
        colour = style.SERIES[i % len(style.SERIES)]
        share, mean = curve.coverage.cpu(), curve.risk.cpu()
        ax.plot(share, mean, lw=1.5, color=colour, label=told)
        ax.plot(share[-1:], mean[-1:], ms=5, clip_on=False, **style.look(i))
        if not alike:
            ax.axhline(ends[i], color=colour, lw=1, ls="--")
    whole = {"color": style.IDEAL, "lw": 1, "ls": "--", "label": "all rows kept"}
    if alike:
        ax.axhline(ends[0], **whole)
    else:
        ax.plot([], [], **whole)
    ax.set(
        xlabel="share of rows kept, the surest first",
        ylabel=style.within(f"{risk} of those", unit),
        title=title,
        xlim=(0, 1),
    )
    ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    style.legend_below(ax)
    return ax
