"""What the least is that a Glow of normflows takes when it is inverted: against a backward pass written by hand for its block.

    python bench/flows_by_hand.py     # JSON under bench/results, a table on the screen

One `torch.autograd.Function` calls a block without a graph, inverts it in backward with its network evaluated once, in between,
and runs the rest of it again for the gradients. It checks nothing, puts nothing back, knows this block only, and lets go of
no tensor but those that the block would save: its time is what may be had, its memory is not looked at. Beside it the same model
plain, checkpointed by block, and under ``reversible()``, by turns in one process.
"""

from __future__ import annotations

import contextlib
import json
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from flows import normflows_glow
from normflows.flows import GlowBlock
from ordinary_measure import Contender, difference, timed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import revhooks

RESULTS = Path(__file__).parent / "results"
SECONDS = 40.0
Inverse = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]


class ByHand(torch.autograd.Function):
    """``GlowBlock.inverse``, which maximum likelihood calls; its parameters are passed for autograd to see them."""

    @staticmethod
    def forward(ctx: Any, inverse: Inverse, block: nn.Module, z: Tensor, *parameters: nn.Parameter) -> tuple[Tensor, Tensor]:
        y, log_det = inverse(block, z)
        ctx.inverse, ctx.block, ctx.y, ctx.parameters = inverse, block, y, parameters
        return y, log_det

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        network = ctx.block.flows[0].flows[1].param_map
        seen: list[Tensor] = []

        def evaluated(x: Tensor) -> Tensor:
            with torch.enable_grad():
                seen.append(x.detach().requires_grad_())
                seen.append(type(network).forward(network, seen[0]))
            return seen[1].detach()

        def evaluated_before(x: Tensor) -> Tensor:
            seen.append(x)
            seen.append(seen[1].detach().requires_grad_())
            return seen[3]

        with torch.no_grad(), calling(network, evaluated):
            z, _ = ctx.block(ctx.y)
        with torch.enable_grad(), calling(network, evaluated_before):
            z.requires_grad_()
            outputs = ctx.inverse(ctx.block, z)
        x, y, half, parameters_of_map = seen
        inner = list(network.parameters())
        outer = [p for p in ctx.parameters if not any(p is other for other in inner)]
        by_map, by_z, *by_outer = torch.autograd.grad(outputs, [parameters_of_map, z, *outer], gradients, retain_graph=True)
        by_x, *by_inner = torch.autograd.grad(y, [x, *inner], by_map)
        (through,) = torch.autograd.grad(half, z, by_x)
        found = dict(zip(map(id, [*outer, *inner]), [*by_outer, *by_inner], strict=True))
        return None, None, by_z + through, *(found[id(p)] for p in ctx.parameters)


@contextlib.contextmanager
def calling(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let calls of a module go to a function."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def replaced(make: Callable[[Inverse], Inverse]) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """A context in which blocks call another function."""

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        original = GlowBlock.inverse
        GlowBlock.inverse = make(original)
        try:
            yield
        finally:
            GlowBlock.inverse = original

    return context


by_hand = replaced(lambda inverse: lambda block, z: ByHand.apply(inverse, block, z, *block.parameters()))
checkpointed = replaced(lambda inverse: lambda block, z: checkpoint(inverse, block, z, use_reentrant=False))


def main() -> None:
    contexts = {
        "plain": contextlib.nullcontext,
        "by hand": by_hand,
        "checkpoint": checkpointed,
        "reversible": revhooks.reversible,
    }
    contenders = {name: Contender(normflows_glow(), context) for name, context in contexts.items()}
    for contender in contenders.values():  # ActNorm's first call, which a checkpoint cannot repeat
        Contender(contender.work).step()
    times = timed(contenders, SECONDS)
    want = contenders["plain"].gradients()
    rows = [
        {
            "contender": name,
            "time": times.ratio(name, "plain"),
            "gradients": difference(want, contender.gradients()),
        }
        for name, contender in contenders.items()
    ]
    for row in rows:
        print(f"{row['contender']:12} {row['time']:.2f} of plain's time, gradients differ by {row['gradients']:.0e}")
    RESULTS.mkdir(exist_ok=True)
    where = {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}
    (RESULTS / "flows_by_hand.json").write_text(json.dumps({**where, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
