"""Branches for the cases of `semantics.py`: each maker takes the width that it keeps."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, width))


def conv(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, width, 3, padding=1))


def dropout(width: int) -> nn.Module:
    return nn.Sequential(mlp(width), nn.Dropout(0.3))


def norm(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Tanh())


def cumulative(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width, momentum=None), nn.Tanh())


def spectral(width: int) -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(width, width)), nn.Tanh())


def relu_inside(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, width))


def relu_first(width: int) -> nn.Module:
    return nn.Sequential(nn.ReLU(inplace=True), nn.Linear(width, width), nn.Tanh())


class PythonNoise(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * random.uniform(0.5, 1.5)


class NumpyNoise(PythonNoise):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * torch.as_tensor(np.random.uniform(0.5, 1.5, x.shape), device=x.device)


class Unused(PythonNoise):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.unused = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Masked(PythonNoise):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.net(x) * mask


class OwnGenerator(PythonNoise):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.generator = torch.Generator(torch.get_default_device()).manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * torch.rand(x.shape, generator=self.generator, dtype=x.dtype)


class Counting(PythonNoise):
    """Replaces a buffer at every call, and reads it."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        return self.net(x) * torch.sigmoid(self.count)


class Carrying(PythonNoise):
    """Carries a state from call to call, in an attribute."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.state: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        y = y if self.state is None else y * (1 + torch.tanh(self.state))
        self.state = y.detach()
        return y


class Slope(PythonNoise):
    """Takes a gradient inside, of a leaf that it makes, as Hamiltonian and energy-based networks do."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            inner = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.net(inner).square().sum(), inner, create_graph=True)
        return self.net(x) + slope


class Flaky(PythonNoise):
    broken = False

    def forward(self, x: Tensor) -> Tensor:
        if self.broken:
            raise ValueError("broken on purpose")
        return self.net(x)


class Checkpointed(PythonNoise):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.net, x, use_reentrant=False)
