"""GFlowOut: the posterior of masks by enumeration, and what is kept of them."""

import itertools
import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import bnn
from bnn.data import take
from bnn.handlers import seeded
from bnn.inference import _flow, gflowout
from bnn.inference._energy import Energy
from bnn.inference._flow import Flow
from bnn.inference._mask_generators import Generator, Labels
from bnn.inference._unit_masks import compressed, find_places
from bnn.models import likelihoods

OBJECTIVES = ["log_variance", "trajectory_balance"]
BITS = torch.tensor(list(itertools.product([0.0, 1.0], repeat=8)))  # (256, 8)
X = torch.linspace(-1, 1, 12)[:, None]
Y = torch.sin(2 * X[:, 0])


class Fixed:
    """A net of two tanh layers whose weights are given; y ~ N(f, sd). No latent site."""

    def __init__(self, inputs: int = 2, units: int = 4, sd: float = 1.0, seed: int = 3):
        generator = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(*shape, generator=generator)
        self.first, self.second = normal(inputs, units), 1.5 * normal(units, units)
        self.last, self.sd, self.generator = 1.5 * normal(units), sd, generator

    def __call__(self, x, y=None):
        with pyro.plate("data", len(x)):
            h = torch.tanh(x @ self.first)
            h = pyro.deterministic("hidden.0", h, event_dim=1)
            h = torch.tanh(h @ self.second)
            h = pyro.deterministic("hidden.1", h, event_dim=1)
            pyro.sample("y", dist.Normal(pyro.deterministic("f", h @ self.last), self.sd), obs=y)

    def under(self, x, bits):
        """Activations of both layers and f, under masks (8,) or (row, 8)."""
        first = torch.tanh(x @ self.first)
        second = torch.tanh((first * bits[..., :4]) @ self.second)
        return first, second, (second * bits[..., 4:]) @ self.last

    def data(self, x):
        """y at masks drawn for each row."""
        bits = torch.bernoulli(torch.full((len(x), 8), 0.5), generator=self.generator)
        noise = torch.randn(len(x), generator=self.generator)
        return self.under(x, bits)[2] + self.sd * noise


class Alike:
    """Sixteen rows that are likely where the 8 bits are all 0 or all 1: two modes far apart."""

    def __call__(self, x, y=None):
        with pyro.plate("data", len(x)):
            ones = torch.ones(len(x), 4)
            low = pyro.deterministic("hidden.0", ones, event_dim=1)
            high = pyro.deterministic("hidden.1", ones, event_dim=1)
            f = ((low + high).mean(-1) - 1).square()
            pyro.sample("y", dist.Normal(f, 1.5), obs=y)

    def under(self, x, bits):
        return None, None, ((bits[:4] + bits[4:]).mean(-1) - 1).square().expand(len(x))

    sd = 1.5


def fit(model, x, y, **settings):
    settings = {"schedule": "cosine", "conditional": False} | settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bnn.errors.ConvergenceWarning)
        return bnn.fit(model, x, y, method=bnn.GFlowOut(**settings), seed=0, progress=False)


def exact_law(model, x, y, keep=0.5):
    """Log p(data, mask) of all 256 masks."""
    kept = torch.tensor([keep, 1 - keep]).log()
    prior = BITS @ kept[:1].expand(8) + (1 - BITS) @ kept[1:].expand(8)
    each = [dist.Normal(model.under(x, bits)[2], model.sd).log_prob(y).sum() for bits in BITS]
    return torch.stack(each) + prior


def law_of(params, who="policy", label=None, contexts=None):
    """Log probabilities of all masks by a generator, (mask,) or (mask, row)."""
    logs = []
    for bits in BITS:
        generator, total = Generator(params, who, label), 0.0
        context = (None, None) if contexts is None else contexts(bits)
        for number, seen in enumerate(context):
            name, part = f"hidden.{number}", bits[4 * number : 4 * number + 4]
            part = part if seen is None else part.expand(len(seen), 4)
            total = total + generator.law(name, seen).log_prob(part)
            generator.take(name, part)
        logs.append(total)
    return torch.stack(logs)


