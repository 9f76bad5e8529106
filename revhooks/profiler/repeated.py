"""Finds the blocks that a model repeats: what replaying and checkpointing are worth the most for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ..adapters import adapt
from ..registry import lookup

__all__ = ["Repeated", "repeated_blocks", "to_replay"]


@dataclass(frozen=True, slots=True)
class Repeated:
    """A class of blocks that a model repeats.

    Attributes:
        cls: the class.
        blocks: its instances that are repeated, in order of the model, each once.
        leaves: how many modules without children lie in them.
    """

    cls: type[nn.Module]
    blocks: tuple[nn.Module, ...]
    leaves: int

    @property
    def name(self) -> str:
        """The class's name."""
        return self.cls.__name__

    @property
    def cost(self) -> float:
        """What checkpointing of each is about to hold: one input a block, and one block's inside at a time."""
        return len(self.blocks) + self.leaves / len(self.blocks)


def repeated_blocks(model: nn.Module) -> list[Repeated]:
    """The classes of which a module has two siblings or more with modules and parameters inside, the best to replay first.

    Containers (`torch.nn.Sequential`, `torch.nn.ModuleList`) are blocks only where nothing else is repeated, since their class is
    that of many other things too.

    Args:
        model: any module.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16)
        >>> found = repeated_blocks(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False))
        >>> [(one.name, len(one.blocks)) for one in found]
        [('TransformerEncoderLayer', 3)]
    """
    groups: dict[type[nn.Module], dict[nn.Module, None]] = {}
    for parent in model.modules():
        by_class: dict[type[nn.Module], list[nn.Module]] = {}
        for child in parent.children():
            if _is_block(child):
                by_class.setdefault(type(child), []).append(child)
        for cls, siblings in by_class.items():
            if len(siblings) > 1:
                groups.setdefault(cls, {}).update(dict.fromkeys(siblings))
    own = {cls: blocks for cls, blocks in groups.items() if cls not in _CONTAINERS} or groups
    found = [Repeated(cls, tuple(blocks), sum(1 for _ in _leaves(blocks))) for cls, blocks in own.items()]
    return sorted(found, key=lambda one: one.cost)


def to_replay(model: nn.Module) -> list[Repeated]:
    """The repeated blocks to replay: of the best class, and others beside them. What is registered inverts, which is better.

    Example:
        >>> from revhooks.nn import AdditiveCoupling
        >>> couplings = (AdditiveCoupling(nn.Linear(2, 2), nn.Linear(2, 2), dim=-1) for _ in range(4))
        >>> plain = (nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))
        >>> [one.name for one in to_replay(nn.Sequential(*couplings))], len(to_replay(nn.Sequential(*plain)))
        ([], 1)
    """
    adapt()
    chosen: list[Repeated] = []
    touched: set[nn.Module] = set()  # what was chosen, and what lies in it
    for one in repeated_blocks(model):
        inside = {module for block in one.blocks for module in block.modules()}
        if lookup(one.cls) is None and not inside & touched:
            touched |= inside
            chosen.append(one)
    return chosen


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _is_block(module: nn.Module) -> bool:
    """Whether it has an inside, and something to learn; lists are called by nobody."""
    has_inside = next(module.children(), None) is not None
    return has_inside and type(module) not in _CONTAINERS[1:] and next(module.parameters(), None) is not None


def _leaves(blocks: dict[nn.Module, None]) -> Iterator[nn.Module]:
    seen = {module: None for block in blocks for module in block.modules()}
    return (module for module in seen if next(module.children(), None) is None)
