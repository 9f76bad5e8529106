"""Coupling laws and their inverses: pure tensor maths, used by layers, their inverses and the runtime.

A law changes one stream by what a branch computed from another: ``y = forward(x, u)`` with
``x = inverse(y, u)``. Shapes: ``x`` and ``y`` are ``(*)``; ``u`` is what the branch returned.

References:
    NICE (Dinh et al., 2014, arXiv:1410.8516), eq. 7: additive.
    Density estimation using Real NVP (Dinh et al., 2016, arXiv:1605.08803), eq. 7: affine.
    Glow (Kingma and Dhariwal, 2018, arXiv:1807.03039), section 3.3: sigmoid scale.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .errors import ShapeError, explain
from .splines import rational_quadratic_spline
from .tracing import apply

__all__ = [
    "ADDITIVE",
    "SCALES",
    "Law",
    "additive",
    "additive_inverse",
    "affine_law",
    "elementwise_law",
    "grid_law",
    "grid_limit",
    "round_to_grid",
    "spline_law",
    "sum_per_sample",
    "wide",
]


_Both = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Law(NamedTuple):
    """A pair of functions with ``inverse(forward(x, u), u) == x`` for every ``u``.

    Attributes:
        forward: ``y = forward(x, u)``.
        inverse: ``x = inverse(y, u)``.
        saves: whether the ops of ``forward`` save tensors for backward.
        log_det: ``log|det dy/dx|`` of each sample from ``(x, u)``, of shape ``(B,)``; ``None`` where it is not known.
        grid_bits: streams lie on multiples of ``2**-grid_bits``, and the inverse is exact there; ``None`` for no grid.
        call_and_ladj: of a law that treats each element by itself: ``forward``, and ``log|dy/dx|`` of every element, ``(*)``.
        inverse_and_ladj: the same of the inverse, ``log|dx/dy|``.
    """

    forward: Callable[[Tensor, Tensor], Tensor]
    inverse: Callable[[Tensor, Tensor], Tensor]
    saves: bool = True
    log_det: Callable[[Tensor, Tensor], Tensor] | None = None
    grid_bits: int | None = None
    call_and_ladj: _Both | None = None
    inverse_and_ladj: _Both | None = None


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums over a sample are made in: at least float32.

    Example:
        >>> wide(torch.bfloat16), wide(torch.float64)
        (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)


def sum_per_sample(x: Tensor) -> Tensor:
    """The sum over all dimensions but the first: ``(B, *)`` to ``(B,)``, in at least float32.

    Example:
        >>> sum_per_sample(torch.ones(2, 3, 4))
        tensor([12., 12.])
    """
    dtype = wide(x.dtype)
    return x.flatten(1).sum(1, dtype=dtype) if x.dim() > 1 else x.to(dtype)


def additive(x: Tensor, u: Tensor) -> Tensor:
    """``y = x + u``.

    Example:
        >>> additive(torch.tensor([1.0]), torch.tensor([2.0]))
        tensor([3.])
    """
    return x + u


def additive_inverse(y: Tensor, u: Tensor) -> Tensor:
    """``x = y - u``.

    Example:
        >>> additive_inverse(torch.tensor([3.0]), torch.tensor([2.0]))
        tensor([1.])
    """
    return y - u


def _keeps_volume(x: Tensor, _: Tensor) -> Tensor:
    return x.new_zeros(x.shape[0], dtype=wide(x.dtype))


def _additive_and_ladj(x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    return x + u, x.new_zeros((), dtype=wide(x.dtype)).expand(x.shape)


def _additive_inverse_and_ladj(y: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    return y - u, y.new_zeros((), dtype=wide(y.dtype)).expand(y.shape)


ADDITIVE = Law(
    additive,
    additive_inverse,
    saves=False,
    log_det=_keeps_volume,
    call_and_ladj=_additive_and_ladj,
    inverse_and_ladj=_additive_inverse_and_ladj,
)

SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    # log-scales to positive factors; the inverse divides by the same factor
    "exp": torch.exp,
    "sigmoid": lambda raw: torch.sigmoid(raw + 2.0),
    "tanh": lambda raw: torch.exp(torch.tanh(raw)),
}

_LOG_SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": lambda raw: raw,
    "sigmoid": lambda raw: logsigmoid(raw + 2.0),
    "tanh": torch.tanh,
}


def affine_law(scale: str = "tanh", dim: int = 1) -> Law:
    """``y = x * factor(r) + t`` with ``r, t = u.chunk(2, dim)``.

    Args:
        scale: how the raw log-scale ``r`` becomes a factor: ``"exp"`` (Real NVP), ``"sigmoid"``
            (Glow: ``sigmoid(r + 2)``) or ``"tanh"`` (``exp(tanh(r))``, factors between 1/e and e).
        dim: the dimension along which ``u`` carries both; ``u`` is twice as wide there as ``x``.

    Raises:
        ShapeError: ``scale`` is unknown, or ``u`` is not twice as wide as ``x`` along ``dim``.

    Example:
        >>> law = affine_law("exp", dim=0)
        >>> u = torch.tensor([0.5, 2.0])
        >>> law.inverse(law.forward(torch.tensor([3.0]), u), u)
        tensor([3.])
    """
    if scale not in SCALES:
        known = ", ".join(map(repr, SCALES))
        raise ShapeError(explain("scale", expected=f"one of {known}", got=repr(scale), remedy="pick one of these"))
    return Law(
        functools.partial(_affine, scale=scale, dim=dim),
        functools.partial(_affine_inverse, scale=scale, dim=dim),
        log_det=functools.partial(_affine_log_det, scale=scale, dim=dim),
        call_and_ladj=functools.partial(_affine_and_ladj, scale=scale, dim=dim),
        inverse_and_ladj=functools.partial(_affine_inverse_and_ladj, scale=scale, dim=dim),
    )


def _affine(x: Tensor, u: Tensor, *, scale: str, dim: int) -> Tensor:
    raw, shift = _halves(x, u, dim)
    return x * SCALES[scale](raw) + shift


def _affine_inverse(y: Tensor, u: Tensor, *, scale: str, dim: int) -> Tensor:
    raw, shift = _halves(y, u, dim)
    return (y - shift) / SCALES[scale](raw)


def _affine_and_ladj(x: Tensor, u: Tensor, *, scale: str, dim: int) -> tuple[Tensor, Tensor]:
    return _affine(x, u, scale=scale, dim=dim), _LOG_SCALES[scale](_halves(x, u, dim)[0])


def _affine_inverse_and_ladj(y: Tensor, u: Tensor, *, scale: str, dim: int) -> tuple[Tensor, Tensor]:
    return _affine_inverse(y, u, scale=scale, dim=dim), -_LOG_SCALES[scale](_halves(y, u, dim)[0])


def _affine_log_det(x: Tensor, u: Tensor, *, scale: str, dim: int) -> Tensor:
    return sum_per_sample(_LOG_SCALES[scale](_halves(x, u, dim)[0]))


def _halves(x: Tensor, u: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    if u.dim() != x.dim() or u.shape[dim] != 2 * x.shape[dim]:
        raise ShapeError(
            explain(
                "affine coupling",
                expected=f"a branch output of size {2 * x.shape[dim]} along dim {dim}: log-scales, then shifts",
                got=f"shape {tuple(u.shape)}",
                remedy="let the branch return twice as many channels as the stream it changes",
            )
        )
    raw, shift = u.chunk(2, dim)
    return raw, shift


# -- splines


def spline_law(bins: int = 8, bound: float = 5.0, dim: int = 1) -> Law:
    """A monotonic rational-quadratic spline on ``[-bound, bound]``, and the identity outside.

    Args:
        bins: how many pieces the spline has.
        bound: where the spline ends; its slope is 1 there, as it is outside.
        dim: the dimension along which ``u`` carries the parameters, ``3 * bins - 1`` times as wide there as ``x``: raw widths of
            the bins, each for all elements, then raw heights, then raw slopes at the knots inside. With zeros it is the identity.

    Raises:
        ShapeError: an argument is out of range, or ``u`` is not that wide (on the call).

    References:
        Durkan et al., 2019, arXiv:1906.04032, eq. 4-8 and section 3.1.

    Example:
        >>> law = spline_law(4, 3.0, dim=-1)
        >>> x, u = torch.randn(2, 5), torch.randn(2, 55)
        >>> torch.allclose(law.inverse(law.forward(x, u), u), x, atol=1e-5)
        True
    """
    if isinstance(bins, bool) or not isinstance(bins, int) or not 2 <= bins <= 500:
        raise ShapeError(explain("spline", expected="2 to 500 bins", got=repr(bins), remedy="8 is the usual number"))
    if not 0 < bound < math.inf:
        raise ShapeError(explain("spline", expected="a bound > 0", got=repr(bound), remedy="5 suits standardised data"))
    there = functools.partial(rational_quadratic_spline, bins=bins, bound=bound, dim=dim)
    back = functools.partial(there, inverse=True)
    return Law(
        functools.partial(_first_of, there),
        functools.partial(_first_of, back),
        log_det=functools.partial(_sum_of_second, there),
        call_and_ladj=there,
        inverse_and_ladj=back,
    )


def _first_of(both: _Both, x: Tensor, u: Tensor) -> Tensor:
    return both(x, u)[0]


def _sum_of_second(both: _Both, x: Tensor, u: Tensor) -> Tensor:
    return sum_per_sample(both(x, u)[1])


def elementwise_law(coupling: str | Law, dim: int = 1) -> Law:
    """The law called ``"additive"``, ``"affine"`` or ``"spline"``, or one that was given; it treats each element by itself.

    Raises:
        ShapeError: there is no law of that name, or it is given without ``call_and_ladj`` and ``inverse_and_ladj``.

    Example:
        >>> elementwise_law("additive") is ADDITIVE
        True
    """
    if isinstance(coupling, Law) and coupling.call_and_ladj is not None and coupling.inverse_and_ladj is not None:
        return coupling
    if coupling == "additive":
        return ADDITIVE
    if coupling not in ("affine", "spline"):
        expected = "'additive', 'affine', 'spline' or a revhooks.functional.Law with call_and_ladj= and inverse_and_ladj="
        raise ShapeError(explain("coupling", expected=expected, got=repr(coupling), remedy="pick one of these"))
    return affine_law(dim=dim) if coupling == "affine" else spline_law(dim=dim)


# -- exact streams

_MANTISSA = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


def grid_limit(dtype: torch.dtype, bits: int) -> float:
    """The magnitude below which every multiple of ``2**-bits`` is a number of this dtype, so that sums are exact.

    Raises:
        ShapeError: the dtype is not a real floating one.

    Example:
        >>> grid_limit(torch.float32, 12)
        4096.0
    """
    if dtype not in _MANTISSA:
        known = ", ".join(str(one) for one in _MANTISSA)
        raise ShapeError(explain("grid_bits", expected=f"streams of {known}", got=str(dtype), remedy="leave grid_bits out"))
    return 2.0 ** (_MANTISSA[dtype] - bits)


class _Rounding(torch.autograd.Function):
    """Rounding with the gradient of the identity, as dynamo takes it: without a `jvp`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
        # adding and taking off 1.5 * 2^(mantissa - 1 - bits) leaves the bits above 2^-bits, rounded half to even
        shift = 0.75 * grid_limit(dtype, bits)
        moved = x.to(dtype).add(shift)
        # compiled by torch 2.11, a change in place here gives wrong gradients
        return moved.sub(shift) if torch.compiler.is_compiling() else moved.sub_(shift)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.to(ctx.dtype), None, None


