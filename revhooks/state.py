"""Capture and restore what a call depends on besides its arguments and generators (Rules 6 and 7).

Autocast, the default device, parameters, and the buffers that a forward call changes.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parameter import is_lazy
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from .effects import undone
from .kinds import clone_of, copy_of, is_allocated, same_values
from .owned import is_foreign, is_sharded
from .storage import is_opaque, storage_key, version_of, versions_of
from .tracing import compiler, set_compiler

__all__ = [
    "PLAIN",
    "Buffers",
    "Modes",
    "detached_clone",
    "modules_of",
    "untouched",
]


# ------------------------------------------------------------------------------------------- modes


class Modes:
    """Autocast of the CPU, of CUDA and of the call's device, the default device, and what compiles frames.

    What a call finds as its default device is a function mode of its thread, which neither follows autograd to another one nor
    is there in a backward that is called under it.
    """

    __slots__ = ("_cache", "_compiler", "_default_device", "autocast")

    def __init__(self, device: torch.device) -> None:
        kinds = dict.fromkeys(("cpu", "cuda", "cpu" if device.type == "meta" else device.type))
        enabled = torch._C._is_any_autocast_enabled()
        self.autocast = tuple((k, torch.get_autocast_dtype(k)) for k in kinds if enabled and torch.is_autocast_enabled(k))
        self._cache = torch.is_autocast_cache_enabled()
        self._default_device = _default_device()
        self._compiler = compiler()

    @classmethod
    def of_call(cls, device: torch.device) -> Modes | None:
        """The modes now; ``None`` when none is set."""
        if not torch._C._is_any_autocast_enabled() and _default_device() is None and compiler() is None:
            return None
        return cls(device)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Run in the modes that were captured."""
        with contextlib.ExitStack() as stack:
            wanted = dict(self.autocast)
            for kind in {"cpu", *wanted} | ({"cuda"} if torch.cuda.is_initialized() else set()):
                if kind in wanted or torch.is_autocast_enabled(kind):
                    enabled = kind in wanted
                    context = torch.autocast(kind, dtype=wanted.get(kind), enabled=enabled, cache_enabled=self._cache)
                    stack.enter_context(context)
            if self._default_device != _default_device():
                stack.enter_context(self._default_device or torch.device("cpu"))
            if self._compiler is not compiler():
                stack.callback(set_compiler, set_compiler(self._compiler))
            yield


def _default_device() -> torch.device | None:
    """Where this thread makes tensors, if somebody has chosen that: `torch.set_default_device`, or a device as a context."""
    if not torch._C._len_torch_function_stack():
        return None
    modes = reversed(_get_current_function_mode_stack())
    chosen: torch.device | None = next((mode.device for mode in modes if isinstance(mode, DeviceContext)), None)
    if chosen is not None and chosen.type == "cuda" and chosen.index is None:  # which one is the thread's, too
        return torch.device("cuda", torch.cuda.current_device())
    return chosen


def _plain_modes() -> Modes:
    modes = Modes(torch.device("cpu"))
    modes.autocast, modes._cache, modes._default_device, modes._compiler = (), True, None, None
    return modes


PLAIN = _plain_modes()


# ----------------------------------------------------------------------------------------- buffers

_Owner = dict[str, Tensor | None]  # a module's ``_parameters`` or ``_buffers``

# Which buffers a module's forward changes, learned at its first call: module -> training -> names.
_mutable: weakref.WeakKeyDictionary[nn.Module, dict[bool, frozenset[str]]] = weakref.WeakKeyDictionary()


def _overwrites_unread(module: nn.Module) -> bool:
    """Whether the module's statistics are written in this call and not read by it.

    BatchNorm in training normalises with the batch's own statistics, and its kernel updates the running
    ones without a version bump. InstanceNorm's saves copies of them. A class with a forward of its own may read them.
    """
    if not isinstance(module, _BatchNorm) or not module.training or not module.track_running_stats:
        return False
    forward: Any = type(module).forward
    while getattr(forward, "__revhooks_bracket__", False):
        forward = forward.__wrapped__
    return forward in _BATCH_NORMS


_BATCH_NORMS = {_BatchNorm.forward, nn.SyncBatchNorm.forward}


