"""Writes a record to files: as JSON, a page, a picture, a trace, or stacks for a flame graph."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from ..record import Record
from .flamegraph import flamegraph
from .html import html
from .svg import svg
from .trace import trace

__all__ = ["FORMATS", "refuse", "save"]

# by what they are called: how a record is written, and endings that ask for it
FORMATS: dict[str, tuple[Callable[[Record], str], tuple[str, ...]]] = {
    "html": (html, (".html", ".htm")),
    "svg": (svg, (".svg",)),
    "trace": (trace, (".trace.json", ".perfetto.json")),
    "flamegraph": (flamegraph, (".folded", ".collapsed")),
    "json": (lambda record: record.to_json() + "\n", (".json",)),
}


def refuse(paths: Iterable[str | Path], *, force: bool = False) -> None:
    """Refuse to overwrite, and to write where nothing can be written: before anything is measured.

    Args:
        paths: of the files to be written.
        force: overwrite files.

    Raises:
        OSError: one of the files is there, is a directory, or lies in one that is not there or not writable.
    """
    for path in map(Path, paths):
        if path.is_dir():
            raise IsADirectoryError(f"{path}: expected a file, got a directory. Remedy: name a file in it.")
        if path.is_file() and not force:
            raise FileExistsError(f"{path}: expected a new file, got one that is there. Remedy: -f overwrites it.")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{path}: expected a directory {path.parent}, got none. Remedy: make it first.")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise PermissionError(f"{path}: expected a place to write to, got one that is not writable. Remedy: name another.")


def save(record: Record, path: str | Path, kind: str = "") -> None:
    """Write a record.

    Args:
        record: what to write.
        path: where; what is there is overwritten.
        kind: one of `FORMATS`; by default the one that the ending of the path asks for, or JSON.
    """
    wanted = kind or next((one for one, (_, ends) in FORMATS.items() if str(path).endswith(ends)), "json")
    Path(path).write_text(FORMATS[wanted][0](record), encoding="utf-8")
