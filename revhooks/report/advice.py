"""What to do, in a sentence or two: the answer that a report begins with."""

from __future__ import annotations

from ..record import Choice, Fit, Record, human_bytes
from .columns import is_plain

__all__ = ["advice", "suggestion"]

NOTICEABLE = 0.1  # of a peak: what is worth a change of code
ALIKE = 0.05  # of a peak or of a time: what nobody would tell apart
SUSPECT = 0.05  # a relative error of gradients that rounding does not explain


def advice(record: Record) -> str:
    """The answer that a record gives, in a sentence or two; a line with what to write follows where there is something to write.

    It compares accounted peaks (predicted ones of a prediction) and never measured ones with them. A way is worth naming when it
    lowers the peak by a tenth against what is used; of those the cheapest is named among the ones with the lowest peak.

    Args:
        record: of any kind.

    Example:
        >>> plain = Choice("plain", saved_bytes=2**20, accounted_peak_bytes=2**21)
        >>> rev = Choice("reversible()", saved_bytes=2**19, accounted_peak_bytes=2**20, time_permille=1100)
        >>> advice(Record("report", "net", "cpu", "2.13.0", (plain, rev)))
        "reversible() saved 512.0 KiB of 1.0 MiB (50%) at 1.10 of plain's time. Keep using it; nothing else was measured."
    """
    match record.kind:
        case "run" | "profile":
            return _of_steps(record)
        case "prediction":
            return _of_prediction(record)
    plain, current = record.choice("plain"), record.choice("reversible()")
    if plain is None:
        return "There is nothing to compare with: plain autograd was not measured."
    if plain.problem:
        return _without_plain(record, plain)
    if len(record.choices) == 1:
        return f"Nothing but plain autograd was measured: its peak is {_peak(plain)}."
    said = [_saved(plain, current)] if current is not None else []
    used, best = _used(record, plain), suggestion(record)
    between = None if best is None else _between(record, used, best)
    said.append(_verdict(record, used, best))
    if between is not None:
        said.append(f"Between them, {between.name} takes it to {_peak(between)} for {_time(between)}.")
    rival = _rival(record, best or used)
    if rival is not None and rival is not between:
        said.append(f"{rival.name} alone would do as well: {_peak(rival)} for {_time(rival)}.")
    return " ".join(said) + (f"\nWrite: {best.code}" if best is not None and best.code else "")


def _without_plain(record: Record, plain: Choice) -> str:
    """What to take where plain autograd cannot take the step at all: the fastest way, and the one with the lowest peak."""
    said = f"Plain autograd cannot take this step: {plain.problem.rstrip('.')}."
    tried = _tried(record)
    if not tried:
        return f"{said} No other way that was tried can."
    fast = min(tried, key=lambda choice: (choice.time_permille, choice.accounted_peak_bytes))
    low = min(tried, key=lambda choice: (choice.accounted_peak_bytes, choice.time_permille))
    said += f" {fast.name} takes it with a peak of {_peak(fast)}"
    if _lowers(low, fast):
        said += f"; {low.name} needs the least, {_peak(low)}, for {low.time_permille / fast.time_permille:.2f} of the time"
    else:
        low = fast
    return f"{said}." + (f"\nWrite: {low.code}" if low.code else "")


def suggestion(record: Record) -> Choice | None:
    """The way to take instead of what is used: the lowest peak, and the cheapest of those that come close to it.

    What is used is ``reversible()`` where that lowers plain's peak, and else plain. ``None`` where no other way is noticeably
    better: neither lower, nor as low and faster. A way whose gradients are not plain's is never suggested.

    Args:
        record: with plain among its choices.
    """
    plain = record.choice("plain")
    if plain is None or plain.problem:
        return None
    used = _used(record, plain)
    others = [choice for choice in _tried(record) if choice.name not in ("plain", "reversible()")]
    lower = [choice for choice in others if _lowers(choice, used)]
    if lower:
        lowest = min(choice.accounted_peak_bytes for choice in lower)
        close = [choice for choice in lower if choice.accounted_peak_bytes <= lowest * (1 + ALIKE)]
        fastest = min(choice.time_permille for choice in close)
        return min(
            (choice for choice in close if choice.time_permille <= fastest * (1 + ALIKE / 2)),
            key=lambda choice: (_is_checkpoint(choice), choice.accounted_peak_bytes, choice.time_permille),
        )
    faster = [
        choice
        for choice in others
        if choice.accounted_peak_bytes <= used.accounted_peak_bytes and choice.time_permille < used.time_permille * (1 - ALIKE)
    ]
    return min(faster, key=lambda choice: choice.time_permille, default=None) if used is not plain else None


# -- sentences


def _saved(plain: Choice, current: Choice) -> str:
    """What ``reversible()`` did."""
    if current.problem:
        return f"{current.name} could not be measured: {current.problem.rstrip('.')}."
    saved = plain.saved_bytes - current.saved_bytes
    if saved <= 0:
        what = f"saved nothing of {human_bytes(plain.saved_bytes)}"
    else:
        what = f"saved {human_bytes(saved)} of {human_bytes(plain.saved_bytes)} ({saved / plain.saved_bytes:.0%})"
    if not _is_sound(current):
        what += f", but its gradients differ from plain's by {current.gradient_error:.0%}: revhooks check shows where"
        return f"{current.name} {what}."
    return f"{current.name} {what} at {_time(current)}."


