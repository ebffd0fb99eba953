"""Collapse: posteriors that say nothing, or that no datum has moved; rows that no step saw."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, SubsetRandomSampler

from bnn.diagnostics.functions import Looked, thinned
from bnn.diagnostics.report import Finding
from bnn.prior import prior_draws

if TYPE_CHECKING:
    from bnn.posterior import Posterior

_EVEN = SequentialSampler | RandomSampler | SubsetRandomSampler  # each of their rows alike
_POINT = 1e-4  # of the predictive sd: the doubt that 10^8 rows leave, and float32 resolves
_PRIOR_DRAWS = 200
_MATTERS = 0.1  # nats
_FEWEST = 20  # draws: the law of fewer is not seen
_WEIGHTS = 10_000  # of larger nets fewer draws are looked at: a few seconds
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
    none = not value >= _POINT
    return Finding(
        name="spread of f",
        value=value,
        threshold=_POINT,
        doubtful=none,
        meaning="The posterior has no variance: every draw is the same function, and what is said "
        "to be epistemic is 0."
        if none
        else f"Of the standard deviation of a prediction up to {value:.2g} is epistemic.",
        advice="Use a method whose draws differ (bnn.NUTS, bnn.SVI, bnn.Laplace), or read the mean "
        "alone.",
    )


def against_prior(posterior: "Posterior", looked: Looked, worth: float) -> Finding | None:
    """Distance of f under the posterior from f under the prior.

    Args:
        posterior: whose model has the prior.
        looked: f at some rows.
        worth: independent draws that those of the posterior are worth.
    """
    if looked.prediction is None or not posterior.sites.predicts or not looked.rows.numel():
        return None
    before = prior_draws(posterior.model, looked.inputs, posterior.sites, _PRIOR_DRAWS, seed=0)[1]
    if before is None or before.f.shape[2:] != looked.prediction.f.shape[2:]:
        return None
    if worth < _FEWEST:
        return None
    f = looked.prediction.f.flatten(2).flatten(0, 1).double()
    distance = float(kolmogorov(f, before.f.flatten(2).flatten(0, 1).double()).mean())
    count = max(min(worth, len(f)), 1)
    limit = _CERTAIN * math.sqrt(1 / count + 1 / _PRIOR_DRAWS)
    same = distance < limit
    return Finding(
        name="distance from the prior",
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


def balance(posterior: "Posterior") -> Finding | None:
    """The ELBO against that of a guide which stays at the prior, E_prior[log p(y | w)].

    KL(q || prior) = E_q[log p(y | w)] - ELBO is what q pays to leave the prior; an optimum among
    guides that could have stayed there gains more by it than it pays.
    """
    sites, data = posterior.sites, posterior.data
    rows_apart = sites.row_axis is not None and sites.every_row and not sites.locals
    if posterior.elbo is None or data.loader is not None or not rows_apart:
        return None
    latent, _ = prior_draws(posterior.model, data.inputs, sites, _PRIOR_DRAWS, seed=0)
    if set(posterior.draws) - set(latent) or not posterior.draws:
        return None  # sites of the method's own
    ours, theirs = (_likelihoods(each) for each in (posterior, replace(posterior, draws=latent)))
    if len(theirs) < _FEWEST:
        return None
    error = float(theirs.std()) / math.sqrt(len(theirs))
    ours, theirs = float(ours.mean()), float(theirs.mean())
    above, limit = posterior.elbo - theirs, -_MATTERS - 4 * error
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


def _likelihoods(posterior: "Posterior") -> Tensor:
    """Log p(y | w) of as many draws as memory and time allow, (draw,)."""
    weights = sum(v[0, 0].numel() for v in posterior.draws.values())
    some = thinned(posterior, None, posterior.data.rows * max(1, weights // _WEIGHTS))
    return some.log_likelihood().double().sum(-1).flatten()


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
        fixed = isinstance(loader.sampler, SequentialSampler) and shown < data.rows
        lost, cause = False, ""
        if fixed or drawn != data.rows:
            lost, cause = True, "rows that no pass shows"
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
