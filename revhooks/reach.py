"""What objects that user code may reach hold: how that is read, and how it is put back.

Looking must not do anything: no property is asked, and no method of a user's class is called.
"""

from __future__ import annotations

import functools
import sys
from array import array
from collections import OrderedDict, UserDict, UserList, deque
from collections.abc import Callable, Iterable
from enum import Enum
from operator import is_
from types import BuiltinMethodType, CellType, GeneratorType, MemberDescriptorType, MethodType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .owned import is_foreign, own_among, own_attributes

__all__ = ["CELL", "CONTAINERS", "MISSING", "PLAIN", "Aspect", "aspects_of", "is_library", "is_same", "is_same_name", "put_own"]

PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, slice, range})
CONTAINERS = (list, tuple, dict, set, deque)
MISSING: Any = object()
_LIBRARIES = sys.stdlib_module_names | {"torch", "numpy", "triton", __package__}
_LONG = 1 << 12
_LARGE = 1 << 20  # bytes of an array that are copied at every look


class Aspect(NamedTuple):
    """One way in which an object holds things.

    Attributes:
        look: what it holds now, as a list.
        put_back: have it hold what such a list says; returns what is wrong if that cannot be.
        leads: of what it holds, what may hold something in turn; ``None``: all.
        same: whether two such lists say the same; it is asked for now and before.
    """

    look: Callable[[Any], list[Any]]
    put_back: Callable[[Any, list[Any]], str | None]
    leads: Callable[[Any], Iterable[Any]] | None = None
    same: Callable[[list[Any], list[Any]], bool] | None = None


def is_same(now: list[Any], before: list[Any]) -> bool:
    """Whether two lists are of the same things."""
    return len(now) == len(before) and all(map(is_, now, before))


def is_library(module: str | None) -> bool:
    """Whether what is defined there belongs to Python, to torch or to this package: it keeps no record of the user's."""
    return module is not None and module.partition(".")[0] in _LIBRARIES


# -------------------------------------------------------------------------------------- containers


def _nothing(_thing: Any) -> list[Any]:
    return []


def _leave(_thing: Any, _before: list[Any]) -> None:
    pass


def _put_list(thing: Any, before: list[Any]) -> None:
    list.__setitem__(thing, slice(None), before)


def _put_queue(thing: Any, before: list[Any]) -> None:
    deque.clear(thing)
    deque.extend(thing, before)


def _put_set(thing: Any, before: list[Any]) -> None:
    set.clear(thing)
    set.update(thing, before)


def _put_items(kind: Any, thing: Any, before: list[Any]) -> None:
    half = len(before) // 2
    kind.clear(thing)
    for key, value in zip(before[:half], before[half:], strict=True):
        kind.__setitem__(thing, key, value)


def _is_same_list(now: list[Any], before: list[Any]) -> bool:
    """`is_same`; a long list is put back at once, which takes less time."""
    return len(before) < _LONG and is_same(now, before)


_LIST = Aspect(list.copy, _put_list, None, _is_same_list)
_TUPLE = Aspect(_nothing, _leave, tuple.__iter__)
_QUEUE = Aspect(lambda thing: list(deque.__iter__(thing)), _put_queue)
_SET = Aspect(lambda thing: list(set.__iter__(thing)), _put_set)
_DICT = Aspect(lambda thing: [*dict.keys(thing), *dict.values(thing)], functools.partial(_put_items, dict))
_ORDERED = Aspect(
    lambda thing: [*OrderedDict.keys(thing), *OrderedDict.values(thing)], functools.partial(_put_items, OrderedDict)
)


# ------------------------------------------------------------------------------- memory of numbers


def _put_buffer(thing: Any, before: list[Any]) -> None:
    thing[:] = array(thing.typecode, before[0]) if isinstance(thing, array) else before[0]


def _look_at_array(thing: Any) -> list[Any]:
    return [thing.copy()] if thing.flags.writeable and thing.nbytes <= _LARGE else []


def _is_same_array(now: list[Any], before: list[Any]) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(now, before, strict=True))


def _put_array(thing: Any, before: list[Any]) -> None:
    thing[...] = before[0]


def _objects_in(thing: Any) -> list[Any]:
    return thing.ravel().tolist() if thing.dtype.hasobject else []


_BUFFER = Aspect(lambda thing: [bytes(thing)], _put_buffer, _nothing, list.__eq__)
_ARRAY = Aspect(_look_at_array, _put_array, _objects_in, _is_same_array)


# -------------------------------------------------------------------------------------- attributes


def _members(thing: Any) -> dict[str, Any]:
    try:
        own = object.__getattribute__(thing, "__dict__")
    except AttributeError:
        return {}
    return own if type(own) is dict else {}


def _own_members(thing: Any) -> list[Any]:
    """Names and values of an object's attributes, or of a module's own."""
    members = own_attributes(thing) if isinstance(thing, nn.Module) else _members(thing)
    return [*members.keys(), *members.values()]


