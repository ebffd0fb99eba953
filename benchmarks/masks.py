"""Microseconds of a training step under masks: MC dropout against GFlowOut on the same net."""

from collections.abc import Callable
from typing import Any

from benchmarks.common import (
    PROBLEMS,
    alternate,
    arguments,
    begin,
    compare,
    step_time,
    torch_data,
)

CASES = {"M": ("M", 128), "M-all": ("M", 1_000), "XL": ("XL", 128)}  # problem, rows of a batch
DROPOUT = "bnn.MCDropout(rate=.5)"
Timed = Callable[[], float]


def model_of(size: str) -> Any:
    """The problem's net with its hidden layers announced; see `benchmarks.common.Problem`."""
    from bnn.models import mlp_classification, mlp_regression

    inputs, *hidden, outputs = PROBLEMS[size].widths
    if PROBLEMS[size].labels:
        return mlp_classification(inputs, outputs, hidden)
    return mlp_regression(inputs, hidden)


def methods() -> dict[str, Callable[..., Any]]:
    """By the name of their row."""
    import bnn

    balance = {"objective": "trajectory_balance", "particles": 1}
    return {
        DROPOUT: lambda **k: bnn.MCDropout(rate=0.5, **k),
        "bnn.GFlowOut()": bnn.GFlowOut,
        "bnn.GFlowOut(blocks=2)": lambda **k: bnn.GFlowOut(blocks=2, **k),
        "bnn.GFlowOut(blocks=4)": lambda **k: bnn.GFlowOut(blocks=4, **k),
        "bnn.GFlowOut(trajectory balance)": lambda **k: bnn.GFlowOut(**balance, **k),
        "bnn.GFlowOut(conditional=False)": lambda **k: bnn.GFlowOut(conditional=False, **k),
    }


def timed(case: str, method: Callable[..., Any], compiled: bool, steps: int) -> Timed:
    """The median processor time of a step, compiled or as the model is written."""
    import bnn

    size, batch = CASES[case]
    given = model_of(size), *torch_data(PROBLEMS[size])
    settings = {"schedule": "constant", "draws": 1, "learning_rate": 1e-3, "steps": steps}
    made = method(batch_size=None if batch == PROBLEMS[size].rows else batch, **settings)
    fit = lambda: bnn.fit(*given, method=made, seed=1, progress=False)
    return lambda: step_time(fit, compiled)


def main() -> None:
    args = arguments(__doc__, tuple(CASES)).parse_args()
    if args.quick:
        args.sizes, args.repeats = ["M"], 2
    begin("Masks", args.cores)
    for case in args.sizes:
        size, batch = CASES[case]
        for compiled in (False, True):
            steps = 20 if args.quick else 1_000 if compiled else 100
            given = {name: timed(case, each, compiled, steps) for name, each in methods().items()}
            route = "compiled" if compiled else "as the model is written"
            title = f"{case}: {PROBLEMS[size]}; batches of {batch}; {route}"
            times = alternate(given, args.repeats)
            compare(title, "us / step", times, [DROPOUT], value=lambda s: 1e6 * s)


if __name__ == "__main__":
    main()
