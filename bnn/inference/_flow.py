"""Flow: a model under masks of its generators, their reward, and the balance of the two."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from bnn.data import take
from bnn.diagnostics import Finding
from bnn.handlers import At, Rewrite, Score
from bnn.inference._energy import Energy
from bnn.inference._mask_generators import (
    Flat,
    Generator,
    Labels,
    normal,
    seams_of,
    starting_weights,
)
from bnn.inference._unit_masks import Masking, Place
from bnn.method import Model, Tensors

_CELLS = 16_384  # masks x rows in one call
_EVALUATIONS = 10_000_000  # masks x rows that log Z and the findings may cost,
_BY_ROW = 2_000_000  # and where the generators run for each row
_FEW = 1_000  # rows at which log Z is looked for before the first step


@dataclass(frozen=True)
class Scored:
    """One run under masks.

    Attributes:
        likelihood: log p(data | z, W), on a minibatch scaled to all rows, ().
        prior: log p(W), ().
        each: log p(y | x, z, W): of all rows, (), or of each row, (row,), as what follows.
        log_q: log probability of the masks under the policy.
        log_p: under their prior.
        log_z: what the net for it says; 0 where there is none.
        others: what is drawn already of the other particles, (particle, *) each; see `Flow.run`.
    """

    likelihood: Tensor
    prior: Tensor
    each: Tensor
    log_q: Tensor
    log_p: Tensor
    log_z: Tensor
    others: tuple[Tensor, ...]

    def gap(self, power: float) -> Tensor:
        """Log q + log Z - log reward; the same for all masks where q is the posterior's."""
        return self.log_q + self.log_z - power * self.each.detach() - self.log_p.detach()


