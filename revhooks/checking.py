"""``check()``: does a module invert, and is its gradient the same under ``reversible()``?"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .context import reversible
from .errors import RegistrationError, RevhooksError, explain
from .generators import RngTracker
from .nn.coupling import Coupling
from .registry import Registration, lookup
from .runtime.frames.interpose import branches_of, has_registered_parts
from .runtime.policy.guard import relative_error, tolerance
from .runtime.policy.ways import in_order, judge, places_of, split, ways

__all__ = ["CheckResult", "check"]


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What `check` found; truthy when all is well.

    Attributes:
        subject: the module's class.
        inverse_error: relative L2 error of ``inverse(forward(x))``; of the worst block inside where the module itself
            has no inverse.
        gradient_error: largest relative L2 error of a gradient under ``reversible()`` against plain autograd.
        evaluations: for each branch, how often one step calls it: 1 in plain autograd, 2 when it is rebuilt at no
            extra cost.
        deterministic: whether two forward calls from the same state agree bit by bit.
        problems: what is wrong, in words.
        log_det_error: how far the registered ``log_det`` is from the log-abs-det of the Jacobian, relative to it or to 1;
            ``None`` where there is none, or the samples have more than 64 elements.
    """

    subject: str
    inverse_error: float
    gradient_error: float
    evaluations: dict[str, int] = field(default_factory=dict)
    deterministic: bool = True
    problems: tuple[str, ...] = ()
    log_det_error: float | None = None

    def __bool__(self) -> bool:
        """Whether all is well."""
        return not self.problems

    def __str__(self) -> str:
        """A few lines for a terminal."""
        calls = sorted(set(self.evaluations.values()))
        rows = [
            ("inverse error", f"{self.inverse_error:.2g}"),
            ("gradient error", f"{self.gradient_error:.2g}"),
            (
                "evaluations",
                f"{' to '.join(str(n) for n in (calls[:1] + calls[-1:] if len(calls) > 1 else calls)) or '-'} a branch",
            ),
            ("deterministic", "yes" if self.deterministic else "no"),
        ]
        if self.log_det_error is not None:
            rows.append(("log-det error", f"{self.log_det_error:.2g}"))
        head = f"{self.subject}: {'ok' if self else 'not ok'}"
        return "\n".join([head, *(f"  {name:<15} {value}" for name, value in rows), *(f"  ! {p}" for p in self.problems)])


def check(module: nn.Module | Callable[..., Any], *args: Any, **kwargs: Any) -> CheckResult:
    """Try a module on an input: its inverse, its gradients, how often it calls its branches, its log-det.

    Works on copies: the module, its buffers, its gradients and the global generators are left as they are.

    Args:
        module: a registered block, or a model that contains some. A block whose registered method is not reached by
            ``forward`` is tried by that method; of two directions name the other one: ``check(flow.inverse, x)``.
        *args: its inputs, tensors of any shape and floating dtype first.
        **kwargs: its keyword arguments.

    Returns:
        A `CheckResult`, truthy when all is well.

    Raises:
        RegistrationError: nothing in the module can be inverted.

    Example:
        >>> from revhooks import nn as rnn
        >>> block = rnn.AdditiveCoupling(nn.Linear(2, 2), nn.Linear(2, 2), dim=-1).double()
        >>> result = check(block, torch.randn(3, 4).double())
        >>> bool(result), result.evaluations
        (True, {'f': 2, 'g': 2})
    """
    called, method = (module.__self__, module.__name__) if inspect.ismethod(module) else (module, None)
    if not isinstance(called, nn.Module) or not any(_registration(block) is not None for block in called.modules()):
        raise RegistrationError(
            explain(
                type(called).__name__,
                expected="a registered block, or a model that contains one",
                got="no module with a registered inverse",
                remedy="revhooks.register(cls, inverse=...)",
            )
        )
    tracker = RngTracker()
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    device = tensors[0].device if tensors else torch.device("cpu")
    state = tracker.capture(device)
    try:
        return _Check(called, method, args, kwargs, state.restore).run()
    finally:
        state.restore()


