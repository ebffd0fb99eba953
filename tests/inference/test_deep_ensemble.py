import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.optimize import minimize
from torch.utils.data import DataLoader, TensorDataset

import bnn
from bnn.data import Data
from bnn.inference._ensemble import BOOTSTRAPS, bootstrap
from bnn.inference._members import Members
from bnn.inference._snapshots import Snapshots
from bnn.inference.deep_ensemble import against
from tests import exact
from tests.exact import Waves

SHORT = {"steps": 1_000, "learning_rate": 0.05, "schedule": "cosine"}


def test_members_of_a_model_with_one_mode_have_no_spread_and_it_is_said(regression):
    with pytest.warns(bnn.ConvergenceWarning, match="the posterior has no variance") as caught:
        posterior = bnn.fit(
            regression.model, regression.x, regression.y, method=bnn.DeepEnsemble(**SHORT)
        )
    assert [each.filename for each in caught] == [__file__]  # once
    w = posterior.draws["w"]
    assert w.shape == (1, 5, 2)
    assert (w[0].std(0) < 1e-3 * regression.sd).all()
    assert ((w[0] - regression.mean).abs() < 0.01 * regression.sd).all()


@pytest.mark.parametrize("kind", BOOTSTRAPS)
def test_weights_of_a_bootstrap_follow_their_law(kind):
    """Means and variances over 1e5 weights: their standard errors are .003 and at most .009."""
    seed = np.random.SeedSequence(3)
    weights = bootstrap(kind, 200, 500, seed)["weights"]
    assert weights.shape == (200, 500)
    assert abs(float(weights.mean()) - 1) < 4 * 0.0032
    assert abs(float(weights.var()) - 1) < 4 * 0.009
    assert (weights >= 0).all()
    assert torch.equal(bootstrap(kind, 3, 500, seed)["weights"], weights[:3])
    if kind == "bernoulli":
        assert set(weights.unique().tolist()) == {0.0, 2.0}
    elif kind == "resample":
        assert torch.equal(weights, weights.round())
        assert (weights.sum(1) == 500).all()
        assert abs(float((weights == 0).float().mean()) - math.exp(-1)) < 0.01
    else:
        assert abs(float((weights > 1).float().mean()) - math.exp(-1)) < 0.01


@pytest.mark.parametrize("kind", BOOTSTRAPS)
def test_each_member_is_the_mode_under_its_weights(kind):
    exact.check_bootstrap_by_deep_ensemble(kind, **SHORT)


def test_minibatches_of_weighted_rows_reach_the_same_modes():
    exact.check_bootstrap_by_deep_ensemble("exponential", batch_size=10, **SHORT)


@pytest.mark.parametrize("count", [1, 3])
def test_what_belongs_to_a_row_comes_with_it(count):
    x = torch.arange(10.0)
    own = x + 100 * torch.arange(float(count))[:, None]
    data = Data((x[:, None], -x), ("x", "y"), rows=10)
    members = Members(count, None, lambda z: z, data, 4, {"own": own})  # type: ignore[arg-type]
    orders = []
    for inputs, y, mine in itertools.islice(members.batches(np.random.SeedSequence(0)), 5):
        if count > 1:
            assert inputs.shape == (3, 4, 1)
            assert torch.equal(mine, inputs[..., 0] + 100 * torch.arange(3.0)[:, None])
            assert not torch.equal(y[0], y[1])
        else:
            assert torch.equal(mine, inputs[:, 0])
        assert torch.equal(inputs[..., 0], -y)
        orders.append(y)
    assert not torch.equal(orders[0], orders[1])


def test_an_input_moves_against_its_own_slope():
    """y ~ N(x w, 1): d(-log p)/dx = -(y - x w) w, in a row that weighs nothing it is 0."""
    x, y, w = torch.randn(6, 2), torch.randn(6), torch.tensor([0.5, -2.0])
    reach = torch.tensor([0.1, 0.3])
    weights = torch.tensor([1.0, 2.0, 0.0, 1.0, 1.0, 1.0])
    likelihood = lambda x, y: (weights * dist.Normal(x @ w, 1.0).log_prob(y)).sum()
    moved, same = against(likelihood, (x, y), [reach])
    residual = (y - x @ w)[:, None]
    torch.testing.assert_close(moved, x - reach * (residual * w).sign() * (weights > 0)[:, None])
    assert same is y


