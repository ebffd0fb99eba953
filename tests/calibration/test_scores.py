"""Log scores by hand: the mean over draws is inside the logarithm, of a row or of a product."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import bnn
from bnn.calibration import dyadic, joint_log_score, log_score

FAIR = torch.full((4, 1), 0.5).log()  # (draw, toss): known to be fair
UNSURE = torch.tensor([[1.0], [0.0], [1.0], [0.0]]).log()  # heads for certain, or tails for certain


def test_two_coins_differ_jointly_and_not_toss_by_toss():
    ten = [[0] * 10]
    for coin in (FAIR, UNSURE):
        assert log_score(coin).item() == pytest.approx(-0.693147, abs=1e-6)
    assert joint_log_score(FAIR, ten).item() == pytest.approx(-6.931472, abs=1e-6)
    assert joint_log_score(UNSURE, ten).item() == pytest.approx(-0.693147, abs=1e-6)
    assert joint_log_score(FAIR.expand(4, 10)).item() == pytest.approx(-6.931472, abs=1e-6)
    assert joint_log_score(UNSURE.expand(4, 10)).item() == pytest.approx(-0.693147, abs=1e-6)


def test_rows_are_scored_apart():
    each = torch.tensor([[[0.1, 0.8]], [[0.3, 0.2]]]).log()  # (chain, draw, row)
    assert log_score(each).tolist() == pytest.approx([math.log(0.2), math.log(0.5)])
    joint = math.log((0.1 * 0.8 + 0.3 * 0.2) / 2)
    assert joint_log_score(each).item() == pytest.approx(joint)
    groups = joint_log_score(each, [[0, 1], [0, 0], [1, 0]])
    twice = math.log((0.1**2 + 0.3**2) / 2)
    assert groups.tolist() == pytest.approx([joint, twice, joint])
    assert joint_log_score(each.numpy(), np.array([[1]])).item() == pytest.approx(math.log(0.5))


def test_scores_do_not_underflow():
    assert log_score(FAIR - 1e4).item() == pytest.approx(-1e4 - 0.693147)
    joint = joint_log_score(FAIR.double().expand(4, 1000) - 100)
    assert joint.item() == pytest.approx(-100_693.147)
    assert log_score(torch.full((3, 1), -math.inf)).item() == -math.inf


@pytest.mark.filterwarnings("ignore::bnn.errors.ConvergenceWarning")
def test_a_posterior_is_scored_by_the_same_function():
    x, y = torch.arange(6.0), torch.tensor([0.0, 1.0, 1.0, 3.0, 4.0, 4.0])

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)

    posterior = bnn.fit(model, x, y, method=bnn.SVI(steps=50, draws=20))
    each = posterior.log_likelihood(x, y)
    assert torch.equal(log_score(each), posterior.log_score(x, y))
    w = posterior.draws["w"]
    by_hand = dist.Normal(w[..., None] * x, 1.0).log_prob(y).double().sum(-1).exp().mean().log()
    assert joint_log_score(each).item() == pytest.approx(by_hand.item(), abs=1e-4)


def test_dyadic_groups_come_back_to_few_rows():
    groups = dyadic(50, groups=400)
    assert groups.shape == (400, 10)
    distinct = [len(set(group)) for group in groups.tolist()]
    assert max(distinct) == 2
    assert distinct.count(1) < 8  # of 400 / 2^9 expected
    assert groups.unique().tolist() == list(range(50))
    share = (groups == groups[:, :1]).double().mean().item()
    assert share == pytest.approx(0.55, abs=0.04)  # the first, and half of the other nine
    assert torch.equal(groups, dyadic(50, groups=400))
    assert not torch.equal(groups, dyadic(50, groups=400, seed=1))
    assert {len(set(group)) for group in dyadic(5, anchors=1).tolist()} == {1}


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: log_score(torch.zeros(3)), r"log_likelihood has shape \(3,\)"),
        (lambda: log_score(torch.full((2, 3), math.nan)), "log_likelihood has 6 NaN"),
        (lambda: joint_log_score(torch.zeros(0, 3)), "no rows, or no draws"),
        (lambda: joint_log_score(FAIR, [[0, 1]]), r"values in 0\.\.1.*rows in 0\.\.0"),
        (lambda: joint_log_score(FAIR, [[0, 0.5]]), "whole numbers"),
        (lambda: joint_log_score(FAIR, [0]), r"groups has shape \(1,\)"),
        (lambda: dyadic(1), "rows=1"),
        (lambda: dyadic(5, size=0), "size=0"),
    ],
)
def test_what_does_not_fit_is_refused(call, match):
    with pytest.raises(bnn.DataError, match=match):
        call()
