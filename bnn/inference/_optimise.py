"""Optimise: one loop for every method that maximises an objective by its stochastic gradient."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnn.errors import ConvergenceWarning, FitError
from bnn.inference._progress import bar
from bnn.method import Method, check_count, check_positive

_WINDOWS = 40  # stretches that a full run is cut into when convergence is judged
_DROPS = 2  # times a plateau cuts the learning rate by ten before it ends the fit
_PATIENCE = 3  # judgements in a row: one alone is often chance
_BUDGET = (0.7, 0.9)  # shares of the steps by which each of these cuts comes at the latest
_PASSES = 4  # over the rows that a stretch of minibatches takes at least
_TELLING = 0.3  # nats: minibatches whose mean over a stretch is noisier prove no convergence
_MEMORY = (0.9, 0.99)  # Adam's. A scale starts many times too wide, with gradients thousands of
# times those at the end: .999 would divide by them for 7,000 steps more
_RESOLUTION = 1e-3  # nats: a smaller gain over a whole stretch changes nothing that is read off
Schedule = str | Callable[[int], float]


@dataclass(frozen=True, kw_only=True)
class Optimised(Method):
    """The settings of every method that optimises.

    Attributes:
        steps: most gradient steps.
        learning_rate: Adam's, at the first step.
        batch_size: rows in a minibatch; None takes all rows at every step.
        schedule: "plateau" divides the learning rate by ten when the objective has stopped rising,
            at the latest after .7 and .9 of the steps, and ends the fit at the third time; exactly
            then where minibatches are so small a part of the rows, or drawn by the model's own
            plate, that their noise hides a slow rise;
            "cosine" brings it to 0 over `steps`; "constant" keeps it; or a callable of the step
            that gives the factor.
    """

    steps: int = 10_000
    learning_rate: float = 0.02
    batch_size: int | None = None
    schedule: Schedule = "plateau"

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_count(name, steps=self.steps)
        check_positive(name, learning_rate=self.learning_rate)
        if self.batch_size is not None:
            check_count(name, batch_size=self.batch_size)
        if not callable(self.schedule) and self.schedule not in ("plateau", "cosine", "constant"):
            raise ValueError(
                f'{name}(schedule={self.schedule!r}): known are "plateau", "cosine", "constant", '
                "or a callable of the step."
            )


def maximise(
    objective: Callable[[tuple[Any, ...], int], Tensor],
    tensors: Mapping[str, Tensor],
    batches: Iterator[tuple[Any, ...]],
    settings: Optimised,
    *,
    what: str,
    label: str,
    progress: bool,
    settle: int = 0,
    epoch: int | None = 1,
) -> Tensor:
    """Adam on the objective, its tensors changed in place.

    A step whose objective or gradient is not finite is left out and the learning rate halved;
    three in a row end the fit. Under the "plateau" schedule a stage ends at the average over its
    flat stretches, or where none is told over about its second half (Polyak), which takes out the
    noise of the steps; one that the budget cuts while it rises ends where it is.

    Args:
        objective: of a batch and the step; larger is better.
        tensors: leaves to optimise, by name.
        batches: endless.
        settings: steps, learning rate, schedule.
        what: name of the method, for the bar and for messages.
        label: name of the objective, for the bar.
        progress: show the bar.
        settle: first steps whose objective is not yet the one wanted (annealing).
        epoch: steps in one pass over the rows. The mean over a pass is free of the noise of the
            choice of rows; None where there is no such pass, and the budget alone ends the stages.

    Returns:
        The objective at each step, (step,).

    Raises:
        FitError: not finite three times in a row.
    """
    trained = {name: leaf.requires_grad for name, leaf in tensors.items()}
    # Pyro may register one tensor under two names; it takes one step.
    unique = {id(leaf): name for name, leaf in reversed(list(tensors.items()))}.values()
    leaves = {name: tensors[name].requires_grad_() for name in unique}
    try:
        history = _ascend(
            objective, leaves, batches, settings, what, label, progress, settle, epoch
        )
    finally:
        for name, leaf in leaves.items():
            leaf.requires_grad_(trained[name])
            leaf.grad = None
    return torch.tensor(history)


def _ascend(
    objective: Callable[[tuple[Any, ...], int], Tensor],
    leaves: Mapping[str, Tensor],
    batches: Iterator[tuple[Any, ...]],
    settings: Optimised,
    what: str,
    label: str,
    progress: bool,
    settle: int,
    epoch: int | None,
) -> list[float]:
    """The loop itself: the history."""
    optimiser = torch.optim.Adam(list(leaves.values()), lr=settings.learning_rate, betas=_MEMORY)
    plateau = Plateau(settings.steps, settle, epoch) if settings.schedule == "plateau" else None
    history: list[float] = []
    rate, lost = 1.0, 0
    average = _Average(leaves)
    with bar(settings.steps, what, progress) as shown:
        for step in range(settings.steps):
            factor = rate * _factor(settings, step, plateau)
            for group in optimiser.param_groups:
                group["lr"] = settings.learning_rate * factor
            optimiser.zero_grad()
            value = objective(next(batches), step)
            (-value).backward()
            bad = _not_finite(value, leaves)
            if bad:
                lost, rate = lost + 1, rate / 2
                if lost == 3:
                    raise FitError(
                        f"{what}: {bad} was not finite three times in a row, last at step {step}. "
                        f"Lower learning_rate (now {settings.learning_rate:g}), or rescale the "
                        "data.",
                        step=step,
                        site=bad,
                    )
                continue
            lost = 0
            optimiser.step()
            history.append(float(value.detach()))
            shown.update()
            if step % 20 == 0:
                recent = sum(history[-20:]) / len(history[-20:])
                rate_now = factor * settings.learning_rate
                shown.set_postfix_str(f"{label} {recent:.5g}, learning rate {rate_now:.1g}", False)
            if plateau is None:
                continue
            average.add()
            verdict = plateau.judge(history)
            if verdict == "over":
                average.take()
            elif verdict == "rising" or (plateau.flat == 0 and plateau.doubled(len(history))):
                average.count = 0
            if plateau.drops > _DROPS:
                break
    if plateau is not None and plateau.drops == _DROPS and average.count:  # the budget ended it
        average.take()
    if plateau is not None and plateau.cut:
        warnings.warn(
            f"{what}: the {label} was still rising when {settings.steps} steps ran short. Raise "
            f"steps, or learning_rate (now {settings.learning_rate:g}).",
            ConvergenceWarning,
            stacklevel=5,
        )
    return history


def _factor(settings: Optimised, step: int, plateau: "Plateau | None") -> float:
    if callable(settings.schedule):
        return settings.schedule(step)
    if plateau is not None:
        return 0.1**plateau.drops
    if settings.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    return 1.0


def _not_finite(value: Tensor, leaves: Mapping[str, Tensor]) -> str | None:
    if not torch.isfinite(value):
        return "objective"
    for name, leaf in leaves.items():
        if leaf.grad is not None and not torch.isfinite(leaf.grad).all():
            return name
    return None


class _Average:
    """The running mean of the leaves since it was last emptied."""

    def __init__(self, leaves: Mapping[str, Tensor]):
        self.leaves = [leaf.detach() for leaf in leaves.values()]
        self.means = [torch.zeros_like(leaf) for leaf in self.leaves]
        self.count = 0

    def add(self) -> None:
        self.count += 1
        for mean, leaf in zip(self.means, self.leaves, strict=True):
            mean.lerp_(leaf, 1 / self.count)

    def take(self) -> None:
        """Sets the leaves to their mean."""
        for mean, leaf in zip(self.means, self.leaves, strict=True):
            leaf.copy_(mean)
        self.count = 0


class Plateau:
    """Notices that a noisy objective has stopped rising, and keeps to the budget of steps.

    It has stopped when the last sixth of the present stage (at least a window) is no better than
    the sixth before by more than the noise of the difference of their means, or than float32
    resolves. The stages that are still to come get the last .3 of the budget in any case. Means
    are taken over whole passes of the rows, in which the noise of minibatches all but cancels.
    """

    def __init__(self, steps: int, start: int = 0, epoch: int | None = 1):
        self.steps, self.start, self.drops = steps, start, 0
        window = max(steps // _WINDOWS, min(100, steps // 4), 1)
        self.judges = epoch is not None and _PASSES * epoch * 2 * _PATIENCE <= steps
        self.epoch = epoch if epoch and self.judges else 1
        passes = -(-window // self.epoch)
        self.window = (max(passes, _PASSES) if self.epoch > 1 else passes) * self.epoch
        self.flat = 0  # judgements in a row that found it flat
        self.cut = False  # the budget ended a stage in which the objective was still rising

    def judge(self, history: list[float]) -> str:
        """After each step: "rising", "flat", "over" (a stage, that ended flat); "" untold."""
        length = len(history) - self.start
        judged = length >= 2 * self.window and length % self.window == 0
        short = self.drops < _DROPS and len(history) >= _BUDGET[self.drops] * self.steps
        verdict = self.trend(history) if short or (judged and self.judges) else ""
        self.flat = {"rising": 0, "flat": self.flat + 1, "": self.flat}[verdict]
        if short or self.flat == _PATIENCE:
            self.cut = self.cut or (short and verdict == "rising")
            passes = -(-len(history) // self.epoch)
            self.drops, self.start, self.flat = self.drops + 1, passes * self.epoch, 0
            return "over" if verdict != "rising" else "rising"  # an average would fall behind
        return verdict

    def doubled(self, length: int) -> bool:
        """True where the stage has become twice, four times, ... as long as a window."""
        windows, rest = divmod(length - self.start, self.window)
        return rest == 0 and windows.bit_count() == 1

    def trend(self, history: list[float]) -> str:
        """Rising while the last stretch is above the one before by more than the noise, else flat.

        Untold, "", where the noise of minibatches could hide a gain that matters.
        """
        width = max(self.window, (len(history) - self.start) // 6 // self.epoch * self.epoch)
        whole = len(history) - len(history) % self.epoch
        recent = torch.tensor(history[self.start : whole][-2 * width :], dtype=torch.float64)
        if len(recent) < max(2 * width, 4):
            return ""
        first, second = recent.reshape(2, -1, self.epoch).mean(2)  # (pass,) each
        gain = second.mean() - first.mean()
        noise = ((first.var() + second.var()) / len(first)).sqrt()
        if gain > torch.maximum(noise, _RESOLUTION + 1e-6 * second.mean().abs()):
            return "rising"
        return "" if self.epoch > 1 and noise > _TELLING else "flat"
