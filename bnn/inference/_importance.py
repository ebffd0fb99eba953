"""Importance: how far a guide q is from the posterior, by the ratios posterior / q of its draws.

    r_s = log p(data, z_s) - log q(z_s),   z_s ~ q
    log p(data) ~ log mean exp r,   KL(q || p) ~ log mean exp r - mean r

The largest ratios follow a Pareto law with shape k (Vehtari et al. 2024): means over them converge
where k < 1, usefully where k < .7. k is about |rho| for the mean-field fit of two variables with
correlation rho, and 0 where q is the posterior. z is on the real line, the Jacobian included. It is
the shape of a tail, whatever its size: of ratios that are all but equal it tells nothing.
Every fit with a q looks at k, as far as that takes a fraction of a second.
"""

import math

import numpy as np
import torch
from torch import Tensor

from bnn.data import take
from bnn.diagnostics import Finding
from bnn.handlers import parameters, quiet_pyro, seeded
from bnn.inference._energy import Energy
from bnn.posterior import Posterior

LIMIT = 0.7
_EVALUATIONS = 10_000_000  # rows x draws,
_MULTIPLICATIONS = 100_000_000_000  # and rows x draws x weights: a few seconds
_QUICK = 50  # times fewer at a fit
_AT_ONCE = 100_000  # rows x draws in memory together
_FEWEST = 100  # draws: the tail of fewer is a handful
_ALIKE = 0.95  # of the draws: KL(q || p) is below .03 nats, a mean .2 standard deviations off


def of_guide(posterior: Posterior) -> list[Finding]:
    """Pareto's k of q, and its gap, where the fit noted log q of its draws.

    Of several starts the worst counts: each has a q of its own, and is all there is of it.
    """
    from bnn.export import psis

    ratios = log_ratios(posterior)
    if ratios is None:
        return []
    told = [psis(each) for each in ratios]
    each = [of_k(k, own, _whose(posterior)) for (k, _), own in zip(told, ratios, strict=True)]
    worst = max(range(len(told)), key=lambda chain: (each[chain].doubtful, each[chain].value))
    finding = each[worst]
    gap = told[worst][1] - float(ratios[worst].double().mean())
    return [
        finding,
        Finding(
            name="gap of q",
            value=gap,
            threshold=None,
            unlimited="nats grow with the number of weights",
            doubtful=False,
            meaning=f"KL(q || {_whose(posterior)}) is about {gap:.2g} nats"
            + (", or more: with such a k too little is seen of it." if finding.doubtful else "."),
            advice="Of two families for one model prefer that of the smaller gap.",
        ),
    ]


def _whose(posterior: Posterior) -> str:
    """What the ratios are to: f made linear, or priors tuned, the program is another model."""
    own = posterior.program is posterior.model
    return "posterior" if own else "posterior of the program that predicts"


def of_k(k: float, log_ratios: Tensor, whose: str = "posterior") -> Finding:
    """Pareto's k of the ratios of some draws, (draw,), and whether they differ enough to matter."""
    limit = min(1 - 1 / math.log10(len(log_ratios)), LIMIT)
    weights = log_ratios.double().softmax(0)
    kept = 1 / (len(weights) * float(weights.square().sum()))  # Kish's effective share
    far = not (k < limit or kept > _ALIKE)
    return Finding(
        name="k-hat of q",
        value=k,
        threshold=limit,
        doubtful=far,
        meaning=f"The ratios p / q, p the {whose}, have a Pareto tail with k = {k:.2f} (limit "
        f"{limit:.2g}): "
        + (
            "q misses mass that p has, and its widths are its own."
            if far
            else f"the ratios are all but equal, and reweighted draws worth {kept:.1%} of as many."
            if kept > _ALIKE
            else "reweighting its draws would work."
        ),
        advice='Take a wider family (SVI guide="full_rank" or "flow"), or bnn.NUTS; predictions '
        "can be good all the same: score them on held-out rows.",
    )


