"""Evidence: by what a tensor that was let go of is known again when it is recomputed (Rule 19).

Near, a fingerprint: every bit of it and their order, of every tensor in every step. Far, where each kernel delays the ones after
it, the same in the first steps of a place, and then a few elements of some places, of others in each step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...capture import is_capturing
from ...fingerprint import fingerprint
from ...storage import is_near
from ..policy.sketch import some_of

if TYPE_CHECKING:
    from ..policy.guard import Guard
    from .shared import Shared

__all__ = ["FIRST", "Evidence", "Rotation", "inversions", "rotation"]

FIRST = 4  # times that something is met with, in which it is always checked


class Rotation:
    """Which of the places that could be checked are: every one in ``period`` steps.

    Args:
        share: at most one check is made for so many saved tensors of a step.
    """

    def __init__(self, share: int) -> None:
        self._share = share
        self._asked = 0
        self._turn = 0
        self._period = 1

    def picks(self) -> bool:
        """Whether the next place is to be checked in this step."""
        self._asked += 1
        return (self._asked + self._turn) % self._period == 0

    def turn(self, packed: int) -> None:
        """A step has ended its forward, in which so many tensors were saved."""
        self._turn += 1
        if self._asked:
            self._period = max(1, -(-self._asked * self._share // max(packed, 1)))
        self._asked = 0


# A check is two kernels, of some two for each saved tensor. What an inversion gives back takes more of them to compare.
rotation, inversions = Rotation(64), Rotation(160)


class Evidence:
    """Of one tensor."""

    __slots__ = ("_elements", "_fingerprint", "_first")

    def __init__(self, fingerprint: Tensor | None, elements: Tensor | None, *, first: bool) -> None:
        self._fingerprint = fingerprint
        self._elements = elements
        self._first = first

    @classmethod
    def of(cls, tensor: Tensor, guard: Guard, *, first: bool) -> Evidence | None:
        """Evidence of a tensor that is let go of, if it is to be checked; ``first``: its place is met for the first times."""
        if guard.mode == "off" or tensor.is_meta or is_capturing(tensor.device):
            return None
        if is_near(tensor.device):
            return cls(fingerprint(tensor), None, first=first)
        picked = rotation.picks()  # it is asked about each place, for the turns
        if first:
            return cls(fingerprint(tensor), None, first=first)
        return cls(None, some_of(tensor.detach()).clone(), first=first) if picked or guard.mode == "raise" else None

    def is_of(self, tensor: Tensor, verdict: Callable[[float, int], None], guard: Guard) -> bool:
        """Whether a tensor is what was let go of; of one that is far the verdict is given when backward has ended."""
        if self._fingerprint is None or is_capturing(tensor.device):
            return True
        now = fingerprint(tensor)
        if is_near(tensor.device):
            return torch.equal(now, self._fingerprint)
        guard.note(*_difference(now, self._fingerprint), verdict)
        return True

    def compare(self, tensor: Tensor, verdict: Callable[[float, int], None], shared: Shared) -> None:
        """Give the verdict of what was recomputed: at once, or when the device has told."""
        if is_capturing(tensor.device):
            return
        if self._fingerprint is not None:
            now = fingerprint(tensor)
            if is_near(tensor.device):
                if not torch.equal(now, self._fingerprint):
                    verdict(1.0, 0)
                return
            pair = _difference(now, self._fingerprint)
        elif self._elements is not None:
            pair = some_of(tensor).clone(), self._elements
        else:
            return
        if not shared.guard.later(*pair, verdict, shared.passes.at_end, soon=self._first):
            verdict(float((pair[0] != pair[1]).any()), 0)


def _difference(now: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """What an accelerator is to be asked later."""
    differs = (now != before).any().float()
    return differs, torch.zeros_like(differs)
