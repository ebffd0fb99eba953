"""Shrinkage: priors that hold most weights near 0 and let some go."""

import math
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor, nn
from torch.distributions import constraints

from bnn.models._layers import Scale, centre, check_settings, is_weight, place


@dataclass(frozen=True)
class Horseshoe:
    """Most weights near 0, some free: the regularised horseshoe, non-centred.

        global ~ C+(0, scale),  local_j ~ C+(0, 1),  raw_j ~ N(0, 1),  s_j = global local_j
        w_j = raw_j s_j slab / sqrt(slab^2 + s_j^2)

    The sites are `<name>.global` (), `<name>.local` and `<name>.raw` (*parameter); the weight
    `<name>` is deterministic. Biases and gains keep the Normal of `bias_scale`.

    Attributes:
        scale: scale of the half-Cauchy of each tensor's global shrinkage (a half-Cauchy has no
            standard deviation), or "fan_in". With p of D weights expected to matter, p / (D - p)
            times sigma / sqrt(rows) is their eq. 3.12.
        slab: standard deviation of a weight that escapes shrinkage; fixed, where they give its
            square an inverse gamma prior. None is the plain horseshoe (Carvalho et al. 2010).
        bias_scale: standard deviation of a bias, and of a gain around 1.

    References:
        Piironen, Vehtari (2017), Sparsity information and regularization in the horseshoe and
        other shrinkage priors, eq. 2.8.

    Example:
        >>> from bnn.models import mlp_regression
        >>> model = mlp_regression(8, prior=Horseshoe(scale=0.1))
        >>> list(pyro.poutine.trace(model).get_trace(torch.zeros(3, 8)).stochastic_nodes)[:3]
        ['layers.0.weight.global', 'layers.0.weight.local', 'layers.0.weight.raw']
    """

    scale: Scale = "fan_in"
    slab: float | None = 2.0
    bias_scale: float = 1.0

    def __post_init__(self) -> None:
        check_settings(self)

    def __call__(self, name: str, parameter: Tensor, module: nn.Module) -> Distribution | Tensor:
        loc, scale = place(self, name, parameter, module)
        if not is_weight(name, parameter, module):
            return dist.Normal(loc, scale).to_event(parameter.ndim)
        one = torch.ones_like(parameter)
        shared = pyro.sample(f"{name}.global", dist.HalfCauchy(parameter.new_tensor(scale)))
        local = pyro.sample(f"{name}.local", dist.HalfCauchy(one).to_event(parameter.ndim))
        raw = pyro.sample(f"{name}.raw", dist.Normal(loc, one).to_event(parameter.ndim))
        width = shared * local  # (*parameter)
        if self.slab is not None:  # hypot, because the square of a Cauchy draw overflows
            width = width * (self.slab / torch.hypot(self.slab * one, width))
        return raw * width


class _NormalMixture(dist.MixtureSameFamily):  # pyright: ignore[reportGeneralTypeIssues]
    """A mixture of Normals; torch gives mixtures a support that no transform is registered for."""

    support = constraints.real


@dataclass(frozen=True)
class ScaleMixture:
    """w ~ mixing N(0, wide^2) + (1 - mixing) N(0, narrow^2), each weight and bias on its own.

    Gains are centred at 1.

    Attributes:
        mixing: probability of the wide component, pi in the paper.
        wide: its standard deviation.
        narrow: standard deviation of the other, far below `wide`.

    References:
        Blundell et al. (2015), Weight uncertainty in neural networks, eq. 7.

    Example:
        >>> from bnn.models import mlp_regression
        >>> model = mlp_regression(8, prior=ScaleMixture(mixing=0.25, wide=1.0, narrow=0.01))
    """

    mixing: float = 0.5
    wide: float = 1.0
    narrow: float = math.exp(-6)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.mixing >= 1:
            raise ValueError(f"ScaleMixture(mixing={self.mixing!r}): pass a number in (0, 1).")
        if self.narrow >= self.wide:
            raise ValueError(
                f"ScaleMixture(narrow={self.narrow!r}, wide={self.wide!r}): make narrow smaller."
            )

    def __call__(self, name: str, parameter: Tensor, module: nn.Module) -> Distribution:
        loc = centre(name, parameter, module)
        shares = parameter.new_tensor([self.mixing, 1 - self.mixing])
        scales = parameter.new_tensor([self.wide, self.narrow])
        parts = dist.Normal(loc[..., None], scales)  # (*parameter, component)
        which = dist.Categorical(probs=shares.expand(*parameter.shape, 2))
        return _NormalMixture(which, parts).to_event(parameter.ndim)
