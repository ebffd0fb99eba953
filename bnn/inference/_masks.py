"""Masks: where they act in a program, and its log joint under them.

    W = M diag(z) / (1 - rate),   z_j ~ Bernoulli(1 - rate)

for each input (unit, or channel of a convolution) of a linear map. A draw is one mask for all rows,
so it is a draw of the weights, and a function. In the expectation that is optimised every row may
have a mask of its own, which drops its inputs x in place of columns of M: where rows do not see
each other the expectation is the same, and its noise averages out over rows. That they do not is
seen by a run on some rows in another order; where they do, all share the masks of a step.

Where what a dropout of the net's own returns goes into one linear map and nowhere else, its mask is
one of that map's weight; else it is a latent site of its own, "dropout.0", shared by all rows.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.func import vmap

from bnn.data import take
from bnn.errors import ModelError
from bnn.handlers import At, seeded, unvalidated
from bnn.inference._energy import Energy
from bnn.inference._layers import LinearMap, Rewired
from bnn.inference._own_dropout import Call, Dropping, Watch
from bnn.method import Tensors
from bnn.observations import innermost

_NUMBER = int | float | np.integer | np.floating


@dataclass(frozen=True)
class Place:
    """A weight whose map's inputs can be dropped.

    Attributes:
        map: the first call.
        hidden: True where what it is given was computed from a latent site.
        by_row: True where each row may have a mask of its own in an expectation.
        normal: True where its prior is Normal.
    """

    map: LinearMap
    hidden: bool
    by_row: bool
    normal: bool


@dataclass(frozen=True)
class Own:
    """A dropout that the net has itself.

    Attributes:
        rate: probability of dropping.
        shape: of the mask of a draw: that of what is dropped, with 1 for the axis of rows and,
            where channels are dropped, for those of places.
        by_row: see `Place`.
        site: of the weight that its mask is one of, or None.
    """

    rate: float
    shape: tuple[int, ...]
    by_row: bool
    site: str | None


@dataclass(frozen=True)
class Layout:
    """Where masks act: weights by site, and the net's own dropouts by the name of their mask."""

    places: dict[str, Place]
    own: dict[str, Own]

    def rates(self, rate: float | Mapping[str, float] | None, call: str) -> dict[str, float]:
        """Rates by site, or by the name of a mask of the net's own.

        Args:
            rate: of the inputs of every hidden layer (of all maps where none is hidden); by site;
                or None for what the net drops itself.
            call: the settings as the user wrote them, for messages.

        Raises:
            ModelError: the net drops by itself and has a rate too, or no or an unknown site.
        """
        if rate is None:
            return {own.site or name: own.rate for name, own in self.own.items()}
        if self.own:
            raise ModelError(
                f"{call} states a rate, and the net drops by itself (rates "
                f"{', '.join(f'{own.rate:g}' for own in self.own.values())}). Use MCDropout() "
                "without a rate, which draws the net's own masks, or set the p of its dropout to 0."
            )
        known = ", ".join(self.places) or "none"
        if isinstance(rate, Mapping):
            if unknown := sorted(rate.keys() - self.places.keys()):
                raise ModelError(
                    f'{call} names "{unknown[0]}", which is not the weight of a linear map or a '
                    f"convolution, or cannot be 0. Those of the model are: {known}."
                )
            return dict(rate)
        if not self.places:
            raise ModelError(
                f"{call} drops inputs of linear maps, and no latent site of the model is the "
                "weight of one: sampled, used as it is by torch.nn.Linear, a convolution or x @ w, "
                "and free to be 0. Use another method, such as bnn.SVI()."
            )
        hidden = [site for site, place in self.places.items() if place.hidden]
        return dict.fromkeys(hidden or self.places, rate)


