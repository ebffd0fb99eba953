"""Transformers: masks, padding, seams, and fits by every kind of method without an edit."""

import warnings

import numpy as np
import pyro
import pytest
import torch

import bnn
from bnn.models import priors, transformer_classification, transformer_tagging, vit

SMALL = {"width": 8, "heads": 2, "layers": 2}
IDS = SMALL | {"vocabulary": 9, "padding": 0}


def ids():
    x = torch.randint(1, 9, (12, 5))
    x[:6, 3:] = 0
    return x


def at_seams(net, x):
    trace = pyro.poutine.trace(net).get_trace(x)
    return {name: node["value"] for name, node in trace.nodes.items() if node["type"] == "sample"}


def test_seams_tell_what_a_layer_does():
    x = ids()
    net = transformer_classification(5, 3, causal=True, **IDS).net
    seams = at_seams(net, x)
    parts = [f"attention.{i}.{part}" for i in (0, 1) for part in ("keys", "scores", "weights")]
    assert sorted(seams) == sorted([*parts, "hidden.0", "hidden.1"])
    scores, weights = seams["attention.0.scores"], seams["attention.0.weights"]
    assert seams["attention.0.keys"].shape == (12, 2, 5, 4)
    assert weights.shape == (12, 2, 5, 5)
    real = x != 0
    seen = torch.ones(5, 5, dtype=torch.bool).tril() & real[:, None, :, None] & real[:, None, None]
    assert ((scores > -torch.inf) == seen).all()
    assert ((weights > 0) == seen).all()
    assert torch.isfinite(weights).all()
    torch.testing.assert_close(weights.sum(-1), real[:, None].float().expand(12, 2, 5))


def test_a_token_does_not_see_those_after_it():
    x = torch.randn(4, 5, 3)
    model = transformer_tagging(5, 2, features=3, causal=True, **SMALL)
    before = model.net(x)
    x[:, 3:] = torch.randn(4, 2, 3)
    after = model.net(x)
    torch.testing.assert_close(before[:, :3], after[:, :3])
    assert (before[:, 3:] != after[:, 3:]).any()


@pytest.mark.parametrize("inputs", [{"vocabulary": 9}, {"features": 3}])
def test_padding_has_no_part(inputs):
    """Another number of padding tokens gives the same output of the row."""
    torch.manual_seed(0)
    settings = SMALL | inputs | {"padding": 0, "positions": "sinusoidal"}
    short, long = (transformer_classification(n, 2, **settings).net for n in (4, 6))
    long.load_state_dict(short.state_dict())
    x = torch.randint(1, 9, (3, 4)) if "vocabulary" in inputs else torch.randn(3, 4, 3)
    x[0, 2:] = 0
    wide = torch.cat([x, torch.zeros_like(x[:, :2])], 1)
    torch.testing.assert_close(short(x), long(wide))
    assert torch.isfinite(short(torch.zeros_like(x))).all()  # nothing but padding


def test_patches_are_read_from_the_top_left():
    images = torch.arange(64.0).reshape(1, 8, 8)
    model = vit((8, 8), 2, patch=4, **SMALL)
    seen = []
    model.net.transformer.embedding.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    model.net(images)
    expected = [images[0, i : i + 4, j : j + 4].flatten() for i in (0, 4) for j in (0, 4)]
    torch.testing.assert_close(seen[0][0], torch.stack(expected))
    colour = vit((8, 8), 2, patch=4, channels=3, **SMALL)
    assert colour.net(torch.randn(5, 3, 8, 8)).shape == (5, 2)


def test_padded_labels_do_not_count():
    x = ids()
    y = torch.randint(0, 2, x.shape)
    model = transformer_tagging(5, 2, **IDS)
    posterior = fit(model, x, y, bnn.MAP(steps=2, draws=1))
    other = torch.where(x == 0, 1 - y, y)
    assert torch.equal(posterior.log_likelihood(x, y), posterior.log_likelihood(x, other))
    other[0, 0] = 1 - other[0, 0]
    assert not torch.equal(posterior.log_likelihood(x, y), posterior.log_likelihood(x, other))


ATTENTION = ["softmax", priors.UniformAttention(5.0), priors.ContextualAttention(5.0, 3)]


