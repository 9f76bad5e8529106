"""Which global names and class attributes code depends on, found once for a piece of code."""

from __future__ import annotations

import dis
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    ModuleType,
)
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from .reach import MISSING, is_library, is_same, is_same_name

__all__ = ["Names", "named_by", "named_by_class", "read", "unbracketed"]

_FUNCTIONS = 200  # that are followed from one
_OF_GLOBALS = {"LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL"}
_OF_OTHERS = {"LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"}
_OWN = ("STORE_FAST", "STORE_DEREF", "DELETE_FAST", "DELETE_DEREF")  # what has cells of others is for who asks to see
_SEEN = ("STORE_", "DELETE_", "IMPORT_", "LOAD_BUILD_CLASS", "LOAD_NAME", "LOAD_LOCALS", "LOAD_FROM")
_BOUND = (staticmethod, classmethod)
_DESCRIPTORS = (*_BOUND, property, MemberDescriptorType, GetSetDescriptorType)
_PACKAGE = str(Path(__file__).parent)
_INSTALLED = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))


class Names:
    """Some names of a namespace: of globals, or of a class.

    Attributes:
        space: the globals, or the class.
        names: those that count.
    """

    __slots__ = ("names", "space")

    def __init__(self, space: Any, names: Iterable[str]) -> None:
        self.space = space
        self.names = tuple(names)

    def look(self) -> list[Any]:
        """What they are bound to."""
        space = vars(self.space) if isinstance(self.space, type) else self.space
        return [space.get(name, MISSING) for name in self.names]

    def put_back(self, before: list[Any]) -> None:
        """Bind them again to what they were bound to."""
        now = self.look()
        if is_same(now, before):
            return
        is_class = isinstance(self.space, type)
        for name, value, current in zip(self.names, before, now, strict=True):
            if value is current or (not is_class and is_same_name([current], [value])):
                continue
            if is_class and value is MISSING:
                type.__delattr__(self.space, name)
            elif is_class:
                type.__setattr__(self.space, name, value)
            elif value is MISSING:
                del self.space[name]
            else:
                self.space[name] = value


class Code(NamedTuple):
    """What a piece of code does, with the functions in it.

    Attributes:
        spaces: the global names that it uses.
        names: names of attributes.
        stores: whether it stores where others see it: into attributes, items, global names; or defines or imports something.
    """

    spaces: frozenset[str]
    names: frozenset[str]
    stores: bool


_codes: WeakKeyDictionary[CodeType, Code] = WeakKeyDictionary()


