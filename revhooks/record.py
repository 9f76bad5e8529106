"""The numbers of a run: dataclasses and JSON, standard library only.

``run.stats`` of a context is a `Stats`. A `Record` is what reports are made from: of a step taken in several ways (``revhooks
report``), of steps as they were taken (`revhooks.profile`), of a script (``revhooks run``), or predicted. Bytes, counts and
nanoseconds are integers; only relative errors are floats.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = [
    "CATEGORIES", "SCHEMA_VERSION", "Choice", "Fit", "Kept", "ModuleRow", "Record", "RunStep", "Slice", "Stats", "Timeline",
    "WorstError", "human_bytes", "together",
]  # fmt: skip

SCHEMA_VERSION = 3
CATEGORIES = ("parameters", "gradients", "optimizer", "held", "rebuilt", "temporary")


def human_bytes(nbytes: float) -> str:
    """Bytes for a screen, in powers of 1024.

    Example:
        >>> human_bytes(512), human_bytes(1536), human_bytes(3 * 2**20)
        ('512 B', '1.5 KiB', '3.0 MiB')
    """
    if abs(nbytes) < 1024:
        return f"{nbytes:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        nbytes /= 1024
        if abs(nbytes) < 1024 or unit == "GiB":
            break
    return f"{nbytes:.1f} {unit}"


class WorstError(float):
    """The largest relative reconstruction error of a run, and the block that had it.

    Example:
        >>> WorstError(1e-7, "block 3")
        WorstError(1e-07, block='block 3')
    """

    block: str

    def __new__(cls, error: float = 0.0, block: str = "") -> WorstError:
        """Make a float that remembers its block."""
        self = super().__new__(cls, error)
        self.block = block
        return self

    def __getnewargs__(self) -> tuple[float, str]:  # type: ignore[override]
        """Arguments for pickle and copy."""
        return float(self), self.block

    def __repr__(self) -> str:
        """Show the number and the block."""
        return f"WorstError({float(self)!r}, block={self.block!r})"


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes that are held for backward, and the reason.

    Attributes:
        why: what the memory is needed for.
        what: the block or the place that it belongs to.
        bytes: unique storage bytes.
        op: the operation that made it, where an ordinary layer saved it.
        remedy: what would remove it.
    """

    why: str
    what: str
    bytes: int
    op: str = ""
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Stats:
    """What a run did.

    Attributes:
        packed_bytes: the most bytes of unique storages that plain autograd would have held at once
            (parameters and other leaves not counted).
        held_bytes: bytes held for backward when the stats were read.
        peak_held_bytes: the most that was held at once.
        frames: block calls that were bracketed.
        inversions: block calls whose input was reconstructed by inversion.
        replays: block calls that were run forward again from kept tensors.
        second_evaluations: branch evaluations beyond one a branch that a rebuild had to pay.
        offloaded_bytes: bytes that waited in host memory when the stats were read (``offload=True``).
        peak_offloaded_bytes: the most that did at once.
        worst_error: largest relative error of a reconstruction, with ``.block``.
        kept: what is held now, largest first.
    """

    packed_bytes: int = 0
    held_bytes: int = 0
    peak_held_bytes: int = 0
    frames: int = 0
    inversions: int = 0
    replays: int = 0
    second_evaluations: int = 0
    offloaded_bytes: int = 0
    peak_offloaded_bytes: int = 0
    worst_error: WorstError = field(default_factory=WorstError)
    kept: tuple[Kept, ...] = ()


def together(one: Stats, other: Stats, peaks: Callable[[int, int], int] = max) -> Stats:
    """What two runs did; of neither what it holds.

    Args:
        one: the stats of one.
        other: those of the other.
        peaks: what becomes of two peaks: `max` where the runs are one after the other, a sum where one lies in the other.

    Example:
        >>> both = together(Stats(packed_bytes=3, frames=1), Stats(packed_bytes=5, frames=1))
        >>> both.packed_bytes, both.frames
        (5, 2)
    """
    return Stats(
        packed_bytes=peaks(one.packed_bytes, other.packed_bytes),
        peak_held_bytes=peaks(one.peak_held_bytes, other.peak_held_bytes),
        frames=one.frames + other.frames,
        inversions=one.inversions + other.inversions,
        replays=one.replays + other.replays,
        second_evaluations=one.second_evaluations + other.second_evaluations,
        peak_offloaded_bytes=peaks(one.peak_offloaded_bytes, other.peak_offloaded_bytes),
        worst_error=max(one.worst_error, other.worst_error),
    )


