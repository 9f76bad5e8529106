"""nflows: ``transform(x, context=None) -> (y, logabsdet)`` and ``transform.inverse(y, context)``, both of which may be trained.

A coupling is one frame, whose ``transform_net`` is evaluated once more. Autoregressive transforms take D passes in one
direction: they are run again from their input, which is small.
"""

from __future__ import annotations

from .table import BOTH, LARGE, LEAVE, NEITHER, REPLAY, Adapter, Block

__all__ = ["ADAPTER"]


ADAPTER = Adapter(
    library="nflows",
    versions="0.14",
    blocks=(
        Block("nflows.transforms.base:Transform", methods=BOTH, log_det=1, subclasses=True),
        Block("nflows.transforms.coupling:CouplingTransform", methods=BOTH, log_det=1, branches=("transform_net",)),
        Block(
            "nflows.transforms.autoregressive:AutoregressiveTransform",
            REPLAY,
            BOTH,
            why="its inverse takes D passes; a budget may still force it",
            log_det=1,
        ),
        Block("nflows.transforms.lu:LULinear", methods=BOTH, log_det=1, least=LARGE),
        Block("nflows.transforms.qr:QRLinear", methods=BOTH, log_det=1, least=LARGE),
        Block("nflows.transforms.svd:SVDLinear", methods=BOTH, log_det=1, least=LARGE),
        Block(
            "nflows.transforms.linear:NaiveLinear",
            REPLAY,
            NEITHER,
            why="its inverse calls a solver that torch no longer has",
            log_det=1,
            least=LARGE,
        ),
        Block("nflows.transforms.linear:Linear", LEAVE, why="its subclasses are covered"),
        Block("nflows.transforms.conv:OneByOneConvolution", methods=BOTH, log_det=1, branches=(), least=LARGE),
        Block("nflows.transforms.normalization:ActNorm", methods=BOTH, log_det=1, least=LARGE),
        Block("nflows.transforms.permutations:Permutation", methods=BOTH, log_det=1, least=LARGE),
        Block("nflows.transforms.standard:PointwiseAffineTransform", methods=BOTH, log_det=1, least=LARGE),
        Block("nflows.transforms.nonlinearities:LeakyReLU", methods=BOTH, log_det=1, least=LARGE),
        Block("nflows.transforms.orthogonal:HouseholderSequence", methods=BOTH, log_det=1, least=LARGE),
        Block("nflows.transforms.reshape:SqueezeTransform", methods=BOTH, log_det=1, least=LARGE),
        Block(
            "nflows.transforms.normalization:BatchNorm",
            REPLAY,
            NEITHER,
            why="statistics of the batch have no inverse",
            log_det=1,
        ),
        Block(
            "nflows.transforms.nonlinearities:Sigmoid Tanh LogTanh CauchyCDF GatedLinearUnit",
            REPLAY,
            NEITHER,
            why="it saturates: no inverse in floating point",
            log_det=1,
            least=LARGE,
        ),
        Block(
            "nflows.transforms.nonlinearities:PiecewiseLinearCDF PiecewiseQuadraticCDF PiecewiseCubicCDF "
            "PiecewiseRationalQuadraticCDF",
            REPLAY,
            NEITHER,
            why="of many steps, from a small input",
            log_det=1,
        ),
        Block(
            "nflows.transforms.base:CompositeTransform MultiscaleCompositeTransform InverseTransform",
            LEAVE,
            why="its parts are rebuilt one by one",
        ),
        Block("nflows.transforms.standard:IdentityTransform", LEAVE, why="saves nothing"),
    ),
    quiet=(
        "nflows.transforms.base:Transform",
        "nflows.transforms.coupling:CouplingTransform AffineCouplingTransform AdditiveCouplingTransform "
        "PiecewiseCouplingTransform PiecewiseLinearCouplingTransform PiecewiseQuadraticCouplingTransform "
        "PiecewiseCubicCouplingTransform PiecewiseRationalQuadraticCouplingTransform",
        "nflows.transforms.permutations:Permutation RandomPermutation ReversePermutation",
        "nflows.nn.nets.mlp:MLP",
        "nflows.nn.nets.resnet:ResidualBlock ResidualNet ConvResidualBlock ConvResidualNet",
    ),
)
ADAPTER.install()
