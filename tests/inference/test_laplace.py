"""Laplace against posteriors that are Gaussian, and modes and curvatures known by other means."""

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import bnn
from bnn import contract
from bnn.data import Data
from bnn.handlers import quiet_pyro
from bnn.inference._curvature import curvature
from bnn.inference._energy import Energy
from bnn.inference._joint import Joint
from bnn.inference._linearize import require_f
from bnn.inference._mode import polish
from bnn.inference._precision import Diagonal, Precision
from bnn.models import likelihoods, mlp_regression, sample_weights, supervised
from tests import exact


def fit(model, *data, seed=1, **settings):
    settings = {"steps": 300, "schedule": "constant"} | settings
    return bnn.fit(model, *data, method=bnn.Laplace(**settings), seed=seed, progress=False)


def joint_of(model, *data, z=None, sites=None, batch_size=None):
    """The log joint around z, and z."""
    names = ("x", "y")[-len(data) :]
    read, found = contract.check(model, Data(data, names, rows=len(data[-1])))
    energy = Energy(model, read, found)
    z = torch.zeros(energy.size) if z is None else z
    free = [s.name for s in energy.slots] if sites is None else sites
    return Joint(energy, read, batch_size, z, free)


def dense(joint, structure="full", hessian="ggn"):
    """The covariance that a precision stands for, (size, size)."""
    with quiet_pyro():
        precision = curvature(joint, joint.start, structure, hessian)
    root = precision.spread(torch.eye(precision.size, dtype=torch.float64))  # rows R e_i
    cov = root.T @ root
    torch.testing.assert_close(precision.sd, cov.diagonal().sqrt())
    torch.testing.assert_close(precision.log_det, -float(torch.logdet(cov)))
    eye = torch.eye(precision.size, dtype=torch.float64)
    torch.testing.assert_close(precision.pull(eye) @ precision.pull(eye).T, cov)
    return cov


@pytest.mark.parametrize("hessian", ["ggn", "exact"])
def test_regression_is_exact(hessian):
    exact.check_regression_by_laplace(hessian=hessian)


def test_kronecker_is_exact_with_one_output():
    exact.check_regression_by_laplace(structure="kron")


@pytest.mark.parametrize("hessian", ["ggn", "exact"])
def test_diagonal_is_the_inverse_of_the_diagonal(hessian):
    exact.check_regression_by_laplace(structure="diag", hessian=hessian, ratio=0.6204)


@pytest.mark.parametrize("hessian", ["ggn", "exact"])
def test_widths_are_those_of_the_posterior(hessian, regression):
    joint = joint_of(regression.model, regression.x, regression.y, z=regression.mean)
    cov = dense(joint, hessian=hessian)
    torch.testing.assert_close(cov, regression.cov.double(), rtol=1e-5, atol=1e-7)
    one = dense(joint, "diag", hessian).diagonal()
    torch.testing.assert_close(one, 1 / torch.linalg.inv(regression.cov.double()).diagonal())


def test_draws_of_a_fit_are_as_wide_as_the_posterior_to_a_thousandth(regression):
    """Of eight million, whose sd has a relative error of .00025."""
    w = fit(regression.model, regression.x, regression.y, draws=8_000_000).draws["w"][0]
    ratio = w.double().std(0) / regression.sd
    assert ((ratio - 1).abs() < 1e-3).all(), ratio


def test_sites_of_the_rows_are_part_of_the_gaussian():
    """y = w + u_i + noise with all scales 1; no run on one row shows all sites."""

    def random_effects(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(w * x + u, 1.0), obs=y)

    x = torch.linspace(-1, 2, 6)
    design = torch.cat([x[:, None], torch.eye(6)], 1).double()
    precision = torch.eye(7).double() + design.T @ design
    for hessian in ("ggn", "exact"):
        cov = dense(joint_of(random_effects, x, x), hessian=hessian)
        torch.testing.assert_close(cov, torch.linalg.inv(precision), rtol=1e-5, atol=1e-7)


def test_a_batch_size_does_not_change_the_curvature(regression):
    for structure in ("full", "diag", "kron"):
        whole, parts = (
            dense(joint_of(regression.model, regression.x, regression.y, batch_size=b), structure)
            for b in (None, 7)  # 50 rows: the last batch has one
        )
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-8)


def test_a_prior_may_read_all_rows():
    """Its scale is the inverse sd of 300 inputs, of which the first hundred are small."""

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1 / x.std()))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x, 100.0), obs=y)

    x = torch.cat([torch.full((150,), 0.1), torch.full((150,), 10.0)])
    truth = x.var() + x.square().sum() / 100**2
    for structure in ("full", "diag"):
        assert math.isclose(dense(joint_of(model, x, x), structure), 1 / truth, rel_tol=1e-5)