@dataclass(frozen=True, slots=True)
class Timeline:
    """Accounted bytes in the course of a step, by what they are for.

    A sample is the largest moment of its stretch of time, all categories at that moment; so the peak is among them.

    Attributes:
        ns: when each sample was taken, in nanoseconds since the step began.
        bytes: the bytes of each category at each sample; see `CATEGORIES`. ``held``: made in forward, and there when backward
            began; ``rebuilt``: made to stand for what was not held; ``temporary``: all other.
        phases: what began when: ``("forward", 0), ("backward", ...), ("optimizer", ...)``.
    """

    ns: tuple[int, ...] = ()
    bytes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    phases: tuple[tuple[str, int], ...] = ()

    @property
    def total(self) -> tuple[int, ...]:
        """The sum of all categories but parameters, gradients that were there before and optimizer state, at each sample.

        Example:
            >>> Timeline((0, 9), {"held": (1, 2), "temporary": (3, 4), "parameters": (9, 9)}).total
            (4, 6)
        """
        step = [self.bytes[name] for name in ("held", "rebuilt", "temporary") if name in self.bytes]
        return tuple(map(sum, zip(*step, strict=True)))


@dataclass(frozen=True, slots=True)
class Choice:
    """A step taken in one way, and what that took.

    Attributes:
        name: how tables call it: ``plain``, ``reversible()``, ``replay=GPT2Block``, ``budget=25%``, ``checkpoint GPT2Block`` ...
        code: what to write for it; empty where there is nothing to write.
        saved_bytes: what was held for backward when forward was over: unique storages, no leaves.
        accounted_peak_bytes: the most that all storages made in the step took at once.
        measured_peak_bytes: peak over the state before the step, as the CUDA allocator or the process's resident set saw it.
            ``None`` where it was not measured.
        how: ``"cuda allocator"``, ``"resident set, fresh process"``, ``"not measured"`` or ``"predicted"``.
        step_ns: median time of a step; 0 where it was predicted.
        time_permille: its time over plain's, a thousandth: the median of steps by turns.
        reconstruction_error: worst relative error of what was reconstructed.
        worst_block: the block that had it.
        gradient_error: largest relative L2 error of a parameter's gradient against plain's; ``None`` where it cannot be told.
        problem: why it could not be measured; all figures are 0 then.
        timeline: accounted bytes in the course of the step.
    """

    name: str
    code: str = ""
    saved_bytes: int = 0
    accounted_peak_bytes: int = 0
    measured_peak_bytes: int | None = None
    how: str = "not measured"
    step_ns: int = 0
    time_permille: int = 1000
    reconstruction_error: float = 0.0
    worst_block: str = ""
    gradient_error: float | None = None
    problem: str = ""
    timeline: Timeline = field(default_factory=Timeline)


@dataclass(frozen=True, slots=True)
class ModuleRow:
    """What one module saved, what is held of it under ``reversible()``, and what it took to rebuild it.

    Attributes:
        path: the module's path; ``""`` is the model itself and what its callers saved.
        type: the class's name.
        saved_plain_bytes: unique storages that its own operations saved, or would have saved, in plain autograd.
        held_bytes: what was held of it when backward began.
        why: why, or what was done instead.
        remedy: what would remove it.
        calls: how often it was called.
        rebuilds: how often it was rebuilt: inverted, or run again.
        rebuild_ns: time in which it was; of nested ones the outer includes the inner.
        error: worst relative error of what was reconstructed of it.
    """

    path: str
    type: str
    saved_plain_bytes: int
    held_bytes: int
    why: str = ""
    remedy: str = ""
    calls: int = 0
    rebuilds: int = 0
    rebuild_ns: int = 0
    error: float = 0.0


@dataclass(frozen=True, slots=True)
class Slice:
    """A stretch of time, for a trace.

    Attributes:
        name: a module's path (``""`` is the model itself), a block's label, ``backward`` or ``optimizer``.
        kind: ``forward``, ``backward``, ``rebuild`` or ``optimizer``.
        start_ns, stop_ns: since the measurement began.
    """

    name: str
    kind: str
    start_ns: int
    stop_ns: int


@dataclass(frozen=True, slots=True)
class RunStep:
    """A step of a script, as the summary of a run samples them.

    Attributes:
        step: its number, from 1.
        ns: when it ended, since the script began.
        packed_bytes: what plain autograd would have held at most up to then.
        peak_held_bytes: what was held at most up to then.
        error: worst relative error of a reconstruction up to then.
    """

    step: int
    ns: int
    packed_bytes: int
    peak_held_bytes: int
    error: float


