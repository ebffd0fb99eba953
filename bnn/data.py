"""Data: what the user passes, as tensors whose first axis is the row; and minibatches of it."""

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler

from bnn import processes
from bnn.errors import CheckpointError, DataError
from bnn.handlers import generators, set_generators

_SOME = 32  # rows by which data are known again that are not read whole
LARGEST = 1e15  # beyond it a square overflows float32 soon, and every sum of squares is noise


@dataclass(frozen=True, eq=False)
class Data:
    """The positional arguments of a model, the last one being the observations.

    Attributes:
        tensors: arguments as tensors, (row, *) each, or () for a 0-d argument. Of a loader: its
            first batch.
        names: the model's argument names.
        columns: column names of the arguments that had some (pandas), by argument name.
        rows: number of rows.
        loader: where batches come from when the data are not in memory: a DataLoader, `Stream` or
            `Mapped`.
        admit: raises where the observations of a loader's batch cannot be ones of this model.
    """

    tensors: tuple[Tensor, ...]
    names: tuple[str, ...]
    columns: dict[str, list[str]] = field(default_factory=dict)
    rows: int = 0
    loader: "DataLoader | Stream | Mapped | None" = None
    admit: Callable[[Tensor], None] | None = None

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Every argument but the observations."""
        return self.tensors[:-1]

    @property
    def observations(self) -> Tensor:
        """The last argument, (row, *)."""
        return self.tensors[-1]

    @property
    def afresh(self) -> bool:
        """True of a loader that draws each row from all of them, whichever were drawn before."""
        return bool(getattr(getattr(self.loader, "sampler", None), "replacement", False))

    def epoch(self, size: int | None) -> int | None:
        """Minibatches in one pass over the rows, 1 for all rows at once; None where unknown."""
        if self.loader is not None:
            rows = getattr(self.loader, "dataset", None)
            if isinstance(rows, IterableDataset) and not getattr(self.loader, "batch_size", None):
                return None
            try:
                return max(2, len(self.loader))
            except TypeError:  # its sampler has no length
                return None
        return max(2, self.rows // size) if size is not None and size < self.rows else 1

    def batches(
        self, size: int | None, generator: torch.Generator, *, passes: bool = True
    ) -> "Batches":
        """Endless minibatches: each pass over the rows is a new random order.

        Args:
            size: rows in a batch; None gives all rows every time.
            generator: source of the orders.
            passes: False draws every batch from all rows, whatever the ones before held; over a
                pass the noise of the choice of rows cancels, and then it does not.

        Returns:
            The model's arguments on the rows of one batch, and of the next, ...
        """
        if self.loader is not None:
            given = self.loader
            return Batches(lambda: self._loaded(given), loader_generators(given), shared=True)
        if size is None or size >= self.rows:
            whole = _own(self.tensors)
            return Batches(lambda: repeat(whole), ())

        def one_pass() -> Iterator[tuple]:
            order = torch.randperm(self.rows, generator=generator)
            for start in range(0, self.rows - size + 1 if passes else 1, size):
                yield take(self.tensors, own_rows(order[start : start + size]))

        return Batches(one_pass, (generator,))

    def once(self, size: int | None) -> Iterator[tuple]:
        """One pass over the rows: in their order, the last batch being what is left; or a loader's.

        Args:
            size: rows in a batch; None gives all rows in one.
        """
        if self.loader is None:
            size = max(self.rows, 1) if size is None else size
            for first in range(0, max(self.rows, 1), size):
                yield (
                    self.tensors
                    if size >= self.rows
                    else take(self.tensors, slice(first, first + size))
                )
            return
        given = self.loader
        yield from self._loaded(given.in_order() if isinstance(given, Mapped) else given)

    def _loaded(self, batches: Iterable[Any]) -> Iterator[tuple]:
        """A loader's batches as tensors."""
        for batch in batches:
            made = like(tensors(tuple(batch), self.names), self.tensors)
            if self.admit is not None:
                self.admit(made[-1])
            own = made if isinstance(self.loader, Mapped) else _own(made)
            if len(own[-1]):  # fewer rows than processes: a rest
                yield own


@dataclass(frozen=True, eq=False)
class Stream:
    """Batches of any iterable that can be gone through again and again.

    Attributes:
        batches: the iterable.
        rows: in one pass.
        count: batches in one pass; None where it does not tell.
    """

    batches: Iterable[Any]
    rows: int
    count: int | None

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        if self.count is None:
            raise TypeError("It does not tell the number of its batches.")
        return self.count


