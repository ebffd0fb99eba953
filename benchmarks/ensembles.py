"""Milliseconds to train all members of an ensemble by one step: a Python loop against bnn.

With `--sizes P` the seconds of Perone's demonstration, whole and compilation included: 40 members
of 1-20-20-1 with SELU, naive and with three kinds of randomized prior.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.common import (
    PROBLEMS,
    Problem,
    alternate,
    arguments,
    begin,
    compare,
    count,
    elapsed,
    per_step,
    pyro_model,
    torch_data,
)

RATE, BATCH = 1e-3, 128
CASES = dict.fromkeys(("M", "XL"), (10, 40))  # members, by problem
LOOP = "Python loop, one net after another"
DEMO = {"members": 40, "steps": 1_000, "learning_rate": 0.02, "schedule": "cosine"}
Timed = Callable[[], float]


def loop(problem: Problem, members: int, seconds: float) -> Timed:
    """A user's own loop: net after net, default Adam, minibatches, the log joint of the model."""
    import torch
    from torch import nn

    x, y = torch_data(problem)

    def loss_of(net: nn.Sequential, noise: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        f = net(x[rows])
        if problem.labels:
            misfit, prior = nn.functional.cross_entropy(f, y[rows]), torch.zeros(())
        else:
            sigma = noise.exp()
            misfit = (noise + (y[rows] - f.squeeze(-1)).square() / (2 * sigma**2)).mean()
            prior = sigma**2 / 2
        for layer in net:
            if isinstance(layer, nn.Linear):
                prior = prior + layer.weight.square().sum() * layer.in_features / 2
                prior = prior + layer.bias.square().sum() / 2
        return len(x) * misfit + prior

    def train(steps: int) -> None:
        for _ in range(members):
            layers = [m for a, b in problem.layers for m in (nn.Linear(a, b), nn.Tanh())]
            net, noise = nn.Sequential(*layers[:-1]), torch.zeros((), requires_grad=True)
            leaves = list(net.parameters()) if problem.labels else [*net.parameters(), noise]
            adam = torch.optim.Adam(leaves, lr=RATE)
            for _ in range(steps):
                adam.zero_grad()
                loss_of(net, noise, torch.randperm(len(x))[:BATCH]).backward()
                adam.step()

    return per_step(train, seconds)


def bnn_members(problem: Problem, members: int, seconds: float) -> Timed:
    """Modes from as many starting points as there are members."""
    import bnn

    model, data = pyro_model(problem), torch_data(problem)

    def fit(steps: int) -> None:
        method = bnn.MAP(
            restarts=members,
            steps=steps,
            batch_size=BATCH,
            learning_rate=RATE,
            schedule="constant",
            draws=1,
        )
        bnn.fit(model, *data, method=method, progress=False)

    few = 20 if seconds < 1 else 200 if problem.labels else 10_000
    return per_step(fit, seconds, few)


def demo_data() -> tuple[np.ndarray, np.ndarray]:
    """100 rows with a gap in x, which is (row, 1): the curve of Blundell et al. (2015), 5.2."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(0.0, 0.5, 70), rng.uniform(0.8, 1.0, 30)])
    noise = 0.02 * rng.standard_normal(len(x))
    moved = 2 * np.pi * (x + noise)
    return x[:, None], x + 0.3 * np.sin(moved) + 0.3 * np.sin(2 * moved) + noise


def demo_model() -> Any:
    """The net of the demonstration; its noise is that of the data, as they are seen."""
    from bnn.models import likelihoods, mlp_regression

    gaussian = likelihoods.Gaussian(0.1)
    return mlp_regression(1, (20, 20), activation="selu", likelihood=gaussian)


def demo_methods(**settings: Any) -> dict[str, Any]:
    """Four ensembles; each differs from the one before in a word."""
    import torch

    import bnn

    settings = DEMO | settings
    wave = lambda x: torch.sin(3 * x)
    return {
        "naive": bnn.DeepEnsemble(**settings),
        "prior": bnn.RandomizedPriors(**settings),
        "prior, bootstrap": bnn.RandomizedPriors(bootstrap="resample", **settings),
        "sin prior, bootstrap": bnn.RandomizedPriors(bootstrap="resample", prior=wave, **settings),
    }


def demo(repeats: int, steps: int) -> None:
    """Seconds of each of the four, the whole fit."""
    import bnn

    model, data = demo_model(), demo_data()
    fit = lambda method: elapsed(lambda: bnn.fit(model, *data, method=method, progress=False))
    contenders = {
        f"bnn, {name}": lambda method=method: fit(method)
        for name, method in demo_methods(steps=steps).items()
    }
    compare(
        f"P: 1-20-20-1, 100 rows; 40 members, {steps} steps on all rows",
        "seconds of a fit",
        alternate(contenders, repeats),
        ["bnn, naive"],
        value=lambda s: s,
    )


def main() -> None:
    parser = arguments(__doc__, (*CASES, "P"))
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.repeats = ["M"], 2
    seconds = 0.1 if args.quick else 3.0
    begin("Ensembles", args.cores)
    if "P" in args.sizes:
        demo(args.repeats, DEMO["steps"])
    for size in (each for each in args.sizes if each in CASES):
        for members in CASES[size][:1] if args.quick else CASES[size]:
            given = (PROBLEMS[size], members, seconds)
            contenders = {LOOP: loop(*given), "bnn.MAP(restarts=...)": bnn_members(*given)}
            compare(
                f"{size}: {PROBLEMS[size]}; {count(members, 'member')}, batches of {BATCH}",
                "ms / step of all",
                alternate(contenders, args.repeats),
                [LOOP],
                value=lambda s: 1e3 * s,
            )


if __name__ == "__main__":
    main()
