"""Labels: likelihoods of classes, with or without an order."""

from dataclasses import dataclass
from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bnn.models._observing import Observe, check_classes, observer


@dataclass(frozen=True)
class Categorical:
    """y in 0..classes-1 with probabilities softmax(f); f are the logits, (row, class).

    Attributes:
        classes: number of classes, at least 2.

    Example:
        >>> from bnn.models import MLP, supervised
        >>> model = supervised(MLP(2, outputs=3), Categorical(3))  # y in {0, 1, 2}
    """

    classes: int

    def __post_init__(self) -> None:
        check_classes(self)

    @property
    def outputs(self) -> int:
        """Outputs of the net for each target: a logit for each class."""
        return self.classes

    def __call__(self, unit: float | Tensor = 1.0) -> Observe:
        return observer(self, unit, lambda f, raw: dist.Categorical(logits=f), vector=True)


@dataclass(frozen=True)
class Bernoulli:
    """y in {0, 1} with P(y = 1) = sigmoid(f).

    Example:
        >>> from bnn.models import MLP, supervised
        >>> model = supervised(MLP(2), Bernoulli())  # y in {0, 1}
    """

    outputs: ClassVar[int] = 1  # of the net, for each target

    def __call__(self, unit: float | Tensor = 1.0) -> Observe:
        return observer(self, unit, lambda f, raw: dist.Bernoulli(logits=f))


@dataclass(frozen=True)
class Ordinal:
    """y in 0..classes-1, in that order: P(y <= k) = sigmoid(cutpoint_k - f).

    The global site "cutpoints", (classes-1,) and rising, has the prior

        cutpoint_1 ~ N(c_1, 1),   log(cutpoint_k - cutpoint_{k-1}) ~ N(log(c_k - c_{k-1}), 1),

    with c_k = logit(k / classes), at which f = 0 makes all classes equally likely. A shift of f
    and of the cutpoints is the same model: the priors alone hold it.

    Attributes:
        classes: number of classes, at least 2.

    References:
        McCullagh (1980), Regression models for ordinal data, section 2.

    Example:
        >>> from bnn.models import mlp_regression
        >>> model = mlp_regression(2, likelihood=Ordinal(5))  # grades 0 to 4
    """

    classes: int
    outputs: ClassVar[int] = 1  # of the net, for each target

    def __post_init__(self) -> None:
        check_classes(self)

    def __call__(self, unit: float | Tensor = 1.0) -> Observe:
        centres = torch.logit(torch.arange(1, self.classes) / self.classes)
        loc = torch.cat([centres[:1], centres.diff().log()]).to(torch.as_tensor(unit).device)
        increments = dist.Normal(loc, torch.ones_like(loc)).to_event(1)
        ordered = dist.transforms.OrderedTransform()
        cutpoints = pyro.sample("cutpoints", dist.TransformedDistribution(increments, [ordered]))
        return observer(
            self, unit, lambda f, raw: dist.Categorical(logits=ordinal_log_probs(f, cutpoints))
        )


def ordinal_log_probs(f: Tensor, cutpoints: Tensor) -> Tensor:
    """Log probabilities of the classes, (*, class), of a score (*) and cutpoints (class-1,).

    sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)), which does not cancel in the
    tails.
    """
    above = cutpoints - f[..., None]  # (*, class-1)
    zero = torch.zeros_like(f)[..., None]
    upper = torch.cat([logsigmoid(above), zero], -1)
    lower = torch.cat([zero, logsigmoid(-above)], -1)
    tiny = torch.finfo(f.dtype).tiny
    width = torch.log(-torch.expm1(-cutpoints.diff()).clamp(max=-tiny))
    edge = cutpoints.new_zeros(1)
    return upper + lower + torch.cat([edge, width, edge])
