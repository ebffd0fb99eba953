"""Bad inputs through every method: what is refused and how it is told, what is let through."""

import random
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.sparse import csr_array
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import bnn
from bnn.errors import DataError, DataWarning, ModelError
from bnn.method import METHODS

pytestmark = pytest.mark.filterwarnings(
    "ignore::bnn.errors.ConvergenceWarning", "ignore::bnn.errors.ApproximationWarning"
)

SVI = bnn.SVI(steps=20, draws=5)
MAP = bnn.MAP(steps=20, draws=5)
NUTS = bnn.NUTS(chains=1, draws=5, warmup=5, max_tree_depth=3)
EVERY = pytest.mark.parametrize("method", [SVI, MAP, NUTS], ids=lambda m: type(m).__name__)
OPTIMISERS = pytest.mark.parametrize("method", [SVI, MAP], ids=lambda m: type(m).__name__)

N = 6
X = torch.tensor([[0.5, -1.0], [1.5, 0.25], [-0.75, 2.0], [0.1, 0.3], [-1.2, -0.4], [0.9, 1.1]])
Y = torch.tensor([0.3, -1.2, 0.8, 0.05, 1.4, -0.6])
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
BINARY = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0])
COUNTS = torch.tensor([0.0, 3.0, 1.0, 4.0, 1.0, 5.0])
FRAME = pd.DataFrame(X.numpy(), columns=["age", "dose"])


def normal(f: Tensor) -> Any:
    return dist.Normal(f, 1.0)


def categorical(f: Tensor) -> Any:
    return dist.Categorical(logits=f)


def bernoulli(f: Tensor) -> Any:
    return dist.Bernoulli(logits=f)


def poisson(f: Tensor) -> Any:
    return dist.Poisson(f.exp())


def linear(
    likelihood: Callable[[Tensor], Any] = normal,
    *,
    weights: tuple[int, ...] = (2,),
    plate: bool = True,
    size: int | None = None,
) -> Callable[..., None]:
    """Linear model in two features: f = x @ w."""

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand(weights).to_event(len(weights)))
        f = x @ w
        with pyro.plate("data", size or len(x)) if plate else nullcontext():
            pyro.sample("y", likelihood(f), obs=y)

    return model


REGRESSION = linear()
CLASSES = linear(categorical, weights=(2, 3))
BINARIES = linear(bernoulli)
RATES = linear(poisson)
COLUMN = linear(weights=(2, 1))  # a net's output keeps its last axis: (row, 1)


def weight() -> Tensor:
    return pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))


def observe(f: Tensor, y: Tensor | None, scale: Any = 1.0) -> None:
    with pyro.plate("data", len(f)):
        pyro.sample("y", dist.Normal(f, scale), obs=y)


def changed(tensor: Tensor, value: float, *at: int) -> Tensor:
    tensor = tensor.clone()
    tensor[at] = value
    return tensor


# Models that cannot be fitted as they are written -----------------------------------------------


def forgets_obs(x, y=None):
    f = x @ weight()
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(f, 1.0))


def draws_nothing(x, y=None):
    return x.sum()


def no_latent(x, y=None):
    observe(x.sum(-1), y)


def ignores_y(x, y=None):
    observe(x @ weight(), Y)


def same_name_twice(x, y=None):
    w = weight()
    observe(x @ w + pyro.sample("w", dist.Normal(0.0, 1.0)), y)


def discrete_latent(x, y=None):
    z = pyro.sample("z", dist.Bernoulli(0.5))
    observe(x @ weight() + z, y)


def moving_support(x, y=None):
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    u = pyro.sample("u", dist.Uniform(0.0, tau))
    observe(x @ weight() + u, y)


def branches(below: float) -> Callable[..., None]:
    """Draws w in some runs only: the check sees side at 1.00, 0.26 or 1.31, and its mirror."""

    def model(x, y=None):
        side = pyro.sample("side", dist.Normal(0.0, 1.0))
        observe(x @ weight() if side < below else x.sum(-1) * side, y)

    return model


def several_observed(x, y=None):
    f = x @ weight()
    with pyro.plate("data", len(x)):
        pyro.sample("low", dist.Normal(f, 1.0), obs=None if y is None else y - 1)
        pyro.sample("high", dist.Normal(f, 1.0), obs=None if y is None else y + 1)


def nan_at_prior(x, y=None):
    f = x @ weight()
    observe((f - f.abs() - 1.0).sqrt(), y)


def scaled_by(prior: Any) -> Callable[..., None]:
    """Its scale is below 0 at half of the prior, or at next to none of it."""

    def model(x, y=None):
        observe(x @ weight(), y, pyro.sample("scale", prior))

    return model


