"""Recipes: how a saved tensor comes back from what is held anyway (DESIGN section 7)."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ReplayError, explain
from ..ops import Parameter, is_doubtful, is_view, operation
from ..state import PLAIN
from ..storage import Geometry, fingerprint, restride
from .guard import Sample
from .handle import LeafHandle, ViewHandle
from .value import Value

if TYPE_CHECKING:
    from .run import Run

__all__ = ["Recipe", "note_output", "recipe_of"]

_KEY = "revhooks"
SMALL = 2048  # bytes; below, bookkeeping costs more than it gives
MAX_DEPTH = 8  # recomputed from recomputed: each rebuild holds so many tensors for a moment
MOST_SOURCES = 4  # times its bytes; a recipe holds what it starts from
MAX_NODES = 6  # of one recipe


class _Step(NamedTuple):
    """A node that is repeated: inputs are Sources, numbers, ``None``, or steps before it."""

    compute: Callable[..., Tensor]
    inputs: tuple[Any, ...]
    name: str

    def run(self) -> Tensor:
        return self.compute(*map(_value_of, self.inputs))

    def signature(self, named: list[Any]) -> tuple[Any, ...]:
        """What it does, and on which parameters, which are added to ``named``."""
        parts: list[Any] = [self.name]
        for part in self.inputs:
            if type(part) is _Step:
                parts.append(part.signature(named))
            elif isinstance(part, (LeafHandle, Parameter)):
                parts.append(part.get().untyped_storage()._cdata)
                named.append(part)
        return tuple(parts)

    def values(self) -> Iterator[Value]:
        """The saved tensors that it starts from."""
        for part in self.inputs:
            if type(part) is _Step:
                yield from part.values()
            elif isinstance(part, Value):
                yield part
            elif isinstance(part, ViewHandle):
                yield part.value

    def doubtful(self) -> bool:
        """Whether the graph leaves open what a step does."""
        return is_doubtful(self.name) or any(part.doubtful() for part in self.inputs if type(part) is _Step)


def _value_of(part: Any) -> Any:
    if type(part) is _Step:
        return part.run()
    return None if part is None else part.get()


class Recipe:
    """Computes a tensor again, bit by bit: the operations are run as they were, on what they were run on."""

    __slots__ = ("_print", "_run", "_step", "depth", "what")

    def __init__(self, run: Run, step: _Step, print_: Tensor | None, depth: int, what: str) -> None:
        self._run = run
        self._step = step
        self._print = print_  # of all of it: what was edited behind autograd's back is not in the graph
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
        if self._print is not None:
            differs = (fingerprint(result) != self._print).float().reshape(1)
            same, run = Sample(None, torch.zeros_like(differs)), self._run
            run.guard.check(same, differs, (0.0, 0.0), lambda: self.what, None, run.at_end)
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
    if not _is_known(run, step, base):
        return None
    if sum(value.nbytes for value in step.values()) > MOST_SOURCES * base.nbytes:
        return None
    print_ = None if base.is_meta or run.guard.mode == "off" else fingerprint(base)
    return Recipe(run, step, print_, found.depth + 1, f"{what}, recomputed by {' after '.join(found.names)}")


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

_tried: dict[object, bool] = {}  # by site: whether what the recipe computes is what was there


def _is_known(run: Run, step: _Step, base: Tensor) -> bool:
    """Whether a recipe computes what is there: tried the first time that its site is met (Rule 10).

    The graph does not know of changes under `torch.no_grad`: to the tensor, whose version tells, or to one on the way to it. A
    site with parameters makes such changes every time or never (edits now and then are left to the guard's sample); where
    none tells sites apart, it is tried each time.
    """
    if base.is_meta:
        return True
    named: list[Any] = []
    signature = step.signature(named)
    site = (signature, base._version, base.dtype, base.dim(), _caller())
    known = _tried.get(site)
    simple = not base._version and not any(type(part) is _Step for part in step.inputs)
    if known is None or step.doubtful() or not (simple or named):
        known = torch.equal(_plainly(step), base)
        run.purge()  # what was recomputed for it
        if len(_tried) > 4096:
            _tried.clear()
        _tried[site] = known
    return known


_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parent.parent))


def _caller() -> object:
    """The line of code outside of torch, and of this package, that saves a tensor now."""
    frame = sys._getframe(4)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame = frame.f_back
    return frame.f_code, frame.f_lasti
