"""What modules carry from call to call in attributes of their own, besides parameters and buffers.

A membrane potential, the state of a recurrence: a replay needs it as it was before the call. Numbers are left alone, for who
counts calls wants to see those of replays too; so are lists and objects, in which many keep a record, until a replay fails.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..state import give_attributes, modules_of
from ..storage import Held, version_of
from .arguments import Argument
from .objects import Former, Objects, Own, Seen
from .tree import leaves_of

if TYPE_CHECKING:
    from .plan import AttributeFacts
    from .run import Run

__all__ = ["Attributes"]


class Attributes:
    """The attributes of a call's modules, recorded before the call; after it those that it has changed, as they were.

    They are looked at in a block's first calls, and from then on where one has changed something. Tensors in them are held,
    until replays have shown that the call does not read them: many a module only leaves something there to be looked at.
    """

    __slots__ = ("_copies", "_facts", "_formers", "_objects", "_owns", "_run", "_versions")

    def __init__(self, run: Run, roots: Sequence[nn.Module], facts: AttributeFacts) -> None:
        self._run = run
        self._facts = facts
        self._owns = [Own(module) for module in modules_of(roots)]
        self._objects: Objects | None = Objects(self._owns, deep=facts.deep)
        self._versions = [(tensor, version_of(tensor)) for tensor in self._objects.tensors()]
        writes = facts.writes.possible
        self._copies = {id(tensor): tensor.detach().clone() for tensor, _ in self._versions} if writes else {}
        self._formers: list[tuple[Own, Former]] = []

    def finish(self) -> bool:
        """After the call: whether what it changed can be put back; not so a tensor that it wrote to as never before."""
        objects, self._objects = self._objects, None
        written = {id(tensor) for tensor, version in self._versions if version_of(tensor) != version}
        formers: dict[int, Former] = {}
        if objects is not None and objects.changed(written):
            objects.narrow()
            formers = objects.formers(lambda tensor: self._hold(tensor, written), written)
        self._formers = [(own, formers[id(own)]) for own in self._owns if id(own) in formers]
        foreseen = written <= self._copies.keys()
        self._facts.changes.note(bool(formers))
        self._facts.writes.note(bool(written))
        self._owns, self._versions, self._copies = [], [], {}
        return foreseen

    def _hold(self, tensor: Tensor, written: set[int]) -> Argument | Seen:
        if not self._facts.reads.possible:
            return Seen(tensor)
        if id(tensor) in written:
            tensor = self._copies.get(id(tensor), tensor).requires_grad_(tensor.requires_grad)
        return Argument(self._run, tensor, "the state before a call")

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that it holds."""
        former = next((former for _, former in self._formers), None)
        for part in former.parts() if former is not None else ():
            if isinstance(part, Argument) and isinstance(part.held, Held):
                yield part.held.tensor

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Put back what the call found, and afterwards what is there now."""
        if not self._formers:
            yield
            return
        read = self._facts.reads
        given: list[Tensor] = []
        copies: dict[int, Any] = {}

        def thaw(part: Any) -> Any:
            if not isinstance(part, (Argument, Seen)):
                return part
            tensor = part.again("a module")
            if self._facts.writes.found:
                tensor = tensor.detach().clone().requires_grad_(tensor.requires_grad)
            given.append(tensor)
            return tensor

        now = [(own, own.now()) for own, _ in self._formers]
        for own, former in self._formers:
            give_attributes(own.module, former.again(thaw, copies), own.names)
        try:
            if not given or read.found or not read.possible:
                yield
            else:
                with _Reads(given) as reads:
                    yield
                read.note(reads.any)
        finally:
            for own, values in now:
                give_attributes(own.module, values, own.names)


class _Reads(TorchFunctionMode):
    """Sees whether one of some tensors is used."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self._ids = {id(tensor) for tensor in tensors}
        self.any = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.any = self.any or any(id(leaf) in self._ids for leaf in leaves_of((args, kwargs)))
        return func(*args, **kwargs)
