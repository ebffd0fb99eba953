import math
import re
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import bnn
from bnn import arguments, contract
from bnn.handlers import quiet_pyro, seeded
from bnn.inference._energy import Energy
from bnn.inference._metric import estimated, unit
from bnn.inference._nuts import Sampler
from tests.exact import (
    assert_exact,
    check_positive_site_by_nuts,
    check_regression_by_nuts,
    nuts,
    z_scores,
)

SCHOOLS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SEED = np.random.SeedSequence(3)
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def energy_of(model, x, y):
    return Energy(model, *contract.check(model, arguments.read(model, (x, y))))


def test_conjugate_regression_is_exact():
    check_regression_by_nuts()


def test_positive_site_is_exact():
    check_positive_site_by_nuts()


def kernel(cov, *, kind="diagonal", depth=10, draws=1_500, dtype=np.float64):
    """16 lanes on a Gaussian with that covariance, from three sds out."""
    precision = torch.tensor(np.linalg.inv(cov).astype(dtype))

    def gradient(z):
        pull = z @ precision
        return 0.5 * (z * pull).sum(1), pull

    sd = np.sqrt(np.diag(cov))
    start = (3 * sd * np.random.default_rng(0).standard_normal((16, len(sd)))).astype(dtype)
    seeds = np.random.SeedSequence(7).generate_state(64, np.uint64).reshape(16, 4)
    sampler = Sampler(gradient, start, seeds, depth=depth, target=0.8, mass_matrix=kind)
    sampler.warm(200)
    z, stats = sampler.draw(16, draws)
    return torch.tensor(z).double(), stats


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(
    ("depth", "kind"), [(10, "diagonal"), (3, "diagonal"), (10, "low_rank"), (10, "dense")]
)
def test_kernel_keeps_a_correlated_gaussian(depth, kind, dtype):
    """Eight dimensions, sds .1 to 10, correlation .5; depth 3 cuts trajectories short."""
    sd = np.logspace(-1, 1, 8)
    cov = (0.5 + 0.5 * np.eye(8)) * np.outer(sd, sd)
    z, stats = kernel(cov, kind=kind, depth=depth, dtype=dtype)
    assert_exact(z, 0.0, sd, ratio=(0.98, 1.02))
    assert np.abs(z_scores(z**2, sd**2)).max() < 4
    assert stats["diverging"].sum() == 0
    assert 0.75 < stats["acceptance_rate"].mean() < 0.9


@pytest.mark.parametrize("kind", ["diagonal", "low_rank", "dense"])
def test_a_narrow_ridge_is_exact(kind):
    """Correlation .999: twelve times as many steps where the mass matrix cannot turn."""
    z, stats = kernel(np.array([[1.0, 0.999], [0.999, 1.0]]), kind=kind, draws=4_000)
    assert_exact(z, 0.0, 1.0, ratio=(0.97, 1.03))
    steps = stats["n_steps"].mean()
    assert steps > 20 if kind == "diagonal" else steps < 5


@pytest.mark.parametrize("kind", ["low_rank", "dense"])
def test_the_metric_is_the_covariance(kind):
    """From 200 draws of a Gaussian and their gradients, to rounding: no Monte Carlo error."""
    rng = np.random.default_rng(0)
    root = np.tril(rng.standard_normal((5, 5))) + 2 * np.eye(5)
    cov = root @ root.T
    z = rng.standard_normal((200, 5)) @ root.T
    metric = estimated(kind, z, z @ np.linalg.inv(cov), unit(np.ones(5)))
    turn = np.eye(5) + (metric.basis.T * metric.gain) @ metric.basis
    root = metric.scale[:, None] * turn
    within = 1e-3 if kind == "dense" else 2.0  # low rank leaves out factors below 2
    ratios = np.linalg.eigvals(np.linalg.solve(cov, root @ root.T)).real
    assert np.abs(np.log(ratios)).max() < np.log1p(within)


def test_nothing_waits_and_nothing_is_lost():
    """Every lane gives as many draws, in one call a leapfrog: most calls move every lane."""
    _, stats = kernel(np.diag([1.0, 100.0]), draws=1_000)
    steps = stats["n_steps"].sum(1)
    assert (stats["n_steps"] > 0).all()
    assert steps.mean() / steps.max() > 0.9


