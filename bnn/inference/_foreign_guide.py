"""Guides that Pyro or the user wrote: fitted by Pyro's own ELBO, in a store of their own."""

import copy
import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuide, AutoLaplaceApproximation, AutoNormal
from pyro.poutine.messenger import Messenger
from torch.distributions import constraints

from bnn.data import Data
from bnn.errors import ModelError
from bnn.handlers import (
    branch,
    constrained_parameters,
    generator,
    is_statement,
    parameters,
    seeded,
)
from bnn.inference._energy import Energy
from bnn.inference._optimise import maximise
from bnn.method import Model
from bnn.posterior import Posterior
from bnn.sites import Sites, require_continuous, require_minibatches

if TYPE_CHECKING:
    from bnn.inference.svi import SVI

_EVALUATIONS = 100


class Rescale(Messenger):
    """Scales sites inside the data plate by N/B, and latent sites by the weight of the KL."""

    def __init__(self, plate: str | None, rows: int):
        super().__init__()
        self.plate, self.rows, self.weight = plate, rows, 1.0

    def _pyro_sample(self, message: Any) -> None:
        for frame in message["cond_indep_stack"]:
            if frame.name == self.plate:
                factor = self.rows / (frame.full_size or frame.size)
                message["scale"] = message["scale"] * factor
        if not message["is_observed"] and is_statement(message):
            message["scale"] = message["scale"] * self.weight


def fit_foreign(
    method: "SVI",
    model: Model,
    data: Data,
    sites: Sites,
    *,
    seed: np.random.SeedSequence,
    progress: bool,
) -> Posterior:
    """SVI with an autoguide, class or instance, or a callable of the model's arguments.

    KL terms are closed-form where Pyro's mean-field ELBO applies (`AutoNormal`), sampled elsewhere.

    Raises:
        ModelError: the guide misses a latent site, or cannot be minibatched.
    """
    guide: Any = method.guide
    automatic = isinstance(guide, AutoGuide) or (
        inspect.isclass(guide) and issubclass(guide, AutoGuide)
    )
    minibatch = bool(data.loader is not None or sites.subsampled or method.batch_size)
    if minibatch and (automatic or sites.plate is None):
        require_minibatches(sites, "SVI with this guide")
    if automatic:
        require_continuous(sites, repr(method))
    kind = guide if inspect.isclass(guide) else type(guide)
    if issubclass(kind, AutoLaplaceApproximation):
        raise ModelError(
            "AutoLaplaceApproximation is optimised as a point, and has no spread before Pyro's "
            "laplace_approximation is called. Use AutoMultivariateNormal, or bnn.MAP()."
        )
    rescale = Rescale(sites.plate, data.rows)
    with seeded(branch(seed, 2)), parameters(model, data.tensors):
        if inspect.isclass(guide):
            make: Any = guide
            guide = make(model)
        elif isinstance(guide, torch.nn.Module):
            guide = _copied(guide)  # the caller's guide keeps its state
        first = next(data.batches(method.batch_size, generator(branch(seed, 3))))
        _check_guide(guide, first, sites)
        # Pyro's closed-form KL leaves out the Jacobian of a constrained site.
        real = all(_is_real(site.support) for site in sites.latent.values())
        bound = TraceMeanField_ELBO if real and isinstance(guide, AutoNormal) else Trace_ELBO

        def objective(batch: tuple[Any, ...], weight: float, particles: int) -> torch.Tensor:
            rescale.weight = weight
            loss = bound(num_particles=particles).differentiable_loss
            with rescale:
                return -loss(model, guide, *batch)

        objective(first, 1.0, 1)  # creates what the guide optimises
        leaves = dict(pyro.get_param_store().named_parameters())
        before = {name: leaf.detach().clone() for name, leaf in leaves.items()}
        (history,) = maximise(
            lambda _, batch, weight, __: objective(batch, float(weight), method.particles),
            leaves,
            data.batches(method.batch_size, generator(branch(seed, 3))),
            method,
            what="SVI",
            label="ELBO",
            progress=progress,
            epoch=None if sites.subsampled else data.epoch(method.batch_size),
        )
        with torch.no_grad():
            args = first if data.loader is not None else data.tensors
            runs: list[Any] = [poutine.trace(guide).get_trace(*args) for _ in range(method.draws)]
            tail = float(history[-max(len(history) // 20, 1) :].mean())
            whole = data.loader is None and not sites.subsampled
            elbo = float(objective(args, 1.0, _EVALUATIONS)) if whole else tail
            stats = _densities(runs, model, data, sites, automatic) if whole else {}
            params = constrained_parameters()
            draws = {  # copies: of a point the values are the leaves themselves
                name: torch.stack([run.nodes[name]["value"] for run in runs])[None]
                for name in sites.latent
                if data.loader is None or name in sites.globals
            }
            for name, leaf in leaves.items():  # a net that the guide closes over is the caller's
                leaf.copy_(before[name])
    return Posterior(
        model=model,
        method=method,
        data=data,
        sites=sites,
        draws=draws,
        params=params,
        stats={} if isinstance(guide, AutoDelta) else stats,
        history=history,
        elbo=None if isinstance(guide, AutoDelta) else elbo,
    )


def _densities(
    runs: list[Any], model: Model, data: Data, sites: Sites, automatic: bool
) -> dict[str, torch.Tensor]:
    """Log q of each draw on the real line, as a statistic of one chain, where a run tells it.

    Helpers of an autoguide are the sites themselves on another scale; those of other guides are
    integrated over, which a run does not.
    """
    helped = any(node.get("infer", {}).get("is_auxiliary") for node in runs[0].nodes.values())
    if (helped and not automatic) or any(site.discrete for site in sites.latent.values()):
        return {}
    energy = Energy(model, data, sites)
    each = []
    for run in runs:
        z = energy.flatten({name: run.nodes[name]["value"] for name in sites.latent})
        each.append(run.log_prob_sum() + energy.log_jacobian(z))
    return {"log_q": torch.stack(each)[None].detach().double()}


def _is_real(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real


def _copied(guide: Any) -> Any:
    """A guide with parameters of its own. An autoguide forgets its model when it is copied."""
    models = {name: g._model for name, g in guide.named_modules() if isinstance(g, AutoGuide)}
    copied = copy.deepcopy(guide)
    for name, model in models.items():
        for each in (guide, copied):
            each.get_submodule(name)._model = model
    return copied


def _check_guide(guide: Any, args: tuple[Any, ...], sites: Sites) -> None:
    try:
        trace = poutine.trace(guide).get_trace(*args)
    except Exception as error:
        raise ModelError(
            f"The guide raised {type(error).__name__}: {error} It is called as the model is, with "
            f"({', '.join(sites.names)})."
        ) from error
    missing = [name for name in sites.latent if name not in trace.nodes]
    extra = [
        name
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and is_statement(node) and name not in sites.latent
        and not node["infer"].get("is_auxiliary")
    ]  # fmt: skip
    if missing or extra:
        raise ModelError(
            f"The guide and the model name different sites: the guide misses {missing} and adds "
            f"{extra}. Name every latent site of the model in the guide; mark helpers with "
            'infer={"is_auxiliary": True}.'
        )
    for name in sites.latent:
        shape = tuple(trace.nodes[name]["value"].shape)
        if name in sites.globals and shape != sites.latent[name].shape:
            raise ModelError(
                f'The guide draws "{name}" with shape {shape} and the model states '
                f"{sites.latent[name].shape}. Give both the same plates and event axes."
            )
