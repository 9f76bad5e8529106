"""Takes a step in every way that is worth a try, and measures: plain, ``reversible()``, replays, budgets, checkpointing."""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import _pytree as pytree

from ..context import reversible
from ..errors import TargetError, explain, told
from ..record import Choice, Record
from ..runtime.policy.guard import relative_error
from .meters import alternate, cuda_peak
from .profile import Profile, profile
from .ways import QUICK, Way, ways_of
from .workload import StepFunction, Workload

__all__ = ["SETTLE", "Trial", "measure", "trials_of"]

SETTLE = 5  # steps after which what is learned from the first calls of each block is known
_LEAST, _MOST = 3, 9  # rounds
_SEED = 1


class Trial:
    """One way of taking a step, with a copy of the model whose parameters are the original's.

    Args:
        way: how.
        work: what.
        model: whose step it is; of a whole step function the modules that it calls.
    """

    def __init__(self, way: Way, work: Workload | StepFunction, model: nn.Module) -> None:
        self.way = way
        self.plain_bytes = 0  # what plain autograd holds after forward
        self.profile: Profile | None = None
        self.problem = ""
        self.gradient_error: float | None = None  # against those of the first way that worked
        self._work = work
        self.model = model
        if isinstance(work, Workload):
            self.model = _sharing_copy(model)
            self._work = dataclasses.replace(work, model=self.model)

    def step(self) -> None:
        """Take one step: forward and backward, from a fixed seed; of a step function all that it does."""
        if isinstance(self._work, StepFunction):
            with self.way.around(self.model, self.plain_bytes):
                self._work.step()
            return
        self.model.zero_grad(set_to_none=False)
        torch.manual_seed(_SEED)
        with self.way.around(self.model, self.plain_bytes):
            self._work.loss(self._work.call()).backward()

    def measure(self, name: str) -> None:
        """Let it settle, then look at one step."""
        for _ in range(SETTLE if self.way.reverse else 1):  # others learn nothing, but gradients are to be there
            self.step()
        with profile(self.model, name=name) as self.profile:
            self.step()

    def gradients(self) -> Iterator[Tensor | None]:
        """Those of the latest step, one by one, in host memory; none of a step function, which changes its parameters."""
        if isinstance(self._work, Workload):
            for parameter in self.model.parameters():
                yield None if parameter.grad is None else parameter.grad.to("cpu", copy=True)


def trials_of(work: Workload | StepFunction, *, quick: bool = False) -> list[Trial]:
    """The ways that are worth a try, plain first.

    Args:
        work: what to take.
        quick: plain and ``reversible()`` only.
    """
    model = work.model if isinstance(work, Workload) else _modules_called(work)
    cuda = any(p.is_cuda for p in model.parameters())
    ways: Sequence[Way] = QUICK if quick else ways_of(model, offload=cuda)
    return [Trial(way, work, model) for way in ways]


def measure(
    work: Workload | StepFunction,
    *,
    target: str = "",
    quick: bool = False,
    seconds: float = 20.0,
    rounds: int | None = None,
    tell: Callable[[str], object] = str,
) -> Record:
    """Take a step in several ways; each settles first, then one step is looked at, then all are timed by turns.

    Args:
        work: a model with inputs and a loss, which is left as it is, or a step function, which does what it does.
        target: how the record calls it.
        quick: plain and ``reversible()`` only.
        seconds: about how long to time.
        rounds: how many steps of each way to time instead.
        tell: is told what is done now.

    Returns:
        A record of kind ``report``: its ``stats``, ``modules`` and ``slices`` are those of ``reversible()``.

    Raises:
        TargetError: neither plain nor ``reversible()`` can take the step.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 64))
        >>> record = measure(Workload.of((model, torch.randn(32, 64))), quick=True, rounds=1)
        >>> plain, reversible = record.choices
        >>> reversible.saved_bytes < plain.saved_bytes, reversible.gradient_error
        (True, 0.0)
    """
    trials = trials_of(work, quick=quick)
    model = trials[0].model
    with torch.random.fork_rng(devices=_cuda_devices(model)), _gradients_of(model):
        expected: list[Tensor | None] | None = None
        for trial in trials:
            tell(f"measuring {trial.way.name} ...")
            _attempt(trial, trials, target)
            if isinstance(work, Workload) and not trial.problem:
                expected = list(trial.gradients()) if expected is None else expected
                trial.gradient_error = _gradient_error(expected, trial.gradients())
        worked = [trial for trial in trials if not trial.problem]
        if not worked:
            raise TargetError(explain(target or "the step", expected=_FITS, got="none", remedy=_SMALLER))
        tell("timing ...")
        times = _times([trial.step for trial in worked], seconds, rounds, cuda=any(p.is_cuda for p in model.parameters()))
        taken = dict(zip((id(trial) for trial in worked), times, strict=True))
        choices = [_choice(trial, worked[0], taken) for trial in trials]
    shown = next(one.profile for one in (trials[1], *worked) if one.profile is not None)
    return dataclasses.replace(shown.record, kind="report", target=target, choices=tuple(choices))


_FITS = "a way of taking it whose memory there is"
_SMALLER = "a smaller batch; --fake --fit tells the largest that fits"


