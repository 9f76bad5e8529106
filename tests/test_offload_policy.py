"""What offload moves: learned from measured steps, on a device that is simulated (``bench/offload_device.py``).

The runtime is the real one, hooks and handles and budgets; what is simulated is the device's time: its streams, its bus, and a
host that runs ahead.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revhooks
from bench.offload_device import SCALE, Device, Layer, Mark, Simulated, forward
from revhooks.runtime import packing
from revhooks.runtime.offload import lane, learning
from revhooks.runtime.offload import parked as offload
from revhooks.runtime.offload.schedule import Timeline, choose, schedule
from tests.test_offload import nets

pytestmark = pytest.mark.cpu(reason="a simulated device")

GB = 10**9 // SCALE
STEPS = 8
LEARNED = 5  # steps after which the plan stands


@dataclass
class Outcome:
    """Of a step: seconds, bytes that went out, and the most that lay on the device between two kernels."""

    seconds: float
    moved: int
    kept: int


Run = Callable[..., list[Outcome]]


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    monkeypatch.setattr(offload, "LEAST", 0)
    monkeypatch.setattr(lane, "LAG", lane.LAG // SCALE)
    learning._FACTS.clear()

    def run(
        layers: list[Layer] | list[list[Layer]],
        rate: float,
        *,
        back: float | None = None,
        launch: float = 2e-6,
        wait: bool = True,
        around: bool = False,
        steps: int = STEPS,
        device: Device | None = None,
        **options: Any,
    ) -> list[Outcome]:
        """Some steps: the host waits at the end of each, or runs ahead; each in a run of its own, or all in one."""
        device = device or Device(rate * GB, (back or rate) * GB, launch)
        mover = Simulated(device)
        monkeypatch.setitem(offload.MOVERS, "cpu", lambda: mover)
        outcomes = []

        def step(number: int) -> None:
            start, moved, device.kept = device.synchronize() if wait else device.now(), device.moved, 0
            these = layers[number % len(layers)] if isinstance(layers[0], list) else layers
            forward(device, these).backward()
            end = device.synchronize() if wait else device.now()
            outcomes.append(Outcome(end - start, device.moved - moved, device.kept))

        if around:
            with revhooks.reversible(offload=True, **options):
                for number in range(steps):
                    step(number)
        else:
            for number in range(steps):
                with revhooks.reversible(offload=True, **options) as run:
                    step(number)
                assert run.stats.held_bytes == run.stats.offloaded_bytes == 0
        return outcomes

    yield run
    learning._FACTS.clear()


def plain(layers: list[Layer]) -> float:
    return sum(layer.forward + layer.backward for layer in layers)


def even(count: int = 60, gigabytes: float = 6.0, forward: float = 0.03) -> list[Layer]:
    nbytes = int(gigabytes * GB / count) // 4 * 4
    return [Layer(nbytes, forward / count, 2 * forward / count) for _ in range(count)]


def mixed(seed: int, count: int = 60) -> list[Layer]:
    """Sizes over three orders of magnitude, times that have little to do with them."""
    chance = random.Random(seed)
    layers = []
    for _ in range(count):
        took = 0.001 * chance.random()
        layers.append(Layer(int(10 ** chance.uniform(-3, 0) * GB) // 4 * 4 + 4, took, took * chance.uniform(1, 3)))
    return layers


NETS = {"even": even(), "one large first": [Layer(2 * GB, 0.001, 0.002), *even()], **{f"mixed {i}": mixed(i) for i in range(3)}}


@pytest.mark.parametrize("rate", [0.5, 5, 50, 500, 5000])
@pytest.mark.parametrize("name", NETS)
def test_it_never_loses(name: str, rate: float, simulate: Run) -> None:
    """Whatever the bus: what is learned costs at most a tenth, and the first steps, which know nothing, are bounded."""
    layers = NETS[name]
    outcomes = simulate(layers, rate)
    assert all(outcome.seconds <= 1.1 * plain(layers) for outcome in outcomes[LEARNED:]), outcomes
    largest = max(layer.nbytes for layer in layers)
    bound = 2 * (max(lane.LAG, largest) + largest) / (rate * GB)
    assert all(outcome.seconds <= 1.1 * plain(layers) + bound for outcome in outcomes), outcomes
    assert len({outcome.moved for outcome in outcomes[LEARNED:]}) == 1  # it has settled


@pytest.mark.parametrize(("rate", "least"), [(20, 0.4), (50, 1.0), (500, 5.0)])
def test_what_the_bus_carries_moves(rate: float, least: float, simulate: Run) -> None:
    layers = even()  # 6 GB, 30 ms of forward: 0.6, 1.5 and 15 GB of bus
    last = simulate(layers, rate)[-1]
    assert last.moved >= least * GB
    assert last.kept <= 6 * GB - 0.9 * last.moved
    assert last.seconds <= 1.01 * plain(layers)


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("wait", [False, True])
def test_a_host_that_runs_ahead(wait: bool, around: bool, simulate: Run) -> None:
    """Marks are read when they have passed, be it some steps later; one run a step, or one around the loop."""
    layers = even()
    outcomes = simulate(layers, 50, wait=wait, around=around, steps=14)
    assert all(outcome.moved >= 1.0 * GB and outcome.seconds <= 1.05 * plain(layers) for outcome in outcomes[10:]), outcomes


def test_a_host_that_is_the_critical_path(simulate: Run) -> None:
    """Copies that it has no time to start are not started."""
    layers = [Layer(GB // 100, 1e-5, 2e-5) for _ in range(300)]
    launch = 20e-6
    outcomes = simulate(layers, 500, launch=launch)
    slow = 2 * len(layers) * launch
    assert 0 < outcomes[-1].moved < 100 * GB // 100
    assert outcomes[-1].seconds <= 1.1 * slow


def test_one_way_slower_than_the_other(simulate: Run) -> None:
    layers = even()
    outcomes = simulate(layers, 100, back=10)
    assert outcomes[-1].seconds <= 1.05 * plain(layers)
    assert 0.3 * GB <= outcomes[-1].moved <= 0.6 * GB  # 60 ms of backward


def test_a_bus_that_becomes_slower(simulate: Run) -> None:
    """As where others use it too: what the device waits for is seen, and less is moved."""
    layers = even()
    device = Device(100 * GB, 100 * GB, 2e-6)
    first = simulate(layers, 0, device=device)[-1]
    device.rates = {"out": 10 * GB, "back": 10 * GB}
    later = simulate(layers, 0, device=device, steps=24)
    assert later[0].seconds > 1.1 * plain(layers)
    assert later[-1].seconds <= 1.1 * plain(layers)
    assert 0 < later[-1].moved < first.moved


def test_other_shapes_are_learned_anew(simulate: Run) -> None:
    """Steps by turns, as of a generator and a discriminator, that begin alike; then one that was never seen."""
    kinds = [even(), even()[:40] + mixed(7, 20)]
    outcomes = simulate(kinds, 50, steps=20)
    for number, outcome in enumerate(outcomes[14:], 14):
        assert outcome.seconds <= 1.1 * plain(kinds[number % 2])
        assert outcome.moved > 0
    unknown = even(50, 3.0)
    again = simulate([unknown, *kinds], 50, steps=3)
    assert again[0].seconds <= 1.1 * plain(unknown) + 2 * 2 * lane.LAG_SECONDS
    assert all(outcome.seconds <= 1.1 * plain(kind) for outcome, kind in zip(again[1:], kinds, strict=True))


def test_steps_that_never_come_again(simulate: Run) -> None:
    """Nothing can be planned: what is moved is bounded by time, and facts are few."""
    kinds = [mixed(i, 20 + i) for i in range(20)]
    outcomes = simulate(kinds, 10, steps=20)
    for outcome, kind in list(zip(outcomes, kinds, strict=True))[4:]:
        largest = max(layer.nbytes for layer in kind)
        assert outcome.seconds <= plain(kind) + 4 * lane.LAG_SECONDS + 4 * largest / (10 * GB)
    (facts,) = learning._FACTS.values()
    assert len(facts._known) <= learning.KEPT
    assert len(facts._pending) <= learning.PENDING + 1


def test_the_same_again_is_the_same(simulate: Run) -> None:
    first = simulate(mixed(3), 40)
    learning._FACTS.clear()
    assert simulate(mixed(3), 40) == first


@pytest.mark.parametrize("share", [0.9, 0.6, 0.2])
@pytest.mark.parametrize("name", NETS)
def test_a_budget_moves_what_it_demands(name: str, share: float, simulate: Run) -> None:
    layers = NETS[name]
    whole, largest = sum(layer.nbytes for layer in layers), max(layer.nbytes for layer in layers)
    budget = int(share * whole)
    outcomes = simulate(layers, 50, budget=budget)
    for outcome in outcomes:
        assert outcome.kept <= max(budget, largest), outcomes  # one lies there while it is used
        assert whole - budget <= outcome.moved <= whole - budget + 2 * largest
    assert outcomes[-1].seconds <= outcomes[0].seconds


def test_a_budget_that_the_bus_can_keep_costs_nothing(simulate: Run) -> None:
    """In the first step things move when there is no room left, later as soon as they are saved."""
    layers = even()
    outcomes = simulate(layers, 50, budget=5 * GB)
    assert outcomes[0].seconds > 1.2 * plain(layers)
    assert outcomes[-1].seconds <= 1.02 * plain(layers)
    assert all(outcome.kept <= 5 * GB for outcome in outcomes)


def test_a_budget_that_holds_all_moves_nothing(simulate: Run) -> None:
    for budget in (7 * GB, float("inf")):
        assert not any(outcome.moved for outcome in simulate(even(), 50, budget=budget))


def test_what_can_be_recomputed_goes_before_anything_moves(simulate: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(GB, GB)
    mover = Simulated(device)
    monkeypatch.setitem(offload.MOVERS, "cpu", lambda: mover)

    def loss() -> Tensor:
        x = torch.zeros(1000, requires_grad=True)
        h = forward(device, [Layer(8000, 1e-3, 1e-3)] * 4) + x
        for _ in range(8):
            h = torch.nn.functional.gelu(h * 1.5).tanh()
        return h.sum()

    with revhooks.reversible() as run:
        y = loss()
        least = run.stats.held_bytes
    assert least < run.stats.packed_bytes
    for less in (0, 4000, 20_000, least):
        with revhooks.reversible(offload=True, budget=least - less or 1) as run:
            y = loss()
            assert less <= run.stats.offloaded_bytes < less + 8000
            assert run.stats.held_bytes <= least - less
            y.backward()


def test_nothing_is_asked_of_the_device(simulate: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule 16, and few marks: a planned step sets one for each tensor that comes back, and where fetches start."""
    marks: list[Any] = []
    mark = Simulated.mark
    monkeypatch.setattr(Simulated, "mark", lambda self, device: marks.append(1) or mark(self, device))
    layers = even()
    device = Device(20 * GB, 20 * GB)
    simulate(layers, 0, device=device)
    marks.clear()
    moved = simulate(layers, 0, device=device, steps=1)[0].moved // layers[0].nbytes
    assert moved > 0
    assert len(marks) <= 3 * moved + 2


