"""Calibration: do stated probabilities come true? Functions of arrays; no posterior in sight."""

import torch
from torch import Tensor

from bnn.errors import DataError


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
        DataError: y and y_draws disagree on rows, or a level is not in (0, 1).

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
    levels = torch.as_tensor(level, dtype=torch.float64)
    if bool(((levels <= 0) | (levels >= 1)).any()):
        raise DataError(f"A level is a probability in (0, 1), found {levels.tolist()}.")
    pooled = y_draws.flatten(0, 1).double()
    tails = torch.stack([(1 - levels) / 2, (1 + levels) / 2]).reshape(2, -1)  # (side, level)
    lower, upper = (torch.quantile(pooled, side, dim=0) for side in tails)  # (level, row, *)
    inside = (y >= lower) & (y <= upper)
    share = inside.flatten(1).double().mean(1).to(torch.get_default_dtype())
    return share.reshape(levels.shape)
