"""Estimators for scikit-learn: `BNNRegressor`, `BNNClassifier`. It is imported by itself.

    from bnn.sklearn import BNNRegressor

    net = BNNRegressor(hidden=(50,), method=bnn.Laplace()).fit(X, y)
    mean, std = net.predict(X_new, return_std=True)

They stand in pipelines, grid searches and cross-validation like any other estimator; `posterior_`
is the `bnn.Posterior`, for everything else.
"""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

import bnn
from bnn.method import Method
from bnn.models import mlp_classification, mlp_regression
from bnn.models.likelihoods import Gaussian, Likelihood, StudentT
from bnn.models.mlp import Activation
from bnn.models.priors import Prior
from bnn.prediction import Prediction
from bnn.turns import default_dtype


class _Net(BaseEstimator):
    """What both do: check X, fit, predict, draw.

    All in float64, scikit-learn's precision: a row's prediction is then its own to 1e-7.
    """

    method: Method | None
    random_state: Any
    progress: bool

    def _fit(self, model: Any, X: np.ndarray, y: np.ndarray) -> Self:
        method = bnn.SVI() if self.method is None else self.method
        with default_dtype(torch.float64):
            seed = self.random_state
            if seed is None or not isinstance(seed, int | np.integer):
                seed = check_random_state(seed).randint(2**31 - 1)
            self.posterior_ = bnn.fit(
                model, X, y, method=method, seed=int(seed), progress=self.progress
            )
        return self

    def predictive(self, X: Any, *, draws: int | None = None, seed: int = 0) -> Prediction:
        """The posterior predictive at X, see `bnn.Posterior.predict`.

        Args:
            X: (row, column).
            draws: use this many of each chain's draws; None uses all.
            seed: of the noise.
        """
        check_is_fitted(self)
        X = validate_data(self, X, reset=False)
        with default_dtype(torch.float64):
            return self.posterior_.predict(X, draws=draws, seed=seed)

    def sample_posterior(self, X: Any, *, draws: int | None = None, seed: int = 0) -> np.ndarray:
        """Draws of y at X with their noise, (draw, row): numbers, or labels.

        Args:
            X: (row, column).
            draws: use this many of each chain's draws; None uses all.
            seed: of the noise.
        """
        y = self.predictive(X, draws=draws, seed=seed).y
        return self._decoded(y.flatten(0, 1).numpy())

    def _decoded(self, y: np.ndarray) -> np.ndarray:
        return y


