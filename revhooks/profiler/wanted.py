"""Which modules a command line means: by the names of their classes, which may not be there yet, or as the repeated blocks."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Sequence

from torch import nn

from .repeated import repeated_blocks, to_replay

__all__ = ["Wanted", "is_named"]


def is_named(cls: type, name: str) -> bool:
    """Whether a class is called so: ``Class``, ``module:Class`` or ``module.Class``, also where another module has it too.

    Example:
        >>> [is_named(nn.Linear, name) for name in ("Linear", "torch.nn:Linear", "torch.nn.modules.linear:Linear", "x:Linear")]
        [True, True, True, False]
    """
    if name in (cls.__name__, cls.__qualname__):
        return True
    module, _, path = name.rpartition(":" if ":" in name else ".")
    if module.endswith(".py"):  # as a file, the script itself
        main = getattr(sys.modules["__main__"], "__file__", None)
        module = "__main__" if main is not None and os.path.abspath(module) == main else module
    if (module, path) == (cls.__module__, cls.__qualname__):
        return True
    found: object = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    return found is cls


class Wanted:
    """Says of modules, when they are called, whether they are meant.

    Args:
        names: of classes; their subclasses are meant too.
        blocks: the repeated blocks of a model are meant, unless they are registered: of the first module that is called, and of
            whatever is called that was not in it.

    Attributes:
        unmatched: names that no module had so far, in order.
        repeated: classes of blocks that are repeated in what was called.
        taken: how many blocks of which class were found and are meant.

    Example:
        >>> wanted = Wanted(["Linear", "Block"])
        >>> wanted.means(nn.Linear(1, 1)), wanted.means(nn.ReLU()), wanted.unmatched
        (True, False, ['Block'])
    """

    def __init__(self, names: Sequence[str] = (), *, blocks: bool = False) -> None:
        self._names = tuple(names)
        self._blocks = blocks
        self._classes: dict[type, bool] = {}
        self._paths: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()  # in what was called from outside
        self._chosen: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.unmatched = list(dict.fromkeys(names))
        self.repeated: dict[str, None] = {}
        self.taken: dict[str, int] = {}

    def means(self, module: nn.Module) -> bool:
        """Whether it is meant."""
        by_class = self._classes.get(type(module))
        if by_class is None:
            by_class = self._classes[type(module)] = self._look(module)
        if module not in self._paths:
            self._enter(module)
        return by_class or (self._blocks and module in self._chosen)

    def path_of(self, module: nn.Module) -> str:
        """Its path in the model that was called; empty where that is not known, or the model itself."""
        return self._paths.get(module, "")

    def _look(self, module: nn.Module) -> bool:
        """Whether a class, which is seen for the first time, has one of the names."""
        self.repeated.update(dict.fromkeys(one.name for one in repeated_blocks(module)))
        classes = type(module).__mro__
        found = [name for name in self._names if any(is_named(cls, name) for cls in classes)]
        self.unmatched = [name for name in self.unmatched if name not in found]
        return bool(found)

    def _enter(self, root: nn.Module) -> None:
        """Something was called that lies in nothing that is known."""
        for path, module in root.named_modules():
            self._paths.setdefault(module, path)
        if self._blocks:
            self._choose(root)

    def _choose(self, root: nn.Module) -> None:
        """Choose the repeated blocks."""
        for one in to_replay(root):
            self.taken[one.name] = self.taken.get(one.name, 0) + len(one.blocks)
            for block in one.blocks:
                self._chosen.add(block)
