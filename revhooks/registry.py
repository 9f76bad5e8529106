"""Which classes can be inverted, and how.

`register` brackets one method of a class, once and for good: outside ``reversible()`` the bracket costs
one thread-local look-up. The runtime puts itself into ``ACTIVE``; this file knows nothing of it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from .errors import RegistrationError, explain
from .tracing import hide

__all__ = ["ACTIVE", "Registration", "in_place_of", "invertible", "lookup", "register", "registered", "unregister"]

Inverse = str | Callable[..., Any]
_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, eq=False)
class Registration:
    """How to invert one method of a class.

    Attributes:
        cls: the class, or ``None`` for a method marked with `invertible`.
        inverse: a method's name, or ``f(module, output, *args, **kwargs)``.
        method: the method that training calls.
        cost: evaluations of the block that an inversion needs beyond the replay.
        log_det: the name of the method that gives the log-abs-det of the Jacobian, if any.
        keeps_zeros: the inputs, by position, that need not be held for their exact zeros; ``True``: all of them.
    """

    cls: type | None
    inverse: Inverse
    method: str = "forward"
    cost: float = 0
    log_det: str | None = None
    keeps_zeros: bool | tuple[int, ...] = False

    def keeps_zeros_in(self, position: int) -> bool:
        """Whether the input at ``position`` need not be held for its exact zeros."""
        return self.keeps_zeros if isinstance(self.keeps_zeros, bool) else position in self.keeps_zeros

    def resolve(self, module: nn.Module) -> Callable[..., Any]:
        """The inverse for ``module``, as ``f(output_or_outputs..., *held, **kwargs)``.

        A subclass that overrides the method and calls the registered one through ``super()`` has only the
        registered one bracketed, so it is the registered class's inverse that belongs to it.

        Raises:
            RegistrationError: the module has no such inverse.
        """
        if not isinstance(self.inverse, str):
            return functools.partial(self.inverse, module)
        bracketed = getattr(getattr(type(module), self.method, None), "__revhooks__", None) is self
        owner = type(module) if bracketed or self.cls is None else self.cls
        inverse = getattr(owner, self.inverse, None)
        if inverse is None:
            raise RegistrationError(
                explain(
                    type(module).__name__,
                    expected=f"an inverse named {self.inverse!r}",
                    got="no such method",
                    remedy="define it, or register the class with inverse=f(module, output, *args)",
                )
            )
        return functools.partial(inverse, module)


class Interceptor(Protocol):
    """What brackets a call while ``reversible()`` is active."""

    def call(
        self, entry: Registration, original: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call ``original(module, *args, **kwargs)`` inside a frame."""


class _Active(threading.local):
    run: Interceptor | None = None


ACTIVE = _Active()
_REGISTRY: dict[type, Registration] = {}


def in_place_of(original: Callable[..., Any], method: Callable[..., Any]) -> Callable[..., Any]:
    """``method``, which names no global, as a function of the original's module and name.

    `torch.jit.script` takes the source of the original, and looks its names up in the globals of what it was given. Dynamo
    steps over its frame, and judges by file and name what it may trace into: for both it is the original.
    """
    if isinstance(original, FunctionType) and isinstance(method, FunctionType):
        place = original.__code__
        code = method.__code__.replace(
            co_filename=place.co_filename,
            co_name=place.co_name,
            co_firstlineno=place.co_firstlineno,
            co_qualname=place.co_qualname,
        )
        method = FunctionType(code, original.__globals__, original.__name__, None, method.__closure__)
        hide(method)
    method = functools.update_wrapper(method, original)
    method.__revhooks_bracket__ = True  # type: ignore[attr-defined]
    return method


