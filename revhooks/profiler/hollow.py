"""Runs code on hollow tensors (`revhooks.hollow`): the graph, the hooks and all of Python as they are, and no kernel.

What an operation gives is inferred by torch's own fake mode (`torch._subclasses.fake_tensor.FakeTensorMode`) from the shapes of
what it gets. Small tensors that are made of numbers (counters, ranges, states of generators) are what they are, and so is what is
computed from them alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import TargetError, explain, told
from ..fingerprint import fingerprint
from ..hollow import UNKNOWN, Forecast, empty, foretell, is_hollow
from ..private import PREDICTING, require
from ..projection import projection
from ..runtime.handles.codes import fewest
from .forecasts import ANSWERS, for_output, forecast

__all__ = ["Building", "Hollow"]

require(PREDICTING)

SMALL = 1 << 16  # bytes of a tensor that is made of numbers; above, it is hollow too
_REAL = 1 << 20  # bytes of what is computed from such
_log = logging.getLogger("torch._subclasses.fake_tensor")
_aten = torch.ops.aten
_CHANGES_SHAPE = torch.Tag.inplace_view


class _New(NamedTuple):
    """An output with memory of its own."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


class _Alias(NamedTuple):
    """An output in the memory of an input: that very one, if it has no size of its own."""

    place: int
    size: tuple[int, ...] | None
    stride: tuple[int, ...]


class _Outcome(NamedTuple):
    """What an operation gives: leaves, and how they are put together; ``None`` where there is one."""

    leaves: tuple[Any, ...]
    spec: Any

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in self.leaves if type(leaf) is _New)


