"""RevTorch: a sequence runs as a chain of half-steps of ours, with its branches, outside of its own function.

That function calls its blocks without a graph, and ``backward()`` of each branch in backward. Here they have a graph like any
other: gradients reach what else the branches depend on, and buffers are updated once.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from typing import Any

from torch import Tensor

from ..functional import ADDITIVE
from .table import LEAVE, Adapter, Block
from .twins import Branch, ChainTwin, OtherOutputError, is_bare, twin_of, unbracketed

__all__ = ["ADAPTER"]


def _seed(block: weakref.ref[Any], namespace: str) -> None:
    """As the block does before each branch: one that asks for it seeds the generator."""
    found = block()
    if found is not None:
        found._init_seed(namespace)


def _sequence(sequence: Any, x: Tensor) -> Any:
    blocks = list(sequence.reversible_blocks)
    dims = {block.split_along_dim for block in blocks}
    looks = (*blocks, *dims, *(part for block in blocks for part in (block.f_block, block.g_block)))

    def make() -> ChainTwin:
        branches = []
        for block in blocks:
            seed = functools.partial(_seed, weakref.ref(block))
            branches.append(Branch(block.f_block, before=functools.partial(seed, "f")))
            branches.append(Branch(block.g_block, before=functools.partial(seed, "g")))
        return ChainTwin(branches, [ADDITIVE] * len(branches), dim=blocks[0].split_along_dim)

    if len(dims) == 1 and is_bare(blocks):
        twin = twin_of(sequence, looks, make)
        if twin.takes(x):
            with contextlib.suppress(OtherOutputError):
                return twin(x)
    return unbracketed(sys.modules["revtorch.revtorch"].ReversibleSequence.forward)(sequence, x)


ADAPTER = Adapter(
    library="revtorch",
    versions="0.2.4",
    blocks=(
        Block(
            "revtorch.revtorch:ReversibleSequence",
            LEAVE,
            why="a chain of revhooks runs in its place, with its branches",
            instead={"forward": _sequence},
        ),
        Block("revtorch.revtorch:ReversibleBlock", LEAVE, why="it runs in a sequence only, without a graph"),
    ),
)
ADAPTER.install()