def _bracket(original: Callable[..., Any], entry: Registration) -> Callable[..., Any]:
    active, is_compiling = ACTIVE, torch.compiler.is_compiling

    def bracketed(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if is_compiling() or (run := active.run) is None:  # in this order: dynamo is to look at no run
            return original(self, *args, **kwargs)
        return run.call(entry, original, self, args, kwargs)

    method = in_place_of(original, bracketed)
    method.__revhooks__ = entry  # type: ignore[attr-defined]
    return method


def register(
    cls: type,
    *,
    inverse: Inverse,
    method: str = "forward",
    cost: float = 0,
    log_det: str | None = None,
    keeps_zeros: bool | tuple[int, ...] = False,
) -> None:
    """Tell ``reversible()`` that calls of ``cls.method`` can be inverted.

    Args:
        cls: a subclass of `torch.nn.Module`; its subclasses are covered as far as they inherit or call the method.
        inverse: the name of a method, called with the outputs and then the held arguments, or
            ``f(module, output, *args, **kwargs)``. It returns one tensor (the first positional input)
            or a tuple (the first ``len(tuple)`` inputs); every other argument is held.
        method: the method that training calls (``"inverse"`` for some flow libraries).
        cost: evaluations of the block that an inversion needs beyond the replay: 0 for a coupling, about 10
            for a fixed point, D for an autoregressive map.
        log_det: the name of the method that gives the log-abs-det of the Jacobian, shape ``(B,)``.
        keeps_zeros: an inversion turns an exact zero into 1e-17, so an input that has some is held. ``True`` where the
            inverse is exact to the bit, or the positions of inputs that the block only adds: these are not held.

    Raises:
        RegistrationError: ``cls`` is no module class, is registered already, or lacks the method or the inverse.

    Example:
        >>> class Shift(nn.Module):
        ...     def forward(self, x): return x + 1
        ...     def inverse(self, y): return y - 1
        >>> register(Shift, inverse="inverse")
        >>> registered(Shift).inverse
        'inverse'
        >>> unregister(Shift)
    """
    subject = getattr(cls, "__name__", repr(cls))
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise _refuse(subject, "a subclass of torch.nn.Module", f"{cls!r}", "pass the class, not an instance")
    if cls in _REGISTRY:
        raise _refuse(subject, "a class not yet registered", "a second registration", "unregister(cls) first")
    original = getattr(cls, method, None)
    if not callable(original):
        raise _refuse(subject, f"a method {method!r}", "none", "name the method that training calls with method=")
    if not callable(inverse) and not isinstance(inverse, str):
        raise _refuse(subject, "inverse= a method's name or a function", f"{inverse!r}", "see help(register)")
    if isinstance(inverse, str) and not callable(getattr(cls, inverse, None)):
        raise _refuse(subject, f"a method {inverse!r}", "none", "name its inverse, or pass inverse=f(module, output, *args)")
    if log_det is not None and not callable(getattr(cls, log_det, None)):
        raise _refuse(subject, f"a method {log_det!r}", "none", "name the method that gives the log-abs-det")
    if not cost >= 0:
        raise _refuse(subject, "cost >= 0", f"{cost!r}", "count the extra evaluations that an inversion needs")
    entry = Registration(cls, inverse, method, cost, log_det, keeps_zeros)
    _REGISTRY[cls] = entry
    setattr(cls, method, _bracket(original, entry))


def _refuse(subject: str, expected: str, got: str, remedy: str) -> RegistrationError:
    return RegistrationError(explain(subject, expected=expected, got=got, remedy=remedy))


def unregister(cls: type) -> None:
    """Undo `register`: the class's method is its own again.

    Raises:
        RegistrationError: ``cls`` itself is not registered.
    """
    entry = _REGISTRY.pop(cls, None)
    if entry is None:
        name = getattr(cls, "__name__", repr(cls))
        raise _refuse(name, "a registered class", "one that is not", "unregister the class that was registered")
    original = cls.__dict__[entry.method].__wrapped__
    delattr(cls, entry.method)
    if getattr(cls, entry.method, None) is not original:  # it was the class's own, not inherited
        setattr(cls, entry.method, original)


def lookup(cls: type) -> Registration | None:
    """The registration of ``cls`` or of the nearest class it inherits from, else ``None``."""
    return next((_REGISTRY[base] for base in cls.__mro__ if base in _REGISTRY), None)


def registered(cls: type | None = None) -> Registration | dict[type, Registration] | None:
    """The registration that covers ``cls``; without an argument, all of them by class."""
    return dict(_REGISTRY) if cls is None else lookup(cls)


def invertible(*, inverse: Inverse = "inverse", cost: float = 0, log_det: str | None = None) -> Callable[[_F], _F]:
    """Decorate a forward method whose class has an inverse.

    Args:
        inverse: as in `register`.
        cost: as in `register`.
        log_det: as in `register`.

    Raises:
        RegistrationError: what is decorated is not a function.

    Example:
        >>> class Double(nn.Module):
        ...     @invertible(inverse="inverse")
        ...     def forward(self, x): return 2 * x
        ...     def inverse(self, y): return y / 2
        >>> Double()(torch.ones(2))
        tensor([2., 2.])
    """

    def decorate(method: _F) -> _F:
        if isinstance(method, type) or not callable(method):
            raise _refuse(repr(method), "a forward method", type(method).__name__, "decorate the method, or use register(cls)")
        return _bracket(method, Registration(None, inverse, method.__name__, cost, log_det))  # type: ignore[return-value]

    if callable(inverse) and not isinstance(inverse, str) and getattr(inverse, "__name__", "") == "forward":
        raise _refuse("invertible", "@invertible(inverse=...)", "@invertible", "write the parentheses")
    return decorate
