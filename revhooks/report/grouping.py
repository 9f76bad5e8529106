"""Rows that are alike in one: a model repeats its layers, and a report need not."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..record import Kept, ModuleRow

__all__ = ["Group", "compact", "grouped", "nothing_held", "reasons", "rows_of_kept"]

_NUMBER = re.compile(r"(?<![^. ])(\d+)(?![^. ])")  # a component of a path, or a word, that is a number
_LABEL = re.compile(r"(.*) \((\w+)\)")


@dataclass(frozen=True, slots=True)
class Group:
    """Modules of one type and with one reason, whose paths differ in numbers only.

    Attributes:
        path: their paths in one, as ``h.0-3.mlp``.
        count: how many they are.
        total: their sums, and the worst of their errors, under that path.
    """

    path: str
    count: int
    total: ModuleRow

    @property
    def label(self) -> str:
        """How a table calls it.

        Example:
            >>> grouped([ModuleRow("h.0", "Block", 4, 2), ModuleRow("h.1", "Block", 4, 2)])[0].label
            'h.0-1 x2'
        """
        path = self.path or "(model and loss)"
        return path if self.count == 1 else f"{path} x{self.count}"


def grouped(rows: Iterable[ModuleRow]) -> list[Group]:
    """Rows that are alike in one each: those that hold most first, then those that saved most in plain autograd.

    Example:
        >>> rows = [ModuleRow(f"h.{i}.mlp", "MLP", 10, 4) for i in (0, 1, 2, 5)] + [ModuleRow("", "GPT", 9, 7)]
        >>> [(group.label, group.total.held_bytes) for group in grouped(rows)]
        [('h.0-2,5.mlp x4', 16), ('(model and loss)', 7)]
    """
    alike: dict[tuple[str, str, str, str], list[ModuleRow]] = {}
    for row in rows:
        alike.setdefault((_NUMBER.sub("#", row.path), row.type, row.why, row.remedy), []).append(row)
    groups = [_merged(same) for same in alike.values()]
    return sorted(groups, key=lambda group: (-group.total.held_bytes, -group.total.saved_plain_bytes))


def _merged(rows: Sequence[ModuleRow]) -> Group:
    columns = zip(*(_NUMBER.split(row.path) for row in rows), strict=True)
    path = "".join(part[0] if i % 2 == 0 else compact(map(int, part)) for i, part in enumerate(columns))
    total = ModuleRow(
        path,
        rows[0].type,
        sum(row.saved_plain_bytes for row in rows),
        sum(row.held_bytes for row in rows),
        rows[0].why,
        rows[0].remedy,
        sum(row.calls for row in rows),
        sum(row.rebuilds for row in rows),
        sum(row.rebuild_ns for row in rows),
        max(row.error for row in rows),
    )
    return Group(path, len(rows), total)


def compact(numbers: Iterable[int]) -> str:
    """Numbers as ranges.

    Example:
        >>> compact([0, 1, 2, 5]), compact([7])
        ('0-2,5', '7')
    """
    runs = itertools.groupby(enumerate(sorted(set(numbers))), key=lambda pair: pair[1] - pair[0])
    ends = [(run[0][1], run[-1][1]) for run in (list(members) for _, members in runs)]
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in ends)


def nothing_held(groups: Iterable[Group]) -> str:
    """One line for all that hold nothing; empty where there are none.

    Args:
        groups: those that hold nothing.

    Example:
        >>> nothing_held(grouped([ModuleRow(f"h.{i}", "Block", 2**20, 0, "reconstructed by inversion") for i in range(4)]))
        '4 modules hold nothing: reconstructed by inversion'
    """
    counts: dict[str, int] = {}
    for group in groups:
        counts[group.total.why] = counts.get(group.total.why, 0) + group.count
    if not counts:
        return ""
    number = sum(counts.values())
    said = f"{number:,} {'module holds' if number == 1 else 'modules hold'} nothing"
    most_first = sorted(((why, count) for why, count in counts.items() if why), key=lambda item: -item[1])
    named = [f"{count:,} {why}" if count < number else why for why, count in most_first]
    return f"{said}: {', '.join(named)}" if named else said


def reasons(groups: Iterable[Group]) -> dict[tuple[str, str], tuple[int, str]]:
    """The reasons of groups, by why and remedy: each with a number, for a column, and as a sentence.

    Example:
        >>> rows = [ModuleRow("", "GPT", 2, 2, "saved outside", "an inverse"), ModuleRow("h", "Block", 1, 1, "small", "nothing")]
        >>> for number, sentence in reasons(grouped(rows)).values():
        ...     print(number, sentence)
        1 saved outside. What would remove it: an inverse
        2 small. Nothing removes it
    """
    found: dict[tuple[str, str], tuple[int, str]] = {}
    for why, remedy in ((group.total.why, group.total.remedy) for group in groups):
        if why and (why, remedy) not in found:
            found[why, remedy] = (len(found) + 1, f"{why}. {_removal(remedy)}" if remedy else why)
    return found


def _removal(remedy: str) -> str:
    if remedy.startswith("nothing"):
        return "Nothing removes it" + remedy.removeprefix("nothing")
    return f"What would remove it: {remedy}"


def rows_of_kept(kept: Iterable[Kept]) -> list[ModuleRow]:
    """What is held, as rows of modules, where nobody told them apart.

    Example:
        >>> rows_of_kept([Kept("anchor", "h.3 (Coupling)", 8)])[0].path
        'h.3'
    """
    rows = []
    for one in kept:
        label = _LABEL.fullmatch(one.what)
        path, kind = label.groups() if label else (one.what, one.op)
        rows.append(ModuleRow(path, kind, 0, one.bytes, one.why, one.remedy))
    return rows
