"""Tensors inside tuples, lists and dicts.

`torch.utils._pytree` does more and leaves reference cycles behind at every call, which only the garbage
collector frees; a step must leave nothing to it (Rule 5).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor

__all__ = ["leaves_of", "map_leaves", "map_tensors", "tensors_of"]


def leaves_of(tree: Any, found: list[Any] | None = None) -> list[Any]:
    """Everything in ``tree`` that is no tuple, list or dict, in order.

    Example:
        >>> leaves_of((1, [2, {"a": 3}], None))
        [1, 2, 3, None]
    """
    found = [] if found is None else found
    if isinstance(tree, (tuple, list)):
        for part in tree:
            leaves_of(part, found)
    elif isinstance(tree, dict):
        for part in tree.values():
            leaves_of(part, found)
    else:
        found.append(tree)
    return found


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
    if isinstance(tree, tuple):
        parts = [map_leaves(function, part) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    if isinstance(tree, list):
        return [map_leaves(function, part) for part in tree]
    if isinstance(tree, dict):
        mapped = {key: map_leaves(function, part) for key, part in tree.items()}
        if type(tree) is dict:
            return mapped
        same = copy.copy(tree)  # a defaultdict has a factory, too
        for key, part in mapped.items():
            same[key] = part
        return same
    return function(tree)


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """The same tree with every tensor replaced by ``function(tensor)``, called in order."""
    return map_leaves(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)
