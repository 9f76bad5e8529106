"""A record as one page: the answer, the what-if table, the course of memory, the modules. It loads nothing from anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from ..record import Fit, ModuleRow, Record, human_bytes
from .advice import advice
from .columns import LEGEND, NOT_TOLD, Cell, cells, columns, largest
from .facts import beside, facts, milliseconds, where
from .grouping import Group, grouped, reasons, rows_of_kept
from .page import FRAGMENT_STYLE, PAGE, SCRIPT
from .svg import svg

__all__ = ["html"]


def html(record: Record, *, embedded: bool = False) -> str:
    """The page.

    Args:
        record: what to show, of any kind.
        embedded: give a fragment for a notebook's output, which takes over colours and fonts, instead of a whole document.

    Example:
        >>> page = html(Record("run", "train.py <1>", "cpu", "2.13.0"))
        >>> page.startswith("<!doctype html>"), "train.py &lt;1&gt;" in page
        (True, True)
    """
    title = escape(record.target or record.kind)
    parts = [f"<h2>{title}</h2><p class='rv-where'>{escape(where(record))}</p>", _answer(record)]
    parts += [*_what_if(record), *_fits(record), *_pictures(record), *_modules(record), *_facts(record)]
    fragment = f"<div class='revhooks'><style>{FRAGMENT_STYLE}</style>{''.join(parts)}<script>{SCRIPT}</script></div>"
    return fragment if embedded else PAGE.format(title=title, body=fragment)


def _answer(record: Record) -> str:
    said, _, code = advice(record).partition("\n")
    write = f"<pre>{escape(code.removeprefix('Write: '))}</pre>" if code else ""
    return f"<p class='rv-answer'>{escape(said)}</p>{write}"


def _what_if(record: Record) -> Iterator[str]:
    """Every choice in a row; one that could not be measured says why in the place of its figures."""
    if record.kind in ("run", "profile") or not record.choices:
        return
    shown = columns(record)
    table = [cells(column, record.choices) for column in shown]
    rows = []
    for i, choice in enumerate(record.choices):
        name = _cell(choice.name, choice.name)
        if choice.problem:
            rows.append(f"<tr>{name}<td colspan='{len(shown)}' class='rv-problem'>{escape(choice.problem)}</td></tr>")
            continue
        figures = (_number(cell[i].marked.strip(), cell[i].value, best=cell[i].best) for cell in table)
        rows.append(f"<tr>{name}{''.join(figures)}</tr>")
    title = "Predicted" if record.kind == "prediction" else "What if"
    hows = ", ".join(dict.fromkeys(choice.how for choice in record.choices if choice.measured_peak_bytes is not None))
    note = LEGEND if record.kind != "prediction" else "* the best of its column"
    note += f". Measured: {hows}; not to be compared with accounted bytes" if hows else ""
    yield _section(title, _table([_head("step"), *(_head(one.title, number=True) for one in shown)], rows), note)


def _fits(record: Record) -> Iterator[str]:
    for keyword, limit in dict.fromkeys((fit.keyword, fit.limit_bytes) for fit in record.fits):
        fits = [fit for fit in record.fits if (fit.keyword, fit.limit_bytes) == (keyword, limit)]
        rows = [_fit(fit, cell) for fit, cell in zip(fits, largest(fits), strict=True)]
        heads = (_head(heading, number=True) for heading in (f"largest {keyword}", "bytes in all", "of the limit"))
        yield _section(f"What fits {human_bytes(limit)}", _table([_head("step"), *heads], rows))


def _fit(fit: Fit, largest: Cell) -> str:
    share = fit.bytes / fit.limit_bytes
    figures = _number(largest.marked.strip(), fit.largest, best=largest.best) + _number(human_bytes(fit.bytes), fit.bytes)
    return f"<tr>{_cell(fit.name, fit.name)}{figures}{_number(f'{share:.0%}', share)}</tr>"


def _pictures(record: Record) -> Iterator[str]:
    """The pictures, of which a list shows one at a time."""
    timed = [choice.name for choice in record.choices if choice.timeline.ns]
    pictures = {name: svg(record, choice=name, standalone=False) for name in timed}
    if len(timed) > 1:
        pictures = {"compared": svg(record, standalone=False)} | pictures
    pictures = {name: picture for name, picture in pictures.items() if picture}
    if not pictures:
        return
    options = "".join(f"<option>{escape(name)}</option>" for name in pictures)
    pick = f"<label>show <select>{options}</select></label>" if len(pictures) > 1 else ""
    figures = "".join(
        f"<figure data-choice='{escape(name)}'{' hidden' if i else ''}>{picture}</figure>"
        for i, (name, picture) in enumerate(pictures.items())
    )
    kind = "Predicted" if record.kind == "prediction" else "Accounted"
    yield _section("Memory over the step", pick + figures, f"{kind} bytes; all pictures by category have one scale")


# -- modules


@dataclass(frozen=True, slots=True)
class _Figure:
    """A column of figures of modules."""

    title: str
    value: Callable[[ModuleRow], float]
    text: Callable[[float], str]

    def of(self, row: ModuleRow) -> str:
        """As it is shown."""
        value = self.value(row)
        return self.text(value) if value else NOT_TOLD


_FIGURES = (
    _Figure("calls", lambda row: row.calls, "{:,}".format),
    _Figure("plain", lambda row: row.saved_plain_bytes, human_bytes),
    _Figure("held", lambda row: row.held_bytes, human_bytes),
    _Figure("rebuilds", lambda row: row.rebuilds, "{:,}".format),
    _Figure("rebuild time", lambda row: row.rebuild_ns, milliseconds),
    _Figure("worst error", lambda row: row.error, "{:.1e}".format),
)


def _modules(record: Record) -> Iterator[str]:
    """Modules that are alike in one row, and below, on demand, each by itself."""
    rows = record.modules or rows_of_kept(record.stats.kept)
    if not rows:
        return
    groups = grouped(rows)
    headings = ["module", "type"] if record.modules else ["where", "what"]
    alone = [Group(row.path, 1, row) for row in rows]
    each = ""
    if len(alone) > len(groups):
        each = f"<details><summary>all {len(alone)} one by one</summary>{_module_table(headings, alone)}</details>"
    note = "faint: saved in plain autograd; solid: held" if record.modules else ""
    yield _section("Modules, and what is still held", _module_table(headings, groups) + each, note)


def _module_table(headings: Sequence[str], groups: Sequence[Group]) -> str:
    """The table, and under it the reasons that its last column has numbers for."""
    figures = [figure for figure in _FIGURES if any(figure.value(group.total) for group in groups)]
    largest = max(max(group.total.saved_plain_bytes, group.total.held_bytes) for group in groups) or 1
    why = reasons(groups)
    rows = []
    for group in groups:
        row = group.total
        number = why[row.why, row.remedy][0] if row.why else None
        names = f"{_cell(group.label, group.label)}{_cell(row.type, row.type)}"
        numbers = "".join(_number(figure.of(row), figure.value(row) or None) for figure in figures)
        rows.append(f"<tr>{names}{numbers}{_bar(row, largest)}{_number(str(number or ''), number)}</tr>")
    heads = [*map(_head, headings), *(_head(figure.title, number=True) for figure in figures), _head("bytes")]
    listed = "".join(f"<li>{escape(sentence)}</li>" for _, sentence in why.values())
    return f"{_table([*heads, _head('why', number=True)], rows)}<ol>{listed}</ol>"


def _bar(row: ModuleRow, largest: int) -> str:
    saved, held = (f"{100 * nbytes / largest:.1f}%" for nbytes in (row.saved_plain_bytes, row.held_bytes))
    return f"<td class='rv-bar' data-v='{row.held_bytes}'><i style='width:{saved}'></i><b style='width:{held}'></b></td>"


def _facts(record: Record) -> Iterator[str]:
    for title, pairs in (("Figures", facts(record)), ("Beside the activations", beside(record))):
        if pairs:
            listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in pairs)
            yield _section(title, f"<dl>{listed}</dl>")


# -- elements


def _section(title: str, body: str, note: str = "") -> str:
    below = f"<p class='rv-note'>{escape(note)}</p>" if note else ""
    return f"<section><h3>{escape(title)}</h3>{body}{below}</section>"


def _table(heads: Sequence[str], rows: Sequence[str]) -> str:
    return f"<div class='rv-wide'><table><thead><tr>{''.join(heads)}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def _head(text: str, *, number: bool = False) -> str:
    kind = " class='rv-number'" if number else ""
    return f"<th scope='col'{kind}><button type='button'>{escape(text)}</button></th>"


def _cell(text: str, value: str) -> str:
    return f"<td data-v='{escape(value)}'>{escape(text).replace('.', '.<wbr>')}</td>"


def _number(text: str, value: float | None, *, best: bool = False) -> str:
    kind = "rv-number rv-best" if best else "rv-number"
    return f"<td class='{kind}' data-v='{'' if value is None else value}'>{escape(text)}</td>"
