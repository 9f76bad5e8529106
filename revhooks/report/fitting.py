"""A table that fits its terminal: figures are whole, names get the room that they leave and are broken where words end."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

__all__ = ["Columns", "broken"]

_LEAST = 12  # columns of a name: where even these are not left, figures are broken as well
_SECOND = 16  # columns that a second column of names takes at most, where the first has too little
_ENDS = re.compile(r"(?<=[.=_ ])|(?<=[a-z0-9])(?=[A-Z])")


@dataclass(frozen=True, slots=True)
class Columns:
    """A table of names, on the left, and of figures.

    Attributes:
        title: what stands above it.
        names: one or two columns of names: a heading, and a name for each row.
        figures: columns of figures: a heading, of several lines, and a figure for each row.
    """

    title: str
    names: Sequence[tuple[str, Sequence[str]]]
    figures: Sequence[tuple[str, Sequence[Text]]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lay it out for the width at hand."""
        needs = [_longest([heading, *names]) for heading, names in self.names]
        figures = [_longest([*heading.split("\n"), *(cell.plain for cell in cells)]) for heading, cells in self.figures]
        gap = 2 if sum(needs) + sum(figures) + 2 * (len(needs) + len(figures) - 1) <= options.max_width else 1
        room = options.max_width - sum(figures) - gap * (len(needs) + len(figures) - 1)
        widths = _share(needs, room)
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, gap - 1, 0, 0))
        for (heading, _), width in zip(self.names, widths, strict=True):
            table.add_column(heading, width=width, overflow="fold")
        for heading, _ in self.figures:
            table.add_column(heading, justify="right", no_wrap=sum(widths) <= room, overflow="fold")
        names = [[Text(broken(name, width)) for name in column] for (_, column), width in zip(self.names, widths, strict=True)]
        for row in zip(*names, *(cells for _, cells in self.figures), strict=True):
            table.add_row(*row)
        yield Text(self.title, style="bold")
        yield table


def _share(needs: Sequence[int], room: int) -> list[int]:
    """The widths of one or two columns of names, in so much room."""
    if len(needs) == 1:
        return [min(needs[0], max(_LEAST, room))]
    second = min(needs[1], max(_SECOND, room - needs[0]))
    return [min(needs[0], max(_LEAST, room - second)), second]


def broken(name: str, width: int) -> str:
    r"""A name in lines of at most ``width``, broken after a dot or where a word begins, if it has such a place.

    Example:
        >>> broken("transformer.h.0-3.mlp", 14), broken("replay=GPT2Block", 99)
        ('transformer.h.\n0-3.mlp', 'replay=GPT2Block')
    """
    lines = [""]
    for piece in _ENDS.split(name):
        if lines[-1] and cell_len((lines[-1] + piece).rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


def _longest(texts: Sequence[str]) -> int:
    return max(map(cell_len, texts), default=0)
