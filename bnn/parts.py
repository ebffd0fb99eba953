"""Parts: a fit whose independent runs are divided, so that they can be computed side by side.

A method that counts runs (chains, members, restarts) can be told to fit them in `parts`. Each is a
fit of its own, with seeds and adaptation of its own, on one thread. What it gives depends on the
settings and the seed alone: an executor, whichever it is, gives the bits that none gives.

    folder/part-000/    the run of a part, where there is a checkpoint; the end clears it away
"""

import copy
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor
from dataclasses import dataclass, replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnn.checkpoint import is_repeated
from bnn.data import Data
from bnn.devices import on
from bnn.errors import FitError, ModelError, outside
from bnn.handlers import branch, quiet_pyro, seeded, threads
from bnn.method import Method, Model
from bnn.posterior import Posterior
from bnn.progress import bar
from bnn.run import Folder, Interrupted, Run
from bnn.sites import Sites, require_one_value
from bnn.turns import ALONE, default_dtype
from bnn.workers import Workers, first_line, lost

_PARTS = 2**31  # branches of the seed tree from here on, apart from those within a fit
_POLL = 0.5  # seconds


@dataclass(frozen=True, eq=False)
class Part:
    """A fit of some of the runs, or of all: what is sent to a worker.

    Attributes:
        name: which runs, for messages.
        work: multiplications in one call of the model, which choose the threads.
        folder: where it is kept, or None; and how often, `every` seconds.
    """

    model: Model
    data: Data
    sites: Sites
    method: Method
    seed: np.random.SeedSequence
    dtype: torch.dtype
    work: int
    name: str = ""
    folder: Path | None = None
    every: float = 60.0

    def compute(self, run: Run, progress: bool) -> Posterior:
        """The posterior, computed here."""
        here, dtype = on(self.data.observations.device), default_dtype(self.dtype)
        with dtype, run.under_way(), quiet_pyro(), here, seeded(self.seed), threads(self.work):
            try:
                posterior = self.method.fit(
                    self.model, self.data, self.sites, seed=self.seed, progress=progress
                )
            except Exception as error:
                if self.name:
                    error.add_note(f"in {self.name} of {type(self.method).__name__}")
                raise
        return replace(posterior, complete=not run.cut, seconds=run.elapsed())

    def kept(self, run: Run, progress: bool) -> Posterior:
        """The same, in a folder of its own where the run of the whole has one."""
        if self.folder is None or run.frozen:
            return self.compute(run, progress)
        with Folder(self.folder):
            return self.compute(run, progress)

    def __call__(self) -> "_Sent":
        """In a worker: what comes back, and what was warned of."""
        with ALONE, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                posterior = self.kept(Run(self.folder, self.every), False)
            except Exception as error:
                if _can_be_sent(error):
                    raise
                told = FitError(f"{type(error).__name__}: {error}")
                told.__notes__ = getattr(error, "__notes__", [])
                raise told from error
        given = {k: v for k, v in vars(posterior).items() if k not in _KNOWN}
        return _Sent(given, [(w.category, str(w.message)) for w in caught])


def _can_be_sent(error: Exception) -> bool:
    """False of one that cannot be built again where it arrives: it would seem a dead worker."""
    try:
        ForkingPickler.dumps(error)
        copy.copy(error)  # calls its type with its arguments, as what arrives does
    except Exception:
        return False
    return True


_KNOWN = ("model", "method", "data", "sites")


@dataclass(frozen=True)
class _Sent:
    """What a worker sends back: the fields of a posterior but those that are known here."""

    given: Mapping[str, Any]
    warned: Sequence[tuple[type[Warning], str]]

    def of(self, part: Part) -> Posterior:
        return Posterior(**{name: getattr(part, name) for name in _KNOWN}, **self.given)


def divide(whole: Part) -> list[Part]:
    """The parts of a fit; itself where its method has no more than one.

    Raises:
        ModelError: the model has trainable tensors without a prior, which have one value for all.
    """
    methods = whole.method.divided()
    if len(methods) == 1:
        return [whole]
    require_one_value(whole.sites, type(whole.method).__name__, parts=len(methods))
    folder = whole.folder and whole.folder.absolute()  # a worker may stand in another one
    runs, parts, begin = whole.method.runs, [], 0
    for i, method in enumerate(methods):
        end = begin + getattr(method, runs)
        told = f"{runs[:-1]} {begin}" if end == begin + 1 else f"{runs} {begin} to {end - 1}"
        parts.append(
            replace(
                whole,
                method=method,
                seed=branch(whole.seed, _PARTS + i),
                work=0,
                name=told,
                folder=folder and folder / f"part-{i:03d}",
            )
        )
        begin = end
    return parts


