"""The call that is checked: of copies of a module, so that the module is left as it is."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..generators import Rng
from ..nn.coupling import Coupling
from ..registry import Registration, lookup
from ..runtime.frames.interpose import branches_of, has_registered_parts

__all__ = ["Call", "all_branches", "before", "count_calls", "leaf", "registration_of", "tensors_of"]


class Call:
    """One call of a module, by the method that training calls, from the same state of the generators each time.

    Attributes:
        module: what is called; only copies of it are.
        entry: how the module itself is inverted, if it is.
        method: what is called.
        args, kwargs: with what.
        reset: puts the generators back.
        device: where its tensors are.
    """

    def __init__(
        self,
        module: nn.Module,
        method: str | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        state: Rng,
        device: torch.device,
    ) -> None:
        self.module = module
        self.args = args
        self.kwargs = kwargs
        self.reset = state.restore
        self.device = device
        self.entry = registration_of(module, method)
        self.method = method or "forward"
        if method is None and self.entry is not None and self.entry.method != "forward":
            self.method = self._reached(self.entry.method)

    def _reached(self, name: str) -> str:
        """What training calls: ``forward`` if the registered method is reached by it, else that."""
        copied, reached = self.copy(), []
        copied.__dict__[name] = before(getattr(copied, name), lambda: reached.append(True))
        with contextlib.suppress(Exception), torch.no_grad():
            self.call(copied)
        return "forward" if reached else name

    def copy(self) -> nn.Module:
        """A copy without gradients."""
        copied = copy.deepcopy(self.module)
        copied.zero_grad()
        return copied

    def pinned(self) -> nn.Module:
        """A copy whose branches draw the same numbers in every call: an inverse calls them in another order."""
        module = self.copy()
        for branch in all_branches(module):
            branch.__dict__["forward"] = before(branch.forward, self.reset)
        return module

    def apply(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a copy with these arguments."""
        return module(*args, **kwargs) if self.method == "forward" else getattr(module, self.method)(*args, **kwargs)

    def call(self, module: nn.Module) -> Any:
        """Call a copy with clones of the arguments."""
        return self.apply(module, *pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (self.args, self.kwargs)))

    @property
    def is_low(self) -> torch.dtype | None:
        """The dtype of its streams, if it is one of 16 bits or less."""
        return next((t.dtype for t in tensors_of((self.args, self.kwargs)) if torch.finfo(t.dtype).bits < 32), None)


def registration_of(module: nn.Module, method: str | None = None) -> Registration | None:
    """How a module's method is inverted."""
    marked = getattr(getattr(type(module), method or "forward", None), "__revhooks__", None)
    return marked if marked is not None else lookup(type(module), method)


def all_branches(module: nn.Module) -> list[nn.Module]:
    """The branches of all registered blocks in a module, each once."""
    branches: dict[nn.Module, None] = {}
    for block in module.modules():
        if isinstance(block, Coupling):
            branches.update(dict.fromkeys(step.branch for step in block.steps()))
        elif (entry := registration_of(block)) is not None and (entry.branches is not None or not has_registered_parts(block)):
            branches.update(dict.fromkeys(branches_of(block, entry.branches)))
    return list(branches)


def count_calls(module: nn.Module) -> dict[str, int]:
    """Have the calls of a copy's branches counted, by their names."""
    names = {child: name for name, child in module.named_modules()}
    branches = all_branches(module)
    evaluations = {names[branch]: 0 for branch in branches}

    def count(name: str) -> Callable[[], None]:
        def add() -> None:
            evaluations[name] += 1

        return add

    for branch in branches:
        branch.__dict__["forward"] = before(branch.forward, count(names[branch]))
    return evaluations


def before(forward: Callable[..., Any], action: Callable[[], None]) -> Callable[..., Any]:
    """A function that does something first."""

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        action()
        return forward(*args, **kwargs)

    return wrapped


def leaf(tensor: Tensor) -> Tensor:
    """A copy that gets a gradient, where it can have one."""
    return tensor.detach().clone().requires_grad_(tensor.is_floating_point() or tensor.is_complex())


def tensors_of(tree: Any) -> list[Tensor]:
    """The floating tensors of arguments or outputs."""
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor) and t.is_floating_point()]
