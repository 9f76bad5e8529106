"""Third-party inverses of every kind: how they are called, what they give back, which branches they repeat, what they cost."""

from __future__ import annotations

import copy
import functools
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revhooks
from revhooks.errors import FallbackWarning, RegistrationError
from revhooks.registry import entries_of, lookup
from tests.conftest import Count, mlp

D = torch.float64
X = torch.randn(8, 8, dtype=D, generator=torch.Generator().manual_seed(0))
A, B = X[:, :4].clone(), X[:, 4:].clone()


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = mlp(4), mlp(4)

    def go(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        a = a + self.f(b)
        return a, b + self.g(a)

    def back(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        b = b - self.g(a)
        return a - self.f(b), b


def tensors(tree: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, Tensor)]


Apply = Callable[[nn.Module, Any], Any]


def compare(
    kind: Callable[[], nn.Module], inputs: Any, apply: Apply, depth: int = 5, tol: float = 1e-10, **options: Any
) -> tuple[nn.ModuleList, Any]:
    """Two steps of a chain, plain and reversible: same gradients, nothing left; the blocks and stats of the last one."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(kind() for _ in range(depth)).double()

    def loss() -> Tensor:
        state, total = inputs, torch.zeros((), dtype=D)
        for block in blocks:
            state, extra = apply(block, state)
            total = total + sum((t.square().mean() for t in tensors(extra)), torch.zeros((), dtype=D))
        return total + sum((t.square().mean() for t in tensors(state)), torch.zeros((), dtype=D))

    want = torch.autograd.grad(loss(), list(blocks.parameters()))
    stats = None
    for _ in range(2):
        blocks.zero_grad()
        for module in blocks.modules():
            if isinstance(module, Count):
                module.calls = 0
        with revhooks.reversible(**{"guard": "raise", **options}) as run:
            loss().backward()
        for parameter, expected in zip(blocks.parameters(), want, strict=True):
            assert parameter.grad is not None
            assert (parameter.grad - expected).abs().max() <= tol * (1 + expected.abs().max())
        stats = run.stats
    assert stats is not None
    assert stats.held_bytes == 0
    return blocks, stats


def evaluations(blocks: nn.Module) -> list[int]:
    return [m.calls for m in blocks.modules() if isinstance(m, Count)]


class Streams(Base):
    """Two streams in, two streams and a log-det out."""

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b = self.go(a, b)
        return a, b, b.sum(1)

    def inverse(self, a: Tensor, b: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        return self.back(a, b)


class WithoutLogDet(Streams):
    def inverse(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self.back(a, b)


class AsOneTuple(Streams):
    def inverse(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self.back(*outputs[:2])


class ReturnsLogDet(Streams):
    def inverse(self, a: Tensor, b: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        return *self.back(a, b), -b.sum(1)


class ReturnsList(Streams):
    def inverse(self, a: Tensor, b: Tensor, _: Tensor) -> list[Tensor]:  # type: ignore[override]
        return list(self.back(a, b))


class Conditioned(Base):
    """A third argument is held, and one that is no tensor."""

    def forward(self, a: Tensor, b: Tensor, c: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        a, b = self.go(a, b + scale * c)
        return a, b, (a * c).sum(1)

    def inverse(self, a: Tensor, b: Tensor, _: Tensor, c: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        a, b = self.back(a, b)
        return a, b - scale * c


class Fewer(Base):
    """The inverse gets both outputs and returns the first input only; the second one is held."""

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a + self.f(b) + self.g(b), b * 2

    def inverse(self, a: Tensor, b: Tensor) -> Tensor:
        b = b / 2
        return a - self.f(b) - self.g(b)


class PassesOn(Base):
    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return b + self.f(a) + self.g(a), a

    def inverse(self, y: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        return a, y - self.f(a) - self.g(a)


class Lists(Base):
    """As FrEIA: lists in, lists out."""

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return list(self.go(*xs))

    def inverse(self, ys: list[Tensor]) -> list[Tensor]:
        return list(self.back(*ys))


class ListsAndJacobian(Base):
    """As FrEIA's blocks: a list in, a tuple and a log-det out, one method for both directions."""

    def forward(self, xs: list[Tensor], rev: bool = False) -> tuple[tuple[Tensor, ...], Tensor]:
        y = self.back(*xs) if rev else self.go(*xs)
        return y, y[0].sum(1)


class Dicts(Base):
    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        a, b = self.go(x["a"], x["b"])
        return {"b": b, "a": a}

    def inverse(self, y: dict[str, Tensor]) -> dict[str, Tensor]:
        a, b = self.back(y["a"], y["b"])
        return {"b": b, "a": a}


PAIR = (A, B)
SIGNATURES: dict[str, tuple[type, dict[str, Any], Any, Apply]] = {
    "streams": (Streams, {}, PAIR, lambda m, h: ((y := m(*h))[:2], y[2])),
    "without the log-det": (WithoutLogDet, {}, PAIR, lambda m, h: ((y := m(*h))[:2], y[2])),
    "as one tuple": (AsOneTuple, {}, PAIR, lambda m, h: ((y := m(*h))[:2], y[2])),
    "a log-det behind": (ReturnsLogDet, {}, PAIR, lambda m, h: ((y := m(*h))[:2], y[2])),
    "a list back": (ReturnsList, {}, PAIR, lambda m, h: ((y := m(*h))[:2], y[2])),
    "conditioned": (Conditioned, {}, PAIR, lambda m, h: ((y := m(*h, A, 0.3))[:2], y[2])),
    "by keyword": (Conditioned, {}, PAIR, lambda m, h: ((y := m(scale=0.3, c=A, b=h[1], a=h[0]))[:2], y[2])),
    "half by keyword": (Conditioned, {}, PAIR, lambda m, h: ((y := m(h[0], scale=0.3, c=A, b=h[1]))[:2], y[2])),
    "passed on": (PassesOn, {}, PAIR, lambda m, h: (m(*h), ())),
    "lists": (Lists, {}, [A, B], lambda m, h: (m(h), ())),
    "lists by keyword": (Lists, {}, [A, B], lambda m, h: (m(xs=h), ())),
    "one method": (
        ListsAndJacobian,
        {"inverse": lambda m, out: m(list(out[0]), rev=True)[0]},
        [A, B],
        lambda m, h: (list((y := m(h))[0]), y[1]),
    ),
    "dicts": (Dicts, {}, {"a": A, "b": B}, lambda m, h: (m(h), ())),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str, registered: Any, no_gc: None) -> None:
    kind, options, inputs, apply = SIGNATURES[name]
    registered(kind, **{"inverse": "inverse", **options})
    blocks, stats = compare(kind, inputs, apply)
    assert stats.inversions == 3
    assert stats.second_evaluations == 0
    assert evaluations(blocks) == [2] * 8 + [1] * 2


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_same_as_functions(name: str) -> None:
    """`checkpoint` with an inverse learns the same."""
    kind, options, inputs, apply = SIGNATURES[name]

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = kind()

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            inverse = options.get("inverse")
            back = functools.partial(inverse, self.inner) if inverse is not None else self.inner.inverse
            if isinstance(inputs, tuple) and inverse is None and name != "as one tuple":
                return revhooks.checkpoint(self.inner, *args, inverse=lambda out, *a, **k: back(*out, *a, **k), **kwargs)
            return revhooks.checkpoint(self.inner, *args, inverse=back, **kwargs)

    if name == "without the log-det":
        pytest.skip("a function gets the output as it is")
    compare(Block, inputs, apply)


def test_an_inverse_that_returns_fewer_inputs_than_it_gets(registered: Any) -> None:
    registered(Fewer, inverse="inverse")
    blocks, stats = compare(Fewer, PAIR, lambda m, h: (m(*h), ()))
    assert stats.inversions == 3
    assert evaluations(blocks) == [2] * 8 + [1] * 2


def test_what_is_passed_on_may_be_anything(registered: Any) -> None:
    """A leaf, an argument that is held, a tensor that a layer outside saves as well."""
    registered(PassesOn, inverse="inverse")
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    torch.manual_seed(0)
    blocks = nn.ModuleList(PassesOn() for _ in range(4)).double()

    def grads() -> list[Tensor]:
        x, y, total = a, b, torch.zeros((), dtype=D)
        for block in blocks:
            x, y = block(x, y)
            total = total + (y.exp() * x).sum()
        return list(torch.autograd.grad(total + x.sum(), [a, b, *blocks.parameters()]))

    want = grads()
    for _ in range(2):
        with revhooks.reversible(guard="raise") as run:
            got = grads()
        assert all(torch.allclose(g, w, rtol=1e-10, atol=1e-10) for g, w in zip(got, want, strict=True))
        assert run.stats.held_bytes == 0


def test_what_is_passed_on_is_not_held(registered: Any) -> None:
    registered(PassesOn, inverse="inverse")
    held = []
    for depth in (4, 8):
        blocks = nn.ModuleList(PassesOn() for _ in range(depth)).double()
        with revhooks.reversible() as run:
            x, y = A * 2, B * 2
            for block in blocks:
                x, y = block(x, y)
            held.append(run.stats.held_bytes)
            (x.sum() + y.sum()).backward()
    assert held[0] == held[1]


class Slow(nn.Module):
    """One net a dimension; the inverse fills a buffer of its own, whose beginning the nets have seen."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.nets = nn.ModuleList(Count(nn.Sequential(nn.Linear(i, 8), nn.Tanh(), nn.Linear(8, 2))) for i in range(1, width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        parts, total = [x[:, 0]], torch.zeros(len(x), dtype=x.dtype)
        for i, net in enumerate(self.nets, 1):
            s, t = net(x[:, :i]).unbind(1)
            parts.append(x[:, i] * s.exp() + t)
            total = total + s
        return torch.stack(parts, 1), total

    def inverse(self, z: Tensor, _: Tensor) -> Tensor:
        x = torch.zeros_like(z)
        x[:, 0] = z[:, 0]
        for i, net in enumerate(self.nets, 1):
            s, t = net(x[:, :i]).unbind(1)
            x[:, i] = (z[:, i] - t) * torch.exp(-s)
        return x


def test_an_inverse_that_fills_a_buffer_of_its_own(registered: Any, no_gc: None) -> None:
    registered(Slow, inverse="inverse")
    blocks, stats = compare(Slow, A, lambda m, h: m(h))
    assert stats.inversions == 3
    assert stats.second_evaluations == 0
    assert evaluations(blocks) == [2] * 12 + [1] * 3


def test_an_inverse_that_begins_to_write_later(registered: Any) -> None:
    """The first try has not shown it: the branch is run again."""

    class Later(Base):
        writes = False

        def forward(self, x: Tensor) -> tuple[Tensor, tuple[()]]:
            return torch.cat(self.go(*x.chunk(2, 1)), 1), ()

        def inverse(self, y: Tensor) -> Tensor:
            a, b = (part.clone() for part in y.chunk(2, 1))
            b = b - self.g(a)
            x = a - self.f(b)
            if Later.writes:
                a.zero_()
            return torch.cat([x, b], 1)

    registered(Later, inverse=lambda m, out: m.inverse(out[0]))
    torch.manual_seed(0)
    compare(Later, X, lambda m, h: m(h))
    blocks = nn.ModuleList(Later() for _ in range(4)).double()

    def grads() -> list[Tensor]:
        h = X
        for block in blocks:
            h = block(h)[0]
        return list(torch.autograd.grad(h.square().mean(), list(blocks.parameters())))

    want = grads()
    for writes in (False, True):
        Later.writes = writes
        with revhooks.reversible(guard="raise") as run:
            got = grads()
        assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(got, want, strict=True))
        assert run.stats.second_evaluations == (2 if writes else 0)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return torch.cat([b + self.net(a), a], 1)

    def reverse(self, y: Tensor) -> Tensor:
        b, a = y.chunk(2, 1)
        return torch.cat([a, b - self.net(a)], 1)


class Outer(nn.Module):
    """As normflows and others: the net is a grandchild, and the inverse reaches it by a method of the child."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def reverse(self, y: Tensor) -> Tensor:
        return self.inner.reverse(y)


class Backwards(Outer):
    """The other way round: forward goes past the child's ``forward``, the inverse through it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner.reverse(x)

    def reverse(self, y: Tensor) -> Tensor:
        return self.inner(y)


class ByMethods(Outer):
    """Neither goes through it."""

    def forward(self, x: Tensor) -> Tensor:
        return Inner.forward(self.inner, x)


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.ModuleDict({"one": Outer(), "two": Outer()})

    def forward(self, x: Tensor) -> Tensor:
        return self.outer["two"](self.outer["one"](x))

    def reverse(self, y: Tensor) -> Tensor:
        return self.outer["one"].reverse(self.outer["two"].reverse(y))  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("kind", [Inner, Outer, Backwards, ByMethods, Deep])
def test_branches_at_any_depth(kind: type, registered: Any, no_gc: None) -> None:
    registered(kind, inverse="reverse")
    blocks, stats = compare(kind, X, lambda m, h: (m(h), ()), depth=6)
    per_block = len(evaluations(blocks)) // 6
    assert stats.inversions == 4
    assert stats.second_evaluations == 0
    assert evaluations(blocks) == [2] * 5 * per_block + [1] * per_block


@pytest.mark.parametrize(
    "branches", ["inner.net", ("inner.net",), Count, (Count,), lambda block: [block.inner.net], lambda block: (block.inner.net,)]
)
def test_branches_by_choice(branches: Any, registered: Any) -> None:
    """From the first step on."""
    registered(Outer, inverse="reverse", branches=branches)
    blocks = nn.Sequential(*[Outer() for _ in range(6)]).double()
    with revhooks.reversible(guard="raise") as run:
        blocks(X).sum().backward()
    assert run.stats.second_evaluations == 0
    assert evaluations(blocks) == [2] * 5 + [1]


def test_branches_have_to_be_something(registered: Any) -> None:
    with pytest.raises(RegistrationError, match="branches="):
        revhooks.register(Outer, inverse="reverse", branches=3)  # type: ignore[arg-type]


def test_second_evaluations_are_counted(registered: Any) -> None:
    """In the first step, which finds the branches out, in an inverse that is run for its input only, and of iterations."""
    registered(Outer, inverse="reverse")
    blocks = nn.Sequential(*[Outer() for _ in range(6)]).double()
    with revhooks.reversible() as run:
        blocks(X).sum().backward()
    tried = 6  # in forward, where the inverse is tried for the first time: these are no rebuilds
    assert sum(evaluations(blocks)) == 6 + tried + 5 + run.stats.second_evaluations
    assert run.stats.second_evaluations == 4


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = Count(nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 4)))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return torch.cat([b + self.f(a), a], 1)

    def inverse(self, y: Tensor) -> Tensor:
        b, a = y.chunk(2, 1)
        return torch.cat([a, b - self.f(a)], 1)


class Chain(nn.Module):
    def __init__(self, depth: int = 8) -> None:
        super().__init__()
        self.parts: Any = nn.ModuleList(Part() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x

    def inverse(self, y: Tensor) -> Tensor:
        for part in reversed(self.parts):
            y = part.inverse(y)
        return y


class InSequence(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(*self.parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.parts(x)


def held_share(model: nn.Module, **options: Any) -> tuple[float, Any]:
    x = torch.randn(64, 8, dtype=D)
    want = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    for _ in range(2):
        with revhooks.reversible(guard="raise", **options) as run:
            loss = model(x).square().sum()
            share = run.stats.held_bytes / run.stats.packed_bytes
            got = torch.autograd.grad(loss, list(model.parameters()))
        assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-10) for a, b in zip(got, want, strict=True))
    return share, run.stats


@pytest.mark.parametrize("kind", [Chain, InSequence])
def test_a_container_of_registered_parts_inverts_them(kind: type, registered: Any) -> None:
    model = kind().double()
    registered(Part, inverse="inverse")
    alone, _ = held_share(model)
    registered(kind, inverse="inverse")
    share, stats = held_share(model)
    assert share == alone < 0.3
    assert (stats.frames, stats.inversions) == (8, 6)


def test_a_container_whose_branches_are_named_is_inverted_itself(registered: Any) -> None:
    registered(Part, inverse="inverse")
    registered(Chain, inverse="inverse", branches=Count)
    model = nn.Sequential(Chain(2), Chain(2), Chain(2)).double()
    with revhooks.reversible(guard="raise") as run:
        model(X).sum().backward()
    assert (run.stats.frames, run.stats.inversions, run.stats.second_evaluations) == (3, 1, 0)


def test_a_named_container_of_named_parts() -> None:
    model = Chain().double()
    alone, _ = held_share(model, replay=Part)
    share, stats = held_share(model, replay=(Part, Chain))
    assert share <= alone < 0.5
    assert stats.replays == 8
    two = nn.Sequential(Chain(), Chain()).double()
    share, _ = held_share(two, replay=(Part, Chain))
    assert share < alone
    share, _ = held_share(nn.Sequential(two, two), replay=(Part, Chain, nn.Sequential))
    assert share < 0.6


class Scale(nn.Module):
    """Both directions are trained: by likelihood and by sampling."""

    def __init__(self) -> None:
        super().__init__()
        self.f = Count(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        a, b = z.chunk(2, 1)
        s = self.f(a)
        return torch.cat([a, b * s.exp()], 1), s.sum(1)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, 1)
        s = self.f(a)
        return torch.cat([a, b * (-s).exp()], 1), -s.sum(1)

    def ladj(self, z: Tensor) -> Tensor:
        return self.forward(z)[1]


def test_both_directions_of_a_class(registered: Any) -> None:
    original = Scale.forward, Scale.inverse
    registered(Scale, method="inverse", inverse=lambda m, out: m.forward(out[0])[0])
    revhooks.register(Scale, method="forward", inverse=lambda m, out: m.inverse(out[0])[0])
    with pytest.raises(RegistrationError, match="second registration"):
        revhooks.register(Scale, method="inverse", inverse="forward")
    for apply in (lambda m, h: m(h), lambda m, h: m.inverse(h)):
        blocks, stats = compare(Scale, X, apply)
        assert stats.inversions == 3
        assert evaluations(blocks) == [2] * 4 + [1]
    torch.manual_seed(0)
    blocks, stats = compare(Scale, X, lambda m, h: ((y := m(h))[0], (y[1], m.inverse(h.cos())[1])))
    assert stats.inversions >= 3
    assert [entry.method for entry in entries_of(Scale)] == ["forward", "inverse"]
    assert lookup(Scale) is revhooks.registered(Scale) is lookup(Scale, "forward")
    assert revhooks.registered(Scale, method="inverse") is lookup(Scale, "inverse")
    revhooks.unregister(Scale, method="inverse")
    assert Scale.inverse is original[1]
    assert lookup(Scale, "inverse") is None
    assert Scale.forward is not original[0]
    with pytest.raises(RegistrationError, match="registered method"):
        revhooks.unregister(Scale, method="inverse")
    revhooks.register(Scale, method="inverse", inverse="forward")
    revhooks.unregister(Scale)
    assert (Scale.forward, Scale.inverse) == original
    assert lookup(Scale) is None


def test_check_tries_the_registered_method(registered: Any) -> None:
    registered(Scale, method="inverse", inverse=lambda m, out: m.forward(out[0])[0])
    result = revhooks.check(Scale().double(), X)
    assert result, result
    assert result.inverse_error < 1e-12
    revhooks.register(Scale, inverse=lambda m, out: m.inverse(out[0])[0] * 1.1)
    with pytest.warns(FallbackWarning):
        assert not revhooks.check(Scale().double(), X)
    assert revhooks.check(Scale().double().inverse, X)


@pytest.mark.parametrize("name", SIGNATURES)
def test_check_calls_inverses_as_the_runtime_does(name: str, registered: Any) -> None:
    kind, options, inputs, apply = SIGNATURES[name]
    registered(kind, **{"inverse": "inverse", **options})

    class Caller(nn.Module):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            result = revhooks.check(kind().double(), *args, **kwargs)
            assert result, result
            assert result.inverse_error < 1e-10
            return kind().double()(*args, **kwargs)

    apply(Caller(), inputs)


def test_check_compares_the_log_det(registered: Any) -> None:
    registered(Scale, inverse=lambda m, out: m.inverse(out[0])[0], log_det="ladj")
    result = revhooks.check(Scale().double(), X)
    assert result, result
    assert result.log_det_error is not None
    assert result.log_det_error < 1e-10
    assert "log-det error" in str(result)
    revhooks.unregister(Scale)

    class Wrong(Scale):
        def ladj(self, z: Tensor) -> Tensor:
            return super().ladj(z) + 0.1

    registered(Wrong, inverse=lambda m, out: m.inverse(out[0])[0], log_det="ladj")
    result = revhooks.check(Wrong().double(), X)
    assert not result
    assert "Jacobian" in result.problems[0]


class Raises(Base):
    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.go(a, b)

    def inverse(self, *outputs: Tensor) -> tuple[Tensor, Tensor]:
        a, b = outputs[0], outputs[1]
        return self.back(a, b + None)  # type: ignore[operator]


def test_the_first_real_reason_is_told(registered: Any) -> None:
    registered(Raises, inverse="inverse")
    blocks = nn.ModuleList(Raises() for _ in range(2)).double()

    @revhooks.reversible()
    def forward() -> None:
        a, b = PAIR
        for block in blocks:
            a, b = block(a, b)

    with pytest.warns(FallbackWarning, match="unsupported operand type") as warned:
        forward()
    assert len(warned) == 2


def test_an_inverse_that_fits_nowhere(registered: Any) -> None:
    class Odd(Raises):
        def inverse(self, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return self.back(a, b)

    registered(Odd, inverse="inverse")
    with pytest.warns(FallbackWarning, match="no way of calling it fits its signature"), revhooks.reversible():
        Odd().double()(A, B)


def test_an_instance_attribute_forward(registered: Any, no_gc: None) -> None:
    """What stands on the instance is called, of a block and of a branch; what it calls of the class is a block."""
    registered(Inner, inverse="reverse")
    calls = []

    def block_with(kind: str) -> nn.Module:
        block = Inner()
        if kind == "wrapped":
            forward = block.forward
            block.forward = lambda x: (calls.append(1), forward(x) * 1)[1]  # type: ignore[method-assign, assignment]
        elif kind == "other":
            block.forward = lambda x: torch.cat([block.net(part) for part in x.chunk(2, 1)], 1)  # type: ignore[method-assign, assignment, union-attr]
        elif kind == "branch":
            inner = block.net.forward
            block.net.forward = lambda x: 2 * inner(x)  # type: ignore[method-assign, assignment]
        return block

    for kind in ("wrapped", "other", "branch"):
        before = None

        def make(kind: str = kind) -> nn.Module:
            nonlocal before
            block = block_with(kind)
            before = (block.net if kind == "branch" else block).__dict__["forward"]
            return block

        blocks, stats = compare(make, X, lambda m, h: (m(h), ()))
        last = blocks[-1].net if kind == "branch" else blocks[-1]
        assert last.__dict__["forward"] is before  # type: ignore[union-attr]
        assert stats.frames == (0 if kind == "other" else 5)
    assert len(calls) == 3 * 5


class Expensive(nn.Module):
    """A fixed point, or D passes."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.net = Count(
            nn.Sequential(nn.Linear(8, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 8))
        )
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.mul_(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)

    def inverse(self, y: Tensor) -> Tensor:
        x = y
        for _ in range(60):
            x = y - self.net(x)
        return x


