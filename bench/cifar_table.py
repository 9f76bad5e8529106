"""MemCNN's table of CIFAR networks: activations held after forward and the peak of the step, ours beside theirs.

    python bench/cifar_table.py                              # batch 100, as published; bench/results/cifar_table.json
    python bench/cifar_table.py --networks 32/38 --batch 20  # figures are scaled to batch 100
    python bench/cifar_table.py --quick                      # 32/38 at batch 10, few rounds

Every figure of memory is in accounted bytes, by the same meter for every contender: the unique storages that a step makes, the
batch included, parameters and their gradients not. memcnn is measured on its own model class. Its RevNet-38 and RevNet-110 cannot
run backward as they come: the first block frees the output of the ReLU before it, which that ReLU needs. So a copy is put between
them; "as it comes" is forward alone without the copy, and is what it published. Published figures are of a GPU.

Times are ratios of the processor time of alternating steps in one process, medians of rounds, at a small batch: an indication
that others on the machine disturb least. Run it with one thread (OMP_NUM_THREADS=1), for threads that wait count too.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

warnings.filterwarnings("ignore")

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from cifar_networks import CLASSES, NETWORKS, Replayed, network  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import revhooks  # noqa: E402
from revhooks.profiler.meters import AccountedMeter  # noqa: E402
from revhooks.record import Stats, human_bytes  # noqa: E402

RESULTS = Path(__file__).parent / "results"
PUBLISHED_BATCH = 100
MIB = 2**20


class Column(NamedTuple):
    """Two networks that are held against each other, and what was published of them, in MiB (ratio of training times)."""

    resnet: str
    revnet: str
    resnet_mib: float
    revnet_mib: float
    time: float


COLUMNS = {
    "32/38": Column("resnet32", "revnet38", 238.6, 85.6, 1.16),
    "110/110": Column("resnet110", "revnet110", 810.7, 85.7, 1.30),
    "164/164": Column("resnet164", "revnet164", 2452.8, 432.7, 1.47),
}


class Copy(nn.Module):
    """Something for memcnn to free."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


def memcnn_network(name: str, *, mended: bool = True) -> nn.Module:
    from memcnn.models import resnet as theirs

    spec = NETWORKS[name]
    model = theirs.ResNet(
        theirs.RevBottleneck if spec.bottleneck else theirs.RevBasicBlock,
        [spec.blocks] * 3,
        num_classes=CLASSES,
        channels_per_layer=list(spec.channels),
        strides=[1, 1, 2, 2],
        init_kernel_size=3,
        batch_norm_fix=False,
    )
    if mended and not spec.bottleneck:
        model.relu = nn.Sequential(model.relu, Copy())
    return model


class Contender(NamedTuple):
    """Who takes a step: which network of a column, built by whom, under ``reversible()`` or not."""

    label: str
    revnet: bool
    build: Callable[[str], nn.Module]
    reversible: bool = False

    def model(self, column: Column) -> nn.Module:
        torch.manual_seed(0)
        return self.build(column.revnet if self.revnet else column.resnet)


CONTENDERS = (
    Contender("ResNet", False, network),
    Contender("ResNet, checkpoint", False, lambda name: network(name, segment=Replayed), reversible=True),
    Contender("RevNet", True, network),
    Contender("RevNet, memcnn", True, memcnn_network),
    Contender("RevNet, revhooks", True, network, reversible=True),
    Contender("RevNet, revhooks + checkpoint", True, lambda name: network(name, segment=Replayed), reversible=True),
)
THEIRS = "RevNet, memcnn"


class ResizeMeter(AccountedMeter):
    """An `AccountedMeter` that sees storages being resized in place, by which memcnn frees and restores its inputs."""

    def __enter__(self) -> ResizeMeter:
        self._original = original = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            before, known = storage.nbytes(), self._known.pop(storage._cdata, None)  # nothing is told of its death
            result = original(storage, size)
            if known is not None:
                self._change(-before)
                self._count(storage)
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        torch.UntypedStorage.resize_ = self._original  # type: ignore[method-assign]
        super().__exit__(kind, error, trace)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()

        def died(_: Any) -> None:
            del self._known[key]
            self._change(-nbytes)

        self._known[key] = weakref.ref(storage, died)
        self._change(nbytes)


