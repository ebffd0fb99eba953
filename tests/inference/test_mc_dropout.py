"""MC dropout: its optimum, its objective by enumeration of masks, its draws, nets that drop."""

import itertools
import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import bnn
from bnn import contract
from bnn.data import Data
from bnn.handlers import quiet_pyro
from bnn.inference._energy import Energy
from bnn.inference._masks import Masked, find, hard
from bnn.models import likelihoods, priors, supervised
from tests import exact
from tests.data import deepfindr

X = torch.linspace(-1, 1, 12)[:, None]
Y = torch.sin(3 * X[:, 0])


def masked_of(model, *data, names=None, length_scale=None, seed=0):
    """The log joint under masks, its start, and the data."""
    checked, sites = contract.check(model, Data(data, ("x", "y"), rows=len(data[-1])))
    energy = Energy(model, checked, sites)
    with quiet_pyro():
        z, layout = find(energy, checked.tensors, np.random.SeedSequence(seed))
    names = layout.places if names is None else names
    return Masked(energy, layout, names, length_scale), z, checked.tensors


def _quick(model, *data, seed=0, **settings):
    method = bnn.MCDropout(**{"steps": 50, "draws": 40} | settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # too short to converge
        return bnn.fit(model, *data, method=method, seed=seed, progress=False)


# --- the optimum


def test_conjugate_regression_has_its_own_answer():
    exact.check_regression_by_mc_dropout()


def test_minibatches_reach_the_same_optimum():
    exact.check_regression_by_mc_dropout(batch_size=25, length_scale=4.0)


def test_flat_prior_is_a_ridge_of_the_masks_and_their_variance_is_predicted():
    """w = (X'X + p/(1-p) diag X'X)^-1 X'y; Var f = p/(1-p) sum w_j^2 x_j^2 (20,000 draws: 5 %)."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(80, 3, generator=generator)
    y = x @ torch.tensor([2.0, -3.0, 2.5]) + torch.randn(80, generator=generator)
    method = bnn.MCDropout(rate=0.2, length_scale=1e-3, draws=20_000)
    posterior = bnn.fit(exact.line(3), x, y, method=method, seed=1)
    gram = x.T @ x
    w = torch.linalg.solve(gram + 0.25 * gram.diagonal().diag(), x.T @ y)
    largest = posterior.draws["w"][0].abs().amax(0) * 0.8
    torch.testing.assert_close(largest, w.abs(), rtol=0.02, atol=0.0)
    variance = 0.25 * (x[:6] ** 2) @ w**2
    torch.testing.assert_close(posterior.predict(x[:6]).epistemic, variance, rtol=0.05, atol=0.0)


def test_rate_0_is_the_mode(regression):
    model, x, y = regression.model, regression.x, regression.y
    settings = {"steps": 200, "draws": 2, "schedule": "constant", "batch_size": 20}
    mode = bnn.fit(model, x, y, method=bnn.MAP(**settings), seed=4)
    none = bnn.fit(model, x, y, method=bnn.MCDropout(rate=0.0, **settings), seed=4)
    torch.testing.assert_close(none.draws["w"], mode.draws["w"])


# --- the objective


def net_model(net, prior=None, sigma=0.3):
    return supervised(net, likelihoods.Gaussian(sigma), prior or priors.Normal())


def _enumerated(masked, z, args, rates, value):
    """E[value(factors)] over all masks of these sites, the same for every row."""
    shapes, rows = masked.shapes(len(args[-1])), len(args[-1])
    inputs = {k: masked.layout.places[k].map.inputs for k in rates}
    total = 0.0
    for bits in itertools.product([0.0, 1.0], repeat=sum(inputs.values())):
        factors, probability, rest = {}, 1.0, torch.tensor(bits)
        for name, rate in rates.items():
            one, rest = rest[: inputs[name]], rest[inputs[name] :]
            probability *= math.prod(rate if b == 0 else 1 - rate for b in one.tolist())
            whole = one / (1 - rate)
            factors[name] = whole.expand(rows, -1) if len(shapes[name]) == 2 else whole
            factors[f"prior: {name}"] = whole
        total = total + probability * value(factors)
    return total


def test_both_parametrisations_have_one_objective():
    """The paper's: E[log p(y | M~ z)] - (1-p) l^2/2 |M~|^2 - l^2/2 |b|^2, with M~ = M / (1-p)."""
    torch.manual_seed(0)
    net, rate, scale = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1)), 0.3, 0.7
    masked, z, args = masked_of(net_model(net), X, Y, names=["2.weight"], length_scale=scale)
    odds = {"2.weight": rate / (1 - rate)}
    ours = _enumerated(
        masked, z, args, {"2.weight": rate}, lambda f: sum(masked.terms(z, args, f, odds))
    )
    at = masked.energy.values(z)
    paper = at["2.weight"] / (1 - rate)
    expected = 0.0
    for bits in itertools.product([0.0, 1.0], repeat=4):
        bits = torch.tensor(bits)
        hidden = torch.relu(X @ at["0.weight"].T + at["0.bias"])
        f = hidden @ (paper * bits)[0] + at["2.bias"]
        probability = float(rate ** (4 - bits.sum()) * (1 - rate) ** bits.sum())
        expected = expected + probability * dist.Normal(f, 0.3).log_prob(Y).sum()
    decay = (1 - rate) * paper.square().sum()
    for name in ("0.weight", "0.bias", "2.bias"):
        decay = decay + at[name].square().sum()
    size = sum(v.numel() for v in at.values())
    expected = expected - scale**2 / 2 * decay + size * math.log(scale / math.sqrt(2 * math.pi))
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("prior", [priors.Normal(), priors.Laplace()])
def test_the_prior_counts_at_masked_weights(prior):
    """Exact under a Normal; else sampled, and exact once all masks are enumerated."""
    net = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))
    masked, z, args = masked_of(net_model(net, prior), X, Y, names=["2.weight"])
    odds, at = {"2.weight": 0.25}, masked.energy.values(z)

    def truth(factors):
        w = at["2.weight"] * factors["prior: 2.weight"]
        replaced = {**at, "2.weight": w}
        return masked.energy.log_joint(masked.energy.flatten(replaced), args, jacobian=False)

    ours = lambda factors: sum(masked.terms(z, args, factors, odds))
    sampled = "prior: 2.weight" in masked.shapes(12)
    assert sampled == (not isinstance(prior, priors.Normal))
    rates = {"2.weight": 0.2}
    found = _enumerated(masked, z, args, rates, ours)
    torch.testing.assert_close(found, _enumerated(masked, z, args, rates, truth))


