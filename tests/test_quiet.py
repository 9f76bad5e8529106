"""Which code is taken to leave nothing behind, and which is looked over before it is run again."""

from __future__ import annotations

import functools
import gc
import math
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import revhooks
from revhooks import quiet
from revhooks.buffers import modules_of
from revhooks.quiet import leaves_nothing
from revhooks.runtime.frames.interpose import shadowed

WIDTH = 4
SCALE = 2.0
LOG: list[float] = []
TOTAL = 0.0


def is_quiet(module: nn.Module, *reach: Any, facts: Any = None) -> bool:
    return leaves_nothing(modules_of((module,)), reach, SimpleNamespace(proof=None) if facts is None else facts)


class Body(nn.Module):
    """What the others are made of: it saves something behind what they do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.log: list[float] = []
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        self.note(h)
        return torch.tanh(self.b(h)) * h

    def note(self, h: Tensor) -> None:
        pass


# --------------------------------------------------------------------------------------------- quiet


def scaled(x: Tensor, by: float = 1.0) -> Tensor:
    return x * by * SCALE


class Attention(nn.Module):
    heads = 2

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.norm, self.drop, self.kernel = nn.Linear(WIDTH, 3 * WIDTH), nn.LayerNorm(WIDTH), nn.Dropout(0.1), (1, 1)
        self.activation = F.gelu
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True)) for _ in range(2))
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.record: list[float] = []  # which no code of a call names

    @property
    def factor(self) -> float:
        return 1 / math.sqrt(self.heads)

    @staticmethod
    def _split(x: Tensor) -> tuple[Tensor, ...]:
        return x.chunk(3, dim=-1)

    def forward(self, x: Tensor, *, deep: bool = True) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self._split(self.qkv(self.norm(x))))
        h = F.scaled_dot_product_attention(q, k, v, scale=self.factor).transpose(1, 2).flatten(2)
        with torch.no_grad():
            self.mean.mul_(0.9).add_(h.mean((0, 1)))
        if deep and self.training:
            for layer in self.layers:
                h = h + scaled(layer(h), by=0.5)
        h += self.drop(x)
        return self.activation(h)

    def reset(self) -> None:
        self.record.append(1.0)


QUIET: dict[str, Callable[[], nn.Module]] = {
    "layers": lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Dropout()),
    "convolutions": lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.GroupNorm(2, 4), nn.SiLU()),
    "recurrence": lambda: nn.LSTM(4, 4),
    "attention": Attention,
    "attention of torch": lambda: nn.MultiheadAttention(4, 2),
}


@pytest.mark.parametrize("name", QUIET)
def test_ordinary_code_is_quiet(name: str) -> None:
    assert is_quiet(QUIET[name]())


@pytest.mark.parametrize("make", [lambda: Attention(), lambda: Alias()], ids=["quiet", "not quiet"])
def test_what_stands_for_forward_in_a_call_does_not_count(make: Callable[[], nn.Module]) -> None:
    module = make()
    wanted = is_quiet(module)
    with shadowed([module], lambda child, proceed, args, kwargs: proceed(*args, **kwargs)):
        assert "forward" in vars(module)
        assert is_quiet(module) is wanted
    module.forward = functools.partial(type(module).forward, module)  # type: ignore[method-assign]
    with shadowed([module], lambda child, proceed, args, kwargs: proceed(*args, **kwargs)):
        assert not is_quiet(module)


@pytest.mark.parametrize(
    "make",
    [
        lambda: revhooks.nn.ActNorm(WIDTH),
        lambda: revhooks.nn.InvertibleLinear(WIDTH),
        lambda: revhooks.nn.ConvNet(WIDTH, WIDTH, 8),
        lambda: revhooks.nn.MLP(WIDTH, WIDTH),
        lambda: revhooks.nn.FlowSequential(revhooks.nn.ActNorm(WIDTH), revhooks.nn.Permute(WIDTH)),
    ],
)
def test_our_own_layers_are_quiet(make: Callable[[], nn.Module]) -> None:
    assert is_quiet(make())


class Logs(revhooks.nn.ActNorm):
    def _broadcast(self, x: Tensor) -> tuple[Tensor, Tensor]:
        LOG.append(1.0)
        return super()._broadcast(x)


class Listed(revhooks.nn.MLP):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        LOG.append(float(x.sum()))
        return super().forward(x, context)


@pytest.mark.parametrize("make", [lambda: Logs(WIDTH), lambda: Listed(WIDTH, WIDTH)], ids=["a method", "forward"])
def test_layers_of_users_that_extend_ours_are_read(make: Callable[[], nn.Module]) -> None:
    assert not is_quiet(make())


def test_quiet_code_is_not_looked_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("revhooks.runtime.calls.state.undone", None)
    net = nn.Sequential(*[Attention() for _ in range(3)])
    with revhooks.reversible(replay=Attention):
        net(torch.randn(2, 3, WIDTH)).sum().backward()
    branches = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(2)]
    with revhooks.reversible():
        revhooks.nn.AdditiveCoupling(*branches)(torch.randn(2, 2 * WIDTH)).sum().backward()


@pytest.mark.parametrize("argument", [None, 1, "a", (1, [torch.ones(2), {"a": 2.0}]), scaled, functools.partial(scaled, by=2.0)])
def test_plain_arguments(argument: Any) -> None:
    assert is_quiet(nn.ReLU(), argument)


@pytest.mark.parametrize("argument", [{1}, SimpleNamespace(a=1), nn.ReLU(), LOG.append, type("Row", (tuple,), {})((1,))])
def test_arguments_that_may_be_changed(argument: Any) -> None:
    assert not is_quiet(nn.ReLU(), (argument,))


# ------------------------------------------------------------------------------------------ not quiet


class Alias(Body):
    def note(self, h: Tensor) -> None:
        log = self.log
        log.append(float(h.detach().sum()))


class Added(Body):
    def note(self, h: Tensor) -> None:
        log = self.log
        log += [float(h.detach().sum())]


class Counts(Body):
    def note(self, h: Tensor) -> None:
        self.calls += 1


class Asked(Body):
    @property
    def size(self) -> int:
        self.log.append(1.0)
        return 1

    def note(self, h: Tensor) -> None:
        h.view(-1, self.size)


class Notes:
    def __get__(self, owner: Any, kind: Any) -> int:
        owner.log.append(1.0)
        return 1


class Described(Body):
    size = Notes()

    def note(self, h: Tensor) -> None:
        h.view(-1, self.size)


class Recorder:
    def __init__(self, log: list[float]) -> None:
        self.log = log

    def __call__(self, h: Tensor) -> None:
        self.log.append(float(h.detach().sum()))


class Called(Body):
    def __init__(self) -> None:
        super().__init__()
        self.recorder = Recorder(self.log)

    def note(self, h: Tensor) -> None:
        self.recorder(h)


class Partial(Body):
    def __init__(self) -> None:
        super().__init__()
        self.recorder = functools.partial(list.append, self.log)

    def note(self, h: Tensor) -> None:
        self.recorder(float(h.detach().sum()))


class Bound(Body):
    def __init__(self) -> None:
        super().__init__()
        self.keep = self.log.append

    def note(self, h: Tensor) -> None:
        self.keep(float(h.detach().sum()))


def counted(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapper(self: Any, *args: Any) -> Any:
        self.log.append(1.0)
        return method(self, *args)

    return wrapper


class Decorated(Body):
    @counted
    def note(self, h: Tensor) -> None:
        pass


class ByName(Body):
    def note(self, h: Tensor) -> None:
        setattr(self, "calls", getattr(self, "calls") + 1)  # noqa: B009, B010


class ByDictionary(Body):
    def note(self, h: Tensor) -> None:
        vars(self).update(calls=self.calls + 1)


class ByMethod(Body):
    def note(self, h: Tensor) -> None:
        object.__setattr__(self, "calls", self.calls + 1)


class ByItem(Body):
    def __init__(self) -> None:
        super().__init__()
        self.log = [0.0]

    def note(self, h: Tensor) -> None:
        self.log[0] += 1


class ByFormat(Asked):
    def note(self, h: Tensor) -> None:
        "{0.size}".format(self)  # noqa: UP030, UP032


class Global(Body):
    def note(self, h: Tensor) -> None:
        LOG.append(float(h.detach().sum()))


class GlobalAdded(Body):
    def note(self, h: Tensor) -> None:
        global LOG
        LOG += [float(h.detach().sum())]


class GlobalSum(Body):
    def note(self, h: Tensor) -> None:
        global TOTAL
        TOTAL += float(h.detach().sum())


class Default(Body):
    def note(self, h: Tensor, log: list[float] = LOG) -> None:
        log.append(float(h.detach().sum()))


def helper(h: Tensor) -> None:
    LOG.append(float(h.detach().sum()))


class Helped(Body):
    def note(self, h: Tensor) -> None:
        helper(h)


class OfClass(Body):
    kept: list[float] = LOG

    def note(self, h: Tensor) -> None:
        self.kept.append(float(h.detach().sum()))


class Attributes(Body):
    def note(self, h: Tensor) -> None:
        helper.calls = 1  # type: ignore[attr-defined]


class Running(Body):
    def __init__(self) -> None:
        super().__init__()
        self.total = torch.zeros(())

    def note(self, h: Tensor) -> None:
        self.total.add_(h.detach().sum())


class Logged(nn.Linear):
    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.log: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(float(x.detach().sum()))
        return super().forward(x)


class Subclass(Body):
    def __init__(self) -> None:
        super().__init__()
        self.b = Logged()


class Child(Body):
    """Writes into what a module has whose own code names nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        self.b.log = self.log

    def note(self, h: Tensor) -> None:
        self.b.log.append(float(h.detach().sum()))


