"""Handles of what frames saved."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..saved import Leaf, Source

if TYPE_CHECKING:
    from .frame import Frame
    from .slots import Slots

__all__ = ["SlotHandle"]


class SlotHandle(Source):
    """Slot ``index`` of a stretch of a frame."""

    __slots__ = ("_frame", "_index", "_slots")

    def __init__(self, frame: Frame, slots: Slots, index: int) -> None:
        self._frame = frame
        self._slots = slots
        self._index = index

    def __del__(self) -> None:
        try:
            slots = self._slots
        except AttributeError:  # one of a tracer's, which makes it without arguments
            return
        slots.kill(self._index)

    def within(self, slots: Slots) -> Source | None:
        """What these slots hold there, if it is one of theirs."""
        entry = slots.tensors[self._index] if self._slots is slots else None
        return entry if entry is None or isinstance(entry, Source) else Leaf(entry)

    def get(self) -> Tensor:
        """The tensor in the slot; rebuilt when it is not there."""
        frame, slots = self._frame, self._slots
        if slots.tensors[self._index] is None:
            return frame.run.rebuild(frame, slots, self._index)
        if not frame.released:
            slots.asked |= frame.open
            frame.run.reading_kept(frame)
        return slots.read(self._index)
