"""Cheap operations, read off the graph: how to run again what made a tensor, from what its nodes save anyway.

A node of the graph names its operation, its arguments (``_saved_*``), what it saved (``_raw_saved_*``) and the nodes
before it. That is all that is needed to repeat a pointwise operation or a normalisation, and costs nothing until a
tensor is saved: a `torch.overrides.TorchFunctionMode` costs some 2 microseconds an operation and as much for
every attribute of a tensor, a dispatch mode 10.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils.weak import WeakTensorKeyDictionary

from .capture import is_capturing
from .errors import ModifiedError, ReplayError, explain
from .storage import is_near

__all__ = [
    "SAME_ON_CPU",
    "Leaf",
    "Normalise",
    "Operation",
    "Source",
    "is_doubtful",
    "is_operation",
    "is_view",
    "normalises_alike",
    "operation",
    "saves_result",
]

Edge = tuple[Any, int]


class Source:
    """Something that gives a tensor when it is asked: the base of this package's handles."""

    __slots__ = ()

    def get(self) -> Tensor:
        """The tensor."""
        raise NotImplementedError


class Operation(NamedTuple):
    """How to repeat a node.

    Attributes:
        compute: ``compute(*inputs)`` is its output.
        inputs: each a `Source`, an edge of the graph, or ``None``.
        compute_: does the same in the memory of its first input.
        cost: in passes over the output; some functions take as long as several.
    """

    compute: Callable[..., Tensor]
    inputs: Sequence[Source | Edge | None]
    compute_: Callable[..., Tensor] | None = None
    cost: float = 1.0


def operation(node: Node, place: int = 0) -> Operation | None:
    """How to repeat ``node`` for its output at ``place``; ``None`` if it is not cheap, or the graph does not tell.

    Example:
        >>> class Handle(Source):
        ...     def __init__(self, tensor): self.tensor = tensor.detach()
        ...     def get(self): return self.tensor
        >>> with torch.autograd.graph.saved_tensors_hooks(Handle, Handle.get):
        ...     y = F.gelu(torch.ones(2, requires_grad=True))
        >>> compute, (source,), *_ = operation(y.grad_fn)
        >>> torch.equal(compute(source.get()), y)
        True
    """
    name = type(node).__name__
    try:
        if place or name in _PARTS:
            part = _PARTS.get(name)
            return None if part is None else part(node, place)
        make = _OPERATIONS.get(name)
        found = make(node) if make is not None else None
    except _MissingError:  # this torch names it otherwise: then it is not recomputed
        return None
    if found is None or name not in _COSTS:
        return found
    return found._replace(cost=_COSTS[name])


class _MissingError(Exception):
    """A node has no attribute of this name."""


def _read(thing: Any, name: str) -> Any:
    """An attribute of a node, of which torch promises nothing.

    Raises:
        _MissingError: there is none.
    """
    try:
        return getattr(thing, name)
    except AttributeError:
        raise _MissingError(name) from None


def is_operation(node: Node) -> bool:
    """Whether `operation` may know how to repeat ``node``."""
    return type(node).__name__ in _OPERATIONS


def is_doubtful(name: str) -> bool:
    """Whether the graph does not tell all about nodes of this name, so that each of them has to be tried."""
    return name == "ConstantPadNdBackward0"


def saves_result(name: str) -> bool:
    """Whether a node of this name saves its output, so that a later change of that is an error."""
    return name in _SAVE_RESULT


def is_view(name: str) -> bool:
    """Whether the output of a node of this name may lie in the memory of its input."""
    return name in _VIEWS or name in _PARTS or name == "ToCopyBackward0"


def _output_size(node: Node) -> torch.Size:
    """The size of the node's first output."""
    return torch.Size(_read(node, "_input_metadata")[0].shape)


