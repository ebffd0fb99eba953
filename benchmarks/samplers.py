"""Effective samples per second, and whether they are right: bnn against Pyro and NumPyro.

Every sampler runs in a process of its own with empty compile caches. Its total time is all that
follows the imports: tracing, compiling, warmup, draws. A second process with the same seed keeps
only a few draws; the difference of the two is the steady state.
"""

import math
import statistics
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.common import (
    PROBLEMS,
    Problem,
    arguments,
    begin,
    fresh,
    in_turn,
    jax_data,
    numpyro_model,
    pyro_model,
    skipped,
    table,
    torch_data,
)

FEW = 4  # draws of the run that measures everything but draws
PEERS = {"warmup": 1_000, "draws": 1_000}  # where the command line names no other
REFERENCE = {"chains": 16, "warmup": 1_000, "draws": 4_000, "target": 0.95}
HEADER = (
    *("", "s total / steady / imports", "ESS f min / f median / sigma", "per total s"),
    *("per steady s", "speed f min / sigma, best NumPyro = 1", "us a gradient"),
    *("ESS per 1,000 gradients", "R-hat f / sigma", "divergences", "abs z f / sigma", "sd ratios"),
)
Result = tuple[dict[str, Any], int | None, float]  # draws (chain, draw, *site); see `run`
Sample = Callable[[], Result]


class _OutOfTime(Exception):
    """Ends Pyro's sampler when its time is up."""


# Each of the three imports what it needs and returns the work that is timed.


def bnn_sampler(
    problem: Problem, seed: int, settings: dict[str, int], cap: float, *, method: str, **own: int
) -> Sample:
    """A method of bnn with these settings, its `own` first, and its defaults for all others."""
    import bnn

    def sample() -> Result:
        chosen = getattr(bnn, method)(**settings | own)
        posterior = bnn.fit(
            pyro_model(problem), *torch_data(problem), method=chosen, seed=seed, progress=False
        )
        divergent, steps = (posterior.stats.get(k) for k in ("diverging", "n_steps"))
        count = None if divergent is None else int(divergent.sum())
        gradients = math.nan if steps is None else float(steps.sum())
        return {k: v.numpy() for k, v in posterior.draws.items()}, count, gradients

    return sample


def pyro_nuts(problem: Problem, seed: int, settings: dict[str, int], cap: float) -> Sample:
    """One chain of Pyro's NUTS; the draws that it has after `cap` seconds."""
    import pyro
    import torch
    from pyro.infer import MCMC, NUTS

    warmup, draws = (settings.get(k, PEERS[k]) for k in ("warmup", "draws"))

    def sample() -> Result:
        kernel, kept, start = NUTS(pyro_model(problem)), [], perf_counter()
        divergent: list[int] = []

        def keep(_: Any, free: dict[str, Any], stage: str, __: int) -> None:
            if not stage.lower().startswith("warmup"):
                to_free = kernel.transforms
                divergent[:] = kernel.diagnostics()["divergences"]
                kept.append({k: to_free[k].inv(v) if k in to_free else v for k, v in free.items()})
            if perf_counter() - start > cap:
                raise _OutOfTime

        pyro.set_rng_seed(seed)
        chain = MCMC(kernel, draws, warmup_steps=warmup, disable_progbar=True, hook_fn=keep)
        try:
            chain.run(*torch_data(problem))
        except _OutOfTime:
            if not kept:
                raise TimeoutError(f"still in warmup after {cap:g} s") from None
        sites = {k: torch.stack([draw[k] for draw in kept])[None].numpy() for k in kept[0]}
        return sites, len(divergent), math.nan

    return sample


def numpyro_nuts(
    problem: Problem,
    seed: int,
    settings: dict[str, int],
    cap: float,
    *,
    chains: int,
    how: str,
    target: float = 0.8,
) -> Sample:
    """NumPyro's NUTS, depth 10; `how` it runs its chains: sequential, vectorized, parallel."""
    import jax
    import numpyro

    numpyro.set_host_device_count(chains if how == "parallel" else 1)
    warmup, draws = (settings.get(k, PEERS[k]) for k in ("warmup", "draws"))

    def sample() -> Result:
        kernel = numpyro.infer.NUTS(
            numpyro_model(problem), target_accept_prob=target, max_tree_depth=10
        )
        mcmc = numpyro.infer.MCMC(
            kernel,
            num_warmup=warmup,
            num_samples=draws,
            num_chains=chains,
            chain_method=how,
            progress_bar=False,
        )
        counted = ("diverging", "num_steps")
        mcmc.run(jax.random.PRNGKey(seed), *jax_data(problem), extra_fields=counted)
        kept = {k: np.asarray(v) for k, v in mcmc.get_samples(group_by_chain=True).items()}
        divergences, gradients = (float(mcmc.get_extra_fields()[k].sum()) for k in counted)
        return kept, int(divergences), gradients

    return sample


