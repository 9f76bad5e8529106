"""Flows of the literature, made in a line.

Weights are drawn from torch's generator, as those of any module; permutations and rotations from ``generator=``, if one is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import ShapeError, explain
from ..functional import affine_law, spline_law
from ..nn import (
    MADE,
    MLP,
    ActNorm,
    AffineCoupling,
    ConvNet,
    Coupling,
    FlowSequential,
    InvertibleConv1x1,
    MaskedAutoregressive,
    MultiScale,
    Permute,
    SplineCoupling,
    Squeeze,
)
from .base import Base
from .flow import Flow

__all__ = ["MAF", "NSF", "Glow", "RealNVP"]

Activation = Callable[[], nn.Module]


class RealNVP(Flow):
    """Affine couplings over features; between them the features are permuted at random.

    The first layer is an `revhooks.nn.ActNorm`, which standardises the data by the first batch.

    Args:
        features: the size of a sample, 2 or more; odd ones are split unequally.
        context: the size of the context that it is conditioned on; 0 for none.
        transforms: how many couplings; each changes one part of the features, then the other.
        hidden: the sizes of the hidden layers of each of their two networks.
        activation: makes the activations of these.
        base: in place of the standard normal distribution, as in `Flow`.
        generator: what the permutations are drawn from; torch's own when ``None``.

    Raises:
        ShapeError: there are fewer than 2 features, or no transform.

    References:
        Dinh et al., 2016, arXiv:1605.08803.

    Example:
        >>> flow = RealNVP(5, context=3, transforms=4, hidden=(32, 32))
        >>> flow(torch.randn(8, 5), torch.randn(8, 3)).shape, flow.sample(10, torch.randn(2, 3)).shape
        (torch.Size([8]), torch.Size([10, 2, 5]))
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        transforms: int = 4,
        hidden: Sequence[int] = (64, 64),
        *,
        activation: Activation = nn.ReLU,
        base: Base | torch.distributions.Distribution | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        def coupling() -> Coupling:
            return _coupling(AffineCoupling, features, 2, hidden, context, activation)

        super().__init__(_mixed(features, transforms, coupling, generator, least=2), features if base is None else base)


class NSF(Flow):
    """Rational-quadratic spline couplings over features: a neural spline flow; the features are permuted between them.

    The first layer is an `revhooks.nn.ActNorm`, which standardises the data by the first batch; the splines bend what is within
    ``bound`` then.

    Args:
        features: the size of a sample, 2 or more; odd ones are split unequally.
        context: the size of the context that it is conditioned on; 0 for none.
        transforms: how many couplings; each changes one part of the features, then the other.
        hidden: the sizes of the hidden layers of each of their two networks.
        bins: how many pieces each spline has.
        bound: where the splines end.
        activation: makes the activations of the networks.
        base: in place of the standard normal distribution, as in `Flow`.
        generator: what the permutations are drawn from; torch's own when ``None``.

    Raises:
        ShapeError: there are fewer than 2 features, or no transform; ``bins`` or ``bound`` is out of range.

    References:
        Durkan et al., 2019, arXiv:1906.04032.

    Example:
        >>> flow = NSF(2, transforms=2)
        >>> flow.rsample_and_log_prob(16)[0].shape
        torch.Size([16, 2])
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        transforms: int = 3,
        hidden: Sequence[int] = (64, 64),
        *,
        bins: int = 8,
        bound: float = 5.0,
        activation: Activation = nn.ReLU,
        base: Base | torch.distributions.Distribution | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        def coupling() -> Coupling:
            outputs = 3 * bins - 1
            return _coupling(SplineCoupling, features, outputs, hidden, context, activation, bins=bins, bound=bound)

        super().__init__(_mixed(features, transforms, coupling, generator, least=2), features if base is None else base)


class MAF(Flow):
    """Masked autoregressive layers, affine or of splines; between them the features are permuted.

    A density takes one evaluation of each network, a sample one a feature. Training replays the layers under ``reversible()``.

    Args:
        features: the size of a sample.
        context: the size of the context that it is conditioned on; 0 for none.
        transforms: how many layers.
        hidden: the sizes of the hidden layers of their networks.
        bins: how many pieces the splines have; ``None`` for affine layers.
        bound: where the splines end.
        activation: makes the activations of the networks.
        base: in place of the standard normal distribution, as in `Flow`.
        generator: what the permutations are drawn from; torch's own when ``None``.

    Raises:
        ShapeError: there is no feature or no transform; ``bins`` or ``bound`` is out of range.

    References:
        Papamakarios et al., 2017, arXiv:1705.07057.

    Example:
        >>> flow = MAF(3, transforms=2, bins=8)
        >>> flow(torch.randn(8, 3)).shape
        torch.Size([8])
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        transforms: int = 5,
        hidden: Sequence[int] = (64, 64),
        *,
        bins: int | None = None,
        bound: float = 5.0,
        activation: Activation = nn.ReLU,
        base: Base | torch.distributions.Distribution | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        law, outputs = (affine_law(), 2) if bins is None else (spline_law(bins, bound), 3 * bins - 1)

        def layer() -> MaskedAutoregressive:
            return MaskedAutoregressive(MADE(features, outputs, hidden, context=context, activation=activation), law)

        super().__init__(_mixed(features, transforms, layer, generator, least=1), features if base is None else base)


