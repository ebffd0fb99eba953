"""Bayesian neural nets in Pyro: write a model, call `fit`, compare posteriors in ArviZ."""

from bnn import models
from bnn.errors import (
    ApproximationWarning,
    CheckpointError,
    ConvergenceWarning,
    DataError,
    DataWarning,
    FitError,
    ModelError,
)
from bnn.fitting import fit
from bnn.inference import MAP, NUTS, SVI
from bnn.method import Method
from bnn.posterior import Posterior
from bnn.prediction import Prediction

__version__ = "0.1.0"
