"""Attention whose scores and weights are seams; weights that a softmax gives, or a Dirichlet."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

_FLOOR = 1e-2  # of a concentration: 1 / concentration is in the gradient of its log density


@dataclass(frozen=True)
class UniformAttention:
    """weights ~ Dirichlet(concentration / n), n the number of keys that the query may see.

    Attributes:
        concentration: total, over all keys. At n every vector of weights is equally likely; below,
            few keys have most of the weight; above, weights come near 1 / n.

    Example:
        >>> from bnn.models import transformer_classification
        >>> prior = UniformAttention(concentration=6.0)
        >>> model = transformer_classification(6, 2, vocabulary=10, layers=1, attention=prior)
    """

    concentration: float = 10.0

    def __post_init__(self) -> None:
        _check_positive(self, concentration=self.concentration)


@dataclass(frozen=True)
class ContextualAttention:
    """weights ~ Dirichlet(concentration softmax_j(g(key_j))), the same for all queries of a row.

    g is a net of each head, key -> hidden ReLU units -> 1, whose weights have the prior of all
    others: the data may tell which keys matter whoever asks.

    Attributes:
        concentration: total, over all keys.
        hidden: units of g.

    References:
        Fan et al. (2020), Bayesian attention modules, section 3.3, with Gamma distributions.

    Example:
        >>> from bnn.models import transformer_classification
        >>> prior = ContextualAttention(concentration=5.0)
        >>> model = transformer_classification(6, 2, vocabulary=10, layers=1, attention=prior)
    """

    concentration: float = 10.0
    hidden: int = 10

    def __post_init__(self) -> None:
        _check_positive(self, concentration=self.concentration)
        if isinstance(self.hidden, bool) or not isinstance(self.hidden, int) or self.hidden < 1:
            raise ValueError(
                f"ContextualAttention(hidden={self.hidden!r}): pass a whole number of at least 1."
            )


AttentionPrior = Literal["softmax"] | UniformAttention | ContextualAttention


class Attention(nn.Module):
    """Attention of several heads: each token is a query to all tokens that it may see.

        score_ij = query_i . key_j / sqrt(dim),    out_i = sum_j weight_ij value_j

    Seams, for layer N: "attention.N.keys" (row, head, key, dim), "attention.N.scores" (row, head,
    query, key), -inf where the query may not see the key, and "attention.N.weights" of the same
    shape: softmax(scores), or a latent site. A query that sees no key attends to nothing: zeros.

    Args:
        width: of the tokens.
        heads: their number, a divisor of the width.
        number: of the layer.
        prior: "softmax", or a prior that makes the weights a latent site. The site is a Dirichlet
            over all keys; the net goes on with its part on the keys that the query sees, in
            proportion, which is again a Dirichlet.
    """

    def __init__(self, width: int, heads: int, number: int, prior: AttentionPrior = "softmax"):
        super().__init__()
        self.heads, self.seam, self.prior = heads, f"attention.{number}", prior
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        if isinstance(prior, ContextualAttention):
            dim = width // heads
            first = [nn.Linear(dim, prior.hidden) for _ in range(heads)]
            second = [nn.Linear(prior.hidden, 1, bias=False) for _ in range(heads)]
            pairs = zip(first, second, strict=True)
            self.context = nn.ModuleList(nn.Sequential(a, nn.ReLU(), b) for a, b in pairs)

    def forward(self, h: Tensor, seen: Tensor) -> Tensor:
        """Tokens (row, token, width) to the same shape; seen (row, 1, query, key) or (query, key).

        True in `seen` lets the query see the key.
        """
        split = lambda x: x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)
        query, keys, value = (split(f(h)) for f in (self.query, self.key, self.value))
        keys = self._announced("keys", keys)  # (row, head, key, dim)
        scores = query @ keys.transpose(-1, -2) / math.sqrt(keys.shape[-1])
        scores = self._announced("scores", scores.masked_fill(~seen, -math.inf))
        mixed = self._weights(scores, keys) @ value  # (row, head, query, dim)
        return self.out(mixed.transpose(-3, -2).flatten(-2))

    def _weights(self, scores: Tensor, keys: Tensor) -> Tensor:
        if self.prior == "softmax":
            return self._announced("weights", softmax(scores))
        fn = _Dirichlet(self._concentration(scores, keys))
        drawn = pyro.sample(f"{self.seam}.weights", fn.to_event(2))
        part = drawn * (scores != -math.inf)
        return part / part.sum(-1, keepdim=True).clamp(min=torch.finfo(part.dtype).tiny)

    def _concentration(self, scores: Tensor, keys: Tensor) -> Tensor:
        """Of each key, (row, head, query, key); where the query sees none it is without effect."""
        total = self.prior.concentration  # type: ignore[union-attr]
        said = torch.zeros_like(scores)
        if isinstance(self.prior, ContextualAttention):
            heads = [net(keys[..., i, :, :])[..., 0] for i, net in enumerate(self.context)]
            said = said + torch.stack(heads, -2)[..., None, :]
        share = softmax(said.masked_fill(scores == -math.inf, -math.inf))
        return torch.where(scores == -math.inf, 1.0, total * share).clamp(min=_FLOOR)

    def _announced(self, name: str, value: Tensor) -> Tensor:
        return pyro.deterministic(f"{self.seam}.{name}", value, event_dim=max(value.ndim - 1, 1))


def softmax(scores: Tensor) -> Tensor:
    """Over the last axis; exactly 0 where the score is -inf, and wherever all of them are."""
    hidden = scores == -math.inf
    lowest = torch.finfo(scores.dtype).min
    return torch.softmax(scores.masked_fill(hidden, lowest), -1) * ~hidden


class _Dirichlet(dist.Dirichlet):  # pyright: ignore[reportGeneralTypeIssues]
    """A Dirichlet whose draws do not underflow, and that `torch.func.vmap` can draw from."""

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Gammas in proportion: Gamma(a) has the law of Gamma(a + 1) u^(1/a), u uniform."""
        a = self.concentration.expand(self._extended_shape(torch.Size(sample_shape)))
        u = torch.rand_like(a).clamp(min=torch.finfo(a.dtype).tiny)
        gamma: Any = torch._standard_gamma(a + 1)  # pyright: ignore
        return torch.softmax(gamma.log() + u.log() / a, -1)


def _check_positive(prior: object, **settings: float) -> None:
    for name, value in settings.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and 0 < value < math.inf):
            raise ValueError(f"{type(prior).__name__}({name}={value!r}): pass a positive number.")
