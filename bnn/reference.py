"""Reference: how far the functions of one posterior are from those of a trusted one."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bnn.data import take
from bnn.diagnostics.functions import ROWS, thinned
from bnn.errors import DataError
from bnn.posterior import Posterior
from bnn.prediction import Prediction

if TYPE_CHECKING:
    import pandas

_POINTS = 32  # values of y at which densities are compared, a row and posterior
_DRAWS = (100, 1_000)  # of each posterior in a density: at least, at most,
_MULTIPLICATIONS = 20_000_000_000  # and draws x rows x points x weights: some seconds
_KNOWN = 2_000  # training rows, evenly spread, that distances are taken to
_NEAR = 0.95  # share of the training rows that count as near the others
_FAR = 2.0  # how far rows are moved out where none are given


def reference(posterior: Posterior, *inputs: Any, against: Posterior) -> "pandas.DataFrame":
    """Distances between the functions of two posteriors, by region: f and p(y | x), never weights.

    Columns:

    - `rows` looked at.
    - `tv`: total variation of p(y | x), 0..1, mean over rows. Labels: half the summed distance of
      class probabilities. Numbers: mean over y of |p - q| / (p + q), y drawn by both alike, with
      p and q the exact densities of the two mixtures over draws. As these are of finitely many
      draws (1,000, of large nets fewer) it is biased upwards, by about (epistemic sd / noise sd) /
      sqrt(draws); NaN where the model does not state rows one by one.
    - `w1`: Wasserstein-1 of f, in units of f, mean over rows and outputs: area between the two
      distribution functions of the draws. Biased upwards, by about sd / sqrt(draws).
    - `w1_sd`: the same in standard deviations of the reference.
    - `sd_ratio`: sd of f over that of the reference, geometric mean over rows; 1 is right, below 1
      too sure. Where neither varies (w x at x = 0) it is 1.
    - `agreement`, for labels: share of rows with the same most probable class.
    - `tv_floor`, `w1_floor`: what two halves of the reference's own draws give. Distances near
      these cannot be told from none.

    Regions: `inside` are rows as near to a training row as 95 % of training rows are to the next
    one; `outside` the others; `all`. Distance is Euclidean, of all real inputs, each column in
    its training standard deviation. Without a real input there is `all` alone.

    Args:
        posterior: what is judged.
        *inputs: rows to look at, as for `predict`. Default: up to 50 training rows, evenly spread,
            and the same rows twice as far from the median of the training rows.
        against: the trusted posterior of the same data, such as one of a long NUTS run whose own
            `diagnose()` finds nothing doubtful.

    Returns:
        One row for each region that has rows.

    Raises:
        DataError: inputs that the models do not take; posteriors of labels and of numbers; an f
            that differs in shape; one draw of `against`.

    References:
        Izmailov, Vikram, Hoffman, Wilson (2021), What are Bayesian neural network posteriors
        really like?

    Example:
        >>> import bnn, pyro, torch
        >>> import pyro.distributions as dist
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("y", dist.Normal(w * x, 0.1), obs=y)
        >>> x = torch.linspace(-1, 1, 10)
        >>> trusted = bnn.fit(model, x, x, method=bnn.Laplace(draws=100))
        >>> list(reference(trusted, against=trusted).tv)
        [0.0, 0.0, 0.0]
    """
    import pandas

    if not isinstance(against, Posterior):
        raise TypeError(f"against is a {type(against).__name__}. Pass a posterior that you trust.")
    if math.prod(against.shape) < 2:
        raise DataError("against holds one draw, which no distance can be taken from. Pass more.")
    rows = inputs or default_rows(posterior)
    first, second = (each.predict(*rows) for each in (posterior, against))
    if not first.f.shape[2]:
        raise DataError("The inputs have no rows, so there is nothing to compare. Pass some.")
    if (first.probs is None) != (second.probs is None) or first.f.shape[2:] != second.f.shape[2:]:
        raise DataError(
            f"The posteriors speak of different things: f has shape {tuple(first.f.shape[2:])} at "
            f"these rows, and {tuple(second.f.shape[2:])} in `against`. Fit both to the same data."
        )
    each = _distances(posterior, against, first, second)
    region = regions(posterior, first.inputs)
    table = {name: _over(each, at) for name, at in region.items() if bool(at.any())}
    frame = pandas.DataFrame.from_dict(table, orient="index")
    frame.index.name = "region"
    return frame.dropna(axis="columns", how="all")


def default_rows(posterior: Posterior) -> tuple[Tensor, ...]:
    """Training rows, and the same further out, where inputs are real numbers."""
    data = posterior.data
    have = len(data.observations)
    some = take(data.inputs, torch.linspace(0, have - 1, min(ROWS, have)).round().long())
    real = [x.ndim > 0 and x.is_floating_point() for x in some]
    if not any(real):
        return some
    out = []
    for x, whole, moves in zip(some, data.inputs, real, strict=True):
        centre = whole.median(0).values if moves else x
        moved = centre + _FAR * (x - centre) if moves else x
        out.append(torch.cat([x, moved]) if x.ndim else x)
    return tuple(out)


def regions(posterior: Posterior, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Which rows are inside the training data, outside, and all: (row,) of bool each."""
    count = next((len(x) for x in inputs if x.ndim), posterior.data.rows)
    everywhere = torch.ones(count, dtype=torch.bool)
    known, new = _columns(posterior.data.inputs), _columns(inputs)
    known = known[torch.linspace(0, max(len(known) - 1, 0), min(len(known), _KNOWN)).long()]
    if not known.numel() or len(known) < 3:
        return {"all": everywhere}
    scale = known.std(0)
    scale = torch.where(scale > 0, scale, 1.0)
    known, new = known / scale, new / scale
    own = torch.cdist(known, known)
    own.fill_diagonal_(math.inf)
    reach = own.amin(1).quantile(_NEAR)
    inside = torch.cdist(new, known).amin(1) <= reach * (1 + 1e-6)
    return {"inside": inside, "outside": ~inside, "all": everywhere}