@pytest.mark.parametrize(("hidden", "cost", "inverts"), [(128, 60, False), (128, 0, True), (8, 60, True), (128, 0.01, True)])
def test_cost_decides_between_inverting_and_replaying(hidden: int, cost: float, inverts: bool, registered: Any) -> None:
    registered(Expensive, inverse="inverse", cost=cost)
    blocks, stats = compare(lambda: Expensive(hidden), X, lambda m, h: (m(h), ()), tol=1e-9)
    assert stats.inversions == (3 if inverts else 0)
    if not inverts:
        assert evaluations(blocks) == [2] * 4 + [1]
        assert stats.peak_held_bytes < 0.5 * stats.packed_bytes


def test_an_inverse_of_many_steps_holds_the_graph_of_one(registered: Any) -> None:
    """Whatever each step saves is gone when the next one runs."""
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = [0]

    class Marks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            class Thing:
                pass

            ctx.thing = Thing()
            alive.add(ctx.thing)
            most[0] = max(most[0], len(alive))
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            return grad

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            nn.init.orthogonal_(self.linear.weight, 0.4)

        def forward(self, x: Tensor) -> Tensor:
            return Marks.apply(torch.tanh(self.linear(x)))

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.net(x)

        def inverse(self, y: Tensor) -> Tensor:
            x = y
            for _ in range(60):
                x = y - self.net(x)
            return x

    registered(Fixed, inverse="inverse")
    blocks = nn.Sequential(*[Fixed() for _ in range(5)]).double()
    with revhooks.reversible(guard="raise") as run:
        loss = blocks(X).square().sum()
        before, most[0] = len(alive), len(alive)
        peak = run.stats.held_bytes
        loss.backward()
    assert run.stats.inversions == 3
    assert most[0] <= before + 1  # of the step that fills the slots
    assert run.stats.peak_held_bytes <= peak + 8 * X.nbytes


