"""State that modules carry from call to call, in attributes and buffers: a replay and an inverse get it as it was.

`torch.utils.checkpoint` gives a wrong gradient there, without a word.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revhooks
from revhooks import nn as rnn
from revhooks.errors import ReplayError

STEPS, CALLS = 6, 3
X = torch.linspace(-1, 1, 32, dtype=torch.float64).reshape(4, 8)


class Stateful(nn.Module):
    """A layer, and what it carries."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.reset()

    def reset(self) -> None:
        self.state: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return self.call(torch.tanh(self.linear(x)))

    def call(self, h: Tensor) -> Tensor:
        raise NotImplementedError


class Spiking(Stateful):
    """A leaky integrator, through which gradients flow back in time."""

    def call(self, h: Tensor) -> Tensor:
        self.state = h if self.state is None else 0.9 * self.state * (1 - torch.sigmoid(self.state)) + h
        return torch.sigmoid(4 * self.state)


class Truncated(Stateful):
    """A state without a gradient."""

    def call(self, h: Tensor) -> Tensor:
        h = h if self.state is None else h * (1 + self.state)
        self.state = h.detach()
        return h


class InPlace(Stateful):
    """A state that is written to."""

    def reset(self) -> None:
        self.state = torch.zeros(4, self.linear.out_features, dtype=torch.float64)

    def call(self, h: Tensor) -> Tensor:
        self.state.mul_(0.5).add_(h.detach())
        return h * self.state.clone()


class Memory:
    def __init__(self) -> None:
        self.last: Tensor | None = None
        self.calls = {"all": 0}


class InObject(Stateful):
    """In an object of its own."""

    def reset(self) -> None:
        self.state = Memory()

    def call(self, h: Tensor) -> Tensor:
        memory = self.state
        memory.last = h if memory.last is None else h + 0.5 * memory.last
        memory.calls["all"] += 1
        return memory.last.sin() * memory.calls["all"]


