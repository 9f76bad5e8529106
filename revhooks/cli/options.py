"""What commands share: the options of a context, and records from files."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from ..errors import RegistrationError, TargetError, explain, told

if TYPE_CHECKING:
    from torch import nn

    from ..context import reversible
    from ..record import Record

__all__ = ["add_context_options", "context_of", "context_with", "has_context_options", "load_record"]


def add_context_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options that mirror the arguments of ``reversible()``."""
    group = parser.add_argument_group("options of reversible()")
    which = "Class, module:Class or script.py:Class; may be given again"
    group.add_argument(
        "--replay", metavar="CLASS", action="append", default=[], help=f"run such blocks again in backward: {which}"
    )
    group.add_argument("--replay-blocks", action="store_true", help="the same of blocks that the model repeats: they are found")
    group.add_argument("--keep", metavar="CLASS", action="append", default=[], help=f"leave such blocks as they are: {which}")
    group.add_argument("--budget", metavar="SIZE", help="what may be held: 4GiB, 500MiB, auto (default: least memory)")
    group.add_argument("--no-ops", action="store_true", help="leave ordinary layers as they are")
    group.add_argument("--offload", action="store_true", help="let what must be kept wait in host memory, on CUDA")
    group.add_argument("--no-adapters", action="store_true", help="leave blocks of other libraries that need no registration")
    group.add_argument("--guard", choices=("fallback", "raise", "off"), help="what a reconstruction that is off does")


def _budget(options: argparse.Namespace) -> float | str | None:
    """``--budget`` as ``reversible()`` takes it: a bare number is one."""
    text: str | None = options.budget
    try:
        return float(text) if text is not None else None
    except ValueError:
        return text


def has_context_options(options: argparse.Namespace) -> bool:
    """Whether any was given."""
    flags = options.replay_blocks, options.no_ops, options.no_adapters, options.offload
    return any((options.replay, options.keep, options.budget, options.guard, *flags))


def context_of(options: argparse.Namespace, model: nn.Module, *, guard: str = "fallback") -> reversible:
    """The context that the options ask for.

    Args:
        options: the parsed command line.
        model: where bare names of classes are looked up.
        guard: where ``--guard`` was not given.

    Raises:
        TargetError: there is no such class, or an option has no such value.
    """
    replay = [_class("--replay", name, model) for name in options.replay]
    if options.replay_blocks:
        replay += _repeated(model)
    keep = [_class("--keep", name, model) for name in options.keep]
    return context_with(options, replay=tuple(replay), keep=tuple(keep), guard=guard)


def context_with(options: argparse.Namespace, *, replay: Any, keep: Any, guard: str = "fallback") -> reversible:
    """The context that the options ask for, with blocks that were found by then.

    Args:
        options: the parsed command line.
        replay: as ``reversible()`` takes it.
        keep: the same.
        guard: where ``--guard`` was not given.

    Raises:
        TargetError: an option has no such value.
    """
    from ..context import reversible

    try:
        return reversible(
            budget=_budget(options),
            replay=replay,
            keep=keep,
            ops=not options.no_ops,
            offload=options.offload,
            guard=options.guard or guard,
            adapters=not options.no_adapters,
        )
    except RegistrationError as error:
        raise TargetError(str(error)) from error


def _class(option: str, name: str, model: nn.Module) -> type:
    """The class of modules that an option names."""
    place, colon, path = name.rpartition(":")
    if colon and not place.endswith(".py"):
        return _imported(option, name, place, path)
    known: dict[str, type] = {type(module).__name__: type(module) for module in model.modules()}
    found = known.get(path)
    if found is not None and _is_from(found, place):
        return found
    got = f"{name!r}; there are {', '.join(known)}"
    raise TargetError(explain(option, expected="a class of modules in the model", got=got, remedy="name one of these"))


def _is_from(cls: type, file: str) -> bool:
    """Whether a class was made in this file, which was a target's; any was where none is named."""
    source = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return not file or (source is not None and os.path.abspath(source) == os.path.abspath(file))


def _imported(option: str, name: str, place: str, path: str) -> type:
    if sys.path[:1] != [""]:
        sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(place)
        for part in path.split("."):
            found = getattr(found, part)
    except Exception as error:
        got = told(error)
        remedy = "name it as module:Class"
        raise TargetError(explain(f"{option} {name}", expected="a class that can be imported", got=got, remedy=remedy)) from error
    if not isinstance(found, type):
        got = type(found).__name__
        raise TargetError(explain(f"{option} {name}", expected="a class", got=f"a {got}", remedy="name the class of the blocks"))
    return found


def _repeated(model: nn.Module) -> list[type]:
    from ..profiler.repeated import to_replay

    found = to_replay(model)
    if not found:
        remedy = "name the class of blocks with --replay"
        expected = "a model that repeats blocks, which have no inverse"
        raise TargetError(explain("--replay-blocks", expected=expected, got=type(model).__name__, remedy=remedy))
    return [one.cls for one in found]


def load_record(path: str) -> Record:
    """The record in a file.

    Raises:
        TargetError: there is none.
    """
    from ..record import Record

    try:
        return Record.load(path)
    except FileNotFoundError:
        remedy = "write one with revhooks report --json, or revhooks run -o"
        raise TargetError(explain(path, expected="a record of revhooks", got="no such file", remedy=remedy)) from None
    except OSError as error:
        got, remedy = error.strerror or told(error), "name a file that can be read"
        raise TargetError(explain(path, expected="a record of revhooks", got=f"an error: {got}", remedy=remedy)) from error
    except ValueError as error:
        raise TargetError(str(error)) from error
