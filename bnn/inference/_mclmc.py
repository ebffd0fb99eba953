"""Many microcanonical chains in lockstep: a warmup that learns from all of them, then draws.

Every chain takes as many leapfrogs in a trajectory as every other, a random number common to all,
so one call of the gradient serves all of them and none waits.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnn.errors import CheckpointError
from bnn.inference import _microcanonical as dynamics
from bnn.inference._metric import estimated, unit
from bnn.inference._microcanonical import Array
from bnn.inference._trajectory import is_made
from bnn.run import Phase

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


def ready() -> bool:
    """False while the first steps still have to be made machine code, or read from disk."""
    return is_made(dynamics.kick)


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
        windows = _WINDOWS if iterations >= _FEW else ()
        counts = [round(share * iterations) for share, _ in windows]
        most = [each for _, each in windows]
        counts, most = [*counts, iterations - sum(counts)], [*most, _MOST]
        windows = _Windows(self, counts, between)
        with Phase("warmup", windows) as phase:
            while windows.number < len(counts) and phase.goes_on():
                if windows.taken < counts[windows.number]:
                    _, rate, _ = self.trajectory(min(self.steps, most[windows.number]))
                    windows.take(rate.mean())
                    self._tell()
                if windows.taken == counts[windows.number]:
                    windows.end()

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
        drawing = _Drawing(self, draws, names)
        with Phase("draws", drawing) as phase:
            while drawing.number < draws and phase.goes_on():
                drawing.take(move())
                self._tell()
        phase.require(drawing.number > 0)
        kept, stats = drawing.kept, drawing.stats
        return kept[:, : drawing.number], {k: v[:, : drawing.number] for k, v in stats.items()}

    def settle(self, iterations: int, variance: float) -> None:
        """Tunes the step until the energy error of one unadjusted step has a variance.

        Args:
            iterations: stretches of each chain, at most 10 steps long.
            variance: wanted, per coordinate.
        """
        settling = _Settling(self)
        with Phase("settling", settling) as phase:
            while settling.number < iterations and phase.goes_on():
                settling.number += 1
                self._settle(variance, max(1.0, settling.number - iterations / 2) ** _KAPPA)

    def _settle(self, variance: float, slower: float) -> None:
        """One stretch, and what it teaches about the step."""
        _, squares, broken = self._stretch(min(10, math.ceil(self.steps)))
        found = np.inf if broken.any() else max(float(squares.mean()), 1e-300)
        gap = min(max(math.log(variance / found), -6.0), 6.0) if found < np.inf else -6.0
        # The variance grows as the sixth power of the step.
        self.step *= math.exp(gap / 6 / slower)

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

    def state(self) -> dict[str, Any]:
        """All that the draws to come depend on: a tree of arrays and numbers."""
        return {
            "random": self.random.view(np.int64),
            "shared": self.shared.bit_generator.state,
            "z": self.z,
            "u": self.u,
            "gradient": self.gradient,
            "potential": self.potential,
            "scale": self.scale,
            "numbers": [float(v) for v in (self.step, self.length, self.acceptance)],
            "counts": [self.iterations, self.divergences],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Sets it back to that.

        Raises:
            CheckpointError: positions, scales or step size are none.
        """
        arrays = {k: v.numpy() for k, v in state.items() if isinstance(v, Tensor)}
        held = (arrays[k] for k in ("z", "u", "gradient", "potential", "scale"))
        step, length, _ = state["numbers"]
        right = all(np.isfinite(each).all() for each in held) and step > 0 and length > 0
        if not right or (arrays["scale"] <= 0).any():
            raise CheckpointError("The state of a sampler has a position, scale or step of NaN.")
        self.shared.bit_generator.state = state["shared"]
        self.random[:] = arrays["random"].view(np.uint64)
        for name in ("z", "u", "gradient"):
            getattr(self, name)[:] = arrays[name]
        self.potential, self.scale = arrays["potential"], arrays["scale"]
        self.step, self.length, self.acceptance = state["numbers"]
        self.iterations, self.divergences = state["counts"]


