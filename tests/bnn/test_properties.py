"""Laws that hold for all data, tried on data that nobody would have thought of."""

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

import bnn
from bnn.handlers import At, Score, quiet_pyro
from bnn.models import MLP, likelihoods, supervised
from bnn.models._units import Units

slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("bnn", derandomize=True, deadline=None, suppress_health_check=slow)
settings.load_profile("bnn")
FLOATS = {"allow_nan": False, "allow_infinity": False, "width": 32}


def tables(largest: float, rows: tuple[int, int] = (1, 12)) -> st.SearchStrategy:
    """(row, column) of numbers, whatever their sizes."""
    shape = st.tuples(st.integers(*rows), st.integers(1, 3))
    return shape.flatmap(
        lambda s: arrays.arrays(np.float32, s, elements=st.floats(-largest, largest, **FLOATS))
    )


# Standardise ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:standardize")
@settings(max_examples=300)
@given(tables(2.0**49))
def test_standardised_columns_come_back(table):
    x = torch.from_numpy(table).double()
    units = Units.of(x, "x", x.shape[1])
    z = units.standardized(x)
    assert torch.isfinite(z).all()
    assert z.abs().max() <= math.sqrt(len(x)) + 1e-6 or (x.amax(0) == x.amin(0)).any()
    back = units.mean + units.sd * z
    assert ((back - x).abs() <= 1e-9 * x.abs().amax(0)).all()
    spread = (x.amax(0) - x.amin(0)) > 1e-6 * x.abs().amax(0)
    assert (z.mean(0).abs()[spread] < 1e-6).all()
    assert ((z.std(0, correction=0)[spread] - 1).abs() < 1e-6).all()


# Invariance: the same posterior, in other orders and units ---------------------------------------


def regression(prior: Tensor, noise: float):
    """Linear, with prior scales (column,)."""

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros_like(prior), prior).to_event(1))
        with pyro.plate("data", len(x)):
            f = pyro.deterministic("f", x @ w)
            pyro.sample("y", dist.Normal(f, noise), obs=y)

    return model


def fit(model, x, y) -> bnn.Posterior:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        method = bnn.Laplace(draws=20, steps=600)
        return bnn.fit(model, x, y, method=method, progress=False)


problems = st.tuples(st.integers(3, 9), st.integers(1, 3), st.integers(0, 10_000))


