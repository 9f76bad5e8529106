"""Normalizing flows: what their layers have in common, and containers that compose them.

A flow layer has ``forward(x) -> y``, ``inverse(y) -> x``, ``log_det(x) -> (B,)`` and ``call_and_ladj(x) -> (y, ladj)``
with ``ladj = log|det dy/dx|`` of each sample, dim 0 being the batch. Couplings have the same methods. The containers
ask for nothing else, so that any module with them is a flow layer.

References:
    Normalizing Flows for Probabilistic Modeling and Inference (Papamakarios et al., 2019, arXiv:1912.02762), section 2.1.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RegistrationError, ShapeError, explain
from ..functional import wide
from ..registry import invertible

__all__ = ["Flow", "FlowSequential", "MultiScale", "invertible_with_ladj"]


def _invert_output(module: nn.Module, output: tuple[Tensor, Tensor], *args: Any, **kwargs: Any) -> Any:
    return module.inverse(output[0], *args, **kwargs)  # type: ignore[operator]


# Marks a ``call_and_ladj`` that saves tensors of its input's size: ``reversible()`` rebuilds them by ``inverse``.
invertible_with_ladj = invertible(inverse=_invert_output)


class Flow(nn.Module):
    """Base of the flow layers; subclasses define `forward`, `inverse` and `log_det`.

    Shape:
        Input ``(B, *)``, log-abs-det ``(B,)`` in at least float32.
    """

    def inverse(self, y: Tensor) -> Tensor:
        """The input that `forward` maps to ``y``."""
        raise NotImplementedError

    def log_det(self, x: Tensor) -> Tensor:
        """``log|det dy/dx|`` of each sample, of shape ``(B,)``; of a layer that keeps volume it is 0."""
        return x.new_zeros((), dtype=wide(x.dtype)).expand(x.shape[0])

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` and `log_det`."""
        return self(x), self.log_det(x)

    def _refuse(self, expected: str, got: str, remedy: str) -> ShapeError:
        return ShapeError(explain(type(self).__name__, expected=expected, got=got, remedy=remedy))

    def _channel_dim(self, x: Tensor, dim: int, channels: int) -> int:
        """``dim`` counted from the front; it is not the batch and has this many channels."""
        if not -x.dim() <= dim < x.dim() or dim % x.dim() == 0 or x.shape[dim] != channels:
            expected = f"an input (B, *) with {channels} channels in dim {dim}, which is not the batch"
            raise self._refuse(expected, f"shape {tuple(x.shape)}", "choose the number of channels and dim= to fit the input")
        return dim % x.dim()


