"""The verb: `fit` checks the model, seeds the generators and lets the method work."""

import os
import time
import warnings
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bnn import arguments, contract, devices, diagnostics, processes
from bnn.checkpoint import files_of_fit, read_finished, write
from bnn.data import Data
from bnn.errors import ConvergenceWarning, DataError, ModelError, outside
from bnn.files import digest
from bnn.handlers import threads
from bnn.method import METHODS, Method, Model
from bnn.parts import Part, compute, divide
from bnn.posterior import Posterior
from bnn.run import Checkpoint, Folder, Interrupted, Run
from bnn.sites import Sites, require_minibatches
from bnn.turns import ALONE


def fit(
    model: Model,
    *data: Any,
    method: Method | None = None,
    seed: int = 0,
    progress: bool = True,
    checkpoint: "str | os.PathLike[str] | Checkpoint | None" = None,
    executor: Executor | None = None,
    distributed: bool = False,
    device: "str | torch.device | None" = None,
) -> Posterior:
    """Approximates the posterior of a Pyro model.

    The model is any Pyro callable `model(*inputs, y=None)`. Its observed site receives the last
    argument; the plate around that site, one row for each datum, is the data plate. Sites outside
    the data plate are global and become draws.

    Args:
        model: the Pyro model.
        *data: the model's positional arguments, the observations last, one row each on the first
            axis: tensors, NumPy arrays, pandas objects or lists. Or one `DataLoader`, or another
            iterable that can be gone through again, that yields such tuples, for the methods that
            take minibatches; its rows are counted in a first pass, unless it has an attribute
            `rows`. Arrays that are mapped from the disk (`np.memmap`) are not copied, and with a
            method's `batch_size` only read row by row. Floats become torch's default dtype.
        method: how to approximate the posterior; default `bnn.SVI()`.
        seed: a whole number from 0 below 2**64. The same seed gives the same draws, whatever ran
            before; generators, dtype and Pyro's state are left as they were.
        progress: show a bar, where a terminal or a notebook can show one.
        checkpoint: a folder of this fit alone, in which it keeps what it has done, each minute and
            at the end of each phase; `Checkpoint` sets the interval. The same call goes on where a
            fit stopped, however it did, to the same draws bit for bit; of a finished fit it returns
            the posterior at once. `bnn.load(folder, model)` gives what there is meanwhile.
        executor: computes the parts of a method that has some, `NUTS(chains=8, parts=4)`: a
            `ProcessPoolExecutor`, dask's `client.get_executor()`, any of `concurrent.futures`.
            What it gives is bit for bit what the same call gives without it.
        distributed: share the rows among the processes that `torchrun` started, for `SVI` and
            `MAP`: each runs this same call on the same data, takes its part of every minibatch, and
            has the whole posterior in the end, the same on all to the bit and, up to rounding, that
            of one process. The first one writes the checkpoint.
        device: where to compute, such as "cuda": data, draws and all that the model makes without
            naming a device go there (`posterior.to("cpu")` brings them back). None leaves the data
            where they are.

    Ctrl-C ends the loop that the fit is in after its present step, and gives the posterior that can
    be made of what there is, with `complete=False` and a warning; so does SIGTERM where there is a
    checkpoint. A second Ctrl-C, and one where there is nothing yet, is a KeyboardInterrupt. Of
    parts that an executor computes those that wait are left out, and those that run are waited for,
    unless the signal stops their workers too. Processes that share a fit end at once.

    Returns:
        The posterior: draws, and how to predict from them.

    Raises:
        ModelError: the model cannot be fitted as it is written, or not by this method.
        DataError: the data do not fit the model.
        FitError: the objective stayed non-finite; or a worker of the executor ended.
        ResumeMismatch: `checkpoint` holds a fit of another model, data, settings, seed or dtype.
        ValueError: `executor`, and the method is one part.
        CheckpointError: `checkpoint` is damaged, no folder, or in use by another fit.

    Warns:
        ConvergenceWarning: the fit was stopped; or a finding makes the answer doubtful, one warning
            for each cause. The checks are those of `Posterior.diagnose`, at 20 rows and fewer
            draws, in a fraction of a second: of a sampler divergences, energies, tree depth, R-hat
            and effective sample size of f and of single numbers; of an optimiser an objective that
            still rose; of a guide or a Gaussian at a mode its k-hat; of members that they are all
            alike; a posterior without variance (but where that is what a method is, such as `MAP`),
            that equals the prior, or whose ELBO is below the prior's; of a loader rows that it
            never shows; of some methods what they alone can tell. Checks of many rows, draws or
            weights that would take longer are left to `diagnose`.
        CheckpointWarning: a save failed (no room), and the fit goes on.

    Example:
        >>> import bnn, pyro, torch
        >>> import pyro.distributions as dist
        >>> def model(y=None):
        ...     rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        ...     with pyro.plate("data", 4):
        ...         pyro.sample("y", dist.Poisson(rate), obs=y)
        >>> posterior = bnn.fit(model, [3, 1, 4, 2], method=bnn.NUTS(chains=2, draws=200))
        >>> posterior.draws["rate"].shape
        torch.Size([2, 200])
    """
    if method is None:
        method = METHODS["SVI"]()
    if not isinstance(method, Method):
        raise TypeError(
            f"method is {method!r}. Pass the settings of a method, for example bnn.NUTS(chains=4)."
            f" Known are {', '.join(sorted(METHODS))}."
        )
    seed_sequence(seed)
    if executor is not None and not isinstance(executor, Executor):
        raise TypeError(
            f"executor is a {type(executor).__name__}. Pass one of concurrent.futures; of a dask "
            "Client its client.get_executor()."
        )
    if distributed and executor is not None:
        raise ValueError("fit got executor= and distributed=True. Pass one of the two.")
    where = devices.checked(device)
    if distributed and processes.current() is None:
        with processes.together(where):
            again = {"method": method, "seed": seed, "checkpoint": checkpoint, "device": where}
            return fit(model, *data, progress=progress, distributed=True, **again)
    held = ALONE if executor is None else nullcontext()  # whose threads need turns of their own
    with held, torch.inference_mode(False), torch.enable_grad():
        with ALONE:
            start = time.perf_counter()
            read = arguments.read(model, data, getattr(method, "batch_size", None), where)
            with devices.on(read.observations.device):
                read, sites = contract.check(model, read, adds_sites=method.adds_sites)
                contract.check_batch(model, read, sites, method)
        shared = processes.current()
        if shared is not None:
            _check_shared(model, read, sites, method, seed, shared)
            progress = progress and shared.first
        if checkpoint is None:
            run = Run(shared=shared)
            posterior = approximate(model, read, sites, method, seed, progress, run, executor)
            _agree(shared, posterior)
            return replace(posterior, seconds=time.perf_counter() - start)
        kept = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
        first = shared is None or shared.first
        if not first:
            shared.wait()  # type: ignore[union-attr]  until the first has made the folder its own
        with Folder(Path(kept.folder), held=first) as folder:
            folder.check(*files_of_fit(model, read, method, seed))
            if shared is not None and first:
                shared.wait()
            finished = folder.posterior.exists()
            run = Run(None if finished else folder.path, kept.every, shared=shared)
            if shared is not None:
                shared.agree("what their checkpoint holds", finished, run.count)
            if finished:
                posterior = read_finished(folder.posterior, model, read, method)
                return posterior.to(read.observations.device)
            posterior = approximate(model, read, sites, method, seed, progress, run, executor)
            _agree(shared, posterior)
            if first and posterior.complete and run.finish(lambda path: write(posterior, path)):
                folder.clear()
            if shared is not None:
                shared.wait()
        return posterior


