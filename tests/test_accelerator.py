"""What is done on an accelerator, done on a CPU that is taken for one: comparisons are read once, when backward has ended."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import revhooks
from revhooks import nn as rnn
from revhooks import ops, storage
from revhooks.errors import FallbackWarning, GridError, InversionError, ReplayError
from revhooks.runtime.policy import guard

WAITS = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero")


class Block(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def branch(width: int = 16) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class Third(nn.Module):
    """With an inverse of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.slip = branch(), 0.0

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([b, a + self.f(b)], -1)

    def inverse(self, y: Tensor) -> Tensor:
        b, a = y.chunk(2, -1)
        return torch.cat([a - self.f(b) + self.slip, b], -1)


@pytest.fixture
def third() -> Any:
    revhooks.register(Third, inverse="inverse")
    yield Third
    revhooks.unregister(Third)


NETS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "couplings": (lambda: nn.Sequential(*(rnn.AdditiveCoupling(branch(), branch(), dim=-1) for _ in range(4))), {}),
    "affine": (lambda: nn.Sequential(*_affine()), {}),
    "sequential": (lambda: rnn.ReversibleSequential(*(branch() for _ in range(8)), dim=-1), {}),
    "registered": (lambda: nn.Sequential(*(Third() for _ in range(4))), {}),
    "ordinary": (lambda: nn.Sequential(*(Block() for _ in range(4))), {}),
    "replayed": (lambda: nn.Sequential(*(Block() for _ in range(4))), {"replay": Block}),
    "on a grid": (lambda: rnn.ReversibleSequential(*(branch() for _ in range(8)), dim=-1, grid_bits=16), {}),
}


def _affine() -> list[nn.Module]:
    def two() -> nn.Module:
        return nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32))

    return [rnn.AffineCoupling(two(), two(), dim=-1) for _ in range(4)]


def step(net: nn.Module, x: Tensor, **options: Any) -> tuple[list[Tensor], Any]:
    with revhooks.reversible(**options) as run:
        grads = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    return list(grads), run.stats


@pytest.mark.parametrize("kind", NETS)
def test_gradients_memory_and_nothing_left(kind: str, third: type, monkeypatch: pytest.MonkeyPatch, no_gc: None) -> None:
    """As near, with the same peak: what waits for the end of backward keeps nothing alive."""
    make, options = NETS[kind]
    net, x = make().double(), torch.randn(64, 32, dtype=torch.float64)
    if kind == "on a grid":
        x = revhooks.functional.round_to_grid(x, 16)
    expected = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    for _ in range(2):
        near, near_stats = step(net, x, **options)
    monkeypatch.setattr(storage, "_NEAR", frozenset())
    for _ in range(2):
        found, stats = step(net, x, **options)
        assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-10) for a, b in zip(expected, found, strict=True))
        assert stats.held_bytes == 0
    assert all(map(torch.equal, near, found))
    assert stats.peak_held_bytes == near_stats.peak_held_bytes
    assert (stats.inversions, stats.replays) == (near_stats.inversions, near_stats.replays)
    if stats.inversions:
        assert stats.worst_error > 0 or kind == "on a grid"


def test_small_streams_are_compared_as_they_were(far: None) -> None:
    """Streams of fewer elements than a sample has, inverted in their own memory before the comparison is read."""
    net = rnn.ReversibleSequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(12)), dim=-1)
    x = torch.randn(3, 8)
    expected = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            found, stats = step(net, x)
            assert stats.worst_error < 1e-5
            assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(found, expected, strict=True))


class Notes(TorchDispatchMode):
    """Notes operations of these names."""

    def __init__(self, names: tuple[str, ...], noted: list[str]) -> None:
        super().__init__()
        self._names, self._noted = names, noted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in self._names:
            self._noted.append(func.name())
        return func(*args, **(kwargs or {}))


def test_where_a_tensor_is_sampled_is_made_once(far: None) -> None:
    """To bring it to a GPU in each context would be to wait in each step."""
    made: list[str] = []
    make, options = NETS["sequential"]
    net, x = make(), torch.randn(64, 32)
    guard._places.cache_clear()
    for number in range(8):
        with Notes(("aten::frac_",), made):
            step(net, x, **options)
        if not number:
            assert made
            made.clear()
    assert not made


@pytest.mark.parametrize("kind", NETS)
def test_the_host_never_waits(kind: str, third: type, far: None) -> None:
    """Once everything is known, no value is read from the device before the end of backward."""
    make, options = NETS[kind]
    net, x = make(), torch.randn(64, 32)
    if kind == "on a grid":
        x = revhooks.functional.round_to_grid(x, 16)
    for _ in range(20):  # a line of code that several modules share is tried more often
        step(net, x, **options)
    waited: list[str] = []
    with revhooks.reversible(**options):
        loss = net(x).square().sum()
        with Notes(WAITS, waited):
            loss.backward()
    assert not waited
    with revhooks.reversible(**options), Notes(WAITS, waited):
        net(x)
    assert not waited


def _by_hand(weight: nn.Parameter) -> nn.Module:
    """A scale by hand before any layer: what is saved first is no parameter."""

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor) -> Tensor:
            return (self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))).sin()

    return Scale()


