"""Tables as pictures: a comparison of posteriors, and the findings of a diagnosis."""

from typing import TYPE_CHECKING, Any

import numpy as np

from bnn.diagnostics import Finding, Report
from bnn.errors import DataError
from bnn.plots import _style as style

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

_FAR = 5.0  # log2 of how far beyond its limit a value is drawn


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

    Example:
        >>> import bnn, pandas
        >>> table = pandas.DataFrame({"log_score": [-1.0], "log_score_se": [0.1]}, index=["nuts"])
        >>> ax = compare(table)
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
    ax.locator_params(axis="x", nbins=5)
    if hollow.any():
        style.legend_below(ax, drop=0.3)
    return ax


def diagnose(report: Report, *, title: str = "", ax: "Axes | None" = None) -> "Axes":
    """Findings of a fit against their limits: right of the line is doubtful, by so many times.

    Findings that are told without a limit are left out; `print(report)` says what each means.

    Args:
        report: of `posterior.diagnose()`.
        title: above the axes; default the verdict.
        ax: where to draw; default a new figure.

    Raises:
        TypeError: something else than a report.
        DataError: no finding has a limit.

    Example:
        >>> finding = Finding(
        ...     name="R-hat of f",
        ...     value=1.2,
        ...     threshold=1.01,
        ...     doubtful=True,
        ...     meaning="Chains part.",
        ...     advice="Raise warmup.",
        ... )
        >>> ax = diagnose(Report(title="a fit", findings=(finding,)))
    """
    style.require(report, Report, "diagnose", "posterior.diagnose()")
    limited = [each for each in report.findings if each.threshold is not None]
    if not limited:
        raise DataError("The report has no finding with a limit, so there is nothing to draw.")
    limited.sort(key=lambda each: -_excess(each))
    ax = style.axes(ax, (style.SIZE[0] + 1, max(2.0, 1.2 + 0.35 * len(limited))))
    ax.axvline(1.0, color=style.IDEAL, lw=1, ls="--")
    ax.axvspan(1.0, 2.0**_FAR, color=style.CHANCE, lw=0)
    for i, each in enumerate(limited):
        colour, marker = (style.TRUTH, "X") if each.doubtful else (style.SERIES[0], "o")
        ax.plot(2.0 ** _excess(each), i, marker, color=colour, ms=6)
        ax.annotate(
            f"{each.value:.3g} (limit {each.threshold:.3g})",
            (1.01, i),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize="small",
        )
    count = len(report.doubtful)
    ax.set_xscale("log", base=2)
    ax.set(
        xlabel="beyond its limit (times)",
        xlim=(2.0**-_FAR, 2.0**_FAR),
        ylim=(len(limited) - 0.5, -0.5),
        yticks=range(len(limited)),
        title=title or (f"{count} doubtful" if count else "nothing doubtful"),
    )
    ax.set_yticklabels([each.name for each in limited])
    ax.set_xticks([2.0**k for k in (-4, -2, 0, 2, 4)], ["÷ 16", "÷ 4", "limit", "× 4", "× 16"])
    return ax


def _excess(finding: Finding) -> float:
    """Log2 of how many times a value is beyond its limit, cut off at the ends of the picture.

    Which side of the limit is doubtful the finding tells: R-hat may not be large, nor ESS small. Of
    R-hat it is what it has above 1.
    """
    least = 1.0 if finding.name.startswith("R-hat") else 0.0
    value, limit = float(finding.value) - least, float(finding.threshold or 0.0) - least
    end = 0.95 * _FAR if finding.doubtful else -0.95 * _FAR
    if not (np.isfinite(value) and value > 0 and limit > 0):
        return end
    away = abs(np.log2(value / limit))
    return float(np.copysign(min(away, abs(end)), end))
