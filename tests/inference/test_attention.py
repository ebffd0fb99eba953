"""The laws of attention weights against what is known of them in closed form."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
import torch.distributions as td
from scipy import special
from scipy.stats import kstest

from bnn.inference._attention import Rule
from bnn.inference._attention_laws import FLOOR, LAWS, weibull_gamma

NAMES = sorted(LAWS)


def _law(name, scores, sharpness=5.0, prior=1.0):
    return LAWS[name](scores, torch.tensor(sharpness), torch.tensor(prior))


def _scores_of(concentration):
    """Scores at which a Dirichlet of sharpness sum(concentration) has these concentrations."""
    return (concentration - FLOOR).log(), float((concentration - FLOOR).sum())


def test_kl_of_dirichlets():
    """KL(Dirichlet(2, 3, 5) || Dirichlet(1, 1, 1)), as torch and a sum by hand have it."""
    torch.set_default_dtype(torch.float64)
    try:
        scores, total = _scores_of(torch.tensor([[2.0, 3.0, 5.0]]))
        law = _law("dirichlet", scores, total)
        torch.testing.assert_close(law.concentration, torch.tensor([[2.0, 3.0, 5.0]]))
        assert float(law.kl()) == pytest.approx(0.768034844, abs=1e-6)
        other = torch.tensor([0.4, 2.0, 7.0])
        law = LAWS["dirichlet"](scores, torch.tensor(total), other)
        expected = td.kl_divergence(dist.Dirichlet(law.concentration), dist.Dirichlet(other))
        torch.testing.assert_close(law.kl(), expected)
        torch.testing.assert_close(law.log_prob(torch.zeros(1, 3)), -expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_slopes_of_the_kl_are_those_of_torch():
    """In a and in b, against torch's Dirichlets."""
    torch.manual_seed(0)
    scores = torch.randn(4, 3, dtype=torch.float64).requires_grad_()
    b = (torch.rand(4, 3, dtype=torch.float64) + 0.2).requires_grad_()
    law = LAWS["dirichlet"](scores, torch.tensor(4.0, dtype=torch.float64), b)
    known = td.kl_divergence(dist.Dirichlet(law.concentration), dist.Dirichlet(b)).sum()
    expected = torch.autograd.grad(known, [scores, b], retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(law.kl().sum(), [scores, b]), expected)


def test_kl_of_a_weibull_and_a_gamma():
    """At k = 2, scale = 1.5, a = 1.2, rate = 1: a quadrature has .219669083."""
    k, scale, a, rate = (torch.tensor(v, dtype=torch.float64) for v in (2.0, 1.5, 1.2, 1.0))
    assert float(weibull_gamma(k, scale.log(), a, rate)) == pytest.approx(0.219669083, abs=1e-6)


@pytest.mark.parametrize("name", ["weibull", "lognormal"])
def test_kl_is_the_mean_of_log_ratios(name):
    """Of S: the densities are torch's, the draws the law's own. 3 standard errors of 200,000."""
    torch.manual_seed(0)
    scores, b = torch.tensor([[0.3, -1.0, 0.5]]), torch.tensor([0.7, 1.5, 3.0])
    law = LAWS[name](scores, torch.tensor(1.7), b)
    drawn = LAWS[name](scores.expand(200_000, 3), torch.tensor(1.7), b)
    log_s, pi = drawn._log_s(None), scores.softmax(-1)
    if name == "weibull":
        q = dist.Weibull(pi / math.gamma(1 + 1 / 1.7), torch.tensor(1.7))
        p = dist.Gamma(b, b.sum())
    else:
        q = dist.LogNormal(pi.log() - 0.5 / 1.7**2, 1 / 1.7)
        p = dist.LogNormal(torch.digamma(b) - b.sum().log(), torch.polygamma(1, b).sqrt())
    ratio = (q.log_prob(log_s.exp()) - p.log_prob(log_s.exp())).sum(-1)
    error = float(ratio.std()) / len(ratio) ** 0.5
    assert float(law.kl()) == pytest.approx(float(ratio.mean()), abs=3 * error)


