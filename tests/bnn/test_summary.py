"""Rows that come in batches: the numbers of a prediction of all of them, and no more memory."""

import warnings
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import bnn
from bnn import chunks
from bnn.chunks import in_chunks
from bnn.models import mlp_classification, mlp_regression, transformer_classification

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(1_300, 2, generator=GENERATOR)
Y = X[:, 0] - X[:, 1] + 0.1 * torch.randn(1_300, generator=GENERATOR)


def local(x, y=None):
    """A site of each row: its draws at a row depend on where the noise of that row comes from."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        shift = pyro.sample("shift", dist.Normal(0.0, 0.3))
        pyro.sample("y", dist.Normal(x @ w + shift, 0.5), obs=y)


MODELS = {
    "numbers": (mlp_regression(2, (5,)), Y),
    "labels": (mlp_classification(2, 3, (5,)), (Y > 0).long() + (Y > 1).long()),
    "local": (local, Y),
}


def fitted(kind: str) -> bnn.Posterior:
    model, y = MODELS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bnn.fit(model, X[:40], y[:40], method=bnn.SVI(steps=50, draws=60), progress=False)


def parts(*args: torch.Tensor, sizes=(1, 700, 3, 596)):
    """A generator of batches of many sizes."""
    yield from zip(*(arg.split(sizes) for arg in args), strict=True)


@pytest.mark.parametrize("kind", MODELS)
def test_a_summary_is_the_prediction_of_all_rows_bit_for_bit(kind):
    posterior, y = fitted(kind), MODELS[kind][1]
    whole = posterior.predict(X, seed=3)
    score = posterior.log_score(X, y)
    levels = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    for batches in (
        DataLoader(TensorDataset(X, y), 100),
        DataLoader(TensorDataset(X, y), 2_000),
        parts(X, y),
        ([x.numpy(), one.numpy()] for x, one in parts(X, y)),
    ):
        summary = posterior.predict(batches, seed=3)
        for name in ("mean", "aleatoric", "epistemic", "total", "probs", "std", "entropy"):
            if name == ("std" if kind == "labels" else "entropy"):
                continue
            got, wanted = getattr(summary, name), getattr(whole, name)
            assert (got is wanted is None) or torch.equal(got, wanted), name
        assert torch.equal(summary.quantile(levels), whole.quantile(levels))
        for got, wanted in zip(summary.interval(0.9), whole.interval(0.9), strict=True):
            assert torch.equal(got, wanted)
        assert torch.equal(summary.log_score, score)


@pytest.mark.parametrize("kind", ["numbers", "local"])
def test_it_is_the_noise_of_the_place_that_a_row_has(kind):
    """Predicted block by block with one seed, every block would have the same noise."""
    posterior = fitted(kind)
    same = X[:1].expand(1_200, 2)
    summary = posterior.predict(iter([(same,)]), quantiles=(0.9,))
    assert len(summary.quantile(0.9).unique()) > 1_100


def test_observations_are_scored_where_there_are_some():
    posterior = fitted("numbers")
    assert posterior.predict(DataLoader(X[:20], 4)).log_score is None
    assert "log score" in repr(posterior.predict(DataLoader(TensorDataset(X[:20], Y[:20]), 4)))
    with pytest.raises(bnn.DataError, match="Some batches hold observations"):
        posterior.predict(iter([(X[:4],), (X[:4], Y[:4])]))


def test_few_rows_mode_and_draws_are_those_of_predict():
    posterior = fitted("local")
    whole = posterior.predict(X[:7], draws=5, mode="mean")
    summary = posterior.predict(parts(X[:7], sizes=(3, 4)), draws=5, mode="mean")
    assert torch.equal(summary.mean, whole.mean)
    assert torch.equal(summary.epistemic, whole.epistemic)


def test_what_is_no_stream_is_an_array():
    posterior = fitted("numbers")
    for rows in (X[:3], X[:3].numpy(), X[:3].tolist(), tuple(map(tuple, X[:3].tolist()))):
        assert isinstance(posterior.predict(rows), bnn.Prediction)


def test_what_cannot_be_had_is_said():
    posterior = fitted("numbers")
    summary = posterior.predict(iter([(X,)]), quantiles=(0.1, 0.9))
    assert summary.quantiles.shape == (2, 1_300)
    assert torch.equal(torch.stack(summary.interval(0.8)), summary.quantiles)
    with pytest.raises(ValueError, match=r"0\.5\].*asked for.*\[0\.1, 0\.9\].*quantiles="):
        summary.quantile(torch.tensor([0.1, 0.5]))
    with pytest.raises(ValueError, match=r"0\.\.1"):
        posterior.predict(iter([(X,)]), quantiles=(90,))
    with pytest.raises(bnn.DataError, match="no rows"):
        posterior.predict(iter([]))
    with pytest.raises(bnn.DataError, match="3 inputs"):
        posterior.predict(iter([(X, Y, Y)]))
    with pytest.raises(bnn.DataError, match='"x" has 1 NaN'):
        posterior.predict(iter([(X[:4],), (torch.tensor([[0.0, torch.nan]]),)]))
    with pytest.raises(AttributeError, match=r"no 'f'.*draws go"):
        summary.f  # noqa: B018
    with pytest.raises(bnn.ModelError, match="keeps no seams"):
        posterior.predict(iter([(X,)]), seams=["hidden.0"])


def test_rows_that_must_come_all_at_once_are_refused():
    def stated(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", 600):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        method = bnn.SVI(steps=20, draws=10)
        posterior = bnn.fit(stated, X[:600], Y[:600], method=method, progress=False)
    with pytest.raises(bnn.ModelError, match="all rows at once"):
        posterior.predict(DataLoader(X[:600], 100))


class Made(IterableDataset):
    """Rows that are nowhere before they are asked for."""

    def __init__(self, rows: int):
        self.rows = rows

    def __iter__(self):
        for start in range(0, self.rows, 256):
            yield torch.sin(torch.arange(start, start + 256)[:, None] * torch.tensor([1.0, 2.0]))


class Alive(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of the tensors that are alive together, at most."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.change(out.nbytes)
            weakref.finalize(out, self.change, -out.nbytes)
        return out

    def change(self, size):
        self.now += size
        self.most = max(self.most, self.now)


def test_memory_does_not_grow_with_the_rows_beyond_the_summary():
    """All draws of 30,000 rows more would be 30,000 x 60 x 4 bytes = 7 MB; numbers, .5 MB."""
    posterior = fitted("numbers")
    with Alive() as few:
        posterior.predict(DataLoader(Made(2_560), None))
    with Alive() as many:
        posterior.predict(DataLoader(Made(33_280), None))
    assert many.most - few.most < 3e6, (few.most, many.most)


def test_the_chunk_follows_what_the_model_writes():
    model = transformer_classification(32, 2, vocabulary=20, width=16, heads=2, layers=2)
    x = torch.randint(1, 20, (30, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        method = bnn.SVI(steps=5, draws=300)
        posterior = bnn.fit(model, x, torch.arange(30) % 2, method=method, progress=False)
    seen = []

    class Largest(chunks.Work):
        def __exit__(self, *rest):
            seen.append(self.largest)
            return super().__exit__(*rest)

    with Largest():
        posterior.predict(x)
    assert seen[0] <= chunks.NUMBERS


def test_chunks_are_as_large_as_the_first_says():
    def taken(count):
        run = lambda part: torch.zeros(part.stop - part.start, 1_000_000)
        return [(part.start, part.stop, len(made)) for part, made in in_chunks(run, count)]

    assert taken(20) == [(0, 1, 1), (1, 9, 8), (9, 17, 8), (17, 20, 3)]
    assert taken(1) == [(0, 1, 1)]
