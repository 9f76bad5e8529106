"""Ordinary models under ``reversible()``: memory and time over plain autograd, replay and budget against checkpointing.

    python bench/ordinary.py                  # everything; JSON and a plot under bench/results, tables on the screen
    python bench/ordinary.py --memory         # only what does not depend on the clock, on the screen
    python bench/ordinary.py --quick          # small models, few rounds, on the screen
    python bench/ordinary.py --only replay    # one part

Models are unmodified (`ordinary_models.py`). Times are ratios of alternating steps in one process whose allocator keeps freed
memory, medians of pairs. `packed` and `held` are what a run says after forward; `live` and `peak` are accounted bytes of every
tensor that a step makes, by one meter for all contenders; `resident` is the peak of the resident set over the state between
steps, each in a fresh process whose allocator returns memory at once. They are never mixed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import torch  # noqa: E402
from coupling_chain import Body, couplings, data  # noqa: E402
from ordinary_measure import (  # noqa: E402
    PEERS,
    Contender,
    Times,
    accounted,
    difference,
    fresh_peak,
    memory,
    peer,
    rebuilds,
    resident_peak,
    timed,
)
from ordinary_models import GPTBlock, Skipped, gpt, gpt2, llama, resnet50, resnet110  # noqa: E402
from ordinary_tables import plot, show  # noqa: E402
from rich.console import Console  # noqa: E402
from torch import nn  # noqa: E402

import revhooks  # noqa: E402
from revhooks.profiler.workload import Workload  # noqa: E402

RESULTS = Path(__file__).parent / "results"
START = time.perf_counter()
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@dataclass(frozen=True)
class Options:
    """What is asked for.

    Attributes:
        quick: small models, few rounds.
        clock: take times.
    """

    quick: bool = False
    clock: bool = True

    def timed(self, contenders: dict[str, Contender], seconds: float) -> Times | None:
        if not self.clock:
            return None
        return timed(contenders, 0 if self.quick else seconds, least=2 if self.quick else 3)


def say(text: str) -> None:
    """Progress, on the screen only."""
    print(f"[{time.perf_counter() - START:4.0f} s] {text}", file=sys.stderr, flush=True)


def seeded(make: Callable[[], Workload]) -> Workload:
    torch.manual_seed(0)
    return make()


# -- ordinary models: nothing named, nothing registered


@dataclass(frozen=True)
class Case:
    """A model, and what is wanted of it.

    Attributes:
        name: on the screen.
        make: the model at full size.
        quick: a small one.
        spared: the share of saved bytes that should not be held.
        time: step time over plain that should not be passed.
    """

    name: str
    make: Callable[[], Workload]
    quick: Callable[[], Workload]
    spared: float
    time: float


SMALL: dict[str, Any] = {"batch": 2, "tokens": 64}
CASES = [
    Case("GPT, 6 layers", partial(gpt, 6), partial(gpt, 2, **SMALL), 0.35, 1.03),
    Case("GPT, 12 layers", partial(gpt, 12), partial(gpt, 3, **SMALL), 0.35, 1.03),
    Case("Hugging Face GPT-2, 6 layers", partial(gpt2, 6), partial(gpt2, 2, **SMALL), 0.35, 1.03),
    Case(
        "the same without dropout",
        partial(gpt2, 6, **NO_DROPOUT),
        partial(gpt2, 2, **SMALL, **NO_DROPOUT),
        0.35,
        1.03,
    ),
    Case("ResNet-110", resnet110, partial(resnet110, 2, 2), 0.45, 1.10),
    Case("ResNet-50, 64x64", resnet50, partial(resnet50, 2), 0.45, 1.10),
    Case("Llama, 6 layers", partial(llama, 6), partial(llama, 2, **SMALL), 0.35, 1.05),
]


def ordinary(options: Options) -> list[dict[str, Any]]:
    """One row a case: memory, time, gradients."""
    rows = []
    for case in CASES:
        say(case.name)
        try:
            work = seeded(case.quick if options.quick else case.make)
        except Skipped as reason:
            rows.append({"name": case.name, "skipped": str(reason)})
            continue
        contenders = {"plain": Contender(work), "revhooks": Contender(work, revhooks.reversible)}
        found = memory(work)
        plain_peak, peak = (accounted(contender)[1] for contender in contenders.values())
        times = options.timed(contenders, seconds=15)
        rows.append(
            {
                "name": case.name,
                "parameters": sum(p.numel() for p in work.model.parameters()),
                "packed_bytes": found.packed,
                "held_bytes": found.held,
                "spared": round(found.spared, 4),
                "goal_spared": case.spared,
                "plain_peak_bytes": plain_peak,
                "peak_bytes": peak,
                "time_over_plain": times and times.ratio("revhooks", "plain"),
                "goal_time": case.time,
                "rounds": times and times.rounds,
                "gradient_difference": found.difference,
            }
        )
    return rows


# -- replay of each layer against checkpointing each layer


REPLAYED = {"GPT": 0.0, "GPT with dropout": 0.1}


def replay_contenders(model: str, quick: bool) -> dict[str, Contender]:
    dropout = REPLAYED[model]
    work = seeded(partial(gpt, 3, **SMALL, dropout=dropout) if quick else partial(gpt, 6, dropout=dropout))
    return {
        "plain": Contender(work),
        "replay": Contender(work, partial(revhooks.reversible, replay=GPTBlock)),
        "replay, ops=False": Contender(work, partial(revhooks.reversible, replay=GPTBlock, ops=False)),
        "checkpoint": peer(work, lambda model: model.blocks, "checkpoint"),
    }


def replay_of(model: str, options: Options) -> dict[str, Any]:
    """Bytes after forward, peaks, time of each contender."""
    contenders = replay_contenders(model, options.quick)
    expected = contenders["plain"].gradients()
    say(f"replay: {model}: time")
    times = options.timed(contenders, seconds=25)
    rows = []
    for name, contender in contenders.items():
        say(f"replay: {model}: {name}")
        live, peak = accounted(contender)
        rows.append(
            {
                "name": name,
                "live_after_forward_bytes": live,
                "peak_bytes": peak,
                "rebuilt": rebuilds(contender),
                "resident_peak_bytes": fresh_peak("--peak", model, name, *["--quick"] * options.quick),
                "time_over_plain": times and times.ratio(name, "plain"),
                "time_over_checkpoint": times and times.ratio(name, "checkpoint"),
                "rounds": times and times.rounds,
                "gradient_difference": difference(expected, contender.gradients()),
            }
        )
    return {"name": model, "contenders": rows}


def replay(options: Options) -> list[dict[str, Any]]:
    """Each layer of a model run again in backward, by revhooks and by torch."""
    return [replay_of(model, options) for model in REPLAYED]


# -- the budget, from least memory to plain speed

FRACTIONS = (0, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, math.inf)  # of what plain autograd saves


def revnet(depth: int, batch: int = 32) -> Workload:
    x, y = data(batch=batch)
    return Workload(Body(nn.Sequential(*couplings(depth))), (x,), lambda logits: nn.functional.cross_entropy(logits, y))


@dataclass(frozen=True)
class Curve:
    """A model whose blocks can be let go of.

    Attributes:
        name: on the screen.
        work: the model.
        blocks_of: its blocks, for checkpointing.
        options: what lets revhooks drop them.
    """

    name: str
    work: Workload
    blocks_of: Callable[[nn.Module], Any]
    options: dict[str, Any]

    def at(self, budget: float) -> Contender:
        return Contender(self.work, partial(revhooks.reversible, budget=budget, **self.options))

    def within(self, peak: int, most: int) -> float:
        """The largest budget, to a 32nd of ``most``, whose step has no higher peak (by more than a hundredth)."""
        low, high = 0, 32
        while high - low > 1:
            middle = (low + high) // 2
            fits = accounted(self.at(most * middle / 32), warm=False)[1] <= 1.01 * peak
            low, high = (middle, high) if fits else (low, middle)
        return most * low / 32


def curves(quick: bool) -> list[Curve]:
    text = seeded(partial(gpt, 4, **SMALL) if quick else partial(gpt, 6))
    return [
        Curve("RevNet chain", seeded(partial(revnet, 6, 4) if quick else partial(revnet, 16)), lambda model: model.body, {}),
        Curve("GPT, replay=Block", text, lambda model: model.blocks, {"replay": GPTBlock}),
    ]


def curve_of(curve: Curve, options: Options) -> dict[str, Any]:
    """Peak and time at each budget and of each peer, and of the budget that has the peer's peak."""
    plain = Contender(curve.work)
    packed = memory(curve.work, ops=False).packed
    expected = plain.gradients()
    contenders: dict[str, Contender] = {"plain": plain}
    budgets: dict[str, float] = {}
    for fraction in FRACTIONS:
        name = "inf" if fraction == math.inf else f"{fraction:.0%}"
        budgets[name] = fraction if fraction == math.inf else fraction * packed
    peers = {name: peer(curve.work, curve.blocks_of, name) for name in PEERS}
    peaks = {"plain": accounted(plain)[1]}
    for name, contender in peers.items():
        say(f"budget: {curve.name}: {name}, and the budget with its peak")
        peaks[name] = accounted(contender)[1]
        budgets[f"at the peak of {name}"] = curve.within(peaks[name], packed)
    contenders |= {name: curve.at(budget) for name, budget in budgets.items()} | peers
    for name in budgets:
        peaks[name] = accounted(contenders[name])[1]
    say(f"budget: {curve.name}: time")
    times = options.timed(contenders, seconds=90)
    points = [
        {
            "name": name,
            "budget_bytes": None if budgets.get(name) == math.inf else budgets.get(name) and round(budgets[name]),
            "peak_bytes": peaks[name],
            "rebuilt": rebuilds(contender),
            "time_over_plain": times and times.ratio(name, "plain"),
            "gradient_difference": difference(expected, contender.gradients()),
        }
        for name, contender in contenders.items()
    ]
    against = {
        name: {
            "peak_over_peer": round(peaks[f"at the peak of {name}"] / peaks[name], 3),
            "time_over_peer": times and times.ratio(f"at the peak of {name}", name),
            "goal_time": 0.95 if name == "checkpoint" else 1.0,
        }
        for name in PEERS
    }
    return {"name": curve.name, "packed_bytes": packed, "rounds": times and times.rounds, "points": points, "against": against}


