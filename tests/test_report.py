"""Reports: tables against golden texts, advice, groups, pictures, pages, traces and flame graphs."""

from __future__ import annotations

import dataclasses
import difflib
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from revhooks.record import Choice, Fit, Kept, ModuleRow, Record, Slice, Stats, Timeline, human_bytes
from revhooks.report.advice import advice, suggestion
from revhooks.report.columns import cells, columns
from revhooks.report.flamegraph import flamegraph
from revhooks.report.grouping import compact, grouped, nothing_held, reasons, rows_of_kept
from revhooks.report.html import html
from revhooks.report.page import SCRIPT
from revhooks.report.svg import svg
from revhooks.report.tables import render
from revhooks.report.timeline import by_category, over_time, timeline
from revhooks.report.trace import trace
from tests.chromium import CHROMIUM, opened
from tests.golden.records import MIB, RECORDS, choice, failing, gpt, prediction, profile, revnet, run
from tests.golden.texts import FOLDER, WIDTHS, checks, demos, shown, texts

pytestmark = pytest.mark.cpu(reason="records that are made by hand")


# -- golden texts


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", RECORDS)
def test_golden_text(name: str, width: int) -> None:
    expected, got = (FOLDER / f"{name}_{width}.txt").read_text(), shown(RECORDS[name](), width)
    difference = "\n".join(difflib.unified_diff(expected.splitlines(), got.splitlines(), "golden", "now", lineterm=""))
    assert got == expected, f"{difference}\n\nif it is meant: python -m tests.golden, and read what has changed"


@pytest.mark.parametrize("name", [*checks(), *demos()])
def test_golden_text_of_other_commands(name: str) -> None:
    got = {**checks(), **demos()}[name]
    assert got == (FOLDER / name).read_text(), "if it is meant: python -m tests.golden, and read what has changed"
    width = int(name.partition(".")[0].rpartition("_")[2]) if name.startswith("demo") else 80
    assert max(map(len, got.splitlines())) <= width


def test_golden_texts_are_all_of_some_record() -> None:
    assert {path.name for path in FOLDER.glob("*.txt")} == set(texts())


@pytest.mark.parametrize("width", [60, 72, 80, 100, 140])
@pytest.mark.parametrize("name", RECORDS)
def test_nothing_is_cut_and_nothing_sticks_out(name: str, width: int) -> None:
    record = RECORDS[name]()
    text = shown(record, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    if width < 72:
        return  # figures are broken as well
    whole = re.sub(r"\s+", "", text)
    for wanted in (advice(record), *(one.problem for one in record.choices), *(row.remedy for row in record.modules)):
        assert re.sub(r"\s+", "", wanted.replace("nothing:", "")) in whole.replace("Nothingremovesit:", "")
    for one in record.choices:
        if one.accounted_peak_bytes:
            assert human_bytes(one.accounted_peak_bytes).replace(" ", "") in whole


def test_a_width_may_be_given() -> None:
    console = Console(width=200, file=io.StringIO())
    console.print(render(gpt(), width=80))
    assert max(len(line.rstrip()) for line in console.file.getvalue().splitlines()) <= 80  # type: ignore[attr-defined]


def test_markup_in_names_is_shown_as_it_is() -> None:
    record = Record("run", "train.py [bold]", "cpu", "2", stats=Stats(kept=(Kept("why [red]", "a[0].b [/]", 9, "", "[x]"),)))
    text = shown(record, 80)
    for words in ("train.py [bold]", "a[0].b [/]", "why [red]", "[x]"):
        assert words in text


def test_rows_are_limited_and_the_rest_is_summed_up() -> None:
    console = Console(width=80, file=io.StringIO())
    console.print(render(gpt(), rows=2))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "mlp.act x4" in text
    assert "c_fc" not in text
    assert re.search(r"and 15 more, which hold 29\.0 MiB \(29\.0 MiB in plain autograd\)", text)


def test_the_answer_comes_first() -> None:
    lines = shown(gpt(), 100).splitlines()
    assert lines[0].startswith("bench/gpt.py:four_layers")
    assert lines[2].startswith("reversible() saved")


def test_colour_marks_the_best_as_well() -> None:
    console = Console(width=100, force_terminal=True, color_system="standard", file=io.StringIO())
    console.print(render(gpt()))
    assert re.search(r"\x1b\[1m[^\x1b]*12\.0 MiB\*", console.file.getvalue())  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["report", "profile", "run", "prediction"])
