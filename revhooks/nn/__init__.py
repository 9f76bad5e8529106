"""Invertible layers. Each trains in plain autograd too; the runtime is never imported from here."""

from ..registry import register
from .activation import LeakyReLU, Logit, Sigmoid, SinhArcsinh, Softplus, Tanh
from .autoregressive import MADE, MaskedAutoregressive
from .conditioner import MLP, ConvNet
from .convert import RevNetStack, WithoutSkip, to_momentum, to_revnet
from .coupling import AdditiveCoupling, AffineCoupling, Coupling, Step
from .flow import Flow, FlowSequential, Inverse, MultiScale
from .lipschitz import lipschitz_bound
from .masked import MaskedCoupling, checkerboard
from .mixing import ActNorm, InvertibleConv1x1, InvertibleLinear, Permute
from .momentum import ExactMomentumResidual, MomentumResidual
from .momentum_chain import MomentumSequential, MomentumState
from .resampling import HaarDownsampling, HaarUpsampling, OrthogonalDownsampling, OrthogonalUpsampling
from .reshape import Flatten, Pad, Reshape, Squeeze, Unsqueeze
from .residual import InvertibleResidual
from .sequential import ReversibleSequential
from .spectral import contract, conv_singular_values
from .spline import SplineCoupling

__all__ = [
    "MADE",
    "MLP",
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
    "ConvNet",
    "Coupling",
    "ExactMomentumResidual",
    "Flatten",
    "Flow",
    "FlowSequential",
    "HaarDownsampling",
    "HaarUpsampling",
    "Inverse",
    "InvertibleConv1x1",
    "InvertibleLinear",
    "InvertibleResidual",
    "LeakyReLU",
    "Logit",
    "MaskedAutoregressive",
    "MaskedCoupling",
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
    "SplineCoupling",
    "Squeeze",
    "Step",
    "Tanh",
    "Unsqueeze",
    "WithoutSkip",
    "checkerboard",
    "contract",
    "conv_singular_values",
    "lipschitz_bound",
    "to_momentum",
    "to_revnet",
]

register(Coupling, inverse="inverse")

from . import volumes  # noqa: E402, F401 - of what is registered by now
