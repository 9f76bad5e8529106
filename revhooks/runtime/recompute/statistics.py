"""Batch statistics: a call that is run again normalises with those that it computed in forward.

A batch norm in training goes over its input for the mean and the deviation, and once more to normalise; the first takes most of
its time on a CPU, where these are used. Autograd saves both: a few numbers a channel, which are worth holding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...ops import SAME_ON_CPU, Normalise, normalises_alike
from ...storage import Held, Ledger, storage_key
from ..handles.local import Filling, packer
from ..policy.guard import DRIFT
from ..policy.sketch import some_of

if TYPE_CHECKING:
    from ..handles.protocols import Stretch

__all__ = ["Statistics"]

WORTH = 4096  # elements a channel; below, what is held is no trifle, and what is spared is
_NOTHING = (torch.Size(), (), None, torch.device("meta"))
_BATCH_NORM = F.batch_norm


class _Batch(NamedTuple):
    """What one batch norm computed over its batch, and some of the elements of that."""

    mean: Held
    rstd: Held
    eps: float
    elements: list[float]


class Statistics:
    """Of the batch norms in one call, found by their places among what it saved.

    Args:
        slots: what the call saved, before it is let go of.
        modules: those that it may have called.
        ledger: counts what is held.
        exact: a replay has to give the same bits.
    """

    __slots__ = ("_batches", "exact")

    def __init__(self, slots: Stretch, modules: Sequence[nn.Module], ledger: Ledger, *, exact: bool) -> None:
        self.exact = exact
        self._batches: dict[int, _Batch] = {}
        known: dict[int, nn.Module] = {}
        for module in modules:
            running_mean = module._buffers.get("running_mean")
            if running_mean is not None:
                known[storage_key(running_mean)] = module
        for place, key in slots.passed(known):
            found = _found(slots, place, known[key])
            if found is not None:
                x, mean, rstd = found
                eps = float(known[key].eps)  # type: ignore[arg-type]
                self._batches[place - 1] = _Batch(Held(ledger, mean), Held(ledger, rstd), eps, some_of(x).tolist())

    def __bool__(self) -> bool:
        return bool(self._batches)

    def tensors(self) -> Iterator[Tensor]:
        """What it holds."""
        for batch in self._batches.values():
            yield batch.mean.tensor
            yield batch.rstd.tensor

    def given(self) -> TorchFunctionMode:
        """A context for a replay, whose batch norms use them where their input is what it was (`is_again`)."""
        return _Given(self)

    def batch(self, x: Tensor, eps: float) -> _Batch | None:
        """The statistics of a batch norm that saves now, of the same input."""
        filling = packer()  # what is saved goes there, not into another frame inside
        if not isinstance(filling, Filling) or filling.slots is None or filling.slots.statistics is not self:
            return None
        batch = self._batches.get(len(filling.saved))
        if batch is None or batch.eps != eps:
            return None
        return batch if self._is_again(some_of(x.detach()), batch.elements) else None

    def _is_again(self, elements: Tensor, before: list[float]) -> bool:
        """`is_again`, for a few numbers."""
        now: list[float] = elements.tolist()
        if now == before:
            return True
        if self.exact or len(now) != len(before):
            return False
        error = math.dist(now, before)
        return bool(error <= torch.finfo(elements.dtype).eps ** DRIFT * math.hypot(*before) < math.inf)


class _Given(TorchFunctionMode):
    def __init__(self, statistics: Statistics) -> None:
        super().__init__()
        self._statistics = statistics

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is _BATCH_NORM:
            normalised = self._normalised(*args, **kwargs)
            if normalised is not None:
                return normalised
        return function(*args, **kwargs)

    def _normalised(
        self,
        input: Tensor,  # noqa: A002
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor | None:
        affine = [parameter for parameter in (weight, bias) if parameter is not None]
        if not training or running_mean is None or running_var is None:
            return None
        if not _is_alike(input, affine, exact=self._statistics.exact):
            return None
        if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in (input, *affine)):
            return None
        batch = self._statistics.batch(input, eps)
        if batch is None:
            return None
        y: Tensor = Normalise.apply(input, weight, bias, running_mean, running_var, batch.mean.tensor, batch.rstd.tensor, eps)
        return y


def _is_alike(x: Tensor, affine: list[Tensor], *, exact: bool) -> bool:
    """Whether a batch norm may be given its statistics; and, if it has to be exact, both ways end in the same kernel."""
    if type(x) is not Tensor or x.device.type != "cpu" or x.dtype not in SAME_ON_CPU:
        return False
    if any(parameter.dtype is not x.dtype for parameter in affine):
        return False
    return not exact or normalises_alike(x, *affine)


def _found(slots: Stretch, place: int, module: nn.Module) -> tuple[Tensor, Tensor, Tensor] | None:
    """Input, mean and deviation of the call that saved the running mean at this place.

    A batch norm saves its input, the running mean, the running variance, the weight if it has one, and these two.
    """
    shape, _, dtype, device = slots.looks(place - 1) or _NOTHING
    if device.type != "cpu" or dtype not in SAME_ON_CPU or "weight" not in module._parameters:
        return None
    channels = shape[1] if len(shape) > 1 else 0
    if not channels or shape.numel() < WORTH * channels:
        return None
    first = place + (2 if module._parameters["weight"] is None else 3)
    expected = (torch.Size([channels]), (1,), dtype, device)
    if slots.looks(first) != expected or slots.looks(first + 1) != expected or not slots.is_at_hand(place - 1):
        return None
    return slots.entry(place - 1), slots.entry(first), slots.entry(first + 1)
