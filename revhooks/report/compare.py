"""Two records side by side, and what of the second is worse."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..record import Choice, Record, human_bytes

__all__ = ["Row", "Section", "regressions", "render", "saved_percent", "sections"]

REVERSIBLE = "reversible()"
_ERRORS = 10.0  # times as large: an error has grown
_ROUNDING = 1e-6  # below which errors are rounding
_MODULES = 8


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of both records.

    Attributes:
        name: what it is.
        a, b: the figures; ``None`` where one was not measured.
        unit: ``bytes``, ``time`` (nanoseconds), ``ratio`` (a thousandth of plain's time), ``error``, ``count`` or ``percent``.
        judged: whether more of it in ``b`` is worse.
    """

    name: str
    a: float | None
    b: float | None
    unit: str
    judged: bool = True

    @property
    def growth(self) -> float | None:
        """By which share of ``a`` the figure has grown; ``None`` where that cannot be told."""
        if self.a is None or self.b is None or (not self.a and self.b):
            return None
        return (self.b - self.a) / self.a if self.a else 0.0

    @property
    def change(self) -> str:
        """The difference, in words."""
        if self.a is None or self.b is None:
            return ""
        if self.a == self.b:
            return "="
        if self.unit == "percent":
            return f"{self.b - self.a:+.1f}"
        growth = self.growth
        if self.unit == "error":
            return _factor(self.b / self.a) if self.a and self.b else "new" if self.b else "gone"
        if growth is None:
            return "new"
        return f"{growth:+.1%}"

    def cell(self, value: float | None) -> str:
        """A figure for a screen."""
        if value is None:
            return "-"
        match self.unit:
            case "bytes":
                return human_bytes(value)
            case "time":
                return f"{value / 1e6:.1f} ms" if value else "-"
            case "ratio":
                return f"{value / 1000:.2f}"
            case "error":
                return f"{value:.1e}"
            case "percent":
                return f"{value:.1f}%"
        return f"{value:,.0f}"


def _factor(times: float) -> str:
    """A factor, to two digits."""
    return f"x{times:.2g}" if 0.01 <= times < 100 else f"x{times:,.0f}" if times < 1e5 and times > 1 else f"x{times:.0e}"


@dataclass(frozen=True, slots=True)
class Section:
    """The figures of one way of taking a step, or of a run.

    Attributes:
        name: what they are of.
        rows: the figures.
        judged: whether any of them are.
    """

    name: str
    rows: tuple[Row, ...]
    judged: bool = True


def saved_percent(record: Record, choice: str = REVERSIBLE) -> float | None:
    """How many percent of what plain autograd would hold a record saves; ``None`` where it cannot be told.

    What the choice of this name holds when forward is over, against what the choice ``plain`` does. Where these were not
    measured, as of a run: its peak of held bytes against the peak that plain autograd would have had.

    Example:
        >>> from revhooks.record import Stats
        >>> saved_percent(Record("run", "train.py", "cpu", "2.13", stats=Stats(packed_bytes=1000, peak_held_bytes=400)))
        60.0
    """
    plain, other = record.choice("plain"), record.choice(choice)
    if plain is not None and other is not None and not plain.problem and not other.problem:
        held, whole = other.saved_bytes, plain.saved_bytes
    elif choice == REVERSIBLE and (other is None or not other.problem):
        held, whole = record.stats.peak_held_bytes, record.stats.packed_bytes
    else:
        return None
    return 100 * (whole - held) / whole if whole else None


def sections(a: Record, b: Record) -> list[Section]:
    """What can be compared: choices that both have, the stats of runs, sizes that fit, modules that hold another amount."""
    found = [_choice(one, other, a, b) for one in a.choices if (other := b.choice(one.name)) is not None]
    if not a.choices or not b.choices:
        found.append(_stats(a, b))
    if fits := tuple(_fits(a, b)):
        found.append(Section("largest that fits", fits, judged=False))
    if modules := tuple(_modules(a, b)):
        found.append(Section("held by module, where it differs", modules, judged=False))
    return found


def _choice(one: Choice, other: Choice, a: Record, b: Record) -> Section:
    if one.problem or other.problem:
        return Section(f"{one.name}: {other.problem or one.problem} ({'in b' if other.problem else 'in a'})", ())
    same = one.how == other.how
    how = one.how if same else "not in the same way"
    rows = [
        Row("held for backward", one.saved_bytes, other.saved_bytes, "bytes"),
        Row("accounted peak", one.accounted_peak_bytes, other.accounted_peak_bytes, "bytes"),
    ]
    if one.measured_peak_bytes is not None or other.measured_peak_bytes is not None:
        rows.append(Row(f"peak ({how})", one.measured_peak_bytes, other.measured_peak_bytes, "bytes", judged=same))
    if one.step_ns or other.step_ns:
        rows.append(Row("step time", one.step_ns, other.step_ns, "time"))
    if one.name != "plain":
        if one.step_ns and other.step_ns:
            rows.append(Row("step time / plain", one.time_permille, other.time_permille, "ratio"))
        rows.append(Row("reconstruction error", one.reconstruction_error, other.reconstruction_error, "error"))
        if one.gradient_error is not None or other.gradient_error is not None:
            rows.append(Row("gradient error", one.gradient_error, other.gradient_error, "error"))
        rows.append(Row("saved", saved_percent(a, one.name), saved_percent(b, one.name), "percent"))
    return Section(one.name, tuple(rows), judged=one.name != "plain")


