"""Optimise: one loop for every method that maximises an objective by its stochastic gradient."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from bnn import processes
from bnn.data import Batches
from bnn.diagnostics import Finding
from bnn.errors import ConvergenceWarning, FitError, outside
from bnn.inference._importance import at_fit, of_guide
from bnn.inference._snapshots import Snapshots
from bnn.inference._step import Objective, Step
from bnn.method import Method, check_count, check_positive
from bnn.progress import bar
from bnn.run import Phase

if TYPE_CHECKING:
    from bnn.posterior import Posterior

_WINDOWS = 40  # stretches that a full run is cut into when convergence is judged
_DROPS = 2  # times a plateau cuts the learning rate by ten before it ends the fit
_PATIENCE = 3  # judgements in a row: one alone is often chance
_BUDGET = (0.7, 0.9)  # shares of the steps by which each of these cuts comes at the latest
_PASSES = 4  # over the rows that a stretch of minibatches takes at least
_TELLING = 0.3  # nats: minibatches whose mean over a stretch is noisier prove no convergence
_LOST, _MOST = 3, 10  # steps that are left out: more are told, so many are an error
_SHARE = 0.5  # of the steps: what a fit that may stop early takes as a rule
_MATTERS = 0.1  # nats: a KL that much too large is a mean .45 standard deviations off
_SIGMA = 3  # of the noise: at the end there is one judgement, and no patience
_RESOLUTION = 1e-3  # nats: a smaller gain over a whole stretch changes nothing that is read off
Schedule = str | Callable[[int], float]
Culprit = Callable[[Mapping[str, Tensor], tuple[Any, ...], int], str | None]


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
        annealing: steps over which the weight of all but the likelihood (the prior, the KL, the
            entropy) rises from 0 to 1; below 1 their share of `steps`. Without it a deep net, whose
            first gradients say little, can be drawn into the prior's own mode and stay there.
        goes_on: True for a method whose fit climbs on from there, and judges by itself.
    """

    goes_on: ClassVar[bool] = False

    steps: int = 10_000
    learning_rate: float = 0.02
    batch_size: int | None = None
    schedule: Schedule = "plateau"
    annealing: float = 0

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_count(name, steps=self.steps)
        if not 0 <= self.annealing < self.steps:
            raise ValueError(
                f"{name}(annealing={self.annealing}, steps={self.steps}): the weight of the prior "
                "must reach 1 before the end. Pass a share of the steps, below 1, or fewer of them."
            )
        check_positive(name, learning_rate=self.learning_rate)
        if self.batch_size is not None:
            check_count(name, batch_size=self.batch_size)
        if not callable(self.schedule) and self.schedule not in ("plateau", "cosine", "constant"):
            raise ValueError(
                f'{name}(schedule={self.schedule!r}): known are "plateau", "cosine", "constant", '
                "or a callable of the step."
            )

    def findings(self, posterior: "Posterior") -> list[Finding]:
        """See `Method.findings`."""
        climb = [] if self.goes_on else of_climb(self, posterior)
        return [*climb, *of_guide(posterior)]

    def at_fit(self, posterior: "Posterior") -> list[Finding]:
        """See `Method.at_fit`."""
        return at_fit(posterior)


def settling(settings: "Optimised | Ascent") -> int:
    """Steps of the annealing; a setting below 1 is their share."""
    annealing = settings.annealing
    return round(annealing * settings.steps) if annealing < 1 else round(annealing)


def of_climb(settings: Optimised, posterior: "Posterior") -> list[Finding]:
    """Whether the objective had stopped rising, by the judgements that the fit itself went by."""
    if posterior.history is None:
        return []
    history, sites = posterior.history.tolist(), posterior.sites
    epoch = None if sites.subsampled else posterior.data.epoch(settings.batch_size)
    plateau = Plateau(settings.steps, settling(settings), epoch)
    taken: list[float] = []
    for value in history if settings.schedule == "plateau" else []:
        taken.append(value)
        plateau.judge(taken)
    if plateau.drops:
        (gain, limit), rising = plateau.gain, plateau.cut
    else:
        gain, limit = plateau.late(history)
        rising = gain > limit
    if math.isnan(gain):
        return [
            Finding(
                name="steps",
                value=float(len(history)),
                threshold=None,
                unlimited="too few to tell",
                doubtful=False,
                meaning="Of so short a history nobody can tell whether the objective still rose.",
                advice=f"Raise steps (now {settings.steps})."
                if posterior.complete
                else "Let the fit go on to its end.",
            )
        ]
    return [
        Finding(
            name="rise of the objective",
            value=gain,
            threshold=limit,
            doubtful=rising,
            meaning=f"At the end of its climb the objective gained {gain:.2g} nats in a sixth of "
            f"the steps, where {limit:.2g} is noise"
            + (": it was still rising when steps ran short." if rising else "."),
            advice=f"Raise steps (now {settings.steps}), or learning_rate "
            f"(now {settings.learning_rate:g}).",
        )
    ]


