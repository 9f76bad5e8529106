"""Layers that move elements and compute nothing: space to depth, reshape, padding."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import ShapeError, explain
from ..registry import register
from .flow import Flow, inverse_of_forward

__all__ = ["Flatten", "Pad", "Reshape", "Squeeze", "Unsqueeze"]


class _Blocks(Flow):
    """Blocks of ``factor`` positions along every spatial dimension, moved to the channels and back."""

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        if factor < 1:
            raise self._refuse("factor >= 1", repr(factor), "pass the edge of the blocks")
        self.factor = factor

    def _to_depth(self, x: Tensor) -> Tensor:
        f, spatial = self.factor, x.shape[2:]
        if x.dim() < 3 or any(size % f for size in spatial):
            expected = f"(B, C, *) with spatial sizes that are multiples of {f}"
            raise self._refuse(expected, f"shape {tuple(x.shape)}", "pad the input, or choose another factor")
        n = len(spatial)
        blocks = x.reshape(*x.shape[:2], *(part for size in spatial for part in (size // f, f)))
        inside, across = range(3, 3 + 2 * n, 2), range(2, 2 + 2 * n, 2)
        return blocks.permute(0, 1, *inside, *across).reshape(len(x), -1, *(size // f for size in spatial))

    def _to_space(self, y: Tensor) -> Tensor:
        f, spatial = self.factor, y.shape[2:]
        n = len(spatial)
        if y.dim() < 3 or y.shape[1] % f**n:
            expected = f"(B, C, *) with channels that are a multiple of {f}^{max(n, 1)}"
            raise self._refuse(expected, f"shape {tuple(y.shape)}", "pass what the other direction returned")
        channels = y.shape[1] // f**n
        blocks = y.reshape(len(y), channels, *[f] * n, *spatial)
        order = [axis for i in range(n) for axis in (2 + n + i, 2 + i)]
        return blocks.permute(0, 1, *order).reshape(len(y), channels, *(size * f for size in spatial))

    def extra_repr(self) -> str:
        """The edge of the blocks."""
        return f"factor={self.factor}"


class Squeeze(_Blocks):
    """Space to depth: every block of ``factor`` by ``factor`` positions becomes ``factor**2`` channels, in 2-D; so in n-D.

    Args:
        factor: the edge of the blocks.

    Shape:
        Input ``(B, C, *S)``, output ``(B, C * factor**n, *(S / factor))`` for n spatial dimensions; the channels are in the
        order of `torch.nn.PixelUnshuffle`. Any dtype.

    Raises:
        ShapeError: a spatial size is no multiple of ``factor`` (on the call).

    References:
        Dinh et al., 2016, arXiv:1605.08803, section 3.6.

    Example:
        >>> layer = Squeeze(2)
        >>> x = torch.randn(1, 3, 4, 4)
        >>> layer(x).shape, torch.equal(layer.inverse(layer(x)), x), Squeeze(2)(torch.randn(1, 1, 4, 4, 4)).shape
        (torch.Size([1, 12, 2, 2]), True, torch.Size([1, 8, 2, 2, 2]))
    """

    def forward(self, x: Tensor) -> Tensor:
        """Space to depth."""
        return self._to_depth(x)

    @inverse_of_forward
    def inverse(self, y: Tensor) -> Tensor:
        """Depth to space."""
        return self._to_space(y)


class Unsqueeze(_Blocks):
    """Depth to space, the inverse of `Squeeze`.

    Args:
        factor: the edge of the blocks.

    Shape:
        Input ``(B, C * factor**n, *S)``, output ``(B, C, *(S * factor))`` for n spatial dimensions. Any dtype.

    Raises:
        ShapeError: the number of channels is no multiple of ``factor**n`` (on the call).

    Example:
        >>> Unsqueeze(2)(torch.randn(1, 12, 2, 2)).shape
        torch.Size([1, 3, 4, 4])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Depth to space."""
        return self._to_space(x)

    @inverse_of_forward
    def inverse(self, y: Tensor) -> Tensor:
        """Space to depth."""
        return self._to_depth(y)


class Reshape(Flow):
    """Another shape for every sample; the elements stay in their order.

    Args:
        before: the shape of a sample going in.
        after: the shape of a sample coming out, of as many elements.

    Shape:
        Input ``(B, *before)``, output ``(B, *after)``; any dtype.

    Raises:
        ShapeError: the shapes have different numbers of elements, or the input has another shape (on the call).

    Example:
        >>> layer = Reshape((4, 4), (2, 8))
        >>> layer(torch.zeros(3, 4, 4)).shape, layer.inverse(torch.zeros(3, 2, 8)).shape
        (torch.Size([3, 2, 8]), torch.Size([3, 4, 4]))
    """

    def __init__(self, before: Sequence[int], after: Sequence[int]) -> None:
        super().__init__()
        if math.prod(before) != math.prod(after):
            raise self._refuse("two shapes of as many elements", f"{tuple(before)} and {tuple(after)}", "mend one of them")
        self.before = tuple(before)
        self.after = tuple(after)

    def forward(self, x: Tensor) -> Tensor:
        """To the shape ``after``; a view where possible."""
        return self._turn(x, self.before, self.after)

    def inverse(self, y: Tensor) -> Tensor:
        """Back to the shape ``before``; a view where possible."""
        return self._turn(y, self.after, self.before)

    def _turn(self, x: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
        if x.shape[1:] != old:
            raise self._refuse(f"samples of shape {old}", f"{tuple(x.shape[1:])}", "give the layer the shape that it gets")
        return x.reshape(len(x), *new)

    def extra_repr(self) -> str:
        """Both shapes."""
        return f"{self.before}, {self.after}"


class Flatten(Reshape):
    """Every sample as a vector.

    Args:
        shape: the shape of a sample; the inverse needs it.

    Shape:
        Input ``(B, *shape)``, output ``(B, N)``; any dtype.

    Raises:
        ShapeError: the input has another shape (on the call).

    Example:
        >>> layer = Flatten((3, 4, 4))
        >>> layer(torch.zeros(2, 3, 4, 4)).shape, layer.inverse(torch.zeros(2, 48)).shape
        (torch.Size([2, 48]), torch.Size([2, 3, 4, 4]))
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__(shape, (math.prod(shape),))


