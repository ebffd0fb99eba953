"""Export to ArviZ, both majors: the one file that imports it. Groups are plain NumPy until the end.

ArviZ 0.x returns `InferenceData`, 1.x an xarray `DataTree`; group names, variables, coordinates and
dims are the same, and either opens the other's netCDF file.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bnn.errors import ModelError
from bnn.prediction import Prediction
from bnn.prior import prior_draws

if TYPE_CHECKING:
    from bnn.data import Data
    from bnn.posterior import Posterior

_PRIOR_DRAWS = 500


def to_arviz(posterior: "Posterior", predictions: Prediction | None = None) -> Any:
    """The posterior as an ArviZ object.

    Groups: posterior, posterior_predictive (f and y at the training rows), log_likelihood,
    sample_stats, prior, prior_predictive, observed_data, constant_data; with `predictions` also
    predictions and predictions_constant_data. A group that cannot be had is left out: the
    predictive ones where the model does not run without its observations or its rows came from a
    loader, log_likelihood where the rows are one statement.
    """
    groups: dict[str, dict[str, Any]] = {"posterior": dict(posterior.draws)}
    data, sites = posterior.data, posterior.sites
    y = sites.observed
    kept = data.loader is None and not sites.subsampled
    if kept:
        groups["posterior"] |= posterior.deterministic()
    if kept and sites.row_axis is not None:
        groups["log_likelihood"] = {y: posterior.log_likelihood()}
    if kept and sites.predicts:
        here = posterior.predict(*data.inputs)
        groups["posterior_predictive"] = _predictive(here, y)
    if posterior.stats:
        groups["sample_stats"] = dict(posterior.stats)
    if sites.predicts:
        latent, before = prior_draws(posterior.model, data.inputs, sites, _PRIOR_DRAWS, seed=0)
        groups["prior"] = latent
        if kept:
            groups["prior_predictive"] = _predictive(before, y)
    if kept:
        groups["observed_data"] = {y: data.observations}
        groups["constant_data"] = _inputs(data, data.inputs)
    if predictions is not None:
        groups["predictions"] = _predictive(predictions, y)
        groups["predictions_constant_data"] = _inputs(data, predictions.inputs)
    dims, coords = _axes(posterior, groups)
    return from_groups(groups, dims, coords, _attributes(posterior))


def from_groups(
    groups: Mapping[str, Mapping[str, Any]],
    dims: Mapping[str, list[str]],
    coords: Mapping[str, Iterable[Any]],
    attributes: Mapping[str, Any],
) -> Any:
    """Named arrays as an ArviZ object of whichever major is installed."""
    import arviz

    az: Any = arviz  # the two majors differ in their signatures
    arrays = {
        group: {name: _array(value) for name, value in variables.items()}
        for group, variables in groups.items()
        if variables
    }
    if int(az.__version__.split(".")[0]) >= 1:
        return az.from_dict(arrays, dims=dims, coords=coords, attrs={"/": dict(attributes)})
    return az.from_dict(**arrays, dims=dims, coords=coords, attrs=dict(attributes))


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def _predictive(prediction: Prediction, y: str) -> dict[str, Tensor]:
    """Draws of f and of the observations under the observed site's own name."""
    return {"f": prediction.f, y: prediction.y}


def _inputs(data: "Data", inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return dict(zip(data.names, inputs, strict=False))


def _axes(
    posterior: "Posterior", groups: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Names for every axis: row, the columns of the inputs, and site_dim_0, ... for the rest."""
    data, sites = posterior.data, posterior.sites
    dims: dict[str, list[str]] = {}
    coords: dict[str, Any] = {}
    for name, site in (sites.latent | sites.seams).items():
        axes = [f"{name}_dim_{i}" for i in range(len(site.shape))]
        if site.local and axes:
            axes[0] = "row"
        dims[name] = axes
        coords |= {
            axis: np.arange(size)
            for axis, size in zip(axes, site.shape, strict=True)
            if axis != "row"
        }
    for group in ("posterior_predictive", "prior_predictive", "predictions"):
        for name, value in groups.get(group, {}).items():
            shape = tuple(value.shape[2:])
            axes = ["row", *(f"{name}_dim_{i}" for i in range(1, len(shape)))]
            dims[name] = axes[: len(shape)]
            coords |= {a: np.arange(s) for a, s in zip(axes, shape, strict=False) if a != "row"}
    dims[sites.observed] = [
        "row", *(f"{sites.observed}_dim_{i}" for i in range(1, data.observations.ndim))
    ]  # fmt: skip
    for name, value in zip(data.names[:-1], data.inputs, strict=True):
        if value.ndim:
            columns = [f"{name}_column"] if value.ndim == 2 else []
            rest = [f"{name}_dim_{i}" for i in range(1 + len(columns), value.ndim)]
            dims[name] = ["row", *columns, *rest]
            if columns:
                coords[columns[0]] = data.columns.get(name) or np.arange(value.shape[1])
    return dims, coords


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


def loo(posterior: "Posterior") -> tuple[float, float, np.ndarray]:
    """PSIS-LOO by ArviZ: the expected log density of a new row times rows, its standard error, k.

    Raises:
        ModelError: the rows are one statement.
    """
    import arviz as az

    if posterior.sites.row_axis is None:
        raise ModelError("LOO needs the likelihood of each row. Put the observed site in a plate.")
    y = posterior.sites.observed
    groups = {"posterior": posterior.draws, "log_likelihood": {y: posterior.log_likelihood()}}
    result: Any = az.loo(from_groups(groups, {y: ["row"]}, {}, {}), pointwise=True)
    elpd = getattr(result, "elpd", None)
    value = float(result.elpd_loo if elpd is None else elpd)
    return value, float(result.se), np.asarray(result.pareto_k)
