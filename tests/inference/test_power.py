"""Planted bugs: every exact check must fail on the mistake that it is there to catch."""

import itertools
import warnings
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch

from bnn import handlers, prediction
from bnn.inference import (
    _curvature,
    _elbo,
    _energy,
    _guide,
    _masks,
    _nuts,
    _rowwise,
    _stochastic_gradient,
    _trajectory,
    concrete_dropout,
)
from tests import exact
from tests.bnn import test_diagnostics as diagnostics
from tests.exact import Regression
from tests.inference import test_estimators as estimators
from tests.inference import test_gflowout as gflowout

SHORT = {"steps": 1_000, "learning_rate": 0.05, "schedule": "cosine"}


def _fails(check, **settings):
    with pytest.raises(AssertionError):
        check(**settings)


@pytest.mark.parametrize(
    "check",
    [
        exact.check_regression_by_nuts,
        exact.check_regression_by_mean_field,
        exact.check_regression_by_stochastic_gradient,
    ],
)
def test_likelihood_counted_twice(check, monkeypatch):
    plain = _energy.Energy.terms

    def twice(self, *args, **kwargs):
        likelihood, prior = plain(self, *args, **kwargs)
        return 2 * likelihood, prior

    monkeypatch.setattr(_energy.Energy, "terms", twice)
    _fails(check)


@pytest.mark.parametrize(
    ("check", "settings"),
    [
        (exact.check_regression_by_mean_field, {"batch_size": 10}),
        (exact.check_regression_by_mc_dropout, {"batch_size": 25, "length_scale": 4.0}),
        (exact.check_bootstrap_by_deep_ensemble, {"batch_size": 10, **SHORT}),
        (exact.check_minibatch_noise, {}),
        (exact.check_cloud_of_swag, {}),
    ],
)
def test_minibatch_scale_missing(check, settings, monkeypatch):
    plain = handlers.Score.__init__

    def unscaled(self, plate=None, rows=None, elsewhere=None, weights=None, **rest):
        plain(self, plate, None, elsewhere, weights, **rest)

    monkeypatch.setattr(handlers.Score, "__init__", unscaled)
    _fails(check, **settings)


@pytest.mark.parametrize(
    "check", [exact.check_regression_by_nuts, exact.check_regression_by_mean_field]
)
def test_prior_too_wide(check, monkeypatch):
    """Tenfold data would hide it: the prior holds 1/51 of the precision."""

    def wide(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.5).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            f = pyro.deterministic("f", x @ w)
            pyro.sample("y", dist.Normal(f, 1.0), obs=y)

    monkeypatch.setattr(Regression, "model", staticmethod(wide))
    _fails(check)


def test_log_jacobian_missing(monkeypatch):
    monkeypatch.setattr(_energy.Energy, "log_jacobian", lambda self, z: z.new_zeros(()))
    _fails(exact.check_positive_site_by_nuts)


@pytest.mark.parametrize("model", [estimators.linear, estimators.tokens, estimators.convolution])
def test_flipout_that_turns_the_whole_weight(model, monkeypatch):
    """As in BLiTZ: the mean is not taken off, and the outputs vary by (x mean)^2 more."""
    plain = _rowwise.flipout

    def whole(met, w, b, once, ask):
        return plain(replace(met, weight=met.weight + w.mean), w, b, once, ask)

    monkeypatch.setitem(estimators.ROWWISE, "flipout", whole)
    _fails(estimators.check_outputs, model=model, estimator="flipout")


@pytest.mark.parametrize("model", [estimators.tokens, estimators.tied, estimators.convolution])
def test_local_noise_that_is_independent_at_each_place(model, monkeypatch):
    """As published for convolutions: right in each output, wrong in what a row's outputs share."""
    plain, calls = _rowwise.local, itertools.count()

    def apart(met, w, b, once, ask):
        return plain(met, w, b, True, lambda name, *rest: ask(f"{name} {next(calls)}", *rest))

    monkeypatch.setitem(estimators.ROWWISE, "local", apart)
    _fails(estimators.check_outputs, model=model, estimator="local")


