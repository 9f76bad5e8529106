"""README and docs: their code runs, their commands are understood, their figures are of the results, their links lead somewhere.

A block of Python runs in a module of its page, in order with the others. What a reader need not see may come before it, in a
comment ``<!-- setup: ... -->``; ``<!-- needs: name, ... -->`` says without which modules it is skipped.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import linecache
import pkgutil
import re
import runpy
import shlex
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import revhooks.cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"((?:^<!-- (?:setup|needs):.*?-->\n)*)^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
HIDDEN = re.compile(r"^<!-- (setup|needs):(.*?)-->$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")

pytestmark = pytest.mark.cpu(reason="blocks choose where they run")


class Block(NamedTuple):
    """One fenced block: its language, its text, the line of its page that it begins in, and what its comments say."""

    language: str
    text: str
    line: int
    setup: str
    needs: list[str]


def blocks(page: Path, language: str = "") -> list[Block]:
    text = page.read_text()
    found = []
    for match in FENCE.finditer(text):
        hidden = {"setup": "", "needs": ""}
        for kind, said in HIDDEN.findall(match[1]):
            hidden[kind] += said.strip(" ") if kind == "setup" else said
        line = text.count("\n", 0, match.start(3))
        found.append(Block(match[2], match[3], line, hidden["setup"], re.findall(r"[\w.]+", hidden["needs"])))
    return [block for block in found if not language or block.language == language]


def with_blocks(language: str) -> list[Any]:
    return [pytest.param(page, id=page.stem) for page in PAGES if blocks(page, language)]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """In place of the suite's: blocks meet the package as users do."""
    torch.manual_seed(0)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """What the blocks of a page are the source of."""
    made = types.ModuleType("of_the_docs")
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return made


@pytest.fixture
def _as_found() -> Iterator[None]:
    """Registrations, process groups and defaults of a page are gone after it."""
    before = set(revhooks.registered() or ())
    yield
    for cls in set(revhooks.registered() or ()) - before:
        revhooks.unregister(cls)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch.compiler.reset()


def is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf", "ignore:.*should not be instantiated"
)  # dynamo's
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX`", "ignore:GPU available but not used")  # lightning's
@pytest.mark.parametrize("page", with_blocks("python"))
@pytest.mark.usefixtures("_as_found")
def test_python_runs(page: Path, module: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    exec("import torch, revhooks", module.__dict__)
    missing = set()
    for block in blocks(page, "python"):
        if lacking := [name for name in block.needs if not is_there(name)]:
            missing.update(lacking)
            continue
        run(block.setup, "setup of " + page.name, 0, module)
        run(block.text, str(page), block.line, module)
    if missing and all(block.needs for block in blocks(page, "python")):
        pytest.skip(f"needs {', '.join(sorted(missing))}")


def run(code: str, name: str, line: int, module: types.ModuleType) -> None:
    """Execute code as if it were a file of that name, from that line on: so a traceback shows the page."""
    source = "\n" * line + code
    name = f"<{name}:{line}>"
    linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name
    exec(compile(source, name, "exec"), module.__dict__)


# -- commands


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[argparse.Namespace]:
    """What commands are asked for, in place of what they do."""
    asked: list[argparse.Namespace] = []

    def note(options: argparse.Namespace) -> int:
        asked.append(options)
        return 0

    for found in pkgutil.iter_modules(revhooks.cli.__path__):
        command = importlib.import_module(f"revhooks.cli.{found.name}")
        if hasattr(command, "add_parser"):
            monkeypatch.setattr(command, "run", note)
    return asked


def commands(page: Path) -> list[list[str]]:
    lines = [line for block in blocks(page, "sh") for line in block.text.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("page", with_blocks("sh"))
def test_commands_are_understood(page: Path, parsed: list[argparse.Namespace]) -> None:
    for words in commands(page):
        program, *rest = words
        if program == "revhooks":
            understood(rest, parsed)
        elif program in ("torchrun", "accelerate"):
            assert "-m revhooks" in shlex.join(rest), words
            understood(rest[rest.index("revhooks") + 1 :], parsed)
        elif program == "python":
            assert (ROOT / rest[0]).is_file() or rest[:2] == ["-m", "pytest"], words
        elif program == "make":
            assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
        else:
            assert program == "pip", f"{words}: of no kind that is known here"


def understood(words: list[str], parsed: list[argparse.Namespace]) -> None:
    """A command line of ours is parsed; what it names of this repository is there; `--help` and `--version` are done."""
    seen = len(parsed)
    if set(words) & {"--help", "--version"}:
        with pytest.raises(SystemExit) as ended:
            revhooks.cli.main(words)
        assert ended.value.code == 0
        return
    try:
        assert revhooks.cli.main(words) == 0
    except SystemExit as ended:
        pytest.fail(f"revhooks {shlex.join(words)}: exit code {ended.code}")
    assert len(parsed) == seen + 1, words
    for word in words:
        if word.startswith(("examples/", "bench/")):
            assert (ROOT / word.partition(":")[0]).is_file(), word


# -- figures


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "bench" / "figures.py"))


@pytest.mark.parametrize("page", [pytest.param(p, id=p.stem) for p in PAGES if "<!-- figures:" in p.read_text()])
def test_figures_are_those_of_the_results(page: Path, figures: dict[str, Any]) -> None:
    text = page.read_text()
    assert len(figures["MARKED"].findall(text)) == text.count("<!-- figures:")
    assert figures["written"](text) == text, "python bench/figures.py writes them again"


def test_a_figure_that_is_measured_again_is_missed(figures: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "README.md").read_text()
    measured = figures["results"]

    def again(name: str) -> Any:
        found = measured(name)
        if name == "fixed_cost":
            found["us_a_block"] *= 2
        return found

    monkeypatch.setitem(figures["written"].__globals__, "results", again)
    assert figures["written"](page) != page


def test_the_picture_is_what_it_is_said_to_be() -> None:
    page = (ROOT / "README.md").read_text()
    alt, picture = re.search(r"!\[([^]]*)\]\(([^)]*\.svg)\)", page).groups()  # type: ignore[union-attr]
    shown = re.findall(r">([^<>]+), ([\d.]+ \w+)</text>", (ROOT / picture).read_text())
    assert len(shown) == 2
    assert shown[0][0] == "plain"
    for name, peak in shown:
        assert peak in alt, name


# -- links


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in LINK.findall(text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page.name}: {target}"


def test_every_page_is_found_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    assert {page.name for page in PAGES[1:]} <= set(re.findall(r"docs/([\w-]+\.md)", readme))


def test_every_block_says_what_it_is() -> None:
    for page in PAGES:
        assert page.read_text().count("\n```") == 2 * len(blocks(page)), page
        for block in blocks(page):
            assert block.language in ("python", "sh", "text"), f"{page.name}, line {block.line}"
