"""Predictions of labels: reliability curve, calibration error, Brier score, NLL.

probs are class probabilities, (row, class), such as `prediction.probs`; labels class indices,
(row,). Axes between the row and the class count as rows.

Bins are (lower, upper], the first one closed at 0: a probability on an edge falls into one bin, the
lower. `equal="width"` cuts 0..1 evenly, `equal="mass"` the sorted probabilities; equal
probabilities are never parted, so that there may be fewer bins than asked for.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bnn.arrays import classified, probabilities, probability, tensor
from bnn.errors import DataError

Equal = Literal["width", "mass"]
_ROUNDING = 1e-6  # of sums of probabilities in float32


@dataclass(frozen=True, eq=False)
class Reliability:
    """What was stated and what came true, bin by bin; empty bins are left out.

    Attributes:
        stated: mean stated probability of the bin, (bin,).
        observed: share of its rows where it came true, (bin,).
        count: its rows, (bin,).
        lower: lower end of the band around `observed`, (bin,).
        upper: upper end, (bin,).

    Example:
        >>> probs = [[0.8, 0.2], [0.8, 0.2], [0.4, 0.6], [0.4, 0.6]]
        >>> reliability(probs, [0, 1, 1, 1], bins=2).count
        tensor([2, 2])
    """

    stated: Tensor
    observed: Tensor
    count: Tensor
    lower: Tensor
    upper: Tensor


@dataclass(frozen=True)
class Brier:
    """Brier score and its parts: score = reliability - resolution + uncertainty + within.

    Attributes:
        score: mean squared distance of the probabilities from the label's indicator, 0..2.
        reliability: of stated from observed shares, between bins; 0 is calibrated.
        resolution: of the bins' observed shares from the overall ones; large is informative.
        uncertainty: of the labels themselves, whatever is predicted.
        within: what the bins hide: variance of the stated probabilities inside them, less twice
            their covariance with the labels. 0 where every bin holds one probability.

    Example:
        >>> found = brier_decomposition([[0.8, 0.2], [0.8, 0.2], [0.4, 0.6]], [0, 1, 1], bins=None)
        >>> parts = found.reliability - found.resolution + found.uncertainty + found.within
        >>> abs(parts - found.score) < 1e-9
        True
    """

    score: float
    reliability: float
    resolution: float
    uncertainty: float
    within: float


def ece(
    probs: Any,
    labels: Any,
    *,
    bins: int = 15,
    equal: Equal = "width",
    classwise: bool = False,
    norm: int = 1,
    debiased: bool = False,
) -> float:
    """Expected calibration error: distance of stated probabilities from observed shares, 0..1.

    With b over bins of n_b rows, ECE = (sum_b n_b / N |stated_b - observed_b|^norm)^(1 / norm).
    Of the most probable label; `classwise` takes the probability of each class, and the mean of
    their errors.

    Even a calibrated prediction has ECE > 0, as shares of few rows scatter. `debiased` takes out
    what scatter adds, by Kumar et al. (2019): for norm 2 the variance of each bin's share, which
    makes the squared error unbiased (below 0 it is reported as 0); for norm 1 what a Gaussian
    scatter of that variance would add to the error found, which removes about half of the bias and
    can end below 0. A bin of one row shows no scatter, and keeps its bias: prefer equal="mass".

    Args:
        probs: class probabilities, (row, class).
        labels: class indices, (row,).
        bins: number of bins.
        equal: "width", or "mass": bins of equally many rows.
        classwise: over all classes instead of the most probable label.
        norm: 1, or 2 for the root mean square.
        debiased: correct for the scatter of shares.

    Raises:
        DataError: what is no probability, no class, or has other rows; another bins or norm.

    References:
        Naeini, Cooper, Hauskrecht (2015), Obtaining well calibrated probabilities using Bayesian
        binning. Kull et al. (2019), Beyond temperature scaling (class-wise). Kumar, Liang, Ma
        (2019), Verified uncertainty calibration (debiased).

    Example:
        >>> ece([[0.75, 0.25], [0.25, 0.75]], [0, 0])  # states 0.75 twice, is right once
        0.25
    """
    probs, labels = classified(probs, labels)
    if norm not in (1, 2):
        raise DataError(f"norm is {norm!r}. Pass 1 or 2.")
    if classwise:
        pairs = [(probs[:, k], labels == k) for k in range(probs.shape[-1])]
    else:
        pairs = [_top(probs, labels)]
    errors = [_error(stated, came, bins, equal, norm, debiased) for stated, came in pairs]
    return sum(errors) / len(errors)


def reliability(
    probs: Any,
    labels: Any,
    *,
    label: int | None = None,
    draws: Any = None,
    bins: int = 15,
    equal: Equal = "mass",
    level: float = 0.95,
) -> Reliability:
    """Reliability curve: observed share against stated probability, with a band around it.

    The band is Wilson's interval of a share of so few rows; or with `draws` what the posterior says
    of it: the curve of each draw over the same bins, and their central quantiles.

    Args:
        probs: class probabilities, (row, class).
        labels: class indices, (row,).
        label: the class whose probability is read; default the most probable one of each row.
        draws: class probabilities at each draw, (chain, draw, row, class) or (draw, row, class),
            such as `prediction.f.softmax(-1)` of a model whose f are logits.
        bins: number of bins.
        equal: "mass": bins of equally many rows, or "width".
        level: of the band.

    Raises:
        DataError: as `ece`; draws of other rows or classes.

    References:
        DeGroot, Fienberg (1983), The comparison and evaluation of forecasters. Wilson (1927),
        Probable inference, the law of succession, and statistical inference.

    Example:
        >>> probs = [[0.8, 0.2], [0.8, 0.2], [0.4, 0.6], [0.4, 0.6]]
        >>> curve = reliability(probs, [0, 1, 1, 1], bins=2)  # two rows say 0.8, two 0.6
        >>> curve.stated, curve.observed
        (tensor([0.6000, 0.8000]), tensor([1.0000, 0.5000]))
    """
    shape = tensor(probs, "probs").shape
    probs, labels = classified(probs, labels)
    level = float(probability(level))
    if label is not None and label not in range(probs.shape[-1]):
        raise DataError(f"label is {label!r}. Pass a class in 0..{probs.shape[-1] - 1}, or None.")

    def read(each: Tensor) -> tuple[Tensor, Tensor]:
        return _top(each, labels) if label is None else (each[:, label], labels == label)

    found, came = read(probs)
    edges = _edges(found, bins, equal)
    total = _sums(found, came, edges)
    filled = total[0] > 0
    count, stated, observed = total[0], total[1] / total[0], total[2] / total[0]
    if draws is None:
        z = float(torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)))
        centre = (total[2] + z**2 / 2) / (count + z**2)
        half = z / (count + z**2) * (count * observed * (1 - observed) + z**2 / 4).sqrt()
        lower, upper = centre - half, centre + half
    else:
        draws = tensor(draws, "draws").to(probs.device)
        if draws.ndim - len(shape) not in (1, 2) or draws.shape[-len(shape) :] != shape:
            raise DataError(
                f"draws has shape {tuple(draws.shape)} and probs has {tuple(shape)}. Pass the same "
                "rows and classes at each draw, (chain, draw, row, class) or (draw, row, class)."
            )
        draws = probabilities(draws, "draws").reshape(-1, *probs.shape)
        curves = []
        for each in draws:
            part, _, right = _sums(*read(each), edges)
            curves.append(right / part)  # NaN where the draw has nothing in the bin
        ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
        lower, upper = torch.stack(curves).nanquantile(ends.to(probs.device), 0)
    kept = [v[filled].to(torch.get_default_dtype()) for v in (stated, observed, lower, upper)]
    return Reliability(kept[0], kept[1], count[filled].long(), kept[2], kept[3])


def brier(probs: Any, labels: Any) -> float:
    """Brier score: mean over rows of the squared distance from the label's indicator, 0..2.

    Summed over classes as Brier (1950) has it; for two classes that is twice the mean of (p - y)^2.

    Args:
        probs: class probabilities, (row, class).
        labels: class indices, (row,).

    Raises:
        DataError: as `ece`.

    Example:
        >>> round(brier([[0.75, 0.25], [0.25, 0.75]], [0, 0]), 6)  # (2 / 16 + 18 / 16) / 2
        0.625
    """
    probs, labels = classified(probs, labels)
    return float((probs.double() - _indicator(labels, probs)).square().sum(-1).mean())


def brier_decomposition(
    probs: Any, labels: Any, *, bins: int | None = 15, equal: Equal = "mass"
) -> Brier:
    """Brier score split into reliability, resolution, uncertainty and what bins hide: exactly.

    Each class by itself, over bins of its probability, summed over classes.

    Args:
        probs: class probabilities, (row, class).
        labels: class indices, (row,).
        bins: number of bins; None for one bin for each stated probability, Murphy's own form, which
            is for forecasts that state few different ones.
        equal: "mass": bins of equally many rows, or "width".

    Raises:
        DataError: as `ece`.

    References:
        Murphy (1973), A new vector partition of the probability score. Stephenson, Coelho,
        Jolliffe (2008), Two extra components in the Brier score decomposition (within).

    Example:
        >>> found = brier_decomposition([[0.5, 0.5], [0.5, 0.5]], [0, 1])  # calibrated, and no use
        >>> found.reliability, found.resolution, found.uncertainty
        (0.0, 0.0, 0.5)
    """
    probs, labels = classified(probs, labels)
    came, rows = _indicator(labels, probs), len(labels)
    parts = came.new_zeros(4)
    for stated, true in zip(probs.T, came.T, strict=True):
        edges = stated.unique() if bins is None else _edges(stated, bins, equal)
        where = _place(stated, edges)
        count, p, o = _sums(stated, true, edges)
        p, o, share, overall = p / count, o / count, count / rows, true.mean()
        spread = stated.double() - p[where]
        parts[0] += (share * (p - o).square()).nansum()
        parts[1] += (share * (o - overall).square()).nansum()
        parts[2] += overall * (1 - overall)
        parts[3] += (spread.square() - 2 * spread * (true - o[where])).mean()
    return Brier(brier(probs, labels), *parts.tolist())


def nll(probs: Any, labels: Any) -> float:
    """Mean negative log probability of the label, nats; infinite where a label had probability 0.

    Args:
        probs: class probabilities, (row, class).
        labels: class indices, (row,).

    Raises:
        DataError: as `ece`.

    Example:
        >>> round(nll([[0.5, 0.5], [0.25, 0.75]], [0, 0]), 4)  # (log 2 + log 4) / 2
        1.0397
    """
    probs, labels = classified(probs, labels)
    return -float(probs.double().gather(-1, labels[:, None]).log().mean())


def set_coverage(probs: Any, labels: Any, level: float | Tensor = 0.9) -> Tensor:
    """Share of rows whose label is in the smallest set of labels that is probable enough.

    The set takes the most probable labels until their probabilities sum to the level. A calibrated
    prediction covers at least as often as it says, and more often where the last label overshoots.

    Args:
        probs: class probabilities, (row, class).
        labels: class indices, (row,).
        level: least probability of a set, or several, (level,), in (0, 1).

    Returns:
        Observed share for each level, dimensionless.

    Raises:
        DataError: as `ece`; a level is not in (0, 1).

    Example:
        >>> set_coverage([[0.6, 0.3, 0.1]] * 3, [0, 1, 2], level=0.9)  # the first two
        tensor(0.6667, dtype=torch.float64)
    """
    probs, labels = classified(probs, labels)
    levels = probability(level).to(probs.device)
    ordered, order = probs.double().sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered  # what the labels ahead of each sum to
    ahead = before[order == labels[:, None]]  # (row,)
    return (ahead < levels[..., None] - _ROUNDING).double().mean(-1)


def _top(probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Probability of the most probable label, and whether it came true, (row,) each."""
    stated, label = probs.max(-1)
    return stated, label == labels


