"""Running code again leaves nothing behind: what it appends to the user's objects is taken out again (Rule 7).

A list of auxiliary losses, a cache, a counter: whatever a call can reach from its modules, its hooks, its functions and its
arguments is noted before the code is run again, and put back after it, in the objects that were there. What is put back is what
they hold, not what they are: everybody who has the list still has it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from types import FunctionType
from typing import Any, Protocol

from torch import Tensor, nn

from .errors import ReplayError, explain
from .kinds import is_allocated, same_values
from .names import Names, named_by, named_by_class
from .owned import STANDARD, is_foreign, is_sharded, own_attributes
from .reach import PLAIN, Aspect, aspects_of, is_library, is_same, put_own
from .storage import is_opaque, version_of

__all__ = ["Effects", "undone"]

_MOST = 4000  # things that are looked at, for a call that is to cost microseconds
_PARTS = 16 * _MOST  # that are looked at, plain numbers among them
_LARGE = 1 << 26  # bytes of a tensor that is copied before it is known whether calls write to it


class Effects:
    """What the objects that a call may reach hold before it.

    Args:
        modules: those that it calls.
        others: functions and arguments.
        largest: of tensors, which it may write to, those of so many bytes are copied; others are only watched.

    Attributes:
        wrote: after `undo`: whether it has written to a tensor.
    """

    __slots__ = ("_largest", "_modules", "_names", "_noted", "_seen", "_tensors", "_things", "wrote")

    def __init__(self, modules: Sequence[nn.Module], others: Sequence[Any] = (), *, largest: float) -> None:
        self._largest = largest
        self.wrote = False
        self._modules: list[tuple[nn.Module, dict[str, Any]]] = []
        self._noted: list[tuple[Aspect, Any, list[Any]]] = []
        self._names: list[tuple[Names, list[Any]]] = []
        self._tensors: list[tuple[Tensor, int, Tensor | None]] = []
        self._seen = set(map(id, modules))
        self._things: list[Any] = list(others)
        for kind in {type(module) for module in modules}:
            self._note_class(kind)
        for module in modules:
            self._note_module(module)
        self._walk()
        self._things = []

    def _note_module(self, module: nn.Module) -> None:
        if is_foreign(type(module)):
            return
        before = module.__dict__.copy()
        self._modules.append((module, before))
        if is_sharded(module):
            self._things += own_attributes(module).values()
        else:
            self._things += [value for name in before.keys() - STANDARD if type(value := before[name]) not in PLAIN]
        for hooks in (before.get("_forward_hooks"), before.get("_forward_pre_hooks")):
            if hooks:
                self._things += hooks.values()
        if "forward" in before:
            self._things.append(before["forward"])

    def _walk(self) -> None:
        things, seen = self._things, self._seen
        for thing in things:  # which grows
            kind = type(thing)
            if kind in PLAIN or id(thing) in seen:
                continue
            if len(seen) > _MOST:
                return
            if isinstance(thing, type):
                self._note_class(thing)
                continue
            seen.add(id(thing))
            if kind is tuple:
                things += thing
            elif kind is FunctionType:
                self._note_function(thing)
            elif isinstance(thing, Tensor):
                self._note_tensor(thing)
            else:
                self._note(thing, kind)

    def _note(self, thing: Any, kind: type) -> None:
        aspects = aspects_of(kind)
        for aspect in aspects:
            before = aspect.look(thing)
            self._noted.append((aspect, thing, before))
            if len(before) <= _MOST and len(self._things) <= _PARTS:
                self._things += before if aspect.leads is None else aspect.leads(thing)
        if aspects and not is_library(kind.__module__):
            self._note_class(kind)

    def _note_function(self, function: FunctionType) -> None:
        if is_library(function.__module__):
            return
        self._things += function.__closure__ or ()
        self._things += function.__defaults__ or ()
        if function.__kwdefaults__:
            self._things += function.__kwdefaults__.values()
        if function.__dict__:
            self._things.append(function.__dict__)
        for names in named_by(function):
            self._note_names(names)

    def _note_class(self, kind: type) -> None:
        if id(kind) in self._seen or kind.__module__.startswith("torch.nn.modules."):
            return
        self._seen.add(id(kind))
        names, cells = named_by_class(kind)
        self._things += cells
        for one in names:
            self._note_names(one)

    def _note_names(self, names: Names) -> None:
        before = names.look()
        self._names.append((names, before))
        self._things += before

    def _note_tensor(self, tensor: Tensor) -> None:
        if isinstance(tensor, nn.Parameter) or is_foreign(type(tensor)):
            return
        copied = not tensor.requires_grad and not is_opaque(tensor) and tensor.nbytes <= self._largest
        copy = tensor.detach().clone() if copied and is_allocated(tensor) else None
        self._tensors.append((tensor, version_of(tensor), copy))

    def undo(self) -> str:
        """Put all back.

        Returns:
            What could not be put back, or ``""``.
        """
        lost = ""
        for module, attributes in self._modules:
            put_own(module, attributes)
        for aspect, thing, before in self._noted:
            now = aspect.look(thing)
            if not (aspect.same or is_same)(now, before):
                lost = aspect.put_back(thing, before) or lost
        for names, before in self._names:
            names.put_back(before)
        for tensor, copy in self._written():
            self.wrote = True
            if copy is not None:
                tensor.data.copy_(copy)
            else:
                lost = f"a tensor of shape {tuple(tensor.shape)} that was written to twice"
        return lost

    def _written(self) -> list[tuple[Tensor, Tensor | None]]:
        return [
            (tensor, copy)
            for tensor, version, copy in self._tensors
            if version_of(tensor) != version or (copy is not None and not same_values(tensor, copy))  # past its counter
        ]


class Finding(Protocol):
    """Whether something is there: it is looked for until the first calls have shown nothing."""

    @property
    def found(self) -> bool:
        """Whether it was there once."""
        ...

    @property
    def possible(self) -> bool:
        """Whether it was found, or is still looked for."""
        ...

    def note(self, found: bool) -> None:
        """What a look has shown."""
        ...


@contextlib.contextmanager
def undone(modules: Sequence[nn.Module], others: Sequence[Any] = (), writes: Finding | None = None) -> Iterator[None]:
    """Leave what these reach as it is, however the code inside ends.

    Args:
        modules: those that it calls.
        others: functions and arguments.
        writes: whether it writes to tensors, which are copied as long as it may; ``None``: it may.

    Raises:
        ReplayError: it has written to a tensor that cannot be put back.
    """
    largest = math.inf if writes is None or writes.found else _LARGE if writes.possible else -1
    effects = Effects(modules, others, largest=largest)
    try:
        yield
    except BaseException:
        effects.undo()
        raise
    lost = effects.undo()
    if writes is not None:
        writes.note(effects.wrote)
    if lost:
        raise ReplayError(
            explain(
                "code that is run again",
                expected="objects of modules, hooks and functions to be as the call has left them",
                got=lost,
                remedy="keep it in a buffer or a list, or exclude the block with keep=",
            )
        )
