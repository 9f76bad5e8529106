"""Masked autoregressive flows: every feature changes by what a network computes from the features before it.

References:
    MADE (Germain et al., 2015, arXiv:1502.03509), section 3.
    Masked Autoregressive Flow (Papamakarios et al., 2017, arXiv:1705.07057), section 3.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ShapeError, explain
from ..functional import Law, elementwise_law, sum_per_sample, wide
from ..registry import invertible, register
from .conditioner import start_at_zero, with_context
from .flow import Flow

__all__ = ["MADE", "MaskedAutoregressive"]


class _MaskedLinear(nn.Linear):
    """A linear layer some of whose weights are zero for good: from inputs of a higher degree than their output's."""

    mask: Tensor

    def __init__(self, before: Tensor, after: Tensor) -> None:
        super().__init__(len(before), len(after))
        self.register_buffer("mask", after[:, None] >= before)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class MADE(nn.Module):
    """A perceptron with masks: what it says of a feature depends on the features before it, in ``order``, and on the context.

    Args:
        features: how many features there are.
        outputs: how many numbers it returns for each: 2 for an affine law, ``3 * bins - 1`` for a spline.
        hidden: the sizes of the hidden layers.
        context: the size of the context; 0 for none.
        order: the features, the first one first; as they are numbered when ``None``.
        activation: makes the activations.

    Shape:
        Input ``(B, D)`` and context ``(B, context)``; output ``(B, outputs * D)``: the first number for every feature, then the
        second, and so on; zeros before training.

    Raises:
        ShapeError: ``order`` is no permutation; the context does not fit (on the call).

    References:
        Germain et al., 2015, arXiv:1502.03509, eq. 12 and 13.

    Example:
        >>> net = MADE(3, 2, hidden=(16,))
        >>> net(torch.randn(5, 3)).shape
        torch.Size([5, 6])
    """

    order: Tensor

    def __init__(
        self,
        features: int,
        outputs: int,
        hidden: Sequence[int] = (64, 64),
        *,
        context: int = 0,
        order: Sequence[int] | Tensor | None = None,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        order = torch.arange(features) if order is None else torch.as_tensor(order).long().detach().clone()
        if order.shape != (features,) or not (order.is_meta or torch.equal(order.sort()[0], torch.arange(features).to(order))):
            expected = f"an order of the features 0 ... {features - 1}"
            raise ShapeError(explain("MADE", expected=expected, got=f"{order!r}", remedy="pass each once"))
        self.features = features
        self.context = context
        self.register_buffer("order", order)
        rank = order.argsort()  # the degrees of Germain et al., less one; a context comes before all
        least = -1 if context or features == 1 else 0
        degrees = [torch.cat([rank, rank.new_full((context,), -1)])]
        degrees += [least + torch.arange(size).to(rank) % (features - 1 - least) for size in hidden]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(degrees):
            layers += [_MaskedLinear(before, after), activation()]
        self.net = nn.Sequential(*layers, _MaskedLinear(degrees[-1], rank.repeat(outputs) - 1))
        start_at_zero(self.net[-1])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """What the features and the context say of every feature."""
        return self.net(with_context(x, context, self.context, self))  # type: ignore[no-any-return]


class MaskedAutoregressive(Flow):
    """``y[i] = law(x[i], net(x)[i])``, where the network sees the features before ``i`` only: the layer of MAF.

    `forward` takes one evaluation of the network and `inverse` one a feature, so the layer suits density estimation; turned round
    by `Inverse` it is the inverse autoregressive flow, which is fast to sample from. Under ``reversible()`` it is replayed from
    its input, which is small beside what the network saves.

    Args:
        net: a `MADE`, or a module with its ``features`` and ``order`` whose outputs are masked in that way.
        coupling: the law of each feature: ``"affine"`` (raw log-scales, then shifts), ``"additive"``, ``"spline"``, or a
            `revhooks.functional.Law` with ``call_and_ladj``, such as ``affine_law("exp")`` or ``spline_law(16)``.

    Shape:
        Input and output ``(B, D)``; any floating dtype that the network takes.

    Raises:
        ShapeError: the network has no order, or the law does not treat each element by itself; on the call, the input has another
            shape, or the network returns too little.

    References:
        Papamakarios et al., 2017, arXiv:1705.07057, eq. 3-5.

    Example:
        >>> layer = MaskedAutoregressive(MADE(3, 2))
        >>> x = torch.randn(5, 3)
        >>> y, ladj = layer.call_and_ladj(x)
        >>> torch.allclose(layer.inverse(y), x, atol=1e-5), ladj.shape
        (True, torch.Size([5]))
    """

    def __init__(self, net: nn.Module, coupling: str | Law = "affine") -> None:
        super().__init__()
        if not isinstance(getattr(net, "order", None), Tensor) or not isinstance(getattr(net, "features", None), int):
            raise self._refuse("a network with features and order, as MADE has", type(net).__name__, "take nn.MADE(features, 2)")
        elementwise_law(coupling)  # another is refused here, not at the first call
        self.net = net
        self.coupling = coupling

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """All features at once; extra arguments go to the network."""
        self._check(x)
        return elementwise_law(self.coupling).forward(x, self.net(x, *args, **kwargs))

    @invertible(inverse=lambda layer, out, *args, **kwargs: layer.inverse(out[0], *args, **kwargs), log_det=1, prefer="replay")
    def call_and_ladj(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """`forward`, and ``log|det dy/dx|`` of each sample, from one evaluation of the network."""
        self._check(x)
        y, ladj = elementwise_law(self.coupling).call_and_ladj(x, self.net(x, *args, **kwargs))  # type: ignore[misc]
        return y, sum_per_sample(ladj)

    @invertible(inverse=None, log_det=lambda layer, x, _, *args, **kwargs: -layer.log_det(x, *args, **kwargs))
    def inverse(self, y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """One feature after the other, by as many evaluations of the network."""
        return self._solve(y, args, kwargs)[0]

    @invertible(inverse=None, log_det=1)
    def inverse_and_ladj(self, y: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """`inverse`, and ``log|det dx/dy|`` of each sample."""
        return self._solve(y, args, kwargs)

    def log_det(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``log|det dy/dx|`` of each sample, of shape ``(B,)``."""
        return self.call_and_ladj(x, *args, **kwargs)[1]

    def _solve(self, y: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        self._check(y)
        law, x = elementwise_law(self.coupling), torch.zeros_like(y)
        total = y.new_zeros(y.shape[0], dtype=wide(y.dtype))
        for feature in self.net.order.split(1):  # type: ignore[operator]
            update = self.net(x, *args, **kwargs).unflatten(1, (-1, y.shape[1])).index_select(2, feature).flatten(1)
            known, ladj = law.inverse_and_ladj(y.index_select(1, feature), update)  # type: ignore[misc]
            x, total = x.index_copy(1, feature, known), total + ladj.squeeze(1)
        return x, total

    def _check(self, x: Tensor) -> None:
        if x.dim() != 2 or x.shape[1] != self.net.features:
            expected = f"an input (B, {self.net.features})"
            raise self._refuse(expected, f"shape {tuple(x.shape)}", "flatten samples, or choose the network's features")

    def extra_repr(self) -> str:
        """The law."""
        return f"coupling={self.coupling if isinstance(self.coupling, str) else 'Law'!r}"


register(MaskedAutoregressive, inverse="inverse", log_det="log_det", prefer="replay")
