"""Executes a script or a module as ``__main__``, as ``python`` does: what it sees and what it leaves are those of python."""

from __future__ import annotations

import builtins
import io
import os
import pkgutil
import runpy
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import SourceFileLoader
from types import CodeType, ModuleType, TracebackType
from typing import Any

__all__ = ["Script"]

_Hook = Callable[[type[BaseException], BaseException, TracebackType | None], Any]


class Script:
    """What is to be executed, found but not begun.

    Args:
        name: a Python file, compiled or not; a directory or zip file that has a ``__main__.py``; or the name of a module.
        arguments: what it finds in ``sys.argv`` after its own name.
        module: ``name`` is that of a module, or of a package that has a ``__main__``.

    Raises:
        OSError: there is no such file, or it cannot be read.
    """

    def __init__(self, name: str, arguments: Sequence[str] = (), *, module: bool = False) -> None:
        self.name = name
        self.arguments = tuple(arguments)
        self.is_module = module
        self._content: bytes | None = None  # of a file; None where the import system finds what to execute
        if not module and pkgutil.get_importer(name) is None:
            with io.open_code(os.path.abspath(name)) as file:
                self._content = file.read()

    def settle_in(self) -> None:
        """Give this process the ``sys.argv``, ``sys.path`` and ``__main__`` that python would have given it."""
        sys.argv[:] = ["-m" if self.is_module else self.name, *self.arguments]
        if self._content is None and not self.is_module:
            first = os.path.abspath(self.name)
        elif sys.flags.safe_path:
            first = None
        else:
            first = os.getcwd() if self.is_module else os.path.dirname(os.path.realpath(self.name))
        if not sys.flags.safe_path:
            del sys.path[:1]  # the place of the command
        if first is not None:
            sys.path.insert(0, first)
        main = ModuleType("__main__")
        vars(main).update(__builtins__=builtins, __annotations__={})
        sys.modules["__main__"] = main

    def execute(self) -> SystemExit | None:
        """Execute it; returns how it asked to be left, if it did.

        What it raises goes on, and the traceback that `sys.excepthook` gets begins where python's would.
        """
        try:
            _begin(self._start)
        except SystemExit as leaving:
            return leaving
        except BaseException:
            sys.excepthook = _without_ours(sys.excepthook)
            raise
        return None

    def _start(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        """What is to be called, with which arguments."""
        if self._content is None:
            run_module: Callable[..., object] = runpy._run_module_as_main  # type: ignore[attr-defined] # what ``python -m`` calls
            return run_module, ((self.name, True) if self.is_module else ("__main__", False))
        path, main = os.path.abspath(self.name), vars(sys.modules["__main__"])
        main.update(__file__=path, __cached__=None, __loader__=SourceFileLoader("__main__", path))
        return exec, (_compiled(self._content, path), main)


def _compiled(content: bytes, path: str) -> CodeType:
    """What a file holds, compiled already or not."""
    compiled: CodeType | None = pkgutil.read_code(io.BytesIO(content))  # a .pyc
    return compiled or compile(content, path, "exec", dont_inherit=True)


def _begin(start: Callable[[], tuple[Callable[..., object], tuple[object, ...]]]) -> None:
    function, arguments = start()
    function(*arguments)


def _without_ours(hook: _Hook) -> _Hook:
    """A hook that calls another one with a traceback that begins where the script does."""

    def shown(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        inner = trace
        while inner is not None and inner.tb_frame.f_code is not _begin.__code__:
            inner = inner.tb_next
        if inner is not None:
            trace = _started(inner.tb_next)
            error = error.with_traceback(trace)
        hook(kind, error, trace)

    return shown


def _started(trace: TracebackType | None) -> TracebackType | None:
    """Without what prepares the start: a script that does not compile has no traceback."""
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return trace
