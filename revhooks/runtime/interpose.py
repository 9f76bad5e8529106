"""Sees the calls that a third-party block makes to its children: these are its branches.

For the time of one call the children's ``forward`` is shadowed on the instance. That sees ``child(x)`` and
``child.forward(x)`` alike, taxes no other module, and is gone afterwards, whatever happens. A child has one shadow,
however many threads are in a call of its block; it acts in those threads only, and only for outermost calls.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..owned import is_foreign_call

__all__ = ["OnCall", "branches_of", "shadowed", "without_forward_hooks"]

# Takes a child's call over: gets the child, a function that makes the call, and the arguments; returns the result.
OnCall = Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

_UNIMPLEMENTED = nn.Module.forward
_LOCK = threading.Lock()


def branches_of(module: nn.Module) -> list[nn.Module]:
    """The modules whose calls are a block's branches: its children, those of containers included."""
    found: dict[nn.Module, None] = {}
    stack = [child for child in module._modules.values() if child is not None]
    while stack:
        child = stack.pop()
        if type(child).forward is _UNIMPLEMENTED:  # ModuleList, ModuleDict
            stack.extend(c for c in child._modules.values() if c is not None)
        else:
            found[child] = None
    return list(found)


class _Watch(threading.local):
    """Who takes the calls of this thread over, innermost block last; ``None`` while a branch runs."""

    def __init__(self) -> None:
        self.stack: list[tuple[frozenset[int], OnCall] | None] = []


_WATCH = _Watch()


class _Shadow:
    """Stands for ``child.forward`` while some thread is in a call of its block."""

    def __init__(self, child: nn.Module) -> None:
        self._child = weakref.ref(child)
        self._below: Any = child.__dict__.get("forward")
        self.users = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stack = _WATCH.stack
        watch = stack[-1] if stack else None
        child = self._child()
        if child is None:  # pragma: no cover - who calls a module holds it
            raise RuntimeError("a module was called after it was deleted")
        if watch is None or id(child) not in watch[0] or torch.compiler.is_compiling():
            return self._proceed(*args, **kwargs)
        stack.append(None)
        try:
            return watch[1](child, self._proceed, args, kwargs)
        finally:
            stack.pop()

    def _proceed(self, *args: Any, **kwargs: Any) -> Any:
        if self._below is not None:
            return self._below(*args, **kwargs)
        child = self._child()
        return type(child).forward(child, *args, **kwargs)  # type: ignore[union-attr]

    def use(self) -> None:
        """One more call needs it."""
        self.users += 1
        child = self._child()
        if self.users == 1 and child is not None:
            child.__dict__["forward"] = self

    def leave(self) -> None:
        """One call less needs it; the last one takes it off."""
        self.users -= 1
        child = self._child()
        if self.users or child is None or child.__dict__.get("forward") is not self:
            return
        if self._below is not None:
            child.__dict__["forward"] = self._below
        else:
            del child.__dict__["forward"]


def _shadow_of(child: nn.Module) -> _Shadow:
    present = child.__dict__.get("forward")
    return present if isinstance(present, _Shadow) else _Shadow(child)


@contextlib.contextmanager
def shadowed(children: list[nn.Module], on_call: OnCall) -> Iterator[None]:
    """Send this thread's outermost calls of ``children`` through ``on_call``."""
    shadows: list[_Shadow] = []
    depth = len(_WATCH.stack)
    try:
        with _LOCK:
            for child in children:
                shadow = _shadow_of(child)
                shadow.use()
                shadows.append(shadow)
        _WATCH.stack.append((frozenset(map(id, children)), on_call))
        yield
    finally:
        del _WATCH.stack[depth:]
        with _LOCK:
            for shadow in shadows:
                shadow.leave()


@contextlib.contextmanager
def without_forward_hooks(children: list[nn.Module]) -> Iterator[None]:
    """Do not fire the forward hooks of ``children``, whose calls the user does not make; but those of frameworks (Rule 18)."""
    before = [(child, child._forward_hooks) for child in children if child._forward_hooks]
    try:
        for child, hooks in before:
            child._forward_hooks = type(hooks)((key, hook) for key, hook in hooks.items() if is_foreign_call(hook))
        yield
    finally:
        for child, hooks in before:
            child._forward_hooks = hooks
