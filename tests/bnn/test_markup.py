"""What notebooks and terminals show: short, right, and with no name taken for markup."""

import dataclasses
import pickle
from html.parser import HTMLParser

import pandas
import pyro
import pyro.distributions as dist
import pytest
import torch

import bnn

HOSTILE = '<img src=x onerror="alert(1)">&amp;'
X, Y = torch.linspace(-1, 1, 30)[:, None], torch.linspace(0, 2, 30)
TAGS = {"p", "br", "table", "thead", "tbody", "tr", "th", "td", "ul", "li"}


def hostile(x, y=None):
    w = pyro.sample(HOSTILE, dist.Normal(0.0, 1.0).expand([1]).to_event(1))
    several = pyro.sample("several", dist.Normal(0.0, 1.0).expand([3, 1]).to_event(2))
    with pyro.plate("data", len(x)):
        local = pyro.sample(f"{HOSTILE} of a row", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x @ w + (x @ several.T).sum(1) + local, 0.5), obs=y)


def labels(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Categorical(logits=x @ w), obs=y)


class Page(HTMLParser):
    """The tags, the attributes and the text of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text = set(), [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data + "\n"


def shown(value):
    page = Page(value._repr_html_())
    assert page.tags <= TAGS
    assert not page.attributes
    return page.text


@pytest.fixture(scope="module")
def posterior():
    with pytest.warns(bnn.ConvergenceWarning):
        return bnn.fit(hostile, X, Y, method=bnn.SVI(steps=50, draws=40), progress=False)


def test_a_posterior_tells_its_method_model_sites_draws_and_seconds(posterior):
    text = shown(posterior)
    assert "Posterior of hostile by SVI(steps=50, draws=40)\n" in text
    assert f"1 chain × 40 draws, 30 rows, {posterior.seconds:.1f} s, elbo" in text
    draws = posterior.draws[HOSTILE].double()
    spread = f"{float(draws.mean()):.3g} ± {float(draws.std(correction=0)):.2g}"
    assert f"\n{HOSTILE}\n(1,)\n{spread}\n" in text
    assert "several\n(3, 1)\n" in text
    assert "INCOMPLETE" not in text
    assert "Posterior(hostile by SVI(" in repr(posterior)
    assert "\n" not in repr(posterior)


def test_a_posterior_of_many_sites_stays_short(posterior):
    one = posterior.draws["several"]
    many = dataclasses.replace(posterior, draws={f"w.{k}": one for k in range(40)}, complete=False)
    text = shown(many)
    assert "INCOMPLETE" in text
    assert "w.11" in text
    assert "w.12" not in text
    assert "and 28 more" in text


def test_a_prediction_tells_its_rows_and_moments(posterior):
    prediction = posterior.predict(X[:7])
    text = shown(prediction)
    assert "7 rows of numbers, 1 chain × 40 draws" in text
    assert f"local: {HOSTILE} of a row ()" in text
    std = prediction.std
    told = "\n".join(f"{float(v):.3g}" for v in (std.min(), std.median(), std.max()))
    assert f"\nstd\n{told}\n" in text
    assert f"std {float(std.min()):.3g} to {float(std.max()):.3g})" in repr(prediction)
    assert "0 rows" in repr(posterior.predict(X[:0]))
    assert "0 rows" in shown(posterior.predict(X[:0]))


def test_a_prediction_of_labels_tells_entropies():
    with pytest.warns(bnn.ConvergenceWarning):
        fitted = bnn.fit(labels, X, torch.arange(30) % 3, method=bnn.SVI(steps=50, draws=40))
    prediction = fitted.predict(X[:7])
    text = shown(prediction)
    assert "7 rows of labels, 3 classes" in text
    assert f"\nmutual information\n{float(prediction.epistemic.min()):.3g}\n" in text
    assert "largest probability" in repr(prediction)


def test_a_report_is_escaped():
    bad = bnn.Finding(
        name=HOSTILE, value=1.0, threshold=0.5, doubtful=True, meaning=HOSTILE, advice="Mend."
    )
    text = shown(bnn.Report(title=HOSTILE, findings=(bad,), missing={HOSTILE: HOSTILE}))
    assert text.count(HOSTILE) == 5
    assert "doubtful" in text


@pytest.mark.filterwarnings("ignore::bnn.errors.ApproximationWarning")
def test_a_comparison_tells_what_does_not_compare(posterior):
    table = bnn.compare({HOSTILE: posterior, "again": posterior}, data=(X, Y))
    assert isinstance(table, pandas.DataFrame)
    assert set(table.attrs["not_comparable"]) <= {"loo"}  # of few draws
    text = shown(table)
    assert HOSTILE in text
    assert f"{table.loc[HOSTILE, 'log_score']:.4g}" in text
    without = bnn.compare({HOSTILE: posterior})
    assert "rmse: is in-sample" in shown(without)
    assert "rmse: is in-sample" in repr(without)
    assert all(column in repr(without) for column in without)  # in 80 columns, too
    part = without[["log_score"]]
    assert "in-sample" not in repr(part)  # a column or some rows are an ordinary frame
    again = pickle.loads(pickle.dumps(without))
    pandas.testing.assert_frame_equal(again, pandas.DataFrame(without))
    assert again.attrs == without.attrs
