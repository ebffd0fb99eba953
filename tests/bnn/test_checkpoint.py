"""Files come back as they went out, a damaged one is refused, and none can run code."""

import dataclasses
import json
import os
import pickle
import random
import time
import warnings

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset

import bnn
from bnn import checkpoint, files, handlers

pytestmark = pytest.mark.filterwarnings("ignore::bnn.errors.ConvergenceWarning")
TINY = bnn.SVI(steps=30, draws=20)
X = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
Y = X[:, 0] - X[:, 1]


def model(x, y=None, size=2):
    w = pyro.sample("net.weight", dist.Normal(0.0, 1.0).expand([size]).to_event(1))
    with pyro.plate("data", len(x)):
        f = pyro.deterministic("f", x[:, :size] @ w)
        pyro.sample("y", dist.Normal(f, 0.5), obs=y)


def leftovers(x, y=None):
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, scale), obs=y)


def mean_field(x, y=None):
    pyro.sample("net.weight", dist.Normal(pyro.param("at", torch.zeros(2)), 0.1).to_event(1))


@pytest.fixture(scope="module")
def fitted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bnn.fit(model, X, Y, method=TINY, seed=3)


@pytest.fixture
def file(fitted, tmp_path):
    fitted.save(tmp_path / "fit")
    return tmp_path / "fit"


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize(
    ("program", "method", "data"),
    [
        (model, TINY, (X, Y)),
        (model, bnn.NUTS(chains=2, warmup=10, draws=10), (X, Y)),
        (model, bnn.MAP(steps=30, restarts=2, draws=5), (X, Y)),
        (leftovers, TINY, (X, Y)),
        (model, TINY, (pd.DataFrame(X.numpy(), columns=["age", "bmi"]), pd.Series(Y.numpy()))),
        (model, TINY, (DataLoader(TensorDataset(X, Y), batch_size=4),)),
        (model, dataclasses.replace(TINY, steps=np.int64(30)), (X, Y)),
    ],
    ids=["svi", "nuts", "map", "pyro.param", "pandas", "loader", "numpy setting"],
)
def test_everything_comes_back(program, method, data, tmp_path):
    before = bnn.fit(program, *data, method=method, seed=np.int64(7))
    before.save(tmp_path / "fit")
    after = bnn.load(tmp_path / "fit", program)
    assert after.method == method
    assert after.data.columns == before.data.columns
    assert (after.seed, after.elbo, after.seconds) == (7, before.elbo, before.seconds)
    assert after.data.rows == 12
    assert (after.data.loader is None) == (before.data.loader is None)
    for name in ("draws", "params", "stats"):
        assert same(getattr(after, name), getattr(before, name))
    histories = [h for h in (before.history, after.history) if h is not None]
    assert len(histories) in (0, 2)
    assert all(torch.equal(h, histories[0]) for h in histories)
    assert torch.equal(after.predict(X).y, before.predict(X).y)
    assert torch.equal(after.log_likelihood(X, Y), before.log_likelihood(X, Y))


def test_a_file_is_json_and_the_bytes_of_tensors(file, fitted):
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    assert json.loads(header.pop("__metadata__")["bnn"])["method"]["name"] == "SVI"
    begin, end = header["draws/net.weight"]["data_offsets"]
    body = raw[8 + size :]
    assert fitted.draws["net.weight"].numpy().tobytes() == body[begin:end]
    assert sum(b - a for a, b in (v["data_offsets"] for v in header.values())) == len(body)
    with pytest.raises(pickle.UnpicklingError):
        pickle.loads(raw)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(file, fitted, monkeypatch):
    before = file.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(bnn.CheckpointError, match="No space left"):
        fitted.save(file)
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == ["fit"]
    with pytest.raises(bnn.CheckpointError, match="nowhere"):
        fitted.save(file.parent / "nowhere" / "fit")


def test_a_file_is_as_readable_as_any_other(file):
    (file.parent / "other").touch()
    assert file.stat().st_mode == (file.parent / "other").stat().st_mode


def test_another_model_is_named_with_its_shapes(file):
    with pytest.raises(bnn.CheckpointError, match=r'"net.weight" is \(2,\) .* \(1,\) in the mod'):
        bnn.load(file, lambda x, y=None: model(x, y, size=1))
    with pytest.raises(bnn.CheckpointError, match='"scale" is absent in the file'):
        bnn.load(file, leftovers)
    with pytest.raises(bnn.CheckpointError, match=r"raised .* x \(row=12, column=2\)"):
        bnn.load(file, lambda x, y=None: model(x @ torch.ones(3), y))


def test_a_truncated_file_is_refused(file):
    raw = file.read_bytes()
    for size in np.linspace(0, len(raw) - 1, 20).astype(int):
        file.write_bytes(raw[:size])
        with pytest.raises(bnn.CheckpointError, match="damaged"):
            bnn.load(file, model)


