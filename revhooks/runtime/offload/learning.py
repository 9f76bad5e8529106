"""What is learned of the steps of a device, for offload: their times, the bandwidth of the bus, and the plan that follows.

A step is known by the sizes of what it saves, in order. One that is not known is measured twice, with marks in the device's
time that are read a step or two later (Rule 16); the quicker one counts, for the first is often slow. What a plan costs is seen
by where the device waited for a copy: if that is more than a trifle twice, the plan counts on less of the bus from then on. All
of this outlives a run, says only what is worth it, and never what is right.
"""

from __future__ import annotations

import bisect
import itertools
import math
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .movers import Mark, seconds
from .schedule import Plan, Timeline, choose, schedule

__all__ = ["Facts", "Known", "Step", "facts_of"]

SHARE = 0.8  # of the measured bandwidth: what a plan counts on at first
LESS = 0.7  # what is left of it where the device had to wait
STALL = 0.03  # of a step, that the device may wait
QUICKER = 0.95  # of the time that a plan was made for: a step that makes another one worth it
MEASURED = 2  # steps before the first plan
TRIES = 6  # to see a whole step
KEPT = 8  # kinds of steps that are remembered on each device
HOST = 1.5  # times the least that the host took for a copy: what it takes as a rule
SPARE = 0.5  # of the time that the host has to spare, what it may spend
LONGEST = 1 << 14  # tensors in a step
PENDING = 8  # steps whose marks are not read yet


@dataclass(slots=True)
class Known:
    """What is known of one kind of step.

    Attributes:
        sizes: of what it saves, in order.
        lines: its times, measured.
        plan: what to do; ``None`` while it is measured.
        share: of the bandwidth that plans count on.
        forced: what a budget made move.
    """

    sizes: tuple[int, ...]
    lines: list[Timeline] = field(default_factory=list)
    plan: Plan | None = None
    share: float = SHARE
    forced: frozenset[int] = frozenset()
    tries: int = 0
    stalled: int = 0

    def agrees(self, sizes: Sequence[int]) -> bool:
        """Whether a step may be of this kind that began with these sizes."""
        return self.sizes[: len(sizes)] == tuple(sizes)


class Step:
    """What is noted of a step. It holds marks, and no tensor."""

    def __init__(self, limit: float) -> None:
        self.limit = 0 if limit == math.inf else 1 + int(16 * math.log2(max(limit, 1)))  # to a twentieth or so
        self.sizes: list[int] = []
        self.known: Known | None = None
        self.plan: Plan | None = None  # that it follows
        self.full = True  # nothing of it was planned
        self.idle = False  # the device is far behind: enough steps were measured, and are not read yet
        self.packed: list[Mark] = []
        self.used: dict[int, Mark] = {}
        self.gone: dict[int, weakref.ref[Any]] = {}
        self.due: deque[int] = deque()  # to be fetched when there is room
        self.moved = 0
        self.forced: set[int] = set()
        self.copies: list[tuple[bool, int, Mark, Mark]] = []  # out?, bytes, begun, done
        self.waits: list[tuple[Mark, Mark]] = []  # where the device came to wait, and for what
        self.over = False  # backward has begun
        self.began = self.latest = 0.0  # when something was saved first, and last, in the host's time
        self.ahead = False  # the host began backward before the device began forward
        self.host = {True: float("inf"), False: float("inf")}  # out? -> least seconds of the host that a copy took

    @property
    def measured(self) -> bool:
        """Whether marks are set wherever something is saved or used."""
        return self.full and self.plan is None and not self.idle

    def passed(self) -> bool:
        """Whether the device is through with all that was noted."""
        copies, waits = (done for *_, done in self.copies), itertools.chain.from_iterable(self.waits)
        return bool(self.used) and all(
            mark.query() for mark in itertools.chain(list(self.used.values()), copies, waits, self.packed)
        )

    def stall(self) -> float:
        """Seconds that the device waited for copies."""
        return sum(max(seconds(need, done), 0.0) for need, done in self.waits)

    def timeline(self, out: float, back: float, host: float) -> Timeline:
        """Its times, less what the device waited."""
        start = self.packed[0]
        stalls = sorted((seconds(start, need), max(seconds(need, done), 0.0)) for need, done in self.waits)
        needs, lost = [need for need, _ in stalls], [0.0, *itertools.accumulate(stall for _, stall in stalls)]

        def at(mark: Mark) -> float:
            time = seconds(start, mark)
            return time - lost[bisect.bisect_left(needs, time)]

        packed = [at(mark) for mark in self.packed]
        used = {i: at(mark) for i, mark in list(self.used.items())}
        spare = SPARE * (packed[-1] if self.ahead else max(packed[-1] - (self.latest - self.began), 0.0))
        return Timeline(tuple(self.sizes), packed, [used.get(i) for i in range(len(packed))], out, back, host, spare)


