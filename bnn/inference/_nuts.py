"""The no-U-turn kernel of one chain, written as a coroutine that asks for gradients.

A chain yields a position and is sent back (U, dU/dz) there. A driver collects the requests of
several chains and answers them with one batched call, so every chain goes its own way: none waits
for another's longer trajectory. Replacing the engine means replacing `sample`.

Multinomial sampling along the trajectory with biased progressive sampling between subtrees and the
generalised U-turn criterion, checked across subtrees too: Hoffman and Gelman (2014); Betancourt
(2017), A conceptual introduction to Hamiltonian Monte Carlo, appendix A; Stan's reference manual.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bnn.errors import FitError

Array = np.ndarray
Ask = Generator[Any, Any, Any]  # yields a position, is sent (potential, gradient)

_DIVERGENCE = 1000.0  # energy error beyond which a trajectory has left the level set (Stan)


@dataclass
class Metric:
    """Inverse mass matrix: a variance of each coordinate, (size,), or covariance, (size, size)."""

    covariance: Array

    def __post_init__(self) -> None:
        dense = self.covariance.ndim == 2
        self._root = np.linalg.cholesky(self.covariance) if dense else np.sqrt(self.covariance)

    def velocity(self, p: Array) -> Array:
        """M^-1 p."""
        return self.covariance @ p if self.covariance.ndim == 2 else self.covariance * p

    def momentum(self, rng: np.random.Generator) -> Array:
        """A draw from N(0, M)."""
        noise = rng.standard_normal(len(self.covariance))
        if self.covariance.ndim == 2:
            return np.linalg.solve(self._root.T, noise)
        return noise / self._root


class Tree:
    """A stretch of trajectory: its two ends, the sum of momenta, and the state it proposes."""

    __slots__ = ("accept", "count", "left", "rho", "right", "state", "stop", "weight", "worst")

    def __init__(self, end: tuple, rho: Array, state: tuple, weight: float):
        self.left = self.right = end  # (z, p, gradient, velocity)
        self.rho, self.state, self.weight = rho, state, weight
        self.count, self.accept, self.stop, self.worst = 1, 0.0, False, 0.0


def _turns(rho: Array, start: Array, end: Array) -> bool:
    return bool(start @ rho <= 0 or end @ rho <= 0)


@dataclass
class Chain:
    """Everything that one chain carries: position, adaptation, random numbers, statistics."""

    rng: np.random.Generator
    z: Array
    draws: int
    warmup: int
    max_depth: int
    target: float
    dense: bool
    metric: Metric = field(init=False)
    step_size: float = 1.0
    divergences: int = 0
    acceptance: float = 0.8  # a running average, to be shown
    iteration: int = 0

    def run(self) -> Ask:
        """The whole chain: find a step size, adapt, draw. Returns the draws and the statistics."""
        size = len(self.z)
        self.metric = Metric(np.ones(size))
        u, g = yield self.z
        if not np.isfinite(u):
            raise FitError("The log density at the starting point is not finite.", step=0)
        self.step_size = yield from self._reasonable(self.z, u, g)
        tuning = DualAveraging(self.step_size, self.target)
        windows = _windows(self.warmup)
        spread = Welford(size, self.dense)
        kept = np.empty((self.draws, size))
        stats: dict[str, list] = {name: [] for name in STATS}
        state: Any = (self.z, u, g)
        for i in range(self.warmup + self.draws):
            self.iteration = i
            state, stat = yield from self._transition(*state)
            self.acceptance += 0.1 * (stat["acceptance_rate"] - self.acceptance)
            if i < self.warmup:
                self.step_size = tuning.update(stat["acceptance_rate"])
                if windows.start <= i < windows.stop:
                    spread.add(state[0])
                if i + 1 in windows.ends:
                    self.metric = Metric(spread.regularised())
                    spread = Welford(size, self.dense)
                    self.step_size = yield from self._reasonable(*state)
                    tuning = DualAveraging(self.step_size, self.target)
                if i + 1 == self.warmup:
                    self.step_size = tuning.final
            else:
                self.divergences += stat["diverging"]
                kept[i - self.warmup] = state[0]
                for name in STATS:
                    stats[name].append(stat[name])
        return kept, {name: np.array(values) for name, values in stats.items()}

    def _leapfrog(self, z: Array, p: Array, g: Array, step: float) -> Ask:
        p = p - 0.5 * step * g
        z = z + step * self.metric.velocity(p)
        u, g = yield z
        p = p - 0.5 * step * g
        return z, p, g, u

    def _reasonable(self, z: Array, u: float, g: Array) -> Ask:
        """A step size whose first leapfrog accepts with about .8, by doubling or halving."""
        step, direction = self.step_size, 0
        for _ in range(60):
            p = self.metric.momentum(self.rng)
            start = u + 0.5 * p @ self.metric.velocity(p)
            _, p, _, new = yield from self._leapfrog(z, p, g, step)
            change = start - (new + 0.5 * p @ self.metric.velocity(p))
            wanted = 1 if change > np.log(0.8) else -1
            if direction and wanted != direction:
                break
            direction = wanted
            step *= 2.0**wanted
            if not 1e-12 < step < 1e7:
                break
        return float(np.clip(step, 1e-12, 1e7))

    def _transition(self, z: Array, u: float, g: Array) -> Ask:
        p = self.metric.momentum(self.rng)
        start = u + 0.5 * p @ self.metric.velocity(p)
        tree = Tree((z, p, g, self.metric.velocity(p)), p, (z, u, g), 0.0)
        depth, diverged, accept, steps, worst, chosen = 0, False, 0.0, 0, 0.0, start
        saturated = False
        while depth < self.max_depth:
            forward = bool(self.rng.integers(2))
            end = tree.right if forward else tree.left
            new = yield from self._grow(depth, end, 1.0 if forward else -1.0, start)
            accept, steps, worst = (
                accept + new.accept,
                steps + new.count,
                max(worst, new.worst, key=abs),
            )
            diverged = new.worst > _DIVERGENCE or not np.isfinite(new.worst)
            depth += 1
            if new.stop:
                break
            if np.log(self.rng.random()) < new.weight - tree.weight:
                tree.state, chosen = new.state[:3], new.state[3]
            tree.weight = np.logaddexp(tree.weight, new.weight)
            merged = _merge(tree, new, forward)
            if merged:
                break
            saturated = depth == self.max_depth
        return tree.state, {
            "lp": -tree.state[1],
            "diverging": diverged,
            "energy": chosen,
            "energy_error": chosen - start,
            "max_energy_error": worst,
            "acceptance_rate": accept / max(steps, 1),
            "step_size": self.step_size,
            "tree_depth": depth,
            "n_steps": steps,
            "reached_max_treedepth": saturated,
        }

    def _grow(self, depth: int, end: tuple, direction: float, start: Any) -> Ask:
        """A subtree of 2^depth leapfrogs beyond an end of the trajectory."""
        if depth == 0:
            z, p, g, u = yield from self._leapfrog(
                end[0], end[1], end[2], direction * self.step_size
            )
            velocity = self.metric.velocity(p)
            energy = u + 0.5 * p @ velocity
            error = energy - start if np.isfinite(energy) else np.inf
            leaf = Tree((z, p, g, velocity), p, (z, u, g, energy), -error)
            leaf.accept = min(1.0, np.exp(-error)) if error > -700 else 1.0
            leaf.worst, leaf.stop = error, error > _DIVERGENCE
            return leaf
        first = yield from self._grow(depth - 1, end, direction, start)
        if first.stop:
            return first
        edge = first.right if direction > 0 else first.left
        second = yield from self._grow(depth - 1, edge, direction, start)
        count, accept = first.count + second.count, first.accept + second.accept
        worst = max(first.worst, second.worst, key=abs)
        weight = np.logaddexp(first.weight, second.weight)
        if not second.stop and np.log(self.rng.random()) < second.weight - weight:
            first.state = second.state
        turned = second.stop or _merge(first, second, direction > 0)
        first.stop, first.weight = turned, weight
        first.count, first.accept, first.worst = count, accept, worst
        return first


def _merge(tree: Tree, new: Tree, forward: bool) -> bool:
    """Joins a stretch to a trajectory in place; True if the joined one turns back on itself."""
    left, right = (tree, new) if forward else (new, tree)
    rho = left.rho + right.rho
    # Velocities at the four ends; momenta at the two ends that meet, for the checks across them.
    turns = (
        _turns(rho, left.left[3], right.right[3])
        or _turns(left.rho + right.left[1], left.left[3], right.left[3])
        or _turns(right.rho + left.right[1], left.right[3], right.right[3])
    )
    tree.left, tree.right, tree.rho = left.left, right.right, rho
    return turns


STATS = (
    "lp",
    "diverging",
    "energy",
    "energy_error",
    "max_energy_error",
    "acceptance_rate",
    "step_size",
    "tree_depth",
    "n_steps",
    "reached_max_treedepth",
)


class DualAveraging:
    """Step size for a target acceptance (Hoffman and Gelman 2014, section 3.2)."""

    def __init__(self, step: float, target: float):
        self.mu, self.target = np.log(10 * step), target
        self.count, self.error, self.average = 0, 0.0, 0.0

    def update(self, acceptance: float) -> float:
        """The step size to try next."""
        self.count += 1
        share = 1 / (self.count + 10)
        self.error += share * (self.target - acceptance - self.error)
        log_step = self.mu - np.sqrt(self.count) / 0.05 * self.error
        weight = self.count**-0.75
        self.average += weight * (log_step - self.average)
        return float(np.exp(log_step))

    @property
    def final(self) -> float:
        """The step size to keep."""
        return float(np.exp(self.average))


class Welford:
    """Running variance, or covariance, of positions; shrunk towards a small diagonal as in Stan."""

    def __init__(self, size: int, dense: bool):
        self.count, self.mean = 0, np.zeros(size)
        self.total = np.zeros((size, size) if dense else size)

    def add(self, z: Array) -> None:
        """Takes one position in."""
        self.count += 1
        before = z - self.mean
        self.mean = self.mean + before / self.count
        after = z - self.mean
        self.total += np.outer(before, after) if self.total.ndim == 2 else before * after

    def regularised(self) -> Array:
        """n/(n+5) of the estimate plus 5/(n+5) of 1e-3."""
        n = self.count
        if n < 2:
            return np.eye(len(self.mean)) if self.total.ndim == 2 else np.ones(len(self.mean))
        small = 1e-3 * (np.eye(len(self.mean)) if self.total.ndim == 2 else 1.0)
        return n / (n + 5) * self.total / (n - 1) + 5 / (n + 5) * small


@dataclass(frozen=True)
class Windows:
    """Iterations whose positions shape the metric, and the ones after which it is renewed."""

    start: int
    stop: int
    ends: frozenset[int]


def _windows(warmup: int) -> Windows:
    """Stan's schedule: a fast start, windows that double, a fast end."""
    if warmup < 20:
        return Windows(warmup, warmup, frozenset())
    start, end = (75, 50) if warmup >= 150 else (int(0.15 * warmup), int(0.1 * warmup))
    width, at, ends = 25, start, set()
    stop = warmup - end
    if stop - start < width:
        return Windows(start, stop, frozenset({stop}))
    while at < stop:
        # A window that would leave less than twice itself takes the rest.
        at = stop if at + 3 * width > stop else at + width
        ends.add(at)
        width *= 2
    return Windows(start, stop, frozenset(ends))


