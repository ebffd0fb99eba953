"""Dirichlet attention against posteriors known in closed form, and what it promises beside."""

import dataclasses
import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import bnn
from bnn.handlers import AtMeans
from bnn.inference._attention import Attended, Attending, Rule, told
from bnn.inference._attention_laws import Law
from bnn.models import priors, transformer_classification, transformer_tagging

LOOKS, KEYS, COPIES = 30, 4, 100


def inverse_softplus(x):
    return x + (-torch.expm1(-x)).log()


def looks(x, y=None):
    """Each row has one query, whose attention is seen 30 times: Dirichlet(prior + counts).

    The logs of concentrations are entries of a table, so that q is as free as the posterior. There
    are three rows, each many times: one draw of each is a noisy gradient. Row 2 does not see key 3.
    """
    table = pyro.param("table", torch.zeros(3, KEYS))
    with pyro.plate("data", len(x)):
        hidden = (x == 2)[:, None] & (torch.arange(KEYS) == 3)
        scores = inverse_softplus(table[x].exp()).masked_fill(hidden, -math.inf)
        scores = pyro.deterministic("attention.0.scores", scores, event_dim=1)
        a = pyro.deterministic("attention.0.weights", scores.softmax(-1), event_dim=1)
        each = a[:, None, :].expand(-1, LOOKS, -1)
        pyro.sample("y", dist.Categorical(probs=each).to_event(1), obs=y)


def looks_at_sites(x, y=None):
    """The same, the weights stated as a Dirichlet site by the model itself."""
    table = pyro.param("table", torch.zeros(3, KEYS))
    with pyro.plate("data", len(x)):
        scores = inverse_softplus(table[x].exp())
        scores = pyro.deterministic("attention.0.scores", scores, event_dim=1)
        prior = torch.tensor([0.5, 1.0, 2.0, 0.7]).expand(len(x), KEYS)
        a = pyro.sample("attention.0.weights", dist.Dirichlet(prior))
        each = a[:, None, :].expand(-1, LOOKS, -1)
        pyro.sample("y", dist.Categorical(probs=each).to_event(1), obs=y)


def seen(keys=(4, 4, 3)):
    rng = np.random.default_rng(0)
    y = np.stack([rng.choice(k, LOOKS, p=rng.dirichlet(np.ones(k))) for k in keys])
    counts = np.stack([np.bincount(row, minlength=KEYS) for row in y])
    return torch.arange(3).repeat(COPIES), torch.tensor(y).repeat(COPIES, 1), torch.tensor(counts)


def log_evidence(prior, counts):
    """Of each row, of labels in their order: a Dirichlet-multinomial without its coefficient."""
    prior, counts = prior.double(), counts.double()
    after = prior + counts
    each = torch.lgamma(after) - torch.lgamma(prior)
    return each.sum(-1) + torch.lgamma(prior.sum(-1)) - torch.lgamma(after.sum(-1))


EXACT = bnn.DirichletAttention(
    concentration="evidence", prior="uniform", prior_concentration=4.0, steps=400,
    learning_rate=0.1, schedule="cosine", draws=50,
)  # fmt: skip


def fit(model, *data, method, seed=0):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the settings are too short to converge
        return bnn.fit(model, *data, method=method, seed=seed, progress=False)


def concentrations(posterior):
    return posterior.params["table"].exp() + 0.01


def hold_against_the_posterior(method):
    """Concentrations within 10 % and the ELBO within .02 nats a row: q holds the posterior."""
    x, y, counts = seen()
    posterior = fit(looks, x, y, method=method)
    prior = torch.tensor([[1.0] * 4, [1.0] * 4, [4 / 3] * 3 + [0.0]])
    ratio = concentrations(posterior) / (prior + counts)
    ratio[2, 3] = 1.0
    exact = sum(log_evidence(prior[i, :k], counts[i, :k]) for i, k in enumerate((4, 4, 3)))
    assert (ratio - 1).abs().max() < 0.1
    assert posterior.elbo == pytest.approx(COPIES * float(exact), abs=0.02 * len(x))
    return posterior


@pytest.mark.parametrize("batch_size", [None, 60])
def test_one_query_seen_often_is_the_conjugate_posterior(batch_size):
    posterior = hold_against_the_posterior(dataclasses.replace(EXACT, batch_size=batch_size))
    weights = posterior.predict(torch.arange(3)).local["attention.0.weights"]
    assert weights.shape == (1, 50, 3, KEYS)
    assert (weights[:, :, 2, 3] == 0).all()


