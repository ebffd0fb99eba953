"""Stochastic weight averaging, Gaussian: the cloud that SGD at a constant rate leaves at a mode.

    q(z) = N(m, (diag(v) + D D' / (K - 1)) / 2),   D = (z_1 - m, ..., z_K - m)

z on the real line, log-Jacobian included; m, v the mean and variance of SGD's iterates, z_k some of
them: q has their variances and half their covariances. Each restart is a cloud (MultiSWAG).

What its width depends on: SGD, not the posterior. Near a mode with Hessian H iterates move by

    u <- momentum u - a (H z + n),   z <- z + u,   Var n = C

and their covariance S solves a discrete Lyapunov equation; for small a it is H S + S H = a C / (1 -
momentum): proportional to the rate, inverse to the batch size. Where the likelihood is right, C is
about H rows / batch_size, and S is the same in all directions, however sure the data are of each.
The default rate makes the KL divergence of N(m, S) to a Gaussian posterior least, a = 2 (1 -
momentum) size / trace C: variances are right on average over directions, each weighed by its H.
Where SGD would not be stable with it, it is lower and the cloud too narrow; so are directions that
need more steps than the collection has. A warning says how far the average is off. Measured, on a
regression whose two weights are correlated by -.78: sd .63 of the posterior's, correlation -.07.

When not to use it: where widths matter and another method can be had; on few rows; hierarchies.
"""

import warnings
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from bnn.contract import check_batch
from bnn.data import Data
from bnn.errors import ApproximationWarning, DataError, ModelError, outside
from bnn.handlers import branch, constrained_parameters, parameters, seeded
from bnn.inference._energy import Energy
from bnn.inference._members import Members
from bnn.inference._optimise import Optimised, maximise
from bnn.inference._sgd import collect, drawn
from bnn.method import Model, check_count, check_parts, check_positive
from bnn.posterior import Posterior
from bnn.sites import Sites, require_continuous, require_minibatches, require_one_value

_SETTLING = 0.2  # of the collection: steps before the first iterate
_LARGEST = 128  # rows in a minibatch that is chosen here
_LIMIT = 2.0  # of the temperature, or its inverse