def sample(
    gradient: Callable[[Array], tuple[Array, Array]],
    chains: list[Chain],
    lanes: int,
    report: Callable[[Chain], None],
) -> list[tuple[Array, dict[str, Array]]]:
    """Runs chains side by side, as many as there are lanes in one call of the gradient.

    Args:
        gradient: (lane, size) -> potential (lane,), gradient (lane, size).
        chains: ready to start.
        lanes: requests answered at a time. Chain i always stands in lane i mod lanes.
        report: called after each iteration of a chain.

    Returns:
        For each chain its draws (draw, size) and statistics, each (draw,).
    """
    results: list[Any] = [None] * len(chains)
    for first in range(0, len(chains), lanes):
        group = chains[first : first + lanes]
        positions = np.tile(group[0].z, (lanes, 1))
        running = {lane: chain.run() for lane, chain in enumerate(group)}
        seen = dict.fromkeys(running, -1)
        for lane, run in running.items():
            positions[lane] = next(run)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            while running:
                potentials, gradients = gradient(positions)
                for lane in list(running):
                    try:
                        answer = (float(potentials[lane]), gradients[lane])
                        positions[lane] = running[lane].send(answer)
                    except StopIteration as done:
                        results[first + lane] = done.value
                        del running[lane]
                    if seen[lane] != group[lane].iteration:
                        seen[lane] = group[lane].iteration
                        report(group[lane])
    return results
