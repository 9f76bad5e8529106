"""A RevNet classifier on scikit-learn's digits, in an ordinary training loop.

python examples/revnet_digits.py
revhooks report examples/revnet_digits.py:target
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import revhooks
from revhooks.nn import AdditiveCoupling


def branch(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1, bias=False),
    )  # fmt: skip


def revnet(blocks: int = 8, channels: int = 32) -> nn.Module:
    half = channels // 2
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1),
        *(AdditiveCoupling(branch(half), branch(half)) for _ in range(blocks)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 10),
    )


def data() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    return torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target).long()


def target() -> tuple[nn.Module, tuple[Tensor], object]:
    """What `revhooks report` and `revhooks check` call."""
    torch.manual_seed(0)
    images, labels = data()
    return revnet(), (images[:64],), lambda output: F.cross_entropy(output, labels[:64])


def main() -> None:
    torch.manual_seed(0)
    images, labels = data()
    model = revnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with revhooks.reversible() as run:
        for epoch in range(3):
            for chunk in torch.randperm(1400).view(-1, 70):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(images[chunk]), labels[chunk])
                loss.backward()
                optimizer.step()
            print(f"epoch {epoch}: loss {loss.item():.3f}")
    model.eval()
    with torch.no_grad():
        accuracy = (model(images[1400:]).argmax(1) == labels[1400:]).float().mean().item()
    stats = run.stats
    print(f"accuracy {accuracy:.1%}; plain autograd would have held {stats.packed_bytes:,} bytes, held {stats.peak_held_bytes:,}")


if __name__ == "__main__":
    main()
