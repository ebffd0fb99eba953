"""Monte Carlo dropout: the weights that dropout leaves, at a fixed rate.

    q(W) = law of M diag(z) / (1 - rate),   z_j ~ Bernoulli(1 - rate) for each input of a linear map
    maximise over M:   E_z[log p(data | W)] + E_z[log p(W)]

A convolution drops channels. Every other site is a point, as under `bnn.MAP`. Under a Normal prior
N(0, 1 / l^2) the second term is exact, -l^2 |M|^2 / (2 (1 - rate)): with the paper's matrices,
M / (1 - rate), it is the weight decay (1 - rate) l^2 / 2 of the sum over rows. For a fixed noise
of precision tau and the loss |y - f|^2 / 2 per row that is lambda = (1 - rate) l^2 / (2 N tau).
Under other priors it is sampled.

A draw is one mask for every row: draws are weights, to be compared with those of other methods, and
functions. Torch's own dropout draws a mask for each row. Of a net's own dropout whose output does
not go straight into one linear map, the mask is a site of its own, and weights are those without.

When not to use it: where doubt should fall with the number of rows. The variance of the masks,
rate / (1 - rate) times the squares of the weights, is a setting and not learned (see
`bnn.ConcreteDropout`); q puts all mass on a lattice around one mode, so that there is no ELBO.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bnn.data import Data, take
from bnn.handlers import branch, constrained_parameters, generator, parameters, seeded
from bnn.inference._energy import Energy
from bnn.inference._masks import Masked, check_rates, find, hard
from bnn.inference._optimise import Optimised, maximise
from bnn.inference._own_dropout import program
from bnn.method import Model, Tensors, check_count, check_positive
from bnn.posterior import Posterior
from bnn.sites import Sites, require_continuous, require_minibatches

_RATE = 0.1  # of a net that has no dropout of its own


@dataclass(frozen=True, kw_only=True)
class MCDropout(Optimised):
    """Dropout at a fixed rate, kept on when predicting.

    Attributes:
        rate: probability of dropping an input of a linear map: a number, for every map that another
            one, or any latent site, feeds (hidden units; for the only map of a linear model, its
            inputs); or by site, `{"layers.0.weight": 0.05, "layers.1.weight": 0.2}`, for these
            alone. A weight that is used transposed (`x @ w.T`) is no map here. None takes the
            dropout that the net has itself, whether in training mode or not, else .1. Put a net
            with batch norm in evaluation mode, `net.eval()`; its dropout is drawn all the same.
        length_scale: l of the prior N(0, 1 / l^2) over weights of linear maps and the biases that
            their layers add, in place of the model's; None keeps the model's.
        draws: masks that the posterior keeps.

    References:
        Gal, Ghahramani (2016), Dropout as a Bayesian approximation. It drops before every weight,
        the data included, which is `rate` by site; l is .01 there and in few other places.

    Example:
        >>> MCDropout(rate=0.2) == MCDropout(rate=0.2, draws=1_000)
        True
    """

    rate: float | Mapping[str, float] | None = None
    length_scale: float | None = None
    draws: int = 1_000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("MCDropout", draws=self.draws)
        if self.rate is not None:
            check_rates("MCDropout", "rate", self.rate, zero=True)
        if self.length_scale is not None:
            check_positive("MCDropout", length_scale=self.length_scale)

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
        require_continuous(sites, "MCDropout")
        if data.loader is not None or sites.subsampled or self.batch_size is not None:
            require_minibatches(sites, "MCDropout")
        energy = Energy(model, data, sites)
        batch = take(data.tensors, slice(0, self.batch_size))
        mode, layout = find(energy, batch, branch(seed, 0))
        rate = _RATE if self.rate is None and not layout.own else self.rate
        rates = layout.rates(rate, f"MCDropout(rate={self.rate!r})")
        rates = {name: rate for name, rate in rates.items() if rate}
        masked = Masked(energy, layout, rates, self.length_scale)
        odds = {name: rate / (1 - rate) for name, rate in rates.items()}

        def noise(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            shapes = masked.shapes(len(batch[-1]))
            return tuple(hard(s, rates[k.removeprefix("prior: ")]) for k, s in shapes.items())

        def objective(
            tensors: Mapping[str, Tensor],
            batch: tuple[Tensor, ...],
            weight: Tensor,
            noise: tuple[Tensor, ...],
        ) -> Tensor:
            factors = dict(zip(masked.shapes(len(batch[-1])), noise, strict=True))
            likelihood, prior = masked.terms(tensors["mode"], batch, factors, odds)
            return likelihood + weight * prior

        with parameters(model, data.tensors) as leftovers, seeded(branch(seed, 2)):
            (history,) = maximise(
                objective,
                {"mode": mode, **leftovers},
                data.batches(self.batch_size, generator(branch(seed, 3, 0))),
                self,
                label="expected log joint",
                what="MCDropout",
                progress=progress,
                noise=noise,
                epoch=None if sites.subsampled else data.epoch(self.batch_size),
                seed=None if leftovers or sites.subsampled else branch(seed, 4),
            )
            with torch.no_grad():
                draws = masked.draws(mode, rates, self.draws)
            params = constrained_parameters()
        return Posterior(
            model=model,
            method=self,
            data=data,
            sites=sites,
            draws=draws,
            params=params | masked.kept(rates),
            history=history,
        )

    def program(self, model: Model, params: Tensors) -> Model:
        """The model, with the masks of its own dropout in place of torch's."""
        return program(model, params) if self.rate is None else model
