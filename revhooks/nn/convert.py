"""Turn an ordinary residual stack into one that can be inverted, with the same parameters.

A residual block computes ``block(x) = x + f(x)``, which has no inverse in closed form. Its ``f`` does as the branch of a
momentum step (`to_momentum`) or of a coupling (`to_revnet`). The result is another function than the stack was, near it
and with the same parameters: train it, or train it on from the stack's weights.

References:
    Momentum Residual Neural Networks (Sander et al., 2021, arXiv:2102.07870), section 3.
    The Reversible Residual Network (Gomez et al., 2017, arXiv:1707.04585).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RegistrationError, ShapeError, explain
from .keys import TakesKeys
from .momentum import MomentumResidual
from .momentum_chain import MomentumSequential
from .sequential import ReversibleSequential

__all__ = ["RevNetStack", "WithoutSkip", "to_momentum", "to_revnet"]

Which = type | tuple[type, ...] | Callable[[nn.Module], bool]


class WithoutSkip(nn.Module):
    """``f(x) = block(x) - x``: the residual of a block that adds its input itself.

    Works for any block that keeps the shape, post-normalised ones included. It costs a subtraction, and the digits that
    ``f(x)`` is smaller than ``x``; where the block has its residual as a module of its own, use that (``residual=``).

    Args:
        block: a module from ``x``, and the extra arguments, to the shape of ``x``.

    Shape:
        Input and output ``(*)``, equal.

    Raises:
        RegistrationError: ``block`` is no module.
        ShapeError: the block changes the shape (on the call).

    Example:
        >>> f = WithoutSkip(nn.Identity())
        >>> f(torch.ones(2))
        tensor([0., 0.])
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        if not isinstance(block, nn.Module):
            raise RegistrationError(
                explain("residual block", expected="a module", got=type(block).__name__, remedy="wrap it in a module")
            )
        self.block = block

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the block adds to ``x``.

        Raises:
            ShapeError: the block changes the shape.
        """
        y = self.block(x, *args, **kwargs)
        if not isinstance(y, Tensor) or y.shape != x.shape:
            raise ShapeError(
                explain(
                    f"residual block {type(self.block).__name__}",
                    expected=f"one tensor of the shape of its input, {tuple(x.shape)}",
                    got=f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__,
                    remedy="name a layer that changes the shape in plain=, or give the residual itself with residual=",
                )
            )
        return y - x


def to_momentum(
    blocks: Iterable[nn.Module],
    gamma: float | Fraction = 0.9,
    *,
    residual: Callable[[nn.Module], nn.Module] | None = None,
    plain: Which = (),
    init_speed: Callable[[Tensor], Tensor] | None = None,
    exact: bool = False,
    grid_bits: int | None = None,
    hold_every: int | None = None,
) -> MomentumSequential:
    """A residual stack as a momentum network with the same parameters.

    Where the stack adds ``f(x)`` at once, the momentum network lets it fade in over the next ``1 / (1 - gamma)`` blocks:
    ``x_{k+1} = x_k + (1 - gamma) f_k(x_k) + gamma (x_k - x_{k-1})``. As gamma goes to 0 it becomes the stack, and ill-conditioned
    to invert; of the last blocks' residuals only a part arrives. So outputs differ; weights of a trained stack are a start,
    not an equal.

    Parameters and buffers are shared with ``blocks``, not copied. ``load_state_dict`` takes the stack's keys too (with
    ``residual=``, those of the residuals).

    Args:
        blocks: residual blocks in order, as an `nn.Sequential` or `nn.ModuleList` has them.
        gamma: the momentum, between 0 and 1.
        residual: a function from a block to the module that computes its ``f``; `WithoutSkip` when ``None``.
        plain: which blocks stay as they are, for instance since they change the shape: a class, a tuple of classes, or
            a predicate. The velocity begins anew after them.
        init_speed: as in `MomentumSequential`.
        exact: as in `MomentumSequential`.
        grid_bits: as in `MomentumSequential`.
        hold_every: as in `MomentumSequential`.

    Returns:
        A chain that is called as each block was: ``chain(x, *args, **kwargs)``.

    Raises:
        RegistrationError: a block or a residual is no module.
        ShapeError: ``gamma`` does not serve; a block that is not plain changes the shape (on the call).

    References:
        Sander et al., 2021, arXiv:2102.07870, section 3.

    Example:
        >>> layers = [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(3)]
        >>> chain = to_momentum(layers, gamma=0.9)
        >>> chain(torch.randn(2, 5, 8), src_key_padding_mask=torch.zeros(2, 5)).shape
        torch.Size([2, 5, 8])
        >>> chain[0].f.block is layers[0]
        True
    """
    blocks, is_plain = list(blocks), _predicate(plain)
    staying = [i for i, block in enumerate(blocks) if is_plain(block)]
    branches = [block if i in staying else _residual_of(block, residual) for i, block in enumerate(blocks)]
    chain = MomentumSequential(
        *branches,
        gamma=gamma,
        init_speed=init_speed,
        exact=exact,
        grid_bits=grid_bits,
        hold_every=hold_every,
        plain=staying,
    )
    for block, step in zip(blocks, chain, strict=True):
        if isinstance(step, MomentumResidual):
            step.takes_keys = {there: "f." + here for there, here in _keys(block, step.f).items()}
    return chain


class RevNetStack(TakesKeys):
    """Reversible chains, each on two copies of its input, and plain layers between them; made by `to_revnet`.

    Args:
        stages: `ReversibleSequential` chains that split along dimension 0, and plain layers.
        merge: how the streams of a chain become one: ``"sum"`` or ``"mean"``.

    Shape:
        Input and output ``(*)``, equal unless a plain layer changes it; at least one dimension.

    Raises:
        ShapeError: ``merge`` is unknown.

    Example:
        >>> stack = RevNetStack([ReversibleSequential(nn.Linear(4, 4), nn.Linear(4, 4), dim=0), nn.Linear(4, 2)])
        >>> stack(torch.randn(3, 4)).shape
        torch.Size([3, 2])
    """

    def __init__(self, stages: Sequence[nn.Module], merge: str = "sum") -> None:
        super().__init__()
        if merge not in ("sum", "mean"):
            raise ShapeError(explain("merge", expected="'sum' or 'mean'", got=repr(merge), remedy="pick one of these"))
        self.stages = nn.ModuleList(stages)
        self.merge = merge
        self.takes_keys = {}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run all stages; extra arguments go to every branch and plain layer.

        Raises:
            ShapeError: a branch changes the shape.
        """
        for stage in self.stages:
            if not isinstance(stage, ReversibleSequential):
                x = stage(x, *args, **kwargs)
                continue
            first, second = stage(torch.cat((x, x)), *args, **kwargs).chunk(2)
            x = first + second - x if self.merge == "sum" else (first + second) / 2
        return x

    def extra_repr(self) -> str:
        """How the streams become one."""
        return f"merge={self.merge!r}"


