"""Capture and restore the global random generators: torch (CPU and device), Python, numpy (Rule 6)."""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["EVERY", "Rng", "RngTracker"]


def _python_peek() -> Callable[[], Any]:
    """A cheap function whose result changes whenever Python's global generator is used.

    ``random.getstate()`` costs 7 microseconds; the generator's index and its first and last word say
    the same. The layout of CPython's ``RandomObject`` is checked against ``getstate`` before use.
    """
    instance = getattr(random, "_inst", None)
    if type(instance) is random.Random and sys.implementation.name == "cpython":
        words = (ctypes.c_uint32 * 625).from_address(id(instance) + object.__basicsize__)
        key = random.getstate()[1]
        if (words[0], words[1], words[624]) == (key[624], key[0], key[623]):
            return lambda: (words[0], words[1], words[624], vars(instance).get("gauss_next"))
    return random.getstate


def _numpy_peek() -> Callable[[], Any] | None:
    """The same for numpy's global generator (33 microseconds a ``get_state``), once it is imported."""
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is None:
        return None
    bits = numpy_random.mtrand._rand._bit_generator
    if type(bits).__name__ != "MT19937":
        return lambda: _hashable(numpy_random.get_state())
    words = (ctypes.c_uint32 * 625).from_address(bits.ctypes.state_address)
    gauss = numpy_random.mtrand._rand
    key = numpy_random.get_state()
    if (words[624], words[0], words[623]) != (key[2], key[1][0], key[1][623]):  # pragma: no cover
        return lambda: _hashable(gauss.get_state())
    return lambda: (id(numpy_random.mtrand._rand._bit_generator), words[624], words[0], words[623])


def _hashable(state: Any) -> Any:
    return repr(state)


class Rng:
    """The state of the global generators at one moment; ``None`` for one that was not asked for."""

    __slots__ = ("device", "numpy", "python", "torch")

    def __init__(self, torch_state: Tensor | None, python: Any, numpy: Any, device: tuple[torch.device, Tensor] | None) -> None:
        self.torch = torch_state
        self.python = python
        self.numpy = numpy
        self.device = device

    def moved(self, later: Rng) -> frozenset[str]:
        """Which generators have moved from here to ``later``."""
        moved = set()
        if self.torch is not None and later.torch is not None and not _equal(self.torch, later.torch):
            moved.add("torch")
        if self.device is not None and later.device is not None and not _equal(self.device[1], later.device[1]):
            moved.add("torch")
        if self.python != later.python:
            moved.add("python")
        if repr(self.numpy) != repr(later.numpy) or (self.numpy is not None and (self.numpy[1] != later.numpy[1]).any()):
            moved.add("numpy")
        return frozenset(moved)

    def restore(self) -> None:
        """Write the generators that were read."""
        if self.torch is not None:
            torch.default_generator.set_state(self.torch)
        if self.python is not None:
            random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy.random"].set_state(self.numpy)
        if self.device is not None:
            where, state = self.device
            getattr(torch, where.type).set_rng_state(state, where)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.numpy().tobytes() == b.numpy().tobytes()


def _device_state(device: torch.device | None) -> tuple[torch.device, Tensor] | None:
    if device is None or device.type in ("cpu", "meta"):
        return None
    module: Any = getattr(torch, device.type, None)
    return (device, module.get_rng_state(device)) if hasattr(module, "get_rng_state") else None


EVERY = frozenset({"torch", "python", "numpy"})


class RngTracker:
    """Reads generators, and tells cheaply whether one has moved."""

    __slots__ = ("_numpy_peek", "_python_peek")

    def __init__(self) -> None:
        self._python_peek = _python_peek()
        self._numpy_peek = _numpy_peek()

    def marks(self, device: torch.device) -> tuple[Any, ...]:
        """Equal marks: nothing was drawn in between (but the second of a pair that numpy's ``normal`` makes)."""
        if self._numpy_peek is None:
            self._numpy_peek = _numpy_peek()
        on_device = _device_state(device)
        return (
            torch.default_generator.get_state().numpy().tobytes(),
            self._python_peek(),
            self._numpy_peek() if self._numpy_peek is not None else None,
            on_device[1].numpy().tobytes() if on_device else None,
        )

    @staticmethod
    def capture(device: torch.device, kinds: frozenset[str] = EVERY) -> Rng:
        """The state of the generators of these kinds."""
        numpy_random = sys.modules.get("numpy.random") if "numpy" in kinds else None
        return Rng(
            torch.default_generator.get_state() if "torch" in kinds else None,
            random.getstate() if "python" in kinds else None,
            numpy_random.get_state() if numpy_random is not None else None,
            _device_state(device) if "torch" in kinds else None,
        )
