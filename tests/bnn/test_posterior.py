import dataclasses
import os
import subprocess
import sys
import textwrap

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_

import bnn
from bnn import chunks, handlers, prediction
from bnn.models import sample_weights
from tests.exact import check_predictive_noise

SHORT = bnn.SVI(steps=100, draws=50)
NET = torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))


def by_hand(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


class Module(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = PyroModule[torch.nn.Linear](2, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

    def forward(self, x, y=None):
        f = self.linear(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(f, 0.5), obs=y)


def by_sample_weights(x, y=None):
    net = sample_weights(NET)
    with pyro.plate("data", len(x)):
        f = pyro.deterministic("f", net(x).squeeze(-1))
        pyro.sample("y", dist.Normal(f, 0.5), obs=y)


def _converted():
    """A net turned into a PyroModule in place, a prior set on each of its parameters."""
    net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    to_pyro_module_(net)
    for module in list(net.modules()):
        for name, weight in list(module.named_parameters(recurse=False)):
            prior = dist.Normal(0.0, 1.0).expand(weight.shape).to_event(weight.ndim)
            setattr(module, name, PyroSample(prior))

    def model(x, y=None):
        f = net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(f, 0.5), obs=y)

    return model


DOORS = {
    "by_hand": by_hand,
    "module": Module(),
    "converted": _converted(),
    "sample_weights": by_sample_weights,
}


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 2, generator=generator)
    return x, x[:, 0] - x[:, 1] + 0.1 * torch.randn(30, generator=generator)


@pytest.mark.filterwarnings("ignore::bnn.errors.ConvergenceWarning")
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("method", [SHORT, bnn.NUTS(chains=2, warmup=100, draws=50)], ids=str)
def test_every_way_to_write_a_model_goes_through_one_door(door, method, rows):
    posterior = bnn.fit(DOORS[door], *rows, method=method)
    assert posterior.predict(rows[0][:4]).y.shape == (*posterior.shape, 4)
    assert posterior.log_likelihood().shape == (*posterior.shape, 30)


@pytest.mark.filterwarnings("ignore::bnn.errors.ConvergenceWarning")
@pytest.mark.parametrize("door", DOORS)
def test_lifted_and_looped_predictions_agree(door, rows, monkeypatch):
    posterior = bnn.fit(DOORS[door], *rows, method=SHORT)
    lifted, score = posterior.predict(rows[0]), posterior.log_likelihood()
    calls = []
    monkeypatch.setattr(prediction, "vmap", lambda *a, **k: calls.append(1) or _refuse)
    monkeypatch.setattr(handlers, "vmap", lambda *a, **k: calls.append(1) or _refuse)
    looped = posterior.predict(rows[0])
    assert calls
    for name in ("f", "mean", "aleatoric", "epistemic"):
        torch.testing.assert_close(
            getattr(lifted, name), getattr(looped, name), rtol=1e-5, atol=1e-5
        )
    torch.testing.assert_close(score, posterior.log_likelihood(), rtol=1e-5, atol=1e-5)


def _refuse(*args):
    raise RuntimeError("cannot be lifted")


@pytest.mark.filterwarnings("ignore::bnn.errors.ConvergenceWarning")
@pytest.mark.parametrize(
    "noise",
    [
        lambda f: dist.Normal(f, 0.5),
        lambda f: dist.StudentT(5.0, f, 0.5),
        lambda f: dist.LogNormal(f, 0.5),
        lambda f: dist.Laplace(f, 0.5),
        lambda f: dist.MixtureSameFamily(
            dist.Categorical(torch.ones(2)), dist.Normal(torch.stack([f, f + 1], -1), 0.5)
        ),
        lambda f: dist.Normal(f, 0.5).mask(torch.ones(1, dtype=torch.bool)),
        lambda f: dist.Weibull(f.exp(), 2.0),  # its transforms hold tensors: looped
    ],
    ids=["normal", "student", "lognormal", "laplace", "mixture", "masked", "weibull"],
)
def test_moments_are_those_of_the_distribution_at_each_draw(noise, rows):
    x, y = rows

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 0.3).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            f = pyro.deterministic("f", x @ w)
            pyro.sample("y", noise(f), obs=y)

    posterior = bnn.fit(model, x, y.exp(), method=SHORT)
    got = posterior.predict(x[:3], seed=4)
    fn = noise(posterior.draws["w"][0] @ x[:3].T)
    torch.testing.assert_close(got.mean, fn.mean.mean(0))
    torch.testing.assert_close(got.aleatoric, fn.variance.mean(0))
    torch.testing.assert_close(got.epistemic, fn.mean.var(0, correction=0))
    # Every draw and row has noise of its own; two in 150 may round to the same float32.
    assert len(got.y.unique()) >= got.y.numel() - 2


