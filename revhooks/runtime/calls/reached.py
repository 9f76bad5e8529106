"""What a function, or a method of an object that is no module, may call and read."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Sequence
from itertools import islice
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...buffers import modules_of
from ...storage import version_of
from ..tree import leaves_of

__all__ = ["Lent", "Reads", "reached"]

_MOST = 200  # things to look at, for a call that is to cost microseconds


def reached(fn: Any, args: Any) -> tuple[list[nn.Module], list[Tensor]]:
    """The modules and tensors in a function's closure, globals, defaults and arguments, and in the objects there.

    Of a method's object, functions in its attributes are looked into, too.
    """
    found: dict[nn.Module, None] = {}
    tensors: list[Tensor] = []
    seen: set[int] = set()
    stack = [(fn, True), (args, False)]  # whether functions are looked into
    while stack and len(seen) < _MOST:
        thing, inside = stack.pop()
        if id(thing) in seen or isinstance(thing, (type, ModuleType, str, int, float)):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            tensors.append(thing)
        elif isinstance(thing, nn.Module):
            found[thing] = None
        elif isinstance(thing, (tuple, list)):
            stack += [(part, inside) for part in thing[:_MOST]]
        elif isinstance(thing, dict):
            stack += [(part, inside) for part in islice(thing.values(), _MOST)]
        elif isinstance(thing, functools.partial):
            stack += [(thing.func, inside), (thing.args, inside), (thing.keywords, inside)]
        elif inspect.ismethod(thing):
            own = getattr(thing.__self__, "__dict__", {}).values() if inside else ()
            stack += [(thing.__self__, inside), (thing.__func__, inside), *((part, True) for part in own if _is_code(part))]
        elif not inspect.isfunction(thing):
            stack += [(part, False) for part in getattr(thing, "__dict__", {}).values()]
        elif inside:
            stack += [(cell.cell_contents, True) for cell in thing.__closure__ or () if _is_filled(cell)]
            stack += [(thing.__globals__.get(name), False) for name in thing.__code__.co_names]
            stack.append((thing.__defaults__, True))
    return list(found), tensors


def _is_code(thing: Any) -> bool:
    return isinstance(thing, functools.partial) or inspect.isfunction(thing) or inspect.ismethod(thing)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


class Lent:
    """Parameters and tensors that a call may read, and must not be changed until it has been run again: if it does read them."""

    __slots__ = ("_tensors",)

    def __init__(self, roots: Sequence[nn.Module], tensors: Sequence[Tensor]) -> None:
        parameters = [p for module in modules_of(roots) for p in module._parameters.values() if p is not None]
        self._tensors = [(weakref.ref(tensor), version_of(tensor)) for tensor in (*parameters, *tensors)]

    def reads(self) -> Reads | None:
        """What sees whether those that were changed since are read; ``None`` if none was."""
        found = [
            tensor
            for reference, version in self._tensors
            if (tensor := reference()) is not None and version_of(tensor) != version
        ]
        return Reads(found) if found else None


class Reads(TorchFunctionMode):
    """Sees which of some tensors are used."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self._watched = {id(tensor): tensor for tensor in tensors}
        self.ids: set[int] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.ids.update(id(leaf) for leaf in leaves_of((args, kwargs)) if id(leaf) in self._watched)
        return func(*args, **kwargs)
