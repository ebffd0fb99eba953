"""Stochastic-gradient Langevin dynamics: the one sampler behind `SGHMC` and `SGLD`.

    dz = s v dt,    dv = s grad log p(z, data) dt - friction v dt + sqrt(2 friction) dW

z on the real line, s a scale for each coordinate, the gradient that of a minibatch. A step of
length h reads one minibatch:

    v <- v + h s g(z);   z <- z + h s v / 2;   v <- c v + sqrt(1 - c^2) xi;   z <- z + h s v / 2

with c = exp(-friction h). On a Gaussian and all rows the z before each step have its variance
exactly, at every stable h (BAOAB of Leimkuhler and Matthews); elsewhere the error is of order h^2.
"""

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnn.data import Batches, Data
from bnn.diagnostics import Finding
from bnn.errors import (
    CheckpointError,
    ConvergenceWarning,
    FitError,
    outside,
)
from bnn.handlers import branch, seeded
from bnn.inference._energy import Energy
from bnn.inference._members import Members
from bnn.inference._optimise import Ascent, maximise
from bnn.inference._step import Rule, Step, over
from bnn.inference._stiffness import Stiffness
from bnn.method import Method, Model, check_count, check_parts, check_positive
from bnn.posterior import Posterior
from bnn.progress import bar
from bnn.run import Phase
from bnn.sites import Sites, require_continuous, require_minibatches, require_no_parameters

_CLIMB = 0.5  # of warmup: ascent to a mode; the rest is the sampler's, its draws not kept
_WIDEST = 10.0  # scales, in those of the prior, where the density is flat
_LONGEST, _STABLE = 0.6, 0.7  # step size; times the fastest frequency (2 is where steps diverge)
_NOISE = 0.3  # what minibatches may add to the variance in any direction, relative to it
_RETREATS = 6  # of a chain that has run away, each with half the step
_EXPLORING = 0.5  # of a cycle: no draws are kept
_STATS = ("lp", "step_size", "temperature", "noise")
_LIMIT, _NOISY = 0.1, 0.5  # error of the temperature, and noise, above which draws are doubtful


@dataclass(frozen=True, kw_only=True)
class Diffusion(Method):
    """The settings of every sampler on minibatches; `SGHMC` says what each is."""

    chains: int = 8
    draws: int = 250
    warmup: int = 2_000
    steps: int = 10_000
    batch_size: int | None = None
    step_size: float | None = None
    cycles: int | None = None
    preconditioned: bool = True
    parts: int = 1

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_count(name, chains=self.chains, draws=self.draws, steps=self.steps)
        check_count(name, warmup=self.warmup)
        check_parts(self)
        if self.batch_size is not None:
            check_count(name, batch_size=self.batch_size)
        if self.step_size is not None:
            check_positive(name, step_size=self.step_size)
        if self.cycles is not None:
            check_count(name, cycles=self.cycles)
        if not isinstance(self.preconditioned, bool):
            raise TypeError(f"{name}(preconditioned={self.preconditioned!r}): True or False.")
        if not self.preconditioned and self.step_size is None:
            raise ValueError(
                f"{name}(preconditioned=False) measures no scales that would tell a step size. "
                "Pass step_size, in units of the coordinates: about a third of the smallest "
                "posterior standard deviation."
            )
        if len(kept_steps(self.steps, self.draws, self.cycles)) < self.draws:
            raise ValueError(
                f"{name}(draws={self.draws}, steps={self.steps}, cycles={self.cycles}): "
                "there are fewer steps to keep than draws. Raise steps, or lower draws."
            )

    @property
    def abreast(self) -> int:
        """Chains: every call of the gradient is for all of them."""
        return self.chains

    def findings(self, posterior: Posterior) -> list[Finding]:
        """See `Method.findings`."""
        return of_spread(posterior.stats)

    @property
    @abstractmethod
    def damping(self) -> float:
        """Rate at which velocity is forgotten, a unit of time; infinite where it is not kept."""


