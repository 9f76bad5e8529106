"""A callback for Hugging Face's `transformers.Trainer`."""

from __future__ import annotations

from typing import Any

from transformers.trainer_callback import TrainerCallback

from ..context import reversible
from . import figures

__all__ = ["ReversibleCallback"]


class ReversibleCallback(TrainerCallback):
    """Takes each forward of the model in training under ``reversible(**options)``, and logs what that gives.

    The Trainer tells its callbacks of no exception, so the context is around forward only, by two hooks on the model while it is
    trained: it is left when forward is, also where that raises (an interrupt in the midst of it leaves it open until `detach`).
    Backward needs no context; evaluation is outside. The figures are in ``state.log_history``, and in what later callbacks log;
    TensorBoard's and the like come earlier, unless `attach` is called.

    Args:
        **options: those of `revhooks.reversible`.
    """

    def __init__(self, **options: Any) -> None:
        self._context = reversible(**options)
        self._entered: list[Any] = []  # the runs of forward calls that are under way
        self._run: Any = None  # of the latest forward
        self._hooks: list[Any] = []

    def attach(self, trainer: Any) -> ReversibleCallback:
        """Come before all other callbacks of a trainer, so that every logger gets the figures."""
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        callbacks.insert(0, self)
        return self

    def detach(self) -> None:
        """Take the hooks off the model, as the end of training does; after an exception they are off with the next beginning."""
        while self._entered:
            self._leave(None, None, None)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Put the hooks on the model."""
        self.detach()
        self._hooks = [
            model.register_forward_pre_hook(self._enter, prepend=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take them away."""
        self.detach()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Add the figures of the latest forward and its backward; on a GPU that waits for the device."""
        if self._run is None or not self._hooks:
            return
        found = figures(self._run.stats)
        if logs is not None:
            logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)

    def _enter(self, model: Any, _args: Any) -> None:
        if model.training:
            self._entered.append(self._context.__enter__())

    def _leave(self, _model: Any, _args: Any, _output: Any) -> None:
        if self._entered:
            self._run = self._entered.pop()
            self._context.__exit__(None, None, None)