def test_adversarial_optimum_of_a_linear_model(regression):
    """|residual| grows by sum_j reach_j |w_j| in every row: minimised here by simplex."""
    x, y, fraction = regression.x.double().numpy(), regression.y.double().numpy(), 0.05
    reach = fraction * (x.max(0) - x.min(0))

    def loss(w):
        residual = np.abs(y - x @ w)
        return (residual**2 + (residual + reach @ np.abs(w)) ** 2).sum() / 4 + (w**2).sum() / 2

    best = minimize(loss, regression.mean.numpy(), method="Nelder-Mead", tol=1e-10).x
    method = bnn.DeepEnsemble(members=2, adversarial=fraction, **SHORT)
    with pytest.warns(bnn.ConvergenceWarning, match="the posterior has no variance"):
        posterior = bnn.fit(regression.model, regression.x, regression.y, method=method)
    found = posterior.draws["w"][0, 0].numpy()
    assert abs(found - best).max() < 0.02 * regression.sd.min()
    assert abs(best - regression.mean.numpy()).max() > regression.sd.min()


def test_heteroscedastic_nets_know_noise_and_their_own_ignorance():
    """Oracle: the law that made the data. Rows between -7 and 7, f asked for up to 10."""
    train = Waves.make(np.linspace(-7, 7, 300))
    test = Waves.make(np.linspace(-5, 5, 2_001), seed=1)
    model = bnn.models.mlp_regression(
        1,
        (64, 64),
        activation="relu",
        likelihood=bnn.models.likelihoods.Gaussian("predicted"),
        standardize=(train.x, train.y),
    )
    method = bnn.DeepEnsemble(steps=900, batch_size=50, learning_rate=0.01, schedule="cosine")
    posterior = bnn.fit(model, train.x, train.y, method=method)
    x = np.linspace(-10, 10, 201)
    prediction = posterior.predict(x[:, None])
    noise, ignorance = (v.sqrt().numpy() for v in (prediction.aleatoric, prediction.epistemic))
    inside = np.abs(x) < 6
    assert np.corrcoef(noise[inside], Waves.sd(x[inside]))[0, 1] > 0.9
    assert test.log_score() - float(posterior.log_score(test.x, test.y).mean()) < 0.15
    assert ignorance[np.abs(x) >= 9].mean() > 3 * ignorance[np.abs(x) < 5].mean()


