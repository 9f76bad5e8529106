"""Batch statistics: a call that is run again normalises with those that it computed in forward.

A batch norm in training goes over its input for the mean and the deviation, and once more to normalise; the first takes most of
its time on a CPU. Autograd saves both: a few numbers a channel, which are worth holding.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..ops import SAME_ON_CPU, Normalise
from ..registry import unbracketed
from ..state import overwrite_copies
from ..storage import Held, Ledger, storage_key
from .local import LOCAL
from .slots import Slots

__all__ = ["Statistics"]

WORTH = 4096  # elements a channel; below, what is held is no trifle, and what is spared is
_FORWARD = unbracketed(_BatchNorm.forward)  # which a class may have under a bracket
_NOTHING = (torch.Size(), (), None, torch.device("meta"))


class _Batch(NamedTuple):
    """What one call of a batch norm computed over its batch."""

    module: _BatchNorm
    mean: Held
    rstd: Held


class Statistics:
    """Of the batch norms in one call, found by their places among what it saved.

    Args:
        slots: what the call saved, before it is let go of.
        modules: the batch norms that it may have called.
        ledger: counts what is held.
    """

    __slots__ = ("_batches", "_modules", "_slots")

    def __init__(self, slots: Slots, modules: Sequence[_BatchNorm], ledger: Ledger) -> None:
        self._slots = slots
        self._batches: dict[int, _Batch] = {}
        known: dict[int, _BatchNorm] = {}
        for module in modules:
            if unbracketed(type(module).forward) is _FORWARD and module.running_mean is not None:
                known[storage_key(module.running_mean)] = module
        for place, key in slots.passed(known):
            found = _found(slots, place, known[key])
            if found is not None:
                self._batches[place - 1] = _Batch(known[key], *(Held(ledger, statistic) for statistic in found))
        self._modules = {batch.module for batch in self._batches.values()}

    def tensors(self) -> Iterator[Tensor]:
        """What it holds."""
        for batch in self._batches.values():
            yield batch.mean.tensor
            yield batch.rstd.tensor

    @contextlib.contextmanager
    def given(self) -> Iterator[frozenset[_BatchNorm]]:
        """Let this thread's calls of the batch norms use them; gives those that leave their buffers alone then."""
        taken = frozenset(module for module in self._modules if "forward" not in module.__dict__)
        thread = threading.get_ident()
        for module in taken:
            module.__dict__["forward"] = functools.partial(self._forward, module, thread)
        try:
            yield taken
        finally:
            for module in taken:
                module.__dict__.pop("forward", None)

    def _forward(self, module: _BatchNorm, thread: int, input: Tensor) -> Any:  # noqa: A002
        if threading.get_ident() != thread:
            return type(module).forward(module, input)
        filling = LOCAL.filling if LOCAL.sink is None else None  # what it saves goes there, not into another frame inside
        batch = self._batches.get(len(filling.saved)) if filling is not None and filling.slots is self._slots else None
        if batch is None or batch.module is not module:
            return _apart(module, input)
        affine, buffers = (module.weight, module.bias), (module.running_mean, module.running_var)
        return Normalise.apply(input, *affine, *buffers, batch.mean.tensor, batch.rstd.tensor, module.eps)


def _found(slots: Slots, place: int, module: _BatchNorm) -> list[Tensor] | None:
    """Mean and deviation of the call that saved the running mean at this place.

    A batch norm saves its input, the running mean, the running variance, the weight if it has one, and these two.
    """
    shape, _, dtype, device = slots.looks(place - 1) or _NOTHING
    if device.type != "cpu" or dtype not in SAME_ON_CPU or shape.numel() < WORTH * module.num_features:
        return None
    if any(parameter is not None and parameter.dtype is not dtype for parameter in (module.weight, module.bias)):
        return None
    first = place + (2 if module.weight is None else 3)
    expected = (torch.Size([module.num_features]), (1,), dtype, device)
    if slots.looks(first) != expected or slots.looks(first + 1) != expected:
        return None
    return [slots.entry(first), slots.entry(first + 1)]


def _apart(module: _BatchNorm, x: Tensor) -> Tensor:
    """A call that writes into copies of its buffers."""
    replaced = overwrite_copies(module)
    try:
        return type(module).forward(module, x)
    finally:
        for owner, name, buffer in replaced:
            owner[name] = buffer
