"""A fit that stops, however it does, goes on to the same bits; and nothing that is kept is lost."""

import copy
import dataclasses
import json
import os
import pickle
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

import bnn
from bnn import files, handlers, run
from bnn.data import Data, some_rows
from bnn.fingerprint import fingerprint
from bnn.inference._optimise import Ascent, maximise

pytestmark = [
    pytest.mark.filterwarnings("ignore::bnn.errors.ConvergenceWarning"),
    pytest.mark.filterwarnings("ignore::bnn.errors.ApproximationWarning"),
]
X = torch.randn(24, 2, generator=torch.Generator().manual_seed(0))
Y = X[:, 0] - X[:, 1] + 0.1 * torch.randn(24, generator=torch.Generator().manual_seed(1))


def model(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        f = pyro.deterministic("f", x @ w)
        pyro.sample("y", dist.Normal(f, sigma), obs=y)


LOADER = DataLoader(TensorDataset(X, Y), batch_size=6, shuffle=True)
OWN = DataLoader(
    TensorDataset(X, Y), batch_size=6, shuffle=True, generator=torch.Generator().manual_seed(5)
)
FITS = {
    "svi": (bnn.SVI(steps=80, batch_size=5, draws=10), (X, Y)),
    "svi_loader": (bnn.SVI(steps=80, draws=10), (LOADER,)),
    "map_loader": (bnn.MAP(steps=60, draws=2), (OWN,)),
    "svi_foreign": (bnn.SVI(steps=90, guide=pyro.infer.autoguide.AutoNormal, draws=5), (X, Y)),
    "map": (bnn.MAP(steps=80, restarts=2, batch_size=5), (X, Y)),
    "laplace": (bnn.Laplace(steps=80, draws=10), (X, Y)),
    "ensemble": (bnn.DeepEnsemble(members=3, steps=80, batch_size=5, snapshots=4), (X, Y)),
    "nuts": (bnn.NUTS(chains=2, warmup=25, draws=15), (X, Y)),
    "mclmc": (bnn.MCLMC(chains=3, warmup=25, draws=15), (X, Y)),
    "langevin": (bnn.MCLMC(chains=3, warmup=25, draws=15, adjusted=False), (X, Y)),
    "sghmc": (bnn.SGHMC(chains=2, warmup=40, steps=60, draws=10, batch_size=5), (X, Y)),
    "sgld": (bnn.SGLD(chains=1, warmup=40, steps=60, draws=10, cycles=2), (X, Y)),
    "swag": (bnn.SWAG(steps=60, collection=60, every=2, rank=4, draws=5), (X, Y)),
    "multiswag": (bnn.SWAG(steps=60, collection=60, every=2, rank=4, draws=5, restarts=2), (X, Y)),
    "laplaces": (bnn.Laplace(steps=80, draws=10, restarts=2), (X, Y)),
    "priors": (bnn.RandomizedPriors(members=3, steps=60), (X, Y)),
    "nuts_parts": (bnn.NUTS(chains=3, warmup=25, draws=15, parts=2), (X, Y)),
    "ensemble_parts": (bnn.DeepEnsemble(members=3, steps=80, batch_size=5, parts=2), (X, Y)),
    "dropout": (bnn.MCDropout(rate=0.2, steps=60, draws=5), (X, Y)),
}


def fit(name, folder=None, every=0.02, **changes):
    method, data = FITS[name]
    where = None if folder is None else bnn.Checkpoint(folder, every=every)
    torch.manual_seed(7)  # of the loaders' shuffling only
    OWN.generator.manual_seed(5)
    return bnn.fit(model, *data, method=dataclasses.replace(method, **changes), checkpoint=where)


def tensors(posterior):
    groups = ("draws", "params", "stats", "snapshots")
    found = {f"{g}.{k}": v for g in groups for k, v in getattr(posterior, g).items()}
    if posterior.history is not None:
        found["history"] = posterior.history
    return found


def same(first, second):
    """Bit for bit."""
    one, other = tensors(first), tensors(second)
    assert one.keys() == other.keys()
    numbers = lambda p: (p.elbo, p.log_evidence, p.complete, p.seed)
    return numbers(first) == numbers(second) and all(
        one[k].dtype == other[k].dtype and torch.equal(one[k].nan_to_num(), other[k].nan_to_num())
        for k in one
    )


@pytest.fixture(scope="module", autouse=True)
def listening():
    """Ctrl-C as in a terminal: a job in the background starts with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def stop(monkeypatch):
    """Ctrl-C before step number `at` of a fit's loops, counted from the call on."""
    plain = run.Phase.goes_on

    def arm(at, number=signal.SIGINT):
        left = [at]

        def goes_on(self):
            left[0] -= 1
            if left[0] == 0:
                signal.raise_signal(number)
            return plain(self)

        monkeypatch.setattr(run.Phase, "goes_on", goes_on)

    return arm


# ------------------------------------------------------------------ stopped, and gone on with


QUICK = ("svi", "ensemble", "nuts", "ensemble_parts", "mclmc", "sghmc", "swag")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FITS]
)
def test_a_fit_that_is_stopped_again_and_again_ends_at_the_same_bits(name, stop, tmp_path):
    whole, reach = fit(name), 5 if name == "nuts" else 1  # whose steps are leapfrogs
    rng, stops = random.Random(name), 0
    for attempt in range(60):
        stop(reach * (400 if attempt % 3 == 2 else rng.randrange(15, 60)))
        try:
            part = fit(name, tmp_path, every=rng.choice([0.02, 9.0]))
        except KeyboardInterrupt:
            stops += 1
            with pytest.raises(bnn.CheckpointError, match="no draws yet"):
                bnn.load(tmp_path, model)
            continue
        if part.complete:
            break
        stops += 1
        assert "INCOMPLETE" in repr(part)
        assert same(bnn.load(tmp_path, model), part)
    assert stops > 0
    assert same(part, whole)
    assert same(fit(name, tmp_path), whole)  # at once, from its file
    kept = {"fit.safetensors", "posterior.safetensors", "lock"}
    assert set(os.listdir(tmp_path)) == kept
    assert same(bnn.load(tmp_path, model), whole)


