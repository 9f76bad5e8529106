"""Offload: what moving saved tensors to the host costs and gives, against torch's and torchtune's ways.

    python bench/offload.py                  # on CUDA: time, host time, peak; else the simulated time line
    python bench/offload.py --simulated      # the simulated time line; JSON under bench/results
    python bench/offload.py --quick          # few steps, on the screen

Contenders: plain; ``offload=True``; with a budget of 0.95 and 0.6 of what has to be held; ``save_on_cpu(pin_memory=True)``; and
OffloadActivations of torchtune (torchtune/training/_activation_offloading.py, which TRL took over): a stream of its own, 5
consecutive tensors held while they leave, everything of 1 KiB on moves, what comes back is started when it is asked for and may
overlap with the node before. The packages are not needed: their schedule is written again here, and that is what is measured.
TransformerEngine (transformer_engine/pytorch/cpu_offload.py) asks for the number of layers to move and fetches a layer's tensors
at the beginning of another's backward; it needs its layers marked, so it is not among them.

The simulated device (offload_device.py) has streams, two copy engines and a host; its times say how copies overlap, nothing of
kernels, allocators or a real bus. Its workloads have the step times of a GPT-2 small and of a GPT of 12 layers as measured on an
H200, and the bytes that follow from how long it took to move all of them there, spread evenly over 324 saved tensors; the last
has a tenfold of the time for the same bytes, as of longer sequences or larger models.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from offload_device import SCALE, Device, Layer, Simulated, forward
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from revhooks import reversible
from revhooks.runtime import run
from revhooks.runtime.offload import lane, learning
from revhooks.runtime.offload import parked as offload
from revhooks.runtime.offload.movers import Copy
from revhooks.storage import is_leaf

RESULTS = Path(__file__).parent / "results"
Around = Callable[[], AbstractContextManager[Any]]
BUDGETS = (0.95, 0.6)


class Stashing(saved_tensors_hooks):
    """The schedule of torchtune's OffloadActivations on CUDA, single tensors on one stream; it ends with the pass."""

    def __init__(self, *, stash: int = 5, least: int = 1024) -> None:
        self._home, self._copies = torch.cuda.current_stream(), torch.cuda.Stream()
        self._count, self._stash, self._least = 0, stash, least
        self._leaving: dict[int, tuple[Tensor, torch.cuda.Event]] = {}
        self._here: dict[int, Tensor] = {}
        self._used: dict[int, torch.cuda.Event] = {}
        self._node: Any = None
        super().__init__(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Tensor | tuple[int, Tensor]:
        self._count += 1
        if not tensor.is_cuda or tensor.nbytes < self._least or is_leaf(tensor):
            return tensor
        for number in [number for number in self._leaving if number <= self._count - self._stash]:
            self._home.wait_event(self._leaving.pop(number)[1])
        self._copies.wait_stream(self._home)
        with torch.cuda.stream(self._copies):
            host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            host.copy_(tensor, non_blocking=True)
        self._leaving[self._count] = tensor.detach(), self._copies.record_event()
        return self._count, host

    def _unpack(self, packed: Tensor | tuple[int, Tensor]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        number, host = packed
        node = torch._C._current_autograd_node()
        before: list[int] = []
        if node is not self._node:
            self._node, before = node, list(self._here)
        came = number not in self._leaving
        if came:
            with torch.cuda.stream(self._copies):
                tensor = host.to("cuda", non_blocking=True)
            self._home.wait_stream(self._copies)
            self._here[number] = tensor
        else:
            tensor = self._leaving[number][0]

        def used(outputs: Any, inputs: Any) -> Any:
            if came:
                self._used[number] = self._home.record_event()
            for left in list(self._leaving):
                self._home.wait_event(self._leaving.pop(left)[1])
            for old in before:
                if old in self._used:
                    self._copies.wait_event(self._used.pop(old))
                    self._here.pop(old, None)
            return outputs

        node.register_hook(used)
        return tensor


# ------------------------------------------------------------------------------------------- the simulated time line

WORKLOADS = {  # bytes saved, tensors, seconds of forward and of backward
    "GPT-2 small, 8 x 1024": (4.4e9, 324, 0.010, 0.020),
    "GPT of 12 layers, 32 x 1024": (14e9, 324, 0.031, 0.063),
    "the same, of long steps": (14e9, 324, 0.31, 0.63),
}
BUSES = (12, 25, 50, 400)  # GB/s: PCIe 3, 4, 5 and NVLink-C2C


class OnOneStream(saved_tensors_hooks):
    """As `save_on_cpu`: the computation waits for each copy."""

    def __init__(self, mover: Simulated) -> None:
        def pack(tensor: Tensor) -> Copy:
            copy = mover.out(tensor)
            mover.leaving(tensor.device).keep(count=0)
            mover.sim.synchronize()
            return copy

        def unpack(packed: Copy) -> Tensor:
            copy = mover.back(packed, torch.device("cpu"))
            copy.wait()
            return copy.tensor

        super().__init__(pack, unpack)


class SimulatedStashing(saved_tensors_hooks):
    """As `Stashing`, on a simulated device: what comes back is copied after the node before the last one is through."""

    def __init__(self, mover: Simulated, *, stash: int = 5) -> None:
        here, sim, before = torch.device("cpu"), mover.sim, [0.0, 0.0]

        def pack(tensor: Tensor) -> Copy:
            mover.leaving(here).keep(count=stash - 1)
            return mover.out(tensor)

        def unpack(packed: Copy) -> Tensor:
            mover.leaving(here).keep(count=0)
            before[:] = before[1], sim.now()
            _, done = sim.copy("back", packed.tensor.nbytes, max(before[0], sim.free["out"]))
            sim.wait_event(done)
            return sim.counted(packed.tensor.clone())

        super().__init__(pack, unpack)


def simulated_contenders(whole: int) -> dict[str, Callable[[Simulated], AbstractContextManager[Any]]]:
    return {
        "plain": lambda mover: nullcontext(),
        "offload=True": lambda mover: reversible(offload=True),
        **{
            f"offload=True, budget of {part}": lambda mover, part=part: reversible(offload=True, budget=part * whole)
            for part in BUDGETS
        },
        "save_on_cpu": OnOneStream,
        "torchtune's schedule": SimulatedStashing,
    }


def simulate(name: str, bus: float, steps: int) -> list[dict[str, Any]]:
    """One workload on one bus."""
    nbytes, count, ahead, behind = WORKLOADS[name]
    size = int(nbytes / SCALE / count) // 4 * 4
    layers = [Layer(size, ahead / count, behind / count)] * count
    rows = []
    for contender, around in simulated_contenders(size * count).items():
        device = Device(bus * 1e9 / SCALE, bus * 1e9 / SCALE)
        mover = Simulated(device)
        offload.MOVERS["cpu"] = lambda mover=mover: mover  # type: ignore[misc]
        learning._FACTS.clear()
        times, moved = [], 0
        for _ in range(steps):
            start, before, device.kept = device.synchronize(), device.moved, 0
            with around(mover):
                forward(device, layers).backward()
            times.append(device.synchronize() - start)
            moved = device.moved - before
        row = {"workload": name, "bus_gb_s": bus, "contender": contender, "first_ms": times[0] * 1e3, "step_ms": times[-1] * 1e3}
        rows.append({**row, "moved_bytes": moved * SCALE, "kept_bytes": device.kept * SCALE})
    for row in rows:
        row["step_ratio"], row["first_ratio"] = (row[key] / rows[0]["step_ms"] for key in ("step_ms", "first_ms"))
        row["kept_ratio"] = row["kept_bytes"] / rows[0]["kept_bytes"]
    return rows


def simulated(steps: int) -> dict[str, Any]:
    offload.LEAST, run.SMALL, lane.LAG = 0, 0, lane.LAG // SCALE
    rows = [row for name in WORKLOADS for bus in BUSES for row in simulate(name, bus, steps)]
    return {"simulated": True, "note": "times of a simulated device, see bench/offload_device.py", "rows": rows}


# ------------------------------------------------------------------------------------------- a real device


def gpt(width: int = 1024, layers: int = 12) -> nn.Module:
    """A stack of transformer layers."""
    return nn.Sequential(*[nn.TransformerEncoderLayer(width, 16, 4 * width, 0.0, batch_first=True) for _ in range(layers)]).cuda()


def measured(steps: int) -> dict[str, Any]:
    """Medians by turns; the peak is the allocator's, over the state between steps."""
    net, x = gpt(), torch.randn(32, 1024, 1024, device="cuda")

    def step(around: Around) -> tuple[float, float, int]:
        net.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        with around(), torch.autocast("cuda", torch.bfloat16):
            net(x).square().mean().backward()
        host = time.perf_counter() - start
        torch.cuda.synchronize()
        return time.perf_counter() - start, host, torch.cuda.max_memory_allocated() - before

    step(nullcontext)
    with reversible() as counted, torch.autocast("cuda", torch.bfloat16):
        net(x).square().mean().backward()
    whole = counted.stats.peak_held_bytes
    contenders: dict[str, Around] = {
        "plain": nullcontext,
        "reversible()": reversible,
        "offload=True": lambda: reversible(offload=True),
        **{
            f"offload=True, budget of {part}": lambda part=part: reversible(offload=True, budget=part * whole)  # type: ignore[misc]
            for part in BUDGETS
        },
        "save_on_cpu": lambda: save_on_cpu(pin_memory=True),
        "torchtune's schedule": Stashing,
    }
    found = {name: [step(around) for _ in range(6)][:1] for name, around in contenders.items()}  # they warm up, and learn
    for _ in range(steps):
        for name, around in contenders.items():
            found[name].append(step(around))
    rows = []
    for name, results in found.items():
        took, host, peak = (statistics.median(column) for column in zip(*results[1:], strict=True))
        row = {"contender": name, "first_ms": results[0][0] * 1e3, "step_ms": took * 1e3, "host_ms": host * 1e3}
        rows.append({"workload": "GPT of 12 layers, 32 x 1024", **row, "kept_bytes": peak})
    for row in rows:
        row["step_ratio"], row["first_ratio"] = (row[key] / rows[0]["step_ms"] for key in ("step_ms", "first_ms"))
        row["kept_ratio"] = row["kept_bytes"] / rows[0]["kept_bytes"]
    return {"simulated": False, "torch": torch.__version__, "device": torch.cuda.get_device_name(), "rows": rows}


def show(result: dict[str, Any], console: Console) -> None:
    table = Table(title="a simulated device" if result["simulated"] else result["device"])
    columns = ("workload", "bus_gb_s", "contender", "step_ratio", "first_ratio", "kept_ratio")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="left" if column in ("workload", "contender") else "right")
    for row in result["rows"]:
        table.add_row(*(f"{row[c]:.2f}" if c.endswith("ratio") else str(row.get(c, "")) for c in columns))
    console.print(table)


def main() -> None:
    """Measure or simulate, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulated", action="store_true")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    real = torch.cuda.is_available() and not arguments.simulated
    if not real:
        print("no device is measured: the time line is simulated", file=sys.stderr)
    result = measured(3 if arguments.quick else 20) if real else simulated(4 if arguments.quick else 8)
    show(result, Console(width=130))
    if not arguments.quick:
        path = RESULTS / ("offload_cuda.json" if real else "offload.json")
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
