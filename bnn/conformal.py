"""Conformal prediction: intervals and sets that hold a new observation as often as they say.

Each function takes predictions and observations of n held-out rows and gives a rule to be called on
the predictions of new rows. If the held-out and the new rows are exchangeable, and the posterior
has seen neither, then the rule holds a new observation with probability at least `level`, and at
most level + 1 / (n + 1) where no scores tie; whatever the model. That is on average over rows and
held-out sets: not for each kind of row. Of rows with several observations, (row, *), it is also on
average over these: they may depend on one another, and n counts the rows (Lee, Barber, Willett
2023, Distribution-free inference with hierarchical data, arXiv:2306.06342).

    split   mean +- a constant, or a multiple of the predictive standard deviation
    cqr     an interval of the posterior, moved out or in by a constant
    lac     the labels that are probable enough: the smallest sets on average
    aps     the most probable labels up to a sum: larger sets, of more even coverage over rows
    raps    aps that pays for each label beyond the first few: smaller sets where labels are many

    rule = bnn.conformal.cqr(posterior.predict(x_held_out), y_held_out)
    lower, upper = rule(posterior.predict(x_new))

All take a prediction of any posterior, or arrays: cqr(lower, upper, y) and rule(lower, upper).
"""

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnn.arrays import Stated, classified, finite, probabilities, probability, same_rows, tensor
from bnn.errors import ApproximationWarning, DataError


@dataclass(frozen=True)
class Split:
    """Intervals around a mean.

    Attributes:
        radius: half their width, in units of y, or of the standard deviation where `scaled`.
        scaled: whether they go with the standard deviation.
        level: probability that they hold a new observation.

    Example:
        >>> Split(radius=0.5, scaled=False, level=0.9)(torch.tensor([1.0, 2.0]))
        (tensor([0.5000, 1.5000]), tensor([1.5000, 2.5000]))
    """

    radius: float
    scaled: bool
    level: float

    def __call__(self, mean: Any, std: Any = None) -> tuple[Tensor, Tensor]:
        """Lower and upper ends, (row, *) each.

        Args:
            mean: a prediction, or means, (row, *).
            std: where scaled, deviations, (row, *); default those of the prediction.
        """
        if isinstance(mean, Stated):
            mean, std = _means(mean, True if std is None and self.scaled else std)
        mean = finite(mean, "mean")
        if self.scaled != (std is not None):
            told = "with" if self.scaled else "without"
            raise DataError(f"This rule was fitted {told} std. Call it {told} std.")
        radius = self.radius * (torch.ones_like(mean) if std is None else _std(std, mean))
        return mean - radius, mean + radius


@dataclass(frozen=True)
class CQR:
    """Intervals moved at both ends.

    Attributes:
        shift: by how much outwards, units of y; below 0 inwards.
        level: probability that they hold a new observation.

    Example:
        >>> CQR(shift=0.5, level=0.9)(torch.zeros(1), torch.ones(1))
        (tensor([-0.5000]), tensor([1.5000]))
    """

    shift: float
    level: float

    def __call__(self, lower: Any, upper: Any = None) -> tuple[Tensor, Tensor]:
        """Lower and upper ends, (row, *) each; the interval's middle where they would cross.

        A single point there, where the rule would allow nothing, keeps what is promised.

        Args:
            lower: a prediction, whose interval of this level is moved; or lower ends, (row, *).
            upper: upper ends, (row, *), of lower ends.
        """
        lower, upper = _interval(*_ends(lower, upper, self.level))
        middle = (lower + upper) / 2
        return torch.minimum(lower - self.shift, middle), torch.maximum(upper + self.shift, middle)


@dataclass(frozen=True)
class Sets:
    """Sets of labels: those whose score is at most a threshold.

    Attributes:
        threshold: largest score of a label inside.
        level: probability that a set holds a new label.
        kind: "lac" or "aps"; raps is aps with a penalty.
        penalty: added to the score for each label after the first `free` ones.
        free: labels without penalty.
        randomised: whether the last label of a set enters by chance.

    Example:
        >>> Sets(threshold=0.75, level=0.9, kind="lac")([[0.7, 0.3, 0.0]])  # those of at least .25
        tensor([[ True,  True, False]])
    """

    threshold: float
    level: float
    kind: str
    penalty: float = 0.0
    free: int = 0
    randomised: bool = False

    def __call__(self, probs: Any, *, seed: int = 0) -> Tensor:
        """Whether each label is in the set, (row, *, class), bool. A set can be empty.

        Args:
            probs: a prediction, or class probabilities, (row, *, class).
            seed: of the chance by which the last label enters.
        """
        probs = probabilities(_probs(probs))
        return self._scores(probs, (seed, 1)) <= self.threshold

    def _scores(self, probs: Tensor, seed: tuple[int, int]) -> Tensor:
        """How little each label is expected, (row, *, class)."""
        probs = probs.double()
        if self.kind == "lac":
            return 1 - probs
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        chance = torch.zeros(*probs.shape[:-1], 1, dtype=torch.float64)
        if self.randomised:
            chance = torch.from_numpy(np.random.default_rng(seed).random(chance.shape))
        rank = torch.arange(1, probs.shape[-1] + 1, device=probs.device)
        score = ordered.cumsum(-1) - chance.to(probs.device) * ordered
        score = score + self.penalty * (rank - self.free).clamp(min=0)
        return torch.empty_like(score).scatter_(-1, order, score)


