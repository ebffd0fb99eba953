"""Problems whose posterior is known exactly, and the checks that hold a fit against it."""

import math
import warnings
from dataclasses import dataclass

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import bnn


@dataclass(frozen=True)
class Regression:
    """Bayesian linear regression with known noise 1 and prior N(0, 1): a Gaussian posterior.

    n = 50 rows, sample correlation of the two features exactly .8 (unless made with another):
    posterior sd .22572 each, correlation -.7843; the mean-field optimum has sd ratio .6204 and KL
    .4774 nats.
    """

    x: Tensor
    y: Tensor
    mean: Tensor
    cov: Tensor
    log_evidence: float

    @staticmethod
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            f = pyro.deterministic("f", x @ w)
            pyro.sample("y", dist.Normal(f, 1.0), obs=y)

    @classmethod
    def make(cls, correlation: float = 0.8) -> "Regression":
        rng = np.random.default_rng(0)
        z = rng.standard_normal((50, 2))
        z -= z.mean(0)
        z = np.linalg.qr(z)[0] * math.sqrt(50)
        x = z @ np.linalg.cholesky(np.array([[1, correlation], [correlation, 1]])).T
        y = x @ np.array([1.0, -0.5]) + rng.standard_normal(50)
        precision = np.eye(2) + x.T @ x
        cov = np.linalg.inv(precision)
        marginal = np.eye(50) + x @ x.T
        log_evidence = -0.5 * (
            y @ np.linalg.solve(marginal, y) + np.linalg.slogdet(2 * np.pi * marginal)[1]
        )
        as_tensor = lambda a: torch.tensor(a, dtype=torch.get_default_dtype())
        return cls(
            as_tensor(x), as_tensor(y), as_tensor(cov @ x.T @ y), as_tensor(cov), log_evidence
        )

    @property
    def sd(self) -> Tensor:
        return self.cov.diagonal().sqrt()

    def elbo(self, loc: Tensor, scale: Tensor) -> float:
        """The ELBO of a mean-field Gaussian: log evidence - KL(q || posterior), in closed form."""
        loc, variance, cov = loc.double(), scale.double() ** 2, self.cov.double()
        precision, shift = torch.linalg.inv(cov), loc - self.mean.double()
        kl = 0.5 * (
            (precision.diagonal() * variance).sum()
            + shift @ precision @ shift
            - 2
            + torch.logdet(cov)
            - variance.log().sum()
        )
        return self.log_evidence - float(kl)


@dataclass(frozen=True)
class Waves:
    """y = sin(x/2) + N(0, sd(x)^2), sd = (7 - |x|)/16: 300 rows between -7 and 7, noise known."""

    x: np.ndarray  # (row, 1)
    y: np.ndarray  # (row,)

    @classmethod
    def make(cls, x: np.ndarray, seed: int = 0) -> "Waves":
        noise = np.random.default_rng(seed).standard_normal(len(x))
        return cls(x[:, None], np.sin(x / 2) + cls.sd(x) * noise)

    @staticmethod
    def sd(x: np.ndarray) -> np.ndarray:
        return np.abs(7 - np.abs(x)) / 16

    def log_score(self) -> float:
        """Mean log density of a row under the law that made it."""
        x = self.x[:, 0]
        z = (self.y - np.sin(x / 2)) / self.sd(x)
        return float(np.mean(-(z**2) / 2 - np.log(self.sd(x)) - math.log(2 * math.pi) / 2))


def z_scores(draws: Tensor, exact: Tensor | float) -> np.ndarray:
    """(mean - exact) in Monte Carlo standard errors, by ArviZ's ESS; draws (chain, draw, *)."""
    values = np.asarray(draws.double())
    flat = values.reshape(*values.shape[:2], -1)
    each = np.broadcast_to(np.asarray(exact, dtype=float), values.shape[2:]).reshape(-1)
    scores = []
    for i, truth in enumerate(each):
        one = np.ascontiguousarray(flat[:, :, i])
        ess = float(az.ess(one, method="mean"))
        assert ess >= 400, f"effective sample size {ess:.0f}: too few draws to judge"
        scores.append((one.mean() - truth) / (one.std() / math.sqrt(ess)))
    return np.array(scores)


