"""Invertible layers. Each trains in plain autograd too; the runtime is never imported from here."""

from ..registry import register
from .coupling import AdditiveCoupling, AffineCoupling, Coupling, Step
from .lipschitz import lipschitz_bound
from .residual import InvertibleResidual
from .sequential import ReversibleSequential
from .spectral import contract, conv_singular_values

__all__ = [
    "AdditiveCoupling",
    "AffineCoupling",
    "Coupling",
    "InvertibleResidual",
    "ReversibleSequential",
    "Step",
    "contract",
    "conv_singular_values",
    "lipschitz_bound",
]

register(Coupling, inverse="inverse")
