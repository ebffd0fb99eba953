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
from typing import NamedTuple

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


class Lanes(NamedTuple):
    """The whole state of the machine, a plain tree of arrays. lane = L, size = d, depth cap = D.

    near/far: the two ends of the trajectory, the near one being integrated; tree: the state that
    the trajectory proposes; branch: the one that the subtree in growth proposes.
    """

    position: Array  # (L, d) near end; between calls, where the gradient is asked for
    momentum: Array  # (L, d)
    far_position: Array  # (L, d)
    far_momentum: Array  # (L, d)
    far_gradient: Array  # (L, d)
    gradient: Array  # (L, d) at the near end when directions swap
    tree_position: Array  # (L, d) between trajectories: the chain's present draw
    tree_gradient: Array  # (L, d)
    branch_position: Array  # (L, d)
    branch_gradient: Array  # (L, d)
    tree_sum: Array  # (L, d) of momenta
    branch_sum: Array  # (L, d)
    mark_momentum: Array  # (L, D + 1, d)
    mark_sum: Array  # (L, D + 1, d)
    work: Array  # (2, d) and (k,) are scratch; see `metric`
    tree_potential: Array  # (L,) and so are all below
    branch_potential: Array
    tree_energy: Array
    branch_energy: Array
    start_energy: Array
    tree_weight: Array  # log of the sum of exp(start energy - energy)
    branch_weight: Array
    acceptance: Array  # sums over the steps of a trajectory
    worst: Array
    step: Array
    direction: Array
    depth: Array
    leaves: Array  # of the subtree in growth
    steps: Array
    random: Array  # (L, 4) xoshiro256++
    done: Array  # (L,) trajectories finished
    wanted: Array  # (L,) a lane that has as many rests


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

    def vector() -> Array:
        return np.zeros_like(position)

    def number(kind: type = np.float64) -> Array:
        return np.zeros(count, dtype=kind)

    return Lanes(
        position=position.copy(),
        momentum=vector(),
        far_position=vector(),
        far_momentum=vector(),
        far_gradient=vector(),
        gradient=vector(),
        tree_position=position.copy(),
        tree_gradient=vector(),
        branch_position=vector(),
        branch_gradient=vector(),
        tree_sum=vector(),
        branch_sum=vector(),
        mark_momentum=np.zeros((count, depth + 1, size), position.dtype),
        mark_sum=np.zeros((count, depth + 1, size), position.dtype),
        work=np.zeros((2, size), position.dtype),
        tree_potential=number(),
        branch_potential=number(),
        tree_energy=number(),
        branch_energy=number(),
        start_energy=number(),
        tree_weight=number(),
        branch_weight=number(),
        acceptance=number(),
        worst=number(),
        step=number(),
        direction=number(),
        depth=number(np.int64),
        leaves=number(np.int64),
        steps=number(np.int64),
        random=seeds.copy(),
        done=number(np.int64),
        wanted=number(np.int64),
    )


# Sums may be reordered, so that they run eight at a time; NaN and infinities keep their meaning.
_jit = njit(cache=True, fastmath={"reassoc", "contract", "nsz", "arcp"}, error_model="numpy")


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
def _kick(momentum, gradient, length, metric, work):
    """Momentum less length L' gradient, in place."""
    size, rank = len(momentum), len(metric.gain)
    if rank == 0:
        for i in range(size):
            momentum[i] -= length * metric.scale[i] * gradient[i]
        return
    scaled = work[0]
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
def _drift(position, momentum, length, metric, work):
    """Position plus length L momentum, in place."""
    size, rank = len(momentum), len(metric.gain)
    if rank == 0:
        for i in range(size):
            position[i] += length * metric.scale[i] * momentum[i]
        return
    moved = work[1]
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
    _fill_normal(s.random[c], s.momentum[c])
    kinetic = 0.0
    for i in range(s.momentum.shape[1]):
        kinetic += s.momentum[c, i] * s.momentum[c, i]
    s.far_momentum[c] = s.momentum[c]
    s.tree_sum[c] = s.momentum[c]
    s.position[c] = s.tree_position[c]
    s.far_position[c] = s.tree_position[c]
    s.far_gradient[c] = s.tree_gradient[c]
    s.gradient[c] = s.tree_gradient[c]
    s.start_energy[c] = s.tree_potential[c] + 0.5 * kinetic
    s.tree_energy[c] = s.start_energy[c]
    s.tree_weight[c] = 0.0
    s.depth[c] = 0
    s.steps[c] = 0
    s.acceptance[c] = 0.0
    s.worst[c] = 0.0
    s.step[c] = math.exp(adapt[LOG_STEP])
    s.direction[c] = -1.0 if _uniform(s.random[c]) < 0.5 else 1.0
    _sprout(s, c)


@_jit
def _sprout(s, c):
    """A new subtree."""
    s.branch_sum[c] = 0.0
    s.branch_weight[c] = -np.inf
    s.leaves[c] = 0


