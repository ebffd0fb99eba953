"""Guide families over the flat unconstrained vector: q(z), reparameterised.

A family is built around a starting point and a scale; its tensors are optimised in place. Sampling
is pathwise, so gradients pass through the draw (Kingma and Welling 2014). Gaussian families know
their entropy and marginal moments exactly, and their log density at any point; a flow knows its own
at its draws; `Point` has none of these.

Of each family: `independent` says whether sites are independent under q, `spreads` whether q has a
density (a point has none, and its objective leaves the Jacobian out).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.distributions.transforms import affine_autoregressive
from torch import Tensor
from torch.func import functional_call

_LOG_2PI_E = 1 + math.log(2 * math.pi)


def _log_normal(unit: Tensor, half_log_det: Tensor) -> Tensor:
    """Log density of a Gaussian, of its draws (count, size) in units of its root."""
    return -0.5 * (unit.square() + math.log(2 * math.pi)).sum(-1) - half_log_det


class Normal:
    """q(z) = prod_i N(z_i | loc_i, scale_i^2): every coordinate on its own."""

    independent, spreads = True, True

    def __init__(self, loc: Tensor, scale: Tensor):
        self.tensors = {"loc": loc.clone(), "log_scale": scale.log()}

    def sample(self, noise: Callable[..., Tensor], count: int) -> tuple[Tensor, Tensor | None]:
        """Draws (count, size), and their log density where the entropy is not known, else None."""
        loc, scale = self.tensors["loc"], self.tensors["log_scale"].exp()
        return loc + scale * noise(count, len(loc)), None

    def entropy(self) -> Tensor:
        """E_q[-log q(z)], nats."""
        log_scale = self.tensors["log_scale"]
        return log_scale.sum() + 0.5 * _LOG_2PI_E * len(log_scale)

    def moments(self) -> tuple[Tensor, Tensor] | None:
        """Mean and variance of each coordinate, or None where they are not known."""
        return self.tensors["loc"], (2 * self.tensors["log_scale"]).exp()

    def log_density(self, z: Tensor) -> Tensor:
        """Log q(z) of (count, size), (count,)."""
        unit = (z - self.tensors["loc"]) / self.tensors["log_scale"].exp()
        return _log_normal(unit, self.tensors["log_scale"].sum())


class FullRank:
    """q(z) = N(loc, L L^T), L lower triangular with a positive diagonal."""

    independent, spreads = False, True

    def __init__(self, loc: Tensor, scale: Tensor):
        size = len(loc)
        self.tensors = {
            "loc": loc.clone(),
            "log_diagonal": scale.log(),
            "below": loc.new_zeros(size * (size - 1) // 2),
        }
        self._place = torch.tril_indices(size, size, -1)

    def _root(self) -> Tensor:
        diagonal = self.tensors["log_diagonal"].exp()
        # Rows in units of their own scale, so that one learning rate suits all of them.
        below = self.tensors["below"] * diagonal.detach()[self._place[0]]
        return torch.diag(diagonal).index_put((self._place[0], self._place[1]), below)

    def sample(self, noise: Callable[..., Tensor], count: int) -> tuple[Tensor, Tensor | None]:
        """See `Normal.sample`."""
        loc = self.tensors["loc"]
        return loc + noise(count, len(loc)) @ self._root().T, None

    def entropy(self) -> Tensor:
        """See `Normal.entropy`."""
        log_diagonal = self.tensors["log_diagonal"]
        return log_diagonal.sum() + 0.5 * _LOG_2PI_E * len(log_diagonal)

    def moments(self) -> tuple[Tensor, Tensor] | None:
        """See `Normal.moments`."""
        return self.tensors["loc"], self._root().square().sum(1)

    def log_density(self, z: Tensor) -> Tensor:
        """See `Normal.log_density`."""
        apart = (z - self.tensors["loc"]).T
        unit = torch.linalg.solve_triangular(self._root(), apart, upper=False).T
        return _log_normal(unit, self.tensors["log_diagonal"].sum())


class LowRank:
    """q(z) = N(loc, diag(scale^2) + F F^T), F of rank about sqrt(size) (Ong, Nott, Smith 2018).

    The leaf is F sqrt(rank) / scale: Adam moves every entry alike, and so the noise that its steps
    leave in the width does not grow with the rank.
    """

    independent, spreads = False, True

    def __init__(self, loc: Tensor, scale: Tensor):
        size = len(loc)
        rank = max(1, round(math.sqrt(size)))
        # A small deterministic pattern: at F = 0 the gradient of F would vanish.
        pattern = torch.cos(torch.arange(size * rank, dtype=loc.dtype)).view(size, rank)
        self.tensors = {
            "loc": loc.clone(),
            "log_scale": scale.log(),
            "factor": 0.1 * pattern,
        }

    def _factor(self) -> Tensor:
        leaf, scale = self.tensors["factor"], self.tensors["log_scale"].exp().detach()
        return leaf * scale[:, None] / math.sqrt(leaf.shape[1])

    def sample(self, noise: Callable[..., Tensor], count: int) -> tuple[Tensor, Tensor | None]:
        """See `Normal.sample`."""
        loc, scale, factor = self.tensors["loc"], self.tensors["log_scale"].exp(), self._factor()
        shared = noise(count, factor.shape[1]) @ factor.T
        return loc + scale * noise(count, len(loc)) + shared, None

    def entropy(self) -> Tensor:
        """See `Normal.entropy`; the determinant by the matrix determinant lemma."""
        log_scale, factor = self.tensors["log_scale"], self._factor()
        half_log_det = log_scale.sum() + 0.5 * torch.logdet(_capacitance(factor, log_scale))
        return half_log_det + 0.5 * _LOG_2PI_E * len(log_scale)

    def moments(self) -> tuple[Tensor, Tensor] | None:
        """See `Normal.moments`."""
        scale, factor = self.tensors["log_scale"].exp(), self._factor()
        return self.tensors["loc"], scale.square() + factor.square().sum(1)

    def log_density(self, z: Tensor) -> Tensor:
        """See `Normal.log_density`; the inverse by Woodbury's identity."""
        log_scale, factor = self.tensors["log_scale"], self._factor()
        scaled = factor / log_scale.exp()[:, None]
        inner = _capacitance(factor, log_scale)
        unit = (z - self.tensors["loc"]) / log_scale.exp()
        along = unit @ scaled  # (count, rank)
        explained = (along * torch.linalg.solve(inner, along.T).T).sum(-1)
        half_log_det = log_scale.sum() + 0.5 * torch.logdet(inner)
        return _log_normal(unit, half_log_det) + 0.5 * explained


