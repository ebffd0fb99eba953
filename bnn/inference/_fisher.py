"""Fisher: the information that one observation carries about its distribution's parameters.

F = E_y[-d2 log p(y | theta) / d theta2] = root root^T, closed forms. It does not depend on y, is
never negative, and equals the Hessian where theta is the natural parameter (Martens 2020).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributions as td
from torch import Tensor

from bnn.errors import ModelError
from bnn.observations import innermost


@dataclass(frozen=True)
class Information:
    """Of every cell (a row, or an entry of a row that is a vector).

    Attributes:
        theta: the parameters, (*cell, parameter).
        root: a square root of F, (*cell, parameter, parameter).
        held: parameters that F takes for constants, with names.
    """

    theta: Tensor
    root: Tensor
    held: dict[str, Tensor]


def information(fn: Any, site: str) -> Information:
    """The Fisher information of the distribution of an observed site.

    Raises:
        ModelError: no closed form is known.
    """
    base = innermost(fn)
    parts = next((make for family, make in _FAMILIES.items() if isinstance(base, family)), None)
    if parts is None:
        raise ModelError(
            f'hessian="ggn" needs the Fisher information of "{site}", and that of '
            f"{type(base).__name__} has no closed form here. Known are "
            f'{", ".join(f.__name__ for f in _FAMILIES)}. Use hessian="exact".'
        )
    theta, root, held = parts(base)
    cell, size = fn.shape(), theta.shape[-1]
    return Information(theta.expand(*cell, size), root.expand(*cell, size, size), held)


def _diagonal(*roots: Tensor) -> Tensor:
    return torch.stack(torch.broadcast_tensors(*roots), -1).diag_embed()


def _stack(*parameters: Tensor) -> Tensor:
    return torch.stack(torch.broadcast_tensors(*parameters), -1)


def _location_scale(at_loc: float, at_scale: float, *held: str) -> Callable[[Any], tuple]:
    """F = diag(at_loc, at_scale) / scale^2."""

    def parts(fn: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        roots = math.sqrt(at_loc) / fn.scale, math.sqrt(at_scale) / fn.scale
        return _stack(fn.loc, fn.scale), _diagonal(*roots), {k: getattr(fn, k) for k in held}

    return parts


def _student(fn: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Lange, Little, Taylor (1989), appendix B, at fixed degrees of freedom."""
    share = fn.df / (fn.df + 3)
    roots = ((fn.df + 1) / (fn.df + 3)).sqrt() / fn.scale, (2 * share).sqrt() / fn.scale
    return _stack(fn.loc, fn.scale), _diagonal(*roots), {"df": fn.df}


def _binary(fn: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    count = fn.total_count if isinstance(fn, td.Binomial) else torch.ones_like(fn.logits)
    spread = count * torch.sigmoid(fn.logits) * torch.sigmoid(-fn.logits)
    held = {"total_count": count} if isinstance(fn, td.Binomial) else {}
    return fn.logits[..., None], _diagonal(spread.sqrt()), held


def _categorical(fn: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """diag(p) - p p^T = R R^T with R = diag(sqrt p) - p sqrt(p)^T."""
    root = fn.probs.sqrt()
    return fn.logits, root.diag_embed() - fn.probs[..., :, None] * root[..., None, :], {}


def _negative_binomial(fn: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    spread = fn.total_count * torch.sigmoid(fn.logits)
    return fn.logits[..., None], _diagonal(spread.sqrt()), {"total_count": fn.total_count}


def _rate(fn: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """In log(rate): the rate itself for counts, 1 for the time between them."""
    spread = torch.ones_like(fn.rate) if isinstance(fn, td.Exponential) else fn.rate
    return fn.rate.log()[..., None], _diagonal(spread.sqrt()), {}


def _gamma(fn: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    shape, rate = torch.broadcast_tensors(fn.concentration, fn.rate)
    rows = _stack(torch.polygamma(1, shape), -1 / rate), _stack(-1 / rate, shape / rate**2)
    return _stack(shape, rate), torch.linalg.cholesky(torch.stack(rows, -2)), {}


def _beta(fn: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    first, second = torch.broadcast_tensors(fn.concentration1, fn.concentration0)
    both, own = torch.polygamma(1, first + second), [torch.polygamma(1, c) for c in (first, second)]
    rows = _stack(own[0] - both, -both), _stack(-both, own[1] - both)
    return _stack(first, second), torch.linalg.cholesky(torch.stack(rows, -2)), {}


_FAMILIES: dict[Any, Callable[[Any], tuple[Tensor, Tensor, dict[str, Tensor]]]] = {
    td.Normal: _location_scale(1, 2),
    td.LogNormal: _location_scale(1, 2),
    td.Laplace: _location_scale(1, 1),
    td.StudentT: _student,
    td.Bernoulli: _binary,
    td.Binomial: _binary,
    td.Categorical: _categorical,
    td.NegativeBinomial: _negative_binomial,
    td.Poisson: _rate,
    td.Exponential: _rate,
    td.Gamma: _gamma,
    td.Beta: _beta,
}