def assert_exact(draws: Tensor, mean, sd, *, ratio: tuple[float, float] = (0.93, 1.07)) -> None:
    """|z| < 4 (false alarm 6e-5 a quantity) and the ratio of standard deviations within bounds."""
    z = z_scores(draws, mean)
    assert np.abs(z).max() < 4, f"means off by {z.round(1)} Monte Carlo errors"
    got = draws.double().flatten(0, 1).std(0)
    share = (got / torch.as_tensor(sd, dtype=torch.float64)).reshape(-1)
    assert ((share > ratio[0]) & (share < ratio[1])).all(), f"sd ratios {share}"


def nuts(**settings) -> bnn.NUTS:
    return bnn.NUTS(**{"chains": 4, "warmup": 500, "draws": 1_000} | settings)


def mclmc(**settings) -> bnn.MCLMC:
    return bnn.MCLMC(**{"chains": 8, "warmup": 100, "draws": 1_000} | settings)


def check_regression_by_nuts() -> None:
    _check_regression(nuts())


def check_regression_by_mclmc() -> None:
    _check_regression(mclmc())


def _check_regression(method: bnn.Method) -> None:
    exact = Regression.make()
    posterior = bnn.fit(exact.model, exact.x, exact.y, method=method, seed=1)
    w = posterior.draws["w"]
    assert_exact(w, exact.mean, exact.sd)
    corr = float(torch.corrcoef(w.flatten(0, 1).T)[0, 1])
    assert abs(corr + 0.7843) < 0.05
    squares = (w - exact.mean) ** 2  # second moments too: a wrong width is 4 errors off at once
    assert np.abs(z_scores(squares, exact.cov.diagonal())).max() < 4


def check_regression_by_mean_field(**settings) -> None:
    exact = Regression.make()
    method = bnn.SVI(**{"particles": 4, "draws": 20_000} | settings)
    posterior = bnn.fit(exact.model, exact.x, exact.y, method=method, seed=1)
    loc = posterior.params["guide.loc"]
    scale = posterior.params["guide.log_scale"].exp()
    assert ((loc - exact.mean).abs() < 0.1 * exact.sd).all(), loc - exact.mean
    ratio = scale / exact.sd
    assert ((ratio - 0.6204).abs() < 0.03).all(), ratio
    assert exact.elbo(loc, scale) > exact.log_evidence - 0.4774 - 0.02
    drawn = posterior.draws["w"].flatten(0, 1).std(0)
    assert torch.allclose(drawn, scale, rtol=0.02)  # 4 standard errors of an sd at 20,000 draws
    assert abs(posterior.elbo - exact.elbo(loc, scale)) < 0.1  # 8,192 draws, sd about 1.5: 4 x .017


def check_regression_by_laplace(ratio: float = 1.0, **settings) -> None:
    """The posterior is Gaussian: Laplace is exact; its diagonal is 1 / sqrt(H_jj)."""
    exact = Regression.make()
    settings = {"steps": 300, "schedule": "constant", "draws": 20_000} | settings
    method = bnn.Laplace(**settings)
    posterior = bnn.fit(exact.model, exact.x, exact.y, method=method, seed=1)
    w, width = posterior.draws["w"], ratio * exact.sd
    assert_exact(w, exact.mean, width, ratio=(0.98, 1.02))  # 4 standard errors at 20,000 draws
    gap = 0.0 if ratio == 1 else 0.4774  # half the log of what the correlation takes
    assert abs(posterior.log_evidence - (exact.log_evidence - gap)) < 1e-3


def gamma_poisson(y=None):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", 4 if y is None else len(y)):
        pyro.sample("y", dist.Poisson(rate), obs=y)


def check_positive_site_by_nuts() -> None:
    _check_positive_site(nuts())


def check_positive_site_by_mclmc() -> None:
    _check_positive_site(mclmc())


