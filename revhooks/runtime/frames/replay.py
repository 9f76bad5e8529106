"""Frames that are run again from their arguments: what is behind `revhooks.checkpoint`."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint as torch_checkpoint

from ...errors import ModifiedError, explain
from ...registry import ACTIVE
from ...storage import is_near, is_opaque, version_of
from ..calls.arguments import Arguments, runs_out
from ..calls.objects import Objects
from ..calls.reached import Lent, Reads, reached
from ..calls.state import CallState
from ..handles.evidence import rotation
from ..handles.local import Give, packer, saving_to, surrounding
from ..handles.value import Value
from ..policy.plan import Facts, facts_of
from ..policy.sketch import Elements, Sketch, by_turns
from ..recompute.tail import Tail
from ..tree import leaves_of
from .frame import ARGUMENT, NEWEST, REMEDIES, RUNS_OUT, Frame
from .lean import slots_for
from .slots import Slots

if TYPE_CHECKING:
    from .home import Home

__all__ = ["FunctionModule", "Region", "ReplayFrame"]

TAIL = "masks at the end of a block that is run again: with them its replay ends before its last product"
REMEDIES[TAIL] = "nothing: they take one bit an element"
_SHARE = 16  # of what the call's arguments take, a tail may take one part


class Region:
    """What is to be run again: a function, the modules whose state it depends on, and what is known of it."""

    __slots__ = ("call", "facts", "name", "named", "owned", "roots", "tensors", "things", "training")

    def __init__(self, fn: Callable[..., Any], args: Any) -> None:
        self.call = fn
        self.things: tuple[object, ...] = ()  # no modules, whose attributes it depends on
        self.named = False  # by its class, not by a call of `checkpoint`, which is obeyed
        owner = _owner_of(fn)
        self.owned = owner is not None  # else the modules are those that it may call, not those that it does
        self.roots, self.tensors = ([owner], []) if owner is not None else reached(fn, args)
        self.name = type(fn).__name__ if isinstance(fn, nn.Module) else getattr(fn, "__qualname__", type(fn).__name__)
        self.training = owner.training if owner is not None else True
        self.facts = _facts_about(fn)

    @classmethod
    def of(cls, module: nn.Module, forward: Callable[..., Any]) -> Region:
        """A module's call, by a method of its class."""
        region = cls.__new__(cls)
        region.call = functools.partial(forward, module)
        region.tensors, region.things = [], ()
        region.named = region.owned = True
        region.roots, region.name, region.training = [module], type(module).__name__, module.training
        region.facts = facts_of(module)
        return region

    @classmethod
    def of_object(cls, thing: object, method: Callable[..., Any], *, known: bool) -> Region:
        """A call of a method of something that is no module: the modules are those that it holds or may call.

        Unless its class is ``known``, one of its methods may read what another one has left in an attribute.
        """
        region = cls(MethodType(method, thing), ())
        region.named, region.name, region.things = True, type(thing).__name__, (thing,)
        if not known:
            region.facts.look_again(again=False)
        return region

    def module(self) -> nn.Module:
        """The function as a module: the one that it is, or one whose children are those that it may call."""
        if isinstance(self.call, nn.Module):
            return self.call
        module = FunctionModule(self.name)
        for index, root in enumerate(self.roots):
            module.add_module(str(index), root)
        return module


class FunctionModule(nn.Module):
    """Stands for a function."""

    def __init__(self, function: str) -> None:
        super().__init__()
        self.function = function


def _owner_of(fn: Callable[..., Any]) -> nn.Module | None:
    candidate = fn if isinstance(fn, nn.Module) else getattr(fn, "__self__", None)
    return candidate if isinstance(candidate, nn.Module) else None


def _facts_about(fn: Callable[..., Any]) -> Facts:
    """Facts live as long as the module or the code; of what cannot be told again nothing is known."""
    key = fn if isinstance(fn, nn.Module) else getattr(inspect.unwrap(getattr(fn, "__func__", fn)), "__code__", None)
    return Facts() if key is None else facts_of(key, many=not isinstance(fn, nn.Module))


