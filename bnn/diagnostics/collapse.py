"""Collapse: posteriors that say nothing, or that no datum has moved; rows that no step saw."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, SubsetRandomSampler

from bnn.data import take
from bnn.devices import on
from bnn.diagnostics.functions import Looked, thinned
from bnn.diagnostics.report import Finding
from bnn.prediction import Prediction
from bnn.prior import prior_draws

if TYPE_CHECKING:
    from bnn.posterior import Posterior

_EVEN = SequentialSampler | RandomSampler | SubsetRandomSampler  # each of their rows alike
SPREAD, MOVED = "spread of f", "distance from the prior"
_POINT = 1e-4  # of the predictive sd: the doubt that 10^8 rows leave, and float32 resolves
_PRIOR_DRAWS = 200
_QUICK_DRAWS = (20, 60, 200)  # at a fit: more only where fewer cannot tell
_MATTERS = 0.1  # nats
_FEWEST = 20  # draws: the law of fewer is not seen
_WEIGHTS = 10_000  # of larger nets fewer draws are looked at: a few seconds
_QUICK_ROWS = 200  # at a fit: rows,
_QUICK_NUMBERS = 10_000_000  # and weights x draws of the prior, .1 s
TELLING = 100  # draws: with fewer chance alone gives a distance of .2 of 1, which is no prior
_OFF = 0.1  # posterior standard deviations that an uneven pass may move a mean
_CERTAIN = 1.63  # Kolmogorov's distance at 1 %: P(sqrt(n m / (n + m)) D > 1.63) = .01


def spread(looked: Looked) -> Finding | None:
    """Epistemic standard deviation against the predictive one; for labels, against that of f."""
    prediction = looked.prediction
    if prediction is None:
        return None
    pooled = looked.values.flatten(0, 1)
    if prediction.probs is None and bool(prediction.total.isfinite().all()):
        total = prediction.total.double()
        share = (prediction.epistemic.double() / total.clamp(min=1e-300)).sqrt()
        value = float(share.max())
    else:
        size = pooled.square().mean().sqrt().clamp(min=1e-300)
        value = float(pooled.std(0, correction=0).max() / size)
    none, finite = value < _POINT, math.isfinite(value)
    said = f"Of the standard deviation of a prediction up to {value:.2g} is epistemic."
    if none:
        said = "The posterior has no variance: every draw is the same function, and what is said "
        said += "to be epistemic is 0."
    elif not finite:
        said = "f is not finite at some draw, and so are predictions."
    return Finding(
        name=SPREAD,
        value=value,
        threshold=_POINT,
        doubtful=none or not finite,
        meaning=said,
        advice="Use a method whose draws differ (bnn.NUTS, bnn.SVI, bnn.Laplace), or read the mean "
        "alone."
        if finite
        else "Bound what the model takes exp, log or a power of, or rescale the data.",
    )


def of_scales(posterior: "Posterior", looked: Looked) -> bool:
    """True where f depends on no site, and the density of the rows on each: scales, correlations.

    Of a net whose output is not used f does not depend on the sites either, nor does the density.
    """
    if looked.prediction is None or not posterior.sites.predicts or not looked.rows.numel():
        return False
    try:
        with on(posterior.device):
            latent, before = prior_draws(posterior.model, looked.inputs, posterior.sites, 2, seed=0)
        if before is None or not bool((before.f == before.f[:, :1]).all()):
            return False
        moved = {  # at draw k site k alone is elsewhere than at the first
            name: torch.stack([v[0, int(k == at)] for at in range(len(latent) + 1)])[None]
            for k, (name, v) in enumerate(latent.items(), start=1)
            if name in posterior.draws
        }
        first, *others = replace(posterior, draws=moved).log_likelihood()[0]
    except Exception:  # of the model, where its prior takes it; or the rows are a loader's
        return False
    return len(moved) == len(posterior.draws) and not any(torch.equal(first, o) for o in others)


def since_prior(
    posterior: "Posterior", looked: Looked, worth: float, *, quick: bool = False
) -> list[Finding]:
    """What the data have done: to f, and to the bound.

    Args:
        posterior: whose model has the prior.
        looked: f at some rows.
        worth: independent draws that those of the posterior are worth.
        quick: few draws of the prior; as many as else only where these cannot tell. Of a net of
            which so many take long, only what the bound needs.
    """
    if looked.prediction is None or not posterior.sites.predicts or not looked.rows.numel():
        return []
    sites, moved = posterior.sites, None
    if quick:
        most = _QUICK_NUMBERS // max(sites.size, 1)
        worth = 0.0 if most < _PRIOR_DRAWS or posterior.method.is_point else worth
        if most < _FEWEST or (worth < TELLING and posterior.elbo is None):
            return []
    latent: dict[str, Tensor] = {}
    for draws in _QUICK_DRAWS if quick else (_PRIOR_DRAWS,):
        with on(posterior.device):
            latent, before = prior_draws(posterior.model, looked.inputs, sites, draws, seed=0)
        moved = None if before is None else against_prior(before, looked.prediction, worth)
        if moved is None or not moved.doubtful:
            break
    found = [moved, balance(posterior, latent, quick=quick)]
    return [each for each in found if each is not None]


def against_prior(before: Prediction, after: Prediction, worth: float) -> Finding | None:
    """Distance of f under the posterior from f under the prior, at the same rows.

    Args:
        before: the prior's.
        after: the posterior's.
        worth: independent draws that its draws are worth.
    """
    f = after.f.flatten(2).flatten(0, 1).double()
    count = min(worth, len(f))
    if before.f.shape[2:] != after.f.shape[2:] or count < TELLING:
        return None
    distance = float(kolmogorov(f, before.f.flatten(2).flatten(0, 1).double()).mean())
    limit = _CERTAIN * math.sqrt(1 / count + 1 / before.f.shape[1])
    same = distance < limit
    return Finding(
        name=MOVED,
        value=distance,
        threshold=limit,
        doubtful=same,
        meaning="The posterior equals the prior: f has the law at these rows that it had before "
        f"any datum (Kolmogorov distance {distance:.2g}, of 1; by chance up to {limit:.2g})."
        if same
        else f"The data have moved f by {distance:.2g} of 1 (mean Kolmogorov distance from its "
        "prior).",
        advice="Look whether the observations depend on f, whether the guide left its start "
        "(steps, learning_rate), and whether the noise is far too wide.",
    )


def kolmogorov(x: Tensor, y: Tensor) -> Tensor:
    """Largest distance of two samples' distribution functions, (draw, quantity) -> (quantity,)."""
    at = torch.cat([x, y]).T.contiguous()  # (quantity, draws of both)
    shares = [
        torch.searchsorted(each.T.sort(1).values.contiguous(), at, right=True).double() / len(each)
        for each in (x, y)
    ]
    return (shares[0] - shares[1]).abs().amax(1)


