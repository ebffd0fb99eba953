"""Coverage where it is known exactly, and its power to tell a wrong width."""

import math

import pytest
import torch

import bnn
from bnn import calibration
from bnn.calibration import interval_coverage

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


def test_rows_are_taken_in_blocks(monkeypatch):
    y, draws = torch.rand(50), torch.rand(2, 30, 50)
    whole = interval_coverage(draws, y, [0.3, 0.8])
    monkeypatch.setattr(calibration, "_CELLS", 7 * 60)
    assert torch.equal(interval_coverage(draws, y, [0.3, 0.8]), whole)


@pytest.mark.parametrize("shape", [(2,), (1, 1), (), (0,)], ids=str)
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
