"""Parts of a fit: the same bits wherever they are computed, and nothing lost where a worker is."""

import dataclasses
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import (
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
)
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

import bnn
from bnn.parts import joined
from bnn.run import Phase
from tests.exact import Regression, assert_exact

pytestmark = [
    pytest.mark.filterwarnings("ignore::bnn.errors.ConvergenceWarning"),
    pytest.mark.filterwarnings("ignore::bnn.errors.ApproximationWarning"),
]
ROOT = Path(__file__).parents[2]
X = torch.randn(24, 2, generator=torch.Generator().manual_seed(0))
Y = X[:, 0] - X[:, 1] + 0.1 * torch.randn(24, generator=torch.Generator().manual_seed(1))
SWAG = dict(steps=60, collection=60, every=2, rank=4, draws=5)
METHODS = {
    "nuts": bnn.NUTS(chains=3, warmup=25, draws=15, parts=2),
    "nuts, a chain each": bnn.NUTS(chains=2, warmup=25, draws=15, parts=2),
    "mclmc": bnn.MCLMC(chains=3, warmup=25, draws=15, parts=2),
    "sghmc": bnn.SGHMC(chains=3, warmup=40, steps=60, draws=10, step_size=0.1, parts=2),
    "sgld": bnn.SGLD(chains=2, warmup=40, steps=60, draws=10, parts=2),
    "ensemble": bnn.DeepEnsemble(members=3, steps=80, bootstrap="resample", parts=2),
    "priors": bnn.RandomizedPriors(members=3, steps=60, parts=3),
    "map": bnn.MAP(restarts=2, steps=80, parts=2),
    "laplace": bnn.Laplace(restarts=2, steps=80, draws=10, parts=2),
    "swag": bnn.SWAG(restarts=2, parts=2, **SWAG),
}


def model(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        f = pyro.deterministic("f", x @ w)
        pyro.sample("y", dist.Normal(f, sigma), obs=y)


os.environ.setdefault("BNN_TEST_CALLER", str(os.getpid()))  # what workers inherit


def away():
    """True in a worker."""
    return os.environ["BNN_TEST_CALLER"] != str(os.getpid())


def mortal(x, y=None):
    """Ends its process where a file says so, in the worker that finds it first."""
    token = Path(os.environ.get("BNN_TEST_MORTAL", "absent"))
    if away() and token.exists():
        try:
            token.unlink()
        except FileNotFoundError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    model(x, y)


class Odd(Exception):
    """What is pickled of it does not build it again."""

    def __init__(self, what, which):
        super().__init__(f"{what} {which}")


def odd(x, y=None):
    if away():
        raise Odd("no", "luck")
    model(x, y)


def fit(method, program=model, **given):
    return bnn.fit(program, X, Y, method=method, progress=False, **given)


def same(one, other):
    """Bit for bit."""
    for group in ("draws", "stats", "params"):
        first, second = getattr(one, group), getattr(other, group)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[k].nan_to_num(), second[k].nan_to_num()) for k in first)
    assert (one.history is None) == (other.history is None)
    assert one.history is None or torch.equal(one.history, other.history)
    return (one.log_evidence, one.complete, one.shape) == (
        other.log_evidence,
        other.complete,
        other.shape,
    )


@pytest.fixture(scope="module")
def pool():
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as workers:
        yield workers


QUICK = ("nuts", "ensemble", "map")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in METHODS]
)
def test_any_executor_gives_the_bits_that_none_gives(name, pool):
    method, before = METHODS[name], torch.get_rng_state()
    plain = fit(method)
    with ThreadPoolExecutor(2) as threads:
        assert same(fit(method, executor=threads), plain)
    far = fit(method, executor=pool)
    assert same(far, plain)
    assert torch.equal(torch.get_rng_state(), before)
    assert far.method == method
    assert far.model is model
    assert far.shape[0] * far.shape[1] == plain.shape[0] * plain.shape[1]
    count = getattr(method, method.runs)
    assert far.shape[0 if method.runs != "members" else 1] == count
    w = far.draws["w"][:, -1] if method.runs != "members" else far.draws["w"][0]
    if name not in ("map", "laplace", "ensemble"):  # which find one mode
        assert len({tuple(row.tolist()) for row in w}) == count


def of_pool(workers):
    """The executor that the docs make of a pool."""
    shown = {"Executor": Executor, "Future": Future}
    page = (ROOT / "docs" / "scaling.md").read_text()
    exec(re.search(r"class OfPool.*?return future", page, re.S)[0], shown)
    return shown["OfPool"](workers)


