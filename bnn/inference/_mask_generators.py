"""Generators: networks that draw a program's masks, one block of units after another.

All that a generator has met is in one state (NADE, Larochelle and Murray 2011):

    a <- a + A_s l(h_s)   at seam s of activations h_s (not where it draws for all rows)
    logits_b = V_b silu(a + c_b) + d_b,   z_b ~ Bernoulli(sigmoid(logits_b)),   a <- a + M_b z_b

l(h) is sign(h) log(1 + |h|). With a block for each unit, and enough width, no law of the masks is
out of its reach; units of one block are independent given what came before.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.nn.functional import silu, softplus

from bnn.handlers import Capture, seeded
from bnn.inference._energy import Energy
from bnn.inference._unit_masks import Place, compressed
from bnn.method import Tensors
from bnn.observations import innermost


class Masks(TorchDistribution):
    """The law of one seam's mask (*, unit), given a generator's state (*, width)."""

    arg_constraints: Any = {}  # noqa: RUF012  as torch asks for it
    support: Any = constraints.independent(constraints.boolean, 1)

    def __init__(self, state: Tensor, weights: Mapping[str, Tensor]):
        self.state, self.weights = state, weights
        super().__init__(state.shape[:-1], weights["offset"].shape, validate_args=False)

    @property
    def sizes(self) -> list[int]:
        """Units of each block."""
        offset, hidden = self.weights["offset"], self.weights["hidden"]
        return [len(block) for block in offset.tensor_split(len(hidden))]

    def walk(self, choose: Callable[[Tensor, int], Tensor]) -> tuple[Tensor, Tensor]:
        """A mask, and its logits; `choose` takes a block's, before its offset, and its number."""
        cut = (self.weights[part].split(self.sizes) for part in ("outward", "inward"))
        hidden, state, drawn, logits = self.weights["hidden"].unbind(), self.state, [], []
        for number, (bias, outward, inward) in enumerate(zip(hidden, *cut, strict=True)):
            logits.append(silu(state + bias) @ outward.mT)
            drawn.append(choose(logits[-1], number))
            if number < len(hidden) - 1:
                state = state + drawn[-1] @ inward
        if len(logits) > 1:
            pairs = zip(logits, drawn, strict=True)
            logits = [torch.cat([each.expand(bits.shape) for each, bits in pairs], -1)]
        return torch.cat(drawn, -1), logits[0] + self.weights["offset"]

    def draw(self, uniforms: Tensor, temperature: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
        """Masks from sigmoid(logits / temperature), and their log probability at 1."""
        # u < sigmoid(logit / temperature) where logit > temperature x log(u / (1 - u))
        least = temperature * uniforms.logit() - self.weights["offset"].detach()
        parts = least.split(self.sizes, -1)
        choose = lambda logits, number: (parts[number] < logits.detach()).to(logits.dtype)
        return (walked := self.walk(choose))[0], _log_prob(*walked)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Masks, (*sample_shape, *, unit)."""
        shape = self._extended_shape(torch.Size(sample_shape))
        return self.draw(torch.rand(shape, device=self.state.device))[0]

    def log_prob(self, value: Tensor) -> Tensor:
        """Of a mask, summed over its units."""
        parts = value.split(self.sizes, -1)
        return _log_prob(value, self.walk(lambda logits, number: parts[number])[1])

    @property
    def mean(self) -> Tensor:
        """Probabilities of keeping; in closed form where all units are one block."""
        if len(self.weights["hidden"]) > 1:
            raise NotImplementedError
        return self.walk(lambda logits, number: logits)[1].sigmoid()


def _log_prob(bits: Tensor, logits: Tensor) -> Tensor:
    """Log sigmoid of the logit, or of its negative where the bit is 0, summed over units."""
    return (bits * logits).sum(-1) - softplus(logits).sum(-1)


class Generator:
    """A generator in one run of a program, which meets the seams in its own order.

    Args:
        tensors: weights, "<who>.<seam>.<part>".
        who: "policy" or "prior".
        label: the row's observation, encoded, (row, column); None where it is not seen.
    """

    def __init__(self, tensors: Mapping[str, Tensor], who: str, label: Tensor | None = None):
        self.tensors, self.who = tensors, who
        self.state: Any = 0.0 if label is None else label @ tensors[f"{who}.label"]

    def law(self, seam: str, context: Tensor | None = None) -> Masks:
        """Of the seam's mask, given what was met before and the seam's activations."""
        start = f"{self.who}.{seam}."
        own = {k.removeprefix(start): v for k, v in self.tensors.items() if k.startswith(start)}
        if context is not None:
            self.state = context @ own["activations"] + self.state
        met = isinstance(self.state, Tensor)
        return Masks(self.state if met else torch.zeros_like(own["hidden"][0]), own)

    def take(self, seam: str, bits: Tensor) -> None:
        """Goes on from a mask."""
        self.state = self.state + bits @ self.tensors[f"{self.who}.{seam}.inward"]


def starting_weights(
    places: Sequence[Place], who: str, width: int, labels: "Labels | None", *, seeing: bool = False
) -> Tensors:
    """Those that a generator starts with: it draws what the prior does, or nearly.

    Args:
        places: the seams, in their order.
        who: see `Generator`.
        width: of its state.
        labels: that it is shown, and activations too; or None.
        seeing: True if it is shown activations alone.
    """
    made = {} if labels is None else {f"{who}.label": normal(labels.columns, width)}
    seeing = seeing or labels is not None
    for place in places:
        start, units = f"{who}.{place.name}.", place.units
        made |= {
            start + "hidden": 0.5 * torch.randn(place.blocks, width),
            start + "inward": normal(units, width),
            start + "outward": 0.1 * torch.randn(units, width) / math.sqrt(width),
            start + "offset": torch.full((units,), math.log(place.keep / (1 - place.keep))),
        }
        if seeing:
            made[start + "activations"] = normal(units, width)
    return made


def normal(inputs: int, outputs: int) -> Tensor:
    """A random matrix that keeps the size of what it multiplies."""
    return torch.randn(inputs, outputs) / math.sqrt(inputs)


def seams_of(params: Tensors) -> dict[str, int]:
    """Masked seams and their numbers of units, from the weights of a policy."""
    return {
        name.removeprefix("policy.").removesuffix(".offset"): len(value)
        for name, value in params.items()
        if name.startswith("policy.") and name.endswith(".offset")
    }


class Labels:
    """Observations as a generator sees them, (row, column): one-hot, or l of standard units."""

    def __init__(self, energy: Energy, seed: Any):
        data = energy.data
        with seeded(seed), torch.no_grad(), Capture(energy.sites.observed) as run:
            energy.model(*data.tensors)
        base, y = innermost(run.fn), data.observations
        labels = isinstance(base, torch.distributions.Categorical)
        self.classes = torch.arange(base.logits.shape[-1]) if labels else None
        y = y.to(torch.get_default_dtype())
        self.mean, self.sd = y.mean(0), y.std(0, correction=0).clamp(min=1e-6)
        self.columns = self(data.observations).shape[1]

    def __call__(self, y: Tensor) -> Tensor:
        if self.classes is None:
            coded = compressed((y - self.mean) / self.sd)
        else:
            coded = (y[..., None] == self.classes).to(self.mean.dtype)
        return coded.reshape(len(y), -1)


class Flat:
    """Named tensors as one leaf, which takes steps of one rate: the tensors take those of theirs.

    Adam steps as far in every entry, and a tensor is the leaf's part times its rate / the leaf's.
    """

    def __init__(self, tensors: Mapping[str, Tensor], rates: Mapping[str, float], rate: float):
        self.shapes = {name: each.shape for name, each in tensors.items()}
        gains = [torch.full((each.numel(),), rates[name] / rate) for name, each in tensors.items()]
        self.gains = torch.cat(gains)
        self.start = torch.cat([each.reshape(-1) for each in tensors.values()]) / self.gains

    def __call__(self, vector: Tensor) -> Tensors:
        """The tensors by name."""
        parts = (self.gains * vector).split([shape.numel() for shape in self.shapes.values()])
        return {k: v.reshape(s) for (k, s), v in zip(self.shapes.items(), parts, strict=True)}
