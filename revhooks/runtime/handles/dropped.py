"""Saved tensors that were let go of: something brings them back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ...saved import Source, freed, modified
from ...storage import reserve, version_probe
from ...streams import follow, stream_of
from ...watching import WATCHERS
from ..offload.parked import Parked
from ..passes import EVERYTHING, is_retained

if TYPE_CHECKING:
    from .shared import Shared

__all__ = ["Bringer", "Dropped", "Shaped", "at_version"]


class Shaped(Protocol):
    """Knows size and strides of a tensor."""

    @property
    def size(self) -> torch.Size:
        """Its size."""
        ...

    @property
    def stride(self) -> tuple[int, ...]:
        """Its strides, in elements."""
        ...


class Bringer(Protocol):
    """Brings a tensor back: a recipe, a smaller form, a copy in host memory."""

    depth: int
    now: bool  # whether it is to be let go of whatever the budget is

    def leave(self, tensor: Tensor) -> None:
        """It is let go of."""
        ...

    def tensor(self, like: Shaped) -> Tensor:
        """The tensor, in its own strides."""
        ...

    def holds(self) -> Iterator[Tensor]:
        """What it takes on the device meanwhile."""
        ...


class Dropped(Source):
    """A tensor that covers its memory, held until it is released, and whenever it was asked for.

    Attributes:
        bringer: brings it back.
        version: that it had.
        kind: the class of the node that made it.
        size: of the tensor.
        stride: its strides, in elements.
    """

    plain = False

    __slots__ = (
        "__weakref__",
        "_key",
        "_packed",
        "_probe",
        "_reserved",
        "_shared",
        "_stream",
        "_tensor",
        "_tensor_version",
        "bringer",
        "kind",
        "nbytes",
        "size",
        "stride",
        "version",
        "what",
    )

    def __init__(self, shared: Shared, tensor: Tensor, bringer: Bringer, kind: type, what: str, *, packs: bool = True) -> None:
        self._shared = shared
        self._packed = 0  # bytes that the books count as saved
        self._tensor: Tensor | None = None
        self._key = 0
        self.size = tensor.shape
        self.stride = tensor.stride()
        self._probe = version_probe(tensor)
        self.version = tensor._version
        self.bringer: Bringer | None = bringer  # ``None`` once it turns out not to
        self.kind = kind
        self.what = what
        self._stream: Any = None  # on which it was rebuilt
        self.nbytes = tensor.nbytes
        self._reserved: object = None
        if packs:
            self._packed = self.nbytes
            shared.ledger.pack(self._packed)
        else:  # the frame counts it, by its key
            self._reserved = reserve(tensor)
        moves = isinstance(bringer, Parked)
        if not shared.budget.limit or bringer.now:
            bringer.leave(tensor.detach() if moves else tensor)  # Rule 2: what only waits is held
            return
        self._hold(tensor.detach())
        if moves:
            shared.budget.add_move(self)
        else:
            shared.budget.add_value(self)

    def __del__(self) -> None:
        ledger = self._shared.ledger
        ledger.packed -= self._packed
        if self._tensor is not None:
            ledger.drop(self._key)

    @property
    def depth(self) -> int:
        """How many others have to be brought back for it, one for the other."""
        return 0 if self.bringer is None else self.bringer.depth

    @property
    def current_version(self) -> int:
        """The version that the memory it was made from has now."""
        return self._probe._version

    def get(self) -> Tensor:
        """The tensor.

        Raises:
            ModifiedError: it was modified in place since (Rule 8).
        """
        if self._probe._version != self.version:
            raise modified(self.what, self.size, self.version, self._probe._version)
        tensor = self._tensor
        if tensor is None:
            return self._bring()
        if tensor._version != self._tensor_version:  # a backward that has got it may have written to it
            raise modified(self.what, self.size, self.version, tensor._version)
        if self._stream is not None:
            follow(tensor, self._stream)
        return tensor

    def _bring(self) -> Tensor:
        if self.bringer is None:
            raise freed(self.what)
        tensor = at_version(self.bringer.tensor(self), self.version)
        self._stream = stream_of(tensor.device)
        self._hold(tensor)
        for watcher in tuple(WATCHERS):
            watcher.brought(tensor)
        if is_retained():
            self._shared.passes.purge_later(self, EVERYTHING)
        return tensor

    def _hold(self, tensor: Tensor) -> None:
        self._key = self._shared.ledger.hold_tensor(tensor)
        self._tensor_version = tensor._version
        self._tensor = tensor

    def release(self) -> None:
        """Let go of the memory."""
        tensor = self._tensor
        if tensor is not None and self.bringer is not None:
            self.bringer.leave(tensor)
            self._shared.ledger.drop(self._key)
            self._tensor = None

    purge = release

    def look_again(self, tensor: Tensor) -> None:
        """It is saved once more: hold it as it is now, if that is not what was let go of."""
        bringer = self.bringer
        is_of = getattr(bringer, "is_of", None)
        if self._tensor is None and is_of is not None and not is_of(tensor):
            self.bringer = None
            self._hold(tensor.detach())

    def report(self) -> Iterator[Tensor]:
        """What it holds."""
        if self._tensor is not None:
            yield self._tensor
        if self.bringer is not None:
            yield from self.bringer.holds()


def at_version(tensor: Tensor, version: int) -> Tensor:
    """The tensor with a version counter of its own that says what the original's did: a replay that is given it compares."""
    tensor = tensor.data
    if version:
        torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))
    return tensor
