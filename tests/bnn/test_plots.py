"""Pictures: where they are drawn, what they say, and what they refuse."""

from dataclasses import replace
from itertools import pairwise

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pandas
import pytest
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb

import bnn
from bnn import SBC, DataError, Prediction, calibration, plots
from bnn.diagnostics import Finding, Report
from bnn.plots import _style
from bnn.selective import risk_coverage

ROWS = 40
DRAWS = torch.randn(1, 200, ROWS, generator=torch.Generator().manual_seed(0))
Y = torch.linspace(-3, 3, ROWS)
LABELS = torch.arange(ROWS) % 3
X = torch.linspace(1, -1, ROWS)  # not sorted upwards: the plots have to


def numbers(shift=0.0):
    y = DRAWS + shift
    return Prediction(f=y, y=y, mean=y.mean((0, 1)), aleatoric=Y * 0 + 1, epistemic=Y * 0)


def curve(draws=200, chains=2, inputs=(X,)):
    """Mean x with epistemic sd .5 and noise of sd 1: f and y are what they say."""
    noise = torch.Generator().manual_seed(1)
    f = X + 0.5 * torch.randn(chains, draws, ROWS, generator=noise)
    y = f + torch.randn(f.shape, generator=noise)
    mean, spread = f.mean((0, 1)), f.flatten(0, 1).var(0, correction=0)
    return Prediction(f=f, y=y, mean=mean, aleatoric=Y * 0 + 1, epistemic=spread, inputs=inputs)


def labels():
    probs = torch.softmax(DRAWS[0, :3].T, -1)  # (row, class)
    y = LABELS.expand(1, 200, ROWS)
    return Prediction(
        f=DRAWS, y=y, mean=probs @ torch.arange(3.0), aleatoric=Y, epistemic=Y, probs=probs
    )


def several(prediction):
    """The same four times, as four outputs of a row."""
    parts = ("f", "y", "mean", "aleatoric", "epistemic")
    return Prediction(**{k: torch.stack([getattr(prediction, k)] * 4, -1) for k in parts})


def ranks(power=1.0):
    """Of three quantities in 100 replicates, among 9 draws."""
    u = torch.rand(100, 3, generator=torch.Generator().manual_seed(2)) ** power
    names = ("a", "f[0]", "log_likelihood")
    return SBC((u * 10).long(), names, 9, torch.zeros(3), {}, 1.0)


CURVE = risk_coverage([0.1, 0.2, 0.3, 0.4], [0.0, 1.0, 0.0, 3.0])
TABLE = pandas.DataFrame(
    {"log_score": [-1.0, -0.5], "log_score_se": [0.1, float("nan")]}, index=["worse", "better"]
)
HISTORY = torch.cat([torch.linspace(-1e6, -100, 50), torch.linspace(-100, -10, 450)])

PLOTS = {
    "band": lambda **k: plots.band(curve(), (X, Y), **k),
    "decomposition": lambda **k: plots.decomposition(curve(), **k),
    "functions": lambda **k: plots.functions(curve(), **k),
    "trace": lambda **k: plots.trace(curve(chains=3), **k),
    "history": lambda **k: plots.history({"a": HISTORY, "b": HISTORY, "c": HISTORY}, **k),
    "pit": lambda **k: plots.pit({"a": numbers(), "b": numbers(1.0)}, Y, **k),
    "risk_coverage": lambda **k: plots.risk_coverage({"a": CURVE, "b": CURVE}, **k),
    "sbc": lambda **k: plots.sbc(ranks(), **k),
    "truth": lambda **k: plots.truth(numbers(), Y, **k),
    "coverage": lambda **k: plots.coverage({"a": numbers(), "b": numbers(1.0)}, Y, **k),
    "reliability": lambda **k: plots.reliability({"a": labels(), "b": labels()}, LABELS, **k),
}


def told(ax):
    """What the legend says."""
    return [text.get_text() for text in ax.get_legend().get_texts()]


def area(ax, i):
    """(x, lower, upper) of the i-th filled area, by x."""
    path = ax.collections[i].get_paths()[0].vertices
    x = np.unique(path[:, 0])
    ends = [path[path[:, 0] == v, 1] for v in x]
    return x, np.array([v.min() for v in ends]), np.array([v.max() for v in ends])


def line_of(ax, label):
    """(x, y) of the line of that label."""
    (line,) = [each for each in ax.get_lines() if each.get_label() == label]
    return np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)


@pytest.fixture(autouse=True)
def _closed():
    pyplot.close("all")  # what other tests of the process left
    yield
    pyplot.close("all")


@pytest.fixture(params=PLOTS)
def plot(request):
    return PLOTS[request.param]


def test_a_plot_opens_one_figure_and_returns_its_axes(plot):
    ax = plot(title="Title")
    assert isinstance(ax, Axes)
    assert pyplot.get_fignums() == [1]
    assert ax.get_title() == "Title"
    ax.figure.savefig("/dev/null", format="png")


def test_a_plot_draws_where_it_is_told(plot):
    _, (first, second) = pyplot.subplots(1, 2)
    assert plot(ax=second) is second
    assert pyplot.get_fignums() == [1]
    assert second.has_data()
    assert not first.has_data()