class BNNRegressor(RegressorMixin, _Net):
    """A Bayesian multilayer perceptron that predicts numbers.

    Attributes:
        posterior_: the `bnn.Posterior`.
        n_features_in_: columns of X.
        feature_names_in_: their names, where X had names.

    Args:
        hidden: units of each hidden layer.
        activation: see `bnn.models.MLP`.
        prior: of the weights; default `bnn.models.priors.Normal()`.
        likelihood: default `bnn.models.likelihoods.Gaussian(least=0.01)`: the noise is learned, and
            at least 1 % of the standard deviation of y. Without a least one there is no mode where
            y is a function of X, and `bnn.Laplace` refuses.
        method: how to approximate the posterior, any `bnn` method; default `bnn.SVI()`.
        standardize: the net sees X and gives y in units of their standard deviations. Without it
            X and y should be of about unit size, which the priors are made for. y keeps its units
            under a likelihood that is not of real numbers.
        random_state: a whole number, a `RandomState`, or None for another seed at each fit.
        progress: show a bar.

    Example:
        >>> import numpy as np, bnn
        >>> X = np.linspace(-1.0, 1.0, 30)[:, None]
        >>> net = BNNRegressor(hidden=(5,), method=bnn.MAP(steps=200)).fit(X, 3 * X[:, 0])
        >>> mean, std = net.predict(X[:4], return_std=True)
        >>> mean.shape, std.shape
        ((4,), (4,))
    """

    def __init__(
        self,
        hidden: Sequence[int] = (50,),
        *,
        activation: Activation = "tanh",
        prior: Prior | None = None,
        likelihood: Likelihood | None = None,
        method: Method | None = None,
        standardize: bool = True,
        random_state: Any = 0,
        progress: bool = False,
    ):
        self.hidden = hidden
        self.activation = activation
        self.prior = prior
        self.likelihood = likelihood
        self.method = method
        self.standardize = standardize
        self.random_state = random_state
        self.progress = progress

    def fit(self, X: Any, y: Any) -> Self:
        """Fits to X (row, column) and y (row,).

        Raises:
            ValueError: X or y is not finite, not of numbers, or of another shape.
        """
        X, y = validate_data(self, X, y, y_numeric=True)
        likelihood = Gaussian(least=0.01) if self.likelihood is None else self.likelihood
        units = None
        if self.standardize:
            units = (X, y) if isinstance(likelihood, Gaussian | StudentT) else X
        with default_dtype(torch.float64):
            model = mlp_regression(
                X.shape[1],
                tuple(self.hidden),
                activation=self.activation,
                prior=self.prior,
                likelihood=likelihood,
                standardize=units,
            )
        return self._fit(model, X, y)

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """E[y | X], (row,); with `return_std` also the standard deviation of y, noise included."""
        prediction = self.predictive(X)
        mean = prediction.mean.numpy()
        return (mean, prediction.std.numpy()) if return_std else mean

    def predict_interval(self, X: Any, level: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
        """Central interval that holds `level` of the predictive draws of y: (lower, upper)."""
        lower, upper = self.predictive(X).interval(level)
        return lower.numpy(), upper.numpy()


class BNNClassifier(ClassifierMixin, _Net):
    """A Bayesian multilayer perceptron that predicts labels.

    Attributes:
        posterior_: the `bnn.Posterior`, whose labels are places in `classes_`.
        classes_: the labels, in order.
        n_features_in_: columns of X.
        feature_names_in_: their names, where X had names.

    Args:
        hidden: units of each hidden layer.
        activation: see `bnn.models.MLP`.
        prior: of the weights; default `bnn.models.priors.Normal()`.
        method: how to approximate the posterior, any `bnn` method; default `bnn.SVI()`.
        standardize: the net sees X in units of its standard deviations.
        random_state: a whole number, a `RandomState`, or None for another seed at each fit.
        progress: show a bar.

    Example:
        >>> import numpy as np, bnn
        >>> X = np.linspace(-1.0, 1.0, 30)[:, None]
        >>> y = np.where(X[:, 0] > 0, "yes", "no")
        >>> net = BNNClassifier(hidden=(5,), method=bnn.MAP(steps=200)).fit(X, y)
        >>> net.predict(X[[0, -1]]).tolist(), net.predict_proba(X[:4]).shape
        (['no', 'yes'], (4, 2))
    """

    def __init__(
        self,
        hidden: Sequence[int] = (50,),
        *,
        activation: Activation = "tanh",
        prior: Prior | None = None,
        method: Method | None = None,
        standardize: bool = True,
        random_state: Any = 0,
        progress: bool = False,
    ):
        self.hidden = hidden
        self.activation = activation
        self.prior = prior
        self.method = method
        self.standardize = standardize
        self.random_state = random_state
        self.progress = progress

    def fit(self, X: Any, y: Any) -> Self:
        """Fits to X (row, column) and labels y (row,), of any type.

        Raises:
            ValueError: X is not finite or not of numbers, or y has a single class.
        """
        X, y = validate_data(self, X, y)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                f"y has one class, {self.classes_.tolist()}: there is nothing to tell apart. "
                "Pass rows of at least two classes."
            )
        with default_dtype(torch.float64):
            model = mlp_classification(
                X.shape[1],
                len(self.classes_),
                tuple(self.hidden),
                activation=self.activation,
                prior=self.prior,
                standardize=X if self.standardize else None,
            )
        return self._fit(model, X, labels)

    def predict(self, X: Any) -> np.ndarray:
        """The most probable label of each row, (row,)."""
        most = self.predict_proba(X).argmax(1)
        return self.classes_[most]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Posterior predictive probabilities, (row, class), classes in the order of `classes_`."""
        probs = self.predictive(X).probs
        assert isinstance(probs, torch.Tensor)
        return probs.numpy()

    def _decoded(self, y: np.ndarray) -> np.ndarray:
        return self.classes_[y]
