"""A residual network on scikit-learn's digits, turned into a MomentumNet, in an ordinary training loop.

Trains it plainly, reversibly, and reversibly on a grid, from the same weights; prints accuracy and what was held for backward.

python examples/momentumnet_digits.py
revhooks report examples/momentumnet_digits.py:target
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import revhooks
from revhooks.nn import to_momentum


class Residual(nn.Module):
    """An ordinary residual block: nothing in it knows of revhooks."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return x + self.second(F.relu(self.first(F.relu(self.norm(x)))))


def momentumnet(blocks: int = 20, channels: int = 16, *, exact: bool = False) -> nn.Module:
    stack = nn.Sequential(*(Residual(channels) for _ in range(blocks)))
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1),
        to_momentum(stack, gamma=0.9, exact=exact),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * channels, 10),
    )


def data() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    return torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target).long()


def target() -> tuple[nn.Module, tuple[Tensor], object]:
    """What `revhooks report` and `revhooks check` call."""
    torch.manual_seed(0)
    images, labels = data()
    return momentumnet(), (images[:64],), lambda output: F.cross_entropy(output, labels[:64])


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int = 3) -> float:
    """Train on the first 1,400 digits; the accuracy on the others."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for chunk in torch.randperm(1400).view(-1, 70):
            optimizer.zero_grad()
            F.cross_entropy(model(images[chunk]), labels[chunk]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        return (model(images[1400:]).argmax(1) == labels[1400:]).float().mean().item()


def main() -> None:
    images, labels = data()
    print(f"{'':<18} {'accuracy':>8} {'held for backward':>18} {'seconds':>8}")
    for name, exact, reversible in (("plain", False, False), ("reversible", False, True), ("reversible, exact", True, True)):
        torch.manual_seed(0)
        model = momentumnet(exact=exact)
        began = time.perf_counter()
        # keep= leaves every block alone: only the books are kept, of what plain autograd holds
        with revhooks.reversible(keep=(nn.Module,)) if not reversible else revhooks.reversible() as run:
            accuracy = train(model, images, labels)
        held = run.stats.peak_held_bytes / 2**20
        print(f"{name:<18} {accuracy:>8.1%} {held:>14.1f} MiB {time.perf_counter() - began:>8.1f}")


if __name__ == "__main__":
    main()
