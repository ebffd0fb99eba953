"""Data: conversion to tensors, the walk over minibatches, and loaders."""

from itertools import islice

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from bnn.data import Data, column_names, like, shape_of, take, tensors
from bnn.errors import DataError

ROWS = torch.arange(7)


def walk(data: Data, size: int | None, count: int, seed: int = 0) -> list[tuple]:
    return list(islice(data.batches(size, torch.Generator().manual_seed(seed)), count))


@pytest.mark.parametrize(
    ("given", "dtype", "shape"),
    [
        ([1.0, 2.0], torch.float32, (2,)),
        ([[1], [2]], torch.int64, (2, 1)),
        (3.5, torch.float32, ()),
        (np.float64([1, 2]), torch.float32, (2,)),
        (np.uint16([1, 2]), torch.int64, (2,)),
        (np.uint8([1, 2]), torch.uint8, (2,)),
        (np.array([1, 2], ">i4"), torch.int32, (2,)),
        (np.array([1, 2], ">f4"), torch.float32, (2,)),
        (np.longdouble([1, 2]), torch.float32, (2,)),
        (torch.tensor([True, False]), torch.bool, (2,)),
        (torch.ones(2, 3, dtype=torch.float16), torch.float32, (2, 3)),
        (pd.Series([1, 2], dtype="Float64"), torch.float32, (2,)),
        (pd.DataFrame({"a": [1, 2], "b": [True, False]}), torch.float32, (2, 2)),
        (np.zeros((0, 3)), torch.float32, (0, 3)),
    ],
)
def test_conversion(given, dtype, shape):
    (made,) = tensors((given,), ("x",))
    assert (made.dtype, tuple(made.shape)) == (dtype, shape)
    assert made.is_contiguous()


def test_floats_follow_the_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        assert tensors(([1.0],), ("x",))[0].dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_arrays_are_copied_and_tensors_shared():
    array, tensor = np.ones(3, np.float32), torch.ones(3)
    made = tensors((array, tensor), ("x", "y"))
    array[0] = 5.0
    assert made[0][0] == 1.0
    assert made[1].data_ptr() == tensor.data_ptr()


def test_the_first_offender_is_named():
    x = torch.zeros(3, 2, 4)
    x[1, 1, 2] = torch.nan
    with pytest.raises(DataError, match='"x" has 1 NaN of 24 values, the first at row 1, column 1'):
        tensors((x,), ("x",))


def test_the_largest_numbers_are_finite_and_too_large():
    for value in (3e38, -3e38):
        with pytest.raises(DataError, match=r'"x" reaches 3e\+38'):
            tensors((torch.full((3,), value),), ("x",))
    tensors((torch.tensor([-1e15, 1e15]),), ("x",))


def test_each_pass_is_a_new_permutation():
    data = Data((ROWS, ROWS * 10), ("x", "y"), rows=7)
    orders = []
    for number in range(4):
        batches = walk(data, 1, 28)[7 * number : 7 * number + 7]
        assert all(torch.equal(y, x * 10) for x, y in batches)
        orders.append(torch.cat([x for x, _ in batches]).tolist())
    assert all(sorted(order) == ROWS.tolist() for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_the_ragged_rest_is_dropped():
    batches = walk(Data((ROWS,), ("y",), rows=7), 3, 200)
    assert {len(y) for (y,) in batches} == {3}
    for first, second in zip(batches[::2], batches[1::2], strict=True):  # a pass: two of 3, 1 left
        assert len(set(torch.cat([*first, *second]).tolist())) == 6
    seen = torch.cat([y for (y,) in batches]).bincount(minlength=7)
    assert ((seen > 60) & (seen < 111)).all()  # 600 places, 85.7 each, sd 3.5: none is left out


def test_batches_follow_the_generator():
    data = Data((ROWS,), ("y",), rows=7)
    first, again, other = (torch.cat([y for (y,) in walk(data, 2, 9, s)]) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("size", [None, 7, 8])
def test_all_rows_come_in_their_own_order(size):
    for (y,) in walk(Data((ROWS,), ("y",), rows=7), size, 3):
        assert y is ROWS


def test_a_single_number_belongs_to_every_row():
    constant = torch.tensor(2.5)
    for y, c in walk(Data((ROWS, constant), ("y", "c"), rows=7), 3, 4):
        assert len(y) == 3
        assert c is constant
    assert take((constant,), slice(0, 1))[0] is constant


def test_loader_passes_go_on_and_keep_its_rest():
    loader = DataLoader(TensorDataset(ROWS.double(), ROWS), 3)
    data = Data((torch.zeros(3), torch.zeros(3)), ("x", "y"), rows=7, loader=loader)
    batches = walk(data, 3, 6)
    assert [len(y) for _, y in batches] == [3, 3, 1, 3, 3, 1]
    assert all(t.dtype == torch.float32 for batch in batches for t in batch)
    assert torch.equal(torch.cat([x for x, _ in batches[:3]]), ROWS.float())


def test_like_casts_where_nothing_is_lost():
    whole, half, long = torch.ones(2), torch.tensor([0.5]), torch.ones(1, dtype=torch.long)
    assert [t.dtype for t in like((whole, half, long), (long, long, half))] == [
        torch.int64,
        torch.float32,
        torch.float32,
    ]


def test_shapes_are_told_with_their_axes():
    assert shape_of(torch.zeros(())) == "()"
    assert shape_of(torch.zeros(4, 2)) == "(row=4, column=2)"
    assert shape_of(torch.zeros(4, 2, 3)) == "(row=4, axis 1=2, axis 2=3)"


def test_column_names():
    assert column_names(pd.DataFrame({"a": [1], 2: [3]})) == ["a", "2"]
    assert column_names(np.zeros((1, 2))) == []


def test_one_pass_shows_every_row_once():
    x = torch.arange(10.0)
    data = Data((x, torch.tensor(3.0), x), ("x", "unit", "y"), rows=10)
    for size, lengths in ((4, [4, 4, 2]), (10, [10]), (20, [10]), (None, [10])):
        batches = list(data.once(size))
        assert [len(batch[-1]) for batch in batches] == lengths
        assert torch.equal(torch.cat([batch[0] for batch in batches]), x)
    loader = DataLoader(TensorDataset(x, x), batch_size=3, shuffle=True)
    data = Data((x[:3], x[:3]), ("x", "y"), rows=10, loader=loader)
    for _ in range(2):  # a pass is not the end of the loader
        shown = torch.cat([batch[0] for batch in data.once(None)])
        assert torch.equal(shown.sort().values, x)
