"""Cheap operations, read off the graph: how to run again what made a tensor, from what its nodes save anyway.

A node of the graph names its operation, its arguments (``_saved_*``), what it saved (``_raw_saved_*``) and the nodes
before it. That is all that is needed to repeat a pointwise operation or a normalisation, and costs nothing until a
tensor is saved: a `torch.overrides.TorchFunctionMode` costs some 2 microseconds an operation and as much for
every attribute of a tensor, a dispatch mode 10.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .capture import is_capturing
from .errors import ReplayError, explain
from .saved import Leaf, Source
from .storage import is_near

__all__ = [
    "SAME_ON_CPU",
    "Normalise",
    "is_doubtful",
    "is_operation",
    "is_view",
    "normalises_alike",
    "operation",
    "saves_result",
]

Edge = tuple[Any, int]


# How to repeat a node: ``compute(*inputs)`` is its output, where an input is a `Source`, an edge of the graph, or ``None``; what
# does the same in the memory of its first input, if there is such; and its cost in passes over the output, for some functions
# take as long as several. A plain tuple, for there is one for each node of each recipe.
Operation = tuple[Callable[..., Tensor], Sequence[Source | Edge | None], Callable[..., Tensor] | None, float]


def operation(node: Any, place: int = 0) -> Operation | None:
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
        make = _OPERATIONS.get(name)
        if make is not None and not place:
            return make(node)
        part = _PARTS.get(name)
        return None if part is None else part(node, place)
    except _SourceError as error:
        raise error.args[0] from None
    except AttributeError:  # torch promises nothing of a node's: this one names it otherwise, then it is not recomputed
        return None


class _SourceError(Exception):
    """What a source has raised, of which it is the argument."""


def _value_of(source: Source) -> Tensor:
    try:
        return source.get()
    except AttributeError as error:
        raise _SourceError(error) from None


def is_operation(name: str) -> bool:
    """Whether `operation` may know how to repeat nodes of this name."""
    return name in _OPERATIONS


def is_doubtful(name: str) -> bool:
    """Whether the graph does not tell all about nodes of this name, so that each of them has to be tried."""
    return name == "ConstantPadNdBackward0"


def saves_result(name: str) -> bool:
    """Whether a node of this name saves its output, so that a later change of that is an error."""
    return name in _SAVE_RESULT


def is_view(name: str) -> bool:
    """Whether the output of a node of this name may lie in the memory of its input."""
    return name in _VIEWS or name in _PARTS or name == "ToCopyBackward0"


def _output_size(node: Any) -> torch.Size:
    """The size of the node's first output."""
    return torch.Size(node._input_metadata[0].shape)