@pytest.mark.parametrize(("row", "keys"), [(1, 4), (2, 3)])
def test_the_bound_of_one_query_is_its_log_evidence(row, keys):
    """Within .02 nats: 8,192 draws of a log likelihood whose sd is 1.2 leave .013 in the bound."""
    x, y, counts = seen()
    method = dataclasses.replace(EXACT, steps=3_000, learning_rate=0.05)
    posterior = fit(looks, x[[row]], y[[row]], method=method)
    exact = log_evidence(torch.full((keys,), 4 / keys), counts[row, :keys])
    assert posterior.elbo == pytest.approx(float(exact), abs=0.02)


def test_the_models_own_site_is_the_prior():
    x, y, counts = seen((4, 4, 4))
    method = dataclasses.replace(EXACT, prior=None)
    posterior = bnn.fit(looks_at_sites, x, y, method=method, progress=False)
    prior = torch.tensor([0.5, 1.0, 2.0, 0.7])
    exact = COPIES * float(log_evidence(prior, counts).sum())
    assert (concentrations(posterior) / (prior + counts) - 1).abs().max() < 0.1
    assert posterior.elbo == pytest.approx(exact, abs=0.02 * len(x))


QUICK = bnn.DirichletAttention(steps=40, learning_rate=0.01, draws=6)
METHODS = {
    "dirichlet": QUICK,
    "evidence": dataclasses.replace(QUICK, concentration="evidence", prior="uniform"),
    "weibull": dataclasses.replace(QUICK, family="weibull", prior="uniform"),
    "lognormal": dataclasses.replace(QUICK, family="lognormal", prior_concentration=None),
    "contextual": dataclasses.replace(QUICK, prior="contextual", weights="normal"),
    "fixed": dataclasses.replace(QUICK, sharpness=30.0, annealing=5, batch_size=10),
}


def tagged():
    """Ids with padding 0 at the end, and whether each is above its neighbour on the left."""
    rng = np.random.default_rng(1)
    x = rng.integers(1, 9, (24, 6))
    x[np.arange(6) >= rng.integers(3, 7, 24)[:, None]] = 0
    y = (x > np.roll(x, 1, 1)).astype(int)
    return torch.tensor(x), torch.tensor(y)


def tagger(**settings):
    torch.manual_seed(0)
    given = {"vocabulary": 9, "padding": 0, "width": 8, "heads": 2, "layers": 2, "causal": True}
    return transformer_tagging(6, 2, **given | settings)


@pytest.fixture(scope="module")
def fits():
    return {name: fit(tagger(), *tagged(), method=method) for name, method in METHODS.items()}


@pytest.fixture(params=METHODS)
def name(request):
    return request.param


def test_attention_is_drawn_for_each_draw_and_row_and_hidden_keys_get_nothing(fits, name):
    x, _ = tagged()
    prediction = fits[name].predict(x)
    assert prediction.probs.shape == (24, 6, 2)
    real = (x != 0).float()
    hidden = ~torch.ones(6, 6, dtype=torch.bool).tril() | (real[:, :, None] * real[:, None] == 0)
    hidden = hidden[:, None]
    for layer in range(2):
        a = prediction.local[f"attention.{layer}.weights"]
        assert a.shape == (1, 6, 24, 2, 6, 6)
        assert (a.masked_select(hidden) == 0).all()
        torch.testing.assert_close(a.sum(-1), real[:, None].expand(1, 6, 24, 2, 6))
        open_ = a[0][:, ~hidden.expand(24, 2, 6, 6)]
        choice = open_[0] < 1
        assert not torch.equal(open_[0][choice], open_[1][choice])


def test_mode_mean_is_one_pass_at_the_mean(fits, name):
    x, _ = tagged()
    posterior = fits[name]
    mean = posterior.predict(x, mode="mean", seams=["attention.0.scores"])
    assert mean.f.shape[:2] == ((1, 6) if name == "contextual" else (1, 1))
    again = posterior.predict(x, mode="mean", seed=1)
    assert torch.equal(mean.f, again.f)
    a, scores = mean.local["attention.0.weights"], mean.local["attention.0.scores"]
    if name in ("weibull", "lognormal"):
        torch.testing.assert_close(a, scores.softmax(-1).nan_to_num())
    many = posterior.predict(x, seed=2).local["attention.0.weights"]
    assert (many.mean((0, 1)) - a.mean((0, 1))).abs().mean() < 0.2