def test_masks_of_rows_and_of_all_have_one_expected_gradient():
    """Enumeration of the masks of all against 4,000 draws of masks of rows: 4 standard errors."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
    masked, z, args = masked_of(net_model(net), X, Y, names=["2.weight", "4.weight"])
    assert all(place.by_row for place in masked.places.values())
    rates = {"2.weight": 0.3, "4.weight": 0.2}
    odds = {k: p / (1 - p) for k, p in rates.items()}
    z = z.requires_grad_()
    value = lambda factors: sum(masked.terms(z, args, factors, odds))
    (tied,) = torch.autograd.grad(_enumerated(masked, z, args, rates, value), z)
    each = []
    for _ in range(1_500):
        factors = {k: hard(s, rates[k]) for k, s in masked.shapes(12).items()}
        each.append(torch.autograd.grad(value(factors), z)[0])
    each = torch.stack(each)
    error = each.std(0) / math.sqrt(len(each)) + 1e-4
    assert ((each.mean(0) - tied).abs() / error).max() < 4


def _neighbours(x, y=None):
    """Rows see each other: a graph's average is between the layers."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
    v = pyro.sample("v", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    h = torch.tanh(x @ w)
    h = 0.5 * (h + h.mean(0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(h @ v, 0.3), obs=y)


def _earlier_rows(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
    with pyro.plate("data", len(x)):
        h = torch.tanh(x @ w).cumsum(0).sum(1)
        pyro.sample("y", dist.Normal(h, 0.3), obs=y)


def _faintly(x, y=None):
    """What a row sees of the others is far below the noise."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
    v = pyro.sample("v", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    h = torch.tanh(x @ w)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(torch.sigmoid(h + 2 * h.mean(0)) @ v, 30.0), obs=y)


def _tied(x, y=None):
    """One weight, its columns the inputs of the first map and the outputs of the second."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 1]).to_event(2))
    with pyro.plate("data", len(x)):
        code = torch.tanh(torch.nn.functional.linear(x, w))
        pyro.sample("y", dist.Normal((code @ w)[:, 0], 0.3), obs=y)


def test_the_net_s_own_masks_are_for_all_rows_under_a_plate_that_draws_some():
    net = torch.nn.Sequential(
        torch.nn.Linear(1, 5), torch.nn.Tanh(), torch.nn.Dropout(0.3), torch.nn.Linear(5, 1)
    )

    def model(x, y=None):
        f = bnn.models.sample_weights(net)
        with pyro.plate("data", len(x), subsample_size=4) as rows:
            seen = None if y is None else y[rows]
            pyro.sample("y", dist.Normal(f(x[rows])[:, 0], 0.3), obs=seen)

    posterior = _quick(model, X, Y)
    f = posterior.predict(X[:1].expand(8, 1)).f
    assert (f - f[..., :1]).abs().max() < 1e-5


def _used_twice(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([1, 1]).to_event(2))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x @ w)[:, 0] + 0.1 * w.sum(), 0.3), obs=y)


