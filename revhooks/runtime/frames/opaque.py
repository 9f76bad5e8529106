"""Frames of blocks whose law the runtime does not know: it has their inverse, and sees their branches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...capture import CAPTURED, is_capturing
from ...errors import InversionError, ReplayError, explain
from ...kinds import leaf_of
from ...registry import Registration
from ...saved import freed, modified
from ...storage import Held, is_near, is_opaque, own_storage_key, restride, storage_key, version_of
from ...tracing import compiler
from ..calls.arguments import Arguments
from ..calls.objects import Objects
from ..calls.state import CallState
from ..handles.local import saving_to
from ..handles.value import Value, fetch
from ..passes import NOTHING
from ..policy.guard import Sample
from ..policy.plan import Facts, Inversion, has_custom_function
from ..policy.ways import Place, in_order, leading, places_of, returned, split
from ..tree import flatten, leaves_of, map_tensors, tensors_of
from .frame import ANCHOR, ARGUMENT, CHANGES_OBJECT, HEAD, NEWEST, ModuleFrame
from .interpose import branches_of, deeper, shadowed
from .record import Call, Constant, Input, as_leaves, copied, detached, not_a_leaf
from .replay import FunctionModule
from .slots import Slots
from .trial import Trial

if TYPE_CHECKING:
    from .home import Home

__all__ = ["OpaqueFrame"]

_PLAIN_TYPES = (bool, int, float, str, type(None))
_OVER_BUDGET = "over budget"  # of a key: what is replayed by preference is inverted
_SMALL = 16  # an input of so small a part of what the block saves may be kept
_WORTH = 160  # and of so small a part for each evaluation that this spares
_TINY = 64  # an input of so small a part of it is kept, whatever its inverse costs


class OpaqueFrame(ModuleFrame):
    """A frame that is rebuilt at one go, from its outputs or, where its inverse does not serve, from its inputs."""

    def __init__(self, run: Home, module: nn.Module, entry: Registration, facts: Facts | None = None) -> None:
        super().__init__(run, module, facts)
        self.entry = entry
        self.key: tuple[object, ...] = ()
        self.glue = Slots(self, 0)
        self.calls: list[Call] = []
        self.outputs: list[Value] = []
        self.given: list[Input] = []
        self.held: Arguments | None = None
        self.replayed = False
        self.inversion = Inversion(0, ())
        known = self.facts.branches(entry.method) if entry.branches is None else None
        compiled = compiler() is not None  # which is one piece
        self.children = [] if compiled else branches_of(module, entry.branches) if known is None else known
        self._looks_deeper = not compiled and known is None and entry.branches is None and not isinstance(module, FunctionModule)
        self._inverse_strays: list[nn.Module] = []  # modules below its branches that its inverse calls past them
        self._inverted = False  # its outputs are used up
        self._places: tuple[Place, ...] = ()  # of its arguments
        self._inputs: list[Any] = []  # the arguments that the inverse gives back, without their tensors
        self._with: Callable[[Iterable[Any]], Any] = list  # makes these of tensors
        self._shape: Any = None  # of the output: `None` for Values and constants, and what makes it of leaves
        self._samples: list[Sample | None] = []  # of the outputs

    # -- forward

    def may_write(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """As such calls did."""
        self.key = (self.entry.method, *_key_of(self.module, args, kwargs))
        return self.facts.writes(self.key)

    def call(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the block, each branch's call into its own slots, and try the inverse the first time."""
        tensors = tensors_of((args, kwargs))
        objects = Objects.among((*args, *kwargs.values()))
        self.begin(tensors[0].device if tensors else torch.device("cpu"))
        self._original = original
        self._places = places_of(original, args, kwargs)
        versions, key = [version_of(t) for t in tensors], self.key
        self.input_keys.update(storage_key(t) for t in tensors)
        if self.entry.prefer == "replay" and self._is_over_budget():
            self.key = (_OVER_BUDGET, *self.key)
        known = self.facts.inversion(self.key)
        self.state = CallState(self, (self.module,), self.facts)
        strays: list[nn.Module] = []
        output = self._run(args, kwargs, strays, recording=known is None)
        self.state.finish(self.moved)
        self.end([self.state, *(call.state for call in self.calls)])
        for state in (self.state, *(call.state for call in self.calls)):
            if state.surprise:
                self.keep(state.surprise)
        writes = [version_of(t) for t in tensors] != versions
        self.facts.learn_writes(key, writes)
        if writes:
            self.keep("it changes its input in place")
        if objects is not None and objects.changed():
            self.keep(CHANGES_OBJECT)
        self._close(output, args, kwargs, known, strays)
        for call in self.calls:
            call.forget()
        return output

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], strays: list[nn.Module], *, recording: bool) -> Any:
        def branch(child: nn.Module, proceed: Callable[..., Any], a: tuple[Any, ...], k: dict[str, Any]) -> Any:
            return self._forward_branch(child, proceed, a, k, recording=recording)

        below = deeper(self.children) if recording and self._looks_deeper else []
        self.open = True
        with (
            saving_to(self.glue, self),
            shadowed(self.children, branch, below, strays.append),
            self.state.watched(),
        ):
            output = self._original(self.module, *args, **kwargs)
        self.glue.close(self, self.facts, (self.key, len(self.calls)), output)
        self.open = False
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
        call = Call(self, child, (args, kwargs))
        self.calls.append(call)
        inputs = self.input_keys
        self.input_keys = inputs | {own_storage_key(t) for t in tensors_of((args, kwargs))}
        try:
            with saving_to(call.slots, self), call.state.watched():
                output = proceed(*args, **kwargs)
            call.slots.close(
                self, call.state.facts, (len(self.calls), tuple(call.shapes), tuple(call.strides), tuple(call.grads))
            )
        finally:
            self.input_keys = inputs
        call.state.finish(self.moved)
        if recording:
            call.record((args, kwargs), output)
        return output

    def _close(
        self,
        output: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        known: Inversion | None,
        strays: list[nn.Module],
    ) -> None:
        tensors, arguments = tensors_of(output), tensors_of((args, kwargs))
        if not any(tensor.requires_grad for tensor in tensors):
            return
        if any(is_opaque(t) or self._shares_memory(t, arguments) for t in tensors):
            self.keep("its output shares memory with its input")
        if known is None and not self.why_kept:
            known = self._learn(output, args, kwargs, strays)
        if self.why_kept or known is None:
            return
        self.inversion = known
        self.replayed = bool(known.problem) or known.replay or self.key in self.facts.kept
        given = self._places[: 0 if self.replayed else known.inputs]
        self.held = Arguments(self.run, *split(given, args, kwargs))
        trees = in_order(given, args, kwargs)
        self.given = [
            Input(self, place, tensor, keeps_zeros=self.entry.keeps_zeros_in(place))
            for place, tensor in enumerate(tensors_of(trees))
        ]
        if all(one.head is not None for one in self.given):
            self._samples = [self.sample(tensor) for tensor in tensors]
        self._learn_ownership(tensors, arguments)
        if not self.replayed:
            _, self._with = flatten(trees)
            self._inputs = self._with(itertools.repeat(None))
            self.outputs = [Value(self.run, tensor, ANCHOR, self.label) for tensor in tensors]
            for value in self.outputs:
                value.follows_head = any(one.head is not None for one in self.given)
            leaves, again = flatten(output)
            self._shape = [None if isinstance(leaf, Tensor) else Constant(leaf) for leaf in leaves], again

    def _learn_ownership(self, outputs: list[Tensor], arguments: list[Tensor]) -> None:
        """Whether a backward in it may write into its input: then the blocks before it are not rebuilt from where it has that."""
        if self.facts.owns_input is None:
            saves = any(slots.saves_input for slots in self.all_slots())
            self.facts.owns_input = saves and has_custom_function(outputs, arguments)
        for given in self.given if self.facts.owns_input else ():
            value = given.value() if given.value is not None else None
            if value is not None and value.held:
                value.take([value.tensor().clone()], 0)

    def _shares_memory(self, output: Tensor, arguments: list[Tensor]) -> bool:
        """Whether an output lies in an argument's memory, and is not just passed on."""
        return storage_key(output) in self.input_keys and not any(output is argument for argument in arguments)

    def _learn(self, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any], strays: list[nn.Module]) -> Inversion | None:
        """Try the inverse; what overflowed shows nothing."""
        if self._is_cheaply_replayed(args, kwargs):
            self.facts.learn_inversion(self.key, Inversion(0, (), replay=True))
            return self.facts.inversion(self.key)
        if is_capturing(self.device):
            self.keep(CAPTURED)
            return None
        if not all(bool(t.detach().isfinite().all()) for t in tensors_of(output) if t.is_floating_point() and not t.is_meta):
            self.keep("its output is not finite")
            return None
        trial = Trial(self, self.children, self.calls, self.state, strays)
        known = trial.run(self.entry, output, args, kwargs, self._places)
        known = known._replace(differentiated=frozenset(i for i, call in enumerate(self.calls) if call.takes_gradient))
        if known.problem and self.run.guard.mode == "raise" and not self.entry.assumed:
            raise InversionError(
                explain(
                    self.label,
                    expected="an inverse that gives the inputs back",
                    got=known.problem,
                    remedy="mend the inverse; check(module, *inputs) shows more",
                )
            )
        better = trial.better_branches() if self._looks_deeper and not known.problem else []
        if better:  # from the next call on; this one pays for branches that it has not seen
            self._inverse_strays = better
            above = [child for child in self.children if not set(better).intersection(deeper([child]))]
            self.facts.learn_branches(self.entry.method, [*above, *better])
            return known
        self.facts.learn_inversion(self.key, known)
        if known.problem:
            self.facts.keep(self.key, self.label, known.problem, warn=not self.entry.assumed)
        return known

    def _is_over_budget(self) -> bool:
        """Whether inputs that are kept are more than the bytes that somebody allows."""
        return self.entry.inverse is not None and 0 < self.run.budget.limit < self.run.ledger.held

    def _is_cheaply_replayed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether to keep the input takes little memory, or spares a costly inverse (DESIGN section 7)."""
        cost, prefer = self.entry.cost, self.entry.prefer
        if self.entry.inverse is None or prefer is not None:
            return self.entry.inverse is None or (prefer == "replay" and self.key[0] is not _OVER_BUDGET)
        given = sum(tensor.nbytes for tensor in tensors_of(leading(in_order(self._places, args, kwargs))))
        saved = sum(slots.packed_bytes for slots in self.all_slots())
        return given * _TINY <= saved or (cost > 0 and given * _SMALL <= saved and given * _WORTH <= saved * cost)

    # -- between

    def release(self) -> None:
        """Let go of every slot, if it can be rebuilt."""
        if self.released or self.why_kept or not (self.outputs or self.replayed):
            return
        if self.lets_go(self.outputs):
            for call in self.calls:
                call.state.remember(call.slots)
            for slots in self.all_slots():
                slots.release()
            self.release_inputs()

    def hold(self) -> None:
        """Keep what it saved."""
        for slots in self.all_slots():
            slots.hold()

    def all_slots(self) -> list[Slots]:
        """Of the glue, and of the branches' calls."""
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
        for slots in self.all_slots():
            for saved in slots.held():
                yield why, self.label, saved

    # -- backward

    def rebuild(self, slots: Slots, *, transient: bool) -> None:
        """Fill all slots by the inverse, or by running forward again from inputs that are held."""
        self.state.check(self.label)
        heads = [given.head.tensor for given in self.given if given.head is not None]
        if self.replayed or (len(heads) == len(self.given) and None not in heads):
            self._check_inputs()
            self._replay(heads, {}, self._samples, transient=transient)
            self.run.replays.add(self)
        elif self._inverted:
            raise freed(self.label)
        else:
            self._deliver(self._invert(fill=True, transient=transient), transient=transient)
            self._inverted = not transient
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
        for slots in self.all_slots():
            if slots.transient:
                slots.release()

    def _arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self.held.again(self.label) if self.held is not None else ((), {})

    def _deliver(self, inputs: list[Held], *, transient: bool) -> None:
        for given, tensor in zip(self.given, inputs, strict=True):
            value = given.value() if given.value is not None else None
            if value is None or value.held:
                continue
            # what a backward may write into is not what the blocks before it are rebuilt from
            value.receive_tensor(tensor.tensor.clone() if self.facts.owns_input else tensor.tensor)
            if transient:
                self.run.passes.purge_later(value, NOTHING)
            else:
                value.consumer = None

    def _invert(self, *, fill: bool, transient: bool) -> list[Held]:
        for value in self.outputs:
            fetch(value)
            value.check_intact()
        self._check_inputs()
        self.run.inversions.add(self)
        memo: dict[int, Any] = {}
        inputs = self._accept(self._run_inverse(memo if fill else None, transient=transient))
        for index in [index for index in memo if not self.calls[index].slots.intact()]:  # the inverse has written to its input
            del memo[index]
            self.run.second_evaluations += 1
        missing = [i for i, call in enumerate(self.calls) if call.slots.live and i not in memo]
        if fill and (missing or self.glue.live):
            samples = [self.sample(value.tensor()) for value in self.outputs]
            self._replay([held.tensor for held in inputs], memo, samples, transient=transient)
        return inputs

    def _run_inverse(self, memo: dict[int, Any] | None, *, transient: bool) -> Any:
        """Run the inverse; branches that it calls as forward did fill their slots, and their results go to ``memo``."""
        args, kwargs = split(self._places[len(self._inputs) : self.inversion.way.held], *self._arguments())
        copies = [value.tensor().clone() for value in self.outputs]  # Rule 11
        places, (leaves, again) = iter(copies), self._shape
        output = again(next(places) if leaf is None else leaf.value for leaf in leaves)
        outputs = {storage_key(copy) for copy in copies}
        ordinals = itertools.count()

        def branch(child: nn.Module, proceed: Callable[..., Any], a: tuple[Any, ...], k: dict[str, Any]) -> Any:
            ordinal = next(ordinals)
            index, call = self._match(ordinal)
            if memo is None or call is None or not self._fills(index, call, child, (a, k)):
                self.run.second_evaluations += 1
                return self._evaluate(call, child, proceed, a, k)
            written = ordinal in self.inversion.written
            a, k = as_leaves((a, k), call.strides, call.grads, lambda t: written or own_storage_key(t) in outputs)
            memo[index] = map_tensors(detached, self._filled(call, lambda: proceed(*a, **k), transient=transient))
            return map_tensors(copied, memo[index])

        def note(_: nn.Module) -> None:
            self.run.second_evaluations += 1

        with shadowed(self.children, branch, self._inverse_strays, note):
            way, inverse = self.inversion.way, self.entry.resolve(self.module)
            reach = inverse, args, kwargs
            return self.state.repeat(lambda: way.call(inverse, output, args, kwargs), grad=False, reach=reach)

    def _evaluate(
        self, call: Call | None, child: nn.Module, proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A branch call of the inverse that fills nothing; one that takes a gradient inside takes it here, too."""
        state = call.state if call is not None and call.child is child else self.state
        if torch.is_grad_enabled() or not any(one.child is child and one.takes_gradient for one in self.calls):
            return state.repeat(lambda: proceed(*args, **kwargs), grad=torch.is_grad_enabled())
        args, kwargs = map_tensors(lambda t: leaf_of(t, requires_grad=t.is_floating_point() or t.is_complex()), (args, kwargs))
        return map_tensors(copied, state.repeat(lambda: proceed(*args, **kwargs), grad=True))

    def _match(self, ordinal: int) -> tuple[int, Call | None]:
        """The call of forward that a branch call of the inverse repeats, as the first try has shown."""
        matches = self.inversion.matches
        index = matches[ordinal] if ordinal < len(matches) else None
        return (-1, None) if index is None or index >= len(self.calls) else (index, self.calls[index])

    def _fills(self, index: int, call: Call, child: nn.Module, arguments: Any) -> bool:
        """Whether a branch call of the inverse fills the slots of one of forward."""
        if index in self.inversion.differentiated or call.takes_gradient or torch.is_grad_enabled():
            return False  # forward, or the inverse, takes a gradient through it: its result alone will not do
        if any(given.zeros for given in self.given):  # the inverse calls its branches on 1e-17 where zeros are held
            return False
        return self._same_call(call, child, arguments)

    def _same_call(self, call: Call, child: nn.Module, arguments: Any) -> bool:
        """Whether the inverse calls a branch on what forward called it on."""
        tensors = tensors_of(arguments)
        if call.child is not child or not call.fills or any(map(is_opaque, tensors)):
            return False
        if [t.shape for t in tensors] != call.shapes:
            return False
        if not tensors:
            return True
        if is_near(tensors[0].device):
            return self.run.guard.matches(call.sample, tensors[0], self.bounds(tensors[0]))
        # it did at the first try; if it does not now, that is told at the end of backward
        self._guard(call.sample, tensors[0], zeros=False)
        return True

    @staticmethod
    def _filled(call: Call, run: Callable[[], Any], *, transient: bool) -> Any:
        return call.state.repeat(lambda: call.slots.fill(run, transient=transient), grad=call.state.grad)

    def _accept(self, result: Any) -> list[Held]:
        """Check what the inverse returned, and put it into the strides of the original."""
        found = returned(result, self._inputs)
        if len(found) < len(self.given):
            raise self._ill_formed(f"{len(self.given)} inputs", f"{len(found)}")
        inputs = []
        for got, given in zip(found, self.given, strict=False):
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
        run.guard.check(
            sample, rebuilt, self.bounds(rebuilt), lambda: self.label, fallback, run.at_end, source, zeros=zeros, soon=self.first
        )

    def distrust(self, below: int | None = None) -> None:
        """Replay it from the next call on."""
        self.facts.keep(self.key, self.label, "", warn=False)

    def _ill_formed(self, expected: str, got: str) -> InversionError:
        return InversionError(explain(self.label, expected=f"{expected} from its inverse", got=got, remedy="mend the inverse"))

    def _replay(self, inputs: list[Any], memo: dict[int, Any], samples: list[Sample | None], *, transient: bool) -> None:
        """Run forward again; branches in ``memo`` are short-circuited, everything else fills its slots."""
        args, kwargs = self._arguments()
        fresh = (tensor.detach().requires_grad_(given.grad) for tensor, given in zip(inputs, self.given, strict=False))
        trees = self._with(fresh)
        named = [place for place in self._places[: len(trees)] if isinstance(place, str)]
        args = (*trees[: len(trees) - len(named)], *args)
        kwargs = {**dict(zip(named, trees[len(trees) - len(named) :], strict=True)), **kwargs}
        ordinal = itertools.count()

        def branch(child: nn.Module, proceed: Callable[..., Any], a: tuple[Any, ...], k: dict[str, Any]) -> Any:
            index = next(ordinal)
            if index >= len(self.calls) or self.calls[index].child is not child:
                raise self._not_repeated("the calls of its children that forward made", "other calls")
            call = self.calls[index]
            if index in memo:
                output = map_tensors(not_a_leaf, memo[index])
            else:
                output = self._filled(call, lambda: proceed(*a, **k), transient=transient)
            if call.state.rng_after is not None:
                call.state.rng_after.restore()
            return output

        def forward() -> Any:
            return self._original(self.module, *args, **kwargs)

        reach = self._original, args, kwargs
        with shadowed(self.children, branch):
            output = self.state.repeat(lambda: self.glue.fill(forward, transient=transient), grad=True, reach=reach)
        if len(tensors_of(output)) != len(samples):
            raise self._not_repeated(f"{len(samples)} outputs", str(len(tensors_of(output))))
        self.verify_outputs(samples, tensors_of(output), lambda: self.label)

    def _not_repeated(self, expected: str, got: str) -> ReplayError:
        remedy = "make the block repeatable, or exclude it with keep="
        return ReplayError(explain(f"replay of {self.label}", expected=expected, got=got, remedy=remedy))

    def _check_inputs(self) -> None:
        for given in self.given:
            if self.saves_input and given.probe._version != given.version:
                raise modified(f"an input of {self.label}", given.geometry.size, given.version, given.probe._version)


def _key_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[object, ...]:
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
