"""Reports for a terminal: tables of a record. Needs rich and the record only."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..record import Report, Step, human_bytes
from .timeline import timeline

__all__ = ["render", "summary_table"]


def render(report: Report, *, rows: int = 30) -> RenderableType:
    """The whole report: summary, picture, and a table by module path.

    Args:
        report: what to show.
        rows: the most modules to list; the rest is summed up.
    """
    picture = timeline({"plain": report.plain.timeline, "reversible": report.reversible.timeline})
    parts: list[RenderableType] = [summary_table(report)]
    if report.plain.timeline:
        parts += [Text("\nmemory over the step (accounted bytes)"), Text(picture)]
    if report.modules:
        parts += [Text(""), _module_table(report, rows)]
    return Group(*parts)


def summary_table(report: Report) -> Table:
    """Plain against reversible, accounted bytes and measured peak in rows of their own."""
    table = Table(title=report.target or None, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("")
    for name in ("plain", "reversible", "ratio"):
        table.add_column(name, justify="right")
    plain, rev = report.plain, report.reversible
    table.add_row("saved for backward / held", *_pair(plain.saved_bytes, rev.saved_bytes))
    table.add_row("accounted peak of the step", *_pair(plain.accounted_peak_bytes, rev.accounted_peak_bytes))
    table.add_row(f"measured peak ({plain.how})", *_measured(plain, rev))
    ratio = report.step_time_ratio_permille / 1000
    table.add_row("step time", f"{plain.step_ns / 1e6:.1f} ms", f"{rev.step_ns / 1e6:.1f} ms", f"{ratio:.2f}")
    where = f"  {report.worst_block}" if report.worst_block else ""
    table.add_row("worst reconstruction error", "-", f"{report.worst_reconstruction_error:.1e}", "")
    table.add_row("worst gradient error", "-", f"{report.worst_gradient_error:.1e}", "")
    stats = report.stats
    table.caption = (
        f"{stats.frames} block calls, {stats.inversions} inverted, {stats.replays} replayed"
        + (f"; worst reconstruction:{where}" if where else "")
        + f"\n{report.device}, torch {report.torch}"
    )
    table.caption_justify = "left"
    return table


def _pair(plain: int, rev: int) -> tuple[str, str, str]:
    return human_bytes(plain), human_bytes(rev), f"{rev / plain:.2f}" if plain else "-"


def _measured(plain: Step, rev: Step) -> tuple[str, str, str]:
    if plain.measured_peak_bytes is None or rev.measured_peak_bytes is None:
        return "-", "-", "-"
    return _pair(plain.measured_peak_bytes, rev.measured_peak_bytes)


def _module_table(report: Report, rows: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("module", overflow="fold")
    table.add_column("type", overflow="fold")
    table.add_column("saved plain", justify="right", no_wrap=True)
    table.add_column("held", justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for row in report.modules[:rows]:
        path = row.path or "(model and loss)"
        table.add_row(path, row.type, human_bytes(row.saved_plain_bytes), human_bytes(row.held_bytes), row.why)
    rest = report.modules[rows:]
    if rest:
        saved, held = sum(r.saved_plain_bytes for r in rest), sum(r.held_bytes for r in rest)
        table.add_row(f"... {len(rest)} more", "", human_bytes(saved), human_bytes(held), "")
    return table
