"""A RevNet classifier on scikit-learn's digits, in an ordinary training loop.

python examples/revnet_digits.py
revhooks report examples/revnet_digits.py:target
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import Target, arguments, digits, summary
from torch import nn

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


def target() -> Target:
    """What `revhooks report` and `revhooks check` call."""
    torch.manual_seed(0)
    images, labels = digits()
    return revnet(), (images[:64],), lambda output: F.cross_entropy(output, labels[:64])


def main() -> None:
    options = arguments(__doc__, steps=60).parse_args()
    model, inputs, loss_of = target()
    images, labels = digits()
    order = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with revhooks.reversible() as run:
        for step in range(options.steps):
            batch = torch.randint(1400, (64,), generator=order)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            if step % 20 == 0 or step == options.steps - 1:
                print(f"step {step}: loss {loss.item():.3f}")

    model.eval()
    with torch.no_grad():
        accuracy = (model(images[1400:]).argmax(1) == labels[1400:]).float().mean().item()
    summary(
        "RevNet, 8 blocks, batch 64, scikit-learn digits",
        run.stats,
        (model.train(), inputs, loss_of),
        accuracy_on_397_unseen_digits=f"{accuracy:.1%}",
    )


if __name__ == "__main__":
    main()