class Buffers:
    """The parameters and buffers of a call: what it changed, and what must not change until its replay.

    Made before the call; `finish` after it says whether everything that moved was foreseen.

    Args:
        modules: those that are called, with their children (`modules_of`).
        keys: gets the storage keys of the buffers.
        closely: look for parameters that are written past their version counters, which needs copies.
        owned: the call is theirs; else it may use some of them only, and their parameters are not watched.
    """

    __slots__ = (
        "_before",
        "_copies",
        "_first",
        "_grads",
        "_modes",
        "_modules",
        "_owned",
        "_owners",
        "_read",
        "_scripted",
        "_versions",
        "_written",
        "overwritten",
    )

    # (owner, name, value before the call, the buffer): changed by the call and read by it
    _before: tuple[tuple[_Owner, str, Tensor, Tensor], ...]
    # (owner, name): changed by the call, not read by it
    _written: tuple[tuple[_Owner, str], ...]
    overwritten: tuple[nn.Module, ...]  # whose these are
    # modules whose buffers this call is the first to use: each with a copy and its version
    _first: tuple[tuple[nn.Module, dict[str, tuple[Tensor, Tensor, int]]], ...]

    def __init__(self, modules: Sequence[nn.Module], keys: set[int], *, closely: bool = False, owned: bool = True) -> None:
        self._owned = owned
        self._before = self._written = self._first = self.overwritten = ()
        self._modules = modules
        self._modes = [module.training for module in modules]
        # read by the call, and not to be changed: a module's dictionary, and the tensors that were in it
        owners: Any = [(owner, (*owner.values(),)) for module in modules if owned and (owner := _plain_dict(module._parameters))]
        self._owners: list[tuple[_Owner, tuple[Tensor | None, ...]]] = owners
        self._scripted: list[tuple[Tensor, Tensor]] = []
        if any(module._buffers for module in modules):
            for module in modules:
                if module._buffers:
                    if type(module._buffers) in _DICTS:
                        self._note_buffers(module, keys, owned=owned)
                    else:
                        present = [buffer for buffer in _plain_dict(module._buffers).values() if buffer is not None]
                        self._scripted += [(buffer, detached_clone(buffer)) for buffer in present]
        self._collect()
        # a lazy parameter is made by the call
        self._copies = [None if is_lazy(tensor) else _copy_of(tensor) for tensor in self._read] if closely else ()

    def _collect(self) -> None:
        self._read = read = [tensor for _, tensors in self._owners for tensor in tensors if tensor is not None]
        self._grads = [tensor.requires_grad for tensor in read]
        self._versions = versions_of(read)

    def _note_buffers(self, module: nn.Module, keys: set[int], *, owned: bool) -> None:
        owner: _Owner = module._buffers
        present = [(name, buffer) for name, buffer in owner.items() if buffer is not None and _is_readable(buffer)]
        for _, buffer in present:
            _add_key(keys, buffer)
        if _overwrites_unread(module):
            self._written += tuple((owner, name) for name, _ in present)
            self.overwritten += (module,)
            return
        known = _mutable.get(module, {}).get(module.training)
        if known is None:
            self._first += ((module, {n: (b, detached_clone(b), version_of(b)) for n, b in present}),)
        elif known:
            self._before += tuple((owner, n, detached_clone(buffer), buffer) for n, buffer in present if n in known)
            if owned:
                self._owners.append((owner, tuple(None if name in known else buffer for name, buffer in owner.items())))
        elif owned:
            unread = "num_batches_tracked" if isinstance(module, _NormBase) else ""  # in eval mode
            self._owners.append((owner, tuple(None if name == unread else buffer for name, buffer in owner.items())))

    @property
    def compiled(self) -> bool:
        """Whether `torch.compile` is at work in the call: what it has compiled is not to run in another mode."""
        return any(module._compiled_call_impl is not None or "_orig_mod" in module._modules for module in self._modules)

    def finish(self) -> tuple[bool, bool]:
        """Learn what the call changed: whether that was foreseen, and, looked at closely, whether it wrote parameters."""
        wrote = bool(self._copies) and not all(map(_same, self._read, self._copies))
        self._copies = ()
        kept = all(_same(buffer, copy) for buffer, copy in self._scripted)  # a script's buffers take no others in their places
        self._scripted = []
        for module, copies in self._first:
            owner: _Owner = module._buffers
            moved = set()
            for name, (buffer, copy, version) in copies.items():
                if owner.get(name) is not buffer or version_of(buffer) != version or not _same(buffer, copy):
                    moved.add(name)
                    self._before += ((owner, name, copy, buffer),)
            _mutable.setdefault(module, {})[module.training] = frozenset(moved)
            if self._owned:
                self._owners.append((owner, tuple(None if name in moved else buffer for name, buffer in owner.items())))
        # what has no copy cannot be put back
        kept = kept and not any(before is buffer is owner.get(name) for owner, name, before, buffer in self._before)
        if self._first:
            self._first = ()
            versions = self._versions
            self._collect()
            return self._versions[: len(versions)] == versions and not wrote and kept, wrote
        if versions_of(self._read) == self._versions:
            return not wrote and kept, wrote
        for owner, _ in self._owners:
            _forget(owner)
        return False, wrote

    def add_moved(self, keys: set[int]) -> None:
        """Add the storage keys of the buffers that the call changes: a replay has copies in their places."""
        for owner, name in self._written:
            _add_key(keys, owner[name])
        for _, _, _, buffer in self._before:
            _add_key(keys, buffer)

    def modified(self) -> str | None:
        """The name of a parameter or buffer that was changed in place since the call, if any."""
        if versions_of(self._read) == self._versions:
            return None
        changed = [t for t, v in zip(self._read, self._versions, strict=True) if version_of(t) != v]
        names = (name for owner, _ in self._owners for name, tensor in owner.items() if tensor is changed[0])
        return next(names, "one that was replaced")

    def copies(self) -> list[Tensor]:
        """Of the buffers that the call reads and changes: as they were."""
        return [before for _, _, before, _ in self._before]

    @property
    def trivial(self) -> bool:
        """Whether a replay has nothing to put back."""
        if self._before or self._written or [module.training for module in self._modules] != self._modes:
            return False
        if [tensor.requires_grad for tensor in self._read] != self._grads:
            return False
        for owner, tensors in self._owners:  # every tensor that was read is still its module's
            if len(owner) != len(tensors):
                return False
            for tensor, current in zip(tensors, owner.values(), strict=True):
                if tensor is not current and tensor is not None:
                    return False
        return True

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Put back what the call saw, and afterwards what is there now."""
        modes = [module.training for module in self._modules]
        _switch(self._modules, self._modes)
        lent = {id(module._parameters) for module in self._modules if is_sharded(module)}  # Rule 18
        swapped: list[tuple[_Owner, str, Tensor | None]] = []
        for owner, tensors in self._owners:
            for name, tensor in zip(list(owner), tensors, strict=False):
                if tensor is not None and owner[name] is not tensor and id(owner) not in lent:
                    swapped.append((owner, name, owner[name]))
                    owner[name] = tensor
        frozen = [t for t, grad in zip(self._read, self._grads, strict=True) if t.requires_grad is not grad]
        for tensor in frozen:
            tensor.requires_grad_(not tensor.requires_grad)
        # the replay writes into copies: the buffers and their version counters stay as they are
        now = [(owner, name, owner.get(name)) for owner, name in self._written]
        now += [(owner, name, owner.get(name)) for owner, name, _, _ in self._before]
        for owner, name, buffer in now[: len(self._written)]:
            owner[name] = None if buffer is None else copy_of(buffer)
        for owner, name, before, _ in self._before:
            owner[name] = clone_of(before)  # no leaf, where it carries gradients: it may be written to
        try:
            yield
        finally:
            for owner, name, buffer in now:
                owner[name] = buffer
            for tensor in frozen:
                tensor.requires_grad_(not tensor.requires_grad)
            for owner, name, current in swapped:
                owner[name] = current
            _switch(self._modules, modes)


_DICTS = (dict, OrderedDict)


def _plain_dict(owner: Any) -> _Owner:
    """A module's parameters or buffers; those of a script are read through a wrapper, and stay where they are."""
    return owner if type(owner) in _DICTS else dict(owner.items())


