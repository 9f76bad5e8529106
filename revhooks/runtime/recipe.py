"""Recipes: how a saved tensor comes back from what is held anyway (DESIGN section 7)."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..capture import is_capturing
from ..errors import ReplayError, explain
from ..fingerprint import fingerprint
from ..ops import Leaf, is_doubtful, is_operation, is_view, operation, saves_result
from ..state import PLAIN
from ..storage import Geometry, is_near, restride
from .guard import Verdict
from .handle import SlotHandle, ViewHandle
from .value import Value

if TYPE_CHECKING:
    from .lean import LeanSlots
    from .run import Run

__all__ = ["Recipe", "note_output", "recipe_of"]

_KEY = "revhooks"
SMALL = 2048  # bytes; below, bookkeeping costs more than it gives
MAX_DEPTH = 8  # recomputed from recomputed: each rebuild holds so many tensors for a moment
MOST_SOURCES = 4  # times its bytes; a recipe holds what it starts from
MAX_NODES = 6  # of one recipe
MOST_COST = 4.0  # passes over the tensor: less memory is to cost next to no time


class _Step(NamedTuple):
    """A node that is repeated: inputs are Sources, numbers, ``None``, or steps before it."""

    compute: Callable[..., Tensor]
    inputs: tuple[Any, ...]
    name: str

    def run(self) -> Tensor:
        return self.compute(*map(_value_of, self.inputs))

    def signature(self) -> tuple[Any, ...]:
        """What it does, and on which parameters."""
        parts: list[Any] = [self.name]
        for part in self.inputs:
            if type(part) is _Step:
                parts.append(part.signature())
            elif isinstance(part, Leaf) and part.lasts:
                parts.append(part.get().untyped_storage()._cdata)
        return tuple(parts)


def _value_of(part: Any) -> Any:
    if type(part) is _Step:
        return part.run()
    return None if part is None else part.get()


class Recipe:
    """Computes a tensor again, bit by bit: the operations are run as they were, on what they were run on.

    A change behind autograd's back is not in the graph: to a tensor on the way that nobody saved, or past a version counter. So
    fingerprints are compared, which see any change of any bit and of their order (Rule 19).
    """

    __slots__ = ("_fingerprint", "_names", "_place", "_run", "_site", "_step", "depth")

    def __init__(self, run: Run, step: _Step, found: _Search, site: object, place: str) -> None:
        self._run = run
        self._step = step
        self._site = site
        self._names = found.names
        self._place = place
        self._fingerprint: Tensor | None = None
        self.depth = found.depth + 1

    @property
    def what(self) -> str:
        """How errors and warnings call it."""
        return f"{self._place}, recomputed by {' after '.join(name.removesuffix('Backward0') for name in self._names)}"

    def leave(self, tensor: Tensor) -> None:
        """The Value lets go of its tensor."""
        if self._fingerprint is None and self._run.guard.mode != "off" and not tensor.is_meta and not is_capturing(tensor.device):
            self._fingerprint = fingerprint(tensor)

    def is_of(self, tensor: Tensor) -> bool:
        """Whether a tensor that is saved once more is what was let go of: it may have been edited past its version counter."""
        if self._fingerprint is None or is_capturing(tensor.device):
            return True
        now = fingerprint(tensor)
        if is_near(tensor.device):
            same = torch.equal(now, self._fingerprint)
            if not same:
                _trials[self._site] = -1
            return same
        self._run.guard.note(*self._difference(now, self._fingerprint))
        return True

    def _difference(self, now: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Verdict]:
        """What an accelerator is to be asked later."""
        differs = (now != before).any().float()
        return differs, torch.zeros_like(differs), functools.partial(_verdict, self._site, self.what)

    def tensor(self, geometry: Geometry) -> Tensor:
        """The tensor, in its own strides.

        Raises:
            ReplayError: it is not what it was: something was edited behind autograd's back.
        """
        result = _plainly(self._step).detach()
        if result.shape != geometry.size:
            raise self._differs(f"shape {tuple(geometry.size)}", f"{tuple(result.shape)}")
        if result.stride() != geometry.stride:
            result = restride(result, geometry.stride)
        if self._fingerprint is not None and not is_capturing(result.device):
            self._compare(fingerprint(result), self._fingerprint)
        return result

    def _compare(self, now: Tensor, before: Tensor) -> None:
        if is_near(now.device):
            if not torch.equal(now, before):
                raise self._differs(*_OTHERS)
            return
        differs, nothing, verdict = self._difference(now, before)
        if not self._run.guard.later(differs, nothing, verdict, self._run.at_end):
            verdict(float(differs), 0)

    def _differs(self, expected: str, got: str) -> ReplayError:
        return _differs(self._site, self.what, expected, got)

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


def recipe_of(run: Run, base: Tensor, place: str, inside: LeanSlots | None = None) -> Recipe | None:
    """A recipe for a tensor that covers its storage; ``None`` if it is not made cheaply from what is held anyway.

    Args:
        run: whose values are held.
        base: the tensor.
        place: where it is saved, for messages.
        inside: the slots that it is for, whose own values are held for as long as they are.
    """
    node = base.grad_fn
    if node is None or base.output_nr or not is_operation(node):
        return None
    found = _Search(run, base, inside)
    step = found.step(node)
    if step is None or found.depth >= MAX_DEPTH or found.source_bytes > MOST_SOURCES * base.nbytes or not found.explains(base):
        return None
    site = (step.signature(), base._version, base.dtype, base.dim(), _caller())
    # what backward saves again may have come back from an inversion, of which the graph does not tell
    again = inside is None and torch._C._current_graph_task_id() != -1
    if not base.is_meta and not (_computes(run, step, base) if again else _is_known(run, site, step, base, found)):
        return None
    return Recipe(run, step, found, site, place)


class _Search:
    """Goes back through the graph until everything is held.

    Attributes:
        names: of the nodes, the last one first.
        named: whether it starts from parameters too, which tell sites apart.
        depth: how deep its sources are recomputed themselves.
        source_bytes: what it starts from.
    """

    __slots__ = ("_cost", "_inside", "_run", "_storage", "depth", "named", "names", "source_bytes")

    def __init__(self, run: Run, base: Tensor, inside: LeanSlots | None = None) -> None:
        self._run = run
        self._inside = inside
        self._storage = base.untyped_storage()._cdata  # what lies there is what is to be let go of
        self._cost = 0.0
        self.names: list[str] = []
        self.named = False
        self.depth = 0
        self.source_bytes = 0

    @property
    def _steps(self) -> list[str]:
        return [name for name in self.names if not is_view(name)]

    def explains(self, base: Tensor) -> bool:
        """Whether its version may come from steps in its own memory; else it was changed where the graph does not tell."""
        return base._version < max(len(self._steps), 1)

    def shows(self, base: Tensor) -> bool:
        """Whether versions show every change: steps in the same memory count in its own; what lies between others is unseen.

        A change that the graph does not tell of counts like such a step; after one that saved its result it is an error anyway.
        """
        *later, _ = self._steps or [""]
        if later or (self._steps and is_view(self.names[0])):
            return 0 < len(later) == base._version and all(map(saves_result, later))
        return not base._version

    def step(self, node: Any, place: int = 0) -> _Step | None:
        if len(self.names) >= MAX_NODES:
            return None
        found = operation(node, place)
        if found is None:
            return None
        self._cost += found.cost
        if self._cost > MOST_COST:
            return None
        name = type(node).__name__
        self.names.append(name)
        inputs = []
        for part in found.inputs:
            resolved = self._edge(part) if type(part) is tuple else self._source(part)
            if resolved is _UNKNOWN:
                return None
            inputs.append(resolved)
        compute = found.compute
        if found.compute_ is not None:
            first = inputs[0]
            if type(first) is _Step and not is_view(first.name):
                compute = found.compute_
        return _Step(compute, tuple(inputs), name)

    def _source(self, part: Any) -> Any:
        if type(part) is SlotHandle:
            # a slot of another frame may come back by an inversion, which is not exact
            part = part.within(self._inside) if self._inside is not None else None
            if part is None:
                return _UNKNOWN
        value = part.value if type(part) is ViewHandle else part
        if type(value) is Value:
            if value.key == self._storage:
                return _UNKNOWN
            self.source_bytes += value.nbytes
            if value.recipe is not None:
                self.depth = max(self.depth, value.recipe.depth)
        elif isinstance(part, Leaf) and part.lasts:
            self.named = True
        return part

    def _is_near(self, value: Value) -> bool:
        """Whether it is not in slots of its own, other than those that the recipe is for."""
        return value.values is self._run.values or (self._inside is not None and value.values is self._inside.values)

    def _edge(self, edge: tuple[Any, int]) -> Any:
        node, place = edge
        if node is None:
            return _UNKNOWN
        reference = None if place else node.metadata.get(_KEY)
        value = reference() if reference is not None else None
        if value is not None and value.run is self._run and value.pinned and self._is_near(value):
            return self._source(value)
        step = self.step(node, place)
        return _UNKNOWN if step is None else step


_UNKNOWN = object()

_trials: dict[object, int] = {}  # by site: how often the recipe computed what was there; -1: not always
TRUSTED = 16
_OTHERS = ("the values that it had", "others")


def _differs(site: object, what: str, expected: str, got: str) -> ReplayError:
    _trials[site] = -1
    return ReplayError(
        explain(
            what,
            expected=f"{expected} when recomputed",
            got=f"{got}: something was changed in place that autograd does not know of",
            remedy="take the step again (it is held from now on), or use reversible(ops=False)",
        )
    )


def _verdict(site: object, what: str, error: float, lost: int = 0) -> None:
    if error or lost:
        raise _differs(site, what, *_OTHERS)


def _is_known(run: Run, site: object, step: _Step, base: Tensor, found: _Search) -> bool:
    """Whether a recipe computes what is there: tried the first times that its site is met (Rule 10).

    The graph does not know of changes under `torch.no_grad`: to the tensor, whose version tells, or to one on the way to it. A
    site makes such changes every time or never; where no parameter and no version but only the line of code tells sites apart,
    which may serve many, more than one trial is made. Changes now and then are left to the recipe's comparison.
    """
    trials = _trials.get(site, 0)
    if trials < 0:
        return False
    if trials and (found.named or trials >= TRUSTED or found.shows(base)) and not any(map(is_doubtful, found.names)):
        return True
    if is_capturing(base.device):
        return False
    known = _computes(run, step, base)
    if len(_trials) > 4096:
        _trials.clear()
    _trials[site] = trials + 1 if known else -1
    return known


def _computes(run: Run, step: _Step, base: Tensor) -> bool:
    if is_capturing(base.device):
        return False
    before = run.rebuilt
    try:
        return torch.equal(_plainly(step), base)
    except RuntimeError:  # of half-precision complex numbers few operations are implemented; a source has been changed
        return False
    finally:
        run.purge(since=before)  # what was recomputed for it; a rebuild may be under way that needs the rest


_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parent.parent))
_is_library: dict[CodeType, bool] = {}


def _caller() -> object:
    """The line of code outside of torch, and of this package, that saves a tensor now."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        code = frame.f_code
        library = _is_library.get(code)
        if library is None:
            library = _is_library[code] = code.co_filename.startswith(_LIBRARIES)
        if not library:
            break
        frame = frame.f_back
    return frame.f_code, frame.f_lasti