@pytest.mark.parametrize("name", ["weibull", "lognormal"])
def test_unnormalised_weights_have_the_mean_of_the_softmax(name):
    torch.manual_seed(0)
    scores = torch.tensor([0.3, -1.0, 0.5])
    s = _law(name, scores.expand(200_000, 3), 2.0)._log_s(None).exp()
    error = s.std(0) / len(s) ** 0.5
    assert ((s.mean(0) - scores.softmax(-1)).abs() < 3 * error).all()
    torch.testing.assert_close(_law(name, scores[None]).mean[0], scores.softmax(-1))


def test_draws_and_their_slope_are_those_of_a_dirichlet():
    """dE[a_i] / dalpha_j = (1(i = j) alpha_0 - alpha_i) / alpha_0^2, within 3 standard errors."""
    torch.manual_seed(0)
    count, alpha = 200_000, torch.tensor([2.0, 3.0, 0.5])
    scores, total = _scores_of(alpha)
    law = _law("dirichlet", scores.expand(count, 3), total)
    law.concentration = law.concentration.detach().requires_grad_()
    a = law.rsample()
    exact = dist.Dirichlet(alpha)
    error = exact.variance.sqrt() / count**0.5
    assert ((a.mean(0) - exact.mean).abs() < 3 * error).all()
    assert torch.allclose(a.var(0), exact.variance, rtol=0.02)
    for i in range(3):
        (each,) = torch.autograd.grad(a[:, i].sum(), law.concentration, retain_graph=True)
        known = (float(alpha.sum()) * torch.eye(3)[i] - alpha[i]) / alpha.sum() ** 2
        error = each.std(0) / count**0.5
        assert ((each.mean(0) - known).abs() < 3 * error).all()


def _beta(log_x, a, b):
    """Beta(a, b)'s distribution function, also where x is too small for a float."""
    p = special.betainc(a, b, np.exp(log_x))
    tiny = log_x < -30  # there p = x^a / (a B(a, b))
    p[tiny] = np.exp(a * log_x[tiny] - np.log(a) - special.betaln(a, b))
    return p


@pytest.mark.parametrize(
    "alpha",
    [[0.01] * 2, [0.01] * 64, [0.01, 1_000.0], [0.02, 0.3, 5.0], [1_000.0] * 3, [0.5] * 1_000],
    ids=["little", "many little", "far apart", "mixed", "sharp", "many"],
)
def test_marginals_are_betas(alpha):
    """Of the first weight, by Kolmogorov and Smirnov's distance at p = .001."""
    torch.manual_seed(0)
    alpha = torch.tensor(alpha)
    count = 2_000_000 // max(len(alpha), 40)
    law = _law("dirichlet", torch.zeros(count, len(alpha)))
    law.concentration = alpha.expand(count, -1)
    log_s = law._log_s(None).double()
    log_a = log_s[:, 0] - log_s.logsumexp(-1)
    log_rest = log_s[:, 1:].logsumexp(-1) - log_s.logsumexp(-1)
    a, b = float(alpha[0]), float(alpha[1:].double().sum())
    p = np.where(log_a < log_rest, _beta(log_a.numpy(), a, b), 1 - _beta(log_rest.numpy(), b, a))
    assert kstest(p, "uniform").statistic * count**0.5 < 1.95


@pytest.mark.parametrize("alpha", [1e-3, 1e-2])
def test_tiny_concentrations_do_not_underflow(alpha):
    """torch.distributions.Dirichlet gives 6 % uniform vectors at 1e-3, where draws are one-hot."""
    torch.manual_seed(0)
    law = _law("dirichlet", torch.zeros(20_000, 4))
    law.concentration = torch.full((20_000, 4), alpha)
    a = law.rsample()
    assert torch.isfinite(a).all()
    assert not (a == 0.25).all(-1).any()
    ratio = a.var(0) / dist.Dirichlet(torch.full((4,), alpha)).variance
    assert (ratio - 1).abs().max() < 0.04  # 3 standard errors of a variance of 0s and 1s


