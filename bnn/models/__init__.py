"""Pyro models: nets whose weights are sampled, priors over them, likelihoods, ready models."""

from bnn.models import likelihoods, priors
from bnn.models._standardize import standardize
from bnn.models.mlp import MLP
from bnn.models.nets import linear, mlp_classification, mlp_regression, supervised
from bnn.models.transformer import (
    Transformer,
    transformer_classification,
    transformer_tagging,
    vit,
)
from bnn.models.weights import sample_weights

__all__ = [
    "MLP",
    "Transformer",
    "likelihoods",
    "linear",
    "mlp_classification",
    "mlp_regression",
    "priors",
    "sample_weights",
    "standardize",
    "supervised",
    "transformer_classification",
    "transformer_tagging",
    "vit",
]
