"""Buffers that calls change: at their first call only, now and then, or always."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revhooks
from revhooks import buffers

WIDTH = 1 << 12


class Changing(nn.Module):
    """Has a large buffer, which it reads, and changes in the calls that ``changes`` names."""

    def __init__(self, changes: Callable[[int], bool], how: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH, dtype=torch.float64))
        self.register_buffer("scale", torch.ones(WIDTH, dtype=torch.float64))
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.changes, self.how = changes, how

    def forward(self, x: Tensor, call: int) -> Tensor:
        if self.training and self.changes(call):
            changed = self.scale * 1.25 + x.detach().mean(0)
            if self.how == "in place":
                self.scale.copy_(changed)
            elif self.how == "past its counter":
                self.scale.data.copy_(changed)
            else:
                self.scale = changed
        return (x * self.weight * self.scale).tanh() * self.weight


CHANGES: dict[str, Callable[[int], bool]] = {
    "once": lambda call: call == 0,
    "always": lambda call: True,
    "now and then": lambda call: call % 7 == 0,
    "twice": lambda call: call in (0, 8),
    "late": lambda call: call > 5,
}


def steps(module: Changing, count: int, context: Callable[[], Any]) -> tuple[list[Any], list[int]]:
    """Losses, gradients and buffers of some steps; and what was held after the forward of each."""
    found: list[Any] = []
    held = []
    generator = torch.Generator().manual_seed(0)
    for call in range(count):
        x = torch.randn(2, WIDTH, dtype=torch.float64, generator=generator).requires_grad_()
        with context() as run:
            loss = module(x, call).square().sum()
            held.append(run.stats.held_bytes if run is not None else 0)
            loss.backward()
        found.append((loss.detach(), x.grad, module.weight.grad, module.scale.clone()))
        module.weight.grad = None
    return found, held


WAYS = ("in place", "another tensor", "past its counter")
# nobody can see a change past the version counter, when the first call has made none
CASES = [(when, how) for when in CHANGES for how in WAYS if (when, how) != ("late", "past its counter")]


@pytest.mark.parametrize(("when", "how"), CASES)
def test_every_step_is_that_of_plain_autograd(when: str, how: str) -> None:
    module = Changing(CHANGES[when], how)
    plain, other = copy.deepcopy(module), copy.deepcopy(module)
    want, _ = steps(plain, 20, contextlib.nullcontext)
    got, _ = steps(other, 20, lambda: revhooks.reversible(replay=Changing))
    for step, (a, b) in enumerate(zip(want, got, strict=True)):
        assert all(map(torch.equal, a, b)), step


def held_of_the_buffer(module: Changing, count: int) -> list[bool]:
    """Whether a copy of the buffer is among what is held, call by call."""
    _, without = steps(Changing(lambda call: False, ""), 1, lambda: revhooks.reversible(replay=Changing))
    _, held = steps(module, count, lambda: revhooks.reversible(replay=Changing))
    return [nbytes == without[0] + module.scale.nbytes for nbytes in held]


@pytest.mark.parametrize("how", ["in place", "another tensor"])
def test_what_is_changed_once_is_not_copied_for_ever(how: str) -> None:
    assert held_of_the_buffer(Changing(CHANGES["once"], how), 10) == 5 * [True] + 5 * [False]


def test_what_is_changed_again_is_copied_for_good() -> None:
    held = held_of_the_buffer(Changing(CHANGES["twice"], "in place"), 24)
    assert held[:5] == 5 * [True]
    assert not any(held[5:8])
    assert all(held[9:])


def test_what_is_always_changed_is_looked_at_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    same = buffers.same_values
    monkeypatch.setattr(buffers, "same_values", lambda a, b: looked.append(a.numel()) or same(a, b))
    steps(Changing(CHANGES["always"], "past its counter"), 10, lambda: revhooks.reversible(replay=Changing))
    assert looked.count(WIDTH) <= 2
