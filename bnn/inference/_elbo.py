"""ELBO: the bound of a guide family of ours, what has a closed form exact and the rest sampled."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributions as td
from pyro import poutine
from torch import Tensor

from bnn.data import Data
from bnn.handlers import seeded
from bnn.inference._energy import Energy
from bnn.sites import Sites

_EVALUATIONS = 10_000_000  # rows x draws that the final ELBO may cost,
_MULTIPLICATIONS = 100_000_000_000  # and rows x draws x weights: a few seconds
_AT_ONCE = 100_000  # rows x draws in memory together


class Bound:
    """The ELBO of a family of ours, as a function of its tensors."""

    def __init__(
        self, energy: Energy, family: Any, sites: Sites, annealing: int, particles: int = 1
    ):
        self.energy, self.family = energy, family
        self.annealing, self.particles = annealing, particles
        self.exact = (
            set() if family.moments() is None else _normal_priors(energy, family.independent)
        )

    def __call__(self, batch: tuple[Any, ...], step: int, particles: int) -> Tensor:
        weight = min(1.0, (step + 1) / (self.annealing + 1))
        return self._estimate(batch, weight, torch.randn, particles)

    def at(
        self,
        tensors: Mapping[str, Tensor],
        batch: tuple[Any, ...],
        weight: Tensor,
        noise: tuple[Tensor, ...],
    ) -> Tensor:
        """The estimate as a function of the family's tensors and of the noise, see `noise`."""
        own, given = self.family.tensors, iter(noise)
        self.family.tensors = {name: tensors[f"guide.{name}"] for name in own}
        try:
            return self._estimate(batch, weight, lambda *_: next(given), self.particles)
        finally:
            self.family.tensors = own

    def noise(self) -> tuple[Tensor, ...]:
        """What one estimate takes: standard normal numbers, in the order it asks for them."""
        return tuple(torch.randn(shape) for shape in self._shapes)

    @cached_property
    def _shapes(self) -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = []

        def asked(*shape: int) -> Tensor:
            shapes.append(shape)
            return torch.zeros(shape)

        with torch.no_grad():
            self.family.sample(asked, self.particles)
        return shapes

    def _estimate(
        self, batch: tuple[Any, ...], weight: Any, noise: Callable[..., Tensor], particles: int
    ) -> Tensor:
        z, log_q = self.family.sample(noise, particles)
        elsewhere = self._expected_priors()

        def terms(one: Tensor) -> tuple[Tensor, Tensor]:
            return self.energy.terms(one, batch, jacobian=self.family.spreads, elsewhere=elsewhere)

        likelihood, prior = self.energy.batched(terms, z)
        entropy = self.family.entropy() if log_q is None else -log_q.mean()
        return likelihood.mean() + weight * (prior.mean() + entropy)

    def value(self, data: Data, sites: Sites) -> float | None:
        """The ELBO on all rows, from many draws; None where the rows are not at hand."""
        if data.loader is not None or sites.subsampled:
            return None
        rows, size = max(data.rows, 1), max(self.energy.size, 1)
        affordable = min(_EVALUATIONS // rows, _MULTIPLICATIONS // (rows * size))
        count = int(min(max(affordable, 4), 8_192))
        step = min(512, max(1, _AT_ONCE // max(data.rows, 1)))
        parts = [min(step, count - i) for i in range(0, count, step)]
        values = [float(self(data.tensors, self.annealing, n)) * n for n in parts]
        return sum(values) / count

    def _expected_priors(self) -> dict[str, Callable[[Any], Tensor]]:
        """E_q[log N(w | loc, scale)] = log N(mean of q | loc, scale) - var of q / (2 scale^2)."""
        moments = self.family.moments()
        if moments is None:
            return {}
        expected = {}
        for slot in self.energy.slots:
            if slot.name in self.exact:
                mean, variance = (m[slot.span].reshape(slot.free) for m in moments)
                expected[slot.name] = _Expected(mean, variance)
        return expected


@dataclass(frozen=True)
class _Expected:
    mean: Tensor
    variance: Tensor

    def __call__(self, fn: Any) -> Tensor:
        base = _normal(fn)
        at_mean = -0.5 * ((self.mean - base.loc) / base.scale).square() - base.scale.log()
        each = at_mean - 0.5 * np.log(2 * np.pi) - 0.5 * self.variance / base.scale.square()
        return each.flatten(-fn.event_dim).sum(-1) if fn.event_dim else each


def _normal(fn: Any) -> Any:
    """The Normal inside a site's distribution, or None."""
    while isinstance(fn, td.Independent):
        fn = fn.base_dist
    return fn if isinstance(fn, td.Normal) else None


def _normal_priors(energy: Energy, independent: bool) -> set[str]:
    """Sites whose prior is Normal, with parameters that q leaves alone.

    Under a q that correlates sites the parameters must be the same at every prior draw.
    """
    runs = []
    for number in range(2):
        with seeded(np.random.SeedSequence(number)), torch.no_grad():
            trace: Any = poutine.trace(energy.model).get_trace(*energy.data.tensors)
        runs.append({s.name: _normal(trace.nodes[s.name]["fn"]) for s in energy.slots})
    first, second = runs
    return {
        name
        for name, fn in first.items()
        if fn is not None
        and (
            independent
            or (torch.equal(fn.loc, second[name].loc) and torch.equal(fn.scale, second[name].scale))
        )
    }
