"""What a profile sees: what plain autograd saves, and runs: what each module saved in them, and what they did in all."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["PlainlySaved", "Watched"]


class PlainlySaved:
    """Stands in the graph of plain autograd for what it saved; it is gone when that is let go.

    Args:
        packed: what the hooks around made of the tensor.
        version: which it had; ``None`` where changes in place are no business of ours.
        storage: the tensor's memory, where that counts.
        path: of the module that saved it.
    """

    __slots__ = ("__weakref__", "_storage", "key", "nbytes", "packed", "path", "version")

    def __init__(self, packed: Any, version: int | None, storage: Any, path: str) -> None:
        self.packed, self.version, self.path = packed, version, path
        self._storage: weakref.ref[Any] | None = None
        self.key = self.nbytes = 0
        if storage is not None:
            self._storage, self.key, self.nbytes = weakref.ref(storage), storage._cdata, storage.nbytes()

    def is_there(self) -> bool:
        """Whether its memory was not freed: what hooks have moved away takes none of it."""
        return self._storage is not None and self._storage() is not None


@dataclass(slots=True)
class Watched:
    """A run, and what plain autograd would hold of it, by path.

    Attributes:
        run: what ``reversible()`` gave.
        place: what told it places before.
        packed: bytes of unique storages that plain autograd would hold.
        saved: the same by path.
    """

    run: Any
    place: Callable[[], str] | None
    packed: int = 0
    saved: dict[str, int] = field(default_factory=dict)

    def settle(self, path: str) -> None:
        """What was saved since the last time was saved there; of what was freed meanwhile each path loses its share."""
        ledger = self.run.ledger
        ledger.settle()
        packed, before = ledger.all_packed, self.packed
        if packed < before:
            self.saved = {one: nbytes * packed // before for one, nbytes in self.saved.items()} if packed else {}
            before = sum(self.saved.values())
        if packed > before:
            self.saved[path] = self.saved.get(path, 0) + packed - before
        self.packed = packed
