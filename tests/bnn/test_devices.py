"""Devices: tensors go where they are told. "meta" has shapes only, and mixes with no other."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import bnn
from bnn import data, devices
from bnn.arguments import read
from bnn.data import like
from bnn.handlers import quiet_pyro
from bnn.inference import _elbo
from bnn.inference._elbo import Bound
from bnn.inference._energy import Energy
from bnn.inference._guide import FAMILIES
from bnn.models import mlp_classification, mlp_regression

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(40, 2, generator=GENERATOR)
Y = X[:, 0] - X[:, 1]
LABELS = (Y > 0).long()
META = torch.device("meta")
gpu = pytest.mark.skipif(not torch.accelerator.is_available(), reason="there is no accelerator")


def careless(x, y=None):
    """Makes tensors without a word of the device."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        f = pyro.deterministic("f", x @ w + torch.zeros(len(x)))
        pyro.sample("y", dist.Normal(f, sigma), obs=y)


MODELS = {
    "careless": (careless, Y),
    "regression": (mlp_regression(2, (4,)), Y),
    "units": (mlp_regression(2, (4,), standardize=(X, Y)), Y),
    "standardized": (bnn.standardize(careless, X, Y), Y),
    "labels": (mlp_classification(2, 3, (4,)), LABELS),
}


def fit(kind, **more):
    model, y = MODELS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = {"method": bnn.SVI(steps=20, draws=30), "progress": False} | more
        return bnn.fit(model, X, y, **settings)


@pytest.fixture
def shapes_only(monkeypatch):
    """What looks at numbers, which "meta" has not."""
    monkeypatch.setattr(torch, "normal", lambda loc, scale: loc + scale)
    monkeypatch.setattr(data, "_check_finite", lambda *args: None)
    monkeypatch.setattr(_elbo, "_known_priors", lambda *args: set())


@pytest.mark.usefixtures("shapes_only")
@pytest.mark.parametrize("kind", MODELS)
def test_a_prediction_lies_where_its_posterior_does(kind):
    posterior = fit(kind)
    moved = posterior.to("meta")
    assert (posterior.device.type, moved.device.type) == ("cpu", "meta")
    prediction = moved.predict(X.to("meta"))
    for name in ("f", "y", "mean", "aleatoric", "epistemic", "probs"):
        there, here = getattr(prediction, name), getattr(posterior.predict(X), name)
        assert (there is here is None) or (there.device == META and there.shape == here.shape)
    assert moved.log_likelihood().device == META
    for each in (prediction, moved.predict(iter([(X[:30],), (X[30:],)]))):
        assert [end.device for end in each.interval(0.9)] == [META, META]


@pytest.mark.usefixtures("shapes_only")
@pytest.mark.parametrize("kind", MODELS)
def test_a_bound_and_its_gradient_lie_where_the_data_do(kind):
    posterior = fit(kind)
    model, _ = MODELS[kind]
    rows = posterior.to("meta").data
    with devices.on(META), quiet_pyro():
        energy = Energy(model, rows, posterior.sites)
        family = FAMILIES["normal"](torch.zeros(energy.size), torch.ones(energy.size))
        bound = Bound(energy, family, posterior.sites, particles=2)
        tensors = {f"guide.{k}": v.requires_grad_() for k, v in family.tensors.items()}
        value = bound.at(tensors, rows.tensors, torch.ones(()), bound.noise(rows.tensors))
        slopes = torch.autograd.grad(value, list(tensors.values()))
    assert value.device == META
    assert all(slope.device == META for slope in slopes)


def test_repeated_modes_take_no_memory_elsewhere_either():
    posterior = fit("careless", method=bnn.MAP(steps=5, draws=1_000))
    assert posterior.to("meta").draws["w"].stride(1) == 0


def test_data_and_later_batches_go_to_the_device():
    loader = DataLoader(TensorDataset(X, Y), 8)
    for given in ((X, Y), (loader,)):
        made = read(careless, given, device=META)
        assert all(tensor.device == META for tensor in made.tensors)
    assert like((X.double(),), (X.to("meta"),))[0].device == META


def test_the_cpu_is_a_device_like_any_other(tmp_path):
    plain, told = fit("careless"), fit("careless", device="cpu")
    assert torch.equal(plain.draws["w"], told.draws["w"])
    told.save(tmp_path / "fit")
    loaded = bnn.load(tmp_path / "fit", careless, device=torch.device("cpu"))
    assert torch.equal(loaded.predict(X).y, plain.predict(X).y)


@pytest.mark.parametrize(
    ("device", "says"),
    [
        ("gpu", "'gpu', which torch does not know"),
        (3.5, "3.5, which torch does not know"),
        ("meta", "no numbers. Fit on 'cpu'"),
        ("hpu", "no device 'hpu' here"),
    ],
)
def test_a_device_that_cannot_compute_is_refused(device, says, tmp_path):
    with pytest.raises(bnn.DataError, match=says):
        fit("careless", device=device)
    with pytest.raises(bnn.DataError, match=says):
        bnn.load(tmp_path / "fit", careless, device=device)


def test_a_device_without_float64_says_so(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert devices.checked("mps") == torch.device("mps")
    with pytest.raises(bnn.DataError, match="no device 'mps:1'"):
        devices.checked("mps:1")
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(bnn.DataError, match="no float64"):
            devices.checked("mps")
    finally:
        torch.set_default_dtype(torch.float32)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize(
    "method",
    [
        bnn.SVI(steps=300, draws=50),
        bnn.SVI(steps=300, draws=50, batch_size=10, guide="full_rank"),
        bnn.MAP(steps=300, restarts=2),
        bnn.DeepEnsemble(steps=300, members=4),
        bnn.NUTS(chains=2, warmup=50, draws=20),
        bnn.MCLMC(chains=2, warmup=50, draws=20),
    ],
    ids=repr,
)
def test_a_fit_on_an_accelerator(method, tmp_path):
    device = torch.accelerator.current_accelerator()
    posterior = fit("regression", method=method, device=device, checkpoint=tmp_path / "run")
    assert all(v.device.type == device.type for v in posterior.draws.values())
    assert posterior.predict(X).mean.device.type == device.type
    assert posterior.predict(iter([(X,)])).interval(0.9)[0].device.type == device.type
    assert (posterior.to("cpu").predict(X).mean - Y).abs().mean() < 1.0
    posterior.diagnose()
    posterior.to_arviz()
    posterior.save(tmp_path / "fit")
    loaded = bnn.load(tmp_path / "fit", MODELS["regression"][0], device=device)
    torch.testing.assert_close(loaded.predict(X).f, posterior.predict(X).f)
