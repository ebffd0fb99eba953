"""Prior functions: a model's own f at a draw of its own prior, as part of a larger program.

    p(x) = f(x; w~) - f(x; E[w]),    w~ ~ prior

It is 0 on average wherever f is linear in w, whatever units f has. The model is run twice more, as
far as f; of these runs the rest of a program sees the latent sites of the first alone, under names
of their own.
"""

from collections.abc import Callable
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions.constraints import is_dependent

from bnn.data import shape_of
from bnn.errors import ModelError
from bnn.handlers import At, Capture, Rewrite, branch, is_statement, seeded, unvalidated
from bnn.inference._energy import Energy
from bnn.method import Model, Tensors
from bnn.observations import innermost
from bnn.sites import to_support

PREFIX = "prior."
SEAM = "f"


def prior_function(model: Model, args: tuple[Any, ...]) -> Tensor:
    """The function p at the arguments; states what latent sites f needs as "prior.<site>"."""
    return _f(model, args, _Drawn()) - _f(model, args, _AtMean())


def prior_mean(fn: Any) -> Tensor:
    """The mean of a distribution; where it has none, the middle of the map from the real line."""
    fn = unvalidated(fn)
    transform = to_support(fn.support)
    middle = transform(torch.zeros(transform.inverse_shape(fn.shape())))
    try:
        mean = fn.mean
    except (NotImplementedError, AttributeError):
        return middle
    return torch.where(torch.isfinite(mean), mean, middle)


def like_f(value: Any, f: Tensor) -> Tensor:
    """What a function of the user's gives, in the shape of f; axes of size 1 at the end are free.

    Raises:
        ModelError: another shape.
    """
    value = torch.as_tensor(value, dtype=f.dtype, device=f.device)
    if _trimmed(value) != _trimmed(f):
        raise ModelError(
            f"The prior function gives {shape_of(value)} and f is {shape_of(f)}. Return a number "
            "for each entry of f."
        )
    return value.reshape(f.shape)


def _trimmed(value: Tensor) -> tuple[int, ...]:
    shape = tuple(value.shape)
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def require_function(prior: Callable[..., Any], inputs: tuple[Tensor, ...], seed: Any) -> None:
    """Refuses a prior function of the user's that gives no numbers, or others at every call.

    Raises:
        ModelError: so.
    """
    values = []
    for key in range(2):
        with torch.no_grad(), seeded(branch(seed, key)):
            given = prior(*inputs)
        try:
            values.append(torch.as_tensor(given))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"The prior function gives a {type(given).__name__}. Return a number for each "
                "entry of f."
            ) from error
    if not bool(torch.isfinite(values[0]).all()):
        raise ModelError(
            "The prior function gives numbers that are not finite at rows of the data."
        )
    if not torch.equal(*values):
        raise ModelError(
            "The prior function gives other numbers at a second call: members would learn to undo "
            "one that never returns. If it is a net with dropout, call its eval(); if it draws "
            "numbers, draw them once, outside."
        )