class Hollow(TorchDispatchMode):
    """Inside, what is made is hollow, and what is done to hollow tensors is not done.

    Example:
        >>> with Hollow():
        ...     layer = torch.nn.Linear(1 << 20, 1 << 20)
        ...     layer(torch.randn(64, 1 << 20)).square().mean().backward()
        >>> layer.weight.grad.shape, is_hollow(layer.weight.grad)
        (torch.Size([1048576, 1048576]), True)
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[Any, _Outcome] = {}
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self._silenced = False
        self._eager: Any = None

    def __enter__(self) -> Hollow:
        """Make first what is made once a process: it is for real."""
        some = torch.zeros(1 << 15)
        fingerprint(some), projection(some, 1), projection(some.double(), 1), fewest()
        self._silenced, _log.disabled = _log.disabled, True  # what cannot be inferred is told by an error
        self._eager = torch.compiler.set_stance("force_eager")  # what is compiled takes memory past all this
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        """Operations are what they are."""
        self._eager.__exit__(*exception)
        _log.disabled = self._silenced
        super().__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Infer what an operation gives."""
        kwargs = kwargs or {}
        if func.is_view or _CHANGES_SHAPE in func.tags:
            return func(*args, **kwargs)
        flat, spec = _flattened(args, kwargs)
        tensors = [leaf for leaf in flat if isinstance(leaf, Tensor)]
        hollow = any(map(is_hollow, tensors))
        if not hollow and self._is_for_real(func, flat, spec, tensors):
            return func(*args, **kwargs)
        if hollow:
            answer = ANSWERS.get(func)
            if answer is not None and len(flat) == len(tensors):  # of a whole tensor
                return answer(*args)
            if func in _IN_PLACE_OF_KERNELS:
                return func(*args, **kwargs)
        return self._made(func, flat, spec, tensors, args)

    def _is_for_real(self, func: Any, flat: list[Any], spec: Any, tensors: list[Tensor]) -> bool:
        if not tensors:
            if not any(isinstance(leaf, torch.Generator) for leaf in flat) and func not in _OF_NUMBERS:
                return self._outcome(func, flat, spec).nbytes == 0
            return self._outcome(func, flat, spec).nbytes <= (SMALL if func in _OF_NUMBERS else _REAL)
        if func._schema.is_mutable:
            return True
        try:
            return self._outcome(func, flat, spec).nbytes <= _REAL
        except TargetError:  # its size depends on values, which are there
            return True

    def _made(self, func: Any, flat: list[Any], spec: Any, tensors: list[Tensor], args: Any) -> Any:
        outcome = self._outcome(func, flat, spec)
        known = forecast(func, args, tensors)
        made: list[Any] = []
        for leaf in outcome.leaves:
            if type(leaf) is _New:
                leaf = empty(leaf.size, leaf.dtype, leaf.stride, leaf.nbytes)
                if known is not UNKNOWN:
                    foretell(leaf, for_output(func, known, len(made)))
            elif type(leaf) is _Alias:
                whole = flat[leaf.place]
                leaf = whole if leaf.size is None else whole.as_strided(leaf.size, leaf.stride, whole.storage_offset())
            made.append(leaf)
        self._touch(func, args, known)
        if torch.Tag.nondeterministic_seeded in func.tags:
            torch.rand(())  # so that the generator has moved
        return made[0] if outcome.spec is None else pytree.tree_unflatten(made, outcome.spec)

    @staticmethod
    def _touch(func: Any, args: Any, known: Forecast) -> None:
        """What an operation writes into: a real tensor is another one then, a hollow one has other values."""
        written = [arg for arg, argument in zip(args, func._schema.arguments, strict=False) if _is_written(argument)]
        if func is _aten.native_batch_norm.default and args[5]:  # which says nothing of it
            written = [args[3], args[4]]
        for tensor in pytree.tree_leaves(written):
            if not isinstance(tensor, Tensor):
                continue
            if is_hollow(tensor):
                foretell(tensor, known)
            elif tensor.dtype is not torch.bool:
                tensor.add_(1)

    def _outcome(self, func: Any, flat: list[Any], spec: Any) -> _Outcome:
        try:
            key = (func, spec, *map(_look, flat))
            known = self._known.get(key)
        except TypeError:  # what cannot be hashed
            return self._infer(func, flat, spec)
        if known is None:
            known = self._known[key] = self._infer(func, flat, spec)
        return known

    def _infer(self, func: Any, flat: list[Any], spec: Any) -> _Outcome:
        with self._fakes:
            fakes = [_fake(leaf) if isinstance(leaf, Tensor) else leaf for leaf in flat]
            args, kwargs = (fakes, {}) if spec is None else pytree.tree_unflatten(fakes, spec)
            try:
                result = func(*args, **kwargs)
            except Exception as error:
                raise _not_inferred(func, error) from error
        result = _corrected(func, args, result)
        leaves, spec = ([result], None) if isinstance(result, Tensor) else pytree.tree_flatten(result)
        places = {fake.untyped_storage()._cdata: i for i, fake in reversed([*enumerate(fakes)]) if isinstance(fake, Tensor)}
        outcome = _Outcome(tuple([_described(leaf, fakes, places) for leaf in leaves]), spec)
        return _with_room(outcome, args) if func in _LOSSES else outcome


