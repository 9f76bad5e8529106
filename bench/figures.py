"""The figures of the README and of docs/figures.md, from bench/results/*.json.

    python bench/figures.py            # writes them again
    python bench/figures.py --check    # exit code 1 where a page is not what the results say

A page has ``<!-- figures: name -->`` before and ``<!-- end -->`` after what is written here. Nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
MARKED = re.compile(r"<!-- figures: (\w+) -->\n(.*?)<!-- end -->\n", re.DOTALL)
MIB = 2**20
CUDA_COMMIT = "8f8ab2f"  # whose code host_cost_cuda.json was measured with: not this one's, and the pages say so
Cell = str | float | None


def results(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def named(rows: Sequence[dict[str, Any]], name: str, key: str = "name") -> dict[str, Any]:
    """The row of that name."""
    return next(row for row in rows if row[key] == name)


def contender(rows: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    return named(rows, name, "contender")


def table(head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [f"| {' | '.join(cell(one) for one in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def cell(value: Cell) -> str:
    return "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def share(part: float, whole: float = 1) -> str:
    """A percentage, with a decimal where it is small."""
    percent = 100 * part / whole
    return f"{percent:.1f}%" if percent < 9.95 else f"{percent:.0f}%"


def size(nbytes: float) -> str:
    mib = nbytes / MIB
    return f"{mib / 1024:.1f} GiB" if mib >= 1024 else f"{mib:.0f} MiB"


def paragraph(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 125, break_long_words=False, break_on_hyphens=False)) + "\n"


# -- the README

_H200 = (
    ("revvit", "RevViT-L, 24 blocks, 64 images, bf16"),
    ("revnet", "RevNet, 32 blocks, 64 images of 56x56"),
    ("wide", "GPT, 12 layers of 1,024, 32 x 1024 tokens, bf16"),
    ("llama", "Llama of transformers, 8 layers of 2,048, bf16"),
    ("gpt", "GPT-2 small, 8 x 1024 tokens, bf16"),
    ("resnet50", "ResNet-50, 128 images, bf16"),
)
_CPU = (
    ("GPT, 6 layers", "GPT, 6 layers of 384"),
    ("Hugging Face GPT-2, 6 layers", "Hugging Face's GPT-2, 6 layers, dropout"),
    ("Llama, 6 layers", "Llama, 6 layers"),
    ("ResNet-50, 64x64", "ResNet-50, 64x64"),
)


def _cpu_chain() -> tuple[dict[str, Any], dict[str, Any]]:
    chain = results("coupling_chain")
    return chain["resident_peak_bytes"], chain["time_over_plain"]


def _replayed() -> dict[str, dict[str, Any]]:
    """Of the GPT of 6 layers, by contender."""
    return {row["name"]: row for row in named(results("ordinary")["replay"], "GPT")["contenders"]}


_GLOW = "Glow of normflows, 48 blocks, 32 images of 32x32"


def _glow() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = named(results("flows")["flows"], "normflows Glow, L=3, K=16")["rows"]
    return found


def gives() -> str:
    """The peak of a step over that of plain autograd."""
    rows: list[list[Cell]] = []
    cuda = results("host_cost_cuda")
    for key, name in _H200:
        by = {row["contender"]: row for row in cuda[key]}
        ours = max(by[c]["peak_over_plain"] for c in ("reversible()", 'reversible(guard="off")'))
        replay = by.get("replay=")
        rows.append(
            [
                "H200",
                name,
                size(by["plain"]["peak_mib"] * MIB),
                f"**{share(ours)}**",
                share(replay["peak_over_plain"]) if replay else None,
                share(by["torch checkpoint"]["peak_over_plain"]),
            ]
        )
    peaks, _ = _cpu_chain()
    plain = peaks["plain"]
    rows.append(
        [
            "CPU",
            "32 conv couplings",
            size(plain),
            f"**{share(peaks['revhooks'], plain)}**",
            None,
            share(peaks["checkpoint"], plain),
        ]
    )
    cifar = results("cifar_table")["columns"]["110/110"]
    plain, ours = cifar["RevNet"]["step_peak_bytes"], cifar["RevNet, revhooks"]["step_peak_bytes"]
    rows.append(["CPU", "RevNet-110, 100 images (the picture)", size(plain), f"**{share(ours, plain)}**", None, None])
    for key, name in _CPU:
        row = named(results("ordinary")["ordinary"], key)
        plain, extra = row["plain_peak_bytes"], [None, None]
        if key == "GPT, 6 layers":
            extra = [share(_replayed()[c]["peak_bytes"], plain) for c in ("replay", "checkpoint")]
        rows.append(["CPU", name, size(plain), f"**{share(row['peak_bytes'], plain)}**", *extra])
    glow = _glow()
    plain, kept, ours = (contender(glow, name)["peak"] for name in ("plain", "inputs kept", "reversible"))
    rows.append(["CPU", _GLOW, size(plain), f"**{share(ours, plain)}**", share(kept, plain), None])
    head = (
        "",
        "peak of a step over plain autograd's",
        "plain",
        "`reversible()`",
        "`replay=` of its blocks",
        "checkpoint each block",
    )
    return table(head, rows)


def costs() -> str:
    """The time of a step over that of plain autograd."""
    rows: list[list[Cell]] = []
    cuda = results("host_cost_cuda")
    for key, name in _H200:
        by = {row["contender"]: row for row in cuda[key]}
        over = [by[c]["over_plain"] if c in by else None for c in ("reversible()", "replay=", "torch checkpoint", "budget=")]
        rows.append(["H200", name, f"{by['plain']['ms']:.0f} ms", *over])
    _, times = _cpu_chain()
    rows.append(["CPU", "32 conv couplings", None, times["revhooks"], None, times["checkpoint"], None])
    for key, name in _CPU:
        row, extra = named(results("ordinary")["ordinary"], key), [None, None]
        if key == "GPT, 6 layers":
            extra = [_replayed()[c]["time_over_plain"] for c in ("replay", "checkpoint")]
        rows.append(["CPU", name, None, row["time_over_plain"], *extra, None])
    kept, ours = (contender(_glow(), name)["time"] for name in ("inputs kept", "reversible"))
    rows.append(["CPU", _GLOW, None, ours, kept, None, None])
    head = (
        "",
        "step time over plain autograd's",
        "plain",
        "`reversible()`",
        "`replay=`",
        "checkpoint",
        '`budget="auto"`, all fits',
    )
    return table(head, rows)


def where() -> str:
    """Where the two tables of the README come from."""
    cuda, cpu = results("host_cost_cuda"), results("ordinary")
    return paragraph(
        f"H200: torch {cuda['torch']}, the allocator's peak over what was there before the step, of the RevNet the larger "
        f"of two; measured "
        f"at an earlier commit ({CUDA_COMMIT}), forward and backward by turns in one process "
        f"(`bench/results/host_cost_cuda.json`). CPU: "
        f"torch {cpu['torch']}, {cpu['threads']} threads on a machine that was shared, so that times of two runs differ by "
        f"up to a "
        "tenth; peaks are accounted bytes, of the couplings the resident set (`coupling_chain.json`, `ordinary.json`, "
        "`cifar_table.json`). More of them: [docs/figures.md](docs/figures.md)."
    )


def small() -> str:
    """When not to use it: what a block costs, and models whose host is the critical path."""
    fixed, cuda = results("fixed_cost"), results("host_cost_cuda")
    gpt, resnet = (contender(cuda[key], "reversible()")["over_plain"] for key in ("gpt", "resnet50"))
    text = (
        f"- **Tiny tensors.** A block costs the host about {fixed['us_a_block']:.0f} microseconds of "
        f"Python, a `torch.utils.checkpoint` region {fixed['us_a_checkpoint_region']:.0f} in the same run. Where "
        f"there is little "
        f"to hold there is nothing to give back.",
        f"- **A GPU that waits for its host.** All that works in Python delays launches: GPT-2 small takes {gpt:.2f} "
        f"of plain's "
        f"time and ResNet-50 {resnet:.2f} on an H200, for "
        f"{share(contender(cuda['gpt'], 'reversible()')['peak_over_plain'])} and "
        f"{share(contender(cuda['resnet50'], 'reversible()')['peak_over_plain'])} of the memory. The longer a "
        f"kernel, the less it matters.",
    )
    return "".join(
        textwrap.fill(line, 125, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False) + "\n" for line in text
    )


# -- docs/figures.md


def chain() -> str:
    got = results("coupling_chain")
    held, mib = got["held_after_forward_bytes"], lambda nbytes: f"{nbytes / MIB:.1f} MiB"
    rows = [[name, over, size(got["resident_peak_bytes"][name])] for name, over in got["time_over_plain"].items()]
    over_one = got["accounted_peak_bytes_depth_64"] / got["accounted_peak_bytes_plain_one_block"]
    said = paragraph(
        f"Accounted bytes: held after forward {mib(held['8'])} at depth 8 and {mib(held['64'])} at depth 64; the "
        f"peak of the whole "
        f"step at depth 64 is {over_one:.2f} times that of plain autograd with ONE block. Float32 reconstruction error "
        f"{got['float32_reconstruction_error']:.0e}, gradients within {got['float32_gradient_difference']:.0e}. torch "
        f"{got['torch']}, {got['threads']} threads."
    )
    return table(("", "step time / plain", "peak of the resident set"), rows) + "\n" + said


def cifar() -> str:
    head = (
        "",
        "published by memcnn",
        "memcnn, measured",
        "`reversible()`",
        "with the rest under `revhooks.checkpoint`",
        "its peak / memcnn's",
    )
    rows = []
    for key, column in results("cifar_table")["columns"].items():
        published = results("cifar_table")["published"][key]
        theirs, both = column["RevNet, memcnn"], column["RevNet, revhooks + checkpoint"]
        rows.append(
            [
                f"RevNet-{key.partition('/')[2]}",
                f"{published['revnet_mib']:.0f} MiB",
                size(theirs["held_bytes"]),
                size(column["RevNet, revhooks"]["held_bytes"]),
                size(both["held_bytes"]),
                share(both["step_peak_bytes"], theirs["step_peak_bytes"]),
            ]
        )
    return table(head, rows)


def ordinary() -> str:
    rows = [
        [row["name"], f"-{100 * row['spared']:.0f}%", row["time_over_plain"], "yes" if row["gradient_difference"] == 0 else "no"]
        for row in results("ordinary")["ordinary"]
    ]
    return table(("", "saved bytes", "step time / plain", "gradients bitwise equal"), rows)


def replayed() -> str:
    rows = [
        [kind["name"], one["name"], f"{one['peak_bytes'] / MIB:.1f} MiB", one["time_over_plain"], one["time_over_checkpoint"]]
        for kind in results("ordinary")["replay"]
        for one in kind["contenders"]
    ]
    return table(("", "", "peak", "step time / plain", "/ checkpoint"), rows)


def budgets() -> str:
    rows = [
        [kind["name"], name, share(one["peak_over_peer"]), one["time_over_peer"]]
        for kind in results("ordinary")["budget"]
        for name, one in kind["against"].items()
    ]
    return table(("", "a budget with the peak of", "peak over its", "step time over its"), rows)


def host() -> str:
    by = {row["contender"]: row for row in results("host_cost")["gpt"]}
    names = ("plain", "torch checkpoint", "hooks that return their argument", "ops=False", "budget=, replay=", "reversible()")
    names += ('reversible(guard="off")', "replay=", 'replay=, guard="off"')
    return table(
        ("", "step / plain", "kernels"), [[name, by[name]["over_plain"], f"{by[name]['kernels']:.0f}"] for name in names]
    )


def chains_of_host() -> str:
    got = results("host_cost")
    couplings, streams = (contender(got[key], "reversible()")["over_checkpoint"] for key in ("revnet", "streams"))
    return paragraph(f"Couplings take {couplings:.2f} and two streams {streams:.2f} of checkpointing's time there.")


def cuda() -> str:
    got = results("host_cost_cuda")
    intro = paragraph(
        f"Step time over plain's and, in brackets, the allocator's peak over plain's; forward and backward by turns in one "
        f"process, torch "
        f"{got['torch']}, at an earlier commit, {CUDA_COMMIT} (`python bench/host_cost.py --device cuda`, "
        "`bench/results/host_cost_cuda.json`). The more the host is the critical path, as in GPT-2 small and ResNet-50, "
        "the more all that "
        "works in Python costs. `budget=` is one that all fits."
    )

    def both(key: str, name: str) -> Cell:
        row = next((row for row in got[key] if row["contender"] == name), None)
        return f"{row['over_plain']:.2f} ({row['peak_over_plain']:.3f})" if row else None

    names = ("torch checkpoint", "ops=False", "reversible()", "replay=", "budget=", "offload=True")
    said = [f"{name}, plain {contender(got[key], 'plain')['ms']:.0f} ms" for key, name in _H200]
    first = [[text, *(both(key, name) for name in names)] for (key, _), text in zip(_H200, said, strict=True) if key in _ORDINARY]
    chains = ("torch checkpoint", "reversible()", 'reversible(guard="off")', "two streams", "memcnn", "RevTorch", "revlib")
    second = [
        [text, *(both(key, name) for name in chains)] for (key, _), text in zip(_H200, said, strict=True) if key not in _ORDINARY
    ]
    code = [f"`{name}`" if "=" in name or "(" in name else name for name in names]
    return intro + "\n" + table(("", *code), first) + "\n" + table(("", *(f"`{n}`" if "(" in n else n for n in chains)), second)


_ORDINARY = {"wide", "llama", "gpt", "resnet50"}


def offload() -> str:
    """What moving to the host gives."""
    got = results("host_cost_cuda")

    def of(key: str, name: str) -> str:
        row = contender(got[key], name)
        return f"{row['over_plain']:.2f} and {share(row['peak_over_plain'])}"

    rows = [row for row in results("offload")["rows"] if row["workload"] == "the same, of long steps" and row["bus_gb_s"] == 50]
    plain, moved = contender(rows, "plain"), contender(rows, "offload=True")
    return paragraph(
        f"What it gives depends on the bus and on the host, which starts the copies. In time and peak over plain's, on an "
        f"H200 a GPT of width 1,024 takes {of('wide', 'offload=True')} ({of('wide', 'reversible()')} without), a GPT-2 small, "
        f"whose host has no time to spare, {of('gpt', 'offload=True')} ({of('gpt', 'reversible()')} without). Where "
        f"steps are long it is simulated only, "
        f"at 50 GB/s: {moved['step_ratio']:.2f} of plain's time, with {share(1 - moved['kept_ratio'])} of what a GPT "
        f"saves moved away, "
        f"in steps of {plain['step_ms'] / 1000:.1f} s (`bench/offload.py`)."
    )


def semantics() -> str:
    """How many cases of docs/semantics.md each library does."""
    cases = results("semantics")["cases"].values()
    names = [name for name in results("semantics")["versions"] if name != "plain" and not name.startswith("revhooks ")]
    done = {name: sum(case["outcomes"][name]["word"] == "ok" for case in cases) for name in names}
    second = max((name for name in names if name != "revhooks"), key=done.__getitem__)
    called = {"checkpoint": "`torch.utils.checkpoint`"}.get(second, second)
    return paragraph(
        f"What works around a chain, case by case and against {len(names) - 1} alternatives, is in "
        f"[semantics.md](semantics.md) "
        f"(`python bench/semantics.py`): of {len(cases)} cases revhooks does {done['revhooks']} as plain autograd does; the "
        f"next best, {called}, does {done[second]}. What revhooks does not do is listed there too."
    )


def flows() -> str:
    """What flow libraries' models hold, and take."""
    got = results("flows")
    rows: list[list[Cell]] = []
    for model in got["flows"]:
        plain = contender(model["rows"], "plain")
        rows += [
            [
                model["name"] if one is plain else "",
                one["contender"],
                f"{one['held'] / MIB:.1f} MiB",
                f"{one['peak'] / MIB:.1f} MiB",
                f"1/{plain['peak'] / one['peak']:.1f}",
                one["evaluations"],
                one["time"],
                "yes" if one["gradients"] == 0 else f"to {one['gradients']:.0e}",
            ]
            for one in model["rows"]
        ]
    head = ("", "", "held", "peak", "over plain's", "evaluations", "step time / plain", "gradients equal")
    sides = got["pictures"]
    said = paragraph(
        f"The largest picture that a step of a Glow of normflows (L=3, K=16, one picture) has room for in 16 GiB, predicted by "
        f"`revhooks report --fake --fit`: {sides['plain']} x {sides['plain']} plain, {sides['reversible()']} x "
        f"{sides['reversible()']} under `reversible()`. torch {got['torch']}, {got['threads']} threads."
    )
    return table(head, rows) + "\n" + said