def test_axes_tell_their_units():
    ax = plots.truth(numbers(), Y, unit="mg/dl")
    assert ax.get_xlabel() == "observed (mg/dl)"
    assert ax.get_ylabel() == "predicted (mg/dl)"
    assert "(" not in plots.truth(numbers(), Y).get_xlabel()
    assert "probability" in plots.coverage(numbers(), Y).get_xlabel()
    assert "probability" in plots.reliability(labels(), LABELS).get_xlabel()
    assert plots.band(curve(), unit="m", label="t (s)").get_ylabel() == "y (m)"
    assert plots.band(curve(), label="t (s)").get_xlabel() == "t (s)"
    assert plots.decomposition(curve(), unit="m").get_ylabel() == "variance of y (m²)"
    assert plots.decomposition(curve(), unit="m/s").get_ylabel() == "variance of y ((m/s)²)"
    assert plots.decomposition(labels()).get_ylabel() == "entropy of the label (nats)"
    assert plots.functions(curve(), unit="m").get_ylabel() == "f (m)"
    assert plots.trace(curve(), unit="m").get_ylabel().endswith("(m)")
    assert plots.risk_coverage(CURVE, risk="cost", unit="EUR").get_ylabel() == "cost of those (EUR)"
    assert "(nats" in plots.history(HISTORY).get_ylabel()
    assert "(nats" in plots.compare(TABLE).get_xlabel()


# Labels, and what the limits of x and of y have to hold without leaving much of the picture empty.
LEVELS = ("level of the interval (probability)", "share of rows inside (frequency)")
RIGHT = ("stated probability of the predicted label", "share of right labels (95 % interval)")
UNIFORM = "share below, less the uniform one"
FRAMES = {
    "band": ("x", "y", (-1, 1), (-3, 3)),
    "decomposition": ("x", "variance of y", (-1, 1), (0, 1.25)),
    "functions": ("x", "f", (-1, 1), (-1.9, 2.3)),
    "trace": ("draw", "f, mean ± standard deviation", (0, 200), (-27, 3)),
    "history": ("step", "objective, larger is better (nats)", (0, 500), (-100, -10)),
    "pit": ("PIT value (probability)", UNIFORM, (0, 1), (-0.4, 0.4)),
    "risk_coverage": ("share of rows kept, the surest first", "mean loss of those", (0, 1), (0, 1)),
    "sbc": ("rank of the truth / 10", UNIFORM, (0, 1), (-0.14, 0.14)),
    "truth": ("observed", "predicted", (-3, 3), (-3, 3)),
    "coverage": (*LEVELS, (0, 1), (0, 1)),
    "reliability": (*RIGHT, (0, 1), (0, 1)),
    "compare": ("log score of a row (nats), ± standard error", "", (-1.1, -0.5), (-0.4, 1.4)),
}


@pytest.mark.parametrize("name", FRAMES)
def test_labels_and_limits(name):
    ax = PLOTS[name]() if name in PLOTS else plots.compare(TABLE)
    x, y, *held = FRAMES[name]
    assert set(FRAMES) >= set(PLOTS)
    assert (ax.get_xlabel(), ax.get_ylabel()) == (x, y)
    assert (ax.xaxis_inverted(), ax.yaxis_inverted()) == (False, name == "compare")  # best on top
    limits = sorted(ax.get_xlim()), sorted(ax.get_ylim())
    for (low, high), (first, last) in zip(limits, held, strict=True):
        assert low <= first < last <= high
        assert high - low < 1.25 * (last - first)


def test_every_series_is_in_the_legend(plot):
    ax = plot()
    texts = told(ax)
    assert len(texts) == len(set(texts)) >= 2


def test_truth_counts_the_rows_inside_the_interval():
    lower, upper = numbers().interval(0.5)
    inside = int(((Y >= lower) & (Y <= upper)).sum())
    ax = plots.truth(numbers(), Y, level=0.5)
    texts = told(ax)
    assert texts[0] == f"inside its 50% interval ({inside})"
    assert texts[1] == f"outside its 50% interval ({ROWS - inside})"
    within, outside = (c.get_offsets() for c in ax.collections if c.get_label() in texts)
    dots = np.concatenate([within, outside])
    expected = np.stack([Y, numbers().mean], -1)
    np.testing.assert_allclose(dots[dots[:, 0].argsort()], expected, rtol=1e-6)
    bars = np.concatenate([np.array(c.get_segments()) for c in ax.collections[::2]])
    bars = bars[bars[:, 0, 0].argsort()]  # (row, end, x or y)
    np.testing.assert_allclose(bars[:, :, 1], np.stack([lower, upper], -1), rtol=1e-6)
    ends = [min(float(Y.min()), float(lower.min())), max(float(Y.max()), float(upper.max()))]
    x, y = line_of(ax, "prediction = truth")
    assert x.tolist() == y.tolist() == pytest.approx(ends)


