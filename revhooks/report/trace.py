"""A record as a trace of Chrome's format, for Perfetto or ``chrome://tracing``: counters of bytes, and what ran when.

Each choice is a process with a counter of its bytes by category and a track of its phases; slices, which are of ``reversible()``
or of the steps that were profiled, are on a track for each kind. Times are in microseconds.

References:
    Trace Event Format, Google, "Complete events", "Counter events", "Metadata events".
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ..record import CATEGORIES, Choice, Record, Slice

__all__ = ["trace"]

KINDS = ("forward", "backward", "rebuild", "optimizer")
_LANES = 100  # tracks of one kind at most: slices of several threads overlap
_Event = dict[str, Any]


def trace(record: Record) -> str:
    """The trace, as JSON.

    Args:
        record: with timelines, slices, or both.

    Example:
        >>> record = Record("profile", "net", "cpu", "2.13.0", slices=(Slice("body.0", "rebuild", 2000, 5000),))
        >>> [event for event in json.loads(trace(record))["traceEvents"] if event["ph"] == "X"]
        [{'name': 'body.0', 'cat': 'rebuild', 'ph': 'X', 'ts': 2.0, 'dur': 3.0, 'pid': 1, 'tid': 300}]
    """
    choices = [choice for choice in record.choices if choice.timeline.ns]
    names = [choice.name for choice in choices] or [record.target]
    ran = names.index("reversible()") if "reversible()" in names else 0
    events: list[_Event] = []
    for pid, name in enumerate(names, start=1):
        events.append(_named("process_name", pid, 0, f"{name}, {record.target}" if name != record.target else name))
    for pid, choice in enumerate(choices, start=1):
        events += _counters(choice, pid)
        events += _phases(choice, pid)
    events += _slices(record.slices, ran + 1)
    about = {"target": record.target, "device": record.device, "torch": record.torch}
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms", "otherData": about})


def _counters(choice: Choice, pid: int) -> Iterator[_Event]:
    """Bytes of each category at each sample; Perfetto stacks the series of one counter."""
    step = choice.timeline
    for i, ns in enumerate(step.ns):
        values = {name: step.bytes[name][i] for name in CATEGORIES if name in step.bytes}
        yield {"name": "bytes", "ph": "C", "ts": ns / 1000, "pid": pid, "tid": 0, "args": values}


def _phases(choice: Choice, pid: int) -> Iterator[_Event]:
    """The phases of a step, each up to the next."""
    step = choice.timeline
    if not step.phases:
        return
    yield _named("thread_name", pid, 1, "phases")
    ends = [ns for _, ns in step.phases[1:]] + [max(step.ns)]
    for (name, start), stop in zip(step.phases, ends, strict=True):
        yield _complete(name, name, start, stop, pid, 1)


def _slices(slices: Iterable[Slice], pid: int) -> Iterator[_Event]:
    """Slices on the track of their kind, or on further ones where they overlap without nesting."""
    in_order = sorted(slices, key=lambda one: (one.kind, one.start_ns, -one.stop_ns))
    for kind, group in itertools.groupby(in_order, key=lambda one: one.kind):
        first = (1 + KINDS.index(kind) if kind in KINDS else 1 + len(KINDS)) * _LANES
        for lane, members in enumerate(_lanes(list(group))):
            yield _named("thread_name", pid, first + lane, kind if not lane else f"{kind} {lane + 1}")
            for one in members:
                yield _complete(one.name, kind, one.start_ns, one.stop_ns, pid, first + lane)


def _lanes(slices: Sequence[Slice]) -> list[list[Slice]]:
    """Slices, in order of their starts, in lanes in which two are either apart or one within the other."""
    lanes: list[tuple[list[Slice], list[int]]] = []  # each with the ends of what is open in it, the innermost last
    for one in slices:
        for _, ends in lanes:
            while ends and ends[-1] <= one.start_ns:
                ends.pop()
        free = (lane for lane in lanes if not lane[1] or one.stop_ns <= lane[1][-1])
        members, ends = next(free, None) or ([], [])
        if not members:
            lanes.append((members, ends))
        members.append(one)
        ends.append(one.stop_ns)
    return [members for members, _ in lanes]


def _complete(name: str, kind: str, start: int, stop: int, pid: int, tid: int) -> _Event:
    span = {"ts": start / 1000, "dur": (stop - start) / 1000}
    return {"name": name or "model", "cat": kind, "ph": "X", **span, "pid": pid, "tid": tid}


def _named(what: str, pid: int, tid: int, name: str) -> _Event:
    return {"name": what, "ph": "M", "ts": 0, "pid": pid, "tid": tid, "args": {"name": name}}