def _columns(inputs: tuple[Tensor, ...]) -> Tensor:
    """The real inputs side by side, (row, column)."""
    real = [x.flatten(1) if x.ndim > 1 else x[:, None] for x in inputs if x.ndim]
    real = [x.double() for x in real if x.is_floating_point()]
    return torch.cat(real, 1) if real else torch.zeros(0)


def _distances(
    posterior: Posterior, against: Posterior, first: Prediction, second: Prediction
) -> dict[str, Tensor]:
    """Every measure of every row, (row,) each."""
    f, g = (_outputs(each) for each in (first, second))  # (draw, row, output)
    sd, trusted = (each.std(0, correction=int(len(each) > 1)) for each in (f, g))
    w1, halves = wasserstein(f, g), _halves(against)
    found = {
        "w1": w1.mean(1),
        "w1_sd": (w1 / trusted).nan_to_num(0.0, posinf=math.inf).mean(1),
        "sd_ratio": (sd / trusted).nan_to_num(1.0, posinf=math.inf).log().mean(1),
    }
    own = [each.predict(*first.inputs) for each in halves]
    found["w1_floor"] = wasserstein(*(_outputs(each) for each in own)).mean(1)
    if first.probs is not None and second.probs is not None:
        found["tv"] = _apart(first.probs, second.probs)
        found["agreement"] = _agreed(first.probs, second.probs)
        found["tv_floor"] = _apart(*(each.probs for each in own if each.probs is not None))
    else:
        found["tv"] = total_variation(posterior, against, first, second)
        found["tv_floor"] = total_variation(*halves, *own)
    return found


def _outputs(prediction: Prediction) -> Tensor:
    """Draws of f, (draw, row, output)."""
    f = prediction.f.flatten(0, 1).double()
    return f.reshape(*f.shape[:2], -1)


