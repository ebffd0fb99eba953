"""Run: a fit on its way. What its loops have done is kept, so that a fit that stopped goes on.

A method is a program that its seed determines, and most of its time goes into a few loops. Each
loop is a *phase* and tells its whole state as a tree of tensors and numbers. A fit that is called
again runs the method's program from its beginning; where that comes to a phase, the phase is set
back to the state that it was left in: to its end, or on its way. No method knows of this.

    folder/fit.safetensors           what the fit is: data, model, settings, seed; written once
    folder/phase-0.safetensors       a phase at its end
    folder/state-0.safetensors       the phase on its way: this one and the one before, in turn
    folder/draws-1-00000.safetensors draws of a phase, as they came; each is written once
    folder/posterior.safetensors     the end; all but this and the first then go
    folder/part-000/                 of a fit in parts, the run of each: see `bnn.parts`
    folder/lock                      held while a fit writes here, and let go however it ends
"""

import contextlib
import os
import re
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from bnn import files
from bnn.errors import CheckpointError, CheckpointWarning, ResumeMismatch, outside
from bnn.files import Tree
from bnn.handlers import generators, set_generators
from bnn.processes import Processes

_SCHEMA = 1
FIT, POSTERIOR, _LOCK = "fit.safetensors", "posterior.safetensors", "lock"
_OURS = re.compile(r"\.?(phase-\d+|state-[01]|draws-\d+-\d+|fit|posterior)\.safetensors(\..*)?")
_PART = re.compile(r"part-\d+")
_SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


@dataclass(frozen=True)
class Checkpoint:
    """Where a fit keeps what it has done, and how often.

    Attributes:
        folder: of this fit alone; made where there is none.
        every: seconds between two saves on the way; at the end of each phase of a method there is
            one in any case.

    Example:
        >>> Checkpoint("run", every=10.0)
        Checkpoint(folder='run', every=10.0)
    """

    folder: "str | os.PathLike[str]"
    every: float = 60.0

    def __post_init__(self) -> None:
        if not isinstance(self.folder, str | os.PathLike):
            raise TypeError(f"checkpoint is {self.folder!r}. Pass the path of a folder.")
        if isinstance(self.every, bool) or not isinstance(self.every, int | float):
            raise TypeError(f"Checkpoint(every={self.every!r}): every is a number of seconds.")
        if not 0 <= self.every < float("inf"):
            raise ValueError(f"Checkpoint(every={self.every!r}): every is 0 or more seconds.")


class Loop(Protocol):
    """What can be a phase: its state is all that the rest of it depends on."""

    def state(self) -> Tree:
        """Now, between two steps."""

    def restore(self, state: Tree) -> None:
        """Sets the loop back; the tree has been found to have the form of `state()`."""


class Streaming(Loop, Protocol):
    """A loop whose draws go to the disk as they come, and are no part of its state."""

    def fresh(self) -> Mapping[str, Any]:
        """Tensors and arrays that came since the last call; {} where none did."""
        ...

    def refill(self, chunk: Mapping[str, Any]) -> None:
        """Takes back what one call of `fresh` gave, after `restore`, in their order.

        Raises:
            CheckpointError: it cannot have been given here.
        """


class Interrupted(KeyboardInterrupt):
    """A fit was stopped before there was anything of which a posterior could be made."""