def test_a_backward_that_writes_to_what_it_is_given(simulate: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that is only watched is the saved one itself: the next backward is told, as in plain PyTorch."""
    monkeypatch.setattr(lane, "LAG", 0)
    mover = Simulated(Device(GB, GB))
    monkeypatch.setitem(offload.MOVERS, "cpu", lambda: mover)

    class Writes(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            y = x.exp()
            ctx.save_for_backward(y.clone())
            return y

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (y,) = ctx.saved_tensors
            return y.mul_(grad)

    x = torch.ones(1000, requires_grad=True)
    with revhooks.reversible(offload=True):
        y = Writes.apply(Writes.apply(x)).sum()
        (first,) = torch.autograd.grad(y, x, retain_graph=True)
        with pytest.raises(revhooks.errors.ModifiedError):
            torch.autograd.grad(y, x)
    plain = torch.autograd.grad(x.exp().exp().sum(), x)[0]
    assert torch.allclose(first, plain)


def test_what_fits_is_chosen_by_its_wait() -> None:
    line = Timeline([100] * 4, [0.0, 1.0, 2.0, 3.0], [8.0, 6.5, 5.0, 3.5], out=50, back=50)
    assert choose(line, 1.0) == {0}
    twice = Timeline(line.sizes, line.packed, line.used, out=100, back=100)
    assert choose(twice, 1.0) == {0, 1}
    assert choose(Timeline(line.sizes, line.packed, line.used, out=100, back=20), 1.0) == set()
    assert choose(Timeline([1000, 10, 10], [0.0, 1.0, 2.0], [9.0, 4.0, 3.0], out=50, back=50), 1.0) == {
        1
    }  # the first is too large
    never = Timeline(line.sizes, line.packed, [None, 6.5, 5.0, 3.5], out=100, back=100)
    assert choose(never, 1.0) == {1}
    assert choose(Timeline([], [], [], out=1, back=1), 1.0) == choose(Timeline([1], [0.0], [None], out=1, back=1), 1.0) == set()


def test_fetches_start_as_late_as_will_do() -> None:
    line = Timeline([100] * 4, [0.0, 1.0, 2.0, 3.0], [9.0, 7.0, 5.0, 3.5], out=100, back=100)
    plan = schedule(line, {0, 1}, 0.5)  # two seconds each
    assert plan.starts == {3: (1,), 2: (0,)}
    assert plan.marks == {2, 3}
    assert list(plan.settled) == [0, 0, 0, 1]  # the second is out after the last was saved
    late = schedule(line, {0, 1, 2}, 0.1)  # there is no time: as early as can be
    assert late.starts == {3: (2, 1, 0)}
    assert schedule(line, (), 0.5).marks == {3}


class Ticking(Simulated):
    """Computes for a while wherever a mark is set, so that there is time to move what ordinary layers save."""

    def mark(self, device: torch.device) -> Mark:
        self.sim.work(1e-4)
        return super().mark(device)


@pytest.mark.parametrize("budget", [None, 24 << 10])
@pytest.mark.parametrize("name", nets())
def test_gradients_are_those_without(name: str, budget: int | None, simulate: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step after step, whatever is decided; each in a run of its own, and all in one."""
    model, x, options = nets()[name]
    options = {**options, "budget": budget}
    device = Device(1000 * GB, 1000 * GB, 0.0)
    mover = Ticking(device)
    monkeypatch.setitem(offload.MOVERS, "cpu", lambda: mover)

    def step(net: nn.Module) -> list[Tensor]:
        torch.manual_seed(3)
        given = x.clone().requires_grad_()
        net.zero_grad()
        net(given).square().sum().backward()
        device.synchronize()
        return [given.grad, *(p.grad for p in net.parameters())]  # type: ignore[list-item]

    def steps(count: int, **chosen: Any) -> list[list[Tensor]]:
        net = copy.deepcopy(model)
        found = []
        for _ in range(count):
            with revhooks.reversible(**options, **chosen) as run:
                found.append(step(net))
            assert run.stats.held_bytes == run.stats.offloaded_bytes == 0
        with revhooks.reversible(**options, **chosen):
            return [*found, *(step(net) for _ in range(count))]

    expected = steps(1)
    for grads in steps(6, offload=True):
        for a, b in zip(grads, expected[0], strict=True):
            assert torch.equal(a, b) if x.dtype is torch.float32 else torch.allclose(a, b, rtol=1e-10)
    assert len(mover.leaving(torch.device("cpu"))) == 0
    plans = [known.plan for known in learning.facts_of(x.device)._known.values() if known.plan is not None]
    assert plans
    assert any(plan.moves for plan in plans) or len(plans[0].settled) < 4


@pytest.mark.parametrize("rate", [0.5, 50])
def test_a_step_is_the_same_whatever_of_it_moves(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that two operations save is one of the step, when it stays as when it goes: else no step is ever known again."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.a(h) + self.b(h)

    monkeypatch.setattr(offload, "LEAST", 0)
    monkeypatch.setattr(packing, "looks", {})
    monkeypatch.setattr(packing, "LOOKS", 16)  # soon nobody looks any more whether the tensor is a source
    learning._FACTS.clear()
    device = Device(rate * GB, rate * GB)
    mover = Simulated(device)
    monkeypatch.setitem(offload.MOVERS, "cpu", lambda: mover)
    model, x = nn.Sequential(*[Twice() for _ in range(8)]), torch.randn(64, 16)
    for _ in range(10):
        with revhooks.reversible(offload=True):
            model(x).square().mean().backward()
        device.synchronize()
    assert len(learning._FACTS[x.device]._known) == 1
