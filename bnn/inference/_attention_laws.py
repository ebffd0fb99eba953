"""Attention's laws: weights of keys, a_j = S_j / sum S with S_j positive, told by scores.

The sum is over the keys that a query may see; others have weight 0. pi = softmax(scores).
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import softplus

from bnn.inference._gamma import digamma, lgamma, log_draw, log_uniform, sloped, trigamma
from bnn.inference._rowwise import Ask, Draw

FLOOR = 1e-2  # of a concentration: the KL has the slope prior / concentration^2


def softmax(scores: Tensor, hidden: Tensor) -> Tensor:
    """Over the last axis; exactly 0 where hidden, and wherever all of them are."""
    return torch.softmax(scores.masked_fill(hidden, _lowest(scores)), -1) * ~hidden


def _lowest(like: Tensor) -> float:
    return torch.finfo(like.dtype).min


class Law(TorchDistribution):
    """q of a layer's weights, (row, *lead, query, key), exactly 0 at hidden keys.

    Its log density at a draw is stated as E_q[log p(a) - log q(a)], that is -KL(q || prior) in
    closed form, summed over everything but the row: what the site adds to an ELBO, without noise.

    Args:
        scores: -inf at hidden keys.
        sharpness: positive, of shape (*lead, 1, 1).
        prior: concentrations b of the prior, a ~ Dirichlet(b), in a shape that broadcasts to that
            of the scores; positive. At hidden keys they have no effect.
        pi: softmax(scores), where it is known.
    """

    has_rsample = True
    arg_constraints: ClassVar[dict[str, Any]] = {}  # pyright: ignore
    tied = False  # True where the prior follows the scores: then a KL of 0 is no collapse

    def __init__(self, scores: Tensor, sharpness: Tensor, prior: Tensor, pi: Tensor | None = None):
        self.hidden, self.scores = scores == -math.inf, scores
        self.pi = softmax(scores, self.hidden) if pi is None else pi
        self.sharpness, self.prior = sharpness, prior
        super().__init__(scores.shape[:1], scores.shape[1:], validate_args=False)

    @property
    def support(self) -> Any:
        """Simplices, save for queries that see no key."""
        return constraints.independent(constraints.simplex, len(self.event_shape) - 1)

    @property
    def mean(self) -> Tensor:
        """E[S] / sum E[S], which is pi."""
        return self.pi

    @property
    def log_pi(self) -> Tensor:
        """Log softmax(s), 0 at hidden keys."""
        lowest = self.scores.masked_fill(self.hidden, _lowest(self.scores))
        return torch.log_softmax(lowest, -1).masked_fill(self.hidden, 0.0)

    def rsample(self, sample_shape: Any = (), *, ask: Ask | None = None) -> Tensor:
        """Weights, (row, *lead, query, key), pathwise in everything."""
        return softmax(self._log_s(ask), self.hidden)

    def kl(self) -> Tensor:
        """KL(q || prior) of each query, nats, (row, *lead, query); 0 where it has no choice."""
        return torch.where((~self.hidden).sum(-1) > 1, self._divergence(), 0.0)

    def log_prob(self, value: Tensor) -> Tensor:
        """-KL(q || prior), (row,), whatever the value."""
        return -self.kl()[..., None].flatten(1).sum(1)

    def _log_s(self, ask: Ask | None) -> Tensor:
        raise NotImplementedError

    def _divergence(self) -> Tensor:
        raise NotImplementedError

    def _over_keys(self, each: Tensor) -> Tensor:
        """Sum over the keys that are seen, of what broadcasts to the shape of the scores."""
        if each.shape[-1:] == (1,):
            return each[..., 0] * (~self.hidden).sum(-1)
        return torch.where(self.hidden, 0.0, each).sum(-1)


class Dirichlet(Law):
    """a ~ Dirichlet(sharpness pi + FLOOR)."""

    def __init__(self, scores: Tensor, sharpness: Tensor, prior: Tensor, pi: Tensor | None = None):
        super().__init__(scores, sharpness, prior, pi)
        self.concentration = self._concentration()

    @property
    def mean(self) -> Tensor:
        """E[a] = concentration / total."""
        each = self.concentration * ~self.hidden
        return each / each.sum(-1, keepdim=True).clamp(min=FLOOR)

    def _concentration(self) -> Tensor:
        return torch.addcmul(self.pi.new_tensor(FLOOR), self.sharpness, self.pi)

    def _log_s(self, ask: Ask | None) -> Tensor:
        laws = {"normal": torch.randn, "first": log_uniform, "second": log_uniform}
        noise = (_noise(ask, self.concentration, draw, name) for name, draw in laws.items())
        return log_draw(self.concentration, *noise)

    def _divergence(self) -> Tensor:
        a, b = self.concentration, self.prior
        a0, b0 = (self._over_keys(each).clamp(min=FLOOR) for each in (a, b))
        return (
            lgamma(a0) - lgamma(b0) - (a0 - b0) * digamma(a0)
            + self._over_keys(_excess(a, b))
        )  # fmt: skip


class Evidence(Dirichlet):
    """a ~ Dirichlet(softplus(s) + FLOOR): each query has a total of its own."""

    def _concentration(self) -> Tensor:
        return softplus(self.scores.masked_fill(self.hidden, 0.0)) + FLOOR


class Weibull(Law):
    """S_j ~ Weibull(shape k, mean pi_j), against S_j ~ Gamma(b_j, rate sum b): a ~ Dirichlet(b)."""

    def _log_s(self, ask: Ask | None) -> Tensor:
        k, log_pi = self.sharpness, self.log_pi
        noise = _noise(ask, log_pi, _log_exponential)
        return log_pi - lgamma(1 + 1 / k) + noise / k

    def _divergence(self) -> Tensor:
        log_scale = self.log_pi - lgamma(1 + 1 / self.sharpness)
        rate = self._over_keys(self.prior)[..., None].clamp(min=FLOOR)
        return self._over_keys(weibull_gamma(self.sharpness, log_scale, self.prior, rate))


class LogNormal(Law):
    """log S_j ~ N(log pi_j - sd^2 / 2, sd^2), sd = 1 / sharpness; E[S_j] = pi_j.

    The prior of log S_j is the Normal with the mean and variance that it has under
    S_j ~ Gamma(b_j, rate sum b).
    """

    def _log_s(self, ask: Ask | None) -> Tensor:
        sd, log_pi = 1 / self.sharpness, self.log_pi
        return log_pi - 0.5 * sd.square() + sd * _noise(ask, log_pi, torch.randn)

    def _divergence(self) -> Tensor:
        variance, b = self.sharpness**-2, self.prior
        total = self._over_keys(b)[..., None].clamp(min=FLOOR)
        loc, spread = digamma(b) - total.log(), trigamma(b)
        shift = self.log_pi - 0.5 * variance - loc
        ratio = variance / spread
        return self._over_keys(0.5 * (ratio + shift.square() / spread - 1 - ratio.log()))


LAWS: dict[str, type[Law]] = {
    "dirichlet": Dirichlet,
    "evidence": Evidence,
    "weibull": Weibull,
    "lognormal": LogNormal,
}
STARTS = {"dirichlet": 10.0, "evidence": 1.0, "weibull": 2.0, "lognormal": 1.0}


def weibull_gamma(k: Tensor, log_scale: Tensor, a: Tensor, rate: Tensor) -> Tensor:
    """KL(Weibull(k, scale) || Gamma(a, rate)), nats (Bauckhage 2014)."""
    euler = 0.5772156649015329
    return (
        euler * a / k - a * log_scale + k.log() + rate * (log_scale + lgamma(1 + 1 / k)).exp()
        - euler - 1 - a * rate.log() + lgamma(a)
    )  # fmt: skip


def _noise(ask: Ask | None, like: Tensor, draw: Draw, name: str = "weights") -> Tensor:
    return (draw(like.shape) if ask is None else ask(name, like.shape, draw)).to(like)


def _log_exponential(shape: Sequence[int]) -> Tensor:
    return (-log_uniform(shape)).log()


def _excess(a: Tensor, b: Tensor) -> Tensor:
    """(a - b) digamma(a) - log Gamma(a) + log Gamma(b), whose slope in a is (a - b) trigamma(a)."""
    with torch.no_grad():
        known = digamma(a)
        value = (a - b) * known - lgamma(a) + lgamma(b)
        of_a, of_b = (a - b) * trigamma(a), digamma(b) - known
    return sloped(value, (a, of_a), (b, of_b))