@pytest.mark.parametrize(
    "method",
    [
        bnn.ConcreteDropout(steps=60, draws=5),
        bnn.GFlowOut(steps=60, draws=5),
        bnn.DirichletAttention(steps=60, draws=5, batch_size=7),
        bnn.SVI(estimator="local", steps=60, draws=5),
    ],
    ids=lambda method: type(method).__name__,
)
def test_masks_and_attention_that_are_stopped_end_at_the_same_bits(method, stop, tmp_path):
    """And a net that draws masks itself, in the runs that tell a bound what noise it takes."""
    net, given = bnn.models.mlp_regression(2, (4,)), (X, Y)
    if isinstance(method, bnn.DirichletAttention):
        images = torch.rand(24, 4, 4, generator=torch.Generator().manual_seed(0))
        net = bnn.models.vit((4, 4), 3, patch=2, width=4, heads=2, layers=1)
        given = images, torch.arange(24) % 3
    elif isinstance(method, bnn.SVI):
        layers = nn.Linear(2, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 1)
        net = bnn.models.supervised(nn.Sequential(*layers), bnn.models.likelihoods.Gaussian(0.3))
    whole = bnn.fit(net, *given, method=method)
    for at in (17, 30):
        stop(at)
        assert not bnn.fit(net, *given, method=method, checkpoint=tmp_path).complete
    stop(10**9)
    assert same(bnn.fit(net, *given, method=method, checkpoint=tmp_path), whole)


def test_a_finished_fit_is_not_run_again(tmp_path, monkeypatch):
    fit("svi", tmp_path)
    monkeypatch.setattr(bnn.SVI, "fit", None)
    assert fit("svi", tmp_path).method == FITS["svi"][0]


def test_a_method_that_knows_nothing_of_runs_is_kept_at_its_end(tmp_path):
    calls = []

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Once(bnn.Method):
        """A method with a loop of its own."""

        def fit(self, model, data, sites, *, seed, progress):
            calls.append(1)
            draws = {"w": torch.ones(1, 3, 2), "sigma": torch.ones(1, 3)}
            return bnn.Posterior(model=model, method=self, data=data, sites=sites, draws=draws)

    first = bnn.fit(model, X, Y, method=Once(), checkpoint=tmp_path)
    assert same(bnn.fit(model, X, Y, method=Once(), checkpoint=tmp_path), first)
    assert calls == [1]


