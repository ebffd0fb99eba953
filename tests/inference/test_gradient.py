"""Twenty-two kinds of models: each has the gradient that Pyro gives it, or is refused, or is slow.

A faster route that is wrong gives draws that look like draws, so none may be taken unseen.
"""

import importlib
import warnings
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from torch import nn

import bnn
from bnn import arguments, contract
from bnn.handlers import generator, quiet_pyro, seeded
from bnn.inference import _compile, _gradient
from bnn.inference._compile import graph_of
from bnn.inference._energy import Energy
from bnn.inference._gradient import Gradient
from bnn.models import sample_weights
from bnn.sites import require_all_rows, require_continuous, require_no_parameters
from tests.exact import assert_exact, nuts

N = 30


def weights(*shape):
    return dist.Normal(0.0, 1.0).expand(shape).to_event(len(shape))


def observe(f, y):
    with pyro.plate("data", N):
        pyro.sample("y", dist.Normal(f, 1.0), obs=y)


def dirichlet_and_mixture(x, y=None):
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    m = pyro.sample("m", weights(3))
    with pyro.plate("data", N):
        mixture = dist.MixtureSameFamily(dist.Categorical(p), dist.Normal(m, 1.0))
        pyro.sample("y", mixture, obs=y)


def plates_indexing_and_student(x, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("group", 5):
        a = pyro.sample("a", dist.Normal(mu, tau))
    with pyro.plate("data", N):
        pyro.sample("y", dist.StudentT(3.0, a[torch.arange(N) % 5], 1.0), obs=y)


def loc_scale_reparam(x, y=None):
    with poutine.reparam(config={"a": LocScaleReparam(0.0)}):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        tau = pyro.sample("tau", dist.Gamma(2.0, 2.0))
        with pyro.plate("group", 5):
            a = pyro.sample("a", dist.Normal(mu, tau))
    observe(a[torch.arange(N) % 5], y)


def factor_mask_and_scale(x, y=None):
    w = pyro.sample("w", weights(4))
    pyro.factor("quartic", -0.1 * (w**4).sum())
    with poutine.mask(mask=x[:, 0] > 0), poutine.scale(scale=2.0):
        observe(x @ w, y)


def lkj_cholesky_and_mvn(x, y=None):
    corr = pyro.sample("L", dist.LKJCholesky(4, torch.tensor(1.0)))
    sd = pyro.sample("sd", dist.HalfCauchy(torch.ones(4)).to_event(1))
    w = pyro.sample("w", dist.MultivariateNormal(torch.zeros(4), scale_tril=sd[:, None] * corr))
    observe(x @ w, y)


def buffer_changed_in_place(x, y=None):
    f = torch.zeros(N)
    f += x @ pyro.sample("w", weights(4))
    f[:5] = f[:5] * 2
    observe(f.clamp_(-3, 3), y)


def branch_on_a_value(x, y=None):
    w = pyro.sample("w", weights(4))
    observe(x @ w if w[0] > 0 else -2 * x @ w, y)


def number_of_a_value(x, y=None):
    w = pyro.sample("w", weights(4))
    observe(x @ w + 0.1 * float(w.abs().sum().detach()) + w[1].item(), y)


def discrete_and_enumerated(x, y=None):
    m = pyro.sample("m", weights(2))
    with pyro.plate("data", N):
        z = pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"}).long()
        pyro.sample("y", dist.Normal(m[z], 1.0), obs=y)


def sequential_plate(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    for i in pyro.plate("data", N):
        pyro.sample(f"y{i}", dist.Normal(w * x[i, 0], 1.0), obs=None if y is None else y[i])


def random_operation(x, y=None):
    w = pyro.sample("w", weights(4))
    observe(nn.functional.dropout(x @ w, 0.5), y)


class Gru(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.out = nn.GRU(1, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x):
        return self.out(self.gru(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend, self.out = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 1)

    def forward(self, x):
        return self.out(self.attend(x, x, x, need_weights=False)[0])


def pyro_module(build, *shape):
    """A net of PyroSample priors, which keep the validation flag of the day they were built."""
    net = build()
    to_pyro_module_(net)
    for module in list(net.modules()):
        assert isinstance(module, PyroModule)
        for name, p in list(module.named_parameters(recurse=False)):
            prior = dist.Normal(torch.zeros(()), 0.5, validate_args=True)
            setattr(module, name, PyroSample(prior.expand(p.shape).to_event(p.dim())))

    def model(x, y=None):
        observe(net(x.reshape(N, *shape)).reshape(N, -1)[:, 0], y)

    return model


def sampled(build, *shape):
    net = build()

    def prior(name, parameter, module):
        return dist.Normal(0.0, 0.5).expand(parameter.shape).to_event(parameter.ndim)

    def model(x, y=None):
        f = sample_weights(net, prior)
        observe(f(x.reshape(N, *shape)).reshape(N, -1)[:, 0], y)

    return model


def encoder():
    return nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()


def net_of(*layers):
    return lambda: nn.Sequential(*(layer() for layer in layers))


def _of(function, *args, **kwargs):
    return partial(function, *args, **kwargs)


mlp = net_of(_of(nn.Linear, 4, 8), nn.Tanh, _of(nn.Linear, 8, 1))
normed = net_of(_of(nn.Linear, 4, 8), _of(nn.LayerNorm, 8), nn.GELU, _of(nn.Linear, 8, 1))
batch_normed = net_of(_of(nn.Linear, 4, 8), _of(nn.BatchNorm1d, 8), _of(nn.Linear, 8, 1))
conv1d = net_of(
    _of(nn.Conv1d, 1, 3, 3, padding=1), nn.ReLU, _of(nn.MaxPool1d, 2), nn.Flatten,
    _of(nn.Linear, 6, 1),
)  # fmt: skip
conv2d = net_of(_of(nn.Conv2d, 1, 2, 2), nn.ReLU, nn.Flatten, _of(nn.Linear, 2, 1))

# What becomes of each where "traced" is asked for.
KINDS = {
    "dirichlet_and_mixture": (lambda: dirichlet_and_mixture, "traced"),
    "plates_indexing_and_student": (lambda: plates_indexing_and_student, "traced"),
    "loc_scale_reparam": (lambda: loc_scale_reparam, "traced"),
    "factor_mask_and_scale": (lambda: factor_mask_and_scale, "traced"),
    "pyro_module_mlp": (lambda: pyro_module(mlp, 4), "traced"),
    "pyro_module_conv1d_and_pool": (lambda: pyro_module(conv1d, 1, 4), "traced"),
    "pyro_module_layer_norm_and_gelu": (lambda: pyro_module(normed, 4), "traced"),
    "pyro_module_gru": (lambda: pyro_module(Gru, 4, 1), "traced"),
    "pyro_module_attention": (lambda: pyro_module(Attention, 1, 4), "traced"),
    "gru": (lambda: sampled(Gru, 4, 1), "traced"),
    "attention": (lambda: sampled(Attention, 1, 4), "traced"),
    "attention_eval": (lambda: sampled(lambda: Attention().eval(), 1, 4), "traced"),
    "transformer_encoder_layer": (lambda: sampled(encoder, 1, 4), "traced"),
    "conv2d": (lambda: sampled(conv2d, 1, 2, 2), "traced"),
    "lkj_cholesky_and_mvn": (lambda: lkj_cholesky_and_mvn, "traced"),
    "buffer_changed_in_place": (lambda: buffer_changed_in_place, "looped"),
    "branch_on_a_value": (lambda: branch_on_a_value, "looped"),
    "number_of_a_value": (lambda: number_of_a_value, "looped"),
    "pyro_module_batch_norm": (lambda: pyro_module(batch_normed, 4), "looped"),
    "discrete_and_enumerated": (lambda: discrete_and_enumerated, bnn.ModelError),
    "sequential_plate": (lambda: sequential_plate, bnn.ModelError),
    "random_operation": (lambda: random_operation, bnn.ModelError),
}
COMPILED = ("pyro_module_mlp", "lkj_cholesky_and_mvn", "number_of_a_value", "random_operation")


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def rows():
    rng = np.random.default_rng(0)
    return rng.standard_normal((N, 4)), rng.standard_normal(N)


def gradient_of(model, route, data=None):
    """As `bnn.fit` with NUTS would build it."""
    data, sites = contract.check(model, arguments.read(model, data or rows()))
    require_continuous(sites, "NUTS")
    require_all_rows(data, sites, "NUTS")
    require_no_parameters(sites, "NUTS")
    root = np.random.SeedSequence(0)
    with quiet_pyro(), seeded(root):
        return Gradient(Energy(model, data, sites), 4, root, route=route)


def points(size, lanes=4):
    """Other points than the class looks at: both signs, near and far."""
    draw = generator(np.random.SeedSequence(1234))
    near = torch.randn(lanes, size, generator=draw)
    return [near, -near, 0.1 * near.roll(1, 0), 2 * near.roll(2, 0), -2 * near.roll(2, 0)]


def by_pyro(energy, z):
    """Potential and gradient of each lane, by Pyro's own route to its samplers."""
    with seeded(np.random.SeedSequence(2)):
        _, potential, _, _ = initialize_model(energy.model, energy.data.tensors)
    values, gradients = [], []
    for lane in z:
        lane = lane.clone().requires_grad_()
        value = potential({s.name: lane[s.span].reshape(s.free) for s in energy.slots})
        values.append(value.detach())
        gradients.append(torch.autograd.grad(value, lane)[0])
    return torch.stack(values), torch.stack(gradients)


def assert_equal_to_pyro(gradient):
    """To rounding, 1e-15 or 1e-7 of the largest term, which sums of N and a few layers widen."""
    tolerance = 1e-9 if torch.get_default_dtype() == torch.float64 else 1e-4
    for z in points(gradient.energy.size):
        with quiet_pyro():
            value, slope = gradient(z)
            exact, exact_slope = by_pyro(gradient.energy, z)
        for got, expected in ((value[:, None], exact[:, None]), (slope, exact_slope)):
            size = 1 + expected.abs().amax(1, keepdim=True)
            assert torch.isfinite(expected).all()
            assert ((got - expected).abs() / size).max() < tolerance


def check_kind(kind, route):
    """Right, or refused, or slow with the right answer; and what `KINDS` says of it."""
    build, becomes = KINDS[kind]
    model = build()
    if not isinstance(becomes, str):
        with pytest.raises(becomes):
            gradient_of(model, route)
        return
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        gradient = gradient_of(model, route)
    reached = route if becomes == "traced" else becomes
    if (route, becomes) == ("traced", "looped"):
        assert sum(w.category is bnn.PerformanceWarning for w in told) == 1
    if gradient.route != reached:  # the inductor cannot compile all that can be traced
        assert (reached, gradient.route) == ("compiled", "traced")
        assert sum(w.category is bnn.PerformanceWarning for w in told) == 1
    assert_equal_to_pyro(gradient)


@pytest.mark.parametrize("kind", KINDS)
def test_traced_is_right_or_not_taken(kind, float64):
    check_kind(kind, "traced")


@pytest.mark.parametrize("kind", COMPILED)
def test_compiled_is_right_or_not_taken(kind):
    check_kind(kind, "compiled")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_compiled_is_right_or_not_taken(kind, dtype):
    torch.set_default_dtype(dtype)
    try:
        check_kind(kind, "compiled")
    finally:
        torch.set_default_dtype(torch.float32)


def linear(x, y=None):
    observe(x @ pyro.sample("w", weights(4)), y)


def seeds_itself(x, y=None):
    """Deterministic, by random numbers that a graph would draw elsewhere in the stream."""
    w = pyro.sample("w", weights(4))
    torch.manual_seed(3)
    observe(x @ w + torch.randn(N), y)


def finite_near_its_prior_only(x, y=None):
    """Standard normal points, at which routes could be compared, all overflow."""
    w = pyro.sample("w", dist.Normal(0.0, 1e-3).expand([4]).to_event(1))
    observe((300 * x @ w).exp(), y)


def one_site_unseen(x, y=None):
    """The data's slopes are ten million times those of b."""
    w = pyro.sample("w", weights(4))
    pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1e-3), obs=y)


def _one_site_lost(function, *examples):
    """b reaches neither value nor slope."""
    return graph_of(lambda z: function(torch.cat([z[:, :-1], 0 * z[:, -1:]], 1)), *examples)


def _shifted(function, *examples):
    """The value a little off, the gradient right."""
    return graph_of(lambda z: (function(z)[0], function(z)[1] + 0.01), *examples)


def _frozen(function, *examples):
    """As if the input were a constant to fold."""
    slope, value = function(examples[0])
    return graph_of(lambda z: (slope + 0 * z, value + 0 * z[:, 0]), *examples)


def _one_branch(function, *examples):
    """As if `if z[0] > 0` had been decided while it was traced: right where that holds."""

    def decided(z):
        slope, value = function(torch.cat([z[:, :1].abs(), z[:, 1:]], 1))
        return slope, value

    return graph_of(decided, *examples)


@pytest.mark.parametrize("plant", [_shifted, _frozen, _one_branch])
@pytest.mark.parametrize("model", [linear, finite_near_its_prior_only])
def test_a_wrong_graph_is_not_taken(plant, model, monkeypatch):
    monkeypatch.setattr(_gradient, "graph_of", plant)
    gradient = gradient_of(model, "traced")
    assert gradient.route == "vmapped"
    if model is linear:
        assert_equal_to_pyro(gradient)


def test_a_graph_that_loses_a_site_whose_slopes_are_small_is_not_taken(monkeypatch):
    assert gradient_of(one_site_unseen, "traced").route == "traced"
    monkeypatch.setattr(_gradient, "graph_of", _one_site_lost)
    assert gradient_of(one_site_unseen, "traced").route == "vmapped"


def test_slopes_that_are_rounding_alone_are_no_reason_to_refuse_a_graph():
    """A shift of all logits moves its own vague prior alone; the rest of its slope is noise."""

    def shifted(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([4, 3]).to_event(2))
        shift = pyro.sample("shift", dist.Normal(0.0, 1e6))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=100 * x @ w + shift), obs=y)

    data = rows()[0], np.arange(N) % 3
    gradient = gradient_of(shifted, "traced", data)
    turned = gradient_of(shifted, "traced", tuple(each[::-1] for each in data))
    found = [turned(point) for point in gradient._points]  # the same sums in another order
    last = lambda slopes: slopes[:, -1].abs().max()
    pairs = [(v, exact) for (_, v), (exact, _) in zip(found, gradient._exact, strict=True)]
    assert any(last(v - exact) > 0.02 * last(exact) for v, exact in pairs)  # a wrong graph's
    assert all(gradient._agrees((v, u), k) for k, (u, v) in enumerate(found))


