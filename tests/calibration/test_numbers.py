"""Coverage, PIT and CRPS where they are known exactly, and their power to tell a wrong width."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

import bnn
from bnn.calibration import (
    crps,
    interval_coverage,
    loo_pit,
    numbers,
    pit,
    pit_coverage,
    sharpness,
)

EVENLY = torch.linspace(0, 1, 101).reshape(1, 101, 1)  # the central 90 % is [.05, .95]


@pytest.mark.parametrize(
    ("y", "inside"), [(0.5, 1.0), (0.06, 1.0), (0.94, 1.0), (0.04, 0.0), (0.96, 0.0), (9.0, 0.0)]
)
def test_one_observation_is_inside_or_outside(y, inside):
    assert interval_coverage(EVENLY, torch.tensor([y]), 0.9) == inside


def test_the_ends_belong_to_the_interval():
    draws = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]).reshape(1, 5, 1)  # central half: [1, 3]
    y = torch.tensor([1.0])
    assert interval_coverage(draws, y, 0.5) == 1
    assert interval_coverage(draws, y - 0.01, 0.5) == 0


def test_several_levels_come_in_their_order_and_shape():
    levels = torch.tensor([0.9, 0.1, 0.5])
    draws = EVENLY.expand(1, 101, 4)
    y = torch.tensor([0.5, 0.3, 0.1, 0.01])
    assert interval_coverage(draws, y, levels).tolist() == [0.75, 0.25, 0.5]
    assert interval_coverage(draws, y, levels[None]).shape == (1, 3)
    assert interval_coverage(draws, y, 0.5).shape == ()


def test_chains_are_pooled():
    y = torch.tensor([0.5])
    assert interval_coverage(EVENLY.reshape(101, 1, 1), y, 0.9) == 1
    apart = torch.stack([torch.zeros(50, 1), torch.ones(50, 1)])
    assert interval_coverage(apart, y, 0.9) == 1


def test_every_axis_of_an_observation_counts():
    y = torch.tensor([[0.5, 2.0], [0.5, 0.5]])
    assert interval_coverage(EVENLY[..., None].expand(1, 101, 2, 2), y, 0.9) == 0.75


def test_it_tells_a_wrong_width():
    """Draws of half the width: the 90 % interval holds 59 %, 20 binomial errors off."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(400, generator=generator)
    draws = torch.randn(2, 500, 400, generator=generator)
    error = math.sqrt(0.9 * 0.1 / 400)
    assert abs(interval_coverage(draws, y, 0.9) - 0.9) < 4 * error
    assert interval_coverage(0.5 * draws, y, 0.9) < 0.9 - 15 * error
    assert interval_coverage(2.0 * draws, y, 0.9) > 0.9 + 4 * error


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_coverage_of_a_gaussian_is_the_closed_form(scale):
    """y ~ N(0, 1) and draws of N(0, scale^2): 2 Phi(scale z) - 1 at every level."""
    evenly = stats.norm.ppf((np.arange(2_000) + 0.5) / 2_000)
    levels = np.linspace(0.05, 0.95, 19)
    found = interval_coverage(scale * np.repeat(evenly[:, None], 2_000, 1), evenly, levels)
    exact = 2 * stats.norm.cdf(scale * stats.norm.ppf((1 + levels) / 2)) - 1
    assert found.numpy() == pytest.approx(exact, abs=2 / 2_000)


@pytest.mark.parametrize("rate", [0.3, 1.5, 5.0])
def test_coverage_by_pit_is_that_of_counts_too(rate):
    """Draws of the law itself, 3,000 rows; intervals of whole numbers hold more than they say."""
    generator = torch.Generator().manual_seed(1)
    rates = torch.full((300, 3_000), rate)
    draws, y = torch.poisson(rates, generator), torch.poisson(rates[0], generator)
    levels = torch.linspace(0.05, 0.95, 19)
    found, held = pit_coverage(draws, y, levels), interval_coverage(draws, y, levels)
    # 4 binomial errors of 3,000 rows; 300 draws move a PIT value by less than that
    assert ((found - levels).abs() < 4 * (levels * (1 - levels) / 3_000).sqrt()).all()
    assert (held - levels).abs().mean() > 0.1
    assert pit_coverage(draws, y, 0.5).shape == ()
    assert (pit_coverage(draws, y + 3, 0.9) < 0.7).all()


def test_coverage_by_pit_of_numbers_is_that_of_intervals():
    draws, y = draws_of((400, 500)), draws_of(500, 1)
    levels = torch.linspace(0.05, 0.95, 19)
    found, held = pit_coverage(draws, y, levels), interval_coverage(draws, y, levels)
    assert (found - held).abs().max() < 0.02  # ends between the same two draws, of 400


def test_rows_are_taken_in_blocks(monkeypatch):
    y, draws = torch.rand(50), torch.rand(2, 30, 50)
    whole = interval_coverage(draws, y, [0.3, 0.8])
    monkeypatch.setattr(numbers, "_CELLS", 7 * 60)
    assert torch.equal(interval_coverage(draws, y, [0.3, 0.8]), whole)