def flows_by_hand() -> str:
    """What the least is that inverting takes."""
    rows = results("flows_by_hand")["rows"]
    hand, regions, ours = (contender(rows, name)["time"] for name in ("by hand", "checkpoint", "reversible"))
    other = contender(named(results("flows")["flows"], "normflows Glow, L=3, K=16")["rows"], "reversible")["time"]
    return paragraph(
        f"How much of it is ours: a backward written by hand for the Glow's block (one `torch.autograd.Function` that inverts it "
        f"and evaluates its network once, checks nothing and knows this block only; `bench/flows_by_hand.py`) takes {hand:.2f} "
        f"of plain's time, `torch.utils.checkpoint` of each block {regions:.2f}, `reversible()` {ours:.2f} in the same run. In "
        f"the table's it took {other:.2f}: runs of this model differ by that much."
    )


def flows_own() -> str:
    """Our own flows beside those of zuko and normflows."""
    got = results("flows_own")
    rows: list[list[Cell]] = []
    for row in got["rows"]:
        told = row.get("log_likelihood")
        first = row["contender"] == "revhooks"
        rows.append(
            [
                row["data"] if first else "",
                row["kind"] if first else "",
                row["contender"],
                f"{row['parameters']:,}" if "parameters" in row else None,
                told if told is None else float(told),
                float(row["over_zuko"]),
            ]
        )
    head = ("", "", "", "parameters", "log-likelihood of held-out data", "step time / zuko's")
    return table(head, rows)


FIGURES: dict[str, Callable[[], str]] = {
    f.__name__: f
    for f in (
        gives,
        costs,
        where,
        small,
        chain,
        cifar,
        ordinary,
        replayed,
        budgets,
        host,
        chains_of_host,
        cuda,
        offload,
        semantics,
        flows,
        flows_by_hand,
        flows_own,
    )
}


def written(page: str) -> str:
    """A page with its figures as the results have them."""
    return MARKED.sub(lambda match: f"<!-- figures: {match[1]} -->\n{FIGURES[match[1]]()}<!-- end -->\n", page)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options, old = parser.parse_args(), []
    for path in PAGES:
        page = path.read_text()
        if (new := written(page)) != page:
            old.append(path.name)
            if not options.check:
                path.write_text(new)
    print(f"{'other than the results' if options.check else 'written'}: {', '.join(old) or 'none'}")
    return int(options.check and bool(old))


if __name__ == "__main__":
    sys.exit(main())
