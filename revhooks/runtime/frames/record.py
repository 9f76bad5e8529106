"""What a frame of a block whose law is not known notes: its branches' calls, and the inputs that its inverse gives back."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ...kinds import clone_of, copy_of, leaf_of
from ...storage import Geometry, is_opaque, restride, stride_of, version_of, version_probe
from ..calls.state import CallState
from ..policy.guard import Sample
from ..policy.plan import facts_of
from ..tree import map_tensors, tensors_of
from .frame import Frame, Head
from .slots import Slots

__all__ = ["Call", "Constant", "Input", "as_leaves", "copied", "detached", "not_a_leaf"]


class Call:
    """One call of a branch in forward."""

    __slots__ = (
        "_watches",
        "args",
        "child",
        "differentiated",
        "fills",
        "grads",
        "output",
        "sample",
        "shapes",
        "slots",
        "state",
        "strides",
    )

    def __init__(self, frame: Frame, child: nn.Module, arguments: Any) -> None:
        tensors = tensors_of(arguments)
        self.child = child
        self.slots = Slots(frame, 0)
        self.state = CallState(frame, (child,), facts_of(child), local=True)
        self.shapes = [None if is_opaque(t) else t.shape for t in tensors]
        self.strides = [stride_of(t) for t in tensors]
        self.grads = [t.requires_grad for t in tensors]
        self.sample: Sample | None = frame.run.guard.sample(tensors[0]) if tensors else None
        # a pre-hook (old weight norm, FSDP) runs outside of ``forward``, and an inverse runs it without grad
        self.fills = not child._forward_pre_hooks and not any(map(is_opaque, tensors))
        self.differentiated = False  # forward takes a gradient through it, and the graph has told
        self._watches: list[Any] = []
        # only while the inverse is tried: what went in and out
        self.args: list[Tensor] = []
        self.output: Any = None

    @property
    def takes_gradient(self) -> bool:
        """Whether forward takes a gradient through it, so that its result alone cannot stand for it in a replay."""
        return self.differentiated or self.slots.asked

    def record(self, arguments: Any, output: Any) -> None:
        """For the try of the inverse: copies, as the block, or its inverse, may write into them; and watch for gradients.

        A gradient that is taken in forward shows in what it reads; where nothing is saved, it shows in the graph only.
        """
        inputs = tensors_of(arguments)
        self.args = [copy_of(t) for t in inputs]
        self.output = map_tensors(copied, output)
        outputs = [t for t in tensors_of(output) if t.requires_grad]
        self.differentiated = any(one is other for one in outputs for other in inputs)
        nodes = {t.grad_fn for t in outputs if t.grad_fn is not None}
        self._watches = [node.register_prehook(self._seen) for node in nodes]

    def _seen(self, _: Any) -> None:
        self.differentiated = True

    def forget(self) -> None:
        """After the try."""
        for watch in self._watches:
            watch.remove()
        self._watches, self.args, self.output = [], [], None


class Input:
    """A tensor argument that the inverse gives back."""

    __slots__ = ("geometry", "grad", "head", "keeps_zeros", "probe", "sample", "value", "version", "zeros")

    def __init__(self, frame: Frame, place: int, tensor: Tensor, *, keeps_zeros: bool) -> None:
        self.keeps_zeros = keeps_zeros
        self.geometry = Geometry.of(tensor)
        self.grad = tensor.requires_grad
        self.probe = version_probe(tensor)
        self.version = version_of(tensor)
        value = frame.link(tensor, place, keeps_zeros=keeps_zeros)
        self.head = Head(frame.run, tensor) if value is None else None
        self.zeros = self.head is not None and not keeps_zeros and frame.has_zeros(tensor, place)
        self.sample = frame.sample(tensor) if value is not None else None
        self.value = weakref.ref(value) if value is not None else None


class Constant:
    """A part of an output that is no tensor."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


def not_a_leaf(tensor: Tensor) -> Tensor:
    """A copy that code may write into, with the ``requires_grad`` of the original."""
    return clone_of(leaf_of(tensor, requires_grad=tensor.requires_grad))


def detached(tensor: Tensor) -> Tensor:
    """The tensor without its graph, with its ``requires_grad``."""
    return leaf_of(tensor, requires_grad=tensor.requires_grad)


def copied(tensor: Tensor) -> Tensor:
    """A detached copy."""
    return copy_of(tensor)


def as_leaves(tree: Any, strides: list[tuple[int, ...] | None], grads: list[bool], written: Callable[[Tensor], bool]) -> Any:
    """The tensors as leaves, in the strides and with the ``requires_grad`` that they had in forward.

    An inverse may write later into what is ``written``: that is copied.
    """
    looks = iter(zip(strides, grads, strict=True))

    def leaf(tensor: Tensor) -> Tensor:
        stride, grad = next(looks)
        fresh = restride(tensor.clone() if written(tensor) else tensor, stride)
        return leaf_of(fresh, requires_grad=grad) if grad or fresh.requires_grad else fresh

    return map_tensors(leaf, tree)
