"""Are values uniform? PIT values of a calibrated prediction are, and ranks of a right method."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnn.arrays import probability, tensor
from bnn.errors import DataError


@dataclass(frozen=True, eq=False)
class Uniformity:
    """How values in 0..1 are spread, against how uniform ones would be.

    Attributes:
        points: where the distribution function is looked at, (point,).
        share: of the values that lie below each, (point,).
        lower: lower end of the band that holds `share` at all points at once, (point,).
        upper: its upper end, (point,).
        ecdf_p: p-value of the largest departure of `share`, which leaves the band if this is below
            1 - level; of values below 1e-12 know no more than that.
        chi_square_p: p-value of the counts in cells of equal width, ten expected in each.

    Example:
        >>> test = uniformity(torch.linspace(0.01, 0.99, 50))
        >>> bool(((test.share >= test.lower) & (test.share <= test.upper)).all())
        True
    """

    points: Tensor
    share: Tensor
    lower: Tensor
    upper: Tensor
    ecdf_p: float
    chi_square_p: float


def uniformity(values: Any, *, cells: int = 50, level: float = 0.95) -> Uniformity:
    """Tests of uniformity, and the simultaneous band of an empirical distribution function.

    At a point z the number of N independent uniform values below is Binomial(N, z); a point's own
    p-value is twice the smaller tail. The band holds the counts whose p-value exceeds a bound that
    is the same at every point, and such that uniform values leave it anywhere with probability
    1 - level at most: by the walk of the counts from point to point, without simulation.

    The two tests see different things: the distribution function a shift, the cells a wrong width.

    Args:
        values: in 0..1, (value,), independent of one another. Of a rank r among L draws pass
            (r + 1/2) / (L + 1) and cells=L + 1.
        cells: the points are 1/cells, 2/cells, ...
        level: probability that uniform values stay in the band.

    Raises:
        DataError: no values, or outside 0..1; fewer than two cells.

    References:
        Sailynoja, Burkner, Vehtari (2022), Graphical test for discrete uniformity and its
        applications in goodness-of-fit evaluation and multiple sample comparison. We find the bound
        from exact tails of the counts, they from interpolated ones.

    Example:
        >>> uniformity([0.5, 0.5, 0.5], cells=2).share
        tensor([0.])
    """
    values, level = tensor(values, "values"), float(probability(level))
    if values.ndim != 1 or float(values.min()) < 0 or float(values.max()) > 1:
        raise DataError(
            f"values has shape {tuple(values.shape)} and lies in {float(values.min()):g}.."
            f"{float(values.max()):g}. Pass (value,) in 0..1, such as calibration.pit(...)."
        )
    if isinstance(cells, bool) or not isinstance(cells, int) or cells < 2:
        raise DataError(f"cells is {cells!r}. Pass a whole number of at least 2.")
    rows = len(values)
    place = (values.double() * cells).floor().long().clamp(max=cells - 1).cpu()
    counts = np.bincount(place.numpy(), minlength=cells)
    below = counts.cumsum()[:-1]
    ends = _band(rows, cells, level) / rows
    dtype = torch.get_default_dtype()
    made = [np.arange(1, cells) / cells, below / rows, *ends]
    points, share, lower, upper = (torch.as_tensor(each, dtype=dtype) for each in made)
    return Uniformity(points, share, lower, upper, _ecdf_p(below, rows), _chi_square_p(counts))


def _chi_square_p(counts: np.ndarray) -> float:
    most = max(2, min(len(counts), counts.sum() // 10))
    bins = max(k for k in range(1, most + 1) if len(counts) % k == 0)
    if bins == 1:  # a prime number of cells, and few values
        bins = len(counts)
    observed, expected = counts.reshape(bins, -1).sum(1), counts.sum() / bins
    statistic = ((observed - expected) ** 2).sum() / expected
    half = torch.tensor([(bins - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def _ecdf_p(below: np.ndarray, rows: int) -> float:
    """Chance that some point's own p-value is as small as the smallest of these counts below."""
    bound = 1.0
    for (first, tails), count in zip(_tails(rows, len(below) + 1), below, strict=True):
        inside = first <= count < first + len(tails)
        bound = min(bound, float(tails[count - first]) if inside else 0.0)
    return min(1.0, max(0.0, 1.0 - _chance(rows, _counts(rows, len(below) + 1, bound))))


@lru_cache(maxsize=64)
def _band(rows: int, cells: int, level: float) -> np.ndarray:
    """Least and largest count below each point, (2, point)."""
    low, high = -40.0, 0.0  # log of the bound: it holds the level at `low`, and not at `high`
    for _ in range(30):
        middle = (low + high) / 2
        kept = _chance(rows, _counts(rows, cells, math.exp(middle))) >= level
        low, high = (middle, high) if kept else (low, middle)
    return _counts(rows, cells, math.exp(low))


@lru_cache(maxsize=8)
def _tails(rows: int, cells: int) -> list[tuple[int, np.ndarray]]:
    """For each point the first count worth a look, and from there on each count's own p-value."""
    found = []
    log_factorial = np.concatenate([[0.0], np.log(np.arange(1, rows + 1)).cumsum()])
    for point in np.arange(1, cells) / cells:
        centre, reach = rows * point, 15 * np.sqrt(rows * point * (1 - point)) + 30
        first, last = max(0, int(centre - reach)), min(rows, int(centre + reach))
        k = np.arange(first, last + 1)
        choose = log_factorial[rows] - log_factorial[k] - log_factorial[rows - k]
        pmf = np.exp(choose + k * np.log(point) + (rows - k) * np.log1p(-point))
        found.append((first, 2 * np.minimum(pmf.cumsum(), pmf[::-1].cumsum()[::-1])))
    return found


def _counts(rows: int, cells: int, bound: float) -> np.ndarray:
    """Least and largest count below each point whose own p-value exceeds a bound, (2, point).

    The slack keeps counts of equal p-value on one side, whatever their last digit.
    """
    inside = [(first, tails > bound * (1 + 1e-9)) for first, tails in _tails(rows, cells)]
    ends = [
        (first + kept.argmax(), first + len(kept) - 1 - kept[::-1].argmax())
        if kept.any()
        else (1, 0)
        for first, kept in inside
    ]
    return np.array(ends).T


def _chance(rows: int, ends: np.ndarray) -> float:
    """Probability that the counts of uniform values stay within the ends at every point.

    The counts are those of a Poisson process of `rows` expected events that is known to have as
    many: its increments are independent, so that a step of the walk is a convolution.
    """
    cells = ends.shape[1] + 1
    rate = rows / cells
    log_factorial = np.concatenate([[0.0], np.log(np.arange(1, rows + 1)).cumsum()])
    step = np.exp(np.arange(rows + 1) * np.log(rate) - rate - log_factorial)
    start, weight = 0, np.ones(1)
    for lower, upper in [*ends.T, (rows, rows)]:
        if upper < max(lower, start):
            return 0.0
        moved = np.convolve(weight, step[: upper - start + 1])[: upper - start + 1]
        start, weight = max(lower, start), moved[max(lower - start, 0) :]
    end = np.exp(rows * np.log(rows) - rows - log_factorial[rows])
    return float(weight[0] / end)
