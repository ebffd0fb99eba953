"""Log scores of whatever was observed, one row at a time and jointly.

log_likelihood is log p(y_row | draw), (chain, draw, row) or (draw, row), such as
`posterior.log_likelihood(x, y)`.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnn.arrays import by_draw, tensor
from bnn.errors import DataError


def log_score(log_likelihood: Any) -> Tensor:
    """Log posterior predictive density of each row, nats: log mean over draws of p(y | draw).

    The mean is inside the logarithm, and rows are apart (Gelman, Hwang, Vehtari 2014, eq. 5).

    Args:
        log_likelihood: (chain, draw, row) or (draw, row).

    Returns:
        (row,), in the dtype of the likelihoods.

    Raises:
        DataError: no draws, no rows, or NaN.

    Example:
        >>> log_score(torch.tensor([[0.5], [0.25]]).log()).exp()  # not the mean of logs
        tensor([0.3750])
    """
    return _log_mean(by_draw(log_likelihood, "log_likelihood"))


def joint_log_score(log_likelihood: Any, groups: Any = None) -> Tensor:
    """Log predictive density of several rows at once, nats: log mean over draws of the product.

    Unlike the sum of the rows' log scores it tells what the posterior has yet to learn from noise:
    a coin known to be fair and one known to be two-headed or two-tailed give the same log score of
    one toss, and -6.93 against -0.69 of ten equal ones.

    Args:
        log_likelihood: (chain, draw, row) or (draw, row).
        groups: rows that are scored together, (group, member), such as `dyadic(rows)`; a row may
            come several times. Default: all rows in one group.

    Returns:
        (group,), or () for all rows at once.

    Raises:
        DataError: no draws, no rows, or NaN; a group with a row that is not there.

    References:
        Osband et al. (2022), The neural testbed: evaluating joint predictions.

    Example:
        >>> unsure = torch.tensor([[0.0], [-torch.inf]])  # heads for certain, or tails for certain
        >>> joint_log_score(unsure, [[0] * 10])  # ten heads
        tensor([-0.6931])
    """
    each = by_draw(log_likelihood, "log_likelihood")
    if groups is None:
        return _log_mean(each.double().sum(1)).to(each.dtype)
    index = tensor(groups, "groups")
    wrong = (index < 0) | (index >= each.shape[1]) | (index != index.round())
    if index.ndim != 2 or bool(wrong.any()):
        raise DataError(
            f"groups has shape {tuple(index.shape)} and values in {index.min():g}..{index.max():g}."
            f" Pass (group, member) with rows in 0..{each.shape[1] - 1}, whole numbers."
        )
    total = each.new_zeros(len(each), len(index), dtype=torch.float64)
    for member in index.long().to(each.device).T:  # (group,)
        total += each[:, member]
    return _log_mean(total).to(each.dtype)


def dyadic(
    rows: int, *, size: int = 10, anchors: int = 2, groups: int = 1000, seed: int = 0
) -> Tensor:
    """Groups of rows for `joint_log_score`: each draws a few anchor rows, then `size` among those.

    Few rows that come back make a joint score tell posteriors apart, where rows all different
    would need to be very many (Osband et al. 2022). A row comes with its one label.

    Args:
        rows: how many there are.
        size: rows in a group.
        anchors: different rows in a group.
        groups: how many.
        seed: of the choice.

    Returns:
        Row numbers, (group, member).

    Raises:
        DataError: fewer rows than anchors, or a number below 1.

    References:
        Osband et al. (2022), Evaluating high-order predictive distributions in deep learning.

    Example:
        >>> groups = dyadic(100, size=10, groups=5)
        >>> groups.shape, [len(set(group)) <= 2 for group in groups.tolist()]
        (torch.Size([5, 10]), [True, True, True, True, True])
    """
    if min(size, anchors, groups) < 1 or rows < anchors:
        raise DataError(
            f"dyadic got rows={rows}, size={size}, anchors={anchors}, groups={groups}. Each is at "
            "least 1, and rows at least anchors."
        )
    generator = np.random.default_rng(seed)
    chosen = np.stack([generator.choice(rows, anchors, replace=False) for _ in range(groups)])
    members = generator.integers(anchors, size=(groups, size))
    return torch.from_numpy(np.take_along_axis(chosen, members, 1))


def _log_mean(values: Tensor) -> Tensor:
    """Log of the mean over the first axis of exp(values), in double on the way."""
    return values.double().logsumexp(0).sub(math.log(len(values))).to(values.dtype)
