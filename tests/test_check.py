"""``check()``."""

from __future__ import annotations

import copy
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revhooks
from revhooks import nn as rnn
from revhooks.checking import Drift
from revhooks.checking.steps import is_equal
from revhooks.cli import main
from revhooks.errors import RegistrationError
from revhooks.registry import ACTIVE
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
    assert text.startswith("ok: AdditiveCoupling under reversible(): gradients ")
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


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(self.norm(x))


def ordinary() -> nn.Module:
    return nn.Sequential(nn.Embedding(11, 8), *[Block() for _ in range(3)], nn.BatchNorm1d(5), nn.Linear(8, 11))


UNDER: list[dict[str, Any]] = [
    {},
    {"replay": Block},
    {"replay": Block, "ops": False, "guard": "raise"},
    {"budget": "1KiB", "replay": Block},
    {"keep": Block, "offload": True},
]


@pytest.mark.parametrize("options", UNDER, ids=str)
def test_a_model_without_an_inverse(options: dict[str, Any]) -> None:
    under = revhooks.reversible(**options) if options else None
    result = revhooks.check(ordinary(), torch.randint(11, (4, 5)), under=under)
    assert result, result
    assert result.inverse_error is None
    assert result.gradients_equal
    assert result.gradient_error == 0
    assert result.outputs_equal
    assert (result.buffers, result.generators, result.drift, result.evaluations) == ((), (), None, {})
    assert result.packed_bytes > 0
    assert (result.held_bytes < result.packed_bytes) or "keep" in options
    text = str(result)
    assert "no block with an inverse; nothing is inverted" in text
    assert text.startswith("ok: Sequential under reversible(")
    assert max(map(len, text.splitlines())) <= 80


def test_sparse_gradients() -> None:
    model = nn.Sequential(nn.Embedding(11, 8, sparse=True), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2))
    assert revhooks.check(model, torch.randint(11, (4, 5))).gradients_equal


def test_the_context_is_told() -> None:
    under = revhooks.reversible(replay=Block, keep=(nn.GELU, nn.Linear), budget="2GiB", ops=False, guard="off")
    told = "reversible(replay=Block, keep=(GELU, Linear), budget='2GiB', ops=False)"
    assert revhooks.check(ordinary(), torch.randint(11, (4, 5)), under=under).under == told


def test_gradients_that_differ() -> None:
    class Doubts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (1.5 if ACTIVE.run is not None else 1.0)

    result = revhooks.check(nn.Sequential(nn.Linear(4, 4), Doubts()), torch.randn(3, 4))
    assert not result
    assert not result.outputs_equal
    assert result.gradient_error == pytest.approx(0.5)
    told = "\n".join(result.problems)
    assert "outputs under reversible() differ" in told
    assert "gradients differ by 0.5 (relative)" in told
    assert all("Remedy: " in problem for problem in result.problems)
    assert result.verdict == "not ok: Sequential under reversible(): 2 problems"


def test_buffers_and_generators_that_differ() -> None:
    class Counts(nn.Module):
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            if ACTIVE.run is not None:
                self.seen += 1
                torch.rand(())
                random.random()
            return x * 2

    result = revhooks.check(nn.Sequential(nn.Linear(4, 4), Counts()), torch.randn(3, 4))
    assert result.gradients_equal
    assert result.buffers == ("1.seen",)
    assert result.generators == ("python", "torch")
    assert len(result.problems) == 2
    assert "buffers are others than after a plain step: 1.seen" in result.problems[0]
    assert "python, torch" in result.problems[1]


def test_the_module_that_differs_first_is_told() -> None:
    class Noise(nn.Module):
        generator = torch.Generator(device="cpu").manual_seed(3)

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn(x.shape, generator=self.generator, device="cpu").to(x.device)

    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh(), Noise()), nn.Linear(4, 2))
    result = revhooks.check(model, torch.randn(3, 4))
    assert not result.deterministic
    assert len(result.problems) == 1
    assert "first in the output of 1.1 (Noise)" in result.problems[0]


def test_what_fails_under_reversible_only_is_a_problem() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if ACTIVE.run is not None:
                raise KeyError("here")
            return x * 2

    result = revhooks.check(nn.Sequential(nn.Linear(4, 4), Fails()), torch.randn(3, 4))
    assert not result
    assert "a step under reversible() raises KeyError" in result.problems[0]
    assert result.gradient_error == float("inf")


def test_nothing_to_compare() -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ones_like(x)

    assert "no output needs a gradient" in revhooks.check(Constant(), torch.randn(3)).problems[0]


def test_no_module() -> None:
    with pytest.raises(RegistrationError, match="a module, or a method of one"):
        revhooks.check(torch.tanh, torch.randn(3))


# -- drift


def chain(depth: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), *[rnn.AdditiveCoupling(mlp(8), mlp(8), dim=-1) for _ in range(depth)]).to(dtype)


def test_drift_over_the_depth_of_a_chain() -> None:
    result = revhooks.check(chain(12), torch.randn(64, 16))
    assert result, result
    drift = result.drift
    assert drift is not None
    assert drift.unit == "block"
    assert [depth for depth, _ in drift.errors][:3] == [1, 2, 4]
    assert drift.errors[-1][0] in (11, 12)
    assert all(0 <= error < 1e-5 for _, error in drift.errors)
    assert max(error for _, error in drift.errors) == pytest.approx(float(result.inverse_error or 0))
    assert "  drift            after 1, 2, 4, 8, 1" in str(result)