def test_records_without_figures_are_shown(kind: str) -> None:
    record = Record(kind, "", "cpu", "2.13.0")
    assert shown(record, 80)
    assert html(record).startswith("<!doctype html>")
    assert svg(record) == ""
    assert flamegraph(record) == ""
    assert json.loads(trace(record))["traceEvents"]


def test_a_record_that_was_saved_is_shown_alike(tmp_path: Path) -> None:
    for make in RECORDS.values():
        make().save(tmp_path / "record.json")
        again = Record.load(tmp_path / "record.json")
        assert shown(again, 80) == shown(make(), 80)
        assert html(again) == html(make())


# -- advice

PLAIN = choice("plain", 100, 120, 1000, 0.0, None)
REVERSIBLE = choice("reversible()", 50, 80, 1100)


def said(*choices: Choice) -> str:
    return advice(Record("report", "net", "cpu", "2.13.0", choices))


def test_advice_names_what_lowers_the_peak() -> None:
    text = said(PLAIN, REVERSIBLE, choice("replay=Block", 10, 30, 1310))
    assert text == (
        "reversible() saved 50.0 MiB of 100.0 MiB (50%) at 1.10 of plain's time. Keep using it, or: replay=Block would take the "
        "peak from 80.0 MiB to 30.0 MiB for 1.31 of plain's time.\nWrite: revhooks.reversible(replay=Block)"
    )


def test_advice_without_a_noticeable_gain() -> None:
    assert said(PLAIN, REVERSIBLE, choice("budget=25%", 40, 75, 1200)).endswith(
        "Keep using it: nothing else that was tried lowers its peak of 80.0 MiB noticeably."
    )


def test_advice_of_two_choices_says_that_there_were_no_more() -> None:
    assert said(PLAIN, REVERSIBLE).endswith("Keep using it; nothing else was measured.")
    broken = Choice("replay=Block", problem="it broke")
    assert said(PLAIN, REVERSIBLE, broken).endswith("Keep using it; nothing else that was tried could be measured.")


def test_advice_where_nothing_is_gained() -> None:
    same = choice("reversible()", 100, 120, 1020)
    assert said(PLAIN, same) == (
        "reversible() saved nothing of 100.0 MiB at 1.02 of plain's time. Stay with plain autograd: nothing that was tried "
        "lowers its peak of 120.0 MiB noticeably."
    )
    assert "It is replay=Block that lowers the peak, from 120.0 MiB to 30.0 MiB" in said(
        PLAIN, same, choice("replay=Block", 10, 30, 1300)
    )


def test_advice_where_bytes_are_saved_but_the_peak_stays() -> None:
    assert said(PLAIN, choice("reversible()", 50, 119, 1100)).endswith(
        "Stay with plain autograd: nothing that was tried lowers its peak of 120.0 MiB noticeably."
    )


def test_advice_after_a_problem() -> None:
    broken = Choice("reversible()", problem="ReplayError: it drew other numbers.")
    text = said(PLAIN, broken, choice("checkpoint Block", 10, 30, 1300))
    assert text.startswith("reversible() could not be measured: ReplayError: it drew other numbers. ")
    assert "It is checkpoint Block that lowers the peak" in text
    assert said(REVERSIBLE) == "There is nothing to compare with: plain autograd was not measured."
    failed = Choice("replay=Block", problem="no")
    assert suggestion(Record("report", "net", "cpu", "2", (PLAIN, REVERSIBLE, failed))) is None


def test_advice_takes_the_cheapest_of_what_is_as_low() -> None:
    slow, fast = choice("replay=Block", 10, 30, 1600), choice("budget=10%", 10, 31, 1300)
    assert suggestion(Record("report", "net", "cpu", "2", (PLAIN, REVERSIBLE, slow, fast))) is fast