def _check_positive_site(method: bnn.Method) -> None:
    """Gamma-Poisson: rate | y = Gamma(2 + sum y, 1 + n). Wrong without the log-Jacobian."""
    y = torch.tensor([0.0, 1.0, 0.0, 2.0])
    posterior = bnn.fit(gamma_poisson, y, method=method, seed=2)
    assert_exact(posterior.draws["rate"], 5 / 5, math.sqrt(5) / 5)


def check_positive_site_by_laplace(**settings) -> None:
    """In z = log rate the density is Gamma's times e^z: mode log(5 / 5) = 0, H = 5."""
    y = torch.tensor([0.0, 1.0, 0.0, 2.0])
    settings = {"steps": 300, "schedule": "constant", "draws": 20_000} | settings
    posterior = bnn.fit(gamma_poisson, y, method=bnn.Laplace(**settings), seed=2)
    z = posterior.draws["rate"].log()
    assert_exact(z, 0.0, 1 / math.sqrt(5), ratio=(0.98, 1.02))  # 4 standard errors
    at_mode = -1 - 4 - math.log(2)  # log Gamma(1 | 2, 1) + log Poisson(0, 1, 0, 2 | 1) + 0
    laplace = at_mode + 0.5 * math.log(2 * math.pi / 5)
    assert math.isclose(posterior.log_evidence, laplace, abs_tol=1e-4)
    truth = math.lgamma(5) - math.log(2) - 5 * math.log(5)
    assert abs(posterior.log_evidence - truth) < 1 / (12 * 5) + 1e-3  # Stirling's remainder


def check_predictive_noise() -> None:
    """Var[y | x] = x' S x + 1 for the conjugate regression."""
    exact = Regression.make()
    posterior = bnn.fit(exact.model, exact.x, exact.y, method=nuts(), seed=1)
    prediction = posterior.predict(exact.x[:5])
    variance = (exact.x[:5] @ exact.cov * exact.x[:5]).sum(1) + 1
    # 4,000 nearly independent draws: relative error of a variance sqrt(2 / 4000) = .022
    assert torch.allclose(prediction.y.flatten(0, 1).var(0), variance, rtol=0.1)
    assert torch.allclose(prediction.total, variance, rtol=0.02)


