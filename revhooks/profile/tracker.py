"""Runs a step in plain autograd and one under ``reversible()``, and makes a `Report` of both."""

from __future__ import annotations

import copy
import itertools
import statistics
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..context import reversible
from ..errors import TargetError, explain
from ..record import ModuleRow, Report, Stats, Step, WorstError
from ..registry import lookup
from ..runtime.policy.guard import relative_error
from ..runtime.run import Run
from ..storage import is_leaf, is_opaque, own_storage_key
from .meters import AccountedMeter, alternate, cuda_peak

__all__ = ["Workload", "profile", "training_step"]

Loss = Callable[[Any], Tensor]
_TIMELINE = 120


@dataclass(frozen=True, slots=True)
class Workload:
    """A model, its inputs and a loss: what a step needs.

    Attributes:
        model: any module.
        inputs: positional arguments of one call.
        loss: maps the model's output to a scalar; by default the mean square of its floating outputs.
    """

    model: nn.Module
    inputs: tuple[Any, ...]
    loss: Loss

    @classmethod
    def of(cls, result: Any, subject: str = "target") -> Workload:
        """Check what a target returned: ``(model, inputs)`` or ``(model, inputs, loss)``.

        Raises:
            TargetError: it is something else.
        """
        if not (isinstance(result, tuple) and len(result) in (2, 3) and isinstance(result[0], nn.Module)):
            got = f"({', '.join(type(part).__name__ for part in result)})" if isinstance(result, tuple) else type(result).__name__
            raise TargetError(
                explain(
                    subject,
                    expected="(model, inputs) or (model, inputs, loss), the model a torch.nn.Module",
                    got=got,
                    remedy="return these",
                )
            )
        model, inputs, *rest = result
        if not rest:
            return cls(model, inputs if isinstance(inputs, tuple) else (inputs,), mean_square)
        if not callable(rest[0]):
            raise TargetError(
                explain(
                    subject,
                    expected="a loss that is a function of the output",
                    got=type(rest[0]).__name__,
                    remedy="return a function",
                )
            )
        return cls(model, inputs if isinstance(inputs, tuple) else (inputs,), rest[0])


def mean_square(output: Any) -> Tensor:
    """The mean square of all floating outputs: a loss for want of a better one."""
    tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    return sum((t.square().mean() for t in tensors), torch.zeros((), device="cpu"))


def training_step(work: Workload, *, reverse: bool) -> Callable[[], Run | None]:
    """A function that takes one step without an optimizer; returns the run of a reversible step."""

    def step() -> Run | None:
        work.model.zero_grad(set_to_none=False)
        if not reverse:
            work.loss(work.model(*work.inputs)).backward()
            return None
        with reversible() as run:
            work.loss(work.model(*work.inputs)).backward()
        return run

    return step


def profile(work: Workload, *, target: str = "", rounds: int = 3) -> Report:
    """Measure a step in plain autograd and one under ``reversible()``.

    Args:
        work: what to run; its model is copied and left as it is.
        target: how the report calls it.
        rounds: timed pairs of steps.

    Raises:
        TargetError: the model does not run on its inputs, or the loss is no scalar.
    """
    plain = Workload(copy.deepcopy(work.model), work.inputs, work.loss)
    rev = Workload(copy.deepcopy(work.model), work.inputs, work.loss)
    seed = torch.random.get_rng_state()
    saved, plain_saved = _saved_by_module(plain)
    torch.random.set_rng_state(seed)
    run_step, plain_step = training_step(rev, reverse=True), training_step(plain, reverse=False)
    _try(plain_step, work)
    torch.random.set_rng_state(seed)
    run = run_step()
    gradient_error = _gradient_error(plain.model, rev.model)
    held, stats_after_forward = _held_by_module(rev)
    cuda = any(p.is_cuda for p in work.model.parameters())
    plain_ns, rev_ns = alternate([plain_step, run_step], rounds=rounds, cuda=cuda)
    ratio = statistics.median(b / a for a, b in zip(plain_ns, rev_ns, strict=True))
    steps = {}
    for name, step, bytes_saved, times in (
        ("plain", plain_step, plain_saved, plain_ns),
        ("reversible", run_step, stats_after_forward.held_bytes, rev_ns),
    ):
        steps[name] = _measured(step, bytes_saved, times, cuda=cuda)
    stats = run.stats if run is not None else Stats()
    return Report(
        target=target,
        device=torch.cuda.get_device_name() if cuda else "cpu",
        torch=torch.__version__,
        plain=steps["plain"],
        reversible=steps["reversible"],
        step_time_ratio_permille=round(1000 * ratio),
        worst_reconstruction_error=float(stats.worst_error),
        worst_block=stats.worst_error.block,
        worst_gradient_error=gradient_error,
        stats=_merged(stats, stats_after_forward),
        modules=_rows(work.model, saved, held),
    )


def _merged(step: Stats, forward: Stats) -> Stats:
    """The stats of a whole step, with what was held after its forward."""
    return Stats(
        packed_bytes=step.packed_bytes,
        held_bytes=forward.held_bytes,
        peak_held_bytes=step.peak_held_bytes,
        frames=step.frames,
        inversions=step.inversions,
        replays=step.replays,
        second_evaluations=step.second_evaluations,
        offloaded_bytes=forward.offloaded_bytes,
        peak_offloaded_bytes=step.peak_offloaded_bytes,
        worst_error=WorstError(float(step.worst_error), step.worst_error.block),
        kept=forward.kept,
    )


