"""Microcanonical Monte Carlo: many chains that move at constant speed, in lockstep.

    dz = u dt,   du = -(1 - u u') grad U(z) dt / (d - 1),   |u| = 1,   U(z) = -log p(z, data)

(z on the real line and scaled.) Of this flow exp(-U) is a stationary law. A draw is the end of a
trajectory from a fresh direction u, of random length, taken with probability min(1, exp(-error)):
the integrator's error leaves no bias, and the draws are the posterior's, as NUTS'. Step size,
scales and mean length are learned in warmup from all chains together and then held. Chains take
equally many leapfrogs, so one call of the gradient serves all and none waits or turns back.

Measured on tanh nets, 16 chains, from prior draws, warmup included: least ESS of f at 20 rows (ESS
of sigma) per 1,000 gradients of all chains. 50 weights: .41 (.39); `NUTS`, aiming at .8, .17 (.15),
ChEES-HMC .29 (.26) at the best of six settings, MEADS .18 (.17) with its step turned down, the
unadjusted form from optimised starts (as MILE does) .11 (.10) and biased. 502 weights: 5.1 (6.3),
`NUTS` 2.6 (2.8), unadjusted from optimised starts 4.8 (2.2); MEADS did not converge. Means agree
with those of NUTS and of NumPyro within 3.7 Monte Carlo errors (the largest of 20 rows and sigma in
all runs of benchmarks/README.md), standard deviations within 5 %. Of 3,302 weights one row
of f and sigma differ between modes that chains seldom leave. benchmarks/README.md has all of it,
and ESS a second. Scales from Var(z) alone made steps 3 to 6 times shorter.

`adjusted=False` leaves the Metropolis step out and turns u a little at every leapfrog: Langevin
dynamics, whose law is exp(-U) up to an error that grows with the step and with d. Neither R-hat nor
ESS sees it: sigma of the three nets came out .1, .1 and .4 posterior sd too large; of the third 1.7
too large, and warned of, where the energy error was let grow. Only at 502 weights was it faster.

When not to use it: `adjusted=False` where the answer matters and no other method has confirmed it;
either where rows are many (every gradient reads all), sites discrete, or a few coordinates need far
longer trajectories than the rest (hierarchies: NUTS chooses each trajectory's length).
"""

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bnn.data import Data
from bnn.diagnostics import Finding
from bnn.errors import ApproximationWarning, outside
from bnn.handlers import branch
from bnn.inference._energy import Energy
from bnn.inference._gradient import Gradient
from bnn.method import Method, Model, check_count, check_parts, check_positive
from bnn.posterior import Posterior
from bnn.progress import bar
from bnn.sites import Sites, require_all_rows, require_continuous, require_no_parameters

if TYPE_CHECKING:
    from bnn.inference._mclmc import Sampler

_STEPS = 20  # leapfrogs that a trajectory takes at least, on average
_LIMIT = 0.5  # variance of the energy error between draws above which bias is likely
_KINDS = {"diverging": torch.bool, "n_steps": torch.int64}


