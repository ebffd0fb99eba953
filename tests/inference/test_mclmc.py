import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import bnn
from bnn.inference._microcanonical import kick
from tests import exact
from tests.exact import assert_exact, gaussian, mclmc, microcanonical, z_scores


def test_conjugate_regression_is_exact():
    exact.check_regression_by_mclmc()


def test_positive_site_is_exact():
    exact.check_positive_site_by_mclmc()


def test_regression_without_metropolis_is_exact_where_steps_are_short(regression):
    """Two coordinates, and two that are added: the bias is far below the Monte Carlo error."""
    with pytest.warns(bnn.ApproximationWarning, match="step size goes to 0"):
        posterior = bnn.fit(
            regression.model, regression.x, regression.y, method=mclmc(adjusted=False), seed=1
        )
    assert_exact(posterior.draws["w"], regression.mean, regression.sd)
    assert float(posterior.stats["energy_variance"].mean()) < 2 * 5e-4


@pytest.mark.parametrize("target", [0.6, 0.9])
def test_kernel_keeps_a_correlated_gaussian(target):
    exact.check_gaussian_by_mclmc(target)


def test_kernel_keeps_a_narrow_ridge():
    cov = np.array([[1.0, 0.999], [0.999, 1.0]])
    sampler = microcanonical(gaussian(cov), np.random.default_rng(0).standard_normal((16, 2)))
    sampler.warm(100)
    draws, _ = sampler.draw(2_000)
    draws = torch.tensor(draws)
    across = (draws[..., 0] - draws[..., 1]) / math.sqrt(0.002)
    assert_exact(draws, 0.0, 1.0)
    assert_exact(across, 0.0, 1.0)
    assert np.abs(z_scores(across**2, 1.0)).max() < 4


@pytest.mark.parametrize("size", [1, 2, 5])
def test_time_turned_back_returns(size):
    """Leapfrogs, u turned round, the same leapfrogs: where it began, with no heat in all."""

    def gradient(z):
        return (z**4).sum(1) / 4, z**3

    sampler = microcanonical(gradient, np.random.default_rng(1).standard_normal((3, size)) + 1)
    sampler.step = 0.05
    sampler.trajectory(1.0)
    z, heat = sampler.z.copy(), np.zeros(3)
    before = sampler.u.copy()
    _, slope = sampler._leapfrogs(z, sampler.gradient, 30, heat)
    there = heat.copy()
    assert (np.abs(there) > 1e-3).all()
    sampler.u *= -1
    sampler._leapfrogs(z, slope.copy(), 30, heat)
    np.testing.assert_allclose(z, sampler.z, atol=2e-4)
    np.testing.assert_allclose(sampler.u, -before, atol=2e-4)
    np.testing.assert_allclose(heat, 0.0, atol=1e-3)


@pytest.mark.parametrize("size", [2, 3, 6])
def test_heat_is_the_loss_of_volume_of_a_kick(size):
    """heat = -log |det du'/du| on the sphere, by finite differences along its tangents."""
    rng = np.random.default_rng(size)
    u = rng.standard_normal((1, size))
    u /= np.linalg.norm(u)
    slope, scale = 3 * rng.standard_normal((1, size)), np.exp(rng.standard_normal(size))

    def kicked(u):
        u, heat = u.copy(), np.zeros(1)
        kick(u, slope, scale, 0.4, heat)
        return u, heat[0]

    tangents = np.linalg.svd(u)[2][1:]
    after, heat = kicked(u)
    rows = []
    for tangent in tangents:
        ends = [kicked(math.cos(h) * u + math.sin(h) * tangent)[0] for h in (1e-5, -1e-5)]
        rows.append((ends[0] - ends[1])[0] / 2e-5)
    image = np.linalg.svd(after)[2][1:]
    assert math.isclose(heat, -np.linalg.slogdet(np.array(rows) @ image.T)[1], rel_tol=1e-4)


def test_logistic_weight_against_quadrature():
    x = torch.tensor([-2.0, -1.0, -0.5, 0.3, 0.8, 1.5, 2.2])
    y = torch.tensor([0, 0, 1, 0, 1, 1, 1])

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=w * x), obs=y)

    grid = torch.linspace(-15, 15, 60_001, dtype=torch.float64)
    score = dist.Bernoulli(logits=grid[:, None] * x).log_prob(y.double()).sum(1)
    weight = (score + dist.Normal(0.0, 2.0).log_prob(grid)).softmax(0)
    mean = float(weight @ grid)
    sd = math.sqrt(float(weight @ (grid - mean) ** 2))
    posterior = bnn.fit(model, x, y, method=mclmc(), seed=6)
    assert_exact(posterior.draws["w"], mean, sd)


