"""What `check` found, and how it is told."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field

from ..record import human_bytes
from .drift import Drift

__all__ = ["CheckResult"]

_WIDTH = 80


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What `check` found; truthy when all is well.

    Attributes:
        subject: the module's class.
        inverse_error: relative L2 error of ``inverse(forward(x))``; of the worst block inside where the module itself
            has no inverse; ``None`` where no block has one.
        gradient_error: largest relative L2 error of a gradient under ``reversible()`` against plain autograd, in two steps.
        evaluations: for each branch, how often one step calls it: 1 in plain autograd, 2 when it is rebuilt at no
            extra cost.
        deterministic: whether two steps from the same state agree bit by bit.
        problems: what is wrong, in words, each with a remedy.
        log_det_error: how far the registered ``log_det`` is from the log-abs-det of the Jacobian, relative to it or to 1;
            ``None`` where there is none, or the samples have more than 64 elements.
        gradients_equal: whether every gradient is bitwise that of plain autograd.
        outputs_equal: whether every output is.
        buffers: the names of buffers that are others after the steps than after those of plain autograd.
        generators: which generators are in another state then: ``torch``, ``python``, ``numpy``.
        drift: how the error of reconstructions grows over the longest chain of blocks; ``None`` where there is none of two.
        packed_bytes, held_bytes: what plain autograd would have held when forward was over, and what was.
        under: the context that the steps were taken in.
        notes: what is no problem, but good to know.
    """

    subject: str
    inverse_error: float | None
    gradient_error: float
    evaluations: dict[str, int] = field(default_factory=dict)
    deterministic: bool = True
    problems: tuple[str, ...] = ()
    log_det_error: float | None = None
    gradients_equal: bool = False
    outputs_equal: bool = True
    buffers: tuple[str, ...] = ()
    generators: tuple[str, ...] = ()
    drift: Drift | None = None
    packed_bytes: int = 0
    held_bytes: int = 0
    under: str = "reversible()"
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Whether all is well."""
        return not self.problems

    @property
    def verdict(self) -> str:
        """One line: whether to use it so."""
        where = f"{self.subject} under {self.under}"
        if self.problems:
            return f"not ok: {where}: {len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
        return f"ok: {where}: gradients {'bitwise equal' if self.gradients_equal else f'within {self.gradient_error:.2g}'}"

    def __str__(self) -> str:
        """A few lines for a terminal: the verdict, the problems, the findings."""
        lines = _wrapped(self.verdict, "", "  ")
        for problem in self.problems:
            lines += _wrapped(problem, "  ! ", "    ")
        for note in self.notes:
            lines += _wrapped(note, "  - ", "    ")
        for name, value in self._rows():
            lines += _wrapped(value, f"  {name:<16} ", " " * 19)
        return "\n".join(lines)

    def _rows(self) -> list[tuple[str, str]]:
        calls = sorted(set(self.evaluations.values()))
        rows = [
            ("inverse error", f"{self.inverse_error:.2g}" if self.inverse_error is not None else _NO_INVERSE),
            ("gradient error", "0, bitwise equal" if self.gradients_equal else f"{self.gradient_error:.2g}"),
            ("outputs", "bitwise equal" if self.outputs_equal else "differ"),
            ("buffers", "equal after each step" if not self.buffers else f"differ: {', '.join(self.buffers[:4])}"),
            ("generators", "equal after each step" if not self.generators else f"differ: {', '.join(self.generators)}"),
            ("deterministic", "yes" if self.deterministic else "no"),
        ]
        if calls:
            ends = calls[:1] + calls[-1:] if len(calls) > 1 else calls
            rows.insert(2, ("evaluations", f"{' to '.join(str(n) for n in ends)} a branch"))
        if self.log_det_error is not None:
            rows.append(("log-det error", f"{self.log_det_error:.2g}"))
        if self.packed_bytes:
            rows.append(("held", f"{human_bytes(self.held_bytes)}, where plain autograd holds {human_bytes(self.packed_bytes)}"))
        if self.drift is not None:
            rows.append(("drift", str(self.drift)))
        return rows


_NO_INVERSE = "no block with an inverse; nothing is inverted"


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