def require_f(energy: Energy, seed: Any, what: str) -> None:
    """Refuses a model whose observations do not follow from a seam f of its rows.

    Raises:
        ModelError: f is not announced, has no row axis, depends on local sites, is not used, is
            not free on the real line, or is random beyond the sample statements.
    """
    sites, args = energy.sites, energy.data.tensors
    cure = 'Announce it and go on with what that returns: f = pyro.deterministic("f", f).'
    if SEAM not in sites.seams:
        raise ModelError(
            f"{what} adds a function to the model's output before noise, the seam "
            f'"{SEAM}", and the model announces {sorted(sites.seams) or "none"}. {cure}'
        )
    if not sites.seams[SEAM].local:
        raise ModelError(
            f'{what} adds a function of the rows to "{SEAM}", which has shape '
            f"{sites.seams[SEAM].shape} and so no axis for them. Announce the output, (row, *)."
        )
    if sites.subsampled:
        raise ModelError(
            f'{what} adds a function of the rows, and the plate "{sites.plate}" draws rows by '
            "itself. Leave its subsample_size out, and fit with batch_size."
        )
    if sites.locals:
        raise ModelError(
            f'{what} adds one fixed function, and "{sites.locals[0]}" is random in every row. '
            "Use anchored=True, or a method such as bnn.SVI()."
        )
    if clash := [name for name in sites.latent if name.startswith(PREFIX)]:
        raise ModelError(f'{what} calls its own sites "{PREFIX}..."; rename "{clash[0]}".')
    values = energy.values(energy.prior_draws(1, seed)[0])
    still, up = lambda f: f, lambda f: f + (1 + f.abs()) * (1 + torch.rand_like(f))
    densities = []
    for moved, key in ((still, 0), (still, 1), (up, 0), (lambda f: 2 * f - up(f), 0)):
        seeds = branch(seed, key)
        with seeded(seeds), Rewrite({SEAM: moved}), Capture(sites.observed) as run, At(values):
            energy.model(*args)
        if moved is not still and (broken := _broken(run.fn)):
            raise ModelError(
                f'{what} adds a function to the seam "{SEAM}", which takes {broken} of '
                f'"{sites.observed}" out of its range. Announce f before the link: logits, a log '
                "rate, a mean."
            )
        densities.append(unvalidated(run.fn).log_prob(run.value))
    if not torch.equal(*densities[:2]):
        raise ModelError(
            f"{what} adds a fixed function to the model's own, which differs between two runs at "
            "the same weights. Is a dropout layer in training mode? Call net.eval(), or fit with "
            "bnn.MCDropout()."
        )
    if torch.equal(densities[0], densities[2]):
        raise ModelError(
            f'{what} adds a function to the seam "{SEAM}", and "{sites.observed}" is distributed '
            f"the same whatever that is: the model drops what pyro.deterministic returns. {cure}"
        )


def _broken(fn: Any) -> str:
    """A parameter of a distribution that is out of its range, or nothing."""
    base = innermost(fn)
    for name, range_ in base.arg_constraints.items():
        if name in vars(base) and not range_.is_discrete:
            if not is_dependent(range_) and not bool(range_.check(getattr(base, name)).all()):
                return name
    return ""


def about_anchor(
    values: Tensors, anchor: Tensors, scale: float
) -> dict[str, Callable[[Any], Tensor]]:
    """Priors moved from their mean to an anchor: log densities for `Score(elsewhere=)`.

    Args:
        values: of the latent sites.
        anchor: draws of the prior, of the sites to move.
        scale: of the way to the anchor.
    """

    def moved(name: str) -> Callable[[Any], Tensor]:
        def log_prob(fn: Any) -> Tensor:
            way = scale * (anchor[name] - prior_mean(fn))
            return unvalidated(fn).log_prob(values[name] - way)

        return log_prob

    return {name: moved(name) for name in anchor}


class _Reached(Exception):
    """The run is as far as f."""


class _Drawn(Messenger):
    """Shows a run's latent sites under other names, and nothing else of it; ends it at f."""

    def __init__(self) -> None:
        super().__init__()
        self.f: Any = None

    def _pyro_sample(self, message: Any) -> None:
        if message["name"] == SEAM and message["infer"].get("_deterministic"):
            self.f = message["value"]
            raise _Reached
        if is_statement(message) and not message["is_observed"]:
            self._state(message)
        else:
            message["stop"] = True

    def _state(self, message: Any) -> None:
        message["name"] = PREFIX + message["name"]


class _AtMean(_Drawn):
    """Shows nothing of a run, in which every latent site is at the mean of its prior."""

    def _state(self, message: Any) -> None:
        message["value"], message["stop"] = prior_mean(message["fn"]), True


def _f(model: Model, args: tuple[Any, ...], run: _Drawn) -> Tensor:
    try:
        with run:
            model(*args)
    except _Reached:
        pass
    return run.f
