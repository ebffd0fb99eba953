"""The no-U-turn sampler: draws from p(values | data) itself, by Hamiltonian trajectories.

    H(z, p) = U(z) + p' M^-1 p / 2,   U(z) = -log p(z, data),   z on the real line

A trajectory of leapfrog steps doubles until it turns back on itself; the draw is chosen along it
with probability exp(-H). The step size (dual averaging) and the mass matrix M (Fisher divergence)
are learned in warmup from all lanes together, which is why warmup can be short, and then held: the
draws kept are a Markov chain with the posterior as its stationary law. Chains share what was
learned and the time of day, nothing else: each has its own start (a prior draw), random numbers and
trajectories, and none waits for another's.

When not to use it: on many rows (every gradient reads all of them), on discrete sites, on nets of
many thousands of weights. Weights of a net are not identified: read R-hat of f, not of weights.
"""

from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from bnn.data import Data
from bnn.handlers import branch
from bnn.inference._energy import Energy
from bnn.inference._gradient import Gradient
from bnn.method import Method, Model, check_count, check_parts
from bnn.posterior import Posterior
from bnn.progress import bar
from bnn.sites import Sites, require_all_rows, require_continuous, require_no_parameters

if TYPE_CHECKING:
    from bnn.inference._nuts import Progress

MASS_MATRICES = ("diagonal", "low_rank", "dense")
_STEPS = 8  # leapfrogs that a trajectory takes at least, on average
_KINDS = {
    "diverging": torch.bool,
    "tree_depth": torch.int64,
    "n_steps": torch.int64,
    "reached_max_treedepth": torch.bool,
}


@dataclass(frozen=True, kw_only=True)
class NUTS(Method):
    """Hamiltonian Monte Carlo with trajectories that end where they turn.

    Attributes:
        chains: chains, each a Markov chain of its own. Up to 4 run 4 abreast, more 16 abreast:
            chain i is the same whether 1, 2 or 4 are asked for, or 5 to 16.
        draws: draws kept from each.
        warmup: iterations before them; not kept. All lanes that run learn together, so 200 teach
            as much as some thousand of one chain.
        target_accept: acceptance rate that the step size aims at, in (0, 1); raise it towards 1
            where divergences appear. On nets of 50 and 502 weights .9 and .8 gave as many effective
            draws of f a gradient (within 14 %), and on the small one 4 and 173 of 9,600 diverged.
        max_tree_depth: a trajectory has at most 2^max_tree_depth - 1 steps.
        mass_matrix: "diagonal" learns a scale for each coordinate, "low_rank" also the few
            directions along which it differs most from that, "dense" the whole covariance.
        parts: fits that the chains are divided into, for `fit(executor=)`; each learns by itself.

    References:
        Hoffman, Gelman (2014), The no-U-turn sampler. Betancourt (2017), A conceptual introduction
        to Hamiltonian Monte Carlo, appendix A (multinomial draws, generalised criterion).

    Example:
        >>> NUTS(target_accept=0.95).chains
        16
    """

    chains: int = 16
    draws: int = 250
    warmup: int = 200
    target_accept: float = 0.9
    max_tree_depth: int = 10
    mass_matrix: str = "diagonal"
    parts: int = 1

    def __post_init__(self) -> None:
        check_count(
            "NUTS",
            chains=self.chains,
            draws=self.draws,
            warmup=self.warmup,
            max_tree_depth=self.max_tree_depth,
        )
        check_parts(self)
        if not 0 < self.target_accept < 1:
            raise ValueError(f"NUTS(target_accept={self.target_accept!r}): a rate in (0, 1).")
        if self.mass_matrix not in MASS_MATRICES:
            raise ValueError(
                f"NUTS(mass_matrix={self.mass_matrix!r}): one of {', '.join(MASS_MATRICES)}."
            )

    @property
    def abreast(self) -> int:
        """Lanes: 4, or whole sixteens; as few as hold the chains, enough to learn from."""
        return 4 if self.chains <= 4 else -(-self.chains // 16) * 16

    def fit(
        self,
        model: Model,
        data: Data,
        sites: Sites,
        *,
        seed: np.random.SeedSequence,
        progress: bool,
    ) -> Posterior:
        """See `Method.fit`."""
        require_continuous(sites, "NUTS")
        require_all_rows(data, sites, "NUTS")
        require_no_parameters(sites, "NUTS")
        from bnn.inference._nuts import Sampler  # numba takes .3 s to import

        energy = Energy(model, data, sites)
        lanes = self.abreast
        start = energy.starts(lanes, branch(seed, 0), overdispersed=True).cpu().numpy()
        streams = [branch(seed, 2, lane).generate_state(4, np.uint64) for lane in range(lanes)]
        with bar(self.warmup + self.draws, "NUTS", progress) as shown:
            shown.set_postfix_str("tracing the model")
            gradient = Gradient(energy, lanes, branch(seed, 1))
            compiling = _Compiling(gradient, shown, self.warmup + self.draws)
            compiling(_STEPS)
            sampler = Sampler(
                gradient,
                start,
                np.stack(streams),
                depth=self.max_tree_depth,
                target=self.target_accept,
                mass_matrix=self.mass_matrix,
                report=lambda progress: _show(shown, progress, self.chains),
            )
            if not shown.disable:
                shown.set_postfix_str(self._forecast(gradient, start))
            sampler.warm(self.warmup, compiling)
            z, kept = sampler.draw(self.chains, self.draws)
        stats = {name: torch.from_numpy(values) for name, values in kept.items()}
        for name, kind in _KINDS.items():
            stats[name] = stats[name].to(kind)
        return Posterior(
            model=model,
            method=self,
            data=data,
            sites=sites,
            draws=energy.unflatten(torch.from_numpy(z).to(gradient.device)),
            stats=stats,
        )

    def _forecast(self, gradient: Gradient, start: np.ndarray) -> str:
        """How long it can take: by trajectories of few steps, and by the longest."""
        from bnn.inference._trajectory import advance, is_made

        z, began = torch.from_numpy(start), perf_counter()
        gradient(z)
        each = (perf_counter() - began) * (self.warmup + self.draws)
        most = 2**self.max_tree_depth - 1
        low, high = (tqdm.format_interval(each * n) for n in (min(_STEPS, most), most))
        first = "" if is_made(advance) else ", and seconds to compile the sampler, or read it"
        return f"{low} to {high} in all{first}"


class _Compiling:
    """Compiles the gradient once the trajectories have shown that it repays, and says so."""

    def __init__(self, gradient: Gradient, shown: Any, iterations: int):
        self.gradient, self.shown, self.iterations = gradient, shown, iterations

    def __call__(self, steps: float) -> None:
        self.gradient.hasten(
            steps * self.iterations,
            lambda: self.shown.set_postfix_str("compiling the gradient, some seconds"),
        )


def _show(shown: Any, progress: "Progress", chains: int) -> None:
    """Acceptance chain by chain; of more than four chains the lowest and the highest."""
    if shown.disable:
        return
    rates = np.sort(progress.acceptance[:chains])[[0, -1]] if chains > 4 else progress.acceptance
    accepted = ("-" if chains > 4 else "/").join(f"{rate:.2f}" for rate in rates[:chains])
    shown.update(int(progress.iterations) - shown.n)
    shown.set_postfix_str(
        f"{progress.phase}, step {progress.step:.2g}, {progress.steps:.0f} steps a draw, "
        f"acceptance {accepted}, {progress.divergences} divergences",
        refresh=False,
    )
