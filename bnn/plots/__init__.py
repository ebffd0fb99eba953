"""Pictures: matplotlib, axes in and axes out, the same colours for the same things everywhere.

along an input    `band`, `functions`, `decomposition`
calibration       `truth`, `coverage`, `pit`, `reliability`, `risk_coverage`
transformers      `attention`, `saliency`, `saliency_map`
fits              `trace`, `history`, `members`, `members_film`, `diagnose`, `compare`, `sbc`

All but `attention` and `saliency_map` take `ax=`, and open a figure where there is none. Aleatoric
is orange and epistemic blue.
"""

from bnn.plots._style import ALEATORIC, EPISTEMIC, IDEAL, MARKERS, SERIES, TOTAL, TRUTH
from bnn.plots.calibrated import coverage, pit, reliability, sbc
from bnn.plots.functions import functions, trace
from bnn.plots.intervals import band, truth
from bnn.plots.tables import compare, diagnose
from bnn.plots.training import history, members, members_film
from bnn.plots.transformers import attention, saliency, saliency_map
from bnn.plots.uncertainty import decomposition, risk_coverage

__all__ = [
    "ALEATORIC",
    "EPISTEMIC",
    "IDEAL",
    "MARKERS",
    "SERIES",
    "TOTAL",
    "TRUTH",
    "attention",
    "band",
    "compare",
    "coverage",
    "decomposition",
    "diagnose",
    "functions",
    "history",
    "members",
    "members_film",
    "pit",
    "reliability",
    "risk_coverage",
    "saliency",
    "saliency_map",
    "sbc",
    "trace",
    "truth",
]
