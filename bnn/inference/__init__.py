"""Ways to approximate a posterior: one method, one file; and `Energy`, what most are made of."""

from bnn.inference._energy import Energy
from bnn.inference.concrete_dropout import ConcreteDropout
from bnn.inference.deep_ensemble import DeepEnsemble
from bnn.inference.dirichlet_attention import DirichletAttention
from bnn.inference.gflowout import GFlowOut
from bnn.inference.laplace import Laplace
from bnn.inference.map import MAP
from bnn.inference.mc_dropout import MCDropout
from bnn.inference.mclmc import MCLMC
from bnn.inference.nuts import NUTS
from bnn.inference.randomized_priors import RandomizedPriors
from bnn.inference.sghmc import SGHMC
from bnn.inference.sgld import SGLD
from bnn.inference.svi import SVI
from bnn.inference.swag import SWAG

__all__ = [
    "MAP",
    "MCLMC",
    "NUTS",
    "SGHMC",
    "SGLD",
    "SVI",
    "SWAG",
    "ConcreteDropout",
    "DeepEnsemble",
    "DirichletAttention",
    "Energy",
    "GFlowOut",
    "Laplace",
    "MCDropout",
    "RandomizedPriors",
]
