"""Calibration: do stated probabilities come true? Functions of arrays; no posterior in sight."""

import torch
from torch import Tensor

from bnn.errors import DataError

_CELLS = 2**22  # draws x rows sorted at once; torch.quantile takes at most 2**24


def interval_coverage(y_draws: Tensor, y: Tensor, level: float | Tensor) -> Tensor:
    """Share of observations inside the central interval of their predictive draws.

    A calibrated prediction gives coverage equal to the level.

    Args:
        y_draws: predictive draws, (chain, draw, row, *); same units as y.
        y: observations, (row, *).
        level: nominal probability, or several, (level,), in (0, 1).

    Returns:
        Observed share for each level, dimensionless.

    Raises:
        DataError: y and y_draws disagree on rows, or there are none; a level is not in (0, 1).

    References:
        Kuleshov, Fenner, Ermon (2018), Accurate uncertainties for deep learning using calibrated
        regression, section 3.

    Example:
        >>> draws = torch.linspace(0, 1, 101).reshape(1, 101, 1)
        >>> interval_coverage(draws, torch.tensor([0.5]), 0.9)
        tensor(1.)
    """
    if y_draws.shape[2:] != y.shape:
        raise DataError(
            f"y_draws has shape (chain, draw, {', '.join(map(str, y_draws.shape[2:]))}) and y has "
            f"{tuple(y.shape)}: the rows must be the same."
        )
    if not y_draws.numel():
        raise DataError("There are no rows, or no draws, and coverage is a share of rows.")
    levels = torch.as_tensor(level, dtype=torch.float64)
    if not bool(((levels > 0) & (levels < 1)).all()):
        raise DataError(f"A level is a probability in (0, 1), found {levels.tolist()}.")
    tails = torch.stack([(1 - levels) / 2, (1 + levels) / 2]).flatten()
    pooled, observed = y_draws.flatten(0, 1).flatten(1), y.flatten()  # (draw, cell), (cell,)
    size = max(1, _CELLS // len(pooled))
    inside = torch.zeros(levels.numel(), dtype=torch.float64)
    for draws, truth in zip(pooled.split(size, 1), observed.split(size), strict=True):
        ends = torch.quantile(draws.double(), tails, dim=0)
        lower, upper = ends.unflatten(0, (2, -1))  # (level, cell) each
        inside += ((truth >= lower) & (truth <= upper)).sum(1)
    share = (inside / len(observed)).to(torch.get_default_dtype())
    return share.reshape(levels.shape)