def test_local_variance_taken_for_a_scale(monkeypatch):
    def squared(met, w, b, once, ask):
        return _rowwise.local(met, replace(w, variance=w.variance**2), b, once, ask)

    monkeypatch.setitem(estimators.ROWWISE, "local", squared)
    _fails(estimators.check_outputs, model=estimators.linear, estimator="local")


@pytest.mark.parametrize("guide", ["normal", "full_rank"])
def test_path_that_keeps_the_score(guide, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "detach", lambda self: self)
    with estimators.double():
        _fails(estimators.check_path, guide=guide)


def test_gap_without_the_jacobian(monkeypatch):
    """Laplace finds its mode by a Jacobian of its own, so only the ratios are wrong."""
    monkeypatch.setattr(_energy.Energy, "log_jacobian", lambda self, z: z.new_zeros(()))
    _fails(diagnostics.test_log_q_and_the_jacobian_of_a_positive_site_cancel)


def test_kl_sign_turned(monkeypatch):
    plain = _energy.Energy.terms

    def turned(self, *args, **kwargs):
        likelihood, prior = plain(self, *args, **kwargs)
        return likelihood, -prior

    monkeypatch.setattr(_energy.Energy, "terms", turned)
    monkeypatch.setattr(_guide.Normal, "entropy", lambda self: -self.tensors["log_scale"].sum())
    _fails(exact.check_regression_by_mean_field, steps=1_000)


def test_entropy_dropped(monkeypatch):
    monkeypatch.setattr(_guide.Normal, "entropy", lambda self: torch.zeros(()))
    _fails(exact.check_regression_by_mean_field)


def test_expected_prior_without_its_variance(monkeypatch):
    plain = _elbo._Expected.__call__

    def at_the_mean(self, fn):
        return plain(_elbo._Expected(self.mean, torch.zeros_like(self.variance)), fn)

    monkeypatch.setattr(_elbo._Expected, "__call__", at_the_mean)
    # one part in 51 of each precision: seen in the ELBO, which the check holds to .02 nats
    with pytest.raises(AssertionError):
        exact.check_expected_prior()


def test_warmup_draws_kept(monkeypatch):
    def from_afar(self, iterations, between):
        place = self.lanes.vectors[_trajectory.TREE_POSITION]
        place += 1e4
        potential, slope = self._asked(torch.from_numpy(place))
        self.lanes.numbers[_trajectory.TREE_POTENTIAL] = potential
        self.lanes.vectors[_trajectory.TREE_GRADIENT] = slope

    monkeypatch.setattr(_nuts.Sampler, "warm", from_afar)
    _fails(exact.check_regression_by_nuts)


def test_chains_sharing_a_seed(monkeypatch):
    plain = _nuts.Sampler.draw

    def shared(self, chains, draws):
        self.lanes.random[:] = self.lanes.random[:1]
        self.lanes.vectors[:] = self.lanes.vectors[:, :1]
        self.lanes.numbers[:] = self.lanes.numbers[:, :1]
        return plain(self, chains, draws)

    monkeypatch.setattr(_nuts.Sampler, "draw", shared)
    with pytest.raises(AssertionError):
        exact.check_chains_differ()


def test_predictive_without_noise(monkeypatch):
    plain = prediction._Pooled.add

    def noiseless(self, part, first, fn, y, again, values):
        more = None if again is None else fn.mean[..., None].expand_as(again)
        plain(self, part, first, fn, fn.mean, more, values)

    monkeypatch.setattr(prediction._Pooled, "add", noiseless)
    _fails(exact.check_predictive_noise)