@pytest.mark.parametrize("hessian", ["ggn", "exact"])
def test_a_positive_site_is_gaussian_in_its_logarithm(hessian):
    exact.check_positive_site_by_laplace(hessian=hessian)


def logistic(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        f = pyro.deterministic("f", w * x)
        pyro.sample("y", dist.Bernoulli(logits=f), obs=y)


def test_one_logistic_weight_against_quadrature():
    rng = np.random.default_rng(3)
    x = rng.standard_normal(60)
    y = (rng.random(60) < 1 / (1 + np.exp(-1.5 * x))).astype(float)
    grid = np.linspace(-4, 8, 200_001)
    f = x[:, None] * grid[None, ::100]
    log_joint = (y[:, None] * f - np.logaddexp(0, f)).sum(0)
    log_joint += -0.125 * grid[::100] ** 2 - math.log(2 * math.sqrt(2 * math.pi))
    step = grid[100] - grid[0]
    peak = log_joint.max()
    truth = peak + math.log(np.exp(log_joint - peak).sum() * step)
    at = log_joint.argmax()
    mode = grid[::100][at] - step / 2 * (log_joint[at + 1] - log_joint[at - 1]) / (
        log_joint[at + 1] - 2 * log_joint[at] + log_joint[at - 1]
    )
    posterior = fit(logistic, x, y, draws=40_000)
    w = posterior.draws["w"]
    sd = float(w.std())
    assert abs(float(w.mean()) - mode) < 4 * sd / math.sqrt(40_000)
    curve = 0.25 + (x**2 * np.exp(-np.logaddexp(0, mode * x) - np.logaddexp(0, -mode * x))).sum()
    assert abs(sd * math.sqrt(curve) - 1) < 4 / math.sqrt(80_000)
    # the next term of the expansion is of order 1 / rows; without 1/2 log det H it is 1.2 nats off
    assert abs(posterior.log_evidence - truth) < 0.03


def families():
    ones = torch.ones(12)
    count, counts = torch.arange(12.0) % 4, torch.arange(12.0) % 3
    unit = (torch.arange(12.0) + 1) / 14
    return {
        "normal": (lambda f, s: dist.Normal(f[:, 0], s), counts, 2),
        "laplace": (lambda f, s: dist.Laplace(f[:, 0], s), counts, 2),
        "student": (lambda f, s: dist.StudentT(5.0, f[:, 0], s), counts, 2),
        "log normal": (lambda f, s: dist.LogNormal(f[:, 0], s), ones + counts, 2),
        "bernoulli": (lambda f, s: dist.Bernoulli(logits=s * f[:, 0]), count % 2, 1),
        "binomial": (lambda f, s: dist.Binomial(4, logits=f[:, 0] * s), count, 1),
        "categorical": (lambda f, s: dist.Categorical(logits=s * f), counts.long(), 3),
        "poisson": (lambda f, s: dist.Poisson((s * f[:, 0]).exp()), counts, 1),
        "negative binomial": (
            lambda f, s: dist.NegativeBinomial(2.5, logits=s * f[:, 0]),
            counts,
            1,
        ),
        "exponential": (lambda f, s: dist.Exponential((s * f[:, 0]).exp()), ones, 1),
        "gamma": (lambda f, s: dist.Gamma(s, f[:, 0].exp()), ones + counts, 2),
        "beta": (lambda f, s: dist.Beta(f[:, 0].exp(), s), unit, 2),
    }


@pytest.mark.parametrize("family", families())
def test_information_is_the_variance_of_the_score(family):
    """F = E[score score^T] in z, by 100,000 draws of y from the model itself."""
    state, y, _ = families()[family]

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", state(x @ w, s), obs=y)

    x = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    z = 0.5 * torch.randn(7, generator=torch.Generator().manual_seed(1))
    joint = joint_of(model, x, y, z=z)
    with quiet_pyro():
        from bnn.inference._curvature import _gauss_newton

        got = _gauss_newton(joint, z, False)
        w, s = z[:6].reshape(2, 3).requires_grad_(), z[6].clone().requires_grad_()
        torch.manual_seed(0)
        total, count = torch.zeros(7, 7, dtype=torch.float64), 100_000
        for row in range(12):
            fn = lambda w, s, r=row: state(x[r : r + 1] @ w, s.exp())
            drawn = fn(w, s).sample((count,))

            def score(drawn, fn=fn):
                value = lambda w, s: fn(w, s).log_prob(drawn).sum()
                return torch.func.grad(value, (0, 1))(w, s)

            at_w, at_s = torch.func.vmap(score)(drawn)
            each = torch.cat([at_w.flatten(1), at_s[:, None]], 1).double()
            total += each.T @ each / count
    # entries in units of the diagonal: each is a mean of products of kurtosis up to about 30
    unit = total.diagonal().sqrt().clamp(min=1e-9)
    assert ((got - total).abs() / unit[:, None] / unit[None]).max() < 0.06


def test_ggn_is_the_hessian_where_theta_is_linear_and_natural():
    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    y = (x.sum(1) > 0).long()
    model = supervised(torch.nn.Linear(3, 2), likelihoods.Categorical(2))
    z = 0.3 * torch.randn(8, generator=torch.Generator().manual_seed(1))
    first, second = (dense(joint_of(model, x, y, z=z), hessian=h) for h in ("ggn", "exact"))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("where", ["before to_event", "after to_event", "around"])
def test_what_a_mask_hides_and_a_scale_weighs(where):
    mask = torch.tensor([[1, 0], [1, 1], [0, 0], [1, 0], [0, 1]]).bool()

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2, 2]).to_event(2))
        with pyro.plate("data", len(x)), pyro.poutine.scale(scale=2.5):
            fn = dist.Normal(x @ w, 0.5)
            if where == "before to_event":
                pyro.sample("y", fn.mask(mask).to_event(1), obs=y)
            elif where == "after to_event":
                pyro.sample("y", fn.to_event(1).mask(mask[:, 0]), obs=y)
            else:
                with pyro.poutine.mask(mask=mask[:, 0]):
                    pyro.sample("y", fn.to_event(1), obs=y)

    x, y = torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(0)).unbind()
    joint = joint_of(model, x, y)
    torch.testing.assert_close(dense(joint), dense(joint, hessian="exact"), rtol=1e-4, atol=1e-6)


