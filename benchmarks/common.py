"""What the benchmarks share: problems, models, fresh processes, timing in turn, tables.

Torch and JAX are imported where they are used, because a benchmark pins itself to its cores first.
"""

import argparse
import math
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from multiprocessing import get_context
from time import perf_counter, process_time
from typing import Any
from unittest.mock import patch

import numpy as np

PACKAGES = ("torch", "pyro-ppl", "numpyro", "jax", "arviz")
TESTED = 20  # rows at which f is compared


@dataclass(frozen=True)
class Problem:
    """A fully connected tanh net and its data.

    w ~ N(0, 1 / sqrt(inputs of the layer)), b ~ N(0, 1). With one output y ~ N(f, sigma),
    sigma ~ HalfNormal(1); with several, y is a label with logits f.

    Attributes:
        widths: of the layers, inputs first.
        rows: of the data.
        noise: standard deviation of what is added to the true f.
    """

    widths: tuple[int, ...]
    rows: int
    noise: float = 0.0

    @property
    def labels(self) -> bool:
        """True if y is a label."""
        return self.widths[-1] > 1

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of each layer."""
        return list(pairwise(self.widths))

    def __str__(self) -> str:
        return f"{'-'.join(map(str, self.widths))}, {self.rows} rows"

    def data(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows x (row, input) and y (row,), and test inputs (TESTED, input); always the same."""
        rng, inputs = np.random.default_rng(0), self.widths[0]
        if self.labels:
            x = rng.normal(size=(self.rows, inputs))
            y = rng.integers(self.widths[-1], size=self.rows)
            return x.astype(np.float32), y, x[:TESTED].astype(np.float32)
        if inputs == 1:
            x, x_test = rng.uniform(-2, 2, (self.rows, 1)), np.linspace(-2.5, 2.5, TESTED)[:, None]
        else:
            x, x_test = rng.normal(size=(self.rows, inputs)), rng.normal(size=(TESTED, inputs))
        y = _truth(x) + self.noise * rng.normal(size=self.rows)
        return x.astype(np.float32), y.astype(np.float32), x_test.astype(np.float32)

    def f(self, draws: Mapping[str, Any], x: np.ndarray) -> np.ndarray:
        """The net's output at draws (chain, draw, *site) of a regression: (chain, draw, row)."""
        h = x.astype(np.float64)
        for i in range(len(self.layers)):
            h = np.tanh(h) if i else h
            h = h @ np.asarray(draws[f"w{i}"], float) + np.asarray(draws[f"b{i}"])[..., None, :]
        return h[..., 0]


def _truth(x: np.ndarray) -> np.ndarray:
    """The f that made the data, (row,)."""
    if x.shape[1] == 1:
        return np.sin(3 * x[:, 0]) * x[:, 0]
    directions = np.random.default_rng(123).normal(size=(x.shape[1], 4)) / math.sqrt(x.shape[1])
    a, b, c, d = (x @ directions).T
    return np.sin(1.5 * a) + 0.7 * np.tanh(2 * b * c) + 0.4 * d


PROBLEMS = {
    "S": Problem((1, 16, 1), 100, 0.1),
    "M": Problem((8, 50, 1), 1_000, 0.3),
    "L": Problem((13, 50, 50, 1), 500, 0.3),
    "XL": Problem((784, 400, 400, 10), 128),
}


def pyro_model(problem: Problem) -> Callable[..., None]:
    """The problem in Pyro: what Pyro and bnn are both given."""
    import pyro
    import pyro.distributions as dist
    import torch

    def model(x, y=None):
        sigma = None if problem.labels else pyro.sample("sigma", dist.HalfNormal(x.new_ones(())))
        h = x
        for i, (a, b) in enumerate(problem.layers):
            w = pyro.sample(f"w{i}", dist.Normal(x.new_zeros(a, b), a**-0.5).to_event(2))
            c = pyro.sample(f"b{i}", dist.Normal(x.new_zeros(b), 1.0).to_event(1))
            if w.ndim > 2:  # (particle, 1, a, b) where Pyro runs its particles or draws together
                w = w.squeeze(-3)
            h = (torch.tanh(h) if i else h) @ w + c
        with pyro.plate("data", len(x)):
            if problem.labels:
                pyro.sample("y", dist.Categorical(logits=h), obs=y)
            else:
                pyro.sample("y", dist.Normal(h.squeeze(-1), sigma), obs=y)

    return model


