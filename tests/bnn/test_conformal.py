"""Conformal rules: their scores by hand, and coverage k / (n + 1) exactly, on 200 repetitions."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import bnn
from bnn import conformal
from bnn.conformal import aps, cqr, lac, raps, split

HELD_OUT, NEW, REPETITIONS = 30, 100, 200


def regression(generator, rows):
    """A wrong model: its mean is off and its deviation half the true one. (mean, std, y)."""
    x = torch.randn(rows, generator=generator)
    std = 0.5 * (0.2 + x.abs())
    return x - 0.3, std, x + 2 * std * torch.randn(rows, generator=generator)


def classification(generator, rows):
    """Five classes, surer than it should be. (probs, labels)."""
    logits = torch.randn(rows, 5, generator=generator).double()
    return (2 * logits).softmax(-1), torch.multinomial(logits.softmax(-1), 1, generator=generator)[
        :, 0
    ]


def inside(interval, y):
    return (interval[0] <= y) & (y <= interval[1])


def held_split(generator, level):
    (mean, _, y), (new, _, truth) = (regression(generator, n) for n in (HELD_OUT, NEW))
    return inside(split(mean, y, level=level)(new), truth)


def held_scaled(generator, level):
    (mean, std, y), (new, sd, truth) = (regression(generator, n) for n in (HELD_OUT, NEW))
    return inside(split(mean, y, std=std, level=level)(new, sd), truth)


def held_cqr(generator, level):
    (mean, std, y), (new, sd, truth) = (regression(generator, n) for n in (HELD_OUT, NEW))
    rule = cqr(mean - std, mean + std, y, level=level)
    return inside(rule(new - sd, new + sd), truth)


def held_sets(fit):
    def held(generator, level):
        (probs, labels), (new, truth) = (classification(generator, n) for n in (HELD_OUT, NEW))
        return fit(probs, labels, level=level)(new).gather(-1, truth[:, None])[:, 0]

    return held


RULES = {
    "split": held_split,
    "split with std": held_scaled,
    "cqr": held_cqr,
    "lac": held_sets(lac),
    "aps": held_sets(aps),
    "aps whole": held_sets(lambda *a, **k: aps(*a, randomised=False, **k)),
    "raps": held_sets(lambda *a, **k: raps(*a, penalty=0.1, free=2, **k)),
}


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("name", RULES)
def test_coverage_is_what_exchangeability_says(name, level):
    """With n scores that do not tie it is k / (n + 1), k = ceil((n + 1) level), on average.

    The share of a repetition is Beta(k, n + 1 - k), and 100 new rows of it. `aps whole` ties, at a
    sum of 1 for the least probable label, and covers more.
    """
    generator = torch.Generator().manual_seed(0)
    shares = [RULES[name](generator, level).double().mean().item() for _ in range(REPETITIONS)]
    k = math.ceil((HELD_OUT + 1) * level)
    exact = k / (HELD_OUT + 1)
    variance = exact * (1 - exact) * (1 / (HELD_OUT + 2) + 1 / NEW)
    error = 4 * math.sqrt(variance / REPETITIONS)
    assert np.mean(shares) > exact - error
    if name != "aps whole":
        assert np.mean(shares) < exact + error


def test_the_quantile_is_that_of_one_row_more():
    """n = 9, level .9: the 9th of 9; n = 19: the 18th of 19; and 100 * .55 is 55, not more."""
    y = torch.arange(1.0, 20.0)
    assert split(torch.zeros(9), y[:9], level=0.9).radius == 9
    assert split(torch.zeros(19), y, level=0.9).radius == 18
    assert split(torch.zeros(19), y, level=0.9 + 1e-6).radius == 19
    for n in (9, 19, 49, 99, 199):
        for percent in range(1, 100):
            place = -(-(n + 1) * percent // 100)
            if place <= n:
                scores = torch.arange(1.0, n + 1)
                assert conformal._quantile(scores, percent / 100) == place


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_too_few_rows_allow_everything_and_warn(level):
    need = round(level / (1 - level))
    few, enough = torch.arange(need - 1.0), torch.arange(float(need))
    assert split(enough * 0, enough, level=level).radius == need - 1
    with pytest.warns(bnn.ApproximationWarning, match=f"at least {need} rows") as caught:
        lower, upper = split(few * 0, few, level=level)(torch.zeros(3))
    assert caught[0].filename == __file__
    assert (lower == -math.inf).all()
    assert (upper == math.inf).all()
    with pytest.warns(bnn.ApproximationWarning):
        lower, upper = cqr(few, few + 1, few, level=level)(few, few + 1)
    assert (lower == -math.inf).all()
    assert (upper == math.inf).all()
    probs, labels = classification(torch.Generator().manual_seed(0), need - 1)
    for fit in (lac, aps, raps):
        with pytest.warns(bnn.ApproximationWarning) as caught:
            rule = fit(probs, labels, level=level)
        assert caught[0].filename == __file__
        assert rule(probs).all()


def test_intervals_by_hand():
    rule = split([0.0, 0.0, 0.0], [1.0, -3.0, 2.0], level=0.5)  # the 2nd of 1, 2, 3
    assert rule == bnn.conformal.Split(radius=2.0, scaled=False, level=0.5)
    assert [end.tolist() for end in rule([10.0])] == [[8.0], [12.0]]
    rule = split([0.0, 0.0, 0.0], [1.0, -3.0, 2.0], std=[1.0, 6.0, 1.0], level=0.5)
    assert [end.tolist() for end in rule([10.0], [4.0])] == [[6.0], [14.0]]  # 1, .5, 2
    rule = cqr([0.0] * 3, [10.0] * 3, [12.0, 4.0, -1.0], level=0.5)  # 2, -4, 1
    assert rule.shift == 1
    assert [end.tolist() for end in rule([0.0], [10.0])] == [[-1.0], [11.0]]


def test_intervals_that_are_too_wide_shrink_to_a_point_at_most():
    rule = cqr([0.0] * 3, [10.0] * 3, [4.0, 5.0, 4.0], level=0.5)
    assert rule.shift == -4
    lower, upper = rule([0.0, 0.0], [10.0, 6.0])
    assert lower.tolist() == [4, 3]
    assert upper.tolist() == [6, 3]


PROBS = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]]).double()


def test_scores_of_sets_by_hand():
    scores = conformal.Sets(0.0, 0.9, "lac")._scores(PROBS, (0, 0))
    assert torch.allclose(scores, 1 - PROBS)
    scores = conformal.Sets(0.0, 0.9, "aps")._scores(PROBS, (0, 0))
    assert torch.allclose(scores, torch.tensor([[0.5, 0.8, 0.95, 1], [1, 0.9, 0.7, 0.4]]).double())
    rule = conformal.Sets(0.0, 0.9, "aps", penalty=0.1, free=2)
    priced = torch.tensor([[0.5, 0.8, 1.05, 1.2], [1.2, 1.0, 0.7, 0.4]]).double()
    assert torch.allclose(rule._scores(PROBS, (0, 0)), priced)
    by_chance = conformal.Sets(0.0, 0.9, "aps", randomised=True)._scores(PROBS, (0, 0))
    share = (scores - by_chance) / PROBS  # one number a row
    assert torch.allclose(share, share[:, :1].expand(2, 4))
    assert ((share > 0) & (share < 1)).all()


def test_sets_by_hand():
    assert lac(PROBS, [0, 2], level=0.5)(PROBS).tolist() == [  # .7 is the 2nd of .5, .7
        [True, True, False, False],
        [False, False, True, True],
    ]
    whole = aps(PROBS, [0, 2], level=0.5, randomised=False)  # .7 is the 2nd of .5, .7
    assert whole(PROBS).tolist() == [[True, False, False, False], [False, False, True, True]]


def test_a_price_makes_long_sets_rare():
    generator = torch.Generator().manual_seed(0)
    probs, labels = classification(generator, 1000)
    free, priced = aps(probs, labels)(probs), raps(probs, labels, penalty=0.5, free=2)(probs)
    assert priced.sum(-1).max() < free.sum(-1).max()
    assert lac(probs, labels)(probs).double().sum(-1).mean() < free.double().sum(-1).mean()


def test_one_seed_one_set_and_chance_is_new_in_new_rows():
    probs, labels = classification(torch.Generator().manual_seed(0), 200)
    assert aps(probs, labels) == aps(probs, labels)
    assert aps(probs, labels, seed=1) != aps(probs, labels)
    rule = aps(probs, labels)
    assert torch.equal(rule(probs), rule(probs))
    assert not torch.equal(rule(probs), rule(probs, seed=1))
    held = rule(probs).gather(-1, labels[:, None]).sum()
    assert held != math.ceil(201 * 0.9)  # that many of its own rows, had they the chance of the fit


@pytest.mark.parametrize("rule", ["split", "cqr", "lac"])
def test_observations_of_one_row_count_as_one_row(rule):
    """Ten of each row, all alike, tell no more than one: the 11th of 11 rows, not the 10th."""

    def threshold(rows, each):
        away = torch.arange(1.0, rows + 1)[:, None].expand(rows, each)
        if rule == "split":
            return split(torch.zeros_like(away), away).radius
        if rule == "cqr":
            return cqr(-torch.ones_like(away), torch.ones_like(away), away).shift + 1
        probs = torch.stack([1 - away / 20, away / 20], -1).double()
        return 20 * lac(probs, torch.zeros(rows, each)).threshold

    assert threshold(11, 1) == pytest.approx(11)
    assert threshold(11, 10) == pytest.approx(11)  # of 110 scores on their own the 100th: 10
    with pytest.warns(bnn.ApproximationWarning, match="5 held-out rows"):
        assert threshold(5, 10) == math.inf


def test_rows_may_have_axes():
    probs, labels = classification(torch.Generator().manual_seed(0), 60)
    rule = lac(probs.reshape(20, 3, 5), labels.reshape(20, 3))
    scores = 1 - probs[torch.arange(60), labels]
    assert rule.threshold == float(scores.sort().values[57 - 1])  # of 3 * (20 + 1), 90 %
    assert torch.equal(rule(probs.reshape(20, 3, 5)).reshape(60, 5), rule(probs))
    y = torch.arange(20.0).reshape(10, 2)
    assert split(y * 0, y).radius == 19  # the 20th, of 2 * (10 + 1), 90 %


Y = torch.arange(20.0)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: split(Y, Y[:-1]), r"mean has shape .*\(20,\) and y has \(19,\)"),
        (lambda: split(Y, Y[:, None]), "the rows must be the same"),
        (lambda: split(Y, Y * math.nan), "y has 20 NaN"),
        (lambda: split(Y[:0], Y[:0]), "no rows"),
        (lambda: split(Y, Y, std=Y), "std has values down to 0"),
        (lambda: split(Y, Y, std=Y[:-1] + 1), "std has"),
        (lambda: split(Y, Y, level=90), "level is a probability"),
        (lambda: split(Y, Y)(Y, Y + 1), "fitted without std"),
        (lambda: split(Y, Y, std=Y + 1)(Y), "fitted with std"),
        (lambda: cqr(Y + 1, Y, Y), "lower is above upper at 20 of 20"),
        (lambda: cqr(Y, Y[:-1], Y), "upper has"),
        (lambda: lac(torch.full((20, 3), 0.5), Y), "sum is 1.5"),
        (lambda: lac(torch.full((20, 2), 0.5), Y), "18 values that are no class"),
        (lambda: aps(torch.full((20, 2), 0.5), Y[:3]), r"labels has shape \(3,\)"),
        (lambda: raps(PROBS, [0, 1], penalty=-1), "penalty is -1"),
        (lambda: raps(PROBS, [0, 1], free=-1), "free is -1"),
        (lambda: lac(PROBS, [0, 1], level=0.5)(PROBS * 2), "sum is 2"),
    ],
)
def test_what_does_not_fit_is_refused(call, match):
    with pytest.raises(bnn.DataError, match=match):
        call()


# Of predictions


def line(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w * x, 0.5 + x.abs()), obs=y)


def three(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Categorical(logits=x[:, None] * w), obs=y)


X = torch.linspace(-2, 2, 60)
NUMBERS = X + torch.randn(60, generator=torch.Generator().manual_seed(0))
LABELS = (X > -0.5).long() + (X > 0.5)
METHODS = [bnn.Laplace(steps=300, draws=100), bnn.DeepEnsemble(members=3, steps=300)]
quiet = pytest.mark.filterwarnings("ignore::bnn.errors.ConvergenceWarning")


@quiet
@pytest.mark.parametrize("method", METHODS, ids=["laplace", "ensemble"])
def test_a_prediction_stands_for_its_arrays(method):
    """Whatever posterior it is of."""
    even, odd = X[::2], X[1::2]
    fitted = bnn.fit(line, even, NUMBERS[::2], method=method, progress=False)
    held, new, y = fitted.predict(odd), fitted.predict(even), NUMBERS[1::2]
    rule = split(held, y, level=0.8)
    assert rule == split(held.mean, y, level=0.8)
    assert all(map(torch.equal, rule(new), rule(new.mean)))
    rule = split(held, y, std=True, level=0.8)
    assert rule == split(held.mean, y, std=held.std, level=0.8)
    assert all(map(torch.equal, rule(new), rule(new.mean, new.std)))
    assert all(map(torch.equal, rule(new, 2 * new.std), rule(new.mean, 2 * new.std)))
    rule = cqr(held, y, level=0.8)
    assert rule == cqr(held, y=y, level=0.8)
    assert rule == cqr(*held.interval(0.8), y, level=0.8)
    assert all(map(torch.equal, rule(new), rule(*new.interval(0.8))))
    fitted = bnn.fit(three, even, LABELS[::2], method=method, progress=False)
    held, new = fitted.predict(odd), fitted.predict(even)
    for fit in (lac, aps, raps):
        rule = fit(held, LABELS[1::2], level=0.8)
        assert rule == fit(held.probs, LABELS[1::2], level=0.8)
        assert torch.equal(rule(new), rule(new.probs))


def test_a_summary_of_batches_stands_for_its_arrays():
    fitted = bnn.fit(line, X, NUMBERS, method=METHODS[0], progress=False)
    rows = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X), batch_size=20)
    summary = fitted.predict(rows, quantiles=(0.1, 0.5, 0.9))
    rule = split(summary, NUMBERS, std=True, level=0.8)
    assert rule == split(summary.mean, NUMBERS, std=summary.std, level=0.8)
    rule = cqr(summary, NUMBERS, level=0.8)
    assert rule == cqr(*summary.interval(0.8), NUMBERS, level=0.8)


@quiet
def test_predictions_of_the_other_kind_are_refused():
    numbers, labels = (
        bnn.fit(model, X, y, method=METHODS[0], progress=False).predict(X)
        for model, y in ((line, NUMBERS), (three, LABELS))
    )
    for call in (lambda: split(labels, LABELS), lambda: cqr(labels, LABELS)):
        with pytest.raises(bnn.DataError, match="prediction is of labels"):
            call()
    with pytest.raises(bnn.DataError, match="prediction is of numbers"):
        lac(numbers, LABELS)
    with pytest.raises(bnn.DataError, match="Pass a prediction, or their std"):
        split(numbers.mean, NUMBERS, std=True)
    with pytest.raises(bnn.DataError, match=r"cqr\(prediction, y\)"):
        cqr(numbers, NUMBERS, NUMBERS)
    with pytest.raises(bnn.DataError, match="fitted with std"):
        split(numbers, NUMBERS, std=True)(numbers.mean)
    with pytest.raises(bnn.DataError, match="fitted without std"):
        split(numbers, NUMBERS, std=False)(numbers, numbers.std)
    with pytest.raises(bnn.DataError, match="both ends"):
        cqr(numbers, NUMBERS)(numbers, numbers.mean)
