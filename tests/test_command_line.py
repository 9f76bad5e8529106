"""What all commands share: exit codes, errors, ``--debug``, ``--version``, and how soon they are there."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import revhooks
from revhooks import cli
from revhooks.cli import main
from revhooks.errors import RevhooksError, TargetError
from revhooks.record import Record, Stats

pytestmark = pytest.mark.cpu(reason="processes of their own")


def do(action: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    """The exit code of a command that does this."""

    class Command:
        @staticmethod
        def add_parser(commands: Any) -> None:
            commands.add_parser("act").set_defaults(run=lambda _: action())

    monkeypatch.setattr(cli, "demo", Command)
    return main([*options])


def fail(error: BaseException) -> Callable[[], Any]:
    def action() -> Any:
        raise error

    return action


CODES = [
    (lambda: 0, 0, ""),
    (lambda: 3, 3, ""),
    (fail(TargetError("target: expected a, got b. Remedy: c.")), 2, "revhooks: target: expected a, got b. Remedy: c.\n"),
    (fail(RevhooksError("told")), 1, "revhooks: told\n"),
    (fail(FileExistsError(17, "File exists", "x.json")), 2, "revhooks: [Errno 17] File exists: 'x.json'\n"),
    (fail(ZeroDivisionError("odd")), 1, "revhooks: ZeroDivisionError: odd (--debug shows where it was raised)\n"),
    (fail(KeyboardInterrupt()), 130, "revhooks: interrupted\n"),
]


@pytest.mark.parametrize(("action", "code", "told"), CODES)
def test_exit_codes(
    action: Callable[[], Any], code: int, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert do(action, monkeypatch, "act") == code
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("options", [["--debug", "act"], ["act", "--debug"]])
def test_debug_shows_the_traceback(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert do(fail(TargetError("told")), monkeypatch, *options) == 2
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert "in action" in err
    assert err.endswith("revhooks: told\n")


def test_what_a_command_leaves_to_be_called_raises_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a script does that is run: its errors and its interrupt are not ours."""
    assert do(lambda: lambda: 7, monkeypatch, "act") == 7
    for error in (TargetError("the script's"), KeyboardInterrupt(), SystemExit(5)):
        with pytest.raises(type(error)):
            do(lambda error=error: fail(error), monkeypatch, "act")


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["check"], ["compare", "a.json"], ["check", "x:y", "--guard", "odd"]])
def test_bad_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: revhooks" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"revhooks {revhooks.__version__}\n"


def test_all_commands_tell_of_debug_and_show_examples(capsys: pytest.CaptureFixture[str]) -> None:
    parser = cli._parser()
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
    assert {"demo", "report", "check", "compare"} <= set(commands)
    for name, command in commands.items():
        told = command.format_help()
        assert "--debug" in told, name
        assert "example" in told, name
        assert max(map(len, (command.epilog or "").splitlines())) <= 100, name


@pytest.mark.parametrize("command", ["compare", "check"])
def test_a_reader_that_goes_away_is_told_nothing(command: str, tmp_path: Path) -> None:
    """As in ``| head``: of what rich prints, and of what is printed plainly."""
    record, target = tmp_path / "a.json", tmp_path / "target.py"
    Record("run", "train.py", "cpu", "2", stats=Stats(100, 50, 50)).save(record)
    target.write_text("import torch\ndef build():\n    return torch.nn.Linear(2, 2), torch.ones(1, 2)\n")
    arguments = [str(record), str(record)] if command == "compare" else [f"{target}:build"]
    process = subprocess.Popen(
        [sys.executable, "-m", "revhooks", command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    told = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), told) == (1, b"")


def seconds(*arguments: str) -> float:
    """The median of three, of a process of its own."""
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


@pytest.mark.parametrize("command", [[], ["check"], ["compare"], ["report"], ["demo"]])
def test_help_is_there_at_once(command: list[str]) -> None:
    """Within a second of the time that Python itself takes to start, which on a busy machine is no constant."""
    assert seconds("-m", "revhooks", *command, "--help") - seconds("-c", "pass") < 1.0


def test_help_needs_no_torch() -> None:
    code = "import sys; from revhooks.cli import _parser; _parser().format_help(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_is_there_at_once() -> None:
    assert seconds("-c", "import revhooks") - seconds("-c", "pass") < 0.3


def test_the_first_use_takes_little_beside_torch() -> None:
    """In one process: whatever else the machine does slows both."""
    code = (
        "import time; a = time.perf_counter(); import torch; b = time.perf_counter()\n"
        "import revhooks; revhooks.reversible; print((time.perf_counter() - b) / (b - a))"
    )
    ratios = [float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout) for _ in range(3)]
    assert statistics.median(ratios) < 0.4, ratios
