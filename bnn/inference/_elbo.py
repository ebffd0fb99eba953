"""ELBO: the bound of a guide family of ours, what has a closed form exact and the rest sampled."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributions as td
from pyro import poutine
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from bnn.data import Data
from bnn.handlers import seeded, singular
from bnn.inference._energy import Energy
from bnn.inference._rowwise import Ask, Draw
from bnn.sites import Sites

_EVALUATIONS = 10_000_000  # rows x draws that the final ELBO may cost,
_MULTIPLICATIONS = 100_000_000_000  # and rows x draws x weights: a few seconds
_TRIED = 20  # draws at which a site that is not finite is looked for
_NUMBERS = 3e8  # and that it computes with: a row may meet a weight many times
_AT_ONCE = 100_000  # rows x draws in memory together
_CLOSED = (td.Normal, td.Laplace)  # priors of z whose mean log density under a Gaussian is known
Needs = dict[int | str, tuple[Draw, tuple[int, ...]]]
"""The law and the shape of each noise: the family's own by number, what rows draw by name."""


class Rewiring(Protocol):
    """What draws noise of its own in a run, such as weights for each row."""

    def rewired(self, moments: Any, ask: Ask) -> AbstractContextManager[Any]:
        """A run in it takes its noise from `ask`; `moments` are mean and variance of the flat z."""
        ...