def to_revnet(
    blocks: Iterable[nn.Module],
    *,
    residual: Callable[[nn.Module], nn.Module] | None = None,
    plain: Which = (),
    merge: str = "sum",
) -> RevNetStack:
    """A residual stack as a RevNet with the same parameters.

    The input becomes two streams, both equal to it, and blocks change them by turns: ``a += f1(b)``, ``b += f2(a)``,
    ``a += f3(b)``. At the end the streams become one. The first two blocks see what they see in the stack; every
    later one sees only every other residual before it. ``merge="sum"``, ``a + b - x``, has each residual in full, as the
    stack has: the outputs agree to first order in the residuals. ``"mean"`` halves each residual. So outputs
    differ; weights of a trained stack are a start, not an equal.

    Needs twice the stack's activation for its streams, whatever the depth. Parameters and buffers are shared with
    ``blocks``, not copied, and ``load_state_dict`` takes the stack's keys too (with ``residual=``, those of the residuals).

    Args:
        blocks: residual blocks in order, as an `nn.Sequential` or `nn.ModuleList` has them.
        residual: a function from a block to the module that computes its ``f``; `WithoutSkip` when ``None``.
        plain: which blocks stay as they are, for instance since they change the shape: a class, a tuple of classes, or
            a predicate. The streams become one before them, and two after them.
        merge: ``"sum"`` or ``"mean"``.

    Returns:
        A stack that is called as each block was: ``stack(x, *args, **kwargs)``.

    Raises:
        RegistrationError: a block or a residual is no module.
        ShapeError: ``merge`` is unknown; a block that is not plain changes the shape (on the call).

    References:
        Gomez et al., 2017, arXiv:1707.04585, section 3.2.

    Example:
        >>> stack = to_revnet(nn.Sequential(*[nn.TransformerEncoderLayer(8, 2, 16) for _ in range(4)]))
        >>> stack(torch.randn(5, 2, 8)).shape
        torch.Size([5, 2, 8])
    """
    stages: list[nn.Module] = []
    takes_keys: dict[str, str] = {}
    for stays, group in itertools.groupby(enumerate(blocks), lambda item: _predicate(plain)(item[1])):
        if stays:
            for i, block in group:
                takes_keys[f"{i}."] = f"stages.{len(stages)}."
                stages.append(block)
            continue
        chain = ReversibleSequential(dim=0)
        for i, block in group:
            f = _residual_of(block, residual)
            for there, here in _keys(block, f).items():
                takes_keys[f"{i}.{there}"] = f"stages.{len(stages)}.{len(chain)}.{here}"
            chain.append(f)
        stages.append(chain)
    stack = RevNetStack(stages, merge)
    stack.takes_keys = takes_keys
    return stack


def _residual_of(block: nn.Module, residual: Callable[[nn.Module], nn.Module] | None) -> nn.Module:
    return WithoutSkip(block) if residual is None else residual(block)


def _keys(block: nn.Module, f: nn.Module) -> dict[str, str]:
    """Where the parameters of a block are in its residual: prefixes there, and here."""
    if isinstance(f, WithoutSkip) and f.block is block:
        return {"": "block."}
    name = next((name for name, module in block.named_modules() if module is f), None)
    return {} if name is None else {f"{name}.".removeprefix("."): ""}


def _predicate(which: Which) -> Callable[[nn.Module], bool]:
    if isinstance(which, (type, tuple)):
        return lambda module: isinstance(module, which)
    return which
