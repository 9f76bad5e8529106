"""A chain of conv couplings: memory and time of plain autograd, revhooks, checkpointing and the peers, in one run.

    python bench/coupling_chain.py                 # everything; a JSON under bench/results, tables on the screen
    python bench/coupling_chain.py --quick         # depth 8, few rounds

Branch: BN-ReLU-Conv3x3-BN-ReLU-Conv3x3, 24+24 channels, 32x32, batch 32. Times are ratios of alternating steps in one
process whose allocator keeps freed memory, medians of pairs. Peaks are those of the resident set over the state between steps,
each in a fresh process whose allocator returns memory at once. Accounted bytes are exact.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

warnings.filterwarnings("ignore")

import torch  # noqa: E402
from peers import PEERS, pairs  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import revhooks  # noqa: E402
from revhooks.nn import AdditiveCoupling, ReversibleSequential  # noqa: E402
from revhooks.profiler.meters import AccountedMeter, ResidentMeter, alternate, cuda_peak  # noqa: E402
from revhooks.record import human_bytes  # noqa: E402

RESULTS = Path(__file__).parent / "results"
CHANNELS = 24


def branch() -> nn.Module:
    c = CHANNELS
    return nn.Sequential(
        nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, c, 3, padding=1, bias=False),
        nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, c, 3, padding=1, bias=False),
    )  # fmt: skip


def branches(depth: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [branch() for _ in range(2 * depth)]


class Body(nn.Module):
    """The chain with the head that every contender gets: pooling and ten classes."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        torch.manual_seed(1)
        self.head = nn.Linear(2 * CHANNELS, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Checkpointed(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def couplings(depth: int) -> list[nn.Module]:
    return [AdditiveCoupling(f, g) for f, g in pairs(branches(depth))]


CONTENDERS: dict[str, Callable[[int], nn.Module]] = {
    "plain": lambda depth: nn.Sequential(*couplings(depth)),
    "revhooks": lambda depth: nn.Sequential(*couplings(depth)),
    "revhooks sequential": lambda depth: ReversibleSequential(*branches(depth)),
    "checkpoint": lambda depth: Checkpointed(couplings(depth)),
    **{name: lambda depth, make=make: make(branches(depth)) for name, make in PEERS.items()},  # type: ignore[misc]
}


def data(device: str = "cpu", batch: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, 2 * CHANNELS, 32, 32, generator=generator)
    return x.to(device), torch.randint(0, 10, (batch,), generator=generator).to(device)


def step_of(name: str, depth: int, device: str = "cpu") -> Callable[[], None]:
    model = Body(CONTENDERS[name](depth)).to(device)
    x, y = data(device)
    if name in PEERS:  # these rebuild through inputs that require grad
        x.requires_grad_()
    loss = nn.CrossEntropyLoss()

    def step() -> None:
        model.zero_grad(set_to_none=False)
        x.grad = None
        if name.startswith("revhooks"):
            with revhooks.reversible():
                loss(model(x), y).backward()
        else:
            loss(model(x), y).backward()

    return step


def resident_peak(name: str, depth: int) -> int | None:
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--peak", name, "--depth", str(depth)]
    done = subprocess.run(command, env={**os.environ, **allocator}, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{name}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    return int(done.stdout.splitlines()[-1])


def print_peak(name: str, depth: int) -> None:
    step = step_of(name, depth)
    step()
    peaks = []
    for _ in range(3):
        with ResidentMeter() as meter:
            step()
        peaks.append(meter.peak)
    print(statistics.median_low(peaks))


def accounted_peak(step: Callable[[], None]) -> int:
    step()
    with AccountedMeter() as meter:
        step()
    return meter.peak


def held(depth: int) -> int:
    model, (x, _) = nn.Sequential(*couplings(depth)), data()
    with revhooks.reversible() as run:
        loss = model(x).square().mean()
        nbytes = run.stats.held_bytes
    del loss
    return nbytes


def drift(depth: int) -> tuple[float, float]:
    """Largest relative gradient difference and reconstruction error, float32."""
    x, _ = data(batch=8)
    model = nn.Sequential(*couplings(depth))
    other = copy.deepcopy(model)
    model(x).square().mean().backward()
    with revhooks.reversible() as run:
        other(x).square().mean().backward()
    errors = [
        float((a.grad - b.grad).norm() / a.grad.norm()) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    ]
    return max(errors), float(run.stats.worst_error)


def measure(depth: int, rounds: int) -> dict[str, object]:
    steps = {name: step_of(name, depth) for name in CONTENDERS}
    times = dict(zip(steps, alternate(list(steps.values()), rounds=rounds), strict=True))

    def ratio(a: str, b: str) -> float:
        return round(statistics.median(x / y for x, y in zip(times[a], times[b], strict=True)), 3)

    gradient, reconstruction = drift(depth)
    peaks = {name: resident_peak(name, depth) for name in CONTENDERS}
    return {
        "torch": torch.__version__,
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "depth": depth,
        "rounds": rounds,
        "time_over_plain": {name: ratio(name, "plain") for name in CONTENDERS},
        "revhooks_over_checkpoint": ratio("revhooks", "checkpoint"),
        "resident_peak_bytes": peaks,
        "accounted_peak_bytes": {
            name: accounted_peak(steps[name]) for name in ("plain", "revhooks", "revhooks sequential", "checkpoint")
        },
        "accounted_peak_bytes_depth_64": accounted_peak(step_of("revhooks", 64)),
        "accounted_peak_bytes_plain_one_block": accounted_peak(step_of("plain", 1)),
        "held_after_forward_bytes": {str(d): held(d) for d in (8, 64)},
        "float32_gradient_difference": gradient,
        "float32_reconstruction_error": reconstruction,
    }


def measure_cuda(depth: int, rounds: int) -> dict[str, object]:
    steps = {name: step_of(name, depth, "cuda") for name in CONTENDERS}
    for step in steps.values():
        step()
    times = dict(zip(steps, alternate(list(steps.values()), rounds=rounds, warmup=3, cuda=True), strict=True))
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(),
        "depth": depth,
        "step_ms": {name: statistics.median(t) / 1e6 for name, t in times.items()},
        "peak_bytes": {name: cuda_peak(step) for name, step in steps.items()},
    }


def show(result: dict[str, object]) -> None:
    table = Table(title=f"chain of {result['depth']} conv couplings, {result['device']}, torch {result['torch']}")
    for column in ("", "step time / plain", "resident peak"):
        table.add_column(column, justify="right" if column else "left")
    for name in CONTENDERS:
        peak = result["resident_peak_bytes"][name]  # type: ignore[index]
        table.add_row(name, f"{result['time_over_plain'][name]:.2f}", human_bytes(peak) if peak else "-")  # type: ignore[index]
    console = Console()
    console.print(table)
    deep, one = result["accounted_peak_bytes_depth_64"], result["accounted_peak_bytes_plain_one_block"]
    console.print(f"step time over checkpointing: {result['revhooks_over_checkpoint']}")
    console.print(f"accounted peak at depth 64: {human_bytes(deep)}, {deep / one:.2f} of ONE plain block")  # type: ignore[arg-type,operator]
    console.print(f"held after forward: {result['held_after_forward_bytes']} bytes by depth")
    console.print(
        f"float32: gradients differ by {result['float32_gradient_difference']:.1e}, "
        f"reconstruction by {result['float32_reconstruction_error']:.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peak", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--cuda", action="store_true", help="absolute times and allocator peaks on a GPU")
    options = parser.parse_args()
    if not options.peak and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        # timings: an allocator that keeps what it has, or plain autograd pays for its memory in page faults
        keep = {"MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_MMAP_THRESHOLD_": str(2**30)}
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **keep})
    if options.peak:
        print_peak(options.peak, options.depth)
        return
    if options.cuda:
        result = measure_cuda(options.depth, options.rounds)
        print(json.dumps(result, indent=2))
        path = RESULTS / "coupling_chain_cuda.json"
    else:
        result = measure(8 if options.quick else options.depth, 3 if options.quick else options.rounds)
        show(result)
        path = RESULTS / f"coupling_chain{'_quick' if options.quick else ''}.json"
    if not options.quick:
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
