"""Fixed-point iteration that returns evidence: the value, and how far it can be trusted.

References:
    Banach, 1922: ``x <- fn(x)`` converges from anywhere if ``fn`` is a contraction.
    Anderson, Iterative procedures for nonlinear integral equations, J. ACM, 1965.
    Walker and Ni, Anderson acceleration for fixed-point iterations, SIAM J. Numer. Anal., 2011, section 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import ShapeError, explain

__all__ = ["Solution", "fixed_point", "tolerance"]

# Relative residuals a few times above where rounding stops the iteration, in each dtype.
_RTOL = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Solution(NamedTuple):
    """What an iteration found, and the evidence for it.

    Attributes:
        value: the last ``fn(x)``, of the start's shape and dtype.
        steps: how often ``fn`` was called.
        residual: the largest ``|fn(x) - x|`` of a sample in the last step, relative to ``max(|fn(x)|, |y0|)``; L2 norms.
        converged: whether every sample's residual is within the tolerance.
    """

    value: Tensor
    steps: int
    residual: float
    converged: bool


def tolerance(dtype: torch.dtype) -> float:
    """The relative residual asked for by default: 1e-14, 1e-6, 4e-3, 3e-2 in float64, float32, float16, bfloat16.

    Example:
        >>> tolerance(torch.float32)
        1e-06
    """
    return _RTOL.get(dtype, 1e-6)


@torch.no_grad()
def fixed_point(
    fn: Callable[[Tensor], Tensor],
    y0: Tensor,
    *,
    rtol: float | None = None,
    atol: float = 0.0,
    max_steps: int = 500,
    anderson: int = 0,
    patience: int = 20,
) -> Solution:
    """Solve ``x = fn(x)`` by iteration from ``y0``; nothing is recorded for backward.

    A sample is done when ``|fn(x) - x| <= atol + rtol max(|fn(x)|, |y0|)`` (L2 norms over all dimensions but the first), the
    iteration when all are. If ``fn`` contracts by ``c`` a step, the value returned is within ``c / (1 - c)`` residuals of the
    solution. The start counts too because ``y0 - g(x)`` is not known better than to the rounding of ``y0``.

    Args:
        fn: maps ``(B, *)`` to ``(B, *)``, each sample by itself; called under ``no_grad``.
        y0: the start, of shape ``(B, *)``, any floating dtype; it is not changed.
        rtol: relative tolerance; `tolerance` of the dtype when ``None``. 0 iterates until nothing moves.
        atol: absolute tolerance.
        max_steps: how often ``fn`` may be called.
        anderson: how many steps back Anderson acceleration looks; 0 is plain (Picard) iteration, which a contraction makes
            safe. 3 to 5 saves steps where ``fn`` contracts slowly, at the memory of twice as many iterates.
        patience: how many steps without progress it takes to give up: rounding stops it, or it does not converge.

    Returns:
        A `Solution`. One that has not converged is returned too: look at ``converged``.

    Raises:
        ShapeError: ``fn`` does not keep shape and dtype, or ``max_steps`` or ``anderson`` is out of range.

    Example:
        >>> solution = fixed_point(torch.cos, torch.zeros(1, dtype=torch.float64))
        >>> round(float(solution.value), 6), solution.converged
        (0.739085, True)
        >>> fixed_point(torch.cos, torch.zeros(1, dtype=torch.float64), anderson=3).steps < solution.steps / 5
        True
    """
    if max_steps < 1 or anderson < 0:
        raise ShapeError(
            explain(
                "fixed_point",
                expected="max_steps >= 1 and anderson >= 0",
                got=f"max_steps={max_steps}, anderson={anderson}",
                remedy="allow at least one step; anderson=0 is plain iteration",
            )
        )
    rtol = tolerance(y0.dtype) if rtol is None else rtol
    mixing = _Anderson(anderson) if anderson else None
    x, floor = y0.detach(), _norms(y0.detach())
    best, reached = (math.inf, math.inf), 0
    for step in range(1, max_steps + 1):
        value = fn(x)
        _check_kept(value, x)
        residual, excess = _measure(value, x, floor, rtol, atol)
        if residual < best[0] or excess < best[1]:
            best, reached = (min(residual, best[0]), min(excess, best[1])), step
        if excess <= 0 or excess == math.inf or step in (reached + patience, max_steps):
            break
        x = value if mixing is None else mixing.next(x, value)
    return Solution(value, step, residual, excess <= 0)


def _measure(value: Tensor, x: Tensor, floor: Tensor, rtol: float, atol: float) -> tuple[float, float]:
    """The largest relative step of a sample, and by how much the worst one misses the tolerance."""
    if value.is_meta or not value.numel():
        return 0.0, 0.0
    distance, scale = _norms(value - x), torch.maximum(_norms(value), floor)
    relative = torch.where(distance > 0, distance / scale, distance)
    excess = distance - (atol + rtol * scale)
    residual, missed = torch.stack([relative.max(), excess.max()]).tolist()  # one wait for the device
    return (residual, missed) if math.isfinite(missed) else (math.inf, math.inf)


def _norms(tensor: Tensor) -> Tensor:
    """Of each sample, in float32 or wider."""
    tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    norms: Tensor = torch.linalg.vector_norm(tensor.flatten(1), dim=1) if tensor.dim() > 1 else tensor.abs()
    return norms


def _check_kept(value: Tensor, x: Tensor) -> None:
    if value.shape != x.shape or value.dtype != x.dtype:
        raise ShapeError(
            explain(
                "fixed_point",
                expected=f"a function that keeps shape {tuple(x.shape)} and {x.dtype}",
                got=f"shape {tuple(value.shape)} and {value.dtype} from it",
                remedy="iterate a map of the space into itself",
            )
        )


class _Anderson:
    """The next iterate: the affine combination of recent values whose residuals cancel best, for each sample."""

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._residuals: list[Tensor] = []  # (B, N), the last memory + 1
        self._values: list[Tensor] = []

    def next(self, x: Tensor, value: Tensor) -> Tensor:
        self._values.append(value.reshape(len(value), -1))
        self._residuals.append((value - x).reshape(len(value), -1))
        del self._values[: -self._memory - 1], self._residuals[: -self._memory - 1]
        if len(self._values) == 1:
            return value
        last = self._residuals[-1].double()[..., None]  # (B, N, 1)
        changes = torch.stack([self._residuals[-1] - r for r in self._residuals[:-1]], 2).double()  # (B, N, m)
        size = changes.square().sum((1, 2), keepdim=True).sqrt()
        changes, last = (t / torch.where(size > 0, size, 1) for t in (changes, last))
        # the ridge is for a sample that has converged: its changes vanish
        gram = changes.mT @ changes + 1e-12 * torch.eye(changes.shape[2], dtype=changes.dtype, device=changes.device)
        gamma = torch.linalg.solve(gram, changes.mT @ last).to(value.dtype)
        steps = torch.stack([self._values[-1] - v for v in self._values[:-1]], 2)
        mixed: Tensor = self._values[-1] - (steps @ gamma)[..., 0]
        return mixed.reshape(value.shape)
