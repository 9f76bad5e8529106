"""Where saved tensors go in this thread: to an open frame's slots, or to the run."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .frame import Frame
    from .plan import Facts
    from .slots import Slots

__all__ = ["LOCAL", "saving_to"]


class _Local(threading.local):
    sink: tuple[Slots, Frame] | None = None


LOCAL = _Local()


@contextlib.contextmanager
def saving_to(slots: Slots, frame: Frame, facts: Facts) -> Iterator[None]:
    """Send what this thread saves into ``slots`` of ``frame``."""
    before = LOCAL.sink
    LOCAL.sink = (slots, frame)
    try:
        yield
        slots.close(frame, facts)
    finally:
        LOCAL.sink = before
