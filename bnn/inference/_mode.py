"""Mode: the last stretch to a maximum of the log joint, and the proof that it is one.

Adam leaves a gradient. In the coordinates u of s = centre + R u, R R^T = H^-1, the log joint is
nearly -|u|^2 / 2, so that L-BFGS takes a few passes over the rows and its gradient is in units of
the posterior: 1 is a standard deviation.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bnn.errors import ConvergenceWarning, FitError, outside
from bnn.handlers import branch, generator
from bnn.inference._joint import Joint
from bnn.inference._precision import Diagonal, NotPositive, Precision

_ROUNDS = 5  # of a new H and a climb with it
_PASSES = 40  # gradients in a climb
_CLOSE = 1e-3  # posterior standard deviations from the mode: near enough
_DOUBTFUL, _WRONG = 0.1, 0.5  # and of these the first is warned of, the second refused
_RISE, _FAR = 0.1, 1.0  # nats that held sites would gain: the same
_ROUNDING = 8  # roundings of the log joint that are no gain
Shape = Callable[[Joint, Tensor], Precision]


@dataclass(frozen=True)
class Mode:
    """A mode and the Gaussian there.

    Attributes:
        joint: the log joint.
        s: its free entries at the mode, (size,).
        precision: of the Gaussian.
    """

    joint: Joint
    s: Tensor
    precision: Precision

    @property
    def z(self) -> Tensor:
        """The mode with the entries that are held, (size of z,)."""
        return self.joint.lift(self.s)

    def draws(self, count: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws of z, (draw, size of z), and their log density under the Gaussian, (draw,)."""
        noise = torch.randn((count, len(self.s)), generator=source, dtype=torch.float64)
        each = -0.5 * (noise.square() + math.log(2 * math.pi)).sum(1)
        return (
            self.joint.lift(self.s + self.precision.spread(noise)),
            each + 0.5 * self.precision.log_det,
        )

    def log_evidence(self, given: Iterable[str] = ()) -> float:
        """Log p(data | the given sites), nats: their own prior does not count."""
        without = {name: lambda fn: torch.zeros(()) for name in given}
        value, _ = self.joint.gradient(self.s, without)
        volume = len(self.s) * math.log(2 * math.pi) - self.precision.log_det
        return value + 0.5 * volume


def drawn(modes: Sequence[Mode], count: int, seed: np.random.SeedSequence) -> tuple[Tensor, Tensor]:
    """Draws of each Gaussian, (mode, draw, size of z), and their log density, (mode, draw)."""
    each = [m.draws(count, generator(branch(seed, i))) for i, m in enumerate(modes)]
    draws, log_q = (torch.stack(parts) for parts in zip(*each, strict=True))
    return draws, log_q


def polish(joint: Joint, shape: Shape, *, proof: bool = True, tuned: bool = False) -> Mode:
    """Climbs from the base of the joint to a mode, and proves it.

    Args:
        joint: the log joint, at a point near a mode.
        shape: its precision at a point.
        proof: False is content with what a climb reaches.
        tuned: held sites are at the maximum of the evidence, and need not be at a mode.

    Raises:
        FitError: the log joint curves upwards, or its gradient does not vanish; or a step of the
            sites that are held would raise it.
    """
    s = joint.start.double()
    rounds = _ROUNDS if proof else 1
    for number in range(rounds + 1):
        failure = None
        try:
            precision = shape(joint, s)
        except NotPositive as error:
            precision, failure = _round(s), error
        slope = joint.gradient(s)[1]
        left = _left(precision, slope)
        if failure is None and (left.max() < _CLOSE or number == rounds):
            if proof and not left.max() <= _DOUBTFUL:  # nor is NaN
                _tell(joint, slope, left)
            mode = Mode(joint, s, precision)
            if proof and not tuned:
                _check_rise(mode)
            return mode
        if failure is not None and number == rounds:
            raise upwards(joint, failure)
        s = _climb(joint, s, precision)
    raise AssertionError


def _round(s: Tensor) -> Precision:
    """Unit precision, where that of the log joint is none."""
    return Precision([(torch.arange(len(s)), Diagonal(torch.ones(len(s), dtype=torch.float64)))])


def _left(precision: Precision, slope: Tensor) -> Tensor:
    """How far each entry is from the mode, in its posterior standard deviations, (size,)."""
    if not len(slope):
        return slope.new_zeros(1)
    return precision.spread(precision.pull(slope)).abs() / precision.sd


