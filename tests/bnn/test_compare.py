"""The table's numbers against the same numbers by hand."""

import math
import sys
import warnings

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import bnn
from bnn.export import loo

pytestmark = pytest.mark.filterwarnings("ignore::bnn.errors.ConvergenceWarning")
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(30, 2, generator=GENERATOR)
Y = X[:, 0] - X[:, 1] + 0.5 * torch.randn(30, generator=GENERATOR)
HELD_OUT = X[:8] + 0.1, Y[:8]


def model(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def labelled(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Categorical(logits=x @ w), obs=y)


@pytest.fixture(scope="module")
def fits():
    with pytest.warns(bnn.ConvergenceWarning):
        return {
            "few": bnn.fit(model, X, Y, method=bnn.SVI(steps=30, draws=50)),
            "many": bnn.fit(model, X, Y, method=bnn.SVI(steps=400, draws=200)),
        }


def test_one_held_out_row_has_a_score_and_no_error_of_it(fits):
    table = bnn.compare(fits, data=(X[:1], Y[:1]))
    assert table["log_score_se"].isna().all()
    assert table["log_score"].notna().all()


def test_held_out_columns_are_those_computed_by_hand(fits):
    table = bnn.compare(fits, data=HELD_OUT)
    x, y = HELD_OUT
    assert table.index.name == "held out"
    assert [name for name in table.columns if name != "not_comparable"] == [
        "log_score", "log_score_se", "rmse", "coverage_90", "coverage_error", "loo", "loo_se",
        "high_k", "max_k", "elbo", "seconds"
    ]  # fmt: skip
    for name, posterior in fits.items():
        f = posterior.draws["w"][0] @ x.T  # (draw, row)
        score = dist.Normal(f, 0.5).log_prob(y).double().exp().mean(0).log()
        row = table.loc[name]
        assert row["log_score"] == pytest.approx(score.mean().item(), abs=1e-4)
        assert row["log_score_se"] == pytest.approx(score.std().item() / math.sqrt(8), abs=1e-4)
        assert row["rmse"] == pytest.approx((f.mean(0) - y).square().mean().sqrt().item(), rel=1e-4)
        lower, upper = np.quantile(posterior.predict(x).outcomes[0], [0.05, 0.95], axis=0)
        inside = (y.numpy() >= lower) & (y.numpy() <= upper)
        assert row["coverage_90"] == pytest.approx(inside.mean())
        levels = np.linspace(0.05, 0.95, 19)
        ends = np.stack([(1 - levels) / 2, (1 + levels) / 2])
        lower, upper = np.quantile(posterior.predict(x).outcomes[0], ends, axis=0)  # (level, row)
        observed = ((y.numpy() >= lower) & (y.numpy() <= upper)).mean(1)
        assert row["coverage_error"] == pytest.approx(np.abs(observed - levels).mean(), abs=1e-6)
        assert row["elbo"] == posterior.elbo
        assert row["seconds"] == posterior.seconds
    assert "elbo" not in table.attrs["not_comparable"]  # one model, method and data


def test_the_best_log_score_comes_first(fits):
    for data in (HELD_OUT, (X, Y)):
        assert list(bnn.compare(fits, data=data).index) == ["many", "few"]


@pytest.mark.filterwarnings("ignore")
def test_without_data_the_score_is_arvizs_leave_one_out(fits):
    table = bnn.compare(fits)
    assert table.index.name == "leave one out"
    for name, posterior in fits.items():
        loo = az.loo(posterior.to_arviz(), pointwise=True)
        elpd = float(getattr(loo, "elpd", None) or loo.elpd_loo)
        assert table.loc[name, "log_score"] == pytest.approx(elpd / 30, rel=1e-6)
        assert table.loc[name, "log_score_se"] == pytest.approx(loo.se / 30, rel=1e-6)
        assert table.loc[name, "high_k"] == int((loo.pareto_k > 0.7).sum())
        assert table.loc[name, "max_k"] == pytest.approx(float(loo.pareto_k.max()))


@pytest.mark.filterwarnings("ignore::bnn.errors.ApproximationWarning")
def test_leave_one_out_agrees_with_leaving_one_out():
    """The posterior without row i is Gaussian in closed form."""
    posterior = bnn.fit(model, X, Y, method=bnn.NUTS(chains=2, warmup=200, draws=300))
    total = 0.0
    for i in range(30):
        rest = torch.arange(30) != i
        precision = torch.eye(2) + X[rest].T @ X[rest] / 0.25
        mean = torch.linalg.solve(precision, X[rest].T @ Y[rest] / 0.25)
        variance = X[i] @ torch.linalg.solve(precision, X[i]) + 0.25
        total += dist.Normal(X[i] @ mean, variance.sqrt()).log_prob(Y[i]).item()
    table = bnn.compare({"nuts": posterior})
    assert table.loc["nuts", "log_score"] == pytest.approx(total / 30, abs=0.02)


def test_held_out_and_leave_one_out_stand_in_one_table(fits):
    beside, alone = bnn.compare(fits, data=HELD_OUT), None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = bnn.compare(fits)
    for name in fits:
        assert beside.loc[name, "loo"] == alone.loc[name, "log_score"]
        assert beside.loc[name, "loo_se"] == alone.loc[name, "log_score_se"]
        assert beside.loc[name, "high_k"] == alone.loc[name, "high_k"]
        assert beside.loc[name, "max_k"] == alone.loc[name, "max_k"]


@pytest.mark.parametrize("inputs", [True, False])
def test_leave_one_out_of_many_rows_is_told_from_some(inputs, monkeypatch):
    def constant(y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 30):
            pyro.sample("y", dist.Normal(w, 0.5), obs=y)

    program, data = (model, (X, Y)) if inputs else (constant, (Y,))
    posterior = bnn.fit(program, *data, method=bnn.Laplace(steps=300, draws=200))
    k = loo(posterior)[2]
    some = torch.linspace(0, 29, 7).round().long()
    flat = posterior.log_likelihood().flatten(0, 1).double()[:, some]
    plain = math.log(len(flat)) - (-flat).logsumexp(0)  # k is small: smoothing moves it little
    few, error, of_few = loo(posterior, 7)
    assert of_few == pytest.approx(k[some.numpy()], abs=1e-3)
    assert few == pytest.approx(float(plain.mean()), abs=0.01)
    assert error == pytest.approx(float(plain.std(correction=0)) / math.sqrt(7), abs=0.01)
    monkeypatch.setattr(sys.modules["bnn.compare"], "_LOO_ROWS", 7)
    table = bnn.compare({"one": posterior}, data=data)
    assert table.loc["one", "loo"] == few
    assert table.attrs["notes"]["loo"] == "of 7 training rows, evenly spread over up to 30"
    assert "loo: of 7 training rows" in str(table)


def test_the_table_says_where_there_is_no_leave_one_out(fits):
    rows = torch.utils.data.TensorDataset(X, Y)
    loader = torch.utils.data.DataLoader(rows, batch_size=10, shuffle=True)
    streamed = bnn.fit(model, loader, method=bnn.SVI(steps=50, draws=50))
    table = bnn.compare({"streamed": streamed}, data=HELD_OUT)
    assert "loo" not in table
    assert table.attrs["notes"]["loo"].startswith("none. The training rows came from a loader")
    assert "loo: none" in str(table)
    assert "loo: none" in table._repr_html_()
    table = bnn.compare(fits | {"streamed": streamed}, data=HELD_OUT)
    assert math.isnan(table.loc["streamed", "loo"])
    assert "loo" in table.loc["streamed", "not_comparable"].split(", ")
    assert 'none of "streamed": The training rows' in table.attrs["not_comparable"]["loo"]
    half = bnn.fit(model, X[:15], Y[:15], method=bnn.SVI(steps=50, draws=50))
    table = bnn.compare(fits | {"half": half}, data=HELD_OUT)
    assert "which differ" in table.attrs["not_comparable"]["loo"]
    assert all("loo" in marked.split(", ") for marked in table["not_comparable"])


def test_a_mode_has_no_leave_one_out_and_the_table_says_so():
    mode = bnn.fit(model, X, Y, method=bnn.MAP(steps=300, draws=40))
    with pytest.warns(bnn.ApproximationWarning, match="rests on 30 of 30 rows"):
        table = bnn.compare({"mode": mode})
    inside = mode.log_score(X, Y).double().mean().item()
    assert table.loc["mode", "log_score"] == pytest.approx(inside, abs=1e-4)
    assert table.loc["mode", "high_k"] == 30


def test_labels_are_scored_by_accuracy():
    y = (X[:, 0] > 0).long()
    posterior = bnn.fit(labelled, X, y, method=bnn.SVI(steps=200, draws=50))
    table = bnn.compare({"labels": posterior}, data=(X, y))
    right = posterior.predict(X).probs.argmax(-1) == y
    assert table.loc["labels", "accuracy"] == pytest.approx(right.double().mean().item())
    stated = posterior.predict(X).probs
    expected = bnn.calibration.ece(stated, y)
    assert table.loc["labels", "ece"] == pytest.approx(expected)
    assert "rmse" not in table
    ordered, order = stated.sort(-1, descending=True)
    inside = [
        int(truth) in row[: int((some.cumsum(0) < 0.9).sum()) + 1].tolist()
        for truth, row, some in zip(y, order, ordered, strict=True)
    ]
    assert table.loc["labels", "coverage_90"] == pytest.approx(np.mean(inside))


def test_labels_of_every_place_of_a_row_are_scored():
    def places(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
        with pyro.plate("data", len(x)):
            logits = torch.stack([x @ w, -x @ w], 1)  # (row, place, class)
            pyro.sample("y", dist.Categorical(logits=logits).to_event(1), obs=y)

    y = torch.stack([(X[:, 0] > 0).long(), (X[:, 1] > 0).long()], 1)
    posterior = bnn.fit(places, X, y, method=bnn.SVI(steps=50, draws=20))
    table = bnn.compare({"places": posterior}, data=(X, y))
    probs = posterior.predict(X).probs
    expected = bnn.calibration.ece(probs.flatten(0, 1), y.flatten())
    assert table.loc["places", "ece"] == pytest.approx(expected)


def test_the_table_says_where_a_column_does_not_compare(fits):
    """In print, by row; the reasons in attrs."""

    def other(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    laplace = bnn.Laplace(steps=200, draws=50)
    several = fits | {
        "wide": bnn.fit(other, X, Y, method=bnn.SVI(steps=400, draws=200)),
        "half": bnn.fit(model, X[:15], Y[:15], method=laplace),
        "all": bnn.fit(model, X, Y, method=laplace),
        "mode": bnn.fit(model, X, Y, method=bnn.MAP(steps=200, draws=10)),
    }
    table = bnn.compare(several, data=HELD_OUT)
    assert dict(table["not_comparable"]) == {
        "few": "loo, elbo", "many": "loo, elbo", "wide": "loo, elbo", "half": "loo, log_evidence",
        "all": "loo, log_evidence", "mode": "loo",
    }  # fmt: skip
    assert table.attrs["not_comparable"] == {
        "loo": "rests on rows with k > 0.7, and is likely too good; of the rows of each fit, which "
        "differ",
        "elbo": "bounds with gaps of their own: they differ in model",
        "log_evidence": "evidence of other data: they differ in observations, inputs",
    }
    assert "log_evidence" in str(table)
    del several["half"]
    table = bnn.compare(several | {"other": several["all"]}, data=HELD_OUT)
    assert "log_evidence" not in table.attrs["not_comparable"]


def counted(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Poisson((x @ w).exp()), obs=y)


@pytest.mark.filterwarnings("ignore::bnn.errors.DataWarning")
def test_probabilities_of_counts_and_labels_do_not_compare_with_densities():
    y = (X[:, 0] > 0).float()
    method = bnn.SVI(steps=200, draws=100)
    numbers, counts = (bnn.fit(each, X, y, method=method) for each in (model, counted))
    binary = bnn.fit(binary_model, X, y, method=method)
    table = bnn.compare({"numbers": numbers, "counts": counts}, data=(X, y))
    assert "probability" in table.attrs["not_comparable"]["log_score"]
    assert "coverage_90" not in table.attrs["not_comparable"]
    assert all("log_score" in marked.split(", ") for marked in table["not_comparable"])
    table = bnn.compare({"counts": counts, "labels": binary}, data=(X, y))
    assert "log_score" not in table.attrs["not_comparable"]
    assert "sets of labels" in table.attrs["not_comparable"]["coverage_90"]
    table = bnn.compare({"labels": binary, "the same": binary}, data=(X, y))
    assert {"log_score", "coverage_90"}.isdisjoint(table.attrs["not_comparable"])


def binary_model(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


@pytest.mark.filterwarnings("ignore::bnn.errors.DataWarning")
def test_large_numbers_are_no_counts():
    """Every float32 above 2^23 is whole."""

    def near(x, y=None, sd=1e5):
        a = pyro.sample("a", dist.Normal(9e6, 1e6))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(a.expand(len(x)), sd), obs=y)

    y = 9e6 + 1e5 * torch.randn(20, generator=torch.Generator().manual_seed(0))
    wide = lambda x, y=None: near(x, y, sd=1e6)
    method = bnn.Laplace(steps=300, draws=100)
    fits = {k: bnn.fit(m, X[:20], y, method=method) for k, m in (("a", near), ("b", wide))}
    assert "log_score" not in bnn.compare(fits, data=(X[:20], y)).attrs["not_comparable"]


def test_the_right_model_of_counts_has_the_least_coverage_error():
    x = torch.zeros(400, 2)
    y = torch.poisson(torch.full((400,), 0.3), generator=torch.Generator().manual_seed(0))

    def rate(x, y=None, shift=0.0):
        a = pyro.sample("a", dist.Normal(math.log(0.3), 0.01))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Poisson((a + shift).exp().expand(len(x))), obs=y)

    method = bnn.SVI(steps=100, draws=400)
    right = bnn.fit(rate, x, y, method=method)
    high = bnn.fit(lambda x, y=None: rate(x, y, shift=2.0), x, y, method=method)
    error = bnn.compare({"right": right, "high": high}, data=(x, y))["coverage_error"]
    assert error["right"] < 0.03 < 0.1 < error["high"]


def test_evidence_of_masks_is_not_that_of_weights():
    net = bnn.models.mlp_regression(2, (4,))
    fits = {
        "laplace": bnn.fit(net, X, Y, method=bnn.Laplace(steps=800, draws=50)),
        "masks": bnn.fit(net, X, Y, method=bnn.GFlowOut(steps=100, draws=50)),
    }
    table = bnn.compare(fits | {"more masks": fits["masks"]}, data=HELD_OUT)
    assert "what the method adds" in table.attrs["not_comparable"]["log_evidence"]
    assert all("log_evidence" in marked.split(", ") for marked in table["not_comparable"])
    again = bnn.fit(net, X, Y, method=bnn.GFlowOut(steps=100, draws=50), seed=1)
    table = bnn.compare({"one": fits["masks"], "two": again}, data=HELD_OUT)
    assert "log_evidence" not in table.attrs["not_comparable"]


@pytest.mark.filterwarnings("ignore::bnn.errors.ApproximationWarning")
def test_leave_one_out_says_what_is_in_sample(fits):
    mode = bnn.fit(model, X, Y, method=bnn.MAP(steps=200, draws=10))
    table = bnn.compare({"many": fits["many"], "mode": mode})
    inside = "rmse, coverage_90, coverage_error"
    assert table.loc["mode", "not_comparable"] == f"log_score, {inside}"
    assert table.loc["many", "not_comparable"] == inside
    assert "in-sample" in table.attrs["not_comparable"]["rmse"]


def test_other_observations_need_held_out_data(fits):
    other = bnn.fit(model, X, Y + 1, method=bnn.SVI(steps=30, draws=50))
    with pytest.raises(bnn.DataError, match="different observations"):
        bnn.compare(fits | {"other": other})
    assert len(bnn.compare(fits | {"other": other}, data=HELD_OUT)) == 3


@pytest.mark.parametrize(
    ("data", "kind", "match"),
    [
        ((X[:0], Y[:0]), bnn.DataError, "no rows"),
        ((X[0], Y[0]), bnn.DataError, "shape"),
        ((X[:3], Y[:2]), bnn.DataError, "rows"),
        ((X, Y[:, None]), bnn.DataError, "shape"),
        ((X,), bnn.DataError, "Got 1 arguments"),
        ((), bnn.DataError, "Got 0 arguments"),
        (X, TypeError, r"Pass \(x_test, y_test\)"),
        (3.0, TypeError, r"Pass \(x_test, y_test\)"),
    ],
    ids=["empty", "one row", "lengths", "column", "no y", "nothing", "tensor", "number"],
)
def test_held_out_data_of_another_form_are_refused(fits, data, kind, match):
    with pytest.raises(kind, match=match):
        bnn.compare(fits, data=data)


def test_posteriors_come_by_name(fits):
    with pytest.raises(bnn.DataError, match="no posteriors"):
        bnn.compare({})
    with pytest.raises(TypeError, match=r'Pass \{"name": posterior'):
        bnn.compare(fits["few"])
    with pytest.raises(TypeError, match=r'Pass \{"name": posterior'):
        bnn.compare(list(fits.values()))