def total_variation(p, q, axis=0):
    return 0.5 * (p - q).abs().sum(axis)


def check_enumerated(objective="log_variance", model=None, keep=0.5, **settings):
    """T5a: total variation and log Z within .05; and the draws are of that law."""
    model = model or Fixed()
    x = torch.randn(16, 2, generator=torch.Generator().manual_seed(1))
    y = model.data(x) if isinstance(model, Fixed) else torch.ones(16)
    joint = exact_law(model, x, y, keep)
    exact, log_z = joint.softmax(0), joint.logsumexp(0)
    common = {"steps": 1_500, "particles": 16, "generator_learning_rate": 0.03, "prior_keep": keep}
    posterior = fit(model, x, y, objective=objective, **common | settings)
    q = law_of(posterior.params).exp()
    assert abs(float(q.sum()) - 1) < 1e-4
    assert total_variation(q, exact) < 0.05, total_variation(q, exact)
    assert abs(posterior.log_evidence - log_z) < 0.05
    if objective == "trajectory_balance":
        assert abs(posterior.params["log_z.bias"] - log_z) < 0.05
    drawn = torch.cat([posterior.draws[f"hidden.{i}.mask"][0] for i in (0, 1)], -1)
    share = drawn.mean(0)
    error = (share * (1 - share) / len(drawn)).sqrt() + 1e-3
    assert ((share - q @ BITS).abs() < 4 * error).all()
    return posterior, exact


@pytest.mark.parametrize(
    ("objective", "keep"), [("log_variance", 0.5), ("trajectory_balance", 0.8)]
)
def test_masks_of_all_rows_have_their_posterior(objective, keep):
    check_enumerated(objective, keep=keep)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_law_of_two_modes_that_no_independent_units_have(objective):
    _, exact = check_enumerated(objective, Alike(), steps=1_200)
    assert best_factorised(exact) > 0.2


def best_factorised(exact):
    """Least total variation of independent units, by gradient from 64 starting points."""
    logits = (3 * torch.randn(64, 8, generator=torch.Generator().manual_seed(0))).requires_grad_()
    adam = torch.optim.Adam([logits], lr=0.05)
    for _ in range(400):
        adam.zero_grad()
        signed = (2 * BITS - 1)[:, None] * logits  # (mask, start, unit)
        far = total_variation(signed.sigmoid().log().sum(-1).exp(), exact[:, None])
        far.sum().backward()
        adam.step()
    return float(far.detach().min())


def check_minibatches(objective="log_variance", **settings):
    """The law of all rows from halves of them, as near as the noise of halves allows."""
    model = Fixed(sd=3.0)
    x = torch.randn(16, 2, generator=torch.Generator().manual_seed(1))
    y = model.data(x)
    exact = exact_law(model, x, y)
    common = {"steps": 1_500, "particles": 8, "generator_learning_rate": 0.03, "batch_size": 8}
    posterior = fit(model, x, y, objective=objective, **common | settings)
    q = law_of(posterior.params).exp()
    assert total_variation(q, exact.softmax(0)) < 0.06


@pytest.mark.slow
def test_minibatches_count_all_rows():
    check_minibatches()


