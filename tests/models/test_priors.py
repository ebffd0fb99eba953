import math
import pickle

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import stats
from torch import nn

import bnn
from bnn.handlers import At
from bnn.models import MLP, likelihoods, priors, sample_weights, supervised
from bnn.models.priors import (
    EmpiricalBayes,
    Horseshoe,
    Laplace,
    Normal,
    ScaleMixture,
    StudentT,
)

pytestmark = pytest.mark.filterwarnings("ignore:trying to observe")  # a factor, run by hand

ALL = [
    Normal(),
    Normal(scale=0.5, bias_scale=2.0),
    Laplace(),
    StudentT(),
    StudentT(df=1.0, scale=0.3),
    Horseshoe(),
    Horseshoe(scale=0.1, slab=None),
    ScaleMixture(),
    EmpiricalBayes(),
    EmpiricalBayes(hyperprior=(1.0, 10.0)),
]


def stated(prior, module, name="weight"):
    return prior(f"layer.{name}", getattr(module, name).detach(), module)


@pytest.mark.parametrize("prior", ALL, ids=repr)
def test_values(prior):
    assert eval(repr(prior)) == prior
    assert pickle.loads(pickle.dumps(prior)) == prior
    assert hash(prior) == hash(eval(repr(prior)))
    with pytest.raises(AttributeError):
        prior.bias_scale = 3.0


@pytest.mark.parametrize("prior", ALL, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_parameter_is_drawn_in_its_shape_and_dtype(prior, dtype):
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Linear(3, 2)).to(dtype)
    drawn = sample_weights(net, prior).weights
    for name, parameter in net.named_parameters():
        assert drawn[name].shape == parameter.shape
        assert drawn[name].dtype == dtype


@pytest.mark.parametrize("prior", ALL, ids=repr)
def test_scored_alike_under_vmap(prior, vmapped_gradient):
    x = torch.randn(6, 3)
    model = supervised(MLP(3, (4,)), likelihoods.Gaussian(), prior)
    vmapped_gradient(model, x, x[:, 0])


@pytest.mark.parametrize(
    ("module", "name", "fan"),
    [
        (nn.Linear(9, 2), "weight", 9),
        (nn.Conv2d(8, 4, (3, 5), groups=2), "weight", 4 * 15),
        (nn.ConvTranspose2d(8, 4, 4, stride=2, groups=2), "weight", 4 * 16 / 4),
        (nn.MultiheadAttention(6, 2), "in_proj_weight", 6),
        (nn.MultiheadAttention(6, 2, kdim=5), "k_proj_weight", 5),
        (nn.GRU(7, 3), "weight_ih_l0", 7),
        (nn.LSTM(7, 3), "weight_hh_l0", 3),
        (nn.Bilinear(2, 3, 4), "weight", 6),
        (nn.Embedding(50, 3), "weight", 1),
    ],
)
def test_fan_in(module, name, fan):
    prior = stated(Normal(), module, name).base_dist
    assert float(prior.scale.max()) == pytest.approx(1 / math.sqrt(fan))
    assert float(prior.loc.abs().max()) == 0


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.Linear(9, 2), "bias"),
        (nn.GRU(7, 3), "bias_hh_l0"),
        (nn.MultiheadAttention(6, 2, add_bias_kv=True), "bias_k"),
        (nn.LayerNorm(4), "bias"),
        (nn.LayerNorm((3, 4)), "weight"),
        (nn.BatchNorm1d(4), "weight"),
    ],
)
def test_biases_and_gains_have_their_own_scale(module, name):
    prior = stated(Normal(scale=0.1, bias_scale=0.7), module, name).base_dist
    assert float(prior.scale.max()) == pytest.approx(0.7)
    assert float(prior.loc.max()) == (name == "weight")


@pytest.mark.parametrize("prior", [Normal(), Laplace(), StudentT(), StudentT(df=2.5)], ids=repr)
def test_scale_is_a_standard_deviation(prior):
    fn = stated(prior, nn.Linear(16, 3))
    torch.testing.assert_close(fn.variance, torch.full((3, 16), 1 / 16))
    bias = stated(type(prior)(bias_scale=0.5), nn.Linear(16, 3), "bias")
    torch.testing.assert_close(bias.variance, torch.full((3,), 0.25))


def test_student_t_without_variance_takes_its_own_scale():
    fn = stated(StudentT(df=1.5, scale=0.3), nn.Linear(4, 1)).base_dist
    torch.testing.assert_close(fn.scale, torch.full((1, 4), 0.3))


def test_f_keeps_its_spread_as_the_net_widens():
    def spread(width):
        net, x = MLP(2, (width,)), torch.tensor([[1.0, -1.0]])
        return torch.stack([sample_weights(net, Normal(bias_scale=1e-6))(x) for _ in range(2000)])

    narrow, wide = spread(10).std(), spread(1000).std()
    assert float(wide / narrow) == pytest.approx(1.0, abs=0.1)


def test_scale_mixture_density_is_eq_7():
    prior = ScaleMixture(mixing=0.25, wide=1.5, narrow=0.01)
    fn = stated(prior, nn.Linear(3, 2).double())
    w = torch.tensor([[0.0, 0.005, -0.02], [1.0, -2.0, 0.3]], dtype=torch.float64)
    each = 0.25 * stats.norm.pdf(w, scale=1.5) + 0.75 * stats.norm.pdf(w, scale=0.01)
    # MixtureSameFamily's log-sum-exp rounds as float64 does, no more.
    assert float(fn.log_prob(w)) == pytest.approx(math.log(each.prod()), rel=1e-10)
    gain = stated(prior, nn.LayerNorm(2))
    assert float(gain.log_prob(torch.ones(2))) > float(gain.log_prob(torch.zeros(2)))