class Measured(NamedTuple):
    held: int = 0
    forward_peak: int = 0
    peak: int = 0
    after_forward: Stats | None = None
    after_step: Stats | None = None


def take_step(model: nn.Module, batch: int, *, reversible: bool, meter: AccountedMeter | None = None) -> Measured:
    """One step; the batch is made inside, so that it counts."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, 32, 32, generator=generator)
    labels = torch.randint(0, CLASSES, (batch,), generator=generator)
    model.zero_grad(set_to_none=False)
    with revhooks.reversible() if reversible else contextlib.nullcontext() as run:
        loss = F.cross_entropy(model(images), labels)
        del images, labels
        held, forward_peak = (meter.live, meter.peak) if meter is not None else (0, 0)
        after_forward = run.stats if run is not None else None
        loss.backward()
    peak = meter.peak if meter is not None else 0
    return Measured(held, forward_peak, peak, after_forward, run.stats if run is not None else None)


def measure(contender: Contender, column: Column, batch: int) -> dict[str, object]:
    model = contender.model(column)
    take_step(model, 2, reversible=contender.reversible)  # parameters have gradients, blocks are known
    gc.collect()
    with ResizeMeter() as meter:
        step = take_step(model, batch, reversible=contender.reversible, meter=meter)
    result: dict[str, object] = {
        "network": column.revnet if contender.revnet else column.resnet,
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_bytes": step.held,
        "forward_peak_bytes": step.forward_peak,
        "step_peak_bytes": step.peak,
    }
    if contender.label == THEIRS:
        result["held_bytes_as_it_comes"] = held_as_it_comes(column, batch)
    if step.after_forward is not None and step.after_step is not None:
        result |= what_was_kept(step.after_forward, step.after_step)
    return result


def held_as_it_comes(column: Column, batch: int) -> int:
    model = memcnn_network(column.revnet, mended=False)
    with ResizeMeter() as meter:
        images = torch.randn(batch, 3, 32, 32)
        output = model(images)
        del images
        held = meter.live
    del output
    return held


def what_was_kept(forward: Stats, step: Stats) -> dict[str, object]:
    kept: dict[str, int] = {}
    for item in forward.kept:
        kept[item.why] = kept.get(item.why, 0) + item.bytes
    return {
        "stats_held_bytes": forward.held_bytes,
        "stats_packed_bytes": forward.packed_bytes,
        "kept_bytes": dict(sorted(kept.items(), key=lambda item: -item[1])),
        "inversions": step.inversions,
        "replays": step.replays,
        "second_evaluations": step.second_evaluations,
        "worst_reconstruction_error": float(step.worst_error),
    }


def gradient_difference(contender: Contender, column: Column, batch: int) -> float:
    """The largest relative difference of a parameter's gradient from that of the same network in plain autograd."""
    gradients = []
    for reversible, build in ((False, network), (True, contender.build)):
        model = contender._replace(build=build).model(column)
        take_step(model, batch, reversible=reversible)
        gradients.append([p.grad for p in model.parameters()])
    largest = max(float(a.norm()) for a in gradients[0])
    # the bias of a shortcut's BatchNorm is taken out by later ones: its gradient is rounding alone
    return max(float((a - b).norm() / a.norm()) for a, b in zip(*gradients, strict=True) if float(a.norm()) > 1e-6 * largest)


def time_ratios(column: Column, batch: int, rounds: int) -> dict[str, float]:
    """Processor time of a step over that of the plain ResNet."""
    models = [contender.model(column) for contender in CONTENDERS]
    times: list[list[int]] = []
    for _ in range(1 + rounds):
        times.append([])
        for contender, model in zip(CONTENDERS, models, strict=True):
            start = time.process_time_ns()
            take_step(model, batch, reversible=contender.reversible)
            times[-1].append(time.process_time_ns() - start)
    return {
        contender.label: round(statistics.median(taken[place] / taken[0] for taken in times[1:]), 3)
        for place, contender in enumerate(CONTENDERS)
    }


