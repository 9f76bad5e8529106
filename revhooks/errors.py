"""The exceptions of the package, one tree.

::

    RevhooksError
    ├── RegistrationError (TypeError)    a class or an inverse that cannot be registered
    ├── ShapeError        (ValueError)   an input, or what a branch returned, does not fit its layer
    ├── GridError         (OverflowError) a stream that is too large for its grid
    ├── CaptureError      (RuntimeError) a block that cannot be part of a CUDA graph
    ├── TargetError       (ValueError)   a command-line target that cannot be loaded or run
    └── BackwardError     (RuntimeError)
        ├── InversionError               an inverse that is missing, ill-formed, or not an inverse
        ├── ReplayError                  a replay that did not repeat the forward call
        └── ModifiedError                an in-place change between forward and backward

    FallbackWarning (UserWarning)        a block is replayed from kept tensors from now on

Every message has four parts: the subject, what was expected, what came, and a remedy.
"""

from __future__ import annotations

__all__ = [
    "BackwardError",
    "CaptureError",
    "FallbackWarning",
    "GridError",
    "InversionError",
    "ModifiedError",
    "RegistrationError",
    "ReplayError",
    "RevhooksError",
    "ShapeError",
    "TargetError",
    "explain",
    "told",
]


class RevhooksError(Exception):
    """Base of every error that revhooks raises."""


class RegistrationError(RevhooksError, TypeError):
    """A class, method or inverse that cannot be registered."""


class ShapeError(RevhooksError, ValueError):
    """A tensor whose shape or dtype does not fit the layer that got it."""


class GridError(RevhooksError, OverflowError):
    """A stream that has left the range in which sums on its grid are exact."""


class CaptureError(RevhooksError, RuntimeError):
    """A block that cannot be repeated in a CUDA graph that is captured."""


class TargetError(RevhooksError, ValueError):
    """A command-line target that cannot be imported, called or run."""


class BackwardError(RevhooksError, RuntimeError):
    """What backward needs cannot be rebuilt."""


class InversionError(BackwardError):
    """An inverse that is missing, returns something ill-formed, or does not invert."""


class ReplayError(BackwardError):
    """A replay that saved other tensors than the forward call did."""


class ModifiedError(BackwardError):
    """Something that backward needs was modified in place after forward."""


class FallbackWarning(UserWarning):
    """A block is rebuilt from kept tensors instead of by its inverse from now on."""


def told(error: BaseException) -> str:
    """What somebody else's error says, in one line, for the ``got`` of a message.

    Example:
        >>> told(ValueError("a number.")), told(KeyError())
        ('ValueError: a number', 'KeyError')
    """
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "").rstrip(".")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def explain(subject: str, *, expected: str, got: str, remedy: str) -> str:
    """Compose a message: subject, expected, got, remedy.

    Example:
        >>> print(explain("f", expected="a tensor", got="None", remedy="return a tensor"))
        f: expected a tensor, got None. Remedy: return a tensor.
    """
    return f"{subject}: expected {expected}, got {got}. Remedy: {remedy}."
