"""Code that is run again in backward leaves the user's objects as plain autograd does, in what they hold and which they are.

Lists of auxiliary losses, expert loads, attention maps, metrics: `torch.utils.checkpoint` appends twice.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import threading
import weakref
from array import array
from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import revhooks
from revhooks import effects
from revhooks import nn as rnn
from revhooks.errors import ReplayError
from tests import noted

WIDTH, DEPTH, STEPS = 8, 3, 3


# ------------------------------------------------------------------------------- what a call leaves


class Meter:
    """Running figures in plain attributes, a property among them that counts who asks."""

    asked = 0

    def __init__(self) -> None:
        self.total, self.count, self.last = 0.0, 0, {"value": [0.0]}

    @property
    def mean(self) -> float:
        Meter.asked += 1
        return self.total / self.count

    def add(self, value: float) -> None:
        self.total += value
        self.count += 1
        self.last["value"].append(value)


class Slotted:
    __slots__ = ("count", "late", "values")

    def __init__(self) -> None:
        self.count, self.values = 0, []

    def add(self, value: float) -> None:
        self.count += 1
        self.values.append(value)
        if not hasattr(self, "late"):
            self.late = {}
        self.late[self.count] = value


@dataclass
class Row:
    values: list[float] = field(default_factory=list)


class Log(list):  # type: ignore[type-arg]
    """A list that counts, and whose own methods must not be called by us."""

    def __init__(self) -> None:
        super().__init__()
        self.appended = 0

    def append(self, value: Any) -> None:
        self.appended += 1
        super().append(value)

    def clear(self) -> None:
        raise AssertionError("nobody asked for that")

    def __iter__(self) -> Any:
        raise AssertionError("nobody asked for that")


def _to_list(store: Any, v: float, i: int) -> None:
    store.append(v)


def _to_counter(store: Any, v: float, i: int) -> None:
    store[i % 2] += 1


def _to_groups(store: Any, v: float, i: int) -> None:
    store[i % 2].append(v)


def _to_order(store: Any, v: float, i: int) -> None:
    store[i] = v
    store.move_to_end(i, last=False)


def _to_set(store: Any, v: float, i: int) -> None:
    store ^= {round(v, 3), i}


def _to_window(store: Any, v: float, i: int) -> None:
    store.append(v)


def _to_array(store: Any, v: float, i: int) -> None:
    store[i % len(store)] += v


def _to_nested(store: Any, v: float, i: int) -> None:
    store["runs"][0][1]["losses"].append({"value": v})
    store["runs"][0][1]["count"] += 1


def _to_space(store: Any, v: float, i: int) -> None:
    store.count += 1
    store.values.append(v)


def _to_memory(store: Any, v: float, i: int) -> None:
    store[i % 4] = (store[i % 4] + 1) % 256


def _pops(store: Any, v: float, i: int) -> None:
    store.pop()
    store.insert(0, v)


def _to_tensor(store: Any, v: float, i: int) -> None:
    store["sum"].add_(v)


STORES: dict[str, tuple[Callable[[], Any], Callable[[Any, float, int], None]]] = {
    "list": (list, _to_list),
    "queue": (lambda: deque([1.0, 2.0, 3.0], maxlen=3), _to_window),
    "set": (set, _to_set),
    "counter": (Counter, _to_counter),
    "groups": (lambda: defaultdict(list), _to_groups),
    "order": (OrderedDict, _to_order),
    "nested": (lambda: {"runs": [("first", {"losses": [], "count": 0})]}, _to_nested),
    "numbers": (lambda: np.zeros(4), _to_array),
    "matrix": (lambda: np.zeros((4, 4)).T[::2], _to_array),
    "objects": (lambda: np.array([0.0, 1.0, None, 2.0], dtype=object)[:2], _to_array),
    "array": (lambda: array("d", [0.0] * 4), _to_array),
    "bytes": (lambda: bytearray(4), _to_memory),
    "meter": (Meter, lambda store, v, i: store.add(v)),
    "slots": (Slotted, lambda store, v, i: store.add(v)),
    "dataclass": (Row, lambda store, v, i: store.values.append(v)),
    "namespace": (lambda: SimpleNamespace(count=0, values=[]), _to_space),
    "own list": (Log, lambda store, v, i: store.append(v)),
    "user dictionary": (UserDict, lambda store, v, i: store.update({i: v})),
    "shortened": (lambda: [float(i) for i in range(50)], _pops),
    "tensor": (lambda: {"sum": torch.zeros(())}, _to_tensor),
}


def shown(thing: Any, seen: dict[int, int]) -> Any:
    """All that is in it, as something that can be compared; things that are one are."""
    if isinstance(thing, (int, float, str, type(None))):
        return thing
    if id(thing) in seen:
        return f"#{seen[id(thing)]}"
    seen[id(thing)] = len(seen)
    if isinstance(thing, Tensor):
        return thing.detach().double().flatten().tolist()
    if isinstance(thing, np.ndarray):
        return thing.tolist()
    own = dict(vars(thing)) if hasattr(thing, "__dict__") else {}
    own |= {name: getattr(thing, name, "-") for name in getattr(type(thing), "__slots__", ())}
    if isinstance(thing, OrderedDict):
        own["items"] = list(thing.items())
    elif isinstance(thing, dict):
        own["items"] = list(dict.items(thing))
    elif isinstance(thing, set):
        return sorted(thing)
    elif isinstance(thing, (list, tuple, deque, bytearray, array)):
        own["items"] = list(list.__iter__(thing)) if isinstance(thing, list) else list(thing)
    return [type(thing).__name__, *[(name, _shown(value, seen)) for name, value in own.items()]]


def _shown(value: Any, seen: dict[int, int]) -> Any:
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple) and value and isinstance(value[0], tuple):
        return [[shown(part, seen) for part in pair] for pair in value]
    return [shown(part, seen) for part in value] if type(value) in (list, tuple) else shown(value, seen)


# ------------------------------------------------------------------------------------ where it lies

LOG: Any = None  # a global of this file


def helper(v: float, i: int) -> None:
    noted_here(v, i)


def noted_here(v: float, i: int) -> None:
    PUT(LOG, v, i)


PUT: Any = None


class Body(nn.Module):
    """Saves something, notes, and saves again, so that a replay comes past what notes."""

    kept: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.calls = 0
        self.losses: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        self.calls += 1
        self.losses = [*self.losses, h.mean()]
        self.note(float(h.detach().square().mean()), self.calls)
        return torch.tanh(self.b(h)) * h

    def note(self, v: float, i: int) -> None:
        raise NotImplementedError


class Attribute(Body):
    def note(self, v: float, i: int) -> None:
        self.put(self.store, v, i)


class Global(Body):
    def note(self, v: float, i: int) -> None:
        helper(v, i)


class Elsewhere(Body):
    def note(self, v: float, i: int) -> None:
        noted.note(self.put, v, i)


class OfClass(Body):
    def note(self, v: float, i: int) -> None:
        self.put(OfClass.kept, v, i)


class Silent(Body):
    def note(self, v: float, i: int) -> None:
        pass


def _attribute(store: Any, put: Any) -> type[Body]:
    return Attribute


def _closure(store: Any, put: Any) -> type[Body]:
    class Closure(Body):
        def note(self, v: float, i: int) -> None:
            put(store, v, i)

    return Closure


def _global(store: Any, put: Any) -> type[Body]:
    global LOG, PUT
    LOG, PUT = store, put
    return Global


def _elsewhere(store: Any, put: Any) -> type[Body]:
    noted.STORE = store
    return Elsewhere


def _class(store: Any, put: Any) -> type[Body]:
    OfClass.kept = store
    return OfClass


def _default(store: Any, put: Any) -> type[Body]:
    class Default(Body):
        def note(self, v: float, i: int, *, to: Any = [store]) -> None:  # noqa: B006
            put(to[0], v, i)

    return Default


class Recorder:
    def __init__(self, store: Any, put: Any) -> None:
        self.store, self.put, self.count = store, put, 0

    def hook(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.count += 1
        self.put(self.store, float(output.detach().mean()), self.count)

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.hook(module, args, args[0])


def _on_call(store: Any, put: Any, module: nn.Module, args: Any, output: Any = None) -> None:
    put(store, float(args[0].detach().mean()), 1)


def _hook(how: str) -> Callable[[Any, Any], type[Body]]:
    def make(store: Any, put: Any) -> type[Body]:
        recorder = Recorder(store, put)

        class Hooked(Silent):
            def __init__(self) -> None:
                super().__init__()
                if how == "bound":
                    self.b.register_forward_hook(recorder.hook)
                elif how == "object":
                    self.b.register_forward_pre_hook(recorder)
                elif how == "partial":
                    self.b.register_forward_hook(functools.partial(_on_call, store, put))
                else:
                    self.b.register_forward_hook(lambda module, args, output: put(store, float(output.detach().mean()), 1))

        return Hooked

    return make


PLACES: dict[str, Callable[[Any, Any], type[Body]]] = {
    "attribute": _attribute,
    "closure": _closure,
    "global": _global,
    "elsewhere": _elsewhere,
    "class": _class,
    "default": _default,
    **{f"hook, {how}": _hook(how) for how in ("bound", "object", "partial", "lambda")},
}
Call = Callable[[nn.Module, Tensor], Tensor]
WAYS: dict[str, tuple[Call, Callable[[], Any]]] = {
    "replay": (lambda part, x: part(x), lambda: revhooks.reversible(replay=Body, guard="raise")),
    "whole": (lambda part, x: part(x), lambda: revhooks.reversible(replay=(Body, nn.Sequential))),
    "checkpoint": (lambda part, x: revhooks.checkpoint(part, x), contextlib.nullcontext),
    "function": (lambda part, x: revhooks.checkpoint(lambda h: part(h) * 1.0, x), revhooks.reversible),
}


def outcome(store_kind: str, place: str, way: str, steps: int = STEPS) -> list[Any]:
    """What is in the store, the gradients, and the counts after some steps."""
    make, put = STORES[store_kind]
    store = make()
    kind = PLACES[place](store, put)
    call, context = (lambda part, x: part(x), contextlib.nullcontext) if way == "plain" else WAYS[way]
    torch.manual_seed(0)
    net = nn.Sequential(*[kind() for _ in range(DEPTH)])
    for body in net:
        body.put, body.store = put, store  # type: ignore[assignment]
    found: list[Any] = []
    with context():
        for step in range(steps):
            y = torch.linspace(-1, 1, 4 * WIDTH).reshape(4, WIDTH) * (1 + step)
            if way == "whole":
                y = net(y)
            else:
                for body in net:
                    y = call(body, y)
            extra = sum(loss for body in net for loss in body.losses)  # type: ignore[union-attr, misc]
            for body in net:
                body.losses = []
            net.zero_grad()
            (y.square().sum() + extra).backward()
            found.append(shown(store, {}))
            found += [p.grad.tolist() for p in net.parameters()]  # type: ignore[union-attr]
            found += [(body.calls, len(body.losses)) for body in net]  # type: ignore[arg-type]
    assert all(body.store is store for body in net)
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("store", STORES)
def test_kinds_of_objects(store: str, way: str) -> None:
    assert outcome(store, "attribute", way) == outcome(store, "attribute", "plain")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("store", ["nested", "meter"])
@pytest.mark.parametrize("place", PLACES)
def test_places(place: str, store: str, way: str) -> None:
    assert outcome(store, place, way) == outcome(store, place, "plain")


def test_looking_asks_no_property() -> None:
    Meter.asked = 0
    outcome("meter", "attribute", "replay")
    assert not Meter.asked


# ------------------------------------------------------------------------------------- other blocks


class Noting(nn.Module):
    def __init__(self, width: int, losses: list[Tensor]) -> None:
        super().__init__()
        self.linear, self.losses, self.calls = nn.Linear(width, width), losses, 0

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.linear(x))
        self.calls += 1
        self.losses.append(h.square().mean())
        return h * 0.5


class Third(nn.Module):
    """A coupling that somebody else wrote."""

    def __init__(self, losses: list[Tensor]) -> None:
        super().__init__()
        self.f, self.g, self.inputs = Noting(WIDTH // 2, losses), Noting(WIDTH // 2, losses), []

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        self.inputs.append(float(a.detach().sum()))
        a = a + self.f(b)
        return torch.cat([a, b + self.g(a)], -1)

    def inverse(self, y: Tensor) -> Tensor:
        a, b = y.chunk(2, -1)
        self.inputs.append(float(a.detach().sum()))
        b = b - self.g(a)
        return torch.cat([a - self.f(b), b], -1)


INVERTED: dict[str, Callable[[list[Tensor]], nn.Module]] = {
    "coupling": lambda losses: rnn.AdditiveCoupling(*[Noting(WIDTH // 2, losses) for _ in "fg"], dim=-1),
    "chain": lambda losses: rnn.ReversibleSequential(*[Noting(WIDTH // 2, losses) for _ in range(4)], dim=-1),
    "registered": Third,
    "momentum": lambda losses: rnn.MomentumSequential(*[Noting(WIDTH, losses) for _ in range(3)]),
}


@pytest.mark.parametrize("kind", INVERTED)
def test_an_inverse_appends_nothing(kind: str) -> None:
    def train(context: Callable[[], Any]) -> list[Any]:
        torch.manual_seed(0)
        losses: list[Tensor] = []
        net = nn.Sequential(*[INVERTED[kind](losses) for _ in range(3)]).double()
        found: list[Any] = []
        with context():
            for step in range(STEPS):
                x = torch.linspace(-1, 1, 4 * WIDTH, dtype=torch.float64).reshape(4, WIDTH) * (1 + step)
                y = net(x)
                total, count = sum(losses), len(losses)  # type: ignore[arg-type]
                losses.clear()
                net.zero_grad()
                (y.square().sum() + total).backward()
                found += [count, len(losses), total.detach()]  # type: ignore[union-attr]
                found += [p.grad.clone() for p in net.parameters()]  # type: ignore[union-attr]
                found += [module.calls for module in net.modules() if isinstance(module, Noting)]
                found += [len(module.inputs) for module in net.modules() if isinstance(module, Third)]
        return found

    revhooks.register(Third, inverse="inverse")
    try:
        expected, found = train(contextlib.nullcontext), train(revhooks.reversible)
        again = train(lambda: revhooks.reversible(budget=1 << 20))
    finally:
        revhooks.unregister(Third)
    for got in (found, again):
        assert len(got) == len(expected)
        for a, b in zip(expected, got, strict=True):
            assert torch.allclose(a, b, atol=1e-9) if isinstance(a, Tensor) else a == b


# --------------------------------------------------------------------------------------- its ends


class Expert(nn.Module):
    """A mixture whose auxiliary loss is noted after its last product: a replay ends before or after it."""

    def __init__(self) -> None:
        super().__init__()
        self.r, self.e, self.aux = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, WIDTH), []

    def forward(self, x: Tensor) -> Tensor:
        p = self.r(x).softmax(-1)
        self.aux.append(p.mean(0).square().sum())
        y = x + torch.tanh(self.e(x)) * p.amax(-1, keepdim=True)
        self.aux.append(p.detach().sum())
        return y


def _moe(call: Call, context: Callable[[], Any], steps: int = 3) -> list[Any]:
    torch.manual_seed(0)
    net = nn.Sequential(Expert(), Expert())
    found: list[Any] = []
    with context():
        for _ in range(steps):
            y = torch.randn(20, WIDTH)
            for part in net:
                y = call(part, y)
            aux = sum(part.aux[0] for part in net)  # type: ignore[index, union-attr, misc]
            found += [len(part.aux) for part in net]  # type: ignore[arg-type]
            for part in net:
                part.aux.clear()  # type: ignore[operator, union-attr]
            net.zero_grad()
            (y.square().mean() + aux).backward()
            found += [len(part.aux) for part in net] + [p.grad.tolist() for p in net.parameters()]  # type: ignore[arg-type, union-attr]
    return found


@pytest.mark.parametrize("way", ["replay", "checkpoint", "function"])
def test_auxiliary_losses(way: str, no_gc: None) -> None:
    call, context = WAYS[way]
    if way == "replay":
        context = functools.partial(revhooks.reversible, replay=Expert)
    assert _moe(call, context) == _moe(lambda part, x: part(x), contextlib.nullcontext)


def test_what_is_noted_is_what_forward_noted() -> None:
    """In content and identity, with its graph: a user may go on with it after backward."""
    torch.manual_seed(0)
    net, x = nn.Sequential(Expert(), Expert()), torch.randn(5, WIDTH)
    with revhooks.reversible(replay=Expert):
        loss = net(x).sum()
        before = [list(part.aux) for part in net]  # type: ignore[arg-type]
        lists = [part.aux for part in net]
        loss.backward(retain_graph=True)
        loss.backward()
    for part, contents, own in zip(net, before, lists, strict=True):
        assert part.aux is own
        assert len(own) == len(contents) == 2
        assert all(a is b for a, b in zip(own, contents, strict=True))  # type: ignore[arg-type]


def test_a_replay_that_raises_leaves_nothing() -> None:
    class Fails(Expert):
        when = -1

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            if Fails.when > 0:
                raise ValueError("on purpose")
            return torch.tanh(y)

    module = Fails()
    y = revhooks.checkpoint(module, torch.randn(5, WIDTH)).sum()
    before = list(module.aux)
    Fails.when = 1
    with pytest.raises(ValueError, match="on purpose"):
        y.backward()
    assert len(module.aux) == 2
    assert all(a is b for a, b in zip(module.aux, before, strict=True))


def test_arguments() -> None:
    """What a call leaves in an object that it was given, which only its replay changes."""

    class Sink:
        def __init__(self) -> None:
            self.values: list[float] = []

    def fn(x: Tensor, sink: Sink) -> Tensor:
        h = torch.tanh(x)
        sink.values.append(float(h.detach().sum()))
        return torch.tanh(h)

    x, sink = torch.randn(5, requires_grad=True), Sink()
    y = revhooks.checkpoint(fn, x, sink)
    values = sink.values
    y.sum().backward()
    assert sink.values is values
    assert len(values) == 1


def test_a_function_and_what_it_closes_over() -> None:
    total, best, names = 0.0, None, []
    calls = {"count": 0}

    def fn(x: Tensor) -> Tensor:
        nonlocal total, best
        h = torch.tanh(x)
        total, best = total + float(h.detach().sum()), h.mean()
        calls["count"] += 1
        names.append("h")
        fn.total = getattr(fn, "total", 0) + 1  # type: ignore[attr-defined]
        return torch.tanh(h)

    x = torch.randn(5, requires_grad=True)
    y = revhooks.checkpoint(fn, x)
    expected = total, best
    y.sum().backward()
    assert (total, best) == expected
    assert best is expected[1]
    assert (calls, names, fn.total) == ({"count": 1}, ["h"], 1)  # type: ignore[attr-defined]


def test_a_method_of_something_else() -> None:
    class Trainer:
        def __init__(self) -> None:
            self.net, self.seen, self.lock = nn.Linear(4, 4), [], threading.Lock()

        def step(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.net(x))
            with self.lock:
                self.seen.append(h)
            return torch.tanh(h)

    trainer = Trainer()
    x = torch.randn(5, 4, requires_grad=True)
    revhooks.checkpoint(trainer.step, x).sum().backward()
    assert len(trainer.seen) == 1
    revhooks.checkpoint(functools.partial(trainer.step), x).sum().backward()
    assert len(trainer.seen) == 2


def test_a_large_tensor_that_is_written_to_is_put_back_or_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not copied before calls have written to it, so that the first time raises; from then on it is put back."""
    monkeypatch.setattr(effects, "_LARGE", 1 << 20)
    maps = {"sum": torch.zeros(1 << 19)}

    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.linear(x))
            maps["sum"].add_(h.detach().sum())
            return torch.tanh(h)

    module, x = Sums(), torch.randn(5, 4)
    with pytest.raises(ReplayError, match=r"a tensor of shape \(524288,\) that was written to twice"):
        revhooks.checkpoint(module, x).sum().backward()
    maps["sum"].zero_()
    y = revhooks.checkpoint(module, x).sum()
    expected = maps["sum"].clone()
    y.backward()
    assert expected.any()
    assert torch.equal(maps["sum"], expected)