class Glow(Flow):
    """Glow: levels of squeezing and of steps, each an activation normalisation, a 1x1 convolution and an affine coupling.

    After each level but the last half of the channels leave as a latent. Pass images that are dequantised, of about unit scale.

    Args:
        shape: of an image, ``(C, H, W)``; ``H`` and ``W`` are multiples of ``2**levels``.
        levels: how often the resolution is halved.
        steps: how many steps a level has.
        hidden: the channels inside of the couplings' networks.
        context: the size of the context that it is conditioned on; 0 for none.
        generator: what the 1x1 convolutions start from; torch's own when ``None``.

    Raises:
        ShapeError: ``shape`` cannot be halved so often, or there is no level or step.

    References:
        Kingma and Dhariwal, 2018, arXiv:1807.03039.

    Example:
        >>> flow = Glow((3, 8, 8), levels=2, steps=2, hidden=16)
        >>> flow(torch.randn(4, 3, 8, 8)).shape, flow.sample(2).shape
        (torch.Size([4]), torch.Size([2, 3, 8, 8]))
    """

    def __init__(
        self,
        shape: Sequence[int],
        levels: int = 3,
        steps: int = 16,
        hidden: int = 64,
        *,
        context: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        if levels < 1 or steps < 1 or len(shape) != 3 or min(shape) < 1 or any(size % 2**levels for size in shape[1:]):
            expected = "levels and steps of 1 or more, and a shape (C, H, W) with H and W that are multiples of 2**levels"
            got = f"shape={tuple(shape)}, levels={levels}, steps={steps}"
            raise ShapeError(explain("Glow", expected=expected, got=got, remedy="pad the images, or take fewer levels"))
        (channels, height, width), stages, latents = shape, [], []
        for level in range(levels):
            channels, height, width = 4 * channels, height // 2, width // 2
            layers: list[nn.Module] = [Squeeze(2)]
            for _ in range(steps):
                net = ConvNet(channels // 2, channels, hidden, context=context)
                mix = InvertibleConv1x1(channels, generator=generator)
                layers += [ActNorm(channels), mix, AffineCoupling(net, scale="sigmoid")]
            stages.append(FlowSequential(*layers))
            channels = channels if level == levels - 1 else channels // 2
            latents.append((channels, height, width))
        super().__init__(MultiScale(*stages), latents)


def _coupling(
    kind: Callable[..., Coupling],
    features: int,
    outputs: int,
    hidden: Sequence[int],
    context: int,
    activation: Activation,
    **options: Any,
) -> Coupling:
    """A coupling of perceptrons that return ``outputs`` numbers for each feature that changes."""
    first, second = features // 2, features - features // 2
    f = MLP(second, outputs * first, hidden, context=context, activation=activation)
    g = MLP(first, outputs * second, hidden, context=context, activation=activation)
    return kind(f, g, sizes=(first, second), **options)


def _mixed(
    features: int, transforms: int, layer: Callable[[], nn.Module], generator: torch.Generator | None, *, least: int
) -> FlowSequential:
    """Layers, with permutations between them.

    Of two features a permutation at random would be none, every other time. Those of a coupling change by turns as they are, and
    those of an autoregressive layer need to be turned round.
    """
    if features < least or transforms < 1:
        expected = f"{least} features or more, and 1 transform or more"
        remedy = "revhooks.flows.MAF takes a single feature" if least > 1 else "mend them"
        got = f"features={features}, transforms={transforms}"
        raise ShapeError(explain("flow", expected=expected, got=got, remedy=remedy))
    layers: list[nn.Module] = [ActNorm(features), layer()]
    for _ in range(transforms - 1):
        if features > 2:
            layers.append(Permute(features, generator=generator))
        elif least == 1:
            layers.append(Permute.reverse(features))
        layers.append(layer())
    return FlowSequential(*layers)
