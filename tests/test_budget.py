"""Blocks named for replay, and the dial between least memory and plain speed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revhooks
from revhooks import nn as rnn
from revhooks.errors import RegistrationError
from revhooks.runtime import packing
from revhooks.runtime.policy.budget import parse_bytes
from revhooks.runtime.recompute.recipe import recipe_of
from tests.conftest import Count, Counts, Notes, calls


class Layer(Counts, nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Tanh(), nn.Dropout(0.1))
        self.out, self.calls = nn.Linear(4 * width, width), 0

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.calls += 1
        return x + scale * self.out(self.net(x))


class Special(Layer):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x, scale=2 * scale)


def stack(depth: int, cls: type[Layer] = Layer) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[cls() for _ in range(depth)])


def gradients(net: nn.Module, x: Tensor, **options: Any) -> tuple[list[Tensor], Any, int]:
    net = copy.deepcopy(net)
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    with revhooks.reversible(**options) if options else torch.enable_grad() as run:
        y = net(x).square().mean()
        held = run.stats.held_bytes if options else 0
        y.backward()
    counted = sum(layer.calls for layer in net.modules() if isinstance(layer, (Layer, Count)))
    return [x.grad, *[p.grad for p in net.parameters()], torch.rand(1)], (run.stats if options else counted), held


X = torch.randn(64, 32)


@pytest.mark.parametrize(
    "spec", [Layer, (Layer, nn.Conv2d), lambda module: isinstance(module, Layer)], ids=["class", "tuple", "predicate"]
)
@pytest.mark.parametrize("cls", [Layer, Special])
def test_replay_by_name(spec: Any, cls: type[Layer]) -> None:
    net = stack(6, cls)
    plain, _, _ = gradients(net, X)
    for _ in range(2):
        got, stats, held = gradients(net, X, replay=spec)
        assert all(map(torch.equal, plain, got))
        assert stats.replays == 5  # the newest is still there
        assert held < 0.4 * stats.packed_bytes
        assert stats.held_bytes == 0


def test_replay_stops_early_and_newest_is_kept() -> None:
    """Two calls a layer, one for the newest; what `torch.utils.checkpoint` calls is one more."""
    counted = Notes()

    class Counting(Layer):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            counted.append(self)
            return super().forward(x, scale)

    net = stack(4, Counting)
    with revhooks.reversible(replay=Counting):
        net(X).sum().backward()
    assert len(counted) == 2 * 4 - 1


@pytest.mark.parametrize("kind", ["replayed", "couplings"])
def test_what_is_let_go_of_is_learned(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No recipes are looked for in what is soon let go of; that takes no block more to be rebuilt, in any step, at any budget."""
    torch.manual_seed(0)
    branches = [nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(24)]
    couplings = [rnn.AdditiveCoupling(f, g, dim=-1) for f, g in zip(branches[::2], branches[1::2], strict=True)]
    net = stack(12) if kind == "replayed" else nn.Sequential(*couplings)
    options: dict[str, Any] = {"replay": Layer} if kind == "replayed" else {}
    searches = []
    search = recipe_of
    monkeypatch.setattr(packing, "recipe_of", lambda *args: searches.append(1) or search(*args))
    with revhooks.reversible(ops=False) as run:
        net(X).sum().backward()
    packed = run.stats.packed_bytes

    def one(budget: float) -> tuple[list[Tensor], int, int]:
        searches.clear()
        with revhooks.reversible(budget=budget, **options) as run:
            torch.manual_seed(1)
            loss = net(X).square().sum()
            looked = len(searches)
            found = torch.autograd.grad(loss, list(net.parameters()))
            del loss
            assert run.stats.held_bytes == 0
        return list(found), run.stats.replays + run.stats.inversions, looked

    torch.manual_seed(1)
    plain = torch.autograd.grad(net(X).square().sum(), list(net.parameters()))
    settled = {}
    for share in (0, 0.2, 0.4, 0.6, 0.8, 0.2, 0):
        steps = [one(share * packed) for _ in range(5)]
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for step in steps for a, b in zip(plain, step[0], strict=True))
        rebuilt = [step[1] for step in steps]
        assert rebuilt[-1] == min(rebuilt), (share, rebuilt)
        if kind == "replayed" and not share:
            assert steps[-1][2] <= 10  # the newest block, and what is around
            assert share in settled or steps[0][2] > 30
        settled[share] = rebuilt[-1]
    for _ in range(3):  # budgets that take turns do not disturb each other
        assert {share: one(share * packed)[1] for share in settled} == settled