class Facts:
    """What is known of a device."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[int, tuple[int, ...]], Known] = OrderedDict()
        self._pending: list[Step] = []
        self._rates: dict[bool, tuple[float, float]] = {}  # out? -> bytes, seconds
        self._lock = threading.RLock()  # runs of several threads may use a device
        self.host = float("inf")  # seconds that the host takes to move one

    def begin(self, limit: float) -> Step:
        """A step begins, within so many bytes; learn from those before, where the device is through with them."""
        with self._lock:
            for step in list(self._pending):
                if step.passed():
                    self._pending.remove(step)
                    self._learn(step)
            stale = [step for step in self._pending if not (step.measured and step.used)]
            for step in stale[: max(len(stale) - PENDING, 0)]:
                self._pending.remove(step)
            step = Step(limit)
            self._pending.append(step)
            return step

    def arrive(self, step: Step, nbytes: int) -> int:
        """A tensor of so many bytes is saved; returns its place in the step."""
        place, known = len(step.sizes), step.known
        step.sizes.append(nbytes)
        if not place:
            self._recognise(step)
        elif known is not None and not (place < len(known.sizes) and known.sizes[place] == nbytes):
            planned = step.plan is not None
            self._recognise(step)
            step.full = step.full and not planned and step.plan is None
        return place

    def _recognise(self, step: Step) -> None:
        """The plan for a step of which the first sizes are known; first one that is still to be measured."""
        with self._lock:
            kinds = list(self._known.items())
        agreeing = [known for (limit, _), known in kinds if limit == step.limit and known.agrees(step.sizes)]
        unmeasured = [known for known in agreeing if known.plan is None and known.tries < TRIES]
        step.known = (unmeasured or agreeing or [None])[-1]  # type: ignore[list-item] # the latest
        step.plan = None if step.known is None else step.known.plan
        if step.plan is None:
            if step.known is not None:
                step.known.tries += 1
            step.idle = sum(other.measured and bool(other.used) for other in self._pending) >= MEASURED

    def rate(self, *, out: bool) -> float:
        """Bytes a second, measured; 0 where nothing was."""
        nbytes, took = self._rates.get(out, (0.0, 0.0))
        return nbytes / took if took > 0 else 0.0

    def _learn(self, step: Step) -> None:
        key = step.limit, tuple(step.sizes)
        known = self._known.pop(key, None) or Known(tuple(step.sizes))
        self._known[key] = known  # the latest
        while len(self._known) > KEPT:
            self._known.popitem(last=False)
        self._learn_bus(step)
        if step.measured and len(step.packed) == len(step.sizes):
            self._learn_times(step, known)
        elif step.plan is not None and step.plan is known.plan:
            self._check(step, known)

    def _learn_bus(self, step: Step) -> None:
        for out in (True, False):
            copies = [(nbytes, seconds(begun, done)) for way, nbytes, begun, done in step.copies if way == out]
            nbytes, took = self._rates.get(out, (0.0, 0.0))
            if copies:
                self._rates[out] = nbytes / 2 + sum(n for n, _ in copies), took / 2 + sum(s for _, s in copies)
        # the least: memory that is pinned for the first time takes long
        self.host = min(self.host, HOST * (step.host[True] + step.host[False]))

    def _learn_times(self, step: Step, known: Known) -> None:
        line = step.timeline(self.rate(out=True), self.rate(out=False), self.host)
        known.forced |= step.forced
        if known.plan is not None and line.end > QUICKER * known.lines[-1].end:
            return
        known.lines.append(line)
        if len(known.lines) >= MEASURED:
            self._plan(known, limited=bool(step.limit))

    def _plan(self, known: Known, *, limited: bool) -> None:
        line = min(known.lines[-MEASURED:], key=lambda line: line.end)
        line = replace(line, out=self.rate(out=True), back=self.rate(out=False), host=self.host)
        moves = known.forced if limited else choose(line, known.share)
        known.plan = schedule(line, moves, known.share, settle=not limited)
        known.lines = [line]

    def _check(self, step: Step, known: Known) -> None:
        """Whether the plan kept what it promised."""
        if step.limit:
            if step.forced - known.forced:
                known.forced |= step.forced
                self._plan(known, limited=True)
            return
        if step.stall() <= STALL * known.lines[-1].end:
            known.stalled = 0
            return
        known.stalled += 1
        if known.stalled > 1:
            known.share, known.stalled = known.share * LESS, 0
            self._plan(known, limited=False)


_FACTS: dict[torch.device, Facts] = {}


def facts_of(device: torch.device) -> Facts:
    """What is known of a device."""
    return _FACTS.setdefault(device, Facts())