class ReplayFrame(Frame):
    """One call of a function whose saved tensors are dropped at once, and recomputed from its arguments.

    It may lie in another frame: then its arguments are saved there, as any op saves what it needs, and what it
    recomputes is not kept while the outer one is recomputed.
    """

    compares = True
    turns = rotation

    def __init__(self, run: Home, region: Region) -> None:
        super().__init__(run, region.facts, training=region.training)
        self.region = region
        # what an object's method saves is many small tensors: to look for recipes among them takes longer than it spares
        self.slots = slots_for(self, 0, replayed=not region.things)
        around = packer()
        self.nested = around is not None and around.inside
        self.exact = around is None or around.exact
        self.held = Arguments(run, (), {})
        self._sketch: Sketch | None = None  # of what it saved, by which a replay is known
        self._elements: dict[int, Elements] = {}  # the same of some of it
        self._lent: Lent | None = None  # what an object's method may read
        self._tail: Tail | None = None  # before which a replay ends
        self._given = 0  # bytes of its arguments
        self._volume = ACTIVE.volume.muted() if ACTIVE.volume is not None else None  # blocks in it give their log-dets as well
        self._early_stop = torch_checkpoint._enable_checkpoint_early_stop is not False

    @property
    def subject(self) -> nn.Module | None:
        """The module that is run again, if it was named by its class."""
        return self.region.roots[0] if self.region.named and self.region.owned else None

    @property
    def label(self) -> str:
        """How errors and reports call it."""
        if self.subject is not None:
            return self.run.label(self.subject, self.ordinal)
        return f"{'block' if self.region.named else 'checkpoint'} {self.ordinal} ({self.region.name})"

    def call(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the function, keep its arguments, and let go of what it saved."""
        leaves = leaves_of((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        objects = Objects.among(leaves)
        self.begin(next((t.device for t in tensors), torch.device("cpu")))
        self._given = sum(tensor.nbytes for tensor in tensors if not is_opaque(tensor))
        held = Arguments(self.run, args, kwargs, _outer_save())
        if objects is not None:
            tensors += objects.tensors()
        versions = [version_of(tensor) for tensor in tensors]
        region = self.region
        self.state = CallState(self, region.roots, self.facts, owned=region.owned, things=region.things)
        if region.things:
            self._lent = Lent(region.roots, region.tensors)
        with saving_to(self.slots, self), self.state.watched():
            output = original(*args, **kwargs)
        self.slots.close(self, self.facts, _key_of(tensors), output)
        self.state.finish(self.moved)
        self.end([self.state])
        if self.state.surprise:
            self.keep(self.state.surprise)
        if self.region.named and not self.facts.repeatable and self.run.guard.mode == "fallback":
            self.facts.keep(
                "replay", self.label, "replays of two calls that did not", expected="the same in a replay as in the call"
            )
            self.keep("its replays do not do what it does")
        if runs_out(leaves):
            self.keep(RUNS_OUT)
        self.facts.writes_input = [version_of(tensor) for tensor in tensors] != versions
        if self.facts.writes_input:
            self.keep("it changes its input in place")
        if not self.why_kept:
            if objects is not None:
                held.give_former(objects, _outer_save())
            self.held = held
        return output

    def release(self) -> None:
        """Let go of every slot, but for a sketch by which the replay is known."""
        if self.released or self.why_kept or not self.lets_go():
            return
        self._take_evidence()
        if self._early_stop:
            self._tail = Tail(self.slots, self.run.ledger, self._given // _SHARE)
        self.state.remember(self.slots)
        self.slots.release()

    def hold(self) -> None:
        """Keep what it saved."""
        self.slots.hold()

    def _take_evidence(self) -> None:
        """In the first calls of all that it saved, then of some."""
        if self.run.guard.mode == "off" or self.captured:
            return
        if self.first:
            self._sketch = Sketch(self.slots.there())
        elif self.checked or is_near(self.device):
            places = by_turns(self.slots.large(), self.facts.calls, 2 if is_near(self.device) else 1)
            self._elements = {place: found for place in places if (found := self.slots.elements(place)) is not None}

    def _compare_evidence(self) -> None:
        pairs = Sketch(self.slots.there()).differences(self._sketch) if self._sketch is not None else []
        for place, before in self._elements.items():
            now = self.slots.elements(place)
            if now is not None and now.values.shape == before.values.shape:
                pairs.append((now.values, before.values))
        for rebuilt, original in pairs:
            self.check_replay(rebuilt, original, lambda: self.label)

    def all_slots(self) -> tuple[Slots]:
        """They are one."""
        return (self.slots,)

    def sources(self) -> list[Value]:
        """None: it starts from its arguments."""
        return []

    def rebuild(self, slots: Slots, *, transient: bool) -> None:
        """Run the function again, until all is there."""
        self.state.check(self.label)
        self.slots.check_outputs()
        args, kwargs = self.held.again(self.label)
        self.run.replays.add(self)

        def call() -> Any:
            outer, volume = ACTIVE.run, ACTIVE.volume
            ACTIVE.run, ACTIVE.volume = self.run, self._volume  # for the modules inside that were named, or counted
            try:
                with lent or contextlib.nullcontext():
                    return self.region.call(*args, **kwargs)
            finally:
                ACTIVE.run, ACTIVE.volume = outer, volume

        def fill() -> None:
            if self._tail is None:
                slots.fill(call, transient=transient)
            else:
                slots.fill_and_stop(call, self._tail, transient=transient)

        lent = self._lent.reads() if self._lent is not None else None
        try:
            self.state.repeat(fill, grad=True, reach=(self.region.call, args, kwargs))
            _refuse_if_read(lent, self.label)
        except Exception as problem:
            _refuse_if_read(lent, self.label)
            if not isinstance(problem, torch.OutOfMemoryError):
                self.look_again()
                problem.add_note(f"It came from the replay of {self.label}; its call in forward did not raise it.")
            raise
        self._compare_evidence()

    def supply(self) -> None:
        """Nothing before it depends on it."""

    def distrust(self, below: int | None = None) -> None:
        """A replay is not an inversion."""

    def forget_outputs(self) -> None:
        """It has none."""

    def purge(self) -> None:
        """Drop the slots of one pass."""
        if self.slots.transient:
            self.slots.release()

    def report(self) -> Iterator[tuple[str, str, Tensor]]:
        """Arguments, and slots that are kept or rebuilt."""
        for tensor in self.held.tensors():
            yield ARGUMENT, self.label, tensor
        yield from self.state.report(self.label)
        for tensor in self._tail.tensors() if self._tail is not None else ():
            yield TAIL, self.label, tensor
        why = self.why_kept or ("rebuilt for backward" if self.released else NEWEST)
        for saved in self.slots.held():
            yield why, self.label, saved


def _refuse_if_read(lent: Reads | None, label: str) -> None:
    """Raise if a replay has read what was modified since the call."""
    if lent is not None and lent.ids:
        raise ModifiedError(
            explain(
                f"{label}: a parameter or tensor that it holds has been modified by an inplace operation",
                expected="the values that its call used, for it is run again",
                got="values changed since",
                remedy="run backward before optimizer.step() or what else changes it",
            )
        ) from None


def _key_of(tensors: list[Tensor]) -> object:
    """What the same call mostly saves the same for."""
    return tuple([None if is_opaque(t) else (t.shape, t.stride(), t.dtype, t.requires_grad) for t in tensors])


def _outer_save() -> Callable[[Tensor], Give] | None:
    """How the surrounding frame saves a tensor, if there is one: it is being run, or run again."""
    around = surrounding()
    return around.save if around is not None and around.inside else None