@pytest.mark.filterwarnings("ignore::bnn.errors.ConvergenceWarning")
def test_labels_have_entropies_and_they_add_up(rows):
    x, _ = rows

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=x @ w), obs=y)

    y = x.argmax(1)
    posterior = bnn.fit(model, x, y, method=SHORT)
    got = posterior.predict(x)
    probs = (x @ posterior.draws["w"][0]).softmax(-1)  # (draw, row, class)
    entropy = lambda p: -(p * p.log()).sum(-1)
    torch.testing.assert_close(got.probs, probs.mean(0))
    torch.testing.assert_close(got.aleatoric, entropy(probs).mean(0))
    torch.testing.assert_close(got.entropy, entropy(probs.mean(0)))
    torch.testing.assert_close(got.mutual_information, got.entropy - got.aleatoric)
    assert got.y.dtype == torch.long
    with pytest.raises(bnn.ModelError, match="standard deviation"):
        got.std  # noqa: B018


@pytest.mark.filterwarnings("ignore::bnn.errors.ConvergenceWarning")
def test_a_plate_that_draws_a_minibatch_shows_every_row_after_the_fit(rows):
    """The same draws through the model without subsample_size give the same numbers."""

    def subsamples(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x), subsample_size=7) as part:
            f = pyro.deterministic("f", x[part] @ w)
            pyro.sample("y", dist.Normal(f, 0.5), obs=None if y is None else y[part])
        pyro.deterministic("mean", (x @ w).mean())

    x, y = rows
    posterior = bnn.fit(subsamples, x, y, method=SHORT)
    w = posterior.draws["w"]
    for new in (x, x[:3], x[:7], x[:1], x[:0]):
        prediction = posterior.predict(new)
        torch.testing.assert_close(prediction.f, torch.einsum("cdj,rj->cdr", w, new))
        assert prediction.y.shape == (1, 50, len(new))
        assert prediction.mean.shape == (len(new),)
    exact = torch.distributions.Normal(torch.einsum("cdj,rj->cdr", w, x), 0.5).log_prob(y)
    torch.testing.assert_close(posterior.log_likelihood(), exact)
    torch.testing.assert_close(posterior.log_likelihood(x[:3], y[:3]), exact[:, :, :3])
    every = posterior.deterministic()["mean"]
    torch.testing.assert_close(every, (w @ x.T).mean(-1))
    groups = posterior.to_arviz()
    assert groups["log_likelihood"]["y"].shape == groups["posterior_predictive"]["y"].shape
    assert bnn.prior_predictive(subsamples, x, draws=5).y.shape == (1, 5, len(x))


@pytest.mark.filterwarnings("ignore::bnn.errors.ConvergenceWarning")
def test_a_plate_that_draws_whichever_rows_it_is_given_is_refused(rows):
    x, y = rows

    def model(x_new, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x), subsample_size=7) as part:
            pyro.sample("y", dist.Normal(x[part] @ w, 0.5), obs=None if y is None else y[part])

    posterior = bnn.fit(model, x, y, method=SHORT)
    groups = posterior.to_arviz()  # without those that need every row
    assert not hasattr(groups, "log_likelihood")
    with pytest.raises(bnn.ModelError, match=r"draws 7 rows .*len\(x\)"):
        posterior.predict(x)


