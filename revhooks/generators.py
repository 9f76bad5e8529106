"""Capture and restore the global random generators: torch (CPU and device), Python, numpy (Rule 6)."""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .capture import is_capturing

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
        return lambda: repr(numpy_random.get_state())
    words = (ctypes.c_uint32 * 625).from_address(bits.ctypes.state_address)
    gauss = numpy_random.mtrand._rand
    key = numpy_random.get_state()
    if (words[624], words[0], words[623]) != (key[2], key[1][0], key[1][623]):  # pragma: no cover
        return lambda: repr(gauss.get_state())
    return lambda: (id(numpy_random.mtrand._rand._bit_generator), words[624], words[0], words[623])


def _torch_mark() -> bytes:
    """The same for torch's generator of the CPU: its whole state, which is cheap to read."""
    return _bytes(torch.default_generator.get_state())


def _bytes(state: Tensor) -> bytes:
    found: bytes = state.numpy().tobytes()
    return found


class Rng:
    """The state of the global generators at one moment; ``None`` for one that was not asked for."""

    __slots__ = ("device", "numpy", "python", "torch")

    def __init__(self, torch_state: Tensor | None, python: Any, numpy: Any, device: _States) -> None:
        self.torch = torch_state
        self.python = python
        self.numpy = numpy
        self.device = device

    def moved(self, later: Rng) -> frozenset[str]:
        """Which generators have moved from here to ``later``."""
        moved = set()
        if self.torch is not None and later.torch is not None and _bytes(self.torch) != _bytes(later.torch):
            moved.add("torch")
        if self.device and later.device and _of(self.device) != _of(later.device):
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
        for owner, state in self.device:
            if isinstance(owner, torch.device):
                bits = torch.frombuffer(bytearray(state), dtype=torch.uint8)
                getattr(torch, owner.type).set_rng_state(bits, owner)
            elif (owner.initial_seed(), owner.get_offset()) != state:
                owner.manual_seed(state[0])
                owner.set_offset(state[1])


_States = tuple[tuple[Any, Any], ...]  # generators of devices, or the devices, each with its state


def _of(states: _States) -> tuple[Any, ...]:
    return tuple(state for _, state in states)


def _accelerator(device: torch.device) -> torch.device | None:
    """The device whose generators a call may draw from; one that gets tensors on the CPU may work on CUDA too."""
    if device.type not in ("cpu", "meta"):
        return device
    return torch.device("cuda") if torch.cuda.is_initialized() else None


def _device_state(device: torch.device) -> _States:
    """Of every CUDA device, for a call may go from one to another; a generator there is told by its seed and how far it is."""
    if device.type == "cuda":
        return tuple((one, (one.initial_seed(), one.get_offset())) for one in torch.cuda.default_generators)
    module: Any = getattr(torch, device.type, None)
    if not hasattr(module, "get_rng_state"):
        return ()
    return ((device, _bytes(module.get_rng_state(device))),)


EVERY = frozenset({"torch", "python", "numpy"})
_TORCH = frozenset({"torch"})
_peeks: dict[str, Any] = {}


def _peek(kind: str, make: Callable[[], Any]) -> Any:
    """How to peek at one kind of generator, found out once a process."""
    if _peeks.get(kind) is None:
        _peeks[kind] = make()
    return _peeks[kind]


class RngTracker:
    """Reads generators, and tells cheaply whether one has moved."""

    __slots__ = ("_last", "_numpy_peek", "_python_peek", "_seen")

    def __init__(self) -> None:
        self._python_peek = _peek("python", _python_peek)
        self._numpy_peek = _peek("numpy", _numpy_peek)
        self._seen: dict[torch.device, Any] = {}  # the latest marks of devices
        self._last: tuple[Any, Rng] | None = None  # marks of torch's generators, and their state

    def marks(self, device: torch.device) -> tuple[Any, ...]:
        """Equal marks: nothing was drawn in between (but the second of a pair that numpy's ``normal`` makes)."""
        if self._numpy_peek is None:
            self._numpy_peek = _peek("numpy", _numpy_peek)
        return (
            _torch_mark(),
            self._python_peek(),
            self._numpy_peek() if self._numpy_peek is not None else None,
            self._device_marks(device),
        )

    def _device_marks(self, device: torch.device) -> Any:
        """While a graph is captured the generators cannot be read: who draws there is told before (`Frame.begin`)."""
        where = _accelerator(device)
        if where is None:
            return None
        if not is_capturing(where):
            self._seen[where] = _of(_device_state(where))
        return self._seen.get(where)

    def torch_marks(self, device: torch.device) -> Any:
        """The same for torch's generators only."""
        return _torch_mark(), self._device_marks(device)

    def torch_state(self, device: torch.device, marks: Any) -> Rng:
        """The state of torch's generators, whose marks are these; read only when they have moved."""
        last = self._last
        if last is None or last[0] != marks:
            last = self._last = (marks, self.capture(device, _TORCH))
        return last[1]

    @staticmethod
    def capture(device: torch.device, kinds: frozenset[str] = EVERY) -> Rng:
        """The state of the generators of these kinds."""
        numpy_random = sys.modules.get("numpy.random") if "numpy" in kinds else None
        where = _accelerator(device) if "torch" in kinds else None
        return Rng(
            torch.default_generator.get_state() if "torch" in kinds else None,
            random.getstate() if "python" in kinds else None,
            numpy_random.get_state() if numpy_random is not None else None,
            () if where is None or is_capturing(where) else _device_state(where),
        )
