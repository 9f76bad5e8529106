"""The columns of the what-if table, and which cell is the best of its column."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..record import Choice, Fit, Record, human_bytes

__all__ = ["LEGEND", "NOT_TOLD", "Cell", "Column", "cells", "columns", "is_plain", "largest"]

NOT_TOLD = "-"
LEGEND = "* the best of its column; plain's own time and errors are no contest"
_Value = float | None


@dataclass(frozen=True, slots=True)
class Column:
    """One figure of a `Choice`.

    Attributes:
        title: its heading, in lines.
        value: the figure; ``None`` where there is none.
        text: how it is written.
        plain_competes: whether plain may be the best: its time and its errors are what others are compared with.
    """

    title: str
    value: Callable[[Choice], _Value]
    text: Callable[[float], str]
    plain_competes: bool = True


@dataclass(frozen=True, slots=True)
class Cell:
    """A figure as it is shown, and whether no other of its column is better."""

    text: str
    value: _Value
    best: bool

    @property
    def marked(self) -> str:
        """With its mark, or a blank in the place of one."""
        return f"{self.text}*" if self.best else f"{self.text} "


def is_plain(choice: Choice) -> bool:
    """Whether it is plain autograd, which the others are compared with."""
    return choice.name == "plain"


def columns(record: Record) -> tuple[Column, ...]:
    """What a record tells of each of its choices: a measured peak where one was measured, no time or error of a prediction."""
    measured = any(choice.measured_peak_bytes is not None for choice in record.choices)
    accounted = "predicted" if record.kind == "prediction" else "accounted"
    shown = [
        Column("held for\nbackward", lambda choice: choice.saved_bytes, human_bytes),
        Column(f"peak,\n{accounted}", lambda choice: choice.accounted_peak_bytes, human_bytes),
    ]
    if measured:
        shown.append(Column("peak,\nmeasured", lambda choice: choice.measured_peak_bytes, human_bytes))
    if record.kind != "prediction":
        base = next((choice.name for choice in record.choices if not choice.problem), "plain")
        shown += [
            Column(f"time /\n{base}", lambda choice: choice.time_permille / 1000, "{:.2f}".format, plain_competes=False),
            Column("inversion\nerror", _unless_plain(lambda choice: choice.reconstruction_error), _error, plain_competes=False),
            Column("gradient\nerror", _unless_plain(lambda choice: choice.gradient_error), _error, plain_competes=False),
        ]
    return tuple(shown)


def _unless_plain(value: Callable[[Choice], _Value]) -> Callable[[Choice], _Value]:
    return lambda choice: None if is_plain(choice) else value(choice)


def _error(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def cells(column: Column, choices: Sequence[Choice]) -> list[Cell]:
    """The column's cells, one a choice. What reads the same as the best is marked as well; where all do, none is.

    Example:
        >>> held = Column("held", lambda choice: choice.saved_bytes, human_bytes)
        >>> [cell.best for cell in cells(held, [Choice("plain", saved_bytes=9), Choice("reversible()", saved_bytes=3)])]
        [False, True]
    """
    values = [None if choice.problem else column.value(choice) for choice in choices]
    texts = [NOT_TOLD if value is None else column.text(value) for value in values]
    compete = [
        (value, text)
        for choice, value, text in zip(choices, values, texts, strict=True)
        if value is not None and (column.plain_competes or not is_plain(choice))
    ]
    best = min(compete)[1] if len({text for _, text in compete}) > 1 else None
    return [
        Cell(text, value, text == best and (column.plain_competes or not is_plain(choice)))
        for choice, value, text in zip(choices, values, texts, strict=True)
    ]


def largest(fits: Sequence[Fit]) -> list[Cell]:
    """The largest size that each way has room for; here the largest is the best.

    Example:
        >>> [cell.marked for cell in largest([Fit("plain", "batch", 80, 8, 77), Fit("reversible()", "batch", 80, 13, 78)])]
        ['8 ', '13*']
    """
    most = max(fit.largest for fit in fits)
    contest = any(fit.largest != most for fit in fits)
    return [Cell(f"{fit.largest:,}" if fit.largest else "none", fit.largest, contest and fit.largest == most) for fit in fits]
