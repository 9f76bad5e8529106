"""``revhooks compare``: two records side by side, and limits for a CI."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
from rich.console import Console

from revhooks.cli import main
from revhooks.record import SCHEMA_VERSION, Choice, Fit, ModuleRow, Record, RunStep, Stats, WorstError
from revhooks.report.compare import regressions, render, saved_percent

pytestmark = pytest.mark.cpu(reason="records, of no device")

M = 2**20
RESIDENT = "resident set, fresh process"


def report(held: int = 10 * M, error: float = 1e-7, permille: int = 1300, *, more: tuple[Choice, ...] = ()) -> Record:
    plain = Choice("plain", "", 30 * M, 40 * M, 50 * M, RESIDENT, 10_000_000)
    rev = Choice("reversible()", "...", held, 20 * M, 25 * M, RESIDENT, permille * 10_000, permille, error, "b", error)
    rows = (ModuleRow("", "Net", M, M), ModuleRow("h.0", "Block", 10 * M, held // 2), ModuleRow("h.1", "Block", 9 * M, held // 4))
    return Record("report", "m:f", "cpu", "2.13.0", (plain, rev, *more), modules=rows)


def run_record(held: int = 30 * M, steps: int = 10) -> Record:
    stats = Stats(100 * M, 20 * M, held, 40, 30, 2, 0, worst_error=WorstError(1e-6, "block 1"))
    return Record(
        "run", "train.py", "cpu", "2.13.0", stats=stats, steps=(RunStep(steps, steps * 5_000_000, 100 * M, held, 1e-6),)
    )


def shown(a: Record, b: Record, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(render(a, b, ("a.json", "b.json")))
    return "\n".join(line.rstrip() for line in console.export_text().splitlines()).rstrip()


GOLDEN_REPORT = """\
a: a.json (report of m:f; cpu, torch 2.13.0)
b: b.json (report of m:f; cpu, torch 2.13.0)
note: in a only: budget=25%

                                               a          b   change
 ───────────────────────────────────────────────────────────────────
 plain
   held for backward                    30.0 MiB   30.0 MiB        =
   accounted peak                       40.0 MiB   40.0 MiB        =
   peak (resident set, fresh process)   50.0 MiB   50.0 MiB        =
   step time                             10.0 ms    10.0 ms        =

 reversible()
   held for backward                    10.0 MiB   14.0 MiB   +40.0%
   accounted peak                       20.0 MiB   20.0 MiB        =
   peak (resident set, fresh process)   25.0 MiB   25.0 MiB        =
   step time                             13.0 ms    15.0 ms   +15.4%
   step time / plain                        1.30       1.50   +15.4%
   reconstruction error                  1.0e-07    3.0e-05     x300
   gradient error                        1.0e-07    3.0e-05     x300
   saved                                   66.7%      53.3%    -13.3

 held by module, where it differs
   h.0                                   5.0 MiB    7.0 MiB   +40.0%
   h.1                                   2.5 MiB    3.5 MiB   +40.0%"""

GOLDEN_RUN = """\
a: a.json (run of train.py; cpu, torch 2.13.0)
b: b.json (run of train.py; cpu, torch 2.13.0)

                                        a           b    change
 ──────────────────────────────────────────────────────────────
 run
   plain autograd would hold    100.0 MiB   100.0 MiB         =
   held at most                  30.0 MiB    50.0 MiB    +66.7%
   saved                            70.0%       50.0%     -20.0
   worst reconstruction error     1.0e-06     1.0e-06         =
   block calls                         40          40         =
   inverted                            30          30         =
   replayed                             2           2         =
   second evaluations                   0           0         =
   steps                               10          20   +100.0%
   time a step                     5.0 ms      5.0 ms         ="""


@pytest.mark.parametrize("width", [80, 100])
def test_reports(width: int) -> None:
    a = report(more=(Choice("budget=25%", "", 15 * M),))
    assert shown(a, report(14 * M, 3e-5, 1500), width) == GOLDEN_REPORT


@pytest.mark.parametrize("width", [80, 100])
def test_runs(width: int) -> None:
    assert shown(run_record(), run_record(50 * M, 20), width) == GOLDEN_RUN


@pytest.mark.parametrize("width", [80, 100])
def test_long_names_fit(width: int) -> None:
    path = "/home/somebody/experiments/with/a/long/path/of/many/parts/and/more.json"
    console = Console(width=width, record=True, file=io.StringIO())
    rows = (ModuleRow("transformer.encoder.layers.0.self_attention.projection.of.the.queries.and.keys", "Linear", M, M),)
    a = dataclasses.replace(report(), modules=rows)
    b = dataclasses.replace(report(), modules=(dataclasses.replace(rows[0], held_bytes=2 * M),))
    console.print(render(a, b, (path, path)))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    assert any(line.rstrip().endswith("1.0 MiB    2.0 MiB   +100.0%") for line in lines)


def test_what_makes_figures_hard_to_compare_is_said() -> None:
    b = dataclasses.replace(report(), device="NVIDIA H100", torch="2.14.0", target="m:g")
    text = shown(report(), b, 100)
    assert "note: of different targets: m:f, m:g" in text
    assert "note: of different devices: cpu, NVIDIA H100" in text
    assert "note: of torch 2.13.0 and 2.14.0" in text
    assert "note: of different kinds: report, run" in shown(report(), run_record(), 100)


def test_peaks_that_were_measured_in_other_ways_are_not_judged() -> None:
    a, b = report(), report()
    measured = dataclasses.replace(b.choices[1], measured_peak_bytes=90 * M, how="cuda allocator")
    b = dataclasses.replace(b, choices=(b.choices[0], measured))
    assert "peak (not in the same way)" in shown(a, b, 100)
    assert regressions(a, b, 5) == []


def test_sizes_that_fit() -> None:
    a = dataclasses.replace(
        report(), fits=(Fit("plain", "batch", 80 * M, 10, 79 * M), Fit("reversible()", "batch", 80 * M, 20, 79 * M))
    )
    b = dataclasses.replace(report(), fits=(Fit("reversible()", "batch", 80 * M, 24, 79 * M),))
    text = shown(a, b, 80)
    assert "batch, reversible(), 80.0 MiB              20         24   +20.0%" in text
    assert "batch, plain" not in text


def test_saved_percent() -> None:
    assert saved_percent(report(6 * M)) == 80
    assert saved_percent(run_record(25 * M)) == 75
    assert saved_percent(report(), "replay=Block") is None
    failed = dataclasses.replace(report().choices[1], problem="out of memory")
    assert saved_percent(dataclasses.replace(report(), choices=(report().choices[0], failed))) is None
    assert saved_percent(dataclasses.replace(run_record(), stats=Stats())) is None


def test_regressions() -> None:
    assert regressions(report(), report(), 0) == []
    assert regressions(report(), report(10 * M + M // 4), 5) == []
    assert regressions(report(), report(11 * M), 5) == ["reversible(): held for backward 10.0 MiB -> 11.0 MiB (+10.0%)"]
    assert regressions(report(), report(error=9e-7), 5) == []
    assert regressions(report(), report(error=2e-6), 5)[0].startswith("reversible(): reconstruction error 1.0e-07 -> 2.0e-06")
    assert regressions(report(), report(permille=1500), 5) == []
    assert regressions(report(), report(permille=1500), 5, 20) == []
    assert regressions(report(), report(permille=1500), 5, 10) == ["reversible(): step time / plain 1.30 -> 1.50 (+15.4%)"]
    assert regressions(report(), report(permille=900, held=M), 0, 0) == []
    more = report(more=(Choice("budget=25%", "", M),))
    assert regressions(more, report(), 5) == ["budget=25%: not in b"]
    assert regressions(report(), more, 5) == []
    failed = report(more=(Choice("budget=25%", problem="out of memory"),))
    assert regressions(more, failed, 5) == ["budget=25%: out of memory"]
    assert regressions(run_record(), run_record(50 * M), 5) == ["run: held at most 30.0 MiB -> 50.0 MiB (+66.7%)"]


def test_what_plain_autograd_holds_is_not_judged() -> None:
    a, b = report(), report()
    b = dataclasses.replace(b, choices=(dataclasses.replace(b.choices[0], saved_bytes=90 * M), b.choices[1]))
    assert regressions(a, b, 0) == []


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    report(6 * M).save(a)
    report(12 * M).save(b)
    return str(a), str(b)


CASES = [
    ([], 0, ""),
    (["--fail-under", "60"], 0, "ok: all limits are kept"),
    (["--fail-under", "61"], 3, "not ok: saves 60.0% of what plain autograd holds; at least 61% is asked for"),
    (["--tolerance", "100"], 0, "ok: all limits are kept"),
    (["--tolerance", "99"], 3, "not ok: reversible(): held for backward 6.0 MiB -> 12.0 MiB (+100.0%)"),
    (["--time-tolerance", "0"], 0, "ok: all limits are kept"),
]


@pytest.mark.parametrize(("options", "code", "line"), CASES, ids=[" ".join(options) for options, *_ in CASES])
def test_exit_codes(options: list[str], code: int, line: str, files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *files, *options]) == code
    captured = capsys.readouterr()
    assert line in captured.out
    assert captured.err == ""


def test_a_record_without_such_figures(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *files, "--fail-under", "1", "--choice", "replay=Block"]) == 2
    assert "got plain, reversible(). Remedy: name one with --choice" in capsys.readouterr().err


FILES = [
    (None, "no such file"),
    ("{", "got no JSON"),
    ("[]", "got other JSON"),
    ("{}", "schema version"),
    (f'{{"schema_version": {SCHEMA_VERSION}, "stats": []}}', "got other JSON"),
]


@pytest.mark.parametrize(("text", "message"), FILES)
def test_files_that_are_no_records(
    text: str | None, message: str, files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.json"
    if text is not None:
        path.write_text(text)
    assert main(["compare", files[0], str(path)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
