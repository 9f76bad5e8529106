"""The plan: how each block call is to be rebuilt, and which blocks do not invert."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from types import CodeType
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from ...errors import FallbackWarning, RegistrationError, explain
from ...generators import EVERY
from ...quiet import Proof
from ...tracing import hide
from .ways import Way

__all__ = ["Draws", "Facts", "Inversion", "Predicate", "facts_of", "has_custom_function", "predicate"]

Predicate = Callable[[nn.Module], bool]


class Inversion(NamedTuple):
    """What the first try of an inverse has shown, for one block and one set of shapes.

    Attributes:
        inputs: how many leading arguments the inverse returns.
        matches: for each branch call of the inverse, the branch of forward that it repeats.
        problem: why it cannot be used, or ``""``.
        way: how the inverse is called.
        written: of which of its branch calls the inverse writes to the input later.
        differentiated: through which branch calls forward takes a gradient.
        replay: it was not tried, as a replay is cheaper.
    """

    inputs: int
    matches: tuple[int | None, ...]
    problem: str = ""
    way: Way = Way()
    written: frozenset[int] = frozenset()
    differentiated: frozenset[int] = frozenset()
    replay: bool = False


class Draws(NamedTuple):
    """Which generators calls of a block draw from, and whether others draw between its call and the one before."""

    inside: frozenset[str] = EVERY
    outside: bool = True


_UNKNOWN = Draws()


class Finding:
    """Something that is looked for in the first calls, until it is found."""

    __slots__ = ("_looks",)

    LOOKS = 4  # a block may be called several times a step

    def __init__(self) -> None:
        self._looks = 0  # in vain; -1: found

    @property
    def found(self) -> bool:
        """Whether it was there once."""
        return self._looks < 0

    @property
    def sought(self) -> bool:
        """Whether it is still looked for."""
        return 0 <= self._looks < self.LOOKS

    @property
    def unseen(self) -> bool:
        """Whether nobody has looked."""
        return not self._looks

    @property
    def possible(self) -> bool:
        """Whether it was found, or is still looked for."""
        return self._looks < self.LOOKS

    def note(self, found: bool) -> None:
        """What a look has shown."""
        self._looks = -1 if found or self._looks < 0 else self._looks + 1


class AttributeFacts:
    """What calls have shown to do with the attributes of their modules.

    ``failed``: a replay has, so that numbers and records there may be part of a state, and what others put there.
    """

    __slots__ = ("changes", "failed", "reads", "writes")

    def __init__(self, *, failed: bool = False) -> None:
        self.failed = failed
        self.changes = Finding()  # whether one of them is a tensor that they replace or write to
        self.reads = Finding()  # whether they read such a tensor
        self.writes = Finding()  # whether they write to one
        if failed:
            self.changes.note(True)


class Facts:
    """What the calls of one module, or of one piece of code, have shown so far.

    The worst is assumed of what was never seen. ``many``: the code runs many modules, each of which may draw.
    """

    __slots__ = (
        "_branches",
        "_convolves",
        "_draws",
        "_goes",
        "_inversions",
        "_many",
        "_writes",
        "_zeros",
        "attributes",
        "calls",
        "foreseen",
        "kept",
        "kept_bytes",
        "lean",
        "leaves",
        "owns_input",
        "proof",
        "repeatable",
        "writes_input",
        "writes_parameters",
    )

    def __init__(self, *, many: bool = False) -> None:
        self._many = many
        self._convolves: bool | None = None
        self._draws: dict[bool, Draws] = {}
        self._inversions: dict[object, Inversion] = {}
        self._goes = -1.0  # the largest budget at which what it saves was let go of before backward came
        self._writes: dict[object, bool] = {}  # whether calls with such arguments write into these
        self._zeros: dict[object, Finding] = {}  # exact zeros in what comes in at a place
        self.attributes = (AttributeFacts(), AttributeFacts())  # of its modules in eval mode, and in training
        self._branches: dict[str, list[weakref.ref[nn.Module]]] = {}
        self.kept: set[object] = set()  # steps, or shapes, that do not invert
        self.kept_bytes = 0  # that the newest block held when it was kept last
        self.lean = True  # of the newest block what recipes start from is kept only, which the peak needs
        self.leaves = Finding()  # whether what is run again writes to tensors of the user's
        self.calls = 0  # that were noted
        self.foreseen: dict[object, Any] = {}  # what calls have saved, by place and by what they got
        self.proof: Proof | None = None  # that they leave nothing behind
        self.repeatable = True
        self.writes_input = True  # in place
        self.writes_parameters = True  # past their version counters
        self.owns_input: bool | None = None  # its backward may write into its input, which it saves

    def draws(self, training: bool) -> Draws:
        """Which generators its calls in this mode draw from."""
        return self._draws.get(training, _UNKNOWN)

    def drew(self, training: bool) -> bool:
        """Whether it is known what its calls in this mode draw."""
        return training in self._draws

    def learn_draws(self, training: bool, draws: Draws) -> None:
        """Remember what a call has shown."""
        if self._many and training in self._draws:
            known = self._draws[training]
            draws = Draws(known.inside | draws.inside, known.outside or draws.outside)
        self._draws[training] = draws

    def convolves(self, look: Callable[[], bool]) -> bool:
        """Whether there are convolutions or recurrences; ``look`` says so, once."""
        if self._convolves is None:
            self._convolves = self._many or look()
        return self._convolves

    def writes(self, key: object) -> bool:
        """Whether a call with such arguments may change them in place: one direction of a block may, and the other not."""
        return self._writes.get(key, True)

    def learn_writes(self, key: object, writes: bool) -> None:
        """Remember whether one did."""
        if len(self._writes) >= 64:
            self._writes.clear()
        self._writes[key] = writes

    def has_zeros(self, place: object, look: Callable[[], bool] | None) -> bool:
        """Whether what comes in at a place has exact zeros: it did once, or ``look`` says so in the first calls.

        Without ``look`` it is what is known, and the worst where nothing is.
        """
        zeros = self._zeros.get(place)
        if zeros is None:
            zeros = self._zeros[place] = Finding()
        if look is None:
            return zeros.found or zeros.unseen
        if zeros.sought:
            zeros.note(look())
        return zeros.found

    def stays(self, budget: float) -> bool:
        """Whether what it saves will be there when backward comes."""
        return budget > self._goes

    def learn_stays(self, budget: float, stays: bool) -> None:
        """Remember whether it was: at a larger budget what stays will stay, at a smaller one what goes will go."""
        self._goes = min(self._goes, math.nextafter(budget, -math.inf)) if stays else max(self._goes, budget)

    @property
    def looked_again(self) -> bool:
        """Whether calls that are made now have all their attributes looked at."""
        return self.attributes[0].failed

    def look_again(self, *, again: bool) -> None:
        """At all attributes: a call could not be repeated. If they were looked at in this one (``again``), it never can.

        Several calls may have been made before the first of them is found to fail.
        """
        if again:
            self.repeatable = False
        elif not self.looked_again:
            self.attributes = (AttributeFacts(failed=True), AttributeFacts(failed=True))

    def inversion(self, key: object) -> Inversion | None:
        """What the first try of the inverse has shown for these shapes, if there was one."""
        return self._inversions.get(key)

    def learn_inversion(self, key: object, inversion: Inversion) -> None:
        """Remember what a try has shown."""
        if len(self._inversions) >= 64:  # of shapes that keep changing only the latest matter
            self._inversions.clear()
        self._inversions[key] = inversion

    def branches(self, method: str) -> list[nn.Module] | None:
        """The modules that calls of a method and of its inverse have shown to be the block's branches."""
        found = [reference() for reference in self._branches.get(method, ())]
        return [module for module in found if module is not None] if found and None not in found else None

    def learn_branches(self, method: str, branches: Iterable[nn.Module]) -> None:
        """Remember them; what was learned of the calls of others is void."""
        self._branches[method] = [weakref.ref(module) for module in branches]
        self._inversions.clear()

    def keep(
        self, key: object, label: str, reason: str, *, warn: bool = True, expected: str = "an inverse within tolerance"
    ) -> None:
        """From the next call on keep instead of inverting; warn once."""
        if key in self.kept:
            return
        self.kept.add(key)
        if warn:
            message = explain(label, expected=expected, got=reason, remedy="check(module, *inputs) shows more")
            warnings.warn(f"{message} It is rebuilt from kept tensors from now on.", FallbackWarning, stacklevel=2)