def check_amortised(objective="log_variance", **settings):
    """T5b: q(z | x, y) at ten inputs, eight y each; p(z | x) is their mean over y."""
    model = Fixed(sd=0.7)
    x = torch.randn(10, 2, generator=torch.Generator().manual_seed(2)).repeat_interleave(8, 0)
    y = model.data(x)
    posterior = fit(
        model, x, y, objective=objective, **{"conditional": True, "steps": 1_000} | settings
    )
    label = compressed((y - y.mean()) / y.std(correction=0))[:, None]
    contexts = lambda bits: [compressed(h) for h in model.under(x, bits)[:2]]
    q = law_of(posterior.params, "policy", label, contexts).exp()  # (mask, row)
    p = law_of(posterior.params, "prior", None, contexts)
    each = [dist.Normal(model.under(x, bits)[2], model.sd).log_prob(y) for bits in BITS]
    joint = torch.stack(each) + p
    exact = joint.softmax(0)
    assert total_variation(exact, p.exp()).mean() > 0.2  # else q = p would do
    assert total_variation(q, exact).mean() < 0.1, total_variation(q, exact).mean()
    mean = q.reshape(256, 10, 8).mean(2)
    assert total_variation(p.exp()[:, ::8], mean).mean() < 0.1
    assert abs(posterior.log_evidence - float(joint.logsumexp(0).sum())) < 0.5  # of 80 rows
    return posterior, x


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_masks_of_each_row_have_their_posteriors(objective):
    posterior, x = check_amortised(objective)
    masks = posterior.predict(x[::8]).local["hidden.0.mask"]
    assert masks.shape == (1, 1_000, 10, 4)
    assert set(masks.unique().tolist()) == {0.0, 1.0}


def check_gaps(conditional, batch_size=16):
    """Log q - log reward at each of 256 masks is what the definition says; and q sums to 1.

    On batches of 8 of 16 rows a shared mask has the gap of all rows on average over both.
    """
    model, keep = Fixed(sd=0.7), 0.7
    x = torch.randn(16, 2, generator=torch.Generator().manual_seed(1))
    y = model.data(x)
    posterior = fit(model, x, y, conditional=conditional, prior_keep=keep, steps=5, draws=2)
    energy = Energy(model, posterior.data, posterior.sites)
    masking = posterior.method._masking
    places = find_places(energy, masking, "GFlowOut", np.random.SeedSequence(0))
    labels = Labels(energy, np.random.SeedSequence(0)) if conditional else None
    flow = Flow(energy, places, masking, labels)
    runs = []
    for bits in BITS:
        forced = 1 - bits  # a unit is kept where its uniform is below the probability
        rows = forced.expand(batch_size, 8) if conditional else forced
        parts = [
            flow.run(torch.zeros(0), take((x, y), slice(i, i + batch_size)), posterior.params,
                     rows.split(4, -1)).gap(1.0)
            for i in range(0, 16, batch_size)
        ]  # fmt: skip
        runs.append(torch.cat(parts) if conditional else torch.stack(parts).mean())
    found = torch.stack(runs)
    if conditional:
        contexts = lambda bits: [compressed(h) for h in model.under(x, bits)[:2]]
        log_q = law_of(posterior.params, "policy", labels(y), contexts)
        log_p = law_of(posterior.params, "prior", None, contexts)
        each = [dist.Normal(model.under(x, bits)[2], model.sd).log_prob(y) for bits in BITS]
        wanted = log_q - log_p - torch.stack(each)
    else:
        log_q = law_of(posterior.params)
        wanted = log_q - exact_law(model, x, y, keep)
    torch.testing.assert_close(log_q.exp().sum(0), torch.ones_like(log_q[0]))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_size", [16, 8])
@pytest.mark.parametrize("conditional", [True, False])
def test_the_gap_is_that_of_the_definition(conditional, batch_size):
    check_gaps(conditional, batch_size)