@dataclass(frozen=True, kw_only=True)
class Ascent:
    """What `maximise` needs of the settings, for methods in which it is a phase among others."""

    steps: int
    learning_rate: float = 0.02
    schedule: Schedule = "cosine"
    annealing: float = 0


def maximise(
    objective: Objective,
    tensors: Mapping[str, Tensor],
    batches: Iterator[tuple[Any, ...]],
    settings: Optimised | Ascent,
    *,
    what: str,
    label: str,
    progress: bool,
    noise: Callable[[tuple[Any, ...]], tuple[Tensor, ...]] = lambda batch: (),
    members: int | None = None,
    epoch: int | None = 1,
    seed: np.random.SeedSequence | None = None,
    watch: Snapshots | None = None,
    culprit: Culprit = lambda tensors, batch, member: None,
) -> list[Tensor]:
    """Adam on the objective, its tensors changed in place: one phase of a fit.

    Where the objective or its gradient is not finite the step is left out, the fit goes back some
    steps to where both were, and the learning rate is halved; the third time in a row, or the tenth
    in all, ends the fit. Under the "plateau" schedule a stage ends at the
    average over its flat stretches, or where none is told over about its second half (Polyak),
    which takes out the noise of the steps; one that the budget cuts while it rises ends where it
    is. Members share the steps and nothing else: each has its own learning rate, stages and end.
    Only a matrix without factors, in a step that is not compiled, counts against all of them.

    Args:
        objective: see `bnn.inference._step.Objective`.
        tensors: leaves to optimise, by name; (member, *) each where there are members.
        batches: endless; `Batches`, or others, which are gone through again where a fit goes on.
        settings: steps, learning rate, schedule, and the annealing of the weight that the objective
            is given.
        what: name of the method, for the bar and for messages.
        label: name of the objective, for the bar.
        progress: show the bar.
        noise: draws what the objective takes as noise, of a batch; see `Step`.
        members: parameter sets that step together; None where the objective is one number.
        epoch: steps in one pass over the rows. The mean over a pass is free of the noise of the
            choice of rows; None where there is no such pass, and the budget alone ends the stages.
        seed: of the check of a compiled step; None where the objective is more than a function of
            its arguments, which is then never compiled.
        watch: copies of the tensors on their way.
        culprit: names the site of the model that is not finite at the tensors, of a member.

    Returns:
        Of each member the objective at each step, (step,).

    Raises:
        FitError: not finite three times in a row, or ten times.
    """
    given = batches
    batches = given if isinstance(given, Batches) else Batches(lambda: given, ())
    settle = settling(settings)
    trained = {name: leaf.requires_grad for name, leaf in tensors.items()}
    # Pyro may register one tensor under two names; it takes one step.
    unique = {id(leaf): name for name, leaf in reversed(list(tensors.items()))}.values()
    leaves = {name: tensors[name].requires_grad_() for name in unique}
    try:
        averaging = settings.schedule == "plateau"
        step = Step(objective, leaves, noise, members, averaging, back=True)
        climbs = [
            _Climb(step, index, settings, settle, epoch)
            for index in ([()] if members is None else [(i,) for i in range(members)])
        ]
        ascent = _Ascent(step, climbs, batches, watch, culprit)
        phase = Phase(f"{what}: {label}", ascent)
        with bar(settings.steps * len(climbs), what, progress) as shown:
            if seed is not None and not phase.frozen and processes.current() is None:
                early = climbs[0].plateau is not None and climbs[0].plateau.judges
                announce = lambda: shown.set_postfix_str("compiling the step, some seconds")
                expected = settings.steps * (_SHARE if early else 1.0)
                step.hasten(expected, batches.ahead(2), seed, announce)
            with phase:
                shown.update(sum(len(climb.history) for climb in climbs))
                ascent.run(phase, settings, what, label, shown, settle)
        phase.require(all(climb.history for climb in climbs))
    finally:
        for name, leaf in leaves.items():
            leaf.requires_grad_(trained[name])
    short = sum(climb.cut for climb in climbs)
    if short:
        some = f" ({short} of {members} members)" if members and members > 1 else ""
        warnings.warn(
            f"{what}: the {label} was still rising when {settings.steps} steps ran short{some}. "
            f"Raise steps, or learning_rate (now {settings.learning_rate:g}).",
            ConvergenceWarning,
            stacklevel=outside(),
        )
    lost = max(climbs, key=lambda climb: climb.lost)
    if lost.lost > _LOST:
        warnings.warn(
            f"{what}: the {label} was not finite at {lost.lost} steps, and the learning rate has "
            f"been halved each time, to {settings.learning_rate * lost.rate:.2g}: the fit may have "
            "ended at the edge of what is finite. Lower learning_rate, or rescale the data.",
            ConvergenceWarning,
            stacklevel=outside(),
        )
    return [torch.tensor(climb.history) for climb in climbs]