def test_saves_and_predicts_the_same_bits(fits, name, tmp_path):
    x, _ = tagged()
    posterior = fits[name]
    posterior.save(tmp_path / "fit")
    loaded = bnn.load(tmp_path / "fit", tagger())
    assert loaded.method == posterior.method
    first, second = posterior.predict(x), loaded.predict(x)
    assert torch.equal(first.y, second.y)
    for site, draws in first.local.items():
        assert torch.equal(draws, second.local[site])


def test_same_seed_same_bits_and_the_callers_state(name, fits):
    pyro.param("mine", torch.tensor(3.0))
    torch.manual_seed(7)
    before = torch.get_rng_state()
    try:
        again = fit(tagger(), *tagged(), method=METHODS[name])
        torch.manual_seed(7)
        assert torch.equal(before, torch.get_rng_state())
        assert list(pyro.get_param_store().keys()) == ["mine"]
    finally:
        pyro.clear_param_store()
    posterior = fits[name]
    for site, tensor in (posterior.draws | posterior.params).items():
        assert torch.equal(tensor, (again.draws | again.params)[site])
    assert torch.equal(posterior.history, again.history)
    assert not torch.equal(
        posterior.predict(tagged()[0]).y, posterior.predict(tagged()[0], seed=1).y
    )


def test_scores_log_likelihood_and_reports(fits, name):
    x, y = tagged()
    posterior = fits[name]
    assert posterior.log_likelihood(x, y).shape == (*posterior.shape, 24)
    assert torch.isfinite(posterior.log_score(x, y)).all()
    found = {finding.name: finding for finding in posterior.diagnose().findings}
    assert set(found) >= {
        text
        for layer in ("attention.0", "attention.1")
        for text in (
            f"KL of {layer}.weights from its prior", f"spread of {layer}.weights",
            f"keys that a query of {layer} looks at",
        )
    }  # fmt: skip
    assert not found["spread of attention.0.weights"].doubtful
    assert eval(repr(posterior.method), vars(bnn)) == posterior.method


def test_padding_changes_nothing():
    """One more place of padding: the same output and KL, at the same weights."""
    x, _ = tagged()
    wide = torch.nn.functional.pad(x, (0, 1))
    settings = {"vocabulary": 9, "padding": 0, "width": 8, "heads": 2, "positions": "sinusoidal"}
    nets = [transformer_classification(tokens, 3, **settings).net for tokens in (6, 7)]
    nets[1].load_state_dict(nets[0].state_dict())
    rule = Rule("dirichlet", None, "uniform", 10.0)
    seen = []
    for net, given in zip(nets, (x, wide), strict=True):
        attended = Attended(net, rule, {})
        with AtMeans(()), Attending(rule, {}) as run:
            out = attended.model(given)
        seen.append((out, run.met["attention.0"].log_prob(None)))
    torch.testing.assert_close(seen[0], seen[1])


def test_a_collapse_and_a_runaway_are_told():
    x, y = tagged()
    method = dataclasses.replace(QUICK, prior="uniform", steps=300, learning_rate=0.03)
    with pytest.warns(bnn.ConvergenceWarning, match="nats from its prior"):
        posterior = bnn.fit(tagger(layers=1), x, y, method=method, progress=False)
    found = {finding.name: finding for finding in method.findings(posterior)}
    assert found["KL of attention.0.weights from its prior"].doubtful
    sharp = dataclasses.replace(QUICK, sharpness=9_000.0)
    with pytest.warns(bnn.ConvergenceWarning, match="its sharpness ran away"):
        posterior = bnn.fit(tagger(layers=1), x, y, method=sharp, progress=False)
    found = {finding.name: finding for finding in sharp.findings(posterior)}
    assert found["spread of attention.0.weights"].doubtful


def test_a_bound_without_a_k_hat_says_so(fits, name):
    """Attention is drawn anew for each row, so that no importance weights tell of q."""
    missing = fits[name].diagnose().missing
    assert ("k-hat of q" in missing) == (fits[name].elbo is not None) == (name == "contextual")


