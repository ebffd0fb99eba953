"""Sites: what the contract check finds in a model, and what a method may ask of it."""

import math
from dataclasses import dataclass, field
from typing import Any

from torch.distributions import biject_to
from torch.distributions.constraints import MixtureSameFamilyConstraint

from bnn.data import Data
from bnn.errors import DataError, ModelError


def to_support(support: Any) -> Any:
    """The transform from the real line, or from a real vector, to a support.

    Raises:
        NotImplementedError: there is none.
    """
    while isinstance(support, MixtureSameFamilyConstraint):  # as that of its components
        support = support.base_constraint
    return biject_to(support)


@dataclass(frozen=True)
class Site:
    """A latent sample statement: its shape, the support of its distribution, where it stands."""

    shape: tuple[int, ...]
    support: Any
    local: bool

    @property
    def discrete(self) -> bool:
        """True where the site takes isolated values."""
        return bool(self.support.is_discrete)


@dataclass(frozen=True)
class Sites:
    """What the contract check found in a model.

    Attributes:
        latent: latent sites by name, in the model's order.
        observed: name of the site that receives the observations.
        plate: name of the data plate, or None where the model states none.
        row_axis: axis of the observed site's log density, counted from the left, that is the row;
            None where the rows are not independent statements.
        rows: number of rows.
        subsample_size: rows that the model's own plate draws at a time; None where it takes all.
        every_row: True if a run on some rows shows each of them: the plate subsamples not, or takes
            all where it is given as many as it draws.
        params: names of trainable tensors without a prior.
        seams: deterministic sites by name.
        predicts: True if the model runs with its observations set to None.
    """

    latent: dict[str, Site]
    observed: str
    plate: str | None
    row_axis: int | None
    rows: int
    subsample_size: int | None
    every_row: bool
    params: tuple[str, ...]
    seams: dict[str, Site]
    predicts: bool
    names: tuple[str, ...] = field(default=())

    @property
    def globals(self) -> tuple[str, ...]:
        """Latent sites outside the data plate: the ones whose draws carry over to new rows."""
        return tuple(name for name, site in self.latent.items() if not site.local)

    @property
    def size(self) -> int:
        """Numbers in all latent sites together."""
        return sum(math.prod(site.shape) for site in self.latent.values())

    @property
    def subsampled(self) -> bool:
        """True if the model's own plate draws a minibatch."""
        return self.subsample_size is not None

    @property
    def locals(self) -> tuple[str, ...]:
        """Latent sites inside the data plate: they belong to a row."""
        return tuple(name for name, site in self.latent.items() if site.local)


def require_continuous(sites: Sites, method: str) -> None:
    """Refuses discrete latent sites, for the methods that need a gradient in every site.

    Raises:
        ModelError: names the site.
    """
    for name, site in sites.latent.items():
        if site.discrete:
            raise ModelError(
                f'{method} needs continuous latent sites, and "{name}" is discrete '
                f"({site.support}). Sum it out by hand, for example with a mixture distribution."
            )


def require_all_rows(data: Data, sites: Sites, method: str) -> None:
    """Refuses minibatches, for the methods that need the log density of all rows.

    Raises:
        DataError: the data are a loader.
        ModelError: the model's own plate draws a minibatch.
    """
    if data.loader is not None:
        raise DataError(
            f"{method} needs all rows at once. Pass tensors in place of a DataLoader or of arrays "
            "mapped from the disk."
        )
    if sites.subsampled:
        raise ModelError(
            f'{method} needs all rows at once, and the plate "{sites.plate}" draws a minibatch. '
            "Remove subsample_size, or use a method that minibatches, such as bnn.SVI()."
        )


def require_every_row(sites: Sites) -> None:
    """Refuses a model that shows some of the rows it is given, to whoever needs each of them.

    Raises:
        ModelError: names the plate.
    """
    if not sites.every_row:
        raise ModelError(
            f'The plate "{sites.plate}" draws {sites.subsample_size} rows whichever it is given. '
            "Give it the number of its inputs, len(x), and a fixed subsample_size; or leave that "
            "out and fit with batch_size, which scales by N/B too."
        )


def require_minibatches(sites: Sites, method: str) -> None:
    """Refuses a model that cannot be shown some of its rows at a time.

    Raises:
        ModelError: no plate says which statements count once a row, or a site belongs to a row.
    """
    if sites.plate is None:
        raise ModelError(
            f"{method} on minibatches scales what is inside the data plate to all rows, and "
            f'"{sites.observed}" is in none. Put it in: with pyro.plate("data", len(x)).'
        )
    if sites.locals:
        raise ModelError(
            f'{method} holds one value of "{sites.locals[0]}" for each row, and a minibatch shows '
            "it some of the rows. Leave batch_size out, or pass a guide that computes the site "
            "from its row."
        )


def require_one_value(sites: Sites, method: str, **runs: int) -> None:
    """Refuses trainable tensors without a prior where several runs would each have their own.

    Args:
        sites: of the model.
        method: name of the method.
        **runs: how many, by the name of the setting.

    Raises:
        ModelError: there are some, and more than one run.
    """
    ((name, count),) = runs.items()
    if sites.params and count > 1:
        raise ModelError(
            f"{method}({name}={count}) gives each of its {name} its own values, and the trainable "
            f"tensors without a prior ({', '.join(sites.params[:3])}) have one value only. "
            f"Use {name}=1, or give them a prior."
        )


def require_no_parameters(sites: Sites, method: str) -> None:
    """Refuses trainable tensors without a prior, for the methods that cannot optimise them.

    Raises:
        ModelError: names them.
    """
    if sites.params:
        raise ModelError(
            f"{method} draws from a posterior, and these have no prior to be drawn from: "
            f"{', '.join(sites.params[:3])}. Give each a prior (bnn.models.sample_weights, "
            "PyroSample), or use a method that optimises them, such as bnn.SVI()."
        )
