import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import bnn
from tests.exact import gamma_poisson


def test_mode_of_a_gaussian_posterior_is_its_mean(regression):
    posterior = bnn.fit(regression.model, regression.x, regression.y, method=bnn.MAP(), seed=0)
    assert torch.allclose(posterior.draws["w"][0, 0], regression.mean, atol=1e-3)
    assert posterior.draws["w"].shape == (1, 1_000, 2)
    assert (posterior.draws["w"] == posterior.draws["w"][:, :1]).all()


def test_annealing_ends_at_the_mode(regression):
    method = bnn.MAP(annealing=0.3)
    posterior = bnn.fit(regression.model, regression.x, regression.y, method=method)
    assert torch.allclose(posterior.draws["w"][0, 0], regression.mean, atol=1e-3)


@pytest.mark.parametrize("annealing", [-1, 1_000, float("nan")])
def test_annealing_ends_before_the_steps(annealing):
    with pytest.raises(ValueError, match="must reach 1 before the end"):
        bnn.MAP(steps=1_000, annealing=annealing)


def test_mode_is_that_of_the_models_own_space():
    """Gamma(a, b) has its mode at (a - 1) / b; with the Jacobian of log it would be a / b."""
    y = torch.tensor([0.0, 1.0, 0.0, 2.0])
    posterior = bnn.fit(gamma_poisson, y, method=bnn.MAP())
    assert math.isclose(float(posterior.draws["rate"][0, 0]), 4 / 5, abs_tol=2e-3)
    same = bnn.fit(gamma_poisson, y, method=bnn.SVI(guide="point"))
    assert math.isclose(float(same.draws["rate"][0, 0]), 4 / 5, abs_tol=2e-3)


def test_restarts_are_chains_that_start_apart():
    def two_modes(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w**2 * x, 0.1), obs=y)

    ones = torch.ones(5)
    posterior = bnn.fit(two_modes, ones, ones, method=bnn.MAP(restarts=6, draws=2), seed=1)
    w = posterior.draws["w"]
    assert w.shape == (6, 2)
    assert torch.allclose(w.abs(), torch.ones(6, 2), atol=0.01)
    assert w.min() < 0 < w.max()


def test_minibatches_reach_the_mode(regression):
    method = bnn.MAP(batch_size=10, steps=10_000)
    posterior = bnn.fit(regression.model, regression.x, regression.y, method=method, seed=2)
    gap = (posterior.draws["w"][0, 0] - regression.mean).abs() / regression.sd
    assert (gap < 0.15).all()