def _stats(a: Record, b: Record) -> Section:
    one, other = a.stats, b.stats
    rows = [
        Row("plain autograd would hold", one.packed_bytes, other.packed_bytes, "bytes", judged=False),
        Row("held at most", one.peak_held_bytes, other.peak_held_bytes, "bytes"),
        Row("saved", saved_percent(a), saved_percent(b), "percent"),
        Row("worst reconstruction error", float(one.worst_error), float(other.worst_error), "error"),
        Row("block calls", one.frames, other.frames, "count"),
        Row("inverted", one.inversions, other.inversions, "count"),
        Row("replayed", one.replays, other.replays, "count"),
        Row("second evaluations", one.second_evaluations, other.second_evaluations, "count"),
    ]
    if one.peak_offloaded_bytes or other.peak_offloaded_bytes:
        rows.insert(2, Row("in host memory at most", one.peak_offloaded_bytes, other.peak_offloaded_bytes, "bytes"))
    if a.steps and b.steps:
        rows.append(Row("steps", a.steps[-1].step, b.steps[-1].step, "count"))
        rows.append(Row("time a step", a.ns_a_step, b.ns_a_step, "time"))
    return Section("run", tuple(rows))


def _fits(a: Record, b: Record) -> Iterator[Row]:
    others = {(fit.name, fit.keyword, fit.limit_bytes): fit for fit in b.fits}
    for fit in a.fits:
        if other := others.get((fit.name, fit.keyword, fit.limit_bytes)):
            name = f"{fit.keyword}, {fit.name}, {human_bytes(fit.limit_bytes)}"
            yield Row(name, fit.largest, other.largest, "count")


def _modules(a: Record, b: Record) -> list[Row]:
    """The modules whose held bytes differ most."""
    before = {row.path: row.held_bytes for row in a.modules}
    after = {row.path: row.held_bytes for row in b.modules}
    if not before or not after:
        return []
    paths = [path for path in {**before, **after} if before.get(path, 0) != after.get(path, 0)]
    paths.sort(key=lambda path: -abs(after.get(path, 0) - before.get(path, 0)))
    return [Row(path or "(the model)", before.get(path), after.get(path), "bytes") for path in paths[:_MODULES]]


def regressions(a: Record, b: Record, tolerance: float, time_tolerance: float | None = None) -> list[str]:
    """What is worse in ``b``, a line each.

    Bytes of a choice or a run that are more than ``tolerance`` percent over those in ``a``; errors that are ten times as large
    and above 1e-6; a choice that could be measured in ``a`` only; with ``time_tolerance`` a step time over plain's that is so
    many percent longer. What plain autograd holds is not judged: it is the model's.
    """
    worse = []
    for one in a.choices:
        other = b.choice(one.name)
        if not one.problem and (other is None or other.problem):
            worse.append(f"{one.name}: {other.problem if other is not None else 'not in b'}")
    for section in sections(a, b):
        rows = [row for row in section.rows if section.judged and _is_worse(row, tolerance, time_tolerance)]
        worse += [f"{section.name}: {row.name} {row.cell(row.a)} -> {row.cell(row.b)} ({row.change})" for row in rows]
    return worse


def _is_worse(row: Row, tolerance: float, time_tolerance: float | None) -> bool:
    if row.a is None or row.b is None or not row.judged:
        return False
    if row.unit == "error":
        return row.b > max(_ERRORS * row.a, _ROUNDING)
    limit = {"bytes": tolerance, "ratio": time_tolerance}.get(row.unit)
    return limit is not None and row.b > row.a * (1 + limit / 100)


def render(a: Record, b: Record, names: tuple[str, str] = ("a", "b")) -> RenderableType:
    """Both records, figure by figure."""
    head = [Text(f"{letter}: {name}{_what(record)}") for letter, name, record in zip("ab", names, (a, b), strict=True)]
    notes = [Text(note) for note in _notes(a, b)]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", overflow="fold")
    for name in ("a", "b", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    for index, section in enumerate(sections(a, b)):
        if index:
            table.add_row()
        table.add_row(Text(section.name, style="bold"))
        for row in section.rows:
            table.add_row(f"  {row.name}", row.cell(row.a), row.cell(row.b), row.change)
    return Group(*head, *notes, table)


def _what(record: Record) -> str:
    return f" ({record.kind} of {record.target}; {record.device}, torch {record.torch})"


def _notes(a: Record, b: Record) -> Iterator[str]:
    """What makes figures hard to compare."""
    for name in ("kind", "target", "device", "torch"):
        one, other = getattr(a, name), getattr(b, name)
        if one != other:
            yield f"note: of different {name}s: {one}, {other}" if name != "torch" else f"note: of torch {one} and {other}"
    for here, there, letter in ((a, b, "a"), (b, a, "b")):
        missing = [choice.name for choice in here.choices if there.choice(choice.name) is None]
        if missing and there.choices:
            yield f"note: in {letter} only: {', '.join(missing)}"
