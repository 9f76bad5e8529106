"""normflows: maximum likelihood calls ``flow.inverse(z) -> (z, log_det)``, reverse KL ``flow(z)``. Both are covered.

A block of Glow is one frame, whose network is found in it; so is a coupling. What takes D passes in one direction is run again.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..buffers import modules_of
from .table import BOTH, LARGE, LEAVE, NEITHER, REPLAY, Adapter, Block

__all__ = ["ADAPTER"]


def _networks(block: nn.Module) -> Iterator[nn.Module]:
    """The networks of the affine couplings in a block."""
    for module in modules_of((block,)):
        network = module._modules.get("param_map")
        if network is not None:
            yield network


ADAPTER = Adapter(
    library="normflows",
    versions="1.7",
    blocks=(
        Block(
            "normflows.flows.affine.glow:GlowBlock",
            methods=BOTH,
            log_det=1,
            branches=_networks,
        ),
        Block(
            "normflows.flows.affine.coupling:AffineCouplingBlock AffineCoupling",
            methods=BOTH,
            log_det=1,
            branches=_networks,
        ),
        Block("normflows.flows.affine.coupling:MaskedAffineFlow", methods=BOTH, log_det=1),
        Block(
            "normflows.flows.affine.coupling:AffineConstFlow CCAffineConst",
            methods=BOTH,
            log_det=1,
            least=LARGE,
        ),
        Block("normflows.flows.normalization:ActNorm", methods=BOTH, log_det=1, least=LARGE),
        Block(
            "normflows.flows.mixing:Invertible1x1Conv InvertibleAffine LULinearPermute Permute",
            methods=BOTH,
            log_det=1,
            branches=(),
            least=LARGE,
        ),
        Block(
            "normflows.flows.neural_spline.coupling:Coupling",
            methods=BOTH,
            log_det=1,
            branches=("transform_net",),
        ),
        Block(
            "normflows.flows.neural_spline.coupling:PiecewiseRationalQuadraticCDF",
            REPLAY,
            BOTH,
            why="of many steps, from a small input",
            log_det=1,
        ),
        Block(
            "normflows.flows.affine.autoregressive:Autoregressive",
            REPLAY,
            BOTH,
            why="one direction takes D passes; a budget may still force it",
            log_det=1,
        ),
        Block(
            "normflows.flows.residual:Residual",
            REPLAY,
            NEITHER,
            why="its inverse is a fixed point, its log-det is drawn",
            log_det=1,
        ),
        Block(
            "normflows.flows.normalization:BatchNorm",
            REPLAY,
            {"forward": None},
            why="statistics of the batch have no inverse",
            log_det=1,
        ),
        Block("normflows.flows.planar:Planar", REPLAY, NEITHER, why="no inverse in closed form", log_det=1),
        Block("normflows.flows.radial:Radial", REPLAY, {"forward": None}, why="no inverse", log_det=1),
        Block(
            "normflows.flows.neural_spline.wrapper:CoupledRationalQuadraticSpline CircularCoupledRationalQuadraticSpline "
            "AutoregressiveRationalQuadraticSpline CircularAutoregressiveRationalQuadraticSpline",
            LEAVE,
            why="what it wraps is rebuilt",
        ),
        Block("normflows.flows.base:Reverse Composite", LEAVE, why="its parts are rebuilt one by one"),
        Block(
            "normflows.core:NormalizingFlow ConditionalNormalizingFlow ClassCondFlow MultiscaleFlow NormalizingFlowVAE",
            LEAVE,
            why="its parts are rebuilt one by one",
        ),
        Block("normflows.flows.reshape:Split Merge Squeeze", LEAVE, why="saves nothing"),
        Block("normflows.flows.mixing:_Permutation _Linear", LEAVE, why="the parts of LULinearPermute"),
        Block("normflows.flows.periodic:PeriodicWrap PeriodicShift", LEAVE, why="saves nothing"),
        Block("normflows.transforms:Logit Shift", LEAVE, BOTH, why="the first layer: its input is the data", log_det=1),
        Block(
            "normflows.flows.stochastic:MetropolisHastings HamiltonianMonteCarlo",
            LEAVE,
            why="draws: no inverse",
        ),
    ),
    quiet=(
        "normflows.flows.base:Flow Reverse",
        "normflows.flows.affine.coupling:AffineConstFlow CCAffineConst AffineCoupling MaskedAffineFlow AffineCouplingBlock",
        "normflows.flows.affine.glow:GlowBlock",
        "normflows.flows.mixing:Permute Invertible1x1Conv InvertibleAffine",
        "normflows.flows.neural_spline.coupling:Coupling PiecewiseCoupling PiecewiseRationalQuadraticCoupling",
        "normflows.flows.normalization:ActNorm",
        "normflows.flows.reshape:Split Merge Squeeze",
        "normflows.nets.cnn:ConvNet2d",
        "normflows.nets.mlp:MLP",
        "normflows.nets.resnet:ResidualBlock ResidualNet",
        "normflows.utils.nn:ConstScaleLayer ActNorm",
    ),
)
ADAPTER.install()
