"""Packing: which handle stands in the graph in place of a saved tensor.

What was made by an operation of which it is known how to run it again may be let go of (`recipe`); everything else is held.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from ..kinds import without_graph
from ..ops import is_operation
from ..saved import Counted, Leaf, Odd, Saved, Source, View
from ..storage import Geometry, Held, is_leaf, is_opaque, storage_key
from ..tracing import untraced
from .handles import codes
from .handles.codes import fewest
from .handles.dropped import Bringer, Dropped
from .handles.evidence import inversions, rotation
from .handles.local import Packer
from .handles.shared import Shared
from .handles.value import Value, Values
from .offload.parked import HeldAway, Parked
from .passes import NO_PASS, current_pass
from .policy.places import Places, places_of
from .recompute.recipe import LOOKS, Recipe, looks, recipe_of

if TYPE_CHECKING:
    from .handles.protocols import Inside

__all__ = ["Packing"]

SMALL = 2048  # bytes; below, bookkeeping costs more than it gives
_MANY = 4096  # handles, after which those that died are forgotten
_is_tracing = torch._C._is_tracing
_references = sys.getrefcount
_reference = weakref.ref
_INSIDE = Places()  # in blocks
_known: dict[type, bool] = {}  # kinds of nodes: whether their output may be recomputed


def is_candidate(kind: type) -> bool:
    """Whether what nodes of this kind make may be let go of."""
    found = _known.get(kind)
    if found is None:
        found = is_operation(kind.__name__)
        if not issubclass(kind, BackwardCFunction):  # a user's class may go
            _known[kind] = found
    return found


class Packing(Packer):
    """The pack hook of a run.

    Attributes:
        shared: what its handles have in common.
        values: blocks' outputs that are there, by the keys of their storages.
        place: says where in the model a tensor is saved, if somebody wants to know.
    """

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        self.values: Values = {}
        self.place: Callable[[], str] | None = None
        self._ledger = shared.ledger
        bounded = shared.budget.limit < math.inf
        self._exact = bounded and shared.budget.limit > 0  # the budget is to know at any time what is held
        self._drops = shared.ops and bounded
        self._fresh = shared.ledger.fresh
        self._moves = shared.offload is not None and bounded
        self._looks_closer = self._drops or self._moves
        self._task = NO_PASS
        self._position = 0  # how many were saved in this step
        self._nowhere = self._places = Places()  # what is known of its model, once it has saved a parameter

    # -- hooks

    def pack(self, tensor: Tensor) -> Source:
        """The pack hook."""
        self._position += 1
        if type(tensor) is not Tensor or _is_tracing():
            if type(tensor) is nn.Parameter and self._places is not self._nowhere and not _is_tracing():
                return Leaf(tensor)  # as `_pack_rare`
            return self._pack_rare(tensor)
        base = tensor._base
        node = tensor.grad_fn if base is None else base.grad_fn
        if node is None:
            references = _references(tensor)  # here, where nobody else has got it
            return self._pack_without_node(tensor, base, references)
        kind = type(node)
        if self.values and (value := self._block_output(tensor)) is not None:
            if base is None and not tensor.output_nr:
                _note(node, self.shared, value)  # recipes may start from it
            return _in_memory_of(value, tensor)
        if self._looks_closer:
            candidate = _known.get(kind)
            if self._moves or (is_candidate(kind) if candidate is None else candidate):
                spot = (self._position, kind)
                if self._moves or not self._places.passes_over(spot):
                    return self._pack_made(tensor, tensor if base is None else base, node, kind, spot)
            if looks.get(kind, LOOKS) > 0:
                return self._noted(tensor, tensor if base is None else base, node, kind)
        if self._exact or self.place is not None:
            return self._held(tensor, kind)
        handle = Saved(tensor, kind)  # as `_held`: most come here
        self._fresh.append(_reference(handle))
        return handle

    def unpack(self, handle: Source) -> Tensor:
        """The unpack hook."""
        if self._position:
            self.reading()
        return handle.get()

    def reading(self) -> None:
        """A handle is read: the first one in a backward pass finds all of forward's alive."""
        if self._position and (task := current_pass()) != self._task:
            self._task = task
            self.begin_pass()

    def note_saved(self, count: int) -> None:
        """So many were saved in a frame."""
        self._position += count

    def begin_pass(self) -> None:
        """Backward begins."""
        rotation.turn(self._position)
        inversions.turn(self._position)
        self._position, self._places = 0, self._nowhere
        self._ledger.settle(stale=True)

    # -- what is held

    def _held(self, tensor: Tensor, kind: type) -> Source:
        """A handle that holds it."""
        if (self._exact or self.place is not None) and not is_opaque(tensor):
            handle: Source = Counted(tensor, kind, self._ledger, self._here())
        else:
            handle = Saved(tensor, kind)
        self._fresh.append(_reference(handle))
        return handle

    def _here(self) -> str:
        return self.place() if self.place is not None else "ordinary layers"

    def _pack_rare(self, tensor: Tensor) -> Source:
        if _is_tracing():  # as is_traced, at each saved tensor
            with untraced():
                return self.pack(tensor)
        if is_leaf(tensor):
            return self._leaf(tensor, tensor if tensor._base is None else tensor._base)
        return Odd(tensor, type(None))

    def _leaf(self, tensor: Tensor, whole: Tensor) -> Leaf:
        if self._places is self._nowhere and isinstance(whole, nn.Parameter):
            self._places = places_of(whole)
        return Leaf(tensor)

    def _pack_without_node(self, tensor: Tensor, base: Tensor | None, references: int) -> Source:
        """A leaf, or what needs no gradient."""
        if len(self._fresh) > _MANY:
            self._ledger.settle()
        whole = tensor if base is None else base
        if whole.requires_grad or isinstance(whole, nn.Parameter):
            return self._leaf(tensor, whole)
        if is_opaque(tensor):
            return Odd(tensor, type(None))
        if self.values and (value := self._block_output(tensor)) is not None:
            return _in_memory_of(value, tensor)
        unshared = self._drops and references <= fewest() and tensor.numel() >= codes.LEAST
        if (
            base is None
            and (unshared or self._moves)
            and tensor.nbytes >= SMALL
            and not tensor.__dict__
            and _covers(tensor, tensor)
        ):
            code = codes.code_of(tensor, self._here()) if unshared else None
            if code is not None:
                code.hold(self._ledger)
                return self._dropped(tensor, code, type(None), self._here())
            parked = self._parked(tensor)
            if parked is not None:
                return self._dropped(tensor, parked, type(None), self._here())
        return self._held(tensor, type(None))

    # -- what is let go of

    def _pack_made(self, tensor: Tensor, whole: Tensor, node: Any, kind: type, spot: object) -> Source:
        """Of what an operation has made; let go of, if it can be brought back."""
        shared = self.shared
        if whole.output_nr or whole.nbytes < SMALL or whole.is_meta or not _covers(whole, tensor):
            return self._held(tensor, kind)
        known = _known_of(node, shared, whole, NO_PASS)
        if known is None:
            bringer: Recipe | Parked | None = None
            what, places = self._here(), self._places
            if self._drops and (not self._moves or is_candidate(kind)):
                bringer = recipe_of(shared, whole, what, spot, places)
                places.note(spot, bringer is not None)
            if bringer is None and self._moves:
                bringer = self._parked(whole)
            if bringer is None:
                return self._noted(tensor, whole, node, kind)
            known = self._dropped(whole, bringer, kind, what)
            _note(node, shared, known)
        else:
            self._look_again(known, whole)
        return known if tensor is whole else View(known, tensor)

    def _look_again(self, known: Source, whole: Tensor) -> None:
        """It is saved once more: it may have been edited past its version counter."""
        if type(known) is Dropped and self.shared.guard.mode != "off":
            known.look_again(whole.detach())

    def _noted(self, tensor: Tensor, whole: Tensor, node: Any, kind: type) -> Source:
        """What is held, for recipes that start from it."""
        left = looks.get(kind, LOOKS)
        # what may move is one tensor of the step however often it is saved
        if whole.output_nr or (left <= 0 and not self._moves) or is_opaque(whole) or is_opaque(tensor):
            return self._held(tensor, kind)
        if not issubclass(kind, BackwardCFunction):
            looks[kind] = left - 1
        known = _known_of(node, self.shared, whole, NO_PASS)
        if known is None:
            known = self._held(whole, kind)
            _note(node, self.shared, known)
        return known if tensor is whole else View(known, tensor)

    def _parked(self, tensor: Tensor) -> Parked | None:
        offload = self.shared.offload
        return Parked(offload) if self._moves and offload is not None and offload.takes(tensor) else None

    def _dropped(self, tensor: Tensor, bringer: Bringer, kind: type, what: str) -> Dropped:
        handle = Dropped(self.shared, tensor, bringer, kind, what)
        self._fresh.append(_reference(handle))
        return handle

    def pack_inside(self, tensor: Tensor, slots: Inside, index: int, what: str) -> Source:
        """The tensor saved at a place of a frame that recomputes what cheap operations make; the frame counts its bytes."""
        if is_leaf(tensor):
            return Leaf(tensor)
        if is_opaque(tensor):
            return Odd(tensor, type(tensor.grad_fn))
        whole = tensor if tensor._base is None else tensor._base
        node: Any = whole.grad_fn
        usable = node is not None and not whole.output_nr and tensor.nbytes >= SMALL and _covers(whole, tensor)
        known = _known_of(node, slots.home, whole, slots.task) if usable else None
        if known is None:
            spot = (what, index, type(node))
            recipe = None
            if usable and is_candidate(type(node)) and not _INSIDE.passes_over(spot):
                recipe = recipe_of(self.shared, whole, what, spot, _INSIDE, slots)
                _INSIDE.note(spot, recipe is not None)
            if recipe is None:
                known = Counted(tensor, type(node), self._ledger, what)
                if not usable or tensor is not whole:
                    return known
            else:
                known = Dropped(self.shared, whole, recipe, type(node), what, packs=False)
            _note(node, slots.home, known)
        else:
            self._look_again(known, whole)
        return known if tensor is whole else View(known, tensor)

    # -- frames

    def hold(self, tensor: Tensor) -> Held | HeldAway:
        """Hold what a frame needs in backward."""
        offload = self.shared.offload
        if offload is not None and offload.takes(tensor) and not is_leaf(tensor) and not tensor.is_inference():
            return HeldAway(offload, tensor.detach())
        return Held(self._ledger, without_graph(tensor))  # Rule 2

    def found(self, tensor: Tensor) -> Value | None:
        """The Value that lies in the tensor's storage (Rule 3)."""
        reference = self.values.get(storage_key(tensor))
        return reference() if reference is not None else None

    def _block_output(self, tensor: Tensor) -> Value | None:
        """The block's output in whose memory a saved tensor lies: it is held exactly from now on."""
        if is_opaque(tensor):
            return None
        value = self.found(tensor)
        if value is None or value.dtype != tensor.dtype or value.version != tensor._version:
            return None
        value.pin(tensor)
        value.count_packed()
        return value

    def output_value(self, tensor: Tensor) -> Value | None:
        """The Value that ``tensor`` is, if it is a frame's output and nothing else needs it."""
        value = None if is_opaque(tensor) else self.found(tensor)
        if value is None or value.pinned or value.consumer is not None or value.dtype != tensor.dtype:
            return None
        if value.version != tensor._version or value.geometry != Geometry.of(tensor):
            return None
        return value if value.geometry.dense else None