@pytest.mark.parametrize("fault", ["dropped", "sign_turned"])
def test_metropolis_of_mclmc(fault, monkeypatch):
    from bnn.inference import _microcanonical

    plain = _microcanonical.decide

    def faulty(random, error, rate, taken):
        if fault == "sign_turned":
            plain(random, -error, rate, taken)
        else:
            plain(random, error, rate, taken)
            taken[:] = error < 100

    monkeypatch.setattr(_microcanonical, "decide", faulty)
    _fails(exact.check_gaussian_by_mclmc)


def test_directions_of_mclmc_not_drawn_afresh(monkeypatch):
    from bnn.inference import _microcanonical

    plain = _microcanonical.redirect

    def only_up(random, u):
        plain(random, u)
        u[:] = abs(u)

    monkeypatch.setattr(_microcanonical, "redirect", only_up)
    _fails(exact.check_gaussian_by_mclmc)


def test_log_jacobian_missing_from_mclmc(monkeypatch):
    monkeypatch.setattr(_energy.Energy, "log_jacobian", lambda self, z: z.new_zeros(()))
    _fails(exact.check_positive_site_by_mclmc)


def test_prior_missing_from_the_curvature_of_laplace(monkeypatch):
    """It holds 1/51 of the precision: the evidence shows it, .02 nats off."""
    plain = _curvature.prior_curvature
    monkeypatch.setattr(_curvature, "prior_curvature", lambda *args: 0 * plain(*args))
    _fails(exact.check_regression_by_laplace)


def test_likelihood_counted_twice_in_laplace(monkeypatch):
    plain = _curvature._gauss_newton
    monkeypatch.setattr(_curvature, "_gauss_newton", lambda *args: 2 * plain(*args))
    _fails(exact.check_regression_by_laplace)


@pytest.mark.parametrize("structure", ["full", "kron"])
def test_last_batch_missing_from_the_curvature_of_laplace(structure, monkeypatch):
    from bnn.data import Data

    plain = Data.once
    monkeypatch.setattr(Data, "once", lambda self, size: list(plain(self, size))[:-1])
    _fails(exact.check_regression_by_laplace, structure=structure, batch_size=20)


def test_log_jacobian_missing_from_laplace(monkeypatch):
    from bnn.inference._joint import Joint

    def without(self, s, batch, elsewhere=None):
        return self.energy.terms(self.lift(s), batch, jacobian=False, elsewhere=elsewhere)

    monkeypatch.setattr(Joint, "terms", without)
    _fails(exact.check_positive_site_by_laplace)


def test_drawn_masks_not_divided_by_their_mean(monkeypatch):
    monkeypatch.setattr(
        _masks, "hard", lambda shape, rate: torch.bernoulli(torch.full(shape, 1 - rate))
    )
    _fails(exact.check_regression_by_mc_dropout)


def test_entropy_of_the_masks_dropped(monkeypatch):
    monkeypatch.setattr(concrete_dropout, "softplus", lambda logit: logit.sigmoid() * logit)
    _fails(exact.check_rate_by_concrete_dropout)


@pytest.mark.filterwarnings("ignore::bnn.errors.ApproximationWarning")
@pytest.mark.parametrize(
    "fault", ["not_centred", "not_random", "not_added", "shared", "prior_twice"]
)
def test_randomized_priors(fault, monkeypatch):
    """On clean targets: noisy ones hide it, as the prior holds 1/51 of the precision."""
    from bnn.inference import randomized_priors

    method, energy = randomized_priors.RandomizedPriors, _energy.Energy
    if fault == "not_centred":
        plain = randomized_priors.prior_function
        off = lambda model, args: plain(model, args) + args[0][:, 0]
        monkeypatch.setattr(randomized_priors, "prior_function", off)
    elif fault == "not_random":
        monkeypatch.setattr(energy, "prior_draws", lambda self, count, seed: torch.zeros(count, 2))
    elif fault == "not_added":
        monkeypatch.setattr(method, "_added", lambda self, p: handlers.Rewrite({}))
    elif fault == "shared":
        plain = energy.prior_draws
        one = lambda self, count, seed: plain(self, 1, seed).expand(count, -1)
        monkeypatch.setattr(energy, "prior_draws", one)
    else:
        plain = energy.terms

        def twice(self, *args, **kwargs):
            likelihood, prior = plain(self, *args, **kwargs)
            return likelihood, 2 * prior

        monkeypatch.setattr(energy, "terms", twice)
    _fails(exact.check_regression_by_randomized_priors, noise=None, **SHORT)


