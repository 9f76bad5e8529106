"""Invertible layers. Each trains in plain autograd too; the runtime is never imported from here."""

from ..registry import register
from .convert import RevNetStack, WithoutSkip, to_momentum, to_revnet
from .coupling import AdditiveCoupling, AffineCoupling, Coupling, Step
from .momentum import ExactMomentumResidual, MomentumResidual
from .momentum_chain import MomentumSequential, MomentumState
from .sequential import ReversibleSequential

__all__ = [
    "AdditiveCoupling",
    "AffineCoupling",
    "Coupling",
    "ExactMomentumResidual",
    "MomentumResidual",
    "MomentumSequential",
    "MomentumState",
    "RevNetStack",
    "ReversibleSequential",
    "Step",
    "WithoutSkip",
    "to_momentum",
    "to_revnet",
]

register(Coupling, inverse="inverse")
