"""What the host pays: step time of models whose kernels take next to nothing, and the kernels of a step.

    python bench/host_cost.py                  # proxy of an accelerator's host, on a CPU; JSON under bench/results, a table
    python bench/host_cost.py --quick          # few rounds, on the screen
    python bench/host_cost.py --only gpt       # one workload
    python bench/host_cost.py --device cuda    # real sizes on a GPU: time, host time, peak, launches, waits

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
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ordinary_models import GPT, GPTBlock
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import revhooks
import revhooks.runtime.packing
import revhooks.storage
from revhooks.nn import AdditiveCoupling, ReversibleSequential
from revhooks.profile.meters import alternate

RESULTS = Path(__file__).parent / "results"
Step = Callable[[], None]

# ------------------------------------------------------------------------------------------- workloads


def everything_far() -> None:
    """No tensor is too small, and every device is one whose values take long to read."""
    revhooks.runtime.packing.SMALL = 0
    revhooks.storage._LARGE = 0
    revhooks.storage._NEAR = frozenset()


class Workload:
    """A model, its data and its loss.

    Args:
        model: whose blocks are in a list ``blocks``, or a sequence.
        loss: of the model's data.
        autocast: a context for forward.
    """

    def __init__(
        self, model: nn.Module, blocks: list[nn.Module], loss: Callable[[], Tensor], autocast: Any = nullcontext
    ) -> None:
        self.model = model
        self.blocks = blocks
        self._loss = loss
        self._autocast = autocast

    def step(self, context: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        """Forward and backward."""
        self.model.zero_grad(set_to_none=True)
        with context():
            with self._autocast():
                loss = self._loss()
            loss.backward()

    def checkpointed(self) -> None:
        """The same, each block in a region of torch's checkpoint."""
        with regions(self.blocks):
            self.step()

    def gradients(self, step: Step) -> list[Tensor]:
        step()
        return [p.grad.clone() for p in self.model.parameters() if p.grad is not None]


class regions:
    """Each of these modules called in a region of `torch.utils.checkpoint`."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        self._blocks = blocks

    def __enter__(self) -> None:
        for block in self._blocks:
            block.__dict__["forward"] = _region(type(block).forward, block)

    def __exit__(self, *_: object) -> None:
        for block in self._blocks:
            del block.__dict__["forward"]


def _region(forward: Callable[..., Any], block: nn.Module) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        return checkpoint(forward, block, *args, use_reentrant=False)

    return call


def gpt(device: str) -> Workload:
    """A GPT under autocast: GPT-2 small on a GPU, a tiny one as proxy."""
    width, layers, tokens, batch, words, heads = (768, 12, 1024, 8, 50304, 12) if device == "cuda" else (32, 12, 8, 1, 64, 4)
    model = GPT(layers, width, heads, tokens)
    model.words, model.head = nn.Embedding(words, width), nn.Linear(width, words, bias=False)
    model.to(device)
    indices = torch.randint(0, words, (batch, tokens), device=device)
    target = torch.randint(0, words, (batch * tokens,), device=device)

    def loss() -> Tensor:
        return F.cross_entropy(model(indices).flatten(0, 1).float(), target)

    return Workload(model, list(model.blocks), loss, lambda: torch.autocast(device, torch.bfloat16))


class _Conv(nn.Sequential):
    def __init__(self, channels: int) -> None:
        super().__init__(nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1, bias=False))


def revnet(device: str) -> Workload:
    """A RevNet of convolutional couplings."""
    channels, size, batch, depth = (64, 56, 64, 32) if device == "cuda" else (4, 4, 1, 12)
    blocks = [AdditiveCoupling(_Conv(channels), _Conv(channels)) for _ in range(depth)]
    model = nn.Sequential(*blocks).to(device)
    x = torch.randn(batch, 2 * channels, size, size, device=device)
    return Workload(model, blocks, lambda: model(x).square().mean())


def streams(device: str) -> Workload:
    """A chain over two streams."""
    width, batch, depth = (1024, 8192, 48) if device == "cuda" else (16, 4, 24)
    fns = [nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)) for _ in range(depth)]
    model = ReversibleSequential(*fns, dim=-1).to(device)
    x = torch.randn(batch, 2 * width, device=device)
    return Workload(model, fns, lambda: model(x).square().mean())


# ------------------------------------------------------------------------------------------- contenders


def contenders(name: str, work: Workload) -> dict[str, Step]:
    """What is compared, by name; plain first."""
    rev = revhooks.reversible
    found: dict[str, Step] = {
        "plain": work.step,
        "plain again": work.step,
        "torch checkpoint": work.checkpointed,
        "hooks that return their argument": lambda: work.step(lambda: saved_tensors_hooks(_same, _same)),
    }
    modes: dict[str, dict[str, Any]] = {"reversible()": {}, 'reversible(guard="off")': {"guard": "off"}}
    if name == "gpt":
        modes = {
            "ops=False": {"ops": False},
            **modes,
            "replay=": {"replay": GPTBlock},
            'replay=, guard="off"': {"replay": GPTBlock, "guard": "off"},
            "budget=, replay=": {"budget": "1GiB", "replay": GPTBlock},
            "budget=": {"budget": "1GiB"},
        }
        if next(work.model.parameters()).is_cuda:
            modes["budget=, replay="]["budget"] = modes["budget="]["budget"] = "auto"
            modes["offload=True"] = {"offload": True}
    for title, options in modes.items():
        found[title] = lambda options=options: work.step(lambda: rev(**options))  # type: ignore[misc]
    return found


def _same(tensor: Tensor) -> Tensor:
    return tensor


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
    """Launches by the profiler, waits by the mode that warns of them, peak by the allocator."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    peak = torch.cuda.max_memory_allocated() - base
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    launches = sum(event.count for event in profiled.key_averages() if "LaunchKernel" in event.key)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchronizing" in str(one.message) for one in caught)
    return {"peak_mib": peak >> 20, "kernels": launches, "waits": waits}


def measure(name: str, work: Workload, *, device: str, rounds: int) -> list[dict[str, Any]]:
    """A row for each contender."""
    steps = contenders(name, work)
    plain = work.gradients(steps["plain"])
    rows = {}
    for title, step in steps.items():
        for _ in range(4 if device == "cuda" else 24):  # first steps learn
            step()
        same = all(map(torch.equal, work.gradients(step), plain))
        rows[title] = {"contender": title, "gradients_equal": same}
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
    return list(rows.values())


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


WORKLOADS = {"gpt": gpt, "revnet": revnet, "streams": streams}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=WORKLOADS)
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
    for name, make in WORKLOADS.items():
        if arguments.only in (None, name):
            torch.manual_seed(0)
            result[name] = measure(name, make(arguments.device), device=arguments.device, rounds=rounds)
            show(name, result[name], console)
    if not arguments.quick and arguments.only is None:
        path = RESULTS / ("host_cost.json" if arguments.device == "cpu" else "host_cost_cuda.json")
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
