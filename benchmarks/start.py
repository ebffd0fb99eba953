"""Seconds that a user waits: to import bnn, and for the first NUTS draw of a new process."""

import math
import subprocess
import sys
import tempfile
from functools import partial
from time import perf_counter

from benchmarks.common import PROBLEMS, alternate, arguments, begin, compare, elapsed, fresh
from benchmarks.samplers import bnn_sampler, numpyro_nuts, pyro_nuts

IMPORTS = ("import torch, pyro", "import torch, pyro, bnn")
SAMPLERS = {
    "Pyro": pyro_nuts,
    "NumPyro": partial(numpyro_nuts, chains=1, how="sequential"),
    "bnn": partial(bnn_sampler, method="NUTS", chains=1),
}
PEERS = {1: ("Pyro", "NumPyro"), 200: ("NumPyro",)}  # by warmup: 200 is that of `bnn.NUTS`


def importing(statement: str) -> float:
    """Seconds of a new interpreter that runs one statement and ends."""
    return elapsed(partial(subprocess.run, [sys.executable, "-c", statement], check=True))


def first_draw(sampler: str, warmup: int) -> float:
    """Seconds from before the imports to one draw of problem S."""
    start = perf_counter()
    SAMPLERS[sampler](PROBLEMS["S"], 0, {"warmup": warmup, "draws": 1}, math.inf)()
    return perf_counter() - start


def first_draws(warmup: int, repeats: int) -> dict[str, list[float]]:
    """The peers, and bnn with empty and with filled compile caches."""
    with tempfile.TemporaryDirectory() as kept:
        fresh(first_draw, "bnn", warmup, caches=kept)
        contenders = {
            **{peer: partial(fresh, first_draw, peer, warmup) for peer in PEERS[warmup]},
            "bnn, empty compile caches": partial(fresh, first_draw, "bnn", warmup),
            "bnn, filled compile caches": partial(fresh, first_draw, "bnn", warmup, caches=kept),
        }
        return alternate(contenders, repeats)


def main() -> None:
    args = arguments(__doc__).parse_args()
    repeats = 1 if args.quick else args.repeats
    begin("Start", args.cores)
    statements = {statement: partial(importing, statement) for statement in IMPORTS}
    times = alternate(statements, repeats)
    compare("Import", "s", times, IMPORTS[:1], value=float)
    for warmup in [1] if args.quick else PEERS:
        times = first_draws(warmup, repeats)
        title = f"First draw of S: one chain, {warmup} of warmup"
        compare(title, "s", times, ["NumPyro"], value=float)


if __name__ == "__main__":
    main()
