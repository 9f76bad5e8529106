"""Recipes: how a saved tensor comes back from what is held anyway (DESIGN section 7)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ReplayError, explain
from ..ops import Source, is_view, operation
from ..state import PLAIN
from ..storage import Geometry, restride
from .guard import Sample

if TYPE_CHECKING:
    from .run import Run
    from .value import Value

__all__ = ["Recipe", "note_output", "recipe_of"]

_KEY = "revhooks"
SMALL = 2048  # bytes; below, bookkeeping costs more than it gives
MAX_DEPTH = 8  # recomputed from recomputed: each rebuild holds so many tensors for a moment
MAX_NODES = 6  # of one recipe


class _Step(NamedTuple):
    """A node that is repeated: inputs are Sources, numbers, ``None``, or steps before it."""

    compute: Callable[..., Tensor]
    inputs: tuple[Any, ...]
    name: str

    def run(self) -> Tensor:
        return self.compute(*map(_value_of, self.inputs))

    def sources(self) -> Iterator[Source]:
        for part in self.inputs:
            if isinstance(part, _Step):
                yield from part.sources()
            elif part is not None and not isinstance(part, (int, float)):
                yield part


def _value_of(part: Any) -> Any:
    if type(part) is _Step:
        return part.run()
    return part if part is None or isinstance(part, (int, float)) else part.get()


class Recipe:
    """Computes a tensor again, bit by bit: the operations are run as they were, on what they were run on."""

    __slots__ = ("_run", "_sample", "_step", "depth", "what")

    def __init__(self, run: Run, step: _Step, sample: Sample | None, depth: int, what: str) -> None:
        self._run = run
        self._step = step
        self._sample = sample
        self.depth = depth
        self.what = what

    def tensor(self, geometry: Geometry) -> Tensor:
        """The tensor, in its own strides.

        Raises:
            ReplayError: it is not what it was: something was edited behind autograd's back.
        """
        result = _plainly(self._step)
        if result.shape != geometry.size:
            raise ReplayError(
                explain(
                    self.what,
                    expected=f"shape {tuple(geometry.size)} when recomputed",
                    got=f"{tuple(result.shape)}",
                    remedy="use reversible(ops=False)",
                )
            )
        result = restride(result.detach(), geometry.stride)
        run = self._run
        run.guard.check(self._sample, result, (0.0, 0.0), lambda: self.what, None, run.at_end)
        return result

    def holds(self) -> Iterator[Tensor]:
        """Nothing: its sources are held by themselves."""
        return iter(())


def _plainly(step: _Step) -> Tensor:
    """Run it without grad and without autocast: its inputs have the dtypes that the operation got."""
    grad = torch.is_grad_enabled()
    torch._C._set_grad_enabled(False)
    try:
        if not torch._C._is_any_autocast_enabled():
            return step.run()
        with PLAIN.restored():
            return step.run()
    finally:
        torch._C._set_grad_enabled(grad)


def note_output(tensor: Tensor, value: Value) -> None:
    """Let the node that made a saved tensor know its Value, for recipes that start from it."""
    node = tensor.grad_fn
    if node is not None and not tensor.output_nr:
        node.metadata[_KEY] = weakref.ref(value)  # type: ignore[index]


def recipe_of(run: Run, base: Tensor, what: str) -> Recipe | None:
    """A recipe for a tensor that covers its storage; ``None`` if it is not made cheaply from what is held anyway."""
    node = base.grad_fn
    if node is None or base.output_nr:
        return None
    found = _Search(run, base.untyped_storage()._cdata)
    step = found.step(node)
    if step is None or found.depth >= MAX_DEPTH:
        return None
    if base._version and not _is_tracked(run, step, base):
        return None
    return Recipe(run, step, run.guard.sample(base), found.depth + 1, f"{what}, recomputed by {' after '.join(found.names)}")


class _Search:
    """Goes back through the graph until everything is held."""

    def __init__(self, run: Run, storage: int) -> None:
        self._run = run
        self._storage = storage  # what lies there is what is to be let go of
        self.names: list[str] = []
        self.depth = 0

    def step(self, node: Any) -> _Step | None:
        if len(self.names) >= MAX_NODES:
            return None
        found = operation(node)
        if found is None:
            return None
        self.names.append(type(node).__name__.removesuffix("Backward0"))
        inputs = []
        for part in found.inputs:
            resolved = self._edge(part) if isinstance(part, tuple) else self._source(part)
            if resolved is _UNKNOWN:
                return None
            inputs.append(resolved)
        first = inputs[0]
        fresh = type(first) is _Step and not is_view(first.name)
        compute = found.compute_ if found.compute_ is not None and fresh else found.compute
        return _Step(compute, tuple(inputs), type(node).__name__)

    def _source(self, part: Any) -> Any:
        value = getattr(part, "value", part)  # of a view's handle
        recipe = getattr(value, "recipe", None)
        if recipe is not None:
            self.depth = max(self.depth, recipe.depth)
        return _UNKNOWN if getattr(value, "key", None) == self._storage else part

    def _edge(self, edge: tuple[Any, int]) -> Any:
        node, place = edge
        if node is None or place:
            return _UNKNOWN
        reference = node.metadata.get(_KEY)
        value = reference() if reference is not None else None
        if value is not None and value.run is self._run and value.pinned:
            return self._source(value)
        if hasattr(node, "variable"):
            return _UNKNOWN
        step = self.step(node)
        return _UNKNOWN if step is None else step


_UNKNOWN = object()

_tracked: set[object] = set()  # sites whose changes in place the graph knows of


def _is_tracked(run: Run, step: _Step, base: Tensor) -> bool:
    """Whether the graph knows of the changes in place: of those under `torch.no_grad` it does not.

    That is tried once for a layer, which is told by its parameters; afterwards the guard's sample has to do.
    """
    leaves = tuple(source.get().untyped_storage()._cdata for source in step.sources() if not hasattr(source, "pinned"))
    site = (step.name, base._version, base.shape, leaves)
    if leaves and site in _tracked:
        return True
    tracked = torch.equal(_plainly(step), base)
    run.purge()  # what was recomputed for it
    if tracked and leaves:
        if len(_tracked) > 4096:
            _tracked.clear()
        _tracked.add(site)
    return tracked
