"""Exact arithmetic for momentum: numbers on a grid, scaled by a ratio, with the bits that this loses in a store.

Multiplying an integer by ``n/d`` and rounding loses ``log2(d/n)`` bits. Kept in a store of integers beside it, they
make the multiplication a bijection, and a chain of any length is inverted to the bit.

References:
    Gradient-based hyperparameter optimization through reversible learning (Maclaurin et al., 2015, arXiv:1502.03492),
    section 2.3, algorithm 3.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InversionError, ShapeError, explain
from ..storage import is_opaque

__all__ = ["Grid", "extent", "grow", "on_grid", "passing", "ratio_of", "shrink", "store_plan"]

_DIGITS = {torch.float32: 24, torch.float64: 53}
_GRID_BITS = {torch.float32: 12, torch.float64: 32}
_STORES = {torch.int8: 7, torch.int16: 15, torch.int32: 31, torch.int64: 63}
_MAX_DENOMINATOR = 256


def ratio_of(gamma: float | Fraction) -> Fraction:
    """``gamma`` as a fraction ``n/d``.

    Raises:
        ShapeError: it is no fraction with a denominator up to 256.

    Example:
        >>> ratio_of(0.9)
        Fraction(9, 10)
    """
    ratio = Fraction(gamma).limit_denominator(_MAX_DENOMINATOR)
    if not math.isclose(ratio, gamma, rel_tol=1e-9) or not 0 < ratio < 1:
        raise ShapeError(
            explain(
                "exact momentum",
                expected=f"a gamma between 0 and 1 that is a fraction with a denominator up to {_MAX_DENOMINATOR}",
                got=str(gamma),
                remedy="round it, as 0.9 = 9/10 or Fraction(7, 8)",
            )
        )
    return ratio


def shrink(value: Tensor, store: Tensor, ratio: Fraction) -> tuple[Tensor, Tensor]:
    """Multiply integers by ``n/d``, to within ``n``; what is lost goes into the store.

    Args:
        value: integers, int64 ``(*)``.
        store: what the store holds, non-negative integers ``(*)`` of any integer dtype (`store_plan`).
        ratio: ``n/d``.

    Returns:
        The product and the store, in their dtypes.

    Example:
        >>> ratio, store = Fraction(9, 10), torch.zeros(3, dtype=torch.int8)
        >>> value, store = shrink(torch.tensor([1000, 1007, -5]), store, ratio)
        >>> value, store
        (tensor([900, 907,  -4]), tensor([0, 0, 0], dtype=torch.int8))
        >>> grow(value, store, ratio)[0]
        tensor([1000, 1007,   -5])
    """
    n, d = ratio.numerator, ratio.denominator
    wide = store.to(torch.int64) * d + value.remainder(d)
    value = value.div(d, rounding_mode="floor") * n + wide.remainder(n)
    return value, wide.div(n, rounding_mode="floor").to(store.dtype)


def grow(value: Tensor, store: Tensor, ratio: Fraction) -> tuple[Tensor, Tensor]:
    """Undo `shrink`: divide integers by ``n/d``, with the bits from the store.

    Example:
        >>> grow(*shrink(torch.tensor([-3]), torch.tensor([5]), Fraction(1, 2)), Fraction(1, 2))
        (tensor([-3]), tensor([5]))
    """
    return shrink(value, store, 1 / ratio)


def store_plan(steps: int, ratio: Fraction) -> tuple[int, torch.dtype]:
    """How many steps one word of the store takes, and its dtype: the smallest that takes them all, else int64.

    A step multiplies the bound on what the store holds by ``d/n`` and rounds up: it needs ``log2(d/n)`` bits a step and
    element, and some more at the beginning.

    Example:
        >>> [store_plan(steps, Fraction(9, 10)) for steps in (29, 82, 187, 377, 1000)]
        [(29, torch.int8), (82, torch.int16), (187, torch.int32), (377, torch.int64), (377, torch.int64)]
    """
    for dtype, bits in _STORES.items():
        taken = _capacity(ratio, bits)
        if taken >= steps or dtype is torch.int64:
            return min(taken, max(steps, 1)), dtype
    raise AssertionError  # pragma: no cover


@functools.lru_cache(maxsize=64)
def _capacity(ratio: Fraction, bits: int) -> int:
    """The steps after which a store that began at 0 fits into ``bits`` bits, whatever was scaled."""
    n, d = ratio.numerator, ratio.denominator
    bound, steps = 1, 0  # the store is less than ``bound``
    while True:
        wide = bound * d
        bound = (wide - 1) // n + 1
        if bound > 2**bits or max(wide, bound * n) >= 2**63:
            return steps
        steps += 1


def on_grid(x: Tensor, bits: int) -> Tensor:
    """``x`` rounded to multiples of ``2**-bits``; the gradient passes straight through.

    Example:
        >>> on_grid(torch.tensor([0.3, -0.1]), bits=2)
        tensor([0.2500, 0.0000])
    """
    return passing(torch.round(x.detach() * 2.0**bits) * 2.0**-bits, x)


def passing(value: Tensor, x: Tensor) -> Tensor:
    """``value``, to the bit, with the gradient of ``x``; not finite where ``x`` is not.

    Example:
        >>> x = torch.tensor([0.3], requires_grad=True)
        >>> passing(torch.tensor([1.0]), 2 * x).backward()
        >>> x.grad
        tensor([2.])
    """
    return value + (x - x.detach())


class Grid(NamedTuple):
    """The grids of position and velocity for one dtype.

    The velocity's is finer, so that what `shrink` is off by stays within one step of the position's.

    Attributes:
        x_bits: positions are multiples of ``2**-x_bits``.
        v_bits: velocities are multiples of ``2**-v_bits``.
        x_limit: positions must be smaller than this: sums of larger ones are not exact.
        v_limit: the same for velocities.

    Example:
        >>> Grid.of(torch.float32, Fraction(9, 10))
        Grid(x_bits=12, v_bits=16, x_limit=4096.0, v_limit=256.0)
    """

    x_bits: int
    v_bits: int
    x_limit: float
    v_limit: float

    @classmethod
    def of(cls, dtype: torch.dtype, ratio: Fraction, x_bits: int | None = None) -> Grid:
        """The grids for ``dtype``; ``x_bits`` is 12 for float32 and 32 for float64 unless given.

        Raises:
            ShapeError: the dtype has too few digits.
        """
        if dtype not in _DIGITS:
            raise ShapeError(
                explain(
                    "exact momentum",
                    expected="float32 or float64",
                    got=str(dtype),
                    remedy="keep the streams in float32; the branches may run under autocast",
                )
            )
        x_bits = _GRID_BITS[dtype] if x_bits is None else x_bits
        v_bits = x_bits + (ratio.numerator - 1).bit_length()
        return cls(x_bits, v_bits, 2.0 ** (_DIGITS[dtype] - x_bits), 2.0 ** (_DIGITS[dtype] - v_bits))

    def units(self, v: Tensor) -> Tensor:
        """Velocities in units of their grid, rounded, as int64; they carry no gradient."""
        return torch.round(v.detach() * 2.0**self.v_bits).to(torch.int64)

    def velocity(self, units: Tensor, dtype: torch.dtype) -> Tensor:
        """The velocities of so many units."""
        return units.to(dtype) * 2.0**-self.v_bits

    def check(self, extents: Sequence[Tensor], label: str) -> None:
        """Raise if a position or velocity has left the range in which sums are exact.

        Args:
            extents: for each step the least and largest position and velocity (`extent`).
            label: what the steps belong to.

        Raises:
            InversionError: one has.
        """
        if not extents:
            return
        limits = (self.x_limit, self.x_limit, self.v_limit, self.v_limit)
        for step, reached in enumerate(torch.stack(tuple(extents)).tolist()):  # one wait for the device, not one a step
            if not all(abs(value) < limit for value, limit in zip(reached, limits, strict=True)):
                x, v = max(map(abs, reached[:2])), max(map(abs, reached[2:]))
                raise InversionError(
                    explain(
                        f"{label}, step {step}",
                        expected=f"positions below {self.x_limit:g} and velocities below {self.v_limit:g}, whose sums are exact",
                        got=f"{x:g} and {v:g}",
                        remedy="use a coarser grid (grid_bits=), float64, or normalise what the step computes",
                    )
                )


def extent(x: Tensor, v: Tensor) -> list[Tensor]:
    """The least and the largest of both, as one tensor; nothing where there are no numbers to read.

    Example:
        >>> extent(torch.tensor([1.0, 2.0]), torch.tensor([0.0, -3.0]))
        [tensor([ 1.,  2., -3.,  0.])]
    """
    if not x.numel() or x.is_meta or is_opaque(x):
        return []
    return [torch.stack((*x.detach().aminmax(), *v.detach().aminmax()))]
