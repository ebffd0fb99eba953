"""Concrete dropout: dropout whose rate each linear map learns.

    q(W) = law of M diag(z) / (1 - p),   z_j ~ Bernoulli(1 - p) for each input of the map, p its own
    maximise over M and every p:   E_z[log p(data | W)] + E_z[log p(W)] + sum over maps n_in H(p)

H is the entropy of a Bernoulli in nats and n_in the number of inputs (channels of a convolution).
For a Normal prior N(0, 1 / l^2) the last two are -(l^2 |M|^2 / (2 (1 - p)) - n_in H(p)) for each
map, in nats of all rows: the KL of the paper, with weights and entropy in the ratio l^2 / 2 of its
two regularisers (l^2 / (2 N) and 1 / N when divided by rows). Biases are points, and p is not in
their prior. The gradient in p passes through relaxed masks

    1 - z = sigmoid((logit p + logit u) / temperature),   u ~ Uniform(0, 1)

whose variance is about (1 - temperature) of theirs, so that rates come out a little high. Draws
have masks of 0 and 1, the law that the rates are of; the paper predicts with relaxed ones.

When not to use it: where the widths of the posterior matter. Its only freedom is a rate a map. The
entropy, up to .69 nats for every input, holds wide maps near 1/2 until there are many more rows
than units; with very many the rates go to 0, and so does all doubt.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from bnn.data import Data, take
from bnn.handlers import branch, constrained_parameters, generator, parameters, seeded
from bnn.inference._energy import Energy
from bnn.inference._masks import Masked, check_rates, find, hard
from bnn.inference._optimise import Optimised, maximise
from bnn.method import Model, Tensors, check_count, check_positive
from bnn.posterior import Posterior
from bnn.sites import Sites, require_continuous, require_minibatches

_EVALUATIONS = 10_000_000  # rows x masks that the reported bound may cost


@dataclass(frozen=True, kw_only=True)
class ConcreteDropout(Optimised):
    """Dropout with a learned rate for each linear map: `posterior.params["rate.<site>"]`.

    `posterior.elbo` is E[log p(data, W)] plus the entropy of the masks. It bounds the log of the
    joint density summed over masks and not log p(data), since q has no density: compare it between
    fits of this method.

    Attributes:
        initial_rate: where rates start: a number, for every map that another one feeds (hidden
            units; for the only map of a linear model, its inputs); or by site, for these alone.
        rate_learning_rate: Adam's for logit p. It falls with `learning_rate`.
        temperature: of the relaxed masks; towards 0 they become those of 0 and 1, and gradients
            noisier.
        length_scale: l of the prior N(0, 1 / l^2) over weights and biases of linear maps, in place
            of the model's; None keeps the model's.
        draws: masks that the posterior keeps.

    References:
        Gal, Hron, Kendall (2017), Concrete dropout.

    Example:
        >>> ConcreteDropout(temperature=0.1) == ConcreteDropout()
        True
    """

    initial_rate: float | Mapping[str, float] = 0.1
    rate_learning_rate: float = 0.05
    temperature: float = 0.1
    length_scale: float | None = None
    draws: int = 1_000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("ConcreteDropout", draws=self.draws)
        check_rates("ConcreteDropout", "initial_rate", self.initial_rate)
        check_positive(
            "ConcreteDropout",
            rate_learning_rate=self.rate_learning_rate,
            temperature=self.temperature,
        )
        if self.length_scale is not None:
            check_positive("ConcreteDropout", length_scale=self.length_scale)

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
        require_continuous(sites, "ConcreteDropout")
        if data.loader is not None or sites.subsampled or self.batch_size is not None:
            require_minibatches(sites, "ConcreteDropout")
        energy = Energy(model, data, sites)
        batch = take(data.tensors, slice(0, self.batch_size))
        mode, layout = find(energy, batch, branch(seed, 0))
        call = f"ConcreteDropout(initial_rate={self.initial_rate!r})"
        start = layout.rates(self.initial_rate, call)
        masked = Masked(energy, layout, start, self.length_scale)
        bound = _Bound(masked, self.temperature)
        # Adam steps as far in every leaf: the logit is a multiple of its own, and steps further
        gain = self.rate_learning_rate / self.learning_rate
        leaves = {f"logit.{k}": torch.tensor(p).logit() / gain for k, p in start.items()}
        logits = lambda tensors: {k: gain * tensors[f"logit.{k}"] for k in start}

        def objective(
            tensors: Mapping[str, Tensor],
            batch: tuple[Tensor, ...],
            weight: Tensor,
            noise: tuple[Tensor, ...],
        ) -> Tensor:
            likelihood, rest = bound(tensors["mode"], logits(tensors), batch, noise)
            return likelihood + weight * rest

        with parameters(model, data.tensors) as leftovers, seeded(branch(seed, 2)):
            (history,) = maximise(
                objective,
                {"mode": mode, **leaves, **leftovers},
                data.batches(self.batch_size, generator(branch(seed, 3, 0))),
                self,
                label="ELBO",
                what="ConcreteDropout",
                progress=progress,
                noise=bound.noise,
                epoch=None if sites.subsampled else data.epoch(self.batch_size),
                seed=None if leftovers or sites.subsampled else branch(seed, 4),
            )
            with torch.no_grad():
                fitted = logits(leaves)
                rates = {k: logit.sigmoid() for k, logit in fitted.items()}
                draws = masked.draws(mode, {k: float(p) for k, p in rates.items()}, self.draws)
                elbo = None
                if data.loader is None and not sites.subsampled:
                    elbo = bound.value(mode, fitted, data.tensors)
            params = constrained_parameters()
        return Posterior(
            model=model,
            method=self,
            data=data,
            sites=sites,
            draws=draws,
            params=params | {f"rate.{k}": p for k, p in rates.items()},
            history=history,
            elbo=elbo,
        )


class _Bound:
    """The objective's likelihood and the rest, at relaxed masks; its value at masks of 0 and 1."""

    def __init__(self, masked: Masked, temperature: float):
        self.masked, self.temperature = masked, temperature

    def noise(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Logit u of every mask."""
        shapes = self.masked.shapes(len(batch[-1])).values()
        return tuple(torch.rand(s).clamp(1e-7, 1 - 1e-7).logit() for s in shapes)

    def __call__(
        self, z: Tensor, logits: Tensors, batch: tuple[Tensor, ...], noise: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        factors = {}
        for name, each in zip(self.masked.shapes(len(batch[-1])), noise, strict=True):
            logit = logits[name.removeprefix("prior: ")]
            kept = (-(logit + each) / self.temperature).sigmoid()
            factors[name] = kept * (1 + logit.exp())  # / (1 - p)
        return self._at(z, logits, batch, factors)

    def _at(
        self, z: Tensor, logits: Tensors, batch: tuple[Tensor, ...], factors: Tensors
    ) -> tuple[Tensor, Tensor]:
        odds = {name: logit.exp() for name, logit in logits.items()}
        entropies = [
            self.masked.places[name].map.inputs * (softplus(logit) - logit.sigmoid() * logit)
            for name, logit in logits.items()
        ]
        likelihood, prior = self.masked.terms(z, batch, factors, odds)
        return likelihood, prior + torch.stack(entropies).sum()

    def value(self, z: Tensor, logits: Tensors, batch: tuple[Tensor, ...]) -> float:
        """Of all rows, from many masks of 0 and 1."""
        shapes = self.masked.shapes(len(batch[-1]))
        rates = {name: float(logit.sigmoid()) for name, logit in logits.items()}
        count = min(max(_EVALUATIONS // max(len(batch[-1]), 1), 4), 256)
        total = 0.0
        for _ in range(count):
            factors = {k: hard(s, rates[k.removeprefix("prior: ")]) for k, s in shapes.items()}
            total += float(sum(self._at(z, logits, batch, factors)))
        return total / count
