"""Rowwise: weights that every row draws for itself, so that the noise of rows averages out.

The expected log likelihood is a sum over rows, E_q[sum_i log p(y_i | w)], and so the draw of w need
not be the same in every row: the mean stays, and the covariance between rows, which no minibatch
makes smaller, goes. Under q(w) = N(mean, diag(var)), for a row x_i of a linear map

    local     x_i w ~ N(x_i mean, x_i^2 var)                       (Kingma et al. 2015)
    flipout   x_i mean + ((x_i * s_i) dw) * r_i,  dw = w - mean    (Wen et al. 2018)

with s_i, r_i random signs. Where a row meets a weight at several places (a convolution, tokens, a
recurrence) the places share the row's weight. So "local" draws that weight in place of the
pre-activations, which published code takes for independent, and flipout's signs are of the row.

A site may be drawn so if its log likelihoods meet it in linear maps alone, each row at its own
place on the first axis. That is read off a run (`row_sites`); all other sites have one draw.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap

from bnn import processes
from bnn.errors import ModelError
from bnn.inference._energy import Energy
from bnn.inference._layers import LinearMap, Rewired

Draw = Callable[[Sequence[int]], Tensor]
Ask = Callable[[str, Sequence[int], Draw], Tensor]
"""Of a name, a shape and the law: noise, the same for the same name in one run."""


@dataclass(frozen=True)
class RowSite:
    """A weight that each row may draw for itself.

    Attributes:
        bias: site of the bias that goes with it, or None where that is none, or has one draw.
        once: True if a row meets it at one place.
    """

    bias: str | None
    once: bool


@dataclass(frozen=True)
class _Gaussian:
    """What q says of one site."""

    mean: Tensor
    variance: Tensor


Estimator = Callable[[LinearMap, _Gaussian, _Gaussian | None, bool, Ask], Tensor]


def signs(shape: Sequence[int]) -> Tensor:
    """+1 and -1, each with probability 1/2 (Rademacher), the bits of random bytes."""
    count = math.prod(shape)
    words = torch.randint(-(2**63), 2**63 - 1, (count // 64 + 1,))
    bits = words.view(torch.uint8)[:, None] >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.reshape(-1)[:count].reshape(shape).to(torch.get_default_dtype()).mul_(2).sub_(1)


def local(met: LinearMap, w: _Gaussian, b: _Gaussian | None, once: bool, ask: Ask) -> Tensor:
    """The map by local reparameterization."""
    offset = met.offset if b is None else b.mean
    if not once:
        each = w.mean + w.variance.sqrt() * ask("weight", (len(met.x), *w.mean.shape), torch.randn)
        out = vmap(lambda x, weight: met.apply(x[None], weight)[0])(met.x, each)
        if b is not None:
            noise = ask("bias", (len(met.x), *b.mean.shape), torch.randn)
            out = out + met.by_row(b.variance.sqrt() * noise, out)
        return out if offset is None else out + met.over_places(offset)
    mean, variance = met.apply(met.x, w.mean), met.apply(met.x.square(), w.variance)
    if offset is not None:
        mean = mean + met.over_places(offset)
    if b is not None:
        variance = variance + met.over_places(b.variance)
    tiny = torch.finfo(variance.dtype).tiny  # at 0, inputs all 0, a root has no slope
    return mean + variance.clamp(min=tiny).sqrt() * ask("output", mean.shape, torch.randn)


def flipout(met: LinearMap, w: _Gaussian, b: _Gaussian | None, once: bool, ask: Ask) -> Tensor:
    """The map by flipout: the perturbations alone are turned, and have mean zero."""
    offset = met.offset if b is None else b.mean
    turned = met.x * met.by_row(ask("inputs", (len(met.x), met.inputs), signs), met.x)
    spread = met.apply(turned, met.weight - w.mean)
    if b is not None and met.offset is not None:
        spread = spread + met.over_places(met.offset - b.mean)
    if met.weight.ndim > 1:
        units = (len(met.x), spread.shape[-1 - met.places])
        spread = spread * met.by_row(ask("outputs", units, signs), spread)
    out = met.apply(met.x, w.mean) + spread
    return out if offset is None else out + met.over_places(offset)


class Rowwise:
    """An estimator's noise, and the runs that use it.

    Attributes:
        sites: the weights that rows draw for themselves, by site.

    Args:
        energy: the log joint.
        estimator: `local` or `flipout`.
        seed: of the run that finds them.
    """

    def __init__(self, energy: Energy, estimator: Estimator, seed: np.random.SeedSequence):
        if processes.current() is not None:
            raise ModelError(
                f'SVI(estimator="{estimator.__name__}") draws noise for each row, which processes '
                'that share a fit would draw alike. Use estimator="reparameterization".'
            )
        self.estimator = estimator
        self.sites = row_sites(energy, seed)
        if not self.sites:
            raise ModelError(
                f'SVI(estimator="{estimator.__name__}") draws the weights of linear maps for each '
                "row, and the model has none that allows it. It takes torch.nn layers at sampled "
                "weights, and x @ w, with rows on the first axis of x, in a model with a data "
                "plate, where w is a real-valued site itself (not w.T, not raw * scale). Write it "
                'so, or use estimator="reparameterization".'
            )
        self._slots = {slot.name: slot for slot in energy.slots}

    def rewired(self, moments: tuple[Tensor, Tensor], ask: Ask) -> Rewired:
        """A run in it draws the maps' outputs; `moments` are mean and variance of the flat z."""

        def gaussian(name: str | None) -> Any:
            if name is None:
                return None
            slot = self._slots[name]
            return _Gaussian(*(m[slot.span].reshape(slot.free) for m in moments))

        def rule(met: LinearMap) -> Tensor:
            site = self.sites[met.site]
            of_site: Ask = lambda name, *rest: ask(f"{met.site} {name}", *rest)
            given = gaussian(met.site), gaussian(site.bias)
            return self.estimator(met, *given, site.once, of_site)

        return Rewired(dict.fromkeys(self.sites, rule))


