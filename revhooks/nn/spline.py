"""Couplings by rational-quadratic splines.

References:
    Neural Spline Flows (Durkan et al., 2019, arXiv:1906.04032).
"""

from __future__ import annotations

from torch import nn

from ..functional import Law, spline_law
from .coupling import _PairCoupling

__all__ = ["SplineCoupling"]


class SplineCoupling(_PairCoupling):
    """Each element of a stream goes through a rational-quadratic spline whose parameters a branch computes from the other.

    The splines are monotonic on ``[-bound, bound]`` and the identity outside. What a branch returns is ``3 * bins - 1`` times
    as wide along ``dim`` as the stream that it changes: raw widths of the bins, then raw heights, then raw slopes, each for all
    channels (`revhooks.functional.spline_law`); zeros make the identity. ``SplineCoupling(f)`` is one-sided, as `AffineCoupling`.

    Args:
        f: maps the second stream (and the extra arguments) to ``3 * bins - 1`` times the first along ``dim``.
        g: maps the first stream to as many times the second; ``None``: the second stream stays as it is.
        dim: the dimension along which the input is split.
        sizes: the two sizes along ``dim``; equal halves when ``None``.
        swap: ``f`` changes the second stream and ``g`` the first, so that layers of one branch can alternate.
        bins: how many pieces a spline has.
        bound: where the splines end.

    Shape:
        Input and output ``(*)``, equal; any number of dimensions, any floating dtype; splines are computed in at least float32.

    Raises:
        ShapeError: ``bins`` or ``bound`` is out of range, or shapes do not fit (on the call).

    References:
        Durkan et al., 2019, arXiv:1906.04032.

    Example:
        >>> import torch
        >>> block = SplineCoupling(nn.Linear(2, 11 * 3), nn.Linear(3, 11 * 2), sizes=(3, 2), bins=4).double()
        >>> x = torch.randn(6, 5).double()
        >>> torch.allclose(block.inverse(block(x)), x)
        True
    """

    def __init__(
        self,
        f: nn.Module,
        g: nn.Module | None = None,
        *,
        dim: int = 1,
        sizes: tuple[int, int] | None = None,
        swap: bool = False,
        bins: int = 8,
        bound: float = 5.0,
    ) -> None:
        super().__init__(f, g, dim=dim, sizes=sizes, swap=swap)
        spline_law(bins, bound, dim)  # what is out of range is refused here, not at the first call
        self.bins = bins
        self.bound = bound

    def law(self) -> Law:
        """How a stream changes."""
        return spline_law(self.bins, self.bound, self.dim)

    def extra_repr(self) -> str:
        """How the input is split, and the spline."""
        return f"{super().extra_repr()}, bins={self.bins}, bound={self.bound}"
