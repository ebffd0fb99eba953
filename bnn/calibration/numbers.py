"""Predictions of numbers: coverage and width of intervals, PIT, CRPS.

y_draws are predictive draws, (chain, draw, row, *) or (draw, row, *), such as
`prediction.outcomes`; y the observations, (row, *). The same functions serve counts; intervals of
these hold more than they say, and `pit_coverage` tells whether they are calibrated.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bnn.arrays import by_draw, finite, pooled, probability
from bnn.errors import DataError

_CELLS = 2**22  # draws x rows sorted at once; torch.quantile takes at most 2**24


def interval_coverage(y_draws: Any, y: Any, level: float | Tensor) -> Tensor:
    """Share of observations inside the central interval of their predictive draws.

    A calibrated prediction gives coverage equal to the level; one of counts gives more, since whole
    numbers cannot leave out just the rest: see `pit_coverage`.

    Args:
        y_draws: predictive draws, (chain, draw, row, *) or (draw, row, *); same units as y.
        y: observations, (row, *).
        level: nominal probability, or several, (level,), in (0, 1).

    Returns:
        Observed share for each level, dimensionless.

    Raises:
        DataError: y and y_draws disagree on rows, there are none, or NaN; a level is not in (0, 1).

    References:
        Kuleshov, Fenner, Ermon (2018), Accurate uncertainties for deep learning using calibrated
        regression, section 3.

    Example:
        >>> draws = torch.linspace(0, 1, 101).reshape(1, 101, 1)
        >>> interval_coverage(draws, torch.tensor([0.5]), 0.9)
        tensor(1.)
    """

    def inside(lower: Tensor, upper: Tensor, truth: Tensor) -> Tensor:
        return (truth >= lower) & (truth <= upper)

    return _of_intervals(y_draws, y, level, inside)


def pit_coverage(y_draws: Any, y: Any, level: float | Tensor, *, seed: int = 0) -> Tensor:
    """Share of observations whose PIT value lies in the central part of 0..1 of this length.

    A calibrated prediction gives the level, one of counts too: see `pit`. Of continuous numbers it
    is `interval_coverage` up to the distance between two draws.

    Args:
        y_draws: predictive draws, (chain, draw, row, *) or (draw, row, *); same units as y.
        y: observations, (row, *).
        level: nominal probability, or several, (level,), in (0, 1).
        seed: of the random part among ties.

    Returns:
        Observed share for each level, dimensionless.

    Raises:
        DataError: as `interval_coverage`.

    References:
        Czado, Gneiting, Held (2009), Predictive model assessment for count data.

    Example:
        >>> y = torch.arange(400) % 4  # of the numbers 0 to 3 an interval of 90 % holds all
        >>> draws = y[:, None].expand(400, 400)
        >>> interval_coverage(draws, y, 0.9), pit_coverage(draws, y, 0.9).round(decimals=1)
        (tensor(1.), tensor(0.9000))
    """
    levels = probability(level)
    apart = (2 * pit(y_draws, y, seed=seed).double() - 1).abs().flatten()
    inside = apart <= levels.to(apart.device)[..., None]
    return inside.double().mean(-1).to(torch.get_default_dtype())


def sharpness(y_draws: Any, level: float | Tensor = 0.9) -> Tensor:
    """Mean width of the central predictive intervals, units of y: of two calibrated, the less.

    Args:
        y_draws: predictive draws, (chain, draw, row, *), or with two axes (draw, row).
        level: nominal probability, or several, (level,), in (0, 1).

    Raises:
        DataError: there are no draws, no rows, or NaN; a level is not in (0, 1).

    References:
        Gneiting, Balabdaoui, Raftery (2007), Probabilistic forecasts, calibration and sharpness.

    Example:
        >>> sharpness(torch.linspace(0, 1, 101).reshape(1, 101, 1), 0.5)
        tensor(0.5000)
    """
    draws = finite(y_draws, "y_draws")
    if draws.ndim < 2:
        raise DataError(f"y_draws has shape {tuple(draws.shape)}. Pass (chain, draw, row, *).")
    lead = min(draws.ndim - 1, 2)
    y = draws.flatten(0, lead - 1)[0]
    return _of_intervals(draws, y, level, lambda lower, upper, _: upper - lower)


def pit(y_draws: Any, y: Any, *, seed: int = 0) -> Tensor:
    """Probability integral transform: where each observation falls in its predictive draws, 0..1.

    Uniform where the prediction is calibrated; a hump in the middle says too wide, horns too
    narrow. Where draws equal y (counts, ordered labels) it is randomised between the share of draws
    below y and that of draws up to y (Czado et al. 2009), so that it is uniform there too.

    Args:
        y_draws: predictive draws, (chain, draw, row, *) or (draw, row, *).
        y: observations, (row, *).
        seed: of the random part among ties.

    Returns:
        (row, *).

    Raises:
        DataError: y and y_draws disagree on rows, there are none, or NaN.

    References:
        Dawid (1984), Statistical theory: the prequential approach. Czado, Gneiting, Held (2009),
        Predictive model assessment for count data.

    Example:
        >>> pit(torch.linspace(0, 1, 1_000)[:, None], [0.25]).round(decimals=2)
        tensor([0.2500])
    """
    draws, y = pooled(y_draws, y)
    return _pit(draws, y, seed)


def loo_pit(y_draws: Any, y: Any, log_weights: Any, *, seed: int = 0) -> Tensor:
    """PIT of each training row under the posterior without that row, by importance weights.

    Args:
        y_draws: predictive draws of the training rows, (chain, draw, row, *) or (draw, row, *).
        y: their observations, (row, *).
        log_weights: log of an importance weight, up to a constant of the row, (chain, draw, row) or
            (draw, row): Pareto smoothed ones (`az.psislw`), or raw ones, -log p(y_row | draw),
            whose variance may be infinite.
        seed: of the random part among ties.

    Returns:
        (row, *), uniform where the model is calibrated.

    Raises:
        DataError: as `pit`, or weights of other draws or rows, or all zero for a row.

    References:
        Gelfand, Dey, Chang (1992), Model determination using predictive distributions. Vehtari,
        Gelman, Gabry (2017), Practical Bayesian model evaluation using leave-one-out
        cross-validation and WAIC.

    Example:
        >>> draws = torch.linspace(0, 1, 1_000)[:, None]
        >>> even = torch.zeros(1_000, 1)  # log weights, such as those that `az.psis` gives
        >>> loo_pit(draws, [0.25], even).round(decimals=2)
        tensor([0.2500])
    """
    draws, y = pooled(y_draws, y)
    weights = by_draw(log_weights, "log_weights").to(draws.device)
    if weights.shape != draws.shape[:2]:
        raise DataError(
            f"log_weights has (draw, row) = {tuple(weights.shape)} with chains pooled, and y_draws "
            f"has {tuple(draws.shape[:2])}: the draws and the rows must be the same."
        )
    if bool(weights.isposinf().any() | weights.isneginf().all(0).any()):
        raise DataError("log_weights has a row whose weights are infinite or all zero.")
    weights = weights.reshape(*weights.shape, *[1] * (y.ndim - 1)).expand(draws.shape)
    return _pit(draws, y, seed, weights)


def crps(y_draws: Any, y: Any, *, unbiased: bool = True) -> Tensor:
    """Continuous ranked probability score of each observation, units of y; small is good.

        E|Y - y| - E|Y - Y'| / 2

    The absolute error, where the prediction is a point. In O(S log S) for S draws.

    Args:
        y_draws: predictive draws, (chain, draw, row, *) or (draw, row, *).
        y: observations, (row, *).
        unbiased: True takes the draws as a sample of the prediction, and averages over the pairs of
            two different ones (it may then be below 0); False takes them as the prediction itself.

    Returns:
        (row, *).

    Raises:
        DataError: as `pit`; a single draw, which has no pairs, and `unbiased`.

    References:
        Gneiting, Raftery (2007), Strictly proper scoring rules, section 4.2. Ferro (2014), Fair
        scores for ensemble forecasts.

    Example:
        >>> crps([[0.0], [2.0]], [0.0], unbiased=False)
        tensor([0.5000])
    """
    draws, y = pooled(y_draws, y)
    count = len(draws)
    if unbiased and count < 2:
        raise DataError("y_draws holds one draw, and no pairs of draws. Pass unbiased=False.")
    pairs = count * (count - 1) if unbiased else count**2
    # Sum over pairs of |y_i - y_j| / 2, each pair in both orders, from the sorted draws.
    place = (2 * torch.arange(count, device=draws.device).double() - (count - 1))[:, None]

    def score(part: Tensor, truth: Tensor) -> Tensor:
        away = (part - truth).sort(0).values
        return away.abs().mean(0) - (place * away).sum(0) / pairs

    return _by_block(score, draws, y).reshape(y.shape).to(torch.get_default_dtype())


def _pit(draws: Tensor, y: Tensor, seed: int, *log_weights: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    chance = torch.rand(y.shape, generator=generator, dtype=torch.float64).to(y.device)

    def place(part: Tensor, truth: Tensor, among: Tensor, *log_weight: Tensor) -> Tensor:
        below, equal = (part < truth).double(), (part == truth).double()
        if not log_weight:
            return below.mean(0) + among * equal.mean(0)
        weight = log_weight[0].softmax(0)
        return ((weight * below).sum(0) + among * (weight * equal).sum(0)).clamp(0, 1)

    places = _by_block(place, draws, y, chance, *log_weights)
    return places.reshape(y.shape).to(torch.get_default_dtype())


def _of_intervals(
    y_draws: Any, y: Any, level: Any, read: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """Mean over rows of what is read off the ends (level, cell) and the truth (cell,)."""
    draws, y = pooled(y_draws, y)
    levels = probability(level).to(draws.device)
    tails = torch.stack([(1 - levels) / 2, (1 + levels) / 2]).flatten()

    def score(part: Tensor, truth: Tensor) -> Tensor:
        lower, upper = torch.quantile(part, tails, dim=0).unflatten(0, (2, -1))
        return read(lower, upper, truth).double().T

    share = _by_block(score, draws, y).mean(0)
    return share.reshape(levels.shape).to(torch.get_default_dtype())


def _by_block(score: Callable[..., Tensor], draws: Tensor, y: Tensor, *more: Tensor) -> Tensor:
    """score(draws (draw, cell), y (cell,), ...) -> (cell, *), a block of cells at a time."""
    size = max(1, _CELLS // len(draws))
    flat = [v.flatten(v.ndim - y.ndim).split(size, -1) for v in (draws, y, *more)]
    return torch.cat([score(*(v.double() for v in block)) for block in zip(*flat, strict=True)])