@_jit
def _half(s, c, gradient, metric):
    """Half a kick and a drift: to the next position whose gradient is needed."""
    length = s.direction[c] * s.step[c]
    _kick(s.momentum[c], gradient, 0.5 * length, metric, s.work)
    _drift(s.position[c], s.momentum[c], length, metric, s.work)


@_jit
def begin(s, adapt, metric):
    """Every lane starts a trajectory from its present draw."""
    for c in range(len(s.done)):
        _begin(s, c, adapt, metric)
        _half(s, c, s.gradient[c], metric)


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
    at = s.done[c]
    if at < kept.positions.shape[1]:
        kept.positions[c, at] = s.tree_position[c]
        row = kept.stats[c, at]
        row[0] = -s.tree_potential[c]
        row[1] = diverged
        row[2] = s.tree_energy[c]
        row[3] = s.tree_energy[c] - s.start_energy[c]
        row[4] = s.worst[c]
        row[5] = s.acceptance[c] / s.steps[c]
        row[6] = s.step[c]
        row[7] = s.depth[c]
        row[8] = s.steps[c]
        row[9] = saturated
    m = kept.total[0] % len(kept.pooled)
    kept.pooled[m] = s.tree_position[c]
    kept.slopes[m] = s.tree_gradient[c]
    kept.total[0] += 1
    s.done[c] = at + 1


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
    lanes, size = s.position.shape
    for c in range(lanes):
        if s.done[c] >= s.wanted[c]:
            continue
        momentum, slope = s.momentum[c], gradient[c]
        _kick(momentum, slope, 0.5 * s.direction[c] * s.step[c], metric, s.work)
        kinetic = 0.0
        for i in range(size):
            kinetic += momentum[i] * momentum[i]
            s.branch_sum[c, i] += momentum[i]
        energy = potential[c] + 0.5 * kinetic
        error = energy - s.start_energy[c]
        if not error < 1e30:  # NaN and infinity
            error = 1e30
        diverged = error > DIVERGENCE
        s.steps[c] += 1
        s.acceptance[c] += math.exp(-max(error, 0.0))
        if abs(error) > abs(s.worst[c]):
            s.worst[c] = error
        s.branch_weight[c] = _log_sum(s.branch_weight[c], -error)
        if _uniform(s.random[c]) < math.exp(-error - s.branch_weight[c]):
            s.branch_position[c] = s.position[c]
            s.branch_gradient[c] = slope
            s.branch_potential[c] = potential[c]
            s.branch_energy[c] = energy
        # Leaf n closes the subtrees that end at it; their beginnings are kept at marks, one for
        # each bit set in n // 2.
        n = s.leaves[c]
        s.leaves[c] = n + 1
        mark, rest = 0, n >> 1
        while rest:
            mark += rest & 1
            rest >>= 1
        turned = False
        if n & 1 == 0:
            s.mark_momentum[c, mark] = momentum
            s.mark_sum[c, mark] = s.branch_sum[c]
        else:
            closing, rest = 0, n
            while rest & 1:
                closing += 1
                rest >>= 1
            for k in range(mark, mark - closing, -1):
                if _turned_since(
                    s.mark_momentum[c, k], momentum, s.branch_sum[c], s.mark_sum[c, k]
                ):
                    turned = True
                    break
        broken = turned or diverged
        near = slope
        if broken or n + 1 == 1 << s.depth[c]:
            ends = broken
            saturated = False
            s.depth[c] += 1
            if not broken:
                if math.log(_uniform(s.random[c])) < s.branch_weight[c] - s.tree_weight[c]:
                    s.tree_position[c] = s.branch_position[c]
                    s.tree_gradient[c] = s.branch_gradient[c]
                    s.tree_potential[c] = s.branch_potential[c]
                    s.tree_energy[c] = s.branch_energy[c]
                s.tree_weight[c] = _log_sum(s.tree_weight[c], s.branch_weight[c])
                for i in range(size):
                    s.tree_sum[c, i] += s.branch_sum[c, i]
                ends = _turned(s.far_momentum[c], momentum, s.tree_sum[c])
                if not ends and s.depth[c] >= depth_cap:
                    ends = saturated = True
            if ends:
                _learn(adapt, s.acceptance[c] / s.steps[c], lanes)
                _store(s, c, diverged, saturated, kept)
                _begin(s, c, adapt, metric)
                near = s.gradient[c]
            else:
                direction = -1.0 if _uniform(s.random[c]) < 0.5 else 1.0
                if direction != s.direction[c]:
                    for i in range(size):
                        a, b = s.position[c, i], s.far_position[c, i]
                        s.position[c, i], s.far_position[c, i] = b, a
                        a, b = s.momentum[c, i], s.far_momentum[c, i]
                        s.momentum[c, i], s.far_momentum[c, i] = b, a
                        s.gradient[c, i] = s.far_gradient[c, i]
                        s.far_gradient[c, i] = slope[i]
                    near = s.gradient[c]
                s.direction[c] = direction
                _sprout(s, c)
        _half(s, c, near, metric)
