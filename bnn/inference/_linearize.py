"""Linearize: the program that runs f as a linear function of the weights, around a mode.

    f(x; z) = f(x; z*) + J(x) (z - z*)

in the unconstrained z, in which the Gaussian is one, so that f is Gaussian too. Everything behind f
(noise, link) is run at the draw as the model states it. Exact where f is linear in z.
"""

from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.func import vjp

from bnn.data import Data
from bnn.errors import ModelError
from bnn.handlers import Capture, Rewrite, is_statement
from bnn.method import Model
from bnn.sites import Sites, to_support

PREFIX = "mode."  # of the mode's tensors among a posterior's parameters


def linearized(model: Model, mode: Mapping[str, Tensor]) -> Model:
    """The program.

    Args:
        model: announces f.
        mode: z* by site, unconstrained.
    """

    def run(*args: Any) -> Any:
        reached: dict[str, Any] = {}

        def f(free: Mapping[str, Tensor]) -> Tensor:
            with poutine.block(), _Free(free) as at, Capture("") as seen:
                model(*args)
            reached.update(at.reached)
            return seen.values["f"]

        tangent: Any = vjp(f, dict(mode))
        start, pull = tangent
        push: Any = vjp(lambda g: pull(g)[0], torch.zeros_like(start))[1]  # the transpose of J^T

        def moved(_: Tensor) -> Tensor:
            passed = {k: seen.values.get(k) for k in mode}  # f depends on no site behind it
            away = {
                k: torch.zeros_like(v) if passed[k] is None else reached[k].inv(passed[k]) - v
                for k, v in mode.items()
            }
            return start + push(away)[0]

        with Rewrite({"f": moved}), Capture("") as seen:
            return model(*args)

    return run


class _Free(Messenger):
    """Runs a program at unconstrained values; its observations, if it samples them, are 0.

    Attributes:
        reached: of each site the map from the real line to its support.
    """

    def __init__(self, free: Mapping[str, Tensor]):
        super().__init__()
        self.free, self.reached = free, {}

    def _pyro_sample(self, message: Any) -> None:
        if not is_statement(message) or message["is_observed"]:
            return
        if message["name"] not in self.free:
            message["value"] = torch.zeros(message["fn"].shape())
        else:
            transform = self.reached[message["name"]] = to_support(message["fn"].support)
            message["value"] = transform(self.free[message["name"]])


def require_f(model: Model, data: Data, sites: Sites) -> None:
    """Refuses a model that does not run on what it announces as f.

    Raises:
        ModelError: no f, an f that the observations do not depend on, or sites inside the plate.
    """
    cure = 'Write f = pyro.deterministic("f", ...) and use what it returns.'
    if "f" not in sites.seams:
        raise ModelError(
            'predictive="linearized" is linear in f, and the model announces no deterministic site '
            f'"f" (found: {", ".join(sites.seams) or "none"}). {cure}'
        )
    if sites.locals:
        raise ModelError(
            f'predictive="linearized" holds f as a function of global sites, and "{sites.locals[0]}'
            '" belongs to the rows. Use predictive="sampled".'
        )
    scores = []
    for away in (0.0, 0.125):  # not the same everywhere: a softmax does not see what is
        ramp = lambda f, a=away: (
            f + a * torch.arange(1, f.numel() + 1).to(f).remainder(7).reshape(f.shape)
        )
        with torch.random.fork_rng(devices=[]), Rewrite({"f": ramp}):
            torch.manual_seed(0)
            trace: Any = poutine.trace(model).get_trace(*data.tensors)
        scores.append(trace.nodes[sites.observed]["fn"].log_prob(data.observations).detach())
    if torch.equal(*scores):
        raise ModelError(
            'predictive="linearized" replaces f, and the observations of this model do not depend '
            f'on the value of its site "f": it goes on with another. {cure}'
        )