def test_a_phase_of_the_users_own_method_goes_on(tmp_path, stop):
    """Any method on `maximise`, whatever iterator its batches are."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Point(bnn.Method):
        """The mode, in forty lines less."""

        def fit(self, model, data, sites, *, seed, progress):
            z = torch.zeros(3)
            noise = torch.Generator().manual_seed(1)
            batches = ((torch.randn(3, generator=noise),) for _ in range(10**9))
            objective = lambda leaves, batch, weight, _: -(leaves["z"] - batch[0]).square().sum()
            (history,) = maximise(
                objective, {"z": z}, batches, Ascent(steps=50), what="Point", label="f",
                progress=False,
            )  # fmt: skip
            draws = {"w": z.detach()[None, None, :2], "sigma": z.detach()[None, None, 2].exp()}
            return bnn.Posterior(
                model=model, method=self, data=data, sites=sites, draws=draws, history=history
            )

    whole = bnn.fit(model, X, Y, method=Point())
    stop(20)
    assert not bnn.fit(model, X, Y, method=Point(), checkpoint=tmp_path).complete
    assert same(bnn.fit(model, X, Y, method=Point(), checkpoint=tmp_path), whole)


def test_minibatches_are_set_back(tmp_path):
    def check(make, shared=False):
        ahead, first, second = 7, make(), make()
        torch.manual_seed(3)
        straight = [next(first)[-1] for _ in range(20)]
        torch.manual_seed(3)
        second.ahead(3)  # changes nothing
        broken = [next(second)[-1] for _ in range(ahead)]
        state, now = second.state(), handlers.generators()
        third = make()
        handlers.set_generators(now)
        third.restore(state)
        broken += [next(third)[-1] for _ in range(20 - ahead)]
        assert all(map(torch.equal, straight, broken))

    data = Data((X, Y), ("x", "y"), {}, 24)
    generator = lambda: torch.Generator().manual_seed(2)
    check(lambda: data.batches(5, generator()))
    check(lambda: data.batches(5, generator(), passes=False))
    check(lambda: data.batches(None, generator()))
    loaders = [
        lambda: LOADER,
        lambda: DataLoader(TensorDataset(X, Y), batch_size=6, shuffle=True, generator=generator()),
    ]
    for loader in loaders:
        check(lambda make=loader: dataclasses.replace(data, loader=make()).batches(None, None))


def test_generators_come_back():
    before = handlers.generators()
    draws = lambda: (torch.randn(3).tolist(), np.random.randn(3).tolist(), random.gauss(0, 1))
    random.gauss(0, 1)  # leaves a second one for later
    middle = handlers.generators()
    first = draws()
    handlers.set_generators(middle)
    assert draws() == first
    handlers.set_generators(before)


# ------------------------------------------------------------------ Ctrl-C and SIGTERM


def test_ctrl_c_gives_what_there_is(stop):
    stop(200)
    with pytest.warns(bnn.ConvergenceWarning, match=r"stopped \(Ctrl-C\).*incomplete"):
        part = fit("nuts", warmup=5, draws=5_000)
    chains, draws = part.shape
    assert chains == 2
    assert 1 <= draws < 200
    assert part.stats["lp"].shape == (2, draws)
    assert not part.complete
    assert part.to_arviz() is not None


def test_a_partial_posterior_stays_marked_in_its_file(stop, tmp_path):
    stop(20)
    part = fit("svi")
    assert len(part.history) == 19
    part.save(tmp_path / "part")
    assert not bnn.load(tmp_path / "part", model).complete
    assert not bnn.load(tmp_path / "part", model).predict(X).y.isnan().any()


def test_ctrl_c_where_there_is_nothing_yet_is_an_interrupt(stop):
    stop(5)
    with pytest.raises(KeyboardInterrupt, match="before its phase 'draws'"):
        fit("nuts")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_ends_the_fit(monkeypatch):
    plain = run.Phase.goes_on

    def goes_on(self):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return plain(self)

    monkeypatch.setattr(run.Phase, "goes_on", goes_on)
    with pytest.raises(KeyboardInterrupt):
        fit("svi")


def test_ctrl_c_outside_loops_is_what_it_was(monkeypatch):
    """While the model is looked at, traced, compiled, and in a method with loops of its own."""
    monkeypatch.setattr(bnn.SVI, "fit", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        fit("svi")


def test_sigterm_gives_what_there_is_where_there_is_a_checkpoint(stop, tmp_path):
    stop(30, signal.SIGTERM)
    part = fit("svi", tmp_path)
    assert not part.complete
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    stop(5, signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        fit("nuts", tmp_path / "other")
    assert ended.value.code == 143


def test_a_fit_in_another_thread_leaves_signals_alone(tmp_path):
    found = []
    work = threading.Thread(target=lambda: found.append(fit("svi", tmp_path)))
    work.start()
    work.join()
    assert found[0].complete


# ------------------------------------------------------------------ another fit in the folder


def test_what_differs_is_named(stop, tmp_path):
    stop(20)
    fit("svi", tmp_path)
    method = FITS["svi"][0]

    def other(x, y=None):
        with pyro.poutine.scale(scale=2.0):
            return model(x, y)

    cases = {
        "data": ((model, X, Y + 1), {}),
        "model": ((other, X, Y), {}),
        "settings": ((model, X, Y), {"method": dataclasses.replace(method, learning_rate=0.01)}),
        "seed": ((model, X, Y), {"seed": 1}),
    }
    for field, (args, changed) in cases.items():
        with pytest.raises(bnn.ResumeMismatch, match=f"other {field}") as caught:
            bnn.fit(*args, **{"method": method, "checkpoint": tmp_path} | changed)
        assert caught.value.field == field
    with pytest.raises(bnn.ResumeMismatch, match=r"learning_rate was 0\.02 and is 0\.01"):
        bnn.fit(model, X, Y, checkpoint=tmp_path, **cases["settings"][1])
    try:
        torch.set_default_dtype(torch.float64)
        with pytest.raises(bnn.ResumeMismatch) as caught:
            fit("svi", tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)
    assert caught.value.field in ("data", "dtype")


def _mapped(folder, y):
    folder.mkdir()
    np.save(folder / "x.npy", X.numpy())
    np.save(folder / "y.npy", y.numpy())
    return [np.load(folder / f"{name}.npy", mmap_mode="r") for name in "xy"]


class _Noisy(TensorDataset):
    """Rows that are moved at random each time."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + 0.01 * torch.randn_like(x), y


