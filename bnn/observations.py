"""Observations: their shape and values against the distribution that is to produce them."""

import warnings
from dataclasses import replace
from typing import Any

import torch
import torch.distributions as td
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import lazy_property

from bnn.data import Data, shape_of
from bnn.errors import DataError, DataWarning, ModelError, outside

_ROUNDING = 1e-3  # a parameter so far outside of its range may have been rounded there


def check_shape(site: Any, data: Data, frame: Any) -> None:
    """Refuses a value of another shape than its distribution states: nothing may broadcast.

    Args:
        site: the observed site of a trace: its name, fn, value and plates.
        data: the model's arguments.
        frame: the data plate, or None.

    Raises:
        DataError: the observations have another shape.
        ModelError: the row is not the first axis, or a plate has another size.
    """
    name, fn, value = site["name"], site["fn"], site["value"]
    stated, found = tuple(fn.shape()), tuple(value.shape)
    if frame is not None and frame.full_size and frame.full_size != frame.size:
        return _check_subsampled(site, data, frame)
    y = f'"{data.names[-1]}"'
    if stated == found and (len(data.observations) == found[0] if found else False):
        return None
    if stated == found:
        raise ModelError(
            f'The observed site "{name}" has shape {sizes_of(fn, stated)} and {y} has '
            f"{shape_of(data.observations)}: the row must be "
            f"its first axis. Observe it as it is, obs={data.names[-1]}."
        )
    for other in site.get("cond_indep_stack", ()) if frame is None else ():
        if stated[:1] == (other.size,):
            raise ModelError(
                f'The plate "{other.name}" around "{name}" has size {other.size} and the data '
                f"have {len(data.observations)} rows. Give it their number: "
                f'pyro.plate("{other.name}", len({data.names[0]})).'
            )
    cure = "Make the two shapes equal: broadcasting would count rows many times over."
    if not stated:
        cure = f'Put it in a plate: with pyro.plate("data", len({data.names[0]})).'
    elif len(found) == 2 and found[1] == 1:
        column = data.columns.get(data.names[-1])
        first = f'["{column[0]}"]' if column else "[:, 0]"
        cure = f"Pass {data.names[-1]}{first}, or keep the last axis of f and use .to_event(1)."
    elif is_categorical(fn) and len(found) == len(stated) + 1:
        cure = f"Pass class indices in place of one-hot rows: {data.names[-1]}.argmax(-1)."
    elif len(stated) == 2 and len(found) == 1 and stated[0] == found[0]:
        cure = "Drop the last axis of the network's output: f = net(x)[:, 0] or .squeeze(-1)."
    elif found[:1] == (1,) and stated[:1] != (1,):
        cure = f"Pass one observation for each of the {stated[0]} rows."
    raise DataError(
        f'The observed site "{name}" has shape {sizes_of(fn, stated)} and its observations {y} '
        f"have {shape_of(value)}. {cure}"
    )


def sizes_of(fn: Any, shape: tuple[int, ...]) -> str:
    """A distribution's shape with its axes named: `(batch=60, event=2)`."""
    batch = len(fn.batch_shape)
    axes = [f"batch={s}" for s in shape[:batch]] + [f"event={s}" for s in shape[batch:]]
    return "(" + ", ".join(axes) + ")"


def _check_subsampled(site: Any, data: Data, frame: Any) -> None:
    stated, found = tuple(site["fn"].shape()), tuple(site["value"].shape)
    if stated != found:
        raise ModelError(
            f'The observed site "{site["name"]}" has shape {sizes_of(site["fn"], stated)} in the '
            f'minibatch of {frame.size} that the plate "{frame.name}" draws, and its observations '
            f"have {shape_of(site['value'])}. Index them with the plate: "
            f"obs={data.names[-1]}[index]."
        )
    if frame.full_size != data.rows:
        raise ModelError(
            f'The plate "{frame.name}" has size {frame.full_size} and the data have {data.rows} '
            "rows. Give the plate the number of rows."
        )


def innermost(fn: Any) -> Any:
    """The distribution inside `.to_event`, `.expand` and `.mask`."""
    while isinstance(fn, td.Independent) or hasattr(fn, "base_dist"):
        if isinstance(fn, td.TransformedDistribution):
            return fn
        fn = fn.base_dist
    return fn


