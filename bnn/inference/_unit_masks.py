"""Masks on units: which seams take them, along which axis, and a program that draws them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from bnn.errors import ModelError
from bnn.handlers import At, Rewrite, Score, branch, seeded
from bnn.inference._energy import Energy
from bnn.sites import Sites, require_minibatches

ALONE = 8  # units of a seam up to which each is a block of its own


@dataclass(frozen=True)
class Place:
    """A seam whose units are masked.

    Attributes:
        name: of the seam.
        units: how many.
        keep: prior probability of keeping one.
        blocks: groups in which they are drawn.
    """

    name: str
    units: int
    keep: float
    blocks: int


@dataclass(frozen=True)
class Masking:
    """How a program's units are masked.

    Attributes:
        apart: True if each row has masks of its own.
        keep: prior probability of keeping a unit, one or by seam; 1/2 where only others are named.
        rescale: multiply what is kept by units / kept units.
        seams: their names; None for all that are called "hidden. ...".
        axis: of the units in a seam, one or by seam; None for the last of 2 or 3 axes, and axis 1
            of more.
        blocks: of each seam; None for one a unit up to 8 units, else 1.
    """

    apart: bool
    keep: float | Mapping[str, float]
    rescale: bool
    seams: Sequence[str] | None
    axis: int | Mapping[str, int] | None
    blocks: int | None

    def axis_of(self, seam: str, axes: int) -> int:
        """The axis of the units in a seam of so many axes."""
        axis = self.axis.get(seam) if isinstance(self.axis, Mapping) else self.axis
        axis = (axes - 1 if axes <= 3 else 1) if axis is None else axis
        return axis if axis >= 0 else axis + axes

    def keep_of(self, seam: str) -> float:
        """Prior probability of keeping a unit of the seam."""
        return self.keep.get(seam, 0.5) if isinstance(self.keep, Mapping) else self.keep

    def masked(self, seam: str, h: Tensor, mask: Tensor) -> Tensor:
        """A seam's activations (row, *) times the mask of its units, (unit,) or (row, unit)."""
        if self.rescale:
            mask = mask * mask.shape[-1] / mask.sum(-1, keepdim=True).clamp(min=1.0)
        shape = [1] * h.ndim
        shape[self.axis_of(seam, h.ndim)] = mask.shape[-1]
        shape[0] = len(mask) if mask.ndim > 1 else 1
        return h * mask.reshape(shape)

    def pooled(self, seam: str, h: Tensor) -> Tensor | None:
        """What a generator sees of a seam, (row, unit): its mean over places and tokens, detached.

        None where it draws for all rows.
        """
        if not self.apart:
            return None
        h = h.detach()
        if h.ndim > 2:
            h = h.movedim(self.axis_of(seam, h.ndim), 1).flatten(2).mean(-1)
        return compressed(h)


def compressed(h: Tensor) -> Tensor:
    """Sign(h) log(1 + |h|): activations of any size in a range that a net takes well."""
    return h.sign() * h.abs().log1p()


def check_keep(method: str, keep: Any) -> None:
    """Refuses what is no probability inside (0, 1), nor such by seam.

    Raises:
        TypeError: not a number, or not by names.
        ValueError: 0, 1 or beyond.
    """
    for seam, one in (keep if isinstance(keep, Mapping) else {"": keep}).items():
        if not isinstance(seam, str) or isinstance(one, bool) or not isinstance(one, int | float):
            raise TypeError(
                f"{method}(prior_keep={keep!r}): pass a number, for example 0.5, or numbers by "
                'seam, such as {"hidden.0": 0.8}.'
            )
        if not 0 < one < 1:
            raise ValueError(
                f"{method}(prior_keep={keep!r}): it is the probability of keeping a unit, between "
                "0 and 1 and neither of them."
            )


def require_rows(sites: Sites, method: str, apart: bool, batched: bool) -> None:
    """Refuses what keeps the rows of a seam from being those of the observations.

    Raises:
        ModelError: the model's own plate draws rows; no data plate, or a site of a row, where rows
            are taken apart.
    """
    if apart and sites.locals:
        raise ModelError(
            f'{method} gives each row masks of its own, and "{sites.locals[0]}" is a latent site '
            "of each row too, which it would hold at one value. Use conditional=False, or a model "
            "without it."
        )
    if sites.subsampled:
        raise ModelError(
            f'{method} draws masks for the rows that it is given, and the plate "{sites.plate}" '
            "draws rows by itself. Leave its subsample_size out, and fit with batch_size."
        )
    if apart or batched:
        require_minibatches(sites, method)


