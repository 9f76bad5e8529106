"""Hooks of a run step aside for a backward pass: for each node the engine would copy them; functions of users get them back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import revhooks
from revhooks.runtime.handles.local import top_hooks


def top() -> Any:
    """Whose the hooks on top are."""
    hooks = top_hooks(False)
    return None if hooks is None else getattr(hooks[0], "__self__", hooks[0])


class Looks(torch.autograd.Function):
    """Its backward calls a function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, look: Callable[[], None]) -> Tensor:
        ctx.look = look
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.look()
        return gradients[0], None


def seen(x: Tensor, found: list[Any]) -> Tensor:
    """The same tensor, whose gradient notes whose the hooks on top are."""
    y = x * 1
    y.register_hook(lambda _: found.append(top()))
    return y


def test_they_are_gone_in_backward_and_back_after_it() -> None:
    x, found = torch.ones(3, requires_grad=True), list[Any]()
    with revhooks.reversible(), revhooks.reversible() as run:
        seen(x, found).exp().sum().backward()
        torch.autograd.grad(seen(x, found).exp().sum(), x)
        assert found == [None, None]
        assert top() is run
        y = seen(x, found).exp()
        torch.autograd.grad(y.sum(), x, create_graph=True)
    assert found[2] is run
    assert top() is None


def test_they_are_back_after_an_error() -> None:
    def fail() -> None:
        raise ValueError("of the user's")

    with revhooks.reversible() as run:
        for _ in range(2):
            with pytest.raises(ValueError, match="of the user's"):
                Looks.apply(torch.ones(3, requires_grad=True), fail).sum().backward()
            assert top() is run


def test_a_function_of_the_users_gets_them() -> None:
    found: list[Any] = []
    x = torch.ones(3, requires_grad=True)
    with revhooks.reversible(), revhooks.reversible() as run:
        seen(Looks.apply(seen(x, found), lambda: found.append(top())), found).sum().backward()
        Looks.apply(x, lambda: found.append(top())).sum().backward()  # a root itself
    assert [one is run for one in found] == [False, True, False, True]
    with revhooks.reversible():
        loss = Looks.apply(x, lambda: found.append(top())).sum()
    loss.backward()  # outside: nothing was there that could be given back
    assert found[-1] is None


def test_hooks_of_others_stay() -> None:
    found: list[Any] = []
    x = torch.ones(3, requires_grad=True)

    def same(tensor: Tensor) -> Tensor:
        return tensor

    with revhooks.reversible(), saved_tensors_hooks(same, same):
        seen(x, found).exp().sum().backward()
    assert found == [same]


@pytest.mark.near(reason="blocks open frames in the thread of the context, where the backward of a CPU runs")
def test_a_reentrant_checkpoint_is_packed() -> None:
    """What it records in backward passes the run as before: blocks in it are inverted there."""
    torch.manual_seed(0)
    branches = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(8)]
    model, x = revhooks.nn.ReversibleSequential(*branches, dim=-1), torch.randn(64, 16, requires_grad=True)
    expected = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    with revhooks.reversible() as run:
        y = checkpoint(model, x, use_reentrant=True)
        assert run.stats.inversions == 0
        y.square().sum().backward()
    assert run.stats.inversions
    for parameter, gradient in zip([x, *model.parameters()], expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient)


def test_a_pass_in_another_thread_is_left_alone() -> None:
    """A function of the user's in a thread without hooks gets none, while a pass in another one has lent its own."""
    lent, done, found = threading.Event(), threading.Event(), list[Any]()

    def wait() -> None:
        lent.set()
        assert done.wait(60)
        found.append(top())

    def other() -> None:
        assert lent.wait(60)
        Looks.apply(torch.ones(3, requires_grad=True), lambda: found.append(top())).sum().backward()
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with revhooks.reversible() as run:
        Looks.apply(torch.ones(3, requires_grad=True), wait).sum().backward()
    thread.join()
    assert found == [None, run]


def test_several_roots_and_leaves() -> None:
    x, found = torch.ones(3, requires_grad=True), list[Any]()
    with revhooks.reversible() as run:
        roots = [seen(x, found).sum() for _ in range(2)]
        torch.autograd.backward(roots)
        assert found == [None, None]
        x.grad = None
        x.backward(torch.ones(3))  # a leaf has no node that could be marked
        edge = torch.autograd.graph.get_gradient_edge(seen(x, found).sum())
        torch.autograd.backward([edge])
        assert found == [None, None, None]
        many = [Looks.apply(x, lambda: found.append(top())).sum() for _ in range(9)]
        torch.autograd.backward(many)
    assert found[3:] == [run] * 9
