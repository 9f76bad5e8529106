"""Smaller forms of tensors that autograd saves and nobody else holds: masks at one bit an element, narrow indices.

Dropout on a CPU saves its mask as numbers of the input's dtype, 0 or 1/(1-p); `max_pool2d` saves 64-bit indices. Both come
back exactly.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...capture import is_capturing
from ...hollow import empty, is_hollow, some_values
from ...storage import BITS, Held, Ledger, is_near, restride

__all__ = ["Code", "code_of", "fewest", "mask_of"]

LEAST = 1 << 14  # elements; below, bookkeeping costs more than it gives
WORTH_WAITING = 1 << 22  # bytes, for an accelerator
_PROBES = 64
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Code:
    """A tensor in a smaller form; stands where a recipe stands."""

    now = True

    __slots__ = ("_decode", "_held", "depth", "encoded", "what")

    def __init__(self, encoded: Tensor, decode: Callable[[Tensor], Tensor], what: str) -> None:
        self.encoded = encoded
        self._held: Held | None = None
        self._decode = decode
        self.depth = 0
        self.what = what

    def leave(self, tensor: Tensor) -> None:
        """The tensor is let go of."""

    def tensor(self, like: Any) -> Tensor:
        """The tensor, in its own strides."""
        return restride(self._decode(self.encoded).view(like.size), like.stride)

    def hold(self, ledger: Ledger) -> None:
        """Count it from now on."""
        self._held = Held(ledger, self.encoded)

    def holds(self) -> Iterator[Tensor]:
        """What it holds."""
        yield self.encoded


def code_of(tensor: Tensor, what: str) -> Code | None:
    """A smaller form of a tensor that no operation with a gradient has made; ``None`` if it has none."""
    if tensor.numel() < LEAST:
        return None
    waits = not is_near(tensor.device) and (tensor.nbytes < WORTH_WAITING or is_capturing(tensor.device))
    if waits and tensor.dtype is not torch.bool:
        return None  # what follows reads values
    if tensor.dtype is torch.int64 and not tensor.is_meta and tensor.is_contiguous():
        return _narrowed(tensor.detach().view(-1), what)
    return mask_of(tensor, what)


def mask_of(tensor: Tensor, what: str) -> Code | None:
    """A mask at one bit an element: truth values, or 0 and one other number; ``None`` if it is none."""
    if tensor.is_meta or not tensor.is_contiguous():
        return None
    flat = tensor.detach().view(-1)
    if flat.dtype is torch.bool:
        size = flat.numel()
        return Code(_pack(flat), lambda bits: _unpack(bits, size), f"{what}, at one bit an element")
    return _mask(flat, what) if flat.dtype in _FLOATS and flat.numel() else None


def _narrowed(flat: Tensor, what: str) -> Code | None:
    low, high = (int(extreme) for extreme in torch.aminmax(flat))
    for dtype in (torch.uint8, torch.int16, torch.int32):
        bounds = torch.iinfo(dtype)
        if bounds.min <= low and high <= bounds.max:
            return Code(flat.to(dtype), lambda narrow: narrow.to(torch.int64), f"{what}, as {dtype}".replace("torch.", ""))
    return None


def _mask(flat: Tensor, what: str) -> Code | None:
    """Of a tensor with two values, of which one is 0."""
    probes = some_values(flat) if is_hollow(flat) else flat[:: max(1, flat.numel() // _PROBES)].tolist()
    found = {number for number in probes if number}
    if len(found) > 1 or not all(0 < number < math.inf for number in found):
        return None
    value = flat.new_tensor(found.pop() if found else 0.0)
    nonzero = flat.bool()
    bits = BITS[flat.element_size()]  # -0 is another zero
    if not torch.equal(_times(nonzero, value).view(bits), flat.view(bits)):
        return None
    size = flat.numel()
    return Code(_pack(nonzero), lambda bits: _times(_unpack(bits, size), value), f"{what}, at one bit an element")


def _times(mask: Tensor, value: Tensor) -> Tensor:
    """``value`` where the mask is set; faster than to ask for it."""
    return mask.view(torch.uint8) * value


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def _pack(mask: Tensor) -> Tensor:
    if is_hollow(mask):
        return empty((-(-mask.numel() // 8),), torch.uint8)
    numpy = sys.modules.get("numpy")
    if mask.device.type == "cpu" and numpy is not None:
        return torch.from_numpy(numpy.packbits(mask.numpy(), bitorder="little"))
    padded = F.pad(mask.to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (padded << _shifts(mask.device)).sum(1, dtype=torch.uint8)


def _unpack(bits: Tensor, size: int) -> Tensor:
    if is_hollow(bits):
        return empty((size,), torch.bool)
    numpy = sys.modules.get("numpy")
    if bits.device.type == "cpu" and numpy is not None:
        return torch.from_numpy(numpy.unpackbits(bits.numpy(), count=size, bitorder="little")).view(torch.bool)
    return (bits.unsqueeze(1) >> _shifts(bits.device) & 1).view(-1)[:size].to(torch.bool)


@functools.cache
def fewest() -> int:
    """How many references a pack hook sees to its argument, if only autograd holds that: no Python code does."""
    seen: list[int] = []

    class Hook:
        def pack(self, tensor: Tensor) -> Tensor:
            seen.append(sys.getrefcount(tensor))
            return tensor.detach()

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(Hook().pack, lambda tensor: tensor):
        F.max_pool2d(torch.zeros(1, 1, 2, 2, device="cpu", requires_grad=True) * 1, 2)
    return min(seen)
