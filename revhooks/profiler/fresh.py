"""Measures the peak of the resident set of one step in a process of its own: ``python -m revhooks.profiler.fresh``."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from .meters import ResidentMeter
from .target import load_target, work_of
from .whatif import SETTLE, trials_of

__all__ = ["fresh_peak"]

# glibc gives freed memory back at once, so that the resident set follows what is in use
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
_MARK = "peak of the resident set: "


def fresh_peak(target: str, way: str, plain_bytes: int = 0, keywords: Mapping[str, Any] | None = None) -> int | None:
    """Peak of the resident set over the state between steps, in bytes; ``None`` where it could not be measured.

    Args:
        target: ``module:callable`` or ``file.py:callable``.
        way: how the step is taken, by its name (`revhooks.profiler.ways`).
        plain_bytes: what plain autograd holds after forward; budgets are a share of it.
        keywords: for the target; Python's literals, or text.
    """
    command = [sys.executable, "-m", "revhooks.profiler.fresh", target, way, str(plain_bytes), repr(dict(keywords or {}))]
    done = subprocess.run(command, env={**os.environ, **_ALLOCATOR}, capture_output=True, text=True, check=False)
    said = [line.removeprefix(_MARK) for line in done.stdout.splitlines() if line.startswith(_MARK)]  # a target prints, too
    return int(said[-1]) if said and not done.returncode else None


def main() -> None:
    """Take steps until they have settled, measure the next, print the peak."""
    target, way, plain_bytes, given = sys.argv[1:]
    keywords = ast.literal_eval(given)
    work = work_of(load_target(target, keywords), target, **keywords)
    trial = next(trial for trial in trials_of(work) if trial.way.name == way)
    trial.plain_bytes = int(plain_bytes)
    for _ in range(SETTLE):
        trial.step()
    with ResidentMeter() as meter:
        trial.step()
    print(f"\n{_MARK}{meter.peak}")


if __name__ == "__main__":
    main()