@pytest.mark.parametrize("folded", [False, True])
def test_a_folded_random_operation_is_not_taken(folded, monkeypatch):
    """Even if vmap let it pass, whether its one draw stays in the graph or becomes a constant."""
    if folded:
        known = lambda node, known: all(other in known for other in node.all_input_nodes)
        monkeypatch.setattr(_compile, "_fixed", known)
    monkeypatch.setattr(_gradient, "vmap", partial(torch.func.vmap, randomness="same"))
    gradient = gradient_of(seeds_itself, "traced")
    assert gradient.route == "vmapped"  # which seeds itself anew at each call
    assert_equal_to_pyro(gradient)


def test_a_constant_of_one_number_is_no_tensor_of_a_program():
    z, mixed = torch.linspace(-1, 1, 40), torch.linspace(1, 2, 40)
    scale, count = torch.full((40,), 0.5), torch.full((40,), 3)
    graph = _compile._uniform(graph_of(lambda z: (z / scale - mixed) * count, z))
    held = [getattr(graph, n.target) for n in graph.graph.nodes if n.op == "get_attr"]
    assert sorted(map(str, held)) == sorted(map(str, [mixed, count]))  # whole numbers stay too
    torch.testing.assert_close(graph(z), (z / scale - mixed) * count, rtol=0, atol=0)


