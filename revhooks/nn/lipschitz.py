"""Upper bounds of Lipschitz constants (L2), composed from those of the parts."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from .spectral import SpectralLayer

__all__ = ["lipschitz_bound", "nominal_bound"]

# The largest slope of an activation; those above 1 are the price of GELU and its like.
_SLOPES: dict[type[nn.Module], float | Callable[..., float]] = {
    nn.Identity: 1, nn.Flatten: 1, nn.Unflatten: 1, nn.PixelShuffle: 1, nn.PixelUnshuffle: 1, nn.ChannelShuffle: 1,
    nn.ReLU: 1, nn.ReLU6: 1, nn.Hardtanh: 1, nn.Tanh: 1, nn.Softplus: 1, nn.Softsign: 1, nn.CELU: 1, nn.LogSigmoid: 1,
    nn.Tanhshrink: 1, nn.Softshrink: 1,
    nn.Sigmoid: 1 / 4, nn.Hardsigmoid: 1 / 6,
    nn.GELU: 1.129, nn.SiLU: 1.09984, nn.Mish: 1.08851, nn.Hardswish: 1.5, nn.SELU: 1.7581,
    nn.ELU: lambda m: max(1.0, m.alpha),
    nn.LeakyReLU: lambda m: max(1.0, abs(m.negative_slope)),
    nn.PReLU: lambda m: max(1.0, float(m.weight.detach().abs().max())),
    # a training step scales what it keeps
    _DropoutNd: lambda m: 1 / (1 - m.p) if m.training and m.p < 1 else 1.0,
}  # fmt: skip


def lipschitz_bound(module: nn.Module) -> float:
    """An upper bound of the Lipschitz constant of a module's map, for the L2 norm; infinite where nothing is known.

    Of a Sequential it is the product over its parts; of activations the largest slope (GELU 1.13, SiLU 1.10, Mish
    1.09; ReLU, ELU, LeakyReLU, Tanh and Softplus 1); of dropout in training mode ``1 / (1 - p)``. A module of another class may
    say its own by a method ``lipschitz_bound()``.

    Example:
        >>> lipschitz_bound(nn.Sequential(nn.ReLU(), nn.GELU()))
        1.129
    """
    return _bound(module, lambda layer: layer.lipschitz_bound())


def nominal_bound(module: nn.Module) -> float:
    """`lipschitz_bound` with the coefficients of the contractive layers in place of their present norms."""
    return _bound(module, lambda layer: layer.coeff)


def _bound(module: nn.Module, of_layer: Callable[[SpectralLayer], float]) -> float:
    if isinstance(module, SpectralLayer):
        return of_layer(module)
    own = getattr(module, "lipschitz_bound", None)
    if callable(own):
        return float(own())
    if type(module) is nn.Sequential:
        return math.prod(_bound(part, of_layer) for part in module)
    slope = next((_SLOPES[cls] for cls in type(module).__mro__ if cls in _SLOPES), math.inf)
    return float(slope(module) if callable(slope) else slope)
