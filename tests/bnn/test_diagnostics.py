"""Every finding at a planted failure and at a healthy fit, against numbers known exactly."""

import json
import math
import warnings
from dataclasses import replace

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import bnn
from bnn.diagnostics import Finding, Report, collapse, convergence, functions
from bnn.export import psis
from bnn.inference._importance import pareto_k
from bnn.prior import prior_draws
from tests.exact import Regression

QUICK = {"steps": 800, "learning_rate": 0.05, "schedule": "cosine"}


def named(report: Report) -> dict[str, Finding]:
    return {each.name: each for each in report.findings}


def fit(model, *data, method, seed=0):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bnn.fit(model, *data, method=method, seed=seed, progress=False)


def walk(chains=4, draws=251, quantities=3, seed=0):
    rng = np.random.default_rng(seed)
    steps = rng.standard_normal((chains, draws, quantities))
    for i in range(1, draws):
        steps[:, i] += 0.7 * steps[:, i - 1]
    return torch.tensor(steps)


# Against ArviZ


@pytest.mark.parametrize("case", ["apart", "odd", "ties", "scales"])
def test_rhat_is_arvizs(case):
    x = walk()
    if case == "apart":
        x[0] += 2.0
    if case == "ties":
        x = x.mul(2).round()
    if case == "scales":
        x[0] *= 4.0
    x = x if case == "odd" else x[:, :250]
    expected = [float(az.rhat(np.ascontiguousarray(each))) for each in x.moveaxis(-1, 0).numpy()]
    np.testing.assert_allclose(convergence.rhat(x), expected, rtol=1e-9)


@pytest.mark.parametrize("case", ["apart", "odd", "ties", "against", "one", "few", "constant"])
def test_ess_is_arvizs(case):
    x = walk()
    if case == "apart":
        x[0] += 2.0
    if case == "ties":
        x = x.round()
    if case == "against":  # draws that take turns are worth more than they are
        x = torch.randn(4, 250, 3, generator=torch.Generator().manual_seed(0)).double()
        x[:, 1::2] = -x[:, ::2] + 0.3 * x[:, 1::2]
    if case == "one":
        x = x[:1]
    if case == "few":
        x = x[:, :7]
    if case == "constant":
        x[..., 0] = 3.0
    each = [np.ascontiguousarray(one) for one in x.moveaxis(-1, 0).numpy()]
    bulk, tail = convergence.ess(x)
    expected = [float(az.ess(one, method="bulk")) for one in each]
    np.testing.assert_allclose(bulk, expected, rtol=1e-9)
    expected = [float(az.ess(one, method="tail", prob=(0.05, 0.95))) for one in each]
    np.testing.assert_allclose(tail, expected, rtol=1e-9)


def test_bfmi_of_a_walk_and_of_independent_energies():
    """A difference has twice the variance; in a walk of correlation c 2 (1 - c) times."""
    rng = np.random.default_rng(0)
    free = torch.tensor(rng.standard_normal((4, 20_000)))
    assert convergence.bfmi(free).numpy() == pytest.approx(2.0, abs=0.06)
    slow = walk(4, 20_000, 1)[..., 0]
    assert convergence.bfmi(slow).numpy() == pytest.approx(2 * 0.3, abs=0.03)


def test_smoothed_weights_give_a_mean_that_is_known():
    """Log ratios N(0, 1/4): their exponentials have mean e^(1/8), and no heavy tail."""
    ratios = 0.5 * torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    for shift in (0.0, -500.0):
        k, log_mean = psis(ratios + shift)
        assert k < 0.3
        assert log_mean - shift == pytest.approx(1 / 8, abs=4 * 0.53 / math.sqrt(20_000))
    assert psis(torch.full((50,), -3.0)) == (0.0, -3.0)


def test_exponential_of_an_exponential_has_its_rate_as_k():
    """Log ratios k E with E exponential are Pareto's own: shape k."""
    unit = torch.empty(20_000).exponential_(generator=torch.Generator().manual_seed(0))
    for k in (0.3, 0.6, 0.9):
        assert psis(k * unit)[0] == pytest.approx(k, abs=0.15)  # the tail is 424 draws: 2 sd


def test_a_fit_reads_the_k_that_arviz_reads():
    draws = torch.Generator().manual_seed(0)
    for count in (100, 137, 1000, 5000):
        normal = torch.randn(count, generator=draws, dtype=torch.float64)
        for ratios in (0.1 * normal, 2 * normal, 40 * normal - 1e4, normal.abs(), -normal.exp()):
            assert pareto_k(ratios) == pytest.approx(psis(ratios)[0], abs=1e-9)
    assert pareto_k(torch.full((50,), -3.0)) == 0
    few = torch.cat([torch.zeros(997), torch.arange(3.0)])
    assert pareto_k(few) == psis(few)[0] == math.inf


def test_the_limit_of_rhat_is_that_of_the_same_ess():
    assert convergence.rhat_limit(4) == pytest.approx(1.01, abs=1e-4)
    assert convergence.rhat_limit(1) == 1.01
    assert convergence.rhat_limit(16) == pytest.approx(math.sqrt(1.08))


# Chains


def two_weights(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        f = pyro.deterministic("f", w[1] * torch.tanh(w[0] * x))
        pyro.sample("y", dist.Normal(f, 0.3), obs=y)


def two_numbers(x, y=None):
    u, v = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in "uv")
    with pyro.plate("data", len(x)):
        f = pyro.deterministic("f", v * torch.tanh(u * x))
        pyro.sample("y", dist.Normal(f, 0.3), obs=y)


