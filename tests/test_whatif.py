"""The same step in several ways: what is told of each is what that way does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import revhooks
from revhooks.errors import TargetError
from revhooks.nn import AdditiveCoupling
from revhooks.profiler.fresh import fresh_peak
from revhooks.profiler.repeated import repeated_blocks, to_replay
from revhooks.profiler.target import work_of
from revhooks.profiler.ways import PLAIN, REVERSIBLE, ways_of
from revhooks.profiler.whatif import SETTLE, Trial, measure, trials_of
from revhooks.profiler.workload import StepFunction, Workload
from revhooks.record import Record
from revhooks.registry import ACTIVE

pytestmark = pytest.mark.cpu(reason="accounted bytes of the CPU's kernels")


class Block(nn.Module):
    def __init__(self, width: int, drop: float = 0.0) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(F.gelu(self.up(self.norm(x)))))


class Net(nn.Module):
    def __init__(self, depth: int = 5, width: int = 32, drop: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, drop) for _ in range(depth))
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def work(**options: Any) -> Workload:
    torch.manual_seed(0)
    return Workload.of((Net(**options), torch.randn(32, 16, 32)))


@pytest.fixture(scope="module")
def record() -> Record:
    return measure(work(drop=0.1), target="net", rounds=1)


def test_every_way(record: Record) -> None:
    names = [choice.name for choice in record.choices]
    assert names == ["plain", "reversible()", "replay=Block", "budget=50%, replay", "budget=25%, replay", "checkpoint Block"]
    assert not [choice.problem for choice in record.choices if choice.problem]
    held = {choice.name: choice.saved_bytes for choice in record.choices}
    peak = {choice.name: choice.accounted_peak_bytes for choice in record.choices}
    assert held["replay=Block"] < held["reversible()"] < held["plain"]
    assert peak["replay=Block"] <= peak["checkpoint Block"] < peak["reversible()"] < peak["plain"]
    assert peak["replay=Block"] <= peak["budget=25%, replay"] <= peak["budget=50%, replay"] < peak["plain"]
    assert all(choice.gradient_error == 0 for choice in record.choices)  # dropout too is the same in all
    assert all(choice.step_ns > 0 for choice in record.choices)
    assert record.choices[0].time_permille == 1000


@pytest.mark.near(reason="on an accelerator a place is trusted after some steps of each model, not of each run")
def test_what_is_told_is_what_a_run_says(record: Record) -> None:
    job = work(drop=0.1)
    for _ in range(SETTLE):
        with revhooks.reversible():
            job.loss(job.call()).backward()
    with revhooks.reversible() as run:
        loss = job.loss(job.call())
        stats = run.stats
    del loss
    assert record.stats.held_bytes == record.choices[1].saved_bytes == stats.held_bytes
    assert record.choices[0].saved_bytes == stats.packed_bytes


@pytest.mark.near(reason="on an accelerator a place is trusted after some steps of each model, not of each run")
def test_code_does_what_it_says(record: Record) -> None:
    for choice in record.choices:
        if not choice.code.startswith("with "):
            continue
        job = work(drop=0.1)
        code = f"{choice.code}\n    loss = job.loss(job.call())\n    loss.backward()"
        held: dict[str, Any] = {"revhooks": revhooks, "Block": Block, "job": job}
        for _ in range(SETTLE):
            exec(code, held)
        with revhooks.profile(job.model) as prof:
            exec(code, held)
        assert prof.record.choices[0].saved_bytes == choice.saved_bytes, choice.name


def test_the_model_is_left_as_it_is() -> None:
    job = work(drop=0.1)
    job.loss(job.call()).backward()
    before = copy.deepcopy(job.model.state_dict())
    gradients = [p.grad for p in job.model.parameters()]
    copies = [None if g is None else g.clone() for g in gradients]
    generator = torch.get_rng_state()
    measure(job, quick=True, rounds=1)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), job.model.state_dict().values(), strict=True))
    assert all(p.grad is g for p, g in zip(job.model.parameters(), gradients, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(gradients, copies, strict=True) if a is not None and b is not None)
    assert torch.equal(generator, torch.get_rng_state())


def test_copies_share_parameters() -> None:
    job = work()
    trials = trials_of(job)
    assert len({id(trial.model) for trial in trials}) == len(trials)
    for trial in trials:
        assert all(a is b for a, b in zip(trial.model.parameters(), job.model.parameters(), strict=True))
        assert all(a is not b for a, b in zip(trial.model.buffers(), job.model.buffers(), strict=True))


class OneWay(nn.Module):
    """Fails when it is run again."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError("not again")
        return self.inner(x).tanh()


def test_a_way_that_fails_is_told() -> None:
    model = nn.Sequential(*(OneWay() for _ in range(4)))
    record = measure(Workload.of((model, torch.randn(8, 32))), rounds=1)
    failed = {choice.name: choice.problem for choice in record.choices if choice.problem}
    assert {"replay=OneWay", "checkpoint OneWay"} <= set(failed)
    assert all("not again" in problem for problem in failed.values())
    assert not record.choices[1].problem
    assert record.stats.packed_bytes


