"""Frames of couplings, whose law the runtime knows: rebuilt one step at a time."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...functional import ADDITIVE
from ...nn.coupling import Coupling, RangeWatch, Step
from ...saved import freed, modified
from ...storage import Held, compact, is_alone, restride, storage_key, version_of, version_probe
from ..calls.arguments import Arguments
from ..calls.objects import Objects
from ..calls.state import CallState
from ..handles.local import THREADS, saving_to
from ..handles.value import Value, fetch
from ..passes import NOTHING
from ..policy.guard import Sample
from ..policy.plan import facts_of, has_custom_function
from .frame import ANCHOR, ARGUMENT, CHANGES_OBJECT, DREW, HEAD, NEWEST, REMEDIES, Head, ModuleFrame
from .lean import slots_for
from .slots import Slots

if TYPE_CHECKING:
    from .home import Home

__all__ = ["CouplingFrame"]

_EARLY = 5  # steps of a chain, where all errors of later ones arrive
_EXACT = "the stream before a step: its inverse drifts, or it has exact zeros"
REMEDIES[_EXACT] = "a wider dtype for the streams, or exact ones: grid_bits="


class _Branch:
    """One step of a coupling in one call.

    A step that cannot be inverted keeps the stream before it (``target``); one that cannot be repeated keeps what it saved too.
    """

    __slots__ = (
        "first",
        "glue",
        "index",
        "output",
        "sample",
        "slots",
        "source",
        "state",
        "step",
        "strides",
        "target",
        "wants_grad",
        "why_kept",
    )

    def __init__(self, frame: CouplingFrame, index: int, step: Step, source: Tensor, target: Tensor) -> None:
        self.index = index
        self.step: Step = step
        self.first = step.target not in frame.changed  # whether what it changes is an input, as it came
        facts = facts_of(step.branch)
        self.slots = slots_for(frame, index)
        self.glue = Slots(frame, index) if step.law.saves else None
        self.state = CallState(frame, (step.branch,), facts)
        self.wants_grad = (source.requires_grad, target.requires_grad)
        self.strides = (source.stride(), target.stride())
        self.why_kept = ""
        self.target: Held | None = None
        self.source: Held | None = None  # a copy, where the branch changes its input in place
        self.sample: Sample | None = None  # of the stream before the step
        self.output: Sample | None = None  # of what the branch computed, where nothing is inverted that would show an error
        if index in frame.facts.kept or (frame.is_chain and step.law.grid_bits is None and frame.has_zeros(target, index)):
            self.target = Held(frame.run.ledger, target.detach())
        elif not (self.first and frame.has_head) and (frame.ordinal + index + index // 2) % 2 == 0:  # either stream by turns
            if frame.is_chain:  # whose steps are what blocks are elsewhere
                frame.checked = index < _EARLY or frame.is_looked_at() or frame.turns.picks()
            self.sample = frame.sample(target)

    def label(self, frame: CouplingFrame) -> str:
        """How errors and warnings call it."""
        names = (name for name, child in frame.module._modules.items() if child is self.step.branch)
        return f"{frame.label}, step {self.index} ({next(names, type(self.step.branch).__name__)})"

    @property
    def owns_source(self) -> bool:
        """Whether its backward may write into the stream that it got: it is given one of its own."""
        return bool(self.state.facts.owns_input)

    def learn_ownership(self, update: Tensor, source: Tensor) -> None:
        """In the first call: look whether the backward of a custom function may reuse the input's memory."""
        facts = self.state.facts
        if facts.owns_input is None:
            facts.owns_input = self.slots.saves_input and has_custom_function([update], [source])

    def all_slots(self) -> tuple[Slots, ...]:
        """Its own slots, and those of the law."""
        return (self.slots,) if self.glue is None else (self.slots, self.glue)

    @property
    def live(self) -> bool:
        return bool(self.slots.live) or (self.glue is not None and bool(self.glue.live))

    def keep(self, why: str, target: Held) -> None:
        """Stay as it is until backward."""
        self.why_kept = why
        self.target = target

    def hold(self) -> None:
        """Keep what it saved."""
        for slots in self.all_slots():
            slots.hold()

    def release(self) -> None:
        """Let go of everything that it saved, unless it is kept."""
        if not self.why_kept:
            self.state.remember(self.slots)
            for slots in self.all_slots():
                slots.release()


class _Cursor:
    """Streams as they were before step ``position``; a rebuild moves it towards 0."""

    __slots__ = ("position", "streams", "transient")

    def __init__(self, position: int, streams: list[Held], *, transient: bool) -> None:
        self.position = position
        self.streams = streams
        self.transient = transient


