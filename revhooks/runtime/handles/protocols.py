"""What handles, recomputation and calls ask of those who are above them: runs, frames and the slots of frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ...generators import RngTracker
    from ...modes import Modes
    from ...saved import Source
    from ...storage import Held, Ledger
    from ..offload.parked import HeldAway

__all__ = ["Called", "Consumer", "Inside", "Keeper", "Owner", "Stretch"]


class Keeper(Protocol):
    """Who holds what backward needs, and counts it: a run."""

    @property
    def ledger(self) -> Ledger:
        """The books."""
        ...

    @property
    def values(self) -> dict[int, Any]:
        """Weak references to blocks' outputs that are there, by the keys of their storages."""
        ...

    def hold(self, tensor: Tensor) -> Held | HeldAway:
        """Hold what a frame needs in backward."""
        ...


class Owner(Keeper, Protocol):
    """Whose frames are asked for what they saved: a run."""

    @property
    def rng(self) -> RngTracker:
        """Reads the generators."""
        ...

    def pack(self, tensor: Tensor) -> Source:
        """The pack hook."""
        ...

    def unpack(self, handle: Source) -> Tensor:
        """The unpack hook."""
        ...

    def rebuild(self, frame: Any, slots: Any, index: int) -> Tensor:
        """Fill a slot that was released, and read it."""
        ...

    def reading_kept(self, frame: Any) -> None:
        """Backward has come to a frame that was never released."""
        ...


class Stretch(Protocol):
    """What one stretch of code saved: slots."""

    alive: bytearray
    asked: bool
    live: int
    plain: bool
    quick: bool
    versions: list[int]
    tensors: list[Any]
    statistics: Any
    stream: Any

    @property
    def frame(self) -> Any:
        """Whose they are, as long as it is there."""
        ...

    def __len__(self) -> int:
        """How many tensors were saved."""
        ...

    def save(self, tensor: Tensor, frame: Any) -> Source:
        """Pack a tensor that was saved during forward."""
        ...

    def read(self, index: int) -> Tensor:
        """The tensor in a slot that is filled."""
        ...

    def kill(self, index: int) -> None:
        """The handle of a slot has died."""
        ...

    def is_let_go(self, index: int) -> bool:
        """Whether what is at a place is let go of, to be brought back by a replay."""
        ...

    def passed(self, keys: Any) -> list[tuple[int, int]]:
        """Where parameters and buffers were saved that lie in these storages, and in which."""
        ...

    def looks(self, index: int) -> tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device] | None:
        """What was saved at a place."""
        ...

    def is_at_hand(self, index: int) -> bool:
        """Whether what was saved at a place is held itself."""
        ...

    def entry(self, index: int) -> Tensor:
        """The tensor that is held at a place."""
        ...


class Inside(Stretch, Protocol):
    """Slots that hold handles, which nobody else finds."""

    @property
    def home(self) -> object:
        """Under which nodes note what is there."""
        ...

    @property
    def task(self) -> int:
        """The backward pass in which the call is made, or is run again."""
        ...


class Consumer(Protocol):
    """A frame that gives its inputs back."""

    def sources(self) -> list[Any]:
        """What a rebuild starts from."""
        ...

    def supply(self) -> None:
        """Give the input Values back; use nothing up."""
        ...


class Called(Protocol):
    """A frame, as its call's state and its handles see it."""

    @property
    def run(self) -> Owner:
        """Whose it is."""
        ...

    @property
    def label(self) -> str:
        """How errors and reports call it."""
        ...

    @property
    def device(self) -> torch.device:
        """On which it works."""
        ...

    @property
    def exact(self) -> bool:
        """Whether what it is rebuilt from is what it was."""
        ...

    @property
    def open(self) -> bool:
        """Whether its call is being made."""
        ...

    @property
    def released(self) -> bool:
        """Whether what it saved was let go of."""
        ...

    @property
    def draws(self) -> frozenset[str]:
        """Which generators it may draw from."""
        ...

    @property
    def external(self) -> set[int]:
        """Storages of its parameters and buffers."""
        ...

    @property
    def modes(self) -> Modes | None:
        """In which it was called."""
        ...

    @property
    def precision(self) -> Any:
        """Of products, when it was called."""
        ...

    @property
    def keep(self) -> Callable[[str], None]:
        """Stay as it is until backward, and say why."""
        ...
