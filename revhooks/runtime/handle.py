"""Handles: what stands in the graph in place of a saved tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Parameter

from ..kinds import without_graph
from ..ops import Leaf, Source
from ..storage import Geometry, version_of
from .value import Value, modified

if TYPE_CHECKING:
    from .frame import Frame
    from .slots import Slots

__all__ = ["LeafHandle", "SlotHandle", "ViewHandle"]


class LeafHandle(Leaf):
    """A parameter, another leaf, a buffer, or a tensor that is left alone: passed through, version-checked."""

    __slots__ = ()

    def __init__(self, tensor: Tensor) -> None:
        kind = self._kind = type(tensor)
        if kind is not Tensor and kind is not Parameter:
            self._tensor = without_graph(tensor)
            self._version = version_of(tensor)
            return
        self._tensor = tensor.detach() if tensor.requires_grad else tensor
        self._version = tensor._version
        base = tensor._base
        if base is not None:
            self._kind = type(base)

    def get(self) -> Tensor:
        """The tensor.

        Raises:
            ModifiedError: it was modified in place since (Rule 8).
        """
        tensor = self._tensor
        now = tensor._version if type(tensor) is Tensor else version_of(tensor)
        if now != self._version:
            raise modified("a parameter, buffer or leaf", tensor.shape, self._version, now)
        return tensor


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
        return entry if entry is None or isinstance(entry, Source) else LeafHandle(entry)

    def get(self) -> Tensor:
        """The tensor in the slot; rebuilt when it is not there."""
        frame, slots = self._frame, self._slots
        if slots.tensors[self._index] is None:
            return frame.run.rebuild(frame, slots, self._index)
        if not frame.released:
            slots.asked |= frame.open
            frame.run.reading_kept(frame)
        return slots.read(self._index)


class ViewHandle(Source):
    """A view of a Value's memory; ``original``, where it is to come back as the object that it was."""

    __slots__ = ("_geometry", "_original", "value")

    def __init__(self, value: Value, geometry: Geometry, original: Tensor | None = None) -> None:
        self.value = value
        self._geometry = geometry
        self._original = original

    def get(self) -> Tensor:
        """The view.

        Raises:
            ModifiedError: it was modified in place since (Rule 8).
        """
        original = self._original
        if original is not None:
            version, now = self.value.version, version_of(original)
            if now != version or self.value.current_version != version:
                raise modified(self.value.what, original.shape, version, max(now, self.value.current_version))
            return original
        return torch.as_strided(self.value.get(), *self._geometry)
