"""Gamma: logarithms of its draws, and its functions, in plain arithmetic on whole tensors.

Draws are quantiles of the noise they are given. Nothing is refused or looks at a number, so that a
step with them can be compiled; torch's own draws and functions go entry by entry.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_FAR = 6.0  # standard deviations of the noise, at which what lies beyond, 1 in 5e8, is held
# Of g ~ Gamma(1 / s, 1), s <= 1/2, log(g s) at the quantile where x is in N(0, 1): the sum over i
# and k of _FIT[k][i] (x sqrt(s))^i s^k. Least squares to SciPy's quantiles on a grid of Chebyshev
# nodes in x and s, weighted again and again towards the least maximum. Errors of log g are within
# 9e-7 at |x| < 4 and 4e-6 at 6, about what float32 rounds; those of its slope in s, which is the
# implicit derivative, within 3e-5 of it at |x| < 4 and 1e-4 at 5 (torch's: 1e-3).
_FIT = (
    (
        0.0, 0.999998655, -0.16667439, 0.0277869103, -0.00369270231, 0.000221342182,
        5.34850765e-05, -2.1853494e-05, 6.23425754e-06, -1.00816063e-06, -3.94053727e-07,
        1.87506246e-07, 4.99503408e-09, -1.05652338e-08, 9.61741477e-11, 2.84319144e-10,
        7.79952103e-12, -2.80432763e-12, -3.46507353e-13,
    ),
    (
        -0.333308197, 0.138850263, -0.0363403089, 0.00595271394, -0.000208629075, -0.000235408823,
        0.000142278543, -4.61765508e-05, -3.18640829e-06, 6.12702314e-06, -9.2158464e-07,
        -3.27710724e-07, 9.64866028e-08, 9.63276372e-09, -4.040669e-09, -1.49037102e-10,
        6.2609137e-11,
    ),
    (
        -0.0361487446, 0.0157458795, -0.0021818709, -0.00131394233, 0.00101878034, -0.000281845488,
        -6.20280118e-05, 5.02995536e-05, 9.75805169e-07, -3.43405284e-06, 4.10809721e-08,
        8.2561468e-08,
    ),
    (
        0.00282859284, -0.00369749949, 0.00204665976, -8.07178071e-05, -0.000216075765,
        3.75647624e-05,
    ),
)  # fmt: skip
# s d/ds of each term is (i / 2 + k) times it
_SLOPE = tuple(tuple((0.5 * i + k) * c for i, c in enumerate(row)) for k, row in enumerate(_FIT))


def log_uniform(shape: Sequence[int]) -> Tensor:
    """Logs of uniforms, of which torch rounds one in 2^24 to 0."""
    u = torch.rand(shape)
    return u.clamp(min=torch.finfo(u.dtype).eps / 4).log_()


def sloped(value: Tensor, *slopes: tuple[Tensor, Tensor]) -> Tensor:
    """The value, differentiable: pairs of a tensor and the value's derivative in it.

    An autograd.Function would do it too, but has no trace.
    """
    for x, slope in slopes:
        value = value + (x - x.detach()) * slope
    return value


def log_draw(a: Tensor, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Log g, g ~ Gamma(a, 1), of N(0, 1) noise x and two of `log_uniform`; pathwise in a.

    g = Gamma(a + 2) u^(1/a) v^(1/(a + 1)): its logarithm does not underflow at small a.
    """
    learning = torch.is_grad_enabled()
    with torch.no_grad():
        s = 1 / (a + 2)
        w = x.clamp(-_FAR, _FAR) * s.sqrt()
        first, second = first / a, second / (a + 1)
        value = _sum(_FIT, w, s) - s.log() + first + second
        if not learning:
            return value
        slope = s - s * _sum(_SLOPE, w, s) - first / a - second / (a + 1)
    return sloped(value, (a, slope))


def _sum(rows: Sequence[Sequence[float]], w: Tensor, s: Tensor) -> Tensor:
    """Over i and k, of rows[k][i] w^i s^k, by Horner's rule."""
    total: Any = 0.0
    for first, *rest, last in reversed(rows):
        each = w * last
        for c in reversed(rest):
            each = each.add_(c).mul_(w)
        total = each.add_(first).add_(total * s)
    return total


def lgamma(x: Tensor) -> Tensor:
    """Log Gamma(x) of positive numbers: Stirling's series at x + 4, within 2e-9 of it or of 1."""
    learning = torch.is_grad_enabled()
    with torch.no_grad():
        far, below = x + 4, x * (x + 3)
        r = 1 / far
        series = _horner(r * r, 1 / 12, -1 / 360, 1 / 1260, -1 / 1680) * r
        start = (x + 3.5) * far.log() - far + 0.5 * math.log(2 * math.pi)
        value = start + series - (below * (below + 2)).log()
        if not learning:
            return value
        slope = digamma(x)
    return sloped(value, (x, slope))


def digamma(x: Tensor) -> Tensor:
    """Of positive numbers: a series at x + 4, within 2e-9 of it or of 1."""
    far = x + 4
    r = 1 / far
    s = r * r
    series = s * _horner(s, 1 / 12, -1 / 120, 1 / 252, -1 / 240)
    return far.log() - 0.5 * r - series - _below(x)[0]


def trigamma(x: Tensor) -> Tensor:
    """Of positive numbers: a series at x + 4, within 2e-9 of it."""
    r = 1 / (x + 4)
    s = r * r
    series = 1 + 0.5 * r + s * _horner(s, 1 / 6, -1 / 30, 1 / 42, -1 / 30)
    return _below(x)[1] + r * series


def _horner(s: Tensor, first: float, *rest: float) -> Tensor:
    """The polynomial with these coefficients, lowest power first."""
    total: Any = rest[-1]
    for c in reversed(rest[:-1]):
        total = total * s + c
    return total * s + first


def _below(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of 1 / (x + i) and of their squares over i < 4.

    They are p' / p and (p' / p)^2 - p'' / p, p = x (x + 1) (x + 2) (x + 3): one division.
    """
    below = x * (x + 3)
    over = 1 / (below * (below + 2))
    first = (4 * x + 6) * (below + 1) * over
    return first, first * first - (12 * below + 22) * over
