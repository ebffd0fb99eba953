"""Distances against closed forms of Gaussians, and against SciPy."""

import math
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import wasserstein_distance

import bnn
from bnn.reference import default_rows, regions, wasserstein

X = torch.linspace(-2, 2, 40)
NOISE = 0.5


def line(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        f = pyro.deterministic("f", w + 0 * x)
        pyro.sample("y", dist.Normal(f, NOISE), obs=y)


def labels(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        f = pyro.deterministic("f", w * x)
        pyro.sample("y", dist.Bernoulli(logits=f), obs=y)


@pytest.fixture(scope="module")
def fitted():
    return bnn.fit(line, X, X, method=bnn.Laplace(steps=200, draws=10))


def gaussian(fitted, mean, sd, seed, draws=4_000, chains=1):
    """The posterior whose f is N(mean, sd^2) at every row."""
    noise = torch.randn(chains, draws, generator=torch.Generator().manual_seed(seed))
    return replace(fitted, draws={"w": mean + sd * noise})


def normal_tv(p, q):
    """By quadrature, of two normals (mean, sd)."""
    y = torch.linspace(-12, 12, 48_001, dtype=torch.float64)
    density = [dist.Normal(torch.tensor(m).double(), s).log_prob(y).exp() for m, s in (p, q)]
    return float(0.5 * (density[0] - density[1]).abs().sum() * 0.0005)


@pytest.mark.parametrize(
    ("shape", "other"), [((500, 7), (500, 7)), ((300, 4), (1_000, 4)), ((1, 2), (200, 2))]
)
def test_wasserstein_is_scipys(shape, other):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal(shape), rng.standard_normal(other) * 2 + 0.5
    expected = [wasserstein_distance(x[:, i], y[:, i]) for i in range(shape[1])]
    np.testing.assert_allclose(wasserstein(torch.tensor(x), torch.tensor(y)), expected, rtol=1e-9)


@pytest.mark.parametrize(("mean", "sd"), [(0.0, 0.3), (0.6, 0.3), (0.0, 0.6), (0.0, 0.15)])
def test_distances_of_gaussians_are_those_in_closed_form(fitted, mean, sd):
    """W1 of a shift is the shift, of another width |sd - sd'| sqrt(2 / pi)."""
    trusted, judged = gaussian(fitted, 0.0, 0.3, 0), gaussian(fitted, mean, sd, 1)
    table = bnn.reference(judged, X[:5], against=trusted)
    row = table.loc["all"]
    w1 = mean if mean else abs(sd - 0.3) * math.sqrt(2 / math.pi)
    error = max(sd, 0.3) / math.sqrt(4_000)
    assert row["w1"] == pytest.approx(w1, abs=4 * error)
    assert row["w1_sd"] == pytest.approx(row["w1"] / 0.3, rel=0.05)
    assert row["sd_ratio"] == pytest.approx(sd / 0.3, rel=4 / math.sqrt(2 * 4_000) * 1.5)
    total = lambda s: math.hypot(s, NOISE)
    exact = normal_tv((0.0, total(0.3)), (mean, total(sd)))
    # 5 rows x 128 points, each with an sd of at most .25; and 1,000 draws in each density
    assert row["tv"] == pytest.approx(exact, abs=4 * 0.25 / math.sqrt(640) / 2 + 0.015)


def test_a_posterior_is_no_distance_from_itself(fitted):
    trusted = gaussian(fitted, 1.0, 0.3, 0, chains=4, draws=1_000)
    table = bnn.reference(trusted, against=trusted)
    assert (table[["tv", "w1", "w1_sd"]] == 0).all(axis=None)
    assert (table["sd_ratio"] == 1).all()
    other = gaussian(fitted, 1.0, 0.3, 7, chains=4, draws=1_000)
    again = bnn.reference(other, against=trusted)
    assert (again["w1"] < 2 * again["w1_floor"]).all()  # halves: sqrt 2 noisier than wholes
    assert (again["tv"] < 0.02).all()
    assert (again["tv_floor"] < 0.03).all()


def test_labels_by_their_probabilities():
    y = (X > 0).float()
    fitted = bnn.fit(labels, X, y, method=bnn.Laplace(steps=200, draws=500))
    sure = replace(fitted, draws={"w": torch.full((1, 500), 3.0)})
    turned = replace(fitted, draws={"w": torch.full((1, 500), -1.0)})
    x = torch.tensor([1.0, 2.0, -0.5])
    table = bnn.reference(sure, x, against=turned)
    p, q = torch.sigmoid(3 * x), torch.sigmoid(-x)
    assert table.loc["all", "tv"] == pytest.approx(float((p - q).abs().mean()), rel=1e-5)
    assert table.loc["all", "agreement"] == 0.0
    assert bnn.reference(sure, x, against=sure).loc["all", "agreement"] == 1.0


def test_regions_are_near_and_far_from_training_rows():
    """Two clusters: the gap between them is outside, as is what lies beyond."""
    x = torch.cat([torch.linspace(-2, -1, 50), torch.linspace(1, 2, 50)])
    fitted = bnn.fit(line, x, x, method=bnn.MAP(steps=50, draws=2))
    found = regions(fitted, (torch.tensor([-1.5, 1.99, 0.0, 3.0, -40.0]),))
    assert found["inside"].tolist() == [True, True, False, False, False]
    assert (found["outside"] == ~found["inside"]).all()
    assert found["all"].all()


def test_the_ratio_of_widths_is_told_by_region(fitted):
    """f = w x, of which one posterior doubles w's width: twice everywhere; rows are both kinds."""
    table = bnn.reference(gaussian(fitted, 0.0, 0.6, 0), against=gaussian(fitted, 0.0, 0.3, 1))
    assert list(table.index) == ["inside", "outside", "all"]
    assert table.loc["all", "rows"] == 80
    assert table.loc["inside", "rows"] + table.loc["outside", "rows"] == 80
    assert table["sd_ratio"].to_numpy() == pytest.approx(2.0, rel=0.06)


def test_rows_and_posteriors_without_variance():
    """f = w x does not vary at x = 0; a posterior of one draw nowhere, and infinitely too sure."""

    def through_zero(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            f = pyro.deterministic("f", w * x)
            pyro.sample("y", dist.Normal(f, NOISE), obs=y)

    x = torch.arange(-5.0, 6.0)
    fitted = bnn.fit(through_zero, x, x, method=bnn.Laplace(steps=50, draws=10))
    trusted, wide = gaussian(fitted, 1.0, 0.1, 0), gaussian(fitted, 1.0, 0.2, 0)
    row = bnn.reference(wide, x, against=trusted).loc["all"]
    assert row["sd_ratio"] == pytest.approx(2 ** (10 / 11), rel=1e-4)
    assert 0 < row["w1_sd"] < 1
    one = bnn.reference(replace(wide, draws={"w": torch.ones(1, 1)}), x, against=trusted)
    assert one.loc["all", "sd_ratio"] == 0
    assert one.loc["all", "w1_sd"] == pytest.approx(10 / 11 * math.sqrt(2 / math.pi), rel=0.05)


def test_mean_field_is_told_from_nuts(regression):
    """Too narrow by .62 in both weights, in f by what the inputs' correlation leaves of it."""
    data = regression.model, regression.x, regression.y
    trusted = bnn.fit(*data, method=bnn.NUTS(chains=4, draws=1_000))
    mean_field = bnn.fit(*data, method=bnn.Laplace(structure="diag", steps=300))
    full = bnn.fit(*data, method=bnn.Laplace(steps=300))
    close, far = (bnn.reference(each, against=trusted).loc["all"] for each in (full, mean_field))
    assert close["w1"] < 2.5 * close["w1_floor"] < far["w1"]
    x = default_rows(trusted)[0]
    exact, narrow = regression.cov, (1 / torch.linalg.inv(regression.cov).diagonal()).diag()
    ratio = ((x @ narrow * x).sum(1) / (x @ exact * x).sum(1)).sqrt().log().mean().exp()
    assert far["sd_ratio"] == pytest.approx(float(ratio), rel=0.08)
    assert close["sd_ratio"] == pytest.approx(1.0, rel=0.08)


def test_what_cannot_be_compared_is_refused(fitted):
    with pytest.raises(TypeError, match="Pass a posterior that you trust"):
        bnn.reference(fitted, against=None)
    with pytest.raises(bnn.DataError, match="shape"):
        bnn.reference(fitted, torch.ones(3, 2), against=fitted)
    sorted_out = bnn.fit(labels, X, (X > 0).float(), method=bnn.MAP(steps=50))
    with pytest.raises(bnn.DataError, match="different things"):
        bnn.reference(fitted, against=sorted_out)
    alone = replace(fitted, draws={"w": fitted.draws["w"][:1, :1]})
    with pytest.raises(bnn.DataError, match="one draw"):
        bnn.reference(fitted, against=alone)


def test_a_model_without_inputs_states_its_rows():
    """Poisson of a sure rate: the distance of two known laws, whatever the row."""

    def counts(y=None):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", 4):
            pyro.sample("y", dist.Poisson(rate), obs=y)

    fitted = bnn.fit(counts, torch.tensor([3, 1, 4, 2]), method=bnn.MAP(steps=50, draws=400))
    sure = lambda rate: replace(fitted, draws={"rate": torch.full((1, 400), rate)})
    table = bnn.reference(sure(2.0), against=sure(6.0))
    laws = [torch.distributions.Poisson(rate).log_prob(torch.arange(40.0)) for rate in (2.0, 6.0)]
    exact = float((laws[0].exp() - laws[1].exp()).abs().sum()) / 2
    assert table.loc["all", "rows"] == 4
    assert table.loc["all", "tv"] == pytest.approx(exact, abs=0.08)  # 256 values of y
    assert table.loc["all", "w1"] == pytest.approx(4.0, rel=1e-5)
