import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import bnn
from bnn.handlers import At, Capture
from bnn.inference._prior_function import prior_function, prior_mean
from bnn.models import likelihoods, linear
from tests import exact

SHORT = {"steps": 1_000, "learning_rate": 0.05, "schedule": "cosine"}
FEW = bnn.RandomizedPriors(members=10, steps=300, schedule="constant")
CLEAN = bnn.RandomizedPriors(members=5, **SHORT)


def test_noisy_targets_give_draws_of_the_posterior():
    exact.check_regression_by_randomized_priors(**SHORT)


def test_clean_targets_give_too_little_spread_and_just_that():
    exact.check_regression_by_randomized_priors(noise=None, **SHORT)


def test_minibatches_take_each_members_own_targets_and_function_along():
    exact.check_regression_by_randomized_priors(batch_size=25, **SHORT)


@pytest.mark.parametrize("kind", ["bernoulli", "exponential", "resample"])
def test_each_member_is_the_optimum_under_its_own_weights(kind):
    exact.check_bootstrap_by_randomized_priors(kind, **SHORT)


def test_three_weights_of_known_scale_and_noise():
    """T1 of Osband's theorem: 20 rows, 500 members; each sd within 15 % and means in 3 errors."""
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, generator=draws)
    y = x @ torch.tensor([2.0, -1.0, 0.0]) + 0.5 * torch.randn(20, generator=draws)

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 2.0).expand([3]).to_event(1))
        with pyro.plate("data", len(x)):
            f = pyro.deterministic("f", x @ w)
            pyro.sample("y", dist.Normal(f, 0.5), obs=y)

    cov = torch.linalg.inv(torch.eye(3) / 4 + x.T @ x / 0.25)
    mean, sd = cov @ x.T @ y / 0.25, cov.diagonal().sqrt()
    settings = {"members": 500, "noise": 0.5} | SHORT
    added, anchored = (
        bnn.fit(model, x, y, method=bnn.RandomizedPriors(anchored=a, **settings)).draws
        for a in (False, True)
    )
    w = (added["w"] + added["prior.w"])[0]
    assert ((w.std(0) / sd - 1).abs() < 0.15).all()
    assert ((w.mean(0) - mean).abs() < 3 * sd / math.sqrt(500)).all()
    assert ((torch.cov(w.T) - cov).abs() < 0.2 * torch.outer(sd, sd)).all()
    assert ((anchored["w"][0] - w).abs() < 0.03 * sd).all()  # the same draws, the same optimum
    assert list(anchored) == ["w"]


def units(x, y=None):
    """A prior that is not centred, correlated, and an f in large units with an offset."""
    prior = dist.MultivariateNormal(torch.tensor([2.0, -1.0]), torch.tensor([[1.0, 0.5], [0.5, 1]]))
    w = pyro.sample("w", prior)
    with pyro.plate("data", len(x)):
        f = pyro.deterministic("f", 100 + 10 * (x @ w))
        pyro.sample("y", dist.Normal(f, 10.0), obs=y)


