import math
import pickle
import warnings

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from pyro import poutine
from scipy import stats

import bnn
from bnn.handlers import At, Score
from bnn.models import (
    MLP,
    likelihoods,
    linear,
    mlp_classification,
    mlp_regression,
    priors,
    supervised,
)


def nodes(model, *args):
    return poutine.trace(model).get_trace(*args).nodes


def test_mlp_announces_its_hidden_layers():
    net, x = MLP(3, (5, 4), 2, activation="relu"), torch.randn(6, 3)
    found = nodes(net, x)
    first = torch.relu(net.layers[0](x))
    torch.testing.assert_close(found["hidden.0"]["value"], first)
    torch.testing.assert_close(found["hidden.1"]["value"], torch.relu(net.layers[1](first)))
    assert found["hidden.1"]["fn"].event_dim == 1
    assert [k for k, _ in net.named_parameters()] == [
        f"layers.{i}.{k}" for i in range(3) for k in ("weight", "bias")
    ]


def test_mlp_is_an_ordinary_module_outside_pyro():
    net = MLP(3, (5,), activation=torch.nn.Tanh())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert net(torch.randn(6, 3)).shape == (6, 1)
        assert net(torch.randn(6, 7, 3)).shape == (6, 7, 1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"hidden": 50}, TypeError, r"such as \(50,\)"),
        ({"hidden": (0,)}, ValueError, "every width"),
        ({"inputs": 2.0}, ValueError, "every width"),
        ({"activation": "tahn"}, ValueError, "'tanh'"),
    ],
)
def test_mlp_refuses(options, error, message):
    with pytest.raises(error, match=message):
        MLP(**({"inputs": 3} | options))


def test_linear_matches_the_hand_computation():
    model, x = linear(2), torch.tensor([[1.0, 2.0], [0.0, -1.0]])
    y = torch.tensor([3.0, 0.5])
    at = {
        "layers.0.weight": torch.tensor([[0.5, -1.0]]),
        "layers.0.bias": torch.tensor([0.25]),
        "sigma": torch.tensor(2.0),
    }
    with Score() as score, At(at):
        model(x, y)
    f = np.array([-1.25, 1.25])
    assert float(score.likelihood) == pytest.approx(stats.norm.logpdf(y, f, 2.0).sum(), rel=1e-6)
    weights = stats.norm.logpdf([0.5, -1.0], scale=math.sqrt(0.5)).sum()
    expected = weights + stats.norm.logpdf(0.25) + stats.halfnorm.logpdf(2.0)
    assert float(score.prior) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor, pd.DataFrame, np.ndarray.tolist])
def test_standardize_keeps_the_users_units(kind):
    x = np.array([[1.0, 200.0], [3.0, 500.0], [8.0, -100.0], [2.0, 100.0]])
    y = np.array([1000.0, 3000.0, 2500.0, 700.0])
    model = linear(2, standardize=(kind(x), y))
    weight, bias, sigma = np.array([0.5, -1.0]), 0.25, 400.0
    at = {
        "layers.0.weight": torch.tensor([[0.5, -1.0]]),
        "layers.0.bias": torch.tensor([bias]),
        "sigma": torch.tensor(sigma),
    }
    with At(at), Score() as score:
        model(torch.tensor(x).float(), torch.tensor(y).float())
    f = y.mean() + y.std() * (((x - x.mean(0)) / x.std(0)) @ weight + bias)
    expected = stats.norm.logpdf(y, f, sigma).sum()
    assert float(score.likelihood) == pytest.approx(expected, rel=1e-5)
    with At(at):
        found = nodes(model, torch.tensor(x).float())
    torch.testing.assert_close(found["f"]["value"], torch.tensor(f).float())
    assert float(found["sigma"]["fn"].scale) == pytest.approx(y.std())


def test_standardize_scales_each_target_and_not_its_predicted_noise():
    x, y = np.random.default_rng(0).normal(size=(2, 20, 3))
    y = y[:, :2] * [1.0, 1000.0] + [5.0, -40.0]
    likelihood = likelihoods.StudentT(scale="predicted")
    model = mlp_regression(3, (4,), outputs=2, likelihood=likelihood, standardize=(x, y))
    zero = {k: torch.zeros_like(v) for k, v in model.net.named_parameters()}
    with At(zero):
        found = nodes(model, torch.tensor(x).float())
    torch.testing.assert_close(found["f"]["value"][0], torch.tensor(y.mean(0)).float())
    sd = found["y"]["fn"].variance.sqrt()[0]
    torch.testing.assert_close(sd, torch.tensor(y.std(0) * (math.log(2) + 1e-6)).float())


def test_standardize_takes_whole_numbers_and_float64():
    x = np.array([[1], [2], [6]])
    model = linear(1, standardize=x)
    assert nodes(model, torch.tensor(x))["f"]["value"].dtype == torch.float32
    assert model.x.standardized(torch.tensor(x).double()).dtype == torch.float64


