"""Chunks: how many draws or rows run together, by the numbers that one of them writes.

A dense net writes a hundred numbers for a row, a transformer a hundred thousand. What a program
really writes is counted while it runs, so that the memory of a call is about the same for all.
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tag, Tensor
from torch.utils._python_dispatch import TorchDispatchMode

NUMBERS = 8_000_000  # written by one call, 32 MB in float32: beyond it a call is no quicker


class Work(TorchDispatchMode):
    """Counts operations and the numbers that they write, and sees random ones.

    Attributes:
        operations: that write numbers.
        numbers: written by all of them.
        largest: written by one of them, at most.
        random: True once one drew random numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.numbers, self.largest, self.random = 0, 0, 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See torch.utils._python_dispatch."""
        out = func(*args, **(kwargs or {}))
        self.random |= Tag.nondeterministic_seeded in func.tags
        if isinstance(out, Tensor) and not func.is_view:
            self.operations += 1
            self.numbers += out.numel()
            self.largest = max(self.largest, out.numel())
        return out


def in_chunks(run: Callable[[slice], Any], count: int) -> Iterator[tuple[slice, Any]]:
    """Runs so many draws, some at a time: the first alone, which tells how many may go together.

    Args:
        run: of a stretch of the draws.
        count: how many there are.

    Yields:
        Each stretch, and what `run` returned for it.
    """
    with Work() as work:
        first = run(slice(0, 1))
    yield slice(0, 1), first
    step = max(1, NUMBERS // max(work.numbers, 1))
    for start in range(1, count, step):
        part = slice(start, min(start + step, count))
        yield part, run(part)
