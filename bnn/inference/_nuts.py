"""The no-U-turn sampler of many chains side by side: warmup, whose learning they share, and draws.

Replacing the engine means replacing `Sampler`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnn.errors import CheckpointError
from bnn.inference import _trajectory as machine
from bnn.inference._metric import estimated, unit
from bnn.inference._trajectory import Array, Kept, Metric
from bnn.run import Phase

# Shares of warmup after which the metric is learned anew, and the tree depths allowed meanwhile:
# far from the posterior the direction matters, not the length. The rest tunes the step size.
_WINDOWS = ((0.1, 5), (0.15, 7), (0.2, 20), (0.3, 20))
_FEW = 20  # iterations of warmup below which there is one window and no metric
_STORED = 2**24  # numbers in the positions that a window keeps


@dataclass
class Progress:
    """What a sampler has done, for a bar: called back now and then.

    Attributes:
        iterations: done, mean over chains.
        phase: "warmup" or "draws".
        step: size now.
        acceptance: of late, of each lane, (lane,).
        divergences: among the draws kept.
        steps: leapfrogs of a trajectory, mean.
    """

    iterations: float
    phase: str
    step: float
    acceptance: Array
    divergences: int
    steps: float


class Sampler:
    """NUTS at a fixed number of lanes.

    Args:
        gradient: (lane, size) -> potential (lane,), gradient (lane, size).
        start: where each lane starts, (lane, size).
        seeds: of each lane, (lane, 4) unsigned 64-bit integers.
        depth: largest tree depth.
        target: acceptance rate that the step size aims at.
        mass_matrix: "diagonal", "low_rank" or "dense".
        report: called back during long work.
    """

    def __init__(
        self,
        gradient: Callable[[Tensor], tuple[Tensor, Tensor]],
        start: Array,
        seeds: Array,
        *,
        depth: int,
        target: float,
        mass_matrix: str,
        report: Callable[[Progress], None] = lambda progress: None,
    ):
        self.gradient, self.depth, self.kind, self.report = gradient, depth, mass_matrix, report
        self.lanes = machine.lanes_at(start, depth, seeds)
        self.metric = unit(np.ones(start.shape[1], start.dtype))
        self.adapt = np.zeros(9)
        self.adapt[machine.TARGET] = target
        self.adapt[machine.LOG_STEP] = np.log(0.5 * start.shape[1] ** -0.25)
        self.iterations, self.phase, self.steps = 0.0, "warmup", 0.0
        potential, slope = self._asked(torch.from_numpy(start))
        self.lanes.numbers[machine.TREE_POTENTIAL] = potential
        self.lanes.numbers[machine.RATE] = target
        self.lanes.vectors[machine.TREE_GRADIENT] = slope
        self.metric = estimated("diagonal", start, slope, self.metric)

    def warm(self, iterations: int, between: Callable[[float], Any] = lambda steps: None) -> None:
        """Finds the typical set, a metric and a step size.

        Args:
            iterations: trajectories of each lane.
            between: called after each window with the leapfrogs that a trajectory took.
        """
        windows = _WINDOWS if iterations >= _FEW else ()
        counts = [round(share * iterations) for share, _ in windows]
        depths = [min(depth, self.depth) for _, depth in windows]
        counts, depths = [*counts, iterations - sum(counts)], [*depths, self.depth]
        windows = _Windows(self, counts, between)
        with Phase("warmup", windows) as phase:
            while windows.number < len(counts):
                total = self.lanes.counts.shape[1] * counts[windows.number]
                if not self._go(windows, phase, depths[windows.number], until=total):
                    break
                if windows.number + 1 < len(counts):
                    self.metric = estimated(self.kind, *windows.met(), self.metric)
                windows.end()
        self.phase = "draws"

    def draw(self, chains: int, draws: int) -> tuple[Array, dict[str, Array]]:
        """Draws with everything held as warmup left it; fewer where the fit is stopped.

        Returns:
            Positions (chain, draw, size) and statistics, (chain, draw) each.
        """
        drawing = _Drawing(self, chains, draws)
        with Phase("draws", drawing) as phase:
            if not drawing.over and self._go(drawing, phase, self.depth, until=None):
                drawing.over = True
        whole = int(drawing.done().min())
        phase.require(whole > 0)
        positions, kept = drawing.kept.positions[:chains, :whole], drawing.kept.stats
        stats = {name: kept[:chains, :whole, i] for i, name in enumerate(machine.STATS)}
        return positions, stats

    def _go(
        self, stretch: "_Windows | _Drawing", phase: Phase, depth: int, *, until: int | None
    ) -> bool:
        """Trajectories of every lane: `until` so many in all, adapting, or as many as are wanted.

        Returns:
            False if the phase is to stop before.
        """
        lanes, adapt, kept, adapting = self.lanes, self.adapt, stretch.kept, until is not None
        if not stretch.begun:
            stretch.begun = True
            adapt[machine.ADAPT] = adapting
            adapt[machine.CENTRE] = adapt[machine.AVERAGE] = adapt[machine.LOG_STEP]
            adapt[[machine.ERROR, machine.COUNT, machine.SUM, machine.SUMMED]] = 0.0
            lanes.counts[machine.DONE], lanes.counts[machine.WANTED] = 0, stretch.wanted
            machine.begin(lanes, adapt, self.metric)
        position = torch.from_numpy(lanes.vectors[machine.POSITION])
        count = lanes.counts.shape[1]
        while (
            kept.total[0] < until
            if until is not None
            else (lanes.counts[machine.DONE] < lanes.counts[machine.WANTED]).any()
        ):
            if not phase.goes_on():
                return False
            potential, slope = self._asked(position)
            machine.advance(lanes, potential, slope, adapt, self.metric, depth, kept)
            stretch.calls += 1
            if stretch.calls % 128 == 0:
                self._tell(stretch)
        self.iterations = stretch.before + int(kept.total[0]) / count
        self.steps = stretch.calls * count / max(int(kept.total[0]), 1)
        adapt[machine.LOG_STEP] = adapt[machine.AVERAGE] if adapting else adapt[machine.LOG_STEP]
        return True

    def _tell(self, stretch: "_Windows | _Drawing") -> None:
        kept, count = stretch.kept, self.lanes.counts.shape[1]
        self.iterations = stretch.before + int(kept.total[0]) / count
        self.report(
            Progress(
                iterations=self.iterations,
                phase=self.phase,
                step=float(np.exp(self.adapt[machine.LOG_STEP])),
                acceptance=self.lanes.numbers[machine.RATE],
                divergences=int(kept.stats[:, :, machine.STATS.index("diverging")].sum()),
                steps=stretch.calls * count / max(int(kept.total[0]), 1),
            )
        )

    def state(self) -> dict[str, Any]:
        """All that the draws to come depend on: a tree of arrays and numbers."""
        random = self.lanes.random.view(np.int64)
        return {
            "lanes": {**self.lanes._asdict(), "random": random},
            "metric": self.metric._asdict(),
            "adapt": self.adapt,
            "numbers": [self.steps, self.iterations],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Sets it back to that.

        Raises:
            CheckpointError: positions, metric or step size are none.
        """
        metric = Metric(**{k: v.numpy() for k, v in state["metric"].items()})
        lanes = {k: v.numpy() for k, v in state["lanes"].items()}
        drawn, adapt = lanes["vectors"][machine.TREE_POSITION], state["adapt"].numpy()
        finite = (np.isfinite(each).all() for each in (*metric, adapt, drawn))
        if not all(finite) or len(metric.basis) != len(metric.gain) or (metric.scale <= 0).any():
            raise CheckpointError("The state of a sampler has a position, metric or step of NaN.")
        counts = lanes["counts"]
        deep = (counts[machine.DEPTH] > self.depth) | (counts[machine.LEAVES] >= 1 << self.depth)
        if (counts < 0).any() or deep.any():
            raise CheckpointError("The state of a sampler has a tree deeper than is allowed.")
        lanes["random"] = lanes["random"].view(np.uint64)
        for name, array in self.lanes._asdict().items():
            array[...] = lanes[name]
        self.metric, self.adapt[:] = metric, adapt
        self.steps, self.iterations = state["numbers"]

    def _asked(self, position: Tensor) -> tuple[Array, Array]:
        potential, slope = self.gradient(position)
        return potential.detach().numpy(), slope.detach().contiguous().numpy()


