"""Which code leaves nothing behind, so that nothing has to be noted before it is run again (Rule 7).

To look at all that a call may reach takes longer than many a call. So its code is read, once: code that stores into no attribute,
item or global name, and that names nothing but numbers, texts, tensors of its modules, code of the same kind, and functions of
torch that are known, can change nothing that `revhooks.effects` would put back. Names are not followed to what they belong to: an
attribute of any module that code of any other module names counts. Where there is a doubt it is not quiet.

What was read is what is run: before each replay it is looked what the modules carry now, and, once in a backward pass, whether
names are bound to what they were.
"""

from __future__ import annotations

import builtins
import functools
import sys
from abc import ABC, ABCMeta
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from operator import attrgetter, is_, itemgetter
from types import BuiltinFunctionType, FunctionType, GetSetDescriptorType, MethodType, ModuleType
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakValueDictionary, ref

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .backward import NO_PASS, current_pass
from .names import read, unbracketed
from .owned import STANDARD, StandIn
from .reach import MISSING, PLAIN, is_library
from .storage import PLAIN_TYPES

__all__ = ["Proof", "leaves_nothing", "vouch"]

_LAYERS = frozenset(  # whose classes change nothing but buffers, and call nothing but their children
    f"torch.nn.modules.{name}"
    for name in (
        *("activation", "batchnorm", "channelshuffle", "container", "conv", "distance", "dropout", "flatten", "fold"),
        *("instancenorm", "linear", "module", "normalization", "padding", "pixelshuffle", "pooling", "rnn", "sparse"),
        "upsampling",
    )
) | {f"{__package__}.nn.{name}" for name in ("conditioner", "flow", "mixing")}
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_ROOTS = (object, Generic, ABC, Protocol)
_OF_TORCH = (
    *("_C._fft", "_C._linalg", "_C._nn", "_C._special", "_jit_internal", "amp.autocast_mode", "autograd.grad_mode", "functional"),
    "nn.functional",
)
_OF_OURS = {f"{__package__}.{name}" for name in ("functional", "adapters.freia", "adapters.table")}
_KNOWN = {"math", "torch", "typing", *_OF_OURS, *(f"torch.{name}" for name in _OF_TORCH)}
_SPACES = {"math", "torch", "torch.fft", "torch.linalg", "torch.nn", "torch.nn.functional", "torch.special", "typing"}
_BUILTINS = {
    *("abs", "all", "any", "bool", "complex", "dict", "divmod", "enumerate", "filter", "float", "frozenset", "int", "isinstance"),
    *("issubclass", "len", "list", "map", "max", "min", "next", "pow", "range", "reversed", "round", "set", "slice", "sorted"),
    *("str", "sum", "super", "tuple", "zip"),
}
_NOT = frozenset({"compile"})  # of torch
# What an attribute's name may not be: ways to change modules, and to come to others by a name that is a value
_READS = {
    *("buffers", "children", "forward", "modules", "named_buffers", "named_children", "named_modules", "named_parameters"),
    *("parameters", "training"),
}
_LOUD = set(dir(nn.Module)) - set(dir(Tensor)) - _READS
_LOUD |= {"format", "format_map", "f_back", "f_globals", "f_locals", "gi_frame", "tb_frame"}
_UNCALLED = {
    *("__annotate__", "__annotate_func__", "__deepcopy__", "__getstate__", "__init__", "__init_subclass__", "__reduce__"),
    "__setstate__",
}
_OVERRIDES = frozenset(name for name, value in vars(nn.Module).items() if callable(value)) - _UNCALLED
_SET_UP = _UNCALLED | {"extra_repr", "reset_parameters", "reset_running_stats"}  # of layers: what their calls do not call
_run_by: Any = attrgetter("__call__", "_call_impl", "__getattr__", "forward")  # of a class of torch's: what a call runs
_vouched: set[type] = set()  # of other libraries: whose methods were read by somebody, as those of `_LAYERS`
_methods: set[FunctionType] = set()  # these
_vouched_in: set[str] = set()  # their modules
_MOST = 32  # proofs for one block: its modules or its functions keep changing
_FAR = 200  # functions that are followed, and arguments that are looked at
_LEAVES = PLAIN | {*PLAIN_TYPES}


