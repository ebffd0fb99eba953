"""The how-to's method, written outside the package: exact on a linear model, by public names."""

import ast
import inspect
import warnings

import own_method
import pyro
import pyro.distributions as dist
import pytest
import torch
from own_method import Metropolis

import bnn
from tests.exact import Regression, assert_exact

SHORT = Metropolis(warmup=400, draws=60)


def check_regression() -> None:
    exact = Regression.make()
    posterior = bnn.fit(exact.model, exact.x, exact.y, method=SHORT, seed=0, progress=False)
    assert_exact(posterior.draws["w"], exact.mean, exact.sd)


def test_it_is_exact():
    check_regression()


def test_the_check_sees_a_ratio_that_counts_half(monkeypatch):
    """log u^2 < ratio: the stationary law is the posterior's square root, sds 1.41 times."""
    uniform = torch.rand
    monkeypatch.setattr(own_method.torch, "rand", lambda *a, **k: uniform(*a, **k) ** 2)
    with pytest.raises(AssertionError, match="sd ratios"):
        check_regression()


def test_it_needs_no_gradient():
    """A step in w: P(w > 0 | y) = p(y | 1) / (p(y | 0) + p(y | 1)), and no gradient tells it."""

    def step(y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal((w > 0).to(w.dtype), 2.0), obs=y)

    y = torch.tensor([1.0, 0.5, 2.0])
    each = [dist.Normal(mean, 2.0).log_prob(y).sum() for mean in (0.0, 1.0)]
    exact = torch.stack(each).softmax(0)[1]
    posterior = bnn.fit(step, y, method=SHORT, progress=False)
    share = (posterior.draws["w"] > 0).double()
    assert_exact(share, exact, (exact * (1 - exact)).sqrt(), ratio=(0.9, 1.1))


def test_it_is_kept_and_loaded(tmp_path):
    exact = Regression.make()
    method = Metropolis(chains=2, warmup=50, draws=10, thin=1)
    fit = lambda: bnn.fit(exact.model, exact.x, exact.y, method=method, checkpoint=tmp_path / "run")
    with warnings.catch_warnings(action="ignore"):  # so short a run does not converge
        first = fit()
    assert torch.equal(fit().draws["w"], first.draws["w"])  # read, not run
    again = bnn.load(tmp_path / "run", exact.model)
    assert again.method == method
    assert torch.equal(again.predict(exact.x).y, first.predict(exact.x).y)


def test_it_refuses_what_it_cannot_do():
    exact = Regression.make()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(exact.x, exact.y), 10)
    with pytest.raises(bnn.DataError, match="Metropolis needs all rows"):
        bnn.fit(exact.model, loader, method=Metropolis())
    with pytest.raises(ValueError, match="at least 1"):
        Metropolis(thin=0)


def test_it_is_short_and_knows_public_names_only():
    tree = ast.parse(inspect.getsource(own_method))
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names = [each for node in froms for each in node.module.split(".")]
    names += [alias.name for node in froms for alias in node.names]
    assert not [name for name in names if name.startswith("_")]
    (fit,) = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "fit")
    assert fit.end_lineno - fit.lineno <= 42