class Large(nn.Module):
    """For which there is memory only where something is run again."""

    def __init__(self, fits: bool) -> None:
        super().__init__()
        self.blocks, self.fits = nn.ModuleList(Block(32) for _ in range(4)), fits

    def forward(self, x: Tensor) -> Tensor:
        run = ACTIVE.run
        if not self.fits or run is None:
            raise torch.OutOfMemoryError("of a device")
        for block in self.blocks:
            x = block(x)
        return x


def test_ways_for_which_there_is_no_memory() -> None:
    record = measure(Workload.of((Large(True), torch.randn(8, 16, 32))), rounds=1)
    problems = {choice.name: choice.problem for choice in record.choices}
    assert problems["plain"] == problems["checkpoint Block"] == "out of memory"
    assert not problems["reversible()"]
    assert not problems["budget=25%, replay"]
    held = {choice.name: choice.saved_bytes for choice in record.choices}
    assert 0 < held["replay=Block"] < held["budget=50%, replay"] < record.stats.packed_bytes
    with pytest.raises(TargetError, match="large: expected a way of taking it whose memory there is, got none"):
        measure(Workload.of((Large(False), torch.randn(8, 16, 32))), target="large", rounds=1)


def test_a_step_function_for_which_there_is_no_memory() -> None:
    large, x = Large(True), torch.randn(8, 16, 32)

    def step() -> None:
        large(x).square().mean().backward()

    work = work_of(step, "step")
    assert isinstance(work, StepFunction)
    record = measure(work, rounds=1)
    assert record.choices[0].problem == "out of memory"
    assert record.choices[1].saved_bytes


def test_a_step_that_fails_in_plain_autograd() -> None:
    with pytest.raises(TargetError, match=r"Net on inputs \(\(2, 3\)\): expected a forward and a backward that run"):
        measure(Workload.of((Net(), torch.randn(2, 3))), rounds=1)


def test_a_model_that_cannot_be_copied() -> None:
    class Own(nn.Linear):
        def __deepcopy__(self, memo: object) -> Own:
            raise RuntimeError("there is only one")

    with pytest.raises(TargetError, match="a whole training step"):
        measure(Workload.of((Own(2, 2), torch.randn(2, 2))), rounds=1)


def test_a_step_function_of_two_models() -> None:
    first, second = Net(3), Net(3)
    x = torch.randn(16, 16, 32)
    taken = []

    def step() -> None:
        taken.append(1)
        second(first(x)).square().mean().backward()

    record = measure(StepFunction(step, "both"), target="both", rounds=1)
    assert {row.path.split(".")[0] for row in record.modules} - {""} == {"0", "1"}
    assert len(taken) > len(record.choices) * SETTLE
    assert record.choices[1].saved_bytes < record.choices[0].saved_bytes
    assert "forward" not in vars(first.blocks[0])  # where it was checkpointed


def test_a_step_function_that_calls_nothing() -> None:
    with pytest.raises(TargetError, match="one that calls none"):
        measure(StepFunction(lambda: None, "idle"), rounds=1)
    net = Net()
    with pytest.raises(TargetError, match="eval: expected a training step, with a backward pass, got one without"):
        measure(StepFunction(lambda: net(torch.randn(4, 16, 32)), "eval"), target="eval", rounds=1)
    with pytest.raises(TargetError, match="ZeroDivisionError"):
        measure(StepFunction(lambda: 1 / 0, "broken"), rounds=1)


def test_blocks_that_are_repeated() -> None:
    def names(model: nn.Module) -> list[tuple[str, int]]:
        return [(one.name, len(one.blocks)) for one in repeated_blocks(model)]

    assert names(Net()) == [("Block", 5)]
    assert names(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))) == []
    stages = nn.ModuleList(nn.Sequential(*(Block(8) for _ in range(3))) for _ in range(4))
    assert names(stages) == [("Block", 12)]
    assert to_replay(nn.Linear(2, 2)) == []
    assert [one.name for one in to_replay(stages)] == ["Block"]
    only = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(3)))
    assert names(only) == [("Sequential", 3)]
    shared = Block(8)
    assert names(nn.ModuleList([shared, shared])) == []  # children are told once


def test_blocks_with_an_inverse_are_not_replayed() -> None:
    model = nn.Sequential(*(AdditiveCoupling(nn.Linear(4, 4), nn.Linear(4, 4), dim=-1) for _ in range(3)))
    names = [way.name for way in ways_of(model)]
    assert "checkpoint AdditiveCoupling" in names
    assert not [name for name in names if "replay" in name]


def test_a_way_belongs_to_no_model() -> None:
    job = work()
    trial = Trial(REVERSIBLE, job, job.model)
    assert (PLAIN.code_for(5), REVERSIBLE.code_for(5)) == ("", "with revhooks.reversible():")
    trial.step()
    assert all(p.grad is not None for p in job.model.parameters())


def test_a_measured_peak_of_a_target_that_prints(tmp_path: Path) -> None:
    path = tmp_path / "prints.py"
    path.write_text(
        "import atexit, torch\nfrom torch import nn\n\ndef build():\n    print('begun', end='')\n"
        "    atexit.register(print, 'over')\n"
        "    return nn.Sequential(nn.Linear(64, 2048), nn.GELU()), torch.randn(2048, 64)\n"
    )
    peak = fresh_peak(f"{path}:build", "plain")
    assert peak is not None
    assert peak > 2048 * 2048 * 4
    assert fresh_peak(f"{path}:build", "no such way") is None
