"""Whether streams on a grid stay where sums on it are exact."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..capture import is_capturing
from ..errors import GridError, explain
from ..functional import grid_limit
from ..storage import is_near
from ..tracing import is_recorded

if TYPE_CHECKING:
    from .coupling import Coupling

__all__ = ["RangeWatch"]


class RangeWatch:
    """Sees that streams on a grid stay where sums on it are exact.

    On a CPU every stream is looked at when it comes; on an accelerator the extremes are read once, when all have come.
    """

    def __init__(self, coupling: Coupling) -> None:
        self._coupling = coupling
        self._bits = coupling.grid_bits
        self._extremes: list[tuple[int, torch.dtype, Tensor]] = []

    def see(self, index: int, stream: Tensor) -> None:
        """A stream after step ``index``.

        Raises:
            GridError: it is out of range.
        """
        if self._bits is None or stream.is_meta or is_recorded() or is_capturing(stream.device):
            return
        extreme = torch.stack(torch.aminmax(stream.detach())).abs_().max()
        if is_near(stream.device):
            self._judge(index, stream.dtype, float(extreme))
        else:
            self._extremes.append((index, stream.dtype, extreme))

    def close(self) -> None:
        """All streams have come.

        Raises:
            GridError: one was out of range.
        """
        if self._extremes:
            values = torch.stack([extreme.float() for _, _, extreme in self._extremes]).tolist()
            for (index, dtype, _), value in zip(self._extremes, values, strict=True):
                self._judge(index, dtype, value)

    def _judge(self, index: int, dtype: torch.dtype, value: float) -> None:
        limit = grid_limit(dtype, self._bits or 0)
        if value >= limit:
            raise GridError(
                explain(
                    f"{type(self._coupling).__name__}, step {index}",
                    expected=f"streams below {limit:g} in magnitude, where a grid of 2**-{self._bits} is exact in {dtype}",
                    got=f"{value:g}",
                    remedy="choose a smaller grid_bits, a wider dtype, or normalise the branches",
                )
            )
