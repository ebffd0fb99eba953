"""Pictures: where they are drawn, what they say, and what they refuse."""

import matplotlib

matplotlib.use("Agg")

import pytest
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

from bnn import DataError, Prediction, plots

ROWS = 40
DRAWS = torch.randn(1, 200, ROWS, generator=torch.Generator().manual_seed(0))
Y = torch.linspace(-3, 3, ROWS)
LABELS = torch.arange(ROWS) % 3


def numbers(shift=0.0):
    y = DRAWS + shift
    return Prediction(f=y, y=y, mean=y.mean((0, 1)), aleatoric=Y * 0 + 1, epistemic=Y * 0)


def labels():
    probs = torch.softmax(DRAWS[0, :3].T, -1)  # (row, class)
    y = LABELS.expand(1, 200, ROWS)
    return Prediction(
        f=DRAWS, y=y, mean=probs @ torch.arange(3.0), aleatoric=Y, epistemic=Y, probs=probs
    )


PLOTS = {
    "truth": lambda **k: plots.truth(numbers(), Y, **k),
    "coverage": lambda **k: plots.coverage({"a": numbers(), "b": numbers(1.0)}, Y, **k),
    "reliability": lambda **k: plots.reliability({"a": labels(), "b": labels()}, LABELS, **k),
}


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


def test_every_series_is_in_the_legend(plot):
    ax = plot()
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert len(texts) == len(set(texts)) >= 3


def test_truth_counts_the_rows_inside_the_interval():
    lower, upper = numbers().interval(0.5)
    inside = int(((Y >= lower) & (Y <= upper)).sum())
    texts = [t.get_text() for t in plots.truth(numbers(), Y, level=0.5).get_legend().get_texts()]
    assert texts[0] == f"inside its 50% interval ({inside})"
    assert texts[1] == f"outside its 50% interval ({ROWS - inside})"


def test_coverage_draws_the_observed_shares():
    ax = plots.coverage(numbers(), Y)
    line = next(line for line in ax.get_lines() if line.get_label() == "observed")
    for level, share in zip(*line.get_data(), strict=True):
        lower, upper = numbers().interval(float(level))
        assert share == pytest.approx(((Y >= lower) & (Y <= upper)).float().mean().item(), abs=0.03)


def test_reliability_draws_the_share_of_right_labels():
    ax = plots.reliability(labels(), LABELS, bins=1)
    line = next(line for line in ax.get_lines() if len(line.get_xdata()) == 1)
    stated, label = labels().probs.max(-1)
    assert line.get_xdata()[0] == pytest.approx(stated.mean().item())
    assert line.get_ydata()[0] == pytest.approx((label == LABELS).float().mean().item())


def test_colours_can_be_told_apart_and_keep_their_meaning():
    for palette in (plots.SERIES, (plots.TOTAL, plots.EPISTEMIC, plots.TRUTH, plots.IDEAL)):
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
        (lambda: plots.truth(numbers(), Y[:-1]), r"\(40,\) and y has \(39,\)"),
        (lambda: plots.truth(numbers(), Y[:, None]), r"\(40, 1\)"),
        (lambda: plots.coverage(numbers(), Y[:-1]), "rows must be the same"),
        (lambda: plots.reliability(labels(), LABELS[:-1]), r"\(40,\) and y has \(39,\)"),
        (lambda: plots.reliability(labels(), LABELS[:, None]), r"\(40, 1\)"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_cure(call, match):
    with pytest.raises(DataError, match=match):
        call()
