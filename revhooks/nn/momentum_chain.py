"""Momentum residual networks: chains of momentum steps.

References:
    Momentum Residual Neural Networks (Sander et al., 2021, arXiv:2102.07870).
    Gradient-based hyperparameter optimization through reversible learning (Maclaurin et al., 2015, arXiv:1502.03492).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InversionError, ShapeError, explain
from ..registry import ACTIVE
from .exact import Grid, extent, on_grid, ratio_of, store_plan
from .momentum import ExactMomentumResidual, MomentumResidual

__all__ = ["MomentumSequential", "MomentumState"]


class MomentumState(NamedTuple):
    """Where a momentum chain is.

    Attributes:
        x: the position, ``(*)``.
        v: the velocity, ``(*)``.
        bits: of an exact chain the store, integers ``(*)``, in as many words as it has filled.
    """

    x: Tensor
    v: Tensor
    bits: tuple[Tensor, ...] = ()


class MomentumSequential(nn.Module):
    """A chain of momentum steps: a residual stack with the same branches that can be inverted.

    The velocity begins at zero and is dropped at the end. Under ``reversible()`` each branch is evaluated once more, and what
    is held is: nothing for a step; the position and velocity at the end; both once more every ``hold_every`` steps, for
    going back divides by gamma and an error grows.

    With ``exact=True`` positions and velocities lie on a grid, nothing is lost in going back, and the chain holds one store
    instead: ``log2(1 / gamma)`` bits a step and element, for 0.9 one byte up to 29 steps, two up to 82, four up to 187, eight up
    to 311 and then another eight (`revhooks.nn.exact.store_plan`). Its gradients under ``reversible()`` are those of plain
    autograd of the same chain, bit by bit, if its branches compute the same bits in every call. Rounding moves the outputs by
    some steps of the grid: 1e-3 of their norm after 24 steps of float32, 5e-3 after 200.

    Args:
        *fs: the branches, modules from ``x`` and the extra arguments to the shape of ``x``; one may occur more than once.
        gamma: the momentum, between 0 and 1; for ``exact`` a fraction with a denominator up to 256.
        init_speed: the first velocity as a function of ``x`` (a module's parameters are the chain's); zero when ``None``.
        exact: whether to compute on a grid. float32 and float64 only; branches may run under autocast.
        grid_bits: positions are multiples of ``2**-grid_bits`` and below ``2**(24 - grid_bits)`` in float32,
            ``2**(53 - grid_bits)`` in float64; 12 and 32 when ``None``.
        hold_every: after how many steps the streams are held exactly; as many as let an error grow by
            ``eps**-0.25`` when ``None`` (float32, 0.9: 37). Of no use to an exact chain.
        plain: positions among ``fs`` of layers that are called as they are. They may change the shape; the velocity
            begins anew after them.

    Shape:
        Input and output ``(*)``, equal unless a plain layer changes it.

    Raises:
        RegistrationError: a branch is no module.
        ShapeError: ``gamma`` does not serve; a branch changes the shape (on the call).
        InversionError: an exact chain has left the range of its grid (on the call).

    References:
        Sander et al., 2021, arXiv:2102.07870, eq. 2-3. Maclaurin et al., 2015, arXiv:1502.03492, algorithm 3.

    Example:
        >>> chain = MomentumSequential(*[nn.Linear(4, 4) for _ in range(8)], exact=True)
        >>> x = torch.randn(3, 4)
        >>> state = chain.run(chain.start(x))
        >>> torch.equal(state.x, chain(x)), torch.equal(chain.inverse(state).x, chain.start(x).x)
        (True, True)
    """

    def __init__(
        self,
        *fs: nn.Module,
        gamma: float | Fraction = 0.9,
        init_speed: Callable[[Tensor], Tensor] | None = None,
        exact: bool = False,
        grid_bits: int | None = None,
        hold_every: int | None = None,
        plain: Container[int] = (),
    ) -> None:
        super().__init__()
        if hold_every is not None and hold_every < 1:
            raise ShapeError(
                explain(type(self).__name__, expected="hold_every of at least 1", got=str(hold_every), remedy="leave it None")
            )
        self.gamma = float(gamma)
        self.ratio = ratio_of(gamma) if exact else None
        self.grid_bits = grid_bits
        self.hold_every = hold_every
        self.init_speed = init_speed
        self._count = len(fs)
        for i, f in enumerate(fs):
            if i in plain:
                self.add_module(str(i), f)
            elif self.ratio is not None:
                self.add_module(str(i), ExactMomentumResidual(f, gamma=gamma, grid_bits=grid_bits))
            else:
                self.add_module(str(i), MomentumResidual(f, gamma=gamma))

    def __len__(self) -> int:
        """How many steps and plain layers there are."""
        return self._count

    def __iter__(self) -> Iterator[nn.Module]:
        """The steps and plain layers in order."""
        return (self[i] for i in range(self._count))

    def __getitem__(self, index: int) -> nn.Module:
        """The step or plain layer at ``index``."""
        if not -self._count <= index < self._count:
            raise IndexError(f"step {index} of {self._count}")
        return self._modules[str(index % self._count)]  # type: ignore[return-value]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run all steps from rest; extra arguments go to every branch and plain layer.

        Raises:
            ShapeError: a branch changes the shape, or the dtype does not serve an exact chain.
            InversionError: an exact chain has left the range of its grid.
        """
        steps: list[Any] = []
        for child in self:
            if isinstance(child, MomentumResidual):
                steps.append(child)
                continue
            x = child(self._through(steps, x, args, kwargs), *args, **kwargs)
            steps = []
        return self._through(steps, x, args, kwargs)

    def start(self, x: Tensor) -> MomentumState:
        """Where the chain begins: ``x`` (of an exact chain on its grid) and the first velocity.

        Raises:
            ShapeError: the dtype does not serve an exact chain.
        """
        v = x.new_zeros(()).expand_as(x) if self.init_speed is None else self.init_speed(x)
        if self.ratio is None:
            return MomentumState(x, v)
        grid = Grid.of(x.dtype, self.ratio, self.grid_bits)
        return MomentumState(on_grid(x, grid.x_bits), v if self.init_speed is None else on_grid(v, grid.v_bits))

    def run(self, state: MomentumState, *args: Any, **kwargs: Any) -> MomentumState:
        """Run all steps from ``state``, which `start` or the `run` of a chain with the same grid returned.

        Raises:
            ShapeError: as in `forward`.
            InversionError: as in `forward`; the chain has plain layers.
        """
        return self._run(self._steps(), state, args, kwargs)

    def inverse(self, state: MomentumState, *args: Any, **kwargs: Any) -> MomentumState:
        """The state from which `run` came to ``state``, given the same extra arguments.

        Raises:
            ShapeError: as in `forward`.
            InversionError: the chain has plain layers.
        """
        steps = self._steps()
        x, v, bits = state.x, state.v, list(state.bits)
        taken = store_plan(len(steps), self.ratio)[0] if self.ratio is not None else 0
        for index, step in reversed(list(enumerate(steps))):
            if not taken:
                x, v = step.inverse(x, v, *args, **kwargs)
                continue
            x, v, bits[-1] = step.inverse(x, v, bits[-1], *args, **kwargs)
            if index % taken == 0:
                bits.pop()
        return MomentumState(x, v, tuple(bits))

    def extra_repr(self) -> str:
        """The momentum, and if it is exact."""
        return f"gamma={self.gamma:g}, exact={self.ratio is not None}"

    def _steps(self) -> list[Any]:
        """All children as steps."""
        plain = next((child for child in self if not isinstance(child, MomentumResidual)), None)
        if plain is not None:
            raise InversionError(
                explain(
                    type(self).__name__,
                    expected="momentum steps only",
                    got=f"a plain layer {type(plain).__name__}",
                    remedy="call the chain, or run and invert the stretches between plain layers as chains of their own",
                )
            )
        return list(self)

    def _through(self, steps: Sequence[Any], x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The position after ``steps`` from rest."""
        return self._run(steps, self.start(x), args, kwargs).x if steps else x

    def _run(self, steps: Sequence[Any], state: MomentumState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> MomentumState:
        if self.ratio is not None:
            return self._run_exact(steps, state, self.ratio, args, kwargs)
        x, v = state.x, state.v
        every = self.hold_every or max(1, int(0.25 * math.log(torch.finfo(x.dtype).eps) / math.log(self.gamma)))
        for index, step in enumerate(steps):
            if index and index % every == 0 and ACTIVE.run is not None:
                v = _Hold.apply(v, x)
            x, v = step(x, v, *args, **kwargs)
        return MomentumState(x, v, state.bits)

    def _run_exact(
        self, steps: Sequence[Any], state: MomentumState, ratio: Fraction, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> MomentumState:
        x, v, bits = state.x, state.v, list(state.bits)
        taken, dtype = store_plan(len(steps), ratio)
        extents: list[Tensor] = []
        for index, step in enumerate(steps):
            if index % taken == 0:
                bits.append(x.new_zeros((), dtype=dtype).expand_as(x))
            x, v, bits[-1] = step(x, v, bits[-1], *args, **kwargs)
            extents.extend(extent(x, v))
        Grid.of(x.dtype, ratio, self.grid_bits).check(extents, type(self).__name__)
        return MomentumState(x, v, tuple(bits))


class _Hold(torch.autograd.Function):
    """Save both streams, as any op may, and change nothing: a saved tensor is held exactly, and the chain goes on from it."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(v, x)
        return v.view_as(v)

    @staticmethod
    def backward(_: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
