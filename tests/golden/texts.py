"""Every record as every width of a terminal shows it, without colour."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from revhooks.checking.drift import Drift
from revhooks.checking.result import CheckResult
from revhooks.cli.demo import _table
from revhooks.record import Record
from revhooks.report.tables import render
from tests.golden.records import RECORDS

FOLDER = Path(__file__).parent
WIDTHS = (80, 100)


def shown(record: Record, width: int) -> str:
    """What a terminal of this width shows, without blanks at the ends of lines."""
    return printed(render(record), width)


def printed(what: Any, width: int) -> str:
    """The same of anything that can be printed."""
    console = Console(width=width, no_color=True, force_terminal=False, file=io.StringIO())
    console.print(what)
    return "".join(f"{line.rstrip()}\n" for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]


def checks() -> dict[str, str]:
    """What `check` prints, which is of at most 80 columns everywhere: of a GPT, a RevNet, and a model that is not well."""
    mib = 1 << 20
    ordinary = CheckResult(
        "GPT", None, 0.0, gradients_equal=True, packed_bytes=149 * mib, held_bytes=94 * mib, under="reversible(replay=Block)"
    )
    drift = Drift("block", ((1, 9.6e-8), (2, 1.4e-7), (4, 2.9e-7), (8, 6.1e-7)), 1.3)
    calls = {f"{index}.{name}": 2 for index in range(8) for name in "fg"}
    chain = CheckResult(
        "RevNet", 6.1e-7, 3.4e-6, calls, gradients_equal=False, drift=drift, packed_bytes=64 * mib, held_bytes=5 * mib
    )
    wrong = CheckResult(
        "Net",
        0.21,
        0.5,
        {"f": 3},
        deterministic=False,
        problems=(
            "two steps from the same state differ, first in h.0.drop (Dropout). Remedy: draw from torch's generators",
            "gradients differ by 0.5 (relative) from those of plain autograd. Remedy: exclude the block with keep=",
        ),
        outputs_equal=False,
        buffers=("norm.running_mean", "norm.running_var"),
        generators=("torch",),
        packed_bytes=64 * mib,
        held_bytes=64 * mib,
    )
    return {f"check_{name}.txt": f"{result}\n" for name, result in (("ordinary", ordinary), ("chain", chain), ("wrong", wrong))}


def demos() -> dict[str, str]:
    """The first table of the demo."""
    plain = SimpleNamespace(times=[140_000_000, 145_000_000, 150_000_000])
    rev = SimpleNamespace(times=[196_000_000, 203_000_000, 225_000_000], packed=66 << 20, held=22 << 20, worst=1.2e-6)
    return {f"demo_{width}.txt": printed(_table(plain, rev, [0.925, 0.931]), width) for width in WIDTHS}  # type: ignore[arg-type]


def texts() -> dict[str, str]:
    """All of them, by the name of their file."""
    records = {f"{name}_{width}.txt": shown(make(), width) for name, make in RECORDS.items() for width in WIDTHS}
    return {**records, **checks(), **demos()}