def split(mean: Any, y: Any, *, std: Any = None, level: float = 0.9) -> Split:
    """Mean +- a quantile of held-out errors.

    Args:
        mean: a prediction of held-out rows, or means, (row, *).
        y: their observations, (row, *).
        std: True for the prediction's standard deviations, or such of means, (row, *): the
            intervals are then wide where the posterior is unsure. Default: all of one width.
        level: probability that an interval holds a new observation.

    Raises:
        DataError: other rows, NaN, a std that is not above 0, a level not in (0, 1).

    Warns:
        ApproximationWarning: too few rows for the level; the intervals are infinite.

    References:
        Lei et al. (2018), Distribution-free predictive inference for regression.

    Example:
        >>> rule = split(torch.zeros(9), torch.arange(1.0, 10.0), level=0.8)  # 8th of 9 errors
        >>> rule(torch.zeros(1))
        (tensor([-8.]), tensor([8.]))
    """
    mean, std = _means(mean, std)
    mean, y = finite(mean, "mean"), finite(y, "y")
    same_rows(mean, y, ("mean", "y"))
    away = (y.to(mean.device) - mean).abs()
    if std is not None:
        away = away / _std(std, mean)
    return Split(_quantile(away, level), std is not None, level)


def cqr(lower: Any, upper: Any = None, y: Any = None, *, level: float = 0.9) -> CQR:
    """Conformalised quantile regression: any interval, moved until it holds enough held-out rows.

    Call it as cqr(prediction, y), which takes the prediction's interval of that level, or as
    cqr(lower, upper, y).

    Args:
        lower: a prediction of held-out rows, or lower ends of intervals of theirs, (row, *).
        upper: upper ends, (row, *); of a prediction its observations, which can be called y too.
        y: observations, (row, *).
        level: probability that an interval holds a new observation; as a rule that of the intervals
            passed in.

    Raises:
        DataError: other rows, NaN, lower above upper, a level not in (0, 1).

    Warns:
        ApproximationWarning: too few rows for the level; the intervals are infinite.

    References:
        Romano, Patterson, Candès (2019), Conformalized quantile regression.

    Example:
        >>> zeros = torch.zeros(9)
        >>> rule = cqr(zeros - 1, zeros + 1, torch.arange(1.0, 10.0), level=0.8)
        >>> rule(-torch.ones(1), torch.ones(1))  # the ends move out by 7
        (tensor([-8.]), tensor([8.]))
    """
    if isinstance(lower, Stated):
        if upper is not None and y is not None:
            raise DataError("Of a prediction cqr takes its observations: cqr(prediction, y).")
        y, upper = upper if y is None else y, None
    lower, upper = _interval(*_ends(lower, upper, level))
    y = finite(y, "y").to(lower.device)
    same_rows(lower, y, ("lower", "y"))
    return CQR(_quantile(torch.maximum(lower - y, y - upper), level), level)


def lac(probs: Any, labels: Any, *, level: float = 0.9) -> Sets:
    """Least ambiguous sets: the labels of at least a certain probability.

    Args:
        probs: a prediction of held-out rows, or class probabilities, (row, class).
        labels: class indices, (row,).
        level: probability that a set holds a new label.

    Raises:
        DataError: what is no probability, no class, or has other rows; a level not in (0, 1).

    Warns:
        ApproximationWarning: too few rows for the level; the sets hold every label.

    References:
        Sadinle, Lei, Wasserman (2019), Least ambiguous set-valued classifiers with bounded error
        levels.

    Example:
        >>> p = torch.linspace(0.5, 0.9, 9)
        >>> rule = lac(torch.stack([p, 1 - p], 1), [0] * 9, level=0.8)
        >>> rule([[0.6, 0.4], [0.5, 0.5]])  # labels of at least .55
        tensor([[ True, False],
                [False, False]])
    """
    return _sets(probs, labels, Sets(math.inf, level, "lac"), seed=0)


def aps(
    probs: Any, labels: Any, *, level: float = 0.9, randomised: bool = True, seed: int = 0
) -> Sets:
    """Adaptive prediction sets: the most probable labels, until their probabilities sum to enough.

    Args:
        probs: a prediction of held-out rows, or class probabilities, (row, class).
        labels: class indices, (row,).
        level: probability that a set holds a new label.
        randomised: the last label enters by chance; else always, and sets are larger.
        seed: of that chance on the held-out rows.

    Raises:
        DataError: as `lac`.

    Warns:
        ApproximationWarning: as `lac`.

    References:
        Romano, Sesia, Candès (2020), Classification with valid and adaptive coverage.

    Example:
        >>> p = torch.linspace(0.5, 0.9, 9)
        >>> rule = aps(torch.stack([p, 1 - p], 1), [0, 1] * 4 + [0], level=0.5, randomised=False)
        >>> rule([[0.6, 0.4]]).shape
        torch.Size([1, 2])
    """
    return _sets(probs, labels, Sets(math.inf, level, "aps", randomised=randomised), seed)


