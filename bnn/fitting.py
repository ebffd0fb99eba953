"""The verb: `fit` checks the model, seeds the generators and lets the method work."""

import math
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from bnn import arguments, contract, diagnostics
from bnn.handlers import quiet_pyro, seeded, threads
from bnn.method import METHODS, Method, Model
from bnn.posterior import Posterior


def fit(
    model: Model, *data: Any, method: Method | None = None, seed: int = 0, progress: bool = True
) -> Posterior:
    """Approximates the posterior of a Pyro model.

    The model is any Pyro callable `model(*inputs, y=None)`. Its observed site receives the last
    argument; the plate around that site, one row for each datum, is the data plate. Sites outside
    the data plate are global and become draws.

    Args:
        model: the Pyro model.
        *data: the model's positional arguments, the observations last, one row each on the first
            axis: tensors, NumPy arrays, pandas objects or lists. Or one `DataLoader` that yields
            such tuples. Floats become torch's default dtype.
        method: how to approximate the posterior; default `bnn.SVI()`.
        seed: a whole number from 0 below 2**64. The same seed gives the same draws, whatever ran
            before; generators, dtype and Pyro's state are left as they were.
        progress: show a bar, where a terminal can show one.

    Returns:
        The posterior: draws, and how to predict from them.

    Raises:
        ModelError: the model cannot be fitted as it is written, or not by this method.
        DataError: the data do not fit the model.
        FitError: the objective stayed non-finite.

    Warns:
        ConvergenceWarning: what was looked at on the way makes the answer doubtful: of a sampler
            divergences, energies, tree depth, R-hat of f at 20 rows and of single numbers; of an
            optimiser an objective that still rose. `Posterior.diagnose` looks at more.

    Example:
        >>> import bnn, pyro, torch
        >>> import pyro.distributions as dist
        >>> def model(y=None):
        ...     rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        ...     with pyro.plate("data", 4):
        ...         pyro.sample("y", dist.Poisson(rate), obs=y)
        >>> posterior = bnn.fit(model, [3, 1, 4, 2], method=bnn.NUTS(chains=2, draws=200))
        >>> posterior.draws["rate"].shape
        torch.Size([2, 200])
    """
    if method is None:
        method = METHODS["SVI"]()
    if not isinstance(method, Method):
        raise TypeError(
            f"method is {method!r}. Pass the settings of a method, for example bnn.NUTS(chains=4)."
            f" Known are {', '.join(sorted(METHODS))}."
        )
    root = seed_sequence(seed)
    start = time.perf_counter()
    given = arguments.read(model, data)
    read, sites = contract.check(model, given, adds_sites=method.adds_sites)
    dtype = torch.get_default_dtype()
    weights = sum(math.prod(site.shape) for site in sites.latent.values())
    work = len(read.observations) * weights * method.abreast
    with quiet_pyro(), seeded(root), threads(work):
        try:
            posterior = method.fit(model, read, sites, seed=root, progress=progress)
        finally:
            torch.set_default_dtype(dtype)
        diagnostics.warn(diagnostics.convergence.at_fit(posterior))
    return replace(posterior, seed=seed, seconds=time.perf_counter() - start)


def seed_sequence(seed: Any) -> np.random.SeedSequence:
    """The root of a tree of seeds.

    Raises:
        TypeError: not a whole number.
        ValueError: below 0 or not below 2**64.
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise TypeError(f"seed is {seed!r}. Pass a whole number, for example seed=0.")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}. Pass a whole number from 0 below 2**64.")
    return np.random.SeedSequence(int(seed))