def find(
    energy: Energy, args: tuple[Any, ...], seed: np.random.SeedSequence
) -> tuple[Tensor, Layout]:
    """A starting point, (size,), and where masks can act in the program.

    Found by running it there, and again on every second row in the opposite order: who looks at
    other rows, at a mean over them or at those before, gives itself away.

    Raises:
        ModelError: it drops inside of a larger operation.
    """
    with Dropping({}):  # its own masks would make the start depend on them
        z = energy.starts(1, seed)[0]
    with seeded(seed):
        return z, _layout(energy, z.clone(), args)


def _layout(energy: Energy, z: Tensor, args: tuple[Any, ...]) -> Layout:
    sites, rows = energy.sites, len(args[-1])
    values = energy.values(z.requires_grad_())  # so that what a site feeds shows it
    whole, fewer = _Run(energy, values, args), None
    order = torch.arange(rows - 1, 0, -2)
    if rows > 1 and sites.plate is not None and sites.row_axis is not None:
        try:
            fewer = _Run(energy, values, take(args, order))
        except Exception:  # the model states how many rows there are
            pass
    if fewer is not None and not fewer.calls_as(whole):
        fewer = None
    apart = fewer is not None and not sites.subsampled and fewer.shows(whole, order)
    again = whole if fewer is None else fewer
    places: dict[str, Place] = {}
    for slot in energy.slots:
        pairs = zip(whole.maps, again.maps, strict=False)
        calls = [(a, b) for a, b in pairs if a.site == slot.name]
        if not calls or not slot.real or sites.latent[slot.name].local:
            continue
        by_row = apart and slot.name not in whole.elsewhere
        by_row = by_row and len({(a.axis, a.inputs, a.groups) for a, _ in calls}) == 1
        by_row = by_row and all(
            a.x.ndim >= 2 + a.places and _equal(b.x, a.x, order) for a, b in calls
        )
        normal = isinstance(innermost(whole.fns[slot.name]), dist.Normal)
        hidden = any(a.x.requires_grad for a, _ in calls)
        places[slot.name] = Place(calls[0][0], hidden, by_row, normal)
    own, shown = {}, sites.subsample_size or rows  # rows that a run sees
    for number, (a, b) in enumerate(zip(whole.calls, again.calls, strict=False)):
        told = fewer is not None and not sites.subsampled
        shape = _mask_shape(a, b.x.shape if told else [n - (n == shown) for n in a.x.shape[:1]])
        site = whole.only_into(a)
        if site not in places or places[site].map.inputs != torch.Size(shape).numel():
            site = None
        own[f"dropout.{number}"] = Own(a.rate, shape, apart and _equal(b.x, a.x, order), site)
    return Layout(places, own)


class _Run:
    """What one run of a program shows, its own dropout left out."""

    def __init__(self, energy: Energy, values: Tensors, args: tuple[Any, ...]):
        with Rewired() as rewired, Watch() as watch, At(values):
            trace: Any = poutine.trace(energy.model).get_trace(*args)
        self.maps, self.elsewhere, self.calls = rewired.found, rewired.elsewhere, watch.calls
        self.fns = {s.name: trace.nodes[s.name]["fn"] for s in energy.slots}
        node, axis = trace.nodes[energy.sites.observed], energy.sites.row_axis
        log_prob = unvalidated(node["fn"]).log_prob(node["value"]).detach()
        self.log_prob = log_prob if axis is None else log_prob.movedim(axis, 0)

    def calls_as(self, other: "_Run") -> bool:
        """True if both runs make the same calls."""
        sites = [[met.site for met in run.maps] for run in (self, other)]
        return sites[0] == sites[1] and len(self.calls) == len(other.calls)

    def shows(self, other: "_Run", order: Tensor) -> bool:
        """True if this run shows rows of the other, in that order, in every map and density."""
        pairs = [(a.x, b.x) for a, b in zip(self.maps, other.maps, strict=True)]
        pairs = [(a, b) for a, b in pairs if (len(a), len(b)) == (len(order), len(other.log_prob))]
        pairs.append((self.log_prob, other.log_prob))
        return all(_equal(a, b, order) for a, b in pairs)

    def only_into(self, call: Call) -> str | None:
        """The weight of the one map that what a dropout returns goes into, and nothing else."""
        fed = [met for met in self.maps if met.x is call.out]
        if len(fed) != 1 or call.takers != 1 or fed[0].site in self.elsewhere:
            return None
        return fed[0].site if sum(met.site == fed[0].site for met in self.maps) == 1 else None