def test_a_graph_folds_constants_and_no_random_operation():
    z = torch.zeros(3)
    exact = graph_of(lambda z: z + torch.ones(3).exp().cumsum(0), z)
    assert [n.target for n in exact.graph.nodes if n.op == "call_function"] == [
        torch.ops.aten.add.Tensor
    ]
    torch.testing.assert_close(exact(z), torch.e * torch.tensor([1.0, 2.0, 3.0]))
    with seeded(np.random.SeedSequence(0)):
        drawn = graph_of(lambda z: z + torch.rand(3), z)
        assert not torch.equal(drawn(z), drawn(z))


def test_a_graph_does_an_operation_once_on_the_same_arguments():
    z, w = torch.randn(3, generator=torch.Generator().manual_seed(0)), torch.ones(3)
    twice = graph_of(lambda z: (z + w).exp() * (z.detach() + w).exp(), z)
    assert [n.target for n in twice.graph.nodes if n.op == "call_function"] == [
        torch.ops.aten.add.Tensor, torch.ops.aten.exp.default, torch.ops.aten.mul.Tensor,
    ]  # fmt: skip
    torch.testing.assert_close(twice(z), (2 * z + 2).exp())
    with seeded(np.random.SeedSequence(0)):
        drawn = graph_of(lambda z: torch.rand_like(z) - torch.rand_like(z), z)
        assert (drawn(z) != 0).all()


