"""Tensors inside containers: tuples, lists, dicts, classes derived from them, and dataclasses.

Containers that `torch.utils._pytree` knows are taken apart and put together by its functions. Its own walks leave reference
cycles behind at every call, which only the garbage collector frees; a step must leave nothing to it (Rule 5).
"""

from __future__ import annotations

import functools
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ..reach import PLAIN
from ..storage import PLAIN_TYPES

__all__ = ["LEAVES", "Form", "flatten", "leaves_of", "map_leaves", "map_tensors", "tensors_of"]

LEAVES = PLAIN | {*PLAIN_TYPES}  # what is no container, and holds nothing in turn
_Build = Callable[[list[Any]], Any]
_Opened = tuple[Iterable[Any], _Build]


class Form(NamedTuple):
    """How a container is put together again; a part that is a leaf has ``None`` in the place of its form."""

    build: _Build
    parts: list[Form | None]

    def fill(self, leaves: Iterator[Any]) -> Any:
        """A container like it, of other leaves."""
        return self.build([next(leaves) if part is None else part.fill(leaves) for part in self.parts])


def flatten(tree: Any) -> tuple[list[Any], Callable[[Iterable[Any]], Any]]:
    """The leaves of ``tree`` in order, and a function that makes the same tree of others.

    A container gets its class and its attributes back without a call of its constructor, which may check what it is given.

    Example:
        >>> leaves, again = flatten((1, [2, {"a": 3}], None))
        >>> leaves, again("wxyz")
        ([1, 2, 3, None], ('w', ['x', {'a': 'y'}], 'z'))
    """
    leaves: list[Any] = []
    form = _form_of(tree, leaves, set())
    if form is None:
        return leaves, _only
    return leaves, functools.partial(_filled, form)


def _only(leaves: Iterable[Any]) -> Any:
    (leaf,) = leaves
    return leaf


def _filled(form: Form, leaves: Iterable[Any]) -> Any:
    return form.fill(iter(leaves))


def _form_of(tree: Any, leaves: list[Any], path: set[int]) -> Form | None:
    if type(tree) in LEAVES:
        leaves.append(tree)
        return None
    opened = _open(tree) if id(tree) not in path else None  # what contains itself is a leaf there
    if opened is None:
        leaves.append(tree)
        return None
    parts, build = opened
    path.add(id(tree))
    form = Form(build, [_form_of(part, leaves, path) for part in parts])
    path.discard(id(tree))
    return form


def leaves_of(tree: Any) -> list[Any]:
    """Everything in ``tree`` that is no container, in order.

    Example:
        >>> leaves_of((1, [2, {"a": 3}], None))
        [1, 2, 3, None]
    """
    leaves: list[Any] = []
    _gather(tree, leaves, set())
    return leaves


def _gather(tree: Any, leaves: list[Any], path: set[int]) -> None:
    """`_form_of`, without a form."""
    kind = type(tree)
    if kind is tuple or kind is list:
        parts = tree
    elif kind is dict:
        parts = tree.values()
    else:
        opened = None if kind in LEAVES else _open(tree)
        parts = None if opened is None else opened[0]
    if parts is None or id(tree) in path:
        leaves.append(tree)
        return
    path.add(id(tree))
    for part in parts:
        if type(part) in LEAVES:
            leaves.append(part)
        else:
            _gather(part, leaves, path)
    path.discard(id(tree))


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors in ``tree``, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf for leaf in leaves_of(tree) if isinstance(leaf, Tensor)]


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """The same tree with every leaf replaced by ``function(leaf)``, called in order.

    Example:
        >>> map_leaves(lambda leaf: leaf + 1, (1, [2, {"a": 3}]))
        (2, [3, {'a': 4}])
    """
    leaves, again = flatten(tree)
    return again(map(function, leaves))


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """The same tree with every tensor replaced by ``function(tensor)``, called in order."""
    if isinstance(tree, Tensor):
        return function(tree)
    return map_leaves(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)


# -------------------------------------------------------------------------------------- containers

_CONTAINERS = (tuple, list, dict)
_NODES: dict[type, Any] = getattr(_pytree, "SUPPORTED_NODES", {})


