"""Handles: what stands in the graph in place of a saved tensor. Here those that only hold one.

Most saved tensors are only held, in every step again: of these the tensor and its version are kept, no more (Rule 14).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from .errors import BackwardError, ModifiedError, explain
from .kinds import without_graph
from .storage import NO_STORAGE, Ledger, version_of

__all__ = ["Counted", "Leaf", "Odd", "Saved", "Source", "View", "freed", "modified"]


class Source:
    """Something that gives a tensor when it is asked: the base of this package's handles."""

    __slots__ = ()

    def get(self) -> Tensor:
        """The tensor."""
        raise NotImplementedError


class Saved(Source):
    """A tensor that is held, without its graph (Rule 2).

    Attributes:
        tensor: the very object if it needs no gradient, else an alias.
        version: which it had.
        kind: the class of the node that made it.
        plain: whether the books are to look at what it holds (`Ledger.settle`).
    """

    __slots__ = ("__weakref__", "kind", "tensor", "version")

    plain = True
    what = "ordinary layers"  # how errors and reports call its place

    def __init__(self, tensor: Tensor, kind: type) -> None:
        self.tensor = tensor.detach() if tensor.requires_grad else tensor
        self.version = tensor._version
        self.kind = kind

    def get(self) -> Tensor:
        """The tensor.

        Raises:
            ModifiedError: it was modified in place since (Rule 8).
        """
        tensor = self.tensor
        if tensor._version != self.version:
            raise modified(self.what, tensor.shape, self.version, tensor._version)
        return tensor

    def report(self) -> Iterator[Tensor]:
        """What it holds."""
        yield self.tensor


class Odd(Saved):
    """One of another kind: a subclass, sparse, nested, of inference mode. It comes back as what it is, and is not counted."""

    __slots__ = ()

    plain = False

    def __init__(self, tensor: Tensor, kind: type) -> None:
        self.tensor = without_graph(tensor)
        self.version = version_of(tensor)
        self.kind = kind

    def get(self) -> Tensor:
        """The tensor.

        Raises:
            ModifiedError: it was modified in place since (Rule 8).
        """
        tensor = self.tensor
        now = version_of(tensor)
        if now != self.version:
            raise modified(self.what, tensor.shape, self.version, now)
        return tensor


class Leaf(Odd):
    """A parameter, another leaf, or a view of one: somebody else holds it anyway, and it is not counted."""

    __slots__ = ()

    def __init__(self, tensor: Tensor) -> None:
        kind = type(tensor)
        plain = kind is nn.Parameter or kind is Tensor
        self.tensor = (tensor.detach() if tensor.requires_grad else tensor) if plain else without_graph(tensor)
        self.version = version_of(tensor)
        base = tensor._base
        self.kind = kind if base is None else type(base)

    @property
    def lasts(self) -> bool:
        """Whether it is a parameter's memory, the same from step to step."""
        return issubclass(self.kind, nn.Parameter)

    def get(self) -> Tensor:
        """The tensor.

        Raises:
            ModifiedError: it was modified in place since (Rule 8).
        """
        tensor = self.tensor
        now = tensor._version if type(tensor) is Tensor else version_of(tensor)
        if now != self.version:
            raise modified("a parameter, buffer or leaf", tensor.shape, self.version, now)
        return tensor


class Counted(Saved):
    """One that is counted at once, and knows its place."""

    __slots__ = ("_key", "_ledger", "what")

    def __init__(self, tensor: Tensor, kind: type, ledger: Ledger, what: str) -> None:
        super().__init__(tensor, kind)
        self.what = what
        self._key = NO_STORAGE
        self._ledger = ledger
        self._key = ledger.hold_tensor(self.tensor)

    def __del__(self) -> None:
        if getattr(self, "_key", NO_STORAGE) != NO_STORAGE:
            self._ledger.drop(self._key)

    @property
    def current_version(self) -> int:
        """The version that its memory has now."""
        return self.tensor._version


class View(Source):
    """A view of what another handle gives; a real one of what is complex, and the other way round, among them."""

    __slots__ = ("_dtype", "_offset", "_size", "_stride", "of")

    def __init__(self, of: Source, tensor: Tensor) -> None:
        self.of = of
        self._dtype = tensor.dtype
        self._size = tensor.shape
        self._stride = tensor.stride()
        self._offset = tensor.storage_offset()

    def get(self) -> Tensor:
        """The view."""
        base = self.of.get()
        if base.dtype is not self._dtype:
            base = torch.empty(0, dtype=self._dtype, device=base.device).set_(base.untyped_storage())
        return base.as_strided(self._size, self._stride, self._offset)


def freed(what: str) -> BackwardError:
    """The error for what cannot be rebuilt because an earlier backward used it up."""
    return BackwardError(
        explain(
            what,
            expected="a tensor that is held or can be rebuilt",
            got="one whose graph an earlier backward has freed",
            remedy="pass retain_graph=True to the earlier backward",
        )
    )


def modified(what: str, shape: Sequence[int], version: int, now: int) -> ModifiedError:
    """The error for a saved tensor that was changed in place (Rule 8)."""
    return ModifiedError(
        explain(
            f"one of the variables needed for gradient computation has been modified by an inplace operation ({what})",
            expected=f"version {version} of a tensor of shape {tuple(shape)}",
            got=f"version {now}",
            remedy="use the out-of-place operation, or change it before forward or after backward",
        )
    )