@dataclass(frozen=True, kw_only=True)
class MCLMC(Method):
    """Microcanonical Monte Carlo, Metropolis-adjusted, many chains in lockstep.

    Attributes:
        chains: independent but for what they learn together in warmup.
        draws: draws kept from each.
        warmup: trajectories of each before them; not kept.
        adjusted: False leaves out the Metropolis step: biased, see above.
        target_accept: acceptance rate that the step size aims at, in (0, 1).
        energy_variance: without Metropolis, variance of the energy error of a step per coordinate
            that the step size aims at.
        parts: fits that the chains are divided into, for `fit(executor=)`; each learns by itself.

    References:
        Robnik, Cohn-Gordon, Seljak (2025), Metropolis adjusted microcanonical Hamiltonian Monte
        Carlo; Robnik, De Luca, Silverstein, Seljak (2023), Microcanonical Hamiltonian Monte Carlo.
        Ours differs: chains learn together, scales minimise the Fisher divergence, the mean length
        of a trajectory is 1.25 standard deviations of a scaled coordinate (theirs: a share of the
        autocorrelation time). Lengths are uniform from 0 to twice that, as in Hoffman, Radul,
        Sountsov (2021), An adaptive-MCMC scheme for setting trajectory lengths.

    Example:
        >>> MCLMC(draws=1_000).adjusted
        True
    """

    chains: int = 16
    draws: int = 500
    warmup: int = 100
    adjusted: bool = True
    target_accept: float = 0.9
    energy_variance: float = 5e-4
    parts: int = 1

    def __post_init__(self) -> None:
        check_count("MCLMC", chains=self.chains, draws=self.draws, warmup=self.warmup)
        check_parts(self)
        check_positive("MCLMC", energy_variance=self.energy_variance)
        if not isinstance(self.adjusted, bool):
            raise TypeError(f"MCLMC(adjusted={self.adjusted!r}): adjusted is True or False.")
        if not 0 < self.target_accept < 1:
            raise ValueError(f"MCLMC(target_accept={self.target_accept!r}): a rate in (0, 1).")

    @property
    def abreast(self) -> int:
        """Chains: every call of the gradient is for all of them."""
        return self.chains

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
        require_continuous(sites, "MCLMC")
        require_all_rows(data, sites, "MCLMC")
        require_no_parameters(sites, "MCLMC")
        from bnn.inference._mclmc import Sampler, ready  # numba takes .3 s to import

        if not self.adjusted:
            _warn_of_bias()
        energy = Energy(model, data, sites)
        streams = [branch(seed, 2, k).generate_state(4, np.uint64) for k in range(self.chains)]
        rounds = self.warmup + self.draws
        with bar(rounds, "MCLMC", progress) as shown:
            shown.set_postfix_str("tracing the model")
            gradient = Gradient(energy, self.chains, branch(seed, 1))
            announce = lambda: shown.set_postfix_str("compiling the gradient, some seconds")
            gradient.hasten(_STEPS * rounds, announce)
            sampler = Sampler(
                gradient,
                energy.starts(self.chains, branch(seed, 0), overdispersed=True).cpu().numpy(),
                np.stack(streams),
                np.random.default_rng(branch(seed, 3)),
                target=self.target_accept,
                report=lambda sampler: _show(shown, sampler),
            )
            shown.set_postfix_str("" if ready() else "compiling the sampler, or reading it")
            sampler.warm(self.warmup, lambda steps: gradient.hasten(steps * rounds, announce))
            if self.adjusted:
                z, kept = sampler.draw(self.draws)
            else:
                sampler.settle(self.warmup, self.energy_variance)
                z, kept = sampler.draw_unadjusted(self.draws)
        stats = {
            name: torch.from_numpy(values).to(_KINDS.get(name, torch.float64))
            for name, values in kept.items()
        }
        return Posterior(
            model=model,
            method=self,
            data=data,
            sites=sites,
            draws=energy.unflatten(torch.from_numpy(z).to(gradient.device)),
            stats=stats,
        )

    def findings(self, posterior: Posterior) -> list[Finding]:
        """See `Method.findings`."""
        return [] if self.adjusted else [_of_energy(posterior.stats, posterior.sites.size)]


def _warn_of_bias() -> None:
    warnings.warn(
        "MCLMC(adjusted=False) draws from a law that is the posterior only as the step size goes "
        "to 0, and neither R-hat nor ESS shows how far it is. Confirm it by another method, or "
        "leave adjusted=True.",
        ApproximationWarning,
        stacklevel=outside(),
    )


def _of_energy(stats: dict[str, torch.Tensor], size: int) -> Finding:
    """Bias is likely where Metropolis steps would have refused a good part of the stretches."""
    variance, each = float(stats["energy_error"].var()), float(stats["energy_variance"].mean())
    return Finding(
        name="variance of the energy error",
        value=variance,
        threshold=_LIMIT,
        doubtful=not variance <= _LIMIT,
        meaning=f"The energy error between draws has variance {variance:.2g} "
        f"({each:.1g} a step and coordinate, {size} coordinates); above {_LIMIT} draws are likely "
        "biased, scales of noise first.",
        advice="Lower energy_variance, or use adjusted=True.",
    )


def _show(shown: Any, sampler: "Sampler") -> None:
    shown.update(sampler.iterations - shown.n)
    shown.set_postfix_str(
        f"{sampler.phase}, step {sampler.step:.2g}, {sampler.steps:.0f} steps a draw, "
        f"acceptance {sampler.acceptance:.2f}, {sampler.divergences} divergences",
        refresh=False,
    )
