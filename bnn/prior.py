"""The prior: what a model says before it has seen an observation."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnn import contract
from bnn.arguments import argument_names, input_call
from bnn.data import tensors
from bnn.errors import ModelError
from bnn.handlers import Capture, branch, quiet_pyro, seeded
from bnn.method import Model, Tensors, check_count
from bnn.prediction import Prediction, predict
from bnn.sites import Sites, require_every_row
from bnn.turns import alone


@alone
def prior_predictive(model: Model, *inputs: Any, draws: int = 500, seed: int = 0) -> Prediction:
    """Runs a model forward from its prior: the data it expects.

    Args:
        model: a Pyro callable `model(*inputs, y=None)`.
        *inputs: its arguments without the observations, (row, *) each.
        draws: draws of the prior.
        seed: of the draws and of the noise.

    Returns:
        Draws of f and y, (chain=1, draw, row, *), and their moments.

    Raises:
        ModelError: the model does not run with its observations set to None, or observes none.
        DataError: an input is not numeric or not finite.

    Example:
        >>> import bnn, pyro, torch
        >>> import pyro.distributions as dist
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("y", dist.Normal(w * x, 0.1), obs=y)
        >>> bnn.prior_predictive(model, torch.ones(3), draws=20).y.shape
        torch.Size([1, 20, 3])
    """
    from bnn.fitting import seed_sequence

    check_count("prior_predictive", draws=draws)
    seed_sequence(seed)
    names = argument_names(model, len(inputs))
    made = tensors(inputs, names)
    try:
        sites = contract.check_prior(model, made, names)
    except ModelError as error:
        raise ModelError(f"{error} {input_call(model, len(inputs))}".strip()) from error
    require_every_row(sites)
    prediction = prior_draws(model, made, sites, draws, seed)[1]
    assert prediction is not None
    return prediction


def prior_draws(
    model: Model, inputs: tuple[Tensor, ...], sites: Sites, draws: int, seed: int
) -> tuple[Tensors, Prediction | None]:
    """Draws of the latent sites, (1, draw, *site) each, and the prior predictive if there is."""
    root = np.random.SeedSequence(seed)
    runs = []
    with quiet_pyro(), seeded(branch(root, 0)), torch.no_grad():
        for _ in range(draws):
            with Capture(sites.observed) as capture:
                model(*inputs, None)
            runs.append({k: capture.values[k] for k in sites.latent})
    latent = {k: torch.stack([run[k] for run in runs]).detach() for k in sites.latent}
    if not sites.every_row:
        return {k: v[None] for k, v in latent.items()}, None
    outside = {k: v for k, v in latent.items() if k in sites.globals}
    prediction = predict(model, outside, inputs, sites, branch(root, 1), (1, draws))
    return {k: v[None] for k, v in latent.items()}, prediction
