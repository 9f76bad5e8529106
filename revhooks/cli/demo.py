"""``revhooks demo``: a RevNet on real digits, plain and under ``reversible()``, and what else could be chosen for it."""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["add_parser"]

_EXAMPLES = """\
examples:
  revhooks demo
  revhooks demo --blocks 24 --epochs 2
  revhooks demo --json demo.json
"""


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "demo",
        help="train a small RevNet on digits, plain and reversible",
        description="Train a RevNet classifier on scikit-learn's digits twice from one seed, once plain and once under "
        "reversible(), and compare accuracy, memory, time and gradients.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--epochs", type=int, default=3, metavar="N", help="passes over the data (default 3)")
    parser.add_argument("--blocks", type=int, default=5, metavar="N", help="reversible blocks (default 5)")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="batch size (default 64)")
    parser.add_argument("--channels", type=int, default=48, metavar="N", help="width of the net, even (default 48)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (default 0)")
    parser.add_argument("--json", metavar="FILE", help="also write the memory report as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Train both and print the comparison."""
    from ..errors import TargetError, explain

    for name, least in (("epochs", 1), ("blocks", 1), ("batch", 2), ("channels", 2)):
        if getattr(options, name) < least:
            raise TargetError(
                explain(f"--{name}", expected=f"at least {least}", got=str(getattr(options, name)), remedy="pass a larger number")
            )
    if options.channels % 2:
        raise TargetError(
            explain("--channels", expected="an even number, for two halves", got=str(options.channels), remedy="pass one more")
        )
    try:
        import sklearn.datasets  # noqa: F401
    except ImportError as error:
        raise TargetError(
            explain(
                "revhooks demo",
                expected="scikit-learn, which ships the digits",
                got="no such package",
                remedy="pip install 'revhooks[demo]'",
            )
        ) from error
    if options.json:
        from ..report.files import refuse

        refuse([options.json], force=True)
    _compare(options)
    return 0


def revnet(blocks: int, channels: int = 32) -> Any:
    """A RevNet classifier of small images: stem, a chain of additive couplings, pooling, head."""
    from torch import nn

    from ..nn import AdditiveCoupling

    half = channels // 2

    def branch() -> nn.Module:
        return nn.Sequential(
            nn.BatchNorm2d(half), nn.ReLU(), nn.Conv2d(half, half, 3, padding=1, bias=False),
            nn.BatchNorm2d(half), nn.ReLU(), nn.Conv2d(half, half, 3, padding=1, bias=False),
        )  # fmt: skip

    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        *(AdditiveCoupling(branch(), branch()) for _ in range(blocks)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 10),
    )


def digits(size: int = 16) -> tuple[Any, Any, Any, Any]:
    """scikit-learn's 1,797 digits as ``(train images, train labels, test images, test labels)``.

    Images have shape ``(B, 1, size, size)``, float32 in 0..1, interpolated from 8 x 8; labels ``(B,)``, int64.
    """
    import torch
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    images = torch.nn.functional.interpolate(images, size=size, mode="bilinear")
    labels = torch.tensor(data.target, dtype=torch.long)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return images[360:], labels[360:], images[:360], labels[:360]


class _Contender:
    """One of both nets, its optimizer and its times."""

    def __init__(self, model: Any, steps: int, *, reverse: bool) -> None:
        import torch

        self.model = model
        self.reverse = reverse
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=0.1, total_steps=steps)
        self.times: list[int] = []
        self.worst = 0.0
        self.held = self.packed = 0  # bytes, at most

    def step(self, images: Any, labels: Any) -> None:
        """One training step."""
        from ..context import reversible

        start = time.perf_counter_ns()
        self.optimizer.zero_grad()
        if self.reverse:
            with reversible() as run:
                self._backward(images, labels)
            stats = run.stats
            self.worst = max(self.worst, float(stats.worst_error))
            self.held, self.packed = max(self.held, stats.peak_held_bytes), max(self.packed, stats.packed_bytes)
        else:
            self._backward(images, labels)
        self.optimizer.step()
        self.schedule.step()
        self.times.append(time.perf_counter_ns() - start)

    def _backward(self, images: Any, labels: Any) -> None:
        import torch.nn.functional as F

        F.cross_entropy(self.model(images), labels).backward()

    def accuracy(self, images: Any, labels: Any) -> float:
        """Share of right answers, in eval mode."""
        import torch

        self.model.eval()
        with torch.no_grad():
            right = (self.model(images).argmax(1) == labels).float().mean()
        self.model.train()
        return float(right)


def _compare(options: argparse.Namespace) -> None:
    import torch
    import torch.nn.functional as F

    from ..profiler.whatif import measure
    from ..profiler.workload import Workload
    from ..report.tables import render

    torch.manual_seed(options.seed)
    images, labels, test_images, test_labels = digits()
    model = revnet(options.blocks, options.channels)
    work = Workload(copy.deepcopy(model), (images[: options.batch],), lambda out: F.cross_entropy(out, labels[: options.batch]))
    steps = options.epochs * (len(labels) // options.batch)
    plain, rev = _Contender(copy.deepcopy(model), steps, reverse=False), _Contender(model, steps, reverse=True)
    _train(plain, rev, images, labels, options)
    console = Console()
    console.print(_table(plain, rev, [contender.accuracy(test_images, test_labels) for contender in (plain, rev)]))
    with Console(stderr=True).status("one step of the same net in other ways ...") as status:
        target = f"one step of this RevNet ({options.blocks} blocks, batch {options.batch})"
        record = measure(work, target=target, seconds=5, tell=status.update)
    console.print(render(record, rows=6))
    if options.json:
        record.save(options.json)


def _train(plain: _Contender, rev: _Contender, images: Any, labels: Any, options: argparse.Namespace) -> None:
    """Both nets by turns on the same batches."""
    import torch

    batches = len(labels) // options.batch
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("training both nets", total=options.epochs * batches)
        for epoch in range(options.epochs):
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(options.seed + epoch))
            for chunk in order[: batches * options.batch].view(batches, options.batch):
                for contender in (plain, rev):
                    contender.step(images[chunk], labels[chunk])
                progress.advance(task)


def _table(plain: _Contender, rev: _Contender, scores: list[float]) -> Any:
    from rich import box
    from rich.table import Table

    from ..record import human_bytes

    ratio = statistics.median(b / a for a, b in zip(plain.times, rev.times, strict=True))
    table = Table(title="trained twice from one seed, by turns", box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("", "plain", "reversible", "ratio"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row("test accuracy", f"{scores[0]:.1%}", f"{scores[1]:.1%}", "")
    medians = [statistics.median(c.times) / 1e6 for c in (plain, rev)]
    table.add_row("training step, median", f"{medians[0]:.0f} ms", f"{medians[1]:.0f} ms", f"{ratio:.2f}")
    table.add_row("held for backward, at most", human_bytes(rev.packed), human_bytes(rev.held), f"{rev.held / rev.packed:.2f}")
    table.add_row("worst reconstruction error (relative)", "-", f"{rev.worst:.1e}", "")
    return table