@pytest.mark.parametrize("model", [two_weights, two_numbers])
def test_f_agrees_where_weights_disagree_by_their_sign(model):
    x = torch.linspace(-2, 2, 40)
    noise = torch.randn(40, generator=torch.Generator().manual_seed(0))
    method = bnn.NUTS(chains=4, draws=1_000, target_accept=0.95)
    with warnings.catch_warnings():
        warnings.simplefilter("error", bnn.ConvergenceWarning)
        posterior = bnn.fit(model, x, 1.5 * torch.tanh(x) + 0.3 * noise, method=method, seed=3)
    first = next(iter(posterior.draws.values())).reshape(4, 1_000, -1)[..., :1]
    assert float(convergence.rhat(first)) > 1.4
    report = posterior.diagnose()
    assert named(report)["R-hat of f"].value < 1.01
    assert not report.doubtful, report
    if model is two_weights:
        finding = named(report)["R-hat of weights"]
        assert finding.value > 1.4
        assert finding.threshold is None
        assert "not identified" in finding.meaning
    else:
        assert {"R-hat of |u|", "R-hat of |v|"} < set(named(report))


@pytest.fixture(scope="module")
def healthy():
    exact = Regression.make()
    return fit(exact.model, exact.x, exact.y, method=bnn.NUTS(chains=4, draws=1_000))


def test_chains_apart_are_found(healthy):
    assert not healthy.diagnose().doubtful, healthy.diagnose()
    w = healthy.draws["w"].clone()
    w[0] += 2 * w.std()
    found = {each.name for each in replace(healthy, draws={"w": w}).diagnose().doubtful}
    assert {"R-hat of f", "bulk ESS of f"} <= found


def test_a_scalar_apart_is_found(healthy):
    scale = healthy.stats["lp"].clone()
    scale[0] += 3 * scale.std()
    report = replace(healthy, stats=healthy.stats | {"lp": scale}).diagnose()
    assert "R-hat of log density" in {each.name for each in report.doubtful}


@pytest.mark.parametrize("outputs", [1, 2])
def test_a_noise_scale_of_each_output_is_a_scalar(outputs):
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([outputs]).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0).expand([outputs]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x * w, sigma).to_event(1), obs=y)

    x = torch.linspace(-1, 1, 20)[:, None]
    noise = torch.randn(20, outputs, generator=torch.Generator().manual_seed(0))
    y = x @ torch.ones(1, outputs) + 0.1 * noise
    posterior = fit(model, x, y, method=bnn.NUTS(chains=4, draws=300))
    assert named(posterior.diagnose())["R-hat of sigma"].value < 1.05
    sigma = posterior.draws["sigma"].clone()
    sigma[0, ..., -1:] += 5 * sigma.std()
    found = named(replace(posterior, draws=posterior.draws | {"sigma": sigma}).diagnose())
    assert found["R-hat of sigma"].doubtful
    assert found["R-hat of sigma"].value > 1.3


def test_a_sigma_of_swapping_parts_is_no_scalar():
    def model(x, y=None):
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 0.3).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            parts = dist.Normal(torch.tensor([-1.0, 1.0]), sigma)
            pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts), obs=y)

    y = torch.linspace(-2, 2, 20)
    posterior = fit(model, y, y, method=bnn.NUTS(chains=4, draws=50, warmup=50))
    found = named(posterior.diagnose())
    assert "R-hat of sigma" not in found
    assert "R-hat of weights" in found


def test_a_report_says_what_so_little_cannot_tell():
    exact = Regression.make()
    few = fit(exact.model, exact.x, exact.y, method=bnn.SVI(steps=300, draws=50))
    report = few.diagnose()
    assert "raise draws" in report.missing["k-hat of q"]
    assert "worth 50 independent ones" in report.missing["distance from the prior"]
    assert "the rest of the fit" not in report.missing
    short = replace(few, history=few.history[:10], complete=False).diagnose()
    assert named(short)["steps"].value == 10
    assert named(short)["steps"].unlimited == "too few to tell"
    assert "stopped" in short.missing["the rest of the fit"]


def test_no_rows_cannot_be_looked_at(healthy):
    with pytest.raises(bnn.DataError, match="rows to look at are none"):
        healthy.diagnose(torch.zeros(0, *healthy.data.inputs[0].shape[1:]))
    with pytest.raises(bnn.DataError, match="no rows"):
        bnn.reference(healthy, torch.zeros(0, *healthy.data.inputs[0].shape[1:]), against=healthy)


def test_draws_too_few_for_rhat_do_not_pass_for_healthy(healthy):
    first = lambda values: {k: v[:, :3] for k, v in values.items()}
    report = replace(healthy, draws=first(healthy.draws), stats=first(healthy.stats)).diagnose()
    assert [each.name for each in report.doubtful] == ["draws of a chain"]


@pytest.mark.parametrize(
    ("name", "stat", "finding"),
    [
        ("diverging", lambda v: v.index_fill(1, torch.tensor([5]), True), "divergences"),
        ("energy", lambda v: v.sort(1).values, "E-BFMI"),
        ("reached_max_treedepth", torch.ones_like, "tree depth"),
    ],
)
def test_statistics_of_the_sampler_are_judged(healthy, name, stat, finding):
    """At limits of the literature: Betancourt (2016), Stan; no divergence is to be passed over."""
    limits = {"divergences": 0.0, "E-BFMI": 0.3, "tree depth": 0.05}
    assert named(healthy.diagnose())[finding].threshold == limits[finding]
    assert not named(healthy.diagnose())[finding].doubtful
    ill = replace(healthy, stats=healthy.stats | {name: stat(healthy.stats[name])})
    assert [each.name for each in ill.diagnose().doubtful] == [finding]
    with pytest.warns(bnn.ConvergenceWarning) as caught:
        bnn.diagnostics.warn(bnn.diagnostics.at_fit(ill))
    assert len(caught) == 1