def test_the_users_modules_are_left_alone(registered: Any) -> None:
    registered(Outer, inverse="reverse")
    blocks = nn.Sequential(*[Outer() for _ in range(4)]).double()
    keys = list(blocks.state_dict())
    with revhooks.reversible():
        blocks(X).sum().backward()
        copied = pickle.loads(pickle.dumps(copy.deepcopy(blocks)))
        blocks(X).sum().backward()
        copied(X).sum().backward()
    assert list(blocks.state_dict()) == keys
    assert all("forward" not in vars(module) for module in [*blocks.modules(), *copied.modules()])


class InPlaceOneWay(Base):
    """One direction of it changes its input in place, and the other does not."""

    def forward(self, x: Tensor, rev: bool = False) -> Tensor:
        if not rev:
            return torch.cat(self.go(*(x * 2).chunk(2, 1)), 1)
        x.mul_(0.5)
        return torch.cat(self.back(*x.chunk(2, 1)), 1)


def _other_way(block: InPlaceOneWay, y: Tensor, rev: bool = False) -> Tensor:
    parts = y.chunk(2, 1)
    return torch.cat(block.go(*parts), 1) * 2 if rev else torch.cat(block.back(*parts), 1) * 0.5


def test_a_block_that_changes_its_input_in_one_direction_only(registered: Callable[..., None]) -> None:
    """The block before it is kept where it does, from the first step on."""
    registered(InPlaceOneWay, inverse=_other_way)
    blocks = [InPlaceOneWay().double() for _ in range(3)]
    others = copy.deepcopy(blocks)

    def loss(blocks: list[InPlaceOneWay]) -> Tensor:
        x = X.clone()
        for block in blocks:
            x = block(x)
        for block in reversed(blocks):
            x = block(x, rev=True)
        return x.square().mean()

    for _ in range(2):
        for block in (*blocks, *others):
            block.zero_grad()
        loss(others).backward()
        with revhooks.reversible():
            loss(blocks).backward()
        for a, b in zip(nn.ModuleList(blocks).parameters(), nn.ModuleList(others).parameters(), strict=True):
            assert a.grad is not None
            assert b.grad is not None
            assert torch.allclose(a.grad, b.grad, rtol=1e-10, atol=1e-12)
