"""Stiffness: how fast the log joint bends around a point, from differences of its gradient.

No second derivatives are asked of the model, and both ends of a difference are on the same
minibatch, so that the choice of rows all but cancels.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnn.handlers import seeded
from bnn.inference._members import Members

_PROBES, _ROUNDS = 16, 3
_NOISY = 64  # gradients that tell the noise: its variance to about an eighth
_LENGTH = 0.05  # of a difference, in scales: short beside the width of the posterior


class Stiffness:
    """Of the objective of some members, each at a point of its own, (member, size).

    Args:
        members: the objective.
        batches: a minibatch for every question.
    """

    def __init__(self, members: Members, batches: Iterator[tuple[Any, ...]]):
        self.members, self.batches = members, batches

    def scales(self, z: Tensor, widest: Tensor) -> Tensor:
        """A length for each coordinate in which the posterior is about 1 wide, (member, size).

        s_i = (|H s|_i / s_i + C_i)^(-1/2), H the Hessian and C the variance of the gradient from
        minibatch to minibatch. |H s|_i is the root mean square over directions s xi: a coordinate
        that bends with many others is held shorter than its own H_ii would have it (Dauphin, de
        Vries, Bengio 2015, Equilibrated adaptive learning rates), and one whose gradient is mostly
        noise so short that the noise moves it no further than its velocity.

        Args:
            z: points.
            widest: bound where the density is flat, (size,).
        """
        widest = widest.expand(z.shape)
        scale, noise = widest, self.noise(z)
        for _ in range(_ROUNDS):
            square = torch.zeros_like(z)
            for _ in range(_PROBES):
                square += self._change(z, scale * torch.randn_like(z)) ** 2
            scale = ((square / _PROBES).sqrt() / scale + noise).rsqrt().minimum(widest)
        return scale

    def stiffest(self, z: Tensor, scale: Tensor) -> Tensor:
        """The largest eigenvalue of s H s in size, by power iteration, (member,) or ()."""
        direction, value = _unit(torch.randn_like(z)), torch.ones_like(z[..., 0])
        for _ in range(_PROBES):
            after = scale * self._change(z, scale * direction)
            direction, value = _unit(after), after.norm(dim=-1)
        return value

    def noisiest(self, z: Tensor, scale: Tensor) -> Tensor:
        """The same of s C s, C the covariance of the gradient from minibatch to minibatch."""
        direction, value = _unit(torch.randn_like(z)), torch.zeros_like(z[..., 0])
        for _ in range(_ROUNDS + 1):
            after, value = torch.zeros_like(z), torch.zeros_like(value)
            for each in self._noise(z):
                along = (scale * each * direction).sum(-1)
                after += along[..., None] * scale * each
                value += along**2 / _NOISY
            direction = _unit(after) if after.any() else direction
        return value

    def noise(self, z: Tensor) -> Tensor:
        """Variance of the gradient from minibatch to minibatch, (member, size)."""
        return sum((each**2 for each in self._noise(z)), torch.zeros_like(z)) / _NOISY

    def _noise(self, z: Tensor) -> Iterator[Tensor]:
        """Differences of gradients on successive minibatches, with the variance of one."""
        batch = next(self.batches)
        before = self._gradient(z, batch)
        for _ in range(_NOISY):
            batch, last = next(self.batches), batch
            if batch is last and not self.members.energy.sites.subsampled:
                return  # all rows
            here = self._gradient(z, batch)
            yield (here - before) / 2**0.5
            before = here

    def _change(self, z: Tensor, direction: Tensor) -> Tensor:
        """H direction, on one minibatch."""
        batch, key = next(self.batches), int(torch.randint(2**62, ()))
        ends = (z, z + _LENGTH * direction)
        here, there = (self._gradient(end, batch, key) for end in ends)
        return (there - here) / _LENGTH

    def _gradient(self, z: Tensor, batch: tuple[Any, ...], key: int | None = None) -> Tensor:
        """A model that draws rows by itself draws the same ones for the same key."""
        z = z.detach().clone().requires_grad_()
        key = int(torch.randint(2**62, ())) if key is None else key
        with seeded(np.random.SeedSequence(key)):
            value = self.members.objective({"mode": z}, batch, torch.ones(()), ())
        return torch.autograd.grad(value.sum(), z)[0].detach()


def _unit(direction: Tensor) -> Tensor:
    """Of length 1; 0 stays 0."""
    return direction / direction.norm(dim=-1, keepdim=True).clamp(min=1e-30)
