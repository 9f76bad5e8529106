"""The guard: checks what was reconstructed against a sample of what was there (Rule 10)."""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ...capture import is_capturing
from ...errors import InversionError, ReplayError, RevhooksError, explain
from ...projection import projection
from ...record import WorstError
from ...storage import is_near, is_opaque
from ...watching import WATCHERS

__all__ = ["DRIFT", "Fallback", "Guard", "Sample", "Verdict", "is_again", "is_measured", "relative_error", "tolerance"]

Verdict = Callable[[float, int], None]  # takes a relative error, and how many exact zeros have not come back
Defer = Callable[[Callable[[], None]], bool]  # calls a function at the end of the backward pass; False outside of one

SAMPLES = 256
_GOLDEN = (math.sqrt(5) - 1) / 2

# Relative L2 error of a reconstruction: above the first the block falls back, above the second it is gross.
_TOLERANCE = {
    torch.float64: (1e-7, 1e-3),
    torch.float32: (1e-3, 1e-1),
    torch.float16: (2e-2, 3e-1),
    torch.bfloat16: (5e-2, 3e-1),
}
_TOLERANCE[torch.complex128] = _TOLERANCE[torch.float64]
_TOLERANCE[torch.complex64] = _TOLERANCE[torch.float32]


_NORMED = frozenset({torch.float32, torch.float64})  # whose norms need no wider dtype


def tolerance(dtype: torch.dtype) -> tuple[float, float]:
    """The mild and the gross bound for streams computed in ``dtype``."""
    return _TOLERANCE.get(dtype, (0.0, 0.0))


def is_measured(tensor: Tensor) -> bool:
    """Whether it has elements that can be compared up to a tolerance."""
    return tensor.dtype in _TOLERANCE and tensor.numel() > 0 and not tensor.is_meta


DRIFT = 0.7  # what an inversion drifts by is below the dtype's precision to this power


def is_again(rebuilt: Tensor, original: Tensor, *, exact: bool, computed: torch.dtype | None = None) -> bool:
    """Whether a tensor is what it was: bit by bit, or up to what an inversion drifts by, computed in a dtype.

    Example:
        >>> x = torch.ones(2)
        >>> is_again(x + 1e-7, x, exact=True), is_again(x + 1e-7, x, exact=False), is_again(x + 1e-3, x, exact=False)
        (False, True, False)
    """
    if rebuilt.shape != original.shape or rebuilt.dtype is not original.dtype or original.is_meta:
        return False
    if is_capturing(original.device):  # earlier steps have shown it
        return True
    if torch.equal(rebuilt, original):
        return True
    if exact or not original.is_floating_point() or not bool(original.isfinite().all()):
        return False
    return bool(relative_error(rebuilt, original) <= torch.finfo(computed or original.dtype).eps ** DRIFT)


def relative_error(rebuilt: Tensor, original: Tensor) -> float:
    """Relative L2 error; 0 where the original is not finite, infinite where only the rebuilt is not.

    Example:
        >>> relative_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
        0.0
    """
    if original.is_meta:
        return 0.0
    if original.dtype in _NORMED and original.dtype is rebuilt.dtype:
        scale, error = float(torch.linalg.vector_norm(original)), float(torch.dist(rebuilt, original))
        if 0.0 < scale < math.inf and error < math.inf:
            return error / scale
    if original.is_complex():
        rebuilt = rebuilt.to(original.dtype)
    original, rebuilt = _real(original).double(), _real(rebuilt).double()
    difference = rebuilt - original
    return math.sqrt(_ratio(float(difference.dot(difference)), float(original.dot(original))))


def _ratio(error: float, scale: float) -> float:
    if not math.isfinite(scale):
        return 0.0
    if not math.isfinite(error):
        return math.inf
    return error / scale if scale else error


