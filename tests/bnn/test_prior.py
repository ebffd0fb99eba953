"""What a model expects before it has seen an observation, against closed forms."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import bnn
from bnn import contract
from bnn.arguments import read
from bnn.prior import prior_draws

X = torch.tensor([0.0, 1.0, -2.0, 3.0])
DRAWS = 4_000


def model(x, y=None):
    w = pyro.sample("w", dist.Normal(1.0, 0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w * x, 0.3), obs=y)


def labelled(x, y=None):
    b = pyro.sample("b", dist.Beta(2.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(b.expand(x.shape)), obs=y)


def without_inputs(y=None):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Poisson(rate), obs=y)


def local(x, y=None):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 0.1), obs=y)


def test_moments_are_those_of_the_prior():
    """y = w x + noise: mean x, variance x^2 / 4 + .09; 4 Monte Carlo errors."""
    prior = bnn.prior_predictive(model, X, draws=DRAWS, seed=1)
    variance = X**2 / 4 + 0.09
    assert prior.y.shape == prior.f.shape == (1, DRAWS, 4)
    assert ((prior.y[0].mean(0) - X).abs() < 4 * (variance / DRAWS).sqrt()).all()
    relative = prior.y[0].var(0) / variance - 1
    assert (relative.abs() < 4 * math.sqrt(2 / DRAWS)).all()
    torch.testing.assert_close(prior.aleatoric, torch.full((4,), 0.09))
    spread = X.abs() / 2
    assert ((prior.f[0].std(0) - spread).abs() <= 4 * spread / math.sqrt(2 * DRAWS) + 1e-6).all()


def test_rows_share_the_draw_of_a_weight_and_not_the_noise():
    prior = bnn.prior_predictive(model, X, draws=DRAWS)
    corr = torch.corrcoef(prior.y[0].T)
    exact = 3 / 4 / math.sqrt((1 / 4 + 0.09) * (9 / 4 + 0.09))  # rows at 1 and 3
    assert abs(corr[1, 3] - exact) < 4 * (1 - exact**2) / math.sqrt(DRAWS)
    assert abs(corr[0, 1]) < 4 / math.sqrt(DRAWS)  # the row at 0 holds noise alone


def test_labels_have_probabilities():
    prior = bnn.prior_predictive(labelled, X, draws=DRAWS)
    error = math.sqrt(1 / 18 / DRAWS)  # Beta(2, 1): mean 2/3, variance 1/18
    assert (prior.probs[:, 1] - 2 / 3).abs().max() < 4 * error


def test_a_model_without_inputs_needs_none():
    prior = bnn.prior_predictive(without_inputs, draws=DRAWS)
    assert prior.y.shape == (1, DRAWS, 4)
    assert abs(prior.y[..., 0].mean() - 2) < 4 * math.sqrt(4 / DRAWS)  # variance 2 + 2


def test_local_sites_are_drawn_for_each_row():
    prior = bnn.prior_predictive(local, X, draws=DRAWS)
    corr = torch.corrcoef(prior.y[0].T) - torch.eye(4)
    assert corr.abs().max() < 4 / math.sqrt(DRAWS)


def test_a_net_needs_no_observations():
    net = bnn.models.mlp_regression(1, hidden=(3,))
    assert bnn.prior_predictive(net, X[:, None], draws=7).y.shape == (1, 7, 4)


def test_same_seed_same_bits_and_the_callers_state_is_left_alone():
    first = bnn.prior_predictive(model, X, draws=50, seed=3)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(bnn.prior_predictive(model, X, draws=50, seed=3).y, first.y)
    assert torch.equal(torch.get_rng_state(), state)
    other = bnn.prior_predictive(model, X, draws=50, seed=4)
    assert not torch.equal(other.f, first.f)
    assert not torch.allclose(other.y - other.f, first.y - first.f, atol=1e-3)


def test_it_is_the_prior_that_an_export_holds():
    """`check_prior` finds the sites without observations that `check` finds with them."""
    for program, args in ((model, (X,)), (labelled, (X,)), (without_inputs, ()), (local, (X,))):
        y = torch.tensor([0.0, 1.0, 0.0, 1.0])
        _, whole = contract.check(program, read(program, (*args, y)))
        _, prior = prior_draws(program, args, whole, 20, seed=5)
        assert torch.equal(prior.y, bnn.prior_predictive(program, *args, draws=20, seed=5).y)


@pytest.mark.parametrize(
    ("program", "inputs", "settings", "kind", "match"),
    [
        (
            lambda x, y: pyro.sample("y", dist.Normal(y, 1.0), obs=y),
            (X,),
            {},
            bnn.ModelError,
            "raised",
        ),
        (lambda x, y=None: None, (X,), {}, bnn.ModelError, "no site"),
        (lambda x: None, (X, X, X), {}, bnn.ModelError, "positional"),
        (
            model,
            (X, X),
            {},
            bnn.ModelError,
            r"given.*It takes x, y, .*\(model, x\)",
        ),
        (model, (), {}, bnn.ModelError, r"raised.*call prior_predictive\(model, x\)"),
        (model, ([1.0, math.nan],), {}, bnn.DataError, "NaN"),
        (model, (["a", "b"],), {}, bnn.DataError, "not numbers"),
        (model, (X,), {"draws": 0}, ValueError, "draws is at least 1"),
        (model, (X,), {"draws": 2.5}, TypeError, "draws is a whole number"),
        (model, (X,), {"seed": -1}, ValueError, "seed is -1"),
        (model, (X,), {"seed": "0"}, TypeError, "seed is '0'"),
    ],
)
def test_what_cannot_be_drawn_is_refused(program, inputs, settings, kind, match):
    with pytest.raises(kind, match=match):
        bnn.prior_predictive(program, *inputs, **settings)
