"""The benchmarks measure what they say; with the `bench` extra, every one of them runs."""

import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import bnn
from benchmarks import attention, common, ensembles, gradient, masks, predict, samplers, start, svi
from benchmarks import rows as rows_benchmark

MODULES = (attention, ensembles, gradient, masks, predict, samplers, start, svi)
ROOT = Path(__file__).parents[2]
peers = pytest.mark.skipif(
    not (find_spec("numpyro") and find_spec("jax")), reason='pip install -e ".[bench]"'
)


@peers
@pytest.mark.slow
@pytest.mark.parametrize("module", [m.__name__ for m in MODULES])
def test_a_quick_run_prints_a_table(module):
    command = [sys.executable, "-m", module, "--quick"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    assert "cores" in run.stdout.splitlines()[2]
    assert "\n| bnn" in run.stdout


@pytest.mark.slow
def test_memory_and_time_of_a_step_are_told():
    command = [sys.executable, "-m", "benchmarks.rows", "--quick"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    for rows in ("mapped from the disk", "in memory", "DataLoader"):
        line = next(each for each in run.stdout.splitlines() if each.startswith(f"| {rows}"))
        assert float(line.split("|")[2]) < rows_benchmark.LIMITS["memory"]


@peers
@pytest.mark.slow
def test_a_reference_run_is_stored_and_compared_with(tmp_path):
    samplers.make_reference("S", tmp_path, {"chains": 2, "warmup": 5, "draws": 8})
    columns = np.load(tmp_path / "S.npz")["columns"]
    assert columns.shape == (2, 8, common.TESTED + 1)


@peers
@pytest.mark.slow
@pytest.mark.parametrize("size", common.PROBLEMS)
def test_pyro_and_numpyro_are_given_the_same_density(size):
    import jax
    from numpyro.infer.util import initialize_model as numpyro_potential
    from pyro.infer.mcmc.util import initialize_model as pyro_potential

    problem = common.PROBLEMS[size]
    z, potential, *_ = pyro_potential(common.pyro_model(problem), common.torch_data(problem), {})
    peer = numpyro_potential(
        jax.random.PRNGKey(0), common.numpyro_model(problem), model_args=common.jax_data(problem)
    )
    assert set(z) == set(peer.param_info.z)
    theirs = peer.potential_fn({name: np.asarray(value) for name, value in z.items()})
    assert float(theirs) == pytest.approx(float(potential(z)), rel=1e-5)


@pytest.mark.parametrize("size", ["S", "L"])
def test_f_is_the_output_of_the_model(size):
    problem = common.PROBLEMS[size]
    x, y, x_test = problem.data()
    method = bnn.MAP(steps=2, restarts=2, draws=3, schedule="constant")
    posterior = bnn.fit(common.pyro_model(problem), x, y, method=method, progress=False)
    f = problem.f({name: each.numpy() for name, each in posterior.draws.items()}, x_test)
    np.testing.assert_allclose(f, posterior.predict(x_test).f, rtol=1e-4, atol=1e-4)


def test_particles_run_together_give_the_same_elbo():
    import pyro
    from pyro.infer import Trace_ELBO
    from pyro.infer.autoguide import AutoNormal

    problem = common.PROBLEMS["S"]
    model, data = common.pyro_model(problem), common.torch_data(problem)
    with pyro.get_param_store().scope():
        pyro.set_rng_seed(0)
        guide = AutoNormal(model, init_scale=1e-4)
        one, together = (
            Trace_ELBO(num_particles=8, vectorize_particles=v, max_plate_nesting=1).loss(
                model, guide, *data
            )
            for v in (False, True)
        )
    assert together == pytest.approx(one, rel=0.01)


def test_a_shifted_or_narrow_run_shows():
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(4, 2_000, 3))
    run = rng.normal(size=(4, 500, 3))
    z, ratio = samplers.deviation(run, reference)
    assert max(abs(z)) < 4  # Monte Carlo errors
    np.testing.assert_allclose(ratio, 1, atol=0.1)  # 3 errors of an sd from 2,000 draws are 0.05
    z, ratio = samplers.deviation(0.5 * run + 0.3, reference)
    assert min(abs(z)) > 4
    np.testing.assert_allclose(ratio, 0.5, atol=0.05)


def test_cost_and_worth_of_a_gradient_make_the_steady_speed():
    columns = np.random.default_rng(0).normal(size=(4, 500, 3))
    whole = {"columns": columns, "seconds": 12.0, "imports": 1.0, "divergences": 0}
    judged = samplers.judged(whole | {"gradients": 5e6}, {"seconds": 2.0}, None)
    (line,) = samplers.summary({"bnn-nuts": [judged]})
    cells = dict(zip(samplers.HEADER, line, strict=True))
    assert float(cells["us a gradient"]) == pytest.approx(2)  # 10 s of 5 million
    worth = [float(each) for each in cells["ESS per 1,000 gradients"].split(" / ")]
    np.testing.assert_allclose(worth, judged["ess"] / 5e3, rtol=0.01)  # as printed
    speeds = [float(each) for each in cells["per steady s"].split(" / ")]
    np.testing.assert_allclose(speeds, np.array(worth) * 1e3 / 2, rtol=0.02)


def test_contenders_take_turns_in_both_orders():
    called = []
    contenders = {name: lambda name=name: called.append(name) or 1.0 for name in "AB"}
    assert common.alternate(contenders, 2) == {"A": [1.0, 1.0], "B": [1.0, 1.0]}
    assert called == ["A", "B", "B", "A"]


def test_the_time_of_a_step_leaves_set_up_out():
    def fit(steps):
        time.sleep(0.05 + 0.0005 * steps)

    assert common.per_step(fit, 0.1)() == pytest.approx(0.0005, rel=0.5)


@pytest.mark.slow
def test_randomized_priors_keep_members_apart_where_no_data_are():
    """Perone's four ensembles, at full size; each is one word away from the one before."""
    model, (x, y) = ensembles.demo_model(), ensembles.demo_data()
    methods = ensembles.demo_methods(snapshots=10)
    spread, gaps = {}, {}
    for name, method in methods.items():
        posterior = bnn.fit(model, x, y, method=method, progress=False)
        f = posterior.predict(np.linspace(-1, 2, 61)[:, None]).f[0]
        near = posterior.predict(x)
        assert float((near.mean - torch.tensor(y)).square().mean().sqrt()) < 0.13  # its noise: .1
        spread[name] = float(near.epistemic.sqrt().mean())
        gaps[name] = float(f[:, [0, 10, 60]].std(0).mean())
        assert len(posterior.frames) == 10
        assert posterior.frames[0].predict(x).f.shape == (1, 40, 100)
    assert all(gaps[name] > 10 * spread[name] for name in methods)
    assert spread["prior, bootstrap"] > spread["prior"]
    assert gaps["prior"] > gaps["naive"]  # its members would agree there more, were there no prior
