import io
import math
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributions as td
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormal,
)

import bnn
from bnn import arguments, contract
from bnn.handlers import seeded
from bnn.inference._optimise import Plateau
from tests.exact import check_expected_prior, check_regression_by_mean_field, gamma_poisson


def test_mean_field_finds_its_optimum():
    check_regression_by_mean_field()


def test_expected_prior_is_exact():
    check_expected_prior()


def test_minibatches_find_the_same_optimum():
    check_regression_by_mean_field(batch_size=10, steps=10_000, particles=2)


def test_minibatches_stop_when_the_bound_has_converged(regression):
    method = bnn.SVI(batch_size=10, particles=2)
    posterior = bnn.fit(regression.model, regression.x, regression.y, method=method, seed=1)
    assert len(posterior.history) < 7_000  # the first stage alone may take so many


def test_a_plate_that_subsamples_finds_the_same_optimum(regression):
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x), subsample_size=10) as rows:
            pyro.sample("y", dist.Normal(x[rows] @ w, 1.0), obs=None if y is None else y[rows])

    method = bnn.SVI(steps=10_000, particles=8)
    posterior = bnn.fit(model, regression.x, regression.y, method=method, seed=1)
    scale = posterior.params["guide.log_scale"].exp()
    assert ((scale / regression.sd - 0.6204).abs() < 0.04).all()
    assert ((posterior.params["guide.loc"] - regression.mean).abs() < 0.15 * regression.sd).all()


@pytest.mark.parametrize("guide", ["full_rank", "low_rank", "flow"])
def test_guides_that_can_be_exact_are(regression, guide):
    """Rank 1 of 2 beside a diagonal, and a flow of two affine maps, hold any Gaussian of size 2."""
    method = bnn.SVI(guide=guide, particles=16, draws=20_000)
    posterior = bnn.fit(regression.model, regression.x, regression.y, method=method, seed=2)
    w = posterior.draws["w"].flatten(0, 1)
    assert ((w.mean(0) - regression.mean).abs() < 0.1 * regression.sd).all()
    ratio = w.std(0) / regression.sd
    assert ((ratio > 0.95) & (ratio < 1.05)).all(), ratio
    assert abs(float(torch.corrcoef(w.T)[0, 1]) + 0.7843) < 0.03
    assert abs(posterior.elbo - regression.log_evidence) < 0.05  # KL = 0


@pytest.mark.parametrize(
    "guide",
    [
        AutoMultivariateNormal,
        AutoNormal,
        AutoDiagonalNormal,
        pytest.param(AutoIAFNormal, marks=pytest.mark.slow),
    ],
    ids=lambda g: g.__name__,
)
def test_autoguides_are_taken_as_they_are(regression, guide):
    if guide is AutoIAFNormal:
        guide = lambda model: AutoIAFNormal(model, hidden_dim=[8])
        guide = guide(regression.model)
    method = bnn.SVI(guide=guide, particles=4, steps=3_000, draws=2_000)
    posterior = bnn.fit(regression.model, regression.x, regression.y, method=method, seed=3)
    w = posterior.draws["w"].flatten(0, 1)
    assert ((w.mean(0) - regression.mean).abs() < 0.25 * regression.sd).all()
    full = guide is AutoMultivariateNormal
    ratio = w.std(0) / regression.sd
    low, high = (0.9, 1.1) if full else (0.5, 1.3)
    assert ((ratio > low) & (ratio < high)).all(), ratio


def test_a_guide_written_by_hand(regression):
    """The mean-field family spelled out: the same optimum, with the plate scaled on a minibatch."""

    def guide(x, y=None):
        loc = pyro.param("loc", torch.zeros(2))
        scale = pyro.param("scale", 0.1 * torch.ones(2), constraint=dist.constraints.positive)
        pyro.sample("w", dist.Normal(loc, scale).to_event(1))

    method = bnn.SVI(guide=guide, batch_size=25, particles=4, draws=100)
    posterior = bnn.fit(regression.model, regression.x, regression.y, method=method, seed=4)
    ratio = posterior.params["scale"] / regression.sd
    assert ((ratio - 0.6204).abs() < 0.05).all()
    assert ((posterior.params["loc"] - regression.mean).abs() < 0.2 * regression.sd).all()


def test_a_guide_that_misses_a_site_is_refused(regression):
    def guide(x, y=None):
        pyro.sample("v", dist.Normal(0.0, 1.0))

    with pytest.raises(bnn.ModelError, match=r"misses \['w'\].*adds.*'v'"):
        bnn.fit(regression.model, regression.x, regression.y, method=bnn.SVI(guide=guide))


