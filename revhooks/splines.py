"""Monotonic rational-quadratic splines, elementwise.

References:
    Neural Spline Flows (Durkan et al., 2019, arXiv:1906.04032), section 3.1 and appendix A.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .errors import ShapeError, explain

__all__ = ["rational_quadratic_spline"]

_SMALLEST = 1e-3  # of a bin, as a share of the interval, and of a slope


class _Bin(NamedTuple):
    """The bin of a spline that each element lies in: its lower left corner, its size, and the slopes at both its ends."""

    x: Tensor
    y: Tensor
    width: Tensor
    height: Tensor
    slope: Tensor
    next_slope: Tensor


def rational_quadratic_spline(
    x: Tensor, u: Tensor, *, bins: int, bound: float, dim: int, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """The spline of every element, and the logarithm of its slope there.

    Args:
        x: values of shape ``(*)``; of the inverse, those that the spline gives.
        u: the parameters, as `revhooks.functional.spline_law` has them.
        bins: how many pieces there are.
        bound: where the spline ends.
        dim: the dimension along which ``u`` is wider than ``x``.
        inverse: go back.

    Returns:
        The values and ``log|dy/dx|``, or ``log|dx/dy|``, of shape ``(*)``.

    Raises:
        ShapeError: ``u`` has another width.

    Example:
        >>> y, ladj = rational_quadratic_spline(torch.tensor([0.5, 7.0]), torch.zeros(22), bins=4, bound=3.0, dim=0)
        >>> [round(value, 4) for value in (*y.tolist(), *ladj.abs().tolist())]
        [0.5, 7.0, 0.0, 0.0]
    """
    given, count = x, 3 * bins - 1
    if u.dim() != given.dim() or u.shape[dim] != count * given.shape[dim]:
        raise ShapeError(
            explain(
                "spline coupling",
                expected=f"a branch output of size {count * given.shape[dim]} along dim {dim}: 3 * {bins} - 1 times the stream's",
                got=f"shape {tuple(u.shape)}",
                remedy="let the branch return widths, heights and slopes for every channel of the stream it changes",
            )
        )
    dim = dim % given.dim()
    dtype = torch.promote_types(given.dtype, torch.float32)
    value = given.to(dtype).clamp(-bound, bound)
    place = _bin_of(value, u.to(dtype).unflatten(dim, (count, given.shape[dim])), bins, bound, dim, inverse=inverse)
    steep = place.height / place.width
    bend = place.next_slope + place.slope - 2 * steep
    part = _part_of_height(value, place, steep, bend) if inverse else (value - place.x) / place.width
    rest = part * (1 - part)
    below = steep + bend * rest
    slopes = place.next_slope * part.square() + 2 * steep * rest + place.slope * (1 - part).square()
    ladj = 2 * (steep.log() - below.log()) + slopes.log()
    if inverse:
        moved, ladj = place.x + part * place.width, -ladj
    else:
        moved = place.y + place.height * (steep * part.square() + place.slope * rest) / below
    inside = given.abs() <= bound
    return torch.where(inside, moved.to(given.dtype), given), torch.where(inside, ladj, 0.0)


def _part_of_height(y: Tensor, place: _Bin, steep: Tensor, bend: Tensor) -> Tensor:
    """How far along its bin an element lies, from its height: the root of a quadratic that does not cancel."""
    up = (y - place.y) * bend
    a = place.height * (steep - place.slope) + up
    b = place.height * place.slope - up
    c = steep * (place.y - y)
    root = (b.square() - 4 * a * c).clamp(min=torch.finfo(y.dtype).tiny).sqrt()
    # of the two forms of the root the one that adds numbers of one sign; where b < 0, a > 0
    rising = b >= 0
    return torch.where(rising, -2 * c, root - b) / torch.where(rising, b + root, 2 * a)


def _bin_of(value: Tensor, raw: Tensor, bins: int, bound: float, dim: int, *, inverse: bool) -> _Bin:
    """The bin of every element, found along x, or along y for the inverse; ``raw`` has the parameters along ``dim``."""
    widths, heights, slopes = raw.split([bins, bins, bins - 1], dim)
    x, y = (_knots(one, bins, bound, dim) for one in (widths, heights))
    slopes = _SMALLEST + softplus(slopes + math.log(math.expm1(1 - _SMALLEST)))
    ends = torch.ones_like(slopes.narrow(dim, 0, 1))
    slopes = torch.cat([ends, slopes, ends], dim)
    inner = (y if inverse else x).narrow(dim, 1, bins - 1).detach()
    index = (value.detach().unsqueeze(dim) >= inner).sum(dim, keepdim=True)
    both = torch.cat([index, index + 1], dim)
    (x0, x1), (y0, y1), (s0, s1) = (one.gather(dim, both).unbind(dim) for one in (x, y, slopes))
    return _Bin(x0, y0, x1 - x0, y1 - y0, s0, s1)


def _knots(raw: Tensor, bins: int, bound: float, dim: int) -> Tensor:
    """Where bins of these raw sizes begin and end, from ``-bound`` to ``bound``."""
    sizes = _SMALLEST + (1 - _SMALLEST * bins) * raw.softmax(dim)
    inner = 2 * bound * sizes.narrow(dim, 0, bins - 1).cumsum(dim) - bound
    ends = torch.full_like(inner.narrow(dim, 0, 1), bound)
    return torch.cat([-ends, inner, ends], dim)
