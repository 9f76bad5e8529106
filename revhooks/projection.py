"""A projection: the sum of all elements of a tensor with random signs, by which a small difference anywhere shows.

Whatever few elements are compared, a difference elsewhere goes unseen. A difference d of two tensors moves their projections
apart by about its norm ||d||, wherever it lies (Johnson and Lindenstrauss 1984; signs as in Achlioptas 2003).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .hollow import is_hollow

__all__ = ["projection"]

_ROW = 1024
_MANY = 1 << 26  # elements: as many as are taken at once
_DTYPES = (torch.float32, torch.float64)  # in others a sum has too few digits


def projection(tensor: Tensor, count: int) -> Tensor:
    """One number of the size that ``count`` elements have together; of shape (1,), or (0,) where there is none.

    There is one for contiguous tensors of float32 or float64 on a CPU, where it takes as long as a ReLU. It is 0 where an element
    is not finite. A relative difference e of two tensors shows as one below t with a chance of about t / e.

    Example:
        >>> x = torch.ones(4096)
        >>> y = x.clone()
        >>> y[77] = -1
        >>> float((projection(x, 4096) - projection(y, 4096)).abs())
        2.0
    """
    flat = tensor.detach()
    if flat.dtype not in _DTYPES or flat.device.type != "cpu" or not flat.is_contiguous() or not flat.numel():
        return flat.new_empty(0)
    flat = flat.view(-1)
    if flat.numel() > _MANY and is_hollow(flat):
        flat = flat[:_MANY]  # which takes as much as all, that are taken part by part
    signs = _signs(flat.dtype)
    end = flat.numel() // _ROW * _ROW
    total = torch.dot(flat[end:], signs[: flat.numel() - end])
    for part in flat[:end].view(-1, _ROW).split(len(signs)) if end else ():
        total = total + torch.dot(torch.mv(part, signs[:_ROW]), signs[-len(part) :])
    return torch.nan_to_num(total * (count / flat.numel()) ** 0.5, 0.0, 0.0, 0.0).view(1)


@functools.lru_cache(maxsize=2)
def _signs(dtype: torch.dtype) -> Tensor:
    """The same in every process."""
    generator = torch.Generator("cpu").manual_seed(0x51635)
    return (torch.randint(0, 2, (1 << 16,), generator=generator, device="cpu") * 2 - 1).to(dtype)
