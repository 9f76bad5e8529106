"""The parameters and buffers of a call: what it changed, and what its replay must find as it was (Rules 6 to 8)."""

from __future__ import annotations

import contextlib
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, UntypedStorage, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parameter import is_lazy

from .effects import undone
from .kinds import clone_of, copy_of, is_allocated, same_values
from .names import unbracketed
from .owned import is_foreign, is_sharded
from .storage import PLAIN_TYPES, is_opaque, storage_key, version_of, versions_of

__all__ = ["Buffers", "detached_clone", "modules_of", "untouched"]

_Owner = dict[str, Tensor | None]  # a module's ``_parameters`` or ``_buffers``


class _Changes(NamedTuple):
    """Which buffers a module's calls change in one mode, learned at its first.

    Some are changed once only, as the flag of ActNorm, which has set its scales. In ``looks`` more calls it is looked whether
    they still are; if not, they are read as the others, whose version counters tell. What was written past its counter is taken
    to be changed for good.
    """

    names: frozenset[str]
    looks: int


_LOOKS = 4
_mutable: weakref.WeakKeyDictionary[nn.Module, dict[bool, _Changes]] = weakref.WeakKeyDictionary()

# In place of buffers that are overwritten: module -> name -> what replays write to.
_scratches: weakref.WeakKeyDictionary[nn.Module, dict[str, Tensor]] = weakref.WeakKeyDictionary()