def _indicator(labels: Tensor, probs: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(labels, probs.shape[-1]).double()


def _edges(stated: Tensor, bins: int, equal: str) -> Tensor:
    """Upper ends of the bins: of equal mass the quantiles, in float64.

    Of equal width they have the dtype of the probabilities: a float32 0.3 is on the edge 3/10.
    """
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise DataError(f"bins is {bins!r}. Pass a whole number of at least 1.")
    shares = torch.arange(1, bins + 1, device=stated.device).double() / bins
    if equal == "width":
        return shares.to(stated.dtype)
    if equal == "mass":  # torch.quantile takes at most 2^24 rows
        ordered, at = stated.double().sort().values, shares * (len(stated) - 1)
        below = at.floor().long()
        above = (below + 1).clamp(max=len(stated) - 1)
        return ordered[below].lerp(ordered[above], at - below)  # one edge twice: an empty bin
    raise DataError(f'equal is {equal!r}. Pass "width" or "mass".')


def _place(stated: Tensor, edges: Tensor) -> Tensor:
    """The bin of each row: the first whose upper end is not below its probability."""
    return torch.bucketize(stated.to(edges.dtype).contiguous(), edges).clamp(max=len(edges) - 1)


def _sums(stated: Tensor, came: Tensor, edges: Tensor) -> Tensor:
    """Rows, sum of stated probabilities and rows where it came true of each bin, (3, bin)."""
    each = torch.stack([torch.ones_like(stated).double(), stated.double(), came.double()])
    return each.new_zeros(3, len(edges)).index_add_(1, _place(stated, edges), each)


def _error(stated: Tensor, came: Tensor, bins: int, equal: str, norm: int, debiased: bool) -> float:
    total = _sums(stated, came, _edges(stated, bins, equal))
    count, p, o = total[:, total[0] > 0]
    share, p, o = count / len(stated), p / count, o / count
    gap, variance = (p - o).abs(), o * (1 - o) / (count - 1).clamp(min=1)
    if norm == 2:
        square = gap.square() - variance if debiased else gap.square()
        return math.sqrt(max(0.0, float((share * square).sum())))
    if debiased:  # 2 |d| - E|d + e|, e Gaussian of that variance
        sd = variance.sqrt().clamp(min=1e-12)
        density = (-(gap / sd).square() / 2).exp() * math.sqrt(2 / math.pi)
        gap = 2 * gap - (sd * density + gap * torch.special.erf(gap / sd / math.sqrt(2)))
    return float((share * gap).sum())
