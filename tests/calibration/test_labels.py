"""Calibration of labels by hand, on the edges of bins, and beside other packages."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics
from sklearn.calibration import calibration_curve

import bnn
from bnn.calibration import brier, brier_decomposition, ece, nll, reliability, set_coverage

# Of two classes the first is right in "R", wrong in "W".
STATED = [0.6, 0.5, 0.8, 0.8, 0.7, 1.0]
RIGHT = "RRWRWR"
LABELS = [0 if letter == "R" else 1 for letter in RIGHT]


def two(stated, dtype=torch.float64):
    first = torch.tensor(stated, dtype=dtype)
    return torch.stack([first, 1 - first], -1)


def sample(rows=500, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    probs = (2 * torch.randn(rows, classes, generator=generator).double()).softmax(-1)
    labels = torch.multinomial(probs.sqrt(), 1, generator=generator)[:, 0]  # less sure than stated
    return probs, labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_point_on_an_edge_is_in_the_bin_below_and_nowhere_else(dtype):
    """(.4, .6]: .6, .5 both right. (.6, .8]: .8, .8, .7, one right. (.8, 1]: 1, right."""
    probs = two(STATED, dtype)
    gaps = [2 * abs(0.55 - 1), 3 * abs(2.3 / 3 - 1 / 3), 1 * 0]
    assert ece(probs, LABELS, bins=5) == pytest.approx(sum(gaps) / 6, abs=1e-6)
    curve = reliability(probs, LABELS, bins=5, equal="width")
    assert curve.count.tolist() == [2, 3, 1]
    assert curve.stated.tolist() == pytest.approx([0.55, 2.3 / 3, 1])
    assert curve.observed.tolist() == pytest.approx([1, 1 / 3, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bins", [1, 5, 10, 20])
def test_every_edge_is_counted_once(dtype, bins):
    """Stated k/20 for k = 0..20, all of them edges of 20 bins: each in its own, 0 in the first."""
    probs = two([k / 20 for k in range(21)], dtype)
    curve = reliability(probs, [0] * 21, label=0, bins=bins, equal="width")
    assert curve.count.tolist() == [20 // bins + 1] + [20 // bins] * (bins - 1)


def test_equal_mass_parts_rows_evenly_and_no_ties():
    curve = reliability(two([0.1, 0.2, 0.3, 0.4, 0.6, 0.7]), LABELS, label=0, bins=3)
    assert curve.count.tolist() == [2, 2, 2]
    assert curve.stated.tolist() == pytest.approx([0.15, 0.35, 0.65])
    tied = two([0.2, 0.2, 0.2, 0.2, 0.2, 0.9])
    curve = reliability(tied, LABELS, label=0, bins=3)
    assert curve.count.tolist() == [5, 1]
    assert ece(tied.flip(0), LABELS[::-1], equal="mass", bins=3) == pytest.approx(
        ece(tied, LABELS, equal="mass", bins=3)
    )
    assert reliability(tied, LABELS, bins=100).count.sum() == 6


def test_class_wise_error_is_the_mean_over_classes():
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1]])
    # One bin: |mean stated - observed| is |.65 - .5|, |.25 - 0|, |.1 - .5|.
    found = ece(probs, [0, 2], bins=1, classwise=True)
    assert found == pytest.approx((0.15 + 0.25 + 0.4) / 3)
    assert ece(probs, [0, 2], bins=1) == pytest.approx(0.15)


def test_error_is_read_off_the_curve():
    probs, labels = sample()
    for equal in ("width", "mass"):
        curve = reliability(probs, labels, equal=equal)
        gap, share = (curve.stated - curve.observed).abs(), curve.count / 500
        assert ece(probs, labels, equal=equal) == pytest.approx((share * gap).sum().item())
        root = (share * gap.square()).sum().sqrt().item()
        assert ece(probs, labels, equal=equal, norm=2) == pytest.approx(root)


def test_debiased_square_takes_out_the_variance_of_each_share():
    """One bin of 4 rows, stated .9, observed .5: .16 - .25 / 3."""
    probs, labels = two([0.9] * 4), [0, 0, 1, 1]
    found = ece(probs, labels, norm=2, debiased=True)
    assert found == pytest.approx(math.sqrt(0.16 - 0.25 / 3))
    assert ece(probs, labels, norm=2) == pytest.approx(0.4)
    assert ece(two([0.6] * 4), labels, norm=2, debiased=True) == 0  # .01 - .25 / 3 < 0


def test_debiased_error_of_a_calibrated_prediction_is_nearer_to_none():
    """300 data sets of 200 rows. Plain ECE ~ .798 sd of a share; half of that is taken out."""
    generator = torch.Generator().manual_seed(0)
    plain, corrected = [], []
    for _ in range(300):
        p = 0.5 + 0.5 * torch.rand(200, generator=generator).double()
        labels = (torch.rand(200, generator=generator) > p).long()
        probs = torch.stack([p, 1 - p], -1)
        plain.append(ece(probs, labels, bins=10, equal="mass"))
        corrected.append(ece(probs, labels, bins=10, equal="mass", debiased=True))
    assert np.mean(plain) > 0.05
    assert abs(np.mean(corrected)) < 0.65 * np.mean(plain)


def test_debiasing_leaves_an_error_far_above_its_scatter():
    probs, labels = two([0.99] * 400), [0, 1] * 200
    assert ece(probs, labels, debiased=True) == pytest.approx(0.49, abs=1e-6)


@pytest.mark.parametrize("rows", [7, 99, 500, 501, 777])
@pytest.mark.parametrize("strategy", ["uniform", "quantile"])
def test_curve_agrees_with_scikit_learn(strategy, rows):
    probs, labels = sample(rows, classes=2)
    observed, stated = calibration_curve(labels, probs[:, 1], n_bins=10, strategy=strategy)
    equal = {"uniform": "width", "quantile": "mass"}[strategy]
    curve = reliability(probs, labels, label=1, bins=10, equal=equal)
    assert curve.observed.numpy() == pytest.approx(observed, abs=1e-6)
    assert curve.stated.numpy() == pytest.approx(stated, abs=1e-6)


def test_scores_agree_with_scikit_learn():
    probs, labels = sample(classes=2)
    assert nll(probs, labels) == pytest.approx(metrics.log_loss(labels, probs), abs=1e-6)
    half = metrics.brier_score_loss(labels, probs[:, 1])
    assert brier(probs, labels) == pytest.approx(2 * half, abs=1e-6)
    probs, labels = sample()
    assert nll(probs, labels) == pytest.approx(metrics.log_loss(labels, probs), abs=1e-6)


def test_error_agrees_with_torchmetrics():
    functional = pytest.importorskip("torchmetrics.functional.classification")
    probs, labels = sample()
    for norm, name in ((1, "l1"), (2, "l2")):
        other = functional.multiclass_calibration_error(probs, labels, 3, n_bins=15, norm=name)
        assert ece(probs, labels, norm=norm) == pytest.approx(other.item(), abs=1e-6)


def test_error_agrees_with_netcal():
    netcal = pytest.importorskip("netcal.metrics")
    probs, labels = sample()
    found = netcal.ECE(15).measure(probs.numpy(), labels.numpy())
    assert ece(probs, labels) == pytest.approx(found, abs=1e-6)


def test_band_of_few_rows_is_wilsons():
    curve = reliability(two([0.7] * 10), [0] * 9 + [1], level=0.9)
    exact = stats.binomtest(9, 10).proportion_ci(0.9, method="wilson")
    assert curve.lower.item() == pytest.approx(exact.low, abs=1e-6)
    assert curve.upper.item() == pytest.approx(exact.high, abs=1e-6)


def test_band_of_the_posterior_holds_the_curves_of_its_draws():
    """Bins (0, .5], (.5, 1] of class 0; draw k puts k of the 4 rows into the upper one."""
    upper = torch.tensor([[k > row for row in range(4)] for k in range(1, 5)])
    draws = two(torch.where(upper, 0.9, 0.2).tolist())  # (draw, row, class)
    labels = [0, 1, 1, 1]
    curve = reliability(draws.mean(0), labels, label=0, draws=draws, bins=2, equal="width")
    assert curve.count.tolist() == [1, 3]  # the means are .9, .725, .55, .375
    assert curve.observed.tolist() == pytest.approx([0, 1 / 3])
    shares = np.array([1, 1 / 2, 1 / 3, 1 / 4])
    assert curve.lower[1].item() == pytest.approx(np.quantile(shares, 0.025))
    assert curve.upper[1].item() == pytest.approx(np.quantile(shares, 0.975))
    assert curve.lower[0] == curve.upper[0] == 0  # of three draws; the last has no row there
    chains = draws.reshape(2, 2, 4, 2)
    again = reliability(draws.mean(0), labels, label=0, draws=chains, bins=2, equal="width")
    assert torch.equal(again.upper, curve.upper)


@pytest.mark.parametrize("bins", [None, 1, 4, 15])
@pytest.mark.parametrize("equal", ["width", "mass"])
@pytest.mark.parametrize("classes", [2, 3])
def test_brier_parts_add_up(bins, equal, classes):
    for decimals in (1, 12):
        probs, labels = sample(80, classes)
        probs = probs.mul(10**decimals).round() / 10**decimals
        probs[:, 0] += 1 - probs.sum(-1)
        parts = brier_decomposition(probs, labels, bins=bins, equal=equal)
        total = parts.reliability - parts.resolution + parts.uncertainty + parts.within
        assert parts.score == brier(probs, labels)
        assert total == pytest.approx(parts.score, abs=1e-12)
        if bins is None:
            assert parts.within == pytest.approx(0, abs=1e-12)
        elif bins == 4:
            assert abs(parts.within) > 1e-5


def test_brier_parts_by_hand():
    """.75 stated four times and true twice, .25 four times and true once; overall 3/8."""
    probs = two([0.75] * 4 + [0.25] * 4)
    labels = [0, 0, 1, 1, 0, 1, 1, 1]
    parts = brier_decomposition(probs, labels, bins=None)
    assert parts.reliability == pytest.approx(2 * (0.5 * 0.25**2 + 0))
    assert parts.resolution == pytest.approx(2 * (0.5 * 0.125**2 + 0.5 * 0.125**2))
    assert parts.uncertainty == pytest.approx(2 * 3 / 8 * 5 / 8)
    assert parts.score == pytest.approx(2 * (2 * 0.0625 + 2 * 0.5625 + 0.5625 + 3 * 0.0625) / 8)


def test_scores_by_hand():
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.5, 0.5]])
    assert brier(probs, [0, 2]) == pytest.approx((0.09 + 0.04 + 0.01 + 0.25 + 0.25) / 2)
    assert nll(probs, [0, 2]) == pytest.approx(-(math.log(0.7) + math.log(0.5)) / 2)
    assert nll(probs, [0, 0]) == math.inf
    assert nll([[1 + 1e-5, -1e-5]], [1]) == math.inf  # what rounding leaves of 0


@pytest.mark.parametrize("level", [0.3, 0.5, 0.9, 0.99])
def test_sets_are_the_smallest_of_all_that_are_probable_enough(level):
    """Against all subsets of four labels, the most probable of the smallest ones."""
    probs = torch.rand(60, 4, generator=torch.Generator().manual_seed(0)).double()
    probs = probs / probs.sum(-1, keepdim=True)
    labels = torch.randint(4, (60,), generator=torch.Generator().manual_seed(1))
    subsets = [each for size in range(1, 5) for each in combinations(range(4), size)]
    held = 0
    for row, label in zip(probs.tolist(), labels.tolist(), strict=True):
        enough = [each for each in subsets if sum(row[k] for k in each) >= level - 1e-9]
        least = [each for each in enough if len(each) == len(enough[0])]
        held += label in max(least, key=lambda each: sum(row[k] for k in each))
    assert float(set_coverage(probs, labels, level)) == held / 60


def test_sets_that_end_at_the_level_hold_no_more():
    """.6 + .3 is .9, whichever way float32 rounds it; and calibrated rows are covered by .9."""
    probs = torch.tensor([[0.6, 0.3, 0.1]]).expand(10, 3)
    labels = [0] * 6 + [1] * 3 + [2]
    found = set_coverage(probs, labels, torch.tensor([0.6, 0.61, 0.9, 0.91]))
    assert found.tolist() == pytest.approx([0.6, 0.9, 0.9, 1.0])
    with pytest.raises(bnn.DataError, match="level"):
        set_coverage(probs, labels, 90)


def test_rows_may_have_axes():
    probs, labels = sample(12)
    many = probs.reshape(4, 3, 3), labels.reshape(4, 3)
    for score in (ece, brier, nll):
        assert score(*many) == pytest.approx(score(probs, labels))
    draws = torch.stack([probs, probs]).reshape(2, 4, 3, 3)
    curve = reliability(*many, draws=draws)
    assert torch.allclose(curve.lower, curve.observed)


@pytest.mark.parametrize("score", [ece, reliability, brier, brier_decomposition, nll])
@pytest.mark.parametrize(
    ("probs", "labels", "match"),
    [
        (torch.tensor([0.3, 0.7]), [0, 1], r"\(2,\), not \(row, class\).*torch.stack"),
        (torch.ones(2, 1), [0, 0], "at least two classes"),
        (torch.tensor([[2.0, -1.0]]), [0], r"-1\.\.2, not in 0\.\.1.*softmax"),
        (torch.tensor([[0.5, 0.5], [0.6, 0.6]]), [0, 0], "sum is 1.2 at one of 2 rows"),
        (torch.tensor([[0.5, math.nan]]), [0], "probs has 1 NaN"),
        (torch.zeros(0, 2), [], r"probs has shape \(0, 2\): there are no rows"),
        (two([0.5, 0.5]), [0], r"labels has shape \(1,\) and the rows .* \(2,\)"),
        (two([0.5, 0.5]), [[0], [0]], r"labels has shape \(2, 1\)"),
        (two([0.5, 0.5]), [0, 2], r"1 values that are no class, the first is 2: .* 0\.\.1"),
        (two([0.5, 0.5]), [0, -1], "the first is -1"),
        (two([0.5, 0.5]), [0, 0.5], "the first is 0.5"),
        (two([0.5, 0.5]), ["a", "b"], "labels holds <U1, not numbers"),
    ],
)
def test_what_is_no_probability_or_no_label_is_refused(score, probs, labels, match):
    with pytest.raises(bnn.DataError, match=match):
        score(probs, labels)


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"bins": 0}, "bins is 0"),
        ({"bins": 2.5}, "bins is 2.5"),
        ({"equal": "size"}, '"width" or "mass"'),
        ({"label": 2}, r"0\.\.1"),
        ({"level": 95}, "level"),
        ({"draws": torch.full((4, 6, 2), 0.6)}, "sum is 1.2"),
        ({"draws": torch.full((4, 5, 2), 0.5)}, r"draws has shape \(4, 5, 2\) and probs"),
        ({"draws": torch.full((6, 2), 0.5)}, "the same rows and classes at each draw"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(setting, match):
    with pytest.raises(bnn.DataError, match=match):
        reliability(two(STATED), LABELS, **setting)
    with pytest.raises(bnn.DataError, match="norm is 3"):
        ece(two(STATED), LABELS, norm=3)
