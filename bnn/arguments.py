"""Arguments: what the user passes, against what the model takes and what it was fitted to."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, SubsetRandomSampler

from bnn.data import Data, Mapped, Stream, column_names, like, shape_of, tensors
from bnn.errors import DataError, ModelError
from bnn.handlers import seeded
from bnn.method import Model


def argument_names(model: Model, count: int) -> tuple[str, ...]:
    """The model's positional argument names, as far as it tells them."""
    names = _signature(model)[:count]
    return tuple(names + [f"argument {i}" for i in range(len(names), count)])


def _signature(model: Model) -> list[str]:
    try:
        call: Any = model.forward if isinstance(model, torch.nn.Module) else model
        kinds = inspect.signature(call).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in kinds if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def call_of(model: Model, data: Data) -> str:
    """What to say where the model has another number of arguments than were given."""
    names = _signature(model)
    if not names or len(names) == len(data.names):
        return ""
    return (
        f"The model takes {', '.join(names)}, and {len(data.names)} were given: call "
        f"fit(model, {', '.join(names)})."
    )


def input_call(model: Model, inputs: int) -> str:
    """What to say where the model takes another number of inputs than it was given."""
    names = _signature(model)
    if not names or len(names) == inputs + 1:
        return ""
    return (
        f"It takes {', '.join(names)}, the last being the observations: call "
        f"prior_predictive({', '.join(['model', *names[:-1]])})."
    )


def read(
    model: Model,
    args: tuple[Any, ...],
    batch_size: int | None = None,
    device: torch.device | None = None,
) -> Data:
    """The user's arrays as `Data`: numeric, finite, and one length.

    Args:
        model: the user's model.
        args: its arguments; or one loader, or another iterable of batches.
        batch_size: rows in a minibatch, by which arrays that are mapped from the disk are read.
        device: to which the tensors go, and later batches with them; None leaves them.

    Raises:
        ModelError: the model is not a callable that takes this many arguments.
        DataError: see `bnn.data.tensors`; or no rows, or lengths that differ.
    """
    if not callable(model):
        raise ModelError(
            f"The model is a {type(model).__name__}, not a callable. "
            "Pass a Pyro model function model(*inputs, y=None)."
        )
    if not args:
        raise DataError("fit got no data. Call fit(model, *inputs, y).")
    loader = _loader(model, args, batch_size)
    if loader is not None:
        args = _first_batch(loader)
    names = argument_names(model, len(args))
    made = tuple(tensor.to(device) for tensor in tensors(args, names))
    if made[-1].ndim == 0:
        raise DataError(
            f'The observations "{names[-1]}" are a single number. Pass one for each row, (row,).'
        )
    lengths = {name: len(arg) for name, arg in zip(names, made, strict=True) if arg.ndim}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f'"{name}" has {n}' for name, n in lengths.items())
        raise DataError(
            f"The data have different numbers of rows: {found}. Give every argument the same "
            "rows; what does not belong to a row (a matrix, a constant) the model closes over."
        )
    rows = len(made[-1])
    if rows == 0:
        raise DataError(f'"{names[-1]}" has no rows. A fit needs at least one.')
    if loader is not None:
        rows = _rows_of_loader(loader)
    columns = {n: column_names(a) for n, a in zip(names, args, strict=True) if column_names(a)}
    return Data(made, names, columns, rows, loader)


def _loader(model: Model, args: tuple[Any, ...], size: int | None) -> Any:
    """Where batches come from, if the data are not to be held in memory; else None."""
    if size is not None and any(isinstance(arg, np.memmap) and arg.ndim for arg in args):
        names = argument_names(model, len(args))
        arrays = [a if isinstance(a, np.memmap) else tensors((a,), (n,))[0].numpy()
                  for a, n in zip(args, names, strict=True)]  # fmt: skip
        lengths = {name: len(a) for name, a in zip(names, arrays, strict=True) if a.ndim}
        rows = min(lengths.values())
        same = len(set(lengths.values())) == 1  # `read` tells of others
        return Mapped(tuple(arrays), rows, size) if same and size < rows else None
    if not is_stream(args):
        return None
    if not isinstance(args[0], DataLoader):
        return _counted(args[0])
    if not hasattr(args[0].dataset, "__len__"):
        raise DataError(
            f"The DataLoader's {type(args[0].dataset).__name__} does not tell its number of rows, "
            "by which a minibatch is scaled. Give the dataset a __len__."
        )
    return args[0]


def _rows_of_loader(loader: Any) -> int:
    if not isinstance(loader, DataLoader):
        return loader.rows
    part = isinstance(loader.sampler, SubsetRandomSampler)  # the others draw from all rows
    return len(loader.sampler if part else loader.dataset)  # type: ignore[arg-type]


def _counted(batches: Iterable[Any]) -> Stream:
    """An iterable of batches with its number of rows, counted in a pass where it does not tell."""
    if iter(batches) is batches:
        raise DataError(
            f"The data are a {type(batches).__name__}, which is empty once it was gone through; a "
            "fit goes through its rows many times. Pass an object whose __iter__ begins anew."
        )
    rows, count = getattr(batches, "rows", None), None
    if rows is None:
        rows = count = 0
        with seeded(np.random.SeedSequence(0)):
            for batch in batches:
                rows, count = rows + _rows_of(batch), count + 1
    elif isinstance(batches, Sized):
        count = len(batches)
    return Stream(batches, int(rows), count)