def read(code: CodeType) -> Code:
    """What it does, found once."""
    found = _codes.get(code)
    if found is None:
        steps = [(step.opname, step.argval) for step in dis.get_instructions(code)]
        parts = [read(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
        spaces = {name for operation, name in steps if operation in _OF_GLOBALS}.union(*(part.spaces for part in parts))
        names = (set(code.co_names) - spaces).union(
            (name for operation, name in steps if operation in _OF_OTHERS), *(part.names for part in parts)
        )
        stores = any(operation.startswith(_SEEN) and not operation.startswith(_OWN) for operation, _ in steps)
        found = _codes[code] = Code(frozenset(spaces), frozenset(names), stores or any(part.stores for part in parts))
    return found


_known: WeakKeyDictionary[CodeType, tuple[dict[str, Any], tuple[Names, ...]]] = WeakKeyDictionary()


def named_by(function: FunctionType) -> tuple[Names, ...]:
    """The global names that a function, and those that it names in turn, may use, without what stays as it is."""
    known = _known.get(function.__code__)
    if known is None or known[0] is not function.__globals__:  # code that is equal may be of another file
        known = _known[function.__code__] = function.__globals__, _gathered([function])
    return known[1]


class _OfClass(NamedTuple):
    """What is known of one class among those that a class inherits from: its place, its size, and what counts."""

    place: int
    size: int
    attributes: tuple[str, ...]
    closures: tuple[str, ...]
    names: tuple[Names, ...]


_classes: WeakKeyDictionary[type, tuple[_OfClass, ...]] = WeakKeyDictionary()


def named_by_class(kind: type) -> tuple[list[Names], list[Any]]:
    """Of a class and those that it inherits from: attributes, the global names that methods use, and their closures' cells."""
    known, line = _classes.get(kind), kind.__mro__
    if known is None or any(len(vars(line[part.place])) != part.size for part in known):
        known = _classes[kind] = tuple(
            _of_class(place, cls) for place, cls in enumerate(line) if cls is not object and not is_library(cls.__module__)
        )
    names, cells = [], []
    for part in known:
        own = line[part.place]
        if part.attributes:
            names.append(Names(own, part.attributes))
        names += part.names
        for method in part.closures:
            for function in _functions_in(vars(own).get(method)):
                cells += [cell for name, cell in _cells(function) if name != "__class__"]
    return names, cells


def _of_class(place: int, cls: type) -> _OfClass:
    own = vars(cls)
    methods = {name: functions for name, value in own.items() if (functions := _functions_in(value))}
    attributes = tuple(n for n, v in own.items() if n not in methods and not isinstance(v, _DESCRIPTORS) and n[:2] != "__")
    closures = tuple(
        n for n, functions in methods.items() if any(name != "__class__" for f in functions for name, _ in _cells(f))
    )
    return _OfClass(place, len(own), attributes, closures, _gathered([f for functions in methods.values() for f in functions]))


def _functions_in(value: Any) -> list[FunctionType]:
    """A method's function, and what it wraps; without brackets of ours."""
    value = (
        value.fget if isinstance(value, property) else getattr(value, "__func__", value) if isinstance(value, _BOUND) else value
    )
    found = []
    while isinstance(value, FunctionType):
        if not value.__code__.co_filename.startswith(_PACKAGE):
            found.append(value)
        value = value.__dict__.get("__wrapped__")
    return found


def unbracketed(function: Any) -> Any:
    """A method without brackets of ours; what wraps a bracket has its marks, too, and is none."""
    while isinstance(function, FunctionType) and function.__dict__.get("__revhooks_bracket__"):
        inner = function.__dict__["__wrapped__"]
        if not any(name == "original" and cell.cell_contents is inner for name, cell in _cells(function)):
            break
        function = inner
    return function


def _cells(function: FunctionType) -> Iterator[tuple[str, Any]]:
    return zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)


def _gathered(functions: list[FunctionType]) -> tuple[Names, ...]:
    """The names that count in what these functions, and those that they name in turn, use."""
    spaces: dict[int, tuple[dict[str, Any], dict[str, None]]] = {}
    seen: set[int] = set()
    for function in functions:  # which grows
        if len(functions) > _FUNCTIONS:
            break
        if id(function.__code__) in seen:
            continue
        seen.add(id(function.__code__))
        used, attributes, _ = read(function.__code__)
        file = function.__code__.co_filename
        spaces_used = [function.__globals__]
        for space in spaces_used:  # which grows
            for name in used if space is function.__globals__ else attributes:
                value = space.get(name, MISSING)
                if isinstance(value, FunctionType) and _is_users(value, file):
                    functions.append(value)
                    if not (value.__closure__ or value.__dict__ or value.__defaults__):
                        continue
                elif isinstance(value, ModuleType) and _is_users(value, file) and len(spaces_used) < _FUNCTIONS:
                    spaces_used.append(vars(value))
                if value is not MISSING and not isinstance(value, (BuiltinFunctionType, ModuleType)) and name[:2] != "__":
                    spaces.setdefault(id(space), (space, {}))[1][name] = None
    return tuple(Names(space, names) for space, names in spaces.values())


def _is_users(thing: FunctionType | ModuleType, file: str) -> bool:
    """Whether a function or a module is of the same file, or of another that is not installed."""
    if isinstance(thing, FunctionType):
        where, module = thing.__code__.co_filename, thing.__module__
    else:
        where, module = getattr(thing, "__file__", None) or "", thing.__name__
    return where == file or (bool(where) and not is_library(module) and not where.startswith(_INSTALLED))
