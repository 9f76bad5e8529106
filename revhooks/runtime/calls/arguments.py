"""Arguments of a call, held until it is run again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ...kinds import leaf_of, without_graph
from ...saved import modified
from ...storage import Held, is_opaque, version_of
from ..tree import LEAVES, flatten
from .objects import Former, Objects, Seen

if TYPE_CHECKING:
    from ..handles.protocols import Keeper

__all__ = ["Argument", "Arguments", "Thaw", "runs_out"]

Give = Callable[[], Tensor]


class Arguments:
    """Arguments that are held for the replay: tensors that need a gradient detached, everything else as it is.

    Made before the call. Containers are given as what they were, in copies.

    Args:
        run: whose ledger counts them.
        args: positional arguments.
        kwargs: keyword arguments.
        save: saves a tensor in a surrounding frame instead, and returns a function that gives it back.
    """

    __slots__ = ("_again", "_leaves", "_objects", "_run")

    def __init__(
        self, run: Keeper, args: tuple[Any, ...], kwargs: dict[str, Any], save: Callable[[Tensor], Give] | None = None
    ) -> None:
        self._run = run
        self._objects: Objects | None = None  # of those among them that the call has not changed
        leaves = [*args, *kwargs.values()]
        if LEAVES.issuperset(map(type, leaves)):
            self._again: Callable[[Iterable[Any]], Any] = functools.partial(_call_of, len(args), tuple(kwargs))
        else:
            leaves, self._again = flatten((args, kwargs))
        hold = self._holding(save)
        self._leaves = [hold(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def _holding(self, save: Callable[[Tensor], Give] | None) -> Callable[[Tensor], Argument | _SavedArgument]:
        """Holds tensors, the same one once: calls may ask whether two arguments are one, as attention does of itself."""
        held: dict[int, Argument | _SavedArgument] = {}

        def hold(tensor: Tensor) -> Argument | _SavedArgument:
            key = id(tensor)
            if key not in held:
                if save is None or is_opaque(tensor):
                    held[key] = Argument(self._run, tensor, "an argument")
                else:
                    held[key] = _SavedArgument(save(tensor), tensor)
            return held[key]

        return hold

    def give_former(self, objects: Objects, save: Callable[[Tensor], Give] | None = None) -> None:
        """After the call: of the objects among them give those that it has changed as they were; others may change later."""
        changed = objects.changed()
        if changed:
            formers = objects.formers(self._holding(save), changed)
            self._leaves = [formers.get(id(leaf), leaf) for leaf in self._leaves]
        self._objects = None if changed else objects

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that it holds."""
        leaves = self._leaves
        former = next((leaf for leaf in leaves if isinstance(leaf, Former)), None)
        if former is not None:
            leaves = [*leaves, *former.parts()]
        arguments = (leaf for leaf in leaves if isinstance(leaf, Argument))
        return (argument.held.tensor for argument in arguments if isinstance(argument.held, Held))

    def again(self, label: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments: of tensors that need a gradient fresh leaves.

        Raises:
            ModifiedError: one was modified in place since.
        """
        if self._objects is not None and self._objects.changed():
            self.give_former(self._objects)
        args, kwargs = self._again(map(Thaw(lambda part: part.again(label)), self._leaves))
        return args, kwargs


class Thaw:
    """Gives a thing for what stands for it: the same for the same, and an argument as it was before its call.

    Args:
        again: gives the tensor for what stands for one.
    """

    __slots__ = ("_again", "_copies", "_given")

    def __init__(self, again: Callable[[Any], Tensor]) -> None:
        self._again = again
        self._given: dict[int, Tensor] = {}
        self._copies: dict[int, Any] = {}

    def __call__(self, part: Any) -> Any:
        """The thing; a function that names itself would be a cycle."""
        if type(part) in _STANDING:
            fresh = self._given.get(id(part))
            if fresh is None:
                fresh = self._given[id(part)] = self._again(part)
            return fresh
        return part.again(self, self._copies) if type(part) is Former else part


def _call_of(size: int, names: tuple[str, ...], leaves: Iterable[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments that are no containers."""
    parts = tuple(leaves)
    return parts[:size], dict(zip(names, parts[size:], strict=True))


def runs_out(leaves: Sequence[Any]) -> bool:
    """Whether an iterator is among the arguments: the call uses it up, and a replay would find it at its end."""
    return any(hasattr(type(leaf), "__next__") for leaf in leaves)


class Argument:
    """A tensor that a call depends on, held until it is repeated; ``what`` it is."""

    __slots__ = ("attributes", "held", "requires_grad", "version", "what")

    def __init__(self, run: Keeper, tensor: Tensor, what: str) -> None:
        self.what = what
        self.attributes = dict(tensor.__dict__)
        self.requires_grad = tensor.requires_grad
        # in memory, as what it is
        whole = self.attributes or is_opaque(tensor) or (type(tensor) is not Tensor and isinstance(tensor, Parameter))
        self.held = Held(run.ledger, _kept(tensor)) if whole else run.hold(tensor)
        self.version = version_of(tensor)

    @property
    def modified(self) -> bool:
        """Whether it was, in place, since."""
        return bool(self.held.version != self.version)

    def hollow(self) -> Tensor:
        """One without data in its place, so that whatever reads it is found out."""
        return torch.empty_like(self.held.tensor, device="meta", requires_grad=self.requires_grad)

    def again(self, label: str) -> Tensor:
        """The tensor: as the object that it was, if it needs no gradient, else as a fresh leaf.

        Raises:
            ModifiedError: it was modified in place since.
        """
        version, tensor = self.held.version, self.held.tensor
        if version != self.version:
            raise modified(f"{self.what} of {label}", tensor.shape, self.version, version)
        return _again(tensor, self.attributes, requires_grad=self.requires_grad)


class _SavedArgument:
    """A tensor among the arguments that the surrounding frame saves."""

    __slots__ = ("attributes", "give", "requires_grad")

    def __init__(self, give: Give, tensor: Tensor) -> None:
        self.give = give
        self.attributes = dict(tensor.__dict__)
        self.requires_grad = tensor.requires_grad

    def again(self, label: str) -> Tensor:
        """The tensor: as the object that it was, if it needs no gradient, else as a fresh leaf."""
        return _again(self.give(), self.attributes, requires_grad=self.requires_grad)


_STANDING = (Argument, _SavedArgument, Seen)  # for a tensor


def _kept(tensor: Tensor) -> Tensor:
    """What is held of an argument: the object itself, if it has no graph and a replay may be given it."""
    return tensor if isinstance(tensor, Parameter) else without_graph(tensor)


def _again(tensor: Tensor, attributes: dict[str, Any], *, requires_grad: bool) -> Tensor:
    if tensor.requires_grad is requires_grad and (not requires_grad or isinstance(tensor, Parameter)):
        return tensor
    fresh = leaf_of(tensor, requires_grad=requires_grad)
    for name, value in attributes.items():
        fresh.__dict__.setdefault(name, value)
    return fresh