def test_rare_randomness_is_refused():
    """This dropout keeps all 30 rows in 94 runs of 100: two runs at one draw would agree."""

    def model(x, y=None):
        w = pyro.sample("w", weights(4))
        observe(nn.functional.dropout(x @ w, 0.002), y)

    with pytest.raises(bnn.ModelError, match=r"net\.eval"):
        gradient_of(model, "traced")


def test_randomness_behind_an_overflow_is_refused():
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1e-3).expand([4]).to_event(1))
        observe(nn.functional.dropout((300 * x @ w).exp(), 0.5), y)

    with pytest.raises(bnn.ModelError, match=r"net\.eval"):
        gradient_of(model, "traced")


def test_a_net_built_in_the_model_is_not_random():
    """It draws initial weights at every run, and replaces them."""

    def model(x, y=None):
        f = sample_weights(nn.Linear(4, 1))
        observe(f(x)[:, 0], y)

    assert_equal_to_pyro(gradient_of(model, "traced"))


def test_the_route_of_a_pool_does_not_depend_on_imports(monkeypatch):
    """Nor, then, do the draws: one fit is the same before and after another was compiled."""
    monkeypatch.delattr(torch._inductor, "lowering", raising=False)
    assert gradient_of(KINDS["pyro_module_conv1d_and_pool"][0](), "traced").route == "traced"


