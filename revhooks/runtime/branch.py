"""Branches: sub-calls of a frame with their own slots and their own state."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..errors import ModifiedError, ReplayError, explain
from ..generators import Rng
from ..state import PLAIN, Buffers, Modes
from ..storage import is_opaque
from .handle import Handle, LeafHandle, SlotHandle
from .value import modified

if TYPE_CHECKING:
    from .frame import Frame

__all__ = ["CallState", "Slots", "is_leaf"]

_T = TypeVar("_T")


class Slot(NamedTuple):
    """What a replay has to save again at the same place (Rule 9)."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    stride: tuple[int, ...]
    version: int
    input: bool  # lies in the frame's input, whose version differs at replay


class Slots:
    """What one stretch of code saved: a branch, or the glue around branches.

    In forward `save` fills it; a replay of the same code, run by `fill`, fills it again. What a place is expected to
    hold is a `Slot`, the storage key of a parameter, buffer or leaf that is passed through, or ``None`` for what
    is left alone.
    """

    __slots__ = (
        "_expected",
        "_filled",
        "_frame",
        "_keys",
        "_ledger",
        "_packed",
        "_versions",
        "live",
        "position",
        "tensors",
        "transient",
    )

    def __init__(self, frame: Frame, position: int) -> None:
        self._frame = weakref.ref(frame)
        self._ledger = frame.run.ledger
        self._versions: list[int] = []
        self._keys: list[int] = []  # of the storages that the ledger counts
        self._filled = 0
        self._packed = 0  # bytes that plain autograd would hold
        self._expected: list[Slot | int | None] = []
        self.live: set[int] = set()  # slots whose handle may still ask
        self.position = position
        self.tensors: list[Tensor | None] = []
        self.transient = False  # filled for one pass of a graph that is retained

    def save(self, tensor: Tensor, frame: Frame) -> Handle:
        """Pack a tensor that was saved during forward."""
        if is_opaque(tensor):
            return self._pass(tensor, None)
        storage = tensor.untyped_storage()
        key = storage._cdata
        is_input = key in frame.input_keys
        if is_input:
            frame.saves_input = True
        elif key in frame.external or is_leaf(tensor):
            return self._pass(tensor, key)
        detached = tensor.detach()  # Rule 2
        version = tensor._version
        index = len(self.tensors)
        self._expected.append(Slot(tensor.shape, tensor.dtype, tensor.device, tensor.stride(), version, is_input))
        self.tensors.append(detached)
        self._versions.append(version)
        self.live.add(index)
        self._keys.append(self._ledger.hold(detached))
        if key not in frame.packed:
            frame.packed.add(key)
            self._count_packed(storage.nbytes(), frame)
        return SlotHandle(frame, self, index)

    def _pass(self, tensor: Tensor, key: int | None) -> Handle:
        self._expected.append(key)
        self.tensors.append(None)
        self._versions.append(0)
        self._keys.append(0)
        return LeafHandle(tensor)

    def _count_packed(self, nbytes: int, frame: Frame) -> None:
        self._packed += nbytes
        self._ledger.pack(nbytes)
        if frame.run.observer is not None:
            frame.run.observer(nbytes, True)

    @property
    def _label(self) -> str:
        frame = self._frame()
        return frame.label if frame is not None else "a block"

    def read(self, index: int) -> Tensor:
        """The tensor in a slot that is filled.

        Raises:
            ModifiedError: it was modified in place since it was saved (Rule 8).
        """
        tensor = self.tensors[index]
        if tensor is None:
            raise self._mismatch(index, "a saved tensor", "none", "report this as a bug")
        if tensor._version != self._versions[index]:
            raise self._modified(index, tensor, self._versions[index])
        if self.transient:
            self._ledger.drop(self._keys[index])
            self.tensors[index] = None
        return tensor

    def _modified(self, index: int, tensor: Tensor, version: int) -> ModifiedError:
        return modified(f"slot {index} of {self._label}", tensor.shape, version, tensor._version)

    def kill(self, index: int) -> None:
        """The handle of a slot has died."""
        tensor = self.tensors[index]
        if tensor is not None:
            self._ledger.drop(self._keys[index])
            self.tensors[index] = None
        self.live.discard(index)
        if not self.live:
            self._ledger.packed -= self._packed
            self._packed = 0

    def release(self) -> None:
        """Let go of every tensor."""
        tensors, drop = self.tensors, self._ledger.drop
        for index, tensor in enumerate(tensors):
            if tensor is not None:
                drop(self._keys[index])
                tensors[index] = None

    def intact(self) -> bool:
        """Whether no saved tensor was modified in place since; if one was, its backward must raise."""
        for tensor, version in zip(self.tensors, self._versions, strict=True):
            if tensor is not None and tensor._version != version:
                return False
        return True

    def fill(self, call: Callable[[], _T], *, transient: bool) -> _T:
        """Run a replay whose saved tensors fill the slots.

        Raises:
            ReplayError: the replay saves other tensors than forward did.
            ModifiedError: it reads something that was modified since.
        """
        self._filled = 0
        self.transient = transient
        with saved_tensors_hooks(self._fill, _identity):
            result = call()
        if self._filled != len(self._expected):
            raise self._mismatch(self._filled, f"{len(self._expected)} saved tensors", f"{self._filled}", _REPEATABLE)
        if not self.intact():
            index = next(
                i for i, (t, v) in enumerate(zip(self.tensors, self._versions, strict=True)) if t is not None and t._version != v
            )
            raise self._modified(index, self.tensors[index], self._versions[index])  # type: ignore[arg-type]
        return result

    def _fill(self, tensor: Tensor) -> Tensor:
        index = self._filled
        if index >= len(self._expected):
            raise self._mismatch(index, f"{len(self._expected)} saved tensors", "more", _REPEATABLE)
        self._filled = index + 1
        slot = self._expected[index]
        if type(slot) is not Slot:
            self._check_passed(tensor, slot, index)
            return tensor.detach()
        shape, dtype, device, stride, version, is_input = slot
        if tensor.shape != shape or tensor.dtype != dtype or tensor.stride() != stride or tensor.device != device:
            raise self._looks_different(slot, tensor, index)
        now = tensor._version
        if now != version and not is_input:
            raise self._modified(index, tensor, version)
        detached = tensor.detach()
        if index in self.live:
            if self.tensors[index] is not None:
                self._ledger.drop(self._keys[index])
            self.tensors[index] = detached
            self._versions[index] = now
            self._keys[index] = self._ledger.hold(detached)
        return detached

    def _check_passed(self, tensor: Tensor, key: Slot | int | None, index: int) -> None:
        if is_opaque(tensor) != (key is None):
            raise self._mismatch(index, "the same kind of tensor", type(tensor).__name__, _REPEATABLE)
        if key is not None and key != tensor.untyped_storage()._cdata:
            frame = self._frame()
            if frame is not None and key in frame.moved:
                return
            remedy = "leave parameters and buffers in place until backward"
            raise self._mismatch(index, "the same parameter or buffer", f"another tensor of shape {tuple(tensor.shape)}", remedy)

    def _looks_different(self, slot: Slot, tensor: Tensor, index: int) -> ReplayError:
        names = ("shape", "dtype", "device", "stride")
        looks = (tensor.shape, tensor.dtype, tensor.device, tensor.stride())
        differ = [(n, e, g) for n, e, g in zip(names, slot[:4], looks, strict=True) if e != g]
        expected = ", ".join(f"{name} {_plain(value)}" for name, value, _ in differ)
        got = ", ".join(f"{name} {_plain(value)}" for name, _, value in differ)
        return self._mismatch(index, expected, got, _REPEATABLE)

    def _mismatch(self, index: int, expected: str, got: str, remedy: str) -> ReplayError:
        return ReplayError(explain(f"replay of {self._label}, slot {index}", expected=expected, got=got, remedy=remedy))


