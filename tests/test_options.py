"""The options of the tests themselves: where they run, and what a CPU does in place of a GPU."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from revhooks import storage
from tests import devices
from tests.devices import DEVICE, generator, in_a_thread, random_states, set_random_states


def test_tensors_modules_and_generators_are_made_on_the_device() -> None:
    assert torch.zeros(2).device == nn.Linear(2, 2).weight.device == DEVICE
    assert torch.equal(torch.rand(2, generator=generator(3)), torch.rand(2, generator=generator(3)))


def test_states_of_all_generators_are_put_back() -> None:
    states = random_states()
    first = torch.rand(2)
    assert not all(map(torch.equal, states, random_states()))
    set_random_states(states)
    assert torch.equal(torch.rand(2), first)


def test_far_is_what_it_says(request: pytest.FixtureRequest) -> None:
    assert storage.is_near(DEVICE) == (DEVICE.type == "cpu" and not request.config.getoption("--far"))


class _Item:
    """What a test looks like when it has been collected."""

    def __init__(self, **marks: pytest.Mark) -> None:
        self.marks, self.added = marks, list[pytest.MarkDecorator]()

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        return self.marks.get(name)

    def add_marker(self, mark: pytest.MarkDecorator) -> None:
        self.added.append(mark)


@pytest.mark.parametrize(("where", "far", "skipped"), [("cpu", False, ""), ("cpu", True, "near"), ("meta", False, "cpu, near")])
def test_what_is_skipped_says_why(where: str, far: bool, skipped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Config:
        def getoption(self, name: str) -> bool:
            return far and name == "--far"

    monkeypatch.setattr(devices, "DEVICE", torch.device(where))
    items = {name: _Item(**{name: getattr(pytest.mark, name)(reason="its kernels").mark}) for name in ("cpu", "near")}
    items["any"] = _Item()
    devices.pytest_collection_modifyitems(Config(), list(items.values()))  # type: ignore[arg-type]
    told = {name: [mark.kwargs["reason"] for mark in item.added] for name, item in items.items() if item.added}
    assert ", ".join(told) == skipped
    assert all("its kernels" in reason for reasons in told.values() for reason in reasons)


# -- backward in another thread, as on a GPU

backward, grad = in_a_thread(torch.autograd.backward), in_a_thread(torch.autograd.grad)


@pytest.mark.cpu(reason="a device has threads of its own")
def test_backward_runs_elsewhere_and_what_it_calls_stays_there() -> None:
    threads: list[int] = []

    class Inner(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            threads.append(threading.get_ident())
            with torch.enable_grad():
                leaf = torch.ones_like(gradient, requires_grad=True)
                leaf.register_hook(lambda g: threads.append(threading.get_ident()))
                return gradient * grad((leaf * 3).sum(), leaf)[0]

    x = torch.ones(2, requires_grad=True)
    backward(Inner.apply(x).sum())
    assert torch.equal(x.grad, torch.full((2,), 3.0))  # type: ignore[arg-type]
    assert len(threads) == 2
    assert threads[0] == threads[1] != threading.get_ident()


def test_what_autograd_carries_is_carried() -> None:
    class Sines(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen += func is torch.ops.aten.cos.default
            return func(*args, **(kwargs or {}))

    x, packed = torch.ones(2, requires_grad=True), list[Tensor]()
    y = x.sin().sum()
    with Sines() as mode, torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        (first,) = grad(y, x, create_graph=True)
    assert mode.seen == 1
    assert packed
    assert first.requires_grad


def test_what_it_raises_is_raised() -> None:
    with pytest.raises(RuntimeError, match="does not require grad"):
        backward(torch.ones(()))