def no_compiler(graph, *examples):
    raise RuntimeError("No working C++ compiler found.")


def test_without_a_compiler_one_warning_and_the_same_draws(regression, monkeypatch):
    method = bnn.NUTS(chains=2, warmup=60, draws=60)
    fit = partial(bnn.fit, regression.model, regression.x, regression.y, method=method, seed=3)
    untried = fit()  # too little work to compile
    monkeypatch.setattr(_gradient, "_COMPILING", 0.0)
    monkeypatch.setattr(_gradient, "compiled", no_compiler)
    with pytest.warns(bnn.PerformanceWarning, match=r"compiler \(g\+\+ or clang\)") as told:
        tried = fit()
    assert sum(w.category is bnn.PerformanceWarning for w in told) == 1
    assert torch.equal(tried.draws["w"], untried.draws["w"])


def test_a_compiled_gradient_of_other_numbers_is_dropped_and_told(regression, monkeypatch):
    def off(graph, *z):
        run = _compile.traced(graph, *z)
        return lambda *given: tuple(each + 1.0 for each in run(*given))

    monkeypatch.setattr(_gradient, "_COMPILING", 0.0)
    monkeypatch.setattr(_gradient, "compiled", off)
    fit = partial(bnn.fit, regression.model, regression.x, regression.y, method=nuts(), seed=3)
    with pytest.warns(
        bnn.PerformanceWarning, match="other numbers.* slower route 'traced'"
    ) as told:
        posterior = fit()
    assert {w.filename for w in told if w.category is bnn.PerformanceWarning} == {__file__}
    assert_exact(posterior.draws["w"], regression.mean, regression.sd)


