"""``revhooks compare A.json B.json``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .options import load_record

if TYPE_CHECKING:
    from ..record import Record

__all__ = ["add_parser"]

_EXAMPLES = """\
A and B are records that `revhooks report --json` and `revhooks run -o` have written. Of each
way of taking the step that is in both (plain, reversible(), replay=...) the bytes held for
backward, the peaks, the times and the errors are compared; of runs their totals; and the
modules that hold another amount.

--fail-under PERCENT: B must save that share of what plain autograd holds for backward:
  of a report   100 * (1 - held by reversible() / held by plain), when forward is over;
                --choice names another way of taking the step;
  of a run, and where plain was not measured
                100 * (1 - held at most / held at most by plain autograd), over all steps.
--tolerance PERCENT: no bytes in B may be more than that over those in A (held, peaks; those of
  plain autograd are not judged), no error ten times as large and above 1e-6, and no way of
  taking the step may be missing.
--time-tolerance PERCENT: nor the step time over that of plain autograd.

Exit code 0 when all holds, 3 when it does not, 2 for files that are no records.

examples:
  revhooks compare before.json after.json
  revhooks compare main.json branch.json --fail-under 60 --tolerance 5
"""


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "compare",
        help="two records side by side, for people and for CI",
        description="Compare two records; with limits, fail where the second does not keep to them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", metavar="A.json", help="the record to compare with")
    parser.add_argument("b", metavar="B.json", help="the record that is judged")
    parser.add_argument("--fail-under", type=float, metavar="PERCENT", help="what B must save of what plain autograd holds")
    parser.add_argument("--choice", default="reversible()", metavar="NAME", help='of what: "reversible()" if not given')
    parser.add_argument("--tolerance", type=float, metavar="PERCENT", help="by how much bytes may be over those of A")
    parser.add_argument("--time-tolerance", type=float, metavar="PERCENT", help="by how much times over plain's may be")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print both, and judge the second."""
    from rich.console import Console

    from ..report.compare import render

    a, b = load_record(options.a), load_record(options.b)
    failures = _failures(options, a, b)
    Console().print(render(a, b, (options.a, options.b)))
    for failure in failures:
        print(f"not ok: {failure}")
    if not failures and (options.fail_under, options.tolerance, options.time_tolerance) != (None, None, None):
        print("ok: all limits are kept")
    return 3 if failures else 0


def _failures(options: argparse.Namespace, a: Record, b: Record) -> list[str]:
    """Which limits the second record does not keep to.

    Raises:
        TargetError: a limit cannot be judged.
    """
    from ..errors import TargetError, explain
    from ..report.compare import regressions, saved_percent

    failures = []
    if options.fail_under is not None:
        saved = saved_percent(b, options.choice)
        if saved is None:
            known = ", ".join(choice.name for choice in b.choices) or "no bytes that plain autograd would hold"
            expected = f"figures of plain and of {options.choice}"
            remedy = "name one with --choice, or write the record with both"
            raise TargetError(explain(options.b, expected=expected, got=known, remedy=remedy))
        if saved < options.fail_under:
            failures.append(f"saves {saved:.1f}% of what plain autograd holds; at least {options.fail_under:g}% is asked for")
    if options.tolerance is not None or options.time_tolerance is not None:
        tolerance = options.tolerance if options.tolerance is not None else float("inf")
        failures += regressions(a, b, tolerance, options.time_tolerance)
    return failures
