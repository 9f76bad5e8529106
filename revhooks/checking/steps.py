"""Steps of one call in plain autograd and under ``reversible()``, and what tells them apart."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..context import reversible
from ..generators import Rng, RngTracker
from ..record import Stats
from ..runtime.policy.guard import relative_error
from ..runtime.run import Run
from .call import Call, count_calls, leaf, tensors_of

__all__ = ["Taken", "first_difference", "is_equal", "take", "worst_gradient"]

STEPS = 2  # the second meets what the first has learned


@dataclass
class Taken:
    """What steps have given and left behind.

    Attributes:
        outputs: of all steps.
        gradients: of all steps, by name of the parameter or the input.
        buffers: after the last step, by name.
        generators: their states after the last step.
        evaluations: of each branch, in the first step.
        held: of the first step, when forward was over.
        inversions: in all steps.
        trains: whether anything got a gradient.
    """

    generators: Rng
    outputs: list[Tensor] = field(default_factory=list)
    gradients: list[tuple[str, Tensor]] = field(default_factory=list)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    evaluations: dict[str, int] = field(default_factory=dict)
    held: Stats = field(default_factory=Stats)
    inversions: int = 0
    trains: bool = False


def take(call: Call, under: reversible | None) -> Taken:
    """Take steps with a fresh copy, in plain autograd or in a context; in the first one all blocks are released."""
    module = call.copy()
    counts = count_calls(module)
    call.reset()
    taken = Taken(RngTracker.capture(call.device))
    for step in range(STEPS):
        module.zero_grad()
        args, kwargs = pytree.tree_map_only(Tensor, leaf, (call.args, call.kwargs))
        with under if under is not None else contextlib.nullcontext() as run:
            outputs = tensors_of(call.apply(module, args, kwargs))
            if isinstance(run, Run) and not step:
                _let_go(run)
                taken.held = run.stats
        taken.trains |= _backward(outputs)
        taken.inversions += run.stats.inversions if isinstance(run, Run) else 0
        taken.evaluations = taken.evaluations or dict(counts)
        taken.outputs += [output.detach() for output in outputs]
        leaves = [*((f"input {i}", one) for i, one in enumerate(tensors_of((args, kwargs)))), *module.named_parameters()]
        taken.gradients += [(name, _gradient(one)) for name, one in leaves]
    taken.buffers = dict(module.named_buffers())
    taken.generators = RngTracker.capture(call.device)
    return taken


def _let_go(run: Run) -> None:
    """Have nothing spared its rebuild, if nobody has said how much may be held."""
    if not run.budget.limit:
        run.budget.evict_all()


def _backward(outputs: list[Tensor]) -> bool:
    """Backward from a sum of the outputs with random weights; whether there was anything to go back to."""
    weights = torch.Generator(device="cpu").manual_seed(0)
    loss = sum(
        (o.double() * torch.randn(o.shape, generator=weights, dtype=torch.float64, device="cpu").to(o.device)).sum()
        for o in outputs
    )
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        return False
    loss.backward()
    return True


def _gradient(tensor: Tensor) -> Tensor:
    if tensor.grad is None:
        return torch.zeros((), device=tensor.device)
    return tensor.grad.detach().clone() if tensor.grad.layout is torch.strided else tensor.grad.detach().to_dense()


# -- comparing


def is_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit by bit; not-a-numbers are."""
    if a.shape != b.shape or a.dtype is not b.dtype:
        return False
    if torch.equal(a, b):
        return True
    return (a.is_floating_point() or a.is_complex()) and bool(torch.isclose(a, b, rtol=0, atol=0, equal_nan=True).all())


def worst_gradient(got: Taken, expected: Taken) -> tuple[float, str]:
    """The largest relative error of a gradient, and whose.

    Gradients that are next to zero beside the others, as of a bias before a batch norm, are rounding: they are measured by the
    others.
    """
    scale = max((float(torch.linalg.vector_norm(e)) for _, e in expected.gradients if e.isfinite().all()), default=0.0)
    worst, where = 0.0, ""
    for (name, g), (_, e) in zip(got.gradients, expected.gradients, strict=True):
        error = relative_error(g, e)
        size, floor = float(torch.linalg.vector_norm(e)), scale * math.sqrt(torch.finfo(e.dtype).eps)
        if size < floor:
            error *= size / floor if size else 1 / floor  # it is absolute where there is nothing to relate it to
        if error > worst:
            worst, where = error, name
    return worst, where


def first_difference(call: Call) -> str:
    """Which module's output is the first that differs between two forward calls from the same state; ``""`` if none is."""
    seen: list[list[Tensor]] = []
    found: list[str] = []

    def note(_: str, tensors: list[Tensor]) -> None:
        seen.append([t.detach().clone() for t in tensors])

    def compare(name: str, tensors: list[Tensor]) -> None:
        before = seen.pop(0) if seen else []
        if not found and (len(before) != len(tensors) or not all(map(is_equal, before, tensors))):
            found.append(name)

    for told in (note, compare):
        module = call.copy()
        call.reset()
        with torch.no_grad(), _told(module, told):
            call.call(module)
    return found[0] if found else ""


@contextlib.contextmanager
def _told(module: nn.Module, told: Callable[[str, list[Tensor]], None]) -> Iterator[None]:
    """Tell of each module's output, innermost first."""
    hooks = []
    for path, child in module.named_modules():
        name = f"{path or 'the model'} ({type(child).__name__})"

        def hook(_module: nn.Module, _args: Any, output: Any, name: str = name) -> None:
            told(name, tensors_of(output))

        hooks.append(child.register_forward_hook(hook))
    try:
        yield
    finally:
        for one in hooks:
            one.remove()
