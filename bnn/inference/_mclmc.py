"""Many microcanonical chains in lockstep: a warmup that learns from all of them, then draws.

Every chain takes as many leapfrogs in a trajectory as every other, a random number common to all,
so one call of the gradient serves all of them and none waits.
"""

import math
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnn.inference import _microcanonical as dynamics
from bnn.inference._metric import estimated, unit
from bnn.inference._microcanonical import Array

ADJUSTED = ("diverging", "energy_error", "acceptance_rate", "n_steps")
UNADJUSTED = ("diverging", "energy_error", "energy_variance", "n_steps")
LEAST = 4  # coordinates: on the line there is no direction to turn
# Shares of warmup after which scales are learned anew, and leapfrogs of a trajectory until then:
# far from the posterior the direction matters, not the length. The rest tunes the step size.
_WINDOWS = ((0.1, 8), (0.15, 24), (0.2, 64), (0.25, 1000))
_MOST = 1000  # leapfrogs in a trajectory, mean
_FEW = 20  # iterations of warmup below which there is one window
_LENGTH = 1.25  # of a trajectory, mean, in standard deviations of a scaled coordinate
_STORED = 2**24  # numbers in the positions that a window keeps
_GAMMA, _OFFSET, _KAPPA = 0.1, 10.0, 0.75  # dual averaging, as in _trajectory