def test_a_tensor_that_is_written_to_late() -> None:
    """Tensors are copied in the first replays only, if those write to none: later ones say so, and are put back after that."""
    sums = {"sum": torch.zeros(3)}

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.writes = nn.Linear(4, 4), False

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.linear(x))
            if self.writes:
                sums["sum"].add_(1)
            return torch.tanh(h)

    module, x = Late(), torch.randn(5, 4)
    for _ in range(8):
        revhooks.checkpoint(module, x).sum().backward()
    module.writes = True
    with pytest.raises(ReplayError, match="written to twice"):
        revhooks.checkpoint(module, x).sum().backward()
    sums["sum"].zero_()
    for _ in range(3):
        revhooks.checkpoint(module, x).sum().backward()
    assert sums["sum"].tolist() == [3.0] * 3


def test_what_cannot_be_put_back_is_named() -> None:
    def numbers() -> Any:
        count = 0
        while True:
            yield count
            count += 1

    class Drawing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.numbers = nn.Linear(4, 4), numbers()

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.linear(x))
            next(self.numbers)
            return torch.tanh(h)

    with pytest.raises(ReplayError, match=r"generator .*numbers.* that was advanced twice"):
        revhooks.checkpoint(Drawing(), torch.randn(5, 4)).sum().backward()