def _mask_shape(call: Call, fewer: Sequence[int]) -> tuple[int, ...]:
    """Of a mask for all rows, from the shape that a run on fewer rows drops from."""
    known = (*fewer, *call.x.shape[len(fewer) :])
    pairs = enumerate(zip(call.x.shape, known, strict=False))
    return tuple(n if n == m and axis < call.axes else 1 for axis, (n, m) in pairs)


def _equal(first: Tensor, second: Tensor, order: Tensor) -> bool:
    """True if one is some rows of the other, to rounding."""
    if first.shape[1:] != second.shape[1:] or len(first) != len(order):
        return False
    if len(second) <= int(order[0]):  # its first axis is not that of the rows
        return False
    size = float(second.detach().abs().max()) if second.numel() else 0.0
    tiny = 2e-5 if second.dtype == torch.float32 else 1e-9
    return torch.allclose(first, second[order], rtol=0.0, atol=tiny * size)


class Masked:
    """The log joint of a model under masks.

    Attributes:
        names: of the masks: sites of weights, then those of the net's own dropouts.

    Args:
        energy: the log joint.
        layout: of the model.
        names: of the masks that are used.
        length_scale: l of the prior N(0, 1 / l^2) over weights and biases of linear maps, in place
            of the model's; None for the model's.
    """

    def __init__(
        self, energy: Energy, layout: Layout, names: Iterable[str], length_scale: float | None
    ):
        self.energy, self.layout, self.length_scale = energy, layout, length_scale
        self.names = list(names)
        self.places = {k: layout.places[k] for k in self.names if k in layout.places}
        self.rewritten: set[str] = set()  # sites whose prior is that of the length-scale
        if length_scale is not None:
            biases = {place.map.bias for place in layout.places.values()}
            linear = biases.union(layout.places)
            self.rewritten = {slot.name for slot in energy.slots if slot.name in linear}

    def shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        """Of the masks that one estimate on so many rows takes; "prior: <site>" is one for all."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name in self.names:
            place = self.places.get(name)
            if place is None:
                own = self.layout.own[name]
                shapes[name] = (rows, *own.shape[1:]) if own.by_row else own.shape
            else:
                inputs = place.map.inputs
                shapes[name] = (rows, inputs) if place.by_row else (inputs,)
                if place.by_row and not place.normal and name not in self.rewritten:
                    shapes[f"prior: {name}"] = (inputs,)
        return shapes

    def terms(
        self,
        z: Tensor,
        batch: tuple[Any, ...],
        factors: Mapping[str, Tensor],
        odds: Mapping[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Log p(data | W) and E[log p(W)] at masks; the second exact where the prior is Normal.

        Args:
            z: flat vector of M and of the other sites, (size,).
            batch: the model's arguments.
            factors: by name, z / (1 - rate) in the shapes of `shapes`.
            odds: by site, rate / (1 - rate).
        """
        values = self.energy.values(z)
        rules, own, tied, elsewhere = {}, {}, {}, {}
        for name in self.names:
            place = self.places.get(name)
            if place is None:
                own[name] = factors[name]
            elif place.by_row:
                rules[name] = partial(_dropped, factors[name])
            else:
                tied[name] = place.map.scaled(values[name], factors[name])
        for name in self.rewritten | self.places.keys():
            mean, drawn = values[name], tied.get(name)
            if f"prior: {name}" in factors:
                drawn = self.places[name].map.scaled(mean, factors[f"prior: {name}"])
            normal = name in self.rewritten or self.places[name].normal
            length_scale = self.length_scale if name in self.rewritten else None
            variance = mean.square() * odds.get(name, 0.0)
            elsewhere[name] = _Expected(mean, variance, None if normal else drawn, length_scale)
        if tied:  # only weights, which are free: they lie in z as they are
            slots = self.energy.slots
            z = torch.cat([tied.get(s.name, z[s.span]).reshape(-1) for s in slots])
        with Rewired(rules) if rules else nullcontext(), Dropping(own):
            return self.energy.terms(z, batch, jacobian=False, elsewhere=elsewhere)

    def draws(self, z: Tensor, rates: Mapping[str, float], count: int) -> Tensors:
        """Draws (1, draw, *site): masked weights, masks of the net's own, the rest as it is."""
        values = self.energy.values(z)
        drawn = {k: v.expand(1, count, *v.shape) for k, v in values.items()}
        for name, rate in rates.items():
            place = self.places.get(name)
            if place is None:
                shape = (1, count, *self.layout.own[name].shape)
                drawn[name] = torch.bernoulli(torch.full(shape, 1 - rate))
            else:
                factor = hard((count, place.map.inputs), rate)
                drawn[name] = vmap(partial(place.map.scaled, values[name]))(factor)[None]
        return drawn

    def kept(self, rates: Mapping[str, float]) -> Tensors:
        """What `program` has to know: probabilities of being kept, by the name of the mask."""
        shapes = {k: self.layout.own[k].shape for k in self.names if k not in self.places}
        return {k: torch.full(shape, 1 - rates[k]) for k, shape in shapes.items()}