@pytest.mark.parametrize("anchored", [False, True])
def test_prior_mean_and_units_are_those_of_the_model(regression, anchored):
    """Clean targets: (P0 + X'X)^-1 (P0 w~ + X'y), whose mean over w~ is the posterior's."""
    x, y = regression.x, 100 + 10 * regression.y
    precision = torch.linalg.inv(torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
    cov, m = torch.linalg.inv(precision + x.T @ x), torch.tensor([2.0, -1.0])
    method = bnn.RandomizedPriors(members=300, anchored=anchored, **SHORT)
    posterior = bnn.fit(units, x, y, method=method)
    effective = posterior.draws["w"][0]
    if not anchored:
        drawn = posterior.draws["prior.w"][0]
        effective = effective + drawn - m
        each = (drawn @ precision + x.T @ regression.y) @ cov
        assert ((effective - each).abs() < 0.02 * regression.sd).all()
    mean, spread = cov @ (precision @ m + x.T @ regression.y), (cov @ precision @ cov).diagonal()
    assert ((effective.mean(0) - mean).abs() < 3.5 * (spread / 300).sqrt()).all()
    assert ((effective.var(0) / spread - 1).abs() < 4 * math.sqrt(2 / 299)).all()
    f = posterior.predict(x[:4]).f[0]
    torch.testing.assert_close(f, 100 + 10 * effective @ x[:4].T, rtol=1e-4, atol=1e-2)


def test_a_scaled_prior_function(regression):
    """Any scale s: the optimum of |y - X(w + s w~)|^2 + |w|^2 is S X'(y - s X w~)."""
    method = bnn.RandomizedPriors(members=5, scale=3.0, **SHORT)
    draws = bnn.fit(regression.model, regression.x, regression.y, method=method).draws
    rest = regression.y - 3 * draws["prior.w"][0] @ regression.x.T
    w = rest @ regression.x @ regression.cov
    assert ((draws["w"][0] - w).abs() < 0.02 * regression.sd).all()


def wave(x):
    return torch.sin(3 * x[:, :1])


@pytest.mark.filterwarnings("ignore::bnn.errors.ApproximationWarning")
def test_a_function_of_ones_own(regression):
    """f learns y - scale g by ridge regression, and f + scale g is what is predicted."""
    method = bnn.RandomizedPriors(members=3, scale=2.0, prior=wave, **SHORT)
    posterior = bnn.fit(regression.model, regression.x, regression.y, method=method)
    g = 2 * wave(regression.x)[:, 0]
    w = regression.cov @ regression.x.T @ (regression.y - g)
    assert ((posterior.draws["w"] - w).abs() < 0.02 * regression.sd).all()
    assert list(posterior.draws) == ["w"]
    prediction = posterior.predict(regression.x)
    f = posterior.draws["w"] @ regression.x.T + g
    torch.testing.assert_close(prediction.f, f)
    density = dist.Normal(f, 1.0).log_prob(regression.y)
    torch.testing.assert_close(posterior.log_likelihood(), density)


@pytest.mark.filterwarnings("ignore::bnn.errors.ApproximationWarning")
def test_a_function_of_ones_own_has_to_be_passed_to_load(regression, tmp_path):
    method = bnn.RandomizedPriors(members=3, prior=wave, steps=30, schedule="constant")
    posterior = bnn.fit(regression.model, regression.x, regression.y, method=method)
    posterior.save(tmp_path / "fit")
    with pytest.raises(bnn.CheckpointError, match=r"load\(path, model, prior=\.\.\.\)"):
        bnn.load(tmp_path / "fit", regression.model)
    loaded = bnn.load(tmp_path / "fit", regression.model, prior=wave)
    assert loaded.method == method
    assert torch.equal(loaded.predict(regression.x).y, posterior.predict(regression.x).y)
    with pytest.raises(TypeError, match="noise"):
        bnn.load(tmp_path / "fit", regression.model, prior=wave, noise=wave)


def test_members_that_share_a_function_and_their_rows_are_told_of(regression):
    with pytest.warns(bnn.ConvergenceWarning, match="3 members differ in f by .* same function"):
        bnn.fit(
            regression.model,
            regression.x,
            regression.y,
            method=bnn.RandomizedPriors(members=3, prior=wave, **SHORT),
        )


def test_a_loader_gives_the_same_members(regression):
    """The prior function is then run on every batch."""
    loader = DataLoader(TensorDataset(regression.x, regression.y), batch_size=50)
    posterior = bnn.fit(regression.model, loader, method=CLEAN)
    drawn = posterior.draws["prior.w"][0]
    each = (regression.x.T @ regression.y + drawn) @ regression.cov
    assert ((posterior.draws["w"][0] + drawn - each).abs() < 0.02 * regression.sd).all()
    fixed = bnn.RandomizedPriors(members=3, prior=lambda x: x[:, 0], **SHORT)
    with pytest.warns(bnn.ConvergenceWarning, match="prior=None"):  # here as without a loader
        bnn.fit(regression.model, loader, method=fixed)
    for setting in ({"noise": 1.0}, {"bootstrap": "resample"}):
        with pytest.raises(bnn.DataError, match="does not tell which rows"):
            bnn.fit(regression.model, loader, method=bnn.RandomizedPriors(**setting))


def hierarchy(x, y=None):
    """Sites before f and after it, a scale without a mean, a hidden seam, a vector f."""
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    w = pyro.sample("w", dist.Normal(0.0, tau).expand([2, 3]).to_event(2))
    hidden = pyro.deterministic("hidden.0", torch.tanh(x), event_dim=1)
    with pyro.plate("data", len(x)):
        f = pyro.deterministic("f", hidden @ w, event_dim=1)
    offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Categorical(logits=f + offset), obs=y)


