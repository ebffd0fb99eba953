"""The effects that methods are built from."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context

import pyro
import pyro.distributions as dist
import pytest
import torch

import bnn
from bnn.handlers import At, Capture, Rewrite, Score, quiet_pyro, threads
from bnn.turns import ALONE, default_dtype

X, Y = torch.randn(6, 2), torch.randn(6)
AT = {"w": torch.tensor([0.5, -1.0])}
WEIGHTS = torch.tensor([0.0, 1.0, 2.0, 0.5, 3.0, 1.0])


def model(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        f = pyro.deterministic("f", x @ w)
        pyro.sample("y", dist.Normal(f, 0.5), obs=y)


def test_a_weight_counts_its_row_and_leaves_the_prior():
    with Score("data", 6, weights=WEIGHTS) as score, At(AT):
        model(X, Y)
    each = dist.Normal(X @ AT["w"], 0.5).log_prob(Y)
    torch.testing.assert_close(score.likelihood, (WEIGHTS * each).sum())
    torch.testing.assert_close(score.prior, dist.Normal(0.0, 1.0).log_prob(AT["w"]).sum())


def test_weights_lie_on_the_data_plate_when_another_is_inside():
    def grid(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x), dim=-2), pyro.plate("column", 2, dim=-1):
            pyro.sample("y", dist.Normal(x * w, 0.5), obs=y)

    with Score("data", 12, weights=WEIGHTS) as score, At(AT):
        grid(X, X)
    each = dist.Normal(X * AT["w"], 0.5).log_prob(X).sum(1)
    torch.testing.assert_close(score.likelihood, 2 * (WEIGHTS * each).sum())  # 12 rows, 6 shown


def test_what_each_row_adds_is_kept_apart():
    with Score("data", 12, by_row=True) as score, At(AT):
        model(X, Y)
    each = dist.Normal(X @ AT["w"], 0.5).log_prob(Y)
    torch.testing.assert_close(score.rowwise, 2 * each)  # 12 rows, 6 shown
    torch.testing.assert_close(score.rowwise.sum(), score.likelihood)


def test_rows_lie_on_the_data_plate_when_another_is_inside():
    def grid(x, y=None):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("column", 2, dim=-1):
            pyro.sample("y", dist.Normal(x, 0.5), obs=y)

    with Score("data", 6, by_row=True) as score:
        grid(X, X + 1)
    torch.testing.assert_close(score.rowwise, dist.Normal(X, 0.5).log_prob(X + 1).sum(1))


def test_a_rewritten_seam_is_what_the_program_goes_on_with():
    with Rewrite({"f": lambda f: f + 1, "w": lambda w: 7 * w}) as rewrite:
        with Capture("y") as capture, At(AT):
            model(X)
    torch.testing.assert_close(capture.values["f"], X @ AT["w"] + 1)
    torch.testing.assert_close(capture.fn.mean, X @ AT["w"] + 1)
    assert rewrite.met == {"f"}  # w is a site of its own right, not a seam


@pytest.mark.filterwarnings("ignore::bnn.errors.ConvergenceWarning")
@pytest.mark.parametrize(("particles", "expected"), [(1, 1), (16, 2)])
def test_threads_are_chosen_by_what_a_step_computes_together(particles, expected):
    """Of 150,000 rows and 20 weights a step sees 10,000 rows, once or sixteen times."""
    x, seen = torch.ones(150_000, 20), set()

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([20]).to_event(1))
        if len(x) == 10_000 and torch.is_grad_enabled():  # the checks before the fit make none
            seen.add(torch.get_num_threads())
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        method = bnn.SVI(steps=2, draws=5, batch_size=10_000, particles=particles)
        bnn.fit(model, x, x[:, 0], method=method, progress=False)
    finally:
        torch.set_num_threads(before)
    assert seen == {expected}


def test_small_work_has_one_thread_large_the_callers_and_both_give_them_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for work, inside in ((1_000, 1), (10**9, 2)):
            with threads(work):
                assert torch.get_num_threads() == inside
            assert torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError), threads(1_000):
            1 / 0  # noqa: B018
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_work_of_a_method_is_of_what_it_computes_together():
    assert bnn.MAP(batch_size=100).work(10_000, 30) == 100 * 30
    assert bnn.MAP().work(10_000, 30) == 10_000 * 30
    assert bnn.SVI(particles=8, batch_size=100).work(10_000, 30) == 8 * 100 * 30
    assert bnn.Laplace(batch_size=100).work(10_000, 30) == 10_000 * 30  # its curvature


def test_checks_are_off_in_one_thread_alone():
    wrong = lambda: torch.distributions.Normal(0.0, -1.0)
    refused = pytest.raises(ValueError, match="scale")
    with ThreadPoolExecutor(1) as other:
        with quiet_pyro():
            with quiet_pyro():
                wrong()
                with refused:
                    other.submit(wrong).result()
            wrong()
            with refused:
                other.submit(wrong).result()
            with pyro.validation_enabled(False):  # as some of Pyro's own algorithms do
                pass
            wrong()
    with refused:
        wrong()


def test_threads_take_turns():
    """Pyro's stack of effects is the process's: side by side, one's draws would be the other's."""
    fit = lambda y: bnn.fit(model, X, y, method=bnn.MAP(steps=20), progress=False)
    posteriors = [fit(Y), fit(3 - Y)]

    def work(number):
        at = number % 2
        if number % 10 < 2:
            return fit(3 - Y if at else Y).draws["w"]
        return (
            posteriors[at].predict(X, seed=at).y if number % 4 else posteriors[at].log_likelihood()
        )

    numbers = range(40)
    alone = [work(number) for number in numbers]
    checks = torch.distributions.Distribution._validate_args
    with ThreadPoolExecutor(4) as together:
        found = list(together.map(work, numbers))
    assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
    assert torch.distributions.Distribution._validate_args == checks


def test_a_fit_in_double_leaves_other_threads_their_dtype():
    def double(number):
        with default_dtype(torch.float64):
            time.sleep(0.001)
            return torch.get_default_dtype()

    def single(number):
        fitted = bnn.fit(model, X.numpy(), Y.numpy(), method=bnn.MAP(steps=2), progress=False)
        return fitted.log_likelihood().dtype

    with ThreadPoolExecutor(2) as threads:
        doubles, singles = threads.map(double, range(300)), threads.map(single, range(20))
        assert set(doubles) == {torch.float64}
        assert set(singles) == {torch.float32}
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are never forked here")
def test_a_forked_child_does_not_wait_for_a_thread_it_has_not():
    begun, end = threading.Event(), threading.Event()

    def hold():
        with default_dtype(torch.float64), quiet_pyro(), Capture("y"):
            begun.set()
            end.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    begun.wait(60)
    try:
        child = get_context("fork").Process(target=_takes_its_turn)
        child.start()
        child.join(60)
        assert child.exitcode == 0
    finally:
        end.set()
        holder.join()


def _takes_its_turn():
    with quiet_pyro():
        torch.distributions.Normal(0.0, -1.0)
        assert not pyro.poutine.runtime._PYRO_STACK
    assert torch.get_default_dtype() == torch.float32
    assert torch.distributions.Distribution._validate_args
    assert pyro.infer.util.is_validation_enabled()


def test_a_fit_does_not_count_its_wait():
    with ThreadPoolExecutor(1) as other:
        with ALONE:
            fit = lambda: bnn.fit(model, X, Y, method=bnn.MAP(steps=2), progress=False)
            waiting = other.submit(fit)
            time.sleep(2)
        assert waiting.result().seconds < 1.5  # a few milliseconds, where it does not wait
