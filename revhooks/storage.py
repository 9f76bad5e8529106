"""Identity of a tensor's memory, its geometry, and how many bytes are held.

Identity is storage (Rule 3): never ``id()``, never ``data_ptr()``, never an attribute on the tensor.
A storage's key is unique as long as the storage, or a weak reference to it, lives.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter

__all__ = [
    "BITS",
    "NO_STORAGE",
    "PLAIN_TYPES",
    "Geometry",
    "Held",
    "Ledger",
    "compact",
    "is_alone",
    "is_leaf",
    "is_opaque",
    "is_parameter",
    "own_storage_key",
    "reserve",
    "restride",
    "storage_key",
    "stride_of",
    "version_of",
    "version_probe",
    "versions_of",
]


class Geometry(NamedTuple):
    """Where a strided tensor lies in its storage, in elements."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> Geometry:
        """The geometry of ``tensor``."""
        return cls(tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    @property
    def interval(self) -> tuple[int, int]:
        """First element of the storage that is touched, and one past the last."""
        last = sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))
        return self.offset, self.offset + last + 1

    @property
    def dense(self) -> bool:
        """Whether every element of the interval is touched, and touched once."""
        expected = 1
        for stride, size in sorted(zip(self.stride, self.size, strict=True)):
            if size == 1:
                continue
            if stride != expected:
                return False
            expected *= size
        return True


PLAIN_TYPES = (Tensor, Parameter)
NO_STORAGE = 0  # in place of a key, of a tensor that has no storage of its own to speak of


def storage_key(tensor: Tensor) -> int:
    """The key of the tensor's storage: unique while the storage or a weak reference to it lives."""
    return int(tensor.untyped_storage()._cdata)


def own_storage_key(tensor: Tensor) -> int:
    """The same; of a tensor that is left alone `NO_STORAGE`."""
    return NO_STORAGE if is_opaque(tensor) else storage_key(tensor)


def reserve(tensor: Tensor) -> StorageWeakRef:
    """Keep the key of the tensor's storage from being reused, without keeping its memory."""
    return StorageWeakRef(tensor.untyped_storage())


def is_opaque(tensor: Tensor) -> bool:
    """Whether the tensor is left alone: it is not plain elements in a storage of its own, each at its place.

    Subclasses, sparse, mkldnn, nested and quantized tensors, lazy conjugates and negatives.
    """
    kind = type(tensor)
    return (
        (kind is not Tensor and kind is not Parameter)
        or tensor.layout is not torch.strided
        or tensor.is_conj()
        or tensor.is_neg()
        or tensor.is_nested
        or tensor.is_quantized
    )


_NEAR = frozenset({"cpu"})


def is_near(device: torch.device) -> bool:
    """Whether values of tensors there can be read without waiting for an accelerator."""
    return device.type in _NEAR


def is_parameter(tensor: Tensor) -> bool:
    """Whether the memory is a parameter's."""
    return isinstance(tensor if tensor._base is None else tensor._base, Parameter)


def is_leaf(tensor: Tensor) -> bool:
    """Whether the memory is a parameter's or another leaf's, which is held anyway (Rule 3: a view counts)."""
    base = tensor._base
    if base is None:
        base = tensor
    return base.is_leaf and (base.requires_grad or isinstance(base, Parameter))


def version_probe(tensor: Tensor) -> Tensor:
    """An empty tensor that shares the version counter of ``tensor`` and none of its memory.

    Example:
        >>> x = torch.zeros(3)
        >>> probe = version_probe(x)
        >>> before = probe._version
        >>> probe._version == before, x.add_(1) is x, probe._version == before + 1, probe.numel()
        (True, True, True, 0)
    """
    probe = tensor.detach()
    key = (tensor.dtype, tensor.device)
    empty = _EMPTY.get(key)
    if empty is None:
        empty = _EMPTY[key] = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    probe.data = empty  # swaps the memory and leaves the shared version counter in place
    return probe


