"""Models that are called as they are: there is nothing to let go of, or it is known that all of it fits the budget.

Hooks cost the host some microseconds a saved tensor, for nothing. So the outermost call of a module is watched while it is
learned what it saves; from then on calls of the same kind are made without hooks, and the books get the sum. Another kind of
arguments, modes or parameters is learned anew; now and then a known call is watched again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..buffers import modules_of
from ..registry import ACTIVE, Registration
from ..storage import Ledger
from ..tracing import is_traced
from .frames.home import Home
from .handles.local import packer, pop_hooks, push_hooks
from .passes import EVERYTHING, is_retained
from .tree import leaves_of, tensors_of

if TYPE_CHECKING:
    from .handles.shared import Shared

__all__ = ["FITS", "WholeCalls"]


class Caller(Home, Protocol):
    """A run, as far as it is asked here."""

    place: Callable[[], str] | None  # says where in the model a tensor is saved
    adapts: bool  # whether it knows the blocks of other libraries

    @property
    def options(self) -> object:
        """What a run with the same ones does alike."""
        ...


FITS = "saved as in plain autograd: the budget has room for all of it"
LEARN = 3  # calls of a kind that are watched
AGAIN = 64  # then one in so many
_KINDS = 32  # of calls of one module
_PLAIN = (bool, int, float, str, type(None))


class _Kind:
    """What calls of one kind have shown.

    Attributes:
        calls: how many there were.
        saved: bytes that plain autograd would hold for one.
        need: bytes by which a step may raise what is held, from the beginning of the call on; ``None`` if something had to go.
        frames: blocks that were bracketed in it.
    """

    __slots__ = ("calls", "frames", "need", "saved")

    def __init__(self) -> None:
        self.calls = 0
        self.saved = -1
        self.need: int | None = 0
        self.frames = 0


_kinds: weakref.WeakKeyDictionary[nn.Module, dict[object, _Kind]] = weakref.WeakKeyDictionary()


class Whole:
    """What one call has saved that was made as it is; counted until its backward is over, or its graph is gone."""

    __slots__ = ("__weakref__", "_ledger", "nbytes", "what")

    def __init__(self, ledger: Ledger, nbytes: int, what: str) -> None:
        self._ledger = ledger
        self.nbytes = nbytes
        self.what = what
        ledger.pack(nbytes)
        ledger.add(nbytes)

    def __del__(self) -> None:
        self.purge()

    def purge(self) -> None:
        """It is not held any more."""
        self._ledger.packed -= self.nbytes
        self._ledger.held -= self.nbytes
        self.nbytes = 0


class WholeCalls:
    """The outermost calls of modules in a run.

    Attributes:
        is_open: whether one is being made.
    """

    def __init__(self, run: Caller) -> None:
        self._run = weakref.ref(run)
        self.is_open = False
        self._watched: list[tuple[_Kind, int]] = []  # whose need is known when backward begins
        self._wholes: weakref.WeakSet[Whole] = weakref.WeakSet()

    def call(self, call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a module, by a function of its arguments; as it is, if that is known to be right."""
        run = self._run()
        around: object = packer()
        if run is None or not torch.is_grad_enabled() or around is not run or run.place is not None or is_traced():
            return call(args, kwargs)
        self.is_open = True
        try:
            kind = _kind_of(run, module, args, kwargs)
            if kind is None:
                return call(args, kwargs)
            kind.calls += 1
            if kind.calls <= LEARN or not kind.calls % AGAIN:
                return self._watch(run, kind, call, args, kwargs)
            if self._is_nothing_to_do(run, kind):
                return self._as_it_is(run, kind, call, module, args, kwargs)
            return call(args, kwargs)
        finally:
            self.is_open = False

    @staticmethod
    def serve(shared: Shared) -> bool:
        """Whether a run with these options may have nothing to do."""
        return shared.offload is None and (shared.budget.limit > 0 or not shared.ops)

    @staticmethod
    def _is_nothing_to_do(run: Caller, kind: _Kind) -> bool:
        budget = run.budget
        if budget.limit:
            return kind.need is not None and run.ledger.held + kind.need <= budget.limit
        return not kind.frames and not run.shared.ops

    def _as_it_is(
        self, run: Caller, kind: _Kind, call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        active, ACTIVE.run = ACTIVE.run, _WITHOUT_FRAMES if run.adapts else None
        pop_hooks()
        try:
            output = call(args, kwargs)
        finally:
            push_hooks(run.pack, run.unpack)
            ACTIVE.run, run.marks = active, None
        for tensor in tensors_of(output):
            node: Any = tensor.grad_fn
            if node is not None and kind.saved:
                whole = Whole(run.ledger, kind.saved, run.label(module, 0))
                self._wholes.add(whole)
                node.metadata[whole] = whole
                node.register_prehook(_Begun(run, whole))
                break
        return output

    def _watch(self, run: Caller, kind: _Kind, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ledger, frames, evicted = run.ledger, run.ordinal, run.budget.evicted
        held, packed = ledger.all_held, ledger.all_packed
        output = call(args, kwargs)
        ledger.settle()
        saved = ledger.all_packed - packed
        if saved != kind.saved:  # it is not known yet, or another one than was thought
            kind.saved, kind.calls, kind.need = saved, 1, 0
        kind.frames = run.ordinal - frames
        if run.budget.evicted != evicted:
            kind.need = None
        self._watched.append((kind, held))
        return output

    def learn(self, run: Caller) -> None:
        """Backward begins: here most is held."""
        for kind, before in self._watched:
            if kind.need is not None:
                kind.need = max(kind.need, run.ledger.all_held - before)
        self._watched = []

    def report(self) -> Iterator[tuple[str, int]]:
        """What is held of calls that were made as they are, and how many bytes."""
        for whole in self._wholes:
            if whole.nbytes:
                yield whole.what, whole.nbytes


class _WithoutFrames:
    """Takes calls of registered methods where there are neither frames nor hooks.

    What an adapter has in their place runs here, too: a step computes what the steps before it did, which were watched.
    """

    def call(
        self, entry: Registration, original: Callable[..., Any], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        runs = entry.instead is not None and torch.is_grad_enabled() and not is_traced()
        return (entry.instead if entry.instead is not None and runs else original)(module, *args, **kwargs)

    def call_module(self, original: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return original(module, *args, **kwargs)

    call_named = call_module


_WITHOUT_FRAMES = _WithoutFrames()


class _Begun:
    """Backward comes to what was called as it is: when it is over, that is not held any more."""

    __slots__ = ("_run", "_whole")

    def __init__(self, run: Caller, whole: Whole) -> None:
        self._run = weakref.ref(run)
        self._whole = weakref.ref(whole)

    def __call__(self, _: Any) -> None:
        run, whole = self._run(), self._whole()
        if run is not None and whole is not None and not is_retained():
            run.passes.purge_later(whole, EVERYTHING)


def _kind_of(run: Caller, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Kind | None:
    """What is known of such calls; ``None`` where a compiler is at work, which compiles anew without hooks."""
    modules = modules_of([module])
    if any(part._compiled_call_impl is not None or "_orig_mod" in part._modules for part in modules):
        return None
    known = _kinds.get(module)
    if known is None:
        known = _kinds[module] = {}
    key = (run.options, *map(_looks, leaves_of((args, kwargs))), *_modes(), tuple(map(id, modules)), _flags(modules))
    kind = known.get(key)
    if kind is None:
        if len(known) >= _KINDS:
            known.clear()
        kind = known[key] = _Kind()
    return kind


def _looks(leaf: Any) -> object:
    if isinstance(leaf, Tensor):
        return type(leaf), leaf.shape, leaf.dtype, leaf.requires_grad, leaf.device
    return leaf if type(leaf) in _PLAIN else type(leaf)


def _modes() -> tuple[object, ...]:
    kinds = ("cpu", "cuda") if torch._C._is_any_autocast_enabled() else ()
    return tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds)


def _flags(modules: list[nn.Module]) -> tuple[bytes, bytes]:
    """Which are in training, and which parameters require a gradient."""
    parameters = [parameter for module in modules if module._parameters for parameter in module._parameters.values()]
    return bytes(map(_training, modules)), bytes([p is not None and p.requires_grad for p in parameters])


_training = attrgetter("training")