def own_precision(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Compute in the dtype of ``x``, also under autocast.

    A stream that is mixed in bfloat16 loses 8 of its bits in every layer, and its inverse would give back another dtype.
    """
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


# -------------------------------------------------------------------------------------- containers


@functools.cache
def _extras(method: Callable[..., Any]) -> tuple[bool, frozenset[str] | None]:
    """Whether a method takes positional arguments after its input, and which by keyword (``None``: any)."""
    parameters = list(inspect.signature(method).parameters.values())[2:]
    kinds = {parameter.kind for parameter in parameters}
    positional = kinds & {
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.VAR_POSITIONAL,
    }
    names = frozenset(parameter.name for parameter in parameters)
    return bool(positional), None if inspect.Parameter.VAR_KEYWORD in kinds else names


def _call(layer: nn.Module, name: str, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a layer's method, with those extra arguments that its forward takes."""
    if not callable(getattr(layer, name, None)):
        raise RegistrationError(
            explain(
                type(layer).__name__,
                expected=f"a layer with a method {name!r}",
                got="none",
                remedy="use layers with forward, inverse and call_and_ladj, as those of revhooks.nn",
            )
        )
    if args or kwargs:
        positional, names = _extras(type(layer).forward)
        args = args if positional else ()
        kwargs = kwargs if names is None else {key: value for key, value in kwargs.items() if key in names}
    method = layer if name == "forward" else getattr(layer, name)
    return method(x, *args, **kwargs)


class FlowSequential(nn.Sequential):
    """Flow layers one after the other.

    Extra arguments (a context that the flow is conditioned on) go to the layers whose ``forward`` takes them. Let the last
    layer of every coupling's branches start near zero, as Glow does: a deep flow of couplings at random is so badly
    conditioned (32 steps amplify rounding 7e5 times, against 6) that float32 does not invert it.

    Args:
        *layers: modules with ``forward``, ``inverse`` and ``call_and_ladj``; also other containers.

    Shape:
        What the first layer takes; what the last one returns.

    Raises:
        RegistrationError: a layer lacks the method that is needed (on the call).

    Example:
        >>> from revhooks.nn import ActNorm, AffineCoupling, InvertibleLinear
        >>> steps = [(ActNorm(4), InvertibleLinear(4), AffineCoupling(nn.Linear(2, 4), nn.Linear(2, 4))) for _ in range(3)]
        >>> flow = FlowSequential(*[layer for step in steps for layer in step])
        >>> x = torch.randn(8, 4)
        >>> z, ladj = flow.call_and_ladj(x)
        >>> log_prob = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1) + ladj
        >>> samples = flow.inverse(torch.randn(100, 4))
        >>> log_prob.shape, samples.shape, torch.allclose(flow.inverse(z), x, atol=1e-4)
        (torch.Size([8]), torch.Size([100, 4]), True)
    """

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """All layers in order."""
        for layer in self:
            x = _call(layer, "forward", x, args, kwargs)
        return x

    def inverse(self, y: Any, *args: Any, **kwargs: Any) -> Any:
        """The inverses of all layers, last first: from a latent to a sample."""
        for layer in reversed(list(self)):
            y = _call(layer, "inverse", y, args, kwargs)
        return y

    def call_and_ladj(self, x: Any, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """All layers in order, and the sum of their log-abs-dets, of shape ``(B,)``."""
        ladj = x.new_zeros(x.shape[0], dtype=wide(x.dtype))
        for layer in self:
            x, change = _call(layer, "call_and_ladj", x, args, kwargs)
            ladj = ladj + change
        return x, ladj

    def log_det(self, x: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The log-abs-det of each sample, of shape ``(B,)``."""
        return self.call_and_ladj(x, *args, **kwargs)[1]


class MultiScale(nn.Module):
    """Stages of a flow; after each but the last, half of the channels leave as a latent and the other half goes on.

    Args:
        *stages: flow layers, one or more.
        dim: the dimension along which the halves are split.

    Shape:
        Input ``(B, *)``; output a tuple with one latent a stage, the first to leave first.

    Raises:
        ShapeError: there is no stage, or the size along ``dim`` is odd where halves are split.

    References:
        Dinh et al., 2016, arXiv:1605.08803, section 3.6.

    Example:
        >>> from revhooks.nn import InvertibleConv1x1, Squeeze
        >>> stages = [FlowSequential(Squeeze(2), InvertibleConv1x1(channels)) for channels in (4, 8)]
        >>> flow = MultiScale(*stages)
        >>> x = torch.randn(2, 1, 8, 8)
        >>> latents, ladj = flow.call_and_ladj(x)
        >>> [tuple(z.shape) for z in latents], torch.allclose(flow.inverse(latents), x, atol=1e-5)
        ([(2, 2, 4, 4), (2, 8, 2, 2)], True)
    """

    def __init__(self, *stages: nn.Module, dim: int = 1) -> None:
        super().__init__()
        if not stages:
            raise ShapeError(
                explain("MultiScale", expected="one stage or more", got="none", remedy="pass the stages as arguments")
            )
        self.stages = nn.ModuleList(stages)
        self.dim = dim

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """The latents."""
        latents = []
        for stage in self.stages[:-1]:
            x, latent = self._halves(_call(stage, "forward", x, args, kwargs))
            latents.append(latent)
        return *latents, _call(self.stages[-1], "forward", x, args, kwargs)

    def inverse(self, latents: Sequence[Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The input from its latents.

        Raises:
            ShapeError: there are not as many latents as stages.
        """
        if len(latents) != len(self.stages):
            raise ShapeError(
                explain(
                    "MultiScale",
                    expected=f"{len(self.stages)} latents, one a stage",
                    got=str(len(latents)),
                    remedy="pass what forward returned, or samples of the same shapes",
                )
            )
        x: Tensor = _call(self.stages[-1], "inverse", latents[-1], args, kwargs)
        for stage, latent in zip(reversed(self.stages[:-1]), reversed(latents[:-1]), strict=True):
            x = _call(stage, "inverse", torch.cat([x, latent], self.dim), args, kwargs)
        return x

    def call_and_ladj(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[tuple[Tensor, ...], Tensor]:
        """The latents, and the sum of the stages' log-abs-dets, of shape ``(B,)``."""
        latents = []
        total = x.new_zeros(x.shape[0], dtype=wide(x.dtype))
        for stage in self.stages[:-1]:
            y, ladj = _call(stage, "call_and_ladj", x, args, kwargs)
            x, latent = self._halves(y)
            latents.append(latent)
            total = total + ladj
        y, ladj = _call(self.stages[-1], "call_and_ladj", x, args, kwargs)
        return (*latents, y), total + ladj

    def log_det(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The log-abs-det of each sample, of shape ``(B,)``."""
        return self.call_and_ladj(x, *args, **kwargs)[1]

    def _halves(self, y: Tensor) -> tuple[Tensor, ...]:
        if not -y.dim() <= self.dim < y.dim() or y.shape[self.dim] % 2:
            raise ShapeError(
                explain(
                    "MultiScale",
                    expected=f"an even size along dim {self.dim} after each stage but the last",
                    got=f"shape {tuple(y.shape)}",
                    remedy="choose dim=, or squeeze to more channels",
                )
            )
        return y.chunk(2, self.dim)
