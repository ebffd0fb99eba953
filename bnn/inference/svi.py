"""Stochastic variational inference: q(z) closest to p(z | data) in KL(q || p), by its gradient.

    ELBO = E_q[log p(data | z)] - KL(q(z) || p(z)) <= log p(data),    z = g(noise, parameters)

The gradient passes through the draw z (the reparameterization trick; Kingma and Welling 2014,
section 2.3; Blundell et al. 2015, section 3.2, call it Bayes by backprop). z is the model's latent
sites on the real line, the Jacobian of that map included. On a minibatch of B of N rows everything
inside the data plate counts N/B times, the rest once. The entropy of a Gaussian q is exact, and so
is E_q[log p(z)] where the prior of z is Laplace or Normal (that of a site then is Normal, LogNormal
or logit-normal): only what has no closed form is sampled. A prior whose parameters are themselves
latent counts as such under `guide="normal"` alone, where q makes them independent of the site.

On average every estimator has the same gradient; they differ in its noise. "local" and "flipout"
draw the weights of a linear map for each row, see `bnn.inference._rowwise`; "path" leaves out of
d/dparameters of log q(z; parameters) the part that z does not carry, whose mean is 0, and so has no
noise where q is the posterior. Predictions are by draws of the weights in any case.

At a temperature T other than 1 the objective is E_q[log p(data, z)] - T E_q[log q(z)], largest over
all q at p(z | data)^(1/T) up to a factor: variances are T times the posterior's, exactly where that
is Gaussian. T < 1 is a "cold posterior" (Wenzel et al. 2020), which is not the posterior.

When not to use it: where widths matter and sites are correlated. "normal" finds the mean and sd_i =
1 / sqrt(precision_ii) of a Gaussian, too narrow by sqrt(1 - R^2); "full_rank" costs size^2 numbers.
Every guide fits one mode; of a net of few rows and many like units the prior can be a better bound.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pyro.infer.autoguide import AutoDelta

from bnn.data import Data
from bnn.errors import ApproximationWarning, outside
from bnn.handlers import branch, constrained_parameters, generator, parameters, seeded
from bnn.inference._elbo import Bound
from bnn.inference._energy import Energy
from bnn.inference._foreign_guide import fit_foreign
from bnn.inference._guide import FAMILIES, drawn
from bnn.inference._optimise import Optimised, maximise
from bnn.inference._rowwise import Rowwise, flipout, local
from bnn.method import Model, check_count, check_positive
from bnn.posterior import Posterior
from bnn.sites import Sites, require_continuous, require_minibatches

_ANY = (*FAMILIES, "a guide of your own")
_ESTIMATORS = {
    "reparameterization": _ANY,
    "local": ("normal",),
    "flipout": ("normal",),
    "path": ("normal", "low_rank", "full_rank"),
}


@dataclass(frozen=True, kw_only=True)
class SVI(Optimised):
    """Variational inference with pathwise gradients.

    Attributes:
        guide: "normal" (mean field), "low_rank", "full_rank", "flow" (inverse autoregressive),
            "point" (the mode); or a Pyro guide: an autoguide class, an instance, or any callable
            of the model's arguments.
        particles: draws of z for each estimate of the ELBO.
        estimator: of the ELBO's gradient. "reparameterization": one draw of the weights a particle.
            "local" (local reparameterization): rows draw their own pre-activations, in every linear
            map and convolution whose weight is a real-valued site met there alone; "flipout": rows
            share a draw under random signs of their own. Both take guide="normal", and leave other
            sites as they are. "path" (sticking the landing), for "normal", "low_rank", "full_rank":
            for guides that come close to the posterior; all of the KL is sampled then.
        temperature: T, see above; warned of. `Posterior.elbo` is that of q at T = 1 (None where
            rows come in minibatches that the data or the model draw), `history` at T.
        draws: draws of q that the posterior keeps.

    References:
        Kingma, Welling (2014), Auto-encoding variational Bayes. Blundell et al. (2015), Weight
        uncertainty in neural networks. Kucukelbir et al. (2017), Automatic differentiation
        variational inference, whose map to the real line this is. Kingma, Salimans, Welling
        (2015), Variational dropout and the local reparameterization trick. Wen et al. (2018),
        Flipout. Roeder, Wu, Duvenaud (2017), Sticking the landing. Wenzel et al. (2020), How good
        is the Bayes posterior in deep neural networks really?

    Example:
        >>> SVI(guide="full_rank", particles=8) == SVI(particles=8, guide="full_rank")
        True
    """

    distributes = True
    guide: Any = "normal"
    estimator: str = "reparameterization"
    particles: int = 1
    temperature: float = 1.0
    draws: int = 1_000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("SVI", particles=self.particles, draws=self.draws)
        if not callable(self.guide) and self.guide not in FAMILIES:
            raise ValueError(
                f"SVI(guide={self.guide!r}): known are {', '.join(map(repr, FAMILIES))}, an "
                "autoguide class such as pyro.infer.autoguide.AutoNormal, or a guide of your own."
            )
        guides = _ESTIMATORS.get(self.estimator, ())
        if not guides:
            raise ValueError(
                f"SVI(estimator={self.estimator!r}): known are {', '.join(map(repr, _ESTIMATORS))}."
            )
        if guides is not _ANY and (callable(self.guide) or self.guide not in guides):
            raise ValueError(
                f'SVI(estimator="{self.estimator}", guide={self.guide!r}): this estimator takes '
                f"guide={' or '.join(map(repr, guides))}."
            )
        check_positive("SVI", temperature=self.temperature)
        if self.temperature != 1 and (callable(self.guide) or self.guide == "point"):
            raise ValueError(
                f"SVI(temperature={self.temperature}, guide={self.guide!r}): a temperature weighs "
                'the entropy of a guide of ours that has one, such as guide="normal".'
            )

    @property
    def is_point(self) -> bool:
        """True of a point, ours or Pyro's."""
        kind = self.guide if isinstance(self.guide, type) else type(self.guide)
        return self.guide == "point" or issubclass(kind, AutoDelta)

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
        if callable(self.guide):
            return fit_foreign(self, model, data, sites, seed=seed, progress=progress)
        require_continuous(sites, repr(self))
        if self.temperature != 1:
            warnings.warn(
                f"SVI(temperature={self.temperature:g}) approximates p(w | data)^(1/T), whose "
                f"variances are about {self.temperature:g} times the posterior's. It is not the "
                "posterior, and its intervals are not credible intervals. Leave temperature=1.",
                ApproximationWarning,
                stacklevel=outside(),
            )
        if data.loader is not None or sites.subsampled or self.batch_size is not None:
            require_minibatches(sites, f'SVI(guide="{self.guide}")')
        energy = Energy(model, data, sites)
        loc = energy.initial(1, branch(seed, 0))[0]
        scale = 0.1 * energy.prior_scale(branch(seed, 1))
        with seeded(branch(seed, 2)):
            family = FAMILIES[self.guide](loc, scale)
            with parameters(model, data.tensors) as leftovers:
                rows = {"local": local, "flipout": flipout}.get(self.estimator)
                bound = Bound(
                    energy,
                    family,
                    sites,
                    self.particles,
                    rowwise=rows and Rowwise(energy, rows, branch(seed, 5)),
                    path=self.estimator == "path",
                    temperature=self.temperature,
                )
                tensors = {f"guide.{k}": v for k, v in family.tensors.items()} | leftovers
                (history,) = maximise(
                    bound.at,
                    tensors,
                    data.batches(self.batch_size, generator(branch(seed, 3))),
                    self,
                    what="SVI",
                    label="ELBO",
                    progress=progress,
                    noise=bound.noise,
                    culprit=bound.culprit,
                    epoch=None if sites.subsampled else data.epoch(self.batch_size),
                    seed=None if leftovers or sites.subsampled else branch(seed, 4),
                )
                with torch.no_grad():
                    z, stats = drawn(family, self.draws)
                    elbo = bound.value(data, sites)
                params = constrained_parameters()
        params |= {f"guide.{k}": v.detach().clone() for k, v in family.tensors.items()}
        if elbo is None and self.temperature == 1:
            elbo = float(history[-max(len(history) // 20, 1) :].mean())
        return Posterior(
            model=model,
            method=self,
            data=data,
            sites=sites,
            draws={k: v[None] for k, v in energy.unflatten(z).items()},
            params=params,
            stats=stats,
            history=history,
            elbo=None if self.guide == "point" else elbo,
        )
