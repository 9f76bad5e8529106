"""Exact arithmetic for momentum: numbers on a grid, scaled by a ratio, with the bits that this loses in a store.

Multiplying an integer by ``n/d`` and rounding loses ``log2(d/n)`` bits. Kept in a store of integers beside it, they
make the multiplication a bijection, and a chain of any length is inverted to the bit.

References:
    Gradient-based hyperparameter optimization through reversible learning (Maclaurin et al., 2015, arXiv:1502.03492),
    algorithm 3.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InversionError, ShapeError, explain
from ..storage import is_opaque
from ..tracing import apply, is_recorded

__all__ = ["Grid", "accelerate", "brake", "extent", "grow", "on_grid", "ratio_of", "shrink", "store_plan"]

_DIGITS = {torch.float32: 24, torch.float64: 53}
_GRID_BITS = {torch.float32: 12, torch.float64: 32}
_STORES = {torch.int8: 7, torch.int16: 15, torch.int32: 31, torch.int64: 53}  # bits; the arithmetic is that of float64
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
    """Multiply whole numbers by ``n/d``, to within ``n``; what is lost goes into the store.

    The numbers are whole, their dtype is not: floors of floating quotients of whole numbers below ``2**24`` (``2**53``) are
    exact, and several times as fast as dividing integers.

    Args:
        value: whole numbers ``(*)`` below ``2**24`` in float32, ``2**53`` in float64, without gradient; overwritten.
        store: what the store holds, ``(*)``, of the integer dtype that `store_plan` says.
        ratio: ``n/d``.

    Returns:
        The product and the store, in their dtypes.

    Example:
        >>> ratio, store = Fraction(9, 10), torch.zeros(3, dtype=torch.int8)
        >>> value, store = shrink(torch.tensor([1000.0, 1007.0, -5.0]), store, ratio)
        >>> value, store
        (tensor([900., 907.,  -4.]), tensor([0, 0, 0], dtype=torch.int8))
        >>> grow(value, store, ratio)[0]
        tensor([1000., 1007.,   -5.])
    """
    n, d = ratio.numerator, ratio.denominator
    dtype = value.dtype if store.dtype in (torch.int8, torch.int16) else torch.float64
    kept = value.to(dtype)
    # divisors as tensors: by a number CUDA multiplies with its reciprocal, whose floors are not exact
    quotient = kept.div(kept.new_full((), d)).floor_()
    wide = kept.sub_(quotient, alpha=d).add_(store.to(dtype), alpha=d)  # the remainder, above it the store
    rest = wide.div(wide.new_full((), n)).floor_()
    product = quotient.mul_(n).add_(wide).sub_(rest, alpha=n)
    return product.to(value.dtype), rest.to(store.dtype)


def grow(value: Tensor, store: Tensor, ratio: Fraction) -> tuple[Tensor, Tensor]:
    """Undo `shrink`: divide whole numbers by ``n/d``, with the bits from the store.

    Example:
        >>> grow(*shrink(torch.tensor([-3.0]), torch.tensor([5]), Fraction(1, 2)), Fraction(1, 2))
        (tensor([-3.]), tensor([5]))
    """
    return shrink(value, store, 1 / ratio)


def store_plan(steps: int, ratio: Fraction) -> tuple[int, torch.dtype]:
    """How many steps one word of the store takes, and its dtype: the smallest that takes them all, else int64.

    A step multiplies the bound on what the store holds by ``d/n`` and rounds up: it needs ``log2(d/n)`` bits a step and
    element, and some more at the beginning.

    Example:
        >>> [store_plan(steps, Fraction(9, 10)) for steps in (29, 82, 187, 302, 1000)]
        [(29, torch.int8), (82, torch.int16), (187, torch.int32), (302, torch.int64), (311, torch.int64)]
    """
    for dtype, bits in _STORES.items():
        if _capacity(ratio, bits) >= steps:
            return max(steps, 1), dtype
    return _capacity(ratio, _STORES[torch.int64]), torch.int64


@functools.lru_cache(maxsize=64)
def _capacity(ratio: Fraction, bits: int) -> int:
    """The steps after which a store that began at 0 fits into ``bits`` bits, whatever was scaled."""
    n, d = ratio.numerator, ratio.denominator
    bound, steps = 1, 0  # the store is less than ``bound``
    while True:
        wide = bound * d
        bound = (wide - 1) // n + 1
        if bound > 2**bits or max(wide, bound * n) >= 2**53:
            return steps
        steps += 1


class _Round(torch.autograd.Function):
    """Round to a grid; the gradient passes straight through."""

    @staticmethod
    def forward(x: Tensor, bits: int) -> Tensor:
        return (x * 2.0**bits).round_().mul_(2.0**-bits).add_(0.0)  # no negative zeros

    @staticmethod
    def setup_context(*_: Any) -> None: ...

    @staticmethod
    def backward(_: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def on_grid(x: Tensor, bits: int) -> Tensor:
    """``x`` rounded to multiples of ``2**-bits``; the gradient passes straight through.

    Example:
        >>> on_grid(torch.tensor([0.3, -0.1]), bits=2)
        tensor([0.2500, 0.0000])
    """
    rounded: Tensor = apply(_Round, x, bits)
    return rounded


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
        """Velocities in units of their grid, rounded to whole numbers; they carry no gradient."""
        return (v.detach() * 2.0**self.v_bits).round_()

    def velocity(self, units: Tensor) -> Tensor:
        """The velocities of so many units, which are overwritten."""
        return units.mul_(2.0**-self.v_bits)

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


class _Accelerate(torch.autograd.Function):
    """``n/d v + push`` on a grid; the gradient is that without a grid."""

    @staticmethod
    def forward(v: Tensor, push: Tensor, store: Tensor, ratio: Fraction, grid: Grid) -> tuple[Tensor, Tensor]:
        units, store = shrink(grid.units(v), store, ratio)
        return grid.velocity(units.add_(grid.units(push))), store

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.ratio = inputs[3]
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        return float(ctx.ratio) * grads[0], grads[0], None, None, None


def accelerate(v: Tensor, push: Tensor, store: Tensor, ratio: Fraction, grid: Grid) -> tuple[Tensor, Tensor]:
    """``n/d v + push`` on the grid, and the store; the gradient is that without a grid.

    Args:
        v: velocities on the grid, ``(*)``.
        push: what is added, ``(*)``, of the same dtype.
        store: as in `shrink`.
        ratio: ``n/d``.
        grid: of positions and velocities.

    Example:
        >>> ratio, grid = Fraction(1, 2), Grid.of(torch.float32, Fraction(1, 2))
        >>> v, store = accelerate(torch.ones(1), torch.tensor([0.25]), torch.zeros(1, dtype=torch.int8), ratio, grid)
        >>> v, brake(v, torch.tensor([0.25]), store, ratio, grid)[0]
        (tensor([0.7500]), tensor([1.]))
    """
    result: tuple[Tensor, Tensor] = apply(_Accelerate, v, push, store, ratio, grid)
    return result


def brake(v: Tensor, push: Tensor, store: Tensor, ratio: Fraction, grid: Grid) -> tuple[Tensor, Tensor]:
    """Undo `accelerate`, to the bit; the result carries no gradient.

    Example:
        >>> ratio, grid = Fraction(1, 2), Grid.of(torch.float32, Fraction(1, 2))
        >>> brake(torch.ones(1), torch.zeros(1), torch.zeros(1, dtype=torch.int8), ratio, grid)[0]
        tensor([2.])
    """
    units, store = grow(grid.units(v).sub_(grid.units(push)), store, ratio)
    return grid.velocity(units), store


def extent(x: Tensor, v: Tensor) -> list[Tensor]:
    """The least and the largest of both, as one tensor; nothing where there are no numbers to read.

    Example:
        >>> extent(torch.tensor([1.0, 2.0]), torch.tensor([0.0, -3.0]))
        [tensor([ 1.,  2., -3.,  0.])]
    """
    if is_recorded() or not x.numel() or x.is_meta or is_opaque(x):
        return []
    return [torch.stack((*x.detach().aminmax(), *v.detach().aminmax()))]
