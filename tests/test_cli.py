"""The command line: report, check, demo, and their errors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from revhooks.cli import main
from revhooks.profiler.target import load_target
from revhooks.record import SCHEMA_VERSION, Record
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
    return [3]

def keywords(batch=32, bias=True):
    torch.manual_seed(0)
    hidden = [nn.Sequential(nn.Linear(64, 64, bias=bias), nn.GELU()) for _ in range(3)]
    return nn.Sequential(*hidden, nn.Linear(64, 4)), torch.randn(batch, 64)

def by_name():
    class Named(nn.Linear):
        def forward(self, *, x):
            return super().forward(x)
    return Named(4, 4), {"x": torch.randn(2, 4)}

net, data = build()
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

def step():
    optimizer.zero_grad()
    loss = net(data).square().mean()
    loss.backward()
    optimizer.step()
    return loss

def exits():
    raise SystemExit(3)

def exits_in_its_loss():
    return (*build(), lambda out: exits())

def no_tensors():
    class Silent(nn.Linear):
        def forward(self, x):
            return object()
    return Silent(4, 4), torch.randn(2, 4)

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
    files = {kind: tmp_path / f"report.{kind}" for kind in ("json", "html", "svg", "trace", "flamegraph")}
    options = [word for kind, path in files.items() for word in (f"--{kind}", str(path))]
    assert main(["report", f"{targets}:with_loss", "--quick", "--rounds", "1", *options]) == 0
    out = re.sub(r"\s+", " ", capsys.readouterr().out)
    for words in (
        "reversible() saved", "what if", "of plain's time", "measured: resident set, fresh process", "AdditiveCoupling",
        "what is still held", "memory over the step", "parameters", "gradients",
    ):  # fmt: skip
        assert words in out, words
    record = Record.load(files["json"])
    plain, reversible = record.choices
    assert record.kind == "report"
    assert (plain.name, reversible.name) == ("plain", "reversible()")
    assert plain.saved_bytes == sum(row.saved_plain_bytes for row in record.modules) == record.stats.packed_bytes
    assert reversible.saved_bytes == record.stats.held_bytes == sum(row.held_bytes for row in record.modules)
    assert reversible.gradient_error is not None
    assert 0 < reversible.gradient_error < 1e-3
    assert all(choice.measured_peak_bytes is not None for choice in record.choices)
    data = json.loads(files["json"].read_text())
    numbers = [*data["choices"], *data["modules"], data["stats"]]
    assert all(
        type(value) is int for row in numbers for name, value in row.items() if name.endswith(("_bytes", "_ns", "permille"))
    )
    assert main(["report", str(files["json"])]) == 0
    assert re.sub(r"\s+", " ", capsys.readouterr().out) == out
    for kind, start in (("html", "<!doctype html>"), ("svg", "<svg"), ("trace", '"traceEvents"'), ("flamegraph", ";")):
        assert start in files[kind].read_text().lower().replace("traceevents", "traceEvents"), kind
    before = files["svg"].read_text()
    assert main(["report", str(files["json"]), "--svg", str(files["svg"])]) != 0
    assert "-f overwrites it" in capsys.readouterr().err
    assert main(["report", str(files["json"]), "--svg", str(files["svg"]), "-f"]) == 0
    assert files["svg"].read_text() == before


def test_report_of_a_module(targets: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(Path(targets).parent)
    assert main(["report", "targets_for_tests:build", "--rounds", "1", "--no-fresh"]) == 0
    out = capsys.readouterr().out
    assert "checkpoint AdditiveCoupling" in out
    assert "replay=AdditiveCoupling" not in out  # which is inverted
    assert "measured" not in out


def test_report_of_a_training_step(targets: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "report.json"
    assert main(["report", f"{targets}:step", "--rounds", "1", "--no-fresh", "--json", str(saved)]) == 0
    record = Record.load(saved)
    plain, reversible = record.choices[:2]
    assert reversible.saved_bytes < plain.saved_bytes
    assert reversible.gradient_error is None  # its parameters change
    assert {row.type for row in record.modules} >= {"AdditiveCoupling", "Linear"}
    assert not any(choice.problem for choice in record.choices)


def test_arguments_of_a_target(targets: str, tmp_path: Path) -> None:
    held = []
    for batch in ("32", "64"):
        saved = tmp_path / f"{batch}.json"
        options = ["--quick", "--no-fresh", "--rounds", "1", "--json", str(saved)]
        assert main(["report", f"{targets}:keywords", "--set", f"batch={batch}", "--set", "bias=False", *options]) == 0
        record = Record.load(saved)
        assert record.target.endswith(f"batch={batch} bias=False")
        assert record.parameter_bytes == 4 * (3 * 64 * 64 + 64 * 4 + 4)
        held.append(record.choices[0].saved_bytes)
    assert held[1] == 2 * held[0]


def test_inputs_by_keyword(targets: str) -> None:
    assert main(["report", f"{targets}:by_name", "--quick", "--no-fresh", "--rounds", "1"]) == 0


def test_report_of_fake_tensors(targets: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "report.json"
    size = ["--set", "batch=10_000_000", "--quick"]
    options = ["--fit", "1GiB", "--vary", "batch", "--optimizer", "sgd", "--json", str(saved)]
    assert main(["report", f"{targets}:keywords", "--fake", *size, *options]) == 0
    out = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "nothing was allocated" in out
    record = Record.load(saved)
    assert record.choices[0].saved_bytes > 2**32
    assert record.choices[0].how == "predicted"
    fits = {fit.name: fit for fit in record.fits}
    assert all(fit.keyword == "batch" and fit.bytes <= fit.limit_bytes == 2**30 for fit in record.fits)
    assert fits["plain"].largest < fits["reversible()"].largest


def test_a_file_does_not_stand_for_a_module_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "colorsys.py"
    path.write_text(TARGETS)
    before = sys.modules.get("colorsys")
    assert len(load_target(f"{path}:build")()) == 2
    assert sys.modules.get("colorsys") is before


def test_check(targets: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", f"{targets}:build"]) == 0
    assert "ok: Sequential" in capsys.readouterr().out


ERRORS = [
    ("nocolon", "module:callable or file.py:callable"),
    ("missing.py:build", "a file missing.py"),
    ("no_such_module_at_all:build", "can be imported"),
    ("{file}:nope", "a function 'nope'"),
    ("{file}:value", "a function 'value'"),
    ("{file}:nothing", "(model, inputs) or (model, inputs, loss)"),
    ("{file}:net", "a model itself (Sequential)"),
    ("{file}", "{file}:build"),
    ("{file}:bad_loss", "a loss that is a function"),
    ("{file}:wrong_shape", "inputs ((32, 3))"),
    ("{file}:vector_loss", "loss that gives a scalar"),
    ("missing.json", "no such file"),
    ("{file}:exits", "expected one that comes to its end, got exit (3)"),
    ("{file}:exits_in_its_loss", "expected one that comes to its end, got exit (3)"),
    ("{file}:no_tensors", "an output without: object. Remedy: return (model, inputs, loss)"),
]


@pytest.mark.parametrize(("target", "message"), ERRORS)
def test_errors_are_one_line_without_a_traceback(
    target: str, message: str, targets: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", target.format(file=targets), "--no-fresh"]) == 2
    captured = capsys.readouterr()
    assert message.format(file=targets) in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_a_record_is_not_measured_again(targets: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in (["--fake"], ["--quick"], ["--rounds", "3"], ["--set", "a=1"]):
        assert main(["report", str(tmp_path / "a.json"), *option]) == 2
        assert f"{option[0]}: expected a target to call, got a saved record" in capsys.readouterr().err


def test_schema_version_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "old.json"
    path.write_text('{"schema_version": 0}')
    assert main(["report", str(path)]) == 2
    assert f"expected schema version {SCHEMA_VERSION}, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("force", [[], ["-f"]])
def test_where_nothing_can_be_written_nothing_is_measured(
    force: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = tmp_path / "ran"
    script = tmp_path / "script.py"
    script.write_text(f"open({str(ran)!r}, 'w')\n")
    for place, told in ((tmp_path / "absent" / "x.json", "got none"), (tmp_path, "got a directory")):
        assert main(["report", f"{script}:build", "--json", str(place), *force]) == 2
        assert main(["run", *force, "-o", str(place), str(script)]) == 2
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 2
        assert all(told in error for error in errors)
    assert not ran.exists()


@pytest.mark.parametrize("command", [[], ["demo"], ["run"], ["report"], ["check"], ["compare"]])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "revhooks" in out
    assert not command or "example" in out


OPTIONS = [
    (["--rounds", "0"], "--rounds: expected at least 1, got 0"),
    (["--rows", "0"], "--rows: expected at least 1"),
    (["--fit", "1GiB"], "add --fake"),
    (["--fake", "--vary", "batch"], "add --fit"),
    (["--set", "batch"], "expected NAME=VALUE, got 'batch'"),
    (["--set", "batch=3", "--no-fresh"], "expected one that takes batch, got one that takes nothing"),
    (["--fake", "--fit", "much"], "--fit: expected a memory in bytes"),
    (["--html", "/nowhere/x.html"], "expected a directory /nowhere, got none"),
    (["--fake", "--fit", "1GiB"], "integer argument"),
    (["--fake", "--optimizer", "none at all"], "adamw"),
    (["--optimizer", "sgd"], "--optimizer: expected --fake with it"),
    (["--vary", "batch"], "--vary: expected --fit with it"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_options_that_say_nothing(options: list[str], message: str, targets: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", f"{targets}:build", *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_an_argument_without_a_default_is_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "needs.py"
    path.write_text("import torch\n\ndef build(batch):\n    return torch.nn.Linear(4, 4), torch.randn(batch, 4)\n")
    for options in (["--rounds", "1"], ["--fake"]):
        assert main(["report", f"{path}:build", "--set", "batch=4", "--quick", *options]) == 0
        captured = capsys.readouterr()
        assert "needs.py:build batch=4" in captured.out.replace("\n", "")
        assert ("resident set" in captured.out) == ("--fake" not in options)
    assert main(["report", f"{path}:build", "--quick"]) == 2
    assert "got one that needs batch" in capsys.readouterr().err


def test_demo_looks_where_it_is_to_write_before_it_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--json", str(tmp_path / "absent" / "x.json")]) == 2
    assert "expected a directory" in capsys.readouterr().err


def test_demo(tmp_path: Path) -> None:
    saved = tmp_path / "demo.json"
    small = ["--epochs", "1", "--blocks", "6", "--channels", "16", "--batch", "64"]
    done = subprocess.run(
        [sys.executable, "-m", "revhooks", "demo", *small, "--json", str(saved)], capture_output=True, text=True, check=True
    )
    for words in (
        "test accuracy",
        "held for backward, at most",
        "training step",
        "worst reconstruction error",
        "what if",
        "memory over the step",
    ):
        assert words in done.stdout
    record = Record.load(saved)
    plain, reversible = record.choices[:2]
    assert reversible.saved_bytes < 0.5 * plain.saved_bytes
    assert reversible.gradient_error is not None
    assert reversible.gradient_error < 0.05
    assert any(choice.name == "checkpoint AdditiveCoupling" for choice in record.choices)


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--blocks", "0"], "--blocks: expected at least 1, got 0"), (["--channels", "15"], "--channels: expected an even number")],
)
def test_demo_refuses_nonsense(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *options]) == 2
    assert message in capsys.readouterr().err


def test_timeline_is_on_one_scale() -> None:
    picture = timeline({"plain": [8] * 4, "rev": [2] * 4}, width=4, height=4)
    assert picture.count("████") == 5
