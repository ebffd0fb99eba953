"""Functions: what the draws make of some rows, which is the same whichever weights make it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bnn.data import take
from bnn.errors import DataError, ModelError
from bnn.prediction import Prediction

if TYPE_CHECKING:
    from bnn.posterior import Posterior

ROWS = 50  # of the training rows: enough to meet every region of a few inputs
_QUANTITIES = 200  # rows x outputs: each costs a few milliseconds
_CELLS = 10_000_000  # rows x draws that are held at once,
_ALL = 1_000_000_000  # and that are gone through, where no row can be looked at alone
_FEW_ROWS, _FEW_DRAWS = 20, 200  # that every fit looks at,
_CHAIN_DRAWS = 4_000  # and of a sampler, whose draws have cost gradients on all rows
_WORK = 300_000_000  # rows x draws x weights of it


@dataclass(frozen=True, eq=False)
class Looked:
    """The draws' values at some rows.

    Attributes:
        name: "f", or "log p(y | draw)" where f of a training row is more than a function of draws
            that carry over (sites inside the data plate), or the model does not predict.
        values: (chain, draw, quantity).
        rows: the row that each quantity belongs to, (quantity,).
        inputs: the inputs of the rows; () for "log p(y | draw)".
        prediction: that of the rows, or None.
    """

    name: str
    values: Tensor
    rows: Tensor
    inputs: tuple[Tensor, ...] = ()
    prediction: Prediction | None = None


def look(
    posterior: "Posterior", *inputs: Any, rows: int = ROWS, draws: int | None = None
) -> Looked:
    """Looks at f, at rows given or at training rows evenly spread (a loader's first batch).

    Args:
        posterior: whose draws.
        *inputs: the model's arguments without the observations; none takes training rows.
        rows: training rows at most.
        draws: of each chain; None for all.

    Raises:
        DataError: the inputs are not of the kind that the model was fitted to.
        ModelError: the model neither predicts nor states its rows one by one.
    """
    sites, data = posterior.sites, posterior.data
    if inputs:
        prediction = posterior.predict(*inputs, draws=draws)
        if not prediction.f.shape[2]:
            raise DataError("The rows to look at are none. Pass rows, or nothing: training rows.")
        return _of(prediction, torch.arange(prediction.f.shape[2]))
    have = len(data.observations)
    spread = torch.linspace(0, have - 1, min(rows, have)).round().long()
    if sites.predicts and sites.every_row and not sites.locals:
        some = take(data.inputs, spread)
        if sites.plate is None or not some:  # rows may see each other, or the model counts them
            some = thinned(posterior, draws, have).predict(*data.inputs)
            read = lambda part: _of(part.predict(*data.inputs), spread, kept=spread).values
            looked = _of(some, spread, kept=spread)
            return replace(looked, values=_of_all(posterior, draws, have, looked.values, read))
        return _of(posterior.predict(*some, draws=draws), spread)
    if data.loader is not None or sites.row_axis is None or not sites.every_row:
        raise ModelError(
            "f cannot be looked at: the model does not run with its observations set to None, or "
            "has sites inside the data plate whose rows came from a loader."
        )
    read = lambda part: part.log_likelihood()[..., spread].double()
    first = read(thinned(posterior, draws, have))
    return Looked("log p(y | draw)", _of_all(posterior, draws, have, first, read), spread)


def glance(posterior: "Posterior") -> Looked | None:
    """As `look`, at what every fit can spare: a fraction of a second. None where it cannot."""
    sites, (chains, draws) = posterior.sites, posterior.shape
    most = max(4, _CHAIN_DRAWS // chains)
    if "step_size" not in posterior.stats:
        if not sites.predicts or sites.locals:
            return None
        apart = sites.plate is not None and len(posterior.data.names) > 1
        rows = _FEW_ROWS if apart else len(posterior.data.observations)
        most = min(max(2, _FEW_DRAWS // chains), _WORK // (rows * chains * max(sites.size, 1)))
        if most < min(draws, 2):
            return None
    try:
        return look(posterior, rows=_FEW_ROWS, draws=min(draws, most))
    except Exception:  # a fit need not predict; `diagnose` tells what is missing
        return None


def _of(prediction: Prediction, rows: Tensor, kept: Tensor | None = None) -> Looked:
    f = prediction.f if kept is None else prediction.f[:, :, kept]
    flat = f.flatten(2)  # (chain, draw, row * output)
    of = rows.repeat_interleave(flat.shape[-1] // max(len(rows), 1))
    some = torch.linspace(0, len(of) - 1, min(len(of), _QUANTITIES)).round().long()
    return Looked("f", flat[..., some].double(), of[some], prediction.inputs, prediction)


def _of_all(
    posterior: "Posterior",
    draws: int | None,
    rows: int,
    some: Tensor,
    read: Callable[["Posterior"], Tensor],
) -> Tensor:
    """What is read of draws that do not fit into memory together, (chain, draw, quantity).

    Of Markov chains alone: what few of their draws say of R-hat is noise.
    """
    whole = thinned(posterior, draws, rows, _ALL)
    chains, have = whole.shape
    if "step_size" not in posterior.stats or some.shape[1] == have:
        return some
    step = max(1, _CELLS // (max(rows, 1) * chains))
    cut = lambda i: {k: v[:, i : i + step] for k, v in whole.draws.items()}
    return torch.cat([read(replace(whole, draws=cut(i))) for i in range(0, have, step)], 1)


def thinned(
    posterior: "Posterior", draws: int | None, rows: int, cells: int | None = None
) -> "Posterior":
    """With as many draws of each chain, evenly spread, as memory allows, or as many cells."""
    chains, have = posterior.shape
    few = max(2, (cells or _CELLS) // (max(rows, 1) * chains))
    count = min(have, few, have if draws is None else draws)
    keep = torch.linspace(0, have - 1, count).round().long()
    return replace(posterior, draws={k: v[:, keep] for k, v in posterior.draws.items()})
