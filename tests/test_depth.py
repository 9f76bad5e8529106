"""Depth: constant activation memory, no recursion, exact gradients."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import revhooks
from revhooks import nn as rnn
from revhooks.profiler.meters import AccountedMeter
from tests.conftest import Notes, compare, conv_branch, mlp, step


def conv_chain(depth: int) -> nn.Module:
    return nn.Sequential(*[rnn.AdditiveCoupling(conv_branch(6), conv_branch(6)) for _ in range(depth)])


def activation_peak(model: nn.Module, x: torch.Tensor, *, reverse: bool) -> int:
    """Peak of what a whole step makes, gradients of parameters allocated before."""

    def one() -> None:
        if reverse:
            with revhooks.reversible():
                model(x).square().mean().backward()
        else:
            model(x).square().mean().backward()

    one()
    with AccountedMeter() as meter:
        one()
    return meter.peak


@pytest.mark.usefixtures("large_batches_only")
def test_held_after_forward_does_not_depend_on_depth() -> None:
    x = torch.randn(4, 12, 16, 16)
    held = {depth: step(conv_chain(depth), x, reverse=True).held_after_forward for depth in (8, 64)}
    assert held[64] <= 1.02 * held[8]


@pytest.mark.cpu(reason="what its kernels take")
def test_peak_of_a_deep_net_is_that_of_one_plain_block() -> None:
    """The issue's workload in small: the same ratios of tensors to each other."""
    x = torch.randn(8, 12, 24, 24)
    one_block = activation_peak(conv_chain(1), x, reverse=False)
    assert activation_peak(conv_chain(64), x, reverse=True) <= 1.1 * one_block


@pytest.mark.cpu(reason="what its kernels take")
def test_peak_of_a_two_stream_chain() -> None:
    x = torch.randn(8, 12, 24, 24)
    one_block = activation_peak(conv_chain(1), x, reverse=False)
    chain = rnn.ReversibleSequential(*[conv_branch(6) for _ in range(128)])
    assert activation_peak(chain, x, reverse=True) <= 1.1 * one_block


def test_gradients_at_depth_64_in_float64() -> None:
    compare(conv_chain(64).double(), torch.randn(2, 12, 5, 5, dtype=torch.float64))


def test_float32_drift_at_depth_64_is_reported() -> None:
    rev = compare(conv_chain(64), torch.randn(2, 12, 8, 8), tol=2e-2)
    assert rev.stats is not None
    assert 0 < rev.stats.worst_error < 1e-3
    assert "AdditiveCoupling" in rev.stats.worst_error.block


@pytest.mark.parametrize("kind", ["couplings", "sequence"])
def test_1500_blocks_without_recursion(kind: str, no_gc: None) -> None:
    def fn() -> nn.Module:
        layer = nn.Linear(2, 2)
        with torch.no_grad():
            layer.weight.mul_(0.02)
        return layer

    if kind == "couplings":
        blocks = [rnn.AdditiveCoupling(fn(), fn(), dim=-1) for _ in range(100)]
        model: nn.Module = nn.Sequential(*(15 * blocks))  # calls are what goes deep, and known blocks are quick
    else:
        model = rnn.ReversibleSequential(*[fn() for _ in range(1500)], dim=-1)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(300)
    try:
        x = torch.randn(2, 4, dtype=torch.float64)
        model = model.double()
        with revhooks.reversible() as run:
            model(x).square().mean().backward()
    finally:
        sys.setrecursionlimit(limit)
    got = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model(x).square().mean().backward()
    want = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(got, want, strict=True))
    assert run.stats.held_bytes == 0


def test_1500_blocks_that_backward_never_reaches(no_gc: None) -> None:
    """A graph that is dropped unused goes without recursion too."""
    model = nn.Sequential(*(15 * [rnn.AdditiveCoupling(nn.Linear(2, 2), nn.Linear(2, 2), dim=-1) for _ in range(100)]))
    with revhooks.reversible() as run:
        y = model(torch.randn(2, 4))
        del y
    assert run.stats.held_bytes == 0


def test_reading_the_oldest_block_first_does_not_recurse() -> None:
    blocks = [rnn.AdditiveCoupling(nn.Linear(2, 2), nn.Linear(2, 2), dim=-1) for _ in range(100)]
    with torch.no_grad():
        for block in blocks:
            for p in block.parameters():
                p.mul_(0.02)
    model = nn.Sequential(*(12 * blocks)).double()
    x = torch.randn(2, 4, dtype=torch.float64)
    with revhooks.reversible():
        h = model[1](model[0](x))
        first = h.square().mean()
        out = model[2:](h)
    grads = torch.autograd.grad(first, list(model[1].parameters()))
    want = torch.autograd.grad(model[1](model[0](x)).square().mean(), list(model[1].parameters()))
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(grads, want, strict=True))
    del out


def test_mixed_net() -> None:
    """Stages with ordinary layers, pooling and a two-stream chain in between."""
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        conv_chain(4), nn.ReLU(), nn.MaxPool2d(2), conv_chain(3),
        rnn.ReversibleSequential(*[conv_branch(6) for _ in range(5)]),
        nn.BatchNorm2d(12), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(12, 8), rnn.AdditiveCoupling(mlp(4), mlp(4)), nn.Linear(8, 5),
    )  # fmt: skip
    rev = compare(model.double(), torch.randn(3, 3, 8, 8, dtype=torch.float64))
    assert rev.stats is not None
    assert rev.stats.frames == 9


