"""Targets of the command line: ``module:callable`` or ``file.py:callable``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import TargetError, explain

__all__ = ["load_target"]


def load_target(spec: str) -> Callable[[], Any]:
    """The function that ``spec`` names.

    Raises:
        TargetError: there is no such file, module or function.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise _unknown(spec, "module:callable or file.py:callable", "no colon between the two")
    module = _load_file(spec, Path(place)) if place.endswith(".py") else _load_module(spec, place)
    found = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        known = ", ".join(n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", None) == module.__name__)
        raise _unknown(spec, f"a function {name!r} in {place}", f"none; it has {known or 'no functions'}")
    return found  # type: ignore[no-any-return]


def _load_file(spec: str, path: Path) -> Any:
    if not path.is_file():
        raise _unknown(spec, f"a file {path}", "no such file")
    sys.path.insert(0, str(path.resolve().parent))
    name = f"__target_{path.stem}__"  # a name that no import finds: models/random.py must not stand for the standard library's
    source = importlib.util.spec_from_file_location(name, path)
    if source is None or source.loader is None:
        raise _unknown(spec, f"a Python file {path}", "a file that cannot be imported")
    module = importlib.util.module_from_spec(source)
    sys.modules[name] = module
    return _import(spec, lambda: source.loader.exec_module(module) or module)  # type: ignore[union-attr]


def _load_module(spec: str, name: str) -> Any:
    sys.path.insert(0, "")
    return _import(spec, lambda: importlib.import_module(name))


def _import(spec: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:
        raise _unknown(spec, "a module that can be imported", f"{type(error).__name__}: {error}") from error


def _unknown(spec: str, expected: str, got: str) -> TargetError:
    return TargetError(explain(f"target {spec!r}", expected=expected, got=got, remedy="revhooks report --help shows examples"))
