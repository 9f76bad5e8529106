"""The first try of an inverse (Rule 10): how it is called, what it gives back, and which branches it repeats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...buffers import untouched
from ...errors import RevhooksError
from ...registry import Registration
from ...storage import is_opaque, version_probe
from ..calls.state import CallState
from ..policy.guard import relative_error
from ..policy.plan import Inversion
from ..policy.ways import Place, Way, in_order, judge, split, ways
from ..tree import map_tensors, tensors_of
from .frame import ModuleFrame
from .interpose import deeper, shadowed, without_forward_hooks
from .record import Call, copied

__all__ = ["Trial"]


class Trial:
    """Tries the inverse of a block on the output of a call that has just been made.

    Args:
        frame: of the call.
        children: the branches of its block.
        calls: of these, in forward.
        state: what the block's call depends on.
        strays: modules below its branches that it called past them, by methods of theirs.
    """

    def __init__(
        self, frame: ModuleFrame, children: list[nn.Module], calls: list[Call], state: CallState, strays: list[nn.Module]
    ) -> None:
        self._frame = frame
        self._children = children
        self._calls = calls
        self._state = state
        self._strays = strays
        self._inverse_strays: list[nn.Module] = []
        self._inverse_called: set[nn.Module] = set()

    def run(
        self, entry: Registration, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any], places: tuple[Place, ...]
    ) -> Inversion:
        """Try the sensible ways; where none serves, the reason is that of the first one that fits the inverse's signature."""
        frame = self._frame
        arguments = in_order(places, args, kwargs)
        found: Inversion | None = None
        with torch.no_grad(), untouched(frame.module), without_forward_hooks(self._children):
            try:
                inverse = entry.resolve(frame.module)
            except RevhooksError as error:
                return Inversion(0, (), str(error))
            for way in ways(output, arguments, named=isinstance(entry.inverse, str), inputs=entry.inputs):
                rest = split(places[: way.held], args, kwargs)
                if way.fits(inverse, output, *rest):
                    tried = self._try(way, inverse, output, *rest, arguments[: way.held])
                    found = found if found is not None and tried.problem else tried
                    if not tried.problem:
                        break
        return found or Inversion(0, (), "no way of calling it fits its signature")

    def _try(
        self,
        way: Way,
        inverse: Callable[..., Any],
        output: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        wanted: list[Any],
    ) -> Inversion:
        frame, matches = self._frame, _Matches(self._calls)
        self._inverse_strays, self._inverse_called = [], set()

        def branch(child: nn.Module, proceed: Callable[..., Any], a: tuple[Any, ...], k: dict[str, Any]) -> Any:
            self._inverse_called.add(child)
            call = matches.find(child, tensors_of((a, k)), frame.bounds)
            return proceed(*a, **k) if call is None else map_tensors(copied, call.output)

        generators = frame.run.rng.capture(frame.device)
        if self._state.rng is not None:
            self._state.rng.restore()
        try:
            with shadowed(self._children, branch, deeper(self._children), self._inverse_strays.append):
                result = way.call(inverse, *map_tensors(copied, (output, args, kwargs)))
        except RevhooksError as error:
            return Inversion(0, (), str(error))
        except Exception as error:
            return Inversion(0, (), f"{type(error).__name__}: {error}")
        finally:
            generators.restore()
        verdict = judge(result, wanted, frame.bounds)
        return Inversion(verdict.inputs, tuple(matches.found), verdict.problem, way, matches.written())

    def better_branches(self) -> list[nn.Module]:
        """Modules below the branches that forward and the inverse both call, where they do not both call the branches."""
        forward = {call.child for call in self._calls}
        inverse = self._inverse_called
        below_forward = set(deeper([child for child in forward if child not in inverse]))
        below_inverse = set(deeper([child for child in inverse if child not in forward]))
        strays = set(self._strays)
        found = [m for m in self._inverse_strays if m in below_forward or m in strays]
        found += [m for m in self._strays if m in below_inverse]
        return list(dict.fromkeys(found))


class _Matches:
    """For each branch call of an inverse, the call of forward that it repeats, and whether its input is written to later."""

    def __init__(self, calls: list[Call]) -> None:
        self._calls = calls
        self._inputs: list[list[tuple[Tensor, int]]] = []
        self.found: list[int | None] = []

    def find(self, child: nn.Module, tensors: list[Tensor], bounds: Callable[[Tensor], tuple[float, float]]) -> Call | None:
        """The call of forward that has the result; ``None`` if it has to be made."""
        self._inputs.append([(version_probe(t), t._version) for t in tensors if not (is_opaque(t) or t.is_inference())])
        if torch.is_grad_enabled():  # the inverse differentiates through it
            self.found.append(None)
            return None
        candidates = [i for i, call in enumerate(self._calls) if self._repeats(call, child, tensors, bounds)]
        match = min(candidates, key=lambda i: self.found.index(i) if i in self.found else -1, default=None)
        if match in self.found:  # an iteration: its last calls are the closest
            self.found[self.found.index(match)] = None
        self.found.append(match)
        return None if match is None else self._calls[match]

    @staticmethod
    def _repeats(call: Call, child: nn.Module, tensors: list[Tensor], bounds: Callable[[Tensor], tuple[float, float]]) -> bool:
        if call.child is not child or any(map(is_opaque, tensors)) or call.shapes != [t.shape for t in tensors]:
            return False
        return all(a.dtype == b.dtype and relative_error(a, b) <= bounds(b)[0] for a, b in zip(tensors, call.args, strict=True))

    def written(self) -> frozenset[int]:
        """Which calls of the inverse have inputs that it has written to since."""
        return frozenset(
            i for i, inputs in enumerate(self._inputs) if any(probe._version != version for probe, version in inputs)
        )
