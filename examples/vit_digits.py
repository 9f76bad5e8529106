"""A reversible Vision Transformer on scikit-learn's digits, with dropout.

python examples/vit_digits.py
revhooks report examples/vit_digits.py:target

Attention and MLP take turns in changing two streams, which both begin as the embedded patches (Mangalam et al., 2022,
arXiv:2302.04869, section 3.2). Dropout is drawn again, the same, when a branch is repeated in backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import Target, arguments, digits, summary
from torch import Tensor, nn

import revhooks
from revhooks.nn import ReversibleSequential

PATCH = 2
TOKENS = (8 // PATCH) ** 2


class Attention(nn.Module):
    """Attention of several heads: (B, T, C) to (B, T, C)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Sequential(nn.Linear(width, width), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        """Every patch attends to every patch."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def mlp(width: int, dropout: float) -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
    )


class RevViT(nn.Module):
    """Images (B, 1, 8, 8) to logits (B, 10)."""

    def __init__(self, width: int = 64, layers: int = 10, heads: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, PATCH, stride=PATCH)
        self.position = nn.Parameter(0.5 * torch.randn(TOKENS, width))
        branches = [branch for _ in range(layers) for branch in (Attention(width, heads, dropout), mlp(width, dropout))]
        self.layers = ReversibleSequential(*branches, dim=-1)
        self.head = nn.Sequential(nn.LayerNorm(2 * width), nn.Linear(2 * width, 10))

    def forward(self, x: Tensor) -> Tensor:
        """The head sees the mean over patches of both streams."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.layers(torch.cat([x, x], -1)).mean(1))


def target() -> Target:
    """What `revhooks report` and `revhooks check` call."""
    torch.manual_seed(0)
    images, labels = digits()
    return RevViT(), (images[:128],), lambda logits: F.cross_entropy(logits, labels[:128])


def main() -> None:
    options = arguments(__doc__, steps=250).parse_args()
    model, inputs, loss_of = target()
    images, labels = digits()
    order = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=options.steps + 1, pct_start=0.1)
    with revhooks.reversible() as run:
        for step in range(options.steps):
            batch = torch.randint(1400, (128,), generator=order)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 25 == 0 or step == options.steps - 1:
                print(f"step {step}: loss {loss.item():.3f}")

    model.eval()
    with torch.no_grad():
        accuracy = (model(images[1400:]).argmax(1) == labels[1400:]).float().mean().item()
    summary(
        f"reversible ViT, {len(model.layers)} half-blocks, batch 128, scikit-learn digits",
        run.stats,
        (model.train(), inputs, loss_of),
        accuracy_on_397_unseen_digits=f"{accuracy:.1%}",
    )


if __name__ == "__main__":
    main()