def measure_column(name: str, options: argparse.Namespace, console: Console) -> dict[str, dict[str, Any]]:
    column, rows = COLUMNS[name], {}
    for contender in CONTENDERS:
        with console.status(f"{name}: {contender.label}"):
            rows[contender.label] = row = measure(contender, column, options.batch)
            if contender.reversible:
                row["gradient_difference"] = gradient_difference(contender, column, options.time_batch)
    if options.rounds:
        with console.status(f"{name}: step times"):
            for label, ratio in time_ratios(column, options.time_batch, options.rounds).items():
                rows[label]["step_time_over_resnet_indicative"] = ratio
    return rows


def show(result: dict[str, Any], console: Console) -> None:
    scale = PUBLISHED_BATCH / result["batch"]
    table = Table(
        title=f"activations, MiB at batch {PUBLISHED_BATCH}" + (f" (scaled from {result['batch']})" if scale != 1 else ""),
        caption=f"Accounted bytes, {result['device']}, torch {result['torch']}, float32. Held: after forward; % of what MemCNN "
        "published for its RevNet. Peak: of the step; % of memcnn's, measured. Time: processor time of a step over the ResNet's, "
        "indicative. Rebuilt, gradients: the largest relative errors.",
        caption_justify="left",
    )
    table.add_column("", no_wrap=True)
    for head in ("held", "published", "%", "peak", "%", "time", "rebuilt", "gradients"):
        table.add_column(head, justify="right", no_wrap=True)
    for name, rows in result["columns"].items():
        column, peak = COLUMNS[name], rows[THEIRS]["step_peak_bytes"]
        for label, row in rows.items():
            table.add_row(*cells(label, row, column, peak, scale))
        table.add_section()
    console.print(table)
    console.print(kept_table(result, scale))


def cells(label: str, row: dict[str, Any], column: Column, their_peak: int, scale: float) -> tuple[str, ...]:
    held, peak = row["held_bytes"] * scale / MIB, row["step_peak_bytes"] * scale / MIB
    is_revnet = row["network"] == column.revnet
    published = {"ResNet": column.resnet_mib, THEIRS: column.revnet_mib}.get(label)
    ratio = row.get("step_time_over_resnet_indicative")
    return (
        label.replace("ResNet", column.resnet).replace("RevNet", column.revnet),
        f"{held:.1f}",
        f"{published:.1f}" if published is not None else "",
        f"{held / column.revnet_mib:.1%}" if is_revnet else "",
        f"{peak:.1f}",
        f"{row['step_peak_bytes'] / their_peak:.1%}" if is_revnet else "",
        f"{ratio:.2f}" if ratio is not None else "",
        *(f"{row[error]:.0e}" if error in row else "" for error in ("worst_reconstruction_error", "gradient_difference")),
    )


def kept_table(result: dict[str, Any], scale: float) -> Table:
    """Why ours holds what it holds."""
    table = Table(title="what revhooks holds after forward, and why")
    columns = result["columns"]
    labels = [c.label for c in CONTENDERS if c.revnet and c.reversible]
    table.add_column("")
    for name in columns:
        table.add_column(COLUMNS[name].revnet, justify="right")
    for label in labels:
        reasons = dict.fromkeys(why for rows in columns.values() for why in rows[label]["kept_bytes"])
        for why in reasons:
            held = [rows[label]["kept_bytes"].get(why, 0) * scale for rows in columns.values()]
            if max(held) > MIB / 100:
                table.add_row(why, *map(human_bytes, held))
        table.add_row(f"[bold]{label}", *(f"[bold]{human_bytes(r[label]['stats_held_bytes'] * scale)}" for r in columns.values()))
        table.add_section()
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(COLUMNS), default=list(COLUMNS))
    parser.add_argument("--batch", type=int, default=PUBLISHED_BATCH)
    parser.add_argument("--time-batch", type=int, default=20, help="batch for step times and gradient differences")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds; 0 leaves times out")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.networks, options.batch, options.time_batch, options.rounds = ["32/38"], 10, 10, 1
    console = Console(width=max(116, Console().width))
    result = {
        "torch": torch.__version__,
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "batch": options.batch,
        "time_batch": options.time_batch,
        "published": {name: column._asdict() for name, column in COLUMNS.items()},
        "columns": {name: measure_column(name, options, console) for name in options.networks},
    }
    show(result, console)
    if options.batch == PUBLISHED_BATCH and set(options.networks) == set(COLUMNS):
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "cifar_table.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
