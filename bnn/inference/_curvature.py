"""Curvature: minus the Hessian of the log joint at a point, or what stands for it.

    exact   H = -d2 log p(data, s) / ds2
    ggn     H = sum over rows of J^T F J - d2 log p(s) / ds2

J is the Jacobian in s of all parameters theta of the observed distribution (mean and scale, logits,
...), F their Fisher information: the generalised Gauss-Newton matrix, which has the curvature of
the likelihood in theta and leaves out that of theta in s. The prior's part is exact in both. With
F = R R^T the rows of W = R^T J add up to the first part as W^T W.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jacrev, vjp, vmap

from bnn.errors import FitError, ModelError
from bnn.inference._fisher import information
from bnn.inference._joint import Joint
from bnn.inference._layers import LinearMap, Rewired
from bnn.inference._precision import Dense, Diagonal, Kronecker, NotPositive, Precision
from bnn.observations import own_mask

_NUMBERS = 4_000_000  # of a Jacobian, or of what several backward passes hold, in memory at once
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
        prior = prior_curvature(joint, s, structure == "diag")
        matrix = _gauss_newton(joint, s, structure == "diag") + _like(prior, structure)
    _check_finite(joint, matrix)
    block = Diagonal(matrix) if structure == "diag" else Dense(matrix)
    return Precision([(everything, block)])


def _like(prior: Tensor, structure: str) -> Tensor:
    return prior.diag() if structure == "full" and prior.ndim == 1 else prior


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
    total: Any = 0.0
    rows = 0
    for batch in joint.batches():
        rows += len(batch[-1])
        part = _hessian(lambda s, b=batch: joint.likelihood(s, b), s, diagonal, len(batch[-1]))
        total = total + len(batch[-1]) * part
    prior = prior_curvature(joint, s, diagonal)
    return _like(prior, "diag" if diagonal else "full") - total / rows


def prior_curvature(joint: Joint, s: Tensor, diagonal: bool) -> Tensor:
    """Minus the Hessian of the log prior: its diagonal where it has no more, or where asked for."""
    batch = joint.first
    slope = grad(lambda s: joint.prior(s, batch))
    pull = _transposed(slope, s)
    generator = torch.Generator().manual_seed(0)
    probe = 1 + torch.rand(len(s), generator=generator, dtype=s.dtype)
    ones, other = map(pull, (torch.ones_like(s), probe))
    # H 1 is the diagonal of H where H has nothing else, and then H v = diagonal v for any v
    if torch.allclose(ones * probe, other, rtol=1e-4, atol=1e-6 * float(ones.abs().max() + 1e-30)):
        return -ones.double()
    return -_hessian(lambda s: joint.prior(s, batch), s, diagonal, len(batch[-1]))


def _hessian(function: Callable[[Tensor], Tensor], s: Tensor, diagonal: bool, rows: int) -> Tensor:
    """The Hessian or its diagonal, float64, several columns at a time."""
    pull = _transposed(grad(function), s)
    parts = []
    for first, unit in _units(len(s), rows, s):
        columns = _each(pull, unit).double()
        parts.append(columns.diagonal(first) if diagonal else columns)
    matrix = torch.cat(parts)
    return matrix if diagonal else (matrix + matrix.T) / 2


def _transposed(function: Callable[[Tensor], Tensor], s: Tensor) -> Callable[[Tensor], Tensor]:
    """The transpose of a function's Jacobian at s."""
    pull: Any = vjp(function, s)[1]
    return lambda v: pull(v)[0]


