"""SGD at a constant rate: iterates that wander around a mode, and their moments."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnn.data import Batches
from bnn.errors import FitError
from bnn.handlers import branch
from bnn.inference._members import Members
from bnn.inference._step import Rule, Step, over
from bnn.inference._stiffness import Stiffness
from bnn.progress import bar
from bnn.run import Phase

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
    walk = _Walk(step, z, batches, rates, moments, rank)
    phase = Phase("collection", walk)
    if compiled and not phase.frozen:
        step.hasten(moments.stop, [next(batches), next(batches)], branch(seed, 1))
    with phase, bar(moments.stop, f"{what}, collecting", progress) as shown:
        shown.update(walk.number)
        while walk.number < moments.stop and phase.goes_on():
            away = walk.on()
            shown.update(walk.number - shown.n)
            if away is not None and (rate is not None or walk.halvings == _HALVINGS):
                raise FitError(
                    f"{what} {away + 1}: the log density was not finite at step {walk.number} "
                    "of the collection: SGD has run away. Lower collection_rate (it was "
                    f"{members.data.rows * walk.rates[away]:.2g}).",
                    step=walk.number,
                    site=members.culprit({"mode": z}, next(batches), away),
                )
            if away is not None:
                walk.again(away)
    phase.require(walk.number == moments.stop)
    return walk.cloud(), step.state["virial"].reshape(-1) / (moments.stop - moments.start)


def drawn(cloud: dict[str, Tensor], count: int) -> Tensor:
    """Draws of the Gaussian of each restart, (restart, draw, size)."""
    mean, scale, deviations = cloud["mean"], cloud["scale"], cloud["deviations"]
    restarts, rank, size = deviations.shape
    own = scale[:, None] * torch.randn(restarts, count, size)
    common = torch.randn(restarts, count, rank) @ deviations / (rank - 1) ** 0.5
    return mean[:, None] + (own + common) / 2**0.5


class _Walk:
    """SGD on its way from a mode, and the moments of its iterates."""

    def __init__(
        self,
        step: Step,
        z: Tensor,
        batches: Batches,
        rates: list[float],
        moments: range,
        rank: int,
    ):
        self.step, self.z, self.batches, self.rates = step, z, batches, rates
        self.moments, self.halvings, self.mode = moments, 0, z.detach().clone()
        kept = torch.linspace(0, len(moments) - 1, rank).round().int().tolist()
        self._kept = {number: place for place, number in enumerate(kept)}
        self._begin()

    def _begin(self) -> None:
        # iterates differ little: float64, and as seen from the mode
        self.number, lead = 0, self.mode.shape[:-1]
        self.total = torch.zeros_like(self.mode, dtype=torch.float64)
        self.square = torch.zeros_like(self.total)
        self.iterates = self.total.new_zeros((*lead, len(self._kept), self.mode.shape[-1]))

    def on(self) -> int | None:
        """One step; the member that has run away, if one has."""
        if self.number == self.moments.start:
            self.step.state["virial"].zero_()
        for member, (_, bad) in enumerate(self.step(next(self.batches), self.rates, 1.0)):
            if bad:
                return member
        if self.number in self.moments:
            away = self.z.detach().double() - self.mode.double()
            self.total, self.square = self.total + away, self.square + away**2
            place = self._kept.get(self.moments.index(self.number))
            if place is not None:
                self.iterates[..., place, :] = away
        self.number += 1
        return None

    def again(self, member: int) -> None:
        """All from the mode once more, one member at half its rate."""
        self.rates[member] /= 2
        self.halvings += 1
        with torch.no_grad():
            self.z.copy_(self.mode)
            self.step.state["velocity"].zero_()
        self._begin()

    def cloud(self) -> dict[str, Tensor]:
        """See `collect`."""
        count, rank, size = len(self.rates), len(self._kept), self.mode.shape[-1]
        mean = self.total / len(self.moments)
        variance = (self.square - len(self.moments) * mean**2) / (len(self.moments) - 1)
        cloud = {
            "mean": (self.mode.double() + mean).reshape(count, -1),
            "scale": variance.clamp(min=0).sqrt().reshape(count, -1),
            "deviations": (self.iterates - mean.unsqueeze(-2)).reshape(count, rank, size),
        }
        return {name: each.to(self.z.dtype) for name, each in cloud.items()}

    def state(self) -> dict[str, Any]:
        """See `bnn.run.Loop`."""
        return {
            "step": self.step.whole(),
            "batches": self.batches.state(),
            "mode": self.mode,
            "rates": self.rates,
            "numbers": [self.number, self.halvings],
            "sums": [self.total, self.square, self.iterates],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `bnn.run.Loop`."""
        self.step.restore(state["step"])
        self.batches.restore(state["batches"])
        self.mode, self.rates = state["mode"], state["rates"]
        self.number, self.halvings = state["numbers"]
        self.total, self.square, self.iterates = state["sums"]
