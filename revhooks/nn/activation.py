"""Bijective activations, each with its inverse and its derivative's logarithm.

`LeakyReLU` and `SinhArcsinh` map the line onto itself, and ``reversible()`` inverts them. The others squash or underflow: far
out many inputs share one output (in float32 ``tanh(x)`` is 1 from x = 9 on), which no inverse tells apart. So they are not
registered, and what they save is kept.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..functional import sum_per_sample, wide
from ..registry import register
from .flow import Flow, inverse_of_forward, inverse_with_ladj, invertible_with_ladj

__all__ = ["LeakyReLU", "Logit", "Sigmoid", "SinhArcsinh", "Softplus", "Tanh"]


class _Elementwise(Flow):
    """An activation; subclasses define `forward`, `inverse` and `log_derivative`."""

    def log_derivative(self, x: Tensor) -> Tensor:
        """``log|dy/dx|`` of every element."""
        raise NotImplementedError

    def log_det(self, x: Tensor) -> Tensor:
        """The sum of `log_derivative` over each sample: ``(B,)``."""
        return sum_per_sample(self.log_derivative(x))


class LeakyReLU(_Elementwise):
    """``y = x`` where ``x > 0``, else ``negative_slope * x``.

    Args:
        negative_slope: positive, else there is no inverse.

    Shape:
        Input and output ``(B, *)``; any floating dtype.

    Raises:
        ShapeError: ``negative_slope`` is not positive.

    Example:
        >>> layer = LeakyReLU(0.5)
        >>> y, ladj = layer.call_and_ladj(torch.tensor([[1.0, -2.0, -4.0]]))
        >>> y, layer.inverse(y), ladj
        (tensor([[ 1., -1., -2.]]), tensor([[ 1., -2., -4.]]), tensor([-1.3863]))
    """

    def __init__(self, negative_slope: float = 0.01) -> None:
        super().__init__()
        if not 0 < negative_slope < math.inf:
            raise self._refuse("negative_slope > 0", repr(negative_slope), "pass a positive slope, so that it has an inverse")
        self.negative_slope = negative_slope

    def forward(self, x: Tensor) -> Tensor:
        """Scale the negative part."""
        return F.leaky_relu(x, self.negative_slope)

    @inverse_of_forward
    def inverse(self, y: Tensor) -> Tensor:
        """Scale the negative part back."""
        return F.leaky_relu(y, 1 / self.negative_slope)

    def log_derivative(self, x: Tensor) -> Tensor:
        """0 or ``log(negative_slope)``."""
        return (x <= 0).to(wide(x.dtype)) * math.log(self.negative_slope)

    def extra_repr(self) -> str:
        """The slope."""
        return f"negative_slope={self.negative_slope}"


class SinhArcsinh(_Elementwise):
    """``y = sinh(exp(log_tail) * arcsinh(x) + skew)``: learns heavier or lighter tails, and skewness, for every channel.

    It starts as the identity.

    Args:
        channels: how many channels there are.
        dim: the dimension that they are in.

    Shape:
        Input and output ``(B, *)`` with ``channels`` in ``dim``; any floating dtype, which is kept.

    Raises:
        ShapeError: the input has other channels (on the call).

    References:
        Jones and Pewsey, 2009, Sinh-arcsinh distributions, Biometrika 96(4), eq. 1.

    Example:
        >>> layer = SinhArcsinh(3)
        >>> x = torch.randn(4, 3)
        >>> torch.allclose(layer(x), x, atol=1e-5), torch.allclose(layer.log_det(x), torch.zeros(4), atol=1e-5)
        (True, True)
    """

    def __init__(self, channels: int, *, dim: int = 1) -> None:
        super().__init__()
        self.channels = channels
        self.dim = dim
        self.log_tail = nn.Parameter(torch.zeros(channels))
        self.skew = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Bend."""
        log_tail, skew = self._broadcast(x)
        return torch.sinh(log_tail.exp() * torch.asinh(x) + skew)

    @inverse_of_forward
    def inverse(self, y: Tensor) -> Tensor:
        """Bend back."""
        log_tail, skew = self._broadcast(y)
        return torch.sinh((torch.asinh(y) - skew) / log_tail.exp())

    def log_derivative(self, x: Tensor) -> Tensor:
        """``log_tail + log cosh(u) - log(1 + x^2) / 2``, with ``u`` the argument of sinh."""
        log_tail, skew = self._broadcast(x)
        u = log_tail.exp() * torch.asinh(x) + skew
        return log_tail + torch.logaddexp(u, -u) - math.log(2) - torch.log1p(x * x) / 2

    @invertible_with_ladj
    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` and `log_det`."""
        return SinhArcsinh.forward(self, x), self.log_det(x)

    @inverse_with_ladj
    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """`inverse`, and minus the `log_det` there."""
        return super().inverse_and_ladj(y)

    def _broadcast(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = [1] * x.dim()
        shape[self._channel_dim(x, self.dim, self.channels)] = self.channels
        return self.log_tail.to(x.dtype).view(shape), self.skew.to(x.dtype).view(shape)

    def extra_repr(self) -> str:
        """Channels and where they are."""
        return f"{self.channels}, dim={self.dim}"


class Softplus(_Elementwise):
    """``y = log(1 + exp(x))``, onto the positive numbers. Its inverse gives -inf where ``exp(x)`` underflows to 0.

    Shape:
        Input and output ``(B, *)``; any floating dtype.

    Example:
        >>> layer = Softplus()
        >>> x = torch.tensor([[-30.0, 0.0, 30.0]])
        >>> torch.allclose(layer.inverse(layer(x)), x)
        True
    """

    def forward(self, x: Tensor) -> Tensor:
        """Onto the positive numbers; past the threshold ``y = x`` is exact in float64 too."""
        return F.softplus(x, threshold=40)

    def inverse(self, y: Tensor) -> Tensor:
        """``log(exp(y) - 1)``, for positive ``y``."""
        return y + torch.log(-torch.expm1(-y))

    def log_derivative(self, x: Tensor) -> Tensor:
        """``log sigmoid(x)``."""
        return F.logsigmoid(x)


class Tanh(_Elementwise):
    """``y = tanh(x)``, onto (-1, 1). Its inverse loses ``2 |x| / log(10)`` digits and is infinite where ``tanh(x)`` rounds to 1.

    Shape:
        Input and output ``(B, *)``; any floating dtype.

    Example:
        >>> layer = Tanh()
        >>> x = torch.tensor([[-2.0, 0.0, 1.0]])
        >>> torch.allclose(layer.inverse(layer(x)), x, atol=1e-5), layer.inverse(layer(torch.tensor(20.0)))
        (True, tensor(inf))
    """

    def forward(self, x: Tensor) -> Tensor:
        """Onto (-1, 1)."""
        return torch.tanh(x)

    def inverse(self, y: Tensor) -> Tensor:
        """``arctanh(y)``, for ``y`` in (-1, 1)."""
        return torch.atanh(y)

    def log_derivative(self, x: Tensor) -> Tensor:
        """``log(1 - tanh(x)^2)``, without cancellation."""
        return 2 * (math.log(2) - x - F.softplus(-2 * x, threshold=40))


class Sigmoid(_Elementwise):
    """``y = 1 / (1 + exp(-x))``, onto (0, 1). Its inverse is infinite where ``y`` rounds to 1 (x > 17 in float32).

    Shape:
        Input and output ``(B, *)``; any floating dtype.

    Example:
        >>> layer = Sigmoid()
        >>> x = torch.tensor([[-2.0, 0.0, 1.0]])
        >>> torch.allclose(layer.inverse(layer(x)), x, atol=1e-5)
        True
    """

    def forward(self, x: Tensor) -> Tensor:
        """Onto (0, 1)."""
        return torch.sigmoid(x)

    def inverse(self, y: Tensor) -> Tensor:
        """``log(y / (1 - y))``, for ``y`` in (0, 1)."""
        return torch.logit(y)

    def log_derivative(self, x: Tensor) -> Tensor:
        """``log sigmoid(x) + log sigmoid(-x)``."""
        return F.logsigmoid(x) + F.logsigmoid(-x)


class Logit(_Elementwise):
    """``y = logit(margin + (1 - 2 * margin) * x)``: data in [0, 1], as dequantised images, onto the line.

    Args:
        margin: how far the data are kept from 0 and 1; with 0, ``x`` has to be inside of (0, 1).

    Shape:
        Input and output ``(B, *)``; any floating dtype.

    Raises:
        ShapeError: ``margin`` is not in [0, 0.5).

    References:
        Dinh et al., 2016, arXiv:1605.08803, section 4.1.

    Example:
        >>> layer = Logit(0.05)
        >>> x = torch.tensor([[0.0, 0.5, 1.0]])
        >>> layer(x), torch.allclose(layer.inverse(layer(x)), x, atol=1e-6)
        (tensor([[-2.9444,  0.0000,  2.9444]]), True)
    """

    def __init__(self, margin: float = 0.05) -> None:
        super().__init__()
        if not 0 <= margin < 0.5:
            raise self._refuse("margin in [0, 0.5)", repr(margin), "pass a small number, such as 0.05")
        self.margin = margin

    def forward(self, x: Tensor) -> Tensor:
        """From [0, 1] onto the line."""
        return torch.logit(self._inside(x))

    def inverse(self, y: Tensor) -> Tensor:
        """From the line to [0, 1]."""
        return (torch.sigmoid(y) - self.margin) / (1 - 2 * self.margin)

    def log_derivative(self, x: Tensor) -> Tensor:
        """``log(1 - 2 * margin) - log(p (1 - p))``, with ``p`` the argument of logit."""
        p = self._inside(x)
        return math.log1p(-2 * self.margin) - torch.log(p) - torch.log1p(-p)

    def _inside(self, x: Tensor) -> Tensor:
        return self.margin + (1 - 2 * self.margin) * x

    def extra_repr(self) -> str:
        """The margin."""
        return f"margin={self.margin}"


register(LeakyReLU, inverse="inverse", log_det="log_det")
register(SinhArcsinh, inverse="inverse", log_det="log_det")