def _climb(joint: Joint, centre: Tensor, units: Precision) -> Tensor:
    """L-BFGS in u, then plain steps u + gradient while they shorten it.

    The line search compares values, whose rounding ends it early; the steps look at gradients only.
    """
    u = torch.zeros_like(centre).requires_grad_()
    best = [float("-inf"), centre]

    def at(u: Tensor) -> tuple[float, Tensor]:
        s = centre + units.spread(u)
        value, slope = joint.gradient(s)
        if value > best[0]:
            best[:] = value, s
        return value, units.pull(slope)

    def closure() -> float:
        value, pull = at(u.detach())
        u.grad = -torch.nan_to_num(pull)
        return -value

    optimiser = torch.optim.LBFGS(
        [u],
        max_iter=_PASSES,
        max_eval=_PASSES,
        tolerance_grad=0.1 * _CLOSE,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )
    optimiser.step(closure)  # type: ignore[arg-type]
    s = best[1]
    pull = units.pull(joint.gradient(s)[1])
    for _ in range(_PASSES):
        ahead = s + units.spread(pull)
        following = units.pull(joint.gradient(ahead)[1])
        if not following.norm() < 0.9 * pull.norm():
            break
        s, pull = ahead, following
    return s


def upwards(joint: Joint, failure: NotPositive) -> FitError:
    """The error that names the direction in which there is no maximum."""
    entry = int(failure.direction.abs().argmax())
    site, place = joint.name(entry)
    share = float(failure.direction[entry].square() / failure.direction.square().sum())
    return FitError(
        f"Laplace found no mode: minus the Hessian of the log joint has the eigenvalue "
        f'{failure.value:.3g}, in a direction that is to {share:.0%} entry {place} of "{site}". '
        "There the log joint is flat or curves upwards, so that no Gaussian fits it. Use "
        'hessian="ggn", narrow the prior of that site, leave it out by sites=(...), or start '
        "elsewhere (seed, restarts).",
        site=site,
    )


def _tell(joint: Joint, slope: Tensor, left: Tensor) -> None:
    """Refuses what is no mode, and warns of what is nearly one."""
    entry = int(left.argmax())
    site, place = joint.name(entry)
    found = (
        f'the gradient ({float(slope[entry]):.3g}) would still move entry {place} of "{site}" by '
        f"{float(left[entry]):.2g} posterior standard deviations"
    )
    _doubt(found, site, refused=not left.max() <= _WRONG)


def _check_rise(mode: Mode) -> None:
    """Refuses, or warns of, a mode of some sites around which the others are at none.

    One step along their gradient, as long as its curvature asks for, tells how much they would gain
    at least: a bound from below, of a climb that has not ended.

    Raises:
        FitError: a nat or more.
    """
    joint = mode.joint
    free = {slot.name for slot in joint.slots}
    others = [slot.name for slot in joint.energy.slots if slot.name not in free]
    if not others:
        return
    around = Joint(joint.energy, joint.data, joint.batch_size, mode.z.detach(), others)
    s = around.start.double()
    value, slope = around.gradient(s)
    size = slope.norm()
    if size == 0:
        return
    ahead = slope / size
    curvature = -(ahead @ (around.gradient(s + _CLOSE * ahead)[1] - slope)) / _CLOSE
    step = min(float(size / curvature), 1.0) if curvature > 0 else _DOUBTFUL
    rises = [around.gradient(s + part * step * ahead)[0] - value for part in (1.0, 0.25)]
    rise = max((rise for rise in rises if not math.isnan(rise)), default=math.nan)
    rise -= _ROUNDING * torch.finfo(joint.base.dtype).eps * abs(value)
    if not rise <= _RISE:  # nor is NaN
        site, _ = around.name(int(slope.abs().argmax()))
        found = (
            f'one step of "{site}" and what else is held would raise the log joint by {rise:.2g}'
        )
        _doubt(found, site, refused=not rise <= _FAR)


def _doubt(found: str, site: str, *, refused: bool) -> None:
    """Raises what was found, or warns of it."""
    cure = (
        "Raise steps, pass a larger batch_size, or replace what has kinks (ReLU by tanh or "
        "softplus): at a kink no gradient vanishes."
    )
    if refused:
        raise FitError(f"Laplace is not at a mode: {found}. {cure}", site=site)
    warnings.warn(
        f"Laplace is only near a mode: {found}. {cure}", ConvergenceWarning, stacklevel=outside()
    )