class Langevin(Rule):
    """The step above, of the leaf "mode". A rate is the step size of a chain.

    The state holds the velocity, the scale s, a centre, and "virial": minus the sum over steps of
    (z - centre) . grad log p(z, data) / size, whose mean under the density itself is 1.
    """

    def __init__(self, damping: float):
        self.damping = damping

    def begin(self, leaves: Mapping[str, Tensor], count: Tensor) -> dict[str, Any]:
        """See `Rule`."""
        z = leaves["mode"].detach()
        return {
            "velocity": torch.zeros_like(z),
            "scale": torch.ones_like(z),
            "centre": z.clone(),
            "virial": count,
        }

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
        z, gradient, (fresh,) = leaves["mode"], gradients["mode"], noise
        velocity, virial, step = state["velocity"], state["virial"], over(rate, z) * state["scale"]
        pull = -((z - state["centre"]) * gradient).mean(-1)
        virial.copy_(kept(virial + pull, virial))
        memory = torch.exp(-self.damping * rate)
        before = velocity + step * gradient
        after = over(memory, z) * before + over((1 - memory**2).sqrt(), z) * fresh
        velocity.copy_(kept(after, velocity))
        z.copy_(kept(z + 0.5 * step * (before + after), z))

    def midway(self, state: Mapping[str, Any], gradients: Mapping[str, Tensor]) -> None:
        """Scales as the gradient tells them."""
        gradient = torch.nan_to_num(gradients["mode"])
        state["scale"].copy_(1 / (1e-3 + gradient.abs()))
        state["velocity"].copy_(torch.randn_like(gradient))


