"""Couplings: one stream changes by what a branch computes from the other.

A coupling is told as *steps* (`Step`): which branch, from which stream, into which stream, by which law. Forward,
inverse and the runtime's half-step rebuilding all read the same steps.

References:
    NICE (Dinh et al., 2014, arXiv:1410.8516), section 3.2.
    The Reversible Residual Network (Gomez et al., 2017, arXiv:1707.04585), eq. 6-7.
    Density estimation using Real NVP (Dinh et al., 2016, arXiv:1605.08803), eq. 7-8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import RegistrationError, RevhooksError, ShapeError, explain
from ..functional import ADDITIVE, Law, affine_law, grid_law, round_to_grid, sum_per_sample, wide
from ..storage import compact
from .flow import count, inverse_of_forward, inverse_with_ladj, invertible_with_ladj
from .ranges import RangeWatch

__all__ = ["AdditiveCoupling", "AffineCoupling", "Coupling", "RangeWatch", "Step"]


class Step(NamedTuple):
    """``streams[target] = law.forward(streams[target], branch(streams[source], ...))``."""

    branch: nn.Module
    source: int
    target: int
    law: Law

    def evaluate(self, source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Call the branch; its result must be a tensor.

        Raises:
            ShapeError: the branch returned something else.
        """
        update = self.branch(source, *args, **kwargs)
        if not isinstance(update, Tensor):
            raise ShapeError(
                explain(
                    f"branch {type(self.branch).__name__}",
                    expected="one tensor from it",
                    got=type(update).__name__,
                    remedy="wrap the branch so that it returns the tensor only",
                )
            )
        return update

    def apply(self, target: Tensor, update: Tensor) -> Tensor:
        """The target stream after the step.

        Raises:
            ShapeError: the update does not fit the stream.
        """
        return self._fit(self.law.forward, target, update)

    def undo(self, target: Tensor, update: Tensor) -> Tensor:
        """The target stream before the step.

        Raises:
            ShapeError: the update does not fit the stream.
        """
        return self._fit(self.law.inverse, target, update)

    def apply_and_ladj(self, target: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        """The target stream after the step, and how the step changes volume there: ``(B,)``.

        Raises:
            ShapeError: the update does not fit the stream.
            RegistrationError: the law does not say.
        """
        if self.law.saves and self.law.call_and_ladj is not None:
            return self._fit_with_ladj(self.law.call_and_ladj, target, update)
        return self.apply(target, update), self.log_det(target, update)

    def undo_and_ladj(self, target: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        """The target stream before the step, and how going back changes volume: ``(B,)``.

        Raises:
            ShapeError: the update does not fit the stream.
            RegistrationError: the law does not say.
        """
        if self.law.saves and self.law.inverse_and_ladj is not None:
            return self._fit_with_ladj(self.law.inverse_and_ladj, target, update)
        before = self.undo(target, update)
        return before, -self.log_det(before, update)

    def log_det(self, target: Tensor, update: Tensor) -> Tensor:
        """How the step changes volume at the target stream before it: ``(B,)``.

        Raises:
            RegistrationError: the law does not say.
        """
        if self.law.log_det is None:
            raise RegistrationError(
                explain(
                    "law of a coupling", expected="a Law with log_det=", got="none", remedy="give it, or call forward instead"
                )
            )
        return self.law.log_det(target, update)

    def _fit_with_ladj(self, law: Any, target: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        ladj: list[Tensor] = []

        def moved(target: Tensor, update: Tensor) -> Tensor:
            result, slopes = law(target, update)
            ladj.append(slopes)
            return result  # type: ignore[no-any-return]

        return self._fit(moved, target, update), sum_per_sample(ladj[0])

    def _fit(self, law: Any, target: Tensor, update: Tensor) -> Tensor:
        try:
            result: Tensor = law(target, update)
        except RevhooksError:
            raise
        except RuntimeError as error:
            if "size" not in str(error) and "shape" not in str(error):
                raise
            raise self._misfit(target, update) from error
        if result.shape != target.shape:
            raise self._misfit(target, update)
        return result

    def _misfit(self, target: Tensor, update: Tensor) -> ShapeError:
        return ShapeError(
            explain(
                f"branch {type(self.branch).__name__}",
                expected=f"an output that fits the stream of shape {tuple(target.shape)}",
                got=f"shape {tuple(update.shape)}",
                remedy="let the branch keep the stream's shape (an affine branch: twice its channels)",
            )
        )


class Coupling(nn.Module):
    """A chain of steps over two streams: the base of every coupling.

    Subclasses define `steps`; the runtime rebuilds any of them one step at a time.

    Args:
        dim: the dimension along which the input is split into two streams.
        sizes: the two sizes along ``dim``; equal halves when ``None``.
        grid_bits: streams are rounded to multiples of ``2**-grid_bits`` as they come in (`revhooks.functional.grid_law`).
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        count(cls)

    def __init__(self, *, dim: int = 1, sizes: tuple[int, int] | None = None, grid_bits: int | None = None) -> None:
        super().__init__()
        if sizes is not None and (len(sizes) != 2 or min(sizes) < 1):
            raise ShapeError(
                explain(
                    type(self).__name__,
                    expected="sizes of two positive integers",
                    got=repr(sizes),
                    remedy="give the sizes of both streams along dim",
                )
            )
        self.dim = dim
        self.sizes = sizes
        self.grid_bits = grid_bits

    def steps(self) -> Sequence[Step]:
        """The steps, in the order of forward."""
        raise NotImplementedError

    def split(self, x: Tensor) -> list[Tensor]:
        """Both streams of ``x``, each dense in memory.

        Raises:
            ShapeError: ``x`` cannot be split as the layer says.
        """
        if not isinstance(x, Tensor):
            raise self._cannot_split("a tensor", type(x).__name__)
        if not -x.dim() <= self.dim < x.dim():
            raise self._cannot_split(f"a tensor that has dim {self.dim}", f"shape {tuple(x.shape)}")
        width = x.shape[self.dim]
        sizes = self.sizes or (width // 2, width - width // 2)
        if self.sizes is None and width % 2:
            raise self._cannot_split(f"an even size along dim {self.dim}", f"shape {tuple(x.shape)}")
        if sum(sizes) != width:
            raise self._cannot_split(f"{sum(sizes)} = {sizes[0]} + {sizes[1]} along dim {self.dim}", f"shape {tuple(x.shape)}")
        return [self._dense(stream) for stream in x.split(sizes, self.dim)]

    def _dense(self, stream: Tensor) -> Tensor:
        return compact(stream) if self.grid_bits is None else round_to_grid(stream, self.grid_bits)

    def stream(self, x: Tensor, place: int, sizes: Sequence[int]) -> Tensor:
        """One of the streams that `split` has made, of these sizes."""
        return self._dense(x.split(tuple(sizes), self.dim)[place])

    def _cannot_split(self, expected: str, got: str) -> ShapeError:
        return ShapeError(
            explain(type(self).__name__, expected=expected, got=got, remedy="choose dim= and sizes= to fit the input")
        )

    def join(self, streams: Sequence[Tensor]) -> Tensor:
        """The output that carries both streams."""
        return torch.cat(tuple(streams), self.dim)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run all steps; extra arguments go to every branch.

        Args:
            x: input of shape ``(*)`` with ``dim`` among its dimensions, any floating dtype.
            *args: passed to every branch after its stream.
            **kwargs: passed to every branch.

        Returns:
            The output, of the input's shape.

        Raises:
            ShapeError: the input cannot be split, or a branch's output does not fit its stream.
            GridError: with ``grid_bits``, a stream has left the range in which the grid is exact.
        """
        streams, watch = self.split(x), RangeWatch(self)
        for index, step in enumerate(self.steps()):
            update = step.evaluate(streams[step.source], args, kwargs)
            streams[step.target] = step.apply(streams[step.target], update)
            watch.see(index, streams[step.target])
        watch.close()
        return self.join(streams)

    @inverse_of_forward
    def inverse(self, y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The input that `forward` maps to ``y``, given the same extra arguments.

        Raises:
            ShapeError: as in `forward`.
        """
        streams = self.split(y)
        for step in reversed(self.steps()):
            update = step.evaluate(streams[step.source], args, kwargs)
            streams[step.target] = step.undo(streams[step.target], update)
        return self.join(streams)

    @invertible_with_ladj
    def call_and_ladj(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """`forward`, and ``log|det dy/dx|`` from the same evaluation of the branches.

        Returns:
            The output, and the log-abs-det of each sample, of shape ``(B,)``.

        Raises:
            ShapeError: as in `forward`, or the streams are split along the batch.
            GridError: as in `forward`.
            RegistrationError: a law has no ``log_det``.
        """
        streams, ladj, watch = self.split(x), self.no_ladj(x), RangeWatch(self)
        for index, step in enumerate(self.steps()):
            update = step.evaluate(streams[step.source], args, kwargs)
            streams[step.target], change = step.apply_and_ladj(streams[step.target], update)
            ladj = ladj + change
            watch.see(index, streams[step.target])
        watch.close()
        return self.join(streams), ladj

    @inverse_with_ladj
    def inverse_and_ladj(self, y: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """`inverse`, and ``log|det dx/dy|`` from the same evaluation of the branches.

        Returns:
            The input, and the log-abs-det of each sample, of shape ``(B,)``: minus that of `call_and_ladj` there.

        Raises:
            ShapeError: as in `call_and_ladj`.
            RegistrationError: as in `call_and_ladj`.
        """
        streams, ladj = self.split(y), self.no_ladj(y)
        for step in reversed(self.steps()):
            update = step.evaluate(streams[step.source], args, kwargs)
            streams[step.target], change = step.undo_and_ladj(streams[step.target], update)
            ladj = ladj + change
        return self.join(streams), ladj

    def no_ladj(self, x: Tensor) -> Tensor:
        """The log-abs-det of no step: zeros ``(B,)``.

        Raises:
            ShapeError: the streams are split along the batch.
        """
        if self.dim % x.dim() == 0:
            raise self._cannot_split("streams that are not split along the batch", f"dim={self.dim}")
        return x.new_zeros(x.shape[0], dtype=wide(x.dtype))

    def log_det(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``log|det dy/dx|`` of each sample, of shape ``(B,)``; raises as `call_and_ladj`."""
        return self.call_and_ladj(x, *args, **kwargs)[1]

    def extra_repr(self) -> str:
        """How the input is split, and the grid."""
        grid = f", grid_bits={self.grid_bits}" if self.grid_bits is not None else ""
        return f"dim={self.dim}" + (f", sizes={self.sizes}" if self.sizes else "") + grid


class _PairCoupling(Coupling):
    """One or two steps: ``f`` into the first stream, then ``g``, if there is one, into the second."""

    def __init__(
        self,
        f: nn.Module,
        g: nn.Module | None,
        *,
        dim: int,
        sizes: tuple[int, int] | None,
        swap: bool,
        grid_bits: int | None = None,
    ) -> None:
        super().__init__(dim=dim, sizes=sizes, grid_bits=grid_bits)
        self.f = f
        self.g = g
        self.swap = swap

    def law(self) -> Law:
        """How a stream changes."""
        raise NotImplementedError

    def steps(self) -> Sequence[Step]:
        """First ``f`` into the first stream (``swap``: the second), then ``g`` into the other."""
        law, first = self.law(), int(self.swap)
        step = Step(self.f, 1 - first, first, law)
        return (step,) if self.g is None else (step, Step(self.g, first, 1 - first, law))

    def extra_repr(self) -> str:
        """How the input is split, the grid, and which stream comes first."""
        return super().extra_repr() + (", swap=True" if self.swap else "")


class AdditiveCoupling(_PairCoupling):
    """``y1 = x1 + f(x2)``, ``y2 = x2 + g(y1)``: the RevNet block; without ``g`` the NICE layer, ``y2 = x2``.

    Args:
        f: maps the second stream (and the extra arguments) to the shape of the first.
        g: maps the first stream to the shape of the second; ``None``: the second stream stays as it is.
        dim: the dimension along which the input is split.
        sizes: the two sizes along ``dim``; equal halves when ``None``.
        swap: ``f`` changes the second stream and ``g`` the first, so that layers of one branch can alternate.
        grid_bits: streams and what is added to them are rounded to multiples of ``2**-grid_bits``, so that the inverse is
            exact to the last bit and gradients under ``reversible()`` are those of plain autograd, however deep the net. In
            float32 streams must stay below ``2**(24 - grid_bits)``; branches may compute in a narrower dtype.

    Shape:
        Input and output ``(*)``, equal; any number of dimensions, any floating dtype.

    Raises:
        ShapeError: shapes do not fit (on the call), or ``grid_bits`` is out of bounds.
        GridError: a stream has left the range of its grid (on the call).

    References:
        Dinh et al., 2014, arXiv:1410.8516, section 3.2. Gomez et al., 2017, arXiv:1707.04585, eq. 6-7.

    Example:
        >>> block = AdditiveCoupling(nn.Linear(2, 2), nn.Linear(2, 2), dim=-1)
        >>> x = torch.randn(3, 4)
        >>> torch.allclose(block.inverse(block(x)), x, atol=1e-6)
        True
    """

    def __init__(
        self,
        f: nn.Module,
        g: nn.Module | None = None,
        *,
        dim: int = 1,
        sizes: tuple[int, int] | None = None,
        swap: bool = False,
        grid_bits: int | None = None,
    ) -> None:
        super().__init__(f, g, dim=dim, sizes=sizes, swap=swap, grid_bits=grid_bits)
        self.law()  # grid_bits out of bounds are refused here, not at the first call

    def law(self) -> Law:
        """How a stream changes."""
        return ADDITIVE if self.grid_bits is None else grid_law(self.grid_bits)


class AffineCoupling(_PairCoupling):
    """``y1 = x1 * factor(r1) + t1`` with ``r1, t1 = f(x2)``, and the same for ``y2`` from ``g(y1)``.

    What a branch returns is twice as wide along ``dim`` as the stream that it changes: first the raw log-scales, then the
    shifts. ``AffineCoupling(f)`` is one-sided, as in Real NVP and Glow: only the first stream changes; ``swap=True``: the second.

    Args:
        f: maps the second stream (and the extra arguments) to twice the first along ``dim``: raw log-scales, then shifts.
        g: maps the first stream to twice the second, in the same order; ``None``: the second stream stays as it is.
        dim: the dimension along which the input is split.
        sizes: the two sizes along ``dim``; equal halves when ``None``.
        swap: ``f`` changes the second stream and ``g`` the first, so that layers of one branch can alternate.
        scale: ``"exp"``, ``"sigmoid"`` or ``"tanh"``: how raw log-scales become factors
            (`revhooks.functional.affine_law`).

    Shape:
        Input and output ``(*)``, equal; any number of dimensions, any floating dtype.

    Raises:
        ShapeError: ``scale`` is unknown, or shapes do not fit (on the call).

    References:
        Dinh et al., 2016, arXiv:1605.08803, eq. 7-8.

    Example:
        >>> block = AffineCoupling(nn.Linear(2, 4), nn.Linear(2, 4), dim=-1)
        >>> x = torch.randn(3, 4)
        >>> torch.allclose(block.inverse(block(x)), x, atol=1e-5)
        True
    """

    def __init__(
        self,
        f: nn.Module,
        g: nn.Module | None = None,
        *,
        dim: int = 1,
        sizes: tuple[int, int] | None = None,
        swap: bool = False,
        scale: str = "tanh",
    ) -> None:
        super().__init__(f, g, dim=dim, sizes=sizes, swap=swap)
        affine_law(scale, dim)  # an unknown scale is refused here, not at the first call
        self.scale = scale

    def law(self) -> Law:
        """How a stream changes."""
        return affine_law(self.scale, self.dim)

    def extra_repr(self) -> str:
        """How the input is split, and the scale."""
        return f"{super().extra_repr()}, scale={self.scale!r}"
