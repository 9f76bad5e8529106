"""What all that one run has packed has in common, and needs of it."""

from __future__ import annotations

from ...storage import Ledger
from ..offload.parked import Offload
from ..passes import Passes
from ..policy.budget import Budget
from ..policy.guard import Guard

__all__ = ["Shared"]


class Shared:
    """The books, the guard, the backward passes and the budget of one run.

    A graph's node notes under it which handle stands for the node's output.
    """

    __slots__ = ("__weakref__", "budget", "guard", "ledger", "offload", "ops", "passes")

    def __init__(self, *, guard: str, ops: bool, budget: float, offload: bool) -> None:
        self.ledger = Ledger()
        self.guard = Guard(guard)
        self.passes = Passes()
        self.budget = Budget(self.ledger, budget)
        self.offload = Offload(self.ledger, self.budget) if offload else None
        self.ops = ops