class Proof:
    """Whether code of some classes and functions is quiet; what that rests on is looked at again by `holds`.

    Attributes:
        found: it is.
        names: of attributes that the code uses, and that a call looks for.
        vouched: the same of code that somebody has vouched for: it adds nothing to lists.
        count: how many there were before it, for the same block.
    """

    __slots__ = (
        "__weakref__",
        "_bound",
        "_functions",
        "_held_in",
        "_inherited",
        "_kinds",
        "_layers",
        "_runs",
        "_seen",
        "_spaces",
        "count",
        "found",
        "names",
        "vouched",
    )

    def __init__(self, kinds: Sequence[type], functions: Sequence[FunctionType], count: int) -> None:
        self.count = count
        self._held_in = NO_PASS  # the latest backward pass in which it was found to hold
        self._kinds, self._functions = [*map(ref, kinds)], [*map(ref, functions)]
        self.names = {"forward", "_call_impl", "_slow_forward"}
        self.vouched: set[str] = set()
        self._inherited = set(STANDARD)  # names that code of torch's layers uses, and that a class may define anew
        # whose names: weakly, with a function's code or a class's size; and what they are bound to: functions weakly
        self._bound: list[tuple[ref[Any], Any, set[str], Callable[[Any], Any], list[ref[FunctionType]], list[Any]]] = []
        self._layers: list[type] = []  # of torch, and what they run
        self._runs: list[tuple[FunctionType, ...]] = []
        self._seen: list[FunctionType] = []
        self._spaces: dict[Any, set[str]] = {}  # classes and modules, and which of their names were looked at
        bases = {base for kind in kinds for base in kind.__mro__ if base not in _ROOTS}
        self.found = count < _MOST and all(map(self._admits_kind, bases)) and all(map(self._admits, functions)) and self._grow()
        self.names.discard("training")
        self.vouched -= STANDARD | self.names
        self._seen, self._spaces, self._inherited = [], {}, set()

    def next(self, kinds: Sequence[type], functions: Sequence[FunctionType]) -> Proof:
        """One about these as well, if the classes are the same."""
        if self._is_about(kinds):
            known = [function for reference in self._functions if (function := reference()) is not None]
            functions = [*functions, *(function for function in known if function not in functions)]
        return Proof(kinds, functions, self.count + 1)

    def is_of(self, kinds: Sequence[type], functions: Sequence[FunctionType]) -> bool:
        """Whether it is about these."""
        if not self._is_about(kinds):
            return False
        known = [reference() for reference in self._functions]
        return known == functions or all(function in known for function in functions)

    def _is_about(self, kinds: Sequence[type]) -> bool:
        return len(kinds) == len(self._kinds) and all(map(is_, kinds, [reference() for reference in self._kinds]))

    def holds(self) -> bool:
        """Whether names are still bound to what they were."""
        task = current_pass()
        if task != NO_PASS and task == self._held_in:
            return True
        found = self._still_holds()
        self._held_in = task if found else NO_PASS
        return found

    def _still_holds(self) -> bool:
        if [*map(_run_by, self._layers)] != self._runs:
            return False
        for reference, look, absent, pick, functions, others in self._bound:
            owner = reference()
            if owner is None:
                return False
            space, now = _space_of(owner)
            if (look is not None and look != now) or (absent and not absent.isdisjoint(space)):
                return False
            try:
                found = pick(space)
            except KeyError:
                return False
            if not all(map(is_, found, [*[function() for function in functions], *others])):
                return False
        return True

    def _bind(self, owner: Any, names: Iterable[str], look: Any = None) -> list[Any]:
        """What names of a function's globals, a class or a module are bound to, and have to be."""
        space, _ = _space_of(owner)
        present = [name for name in names if name in space]
        functions = [name for name in present if isinstance(space[name], FunctionType)]
        others = [name for name in present if name not in functions]
        # a tuple, of one name as well
        pick: Callable[[Any], Any] = itemgetter(*[*functions, *others, present[0]]) if present else _no_names
        absent = set(names) - set(present)
        bound = pick, [ref(space[name]) for name in functions], [space[name] for name in others]
        self._bound.append((ref(owner), look, absent, *bound))
        return [space.get(name, MISSING) for name in names]

    def _grow(self) -> bool:
        """Follow names until there are no more."""
        done = 0
        while True:
            for function in self._seen[done:]:
                code = read(function.__code__)
                if code.stores or not all(map(_may_be_named, code.names)) or len(self._seen) > _FAR:
                    return False
                self.names |= code.names
                values = self._bind(function, code.spaces, (function.__code__, function.__defaults__))
                for name, value in zip(code.spaces, values, strict=True):
                    if not (name in _BUILTINS or _is_error(name) if value is MISSING else self._admits(value)):
                        return False
                done += 1
            for space, looked in list(self._spaces.items()):
                names = self.names | self._inherited if isinstance(space, type) else self.names
                names = (names & space.__dict__.keys()) - looked
                looked |= names
                if names and not all(map(self._admits, self._bind(space, names))):
                    return False
            if done == len(self._seen) and all(
                looked >= self.names & space.__dict__.keys() for space, looked in self._spaces.items()
            ):
                return True

    def _admits_kind(self, kind: type) -> bool:
        """A class of modules: those of torch that are known, and others as far as their methods may be called."""
        own = kind.__dict__
        if kind is nn.Module or _is_known(kind):
            self._layers.append(kind)
            self._runs.append(_run_by(kind))
            methods = [
                unbracketed(value) for name, value in own.items() if isinstance(value, FunctionType) and name not in _SET_UP
            ]
            if kind is not nn.Module:
                self.names |= {name for name in own if name not in _SET_UP and isinstance(own[name], FunctionType)}
                self._inherited = self._inherited.union(*(read(method.__code__).names for method in methods))
            return all(map(self._admits, self._runs[-1]))
        if kind in _vouched:
            methods = [name for name, value in own.items() if isinstance(value, FunctionType) and name not in _SET_UP]
            codes = [unbracketed(method) for method in self._bind(kind, methods, len(own))]
            names = set().union(*(read(code.__code__).names for code in codes))
            self.names.update(methods)
            self.vouched |= names
            self._inherited |= names
            return _methods.issuperset(codes)  # nobody has put another there
        if type(kind) not in (type, ABCMeta) or is_library(kind.__module__) or "__slots__" in own:
            return False
        names = {name for name, value in own.items() if name in _OVERRIDES or (_is_dunder(name) and _is_called(value))}
        self._spaces[kind] = names
        return all(map(self._admits, self._bind(kind, names, len(own))))

    def _admits(self, value: Any) -> bool:
        """Whether what a name is bound to can neither be changed nor change anything; functions are read later."""
        kind = type(value)
        if kind in PLAIN:
            return True
        if kind is FunctionType:
            return self._admits_function(value)
        if kind is property:
            return self._admits(value.fget)
        if kind in (staticmethod, classmethod):
            return self._admits(value.__func__)
        if kind is tuple:
            return all(map(self._admits, value))
        if kind is ModuleType:
            if value.__name__ in _SPACES or not (is_library(value.__name__) or "__getattr__" in value.__dict__):
                self._spaces.setdefault(value, set())
                return True
            return False
        return is_known(value)

    def _admits_function(self, function: FunctionType) -> bool:
        function = unbracketed(function)
        if is_known(function) or function in self._seen or function in _methods:
            return True
        if (
            type(function) is not FunctionType
            or is_library(function.__module__)
            or function.__dict__
            or not set(function.__code__.co_freevars) <= {"__class__"}
        ):
            return False
        self._seen.append(function)
        defaults = (function.__defaults__ or (), *(function.__kwdefaults__ or {}).values())
        return all(map(self._admits, defaults))


