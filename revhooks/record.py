"""The numbers of a run: dataclasses and JSON, standard library only.

``run.stats`` of a context is a `Stats`; a report is a `Report` that holds the `Stats` of its reversible
step. Bytes, counts and nanoseconds are integers; only relative errors are floats.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["SCHEMA_VERSION", "Kept", "ModuleRow", "Report", "Stats", "Step", "WorstError", "human_bytes"]

SCHEMA_VERSION = 2


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


@dataclass(frozen=True, slots=True)
class Step:
    """The measured figures of one training step.

    Attributes:
        saved_bytes: bytes held for backward after forward (unique storages, leaves not counted).
        accounted_peak_bytes: peak of all tensors made during the step, by unique storage.
        measured_peak_bytes: peak over the state before the step, as the CUDA allocator or the
            process's resident set saw it; ``how`` says which. ``None`` where it was not measured.
        how: ``"cuda allocator"``, ``"resident set, fresh process"`` or ``"not measured"``.
        step_ns: median time of a step, in nanoseconds.
        timeline: accounted bytes in the course of the step, evenly sampled.
    """

    saved_bytes: int
    accounted_peak_bytes: int
    measured_peak_bytes: int | None
    how: str
    step_ns: int
    timeline: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ModuleRow:
    """What one module saved and what is left of it under ``reversible()``.

    Attributes:
        path: the module's path; ``""`` is the model itself and what its callers saved.
        type: the class's name.
        saved_plain_bytes: unique storages that its own ops saved in plain autograd.
        held_bytes: what is still held of it after forward.
        why: why, or what was done instead.
    """

    path: str
    type: str
    saved_plain_bytes: int
    held_bytes: int
    why: str


@dataclass(frozen=True, slots=True)
class Report:
    """A step in plain autograd and one under ``reversible()``, side by side."""

    target: str
    device: str
    torch: str
    plain: Step
    reversible: Step
    step_time_ratio_permille: int
    worst_reconstruction_error: float
    worst_block: str
    worst_gradient_error: float
    stats: Stats
    modules: tuple[ModuleRow, ...] = ()
    schema_version: int = SCHEMA_VERSION

    def with_peaks(self, peaks: dict[str, int]) -> Report:
        """The same with peaks of the resident set, by ``"plain"`` and ``"reversible"``, that fresh processes measured."""
        how = "resident set, fresh process"
        steps = {
            name: dataclasses.replace(getattr(self, name), measured_peak_bytes=peak, how=how) for name, peak in peaks.items()
        }
        return dataclasses.replace(self, **steps)

    def to_json(self) -> str:
        """The report as JSON; bytes, counts and times are integers."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def save(self, path: str | Path) -> None:
        """Write the report to ``path`` as JSON."""
        Path(path).write_text(self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read a report that `save` wrote.

        Raises:
            ValueError: the file has another schema version.
        """
        data: dict[str, Any] = json.loads(Path(path).read_text())
        version = data.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"{path}: expected schema version {SCHEMA_VERSION}, got {version}. "
                "Remedy: write the report again with this version of revhooks."
            )
        for name in ("plain", "reversible"):
            data[name]["timeline"] = tuple(data[name]["timeline"])
            data[name] = Step(**data[name])
        stats = data["stats"]
        stats["worst_error"] = WorstError(stats["worst_error"], data["worst_block"])
        stats["kept"] = tuple(Kept(**kept) for kept in stats["kept"])
        data["stats"] = Stats(**stats)
        data["modules"] = tuple(ModuleRow(**row) for row in data["modules"])
        return cls(**data)
