"""Which uses of PyTorch survive a reversible library: every case over every contender, each in a process of its own.

    python bench/semantics.py                                   # all; writes results/semantics.json and docs/semantics.md
    python bench/semantics.py --only revhooks --case dropout    # some, on the screen

A case is `ok` if outputs, gradients, buffers, generators and what is left in memory are those of plain autograd.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import signal
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from semantics_branches import mlp
from semantics_cases import CASES, EVERY, LIMITS
from semantics_contenders import CONTENDERS, Contender, Options
from semantics_trial import Case, Result, Storages, Trial, difference

from revhooks.record import human_bytes

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "semantics.json"
PAGE = HERE.parent / "docs" / "semantics.md"
TIMEOUT = 300.0
HELD_DEPTH = 32


@dataclass(frozen=True)
class Outcome:
    """One cell.

    Attributes:
        word: ``ok``, ``error``, ``wrong``, ``leak``, ``crash`` or ``n/a``.
        detail: the figure, the first line of the message, or the reason.
        options: the options that it took, if the default did not do.
        default: what the default gave then.
    """

    word: str
    detail: str = ""
    options: Options | None = None
    default: str = ""

    def told(self) -> dict[str, Any]:
        """What there is to say, for JSON."""
        return {key: value for key, value in asdict(self).items() if value}


# -- one cell


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    text = f"{type(error).__name__}: {lines[0]}"
    return text if len(text) <= 160 else f"{text[:157]}..."


def problem(key: str, expected: Any, got: Any, tolerance: float) -> str:
    """How a value differs, or ``""``."""
    if isinstance(expected, list) and all(v is None or isinstance(v, torch.Tensor) for v in expected):
        off = difference(expected, got)
        if off <= tolerance:
            return ""
        if off < float("inf"):
            nothing = all(v is None or not v.any() for v in expected)
            return f"{key} written where plain autograd writes none" if nothing else f"{key} off by {off:.2g}"
        return f"{key} missing or not finite"
    if expected == got:
        return ""
    if key == "left":
        objects = got["objects a step"]
        return f"{human_bytes(got['bytes'])} of tensors left" + (f", {objects} objects a step" if objects else "")
    if isinstance(expected, dict):
        return f"{key} differ: " + ", ".join(name for name in expected if expected[name] != got[name])
    return f"{key}: {got} instead of {expected}"


def judge(expected: list[Result], got: list[Result], tolerance: float) -> Outcome:
    """Compare step by step; the first step that differs is what is told."""
    for number, (plain, other) in enumerate(zip(expected, got, strict=True), 1):
        if "instead" in other:
            return Outcome("wrong", other["instead"])
        problems = {key: text for key in plain if (text := problem(key, plain[key], other[key], tolerance))}
        if problems:
            when = f" (step {number})" if number > 1 else ""
            return Outcome("leak" if "left" in problems else "wrong", "; ".join(problems.values()) + when)
    return Outcome("ok")


def attempt(case: Case, contender: Contender, options: Options) -> Outcome:
    """Run a case in this process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = Trial(case, contender, options, plain=True).run()
        try:
            got = Trial(case, contender, options, plain=False).run()
        except Exception as error:
            return Outcome("ok" if case.may_raise and isinstance(error, RuntimeError) else "error", first_line(error))
    return judge(expected, got, max(case.tolerance, contender.tolerance))


def held(contender: Contender, options: Options) -> float:
    """Bytes held after the forward of a deep chain, over those that plain autograd holds."""

    def measure(*, plain: bool) -> int:
        width = 8 if contender.full_width else 4
        torch.manual_seed(0)
        net = (contender.plain if plain else contender.chain)([mlp(width).double() for _ in range(2 * HELD_DEPTH)], options)
        x = torch.randn(2048, 8, dtype=torch.float64, requires_grad=True)
        h = x.clone()
        context = contender.context if not plain else CONTENDERS["plain"].context
        with context(), Storages() as storages:
            y = net(h)
        return storages.alive() - y.untyped_storage().nbytes()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        measure(plain=False)  # what is made once in a process, whatever the depth, does not count
        return measure(plain=False) / measure(plain=True)


# -- a process a cell


def child(connection: Connection, task: str, name: str, case: str, options: Options) -> None:
    torch.set_num_threads(1)
    for descriptor in (1, 2):  # what libraries say before they die
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    contender = CONTENDERS[name]
    connection.send(held(contender, options) if task == "held" else attempt(EVERY[case], contender, options))


