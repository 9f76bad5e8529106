"""Which module of a model runs, by its path: for what is saved in it, and for a trace."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from ..backward import NO_PASS, current_pass
from ..record import Slice

__all__ = ["Paths"]


class Paths:
    """Follows the calls of a model's modules in forward, by hooks for all modules: the model itself is left alone.

    A module that occurs twice has its first path. What is called past ``__call__`` is not seen.

    Args:
        model: whose modules they are.
        now: gives the time in nanoseconds.
        leave: is told the path of the module that ran so far, whenever another begins or goes on.
        enter: is told the path of that one.

    Attributes:
        names: the path of each module.
        calls: how often each path was called.
        slices: when.

    Example:
        >>> import itertools, torch
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> with Paths(model, itertools.count().__next__) as paths:
        ...     y = model(torch.ones(1, 2))
        >>> [(one.name, one.start_ns, one.stop_ns) for one in paths.slices], paths.current
        ([('0', 1, 2), ('1', 3, 4), ('', 0, 5)], '')
    """

    def __init__(
        self,
        model: nn.Module,
        now: Callable[[], int],
        leave: Callable[[str], object] = str,
        enter: Callable[[str], object] = str,
    ) -> None:
        self.names = {module: path for path, module in model.named_modules()}
        self._known = set(self.names.values())
        self._thread = threading.get_ident()
        self.calls: dict[str, int] = {}
        self.slices: list[Slice] = []
        self._now, self._leave, self._enter = now, leave, enter
        self._stack: list[tuple[str, int]] = []
        self._left = contextlib.ExitStack()

    @property
    def current(self) -> str:
        """The path of the module that runs; ``""`` is the model itself and what is around it."""
        return self._stack[-1][0] if self._stack else ""

    def name_of(self, module: nn.Module) -> str:
        """How a run calls a module."""
        return self.names.get(module, "") or "model"

    def path_of(self, what: str) -> str:
        """The path in what a run calls a place: ``h.0 (Block)``, or a path; ``""`` for what is no part of the model."""
        path = what.partition(" (")[0]
        return path if path in self._known else ""

    def __enter__(self) -> Paths:
        """Begin."""
        self._left.callback(register_module_forward_pre_hook(self._before).remove)
        self._left.callback(register_module_forward_hook(self._after, always_call=True).remove)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End."""
        self._left.close()
        self._enter("")

    def _before(self, module: nn.Module, _: Any) -> None:
        path = self.names.get(module)
        if path is not None and self._is_here():
            self._leave(self.current)
            self._stack.append((path, self._now()))
            self._enter(path)
            self.calls[path] = self.calls.get(path, 0) + 1

    def _after(self, module: nn.Module, _args: Any, _output: Any) -> None:
        if self._stack and self._is_here() and self._stack[-1][0] == self.names.get(module):
            self._leave(self.current)
            path, start = self._stack.pop()
            self._enter(self.current)
            self.slices.append(Slice(path, "forward", start, self._now()))

    def _is_here(self) -> bool:
        """Whether it is a call in forward, of the thread that follows them."""
        return current_pass() == NO_PASS and threading.get_ident() == self._thread