def test_a_method_of_a_list() -> None:
    log: list[float] = []

    class Notes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.note = nn.Linear(4, 4), log.append

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.linear(x))
            self.note(0.0)
            return torch.tanh(h)

    revhooks.checkpoint(Notes(), torch.randn(5, 4)).sum().backward()
    assert log == [0.0]


def test_long_records() -> None:
    """Before and behind one that is not looked into; a list of any length is put back."""

    class Records(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.first = nn.Linear(4, 4), [[0.0]]
            self.log, self.table = [0.0] * 10000, {i: float(i) for i in range(10000)}
            self.last: list[float] = []

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.linear(x))
            self.log[5000] += 1
            self.log.append(1.0)
            self.table[len(self.table)] = 1.0
            self.first[0].append(1.0)
            self.last.append(1.0)
            return torch.tanh(h)

    module = Records()
    revhooks.checkpoint(module, torch.randn(5, 4)).sum().backward()
    assert (len(module.log), module.log[5000], len(module.table)) == (10001, 1.0, 10001)
    assert (module.first, module.last) == ([[0.0, 1.0]], [1.0])


def test_nothing_is_held(no_gc: None) -> None:
    """Classes, functions and objects that were looked at go when nobody has them."""
    import weakref

    def once() -> list[weakref.ref[Any]]:
        store: list[Any] = []

        class Here(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear, self.meter = nn.Linear(4, 4), Meter()

            def forward(self, x: Tensor) -> Tensor:
                h = torch.tanh(self.linear(x))
                store.append(h)
                return torch.tanh(h)

        module, x = Here(), torch.randn(5, 4, requires_grad=True)
        with revhooks.reversible(replay=Here):
            nn.Sequential(module, nn.Linear(4, 4))(x).sum().backward()
            revhooks.checkpoint(module, x).sum().backward()
        found = [weakref.ref(module), weakref.ref(module.meter), weakref.ref(store[0])]
        store.clear()
        return found

    assert [ref() for ref in once()] == [None] * 3


def test_copies_and_threads() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Expert(), Expert())
    with revhooks.reversible(replay=Expert):
        net(torch.randn(5, WIDTH)).sum().backward()
        copied = copy.deepcopy([list(map(Tensor.detach, part.aux)) for part in net])  # type: ignore[arg-type]
        y = net(torch.randn(5, WIDTH)).sum()
        thread = threading.Thread(target=y.backward)
        thread.start()
        thread.join()
    assert [len(part.aux) for part in net] == [4, 4]  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for part, own in zip(net, copied, strict=True) for a, b in zip(part.aux, own, strict=False))  # type: ignore[arg-type]
    gc.collect()


