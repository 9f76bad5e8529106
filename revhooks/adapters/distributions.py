"""torch.distributions: transforms with networks or parameters in them, as `TransformedDistribution` calls them.

``log_prob`` calls ``t.inv(y)`` and then ``t.log_abs_det_jacobian(x, y)``, which needs both: so x and y are kept, and each of
the two is run again from them. Transforms that saturate would not invert in floating point; these gradients are exact.
"""

from __future__ import annotations

from .table import LEAVE, REPLAY, Adapter, Block

__all__ = ["ADAPTER"]

_CALLS = dict.fromkeys(("_call", "_inverse", "log_abs_det_jacobian"))

ADAPTER = Adapter(
    library="torch.distributions",
    versions="2.11 to 2.13",
    blocks=(
        Block(
            "torch.distributions.transforms:Transform",
            REPLAY,
            _CALLS,
            why="log_prob needs both x and y",
            subclasses=True,
        ),
        Block(
            "torch.distributions.transforms:StickBreakingTransform CorrCholeskyTransform LowerCholeskyTransform "
            "PositiveDefiniteTransform CumulativeDistributionTransform",
            REPLAY,
            _CALLS,
            why="of many steps",
        ),
        Block(
            "torch.distributions.transforms:ComposeTransform IndependentTransform ReshapeTransform CatTransform StackTransform "
            "_InverseTransform",
            LEAVE,
            why="its parts are run again one by one",
        ),
        Block(
            "torch.distributions.transforms:AffineTransform ExpTransform PowerTransform SigmoidTransform TanhTransform "
            "SoftplusTransform AbsTransform SoftmaxTransform",
            LEAVE,
            why="it saves hardly more than its input; what is cheap to recompute is",
        ),
    ),
    own=("torch.distributions", "zuko", "revhooks"),
)
ADAPTER.install()