def test_advice_names_what_is_as_low_and_faster() -> None:
    text = said(PLAIN, choice("reversible()", 50, 80, 1330), choice("budget=50%", 50, 80, 1100))
    assert "or: budget=50% would keep the peak at 80.0 MiB for 1.10 of plain's time" in text


def test_advice_says_when_checkpointing_would_do_as_well() -> None:
    rival = choice("checkpoint Block", 10, 30, 1310)
    replay = choice("replay=Block", 10, 30, 1310)
    text = said(PLAIN, REVERSIBLE, replay, rival)
    assert "or: replay=Block" in text
    assert "checkpoint Block alone would do as well: 30.0 MiB for 1.31 of plain's time." in text
    text = said(
        PLAIN,
        REVERSIBLE,
        choice("replay=Block", 10, 30, 1400),
        choice("budget=25%", 10, 31, 1310),
        choice("checkpoint B", 10, 32, 1200),
    )
    assert "Between them, checkpoint B takes it to 32.0 MiB for 1.20 of plain's time." in text
    assert "alone" not in text  # once is enough
    slower = dataclasses.replace(rival, time_permille=1500)
    assert "alone" not in said(PLAIN, REVERSIBLE, replay, slower)
    better = dataclasses.replace(rival, accounted_peak_bytes=10 * MIB)
    assert "or: checkpoint Block would take the peak from 80.0 MiB to 10.0 MiB" in said(PLAIN, REVERSIBLE, replay, better)


def test_advice_where_plain_autograd_cannot_take_the_step() -> None:
    failed = Choice("plain", problem="out of memory")
    current, low = choice("reversible()", 50, 80, 1000), choice("replay=Block", 10, 30, 1300)
    text = said(failed, current, low)
    assert text.startswith("Plain autograd cannot take this step: out of memory. reversible() takes it with a peak of 80.0 MiB;")
    assert "replay=Block needs the least, 30.0 MiB, for 1.30 of the time.\nWrite: revhooks.reversible(replay=Block)" in text
    assert "needs the least" not in said(failed, current, choice("replay=Block", 10, 79, 1300))
    assert "No other way that was tried can." in said(failed, Choice("reversible()", problem="out of memory"))
    record = Record("report", "net", "cuda", "2.13.0", (failed, current, low))
    assert [column.title for column in columns(record)][2] == "time /\nreversible()"


def test_advice_promises_no_time_below_plains() -> None:
    text = said(PLAIN, REVERSIBLE, choice("budget=25%", 10, 30, 950))
    assert "to 30.0 MiB for no more than plain's time." in text
    assert "0.95" not in text


def test_advice_names_a_way_between() -> None:
    half = choice("budget=50%", 30, 55, 1180)
    assert "Between them, budget=50% takes it to 55.0 MiB for 1.18 of plain's time." in said(
        PLAIN, REVERSIBLE, choice("replay=Block", 10, 30, 1310), half
    )
    dear = dataclasses.replace(half, time_permille=1250)
    assert "Between" not in said(PLAIN, REVERSIBLE, choice("replay=Block", 10, 30, 1310), dear)


def test_advice_warns_of_gradients() -> None:
    text = said(PLAIN, choice("reversible()", 50, 80, 1100, 0.1, 0.2), choice("replay=Block", 10, 30, 1300, 0.0, 0.3))
    assert text == (
        "reversible() saved 50.0 MiB of 100.0 MiB (50%), but its gradients differ from plain's by 20%: revhooks check shows "
        "where. Stay with plain autograd: nothing whose gradients are right lowers its peak of 120.0 MiB noticeably."
    )


def test_advice_of_plain_alone() -> None:
    assert said(PLAIN) == "Nothing but plain autograd was measured: its peak is 120.0 MiB."


def test_advice_compares_accounted_peaks_only() -> None:
    low = choice("replay=Block", 50, 80, 1310, measured_peak_bytes=MIB, how="cuda allocator")
    assert suggestion(Record("report", "net", "cpu", "2", (PLAIN, REVERSIBLE, low))) is None