class _Windows:
    """Warmup on its way: the window that it is in, and what that has brought."""

    wanted: Any = np.iinfo(np.int64).max  # trajectories of a lane: no end but that of the window

    def __init__(self, sampler: Sampler, counts: list[int], between: Callable[[float], Any]):
        self.sampler, self.counts, self.between = sampler, counts, between
        self.passed: list[float] = []  # leapfrogs of a trajectory in each window that has ended
        self._open()

    @property
    def number(self) -> int:
        """Of the window, from 0."""
        return len(self.passed)

    def _open(self) -> None:
        lanes, size = self.sampler.lanes.vectors.shape[1:]
        total = lanes * self.counts[self.number] if self.number < len(self.counts) else 1
        room = min(total, max(50, _STORED // size))
        self.kept = _room(lanes, 0, size, room, self.sampler.lanes.vectors.dtype)
        self.begun, self.calls, self.before = False, 0, self.sampler.iterations

    def met(self) -> tuple[Array, Array]:
        """Positions that the window has met, and gradients there, (draw, size)."""
        seen = min(int(self.kept.total[0]), len(self.kept.pooled))
        return self.kept.pooled[:seen], self.kept.slopes[:seen]

    def end(self) -> None:
        """Ends a window."""
        self._pass(self.sampler.steps)
        self._open()

    def _pass(self, steps: float) -> None:
        self.passed.append(steps)
        if self.number < len(self.counts):
            self.between(steps)

    def state(self) -> dict[str, Any]:
        """See `bnn.run.Loop`."""
        positions, slopes = self.met()
        return {
            "sampler": self.sampler.state(),
            "passed": torch.tensor(self.passed, dtype=torch.float64),
            "numbers": [self.begun, self.calls, self.before, int(self.kept.total[0])],
            "positions": positions,
            "slopes": slopes,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `bnn.run.Loop`."""
        self.sampler.restore(state["sampler"])
        for steps in state["passed"].tolist():
            self._pass(steps)
        self._open()
        self.begun, self.calls, self.before, self.kept.total[0] = state["numbers"]
        for room, found in zip(self.met(), (state["positions"], state["slopes"]), strict=True):
            if len(room) != len(found):
                raise CheckpointError(
                    "The state of a sampler has met fewer positions than it says."
                )
            room[...] = found.numpy()


class _Drawing:
    """Draws on their way. They are no part of the state: each goes to the disk once."""

    def __init__(self, sampler: Sampler, chains: int, draws: int):
        self.sampler, self.chains, self.draws = sampler, chains, draws
        lanes, size = sampler.lanes.vectors.shape[1:]
        self.wanted = np.where(np.arange(lanes) < chains, draws, 0)
        self.kept = _room(lanes, draws, size, 1, sampler.lanes.vectors.dtype)
        self.begun, self.calls, self.before, self.over = False, 0, sampler.iterations, False
        self.sent = np.zeros(chains, np.int64)  # draws of each chain that are on the disk

    def done(self) -> Array:
        """Draws of each chain, (chain,)."""
        return self.sampler.lanes.counts[machine.DONE, : self.chains] * self.begun

    def state(self) -> dict[str, Any]:
        """See `bnn.run.Loop`."""
        numbers = [self.begun, self.calls, self.before, int(self.kept.total[0]), self.over]
        return {"sampler": self.sampler.state(), "numbers": numbers}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `bnn.run.Loop`."""
        self.sampler.restore(state["sampler"])
        self.begun, self.calls, self.before, self.kept.total[0], self.over = state["numbers"]

    def fresh(self) -> dict[str, Any]:
        """See `bnn.run.Streaming`: chain after chain."""
        done = self.done()
        spans = [slice(*pair) for pair in zip(self.sent, done, strict=True)]
        if not (done > self.sent).any():
            return {}
        self.sent = done.copy()
        parts = (self.kept.positions, self.kept.stats)
        chunks = [np.concatenate([p[c, span] for c, span in enumerate(spans)]) for p in parts]
        return {"done": done.copy(), "positions": chunks[0], "stats": chunks[1]}

    def refill(self, chunk: Mapping[str, Any]) -> None:
        """See `bnn.run.Streaming`."""
        done, start = chunk["done"].numpy(), 0
        if not (self.sent <= done).all() or not (done <= self.done()).all():
            raise CheckpointError("A file of draws is not of this state.")
        for chain, (first, last) in enumerate(zip(self.sent, done, strict=True)):
            part = slice(start, start := start + last - first)
            self.kept.positions[chain, first:last] = chunk["positions"][part].numpy()
            self.kept.stats[chain, first:last] = chunk["stats"][part].numpy()
        self.sent = done.copy()


def _room(lanes: int, draws: int, size: int, pooled: int, dtype: Any) -> Kept:
    return Kept(
        positions=np.zeros((lanes, draws, size), dtype),
        stats=np.zeros((lanes, draws, len(machine.STATS))),
        pooled=np.zeros((pooled, size), dtype),
        slopes=np.zeros((pooled, size), dtype),
        total=np.zeros(1, np.int64),
    )
