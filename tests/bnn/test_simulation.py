"""Simulation-based calibration: of a posterior known exactly, of planted mistakes, of samplers."""

import json
import os
import random
import signal
import time
import warnings
from concurrent.futures import (
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
)
from dataclasses import dataclass
from multiprocessing import get_context, parent_process

import pyro
import pyro.distributions as dist
import pytest
import torch

import bnn
from bnn import CheckpointError, ConvergenceWarning, DataError, ModelError
from bnn.handlers import generator
from bnn.inference import _energy

X = torch.linspace(-2.0, 2.0, 12)
AT = torch.tensor([-0.7, 2.5])


def inputs():
    return X


def linear(x, y=None):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        f = pyro.deterministic("f", a + b * x)
        pyro.sample("y", dist.Normal(f, 1.0), obs=y)


def mortal(x, y=None):
    """Ends its process, in a worker."""
    if parent_process() is not None:
        time.sleep(random.SystemRandom().uniform(0.0, 2.0))  # one of them is the first
        os.kill(os.getpid(), signal.SIGKILL)
    linear(x, y)


def logistic(x, y=None):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        f = pyro.deterministic("f", a + b * x)
        pyro.sample("y", dist.Bernoulli(logits=f), obs=y)


def net(x, y=None):
    w, c, v = (
        pyro.sample(name, dist.Normal(0.0, 1.0).expand([2]).to_event(1)) for name in ("w", "c", "v")
    )
    with pyro.plate("data", len(x)):
        f = pyro.deterministic("f", torch.tanh(x[:, None] * w + c) @ v)
        pyro.sample("y", dist.Normal(f, 0.5), obs=y)


@dataclass(frozen=True, kw_only=True)
class Conjugate(bnn.Method):
    """Independent draws of the posterior of `linear`, by formula, and of wrong ones.

    The likelihood counts `power` times; draws are moved by `shift` and spread by `width`
    posterior standard deviations; `sticky` is the correlation of neighbouring draws.
    """

    power: float = 1.0
    shift: float = 0.0
    width: float = 1.0
    sticky: float = 0.0
    draws: int = 100

    def fit(self, model, data, sites, *, seed, progress):
        x, y = data.tensors
        design = torch.stack([torch.ones_like(x), x], -1)
        cov = torch.linalg.inv(torch.eye(2) + self.power * design.T @ design)
        mean = self.power * cov @ design.T @ y
        z = torch.randn(self.draws, 2, generator=generator(seed))
        for i in range(1, self.draws):
            z[i] = self.sticky * z[i - 1] + (1 - self.sticky**2) ** 0.5 * z[i]
        w = mean + (self.shift + self.width * z) @ torch.linalg.cholesky(cov).T
        draws = {"a": w[None, :, 0], "b": w[None, :, 1]}
        return bnn.Posterior(model=model, method=self, data=data, sites=sites, draws=draws)


def run(method=None, replicates=200, model=linear, **settings):
    settings = {"at": AT, "progress": False} | settings
    return bnn.sbc(model, method or Conjugate(), inputs, replicates, **settings)


@pytest.fixture(scope="module")
def right():
    return run()


def test_exact_draws_have_uniform_ranks(right):
    assert right.quantities == ("a", "b", "f[0]", "f[1]", "log_likelihood")
    assert right.ranks.shape == (200, 5)
    assert right.ranks.min() == 0
    assert right.ranks.max() == right.draws == 19
    assert right.uniform, right
    assert set(right.reading.values()) == {""}
    assert right.correlation.abs().max() < 4 / (200 * 18) ** 0.5
    assert right.warned == {}


def test_a_likelihood_counted_twice_is_too_narrow():
    result = run(Conjugate(power=2.0))
    assert not result.uniform
    assert result.reading["f[0]"] == "draws too narrow"


def test_data_ignored_are_seen_by_the_log_likelihood_alone():
    result = run(Conjugate(power=0.0))
    assert not result.uniform
    assert result.reading == dict.fromkeys(("a", "b", "f[0]", "f[1]"), "") | {
        "log_likelihood": "draws too low"
    }


def test_the_reading_says_what_is_wrong():
    assert run(Conjugate(shift=1.2), 60).reading["a"] == "draws too high"
    assert run(Conjugate(shift=-1.2), 60).reading["a"] == "draws too low"
    assert run(Conjugate(width=2.5), 60).reading["f[0]"] == "draws too wide"
    assert run(Conjugate(width=0.4), 60).reading["f[0]"] == "draws too narrow"