def test_compiled_draws_are_exact(regression, monkeypatch):
    monkeypatch.setattr(_gradient, "_COMPILING", 0.0)
    taken = []
    plain = Gradient.hasten
    monkeypatch.setattr(
        Gradient, "hasten", lambda self, *asked: taken.append(plain(self, *asked)) or taken[-1]
    )
    posterior = bnn.fit(regression.model, regression.x, regression.y, method=nuts(), seed=3)
    assert taken[0]
    assert not any(taken[1:])  # once is enough
    assert_exact(posterior.draws["w"], regression.mean, regression.sd)


@pytest.mark.parametrize("method", [bnn.NUTS, bnn.MCLMC])
def test_a_sampler_says_that_it_compiles(method, regression, monkeypatch, capsys):
    """Before the seconds that it takes: when the compiler is called, the bar has said so."""
    said = []

    def compiler(graph, *z):
        said.append("compiling the gradient" in capsys.readouterr().err)
        return _compile.traced(graph, *z)

    monkeypatch.setattr(_gradient, "_COMPILING", 0.0)
    monkeypatch.setattr(_gradient, "compiled", compiler)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # too short to converge
        bnn.fit(regression.model, regression.x, regression.y, method=method(warmup=5, draws=5))
    assert said == [True]


def test_machine_code_is_known_once_it_was_called():
    made = importlib.import_module("bnn.inference._trajectory")
    fresh = made._jit(lambda x: x + 1)
    assert not made.is_made(fresh)
    assert fresh(1.0) == 2.0
    assert made.is_made(fresh)
    assert made.is_made(lambda x: x)  # no compiler: nothing to wait for


