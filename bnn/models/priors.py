"""Priors over the weights of a net: values that are called once for each parameter tensor.

A prior is any callable `prior(name, parameter, module) -> Distribution | Tensor`: `name` is the
site, `parameter` a tensor of the wanted shape, dtype and device, `module` the layer that owns it.
A distribution is sampled at `name`; a tensor, made from sites that the prior samples itself, is
announced there as deterministic (the non-centred form).

Every `scale` is a standard deviation, in units of the weight, where the distribution has one.
`scale="fan_in"` means 1 / sqrt(number of inputs that a unit adds up), under which the spread of f
a priori does not depend on the width (Neal 1996, section 2.1). Three kinds of parameter are apart:
biases, and whatever else is no matrix, have `bias_scale`; the gains of normalisation layers are
centred at 1, with `bias_scale` around it; embeddings add nothing up, so their fan-in is 1.

`UniformAttention` and `ContextualAttention` are priors of another thing, attention weights: values
for `attention=` of the transformers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor, nn
from torch.distributions import constraints

from bnn.models._attention import ContextualAttention, UniformAttention
from bnn.models._layers import Scale, check_settings, fan_in, is_weight, place, student_width
from bnn.models._shrinkage import Horseshoe, ScaleMixture

Prior = Callable[[str, Tensor, nn.Module], Distribution | Tensor]

__all__ = [
    "ContextualAttention",
    "EmpiricalBayes",
    "Horseshoe",
    "Laplace",
    "Normal",
    "Prior",
    "ScaleMixture",
    "StudentT",
    "UniformAttention",
]


@dataclass(frozen=True)
class Normal:
    """w ~ N(0, scale^2), each weight on its own. The default.

    Attributes:
        scale: standard deviation of a weight, or "fan_in".
        bias_scale: standard deviation of a bias, and of a gain around 1.

    References:
        Neal (1996), Bayesian learning for neural networks, section 2.1.

    Example:
        >>> Normal(scale=0.5)
        Normal(scale=0.5, bias_scale=1.0)
    """

    scale: Scale = "fan_in"
    bias_scale: float = 1.0

    def __post_init__(self) -> None:
        check_settings(self)

    def __call__(self, name: str, parameter: Tensor, module: nn.Module) -> Distribution:
        loc, scale = place(self, name, parameter, module)
        return dist.Normal(loc, scale).to_event(parameter.ndim)


@dataclass(frozen=True)
class Laplace:
    """w ~ Laplace(0, scale / sqrt(2)): sharper at 0 than a Normal of the same standard deviation.

    Attributes:
        scale: standard deviation of a weight, or "fan_in"; the diversity b is scale / sqrt(2).
        bias_scale: standard deviation of a bias, and of a gain around 1.

    References:
        Williams (1995), Bayesian regularization and pruning using a Laplace prior.

    Example:
        >>> layer = nn.Linear(4, 1)
        >>> Laplace(scale=2.0)("weight", layer.weight, layer).stddev
        tensor([[2., 2., 2., 2.]])
    """

    scale: Scale = "fan_in"
    bias_scale: float = 1.0

    def __post_init__(self) -> None:
        check_settings(self)

    def __call__(self, name: str, parameter: Tensor, module: nn.Module) -> Distribution:
        loc, scale = place(self, name, parameter, module)
        return dist.Laplace(loc, scale / math.sqrt(2)).to_event(parameter.ndim)


@dataclass(frozen=True)
class StudentT:
    """w ~ Student-t, with tails as heavy as trained nets show.

    Attributes:
        df: degrees of freedom.
        scale: standard deviation of a weight, or "fan_in". For df <= 2 there is none, and it is
            the distribution's own scale parameter.
        bias_scale: the same of a bias, and of a gain around 1.

    References:
        Fortuin et al. (2022), Bayesian neural network priors revisited.

    Example:
        >>> layer = nn.Linear(4, 1)
        >>> StudentT(df=5.0)("weight", layer.weight, layer).stddev  # 1 / sqrt(4 inputs)
        tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """

    df: float = 4.0
    scale: Scale = "fan_in"
    bias_scale: float = 1.0

    def __post_init__(self) -> None:
        check_settings(self)

    def __call__(self, name: str, parameter: Tensor, module: nn.Module) -> Distribution:
        loc, scale = place(self, name, parameter, module)
        return dist.StudentT(self.df, loc, scale * student_width(self.df)).to_event(parameter.ndim)


@dataclass(frozen=True)
class EmpiricalBayes:
    """w ~ N(0, scale^2), with one scale a weight tensor that is fitted: `<name>.prior_scale`.

    The scale is a `pyro.param` that starts at 1 / sqrt(fan-in). Methods that optimise fit it
    (variational inference by type II maximum likelihood, through the ELBO); NUTS and other
    samplers refuse it. Under `bnn.SVI` with Gaussian guides its optimum, for n weights of means m
    and standard deviations s, is

        scale^2 = (sum(m^2 + s^2) + 2 b) / (n + 2 a + 2)    with hyperprior=(a, b)
        scale^2 = sum(m^2 + s^2) / n                         without

    Without a hyperprior not for MAP: the joint density of weights and scale grows without bound as
    both shrink to 0. Biases and gains keep the Normal of `bias_scale`.

    Attributes:
        bias_scale: standard deviation of a bias, and of a gain around 1.
        hyperprior: (a, b) of scale^2 ~ InverseGamma(a, b), of which the scale is a mode; (1, 10)
            in Wu et al. None leaves it out.

    References:
        MacKay (1992), A practical Bayesian framework for backpropagation networks. Wu et al.
        (2019), Deterministic variational inference for robust Bayesian neural networks.

    Example:
        >>> from bnn.models import mlp_regression
        >>> model = mlp_regression(2, prior=EmpiricalBayes(hyperprior=(1.0, 10.0)))  # for bnn.SVI
    """

    bias_scale: float = 1.0
    hyperprior: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_settings(self)

    def __call__(self, name: str, parameter: Tensor, module: nn.Module) -> Distribution:
        if not is_weight(name, parameter, module):
            return Normal(bias_scale=self.bias_scale)(name, parameter, module)
        start = parameter.new_tensor(1 / math.sqrt(fan_in(parameter, module)))
        scale: Any = pyro.param(f"{name}.prior_scale", start, constraint=constraints.positive)
        if self.hyperprior is not None:
            variance = dist.InverseGamma(*map(parameter.new_tensor, self.hyperprior))
            pyro.factor(f"{name}.hyperprior", variance.log_prob(scale.square()))
        return dist.Normal(torch.zeros_like(parameter), scale).to_event(parameter.ndim)