def test_a_pool_is_an_executor_by_the_few_lines_that_the_docs_show():
    with ThreadPool(2) as workers:
        executor = of_pool(workers)
        assert same(fit(METHODS["map"], executor=executor), fit(METHODS["map"]))
        with pytest.raises(Odd):
            executor.submit(_unlucky).result()


def _unlucky():
    raise Odd("no", "luck")


def test_restarts_repeated_take_no_memory():
    assert fit(METHODS["map"]).draws["w"].stride(1) == 0


def test_a_part_is_the_fit_that_its_seed_says():
    """A part depends on its number and the seed, not on how many parts there are besides."""
    two = fit(bnn.NUTS(chains=2, warmup=25, draws=15, parts=2))
    three = fit(bnn.NUTS(chains=3, warmup=25, draws=15, parts=3))
    assert torch.equal(three.draws["w"][:2], two.draws["w"])
    other = bnn.fit(model, X, Y, method=two.method, seed=1, progress=False)
    assert not torch.equal(other.draws["w"][0], two.draws["w"][0])


@pytest.mark.parametrize("kind", [bnn.NUTS, bnn.MCLMC])
def test_chains_in_parts_are_of_the_posterior(kind):
    case = Regression.make()
    method = kind(chains=8, parts=2, draws=400)
    draws = bnn.fit(case.model, case.x, case.y, method=method, progress=False).draws["w"]
    assert_exact(draws, case.mean, case.sd)


def test_a_posterior_of_parts_is_saved_and_loaded(tmp_path):
    posterior = fit(METHODS["ensemble"])
    posterior.save(tmp_path / "posterior.bnn")
    loaded = bnn.load(tmp_path / "posterior.bnn", model)
    assert same(loaded, posterior)
    assert loaded.method == posterior.method


def test_what_parts_warn_of_arrives_once_with_their_names(pool):
    method = bnn.MAP(restarts=2, steps=40, learning_rate=1e-3, schedule="constant", parts=2)
    said = "^restart 0, restart 1: MAP: the log joint was"
    with pytest.warns(bnn.errors.ConvergenceWarning, match=said) as caught:
        fit(method, executor=pool)
    (told,) = [each for each in caught if each.category is bnn.errors.ConvergenceWarning]
    assert told.filename == __file__


def test_threads_leave_warnings_where_they_belong():
    method = bnn.MAP(restarts=2, steps=20, learning_rate=1e-5, schedule="constant", parts=2)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with ThreadPoolExecutor(2) as threads:
            fit(method, executor=threads)
            fit(method, seed=2, executor=threads)
    said = [str(each.message) for each in seen]
    assert [each.partition(" the log joint")[0] for each in said] == ["restart 0: MAP:"] * 2


def test_workers_compute_in_the_callers_dtype(pool):
    torch.set_default_dtype(torch.float64)
    try:
        plain, far = fit(METHODS["map"]), fit(METHODS["map"], executor=pool)
    finally:
        torch.set_default_dtype(torch.float32)
    assert far.draws["w"].dtype == torch.float64
    assert same(far, plain)


# ------------------------------------------------------------------ what is refused


def test_what_is_no_executor_is_said():
    with pytest.raises(TypeError, match="executor is a int"):
        fit(METHODS["map"], executor=4)


def test_an_error_that_cannot_be_sent_back_is_told(pool):
    """Sent as it is, it would break the pool, and pass for a dead worker."""
    with pytest.raises(bnn.FitError, match="Odd: no luck") as caught:
        fit(METHODS["map"], odd, executor=pool)
    assert "restart" in caught.value.__notes__[0]
    assert pool.submit(abs, -1).result() == 1


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (bnn.SVI(steps=5), "which no executor divides. Leave executor out"),
        (bnn.NUTS(chains=2), "divide it, for example with parts=2"),
    ],
)
def test_an_executor_for_one_piece_of_work_is_an_error(method, message):
    with ThreadPoolExecutor(1) as threads, pytest.raises(ValueError, match=message):
        fit(method, executor=threads)


@pytest.mark.parametrize("kind", [bnn.NUTS, bnn.MCLMC, bnn.SGHMC, bnn.SGLD])
@pytest.mark.parametrize(("parts", "error"), [(0, ValueError), (3, ValueError), (1.5, TypeError)])
def test_parts_are_as_many_as_runs_at_most(kind, parts, error):
    with pytest.raises(error, match="parts"):
        kind(chains=2, parts=parts)


