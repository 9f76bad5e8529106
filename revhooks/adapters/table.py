"""What an adapter is: a table of classes of one library, and how calls of their methods are rebuilt."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..quiet import vouch
from ..registry import LARGE, Branches, Inverse, LogDet, Registration, add, counted

__all__ = ["BOTH", "INVERT", "LARGE", "LEAVE", "NEITHER", "REPLAY", "Adapter", "Block", "alone"]

INVERT, REPLAY, LEAVE = "invert", "replay", "leave"
Call = Callable[..., Any]


def _by_forward(flow: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
    return flow.forward(output[0], *args, **kwargs)[0]


def _by_inverse(flow: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
    return flow.inverse(output[0], *args, **kwargs)[0]


def alone(found: Any) -> Any:
    """What wrappers of other libraries return: of a tuple of one tensor that tensor."""
    return found[0] if isinstance(found, tuple) and len(found) == 1 else found


# of layers with ``forward(x) -> (y, log_det)`` and ``inverse(y) -> (x, log_det)``: both are trained, and undo each other
BOTH: Mapping[str, Inverse] = {"forward": _by_inverse, "inverse": _by_forward}
NEITHER: Mapping[str, None] = dict.fromkeys(BOTH)


@dataclass(frozen=True, slots=True)
class Block:
    """One line of a table.

    Attributes:
        classes: the classes, as ``"library.module:Class"``; several of one module as ``"library.module:One Two"``.
        how: ``"invert"``; ``"replay"``: run again from its inputs, where an inverse may still serve a tight budget; ``"leave"``:
            not touched.
        methods: what training calls, with the inverse of each, as in `revhooks.register`, which gives back the first argument;
            ``None`` where there is none.
        why: why it is replayed, or left.
        log_det: as in `revhooks.register`, for all methods or by their names. What is left alone is counted too, if it has one.
        branches: as in `revhooks.register`.
        least: bytes of its arguments below which a call is left as it is: a cheap layer is framed where its input is large.
        keeps_zeros: as in `revhooks.register`.
        subclasses: it stands for all classes that are derived from it and have such a method of their own, not for itself.
        instead: what runs in place of the methods, by their names; of what is left, that opens frames of its own.
    """

    classes: str
    how: str = INVERT
    methods: Mapping[str, Inverse | None] = field(default_factory=lambda: {"forward": None})
    why: str = ""
    log_det: LogDet | dict[str, LogDet] | None = None
    branches: Branches | None = None
    least: int = 0
    keeps_zeros: bool = False
    subclasses: bool = False
    instead: Mapping[str, Call] = field(default_factory=dict)

    @property
    def module(self) -> str:
        """Where the classes are."""
        return self.classes.partition(":")[0]

    @property
    def names(self) -> list[str]:
        """What the classes are called."""
        return self.classes.partition(":")[2].split()

    def register(self, cls: type, adapter: str) -> None:
        """Register the methods of a class, of a subclass those of its own; what somebody has registered comes first."""
        for method, inverse in self.methods.items():
            has_it = method in vars(cls) if self.subclasses else callable(getattr(cls, method, None))
            if has_it:
                add(
                    Registration(
                        cls,
                        inverse,
                        method,
                        log_det=self.log_det_of(method),
                        keeps_zeros=self.keeps_zeros,
                        branches=self.branches,
                        prefer=None if self.how == INVERT else self.how,
                        adapter=adapter,
                        instead=self.instead.get(method),
                        least=self.least,
                        inputs=1,
                        assumed=self.subclasses,
                    )
                )

    def log_det_of(self, method: str) -> LogDet | None:
        """The log-det of a method's calls."""
        return self.log_det.get(method) if isinstance(self.log_det, dict) else self.log_det

    def count(self, cls: type) -> None:
        """Have the log-dets of a class that is left alone counted, if there are any."""
        for method in self.methods:
            if method in vars(cls) and self.log_det_of(method) is not None:
                counted(cls, method, log_det=self.log_det_of(method))


@dataclass(frozen=True, slots=True)
class Adapter:
    """The table of one library.

    Attributes:
        library: the name that it is imported by.
        versions: of the library, that it was tested with.
        blocks: the lines.
        own: prefixes of modules whose classes are covered by lines of their own only, not as subclasses.
        quiet: classes, networks among them, whose methods change nothing but parameters and buffers: nothing is noted before they
            are run again (`revhooks.quiet.vouch`). As in `Block.classes`.
    """

    library: str
    versions: str
    blocks: tuple[Block, ...]
    own: tuple[str, ...] = ()
    quiet: tuple[str, ...] = ()
    _waiting: list[Block] = field(init=False)
    _unread: list[str] = field(init=False)  # classes that have not been vouched for yet
    _bases: list[tuple[type, Block]] = field(init=False, default_factory=list)
    _known: set[type] = field(init=False, default_factory=set)  # classes that have been looked at

    def __post_init__(self) -> None:
        object.__setattr__(self, "_waiting", list(self.blocks))
        object.__setattr__(self, "_unread", list(self.quiet))

    def install(self) -> None:
        """Register the classes of modules that are imported by now, and new subclasses of those that stand for theirs.

        Nothing is imported, and nothing is registered twice.
        """
        if self._waiting:
            ready = [block for block in self._waiting if block.module in sys.modules]
            for block in ready:
                self._waiting.remove(block)
                self._take(block)
        if self._unread:
            self._vouch()
        for base, block in self._bases:
            stack: list[type] = type.__subclasses__(base)
            while stack:
                cls = stack.pop()
                stack += type.__subclasses__(cls)
                if cls not in self._known:
                    self._known.add(cls)
                    if not cls.__module__.startswith(self.own):
                        block.register(cls, self.library)

    def _vouch(self) -> None:
        ready = [classes for classes in self._unread if classes.partition(":")[0] in sys.modules]
        for classes in ready:
            self._unread.remove(classes)
            for cls in _classes(classes):
                vouch(cls)

    def _take(self, block: Block) -> None:
        for cls in _classes(block.classes):
            self._known.add(cls)
            if block.subclasses:
                self._bases.append((cls, block))
            elif block.how != LEAVE or block.instead:
                block.register(cls, self.library)
            else:
                block.count(cls)


def _classes(named: str) -> list[type]:
    """The classes of one module that is imported: ``"library.module:One Two"``."""
    module, _, names = named.partition(":")
    found = (getattr(sys.modules[module], name, None) for name in names.split())
    return [cls for cls in found if isinstance(cls, type)]
