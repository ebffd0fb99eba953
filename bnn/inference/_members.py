"""Members: several parameter sets of one model that step together, each on minibatches of its own.

One step of all members is a single call of the model, lifted over them. On nets too small to fill
the machine that costs little more than one member; on large ones, compiled, it is no slower than a
loop (uncompiled it is: .6 times as fast, ten nets of 478,410 weights). A loop is what is left where
a model cannot be lifted.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnn.data import Batches, Data, own_rows
from bnn.handlers import branch, generator
from bnn.inference._energy import Energy


class Members:
    """The objective of all members at once, and their minibatches.

    Attributes:
        axis: how many members there are, the size of the first axis of everything; None for a
            single one, which has no such axis.
        own: True where each member sees rows of its own. The batches of a loader, and all rows at
            once, are the same for all.

    Args:
        count: members.
        energy: the log joint.
        one: log likelihood and log prior of one member at its flat vector and a batch. It is given
            its tensors of `rows` and `whole` by name.
        data: the rows.
        batch_size: rows in a minibatch of one member; None takes all rows.
        rows: what a member has for each row, (member, row, *), such as weights: gathered with the
            rows of each minibatch. Not where a loader chooses the rows.
        whole: what a member has besides, (member, *).
    """

    def __init__(
        self,
        count: int,
        energy: Energy,
        one: Callable[..., tuple[Tensor, Tensor]],
        data: Data,
        batch_size: int | None,
        rows: Mapping[str, Tensor] | None = None,
        whole: Mapping[str, Tensor] | None = None,
    ):
        self.energy, self.one, self.data, self.batch_size = energy, one, data, batch_size
        self.rows, self.whole = rows or {}, whole or {}
        self.axis = count if count > 1 else None
        self.own = (
            count > 1 and data.loader is None and batch_size is not None and batch_size < data.rows
        )

    def objective(
        self,
        tensors: Mapping[str, Tensor],
        batch: tuple[Any, ...],
        weight: Tensor,
        noise: tuple[Tensor, ...],
    ) -> Tensor:
        """Of each member, (member,), at the leaf "mode", (member, size); see `Step`."""
        count = len(self.data.tensors)
        args, rows = batch[:count], batch[count:]
        names = [*self.rows, *self.whole]
        if self.axis is None:
            own = (*rows, *(each[0] for each in self.whole.values()))
            likelihood, prior = self.one(
                tensors["mode"], args, **dict(zip(names, own, strict=True))
            )
            return likelihood + weight * prior
        shared = () if self.own else args

        def one(z: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
            split = len(rest) - len(names)
            own = dict(zip(names, rest[split:], strict=True))
            return self.one(z, (*shared, *rest[:split]), **own)

        each = args if self.own else ()
        likelihood, prior = self.energy.batched(
            one, tensors["mode"], *each, *rows, *self.whole.values(), of="members"
        )
        return likelihood + weight * prior

    def culprit(
        self, tensors: Mapping[str, Tensor], batch: tuple[Any, ...], member: int
    ) -> str | None:
        """The site of a member that is not finite there, see `Energy.culprit`."""
        z, args = tensors["mode"], batch[: len(self.data.tensors)]
        own = tuple(arg[member] for arg in args) if self.own else args
        return self.energy.culprit(z if self.axis is None else z[member], own)

    def batches(self, seed: np.random.SeedSequence, *, passes: bool = True) -> Batches:
        """Endless: of every argument the rows of each member, (member, row, *), or those of all.

        After the arguments come the tensors of `rows` at the same rows, (member, row, *). `passes`
        is that of `Data.batches`.
        """
        if self.own:
            generators = [generator(branch(seed, k)) for k in range(self.axis or 1)]
            return Batches(lambda: self._own(generators, passes), generators)
        rows = (each if self.axis else each[0] for each in self.rows.values())
        data = replace(self.data, tensors=(*self.data.tensors, *rows))
        return data.batches(self.batch_size, generator(branch(seed, 0)), passes=passes)

    def _own(self, generators: list[torch.Generator], passes: bool) -> Iterator[tuple[Any, ...]]:
        """One pass over the rows, or one batch: a new random order for every member."""
        rows, size = self.data.rows, self.batch_size or self.data.rows
        orders = torch.stack([torch.randperm(rows, generator=each) for each in generators])
        for start in range(0, rows - size + 1 if passes else 1, size):
            yield self._at(own_rows(orders[:, start : start + size]))

    def _at(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Arguments and tensors of `rows` at rows of each member, (member, row)."""
        count = len(rows)
        given = (arg[rows] if arg.ndim else arg.expand(count) for arg in self.data.tensors)
        member = torch.arange(count)[:, None]
        return (*given, *(each[member, rows] for each in self.rows.values()))
