"""Frames: one forward call of one block. Here what all frames have in common, and what they hold."""

from __future__ import annotations

import abc
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ...capture import is_capturing
from ...errors import CaptureError, explain
from ...generators import EVERY
from ...modes import Modes
from ...precision import Precision, coarse, precision_of
from ...storage import Held, is_near
from ..calls.state import STATE, STATISTICS, CallState
from ..handles.evidence import FIRST, inversions
from ..handles.local import THREADS
from ..handles.value import Value
from ..policy.guard import DRIFT, Sample, tolerance
from ..policy.plan import Draws, Facts, facts_of
from .slots import Slots

if TYPE_CHECKING:
    from .home import Home

__all__ = [
    "ANCHOR",
    "ARGUMENT",
    "CHANGES_OBJECT",
    "DREW",
    "HEAD",
    "NEWEST",
    "ORDINARY",
    "REMEDIES",
    "RUNS_OUT",
    "Frame",
    "Head",
    "ModuleFrame",
]

ANCHOR = "anchor: what was before it is rebuilt from it"
ARGUMENT = "argument of a block: needed to repeat its call"
CHANGES_OBJECT = "it changes an object among its arguments"
DREW = "random numbers were drawn where none had been drawn before"
HEAD = "input of a chain: held by its caller, or kept exact"
NEWEST = "newest block: kept until the next one opens"
RUNS_OUT = "an iterator is among its arguments, which its call uses up"
ORDINARY = "saved outside any registered block"
REMEDIES = {
    ANCHOR: "nothing: a chain needs one; fewer ordinary layers between its blocks make fewer chains",
    ARGUMENT: "an inverse for the block (checkpoint(inverse=), register), or a tensor that is held anyway",
    CHANGES_OBJECT: "call it without that object, for example use_cache=False, or checkpoint() instead of an inverse",
    DREW: "nothing: the next call foresees it",
    HEAD: "an invertible block before it",
    RUNS_OUT: "give it a list, or what makes an iterator",
    NEWEST: "nothing: it goes when the next block opens",
    ORDINARY: "reversible(replay=...) of the module around it, checkpoint(), an invertible block, or offload=True on CUDA",
    THREADS: "nothing, but to take gradients inside of it on one device",
    STATISTICS: "nothing: they are two numbers a channel",
    STATE: "nothing, unless the module can do without",
}


