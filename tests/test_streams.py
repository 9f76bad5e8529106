"""What was rebuilt on one stream and is read on another: fakes on a CPU, where there are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revhooks
from revhooks import nn as rnn
from revhooks import streams
from tests.conftest import mlp

pytestmark = pytest.mark.cpu(reason="its streams are played")


class On(torch.autograd.Function):
    """Sets the stream on which the nodes before it run in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, now: list[str], name: str) -> Tensor:
        ctx.now, ctx.name = now, name
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.now[0] = ctx.name
        return grad, None, None


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    current = ["main"]
    monkeypatch.setattr(streams, "_KINDS", frozenset({"cpu"}))
    monkeypatch.setattr(streams, "_current", lambda index: current[0])
    return current


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    log: list[tuple[str, tuple[int, ...]]] = []
    monkeypatch.setattr(streams, "_join", lambda tensor, made_on: log.append((made_on, tuple(tensor.shape))))
    return log


def test_a_recomputed_tensor_that_two_streams_read(now: list[str], joined: list[Any]) -> None:
    """Its second reader waits for the stream on which the first one had it recomputed."""
    x = torch.randn(6, 5, requires_grad=True)
    a, b = nn.Linear(5, 3), nn.Linear(5, 4)
    with revhooks.reversible():
        h = nn.functional.gelu(x * 2)
        first = On.apply(a(h), now, "one")
        second = On.apply(b(h), now, "two")
        del h
        (first.sum() + second.sum()).backward()
    assert len(joined) == 1
    assert joined[0][0] in ("one", "two")
    assert sorted(joined[0][1]) == [5, 6]


@pytest.mark.parametrize("ops", [True, False])
def test_slots_that_another_stream_reads(ops: bool, now: list[str], joined: list[Any]) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = x.sin()
            return On.apply(self.a(x).tanh(), now, "one") + On.apply(self.b(x).tanh(), now, "two")

    with revhooks.reversible(replay=Two, ops=ops):
        nn.Sequential(Two(), Two())(torch.randn(6, 5, requires_grad=True)).sum().backward()
    assert {made_on for made_on, _ in joined} <= {"one", "two"}
    assert joined


def test_one_stream_waits_for_nothing(now: list[str], joined: list[Any]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), *[rnn.AdditiveCoupling(mlp(4), mlp(4), dim=-1) for _ in range(3)])
    with revhooks.reversible(replay=nn.Linear):
        model(torch.randn(3, 8)).square().sum().backward()
    assert not joined


class Seeded(torch.autograd.Function):
    """Saves a tensor of a device without streams, as operations of a GPU save their seeds on the CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, torch.empty(7, device="meta"))
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, seed = ctx.saved_tensors
        assert seed.is_meta
        return grad * x.cos()


@pytest.mark.parametrize("ops", [True, False])
def test_a_tensor_of_a_device_without_streams_waits_for_nothing(ops: bool, now: list[str], joined: list[Any]) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return On.apply(Seeded.apply(self.layer(x)).tanh(), now, "one")  # type: ignore[no-untyped-call]

    model, x = nn.Sequential(Block(), Block()), torch.randn(6, 5, requires_grad=True)
    want = torch.autograd.grad(model(x).sum(), [x, *model.parameters()])
    for _ in range(3):
        with revhooks.reversible(replay=Block, ops=ops) as run:
            got = torch.autograd.grad(model(x).sum(), [x, *model.parameters()])
        assert run.stats.replays
        assert all(map(torch.equal, got, want))
    assert (7,) not in [shape for _, shape in joined]
