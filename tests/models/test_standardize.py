"""A model of standardised data, given data in the user's units: its numbers are in those units."""

import math
import pickle
import warnings

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch

import bnn
from bnn.fingerprint import fingerprint
from bnn.models._standardize import rescaled

RNG = np.random.default_rng(0)
X = torch.tensor(RNG.normal(size=(40, 2)) * [3.0, 0.02] + [12.0, -5.0], dtype=torch.float64)
Y = 400.0 + 70.0 * (X[:, 0] - 12) + 2e3 * (X[:, 1] + 5) + 30.0 * torch.tensor(RNG.normal(size=40))
UNIT = torch.stack([X.mean(0), X.std(0, correction=0)])
NEW = X[:5] + 0.3 * UNIT[1]
MEAN, SD = Y.mean(), Y.std(correction=0)


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def unit(x, y=None):
    """Written for unit scales."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        f = pyro.deterministic("f", x @ w)
        pyro.sample("y", dist.Normal(f, 0.4), obs=y)


def raw(x, y=None):
    """The same, by hand, in the user's units: b = w sd_y / sd_x, and an intercept that follows."""
    b = pyro.sample("b", dist.Normal(torch.zeros(2), SD / UNIT[1]).to_event(1))
    with pyro.plate("data", len(x)):
        f = pyro.deterministic("f", MEAN + (x - UNIT[0]) @ b)
        pyro.sample("y", dist.Normal(f, 0.4 * SD), obs=y)


def exact(x_new):
    """The predictive density of `raw` in closed form: mean and sd of y at new rows."""
    x, new = X - UNIT[0], x_new - UNIT[0]
    noise = (0.4 * SD) ** 2
    precision = torch.diag((UNIT[1] / SD) ** 2) + x.T @ x / noise
    cov = torch.linalg.inv(precision)
    mean = cov @ x.T @ (Y - MEAN) / noise
    return MEAN + new @ mean, (noise + ((new @ cov) * new).sum(1)).sqrt()