def test_eight_schools_of_posteriordb():
    """mu ~ N(0, 5), tau ~ HalfCauchy(5). Exact values by one-dimensional quadrature."""

    def model(error, y=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("school", len(error)):
            theta = pyro.deterministic(
                "theta", mu + tau * pyro.sample("eta", dist.Normal(0.0, 1.0))
            )
            pyro.sample("y", dist.Normal(theta, error), obs=y)

    method = nuts(draws=2_500, target_accept=0.95)
    posterior = bnn.fit(model, ERRORS, SCHOOLS, method=method, seed=4)
    assert_exact(posterior.draws["mu"], 4.3968, 3.3177)
    assert_exact(posterior.draws["tau"], 3.5977, 3.2200, ratio=(0.9, 1.1))  # a heavy right tail
    theta = posterior.deterministic()["theta"]
    exact = [6.212, 4.940, 3.927, 4.757, 3.616, 4.043, 6.297, 4.854]
    assert np.abs(z_scores(theta, exact)).max() < 4


def test_eight_schools_of_inference_gym():
    """mu ~ N(0, 10), log tau ~ N(5, 1), centred: the posterior keeps tau away from 0."""

    def model(error, y=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        tau = pyro.sample("tau", dist.LogNormal(5.0, 1.0))
        with pyro.plate("school", len(error)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, error), obs=y)

    posterior = bnn.fit(model, ERRORS, SCHOOLS, method=nuts(draws=2_500, target_accept=0.9), seed=5)
    assert_exact(posterior.draws["mu"], 5.7990, 5.4472)
    assert_exact(posterior.draws["tau"].log(), 2.4506, 0.5128)
    exact = [14.770, 7.177, 2.668, 6.571, 1.817, 3.426, 12.807, 7.968]
    assert np.abs(z_scores(posterior.draws["theta"], exact)).max() < 4


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
    posterior = bnn.fit(model, x, y, method=nuts(draws=2_000), seed=6)
    assert_exact(posterior.draws["w"], mean, sd)


def test_a_net_with_two_modes_against_quadrature():
    """y = w2 tanh(w1 x) + noise: what its mirror images (w1, w2), (-w1, -w2) have in common."""
    x = torch.tensor([-2.0, -1.4, -0.9, -0.3, 0.2, 0.7, 1.1, 1.9])
    y = torch.tensor([-1.1, -0.9, -1.0, -0.5, 0.4, 0.7, 1.1, 1.0])
    test = torch.tensor([-3.0, -0.5, 1.0])

    def model(x, y=None):
        w1 = pyro.sample("w1", dist.Normal(0.0, 1.0))
        w2 = pyro.sample("w2", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            f = pyro.deterministic("f", w2 * torch.tanh(w1 * x))
            pyro.sample("y", dist.Normal(f, 0.2), obs=y)

    def quantities(w1, w2):
        f = w2[..., None] * torch.tanh(w1[..., None] * test.to(w1))
        return torch.cat([torch.stack([w1.abs(), w2.abs(), w1 * w2], -1), f], -1)

    axis = torch.linspace(-7, 7, 1_401, dtype=torch.float64)  # as 701 points to 9 digits
    w1, w2 = torch.meshgrid(axis, axis, indexing="ij")
    log = dist.Normal(0.0, 1.0).log_prob(w1) + dist.Normal(0.0, 1.0).log_prob(w2)
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        log += dist.Normal(w2 * torch.tanh(w1 * a), 0.2).log_prob(torch.tensor(b).double())
    weight = log.flatten().softmax(0)
    values = quantities(w1, w2).flatten(0, 1)
    mean = weight @ values
    sd = (weight @ (values - mean) ** 2).sqrt()
    posterior = bnn.fit(
        model, x, y, method=nuts(chains=16, warmup=300, draws=800, target_accept=0.95), seed=10
    )
    signs = posterior.draws["w1"].sign().mean(1)
    assert signs.min() < -0.9  # both modes were met
    assert signs.max() > 0.9
    draws = quantities(posterior.draws["w1"], posterior.draws["w2"])
    assert_exact(draws, mean, sd)


def test_dense_and_low_rank_are_exact_on_a_model(regression):
    for kind in ("low_rank", "dense"):
        method = nuts(mass_matrix=kind)
        posterior = bnn.fit(regression.model, regression.x, regression.y, method=method, seed=3)
        assert_exact(posterior.draws["w"], regression.mean, regression.sd)


def test_simplex_site_is_exact():
    """Dirichlet-categorical: weights | y = Dirichlet(prior + counts)."""
    y = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 2])

    def model(y=None):
        p = pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 2.0, 0.5])))
        with pyro.plate("data", 10):
            pyro.sample("y", dist.Categorical(p), obs=y)

    after = torch.tensor([4.0, 4.0, 5.5])
    exact = dist.Dirichlet(after)
    posterior = bnn.fit(model, y, method=nuts(draws=1_500), seed=7)
    assert_exact(posterior.draws["p"], exact.mean, exact.variance.sqrt())