def check_expected_prior() -> None:
    """E_q[log N(w | 0, 1)] = -log(2 pi)/2 - (loc^2 + scale^2)/2 for each weight."""
    from bnn.inference._elbo import _Expected

    loc, scale = torch.tensor([0.5, -1.0]), torch.tensor([0.3, 2.0])
    got = _Expected(loc, scale**2)(dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    expected = -math.log(2 * math.pi) - 0.5 * float((loc**2 + scale**2).sum())
    assert math.isclose(float(got), expected, rel_tol=1e-6)


def check_regression_by_randomized_priors(noise: float | None = 1.0, **settings) -> None:
    """With noisy targets members are draws of the posterior; with clean ones S P0 S is too narrow.

    Each member is the optimum of a quadratic with its own targets and its own prior function. With
    clean targets that is S (X'y + w~) for the sum of its weights, to the precision of Adam.
    """
    exact, members = Regression.make(), 400
    method = bnn.RandomizedPriors(**{"members": members, "noise": noise} | settings)
    draws = bnn.fit(exact.model, exact.x, exact.y, method=method, seed=1).draws
    w = draws["w"][0] + draws["prior.w"][0]
    ratio = 1.0 if noise else 0.28686
    share = w.std(0) / (ratio * exact.sd)
    assert ((share - 1).abs() < 3 / math.sqrt(2 * (members - 1))).all(), share
    error = (w.mean(0) - exact.mean) / (ratio * exact.sd / math.sqrt(members))
    assert (error.abs() < 3.5).all(), error
    if noise is None:
        each = (exact.x.T @ exact.y + draws["prior.w"][0]) @ exact.cov
        assert ((w - each).abs() < 0.02 * exact.sd).all()


def check_bootstrap_by_deep_ensemble(kind: str = "exponential", **settings) -> None:
    """Each member is the mode under its own weights w: (1 + X' diag(w) X)^-1 X' diag(w) y."""
    from bnn.fitting import seed_sequence
    from bnn.handlers import branch
    from bnn.inference._ensemble import bootstrap

    exact, members = Regression.make(), 20
    method = bnn.DeepEnsemble(**{"members": members, "bootstrap": kind} | settings)
    draws = bnn.fit(exact.model, exact.x, exact.y, method=method, seed=1).draws["w"][0]
    weights = bootstrap(kind, members, 50, branch(seed_sequence(1), 5))["weights"]
    weighed = weights[:, :, None] * exact.x  # (member, row, column)
    precision = torch.eye(2) + weighed.transpose(1, 2) @ exact.x
    mode = torch.linalg.solve(precision, torch.einsum("mrc,r->mc", weighed, exact.y))
    assert mode.std(0).min() > 0.5 * exact.sd.min()  # members differ as much as bootstraps do
    gap = 0.15 if "batch_size" in settings else 0.02
    assert ((draws - mode).abs() < gap * exact.sd).all(), (draws - mode) / exact.sd


def check_bootstrap_by_randomized_priors(kind: str = "exponential", **settings) -> None:
    """Each member's w + w~ is the mode under its weights, of y and a prior around its own w~."""
    from bnn.fitting import seed_sequence
    from bnn.handlers import branch
    from bnn.inference._ensemble import bootstrap

    exact, members = Regression.make(), 20
    method = bnn.RandomizedPriors(**{"members": members, "bootstrap": kind} | settings)
    draws = bnn.fit(exact.model, exact.x, exact.y, method=method, seed=1).draws
    start, trained = draws["prior.w"][0], draws["w"][0]
    weights = bootstrap(kind, members, 50, branch(seed_sequence(1), 5))["weights"]
    weighed = weights[:, :, None] * exact.x  # (member, row, column)
    precision = torch.eye(2) + weighed.transpose(1, 2) @ exact.x
    pull = torch.einsum("mrc,mr->mc", weighed, exact.y - start @ exact.x.T)
    mode = torch.linalg.solve(precision, pull)
    unweighed = (exact.y - start @ exact.x.T) @ exact.x @ exact.cov
    assert ((mode - unweighed).abs().mean(0) > 0.3 * exact.sd).all()  # weights make a difference
    assert ((trained - mode).abs() < 0.02 * exact.sd).all(), (trained - mode) / exact.sd


def check_chains_differ() -> None:
    exact = Regression.make()
    method = nuts(warmup=50, draws=20)
    first = bnn.fit(exact.model, exact.x, exact.y, method=method, seed=1).draws["w"][:, 0]
    assert len({tuple(draw.tolist()) for draw in first}) == 4


def microcanonical(gradient, start, seed=0, target=0.9):
    """The kernel under `bnn.MCLMC`, on a potential of one's own."""
    from bnn.inference._mclmc import Sampler

    streams = [
        np.random.SeedSequence([seed, k]).generate_state(4, np.uint64) for k in range(len(start))
    ]
    return Sampler(
        gradient,
        np.asarray(start, np.float32),
        np.stack(streams),
        np.random.default_rng(seed),
        target=target,
    )


def gaussian(cov: np.ndarray):
    """Potential and gradient of N(0, cov)."""
    precision = torch.tensor(np.linalg.inv(cov), dtype=torch.float32)

    def gradient(z):
        pull = z @ precision
        return 0.5 * (z * pull).sum(1), pull

    return gradient


def check_gaussian_by_mclmc(target: float = 0.6) -> None:
    """Eight dimensions, sds .1 to 10, correlation .5; long steps: Metropolis has to work."""
    sd = np.logspace(-1, 1, 8)
    cov = (0.5 + 0.5 * np.eye(8)) * np.outer(sd, sd)
    start = sd * np.random.default_rng(0).standard_normal((16, 8))
    sampler = microcanonical(gaussian(cov), start, target=target)
    sampler.warm(100)
    kept, stats = sampler.draw(2_000)
    draws = torch.tensor(kept)
    assert_exact(draws, 0.0, sd)
    assert np.abs(z_scores(draws**2, sd**2)).max() < 4
    assert abs(stats["acceptance_rate"].mean() - target) < 0.1
    assert not stats["diverging"].any()
    # Jarzynski: proposals preserve volume, so that E[exp(-error)] = 1
    weights = np.exp(-stats["energy_error"])
    assert abs(weights.mean() - 1) < 4 * weights.std() / math.sqrt(weights.size)


def line(inputs: int, sigma: float = 1.0):
    """Linear regression with prior N(0, 1) and known noise."""

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([inputs]).to_event(1))
        with pyro.plate("data", len(x)):
            f = pyro.deterministic("f", x @ w)
            pyro.sample("y", dist.Normal(f, sigma), obs=y)

    return model


