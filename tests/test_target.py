"""Targets: what may be one, and how one that may not is told."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from revhooks.errors import TargetError
from revhooks.profiler.target import load, load_target, work_of
from revhooks.profiler.workload import StepFunction, Workload, mean_square

pytestmark = pytest.mark.cpu(reason="targets in files")

SOURCE = """
import functools
import torch
from torch import nn

net = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
taken = []

class Model(nn.Module):
    pass

def build(batch=3, width: int = 4):
    return nn.Linear(width, 2), torch.randn(batch, width)

def with_loss():
    return net, (torch.randn(3, 4),), lambda out: out.sum()

def step():
    optimizer.zero_grad()
    loss = net(torch.randn(3, 4)).sum()
    loss.backward()
    optimizer.step()
    taken.append(1)

def step_with_loss():
    loss = net(torch.randn(3, 4)).sum()
    loss.backward()
    return loss.detach()

def step_with_number():
    return float(step_with_loss())

def target():
    def one_step():
        return step()
    return one_step

def needs(batch, width=3):
    pass

def gives_one_that_needs():
    return needs

def rows():
    yield 1

async def later():
    pass

def model_alone():
    return net

def gives_dict():
    return {"model": net}

def gives_class():
    return Model

def gives_vector():
    return torch.randn(3)

def gives_count():
    return 3

def gives_labels():
    return torch.tensor(3)

def gives_numpy():
    import numpy
    step()
    return numpy.float32(0.5)

def gives_text():
    return "loss"

def wrong_tuple():
    return torch.randn(3), net

def raises():
    return {}["missing"]

def _helper():
    pass

value = 5
partial = functools.partial(build, 2)
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "targets_of_tests.py"
    path.write_text(SOURCE)
    return str(path)


@pytest.mark.parametrize("name", ["build", "with_loss", "partial"])
def test_a_model_and_inputs(name: str, file: str) -> None:
    work = load(f"{file}:{name}")
    assert isinstance(work, Workload)
    work.loss(work.model(*work.inputs)).backward()


@pytest.mark.parametrize("name", ["step", "step_with_loss", "step_with_number", "gives_numpy", "target"])
def test_a_training_step(name: str, file: str) -> None:
    spec = f"{file}:{name}"
    step = load(spec)
    assert isinstance(step, StepFunction)
    assert step.name == spec
    net = sys.modules["__target_targets_of_tests__"].net  # type: ignore[attr-defined]
    net.zero_grad()
    step.step()
    assert net[0].weight.grad is not None


def test_a_step_is_taken_again_each_time(file: str) -> None:
    step = load(f"{file}:step")
    assert isinstance(step, StepFunction)
    taken = sys.modules["__target_targets_of_tests__"].taken  # type: ignore[attr-defined]
    before = len(taken)
    step.step()
    step.step()
    assert len(taken) == before + 2


def test_keywords_of_a_target(file: str) -> None:
    spec = f"{file}:build"
    work = work_of(load_target(spec), spec, batch=7, width=6)
    assert isinstance(work, Workload)
    assert work.inputs[0].shape == (7, 6)


ERRORS = [
    ("net", "got a model itself (Sequential)", "def target(): return model, inputs"),
    ("Model", "got the class Model", "write a function around it"),
    ("needs", "got one that needs batch.", "give them defaults"),
    ("gives_one_that_needs", "the function that it returned", "needs batch."),
    ("rows", "got a generator", "return instead of yield"),
    ("later", "got a coroutine", "without async"),
    ("model_alone", "got a model alone (Sequential)", "return its inputs too"),
    ("gives_dict", "got a dict", "(model, inputs) or (model, inputs, loss)"),
    ("gives_class", "got a type", "a training step that was taken"),
    ("gives_vector", "got a tensor of shape (3,)", "its loss"),
    ("gives_count", "got an int", "its loss"),
    ("gives_labels", "got a tensor of shape ()", "its loss"),
    ("gives_text", "got a str", "a function that takes one"),
    ("wrong_tuple", "got (Tensor, Sequential)", "the model a torch.nn.Module"),
    ("raises", "got KeyError: 'missing'", "runs without an error"),
    ("value", "got an int; it has", "build"),
    ("absent", "got none; it has", "build"),
]


@pytest.mark.parametrize(("name", "got", "more"), ERRORS, ids=[name for name, *_ in ERRORS])
def test_what_is_no_target_is_told(name: str, got: str, more: str, file: str) -> None:
    with pytest.raises(TargetError) as caught:
        load(f"{file}:{name}")
    message = str(caught.value)
    assert message.startswith(f"target '{file}:{name}': expected ")
    assert got in message
    assert more in message
    assert "Remedy: " in message


@pytest.mark.parametrize("end", ["", ":"])
def test_a_file_without_a_name_is_not_run_and_its_functions_are_told(end: str, tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(
        "raise RuntimeError('run')\n"
        "def other(): pass\n"
        "def needs(x): pass\n"
        "def also(*, x): pass\n"
        "def rows():\n    yield\n"
        "def build(batch=2): pass\n"
        "def _private(): pass\n"
    )
    with pytest.raises(TargetError) as caught:
        load(f"{path}{end}")
    assert str(caught.value).endswith(f"Remedy: name one of those without arguments: {path}:build, {path}:other.")
    path.write_text("x = 1\n")
    with pytest.raises(TargetError, match=r"write one that returns \(model, inputs\)"):
        load(f"{path}{end}")
    with pytest.raises(TargetError, match="no such file"):
        load(f"{tmp_path / 'absent.py'}{end}")


def test_a_module_without_a_name(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(file).parent)
    with pytest.raises(TargetError, match="targets_of_tests:build, "):
        load("targets_of_tests")
    with pytest.raises(TargetError, match="module:callable"):
        load("no_such_module_at_all")


def test_a_file_of_a_package(tmp_path: Path) -> None:
    path = tmp_path / "part.py"
    path.write_text("from . import other\n")
    with pytest.raises(TargetError, match=r"relative import.*name it as a module of its package"):
        load(f"{path}:build")


def test_a_script_that_exits(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text("import sys\nsys.exit(2)\n")
    with pytest.raises(TargetError, match=r"one that exits \(2\).*__main__"):
        load(f"{path}:build")


def test_the_cause_is_kept(file: str) -> None:
    with pytest.raises(TargetError) as caught:
        load(f"{file}:raises")
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_module_with_the_model_first(file: str) -> None:
    model = nn.Linear(2, 2)
    work = work_of(lambda: (model, torch.ones(1, 2)), "here")
    assert isinstance(work, Workload)
    assert work.model is model


def test_a_loss_of_an_output_that_is_a_dataclass() -> None:
    @dataclass
    class Output:
        y: Tensor
        name: str = ""

    assert mean_square(Output(torch.full((3,), 2.0))) == 4.0