@pytest.mark.parametrize("method", [bnn.NUTS, bnn.MCLMC])
def test_a_sampler_that_is_no_machine_code_yet_says_so(method, regression, monkeypatch, capsys):
    """And nothing of it where it is; tracing is told before anything else."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    for ready in (False, True):
        for name in ("_trajectory", "_mclmc"):
            module = importlib.import_module(f"bnn.inference.{name}")
            monkeypatch.setattr(module, "is_made", lambda function, ready=ready: ready)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # too short to converge
            bnn.fit(regression.model, regression.x, regression.y, method=method(warmup=5, draws=5))
        told = capsys.readouterr().err
        assert "tracing the model" in told
        assert ("compile the sampler" in told or "compiling the sampler" in told) != ready


def test_hasten_decides_by_the_count_alone(monkeypatch):
    built = []
    monkeypatch.setattr(
        _gradient, "compiled", lambda graph, *z: built.append(1) or _compile.traced(graph, *z)
    )
    for _ in range(2):  # the same whatever ran before, however long that took
        gradient = gradient_of(linear, None)
        assert gradient.route == "traced"
        enough = _gradient._COMPILING / gradient._saving()
        assert 1e3 < enough < 1e6  # 6 s against some tens of microseconds a call
        assert not gradient.hasten(0.999 * enough)
        assert gradient.route == "traced"
        assert gradient.hasten(1.001 * enough)
        assert gradient.route == "compiled"
        assert not gradient.hasten(1e9)
    assert len(built) == 2


@pytest.mark.parametrize("kind", ["branch_on_a_value", "buffer_changed_in_place"])
def test_what_cannot_be_traced_is_not_compiled(kind, monkeypatch):
    monkeypatch.setattr(_gradient, "compiled", no_compiler)  # would warn, were it called
    gradient = gradient_of(KINDS[kind][0](), None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not gradient.hasten(1e12)
    assert gradient.route == "looped"


def test_a_lane_does_not_depend_on_its_neighbours():
    gradient = gradient_of(KINDS["pyro_module_mlp"][0](), "traced")
    z = points(gradient.energy.size)[0]
    value, slope = gradient(z)
    other = -z
    other[1] = z[1]
    value_again, slope_again = gradient(other)
    assert value_again[1] == value[1]
    assert torch.equal(slope_again[1], slope[1])


@pytest.mark.parametrize("route", ["traced", "compiled"])
def test_lanes_too_large_for_the_cache_are_computed_in_blocks(route, monkeypatch):
    whole = gradient_of(KINDS["pyro_module_mlp"][0](), route)
    assert whole.block == whole.lanes
    monkeypatch.setattr(_gradient, "_CACHE", 1)
    monkeypatch.setattr(_gradient, "_FEW", 1)
    monkeypatch.setattr(_gradient, "compiled", lambda graph, *z: _compile.traced(graph, *z))
    parts = gradient_of(KINDS["pyro_module_mlp"][0](), route)
    assert parts.route == route
    assert parts.block < parts.lanes
    assert_equal_to_pyro(parts)
    assert parts._saving() > whole._saving()  # each block has its own calls


@pytest.mark.parametrize(
    ("rows", "columns", "turned"),
    [(60, 10, True), (60, 16, False), (30, 10, False), (60, 1, False)],
)
def test_products_of_many_rows_and_few_columns_are_turned(rows, columns, turned):
    """What is compiled of them loops along the rows, and is the same function."""
    x, w = (torch.randn(2, *shape, generator=generator(np.random.SeedSequence(0)))
            for shape in ((rows, 3), (3, columns)))  # fmt: skip
    function = lambda x, w: (torch.tanh(x @ w).square().sum(2), (x @ w).sum(1))
    graph = _compile._rows_last(graph_of(function, x, w))
    products = [n for n in graph.graph.nodes if n.target is torch.ops.aten.bmm.default]
    permute = torch.ops.aten.permute.default
    assert products
    assert all((n.args[0].target is permute) == turned for n in products)
    for got, expected in zip(graph(x, w), function(x, w), strict=True):
        torch.testing.assert_close(got, expected)


def _energy(model, *data):
    with quiet_pyro():
        read, sites = contract.check(model, arguments.read(model, data))
        return Energy(model, read, sites)


def counted_groups(g, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("group", int(g.max()) + 1):
        a = pyro.sample("a", dist.Normal(mu, 1.0))
    with pyro.plate("data", len(g)):
        pyro.sample("y", dist.Normal(a[g], 0.5), obs=y)


def process(x, y=None):
    f = pyro.sample("f", dist.MultivariateNormal(torch.zeros(len(x)), torch.eye(len(x))))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(f, 0.5), obs=y)


@pytest.mark.parametrize("model", [counted_groups, process])
def test_sites_that_count_the_rows_have_their_size_of_all_rows(model):
    """The first hundred rows, on which the prior is else drawn, have 5 groups of 8."""
    rows = torch.arange(160)
    energy = _energy(model, rows // 20, torch.zeros(160))
    assert len(energy.few[-1]) == 160
    posterior = bnn.fit(model, rows // 20, torch.zeros(160), method=bnn.MAP(steps=3))
    assert posterior.draws["f" if model is process else "a"].shape[-1] in (8, 160)


def test_few_rows_show_sites_that_do_not_count_them():
    def model(x, y=None):
        w = pyro.sample("w", weights(4))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    assert len(_energy(model, torch.zeros(160, 4), torch.zeros(160)).few[-1]) == 100


def edge(x, y=None):
    """No covariance where z > 1.7, and none of the posterior there; s has a part in none of it."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("s", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        covariance = (1.5 - z) * torch.eye(2) + 0.2
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), covariance), obs=y)


EDGE = torch.zeros(6), 0.7 * torch.randn(6, 2, generator=generator(np.random.SeedSequence(0)))


@pytest.mark.parametrize("route", _gradient.ROUTES)
def test_a_matrix_without_factors_is_a_density_of_zero_in_its_lane_alone(route):
    """A route that TorchScript strips of the check would go on with half a factor."""
    with quiet_pyro():
        energy = _energy(edge, *EDGE)
        gradient = Gradient(energy, 4, np.random.SeedSequence(0), route)
        assert gradient.route == route
        value, slope = gradient(torch.tensor([[0.0, 1.0], [3.0, 1.0], [-1.0, 1.0], [5.0, 1.0]]))
        exact = gradient(torch.tensor([[0.0, 1.0], [0.5, 1.0], [-1.0, 1.0], [0.0, 1.0]]))
    assert not value[[1, 3]].isfinite().any()
    assert torch.equal(value[[0, 2]], exact[0][[0, 2]])
    assert torch.equal(slope[[0, 2]], exact[1][[0, 2]])


