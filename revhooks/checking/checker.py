"""``check()``: what is tried, and what is made of it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..adapters import adapt
from ..context import reversible
from ..errors import RegistrationError, RevhooksError, explain
from ..generators import RngTracker
from ..runtime.policy.guard import DRIFT, tolerance
from .call import Call, registration_of
from .drift import Drift
from .inverse import block_error, log_det_error, reconstruction
from .result import CheckResult
from .steps import Taken, first_difference, is_equal, take, worst_gradient

__all__ = ["check"]


def check(module: nn.Module | Callable[..., Any], *args: Any, under: reversible | None = None, **kwargs: Any) -> CheckResult:
    """Compare steps under ``reversible()`` with those of plain autograd, and try the inverses of what has one.

    Outputs, gradients, buffers and generators after the step, determinism; of blocks with an inverse how far reconstructions
    are off, how that grows over a chain, how often branches are called, and the log-det. Works on copies: the module, its
    buffers, its gradients and the global generators are left as they are.

    Args:
        module: any module. A block whose registered method is not reached by ``forward`` is tried by that method; of two
            directions name the other one: ``check(flow.inverse, x)``.
        *args: its inputs.
        under: the context to try, as ``under=revhooks.reversible(replay=Block, budget="2GiB")``. By default
            ``reversible(guard="off")``: with nothing that would catch what is wrong.
        **kwargs: its keyword arguments.

    Returns:
        A `CheckResult`, truthy when all is well.

    Raises:
        RegistrationError: it is no module.

    Example:
        >>> from revhooks import nn as rnn
        >>> block = rnn.AdditiveCoupling(nn.Linear(2, 2), nn.Linear(2, 2), dim=-1).double()
        >>> result = check(block, torch.randn(3, 4).double())
        >>> bool(result), result.evaluations
        (True, {'f': 2, 'g': 2})
        >>> result = check(nn.Sequential(nn.Linear(4, 4), nn.GELU()), torch.randn(3, 4), under=reversible(replay=nn.GELU))
        >>> print(result.verdict)
        ok: Sequential under reversible(replay=GELU): gradients bitwise equal
    """
    called, method = (module.__self__, module.__name__) if inspect.ismethod(module) else (module, None)
    if not isinstance(called, nn.Module):
        raise RegistrationError(
            explain("check()", expected="a module, or a method of one", got=type(called).__name__, remedy="pass the module")
        )
    adapt()
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    device = tensors[0].device if tensors else torch.device("cpu")
    state = RngTracker().capture(device)
    try:
        call = Call(called, method, args, kwargs, state, device)
        return _Check(call, under if under is not None else reversible(guard="off"), default=under is None).run()
    finally:
        state.restore()


_NOTHING: dict[str, Any] = {"gradient_error": math.inf, "outputs_equal": False}  # of steps that could not be taken
_NOTABLE = 1e-3  # an error of a stream in 16 bits, where there are better ways


class _Check:
    """One check; findings become problems here, and each gets its remedy."""

    def __init__(self, call: Call, under: reversible, *, default: bool) -> None:
        self.call = call
        self.under = under
        self.name = "reversible()" if default else _written(under)
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.inverts = any(registration_of(block) is not None for block in call.module.modules())

    def run(self) -> CheckResult:
        """Try everything."""
        plain, again = take(self.call, None), take(self.call, None)
        deterministic = self._is_deterministic(plain, again)
        repeats = all(is_equal(a, b) for (_, a), (_, b) in zip(plain.gradients, again.gradients, strict=True))
        del again
        if not plain.trains:
            self._problem("no output needs a gradient, so nothing was compared", "check it with gradients, and in training mode")
        bound = max([tolerance(t.dtype)[0] for t in plain.outputs], default=0.0)
        error, drift = self._inverses(bound)
        taken = self._taken()
        found = self._compared(taken, plain, 10 * bound, deterministic, repeats) if taken is not None else _NOTHING
        log_det, wrong = log_det_error(self.call, 10 * bound)
        if wrong:
            self._problem(wrong, "mend log_det, or register the class without it")
        return CheckResult(
            subject=type(self.call.module).__name__,
            inverse_error=error,
            deterministic=deterministic,
            problems=tuple(self.problems),
            log_det_error=log_det,
            drift=drift,
            under=self.name,
            notes=tuple(self.notes),
            **found,
        )

    def _compared(self, taken: Taken, plain: Taken, bound: float, deterministic: bool, repeats: bool) -> dict[str, Any]:
        """What steps in the context have given and left behind, beside those of plain autograd."""
        equal = all(is_equal(g, e) for (_, g), (_, e) in zip(taken.gradients, plain.gradients, strict=True))
        error, where = (0.0, "") if equal else worst_gradient(taken, plain)
        found: dict[str, Any] = {
            "evaluations": taken.evaluations,
            "gradient_error": error,
            "gradients_equal": equal,
            "outputs_equal": all(map(is_equal, taken.outputs, plain.outputs)),
            "buffers": tuple(name for name, one in plain.buffers.items() if not is_equal(one, taken.buffers[name])),
            "generators": tuple(sorted(plain.generators.moved(taken.generators))),
            "packed_bytes": taken.held.packed_bytes,
            "held_bytes": taken.held.held_bytes,
        }
        if deterministic:  # else all of this may be its own doing
            if not equal:
                self._judge_gradients(error, where, taken, plain, bound, repeats=repeats)
            self._judge_state(**{name: found[name] for name in ("outputs_equal", "buffers", "generators")})
        for name, count in taken.evaluations.items():
            fewest = 2 * max(plain.evaluations.get(name, 1), 1)
            if count > fewest:
                remedy = "have the inverse call the same modules on the same inputs as forward, or name them with branches="
                self._problem(f"branch {name} is called {count} times a step, where {fewest} would do", remedy)
        return found

    def _problem(self, what: str, remedy: str) -> None:
        self.problems.append(f"{what}. Remedy: {remedy}.")

    def _is_deterministic(self, plain: Taken, again: Taken) -> bool:
        if all(map(is_equal, plain.outputs, again.outputs)):
            return True
        where = first_difference(self.call)
        self._problem(
            f"two calls from the same state differ{f', first in the output of {where}' if where else ''}: "
            "a replay cannot repeat them exactly",
            "draw from the global generators of torch, Python or numpy, keep what is counted in buffers, or exclude the module "
            "with keep=",
        )
        return False

    def _inverses(self, bound: float) -> tuple[float | None, Drift | None]:
        """The error of the module's own inverse, or the worst of those inside; and the drift."""
        if not self.inverts:
            return None, None
        try:
            worst, drift = reconstruction(self.call, self.under.options)
        except RevhooksError as problem:  # the steps will tell
            worst, drift = None, None
            failure = str(problem)
        entry = self.call.entry
        if entry is not None and entry.inverse is not None:
            error, wrong = block_error(self.call, entry, bound)
            if wrong:
                self._problem(wrong, self._inverse_remedy(type(self.call.module).__name__))
            return error, drift
        if worst is None:
            self.problems.append(failure)
            return math.inf, None
        if not float(worst) <= bound:
            self._problem(
                f"{worst.block} is reconstructed with an error of {worst:.2g} (relative), where {bound:g} is tolerated",
                self._inverse_remedy("the class"),
            )
        else:
            self._note_drift(float(worst), drift, bound)
        return float(worst), drift

    def _note_drift(self, worst: float, drift: Drift | None, bound: float) -> None:
        """What a reader should know of errors that are tolerated."""
        if self.call.is_low is not None and worst > _NOTABLE:
            self.notes.append(f"reconstructions are off by {worst:.2g}; {self._inverse_remedy('')}")
        if drift is not None and (depth := drift.reaches(bound)) is not None and depth <= 10 * drift.errors[-1][0]:
            self.notes.append(f"at this growth the error would pass {bound:g} after about {depth} {drift.unit}s")

    def _inverse_remedy(self, what: str) -> str:
        low = self.call.is_low
        if low is not None:
            return (
                f"the streams are {str(low).removeprefix('torch.')}: keep them in float32 and run the branches under "
                "torch.autocast, or give couplings grid_bits=12"
            )
        return (
            f"mend the inverse, exclude {what} with keep=, or, where rounding adds up over a chain, give couplings grid_bits=12"
        )

    def _taken(self) -> Taken | None:
        try:
            return take(self.call, self.under)
        except RevhooksError as error:
            if str(error) not in self.problems:
                self.problems.append(str(error))
        except Exception as error:
            self._problem(
                f"a step under {self.name} raises {type(error).__name__}, which one of plain autograd does not: {error}",
                "exclude the module that raises it with keep=, or pass ops=False",
            )
        return None

    def _judge_gradients(self, error: float, where: str, taken: Taken, plain: Taken, bound: float, *, repeats: bool) -> None:
        """Gradients that are not bitwise equal."""
        if not taken.inversions and repeats:  # then they should be
            bound = max(torch.finfo(e.dtype).eps for _, e in plain.gradients) ** DRIFT
            self.notes.append("gradients are not bitwise equal, though nothing was inverted")
        if not error <= bound:
            remedy = self._inverse_remedy("the block") if taken.inversions else "exclude blocks with keep=, or pass ops=False"
            self._problem(
                f"gradients differ by {error:.2g} (relative) from those of plain autograd, most that of {where}; "
                f"{bound:.2g} is tolerated",
                remedy,
            )

    def _judge_state(self, outputs_equal: bool, buffers: tuple[str, ...], generators: tuple[str, ...]) -> None:
        """Outputs, buffers and generators that are others than those of plain steps."""
        if not outputs_equal:
            self._problem(f"outputs under {self.name} differ from those of plain autograd", "report it, with the model")
        if buffers:
            self._problem(
                f"buffers are others than after a plain step: {', '.join(buffers[:4])}",
                f"exclude the module that has {buffers[0]} with keep=",
            )
        if generators:
            self._problem(
                f"generators are in another state than after a plain step: {', '.join(generators)}",
                "draw in forward only, not in backward, or exclude the block that draws with keep=",
            )


def _written(context: reversible) -> str:
    """A context as one would write it; without a guard, which a check does without, so that nothing hides what is wrong.

    Example:
        >>> _written(reversible(replay=(nn.GELU, nn.ReLU), budget="2GiB", ops=False))
        "reversible(replay=(GELU, ReLU), budget='2GiB', ops=False)"
    """
    usual = {"replay": (), "keep": (), "budget": None, "ops": True, "offload": False, "guard": "fallback", "adapters": True}
    given = {name: value for name, value in context.options.items() if value not in (usual[name], "off")}
    return f"reversible({', '.join(f'{name}={_spelled(value)}' for name, value in given.items())})"


def _spelled(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_spelled, value))})" if len(value) != 1 else _spelled(value[0])
    return str(getattr(value, "__name__", None) or repr(value))