def test_coverage_draws_the_observed_shares():
    ax = plots.coverage(numbers(), Y)
    line = next(line for line in ax.get_lines() if line.get_label() == "observed")
    for level, share in zip(*line.get_data(), strict=True):
        lower, upper = numbers().interval(float(level))
        assert share == pytest.approx(((Y >= lower) & (Y <= upper)).float().mean().item(), abs=0.03)
    assert [each.tolist() for each in line_of(ax, "calibrated")] == [[0, 1], [0, 1]]
    level, lower, upper = area(ax, 0)
    half = 1.96 * np.sqrt(level * (1 - level) / ROWS)  # binomial, 95 %
    assert upper == pytest.approx(np.minimum(level + half, 1), abs=1e-6)
    assert lower == pytest.approx(np.maximum(level - half, 0), abs=1e-6)


def test_calibrated_counts_lie_on_the_diagonal():
    """Draws of the law itself: intervals of whole numbers hold up to .36 more than they say."""
    generator = torch.Generator().manual_seed(0)
    rate = torch.full((1, 300, 2_000), 0.3)
    y, drawn = torch.poisson(rate[0, 0], generator=generator), torch.poisson(rate, generator)
    mean = drawn.mean((0, 1))
    made = Prediction(f=rate, y=drawn, mean=mean, aleatoric=mean, epistemic=0 * mean)
    level, share = line_of(plots.coverage(made, y), "observed")
    # Four binomial errors of 2,000 rows: 300 draws place a PIT value within less than that.
    assert (abs(share - level) < 4 * np.sqrt(level * (1 - level) / 2_000)).all()


def test_the_band_of_chance_counts_rows_not_outputs():
    outputs = torch.stack([Y] * 4, -1)
    drawn = [plots.coverage(numbers(), Y), plots.coverage(several(numbers()), outputs)]
    one, other = (ax.collections[0].get_paths()[0].vertices for ax in drawn)
    assert np.allclose(one, other)


@pytest.mark.filterwarnings("error")
def test_observations_may_be_pandas_objects():
    plots.coverage(numbers(), pandas.Series(Y.numpy()))
    plots.truth(numbers(), pandas.Series(Y.numpy()))
    plots.pit(numbers(), pandas.Series(Y.numpy()))
    plots.reliability(labels(), pandas.Series(LABELS.numpy()))


def test_reliability_draws_the_share_of_right_labels():
    ax = plots.reliability(labels(), LABELS, bins=1)
    line = next(line for line in ax.get_lines() if len(line.get_xdata()) == 1)
    stated, label = labels().probs.max(-1)
    assert line.get_xdata()[0] == pytest.approx(stated.mean().item())
    assert line.get_ydata()[0] == pytest.approx((label == LABELS).float().mean().item())
    curve = calibration.reliability(labels().probs, LABELS, bins=1)
    (segments,) = (c.get_segments() for c in ax.containers[0].lines[2])
    assert segments[0][:, 1] == pytest.approx([curve.lower.item(), curve.upper.item()])
    assert (ax.get_xlim(), ax.get_ylim()) == ((0, 1.02), (0, 1.05))
    assert [each.tolist() for each in line_of(ax, "calibrated")] == [[0, 1], [0, 1]]


def logits():
    """Three classes, of two chains of 50 draws: each draw has probabilities of its own."""
    noise = torch.Generator().manual_seed(3)
    f = 2 * DRAWS[0, :3].T + 0.5 * torch.randn(2, 50, ROWS, 3, generator=noise)
    probs = f.softmax(-1).mean((0, 1))
    return replace(labels(), f=f, y=LABELS.expand(2, 50, ROWS), outcomes=None, probs=probs)


def test_reliability_draws_what_the_posterior_leaves_open():
    ax = plots.reliability(logits(), LABELS, bins=4, band="posterior")
    draws = logits().f.softmax(-1)
    curve = calibration.reliability(logits().probs, LABELS, bins=4, draws=draws)
    x, share = line_of(ax, "observed")
    assert (x, share) == (
        pytest.approx(curve.stated.numpy()),
        pytest.approx(curve.observed.numpy()),
    )
    (bars,) = ax.collections
    ends = np.array([each[:, 1] for each in bars.get_segments()])
    assert ends[:, 0] == pytest.approx(curve.lower.numpy())
    assert ends[:, 1] == pytest.approx(curve.upper.numpy())
    assert [each[0, 0] for each in bars.get_segments()] == pytest.approx(x)
    assert told(ax) == ["calibrated", "observed", "draws"]
    assert ax.get_ylabel() == "share of right labels (95 % of draws)"
    ax = plots.reliability({"a": logits(), "b": logits()}, LABELS, band="posterior")
    assert told(ax) == ["calibrated", "a", "a: draws", "b", "b: draws"]


