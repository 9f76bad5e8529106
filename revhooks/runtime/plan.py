"""The plan: how each block call is to be rebuilt, and which blocks do not invert."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import nn

from ..errors import FallbackWarning, RegistrationError, explain
from ..generators import EVERY

__all__ = [
    "Draws",
    "Fallback",
    "Inversion",
    "Predicate",
    "known_draws",
    "known_inversion",
    "learn_draws",
    "learn_inversion",
    "predicate",
    "replays",
    "use_replay",
]

Predicate = Callable[[nn.Module], bool]


class Fallback(Protocol):
    """Marks a block, or one step of it, to be kept instead of inverted from the next call on."""

    def __call__(self, error: float, *, below: bool) -> None:
        """``below``: the blocks before it are in doubt too."""
        ...


class Inversion(NamedTuple):
    """What the first try of an inverse has shown, for one block and one set of shapes.

    Attributes:
        inputs: how many leading arguments the inverse returns.
        matches: for each branch call of the inverse, the branch of forward that it repeats.
        problem: why it cannot be used, or ``""``.
    """

    inputs: int
    matches: tuple[int | None, ...]
    problem: str = ""


# Per block, for as long as it lives: what its first try has shown, and which steps are kept.
_inversions: weakref.WeakKeyDictionary[nn.Module, dict[object, Inversion]] = weakref.WeakKeyDictionary()
_draws: weakref.WeakKeyDictionary[nn.Module, dict[bool, Draws]] = weakref.WeakKeyDictionary()
_writers: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
_fallbacks: weakref.WeakKeyDictionary[nn.Module, set[object]] = weakref.WeakKeyDictionary()


def known_inversion(module: nn.Module, key: object) -> Inversion | None:
    """What the first try has shown for these shapes, if there was one."""
    return _inversions.get(module, {}).get(key)


def learn_inversion(module: nn.Module, key: object, inversion: Inversion) -> None:
    """Remember what a try has shown."""
    known = _inversions.setdefault(module, {})
    if len(known) >= 64:  # of shapes that keep changing only the latest matter
        known.clear()
    known[key] = inversion


class Draws(NamedTuple):
    """Which generators calls of a block draw from, and whether others draw between its call and the one before."""

    inside: frozenset[str] = EVERY
    outside: bool = True


_UNKNOWN = Draws()


def known_draws(module: nn.Module) -> Draws:
    """What earlier calls in this mode have shown; the worst of a block that was never seen."""
    return _draws.get(module, {}).get(module.training, _UNKNOWN)


def learn_draws(module: nn.Module, draws: Draws) -> None:
    """Remember what a call has shown."""
    _draws.setdefault(module, {})[module.training] = draws


def may_write_input(branch: nn.Module) -> bool:
    """Whether a branch may change its input in place: it has done so, or was never seen."""
    return _writers.get(branch, True)


def learn_writes_input(branch: nn.Module, writes: bool) -> None:
    """Remember whether a branch has changed its input in place."""
    if _writers.get(branch) is not writes:
        _writers[branch] = writes


def replays(module: nn.Module, key: object) -> bool:
    """Whether the block (or the step ``key`` of it) is kept instead of inverted."""
    return key in _fallbacks.get(module, ())


def use_replay(module: nn.Module, key: object, label: str, reason: str, *, warn: bool = True) -> None:
    """From the next call on keep instead of inverting; warn once."""
    known = _fallbacks.setdefault(module, set())
    if key in known:
        return
    known.add(key)
    if warn:
        message = explain(label, expected="an inverse within tolerance", got=reason, remedy="check(module, *inputs) shows more")
        warnings.warn(f"{message} It is rebuilt from kept tensors from now on.", FallbackWarning, stacklevel=2)


def predicate(spec: object, name: str) -> Predicate:
    """A class, a tuple of classes, or a predicate, as a predicate.

    Raises:
        RegistrationError: it is none of these.
    """
    if isinstance(spec, type):
        return lambda module: isinstance(module, spec)
    if isinstance(spec, (tuple, list)) and all(isinstance(cls, type) for cls in spec):
        classes = tuple(spec)
        return lambda module: isinstance(module, classes)
    if callable(spec):
        return spec
    raise RegistrationError(
        explain(
            f"{name}=",
            expected="a class, a tuple of classes, or a function of a module",
            got=repr(spec),
            remedy="pass one of these",
        )
    )