def test_analytic_kl_has_less_noise_than_sampling(regression):
    """At q = prior the KL is 0 exactly: the objective is the expected log likelihood alone."""
    from bnn.inference._elbo import Bound
    from bnn.inference._energy import Energy
    from bnn.inference._guide import Normal

    data, sites = contract.check(
        regression.model, arguments.read(regression.model, (regression.x, regression.y))
    )
    energy = Energy(regression.model, data, sites)
    family = Normal(torch.zeros(2), torch.ones(2))
    bound = Bound(energy, family, sites)
    assert bound.exact == {"w"}
    with pyro.validation_enabled(False):
        got = float(bound(data.tensors, 20_000))
    x, y = regression.x.double(), regression.y.double()
    expected = -0.5 * ((y**2).sum() + (x**2).sum()) - 25 * math.log(2 * math.pi)
    assert abs(got - float(expected)) < 4 * 130 / math.sqrt(
        20_000
    )  # sd of the likelihood about 130


@pytest.mark.parametrize(("loc", "scale"), [(0.5, 0.3), (0.0, 0.02), (-4.0, 1.0)])
def test_the_kl_to_a_laplace_prior_is_exact(loc, scale):
    """Of one weight at x = 0 the ELBO is log N(0 | 0, 1) - KL(N(loc, scale^2) || Laplace(1, b))."""
    from bnn.inference._elbo import Bound
    from bnn.inference._energy import Energy
    from bnn.inference._guide import Normal

    b = 0.7

    def model(x, y=None):
        w = pyro.sample("w", dist.Laplace(1.0, b).expand([1]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    zeros = torch.zeros(1, 1), torch.zeros(1)
    data, sites = contract.check(model, arguments.read(model, zeros))
    family = Normal(torch.tensor([loc]), torch.tensor([scale]))
    bound = Bound(Energy(model, data, sites), family, sites)
    assert bound.exact == {"w"}
    with pyro.validation_enabled(False):
        got = float(bound(data.tensors, 1))
    w = torch.linspace(loc - 12 * scale, loc + 12 * scale, 200_001, dtype=torch.float64)
    log_q, log_p = dist.Normal(loc, scale).log_prob(w), dist.Laplace(1.0, b).log_prob(w)
    kl = float(torch.trapezoid(log_q.exp() * (log_q - log_p), w))
    assert got == pytest.approx(-0.5 * math.log(2 * math.pi) - kl, abs=1e-5)


@pytest.mark.parametrize(
    ("prior", "exact"),
    [
        (dist.LogNormal(1.0, 0.7), True),
        (dist.LogNormal(1.0, 0.7).expand([3]).to_event(1), True),
        (dist.TransformedDistribution(dist.Normal(0.3, 2.0), [td.SigmoidTransform()]), True),
        (dist.TransformedDistribution(dist.Normal(0.3, 2.0), [td.ExpTransform()] * 2), False),
        (dist.Gamma(2.0, 1.0), False),
    ],
    ids=["lognormal", "vector", "logit-normal", "other map", "gamma"],
)
def test_the_kl_to_a_prior_that_is_normal_on_the_real_line_is_exact(prior, exact):
    """The data say nothing of w, so that the ELBO is log N(0 | 0, 1) - KL(N || N) at any draw."""
    from bnn.inference._elbo import Bound
    from bnn.inference._energy import Energy
    from bnn.inference._guide import Normal

    def model(x, y=None):
        pyro.sample("w", prior)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    zeros = torch.zeros(1), torch.zeros(1)
    data, sites = contract.check(model, arguments.read(model, zeros))
    energy = Energy(model, data, sites)
    loc, scale = 0.5 * torch.ones(energy.size), 0.3 * torch.ones(energy.size)
    bound = Bound(energy, Normal(loc, scale), sites)
    assert bound.exact == ({"w"} if exact else set())
    with pyro.validation_enabled(False), seeded(np.random.SeedSequence(0)):
        draws = [float(bound(data.tensors, 1)) for _ in range(3)]
    if not exact:
        assert max(draws) - min(draws) > 0.01
        return
    base = prior.base_dist.base_dist if prior.event_dim else prior.base_dist
    kl = td.kl_divergence(td.Normal(loc, scale), td.Normal(base.loc, base.scale)).sum()
    expected = -0.5 * math.log(2 * math.pi) - float(kl)
    assert draws == pytest.approx([expected] * 3, abs=1e-5)


@pytest.mark.parametrize(("loc", "scale"), [(0.5, 0.3), (0.0, 0.02)])
def test_the_kl_to_a_scale_mixture_is_sampled(loc, scale):
    """One weight at x = 0, so that the ELBO is log N(0 | 0, 1) - KL; the KL by quadrature."""
    from bnn.inference._elbo import Bound
    from bnn.inference._energy import Energy
    from bnn.inference._guide import Normal
    from bnn.models import likelihoods, priors, supervised

    prior = priors.ScaleMixture(mixing=0.3, wide=1.0, narrow=0.05)
    net = torch.nn.Linear(1, 1, bias=False)
    model = supervised(net, likelihoods.Gaussian(1.0), prior)
    zeros = torch.zeros(1, 1), torch.zeros(1)
    data, sites = contract.check(model, arguments.read(model, zeros))
    family = Normal(torch.tensor([loc]), torch.tensor([scale]))
    bound = Bound(Energy(model, data, sites), family, sites)
    assert bound.exact == set()
    with pyro.validation_enabled(False):
        got = float(bound(data.tensors, 100_000))
    w, q = torch.linspace(-4, 4, 80_001, dtype=torch.float64), dist.Normal(loc, scale)
    log_q, wide, narrow = (
        dist.Normal(m, s).log_prob(w) for m, s in [(loc, scale), (0, 1), (0, 0.05)]
    )
    log_p = torch.logaddexp(math.log(0.3) + wide, math.log(0.7) + narrow)
    kl = float(torch.trapezoid(log_q.exp() * (log_q - log_p), w))
    spread = float(torch.trapezoid(log_q.exp() * (log_p + kl - q.entropy()) ** 2, w)) ** 0.5
    expected = -0.5 * math.log(2 * math.pi) - kl
    assert abs(got - expected) < 4 * (spread + 0.5) / math.sqrt(100_000)


def test_squared_error_with_a_weighted_kl_is_the_bound_of_a_stated_noise(regression):
    """Mean squared error + c KL over N rows = -2 sd^2 / N ELBO + constant at sd^2 = c N / 2."""
    from bnn.inference._elbo import Bound
    from bnn.inference._energy import Energy
    from bnn.inference._guide import Normal

    c, x, y = 0.1, regression.x, regression.y

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, math.sqrt(c * len(x) / 2)), obs=y)

    data, sites = contract.check(model, arguments.read(model, (x, y)))
    gaps = []
    for loc, scale in [(torch.zeros(2), torch.ones(2)), (regression.mean, regression.sd)]:
        bound = Bound(Energy(model, data, sites), Normal(loc, scale), sites)
        with pyro.validation_enabled(False):
            elbo = float(bound(data.tensors, 100_000))
        error = ((y - x @ loc) ** 2 + x**2 @ scale**2).mean()
        kl = torch.distributions.kl_divergence(dist.Normal(loc, scale), dist.Normal(0.0, 1.0)).sum()
        gaps.append(float(error + c * kl) + c * elbo)
    assert abs(gaps[0] - gaps[1]) < 0.02  # c times sd about 15 of one draw, over sqrt(100,000)