def test_probabilities_at_draws_are_read_off_f_in_whatever_way_they_stand_there():
    f = logits().f
    torch.testing.assert_close(logits().draw_probs, f.softmax(-1))
    stated = replace(logits(), f=f.softmax(-1))
    torch.testing.assert_close(stated.draw_probs, f.softmax(-1))
    two = f[..., 0]
    probs = torch.stack([(-two).sigmoid(), two.sigmoid()], -1)
    coin = replace(logits(), f=two, probs=probs.mean((0, 1)))
    torch.testing.assert_close(coin.draw_probs, probs)
    torch.testing.assert_close(replace(coin, f=two.sigmoid()).draw_probs, probs)
    even = torch.stack([probs, probs.flip(-1)], 1).flatten(1, 2)  # their softmax has this mean too
    both = replace(logits(), f=even, y=LABELS.expand(2, 100, ROWS), probs=even.mean((0, 1)))
    torch.testing.assert_close(both.draw_probs, even)
    for other in (replace(coin, f=two.exp()), replace(logits(), f=f.exp()), labels()):
        with pytest.raises(bnn.ModelError, match="cannot be read off f"):
            _ = other.draw_probs
    with pytest.raises(bnn.ModelError, match="number"):
        _ = numbers().draw_probs


def test_colours_can_be_told_apart_and_keep_their_meaning():
    parts = (plots.ALEATORIC, plots.EPISTEMIC, plots.TOTAL, plots.TRUTH)
    for palette in (plots.SERIES, parts):
        colours = [torch.tensor(to_rgb(c)) for c in palette]
        apart = [(a - b).norm() for i, a in enumerate(colours) for b in colours[:i]]
        assert min(apart) > 0.25
    assert len(set(plots.MARKERS)) == len(plots.SERIES) == len(plots.MARKERS)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: plots.truth(labels(), LABELS), "reliability"),
        (lambda: plots.coverage(labels(), LABELS), "reliability"),
        (lambda: plots.coverage({"a": numbers(), "b": labels()}, Y), "reliability"),
        (lambda: plots.reliability(numbers(), Y), "coverage"),
        (lambda: plots.reliability(labels(), LABELS, band="draws"), '"rows" or "posterior"'),
        (lambda: plots.truth(numbers(), Y[:-1]), r"\(40,\) and y has \(39,\)"),
        (lambda: plots.truth(numbers(), Y[:, None]), r"\(40, 1\)"),
        (lambda: plots.coverage(numbers(), Y[:-1]), "rows must be the same"),
        (lambda: plots.reliability(labels(), LABELS[:-1]), r"\(40,\) and y has \(39,\)"),
        (lambda: plots.reliability(labels(), LABELS[:, None]), r"\(40, 1\)"),
        (lambda: plots.band(labels()), "decomposition"),
        (lambda: plots.band(numbers()), "has none"),
        (lambda: plots.band(curve(), column=1), "column 1"),
        (lambda: plots.band(curve(), (X, Y[:-1])), r"40 rows and y of shape \(39,\)"),
        (lambda: plots.band(curve(), X), r"data=\(x, y\)"),
        (lambda: plots.band(curve(), level=1.0), "probability"),
        (lambda: plots.decomposition(numbers(), column=0), "has none"),
        (lambda: plots.functions(curve(), output=1), r"\(2, 200, 40\)"),
        (lambda: plots.functions(curve(), draws=0), "at least 1"),
        (lambda: plots.trace(curve(), rows=[40]), r"0\.\.39"),
        (lambda: plots.trace(curve(), rows=[]), r"0\.\.39"),
        (lambda: plots.pit(labels(), LABELS), "reliability"),
        (lambda: plots.pit(numbers()), r"plots.pit\(p, y\)"),
        (lambda: plots.pit(several(numbers()), Y), r"\(40, 4\), and plots.pit draws one"),
        (lambda: plots.truth(several(numbers()), several(numbers()).mean), "truth draws one"),
        (lambda: plots.truth(numbers(), Y * float("nan")), "y has 40 NaN"),
        (lambda: plots.pit([0.5, 2.0]), "in 0..1"),
        (lambda: plots.pit({"a": [0.5], "b": [0.5, 0.1]}), "other numbers of rows"),
        (lambda: plots.history({}), "nothing to draw"),
        (lambda: plots.history([float("inf")]), "no finite value"),
        (lambda: plots.compare(TABLE[["log_score"]]), "bnn.compare"),
        (lambda: plots.sbc(ranks(), quantities=["b"]), r"no \['b'\]; ranked were a, f\[0\]"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_cure(call, match):
    with pytest.raises(DataError, match=match):
        call()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: plots.band(Y), "posterior.predict"),
        (lambda: plots.functions(Y), "posterior.predict"),
        (lambda: plots.decomposition({"a": numbers()}), "posterior.predict"),
        (lambda: plots.risk_coverage(Y), "bnn.selective.risk_coverage"),
        (lambda: plots.sbc(Y), "bnn.sbc"),
        (lambda: plots.members(numbers(), X), "a posterior"),
    ],
)
def test_another_type_is_refused_with_what_to_pass(call, match):
    with pytest.raises(TypeError, match=match):
        call()


def named(*names):
    """Plots whose legend may stand in a corner, with names as users give them."""
    sure = Prediction(**vars(labels()) | {"probs": torch.eye(3)[LABELS] * 0.98 + 0.02 / 3})
    return {
        "coverage": lambda: plots.coverage(dict.fromkeys(names, numbers()), Y),
        "reliability": lambda: plots.reliability(dict.fromkeys(names, sure), LABELS),
    }


