"""``reversible(offload=True)``: what must be kept waits elsewhere, and comes back in time.

A mover for the CPU stands for the one of CUDA, whose own tests need a device.
"""

from __future__ import annotations

import copy
import statistics
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revhooks
from revhooks import nn as rnn
from revhooks.errors import ModifiedError
from revhooks.runtime.offload import parked as offload
from revhooks.runtime.offload.movers import Copy, Leaving, Mover
from tests.conftest import conv_branch, mlp
from tests.devices import DEVICE


class Elsewhere(Mover):
    """Copies at once, and notes what it is asked for. It knows no times, so that nothing is learned."""

    log: list[tuple[str, int]] = []

    def out(self, tensor: Tensor) -> Copy:
        self.log.append(("out", tensor.nbytes))
        return Copy(tensor.clone(memory_format=torch.preserve_format))

    def back(self, away: Copy, device: torch.device) -> Copy:
        host = away.tensor
        assert host.device == device
        self.log.append(("back", host.nbytes))
        return Copy(host.clone(memory_format=torch.preserve_format), wait=lambda: self.log.append(("wait", host.nbytes)))


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    monkeypatch.setitem(offload.MOVERS, DEVICE.type, Elsewhere)
    monkeypatch.setattr(offload, "LEAST", 0)
    Elsewhere.log.clear()
    yield Elsewhere.log
    Elsewhere.log.clear()


class Unmixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x.exp() @ x.transpose(-1, -2)).tanh() @ x


def nets() -> dict[str, tuple[nn.Module, Tensor, dict[str, Any]]]:
    dense = nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.Sigmoid()) for _ in range(5)])
    encoder = nn.Sequential(*[nn.TransformerEncoderLayer(32, 2, 64, dropout=0.1, batch_first=True) for _ in range(3)])
    chains = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), *[rnn.AdditiveCoupling(conv_branch(4), conv_branch(4)) for _ in range(4)],
        nn.MaxPool2d(2), nn.Conv2d(8, 8, 1), rnn.ReversibleSequential(*[conv_branch(4) for _ in range(6)]),
        nn.Flatten(), nn.Linear(200, 3),
    )  # fmt: skip
    return {
        "ordinary": (dense, torch.randn(64, 32), {}),
        "without ops": (copy.deepcopy(dense), torch.randn(64, 32), {"ops": False}),
        "a budget": (copy.deepcopy(dense), torch.randn(64, 32), {"budget": 24 << 10}),
        "products": (Unmixed(), torch.randn(4, 16, 32), {}),
        "replayed": (encoder, torch.randn(4, 16, 32), {"replay": nn.TransformerEncoderLayer}),
        "chains": (chains.double(), torch.randn(4, 3, 12, 12).double(), {}),
        "couplings after ordinary layers": (
            nn.Sequential(nn.Linear(8, 16), rnn.AdditiveCoupling(mlp(8), mlp(8)), nn.Linear(16, 4)).double(),
            torch.randn(32, 8).double(),
            {},
        ),
    }


@pytest.mark.parametrize("name", nets())
def test_gradients_are_those_without(name: str, elsewhere: list[tuple[str, int]], no_gc: None) -> None:
    model, x, options = nets()[name]
    results = []
    for away in (False, True):
        torch.manual_seed(3)
        net, given = copy.deepcopy(model), x.clone().requires_grad_()
        elsewhere.clear()
        with revhooks.reversible(offload=away, **options) as run:
            loss = net(given).square().sum()
            held = run.stats.held_bytes
            moved = run.stats.offloaded_bytes
            loss.backward()
        assert bool(elsewhere) == away
        assert run.stats.held_bytes == run.stats.offloaded_bytes == 0
        results.append((held, moved, [given.grad, *(p.grad for p in net.parameters())], [b.clone() for b in net.buffers()]))
    (held, none, grads, buffers), (less, moved, again, others) = results
    assert none == 0 < moved
    assert less < held
    for a, b in zip([*grads, *buffers], [*again, *others], strict=True):
        assert a is not None
        assert torch.equal(a, b) if x.dtype is torch.float32 else torch.allclose(a, b, rtol=1e-10)


@pytest.mark.cpu(reason="it has no other memory to move to")
def test_nothing_is_moved_on_a_cpu() -> None:
    net, x = nn.Sequential(nn.Linear(64, 64), nn.Sigmoid(), nn.Linear(64, 64)), torch.randn(2048, 64)
    with revhooks.reversible(offload=True) as run:
        loss = net(x).square().sum()
        assert run.stats.offloaded_bytes == 0 < run.stats.held_bytes
        loss.backward()


def test_the_latest_come_back_first_and_ahead(elsewhere: list[tuple[str, int]]) -> None:
    sizes = [16, 32, 48, 64, 80]
    x = [torch.randn(n, 64, requires_grad=True) for n in sizes]
    with revhooks.reversible(offload=True, ops=False):
        total: Any = 0.0
        for one in x:
            total = total + (one * 2).exp().sum()  # saves its result
        assert elsewhere == [("out", n * 256) for n in sizes]
        elsewhere.clear()
        total.backward()
    asked = [nbytes for kind, nbytes in elsewhere if kind == "wait"]
    assert asked == [n * 256 for n in reversed(sizes)]
    started = [nbytes for kind, nbytes in elsewhere if kind == "back"]
    assert started == asked  # each once
    first = elsewhere.index(("wait", 80 * 256))
    second = elsewhere.index(("wait", 64 * 256))
    assert [nbytes for kind, nbytes in elsewhere[first:second] if kind == "back"] == [64 * 256, 48 * 256]


