"""Fingerprints: a few numbers by which a tensor is known again, every bit of it and their order (Rule 19).

A plain sum sees a change of value and no change of order. So the bytes of a tensor are weighed by where they lie.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["fingerprint"]

_ROW = 1024  # bytes
_SUMS = 3
_CHUNK = 1 << 22  # words; an accelerator weighs so many at once, in twice their memory


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
    return _weigh_rows(octets) if octets.device.type == "cpu" else _weigh_words(octets)


def _weigh_rows(octets: Tensor) -> Tensor:
    """By products of 8-bit numbers, which take half the time of a ReLU."""
    rows = octets.numel() // _ROW
    weights, odd = _weights(octets.device)
    whole, rest = octets[: rows * _ROW].view(rows, _ROW), octets[rows * _ROW :]
    sums = [torch._int_mm(whole, column) if rows else whole.new_zeros(0, 1, dtype=torch.int64) for column in weights]
    found = _combine(torch.cat(sums, 1), odd)
    if rest.numel():
        ends = [torch._int_mm(rest.view(1, -1), column[: rest.numel()]) for column in weights]
        found = found + torch.cat(ends, 1).view(-1)
    return found


def _combine(sums: Tensor, odd: Tensor) -> Tensor:
    """Sums of rows, each times an odd number of its own."""
    total = torch.zeros(sums.shape[1], dtype=torch.int64, device=sums.device)
    for number, part in enumerate(sums.split(len(odd))):
        total = total * _STEP + (part * odd[: len(part)]).sum(0) * (2 * number + 1)
    return total


_STEP = 0x5851F42D4C957F2D  # an odd number


def _weigh_words(octets: Tensor) -> Tensor:
    """By products of 64-bit numbers, for which an accelerator has the kernels."""
    size = octets.numel() // 4 * 4
    aligned = octets.storage_offset() % 4 == 0
    words = octets[:size].view(torch.int32) if aligned else octets
    odd = _weights(octets.device)[1]
    sums = [_combine(part.view(-1, 1), odd) for part in words.split(_CHUNK)]
    if aligned and size < octets.numel():
        sums.append(_combine(octets[size:].view(-1, 1), odd))
    return functools.reduce(lambda total, found: total * _STEP + found, sums) if sums else odd[:1]


@functools.lru_cache(maxsize=16)
def _weights(device: torch.device) -> tuple[tuple[Tensor, ...], Tensor]:
    """Columns of 8-bit weights, and odd numbers: random, and the same in every process."""
    generator = torch.Generator("cpu").manual_seed(0x5EED)
    weights = torch.randint(1, 128, (_SUMS, _ROW, 1), generator=generator, dtype=torch.int8, device="cpu")
    signs = torch.randint(0, 2, weights.shape, generator=generator, dtype=torch.int8, device="cpu") * 2 - 1
    odd = torch.randint(-(1 << 62), 1 << 62, (1 << 16, 1), generator=generator, dtype=torch.int64, device="cpu") * 2 + 1
    return tuple((weights * signs).to(device).unbind()), odd.to(device)