def hard(shape: tuple[int, ...], rate: float) -> Tensor:
    """Masks of 0 and 1 over their mean: z / (1 - rate), z ~ Bernoulli(1 - rate)."""
    return torch.bernoulli(torch.full(shape, 1 - rate)) / (1 - rate)


def _dropped(factor: Tensor, met: LinearMap) -> Tensor:
    """The map with the inputs of each row times its factor, (row, input)."""
    rows, inputs = factor.shape
    middle = met.x.ndim - 2 - met.places
    return met(x=met.x * factor.reshape(rows, *[1] * middle, inputs, *[1] * met.places))


@dataclass(frozen=True)
class _Expected:
    """E[log p(W)] for W of this mean and variance if p is Normal, else log p at a draw."""

    mean: Tensor
    variance: Tensor
    drawn: Tensor | None
    length_scale: float | None

    def __call__(self, fn: Any) -> Tensor:
        if self.length_scale is not None:
            loc = torch.zeros_like(self.mean)
            fn = dist.Normal(loc, 1 / self.length_scale).to_event(fn.event_dim)
        if self.drawn is not None:
            return unvalidated(fn).log_prob(self.drawn)
        normal: Any = innermost(fn)
        lost = (0.5 * self.variance / normal.scale.square()).expand(self.mean.shape)
        lost = lost.flatten(-fn.event_dim).sum(-1) if fn.event_dim else lost
        return unvalidated(fn).log_prob(self.mean) - lost


def check_rates(method: str, name: str, rate: Any, *, zero: bool = False) -> None:
    """Refuses what is no rate, a probability below 1, and no rates by site.

    Raises:
        TypeError: not a number, or not by the names of sites.
        ValueError: out of range; 0 is in it where `zero` says so.
    """
    if isinstance(rate, Mapping) and not rate:
        raise ValueError(f"{method}({name}={rate!r}): name a site, or pass a number.")
    for site, one in (rate if isinstance(rate, Mapping) else {"": rate}).items():
        number = isinstance(one, _NUMBER) and not isinstance(one, bool)
        if not isinstance(site, str) or not number:
            raise TypeError(
                f"{method}({name}={rate!r}): pass a number, for example 0.1, or numbers by site, "
                'such as {"layers.1.weight": 0.1}.'
            )
        if not (0 < one < 1 or (zero and one == 0)):
            raise ValueError(
                f"{method}({name}={rate!r}): a rate is the probability of dropping, below 1 and "
                f"{'at least' if zero else 'above'} 0."
            )
