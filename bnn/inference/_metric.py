"""Metric: a whitening of the posterior, from positions and gradients met in warmup.

For a Gaussian with covariance S the gradient has covariance S^-1, so that

    M^-1 = Cov(z) # Cov(gradient)^-1 = S,     A # B: the geometric mean of two matrices,

already from few draws; for other targets this M^-1 minimises the Fisher divergence to a Gaussian
(Seyboldt, Carlson, Carpenter 2024, Preconditioning Hamiltonian Monte Carlo by minimizing Fisher
divergence). Of a net, whose modes are mirror images, Cov(z) alone would be the width of all modes
together, far beyond that of the one a chain is in.
"""

import numpy as np

from bnn.inference._trajectory import Array, Metric

_CUTOFF = 2.0  # low rank keeps directions whose variance is beyond this factor after scaling
_DRAWS = 200  # that low rank looks at: their span holds its directions
_RIDGE = 1e-5


def unit(scale: Array) -> Metric:
    """A diagonal metric."""
    size = len(scale)
    return Metric(scale, np.zeros((0, size), scale.dtype), np.zeros(0, scale.dtype))


def estimated(kind: str, z: Array, gradient: Array, before: Metric) -> Metric:
    """The metric of some positions.

    Args:
        kind: "diagonal", "low_rank" or "dense".
        z: positions, (draw, size).
        gradient: there, (draw, size).
        before: whose scale is kept where the draws tell none.
    """
    if len(z) < 10:
        return before
    spread, slope = z.var(0, dtype=np.float64), gradient.var(0, dtype=np.float64)
    with np.errstate(all="ignore"):
        scale = (spread / slope) ** 0.25
    known = np.isfinite(scale) & (scale > 1e-10) & (scale < 1e10)
    scale = np.where(known, scale, before.scale)
    if kind == "diagonal":
        return unit(scale.astype(z.dtype))
    basis, gain = _directions(kind, z / scale, gradient * scale)
    return Metric(scale.astype(z.dtype), basis.astype(z.dtype), gain.astype(z.dtype))


def _directions(kind: str, x: Array, slope: Array) -> tuple[Array, Array]:
    """Orthonormal directions (k, size) and sd - 1 along each, of scaled positions and gradients."""
    x, slope = (a.astype(np.float64) - a.mean(0, dtype=np.float64) for a in (x, slope))
    count, size = x.shape
    whole = kind == "dense" and count >= 2 * size
    if whole:
        span = np.eye(size)
    else:
        few = np.linspace(0, count - 1, min(count, _DRAWS)).round().astype(int)
        x, slope = x[few], slope[few]
        span = np.linalg.svd(np.concatenate([x, slope]), full_matrices=False)[2].T  # (size, k)
    inside = span.shape[1]
    first, second = x @ span, slope @ span
    a = first.T @ first / len(first) + _RIDGE * np.eye(inside)
    b = second.T @ second / len(second) + _RIDGE * np.eye(inside)
    root = _power(b, 0.5)
    inverse = _power(b, -0.5)
    variances, vectors = np.linalg.eigh(inverse @ _power(root @ a @ root, 0.5) @ inverse)
    variances = np.maximum(variances, 1e-10)
    if kind == "low_rank":
        far = (variances > _CUTOFF) | (variances < 1 / _CUTOFF)
        variances, vectors = variances[far], vectors[:, far]
    return np.ascontiguousarray((span @ vectors).T), np.sqrt(variances) - 1


def _power(matrix: Array, exponent: float) -> Array:
    """Of a symmetric positive matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.maximum(values, 1e-12) ** exponent) @ vectors.T
