"""Ways of taking a training step: plain, under ``reversible()`` with this and that, and under `torch.utils.checkpoint`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from ..adapters import adapt
from ..context import reversible
from ..registry import lookup
from .repeated import repeated_blocks

__all__ = ["BUDGETS", "PLAIN", "QUICK", "REVERSIBLE", "Way", "ways_of"]

BUDGETS = (0.5, 0.25)  # of what plain autograd holds
_CLASSES = 3  # so many of the repeated classes are tried


@dataclass(frozen=True, slots=True)
class Way:
    """A way of taking a step. It belongs to no model: the same serves for a copy, and for the model in another size.

    Attributes:
        name: what tables call it: ``plain``, ``reversible()``, ``replay=Block``, ``budget=25%``, ``checkpoint Block`` ...
        code: what to write for it; empty where there is nothing to write.
        replay: the class of the blocks that are replayed.
        checkpoint: the class of the blocks that are checkpointed.
        share: the budget as a share of what plain autograd holds after forward.
        reverse: under ``reversible()``.
        offload: with what must be kept in host memory.
    """

    name: str
    code: str = ""
    replay: type[nn.Module] | None = None
    checkpoint: type[nn.Module] | None = None
    share: float | None = None
    reverse: bool = True
    offload: bool = False

    def around(self, model: nn.Module, plain_bytes: int = 0) -> contextlib.AbstractContextManager[Any]:
        """The context for one forward and backward of ``model``; gives the run of ``reversible()``, or ``None``.

        Args:
            model: whose step it is.
            plain_bytes: what plain autograd holds after forward; a budget is a share of it.

        Example:
            >>> import torch
            >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3)
            >>> for way in ways_of(model):
            ...     with way.around(model, plain_bytes=1 << 16):
            ...         model(torch.randn(4, 2, 8)).square().mean().backward()
        """
        if self.checkpoint is not None:
            return _checkpointed(model, self.checkpoint)
        if not self.reverse:
            return contextlib.nullcontext()
        options: dict[str, Any] = {}
        if self.replay is not None:
            options["replay"] = self.replay
        if self.share is not None:
            options["budget"] = _size(self.share * plain_bytes)
        return reversible(**options, offload=self.offload)

    def code_for(self, plain_bytes: int) -> str:
        """What to write, with the budget in bytes."""
        if self.share is None:
            return self.code
        replay = {} if self.replay is None else {"replay": self.replay.__name__}
        return _code(budget=f'"{_size(self.share * plain_bytes)}"', **replay)


def _size(nbytes: float) -> str:
    """A budget as one would write it.

    Example:
        >>> _size(17770955), _size(3000), _size(10)
        ('16MiB', '2KiB', '1KiB')
    """
    return f"{int(nbytes) >> 20}MiB" if nbytes >= 10 << 20 else f"{max(1, int(nbytes) >> 10)}KiB"


def _code(**options: object) -> str:
    return f"with revhooks.reversible({', '.join(f'{name}={value}' for name, value in options.items())}):"


PLAIN = Way("plain", reverse=False)
REVERSIBLE = Way("reversible()", _code())
QUICK = (PLAIN, REVERSIBLE)


def ways_of(model: nn.Module, *, budgets: Sequence[float] = BUDGETS, offload: bool = False) -> list[Way]:
    """The ways that are worth a try for a model; the first is plain, the second ``reversible()`` as it is.

    Args:
        model: any module; its repeated blocks are found (`repeated_blocks`).
        budgets: shares of what plain autograd holds; blocks that have no inverse are replayed under them.
        offload: add ``reversible(offload=True)``, for a model on CUDA.

    Example:
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3)
        >>> [way.name for way in ways_of(model, budgets=[0.5])]
        ['plain', 'reversible()', 'replay=TransformerEncoderLayer', 'budget=50%, replay', 'checkpoint TransformerEncoderLayer']
    """
    adapt()
    found = [one.cls for one in repeated_blocks(model)[:_CLASSES]]
    replayed = [cls for cls in found if lookup(cls) is None]  # the others are inverted
    ways = [*QUICK]
    ways += [Way(f"replay={cls.__name__}", _code(replay=cls.__name__), replay=cls) for cls in replayed]
    for share in budgets:
        if replayed:
            ways.append(Way(f"budget={share:.0%}, replay", "", replay=replayed[0], share=share))
        else:
            ways.append(Way(f"budget={share:.0%}", "", share=share))
    if offload:
        ways.append(Way("offload=True", _code(offload=True), offload=True))
    for cls in found:
        code = f"torch.utils.checkpoint.checkpoint({cls.__name__}, ..., use_reentrant=False)"
        ways.append(Way(f"checkpoint {cls.__name__}", code, checkpoint=cls, reverse=False))
    return ways


@contextlib.contextmanager
def _checkpointed(model: nn.Module, cls: type[nn.Module]) -> Iterator[None]:
    """Checkpoint the repeated blocks of a class inside; hooks of theirs run once, as without."""
    blocks = next((one.blocks for one in repeated_blocks(model) if one.cls is cls), ())
    inner = {part for block in blocks for part in block.modules() if part is not block}
    outer = [block for block in blocks if block not in inner]
    before = [vars(block).get("forward") for block in outer]
    try:
        for block in outer:
            vars(block)["forward"] = functools.partial(_recomputed, block.forward)
        yield
    finally:
        for block, forward in zip(outer, before, strict=True):
            if forward is None:
                vars(block).pop("forward", None)
            else:
                vars(block)["forward"] = forward


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A call that is checkpointed, without a cache of keys and values: it would grow once more when the call is repeated."""
    args = tuple([None if _is_cache(value) else value for value in args])
    kwargs = {name: None if _is_cache(value) else value for name, value in kwargs.items()}
    if kwargs.get("use_cache"):
        kwargs["use_cache"] = False
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _is_cache(value: Any) -> bool:
    """Whether it is a cache of the transformers library, which gives one to each layer in training too."""
    return any(kind.__name__ == "Cache" and kind.__module__.startswith("transformers.") for kind in type(value).__mro__)