def of_signs(likelihood: Callable[[Tensor], Any]) -> Callable[..., None]:
    signed = linear(likelihood)
    return lambda x, y=None: signed(x, None if y is None else (y > 0).float())


def learns_a_law(law: Callable[[Tensor], Any]) -> Callable[..., None]:
    def model(x, y=None):
        weight()
        with pyro.plate("data", len(x)):
            pyro.sample("y", law(pyro.sample("shape", dist.Normal(0.0, 1.0))), obs=y)

    return model


def observes_a_part(x, y=None):
    f = (x @ weight())[:3]
    with pyro.plate("half", 3):
        pyro.sample("y", dist.Normal(f, 1.0), obs=None if y is None else y[:3])


def no_map(x, y=None):
    direction = pyro.sample("direction", dist.ProjectedNormal(torch.tensor([1.0, 0.0, 0.0])))
    observe(x @ direction[:2], y)


net = nn.Linear(2, 1)


def hidden_net(x, y=None):
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    observe(net(x)[:, 0], y, scale)


def hidden_net_beside_a_param(x, y=None):
    slope = pyro.param("slope", torch.tensor(1.0))
    observe(slope * net(x)[:, 0] + x @ weight(), y)


def needs_three(x, z, y=None):
    observe(x @ weight() + z, y)


def unsupported_stop(x, y=None):
    raise RuntimeError("the oven is off")


def trainable(x, y=None):
    slope = pyro.param("slope", torch.tensor(1.0))
    observe(slope * (x @ weight()), y)


dropout = nn.Dropout(0.5)


def random_beyond_sites(x, y=None):
    observe(dropout(x) @ weight(), y)


def subsamples(x, y=None):
    w = weight()
    with pyro.plate("data", len(x), subsample_size=3) as index:
        pyro.sample("y", dist.Normal(x[index] @ w, 1.0), obs=None if y is None else y[index])


def subsamples_wrongly(x, y=None):
    w = weight()
    with pyro.plate("data", len(x), subsample_size=3) as index:
        pyro.sample("y", dist.Normal(x[index] @ w, 1.0), obs=y)


def subsamples_of_all(x, y=None):
    w = weight()
    with pyro.plate("data", N, subsample_size=3) as index:
        pyro.sample("y", dist.Normal(x[index] @ w, 1.0), obs=None if y is None else y[index])


