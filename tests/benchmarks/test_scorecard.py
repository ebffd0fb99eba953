"""The scorecard's distances against closed forms, and its file of results."""

import argparse
import functools
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import bnn
from benchmarks import scorecard

ROOT = Path(__file__).parents[2]
X = np.linspace(-1, 1, 5, dtype=np.float32)


def at(model, y, **draws):
    """A posterior of given draws, (draw,) each."""
    method = bnn.MAP(steps=1, draws=1, schedule="constant")
    posterior = bnn.fit(model, X, y, method=method, progress=False)
    return replace(posterior, draws={k: torch.tensor(v)[None] for k, v in draws.items()})


def normal(x, y=None):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(a + 0.0 * x, 0.5), obs=y)


def labels(x, y=None):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=a + 0.0 * x), obs=y)


@pytest.mark.filterwarnings("ignore::bnn.errors.ConvergenceWarning")
def test_distances_of_gaussian_predictives():
    one, other = at(normal, X, a=[0.3]), at(normal, X, a=[-0.1])
    found = scorecard.distances(one, other, X)
    # TV of N(m, s) and N(m + d, s): 2 Phi(d / 2s) - 1; W1: d
    assert found["tv"] == pytest.approx(math.erf(0.4 / (2 * 0.5) / math.sqrt(2)), abs=1e-3)
    assert found["w1"] == pytest.approx(0.4, rel=1e-2)
    assert scorecard.distances(one, one, X) == {"tv": 0.0, "w1": 0.0}
    far = at(normal, X, a=[5.0])
    assert scorecard.distances(one, far, X)["tv"] == pytest.approx(1.0, abs=1e-3)
    mixed = at(normal, X, a=[5.0, 0.3])  # half of its mass is where all of the other's is
    assert scorecard.distances(one, mixed, X)["tv"] == pytest.approx(0.5, abs=1e-3)
    assert scorecard.distances(one, mixed, X)["w1"] == pytest.approx(4.7 / 2, rel=1e-2)


@pytest.mark.filterwarnings("ignore::bnn.errors.ConvergenceWarning")
def test_distances_of_labels():
    approx = functools.partial(pytest.approx, abs=1e-5)
    y = np.array([0, 1, 0, 1, 1])
    one, other = at(labels, y, a=[0.0, 2.0]), at(labels, y, a=[-1.0])
    p, q = np.mean([0.5, 1 / (1 + math.exp(-2))]), 1 / (1 + math.exp(1))
    found = scorecard.distances(one, other, X)
    # all draws of one are above the other's, and so the distance is that of the means
    assert found == {"tv": approx(p - q), "w1": approx(p - q), "agreement": 0.0}
    wide, narrow = at(labels, y, a=[-2.0, 2.0]), at(labels, y, a=[0.0])
    found = scorecard.distances(wide, narrow, X)  # means of 1/2: only the draws differ
    assert found["tv"] == approx(0.0)
    assert found["w1"] == approx(1 / (1 + math.exp(-2)) - 0.5)
    found = scorecard.scores(one, X, y)
    assert found["nll"] == approx(-(3 * math.log(p) + 2 * math.log(1 - p)) / 5)
    assert found["coverage"] == 1.0  # p is below .9, so that a set has both labels
    sure = scorecard.scores(at(labels, y, a=[5.0]), X, y)
    assert sure["coverage"] == approx(0.6)


@pytest.mark.filterwarnings("ignore::bnn.errors.ConvergenceWarning")
def test_scores_of_a_gaussian_predictive():
    """Draws of y ~ N(.3, .5): log density in closed form, and 90 % intervals of .3 +- .822."""
    y = np.array([0.3, 0.3 + 0.7, 0.3 + 0.95, 0.3 - 0.7, 0.3 - 0.95], dtype=np.float32)
    found = scorecard.scores(at(normal, y, a=[0.3]), X, y)
    squares = (2 * 0.7**2 + 2 * 0.95**2) / 5
    exact = 0.5 * math.log(2 * math.pi * 0.25) + squares / (2 * 0.25)
    assert found["nll"] == pytest.approx(exact, abs=1e-5)
    assert found["coverage"] == pytest.approx(0.6)


