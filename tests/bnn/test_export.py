"""What ArviZ gets: groups, axes and labels, the same under both majors."""

import warnings

import arviz as az
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import bnn

pytestmark = pytest.mark.filterwarnings("ignore")  # ArviZ on few draws, the fits on few steps
TINY = bnn.SVI(steps=30, draws=40)  # ArviZ 1.x wants 25 draws for leave-one-out
X = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
Y = X[:, 0] - X[:, 1]
ALL = {
    "posterior", "posterior_predictive", "log_likelihood", "sample_stats", "prior",
    "prior_predictive", "observed_data", "constant_data",
}  # fmt: skip
PREDICTED = {"predictions", "predictions_constant_data"}


def by_hand(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    pyro.deterministic("twice", 2 * w)
    with pyro.plate("data", len(x)):
        f = pyro.deterministic("f", x @ w)
        pyro.sample("y", dist.Normal(f, 0.5), obs=y)


def two_outputs(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2, 2]).to_event(2))
    with pyro.plate("data", len(x)):
        f = pyro.deterministic("f", x @ w)
        pyro.sample("y", dist.Normal(f, 0.5).to_event(1), obs=y)


def labels(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
    with pyro.plate("data", len(x)):
        f = pyro.deterministic("f", x @ w)
        pyro.sample("y", dist.Categorical(logits=f), obs=y)


def with_local_sites(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        pyro.sample("y", dist.Normal(x @ w + z.sum(-1), 0.5), obs=y)


def without_inputs(y=None):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", 4):
        pyro.sample("count", dist.Poisson(rate), obs=y)


def without_plate(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    pyro.sample("y", dist.Normal(x @ w, 1.0).to_event(1), obs=y)


def site_named_like_the_input(x, y=None):
    w = pyro.sample("x", dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x.sum(1) * w.sum(), 1.0), obs=y)


def export(model, *data, rows=5, method=TINY):
    posterior = bnn.fit(model, *data, method=method)
    new = [X[:rows]] if isinstance(data[0], DataLoader) else [x[:rows] for x in data[:-1]]
    return posterior.to_arviz(predictions=posterior.predict(*new))


def axes(tree, group):
    return {str(k): v.dims[2:] for k, v in tree[group].data_vars.items()}


def groups(tree):
    names = tree.groups() if callable(tree.groups) else tree.children
    return {name.strip("/") for name in names} - {""}


def test_a_model_by_hand_gives_every_group():
    tree = export(by_hand, X, Y)
    assert groups(tree) == ALL | PREDICTED
    assert axes(tree, "posterior") == {"w": ("w_dim_0",), "twice": ("twice_dim_0",)}
    for group in ("posterior_predictive", "prior_predictive", "predictions"):
        assert axes(tree, group) == {"f": ("row",), "y": ("row",)}
    assert axes(tree, "log_likelihood") == {"y": ("row",)}
    assert tree["observed_data"]["y"].dims == ("row",)
    assert tree["predictions"]["y"].shape == (1, 40, 5)
    assert tree["constant_data"]["x"].dims == ("row", "x_column")
    np.testing.assert_array_equal(tree["predictions_constant_data"]["x"], X[:5])
    np.testing.assert_array_equal(tree["observed_data"]["y"], Y)
    np.testing.assert_allclose(tree["posterior"]["twice"], 2 * tree["posterior"]["w"], rtol=1e-6)
    assert list(tree["posterior"].coords["draw"].values) == list(range(40))


def test_dots_stay_in_the_names_of_a_net():
    tree = export(bnn.models.mlp_regression(2, hidden=(3,)), X, Y)
    name = "layers.0.weight"
    assert axes(tree, "posterior")[name] == axes(tree, "prior")[name]
    assert axes(tree, "posterior")[name] == (f"{name}_dim_0", f"{name}_dim_1")


def test_an_observation_of_two_numbers_has_one_likelihood():
    tree = export(two_outputs, X, torch.stack([Y, -Y], 1))
    assert tree["log_likelihood"]["y"].dims == ("chain", "draw", "row")
    assert tree["observed_data"]["y"].dims == ("row", "y_dim_1")
    assert axes(tree, "predictions") == {"f": ("row", "f_dim_1"), "y": ("row", "y_dim_1")}
    assert len(tree["posterior"].data_vars) == 1


def test_labels_stay_whole_numbers():
    tree = export(labels, X, torch.arange(12) % 3)
    assert axes(tree, "posterior_predictive") == {"f": ("row", "f_dim_1"), "y": ("row",)}
    assert tree["posterior_predictive"]["y"].dtype.kind == "i"
    assert set(np.unique(tree["observed_data"]["y"])) == {0, 1, 2}


def test_local_sites_lie_along_the_rows():
    tree = export(with_local_sites, X, Y)
    for group in ("posterior", "prior"):
        assert axes(tree, group) == {"w": ("w_dim_0",), "z": ("row", "z_dim_1")}
        assert tree[group].sizes["row"] == 12


def test_columns_keep_their_names():
    frame = pd.DataFrame(X.numpy(), columns=["age", "bmi"])
    tree = export(by_hand, frame, pd.Series(Y.numpy()))
    for group in ("constant_data", "predictions_constant_data"):
        assert list(tree[group].coords["x_column"].values) == ["age", "bmi"]
        np.testing.assert_array_equal(tree[group]["x"].sel(x_column="bmi")[:5], X[:5, 1])


def test_axes_have_the_names_and_labels_that_the_user_gives():
    posterior = bnn.fit(by_hand, pd.DataFrame(X.numpy(), columns=["age", "bmi"]), Y, method=TINY)
    tree = posterior.to_arviz(
        dims={"w": ["x_column"], "twice": ["side"]}, coords={"side": ["left", "right"]}
    )
    for group in ("posterior", "prior"):
        assert axes(tree, group)["w"] == ("x_column",)
        assert list(tree[group].coords["x_column"].values) == ["age", "bmi"]
    assert list(tree["posterior"].coords["side"].values) == ["left", "right"]
    w = tree["posterior"]["w"].sel(x_column="bmi")
    np.testing.assert_array_equal(w, posterior.draws["w"][..., 1])
    for wrong in ({"v": ["a"]}, {"w": ["a", "b"]}, {"w": "a"}):
        with pytest.raises(bnn.DataError, match=r'"w" has 1, "twice" has 1'):
            posterior.to_arviz(dims=wrong)
    with pytest.raises(bnn.DataError, match=r'coords\["side"\] has 3 labels.*"twice" has 2'):
        posterior.to_arviz(dims={"twice": ["side"]}, coords={"side": "abc"})


def test_a_model_without_inputs_has_no_constant_data():
    tree = export(without_inputs, [3, 1, 4, 2])
    assert groups(tree) == ALL - {"constant_data"} | {"predictions"}
    assert axes(tree, "posterior_predictive") == {"f": ("row",), "count": ("row",)}


def test_rows_that_are_one_statement_have_no_likelihood():
    tree = export(without_plate, X, Y)
    assert groups(tree) == (ALL | PREDICTED) - {"log_likelihood"}


def test_rows_from_a_loader_are_not_kept():
    tree = export(by_hand, DataLoader(TensorDataset(X, Y), batch_size=4))
    assert groups(tree) == {"posterior", "sample_stats", "prior"} | PREDICTED


def test_a_site_may_be_named_like_an_input():
    tree = export(site_named_like_the_input, X, Y)
    assert axes(tree, "posterior") == {"x": ("x_dim_0", "x_dim_1")}
    assert tree["constant_data"]["x"].dims == ("row", "x_column")


@pytest.mark.parametrize("method", [TINY, bnn.NUTS(chains=2, warmup=20, draws=30)], ids=repr)
def test_a_netcdf_file_keeps_everything(method, tmp_path):
    tree = export(by_hand, X, Y, method=method)
    tree.to_netcdf(tmp_path / "posterior.nc")
    again = az.from_netcdf(tmp_path / "posterior.nc")
    assert groups(again) == groups(tree) >= ALL
    noted = {"log_q"} if isinstance(method, bnn.SVI) else {"diverging", "energy", "tree_depth"}
    assert noted <= set(axes(again, "sample_stats"))
    for group in groups(tree):
        for name, values in tree[group].data_vars.items():
            assert again[group][name].dims == values.dims
            np.testing.assert_array_equal(again[group][name], values)
    assert again.attrs["method"] == repr(method)
    assert again.attrs["inference_library"] == "bnn"


def test_arviz_reads_it():
    tree = export(by_hand, X, Y)
    assert list(az.summary(tree).index) == ["w[0]", "w[1]", "twice[0]", "twice[1]"]
    assert np.isfinite(az.loo(tree).se)
    assert len(az.summary(tree, group="prior")) == 2


def test_nothing_is_warned_about():
    posterior = bnn.fit(by_hand, X, Y, method=TINY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior.to_arviz(predictions=posterior.predict(X))