@pytest.mark.parametrize(
    "given",
    [
        lambda folder, y: [DataLoader(TensorDataset(X, y), batch_size=6, shuffle=True)],
        _mapped,
    ],
    ids=["DataLoader", "mapped"],
)
def test_other_rows_behind_a_loader_are_told(stop, tmp_path, given):
    method = bnn.SVI(steps=80, draws=10, batch_size=6 if given is _mapped else None)
    other = Y.clone()
    other[-1] += 1.0
    stop(20)
    bnn.fit(model, *given(tmp_path / "a", Y), method=method, checkpoint=tmp_path / "run")
    again = given(tmp_path / "b", other)
    with pytest.raises(bnn.ResumeMismatch, match="other data: some rows was"):
        bnn.fit(model, *again, method=method, checkpoint=tmp_path / "run")
    stop(10**9)
    again = given(tmp_path / "c", Y)
    assert bnn.fit(model, *again, method=method, checkpoint=tmp_path / "run").complete


@pytest.mark.parametrize(
    ("field", "changed"),
    [
        ("batch size", {"batch_size": 5}),
        ("order", {"shuffle": True}),
        ("batches", {"drop_last": True}),
        ("some rows", {"sampler": SubsetRandomSampler(range(10))}),
    ],
)
def test_other_batches_are_other_data(stop, tmp_path, field, changed):
    """A fold of other rows, by the same dataset; batches of other sizes, or in another order."""
    part = {"sampler": SubsetRandomSampler(range(10, 20))} if "sampler" in changed else {}
    method, rows = bnn.SVI(steps=80, draws=10), TensorDataset(X[:22], Y[:22])
    stop(20)
    given = DataLoader(rows, **{"batch_size": 6, **part})
    bnn.fit(model, given, method=method, checkpoint=tmp_path)
    stop(10**9)
    again = DataLoader(rows, **{"batch_size": 6, **changed})
    with pytest.raises(bnn.ResumeMismatch, match=f"other data:.*{field} was") as caught:
        bnn.fit(model, again, method=method, checkpoint=tmp_path)
    assert caught.value.field == "data"
    assert bnn.fit(model, given, method=method, checkpoint=tmp_path).complete


class _Opened(TensorDataset):
    """Opens what it reads from at its first row, as files do that a worker must not inherit."""

    handle = None

    def __getitem__(self, index):
        self.handle = self.handle or os.getpid()
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_are_asked_of_a_worker_where_there_are_some(workers):
    rows = _Opened(X, Y)
    with handlers.seeded(np.random.SeedSequence(0)):
        found = list(some_rows(DataLoader(rows, batch_size=6, num_workers=workers)))
    assert torch.equal(torch.stack([x for x, _ in found]), X)
    assert (rows.handle is None) == bool(workers)


@pytest.mark.parametrize(
    "rows",
    [
        np.arange(3.0)[::-1],
        np.arange(3, dtype=">f4"),
        np.arange(3, dtype=np.longdouble),
        np.float32(2.0),
        np.array(["a", "b"]),
    ],
)
def test_arrays_that_torch_does_not_take_have_a_fingerprint(rows):
    assert fingerprint(rows) == fingerprint(rows.copy())


@pytest.mark.parametrize("noisy", [True, False])
def test_rows_that_change_or_cannot_be_asked_for_are_no_other_data(stop, tmp_path, noisy):
    def given():
        if noisy:
            return DataLoader(_Noisy(X, Y), batch_size=6)
        return Pass((X[:6], Y[:6]), (X[6:], Y[6:]))

    stop(20)
    method = bnn.SVI(steps=80, draws=10)
    bnn.fit(model, given(), method=method, checkpoint=tmp_path)
    stop(10**9)
    assert bnn.fit(model, given(), method=method, checkpoint=tmp_path).complete