class Run:
    """A fit on its way.

    Attributes:
        stopped: what stopped it ("Ctrl-C", "SIGTERM", "loading"), or "".
        cut: True if a phase ended early for that.
        seconds: that earlier calls of the same fit took.
        count: saves on the way so far.

    Args:
        folder: where it is kept; None keeps nothing.
        every: see `Checkpoint`.
        frozen: True takes no step: phases are set back to where they are, and end there.
        shared: by these processes, of which the first one writes; a signal ends all of them.
    """

    def __init__(
        self,
        folder: Path | None = None,
        every: float = 60.0,
        *,
        frozen: bool = False,
        shared: Processes | None = None,
    ):
        self.folder, self.every, self.frozen, self.shared = folder, every, frozen, shared
        self.writes = folder is not None and not frozen and (shared is None or shared.first)
        self.stopped, self.cut, self.listening = "loading" if frozen else "", False, False
        self.seconds, self.phases = 0.0, 0
        self._start = self._saved = time.monotonic()
        self._owed: list[tuple[str, Any, dict[str, Tensor]]] = []  # files that had no room
        self._warned = False
        self._before: dict[int, Any] = {}
        self._way, self.count = _newest(folder) if folder is not None else ({}, 0)
        earlier = self._way.get("seconds")  # those of a run in parts; a phase on its way tells too
        if isinstance(earlier, float):
            self.seconds = earlier

    @contextlib.contextmanager
    def under_way(self) -> Iterator["Run"]:
        """Loops within are phases of this run; Ctrl-C ends them after the step that they are at.

        So does SIGTERM where there is a folder. A second one, and one between phases, does what it
        would have done.
        """
        token = _current.set(self)
        try:
            alone = not self.frozen and self.shared is None
            if alone and threading.current_thread() is threading.main_thread():
                self._listen()
            yield self
        finally:
            _current.reset(token)
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _listen(self) -> None:
        usual: dict[signal.Signals, Any] = {signal.SIGINT: signal.default_int_handler}
        if self.folder is not None:
            usual[signal.SIGTERM] = signal.SIG_DFL
        for number, handler in usual.items():
            if signal.getsignal(number) is handler or signal.getsignal(number) == handler:
                self._before[number] = signal.signal(number, self._heard)

    def _heard(self, number: int, frame: Any) -> None:
        if self.listening and not self.stopped:
            self.stopped = _SIGNALS[signal.Signals(number)]
            return
        signal.signal(number, self._before[number])
        signal.raise_signal(number)

    def found(self, phase: int) -> tuple[dict[str, Any], bool]:
        """What is kept of a phase, {} where nothing is, and whether that is its end."""
        if self.folder is None:
            return {}, False
        name = f"phase-{phase}.safetensors"
        if (self.folder / name).exists():
            return _read(self.folder / name, phase), True
        way = self._way.get("phase", -1)
        if way > phase:
            raise CheckpointError(f"{self.folder} has no {name}, and the state of a later phase.")
        return (self._way if way == phase else {}), False

    def keep(self, name: str, tree: Tree) -> None:
        """Writes a file that does not change again; what there is no room for is tried again."""
        if self.writes:
            tensors: dict[str, Tensor] = {}
            stored = files.packed(tree, tensors)
            self._owed.append((name, stored, {k: v.detach().clone() for k, v in tensors.items()}))
            self._pay()

    def keep_state(self, tree: Tree) -> None:
        """Writes the state of the phase on its way, beside the one before."""
        if not self.writes or not self._pay():
            return
        self.count += 1
        tensors: dict[str, Tensor] = {}
        stored = files.packed({**tree, "count": self.count}, tensors)
        self._tried(f"state-{self.count % 2}.safetensors", stored, tensors)

    def keep_seconds(self) -> None:
        """Of a run in parts, which has no phase itself: how long it has taken."""
        self.keep_state({"phase": 0, "seconds": self.elapsed()})

    def finish(self, write: Callable[[Path], Any]) -> bool:
        """Writes the posterior; True once it is on the disk."""
        assert self.folder is not None
        return self._written(lambda: write(Path(self.folder or "", POSTERIOR)))

    def due(self) -> bool:
        """Whether it is time for a save."""
        return self.writes and time.monotonic() - self._saved >= self.every

    def elapsed(self) -> float:
        """Seconds, those of earlier calls included."""
        return self.seconds + time.monotonic() - self._start

    def owes(self) -> bool:
        """True while there are draws or phases that could not be written."""
        return bool(self._owed)

    def _pay(self) -> bool:
        while self._owed:
            if not self._tried(*self._owed[0]):
                return False
            del self._owed[0]
        return True

    def _tried(self, name: str, stored: Any, tensors: Mapping[str, Tensor]) -> bool:
        path = Path(self.folder or "", name)
        return self._written(
            lambda: files.write(path, tensors, {"schema": _SCHEMA, "tree": stored})
        )

    def _written(self, write: Callable[[], Any]) -> bool:
        """Writes; where that fails the fit goes on, with a warning once. True if it did not."""
        try:
            write()
        except CheckpointError as error:
            if not self._warned:
                warnings.warn(
                    f"{error} The fit goes on, what was kept before is whole, and saving is tried "
                    "again.",
                    CheckpointWarning,
                    stacklevel=outside(),
                )
            self._warned = True
            return False
        finally:
            self._saved = time.monotonic()
        return True


_current: ContextVar[Run | None] = ContextVar("run", default=None)


def standing() -> bool:
    """True where no step will be taken, so that nothing needs to be made fast."""
    run = _current.get()
    return run is not None and run.frozen