class _Windows:
    """Warmup on its way: the window that it is in, and what that has brought."""

    def __init__(self, sampler: Sampler, counts: list[int], between: Callable[[float], Any]):
        self.sampler, self.counts, self.between = sampler, counts, between
        self.passed: list[float] = []  # leapfrogs of a trajectory after each window that has ended
        self._open()

    @property
    def number(self) -> int:
        """Of the window, from 0."""
        return len(self.passed)

    def _open(self) -> None:
        self.taken, self.error = 0, 0.0
        self.average = self.centre = math.log(self.sampler.step)
        iterations = self.counts[self.number] if self.number < len(self.counts) else 0
        room = max(2, min(iterations, _STORED // self.sampler.z.size))
        self.positions: deque[Array] = deque(maxlen=room)  # the last, where all have no room
        self.slopes: deque[Array] = deque(maxlen=room)

    def take(self, rate: float) -> None:
        """Notes a trajectory: tunes the step size, keeps positions and gradients."""
        sampler, self.taken = self.sampler, self.taken + 1
        self.error += (sampler.target - float(rate) - self.error) / (self.taken + _OFFSET)
        log_step = self.centre - math.sqrt(self.taken) / _GAMMA * self.error
        self.average += self.taken**-_KAPPA * (log_step - self.average)
        sampler.step = math.exp(log_step)
        self.positions.append(sampler.z.copy())
        self.slopes.append(sampler.gradient.copy())

    def end(self) -> None:
        """Ends a window."""
        sampler = self.sampler
        sampler.step = math.exp(self.average)
        if self.number + 1 < len(self.counts):
            sampler._learn(np.concatenate(self.positions), np.concatenate(self.slopes))
        self._pass(sampler.steps)
        self._open()

    def _pass(self, steps: float) -> None:
        self.passed.append(steps)
        if self.number < len(self.counts):
            self.between(steps)

    def state(self) -> dict[str, Any]:
        """See `bnn.run.Loop`."""
        none = np.zeros((0, *self.sampler.z.shape), self.sampler.z.dtype)
        return {
            "sampler": self.sampler.state(),
            "passed": torch.tensor(self.passed, dtype=torch.float64),
            "numbers": [self.taken, self.error, self.average, self.centre],
            "positions": np.stack(self.positions) if self.positions else none,
            "slopes": np.stack(self.slopes) if self.slopes else none,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `bnn.run.Loop`."""
        self.sampler.restore(state["sampler"])
        for steps in state["passed"].tolist():
            self._pass(steps)
        self._open()
        self.taken, self.error, self.average, self.centre = state["numbers"]
        self.positions.extend(state["positions"].numpy())
        self.slopes.extend(state["slopes"].numpy())


class _Settling:
    """The tuning of an unadjusted step on its way."""

    def __init__(self, sampler: Sampler):
        self.sampler, self.number = sampler, 0

    def state(self) -> dict[str, Any]:
        """See `bnn.run.Loop`."""
        return {"sampler": self.sampler.state(), "number": self.number}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `bnn.run.Loop`."""
        self.sampler.restore(state["sampler"])
        self.number = state["number"]


class _Drawing:
    """Draws on their way. They are no part of the state: each goes to the disk once."""

    def __init__(self, sampler: Sampler, draws: int, names: tuple[str, ...]):
        self.sampler, self.names, self.number, self.sent = sampler, names, 0, 0
        self.kept = np.empty((sampler.chains, draws, sampler.real), sampler.z.dtype)
        named = (*names, "lp", "step_size")
        self.stats = {name: np.empty((sampler.chains, draws)) for name in named}

    def take(self, moved: tuple[Array, ...]) -> None:
        """Notes where the chains are, and what came of their last trajectory."""
        sampler, i = self.sampler, self.number
        self.kept[:, i] = sampler.z[:, : sampler.real]
        for name, value in zip(self.names, moved, strict=True):
            self.stats[name][:, i] = value
        added = sampler.z[:, sampler.real :].astype(np.float64)
        self.stats["lp"][:, i] = 0.5 * (added**2).sum(1) - sampler.potential
        self.stats["step_size"][:, i] = sampler.step
        sampler.divergences += int(moved[0].sum())
        self.number += 1

    def state(self) -> dict[str, Any]:
        """See `bnn.run.Loop`."""
        return {"sampler": self.sampler.state(), "number": self.number}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `bnn.run.Loop`."""
        self.sampler.restore(state["sampler"])
        self.number = state["number"]

    def fresh(self) -> dict[str, Any]:
        """See `bnn.run.Streaming`."""
        new = slice(self.sent, self.number)
        if new.start == new.stop:
            return {}
        self.sent = self.number
        stats = {name: values[:, new] for name, values in self.stats.items()}
        return {"kept": self.kept[:, new], "stats": stats}

    def refill(self, chunk: Mapping[str, Any]) -> None:
        """See `bnn.run.Streaming`."""
        new = slice(self.sent, self.sent + chunk["kept"].shape[1])
        if new.stop > self.number:
            raise CheckpointError("A file of draws is not of this state.")
        self.kept[:, new], self.sent = chunk["kept"].numpy(), new.stop
        for name, values in self.stats.items():
            values[:, new] = chunk["stats"][name].numpy()
