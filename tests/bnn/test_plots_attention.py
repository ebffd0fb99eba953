"""Pictures of attention and saliency show what they say."""

import warnings
from itertools import pairwise

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib import pyplot

import bnn
from bnn.models import mlp_classification, priors, transformer_classification
from bnn.plots.transformers import attention, patches, salience, saliency, saliency_map

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _closed():
    yield
    pyplot.close("all")


def fit(model, *data, method):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the settings are too short to converge
        return bnn.fit(model, *data, method=method, progress=False)


def sentences():
    rng = np.random.default_rng(0)
    x = rng.integers(1, 9, (30, 5))
    x[:10, 3:] = 0
    return x, (x == 3).any(1).astype(int)


@pytest.mark.parametrize("attention_is", ["softmax", priors.UniformAttention()])
@pytest.mark.parametrize(
    "method", [bnn.DirichletAttention(steps=5, draws=8), bnn.SVI(steps=5, draws=8)]
)
def test_attention_is_the_mean_and_the_spread_of_the_draws(attention_is, method):
    x, y = sentences()
    model = transformer_classification(
        5, 2, vocabulary=9, padding=0, width=8, heads=2, layers=1, attention=attention_is
    )
    posterior = fit(model, x, y, method=method)
    grid = attention(posterior, x, tokens=list("abcde"), row=2)
    assert grid.shape == (2, 2)
    shown = np.stack([[ax.images[0].get_array() for ax in axes] for axes in grid])
    real = x[2] != 0
    np.testing.assert_allclose(shown[0].sum(-1), np.tile(real, (2, 1)), atol=1e-5)
    assert (shown[:, :, :, ~real] == 0).all()
    if attention_is == "softmax":
        given = posterior.predict(x[2:3], seams=["attention.0.weights"])
        a = given.local["attention.0.weights"][0, :, 0]
        np.testing.assert_allclose(shown[0], a.mean(0), atol=1e-6)
        np.testing.assert_allclose(shown[1], a.std(0, correction=0), atol=1e-6)
    assert [t.get_text() for t in grid[0, 0].get_xticklabels()] == list("abcde")
    for axes, values in zip(grid, shown, strict=True):
        low, high = axes[0].images[0].get_clim()
        assert low == 0
        assert high >= values.max()
        assert all(ax.images[0].get_clim() == (low, high) for ax in axes)  # heads compare
    assert [(ax.get_xlabel(), ax.get_ylabel()) for ax in grid[0]] == [("key", "query"), ("key", "")]
    assert [ax.get_title() for ax in grid[0]] == ["head 0", "head 1"]
    told = [each.get_ylabel() for each in grid[0, 0].figure.axes[4:]]  # of the colour bars
    assert told == ["mean weight", "sd over draws"]


def test_names_of_many_tokens_do_not_cover_one_another():
    x = np.random.default_rng(0).standard_normal((6, 8, 8))
    model = bnn.models.vit((8, 8), 2, width=8, heads=1, layers=1)
    posterior = fit(model, x, np.arange(6) % 2, method=bnn.MAP(steps=2, draws=2))
    ax = attention(posterior, x)[0, 0]
    ax.figure.draw_without_rendering()
    boxes = [each.get_window_extent() for each in ax.get_yticklabels()]
    assert len(boxes) == 16
    assert all(upper.y0 > lower.y1 for upper, lower in pairwise(boxes))


