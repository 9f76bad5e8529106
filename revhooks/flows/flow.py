"""A normalizing flow: a transform from data to a latent, and the distribution of that.

References:
    Normalizing Flows for Probabilistic Modeling and Inference (Papamakarios et al., 2019, arXiv:1912.02762), section 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ..errors import RegistrationError, ShapeError, explain
from ..functional import sum_per_sample, wide
from .base import Base, as_base, shape_of

__all__ = ["Flow"]

_Base = Base | Distribution | Sequence[int] | int


class Flow(nn.Module):
    """The density of ``x`` where ``transform(x)`` is distributed as ``base``: ``log p(x) = log base(z) + log|det dz/dx|``.

    Args:
        transform: from data to the latent: a layer or container of `revhooks.nn`, or any module with ``forward``, ``inverse``,
            ``call_and_ladj`` and ``inverse_and_ladj``.
        base: a distribution of `torch.distributions`, a `Base` (which may be trained), or the shape of a sample, for a standard
            normal one: ``2`` or ``(3, 8, 8)``. A list of these where the transform gives several latents, as
            `revhooks.nn.MultiScale` does.

    Shape:
        Data ``(B, *)``, log-probabilities ``(B,)`` in at least float32, contexts ``(B, *)``.

    Raises:
        RegistrationError: the transform lacks a method.
        ShapeError: the base is none of the above; on a call, shapes do not fit.

    Example:
        >>> from revhooks.nn import ActNorm, AffineCoupling, FlowSequential, MLP
        >>> flow = Flow(FlowSequential(ActNorm(2), AffineCoupling(MLP(1, 2), MLP(1, 2))), base=2)
        >>> loss = -flow(torch.randn(64, 2)).mean()
        >>> flow.sample(5).shape, flow.sample((3, 5)).shape
        (torch.Size([5, 2]), torch.Size([3, 5, 2]))
    """

    def __init__(self, transform: nn.Module, base: _Base | Sequence[_Base]) -> None:
        super().__init__()
        for method in ("forward", "inverse", "call_and_ladj", "inverse_and_ladj"):
            if not callable(getattr(transform, method, None)):
                remedy = "take layers of revhooks.nn, or define it"
                expected = f"a transform with a method {method!r}"
                raise RegistrationError(explain("Flow", expected=expected, got=type(transform).__name__, remedy=remedy))
        self.transform = transform
        self._several = isinstance(base, (list, tuple)) and not all(isinstance(one, int) for one in base)
        self.bases = nn.ModuleList(map(as_base, cast("Sequence[_Base]", base if self._several else [base])))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """`log_prob`: so that what wraps a model, as DistributedDataParallel does, may be called."""
        return self.log_prob(x, context)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The log-density of each sample.

        Args:
            x: data of shape ``(B, *)``.
            context: what the flow is conditioned on, one row a sample.

        Returns:
            Shape ``(B,)``, in at least float32.

        Raises:
            ShapeError: the data, or the context, have another shape than the flow.
        """
        self._check_context(x, context)
        z, ladj = self._call("call_and_ladj", x, context)
        return self._log_prob_of_latents(z) + cast("Tensor", ladj)

    @torch.no_grad()
    def sample(self, shape: Sequence[int] | int = (), context: Tensor | None = None) -> Tensor:
        """Samples, without gradients, drawn from torch's generator.

        Args:
            shape: how many; a number or a shape.
            context: rows ``(B, *)``; as many samples are drawn for each of them.

        Returns:
            Shape ``(*shape, *)``; with a context ``(*shape, B, *)``.

        Raises:
            ShapeError: ``shape`` is none, or the context does not fit.
        """
        sizes, count, rows = self._rows(shape, context)
        x = self._call("inverse", self._latents(count, reparametrized=False), rows)
        return x.reshape(*sizes, *x.shape[1:])  # type: ignore[no-any-return]

    def rsample_and_log_prob(self, shape: Sequence[int] | int = (), context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Samples through which gradients flow, and their log-densities, from one evaluation of each branch.

        This is what variational training asks for: the reverse Kullback-Leibler divergence to an unnormalised density ``p`` is
        the mean of ``log_prob - log p(x)`` up to a constant.

        Args:
            shape: as in `sample`.
            context: as in `sample`.

        Returns:
            Samples of shape ``(*shape, *)`` and log-densities of shape ``shape``; with a context ``(*shape, B, *)`` and
            ``(*shape, B)``.

        Raises:
            ShapeError: as in `sample`.
            RegistrationError: the base has no samples that can be differentiated.
        """
        sizes, count, rows = self._rows(shape, context)
        z = self._latents(count, reparametrized=True)
        x, ladj = self._call("inverse_and_ladj", z, rows)
        log_prob = self._log_prob_of_latents(z) - ladj
        return x.reshape(*sizes, *x.shape[1:]), log_prob.reshape(sizes)

    # -- inside

    def _call(self, method: str, x: Any, context: Tensor | None) -> Any:
        return getattr(self.transform, method)(x, *(() if context is None else (context,)))

    def _log_prob_of_latents(self, z: Any) -> Tensor:
        latents = z if self._several else (z,)
        if len(latents) != len(self.bases):
            raise self._refuse(f"{len(self.bases)} latents", f"{len(latents)} of the transform", "pass a base for each")
        each = [self._log_prob_of(latent, base()) for latent, base in zip(latents, self.bases, strict=True)]
        return torch.stack(each).sum(0) if self._several else each[0]

    def _log_prob_of(self, latent: Any, base: Distribution) -> Tensor:
        shape = shape_of(base)
        if not isinstance(latent, Tensor) or latent.shape[1:] != shape:
            got = f"{tuple(latent.shape[1:])}" if isinstance(latent, Tensor) else type(latent).__name__
            raise self._refuse(f"samples of shape {tuple(shape)}", got, "pass (B, *), or another base")
        return sum_per_sample(base.log_prob(latent.to(wide(latent.dtype))))

    def _latents(self, count: int, *, reparametrized: bool) -> Any:
        distributions = [base() for base in self.bases]
        lacking = [one for one in distributions if reparametrized and not one.has_rsample]
        if lacking:
            expected, got = "a base with rsample", type(lacking[0]).__name__
            raise RegistrationError(explain("rsample_and_log_prob", expected=expected, got=got, remedy="train by log_prob"))
        drawn = [one.rsample((count,)) if reparametrized else one.sample((count,)) for one in distributions]
        return tuple(drawn) if self._several else drawn[0]

    def _rows(self, shape: Sequence[int] | int, context: Tensor | None) -> tuple[tuple[int, ...], int, Tensor | None]:
        """The leading sizes of samples, how many these are, and a row of the context for each."""
        sizes: tuple[int, ...] = (shape,) if isinstance(shape, int) else tuple(shape)
        if not all(isinstance(size, int) and size >= 0 for size in sizes):
            raise self._refuse("a number of samples, or a shape", repr(shape), "as in sample(100)")
        if context is None:
            return sizes, math.prod(sizes), None
        if not isinstance(context, Tensor) or not context.dim():
            got = f"shape {tuple(context.shape)}" if isinstance(context, Tensor) else type(context).__name__
            raise self._refuse("a context of shape (B, *)", got, "pass one row for each of B conditions")
        times, rows = math.prod(sizes), len(context)
        repeated = context if times == 1 else context.expand(times, *context.shape).flatten(0, 1)
        return (*sizes, rows), times * rows, repeated

    def _check_context(self, x: Tensor, context: Tensor | None) -> None:
        if not isinstance(x, Tensor) or not x.dim():
            raise self._refuse("data of shape (B, *)", type(x).__name__, "pass a tensor whose first dim is the batch")
        if isinstance(context, Tensor) and (not context.dim() or len(context) != len(x)):
            remedy = "pass one row a sample"
            raise self._refuse(f"a context of {len(x)} rows, as the data", f"shape {tuple(context.shape)}", remedy)

    def _refuse(self, expected: str, got: str, remedy: str) -> ShapeError:
        return ShapeError(explain(type(self).__name__, expected=expected, got=got, remedy=remedy))