@dataclass(frozen=True, eq=False)
class Mapped:
    """Minibatches of arrays that are mapped from the disk: rows are read as they are drawn.

    Attributes:
        arrays: (row, *) each, or () for an argument that belongs to every row.
        rows: in all.
        size: rows in a batch.
    """

    arrays: tuple[Any, ...]
    rows: int
    size: int

    def __iter__(self) -> Iterator[tuple]:
        short = torch.int32 if self.rows < 2**31 else torch.int64
        order = torch.randperm(self.rows, dtype=short, device="cpu")
        for start in range(0, self.rows - self.size + 1, self.size):
            chosen = own_rows(order[start : start + self.size])
            yield self._at(chosen.sort().values.numpy())  # the disk's own order

    def in_order(self) -> Iterator[tuple]:
        """All rows once, as they lie on the disk; the last batch is what is left."""
        for start in range(0, self.rows, self.size):
            yield self._at(slice(start, start + self.size))

    def _at(self, rows: Any) -> tuple:
        return tuple(array[rows] if array.ndim else array for array in self.arrays)

    def __len__(self) -> int:
        return self.rows // self.size


class Batches(Iterator[tuple]):
    """Endless minibatches that can be set back to where they once were.

    Where they are is told by the generators as the present pass began, and by the batches taken of
    it since: a pass is begun again and what was taken is gone through.

    Args:
        begin: one pass over the rows; all that it draws from generators it draws before it yields
            the first batch.
        generators: what it draws from.
        shared: it also draws from the generators that models draw from.
    """

    def __init__(
        self,
        begin: Callable[[], Iterator[tuple]],
        generators: Sequence[torch.Generator],
        shared: bool = False,
    ):
        self._begin, self._generators, self._shared = begin, generators, shared
        self._pass: Iterator[tuple] = iter(())
        self._ahead: deque[tuple[tuple, tuple[Any, int]]] = deque()
        # Of what was fetched and of what was taken: the pass, and its batches; -1 before any pass.
        self._now = self._mark = (self._origin(), -1)

    def __next__(self) -> tuple:
        batch, self._mark = self._ahead.popleft() if self._ahead else self._fetched()
        return batch

    def ahead(self, count: int) -> list[tuple]:
        """The next batches, which are still to come."""
        while len(self._ahead) < count:
            self._ahead.append(self._fetched())
        return [batch for batch, _ in self._ahead][:count]

    def state(self) -> dict[str, Any]:
        """Where the batches are, as tensors and numbers."""
        origin, taken = self._mark
        return {"origin": origin, "taken": taken}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Sets the batches to where they were; nothing is read before the next is asked for."""
        self._ahead.clear()
        self._pass = self._left(state)
        self._now = self._mark = (state["origin"], state["taken"])

    def _fetched(self) -> tuple[tuple, tuple[Any, int]]:
        batch = next(self._pass, None)
        if batch is None:
            self._now = (self._origin(), 0)
            if not self._ahead:  # of the pass before it nothing is still to be taken
                self._mark = self._now
            self._pass = self._begin()
            batch = next(self._pass, None)
        if batch is None:
            raise DataError("A pass over the rows has no batch: the loader yields nothing.")
        self._now = (self._now[0], self._now[1] + 1)
        return batch, self._now

    def _origin(self) -> dict[str, Any]:
        """Of the generators, now: own (generator, byte), none or some."""
        none = torch.zeros((0, len(torch.get_rng_state())), dtype=torch.uint8)
        own = [each.get_state() for each in self._generators]
        shared = generators() if self._shared else None
        return {"own": torch.stack(own) if own else none, "shared": shared}

    def _left(self, state: Mapping[str, Any]) -> Iterator[tuple]:
        """What is left of a pass."""
        for each, origin in zip(self._generators, state["origin"]["own"], strict=True):
            each.set_state(origin.clone())  # a view would crash it
        if state["taken"] < 0:
            return
        now = generators()
        if self._shared:
            set_generators(state["origin"]["shared"])
        left = self._begin()
        for number in range(state["taken"]):
            if next(left, None) is None:
                raise CheckpointError(
                    f"A pass over the rows has {number} batches, and {state['taken']} had been "
                    "taken when the fit was stopped: these are other data."
                )
        first = list(islice(left, 0 if state["taken"] else 1))  # with it a pass draws its order
        set_generators(now)
        yield from chain(first, left)


def loader_generators(loader: Any) -> list[torch.Generator]:
    """The generators that a loader was given, those of its samplers included."""
    inner = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), getattr(inner, "sampler", None))
    found = {id(g): g for o in owners if (g := getattr(o, "generator", None)) is not None}
    return list(found.values())


def some_rows(loader: Any) -> Iterator[Any]:
    """Rows of a loader, evenly spaced from the first to the last, in whatever form it keeps them.

    A loader with workers gives them by one: what a dataset opens, it is to open there.

    Raises:
        Exception: whatever a dataset raises that has no length or other keys than 0, 1, ...
    """
    if isinstance(loader, Mapped):
        chosen = _spread(loader.rows)
        yield from (array[chosen] if array.ndim else array for array in loader.arrays)
        return
    sampler, rows = loader.sampler, loader.dataset
    part = sampler.indices if isinstance(sampler, SubsetRandomSampler) else range(len(rows))
    chosen = [int(part[row]) for row in _spread(len(part))]
    if not loader.num_workers:
        yield from (rows[row] for row in chosen)
        return
    yield from DataLoader(
        rows,
        batch_size=None,
        sampler=chosen,
        num_workers=1,
        collate_fn=_unchanged,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )


def _unchanged(row: Any) -> Any:
    return row


def _spread(rows: int) -> np.ndarray:
    return np.unique(np.linspace(0, rows - 1, min(rows, _SOME)).astype(np.int64))


def take(args: tuple[Tensor, ...], rows: Any) -> tuple[Tensor, ...]:
    """The arguments at some rows; 0-d arguments belong to every row."""
    return tuple(arg[rows] if arg is not None and arg.ndim else arg for arg in args)


def own_rows(rows: Tensor) -> Tensor:
    """Those of some rows, (..., row), that this process sees: all, where it fits alone."""
    shared = processes.current()
    return rows if shared is None else shared.part(rows)


def _own(args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """This process's part of a batch; nothing of one that has fewer rows than there are parts."""
    shared, rows = processes.current(), len(args[-1])
    if shared is None:
        return args
    return take(args, shared.part(torch.arange(rows if rows >= shared.count else 0)))


