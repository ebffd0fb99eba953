"""Bayesian neural nets in Pyro: write a model, call `fit`, compare posteriors in ArviZ."""

from bnn import calibration, conformal, models, plots, selective
from bnn.checkpoint import load
from bnn.compare import compare
from bnn.diagnostics import Finding, Report
from bnn.errors import (
    ApproximationWarning,
    CheckpointError,
    CheckpointWarning,
    ConvergenceWarning,
    DataError,
    DataWarning,
    FitError,
    ModelError,
    PerformanceWarning,
    ResumeMismatch,
)
from bnn.fitting import fit
from bnn.inference import (
    MAP,
    MCLMC,
    NUTS,
    SGHMC,
    SGLD,
    SVI,
    SWAG,
    ConcreteDropout,
    DeepEnsemble,
    DirichletAttention,
    GFlowOut,
    Laplace,
    MCDropout,
    RandomizedPriors,
)
from bnn.method import Method
from bnn.models import standardize
from bnn.posterior import Posterior
from bnn.prediction import Prediction
from bnn.prior import prior_predictive
from bnn.reference import reference
from bnn.run import Checkpoint
from bnn.simulation import SBC, sbc
from bnn.summary import Summary

__all__ = [
    "MAP",
    "MCLMC",
    "NUTS",
    "SBC",
    "SGHMC",
    "SGLD",
    "SVI",
    "SWAG",
    "ApproximationWarning",
    "Checkpoint",
    "CheckpointError",
    "CheckpointWarning",
    "ConcreteDropout",
    "ConvergenceWarning",
    "DataError",
    "DataWarning",
    "DeepEnsemble",
    "DirichletAttention",
    "Finding",
    "FitError",
    "GFlowOut",
    "Laplace",
    "MCDropout",
    "Method",
    "ModelError",
    "PerformanceWarning",
    "Posterior",
    "Prediction",
    "RandomizedPriors",
    "Report",
    "ResumeMismatch",
    "Summary",
    "calibration",
    "compare",
    "conformal",
    "fit",
    "load",
    "models",
    "plots",
    "prior_predictive",
    "reference",
    "sbc",
    "selective",
    "standardize",
]
__version__ = "0.1.0"