def test_memory_that_is_not_there() -> None:
    """Allocated for a call and freed after it, as FSDP does with parameters: to look at it would end the interpreter."""

    class Scratch(nn.Module):
        def __init__(self, how: str) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)
            scratch = torch.empty(1 << 16)
            self.how = how
            if how == "buffer":
                self.register_buffer("scratch", scratch, persistent=False)
            elif how == "parameter":
                self.scratch = nn.Parameter(scratch, requires_grad=False)
            else:
                self.scratch = scratch if how == "attribute" else [scratch]  # type: ignore[assignment]

        def forward(self, x: Tensor) -> Tensor:
            scratch = self.scratch[0] if isinstance(self.scratch, list) else self.scratch
            scratch.untyped_storage().resize_(4 << 16)
            y = torch.tanh(self.a(x))
            scratch.untyped_storage().resize_(0)
            return x + y

    for how in ("attribute", "list", "buffer", "parameter"):
        grads = []
        for options in ({"replay": Scratch}, {"ops": False}):
            torch.manual_seed(0)
            net = nn.Sequential(Scratch(how), rnn.AdditiveCoupling(Scratch(how), Scratch(how), dim=0), Scratch(how))
            for step in range(3):
                with revhooks.reversible(**options):  # type: ignore[arg-type]
                    F.gelu(net(torch.ones(4, 8) * step)).square().mean().backward()
            grads.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True)), how