class Callee(nn.Linear):
    def __call__(self, x: Tensor) -> Tensor:
        self.log.append(float(x.detach().sum()))
        return super().__call__(x)


class Calling(Body):
    def __init__(self) -> None:
        super().__init__()
        self.b = Callee(WIDTH, WIDTH)
        self.b.log = self.log


class Items(Body):
    def __getattr__(self, name: str) -> Any:
        if name == "size":
            self.log.append(1.0)
            return 1
        return super().__getattr__(name)

    def note(self, h: Tensor) -> None:
        h.view(-1, self.size)


class Imports(Body):
    def note(self, h: Tensor) -> None:
        import tests.test_quiet as here

        here.LOG.append(float(h.detach().sum()))


class Hidden(Body):
    """In a function in it."""

    def note(self, h: Tensor) -> None:
        [self.log.append(float(v)) for v in h.detach().flatten()[:1]]


class Convolution(nn.Conv1d):
    def _conv_forward(self, *args: Any) -> Tensor:
        LOG.append(1.0)
        return super()._conv_forward(*args)


class Mixin:
    def _conv_forward(self, *args: Any) -> Tensor:
        LOG.append(1.0)
        return super()._conv_forward(*args)  # type: ignore[misc]


class Mixed(Mixin, nn.Conv1d):
    pass


