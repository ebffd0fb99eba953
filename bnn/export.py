"""Export to ArviZ, both majors: the one file that imports it. Groups are plain NumPy until the end.

ArviZ 0.x returns `InferenceData`, 1.x an xarray `DataTree`; group names, variables, coordinates and
dims are the same, and either opens the other's netCDF file. The majors' own `from_dict` name the
axes of `predictions` differently and take one list of dims for a name, in whatever group: so the
groups are built here.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bnn.data import take
from bnn.devices import on
from bnn.errors import DataError, ModelError
from bnn.prediction import Prediction
from bnn.prior import prior_draws
from bnn.turns import ALONE

if TYPE_CHECKING:
    from bnn.data import Data
    from bnn.posterior import Posterior

_PRIOR_DRAWS = 500
Variables = dict[str, tuple[Sequence[str], np.ndarray]]
"""A group: variable -> names of its axes, and its array."""


def to_arviz(
    posterior: "Posterior",
    predictions: Prediction | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
) -> Any:
    """The posterior as an ArviZ object.

    Groups: posterior, posterior_predictive (f and y at the training rows), log_likelihood,
    sample_stats, prior, prior_predictive, observed_data, constant_data; with `predictions` also
    predictions and predictions_constant_data. A group that cannot be had is left out: the
    predictive ones where the model does not run without its observations or its rows came from a
    loader, log_likelihood where the rows are one statement.

    Axes: chain, draw, row; for an input of two axes its columns, by name where it had names; and
    <variable>_dim_<axis> for the rest, or what `dims` calls them.
    """
    data, sites = posterior.data, posterior.sites
    y = sites.observed
    rowed = {k for k, site in (sites.latent | sites.seams).items() if site.local and site.shape}
    kept = data.loader is None and sites.every_row
    draws = posterior.draws | (posterior.deterministic() if kept else {})
    groups: dict[str, Variables] = {"posterior": _draws(draws, rowed)}
    if kept and sites.row_axis is not None and not (sites.subsampled and sites.locals):
        groups["log_likelihood"] = _draws({y: posterior.log_likelihood()}, {y})
    if kept and sites.predicts:
        groups["posterior_predictive"] = _predictive(posterior.predict(*data.inputs), y)
    groups["sample_stats"] = _draws(posterior.stats)
    if sites.predicts:
        with on(posterior.device):
            latent, before = prior_draws(posterior.model, data.inputs, sites, _PRIOR_DRAWS, seed=0)
        groups["prior"] = _draws(latent, rowed)
        if kept and before is not None:
            groups["prior_predictive"] = _predictive(before, y)
    if kept:
        groups["observed_data"] = {y: _named(y, data.observations, "row")}
        groups["constant_data"] = _inputs(data, data.inputs)
    if predictions is not None:
        groups["predictions"] = _predictive(predictions, y)
        groups["predictions_constant_data"] = _inputs(data, predictions.inputs)
    columns = {f"{name}_column": names for name, names in data.columns.items()}
    labels = {**columns, **(coords or {})}
    return from_groups(_called(groups, dims or {}, labels), labels, _attributes(posterior))


def _called(
    groups: Mapping[str, Variables],
    dims: Mapping[str, Sequence[str]],
    coords: Mapping[str, Sequence[Any]],
) -> dict[str, Variables]:
    """The groups with the axes of some variables called by the user.

    Raises:
        DataError: no such variable, another number of axes, or labels for another number of places.
    """
    known: dict[str, list[str]] = {}
    for group in groups.values():
        for name, (axes, _) in group.items():
            known[name] = [axis for axis in axes if axis.startswith(f"{name}_dim_")]
    named = {}
    for name, given in dims.items():
        own = known.get(name, [])
        if isinstance(given, str) or not own or len(own) != len(given):
            raise DataError(
                f'dims["{name}"] is {given!r}, and "{name}" has {len(own)} axes without a name. '
                f"Pass a list of names; of such axes {_counted(known) or 'no variable has any'}."
            )
        named |= dict(zip(own, given, strict=True))
    called: dict[str, Variables] = {
        group: {k: ([named.get(axis, axis) for axis in axes], v) for k, (axes, v) in each.items()}
        for group, each in groups.items()
    }
    for group in called.values():
        for name, (axes, array) in group.items():
            for axis, size in zip(axes, array.shape, strict=True):
                if len(coords.get(axis, range(size))) != size:
                    raise DataError(
                        f'coords["{axis}"] has {len(coords[axis])} labels, and that axis of '
                        f'"{name}" has {size} places.'
                    )
    return called


def _counted(known: Mapping[str, Sequence[str]]) -> str:
    return ", ".join(f'"{name}" has {len(axes)}' for name, axes in known.items() if axes)


def from_groups(
    groups: Mapping[str, Variables],
    coords: Mapping[str, Sequence[Any]] | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> Any:
    """Named arrays as an ArviZ object of whichever major is installed.

    Args:
        groups: by name; empty ones are left out.
        coords: labels along an axis; default 0, 1, 2, ...
        attributes: of the whole.
    """
    import arviz
    import xarray

    az: Any = arviz  # the two majors differ in their signatures
    datasets = {}
    for group, variables in groups.items():
        sizes = {
            axis: size
            for axes, array in variables.values()
            for axis, size in zip(axes, array.shape, strict=True)
        }
        labels = {axis: (coords or {}).get(axis, np.arange(size)) for axis, size in sizes.items()}
        if variables:
            datasets[group] = xarray.Dataset(variables, coords=labels)  # type: ignore[arg-type]
    if int(az.__version__.split(".")[0]) >= 1:
        root = xarray.Dataset(attrs=dict(attributes or {}))
        return xarray.DataTree.from_dict({"/": root, **datasets})
    return az.InferenceData(attrs=dict(attributes or {}), **datasets)


def _named(name: str, value: Any, *lead: str) -> tuple[Sequence[str], np.ndarray]:
    """An array with its first axes named by `lead` and the others by variable and place."""
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    samples = sum(axis in ("chain", "draw") for axis in lead)
    rest = [f"{name}_dim_{i - samples}" for i in range(len(lead), array.ndim)]
    return [*lead, *rest], array


def _draws(values: Mapping[str, Tensor], rowed: "set[str] | frozenset" = frozenset()) -> Variables:
    """(chain, draw, *) each; of those named in `rowed` the next axis is the row."""
    return {
        k: _named(k, v, "chain", "draw", *(["row"] if k in rowed else []))
        for k, v in values.items()
    }


def _predictive(prediction: Prediction, y: str) -> Variables:
    """Draws of f and of the observations under the observed site's own name."""
    return _draws({"f": prediction.f, y: prediction.y}, {"f", y})


