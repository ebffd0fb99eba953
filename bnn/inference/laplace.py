"""Laplace: a Gaussian at the mode, as wide as the curvature there says.

    p(z | data) ~ N(z*, H^-1),   z* = argmax log p(data, z),   H = -d2 log p(data, z*) / dz2
    log p(data) ~ log p(data, z*) + size/2 log 2 pi - 1/2 log det H

z is the sites on the real line, the Jacobian of that map included (MAP's mode leaves it out). Adam
climbs, L-BFGS in units of the posterior ends at a mode, and a fit that is not at one is refused; so
are held sites, where a step along their gradient gains a nat. The curvature takes one pass of rows.

When not to use it: several modes, or a mode far from the mass (funnels, latent scales of many
weights); ReLU kinks, where no gradient vanishes. Draws of a net leave the region in which it is
linear, and sampled predictions can be far worse than linearised ones, which Gauss-Newton is for.
"""

import warnings
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from bnn.data import Data
from bnn.errors import ConvergenceWarning, ModelError
from bnn.handlers import branch, constrained_parameters, parameters, seeded
from bnn.inference._choice import check_memory, chosen
from bnn.inference._curvature import curvature
from bnn.inference._energy import Energy
from bnn.inference._evidence import scaled, tuned
from bnn.inference._joint import Joint
from bnn.inference._linearize import PREFIX, linearized, require_f
from bnn.inference._members import Members
from bnn.inference._mode import drawn, polish
from bnn.inference._optimise import Optimised, maximise
from bnn.inference._precision import Precision
from bnn.inference._whitened import check_held
from bnn.method import Model, Tensors, check_count, check_parts, check_positive
from bnn.posterior import Posterior
from bnn.sites import Sites, require_continuous, require_minibatches, require_one_value

TUNED = "tuned."  # of tuned values among a posterior's parameters
_WORDS = {
    "structure": ("full", "kron", "diag", "last_layer"),
    "hessian": ("ggn", "exact"),
    "sites": (None,),
    "predictive": ("sampled", "linearized"),
    "tune": (None, "global", "site"),
}


