import math
import pickle
import warnings

import pyro
import pytest
import torch
from pyro import poutine
from scipy import stats

import bnn
from bnn.handlers import At
from bnn.models import MLP, likelihoods, supervised
from bnn.models.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    NegativeBinomial,
    Ordinal,
    Poisson,
    StudentT,
)

ALL = [
    Gaussian(),
    Gaussian("predicted"),
    Gaussian(0.5),
    StudentT(),
    StudentT(df=3.0, scale="predicted"),
    StudentT(df=1.0, scale=0.2),
    Categorical(3),
    Bernoulli(),
    Poisson(),
    NegativeBinomial(),
    Ordinal(2),
    Ordinal(4),
]


def observations(likelihood, *shape):
    if isinstance(likelihood, Gaussian | StudentT):
        return torch.randn(shape)
    if isinstance(likelihood, Categorical | Ordinal):
        return torch.arange(math.prod(shape)).reshape(shape) % likelihood.classes
    top = 2 if isinstance(likelihood, Bernoulli) else 6
    return (torch.arange(math.prod(shape)).reshape(shape) % top).float()


def stated(likelihood, raw, unit=1.0, y=None, **values):
    """The nodes of one run at some raw outputs."""

    def model():
        observe = likelihood(unit)
        with pyro.plate("data", len(raw)):
            observe(raw, y)

    with At(values):
        return poutine.trace(model).get_trace().nodes


@pytest.mark.parametrize("likelihood", ALL, ids=repr)
def test_values(likelihood):
    assert eval(repr(likelihood)) == likelihood
    assert pickle.loads(pickle.dumps(likelihood)) == likelihood
    assert hash(likelihood) == hash(eval(repr(likelihood)))


@pytest.mark.parametrize("likelihood", ALL, ids=repr)
@pytest.mark.parametrize("targets", [1, 3])
def test_shapes(likelihood, targets):
    raw = torch.randn(7, targets * likelihood.outputs)
    nodes = stated(likelihood, raw)
    target = (7,) if targets == 1 else (7, targets)
    vector = (likelihood.outputs,) if isinstance(likelihood, Categorical) else ()
    assert nodes["f"]["value"].shape == target + vector
    assert nodes["y"]["value"].shape == target
    assert nodes["y"]["fn"].batch_shape == (7,)
    assert nodes["f"]["fn"].batch_shape == (7,)


@pytest.mark.parametrize("likelihood", ALL, ids=repr)
@pytest.mark.parametrize("targets", [1, 2])
def test_scored_alike_under_vmap(likelihood, targets, vmapped_gradient):
    model = supervised(MLP(3, (4,), targets * likelihood.outputs), likelihood)
    y = observations(likelihood, 12) if targets == 1 else observations(likelihood, 12, targets)
    sites = vmapped_gradient(model, torch.randn(12, 3), y)
    assert sites.plate == "data"
    assert "f" in sites.seams


@pytest.mark.parametrize("likelihood", ALL, ids=repr)
def test_fits_and_predicts_at_another_number_of_rows(likelihood):
    x, y = torch.randn(30, 3), observations(likelihood, 30)
    model = supervised(MLP(3, (4,), likelihood.outputs), likelihood)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        method = bnn.SVI(steps=50, draws=10)
        posterior = bnn.fit(model, x, y, method=method, progress=False)
    prediction = posterior.predict(torch.randn(8, 3))
    assert prediction.y.shape == (1, 10, 8)
    assert torch.isfinite(prediction.f).all()
    assert posterior.log_likelihood().shape == (1, 10, 30)
    assert torch.isfinite(posterior.log_likelihood()).all()


def test_gaussian_scales():
    raw = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    learned = stated(Gaussian(), raw[:, :1], unit=4.0)
    assert float(learned["sigma"]["fn"].scale) == 4.0
    torch.testing.assert_close(learned["y"]["fn"].scale, learned["sigma"]["value"].expand(2))
    predicted = stated(Gaussian("predicted"), raw, unit=4.0)["y"]["fn"]
    torch.testing.assert_close(predicted.loc, raw[:, 0])
    torch.testing.assert_close(predicted.scale, 4 * (raw[:, 1].exp().log1p() + 1e-6))
    fixed = stated(Gaussian(0.5), raw[:, :1], unit=4.0)["y"]["fn"]
    torch.testing.assert_close(fixed.scale, torch.full((2,), 0.5))


def test_a_learned_scale_may_have_a_least():
    nodes = stated(Gaussian(least=0.3), torch.zeros(2, 1), unit=4.0)
    told = torch.hypot(nodes["sigma"]["value"], torch.tensor(1.2))
    torch.testing.assert_close(nodes["y"]["fn"].scale, told.expand(2))
    for wrong in ({"least": -1.0}, {"scale": 0.5, "least": 0.1}):
        with pytest.raises(ValueError, match="least is a share"):
            Gaussian(**wrong)


def test_a_predicted_scale_has_a_floor():
    raw = torch.tensor([[0.0, -200.0]])
    fn = stated(Gaussian("predicted"), raw, unit=10.0)["y"]["fn"]
    assert float(fn.scale) == pytest.approx(1e-5)


