"""Random ordinary nets, convolutional and of tokens, with replays, checkpoints, budgets and offload: everything bit by bit.

`make test` tries 400, `make test-all` 6,000 more.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import revhooks

WIDTH = 8


class Fn(nn.Module):
    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x)


class Join(nn.Module):
    """What comes in and what a body makes of it, joined in one of many ways."""

    def __init__(self, body: nn.Module, other: nn.Module, way: int) -> None:
        super().__init__()
        self.body, self.other, self.way = body, other, way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == 0:
            return torch.where(self.other(x) > 0, self.body(x), x) * 1.5
        y: Tensor = self.body(x)
        if self.way == 1:
            return (x + y).relu_()
        if self.way == 2:
            y += x
            return y
        if self.way == 3:
            return x * torch.sigmoid(y)
        if self.way == 4 and x.dim() == 4:
            return torch.cat([x, y], 1)[:, ::2]
        if self.way == 5:
            return F.dropout(y, 0.3, self.training) + x
        if self.way == 6:
            return self.other(x) - y
        return x + y


class Again(nn.Module):
    def __init__(self, body: nn.Module, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.body, self.call = body, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.body, x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True, dropout=0.1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return y


class Recurrent(nn.Module):
    """It carries a number, a buffer and a tensor from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls, self.before = nn.Linear(WIDTH, WIDTH), 0, torch.zeros(())
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.calls += 1
        with torch.no_grad():
            self.mean.mul_(0.9).add_(y.mean(), alpha=0.1)
        if self.before.shape == y.shape and self.before.dtype is y.dtype:
            y = torch.tanh(y + 0.1 * self.before)
        self.before = y.detach()
        return y * 1.1


def theirs(body: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = checkpoint(body, x, use_reentrant=False)
    return result


def sequence(draw: Random, layer: Callable[[Random], nn.Module]) -> nn.Module:
    return nn.Sequential(*[layer(draw) for _ in range(draw.randrange(1, 4))])


def composed(draw: Random, layer: Callable[[Random], nn.Module]) -> nn.Module:
    body = sequence(draw, layer)
    if draw.random() < 0.4:
        return Again(body, draw.choice([revhooks.checkpoint, theirs]))
    return Join(body, layer(draw), draw.randrange(8))


def activation(draw: Random) -> nn.Module:
    kinds = (nn.ReLU, nn.SiLU, nn.LeakyReLU, nn.ELU, nn.Hardtanh, nn.Hardswish, nn.Mish, nn.CELU, nn.ReLU6)
    if draw.random() < 0.5:
        return draw.choice(kinds)(inplace=draw.random() < 0.6)
    return draw.choice([nn.GELU(), nn.GELU("tanh"), nn.Softplus(), nn.Tanh(), nn.Sigmoid(), nn.PReLU(), nn.Softsign()])


def conv_layer(draw: Random) -> nn.Module:
    kind = draw.randrange(12)
    if kind < 3:
        return nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=draw.random() < 0.5, groups=draw.choice([1, 2]))
    if kind < 5:
        return nn.BatchNorm2d(WIDTH, momentum=draw.choice([0.1, None]), affine=draw.random() < 0.8)
    if kind == 5:
        return activation(draw)
    if kind == 6:
        return draw.choice([nn.GroupNorm(2, WIDTH), nn.InstanceNorm2d(WIDTH, affine=True, track_running_stats=True)])
    if kind == 7:
        return draw.choice([nn.Dropout(0.2), nn.Dropout(0.2, inplace=True), nn.Dropout2d(0.2), nn.AlphaDropout(0.1)])
    if kind == 8:
        return nn.Sequential(nn.MaxPool2d(2, 1, 1), nn.Upsample(6), nn.LocalResponseNorm(3))
    if kind == 9:
        return nn.Sequential(nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=draw.random() < 0.5), nn.Conv2d(WIDTH, WIDTH, 1))
    if kind == 10:
        return Fn(draw.choice(IMAGES))
    return composed(draw, conv_layer)


def token_layer(draw: Random) -> nn.Module:
    kind = draw.randrange(11)
    if kind < 2:
        return nn.Linear(WIDTH, WIDTH, bias=draw.random() < 0.7)
    if kind == 2:
        return draw.choice([nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH), nn.LayerNorm(WIDTH, elementwise_affine=False)])
    if kind == 3:
        return activation(draw)
    if kind == 4:
        return Attention()
    if kind == 5:
        first, dropout = draw.random() < 0.5, draw.choice([0.0, 0.1])
        return nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout, norm_first=first, batch_first=True)
    if kind == 6:
        mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), activation(draw), nn.Linear(16, WIDTH), nn.Dropout(0.1))
        return Join(mlp, nn.Identity(), 7)
    if kind == 7:
        return Recurrent()
    if kind == 8:
        return Fn(draw.choice(TOKENS))
    return composed(draw, token_layer)


