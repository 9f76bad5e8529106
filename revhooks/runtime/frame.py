"""Frames: one forward call of one block. Here what all frames have in common, and what they hold."""

from __future__ import annotations

import abc
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..generators import EVERY
from ..state import Modes
from ..storage import Held, is_opaque, version_of
from .branch import CallState, Slots
from .guard import Sample, tolerance
from .plan import Draws, known_draws, learn_draws
from .tree import leaves_of, map_leaves
from .value import Value, modified

if TYPE_CHECKING:
    from .run import Run

__all__ = ["ANCHOR", "ARGUMENT", "DREW", "HEAD", "NEWEST", "Arguments", "Frame", "Head", "has_exact_zeros"]

ANCHOR = "anchor: what was before it is rebuilt from it"
ARGUMENT = "argument of a block: needed to repeat its call"
DREW = "random numbers were drawn where none had been drawn before"
HEAD = "input of a chain: held by its caller, or kept exact"
NEWEST = "newest block: kept until the next one opens"


class Arguments:
    """Arguments that are held for the replay: tensors detached, everything else as it is."""

    __slots__ = ("_held",)

    def __init__(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._held = map_leaves(lambda leaf: _Argument.of(run, leaf), (args, kwargs))

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that it holds."""
        arguments = (leaf for leaf in leaves_of(self._held) if isinstance(leaf, _Argument))
        return (argument.held.tensor for argument in arguments if isinstance(argument.held, Held))

    def again(self, label: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as fresh leaves with the ``requires_grad`` they had.

        Raises:
            ModifiedError: one was modified in place since.
        """
        args, kwargs = map_leaves(lambda leaf: leaf.again(label) if isinstance(leaf, _Argument) else leaf, self._held)
        return args, kwargs


class _Argument:
    """A tensor among the arguments."""

    __slots__ = ("held", "requires_grad", "version")

    def __init__(self, run: Run, tensor: Tensor) -> None:
        detached = tensor.detach()  # Rule 2
        self.held = _Opaque(detached) if is_opaque(tensor) else Held(run.ledger, detached)
        self.requires_grad = tensor.requires_grad
        self.version = version_of(tensor)

    @classmethod
    def of(cls, run: Run, leaf: Any) -> Any:
        """A tensor as an argument, anything else as it is."""
        return cls(run, leaf) if isinstance(leaf, Tensor) else leaf

    def again(self, label: str) -> Tensor:
        """The tensor as a fresh leaf."""
        tensor = self.held.tensor
        if version_of(tensor) != self.version:
            raise modified(f"an argument of {label}", tensor.shape, self.version, version_of(tensor))
        return tensor.detach().requires_grad_(self.requires_grad)


class _Opaque(NamedTuple):
    tensor: Tensor


class Frame(abc.ABC):
    """What is needed to rebuild everything that one call of one block saved.

    A frame is *kept* (its slots are filled) until the next one opens, then *released*; it can be rebuilt
    from its outputs. Handles hold their frame, a frame holds its outputs, and its inputs only weakly.
    """

    def __init__(self, run: Run, module: nn.Module) -> None:
        self.run = run
        self.module = module
        self.label = run.label(module)
        self.ordinal = run.ordinal
        self.device: torch.device
        self.modes: Modes | None
        self.input_keys: set[int] = set()  # storages of its inputs; of a coupling, of the stream that a branch gets
        self.external: set[int] = set()  # storages of its parameters and buffers
        self.packed: set[int] = set()  # storages that were counted as saved
        self.moved: set[int] = set()  # of its external storages, those that a call changes
        self.draws: frozenset[str] = EVERY
        self._drew_outside = False
        self.saves_input = False
        self.why_kept = ""
        self.released = False
        self.inputs: list[weakref.ref[Value]] = []

    @abc.abstractmethod
    def call(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the block and note what is needed to rebuild it."""

    @abc.abstractmethod
    def release(self) -> None:
        """The next block opens: let go of what can be rebuilt."""

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
        self.modes = Modes.of_call(device)
        run, known = self.run, known_draws(self.module)
        self.draws = known.inside
        self._marked = bool(known.inside) or known.outside or run.marks is None
        if self._marked:
            marks = run.rng.marks(device)
            self._drew_outside = run.marks is not None and marks != run.marks
            run.marks = marks

    def surprised(self) -> bool:
        """Whether random numbers were drawn that no earlier call of the block has drawn; learn it."""
        run = self.run
        marks = run.rng.marks(self.device)
        moved = marks != run.marks
        run.marks = marks
        if moved:
            learn_draws(self.module, Draws(EVERY if self._marked else frozenset(), outside=True))
        return moved

    def end(self, states: Sequence[CallState]) -> None:
        """After the call: learn whether it drew random numbers; where that was not foreseen it is kept this time."""
        if self.draws:
            drew = frozenset[str]().union(*(state.drew for state in states))
            learn_draws(self.module, Draws(drew, self._drew_outside))
            self.run.marks = self.run.rng.marks(self.device)
        elif self.surprised():
            self.keep(DREW)
        self.packed.clear()

    def bounds(self, stream: Tensor) -> tuple[float, float]:
        """The guard's bounds for a stream; autocast branches make it as coarse as their dtype."""
        bounds = tolerance(stream.dtype)
        for _, dtype in self.modes.autocast if self.modes is not None else ():
            bounds = max(bounds, tolerance(dtype))
        return bounds

    def keep(self, why: str) -> None:
        """Stay as it is until backward, and say why."""
        self.why_kept = why

    def link(self, tensor: Tensor, *, keeps_zeros: bool = False) -> Value | None:
        """The earlier frame's output that ``tensor`` is, if this frame is to give it back."""
        value = self.run.output_value(tensor) if keeps_zeros or not has_exact_zeros(tensor) else None
        if value is not None:
            value.consumer = self
            self.inputs.append(weakref.ref(value))
        return value

    def release_inputs(self) -> None:
        """Let go of inputs that this frame gives back."""
        for reference in self.inputs:
            value = reference()
            if value is not None:
                value.release()

    def verify_replay(self, sample: Sample | None, output: Tensor, label: Callable[[], str]) -> None:
        """Where a replay starts from what was kept, nothing else shows that it repeats the call (Rule 9)."""
        if sample is not None:
            self.run.guard.check(sample, output, self.bounds(output), label, None, self.run.at_end)


def has_exact_zeros(tensor: Tensor) -> bool:
    """Whether some elements are exactly zero, as behind a ReLU, a dropout or padding.

    They come back from an inversion as plus or minus 1e-17, and a branch that begins with a ReLU would see the wrong
    sign. Reading this from an accelerator would make it wait, so it is read on a CPU only; elsewhere the guard
    compares the zeros of its samples.
    """
    return tensor.device.type == "cpu" and not tensor.is_meta and int(tensor.detach().count_nonzero()) < tensor.numel()


class Head:
    """The input of a chain: held, so that what is rebuilt from it is exact.

    Most inputs are held by their caller or by the layer before anyway. An input with exact zeros starts a chain too.
    """

    __slots__ = ("_held",)

    def __init__(self, run: Run, tensor: Tensor) -> None:
        self._held = Held(run.ledger, tensor.detach())

    @property
    def tensor(self) -> Tensor | None:
        """The input; ``None`` if it was modified in place since."""
        return self._held.tensor if self._held.intact else None

    def report(self) -> Tensor:
        """What it holds."""
        return self._held.tensor
