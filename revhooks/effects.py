"""Running code again leaves nothing behind: what it appends to the user's objects is taken out again (Rule 7).

A list of auxiliary losses, a cache, a counter: whatever a call can reach from its modules, its hooks, its functions and its
arguments is noted before the code is run again, and put back after it, in the objects that were there. What is put back is what
they hold, not what they are: everybody who has the list still has it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from operator import attrgetter, is_
from types import CellType, FunctionType
from typing import Any, Protocol

from torch import Tensor, nn

from .backward import NO_PASS, call_at_end, current_pass
from .errors import ReplayError, explain
from .kinds import is_allocated, same_values
from .names import Names, named_by, named_by_class
from .owned import STANDARD, is_foreign, is_sharded, own_attributes
from .reach import CELL, MISSING, PLAIN, Aspect, aspects_of, is_library, is_same, put_own
from .storage import is_opaque, version_of

__all__ = ["Effects", "undone"]

_MOST = 4000  # things that are looked at, for a call that is to cost microseconds
_PARTS = 16 * _MOST  # that are looked at, plain numbers among them
_COMMON = 8  # objects of a block that are walked one by one, for others may have them too
_LARGE = 1 << 26  # bytes of a tensor that is copied before it is known whether calls write to it


class _Reached:
    """What some things lead to, and what all of it holds."""

    __slots__ = (
        "_cells",
        "_contents",
        "_largest",
        "_names",
        "_noted",
        "_roots",
        "_spaces",
        "_tensors",
        "_things",
        "seen",
    )

    def __init__(self, things: list[Any], seen: set[int], largest: float) -> None:
        self.seen = seen
        self._largest = largest
        self._noted: list[tuple[Aspect, Any, list[Any]]] = []
        self._cells: list[CellType] = []  # that are not empty: most of what code leads to
        self._contents: list[Any] = []
        self._names: list[tuple[Names, list[Any]]] = []
        self._spaces: list[tuple[Callable[..., Any], tuple[str, ...], list[Any]]] = []  # the same, to be looked at at once
        self._tensors: list[tuple[Tensor, int, Tensor | None]] = []
        self._things = things
        self._roots = tuple(things)  # whose identities this is found by: they live as long
        self._walk(len(seen) + _MOST)
        self._things = []
        self._gather()

    def _walk(self, most: int) -> None:
        things, seen = self._things, self.seen
        for thing in things:  # which grows
            kind = type(thing)
            if kind in PLAIN or id(thing) in seen:
                continue
            if len(seen) > most:
                return
            if isinstance(thing, type):
                self._note_class(thing)
                continue
            seen.add(id(thing))
            if kind is tuple:
                things += thing
            elif kind is CellType:
                self._note_cell(thing)
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

    def _note_cell(self, cell: CellType) -> None:
        content = CELL.look(cell)
        if not content:
            self._noted.append((CELL, cell, content))
            return
        self._cells.append(cell)
        self._contents += content
        self._things += content

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
        if id(kind) in self.seen or kind.__module__.startswith("torch.nn.modules."):
            return
        self.seen.add(id(kind))
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

    def _gather(self) -> None:
        """Many functions use names of one file: they are looked at once."""
        spaces: dict[int, tuple[Any, dict[str, Any]]] = {}
        for names, before in self._names:
            spaces.setdefault(id(names.space), (names.space, {}))[1].update(zip(names.names, before, strict=True))
        for space, bound in spaces.values():
            look = (vars(space) if isinstance(space, type) else space).get
            self._spaces.append((look, tuple(bound), list(bound.values())))

    @property
    def may_be_shared(self) -> bool:
        """Whether nothing large is kept alive if this is kept for a while."""
        return not self._tensors

    def is_as_it_was(self) -> bool:
        """Whether all holds what it held; tensors aside."""
        try:
            if not all(map(is_, map(_content, self._cells), self._contents)):
                return False
        except ValueError:  # one is empty now
            return False
        for look, names, before in self._spaces:
            if not all(map(is_, map(look, names, _NOTHING), before)):
                return False
        return all((aspect.same or is_same)(aspect.look(thing), before) for aspect, thing, before in self._noted)

    def undo(self) -> tuple[str, bool]:
        """Put all back.

        Returns:
            What could not be put back, or ``""``, and whether a tensor was written to.
        """
        lost, written = "" if self.is_as_it_was() else self._put_back(), self._written()
        for tensor, copy in written:
            if copy is not None:
                tensor.data.copy_(copy)
            else:
                lost = f"a tensor of shape {tuple(tensor.shape)} that was written to twice"
        return lost, bool(written)

    def _put_back(self) -> str:
        lost = ""
        cells = [(CELL, cell, [content]) for cell, content in zip(self._cells, self._contents, strict=True)]
        for aspect, thing, before in (*self._noted, *cells):
            if not (aspect.same or is_same)(aspect.look(thing), before):
                lost = aspect.put_back(thing, before) or lost
        for names, before in self._names:
            names.put_back(before)
        return lost

    def _written(self) -> list[tuple[Tensor, Tensor | None]]:
        return [
            (tensor, copy)
            for tensor, version, copy in self._tensors
            if version_of(tensor) != version or (copy is not None and not same_values(tensor, copy))  # past its counter
        ]


_content: Any = attrgetter("cell_contents")
_NOTHING = repeat(MISSING)


class _Shared:
    """What classes and objects lead to that many blocks of a backward pass have in common; it is kept until the pass ends."""

    def __init__(self) -> None:
        self._task = NO_PASS
        self._found: dict[Any, _Reached] = {}

    def has(self, key: Any) -> bool:
        """Whether something was found in this pass."""
        return self._task == current_pass() and key in self._found

    def reached_from(self, things: Sequence[Any], key: Any, seen: set[int], largest: float) -> _Reached:
        """What these lead to, as it is now, besides what was ``seen``."""
        task = current_pass()
        if task != self._task:
            self._found = {}
            self._task = task if call_at_end(self._forget) else NO_PASS
        known = self._found.get(key)
        if known is not None and known.is_as_it_was():
            return known
        reached = _Reached([*things], {*seen}, largest)
        if self._task != NO_PASS and reached.may_be_shared:
            self._found[key] = reached
        return reached

    def _forget(self) -> None:
        self._task, self._found = NO_PASS, {}


_shared = _Shared()


class Effects:
    """What the objects that a call may reach hold before it.

    Args:
        modules: those that it calls.
        others: functions and arguments.
        largest: of tensors, which it may write to, those of so many bytes are copied; others are only watched.

    Attributes:
        wrote: after `undo`: whether it has written to a tensor.
    """

    __slots__ = ("_modules", "_parts", "wrote")

    def __init__(self, modules: Sequence[nn.Module], others: Sequence[Any] = (), *, largest: float) -> None:
        self.wrote = False
        self._modules: list[tuple[nn.Module, dict[str, Any]]] = []
        things: list[Any] = [*others]
        for module in modules:
            things += self._note_module(module)
        kinds = frozenset({type(module) for module in modules})
        first = not _shared.has(kinds)
        of_classes = _shared.reached_from([*kinds], kinds, set(), largest)
        # an object of a class of the user's, a configuration, may be that of many blocks: what the first has the others may
        objects = {id(thing): thing for thing in things if not is_library(type(thing).__module__)}
        common = dict([*objects.items()][:_COMMON]) if first else {k: v for k, v in objects.items() if _shared.has((kinds, k))}
        self._parts = [
            of_classes,
            *(_shared.reached_from([thing], (kinds, key), of_classes.seen, largest) for key, thing in common.items()),
        ]
        seen = set().union(map(id, modules), *(part.seen for part in self._parts))
        self._parts.append(_Reached([thing for thing in things if id(thing) not in common], seen, largest))

    def _note_module(self, module: nn.Module) -> Iterator[Any]:
        """Note what it holds; returns where that leads."""
        if is_foreign(type(module)):
            return
        before = module.__dict__.copy()
        self._modules.append((module, before))
        if is_sharded(module):
            yield from own_attributes(module).values()
        else:
            yield from [value for name, value in before.items() if type(value) not in PLAIN and name not in STANDARD]
        for hooks in (before.get("_forward_hooks"), before.get("_forward_pre_hooks")):
            if hooks:
                yield from hooks.values()
        if "forward" in before:
            yield before["forward"]

    def undo(self) -> str:
        """Put all back.

        Returns:
            What could not be put back, or ``""``.
        """
        lost = ""
        for module, attributes in self._modules:
            put_own(module, attributes)
        for part in self._parts:
            left, wrote = part.undo()
            lost, self.wrote = left or lost, self.wrote or wrote
        return lost


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
