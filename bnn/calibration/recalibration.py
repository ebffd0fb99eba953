"""Recalibration: a map fitted to held-out rows that makes stated probabilities come true.

Fit it to rows that the posterior has not seen, and score it on yet others. None of the maps tells a
model anything about its inputs: they change how sure it is, not what it knows.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnn.arrays import classified, finite, labels_of, pooled, probabilities, tensor
from bnn.calibration.numbers import pit
from bnn.errors import ApproximationWarning, DataError


@dataclass(frozen=True)
class Temperature:
    """Softmax of logits / temperature: above 1 less sure than stated, below 1 surer.

    Attributes:
        temperature: above 0.

    Example:
        >>> Temperature(2.0)(torch.tensor([[2.0, 0.0]]))  # as surely as logits of 1 and 0
        tensor([[0.7311, 0.2689]])
    """

    temperature: float

    def __call__(self, logits: Any) -> Tensor:
        """Probabilities (row, class) of logits (row, class); -inf stays impossible."""
        return (_logits(logits) / self.temperature).softmax(-1)


@dataclass(frozen=True, eq=False)
class Isotonic:
    """Probabilities through an increasing broken line, one for each class, and scaled to sum 1.

    Attributes:
        stated: knots of each line, (knot,) each; of two classes only the second has one.
        observed: its values there.

    Example:
        >>> rule = isotonic([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.2, 0.8]], [0, 1, 1, 1])
        >>> rule(torch.tensor([[0.9, 0.1]]))
        tensor([[0.5000, 0.5000]])
    """

    stated: tuple[Tensor, ...]
    observed: tuple[Tensor, ...]

    def __call__(self, probs: Any) -> Tensor:
        """Probabilities (row, class) of probabilities (row, class)."""
        probs = probabilities(probs)
        two = len(self.stated) == 1
        if probs.shape[-1] != (2 if two else len(self.stated)):
            raise DataError(
                f"probs has {probs.shape[-1]} classes and the map was fitted to "
                f"{2 if two else len(self.stated)}."
            )
        columns = [probs[..., 1]] if two else list(probs.unbind(-1))
        lines = [
            _interpolate(p.double(), x, y)
            for p, x, y in zip(columns, self.stated, self.observed, strict=True)
        ]
        new = torch.stack([1 - lines[0], lines[0]] if two else lines, -1)
        total = new.sum(-1, keepdim=True)
        new = torch.where(total > 0, new / total, torch.full_like(new, 1 / new.shape[-1]))
        return new.to(probs.dtype)


@dataclass(frozen=True, eq=False)
class Quantiles:
    """Predictive draws moved to the quantiles that held-out rows say they are; not for counts.

    Attributes:
        stated: probability that the draws give, (knot,).
        observed: share of held-out rows up to there, increasing, (knot,).

    Example:
        >>> draws = torch.randn(500, 200, generator=torch.Generator().manual_seed(0))
        >>> rule = quantiles(2 * draws, draws[0])  # twice as wide as they should be
        >>> rule(2 * draws).std() < 1.2
        tensor(True)
    """

    stated: Tensor
    observed: Tensor

    def __call__(self, y_draws: Any) -> Tensor:
        """Draws of the same shape, (chain, draw, row, *) or with two axes (draw, row).

        The ranks among a row's draws stay, so that draws of different rows stay paired.
        """
        y_draws = finite(y_draws, "y_draws")
        if y_draws.ndim < 2:
            raise DataError(f"y_draws has shape {tuple(y_draws.shape)}. Pass (chain, draw, row).")
        draws = y_draws.flatten(0, 1) if y_draws.ndim > 2 else y_draws
        count = len(draws)
        middle = (torch.arange(count).double() + 0.5) / count
        # Draw i of the sorted ones stands for probability (i + 1/2) / S, before and after.
        place = (_interpolate(middle, self.observed, self.stated) * count - 0.5).clamp(0, count - 1)
        low = place.floor().long()
        ordered, rank = draws.sort(0)
        share = (place - low).reshape(-1, *[1] * (draws.ndim - 1)).to(draws)
        moved = torch.lerp(ordered[low], ordered[(low + 1).clamp(max=count - 1)], share)
        return torch.empty_like(draws).scatter_(0, rank, moved).reshape(y_draws.shape)


def _logits(logits: Any) -> Tensor:
    """As they came; of a row some may be -inf, and not all."""
    logits = tensor(logits, "logits")
    finite(logits.masked_fill(logits.isneginf(), 0.0), "logits")
    if logits.ndim and bool(logits.isneginf().all(-1).any()):
        raise DataError("logits has a row of -inf: no class can be. Leave such rows out.")
    return logits


def temperature(logits: Any, labels: Any) -> Temperature:
    """The temperature under which held-out labels are most probable.

    It keeps the order of the classes, and so the accuracy.

    Args:
        logits: held out, (row, class); of a posterior's mixture `prediction.probs.log()`. -inf is a
            class that cannot be, at any temperature.
        labels: class indices, (row,).

    Raises:
        DataError: as `ece`; a label whose logit is -inf; the largest logit is always right, or
            logits tell less than nothing, so that no temperature is the best.

    References:
        Guo, Pleiss, Sun, Weinberger (2017), On calibration of modern neural networks.

    Example:
        >>> logits = torch.tensor([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0]])
        >>> rule = temperature(logits, [0, 0, 1])  # states .98, and is right two times of three
        >>> rule(logits)[0]
        tensor([0.6667, 0.3333])
    """
    logits = _logits(logits).double()
    if logits.ndim < 2 or logits.shape[-1] < 2:
        raise DataError(f"logits has shape {tuple(logits.shape)}. Pass (row, class).")
    labels = labels_of(labels, logits.shape[-1], logits.shape[:-1]).to(logits.device)
    logits = logits.flatten(0, -2)
    logits = logits - logits.max(-1, keepdim=True).values
    impossible = logits.isneginf()
    told = logits.gather(-1, labels.flatten()[:, None])
    if bool(told.isneginf().any()):
        raise DataError(
            f"{int(told.isneginf().sum())} held-out labels are of a class whose logit is -inf: it "
            "has probability 0 at every temperature. Clamp the probabilities above 0."
        )
    true, logits = told.mean(), logits.masked_fill(impossible, 0.0)

    def slope(log_inverse: float) -> float:
        """Derivative of the NLL by 1 / temperature, increasing in it."""
        scaled = (logits * np.exp(log_inverse)).masked_fill(impossible, -torch.inf)
        return float((scaled.softmax(-1) * logits).sum(-1).mean() - true)

    if true == 0:
        raise DataError(
            "Every held-out label has the largest logit, so surer is always better and no "
            "temperature is the best. Hold out more rows."
        )
    if slope(-np.inf) >= 0:
        raise DataError(
            "The logits say no more of the held-out labels than chance, so less sure is always "
            "better. Check that classes and labels are in the same order."
        )
    low, high = -30.0, 30.0  # of log 1 / temperature
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return Temperature(float(np.exp(-(low + high) / 2)))


def isotonic(probs: Any, labels: Any) -> Isotonic:
    """The increasing map of each class's probability nearest to held-out labels, least squares.

    Of two classes that of the second; of more each against the rest, and then scaled to sum 1. It
    bends more than a temperature and needs more rows (a thousand, say); it can make probabilities
    equal that were not.

    Args:
        probs: held out, (row, class).
        labels: class indices, (row,).

    Raises:
        DataError: as `ece`.

    References:
        Zadrozny, Elkan (2002), Transforming classifier scores into accurate multiclass probability
        estimates.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.2, 0.8]])
        >>> isotonic(probs, [0, 1, 1, 1])(probs)[0]  # what was stated as .9 came true half the time
        tensor([0.5000, 0.5000])
    """
    probs, labels = classified(probs, labels)
    classes = range(probs.shape[-1]) if probs.shape[-1] > 2 else [1]
    lines = [_increasing(probs[:, k].double().cpu(), (labels == k).double().cpu()) for k in classes]
    return Isotonic(tuple(x for x, _ in lines), tuple(y for _, y in lines))


def quantiles(y_draws: Any, y: Any, *, seed: int = 0) -> Quantiles:
    """The map of probabilities that makes the PIT of held-out rows uniform.

    Where 10 % of the observations fall below the draws' 3 % quantile, that becomes the 10 % one.
    New draws lie within the old ones: it cannot widen beyond the outermost.

    Args:
        y_draws: predictive draws of held-out rows, (chain, draw, row, *) or (draw, row, *).
        y: their observations, (row, *).
        seed: of the random part of the PIT among ties.

    Raises:
        DataError: as `pit`.

    Warns:
        ApproximationWarning: more observations lie beyond all their draws than chance explains.

    References:
        Kuleshov, Fenner, Ermon (2018), Accurate uncertainties for deep learning using calibrated
        regression, algorithm 1, whose isotonic regression leaves these shares as they are.

    Example:
        >>> draws = torch.randn(500, 200, generator=torch.Generator().manual_seed(0))
        >>> rule = quantiles(draws + 1, draws[0])  # one too high
        >>> rule(draws + 1).mean().abs() < 0.2
        tensor(True)
    """
    count = len(pooled(y_draws, y)[0])
    places, ties = pit(y_draws, y, seed=seed).double().cpu().unique(return_counts=True)
    rows = int(ties.sum())
    beyond = int(ties[(places == 0) | (places == 1)].sum())
    expected = 2 * rows / (count + 1)
    if beyond > expected + 4 * expected**0.5 + 1:
        warnings.warn(
            f"{beyond} of {rows} observations lie beyond all of their {count} draws, and the map "
            "cannot widen beyond those. Use bnn.conformal, or a model with more noise.",
            ApproximationWarning,
            stacklevel=2,
        )
    rank = ties.cumsum(0) - (ties - 1) / 2  # 1..rows, the middle one of those that tie
    zero, one = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    return Quantiles(
        torch.cat([zero, places, one]), torch.cat([zero, rank.double() / (rows + 1), one])
    )


def _increasing(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Knots of the increasing broken line nearest to points, by pooling adjacent violators."""
    knots, where = x.unique(return_inverse=True)
    count = torch.zeros_like(knots).index_add_(0, where, torch.ones_like(x))
    total = torch.zeros_like(knots).index_add_(0, where, y)
    blocks: list[tuple[float, float, int]] = []  # rows, sum of y, knots
    for rows, hits in zip(count.tolist(), total.tolist(), strict=True):
        size = 1
        while blocks and blocks[-1][1] * rows >= hits * blocks[-1][0]:
            before = blocks.pop()
            rows, hits, size = rows + before[0], hits + before[1], size + before[2]
        blocks.append((rows, hits, size))
    means = torch.tensor([hits / rows for rows, hits, _ in blocks], dtype=torch.float64)
    return knots, means.repeat_interleave(torch.tensor([size for *_, size in blocks]))


def _interpolate(at: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The broken line through points with x increasing, flat beyond its ends."""
    return torch.from_numpy(np.interp(at.cpu().numpy(), x.numpy(), y.numpy())).to(at.device)