def _note(node: Any, home: object, handle: Source) -> None:
    node.metadata[home] = weakref.ref(handle)


def _known_of(node: Any, home: object, tensor: Tensor, task: int) -> Any:
    """The handle that stands for what a node has made, if this is it: what a backward saves once more may be another.

    Args:
        node: has made the tensor.
        home: under which it is noted.
        tensor: that is saved.
        task: the pass in which forward code runs, or is run again.
    """
    noted = node.metadata.get(home)
    known = noted() if noted is not None else None
    if known is None or known.version != tensor._version or type(known) is Value:
        return None
    if type(known) is Dropped:
        return known if current_pass() == task else None
    return known if known.tensor.data_ptr() == tensor.data_ptr() else None


def _in_memory_of(value: Value, tensor: Tensor) -> Source:
    """A handle to a tensor that lies in the memory of a Value; the object that it is comes back if it needs no gradient."""
    geometry = Geometry.of(tensor)
    if not tensor.requires_grad:
        return value if value.is_made_of(tensor) else Saved(tensor, type(None))
    return value if geometry == value.geometry and tensor.dtype is value.dtype else View(value, tensor)


def _covers(whole: Tensor, tensor: Tensor) -> bool:
    """Whether ``whole`` is all that lies in the tensor's memory."""
    if is_opaque(tensor):
        return False
    storage = tensor.untyped_storage()
    if whole is not tensor and (
        is_opaque(whole) or whole.dtype is not tensor.dtype or storage_key(whole) != storage._cdata  # ``.data`` may be another's
    ):
        return False
    return whole.nbytes == storage.nbytes() and (whole.is_contiguous() or Geometry.of(whole).dense)