def _switch(modules: Sequence[nn.Module], modes: Sequence[bool]) -> None:
    for module, training in zip(modules, modes, strict=True):
        if module.training is not training:
            module.training = training


def modules_of(roots: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules and all below them, each once."""
    modules, seen = list(roots), set(roots)
    for module in modules:  # which grows
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                modules.append(child)
    return modules


@contextlib.contextmanager
def untouched(root: nn.Module) -> Iterator[None]:
    """Try something on a module, and leave its parameters, buffers and attributes as they are."""
    modules = list(root.modules())
    tensors = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    copies = [(tensor, _copy_of(tensor), version_of(tensor)) for tensor in tensors]
    owners: list[Any] = [m._parameters for m in modules if not is_sharded(m)] + [m._buffers for m in modules]
    registered = [(owner, dict(owner)) for owner in owners]
    try:
        with undone(modules):
            yield
    finally:
        for owner, before in registered:
            owner.clear()
            owner.update(before)
        for tensor, copy, version in copies:
            if version_of(tensor) != version or not _same(tensor, copy):
                _overwrite(tensor, copy)


def detached_clone(tensor: Tensor) -> Tensor:
    """A copy as a leaf, which requires a gradient if the tensor does."""
    copy = copy_of(tensor)
    return copy.requires_grad_() if tensor.requires_grad and copy is not tensor else copy


def _add_key(keys: set[int], tensor: Tensor | None) -> None:
    if tensor is not None and not is_opaque(tensor):
        keys.add(storage_key(tensor))


def _forget(owner: _Owner) -> None:
    """Learn again at the next call what the owner of a surprising buffer changes."""
    for module in [m for m in _mutable if m._buffers is owner]:
        del _mutable[module]


def _is_readable(tensor: Tensor) -> bool:
    """Whether its values can be looked at: it is made already, its memory is there, and it does not lie on several machines."""
    return not is_lazy(tensor) and not is_foreign(type(tensor)) and is_allocated(tensor)


def _copy_of(tensor: Tensor) -> Tensor:
    """A copy, or the tensor itself if it is not to be looked at."""
    return copy_of(tensor) if _is_readable(tensor) else tensor


def _overwrite(buffer: Tensor, value: Tensor) -> None:
    buffer.data.copy_(value)  # ``.data`` has a version counter of its own


def _same(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and same_values(a, b)