def _try(step: Callable[[], object], work: Workload) -> None:
    try:
        step()
    except Exception as error:
        shapes = ", ".join(str(tuple(t.shape)) if isinstance(t, Tensor) else type(t).__name__ for t in work.inputs)
        raise TargetError(
            explain(
                f"{type(work.model).__name__} on inputs ({shapes})",
                expected="a forward and a backward that run",
                got=f"{type(error).__name__}: {error}",
                remedy="return inputs that fit the model, and a loss that gives a scalar",
            )
        ) from error


def _measured(step: Callable[[], object], saved: int, times: list[int], *, cuda: bool) -> Step:
    with AccountedMeter() as meter:
        step()
    peak, how = (cuda_peak(step), "cuda allocator") if cuda else (None, "not measured")
    return Step(saved, meter.peak, peak, how, round(statistics.median(times)), _thin(meter.timeline))


def _thin(timeline: Sequence[int]) -> tuple[int, ...]:
    """A timeline of at most a few score points, each the largest of its stretch."""
    if len(timeline) <= _TIMELINE:
        return tuple(timeline)
    edges = [round(i * len(timeline) / _TIMELINE) for i in range(_TIMELINE + 1)]
    return tuple(max(timeline[a:b]) for a, b in itertools.pairwise(edges))


def _gradient_error(plain: nn.Module, rev: nn.Module) -> float:
    pairs = zip(plain.parameters(), rev.parameters(), strict=True)
    scale = max((float(p.grad.abs().max()) for p in plain.parameters() if p.grad is not None), default=0.0)
    worst = 0.0
    for a, b in pairs:
        # gradients that are zero but for rounding, as of a bias before BatchNorm, say nothing
        if a.grad is not None and b.grad is not None and float(a.grad.abs().max()) > 1e-6 * scale:
            worst = max(worst, relative_error(b.grad, a.grad))
    return worst


# -- by module


@contextmanager
def _paths(model: nn.Module) -> Iterator[list[str]]:
    """A stack whose last item is the path of the module that runs."""
    stack = [""]
    hooks = []
    for path, module in model.named_modules():
        if path:
            hooks.append(module.register_forward_pre_hook(lambda _m, _i, path=path: stack.append(path)))
            hooks.append(module.register_forward_hook(lambda _m, _i, _o: stack.pop() and None, always_call=True))
    try:
        yield stack
    finally:
        for hook in hooks:
            hook.remove()


def _saved_by_module(work: Workload) -> tuple[dict[str, int], int]:
    """What each module's own ops save in plain autograd, each unique storage once; and the sum."""
    saved: dict[str, int] = {}
    known: dict[int, weakref.ref[Any]] = {}
    external = {own_storage_key(buffer) for buffer in work.model.buffers()}
    with _paths(work.model) as stack:

        def pack(tensor: Tensor) -> Tensor:
            if not is_opaque(tensor) and not is_leaf(tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in external and (key not in known or known[key]() is None):
                    known[key] = weakref.ref(storage)
                    saved[stack[-1]] = saved.get(stack[-1], 0) + storage.nbytes()
            return tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            _try(lambda: work.loss(work.model(*work.inputs)), work)
    return saved, sum(saved.values())


def _held_by_module(work: Workload) -> tuple[dict[str, dict[str, int]], Stats]:
    """What is held after forward, by the path of its place, and why."""
    paths = {module: path for path, module in work.model.named_modules()}
    labels = {f"{path or 'model'} ({type(module).__name__})": path for module, path in paths.items()}
    with _paths(work.model) as stack, reversible() as run:
        run.name_blocks(lambda module: paths.get(module, "") or "model")
        run.place = lambda: stack[-1]
        loss = work.loss(work.model(*work.inputs))
        stats = run.stats
        del loss
    held: dict[str, dict[str, int]] = {}
    for kept in stats.kept:
        path = labels.get(kept.what, kept.what)
        reasons = held.setdefault(path, {})
        reasons[kept.why] = reasons.get(kept.why, 0) + kept.bytes
    return held, stats


def _rows(model: nn.Module, saved: dict[str, int], held: dict[str, dict[str, int]]) -> tuple[ModuleRow, ...]:
    """One row a module; what the inside of a registered block saved counts for the block."""
    modules = dict(model.named_modules())
    blocks = [path for path, module in modules.items() if lookup(type(module)) is not None]

    def block_of(path: str) -> str | None:
        return next((b for b in blocks if b in ("", path) or path.startswith(b + ".")), None)

    total: dict[str, int] = {}
    for path, nbytes in saved.items():
        block = block_of(path)
        place = path if block is None else block
        total[place] = total.get(place, 0) + nbytes
    rows = []
    for path in [p for p in modules if p in total or p in held]:
        reasons = held.get(path, {})
        largest = sorted(reasons, key=lambda why: -reasons[why])
        is_block = block_of(path) == path
        why = "; ".join(largest) or ("reconstructed by inversion" if is_block else "shared with its neighbours")
        rows.append(ModuleRow(path, type(modules[path]).__name__, total.get(path, 0), sum(reasons.values()), why))
    return tuple(rows)
