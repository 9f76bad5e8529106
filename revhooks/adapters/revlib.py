"""revlib: a sequence runs as a chain of half-steps of ours, with its modules and its coupling functions, in every memory mode.

What moves parameters to another device, or takes optimizer steps during backward, runs as it is.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import ADDITIVE, Law
from ..registry import register
from .table import LEAVE, Adapter, Block
from .twins import Branch, ChainTwin, OtherOutputError, is_bare, twin_of, unbracketed

__all__ = ["ADAPTER"]


class _Half(nn.Module):
    """One module of a sequence on its own: ``(x0, x1) -> (x1, coupling(x0, net(x1)))``."""

    def __init__(self, net: nn.Module, law: Law) -> None:
        super().__init__()
        self.branch = Branch(net)
        self.law = law

    def forward(self, x0: Tensor, x1: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return x1, self.law.forward(x0, self.branch(x1, *args, **kwargs))

    def inverse(self, x1: Tensor, y1: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.law.inverse(y1, self.branch(x1, *args, **kwargs)), x1


register(_Half, inverse="inverse", branches="branch")


def _is_additive(wrapper: Any) -> bool:
    core = sys.modules["revlib.core"]
    known = (core.additive_coupling_forward, core.additive_coupling_inverse)
    return (wrapper.coupling_forward, wrapper.coupling_inverse) == known


def _law(wrapper: Any) -> Law:
    """The coupling of a `ReversibleWrapper`, whose functions may lead to it: they are not held."""
    if _is_additive(wrapper):
        return ADDITIVE
    reference = weakref.ref(wrapper)

    def forward(x: Tensor, update: Tensor) -> Tensor:
        found: Any = reference()
        y: Tensor = found.coupling_forward(x, update)
        return y

    def inverse(y: Tensor, update: Tensor) -> Tensor:
        found: Any = reference()
        x: Tensor = found.coupling_inverse(y, update)
        return x

    return Law(forward, inverse)


def _stays(module: Any) -> bool:
    """Whether a `ReversibleModule` does what no chain of ours does."""
    return bool(module.target_device) or module.fused_optimizer is not None


def _looks(module: Any) -> tuple[object, ...]:
    return module.wrapped_module.wrapped_module, _is_additive(module.wrapped_module)


def _module(module: Any, inp: Any, *args: Any, **kwargs: Any) -> Any:
    core = sys.modules["revlib.core"]

    wrapper, (x0, x1, *back) = module.wrapped_module, inp
    if not _stays(module) and isinstance(x0, Tensor) and isinstance(x1, Tensor) and is_bare([wrapper]):
        half = twin_of(module, _looks(module), lambda: _Half(wrapper.wrapped_module, _law(wrapper)))
        try:
            return (*half(x0, x1, *args, **kwargs), *back)
        except OtherOutputError:
            pass
    return unbracketed(core.ReversibleModule.forward)(module, inp, *args, **kwargs)


def _sequence(sequence: Any, inp: Any, *args: Any, layerwise_args_kwargs: Any = None, **kwargs: Any) -> Any:
    core = sys.modules["revlib.core"]

    modules, dim = list(sequence), sequence.split_dim

    def make() -> ChainTwin:
        wrappers = [module.wrapped_module for module in modules]
        return ChainTwin([Branch(one.wrapped_module) for one in wrappers], [_law(one) for one in wrappers], dim=dim)

    fits = dim is not None and modules and layerwise_args_kwargs is None
    if fits and all(type(one) is core.ReversibleModule and not _stays(one) for one in modules):
        bare = is_bare(modules) and is_bare([one.wrapped_module for one in modules])
        twin = twin_of(sequence, (dim, *(look for one in modules for look in _looks(one))), make)
        if bare and twin.takes(inp):
            try:
                found = twin(inp, *args, **kwargs)
            except OtherOutputError:
                pass
            else:
                return torch.cat(found.chunk(2, dim)[::-1], dim) if len(modules) % 2 else found
    kwargs["layerwise_args_kwargs"] = layerwise_args_kwargs
    return unbracketed(core.ReversibleSequential.forward)(sequence, inp, *args, **kwargs)


ADAPTER = Adapter(
    library="revlib",
    versions="1.7.2",
    blocks=(
        Block(
            "revlib.core:ReversibleSequential",
            LEAVE,
            why="a chain of revhooks runs in its place, with its modules; with target_device or fused_optimizer it runs as it is",
            instead={"forward": _sequence},
        ),
        Block(
            "revlib.core:ReversibleModule",
            LEAVE,
            why="a half-step that is inverted runs in its place; with target_device or fused_optimizer it runs as it is",
            instead={"forward": _module},
        ),
        Block(
            "revlib.core:SingleBranchReversibleModule MergeCalls",
            LEAVE,
            why="it calls ReversibleModule, whose streams go through a list of its own",
        ),
    ),
)
ADAPTER.install()
