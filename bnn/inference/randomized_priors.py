"""Randomized priors: an ensemble whose members each carry a random function that is never trained.

    Q_k(x) = f(x; w_k) + scale p_k(x),    p_k(x) = f(x; w~_k) - f(x; E[w]),    w~_k ~ prior

Only w_k is trained, on log p(data | Q_k) + log p(w_k): f learns what p_k leaves of the data. Away
from the rows members keep differing as the prior does. With `noise`, the sd of the observation
noise, each member's targets are moved by a fixed N(0, noise^2). If f is linear in w, prior and
noise are Gaussian and scale = 1, then w_k + w~_k - E[w] is an exact draw of the posterior. Without
`noise` it is too narrow (sd ratio .29 in the conjugate regression of our tests). A model that
learns its noise would learn that of moved targets, sqrt(2) times as wide, and is refused: there the
bootstrap stands in for `noise`.

`anchored=True` adds no function: w_k is drawn to w~_k where the prior would draw it to E[w]. That
is exact for the same models, the weights are the member's own, and no seam is needed. What enters
neither f nor an anchor, such as the scale of the noise, is trained as the model states it.

In the function form `Posterior.draws` has w_k under the site's own name, w~_k as "prior.<site>".

When not to use it: with a handful of members, whose spread is itself known to 1/sqrt(2(M-1)); with
a `scale` p that the data's f could never have (look at `bnn.prior_predictive`); with training that
ends before f has undone p_k at the rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnn import contract
from bnn.data import Data
from bnn.handlers import At, Rewrite, branch
from bnn.inference._energy import Energy
from bnn.inference._ensemble import Ensemble, bootstrap, require_rows, train
from bnn.inference._moved_targets import moved_targets
from bnn.inference._prior_function import (
    PREFIX,
    SEAM,
    about_anchor,
    like_f,
    prior_function,
    require_f,
    require_function,
)
from bnn.method import Model, Tensors, check_positive
from bnn.posterior import Posterior
from bnn.sites import Sites, require_continuous


@dataclass(frozen=True, kw_only=True)
class RandomizedPriors(Ensemble):
    """An ensemble with randomized prior functions.

    Attributes:
        members: how many; each is a draw.
        scale: what the prior function is multiplied by; with `anchored`, the way to the anchor.
        prior: None, or a function of the inputs that gives f's shape, the same for all members,
            in place of p_k: `lambda x: torch.sin(3 * x)`. It is code, so files do not hold it:
            `bnn.load(path, model, prior=...)`.
        noise: sd by which each member's targets are moved, in units of y: the one that the model
            states. None leaves them.
        anchored: draw the weights to a draw of the prior, in place of adding a function.
        bootstrap: None, "bernoulli", "exponential" or "resample"; see `Ensemble`.
        snapshots: copies of all members on their way, for `Posterior.frames`.

    References:
        Osband, Aslanides, Cassirer (2018), Randomized prior functions for deep reinforcement
        learning. Pearce, Leibfried, Brintrup (2020), Uncertainty in neural networks: approximately
        Bayesian ensembling.

    Example:
        >>> RandomizedPriors(members=10, bootstrap="resample").scale
        1.0
    """

    members: int = 40
    scale: float = 1.0
    prior: Callable[..., Any] | None = field(default=None, metadata={"predicts": True})
    noise: float | None = None
    anchored: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("RandomizedPriors", scale=self.scale)
        if self.noise is not None:
            check_positive("RandomizedPriors", noise=self.noise)
        if self.prior is not None and not callable(self.prior):
            raise TypeError(
                f"RandomizedPriors(prior={self.prior!r}): pass a function of the inputs, or None "
                "for the model's own f at draws of its prior."
            )
        if self.prior is not None and self.anchored:
            raise ValueError(
                "RandomizedPriors(anchored=True) adds no function. Leave `prior` out, or anchored."
            )

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
        require_continuous(sites, "RandomizedPriors")
        energy = Energy(model, data, sites)
        if not self.anchored:
            require_f(energy, branch(seed, 6), "RandomizedPriors")
        if self.prior is not None:
            require_function(self.prior, data.inputs, branch(seed, 9))
        rows: Tensors = {}
        if self.bootstrap is not None:
            require_rows(energy, f"A weight of bootstrap={self.bootstrap!r}")
            rows |= bootstrap(self.bootstrap, self.members, data.rows, branch(seed, 5))
        if self.noise is not None:
            require_rows(energy, f"The noise={self.noise!r} of a target")
            rows |= moved_targets(energy, self.noise, self.members, branch(seed, 7))
        drawn = energy.prior_draws(self.members, branch(seed, 8))  # (member, size)
        whole = {} if callable(self.prior) and not self.anchored else {"drawn": drawn}

        def p_at(z: Tensor, args: Sequence[Any]) -> Tensor:
            with At({PREFIX + k: v for k, v in energy.values(z).items()}):
                return self._p(model, tuple(args))

        if not self.anchored and data.loader is None:  # p never changes: once for all steps
            with torch.no_grad():
                rows |= {"p": energy.batched(lambda z: p_at(z, data.tensors), drawn)}
            whole = {}

        def one(z: Tensor, args: Sequence[Any], **own: Tensor) -> tuple[Tensor, Tensor]:
            if "targets" in own:
                args = (*args[:-1], own["targets"])
            terms = partial(energy.terms, z, args, jacobian=False, weights=own.get("weights"))
            if self.anchored:
                anchor = energy.values(own["drawn"])
                anchor = {s.name: anchor[s.name] for s in energy.slots if s.real}
                moved = about_anchor(energy.values(z), anchor, self.scale)
                return terms(elsewhere=moved)
            with self._added(own["p"] if "p" in own else p_at(own.get("drawn", z), args)):
                return terms()

        posterior = train(self, energy, one, seed=seed, progress=progress, rows=rows, whole=whole)
        if self.anchored or self.prior is not None:
            return posterior
        stated = contract.latent_sites(self.program(model, {}), data, sites)
        added = {PREFIX + k: v[None] for k, v in energy.unflatten(drawn).items()}
        added = {k: v for k, v in added.items() if k in stated}
        return replace(posterior, draws=posterior.draws | added)

    def program(self, model: Model, params: Tensors) -> Model:
        """Q: the model, its f with the prior function added."""
        if self.anchored:
            return model

        def randomized(*args: Any) -> Any:
            with self._added(self._p(model, args)):
                return model(*args)

        return randomized

    def _p(self, model: Model, args: tuple[Any, ...]) -> Tensor:
        if self.prior is None:
            return prior_function(model, args)
        return torch.as_tensor(self.prior(*args[:-1]))

    def _added(self, p: Tensor) -> Rewrite:
        return Rewrite({SEAM: lambda f: f + self.scale * like_f(p, f)})