def test_drift_of_steps_in_one_block() -> None:
    result = revhooks.check(rnn.ReversibleSequential(*[mlp(8) for _ in range(16)], dim=-1), torch.randn(64, 16))
    assert result.drift is not None
    assert result.drift.unit == "step"
    assert 8 < result.drift.errors[-1][0] <= 16
    exact = rnn.ReversibleSequential(*[mlp(8) for _ in range(16)], dim=-1, grid_bits=12)
    result = revhooks.check(exact, torch.randn(64, 16))
    assert result.drift is not None
    assert result.drift.growth is None
    assert "none: 0 after" in str(result)


def test_one_block_has_no_drift() -> None:
    assert revhooks.check(chain(1), torch.randn(64, 16)).drift is None


def test_two_chains_are_not_one() -> None:
    model = nn.Sequential(chain(3), nn.Linear(16, 16), nn.ReLU(), chain(7))
    drift = revhooks.check(model, torch.randn(64, 16)).drift
    assert drift is not None
    assert drift.errors[-1][0] in (6, 7)


def test_a_growth_that_is_known() -> None:
    drift = Drift.of("block", {depth: 1e-7 * 3**depth for depth in range(1, 6)})
    assert drift.growth == pytest.approx(3)
    assert [depth for depth, _ in drift.errors] == [1, 2, 4, 5]
    assert drift.reaches(1e-7 * 3**9 * 0.99) == 9
    assert drift.reaches(1e-6) == 4
    assert Drift.of("block", {1: 1e-7, 2: 1e-7}).reaches(1e-3) is None


def test_streams_of_sixteen_bits_are_told_of() -> None:
    result = revhooks.check(chain(12, torch.bfloat16), torch.randn(64, 16).bfloat16())
    told = " ".join([*result.problems, *result.notes])
    assert "the streams are bfloat16: keep them in float32" in told
    assert "grid_bits=12" in told


def test_a_deep_chain_that_drifts_too_far() -> None:
    class Steep(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 6 * torch.sin(3 * x)

    model = nn.Sequential(nn.Linear(16, 16), *[rnn.AdditiveCoupling(Steep(), Steep(), dim=-1) for _ in range(12)])
    result = revhooks.check(model, torch.randn(64, 16))
    assert not result
    told = "\n".join(result.problems)
    assert "is reconstructed with an error of" in told
    assert result.drift is not None
    assert result.drift.growth is not None
    assert result.drift.growth > 1.5


# -- the command


TARGETS = """
import torch
from torch import nn
from revhooks.nn import AdditiveCoupling

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.GELU())

    def forward(self, x):
        return self.net(x)

def gpt():
    return nn.Sequential(Block(), Block()), torch.randn(4, 8)

def revnet():
    branch = lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    return nn.Sequential(nn.Linear(8, 8), *[AdditiveCoupling(branch(), branch(), dim=-1) for _ in range(4)]), torch.randn(4, 8)

class Differs(nn.Module):
    count = 0
    def forward(self, x):
        Differs.count += 1
        return x * Differs.count

def wrong():
    return nn.Sequential(nn.Linear(8, 8), Differs()), torch.randn(4, 8)

def misfit():
    return nn.Linear(4, 4), torch.randn(4, 8)

def step():
    nn.Linear(4, 4)(torch.randn(2, 4)).sum().backward()
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "targets_to_check.py"
    path.write_text(TARGETS)
    return str(path)


COMMANDS = [
    ("gpt", [], 0, "ok: Sequential under reversible(): gradients bitwise equal"),
    ("gpt", ["--replay", "Block"], 0, "ok: Sequential under reversible(replay=Block)"),
    ("gpt", ["--replay", "{file}:Block"], 0, "ok: Sequential under reversible(replay=Block)"),
    ("gpt", ["--replay-blocks", "--guard", "raise"], 0, "reversible(replay=Block, guard='raise')"),
    ("gpt", ["--keep", "torch.nn:GELU", "--no-ops"], 0, "reversible(keep=GELU, ops=False)"),
    ("gpt", ["--budget", "1KiB", "--offload"], 0, "reversible(budget='1KiB', offload=True)"),
    ("revnet", [], 0, "drift"),
    ("wrong", [], 1, "first in the output of 1 (Differs)"),
]


@pytest.mark.parametrize(("name", "options", "code", "words"), COMMANDS)
def test_the_command(name: str, options: list[str], code: int, words: str, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", f"{file}:{name}", *(option.replace("{file}", file) for option in options)]) == code
    captured = capsys.readouterr()
    assert words in " ".join(captured.out.split())
    assert captured.err == ""


REFUSED = [
    ("gpt", ["--replay", "Nothing"], "got 'Nothing'; there are Sequential, Block, Linear, GELU"),
    ("gpt", ["--replay", "other.py:Block"], "got 'other.py:Block'; there are Sequential, Block"),
    ("gpt", ["--replay", "torch.nn:Nothing"], "--replay torch.nn:Nothing"),
    ("gpt", ["--keep", "torch.nn:functional"], "expected a class, got a module"),
    ("revnet", ["--budget", "many"], "budget="),
    ("misfit", ["--replay-blocks"], "a model that repeats blocks"),
    ("misfit", [], "a step that runs, got RuntimeError"),
    ("step", [], "expected (model, inputs), got a training step"),
]


@pytest.mark.parametrize(("name", "options", "words"), REFUSED)
def test_the_command_refuses(name: str, options: list[str], words: str, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", f"{file}:{name}", *options]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_what_is_equal() -> None:
    nan, inf, most = float("nan"), float("inf"), torch.finfo(torch.float32).max
    x = torch.tensor([1.0, nan, inf, -inf])
    assert is_equal(x, x.clone())
    assert is_equal(x + 0j, x + 0j)
    assert not is_equal(x, torch.tensor([1.0, nan, most, -inf]))
    assert not is_equal(x, torch.tensor([1.0, 0.0, inf, -inf]))
    assert not is_equal(torch.tensor([1]), torch.tensor([2]))
    assert not is_equal(x, x.double())
