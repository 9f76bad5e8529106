"""A device that needs no hardware: `pytest --device other`. It is built once, by the compiler that is at hand."""

from __future__ import annotations

import contextlib
import types
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import load

__all__ = ["register"]


def register() -> None:
    """Make the device ``other`` known to torch."""
    device: Any = load("revhooks_other_device", [str(Path(__file__).parent / "device.cpp")], extra_cflags=["-O1"])
    torch.utils.rename_privateuse1_backend("other")
    module = types.ModuleType("torch.other")
    module.__dict__.update(
        is_available=lambda: True,
        is_initialized=lambda: True,
        _initialized=True,
        _is_in_bad_fork=lambda: False,
        device_count=lambda: 1,
        current_device=lambda: 0,
        set_device=lambda _: None,
        device=lambda _: contextlib.nullcontext(),
        synchronize=lambda _=None: None,
        manual_seed=device.seed,
        manual_seed_all=device.seed,
        initial_seed=device.initial_seed,
        get_rng_state=lambda _=None: device.state(),
        set_rng_state=lambda state, _=None: device.set_state(state),
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
        memory_allocated=lambda _=None: 0,
    )
    torch._register_device_module("other", module)
    torch.utils.generate_methods_for_privateuse1_backend(unsupported_dtype=None)
