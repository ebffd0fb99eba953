"""SWAG against the stationary law of SGD, which is what it approximates; not the posterior."""

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import bnn
from tests import exact
from tests.exact import gamma_poisson, sgd_law


def test_the_cloud_is_the_stationary_law_of_sgd():
    exact.check_cloud_of_swag()


def test_the_rate_sets_the_width():
    exact.check_cloud_of_swag(rate=0.2, batch_size=20)


def test_conjugate_regression(regression):
    """One row a step: H and the noise differ from row to row, and the law is still linear algebra.

    The default rate is right on average over directions; each direction is not.
    """
    method = bnn.SWAG(
        restarts=16, batch_size=1, rank=200, collection=4_000, momentum=0.0, steps=500
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bnn.ConvergenceWarning)
        posterior = bnn.fit(regression.model, regression.x, regression.y, method=method, seed=1)
    x, y = regression.x.double().numpy(), regression.y.double().numpy()
    mean, cov = regression.mean.double().numpy(), regression.cov.double().numpy()
    matrices = np.eye(2) + 50 * x[:, :, None] * x[:, None, :]
    noise = matrices @ mean - 50 * x * y[:, None]
    assert np.allclose(noise.mean(0), 0, atol=1e-3)
    trace = np.square(noise).sum(1).mean()
    wanted = sgd_law(matrices, noise, 4 / trace, 0.0)
    # 64 gradients of one row each measure the noise: each restart's rate is some 20 % off
    scale = posterior.params["swag.scale"].double().square().mean(0).sqrt().numpy()
    ratio = scale / np.sqrt(np.diag(wanted))
    assert (np.abs(ratio - 1) < 0.15).all(), ratio
    # KL's best: tr(H S) = size. Along the sure direction twice too wide, across it too narrow.
    got = posterior.params["swag.deviations"].double()
    got = ((got.mT @ got).mean(0) / (method.rank - 1)).numpy()
    assert 0.7 < np.trace(np.linalg.solve(cov, got)) / 2 < 1.6
    sure, unsure = np.array([1.0, 1.0]) / math.sqrt(2), np.array([1.0, -1.0]) / math.sqrt(2)
    assert sure @ got @ sure > 1.3 * (sure @ cov @ sure)
    assert unsure @ got @ unsure < 0.5 * (unsure @ cov @ unsure)


def test_a_rate_that_is_too_low_is_told(regression):
    method = bnn.SWAG(collection_rate=1e-4, collection=1_000, batch_size=10, steps=2_000)
    with pytest.warns(bnn.ApproximationWarning, match=r"cloud has 0\..*proportional to"):
        bnn.fit(regression.model, regression.x, regression.y, method=method)


def test_a_rate_that_is_too_high_is_an_error(regression):
    method = bnn.SWAG(collection_rate=10.0, batch_size=10, steps=200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bnn.ConvergenceWarning)
        with pytest.raises(bnn.FitError, match=r"run away. Lower collection_rate"):
            bnn.fit(regression.model, regression.x, regression.y, method=method)


def test_restarts_are_clouds_at_modes_of_their_own():
    def two_modes(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w**2 * x, 0.3), obs=y)

    ones = torch.ones(20)
    y = 1 + 0.3 * torch.randn(20, generator=torch.Generator().manual_seed(0))
    method = bnn.SWAG(restarts=6, draws=50, collection=1_000, steps=2_000)
    w = bnn.fit(two_modes, ones, y, method=method, seed=1).draws["w"]
    assert w.shape == (6, 50)
    assert w.mean(1).min() < -0.9
    assert w.mean(1).max() > 0.9
    assert (w.std(1) < 0.2).all()
    assert len(set(w[:, 0].tolist())) == 6


@pytest.mark.filterwarnings("ignore::bnn.errors.ConvergenceWarning")
def test_a_plate_that_draws_its_rows_sees_all_of_them():
    """Ours would be twenty, of which it cannot draw thirty-two."""

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=32) as rows:
            pyro.sample("y", dist.Normal(w * x[rows], 1.0), obs=y[rows])

    x, y = torch.ones(200), torch.randn(200, generator=torch.Generator().manual_seed(0))
    method = bnn.SWAG(steps=1_000, collection=2_000)
    assert bnn.fit(model, x, y, method=method).draws["w"].shape == (1, 1_000)


def test_draws_of_a_positive_site_are_positive():
    y = torch.tensor([3.0, 1.0, 4.0, 2.0])
    posterior = bnn.fit(
        gamma_poisson, y, method=bnn.SWAG(batch_size=1, collection=1_000, steps=2_000)
    )
    rate = posterior.draws["rate"]
    assert (rate > 0).all()
    # the mode of log rate, Jacobian included: (2 + 10) / (1 + 4)
    assert abs(float(rate.log().mean()) - math.log(12 / 5)) < 0.2


def test_trainable_leftovers_are_fitted_and_held(regression):
    class Line(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.offset = torch.nn.Parameter(torch.tensor(0.0))

        def forward(self, x, y=None):
            w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(x @ w + self.offset, 1.0), obs=y)

    method = bnn.SWAG(steps=2_000, collection=500, batch_size=10, draws=50)
    posterior = bnn.fit(Line(), regression.x, regression.y + 3.0, method=method)
    assert abs(float(posterior.params["offset"]) - float(regression.y.mean()) - 3.0) < 0.1
    with pytest.raises(bnn.ModelError, match="each of its restarts its own values"):
        bnn.fit(Line(), regression.x, regression.y, method=bnn.SWAG(restarts=2))


def test_settings_are_checked(regression):
    with pytest.raises(ValueError, match="at most the iterates collected, 8"):
        bnn.SWAG(collection=100, every=10)
    with pytest.raises(ValueError, match=r"momentum=1.0"):
        bnn.SWAG(momentum=1.0)
    with pytest.raises(bnn.ModelError, match="noise of minibatches"):
        bnn.fit(regression.model, regression.x, regression.y, method=bnn.SWAG(batch_size=50))


def test_a_loader_that_passes_over_the_rows_is_refused(regression):
    """Its noise cancels over a pass, and the cloud would be far too narrow."""
    rows = torch.utils.data.TensorDataset(regression.x, regression.y)
    with pytest.raises(bnn.DataError, match="RandomSampler"):
        bnn.fit(
            regression.model,
            torch.utils.data.DataLoader(rows, batch_size=10, shuffle=True),
            method=bnn.SWAG(steps=20, collection=60, rank=3, draws=5),
        )
    afresh = torch.utils.data.RandomSampler(rows, replacement=True)
    loader = torch.utils.data.DataLoader(rows, batch_size=10, sampler=afresh)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior = bnn.fit(
            regression.model, loader, method=bnn.SWAG(steps=20, collection=60, rank=3, draws=5)
        )
    assert posterior.shape == (1, 5)
