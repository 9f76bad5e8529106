"""Models of other libraries, trained for some steps plain and under ``reversible()``, and their comparison."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import revhooks
from revhooks.record import Stats
from tests.conftest import Count

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


@dataclass
class Trained:
    """What some steps came to; the figures are those of the last one."""

    model: nn.Module
    losses: list[float] = field(default_factory=list)
    grads: list[list[Tensor | None]] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)  # most evaluations of a net in a step
    held: Stats | None = None  # after forward
    stats: Stats | None = None

    @property
    def share(self) -> float:
        """Of what plain autograd holds, what is held after forward."""
        return self.held.held_bytes / self.held.packed_bytes

    @property
    def peak(self) -> float:
        """The same of the most that is held."""
        return self.stats.peak_held_bytes / self.stats.packed_bytes


def train(
    model: nn.Module, loss: Callable[[nn.Module], Tensor], *, reverse: bool, steps: int = 3, ignored: str = "", **options: Any
) -> Trained:
    """Train a copy of a model by gradient descent, each step from a seed of its own."""
    trained = Trained(copy.deepcopy(model))
    model = trained.model
    nets = [module for module in model.modules() if isinstance(module, Count)]
    for step in range(steps):
        torch.manual_seed(step)
        random.seed(step)
        np.random.seed(step)
        model.zero_grad()
        for net in nets:
            net.calls = 0
        with warnings.catch_warnings():
            if ignored:
                warnings.filterwarnings("ignore", message=ignored)
            with revhooks.reversible(**options) if reverse else contextlib.nullcontext() as run:
                value = loss(model)
                trained.held = run.stats if run is not None else None
                value.backward()
        if step == steps - 1:
            gc.collect()  # a transform of zuko's and its inverse hold each other, in plain autograd as well
        trained.stats = run.stats if run is not None else None
        trained.losses.append(value.item())
        trained.grads.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
        trained.calls.append(max((net.calls for net in nets), default=0))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad
    return trained


def assert_alike(plain: Trained, rev: Trained, tol: float) -> None:
    """The same losses, gradients (relative to the largest) and buffers, and nothing held any more."""
    assert np.allclose(plain.losses, rev.losses, rtol=tol, atol=tol), (plain.losses, rev.losses)
    for ours, theirs in zip(rev.grads, plain.grads, strict=True):
        scale = max(float(g.abs().max()) for g in theirs if g is not None)
        assert scale > 0
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                assert float((a - b).abs().max()) <= tol * scale
    for a, b in zip(plain.model.buffers(), rev.model.buffers(), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=tol, atol=tol)
    assert rev.stats is not None
    assert rev.stats.held_bytes == 0, rev.stats.kept


def compare(
    model: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    *,
    plain: Callable[[nn.Module], Tensor] | None = None,
    tol: float = 1e-9,
    evaluations: int = 2,
    **options: Any,
) -> Trained:
    """Train plain, by the loss ``plain`` if the library's own would not be, and reversible: the same, with two evaluations.

    These are of each network whenever plain autograd has one.
    """
    ignored = options.pop("ignored", "")
    rev = train(model, loss, reverse=True, ignored=ignored, **options)
    unsaved = train(model, plain or loss, reverse=False, ignored=ignored)
    assert_alike(unsaved, rev, tol)
    assert max(rev.calls) <= evaluations * max(1, *unsaved.calls), (rev.calls, unsaved.calls)
    assert rev.stats is not None
    assert rev.stats.second_evaluations == 0
    return rev


def real(*shape: int) -> Tensor:
    """Real data of a shape, float64: rows of scikit-learn's digits, dequantised and standardised, or cuts of its photographs."""
    return _real(*shape).clone()


@functools.cache
def _real(*shape: int) -> Tensor:
    from sklearn.datasets import load_digits, load_sample_images

    generator = torch.Generator().manual_seed(3)
    if len(shape) == 2:
        table = torch.from_numpy(load_digits().data)
        table = (table + torch.rand(table.shape, generator=generator, dtype=torch.float64))[: shape[0]]
        columns = table.var(0).argsort(descending=True)[: shape[1]]
        table = table[:, columns]
        return (table - table.mean(0)) / table.std(0)
    photographs = torch.stack([torch.tensor(image) for image in load_sample_images().images]).movedim(-1, 1) / 128 - 1
    count, channels, *sides = shape
    cuts = [
        photographs[i % 2, :, 20 * i : 20 * i + sides[0], 60 * j : 60 * j + sides[1]]
        for i in range(count)
        for j in range(-(-channels // 3))
    ]
    noise = torch.rand(shape, generator=generator, dtype=torch.float64) / 128
    return torch.stack(cuts).double().reshape(count, -1, *sides)[:, :channels] + noise
