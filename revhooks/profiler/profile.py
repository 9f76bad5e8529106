"""``revhooks.profile()``: where the memory of training steps goes, module by module and moment by moment."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parameter import is_lazy

from ..backward import NO_PASS, current_pass
from ..errors import RegistrationError, explain
from ..record import Choice, Kept, ModuleRow, Record, Stats, together
from ..registry import ACTIVE, lookup
from ..saved import modified
from ..storage import is_leaf, is_opaque, version_of
from ..watching import WATCHERS, Watcher, watching
from .lives import Lives
from .paths import Paths
from .runs import PlainlySaved, Watched

__all__ = ["Profile", "profile"]

INVERTED = "reconstructed by inversion"
REPLAYED = "run again in backward"
RECOMPUTED = "computed again from what is held, or held for another module"
_MOST_RUNS = 32  # that are held; what older ones did is added up


@dataclass(slots=True)
class _Moment:
    """What was held when a backward pass began."""

    held: int = 0
    packed: int = 0
    saved: dict[str, int] = field(default_factory=dict)  # by path: what plain autograd would hold
    kept: tuple[Kept, ...] = ()


@dataclass(slots=True)
class _Rebuilt:
    """How often a module was rebuilt, and how long that took."""

    count: int = 0
    ns: int = 0
    began: int = 0


class Profile(Watcher):
    """What `profile` gives: it measures while its context is open, and has a `record` when that was left.

    Attributes:
        model: whose steps are measured.
        name: what the record calls it.
    """

    def __init__(self, model: nn.Module, *, name: str = "") -> None:
        if not isinstance(model, nn.Module):
            raise RegistrationError(
                explain("profile()", expected="a torch.nn.Module", got=type(model).__name__, remedy="pass the model of the steps")
            )
        self.model = model
        self.name = name or type(model).__name__
        self._cuda = any(p.is_cuda for p in model.parameters())
        self._made: Record | None = None

    @property
    def record(self) -> Record:
        """What was measured.

        Raises:
            RegistrationError: the context was not left yet.
        """
        if self._made is None:
            raise RegistrationError(
                explain(
                    "the record of a profile",
                    expected="its context to be over",
                    got="one that was not left yet",
                    remedy="with revhooks.profile(model) as prof: ..., and read it after that",
                )
            )
        return self._made

    def report(self, *, width: int | None = None) -> None:
        """Print it.

        Args:
            width: columns; by default those of the terminal.
        """
        from rich.console import Console

        from ..report.tables import render

        Console(width=width).print(render(self.record))

    def save(self, path: str | Path) -> None:
        """Write it: as JSON, or by the ending of the path as ``.html``, ``.svg``, ``.trace.json`` (Perfetto) or ``.folded``."""
        from ..report.files import save

        save(self.record, path)

    def _repr_html_(self) -> str:
        """For notebooks."""
        from ..report.html import html

        return html(self.record, embedded=True)

    # -- the context

    def __enter__(self) -> Profile:
        """Begin to measure.

        Raises:
            RegistrationError: it has begun already, or the model has lazy layers that were never called.
        """
        if self in WATCHERS:
            raise RegistrationError(
                explain("profile()", expected="to be entered once at a time", got="one that is open", remedy="make another")
            )
        if unknown := [name for name, parameter in self.model.named_parameters() if is_lazy(parameter)]:
            got = f"{unknown[0]!r} without one"
            raise RegistrationError(
                explain("profile()", expected="parameters that have a shape", got=got, remedy="call it once before")
            )
        self._made = None
        self._lives = Lives(self.model)
        self._paths = Paths(self.model, lambda: self._lives.now, self._leave, _annotate if self._cuda else str)
        self._saved: list[weakref.ref[PlainlySaved]] = []
        self._thread = threading.get_ident()
        self._runs: list[Watched] = []
        self._over = Stats()  # of runs that hold nothing any more
        self._moment = _Moment()
        self._rebuilt: dict[str, _Rebuilt] = {}
        self._errors: dict[str, float] = {}
        self._lives.backward_begins = self._look
        with contextlib.ExitStack() as entered:  # left at once where one of them cannot be entered
            entered.callback(self._restore_places)
            if ACTIVE.run is None:  # of a run around it, our hooks would hide what is saved
                entered.enter_context(self._hooks())
            else:
                self.began(ACTIVE.run)
            if self._cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            self._allocated = torch.cuda.memory_allocated() if self._cuda else 0
            entered.enter_context(watching(self))
            entered.enter_context(self._paths)
            entered.enter_context(self._lives)
            self._entered = entered.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End; nothing of it stays in the model."""
        self._entered.__exit__(kind, error, trace)
        if not self._moment.packed:  # no backward pass yet
            self._look()
        if self._cuda:
            torch.cuda.synchronize()
        self._made = self._make()
        self._lives, self._runs, self._saved = Lives(), [], []  # what was remembered of each tensor

    def _restore_places(self) -> None:
        for one in self._runs:
            one.run.place = one.place

    # -- what it is told

    def _hooks(self) -> saved_tensors_hooks:
        """Hooks that look at what plain autograd saves; those around it, of a user or of another profile, do what they did."""
        pack, unpack = torch._C._autograd._top_saved_tensors_default_hooks(True) or (Tensor.detach, lambda tensor: tensor)
        ours = pack is Tensor.detach  # autograd looks for changes in place only where there are no hooks

        def look_and_pack(tensor: Tensor) -> PlainlySaved:
            counts = not is_opaque(tensor) and not is_leaf(tensor)
            version = version_of(tensor) if ours else None
            saved = PlainlySaved(pack(tensor), version, tensor.untyped_storage() if counts else None, self._paths.current)
            if counts:
                self._saved.append(weakref.ref(saved))
            return saved

        def look_and_unpack(saved: PlainlySaved) -> Tensor:
            if self._made is None and current_pass() != NO_PASS:
                self._lives.begin_backward()
            tensor: Tensor = unpack(saved.packed)
            if saved.version is not None and (now := version_of(tensor)) != saved.version:
                raise modified("plain autograd", tensor.shape, saved.version, now)
            return tensor

        return saved_tensors_hooks(look_and_pack, look_and_unpack)

    def _leave(self, path: str) -> None:
        """What was saved since the last time was saved in this module."""
        for one in self._runs:
            if one.run is ACTIVE.run:
                one.settle(path)

    def _look(self) -> None:
        """A backward pass begins, whoever saved for it: all that is held now is what was held after forward."""
        self._saved = [one for one in self._saved if one() is not None]
        plain: dict[int, tuple[str, int]] = {}
        for one in [one() for one in self._saved]:
            if one is not None and one.is_there():
                plain.setdefault(one.key, (one.path, one.nbytes))
        saved: dict[str, int] = {}
        for path, nbytes in plain.values():
            saved[path] = saved.get(path, 0) + nbytes
        kept = [Kept("saved by plain autograd", path, nbytes) for path, nbytes in saved.items()]
        held = packed = sum(saved.values())
        for watched in self._runs:
            watched.settle(self._paths.current)
            held, packed = held + watched.run.ledger.all_held, packed + watched.packed
            kept += watched.run.kept() if watched.packed else ()
            for path, nbytes in watched.saved.items():
                saved[path] = saved.get(path, 0) + nbytes
        if packed >= self._moment.packed:
            self._moment = _Moment(held, packed, saved, tuple(kept))

    def began(self, run: Any) -> None:
        """A context was entered, in this thread: places and blocks are called by their paths."""
        if threading.get_ident() != self._thread:
            return
        if len(self._runs) >= _MOST_RUNS:
            self._fold()
        self._runs.append(Watched(run, run.place))
        run.name_blocks(self._paths.name_of)
        run.place = lambda: self._paths.current

    def _fold(self) -> None:
        """Let go of runs that hold nothing any more."""
        over = [one for one in self._runs if not one.run.ledger.all_held and one.run is not ACTIVE.run]
        self._over = functools.reduce(together, (one.run.stats for one in over), self._over)
        self._runs = [one for one in self._runs if one not in over]

    def backward_began(self, run: Any) -> None:
        """What is held now is what was held after forward."""
        if any(one.run is run for one in self._runs):
            self._lives.begin_backward()
            self._look()

    def rebuild_began(self, module: nn.Module | None, label: str) -> None:
        """A block is rebuilt."""
        self._rebuilt.setdefault(self._path_of(module, label), _Rebuilt()).began = self._lives.now

    def rebuild_ended(self, module: nn.Module | None, label: str) -> None:
        """It was."""
        rebuilt = self._rebuilt[self._path_of(module, label)]
        rebuilt.count += 1
        rebuilt.ns += self._lives.now - rebuilt.began

    def compared(self, label: str, error: float) -> None:
        """A reconstruction is off by so much."""
        path = self._paths.path_of(label)
        self._errors[path] = max(error, self._errors.get(path, 0.0))

    def _path_of(self, module: nn.Module | None, label: str) -> str:
        return self._paths.names[module] if module in self._paths.names else self._paths.path_of(label)

    # -- what comes of it

    def _make(self) -> Record:
        lives, moment = self._lives, self._moment
        stats = self._stats()
        choice = Choice(
            "reversible()" if self._runs else "plain",
            saved_bytes=moment.held,
            accounted_peak_bytes=lives.peak,
            measured_peak_bytes=torch.cuda.max_memory_allocated() - self._allocated if self._cuda else None,
            how="cuda allocator" if self._cuda else "not measured",
            step_ns=lives.stop_ns,
            reconstruction_error=float(stats.worst_error),
            worst_block=stats.worst_error.block,
            timeline=lives.timeline(),
        )
        return Record(
            kind="profile",
            target=self.name,
            device=torch.cuda.get_device_name() if self._cuda else "cpu",
            torch=torch.__version__,
            choices=(choice,),
            stats=stats,
            modules=self._rows(),
            slices=(*self._paths.slices, *lives.slices()),
            parameter_bytes=lives.parameter_bytes,
            gradient_bytes=lives.gradient_bytes(),
            optimizer_bytes=lives.optimizer_bytes(),
            optimizer=lives.optimizer,
        )

    def _stats(self) -> Stats:
        """Of all runs."""
        moment, found = self._moment, functools.reduce(together, (one.run.stats for one in self._runs), self._over)
        return dataclasses.replace(
            found,
            packed_bytes=moment.packed,
            held_bytes=moment.held,
            peak_held_bytes=max(moment.held, found.peak_held_bytes),
            kept=moment.kept,
        )

    def _rows(self) -> tuple[ModuleRow, ...]:
        """One a module that saved, held, or was rebuilt."""
        held: dict[str, list[Kept]] = {}
        for kept in self._moment.kept:
            held.setdefault(self._paths.path_of(kept.what), []).append(kept)
        rows = []
        for path, module in self.model.named_modules():
            mine = sorted(held.get(path, []), key=lambda kept: -kept.bytes)
            rebuilt = self._rebuilt.get(path, _Rebuilt())
            saved = self._moment.saved.get(path, 0)
            if not (mine or saved or rebuilt.count):
                continue
            rows.append(
                ModuleRow(
                    path,
                    type(module).__name__,
                    saved,
                    sum(kept.bytes for kept in mine),
                    "; ".join(dict.fromkeys(kept.why for kept in mine)) or self._instead(module, rebuilt.count),
                    _remedies(mine),
                    self._paths.calls.get(path, 0),
                    rebuilt.count,
                    rebuilt.ns,
                    self._errors.get(path, 0.0),
                )
            )
        return tuple(rows)

    def _instead(self, module: nn.Module, rebuilds: int) -> str:
        """What is done for a module of which nothing is held."""
        if not self._runs:
            return ""
        entry = lookup(type(module))
        if entry is not None and not entry.replayed:
            return INVERTED
        return REPLAYED if rebuilds else RECOMPUTED


