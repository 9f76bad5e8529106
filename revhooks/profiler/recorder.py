"""Records a script's run: its steps, what was held, and the sum over its own ``reversible()`` contexts."""

from __future__ import annotations

import contextlib
import dataclasses
import operator
import os
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..backward import NO_PASS, current_pass
from ..record import Kept, Record, RunStep, Stats, human_bytes, together
from ..runtime.frames.frame import REMEDIES
from ..runtime.frames.replay import TAIL
from ..runtime.run import Run
from ..watching import Watcher, watching

__all__ = ["Recorder", "Samples"]

_MOST_INNER = 64  # contexts of the script's own that are looked at together
_LOOK_NS = 500_000_000  # between two looks at all that is held, at least
_LOOK_SHARE = 200  # times what such a look takes


class Samples:
    """A few hundred samples of many steps, evenly, however many there will be; the first and the last are among them.

    Example:
        >>> samples = Samples(4)
        >>> for step in range(1, 101):
        ...     samples.add(step, lambda: RunStep(step, 0, 0, 0, 0.0))
        >>> [sample.step for sample in samples.kept(RunStep(100, 0, 0, 0, 0.0))]
        [1, 33, 65, 97, 100]
    """

    def __init__(self, most: int = 256) -> None:
        self._most = most
        self._stride = 1
        self._samples: list[RunStep] = []

    def add(self, step: int, sample: Callable[[], RunStep]) -> None:
        """A step has ended: take a sample, if it is one of those that are kept."""
        if (step - 1) % self._stride:
            return
        self._samples.append(sample())
        if len(self._samples) > self._most:
            self._samples = self._samples[::2]
            self._stride *= 2

    def kept(self, last: RunStep | None = None) -> tuple[RunStep, ...]:
        """The samples, and the last step if it is not among them."""
        more = [last] if last is not None and (not self._samples or self._samples[-1].step != last.step) else []
        return (*self._samples, *more)


@dataclasses.dataclass(slots=True)
class _Inner:
    """A context of the script's own: it is held until the step is over in which it was entered, and read until it is gone."""

    run: weakref.ref[Run]
    held: Run | None
    stats: Stats
    is_read: bool = False  # where backward passes are counted, in the midst of its own


class Recorder(Watcher):
    """Counts the steps that a script takes inside ``run``, and samples what was held.

    A step has ended when an optimizer has stepped; of several the one that stepped most counts. Where none steps, backward passes
    are counted. Nothing here waits for a device.

    Args:
        run: what ``reversible()`` gave, around the whole script.
        on_step: called at the end of each step, in the thread that took it.
        clock: gives the time in nanoseconds.

    Example:
        >>> from revhooks import reversible
        >>> net = torch.nn.Linear(2, 2)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> with reversible() as run, Recorder(run).recording() as recorder:
        ...     for _ in range(3):
        ...         net(torch.ones(2)).sum().backward()
        ...         optimizer.step()
        >>> recorder.steps, [sample.step for sample in recorder.record("net").steps]
        (3, [1, 2, 3])
    """

    def __init__(
        self,
        run: Run,
        *,
        on_step: Callable[[Recorder], None] | None = None,
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        self.steps = 0
        self._run = run
        self._on_step = on_step
        self._clock = clock
        self._began = clock()
        self._ended = self._began  # the last step
        self._taken: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._pass = NO_PASS  # the latest
        self._samples = Samples()
        self._inner: list[_Inner] = []
        self._over = Stats()  # of contexts that are gone
        self._held = 0  # when the most was, and what that was
        self._kept: tuple[Kept, ...] = ()
        self._look = 0  # when to look again
        self._is_here = True

    @contextlib.contextmanager
    def recording(self) -> Iterator[Recorder]:
        """Record what is done meanwhile; not in processes that are forked."""
        os.register_at_fork(after_in_child=self._leave)
        hook = register_optimizer_step_post_hook(self._stepped)
        try:
            with watching(self):
                yield self
        finally:
            hook.remove()

    def _leave(self) -> None:
        self._is_here = False

    # -- what it is told

    def began(self, run: Run) -> None:
        """The script has entered a context of its own."""
        if self._is_here and run is not self._run:
            self._inner.append(_Inner(weakref.ref(run), run, Stats()))
            if len(self._inner) > _MOST_INNER:
                self._read_inner()

    def backward_began(self, run: Run) -> None:
        """Most is held now."""
        if not self._is_here:
            return
        if not self._taken and self._pass != current_pass():  # several runs may have a part in one
            self._pass = current_pass()
            self._end_step(self.steps + 1)
        now = self._clock()
        if now >= self._look and run.ledger.peak_held > self._held:
            with contextlib.suppress(RuntimeError):  # another thread changes it meanwhile
                held = run.ledger.all_held
                if held >= self._held:
                    self._held, self._kept = held, tuple(run.kept())
            after = self._clock()
            self._look = after + max(_LOOK_NS, _LOOK_SHARE * (after - now))

    def _stepped(self, optimizer: Optimizer, *_: Any) -> None:
        """An optimizer has stepped; one that is compiled is not seen: it must not become part of that graph."""
        if torch.compiler.is_compiling() or not self._is_here:
            return
        if not self._taken:
            self.steps, self._samples = 0, Samples()  # of backward passes
        taken = self._taken[optimizer] = self._taken.get(optimizer, 0) + 1
        if taken > self.steps:
            self._end_step(taken)

    def _end_step(self, step: int) -> None:
        self.steps, self._ended = step, self._clock()
        if self._inner:
            self._read_inner()
        self._samples.add(step, self._sample)
        if self._on_step is not None:
            self._on_step(self)

    # -- what it tells

    @property
    def stats(self) -> Stats:
        """What was done up to now, in all contexts; held is what was when the most was."""
        over = self._over
        for inner in self._inner:
            over = together(over, inner.stats)
        return dataclasses.replace(together(self._run.so_far, over, operator.add), held_bytes=self._held, kept=self._kept)

    def status(self) -> str:
        """A line of it: at most how much was held, and how much less than plain autograd would have."""
        stats = self.stats
        blocks = {one.what for one in stats.kept if one.why not in REMEDIES and one.why != TAIL}
        parts = [
            f" step {self.steps:,}",
            f"held {human_bytes(stats.peak_held_bytes)}",
            f"saved {human_bytes(max(stats.packed_bytes - stats.peak_held_bytes, 0))}",
            f"error {float(stats.worst_error):.1e}",
            f"{len(blocks)} {'block' if len(blocks) == 1 else 'blocks'} kept",
        ]
        return " | ".join(parts)

    def record(self, target: str) -> Record:
        """What a report is made from."""
        self._read_inner()
        return Record(
            kind="run",
            target=target,
            device=torch.cuda.get_device_name() if torch.cuda.is_initialized() else "cpu",
            torch=torch.__version__,
            stats=self.stats,
            steps=self._samples.kept(self._sample() if self.steps else None),
        )

    def _sample(self) -> RunStep:
        stats = self.stats
        elapsed, error = self._ended - self._began, float(stats.worst_error)
        return RunStep(self.steps, elapsed, stats.packed_bytes, stats.peak_held_bytes, error)

    def _read_inner(self) -> None:
        """Read the script's own contexts, and add up those that are gone."""
        left = []
        for inner in self._inner:
            run = inner.run()
            if run is None:
                self._over = together(self._over, inner.stats)
            else:
                inner.stats, inner.is_read, inner.held = run.so_far, True, None if inner.is_read else run
                left.append(inner)
        self._inner = left
