"""What is a module's own, and what a framework keeps there (Rule 18)."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from types import FunctionType
from typing import Any

from torch import Tensor, nn

__all__ = [
    "STANDARD",
    "_FRAMEWORKS",
    "StandIn",
    "give_attributes",
    "is_foreign",
    "is_foreign_call",
    "is_sharded",
    "own_among",
    "own_attributes",
]

# What every module has, and what is handled by itself
STANDARD = frozenset(nn.Module().__dict__) | {"forward"}
_SHARDED = "_is_fsdp_managed_module"  # an attribute by which both kinds of FSDP mark whose parameters they shard
_FRAMEWORKS = ("__composable_api_state_key_", _SHARDED, "_fsdp_")
_DISTRIBUTED = ("torch.distributed.", "torch.nn.parallel.")
_TORCH = sys.stdlib_module_names | {"torch", "builtins"}


class StandIn:
    """What this package puts in a place for a while, and what it calls.

    Attributes:
        below: what was there, or ``None``: what the class has.
    """

    below: Any


def is_foreign(kind: type) -> bool:
    """Whether what is of this class belongs to a framework, which looks after it itself; not a user's class that one extends."""
    if not kind.__module__.startswith(_DISTRIBUTED):
        return False
    return not any(base is not nn.Module and _is_anothers(base.__module__) for base in kind.__mro__)


def _is_anothers(module: str) -> bool:
    return module.partition(".")[0] not in _TORCH or module.startswith("torch.nn.modules.")


def is_foreign_call(fn: Any) -> bool:
    """The same of a function: it is a framework's hook."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    owner = getattr(fn, "__self__", None)
    module = fn.__module__ if isinstance(fn, FunctionType) else type(fn if owner is None else owner).__module__
    return module is not None and module.startswith(_DISTRIBUTED)


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP gathers the module's parameters for a call: it puts them into their places and takes them away."""
    return _SHARDED in module.__dict__


def own_attributes(module: Any) -> dict[str, Any]:
    """Those that not every module has, without parameters, buffers, children, and what frameworks keep there; an object's all."""
    if not isinstance(module, nn.Module):
        return dict(getattr(module, "__dict__", {}))
    return own_among(module, module.__dict__)


def own_among(module: nn.Module, attributes: dict[str, Any]) -> dict[str, Any]:
    """`own_attributes`, where these are all that it has."""
    if is_foreign(type(module)):
        return {}
    if _SHARDED not in attributes:
        return {name: value for name, value in attributes.items() if name not in STANDARD}
    return {
        name: value
        for name, value in attributes.items()
        if name not in STANDARD and not name.startswith(_FRAMEWORKS) and not _is_lent(value)
    }


def _is_lent(value: Any) -> bool:
    """Whether it is a piece of what FSDP gathers for a call and sets as an attribute."""
    return isinstance(value, Tensor) and isinstance(value._base, nn.Parameter)


def give_attributes(module: Any, own: dict[str, Any], names: Iterable[str] | None = None) -> None:
    """Let these be the module's own attributes, or those of these names."""
    attributes = module.__dict__
    for name in own_attributes(module) if names is None else names:
        if name not in own:
            attributes.pop(name, None)
    attributes.update(own)