def _apart(p: Tensor, q: Tensor) -> Tensor:
    each = 0.5 * (p - q).abs().sum(-1)  # (row, *)
    return each.reshape(len(each), -1).mean(1).double()


def _agreed(p: Tensor, q: Tensor) -> Tensor:
    each = (p.argmax(-1) == q.argmax(-1)).double()
    return each.reshape(len(each), -1).mean(1)


def _halves(posterior: Posterior) -> tuple[Posterior, Posterior]:
    """Half of its chains, or of a single chain its first and its second half."""
    chains, draws = posterior.shape
    axis, count = (0, chains) if chains > 1 else (1, draws)
    parts = (slice(0, count // 2), slice(count // 2, 2 * (count // 2)))
    cut = lambda v, part: v[part] if axis == 0 else v[:, part]
    one, two = (
        replace(posterior, draws={k: cut(v, part) for k, v in posterior.draws.items()})
        for part in parts
    )
    return one, two


def wasserstein(x: Tensor, y: Tensor) -> Tensor:
    """Wasserstein-1 of two samples, the area between their distribution functions.

    Args:
        x: (draw, *).
        y: (draw, *), of another number of draws.

    Returns:
        (*), in units of x.
    """
    both = torch.cat([x, y]).movedim(0, -1).sort(-1).values.contiguous()  # (*, draws of both)
    shares = []
    for each in (x, y):
        ordered = each.movedim(0, -1).sort(-1).values.contiguous()
        shares.append(torch.searchsorted(ordered, both[..., :-1].contiguous(), right=True))
    gap = (shares[0].double() / len(x) - shares[1].double() / len(y)).abs()
    return (gap * both.diff(dim=-1)).sum(-1)


def total_variation(
    one: Posterior, two: Posterior, first: Prediction, second: Prediction
) -> Tensor:
    """Of the predictive densities of numbers, (row,); NaN where rows have no density of their own.

    With m = (p + q) / 2, TV = 1/2 integral |p - q| = E_m[|p - q| / (p + q)], and y of m are draws
    of both predictions.
    """
    rows = first.y.shape[2]
    if one.sites.row_axis is None or two.sites.row_axis is None:
        return torch.full((rows,), math.nan, dtype=torch.float64)
    drawn = torch.cat([_some(each) for each in (first, second)])  # (point, row, *)
    # Without inputs the model states how many rows there are: one y of each at a time.
    together = len(drawn) if any(x.ndim for x in first.inputs) else 1
    at = tuple(x.repeat(together, *[1] * (x.ndim - 1)) if x.ndim else x for x in first.inputs)
    scored = []
    for each in (one, two):
        weights = sum(v[0, 0].numel() for v in each.draws.values())
        cells = len(drawn) * rows
        count = min(max(_MULTIPLICATIONS // (cells * max(weights, 1)), _DRAWS[0]), _DRAWS[1])
        some = thinned(each, max(count // each.shape[0], 1), cells)
        parts = [some.log_score(*at, y.flatten(0, 1)) for y in drawn.split(together)]
        scored.append(torch.cat(parts).double().reshape(len(drawn), rows))
    p, q = scored
    # |p - q| / (p + q) = |tanh((log p - log q) / 2)|
    return torch.tanh((p - q) / 2).abs().nan_to_num(0.0).mean(0)


def _some(prediction: Prediction) -> Tensor:
    """Draws of y, evenly spread over all, (point, row, *)."""
    y = prediction.outcomes.flatten(0, 1)
    return y[torch.linspace(0, len(y) - 1, _POINTS).round().long()]


def _over(each: dict[str, Tensor], at: Tensor) -> dict[str, float]:
    """Means over the rows of a region."""
    mean = {k: float(v[at].mean()) for k, v in each.items()}
    mean["sd_ratio"] = math.exp(mean["sd_ratio"])
    names = ("tv", "w1", "w1_sd", "sd_ratio", "agreement", "tv_floor", "w1_floor")
    return {"rows": int(at.sum())} | {k: mean[k] for k in names if k in mean}
