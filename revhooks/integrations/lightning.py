"""A callback for Lightning: `lightning.pytorch`, or `pytorch_lightning`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

from ..context import reversible
from . import figures

__all__ = ["ReversibleCallback"]


def _lightning() -> Any:
    """The one that is imported, else the one that is there."""
    names = ("lightning.pytorch", "pytorch_lightning")
    for name in names:
        if name in sys.modules:
            return sys.modules[name]
    return importlib.import_module(names[0] if importlib.util.find_spec("lightning") is not None else names[1])


class ReversibleCallback(_lightning().Callback):  # type: ignore[misc]
    """Takes each training batch under ``reversible(**options)``, its optimizer's step included, and logs what that gives.

    Validation between batches is outside; gradient accumulation, several optimizers, manual optimization and precision plugins
    are as without it. Figures are read once in ``log_every_n_steps`` batches, since on a GPU reading waits for the device.

    Args:
        **options: those of `revhooks.reversible`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._context = reversible(**options)
        self._run: Any = None  # of the batch that is under way
        self._batches = 0
        self._figures: dict[str, float] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Enter the context."""
        self._leave()  # of a batch that was skipped by its module
        self._run = self._context.__enter__()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Leave it, and log."""
        run = self._run
        self._leave()
        self._batches += 1
        if run is not None and (not self._figures or self._batches % max(1, trainer.log_every_n_steps) == 0):
            self._figures = figures(run.stats)
        pl_module.log_dict(self._figures)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave it where a module has ended the epoch in ``on_train_batch_start``."""
        self._leave()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave it."""
        self._leave(exception)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave it, whatever has happened."""
        self._leave()

    def _leave(self, error: BaseException | None = None) -> None:
        if self._run is not None:
            self._run = None
            self._context.__exit__(type(error) if error is not None else None, error, None)
