"""Train deep nets without storing their activations: ``with revhooks.reversible():``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "reversible": ".context",
    "checkpoint": ".context",
    "log_det": ".volume",
    "register": ".registry",
    "unregister": ".registry",
    "registered": ".registry",
    "invertible": ".registry",
    "check": ".checking",
    "CheckResult": ".checking",
    "profile": ".profiler.profile",
}
_SUBMODULES = ("errors", "flows", "functional", "nn", "record", "solvers")

__all__ = [
    "CheckResult",
    "check",
    "checkpoint",
    "errors",
    "flows",
    "functional",
    "invertible",
    "log_det",
    "nn",
    "profile",
    "record",
    "register",
    "registered",
    "reversible",
    "solvers",
    "unregister",
]

if TYPE_CHECKING:
    from . import errors, flows, functional, nn, record, solvers
    from .checking import CheckResult, check
    from .context import checkpoint, reversible
    from .profiler.profile import profile
    from .registry import invertible, register, registered, unregister
    from .volume import log_det


def __getattr__(name: str) -> Any:
    """Import public names on first use (PEP 562)."""
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name], __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Public names."""
    return sorted({*globals(), *__all__})
