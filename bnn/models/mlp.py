"""MLP: a multilayer perceptron whose hidden layers are seams."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import pyro
import torch
from torch import Tensor, nn

Activation = str | Callable[[Tensor], Tensor]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": nn.functional.elu,
    "erf": torch.erf,
    "gelu": nn.functional.gelu,
    "relu": torch.relu,
    "selu": nn.functional.selu,
    "sigmoid": torch.sigmoid,
    "silu": nn.functional.silu,
    "softplus": nn.functional.softplus,
    "tanh": torch.tanh,
}


class MLP(nn.Module):
    """A multilayer perceptron that announces its hidden layers: "hidden.0", "hidden.1", ...

    Each is a deterministic Pyro site, (row, unit), after the activation. Outside a Pyro model they
    are not announced to anyone, and the net is an ordinary module.

    Args:
        inputs: columns of x.
        hidden: units of each hidden layer; () is a linear map.
        outputs: columns of the output.
        activation: one of "elu", "erf", "gelu", "relu", "selu", "sigmoid", "silu", "softplus",
            "tanh", or a callable.

    Raises:
        ValueError: a width that is not a positive whole number, an unknown activation.
        TypeError: `hidden` is not a sequence.

    Example:
        >>> MLP(3, hidden=(20, 10), outputs=2)(torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int] = (50,),
        outputs: int = 1,
        activation: Activation = "tanh",
    ):
        super().__init__()
        if isinstance(hidden, str) or not isinstance(hidden, Sequence):
            raise TypeError(f"hidden is {hidden!r}. Pass the width of each layer, such as (50,).")
        widths = [inputs, *hidden, outputs]
        for width in widths:
            if isinstance(width, bool) or not isinstance(width, int) or width < 1:
                raise ValueError(
                    f"MLP(inputs={inputs!r}, hidden={hidden!r}, outputs={outputs!r}): every width "
                    "is a whole number of at least 1."
                )
        if isinstance(activation, str) and activation not in _ACTIVATIONS:
            known = ", ".join(map(repr, _ACTIVATIONS))
            raise ValueError(f"activation is {activation!r}. Pass one of {known}, or a callable.")
        self.activation = _ACTIVATIONS[activation] if isinstance(activation, str) else activation
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """Maps x (row, *, input) to (row, *, output)."""
        h = x
        *inner, last = self.layers
        for number, layer in enumerate(inner):
            h = self.activation(layer(h))
            h = pyro.deterministic(f"hidden.{number}", h, event_dim=max(h.ndim - 1, 1))
        return last(h)