def has_custom_function(outputs: Sequence[Tensor], sources: Sequence[Tensor]) -> bool:
    """Whether a `torch.autograd.Function` may be among what made these outputs of these sources: its backward may do anything."""
    seen: set[Any] = {None, *(source.grad_fn for source in sources)}
    stack: list[Any] = [output.grad_fn for output in outputs]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        if isinstance(node, BackwardCFunction) or len(seen) > _MOST_NODES:
            return True
        seen.add(node)
        stack += [before for before, _ in node.next_functions]
    return False


_MOST_NODES = 10_000

_facts: weakref.WeakKeyDictionary[nn.Module | CodeType, Facts] = weakref.WeakKeyDictionary()


def facts_of(subject: nn.Module | CodeType, *, many: bool = False) -> Facts:
    """The facts about a module or code, for as long as it lives."""
    facts = _facts.get(subject)
    if facts is None:
        facts = _facts[subject] = Facts(many=many)
    return facts


def predicate(spec: object, name: str) -> Predicate:
    """A class, a tuple of classes, or a predicate, as a predicate.

    Raises:
        RegistrationError: it is none of these.
    """
    if isinstance(spec, type):
        return lambda module: isinstance(module, spec)
    if isinstance(spec, (tuple, list)) and all(isinstance(cls, type) for cls in spec):
        classes = tuple(spec)
        return lambda module: isinstance(module, classes)
    if callable(spec):
        if hasattr(spec, "__code__"):
            hide(spec, closed=True)  # dynamo would compile it for every class that it meets
        return spec
    raise RegistrationError(
        explain(
            f"{name}=",
            expected="a class, a tuple of classes, or a function of a module",
            got=repr(spec),
            remedy="pass one of these",
        )
    )