def check_regression_by_mc_dropout(rate: float = 0.3, **settings) -> None:
    """w_j is 0, or w*_j / (1 - p) with w* = (X'X + p/(1-p) diag X'X + l^2 I / (1-p))^-1 X'y."""
    exact = Regression.make()
    method = bnn.MCDropout(**{"rate": rate, "draws": 20_000, "steps": 2_000} | settings)
    posterior = bnn.fit(exact.model, exact.x, exact.y, method=method, seed=1)
    gram, odds = exact.x.T @ exact.x, rate / (1 - rate)
    decay = settings.get("length_scale", 1.0) ** 2 / (1 - rate)
    precision = gram + odds * gram.diagonal().diag() + decay * torch.eye(2)
    optimum = torch.linalg.solve(precision, exact.x.T @ exact.y)
    drawn = posterior.draws["w"][0]
    kept = torch.where(drawn.abs().amax(0) == drawn.amax(0), drawn.amax(0), drawn.amin(0))
    off = (kept * (1 - rate) - optimum).abs() / exact.sd
    assert (off < 0.06).all(), f"{off} posterior sds off"
    # 4 errors of a mean and of a variance of 20,000 draws with two values
    error = kept.abs() * math.sqrt(rate * (1 - rate) / len(drawn))
    assert ((drawn.mean(0) - kept * (1 - rate)).abs() < 4 * error).all()
    variance = kept.square() * rate * (1 - rate)
    assert torch.allclose(drawn.var(0), variance, rtol=0.05)


def check_rate_by_concrete_dropout(**settings) -> float:
    """The rate that minimises J(p), w at its optimum for each p, within .03; J within .3 nats.

    J = (|y - X w|^2 + p/(1-p) sum_j w_j^2 |X_j|^2) / (2 sigma^2) + |w|^2 / (2 (1-p)) - n_in H(p).
    Relaxed masks at temperature .1 move the optimum by .004 on these data. Returns the rate.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 5, generator=generator)
    y = x @ torch.linspace(1, -1, 5) + 3 * torch.randn(20, generator=generator)
    gram, pull = x.T @ x / 9, x.T @ y / 9
    grid = torch.linspace(0.001, 0.999, 999)
    objective = []
    for p in grid:
        variance = p / (1 - p) * gram.diagonal().diag() + torch.eye(5) / (1 - p)
        w = torch.linalg.solve(gram + variance, pull)
        entropy = -p * p.log() - (1 - p) * (1 - p).log()
        fit = (y - x @ w).square().sum() / 9 + w @ variance @ w
        objective.append(0.5 * fit - 5 * entropy)
    best = torch.stack(objective).min(0)
    method = bnn.ConcreteDropout(**{"steps": 2_000} | settings)
    posterior = bnn.fit(line(5, 3.0), x, y, method=method, seed=0)
    assert abs(float(posterior.params["rate.w"] - grid[best.indices])) < 0.03
    constant = 2.5 * math.log(2 * math.pi) + 10 * math.log(18 * math.pi)
    assert abs(-posterior.elbo - constant - float(best.values)) < 0.3
    return float(posterior.params["rate.w"])


def check_regression_by_stochastic_gradient(kind=None, **settings) -> None:
    """On all rows exact but for h^2; minibatches of 10 of 50 rows may widen by a twentieth."""
    exact = Regression.make()
    steps = 6_000 if settings.get("batch_size") else 3_000
    common = {"chains": 32, "warmup": 600, "steps": steps, "draws": 200}
    method = (kind or bnn.SGHMC)(**common | settings)
    posterior = bnn.fit(exact.model, exact.x, exact.y, method=method, seed=1)
    w = posterior.draws["w"]
    assert_exact(w, exact.mean, exact.sd, ratio=(0.94, 1.06 if method.batch_size is None else 1.1))
    corr = float(torch.corrcoef(w.flatten(0, 1).T)[0, 1])
    assert abs(corr + 0.7843) < 0.05


def langevin_map(
    precision: np.ndarray, step: float, friction: float, noise: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(z, v) -> A (z, v) + e, Var e = Q: a step of `SGHMC` on N(0, precision^-1).

    Args:
        precision: (size, size).
        step: h.
        friction: infinite for `SGLD`.
        noise: covariance of the gradient's own noise, (size, size).
    """
    one, h, c = np.eye(len(precision)), step, math.exp(-friction * step)
    kick = np.hstack([-h * precision, one])  # v after the gradient
    turn = np.vstack([0.5 * h * (1 + c) * one, c * one])
    fresh = math.sqrt(1 - c**2) * np.vstack([0.5 * h * one, one])
    keep = np.block([[one, 0 * one], [0 * one, 0 * one]])
    return keep + turn @ kick, h**2 * turn @ noise @ turn.T + fresh @ fresh.T