def test_exact_is_the_hessian_of_a_net():
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    model = mlp_regression(2, (3,))
    z = 0.3 * torch.randn(14, generator=torch.Generator().manual_seed(1)) + 0.5
    joint = joint_of(model, x, x.sum(1), z=z)
    with quiet_pyro():
        value = lambda z: joint.energy.log_joint(z, joint.data.tensors)
        hessian = -torch.autograd.functional.hessian(value, z).double()
        # at any point, definite or not
        from bnn.inference._curvature import _exact

        got = _exact(joint, z, False)
        torch.testing.assert_close(got, hessian, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(_exact(joint, z, True), hessian.diagonal(), rtol=1e-4, atol=1e-4)
        parts = joint_of(model, x, x.sum(1), z=z, batch_size=6)
        torch.testing.assert_close(_exact(parts, z, False), hessian, rtol=1e-4, atol=1e-4)


NETS = {
    "linear": (
        lambda: torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)),
        (3,),
    ),
    "conv": (
        lambda: torch.nn.Sequential(
            torch.nn.Conv1d(2, 3, 2), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(6, 2)
        ),
        (2, 3),
    ),
    "gains": (
        lambda: torch.nn.Sequential(
            torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2)
        ),
        (3,),
    ),
}


@pytest.mark.parametrize("kind", NETS)
def test_kronecker_blocks_of_one_row_are_exact(kind):
    """With one row (and one place) the block of a layer is a a^T x G: no average is split."""
    make, shape = NETS[kind]
    model = supervised(make(), likelihoods.Categorical(2))
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(1, *shape, generator=generator), torch.tensor([1])
    size = joint_of(model, x, y).energy.size
    joint = joint_of(model, x, y, z=torch.randn(size, generator=generator))
    full = torch.linalg.inv(dense(joint))
    got = torch.linalg.inv(dense(joint, "kron"))
    layers = {}
    for slot in joint.slots:
        layers.setdefault(slot.name.rpartition(".")[0], []).append(slot.span)
    assert len(layers) == 2 + (kind == "gains")
    for number, spans in enumerate(layers.values()):
        at = torch.cat([torch.arange(s.start, s.stop) for s in spans])
        if kind == "conv" and number == 0:  # two places: see the next test
            continue
        torch.testing.assert_close(got[at][:, at], full[at][:, at], rtol=1e-4, atol=1e-6)
    rest = got.clone()
    for spans in layers.values():
        at = torch.cat([torch.arange(s.start, s.stop) for s in spans])
        rest[at[:, None], at] = 0
    assert rest.abs().max() < 1e-8


