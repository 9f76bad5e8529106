"""Which classes can be inverted, and how.

`register` brackets one method of a class, once and for good: outside ``reversible()`` the bracket costs
one thread-local look-up. The runtime puts itself into ``ACTIVE``; this file knows nothing of it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from .errors import RegistrationError, explain
from .tracing import hide

__all__ = [
    "ACTIVE",
    "LARGE",
    "Branches",
    "Inverse",
    "LogDet",
    "Registration",
    "Volume",
    "add",
    "counted",
    "entries_of",
    "entry_of",
    "in_place_of",
    "invertible",
    "lookup",
    "register",
    "registered",
    "unregister",
]

LARGE = 2**16  # bytes: what a call of a few operations is given, to be worth a frame's half millisecond
Inverse = str | Callable[..., Any]
LogDet = str | int | Callable[..., Any]
# the names of modules in a block, classes of them, or a function of the block that gives them
Branches = str | type | tuple[str | type, ...] | list[str | type] | Callable[[nn.Module], Iterable[nn.Module]]
_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, eq=False)
class Registration:
    """How to rebuild what one method of a class saves.

    Attributes:
        cls: the class, or ``None`` for a method marked with `invertible`.
        inverse: a method's name, or ``f(module, output, *args, **kwargs)``; ``None``: it is replayed.
        method: the method that training calls.
        cost: evaluations of the block that an inversion needs beyond the replay.
        log_det: what gives the log-abs-det of the Jacobian, if anything does.
        keeps_zeros: the inputs, by position, that need not be held for their exact zeros; ``True``: all of them.
        branches: which modules in the block are its branches; ``None``: what forward and the inverse both call.
        prefer: ``"invert"`` or ``"replay"``; ``None``: what takes less; an adapter's ``"leave"``: it has no frame of its own.
        adapter: which of the package's adapters it is from, or ``""``.
        instead: what an adapter runs in place of the method, ``f(module, *args, **kwargs)``.
        least: bytes of its arguments below which a call is left as it is, as it saves less than a frame is worth.
        inputs: how many leading arguments the inverse gives back; ``None``: the first try shows it.
        assumed: nobody has said that this very class inverts: where it does not, that is no news.
    """

    cls: type | None
    inverse: Inverse | None
    method: str = "forward"
    cost: float = 0
    log_det: LogDet | None = None
    keeps_zeros: bool | tuple[int, ...] = False
    branches: Branches | None = None
    prefer: str | None = None
    adapter: str = ""
    instead: Callable[..., Any] | None = None
    least: int = 0
    inputs: int | None = None
    assumed: bool = False

    @property
    def replayed(self) -> bool:
        """Whether its block is run again rather than inverted."""
        return self.inverse is None or self.prefer == "replay"

    def keeps_zeros_in(self, position: int) -> bool:
        """Whether the input at ``position`` need not be held for its exact zeros."""
        return self.keeps_zeros if isinstance(self.keeps_zeros, bool) else position in self.keeps_zeros

    def owner(self, module: object) -> type:
        """The class whose methods belong to the one that is registered: the module's own, if it has not overridden that."""
        method = getattr(type(module), self.method, None)
        bracketed = self in (getattr(method, "__revhooks__", None), getattr(method, "__revhooks_counted__", None))
        return type(module) if bracketed or self.cls is None else self.cls

    def resolve(self, module: nn.Module) -> Callable[..., Any]:
        """The inverse for ``module``, as ``f(output_or_outputs..., *held, **kwargs)``.

        A subclass that overrides the method and calls the registered one through ``super()`` has only the
        registered one bracketed, so it is the registered class's inverse that belongs to it.

        Raises:
            RegistrationError: the module has no such inverse.
        """
        if not isinstance(self.inverse, str):
            if self.inverse is None:
                raise RegistrationError(
                    explain(
                        type(module).__name__,
                        expected="a block with an inverse",
                        got="one that is registered to be replayed",
                        remedy="register it with inverse=, if it has one",
                    )
                )
            return functools.partial(self.inverse, module)
        inverse = getattr(self.owner(module), self.inverse, None)
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


