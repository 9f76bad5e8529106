"""The picture of memory over a step as SVG: several ways of taking it as areas, or one way by category, stacked.

It refers to nothing outside, and is read on light and on dark ground: by itself it looks at what the reader prefers, within a
page it takes the page's colour of text.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape

from ..record import Choice, Record, human_bytes
from .facts import milliseconds
from .selection import pictured
from .timeline import thinned

__all__ = ["svg"]

_WIDTH, _HEIGHT = 760, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 14, 46, 44
_FONT = "12px system-ui, -apple-system, 'Segoe UI', sans-serif"
_COLOURS = ("#e69f00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")  # told apart by the colour-blind as well
_STACKED = ("parameters", "gradients", "optimizer", "held", "rebuilt", "temporary")  # from below
_OF_CATEGORY = dict(zip(_STACKED, (*_COLOURS[4:], *_COLOURS[:4]), strict=True))
_TICKS = 4
_SAMPLES = 400  # of a line: more are less than two points apart
_INK = ".rv-alone{color:#222;background:#fff}@media(prefers-color-scheme:dark){.rv-alone{color:#ddd;background:#181818}}"
_Point = tuple[float, float]


def svg(record: Record, *, choice: str | None = None, standalone: bool = True) -> str:
    """Memory over a step, with axes, a legend, and marks where phases begin; empty where the record has no timeline.

    All pictures of one record that show the same kind of thing have the same scales. A step is as long as it took, where that was
    measured, and else of one length for all.

    Args:
        record: with timelines.
        choice: the name of the one to show by category; ``None`` for plain against the others, or where there is one only, that.
        standalone: whether it is a file of its own, with ground and ink of its own.

    Example:
        >>> from revhooks.record import Timeline
        >>> step = Timeline((0, 10), {"held": (0, 2**20)}, (("forward", 0),))
        >>> picture = svg(Record("report", "net", "cpu", "2.13.0", (Choice("plain", timeline=step),)))
        >>> picture.startswith("<svg ") and "forward" in picture
        True
    """
    drawn = [one for one in record.choices if one.timeline.ns] if choice is not None else pictured(record)
    drawn = [replace(one, timeline=thinned(one.timeline, _SAMPLES)) for one in drawn]
    chosen = next((one for one in drawn if one.name == choice), None) if choice is not None else None
    if choice is None and len(drawn) == 1:
        chosen = drawn[0]
    if not drawn or (choice is not None and chosen is None):
        return ""
    if chosen is None:
        frame = _Frame.of(drawn, [max(one.timeline.total, default=0) for one in drawn])
        body = "".join(_areas(frame, drawn))
        title = "Memory over a step: " + ", ".join(one.name for one in drawn)
    else:
        frame = _Frame.of(drawn, [max(map(sum, zip(*one.timeline.bytes.values(), strict=True)), default=0) for one in drawn])
        body = "".join(_stack(frame, chosen))
        title = f"Memory over a step by category: {chosen.name}"
    style, alone = (f"<style>{_INK}</style>", ' class="rv-alone"') if standalone else ("", "")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" '
        f'role="img" aria-label="{escape(title)}" style="font:{_FONT};max-width:100%;height:auto"{alone}>'
        f"<title>{escape(title)}</title>{style}{''.join(frame.axes())}{body}</svg>\n"
    )


@dataclass(frozen=True, slots=True)
class _Frame:
    """Where bytes and times are in the picture.

    Attributes:
        top_bytes: at the upper edge.
        end_ns: at the right edge; 0 where times are not known.
    """

    top_bytes: int
    end_ns: int

    @classmethod
    def of(cls, choices: Sequence[Choice], peaks: Sequence[int]) -> _Frame:
        """One that has room for all."""
        timed = all(choice.step_ns for choice in choices)
        return cls(_above(max(peaks, default=0)), max(choice.step_ns for choice in choices) if timed else 0)

    def y(self, nbytes: float) -> float:
        """Of so many bytes."""
        return _HEIGHT - _BOTTOM - nbytes / self.top_bytes * (_HEIGHT - _TOP - _BOTTOM)

    def x(self, choice: Choice, ns: int) -> float:
        """Of a moment of a choice's step."""
        share = ns / (max(choice.timeline.ns) or 1) * (choice.step_ns / self.end_ns if self.end_ns else 1)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def axes(self) -> Iterator[str]:
        """Lines and figures of both axes."""
        right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
        for i in range(_TICKS + 1):
            nbytes = self.top_bytes * i // _TICKS
            y = self.y(nbytes)
            faint = "" if i == 0 else ' stroke-opacity=".15"'
            yield f'<path d="M{_LEFT} {y:.1f}H{right}" stroke="currentColor"{faint}/>'
            yield _text(_LEFT - 8, y + 4, human_bytes(nbytes), "end")
        end = self.end_ns or 100
        for tick in range(0, end + 1, _round(end)):
            x = _LEFT + (right - _LEFT) * tick / end
            yield f'<path d="M{x:.1f} {bottom}v4" stroke="currentColor"/>'
            yield _text(x, bottom + 17, milliseconds(tick) if self.end_ns else f"{tick}%", "end" if x > right - 20 else "middle")
        yield _text((_LEFT + right) / 2, _HEIGHT - 8, "time of a step" if self.end_ns else "share of a step", "middle")