class _Ascent:
    """The loop itself."""

    def __init__(
        self,
        step: Step,
        climbs: "list[_Climb]",
        batches: Batches,
        watch: Snapshots | None,
        culprit: Culprit,
    ):
        self.step, self.climbs, self.batches, self.watch = step, climbs, batches, watch
        self.culprit, self.number = culprit, 0

    def state(self) -> dict[str, Any]:
        """See `bnn.run.Loop`."""
        return {
            "number": self.number,
            "step": self.step.whole(),
            "batches": self.batches.state(),
            "climbs": [climb.state() for climb in self.climbs],
            "watch": None if self.watch is None else self.watch.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `bnn.run.Loop`."""
        self.number = state["number"]
        self.step.restore(state["step"])
        self.batches.restore(state["batches"])
        for climb, kept in zip(self.climbs, state["climbs"], strict=True):
            climb.restore(kept)
        if self.watch is not None:
            self.watch.restore(state["watch"])

    def run(
        self,
        phase: Phase,
        settings: Optimised | Ascent,
        what: str,
        label: str,
        shown: Any,
        settle: int,
    ) -> None:
        """From where it is to the end, or until the phase is to stop."""
        if self.watch is not None and self.number == 0:
            self.watch(0)
        climbs = self.climbs
        while (
            self.number < settings.steps
            and not all(climb.over for climb in climbs)
            and phase.goes_on()
        ):
            number = self.number
            rates = [settings.learning_rate * climb.factor(number) for climb in climbs]
            weight = min(1.0, (number + 1) / (settle + 1))
            batch = next(self.batches)
            outcomes = self.step(batch, rates, weight)
            for climb, (value, bad) in zip(climbs, outcomes, strict=True):
                if climb.over:
                    continue
                if climb.fails(bad):
                    which = f"{what} {climb.index[0] + 1}" if len(climbs) > 1 else what
                    site = self.culprit(self.step.lost, batch, climb.index[0] if climb.index else 0)
                    often = "three times in a row" if climb.in_a_row == 3 else f"{_MOST} times"
                    where = "" if site is None else f', for the site "{site}"'
                    raise FitError(
                        f"{which}: {bad} was not finite {often}{where}, last at step "
                        f"{number}. Lower learning_rate (now {settings.learning_rate:g}), or "
                        "rescale the data.",
                        step=number,
                        site=site or bad,
                    ) from self.step.cause
                if not bad:
                    climb.take(value)
                    shown.update()
            self.number += 1
            if self.watch is not None:
                self.watch(self.number)
            if number % 20 == 0 and not shown.disable:
                recent = [sum(h[-20:]) / max(len(h[-20:]), 1) for h in (c.history for c in climbs)]
                text = f"{label} {max(recent):.5g}, learning rate {max(rates):.1g}"
                shown.set_postfix_str(text, False)
        if not phase.cut and not phase.over:
            for climb in climbs:
                climb.finish()


class _Climb:
    """Where one parameter set stands: its history, its learning rate, its stage."""

    def __init__(
        self,
        step: Step,
        index: tuple[int, ...],
        settings: Optimised | Ascent,
        settle: int,
        epoch: int | None,
    ):
        self.step, self.index, self.settings = step, index, settings
        self.settle, self.epoch = settle, epoch
        plateau = settings.schedule == "plateau"
        self.plateau = Plateau(settings.steps, settle, epoch) if plateau else None
        self.history: list[float] = []
        self.rate, self.in_a_row, self.lost = 1.0, 0, 0

    def state(self) -> dict[str, Any]:
        """As a tree of tensors and numbers."""
        return {
            "history": torch.tensor(self.history, dtype=torch.float64),
            "numbers": [self.rate, self.in_a_row, self.lost],
            "plateau": None if self.plateau is None else self.plateau.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Sets it back to that."""
        self.history = state["history"].tolist()
        self.rate, self.in_a_row, self.lost = state["numbers"]
        if self.plateau is not None:
            self.plateau.restore(state["plateau"])

    @property
    def over(self) -> bool:
        return self.plateau is not None and self.plateau.drops > _DROPS

    @property
    def cut(self) -> bool:
        if self.plateau is not None:
            return self.plateau.cut
        if not isinstance(self.settings, Optimised):  # a phase, which others go on from
            return False
        gain, limit = Plateau(self.settings.steps, self.settle, self.epoch).late(self.history)
        return gain > limit

    def factor(self, step: int) -> float:
        """What the learning rate is multiplied by; 0 once it is over, while others step on."""
        settings = self.settings
        if self.over:
            return 0.0
        if callable(settings.schedule):
            return self.rate * settings.schedule(step)
        if self.plateau is not None:
            return self.rate * 0.1**self.plateau.drops
        if settings.schedule == "cosine":
            return self.rate * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        return self.rate

    def fails(self, bad: str) -> bool:
        """Notes whether a step was left out; True when that ends the fit."""
        self.in_a_row = self.in_a_row + 1 if bad else 0
        if bad:
            self.rate, self.lost = self.rate / 2, self.lost + 1
        return self.in_a_row == 3 or self.lost == _MOST

    def take(self, value: float) -> None:
        """Notes a step taken, and ends a stage when it is over."""
        self.history.append(value)
        if self.plateau is None:
            return
        verdict = self.plateau.judge(self.history)
        if verdict == "over":
            self.step.settle(self.index)
        elif verdict == "rising" or (
            self.plateau.flat == 0 and self.plateau.doubled(len(self.history))
        ):
            self.step.forget(self.index)

    def finish(self) -> None:
        """Ends the last stage at its average, where the budget ended it."""
        last = self.plateau is not None and self.plateau.drops == _DROPS
        if last and self.step.state["averaged"][self.index] > 0:
            self.step.settle(self.index)


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
        self.gain = (math.nan, math.nan)  # and what is noise, where the last stage ended

    def state(self) -> list[Any]:
        """What changes, as a tree of numbers."""
        return [self.start, self.drops, self.flat, self.cut]

    def restore(self, state: list[Any]) -> None:
        """Sets it back to that."""
        self.start, self.drops, self.flat, self.cut = state

    def judge(self, history: list[float]) -> str:
        """After each step: "rising", "flat", "over" (a stage, that ended flat); "" untold."""
        length = len(history) - self.start
        judged = length >= 2 * self.window and length % self.window == 0
        short = self.drops < _DROPS and len(history) >= _BUDGET[self.drops] * self.steps
        verdict = self.trend(history) if short or (judged and self.judges) else ""
        self.flat = {"rising": 0, "flat": self.flat + 1, "": self.flat}[verdict]
        if short or self.flat == _PATIENCE:
            if not self.cut:
                self.gain = gain, least = self.late(history)
                self.cut = short and gain > least
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

        Untold, "", where the noise of minibatches could hide a gain that matters. What falls
        beyond noise is flat: a step too long, which a smaller learning rate mends.
        """
        gain, noise, least = self.rise(history)
        if math.isnan(gain):
            return ""
        if gain > max(noise, least):
            return "rising"
        if gain < -max(_SIGMA * noise, least):
            return "flat"
        return "" if self.epoch > 1 and noise > _TELLING else "flat"

    def late(self, history: list[float]) -> tuple[float, float]:
        """Gain at the end of a run that no plateau ended, and what of it would matter."""
        gain, noise, _ = self.rise(history)
        return gain, max(_SIGMA * noise, _MATTERS)

    def rise(self, history: list[float]) -> tuple[float, float, float]:
        """Gain of a stage's last sixth over the one before, its noise, the least told; or NaN."""
        width = max(self.window, (len(history) - self.start) // 6 // self.epoch * self.epoch)
        whole = len(history) - len(history) % self.epoch
        recent = torch.tensor(history[self.start : whole][-2 * width :], dtype=torch.float64)
        if len(recent) < max(2 * width, 4):
            return math.nan, math.nan, math.nan
        first, second = recent.reshape(2, -1, self.epoch).mean(2)  # (pass,) each
        noise = ((first.var() + second.var()) / len(first)).sqrt()
        least = _RESOLUTION + 1e-6 * abs(float(second.mean()))
        return float(second.mean() - first.mean()), float(noise), least
