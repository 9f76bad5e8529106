"""Two-stream chains: split once, joined once, nothing concatenated between the steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RegistrationError, ShapeError, explain
from ..functional import ADDITIVE, Law, affine_law, grid_law
from ..storage import compact
from ..tracing import is_recorded
from .coupling import Coupling, Step

__all__ = ["ReversibleSequential"]


_Coupling = str | Law | Sequence[str | Law]


class ReversibleSequential(Coupling):
    """A chain of half-steps: ``a += fns[0](b)``, ``b += fns[1](a)``, ``a += fns[2](b)``, and so on.

    ``ReversibleSequential(f1, g1, f2, g2)`` computes what ``AdditiveCoupling(f1, g1)`` followed by
    ``AdditiveCoupling(f2, g2)`` computes, without joining and splitting in between.

    Args:
        *fns: the branches; a module may occur more than once.
        dim: the dimension along which the input is split.
        sizes: the two sizes along ``dim``; equal halves when ``None``.
        coupling: ``"additive"``, ``"affine"`` (each branch returns log-scales and shifts), or a
            `revhooks.functional.Law`, any pair of functions with ``inverse(forward(x, u), u) == x``; or one for each branch.
        grid_bits: exact streams, as in `AdditiveCoupling`.

    Shape:
        Input and output ``(*)``, equal; any number of dimensions, any floating dtype.

    Raises:
        RegistrationError: a branch is not a module.
        ShapeError: ``coupling`` is unknown or has no grid, or shapes do not fit (on the call).
        GridError: a stream has left the range of its grid (on the call).

    References:
        Gomez et al., 2017, arXiv:1707.04585, section 3.2.

    Example:
        >>> import torch
        >>> chain = ReversibleSequential(*[nn.Linear(2, 2) for _ in range(6)], dim=-1)
        >>> x = torch.randn(3, 4)
        >>> torch.allclose(chain.inverse(chain(x)), x, atol=1e-5), len(chain)
        (True, 6)
    """

    def __init__(
        self,
        *fns: nn.Module,
        dim: int = 1,
        sizes: tuple[int, int] | None = None,
        coupling: _Coupling = "additive",
        grid_bits: int | None = None,
    ) -> None:
        laws = self._laws(coupling, max(len(fns), 1), dim, grid_bits)
        bits = {law.grid_bits for law in laws}
        if (grid_bits is not None and bits != {grid_bits}) or len(bits) > 1:
            raise ShapeError(
                explain(
                    "grid_bits",
                    expected="additive couplings of one grid, on which sums are exact",
                    got=repr(coupling),
                    remedy="leave coupling out, or pass revhooks.functional.grid_law(bits)",
                )
            )
        super().__init__(dim=dim, sizes=sizes, grid_bits=next(iter(bits), grid_bits))
        self.coupling = coupling
        self._count = 0
        for fn in fns:
            self.append(fn)

    @staticmethod
    def _laws(coupling: _Coupling, count: int, dim: int, grid_bits: int | None) -> list[Law]:
        """One law a branch."""
        each = [coupling] * count if isinstance(coupling, (str, Law)) else list(coupling)
        if len(each) != count or not all(isinstance(one, Law) or one in ("additive", "affine") for one in each):
            raise ShapeError(
                explain(
                    "coupling",
                    expected="'additive', 'affine' or a revhooks.functional.Law, or a sequence of as many of them as branches",
                    got=repr(coupling),
                    remedy="pick one of these",
                )
            )
        additive = ADDITIVE if grid_bits is None else grid_law(grid_bits)
        named = {"additive": additive, "affine": affine_law("tanh", dim)}
        return [one if isinstance(one, Law) else named[one] for one in each]

    def append(self, fn: nn.Module) -> ReversibleSequential:
        """Add a branch at the end; returns the chain.

        Raises:
            RegistrationError: ``fn`` is not a module.
        """
        if not isinstance(fn, nn.Module):
            raise RegistrationError(
                explain(
                    type(self).__name__,
                    expected="branches that are modules",
                    got=type(fn).__name__,
                    remedy="pass each branch as an argument of its own: ReversibleSequential(*fns)",
                )
            )
        self.add_module(str(self._count), fn)
        self._count += 1
        return self

    def __len__(self) -> int:
        """How many branches there are."""
        return self._count

    def __iter__(self) -> Iterator[nn.Module]:
        """The branches in order."""
        return (self[i] for i in range(self._count))

    def __getitem__(self, index: int) -> nn.Module:
        """The branch at ``index``."""
        if not -self._count <= index < self._count:
            raise IndexError(f"branch {index} of {self._count}")
        branch = self._modules[str(index % self._count)]
        return branch  # type: ignore[return-value]

    def join(self, streams: Sequence[Tensor]) -> Tensor:
        """The output that carries both streams."""
        if any(stream.requires_grad for stream in streams) and not is_recorded():
            return _Join.apply(self.dim, *streams)  # type: ignore[no-any-return]
        return super().join(streams)

    def steps(self) -> Sequence[Step]:
        """One step a branch, into the first and the second stream by turns; what was appended has the last one's law."""
        given = 1 if isinstance(self.coupling, (str, Law)) else len(self.coupling)
        laws = self._laws(self.coupling, given, self.dim, self.grid_bits) or [ADDITIVE]
        return [Step(fn, 1 - i % 2, i % 2, laws[min(i, len(laws) - 1)]) for i, fn in enumerate(self)]


class _Join(torch.autograd.Function):
    """`torch.cat` whose gradients lie each in memory of its own: a used one does not stay for as long as the others."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dim: int, *streams: Tensor) -> Tensor:
        return torch.cat(streams, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.dim, *streams = inputs
        ctx.sizes = [stream.shape[ctx.dim] for stream in streams]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(compact(part) for part in grads[0].split(ctx.sizes, ctx.dim))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor) -> Tensor:
        return torch.cat(tangents, ctx.dim)