@pytest.mark.parametrize(
    "drawn",
    [PLOTS, named("a", "b"), named(*(f"RandomizedPriors, {k} members" for k in (5, 10, 20, 40)))],
    ids=["short", "sure", "long"],
)
def test_no_legend_covers_data(drawn):
    """It lies below the axes, or in a corner that no curve of the plot can reach."""
    for name, draw in drawn.items():
        ax = draw()
        ax.figure.canvas.draw()
        box, frame = ax.get_legend().get_window_extent(), ax.get_window_extent()
        inside = box.y1 > frame.y0
        assert not inside or name in ("coverage", "reliability"), name
        if inside:
            bars = [s for c in ax.collections for s in getattr(c, "get_segments", list)()]
            points = [*(v.get_xydata() for v in ax.get_lines()), *bars]
            points = ax.transData.transform(np.concatenate(points))
            assert not any(box.contains(*point) for point in points), name


def test_nothing_leaves_the_figure():
    for name, draw in PLOTS.items():
        ax = draw()
        ax.figure.canvas.draw()
        box, whole = ax.get_tightbbox(), ax.figure.bbox
        assert whole.x0 <= box.x0 + 1, name
        assert box.x1 <= whole.x1 + 1, name
        assert whole.y0 <= box.y0 + 1, name
        assert box.y1 <= whole.y1 + 1, name


def test_band_draws_the_mean_and_both_intervals_along_x():
    ax = plots.band(curve(2_000), (X, Y), level=0.8)
    x, mean = line_of(ax, "mean")
    assert (np.diff(x) > 0).all()
    assert mean == pytest.approx(curve(2_000).mean.flip(0).numpy())
    # 4,000 draws: an end of the 80 % interval of N(0, 1) has an error of .027 sds
    for i, sd in enumerate([1.25**0.5, 0.5]):
        _, lower, upper = area(ax, i)
        assert upper - mean == pytest.approx(1.2816 * sd, abs=0.12 * sd)
        assert mean - lower == pytest.approx(1.2816 * sd, abs=0.12 * sd)
    assert told(ax) == [
        "80% interval of y: with noise",
        "80% interval of the mean: epistemic",
        "mean",
        f"data, {ROWS} rows",
    ]
    assert [to_hex(c.get_facecolor()[0]) for c in ax.collections] == [
        to_hex(_style.tint(plots.ALEATORIC)),
        to_hex(_style.tint(plots.EPISTEMIC)),
    ]
    x, y = line_of(ax, f"data, {ROWS} rows")
    assert sorted(zip(x, y, strict=True)) == sorted(zip(X.tolist(), Y.tolist(), strict=True))


def test_band_of_few_members_is_that_of_the_mixtures_variance():
    ax = plots.band(curve(3))
    made = curve(3)
    for i, variance in enumerate([made.total, made.epistemic]):
        _, lower, upper = area(ax, i)
        assert (upper - lower) / 2 == pytest.approx(
            1.6449 * variance.sqrt().flip(0).numpy(), rel=1e-3
        )


def test_band_does_not_take_f_behind_a_link_for_the_mean():
    made = curve()
    other = Prediction(
        f=made.f.exp(),
        y=made.y,
        mean=made.mean,
        aleatoric=made.aleatoric,
        epistemic=made.epistemic,
        inputs=(X[:, None],),
    )
    _, lower, upper = area(plots.band(other), 1)
    half = 1.6449 * made.epistemic.sqrt().flip(0).numpy()
    assert (upper - lower) / 2 == pytest.approx(half, rel=1e-3)


def test_decomposition_stacks_the_parts():
    ax, made = plots.decomposition(curve()), curve()
    x, total = line_of(ax, "total")
    assert (np.diff(x) > 0).all()
    assert total == pytest.approx(made.total.flip(0).numpy())
    _, bottom, aleatoric = area(ax, 0)
    _, between, top = area(ax, 1)
    assert bottom == pytest.approx(0)
    assert aleatoric == pytest.approx(made.aleatoric.numpy())
    assert between == pytest.approx(aleatoric)
    assert top == pytest.approx(total)
    assert ax.get_ylim()[0] == 0
    assert [to_hex(c.get_facecolor()[0]) for c in ax.collections] == [
        to_hex(_style.tint(plots.ALEATORIC)),
        to_hex(_style.tint(plots.EPISTEMIC)),
    ]


def test_decomposition_of_rows_without_an_order_sorts_them():
    made = curve(inputs=(torch.randn(ROWS, 2),))
    ax = plots.decomposition(made)
    assert ax.get_xlabel() == "rows, by their total"
    assert (np.diff(line_of(ax, "total")[1]) >= 0).all()
    x, _ = line_of(plots.decomposition(made, column=1), "total")
    assert x == pytest.approx(made.inputs[0][:, 1].sort().values.numpy())


def test_decomposition_of_labels_names_the_parts_of_an_entropy():
    texts = told(plots.decomposition(labels()))
    assert texts == ["aleatoric: mean entropy", "epistemic: mutual information", "total"]


