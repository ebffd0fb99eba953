"""SGHMC and SGLD against the law of their own steps, known in closed form for a Gaussian."""

import dataclasses
import math
import re
import warnings
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import bnn
from bnn.inference._step import Step
from bnn.inference._stochastic_gradient import Langevin, kept_steps, of_spread
from bnn.models import mlp_regression, priors
from tests import exact
from tests.exact import assert_exact, langevin_map, stationary

FRICTIONS = [0.5, 3.0, math.inf]
PRECISION = torch.tensor([[4.0, 1.2], [1.2, 1.0]])


def _walk(friction, step, count, noise=0.0, chains=4_000):
    """The rule itself on N(0, PRECISION^-1), many chains; positions after steps that forget."""
    z = torch.zeros(chains, 2, requires_grad=True)

    def log_density(leaves, batch, weight, fresh):
        mode, (push,) = leaves["mode"], batch
        return -0.5 * (mode @ PRECISION * mode).sum(1) + (push * mode).sum(1)

    rule = Langevin(friction)
    stepping = Step(
        log_density, {"mode": z}, lambda *_: (torch.randn(chains, 2),), chains, rule=rule
    )
    kept = []
    for number in range(count):
        push = noise * torch.randn(chains, 2)
        stepping((push,), [step] * chains, 1.0)
        if number >= count // 2 and number % 10 == 0:
            kept.append(z.detach().clone())
    return torch.stack(kept), stepping.state


@pytest.mark.parametrize("friction", FRICTIONS)
def test_all_rows_leave_a_gaussian_as_it_is_however_long_the_step(friction):
    """h^2 times the stiffest direction is 1.1, a quarter of what diverges: no error at all."""
    torch.manual_seed(0)
    positions, state = _walk(friction, 0.5, 400)
    cov = torch.cov(positions.flatten(0, 1).T)
    # 80,000 draws, of which a fifth at least are independent: 1.1 % a variance
    torch.testing.assert_close(cov, torch.linalg.inv(PRECISION), rtol=0.04, atol=0.04)
    assert abs(float(state["virial"].mean()) / 400 - 1) < 0.03


@pytest.mark.parametrize("friction", FRICTIONS)
def test_noise_of_the_gradient_widens_by_the_lyapunov_equation(friction):
    torch.manual_seed(1)
    positions, _ = _walk(friction, 0.4, 400, noise=2.0)
    cov = torch.cov(positions.flatten(0, 1).T)
    wanted = stationary(*langevin_map(PRECISION.numpy(), 0.4, friction, 4.0 * np.eye(2)))[:2, :2]
    true = torch.linalg.inv(PRECISION)
    assert (
        torch.tensor(wanted).diagonal() > 1.15 * true.diagonal()
    ).all()  # else this shows nothing
    torch.testing.assert_close(cov.double(), torch.tensor(wanted), rtol=0.04, atol=0.06)


@pytest.mark.parametrize(
    ("method", "batch_size"),
    [
        (bnn.SGHMC, None),
        (bnn.SGLD, 10),
        pytest.param(bnn.SGLD, None, marks=pytest.mark.slow),
        pytest.param(bnn.SGHMC, 10, marks=pytest.mark.slow),
    ],
)
def test_conjugate_regression(method, batch_size):
    exact.check_regression_by_stochastic_gradient(method, batch_size=batch_size)


@pytest.mark.parametrize("friction", [2.0, pytest.param(math.inf, marks=pytest.mark.slow)])
def test_minibatches_widen_by_what_their_noise_is_known_to_add(friction):
    """A mean of bivariate rows: the gradient's noise does not depend on the mean, and cancels over
    a pass, so that a pass of 4 steps is one linear map with known noise."""
    exact.check_minibatch_noise(friction)


def test_positive_site():
    """Gamma-Poisson on the real line, log-Jacobian included."""
    y = torch.tensor([0.0, 1.0, 0.0, 2.0])
    posterior = bnn.fit(
        exact.gamma_poisson, y, method=bnn.SGHMC(chains=32, steps=2_000, warmup=500), seed=2
    )
    assert_exact(posterior.draws["rate"], 1.0, math.sqrt(5) / 5)


def _two_modes(y=None):
    """0.3 N(-1.6, .5) + 0.7 N(1.6, .5), a barrier of 4.4 nats between; the data say nothing."""
    modes = dist.Normal(torch.tensor([-1.6, 1.6]), 0.5)
    w = pyro.sample("w", dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7])), modes))
    with pyro.plate("data", 2):
        pyro.sample("y", dist.Normal(0.0 * w, 1.0), obs=y)


def test_cycles_move_between_modes_where_one_does_not():
    method = partial(bnn.SGHMC, chains=32, step_size=0.7, warmup=200, preconditioned=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bnn.ConvergenceWarning)
        one, many = (
            bnn.fit(_two_modes, torch.zeros(2), method=each, seed=3).draws["w"]
            for each in (
                method(cycles=1, steps=100, draws=5),
                method(cycles=60, steps=6_000, draws=300),
            )
        )
    both = lambda w: float(((w > 0).any(1) & (w < 0).any(1)).float().mean())  # of the chains
    assert both(one) < 0.2
    assert both(many) > 0.9
    share = (many > 0).float().mean(1)  # (chain,)
    assert abs(float(share.mean()) - 0.7) < 4 * float(share.std()) / math.sqrt(32)
    right = many[many > 0]
    assert abs(float(right.mean()) - 1.6) < 0.05
    assert abs(float(right.std()) - 0.5) < 0.04