def _put_members(thing: Any, before: list[Any]) -> None:
    half = len(before) // 2
    was = dict(zip(before[:half], before[half:], strict=True))
    members = _members(thing)
    now = own_attributes(thing) if isinstance(thing, nn.Module) else dict(members)
    for name, value in now.items():
        if name not in was and not is_foreign(type(value)):  # what a library adds stays
            del members[name]
    members.update({name: value for name, value in was.items() if name not in members or members[name] is not value})


def _slots_of(kind: type) -> list[Any]:
    own = [vars(cls) for cls in kind.__mro__ if "__slots__" in vars(cls)]
    return [member for names in own for member in names.values() if isinstance(member, MemberDescriptorType)]


def _slot_value(member: Any, thing: Any) -> Any:
    try:
        return member.__get__(thing)
    except AttributeError:
        return MISSING


def _put_slots(members: list[Any], thing: Any, before: list[Any]) -> None:
    for member, value in zip(members, before, strict=True):
        if value is not MISSING:
            member.__set__(thing, value)
        elif _slot_value(member, thing) is not MISSING:
            member.__delete__(thing)


def put_own(module: nn.Module, before: dict[str, Any]) -> None:
    """Have a module the attributes of its own that it had; ``before`` are all that it had."""
    attributes = module.__dict__
    if len(attributes) == len(before) and all(map(is_, attributes.values(), before.values())):
        return
    own = own_among(module, before)
    _put_members(module, [*own.keys(), *own.values()])


_ATTRIBUTES = Aspect(_own_members, _put_members)
_BEYOND = Aspect(_own_members, _put_members, lambda thing: [part for part in _own_members(thing) if isinstance(part, CONTAINERS)])


def _slots_aspect(members: list[Any]) -> Aspect:
    return Aspect(lambda thing: [_slot_value(member, thing) for member in members], functools.partial(_put_slots, members))


# --------------------------------------------------------------------------------------- functions


def _look_in_cell(cell: Any) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # it is empty
        return []


def _put_cell(cell: Any, before: list[Any]) -> None:
    if before:
        cell.cell_contents = before[0]
    else:
        del cell.cell_contents


def is_same_name(now: list[Any], before: list[Any]) -> bool:
    """`is_same`, of what names are bound to: a whole number counts calls, and those of a replay too."""
    return len(now) == len(before) and all(a is b or type(a) is type(b) is int for a, b in zip(now, before, strict=True))


def _look_at_generator(generator: Any) -> list[Any]:
    frame = generator.gi_frame
    return [] if frame is None else [frame.f_lasti, *frame.f_locals.values()]


def _report_generator(generator: Any, _before: list[Any]) -> str:
    return f"a generator ({generator.__qualname__}) that was advanced twice"


_GENERATOR = Aspect(_look_at_generator, _report_generator)
CELL = Aspect(_look_in_cell, _put_cell, None, is_same_name)
_METHOD = Aspect(_nothing, _leave, lambda method: (method.__self__, method.__func__))
_BUILTIN = Aspect(_nothing, _leave, lambda method: [method.__self__])  # ``store.append``
_PARTIAL = Aspect(_nothing, _leave, lambda partial: (partial.func, partial.args, partial.keywords, partial.__dict__))


# ------------------------------------------------------------------------------------------- kinds

_KINDS: list[tuple[type, Aspect]] = [
    (list, _LIST),
    (tuple, _TUPLE),
    (OrderedDict, _ORDERED),
    (dict, _DICT),
    (set, _SET),
    (deque, _QUEUE),
    (bytearray, _BUFFER),
    (array, _BUFFER),
    (CellType, CELL),
    (MethodType, _METHOD),
    (BuiltinMethodType, _BUILTIN),
    (functools.partial, _PARTIAL),
    (GeneratorType, _GENERATOR),
]
_OPEN = {SimpleNamespace, UserDict, UserList}  # of Python's own classes those whose attributes are looked at
_aspects: WeakKeyDictionary[type, tuple[Aspect, ...]] = WeakKeyDictionary()


def aspects_of(kind: type) -> tuple[Aspect, ...]:
    """The ways in which objects of a class hold things; none of what is left alone (Rule 18)."""
    aspects = _aspects.get(kind)
    if aspects is None:
        aspects = _aspects[kind] = tuple(_aspects_of(kind))
    return aspects


def _aspects_of(kind: type) -> list[Aspect]:
    if issubclass(kind, nn.Module):
        return [] if is_foreign(kind) else [_BEYOND]
    if issubclass(kind, (Tensor, type, ModuleType, Enum)):
        return []
    numpy = sys.modules.get("numpy")
    if numpy is not None and issubclass(kind, numpy.ndarray):
        return [_ARRAY]
    found = next(([aspect] for base, aspect in _KINDS if issubclass(kind, base)), [])
    if is_library(kind.__module__) and kind not in _OPEN:
        return found
    if kind.__dictoffset__:
        found.append(_ATTRIBUTES)
    slots = _slots_of(kind)
    return [*found, _slots_aspect(slots)] if slots else found
