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

from ...owned import StandIn, is_foreign_call
from ...registry import Branches, lookup

__all__ = ["OnCall", "branches_of", "deeper", "has_registered_parts", "shadowed", "without_forward_hooks"]

# Takes a child's call over: gets the child, a function that makes the call, and the arguments; returns the result.
OnCall = Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

_UNIMPLEMENTED = nn.Module.forward
_LOCK = threading.Lock()


def branches_of(module: nn.Module, chosen: Branches | None = None) -> list[nn.Module]:
    """The modules whose calls are a block's branches: those that were chosen, or its children, those of containers included.

    Example:
        >>> block = nn.ModuleDict({"inner": nn.Sequential(nn.Linear(2, 2), nn.Tanh())})
        >>> [type(m).__name__ for m in branches_of(block)]
        ['Sequential']
        >>> [type(m).__name__ for m in branches_of(block, ("inner.0", nn.Tanh))]
        ['Linear', 'Tanh']
    """
    return list(_children(module) if chosen is None else dict.fromkeys(_chosen(module, chosen)))


def _chosen(module: nn.Module, chosen: Branches) -> Iterator[nn.Module]:
    if isinstance(chosen, str):
        yield module.get_submodule(chosen)
    elif isinstance(chosen, type):
        yield from (inner for inner in module.modules() if isinstance(inner, chosen) and inner is not module)
    elif isinstance(chosen, (tuple, list)):
        for one in chosen:
            yield from _chosen(module, one)
    else:
        yield from chosen(module)


def _children(module: nn.Module) -> dict[nn.Module, None]:
    found: dict[nn.Module, None] = {}
    stack = [child for child in module._modules.values() if child is not None]
    while stack:
        child = stack.pop()
        if type(child).forward is _UNIMPLEMENTED:  # ModuleList, ModuleDict
            stack.extend(c for c in child._modules.values() if c is not None)
        else:
            found[child] = None
    return found


def has_registered_parts(module: nn.Module, *, by_adapters: bool = True) -> bool:
    """Whether a block is a container of registered ones: its children, those in its lists, or all in a sequence of its.

    Without those that are registered ``by_adapters``: what somebody registers is inverted, whatever it is made of.
    """
    return any(_is_registered(part, by_adapters) or _is_sequence(part, by_adapters) for part in _children(module))


def _is_registered(module: nn.Module, by_adapters: bool) -> bool:
    entry = lookup(type(module)) or getattr(type(module).forward, "__revhooks__", None)
    return entry is not None and (by_adapters or not entry.adapter)


def _is_sequence(part: nn.Module, by_adapters: bool) -> bool:
    return isinstance(part, nn.Sequential) and len(part) > 0 and all(_is_registered(one, by_adapters) for one in part)


def deeper(modules: list[nn.Module]) -> list[nn.Module]:
    """The modules below these whose calls can be seen: not what a script or a compiler has taken."""
    found: dict[nn.Module, None] = {}
    stack = list(modules)
    while stack:
        module = stack.pop()
        if isinstance(module, torch.jit.ScriptModule) or _has_compiled_code(module):
            continue
        below = [child for child in module._modules.values() if child is not None and child not in found]
        found.update(dict.fromkeys(below))
        stack += below
    return [module for module in found if module not in modules and type(module).forward is not _UNIMPLEMENTED]


def _has_compiled_code(module: nn.Module) -> bool:
    """Whether a compiler is at work in a module, which would compile once more for what stands on a module below it."""
    if module._compiled_call_impl is not None or "_orig_mod" in module._modules:
        return True
    classes = (cls for cls in type(module).__mro__ if cls not in nn.Module.__mro__)
    places = [vars(module), *map(vars, classes)]
    return any(hasattr(value, "_torchdynamo_orig_callable") for place in places for value in place.values() if callable(value))


class _Watching:
    """What one block's call does with calls of its branches, and of strays."""

    __slots__ = ("branches", "depth", "note", "on_call", "strays")

    def __init__(
        self, branches: list[nn.Module], on_call: OnCall, strays: list[nn.Module], note: Callable[[nn.Module], object]
    ) -> None:
        self.branches = frozenset(map(id, branches))
        self.on_call = on_call
        self.strays = frozenset(map(id, strays))
        self.note = note
        self.depth = 0  # of calls of strays


class _Watch(threading.local):
    """Who takes the calls of this thread over, innermost block last; ``None`` while a branch runs."""

    def __init__(self) -> None:
        self.stack: list[_Watching | None] = []


_WATCH = _Watch()


class _Shadow(StandIn):
    """Stands for ``child.forward`` while some thread is in a call of its block."""

    def __init__(self, child: nn.Module) -> None:
        self._child = weakref.ref(child)
        self.below: Any = child.__dict__.get("forward")
        self.users = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stack = _WATCH.stack
        watch = stack[-1] if stack else None
        child = self._child()
        if child is None:  # pragma: no cover - who calls a module holds it
            raise RuntimeError("a module was called after it was deleted")
        if watch is None or torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
            return self._proceed(*args, **kwargs)  # what a functional transform runs is no call of its own
        if id(child) in watch.strays:
            return self._proceed_as_stray(watch, child, args, kwargs)
        if id(child) not in watch.branches:
            return self._proceed(*args, **kwargs)
        stack.append(None)
        try:
            return watch.on_call(child, self._proceed, args, kwargs)
        finally:
            stack.pop()

    def _proceed_as_stray(self, watch: _Watching, child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not watch.depth:
            watch.note(child)
        watch.depth += 1
        try:
            return self._proceed(*args, **kwargs)
        finally:
            watch.depth -= 1

    def _proceed(self, *args: Any, **kwargs: Any) -> Any:
        if self.below is not None:
            return self.below(*args, **kwargs)
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
        if self.below is not None:
            child.__dict__["forward"] = self.below
        else:
            del child.__dict__["forward"]


def _shadow_of(child: nn.Module) -> _Shadow:
    present = child.__dict__.get("forward")
    return present if isinstance(present, _Shadow) else _Shadow(child)


_NONE: list[nn.Module] = []


@contextlib.contextmanager
def shadowed(
    children: list[nn.Module],
    on_call: OnCall,
    strays: list[nn.Module] = _NONE,
    note: Callable[[nn.Module], object] = id,
) -> Iterator[None]:
    """Send this thread's outermost calls of ``children`` through ``on_call``; tell ``note`` of outermost calls of ``strays``."""
    shadows: list[_Shadow] = []
    depth = len(_WATCH.stack)
    try:
        with _LOCK:
            for child in [*children, *strays]:
                shadow = _shadow_of(child)
                shadow.use()
                shadows.append(shadow)
        _WATCH.stack.append(_Watching(children, on_call, strays, note))
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