def isolated(task: str, name: str, case: str, options: Options) -> Any:
    """Run in a fresh process; an `Outcome` also when it dies."""
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(sender, task, name, case, options))
    process.start()
    sender.close()
    try:
        result = receiver.recv() if receiver.poll(TIMEOUT) else Outcome("crash", f"hangs: killed after {TIMEOUT:.0f} s")
    except EOFError:
        process.join()
        code = process.exitcode or 0
        result = Outcome("crash", signal.Signals(-code).name if code < 0 else f"exit status {code}")
    process.kill()
    process.join()
    return result


def cell(name: str, case: str, *, in_process: bool = False) -> Outcome:
    """The contender's outcome: of its default, or of the first option that does the case."""
    contender = CONTENDERS[name]
    if case in contender.unable:
        return Outcome("n/a", contender.unable[case])

    def run(options: Options) -> Outcome:
        return attempt(EVERY[case], contender, options) if in_process else isolated("case", name, case, options)

    default = run({})
    if default.word == "ok":
        return default
    for options in contender.options:
        outcome = run(options)
        if outcome.word == "ok":
            return Outcome("ok", outcome.detail, options, f"{default.word}: {default.detail}")
    return default


# -- all cells


Table = dict[str, dict[str, Outcome]]


def run_all(names: list[str], cases: list[str], *, in_process: bool) -> Table:
    table: Table = {case: {} for case in cases}
    for name in names:
        start = time.monotonic()
        for case in cases:
            table[case][name] = cell(name, case, in_process=in_process)
        words = [table[case][name].word for case in cases]
        print(f"{name}: {words.count('ok')} of {len(words)} ok, {time.monotonic() - start:.0f} s", file=sys.stderr)
    return table


def held_by_options(names: list[str], table: Table) -> dict[str, dict[str, Any]]:
    """What each contender holds after forward, over plain: by default, and with the options that the table needs."""
    shares: dict[str, dict[str, Any]] = {}
    for name in names:
        used = [cells[name].options for cells in table.values() if cells[name].options]
        every = {spell(options): options for options in [{}, *used] if options is not None}
        shares[name] = {text: round(isolated("held", name, "", options), 3) for text, options in every.items()}
    return shares


def record(table: Table, shares: dict[str, Any]) -> dict[str, Any]:
    names = list(next(iter(table.values())))
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": "cpu",
        "threads": 1,
        "versions": {name: CONTENDERS[name].version for name in names},
        "held_after_forward_over_plain": shares,
        "cases": {
            case: {"title": EVERY[case].title, "outcomes": {name: outcome.told() for name, outcome in cells.items()}}
            for case, cells in table.items()
        },
    }


# -- the page


def spell(options: Options | None) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items()) if options else ""


INTRO = """# Semantics: revhooks and its peers

What plain PyTorch allows around a chain of three additive couplings, run on every library that trains such a chain without
storing its activations. Each cell is a fresh process: outputs, gradients of the input and of all parameters, buffers,
generators and what is left in memory are compared with plain autograd's, from the same parameters, inputs and seeds, over one
to three steps. Made by

```sh
python bench/semantics.py                                   # this page, and bench/results/semantics.json
python bench/semantics.py --only revhooks --case dropout    # one cell, on the screen
```

| word | meaning |
|---|---|
| ok | as plain autograd, within {tolerance:.0e} of the largest element (float64); ok* needs an option, told below |
| error | an exception |
| wrong | no exception, and something differs from plain autograd |
| leak | memory survives that plain autograd gives back |
| crash | the process died |
| n/a | the library has no way to say it |

Adapters are in `bench/semantics_contenders.py`. Where the default of a library does not do a case, its documented options are
tried in turn, as far as they leave its memory saving on. Except in the cases about that, nobody else uses the tensor that a
library is given, so that it may free it; where it frees one that is used, it reads freed memory, and figures vary. momentumnet
computes another function: it is compared with its own mode that stores activations, within 1e-3.
"""


def mark(outcome: Outcome, number: int | None) -> str:
    word = f"{outcome.word}*" if outcome.options else outcome.word
    return f"{word} <sup>{number}</sup>" if number else word


def note(case: str, outcome: Outcome) -> str:
    if outcome.options:
        return f"{EVERY[case].title}: ok with `{spell(outcome.options)}`; by default {outcome.default}"
    return f"{EVERY[case].title}: {'raises ' if outcome.word == 'ok' else ''}{outcome.detail}"