@pytest.mark.parametrize(
    ("model", "site"),
    [(_neighbours, "v"), (_used_twice, "w"), (_earlier_rows, "w"), (_faintly, "w"), (_tied, "w")],
)
def test_rows_share_masks_where_a_mask_of_a_row_would_be_wrong(model, site):
    masked, z, args = masked_of(model, X, Y, names=[site])
    assert not masked.places[site].by_row
    rates, odds, at = {site: 0.25}, {site: 1 / 3}, masked.energy.values(z)

    def truth(factors):
        place = masked.places[site].map
        replaced = {**at, site: place.scaled(at[site], factors[f"prior: {site}"])}
        return masked.energy.log_joint(masked.energy.flatten(replaced), args)

    ours = _enumerated(
        masked, z, args, rates, lambda f: sum(masked.terms(z, args, {site: f[site]}, odds))
    )
    torch.testing.assert_close(ours, _enumerated(masked, z, args, rates, truth))


# --- where it drops, and the draws


def test_hidden_units_are_dropped_and_the_data_are_not():
    model = bnn.models.mlp_regression(1, (20, 10))
    w = _quick(model, X, Y, rate=0.3, draws=400).draws
    assert (w["layers.0.weight"] == w["layers.0.weight"][:, :1]).all()
    assert (w["layers.1.bias"] == w["layers.1.bias"][:, :1]).all()
    for site, inputs in (("layers.1.weight", 20), ("layers.2.weight", 10)):
        gone = (w[site] == 0).all(-2)  # (chain, draw, input)
        assert torch.equal(gone, (w[site] == 0).any(-2))
        share = gone.double().mean()
        assert abs(share - 0.3) < 4 * math.sqrt(0.21 / (400 * inputs))


def test_rates_by_site():
    w = _quick(bnn.models.mlp_regression(1, (8,)), X, Y, rate={"layers.0.weight": 0.5}).draws
    assert (w["layers.0.weight"] == 0).any()
    assert not (w["layers.1.weight"] == 0).any()


def test_a_rate_may_be_a_number_of_numpys():
    assert bnn.MCDropout(rate=np.float32(0.5)).rate == 0.5


def test_a_draw_is_a_function():
    posterior = _quick(bnn.models.mlp_regression(1, (20,)), X, Y, rate=0.5)
    twice = posterior.predict(torch.tensor([[0.3], [0.3], [-0.2]])).f
    torch.testing.assert_close(twice[..., 0], twice[..., 1])
    assert (twice[0, :, 0] != twice[0, 0, 0]).any()


def _images(net):
    x = torch.randn(10, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    return net_model(net), x, x.mean((1, 2, 3))


def test_a_convolution_drops_channels():
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3, groups=2), nn.Flatten(), nn.Linear(8, 1)
    )
    model, x, y = _images(net)
    w = _quick(model, x, y, rate=0.4, draws=200).draws["2.weight"][0]  # (draw, 2, 2, 3, 3)
    gone = (w == 0).flatten(-2)
    assert torch.equal(gone.all(-1), gone.any(-1))
    assert abs(gone.double().mean() - 0.4) < 4 * math.sqrt(0.24 / 800)


def test_masks_of_rows_in_a_convolution_are_masks_of_its_weight():
    net = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.ReLU(), nn.ConvTranspose1d(4, 2, 3), nn.Flatten(), nn.Linear(12, 1)
    )
    x = torch.randn(10, 2, 6)
    masked, z, args = masked_of(net_model(net), x, x.mean((1, 2)), names=["2.weight"])
    assert masked.shapes(10) == {"2.weight": (10, 4)}
    factor = torch.tensor([0.0, 2.0, 2.0, 0.0])
    ours = sum(masked.terms(z, args, {"2.weight": factor.expand(10, 4)}, {}))
    at = masked.energy.values(z)
    at["2.weight"] = at["2.weight"] * factor[:, None, None]
    f = torch.func.functional_call(net, at, (x,))[:, 0]
    likelihood = dist.Normal(f, 0.3).log_prob(args[1]).sum()
    priors_alone = masked.energy.terms(z, args, jacobian=False)[1]
    torch.testing.assert_close(ours, likelihood + priors_alone)


