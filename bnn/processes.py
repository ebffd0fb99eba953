"""Processes: several that fit one posterior together, each on its part of the rows.

Each of `count` processes runs the same program on the same data from the same seed, and sees of
every minibatch the rows number `rank`, `rank + count`, ... only. With B_r rows of B on process r,
the objective is

    log joint on B rows = sum_r (B_r / B) log joint on B_r rows,

each of the two scaled to all N rows; so value and gradient are that mean, added up at every step.
What follows from them is the same on all processes, to the bit. Noise of the guide is drawn from
the same generators and is the same; noise that belongs to a row is not, and has no place here.
"""

import atexit
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as processes
from torch import Tensor

from bnn.errors import DataError, FitError, ModelError

_PATIENCE = timedelta(minutes=5)  # for a process that has died without a word


@dataclass(frozen=True)
class Processes:
    """This process among others.

    Attributes:
        rank: its number, from 0.
        count: of all.
        device: where numbers are that they exchange; None is the CPU.
    """

    rank: int
    count: int
    device: torch.device | None = None

    @property
    def first(self) -> bool:
        """True for the one that writes files and shows bars."""
        return self.rank == 0

    def part(self, rows: Tensor) -> Tensor:
        """Those of some rows, (..., row), that this process sees."""
        return rows[..., self.rank :: self.count]

    def mean(
        self, rows: int, value: Tensor, gradients: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Objective and gradient of a whole minibatch, of those of this process's part.

        Args:
            rows: of this process's part.
            value: the objective there.
            gradients: of it, by name.

        Raises:
            FitError: another process has gone.
        """
        parts = [value, *gradients.values()]
        flat = torch.cat([part.reshape(-1) * rows for part in parts] + [value.new_full((1,), rows)])
        self._summed(flat)
        pieces = (flat[:-1] / flat[-1]).split([part.numel() for part in parts])
        whole = [piece.reshape(part.shape) for piece, part in zip(pieces, parts, strict=True)]
        return whole[0], dict(zip(gradients, whole[1:], strict=True))

    def _summed(self, flat: Tensor) -> None:
        try:
            processes.all_reduce(flat)
        except RuntimeError as error:
            raise FitError(
                f"Process {self.rank} of {self.count} has lost another one "
                f"({str(error).splitlines()[0][:120]}). Start all of them again; with a checkpoint "
                "they go on where it stands."
            ) from error

    def agree(self, what: str, *told: Any) -> None:
        """Refuses to go on with processes that differ.

        Args:
            what: it is that must be the same.
            *told: values that tell it.

        Raises:
            DataError: it is not.
        """
        digest = hashlib.sha256(repr(told).encode()).digest()[:7]
        mine = torch.tensor(list(digest), dtype=torch.float64, device=self.device)
        mean = mine.clone()
        self._summed(mean)
        low = (mine - mean / self.count).abs().sum()[None]
        self._summed(low)
        if float(low) > 0.0:
            raise DataError(
                f"The processes differ in {what}. All of them must run the same script on the same "
                "data in the same order; which rows each takes is seen to."
            )

    def wait(self) -> None:
        """Until all are here."""
        self._summed(torch.zeros(1, device=self.device))


_current: ContextVar[Processes | None] = ContextVar("processes", default=None)


def current() -> Processes | None:
    """The processes that share the present fit, or None where there is one alone."""
    return _current.get()


@contextmanager
def together(device: torch.device | None = None) -> Iterator[Processes]:
    """What is fitted within is shared by all the processes that torchrun started.

    Raises:
        ModelError: torchrun has not started this process.
    """
    if not processes.is_available():
        raise ModelError("This torch is built without torch.distributed. Leave distributed out.")
    if not processes.is_initialized():
        if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            raise ModelError(
                "distributed=True shares a fit among processes, and this is one alone. Start the "
                "script with: torchrun --nproc-per-node 2 script.py"
            )
        cuda = device is not None and device.type == "cuda"
        processes.init_process_group("nccl" if cuda else "gloo", timeout=_PATIENCE)
        atexit.register(_leave)
    where = device if device is not None and processes.get_backend() == "nccl" else None
    shared = Processes(processes.get_rank(), processes.get_world_size(), where)
    token = _current.set(shared)
    try:
        yield shared
    finally:
        _current.reset(token)


def _leave() -> None:
    if processes.is_initialized():
        processes.destroy_process_group()