def test_copies_of_all_members_need_them_together():
    with pytest.raises(ValueError, match="no copy is of all members"):
        bnn.DeepEnsemble(members=4, snapshots=3, parts=2)


def test_trainable_tensors_have_one_value_for_all_parts():
    def trained(x, y=None):
        shift = pyro.param("shift", torch.tensor(0.0))
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w + shift, 1.0), obs=y)

    with pytest.raises(bnn.ModelError, match=r"MAP\(parts=2\) .* Use parts=1"):
        bnn.fit(trained, X, Y, method=METHODS["map"], progress=False)


def test_a_model_that_cannot_be_sent_says_what_to_do(pool):
    with pytest.raises(bnn.ModelError, match="Define it at the top of a module"):
        fit(METHODS["map"], lambda x, y=None: model(x, y), executor=pool)


def test_an_error_in_a_worker_names_the_part(pool):
    method = bnn.SGHMC(chains=3, warmup=40, steps=60, draws=10, step_size=1e6, parts=3)
    with pytest.raises(bnn.FitError, match="not finite") as caught:
        fit(method, executor=pool)
    assert "of SGHMC" in caught.value.__notes__[0]


# ------------------------------------------------------------------ ends that come too early


class Broken(Executor):
    """Whose workers are dead, nobody knows where."""

    def submit(self, call, /, *args, **kwargs):
        future = Future()
        future.set_exception(BrokenExecutor("One was killed."))
        return future


def test_where_no_worker_left_a_note_all_that_ran_are_named():
    with pytest.raises(bnn.FitError, match=r"computed restart 0 or restart 1: One was killed\. W"):
        fit(METHODS["map"], executor=Broken())


def test_the_dead_of_several_workers_is_named(tmp_path, monkeypatch):
    """The other goes on from its last step, and the part that had ended is not computed again."""
    method = bnn.NUTS(chains=3, warmup=25, draws=1000, parts=3)
    folder, notes, killed = tmp_path / "run", tmp_path / "notes", []
    notes.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(notes))

    def kill():
        while not killed:
            time.sleep(0.01)
            if (folder / "part-002" / "state-0.safetensors").exists():
                (note,) = notes.glob("bnn-*/2-*")
                os.kill(int(note.name.partition("-")[2]), signal.SIGKILL)
                killed.append(time.monotonic())

    threading.Thread(target=kill, daemon=True).start()
    spawned, kept = multiprocessing.get_context("spawn"), bnn.Checkpoint(folder, every=0.1)
    with ProcessPoolExecutor(2, spawned) as two, pytest.raises(bnn.FitError) as caught:
        fit(method, executor=two, checkpoint=kept)
    assert time.monotonic() - killed[0] < 10  # the pool has let go of its workers too
    assert "while it computed chain 2: " in str(caught.value)
    with pytest.raises(bnn.FitError, match=r"takes no more work .* Pass a new one"):
        fit(method, executor=two, checkpoint=kept)
    assert not list(notes.glob("bnn-*"))

    steps, goes_on = Counter(), Phase.goes_on
    monkeypatch.setattr(
        Phase, "goes_on", lambda self: steps.update([self.run.folder.name]) or goes_on(self)
    )
    began = time.perf_counter()
    again = fit(method, checkpoint=kept)
    took = time.perf_counter() - began
    redone = [steps.pop(f"part-00{i}", 0) for i in range(3)]
    assert same(again, fit(method, checkpoint=tmp_path / "whole"))
    whole = [steps[f"part-00{i}"] for i in range(3)]
    assert min(redone[:2]) == 0
    assert max(redone[:2]) < whole[0]
    assert 0 < redone[2] < whole[2]
    assert again.seconds > took + 1  # the workers' count
    left = {"fit.safetensors", "posterior.safetensors", "lock"}
    assert {each.name for each in folder.iterdir()} == left


def test_a_part_that_was_kept_is_not_computed_again(tmp_path, monkeypatch):
    method = METHODS["ensemble"]
    whole = fit(method)
    plain, calls = bnn.DeepEnsemble.fit, []

    def fails_second(self, *args, **kwargs):
        calls.append(self.members)
        if len(calls) == 2:
            raise bnn.FitError("planted")
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(bnn.DeepEnsemble, "fit", fails_second)
    with pytest.raises(bnn.FitError, match="planted"):
        fit(method, checkpoint=tmp_path)
    at = (tmp_path / "part-000" / "phase-0.safetensors").stat().st_mtime_ns
    seen = []
    monkeypatch.setattr(
        "bnn.run.Run.finish",
        lambda self, write: seen.append(
            (tmp_path / "part-000" / "phase-0.safetensors").stat().st_mtime_ns
        ),
    )
    assert same(fit(method, checkpoint=tmp_path), whole)
    assert seen == [at]