def _results(pairs: Sequence[_Pending]) -> list[tuple[float, int]]:
    """Relative errors and lost zeros of many pairs, read from each device once."""
    results = [(0.0, 0)] * len(pairs)
    groups: dict[tuple[torch.device, torch.dtype, torch.dtype], list[int]] = {}
    for index, pair in enumerate(pairs):
        groups.setdefault((pair.original.device, pair.original.dtype, pair.rebuilt.dtype), []).append(index)
    for (device, _, _), indices in groups.items():
        wide = torch.float32 if device.type == "mps" else torch.float64
        originals = [_real(pairs[i].original) for i in indices]
        original = torch.cat(originals).to(wide)
        difference = torch.cat([_real(pairs[i].rebuilt) for i in indices]).to(wide) - original
        lost = ((original == 0) & (difference != 0)).to(wide)
        sizes = [one.numel() for one in originals]
        parts = (*original.split(sizes), *difference.split(sizes), *lost.split(sizes))
        norms = torch.stack(torch._foreach_norm(parts)).view(3, -1).t().tolist()
        for index, (scale, error, zeros) in zip(indices, norms, strict=True):
            results[index] = _ratio(error, scale), round(zeros**2)
    return results


def _real(tensor: Tensor) -> Tensor:
    """As a vector of real numbers."""
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).reshape(-1)


@functools.lru_cache(maxsize=256)
def _places(numel: int, device: torch.device) -> Tensor:
    """Where a tensor of so many elements is sampled; made once, for to bring it to an accelerator is to wait for it."""
    # multiples of the golden section: even, and in step with no row or column
    places = torch.arange(SAMPLES, dtype=torch.float64, device="cpu").mul_(_GOLDEN).frac_().mul_(numel).long()
    return places.sort().values.to(device)


class Sample(NamedTuple):
    """A few hundred elements of a tensor, by logical index, and a projection of all of it where there is one."""

    places: Tensor | None
    values: Tensor

    def of(self, tensor: Tensor) -> Tensor:
        """The same of another tensor; of a small tensor no copy."""
        if self.places is None:
            return tensor.detach()
        values = tensor.detach().take(self.places)
        if len(self.values) == len(values):
            return values
        return torch.cat([values, projection(tensor.contiguous(), len(values))])

    def copy_of(self, tensor: Tensor) -> Tensor:
        """The same as a copy, for what may be written to before it is read."""
        return tensor.detach().clone() if self.places is None else self.of(tensor)


def _give(verdicts: Sequence[Verdict], results: Sequence[tuple[float, int]], note: str = "") -> None:
    """Give all the verdicts; raise the first error."""
    problem: RevhooksError | None = None
    for verdict, (error, lost) in zip(verdicts, results, strict=True):
        try:
            verdict(error, lost)
        except RevhooksError as found:
            problem = problem or found
    try:
        if problem is not None:
            if note:
                problem.add_note(note)
            raise problem
    finally:
        del problem  # its traceback leads to this frame


class _Flight:
    """Comparisons that a device makes; they are read when it has, in a later step. What is wrong is named then.

    Five launches for all pairs of one dtype and length, seven where exact zeros have to come back.
    """

    __slots__ = ("_event", "_norms", "_step", "_values", "_verdicts")

    steps = 0  # that have ended, of all runs

    def __init__(self, pairs: Sequence[_Pending], *, zeros: bool) -> None:
        values = torch.cat([_real(one) for side in zip(*((p.rebuilt, p.original) for p in pairs), strict=True) for one in side])
        values = values.view(2, len(pairs), -1)
        error = values[0] - values[1]
        self._values = values if zeros else None
        rows = [error, values[1]] if not zeros else [error, values[1], torch.where(values[1] == 0, error, 0)]
        both = torch.cat(rows)
        norms = torch.linalg.vector_norm(both, dim=1, dtype=torch.float32 if both.device.type == "mps" else torch.float64)
        self._verdicts = [pair.verdict for pair in pairs]
        self._step = _Flight.steps
        self._event: Any = None
        if norms.is_cuda:
            self._norms = torch.empty(norms.shape, dtype=norms.dtype, device="cpu", pin_memory=True)
            self._norms.copy_(norms, non_blocking=True)
            self._event = torch.cuda.current_stream(norms.device).record_event()
        else:
            self._norms = norms

    def landed(self) -> bool:
        """Whether it can be read without waiting."""
        return self._event is None or bool(self._event.query())

    def read(self) -> None:
        """Give the verdicts; raise the first error."""
        if self._event is not None:
            self._event.synchronize()
        count, norms, ago = len(self._verdicts), self._norms.tolist(), _Flight.steps - self._step
        found = [norms[place::count] for place in range(count)]
        results = [(_ratio(e, scale), self._lost(i) if any(lost) else 0) for i, (e, scale, *lost) in enumerate(found)]
        _give(
            self._verdicts,
            results,
            f"It was found {ago} backward passes later." if ago else "It was in the latest backward pass.",
        )

    def _lost(self, place: int) -> int:
        """How many zeros of a pair have not come back."""
        rebuilt, original = self._values[:, place]  # type: ignore[index] # they are there
        return int(((original == 0) & (rebuilt != 0)).sum())


