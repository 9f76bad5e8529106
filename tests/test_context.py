"""``reversible()`` as a context and as a decorator."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

import revhooks
from revhooks import nn as rnn
from revhooks.errors import RegistrationError
from revhooks.registry import ACTIVE
from revhooks.runtime.handles.local import packer
from tests.conftest import compare, mlp
from tests.devices import generator


def net(depth: int = 4) -> nn.Module:
    return nn.Sequential(*[rnn.AdditiveCoupling(mlp(4), mlp(4), dim=-1) for _ in range(depth)]).double()


X = torch.randn(3, 8, dtype=torch.float64, generator=generator(0))


def plain_grads(model: nn.Module, x: Tensor = X) -> list[Tensor]:
    return list(torch.autograd.grad(model(x).square().mean(), list(model.parameters())))


def same(a: list[Tensor], b: list[Tensor], tol: float = 1e-10) -> bool:
    return all(torch.allclose(x, y, rtol=tol, atol=tol) for x, y in zip(a, b, strict=True))


def assert_idle() -> None:
    assert ACTIVE.run is None
    assert packer() is None
    packed = []
    with torch.enable_grad():
        (torch.ones(1, requires_grad=True) * 1).exp()
    assert not packed


def test_around_forward_only() -> None:
    model = net()
    want = plain_grads(model)
    with revhooks.reversible() as run:
        loss = model(X).square().mean()
    assert_idle()
    assert run.stats.frames == 4
    loss.backward()
    assert same([p.grad for p in model.parameters() if p.grad is not None], want)


def test_around_a_training_loop() -> None:
    def train(reverse: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = net()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

        def loop() -> None:
            for _ in range(5):
                optimizer.zero_grad()
                model(X).square().mean().backward()
                optimizer.step()

        if reverse:
            with revhooks.reversible() as run:
                loop()
            assert run.stats.frames == 20
            assert run.stats.held_bytes == 0
        else:
            loop()
        return [p.detach() for p in model.parameters()]

    assert same(train(False), train(True), 1e-8)


def test_nested_contexts_are_scopes_of_their_own() -> None:
    model = net()
    want = plain_grads(model)
    with revhooks.reversible() as outer:
        h = model[:2](X)
        with revhooks.reversible() as inner:
            loss = model[2:](h).square().mean()
        assert ACTIVE.run is outer
        loss.backward()
    assert (outer.stats.frames, inner.stats.frames) == (2, 2)
    assert same([p.grad for p in model.parameters() if p.grad is not None], want)
    assert_idle()


def test_one_object_can_be_entered_again_and_inside_itself() -> None:
    context, model = revhooks.reversible(), net()
    want = plain_grads(model)
    for _ in range(2):
        with context as first:
            with context as second:
                grads = plain_grads(model)
            assert first is not second
            assert same(grads, want)
        assert same(plain_grads(model), want)
    assert_idle()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_usable_after_an_exception(error: type[BaseException]) -> None:
    class Fails(nn.Module):
        broken = True

        def forward(self, x: Tensor) -> Tensor:
            if self.broken:
                raise error("broken")
            return torch.tanh(x)

    model = net()
    model[2].g = Fails()
    with pytest.raises(error), revhooks.reversible():
        model(X)
    assert_idle()
    Fails.broken = False
    compare(model, X)


def test_decorates_a_forward_method() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net()

        @revhooks.reversible()
        def forward(self, x: Tensor) -> Tensor:
            """Doc."""
            assert ACTIVE.run is not None
            return self.body(x)

    model = Net()
    assert Net.forward.__doc__ == "Doc."
    got = plain_grads(model)
    assert_idle()
    assert same(got, plain_grads(model.body))


def test_decorates_a_training_step() -> None:
    model = net()

    @revhooks.reversible(guard="raise")
    def train(x: Tensor, *, scale: float) -> float:
        loss = model(x).square().mean() * scale
        loss.backward()
        return loss.item()

    assert train(X, scale=2.0) == pytest.approx(2 * model(X).square().mean().item())
    assert same([p.grad / 2 for p in model.parameters() if p.grad is not None], plain_grads(model))


def test_keep_excludes_blocks() -> None:
    model = net()
    for keep in (rnn.AdditiveCoupling, (rnn.AdditiveCoupling, nn.Linear), lambda module: True):
        with revhooks.reversible(keep=keep) as run:
            grads = plain_grads(model)
        assert run.stats.frames == 0
        assert same(grads, plain_grads(model))
    with revhooks.reversible(keep=lambda module: module is model[1]) as run:
        plain_grads(model)
    assert run.stats.frames == 3


@pytest.mark.parametrize(("options", "message"), [({"guard": "loud"}, "one of"), ({"keep": 3}, "a class")])
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(RegistrationError, match=message):
        revhooks.reversible(**options)  # type: ignore[arg-type]
    assert_idle()


def test_decorating_a_class_is_refused() -> None:
    with pytest.raises(RegistrationError, match="forward method"):
        revhooks.reversible()(nn.Linear)  # type: ignore[type-var]


def test_other_threads_are_not_affected() -> None:
    seen = []
    with revhooks.reversible():
        thread = threading.Thread(target=lambda: seen.append(ACTIVE.run))
        thread.start()
        thread.join()
    assert seen == [None]
