"""Choice: which sites a Gaussian is fitted to, and whether its curvature fits into memory."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bnn.errors import ModelError
from bnn.handlers import At, Capture
from bnn.inference._curvature import block_of_rest
from bnn.inference._energy import Energy
from bnn.inference._factors import entries_of
from bnn.inference._joint import Joint
from bnn.inference._layers import LinearMap, Rewired

_COPIES = 6  # of a matrix at once: it, its factor and their roots, this round's and the last's
_BYTES = 8  # linear algebra is in float64


def chosen(energy: Energy, z: Tensor, structure: str, names: Sequence[str] | None) -> list[str]:
    """The free sites, in the model's order.

    Args:
        energy: of the model.
        z: any point.
        structure: under "last_layer" the weight and bias of the last linear map.
        names: sites, or None for all.

    Raises:
        ModelError: no site at all, none of that name, no linear map, or one that is not the last
            that f depends on.
    """
    known = [slot.name for slot in energy.slots]
    if not known:
        raise ModelError(
            "Laplace fits a Gaussian to latent sites, and the model states none. Give its tensors "
            "priors (bnn.models.sample_weights, PyroSample), or use bnn.MAP()."
        )
    if structure == "last_layer":
        maps = _maps(energy, z)
        if not maps:
            raise ModelError(
                'structure="last_layer" looks for the last linear map whose weight is a site, and '
                f"the model has none (sites: {', '.join(known)}). Name the sites: sites=(...)."
            )
        last = maps[-1]
        names = [last.site, *([last.bias] if last.bias else [])]
        if behind := _behind(energy, z, last):
            told = ", ".join(map(repr, [*names, *behind]))
            raise ModelError(
                f'structure="last_layer" found the last linear map at "{last.site}", and f depends '
                f"on {', '.join(map(repr, behind))} behind it, outside of a map. Name the sites: "
                f"sites=({told})."
            )
    if names is None:
        return known
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ModelError(
            f"The model has no latent site {', '.join(map(repr, unknown))}; it states "
            f"{', '.join(known)}. Name some of these."
        )
    return [name for name in known if name in names]


def _maps(energy: Energy, z: Tensor) -> list[LinearMap]:
    with torch.no_grad(), Rewired() as watch, At(energy.values(z)):
        energy.model(*energy.few)
    return watch.found


def _behind(energy: Energy, z: Tensor, last: LinearMap) -> list[str]:
    """Sites that f depends on by another way than through a map's output."""
    out = last()

    def f(z: Tensor) -> Tensor:
        held = Rewired({last.site: lambda _: out})
        with torch.no_grad(), held, At(energy.values(z)), Capture("") as seen:
            energy.model(*energy.few)
        return seen.values.get("f", torch.zeros(()))  # of a model that announces none

    plain, found = f(z), []
    for slot in energy.slots:
        if slot.name not in (last.site, last.bias):
            moved = z.clone()
            moved[slot.span] += 0.1 + 0.1 * z[slot.span].abs()
            if not torch.equal(plain, f(moved)):
                found.append(slot.name)
    return found


def check_memory(joint: Joint, structure: str, limit: float, restarts: int) -> None:
    """Refuses a curvature that would take more than `limit` gigabytes, before any work.

    While one is worked on there are several copies of it; of each other restart one is kept.

    Raises:
        ModelError: with the number of gigabytes, and what takes fewer.
    """
    size = len(joint.index)
    sizes = {"full": size**2, "diag": size, "kron": 0}
    sizes["last_layer"] = sizes["full"]
    left = size
    for entries in _layers(joint).values():
        sizes["kron"] += 2 * (entries.shape[0] ** 2 + entries.shape[1] ** 2) + entries.numel()
        left -= entries.numel()
    sizes["kron"] += left**2 if block_of_rest(left) == "full" else left
    copies = _COPIES + restarts - 1
    need = {k: copies * _BYTES * numbers / 1e9 for k, numbers in sizes.items()}
    if need[structure] <= limit:
        return
    modes = f" at {restarts} modes" if restarts > 1 else ""
    fits = [f'"{k}" ({need[k]:.2g} GB)' for k in ("kron", "diag") if need[k] <= limit]
    raise ModelError(
        f'Laplace(structure="{structure}") needs about {need[structure]:.3g} GB for the curvature '
        f"of {size} numbers{modes}, and memory={limit:g} allows {limit:g} GB. "
        + (f"Use structure={' or '.join(fits)}" if fits else "Fit fewer sites")
        + ', "last_layer", sites=(...), or raise memory.'
    )


def _layers(joint: Joint) -> dict[str, Any]:
    """Of each linear map with Kronecker factors its entries."""
    found = {met.site: entries_of(joint, met) for met in _maps(joint.energy, joint.base)}
    return {site: entries for site, entries in found.items() if entries is not None}