@pytest.mark.parametrize("shape", [(2,), (1, 1), ()], ids=str)
def test_other_rows_are_refused(shape):
    with pytest.raises(bnn.DataError, match="the rows must be the same"):
        interval_coverage(EVENLY, torch.zeros(shape), 0.9)


@pytest.mark.parametrize("level", [0.0, 1.0, -0.1, 90, [0.5, 1.5], math.nan])
def test_a_level_is_a_probability(level):
    with pytest.raises(bnn.DataError, match="level"):
        interval_coverage(EVENLY, torch.tensor([0.5]), level)


def test_no_rows_have_no_coverage():
    with pytest.raises(bnn.DataError, match="no rows"):
        interval_coverage(torch.zeros(1, 5, 0), torch.zeros(0), 0.9)
    with pytest.raises(bnn.DataError, match=r"y has shape .* no rows"):
        interval_coverage(EVENLY, torch.zeros(0), 0.9)


def draws_of(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


FUNCTIONS = {
    "interval_coverage": lambda d, y: interval_coverage(d, y, 0.9),
    "pit": pit,
    "loo_pit": lambda d, y: loo_pit(d, y, np.zeros(np.shape(d)[: np.ndim(d) - np.ndim(y) + 1])),
    "crps": crps,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_numpy_lists_and_one_draw_axis_give_the_same(name):
    function, draws, y = FUNCTIONS[name], draws_of((2, 10, 4)), draws_of(4, 1)
    expected = function(draws, y)
    for other in (draws.flatten(0, 1), draws.numpy(), draws.double().tolist()):
        assert torch.allclose(function(other, y.tolist()), expected, atol=1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nan_is_refused_by_name(name):
    draws, y = draws_of((1, 10, 4)), draws_of(4)
    broken = torch.tensor([0.0, math.nan, 1.0, 2.0])
    with pytest.raises(bnn.DataError, match="y has 1 NaN among 4"):
        FUNCTIONS[name](draws, broken)
    with pytest.raises(bnn.DataError, match="y_draws has 10 NaN"):
        FUNCTIONS[name](draws + broken, y)
    with pytest.raises(bnn.DataError, match="y_draws has infinite"):
        FUNCTIONS[name](draws / 0, y)
    with pytest.raises(bnn.DataError, match="y holds <U1"):
        FUNCTIONS[name](draws, list("abcd"))


def test_a_gaussian_is_as_wide_as_its_quantiles_say():
    width = 2 * 3.0 * stats.norm.ppf(0.95)
    draws = 3 * draws_of((4, 5000, 2))
    assert sharpness(draws, 0.9).item() == pytest.approx(width, rel=0.02)  # 2 % is 3 MC errors
    assert sharpness(draws, [0.5, 0.9]).shape == (2,)
    assert sharpness(EVENLY, 0.9).item() == pytest.approx(0.9)
    assert sharpness(EVENLY[0], 0.9).item() == pytest.approx(0.9)


def test_pit_is_the_share_of_draws_below():
    assert pit(EVENLY, [0.305]).item() == pytest.approx(31 / 101)
    assert pit(EVENLY, [-1.0]) == 0
    assert pit(EVENLY, [2.0]) == 1
    grid = torch.linspace(-2, 2, 9)
    exact = torch.from_numpy(stats.norm.cdf(grid.numpy())).float()
    assert (pit(draws_of((40000, 1)).expand(-1, 9), grid) - exact).abs().max() < 4 * 0.5 / 200


def test_pit_of_a_tie_is_drawn_among_the_tied():
    draws = torch.tensor([0.0, 1.0, 1.0, 2.0])[:, None].expand(4, 2000)
    places = pit(draws, torch.ones(2000))
    assert stats.kstest(places.numpy(), stats.uniform(0.25, 0.5).cdf).pvalue > 1e-3
    assert torch.equal(places, pit(draws, torch.ones(2000)))
    assert not torch.equal(places, pit(draws, torch.ones(2000), seed=1))


def test_pit_of_counts_is_uniform_only_where_randomised():
    generator = torch.Generator().manual_seed(0)
    rate = torch.full((1500,), 1.5)
    y = torch.poisson(rate, generator=generator)
    draws = torch.poisson(rate.expand(1000, -1), generator=generator)
    assert stats.kstest(pit(draws, y).numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest((draws <= y).double().mean(0).numpy(), "uniform").pvalue < 1e-20
    assert stats.kstest(pit(draws + 1, y).numpy(), "uniform").pvalue < 1e-20


def test_weights_count_in_the_leave_one_out_pit():
    draws, weights = [[0.0], [1.0], [2.0]], torch.tensor([[0.2], [0.3], [0.5]]).double()
    assert loo_pit(draws, [1.5], weights.log()).item() == pytest.approx(0.5)
    assert loo_pit(draws, [1.5], weights.log() - 700).item() == pytest.approx(0.5)
    assert loo_pit(draws, [0.5], weights.log()).item() == pytest.approx(0.2)
    two = torch.tensor(draws)[..., None].expand(3, 1, 2)
    assert torch.allclose(loo_pit(two, [[0.5, 1.5]], weights.log()), torch.tensor([[0.2, 0.5]]))


def test_leave_one_out_pit_is_that_of_the_posterior_without_the_row():
    """y ~ N(w, 1), w ~ N(0, 1), 8 rows: without row i, y_i ~ N(sum of others / 8, 1 + 1/8)."""
    y = draws_of(8, 3).double() + 0.5
    generator = torch.Generator().manual_seed(0)
    w = y.sum() / 9 + torch.randn(200_000, 1, generator=generator).double() / 3
    replicas = w + torch.randn(200_000, 8, generator=generator).double()
    exact = stats.norm((y.sum() - y) / 8, (1 + 1 / 8) ** 0.5).cdf(y)
    found = loo_pit(replicas, y, 0.5 * (y - w).square())
    assert np.abs(found.numpy() - exact).max() < 0.006  # sd .0011, and weights that vary
    assert np.abs(pit(replicas, y).numpy() - exact).max() > 0.02


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        (torch.zeros(10, 3), r"log_weights has \(draw, row\) = \(10, 3\)"),
        (torch.zeros(9, 4), r"the draws and the rows must be the same"),
        (torch.zeros(10), "log_weights has shape"),
        (torch.full((10, 4), -math.inf), "all zero"),
        (torch.full((10, 4), math.nan), "log_weights has 40 NaN"),
    ],
)
def test_other_weights_are_refused(weights, match):
    with pytest.raises(bnn.DataError, match=match):
        loo_pit(draws_of((1, 10, 4)), draws_of(4), weights)


def gaussian_crps(y, scale=1.0):
    """Gneiting and Raftery (2007), eq. 21."""
    z = y / scale
    density, below = stats.norm.pdf(z), stats.norm.cdf(z)
    return scale * (z * (2 * below - 1) + 2 * density - 1 / math.sqrt(math.pi))


def test_crps_of_a_gaussian_is_the_closed_form():
    y = np.array([-3.0, -0.5, 0.0, 1.0, 4.0])
    evenly = 2 * stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    draws = np.repeat(evenly[:, None], 5, 1)
    for unbiased in (True, False):
        found = crps(draws, y, unbiased=unbiased).numpy()
        assert found == pytest.approx(gaussian_crps(y, 2.0), abs=1e-3)


def test_crps_is_the_sum_over_all_pairs():
    draws, y = draws_of((2, 8, 3, 2)).double(), draws_of((3, 2), 1).double()
    flat = draws.flatten(0, 1)
    pairs = (flat[:, None] - flat).abs().sum((0, 1)) / 2
    away = (flat - y).abs().mean(0)
    assert torch.allclose(crps(draws, y), (away - pairs / (16 * 15)).float(), atol=1e-6)
    plug_in = crps(draws, y, unbiased=False)
    assert torch.allclose(plug_in, (away - pairs / 16**2).float(), atol=1e-6)
    far = crps(flat + 1e6, y + 1e6)  # no cancellation
    assert torch.allclose(far, (away - pairs / (16 * 15)).float(), atol=1e-5)


def test_crps_of_two_draws_is_right_on_average_only_where_unbiased():
    draws, y = draws_of((2, 40_000), 5), torch.full((40_000,), 0.7)
    exact = gaussian_crps(0.7)
    each = crps(draws, y).double()
    assert abs(each.mean() - exact) < 4 * each.std() / 200
    assert crps(draws, y, unbiased=False).mean() > exact + 20 * each.std() / 200


def test_crps_of_a_point_is_the_absolute_error():
    assert crps([[3.0, 3.0]], [1.0, 4.0], unbiased=False).tolist() == [2, 1]
    with pytest.raises(bnn.DataError, match="unbiased=False"):
        crps([[3.0, 3.0]], [1.0, 4.0])


def test_crps_agrees_with_other_packages():
    draws, y = draws_of((50, 30)).double(), draws_of(30, 1).double()
    scores = pytest.importorskip("properscoring")
    found = crps(draws, y, unbiased=False).numpy()
    assert found == pytest.approx(scores.crps_ensemble(y.numpy(), draws.T.numpy()), abs=1e-6)


def test_blocks_do_not_change_pit_and_crps(monkeypatch):
    draws, y = draws_of((2, 30, 50)).round(decimals=1), draws_of(50, 1).round(decimals=1)
    whole = pit(draws, y), crps(draws, y), loo_pit(draws, y, draws)
    monkeypatch.setattr(numbers, "_CELLS", 7 * 60)
    again = pit(draws, y), crps(draws, y), loo_pit(draws, y, draws)
    for a, b in zip(whole, again, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
