"""Reports for a terminal, of any kind of record. Needs rich and the record only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.constrain import Constrain
from rich.table import Table
from rich.text import Text

from ..record import Choice, ModuleRow, Record, human_bytes
from . import timeline
from .advice import advice
from .columns import LEGEND, Cell, cells, columns, largest
from .facts import beside, facts, milliseconds, where
from .fitting import Columns
from .grouping import Group as Rows
from .grouping import grouped, nothing_held, reasons, rows_of_kept
from .selection import pictured

__all__ = ["render"]

_WIDEST = 72  # columns of a picture, at most


def render(record: Record, *, rows: int = 30, width: int | None = None) -> RenderableType:
    """The whole report: the answer first, then what it rests on.

    Args:
        record: what to show, of any kind.
        rows: the most rows of modules to list, where modules that are alike share one; the rest is summed up.
        width: columns to fit; by default those of the terminal.

    Example:
        >>> record = Record("run", "train.py", "cpu", "2.13.0")
        >>> Console(width=80).print(render(record), end="")
        train.py on cpu, torch 2.13.0
        <BLANKLINE>
        Nothing was saved for backward: no step ran under reversible().
        <BLANKLINE>
        plain autograd would have held  0 B
        held for backward at most       0 B
    """
    head = Text.assemble((record.target or record.kind, "bold"), f" on {where(record)}")
    sections = [head, Text(advice(record)), *_SECTIONS.get(record.kind, _of_report)(record, rows)]
    body = Group(*(part for section in sections for part in (Text(""), section)))
    body = Group(*body.renderables[1:])
    return body if width is None else Constrain(body, width)


# -- sections, by kind of record


def _of_report(record: Record, rows: int) -> list[RenderableType]:
    return [*_what_if(record), *_held(record, rows), *_picture(record), *_pairs("", facts(record)), *_beside(record)]


def _of_profile(record: Record, rows: int) -> list[RenderableType]:
    return [*_pairs("", facts(record)), *_profiled(record, rows), *_categories(record), *_beside(record)]


def _of_run(record: Record, rows: int) -> list[RenderableType]:
    return [*_pairs("", facts(record)), *_held(record, rows), *_beside(record)]


def _of_prediction(record: Record, rows: int) -> list[RenderableType]:
    return [*_what_if(record), *_fits(record), *_held(record, rows), *_picture(record), *_beside(record)]


_SECTIONS: dict[str, Callable[[Record, int], list[RenderableType]]] = {
    "report": _of_report,
    "profile": _of_profile,
    "run": _of_run,
    "prediction": _of_prediction,
}


def _what_if(record: Record) -> list[RenderableType]:
    """Every choice in a row, the best of each column marked; what could not be measured below."""
    if not record.choices:
        return []
    shown = columns(record)
    figures = [(column.title, [_marked(cell) for cell in cells(column, record.choices)]) for column in shown]
    title = "predicted" if record.kind == "prediction" else "what if"
    table = Columns(title, [("step", [choice.name for choice in record.choices])], figures)
    notes = [LEGEND] if record.kind != "prediction" else ["* the best of its column"]
    hows = list(dict.fromkeys(choice.how for choice in record.choices if choice.measured_peak_bytes is not None))
    if hows:
        notes.append(f"measured: {', '.join(hows)}; not to be compared with accounted bytes")
    notes += [f"{choice.name}: {choice.problem}" for choice in record.choices if choice.problem]
    return [Group(table, *(Text(note) for note in notes))]


def _held(record: Record, rows: int) -> list[RenderableType]:
    """What is still held, by module, the largest first, with numbers for the reasons that stand below."""
    groups = grouped(record.modules or rows_of_kept(record.stats.kept))
    holding = [group for group in groups if group.total.held_bytes]
    idle = [group for group in groups if not group.total.held_bytes]
    if not groups:
        return []
    figures = [_Figure("held", lambda row: human_bytes(row.held_bytes))]
    if record.modules:
        figures.insert(0, _Figure("plain", lambda row: human_bytes(row.saved_plain_bytes)))
    title = f"what is still held: {human_bytes(sum(group.total.held_bytes for group in holding))}"
    if record.modules:
        title += f", where plain autograd saves {human_bytes(sum(group.total.saved_plain_bytes for group in groups))}"
    headings = ["module", "type"] if record.modules else ["where", "what"]
    parts = _module_table(title, headings, holding, figures, rows) if holding else [Text("Nothing is held.")]
    saved = sum(group.total.saved_plain_bytes for group in idle)
    line = nothing_held(idle) + (f" ({human_bytes(saved)} in plain autograd)" if saved else "")
    return [Group(*parts, *([Text(line)] if idle else []))]


def _profiled(record: Record, rows: int) -> list[RenderableType]:
    """Modules with what rebuilding them took."""
    groups = grouped(record.modules)
    shown = [group for group in groups if group.total.held_bytes or group.total.rebuilds]
    idle = [group for group in groups if not (group.total.held_bytes or group.total.rebuilds)]
    figures = [
        _Figure("calls", lambda row: f"{row.calls:,}"),
        _Figure("plain", lambda row: human_bytes(row.saved_plain_bytes)),
        _Figure("held", lambda row: human_bytes(row.held_bytes)),
        _Figure("rebuilds", lambda row: f"{row.rebuilds:,}" if row.rebuilds else "-"),
        _Figure("rebuild\ntime", lambda row: milliseconds(row.rebuild_ns) if row.rebuilds else "-"),
        _Figure("worst\nerror", lambda row: f"{row.error:.1e}" if row.error else "0" if row.rebuilds else "-"),
    ]
    if not groups:
        return []
    parts = _module_table("by module", ["module"], shown, figures, rows)
    return [Group(*parts, *([Text(nothing_held(idle))] if idle else []))]


def _picture(record: Record) -> list[RenderableType]:
    choices = pictured(record)
    if not choices:
        return []
    kind = "predicted" if record.kind == "prediction" else "accounted"
    title = Text.assemble(("memory over the step", "bold"), f" ({kind} bytes, one scale; each over its own time)")
    return [Group(title, _Picture(choices))]


def _categories(record: Record) -> list[RenderableType]:
    parts: list[RenderableType] = []
    for choice in record.choices:
        if choice.timeline.ns:
            name = f", {choice.name}" if len(record.choices) > 1 else ""
            title = Text.assemble((f"memory by category{name}", "bold"), " (accounted bytes, one scale)")
            parts.append(Group(title, _Categories(choice)))
    return parts


def _beside(record: Record) -> list[RenderableType]:
    return _pairs("beside the activations", beside(record))


def _fits(record: Record) -> list[RenderableType]:
    """The largest size that fits, of each way."""
    parts: list[RenderableType] = []
    for keyword, limit in dict.fromkeys((fit.keyword, fit.limit_bytes) for fit in record.fits):
        fits = [fit for fit in record.fits if (fit.keyword, fit.limit_bytes) == (keyword, limit)]
        figures = [
            (f"largest\n{keyword}", [_marked(cell) for cell in largest(fits)]),
            ("bytes\nin all", [Text(human_bytes(fit.bytes)) for fit in fits]),
            ("of the\nlimit", [Text(f"{fit.bytes / limit:.0%}") for fit in fits]),
        ]
        parts.append(Columns(f"what fits {human_bytes(limit)}", [("step", [fit.name for fit in fits])], figures))
    return parts


# -- parts


@dataclass(frozen=True, slots=True)
class _Figure:
    """A column of a table of modules."""

    title: str
    text: Callable[[ModuleRow], str]


def _module_table(
    title: str, headings: Sequence[str], groups: Sequence[Rows], figures: Sequence[_Figure], rows: int
) -> list[RenderableType]:
    """A table of modules, with their types if those have a heading, and the reasons that its last column has numbers for."""
    shown, rest = groups[:rows], groups[rows:]
    why = reasons(shown)
    names = [(headings[0], [group.label for group in shown])]
    if len(headings) > 1:
        names.append((headings[1], [group.total.type for group in shown]))
    texts = [(figure.title, [Text(figure.text(group.total)) for group in shown]) for figure in figures]
    numbers = [Text(f"{why.get((group.total.why, group.total.remedy), ('', ''))[0]}") for group in shown]
    parts: list[RenderableType] = [Columns(title, names, [*texts, ("why", numbers)])]
    if rest:
        saved, held = (sum(getattr(group.total, name) for group in rest) for name in ("saved_plain_bytes", "held_bytes"))
        more = f"and {sum(group.count for group in rest):,} more, which hold {human_bytes(held)}"
        parts.append(Text(more + (f" ({human_bytes(saved)} in plain autograd)" if saved else "")))
    return [*parts, _numbered(why.values())]


def _numbered(lines: Iterable[tuple[int, str]]) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(overflow="fold")
    for number, line in lines:
        grid.add_row(Text(f"{number}"), Text(line))
    return grid


def _pairs(title: str, pairs: Sequence[tuple[str, str]]) -> list[RenderableType]:
    if not pairs:
        return []
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in pairs:
        grid.add_row(Text(name), Text(text))
    return [Group(Text(title, style="bold"), grid) if title else grid]


def _marked(cell: Cell) -> Text:
    return Text(cell.marked, style="bold" if cell.best else "")


@dataclass(frozen=True, slots=True)
class _Picture:
    """The course of memory in several choices, as wide as there is room."""

    choices: Sequence[Choice]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        totals = {choice.name: choice.timeline.total for choice in self.choices}
        width = max(10, min(_WIDEST, options.max_width - timeline.margin_of(totals)))
        series = {choice.name: timeline.over_time(choice.timeline.ns, totals[choice.name], width) for choice in self.choices}
        marks = {choice.name: timeline.fractions(choice.timeline) for choice in self.choices}
        yield Text(timeline.timeline(series, width=width, marks=marks), no_wrap=True, overflow="ignore")


@dataclass(frozen=True, slots=True)
class _Categories:
    """What memory is for in the course of one choice."""

    choice: Choice

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(10, min(_WIDEST, options.max_width - timeline.margin_of(self.choice.timeline.bytes)))
        yield Text(timeline.by_category(self.choice.timeline, width=width), no_wrap=True, overflow="ignore")
