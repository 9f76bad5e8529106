"""Meters of a training step: accounted bytes, the process's resident set, the CUDA allocator, time.

Accounted bytes and measured peaks answer different questions and are never mixed: accounted bytes count the
unique storages that a step makes, exactly and repeatably; a measured peak is what the machine had to give.
"""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["AccountedMeter", "ResidentMeter", "alternate", "cuda_peak"]


class AccountedMeter(TorchDispatchMode):
    """Bytes of the storages made inside it, by unique storage: those alive now, and their peak.

    Storages that exist before, as parameters and their gradients from an earlier step, do not count.

    Attributes:
        live: bytes alive now.
        peak: the most that was alive at once.

    Example:
        >>> with AccountedMeter() as meter:
        ...     x = torch.ones(256) + 1
        ...     y = x.view(16, 16)
        >>> meter.live, meter.peak >= 1024
        (1024, True)
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an op and count what it made."""
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._see(leaf, made=False)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf, made=True)
        return result

    def _see(self, tensor: Tensor, *, made: bool) -> None:
        if tensor.layout is not torch.strided or tensor.is_nested:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        if not made:  # it was there before
            self._known[key] = weakref.ref(storage, self._forget(key))
            return
        life = self._begin(storage.nbytes(), key)

        def died(_: Any) -> None:
            del self._known[key]
            self._end(life)

        self._known[key] = weakref.ref(storage, died)

    def _begin(self, nbytes: int, key: int) -> Any:
        """A storage was made; what is returned stands for it."""
        self._change(nbytes)
        return nbytes

    def _end(self, life: Any) -> None:
        """It was freed."""
        self._change(-life)

    def _forget(self, key: int) -> Callable[[Any], None]:
        def forget(_: Any) -> None:
            self._known.pop(key, None)

        return forget

    def _change(self, nbytes: int) -> None:
        self.live += nbytes
        self.peak = max(self.peak, self.live)


class ResidentMeter:
    """Peak of the process's resident set over its state on entering, in bytes.

    Uses the kernel's own high-water mark where it can be reset (Linux), else the larger of both ends. For honest
    figures run it in a fresh process whose allocator returns memory at once.

    Attributes:
        peak: bytes over the state on entering; 0 before it was left.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._process = psutil.Process()

    def __enter__(self) -> ResidentMeter:
        """Reset the high-water mark."""
        gc.collect()
        self._before = self._process.memory_info().rss
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._exact = True
        except OSError:
            self._exact = False
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Read the high-water mark."""
        top = self._process.memory_info().rss
        if self._exact:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    top = int(line.split()[1]) * 1024
        self.peak = max(0, top - self._before)


def cuda_peak(step: Callable[[], object]) -> int:
    """Peak of the CUDA allocator over its state before the step, in bytes."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def alternate(
    steps: Sequence[Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 1,
    cuda: bool = False,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> list[list[int]]:
    """Time several steps by turns in one process, so that a drifting machine slows all of them alike.

    Args:
        steps: the contenders.
        rounds: how many times each is timed.
        warmup: rounds before that are not counted.
        cuda: wait for the device around each step.
        clock: gives the time in nanoseconds.

    Returns:
        For each contender its times in nanoseconds, round by round.
    """
    times: list[list[int]] = [[] for _ in steps]
    for round_ in range(-warmup, rounds):
        for taken, step in zip(times, steps, strict=True):
            if cuda:
                torch.cuda.synchronize()
            start = clock()
            step()
            if cuda:
                torch.cuda.synchronize()
            if round_ >= 0:
                taken.append(clock() - start)
    return times