def test_saliency_of_a_linear_model_is_weight_times_input():
    """The log odds of logistic regression are x w: each column adds x_j w_j."""

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)

    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 3))
    y = (x @ [2.0, -1.0, 0.0] > 0).astype(float)
    posterior = fit(model, x, y, method=bnn.SVI(steps=300, draws=50))
    values, label = salience(posterior, x, row=4)
    assert label == int(posterior.predict(x[4:5]).probs.argmax())
    w = posterior.draws["w"][0].numpy()
    np.testing.assert_allclose(values, (1 if label else -1) * x[4] * w, rtol=1e-4, atol=1e-5)
    _, ax = pyplot.subplots()
    assert saliency(posterior, x, row=4, tokens=["a", "b", "c"], level=0.8, ax=ax) is ax
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b", "c"]
    assert ax.get_xlabel() == f"input x gradient of the log odds of y = {label}"
    assert ax.get_ylim() == (2.5, -0.5)
    dots = np.concatenate([c.get_offsets() for c in ax.collections if hasattr(c, "get_sizes")])
    dots = dots[dots[:, 1].argsort()]
    np.testing.assert_allclose(dots, np.stack([values.mean(0), range(3)], 1), rtol=1e-5)
    ends = [s for c in ax.collections if hasattr(c, "get_segments") for s in c.get_segments()]
    ends = np.array(sorted(ends, key=lambda segment: segment[0][1]))[:, :, 0]
    np.testing.assert_allclose(ends, np.quantile(values, [0.1, 0.9], axis=0).T, rtol=1e-5)


def test_saliency_of_ids_is_at_their_embedding():
    x, y = sentences()
    model = transformer_classification(5, 2, vocabulary=9, padding=0, width=8, heads=2, layers=1)
    posterior = fit(model, x, y, method=bnn.DirichletAttention(steps=5, draws=8))
    values, _ = salience(posterior, x, row=2)
    assert values.shape == (8, 5)
    assert (values[:, x[2] == 0] == 0).all()  # padding is not seen
    assert (values[:, x[2] != 0] != 0).all()
    assert not np.array_equal(values[0], values[1])


def pixels(x, y=None):
    """Logistic regression on all numbers of an image."""
    w = pyro.sample("w", dist.Normal(torch.zeros(x[0].shape), 1.0).to_event(x.ndim - 1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=(x * w).flatten(1).sum(1)), obs=y)


