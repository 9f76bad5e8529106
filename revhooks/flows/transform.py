"""Flows as transforms of `torch.distributions`."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from ..errors import ShapeError, explain
from ..storage import version_of

__all__ = ["FlowTransform", "as_transform"]


class _Evaluation(NamedTuple):
    """What one evaluation of the module gave: the tensor that came out, weakly, the one that went in, and ``log|dy/dx|``.

    ``looks``: by which it is known whether one now would give the same.
    """

    made: weakref.ref[Tensor]
    given: Tensor
    ladj: Tensor
    inverse: bool
    looks: list[Any]

    def source_of(self, tensor: Tensor, transform: FlowTransform, *, inverse: bool) -> Tensor | None:
        """What the tensor was made from, if it came out of an evaluation in this direction, as one now would be."""
        fits = self.inverse == inverse and self.made() is tensor and self.looks == transform.looks(tensor, self.given)
        return self.given if fits else None


class FlowTransform(Transform):
    """A module with an inverse as a `torch.distributions.Transform`: ``y = module(x)``; its ``inv`` goes the other way.

    What an evaluation gave is remembered for as long as its result lives and neither it nor a parameter is changed, and used
    once: `log_prob` of a `torch.distributions.TransformedDistribution` evaluates each branch once, as does that of a sample
    just drawn. Nothing else is cached, for the module may change between calls. The parameters stay those of the module.

    Args:
        module: a layer or container of `revhooks.nn` that keeps the shape of a sample, or any module with its methods.
        context: passed to the module; its leading dimensions expand to those of the batch: ``(*batch or less, C)``.
        event_dim: how many dimensions a sample has.
    """

    bijective = True

    def __init__(self, module: nn.Module, context: Tensor | None = None, *, event_dim: int = 1) -> None:
        super().__init__()
        self.module = module
        self.context = context
        self.domain = self.codomain = constraints.independent(constraints.real, event_dim)
        self._latest: list[_Evaluation] = []  # at most one

    def with_cache(self, cache_size: int = 1) -> FlowTransform:
        """The transform itself: it needs no cache."""
        return self

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``y``, and ``log|det dy/dx|``."""
        return self._evaluate("call_and_ladj", x)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """``x``, and ``log|det dx/dy|``."""
        return self._evaluate("inverse_and_ladj", y)

    def _call(self, x: Tensor) -> Tensor:
        y = self._source_of(x, inverse=True)
        if y is None:
            y, ladj = self.call_and_ladj(x)
            self._remember(y, x, ladj, inverse=False)
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        x = self._source_of(y, inverse=False)
        if x is None:
            x, ladj = self.inverse_and_ladj(y)
            self._remember(x, y, -ladj, inverse=True)
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """``log|det dy/dx|`` of each sample."""
        if self._source_of(y, inverse=False) is x or self._source_of(x, inverse=True) is y:
            return self._latest.pop().ladj
        return self.call_and_ladj(x)[1]

    def _source_of(self, tensor: Tensor, *, inverse: bool) -> Tensor | None:
        return self._latest[0].source_of(tensor, self, inverse=inverse) if self._latest else None

    def _remember(self, made: Tensor, given: Tensor, ladj: Tensor, *, inverse: bool) -> None:
        latest = self._latest  # which the callback holds, not the transform
        looks = self.looks(made, given)
        latest[:] = [_Evaluation(weakref.ref(made, lambda _: latest.clear()), given, ladj, inverse, looks)]

    def looks(self, *ends: Tensor) -> list[Any]:
        """What an evaluation depends on: values that may change, by their versions, and modes."""
        tensors = [*ends, *self.module.parameters(), *self.module.buffers()]
        if self.context is not None:
            tensors.append(self.context)
        modes = [module.training for module in self.module.modules()]
        return [torch.is_grad_enabled(), modes, *((id(tensor), version_of(tensor), tensor.dtype) for tensor in tensors)]

    def _evaluate(self, method: str, x: Tensor) -> tuple[Tensor, Tensor]:
        places = x.dim() - self.event_dim
        if places < 0:
            expected = f"samples of {self.event_dim} dimensions"
            raise ShapeError(explain("FlowTransform", expected=expected, got=f"shape {tuple(x.shape)}", remedy="set event_dim="))
        batch, sample = x.shape[:places], x.shape[places:]
        args: tuple[Any, ...] = ()
        if self.context is not None:
            args = (self.context.expand(*batch, self.context.shape[-1]).reshape(batch.numel(), -1),)
        y, ladj = getattr(self.module, method)(x.reshape(batch.numel(), *sample), *args)
        if not isinstance(y, Tensor) or y.shape[1:] != sample:
            got = f"shape {tuple(y.shape[1:])}" if isinstance(y, Tensor) else type(y).__name__
            remedy = "use revhooks.flows.Flow, which takes other shapes and several latents"
            expected = f"a module that keeps the shape {tuple(sample)} of a sample"
            raise ShapeError(explain(type(self.module).__name__, expected=expected, got=got, remedy=remedy))
        return y.reshape(x.shape), ladj.reshape(batch)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_latest": []}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.module).__name__}, event_dim={self.event_dim})"


def as_transform(module: nn.Module, context: Tensor | None = None, *, event_dim: int = 1) -> FlowTransform:
    """A flow as a `torch.distributions.Transform`, from data to the latent; its ``inv`` makes data of a base distribution.

    It trains under ``reversible()`` as the module does.

    Args:
        module: a layer or container of `revhooks.nn`, or the transform of a `revhooks.flows.Flow`.
        context: passed to the module, ``(*batch or less, C)``.
        event_dim: how many dimensions a sample has: 1 for features, 3 for images.

    Raises:
        ShapeError: on the call, shapes do not fit.

    Example:
        >>> from torch.distributions import Independent, Normal, TransformedDistribution
        >>> from revhooks.flows import NSF
        >>> flow = NSF(2, transforms=2)
        >>> base = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
        >>> density = TransformedDistribution(base, as_transform(flow.transform).inv)
        >>> x = density.rsample((8,))
        >>> torch.allclose(density.log_prob(x), flow.log_prob(x), atol=1e-5)
        True
    """
    return FlowTransform(module, context, event_dim=event_dim)