def test_no_flipped_byte_goes_unseen(file, fitted):
    raw, rng = file.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(raw[:8], "little")
    refused = 0
    for i in range(300):
        at = rng.randrange(header if i % 2 else len(raw))  # half of them where the structure is
        damaged = bytearray(raw)
        damaged[at] ^= rng.randrange(1, 256)
        file.write_bytes(damaged)
        try:
            loaded = bnn.load(file, model)
        except bnn.CheckpointError:
            refused += 1
        else:  # a byte that says nothing
            assert same(loaded.draws | loaded.params, fitted.draws | fitted.params), at
            assert loaded.method == fitted.method
    assert refused > 280


class Canary:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def _zip(path):
    torch.save({"draws": torch.zeros(3), "x": Canary()}, path)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(pickle.dumps(Canary())),
        _zip,
        lambda path: path.write_bytes((2**60).to_bytes(8, "little") + b"{}"),
        lambda path: path.write_bytes((90_000_000).to_bytes(8, "little") + b"{}"),
        lambda path: path.write_bytes((2**17).to_bytes(8, "little") + b"[" * 2**17),
        lambda path: path.mkdir(),
        lambda path: None,
        lambda path: save_file({"w": torch.ones(2)}, path),
    ],
    ids=["pickle", "zip", "length", "short", "nested", "folder", "missing", "other safetensors"],
)
def test_a_foreign_file_is_refused_and_nothing_runs(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "fit")
    start = time.perf_counter()
    with pytest.raises(bnn.CheckpointError):
        bnn.load(tmp_path / "fit", model)
    assert time.perf_counter() - start < 1
    assert not (tmp_path / "executed").exists()


def forge(path, posterior, change, text=None, **tensors):
    """A file with a right SHA-256 over a wrong manifest."""
    manifest = checkpoint._manifest(posterior)
    change(manifest)
    made = {f"draws/{k}": v for k, v in posterior.draws.items()}
    made |= {f"data/{i}": v for i, v in enumerate(posterior.data.tensors)} | tensors
    made = {k: v for k, v in made.items() if v is not None}
    text = text or json.dumps(manifest)
    save_file(made, path, {"bnn": text, "sha256": files.digest(text, made)})


def test_the_forger_can_write_a_right_file(tmp_path, fitted):
    forge(tmp_path / "fit", fitted, lambda m: None)
    assert same(bnn.load(tmp_path / "fit", model).draws, fitted.draws)


WRONG = {
    "unknown method": {"method": {"name": "os.system", "settings": {}}},
    "method is a list": {"method": ["SVI"]},
    "method name is a list": {"method": {"name": ["SVI"], "settings": {}}},
    "unknown setting": {"method": {"name": "SVI", "settings": {"__class__": 1}}},
    "negative setting": {"method": {"name": "SVI", "settings": {"steps": -1}}},
    "setting of another type": {"method": {"name": "SVI", "settings": {"steps": [[1], "x"]}}},
    "guide is a number": {"method": {"name": "SVI", "settings": {"guide": 3}}},
    "guide is a list": {"method": {"name": "SVI", "settings": {"guide": [["normal"]]}}},
    "infinite setting": {"method": {"name": "SVI", "settings": {"learning_rate": float("inf")}}},
    "negative rows": {"rows": -1},
    "more rows": {"rows": 13},
    "rows is true": {"rows": True},
    "rows is a text": {"rows": "12"},
    "names is a text": {"names": "xy"},
    "names of numbers": {"names": [1, 2]},
    "too many names": {"names": ["x", "y", "z"]},
    "columns is a list": {"columns": ["age"]},
    "columns of another input": {"columns": {"z": ["a", "b"]}},
    "too few columns": {"columns": {"x": ["a"]}},
    "elbo is a text": {"elbo": "high"},
    "seed is negative": {"seed": -1},
    "seconds is null": {"seconds": None},
    "newer schema": {"schema": 3},
    "schema is a text": {"schema": "1"},
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_forged_manifest_is_refused(change, tmp_path, fitted):
    forge(tmp_path / "fit", fitted, lambda m: m.update(change))
    with pytest.raises(bnn.CheckpointError):
        bnn.load(tmp_path / "fit", model)


@pytest.mark.parametrize("key", ["schema", "method", "names", "columns", "rows", "elbo", "seed"])
def test_a_manifest_without_a_field_is_refused(key, tmp_path, fitted):
    forge(tmp_path / "fit", fitted, lambda m: m.pop(key))
    with pytest.raises(bnn.CheckpointError, match=key):
        bnn.load(tmp_path / "fit", model)


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"a":' * 100_000, "[1]", "null", "{", "9" * 9_999]
)
def test_a_manifest_of_another_form_is_refused(text, tmp_path, fitted):
    forge(tmp_path / "fit", fitted, lambda m: None, text=text)
    with pytest.raises(bnn.CheckpointError, match="manifest"):
        bnn.load(tmp_path / "fit", model)


