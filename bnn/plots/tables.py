"""Tables as pictures: a comparison of posteriors."""

from typing import TYPE_CHECKING, Any

import numpy as np

from bnn.errors import DataError
from bnn.plots import _style as style

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes


def compare(table: "pandas.DataFrame", *, title: str = "", ax: "Axes | None" = None) -> "Axes":
    """Log scores of a comparison, the best at the top, each with its standard error over rows.

    Posteriors are scored on the same rows, so that scores differ more surely than the bars say. A
    score that the table calls not comparable is hollow.

    Args:
        table: of `bnn.compare`.
        title: above the axes.
        ax: where to draw; default a new figure.

    Raises:
        DataError: the table has no log score.
    """
    columns: Any = getattr(table, "columns", ())
    if not {"log_score", "log_score_se"} <= set(columns) or not len(table):
        raise DataError("plots.compare draws a table of bnn.compare, with log_score in it.")
    ordered = table.sort_values("log_score", ascending=False)
    score = ordered["log_score"].to_numpy(float)
    error = ordered["log_score_se"].to_numpy(float)
    ax = style.axes(ax, (style.SIZE[0], max(2.0, 1.2 + 0.35 * len(score))))
    if np.isfinite(score[0]):
        ax.axvline(float(score[0]), color=style.IDEAL, lw=1, ls="--")
    place = np.arange(len(score))
    marks = ordered["not_comparable"] if "not_comparable" in ordered else [""] * len(score)
    known = np.isfinite(score)
    hollow = known & np.array(["log_score" in str(mark).split(", ") for mark in marks])
    for rows, fill in ((known & ~hollow, style.SERIES[0]), (hollow, "white")):
        if rows.any():
            ax.errorbar(
                score[rows],
                place[rows],
                xerr=np.nan_to_num(error[rows]),
                fmt="o",
                ms=5,
                capsize=3,
                color=style.SERIES[0],
                markerfacecolor=fill,
                label="not comparable" if fill == "white" else "log score",
            )
    for i in np.flatnonzero(~np.isfinite(score)):
        told = ("axes fraction", "data")
        ax.annotate("no score", (0.02, i), xycoords=told, va="center", fontsize="small")
    how = f", {table.index.name}" if table.index.name else ""
    ax.set(
        xlabel=f"log score of a row (nats{how}), ± standard error",
        yticks=place,
        ylim=(len(score) - 0.5, -0.5),
        title=title,
    )
    ax.set_yticklabels([str(name) for name in ordered.index])
    if hollow.any():
        style.legend_below(ax, drop=0.3)
    return ax