def numpyro_model(problem: Problem) -> Callable[..., None]:
    """The problem in NumPyro."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    def model(x, y=None):
        sigma = None if problem.labels else numpyro.sample("sigma", dist.HalfNormal(1.0))
        h = x
        for i, (a, b) in enumerate(problem.layers):
            w = numpyro.sample(f"w{i}", dist.Normal(jnp.zeros((a, b)), a**-0.5).to_event(2))
            c = numpyro.sample(f"b{i}", dist.Normal(jnp.zeros(b), 1.0).to_event(1))
            h = (jnp.tanh(h) if i else h) @ w + c
        with numpyro.plate("data", len(x)):
            if problem.labels:
                numpyro.sample("y", dist.Categorical(logits=h), obs=y)
            else:
                numpyro.sample("y", dist.Normal(h.squeeze(-1), sigma), obs=y)

    return model


def torch_data(problem: Problem) -> tuple[Any, Any]:
    """The data, x and y, as torch tensors."""
    import torch

    x, y, _ = problem.data()
    return torch.from_numpy(x), torch.from_numpy(y)


def jax_data(problem: Problem) -> tuple[Any, Any]:
    """The data, x and y, as JAX arrays."""
    import jax.numpy as jnp

    x, y, _ = problem.data()
    return jnp.asarray(x), jnp.asarray(y)


# Processes and time ------------------------------------------------------------------------------


def arguments(doc: str, sizes: Sequence[str] = (), repeats: int = 4) -> argparse.ArgumentParser:
    """The options that the benchmarks have in common."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    if sizes:
        parser.add_argument("--sizes", nargs="+", choices=sizes, default=list(sizes))
    if repeats:
        parser.add_argument("--repeats", type=int, default=repeats, help="even: both orders")
    parser.add_argument("--cores", type=int, default=1, help="for every contender (default 1)")
    parser.add_argument("--quick", action="store_true", help="seconds; the numbers mean nothing")
    return parser


def begin(title: str, cores: int, threads: int | None = None) -> None:
    """Holds this process and its children to the same cores, and says on what they run.

    Torch and XLA start as many threads as there are cores to run on, unless `threads` says less.
    """
    pinned = "not pinned"
    if hasattr(os, "sched_setaffinity"):
        chosen = sorted(os.sched_getaffinity(0))[:cores]
        os.sched_setaffinity(0, chosen)
        cores, pinned = len(chosen), "pinned"
    threads = threads or cores
    os.environ["OMP_NUM_THREADS"] = str(threads)
    warnings.simplefilter("ignore")  # what a short run warns of stands in the tables
    load = os.getloadavg()[0]
    print(f"# {title}\n")
    print(f"{cores} of {os.cpu_count()} cores ({pinned}), {threads} torch threads; float32.")
    print(f"Load before the start: {load:.1f}. " + ", ".join(map(_version, PACKAGES)) + ".")
    if load > 0.5:
        print("The machine was busy: do not quote these numbers.")


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} absent"


def fresh(function: Callable[..., Any], *args: Any, caches: str | None = None) -> Any:
    """Calls a function in a new Python process, where nothing is imported or compiled yet.

    Args:
        function: at the top level of a module.
        *args: for it.
        caches: folder for what compilers keep on disk; None takes a new one.
    """
    with tempfile.TemporaryDirectory() as empty:
        names = ("TORCHINDUCTOR_CACHE_DIR", "NUMBA_CACHE_DIR", "XDG_CACHE_HOME")
        settings = dict.fromkeys(names, caches or empty) | {"PYTHONWARNINGS": "ignore"}
        with patch.dict(os.environ, settings):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                return pool.submit(function, *args).result()


def elapsed(function: Callable[..., Any], *args: Any) -> float:
    """Seconds that one call takes."""
    start = perf_counter()
    function(*args)
    return perf_counter() - start


