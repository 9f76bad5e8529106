"""Functional transforms of `torch.func` inside of ``reversible()``: our hooks step aside for them.

`torch.func.grad`, ``vjp``, ``jacrev`` and ``hessian`` refuse to begin while saved-tensor hooks are on the stack, whoever put
them there, and they ask before any operation runs, so that no hook and no mode of ours could make room in time. So the two
functions of torch that ask are bracketed, as a registered class is: once, and without hooks of ours on the stack a bracket is
a look at it. (The function that they ask, `torch.autograd.graph.disable_saved_tensors_hooks`, would be one, but a compiler
knows it by its identity.) What a transform saves is held by its graph, as in plain autograd.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch._C import _autograd
from torch._functorch import eager_transforms

__all__ = ["make_room"]

_F = TypeVar("_F", bound=Callable[..., Any])
_PACKAGE = __name__.partition(".")[0] + "."
_REFUSING = ("_vjp_with_argnums", "grad_and_value_impl")


def make_room() -> None:
    """Have hooks of this package step aside for functional transforms, from now on."""
    for name in _REFUSING:
        original = getattr(eager_transforms, name, None)
        if original is not None and not hasattr(original, "__revhooks__"):
            setattr(eager_transforms, name, _bracket(original))


def _bracket(original: _F) -> _F:
    is_compiling = torch.compiler.is_compiling

    @functools.wraps(original)
    def bracketed(*args: Any, **kwargs: Any) -> Any:
        if is_compiling() or not _is_ours(_top()):
            return original(*args, **kwargs)
        with _aside():
            return original(*args, **kwargs)

    bracketed.__revhooks__ = True  # type: ignore[attr-defined]
    return bracketed  # type: ignore[return-value]


@contextlib.contextmanager
def _aside() -> Iterator[None]:
    taken: list[Any] = []
    try:
        while _is_ours(_top()):
            taken.append(_top())
            _autograd._pop_saved_tensors_default_hooks()
        yield
    finally:
        for pack, unpack in reversed(taken):
            _autograd._push_saved_tensors_default_hooks(pack, unpack)


def _top() -> Any:
    return _autograd._top_saved_tensors_default_hooks(True)


def _is_ours(hooks: Any) -> bool:
    return hooks is not None and str(getattr(hooks[0], "__module__", "")).startswith(_PACKAGE)