def _registration(module: nn.Module, method: str | None = None) -> Registration | None:
    marked = getattr(getattr(type(module), method or "forward", None), "__revhooks__", None)
    return marked if marked is not None else lookup(type(module), method)


class _Check:
    def __init__(
        self,
        module: nn.Module,
        method: str | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        reset: Callable[[], None],
    ) -> None:
        self.module = module
        self.args = args
        self.kwargs = kwargs
        self.reset = reset  # the generators
        self.problems: list[str] = []
        self.entry = _registration(module, method)
        self.method = method or self._method()

    def _method(self) -> str:
        """What training calls: ``forward`` if the registered method is reached by it, else that."""
        if self.entry is None or self.entry.method == "forward":
            return "forward"
        copied, name = self._copy(), self.entry.method
        reached: list[bool] = []
        copied.__dict__[name] = _before(getattr(copied, name), lambda: reached.append(True))
        self.method = "forward"
        with contextlib.suppress(Exception), torch.no_grad():
            self._call(copied)
        return "forward" if reached else name

    def run(self) -> CheckResult:
        plain, expected = self._step(self._copy(), None)
        again, _ = self._step(self._copy(), None)
        deterministic = all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
        if not deterministic:
            self.problems.append("two calls from the same state differ: a replay cannot repeat them exactly")
        bound = max([tolerance(t.dtype)[0] for t in plain], default=0.0)
        inverse_error = self._inverse_error(bound)
        copied = self._copy()
        evaluations = self._count_calls(copied)
        gradient_error = float("inf")
        try:
            _, got = self._step(copied, "off")
            gradient_error = max((relative_error(g, e) for g, e in zip(got, expected, strict=True)), default=0.0)
        except RevhooksError as error:
            self.problems.append(str(error))
        if not gradient_error <= 10 * bound:
            self.problems.append(f"gradients differ by {gradient_error:.2g} (relative) from those of plain autograd")
        self.problems.extend(f"branch {name} is called {n} times a step" for name, n in evaluations.items() if n > 2)
        log_det_error = self._log_det_error(10 * bound)
        name = type(self.module).__name__
        found = (inverse_error, gradient_error, evaluations, deterministic, tuple(self.problems), log_det_error)
        return CheckResult(name, *found)

    def _copy(self) -> nn.Module:
        copied = copy.deepcopy(self.module)
        copied.zero_grad()
        return copied

    def _step(self, module: nn.Module, guard: str | None) -> tuple[list[Tensor], list[Tensor]]:
        """One step, all blocks released; outputs, and gradients of inputs and parameters."""
        self.reset()
        args, kwargs = pytree.tree_map_only(Tensor, _leaf, (self.args, self.kwargs))
        if guard is None:
            outputs = _tensors(self._apply(module, args, kwargs))
        else:
            with reversible(guard=guard) as run:
                outputs = _tensors(self._apply(module, args, kwargs))
                run.budget.evict_all()
        weights = torch.Generator(device="cpu").manual_seed(0)
        loss = sum(
            (o.double() * torch.randn(o.shape, generator=weights, dtype=torch.float64, device="cpu").to(o.device)).sum()
            for o in outputs
        )
        if isinstance(loss, Tensor) and loss.requires_grad:
            loss.backward()
        leaves = [*_tensors((args, kwargs)), *module.parameters()]
        return [o.detach() for o in outputs], [
            leaf.grad if leaf.grad is not None else torch.zeros((), device=leaf.device) for leaf in leaves
        ]

    def _inverse_error(self, bound: float) -> float:
        entry = self.entry
        if entry is None:
            with reversible(guard="off") as run:
                run.guard.mode = "measure"
                self._measured(run)
            return float(run.stats.worst_error)
        called, error, failure = self._pinned(), float("inf"), ""
        with torch.no_grad():
            output = self._call(called)
            # in the state that the call saw; or that it left, where that is the one that initialises the block
            for module in (self._pinned(), called):
                try:
                    error = min(error, self._invert(entry, module, output))
                except Exception as problem:
                    failure = failure or f"its inverse raises {type(problem).__name__}: {problem}"
                if error <= bound:
                    return error
        if failure:
            self.problems.append(failure)
            return error
        self.problems.append(f"inverse(forward(x)) is off by {error:.2g} (relative)")
        return error

    def _pinned(self) -> nn.Module:
        """A copy whose branches draw the same numbers in every call: an inverse calls them in another order."""
        module = self._copy()
        for branch in _branches(module):
            branch.__dict__["forward"] = _before(branch.forward, self.reset)
        return module

    def _measured(self, run: Any) -> None:
        module = self._copy()
        self.reset()
        outputs = _tensors(module(*self.args, **self.kwargs))
        run.budget.evict_all()
        sum(o.double().sum() for o in outputs).backward()  # type: ignore[union-attr]

    def _apply(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return module(*args, **kwargs) if self.method == "forward" else getattr(module, self.method)(*args, **kwargs)

    def _call(self, module: nn.Module) -> Any:
        return self._apply(module, pytree.tree_map_only(Tensor, torch.Tensor.clone, self.args), self.kwargs)

    def _invert(self, entry: Registration, module: nn.Module, output: Any) -> float:
        """The least error of the sensible ways of calling the inverse."""
        inverse = entry.resolve(module)
        places = places_of(getattr(type(module), entry.method), self.args, self.kwargs)
        arguments = in_order(places, self.args, self.kwargs)
        errors: list[float] = []
        failure: Exception | None = None
        for way in ways(output, arguments, named=isinstance(entry.inverse, str)):
            rest = split(places[: way.held], self.args, self.kwargs)
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

    def _log_det_error(self, bound: float) -> float | None:
        """The registered log-det of the first sample against that of its Jacobian."""
        name = self.entry.log_det if self.entry is not None else None
        x = self.args[0] if self.args else None
        if name is None or not isinstance(x, Tensor) or not x.is_floating_point() or not len(x) or x[0].numel() > _SMALL:
            return None
        module = self._pinned()
        with torch.no_grad():
            self._call(module)  # which may initialise it

        def first(sample: Tensor) -> Tensor:
            self.reset()
            return _tensors(self._apply(module, (torch.cat([sample[None], x[1:]]), *self.args[1:]), self.kwargs))[0][0].flatten()

        jacobian = torch.autograd.functional.jacobian(first, x[0].detach()).flatten(1)
        if jacobian.shape[0] != jacobian.shape[1]:
            return None
        self.reset()
        with torch.no_grad():
            got = float(getattr(module, name)(*self.args, **self.kwargs).flatten()[0])
        wanted = float(torch.linalg.slogdet(jacobian.double())[1])
        error = abs(got - wanted) / max(1.0, abs(wanted))
        if not error <= bound:
            self.problems.append(f"{name} gives {got:.4g} where the Jacobian's log-abs-det is {wanted:.4g}")
        return error

    @staticmethod
    def _count_calls(module: nn.Module) -> dict[str, int]:
        names = {child: name for name, child in module.named_modules()}
        branches = _branches(module)
        evaluations = {names[branch]: 0 for branch in branches}

        def count(name: str) -> Callable[[], None]:
            def add() -> None:
                evaluations[name] += 1

            return add

        for branch in branches:
            branch.__dict__["forward"] = _before(branch.forward, count(names[branch]))
        return evaluations


_SMALL = 64  # elements of a sample whose Jacobian is computed


def _branches(module: nn.Module) -> list[nn.Module]:
    """The branches of all registered blocks in a module, each once."""
    branches: dict[nn.Module, None] = {}
    for block in module.modules():
        if isinstance(block, Coupling):
            branches.update(dict.fromkeys(step.branch for step in block.steps()))
        elif (entry := _registration(block)) is not None and (entry.branches is not None or not has_registered_parts(block)):
            branches.update(dict.fromkeys(branches_of(block, entry.branches)))
    return list(branches)


def _before(forward: Callable[..., Any], action: Callable[[], None]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        action()
        return forward(*args, **kwargs)

    return wrapped


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.is_floating_point() or tensor.is_complex())


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor) and t.is_floating_point()]
