"""The examples: each runs, holds less than plain autograd would, and says so; a new file is found by itself."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

import revhooks
from revhooks.profiler.target import load_target

EXAMPLES = sorted(path for path in (Path(__file__).parents[1] / "examples").glob("*.py") if path.name != "common.py")
UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
HELD = re.compile(r"held for backward[^\d\n]*([\d.]+) (\w+) +([\d.]+) (\w+)")

pytest.importorskip("sklearn")
pytest.importorskip("PIL")

pytestmark = pytest.mark.cpu(reason="examples choose where they run")


@pytest.fixture(autouse=True)
def _paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES[0].parent))


def is_quick(path: Path) -> bool:
    return "arguments(" in path.read_text()  # of examples/common.py: it has --quick


def runs() -> list[object]:
    cases = [(path, ()) for path in EXAMPLES]
    cases += [(path, ("--lsh",)) for path in EXAMPLES if path.stem == "reformer_text"]
    marks = {path: () if is_quick(path) else pytest.mark.slow for path in EXAMPLES}
    return [pytest.param(path, extra, marks=marks[path], id=" ".join((path.stem, *extra))) for path, extra in cases]


@pytest.mark.parametrize(("path", "extra"), runs())
def test_runs_and_prints_less_memory(
    path: Path, extra: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draws = ["--out", str(tmp_path / "picture.png")] if "options.out" in path.read_text() else []
    monkeypatch.setattr(sys, "argv", [str(path), *(["--quick"] if is_quick(path) else []), *extra, *draws])
    monkeypatch.setenv("COLUMNS", "160")
    runpy.run_path(str(path), run_name="__main__")
    out = capsys.readouterr().out
    assert not draws or (tmp_path / "picture.png").stat().st_size > 1000
    if is_quick(path):
        found = HELD.search(out)
        assert found, out
        plain, rev = (float(found[i]) * UNITS[found[i + 1]] for i in (1, 3))
        assert rev < 0.5 * plain
        difference = re.search(r"largest gradient difference, float64 +- +(\S+)", out)
        assert difference, out
        assert float(difference[1]) < 1e-10


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_target(path: Path) -> None:
    """What `revhooks report` calls: a step of it holds less."""
    model, inputs, loss = load_target(f"{path}:target")()
    with revhooks.reversible() as run:
        loss(model(*inputs)).backward()
    assert run.stats.peak_held_bytes < 0.5 * run.stats.packed_bytes
    assert run.stats.held_bytes == 0