def test_draws_are_spread_over_the_steps_that_sample():
    assert kept_steps(100, 4, None) == [24, 49, 74, 99]
    assert kept_steps(100, 4, 2) == [37, 49, 87, 99]
    assert len(kept_steps(1_000, 999, None)) == 999


def test_chains_share_neither_noise_nor_minibatches(regression):
    method = bnn.SGHMC(chains=4, batch_size=10, steps=3_000, draws=300, warmup=500)
    w = bnn.fit(regression.model, regression.x, regression.y, method=method, seed=4).draws["w"]
    across = torch.corrcoef(w[..., 0])
    assert (across - torch.eye(4)).abs().max() < 0.3  # at least 150 independent draws: 4 x .08
    assert len({tuple(draw.tolist()) for draw in w[:, 0]}) == 4


def test_noise_of_minibatches_is_told(regression):
    method = bnn.SGLD(batch_size=2, step_size=0.12, preconditioned=False, steps=2_000)
    with pytest.warns(bnn.ConvergenceWarning, match=r"adds up to [1-9].*raise batch_size"):
        posterior = bnn.fit(regression.model, regression.x, regression.y, method=method)
    ratio = (posterior.draws["w"].flatten(0, 1).std(0) / regression.sd).square().mean()
    assert 1.3 < float(ratio) < 1 + float(posterior.stats["noise"].mean())


def test_temperature_tells_a_spread_that_is_too_wide():
    generator = torch.Generator().manual_seed(0)
    right = 1 + 0.5 * torch.randn(8, 250, generator=generator)
    stats = {"noise": 0.1 * torch.ones(8, 250), "step_size": torch.ones(8, 250), "lp": right}
    (found,) = (each for each in of_spread(stats | {"temperature": right + 0.3}) if each.doubtful)
    assert re.search(r"temperature is 1\.3.*wider", found.meaning)
    assert not any(each.doubtful for each in of_spread(stats | {"temperature": right}))


def test_temperature_tells_a_spread_that_is_too_narrow(regression):
    slow = bnn.SGLD(step_size=0.002, preconditioned=False, steps=1_000, warmup=1_000)
    with (
        pytest.warns(bnn.ConvergenceWarning, match=r"temperature is 0\..*Raise warmup"),
        pytest.warns(bnn.ConvergenceWarning, match="chains disagree"),
    ):
        bnn.fit(regression.model, regression.x, regression.y, method=slow)


def test_a_step_that_runs_away_is_an_error(regression):
    method = bnn.SGHMC(step_size=2.0, preconditioned=False, steps=2_000)
    with pytest.raises(bnn.FitError, match=r"run away. Lower step_size"):
        bnn.fit(regression.model, regression.x, regression.y, method=method)


def test_one_chain_and_a_loader(regression):
    rows = torch.utils.data.TensorDataset(regression.x, regression.y)
    loader = torch.utils.data.DataLoader(rows, batch_size=25, shuffle=True)
    method = bnn.SGHMC(chains=1, steps=4_000, warmup=500)
    posterior = bnn.fit(regression.model, loader, method=method, seed=5)
    assert posterior.shape == (1, 250)
    ratio = posterior.draws["w"][0].std(0) / regression.sd
    assert ((ratio > 0.8) & (ratio < 1.25)).all(), ratio


def test_settings_are_checked():
    with pytest.raises(ValueError, match="fewer steps to keep than draws"):
        bnn.SGHMC(draws=100, steps=150, cycles=3)
    with pytest.raises(ValueError, match="Pass step_size"):
        bnn.SGLD(preconditioned=False)
    with pytest.raises(TypeError, match="True or False"):
        bnn.SGLD(preconditioned="rmsprop")
    with pytest.raises(ValueError, match="friction is a finite number"):
        bnn.SGHMC(friction=0.0)


def test_local_sites_and_leftovers_are_refused():
    def local(x, y=None):
        with pyro.plate("data", len(x)):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    x = torch.ones(6)
    with pytest.raises(bnn.ModelError, match=r'"theta".*batch_size'):
        bnn.fit(local, x, x, method=bnn.SGHMC(batch_size=2))

    def trainable(x, y=None):
        offset = pyro.param("offset", torch.tensor(0.0))
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x + offset, 1.0), obs=y)

    with pytest.raises(bnn.ModelError, match="no prior to be drawn from: offset"):
        bnn.fit(trainable, x, x, method=bnn.SGLD())


def test_a_chain_that_runs_away_in_warmup_goes_back_with_half_the_step():
    """A net whose noise is small at its mode: steps that are stable there are not around it."""
    x = torch.linspace(-2, 2, 80)[:, None]
    noise = torch.randn(80, generator=torch.Generator().manual_seed(0))
    model = mlp_regression(1, (20,), prior=priors.Normal(scale=1.0))
    data = x, torch.sin(2 * x[:, 0]) + 0.1 * noise
    method = bnn.SGHMC(chains=4, steps=1_000, draws=20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior = bnn.fit(model, *data, method=method, seed=0, progress=False)
        assert all(torch.isfinite(v).all() for v in posterior.draws.values())
        assert float(posterior.predict(x).mean.sub(data[1]).square().mean().sqrt()) < 0.3
        held = dataclasses.replace(method, step_size=0.32)
        with pytest.raises(bnn.FitError, match=r"SGHMC, chain \d: .* Lower step_size"):
            bnn.fit(model, *data, method=held, seed=0, progress=False)