def stationary(a: np.ndarray, q: np.ndarray) -> np.ndarray:
    """P of the discrete Lyapunov equation P = A P A' + Q."""
    size = len(a)
    flat = np.linalg.solve(np.eye(size**2) - np.kron(a, a), q.reshape(-1))
    return flat.reshape(size, size)


@dataclass(frozen=True)
class Mean:
    """Rows y_i ~ N(w, noise) of two columns, prior w ~ N(0, 1): the gradient's noise knows no w."""

    x: Tensor  # counts the rows, no more
    y: Tensor
    precision: np.ndarray  # of the posterior
    scatter: np.ndarray  # covariance of the rows' gradients, about their own mean

    @staticmethod
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        noise = torch.tensor([[1.0, 0.6], [0.6, 2.0]])
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.MultivariateNormal(w, noise), obs=y)

    @classmethod
    def make(cls) -> "Mean":
        noise = np.array([[1.0, 0.6], [0.6, 2.0]])
        rng = np.random.default_rng(5)
        y = rng.multivariate_normal([0.5, -1.0], noise, size=40)
        inverse = np.linalg.inv(noise)
        scatter = inverse @ np.cov(y.T) @ inverse
        y = torch.tensor(y, dtype=torch.float32)
        return cls(torch.zeros(40), y, np.eye(2) + 40 * inverse, scatter)

    @property
    def mean(self) -> np.ndarray:
        inverse = np.linalg.inv(np.array([[1.0, 0.6], [0.6, 2.0]]))
        return np.linalg.solve(self.precision, inverse @ self.y.double().numpy().sum(0))

    def noise(self, batch_size: int) -> np.ndarray:
        """Covariance of the gradient between minibatches drawn without replacement."""
        return 40**2 * (1 / batch_size - 1 / 40) * self.scatter