def test_functions_draws_so_many_and_the_mean_of_all():
    ax, made = plots.functions(curve(), draws=7), curve()
    lines = [line for line in ax.get_lines() if len(line.get_xdata()) == ROWS]
    assert len(lines) == 8
    pooled = made.f.flatten(0, 1).flip(1).numpy()
    assert lines[0].get_ydata() == pytest.approx(pooled[0])
    assert lines[6].get_ydata() == pytest.approx(pooled[-1])
    assert line_of(ax, "mean of all")[1] == pytest.approx(pooled.mean(0), abs=1e-6)
    assert told(ax)[0] == "7 of 400 draws"


def test_functions_of_one_class():
    made, f = labels(), torch.randn(1, 20, ROWS, 3)
    made = Prediction(
        f=f, y=made.y, mean=Y, aleatoric=Y, epistemic=Y, probs=made.probs, inputs=(X,)
    )
    mean = line_of(plots.functions(made, output=2), "mean of all")[1]
    assert mean == pytest.approx(f[0, :, :, 2].mean(0).flip(0).numpy(), abs=1e-6)
    with pytest.raises(DataError, match="output=0, 1"):
        plots.functions(made)


def test_trace_puts_each_row_into_a_lane_and_each_chain_into_a_colour():
    made = curve(chains=3)
    ax = plots.trace(made, rows=[5, 0])
    lines = [line for line in ax.get_lines() if len(line.get_xdata()) == 200]
    assert len(lines) == 6
    assert [to_hex(v.get_color()) for v in lines[:3]] == [c.lower() for c in plots.SERIES[:3]]
    for lane, row in enumerate([5, 0]):
        f = made.f[..., row]
        scaled = ((f - f.mean()) / f.std(correction=0)).clamp(-4, 4)
        for chain in range(3):
            drawn = lines[3 * lane + chain].get_ydata() - ax.get_yticks()[lane]
            assert drawn == pytest.approx(scaled[chain].numpy(), abs=1e-4)
        assert ax.get_yticklabels()[lane].get_text() == f"row {row}\n{f.mean():.3g} ± {f.std():.2g}"
    assert told(ax) == ["chain 1", "chain 2", "chain 3"]


def test_trace_of_a_constant_and_of_many_chains():
    made = numbers()
    flat = Prediction(f=made.f * 0, y=made.y, mean=Y, aleatoric=Y, epistemic=Y)
    assert "0 ± 0" in plots.trace(flat, rows=[0]).get_yticklabels()[0].get_text()
    ax = plots.trace(curve(chains=8))
    assert ax.get_legend() is None
    assert ax.texts[0].get_text() == "8 chains"


def test_history_shows_the_late_steps():
    ax = plots.history({"a": HISTORY, "b": HISTORY - 5})
    assert told(ax) == ["a", "b"]
    low, high = ax.get_ylim()
    assert -130 < low < -105
    assert -10 < high < 0
    assert line_of(ax, "a")[1][-200] == pytest.approx(float(HISTORY[-200]), abs=0.1)
    noisy = HISTORY + torch.randn(500, generator=torch.Generator().manual_seed(0))
    raw, middle = plots.history(noisy).get_lines()
    assert raw.get_ydata() == pytest.approx(noisy.numpy())
    assert abs(middle.get_ydata() - HISTORY.numpy())[100:-20].max() < 2  # of noise with sd 1
    ax = plots.history([-5.0, float("-inf"), -4.0])
    assert ax.get_legend() is None
    assert ax.get_lines()[-1].get_ydata().tolist() == [-5.0, -4.0]


def test_history_of_a_method_that_does_not_optimise_is_refused():
    posterior = fitted()
    object.__setattr__(posterior, "history", None)
    with pytest.raises(DataError, match=r'"nuts" by DeepEnsemble has no history.*plots.trace'):
        plots.history({"nuts": posterior})


def fitted(snapshots=6):
    model = bnn.models.mlp_regression(1, (3,))
    method = bnn.DeepEnsemble(members=4, steps=20, snapshots=snapshots)
    with pytest.warns(bnn.ConvergenceWarning, match="still rising"):
        return bnn.fit(model, X[:, None], Y, method=method, progress=False)


def test_members_draws_copies_of_the_training_and_its_end():
    posterior = fitted()
    several = plots.members(posterior, X[:, None], data=(X[:, None], Y), copies=3)
    assert pyplot.get_fignums() == [1]
    frames = posterior.frames
    shown = [frames[0], frames[round((len(frames) - 1) / 2)], frames[-1]]
    for ax, frame in zip(several, shown, strict=True):
        assert ax.get_title() == f"step {len(frame.history)}"
        f = frame.predict(X[:, None]).f[0].flip(1).numpy()
        lines = [line for line in ax.get_lines() if len(line.get_xdata()) == ROWS]
        assert len(lines) == 4 + 2  # the mean, and the data
        for line, values in zip(lines, f, strict=False):
            assert line.get_ydata() == pytest.approx(values)
    low, high = several[0].get_ylim()
    assert low < min(float(Y.min()), f.min())
    assert high > max(float(Y.max()), f.max())
    assert [ax.get_xlabel() for ax in several] == ["x", "x", "x"]
    assert [ax.get_ylabel() for ax in several] == ["f", "", ""]
    assert len(several[0].figure.legends[0].get_texts()) == 3