# of all runs: a context may be left before a device has told
_flights: deque[_Flight] = deque()


class _Pending(NamedTuple):
    """A comparison whose result an accelerator still has. It names no frame: what was rebuilt is not to live longer for it."""

    rebuilt: Tensor
    original: Tensor
    verdict: Verdict
    zeros: bool = False  # whether exact zeros have to come back


class Fallback(Protocol):
    """Marks a block, or one step of it, to be kept instead of inverted from the next call on."""

    def __call__(self, reason: str, label: str, *, below: bool) -> None:
        """``below``: the blocks before it are in doubt too."""


class Guard:
    """Samples, compares, remembers the worst, and decides between falling back and raising.

    On a CPU an error is known at once. On an accelerator comparisons are kept and read once, at the end of
    the backward pass, so that the hot path never waits for the device.
    """

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.worst = WorstError()
        self._pending: list[_Pending] = []
        self._late: list[_Pending] = []

    def sample(self, tensor: Tensor) -> Sample | None:
        """A copy of a few hundred elements from everywhere; ``None`` when the guard is off, or nothing can be read."""
        if self.mode == "off" or is_opaque(tensor) or not is_measured(tensor) or is_capturing(tensor.device):
            return None
        tensor = tensor.detach()
        if tensor.numel() <= SAMPLES:
            return Sample(None, tensor.clone())
        index = _places(tensor.numel(), tensor.device)
        values = tensor.take(index)
        overall = projection(tensor, SAMPLES) if is_near(tensor.device) else values[:0]
        return Sample(index, torch.cat([values, overall]) if len(overall) else values)

    def matches(self, sample: Sample | None, tensor: Tensor, bounds: tuple[float, float]) -> bool:
        """Whether ``tensor`` is what was sampled, up to the mild bound."""
        if sample is None:
            return True
        values = sample.of(tensor)
        return values.shape == sample.values.shape and relative_error(values, sample.values) <= bounds[0]

    def check(
        self,
        sample: Sample | None,
        rebuilt: Tensor,
        bounds: tuple[float, float],
        label: Callable[[], str],
        fallback: Fallback,
        defer: Defer,
        source: Tensor | None = None,
        *,
        zeros: bool = True,
        soon: bool = True,
    ) -> None:
        """Compare a reconstruction from ``source`` with its sample, far away at the end of the pass (``soon``) or later.

        Exact zeros have to come back if ``zeros``; forward has looked for them unless that would have made it wait.

        Raises:
            InversionError: the error is gross, or past the tolerance with ``guard="raise"``.
        """
        if sample is None or is_capturing(rebuilt.device):
            return
        if not is_near(rebuilt.device):
            if source is not None:
                source = source.detach().reshape(-1)[:SAMPLES].clone()
            verdict = functools.partial(self._judge, bounds, functools.partial(str, label()), fallback, source, zeros)
            if self.later(sample.copy_of(rebuilt), sample.values, verdict, defer, soon=soon, zeros=zeros):
                return
        self._judge(bounds, label, fallback, source, zeros, relative_error(sample.of(rebuilt), sample.values))

    def check_replay(
        self,
        rebuilt: Tensor,
        original: Tensor,
        bound: float,
        label: Callable[[], str],
        learn: Callable[[], None],
        defer: Defer,
        *,
        soon: bool = True,
    ) -> None:
        """Compare elements that a replay gave with those that forward had; ``learn`` is called if they differ by more (relative).

        Raises:
            ReplayError: it computes something else than forward did.
        """
        if is_capturing(rebuilt.device):
            return
        if not is_near(rebuilt.device):
            verdict = functools.partial(self._judge_replay, bound, functools.partial(str, label()), learn)
            if self.later(rebuilt, original, verdict, defer, soon=soon):
                return
        self._judge_replay(bound, label, learn, relative_error(rebuilt, original))

    def later(
        self, rebuilt: Tensor, original: Tensor, verdict: Verdict, defer: Defer, *, soon: bool = True, zeros: bool = False
    ) -> bool:
        """Give the result to ``verdict`` at the end of this backward pass, or in a later step; ``False`` outside of a pass.

        ``verdict`` must hold no frame, no Value and no recipe.
        """
        if not defer(self.settle):
            return False
        pending = self._pending if soon or self.mode == "raise" else self._late
        pending.append(_Pending(rebuilt, original, verdict, zeros))
        return True

    def note(self, rebuilt: Tensor, original: Tensor, verdict: Verdict) -> None:
        """Give the result to ``verdict`` at the end of the next backward pass that compares something."""
        self._pending.append(_Pending(rebuilt, original, verdict))

    def land(self, *, wait: bool = False) -> None:
        """Read what devices have told since, or wait until they have told all.

        Raises:
            RevhooksError: something in an earlier step was not what it was.
        """
        while _flights and (wait or _flights[0].landed()):
            _flights.popleft().read()

    def settle(self) -> None:
        """Read the comparisons that an accelerator has made, all at once; start those that are read later."""
        self.land()
        _Flight.steps += 1
        late, self._late = self._late, []
        groups: dict[tuple[bool, object], list[_Pending]] = {}
        for pair in late:
            original, rebuilt = pair.original, pair.rebuilt
            key = (original.device, original.dtype, rebuilt.dtype, original.numel())
            groups.setdefault((pair.zeros, key), []).append(pair)
        _flights.extend(_Flight(pairs, zeros=zeros) for (zeros, _), pairs in groups.items())
        pending, self._pending = self._pending, []
        _give([one.verdict for one in pending], _results(pending))

    def _judge(
        self,
        bounds: tuple[float, float],
        label: Callable[[], str],
        fallback: Fallback,
        source: Tensor | None,
        zeros: bool,
        error: float,
        lost: int = 0,
    ) -> None:
        if error > self.worst:
            self.worst = WorstError(error, label())
        for watcher in tuple(WATCHERS):
            watcher.compared(label(), error)
        mild, gross = bounds
        if zeros and lost > 1 and self.mode != "measure":  # one may be by chance
            fallback("exact zeros that do not come back", label(), below=False)
        if error <= mild or self.mode == "measure":
            return
        if math.isinf(error) and source is not None and not bool(source.isfinite().all()):
            # what overflowed cannot be rebuilt; its gradients are not finite, as in plain autograd
            return
        reason = f"an error of {error:.2g}"
        if error > gross or self.mode == "raise":
            fallback(reason, label(), below=True)
            raise InversionError(
                explain(
                    label(),
                    expected=f"a reconstruction within {mild:g} of its input (relative)",
                    got=f"{error:.2g}; the gradients of this step would be wrong",
                    remedy="take the step again (this block and those before it are kept from now on), use a wider dtype "
                    "for the streams, or exclude the block with keep=",
                )
            )
        fallback(reason, label(), below=False)

    def _judge_replay(self, bound: float, label: Callable[[], str], learn: Callable[[], None], error: float, _: int = 0) -> None:
        if error <= bound or self.mode == "measure" or math.isinf(error):
            return
        learn()
        raise ReplayError(
            explain(
                f"replay of {label()}",
                expected="what its forward call computed",
                got=f"something else (relative error {error:.2g})",
                remedy="make it do the same in every call with the same input, or exclude the block with keep=",
            )
        )
