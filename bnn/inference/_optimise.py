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
            and ends the fit at the third time; "cosine" brings it to 0 over `steps`; "constant"
            keeps it; or a callable of the step that gives the factor.
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
) -> Tensor:
    """Adam on the objective, its tensors changed in place.

    A step whose objective or gradient is not finite is left out and the learning rate halved;
    three in a row end the fit. Under the "plateau" schedule the tensors returned are averaged over
    the last stretch (Polyak), which takes out the noise of the steps.

    Args:
        objective: of a batch and the step; larger is better.
        tensors: leaves to optimise, by name.
        batches: endless.
        settings: steps, learning rate, schedule.
        what: name of the method, for the bar and for messages.
        label: name of the objective, for the bar.
        progress: show the bar.
        settle: first steps whose objective is not yet the one wanted (annealing).

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
        history, average = _ascend(
            objective, leaves, batches, settings, what, label, progress, settle
        )
    finally:
        for name, leaf in leaves.items():
            leaf.requires_grad_(trained[name])
            leaf.grad = None
    with torch.no_grad():
        for name, mean in average.items():
            leaves[name].copy_(mean)
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
) -> tuple[list[float], dict[str, Tensor]]:
    """The loop itself: the history, and the averages of the last stretch."""
    optimiser = torch.optim.Adam(list(leaves.values()), lr=settings.learning_rate)
    window = max(settings.steps // _WINDOWS, 10)
    plateau = Plateau(window, settle) if settings.schedule == "plateau" else None
    history: list[float] = []
    rate, lost = 1.0, 0
    average: dict[str, Tensor] = {}
    count = 0
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
            if plateau.drops == _DROPS:  # the last stretch is averaged
                count += 1
                for name, leaf in leaves.items():
                    held = average.setdefault(name, torch.zeros_like(leaf.detach()))
                    held += (leaf.detach() - held) / count
            if plateau.full(history) and plateau.drops > _DROPS:
                break
        else:
            if plateau is not None and plateau.rising(history):
                warnings.warn(
                    f"{what} was still rising after {settings.steps} steps. Raise steps, or "
                    f"learning_rate (now {settings.learning_rate:g}).",
                    ConvergenceWarning,
                    stacklevel=5,
                )
    return history, average


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


class Plateau:
    """Notices that a noisy objective has stopped rising.

    The objective is cut into stretches. It has stopped when the last stretch is no better than the
    one before it by more than the noise of the difference of their means, or than float32 resolves.
    """

    def __init__(self, window: int, start: int = 0):
        self.window, self.drops, self.start = window, 0, start

    def full(self, history: list[float]) -> bool:
        """Judges at the end of a stretch; counts a drop where the objective has stopped."""
        length = len(history) - self.start
        if length < 2 * self.window or length % self.window:
            return False
        if self.rising(history):
            return False
        self.drops += 1
        self.start = len(history)
        return True

    def rising(self, history: list[float]) -> bool:
        """True while the last stretch is above the one before by more than the noise."""
        recent = torch.tensor(history[self.start :][-2 * self.window :], dtype=torch.float64)
        if len(recent) < 2 * self.window:
            return False
        first, second = recent[: self.window], recent[self.window :]
        gain = second.mean() - first.mean()
        noise = ((first.var() + second.var()) / self.window).sqrt()
        return bool(gain > torch.maximum(noise, _RESOLUTION + 1e-6 * second.mean().abs()))
