"""The command line: ``revhooks demo | report | check``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..errors import RevhooksError
from . import check, demo, report

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 after an error, 130 when interrupted."""
    parser = argparse.ArgumentParser(
        prog="revhooks",
        description="Train deep nets without storing their activations.",
        epilog="revhooks COMMAND --help shows examples.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (demo, report, check):
        command.add_parser(commands)
    options = parser.parse_args(argv)
    try:
        return int(options.run(options))
    except RevhooksError as error:
        print(f"revhooks: {error}", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"revhooks: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("revhooks: interrupted", file=sys.stderr)
        return 130
