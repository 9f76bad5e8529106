"""Does a block invert, is its log-det right, and how far off are reconstructions of a whole model?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..context import reversible
from ..record import WorstError
from ..registry import LogDet, Registration
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
    for way in ways(output, arguments, named=isinstance(entry.inverse, str), inputs=entry.inputs):
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
    said = call.entry.log_det if call.entry is not None else None
    if call.entry is None or said is None:
        return None, ""
    module = call.pinned()
    with torch.no_grad():
        output = call.call(module)  # which may initialise it
    varied = _inputs(call, output, said)
    if not varied:
        return None, ""
    sample = [call.args[place][0].detach() for place in varied]
    sizes = [one.numel() for one in sample]

    def first(flat: Tensor) -> Tensor:
        call.reset()
        args = list(call.args)
        for place, part, like in zip(varied, flat.split(sizes), sample, strict=True):
            args[place] = torch.cat([part.view_as(like)[None], args[place][1:]])
        return torch.cat([one[0].flatten() for one in _mapped(call.apply(module, tuple(args), call.kwargs), said)])

    jacobian = torch.autograd.functional.jacobian(first, torch.cat([one.flatten() for one in sample]))
    wanted = float(torch.linalg.slogdet(jacobian.double())[1])
    call.reset()
    with torch.no_grad():
        got = _said(call, module, said)
    name = said if isinstance(said, str) else f"output {said}" if isinstance(said, int) else "log_det="
    if got is None:
        return float("inf"), f"{name} gives no log-det where the Jacobian's log-abs-det is {wanted:.4g}"
    error = abs(got - wanted) / max(1.0, abs(wanted))
    if error <= bound:
        return error, ""
    return error, f"{name} gives {got:.4g} where the Jacobian's log-abs-det is {wanted:.4g}"


def _inputs(call: Call, output: Any, said: LogDet) -> list[int]:
    """The leading arguments that make the outputs: as many elements a sample; none if there are no such, or too many."""
    wanted = [tensor for tensor in _mapped(output, said) if tensor.dim()]
    elements = sum(tensor[0].numel() for tensor in wanted if len(tensor))
    found: list[int] = []
    for place, argument in enumerate(call.args):
        if not isinstance(argument, Tensor) or not argument.is_floating_point() or not argument.dim() or not len(argument):
            break
        found.append(place)
        elements -= argument[0].numel()
        if elements <= 0:
            break
    size = sum(call.args[place][0].numel() for place in found)
    return found if elements == 0 and 0 < size <= _SMALL else []


def _mapped(output: Any, said: LogDet) -> list[Tensor]:
    """Of an output what the Jacobian is of: not the log-det, nor what is like one."""
    if isinstance(said, int) and isinstance(output, (tuple, list)) and -len(output) <= said < len(output):
        output = [one for place, one in enumerate(output) if place != said % len(output)]
        return tensors_of(output)
    return [tensor for place, tensor in enumerate(tensors_of(output)) if not place or tensor.dim() > 1]


def _said(call: Call, module: Any, said: LogDet) -> float | None:
    """What a registration says of the first sample."""
    if isinstance(said, str):
        value = getattr(module, said)(*call.args, **call.kwargs)
    else:
        output = call.apply(module, call.args, call.kwargs)
        value = output[said] if isinstance(said, int) else said(module, output, *call.args, **call.kwargs)
    if value is None:
        return None
    return float(value.flatten()[0]) if isinstance(value, Tensor) else float(value)