class Pad(nn.Module):
    """Append channels of zeros: injective, not bijective, so it has no log-abs-det.

    ``inverse`` drops the channels: ``inverse(forward(x))`` is ``x`` exactly, but ``forward(inverse(y))`` is ``y`` only where
    those channels are zero, as those of an arbitrary latent are not.

    Args:
        extra: how many channels to append.
        dim: the dimension that they are in.

    Shape:
        Input ``(*)``, output ``(*)`` with ``extra`` more in ``dim``; any dtype.

    Raises:
        ShapeError: ``extra`` is negative, or the input has too few channels for the inverse (on the call).

    References:
        i-RevNet (Jacobsen et al., 2018, arXiv:1802.07088), section 3.1: injective padding.

    Example:
        >>> layer = Pad(5)
        >>> layer(torch.ones(2, 3, 4)).shape, torch.equal(layer.inverse(layer(torch.ones(2, 3, 4))), torch.ones(2, 3, 4))
        (torch.Size([2, 8, 4]), True)
    """

    def __init__(self, extra: int, *, dim: int = 1) -> None:
        super().__init__()
        if extra < 0:
            raise self._refuse("extra >= 0", repr(extra))
        self.extra = extra
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """The input, then zeros."""
        if not -x.dim() <= self.dim < x.dim():
            raise self._refuse(f"an input with dim {self.dim}", f"shape {tuple(x.shape)}")
        shape = list(x.shape)
        shape[self.dim] = self.extra
        return torch.cat([x, x.new_zeros(shape)], self.dim)

    def inverse(self, y: Tensor) -> Tensor:
        """What is before the zeros, as a view."""
        if not -y.dim() <= self.dim < y.dim() or y.shape[self.dim] < self.extra:
            raise self._refuse(f"{self.extra} channels or more in dim {self.dim}", f"shape {tuple(y.shape)}")
        return y.narrow(self.dim, 0, y.shape[self.dim] - self.extra)

    def _refuse(self, expected: str, got: str) -> ShapeError:
        return ShapeError(explain("Pad", expected=expected, got=got, remedy="choose extra= and dim= to fit the input"))

    def extra_repr(self) -> str:
        """Channels and dimension."""
        return f"{self.extra}, dim={self.dim}"


# They save nothing, but what is not registered ends the chain: the output before it and its own would both be held.
register(Squeeze, inverse="inverse", log_det="log_det")
register(Unsqueeze, inverse="inverse", log_det="log_det")
# Not registered: Reshape and Flatten give views, which share the memory that is held before them. Pad's output has exact
# zeros, which do not survive an inversion, so it would start a new chain anyway.