def own_mask(fn: Any) -> Tensor | None:
    """What the `.mask` of a distribution lets count, (*cell) as `fn.shape()`; None without one."""
    total: Tensor | None = None
    shape = fn.shape()
    while isinstance(fn, td.Independent) or hasattr(fn, "base_dist"):
        if isinstance(fn, td.TransformedDistribution):
            break
        if isinstance(fn, MaskedDistribution):
            mask: Tensor = torch.as_tensor(fn._mask)
            mask = mask.reshape(*mask.shape, *[1] * fn.event_dim).expand(shape)
            total = mask if total is None else total & mask
        fn = fn.base_dist
    return total


def impossible_parameter(fn: Any) -> tuple[str, str, float, str] | None:
    """A parameter, as it was given, that lies well outside of what the distribution takes.

    Returns:
        Names of the distribution and of the parameter, a value, and where it has to lie.
    """
    base = innermost(fn)
    stated = getattr(type(base), "arg_constraints", None)
    for name, constraint in stated.items() if isinstance(stated, dict) else ():
        asked = isinstance(getattr(type(base), name, None), lazy_property)
        value = vars(base).get(name) if asked else getattr(base, name, None)
        if not isinstance(value, Tensor) or constraints.is_dependent(constraint):
            continue
        if isinstance(constraint, type(constraints.simplex)):
            constraint = constraints.nonnegative  # divided by its sum already
        while isinstance(constraint, constraints.independent):
            constraint = constraint.base_constraint
        if constraint.event_dim:
            continue
        inside = [constraint.check(value + off) for off in (0.0, _ROUNDING, -_ROUNDING)]
        wrong = ~(inside[0] | inside[1] | inside[2]) & value.isfinite()
        if wrong.any():
            return type(base).__name__, name, float(value[wrong][0]), str(constraint)
    return None


def is_categorical(fn: Any) -> bool:
    """True for a distribution over labels 0..K-1, whose expectation is a probability vector."""
    return isinstance(innermost(fn), td.Categorical)


def as_support_takes(data: Data, fn: Any) -> Data:
    """The observations in the dtype that the likelihood's `log_prob` takes."""
    y = data.observations
    dtype = torch.long if is_categorical(fn) else torch.get_default_dtype()
    if y.dtype == dtype or (
        dtype == torch.long and y.is_floating_point() and (y != y.round()).any()
    ):
        return data
    return replace(data, tensors=(*data.inputs, y.to(dtype)))


def check_support(fn: Any, y: Tensor, name: str, site: str) -> None:
    """Refuses observations `y`, an argument's `name`, outside the support of their distribution.

    Raises:
        DataError: names the support, the count and the first offender.
    """
    support = fn.support
    if is_categorical(fn) and y.is_floating_point() and (y != y.round()).any():
        inside = y == y.round()
    else:
        inside = support.check(y)
    if inside.shape != y.shape:
        inside = inside.reshape(inside.shape + (1,) * (y.ndim - inside.ndim)).expand(y.shape)
    if not inside.all():
        where = (~inside).nonzero()[0].tolist()
        raise DataError(
            f'"{name}" has {int((~inside).sum())} values that "{site}" cannot produce, the first '
            f"is {y[tuple(where)].item():g} at row {where[0]}: {_told_support(fn, support)}"
        )


def same_for_every_row(support: Any) -> bool:
    """False where the bounds of the support are given row by row."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return not any(isinstance(v, Tensor) and v.numel() > 1 for v in vars(support).values())


def warn_of_one_class(fn: Any, data: Data) -> None:
    """Warns where labels are all the same."""
    y = data.observations
    labels = is_categorical(fn) or isinstance(innermost(fn), td.Bernoulli)
    if labels and len(y) > 1 and data.loader is None and (y == y.flatten()[0]).all():
        warnings.warn(
            f'"{data.names[-1]}" holds one class only, {y.flatten()[0].item():g}: the fit can '
            "learn nothing about the others.",
            DataWarning,
            stacklevel=outside(),
        )


def _told_support(fn: Any, support: Any) -> str:
    base = innermost(fn)
    if isinstance(base, td.Categorical):
        classes = base.logits.shape[-1]
        return f"labels are whole numbers in 0..{classes - 1}. Encode them so."
    if isinstance(base, td.Bernoulli):
        return "a Bernoulli observation is 0 or 1. Encode the labels so."
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if isinstance(support, type(constraints.nonnegative_integer)) and support.is_discrete:
        return "a count is a whole number of at least 0. Pass counts, not rates or logs."
    return f"the support of {type(base).__name__} is {support}. Transform them, or change it."