def test_kronecker_factors_are_the_sums_over_rows_and_places():
    """H = (sum a a^T) x (sum g g^T) / M + prior, with a and g by hand."""
    net = torch.nn.Conv1d(2, 3, 2)

    def model(x, y=None):
        out = sample_weights(net)(x)  # (row, 3, place)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(out.sum((1, 2)) ** 2, 0.5), obs=y)

    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(5, 2, 4, generator=generator), torch.randn(5, generator=generator)
    z = torch.randn(15, generator=generator)
    got = torch.linalg.inv(dense(joint_of(model, x, y, z=z), "kron"))
    patches = torch.stack([x[:, :, p : p + 2].flatten(1) for p in range(3)], 1).reshape(15, 4)
    a = torch.cat([patches, torch.ones(15, 1)], 1).double()
    out = (patches @ z[:12].reshape(3, 4).T + z[12:]).reshape(5, 3, 3).sum((1, 2))
    slope = (2 * out / 0.5).double()  # of f / sigma, the same at every output and place
    g = slope.repeat_interleave(3)[:, None].expand(15, 3)
    whole = torch.kron(g.T @ g, a.T @ a / 15)
    order = [o * 4 + i if i < 4 else 12 + o for o in range(3) for i in range(5)]
    prior = torch.tensor([4.0] * 12 + [1.0] * 3).double()  # fan-in 4, bias scale 1
    torch.testing.assert_close(
        got[order][:, order], whole + prior[order].diag(), rtol=1e-4, atol=1e-4
    )