def test_only_what_f_needs_is_drawn_again():
    x, y = torch.randn(30, 2), torch.randint(3, (30,))
    method = bnn.RandomizedPriors(members=4, steps=200, schedule="constant")
    posterior = bnn.fit(hierarchy, x, y, method=method)
    assert list(posterior.draws) == ["tau", "w", "offset", "prior.tau", "prior.w"]
    f = posterior.predict(x).f
    w = posterior.draws["w"] + posterior.draws["prior.w"]
    torch.testing.assert_close(f, torch.tanh(x) @ w, rtol=1e-4, atol=1e-4)
    assert posterior.deterministic("hidden.0")["hidden.0"].shape == (1, 4, 30, 2)


def test_a_copy_of_a_model_shows_its_latent_sites_alone():
    x, y = torch.randn(5, 2), torch.zeros(5, dtype=torch.long)
    drawn = {"prior.tau": torch.tensor(2.0), "prior.w": torch.randn(2, 3)}
    with Capture("y") as outside, At(drawn) as at:
        p = prior_function(hierarchy, (x, y))
    assert outside.values.keys() == drawn.keys()
    assert not at.missed
    torch.testing.assert_close(p, torch.tanh(x) @ drawn["prior.w"])


def test_the_mean_of_a_prior_or_what_stands_in_for_it():
    assert prior_mean(dist.Normal(3.0, 1.0)) == 3
    assert prior_mean(dist.Cauchy(0.0, 1.0)) == 0
    assert prior_mean(dist.HalfCauchy(1.0)) == 1
    assert prior_mean(dist.LKJCholesky(2, 1.0)).shape == (2, 2)


def test_the_scale_of_the_noise_is_trained_as_the_model_states_it(regression):
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            f = pyro.deterministic("f", x @ w)
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(f, sigma), obs=y)

    for anchored in (False, True):
        method = bnn.RandomizedPriors(members=4, anchored=anchored, **SHORT)
        draws = bnn.fit(model, regression.x, regression.y, method=method).draws
        w = draws["w"] + draws.get("prior.w", 0)
        sse = (regression.y - w @ regression.x.T).square().sum(-1)
        # d/dsigma of -50 log sigma - sse / (2 sigma^2) - sigma^2 / 2 is 0
        square = (-50 + (2_500 + 4 * sse).sqrt()) / 2
        torch.testing.assert_close(draws["sigma"].square(), square, rtol=1e-3, atol=0)


@pytest.mark.filterwarnings("ignore::bnn.errors.ApproximationWarning")
def test_labels_take_their_function_on_the_logits():
    """Logistic regression with an offset: w is where X'(y - p(X w + g)) = w."""
    x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            f = pyro.deterministic("f", torch.stack([0 * x[:, 0], x @ w], 1), event_dim=1)
            pyro.sample("y", dist.Categorical(logits=f), obs=y)

    offset = lambda x: torch.stack([0 * x[:, 0], 2 * x[:, 1]], 1)
    method = bnn.RandomizedPriors(members=2, prior=offset, **SHORT)
    posterior = bnn.fit(model, x, y, method=method)
    for w in posterior.draws["w"][0]:
        probability = torch.sigmoid(x @ w + 2 * x[:, 1])
        torch.testing.assert_close(x.T @ (y - probability), w, rtol=0, atol=0.02)
        slope = x.T @ (y - torch.sigmoid(x @ w)) - w
        assert slope.abs().max() > 1  # and far from the optimum without g
    logits = posterior.predict(x).f[0]
    torch.testing.assert_close(logits[..., 1], posterior.draws["w"][0] @ x.T + 2 * x[:, 1])
    with pytest.raises(bnn.ModelError, match="bootstrap"):
        bnn.fit(model, x, y, method=bnn.RandomizedPriors(noise=0.1))


def test_counts_cannot_be_moved():
    def counts(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            f = pyro.deterministic("f", x * w)
            pyro.sample("y", dist.Poisson(f.exp()), obs=y)

    with pytest.raises(bnn.ModelError, match="bootstrap"):
        bnn.fit(counts, [0.0, 1.0], [1.0, 2.0], method=bnn.RandomizedPriors(noise=0.1))


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("kind", ["global", "predicted"])
def test_noise_that_the_model_learns_is_not_added(kind, anchored):
    """It would be learned from the moved targets: .71 where .5 is right."""
    gaussian = likelihoods.Gaussian() if kind == "global" else likelihoods.Gaussian("predicted")
    model = linear(2, likelihood=gaussian)
    x, y = torch.eye(2).repeat(4, 1), torch.arange(8.0)
    method = bnn.RandomizedPriors(noise=0.5, anchored=anchored, **SHORT)
    with pytest.raises(bnn.ModelError, match=r"learned from the moved ones.*Gaussian\(0.5\)"):
        bnn.fit(model, x, y, method=method)


@pytest.mark.filterwarnings("ignore::bnn.errors.ConvergenceWarning")
@pytest.mark.parametrize("family", [dist.Normal, dist.StudentT, dist.Cauchy, dist.Laplace])
def test_noise_is_added_to_what_has_a_fixed_one_however_far_off(family):
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1e4))
        with pyro.plate("data", len(x)):
            f = pyro.deterministic("f", w * x)
            pyro.sample("y", family(*(3.0,) * (family is dist.StudentT), f, 0.1), obs=y)

    method = bnn.RandomizedPriors(members=2, noise=0.1, steps=3)
    assert bnn.fit(model, torch.ones(5), torch.ones(5), method=method).shape == (1, 2)


