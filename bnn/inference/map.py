"""Maximum a posteriori: the mode of p(values | data), by gradient ascent.

    values* = argmax log p(data | values) + log p(values)

in the space that the model states its sites in: no Jacobian, so that the mode of a scale is the
mode the user would draw. Every draw is the mode; the observation noise is what its predictions
still spread by.

When not to use it: to know how sure a net is. A point has no epistemic uncertainty, and the mode
of a model with latent scales can sit where hardly any mass is (funnels, horseshoes).
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from bnn.data import Data
from bnn.handlers import branch, constrained_parameters, parameters, seeded
from bnn.inference._energy import Energy
from bnn.inference._members import Members
from bnn.inference._optimise import Optimised, maximise
from bnn.method import Model, check_count, check_parts
from bnn.posterior import Posterior
from bnn.sites import Sites, require_continuous, require_minibatches, require_one_value


@dataclass(frozen=True, kw_only=True)
class MAP(Optimised):
    """The posterior's mode.

    Attributes:
        restarts: starting points, each a chain of its own.
        draws: how often each mode is repeated, so that predictions carry noise (no memory is used).
        parts: fits that the restarts are divided into, for `fit(executor=)`.

    References:
        Murphy (2022), Probabilistic machine learning: an introduction, section 4.5.

    Example:
        >>> MAP(restarts=3) == MAP(restarts=3, draws=1_000)
        True
    """

    distributes = True

    restarts: int = 1
    draws: int = 1_000
    parts: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("MAP", restarts=self.restarts, draws=self.draws)
        check_parts(self)

    @property
    def is_point(self) -> bool:
        """A mode has no variance, and where all restarts find one so much the better."""
        return True

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
        require_continuous(sites, "MAP")
        require_one_value(sites, "MAP", restarts=self.restarts)
        minibatch = data.loader is not None or sites.subsampled or self.batch_size is not None
        if minibatch:
            require_minibatches(sites, "MAP")
        energy = Energy(model, data, sites)
        terms = partial(energy.terms, jacobian=False)
        members = Members(self.restarts, energy, terms, data, self.batch_size)
        starts = energy.initial(self.restarts, branch(seed, 0))
        modes = starts[0] if members.axis is None else starts
        with seeded(branch(seed, 2)), parameters(model, data.tensors) as leftovers:
            histories = maximise(
                members.objective,
                {"mode": modes, **leftovers},
                members.batches(branch(seed, 3)),
                self,
                label="log joint",
                what="MAP",
                progress=progress,
                members=members.axis,
                culprit=members.culprit,
                epoch=None if sites.subsampled else data.epoch(self.batch_size),
                seed=None if leftovers or sites.subsampled else branch(seed, 4),
            )
            params = constrained_parameters()
        values = energy.unflatten(starts.detach())
        best = max(histories, key=lambda h: float(h[-1]))
        return Posterior(
            model=model,
            method=self,
            data=data,
            sites=sites,
            draws={k: _repeated(v, self.draws) for k, v in values.items()},
            params=params,
            history=best,
        )


def _repeated(modes: torch.Tensor, draws: int) -> torch.Tensor:
    """(restart, *site) -> (restart, draw, *site), without copies."""
    return modes[:, None].expand(modes.shape[0], draws, *modes.shape[1:])