class Phase:
    """One loop of a fit, to be entered once: `with Phase("warmup", loop) as phase:`.

    Entering sets the loop back to what is kept of it, the generators that models draw from
    included; leaving keeps it, at its end or, if it was stopped, on its way. An exception keeps
    nothing more.

    Attributes:
        over: what is kept is the loop's end; it has nothing left to do.
        frozen: no step will be taken: what only makes steps fast can be left out.
        cut: the loop was stopped.
    """

    def __init__(self, name: str, loop: Loop):
        self.name, self.loop = name, loop
        self.run = _current.get() or Run()
        self.number, self.cut = self.run.phases, False
        self.run.phases += 1
        self._found, self.over = self.run.found(self.number)
        self._chunks = 0
        self.frozen = self.over or self.run.frozen

    def __enter__(self) -> "Phase":
        if self._found:
            self._set_back(self._found)
        elif self.run.stopped:
            self.run.cut = True
            raise Interrupted(
                f"The fit was stopped ({self.run.stopped}) before its phase {self.name!r}, of "
                "which its posterior would be made."
            )
        self._found = {}
        self.run.listening = not self.over
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        self.run.listening = False
        if kind is None and self.cut:
            self._keep_on_its_way()
        elif kind is None and not self.over:
            self._stream()
            self.run.keep(f"phase-{self.number}.safetensors", self._told())

    def goes_on(self) -> bool:
        """Asked before every step: saves where it is time; False once the fit is to stop."""
        if self.run.stopped:
            self.cut = self.run.cut = True
            return False
        if self.run.due():
            self._keep_on_its_way()
        return True

    def require(self, enough: bool) -> None:
        """Raises `Interrupted` if a loop that was cut has not enough to make a posterior of."""
        if self.cut and not enough:
            raise Interrupted(
                f"The fit was stopped ({self.run.stopped}) in its phase {self.name!r}, and no draw "
                "was there yet."
            )

    def _keep_on_its_way(self) -> None:
        self._stream()
        if not self.run.owes():
            self.run.keep_state(self._told())

    def _stream(self) -> None:
        """Writes what draws have come."""
        if not self.run.writes or not hasattr(self.loop, "fresh"):
            return
        chunk = self.loop.fresh()  # type: ignore[attr-defined]
        if chunk:
            self.run.keep(self._chunk(self._chunks), {"phase": self.number, "chunk": dict(chunk)})
            self._chunks += 1

    def _chunk(self, number: int) -> str:
        return f"draws-{self.number}-{number:05d}.safetensors"

    def _told(self) -> Tree:
        return {
            "phase": self.number,
            "name": self.name,
            "seconds": self.run.elapsed(),
            "chunks": self._chunks,
            "generators": generators(),
            "loop": self.loop.state(),
        }

    def _set_back(self, found: Tree) -> None:
        found = files.conformed({"count": 0, **found}, {"count": 0, **self._told()}, "The state")
        if found["name"] != self.name:
            raise CheckpointError(
                f"{self.run.folder} holds the phase {found['name']!r}, and the fit is at "
                f"{self.name!r}."
            )
        folder = self.run.folder
        assert folder is not None
        try:
            self.loop.restore(found["loop"])
            for self._chunks in range(found["chunks"]):
                chunk = _read(folder / self._chunk(self._chunks), self.number)["chunk"]
                self.loop.refill(chunk)  # type: ignore[attr-defined]
            self._chunks = found["chunks"]
            if hasattr(self.loop, "fresh") and self.loop.fresh():  # type: ignore[attr-defined]
                raise CheckpointError(f"{folder} has fewer draws than its state says.")
            set_generators(found["generators"])
        except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{folder} holds a state that is none: {error}") from error
        self.run.seconds = max(self.run.seconds, found["seconds"])


def _newest(folder: Path) -> tuple[dict[str, Any], int]:
    """The newest state of the phase on its way that is whole, {} where there is none; its count.

    Raises:
        CheckpointError: there are some, and none is whole.
    """
    names = [folder / f"state-{i}.safetensors" for i in (0, 1)]
    states, errors = [], []
    for path in names:
        if path.exists():
            try:
                states.append(_read(path))
            except CheckpointError as error:
                errors.append(error)
    if errors and not states:
        raise CheckpointError(f"{errors[0]} Delete {folder} to begin anew.")
    if errors:
        warnings.warn(
            f"{errors[0]} The state before it is whole, and is gone on from.",
            CheckpointWarning,
            stacklevel=outside(),
        )
    newest = max(states, key=lambda state: state["count"], default={})
    return newest, newest.get("count", 0)


def no_link(path: Path) -> Path:
    """A file of a run's folder. Raises CheckpointError where it is a link: a run writes none."""
    if path.is_symlink():
        raise CheckpointError(f"{path} is a link, and a run writes none.")
    return path


