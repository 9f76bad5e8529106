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


class Appending(PythonNoise):
    """Leaves an auxiliary loss in a list, and counts its calls."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.losses: list[Tensor] = []
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        self.losses.append(y.square().mean())
        self.calls += 1
        return y


class _Reusing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return x.zero_().add_(g, alpha=2)


class Reusing(PythonNoise):
    """Its first operation computes its gradient in the memory of what it has saved."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(_Reusing.apply(x))


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, codes):
        ctx.save_for_backward(codes)
        return x * (codes * codes.scale)

    @staticmethod
    def backward(ctx, g):
        (codes,) = ctx.saved_tensors
        return g * (codes * codes.scale), None


class Quantised(PythonNoise):
    """A weight without gradient that carries its scale as an attribute."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.codes = (torch.arange(width) - width // 2).double()
        self.codes.scale = 0.1  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(_Scaled.apply(x, self.codes))


class Sparse(PythonNoise):
    """Multiplies by a sparse matrix that is a buffer."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("matrix", torch.eye(width).roll(1, 0).to_sparse_csr())

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(torch.sparse.mm(self.matrix, self.net(x).t()).t())


class Directional(PythonNoise):
    """Multiplies by its own Jacobian, by `torch.func.jvp`."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.jvp(self.net, (x,), (torch.ones_like(x),))[1]


def recurrent(width: int) -> nn.Module:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRU(width, width)

        def forward(self, x: Tensor) -> Tensor:
            return self.cell(x)[0]

    return First()