def _units(size: int, rows: int, like: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Unit vectors, some at a time, and the number of the first."""
    step = max(1, _NUMBERS // (8 * max(rows, size)))
    for first in range(0, size, step):
        unit = torch.zeros(min(step, size - first), size).to(like)
        unit.diagonal(first).fill_(1.0)
        yield first, unit


def _each(function: Callable[[Tensor], Tensor], arguments: Tensor) -> Tensor:
    """A function of one vector at several, lifted where that is possible."""
    try:
        return vmap(function)(arguments)
    except Exception:  # what is really wrong is raised by the loop
        return torch.stack([function(argument) for argument in arguments])


def _gauss_newton(joint: Joint, s: Tensor, diagonal: bool) -> Tensor:
    """Sum over rows of J^T F J, or its diagonal."""
    total = torch.zeros(len(s) if diagonal else (len(s), len(s)), dtype=torch.float64)
    rows = 0
    for batch in joint.batches():
        rows += len(batch[-1])
        for part in _whitened(joint, s, batch):
            part = part.double()
            total += part.square().sum(0) if diagonal else part.T @ part
    return total * (joint.data.rows / rows)


def _statement(joint: Joint, s: Tensor, batch: tuple[Any, ...]) -> Any:
    """The only observed statement of a run."""
    met = joint.run(s, batch)
    if len(met) != 1:
        raise ModelError(
            'hessian="ggn" knows models with one observed site, and this one states '
            f'{", ".join(m["name"] for m in met)} (factors count). Use hessian="exact".'
        )
    return met[0]


def _theta(joint: Joint, s: Tensor, batch: tuple[Any, ...]) -> Tensor:
    """Parameters of the observed distribution, (row, cell, parameter); (1, ...) without rows."""
    message = _statement(joint, s, batch)
    return _by_row(information(message["fn"], message["name"]).theta, joint, 1)


def _by_row(tensor: Tensor, joint: Joint, more: int) -> Tensor:
    """(*cell, ...) -> (row, cell, ...), where `more` axes follow those of the cells."""
    axis, tail = joint.energy.sites.row_axis, tensor.shape[tensor.ndim - more :]
    if axis is None:
        return tensor.reshape(1, -1, *tail)
    return tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1, *tail)


def _root(joint: Joint, s: Tensor, batch: tuple[Any, ...]) -> Tensor:
    """A root of each cell's information times what it counts, (row, cell, parameter, parameter)."""
    message = _statement(joint, s, batch)
    found = information(message["fn"], message["name"])
    weight, event = torch.as_tensor(message["scale"]), message["fn"].event_dim
    if message["mask"] is not None:
        weight = weight * message["mask"]
    weight = weight.reshape((*weight.shape, *[1] * event)).expand(message["fn"].shape())
    own = own_mask(message["fn"])
    weight = weight if own is None else weight * own
    root = found.root * weight.to(found.root).sqrt()[..., None, None]
    return _by_row(root, joint, 2).detach()


def check_held(joint: Joint, s: Tensor) -> None:
    """Refuses a model whose free sites move a parameter that the information takes as constant.

    Raises:
        ModelError: names it.
    """
    with torch.enable_grad():
        s = s.detach().requires_grad_()
        message = _statement(joint, s, joint.first)
        for name, value in information(message["fn"], message["name"]).held.items():
            if not value.requires_grad:
                continue
            (slope,) = torch.autograd.grad(value.sum(), s, retain_graph=True, allow_unused=True)
            if slope is not None and slope.any():
                site, _ = joint.name(int(slope.abs().argmax()))
                raise ModelError(
                    f'hessian="ggn" takes {name} of "{message["name"]}" as given, and the site '
                    f'"{site}" moves it. Use hessian="exact".'
                )


def _whitened(joint: Joint, s: Tensor, batch: tuple[Any, ...]) -> Iterator[Tensor]:
    """W = R^T J of one batch, some rows of it at a time, (row*cell*parameter, size)."""
    root = _root(joint, s, batch)
    rows, alone = _alone(batch)
    if _runs_by_row(joint, s, batch):

        def one(root: Tensor, *row: Tensor) -> Tensor:
            white = lambda s: (_theta(joint, s, alone(row))[0, :, None] @ root).flatten()
            return jacrev(white)(s)

        each = root.shape[1] * root.shape[2] * len(s)  # numbers of a row
        step = max(1, _NUMBERS // max(each, 1))
        for first in range(0, len(root), step):
            part = slice(first, first + step)
            yield vmap(one)(root[part], *(arg[part] for arg in rows)).flatten(0, 1)
        return
    white = lambda s: (_theta(joint, s, batch)[..., None, :] @ root).flatten()
    pull = _transposed(white, s)
    for _, unit in _units(root.shape[:3].numel(), len(s), s):
        yield _each(pull, unit)


def _alone(
    batch: tuple[Any, ...],
) -> tuple[list[Tensor], Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]]:
    """The arguments that have rows, and what makes of one row of each the arguments of a run."""
    moving = [i for i, arg in enumerate(batch) if arg.ndim]

    def alone(row: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        given = dict(zip(moving, row, strict=True))
        return tuple(given[i][None] if i in given else arg for i, arg in enumerate(batch))

    return [batch[i] for i in moving], alone


def _runs_by_row(joint: Joint, s: Tensor, batch: tuple[Any, ...]) -> bool:
    """True if a run on one row, lifted over the rows, shows what a run on all of them shows."""
    sites = joint.energy.sites
    if sites.plate is None or sites.row_axis is None or sites.locals:
        return False
    rows, alone = _alone(batch)
    try:
        with torch.no_grad():
            whole = _theta(joint, s, batch)
            one: Any = lambda *row: _theta(joint, s, alone(row))[0]
            each = vmap(one)(*rows)
    except Exception:  # it states its number of rows, or cannot be lifted
        return False
    return each.shape == whole.shape and torch.allclose(each, whole, rtol=1e-3, atol=1e-5)


def _kronecker(joint: Joint, s: Tensor) -> Precision:
    """A Kronecker block for each linear map of free sites, one more block for the rest.

    H = 1/M sum_m a a^T x sum_m g g^T + prior, where m runs over the M inputs a of the layer (rows,
    and the places of a convolution), g are the gradients of its output that the rows of W pass
    back, and a bias is one more input, 1 (Martens and Grosse 2015; Ritter et al. 2018). The prior's
    curvature is averaged over the outputs, which is exact where each input has one prior scale.
    What a weight does outside of its linear maps is not seen.
    """
    prior = prior_curvature(joint, s, True)
    blocks, rest = [], torch.ones(len(s), dtype=torch.bool)
    for factors in _factors(joint, s).values():
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


class _Factors:
    """The two Kronecker factors of a layer, added up."""

    def __init__(self, entries: Tensor):
        self.entries = entries  # of s, (output, input), a bias last
        outputs, inputs = entries.shape
        self.outputs = torch.zeros(outputs, outputs, dtype=torch.float64)
        self.inputs = torch.zeros(inputs, inputs, dtype=torch.float64)
        self.count = 0


class _Probed:
    """A rule that adds 0 to the output of a layer, to take the gradient in."""

    def __init__(self) -> None:
        self.met: list[tuple[LinearMap, Tensor]] = []

    def __call__(self, found: LinearMap) -> Tensor:
        out = found()
        self.met.append((found, torch.zeros_like(out).requires_grad_()))
        return out + self.met[-1][1]


def _factors(joint: Joint, s: Tensor) -> dict[str, _Factors]:
    """Of every linear map whose weight is a free site, by that site."""
    factors: dict[str, _Factors] = {}
    rows = 0
    for batch in joint.batches():
        rows += len(batch[-1])
        root = _root(joint, s, batch)
        probed = _Probed()
        with torch.enable_grad(), Rewired({slot.name: probed for slot in joint.slots}):
            white = _theta(joint, s, batch)[..., None, :] @ root  # (row, cell, 1, parameter)
            white = white.flatten(1).sum(0)
        kept = []
        for found, probe in probed.met:
            entries = entries_of(joint, found)
            if entries is None:
                continue
            kept.append((found, probe))
            at = factors.setdefault(found.site, _Factors(entries))
            others = [f.entries for site, f in factors.items() if site != found.site]
            if not torch.equal(at.entries, entries) or any(
                torch.isin(entries, other).any() for other in others
            ):
                raise ModelError(
                    f'structure="kron" has one block for a weight with its bias, and "{found.site}"'
                    " is used in two ways (transposed, or with another bias), or its bias with "
                    'another weight too. Use structure="full" or "diag".'
                )
            a = _inputs(found, entries.shape[1]).double()
            at.inputs += a.T @ a
            at.count += len(a)
        for value in white if kept else ():
            slopes = torch.autograd.grad(
                value, [probe for _, probe in kept], retain_graph=True, allow_unused=True
            )
            for (found, _), slope in zip(kept, slopes, strict=True):
                if slope is not None:
                    g = _outputs(found, slope).double()
                    factors[found.site].outputs += g.T @ g
    for each in factors.values():
        each.outputs *= joint.data.rows / rows
    return factors


def entries_of(joint: Joint, found: LinearMap) -> Tensor | None:
    """Where a layer's weight and bias lie in s, (output, input), a bias last.

    None for a layer without Kronecker factors here: groups, a transposed convolution, a product
    with a stack of matrices, a weight that is not any real number.
    """
    slot = joint.slot(found.site)
    plain = found.groups == 1 and (found.axis == 1 if found.places else found.weight.ndim <= 2)
    if slot is None or not slot.real or not plain:
        return None
    place = joint.index.new_zeros(joint.energy.size)
    place[joint.index] = torch.arange(len(joint.index))
    entries = place[slot.span].reshape(slot.free)
    by_hand = found.axis == 0  # (input,) or (input, output)
    entries = entries.reshape(len(entries), -1).T if by_hand else entries.flatten(1)
    bias = None if found.bias is None else joint.slot(found.bias)
    if bias is not None and bias.real and bias.size == len(entries):
        entries = torch.cat([entries, place[bias.span][:, None]], 1)
    return entries


def _inputs(found: LinearMap, inputs: int) -> Tensor:
    """What a layer is given, (row and place, input), with a 1 for a bias."""
    x = found.x.detach()
    if found.places:  # a convolution whose outputs are its patches
        patch = found.weight.shape[1:]
        unit = torch.eye(patch.numel()).to(x).reshape(-1, *patch)
        x = found.apply(x, unit).movedim(-1 - found.places, -1)
    x = x.reshape(-1, x.shape[-1])
    return torch.cat([x, x.new_ones(len(x), 1)], 1) if inputs > x.shape[1] else x


def _outputs(found: LinearMap, slope: Tensor) -> Tensor:
    """Gradients of a layer's output, (row and place, output)."""
    if found.places:
        slope = slope.movedim(-1 - found.places, -1)
    vector = found.weight.ndim == 1
    return slope.reshape(-1, 1 if vector else slope.shape[-1])
