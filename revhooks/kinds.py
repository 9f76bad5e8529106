"""Tensors of every kind, as what they are: sparse, nested, quantized, subclasses, with attributes of their own (Rule 12).

What is kept of a tensor, what it is made of, a copy of it, and whether two have the same values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .storage import PLAIN_TYPES, Geometry, is_opaque

__all__ = [
    "clone_of",
    "copy_of",
    "is_allocated",
    "leaf_of",
    "parts_of",
    "same_values",
    "without_graph",
]


def is_allocated(tensor: Tensor) -> bool:
    """Whether the memory that the tensor stands for is there; frameworks resize it to nothing between calls.

    Example:
        >>> x = torch.zeros(4)
        >>> is_allocated(x), x.untyped_storage().resize_(0) is None, is_allocated(x)
        (True, False, False)
    """
    if type(tensor) not in PLAIN_TYPES:
        return all(map(is_allocated, parts_of(tensor) or ()))
    if tensor.layout is not torch.strided or tensor.is_nested:  # nobody resizes those
        return True
    if tensor.is_meta or not tensor.numel():
        return True
    there = tensor.untyped_storage().nbytes()
    if tensor.nbytes == there and tensor.is_contiguous() and not tensor.storage_offset():
        return True
    return Geometry.of(tensor).interval[1] * tensor.element_size() <= there


def without_graph(tensor: Tensor) -> Tensor:
    """What is kept of a tensor (Rule 2): the very object if it needs no gradient, else an alias without its graph.

    Backward gets such an object as it is, with its class and its attributes: a quantised weight carries its scale so.
    """
    if type(tensor) in PLAIN_TYPES:
        return tensor.detach() if tensor.requires_grad else tensor
    with torch._C.DisableTorchFunctionSubclass():
        return _alias(tensor) if tensor.requires_grad else tensor


def leaf_of(tensor: Tensor, *, requires_grad: bool) -> Tensor:
    """An alias of the tensor, of the same class, that has no graph."""
    if type(tensor) in PLAIN_TYPES:
        return tensor.detach().requires_grad_(requires_grad)
    with torch._C.DisableTorchFunctionSubclass():
        return _alias(tensor).requires_grad_(requires_grad)


def _alias(tensor: Tensor) -> Tensor:
    """A detached alias of a subclass, with the attributes."""
    alias, kind = tensor.detach(), type(tensor)
    if type(alias) is not kind:
        if _dispatches(kind):  # what it shows is not what it has
            return alias
        alias = alias.as_subclass(kind)
    return _like(alias, tensor)


def _like(fresh: Tensor, tensor: Tensor) -> Tensor:
    """Give it the attributes of another tensor."""
    for name, value in tensor.__dict__.items():
        fresh.__dict__.setdefault(name, value)
    return fresh


def parts_of(tensor: Tensor) -> list[Tensor] | None:
    """The tensors that one which is left alone is made of; ``None`` if that is not known.

    Example:
        >>> [part.tolist() for part in parts_of(torch.eye(2).to_sparse())]
        [[[0, 1], [0, 1]], [1.0, 1.0]]
    """
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():  # nothing is saved for it
        flatten = getattr(tensor, "__tensor_flatten__", None)
        if flatten is not None:
            parts = [getattr(tensor, name) for name in flatten()[0]]
            return [part for part in parts if isinstance(part, Tensor)]  # a mesh may be among them
        if tensor.is_nested:
            return list(tensor.unbind())
        getters = _PARTS.get(tensor.layout)
        if getters is not None:
            return [getattr(tensor, name)() for name in getters]
        if tensor.is_quantized:
            return [tensor.int_repr()]
        if type(tensor) not in PLAIN_TYPES:
            return None if _dispatches(type(tensor)) else [tensor.as_subclass(Tensor)]
        return [tensor.resolve_conj().resolve_neg()] if tensor.is_conj() or tensor.is_neg() else None


_COLUMNS, _ROWS = ("ccol_indices", "row_indices", "values"), ("crow_indices", "col_indices", "values")
_PARTS: dict[torch.layout, tuple[str, ...]] = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: _ROWS,
    torch.sparse_bsr: _ROWS,
    torch.sparse_csc: _COLUMNS,
    torch.sparse_bsc: _COLUMNS,
    torch._mkldnn: ("to_dense",),  # type: ignore[attr-defined]
}


def _dispatches(kind: type) -> bool:
    """Whether a subclass takes the operations over: its own elements are then not those that it shows."""
    return getattr(kind, "__torch_dispatch__", None) is not getattr(Tensor, "__torch_dispatch__", None)


def copy_of(tensor: Tensor) -> Tensor:
    """A copy without a graph; the tensor itself where its memory is not there, or its class cannot copy."""
    if not is_allocated(tensor):
        return tensor
    try:
        return _like(clone_of(leaf_of(tensor, requires_grad=False)), tensor)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):  # NotImplementedError among them
        if not is_opaque(tensor):
            raise
        return tensor


def clone_of(tensor: Tensor) -> Tensor:
    """A clone of the same kind: of a subclass, and a lazy conjugate or negative again."""
    if type(tensor) not in PLAIN_TYPES:
        clone, kind = tensor.clone(), type(tensor)
        return _like(clone if type(clone) is kind or _dispatches(kind) else clone.as_subclass(kind), tensor)
    if tensor.is_conj():
        return clone_of(tensor.conj()).conj()
    if tensor.is_neg():
        return torch._neg_view(clone_of(torch._neg_view(tensor)))
    return _like(tensor.clone(), tensor)


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one kind have the same elements; two NaNs are the same.

    What cannot be compared counts as the same: its version tells of changes.

    Example:
        >>> same_values(torch.eye(2).to_sparse(), torch.eye(2).to_sparse()), same_values(torch.ones(1), torch.zeros(1))
        (True, False)
    """
    if a is b:
        return True
    if type(a) in PLAIN_TYPES and type(b) in PLAIN_TYPES:
        a, b = a.detach(), b.detach()
        a, b = a.resolve_conj().resolve_neg(), b.resolve_conj().resolve_neg()
    if is_opaque(a) or is_opaque(b):
        if is_opaque(a) is not is_opaque(b):
            return False
        try:
            ours, theirs = parts_of(a), parts_of(b)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError):
            return True
        if ours is None or theirs is None:
            return True
        return len(ours) == len(theirs) and all(map(same_values, ours, theirs))
    if a.shape != b.shape:
        return False
    if a.is_meta or not (is_allocated(a) and is_allocated(b)):
        return True
    return bool(((a == b) | ((a != a) & (b != b))).all())
