"""``revhooks check TARGET``."""

from __future__ import annotations

import argparse
from typing import Any

from .options import add_context_options, context_of, has_context_options

__all__ = ["add_parser"]

_EXAMPLES = """\
TARGET is module:callable or file.py:callable; the callable takes no arguments and returns
(model, inputs) or (model, inputs, loss).

Two steps of a copy of the model are compared with two of another in plain autograd, from the
same state of all random generators: outputs, gradients, buffers and generators. Unless --guard
is given the guard is off, so that nothing catches what is wrong. Of blocks with an inverse it
tells how far reconstructions are off, how that grows over a chain, and how often a step calls
their branches.

Exit code 0 when all is well, 1 when it is not, 2 for a target that cannot be run.

examples:
  revhooks check examples/revnet_digits.py:target
  revhooks check mypackage.models:build --replay GPT2Block --budget 2GiB
"""


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "check",
        help="is a step under reversible() that of plain autograd, and do inverses invert",
        description="Compare steps under reversible() with those of plain autograd, and try the inverses of blocks.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", metavar="TARGET", help="module:callable or file.py:callable")
    add_context_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Check the target and print the result."""
    from ..checking import check
    from ..errors import TargetError, explain, told
    from ..profiler.target import load
    from ..profiler.workload import StepFunction

    work = load(options.target)
    if isinstance(work, StepFunction):
        got = "a training step, of whose model nothing is known"
        remedy = "name a function that returns these"
        raise TargetError(explain(f"target {options.target!r}", expected="(model, inputs)", got=got, remedy=remedy))
    under = context_of(options, work.model, guard="off") if has_context_options(options) else None
    try:
        args, kwargs = ((), work.inputs) if isinstance(work.inputs, dict) else (work.inputs, {})
        result = check(work.model, *args, under=under, **kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        got = told(error)
        raise TargetError(
            explain(
                f"target {options.target!r}", expected="a step that runs", got=got, remedy="--debug shows where it was raised"
            )
        ) from error
    print(result)
    return 0 if result else 1
