"""Gauss-Newton: how the observed distribution's parameters move with s, row by row.

With theta its parameters, J their Jacobian in s and F = R R^T their Fisher information, the rows of
W = R^T J add up to the likelihood's part of the curvature, W^T W = sum over rows of J^T F J.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import jacrev, vjp, vmap

from bnn.errors import ModelError
from bnn.inference._fisher import information
from bnn.inference._joint import Joint
from bnn.observations import own_mask

_NUMBERS = 4_000_000  # of a Jacobian, or of what several backward passes hold, in memory at once


def _statement(joint: Joint, s: Tensor, batch: tuple[Any, ...]) -> Any:
    """The only observed statement of a run."""
    met = joint.run(s, batch)
    if len(met) != 1:
        raise ModelError(
            'hessian="ggn" knows models with one observed site, and this one states '
            f'{", ".join(m["name"] for m in met)} (factors count). Use hessian="exact".'
        )
    return met[0]


def theta_of(joint: Joint, s: Tensor, batch: tuple[Any, ...]) -> Tensor:
    """Parameters of the observed distribution, (row, cell, parameter); (1, ...) without rows."""
    message = _statement(joint, s, batch)
    return _by_row(information(message["fn"], message["name"]).theta, joint, 1)


def _by_row(tensor: Tensor, joint: Joint, more: int) -> Tensor:
    """(*cell, ...) -> (row, cell, ...), where `more` axes follow those of the cells."""
    axis, tail = joint.energy.sites.row_axis, tensor.shape[tensor.ndim - more :]
    if axis is None:
        return tensor.reshape(1, -1, *tail)
    return tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1, *tail)


def root_of(joint: Joint, s: Tensor, batch: tuple[Any, ...]) -> Tensor:
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


def whitened(joint: Joint, s: Tensor, batch: tuple[Any, ...]) -> Iterator[Tensor]:
    """W = R^T J of one batch, some rows of it at a time, (row*cell*parameter, size)."""
    root = root_of(joint, s, batch)
    rows, alone = _alone(batch)
    if _runs_by_row(joint, s, batch):

        def one(root: Tensor, *row: Tensor) -> Tensor:
            white = lambda s: (theta_of(joint, s, alone(row))[0, :, None] @ root).flatten()
            return jacrev(white)(s)

        each = root.shape[1] * root.shape[2] * len(s)  # numbers of a row
        step = max(1, _NUMBERS // max(each, 1))
        for first in range(0, len(root), step):
            part = slice(first, first + step)
            yield vmap(one)(root[part], *(arg[part] for arg in rows)).flatten(0, 1)
        return
    white = lambda s: (theta_of(joint, s, batch)[..., None, :] @ root).flatten()
    pull = transposed(white, s)
    for _, unit in units(root.shape[:3].numel(), len(s), s):
        yield each_of(pull, unit)


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
            whole = theta_of(joint, s, batch)
            one: Any = lambda *row: theta_of(joint, s, alone(row))[0]
            each = vmap(one)(*rows)
    except Exception:  # it states its number of rows, or cannot be lifted
        return False
    return each.shape == whole.shape and torch.allclose(each, whole, rtol=1e-3, atol=1e-5)


def transposed(function: Callable[[Tensor], Tensor], s: Tensor) -> Callable[[Tensor], Tensor]:
    """The transpose of a function's Jacobian at s."""
    pull: Any = vjp(function, s)[1]
    return lambda v: pull(v)[0]


def units(size: int, rows: int, like: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Unit vectors, some at a time, and the number of the first."""
    step = max(1, _NUMBERS // (8 * max(rows, size)))
    for first in range(0, size, step):
        unit = torch.zeros(min(step, size - first), size).to(like)
        unit.diagonal(first).fill_(1.0)
        yield first, unit


def each_of(function: Callable[[Tensor], Tensor], arguments: Tensor) -> Tensor:
    """A function of one vector at several, lifted where that is possible."""
    try:
        return vmap(function)(arguments)
    except Exception:  # what is really wrong is raised by the loop
        return torch.stack([function(argument) for argument in arguments])
