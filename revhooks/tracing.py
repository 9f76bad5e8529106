"""What is done while a model is recorded to be run later: by `torch.compile`, `torch.export` or `torch.jit.trace`.

NOTE: dynamo and this package. Where dynamo does not compile a frame (a module of torch's own, what follows a graph break), it
runs it as it is, and looks at every Python frame that is called inside: hooks that autograd calls as well. So frames of this
package are *hidden* (`hide`, `hide_all`): dynamo steps over them at no cost, and compiles what they call, which is the user's.
Frames that call nothing of the user's are *closed*: nothing is compiled inside of them. What is run again is run as it was
(`compiler`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch

__all__ = ["apply", "compiler", "hide", "hide_all", "is_recorded", "is_traced", "set_compiler", "untraced"]

_dynamo: Any = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)


def is_traced() -> bool:
    """Whether a `torch.jit.trace` records what is called now.

    Example:
        >>> is_traced()
        False
    """
    return torch.jit.is_tracing()  # type: ignore[attr-defined, no-any-return]


def is_recorded() -> bool:
    """Whether what is called now is recorded, so that no value can be looked at.

    Example:
        >>> is_recorded()
        False
    """
    return torch.compiler.is_compiling() or is_traced()


def apply(function: Any, *inputs: Any) -> Any:
    """Apply an autograd function whose context needs its inputs only.

    In a `torch.jit.trace` without gradients its operations are recorded in its place: what calls Python cannot be saved.

    Example:
        >>> class Negate(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(x): return -x
        ...     @staticmethod
        ...     def setup_context(ctx, inputs, output): pass
        >>> with torch.no_grad(): traced = torch.jit.trace(lambda x: apply(Negate, x), torch.ones(2))
        >>> "Negate" in str(traced.graph), traced(torch.ones(2))
        (False, tensor([-1., -1.]))
    """
    if is_traced() and not torch.is_grad_enabled():
        return function.forward(*inputs)
    return function.apply(*inputs)


@contextlib.contextmanager
def untraced() -> Iterator[None]:
    """What is done here does not become part of a `torch.jit.trace`."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


# ----------------------------------------------------------------------------------------- dynamo


def _get_compiler() -> Any:
    """What compiles the frames of this thread; for a torch that does not tell, set it and see what was there."""
    before = _dynamo.set_eval_frame(None)
    _dynamo.set_eval_frame(before)
    return before


if hasattr(_dynamo, "get_eval_frame_callback"):
    compiler = _dynamo.get_eval_frame_callback
elif hasattr(_dynamo, "set_eval_frame"):
    compiler = _get_compiler
else:  # pragma: no cover - a torch without dynamo

    def compiler() -> Any:
        """What compiles the frames of this thread: ``None`` outside of compiled code."""


def set_compiler(callback: Any) -> Any:
    """Have frames of this thread compiled by ``callback``; returns what compiled them before."""
    return None if _dynamo is None else _dynamo.set_eval_frame(callback)


def hide(function: Any, *, closed: bool = False) -> None:
    """Have dynamo step over the frames of a function and of what is defined in it; ``closed``: over all that is called there."""
    strategy, action = getattr(_dynamo, "_FrameExecStrategy", None), getattr(_dynamo, "_FrameAction", None)
    if strategy is None or action is None:  # pragma: no cover - a torch that has no such thing
        return
    how = strategy(action.SKIP, action.SKIP if closed else action.DEFAULT)
    codes = [function if isinstance(function, CodeType) else function.__code__]
    for code in codes:  # which grows
        _dynamo.set_code_exec_strategy(code, how)
        codes += [const for const in code.co_consts if isinstance(const, CodeType)]


def hide_all(modules: Iterable[ModuleType], *, but: frozenset[str] = frozenset()) -> None:
    """Hide every function and method that modules define, but those of these names, which are to be compiled."""
    for module in modules:
        seen: set[int] = set()
        stack = [thing for thing in vars(module).values() if getattr(thing, "__module__", None) == module.__name__]
        while stack:
            thing = stack.pop()
            if id(thing) in seen:
                continue
            seen.add(id(thing))
            if isinstance(thing, FunctionType):
                if thing.__name__ not in but:
                    hide(thing)
                stack.append(vars(thing).get("__wrapped__"))
            elif isinstance(thing, type):
                parts = vars(thing).values()
                stack += [part for part in parts if not isinstance(part, type) or part.__module__ == module.__name__]
            elif isinstance(thing, property):
                stack += [thing.fget, thing.fset]
            elif isinstance(thing, (staticmethod, classmethod)):
                stack.append(thing.__func__)
