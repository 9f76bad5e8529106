"""``reversible()``: context manager and decorator; ``checkpoint()``: the same for one function call."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch.autograd.graph import saved_tensors_hooks

from . import nn as _layers  # noqa: F401 - registers the package's own layers
from . import private  # noqa: F401 - refuses a torch that lacks what the runtime imports
from .adapters import adapt
from .errors import RegistrationError, explain
from .registry import ACTIVE
from .runtime.frames.replay import Region
from .runtime.handles.local import surrounding
from .runtime.named import bracket
from .runtime.policy.budget import parse_bytes
from .runtime.policy.plan import predicate
from .runtime.run import Run
from .saved import Source
from .tracing import hide, hide_all
from .watching import WATCHERS

__all__ = ["checkpoint", "reversible"]

_F = TypeVar("_F", bound=Callable[..., Any])
_GUARDS = ("fallback", "raise", "off")


class reversible:  # noqa: N801 - used as a function, like torch.no_grad
    """Train with the memory of reversible blocks given back.

    Inside, calls of registered blocks (`revhooks.register`, `revhooks.nn`) save nothing but what is needed to
    reconstruct their activations in backward. Put it around forward, around forward and backward, or around a
    whole training loop; or decorate a function or a forward method with it. Backward may run after it was left.

    Args:
        budget: bytes that may be held: a number, or ``"2GiB"``; ``"auto"``: nine tenths of what is free. What could be let
            go of is kept while it fits, and the oldest goes first. ``None`` or 0: least memory; ``inf``: plain speed.
        replay: blocks to run again in backward, from their inputs: a class, a tuple of classes, or a predicate of a module.
        keep: blocks to leave as they are: a class, a tuple of classes, or a predicate of a module.
        ops: drop what cheap operations (activations, normalisations, products, casts) make from what is held anyway, and
            recompute it, bit-equal.
        offload: move to pinned host memory of what must be kept (saved tensors without a recipe, inputs of chains and of replayed
            blocks) as much as the bus carries while the device computes, which is learned from the first steps of each kind; with
            a budget what is over it once all that can be recomputed has gone, whatever that takes. On CUDA; on a CPU it changes
            nothing.
        guard: what a reconstruction that is off does: ``"fallback"`` (mild: the block is kept from the next step on,
            one warning; gross: raise), ``"raise"`` (both raise), ``"off"`` (nothing is checked).
        adapters: invert or replay the blocks of flow libraries and of other reversible ones that `revhooks.adapters` knows;
            they are told apart when the context is entered, of libraries that are imported by then.

    Returns:
        On entering a context, the run; ``run.stats`` is a `revhooks.record.Stats`.

    Raises:
        RegistrationError: an argument is none of the above.

    Example:
        >>> import torch
        >>> from revhooks import nn as rnn
        >>> branches = [torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()) for _ in range(8)]
        >>> model = rnn.ReversibleSequential(*branches, dim=-1)
        >>> with reversible() as run:
        ...     model(torch.randn(4, 16)).square().mean().backward()
        >>> run.stats.peak_held_bytes < run.stats.packed_bytes
        True
    """

    def __init__(
        self,
        *,
        budget: float | str | None = None,
        replay: Any = (),
        keep: Any = (),
        ops: bool = True,
        offload: bool = False,
        guard: str = "fallback",
        adapters: bool = True,
    ) -> None:
        if guard not in _GUARDS:
            raise RegistrationError(
                explain("guard=", expected=f"one of {', '.join(map(repr, _GUARDS))}", got=repr(guard), remedy="pick one of these")
            )
        self._guard = guard
        self._keep = predicate(keep, "keep") if keep else None
        self._replay = predicate(replay, "replay") if replay else None
        self._ops = ops
        self._offload = offload
        self._adapters = adapters
        self._budget = budget
        parse_bytes(budget)
        self._spec = replay
        self._keep_spec = keep
        self._by_predicate = bool(replay) and not isinstance(replay, (type, tuple, list))
        if replay:
            bracket(replay)
        if not offload and (budget is not None or not ops):
            bracket(None)
        self._entered: dict[int, list[tuple[saved_tensors_hooks, Any]]] = {}  # by thread

    def __enter__(self) -> Run:
        """Start a run; it is a scope of its own."""
        limit = parse_bytes(self._budget)
        if self._adapters:
            adapt()
        run = Run(
            guard=self._guard,
            keep=self._keep,
            replay=self._replay,
            by_predicate=self._by_predicate,
            spec=tuple(self._spec) if isinstance(self._spec, list) else self._spec,
            ops=self._ops,
            budget=limit,
            offload=self._offload,
            adapters=self._adapters,
        )
        hooks = saved_tensors_hooks(run.pack, run.unpack)
        hooks.__enter__()
        self._entered.setdefault(threading.get_ident(), []).append((hooks, ACTIVE.run))
        ACTIVE.run = run
        for watcher in tuple(WATCHERS):
            watcher.began(run)
        return run

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End the run; what it packed can still be unpacked."""
        run, entered = ACTIVE.run, self._entered[threading.get_ident()]
        hooks, ACTIVE.run = entered.pop()
        if not entered:
            del self._entered[threading.get_ident()]
        hooks.__exit__(kind, error, trace)
        if error is None and isinstance(run, Run):
            run.close()

    def __call__(self, function: _F) -> _F:
        """Decorate a function or method: each call is a run of its own."""
        if isinstance(function, type) or not callable(function):
            raise RegistrationError(
                explain(
                    "@reversible()", expected="a function or method", got=repr(function), remedy="decorate its forward method"
                )
            )

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with reversible(**self.options):
                return function(*args, **kwargs)

        return wrapped  # type: ignore[return-value]

    @property
    def options(self) -> dict[str, Any]:
        """What it was made with, by keyword."""
        kept = {"replay": self._spec, "keep": self._keep_spec}
        rest = {"ops": self._ops, "offload": self._offload, "guard": self._guard, "adapters": self._adapters}
        return {**kept, "budget": self._budget, **rest}


