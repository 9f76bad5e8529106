"""Recipes: how a saved tensor comes back from what is held anyway (DESIGN section 7).

The graph says how a tensor was made: from its node, from what that has saved (which are our own handles), and from the nodes
before it. Whether what is computed so is what was there, bit by bit, is tried when a line of code is met for the first time,
and checked by evidence from then on.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...capture import is_capturing
from ...errors import ReplayError, explain
from ...modes import PLAIN
from ...ops import is_doubtful, is_view, operation, saves_result
from ...saved import Counted, Leaf, Saved, View
from ...storage import restride
from ..handles.dropped import Dropped, Shaped
from ..handles.evidence import FIRST, Evidence
from ..handles.slot import SlotHandle
from ..handles.value import Value
from ..passes import NO_PASS, current_pass
from ..policy.places import Places, Site

if TYPE_CHECKING:
    from ..handles.protocols import Inside
    from ..handles.shared import Shared

__all__ = ["LOOKS", "Recipe", "looks", "recipe_of"]

MAX_DEPTH = 8  # recomputed from recomputed: each rebuild holds so many tensors for a moment
MOST_SOURCES = 4  # times its bytes; a recipe holds what it starts from
MAX_NODES = 6  # of one recipe
MOST_COST = 4.0  # passes over the tensor: less memory is to cost next to no time


class _Step(tuple[Callable[..., Tensor], tuple[Any, ...], str]):
    """A node that is repeated: what computes it, its inputs, its name. Inputs are Sources, ``None``, or steps before it."""

    __slots__ = ()

    def run(self) -> Tensor:
        compute, inputs, _ = self
        return compute(*[None if part is None else part.run() if type(part) is _Step else part.get() for part in inputs])

    def signature(self) -> tuple[Any, ...]:
        """What it does, and on which parameters."""
        _, inputs, name = self
        parts: list[Any] = [name]
        for part in inputs:
            if type(part) is _Step:
                parts.append(part.signature())
            elif type(part) is Leaf and part.lasts:
                parts.append(part.get().untyped_storage()._cdata)
        return tuple(parts)

    @property
    def named(self) -> bool:
        """Whether it starts from parameters too, which tell sites apart."""
        return any(part.named if type(part) is _Step else type(part) is Leaf and part.lasts for part in self[1])


class Recipe:
    """Computes a tensor again, bit by bit: the operations are run as they were, on what they were run on.

    A change behind autograd's back is not in the graph: to a tensor on the way that nobody saved, or past a version counter. So
    evidence of what was let go of is compared.
    """

    now = False

    __slots__ = ("_evidence", "_first", "_names", "_place", "_shared", "_site", "_step", "depth")

    def __init__(self, shared: Shared, step: _Step, found: _Search, site: object, place: str, *, first: bool) -> None:
        self._first = first
        self._shared = shared
        self._step = step
        self._site = site
        self._names = found.names
        self._place = place
        self._evidence: Evidence | None = None
        self.depth = found.depth + 1

    @property
    def what(self) -> str:
        """How errors and warnings call it."""
        return f"{self._place}, recomputed by {' after '.join(name.removesuffix('Backward0') for name in self._names)}"

    def leave(self, tensor: Tensor) -> None:
        """The tensor is let go of."""
        if self._evidence is None:
            self._evidence = Evidence.of(tensor, self._shared.guard, first=self._first)

    def is_of(self, tensor: Tensor) -> bool:
        """Whether a tensor that is saved once more is what was let go of: it may have been edited past its version counter."""
        verdict = functools.partial(_verdict, self._site, self.what)
        if self._evidence is None or self._evidence.is_of(tensor, verdict, self._shared.guard):
            return True
        _trials[self._site] = -1
        return False

    def tensor(self, like: Shaped) -> Tensor:
        """The tensor, in its own strides.

        Raises:
            ReplayError: it is not what it was: something was edited behind autograd's back.
        """
        result = _plainly(self._step)
        if result.shape != like.size:
            raise _differs(self._site, self.what, f"shape {tuple(like.size)}", f"{tuple(result.shape)}")
        if result.stride() != like.stride:
            result = restride(result, like.stride)
        if self._evidence is not None:
            verdict = functools.partial(_verdict, self._site, self.what)
            self._evidence.compare(result, verdict, self._shared)
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


def recipe_of(shared: Shared, base: Tensor, what: str, spot: Any, places: Places, inside: Inside | None = None) -> Recipe | None:
    """A recipe for a tensor that covers its storage; ``None`` if it is not made cheaply from what is held anyway.

    Args:
        shared: whose handles it may start from.
        base: the tensor.
        what: how messages call where it is saved.
        spot: its place in the step.
        places: what is known of such.
        inside: the slots that it is for, whose own handles are there for as long as they are.
    """
    found = _Search(shared, base, inside)
    step = found.step(base.grad_fn)
    if step is None or found.depth >= MAX_DEPTH or found.source_bytes > MOST_SOURCES * base.nbytes or not found.explains(base):
        return None
    spot = (spot, base._version, base.dtype)
    known = places.sites.get(spot)
    forward = current_pass() == (NO_PASS if inside is None else inside.task)
    if forward and known is not None and known.names == found.names and _trials.get(known.site, 0) > 0:
        known.met += 1
        return Recipe(shared, step, found, known.site, what, first=known.met < FIRST)
    site = (step.signature(), base._version, base.dtype, base.dim(), _caller())
    # what backward saves again may have come back from an inversion, of which the graph does not tell
    again = inside is None and not forward
    if not base.is_meta and not (_computes(shared, step, base) if again else _is_known(shared, site, step, base, found)):
        return None
    looks.update(dict.fromkeys(found.used, sys.maxsize))
    if _is_trusted(site, step, base, found):
        places.learn(spot, Site(site, found.names))
    return Recipe(shared, step, found, site, what, first=_is_new(site, spot))


def _is_new(site: object, spot: object) -> bool:
    """Whether a place is met for the first times; one that no model is known of yet is learned in no step."""
    if len(_met) > 4096:
        _met.clear()
    met = _met[site, spot] = _met.get((site, spot), 0) + 1
    return met <= FIRST


class _Search:
    """Goes back through the graph until everything is held.

    Attributes:
        names: of the nodes, the last one first.
        depth: how deep its sources are recomputed themselves.
        source_bytes: what it starts from.
        used: kinds of nodes whose outputs it starts from, that were noted there.
    """

    __slots__ = ("_cost", "_inside", "_shared", "_storage", "depth", "names", "source_bytes", "used")

    def __init__(self, shared: Shared, base: Tensor, inside: Inside | None = None) -> None:
        self._shared = shared
        self._inside = inside
        self._storage = base.untyped_storage()._cdata  # what lies there is what is to be let go of
        self._cost = 0.0
        self.names: list[str] = []
        self.used: list[type] = []
        self.depth = 0
        self.source_bytes = 0

    @property
    def _steps(self) -> list[str]:
        return [name for name in self.names if not is_view(name)]

    def explains(self, base: Tensor) -> bool:
        """Whether its version may come from steps in its own memory; else it was changed where the graph does not tell."""
        return not base._version or base._version < max(len(self._steps), 1)

    def shows(self, base: Tensor) -> bool:
        """Whether versions show every change: steps in the same memory count in its own; what lies between others is unseen.

        A change that the graph does not tell of counts like such a step; after one that saved its result it is an error anyway.
        """
        *later, _ = self._steps or [""]
        if later or (self._steps and is_view(self.names[0])):
            return 0 < len(later) == base._version and all(map(saves_result, later))
        return not base._version

    def step(self, node: Any, place: int = 0) -> _Step | None:
        names = self.names
        if len(names) >= MAX_NODES:
            return None
        found = operation(node, place)
        if found is None:
            return None
        compute, parts, compute_, cost = found
        self._cost += cost
        if self._cost > MOST_COST:
            return None
        name = type(node).__name__
        names.append(name)
        inputs: list[Any] = []
        for part in parts:
            kind = type(part)
            if part is None or kind is Leaf:
                inputs.append(part)
                continue
            resolved = self._edge(*part) if kind is tuple else self._source(part)  # type: ignore[misc]
            if resolved is _UNKNOWN:
                return None
            inputs.append(resolved)
        if compute_ is not None:
            first = inputs[0]
            if type(first) is _Step and not is_view(first[2]):
                compute = compute_
        return _Step((compute, tuple(inputs), name))

    def _source(self, part: Any) -> Any:
        """A handle of this run, or of these slots, that holds something else."""
        if type(part) is SlotHandle:
            # a slot of another frame may come back by an inversion, which is not exact
            part = part.within(self._inside) if self._inside is not None else None
            if part is None:
                return _UNKNOWN
        handle: Any = part.of if type(part) is View else part
        kind = type(handle)
        if kind is Saved or kind is Counted:
            tensor = handle.tensor
            if tensor.untyped_storage()._cdata == self._storage:
                return _UNKNOWN
            self.source_bytes += tensor.nbytes
        elif kind is Dropped:
            self.source_bytes += handle.nbytes
            self.depth = max(self.depth, handle.depth)
        elif kind is Value:
            if handle.key == self._storage:
                return _UNKNOWN
            self.source_bytes += handle.nbytes
        return part

    def _edge(self, node: Any, place: int) -> Any:
        if node is None:
            return _UNKNOWN
        if not place:
            metadata = node.metadata
            noted = metadata.get(self._shared)
            if noted is None and self._inside is not None:
                noted = metadata.get(self._inside.home)
            handle = noted() if noted is not None else None
            if handle is not None and (type(handle) is not Value or handle.pinned):
                self.used.append(type(node))
                return self._source(handle)
        step = self.step(node, place)
        if step is None and looks.get(type(node)) == 0:
            looks[type(node)] = 1  # for the next one
        return _UNKNOWN if step is None else step


_UNKNOWN = object()
LOOKS = 256
looks: dict[type, int] = {}  # how often what nodes of a kind have made is still noted, in case that recipes start from it

_trials: dict[object, int] = {}  # by site: how often the recipe computed what was there; -1: not always
_met: dict[object, int] = {}  # by site and place: how often it was met where it is not learned
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


def _is_trusted(site: object, step: _Step, base: Tensor, found: _Search) -> bool:
    """Whether trials have shown enough.

    The graph does not know of changes under `torch.no_grad`: to the tensor, whose version tells, or to one on the way to it. A
    site makes such changes every time or never; where no parameter and no version but only the line of code tells sites apart,
    which may serve many, more than one trial is made. Changes now and then are left to the evidence.
    """
    trials = _trials.get(site, 0)
    enough = trials > 0 and (step.named or trials >= TRUSTED or found.shows(base))
    return enough and not any(map(is_doubtful, found.names))


def _is_known(shared: Shared, site: object, step: _Step, base: Tensor, found: _Search) -> bool:
    """Whether a recipe computes what is there: tried the first times that its site is met (Rule 10)."""
    trials = _trials.get(site, 0)
    if trials < 0:
        return False
    if _is_trusted(site, step, base, found):
        return True
    if is_capturing(base.device):
        return False
    known = _computes(shared, step, base)
    if len(_trials) > 4096:
        _trials.clear()
    _trials[site] = trials + 1 if known else -1
    return known


def _computes(shared: Shared, step: _Step, base: Tensor) -> bool:
    if is_capturing(base.device):
        return False
    passes = shared.passes
    before = passes.rebuilt
    try:
        return torch.equal(_plainly(step), base)
    except RuntimeError:  # of half-precision complex numbers few operations are implemented; a source has been changed
        return False
    finally:
        passes.purge(since=before)  # what was recomputed for it; a rebuild may be under way that needs the rest


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