# ------------------------------------------------------------------ what blocks of one pass have in common


class Common:
    """A configuration as models hand it to each of their layers: with state, and a class whose methods use names."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.nested = {"seen": [0]}

    def note(self, value: float) -> None:
        self.losses.append(value)
        self.nested["seen"].append(1)
        NOTED_BY_ALL.append(value)


NOTED_BY_ALL: list[float] = []


class Configured(nn.Module):
    def __init__(self, config: Common) -> None:
        super().__init__()
        self.config, self.layer = config, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        self.config.note(float(y.detach().sum()))
        return y.tanh()


class Between(torch.autograd.Function):
    """Does something in backward, between the replays of two blocks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, act: Callable[[], None]) -> Tensor:
        ctx.act = act
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.act()
        return grad, None


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is noted before replays, each time that it is."""
    things: list[Any] = []
    note = effects._Reached._note
    monkeypatch.setattr(effects._Reached, "_note", lambda self, thing, kind: things.append(thing) or note(self, thing, kind))
    return things


def test_what_blocks_have_in_common_is_walked_once_a_pass(met: list[Any]) -> None:
    config = Common()
    model = nn.Sequential(*[Configured(config) for _ in range(8)])
    with revhooks.reversible(replay=Configured, ops=False) as run:
        model(torch.randn(3, WIDTH)).sum().backward()
    assert run.stats.replays > 4
    assert sum(thing is config for thing in met) == 1
    assert sum(thing is NOTED_BY_ALL for thing in met) == 1
    assert len(config.losses) == 8
    assert effects._shared._found == {}
    reference = weakref.ref(config)
    met.clear()
    del config, model
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("change", ["append", "another list", "another object", "a name", "a method", "nothing"])
def test_what_changes_between_two_replays_stays(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward's own code may write to it as well: each replay is undone to what was there before it."""
    config = Common()
    blocks = [Configured(config) for _ in range(6)]
    monkeypatch.setitem(globals(), "NOTED_BY_ALL", [])

    def act() -> None:
        if change == "append":
            config.losses.append(-1.0)
            config.nested["seen"].append(-1)
            NOTED_BY_ALL.append(-1.0)
        elif change == "another list":
            config.losses, config.nested = [*config.losses, -1.0], {"seen": [-1]}
        elif change == "another object":
            blocks[1].config = Common()
        elif change == "a name":
            monkeypatch.setitem(globals(), "NOTED_BY_ALL", [*NOTED_BY_ALL, -1.0])
        elif change == "a method":
            monkeypatch.setattr(Common, "note", lambda self, value: self.losses.append(value), raising=True)

    with revhooks.reversible(replay=Configured, ops=False):
        h = torch.randn(3, WIDTH)
        for place, block in enumerate(blocks):
            h = block(h)
            if place == 2:
                h = Between.apply(h, act)  # type: ignore[no-untyped-call]
        losses, seen, log = len(config.losses), len(config.nested["seen"]), len(NOTED_BY_ALL)
        h.sum().backward()
    more = int(change in ("append", "another list"))
    assert len(config.losses) == losses + more
    assert len(config.nested["seen"]) == (1 if change == "another list" else seen + int(change == "append"))
    assert len(NOTED_BY_ALL) == log + int(change in ("append", "a name"))
    if change == "another object":
        assert blocks[1].config is not config
        assert blocks[1].config.losses == []


def test_many_objects_of_a_block_are_not_walked_one_by_one(met: list[Any]) -> None:
    """Each leads to the same registry: it is met a few times in the first replay, and once in each other."""

    class State:
        def __init__(self, config: Common) -> None:
            self.config, self.count = config, [0]

    class Many(Configured):
        def __init__(self, config: Common) -> None:
            super().__init__(config)
            for place in range(20):
                setattr(self, f"state{place}", State(config))

        def forward(self, x: Tensor) -> Tensor:
            self.state3.count.append(1)
            return super().forward(x)

    config = Common()
    del config.nested["seen"][:]
    model = nn.Sequential(*[Many(config) for _ in range(8)])
    with revhooks.reversible(replay=Many, ops=False) as run:
        model(torch.randn(3, WIDTH)).sum().backward()
    assert run.stats.replays == 7
    assert sum(thing is config for thing in met) <= 8  # of the first; the others have it from there
    assert len(config.losses) == 8
    assert [len(block.state3.count) for block in model] == [2] * 8