@pytest.mark.parametrize("conditional", [True, False])
def test_particles_that_are_drawn_together_are_those_drawn_alone(conditional):
    """One run draws the first masks of all; the gaps and their slopes are those of runs apart."""
    model = Fixed(sd=0.7)
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(1))
    y = model.data(x)
    posterior = fit(model, x, y, conditional=conditional, steps=5, draws=2)
    energy = Energy(model, posterior.data, posterior.sites)
    masking = posterior.method._masking
    places = find_places(energy, masking, "GFlowOut", np.random.SeedSequence(0))
    labels = Labels(energy, np.random.SeedSequence(0)) if conditional else None
    flow, z, temperature = Flow(energy, places, masking, labels), torch.zeros(0), 5.0
    names = [name for name in posterior.params if not name.startswith("balance.")]
    # ten times as large: where logits are near 0 a mask is the same at every temperature
    tensors = {name: (10 * posterior.params[name]).requires_grad_() for name in names}
    with seeded(np.random.SeedSequence(2)):
        first, second = flow.noise(3, 6)
    together = flow.run(z, (x, y), tensors, [first, second[0]], temperature)
    found, wanted = [together], []
    for i in range(2):
        drawn = tuple(each[i] for each in together.others)
        noise = [first, second[1 + i]]
        found.append(flow.run(z, (x, y), tensors, noise, temperature, drawn))
    for i in range(3):
        noise = [first[i], second[i]]
        wanted.append(flow.run(z, (x, y), tensors, noise, temperature if i else 1.0))
    assert not torch.equal(*together.others[0])
    for one, other in zip(found, wanted, strict=True):
        gaps = one.gap(1.0).sum(), other.gap(1.0).sum()
        torch.testing.assert_close(*gaps)
        leaves, some = list(tensors.values()), {"retain_graph": True, "allow_unused": True}
        slopes = [torch.autograd.grad(gap, leaves, **some) for gap in gaps]
        for name, a, b in zip(names, *slopes, strict=True):
            assert (a is None) == (b is None), name
            if a is not None:
                torch.testing.assert_close(a, b)


def test_the_log_probability_depends_on_the_mask():
    """T5c: where a unit is kept with probability .9, dropping it has log .1 and not log .9."""
    params = {
        "policy.hidden.0.hidden": torch.zeros(1, 2),
        "policy.hidden.0.inward": torch.zeros(1, 2),
        "policy.hidden.0.outward": torch.zeros(1, 2),
        "policy.hidden.0.offset": torch.tensor([math.log(9.0)]),
    }
    law = Generator(params, "policy").law("hidden.0")
    assert float(law.log_prob(torch.ones(1))) == pytest.approx(math.log(0.9))
    assert float(law.log_prob(torch.zeros(1))) == pytest.approx(math.log(0.1))


# --- the weights, the draws and files


def mlp(**settings):
    return bnn.models.mlp_regression(1, (6, 5), likelihood=likelihoods.Gaussian(0.2), **settings)


def quick(model, x, y, **settings):
    return fit(model, x, y, **{"steps": 80, "draws": 40, "conditional": True} | settings)


SHORT = {
    "conditional": {},
    "balance": {"objective": "trajectory_balance", "particles": 1},
    "for_all": {"conditional": False, "particles": 4},
    "for_all_balance": {"conditional": False, "objective": "trajectory_balance", "batch_size": 6},
    "settings": {
        "prior_keep": {"hidden.1": 0.8},
        "seams": ["hidden.1"],
        "rescale": True,
        "blocks": 2,
    },
}


@pytest.fixture(scope="module")
def fits():
    return {name: quick(mlp(), X, Y, **settings) for name, settings in SHORT.items()}


@pytest.mark.parametrize("name", SHORT)
def test_predictions_keep_masks_of_each_row(fits, name):
    posterior = fits[name]
    assert posterior.shape == (1, 40)
    prediction = posterior.predict(X[:3])
    assert prediction.f.shape == prediction.y.shape == (1, 40, 3)
    seams = {"hidden.1"} if name == "settings" else {"hidden.0", "hidden.1"}
    assert set(prediction.local) == {f"{seam}.mask" for seam in seams}
    mask = prediction.local["hidden.1.mask"]
    assert mask.shape == (1, 40, 3, 5)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    shared = bool((mask == mask[:, :, :1]).all())
    assert shared == (not posterior.method.conditional)
    assert ("hidden.1.mask" in posterior.draws) == shared
    assert posterior.predict(X[:3], draws=7).local["hidden.1.mask"].shape == (1, 7, 3, 5)
    assert posterior.log_likelihood().shape == (1, 40, 12)
    assert posterior.predict(torch.zeros(0, 1)).y.shape == (1, 40, 0)