def drawn(family: Any, count: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Draws (count, size), and their log density as a statistic of one chain; of a point none."""
    z, log_q = family.sample(torch.randn, count)
    if not family.spreads:
        return z, {}
    return z, {"log_q": (family.log_density(z) if log_q is None else log_q)[None].double()}


def _capacitance(factor: Tensor, log_scale: Tensor) -> Tensor:
    """I + F^T diag(scale^-2) F, (rank, rank)."""
    scaled = factor / log_scale.exp()[:, None]
    return torch.eye(factor.shape[1]).to(factor) + scaled.T @ scaled


class Flow:
    """q(z): a Gaussian pushed through two inverse autoregressive flows (Kingma et al. 2016)."""

    independent, spreads = False, True

    def __init__(self, loc: Tensor, scale: Tensor):
        size = len(loc)
        self.tensors = {"loc": loc.clone(), "log_scale": scale.log()}
        self._layers = []
        hidden = [max(2 * size, 16)]
        for layer in range(2 if size > 1 else 0):
            flow = affine_autoregressive(size, hidden_dims=hidden, stable=True)
            with torch.no_grad():  # start near the identity
                for weight in flow.parameters():
                    weight.mul_(0.1)
            self._layers.append(_Layer(flow))
            named = flow.named_parameters()
            self.tensors |= {f"flow.{layer}.{name}": weight for name, weight in named}

    def sample(self, noise: Callable[..., Tensor], count: int) -> tuple[Tensor, Tensor | None]:
        """See `Normal.sample`."""
        loc, log_scale = self.tensors["loc"], self.tensors["log_scale"]
        x = noise(count, len(loc))
        log_q = -0.5 * (x.square() + math.log(2 * math.pi)).sum(-1) - log_scale.sum()
        for number, layer in enumerate(self._layers):
            y, log_det = layer.at(self.tensors, f"flow.{number}.", x)
            log_q = log_q - log_det
            x = y.flip(-1)  # each flow sees the coordinates in the other order
        return loc + log_scale.exp() * x, log_q

    def entropy(self) -> None:
        """Not known in closed form."""

    def moments(self) -> None:
        """Not known in closed form."""


class _Layer(torch.nn.Module):
    """A flow that takes its weights from elsewhere."""

    def __init__(self, flow: Any):
        super().__init__()
        self.flow = flow

    def at(self, tensors: Mapping[str, Tensor], prefix: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """The flow, with weights whose names start with the prefix, and its log determinant."""
        weights = {name: tensors[prefix + name[5:]] for name, _ in self.named_parameters()}
        return functional_call(self, weights, x)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Flow and log determinant at its own weights."""
        x = x.view_as(x)  # for the same object it would return what it kept, of other weights
        y = self.flow(x)
        return y, self.flow.log_abs_det_jacobian(x, y)


class Point:
    """All mass at one point: the mode of the posterior in the model's own space."""

    independent, spreads = False, False

    def __init__(self, loc: Tensor, scale: Tensor):
        self.tensors = {"loc": loc.clone()}

    def sample(self, noise: Callable[..., Tensor], count: int) -> tuple[Tensor, Tensor | None]:
        """The point itself, (count, size)."""
        return self.tensors["loc"].expand(count, -1), None

    def entropy(self) -> float:
        """A point has no density; 0 makes the objective the log joint."""
        return 0.0

    def moments(self) -> None:
        """A point has no spread."""


FAMILIES = {
    "normal": Normal,
    "low_rank": LowRank,
    "full_rank": FullRank,
    "flow": Flow,
    "point": Point,
}