def test_priors_with_latent_scale_are_exact_under_mean_field_only():
    def model(x, y=None):
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        w = pyro.sample("w", dist.Normal(0.0, tau))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)

    from bnn.inference._elbo import _known_priors
    from bnn.inference._energy import Energy

    x = torch.ones(4)
    data, sites = contract.check(model, arguments.read(model, (x, x)))
    energy = Energy(model, data, sites)
    assert _known_priors(energy, independent=True) == {"w"}
    assert _known_priors(energy, independent=False) == set()


def test_trainable_leftovers_are_fitted_and_given_back(regression):
    """An offset without a prior is a maximum; the caller's tensor stays as it was."""

    class Line(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.offset = torch.nn.Parameter(torch.tensor(0.0))

        def forward(self, x, y=None):
            w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            with pyro.plate("data", len(x)):
                f = pyro.deterministic("f", x @ w + self.offset)
                pyro.sample("y", dist.Normal(f, 1.0), obs=y)

    line = Line()
    method = bnn.SVI(guide="full_rank", particles=4, draws=4_000)
    posterior = bnn.fit(line, regression.x, regression.y + 3.0, method=method, seed=5)
    assert line.offset.item() == 0.0
    assert line.offset.requires_grad
    assert line.offset.grad is None
    # x has mean 0, so the offset's maximum is the mean of y
    assert abs(float(posterior.params["offset"]) - float(regression.y.mean()) - 3.0) < 0.03
    prediction = posterior.predict(torch.zeros(1, 2))
    assert abs(float(prediction.mean) - float(regression.y.mean()) - 3.0) < 0.03
    assert line.offset.item() == 0.0


def test_annealing_ends_at_the_same_optimum():
    check_regression_by_mean_field(annealing=500)


@pytest.mark.parametrize("schedule", ["cosine", "constant", lambda step: 1 / (1 + step / 300)])
def test_schedules(regression, schedule):
    method = bnn.SVI(schedule=schedule, steps=2_000, particles=4)
    posterior = bnn.fit(regression.model, regression.x, regression.y, method=method, seed=6)
    assert len(posterior.history) == 2_000
    scale = posterior.params["guide.log_scale"].exp()
    assert ((scale / regression.sd - 0.6204).abs() < 0.1).all()


def test_stops_when_converged(regression):
    posterior = bnn.fit(regression.model, regression.x, regression.y, method=bnn.SVI(), seed=7)
    assert len(posterior.history) < 4_000
    short = bnn.SVI(guide="point", steps=100, learning_rate=0.001)
    with pytest.warns(bnn.ConvergenceWarning, match="still rising when 100 steps"):
        bnn.fit(regression.model, regression.x, regression.y, method=short)


def test_a_step_that_is_not_finite_is_left_out_and_three_end_the_fit(regression):
    calls = []

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        calls.append(1)
        broken = float("nan") if len(calls) in lost else 0.0
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w + broken, 1.0), obs=y)

    lost = set(range(200, 202))
    method = bnn.SVI(steps=500, schedule="constant")
    posterior = bnn.fit(model, regression.x, regression.y, method=method)
    assert torch.isfinite(posterior.draws["w"]).all()
    assert len(posterior.history) == 498
    calls.clear()
    lost = set(range(200, 300))
    with pytest.raises(bnn.FitError, match=r"three times in a row.*step \d+") as caught:
        bnn.fit(model, regression.x, regression.y, method=method)
    assert caught.value.step is not None