@pytest.mark.parametrize("name", SHORT)
def test_f_is_the_net_under_the_masks(fits, name):
    posterior = fits[name]
    w = {k: v[0, 0] for k, v in posterior.draws.items()}
    prediction = posterior.predict(X)
    masks = {k.removesuffix(".mask"): v for k, v in prediction.local.items()}
    h = X
    for number in range(2):
        h = torch.tanh(h @ w[f"layers.{number}.weight"].T + w[f"layers.{number}.bias"])
        mask = masks.get(f"hidden.{number}")
        if mask is not None:
            h = h * mask[0]
            if posterior.method.rescale:
                h = h * mask.shape[-1] / mask[0].sum(-1, keepdim=True).clamp(min=1)
    f = (h @ w["layers.2.weight"].T + w["layers.2.bias"])[..., 0]
    torch.testing.assert_close(prediction.f[0], f, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SHORT)
def test_files_give_local_sites_back_bit_for_bit(fits, name, tmp_path):
    posterior = fits[name]
    posterior.save(tmp_path / "fit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = bnn.load(tmp_path / "fit", mlp())
    assert loaded.method == posterior.method
    assert loaded.log_evidence == posterior.log_evidence
    first, second = posterior.predict(X, seed=3), loaded.predict(X, seed=3)
    assert first.local.keys() == second.local.keys()
    for site in first.local:
        assert torch.equal(first.local[site], second.local[site])
    assert torch.equal(first.y, second.y)
    assert torch.equal(posterior.log_likelihood(), loaded.log_likelihood())
    for tensors in ("draws", "params"):
        for key, value in getattr(posterior, tensors).items():
            assert torch.equal(value, getattr(loaded, tensors)[key])


def test_a_file_holds_the_mode_once(tmp_path):
    posterior = quick(mlp(), X, Y, conditional=False, draws=500, steps=2)
    posterior.save(tmp_path / "fit")
    numbers = sum(v[0, 0].numel() for v in posterior.draws.values()) + 500 * 11
    assert (tmp_path / "fit").stat().st_size < 4 * numbers + 40_000
    assert bnn.load(tmp_path / "fit", mlp()).draws["layers.0.weight"].shape == (1, 500, 6, 1)


@pytest.mark.parametrize("name", ["conditional", "for_all_balance"])
def test_one_seed_one_answer_and_the_callers_state(fits, name):
    model = mlp()
    pyro.param("mine", torch.tensor(3.0))
    torch.manual_seed(123)
    before = torch.get_rng_state()
    try:
        again = quick(model, X, Y, **SHORT[name])
        assert list(pyro.get_param_store().keys()) == ["mine"]
    finally:
        pyro.clear_param_store()
    assert torch.equal(before, torch.get_rng_state())
    for key, value in (fits[name].draws | fits[name].params).items():
        assert torch.equal(value, (again.draws | again.params)[key]), key
    assert torch.equal(again.predict(X).y, fits[name].predict(X).y)


@pytest.mark.parametrize("name", SHORT)
def test_repr_evaluates_back(name):
    method = bnn.GFlowOut(**SHORT[name])
    assert eval(repr(method), vars(bnn)) == method


@pytest.mark.parametrize("name", ["conditional", "for_all"])
def test_arviz_and_compare_take_it(fits, name):
    exported = fits[name].to_arviz(predictions=fits[name].predict(X))
    assert exported["posterior_predictive"]["y"].shape == (1, 40, 12)
    table = bnn.compare({name: fits[name]}, data=(X, Y))
    assert math.isfinite(table["log_score"].iloc[0])


@pytest.mark.parametrize("name", SHORT)
def test_findings_say_how_far_q_is(fits, name):
    posterior = fits[name]
    found = {each.name: each for each in posterior.method.findings(posterior)}
    assert set(found) == {"balance residual", "effective masks", "mask entropy"}
    assert 0 < found["effective masks"].value <= 1.001
    assert 0 < found["mask entropy"].value < 1.5
    assert "balance residual" in str(posterior.diagnose())


def test_a_fit_whose_masks_are_all_one_warns(monkeypatch):
    found = {"residual": 0.1, "effective": 1.0, "entropy": 0.0}
    found = {f"balance.{name}": torch.tensor(value) for name, value in found.items()}
    monkeypatch.setattr("bnn.inference.gflowout.assess", lambda *args: (0.0, found))
    with pytest.warns(bnn.ConvergenceWarning, match="All masks are one"):
        bnn.fit(mlp(), X, Y, method=bnn.GFlowOut(steps=10, draws=5), progress=False)


def test_the_mean_of_masks_of_one_block_is_one_deterministic_pass():
    posterior = quick(mlp(), X, Y, blocks=1)
    prediction = posterior.predict(X, mode="mean")
    assert prediction.f.shape == (1, 1, 12)
    assert ((prediction.local["hidden.0.mask"] > 0) & (prediction.local["hidden.0.mask"] < 1)).all()
    with pytest.raises(bnn.ModelError, match=r'"hidden.0.mask" has no mean in closed form'):
        quick(mlp(), X, Y).predict(X, mode="mean")


# --- other nets, other data


class Channels(nn.Module):
    """Announces the channels of its convolutions, (row, channel, height, width)."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 3, 3)
        self.last = nn.Linear(12, 1)

    def forward(self, x):
        h = pyro.deterministic("hidden.0", torch.relu(self.first(x)), event_dim=3)
        h = pyro.deterministic("hidden.1", torch.relu(self.second(h)), event_dim=3)
        return self.last(h.flatten(1))


@pytest.mark.parametrize("conditional", [True, False])
def test_a_convolution_loses_channels(conditional):
    x = torch.randn(10, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    model = bnn.models.supervised(Channels(), likelihoods.Gaussian(0.5))
    posterior = quick(model, x, x.mean((1, 2, 3)), conditional=conditional)
    prediction = posterior.predict(x, seams=["hidden.0"])
    masks, h = prediction.local["hidden.0.mask"], prediction.local["hidden.0"]
    assert masks.shape == (1, 40, 10, 4)
    assert (h[masks == 0] == 0).all()
    assert (h[masks == 1].flatten(1).abs().sum(1) > 0).any()


def test_labels_and_tokens_of_a_row_share_a_mask():
    net = bnn.models.MLP(3, (5,), 1)

    def model(x, y=None):
        weights = bnn.models.sample_weights(net)
        with pyro.plate("data", len(x)):
            logits = weights(x).mean(1).expand(-1, 3) * torch.tensor([1.0, 0.0, -1.0])
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    x = torch.randn(20, 4, 3, generator=torch.Generator().manual_seed(0))
    y = (x.mean((1, 2)) > 0).long()
    posterior = quick(model, x, y, batch_size=10)
    prediction = posterior.predict(x, seams=["hidden.0"])
    masks, h = prediction.local["hidden.0.mask"], prediction.local["hidden.0"]
    assert masks.shape == (1, 40, 20, 5)
    assert ((h == 0) == (masks == 0)[:, :, :, None]).all()
    assert prediction.probs.shape == (20, 3)


@pytest.mark.parametrize("conditional", [True, False])
@pytest.mark.parametrize("among_rows", [True, False])
def test_units_of_which_the_differences_count(conditional, among_rows):
    """A shift of all units alike is no test of whether they are used, nor of by which row."""

    def model(x, y=None):
        with pyro.plate("data", len(x)):
            h = pyro.deterministic("hidden.0", torch.cat([x, -x], 1), event_dim=1)
            f = h[:, 0] - h[:, 1]
            f = f.mean().expand(len(x)) if among_rows else f
            pyro.sample("y", dist.Normal(f, 1.0), obs=y)

    x = torch.arange(12.0)[:, None] / 4
    if conditional and among_rows:
        with pytest.raises(bnn.ModelError, match="changes others"):
            quick(model, x, Y)
    else:
        masks = quick(model, x, Y, conditional=conditional, steps=5).predict(x).local
        assert masks["hidden.0.mask"].shape == (1, 40, 12, 2)


@pytest.mark.parametrize("conditional", [True, False])
def test_tokens_of_a_transformer_share_the_features_that_they_lose(conditional):
    torch.manual_seed(0)
    x = torch.randint(1, 9, (12, 5))
    x[:6, 3:] = 0
    y = (x > x.roll(1, 1)).long()
    settings = {"vocabulary": 9, "padding": 0, "width": 8, "heads": 2}
    model = bnn.models.transformer_tagging(5, 2, **settings)
    posterior = quick(model, x, y, conditional=conditional, steps=20)
    assert math.isfinite(posterior.log_evidence)
    prediction = posterior.predict(x, seams=["hidden.0", "hidden.1"])
    for seam in ("hidden.0", "hidden.1"):
        masks, h = prediction.local[f"{seam}.mask"], prediction.local[seam]
        assert masks.shape == (1, 40, 12, 8)
        assert h.shape == (1, 40, 12, 5, 8)
        assert ((h == 0) == (masks == 0)[:, :, :, None]).all()


@pytest.mark.parametrize("conditional", [True, False])
def test_log_z_costs_what_it_may(conditional, monkeypatch):
    """Fewer masks where rows are many, and the uniforms of a few of them in memory together."""
    for name, value in {"_EVALUATIONS": 12 * 36, "_BY_ROW": 12 * 20, "_CELLS": 12 * 5}.items():
        monkeypatch.setattr(_flow, name, value, raising=False)
    asked, noise, assess = [], Flow.noise, gflowout.assess

    def watched(flow, particles, rows):
        asked.append(particles * (1 if flow.labels is None else rows))
        return noise(flow, particles, rows)

    def assessed(each, *rest):
        asked.append(each.shape)
        return assess(each, *rest)

    monkeypatch.setattr(Flow, "noise", watched)
    monkeypatch.setattr(gflowout, "assess", assessed)
    quick(mlp(), X, Y, conditional=conditional, steps=1)
    *uniforms, shape = asked
    assert shape == ((20, 12) if conditional else (36,))
    assert max(uniforms[1:] if conditional else [0]) <= 12 * 5


def test_axis_says_where_the_units_are():
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2, 1, 3]).to_event(3))
        with pyro.plate("data", len(x)):
            h = torch.nn.functional.conv1d(x[:, None], w)
            h = pyro.deterministic("hidden.0", h, event_dim=2)  # (row, channel, place)
            pyro.sample("y", dist.Normal(h.sum((1, 2)), 1.0), obs=y)

    x = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
    by_place = quick(model, x, x.sum(1)).predict(x)
    assert by_place.local["hidden.0.mask"].shape == (1, 40, 9, 5)
    for axis in (1, {"hidden.0": -2}):
        by_channel = quick(model, x, x.sum(1), axis=axis, conditional=False).predict(x)
        assert by_channel.local["hidden.0.mask"].shape == (1, 40, 9, 2)
    with pytest.raises(bnn.ModelError, match="no axis 0 of units"):
        quick(model, x, x.sum(1), axis=0)


def test_a_loader_and_trainable_leftovers():
    def model(x, y=None):
        scale = pyro.param("scale", torch.ones(()), constraint=dist.constraints.positive)
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([1, 4]).to_event(2))
        with pyro.plate("data", len(x)):
            h = pyro.deterministic("hidden.0", x @ w, event_dim=1)
            pyro.sample("y", dist.Normal(h.sum(-1), scale), obs=y)

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        method = bnn.GFlowOut(steps=200, draws=20)
        posterior = bnn.fit(model, loader, method=method, progress=False)
    assert posterior.params["scale"] < 0.9
    assert posterior.predict(X).local["hidden.0.mask"].shape == (1, 20, 12, 4)


def test_the_weights_are_the_mode_under_the_masks():
    """With masks all but certain the optimum is the ridge regression of `MAP`."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 2, generator=generator)
    y = x @ torch.tensor([1.0, -0.5]) + 0.5 * torch.randn(40, generator=generator)

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            h = pyro.deterministic("hidden.0", x, event_dim=1)
            pyro.sample("y", dist.Normal(h @ w, 0.5), obs=y)

    optimum = torch.linalg.solve(4 * x.T @ x + torch.eye(2), 4 * x.T @ y)
    sd = torch.linalg.inv(4 * x.T @ x + torch.eye(2)).diagonal().sqrt()
    for settings in ({"conditional": False}, {"conditional": True, "batch_size": 20}):
        common = {"prior_keep": 0.9999, "steps": 500}
        posterior = fit(model, x, y, **common | settings)
        assert ((posterior.draws["w"][0, 0] - optimum).abs() < 0.3 * sd).all()


# --- what it refuses


def unused(x, y=None):
    with pyro.plate("data", len(x)):
        h = torch.tanh(x)
        pyro.deterministic("hidden.0", h, event_dim=1)
        pyro.sample("y", dist.Normal(h[:, 0], 1.0), obs=y)


def outside_the_plate(x, y=None):
    h = pyro.deterministic("hidden.0", torch.tanh(x))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(h[:, 0], 1.0), obs=y)


