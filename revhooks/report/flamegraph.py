"""Bytes by module path as collapsed stacks, as ``flamegraph.pl``, speedscope and inferno read them."""

from __future__ import annotations

import re

from ..record import Record

__all__ = ["WHAT", "flamegraph"]

WHAT = {"held": "held_bytes", "saved": "saved_plain_bytes"}
_SEPARATORS = re.compile(r"[;\s]+")


def flamegraph(record: Record, *, what: str = "held") -> str:
    """One line a module: the modules around it and itself, and the bytes that are its own.

    Args:
        record: with modules.
        what: ``"held"`` under ``reversible()``, or ``"saved"`` in plain autograd.

    Raises:
        ValueError: ``what`` is neither.

    Example:
        >>> from revhooks.record import ModuleRow
        >>> rows = ModuleRow("", "GPT", 9, 5), ModuleRow("h.0.mlp", "MLP", 4, 2), ModuleRow("h.0.ln", "LayerNorm", 4, 0)
        >>> print(flamegraph(Record("report", "gpt", "cpu", "2.13.0", modules=rows)), end="")
        model 5
        model;h;0;mlp 2
    """
    if what not in WHAT:
        raise ValueError(f"what=: expected one of {', '.join(map(repr, WHAT))}, got {what!r}. Remedy: pass one of these.")
    stacks: dict[str, int] = {}
    for row in record.modules:
        # a module registered under a name with a blank or a semicolon keeps to its frame
        stack = ";".join(_SEPARATORS.sub("_", name) for name in ("model", *row.path.split(".")) if name)
        stacks[stack] = stacks.get(stack, 0) + getattr(row, WHAT[what])
    return "".join(f"{stack} {nbytes}\n" for stack, nbytes in sorted(stacks.items()) if nbytes)
