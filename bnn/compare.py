"""Compare: one table over posteriors, whatever method or model they came from."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bnn import markup
from bnn.arguments import check_arguments
from bnn.calibration import ece, interval_coverage
from bnn.errors import ApproximationWarning, DataError
from bnn.posterior import Posterior

if TYPE_CHECKING:
    import pandas

LEVEL = 0.9
_LEVELS = torch.linspace(0.05, 0.95, 19)
_HIGH = 0.7  # of Pareto's k: Vehtari, Gelman, Gabry (2017)


def compare(
    posteriors: Mapping[str, Posterior], data: Sequence[Any] | None = None
) -> "pandas.DataFrame":
    """One row for each posterior, the best log score first.

    Columns, each left out where no posterior has it:

    - `log_score`, mean log posterior predictive density of a row, nats; `log_score_se`, its
      standard error over rows.
    - `rmse`, units of y, or `accuracy` for labels.
    - `coverage_90`, share of rows inside the central 90 % predictive interval, and
      `coverage_error`, the mean distance of observed from stated coverage over 19 levels, for
      numbers; `ece`, expected calibration error of the most probable class, for labels.
    - `elbo` and `log_evidence` of the fit, nats, where the method has them.
    - `seconds` of the fit.
    - `high_k` and `max_k`, without `data`: rows whose leave-one-out score cannot be trusted
      (k > 0.7), and the largest k.
    - `not_comparable`: the columns of this row that do not compare with the other rows;
      `table.attrs["not_comparable"]` tells why, by column.

    What does not compare, and with what:

    - without `data`, `log_score` of a posterior with rows of high k, or whose draws are all the
      same: plain importance sampling, too good. Of methods that only approximate the posterior it
      is leave-one-out of the approximation.
    - without `data`, all columns but the log score, which are in-sample: they say how well a model
      fits, and favour the more flexible one.
    - `elbo` of other models, methods or data: each bound has a gap of its own. Of one model, one
      method and the same data the larger bound is the better approximation.
    - `log_evidence` of other data. Of other models it compares, each with the error of its method.

    Args:
        posteriors: by name.
        data: held-out arguments of the model, the observations last. Without it the log score is
            PSIS leave-one-out on the training rows.

    Raises:
        TypeError: not posteriors by name.
        DataError: no posterior; no rows in `data`; or posteriors fitted to different observations
            and no `data`.

    References:
        Vehtari, Gelman, Gabry (2017), Practical Bayesian model evaluation using leave-one-out
        cross-validation and WAIC. Kuleshov, Fenner, Ermon (2018), Accurate uncertainties for deep
        learning using calibrated regression (coverage error).

    Example:
        >>> import bnn
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> model = bnn.models.linear(1, likelihood=bnn.models.likelihoods.Gaussian(0.1))
        >>> fitted = bnn.fit(model, x, x[:, 0], method=bnn.Laplace(steps=200, draws=100))
        >>> table = bnn.compare({"laplace": fitted}, data=(x, x[:, 0]))
        >>> list(table.columns)[:4]
        ['log_score', 'log_score_se', 'rmse', 'coverage_90']
    """
    import pandas

    if not isinstance(posteriors, Mapping):
        raise TypeError(
            f'compare got a {type(posteriors).__name__}. Pass {{"name": posterior, ...}}.'
        )
    if not posteriors:
        raise DataError('compare got no posteriors. Pass {"name": posterior, ...}.')
    if data is None and not _same(posteriors.values(), "observations"):
        raise DataError(
            "The posteriors were fitted to different observations, so leave-one-out does not "
            "compare them. Pass held-out data: compare({...}, data=(x_test, y_test))."
        )
    rows = {name: _row(name, posterior, data) for name, posterior in posteriors.items()}
    table = pandas.DataFrame.from_dict(rows, orient="index")
    table.index.name = "held out" if data is not None else "leave one out"
    absent = [k for k in ("elbo", "log_evidence") if bool(table[k].isna().all())]
    table = table.drop(columns=absent).sort_values("log_score", ascending=False)
    return _marked(table, posteriors, in_sample=data is None)


@cache
def _table_kind() -> Any:
    """A `pandas.DataFrame` that shows, where it is whole, what does not compare."""
    import pandas

    class Comparison(pandas.DataFrame):
        def __repr__(self) -> str:
            with pandas.option_context("display.max_columns", None):  # a terminal hides some
                return "\n".join([super().__repr__(), *_reasons(self)])

        def _repr_html_(self) -> str:
            rows = ([str(name), *map(_cell, each)] for name, *each in self.itertuples())
            page = markup.table((str(self.index.name), *map(str, self.columns)), rows)
            return page + (markup.items(_reasons(self)) if _reasons(self) else "")

        def __reduce_ex__(self, protocol: Any) -> Any:
            return pandas.DataFrame.copy, (self.copy(),)  # a plain frame: no file has this class

    return Comparison


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _reasons(table: "pandas.DataFrame") -> list[str]:
    """Why columns do not compare, a line each."""
    return [f"{k}: {why}" for k, why in table.attrs.get("not_comparable", {}).items()]


def _row(name: str, posterior: Posterior, data: Sequence[Any] | None) -> dict[str, float]:
    extra: dict[str, float] = {}
    if data is None:
        from bnn.export import loo

        elpd, se, k = loo(posterior)
        rows = posterior.data.rows
        score, error = elpd / rows, se / rows
        high = int((~(k <= _HIGH)).sum())
        extra = {"high_k": high, "max_k": float(k.max())}
        if high:
            warnings.warn(
                f'Leave-one-out of "{name}" rests on {high} of {rows} rows with Pareto k > '
                f"{_HIGH}. Pass held-out data: compare({{...}}, data=(x_test, y_test)).",
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
        each = posterior.log_score(*data).double()
        score, error = (
            float(each.mean()),
            (float(each.std()) / math.sqrt(len(each)) if len(each) > 1 else math.nan),
        )
    prediction = posterior.predict(*inputs)
    row = {"log_score": score, "log_score_se": error}
    if prediction.probs is not None:
        row["accuracy"] = float((prediction.probs.argmax(-1) == y).double().mean())
        row["ece"] = ece(prediction.probs, y)
    else:
        row["rmse"] = _rmse(prediction.mean, y)
        row["coverage_90"] = float(interval_coverage(prediction.outcomes, y, LEVEL))
        observed = interval_coverage(prediction.outcomes, y, _LEVELS).cpu()
        row["coverage_error"] = float((observed - _LEVELS).abs().mean())
    row["elbo"] = math.nan if posterior.elbo is None else posterior.elbo
    row["log_evidence"] = math.nan if posterior.log_evidence is None else posterior.log_evidence
    row["seconds"] = posterior.seconds
    return row | extra


def _rmse(mean: Tensor, y: Tensor) -> float:
    return float((mean - y).double().square().mean().sqrt())


def _marked(
    table: "pandas.DataFrame", posteriors: Mapping[str, Posterior], *, in_sample: bool
) -> "pandas.DataFrame":
    """With the column `not_comparable`, and the reasons in `attrs`."""
    why: dict[str, str] = {}
    marks: dict[str, list[str]] = {name: [] for name in table.index}

    def mark(column: str, names: Iterable[str], reason: str) -> None:
        for name in names if column in table else ():
            marks[name].append(column)
            why[column] = reason

    everything = list(table.index)
    if in_sample:
        doubtful = [name for name in everything if table.loc[name, "high_k"]]
        mark("log_score", doubtful, f"rests on rows with k > {_HIGH}, and is likely too good")
        for column in ("rmse", "accuracy", "coverage_90", "coverage_error", "ece"):
            mark(column, everything, "is in-sample, and favours the more flexible model")
    for column, aspects, reason in (
        ("elbo", tuple(_ASPECTS), "bounds with gaps of their own"),
        ("log_evidence", ("observations", "inputs"), "evidence of other data"),
    ):
        names = [name for name, each in posteriors.items() if getattr(each, column) is not None]
        some = [posteriors[name] for name in names]
        apart = [aspect for aspect in aspects if some and not _same(some, aspect)]
        if apart:
            mark(column, names, f"{reason}: they differ in {', '.join(apart)}")
    if why:
        table["not_comparable"] = [", ".join(marks[name]) for name in table.index]
    made = _table_kind()(table)
    made.attrs["not_comparable"] = why
    return made


_ASPECTS: dict[str, Callable[[Posterior], Any]] = {
    "model": lambda posterior: posterior.model,
    "method": lambda posterior: type(posterior.method),
    "observations": lambda posterior: posterior.data.observations,
    "inputs": lambda posterior: posterior.data.inputs,
}


def _same(posteriors: Iterable[Posterior], aspect: str) -> bool:
    """True if an aspect is the same of all posteriors."""
    first, *rest = (_ASPECTS[aspect](each) for each in posteriors)
    return all(_equal(first, other) for other in rest)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, tuple):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return a is b
