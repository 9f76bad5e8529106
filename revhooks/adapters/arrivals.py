"""Libraries that are imported in a context that is open: a script under `revhooks run` imports all of its own there."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from . import LIBRARIES, adapt, adapter_of

__all__ = ["arrivals"]


@contextlib.contextmanager
def arrivals() -> Iterator[None]:
    """Have tables become active as soon as what they cover is imported.

    Example:
        >>> with arrivals():
        ...     pass
    """
    finder = _Finder(frozenset(block.module for library in LIBRARIES for block in adapter_of(library).blocks))
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(finder)


class _Finder(MetaPathFinder):
    """Finds nothing itself: what others find is followed by `adapt`."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._asked: set[str] = set()  # of the others, now

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec that others have, if the module is in a table."""
        if name not in self._names or name in self._asked:
            return None
        self._asked.add(name)
        try:
            spec = find_spec(name)
        finally:
            self._asked.discard(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Followed(spec.loader)
        return spec


class _Followed(Loader):
    """A loader that gives its place back to the one that it stands for."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As it does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As it does, and then adapt."""
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        adapt()
