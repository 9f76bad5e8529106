"""Table 1 and figures 2 and 4 of the i-ResNet paper: classification error, reconstruction error, and norms of all layers.

    python bench/iresnet_table.py                       # scikit-learn's digits, a few minutes on one CPU core
    python bench/iresnet_table.py --data DIR            # MNIST idx-ubyte(.gz) files, or CIFAR-10 python batches, in DIR
    python bench/iresnet_table.py --data DIR --blocks 18 18 19 --width 64 --epochs 200 --device cuda   # the paper's size

Trains i-ResNets at c = 0.9, 0.7, 0.5, 0.3, and the same net unconstrained (vanilla) and with BatchNorm. Each is then inverted,
block by block from its last features, with 5, 10, 20 and 100 fixed-point iterations a block.

Reconstruction error is the relative L2 error of an image, |x - x'| / |x|, averaged over test images; x is the zero-padded
input, so an error in the padding counts. It is computed in float32, as trained, and with the same weights in float64, where
rounding does not hide the iteration. Bounds are those of the layers as they compute, after training.

The paper calls its figure a normed L2 error, without a formula. Relative to the image is the reading that fits: its vanilla net,
which does not invert, has 1.4, the distance of two unrelated images of one norm. In float32 what limits it is not the iteration
but y = x + g(x): bits are lost where y lies in a higher binade than x. So it shrinks with g (with c, and without biases in the
branches, as here), and it is large where pixels sit on a power of two, as a background of -0.5 does.

References:
    Behrmann et al., 2018, arXiv:1811.00995, table 1, figures 2 and 4, appendix A.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import math
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from revhooks.nn import InvertibleResidual, contract
from revhooks.nn.spectral import SpectralLayer
from revhooks.solvers import fixed_point

RESULTS = Path(__file__).parent / "results"
ITERATIONS = (5, 10, 20, 100)
CURVE = (*range(1, 13), 15, 20, 25, 30, 40)
FEW = 50  # images in float64
VARIANTS: dict[str, tuple[float | None, bool]] = {  # coefficient, BatchNorm
    "vanilla": (None, False),
    "BatchNorm": (None, True),
    "c = 0.9": (0.9, False),
    "c = 0.7": (0.7, False),
    "c = 0.5": (0.5, False),
    "c = 0.3": (0.3, False),
}
PAPER = {  # after 100 iterations
    "CIFAR-10": dict(zip(VARIANTS, (1.4, math.inf, 1.3e-7, 9.5e-8, 1.9e-8, 7.2e-9), strict=True)),
    "MNIST": dict(zip(VARIANTS, (2.5e-7, 1.0, 2.2e-7, 1.9e-7, 1.6e-7, 7.3e-8), strict=True)),
}

# -- data

Split = tuple[Tensor, Tensor, Tensor, Tensor]


def digits() -> Split:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None]
    labels = torch.tensor(data.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    images = (images - images[:1400].mean()) / images[:1400].std()
    return images[:1400], labels[:1400], images[1400:], labels[1400:]


def idx(folder: Path, stem: str) -> Tensor:
    """An idx-ubyte file, gzipped or not."""
    path = next(p for p in sorted(folder.rglob(f"{stem}*")) if p.is_file())
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rank = raw[3]
    shape = np.frombuffer(raw, ">i4", rank, 4)
    return torch.tensor(np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape))


def mnist(folder: Path) -> Split:
    splits: list[Tensor] = []
    for part in ("train", "t10k"):
        splits += [idx(folder, f"{part}-images")[:, None].float() / 255 - 0.5, idx(folder, f"{part}-labels").long()]
    return splits[0], splits[1], splits[2], splits[3]


def cifar(folder: Path) -> Split:
    def read(names: list[str]) -> tuple[Tensor, Tensor]:
        batches = [pickle.loads(next(folder.rglob(name)).read_bytes(), encoding="bytes") for name in names]
        images = np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, 32, 32)
        return torch.tensor(images).float() / 255, torch.tensor(np.concatenate([batch[b"labels"] for batch in batches])).long()

    train, labels = read([f"data_batch_{i}" for i in range(1, 6)])
    test, test_labels = read(["test_batch"])
    mean, std = train.mean((0, 2, 3), keepdim=True), train.std((0, 2, 3), keepdim=True)
    return (train - mean) / std, labels, (test - mean) / std, test_labels


def load(folder: Path | None) -> tuple[str, Split]:
    if folder is None:
        return "digits", digits()
    if any(folder.rglob("train-images*")):
        return "MNIST", mnist(folder)
    if any(folder.rglob("data_batch_1")):
        return "CIFAR-10", cifar(folder)
    raise SystemExit(f"{folder}: expected train-images-idx3-ubyte(.gz) or data_batch_1, found neither. Remedy: unpack one there.")


# -- the net


def branch(channels: int, width: int, batch_norm: bool) -> nn.Sequential:
    sizes = (channels, width, width, channels)
    layers: list[nn.Module] = []
    for kernel, before, after in zip((3, 1, 3), sizes[:-1], sizes[1:], strict=True):
        layers += [nn.BatchNorm2d(before)] if batch_norm else []
        layers += [nn.ReLU(), nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False)]
    return nn.Sequential(*layers)


class Net(nn.Module):
    """Channels padded with zeros, stages of blocks with space-to-depth between them, pooling, ten classes."""

    def __init__(self, channels: int, blocks: list[int], width: int, coeff: float | None, batch_norm: bool) -> None:
        super().__init__()
        self.padding = 3 * channels
        channels += self.padding
        self.stages = nn.ModuleList()
        for count in blocks:
            self.stages.append(
                nn.ModuleList(InvertibleResidual(branch(channels, width, batch_norm), coeff) for _ in range(count))
            )
            channels *= 4
        channels //= 4
        self.head = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classes = nn.Linear(channels, 10)

    def blocks(self) -> list[InvertibleResidual]:
        return [block for block in self.modules() if isinstance(block, InvertibleResidual)]

    def pad(self, x: Tensor) -> Tensor:
        return torch.cat([x, x.new_zeros(len(x), self.padding, *x.shape[2:])], 1)

    def features(self, x: Tensor) -> Tensor:
        x = self.pad(x)
        for number, stage in enumerate(self.stages):
            x = F.pixel_unshuffle(x, 2) if number else x
            for block in stage:  # type: ignore[attr-defined]
                x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.classes(self.head(self.features(x)))

    @torch.no_grad()
    def reconstruct(self, y: Tensor, steps: int) -> Tensor:
        """The padded input, by ``steps`` fixed-point iterations a block, whatever their residual."""
        for number, stage in reversed(list(enumerate(self.stages))):
            for block in reversed(stage):  # type: ignore[call-overload]
                y = fixed_point(lambda x, block=block, y=y: y - block.g(x), y, rtol=0.0, max_steps=steps, patience=steps).value
            y = F.pixel_shuffle(y, 2) if number else y
        return y


# -- training and measuring


def train(net: Net, images: Tensor, labels: Tensor, epochs: int, batch: int, shift: int) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    steps = epochs * (len(labels) // batch)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(steps * part) for part in (0.3, 0.6, 0.8)], 0.2)
    for _ in range(epochs):
        for chunk in torch.randperm(len(labels), device=labels.device).split(batch)[: len(labels) // batch]:
            optimizer.zero_grad()
            x = images[chunk]
            if shift:
                dy, dx = torch.randint(-shift, shift + 1, (2,)).tolist()
                x = F.pad(x, [shift] * 4, value=float(images.min()))
                x = x.roll((dy, dx), (2, 3))[:, :, shift:-shift, shift:-shift]
            loss = F.cross_entropy(net(x), labels[chunk])
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 5.0)
            optimizer.step()
            schedule.step()


@torch.no_grad()
def error_percent(net: Net, images: Tensor, labels: Tensor) -> float:
    wrong = sum(int((net(x).argmax(1) != y).sum()) for x, y in zip(images.split(256), labels.split(256), strict=True))
    return 100 * wrong / len(labels)


@torch.no_grad()
def reconstruction_error(net: Net, images: Tensor, steps: int) -> float:
    """Mean over images of |x - x'| / |x|."""
    errors = []
    for x in images.split(256):
        padded = net.pad(x)
        off = (net.reconstruct(net.features(x), steps).double() - padded.double()).flatten(1).norm(dim=1)
        errors.append(off / padded.double().flatten(1).norm(dim=1))
    mean = float(torch.cat(errors).mean())
    return mean if math.isfinite(mean) else math.inf