@pytest.mark.parametrize(
    "tensors",
    [
        {"draws/net.weight": torch.zeros(2)},
        {"draws/net.weight": torch.zeros(1, 0, 2)},
        {"draws/net.weight": None},
        {"stats/lp": torch.zeros(1, 7)},
        {"stats/lp": torch.zeros(1, 20, 3)},
        {"history": torch.tensor(1.0)},
        {"snapshots/net.weight": torch.zeros(3, 1, 20, 2)},
        {"snapshots/net.weight": torch.zeros(3, 1, 20, 2), "snapshot_steps": torch.arange(2)},
        {"snapshots/other": torch.zeros(3, 1, 20, 2), "snapshot_steps": torch.arange(3)},
        {"snapshot_steps": torch.arange(3)},
        {"data/1": None},
        {"data/2": torch.zeros(12)},
        {"data/0": torch.zeros(11, 2)},
        {"data/1": torch.full((12,), torch.nan)},
        {"batch/0": torch.zeros(12)},
    ],
    ids=str,
)
def test_forged_tensors_are_refused(tensors, tmp_path, fitted):
    forge(tmp_path / "fit", fitted, lambda m: None, **tensors)
    with pytest.raises(bnn.CheckpointError):
        bnn.load(tmp_path / "fit", model)


@pytest.mark.parametrize(
    "setting", [{"guide": mean_field}, {"schedule": lambda step: 0.5}], ids=["guide", "schedule"]
)
def test_settings_that_are_code_get_their_defaults_with_a_warning(setting, tmp_path):
    before = bnn.fit(model, X, Y, method=dataclasses.replace(TINY, **setting))
    before.save(tmp_path / "fit")
    with pytest.warns(UserWarning, match=next(iter(setting))):
        after = bnn.load(tmp_path / "fit", model)
    assert after.method == TINY
    assert torch.equal(after.predict(X).y, before.predict(X).y)
    assert bnn.load(tmp_path / "fit", model, **setting).method == before.method
    with pytest.raises(TypeError, match="load got draws"):
        bnn.load(tmp_path / "fit", model, draws=len)


def test_an_autoguide_comes_back_and_no_other_name_is_looked_up(tmp_path, fitted):
    kind = pyro.infer.autoguide.AutoDiagonalNormal
    before = bnn.fit(model, X, Y, method=dataclasses.replace(TINY, guide=kind))
    before.save(tmp_path / "fit")
    assert bnn.load(tmp_path / "fit", model).method.guide is kind
    for name in (
        "os.system",
        "pyro.infer.autoguide.guides.os.system",
        "pyro.infer.autoguide.init_to_feasible",
        "pyro.infer.autoguide.__builtins__",
        "pyro.infer.SVI",
        "mine.AutoNormal",
        ["os", "system"],
    ):
        forge(
            tmp_path / "fit",
            fitted,
            lambda m, n=name: m["method"]["settings"].update(guide={"code": n}),
        )
        with pytest.warns(UserWarning, match="guide"):
            assert bnn.load(tmp_path / "fit", model).method.guide == "normal"


def test_a_repeated_mode_is_stored_once(tmp_path):
    """1,000 draws of one point take the room of one."""

    def line(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([500]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w.sum() * x, 1.0), obs=y)

    x = torch.linspace(0, 1, 20)
    posterior = bnn.fit(line, x, x, method=bnn.MAP(steps=20, restarts=2))
    posterior.save(tmp_path / "mode")
    assert (tmp_path / "mode").stat().st_size < 50_000
    loaded = bnn.load(tmp_path / "mode", line)
    assert loaded.shape == (2, 1_000)
    assert torch.equal(loaded.draws["w"], posterior.draws["w"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shifted(bnn.Method):
    """A method whose program has a site that the model has not."""

    draws: int = 4

    def fit(self, model, data, sites, *, seed, progress):
        draws = {"net.weight": torch.ones(1, self.draws, 2), "shift": torch.randn(1, self.draws)}
        return bnn.Posterior(model=model, method=self, data=data, sites=sites, draws=draws)

    def program(self, model, params):
        def shifted(*args):
            shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
            with handlers.Rewrite({"f": lambda f: f + shift}):
                model(*args)

        return shifted


def test_sites_that_the_method_added_come_back(tmp_path):
    before = bnn.fit(model, X, Y, method=Shifted())
    shift = before.predict(X).f - (X @ torch.ones(2))
    torch.testing.assert_close(shift, before.draws["shift"][..., None].expand(1, 4, 12))
    before.save(tmp_path / "fit")
    after = bnn.load(tmp_path / "fit", model)
    assert same(before.draws, after.draws)
    assert torch.equal(after.predict(X).y, before.predict(X).y)
    kept = {k: v for k, v in before.draws.items() if k != "shift"}
    dataclasses.replace(before, draws=kept).save(tmp_path / "fit")
    with pytest.raises(bnn.CheckpointError, match='"shift" is absent in the file'):
        bnn.load(tmp_path / "fit", model)
