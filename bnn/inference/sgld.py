"""Stochastic-gradient Langevin dynamics: a random walk up the gradient, on minibatches.

    z <- z + h^2 s^2 g(z) / 2 + h s (xi + xi') / 2,    E g = grad log p(z, data)

z on the real line, s a scale for each coordinate, xi' the next step's xi. (Welling and Teh: h s xi,
which widens a Gaussian's variance by 1 / (1 - h^2 s^2 / 4 var). With the mean of two it is right
at every stable h.) It is `SGHMC` at infinite friction, with the same measures of its errors; noise
of minibatches adds up to c h^2 / 4. On the net of 502 weights that `SGHMC` tells of: on all rows sd
.99 (.94-1.06) and 190-460 effective draws, a quarter of SGHMC's; on minibatches of 32, whose noise
sets the step of either, as many as SGHMC.

When not to use it: on all rows, where momentum helps (`SGHMC`); and where that should not be used.
"""

from dataclasses import dataclass

import numpy as np

from bnn.data import Data
from bnn.inference._stochastic_gradient import Diffusion, draw
from bnn.method import Model
from bnn.posterior import Posterior
from bnn.sites import Sites


@dataclass(frozen=True, kw_only=True)
class SGLD(Diffusion):
    """Langevin dynamics on minibatches, many chains in one call.

    Attributes:
        step_size: h, in units of the scales. Welling and Teh's step is its square. This and all
            other settings are those of `SGHMC`.

    References:
        Welling, Teh (2011), Bayesian learning via stochastic gradient Langevin dynamics. Li, Chen,
        Carlson, Carin (2016), Preconditioned stochastic gradient Langevin dynamics. Leimkuhler,
        Matthews (2013), Rational construction of stochastic numerical methods (the noise). Ours
        differs: h does not fall to 0 but with `cycles`; scales are measured in warmup and held, so
        that no correction for their change is left out.

    Example:
        >>> SGLD(batch_size=32) == SGLD(batch_size=32, steps=10_000)
        True
    """

    @property
    def damping(self) -> float:
        """See `Diffusion`."""
        return float("inf")

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
        return draw(self, model, data, sites, seed=seed, progress=progress)
