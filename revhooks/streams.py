"""Side streams: what was rebuilt on one stream may be asked for on another, for a node runs on the stream of its forward.

Between nodes that a gradient leads to the streams wait for each other; two that merely read the same tensor do not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["follow", "stream_of"]

_KINDS = frozenset({"cuda"})
_current: Callable[[int], Any] = getattr(torch._C, "_cuda_getCurrentStream", lambda _: None)


def stream_of(device: torch.device) -> Any:
    """What tells the current stream of a device from others; ``None`` where there are none.

    Example:
        >>> stream_of(torch.device("cpu")) is None
        True
    """
    return _current(device.index or 0) if device.type in _KINDS else None


def follow(tensor: Tensor, made_on: Any) -> None:
    """Let the current stream use a tensor that was made on a stream (`stream_of`), and its memory stay until then.

    A tensor of a device without streams, as an operation of a GPU saves its seed, waits for nothing.
    """
    current = stream_of(tensor.device)
    if current is not None and current != made_on:
        _join(tensor, made_on)


def _join(tensor: Tensor, made_on: tuple[int, int, int]) -> None:
    stream, index, kind = made_on
    current = torch.cuda.current_stream(tensor.device)
    current.wait_stream(torch.cuda.Stream(stream_id=stream, device_index=index, device_type=kind))
    tensor.record_stream(current)
