"""Slots: the tensors that one stretch of code saved, and a replay of it saves again."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Collection, Sequence
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ...errors import ModifiedError, ReplayError, explain
from ...kinds import is_allocated, without_graph
from ...saved import Source, modified
from ...storage import is_leaf, is_opaque, is_parameter, storage_key, version_of, version_probe
from ...streams import follow, stream_of
from ..handles.local import EnoughError, Filling, pop_hooks, push_hooks
from ..handles.slot import SlotHandle
from ..policy.guard import is_again, is_measured
from ..policy.sketch import Elements, large_places
from ..tree import leaves_of

if TYPE_CHECKING:
    from ..policy.plan import Facts
    from ..recompute.statistics import Statistics
    from ..recompute.tail import Tail
    from .home import Framed

__all__ = ["ALONE", "DEAD", "EnoughError", "Foreseen", "Slots", "kind_of", "looks_of"]

_T = TypeVar("_T")
_Looks = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]
_Expected = tuple[_Looks, bool] | int  # what a slot looks like and whether it lies in the frame's input; of a passed one its key

_SHAPES = 16  # for which it is remembered what calls of one piece of code save
ALONE, DEAD = -1, -2  # in place of looks: a tensor that is left alone, one that nobody can ask for any more


class Foreseen:
    """What one call has saved, as the next ones will: then only what differs has to be looked for.

    Attributes:
        looks: of each tensor, whether it lies in the frame's input; of a passed one its storage's key.
        alive: whether it is brought back by a replay.
        pick: takes what is brought back from a sequence of all.
        seen: of these shapes, strides, dtypes and devices.
        passed: places and looks of the others.
        inputs: which of those that are brought back lie in the frame's input.
        kinds: `kind_of` each.
        large: of those that are brought back, those that may be looked at alone.
        live: how many are brought back.
        packed: bytes that plain autograd would hold for them, and for no slots of the frame before.
        rebuilt: bytes that they take when they are brought back.
        largest: bytes of the largest of these.
        saves_input: whether one lies in the frame's input.
        outputs: which lie in the memory of what the call returned.
    """

    __slots__ = (
        *(
            "alive",
            "inputs",
            "kinds",
            "large",
            "largest",
            "live",
            "looks",
            "outputs",
            "packed",
            "passed",
            "pick",
            "rebuilt",
            "saves_input",
            "seen",
        ),
    )

    def __init__(self) -> None:
        self.looks: list[_Expected] = []
        self.alive = bytearray()
        self.pick: Callable[[Sequence[Any]], Sequence[Any]] = _none
        self.seen: tuple[list[Any], ...] = [], [], [], []
        self.passed: list[tuple[int, int]] = []
        self.inputs: list[int] = []
        self.kinds = bytearray()
        self.large: list[int] = []
        self.live = 0
        self.packed = 0
        self.rebuilt = 0
        self.largest = 0
        self.saves_input = False
        self.outputs: tuple[int, ...] = ()

    def is_complete(self) -> Foreseen:
        """All was seen."""
        places = [place for place, alive in enumerate(self.alive) if alive]
        brought: list[Any] = [self.looks[place] for place in places]
        self.pick = itemgetter(*places) if len(places) > 1 else _none if not places else lambda all_: (all_[places[0]],)
        self.seen = tuple([looks[part] for looks, _ in brought] for part in range(4))
        self.passed = [(place, looks) for place, looks in enumerate(self.looks) if isinstance(looks, int)]
        self.inputs = [place for place, (_, is_input) in zip(places, brought, strict=True) if is_input]
        return self

    def is_seen(self, picked: Sequence[Any]) -> bool:
        """Whether what was picked has the shapes, strides, dtypes and devices of these."""
        shapes, strides, dtypes, devices = self.seen
        try:
            return (
                [*map(_shape, picked)] == shapes
                and [*map(_stride, picked)] == strides
                and [*map(_dtype, picked)] == dtypes
                and [*map(_device, picked)] == devices
            )
        except (AttributeError, RuntimeError):  # one is not there, or of another kind
            return False

    def is_at(self, versions: Sequence[int], picked: Sequence[Any]) -> bool:
        """Whether what was picked has its versions among those of all."""
        return [*map(_version, picked)] == [*self.pick(versions)]


class Slots:
    """What one stretch of code saved: a branch, or the glue around branches.

    In forward `save` takes the tensors and `close` looks at them. Then they are let go of, if earlier calls have shown that
    they will be before backward comes, or held (`hold`). A replay of the same code, run by `fill`, saves them again (Rule 9).
    Parameters, buffers, other leaves and opaque tensors are *passed*: they are never let go of.
    """

    __slots__ = (
        "_bulk",
        "_foreseen",
        "_frame",
        "_keys",
        "_kinds",
        "_ledger",
        "_looks",
        "_outputs",
        "_packed",
        "_raw",
        "_rebuilt",
        "alive",
        "asked",
        "largest",
        "live",
        "plain",
        "position",
        "quick",
        "statistics",
        "stream",
        "tensors",
        "transient",
        "versions",
    )

    def __init__(self, frame: Framed, position: int) -> None:
        self._frame = weakref.ref(frame)
        self._ledger = frame.run.ledger
        self.alive = bytearray()  # whether the handle may still ask
        self.versions: list[int] = []  # of what is there now
        self._kinds = bytearray()
        self._foreseen: Foreseen | None = None
        self._looks: list[_Expected] = []
        self._keys: list[int] = []  # of the storages that the ledger counts one by one; 0 for none
        self._bulk = 0  # bytes that it counts for all
        self._packed = 0  # bytes that plain autograd would hold
        self._rebuilt = 0  # bytes that they take when they are brought back
        self.largest = 0  # bytes of the largest of these
        self._raw = True  # while the call runs what is there still has its graph
        self._outputs: list[tuple[Tensor, int]] = []  # version counters of what was returned, and what they said
        self.asked = False  # whether forward itself has read one of them: it took a gradient
        self.live = 0  # handles of slots that are not passed
        self.quick = False  # filled with tensors, to be read and let go of without further ado
        self.plain = True  # tensors are held as they are; else it is handles that are held
        self.position = position
        self.statistics: Statistics | None = None  # which a replay need not compute
        self.stream: Any = None  # on which they were filled
        self.tensors: list[Any] = []  # tensors, or what gives them
        self.transient = False  # filled for one pass of a graph that is retained

    @property
    def frame(self) -> Framed | None:
        """Whose they are, as long as it is there."""
        return self._frame()

    # -- forward

    def save(self, tensor: Tensor, frame: Framed) -> SlotHandle:
        """Pack a tensor that was saved during forward."""
        self.tensors.append(tensor)
        self.versions.append(version_of(tensor))
        return SlotHandle((frame, self, len(self.tensors) - 1))

    def close(self, frame: Framed, facts: Facts, key: object, output: Any = None) -> None:
        """After the code has run: tell what is passed, and what a replay has to save again.

        Args:
            frame: whose they are.
            facts: of the code.
            key: calls with the same one mostly save the same.
            output: what it returned.
        """
        key = self.position, key, frame.modes.autocast if frame.modes is not None else None
        foreseen = facts.foreseen.get(key)
        if foreseen is None or not self._is_as(foreseen, frame):
            if len(facts.foreseen) > _SHAPES:
                facts.foreseen.clear()
            foreseen = facts.foreseen[key] = self._look(frame, output)
        self._foreseen, self._looks, self._kinds = foreseen, foreseen.looks, foreseen.kinds
        self.alive = bytearray(foreseen.alive)
        self.live = foreseen.live
        self._rebuilt, self.largest = foreseen.rebuilt, foreseen.largest
        frame.saves_input |= foreseen.saves_input
        self._outputs = [(version_probe(self.tensors[index]), self.versions[index]) for index in foreseen.outputs]
        self._packed = foreseen.packed
        self._ledger.pack(foreseen.packed)
        frame.run.note_saved(len(self.tensors))

    def _is_as(self, foreseen: Foreseen, frame: Framed) -> bool:
        """Whether what was saved is what was foreseen, and was not modified since."""
        tensors = self.tensors
        if len(tensors) != len(foreseen.looks):
            return False
        picked, inputs = foreseen.pick(tensors), frame.input_keys
        if not foreseen.is_seen(picked) or not foreseen.is_at(self.versions, picked):
            return False
        for place, key in foreseen.passed:
            if not _is_passed_as(tensors[place], key):
                return False
        return inputs.issuperset([tensors[place].untyped_storage()._cdata for place in foreseen.inputs])

    def _look(self, frame: Framed, output: Any) -> Foreseen:
        """Look at everything."""
        found, external, inputs = Foreseen(), frame.external, frame.input_keys
        outputs = {storage_key(t) for t in leaves_of(output) if isinstance(t, Tensor) and not is_opaque(t)}
        own: dict[int, int] = {}
        places = []
        for index, tensor in enumerate(self.tensors):
            kind = 0 if tensor is None else kind_of(tensor)
            found.kinds.append(kind)
            storage = tensor.untyped_storage() if tensor is not None and not is_opaque(tensor) else None
            key = storage._cdata if storage is not None else DEAD if tensor is None else ALONE
            is_input = key in inputs
            if storage is None or (not is_input and (kind or key in external)):
                found.looks.append(key)
                found.alive.append(0)
                continue
            found.looks.append((looks_of(tensor), is_input))
            found.alive.append(1)
            found.saves_input |= is_input
            if key in outputs:
                places.append(index)
            own[key] = storage.nbytes()
        found.live = sum(found.alive)
        found.outputs = tuple(places)
        found.rebuilt = sum(size for key, size in own.items() if key not in inputs)
        found.largest = max(own.values(), default=0)
        found.packed = sum(size for key, size in own.items() if key not in frame.packed)
        frame.packed.update(own)
        alive = [(place, tensor) for place, tensor in enumerate(self.tensors) if found.alive[place]]
        found.large = large_places([(place, tensor.numel()) for place, tensor in alive if is_measured(tensor)])
        return found.is_complete()

    def hold(self) -> None:
        """Hold what was saved until backward comes, or the next block opens: without its graph (Rule 2)."""
        if not self._raw:
            return
        self._raw = False
        self._keys = keys = [0] * len(self.tensors)
        hold = self._ledger.hold_tensor
        for index, tensor in enumerate(self.tensors):
            if tensor is None:
                continue
            self.tensors[index] = kept = without_graph(tensor)
            if index < len(self.alive) and self.alive[index]:
                keys[index] = hold(kept)

    # -- handles

    def read(self, index: int) -> Tensor:
        """The tensor in a slot that is filled.

        Raises:
            ModifiedError: it was modified in place since it was saved (Rule 8).
        """
        tensor: Tensor | None = self.tensors[index]
        if tensor is None:
            raise self._mismatch(index, "a saved tensor", "none", "report this as a bug")
        version = tensor._version if type(tensor) is Tensor else version_of(tensor)
        if version != self.versions[index]:
            raise self._modified(index, tensor)
        if tensor.requires_grad:
            return without_graph(tensor)
        if self.stream is not None:
            follow(tensor, self.stream)
        if self.transient and self.alive[index]:
            self._forget(index)
        return tensor

    def _forget(self, index: int) -> None:
        if self._keys and self._keys[index] and self.tensors[index] is not None:
            self._ledger.drop(self._keys[index])
        self.tensors[index] = None

    def kill(self, index: int) -> None:
        """The handle of a slot has died."""
        if index >= len(self.alive) or not self.alive[index]:  # not closed yet, or passed
            self.tensors[index] = None
            return
        self._forget(index)
        self.alive[index] = 0
        self.live -= 1
        if not self.live:
            self._count_bulk(0)
            self._ledger.packed -= self._packed
            self._packed = 0

    def _count_bulk(self, nbytes: int) -> None:
        """What was brought back is counted as a whole until its last handle dies."""
        if nbytes != self._bulk:
            self._ledger.add(nbytes - self._bulk)
            self._bulk = nbytes

    @property
    def rebuilt_bytes(self) -> int:
        """What they take when they are brought back."""
        return self._rebuilt

    @property
    def packed_bytes(self) -> int:
        """What plain autograd would hold for them, and for no slots of the frame before."""
        return self._packed

    @property
    def spared_bytes(self) -> int:
        """What plain tensors would take more than what is held."""
        return 0

    def there(self) -> list[tuple[int, Tensor | Elements]]:
        """What is held itself, of what a replay can bring back, with its place."""
        return [(i, tensor) for i, tensor in enumerate(self.tensors) if tensor is not None and self.alive[i]]

    def large(self) -> list[int]:
        """Places of large tensors with numbers that a replay can bring back."""
        return self._foreseen.large if self._foreseen is not None else []

    def elements(self, place: int) -> Elements | None:
        """Some elements of what is there."""
        tensor = self.tensors[place]
        return Elements(tensor) if tensor is not None and is_allocated(tensor) else None

    def __len__(self) -> int:
        """How many tensors were saved."""
        return len(self._looks)

    @property
    def saves_input(self) -> bool:
        """Whether something that was saved lies in the frame's input."""
        return any(looks[1] for looks in self._looks if not isinstance(looks, int))

    def is_let_go(self, index: int) -> bool:
        """Whether what is at a place is let go of, to be brought back by a replay."""
        return bool(self.alive[index]) and self.tensors[index] is not None

    def passed(self, keys: Collection[int]) -> list[tuple[int, int]]:
        """Where parameters and buffers were saved that lie in these storages, and in which."""
        return [(index, looks) for index, looks in enumerate(self._looks) if isinstance(looks, int) and looks in keys]

    def looks(self, index: int) -> _Looks | None:
        """What was saved at a place, as long as it is held; ``None`` if nothing was, or nobody can ask for it."""
        if not 0 <= index < len(self._looks) or self.tensors[index] is None:
            return None
        looks = self._looks[index]
        if not isinstance(looks, int):
            return looks[0]
        return None if looks in (ALONE, DEAD) else looks_of(self.entry(index))

    def is_at_hand(self, index: int) -> bool:
        """Whether what was saved at a place is held itself, and not to be made first."""
        return self.tensors[index] is not None

    def entry(self, index: int) -> Tensor:
        """The tensor that is held at a place."""
        entry = self.tensors[index]
        return entry.get() if isinstance(entry, Source) else without_graph(entry)

    def held(self) -> list[Tensor]:
        """What it holds and could let go of."""
        return [tensor for tensor, alive in zip(self.tensors, self.alive, strict=False) if alive and tensor is not None]

    def release(self) -> None:
        """Let go of every tensor that a replay can bring back."""
        self._count_bulk(0)
        self.quick = False
        foreseen = self._foreseen
        if foreseen is None:  # nothing was saved
            return
        before, self.tensors = self.tensors, [None] * len(self.tensors)
        for place, key in foreseen.passed:
            tensor = before[place]
            plain = key == DEAD or self._kinds[place] or not self._raw
            self.tensors[place] = tensor if plain else without_graph(tensor)
        self._raw = False
        for key, tensor in zip(self._keys, before, strict=True) if self._keys else ():
            if key and tensor is not None:
                self._ledger.drop(key)
        self._keys = []

    def intact(self) -> bool:
        """Whether no saved tensor was modified in place since; if one was, its backward must raise."""
        return self._damaged() is None

    def _damaged(self) -> int | None:
        foreseen = self._foreseen
        complete = self._raw and foreseen is not None and self.live == foreseen.live
        if foreseen is not None and complete and foreseen.is_at(self.versions, foreseen.pick(self.tensors)):
            return None
        for index, tensor in enumerate(self.tensors):
            if tensor is not None and index < len(self.alive) and self.alive[index] and tensor._version != self.versions[index]:
                return index
        return None

    def check_outputs(self) -> None:
        """Raise if what was saved, and returned, was modified since.

        Raises:
            ModifiedError: it was (Rule 8).
        """
        for probe, version in self._outputs:
            if probe._version != version:
                raise modified(f"an output of {self._label}", probe.shape, version, probe._version)

    # -- replay

    def fill(self, call: Callable[[], _T], *, transient: bool) -> _T:
        """Run a replay whose saved tensors fill the slots.

        Raises:
            ReplayError: the replay saves other tensors than forward did.
            ModifiedError: it reads something that was modified since.
        """
        filling = Filling(self)
        result = self._record(call, filling)
        self.transient = transient
        self._accept(filling.saved)
        return result

    def fill_and_stop(self, call: Callable[[], object], tail: Tail, *, transient: bool) -> None:
        """The same; the replay ends as soon as all is there but the tail."""
        filling = Filling(self, tail.start)
        if tail.start:
            with contextlib.suppress(EnoughError):
                self._record(call, filling)
        self.transient = transient
        self._add_tail(filling.saved, tail)
        self._accept(filling.saved)

    def _add_tail(self, saved: list[Any], tail: Tail) -> None:
        """Complete what a replay has saved that was to end there."""
        if len(saved) == tail.start:
            saved += [tail[index] if alive else None for index, alive in enumerate(self.alive) if index >= tail.start]

    def _record(self, call: Callable[[], _T], filling: Filling) -> _T:
        frame = self._frame()
        self.stream = stream_of(frame.device) if frame is not None else None
        push_hooks(filling.pack, self._unpacked)
        try:
            if self.statistics is None:
                return call()
            with self.statistics.given():
                return call()
        finally:
            pop_hooks()
            filling.slots = None

    @staticmethod
    def _unpacked(packed: Any) -> Tensor:
        """What a replay saved, for a backward inside of it."""
        return packed  # type: ignore[no-any-return]

    def _accept(self, saved: list[Any]) -> None:
        self._check_count(len(saved))
        self.release()
        foreseen, alive = self._foreseen, self.alive
        if foreseen is not None and self._is_again(saved, foreseen):
            for place, _ in foreseen.passed:
                saved[place] = self.tensors[place]
            if self.live != foreseen.live:
                for place in [place for place, once in enumerate(foreseen.alive) if once and not alive[place]]:
                    saved[place] = None
            self.tensors = [*saved]
            self.quick = not self.transient
        else:
            for index, tensor in enumerate(saved):
                if tensor is not None and self._verify(index, tensor) and alive[index]:  # else it is of a tail, and passed
                    self.tensors[index] = tensor
        self._count_bulk(self._rebuilt if self.live else 0)
        saved.clear()  # a buffer may keep the graph of a replay, and what packed for it

    def _is_again(self, saved: Sequence[Any], foreseen: Foreseen) -> bool:
        """Whether what a replay has saved is what forward saved, as far as can be seen: most come here."""
        for place in foreseen.inputs:  # whose version differs at replay
            self.versions[place] = version_of(saved[place])
        picked = foreseen.pick(saved)
        if not foreseen.is_seen(picked) or not foreseen.is_at(self.versions, picked):
            return False
        for place, key in foreseen.passed:
            if saved[place] is not None:
                self._check_passed(saved[place], key, place)
        return True

    def _check_count(self, count: int) -> None:
        if count != len(self._looks):
            index = min(count, len(self._looks))
            raise self._mismatch(index, f"{len(self._looks)} saved tensors", f"{count}", _REPEATABLE)

    def _verify(self, index: int, tensor: Tensor) -> bool:
        """Raise unless a replay has saved what forward did; whether it is a slot that is let go of."""
        looks = self._looks[index]
        if isinstance(looks, int):
            self._check_passed(tensor, looks, index)
            return False
        expected, is_input = looks
        if looks_of(tensor) != expected:
            raise self._looks_different(expected, tensor, index)
        version = tensor._version
        if is_input:  # whose version differs at replay
            self.versions[index] = version
        elif version != self.versions[index] and self.alive[index]:
            if self._keys and tensor.untyped_storage()._cdata == self._keys[index]:
                raise self._modified(index, tensor)
            self.versions[index] = version  # a replay has made it, and another layout of its input may take one more step
        return True

    def _check_passed(self, tensor: Tensor, key: int, index: int) -> None:
        if key == DEAD:
            return
        if is_opaque(tensor) != (key == ALONE):
            raise self._mismatch(index, "the same kind of tensor", type(tensor).__name__, _REPEATABLE)
        if key != ALONE and key != tensor.untyped_storage()._cdata:
            frame = self._frame()
            if frame is not None and (key in frame.moved or self._is_made_again(tensor, index, frame)):
                return
            remedy = "leave parameters and buffers in place until backward"
            raise self._mismatch(index, "the same parameter or buffer", f"another tensor of shape {tuple(tensor.shape)}", remedy)

    def _is_made_again(self, tensor: Tensor, index: int, frame: Framed) -> bool:
        """Whether a leaf that forward made inside is what the replay has made: a gradient is taken inside."""
        if self._kinds[index] != _LEAF or self.tensors[index] is None:
            return False
        return is_again(tensor.detach(), self.entry(index), exact=frame.exact, computed=frame.coarsest(tensor.dtype))

    # -- errors

    @property
    def _label(self) -> str:
        frame = self._frame()
        return frame.label if frame is not None else "a block"

    def _modified(self, index: int, tensor: Tensor) -> ModifiedError:
        passed = index < len(self._looks) and type(self._looks[index]) is int
        what = f"a parameter, buffer or leaf in {self._label}" if passed else f"slot {index} of {self._label}"
        return modified(what, tensor.shape, self.versions[index], version_of(tensor))

    def _looks_different(self, looks: _Looks, tensor: Tensor, index: int) -> ReplayError:
        names = ("shape", "stride", "dtype", "device")
        now = looks_of(tensor)
        differ = [(n, e, g) for n, e, g in zip(names, looks, now, strict=True) if e != g]
        expected = ", ".join(f"{name} {_plain(value)}" for name, value, _ in differ)
        got = ", ".join(f"{name} {_plain(value)}" for name, _, value in differ)
        return self._mismatch(index, expected, got, _REPEATABLE)

    def _mismatch(self, index: int, expected: str, got: str, remedy: str) -> ReplayError:
        return ReplayError(explain(f"replay of {self._label}, slot {index}", expected=expected, got=got, remedy=remedy))


def _is_passed_as(tensor: Tensor | None, key: int) -> bool:
    """Whether a passed tensor is the one of this storage, is left alone, or is not there."""
    if tensor is None:
        return key == DEAD
    if is_opaque(tensor):
        return key == ALONE
    return bool(key == tensor.untyped_storage()._cdata)


_LEAF, _PARAMETER = 1, 2


def kind_of(tensor: Tensor) -> int:
    """0 for what some operation has made, or is left alone, else whether it is a parameter's memory or another leaf's."""
    if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
        return 0
    return 0 if not is_leaf(tensor) else _PARAMETER if is_parameter(tensor) else _LEAF


def looks_of(tensor: Tensor) -> _Looks:
    """What shows whether a replay has saved the same kind of tensor."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


_shape, _dtype, _device, _version = map(attrgetter, ("shape", "dtype", "device", "_version"))
_stride = torch.Tensor.stride


def _none(_: Sequence[Any]) -> Sequence[Any]:
    return ()


_REPEATABLE = "make the branch do the same in every call with the same input, or exclude the block with keep="


def _plain(value: object) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value)
