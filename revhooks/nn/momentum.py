"""Momentum steps: residual blocks that can be inverted, with the same branches.

A residual block computes ``x' = x + f(x)``. With a velocity beside the position,
``v' = gamma v + (1 - gamma) f(x)``, ``x' = x + v'``, the step is inverted by ``x = x' - v'``,
``v = (v' - (1 - gamma) f(x)) / gamma``: one evaluation of ``f``, whatever ``f`` is.

Going back divides by gamma each step, so an error grows by ``gamma**-steps``. Relative error of the input, tanh
branches, gamma 0.9:

    =========  ========  ========  =========  =========
    steps      10        50        100        200
    =========  ========  ========  =========  =========
    float32    2e-7      9e-5      6e-2       2e+3
    float64    3e-16     2e-13     1e-10      1e-5
    =========  ========  ========  =========  =========

With gamma 0.5 float32 is lost after 25 steps, with 0.99 it has 5 digits left after 200.

`revhooks.nn.MomentumSequential` therefore holds the streams exactly every so many steps, or, with ``exact=True``, computes on a
grid and loses nothing.

References:
    Momentum Residual Neural Networks (Sander et al., 2021, arXiv:2102.07870).
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RegistrationError, ShapeError, explain
from ..functional import wide
from ..registry import register
from .exact import Grid, accelerate, brake, on_grid, ratio_of
from .keys import TakesKeys

__all__ = ["ExactMomentumResidual", "MomentumResidual"]


class MomentumResidual(TakesKeys):
    """One momentum step, ``(x, v) -> (x', v')``: ``v' = gamma v + (1 - gamma) f(x)``, ``x' = x + v'``.

    Args:
        f: a module from ``x``, and the extra arguments, to the shape of ``x``.
        gamma: the momentum, between 0 and 1; near 0 a plain residual block, and ill-conditioned to invert.

    Shape:
        ``x``, ``v`` and both outputs ``(*)``, equal; any floating dtype.

    Raises:
        RegistrationError: ``f`` is no module.
        ShapeError: ``gamma`` is not between 0 and 1, or ``f`` changes the shape (on the call).

    References:
        Sander et al., 2021, arXiv:2102.07870, eq. 2-3.

    Example:
        >>> step = MomentumResidual(nn.Linear(4, 4), gamma=0.9)
        >>> x, v = torch.randn(2, 3, 4)
        >>> torch.allclose(step.inverse(*step(x, v))[1], v, atol=1e-5)
        True
    """

    def __init__(self, f: nn.Module, *, gamma: float | Fraction = 0.9) -> None:
        super().__init__()
        if not isinstance(f, nn.Module):
            raise RegistrationError(
                explain(type(self).__name__, expected="f that is a module", got=type(f).__name__, remedy="wrap it in a module")
            )
        if not 0 < gamma < 1:
            raise ShapeError(
                explain(
                    type(self).__name__,
                    expected="a gamma between 0 and 1, both excluded",
                    got=str(gamma),
                    remedy="0.9 is usual; gamma 0 is a plain residual block, which has no inverse",
                )
            )
        self.f = f
        self.gamma = float(gamma)
        self.takes_keys = {"": "f."}

    def forward(self, x: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The next position and velocity; extra arguments go to ``f``.

        Raises:
            ShapeError: ``v``, or what ``f`` returns, has another shape than ``x``.
        """
        v = self.gamma * v + self.push(x, v, args, kwargs)
        return x + v, v

    def inverse(self, x: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The position and velocity before the step.

        Raises:
            ShapeError: as in `forward`.
        """
        x = x - v
        return x, (v - self.push(x, v, args, kwargs)) / self.gamma

    def log_det(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """``log|det d(x', v')/d(x, v)|`` of each sample, shape ``(B,)``: ``log(gamma)`` for every element of the velocity."""
        elements = x.numel() // max(len(x), 1)
        return x.new_full((), elements * math.log(self.gamma), dtype=wide(x.dtype)).expand(len(x))

    def push(self, x: Tensor, v: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """``(1 - gamma) f(x)``.

        Raises:
            ShapeError: ``v``, or what ``f`` returns, has another shape than ``x``.
        """
        update = self.f(x, *args, **kwargs)
        if not isinstance(update, Tensor) or update.shape != x.shape or v.shape != x.shape:
            raise ShapeError(
                explain(
                    f"momentum step of {type(self.f).__name__}",
                    expected=f"a velocity and a tensor from f of the shape of the position, {tuple(x.shape)}",
                    got=f"{tuple(v.shape)} and {tuple(update.shape) if isinstance(update, Tensor) else type(update).__name__}",
                    remedy="let f keep the shape; name a layer that changes it in plain=",
                )
            )
        return (1 - self.gamma) * update

    def extra_repr(self) -> str:
        """The momentum."""
        return f"gamma={self.gamma:g}"


class ExactMomentumResidual(MomentumResidual):
    """One momentum step on a grid, exact to the bit: ``(x, v, store) -> (x', v', store')``.

    `revhooks.nn.MomentumSequential` with ``exact=True`` chains them, gives them a store, and checks their range.

    Args:
        f: a module from ``x``, and the extra arguments, to the shape of ``x``.
        gamma: the momentum, a fraction between 0 and 1 (`revhooks.nn.exact.ratio_of`).
        grid_bits: positions are multiples of ``2**-grid_bits``: 12 for float32 and 32 for float64 when ``None``.

    Shape:
        ``x`` and ``v`` ``(*)``, float32 or float64, on the `revhooks.nn.exact.Grid`; ``store`` ``(*)``, integers.

    Raises:
        ShapeError: ``gamma`` is no such fraction; the dtype has too few digits, or ``f`` changes the shape (on the call).

    References:
        Sander et al., 2021, arXiv:2102.07870, eq. 2-3. Maclaurin et al., 2015, arXiv:1502.03492, algorithm 3.

    Example:
        >>> step = ExactMomentumResidual(nn.Linear(4, 4))
        >>> x, v = on_grid(torch.randn(2, 3, 4), 12)
        >>> state = step(x, v, torch.zeros(3, 4, dtype=torch.int8))
        >>> torch.equal(step.inverse(*state)[0], x)
        True
    """

    def __init__(self, f: nn.Module, *, gamma: float | Fraction = 0.9, grid_bits: int | None = None) -> None:
        super().__init__(f, gamma=gamma)
        self.ratio = ratio_of(gamma)
        self.grid_bits = grid_bits

    def forward(  # type: ignore[override]
        self, x: Tensor, v: Tensor, store: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The next position, velocity and store; the gradient is that of the step without rounding.

        Raises:
            ShapeError: the dtype has too few digits, or shapes do not fit.
        """
        grid = self.grid(x.dtype)
        push = self.push(x, v, args, kwargs).to(x.dtype)
        v, store = accelerate(v, push, store, self.ratio, grid)
        return x + on_grid(v, grid.x_bits), v, store

    def inverse(  # type: ignore[override]
        self, x: Tensor, v: Tensor, store: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The position, velocity and store before the step, to the bit.

        Raises:
            ShapeError: as in `forward`.
        """
        grid = self.grid(x.dtype)
        x = x - on_grid(v, grid.x_bits)
        push = self.push(x, v, args, kwargs).to(x.dtype)
        return x, *brake(v, push, store, self.ratio, grid)

    def grid(self, dtype: torch.dtype) -> Grid:
        """The grids of its streams."""
        return Grid.of(dtype, self.ratio, self.grid_bits)


register(MomentumResidual, inverse="inverse", keeps_zeros=(1,), branches="f", log_det="log_det")
register(ExactMomentumResidual, inverse="inverse", keeps_zeros=True, branches="f", log_det="log_det")
