"""Blocks whose parameters FSDP shards, gathers for a call, and frees after it: gradients are those of plain FSDP.

In processes of their own, over gloo. What is not allocated between calls is not touched: that would end the interpreter.
"""

from __future__ import annotations

import contextlib
import datetime
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import revhooks
from revhooks import nn as rnn

WIDTH, STEPS = 8, 2


class Block(nn.Module):
    """A residual block, with statistics and a record of what came by."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(WIDTH, 16), nn.LayerNorm(16), nn.Linear(16, WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.lerp_(x.mean(0).to(self.mean.dtype), 0.1)
        y = self.b(self.norm(F.gelu(self.a(x - self.mean.to(x.dtype)))))
        self.seen.append(y.detach().mean())
        return x + F.dropout(y, 0.1)


class Borrowing(Block):
    """Saves tensors that lie in a parameter's memory, which is freed after the call."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().mean())
        y = torch.tanh(F.linear(x * self.scale(), self.a.weight.detach(), self.a.bias))
        return x + torch.sigmoid(self.b(y * F.relu(self.norm(y)))) * self.b.bias.detach().view(1, -1)

    def scale(self) -> Tensor:
        return self.a.weight.data.t().sum(1).sin()


class Additive(nn.Module):
    """A coupling that somebody else wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = branch(), branch()

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        a = a + self.f(b)
        return torch.cat([a, b + self.g(a)], -1)

    def inverse(self, y: Tensor) -> Tensor:
        a, b = y.chunk(2, -1)
        b = b - self.g(a)
        return torch.cat([a - self.f(b), b], -1)


def branch() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH // 2, 16), nn.GELU(), nn.Linear(16, WIDTH // 2))


NETS: dict[str, Callable[[], list[nn.Module]]] = {
    "blocks": lambda: [Block() for _ in range(3)],
    "borrowing": lambda: [Borrowing() for _ in range(3)],
    "couplings": lambda: [rnn.AdditiveCoupling(branch(), branch(), dim=-1) for _ in range(3)],
    "chain": lambda: [rnn.ReversibleSequential(*[branch() for _ in range(4)], dim=-1) for _ in range(2)],
    "registered": lambda: [Additive() for _ in range(3)],
}
Call = Callable[[nn.Module, Tensor], Tensor]


def _through(net: nn.Module, call: Call, x: Tensor) -> Tensor:
    def forward(parts: Any, x: Tensor) -> Tensor:
        for part in parts:
            x = call(part, x)
        return x

    inner = net.module if isinstance(net, FSDP) else net
    inner.forward = lambda x: forward(inner, x)  # type: ignore[method-assign]
    try:
        return net(x)  # type: ignore[no-any-return]
    finally:
        del inner.forward


MODES: dict[str, tuple[Call, Callable[[], Any]]] = {
    "plain": (lambda part, x: part(x), contextlib.nullcontext),
    "checkpoint": (lambda part, x: revhooks.checkpoint(part, x), contextlib.nullcontext),
    "function": (lambda part, x: revhooks.checkpoint(lambda h: part(h), x), contextlib.nullcontext),
    "both": (lambda part, x: revhooks.checkpoint(part, x), revhooks.reversible),
    "replay": (lambda part, x: part(x), lambda: revhooks.reversible(replay=Block)),
    "predicate": (lambda part, x: part(x), lambda: revhooks.reversible(replay=lambda m: isinstance(m, Block))),
    "reversible": (lambda part, x: part(x), revhooks.reversible),
    "budget": (lambda part, x: part(x), lambda: revhooks.reversible(replay=Block, budget=2000)),
}
HALF = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}


def _fsdp2(parts: list[nn.Module], *, whole: bool = True, inner: bool = False, **options: Any) -> nn.Module:
    options["mesh"] = init_device_mesh("cpu", (dist.get_world_size(),))
    net = nn.Sequential(*parts)
    for part in parts:
        for child in part.modules() if inner else ():
            if isinstance(child, nn.Sequential):
                fully_shard(child, **options)
        fully_shard(part, **options)
    return fully_shard(net, **options) if whole else net


def _fsdp1(parts: list[nn.Module], *, whole: bool = True, units: bool = True, **options: Any) -> nn.Module:
    options["device_id"] = torch.device("cpu")
    net = nn.Sequential(*[FSDP(part, **options) if units else part for part in parts])
    return FSDP(net, **options) if whole else net


SHARDINGS: dict[str, Callable[[list[nn.Module]], nn.Module]] = {
    "2": _fsdp2,
    "2, parts": lambda parts: _fsdp2(parts, whole=False),
    "2, inner": lambda parts: _fsdp2(parts, inner=True),
    "2, kept": lambda parts: _fsdp2(parts, reshard_after_forward=False),
    "2, resharded": lambda parts: _fsdp2(parts, reshard_after_forward=True),
    "2, bf16": lambda parts: _fsdp2(parts, mp_policy=MixedPrecisionPolicy(**HALF)),  # type: ignore[arg-type]
    "1, root": lambda parts: _fsdp1(parts, units=False, use_orig_params=True),
    "1, flat root": lambda parts: _fsdp1(parts, units=False, use_orig_params=False),
    "1": lambda parts: _fsdp1(parts, use_orig_params=True),
    "1, flat": lambda parts: _fsdp1(parts, use_orig_params=False),
    "1, parts": lambda parts: _fsdp1(parts, whole=False, use_orig_params=True),
    "1, bf16": lambda parts: _fsdp1(parts, use_orig_params=True, mixed_precision=MixedPrecision(**HALF)),  # type: ignore[arg-type]
}


def _train(kind: str, sharding: str, mode: str) -> list[Tensor]:
    """Losses, gradients, buffers, and what was recorded."""
    torch.manual_seed(0)
    parts = NETS[kind]()
    net = SHARDINGS[sharding](parts)
    call, context = MODES[mode]
    x = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(dist.get_rank()))
    found: list[Tensor] = []
    torch.manual_seed(1)
    for step in range(STEPS):
        with context():
            loss = _through(net, call, x * (1 + step)).float().square().mean()
            loss.backward()
        found.append(loss.detach())
        grads = [p.grad for p in net.parameters() if p.grad is not None]
        found += [(g.to_local() if isinstance(g, DTensor) else g).clone() for g in grads]  # type: ignore[misc]
    found += [buffer.clone() for buffer in net.buffers()]
    for block in (module for module in net.modules() if isinstance(module, Block)):
        found += [torch.tensor(len(block.seen)), *block.seen]
    return found


def _problem(expected: list[Tensor], found: list[Tensor], kind: str, sharding: str) -> str:
    if len(found) != len(expected):
        return f"{len(found)} tensors for {len(expected)}"
    bound = 0.0 if kind in EXACT else 1e-5
    half = "bf16" in sharding and kind not in EXACT
    differ = [float((a.double() - b.double()).abs().max()) for a, b in zip(found, expected, strict=True) if a.numel()]
    return "" if max(differ) <= (0.05 if half else bound) else f"off by {max(differ)}"


def _work(rank: int, size: int, path: str, jobs: list[tuple[str, str, str]], results: Any) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    revhooks.register(Additive, inverse="inverse")
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size, timeout=timeout)
    plain: dict[tuple[str, str], list[Tensor]] = {}
    for kind, sharding, mode in jobs:
        try:
            if (kind, sharding) not in plain:
                plain[kind, sharding] = _train(kind, sharding, "plain")
            problem = _problem(plain[kind, sharding], _train(kind, sharding, mode), kind, sharding)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        results.put((rank, (kind, sharding, mode), problem))
    dist.destroy_process_group()


def _run(size: int, path: Path, jobs: list[tuple[str, str, str]]) -> dict[tuple[str, str, str], str]:
    """What is wrong with each of them, in any process."""
    context = mp.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=_work, args=(rank, size, str(path / "store"), jobs, results)) for rank in range(size)]
    for worker in workers:
        worker.start()
    wrong: dict[tuple[str, str, str], str] = {}
    try:
        for _ in range(size * len(jobs)):
            _, job, problem = results.get(timeout=40)
            wrong[job] = wrong.get(job) or problem
    finally:
        for worker in workers:
            worker.join(timeout=20)
            worker.kill()
    return wrong


EXACT = ("blocks", "borrowing")
JOBS = [
    *[(kind, sharding, mode) for kind in EXACT for sharding in SHARDINGS for mode in MODES if mode != "plain"],
    *[(kind, sharding, "reversible") for kind in ("couplings", "chain", "registered") for sharding in SHARDINGS],
]
FEW = [
    ("blocks", "2", "replay"),
    ("blocks", "2", "checkpoint"),
    ("blocks", "2, kept", "replay"),
    ("borrowing", "2", "checkpoint"),
    ("blocks", "2, bf16", "checkpoint"),
    ("blocks", "2", "reversible"),
    ("couplings", "2", "reversible"),
    ("chain", "2, inner", "reversible"),
    ("registered", "2", "reversible"),
    ("blocks", "1", "checkpoint"),
    ("blocks", "1, flat", "replay"),
]


def test_sharded_blocks(tmp_path: Path) -> None:
    wrong = _run(2, tmp_path, FEW)
    assert wrong == dict.fromkeys(FEW, "")


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_every_kind_of_sharding(tmp_path: Path, size: int) -> None:
    wrong = _run(size, tmp_path, JOBS)
    assert {job: problem for job, problem in wrong.items() if problem} == {}
    assert len(wrong) == len(JOBS)
