"""memcnn: its wrapper's own function, which frees the memory of what it is given, is not run; the coupling inside is.

An additive coupling has a twin of ours, which is rebuilt branch by branch. Any other ``fn`` is inverted by its ``inverse``. Under
autocast on a GPU memcnn computes in float32, and so does what runs here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import ADDITIVE
from ..registry import Inverse, Registration, add, lookup
from .table import LEAVE, Adapter, Block, alone
from .twins import Branch, ChainTwin, OtherOutputError, twin_of

__all__ = ["ADAPTER"]


def _call(wrapper: Any, call: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
    if not wrapper.disable and torch.is_autocast_enabled("cuda") and any(one.is_cuda for one in inputs):
        with torch.autocast("cuda", enabled=False):
            return alone(call(*(one.float() if one.is_floating_point() else one for one in inputs)))
    return alone(call(*inputs))


def _forward(wrapper: Any, *inputs: Any) -> Any:
    _know(wrapper._fn)
    return _call(wrapper, wrapper._fn if wrapper.disable else wrapper._fn.forward, inputs)


def _inverse(wrapper: Any, *inputs: Any) -> Any:
    _know(wrapper._fn)
    return _call(wrapper, wrapper._fn.inverse, inputs)


def _know(fn: nn.Module) -> None:
    """Register what somebody has wrapped; in both directions, as the wrapper has it."""
    cls = type(fn)
    if lookup(cls) is None and not hasattr(cls.forward, "__revhooks__"):
        for method, inverse in (("forward", "inverse"), ("inverse", "forward")):
            if callable(getattr(cls, method, None)):
                add(Registration(cls, inverse, method, adapter="memcnn", assumed=True))


def _additive(block: Any, x: Tensor) -> Any:
    f, g, dim = block.Fm, block.Gm, block.split_dim

    def make() -> ChainTwin:
        return ChainTwin([Branch(f, direct=True), Branch(g, direct=True)], [ADDITIVE] * 2, dim=dim)

    twin = twin_of(block, (f, g, dim), make)
    try:
        return twin(x) if twin.takes(x) else _additive_law(block, x)
    except OtherOutputError:
        return _additive_law(block, x)


def _additive_law(block: Any, x: Tensor) -> Tensor:
    x1, x2 = (part.contiguous() for part in x.chunk(2, block.split_dim))
    y1 = x1 + block.Fm.forward(x2)
    return torch.cat([y1, x2 + block.Gm.forward(y1)], block.split_dim)


def _additive_inverse(block: Any, y: Tensor) -> Tensor:
    y1, y2 = (part.contiguous() for part in y.chunk(2, block.split_dim))
    x2 = y2 - block.Gm.forward(y1)
    return torch.cat([y1 - block.Fm.forward(x2), x2], block.split_dim)


def _affine(block: Any, x: Tensor) -> Tensor:
    x1, x2 = (part.contiguous() for part in x.chunk(2, block.split_dim))
    scale, shift = block.Fm.forward(x2)
    y1 = x1 * scale + shift
    scale, shift = block.Gm.forward(y1)
    return torch.cat([y1, x2 * scale + shift], block.split_dim)


def _affine_inverse(block: Any, y: Tensor) -> Tensor:
    y1, y2 = (part.contiguous() for part in y.chunk(2, block.split_dim))
    scale, shift = block.Gm.forward(y1)
    x2 = (y2 - shift) / scale
    scale, shift = block.Fm.forward(x2)
    return torch.cat([(y1 - shift) / scale, x2], block.split_dim)


def _parts(block: nn.Module) -> list[nn.Module]:
    return [block.Fm, block.Gm]  # type: ignore[list-item]


_BOTH: dict[str, Inverse | None] = dict.fromkeys(("forward", "inverse"))

ADAPTER = Adapter(
    library="memcnn",
    versions="1.5.2",
    blocks=(
        Block(
            "memcnn.models.revop:InvertibleModuleWrapper",
            methods=_BOTH,
            why="what it wraps is called in its place, and inverted",
            instead={"forward": _forward, "inverse": _inverse},
        ),
        Block(
            "memcnn.models.additive:AdditiveCoupling",
            LEAVE,
            why="a coupling of revhooks runs in its place, with its branches",
            instead={"forward": _additive},
        ),
        Block(
            "memcnn.models.additive:AdditiveCoupling",
            methods={"inverse": _additive},
            instead={"inverse": _additive_inverse},
            branches=_parts,
        ),
        Block(
            "memcnn.models.affine:AffineCoupling",
            methods={"forward": _affine_inverse, "inverse": _affine},
            instead={"forward": _affine, "inverse": _affine_inverse},
            branches=_parts,
        ),
    ),
)
ADAPTER.install()