@pytest.mark.filterwarnings("ignore::bnn.errors.ConvergenceWarning")
def test_chains_turn_back_where_a_matrix_has_no_factors():
    """z by quadrature: within three Monte Carlo errors of 1,000 effective draws, its sd in 7 %."""
    grid = torch.linspace(-5.0, 1.4999, 4_000, dtype=torch.float64)
    covariance = (1.5 - grid)[:, None, None] * torch.eye(2) + 0.2
    log_p = dist.Normal(0.0, 1.0).log_prob(grid) + sum(
        dist.MultivariateNormal(torch.zeros(2), covariance.float()).log_prob(y) for y in EDGE[1]
    )
    weight = log_p.softmax(0)
    mean = float(weight @ grid)
    sd = float(weight @ (grid - mean) ** 2) ** 0.5
    z = bnn.fit(edge, *EDGE, method=bnn.NUTS(draws=500)).draws["z"]
    assert abs(float(z.mean()) - mean) < 3 * sd / 1_000**0.5
    assert float(z.std()) == pytest.approx(sd, rel=0.07)


@pytest.mark.filterwarnings("ignore::bnn.errors.ConvergenceWarning")
def test_a_step_at_a_matrix_without_factors_is_left_out():
    mode = bnn.fit(edge, *EDGE, method=bnn.MAP(steps=500)).draws["z"]
    assert mode.isfinite().all()
    with pytest.raises(bnn.FitError, match="not finite"):  # q cannot keep away from there
        bnn.fit(edge, *EDGE, method=bnn.SVI(particles=8))


@pytest.mark.parametrize("kind", ["covariance_matrix", "precision_matrix", "scale_tril"])
def test_a_constant_matrix_is_factorised_once_and_checked_then(kind):
    def model(x, y=None):
        w = pyro.sample("w", dist.MultivariateNormal(torch.zeros(4), **{kind: 2 * torch.eye(4)}))
        observe(x @ w, y)

    with quiet_pyro(), warnings.catch_warnings():
        warnings.simplefilter("error")
        energy = _energy(model, torch.randn(N, 4), torch.zeros(N))
        assert Gradient(energy, 4, np.random.SeedSequence(0)).route == "traced"


@pytest.mark.filterwarnings("ignore::bnn.errors.ConvergenceWarning")
@pytest.mark.parametrize("seed", range(20))
def test_no_draw_of_a_prior_that_has_no_factors_ends_a_fit(seed):
    """One in 22 has none; and of this correlation six in ten, of which the checks meet some."""

    def correlated(x, y=None):
        r = pyro.sample("r", dist.Normal(0.0, 2.0))
        matrix = torch.eye(2) + r * (1 - torch.eye(2))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), matrix), obs=y)

    for model in (edge, correlated):
        posterior = bnn.fit(model, *EDGE, method=bnn.MAP(steps=3), seed=seed)
        assert all(v.isfinite().all() for v in posterior.draws.values())


def test_a_narrow_prior_far_out_starts_there():
    """Half its draws are the same float32, as those of one too vague for it are."""

    def model(y=None):
        mu = pyro.sample("mu", dist.Normal(1.7e9, 10.0))
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Normal(mu, 100.0), obs=y)

    starts = _energy(model, torch.full((5,), 1.7e9)).starts(4, np.random.SeedSequence(0))
    assert (starts - 1.7e9).abs().max() < 1_000


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "prior", [dist.Gamma(0.001, 0.001), dist.Gamma(0.01, 0.01), dist.InverseGamma(0.01, 0.01)]
)
def test_a_prior_that_is_too_vague_for_its_draws_has_starting_points(prior, seed):
    """Half of them are the smallest float32 or the largest, and no start is near those."""

    def model(y=None):
        tau = pyro.sample("tau", prior)
        with pyro.plate("data", 30):
            pyro.sample("y", dist.Normal(0.0, tau**-0.5), obs=y)

    with quiet_pyro():
        energy = _energy(model, torch.randn(30))
        starts = energy.starts(4, np.random.SeedSequence(seed))
    assert (starts.abs() <= 2).all()