def at_fit(posterior: Posterior) -> list[Finding]:
    """What a fit with a q looks at, where that takes a fraction of a second: its k-hat."""
    ratios = log_ratios(posterior, _QUICK)
    if ratios is None:
        return []
    found = [of_k(pareto_k(each), each, _whose(posterior)) for each in ratios]
    return [max(found, key=lambda each: (each.doubtful, each.value))]


def pareto_k(log_ratios: Tensor) -> float:
    """Shape of the tail of the ratios, (draw,); 0 where all, inf where most are the same.

    ArviZ's number, to 1e-9: a fit asks for it, and ArviZ takes seconds to import.

    References:
        Zhang, Stephens (2009), A new and efficient estimation method for the generalized Pareto
        distribution; Vehtari, Simpson, Gelman, Yao, Gabry (2024), Pareto smoothed importance
        sampling, section 3.
    """
    ratios = log_ratios.double().cpu().sort().values
    ratios = ratios - ratios[-1]
    if ratios[0] > -1e-9:
        return 0.0
    length = math.ceil(min(0.2 * len(ratios), 3 * math.sqrt(len(ratios))))
    tail = (ratios[-length:].exp() - ratios[-length - 1].exp()).clamp(min=0)
    grid = torch.arange(1, 31 + int(math.sqrt(length)), dtype=torch.float64)
    scale = (1 - (len(grid) / (grid - 0.5)).sqrt()) / (3 * tail[int(length / 4 + 0.5) - 1])
    scale = scale + 1 / tail[-1]  # -k / sigma
    shape = torch.log1p(-scale[:, None] * tail).mean(1)
    weights = (length * ((-scale / shape).log() - shape - 1)).softmax(0)
    weights = torch.where(weights >= 10 * torch.finfo(torch.float64).eps, weights, 0.0)
    mean = (weights * scale).sum() / weights.sum()
    k = float(torch.log1p(-mean * tail).mean())
    k = (length * k + 5.0) / (length + 10)  # a prior that is worth ten of the tail, at 1/2
    return k if math.isfinite(k) else math.inf


def log_ratios(posterior: Posterior, quick: int = 1) -> Tensor | None:
    """Ratios of the draws, (chain, draw); None where a site is held, or at an unbearable cost.

    Args:
        posterior: whose draws; of each chain the first, as many as time allows.
        quick: how many times less time there is.
    """
    log_q, data, sites = posterior.stats.get("log_q"), posterior.data, posterior.sites
    if log_q is None or data.loader is not None or sites.subsampled:
        return None
    energy = Energy(posterior.program, data, sites)
    rows = max(data.rows, 1)
    cells = min(_EVALUATIONS, _MULTIPLICATIONS // max(energy.size, 1)) // quick
    affordable = cells // (rows * len(log_q))
    count = min(log_q.shape[1], max(affordable, 0))
    if count < _FEWEST:
        return None
    parts = [
        slot.transform.inv(posterior.draws[slot.name][:, :count]).flatten(2)
        if slot.free
        else slot.transform.inv(posterior.draws[slot.name][:, :count])[..., None]
        for slot in energy.slots
    ]
    if any(bool((part == part[:, :1]).all()) for part in parts):
        return None  # a site is held, and q has no density there
    z = torch.cat(parts, -1).flatten(0, 1)  # (chain * draw, size)
    at = lambda one: energy.log_joint(one, data.tensors)
    step = max(1, _AT_ONCE // rows)
    given = (*take(data.inputs, slice(0, 1)), None)
    with torch.no_grad(), quiet_pyro(), seeded(np.random.SeedSequence(0)):
        with parameters(posterior.model, given, posterior.params):
            each = [energy.batched(at, z[i : i + step]) for i in range(0, len(z), step)]
    return torch.cat(each).double().reshape(-1, count) - log_q[:, :count].double()