def test_correlations_of_an_lkj_site_are_exact():
    """LKJ(3, eta=2), which the data say nothing of: (r + 1) / 2 ~ Beta(5/2, 5/2), variance 1/6."""

    def model(y):
        corr = pyro.sample("L", dist.LKJCholesky(3, torch.tensor(2.0)))
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(a + 0.0 * corr.sum(), 1.0), obs=y)

    posterior = bnn.fit(model, torch.zeros(5), method=nuts(draws=1_000), seed=9)
    corr = posterior.draws["L"] @ posterior.draws["L"].mT
    below = torch.tril_indices(3, 3, -1)
    assert_exact(corr[..., below[0], below[1]], 0.0, 6**-0.5)


def test_chains_start_finite_apart_and_wider_than_the_posterior(regression):
    """Else R-hat, which sees chains come together, would mean nothing."""
    with quiet_pyro(), seeded(SEED):
        energy = energy_of(regression.model, regression.x, regression.y)
        starts = energy.starts(64, SEED, overdispersed=True)
        density = torch.stack([energy.log_joint(z, energy.data.tensors) for z in starts])
    assert density.isfinite().all()
    assert len(starts.unique(dim=0)) == 64
    assert (starts.std(0) > 3 * torch.as_tensor(regression.sd)).all()


def far_apart(x, y=None):
    """Two modes, at 0 and at 60, of about the same mass, under a prior that reaches both."""
    w = pyro.sample("w", dist.Normal(0.0, 100.0))
    mode = dist.Normal(torch.stack([w, w - 60.0]), 1.0)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), mode), obs=y)


@pytest.mark.parametrize("method", [bnn.NUTS, bnn.MCLMC], ids=lambda m: m.__name__)
def test_chains_find_modes_that_are_as_far_apart_as_the_prior_is_wide(method):
    """And R-hat tells that they do not move between them."""
    zero = torch.zeros(1)
    with pytest.warns(bnn.ConvergenceWarning, match="chains disagree"):
        posterior = bnn.fit(far_apart, zero, zero, method=method(warmup=100, draws=50), seed=1)
    assert 0.1 < (posterior.draws["w"] > 30).float().mean() < 0.9


