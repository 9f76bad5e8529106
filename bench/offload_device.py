"""A device that is only simulated: a compute stream, two copy engines and a host, each with its time; tensors are a CPU's.

Work is queued by the host and done in order, as on a GPU: a mark has the time at which its stream came to it, and the host may
ask whether that is over. What lies in the device's memory is counted by storages that are alive, in the order of the host, which
is that of the allocator. Bytes and bandwidth are a thousandth of a real device's (`SCALE`), times are real.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from revhooks.runtime.offload.movers import Copy, Mover

SCALE = 1000
QUEUE = 400  # layers that the host may be ahead: a thousand kernels or so
LATENCY = 5e-6  # seconds of a copy besides its bytes


class Mark:
    """An event that has the time at which its stream comes to it."""

    def __init__(self, device: Device, time: float) -> None:
        self.device = device
        self.time = time

    def query(self) -> bool:
        return self.time <= self.device.host

    def elapsed_time(self, end: Mark) -> float:
        return (end.time - self.time) * 1e3


class Device:
    """Streams and memory.

    Args:
        out: bytes a second to the host, scaled.
        back: bytes a second from it.
        launch: seconds that the host takes to launch a kernel or a copy.
    """

    def __init__(self, out: float, back: float, launch: float = 5e-6) -> None:
        self.rates = {"out": out, "back": back}
        self.launch = launch
        self.host = self.compute = 0.0
        self.free = {"out": 0.0, "back": 0.0}
        self.moved = 0
        self.peak = 0  # as the allocator sees it
        self.kept = 0  # the most between two kernels
        self._queue: deque[float] = deque(maxlen=QUEUE)
        self._live: list[tuple[StorageWeakRef, int]] = []

    def allocate(self, nbytes: int) -> Tensor:
        """A tensor in the device's memory."""
        return self.counted(torch.zeros(nbytes // 4))

    def counted(self, tensor: Tensor) -> Tensor:
        """A tensor that is in the device's memory from now on."""
        self._live.append((StorageWeakRef(tensor.untyped_storage()), tensor.nbytes))
        self.peak = max(self.peak, self._living())
        return tensor

    def _living(self) -> int:
        self._live = [entry for entry in self._live if not entry[0].expired()]
        return sum(size for _, size in self._live)

    def now(self) -> float:
        """When the compute stream is through with what is queued."""
        return max(self.compute, self.host)

    def work(self, seconds: float) -> None:
        """A kernel; so many may be queued, then the host has to wait."""
        self.kept = max(self.kept, self._living())
        self.host += self.launch
        if len(self._queue) == QUEUE:
            self.host = max(self.host, self._queue[0])
        self.compute = self.now() + seconds
        self._queue.append(self.compute)

    def copy(self, way: str, nbytes: int, after: float) -> tuple[Mark, Mark]:
        """A copy on an engine of its own, which begins not before a time."""
        self.host += self.launch
        begun = max(self.free[way], after, self.host)
        self.free[way] = begun + nbytes / self.rates[way] + LATENCY
        self.moved += nbytes if way == "out" else 0
        return Mark(self, begun), Mark(self, self.free[way])

    def wait_event(self, mark: Any) -> None:
        """The compute stream waits."""
        self.compute = max(self.now(), mark.time)

    def synchronize(self) -> float:
        """The host waits for everything; returns the time."""
        self.host = max(self.host, self.compute)
        return self.host


class Simulated(Mover):
    """Copies of a simulated device."""

    timed = True

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.sim = device

    def mark(self, device: torch.device) -> Mark:
        return Mark(self.sim, self.sim.now())

    def now(self) -> float:
        return self.sim.host

    def out(self, tensor: Tensor) -> Copy:
        begun, done = self.sim.copy("out", tensor.nbytes, self.sim.now())
        self.leaving(tensor.device).add(tensor, self.sim, done)
        return Copy(tensor.clone(), begun, done)

    def back(self, away: Copy, device: torch.device) -> Copy:
        tensor = self.sim.counted(away.tensor.clone())
        begun, done = self.sim.copy("back", tensor.nbytes, max(self.sim.now(), away.done.time))  # type: ignore[union-attr]
        return Copy(tensor, begun, done, lambda: self.sim.wait_event(done))


@dataclass(frozen=True)
class Layer:
    """What it saves, in bytes (scaled), and how long it takes."""

    nbytes: int
    forward: float
    backward: float


class _Work(torch.autograd.Function):
    """A layer whose only trace is a tensor that it saves; each has a value of its own, to tell it from others."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, device: Device, layer: Layer, value: float) -> Tensor:
        device.work(layer.forward)
        saved = device.allocate(layer.nbytes)
        torch.arange(value, value + saved.numel(), out=saved)  # no mask, that would be held as bits
        ctx.save_for_backward(saved)
        ctx.device, ctx.layer, ctx.value = device, layer, value
        return x + 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (saved,) = ctx.saved_tensors
        if saved[0] != ctx.value or saved[-1] != ctx.value + saved.numel() - 1:
            raise AssertionError("another tensor came back")
        ctx.device.work(ctx.layer.backward)
        return grad, None, None, None


def forward(device: Device, layers: Sequence[Layer]) -> Tensor:
    """The layers, one after another."""
    x = torch.zeros((), requires_grad=True)
    for i, layer in enumerate(layers):
        x = _Work.apply(x, device, layer, float(i + 1))
    return x
