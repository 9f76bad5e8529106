"""Blocks that somebody names: their calls are run again in backward (``reversible(replay=...)``).

A class is bracketed once and for good, as `revhooks.register` does, with the subclasses that have a forward of their
own; a predicate may mean any module, so `torch.nn.Module.__call__` is. Outside of ``reversible()`` either costs a look-up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..registry import ACTIVE, in_place_of

__all__ = ["bracket"]

_bracketed: set[tuple[type, str]] = set()


def bracket(spec: object) -> None:
    """Have calls of these modules come to ``run.call_named``; of a predicate or ``None`` any module's, to ``run.call_module``."""
    if isinstance(spec, type):
        _bracket_class(spec)
    elif isinstance(spec, (tuple, list)):
        for cls in spec:
            _bracket_class(cls)
    else:
        _bracket(nn.Module, "__call__")


def _bracket_class(cls: type[nn.Module]) -> None:
    _bracket(cls, "forward")
    for subclass in cls.__subclasses__():
        if "forward" in vars(subclass):
            _bracket_class(subclass)


def _bracket(cls: type, name: str) -> None:
    if (cls, name) in _bracketed:
        return
    _bracketed.add((cls, name))
    original: Callable[..., Any] = getattr(cls, name)
    call = "call_module" if name == "__call__" else "call_named"
    active, is_compiling = ACTIVE, torch.compiler.is_compiling

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_compiling() or (run := active.run) is None:  # in this order: dynamo is to look at no run
            return original(self, *args, **kwargs)
        return getattr(run, call)(original, self, args, kwargs)

    setattr(cls, name, in_place_of(original, method))