def _areas(frame: _Frame, choices: Sequence[Choice]) -> Iterator[str]:
    """A line for each choice and a faint area under it, those with the highest peaks behind."""
    colours = dict(zip((choice.name for choice in choices), itertools.cycle(_COLOURS)))
    for choice in sorted(choices, key=lambda one: -max(one.timeline.total)):
        colour = colours[choice.name]
        line = _line(frame, choice, choice.timeline.total)
        ground = _line(frame, choice, [0] * len(choice.timeline.ns))
        yield f'<path d="M{_path(line)}L{_path(ground[::-1])}Z" fill="{colour}" fill-opacity=".18"/>'
        yield f'<path d="M{_path(line)}" fill="none" stroke="{colour}" stroke-width="1.8"/>'
    for choice in choices:
        yield from _phases(frame, choice, colours[choice.name], named=choice is choices[0])
    yield from _legend([(f"{one.name}, {human_bytes(max(one.timeline.total))}", colours[one.name]) for one in choices])


def _stack(frame: _Frame, choice: Choice) -> Iterator[str]:
    """An area for each category, on top of each other; what stays as it is lies below."""
    step = choice.timeline
    shown = [name for name in _STACKED if any(step.bytes.get(name, ()))]
    below = [0] * len(step.ns)
    for name in shown:
        above = [a + b for a, b in zip(below, step.bytes[name], strict=True)]
        upper, lower = _line(frame, choice, above), _line(frame, choice, below)
        yield f'<path d="M{_path(upper)}L{_path(lower[::-1])}Z" fill="{_OF_CATEGORY[name]}" fill-opacity=".8"/>'
        below = above
    yield from _phases(frame, choice, "currentColor", named=True)
    yield from _legend([(f"{name}, {human_bytes(max(step.bytes[name]))}", _OF_CATEGORY[name]) for name in shown])


def _phases(frame: _Frame, choice: Choice, colour: str, *, named: bool) -> Iterator[str]:
    for name, ns in choice.timeline.phases:
        x = frame.x(choice, ns)
        if ns:
            yield f'<path d="M{x:.1f} {_TOP}V{_HEIGHT - _BOTTOM}" stroke="{colour}" stroke-dasharray="2 4"/>'
        if named:
            late = x > _WIDTH - _RIGHT - 70
            yield _text(x - 4 if late else x + 4, _TOP + 12, name, "end" if late else "start")


def _legend(entries: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Names with their colours, from the left, in two lines if need be."""
    x, y = float(_LEFT), 16
    for name, colour in entries:
        wide = 28 + 6.6 * len(name)
        if x + wide > _WIDTH and x > _LEFT:
            x, y = _LEFT, y + 16
        yield f'<rect x="{x:.1f}" y="{y - 9}" width="10" height="10" rx="2" fill="{colour}"/>'
        yield _text(x + 15, y, name, "start")
        x += wide


def _line(frame: _Frame, choice: Choice, values: Sequence[int]) -> list[_Point]:
    """Points of a line that holds each value until the next one."""
    points = [(frame.x(choice, ns), frame.y(value)) for ns, value in zip(choice.timeline.ns, values, strict=True)]
    corners = points[:1]
    for (_, before), (x, y) in itertools.pairwise(points):
        corners += [(x, before), (x, y)]
    return corners


def _path(points: Sequence[_Point]) -> str:
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="currentColor">{escape(text)}</text>'


def _round(end: int) -> int:
    """A round number that is a fifth of ``end`` or somewhat more."""
    scale = int("1" + "0" * (len(str(end // 5)) - 1))
    return next(factor * scale for factor in (1, 2, 5, 10) if factor * scale * 5 >= end)


def _above(peak: int) -> int:
    """A round number of bytes, of which a fourth is round as well, that has room for ``peak``."""
    unit = 1
    while peak > 1000 * unit and unit < 2**30:
        unit *= 1024
    scale = unit
    while True:
        for factor in (4, 6, 8, 12, 16, 20, 24, 32):
            if factor * scale >= peak:
                return factor * scale
        scale *= 10