def test_named_layers_inside_and_around_blocks() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer(16)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chain = nn.Sequential(*[rnn.AdditiveCoupling(Branch(), Branch(), dim=-1) for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            return self.chain(x).tanh()

    torch.manual_seed(0)
    net = nn.Sequential(Around(), Layer(), Around(), Layer()).double()
    x = X.double()
    plain, _, _ = gradients(net, x)
    for spec in (Layer, Around, (Layer, Around)):
        got, stats, _ = gradients(net, x, replay=spec)
        assert all(torch.allclose(a, b, atol=1e-12, rtol=0) for a, b in zip(plain, got, strict=True))
        assert stats.held_bytes == 0


def chain(kind: str) -> nn.Module:
    torch.manual_seed(0)
    fns = [Count(nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16))) for _ in range(24)]
    if kind == "sequence":
        return rnn.ReversibleSequential(*fns, dim=-1).double()
    return nn.Sequential(*[rnn.AdditiveCoupling(f, g, dim=-1) for f, g in zip(fns[::2], fns[1::2], strict=True)]).double()


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "blocks": (lambda: chain("blocks"), {}),
    "sequence": (lambda: chain("sequence"), {}),
    "replay": (lambda: stack(8).double(), {"replay": Layer}),
    "ops": (lambda: stack(8).double(), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_dial(case: str) -> None:
    """More room, fewer rebuilds; held bytes stay under the budget, the peak under budget and a working set."""
    make, options = CASES[case]
    net, x = make(), X.double()
    plain, _, _ = gradients(net, x)
    _, least, floor = gradients(net, x, budget=0, **options)
    rebuilt, room = [], least.packed_bytes
    working = least.peak_held_bytes
    for share in (0, 0.2, 0.4, 0.6, 0.8, 1.2, math.inf):
        budget = share * room if share < math.inf else math.inf
        got, stats, held = gradients(net, x, budget=budget, **options)
        assert all(torch.allclose(a, b, atol=1e-11, rtol=0) for a, b in zip(plain, got, strict=True))
        assert held <= max(budget, floor) + working * (share > 0)
        assert stats.peak_held_bytes <= budget + working
        assert stats.held_bytes == 0
        rebuilt.append(stats.replays + stats.inversions)
    assert rebuilt == sorted(rebuilt, reverse=True)
    assert rebuilt[-1] == 0
    assert held == pytest.approx(room, rel=0.01)  # plain autograd's


def test_more_room_means_fewer_evaluations() -> None:
    counts = []
    for share in (0.0, 0.3, 0.6, 2.0):
        net = chain("sequence")
        with revhooks.reversible(budget=share * 1.2e6) as run:
            net(X.double()).sum().backward()
        counts.append(sum(calls(net)))
    assert counts[0] == 2 * 24 - 1
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == 4
    assert counts[-1] == 24
    assert run.stats.held_bytes == 0


@pytest.mark.parametrize("use", ["two forwards", "retained", "never"])
@pytest.mark.parametrize("case", CASES)
def test_uses_with_half_the_room(case: str, use: str, no_gc: None) -> None:
    make, options = CASES[case]
    results = []
    for reverse in (False, True):
        net, x = make(), X.double().requires_grad_()
        torch.manual_seed(0)
        with revhooks.reversible(budget="200KiB", **options) if reverse else torch.enable_grad() as run:
            first = net(x).square().mean()
            if use == "two forwards":
                second = net(x * 0.5).square().mean()
                first.backward()
                second.backward()
                del second
            elif use == "retained":
                first.backward(retain_graph=True)
                first.backward()
            del first
        results.append([p.grad for p in net.parameters()])
        assert not reverse or run.stats.held_bytes == 0
    for a, b in zip(*results, strict=True):
        assert a is b is None or torch.allclose(a, b, atol=1e-11, rtol=0)


def test_bytes() -> None:
    assert [parse_bytes(b) for b in (None, 5, "2GiB", "1.5 kb", "10", "3 MB")] == [0, 5, 2**31, 1500, 10, 3e6]
    assert 0 < parse_bytes("auto") < 1e15
    for bad in ("lots", "2 GiBs", "-1", -1, True, [], "1.2.3KiB"):
        with pytest.raises(RegistrationError, match="budget="):
            revhooks.reversible(budget=bad)
    with pytest.raises(RegistrationError, match="replay="):
        revhooks.reversible(replay=3)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.relu_())


def test_a_replayed_block_that_changes_the_output_of_a_coupling() -> None:
    """The coupling stays until it is known what the block does to its input; then it is kept."""
    branches = [nn.Linear(8, 8) for _ in range(4)]
    net = nn.Sequential(*[rnn.AdditiveCoupling(*branches[i : i + 2]) for i in (0, 2)], InPlace(), InPlace()).double()
    x = torch.randn(4, 16, dtype=torch.float64)
    net(x).square().sum().backward()
    expected = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    for _ in range(3):
        net.zero_grad()
        with revhooks.reversible(replay=InPlace) as run:
            net(x).square().sum().backward()
        assert all(torch.allclose(p.grad, e, rtol=1e-10) for p, e in zip(net.parameters(), expected, strict=True))  # type: ignore[arg-type]
        assert run.stats.held_bytes == 0
