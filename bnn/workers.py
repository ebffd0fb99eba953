"""Workers: calls that an executor computes, and over which of them a worker died.

A process pool that has lost one process breaks all that it was given alike, and then ends the other
processes. So each call leaves a note of the process that it is in; and as the pool tells of the
first future that broke, before it ends the others, those whose process is gone are the dead.
"""

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any

from bnn.errors import FitError

_LOST = {
    *("BrokenExecutor", "CancelledError"),  # of concurrent.futures
    *("KilledWorker", "CommClosedError", "TerminatedWorkerError"),  # dask's and loky's
    *("RayActorError", "WorkerCrashedError", "NodeDiedError"),  # Ray's
}
_PATIENCE = 1.0  # seconds until the system has reaped a process whose end the pool has seen


class Workers:
    """Calls on their way through an executor; to be entered once.

    Attributes:
        left: numbers of those that have not ended, by future.
        dead: numbers of those over which a worker died, once the executor broke; [] where that is
            not known, as on other machines.

    Raises:
        FitError: the executor takes no work.
    """

    def __init__(self, executor: Executor, calls: Iterable[Callable[[], Any]]):
        self.executor, self.calls = executor, calls
        self.left: dict[Future[Any], int] = {}
        self.dead: list[int] = []
        self._all: list[Future[Any]] = []
        self._ended: SimpleQueue[Future[Any]] = SimpleQueue()
        self._broken = False

    def __enter__(self) -> "Workers":
        self._notes = TemporaryDirectory(prefix="bnn-", ignore_cleanup_errors=True)
        try:
            for i, call in enumerate(self.calls):
                note = os.path.join(self._notes.name, str(i))
                future = self.executor.submit(_Call(call, note))
                self._all.append(future)
                self.left[future] = i
                future.add_done_callback(self._ends)
        except BrokenExecutor as error:
            self.__exit__()
            raise FitError(
                f"The executor has lost a worker, and takes no more work ({error}). Pass a new one."
            ) from error
        return self

    def __exit__(self, *error: Any) -> None:
        self.cancel()
        self._notes.cleanup()

    def cancel(self) -> None:
        """Leaves out those that have not begun."""
        self.left = {future: i for future, i in self.left.items() if not future.cancel()}

    def ended(
        self, seconds: float | None = None
    ) -> tuple[int, Future[Any], BaseException | None] | None:
        """The next that has ended: number, future, error; None where none does in so long."""
        with contextlib.suppress(Empty):
            future = self._ended.get(timeout=seconds)
            if future in self.left:
                error = CancelledError() if future.cancelled() else future.exception()
                return self.left.pop(future), future, error
        return None

    def _ends(self, future: Future[Any]) -> None:
        """Called as a future ends: of a pool that broke, before it ends its processes."""
        broken = not future.cancelled() and isinstance(future.exception(), BrokenExecutor)
        if broken and not self._broken:
            self._broken = True
            with contextlib.suppress(OSError):  # the folder has gone: nobody asks any more
                self.dead = self._gone(future)
        self._ended.put(future)

    def _gone(self, broken: Future[Any]) -> list[int]:
        done = {i for i, each in enumerate(self._all) if each.done() and each is not broken}
        notes = [map(int, each.name.split("-")) for each in Path(self._notes.name).iterdir()]
        began = {i: process for i, process in notes if i not in done}
        until = time.monotonic() + _PATIENCE
        while began and time.monotonic() < until:
            alive = {each.pid for each in multiprocessing.active_children()}
            if gone := sorted(i for i, process in began.items() if process not in alive):
                return gone
            time.sleep(0.01)
        return []


@dataclass(frozen=True)
class _Call:
    """What is sent: the call, and where it leaves its note."""

    call: Callable[[], Any]
    note: str

    def __call__(self) -> Any:
        with contextlib.suppress(OSError):  # no such folder: another machine
            Path(f"{self.note}-{os.getpid()}").touch()
        return self.call()


def lost(error: BaseException | None) -> bool:
    """True of what an executor raises where a worker has gone."""
    return any(kind.__name__ in _LOST for kind in type(error).__mro__)


def first_line(error: BaseException) -> str:
    """What it says, in short and without the full stop."""
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