class _Number(Source):
    """A number that an operation got, as the tensor of no dimensions that it was made to."""

    __slots__ = ("_tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def get(self) -> Tensor:
        return self._tensor


def _saved(node: Any, name: str) -> Source | None:
    """What the node saved: a handle, or a number that needed none; ``None`` for nothing, or saved by other means."""
    data = _read(_read(node, f"_raw_saved_{name}"), "data")
    if isinstance(data, Tensor):
        return _Number(data) if data.dim() == 0 and not data.requires_grad else None
    return data if isinstance(data, Source) else None


def _from_saved(function: Callable[..., Tensor], *attributes: str) -> Callable[[Any], Operation | None]:
    """A function of the one tensor that the node saves, and of attributes that it saves by name."""

    def make(node: Any) -> Operation | None:
        source = _saved(node, "self")
        options = {attribute: _read(node, f"_saved_{attribute}") for attribute in attributes}
        cost = 3.0 if options.get("approximate") == "tanh" else 1.0
        return None if source is None else Operation(lambda x: function(x, **options), (source,), cost=cost)

    return make


def _from_edge(function: Callable[..., Tensor], *attributes: str) -> Callable[[Any], Operation | None]:
    """A function of the output of the node before."""

    def make(node: Any) -> Operation | None:
        options = {attribute: _read(node, f"_saved_{attribute}") for attribute in attributes}
        return Operation(lambda x: function(x, **options), _read(node, "next_functions")[:1])

    return make


def _product(function: Callable[[Any, Any], Tensor]) -> Callable[[Any], Operation | None]:
    """Of two tensors, each saved only where the other one needs a gradient."""

    def make(node: Any) -> Operation | None:
        inputs: list[Any] = []
        for place, name in enumerate(("self", "other")):
            saved = _saved(node, name) if hasattr(node, f"_raw_saved_{name}") else None
            edge = _read(node, "next_functions")[place]
            if saved is None and edge[0] is None:
                return None
            inputs.append(edge if saved is None else saved)
        return Operation(function, inputs)

    return make


def _sum(sign: int) -> Callable[[Any], Operation | None]:
    def make(node: Any) -> Operation | None:
        if any(edge[0] is None for edge in _read(node, "next_functions")):
            return None  # a number, or a tensor without gradient, of which the graph knows nothing
        alpha = sign * _read(node, "_saved_alpha")
        size = _output_size(node)

        def in_place(a: Tensor, b: Tensor) -> Tensor:
            return a.add_(b, alpha=alpha) if a.shape == size and a.dtype is b.dtype else torch.add(a, b, alpha=alpha)

        return Operation(lambda a, b: torch.add(a, b, alpha=alpha), _read(node, "next_functions"), in_place)

    return make


class Leaf(Source):
    """A parameter or another leaf as a source, where the node did not save it.

    Raises:
        ModifiedError: it was modified in place since (on `get`).
    """

    __slots__ = ("_kind", "_tensor", "_version")

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor.detach()
        self._version = tensor._version
        base = tensor._base
        self._kind = type(tensor if base is None else base)

    @property
    def lasts(self) -> bool:
        """Whether it is a parameter's memory, the same from step to step."""
        return issubclass(self._kind, nn.Parameter)

    def get(self) -> Tensor:
        """The tensor."""
        if self._tensor._version != self._version:
            raise ModifiedError(
                explain(
                    "a parameter whose output is recomputed has been modified by an inplace operation",
                    expected=f"version {self._version}",
                    got=f"version {self._tensor._version}",
                    remedy="run backward before it is changed, or use reversible(ops=False)",
                )
            )
        return self._tensor


def _parameter(edge: Edge) -> Source | None:
    variable = getattr(edge[0], "variable", None)
    return None if variable is None else Leaf(variable)


_EPSILONS = (1e-5, 1e-6, 1e-12, 1e-8, 1e-3, 1e-4, 1e-7, 0.0, torch.finfo(torch.float32).eps)
_eps_of = WeakTensorKeyDictionary()  # of a weight: what its layer's rows have shown
_eps_of_shape: dict[tuple[tuple[int, ...], torch.dtype], float] = {}  # on an accelerator, of layers without one


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, and not a number where the other is not."""
    return torch.equal(torch.nan_to_num(a, nan=-1.0), torch.nan_to_num(b, nan=-1.0))


def _eps_by(x: Tensor, shape: tuple[int, ...], rstd: Tensor) -> float | None:
    """The eps that gives the deviations; ``None`` if none does, or if deviations of a narrow dtype do not tell."""
    rows = x.reshape(-1, *shape)
    deviations = rstd.reshape(-1)

    def matches(eps: float, count: int = 32) -> bool:
        again = torch.native_layer_norm(rows[:count], shape, None, None, eps)[2]
        return _same_bits(again.reshape(-1), deviations[:count])

    eps = next((eps for eps in _EPSILONS if matches(eps)), None)
    if eps is None or not matches(1.01 * eps + 1e-30):
        return eps
    # rows of a large variance do not tell it from others: then it has to fit them all
    return eps if rstd.dtype in (torch.float32, torch.float64) and matches(eps, len(rows)) else None


def _layer_norm(node: Any) -> Operation | None:
    """Its eps is not saved; the result depends on it only by way of rstd, which is."""
    source, rstd = _saved(node, "input"), _saved(node, "result2")
    weight, bias = _saved(node, "weight"), _saved(node, "bias")
    if not isinstance(source, Source) or not isinstance(rstd, Source):
        return None
    shape = tuple(_read(node, "_saved_normalized_shape"))

    parameter = getattr(_read(node, "next_functions")[1][0], "variable", None)
    output = _read(node, "_input_metadata")[0]
    near = is_near(output.device)
    memo: Any = _eps_of_shape if parameter is None else _eps_of
    key = (shape, output.dtype) if parameter is None else parameter
    first = None if near and parameter is None else memo.get(key)  # what is recomputed by it is compared
    if first is None:
        if is_capturing(output.device):  # to find it out reads values
            return None
        first = _eps_by(source.get(), shape, rstd.get())
        if first is None:
            return None
        memo[key] = first

    def compute(x: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        for eps in (first, *_EPSILONS):
            y, _, again = torch.native_layer_norm(x, shape, weight, bias, eps)
            if not near or torch.equal(again, rstd) or _same_bits(again, rstd):
                return y
        raise ReplayError(
            explain(
                "a LayerNorm that is recomputed",
                expected="the standard deviations that it saved",
                got="others",
                remedy="use reversible(ops=False)",
            )
        )

    return Operation(compute, (source, rstd, weight, bias))


def _affine(node: Any) -> tuple[Any, Any] | None:
    """Weight and bias of a normalisation; ``None`` if the bias is unknown, which is not saved."""
    weight = _saved(node, "weight")
    edge = _read(node, "next_functions")[2] if len(_read(node, "next_functions")) > 2 else (None, 0)
    if weight is None and edge[0] is None:
        return None, None
    bias = _parameter(edge)
    return None if weight is None or bias is None else (weight, bias)


def _batch_norm(run: str, eps_name: str) -> Callable[[Any], Operation | None]:
    """Of one backend, whose own operation is run again: another one gives other bits."""

    def make(node: Any) -> Operation | None:
        source, affine = _saved(node, "input"), _affine(node)
        function = getattr(torch, run, None)
        if source is None or affine is None or function is None:
            return None
        eps = _read(node, eps_name)
        if _read(node, "_saved_training"):
            mean, deviation = _saved(node, "result1"), _saved(node, "result2")
            output = _read(node, "_input_metadata")[0]
            if output.device.type == "cpu" and output.dtype in SAME_ON_CPU and mean is not None and deviation is not None:
                return Operation(functools.partial(_normalise_again, eps), (source, *affine, mean, deviation))
            return Operation(functools.partial(_normalise_newly, function, eps), (source, *affine), cost=2.0)
        mean, var = _saved(node, "running_mean"), _saved(node, "running_var")
        if mean is None or var is None:
            return None
        return Operation(
            lambda x, w, b, mean, var: function(x, w, b, mean, var, False, 0.0, eps)[0], (source, *affine, mean, var)
        )

    return make


SAME_ON_CPU = (torch.float32, torch.float64)


def _normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor) -> Tensor:
    """A batch norm in training from the statistics that it saved, in one pass over ``x``.

    On a CPU both modes end in the kernel ``x * (rstd * weight) + (bias - mean * (rstd * weight))``; with a variance of 1 it takes
    the factor as it is given.
    """
    scale = rstd if weight is None else rstd * weight
    return torch.batch_norm(x, scale, bias, mean, torch.ones_like(mean), False, 0.0, 0.0, True)


def _normalise_again(eps: float, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor) -> Tensor:
    """The same bits as the batch norm's."""
    if normalises_alike(x, weight, bias):
        return _normalise(x, weight, bias, mean, rstd)
    return _normalise_newly(torch.native_batch_norm, eps, x, weight, bias)


def _normalise_newly(
    function: Callable[..., tuple[Tensor, ...]], eps: float, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """A batch norm in training that computes its statistics once more; the running ones are not touched."""
    return function(x, weight, bias, None, None, True, 0.0, eps)[0]


def normalises_alike(x: Tensor, *affine: Tensor | None) -> bool:
    """Whether a batch norm on a CPU ends in that kernel; else it computes ``(x - mean) * rstd * weight + bias``."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    dense = x.is_contiguous() or (x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()]))
    return dense and all(parameter is None or parameter.is_contiguous() for parameter in affine)


class Normalise(torch.autograd.Function):
    """A batch norm in training from the statistics that it saved: it saves what that saves, in the same order."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        mean: Tensor,
        rstd: Tensor,
        eps: float,
    ) -> Tensor:
        affine = () if weight is None else (weight,)
        ctx.save_for_backward(x, running_mean, running_var, *affine, mean, rstd)
        ctx.eps, ctx.bias = eps, bias
        return _normalise(x, weight, bias, mean, rstd)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        x, running_mean, running_var, *affine, mean, rstd = ctx.saved_tensors
        asked = list(ctx.needs_input_grad[:3])
        found = torch.ops.aten.native_batch_norm_backward(
            gradients[0], x, affine[0] if affine else None, running_mean, running_var, mean, rstd, True, ctx.eps, asked
        )
        return (*(g if wanted else None for g, wanted in zip(found, asked, strict=True)), None, None, None, None, None)


def _normalised(node: Any) -> Operation | None:
    """Of a call of `Normalise`, which is not the only function of that name."""
    ours = type(node) is Normalise._backward_cls
    if not ours:
        return None
    saved = [_read(raw, "data") for raw in _read(node, "_raw_saved_tensors")]
    bias = None if node.bias is None else Leaf(node.bias)
    if not all(isinstance(source, Source) for source in saved) or not (bias is None or bias.lasts):
        return None
    x, _, _, *affine, mean, rstd = saved
    return Operation(_normalise, (x, affine[0] if affine else None, bias, mean, rstd))


def _group_norm(node: Any) -> Operation | None:
    source, affine = _saved(node, "input"), _affine(node)
    if source is None or affine is None or not hasattr(node, "_saved_eps"):
        return None
    groups, eps = _read(node, "_saved_group"), _read(node, "_saved_eps")
    return Operation(lambda x, w, b: torch.group_norm(x, groups, w, b, eps), (source, *affine))


def _resized(function: Callable[[Tensor, Any], Tensor]) -> Callable[[Any], Operation | None]:
    def make(node: Any) -> Operation | None:
        size = _output_size(node)
        return Operation(lambda x: function(x, size), _read(node, "next_functions")[:1])

    return make


def _cast(node: Any) -> Operation | None:
    if hasattr(_read(node, "next_functions")[0][0], "variable"):
        return None  # a parameter's copy: its own version does not tell whether the parameter has changed
    output = _read(node, "_input_metadata")[0]
    dtype, device = output.dtype, output.device
    return Operation(lambda x: x.to(device, dtype), _read(node, "next_functions")[:1])


def _slice(node: Any) -> Operation | None:
    """Its bounds come as unsigned numbers, or as none; what they mean the output's size confirms."""
    dim, start, end, step = (_signed(_read(node, f"_saved_{name}")) for name in ("dim", "start", "end", "step"))
    whole, size = tuple(_read(node, "_saved_self_sym_sizes")), _output_size(node)
    bounds = slice(start, end, step)
    if len(range(whole[dim])[bounds]) != size[dim]:
        return None
    return Operation(lambda x: x[(slice(None),) * (dim % len(whole)) + (bounds,)], _read(node, "next_functions")[:1])


def _cat(node: Any) -> Operation | None:
    """Parts without a gradient are unknown, and left out where the others fill the output: a cache that is empty yet."""
    dim, size = _signed(_read(node, "_saved_dim")), _output_size(node)
    edges = [(before, place) for before, place in _read(node, "next_functions") if before is not None]
    shapes = [_read(before, "_input_metadata")[place].shape for before, place in edges]
    # an empty vector fits anything, whatever its shape
    if sum(shape[dim] for shape in shapes if len(shape) == len(size)) != size[dim]:
        return None
    return Operation(lambda *parts: torch.cat(parts, dim), edges)


def _split(sizes: str) -> Callable[[Any, int], Operation]:
    def make(node: Any, place: int) -> Operation:
        size, dim = _read(node, sizes), _signed(_read(node, "_saved_dim"))
        return Operation(lambda x: x.split(size, dim)[place], _read(node, "next_functions")[:1], cost=0.0)

    return make


def _unbind(node: Any, place: int) -> Operation:
    dim = _signed(_read(node, "_saved_dim"))
    return Operation(lambda x: x.select(dim, place), _read(node, "next_functions")[:1], cost=0.0)


def _signed(number: Any) -> Any:
    """The graph gives negative numbers as unsigned ones."""
    return number - (1 << 64) if isinstance(number, int) and number >= 1 << 63 else number


def _transpose(node: Any) -> Operation | None:
    dims = _signed(_read(node, "_saved_dim0")), _signed(_read(node, "_saved_dim1"))
    return Operation(lambda x: x.transpose(*dims), _read(node, "next_functions")[:1])


def _permute(node: Any) -> Operation | None:
    dims = [_signed(dim) for dim in _read(node, "_saved_dims")]
    return Operation(lambda x: x.permute(dims), _read(node, "next_functions")[:1])


# Views of which a node has many; ``chunk`` is a split.
_PARTS: dict[str, Callable[[Any, int], Operation]] = {
    "SplitBackward0": _split("_saved_split_size"),
    "SplitWithSizesBackward0": _split("_saved_split_sizes"),
    "UnbindBackward0": _unbind,
}

_VIEWS: dict[str, Callable[[Any], Operation | None]] = {
    "AliasBackward0": _from_edge(lambda x: x),
    "ExpandBackward0": _resized(lambda x, size: x.expand(size)),
    "PermuteBackward0": _permute,
    "ReshapeAliasBackward0": _resized(lambda x, size: x.reshape(size)),
    "SliceBackward0": _slice,
    "SqueezeBackward0": _resized(lambda x, size: x.reshape(size)),
    "SqueezeBackward1": _resized(lambda x, size: x.reshape(size)),
    "TBackward0": _from_edge(lambda x: x.t()),
    "TransposeBackward0": _transpose,
    "UnsafeViewBackward0": _resized(lambda x, size: x.reshape(size)),
    "UnsqueezeBackward0": _resized(lambda x, size: x.reshape(size)),
    "ViewBackward0": _resized(lambda x, size: x.reshape(size)),
}

_OPERATIONS: dict[str, Callable[[Any], Operation | None]] = {
    **_VIEWS,
    "AddBackward0": _sum(1),
    "CatBackward0": _cat,
    "CloneBackward0": _from_edge(lambda x: x.clone(memory_format=torch.contiguous_format)),
    "ConstantPadNdBackward0": _from_edge(lambda x, pad: F.pad(x, tuple(map(_signed, pad))), "pad"),  # with zeros, as is tried
    "CosBackward0": _from_saved(torch.cos),
    "CudnnBatchNormBackward0": _batch_norm("cudnn_batch_norm", "_saved_epsilon"),
    "DivBackward0": _product(torch.div),
    "EluBackward0": _from_saved(
        lambda x, alpha, scale, input_scale: torch.ops.aten.elu(x, alpha, scale, input_scale), "alpha", "scale", "input_scale"
    ),
    "ExpBackward0": _from_edge(torch.exp),
    "GeluBackward0": _from_saved(F.gelu, "approximate"),
    "HardsigmoidBackward0": _from_saved(F.hardsigmoid),
    "HardswishBackward0": _from_saved(F.hardswish),
    "HardtanhBackward0": _from_saved(lambda x, min_val, max_val: F.hardtanh(x, min_val, max_val), "min_val", "max_val"),
    "LeakyReluBackward0": _from_saved(F.leaky_relu, "negative_slope"),
    "LogSigmoidBackward0": _from_saved(F.logsigmoid),
    "MiopenBatchNormBackward0": _batch_norm("miopen_batch_norm", "_saved_epsilon"),
    "MishBackward0": _from_saved(F.mish),
    "MulBackward0": _product(torch.mul),
    "NativeBatchNormBackward0": _batch_norm("native_batch_norm", "_saved_eps"),
    "NativeGroupNormBackward0": _group_norm,
    "NativeLayerNormBackward0": _layer_norm,
    "NormaliseBackward": _normalised,
    "NegBackward0": _from_edge(torch.neg),
    "PowBackward0": _from_saved(torch.pow, "exponent"),
    "ReluBackward0": lambda node: Operation(torch.relu, _read(node, "next_functions")[:1], torch.relu_),
    "RsqrtBackward0": _from_edge(torch.rsqrt),
    "SigmoidBackward0": _from_edge(torch.sigmoid),
    "SiluBackward0": _from_saved(F.silu),
    "SinBackward0": _from_saved(torch.sin),
    "SoftplusBackward0": _from_saved(F.softplus, "beta", "threshold"),
    "SqrtBackward0": _from_edge(torch.sqrt),
    "SubBackward0": _sum(-1),
    "TanhBackward0": _from_edge(torch.tanh),
    "ToCopyBackward0": _cast,
}

_SAVE_RESULT = {f"{name}Backward0" for name in ("Exp", "Relu", "Rsqrt", "Sigmoid", "Sqrt", "Tanh")}

# Others are as fast as memory is. Measured on a CPU; an accelerator hides them all.
_COSTS: dict[str, float] = {
    **dict.fromkeys(_VIEWS, 0.0),
    **dict.fromkeys(("EluBackward0", "LogSigmoidBackward0", "MishBackward0", "SoftplusBackward0"), 3.0),
}
