"""Which of a record's choices are drawn."""

from __future__ import annotations

from ..record import Choice, Record
from .advice import suggestion

__all__ = ["pictured"]


def pictured(record: Record) -> list[Choice]:
    """The choices to draw: plain, ``reversible()`` and what is advised instead; without these, all.

    Args:
        record: with choices that have timelines, or none.
    """
    best = suggestion(record)
    wanted = [record.choice("plain"), record.choice("reversible()"), best]
    drawn = [choice for choice in wanted if choice is not None and any(choice.timeline.total)]
    return drawn or [choice for choice in record.choices if any(choice.timeline.total)]
