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
from bnn.calibration import ece, interval_coverage, pit_coverage, set_coverage
from bnn.errors import ApproximationWarning, DataError, ModelError
from bnn.posterior import Posterior

if TYPE_CHECKING:
    import pandas

LEVEL = 0.9
_LEVELS = torch.linspace(0.05, 0.95, 19)
_HIGH = 0.7  # of Pareto's k: Vehtari, Gelman, Gabry (2017)
_LOO = ("loo", "loo_se", "high_k", "max_k")  # beside held-out scores,
_LOO_ROWS = 1_000  # of so many rows: each costs a millisecond
_WHOLE = 2.0**23  # from there on every float32 is whole
_LABELS, _COUNTS, _NUMBERS = "labels", "counts", "numbers"


def compare(
    posteriors: Mapping[str, Posterior], data: Sequence[Any] | None = None
) -> "pandas.DataFrame":
    """One row for each posterior, the best log score first.

    Columns, each left out where no posterior has it:

    - `log_score`, mean log posterior predictive density of a row, nats; `log_score_se`, its
      standard error over rows. Of held-out rows; without `data` leave-one-out.
    - `rmse`, units of y, or `accuracy` for labels.
    - `coverage_90`: share of rows inside the central 90 % predictive interval; of labels, in the
      smallest set that has 90 % of the probability (at least .9 where calibrated, and of counts
      too: a set can have more).
    - `coverage_error`, the mean distance of observed from stated coverage over 19 levels, for
      numbers (by PIT values, so that it is 0 of calibrated counts too); `ece`, expected calibration
      error of the most probable class, for labels.
    - `loo` and `loo_se`, with `data`: the leave-one-out score of a training row (PSIS), beside the
      held-out one; of at most 1,000 rows, evenly spread. Far apart, the held-out rows are of
      another kind, or the score is too good.
    - `high_k` and `max_k`: rows whose leave-one-out score cannot be trusted (k > 0.7), and the
      largest k.
    - `elbo` and `log_evidence` of the fit, nats, where the method has them.
    - `seconds` of the fit.
    - `not_comparable`: the columns of this row that do not compare with the other rows, or that
      could not be computed; `table.attrs["not_comparable"]` tells why, by column, and
      `table.attrs["notes"]` what else there is to say. Both are printed.

    What does not compare, and with what:

    - the leave-one-out score (`loo`, and `log_score` without `data`) of a posterior with rows of
      high k, or whose draws are all the same: plain importance sampling, too good. Of methods that
      only approximate the posterior it is leave-one-out of the approximation. `loo` of other
      observations.
    - without `data`, all columns but the log score, which are in-sample: they say how well a model
      fits, and favour the more flexible one.
    - `elbo` of other models, methods or data: each bound has a gap of its own. Of one model, one
      method and the same data the larger bound is the better approximation.
    - `log_evidence` of other data, or of a method's own random sites beside that of weights. Of
      other models it compares, each with the error of its method.
    - densities of numbers beside probabilities of counts or labels: log scores, evidence, and
      `coverage_90` of intervals beside that of sets of labels.

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
        >>> list(table.columns)[:7]
        ['log_score', 'log_score_se', 'rmse', 'coverage_90', 'coverage_error', 'loo', 'loo_se']
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
    lost: dict[str, str] = {}
    kinds: dict[str, str] = {}
    rows = {name: _row(name, each, data, lost, kinds) for name, each in posteriors.items()}
    table = pandas.DataFrame.from_dict(rows, orient="index")
    table.index.name = "held out" if data is not None else "leave one out"
    some = [k for k in (*_LOO, "elbo", "log_evidence") if k in table]
    absent = [k for k in some if bool(table[k].isna().all())]
    table = table.drop(columns=absent).sort_values("log_score", ascending=False)
    return _marked(table, posteriors, lost, kinds, in_sample=data is None)


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
    """Why columns do not compare, and what else there is to say, a line each."""
    told = [*table.attrs.get("not_comparable", {}).items(), *table.attrs.get("notes", {}).items()]
    return [f"{k}: {why}" for k, why in told]


def _row(
    name: str,
    posterior: Posterior,
    data: Sequence[Any] | None,
    lost: dict[str, str],
    kinds: dict[str, str],
) -> dict[str, float]:
    """The numbers of a posterior.

    `lost` is told why there is no leave-one-out score, `kinds` what y is to its model.
    """
    from bnn.export import loo

    if data is None:
        score, error, k = loo(posterior)
        rows, high = len(k), int((~(k <= _HIGH)).sum())
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
        try:
            left_out, se, k = loo(posterior, _LOO_ROWS)
            high = int((~(k <= _HIGH)).sum())
            found = left_out, se, high, float(k.max())
        except (ModelError, DataError) as told:
            found, lost[name] = [math.nan] * 4, str(told)
        extra = dict(zip(_LOO, found, strict=True))
    prediction = posterior.predict(*inputs)
    row = {"log_score": score, "log_score_se": error}
    if prediction.probs is not None:
        row["accuracy"] = float((prediction.probs.argmax(-1) == y).double().mean())
        row["coverage_90"] = float(set_coverage(prediction.probs, y, LEVEL))
        kinds[name] = _LABELS
        row["ece"] = ece(prediction.probs, y)
    else:
        drawn = prediction.outcomes
        row["rmse"] = _rmse(prediction.mean, y)
        row["coverage_90"] = float(interval_coverage(drawn, y, LEVEL))
        row["coverage_error"] = float(
            (pit_coverage(drawn, y, _LEVELS).cpu() - _LEVELS).abs().mean()
        )
        whole = bool((drawn == drawn.round()).all()) and float(drawn.abs().max()) < _WHOLE
        kinds[name] = _COUNTS if whole else _NUMBERS
    row |= extra
    row["elbo"] = math.nan if posterior.elbo is None else posterior.elbo
    row["log_evidence"] = math.nan if posterior.log_evidence is None else posterior.log_evidence
    row["seconds"] = posterior.seconds
    return row


def _rmse(mean: Tensor, y: Tensor) -> float:
    return float((mean - y).double().square().mean().sqrt())


def _marked(
    table: "pandas.DataFrame",
    posteriors: Mapping[str, Posterior],
    lost: Mapping[str, str],
    kinds: Mapping[str, str],
    *,
    in_sample: bool,
) -> "pandas.DataFrame":
    """With the column `not_comparable`, and the reasons in `attrs`."""
    why: dict[str, str] = {}
    notes: dict[str, str] = {}
    marks: dict[str, list[str]] = {name: [] for name in table.index}

    def mark(column: str, names: Iterable[str], reason: str) -> None:
        for name in names if column in table else ():
            if column not in marks[name]:
                marks[name].append(column)
            if reason not in why.get(column, ""):
                why[column] = "; ".join([*([why[column]] if column in why else []), reason])

    everything = list(table.index)
    if "high_k" in table:
        doubtful = [name for name in everything if table.loc[name, "high_k"] > 0]
        column = "log_score" if in_sample else "loo"
        mark(column, doubtful, f"rests on rows with k > {_HIGH}, and is likely too good")
    if not in_sample and len(lost) < len(posteriors):
        for name, reason in lost.items():
            mark("loo", [name], f'none of "{name}": {reason}')
        if not _same(posteriors.values(), "observations"):
            mark("loo", everything, "of the rows of each fit, which differ")
        most = max(each.data.rows for name, each in posteriors.items() if name not in lost)
        if most > _LOO_ROWS:
            notes["loo"] = f"of {_LOO_ROWS:,} training rows, evenly spread over up to {most:,}"
    elif not in_sample:
        notes["loo"] = f"none. {next(iter(lost.values()))}"
    if in_sample:
        for column in ("rmse", "accuracy", "coverage_90", "coverage_error", "ece"):
            mark(column, everything, "is in-sample, and favours the more flexible model")
    for column, aspects, reason in (
        ("elbo", ("model", "method", "observations", "inputs"), "bounds with gaps of their own"),
        ("log_evidence", ("observations", "inputs"), "evidence of other data"),
        ("log_evidence", ("what the method adds",), "evidence of other sites"),
    ):
        names = [name for name, each in posteriors.items() if getattr(each, column) is not None]
        some = [posteriors[name] for name in names]
        apart = [aspect for aspect in aspects if some and not _same(some, aspect)]
        if apart:
            mark(column, names, f"{reason}: they differ in {', '.join(apart)}")
    if len(found := set(kinds.values())) > 1:
        if _NUMBERS in found:
            for column in ("log_score", "loo", "log_evidence"):
                mark(column, everything, "a density of numbers beside a probability")
        if _LABELS in found:
            mark("coverage_90", everything, "of intervals beside sets of labels")
    if why:
        table["not_comparable"] = [", ".join(marks[name]) for name in table.index]
    made = _table_kind()(table)
    made.attrs |= {"not_comparable": why, "notes": notes}
    return made


_ASPECTS: dict[str, Callable[[Posterior], Any]] = {
    "model": lambda posterior: posterior.model,
    "method": lambda posterior: type(posterior.method),
    "observations": lambda posterior: posterior.data.observations,
    "inputs": lambda posterior: posterior.data.inputs,
    "what the method adds": lambda posterior: (
        posterior.method.adds_sites,
        *sorted(f"{k} {tuple(v.shape[2:])}" for k, v in _added(posterior).items()),
    ),
}


def _added(posterior: Posterior) -> dict[str, Tensor]:
    """Draws of sites that are the method's own."""
    return {k: v for k, v in posterior.draws.items() if k not in posterior.sites.latent}


def _same(posteriors: Iterable[Posterior], aspect: str) -> bool:
    """True if an aspect is the same of all posteriors."""
    first, *rest = (_ASPECTS[aspect](each) for each in posteriors)
    return all(_equal(first, other) for other in rest)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, tuple):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b if isinstance(a, str) else a is b