@torch.no_grad()
def layer_norms(net: Net, image: Tensor) -> list[float]:
    """The Lipschitz bound of every convolution as it computes; the vanilla nets' too."""
    net = copy.deepcopy(net)
    contract(net.stages, 1e9)  # what is not constrained yet gets a coefficient that never acts
    net.features(image)
    return [layer.lipschitz_bound() for layer in net.modules() if isinstance(layer, SpectralLayer)]


def measure(name: str, split: Split, options: argparse.Namespace) -> dict[str, Any]:
    coeff, batch_norm = VARIANTS[name]
    images, labels, test_images, test_labels = (t.to(options.device) for t in split)
    torch.manual_seed(options.seed)
    net = Net(images.shape[1], options.blocks, options.width, coeff, batch_norm).to(options.device)
    start = time.perf_counter()
    train(net, images, labels, options.epochs, options.batch, options.shift)
    seconds = time.perf_counter() - start
    for block in net.blocks():
        block.refine()
    net.eval()
    shown = test_images[: options.images]
    norms = layer_norms(net, shown[:1])
    wide, few = copy.deepcopy(net).double(), shown[:FEW].double()
    return {
        "classification_error_percent": error_percent(net, test_images, test_labels),
        "reconstruction_error": {n: reconstruction_error(net, shown, n) for n in ITERATIONS},
        "reconstruction_error_float64": {n: reconstruction_error(wide, few, n) for n in ITERATIONS},
        "curve_float64": {n: reconstruction_error(wide, few, n) for n in CURVE},
        "layer_bounds": norms,
        "largest_branch_bound": max(math.prod(norms[i : i + 3]) for i in range(0, len(norms), 3)),
        "guaranteed": coeff is not None and all(block.contraction_bound() < 1 for block in net.blocks()),
        "train_seconds": round(seconds, 1),
    }