def _annotate(path: str) -> None:
    """Have snapshots of the CUDA allocator (`torch.cuda.memory`) tell which module a block of memory was made in."""
    annotate = getattr(torch.cuda.memory, "_set_memory_metadata", None)  # newer than the oldest torch
    if annotate is not None:
        annotate(path)


def _remedies(kept: list[Kept]) -> str:
    """What would remove these, in one sentence: that nothing removes some of them is told where it is true of all."""
    found = list(dict.fromkeys(one.remedy for one in kept if one.remedy))
    some = [remedy for remedy in found if not remedy.startswith("nothing")]
    return "; ".join(some or [found[0], *(remedy.removeprefix("nothing: ") for remedy in found[1:])] if found else ())


def profile(model: nn.Module, *, name: str = "") -> Profile:
    """Measure where the memory of training steps goes: ``with revhooks.profile(model) as prof:`` around any steps.

    They may be plain, under ``reversible()`` (inside or around), checkpointed, several, with an optimizer or without. It tells by
    module path what plain autograd would save, what was held when backward began, why, and what would remove it; how often,
    for how long and how well each block was rebuilt; and bytes over time by what they are for: activations that are held,
    rebuilt ones, temporary ones, parameters, gradients, optimizer state. Bytes are accounted, of unique storages; on CUDA the
    allocator's peak stands beside them, and its snapshots (``torch.cuda.memory._snapshot``), if its history is recorded, tell
    module paths. A measured step is slower than others: each operation is looked at, and what was made in all steps is remembered
    (about 400 bytes for each tensor): measure a few of a long run.

    It measures what the thread does that has entered it. Of a backward pass in another thread, what was held is told, and not
    what the pass itself makes. A storage that several ``reversible()`` contexts of one backward pass hold counts for each.

    Args:
        model: whose modules are told apart.
        name: what reports call it; by default its class.

    Returns:
        A `Profile`: ``prof.record``, ``prof.report()``, ``prof.save(path)``; it shows itself in notebooks.

    Raises:
        RegistrationError: ``model`` is no module.

    Example:
        >>> import revhooks
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 64))
        >>> with profile(model) as prof:
        ...     with revhooks.reversible():
        ...         model(torch.randn(32, 64)).square().mean().backward()
        >>> prof.record.stats.held_bytes < prof.record.stats.packed_bytes
        True
    """
    return Profile(model, name=name)