@dataclass(frozen=True, slots=True)
class Fit:
    """The largest size that fits a memory.

    Attributes:
        name: the way of taking the step, as `Choice.name`.
        keyword: the argument of the target that was varied.
        limit_bytes: the memory.
        largest: the largest value that fits; 0 if not even 1 does.
        bytes: what it takes in all: parameters, gradients, optimizer state and the peak of the step.
    """

    name: str
    keyword: str
    limit_bytes: int
    largest: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Record:
    """What was measured of a step or of a run: what reports are made from.

    Attributes:
        kind: ``report``, ``profile``, ``run`` or ``prediction``.
        target: what was measured.
        device: its device, in words.
        torch: torch's version.
        choices: the step taken in several ways; the first is plain autograd, where that was measured.
        stats: of the reversible step, or of the run.
        modules: by module path, in order of the model; of ``reversible()``.
        slices: when which module ran, for a trace.
        steps: samples of a run's steps.
        parameter_bytes, gradient_bytes, optimizer_bytes: what lies beside the activations.
        optimizer: whose state that is; empty where there is none.
        fits: the largest sizes that fit a memory.
    """

    kind: str
    target: str
    device: str
    torch: str
    choices: tuple[Choice, ...] = ()
    stats: Stats = field(default_factory=Stats)
    modules: tuple[ModuleRow, ...] = ()
    slices: tuple[Slice, ...] = ()
    steps: tuple[RunStep, ...] = ()
    parameter_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    optimizer: str = ""
    fits: tuple[Fit, ...] = ()
    schema_version: int = SCHEMA_VERSION

    @property
    def ns_a_step(self) -> float | None:
        """Mean time of a step of a run, after the first; ``None`` where none was taken.

        Example:
            >>> steps = (RunStep(1, 900, 0, 0, 0.0), RunStep(5, 1700, 0, 0, 0.0))
            >>> Record("run", "train.py", "cpu", "2.13", steps=steps).ns_a_step
            200.0
        """
        if not self.steps:
            return None
        first, last = self.steps[0], self.steps[-1]
        return (last.ns - first.ns) / (last.step - first.step) if last.step > first.step else last.ns / max(1, last.step)

    def choice(self, name: str) -> Choice | None:
        """The way of this name."""
        return next((choice for choice in self.choices if choice.name == name), None)

    def to_json(self) -> str:
        """The record as JSON; bytes, counts and times are integers."""
        data = dataclasses.asdict(self)
        data["stats"]["worst_error"] = {"error": float(self.stats.worst_error), "block": self.stats.worst_error.block}
        return json.dumps(data, indent=1)

    def save(self, path: str | Path) -> None:
        """Write the record to ``path`` as JSON."""
        Path(path).write_text(self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Record:
        """Read a record that `save` wrote.

        Raises:
            ValueError: the file is no such record, or has another schema version.
        """
        expected = "a record of revhooks"
        try:
            data = json.loads(Path(path).read_text())
            if (version := data.get("schema_version")) == SCHEMA_VERSION:
                return typing.cast(Record, _read(cls, data))
            expected, got = f"schema version {SCHEMA_VERSION}", version
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            got = f"no JSON ({error})"
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            got = f"other JSON ({type(error).__name__}: {error})"
        raise ValueError(f"{path}: expected {expected}, got {got}. Remedy: write it again with this version of revhooks.")


def _read(kind: Any, data: Any) -> Any:
    """What `dataclasses.asdict` and JSON have made of something of this type, as it was."""
    if kind is WorstError:
        return WorstError(data["error"], data["block"])
    if dataclasses.is_dataclass(kind):
        types_of = typing.get_type_hints(kind)
        return kind(**{name: _read(types_of[name], value) for name, value in data.items()})  # type: ignore[operator]
    if isinstance(kind, types.UnionType):
        return data
    inner = typing.get_args(kind)
    match typing.get_origin(kind):
        case origin if origin is tuple and inner[-1] is Ellipsis:
            return tuple(_read(inner[0], item) for item in data)
        case origin if origin is tuple:
            return tuple(_read(one, item) for one, item in zip(inner, data, strict=True))
        case origin if origin is dict:
            return {key: _read(inner[1], item) for key, item in data.items()}
    return data