# --- nets that drop by themselves


@pytest.mark.parametrize("training", [True, False])
def test_the_nets_own_dropout_is_that_of_the_weight_behind_it(training):
    torch.manual_seed(0)
    own = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1))
    bare = nn.Sequential(*own[:2], nn.Identity(), own[3])
    posterior = _quick(net_model(own.train(training)), X, Y)
    same = _quick(net_model(bare), X, Y, rate={"3.weight": 0.3})
    assert list(posterior.draws) == ["0.weight", "0.bias", "3.weight", "3.bias"]
    for site, draws in posterior.draws.items():
        assert torch.equal(draws, same.draws[site])
    assert torch.equal(posterior.predict(X).f, same.predict(X).f)
    twice = posterior.predict(torch.ones(2, 1)).f
    torch.testing.assert_close(twice[..., 0], twice[..., 1])


class Residual(nn.Module):
    """Dropout whose output goes two ways, and one that feeds something else than a linear map."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(1, 5), nn.Linear(5, 5)
        self.drop, self.last = nn.Dropout(0.4), nn.Linear(5, 1)

    def forward(self, x):
        h = self.drop(torch.tanh(self.first(x)))
        return self.last(torch.tanh(self.drop(self.second(h) + h)))


def test_dropout_that_goes_elsewhere_is_a_site_of_its_own(tmp_path):
    net = Residual()
    model = net_model(net)
    posterior = _quick(model, X, Y, draws=300)
    masks = posterior.draws["dropout.0"], posterior.draws["dropout.1"]
    assert masks[0].shape == (1, 300, 1, 5)
    assert set(masks[0].unique().tolist()) == {0.0, 1.0}
    assert abs(masks[0].mean() - 0.6) < 4 * math.sqrt(0.24 / 1_500)
    assert not (posterior.draws["last.weight"] == 0).any()
    w = {k: v[0, 7] for k, v in posterior.draws.items()}
    h = torch.tanh(X @ w["first.weight"].T + w["first.bias"]) * w["dropout.0"] / 0.6
    h = (h @ w["second.weight"].T + w["second.bias"] + h) * w["dropout.1"] / 0.6
    f = torch.tanh(h) @ w["last.weight"][0] + w["last.bias"]
    torch.testing.assert_close(posterior.predict(X).f[0, 7], f)
    assert posterior.to_arviz()["posterior"]["dropout.0"].shape == (1, 300, 1, 5)
    posterior.save(tmp_path / "fit")
    loaded = bnn.load(tmp_path / "fit", model)
    assert torch.equal(loaded.predict(X).y, posterior.predict(X).y)
    assert torch.equal(loaded.log_likelihood(), posterior.log_likelihood())


def test_own_masks_reach_every_row_in_training():
    """One expectation for masks of rows and of all, by the seam in which a dropout ends."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 3), nn.Dropout(0.25), nn.Tanh(), nn.Linear(3, 1))
    masked, z, args = masked_of(net_model(net), X, Y, names=["dropout.0"])
    assert masked.shapes(12) == {"dropout.0": (12, 3)}
    at = masked.energy.values(z)
    for bits in ([1.0, 0.0, 1.0], [0.0, 1.0, 1.0]):
        factor = torch.tensor(bits) / 0.75
        ours = sum(masked.terms(z, args, {"dropout.0": factor.expand(12, 3)}, {}))
        h = torch.tanh((X @ at["0.weight"].T + at["0.bias"]) * factor)
        f = h @ at["3.weight"][0] + at["3.bias"]
        likelihood = dist.Normal(f, 0.3).log_prob(Y).sum()
        torch.testing.assert_close(
            ours, likelihood + masked.energy.terms(z, args, jacobian=False)[1]
        )


def test_channels_of_dropout2d_and_batch_norm_in_evaluation_mode():
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout2d(0.5), nn.Conv2d(4, 1, 4),
        nn.Dropout(0.2), nn.Flatten(),
    ).eval()  # fmt: skip
    posterior = _quick(*_images(net))
    assert posterior.draws["dropout.1"].shape == (1, 40, 1, 1, 1, 1)
    gone = (posterior.draws["3.weight"] == 0)[0, :, 0].flatten(-2)  # (draw, channel, place)
    assert torch.equal(gone.all(-1), gone.any(-1))
    assert 0.2 < gone.double().mean() < 0.8


# --- what it refuses