_EMPTY: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def version_of(tensor: Tensor) -> int:
    """The tensor's version; 0 for an inference tensor, which has none."""
    if type(tensor) in PLAIN_TYPES:
        return 0 if tensor.is_inference() else tensor._version
    with torch._C.DisableTorchFunctionSubclass():
        return 0 if tensor.is_inference() else tensor._version


_version: Callable[[Tensor], int] = attrgetter("_version")


def versions_of(tensors: list[Tensor]) -> list[int]:
    """The versions of many tensors."""
    try:
        return [*map(_version, tensors)]
    except RuntimeError:  # an inference tensor
        return [version_of(tensor) for tensor in tensors]


def stride_of(tensor: Tensor) -> tuple[int, ...] | None:
    """The strides of a tensor; ``None`` where it has none to speak of."""
    return None if is_opaque(tensor) else tensor.stride()


def compact(tensor: Tensor) -> Tensor:
    """``tensor`` itself when contiguous, else a dense copy in its own memory order."""
    return tensor if tensor.is_contiguous() else tensor.clone(memory_format=torch.preserve_format)


_LARGE = 1 << 14  # elements; below, what would be spared is not worth the question


def is_alone(tensor: Tensor) -> bool:
    """Whether the tensor is large, and the only one that lies in its memory, which it covers.

    Example:
        >>> x = torch.zeros(1 << 15)
        >>> is_alone(x)
        True
        >>> other = x.detach()
        >>> is_alone(x)
        False
    """
    if tensor.numel() < _LARGE or tensor.is_meta or tensor.is_inference():
        return False
    storage = tensor.untyped_storage()
    # itself, and the storage's object here
    return tensor.nbytes == storage.nbytes() and int(torch._C._storage_Use_Count(storage._cdata)) == 2


def restride(tensor: Tensor, stride: tuple[int, ...] | None) -> Tensor:
    """``tensor`` in the given strides, if any; a copy only when it has others.

    Strides whose elements overlap, as of an expanded tensor, are given back by expanding again.
    """
    if stride is None or tensor.stride() == stride:
        return tensor
    if 0 in stride:
        whole = [slice(0, 1) if not step else slice(None) for step in stride]
        narrow = restride(tensor[tuple(whole)], tuple(step or 1 for step in stride))
        return narrow.expand(tensor.size())
    result = torch.empty_strided(tensor.size(), stride, dtype=tensor.dtype, device=tensor.device)
    return result.copy_(tensor).data  # of version 0, as something new


BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Ledger:
    """Accounted bytes of a run, by unique storage.

    Attributes:
        held: bytes held for backward now.
        peak_held: the most that was ever held at once.
        packed: bytes that plain autograd would hold now.
        peak_packed: the most that plain autograd would have held at once.
        offloaded: bytes that wait in host memory now.
        peak_offloaded: the most that did at once.

    Example:
        >>> ledger = Ledger()
        >>> x = torch.zeros(4)
        >>> keys = [ledger.hold_tensor(x), ledger.hold_tensor(x[1:])]
        >>> ledger.held
        16
        >>> for key in keys: ledger.drop(key)
        >>> ledger.held, ledger.peak_held
        (0, 16)
    """

    __slots__ = (
        "_entries",
        "_saved",
        "_settled",
        "_stale",
        "_uncounted",
        "fresh",
        "held",
        "offloaded",
        "packed",
        "peak_held",
        "peak_offloaded",
        "peak_packed",
    )

    def __init__(self) -> None:
        self.held = 0
        self.peak_held = 0
        self.packed = 0
        self.peak_packed = 0
        self.offloaded = 0
        self.peak_offloaded = 0
        self.fresh: list[Any] = []  # weak references to what was packed since the handles were last counted
        self._settled: list[tuple[Any, int, int]] = []  # and to what was before, with key and bytes of its storage
        self._uncounted = 0  # bytes of these that no entry counts
        self._saved = 0  # bytes of these that plain autograd would hold
        self._stale = False
        self._entries: dict[int, list[int]] = {}  # key -> references, bytes

    def hold_tensor(self, tensor: Tensor) -> int:
        """Count one more reference to the tensor's storage; returns its key, for `drop`."""
        storage = tensor.untyped_storage()
        key: int = storage._cdata
        self.hold(key, storage.nbytes())
        return key

    def hold(self, key: int, nbytes: int) -> None:
        """Count one more reference to a storage of so many bytes, whose key this is."""
        entry = self._entries.get(key)
        if entry is not None:
            entry[0] += 1
            return
        self._entries[key] = [1, nbytes]
        self.add(nbytes)

    def add(self, nbytes: int) -> None:
        """So many bytes more are held, of which the storages are not told."""
        self.held += nbytes
        if self.held + self._uncounted > self.peak_held:
            if self._stale:  # once more as long as backward lasts; in forward nothing dies
                self.settle(stale=torch._C._current_graph_task_id() != -1)
            self.peak_held = max(self.peak_held, self.held + self._uncounted)

    def drop(self, key: int) -> None:
        """Count one reference less; must be called while the tensor is alive."""
        entry = self._entries[key]
        if entry[0] > 1:
            entry[0] -= 1
        else:
            del self._entries[key]
            self.held -= entry[1]

    @property
    def handles(self) -> list[Any]:
        """The handles that are alive."""
        references = [*(reference for reference, _, _ in self._settled), *self.fresh]
        return [handle for reference in references if (handle := reference()) is not None]

    @property
    def all_held(self) -> int:
        """`held`, and what was packed and only held."""
        self.settle()
        return self.held + self._uncounted

    @property
    def all_packed(self) -> int:
        """`packed`, and what is only held, as far as it was counted."""
        return self.packed + self._saved

    def settle(self, *, stale: bool | None = None) -> None:
        """Count what was packed and is only held: a handle costs nothing but this (Rule 14).

        Args:
            stale: handles will die from now on, so that this is to be done again before a peak is believed; ``None``: as before.
        """
        live = [entry for entry in self._settled if entry[0]() is not None]
        for reference in self.fresh:
            handle = reference()
            if handle is None:
                continue
            key = nbytes = 0
            if handle.plain and (tensor := handle.tensor).layout is torch.strided:
                storage = tensor.untyped_storage()
                key, nbytes = storage._cdata, storage.nbytes()
            live.append((reference, key, nbytes))
        packed = {key: nbytes for _, key, nbytes in live if key}
        self._settled = live
        self.fresh.clear()
        self._stale = self._stale if stale is None else stale
        entries = self._entries
        self._saved = total = sum(packed.values())
        self._uncounted = sum([size for key, size in packed.items() if key not in entries]) if entries else total
        if self.held + self._uncounted > self.peak_held:
            self.peak_held = self.held + self._uncounted
        if self.packed + total > self.peak_packed:
            self.peak_packed = self.packed + total

    def pack(self, nbytes: int) -> None:
        """Plain autograd would hold so many bytes more."""
        self.packed += nbytes
        if self.packed > self.peak_packed:
            self.peak_packed = self.packed

    def move_out(self, nbytes: int) -> None:
        """So many bytes more wait in host memory."""
        self.offloaded += nbytes
        if self.offloaded > self.peak_offloaded:
            self.peak_offloaded = self.offloaded


class Held:
    """A tensor that counts as held for as long as this object lives; one without a storage counts nothing.

    ``before`` is the version that it had.

    Example:
        >>> ledger = Ledger()
        >>> held = Held(ledger, torch.zeros(4))
        >>> ledger.held, held.tensor.numel()
        (16, 4)
        >>> del held
        >>> ledger.held
        0
    """

    __slots__ = ("_key", "_ledger", "before", "tensor")

    def __init__(self, ledger: Ledger, tensor: Tensor) -> None:
        self._key = 0  # nothing is counted yet
        self._ledger = ledger
        self.before = version_of(tensor)
        self.tensor = tensor
        self._key = NO_STORAGE if is_opaque(tensor) else ledger.hold_tensor(tensor)

    @property
    def version(self) -> int:
        """The version that the tensor has now."""
        return version_of(self.tensor)

    @property
    def intact(self) -> bool:
        """Whether the tensor was not modified in place since it is held."""
        return self.version == self.before

    def __del__(self) -> None:
        if self._key != NO_STORAGE:
            self._ledger.drop(self._key)
