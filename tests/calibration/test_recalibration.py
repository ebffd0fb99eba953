"""Recalibration against the best of a grid, scikit-learn, and predictions whose fault is known."""

import math
import pickle

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.isotonic import IsotonicRegression

import bnn
from bnn.calibration import (
    crps,
    ece,
    interval_coverage,
    isotonic,
    nll,
    pit,
    quantiles,
    sharpness,
    temperature,
)

GENERATOR = torch.Generator().manual_seed(0)
TRUE = 1.5 * torch.randn(4000, 3, generator=GENERATOR).double()  # logits that labels come from
LABELS = torch.multinomial(TRUE.softmax(-1), 1, generator=GENERATOR)[:, 0]
HALF = slice(0, 2000), slice(2000, 4000)


def test_temperature_is_the_best_of_a_grid_and_undoes_a_factor():
    fitted = temperature(2.5 * TRUE, LABELS)
    assert fitted.temperature == pytest.approx(2.5, rel=0.1)  # 3 % is its standard error
    grid = torch.linspace(1.5, 4, 501)
    scores = [nll((2.5 * TRUE / t).softmax(-1), LABELS) for t in grid]
    assert fitted.temperature == pytest.approx(grid[np.argmin(scores)].item(), abs=0.005)
    assert temperature(0.1 * TRUE, LABELS).temperature == pytest.approx(
        fitted.temperature / 25, rel=1e-6
    )
    shifted = temperature(2.5 * TRUE + torch.arange(4000.0)[:, None], LABELS)
    assert shifted.temperature == pytest.approx(fitted.temperature, rel=1e-6)


def test_a_class_that_cannot_be_is_as_good_as_left_out():
    some = TRUE[:400].clone()
    excluded = (LABELS[:400] + 1) % some.shape[1]
    far = some.scatter(1, excluded[:, None], -1e9)
    none = some.scatter(1, excluded[:, None], -math.inf)
    fitted = temperature(none, LABELS[:400])
    assert fitted.temperature == pytest.approx(temperature(far, LABELS[:400]).temperature, rel=1e-6)
    assert (fitted(none).gather(1, excluded[:, None]) == 0).all()


def test_temperature_makes_new_rows_calibrated():
    logits = 3 * TRUE
    fitted = temperature(logits[HALF[0]], LABELS[HALF[0]])
    before, after = logits.softmax(-1)[HALF[1]], fitted(logits[HALF[1]])
    assert ece(before, LABELS[HALF[1]]) > 0.1
    assert ece(after, LABELS[HALF[1]]) < 0.04
    assert torch.equal(before.argmax(-1), after.argmax(-1))
    assert after.dtype == logits.dtype
    assert pickle.loads(pickle.dumps(fitted)) == fitted
    assert eval(repr(fitted), vars(bnn.calibration)) == fitted


@pytest.mark.parametrize(
    ("logits", "labels", "match"),
    [
        ([[2.0, 0.0], [0.0, 1.0]], [0, 1], "largest logit"),
        ([[2.0, 0.0], [2.0, 1.0]], [1, 1], "no more of the held-out labels than chance"),
        ([[0.0, 0.0], [1.0, 1.0]], [0, 1], "largest logit"),
        ([[1.0, math.inf]], [0], "logits has infinite values"),
        ([[1.0, -math.inf], [1.0, 0.0]], [1, 0], "1 held-out labels are of a class .* -inf"),
        ([[-math.inf, -math.inf]], [0], "a row of -inf"),
        ([1.0, 2.0], [0, 1], r"logits has shape \(2,\)"),
        ([[1.0, 2.0]], [2], "no class"),
    ],
)
def test_labels_without_a_best_temperature_are_refused(logits, labels, match):
    with pytest.raises(bnn.DataError, match=match):
        temperature(logits, labels)


def test_isotonic_is_scikit_learns():
    probs = (2 * TRUE[:, :2]).softmax(-1).mul(50).round() / 50  # ties, too
    labels = (torch.rand(4000, generator=GENERATOR) < probs[:, 1].sqrt()).long()
    other = IsotonicRegression(out_of_bounds="clip").fit(probs[HALF[0], 1], labels[HALF[0]])
    fitted = isotonic(probs[HALF[0]], labels[HALF[0]])
    fresh = torch.rand(500, generator=GENERATOR).double()
    found = fitted(torch.stack([1 - fresh, fresh], -1))
    assert found[:, 1].numpy() == pytest.approx(other.predict(fresh), abs=1e-6)
    assert torch.allclose(found.sum(-1), torch.ones(500).double())


