"""A Reformer-like language model of characters, on the source of Python's own standard library.

python examples/reformer_text.py
python examples/reformer_text.py --lsh
revhooks report examples/reformer_text.py:target

Attention and chunked feed-forward layers take turns in changing two streams (Kitaev et al., 2020, arXiv:2001.04451). With
``--lsh`` queries attend only to keys that a random rotation hashes into the same bucket. The rotation is drawn anew in every
call and drawn again, the same, when the call is repeated in backward. Buckets jump where streams drift by one bit, so then the
streams are kept on a grid, where they come back exactly.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from common import ALPHABET, Target, arguments, source_code, summary
from torch import Tensor, nn

import revhooks
from revhooks.nn import ReversibleSequential

LENGTH = 256


class Attention(nn.Module):
    """Causal attention of several heads: (B, T, C) to (B, T, C)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Every position attends to those before it and to itself."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class LSHAttention(nn.Module):
    """Causal attention within buckets of similar keys, in one round of hashing (section 2): (B, T, C) to (B, T, C)."""

    def __init__(self, width: int, heads: int, chunk: int = 32) -> None:
        super().__init__()
        self.heads = heads
        self.chunk = chunk
        self.norm = nn.LayerNorm(width)
        self.qk = nn.Linear(width, width, bias=False)  # queries are keys too
        self.v = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Sort positions by bucket, and attend from each chunk of them to itself and to the chunk before."""
        x = self.norm(x)
        qk, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.qk, self.v))  # (B, H, T, D)
        order = self._order(qk.detach())
        qk, v = (t.gather(2, order[..., None].expand_as(t)).unflatten(2, (-1, self.chunk)) for t in (qk, v))
        at = order.unflatten(2, (-1, self.chunk))  # positions (B, H, N, S), of N chunks
        keys, values, key_at = (torch.cat([t.roll(1, 2), t], 3) for t in (F.normalize(qk, dim=-1), v, at))
        past = at[..., None] - key_at[..., None, :]
        scores = qk @ keys.mT / math.sqrt(qk.shape[-1])
        scores = scores.masked_fill(past == 0, -1e5).masked_fill(past < 0, -torch.inf)  # itself, if there is nothing else
        y = (scores.softmax(-1) @ values).flatten(2, 3)
        y = y.gather(2, order.argsort(2)[..., None].expand_as(y))
        return self.out(y.transpose(1, 2).flatten(2))

    def _order(self, qk: Tensor) -> Tensor:
        """Positions by bucket, those of one bucket in their order: (B, H, T)."""
        length = qk.shape[2]
        rotation = torch.randn(self.heads, qk.shape[-1], length // self.chunk // 2, dtype=qk.dtype, device=qk.device)
        turned = qk @ rotation
        bucket = torch.cat([turned, -turned], -1).argmax(-1)
        return (bucket * length + torch.arange(length, device=qk.device)).argsort(-1)


class FeedForward(nn.Module):
    """A feed-forward layer, some positions at a time: (B, T, C) to (B, T, C).

    Each chunk is recomputed when backward comes to it, so that of the wide hidden layer one chunk exists at a time.
    """

    def __init__(self, width: int, chunks: int = 4) -> None:
        super().__init__()
        self.chunks = chunks
        self.net = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Positions do not see each other here."""
        return torch.cat([revhooks.checkpoint(self.net, chunk) for chunk in x.chunk(self.chunks, 1)], 1)


class Reformer(nn.Module):
    """Characters (B, T) to logits of the next ones (B, T, ALPHABET)."""

    def __init__(self, width: int = 128, layers: int = 6, heads: int = 4, *, lsh: bool = False) -> None:
        super().__init__()
        attention = LSHAttention if lsh else Attention
        self.embedding = nn.Embedding(len(ALPHABET), width)
        self.position = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        branches = [branch for _ in range(layers) for branch in (attention(width, heads), FeedForward(width))]
        self.layers = ReversibleSequential(*branches, dim=-1, grid_bits=14 if lsh else None)
        self.head = nn.Sequential(nn.LayerNorm(2 * width), nn.Linear(2 * width, len(ALPHABET)))

    def forward(self, text: Tensor) -> Tensor:
        """Both streams begin as the embedding."""
        x = self.embedding(text) + self.position[: text.shape[1]]
        return self.head(self.layers(torch.cat([x, x], -1)))


def next_character_loss(logits: Tensor, text: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten())


def excerpts(text: Tensor, size: int, order: torch.Generator) -> Tensor:
    """Random excerpts (size, LENGTH)."""
    return text[torch.randint(len(text) - LENGTH, (size, 1), generator=order) + torch.arange(LENGTH)]


def training_text() -> Tensor:
    return source_code("argparse", "ast", "calendar", "configparser", "difflib", "doctest", "inspect", "optparse", "pdb")


def target(*, lsh: bool = False) -> Target:
    """What `revhooks report` and `revhooks check` call."""
    torch.manual_seed(0)
    text = excerpts(training_text(), 8, torch.Generator().manual_seed(0))
    return Reformer(lsh=lsh), (text,), lambda logits: next_character_loss(logits, text)


def main() -> None:
    parser = arguments(__doc__, steps=150)
    parser.add_argument("--lsh", action="store_true", help="attend within random buckets")
    options = parser.parse_args()
    model, inputs, loss_of = target(lsh=options.lsh)
    text, unseen = training_text(), source_code("textwrap")
    order = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=options.steps + 1, pct_start=0.1)
    with revhooks.reversible() as run:
        for step in range(options.steps):
            batch = excerpts(text, 8, order)
            optimizer.zero_grad()
            loss = next_character_loss(model(batch), batch)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 20 == 0 or step == options.steps - 1:
                print(f"step {step}: {loss.item() / math.log(2):.2f} bits per character")

    model.eval()
    with torch.no_grad():
        unseen = unseen[: 32 * LENGTH].view(32, LENGTH)
        bits = next_character_loss(model(unseen), unseen).item() / math.log(2)
    summary(
        f"Reformer, {len(model.layers)} half-blocks, batch 8 x {LENGTH} characters" + (", LSH attention" if options.lsh else ""),
        run.stats,
        (model.train(), inputs, loss_of),
        bits_per_character_of_unseen_textwrap=f"{bits:.2f}",
    )


if __name__ == "__main__":
    main()