def test_targets_without_noise(monkeypatch):
    from bnn.inference import randomized_priors

    plain = randomized_priors.moved_targets
    monkeypatch.setattr(
        randomized_priors, "moved_targets", lambda e, sd, *rest: plain(e, 1e-6 * sd, *rest)
    )
    _fails(exact.check_regression_by_randomized_priors, **SHORT)


def test_weights_of_other_rows(monkeypatch):
    """The bootstrap goes with the rows of each minibatch, not with their place in it."""
    from bnn.inference import _members

    plain = _members.Members._at

    def astray(self, rows):
        return (*plain(self, rows)[:-1], self.rows["weights"][:, : rows.shape[1]])

    monkeypatch.setattr(_members.Members, "_at", astray)
    _fails(exact.check_bootstrap_by_deep_ensemble, batch_size=10, **SHORT)


def test_burn_in_kept_by_sghmc(monkeypatch):
    plain = _stochastic_gradient._Chains.run

    def from_afar(self, phase, shown):
        self.z.data += 1e3
        self.burn, self.number = 4, -4
        return plain(self, phase, shown)

    monkeypatch.setattr(_stochastic_gradient._Chains, "run", from_afar)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the temperature: it sees this too
        _fails(exact.check_regression_by_stochastic_gradient)


@pytest.mark.parametrize("fault", ["noise_halved", "gradient_doubled"])
def test_a_wrong_step_of_sghmc(fault, monkeypatch):
    plain = _stochastic_gradient.Langevin.move

    def faulty(self, leaves, gradients, state, rate, noise, kept):
        if fault == "noise_halved":
            noise = (0.5 * noise[0],)
        else:
            gradients = {"mode": 2 * gradients["mode"]}
        plain(self, leaves, gradients, state, rate, noise, kept)

    monkeypatch.setattr(_stochastic_gradient.Langevin, "move", faulty)
    with pytest.raises(AssertionError):
        exact.check_minibatch_noise(2.0)


def test_noise_of_swag_that_cancels_over_a_pass(monkeypatch):
    from bnn.inference._members import Members

    plain = Members.batches
    monkeypatch.setattr(Members, "batches", lambda self, seed, passes=True: plain(self, seed))
    _fails(exact.check_cloud_of_swag)


def test_gflowout_whose_log_probability_knows_no_mask(monkeypatch):
    """As published: whatever the bit, the log of the probability of keeping."""
    from bnn.inference import _mask_generators

    blind = lambda bits, logits: logits.sigmoid().log().sum(-1)
    monkeypatch.setattr(_mask_generators, "_log_prob", blind)
    _fails(gflowout.check_gaps, conditional=False)
    _fails(gflowout.check_gaps, conditional=True)


@pytest.mark.parametrize("conditional", [True, False])
@pytest.mark.parametrize("fault", ["likelihood_twice", "prior_missing", "rows_missing"])
def test_reward_of_gflowout(fault, conditional, monkeypatch):
    from bnn.inference import _flow

    if fault == "rows_missing":  # N/B counts for a mask of all rows, and for no other
        score = handlers.Score
        unscaled = lambda plate, rows, **rest: score(plate, None, **rest)
        monkeypatch.setattr(_flow, "Score", unscaled)
    else:
        plain = _flow.Scored.gap
        wrong = {"likelihood_twice": lambda s: -s.each, "prior_missing": lambda s: s.log_p}[fault]
        monkeypatch.setattr(_flow.Scored, "gap", lambda s, power: plain(s, power) + wrong(s))
    _fails(gflowout.check_gaps, conditional=conditional, batch_size=8)
