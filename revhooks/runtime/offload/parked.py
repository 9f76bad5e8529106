"""Offload: what must be kept waits in host memory (``reversible(offload=True)``).

Copies run on streams of their own, beside the computation, and the host waits for nothing. What moves is what the bus carries
while the device computes (`schedule`), learned from the steps before (`learning`); in a step that is not known, what finds the
bus free. Under a budget what is over it moves, after all that can be recomputed has been let go of. A tensor on its way back is
started while those after it in the graph are used. A host copy is freed when its handle dies, whether it was ever unpacked or
not. On a device without a mover, as the CPU, nothing is moved.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from ...capture import is_capturing
from ...errors import ModifiedError, explain
from ...storage import Geometry, Held, Ledger, version_probe
from .lane import KEEP, MARK, MOVE, WAIT, Lane, Ticket
from .movers import MOVERS, Copy

__all__ = ["HeldAway", "Offload", "Parked"]

LEAST = 1 << 18  # bytes; below, a transfer takes longer than it is worth
AHEAD = 2  # how many are fetched before they are asked for in a step that is not known


class _Movable(Protocol):
    """Something that can let go of memory."""

    def release(self) -> None:
        """Let go of it."""
        ...


class Room(Protocol):
    """A `Budget`."""

    limit: float

    def add_move(self, movable: _Movable) -> None:
        """What to move when there is need of room, after what can be recomputed."""
        ...


class Offload:
    """The tensors of a run that are in host memory, in the order in which they went.

    Args:
        ledger: counts what is held.
        room: a budget; without one, or with one of 0, what moves is what costs no time.
    """

    def __init__(self, ledger: Ledger, room: Room | None = None) -> None:
        self.ledger = ledger
        self.room = room
        self.limit = math.inf if room is None or not room.limit else room.limit
        self.limited = room is not None and room.limit > 0
        self._lanes: dict[torch.device, Lane] = {}
        self._gone: list[weakref.ref[_Away]] = []
        self._asked: tuple[Lane, int]

    def takes(self, tensor: Tensor) -> bool:
        """Whether a tensor is one to move, or to watch: a large one, and all that lies in its memory.

        What is decided of it is for the `Parked` or `HeldAway` that is made next.
        """
        nbytes, device = tensor.nbytes, tensor.device
        if (
            nbytes < LEAST
            or device.type not in MOVERS
            or (self.limited and self.limit == math.inf)
            or nbytes != tensor.untyped_storage().nbytes()
            or is_capturing(device)
            or not (tensor.is_contiguous() or Geometry.of(tensor).dense)
        ):
            return False
        lane = self._lane(device)
        what = lane.arrive(nbytes)
        self._asked = lane, what
        return what != KEEP

    def ticket(self) -> Ticket:
        """What was decided of the tensor that was asked about last."""
        lane, what = self._asked
        return lane.ticket(what)

    def away(self, tensor: Tensor, ticket: Ticket) -> _Away:
        """Start to copy a tensor to host memory; its own memory may go at once."""
        self.forget()
        away = _Away(self, tensor, ticket, len(self._gone))
        reference = weakref.ref(away)
        self._gone.append(reference)
        if ticket.step is not None:
            ticket.step.gone[ticket.place] = reference
        return away

    @property
    def count(self) -> int:
        """How many have gone, but for those at the end that are back."""
        self.forget()
        return len(self._gone)

    def prefetch(self, place: int) -> None:
        """Start to fetch those that went before the one at ``place``: backward asks for the latest first."""
        started = 0
        while place > 0 and started < AHEAD:
            place -= 1
            away = self._gone[place]() if place < len(self._gone) else None
            if away is not None and self.has_room(away):
                away.start()
                started += 1

    def fetch_ahead(self, ticket: Ticket, place: int) -> None:
        """Start to fetch what is needed next, when one is used before which so many had gone."""
        step = ticket.step
        if step is None or step.plan is None:
            self.prefetch(place)
            return
        step.due.extend(step.plan.starts.get(ticket.place, ()))
        while step.due:
            reference = step.gone.get(step.due[0])
            away = reference() if reference is not None else None
            if away is not None and not away.asked:
                if not self.has_room(away):
                    return
                away.start()
            step.due.popleft()

    def has_room(self, away: _Away) -> bool:
        """Whether a tensor may come back before it is asked for."""
        return self.ledger.held + away.lane.leaving.nbytes + away.nbytes <= self.limit

    def _lane(self, device: torch.device) -> Lane:
        lane = self._lanes.get(device)
        if lane is None:
            lane = self._lanes[device] = Lane(MOVERS[device.type](), device, self.ledger, self.limit if self.limited else None)
        return lane

    def forget(self) -> None:
        """Those at the end that are back."""
        while self._gone and self._gone[-1]() is None:
            self._gone.pop()


class _Away:
    """A tensor in host memory."""

    __slots__ = ("__weakref__", "_coming", "_host", "_offload", "_place", "asked", "device", "lane", "nbytes", "ticket")

    def __init__(self, offload: Offload, tensor: Tensor, ticket: Ticket, place: int) -> None:
        self._offload = offload
        self._place = place
        self._coming: tuple[Held, Copy] | None = None
        self._host: Copy | None = None  # nothing is counted yet
        self.asked = False
        self.device = tensor.device
        self.lane = ticket.lane
        self.nbytes = tensor.nbytes
        self.ticket = ticket
        self._host = self.lane.out(tensor, ticket)
        offload.ledger.move_out(self.nbytes)

    def __del__(self) -> None:
        if self._coming is not None:  # nobody has asked for it
            self._coming[1].wait()
        if self._host is not None:
            self._offload.ledger.offloaded -= self.nbytes

    def start(self) -> tuple[Held, Copy]:
        """Start to fetch it."""
        if self._coming is None:
            copy = self.lane.back(self._host, self.ticket)  # type: ignore[arg-type] # it has left
            self._coming = Held(self._offload.ledger, copy.tensor), copy
        return self._coming

    def fetch(self) -> Tensor:
        """The tensor on its device; it can be asked for again."""
        late = self._coming is None
        held, copy = self.start()
        self._coming, self.asked = None, True
        self.lane.use(self.ticket, copy)
        copy.wait()
        self._offload.fetch_ahead(self.ticket, self._place)
        if late and self.ticket.step is not None and self.ticket.step.plan is not None:
            self._offload.prefetch(self._place)  # it is another order than was planned
        return held.tensor


class Parked:
    """Stands where a recipe stands: brings a Value back from host memory.

    Attributes:
        now: whether the Value is to let go of its tensor at once, whatever room there is.
    """

    __slots__ = ("_away", "_held", "_offload", "_place", "_ticket", "_version", "_written", "depth", "now")

    def __init__(self, offload: Offload) -> None:
        self._offload = offload
        self._ticket = offload.ticket()
        self._away: _Away | None = None
        self._held: Held | None = None
        self._version = 0
        self._place = 0
        self._written = False
        self.depth = 0
        self.now = self._ticket.what != WAIT

    def __del__(self) -> None:
        if self._away is None:
            self._ticket.lane.use(self._ticket)

    def leave(self, tensor: Tensor) -> None:
        """The Value lets go of its tensor; one that is only watched stays here."""
        if self._held is not None:
            self._written = self._written or tensor._version != self._version
        elif self._away is None and self._ticket.what == MARK:
            self._held, self._version, self._place = Held(self._offload.ledger, tensor), tensor._version, self._offload.count
        elif self._away is None:
            self._away = self._offload.away(tensor, self._ticket)

    def tensor(self, like: Any) -> Tensor:
        """The tensor, in its own strides.

        Raises:
            ModifiedError: a backward has written to it.
        """
        if self._held is None:
            return self._away.fetch()  # type: ignore[union-attr] # it has left before it is asked for
        if self._written:
            raise ModifiedError(
                explain(
                    "a saved tensor that is asked for again",
                    expected=f"a tensor of shape {tuple(like.size)} as it was saved",
                    got="one that an earlier backward has written to",
                    remedy="do not write to saved tensors in a backward whose graph is retained",
                )
            )
        self._ticket.lane.use(self._ticket)
        self._offload.fetch_ahead(self._ticket, self._place)
        return self._held.tensor

    def holds(self) -> Iterator[Tensor]:
        """What stays on its device."""
        return iter(() if self._held is None else (self._held.tensor,))


class HeldAway:
    """A `Held` whose tensor is in host memory, or goes there when there is need of room."""

    __slots__ = ("__weakref__", "_away", "_held", "_offload", "_place", "_probe", "_ticket", "_version")

    def __init__(self, offload: Offload, tensor: Tensor) -> None:
        self._held: Held | None = None
        self._away: _Away | None = None
        self._ticket = offload.ticket()
        self._probe = version_probe(tensor)
        self._version = tensor._version
        self._offload = offload
        self._place = 0
        if self._ticket.what == MOVE:
            self._away = offload.away(tensor, self._ticket)
            return
        self._held, self._place = Held(offload.ledger, tensor), offload.count
        if self._ticket.what == WAIT and offload.room is not None:
            offload.room.add_move(self)

    def __del__(self) -> None:
        if self._held is not None:
            self._ticket.lane.use(self._ticket)

    def release(self) -> None:
        """Move it now."""
        if self._held is not None and self._ticket.what == WAIT:
            self._away, self._held = self._offload.away(self._held.tensor, self._ticket), None

    @property
    def tensor(self) -> Tensor:
        """A copy on its device, or itself."""
        if self._held is None:
            return self._away.fetch()  # type: ignore[union-attr] # it is held or away
        self._ticket.lane.use(self._ticket)
        if self._ticket.what == MARK:
            self._offload.fetch_ahead(self._ticket, self._place)
        return self._held.tensor

    @property
    def version(self) -> int:
        """The version that its memory has now."""
        return self._probe._version

    @property
    def intact(self) -> bool:
        """Whether the tensor was not modified in place since it is held."""
        return self.version == self._version
