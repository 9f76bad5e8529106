"""What the examples share: data that scikit-learn and Python bring along, and the table that each prints at its end."""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import inspect
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn

import revhooks
from revhooks.record import Stats, human_bytes

Target = tuple[nn.Module, tuple[Tensor, ...], Callable[[Any], Tensor]]

# -- data


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 digits: images (N, 1, 8, 8), float32 in 0..1, and labels (N,). Examples train on the first 1,400."""
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target).long()


def photo_crops(size: int, count: int, *, held_out: bool = False, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random crops of scikit-learn's two photographs (a temple and a flower, 427 x 640 each).

    The right quarter of each photograph is held out: its crops share no pixel with those of training.

    Returns:
        Crops (N, 3, size, size), uint8, and the photograph that each is from (N,): 0 or 1.
    """
    photos = [torch.tensor(photo).permute(2, 0, 1) for photo in load_sample_images().images]
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(len(photos), (count,), generator=generator)
    crops = []
    for index in which.tolist():
        height, width = photos[index].shape[1:]
        edge = 3 * width // 4
        first, last = (edge, width) if held_out else (0, edge)
        top = int(torch.randint(height - size + 1, (), generator=generator))
        left = first + int(torch.randint(last - first - size + 1, (), generator=generator))
        crops.append(photos[index][:, top : top + size, left : left + size])
    return torch.stack(crops), which


ALPHABET = "\n" + "".join(map(chr, range(32, 127)))


def source_code(*modules: str) -> Tensor:
    """The source of modules of the standard library, as indices into `ALPHABET` (N,); other characters are left out."""
    text = "\n".join(inspect.getsource(importlib.import_module(name)) for name in modules)
    index = {character: i for i, character in enumerate(ALPHABET)}
    return torch.tensor([index[character] for character in text if character in index])


# -- flows


def bits_per_dim(latents: tuple[Tensor, ...], ladj: Tensor) -> Tensor:
    """Negative log-likelihood of images of 256 levels, scaled to 0..1, under a standard normal prior, in bits a dimension.

    Args:
        latents: one tensor (B, *) a scale.
        ladj: the flow's log-abs-det (B,).
    """
    flat = torch.cat([z.flatten(1) for z in latents], 1)
    log_prob = -0.5 * (flat.square() + math.log(2 * math.pi)).sum(1) + ladj
    return 8 - log_prob.mean() / (flat.shape[1] * math.log(2))


def dequantized(images: Tensor, order: torch.Generator) -> Tensor:
    """uint8 images as float32 in 0..1, with uniform noise below one level (Theis et al., 2016, arXiv:1511.01844, section 3.1)."""
    return (images + torch.rand(images.shape, generator=order)) / 256


def save_grid(images: Tensor, path: Path, columns: int = 16, zoom: int = 2) -> None:
    """Write images (N, 3, H, W), float in 0..1, as the tiles of one PNG."""
    from PIL import Image

    rows = images[: len(images) // columns * columns].clamp(0, 1).unflatten(0, (-1, columns))
    grid = (rows.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2) * 255).round().to(torch.uint8)
    picture = Image.fromarray(grid.numpy())
    picture.resize((zoom * picture.width, zoom * picture.height), Image.Resampling.NEAREST).save(path)


# -- running and reporting


def arguments(doc: str, *, steps: int, picture: str = "") -> argparse.ArgumentParser:
    """A command line with ``--steps``, ``--quick`` and, for an example that draws, ``--out``."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=steps, metavar="N", help=f"training steps (default {steps})")
    parser.add_argument("--quick", dest="steps", action="store_const", const=2, help="two steps, to see that it runs")
    if picture:
        default = Path(tempfile.gettempdir()) / picture
        parser.add_argument("--out", type=Path, default=default, metavar="FILE", help="where to draw (default %(default)s)")
    return parser


def summary(title: str, stats: Stats, target: Target, **metrics: str) -> None:
    """Print what a training run held, what one step costs, and how good the model has become.

    Args:
        title: what was trained, on what.
        stats: ``run.stats`` of the training loop.
        target: the trained model, the inputs of a step, and its loss: the step that is compared.
        **metrics: rows of their own.
    """
    expected, got = _gradients(target, reverse=False), _gradients(target, reverse=True)
    scale = max(float(grad.abs().max()) for grad in expected)
    difference = max(float((a - b).abs().max()) for a, b in zip(expected, got, strict=True)) / scale
    pairs = _seconds(target)
    plain, rev = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("", "plain", "reversible", "ratio"):
        table.add_column(name, justify="right" if name else "left")
    packed, held = stats.packed_bytes, stats.peak_held_bytes
    table.add_row("held for backward, at most", human_bytes(packed), human_bytes(held), f"{held / packed:.3f}")
    table.add_row("step time, median", f"{1e3 * plain:.0f} ms", f"{1e3 * rev:.0f} ms", f"{ratio:.2f}")
    table.add_row("largest gradient difference, float64", "-", f"{difference:.1e}", "")
    table.add_row("worst reconstruction error, float32", "-", f"{float(stats.worst_error):.1e}", "")
    for name, value in metrics.items():
        table.add_row(name.replace("_", " "), "", value, "")
    table.caption = (
        f"{stats.frames} block calls, {stats.inversions} inverted, {stats.replays} replayed; bytes are accounted, gradient "
        "differences relative to the largest gradient"
    )
    table.caption_justify = "left"
    Console().print(table)


def _step(target: Target, *, reverse: bool) -> None:
    model, inputs, loss = target
    with revhooks.reversible() if reverse else contextlib.nullcontext():
        loss(model(*inputs)).backward()


def _gradients(target: Target, *, reverse: bool) -> list[Tensor]:
    """Of one step in float64, from a fixed seed."""
    model, inputs, loss = target
    double = copy.deepcopy(model).double()
    double.zero_grad()
    torch.manual_seed(0)
    _step((double, tuple(x.double() if x.is_floating_point() else x for x in inputs), loss), reverse=reverse)
    return [p.grad for p in double.parameters() if p.grad is not None]


def _seconds(target: Target, rounds: int = 5, enough: float = 3.0) -> list[tuple[float, float]]:
    """Times of a step in float32, plain and reversible, by turns; one pair at least, no more after ``enough`` seconds."""
    target = (copy.deepcopy(target[0]), *target[1:])
    times: list[tuple[float, float]] = []
    while len(times) < 2 or (len(times) <= rounds and sum(map(sum, times)) < enough):
        pair = []
        for reverse in (False, True):
            began = time.perf_counter()
            _step(target, reverse=reverse)
            pair.append(time.perf_counter() - began)
        times.append((pair[0], pair[1]))
    return times[1:]  # the first is a warm-up