def checkpoint(fn: Callable[..., Any], *args: Any, inverse: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
    """Call ``fn(*args, **kwargs)`` and drop what its ops save: it is recomputed in backward.

    Without an inverse the arguments are kept, and the semantics are those of `torch.utils.checkpoint.checkpoint` with
    ``use_reentrant=False``: any arguments and outputs, nested calls, `torch.autograd.grad` inside, recomputation up
    to the last tensor that is needed (`torch.utils.checkpoint.set_checkpoint_early_stop` is heeded). Random generators,
    autocast and buffers are put back for it; a recomputation that does not repeat the call raises. With an inverse
    the arguments that it returns are dropped too, as for a registered block. It works inside ``reversible()`` and without.

    Args:
        fn: a function or module. Buffers of modules in its closure or arguments are put back as well.
        *args: its arguments.
        inverse: ``inverse(output, *held_args, **kwargs)`` returns the first argument, or a tuple of the first ones.
        **kwargs: its keyword arguments.

    Returns:
        What ``fn`` returns.

    Raises:
        ReplayError: the recomputation saves other tensors than the call did (in backward).
        ModifiedError: an argument was changed in place since (in backward).
        InversionError: the reconstruction is grossly off (in backward).

    Example:
        >>> import torch
        >>> x = torch.ones(3, requires_grad=True)
        >>> checkpoint(lambda x, power: x.exp() ** power, x, power=2).sum().backward()
        >>> torch.allclose(x.grad, 2 * torch.exp(2 * x))
        True
    """
    if torch.compiler.is_compiling():
        return fn(*args, **kwargs)
    around = surrounding()
    run = around.owner if around is not None and around.inside else ACTIVE.run
    if not isinstance(run, Run):
        run = _AMBIENT.run
    region = Region(fn, (args, kwargs))
    if inverse is None or ACTIVE.volume is not None:  # log-dets of blocks inside are part of what is run again
        return run.replay(region, args, kwargs)
    return run.invert(region, inverse, args, kwargs)


class _Ambient(threading.local):
    """What `checkpoint` uses outside of ``reversible()``: a run for each thread, so that its calls make chains."""

    def __init__(self) -> None:
        self.run = Run(adapters=False)  # nothing brackets its calls


_AMBIENT = _Ambient()


# Of the standard library's Python, what this package calls: dynamo would compile that too.
_HELPERS = (
    "_collections_abc",
    "_weakrefset",
    "collections",
    "contextlib",
    "functools",
    "inspect",
    "threading",
    "typing",
    "weakref",
)


def _hide() -> None:
    """Keep dynamo from all frames of this package but the layers' own; what autograd calls is closed: it calls nothing else."""
    own = [module for name, module in sys.modules.items() if name.startswith(f"{__package__}.")]
    hide_all(own, but=frozenset({"forward"}))
    hide_all(sys.modules[name] for name in _HELPERS)
    hooks = [Run.pack, Run.unpack]
    kinds = [Source]
    for kind in kinds:  # which grows
        kinds += kind.__subclasses__()
        hooks += [vars(kind)["get"]] if "get" in vars(kind) else []
    for hook in hooks:
        hide(hook, closed=True)


_hide()
