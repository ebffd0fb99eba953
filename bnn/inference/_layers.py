"""Linear maps: where a latent site is the weight of one, and another way to compute it.

A run of the program is watched. A call of `linear`, of a convolution or of `x @ w` whose weight is
a site's value itself (the same object, not a copy or a transpose of it) is a linear map of that
site. This holds for any `torch.nn` module run at sampled weights, for Pyro modules, and for models
written by hand; who uses a site otherwise gets its value as it is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from bnn.handlers import is_statement

_CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
_TRANSPOSED = {torch.conv_transpose1d: 1, torch.conv_transpose2d: 2, torch.conv_transpose3d: 3}
_PRODUCTS = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.mv}
_PRODUCTS |= {torch.Tensor.mm, torch.Tensor.mv}


@dataclass(frozen=True)
class LinearMap:
    """One call of a linear map with a site for its weight.

    Attributes:
        site: name of the weight's site.
        bias: name of the bias's site, or None where there is none, or it is none.
        x: what it is given, (row, *, input), or (row, input, *) of a convolution over * places.
        weight: the site's value.
        offset: the bias, or None.
        axis: of the weight, along which its inputs lie.
        inputs: number of them: units, or channels.
        places: axes of x behind that of its inputs; 0 but for convolutions.
        groups: of a convolution.
        apply: x and weight to the output, without the bias.
    """

    site: str
    bias: str | None
    x: Tensor
    weight: Tensor
    offset: Tensor | None
    axis: int
    inputs: int
    places: int
    groups: int
    apply: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, x: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        """The output, bias included; at another x or another weight where they are given."""
        out = self.apply(self.x if x is None else x, self.weight if weight is None else weight)
        return out if self.offset is None else out + self.over_places(self.offset)

    def over_places(self, units: Tensor) -> Tensor:
        """(*, unit) -> (*, unit, 1, ...): broadcasts over the places of a convolution."""
        return units.reshape(*units.shape, *[1] * self.places)

    def by_row(self, units: Tensor, x: Tensor) -> Tensor:
        """(row, unit) -> (row, 1, ..., unit, 1, ...): broadcasts against x, or an output."""
        between = [1] * (x.ndim - 2 - self.places)
        return units.reshape(len(units), *between, *units.shape[1:], *[1] * self.places)

    def scaled(self, weight: Tensor, factor: Tensor) -> Tensor:
        """The weight whose map of x is that of x with its inputs times factor, (input,)."""
        if self.groups > 1 and self.axis == 1:  # (output, input / group, *)
            apart = weight.reshape(self.groups, -1, *weight.shape[1:])
            by_group = factor.reshape(self.groups, 1, -1, *[1] * self.places)
            return (apart * by_group).reshape(weight.shape)
        shape = [1] * weight.ndim
        shape[self.axis] = -1
        return weight * factor.reshape(shape)


Rule = Callable[[LinearMap], Tensor]


class Rewired(TorchFunctionMode):
    """Watches a run for linear maps of sites and computes them by rules.

    Attributes:
        found: the maps met, in order of their calls.
        elsewhere: sites whose value something else took too; noticed where there are no rules.

    Args:
        rules: by site; a map without one is computed as ever.
    """

    def __init__(self, rules: Mapping[str, Rule] | None = None):
        super().__init__()
        self.rules = rules or {}
        self.found: list[LinearMap] = []
        self.elsewhere: set[str] = set()
        self._values = _Values()

    def __enter__(self) -> "Rewired":
        self._values.__enter__()
        return super().__enter__()

    def __exit__(self, *problem: Any) -> None:
        super().__exit__(*problem)
        self._values.__exit__(*problem)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """See torch.overrides."""
        kwargs = kwargs or {}
        met = self._map(func, args, kwargs)
        rule = None
        if met is not None:
            self.found.append(met)
            rule = self.rules.get(met.site)
        out = func(*args, **kwargs) if rule is None or met is None else rule(met)
        if not self.rules and any(isinstance(each, Tensor) for each in tree_leaves(out)):
            took = {self._values.name(each) for each in tree_leaves((args, kwargs))}
            self.elsewhere |= {name for name in took if name and not (met and met.site == name)}
        return out

    def _map(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LinearMap | None:
        linear = func is torch.nn.functional.linear
        places = _CONVOLUTIONS.get(func, _TRANSPOSED.get(func, 0))
        if not (linear or places or func in _PRODUCTS):
            return None
        named: dict[str, Any] = dict(zip(("input", "weight", "bias"), args, strict=False))
        named.update(kwargs)
        weight, x = named.get("weight", named.get("other")), named.get("input")
        site = self._values.name(weight)
        if site is None or not isinstance(weight, Tensor) or not isinstance(x, Tensor):
            return None
        if not (linear or places):  # x @ w, w (input,) or (*, input, output)
            axis = max(weight.ndim - 2, 0)
            return LinearMap(site, None, x, weight, None, axis, weight.shape[axis], 0, 1, func)
        offset, rest = named.get("bias"), args[3:]
        options = {k: v for k, v in kwargs.items() if k not in ("input", "weight", "bias")}
        groups = options.get("groups", 1)
        if places and "groups" not in options:
            groups = rest[3] if len(rest) > 3 else 1  # after stride, padding and one more
        axis = 0 if func in _TRANSPOSED or weight.ndim == 1 else 1
        inputs = x.shape[-1 - places]
        apply = lambda x, weight: func(x, weight, None, *rest, **options)
        bias = self._values.name(offset)
        return LinearMap(site, bias, x, weight, offset, axis, inputs, places, groups, apply)


class _Values(Messenger):
    """Which latent site a tensor is the value of."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, tuple[str, Any]] = {}  # the value too: a freed id comes again

    def name(self, value: Any) -> str | None:
        return self.kept.get(id(value), (None, None))[0]

    def _pyro_post_sample(self, message: Any) -> None:
        if is_statement(message) and not message["is_observed"]:
            self.kept[id(message["value"])] = message["name"], message["value"]


def linear_maps(program: Callable[..., Any], args: tuple[Any, ...]) -> dict[str, LinearMap]:
    """The linear maps of a run of a program, by site in order of their calls.

    A site that is the weight of several is there once, with the first: what is done to its inputs
    is done in all of them.
    """
    with Rewired() as watch:
        program(*args)
    found: dict[str, LinearMap] = {}
    for each in watch.found:
        found.setdefault(each.site, each)
    return found
