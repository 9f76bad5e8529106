"""The contenders of `semantics.py`: the same chain of couplings, built each library's best way.

A contender gets the branches ``f1, g1, f2, g2, ...`` and returns a module that maps ``(B, 2 * width, *)`` to the same
shape. Options are what its documentation offers for cases that its default cannot do; none of them turns its saving off.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import random
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import revhooks
from revhooks.nn import AdditiveCoupling, ReversibleSequential

Branches = list[nn.Module]
Options = dict[str, Any]
Build = Callable[[Branches, Options], nn.Module]


class Chain(nn.Module):
    """Blocks one after the other; extra arguments go to each."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for block in self.blocks:
            x = self.call(block, x, *args, **kwargs)
        return x

    def call(self, block: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return block(x, *args, **kwargs)


def halves(x: Tensor) -> list[Tensor]:
    return [half.contiguous() for half in x.chunk(2, 1)]


class PlainCoupling(nn.Module):
    """``y1 = x1 + f(x2)``, ``y2 = x2 + g(y1)``: the reference."""

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        self.f, self.g = f, g

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x1, x2 = halves(x)
        y1 = x1 + self.f(x2, *args, **kwargs)
        return torch.cat([y1, x2 + self.g(y1, *args, **kwargs)], 1)


class RegisteredCoupling(PlainCoupling):
    """Stands for a third-party block: revhooks knows only its inverse."""

    def inverse(self, y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y1, y2 = halves(y)
        x2 = y2 - self.g(y1, *args, **kwargs)
        return torch.cat([y1 - self.f(x2, *args, **kwargs), x2], 1)


class CheckpointedChain(Chain):
    def call(self, block: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return checkpoint(block, x, *args, use_reentrant=False, **kwargs)


class Seeded(nn.Module):
    """Seeds torch from Python's generator before each call, as RevTorch's ``fix_random_seed`` does in forward."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(random.randint(0, sys.maxsize))
        return self.branch(x)


def couple(kind: Callable[..., nn.Module], branches: Branches) -> list[nn.Module]:
    return [kind(f, g) for f, g in zip(branches[::2], branches[1::2], strict=True)]


def plain(branches: Branches, options: Options) -> nn.Module:
    return Chain(couple(PlainCoupling, branches))


def revhooks_registered(branches: Branches, options: Options) -> nn.Module:
    if revhooks.registered(RegisteredCoupling) is None:
        revhooks.register(RegisteredCoupling, inverse="inverse")
    return Chain(couple(RegisteredCoupling, branches))


def memcnn_chain(branches: Branches, options: Options) -> nn.Module:
    import memcnn

    given = {"keep_input": False, "preserve_rng_state": True, **options}
    return Chain([memcnn.InvertibleModuleWrapper(block, **given) for block in couple(memcnn.AdditiveCoupling, branches)])


def revlib_chain(branches: Branches, options: Options) -> nn.Module:
    import revlib

    mode = revlib.MemoryModes[options.get("memory_mode", "autograd_function")]
    return revlib.ReversibleSequential(*branches, split_dim=1, memory_mode=mode)


def revtorch_chain(branches: Branches, options: Options) -> nn.Module:
    from revtorch.revtorch import ReversibleBlock, ReversibleSequence

    seed, eager = options.get("fix_random_seed", False), options.get("eagerly_discard_variables", True)
    blocks = couple(lambda f, g: ReversibleBlock(f, g, split_along_dim=1, fix_random_seed=seed), branches)
    return ReversibleSequence(nn.ModuleList(blocks), eagerly_discard_variables=eager)


def revtorch_plain(branches: Branches, options: Options) -> nn.Module:
    """With ``fix_random_seed`` its noise is another than plain's: compare with plain autograd under that noise."""
    return plain([Seeded(b) for b in branches] if options.get("fix_random_seed") else branches, options)


def invtorch_chain(branches: Branches, options: Options) -> nn.Module:
    from semantics_invtorch import InvertibleCoupling

    blocks = couple(InvertibleCoupling, branches)
    for block in blocks:
        for name, value in options.items():
            setattr(block, name, value)
    return Chain(blocks)


def momentum(*, backprop: bool) -> Build:
    def build(branches: Branches, options: Options) -> nn.Module:
        from momentumnet import MomentumNet

        return MomentumNet(branches, gamma=0.9, use_backprop=backprop)

    return build


@dataclass(frozen=True)
class Contender:
    """One way to train a chain.

    Attributes:
        chain: builds the net that saves memory.
        plain: builds the net that it is compared with, trained in plain autograd.
        package: what to look up the version of.
        options: what is tried in turn where the default does not do a case.
        context: what a step runs in.
        full_width: whether branches get both streams' channels.
        tolerance: relative, for what is float64 everywhere else.
        unable: why a case cannot be said, by its name.
        twin: options of ``chain`` that train the same net without saving memory; ``None`` where there are none.
    """

    chain: Build
    package: str
    plain: Build = plain
    options: tuple[Options, ...] = ()
    context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    full_width: bool = False
    tolerance: float = 1e-8
    unable: dict[str, str] = field(default_factory=dict)
    twin: Build | None = None

    @property
    def version(self) -> str:
        return importlib.metadata.version(self.package)


def hooks(build: Build) -> Contender:
    return Contender(build, "revhooks", context=revhooks.reversible, twin=build)


ONE_TENSOR = "a block takes one tensor and passes nothing on to its branches"
CONTENDERS: dict[str, Contender] = {
    "plain": Contender(plain, "torch", twin=plain),
    "revhooks": hooks(lambda branches, _: Chain(couple(AdditiveCoupling, branches))),
    "revhooks sequential": hooks(lambda branches, _: ReversibleSequential(*branches)),
    "revhooks registered": hooks(revhooks_registered),
    "checkpoint": Contender(lambda branches, _: CheckpointedChain(couple(PlainCoupling, branches)), "torch", twin=plain),
    "memcnn": Contender(
        memcnn_chain,
        "memcnn",
        options=({"num_bwd_passes": 2}, {"keep_input": True}),
        unable={"mask": ONE_TENSOR, "keyword": ONE_TENSOR},
        twin=lambda branches, _: memcnn_chain(branches, {"disable": True}),
    ),
    "revlib": Contender(
        revlib_chain,
        "revlib",
        options=({"memory_mode": "checkpoint"}, {"memory_mode": "autograd_graph"}),
        twin=lambda branches, _: revlib_chain(branches, {"memory_mode": "no_savings"}),
    ),
    "RevTorch": Contender(
        revtorch_chain,
        "revtorch",
        plain=revtorch_plain,
        options=({"fix_random_seed": True}, {"eagerly_discard_variables": False}),
        unable={"mask": ONE_TENSOR, "keyword": ONE_TENSOR, "keys": "its blocks cannot be trained plainly"},
    ),
    "invtorch": Contender(
        invtorch_chain,
        "invtorch",
        options=({"invertible": False},),
        unable={"keyword": "keyword arguments are its own"},
        twin=lambda branches, _: invtorch_chain(branches, {"checkpoint": False}),
    ),
    "momentumnet": Contender(
        momentum(backprop=False),
        "momentumnet",
        plain=momentum(backprop=True),
        full_width=True,
        tolerance=1e-3,  # it keeps velocities in float32 and gamma as a fraction of 2**16
        unable={"keyword": "keyword arguments are dropped"},
        twin=momentum(backprop=True),
    ),
}