def test_local_sites_and_minibatches_are_refused():
    def model(x, y=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            theta = pyro.sample("theta", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    x = torch.ones(6)
    with pytest.raises(bnn.ModelError, match=r'"theta".*batch_size'):
        bnn.fit(model, x, x, method=bnn.SVI(batch_size=2))
    with pytest.raises(bnn.ModelError, match=r'"theta".*batch_size'):
        bnn.fit(model, x, x, method=bnn.SVI(guide=AutoNormal, batch_size=2))


def test_data_from_a_loader(regression):
    rows = torch.utils.data.TensorDataset(regression.x, regression.y)
    loader = torch.utils.data.DataLoader(rows, batch_size=10, shuffle=True)
    method = bnn.SVI(particles=2, steps=6_000)
    posterior = bnn.fit(regression.model, loader, method=method, seed=8)
    scale = posterior.params["guide.log_scale"].exp()
    assert ((scale / regression.sd - 0.6204).abs() < 0.04).all()
    assert posterior.predict(regression.x[:3]).mean.shape == (3,)
    with pytest.raises(bnn.DataError, match="loader"):
        posterior.log_likelihood()
    assert posterior.log_likelihood(regression.x, regression.y).shape == (1, 1_000, 50)


@pytest.mark.parametrize("batch_size", [None, 20, 256])
def test_minibatches_of_many_rows_reach_the_width(batch_size):
    """2,000 rows: q starts nine times too wide, and the ELBO's noise hides its last gains."""

    def line(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x, 0.5), obs=y)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2_000, generator=generator)
    y = 0.7 * x + 0.5 * torch.randn(2_000, generator=generator)
    exact = (1 + (x**2).sum() / 0.25) ** -0.5
    for seed in range(2):
        posterior = bnn.fit(line, x, y, method=bnn.SVI(batch_size=batch_size), seed=seed)
        assert 0.9 < posterior.params["guide.log_scale"].exp() / exact < 1.1
    if batch_size is None:
        assert len(posterior.history) < 8_000  # all rows: it converges before the budget ends