def test_passes_and_lifetime(elsewhere: list[tuple[str, int]], no_gc: None) -> None:
    net, x = nn.Sequential(nn.Linear(16, 16), nn.Sigmoid(), nn.Linear(16, 16), nn.Tanh()), torch.randn(8, 16)
    expected = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    with revhooks.reversible(offload=True) as run:
        loss = net(x).square().sum()
        moved = run.stats.offloaded_bytes
        for retain in (True, True, False):
            grads = torch.autograd.grad(loss, list(net.parameters()), retain_graph=retain)
            assert all(map(torch.equal, grads, expected))
            assert run.stats.offloaded_bytes == (moved if retain else 0)
        loss = net(x).square().sum()
        assert run.stats.offloaded_bytes == moved
        del loss  # its backward never runs
        assert run.stats.offloaded_bytes == run.stats.held_bytes == 0
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(net(leaf).square().sum(), leaf, create_graph=True)
        grad.square().sum().backward()
    plain = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(net(plain).square().sum(), plain, create_graph=True)
    grad.square().sum().backward()
    assert torch.equal(leaf.grad, plain.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("replayed", [False, True])
def test_a_change_in_place_raises(replayed: bool, elsewhere: list[tuple[str, int]]) -> None:
    layer = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
    x = torch.randn(8, 16, requires_grad=True)
    with revhooks.reversible(offload=True, replay=nn.Sequential if replayed else ()):
        h = x * 2
        y = layer(h)
        h.add_(1)
        with pytest.raises(ModifiedError):
            y.sum().backward()


class Event:
    """A copy: done when somebody says so."""

    def __init__(self) -> None:
        self.done = False

    def query(self) -> bool:
        return self.done


class Stream:
    def __init__(self) -> None:
        self.waited: list[Event] = []

    def wait_event(self, event: Event) -> None:
        self.waited.append(event)


def test_no_more_lags_behind_than_is_said(no_gc: None) -> None:
    """The stream waits for the oldest, however far the host runs ahead; then the memory may go in the stream's order."""
    leaving, home = Leaving(), Stream()
    events = [Event() for _ in range(6)]
    gone: list[weakref.ref[Tensor]] = []
    for event in events:
        tensor = torch.zeros(25)  # 100 bytes
        gone.append(weakref.ref(tensor))
        leaving.add(tensor, home, event)
        del tensor
        assert leaving.keep(nbytes=300) in (None, *events)
        assert leaving.nbytes <= 300
    assert [tensor() is None for tensor in gone] == [True, True, True, False, False, False]
    assert home.waited == events[:3]
    events[3].done = events[5].done = True
    leaving.add(torch.zeros(25), home, Event())
    leaving.poll()
    assert [tensor() is None for tensor in gone] == [True, True, True, True, False, False]  # in order
    assert leaving.keep(count=2) is events[4]
    leaving.keep(count=0)
    assert all(tensor() is None for tensor in gone)
    assert leaving.nbytes == 0
    assert home.waited[:6] == events


def test_a_copy_that_nobody_asks_for_is_waited_for(elsewhere: list[tuple[str, int]]) -> None:
    """Before its memory goes: else the copy would write into what lies there next."""
    x = [torch.randn(n, 64, requires_grad=True) for n in (16, 32, 48)]
    with revhooks.reversible(offload=True, ops=False):
        losses = [one.exp().sum() for one in x]
        losses[2].backward()
        assert [kind for kind, _ in elsewhere].count("back") > [kind for kind, _ in elsewhere].count("wait") == 1
        del losses
    assert sorted(n for kind, n in elsewhere if kind == "back") == sorted(n for kind, n in elsewhere if kind == "wait")


def test_what_cannot_leave_counts_as_nothing(elsewhere: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """As where pinned memory is out; nothing complains when it is dropped (warnings are errors here)."""

    def full(self: Any, tensor: Tensor) -> Copy:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Elsewhere, "out", full)
    with revhooks.reversible(offload=True, ops=False) as run:
        with pytest.raises(torch.OutOfMemoryError):
            torch.ones(4, requires_grad=True).exp()
        assert run.stats.offloaded_bytes == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("budget", [None, "400MiB"])
def test_on_a_device(budget: str | None) -> None:
    """Pinned memory, streams of its own: bitwise the same gradients; next to no time, or the memory that a budget demands.

    What can leave is most of what there is: 24 activations of 32 MiB, beside parameters and gradients of 8 MiB a layer. The
    copies of all take longer than the layers.
    """
    net = nn.Sequential(*[nn.Sequential(nn.Linear(1024, 1024), nn.Sigmoid()) for _ in range(24)]).cuda()
    x = torch.randn(8192, 1024, device="cuda")
    grads, peaks, times = [], [], []
    for away in (False, True):
        took = []
        for _ in range(12):
            net.zero_grad(set_to_none=False)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            with revhooks.reversible(offload=away, budget=budget if away else None) as run:
                loss = net(x).square().mean()
                moved = run.stats.offloaded_bytes
                loss.backward()
            torch.cuda.synchronize()
            took.append(time.perf_counter() - start)
        peaks.append(torch.cuda.max_memory_allocated())
        times.append(statistics.median(took[6:]))
        grads.append([p.grad.clone() for p in net.parameters()])  # type: ignore[union-attr]
        assert (moved > 0) == away
    assert all(map(torch.equal, *grads))
    if budget is None:
        assert times[1] < 1.2 * times[0]  # of a shared device
        assert peaks[1] < peaks[0]
    else:
        # what plain holds besides, what the budget allows, and a tensor on its way each way and one that is just used
        besides = peaks[0] - 24 * x.nbytes
        assert peaks[1] <= besides + (400 << 20) + 3 * x.nbytes
        assert run.stats.peak_held_bytes <= 400 << 20