def neighbours(x, y=None):
    with pyro.plate("data", len(x)):
        h = pyro.deterministic("hidden.0", torch.tanh(x), event_dim=1)
        pyro.sample("y", dist.Normal(h.mean(0) + 0 * x[:, 0], 1.0), obs=y)


def no_seam(x, y=None):
    with pyro.plate("data", len(x)):
        f = pyro.deterministic("f", x[:, 0])
        pyro.sample("y", dist.Normal(f, 1.0), obs=y)


def subsampled(x, y=None):
    with pyro.plate("data", len(x), subsample_size=4) as rows:
        h = pyro.deterministic("hidden.0", x[rows], event_dim=1)
        pyro.sample("y", dist.Normal(h[:, 0], 1.0), obs=None if y is None else y[rows])


@pytest.mark.parametrize(
    ("model", "settings", "told"),
    [
        (unused, {}, "drops what pyro.deterministic returns"),
        (outside_the_plate, {}, 'inside of the plate "data"'),
        (neighbours, {}, "Use conditional=False"),
        (no_seam, {}, 'no "hidden.0" but f'),
        (no_seam, {"seams": ["f"]}, r"has shape \(12,\)"),
        (subsampled, {}, "draws rows by itself"),
        (neighbours, {"prior_keep": {"hidden.7": 0.5}}, 'no "hidden.7" but hidden.0'),
    ],
)
def test_models_that_have_no_masks_to_find_are_refused(model, settings, told):
    with pytest.raises(bnn.ModelError, match=told):
        quick(model, X, Y, **settings)


