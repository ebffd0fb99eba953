"""Trajectory: the no-U-turn sampler as a machine in which no chain waits for another.

One call of `advance` takes, for every lane (a chain's place in the batch), the potential and the
gradient at the position that the lane asked for, finishes that leapfrog step, does all the
bookkeeping it leads to and moves on to the next position. A lane whose trajectory ends stores its
draw, draws a momentum and starts the next trajectory in the same call.

Coordinates are whitened: z = L x with M^-1 = L L', so momenta are N(0, 1) and a U-turn is a sign of
plain dot products. L = diag(scale) (1 + basis diag(gain) basis'): a diagonal mass matrix where
there are no basis vectors, low rank with a few, dense with as many as coordinates.

Multinomial sampling along the trajectory, biased progressive between subtrees, generalised U-turn
criterion (Hoffman and Gelman 2014; Betancourt 2017, appendix A), with the ends of finished subtrees
kept at checkpoints, log2 of their number (Phan, Pradhan, Jankowiak 2019, section 3).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import njit

Array = np.ndarray

DIVERGENCE = 1000.0  # energy error beyond which a trajectory has left the level set (Stan)
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
# Dual averaging: adapt (0 or 1), target acceptance, log step, its average, error, count, centre,
# sum of acceptances, trajectories in that sum.
ADAPT, TARGET, LOG_STEP, AVERAGE, ERROR, COUNT, CENTRE, SUM, SUMMED = range(9)
_GAMMA, _OFFSET, _KAPPA = 0.1, 10.0, 0.75


# Rows of `Lanes.vectors`. near and far: the two ends of the trajectory, the near one being
# integrated; tree: the state that the trajectory proposes, between trajectories the chain's present
# draw; branch: the one that the subtree in growth proposes; sums are of momenta.
(
    POSITION,  # near end; between calls, where the gradient is asked for
    MOMENTUM,
    GRADIENT,
    FAR_POSITION,
    FAR_MOMENTUM,
    FAR_GRADIENT,
    TREE_POSITION,
    TREE_GRADIENT,
    TREE_SUM,
    BRANCH_POSITION,
    BRANCH_GRADIENT,
    BRANCH_SUM,
) = range(12)
# Rows of `Lanes.numbers`. A weight is the log of a sum of exp(start energy - energy).
(
    TREE_POTENTIAL,
    TREE_ENERGY,
    TREE_WEIGHT,
    BRANCH_POTENTIAL,
    BRANCH_ENERGY,
    BRANCH_WEIGHT,
    START_ENERGY,
    ACCEPTANCE,  # summed over the steps of a trajectory
    WORST,
    STEP,
    DIRECTION,
    RATE,  # acceptance of late, a running mean over trajectories
) = range(12)
# Rows of `Lanes.counts`: doublings, leaves of the subtree in growth, leapfrogs of the trajectory,
# trajectories finished, and after how many a lane rests.
DEPTH, LEAVES, STEPS, DONE, WANTED = range(5)


class Lanes(NamedTuple):
    """The whole state of the machine, a plain tree of arrays."""

    vectors: Array  # (12, lane, size)
    marks: Array  # (2, lane, depth cap + 1, size) momenta and sums where subtrees began
    numbers: Array  # (12, lane)
    counts: Array  # (5, lane) of whole numbers
    random: Array  # (lane, 4) state of xoshiro256++
    scratch: Array  # (2, size)


class Metric(NamedTuple):
    """L = diag(scale) (1 + basis diag(gain) basis')."""

    scale: Array  # (d,)
    basis: Array  # (k, d), rows orthonormal
    gain: Array  # (k,)


class Kept(NamedTuple):
    """Where finished trajectories go: lane by lane, or one after the other in warmup."""

    positions: Array  # (L, n, d)
    stats: Array  # (L, n, len(STATS))
    pooled: Array  # (m, d) positions as they come, whichever lane they come from
    slopes: Array  # (m, d) gradients there
    total: Array  # (1,) trajectories finished


def lanes_at(position: Array, depth: int, seeds: Array) -> Lanes:
    """A machine at rest.

    Args:
        position: where each lane stands, (lane, size).
        depth: largest tree depth.
        seeds: (lane, 4) of unsigned 64-bit integers.
    """
    count, size = position.shape
    vectors = np.zeros((12, count, size), position.dtype)
    vectors[POSITION] = vectors[TREE_POSITION] = position
    return Lanes(
        vectors=vectors,
        marks=np.zeros((2, count, depth + 1, size), position.dtype),
        numbers=np.zeros((12, count)),
        counts=np.zeros((5, count), np.int64),
        random=seeds.copy(),
        scratch=np.zeros((2, size), position.dtype),
    )


# Sums may be reordered, so that they run eight at a time; NaN and infinities keep their meaning.
_OPTIONS: Any = {"fastmath": {"reassoc", "contract", "nsz", "arcp"}, "error_model": "numpy"}


def _jit(function: Callable[..., Any]) -> Any:
    """Machine code, kept on disk where there is a place for it."""
    try:
        return njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # neither the package nor the home directory can be written to
        return njit(**_OPTIONS)(function)


def is_made(function: Any) -> bool:
    """False until a function is machine code in this process, read from disk or compiled."""
    return bool(function.signatures) if hasattr(function, "py_func") else True  # numba may be off


@_jit
def _rotated(x, k):
    return (x << np.uint64(k)) | (x >> np.uint64(64 - k))


@_jit
def _uniform(s):
    """In (0, 1), by xoshiro256++ (Blackman and Vigna 2021)."""
    result = _rotated(s[0] + s[3], 23) + s[0]
    t = s[1] << np.uint64(17)
    s[2] ^= s[0]
    s[3] ^= s[1]
    s[1] ^= s[2]
    s[0] ^= s[3]
    s[2] ^= t
    s[3] = _rotated(s[3], 45)
    return (np.float64(result >> np.uint64(11)) + 0.5) * (1.0 / 9007199254740992.0)


@_jit
def _fill_normal(s, out):
    """Standard normals, two at a time (Box and Muller)."""
    size = len(out)
    for i in range(0, size, 2):
        radius = math.sqrt(-2.0 * math.log(_uniform(s)))
        angle = 2.0 * math.pi * _uniform(s)
        out[i] = radius * math.cos(angle)
        if i + 1 < size:
            out[i + 1] = radius * math.sin(angle)


@_jit
def _log_sum(a, b):
    top = max(a, b)
    return top + math.log1p(math.exp(-abs(a - b)))


@_jit
def _kick(momentum, gradient, length, metric, scratch):
    """Momentum less length L' gradient, in place."""
    size, rank = len(momentum), len(metric.gain)
    if rank == 0:
        for i in range(size):
            momentum[i] -= length * metric.scale[i] * gradient[i]
        return
    scaled = scratch[0]
    for i in range(size):
        scaled[i] = metric.scale[i] * gradient[i]
    for k in range(rank):
        row = metric.basis[k]
        along = 0.0
        for i in range(size):
            along += row[i] * scaled[i]
        along *= metric.gain[k] * length
        for i in range(size):
            momentum[i] -= along * row[i]
    for i in range(size):
        momentum[i] -= length * scaled[i]


@_jit
def _drift(position, momentum, length, metric, scratch):
    """Position plus length L momentum, in place."""
    size, rank = len(momentum), len(metric.gain)
    if rank == 0:
        for i in range(size):
            position[i] += length * metric.scale[i] * momentum[i]
        return
    moved = scratch[1]
    moved[:] = momentum
    for k in range(rank):
        row = metric.basis[k]
        along = 0.0
        for i in range(size):
            along += row[i] * momentum[i]
        along *= metric.gain[k]
        for i in range(size):
            moved[i] += along * row[i]
    for i in range(size):
        position[i] += length * metric.scale[i] * moved[i]


@_jit
def _turned_since(start, end, total, before):
    """U-turn of a subtree, half of both ends less; `before` is the sum as far as its first leaf."""
    first, last = 0.0, 0.0
    for i in range(len(start)):
        inside = total[i] - before[i] + 0.5 * (start[i] - end[i])
        first += start[i] * inside
        last += end[i] * inside
    return first <= 0 or last <= 0


@_jit
def _turned(one, other, total):
    """U-turn of the whole trajectory, half of both ends less."""
    first, last = 0.0, 0.0
    for i in range(len(one)):
        inside = total[i] - 0.5 * (one[i] + other[i])
        first += one[i] * inside
        last += other[i] * inside
    return first <= 0 or last <= 0


@_jit
def _begin(s, c, adapt, metric):
    """A new trajectory from the lane's present draw: momentum, energy, both ends there."""
    _fill_normal(s.random[c], s.vectors[MOMENTUM, c])
    kinetic = 0.0
    for i in range(s.vectors.shape[2]):
        kinetic += s.vectors[MOMENTUM, c, i] * s.vectors[MOMENTUM, c, i]
    s.vectors[FAR_MOMENTUM, c] = s.vectors[MOMENTUM, c]
    s.vectors[TREE_SUM, c] = s.vectors[MOMENTUM, c]
    s.vectors[POSITION, c] = s.vectors[TREE_POSITION, c]
    s.vectors[FAR_POSITION, c] = s.vectors[TREE_POSITION, c]
    s.vectors[FAR_GRADIENT, c] = s.vectors[TREE_GRADIENT, c]
    s.vectors[GRADIENT, c] = s.vectors[TREE_GRADIENT, c]
    s.numbers[START_ENERGY, c] = s.numbers[TREE_POTENTIAL, c] + 0.5 * kinetic
    s.numbers[TREE_ENERGY, c] = s.numbers[START_ENERGY, c]
    s.numbers[TREE_WEIGHT, c] = 0.0
    s.counts[DEPTH, c] = 0
    s.counts[STEPS, c] = 0
    s.numbers[ACCEPTANCE, c] = 0.0
    s.numbers[WORST, c] = 0.0
    s.numbers[STEP, c] = math.exp(adapt[LOG_STEP])
    s.numbers[DIRECTION, c] = -1.0 if _uniform(s.random[c]) < 0.5 else 1.0
    _sprout(s, c)


@_jit
def _sprout(s, c):
    """A new subtree."""
    s.vectors[BRANCH_SUM, c] = 0.0
    s.numbers[BRANCH_WEIGHT, c] = -np.inf
    s.counts[LEAVES, c] = 0


@_jit
def _half(s, c, gradient, metric):
    """Half a kick and a drift: to the next position whose gradient is needed."""
    length = s.numbers[DIRECTION, c] * s.numbers[STEP, c]
    _kick(s.vectors[MOMENTUM, c], gradient, 0.5 * length, metric, s.scratch)
    _drift(s.vectors[POSITION, c], s.vectors[MOMENTUM, c], length, metric, s.scratch)


@_jit
def begin(s, adapt, metric):
    """Every lane starts a trajectory from its present draw."""
    for c in range(s.counts.shape[1]):
        _begin(s, c, adapt, metric)
        _half(s, c, s.vectors[GRADIENT, c], metric)


@_jit
def _learn(adapt, acceptance, lanes):
    """Dual averaging (Hoffman and Gelman 2014, section 3.2), once every `lanes` trajectories."""
    adapt[SUM] += acceptance
    adapt[SUMMED] += 1
    if adapt[SUMMED] < lanes:
        return
    mean = adapt[SUM] / adapt[SUMMED]
    adapt[SUM] = 0.0
    adapt[SUMMED] = 0.0
    if adapt[ADAPT] == 0:
        return
    adapt[COUNT] += 1
    count = adapt[COUNT]
    adapt[ERROR] += (adapt[TARGET] - mean - adapt[ERROR]) / (count + _OFFSET)
    adapt[LOG_STEP] = adapt[CENTRE] - math.sqrt(count) / _GAMMA * adapt[ERROR]
    weight = count**-_KAPPA
    adapt[AVERAGE] = weight * adapt[LOG_STEP] + (1 - weight) * adapt[AVERAGE]


@_jit
def _store(s, c, diverged, saturated, kept):
    """Writes a finished trajectory's draw and statistics."""
    at = s.counts[DONE, c]
    if at < kept.positions.shape[1]:
        kept.positions[c, at] = s.vectors[TREE_POSITION, c]
        row = kept.stats[c, at]
        row[0] = -s.numbers[TREE_POTENTIAL, c]
        row[1] = diverged
        row[2] = s.numbers[TREE_ENERGY, c]
        row[3] = s.numbers[TREE_ENERGY, c] - s.numbers[START_ENERGY, c]
        row[4] = s.numbers[WORST, c]
        row[5] = s.numbers[ACCEPTANCE, c] / s.counts[STEPS, c]
        row[6] = s.numbers[STEP, c]
        row[7] = s.counts[DEPTH, c]
        row[8] = s.counts[STEPS, c]
        row[9] = saturated
    m = kept.total[0] % len(kept.pooled)
    kept.pooled[m] = s.vectors[TREE_POSITION, c]
    kept.slopes[m] = s.vectors[TREE_GRADIENT, c]
    kept.total[0] += 1
    s.counts[DONE, c] = at + 1


@_jit
def advance(s, potential, gradient, adapt, metric, depth_cap, kept):
    """One leapfrog step of every lane that does not rest, and all that follows from it.

    Args:
        s: the state.
        potential: at `s.position`, (lane,).
        gradient: there, (lane, size).
        adapt: of the step size, see the names above.
        metric: whitening.
        depth_cap: largest tree depth now, at most that of the state.
        kept: where draws go.
    """
    lanes, size = s.vectors.shape[1:]
    for c in range(lanes):
        if s.counts[DONE, c] >= s.counts[WANTED, c]:
            continue
        momentum, slope = s.vectors[MOMENTUM, c], gradient[c]
        _kick(
            momentum, slope, 0.5 * s.numbers[DIRECTION, c] * s.numbers[STEP, c], metric, s.scratch
        )
        kinetic = 0.0
        for i in range(size):
            kinetic += momentum[i] * momentum[i]
            s.vectors[BRANCH_SUM, c, i] += momentum[i]
        energy = potential[c] + 0.5 * kinetic
        error = energy - s.numbers[START_ENERGY, c]
        if not error < 1e30:  # NaN and infinity
            error = 1e30
        diverged = error > DIVERGENCE
        s.counts[STEPS, c] += 1
        s.numbers[ACCEPTANCE, c] += math.exp(-max(error, 0.0))
        if abs(error) > abs(s.numbers[WORST, c]):
            s.numbers[WORST, c] = error
        s.numbers[BRANCH_WEIGHT, c] = _log_sum(s.numbers[BRANCH_WEIGHT, c], -error)
        if _uniform(s.random[c]) < math.exp(-error - s.numbers[BRANCH_WEIGHT, c]):
            s.vectors[BRANCH_POSITION, c] = s.vectors[POSITION, c]
            s.vectors[BRANCH_GRADIENT, c] = slope
            s.numbers[BRANCH_POTENTIAL, c] = potential[c]
            s.numbers[BRANCH_ENERGY, c] = energy
        # Leaf n closes the subtrees that end at it; their beginnings are kept at marks, one for
        # each bit set in n // 2.
        n = s.counts[LEAVES, c]
        s.counts[LEAVES, c] = n + 1
        mark, rest = 0, n >> 1
        while rest:
            mark += rest & 1
            rest >>= 1
        turned = False
        if n & 1 == 0:
            s.marks[0, c, mark] = momentum
            s.marks[1, c, mark] = s.vectors[BRANCH_SUM, c]
        else:
            closing, rest = 0, n
            while rest & 1:
                closing += 1
                rest >>= 1
            for k in range(mark, mark - closing, -1):
                if _turned_since(
                    s.marks[0, c, k], momentum, s.vectors[BRANCH_SUM, c], s.marks[1, c, k]
                ):
                    turned = True
                    break
        broken = turned or diverged
        near = slope
        if broken or n + 1 == 1 << s.counts[DEPTH, c]:
            ends = broken
            saturated = False
            s.counts[DEPTH, c] += 1
            if not broken:
                if (
                    math.log(_uniform(s.random[c]))
                    < s.numbers[BRANCH_WEIGHT, c] - s.numbers[TREE_WEIGHT, c]
                ):
                    s.vectors[TREE_POSITION, c] = s.vectors[BRANCH_POSITION, c]
                    s.vectors[TREE_GRADIENT, c] = s.vectors[BRANCH_GRADIENT, c]
                    s.numbers[TREE_POTENTIAL, c] = s.numbers[BRANCH_POTENTIAL, c]
                    s.numbers[TREE_ENERGY, c] = s.numbers[BRANCH_ENERGY, c]
                s.numbers[TREE_WEIGHT, c] = _log_sum(
                    s.numbers[TREE_WEIGHT, c], s.numbers[BRANCH_WEIGHT, c]
                )
                for i in range(size):
                    s.vectors[TREE_SUM, c, i] += s.vectors[BRANCH_SUM, c, i]
                ends = _turned(s.vectors[FAR_MOMENTUM, c], momentum, s.vectors[TREE_SUM, c])
                if not ends and s.counts[DEPTH, c] >= depth_cap:
                    ends = saturated = True
            if ends:
                rate = s.numbers[ACCEPTANCE, c] / s.counts[STEPS, c]
                s.numbers[RATE, c] += 0.1 * (rate - s.numbers[RATE, c])
                _learn(adapt, rate, lanes)
                _store(s, c, diverged, saturated, kept)
                _begin(s, c, adapt, metric)
                near = s.vectors[GRADIENT, c]
            else:
                direction = -1.0 if _uniform(s.random[c]) < 0.5 else 1.0
                if direction != s.numbers[DIRECTION, c]:
                    for i in range(size):
                        a, b = s.vectors[POSITION, c, i], s.vectors[FAR_POSITION, c, i]
                        s.vectors[POSITION, c, i], s.vectors[FAR_POSITION, c, i] = b, a
                        a, b = s.vectors[MOMENTUM, c, i], s.vectors[FAR_MOMENTUM, c, i]
                        s.vectors[MOMENTUM, c, i], s.vectors[FAR_MOMENTUM, c, i] = b, a
                        s.vectors[GRADIENT, c, i] = s.vectors[FAR_GRADIENT, c, i]
                        s.vectors[FAR_GRADIENT, c, i] = slope[i]
                    near = s.vectors[GRADIENT, c]
                s.numbers[DIRECTION, c] = direction
                _sprout(s, c)
        _half(s, c, near, metric)