def find_places(energy: Energy, masking: Masking, method: str, seed: Any) -> list[Place]:
    """The seams to mask, in the model's order, once it is seen that its observations use them.

    Args:
        energy: the log joint.
        masking: what is asked for.
        method: its name, for messages.
        seed: of the runs that are compared.

    Raises:
        ModelError: there is none; a seam has no row or no unit axis, or is not used; rows see each
            other's where each has masks of its own.
    """
    announced = energy.sites.seams
    seams = masking.seams
    if seams is None:
        seams = [name for name in announced if name.startswith("hidden.")]
    named = {
        *seams,
        *(k for each in (masking.keep, masking.axis) if isinstance(each, Mapping) for k in each),
    }
    if not seams or named - announced.keys():
        lacking = sorted(named - announced.keys()) or ["hidden.0"]
        raise ModelError(
            f'{method} masks the units of seams, and the model announces no "{lacking[0]}" but '
            f"{', '.join(announced) or 'none'}. Announce hidden layers and go on with what that "
            'returns: h = pyro.deterministic("hidden.0", h); or name what there is: seams=["..."].'
        )
    places, rows = [], len(energy.data.observations)
    with seeded(seed), torch.no_grad():
        trace: Any = poutine.trace(energy.model).get_trace(*energy.data.tensors)
    for name in (name for name in announced if name in seams):
        shape = announced[name].shape
        axis = masking.axis_of(name, len(shape))
        if len(shape) < 2 or shape[0] != rows:
            raise ModelError(
                f'{method} masks units of the rows, and the seam "{name}" has shape {shape}, not '
                f"(row={rows}, unit, ...). Leave it out of seams."
            )
        if not 1 <= axis < len(shape):
            raise ModelError(
                f'{method} finds no axis {axis} of units in the seam "{name}", which has shape '
                f"{shape}. Pass axis=, 1 to {len(shape) - 1}; axis 0 is the row."
            )
        frames = [(f.name, f.dim) for f in trace.nodes[name]["cond_indep_stack"]]
        if masking.apart and frames != [(energy.sites.plate, -1)]:
            raise ModelError(
                f'{method} draws a mask for each row where "{name}" is announced, and that is in '
                f"{' and '.join(f for f, _ in frames) or 'no'} plate. Run the net "
                f'inside of the plate "{energy.sites.plate}" alone, the last axis of the batch; or '
                "use conditional=False."
            )
        units = shape[axis]
        blocks = masking.blocks or (units if units <= ALONE else 1)
        places.append(Place(name, units, masking.keep_of(name), min(blocks, units)))
    _check_used(energy, places, masking.apart, method, seed)
    return places


def _check_used(
    energy: Energy, places: Sequence[Place], apart: bool, method: str, seed: Any
) -> None:
    """Compares runs in which a seam of one row, or of all, is moved.

    Each entry by as much as chance says: what a norm or a softmax takes out leaves nothing of a
    shift that is the same for all units.
    """
    z, args, sites = energy.starts(1, branch(seed, 0))[0], energy.data.tensors, energy.sites

    def densities(rules: Mapping[str, Callable[[Tensor], Tensor]]) -> Tensor:
        score = Score(sites.plate, by_row=apart)
        with seeded(branch(seed, 1)), torch.no_grad():
            with score, At(energy.values(z)), Rewrite(rules):
                energy.model(*args)
        return score.rowwise if apart else torch.as_tensor(score.likelihood)

    still = densities({})
    for number, place in enumerate(places):
        with seeded(branch(seed, 2, number)):
            shift = torch.randn(energy.sites.seams[place.name].shape)
        if torch.equal(still, densities({place.name: lambda h, by=shift: h + by})):
            raise ModelError(
                f'{method} masks the seam "{place.name}", and "{sites.observed}" is distributed '
                "the same whatever that is: the model drops what pyro.deterministic returns. Go on "
                "with it: h = pyro.deterministic(name, h)."
            )
        first = lambda h, by=shift: torch.cat([h[:1] + by[:1], h[1:]])
        rest = densities({place.name: first})[1:] if apart else still
        if apart and not torch.allclose(still[1:], rest, rtol=1e-4, atol=1e-4):
            raise ModelError(
                f'{method} gives each row masks of its own, and what "{place.name}" is in one row '
                "changes others: their masks have no posteriors apart. Use conditional=False."
            )
