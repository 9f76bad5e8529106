"""Coupling laws and their inverses: pure tensor maths, used by layers, their inverses and the runtime.

A law changes one stream by what a branch computed from another: ``y = forward(x, u)`` with
``x = inverse(y, u)``. Shapes: ``x`` and ``y`` are ``(*)``; ``u`` is what the branch returned.

References:
    NICE (Dinh et al., 2014, arXiv:1410.8516), eq. 7: additive.
    Density estimation using Real NVP (Dinh et al., 2016, arXiv:1605.08803), eq. 7: affine.
    Glow (Kingma and Dhariwal, 2018, arXiv:1807.03039), section 3.3: sigmoid scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .errors import ShapeError, explain

__all__ = ["ADDITIVE", "SCALES", "Law", "additive", "additive_inverse", "affine_law", "sum_per_sample", "wide"]


class Law(NamedTuple):
    """A pair of functions with ``inverse(forward(x, u), u) == x`` for every ``u``.

    Attributes:
        forward: ``y = forward(x, u)``.
        inverse: ``x = inverse(y, u)``.
        saves: whether the ops of ``forward`` save tensors for backward.
        log_det: ``log|det dy/dx|`` of each sample from ``(x, u)``, of shape ``(B,)``; ``None`` where it is not known.
    """

    forward: Callable[[Tensor, Tensor], Tensor]
    inverse: Callable[[Tensor, Tensor], Tensor]
    saves: bool = True
    log_det: Callable[[Tensor, Tensor], Tensor] | None = None


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


ADDITIVE = Law(additive, additive_inverse, saves=False, log_det=_keeps_volume)

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
    factor = SCALES[scale]

    def halves(x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
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

    def forward(x: Tensor, u: Tensor) -> Tensor:
        raw, shift = halves(x, u)
        return x * factor(raw) + shift

    def inverse(y: Tensor, u: Tensor) -> Tensor:
        raw, shift = halves(y, u)
        return (y - shift) / factor(raw)

    def log_det(x: Tensor, u: Tensor) -> Tensor:
        return sum_per_sample(_LOG_SCALES[scale](halves(x, u)[0]))

    return Law(forward, inverse, log_det=log_det)