def fit(model, *data, method=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        method = method or bnn.Laplace(draws=5_000)
        return bnn.fit(model, *data, method=method, progress=False)


def test_a_conjugate_model_scores_as_in_the_users_units():
    posterior = fit(bnn.standardize(unit, X, Y), X, Y)
    y_new = Y[:5] + 20.0
    mean, sd = exact(NEW)
    prediction = posterior.predict(NEW)
    assert ((prediction.mean - mean) / sd).abs().max() < 0.03  # 5,000 draws: .007 sd
    assert (prediction.std / sd).log().abs().max() < 0.02
    lower, upper = prediction.interval(0.9)
    assert ((upper - lower) / (2 * 1.645 * sd) - 1).abs().max() < 0.05
    wanted = dist.Normal(mean, sd).log_prob(y_new)
    torch.testing.assert_close(posterior.log_score(NEW, y_new), wanted, atol=0.04, rtol=0)
    assert ((prediction.f.mean((0, 1)) - mean) / sd).abs().max() < 0.03


def test_its_evidence_and_density_are_those_of_the_model_written_by_hand():
    """Laplace is exact here, so both are equal to rounding, and to the closed form."""
    few = bnn.Laplace(draws=50)
    ours, theirs = (fit(m, X, Y, method=few) for m in (bnn.standardize(unit, X, Y), raw))
    x = X - UNIT[0]
    b = SD / UNIT[1]
    cov = (0.4 * SD) ** 2 * torch.eye(40) + (x * b) @ (x * b).T
    evidence = dist.MultivariateNormal(MEAN.expand(40), cov).log_prob(Y)
    assert ours.log_evidence == pytest.approx(float(evidence), abs=1e-3)
    assert theirs.log_evidence == pytest.approx(float(evidence), abs=1e-3)
    w = ours.draws["w"][:, :3]
    both = bnn.posterior.replace(theirs, draws={"b": w * b})
    same = bnn.posterior.replace(ours, draws={"w": w})
    torch.testing.assert_close(same.log_likelihood(), both.log_likelihood())
    torch.testing.assert_close(same.predict(NEW).f, both.predict(NEW).f)


@pytest.mark.parametrize(
    "law",
    [
        lambda z: dist.Normal(z, 0.5),
        lambda z: dist.StudentT(4.0, z, 0.5),
        lambda z: dist.Laplace(z, 0.5),
        lambda z: dist.Gumbel(z, 0.5),
        lambda z: dist.Logistic(z, 0.5),
        lambda z: dist.MultivariateNormal(z, torch.eye(3)[:, :3] * 0.5),
        lambda z: dist.Normal(z, 0.5).to_event(1),
        lambda z: dist.MixtureSameFamily(
            dist.Categorical(torch.ones(3, 2)), dist.Normal(torch.stack([z, z + 1], -1), 0.5)
        ),
    ],
    ids=["normal", "student", "laplace", "gumbel", "logistic", "vector", "independent", "mixture"],
)
def test_a_rescaled_law_has_the_density_of_its_samples(law):
    z = law(torch.tensor([0.1, -0.4, 2.0]))
    mean, sd = torch.tensor(100.0), torch.tensor(7.0)
    y = rescaled(z, mean, sd)
    point = torch.tensor([90.0, 101.0, 112.0])
    events = 3 if z.event_shape else 1
    wanted = z.log_prob((point - mean) / sd) - events * math.log(7.0)
    torch.testing.assert_close(y.log_prob(point), wanted)
    assert y.batch_shape == z.batch_shape
    torch.testing.assert_close(y.mean, mean + sd * z.mean)
    torch.testing.assert_close(y.variance, sd**2 * z.variance)
    pyro.set_rng_seed(0)
    first = y.sample()
    pyro.set_rng_seed(0)
    torch.testing.assert_close(first, mean + sd * z.sample())
    assert y.expand((2, *z.batch_shape)).log_prob(point).shape == (2, *z.batch_shape)


@pytest.mark.parametrize("law", [dist.Normal, dist.Logistic], ids=["located", "rescaled"])
def test_what_a_mask_leaves_out_has_no_density_in_any_unit(law):
    z = law(torch.zeros(3, 2), 0.5)
    mask = torch.tensor([True, False, True])
    mean, sd, point = torch.tensor([100.0, 5.0]), torch.tensor([7.0, 2.0]), torch.full((3, 2), 90.0)
    wanted = rescaled(z.to_event(1), mean, sd).log_prob(point) * mask
    torch.testing.assert_close(rescaled(z.to_event(1).mask(mask), mean, sd).log_prob(point), wanted)
    inside = rescaled(z.mask(mask[:, None]).to_event(1), mean, sd)
    torch.testing.assert_close(inside.log_prob(point), wanted)


@pytest.mark.parametrize("law", [dist.StudentT, dist.Logistic], ids=["located", "rescaled"])
def test_predictions_of_any_law_are_in_the_users_units(law):
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            f = pyro.deterministic("f", x @ w)
            fn = dist.StudentT(5.0, f, 0.4) if law is dist.StudentT else law(f, 0.3)
            pyro.sample("y", fn, obs=y)

    posterior = fit(bnn.standardize(model, X, Y), X, Y, method=bnn.SVI(steps=500, draws=200))
    prediction = posterior.predict(X)
    assert (prediction.mean - Y).abs().mean() < 0.5 * SD
    assert ((prediction.y.std((0, 1)) / prediction.std).log().abs() < 0.6).all()
    assert posterior.log_score(X, Y).mean() > -math.log(3 * float(SD))


def test_a_prior_function_that_is_added_to_f_is_in_the_users_units():
    """A seam that is rewritten outside is what the model goes on with inside."""
    from bnn.handlers import Rewrite

    model = bnn.standardize(unit, X, Y)
    outside = pyro.poutine.trace(model)
    with pyro.poutine.condition(data={"w": torch.tensor([0.5, 0.2])}):
        plain = outside.get_trace(X, Y).nodes["y"]["fn"].loc
        with Rewrite({"f": lambda f: f + 50.0}) as rewrite:
            moved = pyro.poutine.trace(model).get_trace(X, Y).nodes["y"]["fn"].loc
    torch.testing.assert_close(moved, plain + 50.0)
    assert rewrite.met == {"f"}


def test_what_the_model_goes_on_with_is_standardised():
    seen = []

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            seen.append(pyro.sample("y", dist.Normal(w * x, 0.5), obs=y))

    made = bnn.standardize(model, X[:, 0], Y)
    made(X[:, 0], Y)
    torch.testing.assert_close(seen[-1], (Y - MEAN) / SD)
    made(X[:, 0])
    assert seen[-1].abs().max() < 10


def test_labels_tokens_and_pictures():
    def model(pictures, tokens, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        assert tokens.dtype == torch.long
        assert abs(float(pictures.mean())) < 1e-9
        with pyro.plate("data", len(tokens)):
            pyro.sample("y", dist.Bernoulli(logits=w * pictures.mean((1, 2))), obs=y)

    pictures, tokens = 255 * torch.rand(20, 4, 4), torch.arange(20) % 3
    labels = torch.arange(20) % 2
    for y in (labels, None):
        made = bnn.standardize(model, pictures, tokens, y)
        assert [u is None for u in made.units] == [False, True, True]
        posterior = fit(made, pictures, tokens, labels, method=bnn.SVI(steps=20, draws=5))
        assert posterior.predict(pictures, tokens).probs.shape == (20, 2)


def test_it_saves_pickles_and_is_known_again(tmp_path):
    made = bnn.standardize(unit, X, Y)
    posterior = fit(made, X, Y, method=bnn.MAP(steps=50, draws=5))
    posterior.save(tmp_path / "fit")
    again = bnn.load(tmp_path / "fit", bnn.standardize(unit, X, Y))
    assert torch.equal(again.predict(NEW).y, posterior.predict(NEW).y)
    assert fingerprint(pickle.loads(pickle.dumps(made))) == fingerprint(made)
    assert fingerprint(bnn.standardize(unit, X, Y * 2)) != fingerprint(made)


def test_tables_lists_and_columns():
    frame = pd.DataFrame(X.numpy(), columns=["a", "b"])
    for x, y in ((frame, pd.Series(Y.numpy())), (X.numpy(), Y.tolist())):
        torch.testing.assert_close(bnn.standardize(unit, x, y).units[0].sd, UNIT[1])
    whole = (frame > 0).astype("Int64")
    for x in (whole, whole.to_numpy(int), torch.ones(40, 2).long()):
        assert bnn.standardize(unit, x, None).units == (None, None)
    with pytest.warns(UserWarning, match="column 'c' of x is constant"):
        bnn.standardize(lambda x, y=None: unit(x[:, :2], y), frame.assign(c=1.0), Y)


def test_what_cannot_be_standardised_is_said():
    def two(x, y=None):
        with pyro.plate("data", len(x)):
            for name in "ab":
                pyro.sample(name, dist.Normal(0.0, 1.0), obs=y + 0)

    def counts(x, y=None):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Poisson(x.abs().sum(1)), obs=y)

    def positive(x, y=None):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.LogNormal(x.sum(1), 1.0), obs=y)

    with pytest.raises(ValueError, match="no data"):
        bnn.standardize(unit)
    with pytest.raises(ValueError, match="in place of the observations only"):
        bnn.standardize(unit, None, Y)
    with pytest.raises(ValueError, match="observes a, b; one site"):
        bnn.standardize(two, X, Y)
    with pytest.raises(ValueError, match="standardize: y holds NaN"):
        bnn.standardize(unit, X, Y * torch.nan)
    with pytest.raises(ValueError, match=r"Poisson.*takes whole .*\(model, x, None\)"):
        bnn.standardize(counts, X, torch.arange(40.0))
    with pytest.raises(ValueError, match=r"\(LogNormal\) takes whole or positive"):
        bnn.standardize(positive, X, Y)
