"""How the error of reconstructions grows over a chain of blocks: inverting in floating point is not exact."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from ..nn.coupling import Coupling
from ..watching import Watcher

__all__ = ["Drift", "DriftWatcher"]


@dataclass(frozen=True, slots=True)
class Drift:
    """The error of reconstructions over a chain, in the order in which backward reconstructs: from the end.

    Attributes:
        unit: what is counted: ``block``, or ``step`` of one block that is a chain itself.
        errors: the largest relative error that was seen after so many of them, for 1, 2, 4, 8, ... and the last.
        growth: the factor by which it grows from one to the next, over the whole chain; ``None`` where it is 0 throughout.

    Example:
        >>> drift = Drift.of("block", {1: 1e-7, 2: 2e-7, 3: 4e-7, 4: 8e-7})
        >>> print(drift)
        after 1, 2, 4 blocks: 1e-07, 2e-07, 8e-07; x2.00 a block
        >>> drift.reaches(1e-3)
        15
    """

    unit: str
    errors: tuple[tuple[int, float], ...]
    growth: float | None

    @classmethod
    def of(cls, unit: str, seen: dict[int, float]) -> Drift:
        """From the errors that were seen at depths, at all or at some of them."""
        depths = sorted(seen)
        wanted = [2**i for i in range(depths[-1].bit_length()) if 2**i < depths[-1]] + [depths[-1]]
        errors: dict[int, float] = {}
        below = 0
        for depth in wanted:
            if there := [seen[d] for d in depths if below < d <= depth]:
                errors[depth] = max(there)
            below = depth
        return cls(unit, tuple(errors.items()), _growth(seen))

    def reaches(self, bound: float) -> int | None:
        """After how many the error would be past a bound if it went on growing so; ``None``: not before a million."""
        depth, error = self.errors[-1]
        if error > bound:
            return next(d for d, e in self.errors if e > bound)
        if not error or self.growth is None or self.growth <= 1:
            return None
        more = math.ceil(math.log(bound / error) / math.log(self.growth))
        return depth + more if more < _FAR else None

    def __str__(self) -> str:
        """One line."""
        depths = ", ".join(str(depth) for depth, _ in self.errors)
        if self.growth is None:
            return f"none: 0 after {depths} {self.unit}s"
        errors = ", ".join(f"{error:.1g}" for _, error in self.errors)
        return f"after {depths} {self.unit}s: {errors}; x{self.growth:.2f} a {self.unit}"


_FAR = 10**6


def _growth(seen: dict[int, float]) -> float | None:
    """The factor of the line of least squares through the logarithms."""
    points = [(depth, math.log(error)) for depth, error in seen.items() if 0 < error < math.inf]
    if not points:
        return None
    x = sum(depth for depth, _ in points) / len(points)
    y = sum(log for _, log in points) / len(points)
    width = sum((depth - x) ** 2 for depth, _ in points)
    return math.exp(sum((depth - x) * (log - y) for depth, log in points) / width) if width else 1.0


_LABEL = re.compile(r"block (\d+) \(.*?\)(?:, step (\d+) \(.*\))?")


class DriftWatcher(Watcher):
    """Takes down the errors of a backward pass of a run that names no blocks, so that they are called by number."""

    def __init__(self) -> None:
        self._steps: dict[int, int] = {}  # of each block that was rebuilt
        self._errors: list[tuple[int, int | None, float]] = []  # block, step of it, error

    def rebuild_began(self, module: nn.Module | None, label: str) -> None:
        """Note how many steps a block has."""
        if match := _LABEL.fullmatch(label):
            self._steps[int(match[1])] = len(module.steps()) if isinstance(module, Coupling) else 1

    def compared(self, label: str, error: float) -> None:
        """Note an error."""
        if match := _LABEL.fullmatch(label):
            self._errors.append((int(match[1]), int(match[2]) if match[2] else None, error))

    def longest(self, ends: Iterable[str]) -> Drift | None:
        """The drift over the longest chain of those that end in blocks of these labels; ``None`` if none has two blocks."""
        chains: dict[tuple[int, bool], dict[int, float]] = {}
        last = sorted(int(match[1]) for label in ends if (match := _LABEL.fullmatch(label)))
        last.append(max((block for block, _, _ in self._errors), default=0))
        for block, step, error in self._errors:
            count = self._steps.get(block, 1)
            if count > 2 and step is not None:
                _note(chains.setdefault((block, True), {}), count - step, error)
            else:
                end = next(one for one in last if one >= block)
                _note(chains.setdefault((end, False), {}), end - block + 1, error)
        (_, steps), seen = max(chains.items(), key=lambda item: max(item[1]), default=((0, False), {0: 0.0}))
        return Drift.of("step" if steps else "block", seen) if max(seen) > 1 else None


def _note(seen: dict[int, float], depth: int, error: float) -> None:
    seen[depth] = max(seen.get(depth, 0.0), error)
