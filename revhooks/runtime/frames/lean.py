"""Slots of a call that is run again, in which what cheap operations made is recomputed too."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from ...kinds import is_allocated, without_graph
from ...saved import Counted, Source, View
from ...storage import is_opaque, version_of
from ...streams import follow
from ..handles.dropped import Dropped
from ..handles.local import EnoughError, Filling
from ..handles.slot import SlotHandle
from ..passes import current_pass
from ..policy.guard import is_measured
from ..policy.sketch import Elements, large_places
from .slots import ALONE, DEAD, Slots, kind_of, looks_of

if TYPE_CHECKING:
    from ..policy.plan import Facts
    from ..recompute.tail import Tail
    from .home import Framed

__all__ = ["LeanSlots", "slots_for"]

_T = TypeVar("_T")


def slots_for(frame: Framed, position: int, *, replayed: bool = False) -> Slots:
    """Slots for a stretch of a frame; where it may stay for long, or is run again, they hold what recipes start from only."""
    lean = frame.run.shared.ops and (replayed or frame.run.budget.limit > 0)
    return (
        LeanSlots(frame, position, stays=frame.stays and (frame.run.budget.limit > 0 or frame.facts.lean))
        if lean
        else Slots(frame, position)
    )


class LeanSlots(Slots):
    """`Slots` that hold handles: of a tensor that has a recipe only what it starts from is there.

    The handles are found by these slots alone: what is saved elsewhere neither starts from them nor keeps them. To look for
    recipes takes time: what is let go of before backward comes is held as it is (``stays``), and only what is rebuilt is
    looked at, where that would raise the peak.
    """

    __slots__ = ("_budget", "_samples", "_seen", "home", "task")

    def __init__(self, frame: Framed, position: int, *, stays: bool) -> None:
        super().__init__(frame, position)
        self._budget = frame.run.budget
        self.home = object()  # under which nodes note what is here; it holds nothing
        self.task = current_pass()  # in which the call is made, or is run again
        self.plain = not stays  # holds tensors as they are
        self._raw = self.plain
        self._samples: dict[int, Elements] = {}  # some elements of what is recomputed, for a comparison
        self._seen: list[tuple[Any, int, int]] = []  # looks, storage key, bytes

    # -- forward

    def save(self, tensor: Tensor, frame: Framed) -> SlotHandle:
        """Pack a tensor that was saved during forward."""
        if self.plain:
            return super().save(tensor, frame)
        self._kinds.append(kind_of(tensor))
        self.versions.append(version_of(tensor))
        if is_opaque(tensor):
            self._seen.append((None, ALONE, 0))
        else:
            storage = tensor.untyped_storage()
            self._seen.append((looks_of(tensor), storage._cdata, storage.nbytes()))
        index = len(self.tensors)
        self.tensors.append(self._pack(tensor, index, frame))
        return SlotHandle((frame, self, index))

    def _pack(self, tensor: Tensor, index: int, frame: Framed) -> Source:
        """Hold it, or what recomputes it."""
        entry = frame.run.pack_inside(tensor, self, index, frame.label)
        if frame.compares and frame.run.guard.mode != "off" and not self._is_there(entry) and is_measured(tensor):
            self._samples[index] = Elements(tensor)
        return entry

    def close(self, frame: Framed, facts: Facts, key: object, output: Any = None) -> None:
        """After the code has run: tell what is passed, and what a replay has to save again."""
        if self.plain:
            super().close(frame, facts, key, output)
            return
        expected: list[Any] = []
        own: dict[int, int] = {}
        for index, (looks, key, nbytes) in enumerate(self._seen):
            is_input = key in frame.input_keys
            dead = self.tensors[index] is None
            passed = dead or key == ALONE or (not is_input and (self._kinds[index] or key in frame.external))
            expected.append((DEAD if dead else key) if passed else (looks, is_input))
            self.alive.append(not passed)
            if not passed:
                self.live += 1
                frame.saves_input |= is_input
                if not is_input:
                    own[key] = nbytes
                if key not in frame.packed:
                    frame.packed.add(key)
                    self._packed += nbytes
        self._rebuilt, self.largest = sum(own.values()), max(own.values(), default=0)
        self._seen = []
        self._looks = expected
        self._ledger.pack(self._packed)
        frame.run.note_saved(len(self.tensors))

    @property
    def spared_bytes(self) -> int:
        """What plain tensors would take more than what is held."""
        if self.plain:
            return 0
        held = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in self.held()}
        return max(self._rebuilt - sum(held.values()), 0)

    def is_at_hand(self, index: int) -> bool:
        """Whether what was saved at a place is held itself, and not to be made first."""
        return self.tensors[index] is not None and (self.plain or self._is_there(self.tensors[index]))

    # -- handles

    def read(self, index: int) -> Tensor:
        """The tensor in a slot that is filled.

        Raises:
            ModifiedError: it was modified in place since it was saved (Rule 8).
        """
        entry = self.tensors[index]
        if not isinstance(entry, Source):
            return super().read(index)
        tensor = entry.get()
        if self.stream is not None:
            follow(tensor, self.stream)
        if self.transient and self.alive[index]:
            self.tensors[index] = None
        return tensor

    def kill(self, index: int) -> None:
        """The handle of a slot has died."""
        if self.plain:
            super().kill(index)
            return
        self.tensors[index] = None
        if index < len(self.alive) and self.alive[index]:
            self.alive[index] = 0
            self.live -= 1
            if not self.live:
                self._ledger.packed -= self._packed
                self._packed = 0

    def there(self) -> list[tuple[int, Tensor | Elements]]:
        """What a replay can bring back, with its place: what is held itself, and some elements of what is recomputed."""
        if self.plain:
            return super().there()
        entries = [(i, entry) for i, entry in enumerate(self.tensors) if entry is not None and self.alive[i]]
        return [
            (i, entry.get() if self._is_there(entry) else self._samples[i])
            for i, entry in entries
            if self._is_there(entry) or i in self._samples
        ]

    def large(self) -> list[int]:
        """Places of large tensors with numbers that a replay can bring back."""
        if self.plain:
            return super().large()
        there = self.there()
        known = large_places([(i, t.numel()) for i, t in there if isinstance(t, Tensor) and is_measured(t) and is_allocated(t)])
        return sorted([*known, *(i for i, t in there if isinstance(t, Elements))])

    def elements(self, place: int) -> Elements | None:
        """Some elements of what is there."""
        if self.plain:
            return super().elements(place)
        found = dict(self.there()).get(place)
        return Elements(found) if isinstance(found, Tensor) and is_allocated(found) else found  # type: ignore[return-value]

    @staticmethod
    def _is_there(entry: Any) -> bool:
        if type(entry) is View:
            return type(entry.of) is not Dropped and is_allocated(entry.of.get())  # else there is no view of it
        return entry is not None and type(entry) is not Dropped

    def held(self) -> list[Tensor]:
        """What it holds and could let go of."""
        if self.plain:
            return super().held()
        handles: list[Any] = [entry.of if type(entry) is View else entry for entry in self.tensors]
        return [tensor for handle in handles if type(handle) in (Counted, Dropped) for tensor in handle.report()]

    def release(self) -> None:
        """Let go of every tensor that a replay can bring back."""
        if self.plain:
            super().release()
            return
        for index, looks in enumerate(self._looks):
            if not isinstance(looks, int):
                self.tensors[index] = None

    def _damaged(self) -> int | None:
        if self.plain:
            return super()._damaged()
        for index, entry in enumerate(self.tensors):
            handle: Any = entry.of if type(entry) is View else entry
            if type(handle) not in (Counted, Dropped) or index >= len(self.alive) or not self.alive[index]:
                continue
            if handle.current_version != handle.version:
                return index
        return None

    # -- replay

    def fill(self, call: Callable[[], _T], *, transient: bool) -> _T:
        """Run a replay whose saved tensors fill the slots.

        Raises:
            ReplayError: the replay saves other tensors than forward did.
            ModifiedError: it reads something that was modified since.
        """
        if not self._prepare():
            return super().fill(call, transient=transient)
        filling = Filling(self, entry=self._packed_again)
        result = self._record(call, filling)
        self._take(filling.saved, transient=transient)
        return result

    def fill_and_stop(self, call: Callable[[], object], tail: Tail, *, transient: bool) -> None:
        """The same; the replay ends as soon as all is there but the tail."""
        if not self._prepare():
            super().fill_and_stop(call, tail, transient=transient)
            return
        filling = Filling(self, tail.start, self._packed_again)
        entries = filling.saved
        if tail.start:
            with contextlib.suppress(EnoughError):
                self._record(call, filling)
        self._add_tail(entries, tail)
        frame = self._frame()
        if frame is not None:
            places = range(tail.start, len(entries))
            entries[tail.start :] = [
                None if entries[i] is None else frame.run.pack_inside(entries[i], self, i, frame.label) for i in places
            ]
        self._take(entries, transient=transient)

    def _prepare(self) -> bool:
        """Empty the slots; whether to fill them with handles: what is rebuilt is soon used up, and may raise the peak."""
        ledger = self._ledger
        self.release()
        self._samples.clear()
        self.task = current_pass()
        self.plain = ledger.all_held + self._packed <= max(self._budget.limit, ledger.peak_held)
        return not self.plain

    def hold(self) -> None:
        """Hold what was saved until backward comes."""
        if self.plain:
            super().hold()

    def _packed_again(self, tensor: Tensor, index: int) -> Tensor | Source:
        """What a replay has saved there, as these slots hold it."""
        if index < len(self._looks):
            self._verify(index, tensor)
        frame = self._frame()
        if frame is None or self._is_dead(index):  # as which it may be written to
            return without_graph(tensor)
        return self._pack(tensor, index, frame)

    def _is_dead(self, index: int) -> bool:
        """Whether nobody can ask for what is saved at a place: no recipe is to start from it."""
        if index >= len(self._looks) or self.alive[index]:
            return False
        return not isinstance(self._looks[index], int) or self._looks[index] == DEAD

    def _take(self, entries: list[Any], *, transient: bool) -> None:
        self.transient = transient
        self._check_count(len(entries))
        for index, entry in enumerate(entries):
            if self.alive[index]:
                self.tensors[index] = entry
        entries.clear()

    @staticmethod
    def _unpacked(packed: Any) -> Tensor:
        return packed.get() if isinstance(packed, Source) else packed