def compute(
    parts: Sequence[Part], run: Run, progress: bool, executor: Executor | None
) -> list[Posterior]:
    """The posteriors of the parts; of a run that is stopped, of those of which there is one.

    Raises:
        FitError: a worker ended before its part did.
        ModelError: the model cannot be sent to a worker.
        Interrupted: the run was stopped with nothing to make a posterior of.
    """
    made = {} if executor is None else _elsewhere(parts, run, progress, executor)
    for i, part in enumerate(parts):
        if i in made:
            continue
        its = Run(part.folder, part.every, frozen=run.frozen or bool(run.stopped))
        try:
            made[i] = part.kept(its, progress)
        except Interrupted:
            its.cut = True
        if its.cut:
            run.stopped, run.cut = run.stopped or its.stopped, True
        run.keep_seconds()
    if not made:
        raise Interrupted(f"The fit was stopped ({run.stopped}) before any part had a draw.")
    return [made[i] for i in sorted(made)]


def _elsewhere(
    parts: Sequence[Part], run: Run, progress: bool, executor: Executor
) -> dict[int, Posterior]:
    """Those that workers computed, by number: all, unless the run was stopped."""
    sent: dict[int, _Sent] = {}
    try:
        with (
            Workers(executor, parts) as workers,
            run.under_way(),
            bar(len(parts), "parts", progress) as shown,
        ):
            run.listening = True
            while workers.left:
                busy = [i for future, i in workers.left.items() if future.running()]
                ended = workers.ended(_POLL)
                if run.stopped:
                    workers.cancel()
                if run.due():
                    run.keep_seconds()
                if ended is None:
                    continue
                i, future, error = ended
                if error is None:
                    sent[i] = future.result()
                    shown.update()
                elif not run.stopped:
                    names = lambda which: [parts[k].name for k in which]
                    all_broke = isinstance(error, BrokenExecutor)
                    perhaps = (busy or sorted([i, *workers.left.values()])) if all_broke else [i]
                    told = " and ".join(names(workers.dead)) or " or ".join(names(perhaps))
                    raise _told(error, parts[i], told)
    finally:
        run.listening = False
        run.keep_seconds()
    _tell_warnings({parts[i].name: sent[i].warned for i in sorted(sent)})
    made = {i: each.of(parts[i]) for i, each in sent.items()}
    run.cut = not all(each.complete for each in made.values())
    if run.cut and not run.stopped:
        run.stopped = "a signal to a worker"
    return made


def _tell_warnings(warned: Mapping[str, Sequence[tuple[type[Warning], str]]]) -> None:
    """Warns here of what was warned of in workers: each once, with the names of its parts."""
    names: dict[tuple[type[Warning], str], list[str]] = {}
    for name, its in warned.items():
        for each in dict.fromkeys(its):
            names.setdefault(each, []).append(name)
    for (category, message), its in names.items():
        warnings.warn(f"{', '.join(its)}: {message}", category, stacklevel=outside())


def _told(error: BaseException, part: Part, names: str) -> BaseException:
    """What to raise for what a worker raised, or for its end."""
    what = type(part.method).__name__
    if lost(error):
        found = FitError(
            f"{what}: a worker ended (killed, or out of memory?) while it computed {names}: "
            f"{first_line(error)}. With checkpoint= the same call computes again what it had not "
            "kept."
        )
    elif "pickle" in f"{type(error).__name__} {error}".lower():
        found = ModelError(
            f"The model, or a setting of {what}, cannot be sent to another process: {error}. "
            "Define it at the top of a module, or use an executor that sends code by value, as "
            "dask's does."
        )
    else:
        return error
    found.__cause__ = error
    return found


def joined(parts: Sequence[Posterior], axis: int = 0) -> Posterior:
    """One posterior of several: their chains (axis 0), or the draws of their one chain (axis 1).

    Chains have as many draws as the others: of parts that were stopped at different lengths, those
    and so much of each stay that most draws are left. The history is that which ends highest, and
    so is the evidence.
    """
    if axis == 0:
        parts = _even(parts)
    histories = [part.history for part in parts if part.history is not None]
    evidences = [part.log_evidence for part in parts if part.log_evidence is not None]
    return replace(
        parts[0],
        draws=_joined([part.draws for part in parts], axis),
        stats=_joined([part.stats for part in parts], axis),
        params=_joined([part.params for part in parts], 0),
        history=max(histories, key=lambda each: float(each[-1]), default=None),
        log_evidence=max(evidences, default=None),
        complete=all(part.complete for part in parts),
    )


def _joined(parts: Sequence[Mapping[str, Tensor]], axis: int) -> dict[str, Tensor]:
    found = {}
    for name, first in parts[0].items():
        values = [part[name] for part in parts]
        if axis == 0 and first.ndim > 1 and all(map(is_repeated, values)):  # stays without memory
            once = torch.cat([value[:, :1] for value in values])
            found[name] = once.expand(-1, first.shape[1], *first.shape[2:])
        else:
            found[name] = torch.cat(values, axis)
    return found


def _even(parts: Sequence[Posterior]) -> list[Posterior]:
    """As many draws of each chain."""
    longest = max({part.shape[1] for part in parts}, key=lambda n: n * _chains(parts, n))
    cut = lambda tensors: {k: v[:, :longest] for k, v in tensors.items()}
    return [
        replace(part, draws=cut(part.draws), stats=cut(part.stats))
        for part in parts
        if part.shape[1] >= longest
    ]


def _chains(parts: Sequence[Posterior], draws: int) -> int:
    """That have so many draws."""
    return sum(part.shape[0] for part in parts if part.shape[1] >= draws)
