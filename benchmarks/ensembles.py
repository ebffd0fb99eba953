"""Milliseconds to train all members of an ensemble by one step: a Python loop against bnn."""

from collections.abc import Callable

from benchmarks.common import (
    PROBLEMS,
    Problem,
    alternate,
    arguments,
    begin,
    compare,
    count,
    per_step,
    pyro_model,
    torch_data,
)

RATE, BATCH = 1e-3, 128
CASES = {"M": (10, 40), "XL": (10,)}  # members, by problem
LOOP = "Python loop, one net after another"
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

    return per_step(fit, seconds)


def main() -> None:
    parser = arguments(__doc__, tuple(CASES))
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.repeats = ["M"], 2
    seconds = 0.1 if args.quick else 3.0
    begin("Ensembles", args.cores)
    for size in args.sizes:
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
