"""Two processes that share a fit, against one: torchrun on this machine, by gloo."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import bnn
from tests.bnn import shared_fits

ROOT = Path(__file__).parents[2]
SCRIPT = ["-m", "tests.bnn.shared_fits"]
LOCAL = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Draws and first gradients on each of two processes, and what they were refused."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run(
        [*command, "-m", SCRIPT[1], "two", str(folder)],
        cwd=ROOT, env=LOCAL, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4_000:]
    draws = [load_file(folder / f"draws-{rank}.safetensors") for rank in (0, 1)]
    said = [json.loads((folder / f"said-{rank}.json").read_text()) for rank in (0, 1)]
    return draws, said, folder


@pytest.fixture(scope="module")
def one():
    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return shared_fits.everything(False)
    finally:
        torch.set_default_dtype(torch.float32)


def test_gradients_and_draws_are_those_of_one_process(one, two):
    (first, _), _, _ = two
    assert set(one) <= set(first)
    for name, wanted in one.items():
        scale = 1e-6 * wanted.abs().max()
        assert ((first[name] - wanted).abs() <= scale).all(), name


def test_all_processes_have_the_same_posterior_to_the_bit(two):
    (first, second), _, _ = two
    assert set(first) == set(second)
    for name, each in first.items():
        assert torch.equal(each, second[name]), name


def test_processes_that_were_stopped_go_on_to_the_same_bits(two):
    (first, _), _, folder = two
    for site in ("w", "sigma"):
        assert torch.equal(first[f"resumed/{site}"], first[f"svi/{site}"])
    names = {path.name for path in (folder / "run").iterdir()}
    assert names == {"fit.safetensors", "posterior.safetensors", "lock"}


@pytest.mark.parametrize(
    ("which", "says"),
    [
        ("seed", "DataError: The processes differ in their data, model, settings or seed"),
        ("data", "DataError: The processes differ in their data"),
        ("few", "DataError: 1 rows cannot be shared among 2 processes"),
        ("shards", "DataError: The processes differ in their data"),
        ("method", "ModelError: NUTS cannot share a fit .*; MAP, SVI can"),
        ("size", r"ModelError: MAP\(batch_size=5\) in 2 processes.*multiple of 2"),
        ("rows", r"ModelError: SVI\(estimator=\"local\"\) draws noise for each row"),
    ],
)
def test_what_cannot_be_shared_is_said_by_all(two, which, says):
    _, said, _ = two
    for each in said:
        assert re.search(says, each[which])


def test_a_process_that_dies_is_an_error_of_the_others(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    command = [sys.executable, *SCRIPT, "alone", str(tmp_path)]
    runs = [
        subprocess.Popen(command, cwd=ROOT, env=LOCAL | where | {"RANK": str(rank)})
        for rank in (0, 1)
    ]
    try:
        assert runs[1].wait(120) == 9
        start = time.monotonic()
        assert runs[0].wait(60) == 0
        assert time.monotonic() - start < 30
    finally:
        for run in runs:
            run.kill()
    said = json.loads((tmp_path / "said-0.json").read_text())
    assert "Process 0 of 2 has lost another one" in said["left"]


def test_one_process_alone_is_told_how_to_start_several():
    with pytest.raises(bnn.ModelError, match="torchrun --nproc-per-node"):
        shared_fits.fit("map", True)


def test_rows_are_shared_or_parts_are_sent_not_both():
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="one of the two"):
        shared_fits.fit("map", True, executor=pool)
