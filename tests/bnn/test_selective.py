"""Scores of strange and wrong rows: by hand, with ties, and beside scikit-learn."""

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn import metrics

import bnn
from bnn.selective import auroc, fpr, risk_coverage


def two(ties=False):
    generator = torch.Generator().manual_seed(0)
    inside, outside = torch.randn(300, generator=generator), torch.randn(200, generator=generator)
    outside = outside + 1
    return (inside.round(), outside.round()) if ties else (inside, outside)


@pytest.mark.parametrize("ties", [False, True])
def test_area_and_rate_agree_with_scikit_learn(ties):
    inside, outside = two(ties)
    strange = np.repeat([0, 1], [300, 200])
    scores = torch.cat([inside, outside]).numpy()
    assert auroc(inside, outside) == pytest.approx(metrics.roc_auc_score(strange, scores), abs=1e-6)
    false, true, _ = metrics.roc_curve(1 - strange, -scores, drop_intermediate=False)
    assert fpr(inside, outside) == pytest.approx(false[true >= 0.95][0], abs=1e-6)


def test_rates_by_hand():
    inside = torch.arange(20.0)  # 19 of 20 are at most 18
    assert fpr(inside, [17.0, 18.0, 18.5, 30.0]) == 0.5
    assert fpr(inside, [17.0, 18.0, 18.5, 30.0], tpr=0.9) == 0.25
    assert fpr(inside[:19], [17.5, 18.5]) == 0.5  # .95 of 19 rows are all of them
    assert fpr(torch.arange(1.0, 101), [55.0, 55.5], tpr=0.55) == 0.5
    assert fpr(inside, inside + 100) == 0
    assert auroc(inside, inside) == 0.5
    assert auroc(inside, inside + 100) == 1
    assert auroc(inside + 100, inside) == 0


def test_risk_by_hand():
    """Surest first the losses are 0, 1, 0, 1; the best order has 0, 0, 1, 1."""
    curve = risk_coverage([0.3, 0.1, 0.2, 0.4], [0.0, 0.0, 1.0, 1.0])
    assert curve.coverage.tolist() == [0.25, 0.5, 0.75, 1]
    assert curve.risk.tolist() == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2])
    assert curve.area == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert curve.excess == pytest.approx(curve.area - (1 / 3 + 1 / 2) / 4)
    best = risk_coverage([1.0, 2.0, 3.0, 4.0], [False, False, True, True])
    assert best.excess == pytest.approx(0, abs=1e-12)


def test_rows_that_tie_are_refused_in_random_order():
    score, loss = [0.0, 1.0, 1.0, 1.0, 2.0], [1.0, 0.0, 0.5, 2.0, 1.0]
    risks = [
        np.cumsum([1.0, *middle, 1.0]) / np.arange(1, 6)
        for middle in itertools.permutations(loss[1:4])
    ]
    assert risk_coverage(score, loss).risk.tolist() == pytest.approx(np.mean(risks, 0).tolist())
    whole = risk_coverage([0.0] * 5, loss)
    assert whole.risk.tolist() == pytest.approx([np.mean(loss)] * 5)


def test_excess_of_errors_is_near_the_known_limit():
    """Geifman et al. (2019): the best order of a share r of errors has r + (1 - r) ln(1 - r)."""
    wrong = torch.arange(20_000) < 4000
    curve = risk_coverage(torch.rand(20_000, generator=torch.Generator().manual_seed(0)), wrong)
    assert curve.area == pytest.approx(0.2, abs=0.01)
    assert curve.area - curve.excess == pytest.approx(0.2 + 0.8 * math.log(0.8), abs=1e-3)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: auroc([], [1.0]), "inside has shape .* no rows"),
        (lambda: auroc([1.0], [math.nan]), "outside has 1 NaN"),
        (lambda: fpr([1.0], [1.0], tpr=95), "tpr is a probability"),
        (lambda: risk_coverage([1.0], [1.0, 2.0]), r"score has shape .*\(1,\) and loss has \(2,\)"),
        (lambda: risk_coverage([1.0], [math.inf]), "loss has infinite"),
        (lambda: risk_coverage(["a"], [1.0]), "score holds <U1"),
    ],
)
def test_what_does_not_fit_is_refused(call, match):
    with pytest.raises(bnn.DataError, match=match):
        call()
