"""What to move to the host, and when to fetch it: plain arithmetic on the times of a step that was measured.

The bus is free while the device computes. What is copied out has to be out when forward ends, where memory is fullest; what is
fetched has to be there when backward asks for it, and there is no reason to fetch before backward begins. So tensors to be
moved are jobs of two machines, which are feasible if in no stretch of time more is due than fits (the rule of earliest
deadlines first). Those that wait longest are chosen first: a byte moved is worth the time that it is away.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

__all__ = ["Plan", "Timeline", "choose", "schedule"]

LATENCY = 1e-5  # seconds that a copy takes however small it is
HOST_SHARE = 0.04  # of a step, that the host may spend on starting copies
LARGER = (0.5, 0.75, 0.9)  # of those that fit, how many are too small where the host may start few copies only
BINS = 128


@dataclass(frozen=True, slots=True)
class Timeline:
    """A step, as its device saw it.

    Attributes:
        sizes: bytes of the tensors that could be moved, in the order in which they were saved.
        packed: when each was saved, in seconds from the first.
        used: when backward asked for it first; ``None``: it never did.
        out: bytes a second to the host.
        back: bytes a second from it.
        host: seconds of the host that a tensor moved takes.
        spare: seconds by which the host is through before the device.
    """

    sizes: Sequence[int]
    packed: Sequence[float]
    used: Sequence[float | None]
    out: float
    back: float
    host: float = 0.0
    spare: float = 0.0

    @property
    def most(self) -> int:
        """How many the host has time to move."""
        return int((HOST_SHARE * self.end + self.spare) / self.host) if self.host > 0 else len(self.sizes)

    @property
    def end(self) -> float:
        """When the last was asked for."""
        return max((used for used in self.used if used is not None), default=0.0)

    @property
    def forward(self) -> float:
        """When the last was saved."""
        return self.packed[-1] if self.packed else 0.0

    @property
    def turn(self) -> float:
        """When backward began."""
        return min((used for used in self.used if used is not None and used >= self.forward), default=self.forward)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do with the tensors of a step, by their places in the order of saving.

    Attributes:
        moves: those to move.
        marks: those that stay, and whose use starts fetches.
        settled: at each place, how many of those moved before are out by then.
        starts: what to start to fetch when one is used.
    """

    moves: frozenset[int] = frozenset()
    marks: frozenset[int] = frozenset()
    settled: Sequence[int] = ()
    starts: dict[int, tuple[int, ...]] = field(default_factory=dict)


def choose(line: Timeline, share: float) -> frozenset[int]:
    """Those that a bus of which ``share`` can be had moves for nothing.

    Example:
        >>> line = Timeline([100] * 4, [0.0, 1.0, 2.0, 3.0], [8.0, 6.5, 5.0, 3.5], out=50, back=50)
        >>> sorted(choose(line, 1.0))
        [0]
        >>> sorted(choose(line, 0.1))
        []
    """
    most = line.most
    chosen = _fitting(line, share, 0)
    if len(chosen) <= most:
        return frozenset(chosen)
    # fewer, larger ones, if these are more bytes
    sizes = sorted(line.sizes[i] for i in chosen)
    found = [chosen, *(_fitting(line, share, sizes[int(part * len(sizes))]) for part in LARGER)]
    return frozenset(max((some[:most] for some in found), key=lambda some: sum(line.sizes[i] for i in some)))


def _fitting(line: Timeline, share: float, least: int) -> list[int]:
    """Those of at least so many bytes that fit on the bus, by the time that they wait."""
    out, back = _Slack(line.forward), _Slack(line.end - line.turn)
    waits = [(used - line.packed[i], i) for i, used in enumerate(line.used) if used is not None and used >= line.turn]
    chosen = []
    for _, i in sorted(waits, key=lambda wait: (-wait[0], wait[1])):
        used = line.used[i]
        there, here = _cost(line.sizes[i], line.out * share), _cost(line.sizes[i], line.back * share)
        if used is None or line.sizes[i] < least:
            continue
        # time runs backwards for what leaves: the end of forward is one deadline for all
        leave, come = out.bin(line.forward - line.packed[i]), back.bin(used - line.turn)
        if out.has(leave, there) and back.has(come, here):
            out.take(leave, there)
            back.take(come, here)
            chosen.append(i)
    return chosen


class _Slack:
    """How much more can be done until each of so many deadlines."""

    def __init__(self, length: float) -> None:
        self._width = length / BINS
        self._left = [self._width * b for b in range(BINS + 1)]

    def bin(self, time: float) -> int:
        """The last deadline before a time."""
        return min(int(time / self._width), BINS) if self._width > 0 else 0

    def has(self, deadline: int, cost: float) -> bool:
        """Whether a job fits that has to be done by then."""
        return min(self._left[deadline:]) >= cost

    def take(self, deadline: int, cost: float) -> None:
        """Make room for it."""
        for later in range(deadline, BINS + 1):
            self._left[later] -= cost


def _cost(nbytes: int, rate: float) -> float:
    return nbytes / rate + LATENCY if rate > 0 else float("inf")


def schedule(line: Timeline, moves: Iterable[int], share: float, *, settle: bool = True) -> Plan:
    """When copies are over, and when to start to fetch: as late as will do, on a bus of which ``share`` can be had.

    Args:
        line: the step that was measured.
        moves: what to move.
        share: of the measured bandwidth, what is counted on.
        settle: say when those that left are out; else whoever follows the plan lets go of them by need.
    """
    moved = sorted(moves)
    settled, free, over = [0] * len(line.sizes), 0.0, 0
    for i in moved if settle else ():
        free = max(free, line.packed[i]) + _cost(line.sizes[i], line.out * share)
        over = max(over, i + 1, bisect.bisect_left(line.packed, free))
        if over < len(settled):
            settled[over] += 1
    for i in range(1, len(settled)):
        settled[i] += settled[i - 1]
    asked = sorted((used, -i) for i, used in enumerate(line.used) if used is not None and used >= line.turn)
    starts: dict[int, list[int]] = {}
    latest, away = float("inf"), set(moved)
    for used, i in reversed([(used, -i) for used, i in asked if -i in away]):
        latest = min(used, latest) - _cost(line.sizes[i], line.back * share)
        trigger = asked[max(bisect.bisect_right(asked, (latest, 1)) - 1, 0)]
        starts.setdefault(-trigger[1], []).insert(0, i)
    marks = (frozenset(starts) | {-i for _, i in asked[:1]}) - away  # the first says that backward has begun
    return Plan(frozenset(away), marks, settled, {at: tuple(what) for at, what in starts.items()})
