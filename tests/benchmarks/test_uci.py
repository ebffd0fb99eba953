"""The UCI benchmark's scores against closed forms, and its file of results."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Normal

import bnn
from benchmarks import jobs as appended
from benchmarks import uci

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    """A made-up set in the published format, under the name of yacht: y = 100 + 20 x0 + noise."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 2))
    y = 100 + 20 * x[:, 0] + rng.normal(size=60)
    there = tmp_path / "data" / uci.SETS["yacht"]
    there.mkdir(parents=True)
    np.savetxt(there / "data.txt", np.column_stack([x[:, 0], y, x[:, 1]]))
    (there / "index_features.txt").write_text("0\n2\n")
    (there / "index_target.txt").write_text("1\n")
    orders = [rng.permutation(60)[:6] for _ in range(3)]
    (there / "test_rows.txt").write_text("\n".join(" ".join(map(str, each)) for each in orders))
    return there


def test_a_split_is_the_files_rows(folder):
    table = np.loadtxt(folder / "data.txt").astype(np.float32)
    tests = [list(map(int, line.split())) for line in open(folder / "test_rows.txt")]
    rows = uci.split(folder, 1)
    np.testing.assert_array_equal(rows.x_test, table[tests[1]][:, [0, 2]])
    np.testing.assert_array_equal(rows.y_test, table[tests[1], 1])
    both = np.concatenate([rows.y, rows.y_test])
    np.testing.assert_array_equal(np.sort(both), np.sort(table[:, 1]))


def test_inner_rows_are_training_rows(folder):
    rows, inner = uci.split(folder, 1), uci.split(folder, 1, inner=True)
    assert len(inner.y_test) == len(rows.y) // 5
    both = np.concatenate([inner.y, inner.y_test])
    np.testing.assert_array_equal(np.sort(both), np.sort(rows.y))


def test_scores_of_a_gaussian_predictive():
    rng = np.random.default_rng(1)
    mean, sd = np.linspace(-300, 300, 4_000), np.linspace(1, 50, 4_000)
    y = mean + sd * rng.normal(size=4_000)
    draws = mean + sd * rng.normal(size=(2_000, 4_000))
    density = Normal(torch.as_tensor(mean), torch.as_tensor(sd)).log_prob(torch.as_tensor(y))
    found = uci.scores(y, mean + 3, draws, density.numpy())
    # E[(y - mean - 3)^2] = E[sd^2] + 9 and E[log density] = -log sd - log(2 pi e) / 2
    assert found["rmse"] == pytest.approx(math.sqrt(np.mean(sd**2) + 9), rel=0.05)
    entropy = np.mean(np.log(sd)) + 0.5 * math.log(2 * math.pi * math.e)
    assert found["log_likelihood"] == pytest.approx(-entropy, abs=4 * math.sqrt(0.5 / 4_000))
    assert found["coverage"] == pytest.approx(0.9, abs=4 * math.sqrt(0.09 / 4_000))


def test_the_predictive_is_a_mixture_in_the_units_of_y(folder):
    rows = uci.split(folder, 0)
    entry = uci.Entry("MAP", {"restarts": 3, "draws": 1, "schedule": "constant"})
    posterior = bnn.fit(
        entry.model("yacht", rows),
        rows.x,
        rows.y,
        method=entry.method("yacht", 54, 60),
        progress=False,
    )
    # The net by hand, in float64: (restart, row) means and standard deviations.
    net = {name: draws[:, 0].double() for name, draws in posterior.draws.items()}
    x, y = torch.tensor(rows.x).double(), torch.tensor(rows.y).double()
    z = (torch.tensor(rows.x_test).double() - x.mean(0)) / x.std(0, correction=0)
    h = torch.tanh(z @ net["layers.0.weight"].mT + net["layers.0.bias"][:, None])
    out = h @ net["layers.1.weight"].mT + net["layers.1.bias"][:, None]
    unit = y.std(correction=0)
    each = Normal(y.mean() + unit * out[..., 0], unit * torch.nn.functional.softplus(out[..., 1]))
    y_test = torch.tensor(rows.y_test).double()
    density = (each.log_prob(y_test).logsumexp(0) - math.log(3)).mean()
    below = each.cdf(y_test).mean(0)  # of the mixture
    assert uci.taken(posterior, entry) == 60
    found = uci.predicted(posterior, rows)
    assert found["log_likelihood"] == pytest.approx(float(density), abs=1e-3)
    error = (each.mean.mean(0) - y_test).square().mean().sqrt()
    assert found["rmse"] == pytest.approx(float(error), rel=1e-4)
    # 2,000 draws place a quantile within .005 of 5 %: no row of this seed is that near the ends.
    assert (below - 0.05).abs().min() > 0.02
    assert (below - 0.95).abs().min() > 0.02
    inside = ((below >= 0.05) & (below <= 0.95)).double().mean()
    assert found["coverage"] == pytest.approx(float(inside))


