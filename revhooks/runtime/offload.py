"""Offload: what must be kept waits in host memory (``reversible(offload=True)``).

Copies run on a stream of their own. A tensor on its way out is freed by the allocator when its copy is done, without anyone
waiting; on its way back it is started while those after it in the graph are used. A host copy is freed when its handle dies,
whether it was ever unpacked or not. On a device without a mover, as the CPU, nothing is moved.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from ..storage import Geometry, Held, Ledger, version_probe

__all__ = ["HeldAway", "Offload", "Parked"]

LEAST = 1 << 18  # bytes; below, a transfer takes longer than it is worth
AHEAD = 2  # how many are fetched before they are asked for


class Mover(Protocol):
    """Copies tensors of one kind of device."""

    def out(self, tensor: Tensor) -> Tensor:
        """Start to copy a dense tensor to host memory."""
        ...

    def back(self, host: Tensor, device: torch.device) -> tuple[Tensor, Callable[[], None]]:
        """Start to copy it back; the function lets what follows wait for it."""
        ...


class CudaMover:
    """Pinned host memory, and one stream for each device: a copy back comes after the copy out that it needs."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def out(self, tensor: Tensor) -> Tensor:
        """Start to copy a dense tensor to host memory."""
        stream = self._stream(tensor.device)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        host = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu", pin_memory=True)
        with torch.cuda.stream(stream):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)
        return host

    def back(self, host: Tensor, device: torch.device) -> tuple[Tensor, Callable[[], None]]:
        """Start to copy it back; the function lets what follows wait for it."""
        stream = self._stream(device)
        with torch.cuda.stream(stream):
            tensor = torch.empty_strided(host.size(), host.stride(), dtype=host.dtype, device=device)
            tensor.copy_(host, non_blocking=True)
            done = stream.record_event()

        def wait() -> None:
            current = torch.cuda.current_stream(device)
            current.wait_event(done)
            tensor.record_stream(current)

        return tensor, wait


MOVERS: dict[str, Callable[[], Mover]] = {"cuda": CudaMover}


class Offload:
    """The tensors of a run that are in host memory, in the order in which they went."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._movers: dict[str, Mover] = {}
        self._gone: list[weakref.ref[_Away]] = []

    def takes(self, tensor: Tensor) -> bool:
        """Whether a tensor is worth moving: a large one, and all that lies in its memory."""
        return (
            tensor.device.type in MOVERS
            and LEAST <= tensor.nbytes == tensor.untyped_storage().nbytes()
            and (tensor.is_contiguous() or Geometry.of(tensor).dense)
        )

    def away(self, tensor: Tensor) -> _Away:
        """Start to copy a tensor to host memory; its own memory may go at once."""
        self._forget()
        kind = tensor.device.type
        if kind not in self._movers:
            self._movers[kind] = MOVERS[kind]()
        away = _Away(self, self._movers[kind], tensor, len(self._gone))
        self._gone.append(weakref.ref(away))
        return away

    def prefetch(self, place: int) -> None:
        """Start to fetch those that went before the one at ``place``: backward asks for the latest first."""
        started = 0
        while place > 0 and started < AHEAD:
            place -= 1
            away = self._gone[place]()
            if away is not None:
                away.start()
                started += 1

    def _forget(self) -> None:
        while self._gone and self._gone[-1]() is None:
            self._gone.pop()


class _Away:
    """A tensor in host memory."""

    __slots__ = ("__weakref__", "_coming", "_device", "_host", "_mover", "_offload", "_place")

    def __init__(self, offload: Offload, mover: Mover, tensor: Tensor, place: int) -> None:
        self._offload = offload
        self._mover = mover
        self._place = place
        self._device = tensor.device
        self._host = mover.out(tensor)
        self._coming: tuple[Held, Callable[[], None]] | None = None
        offload.ledger.move_out(self._host.nbytes)

    def __del__(self) -> None:
        self._offload.ledger.offloaded -= self._host.nbytes

    def start(self) -> tuple[Held, Callable[[], None]]:
        """Start to fetch it."""
        if self._coming is None:
            tensor, wait = self._mover.back(self._host, self._device)
            self._coming = Held(self._offload.ledger, tensor), wait
        return self._coming

    def fetch(self) -> Tensor:
        """The tensor on its device; it can be asked for again."""
        held, wait = self.start()
        self._coming = None
        wait()
        self._offload.prefetch(self._place)
        return held.tensor


class Parked:
    """Stands where a recipe stands: brings a Value back from host memory."""

    __slots__ = ("_away", "_offload", "depth")

    def __init__(self, offload: Offload) -> None:
        self._offload = offload
        self._away: _Away | None = None
        self.depth = 0

    def leave(self, tensor: Tensor) -> None:
        """The Value lets go of its tensor."""
        if self._away is None:
            self._away = self._offload.away(tensor)

    def tensor(self, _: Geometry) -> Tensor:
        """The tensor, in its own strides."""
        return self._away.fetch()  # type: ignore[union-attr] # it has left before it is asked for

    def holds(self) -> Iterator[Tensor]:
        """Nothing on its device."""
        return iter(())


class HeldAway:
    """A `Held` whose tensor is in host memory."""

    __slots__ = ("_away", "_probe", "_version")

    def __init__(self, offload: Offload, tensor: Tensor) -> None:
        self._probe = version_probe(tensor)
        self._version = tensor._version
        self._away = offload.away(tensor)

    @property
    def tensor(self) -> Tensor:
        """A copy on its device."""
        return self._away.fetch()

    @property
    def version(self) -> int:
        """The version that its memory has now."""
        return self._probe._version

    @property
    def intact(self) -> bool:
        """Whether the tensor was not modified in place since it is held."""
        return self.version == self._version
