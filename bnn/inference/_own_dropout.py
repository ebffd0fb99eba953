"""A net's own dropout: its calls are watched, left out, or given other masks.

`torch.nn.Dropout` and its kin are found by their calls, whether the net is in training mode or
not. The first that drops at all is "dropout.0", the next "dropout.1".
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from bnn.errors import ModelError
from bnn.method import Model, Tensors

_UNITS: set[Any] = {functional.dropout, torch.dropout}
_CHANNELS: dict[Any, int] = {  # axes of x without rows, where the function takes such an x
    functional.dropout1d: 2,
    functional.dropout2d: 0,
    functional.dropout3d: 4,
    torch.feature_dropout: 0,
}
_INSIDE: set[Any] = {
    functional.alpha_dropout, functional.feature_alpha_dropout,
    functional.multi_head_attention_forward, functional.scaled_dot_product_attention,
    torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu,
}  # fmt: skip


@dataclass
class Call:
    """A call of a dropout in a run.

    Attributes:
        x: what it was given.
        out: what it returned, which is x here.
        rate: probability of dropping.
        axes: of x, from the front, along which masks differ: all, or those up to the channels.
        takers: how many functions took what it returned.
    """

    x: Tensor
    out: Tensor
    rate: float
    axes: int
    takers: int = 0


class Watch(TorchFunctionMode):
    """Leaves a program's own dropout out and keeps its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """See torch.overrides."""
        kwargs = kwargs or {}
        asked = _asked(func, args, kwargs)
        if asked is None:
            out = func(*args, **kwargs)
        else:
            x, rate = asked
            axes, out = x.ndim, x.clone()
            if func in _CHANNELS:
                axes = 1 if axes == _CHANNELS[func] else 2
            self.calls.append(Call(x, out, rate, axes))
        if any(isinstance(each, Tensor) for each in tree_leaves(out)):
            given = tree_leaves((args, kwargs))
            for call in self.calls:
                call.takers += any(each is call.out for each in given)
        return out


class Dropping(TorchFunctionMode):
    """Runs a program with masks in place of its own dropout.

    Args:
        factors: by name, "dropout.0" for the first call, what its input is multiplied by; a call
            without one returns what it is given.
    """

    def __init__(self, factors: Mapping[str, Tensor]):
        super().__init__()
        self.factors, self.count = factors, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """See torch.overrides."""
        kwargs = kwargs or {}
        asked = _asked(func, args, kwargs)
        if asked is None:
            return func(*args, **kwargs)
        factor = self.factors.get(f"dropout.{self.count}")
        self.count += 1
        return asked[0] if factor is None else asked[0] * factor


def _asked(func: Any, args: tuple[Any, ...], kwargs: Any) -> tuple[Tensor, float] | None:
    """What a dropout is given, and its rate above 0; None for a call of anything else.

    Raises:
        ModelError: the rate is 1, the dropout is inside of a larger operation, or a batch norm
            takes its statistics from the rows.
    """
    if func is functional.batch_norm and (kwargs.get("training") or True in args[5:6]):
        kept = len(args) > 1 and args[1] is not None  # running statistics
        raise ModelError(
            "A batch norm of the net computes its statistics from the rows that come together, so "
            "a row's prediction depends on its neighbours. "
            + (
                "Call net.eval(), which fixes them: its dropout is drawn all the same."
                if kept
                else "It keeps none (track_running_stats=False): use LayerNorm or GroupNorm."
            )
        )
    if func not in _UNITS and func not in _CHANNELS and func not in _INSIDE:
        return None
    named: dict[str, Any] = dict(zip(("input", "p"), args, strict=False)) | dict(kwargs)
    if func in _INSIDE:
        floats = [each for each in (*args, kwargs.get("dropout_p")) if type(each) is float]
        rate = named.get("p", 0.5) if "alpha" in func.__name__ else max(floats, default=0.0)
        if not rate:
            return None
        raise ModelError(
            f"The net drops at rate {rate:g} inside of {func.__name__}, where its masks cannot be "
            "reached. Set the dropout of that module to 0 (of attention: attention.dropout = 0.0), "
            "and drop with torch.nn.Dropout before or after it."
        )
    rate = float(named.get("p", 0.5))
    if rate >= 1:
        raise ModelError("The net drops everything (p=1). A rate is below 1.")
    return (named["input"], rate) if rate else None


def program(model: Model, params: Tensors) -> Model:
    """The model with the masks of its own dropout as latent sites, or as masks of weights.

    Args:
        model: the user's model.
        params: "dropout.<number>" gives the probabilities of being kept, in the shape of the mask.
    """
    kept = {k: v for k, v in params.items() if k.removeprefix("dropout.").isdigit()}

    def dropping(*args: Any) -> Any:
        masks = {
            name: pyro.sample(name, dist.Bernoulli(keep).to_event(keep.ndim)) / keep
            for name, keep in kept.items()
        }
        with Dropping(masks):
            return model(*args)

    return dropping