class Weighed(nn.Linear):
    @property
    def weight(self) -> Tensor:
        LOG.append(1.0)
        raise AttributeError  # the module looks for it where it is


class Moded(nn.Dropout):
    @property
    def training(self) -> bool:
        LOG.append(1.0)
        return True

    @training.setter
    def training(self, value: bool) -> None:
        pass


def within(make: Callable[[], nn.Module], *, convolves: bool = False) -> Callable[[], nn.Module]:
    def body() -> nn.Module:
        body = Body()
        body.b = nn.Sequential(nn.Unflatten(1, (1, WIDTH)), make(), nn.Flatten()) if convolves else make()
        return body

    return body


def patched_inside() -> nn.Module:
    convolution = nn.Conv1d(1, 1, 1)
    inner = convolution._conv_forward
    convolution._conv_forward = lambda *args: LOG.append(1.0) or inner(*args)  # type: ignore[method-assign, func-returns-value]
    return convolution


def closure() -> nn.Module:
    log: list[float] = []

    class Closure(Body):
        def note(self, h: Tensor) -> None:
            log.append(float(h.detach().sum()))

    body = Closure()
    body.log = log
    return body


def hooked() -> nn.Module:
    body = Body()
    body.b.register_forward_hook(lambda module, args, output: body.log.append(1.0))
    return body


