"""Linear maps are found by the identity of their weight, and computed by rules."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.func import vmap

from bnn.handlers import At
from bnn.inference._layers import Rewired, linear_maps
from bnn.models import sample_weights

LAYERS = {
    "linear": (nn.Linear(3, 2), (5, 3), 0),
    "no bias": (nn.Linear(3, 2, bias=False), (5, 3), 0),
    "conv1d": (nn.Conv1d(3, 4, 2), (5, 3, 6), 1),
    "conv2d": (nn.Conv2d(3, 4, 3, stride=2, padding=1), (5, 3, 6, 6), 2),
    "groups": (nn.Conv2d(4, 6, 3, groups=2), (5, 4, 6, 6), 2),
    "depthwise": (nn.Conv1d(4, 4, 3, groups=4, padding=1), (5, 4, 6), 1),
    "transposed": (nn.ConvTranspose2d(4, 2, 3, groups=2), (5, 4, 6, 6), 2),
}


def net_model(net, x, y=None):
    sample_weights(net)(x)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_is_found_and_scaling_its_weight_scales_its_inputs(kind):
    net, shape, places = LAYERS[kind]
    x = torch.randn(shape)
    found = linear_maps(net_model, (net, x))["weight"]
    assert found.places == places
    assert found.inputs == shape[1]
    assert found.bias == ("bias" if net.bias is not None else None)
    torch.testing.assert_close(found(), torch.func.functional_call(net, _at(found), (x,)))
    factor = torch.randn(shape[1])
    scaled = found.scaled(found.weight, factor)
    torch.testing.assert_close(found(weight=scaled), found(x=x * found.over_places(factor)))


def _at(found):
    return {"weight": found.weight} | ({} if found.bias is None else {"bias": found.offset})


def test_a_rule_replaces_the_map_under_vmap_too():
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(5, 3)
    rules = {"2.weight": lambda met: 2 * met()}
    draws = {k: torch.randn(7, *v.shape) for k, v in net.named_parameters()}

    def run(draw):
        outputs = []
        with Rewired(rules), At(draw):
            outputs.append(sample_weights(net)(x))
        return outputs[0]

    each = torch.stack([run({k: v[i] for k, v in draws.items()}) for i in range(7)])
    torch.testing.assert_close(vmap(run)(draws), each)
    plain = vmap(lambda draw: torch.func.functional_call(net, draw, (x,)))(draws)
    torch.testing.assert_close(each, 2 * plain)


def by_hand(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 2]).to_event(2))
    v = pyro.sample("v", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    other = pyro.sample("other", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
    return torch.tanh(x @ w) @ v + (x @ other.T).sum(-1)


def test_products_written_by_hand_are_found_and_a_transpose_is_not():
    found = linear_maps(by_hand, (torch.randn(5, 3),))
    assert {k: (m.axis, m.inputs) for k, m in found.items()} == {"w": (0, 3), "v": (0, 2)}


def test_a_pyro_module_is_found():
    class Net(PyroModule):
        def __init__(self):
            super().__init__()
            self.layer = PyroModule[nn.Linear](3, 1, bias=False)
            self.layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))

        def forward(self, x, y=None):
            return self.layer(x)

    assert list(linear_maps(Net(), (torch.randn(5, 3),))) == ["layer.weight"]


def test_equal_numbers_are_not_the_same_site():
    def model(x, y=None):
        pyro.sample("w", dist.Delta(torch.ones(3)).to_event(1))
        return x @ torch.ones(3)

    assert linear_maps(model, (torch.randn(5, 3),)) == {}


def test_another_use_of_a_site_is_noticed():
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        v = pyro.sample("v", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        return x @ w + x.shape[0] * w.shape[0] + x @ v + v.sum()

    with Rewired() as watch:
        model(torch.randn(5, 3))
    assert [met.site for met in watch.found] == ["w", "v"]
    assert watch.elsewhere == {"v"}
