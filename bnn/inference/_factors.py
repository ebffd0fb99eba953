"""Kronecker: the two factors of each linear map's block of the Gauss-Newton matrix.

H = 1/M sum_m a a^T x sum_m g g^T, where m runs over the M inputs a of the layer (rows, and the
places of a convolution), g are the gradients of its output that the rows of W pass back, and a bias
is one more input, 1 (Martens and Grosse 2015; Ritter et al. 2018). What a weight does outside of
its linear maps is not seen.
"""

import torch
from torch import Tensor

from bnn.errors import ModelError
from bnn.inference._joint import Joint
from bnn.inference._layers import LinearMap, Rewired
from bnn.inference._whitened import root_of, theta_of


class Factors:
    """The two Kronecker factors of a layer, added up."""

    def __init__(self, entries: Tensor):
        self.entries = entries  # of s, (output, input), a bias last
        outputs, inputs = entries.shape
        self.outputs = torch.zeros(outputs, outputs, dtype=torch.float64)
        self.inputs = torch.zeros(inputs, inputs, dtype=torch.float64)
        self.count = 0


class _Probed:
    """A rule that adds 0 to the output of a layer, to take the gradient in."""

    def __init__(self) -> None:
        self.met: list[tuple[LinearMap, Tensor]] = []

    def __call__(self, found: LinearMap) -> Tensor:
        out = found()
        self.met.append((found, torch.zeros_like(out).requires_grad_()))
        return out + self.met[-1][1]


def factors_of(joint: Joint, s: Tensor) -> dict[str, Factors]:
    """Of every linear map whose weight is a free site, by that site."""
    factors: dict[str, Factors] = {}
    rows = 0
    for batch in joint.batches():
        rows += len(batch[-1])
        root = root_of(joint, s, batch)
        probed = _Probed()
        with torch.enable_grad(), Rewired({slot.name: probed for slot in joint.slots}):
            white = theta_of(joint, s, batch)[..., None, :] @ root  # (row, cell, 1, parameter)
            white = white.flatten(1).sum(0)
        kept = []
        for found, probe in probed.met:
            entries = entries_of(joint, found)
            if entries is None:
                continue
            kept.append((found, probe))
            at = factors.setdefault(found.site, Factors(entries))
            others = [f.entries for site, f in factors.items() if site != found.site]
            if not torch.equal(at.entries, entries) or any(
                torch.isin(entries, other).any() for other in others
            ):
                raise ModelError(
                    f'structure="kron" has one block for a weight with its bias, and "{found.site}"'
                    " is used in two ways (transposed, or with another bias), or its bias with "
                    'another weight too. Use structure="full" or "diag".'
                )
            a = _inputs(found, entries.shape[1]).double()
            at.inputs += a.T @ a
            at.count += len(a)
        for value in white if kept else ():
            slopes = torch.autograd.grad(
                value, [probe for _, probe in kept], retain_graph=True, allow_unused=True
            )
            for (found, _), slope in zip(kept, slopes, strict=True):
                if slope is not None:
                    g = _outputs(found, slope).double()
                    factors[found.site].outputs += g.T @ g
    for each in factors.values():
        each.outputs *= joint.data.rows / rows
    return factors


def entries_of(joint: Joint, found: LinearMap) -> Tensor | None:
    """Where a layer's weight and bias lie in s, (output, input), a bias last.

    None for a layer without Kronecker factors here: groups, a transposed convolution, a product
    with a stack of matrices, a weight that is not any real number.
    """
    slot = joint.slot(found.site)
    plain = found.groups == 1 and (found.axis == 1 if found.places else found.weight.ndim <= 2)
    if slot is None or not slot.real or not plain:
        return None
    place = joint.index.new_zeros(joint.energy.size)
    place[joint.index] = torch.arange(len(joint.index))
    entries = place[slot.span].reshape(slot.free)
    by_hand = found.axis == 0  # (input,) or (input, output)
    entries = entries.reshape(len(entries), -1).T if by_hand else entries.flatten(1)
    bias = None if found.bias is None else joint.slot(found.bias)
    if bias is not None and bias.real and bias.size == len(entries):
        entries = torch.cat([entries, place[bias.span][:, None]], 1)
    return entries


def _inputs(found: LinearMap, inputs: int) -> Tensor:
    """What a layer is given, (row and place, input), with a 1 for a bias."""
    x = found.x.detach()
    if found.places:  # a convolution whose outputs are its patches
        patch = found.weight.shape[1:]
        unit = torch.eye(patch.numel()).to(x).reshape(-1, *patch)
        x = found.apply(x, unit).movedim(-1 - found.places, -1)
    x = x.reshape(-1, x.shape[-1])
    return torch.cat([x, x.new_ones(len(x), 1)], 1) if inputs > x.shape[1] else x


def _outputs(found: LinearMap, slope: Tensor) -> Tensor:
    """Gradients of a layer's output, (row and place, output)."""
    if found.places:
        slope = slope.movedim(-1 - found.places, -1)
    vector = found.weight.ndim == 1
    return slope.reshape(-1, 1 if vector else slope.shape[-1])