def test_autonormal_keeps_the_jacobian_of_a_positive_site():
    """Gamma-Poisson: the log evidence bounds the ELBO, within .03 nats for a log-normal guide."""
    y = torch.tensor([3.0, 1.0, 4.0, 2.0])
    a, b = 2.0 + 10.0, 1.0 + 4.0
    evidence = math.lgamma(a) - math.lgamma(2.0) - a * math.log(b) - float((y + 1).lgamma().sum())
    method = bnn.SVI(guide=AutoNormal, particles=8, steps=1_500)
    posterior = bnn.fit(gamma_poisson, y, method=method)
    assert abs(float(posterior.draws["rate"].mean()) - a / b) < 0.15  # sd .69, 1,000 draws
    assert abs(posterior.elbo - evidence) < 0.1


def test_minibatches_need_a_data_plate():
    def bare(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(w * x, 1.0).to_event(1), obs=y)

    x = torch.ones(10)
    for method in (bnn.SVI(batch_size=2), bnn.MAP(batch_size=2)):
        with pytest.raises(bnn.ModelError, match=r"in none\. Put it in"):
            bnn.fit(bare, x, x, method=method)
    with pytest.raises(bnn.ModelError, match=r"in none\. Put it in"):
        bnn.fit(bare, x, x, method=bnn.SVI(guide=AutoNormal, batch_size=2))


def test_masked_latent_sites_are_refused(regression):
    def model(x, y=None):
        with pyro.plate("data", len(x)):
            with pyro.poutine.mask(mask=x[:, 0] > 0):
                theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    with pytest.raises(bnn.ModelError, match='"theta" is masked'):
        bnn.fit(model, regression.x, regression.y)


def test_a_net_inside_a_guide_stays_the_callers(regression):
    net = torch.nn.Linear(1, 2)
    before = net.weight.detach().clone()

    def guide(x, y=None):
        pyro.module("net", net)
        pyro.sample("w", dist.Normal(net(torch.ones(1)), 0.1).to_event(1))

    method = bnn.SVI(guide=guide, steps=50, draws=5)
    fits = [bnn.fit(regression.model, regression.x, regression.y, method=method) for _ in range(2)]
    assert torch.equal(net.weight, before)
    assert torch.equal(fits[0].draws["w"], fits[1].draws["w"])


def test_a_noisy_objective_that_falls_has_stopped_rising():
    """On minibatches whose noise hides small gains, flat proves nothing; to fall does."""
    noise = 100 * torch.randn(2_000, generator=torch.Generator().manual_seed(0))
    plateau = Plateau(10_000, epoch=2)
    assert plateau.trend(noise.tolist()) == ""
    assert plateau.trend((noise + torch.linspace(0, 5_000, 2_000)).tolist()) == "rising"
    assert plateau.trend((noise - torch.linspace(0, 5_000, 2_000)).tolist()) == "flat"


@pytest.mark.parametrize(
    ("steps", "epoch", "sd"), [(500, 1, 3.0), (2_000, 10, 10.0), (10_000, 100, 30.0)]
)
def test_noise_alone_is_not_told_to_be_still_rising(steps, epoch, sd):
    noise = sd * torch.randn(20, steps, generator=torch.Generator().manual_seed(0))
    cut = 0
    for one in noise.tolist():
        plateau, history = Plateau(steps, epoch=epoch), []
        for value in one:
            history.append(value)
            plateau.judge(history)
        cut += plateau.cut
    assert cut <= 1  # 60 judgements at three sigma: .08 on average; at one sigma they were 5


@pytest.mark.parametrize(
    ("terminal", "progress", "shown"),
    [(True, True, True), (True, False, False), (False, True, False)],
)
def test_the_bar_tells_the_elbo_on_a_terminal_and_is_silent_elsewhere(
    regression, monkeypatch, capsys, terminal, progress, shown
):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    method = bnn.SVI(steps=300, schedule="constant", draws=5)
    bnn.fit(regression.model, regression.x, regression.y, method=method, progress=progress)
    text = "".join(capsys.readouterr())
    assert ("ELBO" in text) == shown
    assert bool(text) == shown


def test_a_notebook_shows_the_bar(regression, monkeypatch):
    """The stream of its kernel is no terminal, but somebody reads it."""
    kernels = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})
    monkeypatch.setattr("sys.stderr", kernels())
    method = bnn.SVI(steps=300, schedule="constant", draws=5)
    bnn.fit(regression.model, regression.x, regression.y, method=method)
    assert "ELBO" in sys.stderr.getvalue()
