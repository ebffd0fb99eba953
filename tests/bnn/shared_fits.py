"""What processes that share a fit are asked to do; run by `test_processes.py`, never collected."""

import json
import os
import sys
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import bnn
from bnn.inference._step import Step

ROWS = 31  # no multiple of 2
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(ROWS, 3, generator=GENERATOR, dtype=torch.float64)
Y = X.sum(1) + 0.3 * torch.randn(ROWS, generator=GENERATOR, dtype=torch.float64)


def model(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(torch.ones(())))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, sigma), obs=y)


SHORT = {"steps": 60, "schedule": "constant", "draws": 5}
METHODS = {
    "map": bnn.MAP(**SHORT),
    "map_restarts": bnn.MAP(restarts=2, batch_size=10, **SHORT),
    "svi": bnn.SVI(batch_size=10, particles=2, **SHORT),
    "svi_full_rank": bnn.SVI(guide="full_rank", **SHORT),
    "svi_autoguide": bnn.SVI(guide=pyro.infer.autoguide.AutoDiagonalNormal, **SHORT),
    "loader": bnn.MAP(**SHORT),
}


def data(name: str) -> tuple:
    return (DataLoader(TensorDataset(X, Y), 8, shuffle=True),) if name == "loader" else (X, Y)


def fit(name: str, distributed: bool, **more):
    settings = {"method": METHODS[name], "progress": False, "distributed": distributed}
    return bnn.fit(model, *data(name), **(settings | more))


def everything(distributed: bool) -> dict[str, torch.Tensor]:
    """Of each fit its draws, and the gradients of its first step by leaf."""
    found: dict[str, torch.Tensor] = {}
    plain, first = Step._advance, dict[str, torch.Tensor]()

    def noted(self, leaves, gradients, *rest):
        if not first:
            first.update({name: each.clone() for name, each in gradients.items()})
        return plain(self, leaves, gradients, *rest)

    Step._advance = noted
    try:
        for name in METHODS:
            first.clear()
            found |= {
                f"{name}/{k}": v.contiguous() for k, v in fit(name, distributed).draws.items()
            }
            found |= {f"{name}/gradient/{k}": v.contiguous() for k, v in first.items()}
    finally:
        Step._advance = plain
    return found


def resumed(folder: Path) -> dict[str, torch.Tensor]:
    """A fit whose processes end at its thirtieth step, and are started again."""
    plain, taken = Step.__call__, []

    def ends(self, *args):
        taken.append(1)
        if len(taken) == 30:
            raise KeyboardInterrupt
        return plain(self, *args)

    checkpoint = bnn.Checkpoint(folder, every=0.0)
    Step.__call__ = ends
    try:
        fit("svi", True, checkpoint=checkpoint)
        raise AssertionError("it went on")
    except KeyboardInterrupt:
        pass
    finally:
        Step.__call__ = plain
    posterior = fit("svi", True, checkpoint=checkpoint)
    assert torch.equal(fit("svi", True, checkpoint=checkpoint).draws["w"], posterior.draws["w"])
    return {f"resumed/{k}": v.contiguous() for k, v in posterior.draws.items()}


def shards(rank: int) -> DataLoader:
    """What other libraries want: to each process rows of its own."""
    rows = TensorDataset(X, Y)
    return DataLoader(rows, 8, sampler=DistributedSampler(rows, 2, rank, shuffle=False))


def refusals(rank: int) -> dict[str, str]:
    attempts = {
        "seed": lambda: fit("map", True, seed=rank),
        "data": lambda: bnn.fit(model, X + rank, Y, method=METHODS["map"], distributed=True),
        "few": lambda: bnn.fit(model, X[:1], Y[:1], method=METHODS["map"], distributed=True),
        "shards": lambda: bnn.fit(model, shards(rank), method=METHODS["map"], distributed=True),
        "method": lambda: fit("map", True, method=bnn.NUTS()),
        "size": lambda: fit("map", True, method=bnn.MAP(batch_size=5)),
        "rows": lambda: fit("map", True, method=bnn.SVI(estimator="local")),
    }
    said = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except ValueError as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def left_alone(rank: int) -> dict[str, str]:
    """The other process ends without a word at the fifth step."""
    plain, taken = Step.__call__, []

    def dies(self, *args):
        taken.append(1)
        if len(taken) == 5 and rank == 1:
            os._exit(9)
        return plain(self, *args)

    Step.__call__ = dies
    try:
        fit("map", True)
    except bnn.FitError as error:
        return {"left": str(error)}
    return {}


def main(task: str, folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    rank = int(os.environ["RANK"])
    if task == "alone":
        said = left_alone(rank)
        (folder / f"said-{rank}.json").write_text(json.dumps(said))
        return
    save_file(everything(True) | resumed(folder / "run"), folder / f"draws-{rank}.safetensors")
    (folder / f"said-{rank}.json").write_text(json.dumps(refusals(rank)))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
