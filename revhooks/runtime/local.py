"""Where saved tensors go in this thread: to an open frame's slots, or to the run."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .frame import Frame
    from .plan import Facts
    from .run import Run
    from .slots import Slots

__all__ = ["LOCAL", "saving_to"]


class _Local(threading.local):
    sink: tuple[Slots, Frame] | None = None  # the frame that is being run
    filling: tuple[Run, Callable[[Tensor], Tensor]] | None = None  # whose frame is being run again, and how that saves


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
