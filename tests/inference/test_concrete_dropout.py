"""Concrete dropout: the learned rate against a grid, the ratio of regularisers, relaxed masks."""

import math
import warnings

import pytest
import torch
from torch import nn

import bnn
from bnn.inference.concrete_dropout import _Bound
from bnn.models import likelihoods
from tests import exact
from tests.inference.test_mc_dropout import X, Y, masked_of, net_model


def test_the_rate_is_that_of_a_grid_from_either_start():
    low, high = (exact.check_rate_by_concrete_dropout(initial_rate=rate) for rate in (0.05, 0.5))
    assert abs(low - high) < 0.02


def test_minibatches_count_the_regularisers_once():
    """A share of them for each minibatch, the commonest mistake, would raise the rate."""
    exact.check_rate_by_concrete_dropout(batch_size=5)


@pytest.mark.slow
def test_the_rate_falls_with_the_number_of_rows():
    generator, rates = torch.Generator().manual_seed(0), []
    for rows in (100, 1_000, 10_000):
        x = torch.randn(rows, 5, generator=generator)
        y = x @ torch.linspace(1, -1, 5) + 3 * torch.randn(rows, generator=generator)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # without doubt at the end, as it has to be
            method = bnn.ConcreteDropout(steps=4_000)
            posterior = bnn.fit(exact.line(5, 3.0), x, y, method=method, progress=False)
        rates.append(float(posterior.params["rate.w"]))
    assert rates[0] > rates[1] > rates[2]
    assert rates[0] > 0.01
    assert rates[2] < 0.005


def _bound(net, *data, names, length_scale=None, temperature=0.1, model=None):
    masked, z, args = masked_of(
        model or net_model(net), *data, names=names, length_scale=length_scale
    )
    return _Bound(masked, temperature), z, args


def test_weights_and_entropy_have_the_ratio_of_the_paper():
    """With all inputs kept: log p(y | M) - l^2 |M|^2 / (2 (1-p)) - l^2 |b|^2 / 2 + n_in H(p)."""
    net, scale = nn.Sequential(nn.Linear(1, 6), nn.ReLU(), nn.Linear(6, 1)), 0.8
    bound, z, args = _bound(net, X, Y, names=["2.weight"], length_scale=scale)
    at = bound.masked.energy.values(z)
    f = torch.func.functional_call(net, at, (X,))[:, 0]
    likelihood = torch.distributions.Normal(f, 0.3).log_prob(Y).sum()
    factors = {"2.weight": torch.ones(12, 6)}
    others = sum(v.square().sum() for k, v in at.items() if k != "2.weight")
    constant = sum(v.numel() for v in at.values()) * math.log(scale / math.sqrt(2 * math.pi))
    for p in (0.05, 0.3, 0.9):
        logit = torch.tensor(math.log(p / (1 - p)))
        ours = sum(bound._at(z, {"2.weight": logit}, args, factors))
        decay = scale**2 / 2 * (at["2.weight"].square().sum() / (1 - p) + others)
        entropy = -6 * (p * math.log(p) + (1 - p) * math.log(1 - p))
        torch.testing.assert_close(ours, likelihood - decay + entropy + constant)


def test_a_convolution_counts_channels():
    net = nn.Sequential(nn.Conv1d(1, 3, 2), nn.Tanh(), nn.Conv1d(3, 1, 2), nn.Flatten())
    net.append(nn.Linear(4, 1))
    x = torch.randn(8, 1, 6)
    bound, z, args = _bound(net, x, x.mean((1, 2)), names=["2.weight"], length_scale=1e-4)
    factors = {"2.weight": torch.ones(8, 3)}
    at = lambda p: sum(bound._at(z, {"2.weight": torch.tensor(p).logit()}, args, factors))
    entropy = lambda p: -(p * math.log(p) + (1 - p) * math.log(1 - p))
    assert float(at(0.5) - at(0.1)) == pytest.approx(3 * (entropy(0.5) - entropy(0.1)), abs=1e-3)


