"""Predicts what a training step takes, with nothing allocated: steps on hollow tensors.

The step is taken for real but for its kernels (`Hollow`): the graph, the hooks and the runtime's decisions are those of a step
on a CPU, and bytes are counted by the meter that counts those of real steps (`revhooks.profiler.lives`), so that both can be
compared byte by byte. `torch.distributed._tools.mem_tracker` counts other things: it rounds storages as the CUDA allocator does,
and knows of parameters, gradients and activations, but not of what is rebuilt.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import RevhooksError, TargetError, explain, told
from ..record import Choice, Record
from .hollow import Building, Hollow
from .lives import bytes_of
from .meters import AccountedMeter
from .ways import PLAIN, QUICK, REVERSIBLE, Way, ways_of
from .whatif import Trial
from .workload import Workload

__all__ = ["OPTIMIZERS", "Build", "Made", "Steps", "Tell", "check_optimizer", "failed", "make", "optimizer_bytes", "predict"]

Build = Callable[..., Any]
Tell = Callable[[str], None]
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "adafactor": ("Adafactor", {}),
    "adagrad": ("Adagrad", {}),
    "adam": ("Adam", {}),
    "adamax": ("Adamax", {}),
    "adamw": ("AdamW", {}),
    "muon": ("Muon", {}),
    "nadam": ("NAdam", {}),
    "radam": ("RAdam", {}),
    "rmsprop": ("RMSprop", {}),
    "sgd": ("SGD", {}),
    "sgd-momentum": ("SGD", {"momentum": 0.9}),
}


class Made(NamedTuple):
    """What a target has made on hollow tensors.

    Attributes:
        work: model, inputs and loss.
        nbytes: what it made and holds: parameters, buffers, inputs.
        wanted: the device that it asked for and did not get.
    """

    work: Workload
    nbytes: int
    wanted: torch.device | None

    @property
    def device(self) -> str:
        """On what a prediction of it is made, in words."""
        if self.wanted is None:
            return "fake CPU tensors"
        return f"fake CPU tensors ({self.wanted.type} has other kernels, which may save other tensors)"


def make(build: Build, keywords: Mapping[str, Any] | None = None, target: str = "target") -> Made:
    """Call a target inside of `Hollow`.

    Args:
        build: returns (model, inputs) or (model, inputs, loss).
        keywords: for it.
        target: what errors call it.

    Raises:
        TargetError: it fails, or returns something else.
    """
    keywords = dict(keywords or {})
    with Building() as building, AccountedMeter() as meter:
        try:
            result = build(**keywords)
        except RevhooksError:
            raise
        except Exception as error:
            given = ", ".join(f"{name}={value!r}" for name, value in keywords.items())
            raise failed(f"{target}({given})", error, "mend the target, or measure it (without --fake)") from error
        gc.collect(1)  # what it has made and left in a circle
    work = Workload.of(result, target)
    made = {id(t): t for t in (*work.model.parameters(), *work.model.buffers())}
    return Made(work, max(meter.live, bytes_of(made.values())), building.wanted)


def predict(
    build: Build,
    *,
    keywords: Mapping[str, Any] | None = None,
    ways: Sequence[Way] | None = None,
    quick: bool = False,
    target: str = "target",
    optimizer: str = "adamw",
    tell: Tell = lambda _: None,
) -> Record:
    """Predict what a step takes in several ways. Nothing is allocated, whatever the size of model and batch.

    Figures are those of a step on a CPU, of which everything is run but the kernels. What can be seen by values only is taken to
    be well: that an inverse inverts, that a recomputation gives the same bits. Numbers that the model reads from tensors are 0.

    Args:
        build: the target: returns (model, inputs) or (model, inputs, loss); it has to make them: what is there before is real.
        keywords: for it.
        ways: by default those of `ways_of`.
        quick: plain and ``reversible()`` only.
        target: how the record calls it.
        optimizer: whose state is counted, one of `OPTIMIZERS`, or ``"none"``.
        tell: is told what is done now.

    Returns:
        A record of kind ``prediction``; its ``modules`` are those of ``reversible()``. Times are 0.

    Raises:
        TargetError: the target does not return these, or a step needs values.

    Example:
        >>> def build(width=1 << 20):
        ...     return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)), torch.randn(64, width)
        >>> record = predict(build, quick=True)
        >>> record.parameter_bytes >> 40, record.choice("reversible()").saved_bytes < record.choice("plain").saved_bytes
        (8, True)
    """
    check_optimizer(optimizer)
    with Hollow(), torch.random.fork_rng(devices=[]):
        tell("making the model ...")
        made = make(build, keywords, target)
        if ways is None:
            ways = QUICK if quick else ways_of(made.work.model)
        steps = Steps(made, target)
        choices = []
        for way in ways:
            tell(f"predicting {way.name} ...")
            choices.append(steps.choice(way))
        shown = steps.trial(REVERSIBLE if REVERSIBLE in ways else ways[0])
        if shown.profile is None:
            raise TargetError(explain(target, expected="a step that can be predicted", got=shown.problem, remedy="measure it"))
        found = shown.profile.record
        state = optimizer_bytes(optimizer, made.work.model)
    return dataclasses.replace(
        found,
        kind="prediction",
        target=target,
        device=made.device,
        choices=tuple(choices),
        modules=tuple(dataclasses.replace(row, rebuild_ns=0) for row in found.modules),
        slices=(),
        optimizer_bytes=state,
        optimizer="" if optimizer == "none" else optimizer,
    )


class Steps:
    """Steps of a hollow model, each way with a copy of it."""

    def __init__(self, made: Made, target: str) -> None:
        self._made = made
        self.model = made.work.model
        self._target = target
        self._trials: dict[Way, Trial] = {}
        self._states: dict[str, int] = {}  # of optimizers

    def trial(self, way: Way) -> Trial:
        """The trial of a way, whose ``profile`` is there if it worked; that of plain has to work."""
        known = self._trials.get(way)
        if known is not None:
            return known
        with Building():
            trial = Trial(way, self._made.work, self._made.work.model)
        if way.share is not None:
            trial.plain_bytes = self.choice(PLAIN).saved_bytes
        try:
            trial.measure(self._target)
        except Exception as error:
            if way == PLAIN and isinstance(error, RevhooksError):
                raise
            if way == PLAIN:
                raise failed(f"a step of {self._target}", error, "measure it on real tensors (without --fake)") from error
            trial.problem, trial.profile = told(error), None
        self._trials[way] = trial
        return trial

    def choice(self, way: Way) -> Choice:
        """What a step takes in this way."""
        trial = self.trial(way)
        if trial.profile is None:
            return Choice(way.name, way.code_for(trial.plain_bytes), problem=trial.problem)
        found = trial.profile.record.choices[0]
        return dataclasses.replace(
            found, name=way.name, code=way.code_for(trial.plain_bytes), measured_peak_bytes=None, how="predicted", step_ns=0
        )

    def total(self, way: Way, optimizer: str) -> int | None:
        """All that a step takes with what lies beside it; ``None`` if it cannot be taken in this way."""
        trial = self.trial(way)
        if trial.profile is None:
            return None
        record = trial.profile.record
        if optimizer not in self._states:
            self._states[optimizer] = optimizer_bytes(optimizer, self.model)
        beside = self._made.nbytes + record.gradient_bytes + self._states[optimizer]
        return beside + record.choices[0].accounted_peak_bytes


# -- optimizers


def optimizer_bytes(name: str, model: nn.Module) -> int:
    """What the state of an optimizer takes: a real one takes a step on the model's parameters, which have to be hollow.

    Raises:
        TargetError: there is none of this name.

    Example:
        >>> with Hollow():
        ...     optimizer_bytes("sgd-momentum", nn.Linear(1 << 20, 1 << 20, bias=False)) >> 40
        4
    """
    check_optimizer(name)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name == "none" or not parameters:
        return 0
    cls, options = OPTIMIZERS[name]
    gradients = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        optimizer = getattr(torch.optim, cls)(parameters, **options)
        optimizer.step()
        return bytes_of(value for state in optimizer.state.values() for value in state.values())
    except ValueError as error:  # some take matrices only
        raise failed(f"optimizer {name!r}", error, "choose another one") from error
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


def check_optimizer(name: str) -> None:
    """Raise unless there is an optimizer of this name."""
    if name != "none" and not (name in OPTIMIZERS and hasattr(torch.optim, OPTIMIZERS[name][0])):
        known = ", ".join(one for one, (cls, _) in OPTIMIZERS.items() if hasattr(torch.optim, cls))
        raise TargetError(explain("optimizer", expected=f"one of {known}, none", got=repr(name), remedy="pass one of these"))


def failed(subject: str, error: Exception, remedy: str) -> TargetError:
    """What to raise for what somebody else's code has raised."""
    return TargetError(explain(subject, expected="one that runs", got=told(error), remedy=remedy))