def _read(path: Path, phase: int | None = None) -> dict[str, Any]:
    """A tree that a run wrote, of a phase."""
    manifest, tensors = files.read(no_link(path))
    if manifest.get("schema") != _SCHEMA:
        raise CheckpointError(
            f"{path} has schema {str(manifest.get('schema'))[:20]}, not {_SCHEMA}."
        )
    tree = files.unpacked(manifest.get("tree"), tensors)
    whole = lambda v: isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**31
    wanted = ["phase"] + (["count"] if phase is None else [])
    if not isinstance(tree, dict) or not all(whole(tree.get(key)) for key in wanted):
        raise CheckpointError(f"{path} holds no state of a run.")
    if phase is not None and tree["phase"] != phase:
        raise CheckpointError(f"{path} holds another phase: {tree['phase']}.")
    return tree


class Folder:
    """A run's folder, held: nobody else writes there until it is let go.

    Args:
        path: the folder; made where there is none.
        held: False only reads, beside the process that holds it.

    Raises:
        CheckpointError: it cannot be made, or another fit writes there.
    """

    def __init__(self, path: Path, *, held: bool = True):
        self.path, self._held = path, -1
        if not held:
            return
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._held = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be a checkpoint: {error}.") from error
        try:
            _lock(self._held)
        except OSError as error:
            os.close(self._held)
            raise CheckpointError(
                f"{path} is in use: another fit writes there. Wait for it, or pass another folder."
            ) from error

    def __enter__(self) -> "Folder":
        for each in self.path.iterdir() if self._held >= 0 else ():
            if each.name.startswith(".") and _OURS.fullmatch(each.name):
                each.unlink()  # what a fit that was killed had half written
        return self

    def __exit__(self, *error: Any) -> None:
        if self._held >= 0:
            os.close(self._held)

    @property
    def posterior(self) -> Path:
        """Where the posterior is, or will be."""
        return no_link(self.path / POSTERIOR)

    def check(self, identity: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
        """Takes the folder for a fit, or finds it to be this fit's.

        Args:
            identity: manifest of the fit; `identity["is"]` tells it from others, field by field.
            tensors: its data.

        Raises:
            ResumeMismatch: it is another fit's.
        """
        path = no_link(self.path / FIT)
        if not path.exists() and self._held < 0:
            raise CheckpointError(
                f"{self.path} is not there for every process. Pass a folder that all machines see."
            )
        if not path.exists():
            if any(_OURS.fullmatch(each.name) for each in self.path.iterdir()):
                raise CheckpointError(f"{self.path} holds a run without {FIT}. Delete it.")
            files.write(path, tensors, {"schema": _SCHEMA, **identity})
            return
        stored = files.read_manifest(path)
        if stored.get("schema") != _SCHEMA:
            raise ResumeMismatch(
                f"{self.path} has schema {str(stored.get('schema'))[:20]} and this version reads "
                f"{_SCHEMA}. Resume with the bnn that began it, or pass another folder.",
                field="version",
            )
        for field in ("is", "versions"):
            if not isinstance(stored.get(field), dict):
                raise CheckpointError(f"{path} is damaged: it has no {field!r}.")
        python = stored["versions"].get("python") == identity["versions"]["python"]
        for field, here in identity["is"].items():
            there = stored["is"].get(field)
            if there != here and (python or field != "model"):  # instructions differ by version
                raise ResumeMismatch(
                    f"{self.path} holds a fit with other {field}: {_differing(there, here)}. Pass "
                    "what it was begun with, or another folder.",
                    field=field,
                )
        changed = [k for k, v in identity["versions"].items() if stored["versions"].get(k) != v]
        if changed:
            told = ", ".join(
                f"{k} {str(stored['versions'].get(k))[:30]} -> {identity['versions'][k]}"
                for k in changed
            )
            warnings.warn(
                f"{self.path} was begun with other versions ({told}): the fit goes on, and what "
                "comes need not be bit for bit what would have come.",
                CheckpointWarning,
                stacklevel=outside(),
            )

    def clear(self) -> None:
        """Removes what a finished run needs no more."""
        for each in self.path.iterdir():
            if _PART.fullmatch(each.name) and each.is_dir() and not each.is_symlink():
                shutil.rmtree(each, ignore_errors=True)
            elif _OURS.fullmatch(each.name) and each.name not in (FIT, POSTERIOR):
                each.unlink(missing_ok=True)


def _differing(there: Any, here: Any) -> str:
    """Two values of a field, or the entries in which they differ."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = [k for k in {**there, **here} if there.get(k) != here.get(k)]
        return ", ".join(
            f"{k} was {str(there.get(k))[:60]} and is {str(here.get(k))[:60]}" for k in keys[:3]
        )
    return f"it was {str(there)[:60]} and is {str(here)[:60]}"


try:
    import fcntl

    def _lock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)

except ImportError:  # Windows

    def _lock(handle: int) -> None:
        import msvcrt

        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
