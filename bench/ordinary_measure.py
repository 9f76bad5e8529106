"""What `ordinary.py` measures of a training step, the same way for every contender."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import revhooks
from revhooks.profiler.meters import AccountedMeter, ResidentMeter, alternate
from revhooks.profiler.workload import Workload

MOST_ROUNDS = 9


class Contender(NamedTuple):
    """A workload, and the context that its steps are taken in."""

    work: Workload
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    def loss(self) -> Tensor:
        """Forward, from a fixed seed."""
        torch.manual_seed(1)
        return self.work.loss(self.work.model(*self.work.inputs))

    def step(self) -> None:
        """Forward and backward; no optimizer."""
        self.work.model.zero_grad(set_to_none=False)
        with self.context():
            self.loss().backward()

    def gradients(self) -> list[Tensor | None]:
        """Those of a step of a copy."""
        model = copy.deepcopy(self.work.model)
        Contender(dataclasses.replace(self.work, model=model), self.context).step()
        return [p.grad for p in model.parameters()]


class Checkpointed(nn.Module):
    """A block whose calls are checkpointed."""

    def __init__(self, block: nn.Module, **options: Any) -> None:
        super().__init__()
        self.block, self.options = block, options

    def forward(self, *args: Tensor) -> Tensor:
        return checkpoint(self.block, *args, use_reentrant=False, **self.options)


aten = torch.ops.aten
PRODUCTS = [  # what selective checkpointing saves
    aten.mm.default, aten.addmm.default, aten.bmm.default, aten.convolution.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
]  # fmt: skip
PEERS: dict[str, tuple[int, dict[str, Any]]] = {
    "checkpoint": (1, {}),
    "checkpoint, every second": (2, {}),
    "selective checkpoint": (1, {"context_fn": partial(create_selective_checkpoint_contexts, PRODUCTS)}),
}


def peer(work: Workload, blocks_of: Callable[[nn.Module], Any], name: str) -> Contender:
    """The model with its blocks, or every second one, wrapped."""
    every, options = PEERS[name]
    model = copy.deepcopy(work.model)
    blocks = blocks_of(model)
    for index in range(0, len(blocks), every):
        blocks[index] = Checkpointed(blocks[index], **options)
    return Contender(Workload(model, work.inputs, work.loss))


def difference(a: list[Tensor | None], b: list[Tensor | None]) -> float:
    """0 if all gradients are bitwise equal, else the largest relative difference; infinite if one is missing."""
    worst = 0.0
    for left, right in zip(a, b, strict=True):
        if left is None or right is None:
            worst = worst if left is right else float("inf")
        elif not torch.equal(left, right):
            worst = max(worst, float((left - right).norm() / left.norm()), torch.finfo(left.dtype).tiny)
    return worst


class Memory(NamedTuple):
    """What a run says of its own forward, and whether its gradients are those of plain autograd (`difference`)."""

    packed: int
    held: int
    difference: float

    @property
    def spared(self) -> float:
        """The share of the saved bytes that is not held."""
        return 1 - self.held / self.packed


def memory(work: Workload, **options: Any) -> Memory:
    """Bytes that plain autograd saves, bytes held by ``reversible(**options)`` after forward, and the gradients."""
    with revhooks.reversible(**options) as run:
        loss = Contender(work).loss()
        stats = run.stats
    del loss
    reversible = Contender(work, lambda: revhooks.reversible(**options))
    return Memory(stats.packed_bytes, stats.held_bytes, difference(Contender(work).gradients(), reversible.gradients()))


def accounted(contender: Contender, *, warm: bool = True) -> tuple[int, int]:
    """Accounted bytes that live after forward, and the peak of the whole step, by `AccountedMeter`.

    Args:
        contender: what to measure.
        warm: take a step before: it makes the gradients, which count for nobody, and what is learned once is learned.
    """
    if warm:
        contender.step()
    with AccountedMeter() as meter, contender.context():
        loss = contender.loss()
        live = meter.live
        loss.backward()
    return live, meter.peak


def resident_peak(contender: Contender) -> int:
    """Peak of the resident set of a step over the state between steps; for a process of its own (`fresh_peak`)."""
    contender.step()
    peaks = []
    for _ in range(3):
        with ResidentMeter() as meter:
            contender.step()
        peaks.append(meter.peak)
    return statistics.median_low(peaks)


def fresh_peak(*arguments: str) -> int | None:
    """The number that this program prints with these arguments, in a process whose allocator returns memory at once."""
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, sys.argv[0], *arguments], env={**os.environ, **allocator}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(f"{' '.join(arguments)}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    return int(done.stdout.splitlines()[-1])


def rebuilds(contender: Contender) -> int | None:
    """How many block calls a step inverts or replays; ``None`` where nobody counts."""
    with contender.context() as run:
        contender.loss().backward()
    return None if run is None else run.stats.inversions + run.stats.replays


class Times:
    """Nanoseconds of contenders, round by round."""

    def __init__(self, rounds: dict[str, list[int]]) -> None:
        self._rounds = rounds

    @property
    def rounds(self) -> int:
        """How many there are."""
        return len(next(iter(self._rounds.values())))

    def ratio(self, a: str, b: str) -> float:
        """The median over the rounds of the time of ``a`` over that of ``b``."""
        return round(statistics.median(x / y for x, y in zip(self._rounds[a], self._rounds[b], strict=True)), 3)


def timed(contenders: dict[str, Contender], seconds: float, least: int = 3) -> Times:
    """Steps by turns; as many rounds, of at most `MOST_ROUNDS`, as fit into so many seconds after one that warms up."""
    steps: Sequence[Callable[[], None]] = [contender.step for contender in contenders.values()]
    start = time.perf_counter()
    alternate(steps, rounds=0, warmup=1)
    rounds = min(MOST_ROUNDS, max(least, int(seconds / (time.perf_counter() - start)) - 1))
    return Times(dict(zip(contenders, alternate(steps, rounds=rounds, warmup=0), strict=True)))
