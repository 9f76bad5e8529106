"""Twins: layers of `revhooks.nn` that are made of the branches of another library's block, and run in its place.

What a library's coupling computes is what ours computes, so it is given what the runtime knows of ours: that a step back takes
one branch, and that the streams of a chain need not be joined. A twin is made at the first call of its block, holds the block's
modules and not the block, and goes with it; the block, its parameters and its state are not touched.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from ..functional import Law
from ..nn.coupling import Coupling, Step
from ..quiet import vouch

__all__ = ["Branch", "ChainTwin", "OtherOutputError", "is_bare", "twin_of", "unbracketed"]

_T = TypeVar("_T", bound=nn.Module)
_TWINS: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[object, ...], nn.Module]] = weakref.WeakKeyDictionary()


def twin_of(block: nn.Module, looks: tuple[object, ...], make: Callable[[], _T]) -> _T:
    """The twin of a block: the one that it has, while what it is made of (``looks``) is the same; else a new one.

    The children of a twin are its own: a `Branch` is around each module of the block.

    Example:
        >>> block = nn.Linear(2, 2)
        >>> twin = twin_of(block, (1,), nn.Identity)
        >>> twin_of(block, (1,), nn.Identity) is twin, twin_of(block, (2,), nn.Identity) is twin
        (True, False)
    """
    known = _TWINS.get(block)
    if known is None or len(known[0]) != len(looks) or any(a is not b and a != b for a, b in zip(known[0], looks, strict=True)):
        twin = make()
        vars(twin)["__revhooks_block__"] = weakref.ref(block)
        known = _TWINS[block] = looks, twin
    found: Any = known[1]
    if found.training is not block.training:
        for module in (found, *found.children()):  # which are ours; what is below is the block's
            module.training = block.training
    return found  # type: ignore[no-any-return]


def is_bare(modules: Sequence[nn.Module]) -> bool:
    """Whether no hooks stand on these modules, which a twin does not call.

    Example:
        >>> block = nn.Linear(2, 2)
        >>> before = is_bare([block])
        >>> handle = block.register_forward_hook(print)
        >>> before, is_bare([block])
        (True, False)
    """
    return not any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        for module in modules
    )


def unbracketed(method: Callable[..., Any]) -> Callable[..., Any]:
    """A library's own method, without what stands around it while it is registered."""
    while hasattr(method, "__revhooks_bracket__"):  # it may have been named, too
        method = method.__wrapped__  # type: ignore[attr-defined]
    return method


class OtherOutputError(Exception):
    """A branch returned no tensor: the library's own code has to run."""


@vouch
class Branch(nn.Module):
    """A module as a branch of a twin, called as its library calls it.

    Args:
        net: the module.
        direct: by its ``forward``, past its hooks.
        before: what is called before it.
    """

    def __init__(self, net: nn.Module, *, direct: bool = False, before: Callable[[], object] | None = None) -> None:
        super().__init__()
        self.net = net
        self.direct = direct
        self.before = before

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the module computes.

        Raises:
            OtherOutputError: that is no tensor.
        """
        if self.before is not None:
            self.before()
        found = self.net.forward(x, *args, **kwargs) if self.direct else self.net(x, *args, **kwargs)
        if not isinstance(found, Tensor):
            raise OtherOutputError
        return found


class ChainTwin(Coupling):
    """Steps into the first and the second stream by turns, as `revhooks.nn.ReversibleSequential` makes them.

    Args:
        branches: of the steps.
        laws: of the steps.
        dim: along which the input is split.
    """

    def __init__(self, branches: Sequence[nn.Module], laws: Sequence[Law], *, dim: int) -> None:
        super().__init__(dim=dim)
        for i, branch in enumerate(branches):
            self.add_module(str(i), branch)
        self._steps = [Step(branch, 1 - i % 2, i % 2, law) for i, (branch, law) in enumerate(zip(branches, laws, strict=True))]

    def steps(self) -> Sequence[Step]:
        """One a branch."""
        return self._steps

    def takes(self, x: object) -> bool:
        """Whether it is a tensor that can be split into equal streams: the library tells what it thinks of others."""
        return isinstance(x, Tensor) and -x.dim() <= self.dim < x.dim() and x.shape[self.dim] % 2 == 0