def counts_of_vague_slopes(x, y=None):
    """exp of a draw of the prior is infinite, or far above what float32 resolves."""
    w = pyro.sample("w", dist.Normal(0.0, 30.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Poisson((x @ w).exp()), obs=y)


def slope_of_one_side(x, y=None):
    """Finite everywhere, but for the slope where w < 0."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(torch.where(w > 0, w.sqrt(), -w) * x[:, 0], 1.0), obs=y)


@pytest.mark.parametrize("model", [counts_of_vague_slopes, slope_of_one_side])
def test_chains_start_where_density_and_slope_can_be_computed(model):
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    with quiet_pyro(), seeded(SEED):
        energy = energy_of(model, x, torch.ones(20))
        for z in energy.starts(16, SEED, overdispersed=True):
            z.requires_grad_()
            value = energy.log_joint(z, energy.data.tensors)
            (slope,) = torch.autograd.grad(value, z)
            assert slope.isfinite().all()
            assert value.abs() < 1 / torch.finfo(value.dtype).eps


def test_a_chain_does_not_depend_on_how_many_there_are(regression):
    fits = {
        n: bnn.fit(
            regression.model,
            regression.x,
            regression.y,
            method=bnn.NUTS(chains=n, warmup=60, draws=40),
            seed=8,
        ).draws["w"]
        for n in (1, 2, 4, 5, 16)
    }
    for many, fewer in ((4, (1, 2)), (16, (5,))):  # 4 lanes learn together, or 16
        for n in fewer:
            assert torch.equal(fits[n], fits[many][:n]), n


def test_no_seeds_share_a_chain(regression):
    method = bnn.NUTS(chains=4, warmup=10, draws=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few draws cannot have converged
        firsts = [
            tuple(draw.tolist())
            for seed in range(10)
            for draw in bnn.fit(
                regression.model, regression.x, regression.y, method=method, seed=seed
            ).draws["w"][:, 0]
        ]
    assert len(set(firsts)) == 40


def test_every_statistic_that_arviz_knows(regression):
    method = bnn.NUTS(chains=2, warmup=100, draws=50)
    stats = bnn.fit(regression.model, regression.x, regression.y, method=method).stats
    expected = {
        "lp", "diverging", "energy", "energy_error", "max_energy_error", "acceptance_rate",
        "step_size", "tree_depth", "n_steps", "reached_max_treedepth",
    }  # fmt: skip
    assert set(stats) == expected
    assert all(value.shape == (2, 50) for value in stats.values())
    assert (stats["n_steps"] < 2 ** stats["tree_depth"]).all()
    assert (stats["n_steps"] >= 2 ** (stats["tree_depth"] - 1)).all()
    assert (stats["step_size"][:, 0] == stats["step_size"][:, -1]).all()  # held after warmup


def test_lp_is_the_log_joint_of_the_draw(regression):
    method = bnn.NUTS(chains=1, warmup=100, draws=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior = bnn.fit(regression.model, regression.x, regression.y, method=method)
    w = posterior.draws["w"][0]
    prior = dist.Normal(0.0, 1.0).log_prob(w).sum(1)
    likelihood = dist.Normal(w @ regression.x.T, 1.0).log_prob(regression.y).sum(1)
    assert torch.allclose(posterior.stats["lp"][0].float(), prior + likelihood, atol=1e-3)


def test_funnel_is_right_or_warned_of():
    def model(x, y=None):
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        pyro.sample("z", dist.Normal(0.0, (v / 2).exp()).expand([9]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(0 * x, 1.0), obs=y)

    zeros = torch.zeros(3)
    # Which sign of it shows depends on the seed: R-hat of lp on all of 7, divergences on 4.
    with pytest.warns(bnn.ConvergenceWarning, match="divergence|disagree"):
        bnn.fit(model, zeros, zeros, method=nuts(draws=300), seed=9)


def test_short_trajectories_are_told():
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.01), obs=y)

    x = torch.tensor([[1.0, 1.0], [1.0, 1.001], [0.5, 0.5]])
    method = bnn.NUTS(chains=2, warmup=50, draws=50, max_tree_depth=2)
    with pytest.warns(bnn.ConvergenceWarning, match="tree depth"):
        bnn.fit(model, x, torch.ones(3), method=method)


@pytest.mark.parametrize(
    ("chains", "shown"), [(2, r"\d\.\d\d/\d\.\d\d,"), (5, r"\d\.\d\d-\d\.\d\d,")]
)
def test_the_bar_tells_acceptance_chain_by_chain(regression, monkeypatch, capsys, chains, shown):
    """In warmup too; of many chains the lowest and the highest. At first, how long it can take."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    method = bnn.NUTS(chains=chains, warmup=100, draws=100)
    bnn.fit(regression.model, regression.x, regression.y, method=method)
    text = capsys.readouterr().err
    assert "divergences" in text
    assert re.search("acceptance " + shown, text)
    assert re.search(r"\d\d:\d\d to \d\d:\d\d in all", text)  # before anything else
    assert "nan" not in text
