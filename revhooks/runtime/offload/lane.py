"""The way between a device and the host: what is decided of each tensor that is saved, and what is noted of its step.

Where a step has no plan yet, what finds the bus free moves, so that it costs little whatever the bus. Under a budget only what is
in its way moves; it goes as soon as it is saved in the steps that follow, so that it is out in time.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...capture import is_capturing
from ...storage import Ledger
from ..passes import NO_PASS, current_pass
from .learning import LONGEST, Step, facts_of
from .movers import Copy, Mover
from .schedule import Plan

__all__ = ["KEEP", "LAG", "MARK", "MOVE", "WAIT", "Lane", "Ticket"]

LAG = 1 << 27  # bytes that may be on their way out in a step that is not known
LAG_SECONDS = 2e-3  # and how long they may be, where the bandwidth is known

KEEP, MARK, WAIT, MOVE = range(4)  # not ours; ours, stays; stays until there is need of room; goes now


class Ticket(NamedTuple):
    """What was decided of a tensor: the step that it belongs to, if one is noted, its place there, and what to do."""

    lane: Lane
    step: Step | None
    place: int
    what: int


class Lane:
    """The way between one device and the host, and the step that goes on there."""

    def __init__(self, mover: Mover, device: torch.device, ledger: Ledger, limit: float | None) -> None:
        self.mover = mover
        self.device = device
        self._ledger = ledger
        self._limited = limit is not None
        self._limit = math.inf if limit is None else limit
        self.leaving = mover.leaving(device)
        self._facts = facts_of(device)
        self._step: Step | None = None
        self._place = -1

    # -- forward

    def arrive(self, nbytes: int) -> int:
        """Decide of a tensor that is saved."""
        if self.leaving.nbytes:
            self.leaving.poll()
        if not self.mover.timed or current_pass() != NO_PASS:  # what backward saves is no part of a step
            self._place = -1
            return WAIT if self._limited else KEEP if self.mover.timed else self._as_bus_allows(nbytes, KEEP)
        step = self._step
        if step is None or step.over or self._place >= LONGEST:
            step = self._step = self._facts.begin(self._limit)
        self._place = place = self._facts.arrive(step, nbytes)
        plan = step.plan
        if plan is not None:
            self._settle(step, plan, place, nbytes)
            return MOVE if place in plan.moves else MARK if place in plan.marks else WAIT if self._limited else KEEP
        if step.measured:
            self._measure(step)
        return self._decide(step, place, nbytes)

    def ticket(self, what: int) -> Ticket:
        """For the tensor of which it was decided last."""
        return Ticket(self, self._step if self._place >= 0 else None, self._place, what)

    def _measure(self, step: Step) -> None:
        mark = self.mover.mark(self.device)
        step.latest = self.mover.now()
        if not step.packed:
            step.began = step.latest
        if mark is not None:
            step.packed.append(mark)

    def _decide(self, step: Step, place: int, nbytes: int) -> int:
        """Without a plan."""
        if self._limited:
            self._wait(step, nbytes=self._room(-nbytes))
            return WAIT
        if step.idle:
            return MARK if not place else KEEP  # it says when backward has begun
        return self._as_bus_allows(nbytes, MARK if step.full else KEEP, again=step.known is not None)

    def _as_bus_allows(self, nbytes: int, otherwise: int, *, again: bool = False) -> int:
        """Without knowing anything: move what finds the bus free, and never wait; one that is large only to learn from it."""
        leaving, rate = self.leaving, self._facts.rate(out=True)
        fits = leaving.nbytes + nbytes <= (min(LAG, LAG_SECONDS * rate) if rate else LAG)
        return MOVE if fits or (again and not rate and not leaving) else otherwise

    def _settle(self, step: Step, plan: Plan, place: int, nbytes: int) -> None:
        """Let go of those that should be out by now."""
        if self._limited:
            self._wait(step, nbytes=self._room(-nbytes))
        elif step.moved:
            self._wait(step, count=step.moved - plan.settled[place])

    def _room(self, freed: int = 0) -> float:
        """How many bytes may be on their way out, when so many more will be free."""
        return max(self._limit - self._ledger.held + freed, 0)

    def _wait(self, step: Step | None, *, nbytes: float = math.inf, count: float = math.inf) -> None:
        leaving = self.leaving
        if leaving.nbytes > nbytes or len(leaving) > count:
            need = self.mover.mark(self.device)
            last = leaving.keep(nbytes=nbytes, count=count)
            if step is not None and need is not None and last is not None:
                step.waits.append((need, last))

    def out(self, tensor: Tensor, ticket: Ticket) -> Copy:
        """Start to copy a tensor out."""
        start = self.mover.now()
        copy = self.mover.out(tensor)
        step = ticket.step
        if step is not None:
            step.moved += 1
            if ticket.what == WAIT:
                step.forced.add(ticket.place)
            self._note(step, copy, start, out=True)
        if self._limited:
            self._wait(step, nbytes=self._room(tensor.nbytes))  # it is still counted
        return copy

    # -- backward

    def back(self, away: Copy, ticket: Ticket) -> Copy:
        """Start to copy it back."""
        self._wait(ticket.step, count=0)
        start = self.mover.now()
        copy = self.mover.back(away, self.device)
        if ticket.step is not None:
            self._note(ticket.step, copy, start, out=False)
        return copy

    def use(self, ticket: Ticket, copy: Copy | None = None) -> None:
        """Backward asks for a tensor, which may be on its way back, or lets go of what stands for it."""
        step = ticket.step
        if step is None or current_pass() == NO_PASS or is_capturing(self.device):
            return
        if not step.over:
            step.over = True
            step.ahead = bool(step.packed) and not step.packed[0].query()
        if copy is None and (ticket.place in step.used or (ticket.what == WAIT and not step.measured)):
            return
        need = self.mover.mark(self.device)
        if need is not None:
            step.used.setdefault(ticket.place, need)
            if copy is not None and copy.done is not None:
                step.waits.append((need, copy.done))

    def _note(self, step: Step, copy: Copy, start: float, *, out: bool) -> None:
        step.host[out] = min(step.host[out], self.mover.now() - start)
        if copy.begun is not None and copy.done is not None:
            step.copies.append((out, copy.tensor.nbytes, copy.begun, copy.done))