def test_a_constant_column_is_named_and_keeps_unit_1():
    x = pd.DataFrame({"age": [1.0, 2.0, 3.0], "site": [0.1, 0.1, 0.1]})
    with pytest.warns(UserWarning, match="column 'site' of x is constant") as caught:
        model = mlp_classification(2, 3, standardize=x)
    assert caught[0].filename == __file__
    assert model.x.sd.tolist() == [pytest.approx(math.sqrt(2 / 3)), 1.0]
    with pytest.warns(UserWarning, match="column 1 of x") as caught:
        mlp_regression(2, standardize=x.to_numpy())
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="column 0 of y"):
        linear(2, standardize=(np.eye(3)[:, :2], np.ones(3)))


def test_one_row_has_unit_1():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = mlp_regression(2, standardize=(np.array([[5.0, 7.0]]), [3.0]))
    assert model.x.sd.tolist() == [1.0, 1.0]
    assert float(model.unit) == 1.0
    assert model.y.mean.tolist() == [3.0]


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (np.ones((4, 3)), ValueError, r"has shape \(4, 3\), and the model has 2 columns"),
        (np.ones((0, 2)), ValueError, "at least one row"),
        (np.array([[1.0, np.nan]]), ValueError, "NaN"),
        ([["a", "b"]], TypeError, "cannot become numbers"),
        (pd.DataFrame({"a": ["x"], "b": [1]}), TypeError, "cannot become numbers"),
    ],
)
def test_standardize_refuses(data, error, message):
    with pytest.raises(error, match=message):
        linear(2, standardize=data)


def test_counts_have_no_other_unit():
    with pytest.raises(ValueError, match=r"Poisson\(\).*standardize=x"):
        linear(2, likelihood=likelihoods.Poisson(), standardize=(np.eye(2), np.ones(2)))


def test_several_targets_have_a_noise_each():
    found = nodes(mlp_regression(3, (4,), outputs=2), torch.randn(5, 3))
    assert found["sigma"]["value"].shape == (2,)
    assert found["y"]["value"].shape == (5, 2)
    shared = supervised(MLP(3, (4,), 2), likelihoods.Gaussian())
    assert nodes(shared, torch.randn(5, 3))["sigma"]["value"].shape == ()


def test_two_classes_have_two_logits():
    found = nodes(mlp_classification(3, 2, (4,)), torch.randn(5, 3))
    assert found["f"]["value"].shape == (5, 2)
    assert found["y"]["value"].shape == (5,)


def test_prior_reaches_every_weight():
    found = nodes(mlp_regression(3, (4,), prior=priors.Laplace()), torch.randn(5, 3))
    assert isinstance(found["layers.1.weight"]["fn"].base_dist, pyro.distributions.Laplace)


@pytest.mark.parametrize(
    "build",
    [
        lambda x, y: linear(3, standardize=(x, y)),
        lambda x, y: mlp_regression(3, (4, 4), activation="gelu", standardize=(x, y)),
        lambda x, y: mlp_classification(3, 3, standardize=x),
    ],
)
def test_ready_models_pickle_and_take_no_part_of_training(build):
    x, y = torch.randn(10, 3), torch.randn(10)
    model = build(x, y)
    again = pickle.loads(pickle.dumps(model))
    drawn = []
    for each in (model, again):
        pyro.set_rng_seed(1)
        drawn.append(nodes(each, x)["y"]["value"])
    assert torch.equal(*drawn)


@pytest.mark.parametrize("net", [torch.nn.ReLU, None, lambda x: x])
def test_supervised_refuses_what_is_no_net(net):
    with pytest.raises(TypeError, match=r"Pass a torch\.nn\.Module"):
        supervised(net, likelihoods.Gaussian())


@pytest.mark.parametrize("likelihood", [likelihoods.Gaussian, None, "gaussian"])
def test_supervised_refuses_what_is_no_likelihood(likelihood):
    with pytest.raises(TypeError, match="Pass an instance"):
        supervised(MLP(3), likelihood)


def test_nuts_on_a_standardised_linear_model_finds_least_squares():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 2)) * [10.0, 0.1] + [50.0, 3.0]
    y = 1000 + x @ [20.0, 500.0] + 30 * rng.normal(size=200)
    model = linear(2, standardize=(x, y))
    method = bnn.NUTS(chains=2, draws=300, warmup=300)
    posterior = bnn.fit(model, x, y, method=method, progress=False)
    prediction = posterior.predict(x)
    design = np.column_stack([np.ones(200), x])
    coefficients, residual, *_ = np.linalg.lstsq(design, y, rcond=None)
    error = prediction.mean.numpy() - design @ coefficients
    assert np.abs(error).max() < 8  # 30 / sqrt(200) = 2.1 is the posterior sd at the centre
    sigma = posterior.draws["sigma"].mean()
    assert float(sigma) == pytest.approx(math.sqrt(residual[0] / 197), rel=0.05)
