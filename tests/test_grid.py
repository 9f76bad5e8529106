"""Exact streams: on a grid the inverse is exact to the last bit, so gradients are bitwise those of plain autograd."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import revhooks
from revhooks import nn as rnn
from revhooks.errors import GridError, ShapeError
from revhooks.functional import grid_law, grid_limit, round_to_grid
from tests.conftest import Count, calls
from tests.devices import DEVICE


class InBfloat16(nn.Module):
    """A branch that computes in bfloat16 and leaves the stream in float32."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return self.net(x)


def branch(width: int, gain: float, *, narrow: bool, relu: bool = False) -> nn.Module:
    net = nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.ReLU() if relu else nn.GELU(), nn.Linear(2 * width, width)
    )
    with torch.no_grad():
        net[3].weight.mul_(gain)
    return Count(InBfloat16(net) if narrow else net)


def build(kind: str, depth: int, gain: float, narrow: bool, bits: int | None, relu: bool = False) -> nn.Module:
    torch.manual_seed(0)
    fns = [branch(8, gain, narrow=narrow, relu=relu) for _ in range(depth)]
    if kind == "sequence":
        return rnn.ReversibleSequential(*fns, dim=-1, grid_bits=bits)
    return nn.Sequential(*[rnn.AdditiveCoupling(f, g, dim=-1, grid_bits=bits) for f, g in zip(fns[::2], fns[1::2], strict=True)])


def gradients(net: nn.Module, x: Tensor, reverse: bool) -> tuple[list[Tensor], revhooks.record.Stats | None]:
    x = x.clone().requires_grad_()
    with revhooks.reversible() if reverse else torch.enable_grad() as run:
        value = net(x).square().mean()
        value.backward()
    return [value.detach(), x.grad, *[p.grad for p in net.parameters()]], run.stats if reverse else None


@pytest.mark.parametrize("kind", ["blocks", "sequence"])
@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("gain", [1.0, 2.0])
def test_gradients_are_bitwise_plain_at_depth_96(kind: str, narrow: bool, gain: float) -> None:
    """Without the grid the same net is off by percents, or falls back."""
    net = build(kind, 96, gain, narrow, 12)
    x = torch.randn(4, 16)
    plain, _ = gradients(copy.deepcopy(net), x, False)
    for _ in range(2):
        net.zero_grad()
        rev, stats = gradients(net, x, True)
        assert all(map(torch.equal, plain, rev))
        assert stats is not None
        assert stats.worst_error == 0
        assert stats.held_bytes == 0


@pytest.mark.cpu(reason="how far it drifts depends on its kernels and on what is drawn")
def test_the_same_net_without_a_grid_drifts() -> None:
    net = build("sequence", 96, 1.0, True, None)
    x = torch.randn(4, 16)
    plain, _ = gradients(copy.deepcopy(net), x, False)
    with revhooks.reversible(guard="off"):
        value = net(leaf := x.clone().requires_grad_()).square().mean()
        value.backward()
    assert (leaf.grad - plain[1]).norm() > 1e-4 * plain[1].norm()


@pytest.mark.parametrize("kind", ["blocks", "sequence"])
def test_memory_and_evaluations_are_those_of_a_chain(kind: str) -> None:
    """Rounding makes exact zeros, which need not be held here: they come back as zeros. ReLU branches feel it."""
    x = 1e-3 * torch.randn(64, 16)
    held = {}
    for depth in (8, 32):
        net = build(kind, depth, 0.1, False, 8, relu=True)
        assert bool((round_to_grid(x, 8) == 0).any())
        plain, _ = gradients(copy.deepcopy(net), x, False)
        with revhooks.reversible() as run:
            value = net(leaf := x.clone().requires_grad_()).square().mean()
            held[depth] = run.stats.held_bytes
            value.backward()
        assert all(map(torch.equal, plain[1:], [leaf.grad, *[p.grad for p in net.parameters()]]))
        assert sum(calls(net)) <= 2 * depth - 1
    assert held[8] == held[32]


def test_what_comes_in_off_the_grid_is_held() -> None:
    """Another block's output is not on the grid: giving back its rounded value would be silently off."""
    f = [branch(8, 1.0, narrow=False).double() for _ in range(6)]
    net = nn.Sequential(
        rnn.AdditiveCoupling(f[0], f[1], dim=-1),
        rnn.AdditiveCoupling(f[2], f[3], dim=-1, grid_bits=4),
        rnn.AdditiveCoupling(f[4], f[5], dim=-1, grid_bits=2),
    )
    x = torch.randn(4, 16, dtype=torch.float64)
    plain, _ = gradients(copy.deepcopy(net), x, False)
    rev, _ = gradients(net, x, True)
    assert all(torch.allclose(a, b, atol=1e-12, rtol=0) for a, b in zip(plain, rev, strict=True))


def test_law_is_exact_up_to_the_limit() -> None:
    for dtype, bits in ((torch.float32, 12), (torch.float64, 20), (torch.bfloat16, 3), (torch.float16, 4)):
        limit = grid_limit(dtype, bits)
        law = grid_law(bits)
        x = round_to_grid(torch.empty(10_000, dtype=dtype).uniform_(-limit / 8, limit / 8), bits)
        u = torch.empty(10_000, dtype=dtype).uniform_(-limit / 8, limit / 8)
        assert torch.equal(law.inverse(law.forward(x, u), u), x)
        wide = u.double()
        assert torch.equal(round_to_grid(u, bits).double(), (wide * 2**bits).round() / 2**bits)


def test_straight_through() -> None:
    x = torch.randn(5, requires_grad=True)
    (grad,) = torch.autograd.grad((round_to_grid(x, 3) * torch.arange(5.0)).sum(), x)
    assert torch.equal(grad, torch.arange(5.0))
    u = torch.randn(5, dtype=torch.bfloat16, requires_grad=True)
    (grad,) = torch.autograd.grad(grid_law(4).forward(torch.zeros(5), u).sum(), u)
    assert grad.dtype is torch.bfloat16
    assert torch.equal(torch.func.vmap(lambda t: round_to_grid(t, 3))(x), round_to_grid(x, 3))


@pytest.mark.parametrize("kind", ["blocks", "sequence"])
@pytest.mark.parametrize("reverse", [False, True])
def test_overflow_names_the_block_and_the_value(kind: str, reverse: bool) -> None:
    net = build(kind, 4, 1.0, False, 20)
    with pytest.raises(GridError, match=r"step \d: expected streams below 16 .* got 1\d\d"):
        gradients(net, 100 * torch.ones(2, 16) + torch.arange(16), reverse)
    gradients(net, torch.ones(2, 16), reverse)


def test_bad_grids() -> None:
    f = nn.Identity()
    with pytest.raises(ShapeError, match="integer from 0 to 40"):
        rnn.AdditiveCoupling(f, f, grid_bits=1.5)
    with pytest.raises(ShapeError, match="additive coupling"):
        rnn.ReversibleSequential(f, f, coupling="affine", grid_bits=4)
    with pytest.raises(ShapeError, match="streams of"):
        rnn.AdditiveCoupling(f, f, grid_bits=4, dim=-1)(torch.zeros(2, 4, dtype=torch.complex64))
    assert rnn.ReversibleSequential(f, f, coupling=grid_law(6)).grid_bits == 6
    assert "grid_bits=6" in repr(rnn.AdditiveCoupling(f, f, grid_bits=6))
