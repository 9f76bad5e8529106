"""``revhooks report TARGET``."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

__all__ = ["add_parser"]

_EXAMPLES = """\
TARGET is module:callable or file.py:callable; the callable takes no arguments and returns
(model, inputs) or (model, inputs, loss), with loss a function of the model's output.

examples:
  revhooks report examples/revnet_digits.py:target
  revhooks report mypackage.models:build --json report.json
  revhooks report report.json                 show a report that was saved
"""


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "report",
        help="what a step saves, plain and under reversible()",
        description="Run a step in plain autograd and one under reversible(), and print what each needs and why.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", metavar="TARGET", help="module:callable, file.py:callable, or a saved report.json")
    parser.add_argument("--json", metavar="FILE", help="also write the report as JSON, in integer bytes")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="timed pairs of steps (default 3)")
    parser.add_argument("--rows", type=int, default=30, metavar="N", help="modules to list (default 30)")
    parser.add_argument("--no-fresh", action="store_true", help="skip the measured peak, which needs two fresh processes")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Profile the target, or load a saved report, and print it."""
    from ..record import Report
    from ..report.tables import render

    saved = options.target.endswith(".json")
    report = Report.load(options.target) if saved else _profile(options)
    Console().print(render(report, rows=options.rows))
    if options.json:
        report.save(options.json)
    return 0


def _profile(options: argparse.Namespace) -> Any:
    from ..errors import TargetError, explain
    from ..profile.fresh import fresh_peak
    from ..profile.target import load_target
    from ..profile.tracker import Workload, profile

    if options.rounds < 1:
        raise TargetError(explain("--rounds", expected="at least 1", got=str(options.rounds), remedy="pass a positive number"))
    work = Workload.of(load_target(options.target)(), options.target)
    with Console(stderr=True).status("measuring ...") as status:
        peaks = {}
        report = profile(work, target=options.target, rounds=options.rounds)
        if not options.no_fresh and report.plain.how == "not measured":
            status.update("measuring peaks in fresh processes ...")
            for name in ("plain", "reversible"):
                peak = fresh_peak(options.target, reverse=name == "reversible")
                if peak is not None:
                    peaks[name] = peak
        return report.with_peaks(peaks) if len(peaks) == 2 else report
