"""Down- and upsampling by orthogonal transforms of blocks: nothing is lost, and the inverse is the transpose.

An orthogonal convolution whose stride is its kernel's size multiplies every block of positions by an orthogonal matrix;
its transposed convolution is its inverse.

References:
    iUNets (Etmann et al., 2020, arXiv:2005.05220), section 3.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

from ..registry import register
from .flow import inverse_of_forward, own_precision
from .reshape import _Blocks

__all__ = ["HaarDownsampling", "HaarUpsampling", "OrthogonalDownsampling", "OrthogonalUpsampling"]


class _Resampling(_Blocks):
    """A matrix for every block of every channel of the finer side."""

    def matrix(self, x: Tensor, ndim: int) -> Tensor:
        """The orthogonal matrices ``(C or 1, m, m)``, with ``m = factor**ndim``, in the dtype of ``x``."""
        raise NotImplementedError

    def _down(self, x: Tensor) -> Tensor:
        return self._turn(self._to_depth(x), transpose=False)

    def _up(self, y: Tensor) -> Tensor:
        return self._to_space(self._turn(y, transpose=True))

    def _turn(self, y: Tensor, *, transpose: bool) -> Tensor:
        ndim = y.dim() - 2
        if ndim < 1 or y.shape[1] % self.factor**ndim:
            expected = f"(B, C, *) with channels that are a multiple of {self.factor}^{max(ndim, 1)}"
            raise self._refuse(expected, f"shape {tuple(y.shape)}", "pass what the other direction returned")
        with own_precision(y):
            matrix = self.matrix(y, ndim)
            blocks = y.reshape(len(y), -1, matrix.shape[-1], math.prod(y.shape[2:]))
            return torch.matmul(matrix.mT if transpose else matrix, blocks).view(y.shape)


def _precise(device: torch.device) -> torch.dtype:
    """Where there is float64: a matrix that is orthogonal up to 2e-6 only would drift in a deep net."""
    return torch.float32 if device.type == "mps" else torch.float64


def _cosine(factor: int, ndim: int, device: torch.device) -> Tensor:
    """The orthogonal discrete cosine transform (DCT-II) of blocks; for ``factor=2`` the Haar transform."""
    n = torch.arange(factor, dtype=_precise(device), device=device)
    matrix = torch.cos(torch.pi / factor * (n + 0.5) * n[:, None]) * math.sqrt(2 / factor)
    matrix[0] /= math.sqrt(2)
    return functools.reduce(torch.kron, [matrix] * ndim)


class _Haar(_Resampling):
    def __init__(self) -> None:
        super().__init__(factor=2)

    def matrix(self, x: Tensor, ndim: int) -> Tensor:
        return _cosine(2, ndim, x.device).to(x.dtype)[None]

    def extra_repr(self) -> str:
        return ""


class HaarDownsampling(_Haar):
    """Every channel into its averages and differences at half the resolution: the orthogonal Haar wavelet, in any n-D.

    Shape:
        Input ``(B, C, *S)`` with even sizes, output ``(B, C * 2**n, *(S / 2))`` for n spatial dimensions: the
        bands of a channel lie side by side, its averages first. Any floating dtype.

    Raises:
        ShapeError: a spatial size is odd (on the call).

    References:
        Ardizzone et al., 2019, arXiv:1907.02392, section 3.2.

    Example:
        >>> layer = HaarDownsampling()
        >>> layer(torch.ones(1, 1, 4, 4))[0, :, 0, 0]
        tensor([2., 0., 0., 0.])
        >>> x = torch.randn(2, 3, 8, 8, 8)
        >>> layer(x).shape, torch.allclose(layer.inverse(layer(x)), x, atol=1e-6)
        (torch.Size([2, 24, 4, 4, 4]), True)
    """

    def forward(self, x: Tensor) -> Tensor:
        """Averages and differences."""
        return self._down(x)

    @inverse_of_forward
    def inverse(self, y: Tensor) -> Tensor:
        """Back from averages and differences."""
        return self._up(y)


class HaarUpsampling(_Haar):
    """The inverse of `HaarDownsampling`.

    Shape:
        Input ``(B, C * 2**n, *S)``, output ``(B, C, *(2 * S))`` for n spatial dimensions. Any floating dtype.

    Raises:
        ShapeError: the number of channels is no multiple of ``2**n`` (on the call).

    Example:
        >>> HaarUpsampling()(torch.randn(1, 12, 2, 2)).shape
        torch.Size([1, 3, 4, 4])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Back from averages and differences."""
        return self._up(x)

    @inverse_of_forward
    def inverse(self, y: Tensor) -> Tensor:
        """Averages and differences."""
        return self._down(y)


class _Orthogonal(_Resampling):
    def __init__(self, channels: int, *, ndim: int = 2, factor: int = 2, method: str = "exp") -> None:
        super().__init__(factor)
        if method not in ("exp", "cayley"):
            raise self._refuse("method 'exp' or 'cayley'", repr(method), "pick one of these")
        if ndim < 1:
            raise self._refuse("ndim >= 1", repr(ndim), "pass the number of spatial dimensions")
        self.channels = channels
        self.ndim = ndim
        self.method = method
        self.skew = nn.Parameter(torch.zeros(channels, factor**ndim, factor**ndim))

    def matrix(self, x: Tensor, ndim: int) -> Tensor:
        if ndim != self.ndim or x.shape[1] != self.channels * self.skew.shape[-1]:
            expected = f"{self.channels} channels in {self.ndim} spatial dimensions on the finer side"
            raise self._refuse(expected, f"shape {tuple(x.shape)} on the coarser side", "choose channels= and ndim= to fit")
        skew = self.skew.to(_precise(x.device)).triu(1)
        skew = skew - skew.mT
        if self.method == "exp":
            rotation = torch.matrix_exp(skew)
        else:
            identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
            rotation = torch.linalg.solve(identity + skew, identity - skew)
        return (rotation @ _cosine(self.factor, ndim, x.device)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.channels}, ndim={self.ndim}, factor={self.factor}, method={self.method!r}"


class OrthogonalDownsampling(_Orthogonal):
    """A learned orthogonal transform of every block: ``factor**n`` channels for one, at ``1/factor`` of the resolution.

    Each channel has a matrix ``rotation(A) @ base`` of its own, with ``A`` skew-symmetric: ``exp(A)``, or the Cayley
    transform ``(I + A)^-1 (I - A)``. It starts as the cosine transform, which for ``factor=2`` is that of Haar.

    Args:
        channels: how many channels the finer side has.
        ndim: how many spatial dimensions.
        factor: the edge of the blocks.
        method: ``"exp"`` or ``"cayley"`` (cheaper; some rotations are out of its reach).

    Shape:
        Input ``(B, C, *S)``, output ``(B, C * factor**n, *(S / factor))``; any floating dtype, which is kept.

    Raises:
        ShapeError: an argument is none of the above, or the input does not fit (on the call).

    References:
        Etmann et al., 2020, arXiv:2005.05220, section 3.

    Example:
        >>> layer = OrthogonalDownsampling(3)
        >>> x = torch.randn(2, 3, 8, 8)
        >>> layer(x).shape, torch.allclose(layer.inverse(layer(x)), x, atol=1e-5)
        (torch.Size([2, 12, 4, 4]), True)
    """

    def forward(self, x: Tensor) -> Tensor:
        """Transform every block."""
        return self._down(x)

    @inverse_of_forward
    def inverse(self, y: Tensor) -> Tensor:
        """Transform every block back, by the transposed matrix."""
        return self._up(y)


class OrthogonalUpsampling(_Orthogonal):
    """A learned orthogonal transform from channels to blocks, as the inverse of an `OrthogonalDownsampling`.

    Args:
        channels: how many channels the finer side has.
        ndim: how many spatial dimensions.
        factor: the edge of the blocks.
        method: as in `OrthogonalDownsampling`.

    Shape:
        Input ``(B, C * factor**n, *S)``, output ``(B, C, *(S * factor))``; any floating dtype, which is kept.

    Raises:
        ShapeError: an argument is none of the above, or the input does not fit (on the call).

    References:
        Etmann et al., 2020, arXiv:2005.05220, section 3.

    Example:
        >>> layer = OrthogonalUpsampling(3, method="cayley")
        >>> layer(torch.randn(2, 12, 4, 4)).shape
        torch.Size([2, 3, 8, 8])
    """

    def forward(self, x: Tensor) -> Tensor:
        """From channels to blocks."""
        return self._up(x)

    @inverse_of_forward
    def inverse(self, y: Tensor) -> Tensor:
        """From blocks to channels."""
        return self._down(y)


for _cls in (HaarDownsampling, HaarUpsampling, OrthogonalDownsampling, OrthogonalUpsampling):
    register(_cls, inverse="inverse", log_det="log_det")