# -- showing


def show(results: dict[str, Any], console: Console) -> None:
    table = Table(title=f"i-ResNet on {results['data']}: reconstruction error is |x - x'| / |x|, float32 (float64)")
    columns = ("", "error %", *(f"{n} it." for n in ITERATIONS), "paper", "it. to 1e-7", "largest layer", "largest g", "inverse")
    for column in columns:
        table.add_column(column, justify="left" if not column else "right")
    for name, row in results["variants"].items():
        narrow, wide = row["reconstruction_error"], row["reconstruction_error_float64"]
        paper = "  ".join(f"{PAPER[data][name]:.1e}" for data in PAPER)
        table.add_row(
            name,
            f"{row['classification_error_percent']:.2f}",
            *(f"{narrow[n]:.1e} ({wide[n]:.1e})" for n in ITERATIONS),
            paper,
            str(next((n for n, error in row["curve_float64"].items() if error <= 1e-7), "never")),
            f"{max(row['layer_bounds']):.3f}",
            f"{row['largest_branch_bound']:.3f}",
            "guaranteed" if row["guaranteed"] else "not bound",
        )
    console.print(table)
    console.print(
        "paper: 100 iterations, CIFAR-10 and MNIST, 55 blocks. it. to 1e-7: in float64. layer, g: Lipschitz bounds after training"
    )


def plot(results: dict[str, Any], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for name, row in results["variants"].items():
        curve = {n: error if 0 < error < 1e3 else math.nan for n, error in row["curve_float64"].items()}
        left.semilogy(list(curve), list(curve.values()), label=name)
        right.plot(sorted(row["layer_bounds"], reverse=True), label=name)
    left.set(xlabel="fixed-point iterations a block", ylabel="relative L2 error", title="Reconstruction, float64")
    left.axhline(1e-7, color="grey", linewidth=0.5, linestyle="--")
    right.set(xlabel="convolution, sorted", ylabel="Lipschitz bound", title="Norms of all layers", yscale="log")
    right.axhline(1.0, color="grey", linewidth=0.5, linestyle="--")
    left.legend()
    figure.suptitle(f"i-ResNet on {results['data']}, {sum(results['blocks'])} blocks")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with MNIST or CIFAR-10; scikit-learn's digits without it")
    parser.add_argument("--blocks", type=int, nargs="+", default=[6, 6, 6], help="blocks a stage")
    parser.add_argument("--width", type=int, default=32, help="channels inside a branch")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--shift", type=int, default=0, help="augment by shifts of up to this many pixels")
    parser.add_argument("--images", type=int, default=397, help="test images to reconstruct")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    console = Console(width=160)
    data, split = load(options.data)
    results: dict[str, Any] = {
        "torch": torch.__version__,
        "device": options.device,
        "data": data,
        **{key: getattr(options, key) for key in ("blocks", "width", "epochs", "batch", "shift", "images", "seed")},
        "error": f"mean over test images of |x - x'| / |x|, L2, of the zero-padded input; float64 on {FEW} of them",
        "paper_after_100_iterations": {key: {n: str(v) for n, v in row.items()} for key, row in PAPER.items()},
        "variants": {},
    }
    for name in options.only:
        results["variants"][name] = measure(name, split, options)
        console.print(f"{name}: trained in {results['variants'][name]['train_seconds']} s")
    show(results, console)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "iresnet_table.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(results, options.out / "iresnet_table.png")


if __name__ == "__main__":
    main()
