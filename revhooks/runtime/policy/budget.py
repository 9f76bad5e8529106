"""The memory budget: what could be let go of stays while there is room; the oldest goes first (DESIGN section 7).

Backward needs the newest first, so that what is kept is freed soonest and every kept byte spares a rebuild. What a recipe
brings back costs next to nothing a byte and goes before any block; what has to be moved to the host goes last.
"""

from __future__ import annotations

import re
import weakref
from collections import deque
from typing import Any, Protocol

import psutil
import torch

from ...errors import RegistrationError, explain
from ...storage import Ledger

__all__ = ["Budget", "parse_bytes"]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


class Evictable(Protocol):
    """Something that can let go of memory and bring it back."""

    def release(self) -> None:
        """Let go of it."""
        ...


class Budget:
    """How many accounted bytes may be held, and what to let go of when there are more."""

    def __init__(self, ledger: Ledger, limit: float) -> None:
        self.limit = limit
        self._ledger = ledger
        self._values: deque[weakref.ref[Any]] = deque()
        self._frames: deque[weakref.ref[Any]] = deque()
        self._moves: deque[weakref.ref[Any]] = deque()
        self._coming = 0  # what the latest block has added
        self.evicted = 0  # how often something had to go

    def add_value(self, value: Evictable) -> None:
        """A saved tensor that a recipe could bring back."""
        while self._values and self._values[0]() is None:
            self._values.popleft()
        self._values.append(weakref.ref(value))
        self.make_room(spare=1)  # the newest block stays until the next one opens

    def add_move(self, movable: Evictable) -> None:
        """What could wait in host memory."""
        while self._moves and self._moves[0]() is None:  # nothing has to move for long, as a rule
            self._moves.popleft()
        self._moves.append(weakref.ref(movable))
        self.make_room(spare=1)

    def add_frame(self, frame: Evictable, nbytes: int = 0) -> None:
        """A block, or a step of one, that has run and added so many bytes."""
        self._coming = max(nbytes, 0)
        self._frames.append(weakref.ref(frame))

    def make_room_for_block(self) -> None:
        """A block opens that will add what the latest has."""
        self.make_room(self._coming)

    def evict_all(self) -> None:
        """Let go of all that can be brought back."""
        self.make_room(1 << 62)

    def make_room(self, coming: int = 0, *, spare: int = 0) -> None:
        """Let go of the oldest until so many more bytes fit, first what can be recomputed; not of the ``spare`` newest blocks."""
        for queue, least in ((self._values, 0), (self._frames, spare), (self._moves, 0)):
            while len(queue) > least and self._ledger.held + coming > self.limit:
                evicted = queue.popleft()()
                if evicted is not None:
                    evicted.release()
                    self.evicted += 1


def parse_bytes(budget: int | float | str | None) -> float:
    """A number of bytes: ``"2GiB"``, ``2e9``, ``"auto"`` (what is free now), ``None`` (0: least memory).

    Raises:
        RegistrationError: it is none of these.

    Example:
        >>> parse_bytes("1.5 KiB"), parse_bytes(None), parse_bytes(float("inf"))
        (1536.0, 0.0, inf)
    """
    if budget is None:
        return 0.0
    if isinstance(budget, (int, float)) and not isinstance(budget, bool) and budget >= 0:
        return float(budget)
    if isinstance(budget, str):
        if budget == "auto":
            return _free()
        match = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]?i?)b?\s*", budget, re.IGNORECASE)
        if match and match[2].lower() in _UNITS and re.fullmatch(r"\d+\.?\d*|\.\d+", match[1]):
            return float(match[1]) * _UNITS[match[2].lower()]
    raise RegistrationError(
        explain(
            "budget=",
            expected='a number of bytes, a string like "2GiB", "auto", or None',
            got=repr(budget),
            remedy="pass one of these",
        )
    )


def _free() -> float:
    """Nine tenths of what is free: on the accelerator where one is in use, else in the machine's memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        free, _ = torch.cuda.mem_get_info()
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return 0.9 * (free + unused)
    return 0.9 * float(psutil.virtual_memory().available)
