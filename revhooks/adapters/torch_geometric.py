"""PyTorch Geometric: grouped reversible graph networks; the function that frees the memory of their inputs is not run."""

from __future__ import annotations

from typing import Any

from .table import Adapter, Block, alone

__all__ = ["ADAPTER"]


def _forward(module: Any, *args: Any) -> Any:
    return alone(module._forward(*args))


def _inverse(module: Any, *args: Any) -> Any:
    return alone(module._inverse(*args))


def _undo_forward(module: Any, output: Any, *args: Any) -> Any:
    return _inverse(module, *(output if isinstance(output, tuple) else (output,)), *args)


def _undo_inverse(module: Any, output: Any, *args: Any) -> Any:
    return _forward(module, *(output if isinstance(output, tuple) else (output,)), *args)


ADAPTER = Adapter(
    library="torch_geometric",
    versions="2.8.1",
    blocks=(
        Block(
            "torch_geometric.nn.models.rev_gnn:InvertibleModule",
            methods={"forward": _undo_forward, "inverse": _undo_inverse},
            why="GroupAddRev, and what else is derived from it",
            instead={"forward": _forward, "inverse": _inverse},
        ),
    ),
)
ADAPTER.install()
