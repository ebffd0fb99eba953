"""The compiled step against the eager one, and when it is not taken."""

import itertools
import warnings
from shutil import which

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import bnn
from bnn.inference import _optimise, _step


@pytest.fixture
def hasty(monkeypatch):
    """Every fit that may be compiled is, however short."""
    monkeypatch.setattr(_step, "_COMPILING", 0.0)
    monkeypatch.setattr(_step, "_FEW", 0)


def _graph_itself(graph, *examples):
    """Stands for the compiler: the traced operations as they are."""
    return graph


def _no_compiler(graph, *examples):
    raise RuntimeError("no C++ compiler found")


def _quietly(model, *data, method, seed=0):
    """A fit too short to converge, that must not complain of its speed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", bnn.PerformanceWarning)
        return bnn.fit(model, *data, method=method, seed=seed, progress=False)


def _both(monkeypatch, model, *data, method, seed=3):
    """The same fit compiled and eager, and the routes that were taken."""
    routes, plain = [], _step.Step.hasten

    def watched(self, *args):
        plain(self, *args)
        routes.append(self.route)

    monkeypatch.setattr(_step.Step, "hasten", watched)
    fast = _quietly(model, *data, method=method, seed=seed)
    with monkeypatch.context() as patch:
        patch.setattr(_step, "_COMPILING", float("inf"))
        plainly = _quietly(model, *data, method=method, seed=seed)
    assert routes[1] == "eager"
    return fast, plainly, routes[0]


def _agree(fast, plainly):
    assert len(fast.history) == len(plainly.history)
    torch.testing.assert_close(fast.history, plainly.history, rtol=1e-4, atol=1e-3)
    for name, draws in fast.draws.items():
        torch.testing.assert_close(draws, plainly.draws[name], rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not (which("g++") or which("clang")), reason="no C++ compiler")
@pytest.mark.parametrize(
    "method",
    [
        bnn.SVI(particles=2, steps=300, draws=20, batch_size=10, annealing=20),
        bnn.MAP(restarts=3, steps=300, draws=2, batch_size=10),
    ],
    ids=["svi", "map"],
)
def test_compiled_is_the_same_fit(regression, hasty, monkeypatch, method):
    fast, plainly, route = _both(
        monkeypatch, regression.model, regression.x, regression.y, method=method
    )
    assert route == "compiled"
    _agree(fast, plainly)
    again = _quietly(regression.model, regression.x, regression.y, method=method, seed=3)
    assert torch.equal(again.draws["w"], fast.draws["w"])


@pytest.mark.parametrize("guide", ["full_rank", "low_rank", "flow", "point"])
def test_every_family_has_a_graph(regression, hasty, monkeypatch, guide):
    monkeypatch.setattr(_step, "compiled", _graph_itself)
    method = bnn.SVI(guide=guide, particles=2, steps=40, draws=5)
    fast, plainly, route = _both(
        monkeypatch, regression.model, regression.x, regression.y, method=method
    )
    assert route == "compiled"
    _agree(fast, plainly)


@pytest.mark.parametrize("method", [bnn.MCDropout, bnn.ConcreteDropout])
def test_dropout_has_a_graph(regression, hasty, monkeypatch, method):
    monkeypatch.setattr(_step, "compiled", _graph_itself)
    model = bnn.models.mlp_regression(2, (5,))
    settings = method(steps=40, draws=5, batch_size=10)
    fast, plainly, route = _both(monkeypatch, model, regression.x, regression.y, method=settings)
    assert route == "compiled"
    _agree(fast, plainly)


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 10},
        {"concentration": "evidence", "prior": "uniform"},
        {"family": "weibull"},
        {"family": "lognormal", "prior_concentration": None},
    ],
    ids=["dirichlet", "evidence", "weibull", "lognormal"],
)
def test_every_law_of_attention_has_a_graph(hasty, monkeypatch, settings):
    monkeypatch.setattr(_step, "compiled", _graph_itself)
    torch.manual_seed(0)
    x, y = torch.randint(9, (20, 5)), torch.randint(2, (20,))
    model = bnn.models.transformer_classification(
        5, 2, vocabulary=9, padding=0, width=8, heads=2, layers=1
    )
    method = bnn.DirichletAttention(steps=30, learning_rate=0.005, draws=5, **settings)
    fast, plainly, route = _both(monkeypatch, model, x, y, method=method)
    assert route == "compiled"
    _agree(fast, plainly)


@pytest.mark.parametrize(
    "method",
    [
        bnn.SGHMC(chains=3, warmup=40, steps=60, draws=10, batch_size=10),
        bnn.SGLD(chains=1, warmup=40, steps=60, draws=10),
        bnn.SWAG(restarts=2, steps=60, collection=60, every=2, rank=5, draws=10, batch_size=10),
    ],
    ids=["sghmc", "sgld", "swag"],
)
def test_every_rule_has_a_graph(regression, hasty, monkeypatch, method):
    monkeypatch.setattr(_step, "compiled", _graph_itself)
    routes, plain = [], _step.Step.hasten

    def watched(self, *args):
        plain(self, *args)
        routes.append((type(self.rule).__name__, self.route))

    monkeypatch.setattr(_step.Step, "hasten", watched)
    fast = _quietly(regression.model, regression.x, regression.y, method=method)
    assert len(routes) == 2  # Adam, and the rule of the method
    assert all(route == "compiled" for _, route in routes), routes
    monkeypatch.setattr(_step, "_COMPILING", float("inf"))
    plainly = _quietly(regression.model, regression.x, regression.y, method=method)
    torch.testing.assert_close(fast.draws["w"], plainly.draws["w"], rtol=1e-3, atol=1e-3)


_CONVOLUTION = torch.nn.Sequential(torch.nn.Conv1d(1, 2, 2), torch.nn.Flatten())


def _convolved(x, y=None):
    f = bnn.models.sample_weights(_CONVOLUTION)(x[:, None]).sum(1)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(f, 1.0), obs=y)


@pytest.mark.parametrize("estimator", ["local", "flipout", "path"])
@pytest.mark.parametrize("kind", ["product", "convolution"])
def test_every_estimator_has_a_graph(regression, hasty, monkeypatch, estimator, kind):
    monkeypatch.setattr(_step, "compiled", _graph_itself)
    model = regression.model if kind == "product" else _convolved
    x = regression.x if kind == "product" else regression.x[:, [0, 1, 0]]
    method = bnn.SVI(estimator=estimator, particles=2, steps=40, draws=5, batch_size=10)
    fast, plainly, route = _both(monkeypatch, model, x, regression.y, method=method)
    assert route == "compiled"
    _agree(fast, plainly)


@pytest.mark.parametrize("estimator", ["reparameterization", "local", "flipout"])
@pytest.mark.parametrize("size", [20, 30])  # batches of 20, 20, 10, and of 30, 20
def test_a_batch_of_another_size_runs_eagerly(regression, hasty, monkeypatch, estimator, size):
    monkeypatch.setattr(_step, "compiled", _graph_itself)
    rows = torch.utils.data.TensorDataset(regression.x, regression.y)
    loader = torch.utils.data.DataLoader(rows, batch_size=size)
    method = bnn.SVI(estimator=estimator, steps=40, draws=5)
    fast, plainly, route = _both(monkeypatch, regression.model, loader, method=method)
    assert route == "compiled"
    _agree(fast, plainly)


def _random(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(torch.nn.functional.dropout(x, 0.5) @ w, 1.0), obs=y)


def _branching(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0 if float(w[0]) > 0 else 2.0), obs=y)


class _WithOffset(pyro.nn.PyroModule):
    def __init__(self):
        super().__init__()
        self.offset = torch.nn.Parameter(torch.tensor(0.0))

    def forward(self, x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w + self.offset, 1.0), obs=y)


@pytest.mark.parametrize("model", [_random, _WithOffset()])
def test_a_model_of_its_own_draws_or_tensors_stays_eager_without_a_word(
    regression, hasty, monkeypatch, model
):
    monkeypatch.setattr(_step, "compiled", _no_compiler)  # would warn
    for method in (bnn.SVI(steps=30, draws=5), bnn.MAP(steps=30, draws=5)):
        posterior = _quietly(model, regression.x, regression.y, method=method)
        assert torch.isfinite(posterior.history).all()


def test_a_step_that_cannot_be_traced_is_told_of_once(regression, hasty):
    method = bnn.SVI(steps=30, draws=5)
    with pytest.warns(bnn.PerformanceWarning, match="could not be compiled .*branches") as caught:
        posterior = bnn.fit(_branching, regression.x, regression.y, method=method)
    (told,) = [each for each in caught if each.category is bnn.PerformanceWarning]
    assert told.filename == __file__
    assert torch.isfinite(posterior.history).all()


@pytest.mark.parametrize(
    "method",
    [bnn.SVI(particles=4, steps=30, draws=5), bnn.DeepEnsemble(members=3, steps=30)],
    ids=["particles", "members"],
)
@pytest.mark.filterwarnings("ignore::bnn.errors.ConvergenceWarning")
def test_what_cannot_be_lifted_runs_one_by_one_with_a_notice(regression, method):
    with pytest.warns(bnn.PerformanceWarning, match="one after the other") as told:
        posterior = bnn.fit(_branching, regression.x, regression.y, method=method)
    assert [w.filename for w in told if w.category is bnn.PerformanceWarning] == [__file__]
    assert torch.isfinite(posterior.history).all()


def test_a_missing_compiler_is_said_once_and_the_fit_is_right(regression, hasty, monkeypatch):
    monkeypatch.setattr(_step, "compiled", _no_compiler)
    method = bnn.SVI(steps=200, draws=20, schedule="constant")
    with pytest.warns(bnn.PerformanceWarning, match="no C\\+\\+ compiler found") as caught:
        slow = bnn.fit(regression.model, regression.x, regression.y, method=method)
    (told,) = [each for each in caught if each.category is bnn.PerformanceWarning]
    assert told.filename == __file__
    monkeypatch.setattr(_step, "_COMPILING", float("inf"))
    plainly = _quietly(regression.model, regression.x, regression.y, method=method)
    assert torch.equal(slow.draws["w"], plainly.draws["w"])
    assert torch.equal(slow.history, plainly.history)


def test_a_short_fit_is_not_compiled(regression, monkeypatch):
    monkeypatch.setattr(_step, "compiled", lambda *_: pytest.fail("compiled"))
    for method in (bnn.SVI(steps=500), bnn.SVI(steps=2_000, schedule="cosine"), bnn.MAP()):
        _quietly(regression.model, regression.x, regression.y, method=method)


def test_a_wrong_program_is_not_taken(regression, hasty, monkeypatch):
    """Planted: one of Adam's moments comes out 1 % too large."""

    def off(graph, *examples):
        def program(*args):
            out = graph(*args)
            args[2].mul_(1.01)
            return out

        return program

    monkeypatch.setattr(_step, "compiled", off)
    method = bnn.SVI(steps=30, draws=5)
    with pytest.warns(bnn.PerformanceWarning, match="other numbers"):
        posterior = bnn.fit(regression.model, regression.x, regression.y, method=method)
    monkeypatch.setattr(_step, "_COMPILING", float("inf"))
    plainly = _quietly(regression.model, regression.x, regression.y, method=method)
    assert torch.equal(posterior.draws["w"], plainly.draws["w"])


