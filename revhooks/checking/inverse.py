"""Does a block invert, is its log-det right, and how far off are reconstructions of a whole model?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..context import reversible
from ..record import WorstError
from ..registry import Registration
from ..runtime.frames.frame import ANCHOR
from ..runtime.policy.guard import relative_error, tolerance
from ..runtime.policy.ways import in_order, judge, places_of, split, ways
from ..watching import watching
from .call import Call, tensors_of
from .drift import Drift, DriftWatcher

__all__ = ["block_error", "log_det_error", "reconstruction"]

_SMALL = 64  # elements of a sample whose Jacobian is computed


def reconstruction(call: Call, options: dict[str, Any]) -> tuple[WorstError, Drift | None]:
    """The worst error of what backward reconstructs, and how it grows; nothing is judged."""
    watcher = DriftWatcher()
    with watching(watcher), reversible(**{**options, "guard": "off"}) as run:
        run.guard.mode = "measure"
        module = call.copy()
        call.reset()
        outputs = tensors_of(call.call(module))
        run.budget.evict_all()
        ends = [kept.what for kept in run.stats.kept if kept.why == ANCHOR]
        loss = sum(o.double().sum() for o in outputs)
        if isinstance(loss, Tensor) and loss.requires_grad:
            loss.backward()
    return run.stats.worst_error, watcher.longest(ends)


def block_error(call: Call, entry: Registration, bound: float) -> tuple[float, str]:
    """How far ``inverse(forward(x))`` is off, and what is wrong with it, if anything."""
    called, error, failure = call.pinned(), float("inf"), ""
    with torch.no_grad():
        output = call.call(called)
        # in the state that the call saw; or that it left, where that is the one that initialises the block
        for module in (call.pinned(), called):
            try:
                error = min(error, _invert(call, entry, module, output))
            except Exception as problem:
                failure = failure or f"its inverse raises {type(problem).__name__}: {problem}"
            if error <= bound:
                return error, ""
    return error, failure or f"inverse(forward(x)) is off by {error:.2g} (relative)"


def _invert(call: Call, entry: Registration, module: Any, output: Any) -> float:
    """The least error of the sensible ways of calling the inverse."""
    inverse = entry.resolve(module)
    places = places_of(getattr(type(module), entry.method), call.args, call.kwargs)
    arguments = in_order(places, call.args, call.kwargs)
    errors: list[float] = []
    failure: Exception | None = None
    for way in ways(output, arguments, named=isinstance(entry.inverse, str)):
        rest = split(places[: way.held], call.args, call.kwargs)
        if not way.fits(inverse, output, *rest):
            continue
        try:
            result = way.call(inverse, pytree.tree_map_only(Tensor, torch.Tensor.clone, output), *rest)
        except Exception as problem:
            failure = failure or problem
            continue
        found = judge(result, arguments[: way.held], lambda _: (float("inf"), float("inf")))
        if not found.problem:
            expected = pytree.tree_leaves(arguments[: found.inputs])
            errors.append(max(relative_error(t, e) for t, e in zip(found.tensors, expected, strict=True)))
        if errors and errors[-1] <= tolerance(expected[0].dtype)[0]:
            break
    if failure is not None and not errors:
        raise failure
    return min(errors, default=float("inf"))


def log_det_error(call: Call, bound: float) -> tuple[float | None, str]:
    """The error of the registered log-det of the first sample against that of its Jacobian; and what is wrong, if it is."""
    name = call.entry.log_det if call.entry is not None else None
    x = call.args[0] if call.args else None
    if name is None or not isinstance(x, Tensor) or not x.is_floating_point() or not len(x) or x[0].numel() > _SMALL:
        return None, ""
    module = call.pinned()
    with torch.no_grad():
        call.call(module)  # which may initialise it

    def first(sample: Tensor) -> Tensor:
        call.reset()
        args = (torch.cat([sample[None], x[1:]]), *call.args[1:])
        return tensors_of(call.apply(module, args, call.kwargs))[0][0].flatten()

    jacobian = torch.autograd.functional.jacobian(first, x[0].detach()).flatten(1)
    if jacobian.shape[0] != jacobian.shape[1]:
        return None, ""
    call.reset()
    with torch.no_grad():
        got = float(getattr(module, name)(*call.args, **call.kwargs).flatten()[0])
    wanted = float(torch.linalg.slogdet(jacobian.double())[1])
    error = abs(got - wanted) / max(1.0, abs(wanted))
    if error <= bound:
        return error, ""
    return error, f"{name} gives {got:.4g} where the Jacobian's log-abs-det is {wanted:.4g}"