SAMPLERS: dict[str, Callable[..., Sample]] = {
    "bnn-nuts": partial(bnn_sampler, method="NUTS"),
    "bnn-nuts-short": partial(bnn_sampler, method="NUTS", warmup=100),
    **{f"bnn-nuts-{n}": partial(bnn_sampler, method="NUTS", chains=n) for n in (4, 64)},
    "bnn-mclmc": partial(bnn_sampler, method="MCLMC"),
    "pyro-nuts": pyro_nuts,
    **{
        f"numpyro-{how}-{chains}": partial(numpyro_nuts, chains=chains, how=how)
        for chains in (4, 16)
        for how in ("sequential", "vectorized")
    },
}


def run(
    sampler: Callable[..., Sample], size: str, seed: int, settings: dict[str, int], cap: float
) -> dict[str, Any]:
    """One run, in a fresh process.

    Returns:
        seconds, imports (s), divergences, gradients (of the draws kept, over all chains; NaN where
        they are not counted), and columns (chain, draw, column): f at the test rows, then sigma.
    """
    problem = PROBLEMS[size]
    start = perf_counter()
    sample = sampler(problem, seed, settings, cap)
    imported = perf_counter()
    draws, divergences, gradients = sample()
    seconds = perf_counter() - imported
    f = problem.f(draws, problem.data()[2])
    return {
        "seconds": seconds,
        "imports": imported - start,
        "divergences": divergences,
        "gradients": gradients,
        "columns": np.concatenate([f, draws["sigma"][..., None]], -1),
    }


# What a run is worth ------------------------------------------------------------------------------


def effective(columns: np.ndarray, method: str) -> np.ndarray:
    """ArviZ's effective sample size of each column, (column,)."""
    import arviz

    return np.array([float(arviz.ess(one, method=method)) for one in _each(columns)])


def rhat(columns: np.ndarray) -> np.ndarray:
    """ArviZ's rank-normalised split R-hat of each column, (column,); NaN of one chain."""
    import arviz

    return np.array([float(arviz.rhat(one)) for one in _each(columns)])


def _each(columns: np.ndarray) -> np.ndarray:
    """(chain, draw, column) -> (column, chain, draw)."""
    return np.ascontiguousarray(np.moveaxis(columns, -1, 0))