class Frame(abc.ABC):
    """What is needed to rebuild everything that one call of one block saved.

    A frame is *kept* (its slots are filled) until the next one opens, then *released*; it can be rebuilt
    from its outputs. Handles hold their frame, a frame holds its outputs, and its inputs only weakly.
    """

    turns = inversions  # by which it is checked
    exact = False  # whether what it is rebuilt from is what it was
    compares = False  # elements of all that it saves, when it is rebuilt
    open = False  # whether its call is being made, as far as it matters

    def __init__(self, run: Home, facts: Facts, *, training: bool = True) -> None:
        self.run = run
        self.facts = facts
        self.ordinal = run.ordinal
        self.stays = facts.stays(run.budget.limit)  # what it saves will be there when backward comes, as far as is known
        self._training = training
        self.device: torch.device
        self.modes: Modes | None
        self.precision: Precision = ()
        self.captured = False  # its call is part of a CUDA graph
        self.input_keys: set[int] = set()  # storages of its inputs; of a coupling, of the stream that a branch gets
        self.external: set[int] = set()  # storages of its parameters and buffers
        self.packed: set[int] = set()  # storages that were counted as saved
        self.moved: set[int] = set()  # of its external storages, those that a call changes
        self.draws: frozenset[str] = EVERY
        self._drew_outside = False
        self.saves_input = False
        self.checked = True  # what a rebuild gives is compared with what was there
        self.why_kept = ""
        self.released = False
        self.is_chain = False  # of steps that are let go of one by one
        self.inputs: list[weakref.ref[Value]] = []

    @property
    def subject(self) -> nn.Module | None:
        """The module whose call it is; ``None`` for a function."""
        return None

    @property
    @abc.abstractmethod
    def label(self) -> str:
        """How errors, warnings and reports call it."""

    @abc.abstractmethod
    def call(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the block and note what is needed to rebuild it."""

    @abc.abstractmethod
    def release(self) -> None:
        """The next block opens: let go of what can be rebuilt."""

    @abc.abstractmethod
    def hold(self) -> None:
        """After the call, where it was not let go of: keep what it saved."""

    @abc.abstractmethod
    def all_slots(self) -> Iterable[Slots]:
        """The slots of all its stretches."""

    def lets_go(self, outputs: Iterable[Value] = ()) -> bool:
        """Released from now on, if its outputs and what it saved are what they were; else it is kept."""
        if any(not value.held or value.current_version != value.version for value in outputs):
            self.keep("its output was changed in place")
        elif not all(slots.intact() for slots in self.all_slots()):
            self.keep("a tensor that it saved was changed in place")
        else:
            self.released = True
            self.learn_to_go()
        return self.released

    def may_write(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether its call, which is still to come, may change its arguments in place."""
        return self.facts.writes_input

    def learn_to_go(self) -> None:
        """It is let go of before backward comes: so will the next ones be."""
        if self.stays:
            self.facts.learn_stays(self.run.budget.limit, False)

    @abc.abstractmethod
    def sources(self) -> list[Value]:
        """The Values that a rebuild starts from."""

    @abc.abstractmethod
    def rebuild(self, slots: Slots, *, transient: bool) -> None:
        """Fill ``slots``. Unless ``transient``, what it is rebuilt from is used up."""

    @abc.abstractmethod
    def supply(self) -> None:
        """Give the input Values back; use nothing up."""

    @abc.abstractmethod
    def distrust(self, below: int | None = None) -> None:
        """Do not invert it (or its steps before ``below``) from the next call on."""

    @abc.abstractmethod
    def report(self) -> Iterator[tuple[str, str, Tensor]]:
        """What it holds besides Values: why, of what, and the tensor."""

    @abc.abstractmethod
    def forget_outputs(self) -> None:
        """Let go of outputs that nothing has to be rebuilt from."""

    @abc.abstractmethod
    def purge(self) -> None:
        """Drop what was rebuilt for one pass of a graph that is retained."""

    def begin(self, device: torch.device) -> None:
        """Before the call: note the modes, and where the generators are, as far as earlier calls make that needed."""
        self.device = device
        self._looked_again = self.facts.looked_again
        self.modes = Modes.of_call(device)
        self.precision = precision_of(device)
        self.captured = is_capturing(device)
        self.facts.calls += 1
        self.checked = self.is_looked_at() or self.turns.picks()
        run, known = self.run, self.facts.draws(self._training)
        if self.captured:
            self._check_capture(known)
        self.draws = known.inside
        self._marked = not self.captured and (bool(known.inside) or known.outside or run.marks is None)
        if self._marked:
            marks = run.rng.marks(device)
            self._drew_outside = run.marks is not None and marks != run.marks
            run.marks = marks

    @property
    def look_again(self) -> Callable[[], None]:
        """For a call that cannot be repeated; it does not hold the frame."""
        return functools.partial(self.facts.look_again, again=self._looked_again)

    def _check_capture(self, known: Draws) -> None:
        """Raise unless earlier calls have shown that this one can be repeated in a CUDA graph."""
        if not self.facts.drew(self._training):
            raise CaptureError(
                explain(
                    f"{self.label}, while a CUDA graph is captured",
                    expected="a block that has run in this mode before",
                    got="its first call",
                    remedy="run four steps or more under reversible() before the capture, as a CUDA graph needs anyway",
                )
            )
        if "torch" in known.inside:
            raise CaptureError(
                explain(
                    f"{self.label}, while a CUDA graph is captured",
                    expected="a block that draws no random numbers, for a replay has to draw the same",
                    got="one that does, and a generator cannot be read now",
                    remedy="exclude it with keep=, set its dropout to 0, or leave it out of the graph",
                )
            )

    def surprised(self) -> bool:
        """Whether random numbers were drawn that no earlier call of the block has drawn; learn it."""
        run = self.run
        if self.captured:
            return False
        marks = run.rng.marks(self.device)
        moved = marks != run.marks
        run.marks = marks
        if moved:
            self.facts.learn_draws(self._training, Draws(EVERY if self._marked else frozenset(), outside=True))
        return moved

    def end(self, states: Sequence[CallState]) -> None:
        """After the call: learn whether it drew random numbers; where that was not foreseen it is kept this time."""
        if self.captured:
            self.run.marks = None
        elif self.draws:
            drew = frozenset[str]().union(*(state.drew for state in states))
            self.facts.learn_draws(self._training, Draws(drew, self._drew_outside))
            self.run.marks = self.run.rng.marks(self.device)
        elif self.surprised():
            self.keep(DREW)
        self.packed.clear()

    def bounds(self, stream: Tensor) -> tuple[float, float]:
        """The guard's bounds for a stream."""
        return tolerance(self.coarsest(stream.dtype))

    def coarsest(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype that says how good a stream is: its own, that of autocast branches, or what products round it to."""
        dtypes = [dtype, *(autocast for _, autocast in (self.modes.autocast if self.modes is not None else ()))]
        if dtype in _ROUNDED and not self.exact:
            rounded = coarse(self.precision, self.device, convolves=self.convolves)
            dtypes += [] if rounded is None else [rounded]
        return max(dtypes, key=tolerance)

    @property
    def convolves(self) -> bool:
        """Whether its call may have convolutions or recurrences."""
        return True

    def keep(self, why: str) -> None:
        """Stay as it is until backward, and say why."""
        self.why_kept = why

    def has_zeros(self, tensor: Tensor, place: object) -> bool:
        """Whether elements of what comes in at a place are exactly zero, as behind a ReLU, a dropout or padding.

        They come back from an inversion as plus or minus 1e-17, and a branch that begins with a ReLU would see the wrong
        sign. To read this from an accelerator makes the host wait, so only the first calls do; then the guard tells.
        """
        if tensor.is_meta:
            return False
        if is_near(tensor.device):
            return _has_exact_zeros(tensor)
        look = None if self.captured else lambda: _has_exact_zeros(tensor)
        return self.facts.has_zeros((place, self._training), look)

    def link(self, tensor: Tensor, place: object = 0, grid_bits: int | None = None, *, keeps_zeros: bool = False) -> Value | None:
        """The earlier frame's output that ``tensor`` is, if this frame is to give it back.

        A frame on a grid gives back what lies on that grid, zeros included.
        """
        value = self.run.output_value(tensor)
        if value is None:
            return None
        exact = value.grid_bits is not None and grid_bits is not None and value.grid_bits <= grid_bits
        if not exact and (grid_bits is not None or (not keeps_zeros and self.has_zeros(tensor, place))):
            return None
        value.consumer = self
        self.checked |= value.follows_head  # where all errors arrive
        self.inputs.append(weakref.ref(value))
        return value

    def release_inputs(self) -> None:
        """Let go of inputs that this frame gives back."""
        for reference in self.inputs:
            value = reference()
            if value is not None:
                value.release()

    def kept_tensors(self) -> Iterator[Tensor]:
        """What it holds while it is not let go of, besides inputs."""
        for slots in self.all_slots():
            yield from slots.held()

    def kept_bytes(self) -> int:
        """What it would let go of: what it saved, besides outputs, and the inputs that it gives back."""
        given = [value for reference in self.inputs if (value := reference()) is not None]
        inputs = [tensor.untyped_storage() for value in given for _, _, tensor in value.report()]
        saved = [tensor.untyped_storage() for tensor in self.kept_tensors()]
        sizes = {storage._cdata: storage.nbytes() for storage in saved if storage._cdata not in self.run.values}
        sizes.update({storage._cdata: storage.nbytes() for storage in inputs})
        return sum(sizes.values())

    def verify_replay(self, sample: Sample | None, output: Tensor, label: Callable[[], str]) -> None:
        """Where a replay starts from what was kept, nothing else shows that it repeats the call (Rule 9)."""
        if sample is not None:
            self.check_replay(sample.copy_of(output), sample.values, label)

    def verify_outputs(self, samples: Sequence[Sample | None], outputs: Sequence[Tensor], label: Callable[[], str]) -> None:
        """The same for every output; of a log-det of next to nothing the rounding does not count."""
        for sample, output in zip(samples, outputs, strict=True):
            if sample is not None:
                rebuilt, original = sample.copy_of(output).reshape(-1), sample.values.reshape(-1)
                floor = original.new_full((1,), self.bounds(original)[0] * len(original) ** 0.5)
                self.check_replay(torch.cat([rebuilt, floor]), torch.cat([original, floor]), label)

    def check_replay(self, rebuilt: Tensor, original: Tensor, label: Callable[[], str]) -> None:
        """Compare elements that a replay gave, in memory of their own, with those that forward had."""
        run, bound = self.run, self._replay_bound(original)
        run.guard.check_replay(rebuilt, original, bound, label, self.look_again, run.at_end, soon=self.first)

    def is_looked_at(self) -> bool:
        """Whether it is checked whoever's turn it is: in its first calls, or as the user wishes."""
        return self.run.guard.mode != "fallback" or self.first

    def sample(self, tensor: Tensor) -> Sample | None:
        """Some elements, by which a reconstruction is known, if this call is checked."""
        return self.run.guard.sample(tensor) if self.checked else None

    @property
    def first(self) -> bool:
        """Whether it is among the first calls of its block, of which everything is checked."""
        return self.facts.calls <= FIRST

    def _replay_bound(self, original: Tensor) -> float:
        """How far a replay may be off: from what was kept by the order of sums only, which an accelerator leaves open."""
        if not self.exact:
            return 10 * self.bounds(original)[0]
        return float(torch.finfo(self.coarsest(original.dtype)).eps ** (DRIFT if is_near(original.device) else 0.5))


_ROUNDED = (torch.float32, torch.complex64)  # by TF32
_EVERY_ELEMENT = 1 << 16  # below, zeros are looked for everywhere
_STRIDES = (67, 257, 1031, 4099, 16411, 65537)  # primes: rows, columns, channels and borders are all met


def _has_exact_zeros(tensor: Tensor) -> bool:
    """A large tensor is sampled."""
    tensor = tensor.detach()
    numel = tensor.numel()
    if numel > _EVERY_ELEMENT and tensor.is_contiguous():
        stride = next((s for s in _STRIDES if numel // s < 2 * _EVERY_ELEMENT // 16), _STRIDES[-1])
        tensor = tensor.view(-1)[::stride]
        return int(tensor.count_nonzero()) < tensor.numel() - 1  # one may be by chance
    return int(tensor.count_nonzero()) < tensor.numel()


class ModuleFrame(Frame):
    """A frame of a registered block."""

    def __init__(self, run: Home, module: nn.Module, facts: Facts | None = None) -> None:
        super().__init__(run, facts_of(module) if facts is None else facts, training=module.training)
        self.module = module

    @property
    def subject(self) -> nn.Module:
        """The block."""
        return self.module

    @property
    def label(self) -> str:
        """How errors, warnings and reports call it."""
        return self.run.label(self.module, self.ordinal)

    @property
    def convolves(self) -> bool:
        """Whether its call may have convolutions or recurrences: their weights tell."""
        return self.facts.convolves(lambda: _convolves(self.module))


def _convolves(module: nn.Module) -> bool:
    """A kernel has three dimensions or more; a recurrence is known by its class, anything lazy not at all."""
    if any(isinstance(part, (nn.RNNBase, nn.RNNCellBase)) for part in module.modules()):
        return True
    return any(is_lazy(parameter) or parameter.dim() > 2 for parameter in module.parameters())


class Head:
    """The input of a chain: held, so that what is rebuilt from it is exact.

    Most inputs are held by their caller or by the layer before anyway. An input with exact zeros starts a chain too.
    """

    __slots__ = ("_held",)

    def __init__(self, run: Home, tensor: Tensor) -> None:
        self._held = run.hold(tensor.detach())  # in memory that may become another stream's

    @property
    def tensor(self) -> Tensor | None:
        """The input; ``None`` if it was modified in place since."""
        return self._held.tensor if self._held.intact else None

    def report(self) -> Iterator[Tensor]:
        """What it holds."""
        if isinstance(self._held, Held):
            yield self._held.tensor