def row_sites(energy: Energy, seed: np.random.SeedSequence) -> dict[str, RowSite]:
    """The weights of linear maps that each row may draw for itself, by site."""
    z = energy.starts(1, seed)[0]
    real = {slot.name for slot in energy.slots if slot.real}
    run = _Cut(energy, z, real, set())
    sites = {name for name in run.maps if run.by_row(name) and not run.reached(name)}
    pairs = {name: {met.bias for met, _ in run.maps[name]} for name in sites}
    owners = [bias for biases in pairs.values() for bias in biases]
    own = {
        bias
        for biases in pairs.values()
        for bias in biases
        if len(biases) == 1 and bias in real and owners.count(bias) == 1
    }
    run = _Cut(energy, z, sites, own) if own else run
    found = {}
    for name in run.maps.keys() & sites:
        (bias, *_) = pairs[name]
        once = len(run.maps[name]) == 1 and _is_one_place(*run.maps[name][0])
        found[name] = RowSite(bias if bias in own and not run.reached(bias) else None, once)
    return found


class _Cut:
    """A run whose linear maps are cut off from their sites, to see who else reaches them.

    Attributes:
        maps: the maps of each site, with a zero that was added to the output of each.
    """

    def __init__(self, energy: Energy, z: Tensor, sites: set[str], biases: set[Any]):
        self.energy, self.maps = energy, dict[str, list[tuple[LinearMap, Tensor]]]()
        self.z = z.detach().clone().requires_grad_()

        def cut(met: LinearMap) -> Tensor:
            offset = met.offset
            if offset is not None and met.bias in biases:
                offset = offset.detach()
            out = replace(met, weight=met.weight.detach(), offset=offset)()
            self.maps.setdefault(met.site, []).append((met, torch.zeros_like(out)))
            return out + self.maps[met.site][-1][1].requires_grad_()

        args = energy.few
        rows = torch.zeros(energy.sites.subsample_size or len(args[-1])).requires_grad_()
        with Rewired(dict.fromkeys(sites, cut)):
            likelihood, prior = energy.terms(self.z, args, weights=rows)
        # At weights 0 the total is what no row owns, and its slope in them what each row adds.
        self.shared = likelihood + prior
        (self.each,) = torch.autograd.grad(self.shared, rows, create_graph=True, allow_unused=True)
        if self.each is None or not self.each.requires_grad:
            self.maps = {}

    def reached(self, name: Any) -> bool:
        """True if the rows' log densities depend on a site otherwise than through the cut maps."""
        slope = _slopes(self.each.sum(), [self.z])[0]
        (slot,) = (slot for slot in self.energy.slots if slot.name == name)
        return slope is not None and bool(slope[slot.span].any())

    def by_row(self, name: str) -> bool:
        """True if a row's log density depends on one place of the outputs' first axis, at most."""
        maps, outputs = [m for m, _ in self.maps[name]], [o for _, o in self.maps[name]]
        alike = {(m.axis, len(m.x), m.x.ndim if m.places else 0, m.groups) for m in maps}
        shaped = all(
            m.x.ndim >= 2 and len(m.x) == len(out) and (m.places or m.weight.ndim <= 2)
            and m.x.ndim >= m.places + 2
            for m, out in zip(maps, outputs, strict=True)
        )  # fmt: skip
        if len(alike) > 1 or not shaped or _places(_slopes(self.shared, outputs)):
            return False
        rows = {0, len(self.each) // 2, len(self.each) - 1}
        return all(len(_places(_slopes(self.each[i], outputs))) <= 1 for i in rows)


def _slopes(value: Tensor, of: list[Tensor]) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(value, of, retain_graph=True, allow_unused=True)


def _places(slopes: tuple[Tensor | None, ...]) -> set[int]:
    """Where on the first axis a slope is not 0."""
    found: set[int] = set()
    for slope in slopes:
        if slope is not None:
            found |= set(slope.reshape(len(slope), -1).any(1).nonzero()[:, 0].tolist())
    return found


def _is_one_place(met: LinearMap, out: Tensor) -> bool:
    units = out.shape[-1 - met.places] if met.weight.ndim > 1 else 1
    return out[0].numel() == units
