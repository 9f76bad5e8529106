"""``log_det()``: how much the blocks of a model change volume, beside its forward.

References:
    Normalizing Flows for Probabilistic Modeling and Inference (Papamakarios et al., 2019, arXiv:1912.02762), section 2.1.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from .adapters import adapt
from .backward import NO_PASS, current_pass
from .errors import ShapeError, explain
from .ladj import LAYERS, Method, checked, pair_of, refused, way_of
from .registry import ACTIVE, Interceptor, Registration, lookup
from .runtime.frames.interpose import has_registered_parts
from .runtime.run import Run
from .tracing import compiler, hide_all, is_recorded

__all__ = ["log_det"]

Call = Callable[..., Any]


class log_det:  # noqa: N801 - used as a function, like reversible
    """Sum up ``log|det dy/dx|`` of the blocks that are called inside: couplings, mixing layers, activations, yours.

    ``log p(x) = log p(y) + value`` for ``y = model(x)``, which trains any model of bijections by maximum likelihood:
    ``loss = nll(y) - ld.value.mean()``. Gradients flow through it. Outside of ``reversible()`` and inside, around it or in it;
    there it keeps the savings, and no branch of a layer of `revhooks.nn` is evaluated more often.

    What counts are outermost calls, in this thread, of registered blocks (`revhooks.register`) and of flow layers of
    `revhooks.nn`: of forward, and of ``inverse`` its own log-det, minus that of forward. Of an i-ResNet it is the estimate of
    its ``call_and_ladj``. A block says its own by ``log_det=`` of `register`, by a method ``call_and_ladj``, or by the table of
    an adapter; a registered container that says none is counted part by part. What no registered block computes is not
    counted, nor what is scripted, traced or exported.

    Entering it begins at zero; of nested ones each counts. What is compiled runs as it is inside. A replay counts nothing
    again; what `torch.utils.checkpoint` would run again is refused.

    Attributes:
        value: the sum, of shape ``(B,)``, or ``()`` if all that was counted has none or nothing was; at least float32.

    Raises:
        RegistrationError: a block does not know its log-det, which names it (on its call); or it is used in compiled code, or a
            block is called inside a transform of `torch.func` or a `torch.utils.checkpoint` that is itself inside.
        ShapeError: a block's log-det is none of a batch (on its call).

    References:
        Papamakarios et al., 2019, arXiv:1912.02762, section 2.1.

    Example:
        >>> from revhooks import nn as rnn
        >>> model = nn.Sequential(rnn.ActNorm(4), rnn.InvertibleLinear(4), rnn.AffineCoupling(nn.Linear(2, 4)))
        >>> x = torch.randn(8, 4)
        >>> with log_det() as ld:
        ...     y = model(x)
        >>> log_prob = torch.distributions.Normal(0.0, 1.0).log_prob(y).sum(1) + ld.value
        >>> (-log_prob.mean()).backward()
        >>> ld.value.shape, model[0].log_scale.grad.shape
        (torch.Size([8]), torch.Size([4]))
    """

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._constant = 0.0
        self._before: list[Any] = []
        self._level = 0

    @property
    def value(self) -> Tensor:
        """The sum so far."""
        total = torch.zeros(()) if self._total is None else self._total
        return total + self._constant if self._constant else total

    def __enter__(self) -> log_det:
        """Begin to count."""
        if is_recorded() or compiler() is not None:
            raise refused("log_det()", "eager code", "code that is compiled or traced", "put it around what is compiled")
        adapt()
        before: Any = ACTIVE.volume
        outer = before.sums if before is not None else ()
        if not self._before:
            self._total, self._constant, self._level = None, 0.0, _level()
        _EAGER.enter()
        self._before.append(before)
        ACTIVE.volume = _Counter(outer if self in outer else (*outer, self))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Count no more."""
        ACTIVE.volume = self._before.pop()
        _EAGER.leave()
        if error is None and _EAGER.compiled_since():
            raise refused("log_det()", "what is compiled to be compiled before", "torch.compile inside", "compile it before")

    def _add(self, label: Callable[[], str], change: Tensor | float) -> None:
        if self._level != _level():
            remedy = "open log_det() in the function that is transformed, and return its value"
            raise refused(label(), "a call outside of torch.func transforms, as log_det() is", "a call in one", remedy)
        if not isinstance(change, Tensor):
            self._constant += change
        elif self._total is None:
            self._total = change
        elif 1 < change.numel() != self._total.numel() > 1:
            got = f"shape {tuple(change.shape)} after {tuple(self._total.shape)} of the blocks before it"
            remedy = "count parts with another batch in a log_det() of their own"
            raise ShapeError(explain(f"log-det of {label()}", expected="one for each sample", got=got, remedy=remedy))
        else:
            device = (change if change.dim() else self._total).device
            self._total = self._total.to(device) + change.to(device)