@dataclass(frozen=True, kw_only=True)
class Laplace(Optimised):
    """A Gaussian at the posterior's mode.

    Attributes:
        structure: "full"; "kron" (a Kronecker product for each linear map, bias included, one
            dense or diagonal block for the rest); "diag"; "last_layer" (full, of the last linear
            map whose weight is a site, and its bias; noise and what else is not in it are held).
        hessian: "ggn", the generalised Gauss-Newton matrix: never indefinite through the
            likelihood, and the Hessian where the model is linear; or "exact".
        sites: names of the sites that the Gaussian is of, None for all; others stay at the mode.
        predictive: "sampled" runs the model at each draw, "linearized" with f linear in z.
        tune: sets by maximum evidence (of nets nearly, and the nearest of several) a factor of the
            scale of Normal priors, one for all ("global") or each site ("site"), and noise that is
            not held; or for named sites alone. The values are in `params`, as "tuned.<site>".
        restarts: starting points, each a chain of its own.
        draws: draws of each Gaussian.
        memory: gigabytes that the curvature of all restarts of a part may take.
        parts: fits that the restarts are divided into, for `fit(executor=)`.

    `Posterior.log_evidence` is the largest of the restarts, given tuned values; None where sites
    are held at the mode: of the others alone it is no evidence.

    References:
        MacKay (1992), A practical Bayesian framework for backpropagation networks. Ritter, Botev,
        Barber (2018), A scalable Laplace approximation for neural networks. Immer, Korzepa, Bauer
        (2021), Improving predictions of Bayesian neural nets via local linearization. Daxberger et
        al. (2021), Laplace redux.

    Example:
        >>> Laplace(structure="kron", predictive="linearized").hessian
        'ggn'
    """

    structure: Literal["full", "kron", "diag", "last_layer"] = "full"
    hessian: Literal["ggn", "exact"] = "ggn"
    sites: tuple[str, ...] | None = None
    predictive: Literal["sampled", "linearized"] = "sampled"
    tune: str | tuple[str, ...] | None = None
    restarts: int = 1
    draws: int = 1_000
    memory: float = 4.0
    parts: int = 1
    goes_on: ClassVar[bool] = True
    all_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("Laplace", restarts=self.restarts, draws=self.draws)
        check_parts(self)
        check_positive("Laplace", memory=self.memory)
        for name, known in _WORDS.items():
            value, named = getattr(self, name), name in ("sites", "tune")
            names = isinstance(value, tuple) and value and all(isinstance(v, str) for v in value)
            if value not in known and not (named and names):
                told = ", ".join(map(repr, known)) + ", a tuple of names of sites" * named
                raise ValueError(f"Laplace({name}={value!r}): known are {told}.")
        for refused, why in (
            (self.structure == "kron" and self.hessian == "exact", 'kron needs hessian="ggn"'),
            (self.structure == "last_layer" and self.sites is not None, "both choose the sites"),
            (self.restarts > 1 and self.tune is not None, "each mode would have its own values"),
            (self.restarts > 1 and self.predictive == "linearized", "f is linear around one mode"),
        ):
            if refused:
                raise ValueError(f"{self!r}: these settings exclude each other: {why}.")

    def fit(
        self,
        model: Model,
        data: Data,
        sites: Sites,
        *,
        seed: np.random.SeedSequence,
        progress: bool,
    ) -> Posterior:
        """See `Method.fit`."""
        self._check(model, data, sites)
        factors: dict[str, float] = {}
        energy = Energy(scaled(model, factors) if self.tune else model, data, sites)
        starts = energy.initial(self.restarts, branch(seed, 0))
        free = chosen(energy, starts[0], self.structure, self.sites)
        whole = len(free) == len(energy.slots)
        joint = Joint(energy, data, self.batch_size, starts[0], free)
        check_memory(joint, self.structure, self.memory, self.restarts)
        members = Members(self.restarts, energy, energy.terms, data, self.batch_size)
        with seeded(branch(seed, 2)), parameters(model, data.tensors) as leftovers:
            if self.hessian == "ggn":
                check_held(joint, joint.start)
            with warnings.catch_warnings():
                if whole and not leftovers:  # then the climb goes on below, and is proved to end
                    warnings.simplefilter("ignore", ConvergenceWarning)
                histories = maximise(
                    members.objective,
                    {"mode": starts[0] if members.axis is None else starts, **leftovers},
                    members.batches(branch(seed, 3)),
                    self,
                    label="log joint",
                    what="Laplace",
                    progress=progress,
                    members=members.axis,
                    culprit=members.culprit,
                    epoch=data.epoch(self.batch_size),
                    seed=None if leftovers else branch(seed, 4),
                )
            modes, values = [], {}
            for start in starts:  # which Adam has moved
                joint = Joint(energy, data, self.batch_size, start, free)
                if self.tune is not None:
                    joint, values = tuned(joint, sites, self._precision, self.tune, factors)
                modes.append(polish(joint, self._precision, tuned=self.tune is not None))
            evidence = max(mode.log_evidence(values.keys() - factors.keys()) for mode in modes)
            params = constrained_parameters() | {TUNED + k: v for k, v in values.items()}
        if self.predictive == "linearized":
            params |= {PREFIX + k.name: modes[0].z[k.span].reshape(k.free) for k in energy.slots}
        draws, log_q = drawn(modes, self.draws, branch(seed, 5))
        return Posterior(
            model=model,
            method=self,
            data=data,
            sites=sites,
            draws=energy.unflatten(draws),  # (restart, draw, size)
            params=params,
            stats={"log_q": log_q},
            history=max(histories, key=lambda h: float(h[-1])),
            log_evidence=evidence if whole else None,
        )

    def program(self, model: Model, params: Tensors) -> Model:
        """The model under its tuned priors, which sites of new rows have; f linear in z or not."""
        head, run = (PREFIX, linearized) if self.predictive == "linearized" else (TUNED, scaled)
        given = {k.removeprefix(head): v for k, v in params.items() if k.startswith(head)}
        return run(model, given) if given else model

    def _precision(self, joint: Joint, s: Tensor) -> Precision:
        structure = "full" if self.structure == "last_layer" else self.structure
        return curvature(joint, s.to(joint.base.dtype), structure, self.hessian)

    def _check(self, model: Model, data: Data, sites: Sites) -> None:
        """Refuses what no Gaussian can be fitted to, or not by these settings."""
        require_continuous(sites, "Laplace")
        if sites.subsampled:
            raise ModelError(
                f'Laplace adds the curvature up over all rows, and the plate "{sites.plate}" draws '
                "a minibatch of its own. Leave subsample_size out and fit with batch_size."
            )
        if data.loader is not None or self.batch_size is not None:
            require_minibatches(sites, "Laplace")
        require_one_value(sites, "Laplace", restarts=self.restarts)
        if self.predictive == "linearized":
            require_f(model, data, sites)