def test_latent_sites_of_a_row_have_no_masks_of_their_own():
    def model(x, y=None):
        with pyro.plate("data", len(x)):
            shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
            h = pyro.deterministic("hidden.0", x + shift[:, None], event_dim=1)
            pyro.sample("y", dist.Normal(h[:, 0], 1.0), obs=y)

    with pytest.raises(bnn.ModelError, match='"shift" is a latent site of each row'):
        quick(model, X, Y)


def test_seams_outside_the_plate_take_one_mask():
    posterior = quick(outside_the_plate, X, Y, conditional=False)
    assert posterior.predict(X).local["hidden.0.mask"].shape == (1, 40, 12, 1)


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "subtrajectory"}, {"particles": 1}, {"prior_keep": 1.0}, {"power": 0.0},
        {"temperature": -1.0}, {"blocks": 0}, {"prior_keep": {"hidden.0": 0.0}},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match="GFlowOut"):
        bnn.GFlowOut(**settings)


def test_settings_of_another_kind_are_refused():
    for settings in ({"seams": "hidden.0"}, {"prior_keep": "half"}):
        with pytest.raises(TypeError, match="GFlowOut"):
            bnn.GFlowOut(**settings)


def test_a_tempered_reward_is_told():
    with pytest.warns(bnn.ApproximationWarning, match="not their posterior"):
        posterior = quick(mlp(), X, Y, power=0.5)
    assert posterior.log_evidence is None
