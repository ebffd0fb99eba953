"""Milliseconds for a posterior predictive of 1,000 draws: bnn against Pyro's Predictive."""

from collections.abc import Callable
from itertools import product

from benchmarks.common import (
    PROBLEMS,
    Problem,
    alternate,
    arguments,
    begin,
    compare,
    per_call,
    pyro_model,
    torch_data,
)

DRAWS = 1_000
ONE_BY_ONE = "Pyro Predictive, draw after draw"
Timed = Callable[[], float]


def contenders(problem: Problem, rows: int, seconds: float) -> dict[str, Timed]:
    """Who predicts new rows from the same draws of a quick variational fit."""
    import pyro
    import torch
    from pyro.infer import Predictive

    import bnn

    model, x = pyro_model(problem), torch.randn(rows, problem.widths[0])
    method = bnn.SVI(steps=100, draws=DRAWS, schedule="constant")
    posterior = bnn.fit(model, *torch_data(problem), method=method, progress=False)
    draws = {name: each[0] for name, each in posterior.draws.items()}  # (draw, *site)
    apart = {
        name: each[:, None] for name, each in draws.items()
    }  # (draw, 1, *site): below the rows

    def predictive(samples: dict, *, parallel: bool) -> Timed:
        program = Predictive(model, samples, parallel=parallel)

        def timed() -> float:
            with torch.no_grad(), pyro.validation_enabled(False):
                return per_call(lambda: program(x), seconds)

        return timed

    return {
        ONE_BY_ONE: predictive(draws, parallel=False),
        "Pyro Predictive, parallel": predictive(apart, parallel=True),
        "bnn": lambda: per_call(lambda: posterior.predict(x), seconds),
    }


def main() -> None:
    parser = arguments(__doc__, ("S", "M"))
    parser.add_argument("--rows", nargs="+", type=int, default=[100, 1_000])
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.rows, args.repeats = ["S"], [20], 2
    begin(f"Prediction from {DRAWS:,} draws", args.cores)
    for size, rows in product(args.sizes, args.rows):
        timed = contenders(PROBLEMS[size], rows, 0.01 if args.quick else 1.0)
        title = f"{size}: {PROBLEMS[size]}; {rows:,} rows to predict"
        times = alternate(timed, args.repeats)
        compare(title, "ms", times, [ONE_BY_ONE], value=lambda s: 1e3 * s)


if __name__ == "__main__":
    main()
