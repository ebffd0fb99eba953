"""`python -m bnn` on tables of the kinds people have."""

import os
import subprocess
import sys

import arviz as az
import numpy as np
import pandas as pd
import pytest

import bnn
from bnn import __main__ as command

ROWS = 40
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setattr(
        command,
        "METHODS",
        {"svi": bnn.SVI(steps=30, draws=20), "map": bnn.MAP(steps=30, draws=20)},
    )


@pytest.fixture
def table():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.standard_normal((ROWS, 2)), columns=["age", "body mass"])
    return frame.assign(t=frame["age"] - frame["body mass"])


@pytest.fixture
def call(tmp_path, capsys):
    def call(frame, *options, target="t"):
        """(exit status, what it printed, what it complained of)"""
        file = tmp_path / "table.csv"
        if isinstance(frame, pd.DataFrame):
            frame.to_csv(file, index=False)
        else:
            file.write_bytes(frame)
        named = ["--target", target] if target else []
        out = ["--method", "map", "--out", str(tmp_path / "out")]
        status = command.main([str(file), *named, *out, *options])
        return status, *capsys.readouterr()

    return call


def test_a_numeric_target_is_regressed_on(call, table, tmp_path):
    status, out, err = call(table, "--method", "map", "svi")
    assert (status, err) == (0, "")
    assert "40 rows, 2 inputs" in out
    assert "32 rows to fit, 8 held out" in out
    written = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*")}
    assert written == {
        "map/posterior.nc", "svi/posterior.nc", "comparison.csv", "predictions.png",
        "calibration.png",
    }  # fmt: skip
    comparison = pd.read_csv(tmp_path / "out" / "comparison.csv", index_col=0)
    assert set(comparison.index) == {"map", "svi"}
    assert np.isfinite(comparison[["log_score", "rmse", "coverage_90"]]).all(axis=None)
    for file in (tmp_path / "out").glob("*.png"):
        assert file.read_bytes().startswith(b"\x89PNG")
    tree = az.from_netcdf(tmp_path / "out" / "svi" / "posterior.nc")
    assert tree["posterior"]["layers.0.weight"].shape == (1, 20, command.HIDDEN, 2)
    assert tree["predictions"]["y"].shape == (1, 20, 8)
    assert list(tree["constant_data"].coords["x_column"].values) == ["age", "body mass"]


@pytest.mark.parametrize(
    "labels",
    [["no", "yes"], ["a", "b", "c"], [False, True], [0, 1], [1.0, 2.0]],
    ids=["two", "three", "bool", "zero-one", "one-two"],
)
def test_a_target_of_text_or_two_values_is_told_apart(call, table, tmp_path, labels):
    kinds = pd.qcut(table["t"], len(labels), labels=False)
    status, out, err = call(table.assign(t=[labels[k] for k in kinds]))
    assert (status, err) == (0, "")
    assert f"({len(labels)} classes)" in out
    assert "accuracy" in pd.read_csv(tmp_path / "out" / "comparison.csv").columns
    assert not (tmp_path / "out" / "predictions.png").exists()
    tree = az.from_netcdf(tmp_path / "out" / "map" / "posterior.nc")
    assert set(np.unique(tree["observed_data"]["y"])) == set(range(len(labels)))


def test_rows_with_missing_values_are_left_out_and_counted(call, table):
    table.loc[:2, "age"] = np.nan
    table.loc[5, "t"] = np.nan
    table.loc[6, "age"] = np.inf
    status, out, _ = call(table.assign(empty=np.nan))
    assert status == 0
    told = 'note: 5 of 40 rows have missing or infinite values (4 in "age", 1 in "t"); left out.'
    assert told in out
    assert "35 rows, 2 inputs" in out


def test_text_columns_become_one_column_a_value(call, table):
    status, out, _ = call(table.assign(city=["Rome", "Oslo", "Lima", "Kyiv"] * 10))
    assert status == 0
    assert "note: the text columns ['city']" in out
    assert "6 inputs" in out


def test_the_index_that_pandas_wrote_is_left_out(call, table):
    status, out, _ = call(table.reset_index(names=""))
    assert status == 0
    assert "note: the first column has no name and numbers the rows" in out
    assert "2 inputs" in out
    status, out, _ = call(table.reset_index(names="").assign(**{"": table["age"]}))
    assert status == 0
    assert "3 inputs" in out