@pytest.mark.parametrize("shape", [(4, 6), (3, 4, 6)])  # one channel, or three
def test_saliency_of_patches_sums_weight_times_pixel(shape):
    x = np.random.default_rng(0).standard_normal((40, *shape))
    y = (x[..., 0, 0].reshape(40, -1).sum(1) > 0).astype(float)
    posterior = fit(pixels, x, y, method=bnn.SVI(steps=100, draws=20))
    values, label, image = patches(posterior, x, patch=2, row=4)
    products = (1 if label else -1) * x[4] * posterior.draws["w"][0].numpy()
    products = products.reshape(20, -1, 4, 6).sum(1)
    expected = np.stack(
        [products[:, i : i + 2, j : j + 2].sum((1, 2)) for i in (0, 2) for j in (0, 2, 4)], 1
    )
    np.testing.assert_allclose(values, expected.reshape(20, 2, 3), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(image, x[4].reshape(-1, 4, 6).mean(0), rtol=1e-5)
    each, *_ = patches(posterior, x, row=4)
    np.testing.assert_allclose(each, products, rtol=1e-4, atol=1e-5)

    axes = saliency_map(posterior, x, patch=2, row=4, level=0.8)
    shown = [ax.images[0].get_array() for ax in axes]
    lower, upper = np.quantile(values, [0.1, 0.9], axis=0)
    for got, wanted in zip(shown, (image, lower, values.mean(0), upper), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5)
    assert axes[2].images[0].get_extent() == axes[0].images[0].get_extent()
    limits = [ax.images[0].get_clim() for ax in axes[1:]]
    assert limits == [(-limits[0][1], limits[0][1])] * 3
    crosses = {tuple(at) for at in axes[2].collections[0].get_offsets()}
    held = np.argwhere((lower <= 0) & (upper >= 0))
    assert 0 < len(held) < 6
    assert crosses == {(2 * j + 0.5, 2 * i + 0.5) for i, j in held}  # in the middle of a patch


def test_a_number_beside_the_images_belongs_to_every_row():
    """Log odds of 2 x w: the 2 is an input too, and one of all rows."""
    model = lambda x, gain, y=None: pixels(gain * x, y)
    x, y = np.random.default_rng(0).standard_normal((20, 2, 4)), np.arange(20) % 2.0
    posterior = fit(model, x, 2.0, y, method=bnn.MAP(steps=5, draws=1))
    values, label, _ = patches(posterior, (x, 2.0), patch=np.int64(2), row=-1)
    assert values.shape == (1, 1, 2)  # one draw
    products = (2 if label else -2) * x[-1] * posterior.draws["w"][0, 0].numpy()
    np.testing.assert_allclose(
        values[0, 0], [products[:, :2].sum(), products[:, 2:].sum()], rtol=1e-4, atol=1e-6
    )
    assert len(saliency_map(posterior, (x, 2.0))[2].collections[0].get_offsets()) == 0
    with pytest.raises(bnn.DataError, match=r"have \[20, 19\] rows"):
        patches(posterior, (x, x[:19]))


@pytest.mark.parametrize(("shape", "inches"), [((2, 32), 2.1), ((64, 4), 5.9), ((28, 28), 2.9)])
def test_images_of_any_shape_fit_on_a_page_and_show_under_their_crosses(shape, inches):
    x, y = np.random.default_rng(0).standard_normal((20, *shape)), np.arange(20) % 2.0
    x[0] = 0  # a dark image: no pixel adds anything
    axes = saliency_map(fit(pixels, x, y, method=bnn.SVI(steps=5, draws=3)), x)
    assert axes[0].figure.get_size_inches()[1] == pytest.approx(inches)
    crosses = axes[2].collections[0]
    assert len(crosses.get_offsets()) == shape[0] * shape[1]
    axes[0].figure.draw_without_rendering()
    pixel = axes[2].get_window_extent().width / shape[1] * 72 / axes[0].figure.dpi  # points
    assert 0.2 * pixel < crosses.get_sizes()[0] ** 0.5 < 0.8 * pixel


def test_refuses_what_is_no_image_or_is_not_tiled():
    x, y = np.random.default_rng(0).standard_normal((20, 4, 6)), np.arange(20) % 2
    posterior = fit(pixels, x, y * 1.0, method=bnn.MAP(steps=5, draws=2))
    with pytest.raises(bnn.DataError, match=r"patch is 4.*height=4, width=6.*divisor"):
        saliency_map(posterior, x, patch=4)
    for draw in (saliency, saliency_map):
        with pytest.raises(bnn.DataError, match="level is 90"):
            draw(posterior, x, level=90)
    whole = lambda x, y=None: pixels(x.float(), y)
    counts = (10 * x).astype(int)
    with pytest.raises(bnn.DataError, match=r"whole numbers \(torch\.int64\).*x as floats"):
        saliency_map(fit(whole, counts, y * 1.0, method=bnn.MAP(steps=5)), counts)
    x, y = sentences()
    model = transformer_classification(5, 2, vocabulary=9, width=8, heads=2, layers=1)
    with pytest.raises(bnn.DataError, match=r"a row of x has shape \(5,\).*use plots\.saliency"):
        saliency_map(fit(model, x, y, method=bnn.MAP(steps=2, draws=2)), x)


def test_refuses_what_it_cannot_draw():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((20, 3)), np.arange(20) % 2
    posterior = fit(mlp_classification(3, 2, (4,)), x, y, method=bnn.MAP(steps=5, draws=2))
    with pytest.raises(bnn.ModelError, match="announces no attention"):
        attention(posterior, x)
    with pytest.raises(bnn.DataError, match="2 names and a row has 3"):
        saliency(posterior, x, tokens=["a", "b"])
    with pytest.raises(bnn.DataError, match="row is 20"):
        saliency(posterior, x, row=20)
    numbers = fit(bnn.models.linear(3), x, y * 1.0, method=bnn.MAP(steps=5, draws=2))
    with pytest.raises(bnn.DataError, match="of a label"):
        saliency(numbers, x)