def balance(
    posterior: "Posterior", latent: dict[str, Tensor], *, quick: bool = False
) -> Finding | None:
    """The ELBO against that of a guide which stays at the prior, E_prior[log p(y | w)].

    KL(q || prior) = E_q[log p(y | w)] - ELBO is what q pays to leave the prior; an optimum among
    guides that could have stayed there gains more by it than it pays.

    Args:
        posterior: of a guide.
        latent: draws of the prior, (1, draw, *site) each.
        quick: only a doubtful finding is told; of many rows some are looked at, and the limit
            allows for what they leave open.
    """
    sites, data = posterior.sites, posterior.data
    rows_apart = sites.row_axis is not None and sites.every_row and not sites.locals
    if posterior.elbo is None or data.loader is not None or not rows_apart:
        return None
    if set(posterior.draws) - set(latent) or not posterior.draws:
        return None  # sites of the method's own
    some = None
    if quick and data.rows > _QUICK_ROWS:
        if sites.plate is None or len(data.names) < 2:
            return None  # rows may see each other, or the model counts them
        some = torch.linspace(0, data.rows - 1, _QUICK_ROWS).round().long()
    before = replace(posterior, draws={k: latent[k] for k in posterior.draws})
    theirs, error, count = _likelihood(before, some, quick)
    if count < _FEWEST or not math.isfinite(error):
        return None  # a prior under which the data cannot be, or nearly, is no bound
    above, limit = posterior.elbo - theirs, -_MATTERS - 4 * error
    if quick and above >= limit:
        return None  # nothing to warn of
    ours = _likelihood(posterior, some, quick)[0]
    return Finding(
        name="ELBO above the prior's",
        value=above,
        threshold=limit,
        doubtful=not above >= limit,
        meaning=f"KL(q || prior) is {ours - posterior.elbo:.4g} nats, and by it the expected log "
        f"likelihood is {ours - theirs:.4g} above that of the prior"
        + ("." if above >= limit else ": the guide is worse than the prior itself."),
        advice="Raise steps or lower learning_rate; begin with annealing, which lets the "
        "likelihood in first.",
    )