def is_known(value: Any) -> bool:
    """Whether it is a function or a class of torch, or of Python's own, that changes no object of the user's.

    Example:
        >>> import torch
        >>> is_known(torch.cat), is_known(torch.save), is_known(nn.Linear), is_known(len), is_known(setattr)
        (True, False, True, True, False)
    """
    if isinstance(value, type):
        if value.__module__ == "builtins":
            return value.__name__ in _BUILTINS or issubclass(value, BaseException)
        return value.__module__ in _KNOWN or _is_known(value) or value is nn.Parameter
    if not isinstance(value, (FunctionType, BuiltinFunctionType)):
        return False
    # where it is defined, whatever it says of itself
    where = value.__globals__.get("__name__") if isinstance(value, FunctionType) else value.__module__
    if where == "builtins":
        return value.__name__ in _BUILTINS
    return (where in _KNOWN and value.__name__ not in _NOT) or where in _LAYERS


def _is_known(kind: type) -> bool:
    where = kind.__module__
    if where not in _LAYERS or (where.endswith((".container", ".module")) and kind not in _CONTAINERS):
        return False
    return vars(sys.modules[where]).get(kind.__name__) is kind


_Class = TypeVar("_Class", bound=type)


def vouch(kind: _Class) -> _Class:
    """Take a class of modules as one of torch's layers: somebody has read its methods, those of another library's class.

    They change nothing but parameters and buffers, and call nothing but children, what is in attributes, and functions of their
    library that do the same.
    """
    own = [unbracketed(value) for value in vars(kind).values() if isinstance(value, FunctionType)]
    _methods.update(method for method in own if method.__globals__.get("__name__") == kind.__module__)
    _vouched.add(kind)
    _vouched_in.add(kind.__module__)
    return kind