def test_isotonic_by_hand():
    """True at .1 and .3, not at .2 and .4: 1, 0 pool to .5, and 1, 0 again."""
    p = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]).double()
    fitted = isotonic(torch.stack([1 - p, p], -1), [0, 1, 0, 1, 1])
    assert fitted.observed[0].tolist() == [0, 0.5, 0.5, 1, 1]
    between = fitted([[0.85, 0.15], [0.99, 0.01], [0.0, 1.0]])[:, 1]
    assert between.tolist() == pytest.approx([0.25, 0, 1])


def test_isotonic_makes_new_rows_of_several_classes_calibrated():
    probs = (3 * TRUE).softmax(-1)
    fitted = isotonic(probs[HALF[0]], LABELS[HALF[0]])
    after = fitted(probs[HALF[1]].float())
    assert after.dtype == torch.float32
    before, after = (ece(p, LABELS[HALF[1]], classwise=True) for p in (probs[HALF[1]], after))
    assert before > 0.08
    assert after < 0.04
    lines = [IsotonicRegression(out_of_bounds="clip") for _ in range(3)]
    for k, line in enumerate(lines):
        line.fit(probs[HALF[0], k], LABELS[HALF[0]] == k)
    other = np.stack([line.predict(probs[HALF[1], k]) for k, line in enumerate(lines)], -1)
    other = other / other.sum(-1, keepdims=True)
    assert fitted(probs[HALF[1]]).numpy() == pytest.approx(other, abs=1e-6)


def test_rows_that_isotonic_gives_no_class_are_even():
    probs = torch.tensor([[0.6, 0.2, 0.2], [0.2, 0.6, 0.2], [0.2, 0.2, 0.6]])
    fitted = isotonic(probs, [0, 1, 2])
    assert fitted([[0.2, 0.2, 0.6]])[0].tolist() == [0, 0, 1]
    some = torch.tensor([[0.3, 0.3, 0.4]])
    assert fitted(some).sum().item() == pytest.approx(1)
    with pytest.raises(bnn.DataError, match="2 classes and the map was fitted to 3"):
        fitted([[0.5, 0.5]])


def numbers(rows=1500, scale=2.0, shift=0.5, draws=400, seed=0):
    """y ~ N(m, 1) with draws of N(m + shift, scale^2)."""
    generator = torch.Generator().manual_seed(seed)
    m = 5 * torch.randn(rows, generator=generator)
    y = m + torch.randn(rows, generator=generator)
    noise = torch.randn(2, draws // 2, rows, generator=generator)
    return m + shift + scale * noise, y, m


def test_quantiles_make_new_rows_calibrated():
    fitted = quantiles(*numbers()[:2])
    draws, y, m = numbers(seed=1)
    moved = fitted(draws)
    assert moved.shape == draws.shape
    levels = torch.tensor([0.5, 0.8, 0.9])
    error = 4 * (levels * (1 - levels) * 2 / 1500).sqrt()  # of the map, and of the test
    assert ((interval_coverage(moved, y, levels) - levels).abs() < error).all()
    assert (interval_coverage(draws, y, levels) - levels).abs().max() > 0.1
    assert stats.kstest(pit(moved, y).numpy(), "uniform").statistic < 0.06
    assert (moved - m).flatten(0, 1).mean().item() == pytest.approx(0, abs=0.1)
    assert sharpness(moved).item() == pytest.approx(2 * 1.645, rel=0.05)
    assert crps(moved, y).mean() < crps(draws, y).mean()


def test_quantiles_keep_ranks_and_what_is_calibrated():
    draws, y, _ = numbers(scale=1.0, shift=0.0)
    moved = quantiles(draws, y)(draws)
    order = draws.flatten(0, 1).argsort(0)
    assert (moved.flatten(0, 1).gather(0, order).diff(dim=0) >= 0).all()
    assert (moved - draws).abs().mean() < 0.06  # 1 / sqrt(1500) of an sd of 1, twice
    same = bnn.calibration.Quantiles(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]))
    assert torch.allclose(same(draws), draws, atol=1e-5)
    assert torch.allclose(same(draws[0]), draws[0], atol=1e-5)


def test_quantiles_warn_where_they_cannot_reach():
    draws, y, _ = numbers(scale=0.1, shift=0.0)
    with pytest.warns(bnn.ApproximationWarning, match="beyond all of their 400 draws"):
        quantiles(draws, y)
    with pytest.raises(bnn.DataError, match="the rows must be the same"):
        quantiles(draws, y[:-1])
