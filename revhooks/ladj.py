"""How a call of a block gives its log-det beside its output."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import numbers
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .errors import RegistrationError, ShapeError, explain
from .functional import wide
from .nn.coupling import Coupling
from .nn.flow import Flow
from .registry import Interceptor, Registration
from .tracing import hide_all

__all__ = ["LAYERS", "Method", "checked", "pair_of", "refused", "way_of"]

Call = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class Method:
    """A method as a run calls it, if there is one."""

    __slots__ = ("_entry", "_original", "_run")

    def __init__(self, run: Interceptor | None, entry: Registration, original: Call) -> None:
        self._run = run
        self._entry = entry
        self._original = original

    def __call__(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        if self._run is None:
            return self._original(module, *args, **kwargs)
        return self._run.call(self._entry, self._original, module, args, kwargs)

    def beside(self, change: Call, module: Any, args: Args, kwargs: Kwargs) -> tuple[Any, Any]:
        """Call it, and ``change(module, output, args, kwargs)`` in the same frame, which rebuilds what both save."""
        entry, original, joined = self._entry, self._original, _Joined()
        if self._run is None or entry.instead is not None or not isinstance(module, nn.Module):
            output = self(module, *args, **kwargs)
            return output, change(module, output, args, kwargs)

        @functools.wraps(original)
        def both(module: Any, *args: Any, **kwargs: Any) -> Any:
            output = original(module, *args, **kwargs)
            return joined.join(output, change(module, output, args, kwargs))

        return joined.part(self._run.call(_Beside.of(entry), both, module, args, kwargs))


class _Joined:
    """Outputs with a log-det behind them, as Glow blocks return it: so an inverse is known to be called."""

    __slots__ = ("_spread",)

    def join(self, output: Any, change: Any) -> Any:
        self._spread = type(output) in (tuple, list)
        return type(output)((*output, change)) if self._spread else (output, change)

    def part(self, joined: Any) -> tuple[Any, Any]:
        return (joined[:-1] if self._spread else joined[0]), joined[-1]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Beside(Registration):
    """The registration of a call with its log-det behind the output."""

    resolves: Callable[[nn.Module], Call] = dataclasses.field(kw_only=True)  # as the block's does

    @classmethod
    def of(cls, entry: Registration) -> _Beside:
        """That of a block."""
        given = {field.name: getattr(entry, field.name) for field in dataclasses.fields(Registration)}
        return cls(**{**given, "method": f"{entry.method} with log_det", "resolves": entry.resolve})

    def resolve(self, module: nn.Module) -> Call:
        """The inverse of the block; a function gets the output as the block gave it."""
        inverse = self.resolves(module)
        if isinstance(self.inverse, str):
            return inverse

        def without(output: Any, *args: Any, **kwargs: Any) -> Any:
            output = type(output)(output[:-1]) if len(output) != 2 or isinstance(output, list) else output[0]
            return inverse(output, *args, **kwargs)

        return without


# -- what a block says


def way_of(entry: Registration, module: Any, label: Callable[[], str]) -> Call:
    """How a call gives its output and its log-det: ``f(call, module, args, kwargs)``."""
    said, owner = entry.log_det, entry.owner(module)
    if isinstance(said, int):
        return functools.partial(_by_position, said, label)
    pair = pair_of(entry.method, owner)
    if pair is not None:
        return lambda _, module, args, kwargs: pair(module, *args, **kwargs)
    if callable(said):
        return functools.partial(_by_function, said)
    if said is not None:
        return functools.partial(_by_method, getattr(owner, said))
    if isinstance(module, LAYERS) and entry.method in _BY_LOG_DET:
        if _is_of_another_forward(owner):
            remedy = "define log_det, or call_and_ladj, in the class that defines forward"
            raise refused(label(), "a log_det of its own", "that of a class whose forward it overrides", remedy)
        return functools.partial(_BY_LOG_DET[entry.method], owner.log_det)  # type: ignore[attr-defined]
    if not isinstance(module, nn.Module):
        remedy = "call it elsewhere: its log-det is a part of the log_prob of its distribution"
        raise refused(label(), "modules in log_det()", f"a transform that {entry.adapter or 'nothing'} calls", remedy)
    by = f" by the adapter of {entry.adapter}" if entry.adapter else ""
    raise refused(
        label(),
        "a block that knows its log-det",
        f"a call of {entry.method!r}, registered without one{by}",
        "register it with log_det= the name of a method, the position of an output, or a function; or call it elsewhere",
    )


def _is_of_another_forward(owner: type) -> bool:
    """Whether a layer overrides a forward, and inherits a ``log_det`` that was written for that."""
    place = _home(owner, "forward")
    above = (base for base in owner.__mro__[place + 1 :] if "forward" in vars(base) and base is not nn.Module)
    return _home(owner, "log_det") > place and any(True for _ in above)


def pair_of(method: str, owner: type) -> Call | None:
    """The method that gives output and log-det from one evaluation, unless it is that of a class above the method's."""
    name = "call_and_ladj" if method == "forward" else f"{method}_and_ladj"
    pair = getattr(owner, name, None)
    if not callable(pair) or inspect.unwrap(pair) in _GENERAL or _home(owner, name) > _home(owner, method):
        return None
    return pair  # type: ignore[no-any-return]


