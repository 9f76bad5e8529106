"""What is done while a model is recorded to be run later: by `torch.compile`, `torch.export` or `torch.jit.trace`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["apply", "is_recorded", "is_traced", "untraced"]


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