@pytest.mark.parametrize("name", NAMES)
def test_hidden_keys_have_no_part(name):
    """Exactly 0; what is drawn and the KL are those without them; a blind query gives zeros."""
    scores = torch.randn(5, 2, 3, 4)
    wide = torch.cat([scores, torch.full((5, 2, 3, 2), -math.inf)], -1)
    blind = wide.clone()
    blind[:, :, 0] = -math.inf
    law = _law(name, wide)
    torch.testing.assert_close(law.kl(), _law(name, scores).kl())
    torch.testing.assert_close(law.mean[..., :4], _law(name, scores).mean)
    a = law.rsample()
    assert (a[..., 4:] == 0).all()
    assert (law.mean[..., 4:] == 0).all()
    torch.testing.assert_close(a.sum(-1), torch.ones(5, 2, 3))
    a, kl = _law(name, blind).rsample(), _law(name, blind).kl()
    assert (a[:, :, 0] == 0).all()
    assert (kl[:, :, 0] == 0).all()
    assert (kl[:, :, 1:] != 0).all()
    assert torch.isfinite(kl).all()


@pytest.mark.parametrize("name", ["dirichlet", "weibull", "lognormal"])
def test_sharp_attention_is_the_softmax(name):
    torch.manual_seed(0)
    scores = torch.randn(50, 2, 6, 6)
    a = _law(name, scores, 1e4).rsample()
    assert (a - scores.softmax(-1)).abs().max() < 0.03  # 3 standard deviations, of 1/2 at most
    assert (a - scores.softmax(-1)).square().mean() < 1e-4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("blind", [False, True])
def test_slopes_are_finite_at_extreme_scores(name, blind):
    torch.manual_seed(0)
    scores = torch.tensor([[50.0, -50.0, 0.0, -math.inf]]).expand(1_000, 4).clone()
    if blind:
        scores[:10] = -math.inf
    scores.requires_grad_()
    sharpness, prior = torch.tensor(3.0).requires_grad_(), torch.tensor(0.5).requires_grad_()
    law = LAWS[name](scores, sharpness, prior)
    value = law.log_prob(None).sum() + (law.rsample() * torch.tensor([1.0, 2.0, -1.0, 5.0])).sum()
    found = torch.autograd.grad(value, [scores, sharpness, prior], allow_unused=True)
    assert torch.isfinite(value)
    assert all(torch.isfinite(each).all() for each in found if each is not None)
    assert (found[0][:, 3] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_query_of_one_key_has_nothing_to_tell(name):
    scores = torch.tensor([[3.0, -math.inf, -math.inf], [0.3, 1.0, -math.inf]])
    law = _law(name, scores)
    assert float(law.kl()[0]) == 0 < float(law.kl()[1])
    torch.testing.assert_close(law.rsample()[0], torch.tensor([1.0, 0.0, 0.0]))


@pytest.mark.parametrize(("log", "held", "way"), [(-4, 0.1, 1), (0, 1.0, 1), (12, 1e4, -1)])
def test_a_sharpness_beyond_its_range_finds_back(log, held, way):
    rule, leaf = (
        Rule("weibull", None, "uniform", 10.0),
        torch.tensor([[float(log)]]).requires_grad_(),
    )
    law = rule({"attention.0.log_sharpness": leaf}, "attention.0", torch.randn(5, 3, 4), None, None)
    assert law.sharpness.item() == pytest.approx(held)
    (slope,) = torch.autograd.grad(law.log_prob(None).sum(), leaf)
    assert slope.sign().item() == way


@pytest.mark.parametrize("name", NAMES)
def test_lanes_of_vmap_draw_apart(name):
    torch.manual_seed(0)
    scores = torch.randn(5, 3)
    one = lambda s, _: _law(name, s).rsample()
    shared = torch.func.vmap(one, (None, 0), randomness="different")(scores, torch.arange(4))
    assert not torch.equal(shared[0], shared[1])

    lanes = scores.expand(4, 5, 3).clone().requires_grad_()
    a = torch.func.vmap(one, randomness="different")(lanes, torch.arange(4))
    (slope,) = torch.autograd.grad(a.square().sum(), lanes)
    assert torch.isfinite(slope).all()
    assert not torch.equal(slope[0], slope[1])