@pytest.mark.parametrize("compiling", [False, True])
def test_a_member_that_is_not_finite_stays_alone(compiling, hasty, monkeypatch):
    """-(z - 1)^2 for three members; the second's gradient is infinite while its noise says so."""
    monkeypatch.setattr(_step, "compiled", _graph_itself)
    noise = [torch.zeros(3)]

    def objective(leaves, batch, weight, drawn):
        return -((leaves["z"] - 1) ** 2).sum(1) + (drawn[0][:, None] * leaves["z"]).sum(1)

    z = torch.zeros(3, 2, requires_grad=True)
    step = _step.Step(objective, {"z": z}, lambda batch: tuple(noise), members=3, averaging=True)
    if compiling:
        assert step.hasten(1_000, [()] * 2, np.random.SeedSequence(0))
    noise[0] = torch.tensor([0.0, float("inf"), 0.0])
    bad = [name for _, name in step((), [0.1, 0.1, 0.05], 1.0)]
    assert bad == ["", "objective", ""]
    torch.testing.assert_close(z[:, 0].detach(), torch.tensor([0.1, 0.0, 0.05]))
    noise[0] = torch.zeros(3)
    assert [name for _, name in step((), [0.1, 0.1, 0.1], 1.0)] == [""] * 3
    assert step.state["count"].tolist() == [2, 1, 2]
    torch.testing.assert_close(z[1].detach(), torch.full((2,), 0.1))
    step.settle((0,))
    torch.testing.assert_close(z[0].detach(), step.state["average"]["z"][0])
    assert step.state["averaged"].tolist() == [0, 1, 2]