def _overwrites_unread(module: nn.Module) -> bool:
    """Whether the module's statistics are written in this call and not read by it.

    BatchNorm in training normalises with the batch's own statistics, and its kernel updates the running
    ones without a version bump. InstanceNorm's saves copies of them. A class with a forward of its own may read them.
    """
    if not isinstance(module, _BatchNorm) or not module.training or not module.track_running_stats:
        return False
    return unbracketed(type(module).forward) in _BATCH_NORMS


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
        "_sought",
        "_storages",
        "_versions",
        "_written",
        "overwritten",
        "plain",
    )

    # (owner, name, value before the call, the buffer): changed by the call and read by it
    _before: tuple[tuple[_Owner, str, Tensor, Tensor], ...]
    # (owner, name): changed by the call, not read by it
    _written: tuple[tuple[_Owner, str], ...]
    overwritten: tuple[nn.Module, ...]  # whose these are
    plain: bool  # what it reads are tensors of torch's own classes, and all that it reads is known
    # modules whose buffers this call is the first to use: each with a copy and its version
    _first: tuple[tuple[nn.Module, dict[str, tuple[Tensor, Tensor, int]]], ...]
    _sought: tuple[tuple[nn.Module, bool, dict[str, tuple[Tensor, Tensor, int]]], ...]  # the same, of what may not change again

    def __init__(self, modules: Sequence[nn.Module], keys: set[int], *, closely: bool = False, owned: bool = True) -> None:
        self._owned = owned
        self._before = self._written = self._first = self._sought = self.overwritten = ()
        self._modules = modules
        self._modes = [*map(_training, modules)]
        # read by the call, and not to be changed: a module's dictionary, and the tensors that were in it
        self._owners: list[tuple[_Owner, tuple[Tensor | None, ...]]] = []
        self._scripted: list[tuple[Tensor, Tensor]] = []
        self._storages: list[UntypedStorage] = []  # which are known by their addresses while the call lasts (Rule 3)
        self.plain = owned
        if owned:
            self._owners = [(_plain_dict(own), (*own.values(),)) for module in modules if (own := module._parameters)]
        for module in modules:
            owner: _Owner = module._buffers
            if not owner:
                continue
            if type(owner) in _DICTS:
                self._note_buffers(module, keys, owned=owned)
            else:
                present = [buffer for buffer in _plain_dict(owner).values() if buffer is not None]
                self._scripted += [(buffer, detached_clone(buffer)) for buffer in present]
        self._collect()
        # a lazy parameter is made by the call
        self._copies = [None if is_lazy(tensor) else _copy_of(tensor) for tensor in self._read] if closely else ()

    def _collect(self) -> None:
        self._read = read = [tensor for _, tensors in self._owners for tensor in tensors if tensor is not None]
        self._grads = [*map(_requires_grad, read)]
        self._versions = versions_of(read)
        self.plain = self.plain and _PLAIN_TYPES.issuperset(map(type, read))

    def _note_buffers(self, module: nn.Module, keys: set[int], *, owned: bool) -> None:
        owner: _Owner = module._buffers
        present = [(name, buffer) for name, buffer in owner.items() if buffer is not None and _is_readable(buffer)]
        for _, buffer in present:
            _add_key(keys, buffer)
            if not is_opaque(buffer):
                self._storages.append(buffer.untyped_storage())
        self.plain = self.plain and _PLAIN_TYPES.issuperset([type(buffer) for _, buffer in present])
        if _overwrites_unread(module):
            self._written += (*[(owner, name) for name, _ in present],)
            self.overwritten += (module,)
            return
        known = _mutable.get(module, {}).get(module.training)
        if known is None:
            self._first += ((module, {n: (b, detached_clone(b), version_of(b)) for n, b in present}),)
        elif known.names:
            copies = {n: (b, detached_clone(b), version_of(b)) for n, b in present if n in known.names}
            self._before += tuple((owner, name, copy, buffer) for name, (buffer, copy, _) in copies.items())
            if known.looks > 0:
                self._sought += ((module, module.training, copies),)
            if owned:
                self._owners.append((owner, tuple(None if name in known.names else buffer for name, buffer in owner.items())))
        elif owned:
            unread = "num_batches_tracked" if isinstance(module, _NormBase) else ""  # in eval mode
            self._owners.append((owner, tuple(None if name == unread else buffer for name, buffer in owner.items())))

    @property
    def compiled(self) -> bool:
        """Whether `torch.compile` is at work in the call: what it has compiled is not to run in another mode."""
        return any(module._compiled_call_impl is not None or "_orig_mod" in module._modules for module in self._modules)

    def finish(self) -> tuple[bool, bool]:
        """Learn what the call changed: whether that was foreseen, and, looked at closely, whether it wrote parameters."""
        self._storages = []
        if not (self._copies or self._scripted or self._first or self._before) and versions_of(self._read) == self._versions:
            return True, False
        wrote = bool(self._copies) and not all(map(_same, self._read, self._copies))
        self._copies = ()
        kept = all(_same(buffer, copy) for buffer, copy in self._scripted)  # a script's buffers take no others in their places
        self._scripted = []
        for module, training, copies in self._sought:
            _note_again(module, training, moved=bool(_moved(module, copies)))
        for module, copies in self._first:
            owner: _Owner = module._buffers
            moved = _moved(module, copies)
            self._before += tuple((owner, name, copies[name][1], copies[name][0]) for name in moved)
            seen = all(_shows(owner, name, *copies[name]) for name in moved)
            _mutable.setdefault(module, {})[module.training] = _Changes(moved, _LOOKS if seen else 0)
            if self._owned:
                self._owners.append((owner, tuple(None if name in moved else buffer for name, buffer in owner.items())))
        # what has no copy cannot be put back
        kept = kept and not any(before is buffer is owner.get(name) for owner, name, before, buffer in self._before)
        self._sought = ()
        if self._first:
            self._first = ()
            versions = self._versions
            self._collect()
            return self._versions[: len(versions)] == versions and not wrote and kept, wrote
        if versions_of(self._read) == self._versions:
            return not wrote and kept, wrote
        pairs = zip(self._read, self._versions, strict=True)
        written = {id(tensor) for tensor, version in pairs if version_of(tensor) != version}
        for owner, _ in self._owners:
            _learn(owner, frozenset(name for name, tensor in owner.items() if id(tensor) in written))
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

    def replayed(self) -> contextlib.AbstractContextManager[None] | None:
        """A context that puts back what the call saw, and afterwards what is there now; ``None`` where that is the same."""
        modes, grads, replaced = [*map(_training, self._modules)], [*map(_requires_grad, self._read)], self._replaced()
        if replaced or self._before or self._written or modes != self._modes or grads != self._grads:
            return self._replayed(modes, replaced)
        return None

    def _replaced(self) -> list[tuple[_Owner, str, Tensor]]:
        """Tensors that the call read, and that are not their modules' any more."""
        replaced: list[tuple[_Owner, str, Tensor]] = []
        for owner, tensors in self._owners:
            if len(owner) != len(tensors) or not all(map(is_, tensors, owner.values())):
                pairs = zip(owner.items(), tensors, strict=False)
                replaced += [(owner, name, tensor) for (name, now), tensor in pairs if tensor is not None and tensor is not now]
        return replaced

    @contextlib.contextmanager
    def _replayed(self, modes: list[bool], replaced: list[tuple[_Owner, str, Tensor]]) -> Iterator[None]:
        lent = {id(module._parameters) for module in self._modules if is_sharded(module)} if replaced else ()  # Rule 18
        replaced = [entry for entry in replaced if id(entry[0]) not in lent]
        # the replay writes into other memory: the buffers and their version counters stay as they are
        changed = [*self._written, *((owner, name) for owner, name, _, _ in self._before)]
        now = [(owner, name, owner.get(name)) for owner, name in [*changed, *(entry[:2] for entry in replaced)]]
        _switch(self._modules, self._modes)
        for owner, name, tensor in replaced:
            owner[name] = tensor
        frozen = [t for t, grad in zip(self._read, self._grads, strict=True) if t.requires_grad is not grad]
        for tensor in frozen:
            tensor.requires_grad_(not tensor.requires_grad)
        scratches = {id(module._buffers): _scratches.setdefault(module, {}) for module in self.overwritten}
        for owner, name, buffer in now[: len(self._written)]:
            owner[name] = None if buffer is None else _scratch_for(buffer, name, scratches[id(owner)])
        for owner, name, before, _ in self._before:
            owner[name] = clone_of(before)  # no leaf, where it carries gradients: it may be written to
        try:
            yield
        finally:
            for tensor in frozen:
                tensor.requires_grad_(not tensor.requires_grad)
            for owner, name, buffer in now:
                owner[name] = buffer
            _switch(self._modules, modes)