class Bound:
    """The ELBO of a family of ours, as a function of its tensors.

    Args:
        energy: the log joint.
        family: one of `bnn.inference._guide.FAMILIES`, built.
        sites: of the model.
        particles: draws of one estimate.
        rowwise: draws noise in each run; None has no other than the family's.
        path: samples all of the KL, and differentiates log q(z) through z alone: what is left out
            has mean 0.
        temperature: how often the entropy counts.
    """

    def __init__(
        self,
        energy: Energy,
        family: Any,
        sites: Sites,
        particles: int = 1,
        *,
        rowwise: Rewiring | None = None,
        path: bool = False,
        temperature: float = 1.0,
    ):
        self.energy, self.family, self.particles = energy, family, particles
        self.rowwise, self.path, self.temperature = rowwise, path, temperature
        known = family.moments() is not None and not path
        self.exact = _known_priors(energy, family.independent) if known else set()
        self._asked: dict[Any, Needs] = {}

    def __call__(self, batch: tuple[Any, ...], particles: int) -> Tensor:
        """The ELBO itself, at temperature 1, from one draw of the weights for all rows."""
        z, log_q = self.family.sample(torch.randn, particles)
        try:
            likelihood, prior = self.energy.batched(lambda one: self._terms(one, batch), z)
        except RuntimeError as error:
            if not singular(error):
                raise
            return torch.tensor(-torch.inf)  # q has draws at which the density is 0
        return likelihood.mean() + prior.mean() + self._entropy(z, log_q)

    def at(
        self,
        tensors: Mapping[str, Tensor],
        batch: tuple[Any, ...],
        weight: Tensor,
        noise: tuple[Tensor, ...],
    ) -> Tensor:
        """The estimate as a function of the family's tensors, the weight of the KL, and noise."""
        own, given = self.family.tensors, dict(zip(self._needs(batch), noise, strict=True))
        self.family.tensors = {name: tensors[f"guide.{name}"] for name in own}
        try:
            shared = iter([given.pop(name) for name in list(given) if isinstance(name, int)])
            z, log_q = self.family.sample(lambda *_: next(shared), self.particles)

            def terms(one: Tensor, *each: Tensor) -> tuple[Tensor, Tensor]:
                asked = dict(zip(given, each, strict=True))
                return self._terms(one, batch, lambda name, *_: asked[name])

            likelihood, prior = self.energy.batched(terms, z, *given.values(), of="particles")
            entropy = self.temperature * self._entropy(z, log_q)
            return likelihood.mean() + weight * (prior.mean() + entropy)
        finally:
            self.family.tensors = own

    def culprit(
        self, tensors: Mapping[str, Tensor], batch: tuple[Any, ...], member: int
    ) -> str | None:
        """A site that is not finite at one of some draws, see `Energy.culprit`."""
        own = self.family.tensors
        self.family.tensors = {name: tensors[f"guide.{name}"] for name in own}
        try:
            with torch.no_grad():
                z, _ = self.family.sample(torch.randn, _TRIED)
        finally:
            self.family.tensors = own
        return next((found for one in z if (found := self.energy.culprit(one, batch))), None)

    def noise(self, batch: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """What one estimate takes on a batch, in the order it asks for it."""
        return tuple(draw(shape) for draw, shape in self._needs(batch).values())

    def _needs(self, batch: tuple[Any, ...]) -> Needs:
        """What a run asks for; the same for batches of the same shapes.

        What the run draws by itself is put back: a fit that was stopped asks again.
        """
        key = tuple(arg.shape for arg in batch) if self.rowwise else ()
        if key in self._asked:
            return self._asked[key]
        needs: Needs = {}

        def shared(*shape: int) -> Tensor:
            needs[len(needs)] = torch.randn, shape
            return torch.zeros(shape)

        def ask(name: str, shape: Sequence[int], draw: Draw) -> Tensor:
            needs[name] = draw, (self.particles, *shape)
            return torch.zeros(tuple(shape))

        with seeded(np.random.SeedSequence(0)), torch.no_grad():
            z, _ = self.family.sample(shared, self.particles)
            if self.rowwise is not None:
                self._terms(z[0], batch, ask)
        self._asked[key] = needs
        return needs

    def _terms(
        self, z: Tensor, batch: tuple[Any, ...], ask: Ask | None = None
    ) -> tuple[Tensor, Tensor]:
        run = nullcontext()
        if self.rowwise is not None and ask is not None:
            run = self.rowwise.rewired(self.family.moments(), ask)
        with run:
            return self.energy.terms(
                z, batch, jacobian=self.family.spreads, elsewhere=self._expected_priors(z)
            )

    def _entropy(self, z: Tensor, log_q: Tensor | None) -> Any:
        if self.path:
            own = self.family.tensors
            self.family.tensors = {name: tensor.detach() for name, tensor in own.items()}
            log_q = self.family.log_density(z)
            self.family.tensors = own
        return self.family.entropy() if log_q is None else -log_q.mean()

    def value(self, data: Data, sites: Sites) -> float | None:
        """The ELBO on all rows, from many draws; None where the rows are not at hand."""
        if data.loader is not None or sites.subsampled:
            return None
        rows, size = max(data.rows, 1), max(self.energy.size, 1)
        affordable = min(
            _EVALUATIONS // rows,
            _MULTIPLICATIONS // (rows * size),
            int(_NUMBERS / (self._written() * rows)),
        )
        count = int(min(max(affordable, 4), 8_192))
        step = min(512, max(1, _AT_ONCE // max(data.rows, 1)))
        parts = [min(step, count - i) for i in range(0, count, step)]
        values = [float(self(data.tensors, n)) * n for n in parts]
        return sum(values) / count

    def _written(self) -> float:
        """Numbers that a run computes with for each row: those that its gradient would need."""
        total = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        few = self.energy.few
        with seeded(np.random.SeedSequence(0)), torch.enable_grad():
            with torch.no_grad():
                z, _ = self.family.sample(torch.randn, 1)
            with saved_tensors_hooks(count, lambda tensor: tensor):
                self._terms(z[0].requires_grad_(), few)
        return max(total, 1) / len(few[-1])

    def _expected_priors(self, z: Tensor) -> dict[str, Callable[[Any], Tensor]]:
        """E_q[log p(w)] of the sites whose prior and whose q have a closed form together.

        Of a site that is not real it is E_q[log p(z)] less log |dw/dz| at the z that was drawn,
        which `Energy.terms` adds: no noise is left.
        """
        moments = self.family.moments()
        if moments is None or not self.exact:
            return {}
        expected = {}
        parts = (self.energy.parts(each) for each in (*moments, z))
        for slot, mean, variance, free in zip(self.energy.slots, *parts, strict=True):
            if slot.name in self.exact:
                bend = slot.transform
                jacobian = 0.0 if slot.real else bend.log_abs_det_jacobian(free, bend(free))
                expected[slot.name] = _Expected(mean, variance, jacobian)
        return expected


@dataclass(frozen=True)
class _Expected:
    """E_q[log p(w)], q(z) having these moments: of a Normal prior of z, or a Laplace if q is one.

    log N(mean | loc, scale) - variance / (2 scale^2), and -log 2b - E_q|z - loc| / b.
    """

    mean: Tensor
    variance: Tensor
    jacobian: Tensor | float = 0.0

    def __call__(self, fn: Any) -> Tensor:
        base = _on_the_line(fn)[0]
        apart = self.mean - base.loc
        if isinstance(base, td.Normal):
            each = -0.5 * (apart.square() + self.variance) / base.scale.square()
            each = each - base.scale.log() - 0.5 * math.log(2 * math.pi)
        else:
            unit = apart / (2 * self.variance).sqrt()
            near = (2 * self.variance / math.pi).sqrt() * (-unit.square()).exp()
            each = -(2 * base.scale).log() - (near + apart * unit.erf()) / base.scale
        each = each.flatten(-fn.event_dim).sum(-1) if fn.event_dim else each
        return each - self.jacobian


def _on_the_line(fn: Any) -> tuple[Any, list[Any]]:
    """The distribution inside a site's, and the transforms that take it to the site's support."""
    while isinstance(fn, td.Independent):
        fn = fn.base_dist
    if isinstance(fn, td.TransformedDistribution):
        return fn.base_dist, [step for each in fn.transforms for step in _steps(each)]
    return fn, []


def _steps(transform: Any) -> list[Any]:
    """A transform's own, entry by entry: none of the identity."""
    while isinstance(transform, td.IndependentTransform):
        transform = transform.base_transform
    parts = transform.parts if isinstance(transform, td.ComposeTransform) else [transform]
    return [each for each in parts if each != td.AffineTransform(0, 1)]  # "positive" ends with one


def _known(fn: Any, transform: Any) -> Any:
    """The Normal or Laplace that z = T^-1(w) has, a LogNormal's among them; or None."""
    base, steps = _on_the_line(fn)
    return base if isinstance(base, _CLOSED) and steps == _steps(transform) else None


def _known_priors(energy: Energy, independent: bool) -> set[str]:
    """Sites whose z has a Normal or Laplace prior, with parameters that q leaves alone.

    Under a q that correlates sites the parameters must be the same at every prior draw.
    """
    runs = []
    for number in range(2):
        with seeded(np.random.SeedSequence(number)), torch.no_grad():
            trace: Any = poutine.trace(energy.model).get_trace(*energy.data.tensors)
        runs.append({s.name: _known(trace.nodes[s.name]["fn"], s.transform) for s in energy.slots})
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
