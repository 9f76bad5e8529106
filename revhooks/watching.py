"""Who is told what runs do while they do it: a profiler, or a command that shows it. As a rule, nobody."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["WATCHERS", "Watcher", "watching"]


class Watcher:
    """Is told, and does nothing about it; a subclass overrides what it wants to know.

    It may be called in a thread of the engine of autograd, in the midst of backward: it is to be quick, and raises nothing.
    """

    def began(self, run: Any) -> None:
        """A context was entered; ``run`` is what it returned."""

    def backward_began(self, run: Any) -> None:
        """A backward pass has come to something that ``run`` saved: what is held now is what it held after forward."""

    def rebuild_began(self, module: nn.Module | None, label: str) -> None:
        """What a block saved is reconstructed, or its call is repeated."""

    def rebuild_ended(self, module: nn.Module | None, label: str) -> None:
        """That is done."""

    def brought(self, tensor: Tensor) -> None:
        """A tensor that an ordinary operation had saved is back: it was computed again, or came from host memory."""

    def compared(self, label: str, error: float) -> None:
        """A reconstruction was compared with what had been there; its relative error."""


WATCHERS: list[Watcher] = []  # whoever is told now, in any thread; to be gone through as a copy, since another may change it


@contextlib.contextmanager
def watching(watcher: Watcher) -> Iterator[Watcher]:
    """Tell ``watcher`` of all runs in all threads.

    Example:
        >>> with watching(Watcher()) as watcher:
        ...     watcher in WATCHERS
        True
    """
    WATCHERS.append(watcher)
    try:
        yield watcher
    finally:
        WATCHERS.remove(watcher)