def _home(owner: type, name: str) -> int:
    """Where in the order of its bases a class has a method from."""
    found = inspect.unwrap(getattr(owner, name))
    return max(
        (i for i, base in enumerate(owner.__mro__) if name in vars(base) and inspect.unwrap(vars(base)[name]) is found), default=0
    )


def _by_position(place: int, label: Callable[[], str], call: Method, module: Any, args: Args, kwargs: Kwargs) -> tuple[Any, Any]:
    output = call(module, *args, **kwargs)
    if not isinstance(output, (tuple, list)) or not -len(output) <= place < len(output):
        got = f"{len(output)} outputs" if isinstance(output, (tuple, list)) else type(output).__name__
        raise refused(label(), f"its log-det as output {place}", got, "mend log_det= of its registration")
    return output, output[place]


def _by_function(said: Call, call: Method, module: Any, args: Args, kwargs: Kwargs) -> tuple[Any, Any]:
    return call.beside(lambda module, output, args, kwargs: said(module, output, *args, **kwargs), module, args, kwargs)


def _by_method(said: Call, call: Method, module: Any, args: Args, kwargs: Kwargs) -> tuple[Any, Any]:
    return call.beside(lambda module, _, args, kwargs: said(module, *args, **kwargs), module, args, kwargs)


def _by_forward(said: Call, call: Method, module: Any, args: Args, kwargs: Kwargs) -> tuple[Any, Any]:
    """Of an inverse: minus that of forward, at what it returns."""
    return call.beside(lambda module, x, args, kwargs: -said(module, x, *args[1:], **kwargs), module, args, kwargs)


_BY_LOG_DET = {"forward": _by_method, "inverse": _by_forward}
LAYERS = (Flow, Coupling)
_GENERAL = tuple(vars(Flow)[name] for name in ("call_and_ladj", "inverse_and_ladj") if name in vars(Flow))


def checked(change: Any, label: Callable[[], str]) -> Tensor | float:
    """What a block says of a call: a number for each sample, or one; in at least float32.

    Raises:
        RegistrationError: it says nothing.
        ShapeError: it says something else.
    """
    if isinstance(change, numbers.Real):
        return float(change)
    if change is None:
        raise refused(label(), "its log-det", "None", "call it so that it gives one, as blocks of FrEIA do with jac=True")
    if not isinstance(change, Tensor) or change.is_complex() or change.dim() > 1:
        got = f"shape {tuple(change.shape)} of {change.dtype}" if isinstance(change, Tensor) else type(change).__name__
        remedy = "mend what log_det= of its registration names"
        raise ShapeError(explain(f"log-det of {label()}", expected="real numbers (B,), or one", got=got, remedy=remedy))
    return change.to(wide(change.dtype))


def refused(subject: str, expected: str, got: str, remedy: str) -> RegistrationError:
    """The error of what cannot be counted."""
    return RegistrationError(explain(subject, expected=expected, got=got, remedy=remedy))


hide_all([sys.modules[__name__]])
