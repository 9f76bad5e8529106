"""A run: one use of ``reversible()``. It packs, unpacks, links frames and keeps the books."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.graph import saved_tensors_hooks

from ..errors import FallbackWarning, explain
from ..generators import RngTracker
from ..kinds import without_graph
from ..nn.coupling import Coupling
from ..ops import Source
from ..record import Kept, Stats
from ..registry import ACTIVE, Registration
from ..storage import Geometry, Held, Ledger, is_leaf, is_opaque, storage_key
from ..tracing import is_traced, untraced
from .arguments import runs_out
from .budget import Budget
from .codes import code_of, is_unshared
from .coupling import CouplingFrame
from .frame import NEWEST, ORDINARY, REMEDIES, Frame
from .guard import Guard
from .handle import LeafHandle, ViewHandle
from .interpose import has_registered_parts
from .lean import LeanSlots
from .local import Packer, packer, pop_hooks, push_hooks, surrounding, unpack
from .offload import HeldAway, Offload, Parked
from .opaque import OpaqueFrame
from .plan import Facts, Fallback, Predicate
from .recipe import SMALL, Recipe, note_output, recipe_of
from .replay import FunctionModule, Region, ReplayFrame
from .slots import Slots
from .transforms import make_room
from .tree import leaves_of
from .value import Value, Values

__all__ = ["Run"]


class Run(Packer):
    """State of one ``with reversible():``.

    Frames are held by handles in the graph, never by the run: nothing outlives the graph.
    """

    def __init__(
        self,
        *,
        guard: str = "fallback",
        keep: Predicate | None = None,
        replay: Predicate | None = None,
        ops: bool = False,
        budget: float = 0.0,
        offload: bool = False,
    ) -> None:
        make_room()
        self.guard = Guard(guard)
        self.ledger = Ledger()
        self.budget = Budget(self.ledger, budget)
        self.rng = RngTracker()
        self.marks: object = None  # where the generators were when a frame last looked
        self.values: Values = {}
        self.inversions = _Counter()
        self.replays = _Counter()
        self.second_evaluations = 0
        self.place: Callable[[], str] | None = None  # says where in the model a tensor is saved
        self._keep = keep
        self._replay = replay
        self._ops = ops
        self._offload = Offload(self.ledger) if offload else None
        self._count = 0
        self._frames: weakref.WeakSet[Frame] = weakref.WeakSet()
        self._lock = threading.RLock()
        self._to_purge: list[weakref.ref[Any]] = []
        self._rebuilding: list[Frame] = []
        self._task = -1  # the latest backward pass with something to do at its end
        self._queued: set[str] = set()
        self._name_of: Callable[[nn.Module], str] | None = None
        self._saw_named = False  # a block that is to be replayed
        self._saw_compiled = False  # the output of a compiled graph

    unpack = unpack  # the unpack hook, of a Source

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
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call a registered method inside a frame; plainly where there is nothing to save."""
        if self._is_plain(args, kwargs) or (self._keep is not None and self._keep(module)):
            return original(module, *args, **kwargs)
        knows_law = isinstance(module, Coupling) and entry.cls is Coupling
        if not knows_law and entry.branches is None and has_registered_parts(module):
            return original(module, *args, **kwargs)  # its parts are inverted one by one
        self._count += 1
        frame: Frame = CouplingFrame(self, module) if knows_law else OpaqueFrame(self, module, entry)  # type: ignore[arg-type]
        return self._open(frame, original, args, kwargs)

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
        late = not isinstance(frame, CouplingFrame) and frame.facts.writes_input  # whose streams are its own
        if not late:
            self.budget.make_room_for_block()
        before = self.ledger.held
        result = frame.call(original, args, kwargs)
        if late:  # it may have changed the output of the block before it, which is then kept
            self.budget.make_room_for_block()
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
        result = frame.call(region.call, args, kwargs)
        if not inside and late:
            self.budget.make_room_for_block()
        frame.release()
        return result

    def call_named(self, original: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a module that is to be replayed, if its user has named it; the newest stays until the next one opens.

        In one that is named too it lies in that one's frame, and lets go of what it saved at once, in the replay as well.
        """
        if self._replay is None or not self._replay(module):
            return original(module, *args, **kwargs)
        self._saw_named = True
        if _is_in_another(module):
            return self.replay(Region.of(module, original), args, kwargs)
        if self._is_plain((), {}):
            return original(module, *args, **kwargs)
        self._count += 1
        return self._open(ReplayFrame(self, Region.of(module, original)), functools.partial(original, module), args, kwargs)

    def close(self) -> None:
        """At the end of its context: warn if the blocks that are to be replayed are parts of a compiled graph."""
        if self._replay is not None and self._saw_compiled and not self._saw_named:
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

    def _shadowed(self) -> bool:
        """Whether what is saved goes elsewhere: into a frame, or to hooks of others, as in `torch.utils.checkpoint`."""
        return packer() is not self

    def label(self, module: nn.Module, ordinal: int) -> str:
        """How errors, warnings and reports call a block."""
        path = self._name_of(module) if self._name_of is not None else ""
        name = module.function if isinstance(module, FunctionModule) else type(module).__name__
        return f"{path} ({name})" if path else f"block {ordinal} ({name})"

    def name_blocks(self, name_of: Callable[[nn.Module], str]) -> None:
        """Call blocks by their module paths."""
        self._name_of = name_of

    def pack(self, tensor: Tensor) -> Source:
        """The pack hook."""
        if torch._C._is_tracing():  # as is_traced, at each saved tensor
            with untraced():
                return self.pack(tensor)
        if type(tensor) is not Tensor or is_leaf(tensor) or is_opaque(tensor):
            return LeafHandle(tensor)
        unshared = self._ops and tensor.grad_fn is None and tensor.nbytes >= SMALL and is_unshared(tensor) and not tensor.__dict__
        return self._pack_value(tensor, unshared=unshared)

    def _pack_value(self, tensor: Tensor, *, unshared: bool) -> Source:
        """A tensor saved outside any frame."""
        reference = self.values.get(tensor.untyped_storage()._cdata)
        value = reference() if reference is not None else None
        if value is None or value.dtype != tensor.dtype or value.version != tensor._version:
            base = tensor if tensor._base is None else tensor._base
            value = self._new_value(tensor, base, unshared=unshared)
            if base is tensor:
                return value
        else:
            if self._ops and not value.pinned and Geometry.of(tensor) == value.geometry:
                note_output(tensor, value)
            _look_again(value, tensor)
        value.pin(tensor)
        value.count_packed()
        return _in_memory_of(value, tensor)

    def pack_inside(self, tensor: Tensor, slots: LeanSlots, what: str) -> Source:
        """A tensor saved in a frame that recomputes what cheap operations make; the frame counts its bytes."""
        if is_opaque(tensor) or is_leaf(tensor):
            return LeafHandle(tensor)
        reference = slots.values.get(tensor.untyped_storage()._cdata)
        value = reference() if reference is not None else None
        if value is None or value.dtype != tensor.dtype or value.version != tensor._version:
            base = tensor if tensor._base is None else tensor._base
            whole = tensor.nbytes >= SMALL and _covers(base, tensor)
            value = Value(self, base if whole else tensor, NEWEST, what, slots.values)
            value.maker = type(tensor.grad_fn)
            value.pinned = True
            if whole:
                value.recipe = recipe_of(self, base, what, slots)
                self._let_go(value)
                note_output(base, value)
        else:
            _look_again(value, tensor)
        return _in_memory_of(value, tensor)

    def _let_go(self, value: Value) -> None:
        """Of a Value that can come back: now, or when the budget needs the room."""
        if value.recipe is not None:
            if self.budget.limit:
                self.budget.add_value(value)
            else:
                value.release()

    def slots(self, frame: Frame, position: int, facts: Facts, *, replayed: bool = False) -> Slots:
        """Slots for a stretch of a frame; where it may stay for long, or is run again, they hold what recipes start from only."""
        lean = self._ops and (replayed or self.budget.limit > 0)
        return LeanSlots(frame, position, facts) if lean else Slots(frame, position)

    def _new_value(self, tensor: Tensor, base: Tensor, *, unshared: bool) -> Value:
        """What lies in the tensor's memory; let go of at once, where a recipe brings it back."""
        place = self.place() if self.place is not None else "ordinary layers"
        plain = (
            (not self._ops and self._offload is None)
            or tensor.nbytes < SMALL
            or tensor.is_meta
            or self.budget.limit == math.inf
            or not _covers(base, tensor)
        )
        value = Value(self, tensor if plain else base, ORDINARY, place)
        value.maker = type(tensor.grad_fn)
        if value.maker.__name__ == "CompiledFunctionBackward":
            self._saw_compiled = True
        value.pinned = True
        value.count_packed()
        if plain:
            return value
        code = code_of(tensor, place) if unshared and base is tensor else None
        if code is not None:
            value.encode(code)
            return value
        if self._ops and not unshared:
            value.recipe = recipe_of(self, base, place)
        if value.recipe is None and self._offload is not None and self._offload.takes(base):
            value.recipe = Parked(self._offload)
        self._let_go(value)
        note_output(base, value)
        return value

    def hold(self, tensor: Tensor) -> Held | HeldAway:
        """Hold what a frame needs in backward."""
        if self._offload is not None and self._offload.takes(tensor) and not is_leaf(tensor) and not tensor.is_inference():
            return HeldAway(self._offload, tensor.detach())
        return Held(self.ledger, without_graph(tensor))  # Rule 2

    def found(self, tensor: Tensor) -> Value | None:
        """The Value that lies in the tensor's storage (Rule 3)."""
        reference = self.values.get(storage_key(tensor))
        return reference() if reference is not None else None

    def output_value(self, tensor: Tensor) -> Value | None:
        """The Value that ``tensor`` is, if it is a frame's output and nothing else needs it."""
        value = None if is_opaque(tensor) else self.found(tensor)
        if value is None or value.pinned or value.consumer is not None or value.dtype != tensor.dtype:
            return None
        if value.version != tensor._version or value.geometry != Geometry.of(tensor):
            return None
        return value if value.geometry.dense else None

    # -- backward

    def rebuild(self, frame: Frame, slots: Slots, index: int) -> Tensor:
        """Fill a slot that was released, and read it."""
        around = surrounding()  # torch may have another thread work for a replay, which has the lock
        lock = contextlib.nullcontext() if around is not None and around.replaying and around.owner is self else self._lock
        with lock, _Aside(self):
            if slots.tensors[index] is None:
                transient = _graph_is_retained()
                if transient:
                    self.purge_later(frame)
                self._rebuild(frame, slots, transient=transient)
            tensor = slots.read(index)
            if _outside_backward() and not self._rebuilding:
                self.purge()
            return tensor

    def _rebuild(self, frame: Frame, slots: Slots, *, transient: bool) -> None:
        """Rebuild, and leave the generators where they are even if a branch seeds them."""
        marks = self.rng.torch_marks(frame.device)
        generators = self.rng.torch_state(frame.device, marks)
        self._rebuilding.append(frame)
        try:
            frame.rebuild(slots, transient=transient)
        finally:
            self._rebuilding.pop()
            if self.rng.torch_marks(frame.device) != marks:
                generators.restore()

    def reading_kept(self, frame: Frame) -> None:
        """Backward has come to a frame that was never released: it needs no output to be rebuilt from."""
        if not _graph_is_retained():
            frame.forget_outputs()

    def purge_later(self, rebuilt: Frame | Value) -> None:
        """Drop what was rebuilt when the present backward pass, whose graph is retained, has ended.

        When the pass has come to a frame, the frames after it go, and what recipes gave. A pass goes back, so that they are
        hardly needed again.
        """
        if isinstance(rebuilt, Frame):
            self.purge(rebuilt)
        self._to_purge.append(weakref.ref(rebuilt))
        self.at_end(self.purge)

    def at_end(self, callback: Callable[[], None]) -> bool:
        """Call ``callback`` at the end of the present backward pass; ``False`` outside of one."""
        task = torch._C._current_graph_task_id()
        if task == -1:
            return False
        if task != self._task:
            self._task, self._queued = task, set()
        if callback.__qualname__ not in self._queued:
            try:
                Variable._execution_engine.queue_callback(callback)
            except RuntimeError:  # a pass that only records itself, to be compiled, runs to no end
                return False
            self._queued.add(callback.__qualname__)
        return True

    @property
    def rebuilt(self) -> int:
        """How many things `purge` would look at."""
        return len(self._to_purge)

    def purge(self, reached: Frame | None = None, *, since: int = 0) -> None:
        """Drop what was rebuilt for one pass only: all of it, or what is over for a pass that has reached a frame.

        Args:
            reached: that frame.
            since: leave as many alone that were rebuilt first.
        """
        self._to_purge, pending = self._to_purge[:since], self._to_purge[since:]
        for reference in pending:
            rebuilt = reference()
            if rebuilt is not None and reached is not None and not self._is_over(rebuilt, reached):
                self._to_purge.append(reference)
            elif isinstance(rebuilt, Frame):
                rebuilt.purge()
            elif rebuilt is not None:
                rebuilt.release()

    def _is_over(self, rebuilt: Frame | Value, reached: Frame) -> bool:
        if isinstance(rebuilt, Frame):
            return rebuilt.ordinal > reached.ordinal and rebuilt not in self._rebuilding
        return rebuilt.recipe is not None  # else a frame before needs it

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
        """What the run did, and what it holds now."""
        ledger = self.ledger
        return Stats(
            packed_bytes=ledger.peak_packed,
            held_bytes=ledger.held,
            peak_held_bytes=ledger.peak_held,
            frames=self._count,
            inversions=self.inversions.count,
            replays=self.replays.count,
            second_evaluations=self.second_evaluations,
            offloaded_bytes=ledger.offloaded,
            peak_offloaded_bytes=ledger.peak_offloaded,
            worst_error=self.guard.worst,
            kept=tuple(self._kept()),
        )

    def _kept(self) -> list[Kept]:
        """What is held now, by reason and place, each storage once, largest first."""
        holders: list[Frame | Value | None] = [*self._frames, *(reference() for reference in self.values.values())]
        kept: dict[tuple[str, str, str], int] = {}
        seen: set[int] = set()
        for holder in holders:
            op = holder.op if isinstance(holder, Value) else ""
            for why, what, tensor in holder.report() if holder is not None else ():
                if not is_opaque(tensor) and storage_key(tensor) not in seen:
                    seen.add(storage_key(tensor))
                    kept[why, what, op] = kept.get((why, what, op), 0) + tensor.untyped_storage().nbytes()
        largest_first = sorted(kept.items(), key=lambda item: -item[1])
        return [Kept(why, what, nbytes, op, REMEDIES.get(why, "")) for (why, what, op), nbytes in largest_first]


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
    return isinstance(frame, ReplayFrame) and frame.region.named and not frame.nested and frame.region.roots[0] is not module


def _look_again(value: Value, tensor: Tensor) -> None:
    """Of what is saved once more and was let go of: hold it as it is now, if it is not what it was."""
    recipe = value.recipe
    if isinstance(recipe, Recipe) and not value.held and not recipe.is_of(torch.as_strided(tensor.detach(), *value.geometry)):
        value.recipe = None
        value.pin(tensor)


def _in_memory_of(value: Value, tensor: Tensor) -> Source:
    """A handle to a tensor that lies in the memory of a Value.

    The object that it is comes back if it needs no gradient and costs no memory, or carries attributes.
    """
    geometry = Geometry.of(tensor)
    if not tensor.requires_grad and (value.recipe is None or tensor.__dict__):
        return value if value.is_made_of(tensor) else ViewHandle(value, geometry, tensor)
    return value if geometry == value.geometry else ViewHandle(value, geometry)


def _covers(base: Tensor, tensor: Tensor) -> bool:
    """Whether ``base`` is all that lies in the tensor's memory."""
    return (
        not base.is_meta
        and base.nbytes == base.untyped_storage().nbytes()
        and base.dtype is tensor.dtype
        and (base is tensor or (not is_opaque(base) and storage_key(base) == storage_key(tensor)))  # ``.data`` may be another's
        and (base.is_contiguous() or Geometry.of(base).dense)
    )


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


class _Aside:
    """While something is rebuilt: no frame opens, nothing is saved into one, no grad is recorded."""

    __slots__ = ("_active", "_grad", "_inside", "_run")

    def __init__(self, run: Run) -> None:
        self._run = run

    def __enter__(self) -> None:
        around = packer()
        self._inside = around is not None and around.inside
        self._active, self._grad = ACTIVE.run, torch.is_grad_enabled()
        if self._inside:
            push_hooks(self._run.pack, unpack)
        ACTIVE.run = None
        torch._C._set_grad_enabled(False)

    def __exit__(self, *_: object) -> None:
        ACTIVE.run = self._active
        torch._C._set_grad_enabled(self._grad)
        if self._inside:
            pop_hooks()


def _graph_is_retained() -> bool:
    """Whether what is rebuilt now may be asked for again: retain_graph, or no backward at all."""
    return _outside_backward() or bool(torch._C._autograd._get_current_graph_task_keep_graph())


def _outside_backward() -> bool:
    """Whether a saved tensor is read outside any backward pass."""
    return torch._C._current_graph_task_id() == -1