def _verdict(record: Record, used: Choice, best: Choice | None) -> str:
    """Which way to take."""
    if is_plain(used):
        if best is None:
            what = "that was tried" if all(map(_is_sound, record.choices)) else "whose gradients are right"
            return f"Stay with plain autograd: nothing {what} lowers its peak of {_peak(used)} noticeably."
        return f"It is {best.name} that lowers the peak, {_from_to(used, best)}."
    if best is not None:
        return f"Keep using it, or: {best.name} would {_change(used, best)}."
    if len(_tried(record)) > 2:
        return f"Keep using it: nothing else that was tried lowers its peak of {_peak(used)} noticeably."
    if len(record.choices) > 2:
        return "Keep using it; nothing else that was tried could be measured."
    return "Keep using it; nothing else was measured."


def _change(used: Choice, best: Choice) -> str:
    if _lowers(best, used):
        return f"take the peak {_from_to(used, best)}"
    return f"keep the peak at {_peak(best)} for {_time(best)}"


def _from_to(used: Choice, best: Choice) -> str:
    return f"from {_peak(used)} to {_peak(best)} for {_time(best)}"


def _between(record: Record, used: Choice, best: Choice) -> Choice | None:
    """A way that gives half of what the best gives for half of what that costs, or more for less."""
    gain, cost = used.accounted_peak_bytes - best.accounted_peak_bytes, best.time_permille - used.time_permille
    halves = [
        choice
        for choice in _tried(record)
        if gain > 0
        and _lowers(choice, used)
        and 2 * (used.accounted_peak_bytes - choice.accounted_peak_bytes) >= gain
        and 2 * (choice.time_permille - used.time_permille) <= cost
    ]
    if not halves or best in halves:
        return None
    return min(halves, key=lambda choice: (choice.accounted_peak_bytes, choice.time_permille))


def _rival(record: Record, best: Choice) -> Choice | None:
    """A way of checkpointing that is as low and as fast."""
    if _is_checkpoint(best) or is_plain(best):
        return None
    rivals = [
        choice
        for choice in _tried(record)
        if _is_checkpoint(choice)
        and choice.accounted_peak_bytes <= best.accounted_peak_bytes * (1 + ALIKE)
        and choice.time_permille <= best.time_permille * (1 + ALIKE / 2)
    ]
    return min(rivals, key=lambda choice: (choice.accounted_peak_bytes, choice.time_permille), default=None)


def _of_steps(record: Record) -> str:
    """What a run or a profiled step held of what plain autograd would have."""
    held, would = record.stats.peak_held_bytes, record.stats.packed_bytes
    if would and [choice.name for choice in record.choices] == ["plain"]:
        return f"Plain autograd held {human_bytes(held)} for backward at most; no step ran under reversible()."
    if not would and record.kind == "profile":
        return "Nothing was held for backward: no backward pass was seen, and no graph is left that one could take."
    if not would:
        return "Nothing was saved for backward: no step ran under reversible()."
    if held >= would:
        return f"Nothing was saved: {human_bytes(held)} were held at most, as in plain autograd."
    return (
        f"{human_bytes(would - held)} of {human_bytes(would)} ({(would - held) / would:.0%}) saved: at most {human_bytes(held)} "
        "were held for backward."
    )


def _of_prediction(record: Record) -> str:
    """Which way lowers the peak most, and what fits."""
    said = ["Predicted, nothing was allocated."]
    plain = record.choice("plain")
    tried = _tried(record)
    if plain is not None and not plain.problem and len(tried) > 1:
        best = min(tried, key=lambda choice: choice.accounted_peak_bytes)
        if _lowers(best, plain):
            said.append(f"{best.name} would take the peak of a step from {_peak(plain)} to {_peak(best)}.")
        else:
            said.append(f"No way that was tried would lower plain's peak of {_peak(plain)} noticeably.")
    if record.fits:
        most = max(record.fits, key=lambda fit: fit.largest)
        said.append(_fits(most, next((fit for fit in record.fits if fit.name == "plain" and fit is not most), None)))
    return " ".join(said)


def _fits(most: Fit, plain: Fit | None) -> str:
    limit = human_bytes(most.limit_bytes)
    if not most.largest:
        return f"Not even {most.keyword}=1 fits {limit}."
    against = "" if plain is None else f", against {plain.largest:,} in plain autograd"
    return f"Up to {most.keyword}={most.largest:,} fits {limit} with {most.name}{against}."


# -- words


def _tried(record: Record) -> list[Choice]:
    """What can be taken."""
    return [choice for choice in record.choices if not choice.problem and _is_sound(choice)]


def _used(record: Record, plain: Choice) -> Choice:
    """What there is to keep: ``reversible()`` if it lowers plain's peak, else plain."""
    current = record.choice("reversible()")
    return current if current is not None and current in _tried(record) and _lowers(current, plain) else plain


def _lowers(choice: Choice, than: Choice) -> bool:
    return choice.accounted_peak_bytes <= than.accounted_peak_bytes * (1 - NOTICEABLE)


def _is_checkpoint(choice: Choice) -> bool:
    return choice.name.startswith("checkpoint")


def _is_sound(choice: Choice) -> bool:
    """Whether its gradients are plain's, as far as that can be told."""
    return choice.gradient_error is None or choice.gradient_error <= SUSPECT


def _peak(choice: Choice) -> str:
    return human_bytes(choice.accounted_peak_bytes)


def _time(choice: Choice) -> str:
    """Its time; what was measured as faster than plain is so by noise, mostly."""
    ratio = choice.time_permille / 1000
    return "no more than plain's time" if ratio <= 1 else f"{ratio:.2f} of plain's time"