def test_published_rows_are_read_as_printed():
    found = uci.published()
    assert set(found) == set(uci.SETS)
    assert {len(rows) for rows in found.values()} == {9}
    assert found["power"]["MC dropout 2"] == (uci.Score(4.01, 0.04), uci.Score(-2.81, 0.01))
    rmse, density = found["yacht"]["Deep ensemble"]
    assert (rmse.mean, density.mean) == (1.58, -1.18)
    assert density.error == pytest.approx(0.21 / math.sqrt(20))  # a standard deviation
    rmse, density = found["wine"]["MFVI"]
    assert math.isnan(rmse.mean)
    assert (density.mean, density.error) == (-0.92, 0.01)
    assert math.isnan(found["concrete"]["PBP"][1].error)
    with pytest.raises(ValueError, match="no published number"):
        uci.Score.read("1.2+-3")
    assert {entry.beside for entry in uci.METHODS.values()} <= {"", *found["yacht"]}


def test_a_gain_is_told_in_standard_errors_of_both():
    ours = uci.Score.of([-1.0, -2.0, -3.0])
    assert (ours.mean, ours.error) == (-2.0, pytest.approx(1 / math.sqrt(3)))
    gain, errors = ours.above(uci.Score(-3.0, 0.5))
    assert (gain, errors) == (1.0, pytest.approx(1 / math.sqrt(1 / 3 + 0.25)))
    assert ours.above(uci.Score(-3.0))[1] == pytest.approx(math.sqrt(3))  # theirs unknown
    assert math.isnan(uci.Score.of([-1.0]).above(uci.Score(-3.0, 0.5))[1])  # ours unknown


def test_every_method_has_the_same_budget():
    for rows in (300, 5_000):
        one = uci.Entry("MAP").method("yacht", rows, 1_000)
        five = uci.Entry("MAP", {"restarts": 5}).method("yacht", rows, 1_000)
        assert (one.steps, five.steps) == (1_000, 200)
        assert one.batch_size == (None if rows == 300 else uci.ROWS)
        nuts = uci.Entry("NUTS", {"max_tree_depth": 2}, shares={"draws": 1.0})
        draws = nuts.method("yacht", rows, 192_000).draws  # of three gradients, 16 chains
        assert draws == 4_000 // max(1, rows // uci.ROWS)  # of all rows
        less = uci.Entry("MAP", enough={"yacht": 0.25}).method("yacht", rows, 1_000)
        assert less.steps == 250


def test_what_took_more_than_the_budget_is_told_and_is_not_the_best(capsys):
    scores = {"rmse": 1.0, "coverage": 0.9, "seconds": 1.0, "gradients": 1_000}
    rows = {"MAP": (1_000, -3.0), "SGHMC": (1_200, -2.0), "MCLMC": (3_000, -1.0)}
    results = [
        scores | {"name": name, "taken": taken, "log_likelihood": density}
        for name, (taken, density) in rows.items()
    ]
    uci.tell("yacht", results, "yacht")
    told = capsys.readouterr().out
    assert "3,000 (3.0 x)" in told
    assert "1,200 |" in told
    assert "Best within the budget: SGHMC, -2.000" in told
    uci.tell("yacht", results[2:], "yacht")
    assert "Best" not in capsys.readouterr().out
    uci.tell("yacht", [*results, results[0]], "yacht")  # the others have fewer splits
    told = capsys.readouterr().out
    assert "Best within the budget: MAP" in told
    assert told.index("| MAP") < told.index("| MCLMC") < told.index("| SGHMC")