def kept_steps(steps: int, draws: int, cycles: int | None) -> list[int]:
    """Steps after which a draw is kept: evenly spread over those that sample."""
    sampling = [k for k in range(steps) if _place(k, steps, cycles) >= _EXPLORING]
    count = min(draws, len(sampling))
    return [sampling[-(-(i + 1) * len(sampling) // count) - 1] for i in range(count)]


def _place(step: int, steps: int, cycles: int | None) -> float:
    """How far a cycle has come at a step, in [0, 1); 1 where there are none."""
    return 1.0 if cycles is None else step * cycles / steps % 1


def draw(
    method: Diffusion,
    model: Model,
    data: Data,
    sites: Sites,
    *,
    seed: np.random.SeedSequence,
    progress: bool,
) -> Posterior:
    """Ascends, measures scales, samples: `Method.fit` of the samplers on minibatches."""
    name = type(method).__name__
    require_continuous(sites, name)
    require_no_parameters(sites, name)
    if data.loader is not None or sites.subsampled or method.batch_size is not None:
        require_minibatches(sites, name)
    energy = Energy(model, data, sites)
    members = Members(method.chains, energy, energy.terms, data, method.batch_size)
    starts = energy.initial(method.chains, branch(seed, 0))
    z = starts[0] if members.axis is None else starts  # (chain, size), or (size,) of a single one
    batches = members.batches(branch(seed, 1))
    climb = max(1, round(_CLIMB * method.warmup))
    compiled = None if sites.subsampled else branch(seed, 2)
    with seeded(branch(seed, 3)):
        maximise(
            members.objective,
            {"mode": z},
            batches,
            Ascent(steps=climb),
            label="log joint",
            what=name,
            progress=progress,
            members=members.axis,
            culprit=members.culprit,
            seed=compiled,
        )
    with seeded(branch(seed, 4)):
        widest = _WIDEST * energy.prior_scale(branch(seed, 5))
        chains = _Chains(method, members, z, batches, widest, method.warmup - climb)
        phase = Phase("draws", chains)
        if compiled is not None and not phase.frozen:
            first = [next(batches), next(batches)]
            chains.step.hasten(method.steps + method.warmup - climb, first, branch(compiled, 0))
        with bar(method.steps + method.warmup - climb, name, progress) as shown, phase:
            shown.update(chains.number + chains.burn)
            chains.run(phase, shown)
        phase.require(bool(chains.positions))
        positions, stats = chains.kept()
    if chains.ran:
        warnings.warn(
            f"{name}: chains ran away {chains.ran} times while they drew, and went on from their "
            "last draw with half the step: draws near the edge of what is stable are missing. Pass "
            f"step_size below {float(stats['step_size'].min()):.2g}.",
            ConvergenceWarning,
            stacklevel=outside(),
        )
    return Posterior(
        model=model,
        method=method,
        data=data,
        sites=sites,
        draws=energy.unflatten(positions),
        stats=stats,
    )


class _Chains:
    """Chains on their way: first `burn` steps, counted up to 0, then those that draws come from."""

    def __init__(
        self,
        method: Diffusion,
        members: Members,
        z: Tensor,
        batches: Batches,
        widest: Tensor,
        burn: int,
    ):
        self.method, self.z = method, z.detach().requires_grad_()
        self.batches, self.widest, self.burn = batches, widest, burn
        self.members, self.stiffness = members, Stiffness(members, batches)
        self.rates = [method.step_size or _LONGEST] * method.chains
        fresh, rule = lambda *_: (torch.randn_like(z),), Langevin(method.damping)
        self.step = Step(members.objective, {"mode": self.z}, fresh, members.axis, rule=rule)
        self.noisiest = torch.zeros(method.chains, dtype=torch.float64)
        self.lost, self.lp = [0] * method.chains, [math.nan] * method.chains
        self.home, self.halved = z.detach().clone(), [0] * method.chains
        self.number, self.measured, self.since, self.sent, self.ran = -burn, 0, 0, 0, 0
        self.total = torch.zeros(method.chains, dtype=torch.float64)  # of lp, since the last draw
        self.positions: list[Tensor] = []
        self.stats: dict[str, list[Tensor]] = {k: [] for k in _STATS}

    def run(self, phase: Phase, shown: Any) -> None:
        """Burns in, with scales measured at the mode and on the way; then draws."""
        method, virial = self.method, self.step.state["virial"]
        wanted = set(kept_steps(method.steps, method.draws, method.cycles))
        measures = (-self.burn, self.burn // 4 - self.burn)
        if len(self.positions) != sum(number < self.number for number in wanted):
            raise CheckpointError("The state of a sampler has other draws than it says.")
        while self.number < method.steps and phase.goes_on():
            while self.measured < len(measures) and self.number >= measures[self.measured]:
                self.measure()
                self.measured += 1
            if self.number < 0:
                self.advance(1.0, shown)
                self.number += 1
                continue
            place = _place(self.number, method.steps, method.cycles)
            factor = 1.0 if method.cycles is None else 0.5 * (1 + math.cos(math.pi * place))
            if place < _EXPLORING:
                self.since = 0
            if self.since == 0:
                virial.zero_()
                self.total.zero_()
            self.total += torch.tensor(self.advance(factor, shown), dtype=torch.float64)
            self.since += 1
            if self.number in wanted:
                self.home.copy_(self.z.detach())
                rates = factor * torch.tensor(self.rates, dtype=torch.float64)
                self.positions.append(self.z.detach().reshape(method.chains, -1).clone())
                self.stats["lp"].append(self.total / self.since)
                self.stats["step_size"].append(rates)
                self.stats["temperature"].append(virial.reshape(-1).double() / self.since)
                self.stats["noise"].append(self.noise(rates))
                self.since = 0
            self.number += 1

    def kept(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Positions, (chain, draw, size), and the statistics, (chain, draw) each."""
        stats = {k: torch.stack(v, 1) for k, v in self.stats.items()}
        return torch.stack(self.positions, 1), stats

    def state(self) -> dict[str, Any]:
        """See `bnn.run.Loop`."""
        return {
            "step": self.step.whole(),
            "batches": self.batches.state(),
            "rates": self.rates,
            "noisiest": self.noisiest,
            "lost": self.lost,
            "home": self.home,
            "halved": self.halved,
            "lp": torch.tensor(self.lp, dtype=torch.float64),
            "total": self.total,
            "numbers": [self.number, self.measured, self.since, self.ran],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `bnn.run.Loop`."""
        self.step.restore(state["step"])
        self.batches.restore(state["batches"])
        self.rates, self.noisiest, self.lost = state["rates"], state["noisiest"], state["lost"]
        self.home, self.halved = state["home"], state["halved"]
        self.lp, self.total = state["lp"].tolist(), state["total"]
        self.number, self.measured, self.since, self.ran = state["numbers"]
        if not min(self.rates) > 0 or not torch.isfinite(self.step.state["scale"]).all():
            raise CheckpointError("The state of a sampler has a scale or step size of NaN.")

    def fresh(self) -> dict[str, Any]:
        """See `bnn.run.Streaming`."""
        new = slice(self.sent, len(self.positions))
        self.sent = new.stop
        if new.start == new.stop:
            return {}
        stats = {k: torch.stack(v[new]) for k, v in self.stats.items()}
        return {"positions": torch.stack(self.positions[new]), "stats": stats}

    def refill(self, chunk: Mapping[str, Any]) -> None:
        """See `bnn.run.Streaming`."""
        self.positions.extend(chunk["positions"])
        for name, values in self.stats.items():
            values.extend(chunk["stats"][name])
        self.sent = len(self.positions)

    def advance(self, factor: float, shown: Any) -> list[float]:
        """One step of every chain, left out where it is not finite.

        Returns:
            The log joint of each chain before the step, on its minibatch.
        """
        batch = next(self.batches)
        outcomes = self.step(batch, [factor * h for h in self.rates], 1.0)
        for chain, (value, bad) in enumerate(outcomes):
            self.lost[chain] = self.lost[chain] + 1 if bad else 0
            self.lp[chain] = self.lp[chain] if bad else value
            if self.lost[chain] == 3:
                self.retreat(chain, batch, bad)
        shown.update()
        return self.lp

    def retreat(self, chain: int, batch: tuple[Any, ...], bad: str) -> None:
        """Puts a chain that has run away back to its last draw, with half the step size."""
        self.halved[chain] += 1
        if self.method.step_size is not None or self.halved[chain] > _RETREATS:
            raise FitError(
                f"{type(self.method).__name__}, chain {chain}: the log density was not finite "
                "three times in a row: the chain has run away. Lower step_size (it was "
                f"{self.rates[chain]:.2g}), or rescale the data.",
                step=self.number + self.burn,
                site=self.members.culprit({"mode": self.z}, batch, chain) or bad,
            )
        at = chain if self.members.axis is not None else slice(None)
        with torch.no_grad():
            self.z[at] = self.home[at]
            self.step.state["velocity"][at].normal_()
        self.rates[chain], self.lost[chain] = self.rates[chain] / 2, 0
        self.ran += self.number >= 0  # in burn-in it costs nothing but time

    def measure(self, again: bool = False) -> None:
        """Scales and step sizes for where the chains are; one on its way to infinity comes back."""
        z, state, method = self.z.detach(), self.step.state, self.method
        if method.preconditioned:
            state["scale"].copy_(self.stiffness.scales(z, self.widest))
            state["velocity"].normal_()
        self.noisiest = self.stiffness.noisiest(z, state["scale"]).reshape(-1).double()
        if method.step_size is None:
            stable = _STABLE / self.stiffness.stiffest(z, state["scale"]).sqrt().reshape(-1)
            still = 1 / method.damping  # from coth x <= 1 + 1 / x
            quiet = (still**2 + 4 * _NOISE / self.noisiest).sqrt() - still
            longest = stable.minimum(quiet).clamp(max=_LONGEST).tolist()
            self.rates = [h * 0.5**n for h, n in zip(longest, self.halved, strict=True)]
        told = torch.cat(
            [torch.tensor(self.rates)[:, None], state["scale"].view(len(self.rates), -1)], 1
        )
        away = ~torch.isfinite(told).all(1)
        if away.any() and self.measured and not again:  # on the way out, not yet at infinity
            at = away if self.members.axis is not None else slice(None)
            with torch.no_grad():
                self.z[at] = self.home[at]
            return self.measure(again=True)
        if away.any():
            raise FitError(
                f"{type(method).__name__}: the gradient is not finite where the chains are. "
                "Rescale the data, or narrow the priors.",
                step=self.number + self.burn,
            )
        self.home.copy_(z)

    def noise(self, rates: Tensor) -> Tensor:
        """What fresh minibatches would add to the variance in the noisiest direction, (chain,).

        Relative to it. Their variance c in a scaled direction adds c h^2 / 4 coth(friction h / 2)
        where that bends little in a step: c h / (2 friction) where velocity is kept for many
        steps, c h^2 / 4 where it is not. What cancels over a pass is not taken off.
        """
        return self.noisiest * rates**2 / 4 / torch.tanh(self.method.damping * rates / 2)


def _mean(x: Tensor) -> tuple[float, float]:
    """The mean of (chain, draw) and its standard error, from blocks of a quarter of each chain."""
    blocks = torch.cat([block.mean(1) for block in x.chunk(4, 1)])
    error = float(blocks.std()) / math.sqrt(len(blocks)) if len(blocks) > 1 else math.inf
    return float(blocks.mean()), error


def of_spread(stats: Mapping[str, Tensor]) -> list[Finding]:
    """Whether the draws are as spread as the posterior: the noise of minibatches, and the whole."""
    mean, error = _mean(stats["temperature"])
    noise, h = float(stats["noise"].mean()), float(stats["step_size"].mean())
    noisy, limit = not noise <= _NOISY, max(_LIMIT, 4 * error)
    wrong = not abs(mean - 1) <= limit
    cause = (
        "narrower than the posterior: the chains have not filled it"
        if mean < 1
        else "wider than the posterior, or less so where minibatches are passes over the rows, "
        "whose noise cancels"
    )
    return [
        Finding(
            name="noise of minibatches",
            value=noise,
            threshold=_NOISY,
            doubtful=noisy,
            meaning=f"The noise of minibatches adds up to {noise:.2g} times the posterior's "
            "variance in its noisiest direction.",
            advice=f"Lower step_size (now {h:.2g}) and raise steps, or raise batch_size.",
        ),
        Finding(
            name="|temperature - 1|",
            value=abs(mean - 1),
            threshold=limit,
            doubtful=wrong and not noisy,  # noise says it already
            meaning=f"The draws' temperature is {mean:.2f} and should be 1"
            + (f": on average over directions they are {cause}." if wrong else "."),
            advice="Raise warmup and steps."
            if mean < 1
            else f"Lower step_size (now {h:.2g}) and raise steps.",
        ),
    ]