POINTWISE: list[Callable[[Tensor], Tensor]] = [
    lambda x: x.mul(0.5).add_(0.1),
    lambda x: x / (1 + x.abs()),
    lambda x: x.clamp(-1, 1),
    lambda x: torch.where(x > 0, x, 0.1 * x),
    lambda x: x.to(torch.bfloat16).to(x.dtype),
    torch.square,
]
IMAGES = [
    *POINTWISE,
    lambda x: x.transpose(2, 3),
    lambda x: x.contiguous(memory_format=torch.channels_last),
    lambda x: F.pad(x, (1, 1))[..., 1:-1],
    lambda x: x - x.mean((2, 3), keepdim=True),
    lambda x: x.flip(1),
]
TOKENS = [*POINTWISE, lambda x: x.roll(1, 1), lambda x: x.cumsum(1), lambda x: x.softmax(-1), lambda x: x.log_softmax(-1)]


def backward(draw: Random) -> Callable[[nn.Module, Tensor], None]:
    mode = draw.randrange(5)

    def run(net: nn.Module, x: Tensor) -> None:
        h = net(x * 1)
        first, second = h.float().square().mean(), torch.tanh(h.float()).mean()
        if mode == 0:
            (first + second).backward()
        elif mode == 1:
            first.backward(retain_graph=True)
            second.backward()
        elif mode == 2:
            (first + second).backward(retain_graph=True)
            (first + second).backward()
        elif mode == 3:  # a second forward before the first backward
            other = net(x * 0.5).float().square().mean()
            first.backward()
            other.backward()
        else:
            (grad,) = torch.autograd.grad(first, x, create_graph=True)
            (second + grad.square().sum()).backward()

    return run


def options_of(draw: Random, net: nn.Module) -> dict[str, Any]:
    kinds = sorted({type(module) for module in net.modules()} - {Fn}, key=lambda kind: kind.__name__)
    options: dict[str, Any] = {"replay": draw.choice([None, Join, draw.choice(kinds)])}
    if draw.random() < 0.4:
        options["budget"] = draw.choice([0, 2000, 8000, 30000, 100000, float("inf")])
    return options | {"ops": draw.random() < 0.8, "offload": draw.random() < 0.2}


def outcome(net: nn.Module, x: Tensor, run: Callable[[nn.Module, Tensor], None], options: dict[str, Any] | None) -> list[Any]:
    """Of two steps: gradients, buffers, and where the generator is."""
    seen: list[Any] = []
    torch.manual_seed(0)
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        net.zero_grad()
        with revhooks.reversible(**options) if options is not None else contextlib.nullcontext():
            run(net, leaf)
        seen += [leaf.grad, *[p.grad for p in net.parameters()], *[b.clone() for b in net.buffers()]]
        with torch.no_grad():
            for p in net.parameters():
                if p.grad is not None and bool(p.grad.isfinite().all()):
                    p.sub_(p.grad.clamp(-1, 1), alpha=0.1)
    return [*seen, torch.rand(1)]


def is_same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def check(seed: int) -> None:
    draw = Random(seed)
    torch.manual_seed(seed)
    layer, shape = draw.choice([(conv_layer, (3, WIDTH, 6, 6)), (token_layer, (3, 5, WIDTH))])
    layers = [layer(draw) for _ in range(draw.randrange(2, 7))]
    net = nn.Sequential(*layers, *draw.sample(layers, draw.randrange(2)))  # one may come twice
    net.train(draw.random() < 0.8)
    for parameter in draw.sample(list(net.parameters()), min(2, len(list(net.parameters())))):
        parameter.requires_grad_(draw.random() < 0.8)
    dtype = draw.choice([torch.float32, torch.float64])
    net, x = net.to(dtype), torch.randn(shape, dtype=dtype)
    if len(shape) == 4 and draw.random() < 0.2:
        net, x = net.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    run, options = backward(draw), options_of(draw, net)
    try:
        plain = outcome(copy.deepcopy(net), x, run, None)
    except RuntimeError:  # plain autograd refuses some changes in place
        return
    rev = outcome(copy.deepcopy(net), x, run, options)
    assert all(map(is_same, plain, rev)), f"seed {seed}: {options}"


@pytest.mark.parametrize("part", range(8))
@pytest.mark.filterwarnings("ignore")
def test_random_ordinary_nets(part: int) -> None:
    for seed in range(50 * part, 50 * (part + 1)):
        check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8, 128))
@pytest.mark.filterwarnings("ignore")
def test_more_random_ordinary_nets(part: int) -> None:
    test_random_ordinary_nets(part)