@pytest.mark.parametrize(("method", "own"), [(bnn.MCDropout, 0.3), (bnn.ConcreteDropout, 0.0)])
def test_batch_norm_that_couples_rows_is_refused(method, own):
    """A net of Pyro's own, which `sample_weights` has not looked at."""
    import pyro.nn as pnn

    class Net(pnn.PyroModule):
        def __init__(self):
            super().__init__()
            self.layer = pnn.PyroModule[nn.Linear](1, 4)
            self.layer.weight = pnn.PyroSample(dist.Normal(0.0, 1.0).expand([4, 1]).to_event(2))
            self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(own)

        def forward(self, x, y=None):
            f = self.drop(self.norm(self.layer(x))).sum(-1)
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(f, 0.3), obs=y)

    net = Net()
    x, y = torch.linspace(-1, 1, 20)[:, None], torch.linspace(-1, 1, 20)
    fit = lambda: bnn.fit(net, x, y, method=method(steps=20, draws=5), progress=False)
    with pytest.raises(bnn.ModelError, match=r"depends on its neighbours. Call net.eval\(\)"):
        fit()
    net.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few steps
        posterior = fit()
    some, every = posterior.predict(x[:3]).f, posterior.predict(x).f
    assert torch.allclose(some, every[..., :3], atol=1e-5)


def test_a_rate_beside_own_dropout_is_refused():
    net = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.2), nn.Linear(4, 1))
    with pytest.raises(bnn.ModelError, match=r"drops by itself \(rates 0.2\)"):
        _quick(net_model(net), X, Y, rate=0.1)


def test_dropout_inside_of_attention_is_refused():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True)

        def forward(self, x):
            x = x[..., None].expand(-1, -1, 4)
            return self.attention(x, x, x, need_weights=False)[0].mean((1, 2))[:, None]

    with pytest.raises(bnn.ModelError, match="inside of multi_head_attention_forward"):
        _quick(net_model(Attends()), X, Y)


def test_unknown_sites_and_models_without_maps_are_refused(regression):
    with pytest.raises(bnn.ModelError, match=r'"v", which is not the weight.*are: w'):
        _quick(regression.model, regression.x, regression.y, rate={"v": 0.1})
    with pytest.raises(bnn.ModelError, match="no latent site of the model is the weight"):
        _quick(exact.gamma_poisson, torch.tensor([1.0, 0.0, 2.0, 1.0]))


@pytest.mark.parametrize("rate", [1.0, -0.1, {"w": 1.0}, float("nan")])
def test_rates_out_of_range_are_refused(rate):
    with pytest.raises(ValueError, match="below 1"):
        bnn.MCDropout(rate=rate)
    with pytest.raises(TypeError, match="numbers by site"):
        bnn.MCDropout(rate="half")
    with pytest.raises(ValueError, match="length_scale"):
        bnn.MCDropout(length_scale=0.0)


def test_rates_by_site_come_back_from_a_file(regression, tmp_path):
    posterior = _quick(regression.model, regression.x, regression.y, rate={"w": 0.2})
    posterior.save(tmp_path / "fit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bnn.load(tmp_path / "fit", regression.model).method == posterior.method


# --- DeepFindr's data


@pytest.mark.slow
def test_doubt_grows_outside_the_data_of_deepfindr():
    """One wide layer: behind its last kink every unit, and so the noise of its mask, grows with x.

    A second layer of masks adds noise that does not, and the ratio falls to about 2.
    """
    x, y = deepfindr()
    model = bnn.models.mlp_regression(
        1, (200,), activation="relu", likelihood=likelihoods.Gaussian("predicted")
    )
    method = bnn.MCDropout(rate=0.05, steps=4_000, learning_rate=0.01, schedule="cosine")
    posterior = bnn.fit(model, x, y, method=method, seed=0)
    grid = torch.linspace(-10, 10, 401)[:, None]
    prediction, far = posterior.predict(grid), grid[:, 0].abs()
    doubt = prediction.epistemic.sqrt()
    assert doubt[far >= 9].mean() > 3 * doubt[far < 5].mean()
    noise = torch.stack([prediction.aleatoric.sqrt(), (7 - far) / 16])[:, far < 6]
    assert torch.corrcoef(noise)[0, 1] > 0.9
    assert (prediction.mean - torch.sin(grid[:, 0] / 2))[far < 6].square().mean().sqrt() < 0.1


def test_a_site_may_be_called_prior():
    net = torch.nn.Sequential()
    net.add_module("weight", torch.nn.Linear(1, 5))
    net.add_module("prior", torch.nn.Linear(5, 1))
    model = bnn.models.supervised(net, likelihoods.Gaussian(0.5))
    posterior = _quick(model, X, Y, rate={"prior.weight": 0.5})
    kept = posterior.draws["prior.weight"] != 0
    assert 0.3 < kept.float().mean() < 0.7