def test_relaxed_masks_tend_to_hard_ones_of_their_rate():
    """Of 40,000: mean within 4 errors of 1 - p, and nearly all within .01 of 0 or 1 / (1 - p)."""
    net = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 1))
    x = torch.linspace(-1, 1, 1_000)[:, None]
    bound, z, args = _bound(net, x, x[:, 0], names=["2.weight"], temperature=1e-3)
    seen = {}
    bound._at = lambda z, logits, batch, factors: seen.update(factors)
    torch.manual_seed(0)
    bound(z, {"2.weight": torch.tensor(0.3).logit()}, args, bound.noise(args))
    kept = seen["2.weight"] * 0.7
    assert abs(float(kept.mean()) - 0.7) < 4 * math.sqrt(0.21 / 40_000)
    assert ((kept < 0.01) | (kept > 0.99)).double().mean() > 0.99


def test_rates_step_by_their_own_learning_rate(regression):
    method = bnn.ConcreteDropout(
        steps=1, schedule="constant", learning_rate=0.01, rate_learning_rate=0.3, draws=2
    )
    posterior = bnn.fit(regression.model, regression.x, regression.y, method=method)
    logit = float(posterior.params["rate.w"].logit())
    assert abs(logit - math.log(0.1 / 0.9)) == pytest.approx(0.3, rel=1e-3)


def test_draws_have_masks_of_the_learned_rate():
    model = bnn.models.mlp_regression(1, (20,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior = bnn.fit(model, X, Y, method=bnn.ConcreteDropout(steps=50), progress=False)
    rate = float(posterior.params["rate.layers.1.weight"])
    assert set(posterior.params) == {"rate.layers.1.weight"}
    share = (posterior.draws["layers.1.weight"] == 0).double().mean()
    assert abs(share - rate) < 4 * math.sqrt(rate * (1 - rate) / 20_000)


def test_own_dropout_and_bad_rates_are_refused():
    net = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.2), nn.Linear(4, 1))
    with pytest.raises(bnn.ModelError, match="Use MCDropout"):
        bnn.fit(net_model(net), X, Y, method=bnn.ConcreteDropout())
    for rate in (0.0, 1.0, {"w": 0.0}):
        with pytest.raises(ValueError, match="above 0"):
            bnn.ConcreteDropout(initial_rate=rate)
    with pytest.raises(TypeError, match="initial_rate=None"):
        bnn.ConcreteDropout(initial_rate=None)
    with pytest.raises(ValueError, match="temperature"):
        bnn.ConcreteDropout(temperature=0.0)


@pytest.mark.slow
def test_doubt_falls_with_the_number_of_rows():
    """The paper's y = 2 x + 8 + N(0, 1) and l, three layers of 128; as many steps at each N."""
    generator = torch.Generator().manual_seed(0)
    noise = lambda count: torch.randn(count, generator=generator)
    held_out = noise(1_000)[:, None]
    truth = 2 * held_out[:, 0] + 8 + noise(1_000)
    model = bnn.models.mlp_regression(
        1, (128, 128, 128), activation="relu", likelihood=likelihoods.Gaussian("predicted")
    )
    doubts = []
    for rows in (10, 100, 1_000):
        x = noise(rows)[:, None]
        method = bnn.ConcreteDropout(
            steps=6_000, learning_rate=0.002, rate_learning_rate=0.02, length_scale=1e-4,
            batch_size=min(rows, 20), schedule="cosine",
        )  # fmt: skip
        posterior = bnn.fit(model, x, 2 * x[:, 0] + 8 + noise(rows), method=method, seed=0)
        prediction = posterior.predict(held_out)
        doubts.append(float(prediction.epistemic.mean().sqrt()))
        assert rows < 100 or 0.85 < float(prediction.aleatoric.mean().sqrt()) < 1.35
    assert doubts[0] > doubts[1] > doubts[2]
    assert (prediction.mean - truth).square().mean().sqrt() < 1.08
