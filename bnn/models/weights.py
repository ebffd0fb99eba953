"""Weights: any `torch.nn.Module` as a function of parameters that Pyro samples."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import get_plates
from torch import Tensor
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from bnn.models.priors import Normal, Prior


@dataclass(frozen=True, eq=False)
class Sampled:
    """A net at one draw of its weights: called like the net, which it leaves as it is.

    Attributes:
        net: the module, whose own parameter values play no part.
        weights: parameter name -> tensor.
        name: prefix of the sites that the net states while it runs, or "".
    """

    net: torch.nn.Module
    weights: Mapping[str, Tensor]
    name: str = ""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.name:
            return functional_call(self.net, dict(self.weights), args, kwargs)
        with _Prefixed(self.name):
            return functional_call(self.net, dict(self.weights), args, kwargs)


class _Prefixed(Messenger):
    """Puts a name in front of the sites inside, so that two nets may both announce "hidden.0"."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def _pyro_sample(self, message: Any) -> None:
        message["name"] = f"{self.name}.{message['name']}"


def sample_weights(net: torch.nn.Module, prior: Prior | None = None, *, name: str = "") -> Sampled:
    """States one global site for each parameter tensor of a net, inside a Pyro model.

    Sites are called as in `net.named_parameters()`, after `name` and a dot where a name is given.
    Parameters that do not require a gradient stay fixed at their values; tied parameters are one
    site, under the first of their names.

    Args:
        net: any module. It is not changed. One in training mode runs in training mode.
        prior: what each parameter is drawn from, see `bnn.models.priors`; default `Normal()`. Any
            callable `(name, parameter, module) -> Distribution | Tensor` will do.
        name: prefix that keeps the sites of two nets in one model apart.

    Returns:
        A callable with the net's signature, that runs it at the sampled weights. Call it where the
        model needs the output, usually inside the data plate.

    Raises:
        TypeError: `net` is not a module, or the prior returned neither distribution nor tensor.
        ValueError: called inside a plate, where weights would belong to rows; a batch norm that
            couples rows; a parameter without a shape yet; a prior of another shape.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(3, 1)
        >>> def model(x, y=None):
        ...     f = sample_weights(net)
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("y", pyro.distributions.Normal(f(x)[:, 0], 1.0), obs=y)
        >>> list(pyro.poutine.trace(model).get_trace(torch.ones(5, 3)).stochastic_nodes)
        ['weight', 'bias', 'data', 'y']
    """
    check_net(net)
    plates = [frame.name for frame in get_plates()]
    if plates:
        raise ValueError(
            f'sample_weights was called inside the plate "{plates[-1]}", so every row would have '
            "weights of its own. Call it before `with pyro.plate(...)`, and the net inside."
        )
    prior = Normal() if prior is None else prior
    weights = {}
    for own, parameter in net.named_parameters():
        if parameter.requires_grad:
            module = net.get_submodule(own.rpartition(".")[0])
            site = f"{name}.{own}" if name else own
            weights[own] = _stated(site, prior, _here(parameter.detach()), module)
        elif _here(parameter) is not parameter:
            weights[own] = _here(parameter)
    buffers = {own: _here(buffer) for own, buffer in net.named_buffers()}
    moved = {own: buffer for own, buffer in buffers.items() if buffer is not net.get_buffer(own)}
    return Sampled(net, weights | moved, name)


def _here(tensor: Tensor) -> Tensor:
    """On the device that tensors are made on, where that is named (`fit(..., device=)`)."""
    device = torch.get_default_device()
    return tensor if device.type == "cpu" else tensor.to(device)


def check_net(net: Any) -> None:
    """Refuses what cannot be run as a function of weights and one row.

    Raises:
        TypeError: not a module.
        ValueError: a batch norm that couples rows, or a parameter without a shape yet.
    """
    if not isinstance(net, torch.nn.Module):
        raise TypeError(f"net is {net!r}. Pass a torch.nn.Module, for example MLP(3).")
    for path, module in net.named_modules():
        couples = isinstance(module, _BatchNorm) and (
            module.training or not module.track_running_stats
        )
        moves = isinstance(module, _InstanceNorm) and module.training and module.track_running_stats
        if couples or moves:
            where = f'"{path}" ({type(module).__name__})'
            cure = (
                "Call net.eval(), which fixes its statistics"
                if module.track_running_stats
                else "Use LayerNorm or GroupNorm"
            )
            raise ValueError(
                f"The layer {where} computes its statistics from the rows that come together, so "
                f"a row's output depends on its neighbours. {cure}."
            )
    for path, parameter in net.named_parameters():
        if torch.nn.parameter.is_lazy(parameter):
            raise ValueError(
                f'The parameter "{path}" has no shape yet. Run the net once on a row of data.'
            )


def _stated(
    site: str,
    prior: Callable[[str, Tensor, torch.nn.Module], Any],
    parameter: Tensor,
    module: torch.nn.Module,
) -> Tensor:
    drawn, shape = prior(site, parameter, module), parameter.shape
    if isinstance(drawn, Distribution):
        if drawn.shape() != shape or drawn.event_dim != len(shape):
            raise ValueError(
                f'The prior of "{site}" has shape {tuple(drawn.shape())}, of which the last '
                f"{drawn.event_dim} axes are its event; the parameter has {tuple(shape)}. "
                "Write .expand(parameter.shape).to_event(parameter.ndim)."
            )
        return pyro.sample(site, drawn)
    if not isinstance(drawn, Tensor):
        raise TypeError(
            f'The prior of "{site}" returned {drawn!r}. Return a Pyro distribution, or a tensor '
            "built from sites of its own."
        )
    if drawn.shape != shape:
        raise ValueError(
            f'The prior of "{site}" returned a tensor of shape {tuple(drawn.shape)}; the '
            f"parameter has {tuple(shape)}."
        )
    return pyro.deterministic(site, drawn, event_dim=parameter.ndim)
