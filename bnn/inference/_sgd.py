"""SGD at a constant rate: iterates that wander around a mode, and their moments."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnn.errors import FitError
from bnn.handlers import branch
from bnn.inference._members import Members
from bnn.inference._progress import bar
from bnn.inference._step import Rule, Step, over
from bnn.inference._stiffness import Stiffness

_HALVINGS = 10  # of the rate that is chosen here, in all


class Sgd(Rule):
    """v <- momentum v + rate gradient; leaf <- leaf + v, of the leaf "mode".

    The state holds v, a centre, and "virial": minus the sum over steps of (leaf - centre) .
    gradient / size. Its mean is 1 under the density itself, and of a Gaussian one the variance of
    the iterates over that of the density, averaged over directions.
    """

    def __init__(self, momentum: float):
        self.momentum = momentum

    def begin(self, leaves: Mapping[str, Tensor], count: Tensor) -> dict[str, Any]:
        """See `Rule`."""
        z = leaves["mode"].detach()
        return {"velocity": torch.zeros_like(z), "centre": z.clone(), "virial": count}

    def move(
        self,
        leaves: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        state: Mapping[str, Any],
        rate: Tensor,
        noise: tuple[Tensor, ...],
        kept: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        """See `Rule`."""
        z, gradient, virial = leaves["mode"], gradients["mode"], state["virial"]
        pull = -((z - state["centre"]) * gradient).mean(-1)
        virial.copy_(kept(virial + pull, virial))
        velocity = self.momentum * state["velocity"] + over(rate, z) * gradient
        state["velocity"].copy_(kept(velocity, state["velocity"]))
        z.copy_(kept(z + velocity, z))

    def midway(self, state: Mapping[str, Any], gradients: Mapping[str, Tensor]) -> None:
        """A velocity of the size of ten steps."""
        gradient = torch.nan_to_num(gradients["mode"])
        state["velocity"].copy_(10 * torch.randn_like(gradient) * gradient)


def collect(
    members: Members,
    z: Tensor,
    *,
    rate: float | None,
    momentum: float,
    moments: range,
    rank: int,
    what: str,
    seed: np.random.SeedSequence,
    compiled: bool,
    progress: bool,
) -> tuple[dict[str, Tensor], Tensor]:
    """Steps from z on, and takes iterates.

    Args:
        members: the objective. Each minibatch is drawn from all rows: over a pass of them, as is
            usual, the noise would cancel.
        z: where they start, (member, size), or (size,) of a single one.
        rate: in units of the objective. None takes that whose iterates come nearest a Gaussian
            posterior, for each member: 2 (1 - momentum) size / trace of the gradient's noise
            (Mandt, Hoffman, Blei 2017), at most (1 - momentum) / the Hessian's largest eigenvalue,
            and half of it where the member has run away.
        momentum: in [0, 1).
        moments: steps after which an iterate is taken.
        rank: iterates that are kept, evenly spread over them.
        what: name of the method.
        seed: of minibatches, and of the check of a compiled step.
        compiled: the step may be.
        progress: show a bar.

    Returns:
        Of the iterates "mean" and "scale" (a standard deviation), (member, size), and "deviations"
        of those kept from the mean, (member, rank, size). And the virial, (member,); see `Sgd`.

    Raises:
        FitError: a member has run away.
    """
    z, count = z.detach().requires_grad_(), members.axis or 1
    batches = members.batches(branch(seed, 0), passes=False)
    rates = [rate or 0.0] * count
    if rate is None:
        stiffness = Stiffness(members, batches)
        best = 2 / stiffness.noise(z).mean(-1)
        stable = 1 / stiffness.stiffest(z, torch.ones_like(z))
        rates = ((1 - momentum) * torch.minimum(best, stable)).reshape(-1).tolist()
    step = Step(members.objective, {"mode": z}, members=members.axis, rule=Sgd(momentum))
    if compiled:
        step.hasten(moments.stop, [next(batches), next(batches)], branch(seed, 1))
    mode, halvings = z.detach().clone(), 0
    while True:
        try:
            with bar(moments.stop, f"{what}, collecting", progress) as shown:
                total, square, iterates = _wander(step, z, batches, rates, moments, rank, shown)
            break
        except _RunAway as away:
            if rate is not None or halvings == _HALVINGS:
                raise FitError(
                    f"{what} {away.member + 1}: the log density was not finite at step {away.step} "
                    "of the collection: SGD has run away. Lower collection_rate (it was "
                    f"{members.data.rows * rates[away.member]:.2g}).",
                    step=away.step,
                ) from None
            rates[away.member] /= 2
            halvings += 1
            with torch.no_grad():
                z.copy_(mode)
                step.state["velocity"].zero_()
    mean = total / len(moments)
    variance = (square - len(moments) * mean**2) / (len(moments) - 1)
    cloud = {
        "mean": (mode.double() + mean).reshape(count, -1),
        "scale": variance.clamp(min=0).sqrt().reshape(count, -1),
        "deviations": (iterates - mean.unsqueeze(-2)).reshape(count, rank, -1),
    }
    virial = step.state["virial"].reshape(-1) / (moments.stop - moments.start)
    return {name: each.to(z.dtype) for name, each in cloud.items()}, virial


def drawn(cloud: dict[str, Tensor], count: int) -> Tensor:
    """Draws of the Gaussian of each restart, (restart, draw, size)."""
    mean, scale, deviations = cloud["mean"], cloud["scale"], cloud["deviations"]
    restarts, rank, size = deviations.shape
    own = scale[:, None] * torch.randn(restarts, count, size)
    common = torch.randn(restarts, count, rank) @ deviations / (rank - 1) ** 0.5
    return mean[:, None] + (own + common) / 2**0.5


class _RunAway(Exception):
    """A member's log density was not finite."""

    def __init__(self, member: int, step: int):
        super().__init__(member, step)
        self.member, self.step = member, step


def _wander(
    step: Step,
    z: Tensor,
    batches: Iterator[tuple[Any, ...]],
    rates: list[float],
    moments: range,
    rank: int,
    shown: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum and sum of squares of iterates, and some of them (*, rank, size), as seen from z."""
    kept = set(torch.linspace(0, len(moments) - 1, rank).round().int().tolist())
    start = z.detach().double().clone()  # iterates differ little: float64, and from where they were
    total = square = torch.zeros_like(start)
    iterates: list[Tensor] = []
    for number in range(moments.stop):
        if number == moments.start:
            step.state["virial"].zero_()
        for member, (_, bad) in enumerate(step(next(batches), rates, 1.0)):
            if bad:
                raise _RunAway(member, number)
        shown.update()
        if number in moments:
            away = z.detach().double() - start
            total, square = total + away, square + away**2
            if moments.index(number) in kept:
                iterates.append(away)
    return total, square, torch.stack(iterates, -2)