def _likelihood(
    posterior: "Posterior", some: Tensor | None, quick: bool
) -> tuple[float, float, int]:
    """E[log p(y | w)] of all rows, told from some of them; its standard error; draws.

    Of as many draws as memory and time allow.
    """
    data, size = posterior.data, posterior.sites.size
    rows = data.rows if some is None else len(some)
    few = thinned(posterior, _FEWEST if quick else None, rows * max(1, size // _WEIGHTS))
    each = few.log_likelihood(*(() if some is None else take(data.tensors, some)))
    each = each.double().flatten(0, 1)  # (draw, row)
    variance = float(each.sum(1).var()) / len(each) if len(each) > 1 else math.nan
    if some is not None:
        variance += rows * float(each.mean(0).var())
    return (
        float(each.sum(1).mean()) * data.rows / rows,
        math.sqrt(variance) * data.rows / rows,
        len(each),
    )


def minibatches(posterior: "Posterior") -> Finding | None:
    """Rows that a pass shows, against the rows N that the likelihood is scaled to."""
    data = posterior.data
    size = getattr(posterior.method, "batch_size", None)
    if data.loader is None:
        if size is None or size >= data.rows:
            return None
        shown, lost, cause = data.rows // size * size, False, ""
    elif not isinstance(data.loader, DataLoader):
        return None  # its rows were counted as they came
    else:
        loader: Any = data.loader
        try:
            drawn = len(loader.sampler)
            shown = min(drawn, len(loader) * (loader.batch_size or drawn))
        except TypeError:
            return None
        fixed = isinstance(loader.sampler, SequentialSampler)
        lost, cause = False, ""
        if (fixed and shown < data.rows) or drawn != data.rows:
            lost, cause = True, "rows that no pass shows"
        elif fixed and (rest := drawn % (loader.batch_size or drawn)):
            # Of the mean, in posterior sds, where rows are alike; each batch counts N / its rows.
            bias = (1 / len(loader) - rest / drawn) * math.sqrt(drawn / rest)
            lost = bias > _OFF
            cause = f"each row of the last batch, of {rest}, as {loader.batch_size / rest:.3g}"
        elif not isinstance(loader.sampler, _EVEN):
            lost, cause = True, f"rows that {type(loader.sampler).__name__} shows as it likes"
    share = shown / data.rows
    return Finding(
        name="rows in a pass",
        value=share,
        threshold=1.0,
        doubtful=lost,
        meaning=f"A pass of minibatches shows {shown} of {data.rows} rows, which stand for all"
        + (f": the likelihood counts N = {data.rows}, with {cause}." if lost else "."),
        advice="Give the loader all rows alike: shuffle=True, and a dataset of the rows it draws.",
    )