def test_a_replicate_depends_on_its_number_alone(right):
    assert torch.equal(run(replicates=5).ranks, right.ranks[:5])
    assert not torch.equal(run(replicates=5, seed=1).ranks, right.ranks[:5])
    again = bnn.sbc(linear, Conjugate(draws=99), inputs, 5, at=AT, draws=99, progress=False)
    assert again.ranks.max() > 19


def test_any_executor_gives_the_same_ranks(right, tmp_path):
    with ThreadPoolExecutor(3) as threads:
        assert torch.equal(run(replicates=8, executor=threads).ranks, right.ranks[:8])
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes:
        path = tmp_path / "sbc.jsonl"
        assert torch.equal(run(replicates=8, executor=processes, path=path).ranks, right.ranks[:8])
        assert len(path.read_text().splitlines()) == 9
        with pytest.raises(bnn.FitError, match=r"a worker ended over replicate [0-7] \("):
            run(replicates=8, model=mortal, executor=processes)


class Broken(Executor):
    """Whose workers are dead."""

    def submit(self, call, /, *args, **kwargs):
        future = Future()
        future.set_exception(BrokenExecutor("One was killed."))
        return future


def test_a_dead_worker_is_an_error_that_says_how_to_go_on():
    with pytest.raises(bnn.FitError, match=r"a worker ended .* One was killed\. With path="):
        run(replicates=2, executor=Broken())


def test_a_run_goes_on_where_it_ended(right, tmp_path, monkeypatch):
    path = tmp_path / "new" / "sbc.jsonl"
    run(replicates=4, path=path)
    whole = path.read_text()
    path.write_text(whole[:-20])  # cut off as the last line was written
    fitted = []
    fit = Conjugate.fit
    monkeypatch.setattr(Conjugate, "fit", lambda *a, **k: fitted.append(1) or fit(*a, **k))
    assert torch.equal(run(replicates=6, path=path).ranks, right.ranks[:6])
    assert len(fitted) == 3
    assert torch.equal(run(replicates=6, path=path).ranks, right.ranks[:6])
    assert len(fitted) == 3
    numbers = [json.loads(line)["replicate"] for line in path.read_text().splitlines()[5:]]
    assert numbers == [3, 4, 5]


def wider(x, y=None):
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        f = pyro.deterministic("f", a + b * x)
        pyro.sample("y", dist.Normal(f, 1.0), obs=y)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"method": Conjugate(power=2.0)}, r"method is .*power=1.0.* now it is .*power=2.0"),
        ({"draws": 9}, "draws is 19 and now it is 9"),
        ({"seed": 1}, "seed is 0 and now it is 1"),
        ({"at": X[:3]}, "its at is"),
        ({"sites": ["a"]}, "its sites is"),
        ({"model": wider}, "simulated data"),
    ],
)
def test_another_run_does_not_go_on_with_the_file(change, match, tmp_path):
    path = tmp_path / "sbc.jsonl"
    run(replicates=2, path=path)
    with pytest.raises(CheckpointError, match=match):
        run(**{"replicates": 2, "path": path} | change)


def test_a_file_of_something_else_is_left_alone(tmp_path):
    for text in ('{"a": 1}\n', "x,y\n1,2\n", "[1]\n[2]\n"):
        path = tmp_path / "data.csv"
        path.write_text(text)
        with pytest.raises(CheckpointError, match="path of its own"):
            run(replicates=1, path=path)
        assert path.read_text() == text
    with pytest.raises(CheckpointError, match="Cannot"):
        run(replicates=1, path=tmp_path)


def test_related_draws_are_warned_of():
    method = Conjugate(sticky=0.9, draws=40)
    with pytest.warns(ConvergenceWarning, match='of "f.*" are correlated'):
        result = run(method, replicates=20)
    assert result.correlation.min() > 0.3  # .81, and as much less as so few draws show


def test_warnings_of_fits_are_counted(monkeypatch):
    fit = Conjugate.fit

    def loud(self, model, data, *args, **kwargs):
        if float(data.observations[0]) > 0:
            warnings.warn("not there yet", ConvergenceWarning, stacklevel=1)
        return fit(self, model, data, *args, **kwargs)

    monkeypatch.setattr(Conjugate, "fit", loud)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = run(replicates=6)
    assert 0 < result.warned["ConvergenceWarning"] < 6
    assert "x ConvergenceWarning" in repr(result)


