"""Objects among the arguments of a call that it changes, as it does a key/value cache, and what they were before.

So are the attributes of its modules.

A replay needs them as they were: a cache to which the keys of a layer are appended must not have them yet. So it gets
copies of what was changed and of what leads there; nothing else is copied, and the objects themselves stay as they are.
"""

from __future__ import annotations

import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence, Set
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ...kinds import leaf_of
from ...owned import is_foreign, own_attributes
from ...reach import PLAIN
from ..tree import LEAVES

__all__ = ["Former", "Objects", "Own", "Seen"]

_DICTS = (dict, OrderedDict, defaultdict, Counter)
_LISTS = (list, tuple, set, deque)
_WHOLE = (Tensor, nn.Module, Enum, type, ModuleType, FunctionType, BuiltinFunctionType, MethodType)
_MOST = 4000  # things that are looked at


class Objects:
    """What the objects among the arguments of a call hold, recorded before the call.

    Args:
        roots: the arguments.
        deep: look into what they hold, too.
    """

    __slots__ = ("_nodes", "_roots")

    def __init__(self, roots: Sequence[Any], *, deep: bool = True) -> None:
        self._roots = roots
        self._nodes: dict[int, tuple[Any, _Contents]] = {}
        things = list(roots)
        for thing in things:  # which grows
            if len(things) > _MOST:
                self._nodes = {}
                return
            if id(thing) not in self._nodes and (contents := _contents(thing)) is not None:
                self._nodes[id(thing)] = thing, contents
                if deep:
                    things += _parts(contents)

    @classmethod
    def among(cls, arguments: Sequence[Any]) -> Objects | None:
        """The objects among the arguments, if there are any."""
        if LEAVES.issuperset(map(type, arguments)):
            return None
        objects = cls(arguments)
        return objects if objects._nodes else None

    def tensors(self) -> list[Tensor]:
        """The tensors in them."""
        return [part for _, contents in self._nodes.values() for part in _parts(contents) if isinstance(part, Tensor)]

    def changed(self, written: Set[int] = frozenset()) -> set[int]:
        """The ids of those that do not hold what they held.

        Args:
            written: ids of tensors that the call has written to; what holds one does not hold what it held.
        """
        return {
            key
            for key, (thing, contents) in self._nodes.items()
            if (written and any(id(part) in written for part in _parts(contents))) or not _is_same(_contents(thing), contents)
        }

    def narrow(self, changed: Set[int], written: Set[int]) -> set[int]:
        """Of modules' attributes leave those that were changed, and are data or lead to a tensor; what is left of ``changed``."""

        def before(thing: Any) -> _Contents | None:
            node = self._nodes.get(id(thing))
            return None if node is None else node[1]

        owns = {key: (own, contents) for key, (own, contents) in self._nodes.items() if type(own) is Own}
        moving = self._leading(changed - owns.keys()) | written
        kept: set[int] = set()
        replaced: list[Any] = []
        for key, (own, contents) in owns.items():
            was, now = dict(contents), own.now()
            own.names = {
                name
                for name in was.keys() | now.keys()
                if (was.get(name) is not now.get(name) or id(was.get(name)) in moving)
                and (_is_data(was.get(name), before) or any(map(_is_tensor, _all_in(now.get(name), _contents))))
            }
            left = {name: value for name, value in was.items() if name in own.names}
            self._nodes[key] = own, left
            if own.names:
                kept.add(key)
            replaced += [value for name, value in left.items() if now.get(name) is not value]
        return kept | self._reached(replaced) | (changed & self._reached([own for own, _ in owns.values()]))

    def _reached(self, things: list[Any]) -> set[int]:
        """The ids of what was recorded among these, and in them."""
        seen: set[int] = set()
        for thing in things:  # which grows
            if id(thing) in self._nodes and id(thing) not in seen:
                seen.add(id(thing))
                things += _parts(self._nodes[id(thing)][1])
        return seen

    def _leading(self, keys: Set[int]) -> set[int]:
        """These, and what leads to them."""
        found, grown = set(keys), True
        while grown:
            leading = {key for key, (_, contents) in self._nodes.items() if any(id(part) in found for part in _parts(contents))}
            grown = not leading <= found
            found |= leading
        return found

    def formers(self, hold: Callable[[Tensor], Any], changed: set[int]) -> dict[int, Former]:
        """What a replay gets for an argument, by the argument's id: what leads to nothing that was changed is not there.

        Tensors in what the call changed are held. Of other tensors it is not known whether the call has read them: a replay
        gets them if they are still there.

        Args:
            hold: gives something that stands for the tensor, the same for the same one.
            changed: ids of what was changed.
        """
        for key in list(changed):  # what is in a tuple goes with it
            changed |= self._reached([part for part in _parts(self._nodes[key][1]) if type(part) is tuple])
        classes = {type(self._nodes[key][0]) for key in changed} - {Own}  # what is of the same kind may change later
        copied = self._leading(changed | {key for key, (thing, _) in self._nodes.items() if type(thing) in classes})
        seen: dict[int, Seen] = {}

        def freeze(part: Any, *, held: bool) -> Any:
            if id(part) in copied:
                return _Link(id(part))
            if isinstance(part, Tensor):
                return hold(part) if held else seen.setdefault(id(part), Seen(part))
            return part

        frozen: dict[int, tuple[type, _Contents]] = {}
        for key in copied:
            thing, contents = self._nodes[key]
            kind, held = dict if type(thing) is Own else type(thing), key in changed
            if isinstance(contents, dict):
                for name, part in contents.items():
                    contents[name] = freeze(part, held=held)
                frozen[key] = kind, contents
            else:
                frozen[key] = kind, [freeze(part, held=held) for part in contents]
        return {id(root): Former(frozen, id(root)) for root in self._roots if id(root) in frozen}


