"""Prediction: draws of f and y at new rows, and what people read off them.

Every method predicts by the same loop: run the program at each draw. The forward pass is lifted
over draws with vmap where the model allows it and looped where not; the observations are sampled
outside, from distributions whose parameters carry a draw axis.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributions as td
from torch import Tensor
from torch.func import vmap

from bnn import markup
from bnn.chunks import NUMBERS, Work, in_chunks
from bnn.data import take, take_filled
from bnn.errors import ModelError
from bnn.handlers import At, AtMeans, Capture, branch, quiet_pyro, seeded, unvalidated
from bnn.observations import innermost
from bnn.sites import Sites, require_every_row

_OUTCOMES = 400  # draws of y that quantiles are read off, at least: an end of 90 % to .1 sd
_AGAIN = " y"  # no site has this name
ROWS = 512  # in a block at most: what one forward pass and one stretch of random numbers cover
_TRIED = 16  # rows by which it is found out how many a block takes


class Predictive(ABC):
    """What is read off the posterior predictive at some rows, its draws at hand or not."""

    mean: Tensor
    aleatoric: Tensor
    epistemic: Tensor
    probs: Tensor | None

    @property
    def total(self) -> Tensor:
        """Aleatoric plus epistemic: the predictive variance, or the predictive entropy."""
        return self.aleatoric + self.epistemic

    @property
    def std(self) -> Tensor:
        """Standard deviation of y, units of y, (row, *).

        Raises:
            ModelError: y is a label.
        """
        if self.probs is not None:
            raise ModelError("A label has no standard deviation. Read `entropy` or `probs`.")
        return self.total.sqrt()

    @property
    def entropy(self) -> Tensor:
        """Entropy of the predictive label, nats, (row, *).

        Raises:
            ModelError: y is not a label.
        """
        if self.probs is None:
            raise ModelError("Entropy is read off labels; y is a number here. Read `std`.")
        return self.total

    @property
    def mutual_information(self) -> Tensor:
        """What the label would tell about the weights, nats, (row, *): the epistemic part.

        Raises:
            ModelError: y is not a label.
        """
        self.entropy  # noqa: B018  the same refusal
        return self.epistemic

    @abstractmethod
    def quantile(self, q: float | Tensor) -> Tensor:
        """Quantiles of y over all draws, (row, *), or (q, row, *) for several."""

    def interval(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """Central interval of y that holds `level` of the predictive draws: (lower, upper)."""
        if not 0 < level < 1:
            raise ValueError(f"level is {level!r}. Pass a probability in (0, 1), such as 0.9.")
        ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
        lower, upper = self.quantile(ends)
        return lower, upper


@dataclass(frozen=True, eq=False)
class Prediction(Predictive):
    """The posterior predictive at some rows.

    Attributes:
        f: the announced output before noise at each draw, (chain, draw, row, *); where the model
            announces none, E[y | x, draw].
        y: observations with their noise, (chain, draw, row, *).
        mean: E[y | x], (row, *); for labels the label's expectation, see `probs`.
        aleatoric: for numbers the mean over draws of Var[y | x, draw], (row, *), in squared units
            of y; for labels the mean over draws of the entropy, in nats.
        epistemic: for numbers the variance over draws of E[y | x, draw]; for labels the mutual
            information of label and draw, in nats.
        probs: for labels, class probabilities averaged over draws, (row, *, class); else None.
        local: draws of the sites inside the data plate, of the seams that were asked for, and of
            what a method added to a seam for all rows alike ("hidden.0.mask", a view without
            memory of its own), each (chain, draw, row, *).
        inputs: the rows predicted.
        outcomes: draws of y that quantiles are read off: y itself or, where there are fewer than
            400 (an ensemble's), y and more of its kind at each draw, (chain, draw*times, row, *).

    Example:
        >>> import bnn
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> prediction = bnn.prior_predictive(bnn.models.linear(1), x, draws=50)
        >>> prediction.mean.shape, prediction.y.shape
        (torch.Size([20]), torch.Size([1, 50, 20]))
        >>> lower, upper = prediction.interval(0.9)
        >>> torch.equal(prediction.total, prediction.aleatoric + prediction.epistemic)
        True
    """

    f: Tensor
    y: Tensor
    mean: Tensor
    aleatoric: Tensor
    epistemic: Tensor
    probs: Tensor | None = None
    local: dict[str, Tensor] = field(default_factory=dict)
    inputs: tuple[Tensor, ...] = ()
    outcomes: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.outcomes is None or not self._go_with_y():
            object.__setattr__(self, "outcomes", self.y)

    def _go_with_y(self) -> bool:
        """False where `replace` has put another y in the place of that which they begin with."""
        (chains, draws), shape = self.y.shape[:2], self.outcomes.shape
        if not draws or shape[0] != chains or shape[1] % draws or shape[2:] != self.y.shape[2:]:
            return False
        return self.y.is_meta or torch.equal(self.outcomes[:, :: shape[1] // draws], self.y)

    @property
    def draw_probs(self) -> Tensor:
        """Class probabilities at each draw, (chain, draw, row, *, class); their mean is `probs`.

        They are read off f, as probabilities or as logits, whichever have that mean.

        Raises:
            ModelError: y is a number; or f is neither.
        """
        self.entropy  # noqa: B018  the same refusal
        assert self.probs is not None
        # Probabilities first: the softmax of some that are alike on both sides has their mean too.
        ways = [lambda f: f, lambda f: f.softmax(-1)]
        if self.f.ndim == self.probs.ndim + 1:  # one number a label of two
            ways = [lambda f: torch.stack([1 - f, f], -1)]
            ways.append(lambda f: torch.stack([(-f).sigmoid(), f.sigmoid()], -1))
        for way in ways:
            each = way(self.f)
            if each.shape[2:] == self.probs.shape and bool((each > -1e-4).all()):
                if torch.allclose(each.double().mean((0, 1)), self.probs.double(), atol=1e-4):
                    return each
        raise ModelError(
            "The probabilities at each draw cannot be read off f, which are neither their logits "
            "nor they themselves. Let the model announce logits as f, or no f."
        )

    def quantile(self, q: float | Tensor) -> Tensor:
        """Quantiles of y over all draws, (row, *), or (q, row, *) for several."""
        pooled = self.outcomes.flatten(0, 1)  # (chain*draw*times, row, *)
        q = torch.as_tensor(q, dtype=torch.float64)
        if bool(((q < 0) | (q > 1)).any()):
            raise ValueError(f"A quantile lies in 0..1, found {q.tolist()}.")
        place = q * (len(pooled) - 1)
        low = place.floor().long()
        high = (low + 1).clamp(max=len(pooled) - 1)
        share = (place - low).reshape(q.shape + (1,) * (pooled.ndim - 1)).to(self.mean)
        step = max(1, NUMBERS * pooled.shape[1] // max(pooled.numel(), 1))  # a sort takes 3 copies
        parts = []
        for rows in pooled.split(step, 1):
            ordered = rows.sort(0).values
            lower, upper = (ordered[at].to(self.mean.dtype) for at in (low, high))
            parts.append(torch.lerp(lower, upper, share))
        return torch.cat(parts, q.ndim)

    def __repr__(self) -> str:
        chain, draw, rows = self.y.shape[:3]
        kind = "numbers" if self.probs is None else f"labels, {self.probs.shape[-1]} classes"
        told = "".join(
            f"; {name} {least:.3g} to {largest:.3g}"
            for name, (least, _, largest) in list(self._over_rows().items())[:2]
        )
        return f"Prediction({rows:,} rows of {kind}, {markup.runs(chain, draw)}{told})"

    def _repr_html_(self) -> str:
        chain, draw, rows = self.y.shape[:3]
        kind = "numbers" if self.probs is None else f"labels, {self.probs.shape[-1]} classes"
        page = markup.paragraph(
            f"Prediction: {rows:,} rows of {kind}, {markup.runs(chain, draw, '×')}",
            *(f"local: {name} {tuple(value.shape[3:])}" for name, value in self.local.items()),
        )
        over = [(k, *(f"{v:.3g}" for v in each)) for k, each in self._over_rows().items()]
        return page + markup.table(("over rows", "least", "median", "largest"), over)

    def _over_rows(self) -> dict[str, tuple[float, float, float]]:
        """Least, median and largest over rows of what one asks of a prediction first."""
        if not self.y.shape[2]:
            return {}
        if self.probs is None:
            parts = self.aleatoric.sqrt(), self.epistemic.sqrt()
            told = {"mean": self.mean, "std": self.std}
            told |= dict(zip(("aleatoric std", "epistemic std"), parts, strict=True))
        else:
            told = {"largest probability": self.probs.max(-1).values, "entropy": self.entropy}
            told |= {"mutual information": self.mutual_information}
        return {k: (float(v.min()), float(v.median()), float(v.max())) for k, v in told.items()}


def predict(
    program: Callable[..., Any],
    draws: Mapping[str, Tensor],
    inputs: tuple[Tensor, ...],
    sites: Sites,
    seed: np.random.SeedSequence,
    shape: tuple[int, int],
    *,
    seams: Collection[str] = (),
    means: bool = False,
    origin: int = 0,
    kept: Collection[str] | None = None,
) -> Prediction:
    """Runs a program at each draw.

    Args:
        program: callable of the inputs and None.
        draws: values of the global sites, (chain*draw, *site) each.
        inputs: (row, *) each, or () for an argument that belongs to every row.
        sites: the contract's findings. With a data plate, rows are run in blocks.
        seed: of the noise.
        shape: (chain, draw).
        seams: deterministic sites to keep beside the local ones.
        means: sites inside the data plate take their mean in place of a draw.
        origin: place of the first row among more rows: its noise is that of this place.
        kept: names whose draws are kept, "y" among them; None keeps all, "f" and local sites too.

    Returns:
        Draws and moments. Working memory does not grow with rows or draws, where a plate declares
        the rows independent.

    Raises:
        ModelError: the program does not run with its observations set to None.
    """
    require_every_row(sites)
    count = math.prod(shape)
    rows = next((len(x) for x in inputs if x.ndim), None)
    pooled = _Pooled(count, rows, kept)
    with quiet_pyro(), torch.no_grad():
        block = sites.subsample_size  # a plate that draws so many takes all of so many
        if block is None:
            apart = (rows or 0) > ROWS
            together = rows_together(program, draws, (*inputs, None), sites) if apart else None
            block = together or rows
        forward = _Forward(program, sites, seams, means)
        for first in range(0, max(rows or 1, 1), block or 1):
            # No rows: made-up rows give the shapes, and are left out when the draws are kept.
            batch = inputs
            if rows == 0:
                batch = _made_up(inputs, block or 1)
            elif sites.subsample_size is not None:
                batch = take_filled(inputs, first, sites.subsample_size)
            elif rows is not None:
                batch = take(inputs, slice(first, first + (block or 1)))

            def run(part: slice, first: int = first, batch: tuple = batch) -> tuple[Any, ...]:
                with seeded(branch(seed, origin + first, part.start)):
                    fn, values = forward({k: v[part] for k, v in draws.items()}, batch, part)
                    return fn, fn.sample(), pooled.again(fn), values

            for part, found in in_chunks(run, count):
                pooled.add(part, first, *found)
    return pooled.prediction(shape, inputs)


def rows_together(
    program: Callable[..., Any], draws: Mapping[str, Tensor], args: tuple, sites: Sites
) -> int | None:
    """Rows that a program is run on at a time; None where it has to be given all at once.

    Args:
        program: callable of the inputs, and of the observations or None.
        draws: (draw, *site) each.
        args: its arguments, the observations or None last.
        sites: the contract's findings.
    """
    if sites.subsample_size is not None or sites.plate is None:
        return sites.subsample_size
    few = take(args, slice(0, _TRIED))
    with Work() as work:
        runs = runs_on(program, draws, few)
    rows = max(len(arg) for arg in few if arg is not None and arg.ndim)
    return max(1, min(ROWS, NUMBERS * rows // max(work.numbers, 1))) if runs else None


def runs_on(program: Callable[..., Any], draws: Mapping[str, Tensor], args: tuple) -> bool:
    """True if a program runs on these rows; False where it states how many there are."""
    try:
        with seeded(np.random.SeedSequence(0)), At({k: v[0] for k, v in draws.items()}):
            program(*args)
    except Exception:  # what is really wrong shows when all rows are run
        return False
    return True


def _made_up(inputs: tuple[Tensor, ...], rows: int) -> tuple[Tensor, ...]:
    return tuple(x.new_zeros((rows, *x.shape[1:])) if x.ndim else x for x in inputs)


class _Forward:
    """The program at some draws: lifted over them by vmap, or looped once that has failed."""

    def __init__(
        self,
        program: Callable[..., Any],
        sites: Sites,
        seams: Collection[str] = (),
        means: bool = False,
    ):
        self.program, self.observed, self.plate = program, sites.observed, sites.plate
        self.seams, self.means = {"f", *seams}, means
        self.lifted = True

    def __call__(
        self, draws: Mapping[str, Tensor], batch: tuple[Tensor, ...], part: slice
    ) -> tuple[Any, dict[str, Tensor]]:
        """The observed site's distribution and the kept sites, a draw axis in front of each."""
        count = part.stop - part.start
        if self.lifted:
            try:
                return self._lifted(draws, batch, count)
            except ModelError:
                raise
            except Exception:  # not every program can be lifted; the loop tells what else is wrong
                self.lifted = False
        runs = [self._run({k: v[i] for k, v in draws.items()}, batch) for i in range(count)]
        values = {k: torch.stack([kept[k] for _, kept in runs]) for k in runs[0][1]}
        return _Each([fn for fn, _ in runs]), values

    def _lifted(self, draws: Mapping[str, Tensor], batch: tuple[Tensor, ...], count: int) -> tuple:
        rebuild: list[Callable[[list[Tensor], int], Any]] = []

        def run(
            draw: Mapping[str, Tensor], number: Tensor
        ) -> tuple[list[Tensor], dict[str, Tensor]]:
            capture = self._capture(draw, batch, sampling=False)
            parts, build = take_apart(capture.fn)
            rebuild.append(build)
            return parts, self._kept(capture)

        # the numbers give vmap an axis where there are no draws
        parts, values = vmap(run, randomness="different")(dict(draws), torch.arange(count))
        return rebuild[0](parts, count), values

    def _run(self, draw: Mapping[str, Tensor], batch: tuple[Tensor, ...]) -> tuple:
        try:
            capture = self._capture(draw, batch)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(
                f"The model raised {type(error).__name__} at a prediction: {error} "
                "It is run as model(*inputs, None): sizes must come from the inputs, "
                "not from the observations or from the training rows."
            ) from error
        return unvalidated(capture.fn), self._kept(capture)

    def _kept(self, capture: Capture) -> dict[str, Tensor]:
        names = self.seams | capture.local
        return {k: v for k, v in capture.values.items() if k in names}

    def _capture(
        self, draw: Mapping[str, Tensor], batch: tuple[Tensor, ...], *, sampling: bool = True
    ) -> Capture:
        capture = Capture(self.observed, sampling=sampling, plate=self.plate)
        at_means = AtMeans({self.observed, *draw}) if self.means else nullcontext()
        with capture, at_means, At(draw):
            self.program(*batch, None)
        if capture.fn is None:
            raise ModelError(
                f'The program did not reach the site "{self.observed}" with its observations set '
                "to None. Keep that statement outside of any `if y is not None`."
            )
        return capture


class _Opaque(Exception):
    """A distribution whose tensors do not all carry the batch shape."""


def take_apart(fn: Any) -> tuple[list[Tensor], Callable[[list[Tensor], int], Any]]:
    """A distribution's tensors, and how to build it again around tensors with a draw axis in front.

    Raises:
        _Opaque: a tensor does not carry the batch shape, so that a draw axis would not line up.
    """
    fn = unvalidated(fn)
    if not isinstance(fn, td.Independent):
        fn = fn.expand(fn.batch_shape)
    batch = tuple(fn.batch_shape)
    own = {k: v for k, v in vars(fn).items() if isinstance(v, Tensor)}
    inner = {k: take_apart(v) for k, v in vars(fn).items() if isinstance(v, td.Distribution)}
    moving = [v for t in getattr(fn, "transforms", ()) for v in vars(t).values()]
    if any(tuple(v.shape[: len(batch)]) != batch for v in own.values()) or any(
        isinstance(v, Tensor) for v in moving
    ):
        raise _Opaque(type(fn).__name__)
    parts = list(own.values()) + [part for each, _ in inner.values() for part in each]

    def rebuild(new: list[Tensor], count: int) -> Any:
        clone, rest = copy.copy(fn), iter(new)
        for name in own:
            setattr(clone, name, next(rest))
        for name, (each, build) in inner.items():
            setattr(clone, name, build([next(rest) for _ in each], count))
        clone._batch_shape = torch.Size((count, *fn.batch_shape))
        return clone

    return parts, rebuild


class _Each:
    """Several distributions side by side, read like one with a draw axis in front."""

    def __init__(self, fns: list[Any]):
        self.fns = fns

    def sample(self) -> Tensor:
        return torch.stack([fn.sample() for fn in self.fns])


@dataclass(frozen=True)
class _Moments:
    """E[y | x, draw] (probabilities for labels) and the noise within a draw, (draw, row, *)."""

    expectation: Tensor | None
    noise: Tensor | None
    labels: bool


def _moments(fn: Any) -> _Moments:
    if isinstance(fn, _Each):
        each = [_moments(one) for one in fn.fns]
        if each[0].expectation is None:
            return each[0]
        return _Moments(
            torch.stack([m.expectation for m in each]),  # type: ignore[misc]
            torch.stack([m.noise for m in each]),  # type: ignore[misc]
            each[0].labels,
        )
    base = innermost(fn)
    if isinstance(base, td.Categorical | td.Bernoulli):
        probs = base.probs
        if isinstance(base, td.Bernoulli):
            probs = torch.stack([1 - probs, probs], -1)
        return _Moments(probs, _entropy(probs), True)
    try:
        return _Moments(fn.mean, fn.variance, False)
    except NotImplementedError:
        return _Moments(None, None, False)


def _entropy(probs: Tensor) -> Tensor:
    return -torch.special.xlogy(probs, probs).sum(-1)


class _Pooled:
    """Draws and running moments, filled block by block."""

    def __init__(self, count: int, rows: int | None, names: Collection[str] | None = None):
        self.count, self.rows, self.names = count, rows, names
        self.dtype = torch.get_default_dtype()
        self.times = math.ceil(_OUTCOMES / count)
        self.kept: dict[str, Tensor] = {}
        self.sums: dict[int, dict[str, Any]] = {}
        self.labels = False

    def again(self, fn: Any) -> Tensor | None:
        """Further draws of y at each draw, (draw, row, *, times - 1), where draws are few."""
        if self.times == 1:
            return None
        return torch.stack([fn.sample() for _ in range(self.times - 1)], -1)

    def add(
        self,
        part: slice,
        first: int,
        fn: Any,
        y: Tensor,
        again: Tensor | None,
        values: dict[str, Tensor],
    ) -> None:
        moments = _moments(fn)
        self.labels = moments.labels
        rows = y.shape[1:2]
        if "f" in values and values["f"].shape[1:2] != rows:
            del values["f"]  # a site of that name without a row axis: not the output before noise
        if "f" not in values and moments.expectation is not None:
            values["f"] = moments.expectation
        values["y"] = y
        values.setdefault("f", y)
        if again is not None:
            values[_AGAIN] = again
        if values["f"].is_floating_point():
            self.dtype = values["f"].dtype
        for name, value in values.items():
            if self.names is None or name in (*self.names, _AGAIN):
                self._keep(name, part, first, value)
        centre = y if moments.expectation is None else moments.expectation
        noise = torch.full_like(centre, math.nan) if moments.noise is None else moments.noise
        centre, noise = (self._asked_for(first, each) for each in (centre, noise))
        self._accumulate(first, centre.double(), noise.double())

    def _keep(self, name: str, part: slice, first: int, value: Tensor) -> None:
        if name not in self.kept:
            rows = value.shape[1:2] if self.rows is None else (self.rows,)
            self.kept[name] = value.new_empty((self.count, *rows, *value.shape[2:]))
        value = self._asked_for(first, value)
        self.kept[name][part, first : first + value.shape[1]] = value

    def _asked_for(self, first: int, value: Tensor) -> Tensor:
        """(draw, row, *) without rows that only filled a block up."""
        return value if self.rows is None else value[:, : self.rows - first]

    def _accumulate(self, first: int, centre: Tensor, noise: Tensor) -> None:
        """Merges a stretch of draws into its block's moments (Chan, Golub, LeVeque 1983)."""
        new = {"n": len(centre), "mean": centre.mean(0), "noise": noise.mean(0)}
        new["spread"] = ((centre - new["mean"]) ** 2).sum(0)
        old = self.sums.get(first)
        if old is not None:
            n, m = old["n"], new["n"]
            shift = new["mean"] - old["mean"]
            new["spread"] = old["spread"] + new["spread"] + shift**2 * n * m / (n + m)
            new["mean"] = old["mean"] + shift * m / (n + m)
            new["noise"] = (n * old["noise"] + m * new["noise"]) / (n + m)
            new["n"] = n + m
        self.sums[first] = new

    def prediction(self, shape: tuple[int, int], inputs: tuple[Tensor, ...]) -> Prediction:
        again = self.kept.pop(_AGAIN, None)  # (draw, row, *, times - 1)
        draws = {k: v.reshape(*shape, *v.shape[1:]) for k, v in self.kept.items()}
        dtype, y = self.dtype, draws["y"]
        outcomes = y
        if again is not None:
            all_of = torch.cat([self.kept["y"][:, None], again.movedim(-1, 1)], 1)
            outcomes = all_of.reshape(shape[0], shape[1] * self.times, *all_of.shape[2:])

        def joined(name: str) -> Tensor:
            return torch.cat([self.sums[k][name] for k in sorted(self.sums)]).to(dtype)

        centre, noise = joined("mean"), joined("noise")
        if self.labels:
            steps = torch.arange(centre.shape[-1], dtype=dtype, device=centre.device)
            epistemic = (_entropy(centre) - noise).clamp(min=0)
            mean, probs = (centre * steps).sum(-1), centre
        else:
            epistemic, mean, probs = joined("spread") / self.count, centre, None
        local = {k: v for k, v in draws.items() if k not in ("f", "y")}
        f = draws.get("f", y)
        return Prediction(f, y, mean, noise, epistemic, probs, local, inputs, outcomes)
