"""A coupling as invtorch wants it: a module of its own with ``function`` and ``inverse``."""

from __future__ import annotations

from typing import Any

import invtorch.nn
import torch
from semantics_contenders import halves
from torch import Tensor, nn


class InvertibleCoupling(invtorch.nn.Module):
    num_outputs = num_inputs = 1  # of what function and inverse return; the rest are arguments, passed on

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        self.f, self.g = f, g
        self.seed = True

    def function(self, x: Tensor, *args: Any) -> Any:
        x1, x2 = halves(x)
        y1 = x1 + self.f(x2, *args)
        return torch.cat([y1, x2 + self.g(y1, *args)], 1), *args

    def inverse(self, y: Tensor, *args: Any) -> Any:
        y1, y2 = halves(y)
        x2 = y2 - self.g(y1, *args)
        return torch.cat([y1 - self.f(x2, *args), x2], 1), *args
