"""The command line: ``revhooks demo | run | report | check | compare | adapters``.

Exit codes: 0 well; 1 not well, or failed; 2 what was asked for cannot be understood, or the target not be run; 3 a comparison has
failed; 130 interrupted. Errors are one line on stderr; ``--debug`` shows where they were raised.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from .. import __version__
from ..errors import RevhooksError, TargetError, explain, told
from . import adapters, check, compare, demo, report, run

__all__ = ["main"]

_CODES = """\
exit codes: 0 well; 1 not well, or failed; 2 bad usage or a bad target; 3 a comparison failed; 130 interrupted.
revhooks COMMAND --help shows examples."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code.

    A command's ``run`` returns one, or a function that returns one: what that raises is not ours, and goes through untouched.
    """
    options = _parser().parse_args(argv)
    try:
        code = options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("revhooks: interrupted", file=sys.stderr)
        return 130
    except SystemExit as stop:  # of a target; a script's own goes through untouched
        if isinstance(stop.__context__, BrokenPipeError):  # of rich
            raise
        remedy = "leave sys.exit() out of it; --debug shows where it was called"
        error = TargetError(explain("the target", expected="one that comes to its end", got=f"exit ({stop.code})", remedy=remedy))
        error.__cause__ = stop
        return _failed(error, debug=options.debug)
    except BrokenPipeError:  # as of `| head`: nobody is there to be told; rich does the same
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at exit
        return 1
    except Exception as error:
        return _failed(error, debug=options.debug)
    return int(code() if callable(code) else code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="revhooks",
        description="Train deep nets without storing their activations.",
        epilog=_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"revhooks {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (demo, run, report, check, compare, adapters):
        command.add_parser(commands)
    for one in commands.choices.values():  # behind the command too; what was given before it stays
        one.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error")
    return parser


def _failed(error: Exception, *, debug: bool) -> int:
    """Tell of an error; returns the exit code."""
    if debug:
        traceback.print_exception(error)
    is_told = isinstance(error, RevhooksError | OSError)  # in words for a user
    hint = "" if debug or is_told else " (--debug shows where it was raised)"
    print(f"revhooks: {error if is_told else told(error)}{hint}", file=sys.stderr)
    return 2 if isinstance(error, TargetError | FileExistsError | FileNotFoundError | IsADirectoryError | PermissionError) else 1
