"""``revhooks report TARGET``."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from .options import load_record

__all__ = ["add_parser"]

_EXAMPLES = """\
TARGET is module:callable or file.py:callable. Called without arguments it returns (model, inputs)
or (model, inputs, loss): inputs are a tensor, a tuple of arguments or a dict of keyword arguments,
loss is a function of the model's output. Or it takes a whole training step, each time that it is
called.

examples:
  revhooks report examples/revnet_digits.py:target
  revhooks report mypackage.models:build --quick --json report.json
  revhooks report train.py:step --html report.html
  revhooks report report.json                       show what was saved, of `report` or of `run -o`
  revhooks report models.py:build --fake --set batch=512    predict, and allocate nothing
  revhooks report models.py:build --fake --fit 80GiB --vary batch

A way takes some ten steps of its own, and on a CPU a process for its measured peak; --quick takes
two ways only, --no-fresh no processes.
"""
_FILES = (
    ("json", "JSON, in integer bytes"),
    ("html", "one page that needs nothing else"),
    ("svg", "the picture of the step"),
    ("trace", "a trace for Perfetto or chrome://tracing"),
    ("flamegraph", "what is held, as collapsed stacks by module path"),
)


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "report",
        help="where the memory of a step goes, and what to do about it",
        description="Take a training step in several ways (plain, under reversible(), with blocks replayed, with budgets, "
        "checkpointed), and tell what each takes, which to choose, and what is still held.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", metavar="TARGET", help="module:callable, file.py:callable, or a saved record.json")
    parser.add_argument("--quick", action="store_true", help="plain and reversible() only")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="an argument for the target, as batch=64"
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="timed steps of each way (default: about 20 seconds of them)")
    parser.add_argument("--rows", type=int, default=20, metavar="N", help="rows of what is still held (default 20)")
    parser.add_argument("--no-fresh", action="store_true", help="skip measured peaks, which on a CPU need a process for each way")
    parser.add_argument("--fake", action="store_true", help="predict on fake tensors: nothing is allocated")
    parser.add_argument("--fit", metavar="SIZE", help="with --fake: the largest model or batch for this memory, as 80GiB")
    parser.add_argument("--vary", metavar="KEYWORD", help="the target's argument that --fit varies")
    parser.add_argument("--optimizer", metavar="NAME", help="whose state counts with --fake (default adamw)")
    for kind, text in _FILES:
        parser.add_argument(f"--{kind}", metavar="FILE", help=f"also write {text}")
    parser.add_argument("-f", "--force", action="store_true", help="overwrite files")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure, predict or load; print, and write files."""
    from rich.console import Console

    from ..report.files import refuse, save
    from ..report.tables import render

    _check(options)
    paths = {kind: path for kind, _ in _FILES if (path := getattr(options, kind))}
    refuse(paths.values(), force=options.force)
    with Console(stderr=True).status("loading ...") as status:
        record = _record(options, lambda text: status.update(text))
    Console().print(render(record, rows=options.rows))
    for kind, path in paths.items():
        save(record, path, kind)
    return 0


def _check(options: argparse.Namespace) -> None:
    """Options that do not go together, before anything is loaded."""
    from ..errors import TargetError, explain

    for name in ("rounds", "rows"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise TargetError(explain(f"--{name}", expected="at least 1", got=str(value), remedy="pass a positive number"))
    if options.vary and not options.fit:
        raise TargetError(explain("--vary", expected="--fit with it", got="none", remedy="add --fit SIZE, and --fake"))
    if options.fit and not options.fake:
        raise TargetError(explain("--fit", expected="--fake with it", got="none", remedy="add --fake: sizes are not tried"))
    if options.optimizer and not options.fake:
        remedy = "add --fake: what is measured has its own"
        raise TargetError(explain("--optimizer", expected="--fake with it", got="none", remedy=remedy))
    if options.target.endswith(".json"):
        given = [name for name in ("fake", "set", "quick", "rounds") if getattr(options, name)]
        if given:
            remedy = f"leave out --{given[0]}, or name a target"
            raise TargetError(explain(f"--{given[0]}", expected="a target to call", got="a saved record", remedy=remedy))


def _record(options: argparse.Namespace, tell: Callable[[str], None]) -> Any:
    if options.target.endswith(".json"):
        return load_record(options.target)
    return _predicted(options, tell) if options.fake else _measured(options, tell)


def _measured(options: argparse.Namespace, tell: Callable[[str], None]) -> Any:
    from ..profiler.fresh import fresh_peak
    from ..profiler.target import load_target, work_of
    from ..profiler.whatif import measure

    keywords = _keywords(options)
    work = work_of(load_target(options.target, keywords), options.target, **keywords)
    record = measure(work, target=_called(options), quick=options.quick, rounds=options.rounds, tell=tell)
    if options.no_fresh:
        return record
    choices = []
    for choice in record.choices:
        if choice.how == "not measured" and not choice.problem:
            tell(f"measuring {choice.name} in a process of its own ...")
            peak = fresh_peak(options.target, choice.name, record.choices[0].saved_bytes, keywords)
            if peak is not None:
                choice = dataclasses.replace(choice, measured_peak_bytes=peak, how="resident set, fresh process")
        choices.append(choice)
    return dataclasses.replace(record, choices=tuple(choices))


def _predicted(options: argparse.Namespace, tell: Callable[[str], None]) -> Any:
    from ..profiler.fitting import fit
    from ..profiler.predict import predict
    from ..profiler.target import load_target
    from ..profiler.ways import QUICK

    limit = _size(options.fit)
    keywords = _keywords(options)
    build = functools.partial(load_target(options.target, keywords), **keywords)
    how: dict[str, Any] = {"target": options.target, "optimizer": options.optimizer or "adamw", "tell": tell}
    ways = QUICK if options.quick else None
    fits = fit(build, limit, keyword=options.vary, ways=ways, **how) if options.fit else ()
    record = predict(build, ways=ways, **how)
    return dataclasses.replace(record, target=_called(options), fits=fits)


def _size(text: str | None) -> int:
    """What ``--fit`` gives, in bytes."""
    from ..errors import RevhooksError, TargetError, explain
    from ..runtime.policy.budget import parse_bytes

    try:
        return int(parse_bytes(text))
    except (RevhooksError, OverflowError) as error:  # of a budget it would say more
        expected = "a memory in bytes, KiB, MiB, GiB or TiB"
        raise TargetError(explain("--fit", expected=expected, got=repr(text), remedy="for example --fit 80GiB")) from error


def _called(options: argparse.Namespace) -> str:
    return " ".join([options.target, *options.set])


def _keywords(options: argparse.Namespace) -> dict[str, Any]:
    """What ``--set`` gives to the target: Python's literals, or text."""
    import ast

    from ..errors import TargetError, explain

    found: dict[str, Any] = {}
    for given in options.set:
        name, equals, text = given.partition("=")
        if not equals or not name.isidentifier():
            raise TargetError(explain("--set", expected="NAME=VALUE", got=repr(given), remedy="for example --set batch=64"))
        try:
            found[name] = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            found[name] = text
    return found
