"""Frames of blocks whose law the runtime does not know: it has their inverse, and sees their branches."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import InversionError, ReplayError, RevhooksError, explain
from ..registry import Registration
from ..state import untouched
from ..storage import Geometry, Held, is_near, is_opaque, restride, storage_key, version_of, version_probe
from ..tracing import compiler
from .arguments import Arguments
from .branch import CallState
from .frame import ANCHOR, ARGUMENT, CHANGES_OBJECT, HEAD, NEWEST, Head, ModuleFrame
from .guard import Sample, relative_error
from .interpose import branches_of, shadowed, without_forward_hooks
from .local import saving_to
from .objects import Objects
from .plan import Facts, Inversion, facts_of
from .slots import Slots
from .tree import leaves_of, map_leaves, map_tensors, tensors_of
from .value import Value, fetch, freed, modified

if TYPE_CHECKING:
    from .run import Run

__all__ = ["OpaqueFrame"]

_PLAIN_TYPES = (bool, int, float, str, type(None))


class _Call:
    """One call of a child in forward."""

    __slots__ = ("args", "child", "fills", "grads", "output", "sample", "shapes", "slots", "state", "strides")

    def __init__(self, frame: OpaqueFrame, child: nn.Module, arguments: Any) -> None:
        tensors = tensors_of(arguments)
        self.child = child
        self.slots = Slots(frame, 0)
        self.state = CallState(frame, (child,), facts_of(child), local=True)
        self.shapes = [t.shape for t in tensors]
        self.strides = [t.stride() for t in tensors]
        self.grads = [t.requires_grad for t in tensors]
        self.sample: Sample | None = frame.run.guard.sample(tensors[0]) if tensors else None
        # a pre-hook (old weight norm, FSDP) runs outside of ``forward``, and an inverse runs it without grad
        self.fills = not child._forward_pre_hooks and not any(map(is_opaque, tensors))
        # only while the inverse is tried: what went in and out
        self.args: list[Tensor] = []
        self.output: Any = None


class _Input:
    """A tensor argument that the inverse gives back."""

    __slots__ = ("geometry", "grad", "head", "keeps_zeros", "probe", "sample", "value", "version", "zeros")

    def __init__(self, frame: OpaqueFrame, place: int, tensor: Tensor) -> None:
        self.keeps_zeros = keeps_zeros = frame.entry.keeps_zeros_in(place)
        self.geometry = Geometry.of(tensor)
        self.grad = tensor.requires_grad
        self.probe = version_probe(tensor)
        self.version = version_of(tensor)
        value = frame.link(tensor, place, keeps_zeros=keeps_zeros)
        self.head = Head(frame.run, tensor) if value is None else None
        self.zeros = self.head is not None and not keeps_zeros and frame.has_zeros(tensor, place)
        self.sample = frame.run.guard.sample(tensor) if value is not None else None
        self.value = weakref.ref(value) if value is not None else None


class _Constant:
    """A part of the output that is no tensor."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class OpaqueFrame(ModuleFrame):
    """A frame that is rebuilt at one go, from its outputs or, where its inverse does not serve, from its inputs."""

    def __init__(self, run: Run, module: nn.Module, entry: Registration, facts: Facts | None = None) -> None:
        super().__init__(run, module, facts)
        self.entry = entry
        self.glue = Slots(self, 0)
        self.calls: list[_Call] = []
        self.outputs: list[Value] = []
        self.given: list[_Input] = []
        self.held: Arguments | None = None
        self.replayed = False
        self.inversion = Inversion(0, ())
        self._children = branches_of(module) if compiler() is None else []  # what is compiled is one piece
        self._inverted = False  # its outputs are used up
        self._shape: Any = None  # of the output: Values' places and constants
        self._output_sample: Sample | None = None

    # -- forward

    def call(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the block, each child's call into its own slots, and try the inverse the first time."""
        tensors = tensors_of((args, kwargs))
        objects = Objects.among((*args, *kwargs.values()))
        self.begin(tensors[0].device if tensors else torch.device("cpu"))
        self._original = original
        versions = [version_of(t) for t in tensors]
        self.input_keys.update(storage_key(t) for t in tensors)
        self.key = _key_of(self.module, args, kwargs)
        known = self.facts.inversion(self.key)
        self.state = CallState(self, (self.module,), self.facts)

        def branch(child: nn.Module, proceed: Callable[..., Any], a: tuple[Any, ...], k: dict[str, Any]) -> Any:
            return self._forward_branch(child, proceed, a, k, recording=known is None)

        with saving_to(self.glue, self, self.facts), shadowed(self._children, branch), self.state.watched():
            output = original(self.module, *args, **kwargs)
        self.state.finish(self.moved)
        self.end([self.state, *(call.state for call in self.calls)])
        for state in (self.state, *(call.state for call in self.calls)):
            if state.surprise:
                self.keep(state.surprise)
        self.facts.writes_input = [version_of(t) for t in tensors] != versions
        if self.facts.writes_input:
            self.keep("it changes its input in place")
        if objects is not None and objects.changed():
            self.keep(CHANGES_OBJECT)
        self._close(output, args, kwargs, known)
        return output

    def _forward_branch(
        self,
        child: nn.Module,
        proceed: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        recording: bool,
    ) -> Any:
        call = _Call(self, child, (args, kwargs))
        self.calls.append(call)
        inputs = self.input_keys
        self.input_keys = inputs | {storage_key(t) for t in tensors_of((args, kwargs))}
        try:
            with saving_to(call.slots, self, call.state.facts), call.state.watched():
                output = proceed(*args, **kwargs)
        finally:
            self.input_keys = inputs
        call.state.finish(self.moved)
        if recording:  # copies: the block, or its inverse, may write into them
            call.args = [t.detach().clone() for t in tensors_of((args, kwargs))]
            call.output = map_tensors(_copy, output)
        return output

    def _close(self, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any], known: Inversion | None) -> None:
        tensors = tensors_of(output)
        if not any(tensor.requires_grad for tensor in tensors):
            return
        if any(is_opaque(t) or storage_key(t) in self.input_keys for t in tensors):
            self.keep("its output shares memory with its input")
        if known is None and not self.why_kept:
            known = self._learn(output, args, kwargs)
        for call in self.calls:
            call.args, call.output = [], None
        if self.why_kept or known is None:
            return
        self.inversion = known
        self.replayed = bool(known.problem) or self.key in self.facts.kept
        given = 0 if self.replayed else known.inputs
        self.held = Arguments(self.run, args[given:], kwargs)
        self.given = [_Input(self, place, tensor) for place, tensor in enumerate(args[:given])]
        if self.replayed or any(one.head is not None for one in self.given):
            self._output_sample = self.run.guard.sample(tensors[0])
        if not self.replayed:
            self.outputs = [Value(self.run, tensor, ANCHOR, self.label) for tensor in tensors]
            self._shape = map_leaves(lambda leaf: None if isinstance(leaf, Tensor) else _Constant(leaf), output)

    def _learn(self, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inversion | None:
        """Try the inverse; what overflowed shows nothing."""
        if not all(bool(t.isfinite().all()) for t in tensors_of(output) if t.is_floating_point() and not t.is_meta):
            self.keep("its output is not finite")
            return None
        with torch.no_grad(), untouched(self.module), without_forward_hooks(self._children):
            known = self._try_inverse(output, args, kwargs)
        self.facts.learn_inversion(self.key, known)
        if known.problem and self.run.guard.mode == "raise":
            raise InversionError(
                explain(
                    self.label,
                    expected="an inverse that gives the inputs back",
                    got=known.problem,
                    remedy="mend the inverse; check(module, *inputs) shows more",
                )
            )
        if known.problem:
            self.facts.keep(self.key, self.label, known.problem)
        return known

    # -- the first try of an inverse (Rule 10)

    def _try_inverse(self, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inversion:
        """Invert the output at once; branch calls that repeat one of forward get its result for nothing."""
        outputs = output if isinstance(output, tuple) else (output,)
        inversion = Inversion(0, (), "no way of calling it fits its signature")
        for inputs in [len(outputs), 1] if len(outputs) > 1 else [1]:
            if inputs <= len(args) and all(isinstance(a, Tensor) for a in args[:inputs]):
                inversion = self._try_inputs(inputs, output, args, kwargs)
                if not inversion.problem:
                    break
        return inversion

    def _try_inputs(self, inputs: int, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inversion:
        matches: list[int | None] = []

        def branch(child: nn.Module, proceed: Callable[..., Any], a: tuple[Any, ...], k: dict[str, Any]) -> Any:
            tensors = tensors_of((a, k))
            candidates = [i for i, call in enumerate(self.calls) if self._repeats(call, child, tensors)]
            match = next((i for i in candidates if i not in matches), candidates[-1] if candidates else None)
            if match in matches:  # an iteration: its last call is the closest
                matches[matches.index(match)] = None
            matches.append(match)
            return proceed(*a, **k) if match is None else map_tensors(_copy, self.calls[match].output)

        generators = self.run.rng.capture(self.device)
        if self.state.rng is not None:
            self.state.rng.restore()
        try:
            with shadowed(self._children, branch):
                result = self._call_inverse(*map_tensors(_copy, (output, args[inputs:], kwargs)))
        except RevhooksError as error:
            return Inversion(inputs, (), str(error))
        except Exception as error:
            return Inversion(inputs, (), f"{type(error).__name__}: {error}")
        finally:
            generators.restore()
        return Inversion(inputs, tuple(matches), self._judge(result, args[:inputs]))

    def _repeats(self, call: _Call, child: nn.Module, tensors: list[Tensor]) -> bool:
        if call.child is not child or call.shapes != [t.shape for t in tensors]:
            return False
        return all(
            a.dtype == b.dtype and relative_error(a, b) <= self.bounds(b)[0] for a, b in zip(tensors, call.args, strict=True)
        )

    def _call_inverse(self, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        inverse = self.entry.resolve(self.module)
        if isinstance(self.entry.inverse, str) and isinstance(output, tuple):
            result = inverse(*output, *args, **kwargs)
        else:
            result = inverse(output, *args, **kwargs)
        return result if isinstance(result, tuple) else (result,)

    def _judge(self, result: tuple[Any, ...], wanted: tuple[Any, ...]) -> str:
        """What is wrong with what an inverse returned, or ``""``."""
        if len(result) != len(wanted):
            return f"{len(result)} values from its inverse where {len(wanted)} are expected"
        for i, (got, expected) in enumerate(zip(result, wanted, strict=True)):
            if not isinstance(got, Tensor):
                return f"{type(got).__name__} for input {i} from its inverse, where a tensor is expected"
            if got.shape != expected.shape:
                return f"shape {tuple(got.shape)} for input {i} from its inverse, where {tuple(expected.shape)} is expected"
            if got.dtype != expected.dtype:
                return f"dtype {got.dtype} for input {i} from its inverse, where {expected.dtype} is expected"
            error = relative_error(got, expected)
            if error > self.bounds(expected)[0]:
                return f"an inverse that is off by {error:.2g} (relative) for input {i}"
        return ""

    # -- between

    def release(self) -> None:
        """Let go of every slot, if it can be rebuilt."""
        if self.released or self.why_kept or not (self.outputs or self.replayed):
            return
        if any(not value.held or value.current_version != value.version for value in self.outputs):
            self.keep("its output was changed in place")
        elif not all(slots.intact() for slots in self._all_slots()):
            self.keep("a tensor that it saved was changed in place")
        else:
            self.released = True
            for call in self.calls:
                call.state.remember(call.slots)
            for slots in self._all_slots():
                slots.release()
            self.release_inputs()

    def _all_slots(self) -> list[Slots]:
        return [self.glue, *(call.slots for call in self.calls)]

    def sources(self) -> list[Value]:
        """The outputs."""
        return self.outputs

    def report(self) -> Iterator[tuple[str, str, Tensor]]:
        """Slots, inputs of a chain, and arguments."""
        why = self.why_kept or ("rebuilt for backward" if self.released else NEWEST)
        for given in self.given:
            for head in given.head.report() if given.head is not None else ():
                yield HEAD, self.label, head
        for tensor in self.held.tensors() if self.held is not None else ():
            yield ARGUMENT, self.label, tensor
        for state in (self.state, *(call.state for call in self.calls)):
            yield from state.report(self.label)
        for slots in self._all_slots():
            for saved in slots.held():
                yield why, self.label, saved

    # -- backward

    def rebuild(self, slots: Slots, *, transient: bool) -> None:
        """Fill all slots by the inverse, or by running forward again from inputs that are held."""
        self.state.check(self.label)
        heads = [given.head.tensor for given in self.given if given.head is not None]
        if self.replayed or (len(heads) == len(self.given) and None not in heads):
            self._replay_from(heads, transient=transient)
            return
        if self._inverted:
            raise freed(self.label)
        self._deliver(self._invert(fill=True, transient=transient), transient=transient)
        if not transient:
            self.outputs = []
            self._inverted = True

    def _replay_from(self, heads: list[Any], *, transient: bool) -> None:
        """The inputs are there, exact: run forward again."""
        self._check_inputs()
        args, kwargs = self._arguments()
        fresh = [head.detach().requires_grad_(given.grad) for head, given in zip(heads, self.given, strict=False)]
        self._replay((*fresh, *args), kwargs, {}, transient=transient)
        self.run.replays.add(self)
        if not transient:
            self.outputs = []

    def forget_outputs(self) -> None:
        """Every slot is there: the outputs are not needed."""
        self.outputs = []

    def supply(self) -> None:
        """Reconstruct the inputs and use nothing up."""
        self._deliver(self._invert(fill=False, transient=True), transient=True)

    def purge(self) -> None:
        """Drop the slots of one pass."""
        for slots in self._all_slots():
            if slots.transient:
                slots.release()

    def _arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self.held.again(self.label) if self.held is not None else ((), {})

    def _deliver(self, inputs: list[Held], *, transient: bool) -> None:
        for given, tensor in zip(self.given, inputs, strict=True):
            value = given.value() if given.value is not None else None
            if value is None or value.held:
                continue
            value.receive_tensor(tensor.tensor)
            if transient:
                self.run.purge_later(value)
            else:
                value.consumer = None

    def _invert(self, *, fill: bool, transient: bool) -> list[Held]:
        for value in self.outputs:
            fetch(value)
            value.check_intact()
        self._check_inputs()
        self.run.inversions.add(self)
        copies = [value.tensor().clone() for value in self.outputs]  # Rule 11
        written = {storage_key(copy) for copy in copies}
        places = iter(copies)
        output = map_leaves(lambda part: part.value if isinstance(part, _Constant) else next(places), self._shape)
        args, kwargs = self._arguments()
        memo: dict[int, Any] = {}
        ordinal = iter(self.inversion.matches)
        refill = any(given.zeros for given in self.given)  # from the held zeros: the inverse calls its branches on 1e-17

        def branch(child: nn.Module, proceed: Callable[..., Any], a: tuple[Any, ...], k: dict[str, Any]) -> Any:
            index = next(ordinal, None)
            call = self.calls[index] if index is not None and index < len(self.calls) else None
            if index is None or call is None or not fill or refill or not self._same_call(call, child, (a, k)):
                self.run.second_evaluations += fill
                state = call.state if call is not None and call.child is child else self.state
                return state.repeat(lambda: proceed(*a, **k), grad=False)
            a, k = _as_leaves((a, k), call.strides, call.grads, written)
            memo[index] = self._filled(call, lambda: proceed(*a, **k), transient=transient)
            return map_tensors(_copy, memo[index])

        with shadowed(self._children, branch):
            result = self.state.repeat(lambda: self._call_inverse(output, args, kwargs), grad=False)
        inputs = self._accept(result)
        missing = [i for i, call in enumerate(self.calls) if call.slots.live and i not in memo]
        if fill and (missing or self.glue.live):
            fresh = [held.tensor.detach().requires_grad_(given.grad) for held, given in zip(inputs, self.given, strict=True)]
            self._replay((*fresh, *args), kwargs, memo, transient=transient)
        return inputs

    def _same_call(self, call: _Call, child: nn.Module, arguments: Any) -> bool:
        """Whether the inverse calls a branch on what forward called it on."""
        tensors = tensors_of(arguments)
        if call.child is not child or not call.fills or [t.shape for t in tensors] != call.shapes:
            return False
        if not tensors:
            return True
        if is_near(tensors[0].device):
            return self.run.guard.matches(call.sample, tensors[0], self.bounds(tensors[0]))
        # it did at the first try; if it does not now, that is told at the end of backward
        self._guard(call.sample, tensors[0], zeros=False)
        return True

    @staticmethod
    def _filled(call: _Call, run: Callable[[], Any], *, transient: bool) -> Any:
        return call.state.repeat(lambda: call.slots.fill(run, transient=transient), grad=call.state.grad)

    def _accept(self, result: tuple[Any, ...]) -> list[Held]:
        """Check what the inverse returned, and put it into the strides of the original."""
        if len(result) != len(self.given):
            raise self._ill_formed(f"{len(self.given)} inputs", f"{len(result)}")
        inputs = []
        for got, given in zip(result, self.given, strict=True):
            size, stride, _ = given.geometry
            if not isinstance(got, Tensor) or got.shape != size:
                raise self._ill_formed(f"an input of shape {tuple(size)}", str(tuple(getattr(got, "shape", ()))))
            exact = given.head.tensor if given.head is not None else None
            got = restride(got.detach(), stride) if exact is None else exact
            inputs.append(Held(self.run.ledger, got))
            self._guard(given.sample, got, zeros=not given.keeps_zeros)
        return inputs

    def _guard(self, sample: Sample | None, rebuilt: Tensor, *, zeros: bool) -> None:
        run = self.run
        fallback = run.fallback(self, self.key, 0)
        source = self.outputs[0].tensor() if self.outputs else None
        run.guard.check(sample, rebuilt, self.bounds(rebuilt), lambda: self.label, fallback, run.at_end, source, zeros=zeros)

    def distrust(self, below: int | None = None) -> None:
        """Replay it from the next call on."""
        self.facts.keep(self.key, self.label, "", warn=False)

    def _ill_formed(self, expected: str, got: str) -> InversionError:
        return InversionError(explain(self.label, expected=f"{expected} from its inverse", got=got, remedy="mend the inverse"))

    def _replay(self, args: Any, kwargs: Any, memo: dict[int, Any], *, transient: bool) -> None:
        """Run forward again; branches in ``memo`` are short-circuited, everything else fills its slots."""
        ordinal = iter(range(len(self.calls)))

        def branch(child: nn.Module, proceed: Callable[..., Any], a: tuple[Any, ...], k: dict[str, Any]) -> Any:
            index = next(ordinal, None)
            if index is None or self.calls[index].child is not child:
                raise ReplayError(
                    explain(
                        f"replay of {self.label}",
                        expected="the calls of its children that forward made",
                        got="other calls",
                        remedy="make the block repeatable, or exclude it with keep=",
                    )
                )
            call = self.calls[index]
            if index not in memo:
                return self._filled(call, lambda: proceed(*a, **k), transient=transient)
            if call.state.rng_after is not None:
                call.state.rng_after.restore()
            return map_tensors(_not_a_leaf, memo[index])

        def forward() -> Any:
            return self._original(self.module, *args, **kwargs)

        with shadowed(self._children, branch):
            output = self.state.repeat(lambda: self.glue.fill(forward, transient=transient), grad=True)
        self.verify_replay(self._output_sample, tensors_of(output)[0], lambda: self.label)

    def _check_inputs(self) -> None:
        for given in self.given:
            if self.saves_input and given.probe._version != given.version:
                raise modified(f"an input of {self.label}", given.geometry.size, given.version, given.probe._version)


def _key_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
    """What an inverse may depend on: shapes, dtypes, plain arguments, the mode."""
    looks = tuple(
        (leaf.shape, leaf.dtype, leaf.device.type)
        if isinstance(leaf, Tensor)
        else leaf
        if isinstance(leaf, _PLAIN_TYPES)
        else type(leaf)
        for leaf in leaves_of((args, kwargs))
    )
    looks = tuple("nan" if isinstance(leaf, float) and math.isnan(leaf) else leaf for leaf in looks)
    return looks, len(args), tuple(kwargs), module.training


def _not_a_leaf(tensor: Tensor) -> Tensor:
    """A copy that code may write into, with the ``requires_grad`` of the original."""
    return tensor.detach().requires_grad_(tensor.requires_grad).clone()


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _as_leaves(tree: Any, strides: list[tuple[int, ...]], grads: list[bool], written: set[int]) -> Any:
    """The tensors as leaves, in the strides and with the ``requires_grad`` that they had in forward.

    An inverse may write later into what lies in ``written``: that is copied.
    """
    looks = iter(zip(strides, grads, strict=True))

    def leaf(tensor: Tensor) -> Tensor:
        stride, grad = next(looks)
        fresh = restride(tensor.clone() if storage_key(tensor) in written else tensor, stride)
        return fresh.detach().requires_grad_(grad)

    return map_tensors(leaf, tree)