def net(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
    with pyro.plate("data", len(x)):
        f = pyro.deterministic("f", torch.tanh(x * w[0] + w[1]) * w[2] + w[3])
        pyro.sample("y", dist.Normal(f, 0.1), obs=y)


X = torch.linspace(-2, 2, 30)
Y = torch.sin(2 * X)


def test_an_ensemble_is_the_mixture_of_its_members():
    """Moments and negative log density against draws of y at one row; bounds are 4 errors."""
    method = bnn.DeepEnsemble(members=3, steps=20, schedule="constant")
    with pytest.warns(bnn.ConvergenceWarning, match="still rising"):
        posterior = bnn.fit(net, X, Y, method=method)
    x = torch.full((20_000,), 1.5)
    prediction = posterior.predict(x)
    y = prediction.y.flatten().double()  # as many of each member
    variance = float((prediction.aleatoric + prediction.epistemic)[0])
    assert float(prediction.epistemic[0]) > 4 * float(prediction.aleatoric[0])
    assert abs(float(y.mean() - prediction.mean[0])) < 4 * math.sqrt(variance / len(y))
    squares = (y - y.mean()).square()
    assert abs(float(squares.mean()) - variance) < 4 * float(squares.std()) / math.sqrt(len(y))
    grid = torch.linspace(float(y.min()) - 0.5, float(y.max()) + 0.5, 20_000)
    density = posterior.log_score(x, grid).double()
    mass = density.exp() * float(grid[-1] - grid[0]) / (len(grid) - 1)
    assert float(mass.sum()) == pytest.approx(1, abs=1e-4)
    found = -torch.cat([posterior.log_score(x, each) for each in prediction.y.flatten(0, 1)])
    found = found.double()
    wanted = -float((mass * density).sum())
    assert abs(float(found.mean()) - wanted) < 4 * float(found.std()) / math.sqrt(len(found))


@pytest.mark.filterwarnings("ignore::bnn.errors.ApproximationWarning")
def test_frames_are_posteriors_on_the_way(tmp_path):
    method = bnn.DeepEnsemble(members=3, steps=200, snapshots=10, schedule="constant")
    posterior = bnn.fit(net, X, Y, method=method)
    frames = posterior.frames
    steps = [len(frame.history) for frame in frames]
    assert len(frames) == 10
    assert steps[0] == 0
    assert steps[-1] == 200
    assert max(np.diff(steps)) <= 2 * min(np.diff(steps))
    assert torch.equal(frames[-1].draws["w"], posterior.draws["w"])
    errors = [float((frame.predict(X).mean - Y).square().mean()) for frame in frames]
    assert errors[-1] < 0.6 * errors[0]
    posterior.save(tmp_path / "fit")
    loaded = bnn.load(tmp_path / "fit", net)
    assert [len(frame.history) for frame in loaded.frames] == steps
    assert torch.equal(loaded.frames[4].predict(X).y, frames[4].predict(X).y)
    again = bnn.fit(net, X, Y, method=bnn.DeepEnsemble(members=3, steps=200, schedule="constant"))
    assert torch.equal(again.draws["w"], posterior.draws["w"])
    assert again.frames == []


@pytest.mark.parametrize("steps", [1, 3, 7, 40, 41, 1_000])
def test_snapshots_lie_evenly_however_many_steps_come(steps):
    value = torch.zeros(1)
    snapshots = Snapshots(value, 5)
    for step in range(steps + 1):
        value.fill_(step)
        snapshots(step)
        assert len(snapshots.kept) <= 20
    taken, copies = snapshots.picked()
    assert torch.equal(taken, copies[:, 0].long())
    assert (taken[0], taken[-1]) == (0, steps)
    assert len(taken) == min(5, steps + 1)
    assert taken.diff().min() >= 0.6 * steps // 4


def test_one_snapshot_is_the_last():
    snapshots = Snapshots(torch.zeros(1), 1)
    for step in range(4):
        snapshots(step)
    assert snapshots.picked()[0].tolist() == [3]


def test_one_member_is_a_mode(regression):
    method = bnn.DeepEnsemble(members=1, snapshots=4, bootstrap="resample", **SHORT)
    posterior = bnn.fit(regression.model, regression.x, regression.y, method=method)
    assert posterior.draws["w"].shape == (1, 1, 2)
    assert posterior.frames[2].draws["w"].shape == (1, 1, 2)


@pytest.mark.filterwarnings("ignore::bnn.errors.ConvergenceWarning")
def test_a_loader_gives_its_batches_to_all(regression):
    loader = DataLoader(TensorDataset(regression.x, regression.y), batch_size=25)
    method = bnn.DeepEnsemble(members=2, steps=30)
    assert bnn.fit(regression.model, loader, method=method).shape == (1, 2)
    for refused in ({"bootstrap": "resample"}, {"adversarial": 0.01}):
        with pytest.raises(bnn.DataError, match="Pass tensors"):
            bnn.fit(regression.model, loader, method=bnn.DeepEnsemble(**refused))


def test_what_cannot_be_weighed_is_refused(regression):
    def subsampled(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x), subsample_size=10) as rows:
            pyro.sample("y", dist.Normal(x[rows] @ w, 1.0), obs=None if y is None else y[rows])

    def no_plate(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("y", dist.Normal(x @ w, 1.0).to_event(1), obs=y)

    def leftover(x, y=None):
        scale = pyro.param("scale", torch.ones(()))
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, scale), obs=y)

    data = regression.x, regression.y
    for model, cure in ((subsampled, "batch_size"), (no_plate, "pyro.plate")):
        with pytest.raises(bnn.ModelError, match=cure):
            bnn.fit(model, *data, method=bnn.DeepEnsemble(bootstrap="bernoulli"))
    with pytest.raises(bnn.ModelError, match="batch_size"):
        bnn.fit(subsampled, *data, method=bnn.DeepEnsemble(adversarial=0.01))
    with pytest.raises(bnn.ModelError, match=r"scale.*Give them a prior"):
        bnn.fit(leftover, *data, method=bnn.DeepEnsemble())


def test_adversarial_training_needs_real_inputs():
    def table(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w[x], 1.0), obs=y)

    with pytest.raises(bnn.ModelError, match="real inputs"):
        bnn.fit(table, [0, 1, 2], [0.1, 0.2, 0.3], method=bnn.DeepEnsemble(adversarial=0.01))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"members": 0}, ValueError),
        ({"members": 2.5}, TypeError),
        ({"bootstrap": "jackknife"}, ValueError),
        ({"adversarial": -0.1}, ValueError),
        ({"snapshots": -1}, ValueError),
    ],
)
def test_settings_are_checked(settings, error):
    with pytest.raises(error, match=next(iter(settings))):
        bnn.DeepEnsemble(**settings)
