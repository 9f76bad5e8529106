"""Movers: copies to host memory and back, beside the computation; what is on its way out; marks in a device's time.

The host waits for nothing (Rule 16): a mark says when the device came to it, to whoever asks later.
"""

from __future__ import annotations

import functools
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["MOVERS", "Copy", "CudaMover", "Leaving", "Mark", "Mover", "seconds"]


class Mark(Protocol):
    """A place in a device's time, as `torch.cuda.Event` is one."""

    def query(self) -> bool:
        """Whether the device has come to it."""
        ...

    def elapsed_time(self, end_event: Any, /) -> float:
        """Milliseconds from it to a later one."""
        ...


def seconds(start: Mark, end: Mark) -> float:
    """From one mark to another; both have passed."""
    return start.elapsed_time(end) / 1e3


def _nothing() -> None:
    pass


@dataclass(slots=True)
class Copy:
    """A copy on its way.

    Attributes:
        tensor: what is written.
        begun: where the copy begins, if the mover knows the time.
        done: where it is over.
        wait: lets what follows on the current stream wait for it; called before the tensor is used, or goes.
    """

    tensor: Tensor
    begun: Mark | None = None
    done: Mark | None = None
    wait: Callable[[], None] = _nothing


class Leaving:
    """Tensors on their way out, the oldest first: each is held until its stream has waited for its copy.

    The allocator gives the memory of a tensor that was used on another stream (`Tensor.record_stream`) to somebody else when the
    host sees that the use is over: a host that runs ahead never does. In the order of its own stream it may go at once.
    """

    def __init__(self) -> None:
        self._queue: deque[tuple[Tensor, Any, Any]] = deque()
        self._lock = threading.RLock()  # backward runs in another thread
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, tensor: Tensor, home: Any, done: Any) -> None:
        """Hold a tensor of the stream ``home`` until its copy is ``done``, which is an event."""
        with self._lock:
            self._queue.append((tensor, home, done))
            self.nbytes += tensor.nbytes

    def poll(self) -> None:
        """Let go of those whose copies are over."""
        while self._queue and self._let_go(if_over=True):
            pass

    def keep(self, *, nbytes: float = float("inf"), count: float = float("inf")) -> Any:
        """Let the stream wait until no more is on its way; returns the last event that it waits for, or ``None``."""
        last = None
        while self._queue and (self.nbytes > nbytes or len(self._queue) > count):
            last = self._let_go()
        return last

    def _let_go(self, *, if_over: bool = False) -> Any:
        with self._lock:
            if not self._queue or (if_over and not self._queue[0][2].query()):
                return None
            tensor, home, done = self._queue.popleft()
            home.wait_event(done)
            self.nbytes -= tensor.nbytes
            return done


class Mover(ABC):
    """Copies tensors of one kind of device."""

    timed = False  # whether it has marks

    def __init__(self) -> None:
        self._leaving: dict[torch.device, Leaving] = {}

    @abstractmethod
    def out(self, tensor: Tensor) -> Copy:
        """Start to copy a dense tensor to host memory."""

    @abstractmethod
    def back(self, away: Copy, device: torch.device) -> Copy:
        """Start to copy back what was copied out."""

    def mark(self, device: torch.device) -> Mark | None:
        """A mark on the current stream; ``None`` where it has none."""
        return None

    def now(self) -> float:
        """The host's time, in seconds."""
        return time.perf_counter()

    def leaving(self, device: torch.device) -> Leaving:
        """What is on its way out of a device."""
        found = self._leaving.get(device)
        if found is None:
            found = self._leaving[device] = Leaving()
        return found


class CudaMover(Mover):
    """Pinned host memory, and two streams for each device: a GPU copies both ways at once."""

    timed = True

    def __init__(self) -> None:
        super().__init__()
        self._streams: dict[tuple[torch.device, bool], torch.cuda.Stream] = {}

    def _stream(self, device: torch.device, *, out: bool) -> torch.cuda.Stream:
        if (device, out) not in self._streams:
            self._streams[device, out] = torch.cuda.Stream(device)
        return self._streams[device, out]

    def mark(self, device: torch.device) -> Mark:
        """A mark on the current stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    def out(self, tensor: Tensor) -> Copy:
        """Start to copy a dense tensor to host memory."""
        stream, home = self._stream(tensor.device, out=True), torch.cuda.current_stream(tensor.device)
        stream.wait_stream(home)
        host = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu", pin_memory=True)
        begun, done = _copy(stream, host, tensor)
        tensor.record_stream(home)  # if it is another one's
        self.leaving(tensor.device).add(tensor, home, done)
        return Copy(host, begun, done)

    def back(self, away: Copy, device: torch.device) -> Copy:
        """Start to copy it back."""
        stream, host = self._stream(device, out=False), away.tensor
        # memory of the stream that will use it, so that it goes again in the order of that one
        tensor = torch.empty_strided(host.size(), host.stride(), dtype=host.dtype, device=device)
        stream.wait_stream(torch.cuda.current_stream(device))
        stream.wait_event(away.done)  # type: ignore[arg-type]
        begun, done = _copy(stream, tensor, host)

        def wait() -> None:
            current = torch.cuda.current_stream(device)
            current.wait_event(done)
            tensor.record_stream(current)

        return Copy(tensor, begun, done, wait)


def _copy(stream: torch.cuda.Stream, to: Tensor, tensor: Tensor) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    begun, done = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        begun.record(stream)
        to.copy_(tensor, non_blocking=True)
        done.record(stream)
    return begun, done


MOVERS: dict[str, Callable[[], Mover]] = {"cuda": functools.cache(CudaMover)}  # its streams serve all runs