def patched() -> nn.Module:
    body = Body()
    body.note = helper  # type: ignore[method-assign, assignment]
    return body


LOUD: dict[str, Callable[[], nn.Module]] = {
    kind.__name__: kind
    for kind in (
        *(Alias, Added, Counts, Asked, Described, Called, Partial, Bound, Decorated, ByName, ByDictionary, ByMethod, ByItem),
        *(ByFormat, Global, GlobalAdded, GlobalSum, Default, Helped, OfClass, Attributes, Running, Subclass, Child, Calling),
        *(Items, Imports, Hidden),
    )
} | {
    "closure": closure,
    "hook": hooked,
    "patched": patched,
    "helper of a layer": within(lambda: Convolution(1, 1, 1), convolves=True),
    "helper of a layer, from elsewhere": within(lambda: Mixed(1, 1, 1), convolves=True),
    "helper of a layer, of one of them": within(patched_inside, convolves=True),
    "weight": within(lambda: Weighed(WIDTH, WIDTH)),
    "mode": within(lambda: Moded(0.0)),
}


@pytest.fixture(autouse=True)
def _nothing_logged() -> Iterator[None]:
    yield
    LOG.clear()


@pytest.mark.parametrize("name", LOUD)
def test_code_that_may_leave_something_is_not_quiet(name: str) -> None:
    assert is_quiet(Body())
    assert not is_quiet(LOUD[name]())


@pytest.mark.parametrize("name", [name for name in LOUD if name != "mode"])  # which is asked for outside of calls, too
def test_what_it_leaves_is_what_plain_autograd_leaves(name: str) -> None:
    global TOTAL

    def left(context: Any) -> tuple[Any, ...]:
        global TOTAL
        LOG.clear()
        TOTAL = 0.0
        torch.manual_seed(0)
        body = LOUD[name]()
        with context:
            for _ in range(6):
                body(torch.linspace(-1, 1, 4 * WIDTH).reshape(4, WIDTH)).sum().backward()
        parts = [vars(part).get("log", []) for part in body.modules()]
        return len(LOG), TOTAL, body.calls, [list(part) for part in parts], float(vars(body).get("total", 0.0))

    plain = left(torch.enable_grad())
    assert left(revhooks.reversible(replay=Body)) == plain


# ------------------------------------------------------------------------------------- what comes later


def _hook(body: Body) -> None:
    body.b.register_forward_hook(lambda module, args, output: body.log.append(1.0))


def _pre_hook(body: Body) -> None:
    body.register_forward_pre_hook(lambda module, args: body.log.append(1.0))


def _forward(body: Body) -> None:
    def forward(x: Tensor) -> Tensor:
        body.log.append(1.0)
        return nn.Linear.forward(body.b, x)

    body.b.forward = forward  # type: ignore[method-assign]


def _method(body: Body) -> None:
    body.note = lambda h: body.log.append(1.0)  # type: ignore[method-assign]


def _class_attribute(body: Body) -> None:
    def note(self: Body, h: Tensor) -> None:
        self.log.append(1.0)

    type(body).note = note  # type: ignore[method-assign]


def _property(body: Body) -> None:
    type(body).a = property(lambda self: self.log.append(1.0) or self._modules["a"])  # type: ignore[assignment, method-assign]


def _kind(body: Body) -> None:
    body.__class__ = type("Other", (Alias,), {})


def _child(body: Body) -> None:
    body.b = Logged()


LATER = {f.__name__[1:]: f for f in (_hook, _pre_hook, _forward, _method, _class_attribute, _property, _kind, _child)}


def _fresh() -> Body:
    return type("Fresh", (Body,), {"note": lambda self, h: None})()


