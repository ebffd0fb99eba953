"""Ensembles: what the methods share whose draws are nets trained side by side."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bnn.diagnostics import Finding
from bnn.diagnostics.functions import look
from bnn.errors import DataError, ModelError
from bnn.handlers import branch, generator, seeded
from bnn.inference._energy import Energy
from bnn.inference._members import Members
from bnn.inference._optimise import Optimised, maximise
from bnn.inference._snapshots import Snapshots
from bnn.method import check_count, check_parts
from bnn.parts import joined
from bnn.posterior import Posterior
from bnn.sites import require_continuous, require_minibatches

BOOTSTRAPS = ("bernoulli", "exponential", "resample")
_SAME = 0.01  # of the standard deviation of a prediction: closer, they found one mode,
_TENTH = 0.1  # but where rows are so many that one number is known better: a tenth of its doubt


@dataclass(frozen=True, kw_only=True)
class Ensemble(Optimised):
    """The settings of every ensemble.

    Attributes:
        members: how many; each is a draw.
        bootstrap: None shows each member all rows once. Otherwise a row counts for a member, over
            the whole fit, as often as was drawn at its start: "bernoulli", never or twice;
            "exponential", by an exponential number of mean 1 (the Bayesian bootstrap); "resample",
            as often as in a sample of all rows with replacement.
        snapshots: copies of all members on their way, evenly spaced: see `Posterior.frames`.
        parts: fits that the members are divided into, for `fit(executor=)`.
    """

    members: int = 5
    bootstrap: str | None = None
    snapshots: int = 0
    parts: int = 1

    @property
    def abreast(self) -> int:
        """See `Method.abreast`."""
        return self.members

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        check_count(name, members=self.members)
        if self.snapshots != 0:
            check_count(name, snapshots=self.snapshots)
        check_parts(self)
        if self.parts > 1 and self.snapshots:
            told = f"{name}(snapshots={self.snapshots}, parts={self.parts})"
            raise ValueError(f"{told}: parts are trained apart, and no copy is of all members.")
        if self.bootstrap is not None and self.bootstrap not in BOOTSTRAPS:
            raise ValueError(
                f"{name}(bootstrap={self.bootstrap!r}): known are None, "
                f"{', '.join(map(repr, BOOTSTRAPS))}."
            )

    def join(self, parts: Sequence[Posterior]) -> Posterior:
        """See `Method.join`: members are draws of one chain, and the history is their mean."""
        each = [part.history for part in parts for _ in range(part.shape[1])]
        histories = [history for history in each if history is not None]
        return replace(joined(parts, axis=1), history=_mean(histories))

    @property
    def is_point(self) -> bool:
        """One member is a mode."""
        return self.members == 1

    def findings(self, posterior: Posterior) -> list[Finding]:
        """See `Method.findings`."""
        return [*super().findings(posterior), *of_members(posterior)]

    def at_fit(self, posterior: Posterior) -> list[Finding]:
        """See `Method.at_fit`."""
        return [*super().at_fit(posterior), *of_members(posterior)]


def of_members(posterior: Posterior) -> list[Finding]:
    """How far members disagree in f, and how well so few of them tell a width."""
    count = posterior.shape[1]
    if count == 1:
        return []
    try:
        looked = look(posterior)
    except ModelError:  # the report tells what is missing
        return []
    f, prediction = looked.values.flatten(0, 1), looked.prediction  # (member, quantity)
    between, whole = f.std(0, correction=0).square().mean().sqrt(), f.std()
    if prediction is not None and prediction.probs is None:
        noisy = prediction.total.double().mean().sqrt()
        whole = noisy if bool(noisy.isfinite()) else whole
    share = float(between / whole.clamp(min=1e-30))
    limit = min(_SAME, _TENTH / math.sqrt(posterior.data.rows))
    alike = share < limit
    error = 1 / math.sqrt(2 * (count - 1))
    return [
        Finding(
            name="diversity of members",
            value=share,
            threshold=limit,
            doubtful=alike,
            meaning=f"The {count} members differ in {looked.name} by {share:.2g} of the standard "
            "deviation of a prediction"
            + (
                ": they found the same function, and the posterior has no variance."
                if alike
                else "."
            ),
            advice="Use bootstrap, or bnn.RandomizedPriors with prior=None, whose members differ.",
        ),
        Finding(
            name="members",
            value=count,
            threshold=None,
            unlimited="how exact a width has to be is for its use to say",
            doubtful=False,
            meaning=f"The standard deviation of {count} members is known to {error:.0%}.",
            advice="Raise members fourfold to know it twice as well.",
        ),
    ]


def bootstrap(
    kind: str | None, members: int, rows: int, seed: np.random.SeedSequence
) -> dict[str, Tensor]:
    """How often each row counts for each member: {"weights": (member, row)}, all of mean 1.

    "bernoulli" is Osband's double or nothing, "exponential" Rubin's Bayesian bootstrap but for the
    sum of the weights; both have variance 1. "resample" is Efron's: whole numbers that add up to
    the rows.
    """

    def one(draws: torch.Generator) -> Tensor:
        if kind == "bernoulli":
            return 2.0 * torch.randint(2, (rows,), generator=draws)
        if kind == "exponential":
            return torch.empty(rows).exponential_(generator=draws)
        return torch.randint(rows, (rows,), generator=draws).bincount(minlength=rows) * 1.0

    if kind is None:
        return {}
    each = [one(generator(branch(seed, member))) for member in range(members)]
    return {"weights": torch.stack(each).to(torch.get_default_dtype())}


def require_rows(energy: Energy, what: str) -> None:
    """Refuses data and models that do not say which row is which, where something belongs to a row.

    Raises:
        DataError: the data are a loader.
        ModelError: the model's own plate draws rows, or there is no plate.
    """
    data, sites = energy.data, energy.sites
    if data.loader is not None:
        raise DataError(
            f"{what} belongs to a row for the whole fit, and a DataLoader does not tell which rows "
            "it yields. Pass tensors, and batch_size for minibatches."
        )
    if sites.subsampled:
        raise ModelError(
            f'{what} belongs to a row for the whole fit, and the plate "{sites.plate}" draws rows '
            "by itself. Leave its subsample_size out, and fit with batch_size."
        )
    if sites.plate is None:
        raise ModelError(
            f'{what} belongs to a row, and "{sites.observed}" is in no plate with one entry for '
            'each. Put it in: with pyro.plate("data", len(x)).'
        )


def train(
    method: Ensemble,
    energy: Energy,
    one: Callable[..., tuple[Tensor, Tensor]],
    *,
    seed: np.random.SeedSequence,
    progress: bool,
    rows: Mapping[str, Tensor] | None = None,
    whole: Mapping[str, Tensor] | None = None,
) -> Posterior:
    """Brings every member, from a draw of the prior of its own, to an optimum.

    Args:
        method: the settings.
        energy: the model and its data.
        one: log likelihood and log prior of a member, see `Members`.
        seed: of starting points and minibatches.
        progress: show a bar.
        rows: what members have for each row, (member, row, *).
        whole: what members have besides, (member, *).

    Returns:
        A posterior of one chain, each draw a member; its history is the mean over members.
    """
    data, sites, what = energy.data, energy.sites, type(method).__name__
    require_continuous(sites, what)
    if sites.params:
        raise ModelError(
            f"{what} gives every member its own weights, and the trainable tensors without a "
            f"prior ({', '.join(sites.params[:3])}) have one value only. Give them a prior."
        )
    if data.loader is not None or sites.subsampled or method.batch_size is not None:
        require_minibatches(sites, what)
    members = Members(method.members, energy, one, data, method.batch_size, rows, whole)
    starts = energy.initial(method.members, branch(seed, 0))
    snapshots = Snapshots(starts, method.snapshots)
    with seeded(branch(seed, 2)):
        histories = maximise(
            members.objective,
            {"mode": starts[0] if members.axis is None else starts},
            members.batches(branch(seed, 3)),
            method,
            what=what,
            label="log joint",
            progress=progress,
            members=members.axis,
            culprit=members.culprit,
            epoch=None if sites.subsampled else data.epoch(method.batch_size),
            seed=None if sites.subsampled else branch(seed, 4),
            watch=snapshots if method.snapshots else None,
        )
    steps, copies = snapshots.picked() if method.snapshots else (None, None)
    return Posterior(
        model=energy.model,
        method=method,
        data=data,
        sites=sites,
        draws={k: v[None] for k, v in energy.unflatten(starts.detach()).items()},
        history=_mean(histories),
        snapshots={} if copies is None else energy.unflatten(copies[:, None]),
        snapshot_steps=steps,
    )


def _mean(histories: list[Tensor]) -> Tensor:
    """Over members, (step,); one that has ended counts as it ended."""
    length = max(len(each) for each in histories)
    full = [torch.cat([each, each[-1:].expand(length - len(each))]) for each in histories]
    return torch.stack(full).mean(0)
