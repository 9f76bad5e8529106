"""Fixed cost on tiny tensors: what a block and a saved tensor cost beyond their arithmetic.

    python bench/fixed_cost.py

A chain of couplings whose branches are Linear-ReLU-Linear of width 4: arithmetic is nothing, so what is left is the
bookkeeping. A block's cost is the reversible step less the plain step and less one more evaluation of its branches; it is
shown beside what `torch.utils.checkpoint` costs a region, and what bare saved-tensor hooks cost, in the same run.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import revhooks
from revhooks.nn import AdditiveCoupling
from revhooks.profiler.meters import alternate

BLOCKS, ROUNDS = 100, 25
SAVED_A_BLOCK = 10


def branch() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    blocks = [AdditiveCoupling(branch(), branch()) for _ in range(BLOCKS)]
    model, fns = nn.Sequential(*blocks), [fn for block in blocks for fn in (block.f, block.g)]
    layers = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3 * BLOCKS)])
    x = torch.randn(4, 8)

    def plain() -> None:
        model(x).sum().backward()

    def rev() -> None:
        with revhooks.reversible():
            model(x).sum().backward()

    def regions() -> None:
        h = x
        for block in blocks:
            h = checkpoint(block, h, use_reentrant=False)
        h.sum().backward()

    def hooks() -> None:
        with torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda tensor: tensor):
            model(x).sum().backward()

    def evaluations() -> None:
        for fn in fns:
            fn(x[:, :4])

    def ordinary() -> None:
        layers(x[:, :4]).sum().backward()

    def ordinary_rev() -> None:
        with revhooks.reversible():
            layers(x[:, :4]).sum().backward()

    names = ("plain", "rev", "regions", "hooks", "evaluations", "ordinary", "ordinary_rev")
    steps = (plain, rev, regions, hooks, evaluations, ordinary, ordinary_rev)
    times = dict(zip(names, alternate(steps, rounds=ROUNDS, warmup=3), strict=True))

    def excess(a: str, *less: str) -> float:
        rounds = zip(*(times[name] for name in (a, *less)), strict=True)
        return statistics.median(first - sum(rest) for first, *rest in rounds) / 1000

    result = {
        "torch": torch.__version__,
        "blocks": BLOCKS,
        "saved_tensors_a_block": SAVED_A_BLOCK,
        "us_a_block": round(excess("rev", "plain", "evaluations") / BLOCKS, 1),
        "us_a_checkpoint_region": round(excess("regions", "plain", "evaluations") / BLOCKS, 1),
        "us_a_block_bare_hooks": round(excess("hooks", "plain") / BLOCKS, 1),
        "us_a_saved_tensor_outside_blocks": round(excess("ordinary_rev", "ordinary") / (6 * BLOCKS), 2),
        "us_plain_a_block": round(excess("plain") / BLOCKS, 1),
    }
    print(json.dumps(result, indent=2))
    path = Path(__file__).parent / "results" / "fixed_cost.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