@pytest.mark.parametrize(
    ("prior", "said"),
    [
        (lambda x: None, "a NoneType"),
        (lambda x: x[:, 0] / 0, "not finite"),
        (lambda x: torch.randn(len(x)), "other numbers at a second call"),
        (torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Dropout()), "call its eval"),
    ],
)
def test_a_prior_function_that_is_none_is_refused(prior, said, regression):
    method = bnn.RandomizedPriors(prior=prior)
    with pytest.raises(bnn.ModelError, match=f"prior function gives .*{said}"):
        bnn.fit(regression.model, regression.x, regression.y, method=method)


def _silent(x, y, w):
    pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def _dropped(x, y, w):
    pyro.deterministic("f", x @ w)
    _silent(x, y, w)


def _local(x, y, w):
    jitter = pyro.sample("jitter", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(pyro.deterministic("f", x @ w + jitter), 1.0), obs=y)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (_silent, "announces none. Announce it"),
        (_dropped, "drops what pyro.deterministic returns"),
        (_local, '"jitter" is random in every row'),
    ],
)
def test_a_model_without_a_seam_that_counts_is_refused(regression, rows, reason):
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            rows(x, y, w)

    with pytest.raises(bnn.ModelError, match=reason):
        bnn.fit(model, regression.x, regression.y, method=CLEAN)


def test_names_and_plates_that_are_in_the_way_are_told(regression):
    def clash(x, y=None):
        w = pyro.sample("prior.w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(pyro.deterministic("f", x @ w), 1.0), obs=y)

    def subsampled(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x), subsample_size=10) as rows:
            f = pyro.deterministic("f", x[rows] @ w)
            pyro.sample("y", dist.Normal(f, 1.0), obs=None if y is None else y[rows])

    for model, reason in ((clash, 'rename "prior.w"'), (subsampled, "batch_size")):
        with pytest.raises(bnn.ModelError, match=reason):
            bnn.fit(model, regression.x, regression.y, method=CLEAN)


def test_a_function_of_another_shape_is_refused(regression):
    method = bnn.RandomizedPriors(prior=lambda x: x)
    with pytest.raises(bnn.ModelError, match=r"\(row=50, column=2\) and f is \(row=50\)"):
        bnn.fit(regression.model, regression.x, regression.y, method=method)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"scale": 0.0}, ValueError),
        ({"noise": -1.0}, ValueError),
        ({"prior": 2.0}, TypeError),
        ({"anchored": True, "prior": wave}, ValueError),
        ({"members": 0}, ValueError),
    ],
)
def test_settings_are_checked(settings, error):
    with pytest.raises(error, match=next(iter(settings))):
        bnn.RandomizedPriors(**settings)


def _probability(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        f = pyro.deterministic("f", torch.sigmoid(x @ w))
        pyro.sample("y", dist.Bernoulli(f), obs=y)


def _rate(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        f = pyro.deterministic("f", (x @ w).exp())
        pyro.sample("y", dist.Poisson(f), obs=y)


@pytest.mark.parametrize(("model", "what"), [(_probability, "probs"), (_rate, "rate")])
def test_an_f_behind_its_link_is_refused(regression, model, what):
    y = (regression.y > 0).float()
    with pytest.raises(bnn.ModelError, match=f"takes {what} of"):
        bnn.fit(model, regression.x, y, method=FEW)


def test_an_f_that_is_random_by_itself_is_refused(regression):
    net = torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.Dropout(0.5), torch.nn.Linear(5, 1))
    model = bnn.models.supervised(net, bnn.models.likelihoods.Gaussian(0.5))
    with pytest.raises(bnn.ModelError, match=r"net\.eval"):
        bnn.fit(model, regression.x, regression.y, method=FEW)
