"""Functions: draws of f along an input, and at a few rows from draw to draw."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from bnn.errors import DataError
from bnn.plots import _style as style
from bnn.prediction import Prediction

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LANE = 4.0  # standard deviations of f above and below the middle of its lane


def functions(
    prediction: Prediction,
    *,
    draws: int = 30,
    output: int | None = None,
    column: int = 0,
    unit: str = "",
    label: str = "x",
    title: str = "",
    ax: "Axes | None" = None,
) -> "Axes":
    """Draws of f along an input, and their mean.

    Args:
        prediction: such as `posterior.predict(grid)`, or `bnn.prior_predictive(model, grid)`.
        draws: how many, evenly spread over all chains.
        output: which, where f has several: a class.
        column: of the first input, to draw along; hold the others fixed in the rows predicted.
        unit: of f.
        label: of the input, its unit included.
        title: above the axes.
        ax: where to draw; default a new figure.

    Raises:
        DataError: no such input, column or output; draws is not in 1..all.

    Example:
        >>> import bnn, torch
        >>> x = torch.linspace(-1, 1, 30)[:, None]
        >>> ax = functions(bnn.prior_predictive(bnn.models.linear(1), x, draws=50), draws=10)
    """
    f = style.f_draws(prediction, output, "functions")
    f = f.reshape(-1, f.shape[-1])
    x, order = style.column_of(prediction, column, "functions")
    if not 1 <= draws:
        raise DataError(f"draws is {draws}. Pass at least 1.")
    chosen = f[np.linspace(0, len(f) - 1, min(draws, len(f))).round().astype(int)]
    ax = style.axes(ax)
    faint = max(0.15, min(0.8, 6 / len(chosen)))
    ax.plot(x[order], chosen[:, order].T, color=style.SERIES[5], lw=0.8, alpha=faint)
    ax.plot([], [], color=style.SERIES[5], lw=1, label=f"{len(chosen)} of {len(f)} draws")
    ax.plot(x[order], f.mean(0)[order], color=style.EPISTEMIC, lw=2, label="mean of all")
    ax.set(xlabel=label, ylabel=style.within("f", unit), title=title)
    ax.margins(x=0.01)
    style.legend_below(ax)
    return ax


def trace(
    prediction: Prediction,
    rows: Sequence[int] | None = None,
    *,
    output: int | None = None,
    unit: str = "",
    title: str = "",
    ax: "Axes | None" = None,
) -> "Axes":
    """Values of f at a few rows from draw to draw: a lane for each row, a colour for each chain.

    Weights of a net are not identified and their traces mean little; those of f are to look alike
    in all chains. A lane spans four standard deviations of its f up and down; beside it stand the
    mean and the standard deviation.

    Args:
        prediction: of the rows.
        rows: which; default four, evenly spread.
        output: which, where f has several: a class.
        unit: of f.
        title: above the axes.
        ax: where to draw; default a new figure.

    Raises:
        DataError: no such row or output.

    Example:
        >>> import bnn, torch
        >>> x = torch.linspace(-1, 1, 30)[:, None]
        >>> ax = trace(bnn.prior_predictive(bnn.models.linear(1), x, draws=50), rows=[0, 29])
    """
    f = style.f_draws(prediction, output, "trace").astype(float)  # (chain, draw, row)
    have = f.shape[2]
    if rows is None:
        rows = sorted(set(np.linspace(0, have - 1, min(4, have)).round().astype(int).tolist()))
    if not len(rows) or any(row not in range(have) for row in rows):
        raise DataError(f"rows is {list(rows)} and the prediction has rows 0..{have - 1}.")
    ax = style.axes(ax)
    steps, told = np.arange(1, f.shape[1] + 1), []
    for lane, row in enumerate(rows):
        mean, sd = f[..., row].mean(), f[..., row].std()
        middle = -2 * _LANE * lane
        scaled = (f[..., row] - mean) / (sd or 1.0)
        for chain, values in enumerate(scaled):
            ax.plot(
                steps,
                middle + values.clip(-_LANE, _LANE),
                lw=0.6,
                alpha=0.8,
                color=style.SERIES[chain % len(style.SERIES)],
            )
        told.append(f"row {row}\n{mean:.3g} ± {sd:.2g}")
        if lane:
            ax.axhline(middle + _LANE, color=style.CHANCE, lw=1)
    ax.set(
        xlabel="draw",
        ylabel=style.within("f, mean ± standard deviation", unit),
        title=title,
        yticks=[-2 * _LANE * lane for lane in range(len(rows))],
        ylim=(-2 * _LANE * len(rows) + _LANE, _LANE),
    )
    ax.set_yticklabels(told, fontsize="small")
    ax.margins(x=0.01)
    chains = len(f)
    if chains > 6:  # colours come again
        ax.text(1.0, 1.01, f"{chains} chains", transform=ax.transAxes, ha="right", fontsize="small")
    else:
        for chain in range(chains):
            ax.plot([], [], color=style.SERIES[chain], lw=2, label=f"chain {chain + 1}")
        style.legend_below(ax, min(chains, 4))
    return ax