def deviation(columns: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far a run is from the reference, in Monte Carlo errors of both; and sd ratios, (column,).

    z = (mean - reference mean) / sqrt(var / ESS + reference var / reference ESS)
    """
    mean, true_mean = columns.mean((0, 1)), reference.mean((0, 1))
    var, true_var = columns.var((0, 1)), reference.var((0, 1))
    error = var / effective(columns, "mean") + true_var / effective(reference, "mean")
    return (mean - true_mean) / np.sqrt(error), np.sqrt(var / true_var)


def judged(whole: dict[str, Any], few: dict[str, Any], reference: np.ndarray | None) -> dict:
    """The numbers of a run."""
    columns, seconds = whole["columns"], whole["seconds"]
    *ess, ess_sigma = effective(columns, "bulk")
    *spread, spread_sigma = rhat(columns)
    z, ratio = (np.full(len(ess) + 1, math.nan),) * 2
    if reference is not None:
        z, ratio = deviation(columns, reference)
    return {
        "seconds": (seconds, max(seconds - few["seconds"], 1e-9), whole["imports"]),
        "ess": np.array([min(ess), statistics.median(ess), ess_sigma]),
        "rhat": (max(spread), spread_sigma),
        "divergences": whole["divergences"],
        "gradients": whole["gradients"],
        "z": (max(abs(z[:-1])), abs(z[-1])),
        "ratio": (min(ratio), max(ratio)),
    }


def summary(rows: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """The lines of the table: medians over seeds of what is fast, the worst of what is right."""

    def over_seeds(pick: Callable[..., Any], numbers: Iterable[Any]) -> list[float]:
        return [pick(each) for each in zip(*numbers, strict=True)]

    def rate(name: str, which: int) -> list[float]:
        return over_seeds(statistics.median, (r["ess"] / r["seconds"][which] for r in rows[name]))

    peers = [rate(name, 0) for name in rows if name.startswith("numpyro")]
    best = over_seeds(max, peers) if peers else [math.nan] * 3
    lines = []
    for name, runs in rows.items():
        speed = rate(name, 0)
        counts = [run["divergences"] for run in runs]
        low, high = over_seeds(tuple, (run["ratio"] for run in runs))
        cells = (
            over_seeds(statistics.median, (run["seconds"] for run in runs)),
            over_seeds(statistics.median, (run["ess"] for run in runs)),
            speed,
            rate(name, 1),
            (speed[0] / best[0], speed[2] / best[2]),
            (statistics.median(1e6 * run["seconds"][1] / run["gradients"] for run in runs),),
            over_seeds(statistics.median, (1e3 * r["ess"] / r["gradients"] for r in runs)),
            over_seeds(max, (run["rhat"] for run in runs)),
            (math.nan if None in counts else statistics.median(counts),),
            over_seeds(max, (run["z"] for run in runs)),
            (min(low), max(high)),
        )
        lines.append([name, *(" / ".join(map(_short, cell)) for cell in cells)])
    return lines


def _short(number: float) -> str:
    return "-" if math.isnan(number) else f"{number:.0f}" if number >= 1_000 else f"{number:.3g}"


def make_reference(size: str, folder: Path, settings: dict[str, int]) -> None:
    """Stores a long NumPyro run of 16 chains: f at the test rows and sigma."""
    chosen = REFERENCE | settings
    sampler = partial(
        numpyro_nuts, chains=chosen["chains"], how="sequential", target=chosen["target"]
    )
    lengths = {k: chosen[k] for k in ("warmup", "draws")}
    made = fresh(run, sampler, size, 20_000, lengths, 0.0)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / f"{size}.npz", columns=made["columns"].astype(np.float32))
    ess, spread = effective(made["columns"], "mean"), rhat(made["columns"])
    print(
        f"\n{folder / size}.npz: {made['seconds']:.0f} s, least ESS {min(ess):.0f}, "
        f"largest R-hat {max(spread):.3f}, {made['divergences']} divergences"
    )


def measure(
    size: str,
    names: list[str],
    seeds: list[int],
    settings: dict[str, int],
    cap: float,
    reference: np.ndarray | None,
) -> None:
    """Runs every sampler for every seed, in both orders, and prints the table of a problem."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for repeat, seed in enumerate(seeds):
        for name in in_turn(names, repeat):
            lengths = {"whole": settings, "few": settings | {"draws": FEW}}
            try:
                runs = {
                    length: fresh(run, SAMPLERS[name], size, seed, lengths[length], cap)
                    for length in in_turn(lengths, repeat)
                }
            except Exception as error:  # the others may take hours, and go on
                skipped(f"{name}, seed {seed}", f"{type(error).__name__}: {error}")
                continue
            rows[name].append(judged(runs["whole"], runs["few"], reference))
            print(f"{size} {name} seed {seed}: {runs['whole']['seconds']:.1f} s", file=sys.stderr)
    done = {name: found for name, found in rows.items() if found}
    title = f"{size}: {PROBLEMS[size]}; seeds {', '.join(map(str, seeds))}"
    table(title, HEADER, summary(done))


def main() -> None:
    parser = arguments(__doc__, ("S", "M", "L"), repeats=0)
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2], help="even: both orders")
    parser.add_argument("--warmup", type=int, help="of every sampler, in place of its default")
    parser.add_argument("--draws", type=int, help="the same, of each chain")
    parser.add_argument("--cap", type=float, default=600.0, help="seconds for Pyro, default 600")
    parser.add_argument("--reference", type=Path, help="folder of the long runs to compare with")
    parser.add_argument("--make-reference", action="store_true", help="write them there, and end")
    args = parser.parse_args()
    if args.make_reference and not args.reference:
        parser.error("--make-reference needs --reference FOLDER")
    if args.quick:
        args.sizes, args.seeds, args.warmup, args.draws, args.cap = ["S"], [1], 20, 20, 5.0
        args.samplers = ["bnn-nuts", "bnn-mclmc", "pyro-nuts", "numpyro-vectorized-4"]
    lengths = {"warmup": args.warmup, "draws": args.draws}
    settings = {k: v for k, v in lengths.items() if v is not None}
    begin("Samplers", args.cores)
    for size in args.sizes:
        if args.make_reference:
            make_reference(size, args.reference, settings)
            continue
        reference = None
        if args.reference:
            reference = np.load(args.reference / f"{size}.npz")["columns"].astype(float)
        measure(size, args.samplers, args.seeds, settings, args.cap, reference)


if __name__ == "__main__":
    main()
