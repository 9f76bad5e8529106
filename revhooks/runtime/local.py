"""Where saved tensors go in this thread: to an open frame's slots, or to the run."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sized
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from .frame import Frame
    from .plan import Facts
    from .run import Run
    from .slots import Slots

__all__ = ["LOCAL", "Filling", "saving_to"]


class Filling(NamedTuple):
    """A call that is being run again.

    Attributes:
        run: whose frame it is of.
        slots: what it fills.
        pack: how it saves a tensor.
        saved: what it has saved so far.
    """

    run: Run
    slots: Slots
    pack: Callable[[Tensor], Tensor]
    saved: Sized


class _Local(threading.local):
    sink: tuple[Slots, Frame] | None = None  # the frame that is being run
    filling: Filling | None = None  # the frame that is being run again


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
