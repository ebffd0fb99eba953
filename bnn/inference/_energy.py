"""Energy: a Pyro model and its data as a function of one flat unconstrained vector.

z = concatenation over latent sites of T^-1(value), with T = biject_to(support), so that

    log p(z, data) = log p(data | values) + log p(values) + log |det dT/dz|.

The methods see this function and its gradient, batched over chains or particles, and nothing of
Pyro; how it is evaluated is decided here.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import ComposeTransform, IndependentTransform
from torch.func import vmap

from bnn.data import Data, take
from bnn.errors import ApproximationWarning, FitError, ModelError, PerformanceWarning, outside
from bnn.handlers import At, Capture, NotFinite, Score, at_another_draw, branch, seeded, singular
from bnn.inference._compile import first_line
from bnn.method import Model, Tensors
from bnn.sites import Sites, to_support

_FAR = 1e4  # on the real line: beyond what any transform tells apart
_BOUND = 2.0  # of the coordinates of a starting point
_ATTEMPTS, _DRAWN_IN = 100, 20  # at a starting point; those after which it is within +-2
_STUCK, _EDGE = 0.1, 50.0  # draws that are the same number, as far out as e^50 or e^-50
_FEW = 100  # rows that a model is run on where only its latent sites are looked at


@dataclass(frozen=True)
class Slot:
    """Where a site lies in the flat vector, and how to reach its support from there."""

    name: str
    start: int
    size: int
    free: tuple[int, ...]  # shape before the transform
    transform: Any  # torch's Transform

    @property
    def span(self) -> slice:
        """The entries of the flat vector."""
        return slice(self.start, self.start + self.size)

    @property
    def real(self) -> bool:
        """True where the transform is the identity: the site takes any real value."""
        transform = self.transform
        while isinstance(transform, IndependentTransform):
            transform = transform.base_transform
        return isinstance(transform, ComposeTransform) and not transform.parts


class Energy:
    """The log joint density of a model and data over a flat vector z, (..., size).

    Args:
        model: the user's model.
        data: its arguments, checked.
        sites: what the contract check found in it.

    Attributes:
        size: entries of z.
        slots: where each site lies in z, in the model's order.

    Example:
        >>> import bnn
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> fitted = bnn.fit(bnn.models.linear(1), x, x[:, 0], method=bnn.MAP(steps=300))
        >>> energy = Energy(fitted.model, fitted.data, fitted.sites)  # a method's fit is given them
        >>> [slot.name for slot in energy.slots], energy.size
        (['layers.0.weight', 'layers.0.bias', 'sigma'], 3)
        >>> z = torch.zeros(5, energy.size)  # five chains
        >>> energy.batched(lambda one: energy.log_joint(one, fitted.data.tensors), z).shape
        torch.Size([5])
        >>> energy.unflatten(z)["sigma"]  # exp(0)
        tensor([1., 1., 1., 1., 1.])
    """

    def __init__(self, model: Model, data: Data, sites: Sites):
        self.model, self.data, self.sites = model, data, sites
        self.slots: list[Slot] = []
        start = 0
        for name, site in sites.latent.items():
            transform = to_support(site.support)
            free = tuple(transform.inverse_shape(torch.Size(site.shape)))
            size = int(np.prod(free, dtype=int))
            self.slots.append(Slot(name, start, size, free, transform))
            start += size
        self.size = start
        self._lifted = True

    def values(self, z: Tensor) -> Tensors:
        """The sites at one flat vector (size,), in the space the model states."""
        return {
            s.name: s.transform(part) for s, part in zip(self.slots, self.parts(z), strict=True)
        }

    def parts(self, z: Tensor) -> list[Tensor]:
        """Each site's own entries, in one operation whose gradient is one too."""
        parts = z.split([s.size for s in self.slots])
        return [part.reshape(s.free) for s, part in zip(self.slots, parts, strict=True)]

    def unflatten(self, z: Tensor) -> Tensors:
        """The sites at many flat vectors: (*lead, size) -> (*lead, *site) each."""
        lead = z.shape[:-1]
        return {
            s.name: s.transform(z[..., s.span].reshape(*lead, *s.free)).contiguous()
            for s in self.slots
        }

    def flatten(self, values: Mapping[str, Tensor]) -> Tensor:
        """The flat vector of one draw; the inverse of `values`."""
        parts = [s.transform.inv(values[s.name]).reshape(-1) for s in self.slots]
        return torch.cat(parts) if parts else torch.zeros(0)

    def terms(
        self,
        z: Tensor,
        args: Sequence[Any],
        *,
        jacobian: bool = True,
        elsewhere: Mapping[str, Callable[[Any], Tensor]] | None = None,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Log p(data | z) and log p(z) at one flat vector; on a minibatch, scaled to all rows.

        Args:
            z: flat vector, (size,).
            args: the model's arguments, on all rows or on a minibatch.
            jacobian: False leaves out log |det dT/dz|, for modes in the model's own space.
            elsewhere: see `bnn.handlers.Score`.
            weights: how often each row of `args` counts, (row,); see `bnn.handlers.Score`.
        """
        score = Score(self.sites.plate, self.data.rows, elsewhere, weights)
        with score, At(self.values(z)) as at:
            self.model(*args)
        if at.missed:
            raise ModelError(
                f'The latent site "{at.missed}" appeared in the fit and not before: the model '
                "branches on a value. Every run must pass the same sites."
            )
        prior = torch.as_tensor(score.prior, dtype=z.dtype)
        if jacobian:
            prior = prior + self.log_jacobian(z)
        return torch.as_tensor(score.likelihood, dtype=z.dtype), prior

    def log_jacobian(self, z: Tensor) -> Tensor:
        """Log |det dT/dz| summed over sites, at one flat vector."""
        total = z.new_zeros(())
        if all(s.real for s in self.slots):
            return total
        for s, free in zip(self.slots, self.parts(z), strict=True):
            if not s.real:
                total = total + s.transform.log_abs_det_jacobian(free, s.transform(free)).sum()
        return total

    def log_joint(self, z: Tensor, args: Sequence[Any], *, jacobian: bool = True) -> Tensor:
        """Log p(data, z) at one flat vector, (size,) -> ()."""
        likelihood, prior = self.terms(z, args, jacobian=jacobian)
        return likelihood + prior

    def culprit(self, z: Tensor, args: Sequence[Any]) -> str | None:
        """The first site whose value, log density or slope is not finite at a flat vector, or None.

        Args:
            z: flat vector, (size,).
            args: the model's arguments.
        """
        z = z.detach().clone().requires_grad_()
        try:
            return self._broken(z, args)
        except RuntimeError as error:
            if not singular(error):
                raise
            return None

    def _broken(self, z: Tensor, args: Sequence[Any]) -> str | None:
        broken = self._entry(z)
        if broken is None:
            with torch.no_grad(), NotFinite() as seen, At(self.values(z)):
                self.model(*args)
            broken = seen.site
        if broken is None and self.slots:
            (slope,) = torch.autograd.grad(self.log_joint(z, args), z, allow_unused=True)
            broken = None if slope is None else self._entry(slope)
        return broken

    def _entry(self, z: Tensor) -> str | None:
        """The first site with an entry that is not finite in a flat vector."""
        return next((s.name for s in self.slots if not torch.isfinite(z[s.span]).all()), None)

    def batched(self, function: Callable[..., Any], *args: Tensor, of: str = "") -> Any:
        """Lifts a function of one particle over the first axis of its arguments.

        Some models cannot be lifted (they branch on values, or draw random numbers in place): those
        are looped over, and so is one alone.

        Args:
            function: of one particle.
            *args: of all, (particle, *) each.
            of: what they are; named, whoever waits for their loop is told of it, once.
        """
        if len(args[0]) == 1:  # each operation costs less where it is not lifted
            one = function(*(a[0] for a in args))
            return one[None] if isinstance(one, Tensor) else tuple(each[None] for each in one)
        reason = ""
        if self._lifted:
            try:
                return vmap(function, randomness="different")(*args)
            except (ModelError, FitError):
                raise
            except Exception as error:  # the loop below tells what else is wrong
                reason = first_line(error)
        runs = [function(*(a[i] for a in args)) for i in range(len(args[0]))]
        if self._lifted and of:
            warnings.warn(
                f"The model cannot be run for all {of} in one call ({reason}): they run one after "
                "the other, to the same law. Write it with tensor operations, without branches on "
                "values, to make it fast.",
                PerformanceWarning,
                stacklevel=outside(),
            )
        self._lifted = False
        if isinstance(runs[0], Tensor):
            return torch.stack(runs)
        return tuple(torch.stack(each) for each in zip(*runs, strict=True))

    def initial(self, count: int, seed: np.random.SeedSequence) -> Tensor:
        """`starts` of ascents; warns where a model is random by itself, as samplers refuse it."""
        points = self.starts(count, seed)
        if self.size and not self.sites.subsampled:
            args = self.data.tensors
            with seeded(branch(seed, 0, _ATTEMPTS)), torch.no_grad():
                first, second = (self.log_joint(points[0], args) for _ in range(2))
            if not torch.equal(first.nan_to_num(), second.nan_to_num()):
                warnings.warn(
                    "The model is random beyond its sample statements: two runs at the same values "
                    f"have the log densities {float(first):.4g} and {float(second):.4g}. The fit "
                    "is to the mean over that noise, which stays in predictions and is no part of "
                    "the draws. Is a dropout layer in training mode? Call net.eval(), or use "
                    "MCDropout(), whose draws are its masks.",
                    ApproximationWarning,
                    stacklevel=outside(),
                )
        return points

    def starts(
        self, count: int, seed: np.random.SeedSequence, *, overdispersed: bool = False
    ) -> Tensor:
        """Starting points: draws of the prior, each coordinate held within bounds, (count, size).

        A prior draw has the scale that the user gave each weight; bounds of +-2 keep vague and
        heavy-tailed priors from starting where the gradient vanishes. They are around 0, or around
        the prior's median where 0 is out of the prior's reach (a scale in large units; not one so
        vague that its draws are rounded to the smallest of numbers).

        Args:
            count: of points.
            seed: of the draws.
            overdispersed: for chains, which ought to find every mode: the bounds are two standard
                deviations of the prior where that is more, drawn in to +-2 as far as it takes for
                rounding errors of the density to stay below 1. Their gradient is finite too.

        Raises:
            FitError: no point with a finite density and gradient was found.
        """
        if not self.size:
            return torch.zeros(count, 0)
        draws = self.prior_draws(32, seed)
        median, reach = draws.median(0).values, 2 * draws.std(0)
        for slot in (slot for slot in self.slots if not slot.real):
            own = draws[:, slot.span]
            for edge in (own.amin(0), own.amax(0)):  # of float32, and not of a prior beyond it
                stuck = ((own == edge).double().mean(0) > _STUCK) & (edge.abs() > _EDGE)
                reach[slot.span] = torch.where(stuck, torch.inf, reach[slot.span])
        centre = torch.where(median.abs() > reach, median, 0.0)
        wide = torch.full_like(median, _BOUND)
        if overdispersed:
            low, high = draws.quantile(0.16, 0), draws.quantile(0.84, 0)  # heavy tails have no sd
            wide = (high - low).clamp_min(_BOUND)
        points = []
        for chain in range(count):
            for attempt in range(_ATTEMPTS):
                nearer = min(attempt / _DRAWN_IN, 1.0)
                bound = wide ** (1 - nearer) * _BOUND**nearer
                with seeded(branch(seed, chain, attempt)):
                    z = centre + (self._prior_draw() - centre).clamp(-bound, bound)
                    if self._workable(z, slope=overdispersed, resolved=nearer < 1):
                        points.append(z)
                        break
            else:
                raise FitError(
                    "No starting point has a finite log density and gradient in "
                    f"{_ATTEMPTS} draws of the prior. Narrow the priors, or rescale the data.",
                    step=0,
                )
        return torch.stack(points)

    def _workable(self, z: Tensor, *, slope: bool, resolved: bool) -> bool:
        """True if the density is finite; for a chain its slope too, and rounding errors below 1."""
        z = z.detach().requires_grad_(slope)
        try:
            with torch.set_grad_enabled(slope):
                value = self.log_joint(z, self.data.tensors)
        except RuntimeError as error:
            if not singular(error):
                raise
            return False
        finite, size = bool(torch.isfinite(value)), float(value.detach().abs())
        if not finite or not slope:
            return finite
        if resolved and size * torch.finfo(value.dtype).eps >= 1:
            return False
        if not value.requires_grad:
            return True
        (found,) = torch.autograd.grad(value, z, allow_unused=True)
        return found is None or bool(torch.isfinite(found).all())

    def prior_scale(self, seed: np.random.SeedSequence) -> Tensor:
        """Rough prior standard deviation of each coordinate, within [1e-3, 1], (size,)."""
        if not self.size:
            return torch.zeros(0)
        return self.prior_draws(32, seed).std(0).clamp(1e-3, 1.0)

    def prior_draws(self, count: int, seed: np.random.SeedSequence) -> Tensor:
        """Draws of the prior, (count, size)."""
        with seeded(seed), torch.no_grad():
            return torch.stack([self._prior_draw() for _ in range(count)])

    def _prior_draw(self) -> Tensor:
        with Capture(self.sites.observed) as capture:
            at_another_draw(lambda: self.model(*self.few))
        z = self.flatten(capture.values)  # a draw rounded to the edge of its support is at infinity
        return torch.nan_to_num(z, nan=0.0, posinf=_FAR, neginf=-_FAR)

    @cached_property
    def few(self) -> tuple[Any, ...]:
        """Arguments that show every latent site: a few rows, where no site counts the rows."""
        args = self.data.tensors
        if self.sites.locals or self.sites.subsampled or len(args[-1]) <= _FEW:
            return args
        few = take(args, slice(0, _FEW))
        try:
            with Capture(self.sites.observed) as run:
                self.model(*few)
        except Exception:  # the model states its number of rows
            return args
        shapes = {k: tuple(v.shape) for k, v in run.values.items()}
        same = all(shapes.get(k) == site.shape for k, site in self.sites.latent.items())
        return few if same else args  # a group counted from the rows, a process over them
