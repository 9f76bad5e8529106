"""What is known of the values of hollow tensors: what operations that made them give, and what those that ask are told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..hollow import UNKNOWN, Forecast, forecast_of, is_hollow

__all__ = ["ANSWERS", "for_output", "forecast"]

_aten = torch.ops.aten


def _scalar(tensor: Tensor) -> Any:
    """A number is read: 0, but what is asked whether all is well is."""
    true = forecast_of(tensor).true
    if tensor.dtype is torch.bool:
        return true
    return 0.0 if tensor.is_floating_point() else 0j if tensor.is_complex() else int(true)


def _count_nonzero(tensor: Tensor) -> Tensor:
    return torch.tensor(0 if forecast_of(tensor).zeros else tensor.numel())


def _extremes(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Of indices; those of which nothing is known may be large, but are hardly larger than 32 bits."""
    most = forecast_of(tensor).most
    ends = (0, (1 << 31) - 1 if most is None else most) if not tensor.is_floating_point() else (0.0, 1.0)
    low, high = (torch.tensor(end, dtype=tensor.dtype) for end in ends)
    return low, high


def _equal(a: Tensor, b: Tensor) -> bool:
    """What can be compared is taken to be the same."""
    return a.shape == b.shape and a.dtype is b.dtype


def _all(_: Tensor) -> Tensor:
    """What is asked whether all is well is."""
    return torch.ones((), dtype=torch.bool)


ANSWERS: dict[Any, Callable[..., Any]] = {
    _aten._local_scalar_dense.default: _scalar,
    _aten.aminmax.default: _extremes,
    _aten.all.default: _all,
    _aten.count_nonzero.default: _count_nonzero,
    _aten.equal.default: _equal,
}
_MAKE_ZEROS = {
    "bernoulli", "bernoulli_", "constant_pad_nd", "hardsigmoid", "hardswish", "hardswish_", "hardtanh", "hardtanh_", "new_zeros",
    "one_hot", "relu", "relu_", "threshold", "tril", "triu", "zero_", "zeros", "zeros_like",
}  # fmt: skip
_KEEP_ZEROS = {  # zero where what they get is
    "_to_copy", "abs", "abs_", "cat", "clone", "copy", "copy_", "div", "div_", "elu", "elu_", "flip", "gather", "gelu", "index",
    "index_select", "leaky_relu", "leaky_relu_", "max_pool2d_with_indices", "mish", "mul", "mul_", "neg", "neg_", "pixel_shuffle",
    "pow", "repeat", "roll", "silu", "silu_", "sqrt", "stack", "tanh", "tanh_", "where",
}  # fmt: skip
_KEEP_MASKS = {"_to_copy", "clone", "copy_", "div", "div_", "mul", "mul_"}
_BY_DIMENSION = {"argmax", "argmin", "argsort", "max", "median", "min", "mode", "sort", "topk"}


def forecast(func: Any, args: Any, tensors: Sequence[Tensor]) -> Forecast:
    """What is known of what an operation gives."""
    name = func._schema.name.removeprefix("aten::")
    if name in ("bernoulli", "bernoulli_"):
        return Forecast(zeros=True, mask=1.0)
    if name == "native_dropout":
        return Forecast(zeros=True)
    if name == "randint":
        return Forecast(zeros=True, most=int(args[1] if isinstance(args[1], int) else args[0]) - 1)
    if name.startswith("max_pool") and name.endswith("with_indices"):
        kept = _has_zeros(tensors[0])
        return Forecast(zeros=kept, most=_plane(tensors[0], name) - 1)
    if name in _BY_DIMENSION and tensors[0].dim():
        return Forecast(most=max(tensors[0].shape) - 1)
    zeros = name in _MAKE_ZEROS or (name in _KEEP_ZEROS and any(_has_zeros(tensor) for tensor in tensors))
    mask = most = None
    if zeros and name in _KEEP_MASKS and is_hollow(tensors[0]):
        mask = _scaled_mask(name, args, forecast_of(tensors[0]).mask)
    if name in _KEEP_MASKS and len(tensors) == 1 and is_hollow(tensors[0]):
        most = forecast_of(tensors[0]).most
    return Forecast(zeros, mask, most) if zeros or most is not None else UNKNOWN


def _has_zeros(tensor: Tensor) -> bool:
    """Of a real one, as a mask or an image, it is looked at; a number is none that matters."""
    if is_hollow(tensor):
        return forecast_of(tensor).zeros
    if not tensor.dim() or tensor.dtype is torch.int64 or tensor.layout is not torch.strided:
        return False
    return not bool(tensor.detach().all())


def _scaled_mask(name: str, args: Any, mask: float | None) -> float | None:
    if mask is None or not name.startswith(("mul", "div")):
        return mask
    factor = args[1]
    if not isinstance(factor, (int, float)) or not factor:
        return None
    return mask * factor if name.startswith("mul") else mask / factor


def _plane(tensor: Tensor, name: str) -> int:
    size = 1
    for length in tensor.shape[-3 if "3d" in name else -2 :]:
        size *= length
    return size


def for_output(func: Any, forecast: Forecast, place: int) -> Forecast:
    """Of several outputs the first one has the values, the second indices of them."""
    if forecast.most is None or len(func._schema.returns) == 1:
        return forecast
    return Forecast(zeros=forecast.zeros) if place == 0 else Forecast(zeros=True, most=forecast.most)
