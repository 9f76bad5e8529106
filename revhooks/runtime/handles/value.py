"""Values: tensors that somebody needs in backward, held or released."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...kinds import without_graph
from ...saved import Source, freed, modified
from ...storage import Geometry, Held, reserve, restride, version_probe
from ...streams import follow, stream_of

if TYPE_CHECKING:
    from .protocols import Consumer, Keeper

__all__ = ["Value", "Values", "fetch"]


Values = dict[int, "weakref.ref[Value]"]  # by storage key


class Value(Source):
    """A block's output; also the handle of one that is saved outside of any block.

    It is *held* as one tensor or as the streams it was split into, or *released*; then ``consumer`` is the
    frame that gives it back by inversion. Only what no handle needs is ever released: an inversion is not exact, and
    some backwards ask for exact values (ReLU reads ``result > 0``, ``amax`` compares for equality). A frame
    holds its outputs strongly and its inputs weakly, a Value holds its consumer strongly: so links run forward
    only and nothing needs the garbage collector.
    """

    __slots__ = (
        "__weakref__",
        "_dim",
        "_geometry",
        "_packed",
        "_pieces",
        "_probe",
        "_reserved",
        "_stream",
        "_tensor",
        "_tensor_key",
        "_tensor_version",
        "consumer",
        "dtype",
        "follows_head",
        "grid_bits",
        "key",
        "nbytes",
        "pinned",
        "run",
        "version",
        "what",
        "why",
    )

    def __init__(self, run: Keeper, tensor: Tensor, why: str, what: str) -> None:
        # first what may raise: a Value that has no run was never made
        storage, kept, version = tensor.untyped_storage(), without_graph(tensor), tensor._version
        self.nbytes = nbytes = storage.nbytes()  # of the memory that it stands for
        self.key = self._tensor_key = key = storage._cdata
        self.version = self._tensor_version = version
        self.dtype = tensor.dtype
        self.why = why
        self.what = what
        self.consumer: Consumer | None = None
        self.grid_bits: int | None = None  # its elements are multiples of 2**-grid_bits
        self.follows_head = False  # it was made of what begins a chain, which is held
        self.pinned = False  # a handle needs it
        self._packed = 0
        self._geometry: Geometry | None = None
        self._pieces: list[Held] | None = None
        self._dim = 0
        self._probe: Tensor | None = None
        self._reserved: object = None
        self._tensor: Tensor | None = kept  # Rule 2
        self._stream: Any = None  # on which it was rebuilt
        run.ledger.hold(key, nbytes)
        self.run = run
        run.values[key] = weakref.ref(self)

    def __del__(self) -> None:
        run = getattr(self, "run", None)
        if run is None:
            return
        if self._tensor is not None:
            run.ledger.drop(self._tensor_key)
        run.ledger.packed -= self._packed
        found = run.values.get(self.key)
        if found is not None and found() in (None, self):  # a finalizer runs before weak references die
            del run.values[self.key]

    @property
    def geometry(self) -> Geometry:
        """Size, stride and offset of the original."""
        if self._geometry is None and self._tensor is not None:
            self._geometry = Geometry.of(self._tensor)
        return self._geometry  # type: ignore[return-value]

    @property
    def held(self) -> bool:
        """Whether its elements are in memory."""
        return self._tensor is not None or self._pieces is not None

    def is_made_of(self, tensor: Tensor) -> bool:
        """Whether this very object is held."""
        return self._tensor is tensor

    @property
    def current_version(self) -> int:
        """The version that the memory it was made from has now."""
        if self._probe is not None:
            return self._probe._version
        return self.version if self._tensor is None else self._tensor._version

    def get(self) -> Tensor:
        """As a handle: the tensor.

        Raises:
            ModifiedError: it was modified in place since (Rule 8).
        """
        tensor = self._tensor
        if tensor is not None and self._probe is None and tensor._version == self.version:
            return tensor
        if self.current_version != self.version:
            raise modified(self.what, self.geometry.size, self.version, self.current_version)
        self.check_intact()  # a backward that has got it may have written to it
        return self.tensor()

    def tensor(self) -> Tensor:
        """The tensor, with its own strides.

        Raises:
            BackwardError: it is not held.
        """
        if self._tensor is None:
            if self._pieces is None:
                raise freed(self.what)
            self.receive_tensor(torch.cat([piece.tensor for piece in self._pieces], self._dim))
        elif self._stream is not None:
            follow(self._tensor, self._stream)
        return self._tensor  # type: ignore[return-value]

    def streams(self, dim: int, sizes: Sequence[int]) -> list[Held] | None:
        """The pieces, when it is held as pieces of these sizes along ``dim``."""
        if self._pieces is None or self._dim != dim or [p.tensor.shape[dim] for p in self._pieces] != list(sizes):
            return None
        return list(self._pieces)

    def check_intact(self) -> None:
        """Raise if what it holds, or has got back, was modified in place.

        Raises:
            ModifiedError: it was.
        """
        if self.is_written:
            held = [self._tensor] if self._tensor is not None else [piece.tensor for piece in self._pieces or ()]
            raise modified(self.what, self.geometry.size, self.version, max(tensor._version for tensor in held))

    @property
    def is_written(self) -> bool:
        """Whether what it holds, or has got back, was modified in place."""
        if self._tensor is not None:
            return self._tensor._version != self._tensor_version
        return not all(piece.intact for piece in self._pieces or ())

    def count_packed(self) -> None:
        """Plain autograd would hold its memory."""
        if not self._packed:
            self._packed = self.nbytes
            self.run.ledger.pack(self._packed)

    def take(self, pieces: Sequence[Tensor], dim: int) -> None:
        """A frame opens on it, split into ``pieces`` along ``dim``, which replace the tensor."""
        self._detach_from_storage()
        self.receive([Held(self.run.ledger, piece.detach()) for piece in pieces], dim)

    def receive(self, pieces: Sequence[Held], dim: int) -> None:
        """Hold these pieces: the tensor is their concatenation along ``dim``."""
        self._drop_tensor()
        self._pieces = list(pieces)
        self._dim = dim

    def replace_piece(self, place: int, piece: Held) -> None:
        """Hold another tensor in place of one of the pieces."""
        if self._pieces is not None:
            self._pieces[place] = piece

    def receive_tensor(self, tensor: Tensor) -> None:
        """Hold this tensor, in the strides of the original."""
        self._drop_tensor()
        self._pieces = None
        self._tensor = restride(tensor.detach(), self.geometry.stride)
        self._tensor_version = self._tensor._version
        self._tensor_key = self.run.ledger.hold_tensor(self._tensor)
        self._stream = stream_of(tensor.device)

    def report(self) -> Iterator[tuple[str, str, Tensor]]:
        """What it holds: why, of what, and the tensor."""
        if self._tensor is not None:
            yield self.why, self.what, self._tensor
        for piece in self._pieces or ():
            yield self.why, self.what, piece.tensor

    def pin(self, tensor: Tensor) -> None:
        """Hold it exactly, once, for a handle (DESIGN section 3); ``tensor`` lies in the same memory."""
        if self._tensor is None or self._tensor_key != self.key:  # what came back is not exact
            self._drop_tensor()
            self._pieces = None
            self._tensor = torch.as_strided(tensor.detach(), *self.geometry)
            self._tensor_version = self.version
            self._tensor_key = self.run.ledger.hold_tensor(self._tensor)
        self.pinned = True

    def release(self) -> None:
        """Let go of the memory, if a frame can give it back."""
        if self.held and self.consumer is not None and not self.pinned:
            self._detach_from_storage()
            self._drop_tensor()
            self._pieces = None

    purge = release

    def _detach_from_storage(self) -> None:
        """Keep the geometry, the version counter and the storage's key, so that the memory may go."""
        if self._probe is None and self._tensor is not None:
            self._geometry = Geometry.of(self._tensor)
            self._probe = version_probe(self._tensor)
            self._reserved = reserve(self._tensor)

    def _drop_tensor(self) -> None:
        if self._tensor is not None:
            self.run.ledger.drop(self._tensor_key)
            self._tensor = None


def fetch(value: Value) -> None:
    """Make sure that ``value`` is held: invert the frames after it, newest first, without recursion (Rule 4).

    What was rebuilt on the way is let go of again; nothing that other handles need is consumed.
    """
    passed: list[Value] = []
    stack = [value]
    while stack:
        wanted = stack[-1]
        if wanted.held or wanted.consumer is None:
            stack.pop()
            continue
        missing = [source for source in wanted.consumer.sources() if not source.held and source.consumer is not None]
        if missing:
            stack.extend(missing)
            passed.extend(missing)
            continue
        wanted.consumer.supply()
        stack.pop()
    for other in passed:
        if other is not value:
            other.release()
