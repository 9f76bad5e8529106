"""Where saved tensors go: to whom the hooks on top belong.

Whoever takes saved tensors (a run, a stretch of a frame's call, a call that is run again) has pushed its own pair of hooks. Torch
carries these to the thread in which an inner backward runs, and nothing else that a thread knows (Rule 15). So they tell, too,
where we are: inside a frame, or inside a replay.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from threading import Lock, get_ident
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch._C._autograd import _pop_saved_tensors_default_hooks as pop_hooks
from torch._C._autograd import _push_saved_tensors_default_hooks as push_hooks
from torch._C._autograd import _top_saved_tensors_default_hooks as top_hooks

from ...kinds import without_graph
from ..passes import NO_PASS, current_pass
from .slot import SlotHandle

if TYPE_CHECKING:
    from ...saved import Source
    from .protocols import Called, Owner, Stretch

__all__ = [
    "THREADS",
    "EnoughError",
    "Filling",
    "Give",
    "Packer",
    "packer",
    "pop_hooks",
    "push_hooks",
    "saving_to",
    "surrounding",
    "top_hooks",
    "unpack",
]

THREADS = "several threads saved tensors in it at once, in an order that may not come again"
Give = Callable[[], Tensor]

unpack = operator.methodcaller("get")  # the unpack hook of all that packs a `Source`


class Packer:
    """Whose bound method ``pack`` is a pack hook of ours."""

    __slots__ = ()

    @property
    def owner(self) -> Owner | None:
        """The run, as long as it is there."""
        raise NotImplementedError

    @property
    def frame(self) -> Called | None:
        """The frame in which something is run, or run again."""
        return None

    @property
    def replaying(self) -> bool:
        """Whether something is being run again."""
        return False

    @property
    def exact(self) -> bool:
        """Whether what is computed there is what it was, if it is being run again."""
        return self.frame is None or self.frame.exact

    @property
    def inside(self) -> bool:
        """Whether it is a frame's: what is called there opens none that is inverted."""
        return True

    def pack(self, tensor: Tensor) -> Any:
        """The pack hook."""
        raise NotImplementedError

    def save(self, tensor: Tensor) -> Give:
        """Save an argument of a call inside, as any operation saves what it needs; the function gives it back."""
        raise NotImplementedError


def packer() -> Packer | None:
    """Who gets what is saved now; ``None`` if nobody of ours does."""
    hooks = top_hooks(False)
    found = getattr(hooks[0], "__self__", None) if hooks is not None else None
    return found if isinstance(found, Packer) else None


def surrounding() -> Packer | None:
    """Who of ours would get it, if hooks of others were not inside of ours."""
    others = []
    try:
        while (hooks := top_hooks(False)) is not None:
            found = getattr(hooks[0], "__self__", None)
            if isinstance(found, Packer):
                return found
            others.append(hooks)
            pop_hooks()
    finally:
        for pair in reversed(others):
            push_hooks(*pair)
    return None


class saving_to(Packer):  # noqa: N801 - used as a function
    """Send what is saved inside into ``slots`` of ``frame``, in whatever thread autograd saves it."""

    __slots__ = ("_frame", "_lock", "_replaying", "_slots", "_threads")

    def __init__(self, slots: Stretch, frame: Called) -> None:
        around = packer()
        self._replaying = around is not None and around.replaying
        self._slots = slots
        self._frame = frame
        self._lock = Lock()
        self._threads: set[int] = set()  # in which inner backwards have saved

    def __enter__(self) -> None:
        push_hooks(self.pack, unpack)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        pop_hooks()
        if kind is None and len(self._threads) > 1:
            self._frame.keep(THREADS)

    @property
    def owner(self) -> Owner:
        """The run."""
        return self._frame.run

    @property
    def frame(self) -> Called:
        """The frame."""
        return self._frame

    @property
    def replaying(self) -> bool:
        """Whether it is in a call that is run again."""
        return self._replaying

    def pack(self, tensor: Tensor) -> Source:
        """The pack hook."""
        if current_pass() == NO_PASS:
            slots = self._slots
            if not slots.plain or type(tensor) is not Tensor:
                return slots.save(tensor, self._frame)
            tensors = slots.tensors  # as `Slots.save`: most come here
            tensors.append(tensor)
            slots.versions.append(tensor._version)
            return SlotHandle((self._frame, slots, len(tensors) - 1))
        with self._lock:  # an inner backward has a thread for each device
            self._threads.add(get_ident())
            return self._slots.save(tensor, self._frame)

    def save(self, tensor: Tensor) -> Give:
        """Save an argument of a call inside, as any operation saves what it needs; the function gives it back."""
        return self.pack(tensor).get


class EnoughError(BaseException):
    """Ends a replay; code under replay must not catch it as an error of its own."""


class Filling(Packer):
    """A call that is being run again.

    Args:
        slots: what it fills.
        stop: how many tensors it is to save; it ends then. -1: all.
        entry: what to keep of a tensor that is saved at a place; ``None``: it, without its graph.

    Attributes:
        saved: what it has saved so far.
    """

    __slots__ = ("_entry", "_lock", "saved", "slots", "stop")

    def __init__(self, slots: Stretch, stop: int = -1, entry: Callable[[Tensor, int], Tensor | Source] | None = None) -> None:
        self._entry = entry
        self.slots: Stretch | None = slots  # until it has run: a buffer may keep its graph, and with it the hook
        self.stop = stop
        self.saved: list[Any] = []
        self._lock = Lock()

    @property
    def owner(self) -> Owner | None:
        """The run, as long as it is there."""
        frame = self.frame
        return frame.run if frame is not None else None

    @property
    def frame(self) -> Called | None:
        """The frame, as long as it is there."""
        return self.slots.frame if self.slots is not None else None

    @property
    def replaying(self) -> bool:
        """Yes."""
        return True

    def pack(self, tensor: Tensor) -> Any:
        """The pack hook."""
        with self._lock:  # an inner backward has a thread for each device
            index = len(self.saved)
            if index == self.stop:  # all is there; this is code that cleans up
                return without_graph(tensor)
            entry: Tensor | Source
            if self._entry is not None:
                entry = self._entry(tensor, index)
            elif type(tensor) is Tensor:  # as `without_graph`
                entry = tensor.detach() if tensor.requires_grad else tensor
            else:
                entry = without_graph(tensor)
            self.saved.append(entry)
        if index + 1 == self.stop:
            raise EnoughError
        return entry

    def save(self, tensor: Tensor) -> Give:
        """Save an argument of a call inside, as any operation saves what it needs; the function gives it back."""
        entry = self.pack(tensor)
        return (lambda: entry) if isinstance(entry, Tensor) else entry.get
