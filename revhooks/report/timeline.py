"""Small pictures of memory over a step: of several ways of taking it, or of what it is for, on one scale."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from ..record import CATEGORIES, Timeline, human_bytes

__all__ = ["by_category", "fractions", "margin_of", "over_time", "thinned", "timeline"]

_LEVELS = " ▁▂▃▄▅▆▇█"
Marks = Sequence[tuple[str, float]]


def timeline(
    series: Mapping[str, Sequence[int]], *, width: int = 56, height: int = 4, marks: Mapping[str, Marks] | None = None
) -> str:
    """Bars of each series over its step, all to the same scale.

    Args:
        series: bytes over the step, by name.
        width: columns of each picture.
        height: rows of each picture.
        marks: of some series, what begins where on the axis, as fractions of it.

    Example:
        >>> steps = {"plain": [0, 4, 8, 4, 0], "rev": [0, 2, 2, 2, 0]}
        >>> print(timeline(steps, width=5, height=2, marks={"rev": [("go", 0.4)]}))
        plain  8 B │  █
                   │ ███
                   └─────
        rev    2 B │
                   │ ▄▄▄
                   └──┴go
    """
    top = max((max(values, default=0) for values in series.values()), default=0) or 1
    peaks = _peaks(series)
    margin = " " * max(map(len, peaks.values()), default=0)
    lines = []
    for name, values in series.items():
        columns = _columns(values, width)
        for row in reversed(range(height)):
            label = peaks[name] if row == height - 1 else margin
            cells = "".join(_cell(value / top * height - row) for value in columns)
            lines.append(f"{label} │{cells}".rstrip())
        lines.append(f"{margin} {_axis(width, (marks or {}).get(name, ()))}")
    return "\n".join(lines)


def by_category(step: Timeline, *, width: int = 56) -> str:
    """What memory is for in the course of a step: one line a category, all to the same scale.

    Args:
        step: its bytes by category.
        width: columns of the picture.

    Example:
        >>> step = Timeline((0, 1, 2, 3), {"held": (2, 8, 4, 0), "rebuilt": (0, 0, 4, 0)}, (("forward", 0), ("backward", 2)))
        >>> print(by_category(step, width=4))
        held     8 B │▂█▄
        rebuilt  4 B │  ▄
                     └──┴─
    """
    series = {name: over_time(step.ns, step.bytes[name], width) for name in CATEGORIES if any(step.bytes.get(name, ()))}
    top = max((max(values) for values in series.values()), default=0) or 1
    peaks = _peaks({name: step.bytes[name] for name in series})
    lines = [f"{peaks[name]} │{''.join(_cell(value / top) for value in values)}".rstrip() for name, values in series.items()]
    margin = " " * max(map(len, peaks.values()), default=0)
    return "\n".join([*lines, f"{margin} {_axis(width, fractions(step))}"])


def over_time(ns: Sequence[int], values: Sequence[int], width: int) -> list[int]:
    """The largest value of each stretch of time, of ``width`` stretches alike; where nothing was sampled, the one before.

    Example:
        >>> over_time((0, 1, 2, 9), (1, 5, 2, 3), 5)
        [5, 2, 2, 2, 3]
    """
    end = max(ns, default=0) + 1
    columns: list[int | None] = [None] * width
    for when, value in zip(ns, values, strict=True):
        column = when * width // end
        columns[column] = max(value, columns[column] or 0)
    return list(itertools.accumulate(columns, lambda before, value: before if value is None else value, initial=0))[1:]


def thinned(step: Timeline, samples: int) -> Timeline:
    """The same in fewer samples: of each stretch of samples the largest, and the last one of all.

    Example:
        >>> thinned(Timeline((0, 1, 2, 3), {"held": (1, 5, 2, 3)}), 2)
        Timeline(ns=(1, 3), bytes={'held': (5, 3)}, phases=())
    """
    count, total = len(step.ns), step.total
    if count <= samples or not total:
        return step
    edges = [i * count // samples for i in range(samples + 1)]
    kept = sorted({max(range(a, b), key=total.__getitem__) for a, b in itertools.pairwise(edges)} | {count - 1})
    series = {name: tuple(values[i] for i in kept) for name, values in step.bytes.items()}
    return Timeline(tuple(step.ns[i] for i in kept), series, step.phases)


def fractions(step: Timeline) -> list[tuple[str, float]]:
    """When the phases of a step begin, as fractions of it."""
    end = max(step.ns, default=0) + 1
    return [(name, ns / end) for name, ns in step.phases]


def margin_of(series: Mapping[str, Sequence[int]]) -> int:
    """Columns that a picture needs beside its bars."""
    return max(map(len, _peaks(series).values()), default=0) + 2


def _peaks(series: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """The name and the peak of each, all of one length."""
    peaks = {name: human_bytes(max(values, default=0)) for name, values in series.items()}
    names, digits = max(map(len, peaks), default=0), max(map(len, peaks.values()), default=0)
    return {name: f"{name:<{names}}  {peak:>{digits}}" for name, peak in peaks.items()}


def _axis(width: int, marks: Marks) -> str:
    """The line under a picture; a name that has no room between two marks is left out."""
    cells = ["─"] * width
    starts = [min(width - 1, round(fraction * width)) for _, fraction in marks]
    for (name, _), start, end in zip(marks, starts, [*starts, width][1:], strict=True):
        if start:
            cells[start] = "┴"
        first = start + bool(start)
        if first + len(name) <= end:
            cells[first : first + len(name)] = name
    return "└" + "".join(cells)


def _columns(values: Sequence[int], width: int) -> list[int]:
    if not values:
        return [0] * width
    edges = [i * len(values) / width for i in range(width + 1)]
    return [max(values[int(a) : max(int(a) + 1, int(b))]) for a, b in itertools.pairwise(edges)]


def _cell(fill: float) -> str:
    return _LEVELS[max(0, min(8, round(fill * 8)))]
