"""Uniformity against enumeration, and its power against what it is there to see."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from bnn import DataError
from bnn.calibration import uniformity
from bnn.calibration.uniform import _chance, _counts


@pytest.mark.parametrize(("rows", "cells"), [(4, 4), (5, 3), (3, 6)])
@pytest.mark.parametrize("bound", [0.01, 0.2, 0.6])
def test_the_walk_has_the_chance_that_all_outcomes_have(rows, cells, bound):
    ends = _counts(rows, cells, bound)
    inside = 0
    for outcome in itertools.product(range(cells), repeat=rows):
        below = np.bincount(outcome, minlength=cells).cumsum()[:-1]
        inside += bool(((ends[0] <= below) & (below <= ends[1])).all())
    assert _chance(rows, ends) == pytest.approx(inside / cells**rows, abs=1e-12)


@pytest.mark.parametrize(("rows", "cells"), [(200, 20), (200, 100), (3_000, 50)])
def test_uniform_values_leave_the_band_as_often_as_it_says(rows, cells):
    rng, left = np.random.default_rng(0), 0
    test = uniformity(rng.random(rows), cells=cells)
    lower, upper = (each.double().numpy() - 1e-6 for each in (test.lower, test.upper))
    for _ in range(2_000):
        counts = np.bincount(rng.integers(cells, size=rows), minlength=cells)
        share = counts.cumsum()[:-1] / rows
        left += bool(((share < lower) | (share > upper + 2e-6)).any())
    assert left / 2_000 == pytest.approx(0.05, abs=3.5 * np.sqrt(0.05 * 0.95 / 2_000))


def test_p_values_are_uniform_and_agree_with_the_band():
    rng = np.random.default_rng(1)
    tests = [uniformity(rng.random(100), cells=20) for _ in range(1_000)]
    for name in ("ecdf_p", "chi_square_p"):
        p = np.array([getattr(test, name) for test in tests])
        for level in (0.05, 0.2, 0.5):  # discrete: at most the level, and not far below it
            assert level - 0.07 < (p <= level).mean() < level + 0.035, name
    for test in tests:
        inside = bool(((test.lower - 1e-6 <= test.share) & (test.share <= test.upper + 1e-6)).all())
        assert inside == (test.ecdf_p > 0.05), test.ecdf_p


def test_chi_square_is_that_of_ten_values_a_cell():
    values = torch.rand(200, generator=torch.Generator().manual_seed(0)) ** 1.2
    counts = np.histogram(values.numpy(), bins=20, range=(0, 1))[0]
    expected = stats.chisquare(counts).pvalue
    assert uniformity(values, cells=100).chi_square_p == pytest.approx(expected, rel=1e-6)
    assert uniformity(values, cells=20).chi_square_p == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "twist",
    [lambda u: u**1.5, lambda u: 0.5 + 0.6 * (u - 0.5), lambda u: stats.beta(0.4, 0.4).ppf(u)],
    ids=["shifted", "too wide", "too narrow"],
)
def test_what_is_not_uniform_is_seen(twist):
    values = twist(np.random.default_rng(2).random(200))
    test = uniformity(values, cells=20)
    assert test.ecdf_p < 1e-3
    assert test.chi_square_p < 1e-3


def test_200_ranks_show_what_they_are_said_to_show():
    """A posterior sd 30 % off, or a mean .4 sds off, nine times in ten at p < .01."""
    rng = np.random.default_rng(3)
    for width, shift in [(0.7, 0.0), (1.0, 0.4)]:
        seen = 0
        for _ in range(100):
            draws = shift + width * rng.normal(size=(19, 200))
            ranks = (draws < rng.normal(size=200)).sum(0)
            test = uniformity((ranks + 0.5) / 20, cells=20)
            seen += 2 * min(test.ecdf_p, test.chi_square_p) < 0.01
        assert seen > 80, (width, shift)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: uniformity([]), "there are no rows"),
        (lambda: uniformity([[0.1]]), r"\(1, 1\)"),
        (lambda: uniformity([0.5, 1.5]), r"0.5..1.5"),
        (lambda: uniformity([0.5, float("nan")]), "NaN"),
        (lambda: uniformity([0.5], cells=1), "at least 2"),
        (lambda: uniformity([0.5], level=1.0), "probability"),
    ],
)
def test_what_is_no_sample_is_refused(call, match):
    with pytest.raises(DataError, match=match):
        call()


def test_one_value_and_ends_of_the_range():
    assert uniformity([0.5]).ecdf_p > 0.9
    assert uniformity([0.0, 1.0], cells=4).share.tolist() == [0.5, 0.5, 0.5]
