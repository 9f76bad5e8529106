"""Offload: what must be kept waits in host memory (``reversible(offload=True)``).

Copies run on a stream of their own. A tensor on its way out is held until the stream that made it has waited for its copy, which
it does when too many bytes are on their way: so copies lag behind by so many and no more, however far the host runs ahead, and
the host waits for nothing. On its way back a tensor is started while those after it in the graph are used. A host copy is freed
when its handle dies, whether it was ever unpacked or not. On a device without a mover, as the CPU, nothing is moved.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from ..capture import is_capturing
from ..storage import Geometry, Held, Ledger, version_probe

__all__ = ["HeldAway", "Leaving", "Offload", "Parked"]

LEAST = 1 << 18  # bytes; below, a transfer takes longer than it is worth
LAG = 1 << 27  # bytes that may be on their way out
AHEAD = 2  # how many are fetched before they are asked for


class Mover(Protocol):
    """Copies tensors of one kind of device."""

    def out(self, tensor: Tensor) -> Tensor:
        """Start to copy a dense tensor to host memory."""
        ...

    def back(self, host: Tensor, device: torch.device) -> tuple[Tensor, Callable[[], None]]:
        """Start to copy it back; the function lets what follows wait for it, and is called before the tensor goes."""
        ...


class Leaving:
    """Tensors on their way out, the oldest first: each is held until its stream has waited for its copy.

    The allocator gives the memory of a tensor that was used on another stream (`Tensor.record_stream`) to somebody else when the
    host sees that the use is over: a host that runs ahead never does. In the order of its own stream it may go at once.
    """

    def __init__(self) -> None:
        self._queue: deque[tuple[Tensor, Any, Any]] = deque()
        self.nbytes = 0

    def add(self, tensor: Tensor, home: Any, done: Any) -> None:
        """Hold a tensor of the stream ``home`` until its copy is ``done``, which is an event; let go of older ones."""
        self._queue.append((tensor, home, done))
        self.nbytes += tensor.nbytes
        while self._queue and (self._queue[0][2].query() or (self.nbytes > LAG and len(self._queue) > 1)):
            self._let_go()

    def clear(self) -> None:
        """What follows comes after all copies."""
        while self._queue:
            self._let_go()

    def _let_go(self) -> None:
        tensor, home, done = self._queue.popleft()
        home.wait_event(done)
        self.nbytes -= tensor.nbytes


class CudaMover:
    """Pinned host memory, and one stream for each device: a copy back comes after the copy out that it needs."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._leaving: dict[torch.device, Leaving] = {}

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def out(self, tensor: Tensor) -> Tensor:
        """Start to copy a dense tensor to host memory."""
        stream, home = self._stream(tensor.device), torch.cuda.current_stream(tensor.device)
        stream.wait_stream(home)
        host = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu", pin_memory=True)
        with torch.cuda.stream(stream):
            host.copy_(tensor, non_blocking=True)
            done = stream.record_event()
        tensor.record_stream(home)  # if it is another one's
        self._leaving.setdefault(tensor.device, Leaving()).add(tensor, home, done)
        return host

    def back(self, host: Tensor, device: torch.device) -> tuple[Tensor, Callable[[], None]]:
        """Start to copy it back; the function lets what follows wait for it."""
        stream = self._stream(device)
        self._leaving.setdefault(device, Leaving()).clear()
        # memory of the stream that will use it, so that it goes again in the order of that one
        tensor = torch.empty_strided(host.size(), host.stride(), dtype=host.dtype, device=device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
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
            and not is_capturing(tensor.device)
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
        self._coming: tuple[Held, Callable[[], None]] | None = None
        self._host: Any = None  # nothing is counted yet
        self._host = mover.out(tensor)
        offload.ledger.move_out(self._host.nbytes)

    def __del__(self) -> None:
        if self._coming is not None:  # nobody has asked for it
            self._coming[1]()
        if self._host is not None:
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