def problem(sizes: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor, np.random.Generator]:
    """Rows x and y, prior scales, and a generator for what is done to them."""
    rows, columns, seed = sizes
    rng = np.random.default_rng(seed)
    x = torch.tensor(rng.normal(size=(rows, columns)) * rng.uniform(0.1, 3, columns))
    y = torch.tensor(rng.normal(size=rows) + x.sum(1).numpy())
    return x, y, torch.tensor(rng.uniform(0.3, 2, columns)), rng


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def exact(x: Tensor, y: Tensor, prior: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    cov = torch.linalg.inv(torch.diag(prior**-2) + x.T @ x / noise**2)
    return cov @ x.T @ y / noise**2, cov


@settings(max_examples=3)
@given(problems)
def test_neither_rows_nor_features_have_an_order(double, sizes):
    """The evidence is exact here; it tells of every factor of the posterior."""
    x, y, prior, rng = problem(sizes)
    rows, columns = rng.permutation(len(x)), rng.permutation(x.shape[1])
    first = fit(regression(prior, 0.5), x, y)
    other = fit(regression(prior[columns], 0.5), x[rows][:, columns], y[rows])
    assert other.log_evidence == pytest.approx(first.log_evidence, abs=1e-4)
    mean, cov = exact(x, y, prior, 0.5)
    new = torch.tensor(rng.normal(size=(4, x.shape[1])))
    for posterior, at in ((first, new), (other, new[:, columns])):
        prediction = posterior.predict(at)
        sd = ((new @ cov) * new).sum(1).sqrt()
        assert ((prediction.mean - new @ mean).abs() < 4.5 * sd / math.sqrt(20) + 1e-4).all()


@settings(max_examples=3)
@given(problems, st.floats(0.01, 1e4), st.floats(-1e4, 1e4))
def test_units_of_y_are_those_of_the_answer(double, sizes, a, b):
    """y -> a y + b, the model standardised: f -> a f + b, draws of f to 1e-4 of their spread."""
    x, y, prior, _ = problem(sizes)
    model = regression(prior, 0.5)
    first = fit(bnn.standardize(model, x, y), x, y)
    other = fit(bnn.standardize(model, x, a * y + b), x, a * y + b)
    f, g = first.predict(x), other.predict(x)
    sd = a * y.std()
    assert ((g.mean - (a * f.mean + b)).abs() < 1e-4 * sd).all()
    assert ((g.f - (a * f.f + b)).abs() < 1e-3 * sd).all()
    assert ((g.std / (a * f.std)).log().abs() < 1e-4).all()
    shift = len(y) * math.log(a)
    assert other.log_evidence == pytest.approx(first.log_evidence - shift, abs=1e-3)
    scores = other.log_score(x, a * y + b) + math.log(a)
    torch.testing.assert_close(scores, first.log_score(x, y), atol=1e-3, rtol=1e-3)


# Likelihoods -------------------------------------------------------------------------------------

LAWS = {
    "gaussian": (likelihoods.Gaussian(), "real"),
    "gaussian_fixed": (likelihoods.Gaussian(0.3), "real"),
    "gaussian_predicted": (likelihoods.Gaussian("predicted"), "real"),
    "student": (likelihoods.StudentT(), "real"),
    "student_predicted": (likelihoods.StudentT(2.5, "predicted"), "real"),
    "poisson": (likelihoods.Poisson(), "count"),
    "negative_binomial": (likelihoods.NegativeBinomial(), "count"),
    "bernoulli": (likelihoods.Bernoulli(), 2),
    "categorical": (likelihoods.Categorical(4), 4),
    "ordinal": (likelihoods.Ordinal(4), 4),
}
POSSIBLE = {
    "real": st.floats(-1e6, 1e6, **FLOATS),
    "count": st.integers(0, 1_000_000).map(float),
    2: st.integers(0, 1).map(float),
    4: st.integers(0, 3).map(float),
}
IMPOSSIBLE = {
    "real": st.sampled_from([math.nan, math.inf, -math.inf, 1e30]),
    "count": st.one_of(st.sampled_from([math.nan, 2.5]), st.floats(-1e6, -0.5)),
    2: st.one_of(st.sampled_from([math.nan, 0.5, -1.0]), st.integers(2, 99)),
    4: st.one_of(st.sampled_from([math.nan, 0.5, -1.0]), st.integers(4, 99)),
}
_ROWS = 50  # in one example: 200 of them are 10,000 inputs


@pytest.mark.parametrize("law", LAWS)
def test_a_log_density_is_finite_wherever_the_net_goes(law):
    """Outputs of any size up to 1e6 (beyond it no net of finite weights on sane inputs goes)."""
    likelihood, kind = LAWS[law]
    outputs = likelihood.outputs
    observed = POSSIBLE[kind]

    @settings(max_examples=200)
    @given(
        arrays.arrays(np.float32, (_ROWS, outputs), elements=st.floats(-1e6, 1e6, **FLOATS)),
        arrays.arrays(np.float32, _ROWS, elements=observed),
        st.integers(0, 100),
    )
    def run(raw, y, seed):
        check(likelihood, torch.from_numpy(raw), torch.from_numpy(y), seed)

    def check(likelihood, raw, y, seed):
        raw = raw.requires_grad_()
        y = y.long() if kind == 4 else y
        torch.manual_seed(seed)
        with quiet_pyro(), pyro.poutine.trace() as trace:
            observe = likelihood()
            with pyro.plate("data", _ROWS):
                observe(raw, y)
        log_prob = trace.trace.nodes["y"]["fn"].log_prob(y)
        assert torch.isfinite(log_prob).all(), (raw[~log_prob.isfinite()], y[~log_prob.isfinite()])
        (slope,) = torch.autograd.grad(log_prob.sum(), raw)
        assert torch.isfinite(slope).all(), raw[~slope.isfinite().all(-1)]
        if kind != "real":
            assert (log_prob <= 1e-4).all()

    run()


@pytest.mark.parametrize("law", LAWS)
def test_what_cannot_be_observed_is_an_error(law):
    likelihood, kind = LAWS[law]
    model = supervised(MLP(1, (), likelihood.outputs), likelihood)
    x = torch.linspace(-1, 1, 6)[:, None]
    impossible = IMPOSSIBLE[kind]

    @settings(max_examples=15)
    @given(impossible, st.integers(0, 5))
    def run(value, row):
        y = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 0.0])
        y[row] = float(value)
        with pytest.raises(bnn.DataError, match=rf'"y".*row {row}|"y" reaches 1e\+30'):
            bnn.fit(model, x, y, method=bnn.MAP(steps=2))

    run()


def test_the_densities_that_are_checked_are_those_that_are_fitted():
    """`check` above reads the site's own density; a fit adds it up by Score."""
    model = supervised(MLP(1, (), 1), likelihoods.Gaussian(0.3))
    x, y = torch.zeros(3, 1), torch.zeros(3)
    zero = {"layers.0.weight": torch.zeros(1, 1), "layers.0.bias": torch.zeros(1)}
    with quiet_pyro(), Score() as score, At(zero):
        model(x, y)
    wanted = 3 * dist.Normal(0.0, 0.3).log_prob(torch.tensor(0.0))
    torch.testing.assert_close(score.likelihood, wanted)