class Largest(TorchDispatchMode):
    """Keeps the number of entries of the largest tensor that is made inside."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


def test_findings_do_not_hold_all_draws_of_attention():
    """64 draws of the weights of 24 rows: of each query the largest is enough."""
    rule = Rule("dirichlet", None, "uniform", 10.0)
    with Largest() as made:
        found = told(Attended(tagger().net, rule, {}), tagged()[:1])
    assert len(found) == 6
    assert made.numbers < 20 * 24 * 2 * 6 * 6


def test_the_models_prior_counts_the_keys_that_are_seen():
    """The model's Dirichlet, cut down to the keys a query sees, is the rule's uniform prior."""
    x, _ = tagged()
    net = tagger(attention=priors.UniformAttention(7.0)).net
    with Attending(Rule("dirichlet", 5.0, None, None), {}) as run:
        net(x)
    with Attending(Rule("dirichlet", 5.0, "uniform", 7.0), {}) as other:
        net(x)
    torch.testing.assert_close(
        run.met["attention.0"].log_prob(None), other.met["attention.0"].log_prob(None)
    )


def test_refuses_what_has_no_attention_or_states_it_elsewhere():
    x, y, _ = seen()

    def bare(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=w.expand(len(x), LOOKS, 4)).to_event(1), obs=y)

    def outside(x, y=None):
        scores = pyro.deterministic("attention.0.scores", torch.zeros(len(x), 4), event_dim=1)
        pyro.deterministic("attention.0.weights", scores.softmax(-1), event_dim=1)
        bare(x, y)

    def unscored(x, y=None):
        with pyro.plate("outer", len(x)):
            pyro.deterministic("attention.0.weights", torch.ones(len(x), 4) / 4, event_dim=1)
        bare(x, y)

    for model, text in ((bare, "announces none"), (outside, "data plate"), (unscored, "missing")):
        with pytest.raises(bnn.ModelError, match=text):
            fit(model, x, y, method=QUICK)
    with pytest.raises(bnn.ModelError, match=r'"attention.0.keys", .* found none'):
        fit(looks, x, y, method=METHODS["contextual"])


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"family": "gamma"}, "known are 'dirichlet', 'weibull', 'lognormal'"),
        ({"family": "weibull", "concentration": "evidence"}, "is of a Dirichlet"),
        ({"prior": "flat"}, "known are None, 'scores'"),
        ({"sharpness": -1.0}, "above 0"),
        ({"annealing": 10_000}, "reach 1"),
        ({"weights": "flow"}, "known are 'point', 'normal'"),
    ],
)
def test_refuses_settings(settings, text):
    with pytest.raises(ValueError, match=text):
        bnn.DirichletAttention(**settings)


@pytest.mark.slow
def test_digits_are_told_as_well_as_by_softmax_attention():
    """8 x 8 digits as 8 tokens: accuracy of .93, an ECE no worse, and more doubt of noise.

    So many steps are compiled.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x = torch.tensor(images[order] / 16, dtype=torch.float32).reshape(-1, 8, 8)
    y = torch.tensor(labels[order])
    train, test = (x[:1_200], y[:1_200]), (x[1_200:], y[1_200:])
    settings = {"steps": 1_000, "learning_rate": 0.005, "batch_size": 100, "schedule": "cosine"}
    ece = {}
    for method in (bnn.MAP(**settings, draws=1), bnn.DirichletAttention(**settings, draws=20)):
        torch.manual_seed(0)
        model = transformer_classification(8, 10, features=8)
        posterior = fit(model, *train, method=method)
        prediction = posterior.predict(test[0])
        ece[type(method).__name__] = bnn.calibration.ece(prediction.probs, test[1])
    assert (prediction.probs.argmax(-1) == test[1]).float().mean() > 0.93
    assert ece["DirichletAttention"] <= ece["MAP"] + 0.02
    noise = posterior.predict(torch.rand(300, 8, 8))
    assert noise.mutual_information.mean() > prediction.mutual_information.mean()


@pytest.mark.parametrize("plant", ["unscaled", "hidden", "sign"])
def test_the_bound_shows_what_is_wrong_with_it(plant, monkeypatch):
    """A KL that is not scaled by N/B, counts hidden keys, or adds to the bound: none passes."""
    log_prob = Law.log_prob
    if plant == "unscaled":
        monkeypatch.setattr(Law, "log_prob", lambda law, a: log_prob(law, a) * len(law.pi) / 300)
    elif plant == "hidden":
        monkeypatch.setattr(Law, "_over_keys", lambda law, e: e.expand(law.pi.shape).sum(-1))
    else:
        monkeypatch.setattr(Law, "log_prob", lambda law, a: -log_prob(law, a))
    with pytest.raises((AssertionError, bnn.FitError)):
        hold_against_the_posterior(dataclasses.replace(EXACT, batch_size=60))