@pytest.mark.filterwarnings("ignore::bnn.errors.ConvergenceWarning")
def test_a_plate_scaled_to_more_rows_than_it_is_given_predicts_as_ever(rows):
    """`subsample_size=len(x)`: all rows that it is given, counted as 30."""

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.deterministic("mean", (x @ w).mean())
        with pyro.plate("data", 30, subsample_size=len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    x, y = rows
    posterior = bnn.fit(model, x, y, method=SHORT)
    assert posterior.predict(x[:5]).mean.shape == (5,)
    exact = (posterior.draws["w"] @ x.T).mean(-1)
    torch.testing.assert_close(posterior.deterministic()["mean"], exact)


def test_predictive_draws_carry_the_observation_noise():
    check_predictive_noise()


@pytest.mark.filterwarnings("ignore::bnn.errors.ConvergenceWarning")
def test_blocks_of_rows_do_not_change_the_result(rows, monkeypatch):
    posterior = bnn.fit(by_sample_weights, *rows, method=SHORT)
    x = torch.randn(1_100, 2, generator=torch.Generator().manual_seed(1))
    whole = posterior.predict(x)
    monkeypatch.setattr(prediction, "ROWS", 100)
    monkeypatch.setattr(chunks, "NUMBERS", 700 * 12)
    parts = posterior.predict(x)
    for name in ("f", "mean", "aleatoric", "epistemic"):
        torch.testing.assert_close(getattr(whole, name), getattr(parts, name), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::bnn.errors.ConvergenceWarning")
def test_quantiles_of_many_draws(rows):
    posterior = bnn.fit(by_hand, *rows, method=SHORT)
    got = posterior.predict(rows[0])
    pooled = got.outcomes.flatten(0, 1)
    torch.testing.assert_close(got.quantile(0.3), pooled.quantile(0.3, dim=0))
    lower, upper = got.interval(0.8)
    torch.testing.assert_close(lower, pooled.quantile(0.1, dim=0))
    torch.testing.assert_close(upper, pooled.quantile(0.9, dim=0))
    with pytest.raises(ValueError, match=r"0\.\.1"):
        got.quantile(1.5)
    with pytest.raises(ValueError, match="level"):
        got.interval(90)


@pytest.mark.parametrize("lifted", [True, False])
def test_quantiles_of_an_ensemble_are_those_of_its_mixture(lifted, rows, monkeypatch):
    """Read off one y for each of 5 members, an interval of 90 % would hold about 60 %."""

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            f = pyro.deterministic("f", x @ w)
            pyro.sample("y", dist.Normal(f, 0.5), obs=y)

    x, y = rows
    posterior = bnn.fit(model, x, y, method=bnn.MAP(draws=5), progress=False)
    if not lifted:
        monkeypatch.setattr(prediction._Forward, "_lifted", _refuse)
    got = posterior.predict(x)
    assert got.y.shape[:2] == got.f.shape[:2] == (1, 5)
    assert got.outcomes.shape == (1, 400, *y.shape)
    lower, upper = got.interval(0.9)
    # an end of 400 draws has an error of .106 sd, and the mean of the rows .106 / sqrt(rows)
    error = 0.5 * 0.106 / len(x) ** 0.5
    assert float((upper - got.mean).mean()) == pytest.approx(1.645 * 0.5, abs=4 * error)
    assert float((got.mean - lower).mean()) == pytest.approx(1.645 * 0.5, abs=4 * error)
    noise = torch.Generator().manual_seed(1)
    new = got.mean + 0.5 * torch.randn(200, *y.shape, generator=noise)
    inside = ((new > lower) & (new < upper)).double().mean()
    assert float(inside) == pytest.approx(0.9, abs=0.02)


def test_outcomes_go_with_y(rows):
    """Whoever replaces y, by a recalibrated one, gets intervals of the new one."""
    few = bnn.fit(by_hand, *rows, method=bnn.MAP(draws=4)).predict(rows[0])
    assert torch.equal(few.outcomes[:, ::100], few.y)
    moved = dataclasses.replace(few, y=few.y + 5.0)
    assert torch.equal(moved.outcomes, moved.y)
    assert dataclasses.replace(few, local={}).outcomes.shape == (1, 400, len(rows[0]))


def test_outcomes_of_many_draws_are_y(rows):
    posterior = bnn.fit(by_hand, *rows, method=bnn.MAP(draws=400))
    got = posterior.predict(rows[0])
    assert got.outcomes.data_ptr() == got.y.data_ptr()


@pytest.mark.filterwarnings("ignore::bnn.errors.ConvergenceWarning")
def test_fewer_draws_are_spread_evenly(rows):
    posterior = bnn.fit(by_hand, *rows, method=SHORT)
    got = posterior.predict(rows[0], draws=2)
    ends = posterior.draws["w"][:, [0, -1]] @ rows[0].T
    torch.testing.assert_close(got.mean, ends.mean((0, 1)))
    with pytest.raises(ValueError, match="1 to 50"):
        posterior.predict(rows[0], draws=51)


@pytest.mark.filterwarnings("ignore::bnn.errors.ConvergenceWarning")
def test_local_sites_are_drawn_anew_at_new_rows_and_kept_at_the_old():
    def model(x, y=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            theta = pyro.sample("theta", dist.Normal(mu, 2.0))
            pyro.sample("y", dist.Normal(theta, x), obs=y)

    x, y = torch.full((6,), 0.1), torch.tensor([3.0, -3.0, 2.0, -2.0, 1.0, -1.0])
    posterior = bnn.fit(model, x, y, method=bnn.NUTS(chains=2, warmup=200, draws=400))
    assert posterior.draws["theta"].shape == (2, 400, 6)
    prediction = posterior.predict(torch.full((2,), 0.1))
    assert prediction.local["theta"].shape == (2, 400, 2)
    assert 1.7 < prediction.local["theta"].std() < 2.5  # the spread of the prior around mu
    fitted = posterior.log_likelihood().mean()
    assert fitted > 0  # density near 1 / (0.1 sqrt(2 pi)) at the fitted thetas
    assert posterior.log_likelihood(x, y).mean() < -10  # thetas drawn anew miss


def test_quantiles_do_not_depend_on_how_many_rows_are_sorted_at_a_time(monkeypatch):
    y = torch.randn(2, 7, 5, 3, generator=torch.Generator().manual_seed(0))
    made = bnn.Prediction(f=y, y=y, mean=y.mean((0, 1)), aleatoric=y[0, 0], epistemic=y[0, 0])
    levels = torch.tensor([[0.05, 0.5], [0.9, 1.0]], dtype=torch.float64)
    whole = made.quantile(levels), made.quantile(0.3)
    torch.testing.assert_close(whole[0], y.flatten(0, 1).double().quantile(levels.flatten(), 0)
                               .unflatten(0, (2, 2)).float())  # fmt: skip
    monkeypatch.setattr(bnn.prediction, "NUMBERS", 50)  # 42 in a row
    assert torch.equal(made.quantile(levels), whole[0])
    assert torch.equal(made.quantile(0.3), whole[1])


@pytest.mark.slow
def test_a_large_prediction_stays_under_two_gigabytes():
    """1,000 draws x 100,000 rows of a 1x50 net, in a process of its own."""
    program = """
        import resource, torch, bnn
        from bnn import models
        x = torch.randn(100, 1); y = x[:, 0]
        model = models.mlp_regression(1, hidden=(50,))
        import warnings; warnings.simplefilter("ignore")
        posterior = bnn.fit(model, x, y, method=bnn.SVI(steps=20, draws=1000))
        p = posterior.predict(torch.randn(100_000, 1))
        assert p.y.shape == (1, 1000, 100_000)
        lower, upper = p.interval(0.9)
        assert lower.shape == (100_000,)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # several test processes share the cores
    )
    assert float(out.stdout) < 2.0, f"{float(out.stdout):.2f} GiB"


def test_import_adds_less_than_a_third_of_a_second():
    program = (
        "import time, torch, pyro; t = time.process_time(); import bnn; "
        "print(time.process_time() - t)"
    )
    times = [
        float(
            subprocess.run(
                [sys.executable, "-c", program], capture_output=True, text=True, check=True
            ).stdout
        )
        for _ in range(3)
    ]
    assert min(times) < 0.3


AGAIN = """
    import hashlib, warnings, bnn, pyro, torch
    import pyro.distributions as dist

    def model(x, y=None):
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, sigma), obs=y)

    x = torch.linspace(-1, 1, 20).reshape(10, 2).sin()
    digest = hashlib.sha256()
    for method in (
        bnn.SVI(steps=100, batch_size=5, draws=10),
        bnn.MAP(steps=50, restarts=2, draws=2),
        bnn.NUTS(chains=2, warmup=30, draws=10),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            posterior = bnn.fit(model, x, x[:, 0], method=method, seed=3)
        for values in (posterior.draws["w"], posterior.draws["sigma"], posterior.predict(x).y):
            digest.update(values.numpy().tobytes())
    digest = digest.hexdigest()
"""


def test_the_same_seed_gives_the_same_bits_after_a_restart():
    """Here, where much has run, and in a process that has done nothing else."""
    program, here = textwrap.dedent(AGAIN), {"__name__": "here"}
    exec(program, here)
    out = subprocess.run(
        [sys.executable, "-c", f"import torch; torch.manual_seed(5)\n{program}\nprint(digest)"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "7"},
    )
    assert out.stdout.strip() == here["digest"]


@pytest.mark.filterwarnings("ignore::bnn.errors.ConvergenceWarning")
@pytest.mark.parametrize(
    "method", [SHORT, bnn.MAP(steps=50), bnn.NUTS(chains=2, warmup=50, draws=20)]
)
def test_double_precision_is_kept(method, rows):
    torch.set_default_dtype(torch.float64)
    try:
        posterior = bnn.fit(by_hand, *rows, method=method)
        prediction = posterior.predict(rows[0])
        assert posterior.draws["w"].dtype == prediction.f.dtype == prediction.mean.dtype
        assert prediction.mean.dtype == posterior.log_likelihood().dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def with_a_site_of_each_row(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        share = pyro.sample("share", dist.Beta(2.0, 6.0))
        h = pyro.deterministic("hidden", x[:, 0] * share)
        pyro.sample("y", dist.Normal(w * h, 0.5), obs=y)


def _at(model, draws, count=(1, 1)):
    """A posterior of given draws."""
    x = torch.ones(4, 1)
    fitted = bnn.fit(model, x, torch.ones(4), method=FixedMasks(), progress=False)
    return dataclasses.replace(fitted, draws=draws, count=count)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedMasks(bnn.Method):
    """Learns nothing, and takes a model without latent sites."""

    adds_sites = True

    def fit(self, model, data, sites, *, seed, progress):
        return bnn.Posterior(model=model, method=self, data=data, sites=sites, draws={})


def test_a_seam_is_kept_where_it_is_asked_for():
    posterior = _at(with_a_site_of_each_row, {"w": torch.ones(2, 30)})
    x = torch.arange(1.0, 6.0)[:, None]
    prediction = posterior.predict(x, seams=["hidden"])
    assert set(prediction.local) == {"share", "hidden"}
    assert prediction.local["hidden"].shape == (2, 30, 5)
    torch.testing.assert_close(
        prediction.local["hidden"], x[:, 0] * prediction.local["share"], rtol=1e-6, atol=0
    )
    for wrong in (["attention"], "hidden"):
        with pytest.raises(bnn.ModelError, match=r"announces, with a row axis, hidden\."):
            posterior.predict(x, seams=wrong)


def test_mode_mean_puts_sites_of_a_row_at_their_means():
    w = torch.tensor([[1.0, 2.0, 3.0]])
    x = torch.arange(1.0, 6.0)[:, None]
    prediction = _at(with_a_site_of_each_row, {"w": w}).predict(x, mode="mean")
    assert (prediction.local["share"] == 0.25).all()
    torch.testing.assert_close(prediction.f[0, :, :], w[0, :, None] * x[:, 0] * 0.25)


def test_mode_mean_runs_equal_draws_once():
    x = torch.ones(3, 1)
    posterior = _at(with_a_site_of_each_row, {"w": torch.ones(2, 30)})
    assert posterior.predict(x, mode="mean").f.shape == (1, 1, 3)
    assert posterior.predict(x).f.shape == (2, 30, 3)
    with pytest.raises(ValueError, match='Pass "draws" or "mean"'):
        posterior.predict(x, mode="median")


def test_mode_mean_names_the_site_that_has_none():
    def model(x, y=None):
        with pyro.plate("data", len(x)):
            logit = dist.Normal(torch.zeros(len(x)), 1.0)
            squashed = dist.TransformedDistribution(logit, dist.transforms.SigmoidTransform())
            shift = pyro.sample("shift", squashed)
            pyro.sample("y", dist.Normal(x[:, 0] + shift, 0.5), obs=y)

    posterior = _at(model, {})
    with pytest.raises(bnn.ModelError, match='"shift" has no mean in closed form'):
        posterior.predict(torch.ones(3, 1), mode="mean")


def test_a_method_that_adds_sites_takes_a_model_that_has_none(tmp_path):
    def model(x, y=None):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x[:, 0], 0.5), obs=y)

    with pytest.raises(bnn.ModelError, match="nothing to infer"):
        bnn.fit(model, torch.ones(4, 1), torch.ones(4), method=SHORT, progress=False)
    posterior = _at(model, {}, count=(2, 5))
    assert posterior.predict(torch.ones(3, 1)).y.shape == (2, 5, 3)
    assert posterior.log_likelihood().shape == (2, 5, 4)
    posterior.save(tmp_path / "fit")
    assert bnn.load(tmp_path / "fit", model).shape == (2, 5)