@pytest.mark.parametrize("name", LATER)
def test_what_comes_later_is_seen(name: str) -> None:
    body, facts = _fresh(), SimpleNamespace(proof=None)
    assert is_quiet(body, facts=facts)
    assert is_quiet(body, facts=facts)
    LATER[name](body)
    assert not is_quiet(body, facts=facts)


@pytest.mark.parametrize("name", LATER)
def test_what_comes_later_leaves_what_plain_autograd_leaves(name: str) -> None:
    def left(context: Any) -> list[int]:
        body = _fresh()
        for step in range(4):
            if step == 2:
                LATER[name](body)
            with context():
                body(torch.ones(2, WIDTH)).sum().backward()
        return [len(vars(part).get("log", [])) for part in body.modules()]

    assert left(lambda: revhooks.reversible(replay=Body)) == left(torch.enable_grad)


def test_globals_are_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    facts, module = SimpleNamespace(proof=None), Attention()
    assert is_quiet(module, facts=facts)
    monkeypatch.setitem(globals(), "SCALE", [2.0])
    assert not is_quiet(module, facts=facts)
    monkeypatch.undo()
    facts.proof = None
    assert is_quiet(module, facts=facts)
    monkeypatch.setitem(globals(), "scaled", lambda x, by: LOG.append(1.0) or x)
    assert not is_quiet(module, facts=facts)


def test_layers_of_torch_that_are_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    facts, module = SimpleNamespace(proof=None), nn.Sequential(nn.Linear(4, 4))
    assert is_quiet(module, facts=facts)
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: LOG.append(1.0) or forward(self, x))
    assert not is_quiet(module, facts=facts)
    monkeypatch.setattr(nn.Linear, "forward", functools.wraps(forward)(lambda self, x: LOG.append(1.0) or forward(self, x)))
    assert not is_quiet(module)


def test_layers_of_torch_that_are_bracketed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Linear, "forward", nn.Linear.forward)  # for the time of this test
    revhooks.register(nn.Linear, inverse=lambda module, y: y)
    try:
        assert is_quiet(nn.Sequential(nn.Linear(4, 4)))
        assert not is_quiet(Weighed(WIDTH, WIDTH))
        forward = nn.Linear.forward  # whose marks are taken over by what wraps it
        monkeypatch.setattr(nn.Linear, "forward", functools.wraps(forward)(lambda self, x: LOG.append(1.0) or forward(self, x)))
        assert not is_quiet(nn.Sequential(nn.Linear(4, 4)))
        monkeypatch.setattr(nn.Linear, "forward", forward)
    finally:
        revhooks.unregister(nn.Linear)


def test_hooks_of_all_modules() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: LOG.append(1.0))
    try:
        assert not is_quiet(nn.ReLU())
    finally:
        handle.remove()
    assert is_quiet(nn.ReLU())


class Tagged(Tensor):
    """A tensor that notes what is done to it."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        LOG.append(1.0)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_tensors_of_other_classes() -> None:
    assert not is_quiet(nn.ReLU(), (torch.ones(2).as_subclass(Tagged),))


def test_functions_by_turns() -> None:
    facts, module = SimpleNamespace(proof=None), nn.ReLU()
    for _ in range(3 * quiet._MOST):
        assert is_quiet(module, scaled, facts=facts)
        assert is_quiet(module, Attention._split, facts=facts)
    assert facts.proof.count == 1


def test_code_that_keeps_changing_is_given_up() -> None:
    facts, module = SimpleNamespace(proof=None), nn.ReLU()
    for _ in range(quiet._MOST):
        assert is_quiet(module, lambda x: x, facts=facts)
    assert not is_quiet(module, lambda x: x, facts=facts)


def test_nothing_is_kept_alive() -> None:
    def use() -> weakref.ref[type]:
        kind = type("Gone", (Body,), {"note": lambda self, h: None})
        body = kind()
        with revhooks.reversible(replay=Body):
            body(torch.ones(2, WIDTH)).sum().backward()
        return weakref.ref(kind)

    gone = use()
    gc.collect()
    assert gone() is None
