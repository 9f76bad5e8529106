"""What a case of `semantics.py` is, what it works on, and how two of its runs are compared."""

from __future__ import annotations

import contextlib
import gc
import random
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from semantics_branches import conv, mlp
from semantics_contenders import Chain, Contender, Options
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Result = dict[str, Any]
DEPTH = 3


class Trial:
    """One side of a case: a net, an input, and the context that its steps run in."""

    def __init__(self, case: Case, contender: Contender, options: Options, *, plain: bool) -> None:
        self.case = case
        self.plain = plain
        self.context = contextlib.nullcontext if plain else contender.context
        self.width = 8 if contender.full_width else 4
        torch.manual_seed(0)
        count = 2 if case.shared else 2 * DEPTH
        self.branches = [case.branch(self.width).to(case.dtype) for _ in range(count)]
        build = contender.plain if plain else contender.chain
        if plain and case.twin and contender.twin is not None:
            build = contender.twin
        calls = self.branches * DEPTH if case.shared else self.branches
        self.blocks = [build(calls[i : i + 2], options) for i in range(0, len(calls), 2)] if case.split else []
        self.net = Chain(self.blocks) if case.split else build(calls, options)
        shape = (6, 8, 5, 5) if case.branch is conv else (6, 8)
        self.data = torch.randn(shape, dtype=case.dtype)
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)

    def begin(self) -> None:
        """A new step: no gradients, a new leaf."""
        self.net.zero_grad()
        self.x = self.data.clone().requires_grad_(self.case.grad)

    def h(self) -> Tensor:
        """The input as a layer before the chain would give it, in memory of its own."""
        return self.x.clone()

    def other(self) -> Tensor:
        """Another input."""
        return self.x.flip(0) * 1.5

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters, in the order of branches: nets name and order them differently."""
        return [p for branch in self.branches for p in branch.parameters()]

    def gradients(self) -> list[Tensor | None]:
        return [t.grad.detach().clone() if t.grad is not None else None for t in (self.x, *self.parameters)]

    def buffers(self) -> dict[str, list[Tensor]]:
        """All buffers, by the last part of their names."""
        found: dict[str, list[Tensor]] = {}
        for branch in self.branches:
            for name, buffer in branch.named_buffers():
                found.setdefault(name.rpartition(".")[2], []).append(buffer.detach().to_dense().clone())
        return found

    def update(self) -> None:
        with torch.no_grad():
            for p in self.parameters:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=0.05)

    def run(self) -> list[Result]:
        """All steps of the case."""
        steps = []
        for _ in range(self.case.steps):
            self.begin()
            with self.context():
                result = self.case.use(self) or {}
            steps.append({**result, "gradients": self.gradients(), **self.buffers()})
            self.update()
        return steps


def random_states() -> list[Tensor]:
    """The states of torch's generators, that of the device on which tensors are made too."""
    device = torch.get_default_device()
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(getattr(torch, device.type).get_rng_state(device))
    return states


@dataclass(frozen=True)
class Case:
    """A use of a chain that plain PyTorch allows.

    Attributes:
        title: what the table calls it.
        use: one step on a trial; it returns what is compared besides gradients and buffers.
        branch: makes a branch of a width.
        steps: how many steps are compared, with an update of the parameters after each.
        split: build blocks of their own, for cases that need what is between them.
        shared: one pair of branches in all blocks.
        grad: whether the input requires grad.
        twin: compare with the same net trained without saving memory, not with the reference.
        may_raise: an error is as good as what plain autograd gives.
        dtype: of parameters and input.
        tolerance: relative, at least.
    """

    title: str
    use: Callable[[Trial], Result | None]
    branch: Callable[[int], nn.Module] = mlp
    steps: int = 2
    split: bool = False
    shared: bool = False
    grad: bool = True
    twin: bool = False
    may_raise: bool = False
    dtype: torch.dtype = torch.float64
    tolerance: float = 0.0


def difference(expected: list[Tensor | None], got: list[Tensor | None]) -> float:
    """The largest difference over the largest element; no gradient counts as zeros."""
    if len(expected) != len(got):
        return float("inf")
    scale, worst = 1e-30, 0.0
    for a, b in zip(expected, got, strict=True):
        if a is None and b is None:
            continue
        a, b = (torch.zeros_like(b) if a is None else a), (torch.zeros_like(a) if b is None else b)
        if a.shape != b.shape:
            return float("inf")
        off = (a.double() - b.double()).abs().max()
        worst = max(worst, float(off) if off == off else float("inf"))
        scale = max(scale, float(a.double().abs().max()))
    return worst / scale


# -- lifetime


class Storages(TorchDispatchMode):
    """Remembers, weakly, every storage that is made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self.made[tensor.untyped_storage()._cdata] = weakref.ref(tensor.untyped_storage())
        return result

    def alive(self) -> int:
        """Bytes of those that are alive."""
        return sum(storage.nbytes() for made in self.made.values() if (storage := made()) is not None)


@contextlib.contextmanager
def collector_off() -> Iterator[None]:
    gc.collect()
    gc.freeze()  # what is there already is not looked at again
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def survivors(t: Trial, use: Callable[[Trial], None], *, collect: bool) -> Result:
    """What is left of three steps: bytes of tensors, with the collector off or not, and Python objects a step."""

    def once() -> None:
        with t.context():
            use(t)
        t.begin()

    def count() -> int:
        gc.collect()
        return len(gc.get_objects())

    with collector_off():
        with Storages():
            for _ in range(3):  # what is learnt, imported and cached once
                once()
        before = count()
        for _ in range(3):
            once()
        objects = max(0, count() - before) // 3
        with Storages() as storages:
            for _ in range(3):
                once()
            t.x = t.data
        if collect:
            gc.collect()
        left = storages.alive()
    return {"left": {"bytes": left, "objects a step": objects}}
