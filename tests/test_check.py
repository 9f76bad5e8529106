"""``check()``."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import revhooks
from revhooks import nn as rnn
from revhooks.errors import RegistrationError
from tests.conftest import conv_branch, mlp
from tests.devices import random_states, set_random_states
from tests.test_registry import Coupling


def test_all_is_well() -> None:
    result = revhooks.check(rnn.AdditiveCoupling(conv_branch(4), conv_branch(4)).double(), torch.randn(2, 8, 5, 5).double())
    assert result
    assert result.problems == ()
    assert result.inverse_error < 1e-12
    assert result.gradient_error < 1e-10
    assert result.evaluations == {"f": 2, "g": 2}
    assert result.deterministic
    text = str(result)
    assert text.startswith("AdditiveCoupling: ok\n")
    assert "2 a branch" in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_whole_model() -> None:
    model = nn.Sequential(nn.Linear(8, 8), *[rnn.AdditiveCoupling(mlp(4), mlp(4), dim=-1) for _ in range(4)]).double()
    result = revhooks.check(model, torch.randn(3, 8).double())
    assert result
    assert set(result.evaluations.values()) == {2}
    assert len(result.evaluations) == 8
    assert 0 < result.inverse_error < 1e-12


def test_the_module_is_left_alone() -> None:
    model = rnn.AdditiveCoupling(conv_branch(4), conv_branch(4))
    before, rng = copy.deepcopy(model.state_dict()), random_states()
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    set_random_states(rng)
    revhooks.check(model, x)
    assert all(map(torch.equal, random_states(), rng))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert x.grad is None
    assert all(p.grad is None for p in model.parameters())
    assert all("forward" not in vars(m) for m in model.modules())


def test_dropout_is_no_problem() -> None:
    block = rnn.AdditiveCoupling(nn.Sequential(mlp(4), nn.Dropout()), nn.Sequential(nn.Dropout(), mlp(4)), dim=-1)
    assert revhooks.check(block.double(), torch.randn(3, 8).double())


def test_extra_arguments() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, scale: Tensor, shift: float = 0.0) -> Tensor:
            return torch.tanh(x) * scale + shift

    block = rnn.AdditiveCoupling(Scaled(), Scaled(), dim=-1)
    assert revhooks.check(block, torch.randn(3, 8).double(), torch.ones(4).double(), shift=0.5)


class Late(nn.Module):
    """Initialised by the first input that it sees, and not to be inverted before."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if not self.scale:
            with torch.no_grad():
                self.scale.fill_(1 / float(x.std()))
        return x * self.scale

    def inverse(self, y: Tensor) -> Tensor:
        if not self.scale:
            raise RuntimeError("not initialised")
        return y / self.scale


def test_a_first_call_that_initialises() -> None:
    x = 3 * torch.randn(8, 4) + 1
    result = revhooks.check(rnn.ActNorm(4), x)
    assert result, result
    revhooks.register(Late, inverse="inverse")
    try:
        result = revhooks.check(Late(), x)
    finally:
        revhooks.unregister(Late)
    assert result, result
    assert result.inverse_error < 1e-6


def test_not_an_inverse() -> None:
    class Wrong(Coupling):
        def inverse(self, y: Tensor) -> Tensor:
            return y

    revhooks.register(Wrong, inverse="inverse")
    try:
        with pytest.warns(UserWarning, match="off by"):
            result = revhooks.check(Wrong().double(), torch.randn(3, 8).double())
    finally:
        revhooks.unregister(Wrong)
    assert not result
    assert result.inverse_error > 0.01
    assert "inverse(forward(x)) is off by" in result.problems[0]
    assert "not ok" in str(result)


def test_not_deterministic() -> None:
    class Counter(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Counter.calls += 1
            return torch.tanh(x) * Counter.calls

    result = revhooks.check(rnn.AdditiveCoupling(Counter(), nn.Tanh(), dim=-1), torch.randn(3, 8))
    assert not result
    assert not result.deterministic


def test_nothing_to_check() -> None:
    with pytest.raises(RegistrationError, match="no module with a registered inverse"):
        revhooks.check(nn.Linear(2, 2), torch.randn(1, 2))
