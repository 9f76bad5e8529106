"""What a branch's call depends on besides its arguments."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ...buffers import Buffers, modules_of
from ...effects import undone
from ...errors import ModifiedError, explain
from ...generators import Rng
from ...modes import PLAIN, Modes
from ...precision import precision_of, restored
from ...quiet import leaves_nothing
from ...storage import Held, is_near
from ..recompute.statistics import Statistics
from ..tree import leaves_of
from .attributes import Attributes

if TYPE_CHECKING:
    from ..handles.protocols import Called, Stretch
    from ..policy.plan import Facts

__all__ = ["STATE", "STATISTICS", "CallState"]

STATE = "state that a module carries from call to call: needed to repeat the call"
STATISTICS = "statistics of a batch norm: its replay does not compute them again"

_T = TypeVar("_T")
# whether subclasses see operations
_subclass_state: Callable[[], Any] = getattr(torch._C, "_get_torch_function_state", lambda: None)
_set_subclass_state: Callable[[Any], None] = getattr(torch._C, "_set_torch_function_state", lambda _: None)
_NOTHING: contextlib.nullcontext[Any] = contextlib.nullcontext()


class CallState:
    """What a call depends on besides its arguments, so that it can be repeated exactly (Rules 6 and 7)."""

    __slots__ = (
        "_attributes",
        "_buffers",
        "_copies",
        "_device",
        "_exact",
        "_kinds",
        "_ledger",
        "_modes",
        "_modules",
        "_precision",
        "_statistics",
        "_subclasses",
        "_tracker",
        "drew",
        "facts",
        "grad",
        "rng",
        "rng_after",
        "surprise",
    )

    def __init__(
        self,
        frame: Called,
        roots: Sequence[nn.Module],
        facts: Facts,
        *,
        local: bool = False,
        owned: bool = True,
        things: Sequence[object] = (),
    ) -> None:
        self._device = frame.device
        self.facts = facts
        modules = self._modules = modules_of(roots)
        self._buffers = Buffers(modules, frame.external, closely=facts.writes_parameters, owned=owned)
        known = facts.attributes[bool(roots) and roots[0].training]
        self._attributes = Attributes(frame.run, [*modules, *things], known) if known.changes.possible else None
        self._modes = Modes.of_call(frame.device) if local else frame.modes
        self._precision = frame.precision
        self.grad = torch.is_grad_enabled()
        self._subclasses = _subclass_state()
        self._tracker = frame.run.rng
        self._ledger = frame.run.ledger
        self._copies: list[Held] = []  # of buffers
        self.rng: Rng | None = self._tracker.capture(frame.device, frame.draws) if frame.draws else None
        self._kinds = frame.draws
        self.drew: frozenset[str] = frozenset()
        self.rng_after: Rng | None = None
        self.surprise = ""  # why the call cannot be repeated
        self._statistics: Statistics | None = None
        self._exact = frame.exact

    def watched(self) -> contextlib.AbstractContextManager[Any]:
        """A context for the call, which sees what has to be seen of it."""
        watch = self._attributes.watch if self._attributes is not None else None
        return _NOTHING if watch is None else watch

    def finish(self, moved: set[int]) -> None:
        """After the call: note whether it drew random numbers, and what it changed."""
        if self.rng is not None:
            self.rng_after = self._tracker.capture(self._device, self._kinds)
            self.drew = self.rng.moved(self.rng_after)
            if not self.drew:
                self.rng = self.rng_after = None
        foreseen, wrote = self._buffers.finish()
        if not foreseen:
            self.surprise = "it changed a parameter or buffer that it had not changed before"
        if self._attributes is not None and not self._attributes.finish():
            self.surprise = self.surprise or "it changed a tensor in an attribute in place that it had not changed before"
        self.facts.writes_parameters = wrote
        self._buffers.add_moved(moved)
        self._copies = [Held(self._ledger, copy) for copy in self._buffers.copies()]

    def remember(self, slots: Stretch) -> None:
        """Before what the call saved is let go of: note what is not to be computed again."""
        # where it is far, to look whether they are of the same batch makes the host wait, and costs it more than they spare
        near, known = is_near(self._device), self._statistics is not None
        if near and not known and self._buffers.overwritten and not self._buffers.compiled:
            self._statistics = Statistics(slots, self._buffers.overwritten, self._ledger, exact=self._exact)
            slots.statistics = self._statistics or None

    def check(self, label: str) -> None:
        """Raise if a parameter or buffer that the call read was modified since (Rule 8).

        Raises:
            ModifiedError: one was.
        """
        name = self._buffers.modified()
        if name is not None:
            raise ModifiedError(
                explain(
                    f"{label}: parameter or buffer {name!r} has been modified by an inplace operation",
                    expected="the values that forward used, for its activations are rebuilt from them",
                    got="values changed since",
                    remedy="run backward before optimizer.step() or a call that changes it",
                )
            )

    def repeat(self, call: Callable[[], _T], *, grad: bool, reach: Sequence[Any] = ()) -> _T:
        """Run ``call`` with the generators, modes and buffers that the call saw; leave them as they are now.

        What it does to the user's objects is undone (Rule 7).

        Args:
            call: the code.
            grad: whether gradients are recorded.
            reach: functions that it calls, and arguments, from which it may reach such objects; ``forward`` of its modules counts
                anyway.
        """
        now = None
        if self.rng is not None:
            now = self._tracker.capture(self._device, self._kinds)
            self.rng.restore()
        before, subclasses = torch.is_grad_enabled(), _subclass_state()
        torch._C._set_grad_enabled(grad)
        if subclasses != self._subclasses:  # a backward that a subclass's method has started runs without them
            _set_subclass_state(self._subclasses)
        try:
            return _within(self._contexts(reach), call)
        finally:
            torch._C._set_grad_enabled(before)
            if subclasses != self._subclasses:
                _set_subclass_state(subclasses)
            if now is not None:
                now.restore()

    def _contexts(self, reach: Sequence[Any]) -> list[contextlib.AbstractContextManager[Any]]:
        """What a replay has to be run in, the innermost first; nothing, where all is as it was and nothing is left behind."""
        contexts: list[contextlib.AbstractContextManager[Any]] = []
        buffers = self._buffers.replayed()
        if buffers is not None:
            contexts.append(buffers)
        if self._attributes is not None:
            contexts.append(self._attributes.replayed())
        if not (self._buffers.plain and leaves_nothing(self._modules, reach, self.facts)):
            objects = [leaf for leaf in leaves_of(reach) if not isinstance(leaf, Tensor)]
            contexts.append(undone(self._modules, objects, self.facts.leaves))
        if precision_of(self._device) != self._precision:
            contexts.append(restored(self._precision, self._device))
        modes = self._modes if self._modes is not None else Modes.of_call(self._device) and PLAIN
        if modes is not None:
            contexts.append(modes.restored())
        return contexts

    def report(self, what: str) -> Iterator[tuple[str, str, Tensor]]:
        """What it holds of the call: why, of what, and the tensor."""
        for tensor in self._statistics.tensors() if self._statistics is not None else ():
            yield STATISTICS, what, tensor
        for held in self._copies:
            yield STATE, what, held.tensor
        for tensor in self._attributes.tensors() if self._attributes is not None else ():
            yield STATE, what, tensor


def _within(contexts: list[contextlib.AbstractContextManager[Any]], call: Callable[[], _T]) -> _T:
    if not contexts:
        return call()
    with contexts.pop():
        return _within(contexts, call)
