"""A small picture of memory over a step, plain against reversible, on one scale."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ..record import human_bytes

__all__ = ["timeline"]

_LEVELS = " ▁▂▃▄▅▆▇█"


def timeline(series: dict[str, Sequence[int]], *, width: int = 56, height: int = 4) -> str:
    """Bars of each series over its step, all to the same scale.

    Args:
        series: bytes over the step, by name.
        width: columns of each picture.
        height: rows of each picture.

    Example:
        >>> print(timeline({"plain": [0, 4, 8, 4, 0], "rev": [0, 2, 2, 2, 0]}, width=5, height=2))
        plain  8 B │  █
                   │ ███
                   └─────
        rev    2 B │
                   │ ▄▄▄
                   └─────
    """
    top = max((max(values, default=0) for values in series.values()), default=0) or 1
    names = max(map(len, series), default=0)
    peaks = {name: human_bytes(max(values, default=0)) for name, values in series.items()}
    digits = max(map(len, peaks.values()), default=0)
    lines = []
    for name, values in series.items():
        columns = _columns(values, width)
        for row in reversed(range(height)):
            label = f"{name:<{names}}  {peaks[name]:>{digits}}" if row == height - 1 else " " * (names + 2 + digits)
            cells = "".join(_cell(value / top * height - row) for value in columns)
            lines.append(f"{label} │{cells}".rstrip())
        lines.append(" " * (names + 2 + digits) + " └" + "─" * width)
    return "\n".join(lines)


def _columns(values: Sequence[int], width: int) -> list[int]:
    if not values:
        return [0] * width
    edges = [i * len(values) / width for i in range(width + 1)]
    return [max(values[int(a) : max(int(a) + 1, int(b))]) for a, b in itertools.pairwise(edges)]


def _cell(fill: float) -> str:
    return _LEVELS[max(0, min(8, round(fill * 8)))]