def test_horseshoe_is_non_centred_and_regularised():
    prior, module = Horseshoe(scale=0.2, slab=2.0), nn.Linear(3, 2)
    trace = poutine.trace(lambda: sample_weights(module, prior)).get_trace()
    latent = [n for n in trace.stochastic_nodes]
    assert latent == ["weight.global", "weight.local", "weight.raw", "bias"]
    value = {k: n["value"] for k, n in trace.nodes.items() if n["type"] == "sample"}
    tau, local = value["weight.global"], value["weight.local"]
    assert float(trace.nodes["weight.global"]["fn"].scale) == pytest.approx(0.2)
    # Piironen and Vehtari 2017, eq. 2.8: N(0, tau^2 c^2 local^2 / (c^2 + tau^2 local^2)).
    variance = tau**2 * 4.0 * local**2 / (4.0 + tau**2 * local**2)
    torch.testing.assert_close(value["weight"], value["weight.raw"] * variance.sqrt())
    assert isinstance(trace.nodes["bias"]["fn"].base_dist, dist.Normal)


def test_horseshoe_limits():
    huge = {"w.global": torch.tensor(1e20), "w.local": torch.full((2, 3), 1e15)}
    at = At(huge | {"w.raw": torch.ones(2, 3)})
    parameter, module = torch.zeros(2, 3), nn.Linear(3, 2)
    with at:
        escaped = Horseshoe(slab=2.0)("w", parameter, module)
        plain = Horseshoe(slab=None)("w", parameter, module)
    torch.testing.assert_close(escaped, torch.full((2, 3), 2.0))
    torch.testing.assert_close(plain, torch.full((2, 3), 1e35))


def test_empirical_bayes_scale_is_fitted_by_svi_and_refused_by_nuts():
    x = torch.randn(80, 16)
    y = 0.05 * x.sum(1) + 0.1 * torch.randn(80)
    model = bnn.models.linear(16, prior=EmpiricalBayes(), likelihood=likelihoods.Gaussian(0.1))
    # Biases have a prior of their own, so the one fitted scale is the weights'.
    method = bnn.SVI(steps=2000, draws=20, learning_rate=0.02)
    posterior = bnn.fit(model, x, y, method=method, progress=False)
    scale = float(posterior.params["layers.0.weight.prior_scale"])
    assert scale == pytest.approx(0.05, abs=0.02)  # started at 0.25
    with pytest.raises(bnn.ModelError, match="prior_scale"):
        bnn.fit(model, x, y, method=bnn.NUTS(chains=1, draws=5, warmup=5), progress=False)


@pytest.mark.parametrize("hyperprior", [None, (1.0, 10.0)])
def test_empirical_bayes_scale_has_its_closed_form(hyperprior, tmp_path):
    """scale^2 = (sum(m^2 + s^2) + 2 b) / (n + 2 a + 2) at the optimum, a layer at a time."""
    x = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    y = x[:, 0] + torch.tanh(x[:, 1])
    likelihood = likelihoods.Gaussian(0.3)
    model = supervised(MLP(8, (6,)), likelihood, EmpiricalBayes(hyperprior=hyperprior))
    method = bnn.SVI(steps=1500, particles=8, schedule="cosine", draws=5, learning_rate=0.05)
    posterior = bnn.fit(model, x, y, method=method, progress=False)
    loc, log_scale = posterior.params["guide.loc"], posterior.params["guide.log_scale"]
    squares = loc.square() + (2 * log_scale).exp()
    a, b = hyperprior or (-1.0, 0.0)
    for name, span in {"layers.0.weight": slice(0, 48), "layers.1.weight": slice(54, 60)}.items():
        exact = (squares[span].sum() + 2 * b) / (span.stop - span.start + 2 * a + 2)
        fitted = posterior.params[f"{name}.prior_scale"] ** 2
        assert float(fitted / exact) == pytest.approx(1.0, rel=0.03)
    posterior.save(tmp_path / "fit")
    assert bnn.load(tmp_path / "fit", model).predict(x).f.shape == (1, 5, 60)


def test_the_far_tail_of_a_scale_mixture_keeps_its_slope():
    """Where both densities underflow: -w / wide^2."""
    fn = stated(ScaleMixture(wide=1.0, narrow=0.05), nn.Linear(1, 1))
    far = torch.full((1, 1), 30.0, requires_grad=True)
    fn.log_prob(far).backward()
    assert float(far.grad) == pytest.approx(-30.0)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Normal(scale=0),
        lambda: Normal(scale="fan_out"),
        lambda: Normal(bias_scale=math.inf),
        lambda: Laplace(scale=-1.0),
        lambda: StudentT(df=0.0),
        lambda: Horseshoe(slab=0.0),
        lambda: Horseshoe(scale=None),
        lambda: ScaleMixture(mixing=1.0),
        lambda: ScaleMixture(narrow=2.0),
        lambda: EmpiricalBayes(bias_scale=True),
        lambda: EmpiricalBayes(hyperprior=(1.0, 0.0)),
        lambda: EmpiricalBayes(hyperprior=1.0),
    ],
)
def test_settings_out_of_range_are_refused(build):
    with pytest.raises(ValueError, match=r"pass a|make narrow"):
        build()


def test_all_priors_are_exported():
    attention = {"UniformAttention", "ContextualAttention"}  # of a net's attention, not its weights
    assert {type(p).__name__ for p in ALL} | {"Prior"} | attention == set(priors.__all__)
