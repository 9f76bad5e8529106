"""Networks for the branches of couplings: they take a context, and return zeros at the start, so that a flow starts simple."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..errors import ShapeError, explain

__all__ = ["MLP", "ConvNet", "start_at_zero", "with_context"]


def with_context(x: Tensor, context: Tensor | None, size: int, owner: nn.Module) -> Tensor:
    """``x`` with a context behind its channels, in dim 1; one of shape ``(B, size)`` is the same at all positions.

    Raises:
        ShapeError: there is none though ``owner`` takes one, or one of another shape.

    Example:
        >>> with_context(torch.zeros(4, 2, 8, 8), torch.ones(4, 3), 3, nn.Identity()).shape
        torch.Size([4, 5, 8, 8])
    """
    if context is None and not size:
        return x
    if context is None or not size or context.shape[:2] != (x.shape[0], size) or context.dim() not in (2, x.dim()):
        expected = f"a context of shape ({x.shape[0]}, {size})" if size else "no context"
        got = "none" if context is None else f"shape {tuple(context.shape)}"
        remedy = "pass one row a sample, or make it with the context= that you have"
        raise ShapeError(explain(type(owner).__name__, expected=expected, got=got, remedy=remedy))
    if context.dim() < x.dim():
        context = context.reshape(*context.shape, *[1] * (x.dim() - 2))
    return torch.cat([x, context.to(x.dtype).expand(-1, -1, *x.shape[2:])], 1)


def start_at_zero(layer: nn.Module) -> None:
    """Let a layer return zeros until it has learned something.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> start_at_zero(layer)
        >>> layer(torch.ones(1, 2)).detach()
        tensor([[0., 0.]])
    """
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class MLP(nn.Module):
    """A multilayer perceptron of a stream and a context, for the branches of couplings over features.

    Args:
        inputs: the size of the stream that it sees.
        outputs: how many numbers it returns: for an affine coupling twice the size of the stream that is changed, for a spline
            coupling ``3 * bins - 1`` times.
        hidden: the sizes of the hidden layers.
        context: the size of the context; 0 for none.
        activation: makes the activations.

    Shape:
        Input ``(B, inputs)`` and context ``(B, context)``; output ``(B, outputs)``, zeros before training.

    Raises:
        ShapeError: the context does not fit (on the call).

    Example:
        >>> net = MLP(2, 6, hidden=(32,), context=3)
        >>> net(torch.randn(5, 2), torch.randn(5, 3)).shape
        torch.Size([5, 6])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        hidden: Sequence[int] = (64, 64),
        *,
        context: int = 0,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        self.context = context
        sizes = [inputs + context, *hidden]
        layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), activation())]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))
        start_at_zero(self.net[-1])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """What the stream and the context say."""
        return self.net(with_context(x, context, self.context, self))  # type: ignore[no-any-return]


class ConvNet(nn.Module):
    """Three convolutions, 3x3, 1x1 and 3x3, as in Glow, for the branches of couplings over the channels of images.

    Args:
        inputs: the channels of the stream that it sees.
        outputs: how many channels it returns.
        hidden: the channels inside.
        context: the channels of the context; 0 for none.
        activation: makes the activations.

    Shape:
        Input ``(B, inputs, H, W)`` and context ``(B, context)`` or ``(B, context, H, W)``; output ``(B, outputs, H, W)``, zeros
        before training.

    Raises:
        ShapeError: the context does not fit (on the call).

    References:
        Kingma and Dhariwal, 2018, arXiv:1807.03039, section 3.3 and 5.

    Example:
        >>> net = ConvNet(2, 4, 16, context=10)
        >>> net(torch.randn(5, 2, 8, 8), torch.randn(5, 10)).shape
        torch.Size([5, 4, 8, 8])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        hidden: int = 64,
        *,
        context: int = 0,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        self.context = context
        self.net = nn.Sequential(
            nn.Conv2d(inputs + context, hidden, 3, padding=1),
            activation(),
            nn.Conv2d(hidden, hidden, 1),
            activation(),
            nn.Conv2d(hidden, outputs, 3, padding=1),
        )
        start_at_zero(self.net[-1])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """What the stream and the context say."""
        return self.net(with_context(x, context, self.context, self))  # type: ignore[no-any-return]
