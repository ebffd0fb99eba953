"""Importance: how far a guide q is from the posterior, by the ratios posterior / q of its draws.

    r_s = log p(data, z_s) - log q(z_s),   z_s ~ q
    log p(data) ~ log mean exp r,   KL(q || p) ~ log mean exp r - mean r

The largest ratios follow a Pareto law with shape k (Vehtari et al. 2024): means over them converge
where k < 1, usefully where k < .7. k is about |rho| for the mean-field fit of two variables with
correlation rho, and 0 where q is the posterior. z is on the real line, the Jacobian included.
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
_AT_ONCE = 100_000  # rows x draws in memory together
_FEWEST = 100  # draws: the tail of fewer is a handful


def of_guide(posterior: Posterior) -> list[Finding]:
    """Pareto's k of q, and its gap, where the fit noted log q of its draws.

    Of several starts the worst counts: each has a q of its own, and is all there is of it.
    """
    from bnn.export import psis

    ratios = log_ratios(posterior)
    if ratios is None:
        return []
    told = [psis(each) for each in ratios]
    worst = max(range(len(told)), key=lambda chain: told[chain][0])
    k, log_mean = told[worst]
    gap = log_mean - float(ratios[worst].double().mean())
    limit = min(1 - 1 / math.log10(ratios.shape[1]), LIMIT)
    far = not k < limit
    advice = (
        'Take a wider family (SVI guide="full_rank" or "flow"), or bnn.NUTS; predictions can be '
        "good all the same: score them on held-out rows."
    )
    return [
        Finding(
            name="k-hat of q",
            value=k,
            threshold=limit,
            doubtful=far,
            meaning=f"The ratios posterior / q have a Pareto tail with k = {k:.2f}: "
            + (
                "q misses mass that the posterior has, and its widths are its own."
                if far
                else "q is close enough to the posterior that reweighting its draws would work."
            ),
            advice=advice,
        ),
        Finding(
            name="gap of q",
            value=gap,
            threshold=None,
            doubtful=False,
            meaning=f"KL(q || posterior) is about {gap:.2g} nats"
            + (", or more: with such a k too little is seen of it." if far else "."),
        ),
    ]


def log_ratios(posterior: Posterior) -> Tensor | None:
    """Ratios of the draws, (chain, draw); None where it cannot be had at a bearable cost."""
    log_q, data, sites = posterior.stats.get("log_q"), posterior.data, posterior.sites
    if log_q is None or data.loader is not None or sites.subsampled:
        return None
    energy = Energy(posterior.program, data, sites)
    rows = max(data.rows, 1)
    affordable = min(_EVALUATIONS // rows, _MULTIPLICATIONS // (rows * max(energy.size, 1)))
    count = min(log_q.shape[1], max(affordable, 0))
    if count < _FEWEST:
        return None
    parts = [
        slot.transform.inv(posterior.draws[slot.name][:, :count]).flatten(2)
        if slot.free
        else slot.transform.inv(posterior.draws[slot.name][:, :count])[..., None]
        for slot in energy.slots
    ]
    z = torch.cat(parts, -1).flatten(0, 1)  # (chain * draw, size)
    at = lambda one: energy.log_joint(one, data.tensors)
    step = max(1, _AT_ONCE // rows)
    given = (*take(data.inputs, slice(0, 1)), None)
    with torch.no_grad(), quiet_pyro(), seeded(np.random.SeedSequence(0)):
        with parameters(posterior.model, given, posterior.params):
            each = [energy.batched(at, z[i : i + step]) for i in range(0, len(z), step)]
    return torch.cat(each).double().reshape(-1, count) - log_q[:, :count].double()
