"""A line that stays at the bottom of a terminal while a script writes above it."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable

__all__ = ["StatusLine"]

_SAVE, _RESTORE = "\x1b7", "\x1b8"
_DOWN_AND_UP = "\x1bD\x1b[1A"  # in the same column; at the bottom the screen scrolls by a line


class StatusLine:
    """The last line of a terminal, out of reach of what else is written: all other lines are made its scroll region.

    Args:
        fd: the terminal.
        every: seconds between two paints, at least.
        clock: gives the time in seconds.
    """

    def __init__(self, fd: int, *, every: float = 0.5, clock: Callable[[], float] = time.monotonic) -> None:
        self._fd = fd
        self._every = every
        self._clock = clock
        self._due = 0.0
        self._size: os.terminal_size | None = None  # for which the scroll region is set
        self._process = os.getpid()

    @classmethod
    def on_stderr(cls) -> StatusLine | None:
        """That of standard error; ``None`` where it is no terminal, or one that cannot do it."""
        if os.name != "posix" or os.environ.get("TERM", "dumb") == "dumb":
            return None
        try:
            fd = sys.stderr.fileno()
        except (AttributeError, OSError, ValueError):
            return None
        return cls(fd) if os.isatty(fd) else None

    @property
    def is_due(self) -> bool:
        """Whether the last paint is long enough ago."""
        return self._clock() >= self._due

    def paint(self, text: str) -> None:
        """Show a text, cut to the width that the terminal has now."""
        self._due = self._clock() + self._every
        with contextlib.suppress(OSError):
            size = os.get_terminal_size(self._fd)
            if size.lines < 3:
                return
            codes = self._reserve(size) if size != self._size else ""
            codes += f"{_SAVE}\x1b[{size.lines};1H\x1b[2K\x1b[7m{text[: size.columns - 1]}\x1b[0m{_RESTORE}"
            self._write(codes)

    def close(self) -> None:
        """Give the line back."""
        if self._size is not None:
            self._write(self._release(self._size))
            self._size = None

    def _reserve(self, size: os.terminal_size) -> str:
        codes = self._release(self._size) if self._size is not None else ""
        self._size = size
        return f"{codes}{_DOWN_AND_UP}{_SAVE}\x1b[1;{size.lines - 1}r{_RESTORE}"

    def _release(self, size: os.terminal_size) -> str:
        return f"{_SAVE}\x1b[r\x1b[{size.lines};1H\x1b[2K{_RESTORE}"

    def _write(self, codes: str) -> None:
        """In one piece, past all buffers; what a process has forked leaves the terminal alone."""
        if os.getpid() == self._process:
            with contextlib.suppress(OSError):
                os.write(self._fd, codes.encode())
