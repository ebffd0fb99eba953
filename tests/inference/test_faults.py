"""What is not finite: a step is left out, the fit goes back, and what goes on failing is named."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

import bnn
from bnn.inference import _step
from bnn.inference._optimise import Ascent, maximise

X = torch.linspace(-1, 1, 30)
Y = 2 * X


def ascend(objective, z, rate, steps=400, **more):
    settings = Ascent(steps=steps, learning_rate=rate, schedule="constant")
    endless = iter(lambda: (), None)
    return maximise(
        objective, {"z": z}, endless, settings, what="F", label="f", progress=False, **more
    )


def cliff(leaves, batch, weight, noise):
    """Largest at 0.9, and not a number from 1 on."""
    z = leaves["z"]
    return torch.where(z < 1, -((z - 0.9) ** 2), torch.nan).sum(-1)


def test_a_step_over_an_edge_is_taken_back():
    """Where it lies, no rate would help: every step from there on is from NaN."""
    z = torch.zeros(1)
    (history,) = ascend(cliff, z, 0.3)
    assert torch.isfinite(history).all()
    assert abs(float(z) - 0.9) < 0.02


def test_and_would_not_be_without_going_back(monkeypatch):
    monkeypatch.setattr(_step.Step, "_go_back", lambda *_: None)
    with pytest.raises(bnn.FitError, match="three times"):
        ascend(cliff, torch.zeros(1), 0.3)


def test_a_member_goes_back_alone():
    starts = torch.tensor([[0.0], [0.5], [-3.0]])
    alone = []
    for start in starts:
        z = start.clone()[None].repeat(2, 1)
        ascend(cliff, z, 0.3, members=2)
        alone.append(z[0])
    together = starts.clone()
    ascend(cliff, together, 0.3, members=3)
    assert torch.equal(together, torch.stack(alone))


def test_an_edge_that_is_met_again_and_again_is_told():
    """The maximum lies behind it."""

    def objective(leaves, batch, weight, noise):
        z = leaves["z"]
        return torch.where(z < 1, z, torch.nan).sum()

    z = torch.zeros(1)
    with pytest.raises(bnn.FitError, match="not finite 10 times"):
        ascend(objective, z, 0.03, steps=3_000)
    with pytest.warns(bnn.ConvergenceWarning, match="edge of what is finite"):
        (history,) = ascend(objective, torch.zeros(1), 0.03, steps=150)
    assert torch.isfinite(history).all()


def broken(x, y=None):
    """The scale of y is no number where w is above 1.5, as it is at the mode."""
    w = pyro.sample("w", dist.Normal(0.0, 0.3))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        f = torch.where(w > 1.5, torch.nan, w) * x
        pyro.sample("target", dist.Normal(f, scale), obs=y)


@pytest.mark.parametrize(
    "method",
    [
        bnn.MAP(learning_rate=0.5),
        bnn.MAP(learning_rate=0.5, restarts=2, batch_size=10),
        bnn.SVI(learning_rate=0.5),
        bnn.DeepEnsemble(learning_rate=0.5, members=3),
        bnn.Laplace(learning_rate=0.5),
        bnn.SGHMC(batch_size=10),
        bnn.SWAG(learning_rate=0.5),
    ],
    ids=repr,
)
def test_the_site_and_the_step_are_named(method, monkeypatch):
    stay = lambda step, bad, before: setattr(step, "lost", step._present()["leaves"])
    monkeypatch.setattr(_step.Step, "_go_back", stay)  # so that it fails for good
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(bnn.FitError) as caught:
            bnn.fit(broken, X, Y, method=method)
    assert caught.value.site == "target"
    assert caught.value.step is not None


def test_no_draw_of_a_sampler_is_poisoned():
    """Where there is no density no trajectory ends, and those that come there are divergences."""
    short = {"warmup": 30, "draws": 20}
    for method in (bnn.NUTS(chains=2, max_tree_depth=5, **short), bnn.MCLMC(chains=4, **short)):
        with pytest.warns(bnn.ConvergenceWarning, match="divergence"):
            posterior = bnn.fit(broken, X, Y, method=method)
        assert all(torch.isfinite(v).all() for v in posterior.draws.values())
        assert (posterior.draws["w"] <= 1.5).all()