UNKNOWN: dict[str, Callable[[], nn.Module]] = {
    "offload": lambda: nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(32, 32), nn.GELU())]),
    "before a parameter": lambda: nn.Sequential(_by_hand(nn.Parameter(torch.ones(32))), nn.Linear(32, 32)),
    "an odd eps": lambda: nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(32, 32), nn.LayerNorm(32, eps=3.3e-5))]),
    "an odd eps, no weight": lambda: nn.Sequential(
        *[m for _ in range(6) for m in (nn.Linear(32, 32), nn.LayerNorm(32, eps=3.3e-5, elementwise_affine=False))]
    ),
    "a fine eps": lambda: nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(32, 32), nn.LayerNorm(32, eps=1e-8))]),
}


@pytest.mark.parametrize("kind", [*UNKNOWN, *NETS])
def test_a_steady_step_reads_nothing_at_all(kind: str, third: type, far: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A context a step: neither what can never be known nor what no place is known of makes each step wait."""
    read: list[str] = []
    results, same_bits = guard._results, ops._same_bits
    monkeypatch.setattr(guard, "_results", lambda pairs: read.extend("compared" for _ in pairs) or results(pairs))
    monkeypatch.setattr(ops, "_same_bits", lambda a, b: read.append("looked at rows") or same_bits(a, b))
    make, options = (UNKNOWN[kind], {"offload": kind == "offload"}) if kind in UNKNOWN else NETS[kind]
    net, x = make(), torch.randn(64, 32)
    if kind == "on a grid":
        x = revhooks.functional.round_to_grid(x, 16)
    for _ in range(24):
        step(net, x, **options)
    read.clear()
    for _ in range(24):
        step(net, x, **options)
    assert not read


def test_a_failed_backward_hides_no_later_one(far: None) -> None:
    """A pass that raises never comes to its end."""
    calls: list[int] = []

    def other_count(x: Tensor) -> Tensor:
        calls.append(1)
        return x.exp().sin() if len(calls) % 2 else x.sin() + 1

    def other_values(x: Tensor) -> Tensor:
        calls.append(1)
        return x.exp().sin() if len(calls) % 2 else (2 * x).exp().sin()

    def same(x: Tensor) -> Tensor:
        return x.exp().sin()

    for ambient in (True, False):
        for _ in range(2):
            x = torch.linspace(1, 2, 3, requires_grad=True)
            with torch.enable_grad() if ambient else revhooks.reversible():
                calls.clear()
                y = revhooks.checkpoint(same, revhooks.checkpoint(other_count, x * 1))
                with pytest.raises(ReplayError, match="checkpoint"):
                    y.sum().backward()
                calls.clear()
                y = revhooks.checkpoint(other_values, x * 1)
                with pytest.raises(ReplayError, match="checkpoint"):
                    y.sum().backward()


def test_an_edit_behind_autograds_back(far: None) -> None:
    """It raises, once backward has ended; then the tensor is held."""
    norm, linear = nn.LayerNorm(32), nn.Linear(32, 32)

    def forward(x: Tensor, *, edit: bool) -> Tensor:
        h = linear(x)
        y = linear(F.gelu(h))
        if edit:
            h.data.mul_(2)
        return y + norm(h)

    def one(*, edit: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(x, edit=edit).sum(), list(linear.parameters()))

    x = torch.randn(256, 32)
    with revhooks.reversible():
        for _ in range(3):
            one(edit=False)
        with pytest.raises(ReplayError):
            one(edit=True)
        found = one(edit=True)  # held from now on
    h = linear(x)
    y = linear(F.gelu(h))
    h.data.mul_(2)
    expected = torch.autograd.grad((y + norm(h)).sum(), list(linear.parameters()))
    assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("slip", [3e-2, 3.0])
def test_an_inverse_that_slips(slip: float, third: type, far: None) -> None:
    """A mild error: a warning, and the block is kept. A gross one raises, then the block is kept."""
    net, x = nn.Sequential(*(Third() for _ in range(4))), torch.randn(64, 32)
    step(net, x)
    expected = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    net[2].slip = slip
    if slip > 1:
        with pytest.raises(InversionError, match="reconstruction"):
            step(net, x)
    else:
        with pytest.warns(FallbackWarning):
            step(net, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            found, stats = step(net, x)
    assert stats.replays
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("late", [False, True])
def test_zeros_that_do_not_come_back(late: bool, far: None) -> None:
    """A branch that begins with ReLU sees the sign of what should be zero. The first calls look; later a warning tells."""

    def relu_first() -> nn.Module:
        return nn.Sequential(nn.ReLU(), nn.Linear(16, 16))

    net = nn.Sequential(*(rnn.AdditiveCoupling(relu_first(), relu_first(), dim=-1) for _ in range(5)))
    nn.init.zeros_(net[0].f[1].weight)
    nn.init.zeros_(net[0].f[1].bias)  # the first block leaves the zeros of its input where they are
    x = torch.cat([torch.randn(64, 16).relu(), torch.randn(64, 16)], -1)
    if late:
        for _ in range(6):
            step(net, torch.randn(64, 32))
    expected = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    for step_number in range(3):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found, _ = step(net, x)
        zeros = [w for w in told if issubclass(w.category, FallbackWarning) and "zeros" in str(w.message)]
        assert bool(zeros) == (late and not step_number)
        if not zeros:
            assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(found, expected, strict=True))


def test_a_stream_off_the_grid(far: None) -> None:
    net = rnn.ReversibleSequential(*(branch() for _ in range(4)), dim=-1, grid_bits=16)
    with pytest.raises(GridError), revhooks.reversible():
        net(torch.full((4, 32), 1e6))
