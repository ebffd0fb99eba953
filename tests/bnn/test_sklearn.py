"""The estimators, by scikit-learn's own checks and inside its tools."""

import warnings

import numpy as np
import pytest
from sklearn.datasets import load_diabetes, load_iris
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures
from sklearn.utils.estimator_checks import check_estimator

import bnn
from bnn.sklearn import BNNClassifier, BNNRegressor

QUICK = bnn.MAP(steps=300)
METHODS = {
    "MAP": QUICK,
    "SVI": bnn.SVI(steps=400, draws=50),
    "Laplace": bnn.Laplace(structure="diag", draws=50),
    "DeepEnsemble": bnn.DeepEnsemble(members=3, steps=300),
}


def _checked(kind, method):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(kind(hidden=(10,), method=method), on_fail=None)
    failed = {r["check_name"]: r["exception"] for r in results if r["status"] == "failed"}
    assert not failed, failed
    assert sum(r["status"] == "passed" for r in results) > 40


def test_scikit_learn_takes_it_for_an_estimator():
    _checked(BNNRegressor, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [BNNRegressor, BNNClassifier])
def test_scikit_learn_takes_it_for_an_estimator_with(kind, method):
    _checked(kind, METHODS[method])


def test_rows_without_noise_have_a_mode():
    X = np.random.default_rng(0).normal(size=(10, 4))
    laplace = bnn.Laplace(draws=50)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = BNNRegressor(hidden=(10,), method=laplace).fit(X, X[:, 0])
        with pytest.raises(bnn.FitError, match="not at a mode"):
            net.set_params(likelihood=bnn.models.likelihoods.Gaussian()).fit(X, X[:, 0])


def test_a_regressor_says_how_sure_it_is():
    X, y = load_diabetes(return_X_y=True, as_frame=True)
    net = BNNRegressor(hidden=(10,), method=METHODS["SVI"]).fit(X[:300], y[:300])
    mean, std = net.predict(X[300:], return_std=True)
    lower, upper = net.predict_interval(X[300:], level=0.9)
    draws = net.sample_posterior(X[300:], draws=20)
    assert draws.shape == (20, 142)
    assert net.score(X[300:], y[300:]) > 0.3
    inside = ((lower <= y[300:]) & (y[300:] <= upper)).mean()
    assert 0.8 < inside < 0.98  # .9, and a binomial sd of .025 on 142 rows
    np.testing.assert_allclose(std, net.predictive(X[300:]).std, rtol=1e-6)
    assert list(net.feature_names_in_) == list(X.columns)
    with pytest.raises(ValueError, match="feature names"):
        net.predict(X[X.columns[::-1]])
    np.testing.assert_array_equal(mean, net.predict(X[300:]))


def test_labels_come_back_as_they_were_given():
    X, y = load_iris(return_X_y=True)
    names = np.array(["setosa", "versicolor", "virginica"])[y]
    net = BNNClassifier(hidden=(8,), method=QUICK).fit(X, names)
    assert set(net.predict(X)) == set(names)
    assert set(np.unique(net.sample_posterior(X[:30]))) <= set(names)
    np.testing.assert_allclose(net.predict_proba(X).sum(1), 1, rtol=1e-5)
    assert net.score(X, names) > 0.9


def test_in_a_pipeline_a_grid_search_and_cross_validation():
    X, y = load_diabetes(return_X_y=True)
    X, y = X[:120, :3], y[:120]
    pipe = make_pipeline(PolynomialFeatures(2, include_bias=False), BNNRegressor(method=QUICK))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.isfinite(cross_val_score(pipe, X, y, cv=2)).all()
        grid = {"hidden": [(3,), (5,)], "method": [QUICK, METHODS["DeepEnsemble"]]}
        search = GridSearchCV(BNNRegressor(), grid, cv=2).fit(X, y)
    assert search.best_params_["method"] in grid["method"]


def test_the_same_random_state_gives_the_same_fit():
    X, y = load_diabetes(return_X_y=True)
    fit = lambda state: BNNRegressor((3,), method=QUICK, random_state=state).fit(X, y).predict(X)
    np.testing.assert_array_equal(fit(3), fit(3))
    assert not np.array_equal(fit(3), fit(4))
    assert not np.array_equal(fit(None), fit(None))
