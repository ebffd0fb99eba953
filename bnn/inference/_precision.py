"""Precision: a Gaussian's inverse covariance, block by block, as what is asked of it.

A block knows its log determinant, the standard deviation `sd` of each entry, and a root R of the
covariance, R R^T = H^-1, by `spread`: u -> R u and `pull`: g -> R^T g. So spread(u) of standard
normal u is a draw, spread(pull(g)) a Newton step, and |pull(g)| the gradient in units of the
posterior.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

_FLAT = 1e-10  # share of an entry's precision: below is rounding


class NotPositive(Exception):
    """A block that is no precision: its least eigenvalue, and the direction of that, (size,)."""

    def __init__(self, value: float, direction: Tensor):
        super().__init__(f"least eigenvalue {value:.3g}")
        self.value, self.direction = value, direction


class Block(Protocol):
    """What every block knows."""

    log_det: Tensor
    sd: Tensor

    def spread(self, u: Tensor) -> Tensor:
        """R u, (*, size)."""
        ...

    def pull(self, g: Tensor) -> Tensor:
        """R^T g, (*, size)."""
        ...


class Dense:
    """Any precision H = L L^T, (size, size)."""

    def __init__(self, precision: Tensor):
        lower, failed = torch.linalg.cholesky_ex(precision)
        own = precision.diagonal().abs()  # what is left of it given the entries before: 1 - R^2
        if failed or (lower.diagonal().square() < _FLAT * own).any():
            values, vectors = torch.linalg.eigh(precision)
            raise NotPositive(float(values[0]), vectors[:, 0])
        self.log_det = 2 * lower.diagonal().log().sum()
        self.root = torch.eye(len(lower)).to(lower)
        torch.linalg.solve_triangular(lower.T, self.root, upper=True, out=self.root)
        self.sd = torch.linalg.vector_norm(self.root, dim=1)

    def spread(self, u: Tensor) -> Tensor:
        """See `Block`."""
        return u @ self.root.T

    def pull(self, g: Tensor) -> Tensor:
        """See `Block`."""
        return g @ self.root


class Diagonal:
    """H = diag(h), (size,)."""

    def __init__(self, precision: Tensor):
        least = precision.argmin()
        if precision[least] <= 0:
            raise NotPositive(float(precision[least]), torch.eye(len(precision))[least])
        self.log_det, self.sd = precision.log().sum(), precision.rsqrt()

    def spread(self, u: Tensor) -> Tensor:
        """See `Block`."""
        return u * self.sd

    def pull(self, g: Tensor) -> Tensor:
        """See `Block`."""
        return g * self.sd


class Kronecker:
    """H = G x A + 1 x diag(p), over entries (output, input) that lie flat.

    With A' = p^-1/2 A p^-1/2 = Q a Q^T and G = V b V^T it is diagonalised by V x Q, the prior
    included (Immer et al. 2021, section 3).

    Args:
        outputs: G, (output, output).
        inputs: A, (input, input).
        prior: p, (input,), above 0.
    """

    def __init__(self, outputs: Tensor, inputs: Tensor, prior: Tensor):
        self.scale = prior.rsqrt()  # (input,)
        a, self.right = torch.linalg.eigh(self.scale[:, None] * inputs * self.scale)
        b, self.left = torch.linalg.eigh(outputs)
        strength = 1 + b.clamp(min=0)[:, None] * a.clamp(min=0)  # (output, input)
        self.gain = strength.rsqrt()
        self.log_det = strength.log().sum() + len(b) * prior.log().sum()
        variance = self.left.square() @ self.gain.square() @ self.right.square().T
        self.sd = (variance.sqrt() * self.scale).flatten()

    def spread(self, u: Tensor) -> Tensor:
        """See `Block`."""
        u = u.unflatten(-1, self.gain.shape)
        return (self.left @ (u * self.gain) @ self.right.T * self.scale).flatten(-2)

    def pull(self, g: Tensor) -> Tensor:
        """See `Block`."""
        g = g.unflatten(-1, self.gain.shape)
        return (self.left.T @ (g * self.scale) @ self.right * self.gain).flatten(-2)


class Precision:
    """Independent blocks, each with the entries that it is of.

    Attributes:
        blocks: (entries, block) each; together the entries are 0..size-1.
    """

    def __init__(self, blocks: Sequence[tuple[Tensor, Block]]):
        self.blocks = blocks

    @property
    def size(self) -> int:
        """Number of entries."""
        return sum(len(at) for at, _ in self.blocks)

    @property
    def log_det(self) -> float:
        """Log determinant of H."""
        return sum(float(block.log_det) for _, block in self.blocks)

    @property
    def sd(self) -> Tensor:
        """Standard deviation of each entry, (size,)."""
        out = torch.empty(self.size, dtype=torch.float64)
        for at, block in self.blocks:
            out[at] = block.sd
        return out

    def spread(self, u: Tensor) -> Tensor:
        """R u, (*, size)."""
        out = torch.empty_like(u)
        for at, block in self.blocks:
            out[..., at] = block.spread(u[..., at])
        return out

    def pull(self, g: Tensor) -> Tensor:
        """R^T g, (*, size)."""
        out = torch.empty_like(g)
        for at, block in self.blocks:
            out[..., at] = block.pull(g[..., at])
        return out
