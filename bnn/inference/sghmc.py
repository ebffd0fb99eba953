"""Stochastic-gradient Hamiltonian Monte Carlo: Langevin dynamics with momentum, on minibatches.

    dz = s v dt,   dv = s g(z) dt - friction v dt + sqrt(2 friction) dW,   E g = grad log p(z, data)

(z on the real line, s a scale for each coordinate.) With exact gradients and short steps the
posterior is its stationary law. Nothing is accepted or refused, so two errors stay. That of the
step is of order h^2, and none on a Gaussian (see `_stochastic_gradient`). The noise of minibatches,
with variance c in a scaled direction, adds about c h / (2 friction) to the variance there; less,
because minibatches are passes over the rows and their noise cancels for all that moves slower than
a pass. Both are measured. `stats["noise"]` is what fresh minibatches would add in the noisiest
direction: at most .3 by default, warned of above .5. `stats["temperature"]` is 1 where the spread
is right on average over directions, and warned of beyond .1 and four of its standard errors; it
counts noise that cancels over a pass too, so that above 1 it is an upper bound there. `stats["lp"]`
is the mean log joint of the minibatches since the last draw.

Measured on a tanh net of 8-50-1 (502 weights, 442 rows, diabetes), f at 40 rows against NUTS. On
all rows, defaults: sd 1.00-1.02 times (.96-1.09 by row), 1,100-1,800 effective draws of 2,000 in 12
s of one core; NUTS took 24 s for its 1,200. On minibatches of 32 rows the safe step is ten times
shorter: sd 1.01 (.93-1.08), 70-150 effective draws and a warning of it in 12 s; with 40,000 steps
1.03 (.96-1.14), 220-790 in 16 s, sigma .2 posterior sd too large. With longer steps, .05, .1, .2:
sd 1.14, 1.32, 1.51, sigma .7, 1.3, 2 too large.

When not to use it: where all rows fit and gradients are cheap (`NUTS` and `MCLMC` have no such
error); centred hierarchies (the ascent at the start falls into their funnels).
"""

from dataclasses import dataclass

import numpy as np

from bnn.data import Data
from bnn.inference._stochastic_gradient import Diffusion, draw
from bnn.method import Model, check_positive
from bnn.posterior import Posterior
from bnn.sites import Sites


@dataclass(frozen=True, kw_only=True)
class SGHMC(Diffusion):
    """Hamiltonian Monte Carlo with friction, on minibatches, many chains in one call.

    Attributes:
        friction: rate at which momentum is forgotten, a unit of time (a step is step_size long):
            more lets less of the minibatches' noise through, and moves more slowly.
        chains: independent: start, scales, minibatches and noise are each its own (a loader's
            minibatches are the same for all).
        draws: draws kept from each, evenly spread over the steps.
        warmup: gradient steps before; not kept. The first half ascends to a mode (Adam).
        steps: gradient steps after warmup.
        batch_size: rows in a minibatch; None takes all rows at every step.
        step_size: h, in units of the scales. None: for each chain the longest, to .6, that is
            stable in its stiffest direction and keeps the noise above at .3; a chain that still
            runs away goes back to its last draw with half of it, six times at most.
        cycles: None holds the step size. A number: it falls so many times along a cosine to 0, and
            draws come from the second half of each fall; long steps move between modes.
        preconditioned: scales are measured in warmup, from the curvature and the noise of the
            gradient; False leaves them at 1, and step_size must be given.
        parts: fits that the chains are divided into, for `fit(executor=)`.

    References:
        Chen, Fox, Guestrin (2014), Stochastic gradient Hamiltonian Monte Carlo. Springenberg,
        Klein, Falkner, Hutter (2016), Bayesian optimization with robust Bayesian neural networks
        (scales). Zhang, Li, Zhang, Chen, Wilson (2020), Cyclical stochastic gradient MCMC. Ours
        differs: the splitting BAOAB (Leimkuhler, Matthews 2013) in place of Euler's; scales from
        differences of gradients, then held; noise is kept while a cycle explores. The temperature:
        Wenzel et al. (2020), How good is the Bayes posterior in deep neural networks really?

    Example:
        >>> SGHMC(batch_size=32, cycles=4).chains
        8
    """

    friction: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("SGHMC", friction=self.friction)

    @property
    def damping(self) -> float:
        """See `Diffusion`."""
        return self.friction

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
