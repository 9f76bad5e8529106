"""How an inverse is called, and which arguments of the block it gives back."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..tree import leaves_of
from .guard import relative_error

__all__ = ["Judgement", "Place", "Way", "in_order", "judge", "leading", "places_of", "returned", "split", "ways"]

Place = int | str  # of an argument: its position, or its keyword
Bounds = Callable[[Tensor], tuple[float, float]]


class Way(NamedTuple):
    """One way of calling an inverse: the outputs, then the arguments that it does not give back.

    Attributes:
        outputs: how many leading outputs it gets; ``None``: all.
        spread: one by one, not as one tuple or list.
        held: how many leading arguments it does not get.
    """

    outputs: int | None = None
    spread: bool = False
    held: int = 1

    def call(self, inverse: Callable[..., Any], output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the inverse; ``args`` and ``kwargs`` are what it gets behind the outputs."""
        return inverse(*self._given(output), *args, **kwargs)

    def fits(self, inverse: Callable[..., Any], output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the inverse can be called so, by its signature."""
        try:
            inspect.signature(inverse).bind(*self._given(output), *args, **kwargs)
        except TypeError:
            return False
        except ValueError:  # it has none
            return True
        return True

    def _given(self, output: Any) -> Sequence[Any]:
        if self.outputs is not None:
            output = output[: self.outputs]
        return output if self.spread else (output,)


def places_of(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Place, ...]:
    """The places of a call's arguments, in the order of its signature."""
    if not kwargs:
        return tuple(range(len(args)))
    try:
        signature = inspect.signature(call.forward if isinstance(call, nn.Module) else call)
        names = [name for name in signature.parameters if name in kwargs]
    except (TypeError, ValueError):
        names = []
    return (*range(len(args)), *names, *(name for name in kwargs if name not in names))


def in_order(places: Sequence[Place], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments at these places."""
    return [args[place] if isinstance(place, int) else kwargs[place] for place in places]


def split(places: Sequence[Place], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments but for those at these places, which lead."""
    return args[sum(isinstance(place, int) for place in places) :], {k: v for k, v in kwargs.items() if k not in places}


def ways(output: Any, arguments: Sequence[Any], *, named: bool, inputs: int | None = None) -> Iterator[Way]:
    """The sensible ways of calling an inverse, the documented one first.

    Args:
        output: what the block returned.
        arguments: its arguments, in order.
        named: the inverse is a method of the block, which gets outputs one by one; a function gets them as they are.
        inputs: how many leading arguments it gives back, if that is known.
    """
    most = len(leading(arguments))
    size = len(output) if isinstance(output, (tuple, list)) else 1
    counts = [count for count in dict.fromkeys([size, 1, *range(most, 0, -1)]) if 0 < count <= most and inputs in (None, count)]
    if not named or not isinstance(output, (tuple, list)):
        return (Way(None, False, count) for count in counts)
    fewer = range(size - 1, 0, -1)
    alone = [Way(None, True, count) for count in counts]
    alone += [Way(k, True, count) for k in fewer for count in counts if count <= k]
    together = [Way(k, False, count) for k in (None, *fewer) for count in counts]
    return iter([*alone, *together] if isinstance(output, tuple) else [*together[: len(counts)], *alone])


def leading(arguments: Sequence[Any]) -> list[Any]:
    """The first arguments, as far as an inverse may give them back."""
    return list(itertools.takewhile(_is_input, arguments))


def _is_input(tree: Any) -> bool:
    """Whether an argument may be one that an inverse gives back: a tensor, or a list or dict of some."""
    leaves = leaves_of(tree)
    return bool(leaves) and all(isinstance(leaf, Tensor) for leaf in leaves)


class Judgement(NamedTuple):
    """What an inverse returned: how many leading arguments of the block these are, their tensors, and what is wrong."""

    inputs: int
    tensors: list[Any]
    problem: str = ""


def judge(result: Any, wanted: Sequence[Any], bounds: Bounds) -> Judgement:
    """Compare what an inverse returned with the leading arguments of the block.

    It may return fewer than it could, and more behind them, as a log-det.
    """
    sizes = [len(leaves_of(tree)) for tree in wanted]
    got = returned(result, wanted)
    expected = leaves_of(list(wanted))
    fitting = [n for n in range(len(sizes), 0, -1) if sum(sizes[:n]) <= len(got)]
    if not fitting:
        return Judgement(0, [], f"{len(got)} values from its inverse where {sizes[0]} are expected")
    if fitting[0] == len(sizes):
        fitting = fitting[:1]
    first = ""
    for inputs in fitting:
        count = sum(sizes[:inputs])
        problem = _compare(got[:count], expected[:count], bounds)
        if not problem:
            return Judgement(inputs, got[:count])
        first = first or problem
    if len(got) != sum(sizes):
        first = f"{len(got)} values from its inverse where {sum(sizes)} are expected, and {first}"
    return Judgement(0, [], first)


def returned(result: Any, wanted: Sequence[Any]) -> list[Any]:
    """The leaves of what an inverse returned, of a dict in the order of the argument that it stands for."""
    if isinstance(result, dict) and wanted and isinstance(wanted[0], dict) and set(wanted[0]) <= set(result):
        result = {key: result[key] for key in wanted[0]}
    elif isinstance(result, (tuple, list)) and result and isinstance(result[0], dict):
        return [leaf for i, part in enumerate(result) for leaf in returned(part, wanted[i : i + 1])]
    return leaves_of(result)


def _compare(got: Sequence[Any], wanted: Sequence[Any], bounds: Bounds) -> str:
    for i, (tensor, expected) in enumerate(zip(got, wanted, strict=True)):
        if not isinstance(tensor, Tensor):
            return f"{type(tensor).__name__} for input {i} from its inverse, where a tensor is expected"
        if tensor.shape != expected.shape:
            return f"shape {tuple(tensor.shape)} for input {i} from its inverse, where {tuple(expected.shape)} is expected"
        if tensor.dtype != expected.dtype:
            return f"dtype {tensor.dtype} for input {i} from its inverse, where {expected.dtype} is expected"
        error = relative_error(tensor, expected)
        if error > bounds(expected)[0]:
            return f"an inverse that is off by {error:.2g} (relative) for input {i}"
    return ""