def _check_shared(
    model: Model, data: Data, sites: Sites, method: Method, seed: int, shared: processes.Processes
) -> None:
    """Refuses what processes cannot share.

    Raises:
        ModelError: the method does work that is not minibatches, or the model has sites of a row.
        DataError: the processes were given different things.
    """
    name = type(method).__name__
    if not method.distributes:
        able = ", ".join(sorted(k for k, kind in METHODS.items() if kind.distributes))
        raise ModelError(
            f"{name} cannot share a fit among processes (distributed=True); {able} can."
        )
    if getattr(method, "parts", 1) > 1:
        raise ModelError(f"{method!r} in several processes: leave parts out, rows are shared.")
    require_minibatches(sites, f"{name} in {shared.count} processes")
    if sites.subsampled:
        raise ModelError(
            f'The plate "{sites.plate}" draws a minibatch of its own, which processes would draw '
            "alike. Leave subsample_size out, and pass batch_size to the method."
        )
    size = getattr(method, "batch_size", None)
    if size is not None and size % shared.count:
        raise ModelError(
            f"{name}(batch_size={size}) in {shared.count} processes: each takes an equal part of a "
            f"minibatch. Pass a multiple of {shared.count}."
        )
    if data.loader is None and data.rows < shared.count:
        raise DataError(
            f"{data.rows} rows cannot be shared among {shared.count} processes. Start fewer."
        )
    identity, _ = files_of_fit(model, data, method, seed)
    told = sorted(identity["is"].items())  # of a loader no contents: its first batch tells
    first = digest("", dict(zip(data.names, data.tensors, strict=True)))
    shared.agree("their data, model, settings or seed", told, first)


