"""What a target gives: a model with its inputs and a loss, or a whole training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TargetError, explain
from ..runtime.tree import tensors_of

__all__ = ["Loss", "StepFunction", "Workload", "mean_square"]

Loss = Callable[[Any], Tensor]


@dataclass(frozen=True, slots=True)
class Workload:
    """A model, its inputs and a loss: what a step needs.

    Attributes:
        model: any module.
        inputs: arguments of one call: positional ones, or a dict of those by keyword.
        loss: maps the model's output to a scalar; by default its ``loss``, or the mean square of its floating outputs.
    """

    model: nn.Module
    inputs: tuple[Any, ...] | dict[str, Any]
    loss: Loss

    def call(self) -> Any:
        """Call the model; gives its output."""
        return self.model(**self.inputs) if isinstance(self.inputs, dict) else self.model(*self.inputs)

    @classmethod
    def of(cls, result: Any, subject: str = "target") -> Workload:
        """Check what a target returned: ``(model, inputs)`` or ``(model, inputs, loss)``.

        Raises:
            TargetError: it is something else.
        """
        if not (isinstance(result, tuple) and len(result) in (2, 3) and isinstance(result[0], nn.Module)):
            got = f"({', '.join(type(part).__name__ for part in result)})" if isinstance(result, tuple) else type(result).__name__
            raise TargetError(
                explain(
                    subject,
                    expected="(model, inputs) or (model, inputs, loss), the model a torch.nn.Module",
                    got=got,
                    remedy="return these",
                )
            )
        model, inputs, *rest = result
        if not rest:
            return cls(model, _arguments(inputs), mean_square)
        if not callable(rest[0]):
            raise TargetError(
                explain(
                    subject,
                    expected="a loss that is a function of the output",
                    got=type(rest[0]).__name__,
                    remedy="return a function",
                )
            )
        return cls(model, _arguments(inputs), rest[0])


@dataclass(frozen=True, slots=True)
class StepFunction:
    """A whole training step: forward, backward, and what else its author does in one, as the optimizer's step.

    Attributes:
        step: takes one step each time it is called; what it returns is of no interest.
        name: what to call it.
    """

    step: Callable[[], Any]
    name: str


def _arguments(inputs: Any) -> tuple[Any, ...] | dict[str, Any]:
    if isinstance(inputs, Mapping):
        return dict(inputs)
    return inputs if isinstance(inputs, tuple) else (inputs,)


def mean_square(output: Any) -> Tensor:
    """What an output says is its loss, as those of Hugging Face's models do, or else the mean square of all floating outputs."""
    loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor) and not loss.dim():
        return loss
    tensors = [t for t in tensors_of(output) if t.is_floating_point()]
    if not tensors:
        raise TargetError(
            explain(
                "the loss of a target",
                expected="floating tensors in the output, or a function that makes a loss of it",
                got=f"an output without: {type(output).__name__}",
                remedy="return (model, inputs, loss)",
            )
        )
    return sum((t.square().mean() for t in tensors), torch.zeros((), device="cpu"))