def test_quality_is_of_the_worst_row():
    noise = np.random.default_rng(0).normal(size=(4, 500, 3))
    noise[0, :, 1] += 1.0  # chains part at one row

    class Posterior:
        def predict(self, x):
            return argparse.Namespace(f=torch.tensor(noise))

    found = scorecard.quality(Posterior(), X)
    assert found["rhat"] > 1.05
    assert found["ess"] < 200


def test_a_run_tells_what_the_fit_warned_of():
    problem = scorecard.PROBLEMS["line"]
    x, y, *_ = problem.split()
    short = bnn.MAP(steps=60, draws=1)
    with pytest.warns(bnn.ConvergenceWarning):
        against = bnn.fit(problem.model(), x, y, method=short, progress=False)
    found = scorecard.run(problem, short, against, 0)
    assert found["warned"] == ["ConvergenceWarning"]
    assert found["seconds"] > 0


@pytest.mark.parametrize("name", scorecard.PROBLEMS)
def test_problems_are_fixed_and_of_the_stated_shape(name):
    problem = scorecard.PROBLEMS[name]
    x, y, x_test, y_test = problem.split()
    assert x.shape == (problem.rows, problem.inputs)
    assert x_test.shape == (scorecard.TESTED, problem.inputs)
    if problem.words:  # of 216 rows of words 40 hold .17 by chance, sd .04
        known = {tuple(row) for row in x}
        assert np.mean([tuple(row) in known for row in x_test]) < 0.3
    else:
        assert not np.isin(x_test, x).all(1).any()
    np.testing.assert_array_equal(y, problem.split()[1])
    if problem.classes:
        assert set(y) == set(y_test) == set(range(problem.classes))
    assert str(problem.rows) in problem.title


def test_every_method_is_on_the_card():
    named = {entry.name for entry in scorecard.METHODS.values()}
    assert {name for name in bnn.method.METHODS if hasattr(bnn, name)} == named
    for label, entry in scorecard.METHODS.items():
        assert entry.method() == eval(repr(entry.method()), vars(bnn)), label
    with pytest.raises(scorecard.Absent, match="wisdom"):
        scorecard.Entry("MAP", {"wisdom": 3}).method()


def test_a_table_is_of_the_settings_asked_for(tmp_path, monkeypatch, capsys):
    args = argparse.Namespace(
        problems=["line"],
        methods=["MAP", "SWAG"],
        seed=0,
        chains=2,
        warmup=3,
        draws=4,
        out=tmp_path / "new" / "card.jsonl",
    )
    monkeypatch.setattr(
        scorecard, "reference", lambda *_: replace(at(normal, X, a=[0.0]), seconds=9)
    )
    monkeypatch.setattr(scorecard, "quality", lambda *_: {"rhat": 1.0, "ess": 10.0})
    monkeypatch.setattr(scorecard, "scores", lambda *_: {"nll": 1.5, "coverage": 0.9})
    ran = []

    def run(problem, method, against, seed):
        ran.append(type(method).__name__)
        return {"tv": 0.1 * len(ran), "w1": 0.2, "nll": 2.0, "seconds": 3.0, "warned": ["A"]}

    monkeypatch.setattr(scorecard, "run", run)
    scorecard.run_all(args, {})
    scorecard.run_all(args, scorecard.finished(args.out))
    assert ran == ["MAP", "SWAG"]
    scorecard.tell("line", args, scorecard.finished(args.out))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["*reference*", "MAP", "SWAG"]
    assert "0.200" in lines[4]
    args.draws = 5
    scorecard.tell("line", args, scorecard.finished(args.out))
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_run_goes_on_where_it_ended(tmp_path):
    out = tmp_path / "results" / "card.jsonl"
    command = [sys.executable, "-m", "benchmarks.scorecard", "--out", out, "--problems", "line"]
    command += ["--chains", "2", "--warmup", "20", "--draws", "20", "--methods", "MAP"]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert first.returncode == 0, first.stderr
    assert "line MAP" in first.stderr
    assert "\n| *reference*" in first.stdout
    assert "\n| MAP" in first.stdout
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert again.stderr == ""
    assert again.stdout.split("##")[1] == first.stdout.split("##")[1]
    other = subprocess.run(
        [*command, "--table", "--draws", "30"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "reference" not in other.stdout