def page(table: Table, shares: dict[str, Any]) -> str:
    """The markdown page."""
    shown = [name for name in next(iter(table.values())) if name != "plain" and " " not in name]
    notes: dict[str, list[str]] = {name: [] for name in shown}
    cases = {case: cells for case, cells in table.items() if case in CASES}
    limits = {case: cells for case, cells in table.items() if case in LIMITS}
    totals = [f"{sum(cells[name].word == 'ok' for cells in cases.values())}" for name in shown]
    versions = ", ".join(f"{name} {CONTENDERS[name].version}" for name in shown if CONTENDERS[name].package != "torch")
    parts = [
        INTRO.format(tolerance=CONTENDERS["plain"].tolerance),
        f"torch {torch.__version__}, Python {platform.python_version()}, CPU; {versions}.\n",
        *rows(cases, shown, notes),
        f"| **ok, of {len(cases)}** | {' | '.join(totals)} |\n",
        variants(cases),
        "## What revhooks does not do\n",
        *rows(limits, shown, notes),
        "\n## What the options cost\n",
        held_table(shares, shown),
        "## Notes\n",
        *[numbered(name, notes[name]) for name in shown if notes[name]],
    ]
    return "\n".join(part for part in parts if part)


def rows(table: Table, shown: list[str], notes: dict[str, list[str]]) -> list[str]:
    """A table of cases by contenders; what there is to say about a cell goes to the notes."""
    lines = [f"| | {' | '.join(shown)} |", f"|{'---|' * (len(shown) + 1)}"]
    for case, cells in table.items():
        marks = []
        for name in shown:
            outcome, number = cells[name], None
            if outcome.detail or outcome.options:
                notes[name].append(note(case, outcome))
                number = len(notes[name])
            marks.append(mark(outcome, number))
        lines.append(f"| {EVERY[case].title} | {' | '.join(marks)} |")
    return lines


def numbered(name: str, notes: list[str]) -> str:
    return f"**{name}**\n\n" + "\n".join(f"{i}. {text}" for i, text in enumerate(notes, 1)) + "\n"


def variants(table: Table) -> str:
    """The other ways to use revhooks, in a sentence each."""
    lines = []
    for name in next(iter(table.values())):
        if name.startswith("revhooks "):
            bad = [f"{EVERY[case].title}: {cells[name].word}" for case, cells in table.items() if cells[name].word != "ok"]
            lines.append(f"- {name}: {'; '.join(bad) or 'ok in every case'}.")
    text = (
        "The column revhooks is a chain of `AdditiveCoupling`. Two other uses run over the same cases: a\n"
        "`ReversibleSequential`, and a class that is only registered with its inverse.\n\n"
    )
    return text + "\n".join(lines) + "\n" if lines else ""


def held_table(shares: dict[str, Any], shown: list[str]) -> str:
    rows = [
        f"| {name} | {f'`{text}`' if text else 'default'} | {share:.0%} |"
        for name in shown
        for text, share in shares.get(name, {}).items()
    ]
    head = f"Held after the forward of {HELD_DEPTH} couplings, over what plain autograd holds:\n\n"
    return head + "\n".join(["| | options | held |", "|---|---|---|", *rows]) + "\n"


def show(table: Table) -> None:
    for case, cells in table.items():
        for name, outcome in cells.items():
            told = f"{case:<18} {name:<20} {mark(outcome, None):<6}"
            print(f"{told} {spell(outcome.options)} {outcome.default} {outcome.detail}".rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(CONTENDERS), help="a contender; may be repeated")
    parser.add_argument("--case", action="append", choices=list(EVERY), help="a case; may be repeated")
    parser.add_argument("--in-process", action="store_true", help="all cells in this process: a crash ends it")
    options = parser.parse_args()
    names, cases = options.only or list(CONTENDERS), options.case or list(EVERY)
    torch.set_num_threads(1)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    peers = [CONTENDERS[name].package for name in names if CONTENDERS[name].package not in ("torch", "revhooks")]
    multiprocessing.get_context("forkserver").set_forkserver_preload(["semantics_cases", "torch._dynamo", *peers])
    table = run_all(names, cases, in_process=options.in_process)
    show(table)
    if options.only or options.case:
        return
    shares = held_by_options(names, table)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(record(table, shares), indent=1) + "\n")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(table, shares))


if __name__ == "__main__":
    main()