_REPEATABLE = "make the branch do the same in every call with the same input, or exclude the block with keep="


def _plain(value: object) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value)


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def is_leaf(tensor: Tensor) -> bool:
    """Whether the memory is a parameter's or another leaf's, which is held anyway (Rule 3: a view counts)."""
    base = tensor._base
    if base is None:
        base = tensor
    return isinstance(base, nn.Parameter) or (base.requires_grad and base.is_leaf)


class CallState:
    """What a call depends on besides its arguments, so that it can be repeated exactly (Rules 6 and 7)."""

    __slots__ = ("_buffers", "_device", "_kinds", "_modes", "_tracker", "drew", "foreseen", "grad", "rng", "rng_after")

    def __init__(self, frame: Frame, root: nn.Module, *, local: bool = False) -> None:
        self._device = frame.device
        self._buffers = Buffers(root, frame.external)
        self._modes = Modes.of_call(frame.device) if local else frame.modes
        self.grad = torch.is_grad_enabled()
        self._tracker = frame.run.rng
        self.rng: Rng | None = self._tracker.capture(frame.device, frame.draws) if frame.draws else None
        self._kinds = frame.draws
        self.drew: frozenset[str] = frozenset()
        self.rng_after: Rng | None = None
        self.foreseen = True

    def finish(self, moved: set[int]) -> None:
        """After the call: note whether it drew random numbers, and what it changed."""
        if self.rng is not None:
            self.rng_after = self._tracker.capture(self._device, self._kinds)
            self.drew = self.rng.moved(self.rng_after)
            if not self.drew:
                self.rng = self.rng_after = None
        self.foreseen = self._buffers.finish()
        self._buffers.add_moved(moved)

    def check(self, label: str) -> None:
        """Raise if a parameter or buffer that the call read was modified since (Rule 8).

        Raises:
            ModifiedError: one was.
        """
        name = self._buffers.modified()
        if name is not None:
            raise ModifiedError(
                explain(
                    f"{label}: parameter or buffer {name!r} has been modified by an inplace operation",
                    expected="the values that forward used, for its activations are rebuilt from them",
                    got="values changed since",
                    remedy="run backward before optimizer.step() or a call that changes it",
                )
            )

    def repeat(self, call: Callable[[], _T], *, grad: bool) -> _T:
        """Run ``call`` with the generators, modes and buffers that the call saw; leave them as they are now."""
        now = None
        if self.rng is not None:
            now = self._tracker.capture(self._device, self._kinds)
            self.rng.restore()
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(grad)
        try:
            modes = self._modes if self._modes is not None else Modes.of_call(self._device) and PLAIN
            if modes is None:
                return self._with_buffers(call)
            with modes.restored():
                return self._with_buffers(call)
        finally:
            torch._C._set_grad_enabled(before)
            if now is not None:
                now.restore()

    def _with_buffers(self, call: Callable[[], _T]) -> _T:
        if self._buffers.trivial:
            return call()
        with self._buffers.replayed():
            return call()
