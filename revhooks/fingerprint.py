"""Fingerprints: a few numbers by which a tensor is known again, every bit of it and their order (Rule 19).

A plain sum sees a change of value and no change of order. So the bytes of a tensor are weighed by where they lie.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .hollow import is_hollow

__all__ = ["fingerprint"]

_ROW = 1024  # bytes
_SUMS = 3
_WORDS = 4096  # in a row of an accelerator
_ROWS = 1024  # which it weighs at once, in twice their memory
_MUCH = 1 << 26  # bytes: as many rows as are weighed at once on a CPU
_STEP = 0x5851F42D4C957F2D  # an odd number


def fingerprint(tensor: Tensor) -> Tensor:
    """Numbers of dtype int64 that are others for any other bits or any other order; for a dense tensor of any dtype.

    On a CPU the rows of 1,024 bytes are each summed three times with random weights other than zero (-127 to 127), and
    the sums of the rows with random odd numbers, modulo 2^64. A change of one byte is always seen. Any other change, a
    permutation say, is missed with a chance of at most 254^-3, one in 16 million, whatever the values are. An accelerator
    sums words of 32 bits with random odd numbers modulo 2^64: a change of one word is always seen, any other one missed
    with a chance of at most 2^-32.

    Example:
        >>> x = torch.arange(10.0)
        >>> before = fingerprint(x)
        >>> torch.equal(fingerprint(x.flip(0)), before), torch.equal(fingerprint(x.clone()), before)
        (False, True)
    """
    flat = torch.as_strided(tensor.detach(), (tensor.numel(),), (1,), tensor.storage_offset())
    if flat.is_complex():
        flat = torch.view_as_real(flat).view(-1)
    octets = flat.view(torch.int8)
    if octets.numel() > _MUCH and is_hollow(octets):
        octets = octets[:_MUCH]  # which takes as much as all, that are weighed part by part
    return _weigh_rows(octets) if octets.device.type == "cpu" else _weigh_words(octets)


def _weigh_rows(octets: Tensor) -> Tensor:
    """By products of 8-bit numbers, which take half the time of a ReLU."""
    weights, odd = _weights(octets.device)

    def sums(rows: Tensor) -> Tensor:
        return torch.cat([torch._int_mm(rows, column[: rows.shape[1]]) for column in weights], 1)

    return _weigh(octets, _ROW, sums, odd)


def _weigh_words(octets: Tensor) -> Tensor:
    """By products of 64-bit numbers, for which an accelerator has the kernels: a few launches."""
    _, odd = _weights(octets.device)
    size = octets.numel() // 4 * 4 if octets.storage_offset() % 4 == 0 else 0

    def sums(rows: Tensor) -> Tensor:
        factors = odd[: rows.shape[1], 0]
        parts = [(part * factors).sum(1, keepdim=True) for part in rows.split(_ROWS)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    found = _weigh(octets[:size].view(torch.int32), _WORDS, sums, odd)
    return found if size == octets.numel() else found * _STEP + _weigh(octets[size:], _WORDS, sums, odd)


def _weigh(numbers: Tensor, width: int, sums: Callable[[Tensor], Tensor], odd: Tensor) -> Tensor:
    """Sums of rows of this width, and of what is left, each times an odd number of its own."""
    end = numbers.numel() // width * width
    total = odd[0]
    for part in numbers[:end].view(-1, width).split(len(odd)) if end else ():
        total = total * _STEP + (sums(part) * odd[: len(part)]).sum(0)
    if end < numbers.numel():
        total = total * _STEP + sums(numbers[end:].view(1, -1))[0]
    return total


@functools.lru_cache(maxsize=16)
def _weights(device: torch.device) -> tuple[tuple[Tensor, ...], Tensor]:
    """Columns of 8-bit weights, and odd numbers: random, and the same in every process."""
    generator = torch.Generator("cpu").manual_seed(0x5EED)
    weights = torch.randint(1, 128, (_SUMS, _ROW, 1), generator=generator, dtype=torch.int8, device="cpu")
    signs = torch.randint(0, 2, weights.shape, generator=generator, dtype=torch.int8, device="cpu") * 2 - 1
    odd = torch.randint(-(1 << 62), 1 << 62, (1 << 16, 1), generator=generator, dtype=torch.int64, device="cpu") * 2 + 1
    return tuple((weights * signs).to(device).unbind()), odd.to(device)
