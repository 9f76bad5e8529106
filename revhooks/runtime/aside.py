"""Where the hooks of a run step aside: for functional transforms, and for backward passes.

Two functions of torch, which ask for that, are bracketed, and so is the one that begins a backward pass: once, as a registered
class is. Without hooks of ours on the stack a bracket is a look at it.

- *Transforms.* `torch.func.grad`, ``vjp``, ``jacrev`` and ``hessian`` refuse to begin while saved-tensor hooks are on the stack,
  whoever put them there, and they ask before any operation runs, so that no hook and no mode of ours could make room in time.
  (The function that they ask, `torch.autograd.graph.disable_saved_tensors_hooks`, would be one to bracket, but a compiler knows
  it by its identity.) What a transform saves is held by its graph, as in plain autograd.
- *Backward.* The engine gives the hooks on the stack to each node that it runs, and takes them away again. For hooks written in
  Python that costs the host about a microsecond a node, a twentieth of a step, and for nothing: a pass that makes no graph saves
  nothing. But a function of the user's may record a graph of its own in backward, as a reentrant checkpoint does: it gets them
  back.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch._C import _autograd
from torch._functorch import eager_transforms
from torch.autograd.function import BackwardCFunction

from ..backward import current_pass

__all__ = ["make_room"]

_F = TypeVar("_F", bound=Callable[..., Any])
_PACKAGE = __name__.partition(".")[0] + "."
_REFUSING = ("_vjp_with_argnums", "grad_and_value_impl")
_APPLIES = ("apply", "apply_boxed")
_FEW = 4  # roots of a pass that are marked


def make_room() -> None:
    """Have hooks of this package step aside, from now on."""
    for name in _REFUSING:
        _bracket(eager_transforms, name, _for_transform)
    _bracket(torch.autograd, "_engine_run_backward", _for_backward)
    for name in _APPLIES:
        _bracket(BackwardCFunction, name, _for_function)


def _bracket(owner: Any, name: str, bracket: Callable[[_F], _F]) -> None:
    original = getattr(owner, name, None)
    if original is not None and not hasattr(original, "__revhooks__"):
        bracketed: Any = functools.wraps(original)(bracket(original))
        bracketed.__revhooks__ = True
        setattr(owner, name, bracketed)


def _for_transform(original: Any) -> Any:
    is_compiling = torch.compiler.is_compiling

    def bracketed(*args: Any, **kwargs: Any) -> Any:
        if is_compiling() or not _is_ours(_top()):
            return original(*args, **kwargs)
        with _aside(_is_ours):
            return original(*args, **kwargs)

    return bracketed


@contextlib.contextmanager
def _aside(are_taken: Callable[[Any], bool]) -> Iterator[list[Any]]:
    taken: list[Any] = []
    try:
        while are_taken(hooks := _top()):
            taken.append(hooks)
            _autograd._pop_saved_tensors_default_hooks()
        yield taken
    finally:
        for pack, unpack in reversed(taken):
            _autograd._push_saved_tensors_default_hooks(pack, unpack)


def _top() -> Any:
    return _autograd._top_saved_tensors_default_hooks(True)


def _is_ours(hooks: Any) -> bool:
    return hooks is not None and str(getattr(hooks[0], "__module__", "")).startswith(_PACKAGE)


# --------------------------------------------------------------------------------------- backward

_lent: dict[int, list[Any]] = {}  # by the number of a pass: hooks that were there when it began


def _for_backward(original: Any) -> Any:
    is_compiling = torch.compiler.is_compiling

    def bracketed(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_a_runs(_top()) or len(args) < 3 or args[2] or is_compiling() or _is_compiled():  # the third: create_graph
            return original(outputs, *args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            nodes: set[Any] = {output.grad_fn if isinstance(output, torch.Tensor) else output.node for output in outputs}
        if None in nodes or len(nodes) > _FEW:
            return original(outputs, *args, **kwargs)
        begun: list[int] = []
        with _aside(_is_a_runs) as taken:

            def begin(_: Any) -> None:  # the number of a pass is not known before one of its roots is run
                if not begun:
                    begun.append(current_pass())
                    _lent[begun[0]] = taken

            marks = [node.register_prehook(begin) for node in nodes]
            try:
                return original(outputs, *args, **kwargs)
            finally:
                for mark in marks:
                    mark.remove()
                for task in begun:
                    del _lent[task]

    return bracketed


def _for_function(original: Any) -> Any:
    def bracketed(self: Any, *args: Any) -> Any:
        lent = _lent.get(current_pass()) if _lent else None
        if lent is None or _top() is not None:
            return original(self, *args)
        for pack, unpack in reversed(lent):
            _autograd._push_saved_tensors_default_hooks(pack, unpack)
        try:
            return original(self, *args)
        finally:
            for _ in lent:
                _autograd._pop_saved_tensors_default_hooks()

    return bracketed


def _is_a_runs(hooks: Any) -> bool:
    """Whether hooks are a run's; those of a frame tell a thread of the engine where it is (`revhooks.runtime.handles.local`)."""
    return _is_ours(hooks) and not getattr(getattr(hooks[0], "__self__", None), "inside", True)


def _is_compiled() -> bool:
    """Whether passes are recorded to be compiled, marks and all."""
    module: Any = sys.modules.get("torch._dynamo.compiled_autograd")
    flags = "compiled_autograd_enabled", "in_compiled_autograd_region"
    return module is not None and any(getattr(module, flag, False) for flag in flags)
