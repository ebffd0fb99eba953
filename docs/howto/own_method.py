"""Random-walk Metropolis: exact draws from the log joint alone, where it has no usable gradient.

    z' = z + step L noise,   taken with probability min(1, p(data, z') / p(data, z))

z is the model's sites on the real line, the Jacobian of that map included. L L' is the covariance
of the chains over a stretch of warmup, and step brings the acceptance to .3; both are then held.

When not to use it: beyond some twenty numbers, where a draw takes thousands of steps (`bnn.NUTS`).
"""

import math
from dataclasses import dataclass

import torch
from tqdm import trange

import bnn
from bnn.handlers import branch, generator
from bnn.inference import Energy
from bnn.method import check_count
from bnn.sites import require_all_rows, require_continuous, require_no_parameters

_STRETCH = 50  # steps of warmup over which the covariance is taken


@dataclass(frozen=True, kw_only=True)
class Metropolis(bnn.Method):
    """Chains that propose a Gaussian step and keep or refuse it.

    Attributes:
        chains: independent runs, computed together.
        warmup: steps in which the proposal is learned.
        draws: of each chain.
        thin: steps between two draws.
    """

    chains: int = 16
    warmup: int = 1_000
    draws: int = 200
    thin: int = 20

    def __post_init__(self):
        check_count("Metropolis", **vars(self))

    def fit(self, model, data, sites, *, seed, progress):
        """See `bnn.Method.fit`."""
        for require in (require_continuous, require_no_parameters):
            require(sites, "Metropolis")
        require_all_rows(data, sites, "Metropolis")
        energy, noise = Energy(model, data, sites), generator(branch(seed, 1))
        log_joint = lambda z: energy.batched(lambda one: energy.log_joint(one, data.tensors), z)
        step, root = 2.38 / math.sqrt(energy.size), 0.1 * torch.eye(energy.size)
        steps = trange(self.warmup + self.draws * self.thin, disable=None if progress else True)
        path, kept = [], []
        with torch.no_grad():
            z = energy.initial(self.chains, branch(seed, 0))  # (chain, size)
            lp = log_joint(z)
            for number in steps:
                ahead = z + step * torch.randn(z.shape, generator=noise) @ root.T
                new = log_joint(ahead)
                taken = torch.rand(len(z), generator=noise).log() < new - lp  # NaN is refused
                z, lp = torch.where(taken[:, None], ahead, z), torch.where(taken, new, lp)
                if number < self.warmup:
                    step *= math.exp(0.1 * (float(taken.double().mean()) - 0.3))
                    path.append(z)
                    if len(path) == _STRETCH:
                        cov = torch.cat(path).T.cov().reshape(energy.size, -1)
                        root, path = torch.linalg.cholesky(cov + 1e-6 * torch.eye(len(cov))), []
                elif (number - self.warmup) % self.thin == self.thin - 1:
                    kept.append((z, lp))
        z, lp = (torch.stack(each, 1) for each in zip(*kept, strict=True))  # (chain, draw, *)
        return bnn.Posterior(
            model=model,
            method=self,
            data=data,
            sites=sites,
            draws=energy.unflatten(z),
            stats={"lp": lp, "step_size": torch.full_like(lp, step)},
        )