def _attempt(trial: Trial, trials: Sequence[Trial], target: str) -> None:
    """Measure; a step that cannot be taken in this way is a problem of the way, unless none can."""
    trial.plain_bytes = next((one.profile.record.stats.packed_bytes for one in trials if one.profile is not None), 0)
    try:
        trial.measure(target)
    except torch.OutOfMemoryError:
        trial.problem, trial.profile = "out of memory", None
        torch.cuda.empty_cache()
    except Exception as error:
        if trial is trials[0]:
            raise _does_not_run(trial, error) from error
        trial.problem, trial.profile = told(error), None
    if trial is trials[0]:
        _check_backward(trial.profile, target)


def _check_backward(plain: Profile | None, target: str) -> None:
    """Raise where a step has no backward pass: nothing is to be saved there."""
    if plain is not None and not any(phase == "backward" for phase, _ in plain.record.choices[0].timeline.phases):
        raise TargetError(
            explain(
                target or "the step",
                expected="a training step, with a backward pass",
                got="one without",
                remedy="call backward() in it, or return (model, inputs) or (model, inputs, loss)",
            )
        )


def _does_not_run(trial: Trial, error: Exception) -> TargetError:
    work = trial._work
    if isinstance(work, StepFunction):
        subject, remedy = work.name, "return a function that can be called again and again"
    else:
        shapes = ", ".join(
            str(tuple(t.shape)) if isinstance(t, Tensor) else type(t).__name__ for t in pytree.tree_leaves(work.inputs)
        )
        subject = f"{type(work.model).__name__} on inputs ({shapes})"
        remedy = "return inputs that fit the model, and a loss that gives a scalar"
    return TargetError(explain(subject, expected="a forward and a backward that run", got=told(error), remedy=remedy))


def _times(steps: Sequence[Callable[[], None]], seconds: float, rounds: int | None, *, cuda: bool) -> list[list[int]]:
    """Of steps by turns; as many rounds as fit into the time."""
    if rounds is None:
        start = time.perf_counter()
        alternate(steps, rounds=0, warmup=1, cuda=cuda)
        rounds = min(_MOST, max(_LEAST, int(seconds / (time.perf_counter() - start))))
    return alternate(steps, rounds=rounds, warmup=0, cuda=cuda)


def _choice(trial: Trial, base: Trial, taken: dict[int, list[int]]) -> Choice:
    code = trial.way.code_for(trial.plain_bytes)
    if trial.profile is None:
        return Choice(trial.way.name, code, problem=trial.problem)
    found, mine = trial.profile.record.choices[0], taken[id(trial)]
    ratio = statistics.median(b / a for a, b in zip(taken[id(base)], mine, strict=True))
    return dataclasses.replace(
        found,
        name=trial.way.name,
        code=code,
        measured_peak_bytes=cuda_peak(trial.step) if found.how == "cuda allocator" else None,
        step_ns=round(statistics.median(mine)),
        time_permille=round(1000 * ratio),
        gradient_error=trial.gradient_error,
    )


def _gradient_error(plain: Sequence[Tensor | None], other: Iterable[Tensor | None]) -> float:
    """The largest; of gradients that are zero but for rounding, as of a bias before BatchNorm, against the largest of all."""
    scale = max((float(a.abs().max()) for a in plain if a is not None and a.numel()), default=0.0)
    worst = 0.0
    for a, b in zip(plain, other, strict=True):
        if a is None or b is None:
            worst = worst if a is b else float("inf")
        elif not torch.equal(a, b):
            small = float(a.abs().max()) <= 1e-6 * scale
            worst = max(worst, float((a - b).abs().max()) / scale if small and scale else relative_error(b, a))
    return worst


# ------------------------------------------------------------------------------------------- models


def _sharing_copy(model: nn.Module) -> nn.Module:
    """A copy with the same parameters and buffers of its own; what is learned of its blocks is its own as well."""
    memo: dict[int, object] = {id(parameter): parameter for parameter in model.parameters()}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise TargetError(
            explain(
                f"a copy of {type(model).__name__}",
                expected="a model that can be copied, for each way to have one of its own",
                got=told(error),
                remedy="make the target a function that takes a whole training step",
            )
        ) from error


def _modules_called(work: StepFunction) -> nn.Module:
    """The modules with parameters that a step calls, not from within others; of several a list."""
    found: dict[nn.Module, None] = {}
    depth = 0

    def before(module: nn.Module, _: object) -> None:
        nonlocal depth
        if not depth and next(module.parameters(), None) is not None:
            found[module] = None
        depth += 1

    def after(_module: nn.Module, _inputs: object, _output: object) -> None:
        nonlocal depth
        depth -= 1

    hooks = [register_module_forward_pre_hook(before), register_module_forward_hook(after, always_call=True)]
    try:
        with reversible():  # there may be no memory otherwise
            work.step()
    except Exception as error:
        raise _no_step(work, "a training step that can be taken again and again", told(error)) from error
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise _no_step(work, "a training step that calls a module with parameters", "one that calls none")
    return next(iter(found)) if len(found) == 1 else nn.ModuleList(found)


def _no_step(work: StepFunction, expected: str, got: str) -> TargetError:
    remedy = "return (model, inputs) or (model, inputs, loss), or take a step in each call"
    return TargetError(explain(work.name, expected=expected, got=got, remedy=remedy))


class _gradients_of:  # noqa: N801 - used as a function
    """Puts the gradients of a model's parameters aside, and back."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = list(model.parameters())

    def __enter__(self) -> None:
        self._gradients = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None

    def __exit__(self, *_: object) -> None:
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index for p in model.parameters() if p.is_cuda and p.device.index is not None})
