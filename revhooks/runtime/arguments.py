"""Arguments of a call, held until it is run again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from ..storage import Held, is_opaque, version_of
from .objects import Former, Objects, Seen
from .tree import leaves_of, map_leaves, map_tensors
from .value import modified

if TYPE_CHECKING:
    from .run import Run

__all__ = ["Argument", "Arguments"]

Give = Callable[[], Tensor]


class Arguments:
    """Arguments that are held for the replay: tensors detached, everything else as it is.

    Made before the call.

    Args:
        run: whose ledger counts them.
        args: positional arguments.
        kwargs: keyword arguments.
        save: saves a tensor in a surrounding frame instead, and returns a function that gives it back.
    """

    __slots__ = ("_held", "_run")

    def __init__(
        self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any], save: Callable[[Tensor], Give] | None = None
    ) -> None:
        self._run = run
        self._held = map_tensors(self._holding(save), (args, kwargs))

    def _holding(self, save: Callable[[Tensor], Give] | None) -> Callable[[Tensor], Argument | _SavedArgument]:
        """Holds tensors, the same one once: calls may ask whether two arguments are one, as attention does of itself."""
        held: dict[int, Argument | _SavedArgument] = {}

        def hold(tensor: Tensor) -> Argument | _SavedArgument:
            key = id(tensor)
            if key not in held:
                if save is None or is_opaque(tensor):
                    held[key] = Argument(self._run, tensor, "an argument")
                else:
                    held[key] = _SavedArgument(save(tensor), tensor.requires_grad)
            return held[key]

        return hold

    def give_former(self, objects: Objects, save: Callable[[Tensor], Give] | None = None) -> None:
        """After the call: of the objects among them give those that it has changed as they were."""
        changed = objects.changed()
        if changed:
            formers = objects.formers(self._holding(save), changed)
            self._held = map_leaves(lambda leaf: formers.get(id(leaf), leaf), self._held)

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that it holds."""
        leaves = leaves_of(self._held)
        former = next((leaf for leaf in leaves if isinstance(leaf, Former)), None)
        if former is not None:
            leaves = [*leaves, *former.parts()]
        arguments = (leaf for leaf in leaves if isinstance(leaf, Argument))
        return (argument.held.tensor for argument in arguments if isinstance(argument.held, Held))

    def again(self, label: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as fresh leaves with the ``requires_grad`` they had.

        Raises:
            ModifiedError: one was modified in place since.
        """
        copies: dict[int, Any] = {}
        given: dict[int, Tensor] = {}

        def thaw(part: Any) -> Any:
            if not isinstance(part, (Argument, _SavedArgument, Seen)):
                return part
            if id(part) not in given:
                given[id(part)] = part.again(label)
            return given[id(part)]

        def again(leaf: Any) -> Any:
            return leaf.again(thaw, copies) if isinstance(leaf, Former) else thaw(leaf)

        args, kwargs = map_leaves(again, self._held)
        return args, kwargs


class Argument:
    """A tensor that a call depends on, held until it is repeated; ``what`` it is."""

    __slots__ = ("held", "requires_grad", "version", "what")

    def __init__(self, run: Run, tensor: Tensor, what: str) -> None:
        self.what = what
        self.held = _Opaque(tensor.detach()) if is_opaque(tensor) else run.hold(tensor)
        self.requires_grad = tensor.requires_grad
        self.version = version_of(tensor)

    def again(self, label: str) -> Tensor:
        """The tensor as a fresh leaf.

        Raises:
            ModifiedError: it was modified in place since.
        """
        version, tensor = self.held.version, self.held.tensor
        if version != self.version:
            raise modified(f"{self.what} of {label}", tensor.shape, self.version, version)
        return tensor.detach().requires_grad_(self.requires_grad)


class _Opaque(NamedTuple):
    tensor: Tensor

    @property
    def version(self) -> int:
        return version_of(self.tensor)


class _SavedArgument:
    """A tensor among the arguments that the surrounding frame saves."""

    __slots__ = ("give", "requires_grad")

    def __init__(self, give: Give, requires_grad: bool) -> None:
        self.give = give
        self.requires_grad = requires_grad

    def again(self, label: str) -> Tensor:
        """The tensor as a fresh leaf."""
        return self.give().detach().requires_grad_(self.requires_grad)
