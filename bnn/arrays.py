"""Arrays: what the rooms that never see a posterior take, checked by the argument's name."""

from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from bnn.errors import DataError


@runtime_checkable
class Stated(Protocol):
    """What a `Prediction` states, and a `Summary`: so much of it that no array passes for one."""

    probs: Tensor | None

    def interval(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """Central interval of y."""
        ...

    def quantile(self, q: float | Tensor) -> Tensor:
        """Quantiles of y."""
        ...


def tensor(value: Any, name: str) -> Tensor:
    """A tensor of real numbers, its dtype kept where it is a floating one.

    Args:
        value: tensor, NumPy array, pandas object or list.
        name: of the argument, for the errors.

    Raises:
        DataError: not numbers, none at all, or NaN.
    """
    if not isinstance(value, Tensor):
        value = np.asarray(value)
        if value.dtype.kind not in "biuf":
            raise DataError(f"{name} holds {value.dtype}, not numbers. Pass a tensor or an array.")
        value = torch.tensor(value)
    value = value.detach()
    if value.is_complex():
        raise DataError(f"{name} is complex. Pass real numbers.")
    if not value.numel():
        raise DataError(f"{name} has shape {tuple(value.shape)}: there are no rows, or no draws.")
    if not value.is_floating_point():
        return value.double()
    count = int(value.isnan().sum())
    if count:
        raise DataError(f"{name} has {count} NaN among {value.numel()} values. Leave them out.")
    return value


def finite(value: Any, name: str) -> Tensor:
    """As `tensor`, and refuses infinite values."""
    value = tensor(value, name)
    if not bool(value.isfinite().all()):
        raise DataError(f"{name} has infinite values. Leave them out, or clamp them.")
    return value


def same_rows(first: Tensor, second: Tensor, names: tuple[str, str]) -> None:
    """Refuses two arrays of other rows: nothing may broadcast."""
    if first.shape != second.shape:
        raise DataError(
            f"{names[0]} has shape (row, *) = {tuple(first.shape)} and {names[1]} has "
            f"{tuple(second.shape)}: the rows must be the same."
        )


def probabilities(probs: Any, name: str = "probs") -> Tensor:
    """Class probabilities, (row, *, class); what rounding has put outside 0..1 is put back.

    Raises:
        DataError: no class axis, values outside [0, 1], or a sum that is not 1.
    """
    probs = tensor(probs, name)
    if probs.ndim < 2 or probs.shape[-1] < 2:
        raise DataError(
            f"{name} has shape {tuple(probs.shape)}, not (row, class) with at least two classes. "
            "Of the probability p of one label make torch.stack([1 - p, p], -1)."
        )
    slack = max(1e-4, 8 * torch.finfo(probs.dtype).eps)
    low, high, sums = float(probs.min()), float(probs.max()), probs.double().sum(-1)
    if low < -slack or high > 1 + slack:
        raise DataError(
            f"{name} has values in {low:g}..{high:g}, not in 0..1. Of logits make "
            "logits.softmax(-1)."
        )
    off = (sums - 1).abs()
    if float(off.max()) > slack:
        raise DataError(
            f"{name} does not sum to 1 over its last axis, the class: the sum is "
            f"{float(sums.flatten()[off.argmax()]):g} at one of {off.numel()} rows. "
            f"Divide by {name}.sum(-1, keepdims=True) if they are meant as probabilities."
        )
    return probs.clamp(0, 1)


def labels_of(labels: Any, classes: int, rows: torch.Size) -> Tensor:
    """Labels as whole numbers in 0..classes-1, (row, *).

    Raises:
        DataError: another shape than `rows`, or values that are no class.
    """
    labels = tensor(labels, "labels")
    if labels.shape != rows:
        raise DataError(
            f"labels has shape {tuple(labels.shape)} and the rows of the probabilities are "
            f"{tuple(rows)}. Pass one class index for each row, (row,)."
        )
    wrong = (labels != labels.round()) | (labels < 0) | (labels >= classes)
    if bool(wrong.any()):
        raise DataError(
            f"labels has {int(wrong.sum())} values that are no class, the first is "
            f"{labels[wrong][0].item():g}: classes are whole numbers in 0..{classes - 1}."
        )
    return labels.long()


def classified(probs: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """Probabilities (row, class) and labels (row,), every axis before the class being rows."""
    probs = probabilities(probs)
    labels = labels_of(labels, probs.shape[-1], probs.shape[:-1])
    return probs.flatten(0, -2), labels.flatten().to(probs.device)


def pooled(y_draws: Any, y: Any) -> tuple[Tensor, Tensor]:
    """Predictive draws (draw, row, *) with chains pooled, and observations (row, *).

    Raises:
        DataError: y and y_draws disagree on rows.
    """
    y_draws, y = finite(y_draws, "y_draws"), finite(y, "y")
    lead = y_draws.ndim - y.ndim
    if lead not in (1, 2) or y_draws.shape[lead:] != y.shape or not y.ndim:
        raise DataError(
            f"y_draws has shape {tuple(y_draws.shape)} and y has {tuple(y.shape)}. Pass (chain, "
            "draw, row, *) or (draw, row, *) with (row, *): the rows must be the same."
        )
    return y_draws.flatten(0, lead - 1), y.to(y_draws.device)


def by_draw(values: Any, name: str) -> Tensor:
    """One number for each draw and row, (chain, draw, row) or (draw, row), as (draw, row)."""
    values = tensor(values, name)
    if values.ndim not in (2, 3):
        raise DataError(
            f"{name} has shape {tuple(values.shape)}. Pass (chain, draw, row) or (draw, row)."
        )
    return values.flatten(0, -2)


def probability(level: Any, name: str = "level") -> Tensor:
    """One or several probabilities in (0, 1), double.

    Raises:
        DataError: one of them is not in (0, 1).
    """
    levels = torch.as_tensor(level, dtype=torch.float64)
    if not bool(((levels > 0) & (levels < 1)).all()):
        raise DataError(f"{name} is a probability in (0, 1), found {levels.tolist()}.")
    return levels
