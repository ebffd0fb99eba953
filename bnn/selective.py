"""Selective prediction: is a model unsure where it should be, on strange rows and on wrong ones?

Any score that is large where the model is unsure will do: `prediction.entropy`,
`prediction.mutual_information`, `prediction.std`, `prediction.epistemic`.

    bnn.selective.auroc(known.mutual_information, strange.mutual_information)
    bnn.selective.risk_coverage(prediction.entropy, prediction.probs.argmax(-1) != y).area
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnn.arrays import finite, probability, same_rows, tensor


@dataclass(frozen=True, eq=False)
class RiskCoverage:
    """Mean loss of the rows of which a model is surest, against how many of them.

    Attributes:
        coverage: share of rows kept, 1/n, 2/n, ..., 1, (row,).
        risk: mean loss of those, (row,).
        area: mean of `risk`: AURC.
        excess: what `area` has above that of an order by the losses themselves: E-AURC; 0 is best.

    Example:
        >>> curve = risk_coverage([0.1, 0.2, 0.9], [0.0, 0.0, 3.0])
        >>> curve.risk, curve.excess
        (tensor([0., 0., 1.]), 0.0)
    """

    coverage: Tensor
    risk: Tensor
    area: float
    excess: float


def auroc(inside: Any, outside: Any) -> float:
    """Probability that a strange row scores above a known one, ties counting half.

    0.5 is chance; 1 tells every strange row.

    Args:
        inside: scores of rows such as those that were learnt from, (row,).
        outside: scores of strange rows, (row,).

    Raises:
        DataError: no rows, or NaN.

    References:
        Hanley, McNeil (1982), The meaning and use of the area under a ROC curve.

    Example:
        >>> auroc([0.1, 0.2], [0.2, 0.9])
        0.875
    """
    inside, outside = _scores(inside, outside)
    ordered = inside.sort().values
    below = torch.searchsorted(ordered, outside).double()
    up_to = torch.searchsorted(ordered, outside, right=True).double()
    return float((below + up_to).mean() / 2 / len(inside))


def fpr(inside: Any, outside: Any, *, tpr: float = 0.95) -> float:
    """Share of strange rows taken for known by the smallest threshold that keeps `tpr` of those.

    FPR95 with known rows as the positive ones; other papers have it the other way round. 0 is best.

    Args:
        inside: scores of rows such as those that were learnt from, (row,).
        outside: scores of strange rows, (row,).
        tpr: share of the known rows that must be kept.

    Raises:
        DataError: no rows, or NaN; tpr is not in (0, 1).

    References:
        Liang, Li, Srikant (2018), Enhancing the reliability of out-of-distribution image detection
        in neural networks.

    Example:
        >>> fpr([0.1, 0.2, 0.3, 0.4], [0.35, 0.9], tpr=0.75)  # the threshold is .3
        0.0
    """
    inside, outside = _scores(inside, outside)
    need = float(probability(tpr, "tpr")) * len(inside)
    place = max(1, math.ceil(round(need, 9)))  # 0.55 of 100 rows is 55, not a bit more
    return float((outside <= inside.sort().values[place - 1]).double().mean())


def risk_coverage(score: Any, loss: Any) -> RiskCoverage:
    """Risk-coverage curve: what a model costs if it may refuse the rows it is least sure of.

    Rows of equal score are refused in random order: the curve is its expectation.

    Args:
        score: large where the model is unsure, (row, *).
        loss: cost of each row, (row, *): wrong or right, a squared error, a negative log score.

    Raises:
        DataError: other rows, no rows, or NaN.

    References:
        Geifman, Uziel, El-Yaniv (2019), Bias-reduced uncertainty estimation for deep neural
        classifiers. We take the excess over the best order of these rows, they over its limit.

    Example:
        >>> risk_coverage([0.1, 0.2, 0.3], [0, 0, 1]).risk
        tensor([0.0000, 0.0000, 0.3333])
    """
    score, loss = tensor(score, "score"), finite(loss, "loss")
    same_rows(score, loss, ("score", "loss"))
    score, loss = score.flatten(), loss.to(score.device).flatten().double()
    values, group, count = score.unique(return_inverse=True, return_counts=True)
    mean = loss.new_zeros(len(values)).index_add_(0, group, loss) / count
    risk, best = (_running(each) for each in (mean[group.sort().values], loss.sort().values))
    kept = torch.arange(1, len(loss) + 1, device=loss.device).double() / len(loss)
    area, dtype = float(risk.mean()), torch.get_default_dtype()
    return RiskCoverage(kept.to(dtype), risk.to(dtype), area, area - float(best.mean()))


def _running(loss: Tensor) -> Tensor:
    return loss.cumsum(0) / torch.arange(1, len(loss) + 1, device=loss.device)


def _scores(inside: Any, outside: Any) -> tuple[Tensor, Tensor]:
    inside, outside = tensor(inside, "inside").flatten(), tensor(outside, "outside").flatten()
    return inside.double(), outside.double().to(inside.device)
