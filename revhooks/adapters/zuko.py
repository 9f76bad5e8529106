"""zuko: transforms are made anew for each call, of closures over its modules. They are run again, by `call_and_ladj`.

Their inputs are small: a vector a sample, where the hyper network saves its hidden layers. So each transform keeps its input,
its gradients are those of plain autograd to the last bit, and each network is evaluated twice in a step.
"""

from __future__ import annotations

from .table import LEAVE, REPLAY, Adapter, Block

__all__ = ["ADAPTER"]

_CALLS = dict.fromkeys(("call_and_ladj", "_call", "_inverse", "log_abs_det_jacobian"))

ADAPTER = Adapter(
    library="zuko",
    versions="1.6",
    blocks=(
        Block(
            "zuko.transforms:AutoregressiveTransform CouplingTransform",
            REPLAY,
            _CALLS,
            why="its input is small beside what its network saves",
        ),
        Block(
            "zuko.transforms:MonotonicRQSTransform MonotonicTransform BernsteinTransform BoundedBernsteinTransform "
            "GaussianizationTransform UnconstrainedMonotonicTransform SOSPolynomialTransform",
            REPLAY,
            _CALLS,
            why="elementwise, of many steps",
        ),
        Block("zuko.transforms:ComposedTransform DependentTransform", LEAVE, why="its parts are run again one by one"),
        Block("zuko.transforms:FreeFormJacobianTransform", LEAVE, why="its solver has an adjoint of its own"),
        Block(
            "zuko.transforms:IdentityTransform CosTransform SinTransform SoftclipTransform CircularShiftTransform "
            "SignedPowerTransform AdditiveTransform MonotonicAffineTransform PermutationTransform RotationTransform "
            "LULinearTransform",
            LEAVE,
            why="it saves hardly more than its input",
        ),
    ),
)
ADAPTER.install()
