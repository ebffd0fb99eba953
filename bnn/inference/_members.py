"""Members: several parameter sets of one model that step together, each on minibatches of its own.

One step of all members is a single call of the model, lifted over them. On nets too small to fill
the machine that costs little more than one member; on large ones it is no slower than a loop.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnn.data import Data
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
        one: objective of one member at its flat vector and a batch, larger is better.
        data: the rows.
        batch_size: rows in a minibatch of one member; None takes all rows.
    """

    def __init__(
        self,
        count: int,
        energy: Energy,
        one: Callable[[Tensor, tuple[Any, ...]], Tensor],
        data: Data,
        batch_size: int | None,
    ):
        self.energy, self.one, self.data, self.batch_size = energy, one, data, batch_size
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
        if self.axis is None:
            return self.one(tensors["mode"], batch)
        if self.own:
            each = lambda z, *args: self.one(z, args)
            return self.energy.batched(each, tensors["mode"], *batch)
        return self.energy.batched(lambda z: self.one(z, batch), tensors["mode"])

    def batches(self, seed: np.random.SeedSequence) -> Iterator[tuple[Any, ...]]:
        """Endless: of every argument the rows of each member, (member, row, *), or those of all."""
        count = self.axis if self.own and self.axis else 1
        sources = [
            self.data.batches(self.batch_size, generator(branch(seed, member)))
            for member in range(count)
        ]
        if not self.own:
            return sources[0]
        return (_stacked(each) for each in zip(*sources, strict=True))


def _stacked(batches: tuple[tuple[Tensor, ...], ...]) -> tuple[Tensor, ...]:
    return tuple(torch.stack(argument) for argument in zip(*batches, strict=True))
