"""A run: one use of ``reversible()``. It packs, unpacks, links frames and keeps the books."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..errors import FallbackWarning, explain
from ..generators import RngTracker
from ..nn.coupling import Coupling
from ..record import Kept, Stats
from ..registry import ACTIVE, LARGE, Registration
from ..storage import is_opaque, storage_key
from ..tracing import is_traced
from ..watching import WATCHERS
from .aside import make_room
from .calls.arguments import runs_out
from .frames.coupling import CouplingFrame
from .frames.frame import ORDINARY, REMEDIES, Frame
from .frames.interpose import has_registered_parts
from .frames.newest import Newest
from .frames.opaque import OpaqueFrame
from .frames.replay import FunctionModule, Region, ReplayFrame
from .frames.slots import Slots
from .handles.local import packer, pop_hooks, push_hooks, surrounding, unpack
from .handles.shared import Shared
from .packing import Packing
from .passes import NO_PASS, current_pass, is_retained
from .policy.guard import Fallback
from .policy.plan import Predicate
from .tree import leaves_of, tensors_of
from .whole import FITS, WholeCalls

__all__ = ["Run"]

_CALL_AND_LADJ: Registration = Coupling.call_and_ladj.__revhooks__  # type: ignore[attr-defined]


class Run(Packing):
    """State of one ``with reversible():``.

    Frames are held by handles in the graph, never by the run: nothing outlives the graph.
    """

    def __init__(
        self,
        *,
        guard: str = "fallback",
        keep: Predicate | None = None,
        replay: Predicate | None = None,
        by_predicate: bool = False,
        spec: object = (),
        ops: bool = False,
        budget: float = 0.0,
        offload: bool = False,
        adapters: bool = True,
    ) -> None:
        make_room()
        shared = Shared(guard=guard, ops=ops, budget=budget, offload=offload)
        super().__init__(shared)
        self.guard, self.ledger, self.budget, self.passes = shared.guard, shared.ledger, shared.budget, shared.passes
        self.at_end = shared.passes.at_end
        self.rng = RngTracker()
        self.marks: object = None  # where the generators were when a frame last looked
        self.inversions = _Counter()
        self.replays = _Counter()
        self.second_evaluations = 0
        self._keep = keep
        self.adapts = adapters
        self._replay = replay
        self._count = 0
        self._frames: weakref.WeakSet[Frame] = weakref.WeakSet()
        self._lock = threading.RLock()
        self._name_of: Callable[[nn.Module], str] | None = None
        self._saw_named = False  # a block that is to be replayed
        self._saw_compiled = False
        self._latest: weakref.ref[Frame] | None = None  # frame that was opened
        self._newest: Newest | None = None
        self._by_predicate = by_predicate
        self.options = (ops, adapters, budget > 0, keep is None, spec if isinstance(spec, (type, tuple)) else id(spec))
        self._wholes = WholeCalls(self) if WholeCalls.serve(shared) else None

    def begin_pass(self) -> None:
        """Backward begins."""
        super().begin_pass()
        if self._replay is not None and not self._saw_named:
            self._sees_compiled()
        latest = self._latest() if self._latest is not None else None
        if latest is not None and not self.budget.limit:
            self._newest = Newest(latest, self.ledger)
        if self._wholes is not None:
            self._wholes.learn(self)
        for watcher in tuple(WATCHERS):
            watcher.backward_began(self)

    @property
    def owner(self) -> Run:
        """It is one."""
        return self

    @property
    def inside(self) -> bool:
        """It is outside of any frame."""
        return False

    # -- forward

    def call(
        self,
        entry: Registration,
        original: Callable[..., Any],
        module: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call a registered method inside a frame; plainly where there is nothing to save."""
        if entry.adapter and not self.adapts:
            return original(module, *args, **kwargs)
        keep = self._keep is not None and isinstance(module, nn.Module) and self._keep(module)
        if entry.instead is not None and not (keep and entry.prefer == "leave"):
            original = _in_its_place(entry, original)
        if keep or entry.prefer == "leave" or self._is_plain(args, kwargs):
            return original(module, *args, **kwargs)
        if self._replay is not None and isinstance(module, nn.Module) and self._replay(module):
            return self.call_named(original, module, args, kwargs)  # by whichever method
        if entry.least and sum(tensor.nbytes for tensor in tensors_of((args, kwargs))) < entry.least:
            return original(module, *args, **kwargs)
        if not isinstance(module, nn.Module):
            return self._call_object(entry, original, module, args, kwargs)
        with_ladj = entry is _CALL_AND_LADJ
        knows_law = with_ladj or (isinstance(module, Coupling) and entry.cls is Coupling)
        if not knows_law and entry.branches is None and has_registered_parts(module, by_adapters=bool(entry.adapter)):
            return original(module, *args, **kwargs)  # its parts are inverted one by one
        self._count += 1
        frame: Frame = CouplingFrame(self, module, with_ladj) if knows_law else OpaqueFrame(self, module, entry)  # type: ignore[arg-type]
        return self._open(frame, original, args, kwargs)

    def _call_object(
        self,
        entry: Registration,
        original: Callable[..., Any],
        thing: object,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call a method of something that is no module inside a frame that is run again.

        Not where its modules are kept, or where it has none and its arguments are small: it can save little.
        """
        region = Region.of_object(thing, original, known=not entry.assumed)
        small = not region.roots and sum(tensor.nbytes for tensor in tensors_of((args, kwargs))) < LARGE
        if small or (self._keep is not None and any(map(self._keep, region.roots))):
            return original(thing, *args, **kwargs)
        return self.replay(region, args, kwargs)

    def invert(self, region: Region, inverse: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function inside a frame that is inverted in backward."""
        around = surrounding()
        inside = around is not None and around.inside
        with contextlib.nullcontext() if inside or not self._shadowed() else saved_tensors_hooks(self.pack, self.unpack):
            if self._is_plain(args, kwargs):
                return region.call(*args, **kwargs)
            entry = Registration(None, _WithoutModule(inverse))
            self._count += 1
            frame = OpaqueFrame(self, region.module(), entry, region.facts)
            return self._open(frame, _WithoutModule(region.call), args, kwargs)

    def _is_plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call needs no frame that is inverted: there is nothing to save, or not for us."""
        return (
            self._shadowed()
            or _saves_nothing_of_ours()
            or self.budget.limit == math.inf
            or not _is_fit(leaves_of((args, kwargs)))
        )

    def _open(self, frame: Frame, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._frames.add(frame)
        self._latest = weakref.ref(frame)
        late = frame.may_write(args, kwargs)
        if not late:
            self.budget.make_room_for_block()
        before = self.ledger.held
        result = _called(frame, original, args, kwargs)
        if late:  # it may have changed the output of the block before it, which is then kept
            self.budget.make_room_for_block()
        if not frame.stays:
            frame.release()
        if not frame.released:
            frame.hold()
            self.budget.add_frame(frame, self.ledger.held - before)
        return result

    def replay(self, region: Region, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function inside a frame that is run again in backward, and let go of what it saved at once."""
        if _saves_nothing_of_ours():
            return region.call(*args, **kwargs)
        around = surrounding()
        late, inside = region.facts.writes_input, around is not None and around.inside
        if not inside and not late:
            self.budget.make_room_for_block()
        self._count += 1
        frame = ReplayFrame(self, region)
        self._frames.add(frame)
        result = _called(frame, region.call, args, kwargs)
        if not inside and late:
            self.budget.make_room_for_block()
        frame.release()
        if not frame.released:
            frame.hold()
        return result

    def call_module(self, original: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call any module, by its class's ``__call__``: it may be named by a predicate, or be left as it is as a whole."""
        if self._wholes is None or self._wholes.is_open:
            return self._call_if_named(original, module, args, kwargs)
        return self._wholes.call(functools.partial(self._call_if_named, original, module), module, args, kwargs)

    def _call_if_named(
        self, original: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._by_predicate:
            return self.call_named(original, module, args, kwargs)
        return original(module, *args, **kwargs)

    def call_named(self, original: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a module that is to be replayed, if its user has named it; the newest stays until the next one opens.

        In one that is named too it lies in that one's frame, and lets go of what it saved at once, in the replay as well.
        """
        if self._replay is None or not self._replay(module):
            return original(module, *args, **kwargs)
        self._saw_named = True
        if _is_in_another(module):
            return self.replay(Region.of(module, original), args, kwargs)
        if self._shadowed() or _saves_nothing_of_ours() or self.budget.limit == math.inf:
            return original(module, *args, **kwargs)
        self._count += 1
        return self._open(ReplayFrame(self, Region.of(module, original)), functools.partial(original, module), args, kwargs)

    def close(self) -> None:
        """At the end of its context: read what devices have told; warn if blocks to be replayed are parts of a compiled graph."""
        self.guard.land(wait=self.passes.count > 1)
        if self._replay is not None and not self._saw_named and self._sees_compiled():
            warnings.warn(
                explain(
                    "replay=",
                    expected="calls of the blocks that it names",
                    got="none, but a compiled model: blocks that are compiled into a larger graph are not replayed",
                    remedy="compile each block instead, for block in model: block.compile()",
                ),
                FallbackWarning,
                stacklevel=3,
            )

    def _sees_compiled(self) -> bool:
        """Whether the output of a compiled graph was saved."""
        self._saw_compiled |= any(handle.kind.__name__ == "CompiledFunctionBackward" for handle in self.ledger.handles)
        return self._saw_compiled

    def _shadowed(self) -> bool:
        """Whether what is saved goes elsewhere: into a frame, or to hooks of others, as in `torch.utils.checkpoint`."""
        return packer() is not self

    def label(self, module: nn.Module, ordinal: int) -> str:
        """How errors, warnings and reports call a block."""
        reference = vars(module).get("__revhooks_block__")  # of a twin: what it runs in place of
        module = (reference() if reference is not None else None) or module
        path = self._name_of(module) if self._name_of is not None else ""
        name = module.function if isinstance(module, FunctionModule) else type(module).__name__
        return f"{path} ({name})" if path else f"block {ordinal} ({name})"

    def name_blocks(self, name_of: Callable[[nn.Module], str]) -> None:
        """Call blocks by their module paths."""
        self._name_of = name_of

    # -- backward

    def rebuild(self, frame: Frame, slots: Slots, index: int) -> Tensor:
        """Fill a slot that was released, and read it."""
        self.reading()
        around = surrounding()  # torch may have another thread work for a replay, which has the lock
        lock = contextlib.nullcontext() if around is not None and around.replaying and around.owner is self else self._lock
        with lock, _Aside(self):
            if slots.tensors[index] is None:
                transient = is_retained()
                if transient:
                    self.passes.purge(reached=frame.ordinal)
                    self.passes.purge_later(frame, frame.ordinal)
                self._rebuild(frame, slots, transient=transient)
                if self._newest is not None and self._newest.compare(frame.ordinal, plain=slots.plain):
                    self._newest = None
            tensor = slots.read(index)
            if current_pass() == NO_PASS and not self.passes.rebuilding:
                self.passes.purge()
            return tensor

    def _rebuild(self, frame: Frame, slots: Slots, *, transient: bool) -> None:
        """Rebuild, and leave the generators where they are even if a branch seeds them, which its calls have shown."""
        marks = self.rng.torch_marks(frame.device) if frame.draws else None
        generators = self.rng.torch_state(frame.device, marks) if frame.draws else None
        self.passes.rebuilding.append(frame)
        told = [(watcher, frame.subject, frame.label) for watcher in tuple(WATCHERS)]
        for watcher, module, label in told:
            watcher.rebuild_began(module, label)
        try:
            frame.rebuild(slots, transient=transient)
        finally:
            self.passes.rebuilding.pop()
            for watcher, module, label in told:
                watcher.rebuild_ended(module, label)
            if generators is not None and self.rng.torch_marks(frame.device) != marks:
                generators.restore()

    def reading_kept(self, frame: Frame) -> None:
        """Backward has come to a frame that was never released: it needs no output to be rebuilt from."""
        self.reading()
        if frame.stays and not frame.open:
            frame.facts.learn_stays(self.budget.limit, True)
        if not is_retained():
            frame.forget_outputs()

    def fallback(self, frame: Frame, key: object, step: int) -> Fallback:
        """Keeps a step of a frame, or the frame, from the next call on. It holds neither: it may be called when both are gone."""
        facts, ordinal, reference = frame.facts, frame.ordinal, weakref.ref(self)

        def fallback(reason: str, label: str, *, below: bool) -> None:
            facts.keep(key, label, reason, warn=not below)
            run = reference()
            if below and run is not None:
                run.distrust(ordinal, step)

        return fallback

    def distrust(self, ordinal: int, below: int) -> None:
        """Invert neither the steps before ``below`` of this block nor any block before it from the next call on."""
        for frame in list(self._frames):
            if frame.ordinal <= ordinal:
                frame.distrust(below if frame.ordinal == ordinal else None)

    # -- the books

    @property
    def ordinal(self) -> int:
        """How many frames were opened."""
        return self._count

    @property
    def stats(self) -> Stats:
        """What the run did, and what it holds now.

        Raises:
            RevhooksError: a device tells now that something in an earlier step was not what it was.
        """
        self.guard.land(wait=True)
        held = self.ledger.all_held  # which may be the most
        return dataclasses.replace(self.so_far, held_bytes=held, offloaded_bytes=self.ledger.offloaded, kept=tuple(self.kept()))

    @property
    def so_far(self) -> Stats:
        """What the run did, as far as that is known without waiting for a device; not what it holds."""
        ledger = self.ledger
        return Stats(
            packed_bytes=ledger.peak_packed,
            peak_held_bytes=ledger.peak_held,
            frames=self._count,
            inversions=self.inversions.count,
            replays=self.replays.count,
            second_evaluations=self.second_evaluations,
            peak_offloaded_bytes=ledger.peak_offloaded,
            worst_error=self.guard.worst,
        )

    def kept(self) -> list[Kept]:
        """What is held now, by reason and place, each storage once, largest first."""
        kept: dict[tuple[str, str, str], int] = {}
        seen: set[int] = set()
        for why, what, op, tensor in self._holdings():
            if not is_opaque(tensor) and storage_key(tensor) not in seen:
                seen.add(storage_key(tensor))
                kept[why, what, op] = kept.get((why, what, op), 0) + tensor.untyped_storage().nbytes()
        for what, nbytes in self._wholes.report() if self._wholes is not None else ():
            kept[FITS, what, ""] = kept.get((FITS, what, ""), 0) + nbytes
        largest_first = sorted(kept.items(), key=lambda item: -item[1])
        return [Kept(why, what, nbytes, op, REMEDIES.get(why, "")) for (why, what, op), nbytes in largest_first]

    def _holdings(self) -> Iterator[tuple[str, str, str, Tensor]]:
        """Why, of what, made by which operation, and the tensor."""
        for frame in list(self._frames):
            for why, what, tensor in frame.report():
                yield why, what, "", tensor
        for value in [reference() for reference in self.values.values()]:
            for why, what, tensor in value.report() if value is not None else ():
                yield why, what, "", tensor
        for handle in self.ledger.handles:
            op = "data without a gradient" if handle.kind is type(None) else handle.kind.__name__.removesuffix("Backward0")
            for tensor in handle.report():
                yield ORDINARY, handle.what, op, tensor


def _in_its_place(entry: Registration, original: Callable[..., Any]) -> Callable[..., Any]:
    """What runs in place of a method, where what it saves comes to us."""
    return original if entry.instead is None or packer() is None or _saves_nothing_of_ours() else entry.instead


def _called(frame: Frame, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Make a frame's call; one that fails leaves no graph in its slots."""
    try:
        return frame.call(original, args, kwargs)
    except BaseException:
        frame.hold()
        raise


def _is_fit(leaves: list[Any]) -> bool:
    """Whether an inverse may be given these arguments again."""
    return not runs_out(leaves) and not any(isinstance(leaf, Tensor) and is_opaque(leaf) for leaf in leaves)


def _saves_nothing_of_ours() -> bool:
    """Whether a call needs no frame wherever it is: there is no grad, or a functional transform or a trace is at work."""
    return not torch.is_grad_enabled() or torch._C._functorch.peek_interpreter_stack() is not None or is_traced()


def _is_in_another(module: nn.Module) -> bool:
    """Whether a call lies in a frame of one other named module: what lies deeper would be run again once a level."""
    around = packer()
    frame = around.frame if around is not None else None
    return isinstance(frame, ReplayFrame) and frame.region.named and not frame.nested and frame.subject is not module


class _WithoutModule:
    """A function as a method of a block: with its signature, which shows how it can be called."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, _: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:  # looked for rarely
        function = self._function
        signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
        parameters = [inspect.Parameter("module", inspect.Parameter.POSITIONAL_ONLY), *signature.parameters.values()]
        return signature.replace(parameters=parameters)


class _Counter:
    """Counts frames, each pass of each frame once."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, frame: Frame) -> None:
        self.count += 1


class _Again:
    """Takes calls of registered methods while something is rebuilt: the same runs in their place as did in forward."""

    def call(
        self, entry: Registration, original: Callable[..., Any], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return _in_its_place(entry, original)(module, *args, **kwargs)

    def call_module(self, original: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return original(module, *args, **kwargs)

    call_named = call_module


_AGAIN = _Again()


class _Aside:
    """While something is rebuilt: no frame opens, nothing is saved into one, no grad is recorded, no log-det is counted."""

    __slots__ = ("_active", "_grad", "_inside", "_run", "_volume")

    def __init__(self, run: Run) -> None:
        self._run = run

    def __enter__(self) -> None:
        around = packer()
        self._inside = around is not None and around.inside
        self._active, self._volume, self._grad = ACTIVE.run, ACTIVE.volume, torch.is_grad_enabled()
        if self._inside:
            push_hooks(self._run.pack, unpack)
        ACTIVE.run, ACTIVE.volume = _AGAIN if self._run.adapts else None, None
        torch._C._set_grad_enabled(False)

    def __exit__(self, *_: object) -> None:
        ACTIVE.run, ACTIVE.volume = self._active, self._volume
        torch._C._set_grad_enabled(self._grad)
        if self._inside:
            pop_hooks()
