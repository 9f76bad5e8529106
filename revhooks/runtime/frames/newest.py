"""The newest block: it is kept until backward comes, which spares one rebuild, unless that makes the peak (Rule 17)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...storage import Ledger
    from .frame import Frame

__all__ = ["Newest"]

LEAST, SHARE = 1 << 20, 64  # bytes, and a part of the peak, for less than which a rebuild is not worth it
_LEAN = 1 << 14  # bytes, for less than which recipes inside of it are not worth looking for


class Newest:
    """Whether to keep the newest block in the next step, and what it saved as it is, learned from this one.

    Backward begins with all that is held, the newest block and what came after it, a language model's head say. The next peak
    is there when the block before it has been rebuilt: most that was held for the head is gone by then, and there will be a
    gradient as large as the largest tensor that a block saves, of which no books tell.

    Args:
        frame: of the newest block.
        ledger: of its run, at the beginning of backward.
    """

    __slots__ = (
        "_begin",
        "_facts",
        "_is_chain",
        "_largest",
        "_ledger",
        "_limit",
        "_ordinal",
        "_rebuilt",
        "_saved",
        "_spared",
        "_stayed",
    )

    def __init__(self, frame: Frame, ledger: Ledger) -> None:
        self._ledger = ledger
        self._begin = ledger.all_held
        self._facts = frame.facts
        self._limit = frame.run.budget.limit
        self._ordinal = frame.ordinal
        self._is_chain = frame.is_chain
        self._rebuilt = False
        self._stayed = not frame.released
        saved = sum(slots.rebuilt_bytes for slots in frame.all_slots())
        gives_back = bool(frame.inputs) or frame.is_chain  # streams, besides what it saved
        if self._stayed and gives_back:
            self._facts.kept_bytes = frame.kept_bytes()
        self._saved = max(saved, self._facts.kept_bytes if gives_back else 0)
        self._largest = max((slots.largest for slots in frame.all_slots()), default=0)
        self._spared = sum(slots.spared_bytes for slots in frame.all_slots()) if self._stayed and frame.run.shared.ops else -1

    def _is_next_step(self, ordinal: int) -> bool:
        """Whether it is of the newest block, a chain, whose newest step is there or was rebuilt before."""
        was, self._rebuilt = self._rebuilt, True
        return self._is_chain and ordinal == self._ordinal and (self._stayed or was)

    def compare(self, ordinal: int, *, plain: bool) -> bool:
        """A block was rebuilt, with tensors as they are if ``plain``: whether that was another one, so that it is known now."""
        if ordinal >= self._ordinal and not self._is_next_step(ordinal):
            return False
        peak = self._ledger.all_held + self._largest
        kept = self._begin if self._stayed else self._begin + self._saved
        gain = kept - max(peak, kept - self._saved)  # by which the peak is lower without it
        worth = max(LEAST, kept // SHARE)
        if self._stayed and gain >= worth:
            self._facts.learn_stays(self._limit, False)
        elif not self._stayed and 2 * gain < worth:
            self._facts.learn_stays(self._limit, True)
        if self._spared >= 0:
            least = peak - self._spared * plain
            self._facts.lean = kept + self._spared - least > max(_LEAN, kept // SHARE)
        return True
