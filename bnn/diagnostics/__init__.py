"""Diagnostics: what the draws, and what the fit noted on its way, say about the answer.

Weights of a net are not identified: units swap, signs flip. Convergence is therefore looked at
where the model is the same whichever weights make it: f at some rows, the log density, and single
numbers such as a noise scale. Nothing here asks which method it was; a method adds what only it can
tell by `Method.findings`.
"""

from typing import TYPE_CHECKING, Any

from bnn import markup
from bnn.diagnostics import collapse, convergence
from bnn.diagnostics.functions import look
from bnn.diagnostics.report import Finding, Report, warn
from bnn.errors import ModelError

if TYPE_CHECKING:
    from bnn.posterior import Posterior

__all__ = ["Finding", "Report", "at_fit", "diagnose", "warn"]


def at_fit(posterior: "Posterior") -> list[Finding]:
    """What every fit looks at by itself, for it costs little."""
    rows = collapse.minibatches(posterior)
    own = posterior.method.at_fit(posterior)
    return [*convergence.at_fit(posterior), *([] if rows is None else [rows]), *own]


def diagnose(posterior: "Posterior", *inputs: Any) -> Report:
    """See `Posterior.diagnose`."""
    chains, draws = posterior.shape
    missing: dict[str, str] = {}
    try:
        looked = look(posterior, *inputs)
    except ModelError as error:
        looked, missing["f"] = None, str(error)
    found: list[Finding | None] = []
    worth = float(chains * draws)
    if convergence.sampled(posterior):
        found += convergence.of_sampler(posterior.stats)
        chain = convergence.of_chains(posterior, looked)
        found += chain
        worth = min([each.value for each in chain if each.name == "bulk ESS of f"] or [worth])
    elif chains > 1 and looked is not None:
        found.append(convergence.of_starts(looked))
    else:
        missing["R-hat, ESS"] = "draws of one run, not of Markov chains: nothing could disagree."
    if looked is not None:
        found += [collapse.spread(looked), collapse.against_prior(posterior, looked, worth)]
    found += [collapse.balance(posterior), collapse.minibatches(posterior)]
    own = posterior.method.findings(posterior)
    found += own
    if "log_q" in posterior.stats and not any("k-hat" in each.name for each in own):
        missing["k-hat of q"] = (
            "it takes the log density of all rows at each draw: rows came from a loader or are "
            "drawn by the model's plate, or are too many; or q holds a site at one value, and "
            "leaves out all that this site adds to a width."
        )
    rows = "" if looked is None else f"; {looked.name} at {len(looked.rows.unique())} rows"
    title = f"{posterior.method!r}: {markup.runs(chains, draws)}{rows}"
    return Report(
        title=title, findings=tuple(each for each in found if each is not None), missing=missing
    )