def test_a_member_that_has_ended_waits_for_the_others():
    """The first starts at the optimum of -z^2 and ends early, the second far off."""
    start = torch.tensor([[0.0], [20.0]])
    leaf, seen = start.clone(), []

    def objective(leaves, batch, weight, noise):
        seen.append(leaves["z"].detach().clone())
        return -leaves["z"].square().sum(1)

    first, second = _optimise.maximise(
        objective,
        {"z": leaf},
        itertools.repeat(()),
        bnn.MAP(steps=4_000),
        what="two",
        label="objective",
        progress=False,
        members=2,
    )
    assert len(first) < len(second) < 4_000
    assert all(torch.equal(z[0], leaf[0]) for z in seen[len(first) :])
    assert leaf.abs().max() < 0.01


def test_adam_is_that_of_torch():
    target = torch.tensor([1.0, -2.0, 30.0])
    leaf, other = (torch.zeros(3, requires_grad=True) for _ in range(2))
    step = _step.Step(lambda leaves, *_: -(leaves["z"] - target).pow(4).sum(), {"z": leaf})
    adam = torch.optim.Adam([other], lr=0.1, betas=_step._MEMORY)
    for _ in range(50):
        step((), [0.1], 1.0)
        adam.zero_grad()
        (other - target).pow(4).sum().backward()
        adam.step()
    torch.testing.assert_close(leaf, other)


def test_the_bar_says_that_it_compiles(regression, hasty, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr(_step, "compiled", _graph_itself)
    method = bnn.SVI(steps=100, draws=10, schedule="constant")
    bnn.fit(regression.model, regression.x, regression.y, method=method)
    text = capsys.readouterr().err
    assert text.index("compiling the step") < text.index("ELBO")


@pytest.mark.parametrize(("size", "steps", "route"), [(8, 900, "eager"), (2**21, 900, "compiled")])
def test_few_steps_of_large_leaves_are_compiled_too(monkeypatch, size, steps, route):
    """-|z|^2 / 2 by Adam: 2^21 numbers, each touched some 40 times a step, and 8."""
    monkeypatch.setattr(_step, "compiled", _graph_itself)
    z = torch.ones(size, requires_grad=True)
    objective = lambda leaves, batch, weight, noise: -leaves["z"].square().sum() / 2
    step = _step.Step(objective, {"z": z}, lambda batch: (), None, averaging=True)
    step.hasten(steps, [()] * 2, np.random.SeedSequence(0))
    assert step.route == route
    assert step.hasten(20, [()] * 2, np.random.SeedSequence(0)) is False
