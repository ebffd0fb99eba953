import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from bnn.handlers import At
from bnn.models import MLP, likelihoods, priors, sample_weights, supervised


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.out = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x):
        return self.out(self.gru(x)[0][:, -1])


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm, self.out = nn.LayerNorm(4), nn.Linear(4, 1)

    def forward(self, x):
        return self.out(self.norm(self.attention(x, x, x, need_weights=False)[0]).mean(1))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))


NETS = {
    "mlp": (lambda: MLP(3, (5, 4)), (6, 3)),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 1)),
        (6, 2, 6, 6),
    ),
    "gru": (Recurrent, (6, 5, 3)),
    "attention": (Attentive, (6, 5, 4)),
    "normalised": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.GroupNorm(2, 4)).eval(),
        (6, 3),
    ),
    "tied": (Tied, (6, 3)),
}


def output_of(net, x, **options):
    def model():
        return sample_weights(net, **options)(x)

    return model


@pytest.mark.parametrize("kind", NETS)
def test_sites_are_named_parameters_and_the_output_is_the_plain_nets(kind):
    build, shape = NETS[kind]
    net, x = build(), torch.randn(shape)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    trace = poutine.trace(output_of(net, x)).get_trace()
    drawn = {k: trace.nodes[k]["value"] for k in trace.stochastic_nodes}
    assert list(drawn) == [k for k, _ in net.named_parameters()]
    assert all(drawn[k].shape == v.shape for k, v in net.named_parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(drawn[name])
    torch.testing.assert_close(trace.nodes["_RETURN"]["value"], net(x))


@pytest.mark.parametrize("kind", [k for k in NETS if k != "gru"])
def test_vmap_over_draws_equals_the_loop(kind):
    build, shape = NETS[kind]
    net, x = build(), torch.randn(shape)
    names = [k for k, _ in net.named_parameters()]
    draws = {k: torch.randn(3, *dict(net.named_parameters())[k].shape) for k in names}

    def run(draw):
        with pyro.validation_enabled(False), At(draw):
            return sample_weights(net)(x)

    looped = torch.stack([run({k: v[i] for k, v in draws.items()}) for i in range(3)])
    torch.testing.assert_close(torch.func.vmap(run)(draws), looped, rtol=1e-4, atol=1e-4)


def test_make_fx_traces_the_gradient():
    net, x = MLP(3, (4,)), torch.randn(5, 3)
    names = [k for k, _ in net.named_parameters()]

    def loss(*values):
        with pyro.validation_enabled(False), At(dict(zip(names, values, strict=True))):
            return sample_weights(net)(x).square().sum()

    values = [torch.randn_like(v) for v in net.parameters()]
    graph = make_fx(torch.func.grad(loss))(*values)
    other = [torch.randn_like(v) for v in values]
    torch.testing.assert_close(graph(*other), torch.func.grad(loss)(*other))


def test_frozen_parameters_stay_at_their_values():
    net, x = MLP(3, (4,)), torch.randn(5, 3)
    net.layers[0].requires_grad_(False)
    trace = poutine.trace(output_of(net, x)).get_trace()
    assert trace.stochastic_nodes == ["layers.1.weight", "layers.1.bias"]
    expected = torch.tanh(net.layers[0](x))
    torch.testing.assert_close(trace.nodes["hidden.0"]["value"], expected)
    assert not trace.nodes["_RETURN"]["value"].requires_grad


def test_two_nets_live_in_one_model_by_name():
    first, second, x = MLP(3, (4,)), MLP(3, (2,)), torch.randn(5, 3)

    def model():
        a = sample_weights(first, name="mean")
        b = sample_weights(second, name="noise")
        with pyro.plate("data", 5):
            return a(x) + b(x)

    trace = poutine.trace(model).get_trace()
    assert {"mean.layers.0.weight", "noise.layers.0.weight"} <= set(trace.nodes)
    assert trace.nodes["mean.hidden.0"]["value"].shape == (5, 4)
    assert trace.nodes["noise.hidden.0"]["value"].shape == (5, 2)
    assert "layers.0.weight" not in trace.nodes


def test_inside_a_plate_is_refused():
    def model():
        with pyro.plate("data", 5):
            sample_weights(MLP(3))

    with pytest.raises(ValueError, match=r'inside the plate "data".*before `with pyro.plate'):
        poutine.trace(model).get_trace()


@pytest.mark.parametrize(
    ("net", "cure"),
    [
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), r"net\.eval\(\)"),
        (nn.BatchNorm1d(4, track_running_stats=False).eval(), "LayerNorm"),
        (nn.InstanceNorm1d(4, track_running_stats=True), r"net\.eval\(\)"),
        (nn.LazyLinear(4), "no shape yet"),
    ],
)
def test_nets_that_are_no_function_of_weights_and_row_are_refused(net, cure):
    with pytest.raises(ValueError, match=cure):
        sample_weights(net)


def test_a_class_in_place_of_a_net_is_refused():
    with pytest.raises(TypeError, match=r"Pass a torch\.nn\.Module"):
        sample_weights(nn.ReLU)


def test_dropout_in_training_mode_is_left_alone():
    net = nn.Sequential(nn.Linear(3, 200), nn.Dropout(0.5))
    out = sample_weights(net)(torch.randn(5, 3))
    assert 0.3 < float((out == 0).float().mean()) < 0.7


@pytest.mark.parametrize(
    ("prior", "error", "message"),
    [
        (lambda n, p, m: dist.Normal(0.0, 1.0), ValueError, r"\.to_event\(parameter\.ndim\)"),
        (lambda n, p, m: dist.Normal(p, torch.ones_like(p)), ValueError, "the last 0 axes"),
        (lambda n, p, m: torch.zeros(()), ValueError, "tensor of shape"),
        (lambda n, p, m: 1.0, TypeError, "Return a Pyro distribution"),
    ],
)
def test_priors_of_another_shape_or_kind_are_refused(prior, error, message):
    with pytest.raises(error, match=message):
        sample_weights(nn.Linear(3, 2), prior)


def test_any_callable_is_a_prior_and_sees_the_owner():
    seen = {}

    def prior(name, parameter, module):
        seen[name] = type(module)
        return priors.Normal()(name, parameter, module)

    sample_weights(Attentive(), prior)
    assert seen["attention.in_proj_weight"] is nn.MultiheadAttention
    assert seen["attention.out_proj.weight"].__mro__[1] is nn.Linear
    assert seen["norm.weight"] is nn.LayerNorm


def test_a_scalar_parameter_is_a_site():
    class Slope(nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = nn.Parameter(torch.tensor(2.0))

        def forward(self, x):
            return self.slope * x

    trace = poutine.trace(output_of(Slope(), torch.ones(3))).get_trace()
    assert trace.nodes["slope"]["value"].shape == ()


def test_a_model_can_be_pickled():
    model = supervised(Attentive(), likelihoods.Gaussian(), priors.Horseshoe())
    again = pickle.loads(pickle.dumps(model))
    x = torch.randn(4, 5, 4)

    def drawn(m):
        pyro.set_rng_seed(3)
        return poutine.trace(m).get_trace(x).nodes["y"]["value"]

    assert torch.equal(drawn(model), drawn(again))
