"""Diagnostics: what the draws and the sampler's statistics say about the answer."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from bnn.errors import ConvergenceWarning

RHAT_LIMIT = 1.05


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at in a fit.

    Attributes:
        name: what it is, "R-hat of f".
        value: what was found.
        threshold: where it becomes doubtful; None for what is told without a limit.
        doubtful: True where the answer should not be trusted without a second look.
        meaning: what it says, in a sentence.
        advice: what to do.
    """

    name: str
    value: float
    threshold: float | None
    doubtful: bool
    meaning: str
    advice: str = ""


def split_rhat(x: Tensor) -> float:
    """Potential scale reduction of a scalar over half chains, 1 at agreement.

    Args:
        x: (chain, draw).

    References:
        Gelman et al. (2013), Bayesian data analysis, section 11.4.
    """
    half = x.shape[1] // 2
    if half < 2:
        return float("nan")
    parts = x[:, : 2 * half].double().reshape(-1, half)
    within = parts.var(1).mean()
    between = half * parts.mean(1).var()
    return float((((half - 1) / half * within + between / half) / within).sqrt())


def warn_of_sampling(stats: Mapping[str, Tensor]) -> None:
    """One `ConvergenceWarning` for each sign that a sampler's draws are not the posterior.

    Args:
        stats: (chain, draw) each, under ArviZ's names; `reached_max_treedepth` where it exists.
    """
    divergent, total = int(stats["diverging"].sum()), stats["diverging"].numel()
    if divergent:
        warnings.warn(
            f"{divergent} of {total} draws ended in a divergence: the step is too long for some "
            "region, which is then under-represented. Raise target_accept (0.95, 0.99), or rewrite "
            "the model so that scales and what they scale are apart (non-centred).",
            ConvergenceWarning,
            stacklevel=4,
        )
    reached = stats.get("reached_max_treedepth")
    saturated = 0.0 if reached is None else float(reached.double().mean())
    if saturated > 0.05:
        warnings.warn(
            f"{saturated:.0%} of the trajectories reached the largest tree depth before they "
            "turned: draws are correct and slow. Raise max_tree_depth or warmup, rescale the "
            'inputs, or use mass_matrix="dense".',
            ConvergenceWarning,
            stacklevel=4,
        )
    rhat = split_rhat(stats["lp"])
    if rhat > RHAT_LIMIT:
        warnings.warn(
            f"The chains disagree: split R-hat of the log density is {rhat:.2f}, above "
            f"{RHAT_LIMIT}. Raise warmup and draws, and look for several modes.",
            ConvergenceWarning,
            stacklevel=4,
        )
