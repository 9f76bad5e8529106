"""Hollow tensors: they lie at addresses that nothing is behind, so that a step can be predicted and nothing is allocated.

A hollow tensor is a plain `torch.Tensor` on the CPU, with a storage of its own of the size that it would have. So all that goes
by types, storages, addresses, strides, versions and bytes takes it for what it stands for, and decides as it would (a
`FakeTensor` is a subclass, without addresses, that mixes with no real tensor, as the state of a generator is one). It has no
values: what operations tell of them is forecast, from what those that made it are known to give.
"""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import RevhooksError, explain

__all__ = ["UNKNOWN", "Forecast", "empty", "forecast_of", "foretell", "is_hollow", "some_values"]

SPACE = 1 << 45  # bytes of addresses; of 2^47 that a process has
_ALIGNED = 64
_NO_RESERVE = 0x4000  # of Linux, where only what is written to is counted
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Forecast:
    """What is known of the values of a hollow tensor.

    Attributes:
        zeros: some are exactly zero, as behind a ReLU.
        mask: each is 0 or this number.
        most: none is above it, and none is negative: of indices.
        true: all are true.
    """

    zeros: bool = False
    mask: float | None = None
    most: int | None = None
    true: bool = False


UNKNOWN = Forecast()


class _Space:
    """The addresses; once they are all used they are used again, which matters to nobody who compares living tensors."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
        start = libc.mmap(None, SPACE, mmap.PROT_READ, flags, -1, 0)  # what reads there by mistake finds zeros
        if start in (None, ctypes.c_void_p(-1).value):
            raise RevhooksError(
                explain(
                    "tensors without memory",
                    expected=f"{SPACE >> 40} TiB of addresses, which take no memory",
                    got=f"none (errno {ctypes.get_errno()})",
                    remedy="lift the limit of the address space (ulimit -v)",
                )
            )
        self.start: int = start
        self.next = 0
        self.forecasts: dict[int, Forecast] = {}

    def take(self, nbytes: int) -> int:
        """The address of so many bytes."""
        if self.next + nbytes > SPACE:
            if nbytes > SPACE:
                raise RevhooksError(
                    explain(
                        "a tensor without memory",
                        expected=f"at most {SPACE >> 40} TiB",
                        got=f"{nbytes / 2**40:.0f} TiB",
                        remedy="predict a smaller step",
                    )
                )
            self.next = 0
        address = self.start + self.next
        self.next += -(-max(nbytes, 1) // _ALIGNED) * _ALIGNED
        self.forecasts.pop(address, None)
        return address


_space: _Space | None = None


def is_hollow(tensor: Tensor) -> bool:
    """Whether there is nothing behind the tensor.

    Example:
        >>> is_hollow(torch.ones(2)), is_hollow(empty((2,), torch.float32))
        (False, True)
    """
    space = _space
    if space is None or type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:  # such a one shows what it has not got
        return False
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.device.type != "cpu":
        return False
    return 0 <= tensor.untyped_storage().data_ptr() - space.start < SPACE


def empty(size: tuple[int, ...], dtype: torch.dtype, stride: tuple[int, ...] | None = None, nbytes: int | None = None) -> Tensor:
    """A hollow tensor; contiguous, and all of its storage, if nothing else is said.

    Example:
        >>> x = empty((1 << 20, 1 << 20), torch.float32)
        >>> x.untyped_storage().nbytes() >> 40, x[0, :3].tolist()
        (4, [0.0, 0.0, 0.0])
    """
    global _space
    if _space is None:
        _space = _Space()
    if nbytes is None:
        nbytes = dtype.itemsize
        for length in size:
            nbytes *= length
    storage = torch._C._construct_storage_from_data_pointer(_space.take(nbytes), _CPU, nbytes)
    with torch._C._DisableTorchDispatch(), torch.no_grad():
        whole = torch.empty(0, dtype=dtype, device=_CPU)
        if stride is None:
            stride = torch.empty(size, device="meta").stride()
        return whole.set_(storage, 0, size, stride)


def forecast_of(tensor: Tensor) -> Forecast:
    """What is known of the values in a hollow tensor's storage."""
    return UNKNOWN if _space is None else _space.forecasts.get(tensor.untyped_storage().data_ptr(), UNKNOWN)


def foretell(tensor: Tensor, forecast: Forecast) -> None:
    """Note what is known of them from now on."""
    if _space is not None:
        address = tensor.untyped_storage().data_ptr()
        if forecast is UNKNOWN:
            _space.forecasts.pop(address, None)
        else:
            _space.forecasts[address] = forecast


def some_values(tensor: Tensor) -> list[float]:
    """Values such as are in a hollow tensor: of a mask both, of others more."""
    mask = forecast_of(tensor).mask
    return [1.0, 2.0, 3.0] if mask is None else [0.0, mask]
