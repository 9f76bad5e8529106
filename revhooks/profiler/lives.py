"""Accounted bytes with a memory: what each storage of a step was made for, when, and when it was freed."""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..backward import NO_PASS, current_pass
from ..record import CATEGORIES, Slice, Timeline
from ..storage import NO_STORAGE, is_opaque, own_storage_key
from ..watching import Watcher, watching
from .meters import AccountedMeter

__all__ = ["Life", "Lives", "bytes_of"]

SAMPLES = 120  # of a timeline


@dataclass(slots=True)
class Life:
    """A storage that was made.

    Attributes:
        nbytes: its size.
        born: when it was made, in nanoseconds since the measurement began.
        phase: in which phase, as an index.
        died: when it was freed; ``None`` while it is there.
        died_in: in which phase.
        category: what it is for, where that is known.
        rebuild: the number of the rebuild in which it was made; 0 outside of one.
    """

    nbytes: int
    born: int
    phase: int
    died: int | None = None
    died_in: int = 0
    category: str = ""
    rebuild: int = 0


class Lives(AccountedMeter, Watcher):
    """Meters what is made inside it, and tells what for.

    What was made in forward and is there when backward begins is *held*. What is made by a rebuild (of ours, or a recomputation
    of `torch.utils.checkpoint`, which is seen by its recording a graph within a backward pass that does not) and outlives it is
    *rebuilt*. Gradients of parameters and the state of optimizers are known by their hooks. All other is *temporary*.

    Args:
        model: whose parameters' gradients are told apart; they count from when they are a parameter's.
        clock: gives the time in nanoseconds.

    Example:
        >>> layer = nn.Linear(256, 256)
        >>> with Lives(layer) as lives:
        ...     layer(torch.ones(4, 256)).relu().sum().backward()
        >>> line = lives.timeline()
        >>> max(line.bytes["gradients"]), [name for name, _ in line.phases]
        (263168, ['forward', 'backward'])
    """

    def __init__(self, model: nn.Module | None = None, *, clock: Callable[[], int] = time.perf_counter_ns) -> None:
        super().__init__()
        _warm_up()
        self._clock = clock
        self._start = clock()
        self._lives: list[Life] = []
        self._alive: dict[int, Life] = {}  # by storage
        self._phases: list[tuple[str, int]] = []
        self._records_graph = False  # whether backward itself does
        self._in_optimizer = False
        self._rebuilds: list[tuple[int, str, int]] = []  # that are under way: number, label, when it began
        self._recomputes = 0  # number of a recomputation by others
        self._count = 0
        self._ends: dict[int, int] = {}  # when each of both ended
        self._parameters = list(model.parameters()) if model is not None else []
        self._left = contextlib.ExitStack()
        self.parameter_bytes = bytes_of(_fixed(model))
        self.rebuilds: list[Slice] = []
        self.stop_ns = 0
        self.backward_begins: Callable[[], None] = lambda: None
        self._optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self.optimizer = ""  # its class

    # -- while it runs

    def __enter__(self) -> Lives:
        """Begin."""
        self._start = self._clock()
        self._phases = [("forward", 0)]
        for parameter in self._parameters:
            self._see_before(parameter.grad, "gradients")
        with contextlib.ExitStack() as entered:  # left at once where a hook cannot be registered
            for parameter in self._parameters:
                if parameter.requires_grad:
                    entered.callback(parameter.register_post_accumulate_grad_hook(self._note_gradient).remove)
            entered.callback(register_optimizer_step_pre_hook(self._before_optimizer).remove)
            entered.callback(register_optimizer_step_post_hook(self._after_optimizer).remove)
            entered.enter_context(watching(self))
            super().__enter__()
            self._left = entered.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End."""
        super().__exit__(kind, error, trace)
        self._left.close()
        self.stop_ns = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, in the phase that it belongs to."""
        if current_pass() == NO_PASS:
            in_closure = torch.is_grad_enabled() or self.phase == "forward"  # which an optimizer calls, as LBFGS does
            self._enter("optimizer" if self._in_optimizer and not in_closure else "forward")
        else:
            self.begin_backward()
            self._see_recomputation()
        return super().__torch_dispatch__(func, types, args, kwargs)

    def begin_backward(self) -> None:
        """What is done now is done in backward, if it was not already; of a pass in another thread no operation is seen."""
        if self.phase != "backward":
            self._records_graph = torch.is_grad_enabled()
            self._enter("backward")
            self.backward_begins()

    def _see_recomputation(self) -> None:
        """A backward pass that records no graph computes again whatever records one."""
        if torch.is_grad_enabled() == self._records_graph or self._rebuilds:
            if self._recomputes:
                self._ends[self._recomputes], self._recomputes = self.now, 0
        elif not self._recomputes:
            self._count += 1
            self._recomputes = self._count

    @property
    def now(self) -> int:
        """Nanoseconds since it began."""
        return self._clock() - self._start

    @property
    def phase(self) -> str:
        """What is done now: ``forward``, ``backward`` or ``optimizer``."""
        return self._phases[-1][0]

    def _enter(self, phase: str) -> None:
        if self._phases[-1][0] != phase:
            self._phases.append((phase, self.now))

    def _begin(self, nbytes: int, key: int) -> Life:
        self._change(nbytes)
        rebuild = self._rebuilds[-1][0] if self._rebuilds else self._recomputes
        life = Life(nbytes, self.now, len(self._phases) - 1, rebuild=rebuild)
        if self.phase == "optimizer":
            life.category = "temporary"
        self._lives.append(life)
        self._alive[key] = life
        return life

    def _end(self, life: Life) -> None:
        self._change(-life.nbytes)
        life.died, life.died_in = self.now, len(self._phases) - 1

    def _see_before(self, tensor: Tensor | None, category: str) -> None:
        """A tensor is there before anything is made: it counts in the picture, not in what the step made."""
        if tensor is None or (key := own_storage_key(tensor)) == NO_STORAGE or key in self._known:
            return
        storage = tensor.untyped_storage()
        life = Life(storage.nbytes(), 0, 0, category=category)
        self._lives.append(life)

        def died(_: Any) -> None:
            del self._known[key]
            life.died, life.died_in = self.now, len(self._phases) - 1

        self._known[key] = weakref.ref(storage, died)

    def _note(self, tensor: Tensor | None, category: str) -> None:
        life = self._alive.get(own_storage_key(tensor)) if tensor is not None else None
        if life is not None and life.died is None:
            life.category = category

    def _note_gradient(self, parameter: Tensor) -> None:
        self._note(parameter.grad, "gradients")

    def _before_optimizer(self, *_: Any) -> None:
        self._in_optimizer = True
        if current_pass() == NO_PASS:
            self._enter("optimizer")

    def _after_optimizer(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._in_optimizer = False
        self._optimizers.add(optimizer)
        self.optimizer = type(optimizer).__name__
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    self._note(value, "optimizer")

    def rebuild_began(self, module: nn.Module | None, label: str) -> None:
        """What is made from now on is rebuilt."""
        self._count += 1
        self._rebuilds.append((self._count, label, self.now))

    def rebuild_ended(self, module: nn.Module | None, label: str) -> None:
        """It is not any more."""
        number, name, began = self._rebuilds.pop()
        self._ends[number] = self.now
        self.rebuilds.append(Slice(name, "rebuild", began, self.now))

    def brought(self, tensor: Tensor) -> None:
        """The tensor was rebuilt."""
        self._note(tensor, "rebuilt")

    # -- when it is over

    def optimizer_bytes(self) -> int:
        """What the state of the optimizers that took a step takes."""
        return bytes_of(t for one in self._optimizers for state in one.state.values() for t in state.values())

    def gradient_bytes(self) -> int:
        """What parameters' gradients take."""
        return bytes_of(parameter.grad for parameter in self._parameters)

    def slices(self) -> list[Slice]:
        """Backward passes, steps of optimizers, and rebuilds."""
        ends = [*(ns for _, ns in self._phases[1:]), self.stop_ns]
        pairs = zip(self._phases, ends, strict=True)
        return [*(Slice(name, name, ns, end) for (name, ns), end in pairs if name != "forward"), *self.rebuilds]

    def timeline(self, samples: int = SAMPLES) -> Timeline:
        """Accounted bytes by category; each sample is the largest moment of its stretch.

        Args:
            samples: how many there are at most.
        """
        events: list[tuple[int, int, str]] = []
        for life in self._lives:
            category = self._category_of(life)
            events.append((life.born, life.nbytes, category))
            if life.died is not None:
                events.append((life.died, -life.nbytes, category))
        events.sort(key=lambda event: event[0])
        now = dict.fromkeys(CATEGORIES, 0)
        made = sum(life.nbytes for life in self._lives if life.category == "optimizer" and life.died is None)
        now |= {"parameters": self.parameter_bytes, "optimizer": self.optimizer_bytes() - made}
        moments = [(0, dict(now))]
        for ns, group in itertools.groupby(events, key=lambda event: event[0]):
            for _, change, category in group:
                now[category] += change
            moments.append((ns, dict(now)))
        largest = list(_largest(moments, samples))
        series = {name: tuple(moment[name] for _, moment in largest) for name in CATEGORIES}
        return Timeline(tuple(ns for ns, _ in largest), series, self._phases_with_something())

    def _phases_with_something(self) -> tuple[tuple[str, int], ...]:
        """Those in which something was made, and steps of optimizers; what lies between them belongs to the one before."""
        busy = {life.phase for life in self._lives}
        kept = [phase for index, phase in enumerate(self._phases) if index in busy or phase[0] != "forward"]
        return tuple(phase for index, phase in enumerate(kept) if not index or kept[index - 1][0] != phase[0])

    def _category_of(self, life: Life) -> str:
        if life.category:
            return life.category
        born = self._phases[life.phase][0]
        if born == "forward":
            outlives = life.died is None or any(name == "backward" for name, _ in self._phases[life.phase : life.died_in + 1])
            return "held" if outlives else "temporary"
        if life.rebuild and (life.died is None or life.died > self._ends.get(life.rebuild, life.died)):
            return "rebuilt"
        return "temporary"


@functools.cache
def _warm_up() -> None:
    """What torch does once and slowly when operations are first looked at is not to be in anybody's picture."""
    aside = saved_tensors_hooks(Tensor.detach, lambda tensor: tensor)  # what is saved here is no run's
    with AccountedMeter(), torch.enable_grad(), aside:
        torch.ones(1, device="cpu", requires_grad=True).exp().sum().backward()


def bytes_of(tensors: Iterable[Any]) -> int:
    """Bytes of unique storages of what are tensors among these."""
    found = [tensor for tensor in tensors if isinstance(tensor, Tensor) and not is_opaque(tensor)]
    return sum({own_storage_key(tensor): tensor.untyped_storage().nbytes() for tensor in found}.values())


def _fixed(model: nn.Module | None) -> Iterator[Tensor]:
    """Parameters and buffers."""
    if model is not None:
        yield from model.parameters()
        yield from model.buffers()


def _largest(moments: Sequence[tuple[int, dict[str, int]]], samples: int) -> Iterator[tuple[int, dict[str, int]]]:
    """The largest moment of each stretch of equal length, in changes."""
    count = len(moments)
    for index in range(min(samples, count)):
        first, last = round(index * count / min(samples, count)), round((index + 1) * count / min(samples, count))
        yield max(moments[first:last], key=lambda moment: sum(moment[1].values()))
