"""Handles of what frames saved."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ...saved import Leaf, Source
from ...streams import follow

if TYPE_CHECKING:
    from .protocols import Called, Stretch

__all__ = ["SlotHandle"]


class SlotHandle(tuple["Called", "Stretch", int], Source):
    """A slot of a stretch of a frame: the frame, the slots, the index. A tuple, for there is one for each saved tensor."""

    __slots__ = ()

    def __del__(self) -> None:
        if self:  # a tracer makes one without arguments
            _, slots, index = self
            if not slots.quick or (slots.live == 1 and slots.alive[index]):
                slots.kill(index)
                return
            slots.tensors[index] = None  # as there: most come here
            if slots.alive[index]:
                slots.alive[index] = 0
                slots.live -= 1

    def within(self, slots: Stretch) -> Source | None:
        """What these slots hold there, if it is one of theirs."""
        _, own, index = self
        entry = slots.tensors[index] if own is slots else None
        return entry if entry is None or isinstance(entry, Source) else Leaf(entry)

    def get(self) -> Tensor:
        """The tensor in the slot; rebuilt when it is not there."""
        frame, slots, index = self
        tensor: Tensor | None = slots.tensors[index]
        if slots.quick and tensor is not None and tensor._version == slots.versions[index] and not tensor.requires_grad:
            if slots.stream is not None:
                follow(tensor, slots.stream)
            return tensor
        if tensor is None:
            return frame.run.rebuild(frame, slots, index)
        if not frame.released:
            slots.asked |= frame.open
            frame.run.reading_kept(frame)
        return slots.read(index)