def budget(options: Options) -> list[dict[str, Any]]:
    """One curve a model."""
    return [curve_of(curve, options) for curve in curves(options.quick)]


# -- all of it

PARTS: dict[str, Callable[[Options], Any]] = {"ordinary": ordinary, "replay": replay, "budget": budget}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small models, few rounds")
    parser.add_argument("--memory", action="store_true", help="take no times")
    parser.add_argument("--only", choices=list(PARTS), help="one part")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)  # of the resident set: a model and a contender of `replay`
    given = parser.parse_args()
    if given.peak:
        model, contender = given.peak
        print(resident_peak(replay_contenders(model, given.quick)[contender]))
        return
    if "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        # timings: an allocator that keeps what it has, or plain autograd pays for its memory in page faults
        keep = {"MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_MMAP_THRESHOLD_": str(2**30)}
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **keep})
    options = Options(quick=given.quick, clock=not given.memory)
    result: dict[str, Any] = {"torch": torch.__version__, "device": platform.machine(), "threads": torch.get_num_threads()}
    result["quick"] = given.quick
    for name in [given.only] if given.only else PARTS:
        result[name] = PARTS[name](options)
    show(result, Console(width=None if sys.stdout.isatty() else 120))
    if options.clock and not options.quick and not given.only:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "ordinary.json").write_text(json.dumps(result, indent=2) + "\n")
        plot(result["budget"], RESULTS / "ordinary_budget.png")
    say("done")


if __name__ == "__main__":
    main()
