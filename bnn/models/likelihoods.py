"""Likelihoods: how observations scatter around what a net says.

A likelihood is used in two steps. Outside the data plate `observe = likelihood(unit)` samples the
likelihood's own global sites; inside it `observe(raw, y)` reads the net's output `raw`, of shape
(row, target*outputs), announces the deterministic site "f" and states the site "y". The `outputs`
of a target lie next to each other. With one target y is (row,); with several, (row, target).

`unit` is the unit of y, its standard deviation as far as known: () or (target,). Only priors on
noise use it; f is in the units that `raw` has. Every `scale` is a standard deviation.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor

from bnn.models._labels import Bernoulli, Categorical, Ordinal
from bnn.models._layers import student_width
from bnn.models._observing import Noise, Observe, check_noise, noise, observer

__all__ = [
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "Likelihood",
    "NegativeBinomial",
    "Ordinal",
    "Poisson",
    "StudentT",
]

_LARGEST = 50.0  # log of a count's mean: 5e21, beyond any count, and its sums stay finite


class Likelihood(Protocol):
    """What `supervised` asks of a likelihood.

    Example:
        >>> class Exponential:
        ...     outputs = 1
        ...
        ...     def __call__(self, unit=1.0):
        ...         def observe(raw, y=None):
        ...             f = pyro.deterministic("f", raw[:, 0])
        ...             pyro.sample("y", dist.Exponential(f.exp()), obs=y)
        ...
        ...         return observe
        >>> from bnn.models import MLP, supervised
        >>> model = supervised(MLP(2), Exponential())
    """

    @property
    def outputs(self) -> int:
        """Outputs of the net for each target."""
        ...

    def __call__(self, unit: float | Tensor = 1.0) -> Observe:
        """Samples the likelihood's global sites; returns `observe(raw, y)`."""
        ...


@dataclass(frozen=True)
class Gaussian:
    """y ~ N(f, sigma^2).

    Attributes:
        scale: "learned": sigma is the global site "sigma" ~ HalfNormal(unit), one for each entry
            of `unit`. "predicted": sigma(x) = unit (softplus(second output) + 1e-6). A number:
            sigma, in units of y. A loss of mean squared error + c KL over N rows (BLiTZ's
            `complexity_cost_weight` is c) is the bound at the number sqrt(c N / 2).
        least: above 0 the standard deviation of a learned noise is sqrt(sigma^2 + (least unit)^2),
            so that y without any noise has a mode too; at 0 sigma falls to 0 there, without end.

    Example:
        >>> Gaussian("predicted").outputs
        2
    """

    scale: Noise = "learned"
    least: float = 0.0

    def __post_init__(self) -> None:
        check_noise(self)
        if not 0 <= self.least < math.inf or (self.least and self.scale != "learned"):
            raise ValueError(
                f"{self!r}: least is a share of y's unit, 0 or more, and of a learned scale."
            )

    @property
    def outputs(self) -> int:
        """Outputs of the net for each target: f, and the scale where it is predicted."""
        return 2 if self.scale == "predicted" else 1

    def __call__(self, unit: float | Tensor = 1.0) -> Observe:
        sigma = noise(self.scale, unit, self.least)
        return observer(self, unit, lambda f, raw: dist.Normal(f, sigma(raw)))


@dataclass(frozen=True)
class StudentT:
    """y ~ Student-t around f: outliers pull f less than under a Gaussian.

    Attributes:
        df: degrees of freedom.
        scale: as in `Gaussian`, the standard deviation of the noise. For df <= 2 it has none, and
            this is the distribution's own scale parameter.

    Example:
        >>> from bnn.models import mlp_regression
        >>> model = mlp_regression(2, likelihood=StudentT(df=3.0, scale="predicted"))
    """

    df: float = 4.0
    scale: Noise = "learned"

    def __post_init__(self) -> None:
        if not 0 < self.df < math.inf:
            raise ValueError(f"StudentT(df={self.df!r}): pass a positive number.")
        check_noise(self)

    @property
    def outputs(self) -> int:
        """Outputs of the net for each target: f, and the scale where it is predicted."""
        return 2 if self.scale == "predicted" else 1

    def __call__(self, unit: float | Tensor = 1.0) -> Observe:
        sigma, width = noise(self.scale, unit), student_width(self.df)
        return observer(self, unit, lambda f, raw: dist.StudentT(self.df, f, width * sigma(raw)))


@dataclass(frozen=True)
class Poisson:
    """Counts y ~ Poisson(exp(f)); f counts up to 50 in size, so that exp cannot overflow.

    Example:
        >>> from bnn.models import mlp_regression
        >>> model = mlp_regression(2, likelihood=Poisson())
    """

    outputs: ClassVar[int] = 1  # of the net, for each target

    def __call__(self, unit: float | Tensor = 1.0) -> Observe:
        return observer(self, unit, lambda f, raw: dist.Poisson(_bounded(f).exp()))


@dataclass(frozen=True)
class NegativeBinomial:
    """Counts with mean exp(f) and variance mean + dispersion mean^2 ("NB2"); Poisson at 0.

    The global site "dispersion" ~ HalfNormal(1). In torch's terms total_count = 1 / dispersion and
    logits = f + log(dispersion). A dispersion below 1e-4 counts as 1e-4: there the difference of
    two log-gammas loses its digits in float32.

    References:
        Cameron, Trivedi (1986), Econometric models based on count data.

    Example:
        >>> from bnn.models import mlp_regression
        >>> model = mlp_regression(2, likelihood=NegativeBinomial())
    """

    outputs: ClassVar[int] = 1  # of the net, for each target

    def __call__(self, unit: float | Tensor = 1.0) -> Observe:
        one = torch.ones((), device=torch.as_tensor(unit).device)
        dispersion = pyro.sample("dispersion", dist.HalfNormal(one)).clamp(min=1e-4)

        def state(f: Tensor, raw: Tensor) -> Distribution:
            logits = _bounded(f) + dispersion.log()
            return dist.NegativeBinomial(dispersion.reciprocal(), logits=logits)

        return observer(self, unit, state)


def _bounded(f: Tensor) -> Tensor:
    return f.clamp(-_LARGEST, _LARGEST)
