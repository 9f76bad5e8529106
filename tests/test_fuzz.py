"""Random nets of couplings, plain layers, skips and reuse, several losses: gradients equal plain autograd's in float64.

`make test` tries 200, `make test-all` 2,000 more; hypothesis shrinks what fails.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import revhooks
from tests.test_semantics import BRANCHES, KINDS, _registered, loss, same_as_plain  # noqa: F401

# these keep a part of their graph alive by themselves, in plain autograd too, or change their first call
UNFIT = {
    "noise", "act norm", "act norm by data", "shared", "nested", "weight norm", "old spectral norm",
    "direct spectral norm", "checkpoint",
}  # fmt: skip
OPS: list[Callable[[Tensor], Tensor]] = [
    torch.tanh,
    F.relu,
    F.gelu,
    lambda h: h.add(0.1).relu_(),
    lambda h: F.dropout(h, 0.2),
    lambda h: revhooks.checkpoint(lambda t: torch.tanh(t).exp().sin(), h),
    lambda h: revhooks.checkpoint(lambda t: t * 2 + 1, h, inverse=lambda y: (y - 1) / 2),
]
Use = Callable[[nn.Module, Tensor], Any]


def random_net(draw: Random) -> tuple[nn.ModuleList, list[tuple[str, int]]]:
    modules, program = nn.ModuleList(), []
    branches = [name for name in BRANCHES if name not in UNFIT]
    for _ in range(draw.randrange(2, 11)):
        kind = draw.choice([*KINDS, "linear", "op", "op", "skip", "reuse"])
        if kind in KINDS:
            program.append(("module", len(modules)))
            modules.append(KINDS[kind](BRANCHES[draw.choice(branches)], draw.randrange(1, 4)))
        elif kind == "linear":
            program.append(("module", len(modules)))
            modules.append(nn.Linear(8, 8))
        elif kind == "reuse" and len(modules):
            program.append(("module", draw.randrange(len(modules))))
        else:
            program.append((kind if kind in ("op", "skip") else "op", draw.randrange(100)))
    return modules, program


def forward(net: nn.Module, x: Tensor, program: list[tuple[str, int]]) -> list[Tensor]:
    states = [x]
    for kind, number in program:
        h, other = states[-1], states[number % len(states)]
        if kind == "module":
            states.append(net[number](h))  # type: ignore[index]
        elif kind == "op":
            states.append(OPS[number % len(OPS)](h))
        else:
            states.append(h + other if number % 2 else h * torch.sigmoid(other))
    return states


def random_use(draw: Random, program: list[tuple[str, int]]) -> Use:
    mode = draw.randrange(6)
    places = sorted(draw.sample(range(len(program) + 1), 2))

    def use(net: nn.Module, x: Tensor) -> Any:
        states = forward(net, x, program)
        h = states[-1]
        losses = [loss(h), (torch.tanh(states[len(states) // 2]) * h).mean()]
        total = losses[0] + losses[1]
        if mode == 0:
            total.backward()
        elif mode == 1:
            losses[0].backward(retain_graph=True)
            losses[1].backward()
        elif mode == 2:
            total.backward(retain_graph=True)
            total.backward()
        elif mode == 3:
            wanted = [states[place] for place in places if states[place].requires_grad]
            return [*torch.autograd.grad(total, wanted, allow_unused=True), *losses]
        elif mode == 4:  # a second forward before the first backward
            other = loss(forward(net, x * 0.5, program)[-1])
            total.backward()
            other.backward()
        else:
            (grad,) = torch.autograd.grad(losses[0], x, create_graph=True)
            (total + grad.square().sum()).backward()
        return losses

    return use


def check(draw: Random) -> None:
    torch.manual_seed(draw.randrange(1000))
    modules, program = random_net(draw)
    same_as_plain(modules, random_use(draw, program), steps=2, tol=1e-8)


FUZZ = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
}


@pytest.mark.parametrize("part", range(5))
def test_random_nets(part: int) -> None:
    @seed(part)
    @settings(max_examples=40, **FUZZ)
    @given(st.randoms(use_true_random=False))
    def some(draw: Random) -> None:
        check(draw)

    some()


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_more_random_nets(part: int) -> None:
    @settings(max_examples=200, **FUZZ)
    @given(st.randoms(use_true_random=True), st.just(part))
    def more(draw: Random, part: int) -> None:
        check(draw)

    more()