def _open(tree: Any) -> _Opened | None:
    """The parts of a container and what puts others together; ``None`` for a leaf."""
    kind = type(tree)
    if kind is tuple or kind is list:
        return tree, kind
    if kind is dict:
        return tree.values(), functools.partial(_dict_of, [*tree])
    if not isinstance(tree, _CONTAINERS):
        return _open_dataclass(tree) if _is_dataclass(tree) else None
    if isinstance(tree, torch.Size):
        return None
    node = _NODES.get(kind)
    if node is not None:
        parts, context = node.flatten_fn(tree)
        return parts, functools.partial(_unflatten, node.unflatten_fn, context)
    if hasattr(kind, "n_sequence_fields"):  # one of the interpreter's own, as `time.struct_time`
        return tree, kind
    own = _attributes(tree)
    if isinstance(tree, dict):
        values, keys = [dict.__getitem__(tree, key) for key in tree], list(tree)
    else:
        values, keys = list(tree), None
    factory = tree.default_factory if isinstance(tree, defaultdict) else None
    return [*values, *own.values()], functools.partial(_like, _Like(kind, len(values), keys, list(own), factory))


def _dict_of(keys: list[Any], parts: list[Any]) -> dict[Any, Any]:
    return dict(zip(keys, parts, strict=True))


def _unflatten(unflatten: Callable[[Any, Any], Any], context: Any, parts: list[Any]) -> Any:
    return unflatten(parts, context)


class _Like(NamedTuple):
    """What makes an object of a class derived from tuple, list or dict, or of a dataclass."""

    kind: type
    size: int  # of its parts those that are not attributes
    keys: list[Any] | None
    names: list[str]  # of its attributes
    factory: Any = None


def _like(like: _Like, parts: list[Any]) -> Any:
    """An object without a call of its constructor."""
    thing = _bare(like, parts[: like.size])
    for name, part in zip(like.names, parts[like.size :], strict=True):
        object.__setattr__(thing, name, part)
    return thing


def _bare(like: _Like, values: Sequence[Any]) -> Any:
    kind = like.kind
    if issubclass(kind, tuple):
        return tuple.__new__(kind, values)
    if issubclass(kind, list):
        made: Any = list.__new__(kind)
        list.extend(made, values)
        return made
    if like.keys is None:
        return object.__new__(kind)
    base: Any = OrderedDict if issubclass(kind, OrderedDict) else dict
    mapped = base.__new__(kind)
    if issubclass(kind, defaultdict):
        mapped.default_factory = like.factory
    for key, value in zip(like.keys, values, strict=True):
        base.__setitem__(mapped, key, value)
    return mapped


def _attributes(thing: Any) -> dict[str, Any]:
    """Those of an object, in its dictionary and in its slots."""
    own = dict(getattr(thing, "__dict__", {}))
    for cls in type(thing).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(thing, name):
                own[name] = getattr(thing, name)
    return own


def _is_dataclass(thing: Any) -> bool:
    kind = type(thing)
    return (
        hasattr(kind, "__dataclass_fields__")
        and not isinstance(thing, (Tensor, nn.Module, type))
        and kind.__new__ is object.__new__  # type: ignore[comparison-overlap]
    )


def _open_dataclass(thing: Any) -> _Opened | None:
    """One that leads to a tensor; others are given as they are."""
    own = _attributes(thing)
    if not _leads_to_tensor(own.values()):
        return None
    return own.values(), functools.partial(_like, _Like(type(thing), 0, None, list(own)))


_MOST = 1000  # things to look at


def _leads_to_tensor(things: Iterable[Any]) -> bool:
    queue = list(things)
    seen: set[int] = set()
    for thing in queue:  # which grows
        if isinstance(thing, Tensor):
            return True
        if id(thing) in seen or len(queue) > _MOST:
            continue
        seen.add(id(thing))
        if isinstance(thing, dict):
            queue += thing.values()
        elif isinstance(thing, _CONTAINERS):
            queue += thing
        elif _is_dataclass(thing):
            queue += _attributes(thing).values()
    return False