class Lists(Stateful):
    """In a list and in an attribute that the first call makes; beside them a counter, which goes on counting."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.calls = 0

    def reset(self) -> None:
        self.state = []
        self.__dict__.pop("sum", None)

    def call(self, h: Tensor) -> Tensor:
        self.calls += 1
        self.sum = h if not self.state else self.sum + h
        self.state.append(h)
        return self.sum * self.state[-1] * self.state[len(self.state) // 2]


class InBuffer(Stateful):
    """In a buffer that carries gradients, as in snntorch."""

    def reset(self) -> None:
        self.register_buffer("state", torch.zeros(4, self.linear.out_features, dtype=torch.float64))

    def call(self, h: Tensor) -> Tensor:
        self.state = 0.9 * self.state.sin() + h
        return torch.sigmoid(4 * self.state)


class Watched(Stateful):
    """It leaves something there to be looked at, and does not read it."""

    def call(self, h: Tensor) -> Tensor:
        self.state = h
        return h * h


KINDS: list[type[Stateful]] = [Spiking, Truncated, InPlace, InBuffer, Watched]
DEEP: list[type[Stateful]] = [Lists, InObject]
NETS: dict[str, Callable[[type[Stateful]], nn.Module]] = {
    "layers": lambda kind: nn.Sequential(*[kind(8) for _ in range(3)]),
    "blocks": lambda kind: nn.Sequential(*[rnn.AdditiveCoupling(kind(4), kind(4)) for _ in range(3)]),
    "chain": lambda kind: rnn.ReversibleSequential(*[kind(4) for _ in range(4)]),
}


def _reset(net: nn.Module) -> list[Stateful]:
    stateful = [module for module in net.modules() if isinstance(module, Stateful)]
    for module in stateful:
        module.reset()
    return stateful


def _train(net: nn.Module, context: Callable[[], Any], steps: int = 3) -> tuple[list[Tensor], Any]:
    """Some steps through time: losses, gradients and states."""
    seen: list[Tensor] = []
    with context() as run:
        for _ in range(steps):
            stateful = _reset(net)
            net.zero_grad()
            loss = sum(net(X * (1 + t)).square().sum() for t in range(STEPS))
            loss.backward()  # type: ignore[union-attr]
            states = [module.state for module in stateful]
            seen += [loss.detach(), *[p.grad.clone() for p in net.parameters()]]  # type: ignore[union-attr]
            seen += [state.detach().clone() if isinstance(state, Tensor) else torch.tensor(0) for state in states]
            seen += [torch.tensor(state) for state in states if isinstance(state, int)]
            seen += [torch.tensor(state.calls["all"]) for state in states if isinstance(state, Memory)]
    return seen, run


def _same(kind: type[Stateful], net: str, tolerance: float, **options: Any) -> Any:
    torch.manual_seed(0)
    model = NETS[net](kind).double()
    expected, _ = _train(model, contextlib.nullcontext)
    got, run = _train(model, lambda: revhooks.reversible(**options))
    assert len(got) == len(expected)
    for a, b in zip(expected, got, strict=True):
        assert float((a - b).abs().max()) <= tolerance * float(a.abs().max()), (a, b)
    _reset(model)
    gc.collect()
    assert run.stats.held_bytes == 0, run.stats.kept
    return run


@pytest.mark.parametrize("options", [{}, {"ops": False}, {"budget": 4096}], ids=["ops", "", "budget"])
@pytest.mark.parametrize("kind", KINDS)
def test_replayed_layers(kind: type[Stateful], options: dict[str, Any]) -> None:
    run = _same(kind, "layers", 0.0, replay=kind, **options)
    assert run.stats.replays >= 3 * (3 * STEPS - 1) - 3 or "budget" in options


@pytest.mark.parametrize("kind", KINDS)
def test_a_replayed_model(kind: type[Stateful]) -> None:
    """All its layers are run again with what they carried into that call; the layers in it may be replayed too."""
    _same(kind, "layers", 0.0, replay=nn.Sequential)
    _same(kind, "layers", 0.0, replay=(nn.Sequential, kind))


@pytest.mark.parametrize("kind", DEEP)
def test_lists_and_objects(kind: type[Stateful]) -> None:
    """Many keep a record there; that it is a state a replay finds out, which does not repeat its call."""
    torch.manual_seed(0)
    model = NETS["layers"](kind).double()
    expected, _ = _train(model, contextlib.nullcontext)
    found = 0
    while True:
        try:
            got, _ = _train(model, lambda: revhooks.reversible(replay=kind))
            break
        except (ReplayError, AttributeError):
            found += 1
    assert 1 <= found <= 3  # layers
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_records_and_counters_go_on() -> None:
    """What counts evaluations, or notes what came in, sees those of backward."""

    class Recorder(Stateful):
        def reset(self) -> None:
            self.state, self.inputs = 0, []

        def call(self, h: Tensor) -> Tensor:
            self.state += 1
            self.inputs.append(h)
            return h * h

    model = NETS["layers"](Recorder).double()
    with revhooks.reversible(replay=Recorder):
        for _ in range(3):
            model(X).sum().backward()
    assert [(layer.state, len(layer.inputs)) for layer in model] == [(6, 6), (6, 6), (3, 3)]  # type: ignore[union-attr]


@pytest.mark.parametrize("net", ["blocks", "chain"])
@pytest.mark.parametrize("kind", KINDS)
def test_inverted_blocks(kind: type[Stateful], net: str) -> None:
    run = _same(kind, net, 1e-10, guard="raise")
    assert run.stats.inversions > STEPS


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_functions(kind: type[Stateful]) -> None:
    torch.manual_seed(0)
    model = NETS["layers"](kind).double()
    expected, _ = _train(model, contextlib.nullcontext)

    class Through(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return revhooks.checkpoint(lambda h: self.model(h), x)

    got, _ = _train(Through(), contextlib.nullcontext)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


class Late(InPlace):
    """A state in training only."""

    def call(self, h: Tensor) -> Tensor:
        return super().call(h) if self.training else h


class Later(InPlace):
    """A state that it comes to have when it has been called for long."""

    on = False

    def call(self, h: Tensor) -> Tensor:
        return super().call(h) if Later.on else h


@pytest.mark.parametrize("kind", [Late, Later])
def test_what_comes_late(kind: type[Stateful], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each mode has first calls of its own; what a replay finds out by not repeating its call, the next step knows."""
    model = NETS["layers"](kind).double().train(kind is Later)
    for _ in range(6):
        _train(model, lambda: revhooks.reversible(replay=kind), 1)
    model.train()
    monkeypatch.setattr(Later, "on", True)
    if kind is Later:
        with pytest.raises(ReplayError):
            _train(model, lambda: revhooks.reversible(replay=kind), 1)
    for _ in range(3):
        expected, _ = _train(model, contextlib.nullcontext, 1)
        try:
            got, _ = _train(model, lambda: revhooks.reversible(replay=kind), 1)
        except ReplayError:
            assert kind is Later  # of another layer
            continue
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_what_is_held_is_said() -> None:
    model = NETS["layers"](Spiking).double()
    with revhooks.reversible(replay=Spiking) as run:
        loss = sum(model(X).sum() for _ in range(3))
        assert sum(kept.bytes for kept in run.stats.kept) == run.stats.held_bytes
        assert any("carries from call to call" in kept.why for kept in run.stats.kept)
        loss.backward()  # type: ignore[union-attr]


def test_what_is_only_looked_at_is_not_held() -> None:
    """A map of attention from the step before lives no longer than it would."""
    model = NETS["layers"](Watched).double()
    with revhooks.reversible(replay=Watched) as run:
        for step in range(5):
            loss = sum(model(X).sum() for _ in range(3))
            states = [kept.bytes for kept in run.stats.kept if "carries" in kept.why]
            assert step < 4 or not states
            loss.backward()  # type: ignore[union-attr]


@pytest.mark.parametrize("passes", ["retained", "double", "raises"])
def test_passes(passes: str) -> None:
    """Attributes are what they were after any backward pass."""
    results = []
    for context in (contextlib.nullcontext, lambda: revhooks.reversible(replay=Spiking)):
        torch.manual_seed(0)
        model = NETS["layers"](Spiking).double()
        x = X.clone().requires_grad_()
        with context():
            loss = sum(model(x * (1 + t)).square().sum() for t in range(STEPS))
            before = [module.state for module in model.modules() if isinstance(module, Stateful)]
            if passes == "retained":
                loss.backward(retain_graph=True)  # type: ignore[union-attr]
                loss.backward()  # type: ignore[union-attr]
            elif passes == "double":
                (grad,) = torch.autograd.grad(loss, x, create_graph=True)  # type: ignore[arg-type]
                grad.square().sum().backward()
            else:
                hook = next(model.parameters()).register_hook(_interrupt)
                with pytest.raises(KeyError):
                    loss.backward()  # type: ignore[union-attr]
                hook.remove()
        after = [module.state for module in model.modules() if isinstance(module, Stateful)]
        assert all(a is b for a, b in zip(before, after, strict=True))
        results.append([x.grad, *[p.grad for p in model.parameters()]])
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        assert a is None or passes == "raises" or torch.allclose(a, b, rtol=1e-12)


def _interrupt(_: Tensor) -> None:
    raise KeyError