def take_filled(args: tuple[Tensor, ...], first: int, size: int) -> tuple[Tensor, ...]:
    """Exactly `size` rows from `first` on; where there are fewer, the last one is repeated."""
    rows = next((len(arg) for arg in args if arg is not None and arg.ndim), 0)
    return take(args, torch.arange(first, first + size).clamp(max=max(rows - 1, 0)))


def like(new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """On the devices and in the dtypes of others, save where that would cut numbers (0.5 to 0)."""

    def cast(a: Tensor, b: Tensor) -> Tensor:
        a = a.to(b.device)
        made = a.to(b.dtype)
        return made if b.is_floating_point() or torch.equal(made.to(a.dtype), a) else a

    return tuple(cast(a, b) for a, b in zip(new, old, strict=True))


def shape_of(tensor: Tensor) -> str:
    """A shape with its axes named: `(row=60, column=3)`."""
    names = ["row", "column"] if tensor.ndim <= 2 else ["row"]
    names += [f"axis {i}" for i in range(len(names), tensor.ndim)]
    return "(" + ", ".join(f"{n}={s}" for n, s in zip(names, tensor.shape, strict=False)) + ")"


def tensors(args: tuple[Any, ...], names: tuple[str, ...]) -> tuple[Tensor, ...]:
    """Arrays as tensors: floats in torch's default dtype, integers as they are, all finite.

    Args:
        args: tensors, NumPy arrays, pandas objects, lists or numbers.
        names: what to call them in messages.

    Raises:
        DataError: an argument is not numeric, not finite, too large, or lies on several devices.
    """
    made = tuple(_tensor(arg, name) for arg, name in zip(args, names, strict=True))
    devices = {str(tensor.device): name for tensor, name in zip(made, names, strict=True)}
    if len(devices) > 1:
        found = ", ".join(f"{name!r} on {device}" for device, name in devices.items())
        raise DataError(f"The data lie on several devices: {found}. Move them to one with .to().")
    for tensor, name, arg in zip(made, names, args, strict=True):
        _check_finite(tensor, name, column_names(arg))
    return made


def column_names(arg: Any) -> list[str]:
    """Names of the columns of a pandas object, else an empty list."""
    return [str(c) for c in arg.columns] if hasattr(arg, "columns") else []


def _tensor(arg: Any, name: str) -> Tensor:
    if arg is None:
        raise DataError(f'"{name}" is None. Pass an array with one entry a row.')
    if type(arg).__module__.startswith("scipy.sparse"):
        raise DataError(f'"{name}" is a sparse array, found {type(arg).__name__}. Pass .toarray().')
    if isinstance(arg, np.ma.MaskedArray):
        raise DataError(
            f'"{name}" is a masked array. Drop the masked rows, or fill them, and pass the result.'
        )
    if isinstance(arg, Tensor):
        tensor = arg.detach().clone() if arg.is_inference() else arg.detach()
    elif isinstance(arg, np.memmap) and arg.dtype.kind in "if" and arg.dtype.isnative:
        with warnings.catch_warnings():  # torch cannot tell that nobody will write to it
            warnings.simplefilter("ignore")
            tensor = torch.from_numpy(arg)
    else:
        array = _array(arg, name)
        tensor = torch.as_tensor(array.copy())  # own memory: read-only and strided arrays too
    if tensor.is_complex():
        raise DataError(f'"{name}" is complex ({tensor.dtype}). Pass its real and imaginary parts.')
    if tensor.layout != torch.strided:
        raise DataError(f'"{name}" has layout {tensor.layout}. Pass .to_dense().')
    if tensor.is_floating_point():
        tensor = tensor.to(torch.get_default_dtype())
    return tensor.contiguous()  # sums run in memory order: equal numbers, equal draws


def _array(arg: Any, name: str) -> np.ndarray:
    if hasattr(arg, "dtypes") and hasattr(arg, "columns"):  # a pandas DataFrame
        for column, dtype in zip(arg.columns, arg.dtypes, strict=True):
            if not (hasattr(dtype, "kind") and dtype.kind in "biuf"):
                raise DataError(
                    f'Column "{column}" of "{name}" holds {dtype}, not numbers. '
                    "Encode it, for example with pandas.get_dummies (pandas.to_numeric, where it "
                    "holds numbers as text), or drop it."
                )
        return arg.to_numpy(dtype=float, na_value=np.nan)
    try:
        array = np.asarray(arg)
    except ValueError as error:
        cure = "Pass rows of equal length."
        if isinstance(arg, Dataset):
            cure = "Pass its arrays one by one, or a DataLoader of it."
        elif isinstance(arg, list | tuple) and any(getattr(each, "ndim", 0) for each in arg):
            cure = "Pass its arrays one by one: fit(model, x, y)."
        raise DataError(
            f'"{name}" is a {type(arg).__name__} that cannot become an array: '
            f"{str(error).rstrip('.')}. {cure}"
        ) from error
    if array.dtype == object:  # pandas' nullable columns, lists with None
        try:
            if hasattr(arg, "to_numpy"):
                return arg.to_numpy(dtype=float, na_value=np.nan)
            array = array.astype(float)
        except (TypeError, ValueError) as error:
            raise DataError(
                f'"{name}" holds Python objects that are not numbers ({error}). '
                "Pass an array; encode labels as 0, 1, 2, ..., for example with pandas.factorize."
            ) from error
    if array.dtype.kind not in "biuf":
        raise DataError(
            f'"{name}" holds {array.dtype}, not numbers. '
            "Encode labels as 0, 1, 2, ..., for example with pandas.factorize."
        )
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(np.int64)
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)  # torch has no wider one
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _check_finite(tensor: Tensor, name: str, columns: list[str]) -> None:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    low, high = tensor.aminmax()  # NaN where there is one; a mask would take memory
    if not (low.isfinite() and high.isfinite()):
        bad = ~torch.isfinite(tensor)
        where = bad.nonzero()[0].tolist()
        kind = "NaN" if torch.isnan(tensor).any() else "infinite"
        at = f"row {where[0]}" if where else "its only entry"
        cure = "Drop those rows, or fill them in, before the fit."
        if len(where) > 1:
            at += f', column "{columns[where[1]]}"' if columns else f", column {where[1]}"
            if bad.flatten(2 if tensor.ndim > 2 else 1)[:, where[1]].all():
                at, cure = at + " (all of that column)", "Fill that column in, or leave it out."
        raise DataError(
            f'"{name}" has {int(bad.sum())} {kind} of {tensor.numel()} values, the first at {at}. '
            f"{cure}"
        )
    largest = float(torch.maximum(-low, high))
    if largest > LARGEST:
        raise DataError(
            f'"{name}" reaches {largest:.3g}, beyond what {tensor.dtype} can square and add up. '
            "Rescale it, for example to mean 0 and standard deviation 1."
        )
