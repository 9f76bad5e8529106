"""Normalizing flows: what their layers have in common, and containers that compose them.

A flow layer has ``forward(x) -> y``, ``inverse(y) -> x``, ``log_det(x) -> (B,)`` and ``call_and_ladj(x) -> (y, ladj)``
with ``ladj = log|det dy/dx|`` of each sample, dim 0 being the batch, and ``inverse_and_ladj(y) -> (x, ladj)`` with that of the
inverse. Couplings have the same methods. The containers ask for nothing else, so that any module with them is a flow layer.

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
from ..registry import ACTIVE, LogDet, Registration, counted, invertible

__all__ = [
    "Flow",
    "FlowSequential",
    "Inverse",
    "MultiScale",
    "inverse_of_forward",
    "inverse_with_ladj",
    "invertible_with_ladj",
]


def _invert_output(module: nn.Module, output: tuple[Tensor, Tensor], *args: Any, **kwargs: Any) -> Any:
    return module.inverse(output[0], *args, **kwargs)  # type: ignore[operator]


def _call_output(module: nn.Module, output: tuple[Tensor, Tensor], *args: Any, **kwargs: Any) -> Any:
    return module(output[0], *args, **kwargs)


def _ladj_of_inverse(module: nn.Module, output: Any, _: Any, *args: Any, **kwargs: Any) -> Tensor:
    return -module.log_det(output, *args, **kwargs)  # type: ignore[operator, no-any-return]


# Mark methods of a layer that save tensors of their input's size, or that a chain goes through: ``reversible()`` rebuilds what
# they save by the other direction, so that training by samples takes as little memory as training by data.
invertible_with_ladj = invertible(inverse=_invert_output, log_det=1)  # call_and_ladj
inverse_with_ladj = invertible(inverse=_call_output, log_det=1)  # inverse_and_ladj
inverse_of_forward = invertible(inverse="forward", log_det=_ladj_of_inverse)


def count(cls: type[nn.Module]) -> None:
    """Have `revhooks.log_det` count the calls of what a new layer defines, registered or not."""
    for method in ("forward", "inverse"):
        if method in vars(cls):
            counted(cls, method)


class Flow(nn.Module):
    """Base of the flow layers; subclasses define `forward`, `inverse` and `log_det`.

    A layer alone has no density: that is of a `revhooks.flows.Flow`, made of layers and a base distribution.

    Shape:
        Input ``(B, *)``, log-abs-det ``(B,)`` in at least float32.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        count(cls)

    def inverse(self, y: Tensor) -> Tensor:
        """The input that `forward` maps to ``y``."""
        raise NotImplementedError

    def log_det(self, x: Tensor) -> Tensor:
        """``log|det dy/dx|`` of each sample, of shape ``(B,)``; of a layer that keeps volume it is 0."""
        return x.new_zeros((), dtype=wide(x.dtype)).expand(x.shape[0])

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` and `log_det`."""
        return self(x), self.log_det(x)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """`inverse`, and ``log|det dx/dy|`` of each sample: minus the `log_det` there."""
        x = self.inverse(y)
        return x, -self.log_det(x)

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
    if not torch.compiler.is_compiling() and ACTIVE.volume is not None and _is_uncounted(layer, name):
        entry = Registration(type(layer), None, name, log_det=_LADJ_OF.get(name))
        return ACTIVE.volume.count(entry, lambda _, *args, **kwargs: method(*args, **kwargs), layer, (x, *args), kwargs)
    return method(x, *args, **kwargs)


# what a layer that is neither registered nor of this package adds to a `revhooks.log_det`, as it has the methods
_LADJ_OF: dict[str, LogDet] = {
    "call_and_ladj": 1,
    "inverse_and_ladj": 1,
    "inverse": lambda layer, x, _, *args, **kwargs: -layer.call_and_ladj(x, *args, **kwargs)[1],
}


def _is_uncounted(layer: nn.Module, name: str) -> bool:
    """Whether no bracket would count a call of a layer."""
    method = getattr(type(layer), name)
    is_bracketed = hasattr(method, "__revhooks__") or hasattr(method, "__revhooks_counted__")
    return not is_bracketed and not isinstance(layer, (FlowSequential, MultiScale, Inverse)) and hasattr(layer, "call_and_ladj")


def _no_change(x: Any) -> Tensor:
    """A log-abs-det of 0 for each sample of a tensor, or of several latents."""
    first = x if isinstance(x, Tensor) else x[0]
    return first.new_zeros(first.shape[0], dtype=wide(first.dtype))


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
        ladj = _no_change(x)
        for layer in self:
            x, change = _call(layer, "call_and_ladj", x, args, kwargs)
            ladj = ladj + change
        return x, ladj

    def inverse_and_ladj(self, y: Any, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """The inverses of all layers, last first, and the sum of their log-abs-dets, of shape ``(B,)``."""
        ladj = _no_change(y)
        for layer in reversed(list(self)):
            y, change = _call(layer, "inverse_and_ladj", y, args, kwargs)
            ladj = ladj + change
        return y, ladj

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
        self._check_latents(latents)
        x: Tensor = _call(self.stages[-1], "inverse", latents[-1], args, kwargs)
        for stage, latent in zip(reversed(self.stages[:-1]), reversed(latents[:-1]), strict=True):
            x = _call(stage, "inverse", torch.cat([x, latent], self.dim), args, kwargs)
        return x

    def inverse_and_ladj(self, latents: Sequence[Tensor], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The input from its latents, and the sum of the stages' log-abs-dets, of shape ``(B,)``.

        Raises:
            ShapeError: as in `inverse`.
        """
        self._check_latents(latents)
        x, total = _call(self.stages[-1], "inverse_and_ladj", latents[-1], args, kwargs)
        for stage, latent in zip(reversed(self.stages[:-1]), reversed(latents[:-1]), strict=True):
            x, ladj = _call(stage, "inverse_and_ladj", torch.cat([x, latent], self.dim), args, kwargs)
            total = total + ladj
        return x, total

    def _check_latents(self, latents: Sequence[Tensor]) -> None:
        if len(latents) != len(self.stages):
            raise ShapeError(
                explain(
                    "MultiScale",
                    expected=f"{len(self.stages)} latents, one a stage",
                    got=str(len(latents)),
                    remedy="pass what forward returned, or samples of the same shapes",
                )
            )

    def call_and_ladj(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[tuple[Tensor, ...], Tensor]:
        """The latents, and the sum of the stages' log-abs-dets, of shape ``(B,)``."""
        latents = []
        total = _no_change(x)
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


class Inverse(nn.Module):
    """A flow layer turned round: its ``forward`` is the layer's ``inverse``.

    The inverse of a masked autoregressive layer is the inverse autoregressive flow, fast to sample from.

    Args:
        layer: a module with ``forward``, ``inverse``, ``call_and_ladj`` and ``inverse_and_ladj``; also a container.

    Shape:
        Input what the layer returns; output what it takes.

    References:
        Kingma et al., 2016, arXiv:1606.04934: inverse autoregressive flow.

    Example:
        >>> from revhooks.nn import ActNorm
        >>> layer = ActNorm(3)
        >>> x = torch.randn(5, 3)
        >>> torch.allclose(Inverse(layer)(layer(x)), x, atol=1e-6)
        True
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The layer's inverse."""
        return _call(self.layer, "inverse", x, args, kwargs)

    def inverse(self, y: Any, *args: Any, **kwargs: Any) -> Any:
        """The layer."""
        return _call(self.layer, "forward", y, args, kwargs)

    def call_and_ladj(self, x: Any, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """`forward`, and the log-abs-det of each sample, of shape ``(B,)``."""
        return _call(self.layer, "inverse_and_ladj", x, args, kwargs)  # type: ignore[no-any-return]

    def inverse_and_ladj(self, y: Any, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """`inverse`, and the log-abs-det of each sample, of shape ``(B,)``."""
        return _call(self.layer, "call_and_ladj", y, args, kwargs)  # type: ignore[no-any-return]

    def log_det(self, x: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The log-abs-det of each sample, of shape ``(B,)``."""
        return self.call_and_ladj(x, *args, **kwargs)[1]
