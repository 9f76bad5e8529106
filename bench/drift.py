"""How far an inversion drifts: relative input error of random RevNets by gain and depth, with and without a grid.

    python bench/drift.py

Branch: LayerNorm-Linear-GELU-Linear whose output is scaled by the gain; width 64, batch 64. "Error" is the relative L2 error of
the reconstructed input after inverting the whole chain. Writes docs/drift.md and bench/results/drift.json.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from revhooks.nn import ReversibleSequential
from revhooks.runtime.policy.guard import relative_error

ROOT = Path(__file__).parent.parent
CASES = [(0.5, 32), (1.0, 32), (1.0, 96), (2.0, 96)]
WIDTH = 64


class Branch(nn.Module):
    """Computes in ``dtype`` whatever the stream's is."""

    def __init__(self, gain: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.gain, self.dtype = gain, dtype
        self.net.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.net(x.to(self.dtype))


COLUMNS = {
    "all float32": (torch.float32, torch.float32, None),
    "float32 stream, bfloat16 branches": (torch.float32, torch.bfloat16, None),
    "bfloat16 stream": (torch.bfloat16, torch.bfloat16, None),
    "grid_bits=12, float32 branches": (torch.float32, torch.float32, 12),
    "grid_bits=12, bfloat16 branches": (torch.float32, torch.bfloat16, 12),
}


def drift(gain: float, depth: int, stream: torch.dtype, branch: torch.dtype, bits: int | None) -> float:
    torch.manual_seed(0)
    chain = ReversibleSequential(*[Branch(gain, branch) for _ in range(2 * depth)], dim=-1, grid_bits=bits)
    x = torch.randn(64, 2 * WIDTH).to(stream)
    if bits is not None:
        x = (x * 2**bits).round() / 2**bits
    with torch.no_grad():
        return relative_error(chain.inverse(chain(x)).float(), x.float())


def main() -> None:
    rows = {f"gain {gain:g}, depth {depth}": [drift(gain, depth, *how) for how in COLUMNS.values()] for gain, depth in CASES}
    result = {"torch": torch.__version__, "columns": list(COLUMNS), "errors": rows}
    (ROOT / "bench" / "results" / "drift.json").write_text(json.dumps(result, indent=2) + "\n")
    lines = [
        "# Drift",
        "",
        "Relative error of the input that a random RevNet's inverse gives back (`python bench/drift.py`, torch "
        f"{torch.__version__}).",
        "On a grid sums are exact, so the error is 0 and gradients under `reversible()` are bitwise those of plain autograd.",
        "",
        "| | " + " | ".join(COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
        *(
            f"| {name} | " + " | ".join(f"{error:.0e}" if error else "**0**" for error in errors) + " |"
            for name, errors in rows.items()
        ),
        "",
    ]
    (ROOT / "docs" / "drift.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
