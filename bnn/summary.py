"""Summary: what is read off a prediction, row by row, when its draws are too many to hold.

Rows come in batches of any size and are predicted in blocks, which do not follow the batches: the
numbers are those of `predict` on all the rows at once, to the bit. Each block has all draws of its
rows, so that moments and quantiles are those of all draws; then the draws are let go.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from bnn.data import take
from bnn.errors import DataError
from bnn.prediction import ROWS, Prediction, Predictive

QUANTILES = (0.025, 0.05, 0.25, 0.5, 0.75, 0.95, 0.975)
Rows = tuple[Tensor, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Summary(Predictive):
    """The posterior predictive at many rows, without its draws.

    Attributes:
        mean: E[y | x], (row, *); for labels the label's expectation, see `probs`.
        aleatoric: see `Prediction`, (row, *).
        epistemic: see `Prediction`, (row, *).
        probs: for labels, class probabilities averaged over draws, (row, *, class); else None.
        levels: of the quantiles that were asked for, (level,), rising.
        quantiles: of y over all draws, (level, row, *).
        log_score: log posterior predictive density of each row, nats, (row,), where the batches
            held the observations; else None.

    Example:
        >>> import bnn
        >>> x = torch.linspace(-1, 1, 40)[:, None]
        >>> posterior = bnn.fit(bnn.models.linear(1), x, x[:, 0], method=bnn.MAP(steps=500))
        >>> summary = posterior.predict(torch.utils.data.DataLoader(x, batch_size=25))
        >>> torch.equal(summary.mean, posterior.predict(x).mean)
        True
        >>> lower, upper = summary.interval(0.9)
    """

    mean: Tensor
    aleatoric: Tensor
    epistemic: Tensor
    probs: Tensor | None
    levels: Tensor
    quantiles: Tensor
    log_score: Tensor | None = None

    def quantile(self, q: float | Tensor) -> Tensor:
        """Those of the quantiles that were asked for, (row, *), or (q, row, *) for several.

        Raises:
            ValueError: another one: it cannot be had without the draws.
        """
        q = torch.as_tensor(q, dtype=torch.float64)
        near = (q[..., None] - self.levels).abs() < 1e-6  # 1 - 0.9 is not 0.1
        if not bool(near.any(-1).all()):
            raise ValueError(
                f"The quantiles {q.tolist()} were asked for and {self.levels.tolist()} are kept: "
                "without draws there are no others. Name them: predict(loader, quantiles=(...))."
            )
        return self.quantiles[near.int().argmax(-1)]

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"A Summary has no {name!r}: it keeps numbers of each row, and lets the draws go. "
            "Predict some rows at a time for them: predict(x)."
        )

    def __repr__(self) -> str:
        kind = "labels" if self.probs is not None else "numbers"
        scored = "" if self.log_score is None else f", log score {float(self.log_score.mean()):.3f}"
        return f"Summary({len(self.mean)} rows of {kind}{scored})"


def checked_levels(quantiles: Iterable[float]) -> Tensor:
    """Levels of quantiles, rising, (level,).

    Raises:
        ValueError: one is not in 0..1.
    """
    levels = torch.tensor(sorted(set(quantiles)), dtype=torch.float64)
    if not bool(((levels >= 0) & (levels <= 1)).all()):
        raise ValueError(f"A quantile lies in 0..1, found {levels.tolist()}.")
    return levels


def summarize(
    batches: Iterable[Rows],
    together: Callable[[Rows], int | None],
    predict: Callable[[Rows, int], Prediction],
    score: Callable[[Rows, int], Tensor] | None,
    levels: Tensor,
) -> Summary:
    """Predicts rows as they come.

    Args:
        batches: the rows.
        together: how many rows a block has, told by some; None where they must come all at once.
        predict: of a block, and of the place of its first row.
        score: of the same, (row,); None where there are no observations.
        levels: of the quantiles.

    Raises:
        DataError: there are no rows.
        ModelError: the rows must come all at once, and there are too many.
    """
    parts: dict[str, list[Tensor]] = {}
    origin = 0
    for block in _blocks(batches, together):
        made = predict(block, origin)
        found = {"mean": made.mean, "aleatoric": made.aleatoric, "epistemic": made.epistemic}
        found["quantiles"] = made.quantile(levels).movedim(0, 1)
        if made.probs is not None:
            found["probs"] = made.probs
        if score is not None:
            found["log_score"] = score(block, origin)
        for name, part in found.items():
            parts.setdefault(name, []).append(part)
        origin += len(made.mean)
    if not parts:
        raise DataError("The batches hold no rows. A generator is empty once it was gone through.")
    joined = {name: torch.cat(parts.pop(name)) for name in list(parts)}
    return Summary(
        mean=joined["mean"],
        aleatoric=joined["aleatoric"],
        epistemic=joined["epistemic"],
        probs=joined.get("probs"),
        levels=levels,
        quantiles=joined["quantiles"].movedim(0, 1),
        log_score=joined.get("log_score"),
    )


def _blocks(batches: Iterable[Rows], together: Callable[[Rows], int | None]) -> Iterator[Rows]:
    """The rows in the blocks in which `predict` would run them all at once."""
    ahead = _cut(batches, ROWS + 1)
    first = next(ahead, None)
    if first is None:
        return
    if length(first) <= ROWS:
        yield first
        return
    yield from _cut(chain([first], ahead), together(first) or ROWS)


def _cut(batches: Iterable[Rows], size: int) -> Iterator[Rows]:
    """The same rows, so many at a time; the last are what is left."""
    held: list[Rows] = []
    for batch in batches:
        held.append(batch)
        while sum(map(length, held)) >= size:
            whole = _joined(held)
            yield take(whole, slice(0, size))
            held = [take(whole, slice(size, None))]
    if sum(map(length, held)):
        yield _joined(held)


def length(batch: Rows) -> int:
    """Rows of a batch."""
    return next((len(arg) for arg in batch if arg.ndim), 0)


def _joined(held: list[Rows]) -> Rows:
    if len(held) == 1:
        return held[0]
    for each in zip(*held, strict=True):
        if not each[0].ndim and any(bool(arg != each[0]) for arg in each):
            raise DataError(
                "An argument without rows differs from batch to batch. Predict such rows apart."
            )
    return tuple(torch.cat(arg) if arg[0].ndim else arg[0] for arg in zip(*held, strict=True))
