"""Helpers that every suite shares: nets, one step plain and one reversible, and their comparison."""

from __future__ import annotations

import copy
import ctypes
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revhooks
from revhooks import storage
from revhooks.record import Stats
from revhooks.registry import entries_of
from revhooks.runtime import packing
from revhooks.runtime.policy import guard, plan
from revhooks.runtime.recompute import statistics
from tests.devices import (  # noqa: F401 - pytest looks for hooks and fixtures here
    _as_an_accelerator,
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
)


@pytest.fixture(autouse=True)
def _seeded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.manual_seed(0)
    monkeypatch.setattr(storage, "_LARGE", 0)  # streams of any size are inverted in their own memory
    monkeypatch.setattr(packing, "SMALL", 0)  # and saved tensors of any size recomputed
    monkeypatch.setattr(statistics, "WORTH", 0)  # and batch statistics of any batch used again
    yield
    plan._facts.clear()
    guard._flights.clear()  # what a step of this test would be told of is none of the next one's business


WORTH = statistics.WORTH


@pytest.fixture
def large_batches_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch statistics are used again where they are no trifle to compute, as users have it."""
    monkeypatch.setattr(statistics, "WORTH", WORTH)


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every device is one whose values take long to read."""
    monkeypatch.setattr(storage, "_NEAR", frozenset())


@pytest.fixture
def no_gc() -> Iterator[None]:
    """With the collector off nothing may depend on it."""
    gc.collect()
    gc.freeze()  # what is there by now, modules above all, takes the next collection a second to look at
    gc.disable()
    yield
    gc.enable()


class Counts:
    """Has a count ``calls`` of evaluations in memory of C's: a number in an attribute is put back after a replay."""

    @property
    def calls(self) -> int:
        return self.__dict__["_count"].value  # type: ignore[no-any-return]

    @calls.setter
    def calls(self, count: int) -> None:
        self.__dict__.setdefault("_count", ctypes.c_long()).value = count


class Count(Counts, nn.Module):
    """Counts the calls of what it wraps."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        return self.net(*args, **kwargs)


class Notes:
    """A list that no replay puts back: it lies in memory of C's."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Any] = SimpleQueue()

    def append(self, thing: Any) -> None:
        self._queue.put(thing)

    def __len__(self) -> int:
        return self._queue.qsize()

    def taken(self) -> list[Any]:
        """What was noted since the last time."""
        return [self._queue.get() for _ in range(len(self))]


def calls(model: nn.Module) -> list[int]:
    return [m.calls for m in model.modules() if isinstance(m, Count)]


def conv_branch(channels: int, out: int | None = None, norm: bool = True) -> nn.Module:
    layers: list[nn.Module] = [nn.BatchNorm2d(channels)] if norm else []
    layers += [nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)]
    layers += [nn.BatchNorm2d(channels)] if norm else []
    layers += [nn.ReLU(), nn.Conv2d(channels, out or channels, 3, padding=1)]
    return Count(nn.Sequential(*layers))


def mlp(width: int, out: int | None = None, gain: float = 1.0) -> nn.Module:
    net = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, out or width))
    with torch.no_grad():
        net[3].weight.mul_(gain)
    return Count(net)


@dataclass
class Outcome:
    loss: Tensor
    grads: list[Tensor | None]
    input_grads: list[Tensor | None]
    buffers: list[Tensor]
    calls: list[int]
    stats: Stats | None
    held_after_forward: int


def mean_square(output: Any) -> Tensor:
    outputs = output if isinstance(output, tuple) else (output,)
    return sum((o.square().mean() for o in outputs), torch.zeros(()))


def step(
    model: nn.Module,
    *inputs: Tensor,
    reverse: bool,
    loss: Callable[[Any], Tensor] = mean_square,
    guard: str = "fallback",
    **kwargs: Any,
) -> Outcome:
    """One step of a copy of the model from a fixed seed."""
    model = copy.deepcopy(model)
    leaves = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    torch.manual_seed(1)
    stats, held = None, 0
    if reverse:
        with revhooks.reversible(guard=guard) as run:
            value = loss(model(*leaves, **kwargs))
            held = run.stats.held_bytes
            value.backward()
        stats = run.stats
    else:
        value = loss(model(*leaves, **kwargs))
        value.backward()
    grads = [p.grad for p in model.parameters()]
    return Outcome(
        value.detach(), grads, [x.grad for x in leaves], [b.clone() for b in model.buffers()], calls(model), stats, held
    )


def assert_same(plain: Outcome, rev: Outcome, tol: float) -> None:
    """Same loss, same gradients (relative to the largest of each kind), same buffers."""
    assert (plain.loss - rev.loss).abs() <= tol * (1 + plain.loss.abs())
    for a_list, b_list in ((plain.grads, rev.grads), (plain.input_grads, rev.input_grads)):
        scale = max((a.abs().max() for a in a_list if a is not None), default=torch.zeros(()))
        for a, b in zip(a_list, b_list, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert b is not None
                assert (a - b).abs().max() <= tol * (scale + 1e-30)
    for a, b in zip(plain.buffers, rev.buffers, strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=tol, atol=tol)


def compare(model: nn.Module, *inputs: Tensor, tol: float = 1e-10, **kwargs: Any) -> Outcome:
    """A step plain and one reversible: same result, and nothing left behind."""
    plain = step(model, *inputs, reverse=False, **kwargs)
    rev = step(model, *inputs, reverse=True, **kwargs)
    assert_same(plain, rev, tol)
    assert rev.stats is not None
    assert rev.stats.held_bytes == 0, rev.stats.kept
    return rev


@pytest.fixture
def registered() -> Iterator[Callable[..., None]]:
    """Registers classes, for the time of a test."""
    classes: list[type] = []

    def register(cls: type, **options: Any) -> None:
        revhooks.register(cls, **options)
        classes.append(cls)

    yield register
    for cls in classes:
        if entries_of(cls):
            revhooks.unregister(cls)
