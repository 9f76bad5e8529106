"""What `revhooks.log_det` counts of layers that are not registered for it: inverses, questions, and what is no bijection."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from ..errors import RegistrationError, explain
from ..registry import counted
from .convert import RevNetStack
from .coupling import Coupling
from .flow import FlowSequential, Inverse, MultiScale
from .momentum_chain import MomentumSequential
from .reshape import Pad
from .residual import InvertibleResidual

__all__ = ["NOT_BIJECTIVE"]

# of a layer without a log-abs-det: why it has none, and what to do
NOT_BIJECTIVE: dict[type[nn.Module], tuple[str, str]] = {
    MomentumSequential: (
        "a chain that begins at rest and drops its velocity",
        "call run(start(x)): each step is a bijection of positions and velocities",
    ),
    RevNetStack: (
        "a stack that doubles its input, and merges its streams",
        "call its ReversibleSequential chains, which are bijections of two streams",
    ),
    Pad: ("an injection into more channels", "call it outside of log_det()"),
}


def _refuse(module: nn.Module, *_: Any, **__: Any) -> NoReturn:
    got, remedy = next(said for cls, said in NOT_BIJECTIVE.items() if isinstance(module, cls))
    subject = f"log-det of {type(module).__name__}"
    raise RegistrationError(explain(subject, expected="a bijection", got=got, remedy=remedy))


def _nothing(*_: Any, **__: Any) -> float:
    return 0.0


_cls: type[nn.Module]
for _cls in (Coupling, InvertibleResidual):
    counted(_cls, "inverse")
for _cls in (Coupling, InvertibleResidual, FlowSequential, Inverse, MultiScale):  # a question is no call, whatever it calls
    counted(_cls, "log_det", log_det=_nothing)
for _cls in NOT_BIJECTIVE:
    counted(_cls, "forward", log_det=_refuse)