class Flow:
    """A model under the masks of its generators.

    Args:
        energy: the log joint.
        places: seams to mask, in the order in which the model meets them.
        masking: how they are masked.
        labels: of rows, where each row has masks of its own; None where all share one.
    """

    def __init__(
        self,
        energy: Energy,
        places: Sequence[Place],
        masking: Masking,
        labels: Labels | None,
    ):
        self.energy, self.places, self.masking, self.labels = energy, places, masking, labels

    def noise(self, particles: int, rows: int) -> tuple[Tensor, ...]:
        """Uniforms for so many masks of each seam, (particle, [row,] unit)."""
        lead = (particles,) if self.labels is None else (particles, rows)
        return tuple(torch.rand(*lead, place.units) for place in self.places)

    def start(self, width: int, z: Tensor, power: float | None) -> Tensors:
        """Weights of the generators before the first step.

        Args:
            width: of their state.
            z: flat vector of the model's own sites, (size,).
            power: of the likelihood in the reward, where log Z is learned: it starts at what the
                first masks say. None where it is not.
        """
        made = starting_weights(self.places, "policy", width, self.labels)
        if self.labels is not None:
            made |= starting_weights(self.places, "prior", width, None, seeing=True)
        if power is None:
            return made
        if self.labels is not None:
            made["log_z.activations"] = normal(self.places[0].units, width)
            made["log_z.label"] = normal(self.labels.columns, width)
            made["log_z.hidden"] = 0.5 * torch.randn(width)
            made["log_z.outward"] = 0.1 * torch.randn(width) / math.sqrt(width)
        few = take(self.energy.data.tensors, slice(0, _FEW))
        gap = lambda *uniforms: self.run(z, few, made, uniforms).gap(power)
        with torch.no_grad():
            gaps = self.energy.batched(gap, *self.noise(16, len(few[-1])))
        return made | {"log_z.bias": -gaps.mean()}

    def share(self, args: tuple[Any, ...]) -> float:
        """The share of all rows that the arguments show; 1 where the one mask is for all."""
        return 1.0 if self.labels is None else len(args[-1]) / self.energy.data.rows

    def run(
        self,
        z: Tensor,
        args: tuple[Any, ...],
        tensors: Mapping[str, Tensor],
        uniforms: Sequence[Tensor],
        temperature: float = 1.0,
        drawn: tuple[Tensor, ...] = (),
    ) -> Scored:
        """The model at the mode z, under masks of the policy that come of uniforms.

        Particles meet the first seam at the same activations: their masks are drawn there together,
        by the run of the first of them.

        Args:
            z: flat vector of the model's own sites, (size,).
            args: the model's arguments.
            tensors: weights of the generators.
            uniforms: of each seam, ([row,] unit); of the first, (particle, [row,] unit) where this
                run draws for several.
            temperature: see `Masks.draw`. The first of several particles is drawn at 1.
            drawn: what `Scored.others` of the first particle's run holds for this one.
        """
        energy, sites = self.energy, self.energy.sites
        drawing = _Drawing(self, tensors, args[-1], temperature, drawn)
        pairs = zip(self.places, uniforms, strict=True)
        rules = {place.name: partial(drawing, place, each) for place, each in pairs}
        score = Score(sites.plate, energy.data.rows, by_row=self.labels is not None)
        with score, At(energy.values(z)), Rewrite(rules):
            energy.model(*args)
        likelihood = torch.as_tensor(score.likelihood)
        prior = torch.as_tensor(score.prior, dtype=likelihood.dtype)
        each = likelihood if self.labels is None else score.rowwise * self.share(args)
        logs = drawing.log_q, drawing.log_p, drawing.log_z
        return Scored(likelihood, prior, each, *logs, drawing.others)

    def draws(self, tensors: Mapping[str, Tensor], count: int) -> Tensors:
        """Masks for all rows from the policy, "<seam>.mask" (1, mask, unit); none by row."""
        if self.labels is not None:
            return {}
        policy, made = Generator(tensors, "policy"), {}
        for place, uniforms in zip(self.places, self.noise(count, 0), strict=True):
            bits, _ = policy.law(place.name).draw(uniforms)
            policy.take(place.name, bits)
            made[f"{place.name}.mask"] = bits[None]
        return made

    def scores(
        self,
        z: Tensor,
        batches: Iterable[tuple[Any, ...]],
        tensors: Mapping[str, Tensor],
        count: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log p(y | x, z, W), log q and log p of masks from the policy, (mask,) or (mask, row).

        Args:
            z: see `run`.
            batches: one pass over the rows.
            tensors: see `run`.
            count: of masks at most; fewer where the rows are many.
        """
        affordable = _EVALUATIONS if self.labels is None else _BY_ROW
        count = min(max(affordable // max(self.energy.data.rows, 1), 16), count)
        shared = self.noise(count, 0) if self.labels is None else ()
        found: list[list[Tensor]] = []
        for args in batches:
            rows = len(args[-1])

            def at(*each: Tensor, args: tuple[Any, ...] = args) -> tuple[Tensor, ...]:
                one = self.run(z, args, tensors, each)
                return one.each, one.log_q, one.log_p

            step = max(1, _CELLS // max(rows, 1))
            parts = []
            for i in range(0, count, step):
                some = [u[i : i + step] for u in shared] or self.noise(min(step, count - i), rows)
                parts.append(self.energy.batched(at, *some))
            found.append([torch.cat(each) for each in zip(*parts, strict=True)])
            if self.labels is None:
                found[-1][0] *= rows / self.energy.data.rows
        each, log_q, log_p = zip(*found, strict=True)
        if self.labels is None:
            return torch.stack(each).sum(0), log_q[0], log_p[0]
        return torch.cat(each, 1), torch.cat(log_q, 1), torch.cat(log_p, 1)


class _Drawing:
    """The masks of one run, drawn as its program meets the seams; see `Flow.run`."""

    def __init__(
        self,
        flow: Flow,
        tensors: Mapping[str, Tensor],
        y: Tensor,
        temperature: float,
        drawn: tuple[Tensor, ...],
    ):
        self.flow, self.tensors, self.temperature = flow, tensors, temperature
        self.label = None if drawn or flow.labels is None else flow.labels(y)
        self.policy = Generator(tensors, "policy", self.label)
        self.prior = None if flow.labels is None else Generator(tensors, "prior")
        self.log_q: Any = 0.0
        self.log_p: Any = 0.0
        self.log_z = tensors.get("log_z.bias", torch.zeros(()))
        self.others: tuple[Tensor, ...] = ()
        self.first = self._stand(drawn) if drawn else None

    def __call__(self, place: Place, uniforms: Tensor, h: Tensor) -> Tensor:
        masking, opening = self.flow.masking, place is self.flow.places[0]
        bits = self.first if opening else None
        if bits is None:
            bits = self._draw(place, uniforms, masking.pooled(place.name, h))
        return masking.masked(place.name, h, bits)

    def _draw(self, place: Place, uniforms: Tensor, context: Tensor | None) -> Tensor:
        several = uniforms.ndim > (1 if context is None else 2)
        temperature: Any = self.temperature
        if several:
            each = torch.tensor([1.0] + [temperature] * (len(uniforms) - 1))
            temperature = each.reshape(-1, *[1] * (uniforms.ndim - 1))
        bits, log_q = self.policy.law(place.name, context).draw(uniforms, temperature)
        if self.prior is None:
            log_p = _independent(place.keep, bits)
        else:
            log_p = self.prior.law(place.name, context).log_prob(bits)
        self.log_q, self.log_p = self.log_q + log_q, self.log_p + log_p
        if place is self.flow.places[0] and "log_z.outward" in self.tensors:
            self.log_z = self.log_z + self._amortised(context, self.label)
        if place is not self.flow.places[-1]:
            for generator in self._generators:
                generator.take(place.name, bits)
        return self._part(bits) if several else bits

    @property
    def _generators(self) -> list[Generator]:
        return [self.policy] if self.prior is None else [self.policy, self.prior]

    def _part(self, bits: Tensor) -> Tensor:
        """Goes on as the first particle; returns its mask, and notes what the others go on from."""
        states = [each.state for each in self._generators if len(self.flow.places) > 1]
        log_z = self.log_z.expand(self.log_q.shape)
        every = (bits, self.log_q, self.log_p, log_z, *states)
        self.others, self.temperature = tuple(each[1:] for each in every), 1.0
        return self._stand(tuple(each[0] for each in every))

    def _stand(self, drawn: tuple[Tensor, ...]) -> Tensor:
        """Goes on from what was drawn of one particle; returns its first mask."""
        bits, self.log_q, self.log_p, self.log_z, *states = drawn
        for generator, state in zip(self._generators, states, strict=False):
            generator.state = state
        return bits

    def _amortised(self, context: Any, label: Any) -> Tensor:
        """Log Z of each row but for a constant, (row,): of its first activations and its label."""
        weights = {k: v for k, v in self.tensors.items() if k.startswith("log_z.")}
        state = context @ weights["log_z.activations"] + weights["log_z.hidden"]
        return silu(state + label @ weights["log_z.label"]) @ weights["log_z.outward"]


def _independent(keep: float, bits: Tensor) -> Tensor:
    """Log probability of a mask whose units are kept independently."""
    return -softplus((1 - 2 * bits) * math.log(keep / (1 - keep))).sum(-1)


class Balance:
    """The objective: masks in balance with their reward, and all else at the masks.

    Args:
        flow: the model under masks.
        flat: weights of the generators as the leaf "masks".
        mode: the model's own sites where it has none, and so no leaf "mode".
        power: of the likelihood in the reward.
        temperature: at which all masks but the first are drawn.
        squared: True for the mean square of the gap (trajectory balance), False for its variance.
    """

    def __init__(
        self, flow: Flow, flat: Flat, mode: Tensor, power: float, temperature: float, squared: bool
    ):
        self.flow, self.flat, self.mode = flow, flat, mode
        self.power, self.temperature, self.squared = power, temperature, squared

    def __call__(
        self,
        tensors: Mapping[str, Tensor],
        batch: tuple[Tensor, ...],
        weight: Tensor,
        noise: tuple[Tensor, ...],
    ) -> Tensor:
        flow, z, own = self.flow, tensors.get("mode", self.mode), self.flat(tensors["masks"])
        opening, later = noise[0], noise[1:]
        uniforms = [opening, *(each[0] for each in later)]
        first = flow.run(z, batch, own, uniforms, self.temperature)
        gaps = first.gap(self.power)[None]  # (particle, [row])

        def gap(*given: Tensor) -> Tensor:
            drawn, uniforms = given[: len(first.others)], given[len(first.others) :]
            uniforms = [opening, *uniforms]
            run = flow.run(z.detach(), batch, own, uniforms, self.temperature, drawn)
            return run.gap(self.power)

        if len(opening) > 1:
            others = flow.energy.batched(gap, *first.others, *(each[1:] for each in later))
            gaps = torch.cat([gaps, others])
        lost = gaps.square().mean(0) if self.squared else gaps.var(0)
        learned = first.log_p if flow.masking.apart else torch.zeros(())
        joint = first.likelihood + weight * first.prior
        return joint + (learned - lost).sum() / flow.share(batch)


def program(model: Model, params: Tensors, masking: Masking) -> Model:
    """The model under masks: global sites, or sites of a row, drawn by their prior.

    Args:
        model: the user's model.
        params: weights of the generators.
        masking: how its units are masked.
    """

    def drawing(*args: Any) -> Any:
        prior, shared = Generator(params, "prior"), {}
        for seam, units in seams_of(params).items():
            if not masking.apart:
                keep = torch.full((units,), masking.keep_of(seam))
                shared[seam] = pyro.sample(f"{seam}.mask", dist.Bernoulli(keep).to_event(1))

        def at(seam: str, h: Tensor) -> Tensor:
            mask = shared.get(seam)
            if mask is None:
                mask = pyro.sample(f"{seam}.mask", prior.law(seam, masking.pooled(seam, h)))
                prior.take(seam, mask)
            return masking.masked(seam, h, mask)

        with Rewrite({seam: partial(at, seam) for seam in seams_of(params)}):
            return model(*args)

    return drawing


def assess(
    each: Tensor, log_q: Tensor, log_p: Tensor, power: float
) -> tuple[float, dict[str, Tensor]]:
    """Log Z by importance weights, summed over rows, and what the weights say of the masks.

    Args:
        each: log likelihood at masks drawn from q, (mask,) or (mask, row).
        log_q: log probability of the masks under q.
        log_p: under their prior.
        power: of the likelihood in the reward.
    """
    log_weight = (power * each + log_p - log_q).double()
    log_z = log_weight.logsumexp(0) - math.log(len(log_weight))
    share = (2 * log_z - (2 * log_weight).logsumexp(0)).exp() * len(log_weight)
    found = {
        "balance.residual": log_weight.std(0).mean(),
        "balance.effective": share.mean(),
        "balance.entropy": -(log_q if log_q.ndim == 1 else log_p).mean(),
    }
    return float(log_z.sum()), {name: value.to(each.dtype) for name, value in found.items()}


def findings(params: Tensors) -> list[Finding]:
    """What `assess` found, read against what is usual."""
    residual, effective, entropy = (
        float(params[f"balance.{name}"]) for name in ("residual", "effective", "entropy")
    )
    share = entropy / (math.log(2) * sum(seams_of(params).values()))
    return [
        Finding(
            name="balance residual",
            value=residual,
            threshold=1.0,
            doubtful=residual > 1,
            meaning="Sd over masks of log q + log Z - log reward, nats; 0 where q is exact.",
            advice="Raise steps, blocks or width.",
        ),
        Finding(
            name="effective masks",
            value=effective,
            threshold=0.1,
            doubtful=effective < 0.1,
            meaning="Effective share of q's masks as importance samples of their posterior, "
            "on which log_evidence rests.",
            advice="Raise steps, blocks or width; do not read log_evidence.",
        ),
        Finding(
            name="mask entropy",
            value=share,
            threshold=0.01,
            doubtful=share < 0.01,
            meaning="Entropy of the masks that predictions draw, over that of fair coins.",
            advice="All masks are one: lower steps or generator_learning_rate, or use MAP.",
        ),
    ]
