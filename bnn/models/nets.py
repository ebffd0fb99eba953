"""Ready models: a net, a prior and a likelihood make a Pyro model `model(x, y=None)`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from bnn.models._units import Units
from bnn.models.likelihoods import Categorical, Gaussian, Likelihood, StudentT
from bnn.models.mlp import MLP, Activation
from bnn.models.priors import Prior
from bnn.models.weights import check_net, sample_weights


@dataclass(frozen=True, eq=False)
class Supervised:
    """The Pyro model of a net, a likelihood and a prior; built by `supervised` and its kin.

    Sites: one for each parameter tensor, the likelihood's own, and in the plate "data" the seams
    of the net, "f" and "y".
    """

    net: nn.Module
    likelihood: Likelihood
    prior: Prior | None = None
    unit: Tensor | float = 1.0
    x: Units | None = None
    y: Units | None = None

    def __call__(self, x: Tensor, y: Tensor | None = None) -> None:
        """States the model of y (row,) or (row, target), given x (row, *)."""
        net = sample_weights(self.net, self.prior)
        unit = torch.as_tensor(self.unit, dtype=torch.get_default_dtype(), device=x.device)
        observe = self.likelihood(unit)
        with pyro.plate("data", len(x), device=str(x.device)):
            observe(self._in_units(net(x if self.x is None else self.x.standardized(x))), y)

    def _in_units(self, raw: Tensor) -> Tensor:
        """The net's output with f in units of y; a predicted scale has them from `unit`."""
        if self.y is None:
            return raw
        others = raw.new_zeros(len(self.y.sd), self.likelihood.outputs - 1)  # (target, output-1)
        sd, mean = self.y.sd.to(raw)[:, None], self.y.mean.to(raw)[:, None]
        sd, mean = torch.cat([sd, others + 1], 1), torch.cat([mean, others], 1)
        return raw * sd.flatten() + mean.flatten()


def supervised(
    net: nn.Module,
    likelihood: Likelihood,
    prior: Prior | None = None,
    *,
    unit: float | Tensor = 1.0,
) -> Supervised:
    """A Pyro model `model(x, y=None)` of any net and likelihood. It can be pickled.

    Args:
        net: maps x (row, *) to (row, target*likelihood.outputs).
        likelihood: of `bnn.models.likelihoods`, or one with the same two methods.
        prior: of the weights; default `priors.Normal()`.
        unit: standard deviation of y, () or (target,), for the prior on its noise. With (target,)
            every target has a noise of its own.

    Raises:
        TypeError: not a module, or not a likelihood.
        ValueError: see `sample_weights`.

    Example:
        >>> import bnn
        >>> from bnn.models import likelihoods
        >>> net = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 1))
        >>> model = supervised(net, likelihoods.Poisson())
        >>> bnn.prior_predictive(model, torch.zeros(4, 2), draws=10).y.shape
        torch.Size([1, 10, 4])
    """
    check_net(net)
    if isinstance(likelihood, type) or not hasattr(likelihood, "outputs"):
        raise TypeError(
            f"likelihood is {likelihood!r}. Pass an instance, such as likelihoods.Gaussian()."
        )
    return Supervised(net, likelihood, prior, unit)


def mlp_regression(
    inputs: int,
    hidden: Sequence[int] = (50,),
    *,
    outputs: int = 1,
    activation: Activation = "tanh",
    prior: Prior | None = None,
    likelihood: Likelihood | None = None,
    standardize: Any = None,
) -> Supervised:
    """An MLP that predicts numbers (or, with a likelihood for them, counts or grades).

    Args:
        inputs: columns of x.
        hidden: units of each hidden layer.
        outputs: number of targets. With several, y is (row, target) and each has its own noise.
        activation: see `MLP`.
        prior: of the weights; default `priors.Normal()`.
        likelihood: default `likelihoods.Gaussian()`, whose noise is learned.
        standardize: (x, y), or x alone: arrays whose means and standard deviations the model takes
            for units. The net then sees (x - mean) / sd and gives f = mean + sd * output, while
            data, f, "sigma" and densities keep the user's units. y only where it is a real number.

    Returns:
        The model; its net is an `MLP` with sites `layers.0.weight`, ...

    Raises:
        ValueError, TypeError: see `MLP`; or arrays that cannot be standardised.

    Warns:
        UserWarning: a constant column.

    Example:
        >>> import bnn
        >>> model = mlp_regression(2, hidden=(10,))
        >>> bnn.prior_predictive(model, torch.zeros(4, 2), draws=10).y.shape
        torch.Size([1, 10, 4])
    """
    return _ready(inputs, hidden, outputs, activation, prior, likelihood, standardize)


def mlp_classification(
    inputs: int,
    classes: int,
    hidden: Sequence[int] = (50,),
    *,
    activation: Activation = "tanh",
    prior: Prior | None = None,
    standardize: Any = None,
) -> Supervised:
    """An MLP that predicts labels 0..classes-1, through a softmax; two classes have two logits.

    Args:
        inputs: columns of x.
        classes: number of classes.
        hidden: units of each hidden layer.
        activation: see `MLP`.
        prior: of the weights; default `priors.Normal()`.
        standardize: x, whose means and standard deviations become its units inside the model.

    Raises:
        ValueError, TypeError: see `mlp_regression`.

    Example:
        >>> import bnn
        >>> model = mlp_classification(2, 3, hidden=(10,))
        >>> bnn.prior_predictive(model, torch.zeros(4, 2), draws=10).probs.shape
        torch.Size([4, 3])
    """
    return _ready(inputs, hidden, 1, activation, prior, Categorical(classes), standardize)


def linear(
    inputs: int,
    outputs: int = 1,
    *,
    prior: Prior | None = None,
    likelihood: Likelihood | None = None,
    standardize: Any = None,
) -> Supervised:
    """A (generalised) linear model with sites `layers.0.weight` (output, input), `layers.0.bias`.

    Args:
        inputs: columns of x.
        outputs: number of targets.
        prior: of the weights; default `priors.Normal()`.
        likelihood: default `likelihoods.Gaussian()`; `likelihoods.Bernoulli()` is logistic
            regression.
        standardize: see `mlp_regression`.

    Raises:
        ValueError, TypeError: see `mlp_regression`.

    Example:
        >>> from bnn.models import likelihoods
        >>> linear(3, likelihood=likelihoods.Bernoulli()).net  # logistic regression
        MLP(
          (layers): ModuleList(
            (0): Linear(in_features=3, out_features=1, bias=True)
          )
        )
    """
    return _ready(inputs, (), outputs, "tanh", prior, likelihood, standardize)


def _ready(
    inputs: int,
    hidden: Sequence[int],
    outputs: int,
    activation: Activation,
    prior: Prior | None,
    likelihood: Likelihood | None,
    standardize: Any,
) -> Supervised:
    likelihood = Gaussian() if likelihood is None else likelihood
    xs, ys = standardize if isinstance(standardize, tuple) else (standardize, None)
    x = None if xs is None else Units.of(xs, "x", inputs)
    if ys is not None and not isinstance(likelihood, Gaussian | StudentT):
        raise ValueError(
            f"standardize holds y, and {likelihood!r} takes no other unit than its own. "
            "Pass standardize=x."
        )
    y = None if ys is None else Units.of(ys, "y", outputs)
    net = MLP(inputs, hidden, outputs * likelihood.outputs, activation)
    unit = torch.ones(outputs, dtype=torch.float64) if y is None else y.sd
    return Supervised(net, likelihood, prior, unit if outputs > 1 else unit[0], x, y)
