"""Capture and restore the modes of a call: autocast, the default device, and what compiles frames (Rule 6)."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from .tracing import compiler, set_compiler

__all__ = ["PLAIN", "Modes"]


class Modes:
    """Autocast of the CPU, of CUDA and of the call's device, the default device, and what compiles frames.

    What a call finds as its default device is a function mode of its thread, which neither follows autograd to another one nor
    is there in a backward that is called under it.
    """

    __slots__ = ("_cache", "_compiler", "_default_device", "autocast")

    def __init__(self, device: torch.device) -> None:
        kinds = dict.fromkeys(("cpu", "cuda", "cpu" if device.type == "meta" else device.type))
        enabled = torch._C._is_any_autocast_enabled()
        self.autocast = tuple((k, torch.get_autocast_dtype(k)) for k in kinds if enabled and torch.is_autocast_enabled(k))
        self._cache = torch.is_autocast_cache_enabled()
        self._default_device = _default_device()
        self._compiler = compiler()

    @classmethod
    def of_call(cls, device: torch.device) -> Modes | None:
        """The modes now; ``None`` when none is set."""
        if not torch._C._is_any_autocast_enabled() and _default_device() is None and compiler() is None:
            return None
        return cls(device)

    def restored(self) -> _Restored:
        """A context: run in the modes that were captured."""
        return _Restored(self)


class _Restored:
    __slots__ = ("_before", "_cache", "_compiler", "_device", "_modes")

    def __init__(self, modes: Modes) -> None:
        self._modes = modes

    def __enter__(self) -> None:
        modes, wanted = self._modes, dict(self._modes.autocast)
        kinds = {"cpu", "cuda", *wanted} if torch.cuda.is_initialized() else {"cpu", *wanted}
        self._before = [(k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds]
        self._cache = torch.is_autocast_cache_enabled()
        for kind in kinds:
            torch.set_autocast_enabled(kind, kind in wanted)
            if kind in wanted:
                torch.set_autocast_dtype(kind, wanted[kind])
        torch.set_autocast_cache_enabled(modes._cache)
        torch.autocast_increment_nesting()
        device = modes._default_device
        self._device = (device or torch.device("cpu")) if device != _default_device() else None
        if self._device is not None:
            self._device.__enter__()
        self._compiler = compiler()
        if self._compiler is not modes._compiler:
            set_compiler(modes._compiler)

    def __exit__(self, *error: Any) -> None:
        if self._compiler is not self._modes._compiler:
            set_compiler(self._compiler)
        if self._device is not None:
            self._device.__exit__(*error)
        if not torch.autocast_decrement_nesting():
            torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(self._cache)
        for kind, enabled, dtype in self._before:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)


def _default_device() -> torch.device | None:
    """Where this thread makes tensors, if somebody has chosen that: `torch.set_default_device`, or a device as a context."""
    if not torch._C._len_torch_function_stack():
        return None
    modes = reversed(_get_current_function_mode_stack())
    chosen: torch.device | None = next((mode.device for mode in modes if isinstance(mode, DeviceContext)), None)
    if chosen is not None and chosen.type == "cuda" and chosen.index is None:  # which one is the thread's, too
        return torch.device("cuda", torch.cuda.current_device())
    return chosen


def _plain_modes() -> Modes:
    modes = Modes(torch.device("cpu"))
    modes.autocast, modes._cache, modes._default_device, modes._compiler = (), True, None, None
    return modes


PLAIN = _plain_modes()
