"""Measures the peak of the resident set of one step in a process of its own: ``python -m revhooks.profile.fresh``."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from .meters import ResidentMeter
from .target import load_target
from .tracker import Workload, training_step

__all__ = ["fresh_peak"]

# glibc gives freed memory back at once, so that the resident set follows what is in use
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def fresh_peak(target: str, *, reverse: bool) -> int | None:
    """Peak of the resident set over the state between steps, in bytes; ``None`` where it could not be measured.

    Args:
        target: ``module:callable`` or ``file.py:callable``.
        reverse: under ``reversible()``.
    """
    command = [sys.executable, "-m", "revhooks.profile.fresh", target, "reversible" if reverse else "plain"]
    done = subprocess.run(command, env={**os.environ, **_ALLOCATOR}, capture_output=True, text=True, check=False)
    if done.returncode:
        return None
    return int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])


def main() -> None:
    """Take two steps, measure the second, print the peak as JSON."""
    target, mode = sys.argv[1:]
    step = training_step(Workload.of(load_target(target)(), target), reverse=mode == "reversible")
    step()
    with ResidentMeter() as meter:
        step()
    print(json.dumps({"peak_bytes": meter.peak}))


if __name__ == "__main__":
    main()
