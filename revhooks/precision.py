"""How coarsely a backend multiplies: process-wide settings on which a call's numbers depend (Rule 6).

A backend may round float32 to TF32 (10 bits of mantissa) or bfloat16 (7) before it multiplies. Such products are good to 1e-3 or
1e-2, and so is what is inverted by them. Torch has two sets of functions for these settings, and reading by the older one raises
where they were made by the newer one; so the newer one serves.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["Precision", "coarse", "precision_of", "restored"]

Precision = tuple[Any, ...]  # of products, convolutions, recurrences; on CUDA also how half precision is summed

_OPS = ("matmul", "conv", "rnn")
_get: Any = getattr(torch._C, "_get_fp32_precision_getter", None)
_set: Any = getattr(torch._C, "_set_fp32_precision_setter", None)
_SUMS = ("_cublas_allow_fp16_reduced_precision_reduction", "_cublas_allow_bf16_reduced_precision_reduction")
_get_sums: list[Any] = [getattr(torch._C, f"_get{name}", None) for name in _SUMS]
_ROUNDED = {"tf32": torch.float16, "bf16": torch.bfloat16}  # as many bits of mantissa


def precision_of(device: torch.device) -> Precision:
    """The settings that are in force for a device.

    Example:
        >>> precision_of(torch.device("cpu")) == precision_of(torch.device("cpu"))
        True
    """
    if _get is None:
        return ()
    if device.type != "cuda":
        return _get("mkldnn", "matmul"), _get("mkldnn", "conv"), _get("mkldnn", "rnn")
    return (
        *(_get("cuda", "matmul"), _get("cuda", "conv"), _get("cuda", "rnn")),
        *(read() for read in _get_sums if read is not None),
    )


def coarse(precision: Precision, device: torch.device, *, convolves: bool) -> torch.dtype | None:
    """The dtype whose mantissa float32 is cut to by these settings; ``None`` if it is not.

    Args:
        precision: the settings.
        device: where.
        convolves: whether there are convolutions or recurrences too, which have settings of their own.

    Example:
        >>> coarse(("ieee", "ieee", "ieee"), torch.device("cpu"), convolves=True)
    """
    found = [value for value in (precision[:3] if convolves else precision[:1]) if value in _ROUNDED]
    found = [value for value in found if _rounds(value, device)]
    if not found:
        return None
    return torch.bfloat16 if "bf16" in found else torch.float16


@functools.cache
def _rounds(value: str, device: torch.device) -> bool:
    """Whether the device can do that; else the setting changes nothing."""
    try:
        if device.type == "cuda":
            return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
        if device.type != "cpu":
            return True
        return bool(_HAS_AMX_HALF() if value == "tf32" else torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return True


_HAS_AMX_HALF: Any = getattr(torch.cpu, "_is_amx_fp16_supported", lambda: False)


@contextlib.contextmanager
def restored(precision: Precision, device: torch.device) -> Iterator[None]:
    """Run with these settings, and leave them as they are."""
    before, sums, words = _all(), _sums(), _words()
    kind = "cuda" if device.type == "cuda" else "mkldnn"
    wanted = {**before, **{(kind, op): value for op, value in zip(_OPS, precision, strict=False)}}
    _write(wanted, precision[3:] or sums, _words_for(wanted, words))
    try:
        yield
    finally:
        _write(before, sums, words)


_Settings = dict[tuple[str, str], str]
_Words = tuple[str | None, bool | None]  # what the older functions say; nothing, where they raise


def _all() -> _Settings:
    return {(kind, op): _get(kind, op) for kind in ("cuda", "mkldnn") for op in _OPS}


def _sums() -> tuple[Any, ...]:
    return tuple(read() for read in _get_sums if read is not None)


def _words() -> _Words:
    said: list[Any] = []
    for read in (torch._C._get_float32_matmul_precision, torch._C._get_cudnn_allow_tf32):
        try:
            said.append(read())
        except RuntimeError:
            said.append(None)
    return said[0], said[1]


def _words_for(settings: _Settings, words: _Words) -> _Words:
    """What the older functions would have been set to for these settings, if they serve."""
    cuda, other = settings["cuda", "matmul"], settings["mkldnn", "matmul"]
    products = "medium" if other == "bf16" else "high" if "tf32" in (cuda, other) else "highest"
    convolutions, recurrences = settings["cuda", "conv"] == "tf32", settings["cuda", "rnn"] == "tf32"
    return (
        None if words[0] is None else products,
        None if words[1] is None or convolutions is not recurrences else convolutions,
    )


def _write(settings: _Settings, sums: tuple[Any, ...], words: _Words) -> None:
    """By the older functions first, where they serve: who reads by them is to go on."""
    products, convolutions = words
    if products is not None:
        torch._C._set_float32_matmul_precision(products)
    if convolutions is not None:
        torch._C._set_cudnn_allow_tf32(convolutions)
    for (kind, op), value in settings.items():
        for attempt in ("none", value, "ieee"):  # "none": as what it is a part of is set
            if _get(kind, op) != value:
                _set(kind, op, attempt)
    for name, value in zip(_SUMS, sums, strict=False):
        if getattr(torch._C, f"_get{name}")() != value:
            getattr(torch._C, f"_set{name}")(*value if isinstance(value, tuple) else (value,))