def raps(
    probs: Any,
    labels: Any,
    *,
    level: float = 0.9,
    penalty: float = 0.01,
    free: int = 5,
    randomised: bool = True,
    seed: int = 0,
) -> Sets:
    """Regularised adaptive prediction sets: `aps` with a price on long sets.

    Args:
        probs: a prediction of held-out rows, or class probabilities, (row, class).
        labels: class indices, (row,).
        level: probability that a set holds a new label.
        penalty: price of each label after the `free` most probable ones, at least 0.
        free: labels without a price, at least 0. Choose both on other rows than these.
        randomised: the last label enters by chance; else always, and sets are larger.
        seed: of that chance on the held-out rows.

    Raises:
        DataError: as `lac`; a penalty or a number of free labels below 0.

    Warns:
        ApproximationWarning: as `lac`.

    References:
        Angelopoulos, Bates, Malik, Jordan (2021), Uncertainty sets for image classifiers using
        conformal prediction.

    Example:
        >>> p = torch.linspace(0.5, 0.9, 9)
        >>> probs = torch.stack([p, 1 - p], 1)
        >>> rule = raps(probs, [0] * 9, level=0.8, penalty=0.5, free=1, randomised=False)
        >>> rule([[0.6, 0.4]])  # a second label costs .5
        tensor([[ True, False]])
    """
    if not (0 <= penalty < math.inf and free >= 0):
        raise DataError(f"penalty is {penalty!r} and free is {free!r}. Pass numbers of at least 0.")
    return _sets(probs, labels, Sets(math.inf, level, "aps", penalty, free, randomised), seed)


def _sets(probs: Any, labels: Any, rule: Sets, seed: int) -> Sets:
    probs = _probs(probs)
    rows = len(tensor(probs, "probs"))
    probs, labels = classified(probs, labels)
    scores = rule._scores(probs, (seed, 0)).gather(-1, labels[:, None]).reshape(rows, -1)
    return replace(rule, threshold=_quantile(scores, rule.level, stacklevel=4))


def _probs(given: Any) -> Any:
    """Class probabilities, of a prediction too."""
    if not isinstance(given, Stated):
        return given
    if given.probs is None:
        raise DataError("The prediction is of numbers. Take conformal.split or cqr.")
    return given.probs


def _means(given: Any, std: Any) -> tuple[Any, Any]:
    """Means and deviations, of a prediction too, whose own deviations are std=True."""
    std = None if std is False else std
    if isinstance(given, Stated):
        _numbers(given)
        return given.mean, given.std if std is True else std  # type: ignore[attr-defined]
    if std is True:
        raise DataError("Of means alone std is not known. Pass a prediction, or their std.")
    return given, std


def _ends(lower: Any, upper: Any, level: float) -> tuple[Any, Any]:
    """Ends of intervals, of a prediction too."""
    if not isinstance(lower, Stated):
        return lower, upper
    if upper is not None:
        raise DataError("A prediction has both ends of its interval. Pass it without upper.")
    _numbers(lower)
    return lower.interval(float(probability(level)))


def _numbers(given: Stated) -> None:
    if given.probs is not None:
        raise DataError("The prediction is of labels. Take conformal.lac, aps or raps.")


def _quantile(scores: Tensor, level: float, stacklevel: int = 3) -> float:
    """The ceil((n + 1) level)-th smallest of n scores: a new one is below it so often.

    Of n rows with k scores each, (row, *), the ceil(k (n + 1) level)-th of all.
    """
    level, count = float(probability(level)), len(scores)
    each = scores.numel() // count
    place = math.ceil(round(each * (count + 1) * level, 9))  # 100 * 0.55 is 55, not a bit more
    if place > scores.numel():
        warnings.warn(
            f"{count} held-out rows cannot tell a level of {level:g}: the rule allows everything. "
            f"Hold out at least {math.ceil(round(level / (1 - level), 9))} rows, or lower level.",
            ApproximationWarning,
            stacklevel=stacklevel,
        )
        return math.inf
    return float(scores.flatten().double().sort().values[place - 1])


def _std(std: Any, mean: Tensor) -> Tensor:
    std = finite(std, "std").to(mean.device)
    same_rows(mean, std, ("mean", "std"))
    if not bool((std > 0).all()):
        raise DataError(f"std has values down to {float(std.min()):g}. Each must be above 0.")
    return std


def _interval(lower: Any, upper: Any) -> tuple[Tensor, Tensor]:
    lower, upper = finite(lower, "lower"), finite(upper, "upper")
    same_rows(lower, upper, ("lower", "upper"))
    crossed = int((lower > upper).sum())
    if crossed:
        raise DataError(f"lower is above upper at {crossed} of {lower.numel()} rows. Swap them?")
    return lower, upper.to(lower.device)
