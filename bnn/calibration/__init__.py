"""Calibration: do stated probabilities come true? Functions of arrays; no posterior in sight.

labels          `ece`, `reliability`, `set_coverage`, `brier`, `brier_decomposition`, `nll`
numbers         `interval_coverage`, `pit_coverage`, `sharpness`, `pit`, `loo_pit`, `crps`
both            `log_score`, `joint_log_score` with `dyadic`
PIT and ranks   `uniformity`
recalibration   `temperature`, `isotonic`, `quantiles`: fitted to held-out rows, then called

They take what a `Prediction` holds, or any tensors, NumPy arrays or lists of those shapes:

    prediction = posterior.predict(x_test)
    bnn.calibration.ece(prediction.probs, y_test)
    bnn.calibration.crps(prediction.outcomes, y_test).mean()
    bnn.calibration.joint_log_score(posterior.log_likelihood(x_test, y_test))
"""

from bnn.calibration.labels import (
    Brier,
    Reliability,
    brier,
    brier_decomposition,
    ece,
    nll,
    reliability,
    set_coverage,
)
from bnn.calibration.numbers import (
    crps,
    interval_coverage,
    loo_pit,
    pit,
    pit_coverage,
    sharpness,
)
from bnn.calibration.recalibration import (
    Isotonic,
    Quantiles,
    Temperature,
    isotonic,
    quantiles,
    temperature,
)
from bnn.calibration.scores import dyadic, joint_log_score, log_score
from bnn.calibration.uniform import Uniformity, uniformity

__all__ = [
    "Brier",
    "Isotonic",
    "Quantiles",
    "Reliability",
    "Temperature",
    "Uniformity",
    "brier",
    "brier_decomposition",
    "crps",
    "dyadic",
    "ece",
    "interval_coverage",
    "isotonic",
    "joint_log_score",
    "log_score",
    "loo_pit",
    "nll",
    "pit",
    "pit_coverage",
    "quantiles",
    "reliability",
    "set_coverage",
    "sharpness",
    "temperature",
    "uniformity",
]
