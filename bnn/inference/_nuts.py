"""The no-U-turn sampler of many chains side by side: warmup, whose learning they share, and draws.

Replacing the engine means replacing `Sampler`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnn.inference import _trajectory as machine
from bnn.inference._metric import estimated, unit
from bnn.inference._trajectory import Array, Kept

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
        self.iterations, self.phase = 0.0, "warmup"
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
        left = iterations
        for share, depth in _WINDOWS if iterations >= _FEW else ():
            count = round(share * iterations)
            kept = self._run(count, min(depth, self.depth))
            seen = min(kept.total[0], len(kept.pooled))
            self.metric = estimated(self.kind, kept.pooled[:seen], kept.slopes[:seen], self.metric)
            left -= count
            between(self.steps)
        self._run(left, self.depth)
        self.phase = "draws"

    def draw(self, chains: int, draws: int) -> tuple[Array, dict[str, Array]]:
        """Draws with everything held as warmup left it.

        Returns:
            Positions (chain, draw, size) and statistics, (chain, draw) each.
        """
        lanes, size = self.lanes.vectors.shape[1:]
        kept = _room(lanes, draws, size, 1, self.lanes.vectors.dtype)
        self.lanes.counts[machine.WANTED] = np.where(np.arange(lanes) < chains, draws, 0)
        self._go(kept, self.depth, adapting=False, until=None)
        stats = {name: kept.stats[:chains, :, i] for i, name in enumerate(machine.STATS)}
        return kept.positions[:chains], stats

    def _run(self, iterations: int, depth: int) -> Kept:
        """Warmup trajectories, so many in all as makes `iterations` for each lane."""
        lanes, size = self.lanes.vectors.shape[1:]
        total = lanes * iterations
        room = min(total, max(50, _STORED // size))
        kept = _room(lanes, 0, size, room, self.lanes.vectors.dtype)
        self.lanes.counts[machine.WANTED] = np.iinfo(np.int64).max
        self._go(kept, depth, adapting=True, until=total)
        return kept

    def _go(self, kept: Kept, depth: int, *, adapting: bool, until: int | None) -> None:
        lanes, adapt = self.lanes, self.adapt
        adapt[machine.ADAPT] = adapting
        adapt[machine.CENTRE] = adapt[machine.AVERAGE] = adapt[machine.LOG_STEP]
        adapt[[machine.ERROR, machine.COUNT, machine.SUM, machine.SUMMED]] = 0.0
        lanes.counts[machine.DONE] = 0
        machine.begin(lanes, adapt, self.metric)
        position = torch.from_numpy(lanes.vectors[machine.POSITION])
        before, calls, count = self.iterations, 0, lanes.counts.shape[1]
        while (
            kept.total[0] < until
            if until is not None
            else (lanes.counts[machine.DONE] < lanes.counts[machine.WANTED]).any()
        ):
            potential, slope = self._asked(position)
            machine.advance(lanes, potential, slope, adapt, self.metric, depth, kept)
            calls += 1
            if calls % 128 == 0:
                self.iterations = before + kept.total[0] / count
                self._tell(kept, calls)
        self.iterations = before + kept.total[0] / count
        self.steps = calls * count / max(int(kept.total[0]), 1)
        adapt[machine.LOG_STEP] = adapt[machine.AVERAGE] if adapting else adapt[machine.LOG_STEP]

    def _tell(self, kept: Kept, calls: int) -> None:
        self.report(
            Progress(
                iterations=self.iterations,
                phase=self.phase,
                step=float(np.exp(self.adapt[machine.LOG_STEP])),
                acceptance=self.lanes.numbers[machine.RATE],
                divergences=int(kept.stats[:, :, machine.STATS.index("diverging")].sum()),
                steps=calls * self.lanes.counts.shape[1] / max(int(kept.total[0]), 1),
            )
        )

    def _asked(self, position: Tensor) -> tuple[Array, Array]:
        potential, slope = self.gradient(position)
        return potential.detach().numpy(), slope.detach().contiguous().numpy()


def _room(lanes: int, draws: int, size: int, pooled: int, dtype: Any) -> Kept:
    return Kept(
        positions=np.zeros((lanes, draws, size), dtype),
        stats=np.zeros((lanes, draws, len(machine.STATS))),
        pooled=np.zeros((pooled, size), dtype),
        slopes=np.zeros((pooled, size), dtype),
        total=np.zeros(1, np.int64),
    )
