"""The picture of the README, docs/step.svg: a training step of RevNet-110, plain and under `reversible()`.

    python bench/picture.py     # takes the steps, and writes the picture again

It is `revhooks report bench/picture.py:target --quick --svg docs/step.svg`: the network of the MemCNN paper for CIFAR images, as
in bench/cifar_table.py, with a batch of 100. Bytes are accounted, and the same on every machine; the width of a step is its time
on the one that drew it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HERE = Path(__file__).resolve()
PICTURE = HERE.parents[1] / "docs" / "step.svg"


def target(batch: int = 100) -> tuple[nn.Module, tuple[Tensor], Any]:
    """RevNet-110, images of CIFAR's shape, and its loss."""
    sys.path.insert(0, str(HERE.parent))
    from cifar_networks import CLASSES, network

    torch.manual_seed(0)
    images, labels = torch.randn(batch, 3, 32, 32), torch.randint(CLASSES, (batch,))
    return network("revnet110"), (images,), lambda out: F.cross_entropy(out, labels)


def main() -> int:
    from revhooks.cli import main as revhooks

    PICTURE.parent.mkdir(exist_ok=True)
    return revhooks(["report", f"{HERE}:target", "--quick", "--no-fresh", "--rounds", "3", "--svg", str(PICTURE), "--force"])


if __name__ == "__main__":
    sys.exit(main())