def test_a_prior_scale_of_one_set_is_that_sets(folder):
    rows = uci.split(folder, 0)
    entry = uci.Entry("MAP", scales={"yacht": 0.01})
    assert "scale 0.01" in entry.told("yacht", 60, 50)
    assert f"scale {uci.SCALE}" in entry.told("wine", 60, 50)
    draws = bnn.prior_predictive(entry.model("yacht", rows), rows.x, draws=20, seed=0).f
    wide = bnn.prior_predictive(uci.Entry("MAP").model("yacht", rows), rows.x, draws=20, seed=0).f
    # One scale for all weights: f of weights .01 varies over the rows by less than a tenth.
    assert draws.std(2).mean() < 0.1 * wide.std(2).mean()


def test_a_prior_by_layer_is_wider_where_it_says():
    parameter = {name: torch.zeros(shape) for name, shape in (("0", (50, 8)), ("1", (2, 50)))}
    hidden, last = (
        uci.ByLayer(2.0, 3.0)(f"layers.{name}.weight", each, None).stddev
        for name, each in parameter.items()
    )
    assert torch.allclose(hidden, torch.tensor(2 / math.sqrt(8)))
    assert torch.allclose(last[0], torch.tensor(3 / math.sqrt(50)))
    assert torch.allclose(last[1], torch.tensor(1 / math.sqrt(50)))  # the noise
    bias = uci.ByLayer(2.0, 3.0)("layers.0.bias", torch.zeros(50), None)
    assert torch.equal(bias.stddev, torch.ones(50))


def test_an_absent_method_is_left_out_with_the_reason():
    for entry in (uci.Entry("Oracle"), uci.Entry("MAP", {"wisdom": 3})):
        with pytest.raises(uci.Absent, match=r"Oracle|wisdom"):
            entry.method("yacht", 100, 1_000)


def test_results_survive_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    jobs = [uci.Job("yacht", number, "MAP", "settings") for number in range(3)]
    results = [uci.dataclasses.asdict(job) | {"seconds": 1.5} for job in jobs]
    appended.append(path, results[0])
    with path.open("a") as file:
        file.write('{"set": "yacht", "spl')
    appended.append(path, results[2])
    assert uci.finished(path) == {jobs[0]: results[0], jobs[2]: results[2]}
    left = uci.forecast([jobs[1]] * 80, uci.finished(path), 2)
    assert "80 fits to go: about 1 min" in left


@pytest.mark.slow
def test_a_run_goes_on_where_it_ended(folder, tmp_path):
    out = tmp_path / "results.jsonl"
    settings = uci.METHODS["MAP"].told("yacht", 60, 50)
    done = uci.Job("yacht", 0, "MAP", settings, gradients=50)
    appended.append(out, uci.run(done, folder.parent))
    command = [sys.executable, "-m", "benchmarks.uci", "--data", folder.parent, "--out", out]
    command += ["--sets", "yacht", "wine", "--methods", "MAP", "--gradients", "50", "--splits", "2"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "1 fit to go" in run.stderr
    assert [job.split for job in uci.finished(out)] == [0, 1]
    assert "skipped wine: no folder" in run.stdout
    assert "\n| MAP " in run.stdout
    assert "\n| *DVI*" in run.stdout


def test_the_published_sets_have_20_splits():
    if not uci.FOLDER.is_dir():
        pytest.skip(f"no folder {uci.FOLDER}: the sets are no part of the repository")
    for name, count in {"yacht": 308, "concrete": 1_030, "wine": 1_599, "power": 9_568}.items():
        for number in (0, uci.SPLITS - 1):
            rows = uci.split(uci.FOLDER / uci.SETS[name], number)
            assert len(rows.y) + len(rows.y_test) == count
            assert len(rows.y_test) == pytest.approx(count / 10, abs=1)