def _inputs(data: "Data", inputs: tuple[Tensor, ...]) -> Variables:
    return {
        k: _named(k, v, *["row", f"{k}_column"][: v.ndim if v.ndim <= 2 else 1])
        for k, v in zip(data.names, inputs, strict=False)
    }


def _attributes(posterior: "Posterior") -> dict[str, Any]:
    import bnn

    return {
        "inference_library": "bnn",
        "inference_library_version": bnn.__version__,
        "torch_version": str(torch.__version__),
        "method": repr(posterior.method),
        "seed": str(posterior.seed),
        "sampling_time": posterior.seconds,
        "elbo": np.nan if posterior.elbo is None else posterior.elbo,
        "log_evidence": np.nan if posterior.log_evidence is None else posterior.log_evidence,
    }


def psis(log_ratios: Tensor) -> tuple[float, float]:
    """Pareto smoothed importance sampling of log ratios, (draw,).

    Returns:
        k of the tail, 0 where the ratios are all the same; and the log of the mean ratio, smoothed.
    """
    import arviz

    ratios = log_ratios.double().cpu().numpy()
    if np.ptp(ratios) < 1e-9:
        return 0.0, float(ratios.mean())
    with ALONE, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if hasattr(arviz, "psislw"):
            weights, k = arviz.psislw(ratios)
        else:  # 1.x takes log likelihoods, and turns their sign itself
            from arviz_stats.base import array_stats  # type: ignore[import-not-found]

            weights, k = array_stats.psislw(-ratios)
    least = int(ratios.argmin())  # outside the tail: what normalising took off shows there
    return float(k), float(ratios[least] - weights[least]) - math.log(len(ratios))


def loo(posterior: "Posterior", most: int | None = None) -> tuple[float, float, np.ndarray]:
    """PSIS-LOO by ArviZ: the expected log density of a new row, its standard error; k of each row.

    Where the draws are too few or too alike to fit a Pareto tail to (a mode, a small ensemble),
    ArviZ 1.x raises and 0.x gives k = inf. Here both give plain importance sampling and k = inf.

    Args:
        posterior: that keeps its rows.
        most: rows at most, evenly spread over all; None for all.

    Raises:
        ModelError: the rows are one statement.
        DataError: the rows came from a loader.
    """
    import arviz

    az: Any = arviz
    if posterior.sites.row_axis is None:
        raise ModelError("LOO needs the likelihood of each row. Put the observed site in a plate.")
    y, each = posterior.sites.observed, _by_row(posterior, most)
    made = from_groups(
        {"posterior": _draws(posterior.draws), "log_likelihood": _draws({y: each}, {y})}
    )
    try:
        with ALONE, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # k is returned, and what it means is said once
            result: Any = az.loo(made, pointwise=True)
    except (ValueError, IndexError):
        flat = each.flatten(0, 1).double()
        row = math.log(len(flat)) - (-flat).logsumexp(0)
        se = float(row.std(correction=0)) / math.sqrt(len(row))
        return float(row.mean()), se, np.full(len(row), np.inf)
    elpd, k = getattr(result, "elpd", None), np.asarray(result.pareto_k)
    value = float(result.elpd_loo if elpd is None else elpd)
    return value / len(k), float(result.se) / len(k), k


def _by_row(posterior: "Posterior", most: int | None) -> Tensor:
    """Log likelihood of the training rows, (chain, draw, row), of some where there are more."""
    data, sites = posterior.data, posterior.sites
    if data.loader is not None or most is None or data.rows <= most:
        return posterior.log_likelihood()
    some = torch.linspace(0, data.rows - 1, most).round().long()
    if sites.locals or sites.plate is None or not data.inputs:  # no row without the others
        return posterior.log_likelihood()[..., some]
    return posterior.log_likelihood(*take(data.tensors, some))