class Pass:
    """Batches that can be gone through and not asked for."""

    def __init__(self, *batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def test_other_versions_are_told(stop, tmp_path, monkeypatch):
    stop(20)
    fit("svi", tmp_path)
    monkeypatch.setattr(pyro, "__version__", "2.99")
    with pytest.warns(bnn.CheckpointWarning, match=r"other versions \(pyro .* -> 2.99\)"):
        fit("svi", tmp_path)
    monkeypatch.setattr(run, "_SCHEMA", 99)
    with pytest.raises(bnn.ResumeMismatch) as caught:
        fit("svi", tmp_path)
    assert caught.value.field == "version"


SCALE = 1.0


def test_a_model_is_known_by_what_it_does():
    def make(scale, source="x"):
        def program(x):
            return pyro.sample("w", dist.Normal(0.0, scale))

        return program

    def reads_a_global(x):
        return SCALE * x

    assert fingerprint(make(1.0)) == fingerprint(make(1.0))
    assert fingerprint(make(1.0)) != fingerprint(make(2.0))
    assert fingerprint(make(torch.ones(3))) != fingerprint(make(torch.zeros(3)))
    assert fingerprint(lambda x: x + 1) != fingerprint(lambda x: x + 2)
    assert fingerprint(lambda x: x.sin()) != fingerprint(lambda x: x.cos())
    before = fingerprint(reads_a_global)
    globals()["SCALE"] = 2.0
    assert fingerprint(reads_a_global) != before
    globals()["SCALE"] = 1.0
    net = lambda: torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh())
    assert fingerprint(net()) == fingerprint(net())  # weights are starting points
    assert fingerprint(net()) != fingerprint(net()[0])
    mlp = lambda hidden: bnn.models.mlp_regression(2, hidden=(hidden,))
    assert fingerprint(mlp(5)) == fingerprint(mlp(5))
    assert fingerprint(mlp(5)) != fingerprint(mlp(6))


