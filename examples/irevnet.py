"""An i-RevNet on scikit-learn's digits: nothing is lost before the classifier, so images come back from their features.

python examples/irevnet.py
revhooks report examples/irevnet.py:target

Channels of zeros are appended to the input, resolution is traded for channels by space-to-depth, and between the two run
couplings that change one half of the channels at a time (Jacobsen et al., 2018, arXiv:1802.07088, section 3).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import Target, arguments, digits, summary
from torch import Tensor, nn

import revhooks
from revhooks.nn import ActNorm, FlowSequential, InvertibleConv1x1, Pad, ReversibleSequential, Squeeze


def branch(channels: int, width: int) -> nn.Module:
    return nn.Sequential(
        nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, channels, 3, padding=1, bias=False),
    )  # fmt: skip


def stage(channels: int, blocks: int, width: int = 32) -> nn.Module:
    return ReversibleSequential(*(branch(channels // 2, width) for _ in range(blocks)))


class IRevNet(nn.Module):
    """Three invertible stages, at 8x8, 4x4 and 2x2 positions, then a linear classifier."""

    def __init__(self, channels: int = 16, blocks: int = 16) -> None:
        super().__init__()
        self.features = FlowSequential(
            Pad(channels - 1),
            # The image into every channel, equally strong: BatchNorm would amplify rounding in channels that are still zero
            InvertibleConv1x1(channels),
            ActNorm(channels),
            stage(channels, blocks),
            Squeeze(),
            stage(4 * channels, blocks),
            Squeeze(),
            stage(16 * channels, blocks),
        )
        self.head = nn.Sequential(
            nn.BatchNorm2d(16 * channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16 * channels, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 1, 8, 8) to logits (B, 10)."""
        return self.head(self.features(x))


def target() -> Target:
    """What `revhooks report` and `revhooks check` call."""
    torch.manual_seed(0)
    images, labels = digits()
    return IRevNet(), (images[:64],), lambda logits: F.cross_entropy(logits, labels[:64])


def main() -> None:
    options = arguments(__doc__, steps=200).parse_args()
    model, inputs, loss_of = target()
    images, labels = digits()
    order = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
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
        features = model.features(images[1400:])
        accuracy = (model.head(features).argmax(1) == labels[1400:]).float().mean().item()
        rebuilt = model.features.inverse(features)
        error = ((rebuilt - images[1400:]).norm() / images[1400:].norm()).item()
    summary(
        "i-RevNet, 48 couplings, batch 64, scikit-learn digits",
        run.stats,
        (model.train(), inputs, loss_of),
        accuracy_on_397_unseen_digits=f"{accuracy:.1%}",
        images_rebuilt_from_features_off_by=f"{error:.1e}",
    )


if __name__ == "__main__":
    main()