def test_advice_of_other_kinds() -> None:
    assert advice(run()) == "65.0 MiB of 74.0 MiB (88%) saved: at most 9.0 MiB were held for backward."
    full = Stats(packed_bytes=MIB, peak_held_bytes=MIB)
    assert advice(Record("run", "x", "cpu", "2", stats=full)).startswith("Nothing was saved: 1.0 MiB were held")
    assert advice(Record("profile", "x", "cpu", "2", (PLAIN,))).startswith("Nothing was held for backward: no backward pass")
    plain = Record("profile", "x", "cpu", "2", (PLAIN,), stats=full)
    assert advice(plain) == "Plain autograd held 1.0 MiB for backward at most; no step ran under reversible()."
    none = Record("prediction", "x", "cpu", "2", (PLAIN, PLAIN), fits=(Fit("plain", "batch", 80, 0, 0),))
    assert advice(none) == (
        "Predicted, nothing was allocated. No way that was tried would lower plain's peak of 120.0 MiB noticeably. "
        "Not even batch=1 fits 80 B."
    )
    assert "time" not in advice(prediction())


def test_reports_do_without_torch() -> None:
    code = (
        "import importlib, pkgutil, sys, revhooks.report as r\n"
        "for module in pkgutil.iter_modules(r.__path__, 'revhooks.report.'): importlib.import_module(module.name)\n"
        "assert 'revhooks.report.html' in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# -- groups, columns, small pictures


def test_groups_differ_in_numbers_only() -> None:
    rows = [
        ModuleRow("a.0.x", "X", 1, 1, "w"),
        ModuleRow("a.1.x", "X", 1, 2, "w"),
        ModuleRow("a.2.x", "Y", 1, 3, "w"),
        ModuleRow("a.3.x", "X", 1, 4, "other"),
        ModuleRow("b.3.x", "X", 1, 5, "w"),
        ModuleRow("a.4.x2", "X", 1, 6, "w"),
        ModuleRow("a.5.x3", "X", 1, 7, "w"),
    ]
    found = grouped(rows)
    assert [group.label for group in found] == ["a.5.x3", "a.4.x2", "b.3.x", "a.3.x", "a.0-1.x x2", "a.2.x"]
    assert sum(group.total.held_bytes for group in found) == sum(row.held_bytes for row in rows)


def test_groups_of_several_numbers() -> None:
    rows = [ModuleRow(f"s.{i}.b.{j}", "B", 1, 1) for i in range(2) for j in (0, 1, 10)]
    assert [group.label for group in grouped(rows)] == ["s.0-1.b.0-1,10 x6"]
    assert compact([3, 1, 2, 9, 11, 10]) == "1-3,9-11"


def test_the_worst_and_the_sums_of_a_group() -> None:
    rows = [ModuleRow(f"b.{i}", "B", 1, 0, "w", "r", 2, 3, 5, 0.1 * i) for i in range(3)]
    total = grouped(rows)[0].total
    assert (total.calls, total.rebuilds, total.rebuild_ns, total.error) == (6, 9, 15, 0.2)


def test_what_holds_nothing_is_one_line() -> None:
    rows = [ModuleRow("a", "A", 1, 0, "x"), ModuleRow("b", "B", 1, 0, "y"), ModuleRow("c", "C", 1, 0, "y")]
    assert nothing_held(grouped(rows)) == "3 modules hold nothing: 2 y, 1 x"
    assert nothing_held(grouped([ModuleRow("a", "A", 1, 0), ModuleRow("b", "A", 1, 0, "y")])) == "2 modules hold nothing: 1 y"
    assert nothing_held(grouped([ModuleRow("a", "A", 1, 0)])) == "1 module holds nothing"
    assert nothing_held([]) == ""


def test_reasons_have_numbers_in_their_order() -> None:
    rows = [
        ModuleRow("a", "A", 1, 3, "x", "nothing: no"),
        ModuleRow("b", "B", 1, 2, "y"),
        ModuleRow("c", "C", 1, 1, "x", "nothing: no"),
    ]
    assert list(reasons(grouped(rows)).values()) == [(1, "x. Nothing removes it: no"), (2, "y")]


def test_rows_of_kept_know_types() -> None:
    kept = [Kept("w", "h.0 (Block)", 1), Kept("w", "h.1 (Block)", 1), Kept("w", "somewhere", 1, "Gelu")]
    assert [(g.label, g.total.type) for g in grouped(rows_of_kept(kept))] == [("h.0-1 x2", "Block"), ("somewhere", "Gelu")]


def test_plain_is_no_contest_for_time_and_errors() -> None:
    record = gpt()
    best = {
        column.title: [c.name for c, cell in zip(record.choices, cells(column, record.choices), strict=True) if cell.best]
        for column in columns(record)
    }
    assert best["time /\nplain"] == ["reversible()"]
    assert best["held for\nbackward"] == ["replay=GPT2Block"]
    assert best["inversion\nerror"] == []  # all alike
    assert best["gradient\nerror"] == ["checkpoint GPT2Block"]


def test_a_measured_peak_is_a_column_where_one_was_measured() -> None:
    assert "peak,\nmeasured" in [column.title for column in columns(gpt())]
    assert "peak,\nmeasured" not in [column.title for column in columns(gpt(measured=False))]
    assert [column.title for column in columns(prediction())] == ["held for\nbackward", "peak,\npredicted"]


def test_what_failed_is_in_no_contest() -> None:
    column = columns(failing())[0]
    failed = cells(column, failing().choices)[2]
    assert (failed.text, failed.value, failed.best) == ("-", None, False)


def test_timeline_is_on_one_scale() -> None:
    picture = timeline({"plain": [8] * 4, "rev": [2] * 4}, width=4, height=4)
    assert picture.count("████") == 5


def test_categories_are_on_one_scale() -> None:
    lines = by_category(Timeline((0, 1), {"held": (8, 8), "rebuilt": (4, 4), "temporary": (0, 0)}), width=2).splitlines()
    assert [line.rpartition("│")[2] for line in lines[:2]] == ["██", "▄▄"]
    assert not any("temporary" in line for line in lines)


def test_stretches_of_time_keep_the_peak() -> None:
    assert max(over_time(range(100), [7 if i == 63 else 1 for i in range(100)], 9)) == 7
    assert over_time((), (), 3) == [0, 0, 0]


def test_a_name_without_room_on_the_axis_is_left_out() -> None:
    axis = timeline({"a": [1]}, width=12, marks={"a": [("forward", 0.0), ("backward", 0.2), ("optimizer", 0.9)]}).splitlines()[-1]
    assert axis.endswith("└──┴backward┴")


# -- pictures

NAMESPACE = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("name", RECORDS)
def test_pictures_are_xml_without_references(name: str) -> None:
    record = RECORDS[name]()
    for chosen in (None, *(one.name for one in record.choices)):
        picture = svg(record, choice=chosen)
        if not picture:
            assert not any(one.timeline.ns for one in record.choices if chosen in (None, one.name))
            continue
        root = ElementTree.fromstring(picture)
        assert root.tag == f"{NAMESPACE}svg"
        assert not re.search(r"https?:", picture.replace("http://www.w3.org/2000/svg", ""))
        assert not re.search(r"\b(href|url\(|@import)", picture)
        assert "prefers-color-scheme:dark" in picture
        assert "prefers-color-scheme" not in svg(record, choice=chosen, standalone=False)


def test_a_picture_has_axes_phases_and_a_legend() -> None:
    texts_in = [one.text for one in ElementTree.fromstring(svg(gpt())).iter(f"{NAMESPACE}text")]
    for words in ("0 B", "160.0 MiB", "forward", "backward", "plain, 131.2 MiB", "replay=GPT2Block, 38.0 MiB", "time of a step"):
        assert words in texts_in
    texts_in = [one.text for one in ElementTree.fromstring(svg(profile())).iter(f"{NAMESPACE}text")]
    for words in ("optimizer", "parameters, 10.0 MiB", "temporary, 9.0 MiB"):
        assert words in texts_in


def test_pictures_by_category_have_one_scale() -> None:
    record = gpt()
    axes = [
        re.findall(r'text-anchor="(?:end|middle)" fill="currentColor">([^<]*)<', svg(record, choice=c.name))
        for c in record.choices
    ]
    assert "160.0 MiB" in axes[0]
    assert all(axis == axes[0] for axis in axes)


def test_the_peak_is_as_high_as_it_is() -> None:
    """The uppermost point of a line is where its bytes are between the marks of the axis."""
    record = Record("report", "net", "cpu", "2", (choice("plain", 100, 120, 1000), choice("reversible()", 20, 60, 1200)))
    lines = [p.get("d", "") for p in ElementTree.fromstring(svg(record)).iter(f"{NAMESPACE}path") if p.get("fill") == "none"]
    highest = sorted(min(float(y) for y in re.findall(r" ([\d.]+)", line)) for line in lines)
    bottom, top = 276.0, 46.0  # of a picture of 120 MiB
    assert highest == [pytest.approx(top, abs=0.1), pytest.approx((bottom + top) / 2, abs=0.1)]


def test_long_timelines_are_thinned_to_their_peaks() -> None:
    long = tuple(7 * MIB if i == 4321 else MIB for i in range(10_000))
    record = Record("report", "net", "cpu", "2", (Choice("plain", timeline=Timeline(tuple(range(10_000)), {"held": long})),))
    assert len(svg(record)) < 50_000
    assert "held, 7.0 MiB" in svg(record)


def test_an_unknown_choice_has_no_picture() -> None:
    assert svg(gpt(), choice="nobody") == ""


# -- pages


class Checker(HTMLParser):
    """Elements that open and close in order, and what a page refers to."""

    VOID = frozenset({"meta", "link", "wbr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def checked(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("name", RECORDS)
def test_pages_are_well_formed_and_load_nothing(name: str, embedded: bool) -> None:
    record = RECORDS[name]()
    page = html(record, embedded=embedded)
    checker = checked(page)
    assert checker.references == ([] if embedded else ["data:,"])
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|url\(|@import|fetch\(|XMLHttp|import\(", page)
    text = "".join(checker.text)
    for words in (record.target, advice(record).partition("\n")[0], *(one.problem for one in record.choices)):
        assert words in text
    for group in grouped(record.modules):
        assert group.label in text


def test_a_fragment_styles_nothing_but_itself() -> None:
    fragment = html(gpt(), embedded=True)
    assert fragment.startswith("<div class='revhooks'>")
    style = re.search(r"<style>(.*?)</style>", fragment, re.DOTALL)
    assert style
    selectors = [one.strip() for rule in re.findall(r"([^{}]+)\{", style[1]) for one in rule.split(",")]
    assert selectors
    assert all(selector.startswith(".revhooks ") for selector in selectors)


def test_what_users_wrote_is_escaped() -> None:
    evil = "<img src=x onerror=alert(1)>'\"&"
    record = Record(
        "report", evil, evil, evil, (choice("plain", 2, 3, 1000), choice(evil, 1, 2, 1000, how=evil, measured_peak_bytes=1),
        Choice(evil, problem=evil)), Stats(), (ModuleRow(evil, evil, 1, 1, evil, evil),), optimizer=evil, optimizer_bytes=1,
        fits=(Fit(evil, evil, 1, 1, 1),),
    )  # fmt: skip
    page = html(record)
    assert "<img" not in page
    checked(page)
    for chosen in (None, evil):
        ElementTree.fromstring(svg(record, choice=chosen))


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_script_parses(tmp_path: Path) -> None:
    path = tmp_path / "script.js"
    path.write_text(SCRIPT)
    subprocess.run(["node", "--check", str(path)], check=True, timeout=60)


in_a_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium: apt-get install chromium, or REVHOOKS_CHROMIUM=its path"
)


@pytest.mark.slow
@in_a_browser
def test_the_browser_tells_of_errors_and_requests(tmp_path: Path) -> None:
    path = tmp_path / "bad.html"
    path.write_text("<!doctype html><img src='other.png'><script>console.error('so'); missing()</script>")
    with opened(tmp_path / "profile") as page:
        page.goto(path)
        page.evaluate("1")
        assert any('"so"' in line for line in page.logged)
        assert any("missing is not defined" in line for line in page.logged)
        assert any(url.endswith("other.png") for url in page.requested)


@pytest.mark.slow
@in_a_browser
def test_pages_in_a_browser(tmp_path: Path) -> None:
    with opened(tmp_path / "profile") as page:
        for name, make in RECORDS.items():
            path = tmp_path / f"{name}.html"
            path.write_text(html(make()))
            page.goto(path)
            assert not page.evaluate("document.documentElement.scrollWidth > window.innerWidth")
        path = tmp_path / "gpt.html"
        page.goto(path)

        def column(at: int, table: int = 0) -> list[str]:
            cells = f"[...document.querySelectorAll('table')[{table}].tBodies[0].rows].map(row => row.cells[{at}].innerText)"
            return page.evaluate(cells)  # type: ignore[no-any-return]

        def click(at: int, table: int = 0) -> None:
            page.evaluate(
                f"document.querySelectorAll('table')[{table}].tHead.rows[0].cells[{at}].querySelector('button').click()"
            )

        choices = [one.name for one in gpt().choices]
        assert column(0) == choices
        click(2)
        by_peak = sorted(gpt().choices, key=lambda one: -one.accounted_peak_bytes)
        assert column(0) == [one.name for one in by_peak]
        click(2)
        assert column(0) == [one.name for one in by_peak[::-1]]
        click(6)
        assert column(0)[-1] == "plain"  # which has no error
        click(0)
        assert column(0) == sorted(choices)
        heads = "[...document.querySelectorAll('th[aria-sort]')].map(head => head.innerText)"
        assert page.evaluate(heads) == ["step"]
        visible = "[...document.querySelectorAll('figure')].filter(one => one.offsetParent).map(one => one.dataset.choice)"
        assert page.evaluate(visible) == ["compared"]
        page.evaluate(
            "{const s = document.querySelector('select'); s.value = 'budget=25%'; s.dispatchEvent(new Event('change'))}"
        )
        assert page.evaluate(visible) == ["budget=25%"]
        widths = page.evaluate("[...document.querySelectorAll('table')[1].querySelectorAll('.rv-bar b')].map(b => b.offsetWidth)")
        assert widths[0] > widths[2] > 0
        assert widths == sorted(widths, reverse=True)
        twice = tmp_path / "twice.html"
        twice.write_text(f"<!doctype html>{html(revnet(), embedded=True)}{html(gpt(), embedded=True)}")
        page.goto(twice)
        click(1, table=3)
        assert column(0, table=3)[0] == "plain"
        assert column(0)[0] == "plain"
        assert page.evaluate("document.querySelectorAll('table')[0].querySelector('[aria-sort]')") is None
        assert page.logged == []
        assert {url.partition(":")[0] for url in page.requested} <= {"file", "data"}
        assert {Path(url).name for url in page.requested if url.startswith("file")} == {
            *(f"{name}.html" for name in RECORDS),
            "twice.html",
        }


# -- traces


def events_of(record: Record) -> list[dict[str, object]]:
    return json.loads(trace(record))["traceEvents"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", RECORDS)
def test_traces_keep_to_the_format(name: str) -> None:
    record = RECORDS[name]()
    for event in events_of(record):
        assert event["ph"] in {"M", "C", "X"}
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert isinstance(event["ts"], float | int)
        assert event["ts"] >= 0
        match event["ph"]:
            case "M":
                assert event["name"] in {"process_name", "thread_name"}
                assert isinstance(event["args"], dict)
                assert isinstance(event["args"]["name"], str)
            case "C":
                assert isinstance(event["args"], dict)
                assert all(isinstance(value, int) for value in event["args"].values())
            case "X":
                assert isinstance(event["dur"], float | int)
                assert event["dur"] >= 0


def assert_nested(record: Record) -> None:
    """On a track two slices are apart, or one is within the other; every track has one name."""
    tracks = defaultdict(list)
    for event in events_of(record):
        if event["ph"] == "X":
            start = round(event["ts"] * 1000)  # type: ignore[operator]
            tracks[event["pid"], event["tid"]].append((start, start + round(event["dur"] * 1000)))  # type: ignore[operator]
    for spans in tracks.values():
        for (a, b), (c, d) in itertools.combinations(sorted(spans, key=lambda span: (span[0], -span[1])), 2):
            assert c >= b or d <= b, (a, b, c, d)
    named = [(e["pid"], e["tid"]) for e in events_of(record) if e["name"] == "thread_name"]
    assert len(named) == len(set(named))
    assert set(tracks) <= set(named)


@pytest.mark.parametrize("name", RECORDS)
def test_slices_nest(name: str) -> None:
    assert_nested(RECORDS[name]())


def test_slices_that_overlap_are_on_tracks_of_their_own() -> None:
    spans = [(0, 10), (5, 15), (5, 8), (12, 20), (15, 15), (3, 30)]
    record = Record("profile", "net", "cpu", "2", slices=tuple(Slice(f"b.{i}", "rebuild", *span) for i, span in enumerate(spans)))
    assert_nested(record)
    found = [event for event in events_of(record) if event["ph"] == "X"]
    assert sorted(event["name"] for event in found) == [f"b.{i}" for i in range(len(spans))]  # type: ignore[type-var]
    assert len({event["tid"] for event in found}) > 1


def test_a_trace_has_counters_and_a_track_for_each_kind() -> None:
    record = profile()
    events = events_of(record)
    counters = [event for event in events if event["ph"] == "C"]
    assert len(counters) == len(record.choices[0].timeline.ns)
    assert counters[7]["args"] == {name: values[7] for name, values in record.choices[0].timeline.bytes.items()}
    assert counters[7]["ts"] == record.choices[0].timeline.ns[7] / 1000
    tracks = {event["args"]["name"]: event["tid"] for event in events if event["name"] == "thread_name"}  # type: ignore[index]
    assert set(tracks) == {"phases", "forward", "backward", "rebuild", "optimizer"}
    rebuilt = [event for event in events if event["ph"] == "X" and event["tid"] == tracks["rebuild"]]
    assert [event["name"] for event in rebuilt] == ["body.3", "body.2", "body.1", "body.0"]
    assert (rebuilt[0]["ts"], rebuilt[0]["dur"]) == (20_000, 2_000)


def test_each_choice_is_a_process() -> None:
    processes = [event["args"]["name"] for event in events_of(gpt()) if event["name"] == "process_name"]  # type: ignore[index]
    assert [name.partition(",")[0] for name in processes] == [one.name for one in gpt().choices]


# -- flame graphs


@pytest.mark.parametrize(("what", "field"), [("held", "held_bytes"), ("saved", "saved_plain_bytes")])
def test_flamegraph(what: str, field: str) -> None:
    text = flamegraph(gpt(), what=what)
    lines = text.splitlines()
    stacks = [line.rpartition(" ")[0] for line in lines]
    assert stacks == sorted(set(stacks))
    assert all(re.fullmatch(r"\S+ [1-9]\d*", line) for line in lines)
    assert sum(int(line.rpartition(" ")[2]) for line in lines) == sum(getattr(row, field) for row in gpt().modules)
    assert "model;transformer;h;0;mlp;act" in stacks


def test_flamegraph_of_odd_names() -> None:
    rows = (ModuleRow("a b.c;d", "X", 1, 2), ModuleRow("a b.c d", "X", 1, 3), ModuleRow("", "Net", 1, 4))
    assert flamegraph(Record("report", "x", "cpu", "2", modules=rows)) == "model 4\nmodel;a_b;c_d 5\n"


def test_flamegraph_of_something_else() -> None:
    with pytest.raises(ValueError, match="expected one of 'held', 'saved', got 'time'"):
        flamegraph(gpt(), what="time")
