"""Diagnostics: what the draws, and what the fit noted on its way, say about the answer.

Weights of a net are not identified: units swap, signs flip. Convergence is therefore looked at
where the model is the same whichever weights make it: f at some rows, the log density, and single
numbers such as a noise scale. Nothing here asks which method it was; a method adds what only it can
tell by `Method.findings`.
"""

import math
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from bnn import markup
from bnn.diagnostics import collapse, convergence
from bnn.diagnostics.functions import Looked, glance, look
from bnn.diagnostics.report import Finding, Report, warn
from bnn.errors import ModelError

if TYPE_CHECKING:
    from bnn.posterior import Posterior

__all__ = ["Finding", "Report", "at_fit", "diagnose", "warn"]


def at_fit(posterior: "Posterior") -> list[Finding]:
    """What every fit warns of: doubtful findings of `diagnose`, told from less, each cause once.

    Of what chains disagree about the worst is told, and only without it what their draws are worth.
    That draws are all the same is news where no chain and not the method itself says what is wrong,
    and the method is not a point.
    """
    found = _found(posterior, glance(posterior), {}, quick=True)
    found = [each for each in found if each.doubtful]
    own: list[Finding] = []
    with suppress(Exception):  # a check must not lose a fit: `diagnose` says what is wrong with it
        own = [each for each in posterior.method.at_fit(posterior) if each.doubtful]
    apart = [each for each in found if each.name.startswith("R-hat of")]
    short = [each for each in found if " ESS of " in each.name]
    told = [max(apart, key=lambda each: each.value)] if apart else []
    if short and not apart:
        told = [min(short, key=lambda each: each.value)]
    rest = [each for each in found if each not in apart and each not in short]
    known = posterior.method.is_point or posterior.shape == (1, 1)
    if known or own or told or any(each.name == convergence.STILL for each in rest):
        rest = [each for each in rest if each.name != collapse.SPREAD]
    return [*rest, *own, *told]


def diagnose(posterior: "Posterior", *inputs: Any) -> Report:
    """See `Posterior.diagnose`."""
    chains, draws = posterior.shape
    missing: dict[str, str] = {}
    try:
        looked = look(posterior, *inputs)
    except ModelError as error:
        looked, missing["f"] = None, str(error)
    found: list[Finding | None] = [*_found(posterior, looked, missing)]
    if convergence.sampled(posterior):
        found.append(convergence.of_weights(posterior))
    elif chains > 1 and looked is not None:
        found.append(convergence.of_starts(looked))
    else:
        missing["R-hat, ESS"] = "draws of one run, not of Markov chains: nothing could disagree."
    own = posterior.method.findings(posterior)
    found += own
    bounded = posterior.elbo is not None or "log_q" in posterior.stats
    if bounded and not any("k-hat" in each.name for each in own):
        missing["k-hat of q"] = (
            "it takes the log densities of q and of all rows at a hundred draws or more: there are "
            "fewer (raise draws), or rows came from a loader, are drawn by the model's plate, or "
            "are too many; or q has no density, draws something for each row, or holds a site at "
            "one value, and leaves out all that this site adds to a width."
        )
    if not posterior.complete:
        missing["the rest of the fit"] = "it was stopped: all of this is of what there was by then."
    rows = "" if looked is None else f"; {looked.name} at {len(looked.rows.unique())} rows"
    title = f"{posterior.method!r}: {markup.runs(chains, draws)}{rows}"
    return Report(
        title=title, findings=tuple(each for each in found if each is not None), missing=missing
    )


def _found(
    posterior: "Posterior", looked: Looked | None, missing: dict[str, str], *, quick: bool = False
) -> list[Finding]:
    """What says the answer is doubtful, whichever method it is of; `missing` is told the rest."""
    chains, draws = posterior.shape
    found: list[Finding | None] = []
    worth = float(chains * draws)
    if convergence.sampled(posterior):
        chain = convergence.of_chains(posterior, looked)
        found = [*convergence.of_sampler(posterior.stats), *chain]
        worth = min([each.value for each in chain if each.name == "bulk ESS of f"] or [worth])
    if looked is not None:
        spread = collapse.spread(looked)
        scales = spread is not None and spread.doubtful and collapse.of_scales(posterior, looked)
        if scales:
            missing[collapse.SPREAD] = missing[collapse.MOVED] = (
                "f does not depend on the sites, which all have a part in how y varies: it cannot "
                "tell what the data have done to them."
            )
        else:
            found.append(spread)
        try:
            since = collapse.since_prior(posterior, looked, worth, quick=quick)
            found += [each for each in since if not scales or each.name != collapse.MOVED]
        except Exception as error:  # of the model, where its prior takes it: the rest can be told
            missing[collapse.MOVED] = f"{type(error).__name__} at a draw of it: {error}"
        told = collapse.MOVED in missing or any(
            each.name == collapse.MOVED for each in found if each
        )
        if worth < collapse.TELLING and posterior.sites.predicts and not told:
            missing[collapse.MOVED] = (
                f"the draws are worth {math.floor(worth)} independent ones, and with fewer than "
                f"{collapse.TELLING} chance alone makes a distance. Raise draws, or members."
            )
    found.append(collapse.minibatches(posterior))
    return [each for each in found if each is not None]