def _scratch_for(buffer: Tensor, name: str, scratch: dict[str, Tensor]) -> Tensor:
    """What replays may write to in the place of a buffer that they do not read: the same each time."""
    if type(buffer) is not Tensor or not _is_readable(buffer):
        return copy_of(buffer)
    found = scratch.get(name)
    if found is None or found.shape != buffer.shape or found.dtype is not buffer.dtype or found.device != buffer.device:
        found = scratch[name] = torch.zeros_like(buffer)
    return found


_DICTS = (dict, OrderedDict)
_training, _requires_grad = attrgetter("training"), attrgetter("requires_grad")
_PLAIN_TYPES = frozenset(PLAIN_TYPES)


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
        if module._modules:
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


def _moved(module: nn.Module, copies: dict[str, tuple[Tensor, Tensor, int]]) -> frozenset[str]:
    """Which of a module's buffers are not what they were: each with a copy and its version before the call."""
    owner: _Owner = module._buffers
    return frozenset(n for n, (b, copy, version) in copies.items() if _shows(owner, n, b, copy, version) or not _same(b, copy))


def _shows(owner: _Owner, name: str, buffer: Tensor, _: Tensor, version: int) -> bool:
    """Whether a change of a buffer can be seen without a look at its values."""
    return owner.get(name) is not buffer or version_of(buffer) != version


def _note_again(module: nn.Module, training: bool, *, moved: bool) -> None:
    """What a call has shown of buffers that one has changed before."""
    known = _mutable.get(module, {}).get(training)
    if known is None or known.looks <= 0:  # another call of the same time has told
        return
    looks = 0 if moved else known.looks - 1
    _mutable[module][training] = _Changes(known.names if moved or looks else frozenset(), looks)


def _learn(owner: _Owner, names: frozenset[str]) -> None:
    """A call has changed buffers that were taken for those that are read."""
    for module in [m for m in _mutable if m._buffers is owner] if names else ():
        of_modes = _mutable[module]
        of_modes.update({training: _Changes(known.names | names, 0) for training, known in of_modes.items()})


def _is_readable(tensor: Tensor) -> bool:
    """Whether its values can be looked at: it is made already, its memory is there, and it does not lie on several machines."""
    if type(tensor) is Tensor:  # most buffers are
        return is_allocated(tensor)
    return not is_lazy(tensor) and not is_foreign(type(tensor)) and is_allocated(tensor)


def _copy_of(tensor: Tensor) -> Tensor:
    """A copy, or the tensor itself if it is not to be looked at."""
    return copy_of(tensor) if _is_readable(tensor) else tensor


def _overwrite(buffer: Tensor, value: Tensor) -> None:
    buffer.data.copy_(value)  # ``.data`` has a version counter of its own


def _same(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and same_values(a, b)