class Unsized(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(X, Y, strict=True)


# What is refused --------------------------------------------------------------------------------

BAD_DATA = {
    # shapes: what broadcasts would run to a wrong answer
    "f-column-y-row": (COLUMN, X, Y, '"y"', r"batch=6, batch=6\).*row=6\)", r"\[:, 0\]"),
    "f-row-y-column": (REGRESSION, X, Y[:, None], '"y"', r"row=6, column=1\)", r"y\[:, 0\]"),
    "both-columns": (COLUMN, X, Y[:, None], '"y"', r"batch=6, batch=6\).*column=1", "to_event"),
    "no-plate-to-event-2": (
        linear(lambda f: dist.Normal(f, 1.0).to_event(2), weights=(2, 1), plate=False),
        X, Y, '"y"', r"event=6, event=1\).*row=6\)", r"\[:, 0\]",
    ),
    "no-plate-column": (
        linear(weights=(2, 1), plate=False), X, Y, '"y"', r"batch=6, batch=1\).*row=6", "squeeze",
    ),
    "no-plate-one-statement": (
        linear(lambda f: dist.Normal(f.sum(), 1.0), plate=False), X, Y, '"y"', r"row=6\)", "plate",
    ),
    "one-observation": (REGRESSION, X, Y[:1], '"y" has 1', '"x" has 6', "same rows"),
    "lengths-differ": (REGRESSION, X, Y[:4], '"x" has 6', '"y" has 4', "same rows"),
    "no-rows": (REGRESSION, X[:0], Y[:0], '"y"', "no rows", "at least one"),
    "y-one-number": (REGRESSION, X, 3.0, '"y"', "single number", "one for each row"),
    "labels-column": (CLASSES, X, LABELS[:, None], '"y"', r"row=6, column=1\)", r"y\[:, 0\]"),
    "labels-one-hot": (CLASSES, X, torch.eye(3)[LABELS], '"y"', "column=3", r"y\.argmax\(-1\)"),
    "binary-column": (BINARIES, X, BINARY[:, None], '"y"', "column=1", r"y\[:, 0\]"),
    "counts-column": (RATES, X, COUNTS[:, None], '"y"', "column=1", r"y\[:, 0\]"),
    # values
    "y-nan": (REGRESSION, X, changed(Y, torch.nan, 3), '"y"', "1 NaN of 6.*row 3", "Drop"),
    "y-inf": (REGRESSION, X, changed(Y, torch.inf, 2), '"y"', "1 infinite of 6.*row 2", "Drop"),
    "x-nan": (REGRESSION, changed(X, torch.nan, 4, 1), Y, '"x"', "row 4, column 1", "Drop"),
    "x-inf": (REGRESSION, changed(X, -torch.inf, 0, 1), Y, '"x"', "row 0, column 1", "Drop"),
    "column-of-nan": (
        REGRESSION, FRAME.assign(dose=np.nan), Y, '"x"', '6 NaN.*"dose".*all of', "leave it out",
    ),
    "missing-in-nullable-column": (
        REGRESSION, FRAME.assign(dose=pd.array([1, 2, None, 4, 5, 6], dtype="Int64")), Y,
        '"x"', '1 NaN of 12.*row 2, column "dose"', "Drop",
    ),
    "missing-in-nullable-y": (
        CLASSES, X, pd.Series([0, 1, None, 0, 1, 2], dtype="Int64"), '"y"', "1 NaN.*row 2", "Drop",
    ),
    "none-in-list": (REGRESSION, X, [0.1, 0.2, None, 0.3, 0.4, 0.5], '"y"', "row 2", "Drop"),
    "x-1e20": (REGRESSION, X * 1e20, Y, '"x"', r"2e\+20", "Rescale"),
    # supports
    "label-is-k": (CLASSES, X, changed(LABELS, 3, 4), '"y"', "is 3 at row 4.*0..2", "Encode"),
    "label-negative": (CLASSES, X, changed(LABELS, -1, 2), '"y"', "-1 at row 2.*0..2", "Encode"),
    "label-fraction": (
        CLASSES, X, changed(LABELS.float(), 1.5, 1), '"y"', r"is 1\.5 at row 1", "Encode",
    ),
    "binary-minus-one": (BINARIES, X, BINARY * 2 - 1, '"y"', "3 values.*is -1 at row 0", "0 or 1"),
    "binary-two": (BINARIES, X, changed(BINARY, 2.0, 5), '"y"', "is 2 at row 5", "0 or 1"),
    "count-negative": (RATES, X, changed(COUNTS, -1.0, 0), '"y"', "is -1 at row 0", "counts"),
    "count-fraction": (RATES, X, changed(COUNTS, 0.5, 1), '"y"', r"is 0\.5 at row 1", "counts"),
    "positive-only": (
        linear(lambda f: dist.Gamma(f.exp(), 1.0)), X, Y, '"y"', "2 values.*row 1", "Transform",
    ),
    # kinds
    "labels-strings": (CLASSES, X, list("abcabc"), '"y"', "<U1", "factorize"),
    "labels-objects": (CLASSES, X, np.array(list("abcabc"), object), '"y"', "'a'", "factorize"),
    "labels-categories": (CLASSES, X, pd.Categorical(list("abcabc")), '"y"', "'a'", "factorize"),
    "column-of-strings": (
        REGRESSION, FRAME.assign(sex=list("mfmfmf")), Y, '"sex" of "x"', "not numbers", "dummies",
    ),
    "dates": (REGRESSION, np.zeros(N, "datetime64[D]"), Y, '"x"', "datetime64", "Encode"),
    "numbers-as-text": (REGRESSION, FRAME.astype(str), Y, '"age"', "str|object", "to_numeric"),
    "frame-of-y": (
        REGRESSION, X, pd.DataFrame({"price": Y.numpy()}), '"y"', "column=1", r'y\["price"\]',
    ),
    "ragged": (REGRESSION, [[1.0, 2.0], [3.0]], Y, '"x"', "inhomogeneous", "equal length"),
    "a-dict": (REGRESSION, {"a": X}, Y, '"x"', "dict", "Pass an array"),
    "nothing-observed": (REGRESSION, X, None, '"y"', "None", "entry a row"),
    "complex": (REGRESSION, X.to(torch.complex64), Y, '"x"', "complex64", "real and imaginary"),
    "sparse-tensor": (REGRESSION, X.to_sparse(), Y, '"x"', "sparse", r"\.to_dense\(\)"),
    "sparse-scipy": (REGRESSION, csr_array(X.numpy()), Y, '"x"', "csr_array", r"\.toarray\(\)"),
    "masked-array": (REGRESSION, X, np.ma.masked_less(Y.numpy(), 0), '"y"', "masked", "Drop"),
    "two-devices": (REGRESSION, X.to("meta"), Y, "'x' on meta", "'y' on cpu", r"\.to\("),
}  # fmt: skip

BAD_MODELS = {
    "not-callable": ("linear", "model", "str, not a callable", r"model\(\*inputs, y=None\)"),
    "forgets-obs": (forgets_obs, "no observed site", "w, .*y", "obs=y"),
    "draws-nothing": (draws_nothing, "no observed site", "none", "obs=y"),
    "no-latent": (no_latent, '"no_latent"', "no latent site", r"pyro\.sample"),
    "ignores-y": (ignores_y, '"y"', "observed even when y is None", "obs=y"),
    "same-name-twice": (same_name_twice, "same_name_twice", "named 'w'", "name of its own"),
    "discrete-latent": (discrete_latent, '"z"', "discrete.*Boolean", "mixture"),
    "moving-support": (moving_support, '"u"', "Interval", r"Uniform\(0, 1\)"),
    "site-goes": (branches(1.2), '"w"', "comes and goes", "same sites"),
    "site-comes": (branches(0.6), '"w"', "comes and goes", "same sites"),
    "site-comes-rarely": (branches(-0.2), '"w"', "comes and goes", "same sites"),
    "several-observed": (several_observed, "several sites", "low, high", "obs=y"),
    "nan-at-prior": (nan_at_prior, "nan_at_prior", "NaN.*site y", "scales above 0"),
    "scale-below-0": (
        scaled_by(dist.Normal(0.0, 1.0)), '"y"', r"Normal with scale=-\d.*has to be", "softplus",
    ),
    "probs-of-a-line": (
        of_signs(lambda f: dist.Bernoulli(probs=f)), '"y"', r"Bernoulli with probs=", "logits=",
    ),
    "rate-below-0": (of_signs(dist.Poisson), '"y"', "Poisson with rate=-", "exp"),
    "shape-below-0": (
        learns_a_law(lambda shape: dist.StudentT(shape, 0.0, 1.0)), '"y"', "df=-", "softplus",
    ),
    "observes-a-part": (observes_a_part, '"y"', r"row=6\)", "obs=y"),
    "no-map-to-support": (no_map, '"direction"', "Sphere", "transform"),
    "net-without-prior": (hidden_net, '"hidden_net"', r"\(1, 2\)", "sample_weights"),
    "net-beside-a-param": (
        hidden_net_beside_a_param, "beside_a_param", r"\(1, 2\)", "requires_grad_",
    ),
    "a-net": (net, '"Linear"', "takes 2 positional", r"supervised\(net"),
    "too-few-arguments": (needs_three, "x, z, y", "2 were given", r"fit\(model, x, z, y\)"),
    "raises": (unsupported_stop, "unsupported_stop", "RuntimeError: the oven is off", "by hand"),
    "plate-too-large": (linear(size=7), r"plate\('data'\)", "7 vs 6", r"len\(x\)"),
    "plate-too-large-scalar": (
        linear(lambda f: dist.Normal(f.sum(), 1.0), size=7), '"data"', "7.*6 rows", r"len\(x\)",
    ),
    "plate-of-one": (linear(size=1), r"plate\('data'\)", "1 vs 6", r"len\(x\)"),
    "subsamples-wrongly": (subsamples_wrongly, '"data"', "minibatch of 3", r"y\[index\]"),
    "double-weights": (
        linear(lambda f: dist.Normal(f.double() @ torch.ones(6, 6), 1.0)),
        '"model"', "float32", "set_default_dtype",
    ),
}  # fmt: skip


@contextmanager
def untouched() -> Iterator[None]:
    """Generators, parameter store, dtype and validation flag are left as they were."""

    def state() -> list[Any]:
        store = pyro.get_param_store()
        numpy = np.random.get_state()
        return [
            torch.get_rng_state().tolist(),
            random.getstate(),
            (numpy[1].tolist(), numpy[2:]),
            {name: store[name].tolist() for name in store},
            torch.get_default_dtype(),
            torch.distributions.Distribution._validate_args,
        ]

    with pyro.get_param_store().scope():
        pyro.param("slope", torch.tensor(7.0))
        before = state()
        yield
        assert state() == before


def refuses(call: Callable[[], Any], error: type[Exception], *says: str) -> None:
    """The call raises at once, in few lines that hold every pattern, and leaves no trace."""
    with untouched(), warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        start = time.perf_counter()
        with pytest.raises(error) as caught:
            call()
        elapsed = time.perf_counter() - start
    message = str(caught.value)
    assert type(caught.value) is error
    for pattern in says:
        assert re.search(pattern, message), f"no {pattern!r} in: {message}"
    assert message.count("\n") < 5
    assert elapsed < 5


@EVERY
@pytest.mark.parametrize(
    ("model", "x", "y", "named", "found", "cure"), BAD_DATA.values(), ids=BAD_DATA
)
def test_bad_data(method, model, x, y, named, found, cure):
    refuses(lambda: bnn.fit(model, x, y, method=method), DataError, named, found, cure)


@EVERY
@pytest.mark.parametrize(("model", "named", "found", "cure"), BAD_MODELS.values(), ids=BAD_MODELS)
def test_bad_model(method, model, named, found, cure):
    refuses(lambda: bnn.fit(model, X, Y, method=method), ModelError, named, found, cure)


REFUSED_WITHOUT_POINTS = {
    "trainable-param": (trainable, (X, Y), ModelError, "slope", "no prior", r"bnn\.SVI\(\)"),
    "random-layer": (random_beyond_sites, (X, Y), ModelError, "dropout", "differs", r"\.eval\(\)"),
    "plate-subsamples": (subsamples, (X, Y), ModelError, '"data"', "minibatch", "subsample_size"),
    "loader": (
        REGRESSION, (DataLoader(TensorDataset(X, Y), 3),), DataError, "NUTS", "all rows", "Pass",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "data", "error", "named", "found", "cure"),
    REFUSED_WITHOUT_POINTS.values(),
    ids=REFUSED_WITHOUT_POINTS,
)
def test_what_a_sampler_cannot_do_and_an_optimiser_can(model, data, error, named, found, cure):
    refuses(lambda: bnn.fit(model, *data, method=NUTS), error, named, found, cure)
    for method in (SVI, MAP):
        with untouched():
            posterior = bnn.fit(model, *data, method=method)
            if model is trainable:
                posterior.log_likelihood(*data)
        assert posterior.draws["w"].isfinite().all()


BATCHED = {
    name: kind
    for name, kind in METHODS.items()
    if kind.__module__.startswith("bnn.") and hasattr(kind, "batch_size")
}


@pytest.mark.parametrize("name", BATCHED)
@pytest.mark.parametrize(
    ("model", "found", "cure"),
    [
        (subsamples, r"batch_size=2\) shows .* 2 rows .* draws 3 of them", "out.* a larger one"),
        (subsamples_of_all, r"batch_size=2\) .* draws 3 of all 6", r"out, .*len\(x\)"),
    ],
    ids=["too-few", "of-all"],
)
def test_a_minibatch_of_which_a_plate_draws_what_is_not_there(name, model, found, cure):
    method = BATCHED[name](batch_size=2)
    refuses(lambda: bnn.fit(model, X, Y, method=method), ModelError, name, '"data"', found, cure)


def test_a_minibatch_of_which_a_plate_draws_a_part():
    """Four rows of six are shown, and three of those count twice: the mode is that of all rows."""
    method = bnn.MAP(steps=1500, batch_size=4)
    w = bnn.fit(subsamples, X, Y, method=method, progress=False).draws["w"][0, 0]
    precision = X.T @ X + torch.eye(2)
    off = (w - torch.linalg.solve(precision, X.T @ Y)) * precision.diagonal().sqrt()
    assert off.abs().max() < 0.2  # posterior sds: the noise of the last steps


BAD_LOADERS = {
    "no-length": (DataLoader(Unsized(), 3), "Unsized", "number of rows", "__len__"),
    "empty": (
        DataLoader(TensorDataset(X[:0], Y[:0]), 3),
        "yield",
        "nothing",
        "TensorDataset",
    ),
    "inputs-only": (DataLoader(X, 3), "yield", "Tensor", "TensorDataset"),
    "dicts": (DataLoader([{"x": 1.0, "y": 2.0}], 1), "yield", "dict", "TensorDataset"),
    "nan": (DataLoader(TensorDataset(changed(X, torch.nan, 1, 1), Y), 3), '"x"', "NaN", "Drop"),
}


@OPTIMISERS
@pytest.mark.parametrize(
    ("loader", "named", "found", "cure"), BAD_LOADERS.values(), ids=BAD_LOADERS
)
def test_bad_loader(method, loader, named, found, cure):
    refuses(lambda: bnn.fit(REGRESSION, loader, method=method), DataError, named, found, cure)


# Arguments of fit, and settings -----------------------------------------------------------------

BAD_ARGUMENTS = {
    "method-name": (
        {"method": "nuts"},
        TypeError,
        "method is 'nuts'",
        r"^(?!.*Optimised).*MAP, .*NUTS, .*SVI",
    ),
    "method-class": ({"method": bnn.NUTS}, TypeError, "method is <class", r"bnn\.NUTS\("),
    "seed-none": ({"seed": None}, TypeError, "seed is None", "whole number"),
    "seed-string": ({"seed": "a"}, TypeError, "seed is 'a'", "whole number"),
    "seed-true": ({"seed": True}, TypeError, "seed is True", "whole number"),
    "seed-fraction": ({"seed": 1.0}, TypeError, r"seed is 1\.0", "whole number"),
    "seed-negative": ({"seed": -1}, ValueError, "seed is -1", "from 0"),
    "seed-too-large": ({"seed": 2**64}, ValueError, f"seed is {2**64}", r"below 2\*\*64"),
}


@EVERY
@pytest.mark.parametrize(
    ("given", "error", "found", "cure"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS
)
def test_bad_argument(method, given, error, found, cure):
    refuses(lambda: bnn.fit(REGRESSION, X, Y, **{"method": method, **given}), error, found, cure)


PACKED = {
    "tuple": ((X, Y), "tuple"),
    "list-of-a-batch": ([(X, Y)], "list"),
    "dataset": (TensorDataset(X, Y), "TensorDataset"),
}


@EVERY
@pytest.mark.parametrize(("packed", "kind"), PACKED.values(), ids=PACKED)
def test_packed_data(method, packed, kind):
    says = f'"x" is a {kind} that cannot', "(one by one|equal length)"
    refuses(lambda: bnn.fit(REGRESSION, packed, method=method), DataError, *says)


@EVERY
def test_no_data(method):
    refuses(lambda: bnn.fit(REGRESSION, method=method), DataError, "no data", r"fit\(model")


@EVERY
@pytest.mark.parametrize(
    ("setting", "value", "error"),
    [
        ("draws", 0, ValueError),
        ("draws", -1, ValueError),
        ("draws", 2.5, TypeError),
        ("draws", True, TypeError),
        ("draws", None, TypeError),
        ("chains", "4", TypeError),
    ],
)
def test_bad_setting(method, setting, value, error):
    kind = type(method)
    known = kind is bnn.NUTS or setting == "draws"
    says = [kind.__name__, setting, re.escape(repr(value))] if known else [setting]
    refuses(lambda: kind(**{setting: value}), error, *says)


# What is let through ----------------------------------------------------------------------------

WIDE = np.zeros((N, 5), dtype=np.float32)
WIDE[:, 1:4:2] = X.numpy()
READ_ONLY = X.numpy().copy()
READ_ONLY.flags.writeable = False

SAME = {
    "numpy": (REGRESSION, (X.numpy(), Y.numpy()), (X, Y)),
    "lists": (REGRESSION, (X.tolist(), Y.tolist()), (X, Y)),
    "pandas": (REGRESSION, (FRAME, pd.Series(Y.numpy(), index=range(10, 10 + N))), (X, Y)),
    "nullable-pandas": (REGRESSION, (FRAME.astype("Float32"), Y), (X, Y)),
    "read-only": (REGRESSION, (READ_ONLY, Y), (X, Y)),
    "non-contiguous": (REGRESSION, (WIDE[:, 1:4:2], Y.flip(0).numpy()[::-1]), (X, Y)),
    "transposed": (REGRESSION, (X.T.contiguous().T, Y), (X, Y)),
    "requires-grad": (
        REGRESSION,
        (X.clone().requires_grad_(), Y.clone().requires_grad_()),
        (X, Y),
    ),
    "float64-x": (REGRESSION, (X.double(), Y), (X, Y)),
    "float64-y": (REGRESSION, (X, Y.double()), (X, Y)),
    "float16": (REGRESSION, (X.half(), Y), (X.half().float(), Y)),
    "integer-x": (REGRESSION, (X.round().long(), Y), (X.round(), Y)),
    "bool-x": (REGRESSION, (X > 0, Y), ((X > 0).float(), Y)),
    "uint16-x": (REGRESSION, (X.abs().numpy().astype(np.uint16), Y), (X.abs().floor(), Y)),
    "integer-y": (REGRESSION, (X, Y.round().int()), (X, Y.round())),
    "float-labels": (CLASSES, (X, LABELS.float()), (X, LABELS)),
    "int32-labels": (CLASSES, (X, LABELS.int()), (X, LABELS)),
    "categorical-codes": (CLASSES, (X, pd.Series(LABELS.numpy()).astype("category")), (X, LABELS)),
    "bool-binary": (BINARIES, (X, BINARY.bool()), (X, BINARY)),
    "int64-binary": (BINARIES, (X, BINARY.long()), (X, BINARY)),
    "integer-counts": (RATES, (X, COUNTS.long()), (X, COUNTS)),
}


def plainly(given: Any) -> Any:
    return given.detach().numpy() if isinstance(given, Tensor) else given


@cache
def reference(method: Any, case: str) -> Any:
    model, _, plain = SAME[case]
    return bnn.fit(model, *plain, method=method)


@EVERY
@pytest.mark.parametrize("case", SAME)
def test_same_draws_from_the_same_numbers(method, case):
    model, given, plain = SAME[case]
    twin = "numpy" if plain[0] is X and plain[1] is Y else case  # many share their reference
    before = [np.array(plainly(x)) for x in given]
    with untouched():
        posterior = bnn.fit(model, *given, method=method)
    assert torch.equal(posterior.draws["w"], reference(method, twin).draws["w"])
    assert posterior.data.inputs[0].dtype in (torch.float32, torch.long)
    for now, was in zip(given, before, strict=True):
        assert np.array_equal(plainly(now), was)


WORKS = {
    "one-row": (REGRESSION, X[:1], Y[:1]),
    "constant-column": (REGRESSION, torch.stack([X[:, 0], torch.ones(N)], 1), Y),
    "duplicate-column": (REGRESSION, X[:, [0, 0]], Y),
    "column-with-event": (
        linear(lambda f: dist.Normal(f, 1.0).to_event(1), weights=(2, 1)), X, Y[:, None],
    ),
    "no-plate": (linear(plate=False), X, Y),
    "scale-next-to-never-below-0": (scaled_by(dist.Normal(5.0, 0.5)), X, Y),
    "moved-labels": (
        lambda x, y=None: CLASSES(x, None if y is None else y - 1), X, LABELS + 1,
    ),
}  # fmt: skip


@EVERY
@pytest.mark.parametrize(("model", "x", "y"), WORKS.values(), ids=WORKS)
def test_works(method, model, x, y):
    with untouched():
        posterior = bnn.fit(model, x, y, method=method)
        prediction = posterior.predict(x)
    assert posterior.draws["w"].isfinite().all()
    assert prediction.y.shape[2] == len(x)
    assert prediction.total.isfinite().all()


WARNS = {
    "one-class": (CLASSES, X, torch.ones(N), '"y" holds one class only, 1'),
    "one-binary-class": (BINARIES, X, torch.zeros(N), '"y" holds one class only, 0'),
    "y-1e8": (REGRESSION, X, Y * 1e8, r'"y" reaches 1\.4e\+08.*Standardise'),
}


@EVERY
@pytest.mark.parametrize(("model", "x", "y", "says"), WARNS.values(), ids=WARNS)
def test_warns(method, model, x, y, says):
    with untouched(), pytest.warns(DataWarning, match=says) as caught:
        bnn.fit(model, x, y, method=method)
    assert all(w.filename == __file__ for w in caught if w.category is DataWarning)


@OPTIMISERS
def test_labels_of_later_batches_are_checked(method):
    loader = DataLoader(TensorDataset(X, changed(BINARY, -1.0, 5)), 2)
    with untouched(), pytest.raises(DataError, match=r'"y" has 1 values.*is -1 .*0 or 1'):
        bnn.fit(BINARIES, loader, method=method)


@OPTIMISERS
def test_loader_labels_are_cast_in_every_batch(method):
    loader = DataLoader(TensorDataset(X.double(), BINARY.long()), 2, shuffle=True)
    with untouched(), warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)  # a first batch of one class is no reason
        posterior = bnn.fit(BINARIES, loader, method=method)
    assert posterior.draws["w"].isfinite().all()


# Predictions and scores -------------------------------------------------------------------------


@cache
def fitted(method: Any, model: Any, labels: bool = False) -> Any:
    return bnn.fit(model, FRAME, LABELS if labels else Y, method=method)


BAD_INPUTS = {
    "none": ((), "predict got 0 inputs", r"with 1 \(x\)", "without the observations"),
    "observations-too": ((X, Y), "predict got 2 inputs", r"with 1 \(x\)", "without the observ"),
    "columns-missing": ((X[:, :1],), '"x"', r"column=1\).*row=6, column=2", "must be the same"),
    "one-axis": ((X[0],), '"x"', r"row=2\).*column=2", "must be the same"),
    "renamed": (
        (FRAME.rename(columns={"dose": "mg"}),),
        '"x"',
        "without.*'dose'.*'mg'",
        r"Pass x\[",
    ),
    "reordered": (
        (FRAME[["dose", "age"]],),
        '"x"',
        "another order",
        r"Pass x\[\['age', 'dose'\]\]",
    ),
    "nan": ((changed(X, torch.nan, 2, 0),), '"x"', "1 NaN.*row 2, column 0", "Drop"),
    "nan-in-frame": ((FRAME.mask(FRAME > 1.6),), '"x"', 'row 2, column "dose"', "Drop"),
    "huge": ((X * 1e20,), '"x"', r"2e\+20", "Rescale"),
    "strings": ((FRAME.assign(dose="low"),), '"dose" of "x"', "not numbers", "dummies"),
}


@EVERY
@pytest.mark.parametrize(("inputs", "named", "found", "cure"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_prediction(method, inputs, named, found, cure):
    posterior = fitted(method, REGRESSION)
    refuses(lambda: posterior.predict(*inputs), DataError, named, found, cure)


@EVERY
def test_prediction_of_no_rows_is_empty(method):
    draws = (1, 5)
    with untouched():
        numbers = fitted(method, REGRESSION).predict(X[:0])
        labels = fitted(method, CLASSES, labels=True).predict(FRAME[:0])
    assert numbers.y.shape == numbers.f.shape == labels.y.shape == (*draws, 0)
    assert numbers.mean.shape == numbers.std.shape == labels.entropy.shape == (0,)
    assert labels.probs.shape == (0, 3)


BAD_SCORES = {
    "label-is-k": (CLASSES, X, changed(LABELS, 7, 4), '"y"', "is 7 at row 4.*0..2", "Encode"),
    "label-fraction": (CLASSES, X, LABELS + 0.5, '"y"', "not whole", ""),
    "label-column": (CLASSES, X, LABELS[:, None], '"y"', r"row=6, column=1\)", "must be the same"),
    "y-column": (REGRESSION, X, Y[:, None], '"y"', r"row=6, column=1\)", "must be the same"),
    "lengths-differ": (REGRESSION, X, Y[:4], "rows", "4", ""),
    "y-nan": (REGRESSION, X, changed(Y, torch.nan, 3), '"y"', "row 3", "Drop"),
}


@EVERY
@pytest.mark.parametrize(
    ("model", "x", "y", "named", "found", "cure"), BAD_SCORES.values(), ids=BAD_SCORES
)
def test_bad_score(method, model, x, y, named, found, cure):
    posterior = fitted(method, model, labels=model is CLASSES)
    refuses(lambda: posterior.log_likelihood(x, y), DataError, named, found, cure)


@EVERY
def test_new_rows_are_not_cut_to_the_integers_of_the_fit(method):
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(1.0, 0.1))
        observe(x * w, y)

    whole = torch.arange(N)
    posterior = bnn.fit(model, whole, Y, method=method)
    half = posterior.predict(whole / 2).f
    torch.testing.assert_close(half, posterior.predict(whole).f / 2)


@EVERY
def test_one_class_in_new_rows_is_no_reason_to_warn(method):
    posterior = fitted(method, CLASSES, labels=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        assert posterior.log_likelihood(X, torch.ones(N)).shape == (1, 5, N)


def counts_groups(x, y=None):
    with pyro.plate("group", int(x[:, 0].max()) + 1):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(a[x[:, 0].long()], 1.0), obs=y)


def states_its_rows(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 6):
        pyro.sample("y", dist.Normal(w * x[:, 0], 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "found", "cure"),
    [
        (counts_groups, r'"a" has shape \(1,\), of all 6 it has \(3,\)', "Count it in all"),
        (states_its_rows, r'batch_size=2\) .* plate "data" takes all 6', r"len\(y\)"),
    ],
)
def test_a_model_that_is_another_on_a_minibatch(model, found, cure):
    x = torch.arange(6.0)[:, None].div(2, rounding_mode="floor")
    method = bnn.SVI(batch_size=2)
    refuses(lambda: bnn.fit(model, x, Y, method=method), ModelError, "SVI", found, cure)


def test_a_latent_site_at_a_point_is_refused():
    def model(x, y=None):
        c = pyro.sample("c", dist.Delta(torch.tensor(2.0)).expand([2]).to_event(1))
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ (w * c), 1.0), obs=y)

    told = '"c"', "Delta", r"pyro\.deterministic"
    refuses(lambda: bnn.fit(model, X, Y, method=MAP), ModelError, *told)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", [NUTS, SVI, MAP], ids=["NUTS", "SVI", "MAP"])
def test_a_fit_makes_gradients_where_the_caller_makes_none(method, context):
    usual = bnn.fit(REGRESSION, X, Y, method=method)
    with context():
        again = bnn.fit(REGRESSION, X * 1, Y * 1, method=method)
        again.predict(X)
    assert all(torch.equal(usual.draws[k], again.draws[k]) for k in usual.draws)
