"""Observing: what all likelihoods do with a net's output, for one target or several."""

import math
from collections.abc import Callable
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor
from torch.nn.functional import softplus

Observe = Callable[..., None]
Noise = float | Literal["learned", "predicted"]

_FLOOR = 1e-6  # of a predicted scale, in units of y: a softplus underflows, and its log with it


def observer(
    likelihood: Any,
    unit: float | Tensor,
    state: Callable[[Tensor, Tensor], Distribution],
    *,
    vector: bool = False,
) -> Observe:
    """`observe(raw, y)` of a likelihood, for inside the data plate.

    Args:
        likelihood: whose `outputs` raw has for each target.
        unit: of y, () or (target,).
        state: distribution of y, (row,) or (row, target), from f and from raw cut into targets.
        vector: True if f is all outputs of a target, (row, output) or (row, target, output); False
            if it is the first.
    """

    def observe(raw: Tensor, y: Tensor | None = None) -> None:
        each = _targets(raw, likelihood, unit)
        f = each if vector else each[..., 0]
        f = pyro.deterministic("f", f, event_dim=f.ndim - 1)
        fn = state(f, each)
        pyro.sample("y", fn.to_event(len(fn.shape()) - 1), obs=y)

    return observe


def noise(
    scale: Noise, unit: float | Tensor, least: float = 0.0
) -> Callable[[Tensor], Tensor | float]:
    """Standard deviation of the noise as a function of raw cut into targets, (row, *, output)."""
    if scale == "learned":
        width = torch.as_tensor(unit, dtype=torch.get_default_dtype())
        sigma = pyro.sample("sigma", dist.HalfNormal(width).to_event(width.ndim))
        held = (sigma.square() + (least * width).square()).sqrt() if least else sigma
        return lambda raw: held
    if scale == "predicted":
        return lambda raw: unit * (softplus(raw[..., 1]) + _FLOOR)
    return lambda raw: scale


def check_noise(likelihood: Any) -> None:
    """Refuses a `scale` that is neither a positive number nor one of the two words."""
    scale = likelihood.scale
    number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if scale in ("learned", "predicted") or (number and 0 < scale < math.inf):
        return
    raise ValueError(
        f"{type(likelihood).__name__}(scale={scale!r}): pass a positive number, "
        '"learned" or "predicted".'
    )


def check_classes(likelihood: Any) -> None:
    """Refuses a number of classes that is not a whole number from 2."""
    classes = likelihood.classes
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < 2:
        raise ValueError(
            f"{type(likelihood).__name__}(classes={classes!r}): pass a whole number of at least 2."
        )


def _targets(raw: Tensor, likelihood: Any, unit: float | Tensor) -> Tensor:
    """The net's output cut up: (row, output) for one target, else (row, target, output)."""
    outputs = likelihood.outputs
    if raw.ndim == 1:
        raw = raw[:, None]
    if raw.ndim != 2 or not raw.shape[1] or raw.shape[1] % outputs:
        raise ValueError(
            f"The net gives an output of shape {tuple(raw.shape)}, and {likelihood!r} takes "
            f"{outputs} outputs a target, shape (row, {outputs}) for one target. "
            "Change the width of the net's last layer."
        )
    targets = raw.shape[1] // outputs
    units = torch.as_tensor(unit).numel()
    if units not in (1, targets):
        raise ValueError(f"unit has {units} entries and the net has {targets} targets.")
    return raw if targets == 1 else raw.reshape(len(raw), targets, outputs)
