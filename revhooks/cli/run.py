"""``revhooks run script.py args...``."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RevhooksError
from .options import add_context_options, context_with

if TYPE_CHECKING:
    from ..context import reversible
    from ..profiler.recorder import Recorder
    from ..profiler.script import Script
    from ..profiler.wanted import Wanted

__all__ = ["add_parser"]

_EXAMPLES = """\
The script is executed as python would execute it: arguments, exit code, Ctrl-C, tracebacks,
standard input, multiprocessing. Only torch is there before it is: set OMP_NUM_THREADS in the
shell. Processes that it spawns are on their own.

examples:
  revhooks run train.py --epochs 3
  revhooks run --replay-blocks -o run.json -m mypackage.train --lr 0.1
  revhooks run --replay transformers.models.gpt2.modeling_gpt2:GPT2Block --budget 4GiB train.py
  torchrun --nproc-per-node 2 -m revhooks run train.py
  revhooks report run.json                          show what was saved
"""


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "run",
        help="train with a script, unmodified, under reversible()",
        description="Execute a training script, or a module, under reversible(), and tell what that saved.",
        usage="revhooks run [options] script.py [args ...]\n       revhooks run [options] -m module [args ...]",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # what looks like the beginning of an option may be the script's
    )
    add_context_options(parser)
    parser.add_argument("-o", "--output", metavar="FILE", help="write what was recorded as JSON; of rank n to FILE.rankn.json")
    parser.add_argument("-f", "--force", action="store_true", help="overwrite that file")
    parser.add_argument("--quiet", action="store_true", help="no status while it runs, and no summary")
    parser.add_argument("-m", "--module", action="store_true", help="what follows is a module's name")
    parser.add_argument("script", help="a Python file, or a directory or zip file with a __main__.py")
    rest = parser.add_argument("args", nargs=argparse.REMAINDER, help="the script's own arguments")
    rest.required = False  # says who tells what is missing
    parser.set_defaults(run=run)


_SOON = 3  # steps after which what an option names was called, if it is called at all


def run(options: argparse.Namespace) -> int | Callable[[], int]:
    """Find what is to be executed, and check the options; returns a function that executes it, whose errors are the script's."""
    from ..profiler.script import Script

    path = _output(options)
    if path is not None:
        from ..report.files import refuse

        refuse([path], force=options.force)
    try:
        script = Script(options.script, options.args, module=options.module)
    except OSError as error:
        print(f"revhooks: can't open file {os.path.abspath(options.script)!r}: {error.strerror}", file=sys.stderr)
        return 2
    summary = _Summary(options, path)
    atexit.register(summary.give)  # before others do: it is called after theirs
    script.settle_in()
    from ..profiler.wanted import Wanted

    replay, keep = Wanted(options.replay, blocks=options.replay_blocks), Wanted(options.keep)
    summary.replay, summary.keep = replay, keep
    context = context_with(
        options,
        replay=replay.means if options.replay or options.replay_blocks else (),
        keep=keep.means if options.keep else (),
    )
    from ..adapters.arrivals import arrivals

    def execute() -> int:
        with contextlib.nullcontext() if options.no_adapters else arrivals():
            return _execute(script, context, summary)

    return execute


def _execute(script: Script, context: reversible, summary: _Summary) -> int:
    """Execute the script in the context; what it raises goes on as it is."""
    from ..profiler.recorder import Recorder
    from ..profiler.status import StatusLine

    line = StatusLine.on_stderr() if summary.is_shown else None

    def stepped(recorder: Recorder) -> None:
        if recorder.steps == _SOON:
            summary.complain()
        if line is not None and line.is_due:
            line.paint(recorder.status())

    leaving, is_over = None, False
    try:
        with context as entered, Recorder(entered, on_step=stepped).recording() as recorder:
            entered.name_blocks(summary.replay.path_of)
            try:
                leaving = script.execute()
                is_over = True
                entered.stats  # noqa: B018 - devices tell what they have found
            except KeyboardInterrupt:
                summary.is_interrupted = True
                raise
            finally:
                summary.recorder = recorder
                if line is not None:
                    line.close()
    except RevhooksError as error:
        if not is_over:
            raise
        print(f"revhooks: {error}", file=sys.stderr)
        return 1
    if leaving is not None:
        raise leaving
    return 0


class _Summary:
    """What is told when all is over: threads of the script, and what it does at exit; written by the process that was started."""

    def __init__(self, options: argparse.Namespace, path: Path | None) -> None:
        self._options = options
        self._path = path
        self._process = os.getpid()
        self.is_shown = not options.quiet and _rank() == 0
        self.is_interrupted = False
        self._has_complained = False
        self.recorder: Recorder | None = None
        self.replay: Wanted
        self.keep: Wanted

    def give(self) -> None:
        """Print it, and write the record."""
        if self.recorder is None or os.getpid() != self._process:
            return
        options = self._options
        record = self.recorder.record(shlex.join([*["-m"] * options.module, options.script, *options.args]))
        if self._path is not None:
            try:
                record.save(self._path)
            except OSError as error:
                self._tell(f"{self._path}: {error.strerror}: what was recorded is lost")
        if self.is_shown:
            from rich.console import Console

            from ..report.tables import render

            Console(stderr=True).print("", render(record, rows=8))
            if not record.stats.packed_bytes:
                self._tell(
                    "no step was taken in this process; those that the script starts have to enter reversible() themselves"
                )
        self.complain()
        if self.is_interrupted:
            _stay_interrupted()

    def complain(self) -> None:
        """Tell of options that had no effect up to now, each once."""
        if _rank() or self._has_complained or os.getpid() != self._process:
            return
        for option, wanted in (("--replay", self.replay), ("--keep", self.keep)):
            for name in wanted.unmatched:
                self._has_complained = True
                blocks = f"; repeated blocks are {', '.join(wanted.repeated)}" if wanted.repeated else ""
                self._tell(f"{option} {name}: no module of such a class was called{blocks}")
        if self._options.replay_blocks and not self.replay.taken:
            self._has_complained = True
            self._tell("--replay-blocks: no model that was called repeats a block")

    @staticmethod
    def _tell(text: str) -> None:
        print(f"revhooks: {text}", file=sys.stderr)


def _stay_interrupted() -> None:
    """Python remembers that Ctrl-C has ended a script, to end by that signal, until code is run from text, as imports do."""
    with contextlib.suppress(KeyboardInterrupt):
        exec("raise KeyboardInterrupt")


def _rank() -> int:
    """Of this process among those that train together, as torchrun tells."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdigit() else 0


def _output(options: argparse.Namespace) -> Path | None:
    """Where to write, wherever the script goes."""
    if options.output is None:
        return None
    path = Path(options.output).absolute()
    return path if _rank() == 0 else path.with_name(f"{path.stem}.rank{_rank()}{path.suffix}")
