"""Invertible layers. Each trains in plain autograd too; the runtime is never imported from here."""

from ..registry import register
from .activation import LeakyReLU, Logit, Sigmoid, SinhArcsinh, Softplus, Tanh
from .convert import RevNetStack, WithoutSkip, to_momentum, to_revnet
from .coupling import AdditiveCoupling, AffineCoupling, Coupling, Step
from .flow import Flow, FlowSequential, MultiScale
from .lipschitz import lipschitz_bound
from .mixing import ActNorm, InvertibleConv1x1, InvertibleLinear, Permute
from .momentum import ExactMomentumResidual, MomentumResidual
from .momentum_chain import MomentumSequential, MomentumState
from .resampling import HaarDownsampling, HaarUpsampling, OrthogonalDownsampling, OrthogonalUpsampling
from .reshape import Flatten, Pad, Reshape, Squeeze, Unsqueeze
from .residual import InvertibleResidual
from .sequential import ReversibleSequential
from .spectral import contract, conv_singular_values

__all__ = [
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
    "Coupling",
    "ExactMomentumResidual",
    "Flatten",
    "Flow",
    "FlowSequential",
    "HaarDownsampling",
    "HaarUpsampling",
    "InvertibleConv1x1",
    "InvertibleLinear",
    "InvertibleResidual",
    "LeakyReLU",
    "Logit",
    "MomentumResidual",
    "MomentumSequential",
    "MomentumState",
    "MultiScale",
    "OrthogonalDownsampling",
    "OrthogonalUpsampling",
    "Pad",
    "Permute",
    "Reshape",
    "RevNetStack",
    "ReversibleSequential",
    "Sigmoid",
    "SinhArcsinh",
    "Softplus",
    "Squeeze",
    "Step",
    "Tanh",
    "Unsqueeze",
    "WithoutSkip",
    "contract",
    "conv_singular_values",
    "lipschitz_bound",
    "to_momentum",
    "to_revnet",
]

register(Coupling, inverse="inverse")
