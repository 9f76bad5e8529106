"""Normalizing flows that are ready to train, by data or by samples, in as little memory as an inverse allows.

`Flow` is a transform of `revhooks.nn` and a base distribution; `RealNVP`, `NSF`, `MAF` and `Glow` are made in a line. All of them
train in plain autograd, and hold next to no activations in ``with revhooks.reversible():``.
"""

from .base import Base
from .flow import Flow
from .models import MAF, NSF, Glow, RealNVP
from .transform import FlowTransform, as_transform

__all__ = ["MAF", "NSF", "Base", "Flow", "FlowTransform", "Glow", "RealNVP", "as_transform"]
