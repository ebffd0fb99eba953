"""Rows that are not in memory: iterables of batches, and arrays that are mapped from the disk."""

import warnings
from itertools import islice

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, TensorDataset

import bnn
from bnn import processes
from bnn.arguments import read
from bnn.data import Mapped, Stream, tensors
from bnn.processes import Processes

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(400, 2, generator=GENERATOR)
Y = X @ torch.tensor([1.0, -0.5]) + torch.randn(400, generator=GENERATOR)
PRECISION = torch.eye(2) + X.T @ X
MEAN, SD = torch.linalg.solve(PRECISION, X.T @ Y), torch.linalg.inv(PRECISION).diagonal().sqrt()


def model(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


class Shuffled:
    """Batches in a new order each time, as NumPy arrays, with the generator that all models use."""

    def __init__(self, **told):
        self.passes = 0
        vars(self).update(told)

    def __iter__(self):
        self.passes += 1
        for rows in torch.randperm(400).split(40):
            yield X[rows].numpy(), Y[rows].numpy()


def fit(*data, steps=3_000, **settings):
    method = bnn.SVI(guide="full_rank", steps=steps, draws=2_000, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bnn.fit(model, *data, method=method, progress=False)


@pytest.fixture
def mapped(tmp_path):
    arrays = []
    for name, value in (("x", X), ("y", Y)):
        array = np.memmap(tmp_path / name, np.float32, "w+", shape=tuple(value.shape))
        array[:] = value.numpy()
        array.flush()
        arrays.append(np.memmap(tmp_path / name, np.float32, "r", shape=tuple(value.shape)))
    return arrays


def check_exact(posterior):
    """.15 sd: the noise of minibatches at the end of the steps leaves about .05."""
    draws = posterior.draws["w"][0]
    assert ((draws.mean(0) - MEAN) / SD).abs().max() < 0.15
    assert ((draws.std(0) / SD).log().abs() < 0.15).all()


def test_any_iterable_of_batches_is_fitted_to_all_its_rows():
    check_exact(fit(Shuffled()))


def test_rows_are_counted_once_or_told():
    counted, told = Shuffled(), Shuffled(rows=400)
    first, second = read(model, (counted,)), read(model, (told,))
    assert first.rows == second.rows == 400
    assert (first.epoch(None), second.epoch(None)) == (10, None)
    assert (counted.passes, told.passes) == (2, 1)
    assert isinstance(first.loader, Stream)


def test_a_sampler_of_a_subset_says_how_many_rows_there_are():
    rows = TensorDataset(X, Y)
    part = DataLoader(rows, 10, sampler=SubsetRandomSampler(range(50)))
    again = DataLoader(rows, 10, sampler=RandomSampler(rows, replacement=True, num_samples=50))
    assert (read(model, (part,)).rows, read(model, (again,)).rows) == (50, 400)


def test_an_iterable_fits_the_same_again_whatever_the_callers_generator():
    first = fit(Shuffled(), steps=50)
    torch.manual_seed(9)
    assert torch.equal(first.draws["w"], fit(Shuffled(), steps=50).draws["w"])


def test_what_can_be_gone_through_once_is_refused():
    with pytest.raises(bnn.DataError, match=r"generator, which is empty.*__iter__"):
        fit(batch for batch in Shuffled())
    with pytest.raises(bnn.DataError, match="yield Tensor"):
        fit({"x": X, "y": Y}.values())


@pytest.mark.parametrize("settings", [{}, {"batch_size": 40}])
def test_mapped_arrays_are_fitted(mapped, settings):
    posterior = fit(*mapped, **settings)
    check_exact(posterior)
    assert posterior.data.rows == 400
    assert (posterior.data.loader is None) == (not settings)


def test_mapped_arrays_are_not_copied(mapped):
    x, y = tensors(tuple(mapped), ("x", "y"))
    assert (x.data_ptr(), y.data_ptr()) == tuple(array.ctypes.data for array in mapped)
    data = read(model, tuple(mapped), 40)
    assert isinstance(data.loader, Mapped)
    assert len(data.tensors[0]) == 40
    assert data.epoch(40) == 10


def test_a_pass_over_mapped_arrays_shows_each_row_once(mapped):
    loader = Mapped(tuple(mapped), 400, 40)
    torch.manual_seed(0)
    shown = np.concatenate([y for _, y in loader])
    assert np.array_equal(np.sort(shown), np.sort(Y.numpy()))
    assert not np.array_equal(shown, Y.numpy())


def test_one_pass_over_mapped_arrays_leaves_no_row_out(mapped):
    """What is added up over all rows, as a curvature is, may not miss the rest of a pass."""
    shown = [y for _, y in read(model, tuple(mapped), 150).once(150)]
    assert [len(y) for y in shown] == [150, 150, 100]
    assert torch.equal(torch.cat(shown), Y)
    method = bnn.Laplace(batch_size=150, steps=1_000, draws=10)
    evidence = []
    for data in (mapped, (X, Y)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            posterior = bnn.fit(model, *data, method=method, progress=False)
        evidence.append(posterior.log_evidence)
    assert evidence[0] == pytest.approx(evidence[1], abs=1e-3)


def test_processes_share_each_minibatch_of_mapped_rows(mapped):
    data = read(model, tuple(mapped), 40)

    def shown(shared):
        token = processes._current.set(shared)
        try:
            torch.manual_seed(0)
            return [y for _, y in islice(data.batches(40, torch.Generator()), 10)]
        finally:
            processes._current.reset(token)

    whole, *parts = map(shown, (None, *(Processes(rank, 3) for rank in range(3))))
    for batch, *shares in zip(whole, *parts, strict=True):
        assert [len(each) for each in shares] == [14, 13, 13]
        assert torch.equal(torch.cat(shares).sort().values, batch.sort().values)


def test_mapped_and_other_arrays_go_together(mapped, tmp_path):
    assert torch.isfinite(fit(mapped[0], Y, batch_size=40, steps=50).draws["w"]).all()
    with pytest.raises(bnn.DataError, match='"x" has 400, "y" has 399'):
        fit(mapped[0], Y[:399], batch_size=40)
    broken = np.memmap(tmp_path / "x", np.float32, "r+", shape=(400, 2))
    broken[300, 1] = np.nan
    with pytest.raises(bnn.DataError, match='"x" has 1 NaN'):
        fit(broken, Y, batch_size=40, steps=50)
    with pytest.raises(bnn.DataError, match="Pass tensors"):
        bnn.fit(model, *mapped, method=bnn.DeepEnsemble(batch_size=40, bootstrap="exponential"))


def test_a_checkpoint_of_mapped_rows_goes_on(mapped, tmp_path, monkeypatch):
    whole = fit(*mapped, batch_size=40, steps=120)
    plain, calls = Mapped.__iter__, []

    def killed(self):
        calls.append(1)
        if len(calls) == 9:
            raise OSError("the disk is gone")
        yield from plain(self)

    method = bnn.SVI(guide="full_rank", steps=120, draws=2_000, batch_size=40)
    settings = {"method": method, "checkpoint": bnn.Checkpoint(tmp_path / "run", every=0.0)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        monkeypatch.setattr(Mapped, "__iter__", killed)
        with pytest.raises(OSError, match="gone"):
            bnn.fit(model, *mapped, progress=False, **settings)
        monkeypatch.setattr(Mapped, "__iter__", plain)
        again = bnn.fit(model, *mapped, progress=False, **settings)
    assert torch.equal(again.draws["w"], whole.draws["w"])
