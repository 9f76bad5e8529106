"""RealNVP on crops of scikit-learn's photographs: bits per dimension of unseen crops, and samples.

python examples/realnvp_photos.py --out samples.png
revhooks report examples/realnvp_photos.py:target

Checkerboard couplings, which are written out below as a block of one's own, then couplings of channel halves, at two scales
(Dinh et al., 2016, arXiv:1605.08803, sections 3.4 to 3.6). ActNorm stands in for the paper's batch normalisation. Test crops
come from the right quarter of each photograph, which training never sees.
"""

from __future__ import annotations

import torch
from common import Target, arguments, bits_per_dim, dequantized, photo_crops, save_grid, summary
from torch import Tensor, nn

import revhooks
from revhooks.nn import ActNorm, AffineCoupling, FlowSequential, Logit, MultiScale, Squeeze

SIZE = 16


def branch(channels: int, width: int) -> nn.Module:
    """Log-scales and shifts for as many channels; both start at zero."""
    last = nn.Conv2d(width, 2 * channels, 3, padding=1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU(), last)


class CheckerboardCoupling(nn.Module):
    """Scales and shifts every second pixel by what the others say (eq. 9): (B, C, size, size) to the same.

    The inverse calls ``net`` on the same pixels as forward does, so that `revhooks` needs no further call to rebuild what
    ``net`` saved.
    """

    kept: Tensor

    def __init__(self, channels: int, size: int, parity: int, width: int) -> None:
        super().__init__()
        self.net = branch(channels, width)
        rows, columns = torch.arange(size)[:, None], torch.arange(size)
        self.register_buffer("kept", (rows + columns) % 2 == parity)

    def _log_scale_and_shift(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = self.net(x * self.kept).chunk(2, 1)
        return torch.tanh(raw) * ~self.kept, shift * ~self.kept

    def forward(self, x: Tensor) -> Tensor:
        """As `call_and_ladj`, without the log-abs-det."""
        return self.call_and_ladj(x)[0]

    @revhooks.invertible(inverse=lambda layer, output: layer.inverse(output[0]))
    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the log-abs-det (B,)."""
        log_scale, shift = self._log_scale_and_shift(x)
        return x * log_scale.exp() + shift, log_scale.flatten(1).sum(1)

    def inverse(self, y: Tensor) -> Tensor:
        """The pixels that are kept tell how the others were changed."""
        log_scale, shift = self._log_scale_and_shift(y)
        return (y - shift) * (-log_scale).exp()


def scale(channels: int, size: int, couplings: int, width: int) -> list[nn.Module]:
    """Layers at one resolution: checkerboards, then halves of four times the channels."""
    layers: list[nn.Module] = []
    for i in range(couplings):
        layers += [ActNorm(channels), CheckerboardCoupling(channels, size, i % 2, width)]
    layers.append(Squeeze())
    for _ in range(couplings // 2):
        layers += [ActNorm(4 * channels), AffineCoupling(branch(2 * channels, width), branch(2 * channels, width))]
    return layers


class RealNVP(nn.Module):
    """Dequantised images (B, 3, 16, 16) in 0..1 to their bits per dimension."""

    def __init__(self, couplings: int = 6, width: int = 48) -> None:
        super().__init__()
        self.flow = MultiScale(
            FlowSequential(Logit(0.05), *scale(3, SIZE, couplings, width)),
            FlowSequential(*scale(6, SIZE // 2, couplings, width)),
        )

    def forward(self, images: Tensor) -> Tensor:
        """The negative log-likelihood: a scalar."""
        return bits_per_dim(*self.flow.call_and_ladj(images))

    def sample(self, count: int) -> Tensor:
        """Images (N, 3, 16, 16)."""
        return self.flow.inverse([torch.randn(count, 6, 8, 8), torch.randn(count, 24, 4, 4)])


def target() -> Target:
    """What `revhooks report` and `revhooks check` call."""
    torch.manual_seed(0)
    crops, _ = photo_crops(SIZE, 64)
    return RealNVP(), (dequantized(crops, torch.Generator().manual_seed(0)),), lambda bits: bits


def main() -> None:
    options = arguments(__doc__, steps=150, picture="realnvp_photos.png").parse_args()
    model, inputs, loss_of = target()
    crops, _ = photo_crops(SIZE, 4096)
    order = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    with revhooks.reversible() as run:
        for step in range(options.steps):
            batch = torch.randint(len(crops), (64,), generator=order)
            optimizer.zero_grad()
            bits = model(dequantized(crops[batch], order))
            bits.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            if step % 20 == 0 or step == options.steps - 1:
                print(f"step {step}: {bits.item():.2f} bits per dimension")

    model.eval()
    with torch.no_grad():
        unseen, _ = photo_crops(SIZE, 256, held_out=True, seed=1)
        bits = model(dequantized(unseen, order)).item()
        save_grid(torch.cat([unseen[:16] / 255, model.sample(48)]), options.out, zoom=3)
    summary(
        "RealNVP, 24 couplings at 2 scales, batch 64, 16 x 16 crops of two photographs",
        run.stats,
        (model.train(), inputs, loss_of),
        bits_per_dimension_of_unseen_crops=f"{bits:.2f}",
    )
    print(f"unseen crops (first row) and samples: {options.out}")


if __name__ == "__main__":
    main()
