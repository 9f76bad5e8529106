"""An invertible U-Net that finds the ink of digits blended into photographs.

python examples/iunet.py --out masks.png
revhooks report examples/iunet.py:target

Images are made from real ones as MNIST-M is (Ganin et al., 2016, arXiv:1505.07818): the absolute difference of a 32 x 32 crop
of one of scikit-learn's photographs and one of its digits, enlarged. The mask is where the digit has ink, so it is known
exactly. Test images have digits and parts of the photographs that training never sees.

Resolution changes by learned orthogonal maps, half of the channels of each level skip the levels below it, and all between the
first and the last convolution is invertible (Etmann et al., 2020, arXiv:2005.05220, section 3).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import Target, arguments, digits, photo_crops, save_grid, summary
from torch import Tensor, nn

import revhooks
from revhooks.nn import OrthogonalDownsampling, OrthogonalUpsampling, ReversibleSequential

SIZE = 32


def branch(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.GroupNorm(1, channels),
        nn.LeakyReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
    )


def couplings(channels: int, blocks: int) -> ReversibleSequential:
    return ReversibleSequential(*(branch(channels // 2) for _ in range(2 * blocks)))


class Level(nn.Module):
    """One to one on (B, C, H, W): couplings, half of the channels through the level ``below``, couplings."""

    def __init__(self, channels: int, blocks: int, below: nn.Module) -> None:
        super().__init__()
        self.encode = couplings(channels, blocks)
        self.down = OrthogonalDownsampling(channels // 2)
        self.below = below  # on 2 C channels at half the resolution
        self.up = OrthogonalUpsampling(channels // 2)
        self.decode = couplings(channels, blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Encode, go below with one half, decode."""
        skip, x = self.encode(x).chunk(2, 1)
        x = self.up(self.below(self.down(x)))
        return self.decode(torch.cat([skip, x], 1))

    def inverse(self, y: Tensor) -> Tensor:
        """The input of this output."""
        skip, y = self.decode.inverse(y).chunk(2, 1)
        y = self.down.inverse(self.below.inverse(self.up.inverse(y)))
        return self.encode.inverse(torch.cat([skip, y], 1))


class Segmenter(nn.Module):
    """Images (B, 3, H, W) to logits of ink (B, 1, H, W)."""

    def __init__(self, channels: int = 16, blocks: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.unet = Level(channels, blocks, Level(2 * channels, blocks, couplings(4 * channels, 2 * blocks)))
        self.last = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Widen, transform one to one, and read off."""
        return self.last(self.unet(self.first(x)))


def inked(count: int, *, held_out: bool) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) in 0..1 and masks (N, 1, 32, 32) of 0 and 1."""
    images, _ = digits()
    images = images[1400:] if held_out else images[:1400]
    photos, _ = photo_crops(SIZE, count, held_out=held_out, seed=int(held_out))
    chosen = torch.randint(len(images), (count,), generator=torch.Generator().manual_seed(0))
    ink = F.interpolate(images[chosen], size=SIZE, mode="bilinear")
    return (photos / 255 - ink).abs(), (ink > 0.5).float()


def intersection_over_union(logits: Tensor, masks: Tensor) -> float:
    """The mean over images."""
    guess, truth = (logits > 0).flatten(1), (masks > 0).flatten(1)
    return ((guess & truth).sum(1) / (guess | truth).sum(1)).mean().item()


def target() -> Target:
    """What `revhooks report` and `revhooks check` call."""
    torch.manual_seed(0)
    images, masks = inked(16, held_out=False)
    return Segmenter(), (images,), lambda logits: F.binary_cross_entropy_with_logits(logits, masks.to(logits))


def main() -> None:
    options = arguments(__doc__, steps=150, picture="iunet.png").parse_args()
    model, inputs, loss_of = target()
    images, masks = inked(2048, held_out=False)
    order = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    with revhooks.reversible() as run:
        for step in range(options.steps):
            batch = torch.randint(len(images), (16,), generator=order)
            optimizer.zero_grad()
            loss = F.binary_cross_entropy_with_logits(model(images[batch]), masks[batch])
            loss.backward()
            optimizer.step()
            if step % 20 == 0 or step == options.steps - 1:
                print(f"step {step}: loss {loss.item():.3f}")

    model.eval()
    with torch.no_grad():
        images, masks = inked(128, held_out=True)
        logits = model(images)
        wide = model.first(images)
        error = ((model.unet.inverse(model.unet(wide)) - wide).norm() / wide.norm()).item()
        save_grid(torch.cat([images[:16], *(m[:16].expand(-1, 3, -1, -1) for m in (masks, logits.sigmoid()))]), options.out)
    summary(
        "iUNet of 3 levels, 48 half-blocks, batch 16, digits on photographs",
        run.stats,
        (model.train(), inputs, loss_of),
        intersection_over_union_of_unseen_images=f"{intersection_over_union(logits, masks):.3f}",
        share_of_ink=f"{masks.mean().item():.1%}",
        inverse_of_the_unet_off_by=f"{error:.1e}",
    )
    print(f"unseen images, masks and answers: {options.out}")


if __name__ == "__main__":
    main()
