"""The largest size of a training step that fits a memory: of batch, depth, resolution, whatever the target takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from ..errors import TargetError, explain
from ..record import Fit
from .hollow import Hollow
from .predict import Build, Steps, Tell, check_optimizer, make
from .ways import Way, ways_of

__all__ = ["fit", "integer_keywords", "largest"]


def integer_keywords(build: Build) -> dict[str, int | None]:
    """The arguments of a target that are integers, with their defaults.

    Example:
        >>> def build(batch=8, *, depth: int, bias=True): ...
        >>> integer_keywords(build)
        {'batch': 8, 'depth': None}
    """
    found: dict[str, int | None] = {}
    for name, parameter in inspect.signature(build).parameters.items():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        default = parameter.default
        if isinstance(default, int) and not isinstance(default, bool):
            found[name] = default
        elif default is parameter.empty and parameter.annotation in (int, "int"):
            found[name] = None
    return found


def fit(
    build: Build,
    limit_bytes: int,
    *,
    keyword: str | None = None,
    ways: Sequence[Way] | None = None,
    target: str = "target",
    optimizer: str = "adamw",
    tell: Tell = lambda _: None,
) -> tuple[Fit, ...]:
    """The largest size whose step fits a memory, for each of several ways.

    What has to fit is what the target makes (parameters, buffers, inputs), gradients, the optimizer's state, and the peak of the
    step. Peaks are nearly affine in most sizes: a few steps are predicted, the last ones at the size that fits and at the next.

    Args:
        build: the target; an integer argument of it is varied.
        limit_bytes: the memory.
        keyword: that argument; it may be left out where the target has only one.
        ways: by default plain, ``reversible()``, the best replay, a budget of a quarter, the best checkpointing.
        target: what errors call it.
        optimizer: whose state counts.
        tell: is told what is done now.

    Returns:
        For each way the largest value; where a target takes only some values (a width that heads divide), the largest multiple of
        its default.

    Raises:
        TargetError: it is not clear what to vary, or nothing can be predicted.

    Example:
        >>> def build(batch=1):
        ...     return nn.Sequential(nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, 1024)), torch.randn(batch, 1024)
        >>> from revhooks.profiler.ways import PLAIN, REVERSIBLE
        >>> [(found.name, found.largest > 1000) for found in fit(build, 1 << 30, ways=[PLAIN, REVERSIBLE])]
        [('plain', True), ('reversible()', True)]
    """
    check_optimizer(optimizer)
    name, start = _keyword(build, keyword, target)
    with Hollow(), torch.random.fork_rng(devices=[]):
        sizes = _Sizes(build, name, start, target, optimizer, tell)
        if ways is None:
            ways = _some_ways(sizes.model)
        found = ((way, sizes.largest(way, limit_bytes)) for way in ways)
        return tuple(Fit(way.name, name, limit_bytes, *one) for way, one in found if one is not None)


def _some_ways(model: nn.Module) -> list[Way]:
    """Of each kind the best, without trying."""
    found: dict[object, Way] = {}
    for way in ways_of(model, budgets=[0.25]):
        found.setdefault((way.replay is None, way.checkpoint is None, way.share, way.reverse), way)
    return list(found.values())


def _keyword(build: Build, keyword: str | None, target: str) -> tuple[str, int | None]:
    """What to vary, and from where."""
    known = integer_keywords(build)
    if keyword is None and len(known) == 1:
        return next(iter(known.items()))
    if keyword in known:
        return keyword, known[keyword]
    if keyword is None:
        got = f"{len(known)}: {', '.join(known)}" if known else "none"
        raise TargetError(
            explain(target, expected="one integer argument to vary", got=got, remedy="name one with --vary" if known else _ADD)
        )
    raise TargetError(
        explain(
            target,
            expected=f"an integer argument {keyword!r}",
            got=f"the integer arguments {', '.join(known)}" if known else "no integer argument",
            remedy="vary one of these" if known else _ADD,
        )
    )


_ADD = "give the target an argument as batch=8 that it makes its inputs or its model with"


class _InvalidError(Exception):
    """A size that the target does not take."""


class _Sizes:
    """Predictions of a target in many sizes."""

    def __init__(self, build: Build, keyword: str, start: int | None, target: str, optimizer: str, tell: Tell) -> None:
        self._build, self._keyword, self._target = build, keyword, target
        self._optimizer, self._tell = optimizer, tell
        self.start = start if start is not None and start > 0 else 1
        self._steps = (self.start, self._at(self.start))  # of the latest size
        self._totals: dict[tuple[int, Way], int | None] = {}

    @property
    def model(self) -> nn.Module:
        """In the size where the search begins."""
        return self._steps[1].model

    def _at(self, size: int) -> Steps:
        return Steps(make(self._build, {self._keyword: size}, self._target), self._target)

    def largest(self, way: Way, limit: int) -> tuple[int, int] | None:
        """The largest size, and what it takes; ``None`` where the step cannot be taken in this way at all."""
        if self._total(self.start, way) is None:
            return None
        try:
            return largest(lambda size: self._checked(size, way), limit, self.start)
        except _InvalidError:
            self._tell(f"{way.name}: only multiples of {self.start} from now on")
        try:
            count, nbytes = largest(lambda count: self._checked(count * self.start, way), limit, 1)
        except _InvalidError as error:
            raise error.args[0] from None
        return count * self.start, nbytes

    def _checked(self, size: int, way: Way) -> int:
        try:
            total = self._total(size, way)
        except TargetError as error:
            raise _InvalidError(error) from error
        if total is None:
            subject = f"{self._target}({self._keyword}={size})"
            got = self._steps[1].trial(way).problem
            raise _InvalidError(
                TargetError(explain(subject, expected=f"a step ({way.name})", got=got, remedy="vary another argument"))
            )
        return total

    def _total(self, size: int, way: Way) -> int | None:
        key = (size, way)
        if key not in self._totals:
            self._tell(f"{way.name}: {self._keyword}={size} ...")
            if self._steps[0] != size:
                self._steps = (size, self._at(size))
            self._totals[key] = self._steps[1].total(way, self._optimizer)
        return self._totals[key]


_SECANTS = 12  # then it is halved
_MOST = 1 << 40  # of what is varied
_FARTHEST = 64  # times the largest size that was tried


def largest(total: Callable[[int], int], limit: int, start: int) -> tuple[int, int]:
    """The largest whole number from 1 whose total is within the limit, and that; 0 and the total of 1 where none is.

    Args:
        total: grows with its argument, nearly in proportion.
        limit: the limit.
        start: where to begin.

    Raises:
        TargetError: it does not grow.

    Example:
        >>> largest(lambda size: 100 + 7 * size, limit=1000, start=8)
        (128, 996)
    """
    known: dict[int, int] = {}
    low, high, size = 0, _MOST, start
    while high - low > 1:
        known[size] = total(size)
        if known[size] <= limit:
            low = size
        else:
            high = size
        if low and len(known) > 2 and max(known.values()) == min(known.values()):
            raise TargetError(
                explain(
                    "what is varied",
                    expected="an argument that memory depends on",
                    got=f"the same {known[size]} bytes at {', '.join(map(str, sorted(known)))}",
                    remedy="vary another one",
                )
            )
        size = _guess(known, limit, low, high)
    return low, known[low or 1]


def _guess(known: Mapping[int, int], limit: int, low: int, high: int) -> int:
    """The next number to try, between those that are known to fit and not to."""
    near = sorted(known, key=lambda size: abs(known[size] - limit))[:2]
    top = high - 1 if high < _MOST else min(_MOST - 1, max(known) * _FARTHEST)
    if len(near) < 2:
        guess = 2 * near[0] if low else near[0] // 2
    elif len(known) > _SECANTS:
        guess = (low + high) // 2
    elif known[near[0]] == known[near[1]]:
        guess = 2 * max(known) if high == _MOST else (low + high) // 2
    else:
        a, b = near
        guess = a + (limit - known[a]) * (b - a) // (known[b] - known[a])
    return min(max(guess, low + 1), max(top, low + 1))
