"""The no-U-turn sampler: draws from p(values | data) itself, by Hamiltonian trajectories.

    H(z, p) = U(z) + p' M^-1 p / 2,   U(z) = -log p(z, data),   z on the real line

A trajectory of leapfrog steps doubles until it turns back on itself; the draw is chosen along it
with probability exp(-H). The step size (dual averaging) and the mass matrix M (windows) are
adapted in warmup and then held, so the draws kept are a Markov chain with the posterior as its
stationary law. Each chain adapts on its own and has its own random numbers.

When not to use it: on many rows (every gradient reads all of them), on discrete sites, on nets of
many thousands of weights. Weights of a net are not identified: read R-hat of f, not of weights.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bnn.data import Data
from bnn.diagnostics import warn_of_sampling
from bnn.handlers import branch
from bnn.inference._energy import Energy
from bnn.inference._gradient import Gradient
from bnn.inference._nuts import STATS, Chain, sample
from bnn.inference._progress import bar
from bnn.method import Method, Model, check_count
from bnn.posterior import Posterior
from bnn.sites import Sites, require_all_rows, require_continuous, require_no_parameters

_LANES = 4  # chains in one call of the gradient


@dataclass(frozen=True, kw_only=True)
class NUTS(Method):
    """Hamiltonian Monte Carlo with trajectories that end where they turn.

    Attributes:
        chains: independent chains.
        draws: draws kept from each.
        warmup: iterations before them, for adaptation; not kept.
        target_accept: acceptance rate that the step size aims at, in (0, 1); raise it towards 1
            where divergences appear.
        max_tree_depth: a trajectory has at most 2^max_tree_depth - 1 steps.
        mass_matrix: "diagonal" adapts a scale for each coordinate, "dense" their covariance too.

    References:
        Hoffman, Gelman (2014), The no-U-turn sampler. Betancourt (2017), A conceptual introduction
        to Hamiltonian Monte Carlo, appendix A (multinomial draws, generalised criterion).

    Example:
        >>> NUTS(chains=2).warmup
        1000
    """

    chains: int = 4
    draws: int = 1_000
    warmup: int = 1_000
    target_accept: float = 0.8
    max_tree_depth: int = 10
    mass_matrix: str = "diagonal"

    def __post_init__(self) -> None:
        check_count(
            "NUTS",
            chains=self.chains,
            draws=self.draws,
            warmup=self.warmup,
            max_tree_depth=self.max_tree_depth,
        )
        if not 0 < self.target_accept < 1:
            raise ValueError(f"NUTS(target_accept={self.target_accept!r}): a rate in (0, 1).")
        if self.mass_matrix not in ("diagonal", "dense"):
            raise ValueError(
                f'NUTS(mass_matrix={self.mass_matrix!r}): known are "diagonal" and "dense".'
            )

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
        energy = Energy(model, data, sites)
        gradient = Gradient(energy, _LANES, branch(seed, 1))
        chains = [
            Chain(
                rng=np.random.default_rng(branch(seed, 2, number)),
                z=start.double().numpy(),
                draws=self.draws,
                warmup=self.warmup,
                max_depth=self.max_tree_depth,
                target=self.target_accept,
                dense=self.mass_matrix == "dense",
            )
            for number, start in enumerate(energy.initial(self.chains, branch(seed, 0)))
        ]
        with bar(self.chains * (self.warmup + self.draws), "NUTS", progress) as shown:
            results = sample(
                lambda z: _asked(gradient, z), chains, _LANES, lambda c: _report(shown, c, chains)
            )
        z = torch.from_numpy(np.stack([kept for kept, _ in results]))
        stats = {
            name: torch.from_numpy(np.stack([stat[name] for _, stat in results])) for name in STATS
        }
        posterior = Posterior(
            model=model,
            method=self,
            data=data,
            sites=sites,
            draws=energy.unflatten(z.to(torch.get_default_dtype())),
            stats=stats,
        )
        warn_of_sampling(stats)
        return posterior


def _asked(gradient: Gradient, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    potential, slope = gradient(torch.from_numpy(z).to(torch.get_default_dtype()))
    return potential.double().numpy(), slope.double().numpy()


def _report(shown: Any, chain: Chain, chains: list[Chain]) -> None:
    shown.update()
    if not shown.disable and chain.iteration % 10 == 0:
        steps = "/".join(f"{c.step_size:.2g}" for c in chains)
        rates = "/".join(f"{c.acceptance:.2f}" for c in chains)
        divergent = sum(c.divergences for c in chains)
        phase = "warmup" if chain.iteration < chain.warmup else "draws"
        shown.set_postfix_str(f"{phase}, step {steps}, acceptance {rates}, {divergent} divergences")
