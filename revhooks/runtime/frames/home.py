"""What frames ask of the run whose they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ...registry import Interceptor
from ..handles.protocols import Called, Inside, Owner

if TYPE_CHECKING:
    from ...saved import Source
    from ..handles.shared import Shared
    from ..handles.value import Value
    from ..passes import Passes
    from ..policy.budget import Budget
    from ..policy.guard import Fallback, Guard
    from ..policy.plan import Facts

__all__ = ["Counter", "Framed", "Home"]


class Counter(Protocol):
    """Counts what frames do."""

    def add(self, frame: Any) -> None:
        """One more."""
        ...


class Home(Owner, Interceptor, Protocol):
    """A run, as frames see it."""

    marks: object  # where the generators were when a frame last looked
    second_evaluations: int

    @property
    def ordinal(self) -> int:
        """How many frames were opened."""
        ...

    @property
    def shared(self) -> Shared:
        """What its handles have in common."""
        ...

    @property
    def budget(self) -> Budget:
        """How much may be held."""
        ...

    @property
    def guard(self) -> Guard:
        """Checks what was rebuilt."""
        ...

    @property
    def passes(self) -> Passes:
        """What it has to do with backward passes."""
        ...

    @property
    def at_end(self) -> Callable[[Callable[[], None]], bool]:
        """Calls a function at the end of the present backward pass."""
        ...

    @property
    def inversions(self) -> Counter:
        """Of frames."""
        ...

    @property
    def replays(self) -> Counter:
        """Of frames."""
        ...

    def label(self, module: nn.Module, ordinal: int) -> str:
        """How errors, warnings and reports call a block."""
        ...

    def output_value(self, tensor: Tensor) -> Value | None:
        """The Value that a tensor is, if it is a frame's output and nothing else needs it."""
        ...

    def note_saved(self, count: int) -> None:
        """So many tensors were saved in a frame."""
        ...

    def pack_inside(self, tensor: Tensor, slots: Inside, index: int, what: str) -> Source:
        """The handle of a tensor in a frame that recomputes what cheap operations make."""
        ...

    def fallback(self, frame: Any, key: object, step: int) -> Fallback:
        """Keeps a step of a frame, or the frame, from the next call on."""
        ...


class Framed(Called, Protocol):
    """A frame, as its slots see it."""

    facts: Facts
    saves_input: bool

    @property
    def run(self) -> Home:
        """Whose it is."""
        ...

    @property
    def stays(self) -> bool:
        """Whether what it saves will be there when backward comes, as far as is known."""
        ...

    @property
    def compares(self) -> bool:
        """Elements of all that it saves, when it is rebuilt."""
        ...

    @property
    def input_keys(self) -> set[int]:
        """Storages of its inputs."""
        ...

    @property
    def packed(self) -> set[int]:
        """Storages that were counted as saved."""
        ...

    @property
    def moved(self) -> set[int]:
        """Of its external storages, those that a call changes."""
        ...

    def coarsest(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype that says how good a stream is."""
        ...
