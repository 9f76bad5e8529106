"""CUDA graphs: while one is captured nothing may be read, neither a tensor's value nor a generator's place.

So what is there to learn is learned before, in steps that warm up; a step that is captured checks and tries nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["CAPTURED", "is_capturing"]

CAPTURED = "met first while a CUDA graph is captured, where no value can be looked at"
_KINDS = frozenset({"cuda"})
_asks: Callable[[], bool] = torch.cuda.is_current_stream_capturing


def is_capturing(device: torch.device) -> bool:
    """Whether what is done on a device now is recorded in a CUDA graph, and not run.

    Example:
        >>> is_capturing(torch.device("cpu"))
        False
    """
    return device.type in _KINDS and _asks()