class _Round(_Rounding):
    """The same, in forward mode as well."""

    @staticmethod
    def jvp(_: Any, tangent: Tensor, *__: None) -> Tensor:
        return tangent


def round_to_grid(x: Tensor, bits: int, dtype: torch.dtype | None = None) -> Tensor:
    """The nearest multiples of ``2**-bits``, in ``dtype`` (that of ``x``); the gradient is that of the identity.

    Exact below a quarter of `grid_limit`; what lies above is rounded more coarsely, and never less.

    Raises:
        ShapeError: the dtype is not a real floating one.

    Example:
        >>> round_to_grid(torch.tensor([0.3, -1.1]), 1)
        tensor([ 0.5000, -1.0000])
    """
    function = _Rounding if torch.compiler.is_compiling() else _Round
    return apply(function, x, bits, x.dtype if dtype is None else dtype)  # type: ignore[no-any-return]


def grid_law(bits: int) -> Law:
    """``y = x + round(u)`` on a grid of ``2**-bits``: what it adds it takes off again to the last bit.

    ``x`` must lie on the grid (`round_to_grid`) and ``y`` stay below `grid_limit`; ``u`` may have a narrower dtype. Sums of
    multiples of ``2**-bits`` are then exact in floating point, so that ``x = y - round(u)`` is bitwise what it was, at no
    memory, wherever the branch computes the same ``u`` again.

    Raises:
        ShapeError: ``bits`` is not between 0 and 40.

    Example:
        >>> law = grid_law(8)
        >>> x, u = round_to_grid(torch.randn(5), 8), torch.randn(5)
        >>> torch.equal(law.inverse(law.forward(x, u), u), x)
        True
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 0 <= bits <= 40:
        raise ShapeError(
            explain(
                "grid_bits", expected="an integer from 0 to 40", got=repr(bits), remedy="12 suits streams of order 1 in float32"
            )
        )
    return Law(
        lambda x, u: x + round_to_grid(u, bits, x.dtype),
        lambda y, u: y - round_to_grid(u, bits, y.dtype),
        saves=False,
        log_det=_keeps_volume,
        grid_bits=bits,
    )
