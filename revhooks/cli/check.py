"""``revhooks check TARGET``."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["add_parser"]

_EXAMPLES = """\
TARGET is module:callable or file.py:callable, returning (model, inputs) or (model, inputs, loss).
Exit code 0 when all is well, 1 otherwise.

example:
  revhooks check examples/revnet_digits.py:target
"""


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "check",
        help="does it invert, and are its gradients right",
        description="Try a model's inverse, its gradients under reversible(), and count the calls of its branches.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", metavar="TARGET", help="module:callable or file.py:callable")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Check the target and print the result."""
    from ..checking import check
    from ..profile.target import load_target
    from ..profile.tracker import Workload

    work = Workload.of(load_target(options.target)(), options.target)
    result = check(work.model, *work.inputs)
    print(result)
    return 0 if result else 1