def test_what_is_ranked():
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        rate = pyro.sample("rate", dist.Gamma(2.0, torch.ones(1)).to_event(1))
        with pyro.plate("data", len(x)):
            logits = pyro.deterministic("f", x[:, None] * w, event_dim=1)
            local = pyro.sample("local", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Categorical(logits=logits * (rate + local.exp()[:, None])), obs=y)

    method = bnn.SVI(steps=3, draws=20)
    settings = {"replicates": 2, "progress": False, "draws": 5}
    result = bnn.sbc(model, method, lambda: torch.randn(4), **settings)
    f = tuple(f"f[{row}, {k}]" for row in range(3) for k in range(2))
    assert result.quantities == ("rate", *f, "log_likelihood")
    result = bnn.sbc(model, method, inputs, sites=["w"], at=AT[:1], **settings)
    assert result.quantities == ("w[0]", "w[1]", "f[0, 0]", "f[0, 1]", "log_likelihood")


def test_a_model_without_inputs():
    def model(y=None):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Poisson(rate), obs=y)

    method = bnn.Laplace(steps=20)
    result = bnn.sbc(model, method, tuple, 2, progress=False)
    assert result.quantities == ("rate", "f[0]", "f[1]", "f[2]", "log_likelihood")


def learned(x, y=None):
    a = pyro.param("a", torch.zeros(()))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(a + b * x, 1.0), obs=y)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: run(Conjugate(draws=10)), DataError, r"has 10. Pass sbc\(..., draws=10\)"),
        (lambda: run(sites=["sigma"]), ModelError, r"no global site \['sigma'\]; it has a, b"),
        (lambda: run(bnn.MAP(steps=2), model=learned), ModelError, "have none: a"),
        (lambda: run(replicates=0), ValueError, "at least 1"),
        (lambda: run("nuts"), TypeError, "bnn.NUTS"),
        (lambda: bnn.sbc(linear, Conjugate(), X), TypeError, "lambda: x"),
        (
            lambda: bnn.sbc(linear, Conjugate(), lambda: (X, X)),
            ModelError,
            "2 positional arguments",
        ),
    ],
)
def test_what_cannot_be_simulated_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_an_error_says_in_which_replicate(monkeypatch):
    def broken(*args, **kwargs):
        raise bnn.FitError("no")

    monkeypatch.setattr(Conjugate, "fit", broken)
    with pytest.raises(bnn.FitError) as caught:
        run()
    assert caught.value.__notes__ == ["in replicate 0 of SBC, seed 0"]


def test_draws_that_are_no_numbers_have_no_rank():
    with pytest.raises(bnn.FitError, match='"a" is not a number') as caught:
        run(Conjugate(width=float("nan")))
    assert "replicate 0" in caught.value.__notes__[0]


def test_the_table_and_the_numbers_are_the_same(right):
    made = json.loads(json.dumps(right.to_dict()))
    assert made["uniform"] is True
    assert list(made["quantities"]) == list(right.quantities)
    text = repr(right)
    assert text.startswith("SBC(200 replicates, ranks among 19 draws: uniform, p = ")
    for name, each in made["quantities"].items():
        (line,) = [line for line in text.splitlines() if line.strip().startswith(name + " ")]
        assert f"{each['ecdf_p']:.2g}" in line


# Samplers -----------------------------------------------------------------------------------------

SAMPLERS = {"NUTS": bnn.NUTS(chains=4, warmup=100, draws=150), "MCLMC": bnn.MCLMC()}
PROBLEMS = {"linear": linear, "logistic": logistic, "net": net}


@pytest.mark.slow
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_ranks_of_a_sampler_are_uniform(name, problem):
    result = run(SAMPLERS[name], model=PROBLEMS[problem])
    assert result.p > 1e-3, result
    assert result.correlation.max() < 0.2, result


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_samplers_likelihood_counted_twice_is_seen(name, monkeypatch):
    plain = _energy.Energy.terms

    def twice(self, *args, **kwargs):
        likelihood, prior = plain(self, *args, **kwargs)
        return 2 * likelihood, prior

    monkeypatch.setattr(_energy.Energy, "terms", twice)
    assert run(SAMPLERS[name]).p < 1e-3
