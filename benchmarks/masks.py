"""Microseconds of a training step under masks: MC dropout against GFlowOut on the same net."""

from collections.abc import Callable
from typing import Any

from benchmarks.common import PROBLEMS, alternate, arguments, begin, compare, per_step, torch_data

BATCH = 128
CASES = ("M", "XL")
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
        "bnn.GFlowOut(blocks=1)": lambda **k: bnn.GFlowOut(blocks=1, **k),
        "bnn.GFlowOut(trajectory balance)": lambda **k: bnn.GFlowOut(**balance, **k),
        "bnn.GFlowOut(conditional=False)": lambda **k: bnn.GFlowOut(conditional=False, **k),
    }


def timed(size: str, method: Callable[..., Any], seconds: float) -> Timed:
    """Seconds of a step on batches of 128 rows."""
    import bnn

    model, data = model_of(size), torch_data(PROBLEMS[size])
    batch = min(BATCH, PROBLEMS[size].rows)
    common = {"schedule": "constant", "draws": 1, "learning_rate": 1e-3, "batch_size": batch}

    def fit(steps: int) -> None:
        bnn.fit(model, *data, method=method(steps=steps, **common), progress=False)

    return per_step(fit, seconds)


def main() -> None:
    parser = arguments(__doc__, CASES)
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.repeats = ["M"], 2
    begin("Masks", args.cores)
    for size in args.sizes:
        given = {
            name: timed(size, method, 0.1 if args.quick else 3.0)
            for name, method in methods().items()
        }
        compare(
            f"{size}: {PROBLEMS[size]}; batches of {BATCH}",
            "us / step",
            alternate(given, args.repeats),
            [DROPOUT],
            value=lambda s: 1e6 * s,
        )


if __name__ == "__main__":
    main()