def check_minibatch_noise(friction: float = 2.0) -> None:
    """Passes of 4 minibatches of 10 rows: their noise sums to 0 over a pass."""
    exact, step, count = Mean.make(), 0.12, 4
    common = {"step_size": step, "preconditioned": False, "batch_size": 10}
    common |= {"chains": 16, "draws": 500, "steps": 500 * 13, "warmup": 400}
    method = bnn.SGLD(**common) if math.isinf(friction) else bnn.SGHMC(friction=friction, **common)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bnn.ApproximationWarning)  # rightly: it is too wide
        posterior = bnn.fit(exact.model, exact.x, exact.y, method=method, seed=3)
    a, fresh = langevin_map(exact.precision, step, friction, np.zeros((2, 2)))
    c = exact.noise(10)
    memory = math.exp(-friction * step)
    push = step * np.vstack([0.5 * step * (1 + memory) * np.eye(2), memory * np.eye(2)])
    powers = [np.linalg.matrix_power(a, k) for k in range(count + 1)]
    paths = [powers[count - 1 - k] @ push for k in range(count)]
    share = lambda j, k: 1.0 if j == k else -1.0 / (count - 1)
    q = sum(powers[k] @ fresh @ powers[k].T for k in range(count))
    q = q + sum(share(j, k) * paths[j] @ c @ paths[k].T for j in range(count) for k in range(count))
    phases = [stationary(powers[count], q)]  # after a whole pass; then within the next
    for last in range(1, count):
        part = powers[last] @ phases[0] @ powers[last].T
        part = part + sum(powers[k] @ fresh @ powers[k].T for k in range(last))
        inner = [powers[last - 1 - k] @ push for k in range(last)]
        part = part + sum(
            share(j, k) * inner[j] @ c @ inner[k].T for j in range(last) for k in range(last)
        )
        phases.append(part)
    wanted = np.mean(phases, 0)[:2, :2]  # draws are 13 steps apart: every phase in turn
    true = np.linalg.inv(exact.precision)
    assert wanted[0, 0] > 1.1 * true[0, 0]  # else this shows nothing
    assert_exact(posterior.draws["w"], exact.mean, np.sqrt(np.diag(wanted)), ratio=(0.96, 1.04))


def sgd_law(matrices: np.ndarray, noise: np.ndarray, rate: float, momentum: float) -> np.ndarray:
    """Stationary covariance of SGD's iterates about their mean, exactly.

        u <- momentum u - rate (H_k z + n_k),   z <- z + u,   k uniform over what a batch may be

    Args:
        matrices: H_k, (batch, size, size).
        noise: n_k, (batch, size), of mean 0.
        rate: per unit of the objective.
        momentum: in [0, 1).
    """
    size = matrices.shape[1]
    lead = np.kron(np.array([[1.0, momentum], [0.0, momentum]]), np.eye(size))
    pick = np.hstack([np.eye(size), np.zeros((size, size))])
    push = np.vstack([np.eye(size), np.eye(size)])
    maps = [lead - rate * push @ h @ pick for h in matrices]
    jumps = [rate * push @ n for n in noise]
    q = np.mean([np.outer(j, j) for j in jumps], 0)
    growth = np.mean([np.kron(a, a) for a in maps], 0)
    flat = np.linalg.solve(np.eye(4 * size**2) - growth, q.reshape(-1))
    return flat.reshape(2 * size, 2 * size)[:size, :size]


def check_cloud_of_swag(rate: float = 0.05, batch_size: int = 4) -> None:
    """The gradient's noise knows no w: two values of it, +-, have all of its covariance C."""
    exact = Mean.make()
    method = bnn.SWAG(
        restarts=16,
        rank=400,
        collection=4_000,
        every=8,
        collection_rate=rate,
        batch_size=batch_size,
        momentum=0.5,
        draws=2_000,
        steps=500,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the width, rightly, and of the short ascent
        posterior = bnn.fit(exact.model, exact.x, exact.y, method=method, seed=1)
    root = math.sqrt(2) * np.linalg.cholesky(exact.noise(batch_size)).T
    jumps = np.vstack([root, -root])
    cov = sgd_law(np.stack([exact.precision] * 4), jumps, rate / 40, 0.5)
    sd = np.sqrt(np.diag(cov))
    # 16 restarts of 3,200 steps that forget in about 20: 2 % of a standard deviation at most
    scale = posterior.params["swag.scale"].double().square().mean(0).sqrt()
    assert np.allclose(scale, sd, rtol=0.06), (scale, sd)
    deviations = posterior.params["swag.deviations"].double()
    got = (deviations.mT @ deviations).mean(0).numpy() / (method.rank - 1)
    assert np.allclose(got, cov, atol=0.12 * sd.max() ** 2), (got, cov)
    w = posterior.draws["w"].double()
    assert (np.abs(w.mean((0, 1)).numpy() - exact.mean) < 0.1 * sd).all()
    drawn = np.cov((w - w.mean(1, keepdim=True)).flatten(0, 1).T.numpy())
    assert np.allclose(drawn, (np.diag(sd**2) + cov) / 2, atol=0.12 * sd.max() ** 2), drawn
