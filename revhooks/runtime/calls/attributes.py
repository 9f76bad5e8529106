"""What modules carry from call to call in attributes of their own, besides parameters and buffers.

A membrane potential, the state of a recurrence, a counter by which a call does this or that: a replay needs it as it was before
the call. What a replay leaves there in turn is undone by itself (`revhooks.effects`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ...buffers import detached_clone
from ...kinds import is_allocated
from ...owned import give_attributes
from ...storage import Held, version_of
from .arguments import Argument, Thaw
from .objects import Former, Objects, Own, Seen
from .reached import Reads

if TYPE_CHECKING:
    from ..handles.protocols import Keeper
    from ..policy.plan import AttributeFacts

__all__ = ["Attributes"]


class Attributes:
    """The attributes of a call's modules, recorded before the call; after it those that it has changed, as they were.

    So are those of an object that is no module, if the call is one of its methods.

    They are looked at in a block's first calls, and from then on where one has changed something. Tensors in them are held if
    calls read them: many a module only leaves something there to be looked at.

    Attributes:
        watch: a context for the call, which sees what it reads.
    """

    __slots__ = ("_copies", "_facts", "_formers", "_held", "_lenient", "_objects", "_owns", "_run", "_versions", "watch")

    def __init__(self, run: Keeper, modules: Sequence[Any], facts: AttributeFacts) -> None:
        self._run = run
        self._facts = facts
        self._lenient = not all(isinstance(module, nn.Module) for module in modules)  # the call may not have read it
        self._owns = [Own(module) for module in modules]
        self._objects = Objects.among(self._owns) or Objects(self._owns, deep=False)
        tensors = [tensor for tensor in self._objects.tensors() if is_allocated(tensor)]
        self._versions = [(tensor, version_of(tensor)) for tensor in tensors]
        self._copies: dict[int, Tensor] = {}
        if facts.writes.possible:
            self._copies = {id(tensor): detached_clone(tensor) for tensor in tensors}
        self.watch = Reads(tensors) if tensors and facts.reads.sought and not facts.failed else None
        self._held: dict[int, Argument | Seen] = {}
        self._formers: list[tuple[Own, Former]] = []

    def finish(self) -> bool:
        """After the call.

        Returns:
            Whether what it changed can be put back: not a tensor that it wrote to, if none of its module was written to before.
        """
        objects, facts = self._objects, self._facts
        written = {id(tensor) for tensor, version in self._versions if version_of(tensor) != version}
        changed = objects.changed(written)
        if facts.failed:
            changed |= {id(own) for own in self._owns}  # others may change what it has only read
        elif changed:
            changed = objects.narrow(changed, written)
        formers = objects.formers(lambda tensor: self._hold(tensor, written), changed) if changed else {}
        self._formers = [(own, formers[id(own)]) for own in self._owns if id(own) in formers]
        foreseen = written <= self._copies.keys()
        facts.changes.note(bool(formers))
        facts.writes.note(bool(written))
        if self._held and self.watch is not None:
            facts.reads.note(not self.watch.ids.isdisjoint(self._held))
        del self._owns, self._objects, self._versions, self._copies, self.watch  # of the call; what is left is for replays
        return foreseen

    def _hold(self, tensor: Tensor, written: set[int]) -> Argument | Seen:
        """The same for the same tensor."""
        key, facts = id(tensor), self._facts
        if key not in self._held:
            reads = key in self.watch.ids if self.watch is not None else facts.reads.found
            if key in written:
                tensor = self._copies.get(key, tensor)
            needed = reads or facts.failed or key in written
            self._held[key] = Argument(self._run, tensor, "the state before a call") if needed else Seen(tensor)
        return self._held[key]

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that it holds."""
        for part in self._held.values():
            if isinstance(part, Argument) and isinstance(part.held, Held):
                yield part.held.tensor

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Put back what the call found, and afterwards what is there now."""

        def again(part: Argument | Seen) -> Tensor:
            if isinstance(part, Argument) and part.modified and self._lenient:
                return part.hollow()
            tensor = part.again("a module")
            return tensor.clone() if self._facts.writes.found else tensor  # no leaf: it may be written to

        thaw = Thaw(again)
        now = [(own, own.now()) for own, _ in self._formers]
        for own, former in self._formers:
            give_attributes(own.module, thaw(former), own.names)
        try:
            yield
        finally:
            for own, values in now:
                give_attributes(own.module, values, own.names)