@pytest.mark.parametrize("attention", ATTENTION)
def test_gradients_are_lifted_and_sites_are_found(attention, vmapped_gradient):
    x = ids()
    model = transformer_classification(5, 2, attention=attention, **IDS)
    sites = vmapped_gradient(model, x, torch.arange(12) % 2)
    drawn = [] if attention == "softmax" else ["attention.0.weights", "attention.1.weights"]
    assert list(sites.locals) == drawn
    assert "hidden.1" in sites.seams


def fit(model, x, y, method):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the settings are too short to converge
        return bnn.fit(model, x, y, method=method, progress=False)


FITS = {
    "svi": bnn.SVI(steps=5, draws=6),
    "map": bnn.MAP(steps=5, draws=2, restarts=2),
    "deep_ensemble": bnn.DeepEnsemble(steps=5, members=3),
    "mc_dropout": bnn.MCDropout(steps=5, draws=4),
    "dirichlet_attention": bnn.DirichletAttention(steps=5, draws=4),
    "nuts": bnn.NUTS(chains=2, warmup=3, draws=2, max_tree_depth=1),
}


@pytest.mark.parametrize("name", FITS)
@pytest.mark.parametrize("attention", ATTENTION)
def test_every_kind_of_method_takes_it(name, attention):
    """Attention comes back for new rows whoever fitted, drawn where it is a site."""
    x = ids()
    model = transformer_classification(5, 2, attention=attention, **IDS | {"layers": 1})
    posterior = fit(model, x, torch.arange(12) % 2, FITS[name])
    site = "attention.0.weights"
    prediction = posterior.predict(x[:3], seams=[site] if attention == "softmax" else [])
    assert prediction.local[site].shape == (*posterior.shape, 3, 2, 5, 5)
    assert prediction.probs.shape == (3, 2)
    torch.testing.assert_close(prediction.probs.sum(-1), torch.ones(3))
    assert torch.isfinite(posterior.log_likelihood(x, torch.arange(12) % 2)).all()


def test_own_dropout_is_found_and_attention_is_not_dropped():
    x = ids()
    model = transformer_classification(5, 2, dropout=0.2, **IDS)
    posterior = fit(model, x, torch.arange(12) % 2, bnn.MCDropout(steps=5, draws=4))
    assert [k for k in posterior.params if k.startswith("dropout.")] == [
        f"dropout.{i}" for i in range(4)
    ]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "pass one of them"),
        ({"vocabulary": 3, "features": 3}, "pass one of them"),
        ({"vocabulary": 3, "width": 9, "heads": 2}, "multiple of heads"),
        ({"vocabulary": 3, "positions": "none"}, "sinusoidal"),
        ({"vocabulary": 3, "dropout": 1.0}, r"\[0, 1\)"),
        ({"vocabulary": 3, "attention": "dirichlet"}, "UniformAttention"),
        ({"features": 0}, "at least 1"),
    ],
)
def test_refuses_settings(settings, text):
    with pytest.raises(ValueError, match=text):
        transformer_classification(4, 2, **settings)
    with pytest.raises(ValueError, match="do not tile"):
        vit((8, 7), 2)
    with pytest.raises(ValueError, match="positive number"):
        priors.ContextualAttention(np.nan)


@pytest.mark.parametrize(
    ("inputs", "x"),
    [
        ({"vocabulary": 9}, torch.ones(4, 1, dtype=torch.long)),
        ({"vocabulary": 9}, torch.ones(5, dtype=torch.long)),
        ({"features": 3}, torch.ones(5, 3)),
        ({"features": 3}, torch.ones(4, 1, 3)),
    ],
)
def test_refuses_rows_of_another_length(inputs, x):
    """They would be broadcast: one token would stand in every place."""
    net = transformer_classification(5, 2, **SMALL, **inputs).net
    with pytest.raises(ValueError, match="of 5 tokens takes x"):
        net(x)


def test_refuses_images_of_another_shape():
    """As many patches, in other places."""
    with pytest.raises(ValueError, match=r"height=4, width=4.*\(3, 2, 8\)"):
        vit((4, 4), 2, **SMALL).net(torch.rand(3, 2, 8))