class _ChainState:
    """The streams after a step of a long chain, from which the steps before it can be rebuilt."""

    __slots__ = ("__weakref__", "_frame", "cursor")

    def __init__(self, frame: CouplingFrame, cursor: _Cursor) -> None:
        self._frame = weakref.ref(frame)
        self.cursor = cursor

    def release(self) -> None:
        """Let go of the steps before it."""
        frame = self._frame()
        if frame is not None and not frame.released:
            frame.release_before(self.cursor)


class CouplingFrame(ModuleFrame):
    """A frame of a `Coupling`: a program of steps over two streams."""

    module: Coupling

    def __init__(self, run: Home, module: Coupling, with_ladj: bool = False) -> None:
        super().__init__(run, module)
        self._with_ladj = with_ladj  # of a call of `Coupling.call_and_ladj`
        self.branches: list[_Branch] = []
        self.arguments: Arguments | None = None
        self.output: Value | None = None
        self.sizes: list[int] = []
        self.changed: set[int] = set()  # streams that are not what they were when the call began
        self._originals: dict[int, Held] = {}  # inputs that a branch changed in place, as they were
        self._head: Head | None = None
        self._input_probe: Tensor | None = None  # where the streams share the input's memory
        self._input_version = 0
        self._input_key = 0
        self._anchor: _Cursor | None = None  # of a long chain, whose older steps are released while it runs
        self._cursor: _Cursor | None = None
        self._states: list[_ChainState] = []  # of a long chain, after each step that is not released
        self._held_before = 0

    @property
    def has_head(self) -> bool:
        """Whether its input is held, exact."""
        return self._head is not None

    # -- forward

    def may_write(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Its streams are its own."""
        return False

    def call(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the steps, each branch into its own slots."""
        x, args, kwargs = _first_argument(args, kwargs)
        streams = self.module.split(x)
        self.begin(x.device)
        self._held_before = self.run.ledger.held
        self._open(x, streams)
        if args or kwargs:
            self.arguments = Arguments(self.run, args, kwargs)
        steps = self.module.steps()
        self.is_chain = len(steps) > 2  # each step is what a block is elsewhere: kept until the next one opens
        place = steps[0].source if steps else 1
        untouched = None if self.is_chain else streams[place].detach()  # of a block, what its first branch gets
        watch = RangeWatch(self.module)
        ladj = self.module.no_ladj(x) if self._with_ladj else None
        for index, step in enumerate(steps):
            if index and self.is_chain:
                self._step_ends(index, streams)
            change = self._forward_step(index, step, streams, args, kwargs)
            ladj = ladj + change if ladj is not None and change is not None else ladj
            watch.see(index, streams[step.target])
        watch.close()
        y = self.module.join(streams)
        streams.clear()  # here is the peak of a forward: nothing may linger
        if untouched is not None:
            self._take_input(x, place, untouched)
        self.end([branch.state for branch in self.branches])
        self._input_key = 0
        if y.requires_grad:
            self.output = Value(self.run, y, ANCHOR, self.label)
            self.output.grid_bits = self.module.grid_bits
            self.output.follows_head = self.has_head
        return y if ladj is None else (y, ladj)

    def _open(self, x: Tensor, streams: list[Tensor]) -> None:
        self.sizes = [stream.shape[self.module.dim] for stream in streams]
        if self.link(x, "input", self.module.grid_bits) is None:
            self._head = Head(self.run, x)
        self._input_key = storage_key(x)
        if not x.is_inference() and any(storage_key(stream) == self._input_key for stream in streams):
            self._input_probe, self._input_version = version_probe(x), x._version

    def _forward_step(
        self, index: int, step: Step, streams: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor | None:
        source, target = streams[step.source], streams[step.target]
        branch = _Branch(self, index, step, source, target)
        self.branches.append(branch)
        self.changed.add(step.target)
        version = version_of(source)
        before = source.detach().clone() if branch.state.facts.writes_input else None
        self.input_keys = {self._input_key, storage_key(source), storage_key(target)}
        objects = Objects.among((*args, *kwargs.values())) if args or kwargs else None
        with saving_to(branch.slots, self), branch.state.watched():
            update = step.evaluate(source, args, kwargs)
        key = (source.shape, source.stride(), source.dtype, branch.wants_grad)
        branch.slots.close(self, branch.state.facts, key)
        branch.learn_ownership(update, source)
        branch.state.finish(self.moved)
        with contextlib.nullcontext() if branch.glue is None else saving_to(branch.glue, self):
            streams[step.target], change = self._apply(step, target, update)
        if branch.glue is not None:
            branch.glue.close(self, self.facts, ("glue", self._with_ladj, key))
        if branch.target is not None or (branch.first and self.has_head):
            branch.output = self.sample(update)
        self._look_for_surprises(branch, target, before, written=version_of(source) != version)
        if branch.owns_source:
            self._replace_source(branch, self._hold(source.detach().clone()))
        if objects is not None and objects.changed():
            branch.keep(CHANGES_OBJECT, self._hold(target.detach()))
        return change

    def _apply(self, step: Step, target: Tensor, update: Tensor) -> tuple[Tensor, Tensor | None]:
        """The stream after a step, and how the step changes volume, if that is asked for."""
        return step.apply_and_ladj(target, update) if self._with_ladj else (step.apply(target, update), None)

    def _look_for_surprises(self, branch: _Branch, target: Tensor, before: Tensor | None, *, written: bool) -> None:
        """Keep a step that did what was not foreseen: it cannot be repeated."""
        branch.state.facts.writes_input = written
        if written:
            branch.keep("it changes its input in place", self._hold(target.detach()))
            if before is not None:
                branch.source = self._hold(before)
                if branch.step.source not in self.changed:
                    self._originals[branch.step.source] = branch.source
            self.changed.add(branch.step.source)
            if branch.source is not None:
                self._replace_source(branch, branch.source)
        elif branch.state.surprise:
            branch.keep(branch.state.surprise, self._hold(target.detach()))
        elif self.is_chain and not self.draws and self.surprised():
            branch.keep(DREW, self._hold(target.detach()))

    def _replace_source(self, branch: _Branch, source: Held) -> None:
        """In a long chain: the stream that a branch gets is not to be rebuilt from where the branch has it."""
        for cursor in (self._anchor, *(state.cursor for state in self._states)):
            if cursor is not None and cursor.position == branch.index:
                cursor.streams[branch.step.source] = source

    def _take_input(self, x: Tensor, place: int, untouched: Tensor) -> None:
        """Hold the input as streams, of which one is there already; its caller will let go of the joined one."""
        for reference in self.inputs:
            value = reference()
            if value is not None and value.held:
                start, other = (0, 0) if place else (self.sizes[0], 1)
                rest = compact(x.detach().narrow(self.module.dim, start, self.sizes[other]))
                if self.branches[0].owns_source:
                    untouched = untouched.clone()
                value.take([rest, untouched] if place else [untouched, rest], self.module.dim)
                for changed, original in self._originals.items():
                    value.replace_piece(changed, original)

    def _step_ends(self, position: int, streams: list[Tensor]) -> None:
        """Inside a long chain: the steps before ``position``, where the streams are these, may be let go of."""
        self.packed.clear()
        self.branches[position - 1].hold()
        state = _ChainState(self, _Cursor(position, [self._hold(stream.detach()) for stream in streams], transient=False))
        self._states.append(state)
        self.run.budget.add_frame(state, self.run.ledger.held - self._held_before)
        self.run.budget.make_room_for_block()
        self._held_before = self.run.ledger.held

    def release_before(self, cursor: _Cursor) -> None:
        """Let go of the steps before a state of the streams, which serves as their anchor."""
        if self.why_kept == THREADS:
            return
        for branch in self.branches[: cursor.position]:
            branch.release()
        self._anchor = cursor
        self._states = [state for state in self._states if state.cursor.position > cursor.position]
        self.release_inputs()

    def _hold(self, stream: Tensor) -> Held:
        return Held(self.run.ledger, stream)

    def release(self) -> None:
        """Let go of every step, if the output is what it was."""
        if self.released or self.why_kept or self.output is None:
            return
        if self.lets_go((self.output,)):
            for branch in self.branches:
                branch.release()
            self._anchor = None
            self._states = []
            self.release_inputs()

    def hold(self) -> None:
        """Keep what it saved."""
        for branch in self.branches:
            branch.hold()

    # -- backward

    def all_slots(self) -> list[Slots]:
        """Of the branches, and of the law."""
        return [slots for branch in self.branches for slots in branch.all_slots()]

    def kept_tensors(self) -> Iterator[Tensor]:
        """What its branches saved, and the streams from which earlier steps are rebuilt."""
        yield from super().kept_tensors()
        for cursor in (self._anchor, *(state.cursor for state in self._states)):
            for stream in cursor.streams if cursor is not None else ():
                yield stream.tensor

    def sources(self) -> list[Value]:
        """The output, unless the streams are at hand already."""
        if self._cursor is not None or self._anchor is not None or self.output is None:
            return []
        return [self.output]

    def rebuild(self, slots: Slots, *, transient: bool) -> None:
        """Go back step by step, filling what handles may ask for."""
        cursor = self._cursor
        if cursor is not None and cursor.transient and not (transient and cursor.position > slots.position):
            cursor = None
        if cursor is None:
            cursor = self._cursor = self._start(slots.position, transient=transient)
        if cursor.position <= slots.position:
            raise freed(self.label)
        while cursor.position > slots.position:
            self._undo(cursor, fill=not cursor.transient or cursor.position - 1 == slots.position)
        self._finish(cursor)

    def _start(self, position: int, *, transient: bool) -> _Cursor:
        anchor = self._anchor
        if anchor is not None and anchor.position > position:
            cursor = _Cursor(anchor.position, self._aliases(anchor.streams), transient=transient)
        else:
            if self.output is not None:
                fetch(self.output)
            cursor = _Cursor(len(self.branches), self._output_streams(), transient=transient)
        if not transient:
            self._anchor = None
            if self.released:
                self.output = None  # used up: the cursor carries on
        self.run.inversions.add(self)
        return cursor

    def _output_streams(self) -> list[Held]:
        if self.output is None:
            raise freed(self.label)
        self.output.check_intact()
        streams = self.output.streams(self.module.dim, self.sizes)
        if streams is None:
            return [self._hold(stream) for stream in self.module.split(self.output.tensor())]
        return self._aliases(streams)

    def _aliases(self, streams: Sequence[Held]) -> list[Held]:
        """The same memory under tensors of one's own: how many there are tells whether it may be written over."""
        for stream in streams:
            self._check_stream(stream)
        return [self._hold(stream.tensor.detach()) for stream in streams]

    def _check_stream(self, stream: Held) -> None:
        """Raise if a stream is not what it was: a branch may save it, and its backward write into it; from then on a copy."""
        if not stream.intact:
            raise modified(f"a stream of {self.label}", stream.tensor.shape, stream.before, stream.version)

    def _finish(self, cursor: _Cursor) -> None:
        """Go on to the input when no slot below is left to ask for it, and hand the input over."""
        if any(branch.live for branch in self.branches[: cursor.position]):
            return
        if cursor.position and not any(value is not None and not value.held for value in self._waiting()):
            return
        while cursor.position:
            self._undo(cursor, fill=False)
        self._deliver(cursor)

    def _waiting(self) -> list[Value | None]:
        return [reference() for reference in self.inputs]

    def _deliver(self, cursor: _Cursor) -> None:
        for value in self._waiting():
            if value is not None and not value.held:
                value.receive(self._aliases(cursor.streams) if cursor.transient else cursor.streams, self.module.dim)
                if cursor.transient:
                    self.run.passes.purge_later(value, NOTHING)
                else:
                    value.consumer = None  # the anchor of what is before it from now on
        if not cursor.transient:
            cursor.streams = []

    def forget_outputs(self) -> None:
        """Every slot is there: the output is not needed (a long chain has its anchor)."""
        self.output = None
        self._states = []

    def supply(self) -> None:
        """Reconstruct the input and use nothing up."""
        start = self._cursor or self._anchor
        cursor = (
            _Cursor(start.position, self._aliases(start.streams), transient=True)
            if start is not None and start.streams
            else _Cursor(len(self.branches), self._output_streams(), transient=True)
        )
        while cursor.position:
            self._undo(cursor, fill=False)
        for value in self._waiting():
            if value is not None and not value.held:
                value.receive(cursor.streams, self.module.dim)

    def purge(self) -> None:
        """Drop the cursor and the slots of one pass."""
        if self._cursor is not None and self._cursor.transient:
            self._cursor = None
        for branch in self.branches:
            for slots in branch.all_slots():
                if slots.transient:
                    slots.release()

    def report(self) -> Iterator[tuple[str, str, Tensor]]:
        """Slots, streams before steps that drift, anchors, arguments."""
        why = self.why_kept or ("rebuilt for backward" if self.released else NEWEST)
        for cursor in (self._cursor, self._anchor, *(state.cursor for state in self._states)):
            for anchor in cursor.streams if cursor is not None else ():
                yield ANCHOR, self.label, anchor.tensor
        for head in self._head.report() if self._head is not None else ():
            yield HEAD, self.label, head
        for tensor in self.arguments.tensors() if self.arguments is not None else ():
            yield ARGUMENT, self.label, tensor
        for branch in self.branches:
            yield from branch.state.report(self.label)
            for stream in (branch.target, branch.source):
                if stream is not None:
                    yield branch.why_kept or _EXACT, self.label, stream.tensor
            for slots in branch.all_slots():
                for saved in slots.held():
                    yield branch.why_kept or why, self.label, saved

    def _undo(self, cursor: _Cursor, *, fill: bool) -> None:
        """One step back: one evaluation of its branch gives its slots and the stream before it."""
        branch = self.branches[cursor.position - 1]
        step = branch.step
        source = cursor.streams[step.source].tensor
        self._check_input()
        fill = fill and branch.live and not branch.why_kept
        previous = self._from_head(branch) if branch.target is None else self._aliases([branch.target])[0]
        if previous is not None:
            cursor.streams[step.target] = previous  # nothing needs the stream after the step
        if previous is None:
            self._check_stream(cursor.streams[step.target])
        if fill or previous is None:
            self._check_stream(cursor.streams[step.source])
            branch.state.check(self.label)
            update = self._evaluate(branch, source, fill=fill, transient=cursor.transient)
            self.verify_replay(branch.output, update, lambda: branch.label(self))
        if previous is None:
            previous = self._hold(restride(self._inverted(branch, cursor.streams[step.target].tensor, update), branch.strides[1]))
        if fill and branch.glue is not None and branch.glue.live:
            self._refill_glue(branch, branch.glue, previous.tensor, update, transient=cursor.transient)
        cursor.streams[step.target] = previous
        if branch.source is not None:
            cursor.streams[step.source] = self._aliases([branch.source])[0]
        cursor.position -= 1

    def _from_head(self, branch: _Branch) -> Held | None:
        """The stream before a step that is the first to change it: at the head of a chain it is held."""
        head = self._head.tensor if self._head is not None and branch.first else None
        return None if head is None else self._hold(self.module.stream(head, branch.step.target, self.sizes))

    def _inverted(self, branch: _Branch, target: Tensor, update: Tensor) -> Tensor:
        """The stream before a step; in the memory of the one after it, where nobody else looks at that any more."""
        undo = branch.step.undo
        if self.modes is not None:
            with self.modes.restored():
                previous = undo(target, update)
        elif branch.step.law is ADDITIVE and is_alone(target) and target.shape == update.shape and target.dtype is update.dtype:
            after = branch.sample.of(target) if branch.sample is not None else None
            previous = target.sub_(update).data  # a tensor of its own: nothing was changed in it
            self._guard(branch, previous, after)
            return previous
        else:
            previous = undo(target, update)
        self._guard(branch, previous, target)
        return previous

    def _evaluate(self, branch: _Branch, source: Tensor, *, fill: bool, transient: bool) -> Tensor:
        args, kwargs = self.arguments.again(self.label) if self.arguments is not None else ((), {})
        if fill and branch.owns_source:
            source = source.clone()
        source = restride(source, branch.strides[0]).detach().requires_grad_(fill and branch.wants_grad[0])

        def call() -> Tensor:
            return branch.step.evaluate(source, args, kwargs)

        reach = (args, kwargs)
        if not fill:
            return branch.state.repeat(call, grad=False, reach=reach)
        return branch.state.repeat(lambda: branch.slots.fill(call, transient=transient), grad=True, reach=reach)

    def _refill_glue(self, branch: _Branch, glue: Slots, previous: Tensor, update: Tensor, *, transient: bool) -> None:
        """Repeat the law, whose own ops saved tensors too."""
        target = previous.detach().requires_grad_(branch.wants_grad[1])
        update = update.detach().requires_grad_(update.requires_grad)

        def call() -> Any:
            return glue.fill(lambda: self._apply(branch.step, target, update), transient=transient)

        law = branch.step.law
        functions = (law.forward, law.log_det, law.call_and_ladj) if self._with_ladj else (law.forward,)
        branch.state.repeat(call, grad=True, reach=functions)

    def _guard(self, branch: _Branch, previous: Tensor, after: Tensor | None) -> None:
        if branch.sample is None:
            return
        run = self.run
        fallback = run.fallback(self, branch.index, branch.index)
        bounds = self.bounds(previous)
        label = lambda: branch.label(self)  # noqa: E731
        run.guard.check(branch.sample, previous, bounds, label, fallback, run.at_end, after, soon=self.first)

    def distrust(self, below: int | None = None) -> None:
        """Keep every step (before ``below``) from the next call on."""
        for branch in self.branches[:below]:
            self.facts.keep(branch.index, self.label, "", warn=False)

    def _check_input(self) -> None:
        probe = self._input_probe
        if probe is not None and self.saves_input and probe._version != self._input_version:
            raise modified(f"the input of {self.label}", probe.shape, self._input_version, probe._version)


def _first_argument(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    if args:
        return args[0], tuple(args[1:]), kwargs
    rest = dict(kwargs)
    return rest.pop("x"), (), rest