class Stuck(Executor):
    """Computes the first that it is given, and nothing more."""

    def __init__(self):
        self.given = 0

    def submit(self, call, /, *args, **kwargs):
        future, self.given = Future(), self.given + 1
        if self.given == 1:
            future.set_result(call(*args, **kwargs))
        return future


@pytest.mark.parametrize(
    ("kept", "stop"), [(False, signal.SIGINT), (True, signal.SIGINT), (True, signal.SIGTERM)]
)
def test_ctrl_c_gives_the_parts_that_there_are(tmp_path, kept, stop):
    method, before = METHODS["nuts"], signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    timer = threading.Timer(120, os.kill, (os.getpid(), signal.SIGINT))

    class Pressed(Stuck):
        def submit(self, call, /, *args, **kwargs):
            future = super().submit(call, *args, **kwargs)
            if self.given == 2:
                threading.Timer(0.2, os.kill, (os.getpid(), stop)).start()
            return future

    try:
        timer.start()
        with pytest.warns(bnn.errors.ConvergenceWarning, match="was stopped"):
            part = fit(method, executor=Pressed(), checkpoint=tmp_path if kept else None)
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, before)
    whole = fit(method)
    assert not part.complete
    assert part.shape == (2, 15)
    assert torch.equal(part.draws["w"], whole.draws["w"][:2])
    if kept:
        assert same(bnn.load(tmp_path, model), part)
        assert same(fit(method, checkpoint=tmp_path), whole)


def test_chains_cut_at_different_lengths_keep_most_draws():
    whole = fit(bnn.MAP(restarts=1, steps=20, draws=10))
    cut = lambda n: dataclasses.replace(whole, draws={k: v[:, :n] for k, v in whole.draws.items()})
    assert joined([cut(10), cut(9), cut(1)]).shape == (2, 9)
    assert joined([cut(10), cut(1), cut(1)]).shape == (1, 10)


@pytest.mark.slow
def test_dask_gives_the_same_bits():
    distributed = pytest.importorskip("distributed")
    method = METHODS["nuts"]
    plain = fit(method)
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None
        ) as local,
        distributed.Client(local) as client,
    ):
        assert same(fit(method, executor=client.get_executor()), plain)


@pytest.mark.slow
def test_ray_gives_the_same_bits(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    from ray.util.multiprocessing import Pool

    token, method = tmp_path / "token", METHODS["nuts"]
    caller = os.environ["BNN_TEST_CALLER"]
    given = {"PYTHONPATH": str(ROOT), "BNN_TEST_CALLER": caller, "BNN_TEST_MORTAL": str(token)}
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": given}
    )
    try:
        executor = of_pool(Pool(2))
        plain = fit(method)
        assert same(fit(method, executor=executor), plain)
        with pytest.raises(bnn.FitError, match="Odd: no luck") as caught:
            fit(method, odd, executor=executor)
        assert "chain" in caught.value.__notes__[0]
        token.touch()
        start = time.monotonic()
        with pytest.raises(bnn.FitError, match=r"while it computed chains? \d( to 1)?: "):
            fit(method, mortal, executor=executor, checkpoint=tmp_path / "run")
        assert time.monotonic() - start < 10
        again = fit(method, mortal, executor=of_pool(Pool(2)), checkpoint=tmp_path / "run")
        assert same(again, plain)
    finally:
        ray.shutdown()


@pytest.mark.slow
def test_mpi_gives_the_same_bits(tmp_path):
    """A process that dies ends the whole job, and the same command goes on."""
    pytest.importorskip("mpi4py")
    mpiexec = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if mpiexec is None:
        pytest.skip("no mpiexec")
    program, token = ROOT / "tests" / "bnn" / "over_mpi.py", tmp_path / "token"
    command = [
        mpiexec,
        "-n",
        "3",
        sys.executable,
        "-m",
        "mpi4py.futures",
        program,
        tmp_path / "run",
    ]
    given = {**os.environ, "PYTHONPATH": str(ROOT), "BNN_TEST_MORTAL": str(token)}
    call = lambda: subprocess.run(command, env=given, capture_output=True, text=True, timeout=200)
    token.touch()
    assert call().returncode != 0
    assert not token.exists()
    again = call()
    assert again.stdout.split() == ["same", "FitError", "Odd:", "no", "luck"], again.stderr
