"""Convergence: whether the chains of a sampler agree, and how much their draws are worth."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bnn.diagnostics.functions import Looked
from bnn.diagnostics.report import Finding

if TYPE_CHECKING:
    from bnn.posterior import Posterior

ESS_LIMIT = 400  # Vehtari et al. (2021), section 4: below, R-hat and quantiles are too noisy
RHAT_LIMIT = 1.01  # the same, of four chains; see `rhat_limit`
BFMI_LIMIT = 0.3  # Betancourt (2016); Stan's check
SATURATED = 0.05  # share of trajectories: more, and the draws cost more than they should
STILL = "chains that never moved"
NOISE = "sigma"
_ENTRIES = 1_000  # of all weights: as many are looked at


def rhat_limit(chains: int) -> float:
    """Where R-hat becomes doubtful: 1.01, and more of many short chains.

    In 2 m half chains of a stationary process R-hat is about sqrt(1 + 2 m / ESS). The published
    limit, 1.01, is that of four chains and an ESS of 400; the same ESS in 16 chains gives 1.04.
    """
    return max(RHAT_LIMIT, math.sqrt(1 + 2 * chains / ESS_LIMIT))


def rhat(x: Tensor) -> Tensor:
    """Rank-normalised split R-hat, the larger of bulk and folded; NaN of what does not vary.

    ArviZ's number, to 1e-9: every fit asks for it, and ArviZ takes seconds to import.

    Args:
        x: (chain, draw, quantity).

    Returns:
        (quantity,), 1 at agreement.

    References:
        Vehtari, Gelman, Simpson, Carpenter, Buerkner (2021), Rank-normalization, folding, and
        localization: an improved R-hat for assessing convergence of MCMC.
    """
    if x.shape[1] < 4:
        return torch.full(x.shape[2:], math.nan, dtype=torch.float64)
    parts = _halves(x)
    half, pooled = parts.shape[1], parts.flatten(0, 1)
    folded = (pooled - _median(pooled)).abs()

    def one(values: Tensor) -> Tensor:
        each = _normal_scores(values).reshape(parts.shape)
        within, between = each.var(1).mean(0), each.mean(1).var(0)
        return ((half - 1) / half + between / within).sqrt()

    worst = torch.maximum(one(pooled), one(folded))
    return torch.where(pooled.amax(0) > pooled.amin(0), worst, math.nan)


def ess(x: Tensor) -> tuple[Tensor, Tensor]:
    """Effective sample sizes for the bulk, and for the worse of the 5 and 95 % quantiles.

    ArviZ's numbers, to 1e-9, of all quantities together: every fit looks at them, and must not wait
    for ArviZ to be imported.

    Args:
        x: (chain, draw, quantity), of at least four draws.

    Returns:
        (quantity,) each.

    References:
        As `rhat`; Geyer (1992), Practical Markov chain Monte Carlo (where to end the sum).
    """
    parts = _halves(x)
    bulk = _normal_scores(parts.flatten(0, 1)).reshape(parts.shape)
    ordered = x.double().cpu().flatten(0, 1).sort(0).values
    at = [math.floor(len(ordered) * p + 1 - p) - 1 for p in (0.05, 0.95)]
    tails = [_ess((parts <= ordered[place]).double()) for place in at]
    return _ess(bulk), torch.minimum(*tails)


def _ess(x: Tensor) -> Tensor:
    """Of the mean, (chain, draw, quantity) -> (quantity,)."""
    chains, draws = x.shape[:2]
    waves = torch.fft.rfft(x - x.mean(1, keepdim=True), 2 * draws, dim=1).abs().square()
    lagged = torch.fft.irfft(waves, 2 * draws, dim=1)[:, :draws].mean(0) / draws  # (lag, quantity)
    total = lagged[0] + (x.mean(1).var(0) if chains > 1 else 0.0)
    rho = 1 - (lagged[0] * draws / (draws - 1) - lagged) / total
    rho[0] = 1.0
    last = max((draws - 3) // 2, 0)
    pairs = rho[: 2 * last + 2].unflatten(0, (last + 1, 2)).sum(1)
    ends = pairs <= 0  # Geyer: sums of two lags are above 0, and fall
    ends[last] = True
    end = ends.int().argmax(0, keepdim=True)  # the first
    before = torch.arange(last + 1)[:, None] < end
    single = rho.gather(0, 2 * end)[0]
    single = torch.where((single > 0) | (pairs.gather(0, end)[0] >= 0), single, 0.0)
    tau = 2 * torch.where(before, pairs.cummin(0).values, 0.0).sum(0) + single - 1
    size = chains * draws
    found = size / tau.clamp(min=1 / math.log10(size))
    return torch.where(x.amax((0, 1)) > x.amin((0, 1)), found, float(size))


def _halves(x: Tensor) -> Tensor:
    """Each chain as two, (2 chain, half, quantity)."""
    half = x.shape[1] // 2
    return torch.cat([x[:, :half], x[:, -half:]]).double().cpu()


def _median(x: Tensor) -> Tensor:
    """Over the first axis; of an even number the mean of the two in the middle."""
    middle = x.sort(0).values[(len(x) - 1) // 2 : len(x) // 2 + 1]
    return middle.mean(0)


def _normal_scores(x: Tensor) -> Tensor:
    """Normal quantiles of ranks, ties at their mean rank, (draw, quantity)."""
    ordered, order = x.sort(0)
    place = torch.arange(len(x))[:, None].expand_as(order)
    fresh = torch.ones_like(order, dtype=torch.bool)
    fresh[1:] = ordered[1:] != ordered[:-1]
    first = torch.where(fresh, place, 0).cummax(0).values
    ends = torch.cat([fresh[1:], fresh[:1]])  # the first is always fresh: so the last ends
    last = torch.where(ends, place, len(x)).flip(0).cummin(0).values.flip(0)
    ranks = torch.empty_like(x).scatter_(0, order, (first + last).to(x) / 2 + 1)
    return torch.special.ndtri((ranks - 0.375) / (len(x) + 0.25))


def bfmi(energy: Tensor) -> Tensor:
    """Bayesian fraction of missing information of each chain, of (chain, draw).

    How far the energy moves from draw to draw, against how far it ranges: small where momenta drawn
    anew cannot bring a chain through its tails.

    References:
        Betancourt (2016), Diagnosing suboptimal cotangent disintegrations in Hamiltonian Monte
        Carlo.
    """
    energy = energy.double()
    return energy.diff(dim=1).square().mean(1) / energy.var(1, correction=0)


def of_sampler(stats: Mapping[str, Tensor]) -> list[Finding]:
    """Divergences, tree depth and energy, where a sampler has noted them.

    Args:
        stats: (chain, draw) each, under ArviZ's names.
    """
    found = []
    if "diverging" in stats:
        count, total = int(stats["diverging"].sum()), stats["diverging"].numel()
        found.append(
            Finding(
                name="divergences",
                value=count,
                threshold=0,
                doubtful=count > 0,
                meaning=f"{count} of {total} draws ended in a divergence"
                + (
                    ": the step is too long for some region, which is then under-represented."
                    if count
                    else "."
                ),
                advice="Raise target_accept (0.95, 0.99), or rewrite the model so that scales and "
                "what they scale are apart (non-centred).",
            )
        )
    if "energy" in stats and stats["energy"].shape[1] > 3:
        least = float(bfmi(stats["energy"]).nan_to_num(0.0).min())  # NaN of one that never moved
        found.append(
            Finding(
                name="E-BFMI",
                value=least,
                threshold=BFMI_LIMIT,
                doubtful=least < BFMI_LIMIT,
                meaning=f"The least E-BFMI of a chain is {least:.2f}"
                + (
                    f", below {BFMI_LIMIT}: chains move slowly through the tails, which may be cut."
                    if least < BFMI_LIMIT
                    else ": energies move as fast as they range."
                ),
                advice="Raise warmup, or rewrite the model (non-centred, lighter tails).",
            )
        )
    if "reached_max_treedepth" in stats:
        share = float(stats["reached_max_treedepth"].double().mean())
        found.append(
            Finding(
                name="tree depth",
                value=share,
                threshold=SATURATED,
                doubtful=share > SATURATED,
                meaning=f"{share:.0%} of the trajectories reached the largest tree depth before "
                "they turned" + (": draws are correct and slow." if share > SATURATED else "."),
                advice="Raise max_tree_depth or warmup, rescale the inputs, or use "
                'mass_matrix="dense".',
            )
        )
    return found


def of_moves(posterior: "Posterior") -> list[Finding]:
    """Chains that never moved: R-hat and ESS of a constant are not defined, and say nothing."""
    chains, draws = posterior.shape
    names = [k for k in posterior.sites.globals if k in posterior.draws]
    if draws < 4 or not names:
        return []
    same = [(posterior.draws[k] == posterior.draws[k][:, :1]).flatten(1).all(1) for k in names]
    count = int(torch.stack(same).all(0).sum())
    if not count:
        return []
    return [
        Finding(
            name=STILL,
            value=count,
            threshold=0,
            doubtful=True,
            meaning=f"All draws are the same in {count} of {chains} chains: no step was taken.",
            advice="Raise warmup, rescale the data, or lower the learning rate or step size.",
        )
    ]


def of_rhat(what: str, value: float, chains: int, where: str = "") -> Finding:
    """R-hat of what is identified, in chains of a sampler."""
    limit = rhat_limit(chains)
    bad = value > limit
    return Finding(
        name=f"R-hat of {what}",
        value=value,
        threshold=limit,
        doubtful=bad,
        meaning=f"The chains {'disagree' if bad else 'agree'}: split R-hat of {what}{where} is "
        f"{value:.4g}, {'above' if bad else 'below'} {limit:.4g}.",
        advice="Raise warmup and draws, and look for several modes.",
    )


def of_ess(what: str, values: Tensor) -> list[Finding]:
    """The least effective sample sizes of what is identified, (chain, draw, quantity)."""
    bulk, tail = (float(each.min()) for each in ess(values))
    parts = (
        ("bulk", bulk, "the posterior mean", 1 / math.sqrt(max(bulk, 1))),
        ("tail", tail, "the 5 and 95 % quantiles", None),
    )
    return [
        Finding(
            name=f"{kind} ESS of {what}",
            value=value,
            threshold=ESS_LIMIT,
            doubtful=not value >= ESS_LIMIT,
            meaning=f"The draws of {what} are worth {value:.0f} independent ones for {of}"
            + ("." if error is None else f": known to {error:.1g} posterior standard deviations."),
            advice="Raise draws.",
        )
        for kind, value, of, error in parts
    ]


def sampled(posterior: "Posterior") -> bool:
    """True for the draws of a Markov chain: a sampler notes the step that it took."""
    return "step_size" in posterior.stats


def scalars(posterior: "Posterior") -> tuple[str, ...]:
    """Global sites of shape (), and the noise scale; entries of other sites are weights.

    The noise scale is "sigma" where it has one number for each output of a row, as in `bnn.models`:
    outputs do not swap. A weight of a net that was written as a number of its own counts as well,
    but only up to its sign where its sign is all that chains disagree about: see `of_scalars`.
    """
    known, outputs = posterior.sites.latent, tuple(posterior.data.observations.shape[1:])
    one = lambda k: known[k].shape in ((), outputs if k == NOISE else ())
    return tuple(k for k in posterior.sites.globals if k in posterior.draws and one(k))


def of_scalars(posterior: "Posterior", agreed: bool) -> dict[str, Tensor]:
    """The identified numbers by name, (chain, draw, entry) each; the log density is one.

    Args:
        posterior: of a sampler.
        agreed: chains agree on f. A number whose sign they disagree about, and not its size, then
            has a sign that no datum sees (a unit's two weights, both turned), and |number| stands
            for it.
    """
    values = {k: posterior.draws[k].double() for k in scalars(posterior)}
    if "lp" in posterior.stats:
        values["log density"] = posterior.stats["lp"].double()
    values = {k: each.reshape(*each.shape[:2], -1) for k, each in values.items()}
    for name, each in list(values.items()):
        if agreed and bool((each < 0).any()):
            plain, turned = (float(rhat(x).max()) for x in (each, each.abs()))
            if plain > rhat_limit(len(each)) >= turned:
                values[f"|{name}|"] = values.pop(name).abs()
    return values


def of_weights(posterior: "Posterior") -> Finding | None:
    """R-hat of what is not identified: told, and never doubtful."""
    known = scalars(posterior)
    names = [k for k in posterior.sites.globals if k in posterior.draws and k not in known]
    parts = [posterior.draws[k].flatten(2) for k in names]
    if not parts:
        return None
    flat = torch.cat([each.double() for each in parts], -1)
    keep = torch.linspace(0, flat.shape[-1] - 1, min(_ENTRIES, flat.shape[-1])).long()
    each = rhat(flat[..., keep])
    each = each[~each.isnan()]
    if not len(each):
        return None
    share = float((each > rhat_limit(len(flat))).double().mean())
    return Finding(
        name="R-hat of weights",
        value=float(each.max()),
        threshold=None,
        unlimited="weights are not identified",
        doubtful=False,
        meaning=f"Of {len(each)} entries of weights {share:.0%} differ between chains. Weights of "
        "a net are not identified (units swap, signs flip), so this says nothing.",
        advice="Read R-hat of f.",
    )


def of_chains(posterior: "Posterior", looked: Looked | None) -> list[Finding]:
    """R-hat and ESS of f, and of the identified numbers."""
    found, agreed = of_moves(posterior), True
    chains, draws = posterior.shape
    if draws < 4:
        return [
            Finding(
                name="draws of a chain",
                value=draws,
                threshold=4,
                doubtful=True,
                meaning=f"Chains of {draws} draws have no R-hat and no ESS: nothing is known of "
                "their convergence.",
                advice="Raise draws.",
            )
        ]
    if looked is not None:
        each = rhat(looked.values)
        told = ~each.isnan()
        if told.any():
            values, each = looked.values[..., told], each[told]
            row = int(looked.rows[told][each.argmax()])
            finding = of_rhat(looked.name, float(each.max()), chains, f" at row {row}")
            agreed = not finding.doubtful
            found += [finding, *of_ess(looked.name, values)]
    for name, each in of_scalars(posterior, agreed).items():
        values = rhat(each)
        told = ~values.isnan()
        if told.any():
            value = float(values[told].max())
            found += [of_rhat(name, value, chains), *of_ess(name, each[..., told])]
    return found


def of_starts(looked: Looked) -> Finding | None:
    """R-hat of f between runs from several starts, whose draws are a mixture by intent."""
    each = rhat(looked.values)
    each = each[~each.isnan()]
    if not len(each):
        return None
    return Finding(
        name=f"R-hat of {looked.name}",
        value=float(each.max()),
        threshold=None,
        unlimited="starts may lead apart",
        doubtful=False,
        meaning="Runs from several starts are a mixture, each with the same weight. Far above 1 "
        "they found different functions; no draw tells how much each deserves.",
        advice="Raise restarts until predictions on held-out rows stay as they are.",
    )