class Own:
    """The own attributes of a module, or of an object whose method is called, which a call may change as it may an argument.

    Attributes:
        module: whose they are.
        names: of those that count; ``None``: of all.
    """

    __slots__ = ("module", "names")

    def __init__(self, module: Any) -> None:
        self.module = module
        self.names: Set[str] | None = None

    def now(self) -> dict[str, Any]:
        """What they are now."""
        own, names = own_attributes(self.module), self.names
        return own if names is None else {name: value for name, value in own.items() if name in names}


_Contents = dict[Any, Any] | list[Any]


def _contents(thing: Any) -> _Contents | None:
    """What a container or an object holds; ``None`` for what is taken as a whole."""
    kind = type(thing)
    if kind is Own:
        return thing.now()  # type: ignore[no-any-return]
    if kind in PLAIN or isinstance(thing, _WHOLE) or is_foreign(kind):
        return None
    if kind in _DICTS:
        return thing.copy()  # type: ignore[no-any-return]
    if kind in _LISTS:
        return list(thing)
    own = getattr(thing, "__dict__", None)
    if type(own) is not dict or kind.__new__ is not object.__new__:  # type: ignore[comparison-overlap]
        return None
    return own.copy()


def _all_in(thing: Any, contents_of: Callable[[Any], _Contents | None]) -> list[Any]:
    """What it leads to, itself included."""
    things, seen = [thing], set()
    for part in things:  # which grows
        if id(part) not in seen and len(things) <= _MOST:
            seen.add(id(part))
            things += _parts(contents_of(part) or [])
    return things


def _is_tensor(thing: Any) -> bool:
    return isinstance(thing, Tensor)


def _is_data(thing: Any, contents_of: Callable[[Any], _Contents | None]) -> bool:
    """Whether it leads to a tensor, or is made of numbers and texts: what a call may go on with."""
    things = _all_in(thing, contents_of)
    kinds = {*map(type, things)} - {type(None)}
    return any(map(_is_tensor, things)) or (bool(kinds) and kinds <= PLAIN | {*_DICTS, *_LISTS})


def _parts(contents: _Contents) -> Iterable[Any]:
    return contents.values() if isinstance(contents, dict) else contents


def _is_same(now: _Contents | None, before: _Contents) -> bool:
    if now is None or len(now) != len(before) or (isinstance(now, dict) and list(now) != list(before)):
        return False
    return all(a is b or _is_equal(a, b) for a, b in zip(_parts(now), _parts(before), strict=True))


def _is_equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and type(a) in PLAIN and bool(a == b)


class _Link:
    """In the place of something that is copied too."""

    __slots__ = ("key",)

    def __init__(self, key: int) -> None:
        self.key = key


class Seen:
    """A tensor in an object, that the call may not have read: it is not held."""

    __slots__ = ("_looks", "_tensor", "_version")

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = weakref.ref(tensor)
        self._version = None if tensor.is_inference() else tensor._version
        shape = torch.Size() if tensor.is_nested and tensor.layout is torch.strided else tensor.shape
        self._looks = shape, tensor.dtype, tensor.requires_grad

    def again(self, label: str) -> Tensor:
        """The tensor; if it is gone or was changed one without data, so that whatever reads it is found out."""
        tensor = self._tensor()
        shape, dtype, requires_grad = self._looks
        if tensor is None or (self._version is not None and tensor._version != self._version):
            return torch.empty(shape, dtype=dtype, device="meta", requires_grad=requires_grad)
        return leaf_of(tensor, requires_grad=requires_grad) if requires_grad or tensor.requires_grad else tensor


class Former:
    """An argument as it was before the call that changed it."""

    __slots__ = ("_frozen", "_root")

    def __init__(self, frozen: dict[int, tuple[type, _Contents]], root: int) -> None:
        self._frozen = frozen
        self._root = root

    def again(self, thaw: Callable[[Any], Any], copies: dict[int, Any]) -> Any:
        """A copy of it.

        Args:
            thaw: gives a thing for what stands for it.
            copies: those of the same call, which may have parts in common.
        """
        return self._copy(self._root, thaw, copies)

    def parts(self) -> list[Any]:
        """What stands for the things in it, and in all that the call changed."""
        return [part for _, contents in self._frozen.values() for part in _parts(contents)]

    def _copy(self, key: int, thaw: Callable[[Any], Any], copies: dict[int, Any]) -> Any:
        if key in copies:
            return copies[key]
        kind, contents = self._frozen[key]

        def part_again(part: Any) -> Any:
            return self._copy(part.key, thaw, copies) if isinstance(part, _Link) else thaw(part)

        if isinstance(contents, dict):
            copy: Any = contents.copy() if kind in _DICTS else object.__new__(kind)
            copies[key] = copy  # before its parts, which may lead back
            target = copy if kind in _DICTS else vars(copy)
            for name, part in contents.items():
                target[name] = part_again(part)
            return copy
        if kind in (list, deque):
            copy = copies[key] = kind()
            copy.extend(map(part_again, contents))
            return copy
        copies[key] = kind(map(part_again, contents))
        return copies[key]