def _flattened(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """The leaves, and how they were put together; ``None`` where they are the arguments, as most often."""
    if kwargs or any(isinstance(arg, (list, tuple, dict)) for arg in args):
        return pytree.tree_flatten((args, kwargs))
    return [*args], None


def _look(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.dtype, leaf.shape, leaf.stride()
    return type(leaf), leaf


def _fake(tensor: Tensor) -> Tensor:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        raise TypeError(f"a tensor of layout {tensor.layout}")
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def _described(leaf: Any, fakes: Sequence[Any], places: dict[int, int]) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    storage = leaf.untyped_storage()
    place = places.get(storage._cdata)
    if place is None:
        return _New(tuple(leaf.shape), leaf.stride(), leaf.dtype, storage.nbytes())
    return _Alias(place, None if leaf is fakes[place] else tuple(leaf.shape), leaf.stride())


def _corrected(func: Any, args: Any, result: Any) -> Any:
    """What torch infers otherwise than it is on a CPU."""
    if (
        func in _NORMS
        and args[0].dtype in (torch.bfloat16, torch.float16)
        and any(map(_is_wide, map(args.__getitem__, _NORMS[func])))
    ):
        y, *statistics = result
        return (y, *(one.to(torch.float32) for one in statistics))
    if func is _aten.mkldnn_rnn_layer.default and args[-1]:
        # the workspace of an LSTM, as it was found to grow
        *outputs, workspace = result
        x, width = args[0], args[10]
        each = (10 * width + 5 * max(width, x.shape[-1])) * x.element_size()
        return (*outputs, workspace.new_empty(x.numel() // x.shape[-1] * each + 5 * 4096))
    return result


def _with_room(outcome: _Outcome, args: Any) -> _Outcome:
    """Some losses are reduced in the memory of what they are reduced from, and keep it."""
    (loss,) = outcome.leaves
    size = torch.broadcast_shapes(args[0].shape, args[1].shape)
    return outcome._replace(leaves=(loss._replace(nbytes=size.numel() * loss.dtype.itemsize),))


_LOSSES = {
    _aten.binary_cross_entropy.default, _aten.mse_loss.default, _aten.smooth_l1_loss.default, _aten.soft_margin_loss.default,
}  # fmt: skip


def _is_wide(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.dtype is torch.float32


_NORMS = {  # whose statistics are wide where one of these parameters is
    _aten.native_batch_norm.default: (1, 2, 3, 4),
    _aten.native_group_norm.default: (1, 2),
    _aten.native_layer_norm.default: (2, 3),
}


def _not_inferred(func: Any, error: Exception) -> TargetError:
    return TargetError(
        explain(
            f"operation {func}",
            expected="one whose result's size follows from the sizes of what it gets",
            got=told(error),
            remedy="measure on real tensors (without --fake), or with other arguments",
        )
    )


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


_OF_NUMBERS = {
    _aten.arange.default, _aten.arange.start, _aten.arange.start_step, _aten.eye.default, _aten.eye.m, _aten.full.default,
    _aten.linspace.default, _aten.ones.default, _aten.scalar_tensor.default, _aten.tril_indices.default,
    _aten.triu_indices.default, _aten.zeros.default,
}  # fmt: skip
_IN_PLACE_OF_KERNELS = {_aten.set_.source_Storage, _aten.set_.source_Storage_storage_offset, _aten.set_.source_Tensor}


# -- making a model


class Building(TorchFunctionMode):
    """For code that makes a model: copies of hollow tensors are hollow, and a device that is not here is the CPU.

    Attributes:
        wanted: the first device that was asked for in vain.
    """

    def __init__(self) -> None:
        super().__init__()
        self.wanted: torch.device | None = None

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch's."""
        kwargs = dict(kwargs or {})
        if function is Tensor.__deepcopy__ and is_hollow(args[0]) and type(args[0]) is Tensor:
            return _deep_copy(*args)
        if function in (Tensor.cuda, Tensor.xpu) and not self._is_here(torch.device(function.__name__)):
            return args[0]
        if "device" in kwargs and kwargs["device"] is not None:
            kwargs["device"] = self._here(kwargs["device"])
        if function is Tensor.to:
            args = (args[0], *(self._here(arg) if isinstance(arg, (str, torch.device)) else arg for arg in args[1:]))
        return function(*args, **kwargs)

    def _here(self, device: Any) -> Any:
        asked = torch.device(device) if not isinstance(device, torch.device) else device
        return device if self._is_here(asked) else torch.device("cpu")

    def _is_here(self, device: torch.device) -> bool:
        if device.type in ("cpu", "meta"):
            return True
        self.wanted = self.wanted or device
        return False  # nothing is to be made where memory is dear


def _deep_copy(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    known = memo.get(id(tensor))
    if known is None:
        known = memo[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
    return known
