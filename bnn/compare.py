"""Compare: one table over posteriors, whatever method or model they came from."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bnn.arguments import check_arguments
from bnn.calibration import interval_coverage
from bnn.errors import ApproximationWarning, DataError
from bnn.posterior import Posterior

if TYPE_CHECKING:
    import pandas

LEVEL = 0.9


def compare(
    posteriors: Mapping[str, Posterior], data: Sequence[Any] | None = None
) -> "pandas.DataFrame":
    """One row for each posterior, the best log score first.

    Columns: `log_score`, mean log posterior predictive density of a row, nats, and `log_score_se`,
    its standard error over rows; `rmse` in units of y, or `accuracy` for labels; `coverage_90`,
    share of rows inside the central 90 % predictive interval (numbers only); `seconds` of the fit;
    without `data` also `high_k`, the rows whose leave-one-out score cannot be trusted (k > 0.7).

    Args:
        posteriors: by name.
        data: held-out arguments of the model, the observations last. Without it the log score is
            PSIS leave-one-out on the training rows and the other columns are in-sample; they then
            say how well a model fits, not how well it predicts.

    Raises:
        TypeError: not posteriors by name.
        DataError: no posterior; no rows in `data`; or posteriors fitted to different observations
            and no `data`.

    References:
        Vehtari, Gelman, Gabry (2017), Practical Bayesian model evaluation using leave-one-out
        cross-validation and WAIC.
    """
    import pandas

    if not isinstance(posteriors, Mapping):
        raise TypeError(
            f'compare got a {type(posteriors).__name__}. Pass {{"name": posterior, ...}}.'
        )
    if not posteriors:
        raise DataError('compare got no posteriors. Pass {"name": posterior, ...}.')
    if data is None:
        _check_same_observations(posteriors)
    rows = {name: _row(name, posterior, data) for name, posterior in posteriors.items()}
    table = pandas.DataFrame.from_dict(rows, orient="index")
    table.index.name = "held out" if data is not None else "leave one out"
    return table.dropna(axis="columns", how="all").sort_values("log_score", ascending=False)


def _row(name: str, posterior: Posterior, data: Sequence[Any] | None) -> dict[str, float]:
    if data is None:
        from bnn.export import loo

        elpd, se, k = loo(posterior)
        rows = posterior.data.rows
        score, error = elpd / rows, se / rows
        high = int((~(k <= 0.7)).sum())
        extra = {"high_k": high}
        if high:
            warnings.warn(
                f'Leave-one-out of "{name}" rests on {high} of {rows} rows with Pareto k > 0.7. '
                "Pass held-out data: compare({...}, data=(x_test, y_test)).",
                ApproximationWarning,
                stacklevel=3,
            )
        inputs, y = posterior.data.inputs, posterior.data.observations
    else:
        if not isinstance(data, tuple | list):
            raise TypeError(f"data is a {type(data).__name__}. Pass (x_test, y_test).")
        *inputs, y = check_arguments(tuple(data), posterior.data)
        if not len(y):
            raise DataError("The held-out data have no rows, so there is nothing to score.")
        extra = {}
        each = posterior.log_score(*data).double()
        score, error = (
            float(each.mean()),
            (float(each.std()) / math.sqrt(len(each)) if len(each) > 1 else math.nan),
        )
    prediction = posterior.predict(*inputs)
    row = {"log_score": score, "log_score_se": error} | extra
    if prediction.probs is not None:
        row["accuracy"] = float((prediction.probs.argmax(-1) == y).double().mean())
    else:
        row["rmse"] = _rmse(prediction.mean, y)
        row["coverage_90"] = float(interval_coverage(prediction.y, y, LEVEL))
    row["seconds"] = posterior.seconds
    return row


def _rmse(mean: Tensor, y: Tensor) -> float:
    return float((mean - y).double().square().mean().sqrt())


def _check_same_observations(posteriors: Mapping[str, Posterior]) -> None:
    first, *rest = posteriors.values()
    for other in rest:
        if not torch.equal(first.data.observations, other.data.observations):
            raise DataError(
                "The posteriors were fitted to different observations, so leave-one-out does not "
                "compare them. Pass held-out data: compare({...}, data=(x_test, y_test))."
            )