def test_kronecker_knows_every_way_to_write_a_linear_map():
    x, y = torch.randn(9, 2, generator=torch.Generator().manual_seed(0)), torch.arange(9.0)
    plain = torch.nn.functional.linear
    ways = {
        "matmul": ([2], lambda x, w: x @ w),
        "mv": ([2], torch.mv),
        "linear, one vector": ([2], plain),
        "linear, one unit": ([1, 2], lambda x, w: plain(x, w)[:, 0]),
        "one column": ([2, 1], lambda x, w: (x @ w)[:, 0]),
    }
    for shape, way in ways.values():

        def model(x, y=None, shape=shape, way=way):
            w = pyro.sample("w", dist.Normal(0.0, 1.0).expand(shape).to_event(len(shape)))
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(way(x, w), 0.5), obs=y)

        joint = joint_of(model, x, y)
        torch.testing.assert_close(dense(joint, "kron"), dense(joint), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("tied", ["bias", "two biases", "transposed"])
def test_kronecker_refuses_a_site_in_two_blocks(tied):
    def model(x, y=None):
        square = dist.Normal(0.0, 1.0).expand([2, 2]).to_event(2)
        line = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
        w, v = pyro.sample("w", square), pyro.sample("v", square)
        a, b = pyro.sample("a", line), pyro.sample("b", line)
        plain = torch.nn.functional.linear
        with pyro.plate("data", len(x)):
            if tied == "bias":
                f = plain(plain(x, w, b).tanh(), v, b)
            elif tied == "two biases":
                f = plain(plain(x, w, a).tanh(), w, b)
            else:
                f = plain(x @ w, w)
            pyro.sample("y", dist.Normal(f.sum(1), 0.5), obs=y)

    x = torch.randn(9, 2, generator=torch.Generator().manual_seed(0))
    joint = joint_of(model, x, x[:, 0], z=torch.linspace(-1, 1, 12))
    with pytest.raises(bnn.ModelError, match=r'is used in two ways .* structure="full"'):
        dense(joint, "kron")


def two_layers(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([1, 4]).to_event(2))
    v = pyro.sample("v", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
    with pyro.plate("data", len(x)):
        f = pyro.deterministic("f", torch.tanh(x @ w) @ v)
        pyro.sample("y", dist.Normal(f, 0.3), obs=y)


@pytest.fixture(scope="module")
def wave():
    x = torch.linspace(-2, 2, 40)[:, None]
    noise = torch.randn(40, generator=torch.Generator().manual_seed(0))
    return x, torch.sin(2 * x[:, 0]) + 0.3 * noise


@pytest.mark.parametrize("settings", [{"structure": "last_layer"}, {"sites": ("v",)}])
def test_the_last_layer_is_conjugate_given_its_features(settings, wave):
    x, y = wave
    posterior = fit(two_layers, x, y, steps=1_000, draws=50_000, **settings)
    w, v = (posterior.draws[k][0] for k in ("w", "v"))
    assert (w == w[:1]).all()
    features = torch.tanh(x @ w[0]).double()
    cov = torch.linalg.inv(torch.eye(4).double() + features.T @ features / 0.09)
    mean = cov @ features.T @ y.double() / 0.09
    sd = cov.diagonal().sqrt()
    assert ((v.double().mean(0) - mean).abs() / sd).max() < 4 / math.sqrt(50_000)
    assert (v.double().std(0) / sd - 1).abs().max() < 4 / math.sqrt(100_000)
    assert posterior.log_evidence is None  # of the last layer alone, w being chosen by the data
    report = posterior.diagnose()  # q is exact for v, and knows nothing of w
    assert not {"k-hat of q", "gap of q"} & {each.name for each in report.findings}
    assert "holds a site" in report.missing["k-hat of q"]


def test_a_last_layer_that_is_none_is_refused(wave):
    """The last map is the first layer's here: the weights of the second are a product of sites."""

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(1, 4), 1.0).to_event(2))
        v = pyro.sample("v", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        s = pyro.sample("s", dist.HalfNormal(1.0))
        with pyro.plate("data", len(x)):
            f = pyro.deterministic("f", torch.tanh(x @ w) @ (s * v))
            pyro.sample("y", dist.Normal(f, 0.3), obs=y)

    with pytest.raises(bnn.ModelError, match=r"sites=\('w', 'v', 's'\)"):
        fit(model, *wave, structure="last_layer")


def test_linearized_and_sampled_agree_on_a_linear_model(regression):
    x, y = regression.x, regression.y
    first = fit(regression.model, x, y)
    second = fit(regression.model, x, y, predictive="linearized")
    wholes = "posterior", "posterior of the program that predicts"
    for posterior, whose in zip((first, second), wholes, strict=True):
        (k,) = (each for each in posterior.diagnose().findings if each.name == "k-hat of q")
        assert k.meaning.startswith(f"The ratios p / q, p the {whose}, have")
    torch.testing.assert_close(first.predict(x).f, second.predict(x).f, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first.predict(x).y, second.predict(x).y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        first.log_likelihood(), second.log_likelihood(), rtol=1e-4, atol=1e-4
    )


def test_linearized_f_is_the_tangent_at_the_mode(wave, tmp_path):
    x, y = wave
    posterior = fit(two_layers, x, y, steps=1_000, predictive="linearized", draws=50)
    w, v = (posterior.params[f"mode.{k}"] for k in ("w", "v"))
    f = lambda w, v: torch.tanh(x @ w) @ v
    away = [posterior.draws[k][0] - m for k, m in (("w", w), ("v", v))]
    each = [torch.func.jvp(f, (w, v), (dw, dv))[1] for dw, dv in zip(*away, strict=True)]
    got = posterior.predict(x).f[0]
    torch.testing.assert_close(got, f(w, v) + torch.stack(each), rtol=1e-3, atol=1e-4)
    bent = torch.stack(
        [f(*draw) for draw in zip(*(posterior.draws[k][0] for k in ("w", "v")), strict=True)]
    )
    assert (got - bent).abs().max() > 0.01  # not the sampled one
    posterior.save(tmp_path / "fit")
    assert torch.equal(bnn.load(tmp_path / "fit", two_layers).predict(x).f[0], got)


def test_linearized_predictions_keep_what_stands_behind_f():
    """The noise is that of the draw."""
    x = torch.linspace(-1, 1, 30)[:, None]
    model = mlp_regression(1, (3,))
    posterior = fit(model, x, x[:, 0] ** 2, steps=1_000, predictive="linearized", draws=200)
    noise = posterior.draws["sigma"].square().mean()
    torch.testing.assert_close(posterior.predict(x).aleatoric, noise.expand(30))


def test_probabilities_of_labels_are_of_the_linear_logits(wave):
    x, _ = wave
    y = (x[:, 0].abs() > 1).long()

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([x.shape[1], 4]).to_event(2))
        v = pyro.sample("v", dist.Normal(0.0, 1.0).expand([4, 2]).to_event(2))
        with pyro.plate("data", len(x)):
            f = pyro.deterministic("f", torch.tanh(x @ w) @ v, event_dim=1)
            pyro.sample("y", dist.Categorical(logits=f), obs=y)

    posterior = fit(model, x, y, steps=1_000, predictive="linearized", draws=50)
    w, v = (posterior.params[f"mode.{k}"] for k in ("w", "v"))
    f = lambda w, v: torch.tanh(x @ w) @ v
    away = [posterior.draws[k][0] - m for k, m in (("w", w), ("v", v))]
    each = [torch.func.jvp(f, (w, v), (dw, dv))[1] for dw, dv in zip(*away, strict=True)]
    logits = f(w, v) + torch.stack(each)
    prediction = posterior.predict(x)
    torch.testing.assert_close(prediction.f[0], logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(prediction.probs, logits.softmax(-1).mean(0), rtol=0, atol=1e-3)
    bent = torch.stack(
        [f(*draw) for draw in zip(*(posterior.draws[k][0] for k in ("w", "v")), strict=True)]
    )
    assert (logits - bent).abs().max() > 0.1  # not the sampled one


def test_f_may_be_one_number():
    x, y = torch.ones(1, 2), torch.ones(1)
    posterior = fit(bnn.models.linear(2), x, y, predictive="linearized", steps=1_000)
    assert posterior.predict(x).f.isfinite().all()


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_f_may_be_logits_that_a_constant_does_not_change(classes):
    def model(x, y=None):
        f0 = pyro.sample("w", dist.Normal(0.0, 1.0).expand([classes]).to_event(1)).round()
        with pyro.plate("data", len(x)):  # whole numbers: f + 1/8 differs by no rounding either
            f = pyro.deterministic("f", x[:, None] * f0, event_dim=1)
            pyro.sample("y", dist.Categorical(logits=f), obs=y)

    read, found = contract.check(
        model, Data((torch.ones(4), torch.arange(4) % classes), ("x", "y"), rows=4)
    )
    with quiet_pyro():
        require_f(model, read, found)


def test_linearized_needs_an_f(regression):
    def silent(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    def deaf(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.deterministic("f", x @ w)
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    for model, told in ((silent, "announces no"), (deaf, "do not depend")):
        with pytest.raises(bnn.ModelError, match=told):
            fit(model, regression.x, regression.y, predictive="linearized")


def polynomial(degree):
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([degree + 1]).to_event(1))
        with pyro.plate("data", len(x)):
            f = pyro.deterministic("f", x[:, None] ** torch.arange(degree + 1) @ w)
            pyro.sample("y", dist.Normal(f, 0.2), obs=y)

    return model


def test_evidence_picks_the_degree_and_is_exact():
    rng = np.random.default_rng(0)
    x = np.linspace(-1, 1, 40)
    y = 0.5 - x + 0.8 * x**2 + 0.2 * rng.standard_normal(40)
    got = []
    for degree in range(6):
        features = x[:, None] ** np.arange(degree + 1)
        marginal = 0.04 * np.eye(40) + features @ features.T
        truth = -0.5 * (
            y @ np.linalg.solve(marginal, y) + np.linalg.slogdet(2 * np.pi * marginal)[1]
        )
        got.append(fit(polynomial(degree), x, y).log_evidence)
        assert abs(got[-1] - truth) < 1e-3
    assert int(np.argmax(got)) == 2


def noisy(x, y=None):
    w = pyro.sample("w", dist.Normal(0.0, 0.5).expand([x.shape[1]]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        f = pyro.deterministic("f", x @ w)
        pyro.sample("y", dist.Normal(f, sigma), obs=y)


@pytest.mark.parametrize("structure", ["full", "kron"])
def test_tuning_finds_the_maximum_of_the_evidence(structure):
    """log N(y | 0, s^2 + c^2 .25 X X^T) + log p(s), on a grid of c and s, refined."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((25, 8))
    y = x @ (1.5 * rng.standard_normal(8)) + 0.7 * rng.standard_normal(25)

    values, vectors = np.linalg.eigh(x @ x.T)
    rotated = vectors.T @ y

    def objective(c, s):
        variance = s**2 + 0.25 * c**2 * values
        evidence = -0.5 * (rotated**2 / variance + np.log(2 * np.pi * variance)).sum()
        return evidence, evidence - s**2 / 2

    grid = [(c, s) for c in np.geomspace(0.5, 10, 300) for s in np.geomspace(0.3, 2, 300)]
    best = max(grid, key=lambda each: objective(*each)[1])
    posterior = fit(noisy, x, y, tune="global", structure=structure)
    factor, sigma = (float(posterior.params[f"tuned.{k}"]) for k in ("w", "sigma"))
    assert abs(math.log(factor / best[0])) < 0.012  # the grid's step is .01
    assert abs(math.log(sigma / best[1])) < 0.008  # and .0063
    assert abs(posterior.log_evidence - objective(factor, sigma)[0]) < 2e-3
    assert (posterior.draws["sigma"] == posterior.params["tuned.sigma"]).all()
    cov = np.linalg.inv(x.T @ x / sigma**2 + np.eye(8) / (0.5 * factor) ** 2)
    assert np.allclose(posterior.draws["w"][0].std(0), np.sqrt(np.diag(cov)), rtol=0.1)


def test_each_site_is_tuned_apart_and_by_name(regression):
    def model(x, y=None):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            f = pyro.deterministic("f", a * x[:, 0] + b * x[:, 1])
            pyro.sample("y", dist.Normal(f, 1.0), obs=y)

    q = torch.linalg.qr(torch.randn(50, 2, generator=torch.Generator().manual_seed(0)))[0]
    x = q * math.sqrt(50)  # orthogonal: a and b are apart
    y = x @ torch.tensor([4.0, 0.5])
    posterior = fit(model, x, y, tune="site")
    for site, truth in (("a", 4.0), ("b", 0.5)):  # w_ML ~ N(0, c^2 + 1/50)
        best = math.sqrt(truth**2 - 1 / 50)
        assert abs(float(posterior.params[f"tuned.{site}"]) - best) < 5e-3 * best
    named = fit(model, x, y, tune=("b",))
    assert [k for k in named.params] == ["tuned.b"]
    torch.testing.assert_close(
        named.params["tuned.b"], posterior.params["tuned.b"], rtol=1e-3, atol=0.0
    )


def test_new_rows_have_their_sites_from_the_tuned_prior():
    """y = w + u_i + noise, u_i ~ N(0, c^2): a new row scatters as the rows do."""

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(w + u, 0.5), obs=y)

    x, y = torch.ones(100), 5 * torch.randn(100, generator=torch.Generator().manual_seed(0))
    posterior = fit(model, x, y, tune=("u",), draws=4_000)
    factor = float(posterior.params["tuned.u"])
    assert abs(factor - math.sqrt(float(y.var()) - 0.25)) < 0.05 * factor
    spread = math.sqrt(factor**2 + 0.25 + float(posterior.draws["w"].var()))
    got = float(posterior.predict(x[:10]).y.std())
    assert abs(got / spread - 1) < 4 / math.sqrt(80_000) + 0.01  # the tens of rows share w


def test_minibatches_and_loaders_reach_the_same_gaussian(regression):
    x, y = regression.x, regression.y
    whole = fit(regression.model, x, y)
    parts = fit(regression.model, x, y, batch_size=8, steps=1_000)
    loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
    loaded = fit(regression.model, loader, steps=1_000)
    for other in (parts, loaded):
        gap = (other.draws["w"] - whole.draws["w"]).abs() / regression.sd
        assert gap.max() < 5e-3
        assert abs(other.log_evidence - whole.log_evidence) < 1e-3


def test_restarts_find_both_modes():
    def two_modes(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w**2 * x, 0.1), obs=y)

    ones = torch.ones(5)
    posterior = fit(two_modes, ones, ones, restarts=6, draws=500)
    means = posterior.draws["w"].mean(1)
    assert means.shape == (6,)
    assert torch.allclose(means.abs(), torch.ones(6), atol=0.01)
    assert means.min() < 0 < means.max()
    sd = 1 / math.sqrt(5 * 4 / 0.01)
    assert torch.allclose(posterior.draws["w"].std(1), torch.full((6,), sd), rtol=0.15)


def test_an_upward_curve_is_refused_with_its_direction():
    """At w = 0, between two modes, the gradient vanishes and H = 1/4 - 2 x 5 / .01."""

    def two_modes(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w**2 * x, 0.1), obs=y)

    ones = torch.ones(5)
    joint = joint_of(two_modes, ones, ones)
    with pytest.raises(bnn.FitError, match=r'eigenvalue -1e\+03, .* 100% entry 0 of "w"') as caught:
        with quiet_pyro():
            polish(joint, lambda joint, s: curvature(joint, s.float(), "full", "exact"))
    assert caught.value.site == "w"


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_a_flat_direction_is_refused(structure):
    """a - b is in the data, a + b nowhere: its prior has no curvature."""

    def flat(x, y=None):
        a = pyro.sample("a", dist.Laplace(0.0, 1.0))
        b = pyro.sample("b", dist.Laplace(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((a - (structure == "full") * b) * x, 1.0), obs=y)

    ones = torch.ones(5)
    with pytest.raises(bnn.FitError, match="flat or curves upwards"):
        fit(flat, ones, ones, structure=structure)


def test_a_kink_is_refused():
    """|w^2 - 2| has its kink at a w that is no float: the gradient jumps across 0 there."""

    def kinked(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Laplace(w**2 * x, 0.1), obs=y)

    ones = torch.ones(2)
    with pytest.raises(bnn.FitError, match=r'"w" by .* posterior standard deviations'):
        fit(kinked, ones, 2 * ones)


@pytest.mark.parametrize("held", [{"structure": "last_layer"}, {"sites": ("layers.1.weight",)}])
def test_held_sites_that_are_at_no_mode_are_refused(held, wave):
    x, y = wave[0][:, :1], wave[1]
    model = mlp_regression(1, (10,))
    with pytest.raises(bnn.FitError, match="what else is held would raise the log joint by"):
        fit(model, x, y, steps=1, **held)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Laplace is only near a mode")
        fit(model, x, y, steps=3_000, schedule="plateau", **held)


def test_tuned_noise_need_not_be_at_a_mode():
    """It is at the maximum of the evidence, 2.8 nats below the log joint's."""
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(40, 20, generator=draws)
    y = x @ torch.randn(20, generator=draws) + 0.5 * torch.randn(40, generator=draws)
    with warnings.catch_warnings():
        warnings.simplefilter("error", bnn.ConvergenceWarning)
        fit(bnn.models.linear(20), x, y, tune="global", steps=3_000, schedule="plateau")


def test_a_big_hessian_is_refused_with_numbers_before_any_work():
    x, y = torch.randn(10, 4), torch.randn(10)
    model = mlp_regression(4, (200, 200))
    with pytest.raises(bnn.ModelError, match=r"needs about 82\.\d GB .* 41402 numbers.*\"kron\""):
        fit(model, x, y)
    with pytest.raises(bnn.ModelError, match='"diag"'):
        fit(model, x, y, structure="kron", memory=0.003)
    with pytest.raises(bnn.ModelError, match=r"needs about 343 GB .* 41402 numbers at 20 modes"):
        fit(model, x, y, restarts=20)


def test_a_gradient_that_is_no_number_is_no_mode():
    """The slope of sqrt at 0, where the curvature that is given is finite."""

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x, (w**2).sqrt() + 1.0), obs=y)

    one = torch.ones(1, dtype=torch.float64)
    joint = joint_of(model, torch.ones(3), torch.zeros(3))
    with quiet_pyro(), pytest.raises(bnn.FitError, match=r"not at a mode: the gradient .nan."):
        polish(joint, lambda joint, s: Precision([(torch.arange(1), Diagonal(one))]))


@pytest.mark.parametrize("hessian", ["exact", "ggn"])
@pytest.mark.parametrize("structure", ["full", "diag"])
def test_a_tensor_without_a_prior_is_held_at_the_mode(hessian, structure):
    """w ~ N(0, s), y ~ N(w x + b, .3), b and s fitted: 1 / variance = 1 / s^2 + sum x^2 / .09."""

    def offset(x, y=None):
        b = pyro.param("b", torch.tensor(0.0))
        s = pyro.param("s", torch.tensor(1.0), constraint=dist.constraints.positive)
        w = pyro.sample("w", dist.Normal(0.0, s).expand([1]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(pyro.deterministic("f", x @ w + b), 0.3), obs=y)

    x = torch.linspace(-1, 1, 20)[:, None]
    y = 1.5 * x[:, 0] + 0.4
    posterior = fit(offset, x, y, hessian=hessian, structure=structure, draws=4_000)
    found, s = float(posterior.draws["w"].std()), float(posterior.params["s"])
    exact_sd = (1 / s**2 + float((x**2).sum()) / 0.09) ** -0.5
    assert found == pytest.approx(exact_sd, rel=4 / math.sqrt(2 * 4_000))  # 4 errors of an sd
    assert float(posterior.params["b"]) == pytest.approx(0.4, abs=1e-2)


def test_a_model_without_latent_sites_is_refused(regression):
    def model(x, y=None):
        w = pyro.param("w", torch.zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    with pytest.raises(bnn.ModelError, match="states none"):
        fit(model, regression.x, regression.y)


def test_other_refusals(regression):
    x, y = regression.x, regression.y
    for told, settings in (
        ("no latent site 'v'", {"sites": ("v",)}),
        ("leaves no site", {"sites": ("sigma",), "tune": "global"}),
        ("tune names 'v'", {"tune": ("v",)}),
    ):
        with pytest.raises(bnn.ModelError, match=told):
            fit(noisy if "tune" in settings else regression.model, x, y, **settings)
    for bad in (
        {"structure": "block"},
        {"sites": "w"},
        {"sites": ()},
        {"structure": "kron", "hessian": "exact"},
        {"structure": "last_layer", "sites": ("w",)},
        {"restarts": 2, "predictive": "linearized"},
        {"restarts": 2, "tune": "global"},
        {"memory": 0},
    ):
        with pytest.raises(ValueError, match="Laplace"):
            bnn.Laplace(**bad)

    def heavy(x, y=None):
        w = pyro.sample("w", dist.Laplace(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    with pytest.raises(bnn.ModelError, match='curvature of the prior of "w"'):
        fit(heavy, x, y, structure="kron")

    def moved(x, y=None):
        df = pyro.sample("df", dist.Gamma(20.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.StudentT(df, x[:, 0], 1.0), obs=y)

    with pytest.raises(bnn.ModelError, match='takes df of "y" as given'):
        fit(moved, x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert fit(moved, x, y, hessian="exact").draws["df"].shape == (1, 1_000)