@pytest.mark.cpu(reason="what its kernels take")
def test_peak_under_a_head_is_that_of_one_plain_block() -> None:
    """With a head that saves little the peak is inside the last block's forward, where every tensor counts."""
    x = torch.randn(8, 12, 24, 24)

    class Pooled(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).mean((2, 3))

    one_block = activation_peak(Pooled(conv_chain(1)), x, reverse=False)
    assert activation_peak(Pooled(conv_chain(8)), x, reverse=True) <= 1.1 * one_block
    chain = rnn.ReversibleSequential(*[conv_branch(6) for _ in range(64)])
    assert activation_peak(Pooled(chain), x, reverse=True) <= one_block


class Remembers(nn.Module):
    """Keeps what it is given, as an analysis or a feature cache would."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.seen = Notes()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append((x.detach(), x.detach().clone()))
        return self.net(x)


@pytest.mark.parametrize("two_streams", [False, True])
def test_streams_that_somebody_keeps_are_not_written_over(two_streams: bool) -> None:
    """Streams are inverted in their own memory, where they are alone there: not those that a branch keeps, nor an output."""
    branches = [Remembers(4).double() for _ in range(8)]
    pairs = zip(branches[::2], branches[1::2], strict=True)
    model = rnn.ReversibleSequential(*branches) if two_streams else nn.Sequential(*(rnn.AdditiveCoupling(*p) for p in pairs))
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    for branch in branches:
        branch.seen.taken()
    with revhooks.reversible():
        y = model(x)
        before = y.detach().clone()
        for retain in (True, False):
            grads = torch.autograd.grad(y.square().sum(), [x, *model.parameters()], retain_graph=retain)
            assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(grads, expected, strict=True))
    assert torch.equal(y, before)
    assert sum(len(branch.seen) for branch in branches) > 8
    assert all(torch.equal(tensor, copy) for branch in branches for tensor, copy in branch.seen.taken())


def test_gradients_of_a_chain_lie_apart() -> None:
    """So that the used half of the gradient of its output is not held for the sake of the other."""
    seen = []
    chain = rnn.ReversibleSequential(*[nn.Linear(4, 4) for _ in range(2)], dim=-1)
    for branch in chain:
        branch.register_full_backward_hook(lambda _, __, grads: seen.append(grads[0].untyped_storage().nbytes()))
    chain(torch.randn(16, 8, requires_grad=True)).square().sum().backward()
    assert seen == [16 * 4 * 4] * 2


def test_a_chain_under_function_transforms() -> None:
    chain = rnn.ReversibleSequential(*[nn.Linear(2, 2) for _ in range(3)], dim=-1).double()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(chain, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(chain, x)
    assert torch.allclose(torch.func.jacrev(chain)(x[0]), torch.func.jacfwd(chain)(x[0]))
    each = torch.func.vmap(torch.func.grad(lambda row: chain(row).square().sum()))(x)
    assert torch.allclose(each, torch.autograd.grad(chain(x).square().sum(), x)[0])


class WritesToInputs(nn.Module):
    """Its blocks' inputs are written to by the caller, after the call: before another block, an ordinary layer, or nothing."""

    def __init__(self, after: str, width: int = 12) -> None:
        super().__init__()
        self.first = rnn.AdditiveCoupling(conv_branch(width // 2), conv_branch(width // 2))
        self.second = rnn.AffineCoupling(conv_branch(width // 2, width), conv_branch(width // 2, width))
        self.third = rnn.AdditiveCoupling(conv_branch(width // 2), conv_branch(width // 2))
        self.head = nn.Conv2d(width, width, 1)
        self.after = after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        y = self.second(h)
        if self.after == "second":
            h.mul_(0.5).add_(y)
            y = self.third(h)
        else:
            z = self.third(y)
            y.mul_(0.5).add_(z)
            y = self.head(y) if self.after == "third" else z
        return y


@pytest.mark.parametrize("after", ["second", "third", "last"])
@pytest.mark.parametrize("budget", [0, 2**15, 2**40])
def test_a_caller_may_write_to_what_it_gave_to_a_block(after: str, budget: int) -> None:
    """Plain autograd has saved streams of its own; so must we, or bring them back."""
    model, x = WritesToInputs(after).double(), torch.randn(2, 12, 6, 6, dtype=torch.float64)
    compare(model, x)
    plain = torch.autograd.grad(model(x).sum(), list(model.parameters()), allow_unused=True)
    with revhooks.reversible(budget=budget):
        rev = torch.autograd.grad(model(x).sum(), list(model.parameters()), allow_unused=True)
    for a, b in zip(plain, rev, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-10, atol=1e-10)
    with revhooks.reversible(budget=budget):
        total = model(x).sum()
        torch.autograd.grad(total, list(model.parameters()), allow_unused=True, retain_graph=True)
        again = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    assert all(a is b or torch.allclose(a, b, rtol=1e-10, atol=1e-10) for a, b in zip(plain, again, strict=True))