def test_a_fit_warns_once_of_chains_that_disagree():
    """Two modes of f, which chains do not leave."""

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(x)):
            f = pyro.deterministic("f", w + x)
            pyro.sample("y", dist.Normal(f.square(), 0.5), obs=y)

    x = torch.zeros(20)
    with pytest.warns(bnn.ConvergenceWarning) as caught:
        posterior = bnn.fit(model, x, x + 9.0, method=bnn.NUTS(chains=4, draws=300), seed=1)
    (warning,) = [w for w in caught if w.category is bnn.ConvergenceWarning]
    assert "The chains disagree: split R-hat of" in str(warning.message)
    assert warning.filename == __file__
    assert "R-hat of f" in {each.name for each in posterior.diagnose().doubtful}


# The ill-conditioned regression


def warming(x, y=None):
    """Kilpisjarvi's model: a summer's temperature over years 3952 to 4013, not centred."""
    alpha = pyro.sample("alpha", dist.Normal(9.3, 100.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 0.0333))
    sigma = pyro.sample("sigma", dist.HalfNormal(5.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(alpha + beta * x, sigma), obs=y)


def years():
    x = torch.arange(3952.0, 4014.0)
    noise = torch.randn(62, generator=torch.Generator().manual_seed(0))
    return x, 9.3 + 0.0176 * (x - x.mean()) + 1.1 * noise


def exact_at(x, y, at):
    """Mean and sd of alpha + beta * at: Gaussian given sigma, and sigma by quadrature."""
    x, y = x.double(), y.double()
    design, point = torch.stack([torch.ones_like(x), x], 1), torch.tensor([1.0, at]).double()
    prior, start = torch.tensor([100.0, 0.0333]).double() ** 2, torch.tensor([9.3, 0.0]).double()
    logs, means, variances = [], [], []
    for sigma in torch.linspace(0.5, 3, 200).double():
        precision = torch.diag(1 / prior) + design.T @ design / sigma**2
        mean = torch.linalg.solve(precision, start / prior + design.T @ y / sigma**2)
        cov = sigma**2 * torch.eye(len(x)).double() + design @ torch.diag(prior) @ design.T
        normal = torch.distributions.MultivariateNormal(design @ start, cov)
        logs.append(normal.log_prob(y) - sigma**2 / 50)
        means.append(point @ mean)
        variances.append(point @ torch.linalg.solve(precision, point))
    weight, mean = torch.stack(logs).softmax(0), torch.stack(means)
    centre = (weight * mean).sum()
    spread = (weight * (torch.stack(variances) + (mean - centre) ** 2)).sum()
    return float(centre), float(spread.sqrt())


@pytest.mark.parametrize(
    "method",
    [
        bnn.NUTS(chains=4, warmup=150, draws=150, max_tree_depth=8),  # what was silently wrong
        bnn.NUTS(chains=4, mass_matrix="dense"),
        pytest.param(bnn.MCLMC(chains=8, draws=300), marks=pytest.mark.slow),
        bnn.Laplace(steps=1_000),
        pytest.param(bnn.SVI(steps=2_000), marks=pytest.mark.slow),
        pytest.param(bnn.SVI(guide="full_rank", steps=2_000), marks=pytest.mark.slow),
        bnn.MAP(steps=2_000),
    ],
    ids=["short", "dense", "mclmc", "laplace", "svi", "full_rank", "map"],
)
def test_the_ill_conditioned_regression_is_right_or_warned_of(method):
    x, y = years()
    mean, sd = exact_at(x, y, 4016.0)
    with pytest.warns(bnn.DataWarning, match='"x" lies 22. of its standard deviations from 0'):
        posterior = bnn.fit(warming, x, y, method=method, progress=False)
    f = (posterior.draws["alpha"] + 4016 * posterior.draws["beta"]).double()
    right = abs(float(f.mean()) - mean) < 0.3 * sd and abs(float(f.std()) / sd - 1) < 0.2
    report = posterior.diagnose(torch.tensor([3952.0, 4016.0]))
    assert right or report.doubtful, report


def test_a_model_that_centres_its_inputs_is_not_told_to():
    x, y = years()
    model = bnn.models.mlp_regression(1, (5,), standardize=(x[:, None], y))
    with warnings.catch_warnings():
        warnings.simplefilter("error", bnn.DataWarning)
        for seed in range(3):
            method = bnn.MAP(steps=1, schedule="constant")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", bnn.ConvergenceWarning)
                bnn.fit(model, x[:, None], y, method=method, seed=seed, progress=False)


# Guides


@pytest.mark.parametrize("correlation", [0.3, 0.6, 0.8])
def test_khat_of_mean_field_is_the_correlation(correlation):
    """w = exp(rho u1 u2) of independent normals, whose tail is x^(-1/rho) but for a logarithm.

    So k-hat lies somewhat below |rho|: .05 on average at 20,000 draws, with an sd of .07.
    """
    exact = Regression.make(correlation)
    rho = abs(float(exact.cov[0, 1] / (exact.sd[0] * exact.sd[1])))
    method = bnn.Laplace(structure="diag", steps=300, draws=20_000)  # the mean-field optimum
    found = named(fit(exact.model, exact.x, exact.y, method=method).diagnose())
    assert found["k-hat of q"].value == pytest.approx(rho - 0.05, abs=0.15)
    kl = -0.5 * math.log(1 - rho**2)
    assert found["gap of q"].value == pytest.approx(kl, rel=0.25)


def coin(y=None):
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    with pyro.plate("data", 20 if y is None else len(y)):
        pyro.sample("y", dist.Bernoulli(p), obs=y)


def scale(y=None):
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with pyro.plate("data", 60 if y is None else len(y)):
        pyro.sample("y", dist.Normal(0.0, s), obs=y)


def test_khat_of_ratios_that_are_all_but_equal_is_no_cause_for_doubt():
    """Of a Beta posterior on the logit scale q is right to .01 nats, and k-hat above its limit."""
    y = torch.ones(20).scatter(0, torch.arange(14), 0.0)
    above = 0
    for seed in range(3):
        report = bnn.fit(coin, y, method=bnn.SVI(), seed=seed).diagnose()
        finding = named(report)["k-hat of q"]
        above += finding.value > finding.threshold
        assert not finding.doubtful, finding
        assert "all but equal, and reweighted draws worth 99" in finding.meaning
    assert above


@pytest.mark.parametrize("method", [bnn.NUTS(chains=4, warmup=300, draws=500), bnn.SVI()])
def test_a_model_of_scales_is_not_judged_by_its_constant_mean(method):
    y = 2 * torch.randn(60, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error", bnn.ConvergenceWarning)
        report = bnn.fit(scale, y, method=method).diagnose()
    assert not report.doubtful, report
    assert "f does not depend on the sites" in report.missing["distance from the prior"]


def test_a_net_whose_output_is_not_used_has_no_variance():
    """Its noise is learned, and y so follows a site: f is constant, and ought not to be."""

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        s = pyro.sample("s", dist.HalfNormal(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(0 * (x @ w), s), obs=y)

    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    report = fit(model, x, x[:, 0], method=bnn.NUTS(chains=4, warmup=100, draws=100)).diagnose()
    assert "spread of f" in {each.name for each in report.doubtful}


def test_khat_of_svi():
    """Narrow in one direction of two, and doubtful; with a covariance, exact."""
    exact = Regression.make(0.95)
    method = bnn.SVI(draws=4_000, particles=4, **QUICK)
    with pytest.warns(bnn.ConvergenceWarning) as caught:
        report = bnn.fit(exact.model, exact.x, exact.y, method=method).diagnose()
    assert [each.name for each in report.doubtful] == ["k-hat of q"]
    assert report.doubtful[0].value == pytest.approx(0.85, abs=0.25)
    assert [str(each.message)[:10] for each in caught] == ["The ratios"]
    assert caught[0].filename == __file__
    method = bnn.SVI(guide="full_rank", draws=4_000, particles=8, **QUICK)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = bnn.fit(exact.model, exact.x, exact.y, method=method).diagnose()
    assert not report.doubtful, report
    assert abs(named(report)["gap of q"].value) < 0.02


def test_log_q_and_the_jacobian_of_a_positive_site_cancel():
    """Gamma-Poisson: the Gaussian of log rate against the exact posterior, by quadrature."""

    def model(y=None):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", 4):
            pyro.sample("y", dist.Poisson(rate), obs=y)

    method = bnn.Laplace(steps=300, draws=20_000, hessian="exact")
    report = fit(model, torch.tensor([0.0, 1.0, 0.0, 2.0]), method=method).diagnose()
    z = torch.linspace(-6, 4, 4_001, dtype=torch.float64)
    log_q = dist.Normal(0.0, 5**-0.5).log_prob(z)  # mode log(5 / 5), curvature 5
    log_p = dist.Gamma(5.0, 5.0).log_prob(z.exp()) + z
    kl = float((log_q.exp() * (log_q - log_p)).sum() * 0.0025)
    assert named(report)["gap of q"].value == pytest.approx(kl, abs=0.004)


def test_guides_of_pyro_and_by_hand_have_a_gap_too():
    exact = Regression.make(0.6)
    rho = float(exact.cov[0, 1] / (exact.sd[0] * exact.sd[1]))
    settings = QUICK | {"draws": 1_000, "steps": 500}
    for guide, kl in (
        (pyro.infer.autoguide.AutoDiagonalNormal, -0.5 * math.log(1 - rho**2)),
        (pyro.infer.autoguide.AutoMultivariateNormal, 0.0),
    ):
        posterior = fit(exact.model, exact.x, exact.y, method=bnn.SVI(guide=guide, **settings))
        assert named(posterior.diagnose())["gap of q"].value == pytest.approx(kl, abs=0.08)

    def model(y=None):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", 4):
            pyro.sample("y", dist.Poisson(rate), obs=y)

    def by_hand(y=None):
        positive = torch.distributions.constraints.positive
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("rate", dist.LogNormal(loc, pyro.param("s", torch.tensor(0.5), positive)))

    method = bnn.SVI(guide=by_hand, **settings)
    posterior = fit(model, torch.tensor([0.0, 1.0, 0.0, 2.0]), method=method)
    z = torch.linspace(-6, 4, 4_001, dtype=torch.float64)
    log_q = dist.Normal(posterior.params["loc"], posterior.params["s"]).log_prob(z)
    log_p = dist.Gamma(5.0, 5.0).log_prob(z.exp()) + z
    kl = float((log_q.exp() * (log_q - log_p)).sum() * 0.0025)
    assert named(posterior.diagnose())["gap of q"].value == pytest.approx(kl, abs=0.03)


def test_fewer_draws_have_a_stricter_limit():
    exact = Regression.make()
    method = bnn.Laplace(steps=300, draws=200)
    finding = named(fit(exact.model, exact.x, exact.y, method=method).diagnose())["k-hat of q"]
    assert finding.threshold == pytest.approx(1 - 1 / math.log10(200))


def test_an_objective_that_still_rises_is_found_by_fit_and_report(regression):
    for schedule in ("plateau", "constant", "cosine"):
        method = bnn.MAP(steps=100, learning_rate=0.001, schedule=schedule)
        with pytest.warns(bnn.ConvergenceWarning, match="still rising when 100 steps ran short"):
            posterior = bnn.fit(regression.model, regression.x, regression.y, method=method)
        assert "rise of the objective" in {each.name for each in posterior.diagnose().doubtful}
    with warnings.catch_warnings():
        warnings.simplefilter("error", bnn.ConvergenceWarning)
        method = bnn.SVI(guide="full_rank", particles=4, **QUICK)
        posterior = bnn.fit(regression.model, regression.x, regression.y, method=method)
    assert not named(posterior.diagnose())["rise of the objective"].doubtful


# Collapse


@pytest.mark.parametrize("draws", [1, 1_000])
def test_a_mode_has_no_variance_and_says_so(regression, draws):
    method = bnn.MAP(steps=1_000, draws=draws)
    posterior = fit(regression.model, regression.x, regression.y, method=method)
    assert [each.name for each in posterior.diagnose().doubtful] == ["spread of f"]


def test_one_draw_of_labels_has_no_variance():
    def labels(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            f = pyro.deterministic("f", w * x)
            pyro.sample("y", dist.Bernoulli(logits=f), obs=y)

    x = torch.linspace(-1, 1, 10)
    posterior = fit(labels, x, (x > 0).float(), method=bnn.MAP(steps=50, draws=1))
    finding = named(posterior.diagnose())["spread of f"]
    assert (finding.value, finding.doubtful) == (0.0, True)


def test_a_posterior_that_is_the_prior_is_found():
    """Fifty rows whose noise is a hundred times the prior tell next to nothing."""

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            f = pyro.deterministic("f", x @ w)
            pyro.sample("y", dist.Normal(f, 100.0), obs=y)

    exact = Regression.make()
    for method in (bnn.NUTS(chains=4, draws=1_000), bnn.SVI(**QUICK)):
        report = fit(model, exact.x, exact.y, method=method).diagnose()
        assert [each.name for each in report.doubtful] == ["distance from the prior"]


def test_kolmogorov_distance_of_known_samples():
    x = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    assert collapse.kolmogorov(x, x).tolist() == [0.0]
    assert collapse.kolmogorov(x, x + 1.5).tolist() == [0.5]
    assert collapse.kolmogorov(x, x + 10).tolist() == [1.0]


def test_the_kl_is_that_in_closed_form(regression):
    posterior = fit(
        regression.model, regression.x, regression.y, method=bnn.SVI(draws=4_000, **QUICK)
    )
    loc, scale = posterior.params["guide.loc"], posterior.params["guide.log_scale"].exp()
    kl = float(0.5 * (scale**2 + loc**2 - 1 - 2 * scale.log()).sum())
    finding = named(posterior.diagnose())["ELBO above the prior's"]
    assert float(finding.meaning.split()[4]) == pytest.approx(kl, abs=0.1)
    assert not finding.doubtful
    worse = replace(posterior, elbo=posterior.elbo - 1e4)  # a guide that pays 10,000 nats
    assert "ELBO above the prior's" in {each.name for each in worse.diagnose().doubtful}


def test_a_large_net_is_weighed_against_its_prior_by_few_draws_or_none(regression, monkeypatch):
    posterior = fit(regression.model, regression.x, regression.y, method=bnn.SVI(**QUICK))
    rows, seen, whole = posterior.data.rows, [], bnn.Posterior.log_likelihood
    count = lambda each, *data: seen.append(each.shape[1]) or whole(each, *data)
    monkeypatch.setattr(bnn.Posterior, "log_likelihood", count)
    monkeypatch.setattr(collapse, "_WEIGHTS", 2)  # as if two weights were ten thousand
    latent = prior_draws(regression.model, (regression.x,), posterior.sites, 200, seed=0)[0]
    for cells, expected in ((40, [40, 40]), (5, [5])):
        seen.clear()
        monkeypatch.setattr(functions, "_CELLS", cells * rows)
        found = collapse.balance(posterior, latent)
        assert seen == expected
        assert (found is None) == (cells == 5)
    seen.clear()
    monkeypatch.setattr(collapse, "_WEIGHTS", 1)  # twice as many: half the draws
    monkeypatch.setattr(functions, "_CELLS", 40 * rows)
    assert collapse.balance(posterior, latent) is not None
    assert seen == [20, 20]


def test_members_that_are_all_alike_are_found(regression):
    data = regression.model, regression.x, regression.y
    same = fit(*data, method=bnn.DeepEnsemble(members=4, steps=1_000)).diagnose()
    assert {"diversity of members", "spread of f"} == {each.name for each in same.doubtful}
    apart = fit(*data, method=bnn.RandomizedPriors(members=30, steps=1_500, noise=1.0)).diagnose()
    assert not apart.doubtful, apart
    assert named(apart)["members"].value == 30


def test_members_that_many_rows_leave_little_room_are_not_called_alike(regression):
    """As far apart as the posterior of 40,000 rows is wide: .007 of the noise."""
    x = regression.x.repeat(800, 1)
    generator = torch.Generator().manual_seed(0)
    y = x @ regression.mean + torch.randn(len(x), generator=generator)
    method = bnn.DeepEnsemble(members=30, bootstrap="exponential", steps=2)
    fitted = fit(regression.model, x, y, method=method)
    draws = torch.randn(1, 30, 2, generator=generator) @ torch.linalg.cholesky(
        torch.linalg.inv(x.T @ x)
    ).T + torch.linalg.solve(x.T @ x, x.T @ y)
    apart = replace(fitted, draws={"w": draws})
    (found,) = (each for each in method.findings(apart) if each.name == "diversity of members")
    assert 0.004 < found.value < 0.01
    assert not found.doubtful
    assert told(replace(apart, draws={"w": draws[:, :1].expand_as(draws)})) == [
        "diversity of members"
    ]


LOADERS = {
    "shuffled": (lambda d: DataLoader(d, batch_size=16, shuffle=True, drop_last=True), False),
    "in order": (lambda d: DataLoader(d, batch_size=25), False),
    "in order, a short last": (lambda d: DataLoader(d, batch_size=16), True),
    "in order, one nearly whole": (lambda d: DataLoader(d, batch_size=17), False),
    "dropped": (lambda d: DataLoader(d, batch_size=16, drop_last=True), True),
    "weighted": (
        lambda d: DataLoader(d, 16, sampler=WeightedRandomSampler(torch.ones(50), 50)),
        True,
    ),
    "subset": (
        lambda d: DataLoader(d, 16, sampler=torch.utils.data.SubsetRandomSampler(range(20))),
        False,  # those are the rows of the fit, which counts them
    ),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_rows_that_no_minibatch_shows_are_found(regression, kind):
    make, lost = LOADERS[kind]
    loader = make(TensorDataset(regression.x, regression.y))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        posterior = bnn.fit(regression.model, loader, method=bnn.SVI(steps=100))
    assert any("A pass of minibatches" in str(each.message) for each in caught) == lost
    report = posterior.diagnose()
    assert "loader" in report.missing["k-hat of q"]
    finding = named(report)["rows in a pass"]
    assert finding.doubtful == lost
    assert finding.value == (0.96 if kind in ("shuffled", "dropped") else 1.0)


# What a fit says by itself


def told(posterior) -> list[str]:
    """Names of what a fit would warn of, each of which the report finds doubtful too."""
    found = [each.name for each in bnn.diagnostics.at_fit(posterior)]
    assert set(found) <= {each.name for each in posterior.diagnose().doubtful}
    return found


def test_a_fit_warns_of_draws_that_are_worth_too_little(healthy):
    """The same 30 in each half of each chain, in other orders: R-hat is 1, and they are 240."""
    assert told(healthy) == []
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(30, generator=generator) for _ in range(8)])
    few = lambda values: {k: v[0, order.reshape(4, 60)] for k, v in values.items()}
    draws, stats = few(healthy.draws), few(healthy.stats)
    (found,) = told(replace(healthy, draws=draws, stats=stats))
    assert "ESS of" in found
    first = lambda values: {k: v[:, :3] for k, v in values.items()}
    few = replace(healthy, draws=first(draws), stats=first(stats))
    assert told(few) == ["draws of a chain"]


def test_a_fit_warns_of_what_has_collapsed(regression):
    settings = QUICK | {"draws": 1_000}
    method = bnn.SVI(guide="full_rank", particles=4, **settings)
    posterior = fit(regression.model, regression.x, regression.y, method=method)
    assert told(posterior) == []
    point = {k: v[:, :1].expand_as(v) for k, v in posterior.draws.items()}
    assert told(replace(posterior, draws=point)) == ["spread of f"]
    low = posterior.elbo - 1e4
    assert told(replace(posterior, elbo=low)) == ["ELBO above the prior's"]
    assert told(replace(posterior, elbo=low, draws=point)) == [  # one does not explain the other
        "spread of f",
        "ELBO above the prior's",
    ]
    nowhere = {k: torch.full_like(v, math.nan) for k, v in posterior.draws.items()}
    (found,) = (
        each
        for each in bnn.diagnostics.at_fit(replace(posterior, draws=nowhere, stats={}))
        if each.name == "spread of f"
    )
    assert found.meaning.startswith("f is not finite")
    latent = prior_draws(regression.model, (regression.x,), posterior.sites, 1_000, seed=1)[0]
    assert "distance from the prior" in told(replace(posterior, draws=latent))


def test_a_fit_warns_of_a_posterior_that_is_the_prior(regression):
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            f = pyro.deterministic("f", x @ w)
            pyro.sample("y", dist.Normal(f, 100.0), obs=y)

    with pytest.warns(bnn.ConvergenceWarning) as caught:
        bnn.fit(model, regression.x, regression.y, method=bnn.Laplace(steps=300))
    assert [str(each.message)[:31] for each in caught] == ["The posterior equals the prior:"]
    assert caught[0].filename == __file__


@pytest.mark.parametrize("rows", [200, 3_000])
def test_the_bound_is_weighed_by_some_of_many_rows(rows):
    """Against the expected log likelihood under the prior in closed form, within its error."""

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            f = pyro.deterministic("f", w * x)
            pyro.sample("y", dist.Normal(f, 1.0), obs=y)

    x = torch.randn(rows, generator=torch.Generator().manual_seed(0))
    y = x + torch.randn(rows, generator=torch.Generator().manual_seed(1))
    posterior = fit(model, x, y, method=bnn.SVI(**QUICK))
    expected = -rows * math.log(2 * math.pi) / 2 - float((y.square() + x.square()).sum()) / 2
    latent = prior_draws(model, (x[:20],), posterior.sites, 20, seed=0)[0]
    assert collapse.balance(posterior, latent, quick=True) is None  # a good fit
    low = replace(posterior, elbo=posterior.elbo - 1e6)
    finding = collapse.balance(low, latent, quick=True)
    error = -(finding.threshold + 0.1) / 4
    assert low.elbo - finding.value == pytest.approx(expected, abs=3 * error)
    assert error < 0.5 * abs(expected)
    assert finding.doubtful


def test_a_prior_under_which_the_data_cannot_be_is_no_bound():
    """exp(100 z) overflows at a prior draw: the expected log likelihood is -inf, and no alarm."""

    def model(x, y=None):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((100 * z).exp() * x, 1.0), obs=y)

    x = torch.linspace(-1, 1, 20)
    posterior = fit(model, x, x, method=bnn.SVI(steps=300, learning_rate=0.002))
    for found in (bnn.diagnostics.at_fit(posterior), posterior.diagnose().findings):
        assert "ELBO above the prior's" not in {each.name for each in found}


class Point(pyro.infer.autoguide.AutoDelta):
    """A point of one's own."""


def test_an_answer_that_is_a_point_by_what_it_is_is_not_warned_of(regression):
    """Nor are good fits: of a guide, a Gaussian, members that differ."""
    methods = [
        bnn.MAP(steps=1_000),
        bnn.MAP(steps=1_000, draws=1),
        bnn.MAP(steps=1_000, restarts=3, draws=100),
        bnn.SVI(guide="point", **QUICK),
        bnn.SVI(guide=Point, draws=50, steps=500, schedule="cosine"),
        bnn.DeepEnsemble(members=1, steps=1_000),
        bnn.Laplace(steps=500),
        bnn.RandomizedPriors(members=30, steps=1_500, noise=1.0),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error", bnn.ConvergenceWarning)
        for method in methods:
            bnn.fit(regression.model, regression.x, regression.y, method=method, progress=False)


@pytest.mark.parametrize("error", [RuntimeError, KeyError])
def test_a_prior_that_the_model_does_not_run_at_loses_no_fit(regression, error):
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        if y is None and bool(w.detach()[0] > 2):
            raise error("no such weight")
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    posterior = fit(model, regression.x, regression.y, method=bnn.Laplace(steps=300))
    point = {k: v[:, :1].expand_as(v) for k, v in posterior.draws.items()}
    found = bnn.diagnostics.at_fit(replace(posterior, draws=point))
    assert [each.name for each in found] == ["spread of f"]
    assert "no such weight" in posterior.diagnose().missing["distance from the prior"]


def test_a_fit_looks_at_as_much_of_the_prior_as_its_size_allows(regression, monkeypatch):
    """Draws: more only where fewer cannot tell, and as many as the net is small."""
    posterior = fit(regression.model, regression.x, regression.y, method=bnn.Laplace(steps=300))
    sites, seen = posterior.sites, []
    latent = prior_draws(regression.model, (regression.x,), sites, 1_000, seed=1)[0]
    same = replace(posterior, draws=latent)
    bounded = replace(same, elbo=0.0)
    few = replace(posterior, draws={k: v[:, :99] for k, v in latent.items()}, stats={})
    assert "distance from the prior" not in {each.name for each in few.diagnose().findings}

    def count(model, inputs, sites, draws, seed):
        seen.append(draws)
        return prior_draws(model, inputs, sites, draws, seed)

    monkeypatch.setattr(collapse, "prior_draws", count)
    for numbers, each, expected in (
        (400, posterior, [20]),
        (400, same, [20, 60, 200]),
        (399, same, []),  # the law of few is not seen
        (399, bounded, [20]),  # that the bound needs
        (39, bounded, []),
    ):
        seen.clear()
        monkeypatch.setattr(collapse, "_QUICK_NUMBERS", numbers)
        found = [one.name for one in bnn.diagnostics.at_fit(each)]
        assert seen == expected
        assert ("distance from the prior" in found) == (200 in expected)


def test_a_fit_looks_on_one_thread_where_it_is_small(regression, monkeypatch):
    seen, whole = [], bnn.diagnostics.at_fit
    look = lambda posterior: seen.append(torch.get_num_threads()) or whole(posterior)
    monkeypatch.setattr(bnn.diagnostics, "at_fit", look)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        fit(regression.model, regression.x, regression.y, method=bnn.MAP(steps=30))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [1]


# The report


def test_a_report_prints_the_doubtful_first_and_goes_to_json():
    bad = Finding(
        name="b < c", value=math.inf, threshold=1.0, doubtful=True, meaning="Bad.", advice="Mend."
    )
    told = {"doubtful": False, "meaning": "Fine.", "advice": "Rest."}
    good = Finding(name="good", value=0.5, threshold=1.0, **told)
    free = Finding(name="free", value=5, threshold=None, unlimited="a name", **told)
    report = Report(title="A fit", findings=(good, free, bad), missing={"k-hat": "no guide"})
    assert report.doubtful == [bad]
    assert str(report).splitlines() == [
        "A fit",
        "1 doubtful of 3 findings",
        "",
        "! b < c       inf  limit 1",
        "    Bad. Mend.",
        "  good        0.5  limit 1",
        "    Fine.",
        "  free          5  no limit: a name",
        "    Fine. Rest.",
        "",
        "Not looked at",
        "k-hat: no guide",
    ]
    again = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert [each["name"] for each in again["findings"]] == ["b < c", "good", "free"]
    assert again["findings"][2]["unlimited"] == "a name"
    assert again["findings"][0]["value"] is None
    page = report._repr_html_()
    assert "b &lt; c" in page
    assert page.count("<tr>") == 4
    assert "no limit: a name" in page
    assert bool(report)


@pytest.mark.parametrize(
    ("without", "match"),
    [
        ({"meaning": ""}, "what it means"),
        ({"advice": ""}, "what to do"),
        ({"threshold": None}, "why there is none"),
        ({"unlimited": "too"}, "why there is none"),
    ],
)
def test_a_finding_says_its_limit_what_it_means_and_what_to_do(without, match):
    whole = {"name": "a", "value": 1.0, "threshold": 2.0, "doubtful": False}
    whole |= {"meaning": "Fine.", "advice": "Rest."}
    assert Finding(**whole).limit == "limit 2"
    with pytest.raises(ValueError, match=match):
        Finding(**whole | without)


def test_inputs_say_where_f_is_looked_at(healthy):
    report = healthy.diagnose(torch.ones(3, 2))
    assert "f at 3 rows" in report.title
    with pytest.raises(bnn.DataError, match="shape"):
        healthy.diagnose(torch.ones(3, 5))


def test_models_of_every_kind_are_diagnosed(tmp_path):
    def schools(x, y=None):  # a local site: what is looked at is the likelihood of each row
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(x)):
            theta = pyro.sample("theta", dist.Normal(mu, 2.0))
            pyro.sample("y", dist.Normal(theta, x), obs=y)

    def labels(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
        with pyro.plate("data", len(x)):
            f = pyro.deterministic("f", x @ w)
            pyro.sample("y", dist.Categorical(logits=f), obs=y)

    def constant(y=None):  # no inputs, and a number that is not () in shape
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 6):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def unplated(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(w * x, 1.0).to_event(1), obs=y)

    def needs_y(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)

    x = torch.linspace(-1, 1, 6)
    x2 = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    nuts, svi = bnn.NUTS(chains=2, warmup=100, draws=50), bnn.SVI(steps=200)
    for model, data, method, name in (
        (schools, (x + 2, 3 * x), nuts, "R-hat of log p(y | draw)"),
        (schools, (x + 2, 3 * x), svi, "k-hat of q"),
        (labels, (x2, x2.argmax(1)), nuts, "R-hat of f"),
        (labels, (x2, x2.argmax(1)), svi, "distance from the prior"),
        (constant, (x,), nuts, "R-hat of mu"),
        (constant, (x,), svi, "k-hat of q"),
        (unplated, (x, x), nuts, "R-hat of f"),
        (needs_y, (x, x), nuts, "R-hat of log p(y | draw)"),
    ):
        posterior = fit(model, *data, method=method)
        report = posterior.diagnose()
        assert name in named(report), report
        posterior.save(tmp_path / "one")
        again = bnn.load(tmp_path / "one", model).diagnose()
        assert again.to_dict() == report.to_dict()


def test_rows_that_cannot_be_looked_at_alone_keep_all_draws(monkeypatch):
    """With little memory the same R-hat and ESS: a few of the draws would be found wanting."""

    def statement(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(w * x, 1.0).to_event(1), obs=y)

    x = torch.linspace(-1, 1, 50)
    posterior = fit(statement, x, x, method=bnn.NUTS(chains=4, warmup=200, draws=500))
    before = named(posterior.diagnose())
    monkeypatch.setattr(functions, "_CELLS", 50 * 4 * 7)
    after = named(posterior.diagnose())
    for name in ("R-hat of f", "bulk ESS of f", "tail ESS of f"):
        assert after[name].value == pytest.approx(before[name].value, rel=1e-5)
    assert before["bulk ESS of f"].value > 400


@pytest.mark.parametrize("stuck", [1, 2])
def test_chains_that_never_moved_are_told(regression, stuck):
    method = bnn.NUTS(chains=2, warmup=50, draws=50)
    posterior = fit(regression.model, regression.x, regression.y, method=method)
    assert not convergence.of_moves(posterior)
    still = lambda v: torch.cat([v[:1, :1].expand_as(v[:stuck]), v[stuck:]])
    halted = replace(posterior, draws={k: still(v) for k, v in posterior.draws.items()})
    halted = replace(halted, stats=posterior.stats | {"energy": still(posterior.stats["energy"])})
    for found in (bnn.diagnostics.at_fit(halted), halted.diagnose().findings):
        told = {each.name: each for each in found}
        assert told["chains that never moved"].value == stuck
        assert told["chains that never moved"].doubtful
        assert told["E-BFMI"].doubtful


def test_an_interrupt_during_the_checks_loses_no_fit(regression, monkeypatch):
    def interrupted(posterior):
        raise KeyboardInterrupt

    monkeypatch.setattr(bnn.diagnostics, "at_fit", interrupted)
    with pytest.warns(bnn.ConvergenceWarning, match=r"checks were interrupted.*diagnose\(\)"):
        posterior = bnn.fit(regression.model, regression.x, regression.y, method=bnn.MAP(steps=200))
    assert posterior.complete


def test_a_guide_of_one_draw_is_checked_without_torchs_own_warning(regression):
    """Worse than the prior after two steps, so that its one log likelihood is looked at."""
    method = bnn.SVI(steps=2, draws=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("ignore", bnn.ConvergenceWarning)
        fitted = bnn.fit(regression.model, regression.x, regression.y, method=method)
        name = "ELBO above the prior's"
        assert name in [each.name for each in fitted.diagnose().findings]