def _rows_of(batch: Any) -> int:
    if not isinstance(batch, tuple | list) or not batch or not hasattr(batch[-1], "__len__"):
        raise _no_batch(batch)
    return len(batch[-1])


def _no_batch(batch: Any) -> DataError:
    return DataError(
        f"The data yield {'nothing' if batch is None else type(batch).__name__}, not tuples of the "
        "model's arguments, the observations last. With a DataLoader wrap them: "
        "TensorDataset(x, y)."
    )


def _first_batch(loader: Any) -> tuple[Any, ...]:
    with seeded(np.random.SeedSequence(0)):  # a shuffling loader draws from the caller's generator
        batch = next(iter(loader), None)
    if not isinstance(batch, tuple | list):
        raise _no_batch(batch)
    return tuple(batch)


def is_stream(args: tuple[Any, ...]) -> bool:
    """True of one iterable of batches: a DataLoader, a generator; no array, list or table."""
    if len(args) != 1 or isinstance(args[0], Sequence | Mapping | Set):
        return False
    array = hasattr(args[0], "shape") or hasattr(args[0], "__array__")
    return isinstance(args[0], Iterable) and not array


def check_batches(batches: Iterable[Any], data: Data) -> Iterator[tuple[Tensor, ...]]:
    """Batches of inputs, or of inputs and observations, with the training data's dtypes.

    Raises:
        DataError: see `check_inputs`; or some batches have observations and some have not.
    """
    inputs, scored = len(data.names) - 1, None
    if not inputs:
        raise DataError("The model has no inputs, so no batch tells a row. Call predict().")
    for batch in batches:
        args = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
        whole = len(args) == inputs + 1
        if scored not in (None, whole):
            raise DataError("Some batches hold observations and some do not. Give all or none.")
        scored = whole
        yield check_arguments(args, data) if whole else check_inputs(args, data)


def check_inputs(inputs: tuple[Any, ...], data: Data) -> tuple[Tensor, ...]:
    """The inputs of a prediction as tensors, with the training data's columns and dtypes.

    Raises:
        DataError: another number of inputs, other columns, other trailing axes, or bad values.
    """
    names, trained = data.names[:-1], data.inputs
    if len(inputs) != len(trained):
        raise DataError(
            f"predict got {len(inputs)} inputs and the model was fitted with {len(trained)} "
            f"({', '.join(names) or 'none'}). Pass the inputs without the observations."
        )
    for arg, name in zip(inputs, names, strict=True):
        known, new = data.columns.get(name, []), column_names(arg)
        if known and new and known != new:
            lost = [c for c in known if c not in new]
            extra = [c for c in new if c not in known]
            what = f"without {lost}, with unknown {extra}" if lost or extra else "in another order"
            raise DataError(
                f'The columns of "{name}" are {new}, {what}; the fit had {known}. '
                f"Pass {name}[{known}]."
            )
    made = tensors(inputs, names)
    for new, old, name in zip(made, trained, names, strict=True):
        if new.ndim != old.ndim or new.shape[1:] != old.shape[1:]:
            raise DataError(
                f'"{name}" has shape {shape_of(new)} and the fit had {shape_of(old)}. '
                "Everything but the number of rows must be the same."
            )
    lengths = {n: len(a) for n, a in zip(names, made, strict=True) if a.ndim}
    if len(set(lengths.values())) > 1:
        raise DataError(f"The inputs have different numbers of rows: {lengths}.")
    return like(made, trained)


def check_arguments(args: tuple[Any, ...], data: Data) -> tuple[Tensor, ...]:
    """New rows with their observations, of the kind that the model was fitted to.

    Raises:
        DataError: see `check_inputs`; or observations of another shape, or with other rows.
    """
    name, known = data.names[-1], data.observations
    if len(args) != len(data.names):
        raise DataError(
            f"Got {len(args)} arguments; the model takes {len(data.names)} "
            f"({', '.join(data.names)}). Pass all of them, the observations last."
        )
    inputs = check_inputs(args[:-1], data)
    (y,) = tensors(args[-1:], data.names[-1:])
    if y.shape[1:] != known.shape[1:] or y.ndim != known.ndim:
        raise DataError(
            f'"{name}" has shape {shape_of(y)} and the fit had {shape_of(known)}. '
            "Everything but the number of rows must be the same."
        )
    lengths = {n: len(x) for n, x in zip(data.names, (*inputs, y), strict=True) if x.ndim}
    if len(set(lengths.values())) > 1:
        raise DataError(
            f"The data have different numbers of rows: {lengths}. Give all the same rows."
        )
    if not known.is_floating_point() and y.is_floating_point() and bool((y != y.round()).any()):
        raise DataError(
            f'"{name}" holds labels that are not whole numbers. Encode them as in the fit.'
        )
    return (*inputs, y.to(known.device, known.dtype))