def test_simplex_site_is_exact():
    """Dirichlet-categorical: weights | y = Dirichlet(prior + counts)."""
    y = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 2])

    def model(y=None):
        p = pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 2.0, 0.5])))
        with pyro.plate("data", 10):
            pyro.sample("y", dist.Categorical(p), obs=y)

    after = dist.Dirichlet(torch.tensor([4.0, 4.0, 5.5]))
    posterior = bnn.fit(model, y, method=mclmc(), seed=7)
    assert_exact(posterior.draws["p"], after.mean, after.variance.sqrt())


def test_two_mirror_modes_against_a_grid():
    """f = w2 tanh(w1 x): the sign of both weights is free, the function and sigma are not."""
    x = torch.linspace(-2, 2, 12)
    y = 1.2 * torch.tanh(0.8 * x) + 0.2 * torch.tensor([1, -1, 1, 1, -1, -1, 1, -1, 1, -1, -1, 1.0])

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            f = pyro.deterministic("f", w[1] * torch.tanh(w[0] * x))
            pyro.sample("y", dist.Normal(f, 0.5), obs=y)

    axis = torch.linspace(-5, 5, 801, dtype=torch.float64)
    w1, w2 = torch.meshgrid(axis, axis, indexing="ij")
    residual = y.double() - w2[..., None] * torch.tanh(w1[..., None] * x.double())
    log = -(residual**2).sum(-1) / (2 * 0.25) - (w1**2 + w2**2) / 2
    weight = log.flatten().softmax(0).reshape(log.shape)
    product, at_one = w1 * w2, w2 * torch.tanh(w1)
    w = bnn.fit(model, x, y, method=mclmc(draws=1_500), seed=8).draws["w"]
    for value, each in (
        (product, w[..., 0] * w[..., 1]),
        (at_one, w[..., 1] * torch.tanh(w[..., 0])),
        (w1.abs(), w[..., 0].abs()),
    ):
        mean = float((weight * value).sum())
        sd = math.sqrt(float((weight * (value - mean) ** 2).sum()))
        assert_exact(each, mean, sd)


def test_funnel_is_right_or_warned_of():
    def model(x, y=None):
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        pyro.sample("z", dist.Normal(0.0, (v / 2).exp()).expand([9]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(0 * x, 1.0), obs=y)

    zeros = torch.zeros(3)
    with pytest.warns(bnn.ConvergenceWarning, match="disagree|divergence"):
        bnn.fit(model, zeros, zeros, method=mclmc(draws=300), seed=9)


def test_a_wide_net_without_metropolis_is_warned_of():
    """3,302 weights: sigma comes out too large while R-hat and ESS look fine."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((100, 13)).astype(np.float32)
    y = np.sin(1.5 * x[:, 0]) + 0.3 * rng.standard_normal(100)
    method = bnn.MCLMC(adjusted=False, chains=4, warmup=30, draws=20, energy_variance=5e-3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bnn.fit(bnn.models.mlp_regression(13, hidden=(50, 50)), x, y, method=method, seed=1)
    assert any("likely biased" in str(w.message) for w in caught)
    assert any(w.category is bnn.ApproximationWarning for w in caught)


def test_every_statistic_that_arviz_knows(regression):
    method = bnn.MCLMC(chains=2, warmup=60, draws=50)
    stats = bnn.fit(regression.model, regression.x, regression.y, method=method).stats
    expected = {"lp", "diverging", "energy_error", "acceptance_rate", "step_size", "n_steps"}
    assert set(stats) == expected
    assert all(value.shape == (2, 50) for value in stats.values())
    assert (stats["step_size"][:, 0] == stats["step_size"][:, -1]).all()  # held after warmup
    assert torch.equal(stats["n_steps"][0], stats["n_steps"][1])  # in lockstep
    assert len(stats["n_steps"][0].unique()) > 1  # of random length


def test_lp_is_the_log_joint_of_the_draw(regression):
    method = bnn.MCLMC(chains=2, warmup=60, draws=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior = bnn.fit(regression.model, regression.x, regression.y, method=method)
    w = posterior.draws["w"]
    prior = dist.Normal(0.0, 1.0).log_prob(w).sum(-1)
    likelihood = dist.Normal(w @ regression.x.T, 1.0).log_prob(regression.y).sum(-1)
    assert torch.allclose(posterior.stats["lp"].float(), prior + likelihood, atol=1e-3)


def test_no_seeds_share_a_chain(regression):
    method = bnn.MCLMC(chains=4, warmup=10, draws=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few draws cannot have converged
        firsts = [
            tuple(draw.tolist())
            for seed in range(5)
            for draw in bnn.fit(
                regression.model, regression.x, regression.y, method=method, seed=seed
            ).draws["w"][:, 1]
        ]
    assert len(set(firsts)) == 20


@pytest.mark.parametrize(
    "settings", [{"target_accept": 1.0}, {"energy_variance": 0.0}, {"chains": 0}]
)
def test_refuses_settings_out_of_range(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        bnn.MCLMC(**settings)


def test_refuses_what_is_no_answer_to_adjusted():
    with pytest.raises(TypeError, match="True or False"):
        bnn.MCLMC(adjusted=1)
