"""momentumnet: both of its networks run as a chain of momentum steps of ours, with their functions.

The one without backpropagation computes in integers, and multiplies by a fraction near gamma (58983/65536 for 0.9): so does the
chain, in floating point. Its outputs differ by rounding: 1e-7 of them, as theirs adds a velocity of float32 whatever the dtype.
Its gradients are those of what it computes, where theirs take gamma itself, 1e-5 off. Both streams are held every so many steps,
as in `revhooks.nn.MomentumSequential`; functions with batch norms or dropout are repeated exactly, buffers updated once.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from ..nn.momentum_chain import MomentumSequential
from .table import LEAVE, Adapter, Block
from .twins import twin_of, unbracketed

__all__ = ["ADAPTER"]


class _Push(nn.Module):
    """What one function adds to the velocity, over what the chain multiplies it by."""

    def __init__(self, function: nn.Module, scale: float, *, residual: bool) -> None:
        super().__init__()
        self.function = function
        self.scale = scale
        self.residual = residual

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        push: Tensor = self.function(x, *args)
        if not self.residual:
            push = push - x
        return push if self.scale == 1 else push * self.scale


def _chain(network: Any, gamma: float) -> MomentumSequential:
    functions = list(network.functions)
    looks = (*functions, network.gamma, gamma, network.is_residual)

    def make() -> MomentumSequential:
        scale = (1 - network.gamma) / (1 - gamma)
        pushes = [_Push(function, scale, residual=network.is_residual) for function in functions]
        return MomentumSequential(*pushes, gamma=gamma)

    return twin_of(network, looks, make)


def _forward(network: Any, x: Tensor, *args: Any) -> Any:
    return _run(network, network.gamma, x, args)


def _exact_forward(network: Any, x: Tensor, *args: Any) -> Any:
    exact = sys.modules["momentumnet.exact_rep_pytorch"].TorchExactRep
    n, d = exact.float_to_rational(None, network.gamma)
    network.v = None
    return _run(network, n / d, x, args)


def _run(network: Any, gamma: float, x: Tensor, args: tuple[Any, ...]) -> Any:
    functions = list(network.functions)
    if not functions or not 0 < gamma < 1:
        return unbracketed(type(network).forward)(network, x, *args)
    chain = _chain(network, gamma)
    state = chain.start(x)
    if network.init_speed:
        state = state._replace(v=network.init_function(x))
    return chain.run(state, *args).x


ADAPTER = Adapter(
    library="momentumnet",
    versions="0.10",
    blocks=(
        Block(
            "momentumnet.momentum_net:MomentumNetWithBackprop",
            LEAVE,
            why="a chain of momentum steps of revhooks runs in its place, with its functions",
            instead={"forward": _forward},
        ),
        Block(
            "momentumnet.momentum_net:MomentumNetNoBackprop",
            LEAVE,
            why="a chain of momentum steps of revhooks runs in its place, with its functions; it differs by rounding",
            instead={"forward": _exact_forward},
        ),
        Block("momentumnet.momentum_net:MomentumNet", LEAVE, why="it calls one of the two"),
    ),
)
ADAPTER.install()