def test_members_of_one_axes_is_the_end():
    posterior = fitted()
    _, ax = pyplot.subplots()
    assert plots.members(posterior, X[:, None], ax=ax) is ax
    assert ax.get_title() == "step 20"
    assert plots.members(fitted(0), X[:, None]).get_title() == "step 20"
    with pytest.raises(DataError, match="2 copies are drawn, and 1 axes"):
        plots.members(posterior, X[:, None], copies=2, ax=[ax])


def test_the_film_has_a_picture_of_each_snapshot():
    posterior = fitted()
    film = plots.members_film(posterior, X[:, None], data=(X, Y))
    ax = pyplot.gcf().axes[0]
    for i, frame in enumerate(posterior.frames):
        film._func(i)
        assert ax.get_title() == f"step {len(frame.history)}"
        mean = frame.predict(X[:, None]).f[0].mean(0).flip(0)
        assert line_of(ax, "their mean")[1] == pytest.approx(mean.numpy(), abs=1e-6)
    film._draw_was_started = True  # else it warns that nobody has seen it
    with pytest.raises(DataError, match=r"snapshots=50"):
        plots.members_film(fitted(0), X[:, None])


def test_a_film_of_several_posteriors_has_a_panel_for_each():
    few, many = fitted(2), fitted(4)
    film = plots.members_film({"few": few, "many": many}, X[:, None], data=(X, Y))
    left, right = pyplot.gcf().axes
    film._func(3)
    assert left.get_title() == f"few, step {len(few.frames[-1].history)}"
    assert right.get_title() == f"many, step {len(many.frames[3].history)}"
    for ax, frame in ((left, few), (right, many.frames[3])):
        mean = frame.predict(X[:, None]).f[0].mean(0).flip(0)
        assert line_of(ax, "their mean")[1] == pytest.approx(mean.numpy(), abs=1e-6)
    assert left.get_ylim() == right.get_ylim()
    film._draw_was_started = True
    with pytest.raises(DataError, match="2 films are drawn, and 1 axes"):
        plots.members_film({"few": few, "many": many}, X[:, None], ax=[left])


def test_pit_draws_the_departure_from_uniform_and_its_band():
    ax = plots.pit(numbers(), Y)
    x, drawn = line_of(ax, "observed")
    values = calibration.pit(DRAWS, Y)
    test = calibration.uniformity((200 * values + 0.5) / 201)
    assert x.tolist() == pytest.approx([0.0, *test.points.tolist(), 1.0])
    assert drawn[1:-1] == pytest.approx((test.share - test.points).numpy(), abs=1e-6)
    _, lower, upper = area(ax, 0)
    assert lower[1:-1] == pytest.approx((test.lower - test.points).numpy(), abs=1e-6)
    assert upper[1:-1] == pytest.approx((test.upper - test.points).numpy(), abs=1e-6)
    assert told(ax)[0] == "95% of calibrated, 40 rows"


def test_pit_of_values_and_of_few_draws():
    values = torch.rand(60)
    drawn = line_of(plots.pit({"leave one out": values}), "leave one out")[1]
    test = calibration.uniformity(values)
    assert drawn[1:-1] == pytest.approx((test.share - test.points).numpy(), abs=1e-6)
    few = Prediction(f=DRAWS, y=DRAWS[:, :5], mean=Y, aleatoric=Y, epistemic=Y)
    x, _ = line_of(plots.pit(few, Y), "observed")  # six places among five draws
    assert x == pytest.approx(np.arange(7) / 6)


def test_sbc_draws_each_quantity_and_says_the_verdict():
    result = ranks()
    ax = plots.sbc(result, quantities=["a", "log_likelihood"])
    assert told(ax) == ["95% of right methods, 100 replicates", "a", "log_likelihood"]
    x, drawn = line_of(ax, "log_likelihood")
    assert x == pytest.approx(np.arange(11) / 10)
    shares = [float((result.ranks[:, 2] < k).double().mean()) for k in range(11)]
    assert drawn == pytest.approx(np.array(shares) - x)
    assert ax.get_title() == f"ranks uniform: p = {result.p:.2g}"
    assert plots.sbc(ranks(6.0)).get_title().startswith("ranks not uniform: p < 1e-12")


def test_compare_puts_the_best_on_top():
    ax = plots.compare(TABLE)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["better", "worse"]
    assert ax.yaxis_inverted()
    (bars,) = ax.containers
    assert bars.lines[0].get_xdata().tolist() == [-0.5, -1.0]
    (segments,) = (c.get_segments() for c in bars.lines[2])
    assert [s[:, 0].tolist() for s in segments] == [[-0.5, -0.5], pytest.approx([-1.1, -0.9])]
    (best,) = [v.get_xdata() for v in ax.get_lines() if v.get_linestyle() == "--"]
    assert list(best) == [-0.5, -0.5]


