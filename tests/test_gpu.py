"""What only a GPU has: kernels of its own, seeds on the CPU, graphs, streams, pinned memory. Each step as plain, bit by bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import revhooks
from revhooks import nn as rnn
from tests.conftest import mlp

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


class Attention(nn.Module):
    """Pre-norm attention with an RMS norm, dropout in both, and a GELU-MLP."""

    def __init__(self, width: int = 64, drop: float = 0.0) -> None:
        super().__init__()
        self.norm, self.qkv, self.project = nn.RMSNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        made = F.scaled_dot_product_attention(q, k, v, dropout_p=self.drop, is_causal=True)
        x = x + self.project(made.transpose(1, 2).flatten(2))
        return x + F.dropout(self.mlp(x), self.drop)


def gradients(model: nn.Module, x: Tensor, dtype: torch.dtype, context: Any = None, **options: Any) -> list[Tensor]:
    """Of a step from a fixed seed; reversible, if there are options."""
    model, leaf = copy.deepcopy(model), x.clone().requires_grad_()
    found: list[Tensor] = []
    for _ in range(4):  # what is learned counts from the second on
        model.zero_grad()
        leaf.grad = None
        torch.manual_seed(1)
        with (
            revhooks.reversible(**options) if context is None else context,
            torch.autocast("cuda", dtype, dtype is not torch.float32),
        ):
            model(leaf).square().mean().backward()
        found = [leaf.grad, *(p.grad for p in model.parameters() if p.grad is not None)]  # type: ignore[list-item]
    return found


@pytest.mark.parametrize("options", [{}, {"replay": Attention}, {"replay": Attention, "ops": False}, {"offload": True}], ids=str)
@pytest.mark.parametrize("drop", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_of_every_kernel(dtype: torch.dtype, drop: float, options: dict[str, Any]) -> None:
    """Float32 takes memory-efficient attention, whose seeds are saved on the CPU; the narrow ones take flash attention."""
    torch.manual_seed(0)
    model, x = nn.Sequential(*[Attention(drop=drop) for _ in range(4)]).cuda(), torch.randn(4, 32, 64, device="cuda")
    with torch.nn.attention.sdpa_kernel(
        [torch.nn.attention.SDPBackend.FLASH_ATTENTION, torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION]
    ):
        want = gradients(model, x, dtype, torch.enable_grad())
        again = gradients(model, x, dtype, torch.enable_grad())
        got = gradients(model, x, dtype, **options)
    exact = all(map(torch.equal, want, again))  # of some kernels' backward two runs differ
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a, b) if exact else torch.allclose(a, b, rtol=1e-2, atol=1e-2 * float(a.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_rms_norm_is_recomputed(dtype: torch.dtype) -> None:
    model = nn.Sequential(*[layer for _ in range(6) for layer in (nn.RMSNorm(512), nn.Linear(512, 512), nn.SiLU())])
    model, x = model.to("cuda", dtype), torch.randn(256, 512, device="cuda", dtype=dtype)
    want = gradients(model, x, torch.float32, torch.enable_grad())
    with revhooks.reversible() as run:
        loss = model(x.clone().requires_grad_()).square().mean()
        held, packed = run.stats.held_bytes, run.stats.packed_bytes
        # its deviations, and nothing else
        assert sum(kept.bytes for kept in run.stats.kept if "Rms" in kept.op) <= 6 * 256 * 4
        loss.backward()
    assert held < 0.7 * packed
    assert all(map(torch.equal, gradients(model, x, torch.float32), want))


@pytest.mark.parametrize("kind", ["ordinary", "replayed", "couplings"])
def test_a_captured_step(kind: str) -> None:
    """Five steps before the capture, and then the graph does what plain does."""
    torch.manual_seed(0)
    blocks = {
        "ordinary": lambda: nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 64)),
        "replayed": Attention,
        "couplings": lambda: rnn.AdditiveCoupling(mlp(32), mlp(32), dim=-1),
    }
    model = nn.Sequential(*[blocks[kind]() for _ in range(3)]).cuda()
    options: dict[str, Any] = {"replay": Attention} if kind == "replayed" else {}
    x = torch.randn(4, 32, 64, device="cuda")
    want = gradients(model, x, torch.float32, torch.enable_grad())[1:]

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with revhooks.reversible(**options):
            model(x.clone().requires_grad_()).square().mean().backward()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(5):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    model.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    torch.cuda.synchronize()
    for a, parameter in zip(want, model.parameters(), strict=True):
        assert parameter.grad is not None
        assert torch.allclose(a, parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("replay", [True, False])
def test_blocks_on_a_stream_of_their_own(replay: bool) -> None:
    """A branch that runs on a side stream is rebuilt there; what others read waits for it."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = mlp(64), mlp(64)
            self.side = torch.cuda.Stream()

        def forward(self, x: Tensor) -> Tensor:
            current = torch.cuda.current_stream()
            self.side.wait_stream(current)
            with torch.cuda.stream(self.side):
                left = self.a(x.sin())
            right = self.b(x.cos())
            current.wait_stream(self.side)
            left.record_stream(current)
            return left + right

    torch.manual_seed(0)
    # what comes first is read by one stream only
    model = nn.Sequential(nn.Linear(64, 64), *[Branches() for _ in range(4)]).cuda()
    x = torch.randn(512, 64, device="cuda")
    leaf, found = x.clone().requires_grad_(), []
    for reverse in (False, True, True, True):
        model.zero_grad()
        leaf.grad = None
        if reverse:
            with revhooks.reversible(replay=Branches if replay else None):
                model(leaf).square().mean().backward()
        else:
            model(leaf).square().mean().backward()
        torch.cuda.synchronize()
        found.append([leaf.grad.clone(), *(p.grad.clone() for p in model.parameters())])  # type: ignore[union-attr]
    for step in found[1:]:
        assert all(map(torch.equal, step, found[0]))


STEADY: dict[str, tuple[Any, dict[str, Any]]] = {
    "ordinary": (lambda: [nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 64), nn.ReLU()], {}),
    "replayed": (lambda: [Attention(drop=0.1)], {"replay": Attention}),
    "couplings": (lambda: [rnn.AdditiveCoupling(mlp(32), mlp(32), dim=-1)], {}),
    "streams": (lambda: [rnn.ReversibleSequential(*[mlp(32) for _ in range(4)], dim=-1)], {}),
    "offload": (lambda: [nn.Linear(64, 64), nn.GELU()], {"offload": True}),
    "nothing": (lambda: [nn.Linear(64, 64), nn.GELU()], {"ops": False}),
}


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("kind", STEADY)
def test_a_steady_step_waits_for_nothing(kind: str) -> None:
    """A context a step, as a training loop may have it: no value is read, and nothing is brought from the host."""
    make, options = STEADY[kind]
    torch.manual_seed(0)
    model, x = nn.Sequential(*[layer for _ in range(6) for layer in make()]).cuda(), torch.randn(64, 32, 64, device="cuda")

    def step() -> None:
        model.zero_grad()
        with revhooks.reversible(**options):
            model(x).square().mean().backward()

    for _ in range(20):
        step()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(4):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