@pytest.mark.parametrize(
    ("value", "other"),
    [
        ({"scale": 1.0}, {"scale": 2.0}),
        ([5, 5], [5, 6]),
        (bnn.models.priors.Normal(1.0), bnn.models.priors.Normal(2.0)),
        (torch.nn.Linear(1, 5), torch.nn.Linear(1, 6)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_model_is_known_by_the_globals_it_reads(value, other, monkeypatch):
    def program(x):
        return SETTING, x  # noqa: F821

    monkeypatch.setitem(globals(), "SETTING", value)
    before = fingerprint(program)
    monkeypatch.setitem(globals(), "SETTING", copy.deepcopy(value))
    assert fingerprint(program) == before
    monkeypatch.setitem(globals(), "SETTING", other)
    assert fingerprint(program) != before


def test_a_model_that_is_an_object_is_known_by_its_methods():
    def make(scale, wraps=lambda function: function, heir=True):
        class Parent:
            def __call__(self, x):
                return self.prior(x) if scale == 1.0 else -self.prior(x)

            prior = wraps(lambda *args: scale * args[-1])

        return type("Heir", (Parent,), {})() if heir else Parent()

    for settings in ({}, {"heir": False}, {"wraps": staticmethod}, {"wraps": property}):
        assert fingerprint(make(1.0, **settings)) == fingerprint(make(1.0, **settings))
        assert fingerprint(make(1.0, **settings)) != fingerprint(make(2.0, **settings))


_FINGERPRINT = """
import sys; sys.path.insert(0, {root!r})
import tests.bnn.test_run as t
from bnn.fingerprint import fingerprint
import bnn
print(fingerprint(t.model), fingerprint(bnn.models.mlp_regression(2)))
"""


@pytest.mark.slow
def test_a_model_is_known_in_another_process():
    told = [
        subprocess.run(
            [sys.executable, "-c", _FINGERPRINT.format(root=str(Path(__file__).parents[2]))],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert told[0] == told[1]
    assert len(told[0]) > 100


def test_two_fits_do_not_write_in_one_folder(tmp_path):
    with run.Folder(tmp_path), pytest.raises(bnn.CheckpointError, match="in use"):
        fit("svi", tmp_path)
    assert fit("svi", tmp_path).complete
    (tmp_path / "file").touch()
    with pytest.raises(bnn.CheckpointError, match="cannot be a checkpoint"):
        fit("svi", tmp_path / "file")


def test_settings_of_a_checkpoint_are_checked():
    assert eval(repr(bnn.Checkpoint("run", every=3.0)), {"Checkpoint": bnn.Checkpoint})
    for wrong in (3, True):
        with pytest.raises(TypeError, match="checkpoint"):
            bnn.fit(model, X, Y, checkpoint=wrong)
    with pytest.raises(TypeError, match="every"):
        bnn.Checkpoint("run", every="often")
    with pytest.raises(ValueError, match="every"):
        bnn.Checkpoint("run", every=-1)


# ------------------------------------------------------------------ disks and crashes


def test_a_full_disk_costs_nothing_but_a_warning(stop, tmp_path, monkeypatch):
    whole = fit("nuts")
    plain, room = files.save_file, [6]

    def full(*args):
        room[0] -= 1
        if room[0] < 0:
            raise OSError(28, "No space left on device")
        plain(*args)

    monkeypatch.setattr(files, "save_file", full)
    with pytest.warns(bnn.CheckpointWarning, match="No space left.*The fit goes on") as caught:
        assert same(fit("nuts", tmp_path), whole)
    assert sum(w.category is bnn.CheckpointWarning for w in caught) == 1
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    room[0] = 10**9
    states = {p.name: files.read(p) for p in tmp_path.glob("*.safetensors")}  # all whole
    assert "state-0.safetensors" in states
    assert same(fit("nuts", tmp_path), whole)


def test_room_that_comes_back_is_used(tmp_path, monkeypatch):
    """Draws and ends of phases for which there was no room are written later, and not lost."""
    plain, count = files.save_file, [0]

    def flaky(*args):
        count[0] += 1
        if count[0] % 3:
            raise OSError(28, "No space left on device")
        plain(*args)

    monkeypatch.setattr(files, "save_file", flaky)
    (tmp_path / "lock").touch()
    with pytest.raises(bnn.CheckpointError, match="No space left"):
        fit("mclmc", tmp_path)  # what the fit is must be written
    count[0] = 2
    with pytest.warns(bnn.CheckpointWarning):
        whole = fit("mclmc", tmp_path)
    assert same(whole, fit("mclmc"))


def test_the_older_state_is_gone_on_from_where_the_newer_is_damaged(stop, tmp_path):
    whole = fit("svi")
    stop(30)
    fit("svi", tmp_path)
    states = sorted(tmp_path.glob("state-*"), key=lambda p: p.stat().st_mtime_ns)
    raw = bytearray(states[1].read_bytes())
    raw[-5] ^= 1
    states[1].write_bytes(raw)
    with pytest.warns(bnn.CheckpointWarning, match="damaged.*before it is whole"):
        assert same(fit("svi", tmp_path), whole)
    stop(30)
    fit("svi", tmp_path / "other")
    for path in (tmp_path / "other").glob("state-*"):
        path.write_bytes(b"x")
    with pytest.raises(bnn.CheckpointError, match=r"Delete .* to begin anew"):
        fit("svi", tmp_path / "other")


def test_half_written_files_are_swept_away(stop, tmp_path):
    stop(30)
    fit("svi", tmp_path)
    (tmp_path / ".state-0.safetensors.0123456789abcdef").write_bytes(b"half")
    (tmp_path / ".mine").touch()
    assert same(fit("svi", tmp_path), fit("svi"))
    assert set(os.listdir(tmp_path)) == {
        "fit.safetensors", "posterior.safetensors", "lock", ".mine"
    }  # fmt: skip


def forked(work):
    """Runs `work(send)` in a child process; its pid, and a pipe from it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            work(lambda text: os.write(writing, text.encode()))
        finally:
            os._exit(0)
    os.close(writing)
    return child, reading


def fits_in_a_child(name, folder):
    def work(send):
        torch.save(tensors(fit(name, folder)), Path(folder) / "result")
        send("done")

    return forked(work)


def killed_and_resumed(name, folder, after):
    """True if a SIGKILL met the fit on its way; its result, resumed, is in folder/result."""
    child, pipe = fits_in_a_child(name, folder)
    ended = bool(select.select([pipe], [], [], after)[0])
    if not ended:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(pipe)
    if not ended:
        child, pipe = fits_in_a_child(name, folder)
        assert os.read(pipe, 10) == b"done"
        os.waitpid(child, 0)
        os.close(pipe)
    return not ended


fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")


@fork
@pytest.mark.parametrize(
    ("name", "kills"),
    [("svi", 2), ("nuts", 2)]
    + [pytest.param(n, 20, marks=pytest.mark.slow) for n in ("svi", "nuts", "mclmc", "ensemble")],
)
def test_kill_9_changes_no_bit(name, kills, tmp_path):
    """So many that met the fit on its way; those that come after its end are not counted."""
    whole = tensors(fit(name))
    start = time.perf_counter()
    fit(name, tmp_path / "whole")  # what the first one compiled is there in the forks too
    seconds, rng, hits = time.perf_counter() - start, random.Random(name), 0
    for kill in range(3 * kills):
        folder = tmp_path / str(kill)
        folder.mkdir()
        hits += killed_and_resumed(name, folder, rng.uniform(0.05, 0.9) * seconds)
        found = torch.load(folder / "result", weights_only=True)
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[k], v) for k, v in whole.items()), kill
        if hits == kills:
            return
    raise AssertionError(f"{hits} of {kills} kills met the fit.")


def dies_after(name, folder, count):
    """True if the fit wrote more than so many files, and died on the spot."""

    def work(send):
        plain, left = files.write, [count]

        def write(*args):
            plain(*args)
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)

        files.write = write
        fit(name, folder, every=0.0)

    child, pipe = forked(work)
    os.close(pipe)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@fork
@pytest.mark.parametrize("files_written", [1, 2, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FITS)
def test_whatever_was_written_last_is_gone_on_from_to_the_same_bits(name, files_written, tmp_path):
    """Also the state before the first step, which a timed kill seldom meets; None: others."""
    whole = fit(name)
    for count in range(3, 1_000, 41) if files_written is None else [files_written]:
        died = dies_after(name, tmp_path / str(count), count)
        assert same(fit(name, tmp_path / str(count), every=10.0), whole), count
        if not died:
            break
    assert died or files_written is None


@fork
@pytest.mark.parametrize("saves", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_a_kill_during_a_save_leaves_a_whole_file(saves, tmp_path):
    """The file is always the one before or the one after; and it is always there."""
    path, rng = tmp_path / "state.safetensors", random.Random(0)
    files.write(path, {"x": torch.zeros(100_000)}, {"number": 0})

    def save(send, first):
        send("here")
        for number in range(first, 10**9):
            files.write(path, {"x": torch.full((100_000,), float(number))}, {"number": number})

    met = set()
    for kill in range(saves):
        child, pipe = forked(lambda send, first=1_000 * kill: save(send, first))
        os.read(pipe, 10)
        time.sleep(rng.uniform(0.0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(pipe)
        manifest, found = files.read(path)
        assert (found["x"] == manifest["number"]).all()
        met.add(manifest["number"])
    assert len(met) > saves / 4


@fork
def test_two_writers_on_one_path_never_break_it(tmp_path):
    path = tmp_path / "shared"

    def save(send):
        for number in range(30):
            files.write(path, {"x": torch.full((20_000,), float(number))}, {"number": number})

    files.write(path, {"x": torch.zeros(20_000)}, {"number": 0})
    children = [forked(save) for _ in range(2)]
    for _ in range(40):
        manifest, found = files.read(path)
        assert (found["x"] == manifest["number"]).all()
    for child, pipe in children:
        os.waitpid(child, 0)
        os.close(pipe)
    assert os.listdir(tmp_path) == ["shared"]


# ------------------------------------------------------------------ damaged and hostile files


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A folder of each kind of file, stopped on its way in the second phase."""
    folder = tmp_path_factory.mktemp("parts")
    plain, count = run.Phase.goes_on, [0]

    def goes_on(self):
        count[0] += self.name == "draws"
        if count[0] == 12:
            signal.raise_signal(signal.SIGINT)
        return plain(self)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(run.Phase, "goes_on", goes_on)
        assert not fit("mclmc", folder, every=1e6).complete
    return folder


def test_the_parts_are_what_is_damaged_below(parts):
    names = {p.name for p in parts.glob("*.safetensors")}
    assert names == {
        "fit.safetensors", "phase-0.safetensors", "state-1.safetensors",
        "draws-1-00000.safetensors",
    }  # fmt: skip


def test_no_truncation_and_no_flipped_byte_goes_unseen(parts, tmp_path):
    rng, refused, whole = random.Random(0), 0, 0
    for path in parts.glob("*.safetensors"):
        raw, damaged = path.read_bytes(), tmp_path / path.name
        before = files.read(path)
        for size in np.linspace(0, len(raw) - 1, 50).astype(int):
            damaged.write_bytes(raw[:size])
            with pytest.raises(bnn.CheckpointError):
                files.read(damaged)
        header = 8 + int.from_bytes(raw[:8], "little")
        for i in range(250):
            at = rng.randrange(header if i % 2 else len(raw))
            flipped = bytearray(raw)
            flipped[at] ^= rng.randrange(1, 256)
            damaged.write_bytes(flipped)
            try:
                manifest, found = files.read(damaged)
            except bnn.CheckpointError:
                refused += 1
            else:  # a space in the header, or the name of its padding
                assert manifest == before[0]
                assert found.keys() == before[1].keys()
                assert all(torch.equal(found[k], v) for k, v in before[1].items())
                whole += 1
    assert whole < 0.02 * refused


class Canary:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def _zip(path):
    import zipfile

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../escaped", "x")
        archive.writestr("archive/data.pkl", pickle.dumps(Canary()))


def _with_header(header, body=b""):
    raw = json.dumps(header).encode() if isinstance(header, dict) else header
    return len(raw).to_bytes(8, "little") + raw + body


HOSTILE = {
    **{f"pickle {n}": lambda p, n=n: p.write_bytes(pickle.dumps(Canary(), n)) for n in range(6)},
    "torch.save": lambda p: torch.save({"x": Canary()}, p),
    "zip with ../": _zip,
    "10 GB header": lambda p: p.write_bytes((10 * 2**30).to_bytes(8, "little") + b"{}"),
    "90 MB header, there": lambda p: p.write_bytes(_with_header(b" " * 90_000_000)),
    "nested JSON": lambda p: p.write_bytes(_with_header(b"[" * 5_000_000)),
    "wide JSON": lambda p: p.write_bytes(_with_header(b"[" + b"[]," * 2_000_000 + b"[]]")),
    "bomb in the manifest": lambda p: p.write_bytes(
        _with_header({"__metadata__": {"bnn": "[" + "[]," * 600_000 + "[]]", "sha256": ""}})
    ),
    "deep manifest": lambda p: p.write_bytes(
        _with_header({"__metadata__": {"bnn": "[" * 1_000_000, "sha256": ""}})
    ),
    "negative shape": lambda p: p.write_bytes(
        _with_header({"x": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}, bytes(16))
    ),
    "huge shape": lambda p: p.write_bytes(
        _with_header({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})
    ),
    "overflowing shape": lambda p: p.write_bytes(
        _with_header({"x": {"dtype": "F32", "shape": [2**32] * 3, "data_offsets": [0, 0]}})
    ),
    "link": lambda p: p.symlink_to("/dev/zero"),
    "folder": lambda p: p.mkdir(),
    "pipe": os.mkfifo,
    "empty": lambda p: p.touch(),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_nothing_runs_whatever_the_file(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target = tmp_path / "state-0.safetensors"
    HOSTILE[kind](target)
    peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(bnn.CheckpointError):
        files.read(target)
    with pytest.raises(bnn.CheckpointError):
        run._read(target)
    with pytest.raises(bnn.CheckpointError):
        bnn.load(target, model)
    assert time.perf_counter() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100_000  # kB
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path.parent / "escaped").exists()


@pytest.mark.parametrize("place", ["fit", "phase-0", "state-1", "draws-1-00000", "posterior"])
def test_nothing_runs_wherever_the_file_lies(place, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind in ("pickle 5", "link"):
        folder = tmp_path / kind
        shutil.copytree(parts, folder)
        target = folder / f"{place}.safetensors"
        target.unlink(missing_ok=True)
        HOSTILE[kind](target)
        for call in (lambda at=folder: bnn.load(at, model), lambda at=folder: fit("mclmc", at)):
            with pytest.raises(bnn.CheckpointError):
                call()
    assert not (tmp_path / "executed").exists()


def test_a_link_in_a_runs_folder_is_not_followed(parts, tmp_path):
    """Not even to a right file: a run writes none, so somebody else has."""
    folder = tmp_path / "run"
    shutil.copytree(parts, folder)
    (folder / "state-1.safetensors").rename(tmp_path / "elsewhere")
    (folder / "state-1.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(bnn.CheckpointError, match="is a link"):
        bnn.load(folder, model)


def rewritten(path, change):
    """The file with its tree changed, and a right SHA-256."""
    manifest, found = files.read(path)
    tree = files.unpacked(manifest["tree"], found)
    change(tree)
    stored = {}
    files.write(path, stored, {"schema": manifest["schema"], "tree": files.packed(tree, stored)})


FORGED = {
    "NaN step": ("state-1", lambda t: t["loop"]["sampler"]["numbers"].__setitem__(0, np.nan)),
    "negative step": ("state-1", lambda t: t["loop"]["sampler"]["numbers"].__setitem__(0, -1.0)),
    "NaN position": ("state-1", lambda t: t["loop"]["sampler"]["z"].fill_(np.nan)),
    "scale of 0": ("state-1", lambda t: t["loop"]["sampler"]["scale"].zero_()),
    "other shape": (
        "state-1",
        lambda t: t["loop"]["sampler"].update(z=torch.zeros(3, 9)),
    ),
    "other dtype": (
        "state-1",
        lambda t: t["loop"]["sampler"].update(u=t["loop"]["sampler"]["u"].double()),
    ),
    "a field less": ("state-1", lambda t: t["loop"]["sampler"].pop("u")),
    "a field more": ("state-1", lambda t: t["loop"].update(extra=1)),
    "text for a number": ("state-1", lambda t: t["loop"].update(number="1")),
    "more draws than there are": ("state-1", lambda t: t["loop"].update(number=2**31)),
    "negative draws": ("state-1", lambda t: t["loop"].update(number=-1)),
    "more files than there are": ("state-1", lambda t: t.update(chunks=10**9)),
    "another phase": ("phase-0", lambda t: t.update(phase=3)),
    "another loop": ("state-1", lambda t: t.update(name="warmup")),
    "a generator of another kind": (
        "state-1",
        lambda t: t["loop"]["sampler"]["shared"].update(bit_generator="os.system"),
    ),
    "a generator cut short": (
        "state-1",
        lambda t: t["generators"].update(torch=t["generators"]["torch"][:100]),
    ),
    "draws of another shape": (
        "draws-1-00000",
        lambda t: t["chunk"].update(kept=torch.zeros(3, 4, 99)),
    ),
    "draws without statistics": ("draws-1-00000", lambda t: t["chunk"].pop("stats")),
    "too many draws": ("draws-1-00000", lambda t: t["chunk"].update(kept=torch.zeros(3, 99, 3))),
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_state_is_refused(kind, parts, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(parts, folder)
    place, change = FORGED[kind]
    rewritten(folder / f"{place}.safetensors", change)
    with pytest.raises(bnn.CheckpointError):
        bnn.load(folder, model)
    if kind in ("NaN step", "more draws than there are"):
        with pytest.raises(bnn.CheckpointError):
            fit("mclmc", folder)


def test_the_forger_can_write_a_right_state(parts, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(parts, folder)
    for place in ("state-1", "phase-0", "draws-1-00000"):
        rewritten(folder / f"{place}.safetensors", lambda t: None)
    assert same(fit("mclmc", folder), fit("mclmc"))
