"""What the host pays: step time of models whose kernels take next to nothing, and the kernels of a step.

    python bench/host_cost.py                  # proxy of an accelerator's host, on a CPU; JSON under bench/results, a table
    python bench/host_cost.py --quick          # few rounds, on the screen
    python bench/host_cost.py --only gpt       # one workload
    python bench/host_cost.py --device cuda    # real sizes on a GPU, more workloads: time, host time, peak, launches, waits

On a GPU Python runs ahead of the device: what it costs delays the launches. The proxy has a GPT of 12 layers of width 32 on 8
tokens under bfloat16 autocast, a RevNet of 12 couplings and a two-stream chain of 24 branches of the same kind. Size thresholds
are off and every device is taken for far, as an accelerator is. Times are of the thread on one core, contenders by turns in one
process, medians; ratios are medians of rounds. Kernels are operations of ATen that are no views; waits are those that read a
tensor's value on the host.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from host_models import PROXIES, WORKLOADS, Step
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import revhooks
import revhooks.runtime.packing
import revhooks.storage
from revhooks.profiler.meters import alternate

RESULTS = Path(__file__).parent / "results"
WAITED = 4  # steps in which waits are counted


def everything_far() -> None:
    """No tensor is too small, and every device is one whose values take long to read."""
    revhooks.runtime.packing.SMALL = 0
    revhooks.storage._LARGE = 0
    revhooks.storage._NEAR = frozenset()


# ------------------------------------------------------------------------------------------- measures

VIEWS = frozenset(
    """alias as_strided detach diagonal expand permute real reshape select slice split split_with_sizes squeeze t transpose
    unbind unflatten unfold unsqueeze view view_as_real _reshape_alias _unsafe_view lift_fresh""".split()  # noqa: SIM905
)
WAITS = frozenset(("_local_scalar_dense", "equal", "is_nonzero", "item", "nonzero"))


class Count(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.by: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.by[function._schema.name.removeprefix("aten::")] += 1
        return function(*args, **(kwargs or {}))


def counts(step: Step, steps: int = 8) -> dict[str, float]:
    """Kernels and waits of a step, the mean of several, for checks may go round."""
    with Count() as count:
        for _ in range(steps):
            step()
    kernels = sum(number for name, number in count.by.items() if name not in VIEWS)
    return {"kernels": kernels / steps, "waits": sum(count.by[name] for name in WAITS) / steps}


def on_cuda(step: Step) -> tuple[float, float]:
    """Step and host milliseconds."""
    torch.cuda.synchronize()
    before = time.perf_counter()
    step()
    host = 1e3 * (time.perf_counter() - before)
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - before), host


def cuda_counts(step: Step) -> dict[str, float]:
    """Peak by the allocator over the state between steps, launches by the profiler, waits by the mode that warns of them."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    peak = torch.cuda.max_memory_allocated() - base
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    launches = sum(event.count for event in profiled.key_averages() if "LaunchKernel" in event.key)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        for _ in range(WAITED):
            step()
        torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchronizing" in str(one.message) for one in caught)
    return {"peak_mib": round(peak / 2**20, 1), "launches": launches, "waits": waits / WAITED}


def measure(steps: dict[str, Step], *, device: str, rounds: int) -> list[dict[str, Any]]:
    """A row for each contender."""
    plain = steps["plain"].gradients()
    rows = {}
    for title, step in steps.items():
        for _ in range(8 if device == "cuda" else 24):  # first steps learn
            step()
        rows[title] = {"contender": title, "worst_gradient": worst(step.gradients(), plain)}
        rows[title] |= cuda_counts(step) if device == "cuda" else counts(step)
    host: dict[str, list[float]] = {}
    if device == "cuda":
        turns = [{title: on_cuda(step) for title, step in steps.items()} for _ in range(rounds)]
        times = {title: [turn[title][0] for turn in turns] for title in steps}
        host = {title: [turn[title][1] for turn in turns] for title in steps}
    else:
        taken = alternate(list(steps.values()), rounds=rounds, clock=time.thread_time_ns)
        times = {title: [ns / 1e6 for ns in one] for title, one in zip(steps, taken, strict=True)}
    for title, row in rows.items():
        row["ms"] = round(statistics.median(times[title]), 3)
        row["over_plain"] = round(_ratio(times[title], times["plain"]), 3)
        row["over_checkpoint"] = round(_ratio(times[title], times["torch checkpoint"]), 3)
        if host:
            row["host_ms"] = round(statistics.median(host[title]), 2)
            row["peak_over_plain"] = round(row["peak_mib"] / rows["plain"]["peak_mib"], 3)
            row["peak_over_checkpoint"] = round(row["peak_mib"] / rows["torch checkpoint"]["peak_mib"], 3)
    return list(rows.values())


def worst(gradients: list[Tensor], others: list[Tensor]) -> float:
    """The largest difference of two gradients, relative; 0 where they are equal bit by bit."""
    pairs = list(zip(gradients, others, strict=True))
    if all(torch.equal(one, other) for one, other in pairs):
        return 0.0
    return float(f"{max(float((one - other).norm() / other.norm().clamp_min(1e-30)) for one, other in pairs):.1e}")


def _ratio(times: list[float], others: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(times, others, strict=True))


def show(name: str, rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title=name)
    columns = [key for key in rows[0] if key != "contender"]
    table.add_column("contender")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(
            row["contender"], *(f"{row[key]:g}" if not isinstance(row[key], bool) else str(row[key]) for key in columns)
        )
    console.print(table)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=WORKLOADS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        torch.set_num_threads(1)
        everything_far()
    rounds = arguments.rounds or (8 if arguments.quick else 60 if arguments.device == "cpu" else 12)
    result: dict[str, Any] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu, every device far, one thread",
        "rounds": rounds,
    }
    console = Console(width=130)
    for name in arguments.only or (WORKLOADS if arguments.device == "cuda" else PROXIES):
        torch.manual_seed(0)
        try:
            result[name] = measure(WORKLOADS[name](arguments.device), device=arguments.device, rounds=rounds)
        except ImportError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        show(name, result[name], console)
        if not arguments.quick and arguments.only is None:
            path = RESULTS / ("host_cost.json" if arguments.device == "cpu" else "host_cost_cuda.json")
            path.write_text(json.dumps(result, indent=2) + "\n")
            print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