class Volume(Protocol):
    """What counts log-dets while a `revhooks.log_det` is open."""

    def around(self, run: Interceptor | None) -> Interceptor:
        """What brackets a call while both are active."""

    def count(
        self, entry: Registration, call: Callable[..., Any], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Make a call whose log-det is counted."""

    def muted(self) -> Volume:
        """One that computes the same and keeps nothing, for a replay."""


class _Active(threading.local):
    """What is active in this thread.

    Attributes:
        run: that of the innermost ``reversible()``.
        volume: what counts log-dets; ``None`` inside a block that is counted, and while something is rebuilt.
        top: what registered methods call: the volume around the run. It follows from both.
    """

    run: Interceptor | None = None
    volume: Volume | None = None
    top: Interceptor | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name != "top":
            self.top = self.run if self.volume is None else self.volume.around(self.run)


ACTIVE = _Active()
_REGISTRY: dict[type, dict[str, Registration]] = {}  # class -> method -> how to invert it
_STOOD: dict[tuple[type, str], Registration] = {}  # what adapters had where somebody has registered another


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
    active, is_compiling, before = ACTIVE, torch.compiler.is_compiling, original
    if "__revhooks_counted__" in getattr(original, "__dict__", ()):  # one bracket looks for both
        original = original.__wrapped__  # type: ignore[attr-defined]

    def bracketed(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if is_compiling() or (top := active.top) is None:  # in this order: dynamo is to look at no run
            return original(self, *args, **kwargs)
        return top.call(entry, original, self, args, kwargs)

    placed = in_place_of(original, bracketed)
    placed.__revhooks__ = entry  # type: ignore[attr-defined]
    placed.__revhooks_before__ = before  # type: ignore[attr-defined]
    return placed


def counted(cls: type, method: str, *, log_det: LogDet | None = None) -> None:
    """Have `revhooks.log_det` count the calls of a method that is not registered, as ``reversible()`` leaves it as it is.

    Args:
        cls: a class that has the method.
        method: its name.
        log_det: as in `register`; ``None``: as flow layers of `revhooks.nn` say it.
    """
    original = getattr(cls, method)
    if hasattr(original, "__revhooks__"):
        return  # its bracket counts it
    entry = Registration(cls, None, method, log_det=log_det)
    active, is_compiling = ACTIVE, torch.compiler.is_compiling

    def bracketed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_compiling() or (volume := active.volume) is None:  # in this order, as above
            return original(self, *args, **kwargs)
        return volume.count(entry, original, self, args, kwargs)

    placed = in_place_of(original, bracketed)
    placed.__revhooks_counted__ = entry  # type: ignore[attr-defined]
    setattr(cls, method, placed)


def register(
    cls: type,
    *,
    inverse: Inverse | None,
    method: str = "forward",
    cost: float = 0,
    log_det: LogDet | None = None,
    keeps_zeros: bool | tuple[int, ...] = False,
    branches: Branches | None = None,
    prefer: str | None = None,
) -> None:
    """Tell ``reversible()`` that calls of ``cls.method`` can be inverted, or are to be run again.

    A block whose children (or those in its lists) are registered themselves is a container: its children are inverted one by
    one, and it is not, unless ``branches`` are named.

    Args:
        cls: a subclass of `torch.nn.Module`; its subclasses are covered as far as they inherit or call the method.
        inverse: the name of a method, called with the outputs and then the held arguments, or
            ``f(module, output, *args, **kwargs)``. It returns the first argument, or a tuple or list of the first ones; an
            argument may be a list or dict of tensors. Every other argument is held. A method may do without the last
            outputs, or take all of them as one tuple; what comes behind the inputs, as a log-det, does not count. ``None``:
            the block has none that holds in floating point, and is replayed from its inputs.
        method: the method that training calls (``"inverse"`` for some flow libraries). Each method of a class has a
            registration of its own: both directions may be trained.
        cost: evaluations of the block that an inversion needs beyond the replay: 0 for a coupling, about 10
            for a fixed point, D for an autoregressive map. A replay needs the inputs, which an inversion frees. So where
            they are small the block is replayed from them: where they take no more than a sixteenth of what it saves, and no
            more than ``cost / 160`` of it.
        log_det: what gives the log-abs-det of the Jacobian, shape ``(B,)`` or a scalar: the name of a method that is called with
            the arguments of the call, the position of an output (``1`` of ``(y, log_det)``), or ``f(module, output, *args,
            **kwargs)``. `revhooks.log_det` sums them up, by a method ``call_and_ladj`` instead of a method or function where the
            class has one, for that takes one evaluation; `check` compares it with that of
            `torch.autograd.functional.jacobian`. An estimate is none.
        keeps_zeros: an inversion turns an exact zero into 1e-17, so an input that has some is held. ``True`` where the
            inverse is exact to the bit, or the positions of inputs that the block only adds: these are not held.
        branches: the modules in the block whose calls an inverse repeats, so that they are evaluated once in backward: their
            names (``"net"``, ``("f", "inner.g")``), classes, or a function of the block that gives them. Without it: the
            children that forward and the inverse both call, or the modules below them, where one of both calls these alone.
        prefer: ``"invert"``, or ``"replay"``: the block is run again from its inputs, and inverted only where a budget that was
            given would be exceeded by them. ``None``: what takes less, by ``cost`` and by how small the inputs are: of a
            block that saves 64 times as much as it is given, a chain of 64 inputs is no more than what one of them saves.

    Raises:
        RegistrationError: ``cls`` is no module class, its method is registered already, it lacks the method or the inverse, or
            an argument is none of the above.

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
    if not callable(getattr(cls, method, None)):
        raise _refuse(subject, f"a method {method!r}", "none", "name the method that training calls with method=")
    _check_options(subject, inverse, cost, log_det, branches, prefer)
    if isinstance(inverse, str) and not callable(getattr(cls, inverse, None)):
        raise _refuse(subject, f"a method {inverse!r}", "none", "name its inverse, or pass inverse=f(module, output, *args)")
    if isinstance(log_det, str) and not callable(getattr(cls, log_det, None)):
        raise _refuse(subject, f"a method {log_det!r}", "none", "name the method that gives the log-abs-det")
    add(Registration(cls, inverse, method, cost, log_det, keeps_zeros, branches, prefer))


def _check_options(subject: str, inverse: object, cost: float, log_det: object, branches: object, prefer: str | None) -> None:
    if prefer not in (None, "invert", "replay"):
        raise _refuse(subject, 'prefer= "invert", "replay" or None', f"{prefer!r}", "see help(register)")
    if inverse is None and prefer == "invert":
        raise _refuse(subject, "an inverse, as it is preferred", "None", "name it, or leave prefer= away")
    if inverse is not None and not callable(inverse) and not isinstance(inverse, str):
        raise _refuse(subject, "inverse= a method's name or a function", f"{inverse!r}", "see help(register)")
    if log_det is not None and not callable(log_det) and (isinstance(log_det, bool) or not isinstance(log_det, (str, int))):
        raise _refuse(subject, "log_det= a method's name, a position or a function", f"{log_det!r}", "see help(register)")
    if not cost >= 0:
        raise _refuse(subject, "cost >= 0", f"{cost!r}", "count the extra evaluations that an inversion needs")
    if not (branches is None or isinstance(branches, (str, type, tuple, list)) or callable(branches)):
        raise _refuse(subject, "branches= names, classes or a function of the block", f"{branches!r}", "see help(register)")


def add(entry: Registration) -> None:
    """Bracket a method of a class; what a user registers takes the place of what an adapter has.

    Raises:
        RegistrationError: it is registered already.
    """
    cls, method = entry.cls, entry.method
    if cls is None:
        raise _refuse("a registration", "a class", "None", "mark a single method with invertible")
    present = _REGISTRY.get(cls, {}).get(method)
    if present is not None and entry.adapter:
        if not present.adapter:
            _STOOD[cls, method] = entry  # until the user takes his back
        return
    if present is not None and not present.adapter:
        got = f"a second registration of its method {method!r}"
        raise _refuse(cls.__name__, "a method not yet registered", got, f"unregister(cls, method={method!r}) first")
    if present is not None:
        unregister(cls, method=method)
        _STOOD[cls, method] = present
    original = getattr(cls, method)
    _REGISTRY.setdefault(cls, {})[method] = entry
    setattr(cls, method, _bracket(original, entry))


def _refuse(subject: str, expected: str, got: str, remedy: str) -> RegistrationError:
    return RegistrationError(explain(subject, expected=expected, got=got, remedy=remedy))


def unregister(cls: type, *, method: str | None = None) -> None:
    """Undo `register`: the class's methods are its own again, or one of them, or what an adapter has made of them.

    Raises:
        RegistrationError: ``cls`` itself, or its method, is not registered.
    """
    entries = _REGISTRY.get(cls, {})
    if not entries or (method is not None and method not in entries):
        name = getattr(cls, "__name__", repr(cls))
        wanted = "class" if not entries else f"method, not {method!r}"
        raise _refuse(name, f"a registered {wanted}", "one that is not", "unregister what was registered")
    for name in list(entries) if method is None else [method]:
        del entries[name]
        _take_bracket_off(cls, name)
    if not entries:
        del _REGISTRY[cls]
    for name in [name for owner, name in _STOOD if owner is cls and name not in entries]:
        add(_STOOD.pop((cls, name)))


def _take_bracket_off(cls: type, method: str) -> None:
    original = cls.__dict__[method].__revhooks_before__
    delattr(cls, method)
    if getattr(cls, method, None) is not original:  # it was the class's own, not inherited
        setattr(cls, method, original)


def entries_of(cls: type) -> tuple[Registration, ...]:
    """The registrations that cover ``cls``, of each method that of the nearest class; ``forward``'s comes first."""
    entries: dict[str, Registration] = {}
    for base in cls.__mro__:
        for method, entry in _REGISTRY.get(base, {}).items():
            entries.setdefault(method, entry)
    return tuple(sorted(entries.values(), key=lambda entry: entry.method != "forward"))


def entry_of(cls: type, method: str) -> Registration | None:
    """The registration of a method of exactly this class."""
    return _REGISTRY.get(cls, {}).get(method)


def lookup(cls: type, method: str | None = None) -> Registration | None:
    """The registration of ``cls`` or of the nearest class it inherits from, else ``None``; of several ``forward``'s."""
    return next((entry for entry in entries_of(cls) if method in (None, entry.method)), None)


def registered(cls: type | None = None, *, method: str | None = None) -> Registration | dict[type, Registration] | None:
    """The registration that covers ``cls`` (of several that of ``method``, or ``forward``'s); without a class, all by class."""
    if cls is None:
        found = {base: lookup(base, method) for base in _REGISTRY}
        return {base: entry for base, entry in found.items() if entry is not None}
    return lookup(cls, method)


def invertible(
    *,
    inverse: Inverse | None = "inverse",
    cost: float = 0,
    log_det: LogDet | None = None,
    branches: Branches | None = None,
    prefer: str | None = None,
) -> Callable[[_F], _F]:
    """Decorate a forward method whose class has an inverse.

    Args:
        inverse: as in `register`.
        cost: as in `register`.
        log_det: as in `register`.
        branches: as in `register`.
        prefer: as in `register`.

    Raises:
        RegistrationError: what is decorated is not a function, or an argument is none that `register` takes.

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
        entry = Registration(None, inverse, method.__name__, cost, log_det, branches=branches, prefer=prefer)
        return _bracket(method, entry)  # type: ignore[return-value]

    if callable(inverse) and not isinstance(inverse, str) and getattr(inverse, "__name__", "") == "forward":
        raise _refuse("invertible", "@invertible(inverse=...)", "@invertible", "write the parentheses")
    _check_options("invertible", inverse, cost, log_det, branches, prefer)
    return decorate
