"""Fingerprint: a SHA-256 by which a model, which no file holds, is known again.

Of a function it covers the instructions, constants, names and defaults, what it closes over and
the globals that it reads: values of any kind, and functions and classes of its own module; of a
class its methods and what it inherits; of an `nn.Module` its class, its print and the shapes of its
tensors, since their values are starting points at most; of any other object its class and
attributes. Comments, line numbers and the code of other modules are left out.
"""

import functools
import hashlib
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnn.files import digest

_DEPTH = 12  # beyond it nothing is looked at
_KNOWN = {"torch", "pyro", "bnn", "numpy", *sys.stdlib_module_names}  # told by their versions


def fingerprint(thing: Any) -> str:
    """The SHA-256 of a model: the same in every process that defines it alike."""
    total = hashlib.sha256()
    for part in _parts(thing, {}, 0):
        total.update(f"{len(part)}:{part}".encode())
    return total.hexdigest()


def _parts(thing: Any, seen: dict[int, Any], depth: int) -> Iterator[str]:
    """What tells one thing from another, as texts."""
    if thing is None or isinstance(thing, bool | int | float | complex | str | bytes):
        yield repr(thing)
        return
    yield f"{type(thing).__module__}.{type(thing).__qualname__}"
    if id(thing) in seen or depth > _DEPTH:
        return
    seen[id(thing)] = thing  # kept, so that its id is not given again
    inside: list[Any] = []
    if isinstance(thing, Tensor | np.ndarray | np.generic):
        yield digest("", {"": _tensor(thing)})
    elif isinstance(thing, torch.nn.Module):
        yield repr(thing)
        yield from (f"{k} {v.dtype} {tuple(v.shape)}" for k, v in thing.state_dict().items())
        inside = [type(thing)]
    elif isinstance(thing, Mapping):
        inside = [each for pair in thing.items() for each in pair]
    elif isinstance(thing, list | tuple):
        inside = list(thing)
    elif isinstance(thing, set | frozenset):
        yield from sorted(fingerprint(each) for each in thing)
    elif isinstance(thing, functools.partial):
        inside = [thing.func, thing.args, thing.keywords]
    elif isinstance(thing, types.MethodType):
        inside = [thing.__func__, thing.__self__]
    elif isinstance(thing, types.FunctionType):
        inside = _of_function(thing)
    elif isinstance(thing, types.CodeType):
        yield thing.co_code.hex()
        inside = [thing.co_names, thing.co_varnames, thing.co_freevars, thing.co_consts]
    elif isinstance(thing, type):
        yield f"{thing.__module__}.{thing.__qualname__}"
        if thing.__module__.partition(".")[0] not in _KNOWN:
            members = [_unwrapped(v) for _, v in sorted(vars(thing).items())]
            inside = [v for v in members if isinstance(v, types.FunctionType)]
            inside += thing.__bases__
    elif isinstance(thing, types.BuiltinFunctionType | types.ModuleType):
        yield thing.__name__
    else:
        attributes = sorted(getattr(thing, "__dict__", {}).items(), key=lambda item: item[0])
        inside = [type(thing), *attributes]
    for each in inside:
        yield from _parts(each, seen, depth + 1)


def _tensor(array: Any) -> Tensor:
    """Its numbers; none of what is not made of numbers that torch has."""
    if isinstance(array, Tensor):
        return array.detach()
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        return torch.zeros(0)
    return torch.as_tensor(np.array(array, array.dtype.newbyteorder("="), order="C"))


def _of_function(function: types.FunctionType) -> list[Any]:
    """Its code, and what the code reads that is not its own."""
    code, cells = function.__code__, function.__closure__ or ()
    closed = [cell.cell_contents for cell in cells if _filled(cell)]
    own = [
        value
        for name in sorted(_names(code))
        if (value := function.__globals__.get(name)) is not None
        and (_value(value) or getattr(value, "__module__", None) == function.__module__)
    ]
    return [code, function.__defaults__, function.__kwdefaults__, closed, own]


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:  # a name that is bound later
        return False
    return True


def _names(code: types.CodeType) -> set[str]:
    inner = (each for each in code.co_consts if isinstance(each, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _value(thing: Any) -> bool:
    """True of what is no code."""
    code = types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type
    return not isinstance(thing, code)


def _unwrapped(member: Any) -> Any:
    """The function of a static or class method, or of a property; another member as it is."""
    return getattr(member, "__func__", None) or getattr(member, "fget", None) or member
