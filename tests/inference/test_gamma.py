"""Gamma draws without a refusal, and gamma functions without torch's, against SciPy's."""

import numpy as np
import pytest
import torch
from scipy import special
from scipy.stats import kstest

from bnn.inference import _gamma
from bnn.inference._gamma import digamma, lgamma, log_draw, log_uniform, trigamma

NONE = torch.zeros(())  # the log of a uniform, 1, that changes nothing


def _quantile(x, a):
    """Log of the Gamma(a, 1) quantile at the place of N(0, 1) where x is."""
    below, above = special.ndtr(x), special.ndtr(-x)
    by_tail = special.gammaincinv(a, below), special.gammainccinv(a, above)
    return np.where(x < 0, *map(np.log, by_tail))


def _draws(a, count, seed=0):
    torch.manual_seed(seed)
    a = torch.full((count,), a).requires_grad_()
    log_g = log_draw(a, torch.randn(count), log_uniform((count,)), log_uniform((count,)))
    (slope,) = torch.autograd.grad(log_g.sum(), a)
    return log_g.detach().double().numpy(), slope.double().numpy()


@pytest.mark.parametrize(
    ("ours", "known"),
    [
        (lgamma, special.gammaln),
        (digamma, special.digamma),
        (trigamma, lambda x: special.polygamma(1, x)),
    ],
)
def test_functions_are_scipys(ours, known):
    x = torch.logspace(-3, 5, 2_000, dtype=torch.float64)
    expected = torch.tensor(known(x.numpy()))
    assert ((ours(x) - expected).abs() / expected.abs().clamp(min=1)).max() < 2e-9
    rounded = ours(x.float()).double()
    assert ((rounded - expected).abs() / expected.abs().clamp(min=1)).max() < 2e-6


def test_the_slope_of_lgamma_is_digamma():
    x = torch.logspace(-3, 5, 50, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(lgamma(x).sum(), x)
    assert torch.equal(slope, digamma(x.detach()))


def test_draws_are_quantiles_of_their_noise():
    """Within 1e-6 of log g, 4e-6 beyond 4 standard deviations; the slope within 3e-5, 1e-4 at 5.

    Between two uniforms of 1 they are draws of Gamma(a + 2).
    """
    a = torch.cat([torch.zeros(1), torch.logspace(-3, 3, 40)]).double()[:, None] + 1e-9
    x = torch.linspace(-6, 6, 241, dtype=torch.float64)
    far, grid = (a + 2).numpy(), x.numpy()
    a = a.expand(-1, len(x)).clone().requires_grad_()
    log_g = log_draw(a, x, NONE, NONE)
    (slope,) = torch.autograd.grad(log_g.sum(), a)
    off = np.abs(log_g.detach().numpy() - _quantile(grid, far))
    assert off[:, np.abs(grid) < 4].max() < 1e-6
    assert off.max() < 4e-6
    step = 1e-4 * far
    known = (_quantile(grid, far + step) - _quantile(grid, far - step)) / (2 * step)
    ratio = np.abs(slope.numpy() / known - 1)[far[:, 0] < 100]  # beyond, the quotient is noise
    assert ratio[:, np.abs(grid) < 4].max() < 3e-5
    assert ratio[:, np.abs(grid) < 5].max() < 1e-4


def test_noise_beyond_the_fit_is_held():
    a = torch.tensor(0.3)
    assert log_draw(a, torch.tensor(40.0), NONE, NONE) == log_draw(a, torch.tensor(6.0), NONE, NONE)


@pytest.mark.parametrize("a", [0.01, 0.1, 1.0, 3.0, 30.0, 1e3, 1e4])
def test_draws_and_slopes_have_their_law(a):
    """Kolmogorov and Smirnov's distance at p = .001; moments within 3 standard errors of 400,000.

    E[log g] = digamma, Var[log g] = trigamma, and their slopes are E[d log g / da] = trigamma and
    E[2 (log g - digamma) d log g / da] = polygamma(2).
    """
    log_g, slope = _draws(a, 400_000)
    held = np.maximum(log_g, -600)
    p = np.where(log_g > -600, special.gammainc(a, np.exp(held)), 0)
    tiny = log_g < -30  # there p = g^a / Gamma(a + 1)
    p[tiny] = np.exp(a * log_g[tiny] - special.gammaln(a + 1))
    count = len(p)
    assert kstest(p, "uniform").statistic * count**0.5 < 1.95
    off = log_g - special.digamma(a)
    for found, expected in (
        (off, 0.0),
        (off**2, special.polygamma(1, a)),
        (slope, special.polygamma(1, a)),
        (2 * off * slope, special.polygamma(2, a)),
    ):
        assert abs(found.mean() - expected) < 3 * found.std() / count**0.5


def test_lanes_and_no_gradient_change_nothing():
    torch.manual_seed(0)
    a, x, u, v = torch.rand(5, 3) + 0.1, torch.randn(5, 3), -torch.rand(5, 3), -torch.rand(5, 3)
    slope = torch.func.grad(lambda *given: log_draw(*given).sum())
    plain = log_draw(a, x, u, v)
    with torch.no_grad():
        assert torch.equal(log_draw(a, x, u, v), plain)
        assert torch.equal(torch.func.vmap(log_draw)(a, x, u, v), plain)
        torch.testing.assert_close(torch.func.vmap(slope)(a, x, u, v), slope(a, x, u, v))
        assert (slope(a, x, u, v) > 0).all()  # draws grow with their concentration


@pytest.mark.parametrize(
    ("name", "planted"),
    [
        ("_SLOPE", [[0.5 * i * c for i, c in enumerate(row)] for row in _gamma._FIT]),
        ("_FIT", _gamma._FIT[:1]),
    ],
    ids=["half a slope", "leading order"],
)
def test_the_law_shows_what_is_wrong_with_it(monkeypatch, name, planted):
    monkeypatch.setattr(_gamma, name, planted)
    with pytest.raises(AssertionError):
        test_draws_and_slopes_have_their_law(3.0)