class _Number(Source):
    """A number that an operation got, as the tensor of no dimensions that it was made to."""

    __slots__ = ("_tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def get(self) -> Tensor:
        return self._tensor


def _given(data: Any) -> Source | None:
    """What a node saved: a handle, or a number that needed none; ``None`` for nothing, or saved by other means."""
    if isinstance(data, Source):
        return data
    return _Number(data) if isinstance(data, Tensor) and data.dim() == 0 and not data.requires_grad else None


def _saved(node: Any, name: str) -> Source | None:
    return _given(getattr(node, f"_raw_saved_{name}").data)


class _Options:
    """A function with what a node has saved by name, made once for each of such."""

    __slots__ = ("_function", "_made", "_names", "_saved")

    def __init__(self, function: Callable[..., Tensor], names: tuple[str, ...]) -> None:
        self._function = function
        self._names = names
        self._saved = tuple(f"_saved_{name}" for name in names)
        self._made: dict[tuple[Any, ...], Callable[..., Tensor]] = {}

    def of(self, node: Any) -> Callable[..., Tensor]:
        """The function, as the node has run it."""
        if not self._names:
            return self._function
        values = tuple([getattr(node, name) for name in self._saved])
        made = self._made.get(values)
        if made is None:
            made = functools.partial(self._function, **dict(zip(self._names, values, strict=True)))
            if len(self._made) < _MANY:
                self._made[values] = made
        return made


_MANY = 256


def _from_saved(function: Callable[..., Tensor], *names: str, cost: float = 1.0) -> Callable[[Any], Operation | None]:
    """A function of the one tensor that the node saves, and of attributes that it saves by name."""
    options = _Options(function, names)

    def make(node: Any) -> Operation | None:
        source = _given(node._raw_saved_self.data)
        return None if source is None else (options.of(node), (source,), None, cost)

    return make


def _from_edge(
    function: Callable[..., Tensor], *names: str, cost: float = 1.0, compute_: Callable[..., Tensor] | None = None
) -> Callable[[Any], Operation | None]:
    """A function of the output of the node before."""
    options = _Options(function, names)

    def make(node: Any) -> Operation | None:
        return (options.of(node), node.next_functions[:1], compute_, cost)

    return make


def _gelu(node: Any) -> Operation | None:
    exact = node._saved_approximate == "none"
    source = _given(node._raw_saved_self.data)
    return None if source is None else (F.gelu if exact else _gelu_by_tanh, (source,), None, 1.0 if exact else 3.0)


def _gelu_by_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _product(function: Callable[[Any, Any], Tensor]) -> Callable[[Any], Operation | None]:
    """Of two tensors, each saved only where the other one needs a gradient."""

    def make(node: Any) -> Operation | None:
        inputs: list[Any] = []
        for place, name in enumerate(("self", "other")):
            saved = _saved(node, name) if hasattr(node, f"_raw_saved_{name}") else None
            edge = node.next_functions[place]
            if saved is None and edge[0] is None:
                return None
            inputs.append(edge if saved is None else saved)
        return (function, inputs, None, 1.0)

    return make


def _sum(sign: int) -> Callable[[Any], Operation | None]:
    def make(node: Any) -> Operation | None:
        edges = node.next_functions
        if edges[0][0] is None or edges[1][0] is None:
            return None  # a number, or a tensor without gradient, of which the graph knows nothing
        alpha = sign * node._saved_alpha
        size = _output_size(node)

        def in_place(a: Tensor, b: Tensor) -> Tensor:
            return a.add_(b, alpha=alpha) if a.shape == size and a.dtype is b.dtype else torch.add(a, b, alpha=alpha)

        return (lambda a, b: torch.add(a, b, alpha=alpha), edges, in_place, 1.0)

    return make


def _parameter(edge: Edge) -> Source | None:
    variable = getattr(edge[0], "variable", None)
    return None if variable is None else Leaf(variable)


_EPSILONS = (1e-5, 1e-6, 1e-12, 1e-8, 1e-3, 1e-4, 1e-7, 0.0, torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, and not a number where the other is not."""
    return torch.equal(torch.nan_to_num(a, nan=-1.0), torch.nan_to_num(b, nan=-1.0))


def _layer_norm_rows(
    x: Tensor, shape: tuple[int, ...], eps: float, weight: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    y, _, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
    return y, rstd


def _rms_norm_rows(x: Tensor, shape: tuple[int, ...], eps: float, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    y, rstd = torch.ops.aten._fused_rms_norm(x, shape, weight, eps)
    return y, rstd


_Rows = Callable[..., tuple[Tensor, Tensor]]  # what is normalised, and the inverse deviations of its rows


def _eps_by(rows_of: _Rows, x: Tensor, shape: tuple[int, ...], rstd: Tensor) -> float | None:
    """The eps that gives the deviations; ``None`` if none does, or if deviations of a narrow dtype do not tell."""
    rows = x.reshape(-1, *shape)
    deviations = rstd.reshape(-1)

    def matches(eps: float, count: int = 32) -> bool:
        return _same_bits(rows_of(rows[:count], shape, eps)[1].reshape(-1), deviations[:count])

    for eps in filter(matches, _EPSILONS):
        if not matches(1.01 * eps + 1e-30):
            return eps
        # rows of a large variance do not tell it from others: then it has to fit them all
        if rstd.dtype in (torch.float32, torch.float64) and matches(eps, len(rows)):
            return eps
    return None


def _of_rows(rows_of: _Rows, saved_rstd: str, *affine: str) -> Callable[[Any], Operation | None]:
    """A normalisation of rows. Its eps is not saved; the result depends on it only by way of rstd, which is."""
    raw_rstd, raw_affine = f"_raw_saved_{saved_rstd}", [f"_raw_saved_{name}" for name in affine]

    def recipe(node: Any) -> Operation | None:
        source = _given(node._raw_saved_input.data)
        if source is None:
            return None
        parameters = [_given(getattr(node, name).data) for name in raw_affine]
        parameter = getattr(node.next_functions[1][0], "variable", None)
        key = id(parameter) if parameter is not None else _key_without_weight(rows_of, node)
        known = _row_norms.get(key)
        if known is not None and not known.is_of(rows_of, parameter):
            known = None
        if known is None or known.may_be_told:
            rstd = _given(getattr(node, raw_rstd).data)
            if rstd is None or is_capturing(node._input_metadata[0].device):  # to find it out reads values
                return None
            known = _learn_rows(
                rows_of, node, _value_of(source), _value_of(rstd), parameter, 1 if known is None else known.tries + 1
            )
            if len(_row_norms) > _MANY * _MANY:
                _row_norms.clear()
            if key is not None:
                _row_norms[key] = known
        if known.compute is None:
            return None
        if not known.near:
            return (known.compute, (source, *parameters), None, 1.0)
        rstd = _given(getattr(node, raw_rstd).data)
        return None if rstd is None else (known.compute, (source, *parameters, rstd), None, 1.0)

    return recipe


def _key_without_weight(rows_of: _Rows, node: Any) -> object:
    """On an accelerator what others like it have shown counts; where values are near it is found out each time."""
    output = node._input_metadata[0]
    return None if is_near(output.device) else (rows_of, tuple(node._saved_normalized_shape), output.dtype)


def _learn_rows(rows_of: _Rows, node: Any, x: Tensor, rstd: Tensor, parameter: Tensor | None, tries: int) -> _RowNorm:
    """How a layer normalises, as its rows show."""
    shape = tuple(node._saved_normalized_shape)
    eps = _eps_by(rows_of, x, shape, rstd)
    compute = None if eps is None else functools.partial(_normalise_rows, rows_of, shape, eps)
    weight = None if parameter is None else weakref.ref(parameter)
    return _RowNorm(weight, rows_of, compute, is_near(node._input_metadata[0].device), tries)


class _RowNorm(NamedTuple):
    """How a layer normalises, as its rows have shown; ``compute`` is ``None`` if they have not."""

    weight: Any
    rows_of: _Rows
    compute: Callable[..., Tensor] | None
    near: bool
    tries: int

    def is_of(self, rows_of: _Rows, parameter: Tensor | None) -> bool:
        """Whether it is of this layer; not of one that is gone."""
        return self.rows_of is rows_of and (self.weight is None or self.weight() is parameter)

    @property
    def may_be_told(self) -> bool:
        """Whether it is not known, and was not looked for often enough."""
        return self.compute is None and self.tries < _TRIES


_TRIES = 4  # to look reads values, which makes the host wait
_row_norms: dict[Any, _RowNorm] = {}


def _normalise_rows(rows_of: _Rows, shape: tuple[int, ...], first: float, x: Tensor, *given: Tensor | None) -> Tensor:
    """With the parameters that it takes, and where values are near with the deviations that have to come out."""
    count = _AFFINE[rows_of]
    parameters, rstd = given[:count], given[count:]
    for eps in (first, *_EPSILONS):
        y, again = rows_of(x, shape, eps, *parameters)
        if not rstd or torch.equal(again, rstd[0]) or _same_bits(again, rstd[0]):  # type: ignore[arg-type] # it is there
            return y
    raise ReplayError(
        explain(
            "a normalisation that is recomputed",
            expected="the standard deviations that it saved",
            got="others",
            remedy="use reversible(ops=False)",
        )
    )


_AFFINE = {_layer_norm_rows: 2, _rms_norm_rows: 1}  # how many parameters they take


def _affine(node: Any) -> tuple[Any, Any] | None:
    """Weight and bias of a normalisation; ``None`` if the bias is unknown, which is not saved."""
    weight = _saved(node, "weight")
    edge = node.next_functions[2] if len(node.next_functions) > 2 else (None, 0)
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
        eps = getattr(node, eps_name)
        if node._saved_training:
            mean, deviation = _saved(node, "result1"), _saved(node, "result2")
            output = node._input_metadata[0]
            if output.device.type == "cpu" and output.dtype in SAME_ON_CPU and mean is not None and deviation is not None:
                return (functools.partial(_normalise_again, eps), (source, *affine, mean, deviation), None, 1.0)
            return (functools.partial(_normalise_newly, function, eps), (source, *affine), None, 2.0)
        mean, var = _saved(node, "running_mean"), _saved(node, "running_var")
        if mean is None or var is None:
            return None
        return (
            lambda x, w, b, mean, var: function(x, w, b, mean, var, False, 0.0, eps)[0],
            (source, *affine, mean, var),
            None,
            1.0,
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
    saved = [raw.data for raw in node._raw_saved_tensors]
    bias = None if node.bias is None else Leaf(node.bias)
    if not all(isinstance(source, Source) for source in saved) or not (bias is None or bias.lasts):
        return None
    x, _, _, *affine, mean, rstd = saved
    return (_normalise, (x, affine[0] if affine else None, bias, mean, rstd), None, 1.0)


def _group_norm(node: Any) -> Operation | None:
    source, affine = _saved(node, "input"), _affine(node)
    if source is None or affine is None or not hasattr(node, "_saved_eps"):
        return None
    groups, eps = node._saved_group, node._saved_eps
    return (lambda x, w, b: torch.group_norm(x, groups, w, b, eps), (source, *affine), None, 1.0)


def _resized(node: Any) -> Operation | None:
    return (functools.partial(torch.reshape, shape=_output_size(node)), node.next_functions[:1], None, 0.0)


def _expanded(node: Any) -> Operation | None:
    size = _output_size(node)
    return (lambda x: x.expand(size), node.next_functions[:1], None, 0.0)


def _cast(node: Any) -> Operation | None:
    edges = node.next_functions
    if hasattr(edges[0][0], "variable"):
        return None  # a parameter's copy: its own version does not tell whether the parameter has changed
    output = node._input_metadata[0]
    return (functools.partial(_cast_to, output.device, output.dtype), edges[:1], None, 1.0)


def _cast_to(device: torch.device, dtype: torch.dtype, x: Tensor) -> Tensor:
    return x.to(device, dtype)


def _slice(node: Any) -> Operation | None:
    """Its bounds come as unsigned numbers, or as none; what they mean the output's size confirms."""
    dim, start, end, step = (_signed(getattr(node, f"_saved_{name}")) for name in ("dim", "start", "end", "step"))
    whole, size = tuple(node._saved_self_sym_sizes), _output_size(node)
    bounds = slice(start, end, step)
    if len(range(whole[dim])[bounds]) != size[dim]:
        return None
    return (lambda x: x[(slice(None),) * (dim % len(whole)) + (bounds,)], node.next_functions[:1], None, 0.0)


def _cat(node: Any) -> Operation | None:
    """Parts without a gradient are unknown, and left out where the others fill the output: a cache that is empty yet."""
    dim, size = _signed(node._saved_dim), _output_size(node)
    edges = [(before, place) for before, place in node.next_functions if before is not None]
    shapes = [before._input_metadata[place].shape for before, place in edges]
    # an empty vector fits anything, whatever its shape
    if sum(shape[dim] for shape in shapes if len(shape) == len(size)) != size[dim]:
        return None
    return (lambda *parts: torch.cat(parts, dim), edges, None, 1.0)


def _split(sizes: str) -> Callable[[Any, int], Operation]:
    def make(node: Any, place: int) -> Operation:
        size, dim = getattr(node, sizes), _signed(node._saved_dim)
        return (lambda x: x.split(size, dim)[place], node.next_functions[:1], None, 0.0)

    return make


def _unbind(node: Any, place: int) -> Operation:
    dim = _signed(node._saved_dim)
    return (lambda x: x.select(dim, place), node.next_functions[:1], None, 0.0)


def _signed(number: Any) -> Any:
    """The graph gives negative numbers as unsigned ones."""
    return number - (1 << 64) if isinstance(number, int) and number >= 1 << 63 else number


def _transpose(node: Any) -> Operation | None:
    dims = _signed(node._saved_dim0), _signed(node._saved_dim1)
    return (lambda x: x.transpose(*dims), node.next_functions[:1], None, 0.0)


def _permute(node: Any) -> Operation | None:
    dims = [_signed(dim) for dim in node._saved_dims]
    return (lambda x: x.permute(dims), node.next_functions[:1], None, 0.0)


# Views of which a node has many; ``chunk`` is a split.
_PARTS: dict[str, Callable[[Any, int], Operation]] = {
    "SplitBackward0": _split("_saved_split_size"),
    "SplitWithSizesBackward0": _split("_saved_split_sizes"),
    "UnbindBackward0": _unbind,
}

_VIEWS: dict[str, Callable[[Any], Operation | None]] = {
    "AliasBackward0": _from_edge(lambda x: x, cost=0.0),
    "ExpandBackward0": _expanded,
    "PermuteBackward0": _permute,
    "ReshapeAliasBackward0": _resized,
    "SliceBackward0": _slice,
    "SqueezeBackward0": _resized,
    "SqueezeBackward1": _resized,
    "TBackward0": _from_edge(torch.t, cost=0.0),
    "TransposeBackward0": _transpose,
    "UnsafeViewBackward0": _resized,
    "UnsqueezeBackward0": _resized,
    "ViewBackward0": _resized,
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
        lambda x, alpha, scale, input_scale: torch.ops.aten.elu(x, alpha, scale, input_scale),
        "alpha",
        "scale",
        "input_scale",
        cost=3.0,
    ),
    "ExpBackward0": _from_edge(torch.exp),
    "FusedRmsNormBackward0": _of_rows(_rms_norm_rows, "result1", "weight"),
    "GeluBackward0": _gelu,
    "HardsigmoidBackward0": _from_saved(F.hardsigmoid),
    "HardswishBackward0": _from_saved(F.hardswish),
    "HardtanhBackward0": _from_saved(lambda x, min_val, max_val: F.hardtanh(x, min_val, max_val), "min_val", "max_val"),
    "LeakyReluBackward0": _from_saved(F.leaky_relu, "negative_slope"),
    "LogSigmoidBackward0": _from_saved(F.logsigmoid, cost=3.0),
    "MiopenBatchNormBackward0": _batch_norm("miopen_batch_norm", "_saved_epsilon"),
    "MishBackward0": _from_saved(F.mish, cost=3.0),
    "MulBackward0": _product(torch.mul),
    "NativeBatchNormBackward0": _batch_norm("native_batch_norm", "_saved_eps"),
    "NativeGroupNormBackward0": _group_norm,
    "NativeLayerNormBackward0": _of_rows(_layer_norm_rows, "result2", "weight", "bias"),
    "NormaliseBackward": _normalised,
    "NegBackward0": _from_edge(torch.neg),
    "PowBackward0": _from_saved(torch.pow, "exponent"),
    "ReluBackward0": _from_edge(torch.relu, compute_=torch.relu_),
    "RsqrtBackward0": _from_edge(torch.rsqrt),
    "SigmoidBackward0": _from_edge(torch.sigmoid),
    "SiluBackward0": _from_saved(F.silu),
    "SinBackward0": _from_saved(torch.sin),
    "SoftplusBackward0": _from_saved(F.softplus, "beta", "threshold", cost=3.0),
    "SqrtBackward0": _from_edge(torch.sqrt),
    "SubBackward0": _sum(-1),
    "TanhBackward0": _from_edge(torch.tanh),
    "ToCopyBackward0": _cast,
}

_SAVE_RESULT = {f"{name}Backward0" for name in ("Exp", "Relu", "Rsqrt", "Sigmoid", "Sqrt", "Tanh")}