def test_a_unit_of_each_target_gives_each_a_noise():
    unit = torch.tensor([1.0, 100.0])
    nodes = stated(Gaussian(), torch.zeros(5, 2), unit=unit)
    assert nodes["sigma"]["value"].shape == (2,)
    torch.testing.assert_close(nodes["y"]["fn"].base_dist.scale[3], nodes["sigma"]["value"])
    outputs = torch.tensor([[1.0, 0.0, 7.0, 0.0]])  # mean and scale of the first, of the second
    predicted = stated(Gaussian("predicted"), outputs, unit=unit)
    torch.testing.assert_close(predicted["f"]["value"], torch.tensor([[1.0, 7.0]]))
    scale = predicted["y"]["fn"].base_dist.scale[0]
    torch.testing.assert_close(scale, (math.log(2) + 1e-6) * unit)


def test_student_t_scale_is_a_standard_deviation():
    fn = stated(StudentT(df=4.0, scale=0.5), torch.zeros(3, 1))["y"]["fn"]
    torch.testing.assert_close(fn.variance, torch.full((3,), 0.25))
    sigma = torch.tensor(2.0)
    fn = stated(StudentT(df=5.0), torch.zeros(3, 1), sigma=sigma)["y"]["fn"]
    torch.testing.assert_close(fn.variance, torch.full((3,), 4.0))


def test_poisson_rate_is_exp_f_and_cannot_overflow():
    fn = stated(Poisson(), torch.tensor([[1.5], [-1e4], [1e4]]))["y"]["fn"]
    assert float(fn.rate[0]) == pytest.approx(math.exp(1.5))
    assert torch.isfinite(fn.log_prob(torch.tensor([3.0, 3.0, 3.0]))).all()


def test_negative_binomial_is_nb2():
    f, dispersion = torch.full((200_000, 1), 1.2), torch.tensor(0.5)
    nodes = stated(NegativeBinomial(), f, dispersion=dispersion)
    y, mean = nodes["y"]["value"], math.exp(1.2)
    variance = mean + 0.5 * mean**2
    torch.testing.assert_close(nodes["y"]["fn"].mean[0], torch.tensor(mean))
    torch.testing.assert_close(nodes["y"]["fn"].variance[0], torch.tensor(variance))
    assert float(y.mean()) == pytest.approx(mean, abs=4 * math.sqrt(variance / len(y)))
    expected = stats.nbinom.logpmf(3, n=2.0, p=1 / (1 + 0.5 * mean))
    at = stated(NegativeBinomial(), f[:1], y=torch.tensor([3.0]), dispersion=dispersion)
    assert float(at["y"]["fn"].log_prob(torch.tensor(3.0))) == pytest.approx(expected, rel=1e-5)


def test_negative_binomial_without_dispersion_is_poisson():
    f = torch.full((1, 1), 1.2)
    fn = stated(NegativeBinomial(), f, dispersion=torch.tensor(0.0))["y"]["fn"]
    expected = stats.poisson.logpmf(3, math.exp(1.2))
    assert float(fn.log_prob(torch.tensor(3.0))) == pytest.approx(expected, abs=5e-3)


def test_ordinal_is_the_cumulative_logit():
    cutpoints, f = torch.tensor([-1.0, 0.2, 2.5]), torch.tensor([[-0.7], [0.0], [3.0]])
    probs = stated(Ordinal(4), f, cutpoints=cutpoints)["y"]["fn"].probs
    torch.testing.assert_close(probs.sum(-1), torch.ones(3))
    torch.testing.assert_close(probs.cumsum(-1)[:, :3], torch.sigmoid(cutpoints - f))


def test_ordinal_does_not_cancel_in_the_tails():
    cutpoints = torch.tensor([-1.0, 0.0, 1.0])
    fn = stated(Ordinal(4), torch.tensor([[60.0]]), cutpoints=cutpoints)["y"]["fn"]
    # log(sigmoid(0 - 60) - sigmoid(-1 - 60)) = -60 + log(1 - 1/e), up to exp(-60).
    assert float(fn.logits[0, 1]) == pytest.approx(-60 + math.log(1 - math.exp(-1)), rel=1e-5)


def test_ordinal_cutpoints_rise_and_centre_on_equal_classes():
    node = stated(Ordinal(5), torch.zeros(1, 1))["cutpoints"]
    assert (node["value"].diff() > 0).all()
    median = node["fn"].transforms[0](node["fn"].base_dist.mean)
    torch.testing.assert_close(torch.sigmoid(median), torch.arange(1, 5) / 5)


@pytest.mark.parametrize(
    ("likelihood", "shape", "unit", "message"),
    [
        (Gaussian("predicted"), (4, 3), 1.0, "takes 2 outputs a target"),
        (Categorical(3), (4,), 1.0, "takes 3 outputs"),
        (Gaussian(), (4, 2, 2), 1.0, r"shape \(4, 2, 2\)"),
        (Gaussian(), (4, 2), torch.ones(3), "unit has 3 entries and the net has 2 targets"),
    ],
)
def test_outputs_that_do_not_fit_are_refused(likelihood, shape, unit, message):
    with pytest.raises(ValueError, match=message):
        stated(likelihood, torch.zeros(shape), unit=unit)


def test_a_net_that_drops_its_last_axis_is_read():
    assert stated(Gaussian(), torch.zeros(4))["y"]["value"].shape == (4,)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Gaussian("fixed"),
        lambda: Gaussian(0.0),
        lambda: StudentT(df=-1.0),
        lambda: StudentT(scale=math.nan),
        lambda: Categorical(1),
        lambda: Ordinal(2.5),
    ],
)
def test_settings_out_of_range_are_refused(build):
    with pytest.raises(ValueError, match="pass a"):
        build()


def test_all_likelihoods_are_exported():
    assert {type(k).__name__ for k in ALL} | {"Likelihood"} == set(likelihoods.__all__)
