"""Backward passes: what is to be done at the end of one, and what was rebuilt for one only."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any, Protocol

from torch._C._autograd import _get_current_graph_task_keep_graph as keeps_graph

from ..backward import NO_PASS, call_at_end, current_pass

__all__ = ["EVERYTHING", "NOTHING", "NO_PASS", "Passes", "Purged", "current_pass", "is_retained"]

EVERYTHING, NOTHING = math.inf, -math.inf  # over when a pass has come to any frame, or when it has ended


def is_retained() -> bool:
    """Whether what is rebuilt now may be asked for again: retain_graph, or no backward at all."""
    return current_pass() == NO_PASS or bool(keeps_graph())


class Purged(Protocol):
    """Something that lets go of what was rebuilt for one pass."""

    def purge(self) -> None:
        """Do so."""
        ...


class Passes:
    """What one run has to do with backward passes.

    Attributes:
        count: how many had something to do at their end.
        rebuilding: frames that are being rebuilt, the innermost last.
    """

    def __init__(self) -> None:
        self.count = 0
        self._task = NO_PASS  # the latest pass with something to do at its end
        self._queued: set[str] = set()
        self._to_purge: list[tuple[weakref.ref[Any], float]] = []
        self.rebuilding: list[Any] = []

    def at_end(self, callback: Callable[[], None]) -> bool:
        """Call ``callback`` at the end of the present backward pass; ``False`` outside of one."""
        task = current_pass()
        if task == NO_PASS:
            return False
        if task != self._task:
            self._task, self._queued = task, set()
            self.count += 1
        if callback.__qualname__ not in self._queued:
            if not call_at_end(callback):
                return False
            self._queued.add(callback.__qualname__)
        return True

    def purge_later(self, rebuilt: Purged, over: float) -> None:
        """Drop what was rebuilt when the present pass, whose graph is retained, has ended.

        Args:
            rebuilt: has it.
            over: it goes before, when the pass has come to a frame whose number is below this: a pass goes back, so that
                it is hardly needed again.
        """
        self._to_purge.append((weakref.ref(rebuilt), over))
        self.at_end(self.purge)

    @property
    def rebuilt(self) -> int:
        """How many things `purge` would look at."""
        return len(self._to_purge)

    def purge(self, *, since: int = 0, reached: float | None = None) -> None:
        """Drop what was rebuilt for one pass only: all of it.

        Args:
            since: but for as many as were rebuilt first.
            reached: but for what is not over for a pass that has come to the frame of this number.
        """
        self._to_purge, pending = self._to_purge[:since], self._to_purge[since:]
        for reference, over in pending:
            rebuilt = reference()
            if rebuilt is not None and reached is not None and (over <= reached or rebuilt in self.rebuilding):
                self._to_purge.append((reference, over))
            elif rebuilt is not None:
                rebuilt.purge()
