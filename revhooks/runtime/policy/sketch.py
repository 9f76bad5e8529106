"""Some elements of each of many tensors: by them a replay shows that it repeats its call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...kinds import is_allocated
from ...projection import projection
from ...storage import is_near
from .guard import is_measured

__all__ = ["Elements", "Sketch", "by_turns", "large_places", "some_of"]

ELEMENTS = 32  # of each tensor


class Elements:
    """What a sketch has of a tensor, in the place of the tensor."""

    __slots__ = ("device", "dtype", "values")

    def __init__(self, tensor: Tensor) -> None:
        self.values = elements_of(tensor).clone()
        self.dtype, self.device = self.values.dtype, self.values.device


class _Group(NamedTuple):
    """Of the tensors of one dtype on one device: their places, how many elements of each, and these."""

    places: list[int]
    sizes: list[int]
    elements: Tensor

    def is_like(self, other: _Group) -> bool:
        if not is_near(self.elements.device) or self.places != other.places:
            return False
        return torch.equal(self.elements, other.elements)

    def parts(self) -> dict[int, Tensor]:
        return dict(zip(self.places, self.elements.split(self.sizes), strict=True))


class Sketch:
    """Evenly spread elements of tensors with real or complex numbers, each known by its place.

    Example:
        >>> before, after = Sketch([(0, torch.zeros(3)), (1, torch.ones(2))]), Sketch([(1, torch.zeros(2))])
        >>> [(rebuilt[:2], original[:2]) for rebuilt, original in after.differences(before)]
        [(tensor([0., 0.]), tensor([1., 1.]))]
    """

    __slots__ = ("_groups",)

    def __init__(self, tensors: Iterable[tuple[int, Tensor | Elements]]) -> None:
        found: dict[tuple[torch.dtype, torch.device], tuple[list[int], list[Tensor]]] = {}
        for place, tensor in tensors:
            if isinstance(tensor, Elements) or (is_measured(tensor) and is_allocated(tensor)):
                places, parts = found.setdefault((tensor.dtype, tensor.device), ([], []))
                places.append(place)
                parts.append(tensor.values if isinstance(tensor, Elements) else elements_of(tensor))
        self._groups = {
            key: _Group(places, [part.numel() for part in parts], torch.cat(parts)) for key, (places, parts) in found.items()
        }

    def differences(self, before: Sketch) -> list[tuple[Tensor, Tensor]]:
        """What is here and what was before, of the tensors that are in both and may differ; an accelerator is not asked.

        Both of a pair end in the same number, below which elements are next to nothing beside those of the other tensors: as is
        the mean of what was normalised before, which is all rounding, and other rounding after an inversion.
        """
        pairs = []
        for key, group in self._groups.items():
            former = before._groups.get(key)
            if former is None or group.is_like(former):
                continue
            parts, nothing = former.parts(), _next_to_nothing(former.elements)
            for place, part in group.parts().items():
                if place in parts:
                    end = nothing * part.numel() ** 0.5
                    pairs.append((torch.cat([part, end]), torch.cat([parts[place], end])))
        return pairs


def large_places(sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Of places and numbers of elements those of which one is large enough to be looked at alone.

    Example:
        >>> large_places([(0, 100), (1, 2), (4, 64)])
        [0, 4]
    """
    most = max((size for _, size in sizes), default=0)
    return [place for place, size in sizes if size * _LARGE >= most]


def by_turns(places: Sequence[int], turn: int, count: int) -> list[int]:
    """One or two of the places: the last, to which faults before it lead, and any by turns."""
    if not places:
        return []
    chosen = [places[-1], places[turn % len(places)]]
    return chosen if count == 2 else [chosen[turn % 2]]


_LARGE = 16  # statistics, smaller than that part, may be all rounding


def _next_to_nothing(elements: Tensor) -> Tensor:
    """Half the digits below the root mean square."""
    sizes = elements.abs()
    sizes = sizes.to(torch.promote_types(sizes.dtype, torch.float32))
    mean_square = torch.where(sizes.isfinite(), sizes, 0.0).square().mean(0, keepdim=True)
    return (mean_square * torch.finfo(elements.dtype).eps).sqrt().to(elements.dtype)


def elements_of(tensor: Tensor) -> Tensor:
    """Evenly spread elements of a tensor, which may lie in its memory, and a projection of all of it where there is one."""
    values = some_of(tensor.detach())
    if values.numel() == tensor.numel() or not is_near(tensor.device):
        return values
    return torch.cat([values, projection(tensor, ELEMENTS)])


def some_of(tensor: Tensor) -> Tensor:
    """Evenly spread elements of a tensor; they may lie in its memory."""
    numel = tensor.numel()
    if numel <= ELEMENTS:
        return tensor.reshape(-1)
    step = (numel // ELEMENTS - 1) | 1  # odd: not in step with rows and channels, whose widths are mostly even
    if tensor.is_contiguous():
        return tensor.as_strided((ELEMENTS,), (step,), tensor.storage_offset())
    return tensor.take(torch.arange(0, ELEMENTS * step, step, device=tensor.device))