def _space_of(owner: Any) -> tuple[Any, Any]:
    """Where the names of a function, a class or a module are bound, and what else has to stay."""
    if type(owner) is FunctionType:
        return owner.__globals__, (owner.__code__, owner.__defaults__)
    return owner.__dict__, len(owner.__dict__)


def _no_names(_: Any) -> tuple[()]:
    return ()


def _may_be_named(name: str) -> bool:
    """Whether an attribute of this name leads nowhere else."""
    return name not in _LOUD and (name[:2] != "__" or name in ("__class__", "__name__"))


def _is_error(name: str) -> bool:
    value = getattr(builtins, name, None)
    return isinstance(value, type) and issubclass(value, BaseException)


def _is_dunder(name: str) -> bool:
    return name[:2] == "__" and name[-2:] == "__" and name not in _UNCALLED


def _is_called(value: Any) -> bool:
    return hasattr(type(value), "__get__") and not isinstance(value, GetSetDescriptorType)


# ------------------------------------------------------------------------------------ before a replay


_proofs: WeakValueDictionary[tuple[int, ...], Proof] = WeakValueDictionary()  # the latest about these classes


def leaves_nothing(modules: Sequence[nn.Module], reach: Iterable[Any], facts: Any) -> bool:
    """Whether a call can change nothing that would have to be put back.

    Args:
        modules: those that it calls, with their children.
        reach: what it calls besides, and its arguments.
        facts: has the latest `Proof` as ``proof``.
    """
    proof: Proof | None = facts.proof
    if proof is not None and not proof.found:
        return False
    functions: list[FunctionType] = []
    if not _are_plain(reach, modules, functions):
        return False
    kinds = [*map(type, modules)]
    if proof is None:  # many a module is one of several of its kind
        known = _proofs.get((*map(id, kinds),))
        facts.proof = proof = known if known is not None and known.found else None
    if proof is None or not proof.is_of(kinds, functions) or not proof.holds():
        facts.proof = proof = Proof(kinds, functions, 0) if proof is None else proof.next(kinds, functions)
        _proofs[(*map(id, kinds),)] = proof
        if not proof.found:
            return False
    return _carry_nothing(modules, proof)


def _are_plain(reach: Iterable[Any], modules: Sequence[nn.Module], functions: list[FunctionType]) -> bool:
    """Whether these lead to nothing but tensors, numbers, these modules, and functions, which are collected."""
    things = [*reach]
    for thing in things:  # which grows
        kind = type(thing)
        if kind in _LEAVES:
            continue
        if len(things) > _FAR:
            return False
        if kind is tuple or kind is list:
            things += thing
        elif kind is dict:
            things += thing.values()
        elif kind is FunctionType:
            functions.append(thing)
        elif kind is functools.partial:
            things += (thing.func, *thing.args, *thing.keywords.values(), *thing.__dict__.values())
        elif kind is MethodType:
            things += (thing.__func__, thing.__self__)
        elif not any(map(is_, modules, repeat(thing))):
            return False
    return True


def _carry_nothing(modules: Sequence[nn.Module], proof: Proof) -> bool:
    """Whether modules have no hooks and no forward of their own, and nothing in attributes of these names that can change."""
    names, vouched = proof.names, proof.vouched
    for module in modules:
        own = module.__dict__
        if own["_forward_hooks"] or own["_forward_pre_hooks"]:
            return False
        if not names.isdisjoint(own) and not all(_is_fixed(own[name]) for name in names & own.keys()):
            return False
        if vouched and not vouched.isdisjoint(own) and not all(_is_fixed(own[name], list) for name in vouched & own.keys()):
            return False
    return not (torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


def _is_fixed(value: Any, *containers: type) -> bool:
    kind = type(value)
    if kind is tuple or kind in containers:
        return all(_is_fixed(part, *containers) for part in value)
    if isinstance(value, StandIn):
        return value.below is None or _is_fixed(value.below)
    if kind is FunctionType and value.__globals__.get("__name__") in _vouched_in:
        return not value.__dict__ and all(type(cell.cell_contents) in _vouched for cell in value.__closure__ or ())
    return kind in PLAIN or is_known(value)
