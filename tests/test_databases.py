"""torch's own databases of operations and modules: what PyTorch tests its autograd with gives the same under `reversible()`.

They are private to torch; where a version has none, or their requirement is missing, the tests are skipped.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import revhooks
from tests.devices import DEVICE, random_states

pytestmark = pytest.mark.filterwarnings("ignore")  # the databases call operations in every way, also in deprecated ones

DTYPE = torch.float64
PARTS = 4  # for several processes


def database(module: str, name: str) -> list[Any]:
    """Read when it is asked for: its import forbids to set torch's backend flags from then on."""
    pytest.importorskip("expecttest", reason="torch's databases need it")
    entries: list[Any] = getattr(pytest.importorskip(f"torch.testing._internal.{module}"), name)
    torch.backends.__allow_nonbracketed_mutation_flag = True
    return entries


# before and after the operation: so that what it gets and gives is recomputed, in place too
AROUND: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "alone": (lambda x: x * 1, lambda y: y),
    "gelu, then gated": (F.gelu, lambda y: torch.sigmoid(y) * y),
    "scaled, then in place": (lambda x: x * 3, lambda y: torch.tanh(y).mul_(2).relu_()),
}


def same(a: list[Tensor | None], b: list[Tensor | None]) -> bool:
    return all((x is None) == (y is None) and (x is None or torch.equal(plain(x), plain(y))) for x, y in zip(a, b, strict=True))


def plain(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return torch.nan_to_num(tensor if tensor.layout is torch.strided else tensor.to_dense())


def repeatable(attempt: Callable[[], list[Tensor | None] | None]) -> list[Tensor | None] | None:
    """What plain autograd gives, if it gives something, and the same twice (solvers depend on how memory is aligned)."""
    try:
        first, second = attempt(), attempt()
        return first if first is not None and second is not None and same(first, second) else None
    except Exception:  # the operation does not take what is around it, or its gradient cannot be compared
        return None


def of_operation(op: Callable[..., Any], sample: Any, around: str, context: Any) -> list[Tensor | None] | None:
    """The gradients of one call."""
    before, after = AROUND[around]
    leaves: list[Tensor] = []

    def fresh(part: Any) -> Any:
        if not isinstance(part, Tensor):
            return part
        if not part.requires_grad:
            return part.detach().clone()
        leaves.append(part.detach().clone().requires_grad_())
        return before(leaves[-1])

    torch.manual_seed(0)
    given, args, kwargs = tree_map(fresh, (sample.input, sample.args, sample.kwargs))
    with context:
        made = [out for out in tree_leaves(op(given, *args, **kwargs)) if isinstance(out, Tensor) and out.requires_grad]
        if not made:
            return None
        losses = [after(out).sum() if out.is_floating_point() else out.real.sum() for out in made]
        return list(torch.autograd.grad(sum(losses), leaves, allow_unused=True))


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("samples", [1, pytest.param(100, marks=pytest.mark.slow)])
def test_every_operation_gives_the_same_gradients(samples: int, part: int) -> None:
    compared, wrong = 0, []
    for op in database("common_methods_invocations", "op_db")[part::PARTS]:
        if not op.supports_autograd or DTYPE not in op.supported_dtypes(DEVICE.type):
            continue
        for index, sample in zip(range(samples), op.sample_inputs(DEVICE.type, DTYPE, requires_grad=True), strict=False):
            for around in AROUND:
                expected = repeatable(lambda: of_operation(op.op, sample, around, contextlib.nullcontext()))  # noqa: B023
                if expected is None or "lstsq" in op.name:  # differs from call to call, with the alignment of its workspace
                    continue
                compared += 1
                for _ in range(2):  # the second time the site is known
                    got = of_operation(op.op, sample, around, revhooks.reversible())
                    if got is None or not same(expected, got):
                        wrong.append((op.full_name, index, around))
    assert not wrong
    assert compared > 900 / PARTS


CONTEXTS: dict[str, Callable[[nn.Module], contextlib.AbstractContextManager[Any]]] = {
    "ops": lambda _: revhooks.reversible(),
    "replay": lambda module: revhooks.reversible(replay=type(module)),
    "budget": lambda _: revhooks.reversible(budget=3000),
    "checkpoint": lambda _: contextlib.nullcontext(),
}


def of_module(module: nn.Module, call: Any, way: str, before: Callable[[Tensor], Tensor]) -> list[Tensor | None] | None:
    """Gradients, buffers and the generator's state after two calls of a copy of the module."""
    module = copy.deepcopy(module)
    torch.manual_seed(0)
    seen: list[Tensor | None] = []
    with CONTEXTS[way](module) if way in CONTEXTS else contextlib.nullcontext() as run:
        for _ in range(2):
            leaves: list[Tensor] = []

            def fresh(part: Any) -> Any:
                if not isinstance(part, Tensor) or not part.is_floating_point():
                    return part
                leaves.append(part.detach().clone().requires_grad_())  # noqa: B023
                return before(leaves[-1])  # noqa: B023

            args, kwargs = tree_map(fresh, (call.args, call.kwargs))
            out = revhooks.checkpoint(module, *args, **kwargs) if way == "checkpoint" else module(*args, **kwargs)
            made = [part for part in tree_leaves(out) if isinstance(part, Tensor) and part.requires_grad]
            if not made:
                return None
            loss = sum(((part * part).sum() for part in made), torch.zeros(()))
            del args, kwargs, out, made
            wanted = leaves + [p for p in module.parameters() if p.requires_grad]
            seen += [*torch.autograd.grad(loss, wanted, allow_unused=True), *(b.clone() for b in module.buffers())]
            del loss
    if isinstance(run, revhooks.runtime.run.Run):
        assert run.stats.held_bytes == 0, run.stats.kept
    return [*seen, *random_states()]


def module_calls(info: Any) -> Iterator[tuple[nn.Module, Any]]:
    """Modules as torch's tests make them, and what they are called with."""
    for training in (True, False):
        for sample in info.module_inputs_func(info, device=DEVICE.type, dtype=DTYPE, requires_grad=True, training=training):
            if sample.forward_input is not None:
                given = sample.constructor_input
                torch.manual_seed(0)
                yield info.module_cls(*given.args, **given.kwargs).to(DTYPE).train(training), sample.forward_input


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("samples", [4, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_module_gives_the_same_gradients_buffers_and_random_numbers(samples: int, part: int) -> None:
    compared, wrong = 0, []
    for info in database("common_modules", "module_db")[part::PARTS]:
        for index, (module, call) in zip(range(samples), module_calls(info), strict=False):
            before: Callable[[Tensor], Tensor] = F.gelu if index % 2 else lambda x: x * 1
            expected = repeatable(lambda: of_module(module, call, "plain", before))  # noqa: B023
            if expected is None:
                continue
            for way in CONTEXTS:
                compared += 1
                got = of_module(module, call, way, before)
                if got is None or not same(expected, got):
                    wrong.append((info.name, index, way))
    assert not wrong
    assert compared > 500 / PARTS
