"""Curvature: minus the Hessian of the log joint at a point, or what stands for it.

    exact   H = -d2 log p(data, s) / ds2
    ggn     H = sum over rows of J^T F J - d2 log p(s) / ds2

J is the Jacobian in s of all parameters theta of the observed distribution (mean and scale, logits,
...), F their Fisher information: the generalised Gauss-Newton matrix, which has the curvature of
the likelihood in theta and leaves out that of theta in s. The prior's part is exact in both.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad

from bnn.errors import FitError, ModelError
from bnn.inference._factors import factors_of
from bnn.inference._joint import Joint
from bnn.inference._precision import Dense, Diagonal, Kronecker, NotPositive, Precision
from bnn.inference._whitened import each_of, transposed, units, whitened

_BLOCK = 1_000  # entries that no linear map explains and still share a dense block, under "kron"


def curvature(joint: Joint, s: Tensor, structure: str, hessian: str) -> Precision:
    """The precision of the Gaussian at s.

    Args:
        joint: the log joint.
        s: where, (size,).
        structure: "full", "diag" or "kron".
        hessian: "ggn" or "exact".

    Raises:
        NotPositive: it is none.
        ModelError: the model lacks what the structure needs.
        FitError: it is not finite.
    """
    everything = torch.arange(len(s))
    if structure == "kron":
        return _kronecker(joint, s)
    if hessian == "exact":
        matrix = _exact(joint, s, structure == "diag")
    else:
        matrix = _gauss_newton(joint, s, structure == "diag")
        _add(matrix, prior_curvature(joint, s, structure == "diag"))
    _check_finite(joint, matrix)
    block = Diagonal(matrix) if structure == "diag" else Dense(matrix)
    return Precision([(everything, block)])


def _add(matrix: Tensor, prior: Tensor) -> None:
    """Adds the prior's part in place: a second matrix would be the largest thing in memory."""
    (matrix if prior.ndim == matrix.ndim else matrix.diagonal()).add_(prior)


def _check_finite(joint: Joint, matrix: Tensor) -> None:
    bad = ~torch.isfinite(matrix)
    if bad.any():
        site, place = joint.name(int(bad.nonzero()[0, 0]))
        raise FitError(
            f'The curvature of the log joint is not finite at entry {place} of "{site}". Rescale '
            "the data, or replace what has no second derivative there.",
            site=site,
        )


def _exact(joint: Joint, s: Tensor, diagonal: bool) -> Tensor:
    """Minus the Hessian, (size, size) or its diagonal."""
    total = torch.zeros(len(s) if diagonal else (len(s), len(s)), dtype=torch.float64)
    rows = 0
    for batch in joint.batches():
        rows += len(batch[-1])
        part = _hessian(lambda s, b=batch: joint.likelihood(s, b), s, diagonal, len(batch[-1]))
        total.sub_(part, alpha=len(batch[-1]))
        del part
    _add(total.div_(rows), prior_curvature(joint, s, diagonal))
    return total


def prior_curvature(joint: Joint, s: Tensor, diagonal: bool) -> Tensor:
    """Minus the Hessian of the log prior: its diagonal where it has no more, or where asked for."""
    batch = joint.first
    slope = grad(lambda s: joint.prior(s, batch))
    pull = transposed(slope, s)
    generator = torch.Generator().manual_seed(0)
    probe = 1 + torch.rand(len(s), generator=generator, dtype=s.dtype)
    ones, other = map(pull, (torch.ones_like(s), probe))
    # H 1 is the diagonal of H where H has nothing else, and then H v = diagonal v for any v
    if torch.allclose(ones * probe, other, rtol=1e-4, atol=1e-6 * float(ones.abs().max() + 1e-30)):
        return -ones.detach().double()  # trainable tensors without a prior are no part of it
    return -_hessian(lambda s: joint.prior(s, batch), s, diagonal, len(batch[-1]))


def _hessian(function: Callable[[Tensor], Tensor], s: Tensor, diagonal: bool, rows: int) -> Tensor:
    """The Hessian or its diagonal, float64, several columns at a time."""
    pull = transposed(grad(function), s)
    matrix = torch.empty(len(s) if diagonal else (len(s), len(s)), dtype=torch.float64)
    for first, unit in units(len(s), rows, s):
        columns = each_of(pull, unit).detach()
        matrix[first : first + len(unit)] = columns.diagonal(first) if diagonal else columns
    return matrix if diagonal else matrix.add_(matrix.T.clone()).div_(2)


def _gauss_newton(joint: Joint, s: Tensor, diagonal: bool) -> Tensor:
    """Sum over rows of J^T F J, or its diagonal."""
    total = torch.zeros(len(s) if diagonal else (len(s), len(s)), dtype=torch.float64)
    rows = 0
    for batch in joint.batches():
        rows += len(batch[-1])
        for part in whitened(joint, s, batch):
            part = part.double()
            if diagonal:
                total += part.square().sum(0)
            else:
                total.addmm_(part.T, part)
    return total.mul_(joint.data.rows / rows)


def _kronecker(joint: Joint, s: Tensor) -> Precision:
    """A Kronecker block for each linear map of free sites, one more block for the rest.

    The prior's curvature is averaged over the outputs, which is exact where each input has one
    prior scale.
    """
    prior = prior_curvature(joint, s, True)
    blocks, rest = [], torch.ones(len(s), dtype=torch.bool)
    for factors in factors_of(joint, s).values():
        entries = factors.entries
        rest[entries.flatten()] = False
        at_inputs = prior[entries].mean(0)
        if (at_inputs <= 0).any():
            site, _ = joint.name(int(entries[0, 0]))
            raise ModelError(
                f'structure="kron" divides by the curvature of the prior of "{site}", and that is '
                f"{float(at_inputs.min()):.3g} at the mode (a Normal prior has 1 / scale^2). Use "
                'structure="full" or "diag".'
            )
        _check_finite(joint, factors.outputs.sum() + factors.inputs.sum() + prior)
        inputs = factors.inputs / factors.count
        blocks.append((entries.flatten(), Kronecker(factors.outputs, inputs, at_inputs)))
    others = rest.nonzero().flatten()
    if len(others):
        names = list({joint.name(int(entry))[0] for entry in others})
        small = joint.held(s, names)
        try:
            inner = curvature(small, small.start, block_of_rest(len(others)), "ggn")
        except NotPositive as error:
            direction = torch.zeros(len(s), dtype=torch.float64)
            direction[others] = error.direction.double()
            raise NotPositive(error.value, direction) from None
        blocks.append((others, inner.blocks[0][1]))
    return Precision(blocks)


def block_of_rest(size: int) -> str:
    """The structure of the block of so many entries that no linear map explains, under "kron"."""
    return "full" if size <= _BLOCK else "diag"
