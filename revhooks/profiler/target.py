"""Targets of the command line: ``module:callable`` or ``file.py:callable``, and what they give."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import numbers
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..context import reversible
from ..errors import TargetError, explain, told
from .workload import StepFunction, Workload

__all__ = ["load", "load_target", "work_of"]

_SPEC = "module:callable or file.py:callable"
_RESULTS = (
    "(model, inputs) or (model, inputs, loss), a training step that was taken (None or its loss), or a function that takes one"
)


def load(spec: str) -> Workload | StepFunction:
    """What the function that ``spec`` names gives, called without arguments.

    The function may return

    - ``(model, inputs)`` or ``(model, inputs, loss)``: a `Workload`;
    - ``None``, or a float or scalar tensor (its loss), having taken a whole training step: a `StepFunction` of itself, which is
      called again for each step that is measured;
    - a function without arguments: a `StepFunction` of that.

    Raises:
        TargetError: there is no such file, module or function, it raises, or returns something else.
    """
    return work_of(load_target(spec), spec)


def load_target(spec: str, given: Collection[str] = ()) -> Callable[..., Any]:
    """The function that ``spec`` names. It can be called with the arguments that are given; others have defaults.

    Args:
        spec: ``module:callable`` or ``file.py:callable``.
        given: the names of the arguments that it will be called with.

    Raises:
        TargetError: there is no such file, module or function.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise _without_name(spec, name if not colon else place)
    module = _load_file(spec, Path(place)) if place.endswith(".py") else _load_module(spec, place)
    found = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        own = (n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", None) == module.__name__)
        there = "none" if found is None else _a(found)
        raise _error(
            spec,
            f"a function {name!r} in {place}",
            f"{there}; it has {', '.join(own) or 'no functions'}",
            "name one of its functions",
        )
    _check_callable(spec, found, given=given)
    return found  # type: ignore[no-any-return]


def work_of(function: Callable[..., Any], spec: str, **keywords: Any) -> Workload | StepFunction:
    """Call a target, with keywords perhaps, and tell from what it returns what it is; see `load`.

    Raises:
        TargetError: it raises, or returns something else.
    """
    _check_keywords(function, spec, keywords)
    try:
        with reversible():  # a whole step may have no memory otherwise
            result = function(**keywords)
    except TargetError:
        raise
    except Exception as error:
        got = told(error)
        raise _error(spec, "a function that runs without an error", got, "--debug shows where it was raised") from error
    if isinstance(result, tuple):
        return Workload.of(result, f"target {spec!r}")
    if _is_step_result(result):
        return StepFunction(lambda: function(**keywords), spec)
    if isinstance(result, nn.Module):
        raise _error(spec, _RESULTS, f"a model alone ({type(result).__name__})", "return its inputs too: (model, inputs)")
    if not callable(result) or isinstance(result, type):
        raise _error(spec, _RESULTS, _a(result), "return one of these")
    _check_callable(spec, result, "the function that it returned, ")
    return StepFunction(result, spec)


def _check_keywords(function: Callable[..., Any], spec: str, keywords: dict[str, Any]) -> None:
    """Raise where a target does not take them."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of some functions in C
        return
    try:
        signature.bind(**keywords)
    except TypeError:
        given, known = ", ".join(keywords), ", ".join(signature.parameters)
        raise _error(spec, f"one that takes {given}", f"one that takes {known or 'nothing'}", "name an argument of it") from None


def _is_step_result(result: Any) -> bool:
    """Whether it is what a training step returns: nothing, or its loss."""
    if isinstance(result, Tensor):
        return result.numel() == 1 and result.is_floating_point()
    return result is None or (isinstance(result, numbers.Real) and not isinstance(result, numbers.Integral))


def _check_callable(spec: str, found: Any, which: str = "", given: Collection[str] = ()) -> None:
    """Refuse what is callable, but cannot be called with nothing to give one of the results of `load`."""
    wanted = f"{which}a function without arguments that returns (model, inputs), or takes a training step"
    write = "write a function around it: def target(): return model, inputs"
    if isinstance(found, nn.Module):
        raise _error(spec, wanted, f"a model itself ({type(found).__name__})", write)
    if isinstance(found, type):
        raise _error(spec, wanted, f"the class {found.__name__}", write)
    if inspect.isgeneratorfunction(found) or inspect.iscoroutinefunction(found) or inspect.isasyncgenfunction(found):
        kind = "generator" if inspect.isgeneratorfunction(found) else "coroutine"
        raise _error(spec, wanted, f"a {kind}, which a call only makes", "return instead of yield, and without async")
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):  # of some functions in C
        return
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if needed := [name for name in needed if name not in given]:
        raise _error(spec, wanted, f"one that needs {', '.join(needed)}", "give them defaults, or write a function around it")


# -- what is not there


def _without_name(spec: str, place: str) -> TargetError:
    """The error for a target that names no function: with those that could be meant, found without running the file."""
    path = Path(place)
    if not place.endswith(".py"):
        path = _source_of(place)
    elif not path.is_file():
        return _error(spec, f"a file {path}", "no such file", f"a target is {_SPEC}")
    names = _functions_in(path)
    if not names:
        return _error(
            spec,
            _SPEC,
            "no name of a function",
            f"write one that returns (model, inputs), and name it: {place or 'file.py'}:target",
        )
    return _error(
        spec, _SPEC, "no name of a function", f"name one of those without arguments: {', '.join(f'{place}:{n}' for n in names)}"
    )


def _source_of(name: str) -> Path:
    """Where the source of a module lies, without running it; parents are imported."""
    _look_in("")
    try:
        found = importlib.util.find_spec(name)
    except Exception:  # a parent that raises, or a name that is none
        found = None
    return Path(found.origin) if found is not None and found.origin else Path()


def _functions_in(path: Path) -> list[str]:
    """The functions of a file that can be called without arguments, those with telling names first."""
    try:
        body = ast.parse(path.read_text()).body
    except (OSError, SyntaxError, ValueError):
        return []
    names = [node.name for node in body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and _is_free(node)]
    return sorted(names, key=lambda name: not any(word in name for word in ("target", "build", "step")))


def _is_free(node: ast.FunctionDef) -> bool:
    """Whether a function can be called without arguments, and gives what it returns at once."""
    arguments = node.args
    needed = len(arguments.posonlyargs) + len(arguments.args) - len(arguments.defaults)
    return not needed and None not in arguments.kw_defaults and not _yields(node)


def _yields(node: ast.FunctionDef) -> bool:
    return any(isinstance(inner, ast.Yield | ast.YieldFrom) for inner in ast.walk(node))


# -- loading


def _load_file(spec: str, path: Path) -> Any:
    if not path.is_file():
        raise _error(spec, f"a file {path}", "no such file", f"a target is {_SPEC}")
    _look_in(str(path.resolve().parent))
    name = f"__target_{path.stem}__"  # a name that no import finds: models/random.py must not stand for the standard library's
    source = importlib.util.spec_from_file_location(name, path)
    if source is None or source.loader is None:
        raise _error(spec, f"a Python file {path}", "a file that cannot be imported", f"a target is {_SPEC}")
    module = importlib.util.module_from_spec(source)
    sys.modules[name] = module
    return _import(spec, lambda: source.loader.exec_module(module) or module)  # type: ignore[union-attr]


def _load_module(spec: str, name: str) -> Any:
    _look_in("")
    return _import(spec, lambda: importlib.import_module(name))


def _look_in(folder: str) -> None:
    if sys.path[:1] != [folder]:
        sys.path.insert(0, folder)


def _import(spec: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except SystemExit as stop:
        remedy = 'what it does as a script belongs under if __name__ == "__main__":'
        raise _error(spec, "a module that can be imported", f"one that exits ({stop.code})", remedy) from stop
    except Exception as error:
        got = told(error)
        remedy = "--debug shows where it was raised"
        if "relative import" in str(error):
            remedy = "name it as a module of its package, package.module:callable, from the folder above that"
        raise _error(spec, "a module that can be imported", got, remedy) from error


def _a(thing: Any) -> str:
    """What something is, in words.

    Example:
        >>> _a(3), _a([1]), _a(nn.ReLU())
        ('an int', 'a list', 'a ReLU')
    """
    name = type(thing).__name__
    if isinstance(thing, Tensor):
        return f"a tensor of shape {tuple(thing.shape)}"
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _error(spec: str, expected: str, got: str, remedy: str) -> TargetError:
    return TargetError(explain(f"target {spec!r}", expected=expected, got=got, remedy=remedy))