def _agree(shared: processes.Processes | None, posterior: Posterior) -> None:
    if shared is not None:
        shared.agree("the posterior that they found", digest("", posterior.draws))


def approximate(
    model: Model,
    data: Data,
    sites: Sites,
    method: Method,
    seed: int,
    progress: bool,
    run: Run,
    executor: Executor | None = None,
) -> Posterior:
    """Lets the method work, as a run.

    Raises:
        Interrupted: the run was stopped with nothing to make a posterior of.
    """
    rows = len(data.observations)
    work = method.work(rows, sites.size)
    whole = Part(
        *(model, data, sites, method, seed_sequence(seed), torch.get_default_dtype(), work),
        folder=run.folder,
        every=run.every,
    )
    pieces = divide(whole)
    if executor is not None and len(pieces) == 1:
        raise ValueError(_one_part(method))
    try:
        if len(pieces) == 1:
            posterior = whole.compute(run, progress)
        else:
            made = compute(pieces, run, progress, executor)
            posterior = replace(method.join(made), method=method)
        seconds = run.elapsed()
    except Interrupted as error:
        if run.stopped == "SIGTERM":
            raise SystemExit(143) from error  # what a shell calls an end by this signal
        raise
    if not run.frozen:
        try:
            with ALONE, threads(rows * sites.size):
                diagnostics.warn(diagnostics.at_fit(posterior))
        except KeyboardInterrupt:
            warnings.warn(
                "The fit is done and its checks were interrupted: posterior.diagnose() makes them.",
                ConvergenceWarning,
                stacklevel=outside(),
            )
    if run.cut and not run.frozen:
        again = "" if run.folder is None else " Call the same fit again to go on."
        warnings.warn(
            f"The fit was stopped ({run.stopped}): the posterior is what there was by then, and "
            f"incomplete.{again}",
            ConvergenceWarning,
            stacklevel=outside(),
        )
    return replace(posterior, seed=seed, seconds=seconds, complete=not run.cut)


def _one_part(method: Method) -> str:
    if not method.runs:
        return f"{method!r} is one piece of work, which no executor divides. Leave executor out."
    count = getattr(method, method.runs)
    return (
        f"{method!r} is one piece of work: its {method.runs} are computed side by side, in one "
        f"call. For an executor divide it, for example with parts={min(count, 4)}."
    )


def seed_sequence(seed: Any) -> np.random.SeedSequence:
    """The root of a tree of seeds.

    Raises:
        TypeError: not a whole number.
        ValueError: below 0 or not below 2**64.
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise TypeError(f"seed is {seed!r}. Pass a whole number, for example seed=0.")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}. Pass a whole number from 0 below 2**64.")
    return np.random.SeedSequence(int(seed))
