"""State that modules carry from call to call, in attributes and buffers: a replay and an inverse get it as it was.

`torch.utils.checkpoint` gives a wrong gradient there, without a word.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
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


class InPlaceWithGradient(InPlace):
    """Through which gradients flow."""

    def call(self, h: Tensor) -> Tensor:
        self.state.mul_(0.5).add_(h)
        return h * self.state.clone()


class Replaced(Stateful):
    """A tuple in a dictionary, as spikingjelly's memories."""

    def reset(self) -> None:
        self.state: Any = {"v": (0.0,)}

    def call(self, h: Tensor) -> Tensor:
        self.state["v"] = (0.5 * self.state["v"][0] + h,)
        return h * self.state["v"][0]


class Pair(Stateful):
    """A tuple of two, as that of an LSTM."""

    def call(self, h: Tensor) -> Tensor:
        a, b = (h, h) if self.state is None else self.state
        self.state = (a * 0.5 + h, torch.tanh(a + b))
        return h * self.state[0] + self.state[1]


class Alias(Stateful):
    """Two names for one tensor."""

    def reset(self) -> None:
        self.state = self.other = torch.zeros(4, self.linear.out_features, dtype=torch.float64)

    def call(self, h: Tensor) -> Tensor:
        self.other.add_(h.detach())
        return h * self.state.clone()


class Lists(Stateful):
    """In a list and in an attribute that the first call makes; beside them a counter."""

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


KINDS: list[type[Stateful]] = [
    Spiking,
    Truncated,
    InPlace,
    InPlaceWithGradient,
    Replaced,
    Pair,
    InObject,
    InBuffer,
    Alias,
    Watched,
]
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


class Numbers(Stateful):
    """A number on which all depends."""

    def reset(self) -> None:
        self.state = 0

    def call(self, h: Tensor) -> Tensor:
        self.state += 1
        return torch.tanh(h * self.state)


class Rare(Stateful):
    """A state that seldom changes."""

    def reset(self) -> None:
        self.state, self.calls = torch.zeros(()), 0

    def call(self, h: Tensor) -> Tensor:
        h = h * (1 + self.state)
        if float(h.detach().abs().max()) > 0.9:
            self.state = h.detach()
        return h


class View(Stateful):
    """A view of another attribute, which is written to: it cannot be put back."""

    def reset(self) -> None:
        self.state = torch.zeros(4, self.linear.out_features, dtype=torch.float64)
        self.half = self.state[:, :2]

    def call(self, h: Tensor) -> Tensor:
        self.half.add_(h.detach()[:, :2])
        return h * self.state.clone()


class Tailed(nn.Module):
    """What is saved last does not depend on the state: only a look at all that is saved finds it out."""

    def __init__(self, kind: type[Stateful]) -> None:
        super().__init__()
        self.stateful, self.last = kind(8), nn.Linear(8, 8)
        self.product = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self.stateful(x)) + torch.tanh(self.last(x))


class Flagged(Stateful):
    """A flag that says whether there is a state: without it a replay raises."""

    def reset(self) -> None:
        self.state, self.has_state = None, False

    def call(self, h: Tensor) -> Tensor:
        if not self.has_state:
            self.state, self.has_state = torch.zeros_like(h), True
        self.state = self.state * 0.5 + h
        return h * self.state


BY_TURNS = pytest.mark.near(reason="every block is compared in every step there, elsewhere by turns")


@pytest.mark.parametrize("tailed", [False, True])
@pytest.mark.parametrize("kind", [Lists, Numbers, Rare, pytest.param(View, marks=BY_TURNS), Flagged])
def test_a_replay_that_fails_is_learned_from(kind: type[Stateful], tailed: bool) -> None:
    """A record or a number may be a state: then what is saved differs, and the next step puts it back, or keeps the block."""
    torch.manual_seed(0)
    named = Tailed if tailed else kind
    model = (nn.Sequential(*[Tailed(kind) for _ in range(3)]) if tailed else NETS["layers"](kind)).double()
    expected, _ = _train(model, contextlib.nullcontext, 1)
    found, right = 0, 0
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        while right < 3:
            try:
                got, _ = _train(model, lambda: revhooks.reversible(replay=named), 1)
                right += 1
            except (ReplayError, AttributeError, TypeError) as problem:
                notes += getattr(problem, "__notes__", [])
                found, right = found + 1, 0
                continue
            assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    layers = 3
    assert kind is not Flagged or (len(notes) == found and all("from the replay of" in note for note in notes))
    # what a call leaves of numbers and records is known from its first call on; what comes now and then, and views, are not
    least, most = {View: (1, 2 * layers), Rare: (1, layers)}.get(kind, (0, 0))
    assert least <= found <= most
    assert len(warned) == (layers if kind is View else 0)
    if kind is View:
        with pytest.raises(ReplayError):
            _train(model, lambda: revhooks.reversible(replay=named, guard="raise"), 1)


class Masked(Stateful):
    def call(self, h: Tensor) -> Tensor:
        return h * self.state


