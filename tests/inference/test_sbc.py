"""Simulation-based calibration: samplers against models that no formula solves, by ranks.

For (theta, y) from the model, the rank of q(theta) among draws of q | y is uniform if the draws are
of the posterior: whatever q (Talts et al. 2018, Validating Bayesian inference algorithms with
simulation-based calibration). q = the function at two points and the log likelihood, which sees
mistakes that functions of theta alone miss (Modrak et al. 2023).

Building a fit costs more than its draws, so one fit takes `ABREAST` data sets: its model is their
product, whose posterior is the product of theirs, and chains of it are chains of each.
"""

from collections.abc import Callable
from dataclasses import dataclass

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor

import bnn
from bnn.handlers import quiet_pyro, seeded
from bnn.inference import _energy

SETS, ABREAST = 200, 20
DRAWS = 19  # near-independent draws of each posterior: ranks 0 to 19, two to a bin
BINS = 10
# Of a false alarm, for one sampler over all models and quantities: seeds are fixed, so this is the
# chance that a change of the draws turns a right sampler red.
ALARM = 1e-3

X = torch.linspace(-2.0, 2.0, 12)
TEST = torch.tensor([-0.7, 2.5])


@dataclass(frozen=True)
class Problem:
    """A prior, a function of it and a likelihood, for as many data sets as are in the last axis."""

    prior: dict[str, tuple[int, ...]]  # sites, all N(0, 1), without the axis of data sets
    function: Callable[[dict[str, Tensor], Tensor], Tensor]  # -> (*lead, row, set)
    noise: Callable[[Tensor], dist.TorchDistribution]

    def model(self, count: int):
        def product(x, y=None):
            draw = {
                name: pyro.sample(
                    name, dist.Normal(0.0, 1.0).expand([*shape, count]).to_event(len(shape) + 1)
                )
                for name, shape in self.prior.items()
            }
            with pyro.plate("data", len(x)):
                f = pyro.deterministic("f", self.function(draw, x), event_dim=1)
                pyro.sample("y", self.noise(f).to_event(1), obs=y)

        return product

    def quantities(self, draw: dict[str, Tensor], y: Tensor) -> Tensor:
        """Function values at the test points and the log likelihood, (*lead, quantity, set)."""
        fit = self.noise(self.function(draw, X)).log_prob(y).sum(-2, keepdim=True)
        return torch.cat([self.function(draw, TEST), fit], -2)


def straight(draw: dict[str, Tensor], x: Tensor) -> Tensor:
    return draw["a"][..., None, :] + draw["b"][..., None, :] * x[:, None]


def net(draw: dict[str, Tensor], x: Tensor) -> Tensor:
    inner = draw["w"][..., None, :, :] * x[:, None, None] + draw["c"][..., None, :, :]
    return (draw["v"][..., None, :, :] * torch.tanh(inner)).sum(-2)


PROBLEMS = {
    "linear": Problem({"a": (), "b": ()}, straight, lambda f: dist.Normal(f, 1.0)),
    "logistic": Problem({"a": (), "b": ()}, straight, lambda f: dist.Bernoulli(logits=f)),
    "net": Problem({"w": (2,), "c": (2,), "v": (2,)}, net, lambda f: dist.Normal(f, 0.5)),
}
QUANTITIES = len(TEST) + 1
SAMPLERS = {"NUTS": {"chains": 4, "warmup": 100, "draws": 150}, "MCLMC": {}}


def ranks(problem: Problem, method: bnn.Method) -> np.ndarray:
    """Ranks of the truth among the draws, 0 to DRAWS, (quantity, data set)."""
    model, found = problem.model(ABREAST), []
    for fit in range(SETS // ABREAST):
        with quiet_pyro(), seeded(np.random.SeedSequence((2024, fit))):
            trace = pyro.poutine.trace(model).get_trace(X, None)
        truth = {name: trace.nodes[name]["value"] for name in problem.prior}
        y = trace.nodes["y"]["value"]
        posterior = bnn.fit(model, X, y, method=method, seed=fit, progress=False)
        drawn = problem.quantities(posterior.draws, y).double().numpy()
        exact = problem.quantities(truth, y).double().numpy()
        found.append((thinned(drawn) < exact).sum(0))
    return np.concatenate(found, 1)


def thinned(values: np.ndarray) -> np.ndarray:
    """DRAWS draws evenly spread over all, (chain, draw, *) -> (DRAWS, *), if so many are worth it.

    Three effective draws lie between neighbours, even where mixing is worst: then their
    correlation is below exp(-2 x 3) in an autoregression.
    """
    columns = values.reshape(*values.shape[:2], -1)
    worst = min(float(az.ess(columns[:, :, i])) for i in range(columns.shape[2]))
    assert worst > 3 * DRAWS, f"effective sample size {worst:.0f}: draw more to thin"
    flat = values.reshape(-1, *values.shape[2:])
    return flat[np.linspace(0, len(flat) - 1, DRAWS).round().astype(int)]


def p_values(found: np.ndarray) -> np.ndarray:
    """Of uniform ranks, by chi-square over bins, (quantity,)."""
    bins = found * BINS // (DRAWS + 1)
    counts = np.stack([np.bincount(row, minlength=BINS) for row in bins])
    return stats.chisquare(counts, axis=1).pvalue


def sampler(name: str) -> bnn.Method:
    kind = getattr(bnn, name, None)
    if kind is None:
        pytest.skip(f"there is no bnn.{name}")
    return kind(**SAMPLERS[name])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::bnn.errors.ConvergenceWarning")  # thinning asks for the ESS
@pytest.mark.parametrize("kind", PROBLEMS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_ranks_are_uniform(name, kind):
    p = p_values(ranks(PROBLEMS[kind], sampler(name)))
    assert p.min() > ALARM / (len(PROBLEMS) * QUANTITIES), p


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::bnn.errors.ConvergenceWarning")
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_likelihood_counted_twice_is_seen(name, monkeypatch):
    plain = _energy.Energy.terms

    def twice(self, *args, **kwargs):
        likelihood, prior = plain(self, *args, **kwargs)
        return 2 * likelihood, prior

    monkeypatch.setattr(_energy.Energy, "terms", twice)
    p = p_values(ranks(PROBLEMS["linear"], sampler(name)))
    assert p.min() < ALARM / (len(PROBLEMS) * QUANTITIES), p