def test_compare_marks_what_does_not_compare():
    assert plots.compare(TABLE).get_legend() is None
    ax = plots.compare(TABLE.assign(not_comparable=["rmse, log_score", "rmse"]))
    good, bad = ax.containers
    assert good.lines[0].get_xdata().tolist() == [-0.5]
    assert bad.lines[0].get_ydata().tolist() == [1]
    assert bad.lines[0].get_markerfacecolor() == "white"
    assert told(ax) == ["log score", "not comparable"]
    ax = plots.compare(TABLE.assign(log_score=[float("nan"), -1.0]))
    assert [(text.get_text(), text.xy[1]) for text in ax.texts] == [("no score", 1)]


def test_ticks_of_close_scores_do_not_run_into_each_other():
    scores = TABLE.assign(log_score=[-5.425, -5.471], log_score_se=[0.057, 0.087])
    ax = plots.compare(scores, ax=pyplot.subplots(figsize=(4.5, 3), layout="constrained")[1])
    ax.figure.draw_without_rendering()
    boxes = [each.get_window_extent() for each in ax.get_xticklabels() if each.get_text()]
    assert len(boxes) > 2
    assert all(a.x1 < b.x0 for a, b in pairwise(boxes))


def test_long_names_leave_the_axes_their_width():
    curves = {f"a method, its score of long name {i}": CURVE for i in range(3)}
    ax = plots.risk_coverage(curves)
    ax.figure.draw_without_rendering()
    assert ax.get_position().width > 0.6


def test_risk_coverage_draws_the_curve_and_tells_its_area():
    ax = plots.risk_coverage({"a": CURVE})
    x, risk = line_of(ax, f"a: area {CURVE.area:.3g}")
    assert x == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert risk == pytest.approx([0.0, 0.5, 1 / 3, 1.0])
    assert line_of(ax, "all rows kept")[1] == pytest.approx(1.0)


def test_every_model_is_held_against_the_risk_of_all_its_own_rows():
    worse = risk_coverage([0.1, 0.2, 0.3, 0.4], [2.0, 1.0, 2.0, 3.0])
    ax = plots.risk_coverage({"a": CURVE, "b": worse})
    colours = [line.get_color() for line in ax.lines if ": area" in str(line.get_label())]
    flat = {
        line.get_color(): line.get_ydata()[0]
        for line in ax.lines
        if line.get_linestyle() == "--" and len(line.get_ydata())
    }
    assert flat == {colours[0]: 1.0, colours[1]: 2.0}
    assert not len(line_of(ax, "all rows kept")[0])


def finding(name, value, threshold, doubtful):
    told = {"meaning": "Told.", "advice": "Do.", "unlimited": "" if threshold is not None else "so"}
    return Finding(name=name, value=value, threshold=threshold, doubtful=doubtful, **told)


REPORT = Report(
    title="NUTS()",
    findings=(
        finding("members", 5.0, None, False),
        finding("E-BFMI", 1.2, 0.3, False),
        finding("divergences", 0.0, 0.0, False),
        finding("R-hat of f", 1.04, 1.01, True),
        finding("bulk ESS of f", 50.0, 400.0, True),
        finding("k-hat", float("inf"), 0.7, True),
    ),
)


@pytest.mark.parametrize(("draw", "given"), [(plots.compare, TABLE), (plots.diagnose, REPORT)])
def test_a_table_is_drawn_where_it_is_told_and_inside_its_figure(draw, given):
    ax = draw(given, title="Title")
    assert pyplot.get_fignums() == [1]
    assert ax.get_title() == "Title"
    ax.figure.canvas.draw()
    box, whole = ax.get_tightbbox(), ax.figure.bbox
    assert whole.x0 <= box.x0 + 1
    assert box.x1 <= whole.x1 + 1
    assert whole.y0 <= box.y0 + 1
    assert box.y1 <= whole.y1 + 1
    _, (first, second) = pyplot.subplots(1, 2)
    assert draw(given, ax=second) is second
    assert second.has_data()
    assert not first.has_data()


def test_diagnose_puts_what_is_doubtful_beyond_the_limit():
    ax = plots.diagnose(REPORT)
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["k-hat", "bulk ESS of f", "R-hat of f", "E-BFMI", "divergences"]
    points = {int(v.get_ydata()[0]): v for v in ax.get_lines() if len(v.get_xdata()) == 1}
    beyond = [float(points[i].get_xdata()[0]) for i in range(5)]
    assert beyond == pytest.approx([2**4.75, 8.0, 4.0, 0.25, 2**-4.75])
    assert [points[i].get_color() for i in range(5)] == [plots.TRUTH] * 3 + [plots.SERIES[0]] * 2
    assert ax.get_title() == "3 doubtful"
    assert [text.get_text() for text in ax.texts][1] == "50 (limit 400)"
    assert ax.get_xlim()[0] < min(beyond) < max(beyond) < ax.get_xlim()[1]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("beyond its limit (times)", "")
    (grey,) = ax.patches
    assert grey.get_extents().transformed(ax.transData.inverted()).x0 == pytest.approx(1)
    assert grey.get_extents().transformed(ax.transData.inverted()).x1 == ax.get_xlim()[1]
    with pytest.raises(DataError, match="no finding with a limit"):
        plots.diagnose(replace(REPORT, findings=REPORT.findings[:1]))
    with pytest.raises(TypeError, match=r"posterior.diagnose\(\)"):
        plots.diagnose(numbers())
