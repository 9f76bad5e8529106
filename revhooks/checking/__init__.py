"""``check()``: is a step under ``reversible()`` the step of plain autograd, and does what has an inverse invert?"""

from .checker import check
from .drift import Drift
from .result import CheckResult

__all__ = ["CheckResult", "Drift", "check"]