class Sampler:
    """Microcanonical Monte Carlo at a fixed number of chains.

    Args:
        gradient: (chain, size) -> potential (chain,), gradient (chain, size).
        start: where each chain starts, (chain, size).
        seeds: of each chain, (chain, 4) unsigned 64-bit integers.
        shared: random numbers for what the chains have in common.
        target: acceptance rate that the step size aims at.
        report: called back after every iteration with this sampler.
    """

    def __init__(
        self,
        gradient: Callable[[Tensor], tuple[Tensor, Tensor]],
        start: Array,
        seeds: Array,
        shared: np.random.Generator,
        *,
        target: float,
        report: Callable[["Sampler"], Any] = lambda sampler: None,
    ):
        self._gradient, self.target, self.report = gradient, target, report
        self.random, self.shared = seeds.copy(), shared
        self.chains, self.real = start.shape
        # Coordinates beyond the model's are standard normal and independent of it.
        self.size = max(self.real, LEAST)
        self.z = np.zeros((self.chains, self.size), start.dtype)
        self.z[:, : self.real] = start
        self._full = np.zeros_like(self.z)
        self.potential, g = self._asked(self.z)
        self.gradient = g.copy()
        self.u = np.zeros_like(self.z)
        self._work = np.zeros_like(self.z[0])
        self.scale = estimated("diagonal", self.z, self.gradient, unit(self._ones())).scale
        self.step = 0.5 * self.size**-0.25
        self.length = 1.0  # of a trajectory, mean
        self.phase, self.iterations, self.acceptance, self.divergences = "warmup", 0, target, 0

    def _ones(self) -> Array:
        return np.ones(self.size, self.z.dtype)

    def _asked(self, z: Array) -> tuple[Array, Array]:
        """Potential (float64) and gradient, those of added coordinates included."""
        if self.size == self.real:
            potential, slope = self._gradient(torch.from_numpy(z))
            return potential.detach().double().numpy(), slope.detach().contiguous().numpy()
        potential, slope = self._gradient(torch.from_numpy(z[:, : self.real].copy()))
        self._full[:, : self.real] = slope.detach().numpy()
        added = z[:, self.real :]
        self._full[:, self.real :] = added
        return potential.detach().double().numpy() + 0.5 * (added**2).sum(1), self._full

    @property
    def steps(self) -> float:
        """Leapfrogs of a trajectory, mean."""
        return min(max(self.length / self.step, 1.0), _MOST)

    def trajectory(self, mean: float) -> tuple[Array, Array, int]:
        """A proposal for every chain, taken or not: energy errors, acceptance rates, leapfrogs."""
        count = max(1, math.ceil(2 * mean * self.shared.random()))
        z, heat = self.z.copy(), np.zeros(self.chains)
        dynamics.redirect(self.random, self.u)
        potential, slope = self._leapfrogs(z, self.gradient, count, heat)
        error, rate = np.empty(self.chains), np.empty(self.chains)
        taken = np.empty(self.chains, np.bool_)
        dynamics.errors(potential, self.potential, heat, error)
        dynamics.decide(self.random, error, rate, taken)
        self.z[taken], self.gradient[taken] = z[taken], slope[taken]
        self.potential = np.where(taken, potential, self.potential)
        self.acceptance += 0.1 * (rate.mean() - self.acceptance)
        return error, rate, count

    def _leapfrogs(self, z: Array, slope: Array, count: int, heat: Array) -> tuple[Array, Array]:
        u, scale, step = self.u, self.scale, self.step
        dynamics.kick(u, slope, scale, 0.5 * step, heat)
        for _ in range(count - 1):
            dynamics.drift(z, u, scale, step)
            dynamics.kick(u, self._asked(z)[1], scale, step, heat)
        dynamics.drift(z, u, scale, step)
        potential, slope = self._asked(z)
        dynamics.kick(u, slope, scale, 0.5 * step, heat)
        return potential, slope

    def warm(self, iterations: int, between: Callable[[float], Any] = lambda steps: None) -> None:
        """Finds the typical set, scales, a step size and a length of trajectories.

        Args:
            iterations: trajectories of each chain.
            between: called after each window with the leapfrogs of a trajectory.
        """
        left = iterations
        for share, most in _WINDOWS if iterations >= _FEW else ():
            count = round(share * iterations)
            self._learn(*self._window(count, most))
            left -= count
            between(self.steps)
        self._window(left, _MOST)

    def _window(self, iterations: int, most: float) -> tuple[Array, Array]:
        """Trajectories that tune the step size; positions and gradients after each."""
        log_step = average = centre = math.log(self.step)
        error = 0.0
        room = max(2, min(iterations, _STORED // self.z.size))
        positions = deque(maxlen=room)  # the last ones, where there is no room for all
        slopes = deque(maxlen=room)
        for number in range(1, iterations + 1):
            _, rate, _ = self.trajectory(min(self.steps, most))
            error += (self.target - rate.mean() - error) / (number + _OFFSET)
            log_step = centre - math.sqrt(number) / _GAMMA * error
            weight = number**-_KAPPA
            average += weight * (log_step - average)
            self.step = math.exp(log_step)
            positions.append(self.z.copy())
            slopes.append(self.gradient.copy())
            self._tell()
        self.step = math.exp(average)
        return np.concatenate(positions), np.concatenate(slopes)

    def _learn(self, z: Array, slope: Array) -> None:
        before = self.scale
        self.scale = estimated("diagonal", z, slope, unit(before)).scale
        self.step *= float(np.exp(np.log(before / self.scale).mean()))
        spread = z.std(0, dtype=np.float64) / self.scale
        self.length = _LENGTH * float(spread.mean())

    def draw(self, draws: int) -> tuple[Array, dict[str, Array]]:
        """Draws with everything held as warmup left it.

        Returns:
            Positions (chain, draw, size) and statistics, (chain, draw) each.
        """

        def proposal() -> tuple[Array, ...]:
            error, rate, count = self.trajectory(self.steps)
            return ~(error < dynamics.DIVERGENCE), error, rate, np.full(self.chains, count)

        return self._collect(draws, ADJUSTED, proposal)

    def _collect(
        self, draws: int, names: tuple[str, ...], move: Callable[[], tuple[Array, ...]]
    ) -> tuple[Array, dict[str, Array]]:
        self.phase = "draws"
        kept = np.empty((self.chains, draws, self.real), self.z.dtype)
        stats = {name: np.empty((self.chains, draws)) for name in (*names, "lp", "step_size")}
        for i in range(draws):
            moved = move()
            kept[:, i] = self.z[:, : self.real]
            for name, value in zip(names, moved, strict=True):
                stats[name][:, i] = value
            added = self.z[:, self.real :].astype(np.float64)
            stats["lp"][:, i] = 0.5 * (added**2).sum(1) - self.potential
            stats["step_size"][:, i] = self.step
            self.divergences += int(moved[0].sum())
            self._tell()
        return kept, stats

    def settle(self, iterations: int, variance: float) -> None:
        """Tunes the step until the energy error of one unadjusted step has a variance.

        Args:
            iterations: stretches of each chain, at most 10 steps long.
            variance: wanted, per coordinate.
        """
        for number in range(1, iterations + 1):
            _, squares, broken = self._stretch(min(10, math.ceil(self.steps)))
            found = np.inf if broken.any() else max(float(squares.mean()), 1e-300)
            gap = min(max(math.log(variance / found), -6.0), 6.0) if found < np.inf else -6.0
            # The variance grows as the sixth power of the step.
            self.step *= math.exp(gap / 6 / max(1.0, number - iterations / 2) ** _KAPPA)

    def draw_unadjusted(self, draws: int) -> tuple[Array, dict[str, Array]]:
        """As `draw`, of the Langevin dynamics without Metropolis steps."""
        count = math.ceil(self.steps)

        def stretch() -> tuple[Array, ...]:
            error, squares, broken = self._stretch(count)
            return broken, error, squares, np.full(self.chains, count)

        return self._collect(draws, UNADJUSTED, stretch)

    def _stretch(self, count: int) -> tuple[Array, Array, Array]:
        """Steps of unadjusted Langevin dynamics; a chain that breaks stays where it was.

        Returns:
            Energy error, mean square of a step's error per coordinate, whether broken: (chain,).
        """
        z, slope, start = self.z.copy(), self.gradient.copy(), self.potential
        error, total, squares = (np.zeros(self.chains) for _ in range(3))
        amount = math.sqrt(math.expm1(2 * self.step / self.length))
        for _ in range(count):
            heat = np.zeros(self.chains)
            dynamics.turn(self.random, self.u, amount, self._work)
            potential, slope = self._leapfrogs(z, slope, 1, heat)
            dynamics.errors(potential, start, heat, error)
            total, squares, start = total + error, squares + error**2, potential
        broken = ~np.isfinite(total)
        fine = ~broken
        self.z[fine], self.gradient[fine] = z[fine], slope[fine]
        self.potential = np.where(fine, start, self.potential)
        return total, squares / (count * self.size), broken

    def _tell(self) -> None:
        self.iterations += 1
        self.report(self)
