"""Autograd works in other threads: in one for each accelerator, or in the user's own. Torch carries hooks there, nothing else.

On a CPU the calling thread works. So a thread that is given the hooks, as torch does, stands for a device's; and a backward deep
inside others, which torch gives to a thread of its own, is a real one.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import revhooks
from revhooks import nn as rnn
from revhooks.registry import ACTIVE
from revhooks.runtime.handles import local
from revhooks.runtime.handles.local import packer, pop_hooks, push_hooks, top_hooks
from tests.conftest import Notes, mlp


def in_thread(work: Callable[[], Any]) -> Any:
    """What ``work`` returns when another thread does it; what it raises."""
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "it waits for ever"
    if errors:
        raise errors.pop()
    return results.pop()


def carried(work: Callable[[], Any]) -> Any:
    """The same, with the hooks of this thread, as in a device's thread."""
    hooks = top_hooks(False)

    def run() -> Any:
        if hooks is None:
            return work()
        push_hooks(*hooks)
        try:
            return work()
        finally:
            pop_hooks()

    return in_thread(run)


class Gradient(nn.Module):
    """The gradient of a potential, taken in another thread."""

    def __init__(self, width: int, inner: Callable[[Callable[..., Any], Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.potential = nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, 2 * width), nn.Softplus())
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            at = x if x.requires_grad else x.detach().requires_grad_()
            energy = self.potential(at) if self.inner is None else self.inner(self.potential, at)
            (grad,) = carried(lambda: torch.autograd.grad(energy.sum(), at, create_graph=True))
        return grad.tanh()


class Shift(nn.Module):
    """A third party's coupling: the runtime knows its inverse only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = Gradient(width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([a, b + self.net(a)], -1)

    def inverse(self, y: Tensor) -> Tensor:
        a, b = y.chunk(2, -1)
        return torch.cat([a, b - self.net(a)], -1)


@pytest.fixture
def registered() -> Iterator[None]:
    revhooks.register(Shift, inverse="inverse")
    yield
    revhooks.unregister(Shift)


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return revhooks.checkpoint(self.inner, x)


def _wide() -> nn.Module:
    return nn.Sequential(Gradient(4), nn.Linear(4, 8))


def blocks() -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    chain = [rnn.AdditiveCoupling(Gradient(4), mlp(4), dim=-1) for _ in range(3)]
    return {
        "replayed": (nn.Sequential(nn.Linear(8, 8), Gradient(8), nn.Linear(8, 8), Gradient(8)), {"replay": Gradient}),
        "replayed without ops": (nn.Sequential(nn.Linear(8, 8), Gradient(8), Gradient(8)), {"replay": Gradient, "ops": False}),
        "couplings": (nn.Sequential(*chain), {}),
        "a chain in one block": (rnn.ReversibleSequential(*[Gradient(4) for _ in range(6)], dim=-1), {}),
        "affine": (nn.Sequential(*[rnn.AffineCoupling(_wide(), mlp(4, 8), dim=-1) for _ in range(2)]), {}),
        "third party": (nn.Sequential(*[Shift(4) for _ in range(3)]), {}),
        "checkpoint": (nn.Sequential(*[Checkpointed(Gradient(8)) for _ in range(2)]), {}),
        "checkpoint in a replay": (nn.Sequential(Checkpointed(Gradient(8)), Gradient(8)), {"replay": nn.Sequential}),
        "ordinary": (nn.Sequential(nn.Linear(8, 8), Gradient(8)), {}),
        "within a budget": (
            nn.Sequential(nn.Linear(8, 8), *[Gradient(8) for _ in range(3)]),
            {"replay": Gradient, "budget": 4096},
        ),
    }


def one_step(model: nn.Module, x: Tensor, reverse: bool, backward: Callable[[Callable[[], Any]], Any], **options: Any) -> Any:
    model, x = copy.deepcopy(model), x.clone().requires_grad_()
    if not reverse:
        backward(model(x).square().sum().backward)
        return [x.grad, *(p.grad for p in model.parameters())], None
    with revhooks.reversible(**options) as run:
        loss = model(x).square().sum()
        backward(loss.backward)
    del loss
    assert run.stats.held_bytes == 0, run.stats.kept
    return [x.grad, *(p.grad for p in model.parameters())], run.stats


def same(a: list[Any], b: list[Any], tol: float = 1e-9) -> bool:
    return all(
        (x is None) == (y is None) and (x is None or torch.allclose(x, y, rtol=tol, atol=tol)) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.cpu(reason="plays the thread of a device, which waits for the real one")
@pytest.mark.parametrize("multithreading", [True, False])
@pytest.mark.parametrize("backward", [lambda call: call(), in_thread, carried], ids=["here", "elsewhere", "carried"])
@pytest.mark.parametrize("name", blocks())
def test_a_gradient_taken_inside_in_a_devices_thread(
    name: str, backward: Any, multithreading: bool, registered: None, no_gc: None
) -> None:
    model, options = blocks()[name]
    model, x = model.double(), torch.randn(3, 8, dtype=torch.float64)
    with torch.autograd.set_multithreading_enabled(multithreading):
        want, _ = one_step(model, x, False, backward)
        got, stats = one_step(model, x, True, backward, **options)
    assert same(want, got)
    if name != "ordinary":
        assert stats.inversions + stats.replays > 0
    assert packer() is None


def test_nothing_of_a_call_is_kept_in_the_thread() -> None:
    """No `threading.local` but the one that tells whether ``reversible()`` is active where modules are called."""
    assert not [name for name, value in vars(local).items() if isinstance(value, threading.local)]
    seen = Notes()

    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((packer(), carried(packer), in_thread(packer)))
            return x.exp()

    with revhooks.reversible(replay=Asks):
        nn.Sequential(Asks(), Asks())(torch.ones(2, requires_grad=True)).sum().backward()
    (forward, there, nowhere), _, (replay, again, _) = seen.taken()
    assert forward is there is not None
    assert replay is again is not forward
    assert nowhere is None
    assert replay.replaying
    assert not forward.replaying  # type: ignore[union-attr]


@pytest.mark.cpu(reason="plays the thread of a device, which waits for the real one")
def test_two_threads_at_once_in_one_call_are_kept_in_order() -> None:
    """As on two devices: in what order they save is chance, so what was saved stays."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            barrier = threading.Barrier(2)
            grads: dict[int, Tensor] = {}
            hooks = top_hooks(False)
            energies = [self.a(x).exp().sum(), self.b(x).exp().sum()]

            def work(place: int) -> None:
                push_hooks(*hooks)  # type: ignore[misc]
                barrier.wait()
                (grads[place],) = torch.autograd.grad(energies[place], x, create_graph=True)
                pop_hooks()

            threads = [threading.Thread(target=work, args=(place,)) for place in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return grads[0] + grads[1].sin()

    two = Two().double()

    def step() -> list[Tensor]:
        x = torch.linspace(-1, 1, 8, dtype=torch.float64).view(2, 4).requires_grad_()
        return [*torch.autograd.grad(two(x).square().sum(), [x, *two.parameters()])]

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        want = step()
    with revhooks.reversible(replay=Two) as run:
        for _ in range(10):
            assert same(step(), want)
        x = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
        y = two(x)
        two(x)  # the next one opens
        assert local.THREADS in {kept.why for kept in run.stats.kept}
    del y


@pytest.mark.cpu(reason="plays the thread of a device, which waits for the real one")
@pytest.mark.parametrize("inner", ["ours", "torch's", "save_on_cpu"])
def test_a_nested_checkpoint_whose_replay_is_asked_for_in_another_thread(inner: str) -> None:
    """The thread of an outer replay waits for it and has the lock."""

    def within(function: Callable[..., Any], x: Tensor) -> Tensor:
        if inner == "ours":
            return revhooks.checkpoint(function, x)
        if inner == "torch's":
            return torch_checkpoint(function, x, use_reentrant=False)
        with save_on_cpu():
            return revhooks.checkpoint(function, x)

    model = nn.Sequential(nn.Linear(8, 8), Gradient(8, within), Gradient(8, within), nn.Linear(8, 8)).double()
    x = torch.randn(3, 8, dtype=torch.float64)
    want, _ = one_step(model, x, False, in_thread)
    got, stats = one_step(model, x, True, in_thread, replay=Gradient)
    assert same(want, got)
    assert stats.replays


def test_threads_that_each_enter_and_threads_that_do_not() -> None:
    """As `torch.nn.parallel.DataParallel` calls its replicas: parameters are shared, what a call leaves is not."""
    model = nn.Sequential(*[rnn.AdditiveCoupling(mlp(4), mlp(4), dim=-1) for _ in range(3)], nn.Linear(8, 8)).double()
    xs = [torch.randn(3, 8, dtype=torch.float64) for _ in range(6)]
    parameters = list(model.parameters())
    want = [torch.autograd.grad(model(x).square().sum(), parameters) for x in xs]
    barrier = threading.Barrier(len(xs))
    got: dict[int, Any] = {}
    seen: dict[int, Any] = {}
    shared = revhooks.reversible()

    def work(place: int) -> None:
        barrier.wait()
        for _ in range(5):
            if place % 2:
                seen[place] = ACTIVE.run, packer()
                got[place] = torch.autograd.grad(model(xs[place]).square().sum(), parameters)
                continue
            with shared as run:
                assert ACTIVE.run is run is packer()
                loss = model(xs[place]).square().sum()
                got[place] = torch.autograd.grad(loss, parameters)
                seen[place] = run.stats
            assert ACTIVE.run is packer() is None

    with revhooks.reversible():
        threads = [threading.Thread(target=work, args=(place,)) for place in range(len(xs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for place in range(len(xs)):
        assert same(list(got[place]), list(want[place]))
        assert seen[place] == (None, None) if place % 2 else seen[place].frames == 3
    assert len({id(seen[place]) for place in (0, 2, 4)}) == 3


def test_one_context_entered_in_two_threads_at_once() -> None:
    shared, entered, left = revhooks.reversible(), threading.Event(), threading.Event()

    def other() -> None:
        with shared:
            entered.set()
            assert left.wait(10)

    thread = threading.Thread(target=other)
    with revhooks.reversible() as outer:
        with shared:
            thread.start()
            assert entered.wait(10)
        assert ACTIVE.run is outer is packer()
        left.set()
        thread.join()
    assert ACTIVE.run is packer() is None


def test_a_data_parallel_model_whose_losses_are_one() -> None:
    """Forwards in threads of their own, one backward."""
    model = nn.Sequential(*[rnn.AdditiveCoupling(mlp(4), mlp(4), dim=-1) for _ in range(3)]).double()
    xs = [torch.randn(3, 8, dtype=torch.float64) for _ in range(3)]
    parameters = list(model.parameters())
    want = torch.autograd.grad(sum(model(x).square().sum() for x in xs), parameters)  # type: ignore[arg-type]

    @revhooks.reversible()
    def forward(x: Tensor) -> Tensor:
        return model(x).square().sum()

    losses: dict[int, Tensor] = {}

    def work(place: int) -> None:
        losses[place] = forward(xs[place])

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total: Any = sum(losses.values())
    assert same(list(torch.autograd.grad(total, parameters)), list(want))


def test_an_error_in_forward_or_in_a_replay_leaves_no_hook() -> None:
    fail = [False]

    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.exp()
            if fail[0]:
                raise KeyboardInterrupt
            return y.sin()

    x = torch.ones(3, requires_grad=True)
    with revhooks.reversible(replay=Fails) as run:
        loss = Fails()(Fails()(x)).sum()
        fail[0] = True
        with pytest.raises(KeyboardInterrupt):
            loss.backward()
        assert packer() is run
        with pytest.raises(KeyboardInterrupt):
            Fails()(x)
        assert packer() is run
        coupling = rnn.AdditiveCoupling(Fails(), Fails(), dim=-1)
        with pytest.raises(KeyboardInterrupt):
            coupling(torch.ones(3, 4, requires_grad=True))
        assert packer() is run
    assert packer() is None
    assert top_hooks(False) is None


def test_hooks_of_others_inside_of_ours_get_what_is_saved() -> None:
    """And what a checkpoint keeps there lies in the frame around, so that it goes with it."""
    mine: list[Tensor] = []

    class Others(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: mine.append(t.detach()) or t.detach(), lambda t: t):  # type: ignore[func-returns-value]
                return revhooks.checkpoint(lambda h: h.sin().exp(), x * 2).cos()

    x = torch.linspace(0, 1, 4, requires_grad=True)
    (want,) = torch.autograd.grad((x * 2).sin().exp().cos().sum(), x)
    with revhooks.reversible(replay=Others):
        loss = Others()(x).sum()
        assert len(mine) == 1  # the cosine's
        (got,) = torch.autograd.grad(loss, x)
    assert torch.allclose(got, want)
    assert top_hooks(False) is None


REAL = """
import os, queue, threading, torch
from torch import nn
import revhooks
from revhooks import nn as rnn

main, threads = threading.get_ident(), queue.SimpleQueue()  # which no replay puts back

class Noted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        threads.put(threading.get_ident())
        return g.clone()

class Gradient(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Softplus())

    def forward(self, x):
        with torch.enable_grad():
            at = x if x.requires_grad else x.detach().requires_grad_()
            return torch.autograd.grad(Noted.apply(self.net(at)).sum(), at, create_graph=True)[0].tanh() + torch.ones(4)

class Deep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, depth, work):
        ctx.depth, ctx.work = depth, work
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        with torch.enable_grad():
            if ctx.depth:
                Deep.apply(torch.ones(1, requires_grad=True), ctx.depth - 1, ctx.work).sum().backward()
            else:
                ctx.work()
        return g, None, None

def deep(work):  # a backward inside of 60 others is given to another thread
    Deep.apply(torch.ones(1, requires_grad=True), 59, work).sum().backward()

def step(reverse, split, x):
    model.zero_grad()
    context = revhooks.reversible(replay=Gradient) if reverse else torch.enable_grad()
    with context:
        if split:
            loss = model(x).square().sum()
            deep(loss.backward)
        else:
            deep(lambda: model(x).square().sum().backward())
    return [p.grad.clone() for p in model.parameters()]

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 4), Gradient(), nn.Linear(4, 8), rnn.AdditiveCoupling(Gradient(), Gradient(), dim=-1)).double()
x = torch.randn(3, 4, dtype=torch.float64)
torch.set_default_dtype(torch.float64)
for split in (False, True):
    for enabled in (True, False):
        with torch.autograd.set_multithreading_enabled(enabled):
            want, got = step(False, split, x), step(True, split, x)
        for a, b in zip(want, got, strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)
assert {threads.get() for _ in range(threads.qsize())} - {main}, "no other thread has worked"
print("fine", flush=True)
os._exit(0)  # torch does not wait for such threads
"""


def test_in_threads_that_torch_starts() -> None:
    result = subprocess.run([sys.executable, "-c", REAL], capture_output=True, text=True, timeout=120, check=False)
    assert result.stdout == "fine\n", result.stderr
