"""The command line: report, check, demo, and their errors."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from revhooks.cli import main
from revhooks.profile.target import load_target
from revhooks.record import SCHEMA_VERSION, Kept, ModuleRow, Report, Stats, Step, WorstError
from revhooks.report.tables import render
from revhooks.report.timeline import timeline

pytestmark = pytest.mark.cpu(reason="reports that name a CPU, and processes of their own")

TARGETS = """
import torch
from torch import nn
from revhooks.nn import AdditiveCoupling

def build():
    torch.manual_seed(0)
    def branch():
        return nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    body = [AdditiveCoupling(branch(), branch()) for _ in range(5)]
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), *body, nn.Linear(16, 2)), torch.randn(32, 4)

def with_loss():
    model, x = build()
    return model, (x,), lambda out: out.abs().mean()

def wrong_shape():
    model, x = build()
    return model, x[:, :3]

def vector_loss():
    model, x = build()
    return model, x, lambda out: out

def nothing():
    return 3

def bad_loss():
    return (*build(), 3)

value = 5
"""


@pytest.fixture
def targets(tmp_path: Path) -> str:
    path = tmp_path / "targets_for_tests.py"
    path.write_text(TARGETS)
    return str(path)


def test_report(targets: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "report.json"
    assert main(["report", f"{targets}:with_loss", "--json", str(saved), "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    for words in (
        "saved for backward / held", "accounted peak", "measured peak (resident set, fresh process)", "step time",
        "worst reconstruction error", "worst gradient error", "AdditiveCoupling", "reconstructed by inversion", "newest block",
    ):  # fmt: skip
        assert words in re.sub(r"\s+", " ", out), words
    data = json.loads(saved.read_text())
    assert data["schema_version"] == SCHEMA_VERSION
    numbers = {**data["plain"], **data["reversible"], **data["stats"]}
    assert all(isinstance(v, int) for k, v in numbers.items() if k.endswith(("_bytes", "_ns", "frames", "inversions")))
    assert all(isinstance(row[key], int) for row in data["modules"] for key in ("saved_plain_bytes", "held_bytes"))
    assert data["plain"]["saved_bytes"] == sum(row["saved_plain_bytes"] for row in data["modules"])
    assert data["reversible"]["saved_bytes"] == data["stats"]["held_bytes"]
    assert data["reversible"]["saved_bytes"] == sum(row["held_bytes"] for row in data["modules"])
    assert data["worst_gradient_error"] < 1e-3
    assert main(["report", str(saved)]) == 0
    again = capsys.readouterr().out
    assert "accounted peak" in again
    assert Report.load(saved).to_json() + "\n" == saved.read_text()


def test_report_of_a_module(targets: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(Path(targets).parent)
    assert main(["report", "targets_for_tests:build", "--rounds", "1", "--no-fresh"]) == 0
    assert "saved for backward" in capsys.readouterr().out


def test_a_file_does_not_stand_for_a_module_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "colorsys.py"
    path.write_text(TARGETS)
    before = sys.modules.get("colorsys")
    assert len(load_target(f"{path}:build")()) == 2
    assert sys.modules.get("colorsys") is before


def test_check(targets: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", f"{targets}:build"]) == 0
    assert "Sequential: ok" in capsys.readouterr().out


ERRORS = [
    ("nocolon", "module:callable or file.py:callable"),
    ("missing.py:build", "a file missing.py"),
    ("no_such_module_at_all:build", "can be imported"),
    ("{file}:nope", "a function 'nope'"),
    ("{file}:value", "a function 'value'"),
    ("{file}:nothing", "(model, inputs) or (model, inputs, loss)"),
    ("{file}:bad_loss", "a loss that is a function"),
    ("{file}:wrong_shape", "inputs ((32, 3))"),
    ("{file}:vector_loss", "loss that gives a scalar"),
    ("missing.json", "No such file"),
]


@pytest.mark.parametrize(("target", "message"), ERRORS)
def test_errors_are_one_line_without_a_traceback(
    target: str, message: str, targets: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", target.format(file=targets), "--no-fresh"]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_schema_version_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "old.json"
    path.write_text('{"schema_version": 0}')
    assert main(["report", str(path)]) == 1
    assert f"expected schema version {SCHEMA_VERSION}, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["demo"], ["report"], ["check"]])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "revhooks" in out
    assert not command or "example" in out


def test_demo(tmp_path: Path) -> None:
    saved = tmp_path / "demo.json"
    command = [sys.executable, "-m", "revhooks", "demo", "--epochs", "1", "--blocks", "10", "--json", str(saved)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for words in (
        "test accuracy", "saved for backward / held", "accounted peak", "step time", "largest gradient difference",
        "worst reconstruction error", "memory over one step", "gave back",
    ):  # fmt: skip
        assert words in done.stdout
    report = Report.load(saved)
    assert report.reversible.saved_bytes < 0.5 * report.plain.saved_bytes
    assert report.worst_gradient_error < 0.05


def test_demo_refuses_nonsense(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--blocks", "0"]) == 1
    assert "--blocks: expected at least 1, got 0" in capsys.readouterr().err


def sample_report() -> Report:
    stats = Stats(1000, 200, 300, 4, 3, 0, 0, WorstError(1e-6, "block 2 (AdditiveCoupling)"), (Kept("anchor", "b", 200),))
    plain = Step(3 * 2**20, 4 * 2**20, 5 * 2**20, "resident set, fresh process", 10_000_000, (0, 1, 4, 1, 0))
    rev = Step(2**20, 2 * 2**20, 2 * 2**20, "resident set, fresh process", 13_000_000, (0, 1, 2, 1, 0))
    rows = (
        ModuleRow("1", "AdditiveCoupling", 2 * 2**20, 0, "reconstructed by inversion"),
        ModuleRow("", "Sequential", 2**20, 2**20, "saved outside"),
    )
    return Report("m:f", "cpu", "2.13.0", plain, rev, 1300, 1e-6, "block 2 (AdditiveCoupling)", 2e-6, stats, rows)


@pytest.mark.parametrize("width", [80, 100])
def test_report_fits_the_terminal(width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(render(sample_report()))
    text = console.export_text()
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(map(len, lines)) <= width
    assert any(re.fullmatch(r"\s*saved for backward / held\s+3\.0 MiB\s+1\.0 MiB\s+0\.33", line) for line in lines)
    assert any(re.fullmatch(r"\s*accounted peak of the step\s+4\.0 MiB\s+2\.0 MiB\s+0\.50", line) for line in lines)
    assert any(re.fullmatch(r"\s*step time\s+10\.0 ms\s+13\.0 ms\s+1\.30", line) for line in lines)
    assert any(line.lstrip().startswith("1  ") and "reconstructed" in line for line in lines)


def test_timeline_is_on_one_scale() -> None:
    picture = timeline({"plain": [8] * 4, "rev": [2] * 4}, width=4, height=4)
    assert picture.count("████") == 5