@dataclass(frozen=True, kw_only=True)
class SWAG(Optimised):
    """A Gaussian around each of several modes, as wide as SGD wanders.

    steps, learning_rate, schedule: of the ascent to the mode. The posterior's `params` hold
    swag.mean, swag.scale (m, sqrt v; restart, size) and swag.deviations (restart, rank, size).

    Attributes:
        restarts: clouds, each with starting point, minibatches (a loader's are those of all) and
            rate of its own; chains.
        draws: draws from each.
        rank: iterates K kept for their covariances, evenly spread over the collection.
        collection: steps of SGD from the mode; the first fifth is not collected.
        every: steps between iterates collected.
        collection_rate: SGD's learning rate on the mean log joint of a row, held; None chooses the
            one above, for each restart.
        momentum: SGD's, in [0, 1).
        parts: fits that the restarts are divided into, for `fit(executor=)`.
        batch_size: rows in a minibatch. None: all in the ascent, then a tenth, at most 128.

    References:
        Maddox, Garipov, Izmailov, Vetrov, Wilson (2019), A simple baseline for Bayesian uncertainty
        in deep learning. Wilson, Izmailov (2020), Bayesian deep learning and a probabilistic
        perspective of generalization (MultiSWAG). Mandt, Hoffman, Blei (2017), Stochastic gradient
        descent as approximate Bayesian inference (the rate). Ours differs: deviations are from the
        final mean and spread over the collection, theirs from the running mean, of the last K.

    Example:
        >>> SWAG(restarts=5, batch_size=32).rank
        20
    """

    restarts: int = 1
    draws: int = 1_000
    rank: int = 20
    collection: int = 5_000
    every: int = 10
    collection_rate: float | None = None
    momentum: float = 0.9
    parts: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("SWAG", restarts=self.restarts, draws=self.draws, rank=self.rank)
        check_parts(self)
        check_count("SWAG", collection=self.collection, every=self.every)
        if self.collection_rate is not None:
            check_positive("SWAG", collection_rate=self.collection_rate)
        if isinstance(self.momentum, bool) or not 0 <= self.momentum < 1:
            raise ValueError(f"SWAG(momentum={self.momentum!r}): a number in [0, 1).")
        if not 2 <= self.rank <= len(self._moments):
            raise ValueError(
                f"SWAG(rank={self.rank}, collection={self.collection}, every={self.every}): the "
                f"rank is at least 2, and at most the iterates collected, {len(self._moments)}."
            )

    @property
    def abreast(self) -> int:
        """Restarts: every call of the gradient is for all of them."""
        return self.restarts

    @property
    def _moments(self) -> range:
        """Steps of the collection after which an iterate is taken."""
        return range(round(_SETTLING * self.collection), self.collection, self.every)

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
        require_continuous(sites, "SWAG")
        require_minibatches(sites, "SWAG")
        require_one_value(sites, "SWAG", restarts=self.restarts)
        size = self.batch_size or min(-(-data.rows // 10), _LARGEST)
        if data.loader is not None and not data.afresh:
            raise DataError(
                "SWAG's width is the noise of minibatches, and that of a loader that passes over "
                "the rows cancels. Pass tensors, or a loader that draws each batch afresh: "
                "sampler=RandomSampler(dataset, replacement=True)."
            )
        if data.rows == 1:
            raise ModelError("SWAG's width is the noise of minibatches, and one row has none.")
        if data.loader is None and not sites.subsampled and size >= data.rows:
            raise ModelError(
                f"SWAG's width is the noise of minibatches, and one of {size} rows of {data.rows} "
                f"has none. Pass batch_size below {data.rows}."
            )
        check_batch(model, data, sites, self, None if sites.subsampled else size)
        energy = Energy(model, data, sites)
        members = Members(self.restarts, energy, energy.terms, data, self.batch_size)
        starts = energy.initial(self.restarts, branch(seed, 0))
        z = starts[0] if members.axis is None else starts  # (restart, size), or (size,) of one
        with parameters(model, data.tensors) as leftovers:
            plain = not leftovers and not sites.subsampled
            with seeded(branch(seed, 1)):
                histories = maximise(
                    members.objective,
                    {"mode": z, **leftovers},
                    members.batches(branch(seed, 2)),
                    self,
                    label="log joint",
                    what="SWAG",
                    progress=progress,
                    members=members.axis,
                    culprit=members.culprit,
                    epoch=None if sites.subsampled else data.epoch(self.batch_size),
                    seed=branch(seed, 3) if plain else None,
                )
            if not sites.subsampled:
                members = Members(self.restarts, energy, energy.terms, data, size)
            with seeded(branch(seed, 4)):
                cloud, temperature = collect(
                    members,
                    z,
                    rate=self.collection_rate and self.collection_rate / data.rows,
                    momentum=self.momentum,
                    moments=self._moments,
                    rank=self.rank,
                    what="SWAG",
                    seed=branch(seed, 5),
                    compiled=plain,
                    progress=progress,
                )
            params = constrained_parameters()
        _warn_of_width(temperature)
        with seeded(branch(seed, 6)):
            draws = energy.unflatten(drawn(cloud, self.draws))
        return Posterior(
            model=model,
            method=self,
            data=data,
            sites=sites,
            draws=draws,
            params=params | {f"swag.{k}": v for k, v in cloud.items()},
            history=max(histories, key=lambda h: float(h[-1])),
        )


def _warn_of_width(temperature: Tensor) -> None:
    mean = float(temperature.mean())
    if not 1 / _LIMIT <= mean <= _LIMIT:
        warnings.warn(
            f"SWAG's cloud has {mean:.2g} times the posterior's variance, on average over "
            "directions: its width is that of SGD's noise. It is proportional to collection_rate, "
            "and inverse to batch_size; or use another method.",
            ApproximationWarning,
            stacklevel=outside(),
        )
