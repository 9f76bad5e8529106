"""Tails: masks that a call saved last are held as bits, so that a replay may end before them.

Many a transformer's layer ends in a product and a dropout. To bring back the dropout's mask, checkpointing computes that product
once more, which nothing else needs; as bits the mask takes a thirty-second of what the layer's input does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...kinds import is_allocated
from ...saved import Counted, Source
from ...storage import Geometry, Held, Ledger, is_near
from ..handles.codes import Code, mask_of
from ..handles.dropped import at_version

if TYPE_CHECKING:
    from ..handles.protocols import Stretch

__all__ = ["Tail"]


class Tail:
    """The masks at the end of a call's slots.

    Args:
        slots: what the call saved, before it is let go of.
        ledger: counts what is held.
        most: bytes that it may take.

    Attributes:
        start: how many tensors a replay has to save; what came after them is here, or was never let go of.
    """

    __slots__ = ("_masks", "start")

    def __init__(self, slots: Stretch, ledger: Ledger, most: float) -> None:
        self._masks: dict[int, _Mask] = {}
        self.start = 0
        for index in reversed(range(len(slots))):
            if not slots.is_let_go(index):
                continue
            mask = _mask(slots.tensors[index], ledger)
            if mask is not None:
                most -= mask.tensor.nbytes
            if mask is None or most < 0:
                # as it saves the next one: an operation may write into what it has saved
                self.start = index + 2 if self._masks else len(slots)
                break
            self._masks[index] = mask

    def __getitem__(self, index: int) -> Tensor | None:
        """The mask that was saved there."""
        mask = self._masks.get(index)
        return None if mask is None else mask.decoded()

    def tensors(self) -> Iterator[Tensor]:
        """What it holds."""
        return (mask.tensor for mask in self._masks.values())


class _Mask(Held):
    """A mask as bits."""

    __slots__ = ("_code", "_geometry", "_of")

    def __init__(self, ledger: Ledger, mask: Tensor, code: Code) -> None:
        super().__init__(ledger, code.encoded)
        self._code = code
        self._geometry = Geometry.of(mask)
        self._of = mask._version

    def decoded(self) -> Tensor:
        """The mask, in the version that it had."""
        return at_version(self._code.tensor(self._geometry), self._of)


def _mask(entry: Tensor | Source, ledger: Ledger) -> _Mask | None:
    if isinstance(entry, Source):
        if type(entry) is not Counted:
            return None
        entry = entry.get()
    if entry.dtype is not torch.bool and not is_near(entry.device):  # an accelerator's masks are truth values
        return None
    if entry.__dict__ or not is_allocated(entry):  # it is to come back as the object that it is
        return None
    code = mask_of(entry, "")
    return None if code is None else _Mask(ledger, entry, code)
