"""Moved targets: of each member its own, the observations with a fixed draw of the noise added."""

import numpy as np
import torch

from bnn.errors import ModelError
from bnn.handlers import At, Capture, branch, generator, seeded
from bnn.inference._energy import Energy
from bnn.method import Tensors

_SAME = 1e-3  # of the widest noise: below that two are rounded differently, no more
_ROUNDING = 16  # spacings of the numbers themselves


def moved_targets(energy: Energy, sd: float, members: int, seed: np.random.SeedSequence) -> Tensors:
    """Targets of each member, {"targets": (member, row, *)}.

    Args:
        energy: of the model and its data.
        sd: of the noise, in units of y.
        members: how many.
        seed: of what is drawn.

    Raises:
        ModelError: they are no numbers of the kind that is observed, or the model learns its noise.
    """
    y, site = energy.data.observations, energy.sites.observed
    draws = [torch.randn(y.shape, generator=generator(branch(seed, k))) for k in range(members)]
    targets = y + sd * torch.stack(draws).to(y.device)
    with seeded(seed), Capture(site) as run:
        energy.model(*energy.data.tensors)
    if not y.is_floating_point() or not bool(run.fn.support.check(targets).all()):
        raise ModelError(
            f'RandomizedPriors(noise={sd!r}) moves the targets, and "{site}" takes only what is '
            f'{run.fn.support}. Use bootstrap="exponential" in place of noise.'
        )
    if _learns_noise(energy, branch(seed, members)):
        raise ModelError(
            f'RandomizedPriors(noise={sd!r}) moves the targets, and the noise of "{site}" depends '
            "on what is learned: it would be learned from the moved ones, too wide. Fix it in the "
            f'model, as likelihoods.Gaussian({sd!r}) does, or use bootstrap="exponential" in place '
            "of noise."
        )
    return {"targets": targets}


def _learns_noise(energy: Energy, seed: np.random.SeedSequence) -> bool:
    """True where two draws of the prior differ in more than the place of the observations."""
    apart, largest = [], 0.0
    for z in energy.prior_draws(2, branch(seed, 0)):
        drawn = []
        for key in (1, 2):
            with seeded(branch(seed, key)), Capture(energy.sites.observed) as run:
                with At(energy.values(z)):
                    energy.model(*energy.data.tensors)
                drawn.append(run.fn.sample())
        apart.append(drawn[0] - drawn[1])  # the same numbers of the generator: the place cancels
        largest = max(largest, *(float(each.abs().max()) for each in drawn))
    rounding = _ROUNDING * torch.finfo(apart[0].dtype).eps * largest
    most = _SAME * apart[0].abs().max() + rounding
    return not bool(((apart[0] - apart[1]).abs() <= most).all())
