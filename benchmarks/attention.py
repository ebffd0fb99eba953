"""Steps of Dirichlet attention, and of maximum a posteriori on the same transformer.

In CPU time of one thread, on which other work of the machine has less effect.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from benchmarks.common import alternate, arguments, begin, compare, step_time

SIZES = {"S": (8, 32), "M": (16, 64), "L": (16, 128)}  # tokens, width; 2 layers of 4 heads
ANCHORS = ("bnn MAP", "bnn MAP, compiled")
Timed = Callable[[], float]


def problem(tokens: int, width: int) -> tuple[Any, Any, Any]:
    """A transformer of 8 features a token and 10 labels, and noise for data: 1,000 rows."""
    import torch

    from bnn.models import transformer_classification

    torch.manual_seed(0)
    x, y = torch.randn(1_000, tokens, 8), torch.randint(10, (1_000,))
    return transformer_classification(tokens, 10, features=8, width=width), x, y


def timed(method: Any, given: tuple[Any, Any, Any], compiled: bool, steps: int) -> Timed:
    """The median CPU time of a step on 100 rows, compiled or as the model is written."""
    import bnn

    settings = {"learning_rate": 1e-3, "schedule": "constant", "batch_size": 100, "draws": 1}
    made = dataclasses.replace(method, steps=steps, **settings)
    return lambda: step_time(lambda: bnn.fit(*given, method=made, progress=False), compiled)


def contenders(tokens: int, width: int, steps: int) -> dict[str, Timed]:
    """Both routes of `MAP` and of the default; the others as they run where fits are long."""
    import bnn

    given, dirichlet = problem(tokens, width), bnn.DirichletAttention
    methods = {
        "MAP": (bnn.MAP(), False),
        "dirichlet": (dirichlet(), False),
        "MAP, compiled": (bnn.MAP(), True),
        "dirichlet, compiled": (dirichlet(), True),
        "uniform prior, compiled": (dirichlet(prior="uniform"), True),
        "contextual prior, compiled": (dirichlet(prior="contextual"), True),
        "evidence, compiled": (dirichlet(concentration="evidence"), True),
        "weibull, compiled": (dirichlet(family="weibull"), True),
        "lognormal, compiled": (dirichlet(family="lognormal"), True),
    }
    return {f"bnn {k}": timed(m, given, *rest, steps) for k, (m, *rest) in methods.items()}


def main() -> None:
    args = arguments(__doc__, tuple(SIZES)).parse_args()
    if args.quick:
        args.sizes, args.repeats = ["S"], 2
    begin("Steps of attention", args.cores)
    for size in args.sizes:
        tokens, width = SIZES[size]
        timed = contenders(tokens, width, 10 if args.quick else 100)
        times = alternate(timed, args.repeats)
        title = f"{size}: {tokens} tokens of width {width}, 2 layers, 4 heads, 100 rows a step"
        compare(title, "CPU ms / step", times, ANCHORS, value=lambda s: 1e3 * s)


if __name__ == "__main__":
    main()
