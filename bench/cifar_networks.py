"""The six CIFAR networks of the MemCNN paper: three ResNets, and the RevNets that are held against them.

Pre-activation networks of three stages. In a RevNet a block that keeps its input's shape is an additive coupling of two
branches at half the channels; the couplings of a stage are one `revhooks.nn.ReversibleSequential`, which computes what they would
compute one after another. A block that changes shape is a plain residual block in either kind.

What is no part of such a chain is run in *segments*, and the caller says how::

    network("revnet38")                    # as it comes
    network("revnet38", segment=Replayed)  # each segment keeps its input only, and is run again in backward

References:
    He et al., 2016, arXiv:1603.05027: pre-activation, bottleneck branches.
    Gomez et al., 2017, arXiv:1707.04585, section 3.2 and table 2: RevNets.
    Van de Leemput et al., 2019, JOSS 4(39), 1576: MemCNN, whose figures these networks have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

import revhooks
from revhooks.nn import AdditiveCoupling, ReversibleSequential

__all__ = ["NETWORKS", "Replayed", "ResidualBlock", "Spec", "network"]

CLASSES = 10
Segment = Callable[..., nn.Module]  # layers -> what runs them one after another


class Spec(NamedTuple):
    """One network.

    Attributes:
        bottleneck: whether a branch is 1x1-3x3-1x1 with four times the channels at its ends, or 3x3-3x3.
        reversible: whether blocks that keep their shape are couplings.
        blocks: how many blocks each stage has.
        channels: of the stem, then of each stage's 3x3 convolutions.
        parameters: how many there are, with ten classes.
    """

    bottleneck: bool
    reversible: bool
    blocks: int
    channels: tuple[int, int, int, int]
    parameters: int


NETWORKS = {
    "resnet32": Spec(False, False, 5, (16, 16, 32, 64), 466_906),
    "revnet38": Spec(False, True, 3, (32, 32, 64, 112), 573_994),
    "resnet110": Spec(False, False, 18, (16, 16, 32, 64), 1_730_714),
    "revnet110": Spec(False, True, 9, (32, 32, 64, 128), 1_854_890),
    "resnet164": Spec(True, False, 18, (16, 16, 32, 64), 1_704_154),
    "revnet164": Spec(True, True, 9, (32, 32, 64, 128), 1_983_786),
}


class ResidualBlock(nn.Module):
    """``y = shortcut(x) + branch(x)``.

    The shortcut is run first, so that backward comes to it last, when what the branch saved is gone.
    """

    def __init__(self, branch: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.shortcut is None else self.shortcut(x)
        return self.branch(x).add_(residual)


class Replayed(nn.Sequential):
    """A segment that keeps its input only, and is run again in backward."""

    def forward(self, x: Tensor) -> Tensor:
        return revhooks.checkpoint(super().forward, x)


def network(name: str, *, segment: Segment = nn.Sequential) -> nn.Sequential:
    """Build a network, ``(B, 3, 32, 32) -> (B, 10)``; its parameters are the same for every ``segment``.

    Args:
        name: a key of `NETWORKS`.
        segment: what runs ordinary layers: the stem, the branch and the shortcut of each plain block, the classifier. The stem
            and the first block make a segment too, which needs nothing but the image; so the first block is part of no chain even
            where it is a coupling: its input comes from a ReLU, and zeros do not survive inversion.

    Raises:
        KeyError: there is no such network.
    """
    spec = NETWORKS[name]
    stem, *widths = spec.channels
    channels = stem
    modules: list[nn.Module] = []
    for stage, (width, stride) in enumerate(zip(widths, (1, 2, 2), strict=True)):
        blocks = []
        for index in range(spec.blocks):
            blocks.append(_Block(spec.bottleneck, channels, width, 1 if index else stride, activated=stage == index == 0))
            channels = blocks[-1].out
        if stage == 0:
            modules.append(segment(segment(_conv(3, stem, 3), *_activation(stem)), _opening(spec, blocks.pop(0), segment)))
        chained = [block for block in blocks if spec.reversible and block.keeps_shape]
        modules += [_residual(block, segment) for block in blocks if block not in chained]
        if chained:
            modules.append(ReversibleSequential(*(nn.Sequential(*block.halved.layers()) for block in chained for _ in "fg")))
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(*modules, segment(*_activation(channels), *pool, nn.Linear(channels, CLASSES)))
    _initialise(model)
    return model


class _Block(NamedTuple):
    """The shape of a block; ``activated``: its input comes from a ReLU."""

    bottleneck: bool
    channels: int
    width: int
    stride: int
    activated: bool

    @property
    def out(self) -> int:
        return self.width * (4 if self.bottleneck else 1)

    @property
    def keeps_shape(self) -> bool:
        return self.stride == 1 and self.channels == self.out

    @property
    def halved(self) -> _Block:
        """The same for one of two streams."""
        return self._replace(channels=self.channels // 2, width=self.width // 2)

    def layers(self) -> list[nn.Module]:
        """Of its branch."""
        width, stride = self.width, self.stride
        first = [] if self.activated else _activation(self.channels)
        if not self.bottleneck:
            return [*first, _conv(self.channels, width, 3, stride), *_activation(width), _conv(width, width, 3)]
        return [
            *first,
            _conv(self.channels, width, 1), *_activation(width),
            _conv(width, width, 3, stride), *_activation(width),
            _conv(width, 4 * width, 1),
        ]  # fmt: skip


def _opening(spec: Spec, block: _Block, segment: Segment) -> nn.Module:
    """The first block of all."""
    if not (spec.reversible and block.keeps_shape):
        return _residual(block, segment)
    return AdditiveCoupling(*(segment(*block.halved.layers()) for _ in "fg"))


def _residual(block: _Block, segment: Segment) -> nn.Module:
    shortcut = None
    if not block.keeps_shape:
        shortcut = segment(_conv(block.channels, block.out, 1, block.stride), nn.BatchNorm2d(block.out))
    return ResidualBlock(segment(*block.layers()), shortcut)


def _activation(channels: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]


def _conv(channels: int, out: int, kernel: int, stride: int = 1) -> nn.Module:
    return nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, bias=False)


def _initialise(model: nn.Module) -> None:
    """He initialisation by fan-out."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=math.sqrt(2 / (math.prod(module.kernel_size) * module.out_channels)))
