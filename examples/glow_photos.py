"""Glow on crops of scikit-learn's photographs: bits per dimension of unseen crops, and samples.

python examples/glow_photos.py --out samples.png
revhooks report examples/glow_photos.py:target

Every step normalises channels, mixes them by an invertible matrix, and couples their halves (Kingma and Dhariwal, 2018,
arXiv:1807.03039, section 3; a coupling here changes both halves in turn). After each scale half of the channels leave as a
latent. Test crops come from the right quarter of each photograph, which training never sees.
"""

from __future__ import annotations

import torch
from common import Target, arguments, bits_per_dim, dequantized, photo_crops, save_grid, summary
from torch import Tensor, nn

import revhooks
from revhooks.nn import ActNorm, AffineCoupling, FlowSequential, InvertibleConv1x1, Logit, MultiScale, Squeeze

SIZE = 32


def branch(channels: int, width: int) -> nn.Module:
    """Log-scales and shifts for as many channels; both start at zero."""
    last = nn.Conv2d(width, 2 * channels, 3, padding=1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU(), last)


def scale(channels: int, steps: int, width: int) -> list[nn.Module]:
    """Layers at one resolution; ``channels`` as they are after squeezing."""
    half = channels // 2
    layers: list[nn.Module] = [Squeeze()]
    for _ in range(steps):
        coupling = AffineCoupling(branch(half, width), branch(half, width))  # factors between 1/e and e
        layers += [ActNorm(channels), InvertibleConv1x1(channels), coupling]
    return layers


class Glow(nn.Module):
    """Dequantised images (B, 3, 32, 32) in 0..1 to their bits per dimension."""

    def __init__(self, steps: int = 8, width: int = 48) -> None:
        super().__init__()
        self.flow = MultiScale(
            FlowSequential(Logit(0.05), *scale(12, steps, width)),
            FlowSequential(*scale(24, steps, width)),
            FlowSequential(*scale(48, steps, width)),
        )

    def forward(self, images: Tensor) -> Tensor:
        """The negative log-likelihood: a scalar."""
        return bits_per_dim(*self.flow.call_and_ladj(images))

    def sample(self, count: int, temperature: float = 0.8) -> Tensor:
        """Images (N, 3, 32, 32) from normal latents, a little narrower than those of training (section 6)."""
        shapes = [(6, 16, 16), (12, 8, 8), (48, 4, 4)]
        return self.flow.inverse([temperature * torch.randn(count, *shape) for shape in shapes])


def target() -> Target:
    """What `revhooks report` and `revhooks check` call."""
    torch.manual_seed(0)
    crops, _ = photo_crops(SIZE, 24)
    return Glow(), (dequantized(crops, torch.Generator().manual_seed(0)),), lambda bits: bits


def main() -> None:
    options = arguments(__doc__, steps=120, picture="glow_photos.png").parse_args()
    model, inputs, loss_of = target()
    crops, _ = photo_crops(SIZE, 2048)
    order = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    with revhooks.reversible() as run:
        for step in range(options.steps):
            batch = torch.randint(len(crops), (24,), generator=order)
            optimizer.zero_grad()
            bits = model(dequantized(crops[batch], order))
            bits.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            if step % 20 == 0 or step == options.steps - 1:
                print(f"step {step}: {bits.item():.2f} bits per dimension")

    model.eval()
    with torch.no_grad():
        unseen, _ = photo_crops(SIZE, 128, held_out=True, seed=1)
        bits = model(dequantized(unseen, order)).item()
        save_grid(torch.cat([unseen[:16] / 255, model.sample(48)]), options.out)
    summary(
        "Glow, 24 steps at 3 scales, batch 24, 32 x 32 crops of two photographs",
        run.stats,
        (model.train(), inputs, loss_of),
        bits_per_dimension_of_unseen_crops=f"{bits:.2f}",
    )
    print(f"unseen crops (first row) and samples: {options.out}")


if __name__ == "__main__":
    main()
