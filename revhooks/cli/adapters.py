"""``revhooks adapters``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from ..adapters import Adapter

__all__ = ["add_parser", "table"]

_EXAMPLES = """\
Under reversible() the blocks of these libraries need no registration: they are inverted
(invert), run again from their inputs (replay), or not touched (leave), as listed. A table is
active when its library has been imported by the time a context is entered. Classes that you
register yourself come first; reversible(adapters=False) goes without.

examples:
  revhooks adapters
  revhooks adapters zuko FrEIA
"""


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "adapters",
        help="which blocks of other libraries are known, and what is done with them",
        description="List the blocks of other libraries that need no registration.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("libraries", nargs="*", metavar="LIBRARY", help="which ones; all if none is given")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the tables."""
    from rich.console import Console

    from ..adapters import LIBRARIES, adapter_of
    from ..errors import TargetError, explain

    unknown = [name for name in options.libraries if name not in LIBRARIES]
    if unknown:
        expected = f"one of {', '.join(LIBRARIES)}"
        remedy = "teach it with revhooks.register"
        raise TargetError(explain("LIBRARY", expected=expected, got=repr(unknown[0]), remedy=remedy))
    console = Console()
    for index, name in enumerate(options.libraries or LIBRARIES):
        if index:
            console.print()
        console.print(table(adapter_of(name), _installed(name)))
    return 0


def _installed(library: str) -> str:
    """Its version here, without importing it."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(library.partition(".")[0])
    except PackageNotFoundError:
        return ""


def table(adapter: Adapter, installed: str) -> Table:
    """One library's classes: what is done with them, and why."""
    from rich.table import Table

    here = f"{installed} is installed" if installed else "not installed"
    shown = Table(
        title=f"{adapter.library} (tested with {adapter.versions}; {here})", title_justify="left", title_style="bold", box=None
    )
    shown.add_column("", no_wrap=True)
    shown.add_column("class", ratio=3, min_width=42, overflow="fold")
    shown.add_column("why", ratio=2)
    for block in adapter.blocks:
        names = ", ".join(block.names)
        methods = [name for name in block.methods if name != "forward"] if block.how != "leave" else []
        called = f" (also {', '.join(methods)})" if methods and "forward" in block.methods else ""
        own = "yours, derived from " if block.subclasses else ""
        shown.add_row(block.how, f"{own}{names}{called}", block.why)
    return shown
