"""Slots of a call that is run again, in which what cheap operations made is recomputed too."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

from torch import Tensor

from ..kinds import is_allocated, without_graph
from ..ops import Source
from ..storage import is_opaque, version_of
from ..streams import follow
from .guard import is_measured
from .handle import SlotHandle, ViewHandle
from .local import EnoughError, Filling
from .sketch import Elements
from .slots import ALONE, DEAD, Slots, kind_of, looks_of

if TYPE_CHECKING:
    from .frame import Frame
    from .plan import Facts
    from .tail import Tail
    from .value import Values

__all__ = ["LeanSlots"]

_T = TypeVar("_T")


class LeanSlots(Slots):
    """`Slots` that hold Values: of a tensor that has a recipe only what it starts from is there.

    The Values are found by these slots alone: what is saved elsewhere neither starts from them nor keeps them. To look for
    recipes takes time, so where the latest call's slots were let go of before backward came, forward holds what it saves as
    it is, and only what is rebuilt is looked at.
    """

    __slots__ = ("_budget", "_facts", "_plain", "_samples", "_seen", "_undecided", "values")

    def __init__(self, frame: Frame, position: int, facts: Facts) -> None:
        super().__init__(frame, position)
        self._facts = facts
        self._budget = frame.run.budget
        self._undecided = True  # neither let go of nor read so far
        self._plain = not facts.stays(self._budget.limit)  # holds tensors as they are
        self._samples: dict[int, Elements] = {}  # some elements of what is recomputed, for a comparison
        self._seen: list[tuple[Any, int, int]] = []  # looks, storage key, bytes
        self.values: Values = {}

    # -- forward

    def save(self, tensor: Tensor, frame: Frame) -> SlotHandle:
        """Pack a tensor that was saved during forward."""
        if self._plain:
            return super().save(tensor, frame)
        self._leaves.append(kind_of(tensor))
        self._versions.append(version_of(tensor))
        if is_opaque(tensor):
            self._seen.append((None, ALONE, 0))
        else:
            storage = tensor.untyped_storage()
            self._seen.append((looks_of(tensor), storage._cdata, storage.nbytes()))
        index = len(self.tensors)
        self.tensors.append(self._pack(tensor, index, frame))
        return SlotHandle(frame, self, index)

    def _pack(self, tensor: Tensor, index: int, frame: Frame) -> Source:
        """Hold it, or what recomputes it."""
        entry = frame.run.pack_inside(tensor, self, frame.label)
        if frame.compares and frame.run.guard.mode != "off" and not self._is_there(entry) and is_measured(tensor):
            self._samples[index] = Elements(tensor)
        return entry

    def close(self, frame: Frame, facts: Facts) -> None:
        """After the code has run: tell what is passed, and what a replay has to save again."""
        if self._plain:
            super().close(frame, facts)
            return
        expected: list[Any] = []
        for index, (looks, key, nbytes) in enumerate(self._seen):
            is_input = key in frame.input_keys
            dead = self.tensors[index] is None
            passed = dead or key == ALONE or (not is_input and (self._leaves[index] or key in frame.external))
            expected.append((DEAD if dead else key) if passed else (looks, is_input))
            self._keys.append(0)
            self._alive.append(not passed)
            if not passed:
                self.live += 1
                frame.saves_input |= is_input
                if key not in frame.packed:
                    frame.packed.add(key)
                    self._packed += nbytes
        self._seen = []
        self._looks = expected
        self._ledger.pack(self._packed)

    def is_at_hand(self, index: int) -> bool:
        """Whether what was saved at a place is held itself, and not to be made first."""
        return self.tensors[index] is not None and (self._plain or self._is_there(self.tensors[index]))

    # -- handles

    def read(self, index: int) -> Tensor:
        """The tensor in a slot that is filled.

        Raises:
            ModifiedError: it was modified in place since it was saved (Rule 8).
        """
        entry = self.tensors[index]
        if self._undecided:
            self._undecided = False
            self._facts.learn_stays(self._budget.limit, True)
        if not isinstance(entry, Source):
            return super().read(index)
        tensor = entry.get()
        if self.stream is not None:
            follow(tensor, self.stream)
        if self.transient and self._alive[index]:
            self.tensors[index] = None
        return tensor

    def kill(self, index: int) -> None:
        """The handle of a slot has died."""
        if self._plain:
            super().kill(index)
            return
        self.tensors[index] = None
        if index < len(self._alive) and self._alive[index]:
            self._alive[index] = 0
            self.live -= 1
            if not self.live:
                self._ledger.packed -= self._packed
                self._packed = 0

    def there(self) -> list[tuple[int, Tensor | Elements]]:
        """What a replay can bring back, with its place: what is held itself, and some elements of what is recomputed."""
        if self._plain:
            return super().there()
        entries = [(i, entry) for i, entry in enumerate(self.tensors) if entry is not None and self._alive[i]]
        return [
            (i, entry.get() if self._is_there(entry) else self._samples[i])
            for i, entry in entries
            if self._is_there(entry) or i in self._samples
        ]

    @staticmethod
    def _is_there(entry: Any) -> bool:
        value = getattr(entry, "value", entry)
        if value is None or getattr(value, "recipe", None) is not None:
            return False
        return value is entry or is_allocated(value.get())  # else there is no view of it

    def held(self) -> list[Tensor]:
        """What it holds and could let go of."""
        if self._plain:
            return super().held()
        values = [reference() for reference in self.values.values()]
        return [tensor for value in values if value is not None for _, _, tensor in value.report()]

    def release(self) -> None:
        """Let go of every tensor that a replay can bring back."""
        if self._undecided:
            self._undecided = False
            if not self._plain:  # nor would it stay if it took more room
                self._facts.learn_stays(self._budget.limit, False)
        if self._plain:
            super().release()
            return
        for index, looks in enumerate(self._looks):
            if not isinstance(looks, int):
                self.tensors[index] = None

    def _damaged(self) -> int | None:
        if self._plain:
            return super()._damaged()
        for index, entry in enumerate(self.tensors):
            value = entry.value if type(entry) is ViewHandle else entry
            if index < len(self._alive) and self._alive[index] and value is not None and value.current_version != value.version:
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
        filling = _Filling(self)
        result = self._record(call, filling)
        self._take(filling.saved, transient=transient)
        return result

    def fill_and_stop(self, call: Callable[[], object], tail: Tail, *, transient: bool) -> None:
        """The same; the replay ends as soon as all is there but the tail."""
        if not self._prepare():
            super().fill_and_stop(call, tail, transient=transient)
            return
        filling = _Filling(self, tail.start)
        entries = filling.saved
        if tail.start:
            with contextlib.suppress(EnoughError):
                self._record(call, filling)
        self._add_tail(entries, tail)
        frame = self._frame()
        if frame is not None:
            places = range(tail.start, len(entries))
            entries[tail.start :] = [
                None if entries[i] is None else frame.run.pack_inside(entries[i], self, frame.label) for i in places
            ]
        self._take(entries, transient=transient)

    def _prepare(self) -> bool:
        """Empty the slots; whether to fill them with Values: what is rebuilt is soon used up, and may raise the peak."""
        ledger = self._ledger
        self.release()
        self._samples.clear()
        self._plain = ledger.held + self._packed <= max(self._budget.limit, ledger.peak_held)
        if not self._plain:
            self._keys = [0] * len(self._keys)
        return not self._plain

    def packed_again(self, tensor: Tensor, index: int) -> Tensor | Source:
        """What a replay has saved there, as these slots hold it."""
        if index < len(self._looks):
            self._verify(index, tensor)
        frame = self._frame()
        if frame is None or self._is_dead(index):  # as which it may be written to
            return without_graph(tensor)
        return self._pack(tensor, index, frame)

    def _is_dead(self, index: int) -> bool:
        """Whether nobody can ask for what is saved at a place: no recipe is to start from it."""
        if index >= len(self._looks) or self._alive[index]:
            return False
        return not isinstance(self._looks[index], int) or self._looks[index] == DEAD

    def _take(self, entries: list[Any], *, transient: bool) -> None:
        self.transient = transient
        self._check_count(len(entries))
        for index, entry in enumerate(entries):
            if self._alive[index]:
                self.tensors[index] = entry
        entries.clear()

    @staticmethod
    def _unpacked(packed: Any) -> Tensor:
        return packed.get() if isinstance(packed, Source) else packed


class _Filling(Filling):
    """Of slots that hold Values."""

    __slots__ = ()

    def entry(self, tensor: Tensor, index: int) -> Tensor | Source:
        return cast(LeanSlots, self.slots).packed_again(tensor, index)