def _level() -> int:
    """How many transforms of `torch.func` are at work."""
    inner = torch._C._functorch.peek_interpreter_stack()
    return 0 if inner is None else int(inner.level())


class _Eager:
    """While somebody counts, what is compiled runs as it is: a graph calls no block. That holds for all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._stance: Any = None
        self._there = False

    def enter(self) -> None:
        """One more counts."""
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._there = "torch._dynamo" in sys.modules  # else nothing has been compiled
                self._stance = torch.compiler.set_stance("force_eager") if self._there else None

    def leave(self) -> None:
        """One less; the last one puts the compiler back."""
        with self._lock:
            self._users -= 1
            if not self._users and self._stance is not None:
                self._stance.__exit__(None, None, None)
                self._stance = None

    def compiled_since(self) -> bool:
        """Whether the compiler has come and been at work in the meantime."""
        dynamo: Any = sys.modules.get("torch._dynamo.utils")
        return not self._there and dynamo is not None and bool(dynamo.counters["frames"])


_EAGER = _Eager()


class _Counter:
    """What brackets calls while sums are made (`revhooks.registry.Volume`)."""

    __slots__ = ("sums",)

    def __init__(self, sums: tuple[log_det, ...]) -> None:
        self.sums = sums

    def muted(self) -> _Counter:
        """One that computes the same and adds it to nothing."""
        return _Counter(())

    def around(self, run: Interceptor | None) -> _Around:
        """What takes calls of registered methods."""
        return _Around(self, run)

    def count(self, entry: Registration, call: Call, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make the outermost call of a block, and add its log-det to the sums."""
        if self.sums and current_pass() != NO_PASS:  # somebody makes a call again, which was not counted
            return call(module, *args, **kwargs)
        label = functools.partial(_label, ACTIVE.run, module)
        way = way_of(entry, module, label)
        if self.sums and _is_to_be_run_again():
            remedy = "use revhooks.checkpoint, or reversible(replay=...)"
            raise refused(label(), "a call whose log-det gets a gradient", "one in torch.utils.checkpoint", remedy)
        ACTIVE.volume = None  # for the parts of the block
        try:
            output, change = way(call if isinstance(call, Method) else Method(None, entry, call), module, args, kwargs)
            change = checked(change, label)
        finally:
            ACTIVE.volume = self
        for one in self.sums:
            one._add(label, change)
        return output


class _Around:
    """Takes the calls of registered methods: a run, if there is one, makes them."""

    __slots__ = ("_counter", "_run")

    def __init__(self, counter: _Counter, run: Interceptor | None) -> None:
        self._counter = counter
        self._run = run

    def call(self, entry: Registration, original: Call, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Count it, or leave it to its parts."""
        call = Method(self._run, entry, original)
        if _is_container(entry, module):
            return call(module, *args, **kwargs)
        return self._counter.count(entry, call, module, args, kwargs)


def _is_container(entry: Registration, module: Any) -> bool:
    """Whether a block is made of registered parts, which count in its place; all of its parameters are theirs."""
    if not isinstance(module, nn.Module) or entry.log_det is not None or entry.branches is not None:
        return False
    if isinstance(module, LAYERS) or pair_of(entry.method, entry.owner(module)) is not None:
        return False
    if not has_registered_parts(module, by_adapters=bool(entry.adapter)):
        return False
    parts = (part for part in module.modules() if part is not module and _is_counted(part))
    theirs = {id(parameter) for part in parts for parameter in part.parameters()}
    return all(id(parameter) in theirs for parameter in module.parameters())


def _is_counted(module: nn.Module) -> bool:
    forward = type(module).forward
    return lookup(type(module)) is not None or hasattr(forward, "__revhooks__") or hasattr(forward, "__revhooks_counted__")


def _is_to_be_run_again() -> bool:
    """Whether a call lies in a `torch.utils.checkpoint`, which would not repeat what is counted, or has no gradient for it."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is not None and getattr(hooks[0], "__module__", "") == CheckpointFunction.__module__:
        return True
    frame = None if torch.is_grad_enabled() else sys._getframe()
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            return True
        frame = frame.f_back
    return False


def _label(run: object, module: Any) -> str:
    if isinstance(run, Run) and isinstance(module, nn.Module):
        return run.label(module, run.ordinal)
    return type(module).__name__


hide_all([sys.modules[__name__]])