def test_few_different_numbers_are_numbers_and_it_is_said(call, table):
    status, out, _ = call(table.assign(t=[3, 4, 5, 6] * 10))
    assert status == 0
    assert 'note: the target "t" has 4 different values, and is taken for a number' in out
    assert '"t" (a number)' in out


def test_constant_columns_are_left_out(call, table):
    status, out, _ = call(table.assign(one=1.0, word="same"))
    assert status == 0
    assert "2 inputs" in out
    assert "note: the columns ['one', 'word_same'] are constant" in out


def test_the_seed_decides(call, table, tmp_path):
    scores = []
    for seed in ("1", "1", "2"):
        call(table, "--seed", seed)
        scores.append(pd.read_csv(tmp_path / "out" / "comparison.csv")["log_score"][0])
    assert scores[0] == scores[1] != scores[2]


@pytest.mark.parametrize(
    ("change", "options", "target", "message"),
    [
        (lambda t: t, [], "weight", 'no column "weight" (columns: age, body mass, t)'),
        (lambda t: t, [], None, "Say which column to predict"),
        (lambda t: t.assign(t=np.nan), [], "t", "has no value in any row"),
        (lambda t: t.assign(t=1.0), [], "t", "is the same in every row"),
        (lambda t: t.assign(t="x"), [], "t", "is the same in every row"),
        (lambda t: t.assign(t=[f"label {i}" for i in range(ROWS)]), [], "t", "at most 20"),
        (lambda t: t.assign(id=[f"row {i}" for i in range(ROWS)]), [], "t", "['id'] have more"),
        (lambda t: t[["t"]], [], "t", "no column that tells rows apart"),
        (lambda t: t.assign(**{"age": 1, "body mass": 2}), [], "t", "no column that tells"),
        (lambda t: t[:5], [], "t", "5 rows without missing values (none is missing); at least 10"),
        (
            lambda t: t.assign(few=[1.0] * 5 + [np.nan] * 35), [], "t",
            '5 rows without missing values (35 in "few"); at least 10 are needed. Drop the col',
        ),
        (lambda t: t.assign(t="$" + t["t"].astype(str)), [], "t", "without units or commas"),
        (lambda t: b"a;t\n1;2\n", [], "t", "has semicolons between its columns. Write commas"),
        (lambda t: t, ["--test-share", "0.99"], "t", "leaves 0 of 40 rows to fit"),
        (lambda t: b"", [], "t", "cannot be read as a CSV table"),
        (lambda t: b"t,a\n1,2\n1,2,3\n", [], "t", "cannot be read as a CSV table"),
        (lambda t: bytes(range(128, 256)), [], "t", "cannot be read as a CSV table"),
    ],
)  # fmt: skip
def test_what_cannot_be_fitted_is_told_in_one_line(call, table, change, options, target, message):
    status, _, err = call(change(table), *options, target=target)
    assert status == 1
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_a_file_that_is_not_there_is_told_in_one_line(tmp_path):
    there = [sys.executable, "-m", "bnn", str(tmp_path / "none.csv"), "--target", "t"]
    done = subprocess.run(there, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 1
    assert "none.csv" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "options", [["--method", "magic"], ["--seed", "-1"], ["--seed", "x"], ["--test-share", "1"]]
)
def test_an_option_that_is_none_shows_the_usage(options, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(options)
    assert stopped.value.code == 2
    assert f"argument {options[0]}" in capsys.readouterr().err


@pytest.mark.slow
def test_without_arguments_it_fits_the_diabetes_study(tmp_path):
    """The README's command. Linear regression scores rmse 55 on such a split, y has sd 77."""
    done = subprocess.run(
        [sys.executable, "-m", "bnn"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert done.returncode == 0, done.stderr
    comparison = pd.read_csv(tmp_path / "bnn-output" / "comparison.csv", index_col=0)
    assert set(comparison.index) == {"svi", "nuts"}
    assert comparison["rmse"].max() < 62
    assert comparison["coverage_90"].between(0.8, 0.98).all()