def per_call(function: Callable[[], Any], seconds: float) -> float:
    """Seconds a call takes, the mean over about `seconds` of calls after one to warm up."""
    function()
    count = max(1, int(seconds / elapsed(function)))
    return elapsed(lambda: [function() for _ in range(count)]) / count


def per_step(fit: Callable[[int], Any], seconds: float, few: int = 20) -> Callable[[], float]:
    """Times a step of `fit(steps)` by two fits of different length: set-up takes no part in it.

    Args:
        fit: of so many steps.
        seconds: that are timed, about.
        few: steps of the shorter fit. Where long fits compile and short ones do not, both are to.

    Returns:
        A function that fits both and gives the seconds of a step; the longer fit takes about
        `seconds` more than the shorter.
    """
    many = 4 * few
    fit(few)  # compilers have then filled their caches
    base = elapsed(fit, few)
    while elapsed(fit, many) - base < seconds:
        many *= 3
    return lambda: max(elapsed(fit, many) - elapsed(fit, few), 0.0) / (many - few)


def step_time(fit: Callable[[], Any], compiled: bool) -> float:
    """The median processor time of an optimiser step of a fit of bnn, in seconds.

    Args:
        fit: what is run; its first five steps are left out.
        compiled: whether steps are compiled, however few, or run as the model is written.
    """
    from bnn.inference import _step

    taken: list[float] = []
    call = _step.Step.__call__

    def watched(step: Any, *args: Any) -> Any:
        if (step.route == "compiled") != compiled:
            raise RuntimeError(f"A step took the route {step.route!r}.")
        start = process_time()
        outcome = call(step, *args)
        taken.append(process_time() - start)
        return outcome

    repays = patch.object(_step, "_COMPILING", 0.0 if compiled else math.inf)
    with patch.object(_step.Step, "__call__", watched), repays:
        fit()
    return statistics.median(taken[5:])


def in_turn(order: Iterable[Any], repeat: int) -> list[Any]:
    """A B C in even repeats, C B A in odd ones."""
    return list(order)[:: -1 if repeat % 2 else 1]


def alternate(
    contenders: Mapping[str, Callable[[], float]], repeats: int
) -> dict[str, list[float]]:
    """What each contender returns, called in turn: A B C, C B A, A B C, ..."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats):
        for name in in_turn(contenders, repeat):
            taken[name].append(contenders[name]())
    return taken


# Tables ------------------------------------------------------------------------------------------


def compare(
    title: str,
    unit: str,
    seconds: Mapping[str, Sequence[float]],
    anchors: Sequence[str],
    *,
    value: Callable[[float], float],
) -> None:
    """Prints the median and range of each contender, and its speed in that of the anchors.

    Args:
        title: above the table.
        unit: of `value`.
        seconds: contender -> seconds in each repeat.
        anchors: contenders whose speed is 1.
        value: what to print of a number of seconds.
    """
    rows = []
    for name, times in seconds.items():
        low, high = sorted((value(min(times)), value(max(times))))
        speeds = [statistics.median(seconds[a]) / statistics.median(times) for a in anchors]
        middle = value(statistics.median(times))
        rows.append([name, f"{middle:.4g}", f"{low:.3g}-{high:.3g}", *(f"{s:.3g}" for s in speeds)])
    table(title, ["", unit, "range", *(f"speed, {a} = 1" for a in anchors)], rows)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a Markdown table."""
    lines = [list(header), *map(list, rows)]
    width = [max(len(line[i]) for line in lines) for i in range(len(header))]
    rule = ["-" * width[0], *("-" * (w - 1) + ":" for w in width[1:])]
    print(f"\n## {title}\n")
    for cells in (lines[0], rule, *lines[1:]):
        first = cells[0].ljust(width[0])
        rest = [cell.rjust(w) for cell, w in zip(cells[1:], width[1:], strict=True)]
        print("| " + " | ".join([first, *rest]) + " |", flush=True)


def count(number: int, noun: str) -> str:
    """The number and the noun, in the plural where it is called for."""
    return f"{number} {noun}{'s' * (number > 1)}"


def skipped(name: str, why: str) -> None:
    """Says that a contender takes no part."""
    print(f"\nskipped {name}: {why}", flush=True)
