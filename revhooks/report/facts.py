"""Figures of a record that stand by themselves, each with its name."""

from __future__ import annotations

from ..record import Record, human_bytes

__all__ = ["beside", "facts", "milliseconds", "where"]


def where(record: Record) -> str:
    """The machine, in words."""
    return f"{record.device}, torch {record.torch}"


def milliseconds(ns: float) -> str:
    """A time for a screen.

    Example:
        >>> milliseconds(1_234_000), milliseconds(25_600_000_000)
        ('1.2 ms', '25.6 s')
    """
    return f"{ns / 1e6:.1f} ms" if abs(ns) < 1e10 else f"{ns / 1e9:.1f} s"


def facts(record: Record) -> list[tuple[str, str]]:
    """What was done: steps, what was held, block calls, the worst error. Nothing of it is repeated elsewhere in the report.

    Args:
        record: of any kind; a prediction has none.
    """
    stats = record.stats
    found: list[tuple[str, str]] = []
    if record.steps:
        found.append(("steps", _steps(record)))
    if record.kind in ("run", "profile"):
        found.append(("plain autograd would have held", human_bytes(stats.packed_bytes)))
        found.append(("held for backward at most", human_bytes(stats.peak_held_bytes)))
    if stats.peak_offloaded_bytes:
        found.append(("in host memory at most", human_bytes(stats.peak_offloaded_bytes)))
    if record.kind == "profile":
        found += _measured(record)
    if stats.frames:
        calls = f"{stats.frames:,}: {stats.inversions:,} inverted, {stats.replays:,} run again"
        if stats.second_evaluations:
            calls += f", with {stats.second_evaluations:,} evaluations of a branch too many"
        found.append(("block calls", calls))
    if stats.worst_error > 0:
        block = f" in {stats.worst_error.block}" if stats.worst_error.block else ""
        found.append(("worst reconstruction error", f"{float(stats.worst_error):.1e}{block}"))
    elif stats.inversions:
        found.append(("worst reconstruction error", "0: all exact"))
    return found


def beside(record: Record) -> list[tuple[str, str]]:
    """What lies in memory beside the activations, as far as it is known."""
    optimizer = f"optimizer state ({record.optimizer})" if record.optimizer else "optimizer state"
    sizes = (("parameters", record.parameter_bytes), ("gradients", record.gradient_bytes), (optimizer, record.optimizer_bytes))
    return [(name, human_bytes(nbytes)) for name, nbytes in sizes if nbytes]


def _steps(record: Record) -> str:
    count, each = record.steps[-1].step, record.ns_a_step
    return f"{count:,}" if each is None or len(record.steps) < 2 else f"{count:,}, {milliseconds(each)} each"


def _measured(record: Record) -> list[tuple[str, str]]:
    """Peaks of the steps that were profiled: the accounted, and the measured in a line of its own."""
    found = []
    for choice in record.choices:
        if choice.accounted_peak_bytes:
            found.append(("peak, accounted", human_bytes(choice.accounted_peak_bytes)))
        if choice.measured_peak_bytes is not None:
            found.append((f"peak, measured ({choice.how})", human_bytes(choice.measured_peak_bytes)))
    return found