class Masks(nn.Module):
    """Sets a mask before it calls the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Masked(8)

    def forward(self, x: Tensor) -> Tensor:
        self.layer.state = x.sin()
        return self.layer(x)


@pytest.mark.near(reason="every block is compared in every step there, elsewhere by turns")
def test_what_others_put_there() -> None:
    model = Masks().double()
    expected, _ = _train(model, contextlib.nullcontext, 1)
    with pytest.raises(ReplayError):
        _train(model, lambda: revhooks.reversible(replay=Masked), 1)
    got, _ = _train(model, lambda: revhooks.reversible(replay=Masked), 1)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_calls_made_before_the_first_was_found_to_fail_fail_too() -> None:
    """And the block is learned from all the same: none of them was made with what the first has shown."""
    model = Masks().double()
    expected, _ = _train(model, contextlib.nullcontext, 1)
    with revhooks.reversible(replay=Masked):
        outputs = [model(X * scale).sum() for scale in (1, 2, 3)]
    for output in outputs[:-1]:  # the last call has kept what it saved
        with pytest.raises(ReplayError):
            output.backward()
    got, _ = _train(model, lambda: revhooks.reversible(replay=Masked), 1)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_records_and_counters_are_those_of_forward() -> None:
    """What counts calls, or notes what came in, is after backward what plain autograd leaves."""

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
    assert [(layer.state, len(layer.inputs)) for layer in model] == [(3, 3)] * 3  # type: ignore[union-attr]


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


@pytest.mark.parametrize("kind", [Spiking, Pair, Replaced, InObject])
def test_what_is_held_is_said(kind: type[Stateful]) -> None:
    model = NETS["layers"](kind).double()
    with revhooks.reversible(replay=kind) as run:
        loss = sum(model(X).sum() for _ in range(3))
        assert sum(kept.bytes for kept in run.stats.kept) == run.stats.held_bytes
        assert any("carries from call to call" in kept.why for kept in run.stats.kept)
        loss.backward()  # type: ignore[union-attr]


@pytest.mark.parametrize("named", [Watched, nn.Sequential])
def test_what_is_only_looked_at_is_not_held(named: type[nn.Module]) -> None:
    """A map of attention from the step before lives no longer than it would; nor does a constant beside it count."""
    model = NETS["layers"](Watched).double()
    for module in model:  # type: ignore[union-attr]
        module.table = torch.zeros(1000)
    with revhooks.reversible(replay=named) as run:
        for _ in range(5):
            loss = model(X).sum()
            assert not [kept for kept in run.stats.kept if "carries" in kept.why]
            loss.backward()


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


def test_a_checkpoint_that_cannot_be_repeated_raises_each_time() -> None:
    """It was asked for; a block that a class names is kept instead, in the end."""
    calls: list[int] = []

    def other(x: Tensor) -> Tensor:
        calls.append(1)
        return (x * len(calls)).exp().sin()

    for _ in range(4):
        y = revhooks.checkpoint(other, X.clone().requires_grad_())
        with pytest.raises(ReplayError):
            y.sum().backward()


class Counting(nn.Module):
    """A counter, or the length of a record, decides what a call does."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.how, self.count, self.record = nn.Linear(16, 16), how, 0, []

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.record.append(float(x.detach().sum()))
        number = len(self.record) if self.how == "record" else self.count
        y = torch.tanh(self.linear(x))
        y = y.flip(0) if self.how == "flip" and number % 3 == 0 else y * (1 + 0.1 * (number % 3))
        return x + torch.sin(y)


@pytest.mark.parametrize("how", ["number", "record", "flip"])
@pytest.mark.parametrize("inside", [False, True])
def test_what_a_counter_decides_is_repeated(how: str, inside: bool) -> None:
    """From the first step on; and the counter says how often the user has called it."""

    def run(context: Callable[[], Any], *, checkpoint: bool) -> list[Any]:
        torch.manual_seed(0)
        net, x, seen = nn.Sequential(*[Counting(how) for _ in range(3)]), torch.randn(300, 16), []
        for _ in range(6):
            net.zero_grad()
            with context():
                h = x
                for block in net:
                    h = revhooks.checkpoint(block, h) if checkpoint else block(h)
                h.square().mean().backward()
            seen += [net[0].linear.weight.grad.clone(), torch.tensor([net[0].count, len(net[0].record)])]
        return seen

    wanted = run(contextlib.nullcontext, checkpoint=False)
    got = run(lambda: revhooks.reversible(replay=() if inside else Counting), checkpoint=inside)
    assert all(map(torch.equal, got, wanted))


CALLS = [0]


@pytest.mark.parametrize("ops", [False, True])
def test_a_number_that_only_a_product_shows(ops: bool) -> None:
    """What the product gives is recomputed itself, and nothing else that is saved differs: it is compared all the same."""

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            CALLS[0] += 1
            return x + torch.sin(torch.tanh(self.linear(x)) * (1 + 0.1 * (CALLS[0] % 3)))

    for budget in (0, 1e5):
        net = nn.Sequential(*[Hidden() for _ in range(3)])
        with revhooks.reversible(replay=Hidden, ops=ops, budget=budget), pytest.raises(ReplayError, match="expected what its"):
            net(torch.randn(300, 64)).square().mean().backward()
