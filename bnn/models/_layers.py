"""Layers: what a prior must know of the layer that owns a parameter."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvTransposeNd

Scale = float | Literal["fan_in"]

_GAINED = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def fan_in(parameter: Tensor, module: nn.Module) -> float:
    """Number of inputs that one unit adds up, of a weight laid out as torch does: (out, in, *).

    A transposed convolution, (in, out, *kernel), reaches each output with one in `stride` of its
    kernel's entries.
    """
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) or parameter.ndim < 2:
        return 1.0
    if isinstance(module, _ConvTransposeNd):
        kernel = math.prod(parameter.shape[2:]) / math.prod(module.stride)
        return max(1.0, parameter.shape[0] // module.groups * kernel)
    return float(max(1, math.prod(parameter.shape[1:])))


def is_weight(name: str, parameter: Tensor, module: nn.Module) -> bool:
    """True for a matrix or kernel that multiplies inputs; False for a bias, a gain, a vector."""
    named_bias = "bias" in name.rpartition(".")[2]
    return parameter.ndim >= 2 and not named_bias and not isinstance(module, _GAINED)


def centre(name: str, parameter: Tensor, module: nn.Module) -> Tensor:
    """Where a prior is centred, (*parameter): 1 for the gain of a normalisation layer, else 0."""
    gain = isinstance(module, _GAINED) and "bias" not in name.rpartition(".")[2]
    return torch.ones_like(parameter) if gain else torch.zeros_like(parameter)


def place(
    prior: Any, name: str, parameter: Tensor, module: nn.Module
) -> tuple[Tensor, Tensor | float]:
    """Centre (*parameter) and standard deviation of one parameter tensor."""
    loc = centre(name, parameter, module)
    if not is_weight(name, parameter, module):
        return loc, prior.bias_scale
    if prior.scale == "fan_in":
        return loc, 1 / math.sqrt(fan_in(parameter, module))
    return loc, prior.scale


def check_settings(prior: Any) -> None:
    """Refuses settings that are not positive numbers (or "fan_in", for the scale; or a pair)."""
    for field, value in vars(prior).items():
        if (field, value) in (("scale", "fan_in"), ("slab", None), ("hyperprior", None)):
            continue
        if field == "hyperprior" and isinstance(value, tuple) and len(value) == 2:
            right = all(map(_is_positive, value))
        else:
            right = field != "hyperprior" and _is_positive(value)
        if not right:
            known = {"scale": 'number, or "fan_in"', "hyperprior": "pair, (a, b)"}
            raise ValueError(
                f"{type(prior).__name__}({field}={value!r}): pass a "
                f"positive {known.get(field, 'number')}."
            )


def _is_positive(value: Any) -> bool:
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return real and 0 < value < math.inf


def student_width(df: float) -> float:
    """Scale parameter of the Student-t of standard deviation 1; 1 where it has none (df <= 2)."""
    return math.sqrt((df - 2) / df) if df > 2 else 1.0
