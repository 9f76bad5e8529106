"""An i-ResNet classifier on scikit-learn's digits, trained without stored activations; its images rebuilt from its features.

python examples/iresnet_digits.py --out reconstructions.png
revhooks report examples/iresnet_digits.py:target

Blocks are ordinary residual blocks whose convolutions are held below a spectral norm of 0.9. Channels are padded with zeros
at the input and resolution is traded for channels by space-to-depth, so that everything before the pooling inverts.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import revhooks
from revhooks.nn import InvertibleResidual

PADDED = 4  # channels of the padded input


def branch(channels: int, width: int = 32) -> nn.Module:
    return nn.Sequential(
        nn.ReLU(), nn.Conv2d(channels, width, 3, padding=1, bias=False),
        nn.ReLU(), nn.Conv2d(width, width, 1, bias=False),
        nn.ReLU(), nn.Conv2d(width, channels, 3, padding=1, bias=False),
    )  # fmt: skip


class IResNet(nn.Module):
    """Two stages of residual blocks, invertible up to the head."""

    def __init__(self, blocks: int = 6, coeff: float = 0.9) -> None:
        super().__init__()
        self.fine = nn.ModuleList(InvertibleResidual(branch(PADDED), coeff) for _ in range(blocks))
        self.coarse = nn.ModuleList(InvertibleResidual(branch(4 * PADDED), coeff) for _ in range(blocks))
        self.head = nn.Sequential(nn.BatchNorm2d(4 * PADDED), nn.ReLU(), nn.Flatten(), nn.Linear(64 * PADDED, 10))

    def features(self, x: Tensor) -> Tensor:
        """What the images are mapped to, of as many dimensions as the padded images."""
        x = F.pad(x, (0, 0, 0, 0, 0, PADDED - 1))
        for block in self.fine:
            x = block(x)
        x = F.pixel_unshuffle(x, 2)
        for block in self.coarse:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Ten logits."""
        return self.head(self.features(x))

    def inverse(self, y: Tensor) -> Tensor:
        """The images of these features."""
        for block in reversed(self.coarse):
            y = block.inverse(y)
        y = F.pixel_shuffle(y, 2)
        for block in reversed(self.fine):
            y = block.inverse(y)
        return y[:, :1]


def data() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)
    return (images - images.mean()) / images.std(), torch.tensor(digits.target).long()


def target() -> tuple[nn.Module, tuple[Tensor], object]:
    """What `revhooks report` and `revhooks check` call."""
    torch.manual_seed(0)
    images, labels = data()
    return IResNet(), (images[:64],), lambda output: F.cross_entropy(output, labels[:64])


def picture(images: Tensor, rebuilt: Tensor, path: Path) -> bool:
    """Images above, reconstructions below."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(images), figsize=(len(images), 2.4))
    for row, (name, batch) in zip(axes, (("image", images), ("rebuilt", rebuilt)), strict=True):
        for axis, image in zip(row, batch, strict=True):
            axis.imshow(image[0].numpy(), cmap="gray_r")
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(name)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "iresnet_digits.png", help="the picture")
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    torch.manual_seed(0)
    images, labels = data()
    model = IResNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    with revhooks.reversible() as run:
        for epoch in range(options.epochs):
            for chunk in torch.randperm(1400).view(-1, 100):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(images[chunk]), labels[chunk])
                loss.backward()
                optimizer.step()
            print(f"epoch {epoch}: loss {loss.item():.3f}")
    stats = run.stats
    print(
        f"activations: plain autograd would have held {stats.packed_bytes:,} bytes, at most {stats.peak_held_bytes:,} were held"
    )

    for block in (*model.fine, *model.coarse):
        block.refine()  # the norms, exact from here on
    model.eval()
    with torch.no_grad():
        features = model.features(images[1400:])
        accuracy = (model.head(features).argmax(1) == labels[1400:]).float().mean().item()
        rebuilt = model.inverse(features)
        error = ((rebuilt - images[1400:]).norm() / images[1400:].norm()).item()
        bound = max(block.contraction_bound() for block in (*model.fine, *model.coarse))
        steps = model.coarse[-1].inverse_with_evidence(features).steps
    print(
        f"accuracy {accuracy:.1%}; images rebuilt from features to {error:.1e} (relative), {steps} iterations in the last block"
    )
    print(f"Lipschitz bound of the worst branch {bound:.3f}: {'an inverse is guaranteed' if bound < 1 else 'no guarantee'}")
    if picture(images[1400:1410], rebuilt[:10], options.out):
        print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
