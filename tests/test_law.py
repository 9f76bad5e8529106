"""The law: every registered op, with and without ``reversible()``: same loss, same gradients, same memory rules."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import revhooks
from revhooks import nn as rnn
from revhooks.errors import ShapeError
from revhooks.functional import ADDITIVE, Law
from revhooks.registry import registered
from tests.conftest import Count, calls, compare, conv_branch, mlp, step


def multiply(x: Tensor, u: Tensor) -> Tensor:
    return x * (1.5 + torch.tanh(u))


def divide(y: Tensor, u: Tensor) -> Tensor:
    return y / (1.5 + torch.tanh(u))


MULTIPLY = Law(multiply, divide)


class Case(NamedTuple):
    """A block by name, its maker, and the shape that it takes."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


def _unequal() -> nn.Module:
    f, g = Count(nn.Conv2d(5, 3, 3, padding=1)), Count(nn.Conv2d(3, 5, 3, padding=1))
    return rnn.AdditiveCoupling(f, g, sizes=(3, 5))


def _mixing() -> nn.Module:
    return rnn.FlowSequential(
        rnn.ActNorm(8), rnn.Permute.random(8), rnn.InvertibleConv1x1(8), rnn.LeakyReLU(0.5), rnn.SinhArcsinh(8)
    )


def _resampling() -> nn.Module:
    haar = (rnn.HaarDownsampling(), rnn.HaarUpsampling())
    learned = (rnn.OrthogonalDownsampling(4), rnn.LeakyReLU(0.5), rnn.OrthogonalUpsampling(4, method="cayley"))
    return rnn.FlowSequential(rnn.ActNorm(4), rnn.Squeeze(), rnn.Unsqueeze(), *haar, *learned)


CASES = [
    Case("additive conv", lambda: rnn.AdditiveCoupling(conv_branch(4), conv_branch(4)), (2, 8, 5, 5)),
    Case("additive mlp", lambda: rnn.AdditiveCoupling(mlp(4), mlp(4), dim=-1), (3, 7, 8)),
    Case("additive unequal", _unequal, (2, 8, 5, 5)),
    Case("additive dim 0", lambda: rnn.AdditiveCoupling(mlp(6), mlp(6), dim=0), (4, 6)),
    Case("additive 5-D", lambda: rnn.AdditiveCoupling(Count(nn.Conv3d(2, 2, 1)), Count(nn.Conv3d(2, 2, 1))), (2, 4, 3, 3, 3)),
    Case("affine tanh", lambda: rnn.AffineCoupling(mlp(4, 8, 0.3), mlp(4, 8, 0.3), dim=-1), (3, 8)),
    Case("affine exp", lambda: rnn.AffineCoupling(mlp(4, 8, 0.3), mlp(4, 8, 0.3), dim=-1, scale="exp"), (3, 8)),
    Case("affine sigmoid", lambda: rnn.AffineCoupling(mlp(4, 8, 0.3), mlp(4, 8, 0.3), dim=-1, scale="sigmoid"), (3, 8)),
    Case("affine conv", lambda: rnn.AffineCoupling(conv_branch(4, 8, False), conv_branch(4, 8, False)), (2, 8, 5, 5)),
    Case("sequential 5", lambda: rnn.ReversibleSequential(*[conv_branch(4) for _ in range(5)]), (2, 8, 5, 5)),
    Case(
        "sequential affine",
        lambda: rnn.ReversibleSequential(*[mlp(4, 8, 0.3) for _ in range(6)], dim=-1, coupling="affine"),
        (3, 8),
    ),
    Case("mixing", _mixing, (2, 8, 5, 5)),
    Case("resampling", _resampling, (2, 4, 4, 4)),
    Case("dense linear", lambda: rnn.InvertibleLinear(8, lu=False), (3, 7, 8)),
    Case("residual mlp", lambda: rnn.InvertibleResidual(nn.Sequential(nn.Linear(8, 9), nn.ELU(), nn.Linear(9, 8))), (3, 8)),
    Case("residual conv", lambda: rnn.InvertibleResidual(nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))), (2, 8, 5, 5)),
    Case("spline", lambda: rnn.SplineCoupling(mlp(4, 44, 0.3), mlp(4, 44, 0.3), dim=-1, bins=4), (3, 8)),
    Case("spline conv", lambda: rnn.SplineCoupling(conv_branch(4, 44, False), bins=4), (2, 8, 5, 5)),
    Case("masked conv", lambda: rnn.MaskedCoupling(conv_branch(8, 16, False), rnn.checkerboard(5, 5)), (2, 8, 5, 5)),
    Case("autoregressive", lambda: rnn.MaskedAutoregressive(rnn.MADE(8, 2, (16,))), (3, 8)),
    Case("sequential law", lambda: rnn.ReversibleSequential(*[mlp(4) for _ in range(6)], dim=-1, coupling=MULTIPLY), (3, 8)),
]
IDS = [case.name for case in CASES]


def chain(case: Case, depth: int) -> nn.Module:
    return nn.Sequential(*[case.make() for _ in range(depth)])


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_inverse(case: Case) -> None:
    block = case.make().double()
    x = torch.randn(case.shape, dtype=torch.float64)
    block.eval()
    assert torch.allclose(block.inverse(block(x)), x, atol=1e-10)


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("grad", [False, True])
def test_gradients_float64(case: Case, grad: bool, no_gc: None) -> None:
    x = torch.randn(case.shape, dtype=torch.float64, requires_grad=grad)
    compare(chain(case, 4).double(), x)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_gradients_behind_an_ordinary_layer(case: Case) -> None:
    """The first block's input is a ReLU's output: exact zeros, that no inversion gives back."""
    model = nn.Sequential(
        nn.Conv2d(case.shape[1], case.shape[1], 1) if len(case.shape) == 4 else nn.Identity(), nn.ReLU(), chain(case, 3)
    )
    x = torch.randn(case.shape, dtype=torch.float64, requires_grad=True)
    compare(model.double(), x * 1)


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 2e-3), (torch.bfloat16, 0.3)])
def test_other_dtypes(case: Case, dtype: torch.dtype, tol: float) -> None:
    x = torch.randn(case.shape, dtype=dtype, requires_grad=True)
    compare(chain(case, 2).to(dtype), x, tol=tol)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda x: torch.cat([x, x], 0)[::2],
    "expanded": lambda x: x[:1].expand(x.shape),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x,
    "view of a larger one": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
}


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(case: Case, layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(case.shape, dtype=torch.float64))
    model = chain(case, 3).double()
    plain = step_of_layout(model, x, reverse=False)
    rev = step_of_layout(model, x, reverse=True)
    for a, b in zip(plain, rev, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-10)


def step_of_layout(model: nn.Module, x: Tensor, *, reverse: bool) -> list[Tensor]:
    model = copy.deepcopy(model)
    if reverse:
        with revhooks.reversible():
            model(x).square().mean().backward()
    else:
        model(x).square().mean().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_evaluations(case: Case) -> None:
    """Two a branch; one for what is kept: the newest block, of a long chain its newest step."""
    x = torch.randn(case.shape, dtype=torch.float64)
    model = chain(case, 4).double()
    rev = compare(model, x)
    branches = len(calls(model)) // 4
    kept = branches if branches <= 2 else 1
    assert rev.calls == [2] * (4 * branches - kept) + [1] * kept
    assert rev.stats is not None
    assert rev.stats.second_evaluations == 0


@pytest.mark.usefixtures("large_batches_only")
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_memory_does_not_grow_with_depth(case: Case) -> None:
    x = torch.randn(case.shape, dtype=torch.float64)
    held = [step(chain(case, depth).double(), x, reverse=True).held_after_forward for depth in (3, 9)]
    inputs = 6 * x.nbytes if case.name == "autoregressive" else 0  # of each of the other blocks, which is replayed from it
    assert held[1] - held[0] == inputs


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_user_objects_are_left_alone(case: Case) -> None:
    model = chain(case, 2).double()
    x = torch.randn(case.shape, dtype=torch.float64)
    keys, names, types = list(model.state_dict()), [n for n, _ in model.named_modules()], [type(m) for m in model.modules()]
    with revhooks.reversible():
        loss = model(x).square().mean()
        copied = pickle.loads(pickle.dumps(copy.deepcopy(model.eval())))
        model.train()
        loss.backward()
    assert list(model.state_dict()) == keys == list(copied.state_dict())
    assert [n for n, _ in model.named_modules()] == names
    assert [type(m) for m in model.modules()] == types
    assert all("forward" not in vars(m) for m in model.modules())
    assert torch.equal(copied(x), model.eval()(x))


# of two streams in and out: their law suite is tests/test_nn_momentum.py
ELSEWHERE = (rnn.MomentumResidual, rnn.ExactMomentumResidual)


def test_every_registered_op_is_covered() -> None:
    """A new registered class of the package has to appear among the cases."""
    own = [cls for cls in registered() if cls.__module__.startswith("revhooks.") and cls not in ELSEWHERE]
    own = [cls for cls in own if not cls.__module__.startswith("revhooks.adapters.")]  # which have tests of their own
    covered = [type(module) for case in CASES for module in case.make().modules()]
    assert all(any(issubclass(made, cls) for made in covered) for cls in own)


def test_sequential_is_a_chain_of_couplings() -> None:
    fns = [mlp(4) for _ in range(6)]
    sequence = rnn.ReversibleSequential(*fns, dim=-1)
    couplings = nn.Sequential(*[rnn.AdditiveCoupling(f, g, dim=-1) for f, g in zip(fns[::2], fns[1::2], strict=True)])
    x = torch.randn(3, 8)
    assert torch.equal(sequence(x), couplings(x))
    assert next(iter(sequence.state_dict())).startswith("0.net")
    assert sequence[-1] is fns[5]
    assert list(sequence) == fns


class Masked(nn.Module):
    """A branch with a mask and a conditioning tensor."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor, *, condition: Tensor, scale: float = 1.0, extra: Any = None) -> Tensor:
        assert extra == {"key": [1, 2]}
        return torch.tanh(self.linear(x) * mask + condition) * scale


@pytest.mark.parametrize("coupling", ["additive", "sequential"])
def test_extra_arguments(coupling: str) -> None:
    make = {
        "additive": lambda: rnn.AdditiveCoupling(Masked(4), Masked(4), dim=-1),
        "sequential": lambda: rnn.ReversibleSequential(*[Masked(4) for _ in range(4)], dim=-1),
    }[coupling]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(make() for _ in range(4))
            self.embed = nn.Linear(4, 4)

        def forward(self, x: Tensor, mask: Tensor, condition: Tensor) -> Tensor:
            condition = self.embed(condition)
            for block in self.blocks:
                x = block(x, mask, condition=condition, scale=0.5, extra={"key": [1, 2]})
            return x

    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    mask = (torch.rand(3, 4) > 0.5).double()
    condition = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    rev = compare(Net().double(), x, mask, condition)
    assert rev.stats is not None
    assert rev.stats.inversions > 0


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("cls", [rnn.AdditiveCoupling, rnn.AffineCoupling])
def test_one_branch_and_alternating_splits(cls: type[nn.Module], swap: bool) -> None:
    """NICE and Real NVP: a layer changes one stream, the next one the other."""
    wide = 2 if cls is rnn.AffineCoupling else 1

    def layer(swap: bool) -> nn.Module:
        sizes = (3, 5)
        target, source = (sizes[1], sizes[0]) if swap else sizes
        return cls(nn.Sequential(nn.Linear(source, wide * target), nn.Tanh()), dim=-1, sizes=sizes, swap=swap)

    chain = nn.Sequential(*[layer(swap ^ bool(i % 2)) for i in range(8)]).double()
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    one = chain[0]
    assert torch.allclose(one.inverse(one(x)), x, atol=1e-12)
    kept = slice(None, 3) if swap else slice(3, None)
    assert torch.equal(one(x)[:, kept], x[:, kept])
    _, ladj = one.call_and_ladj(x)
    jacobian = torch.autograd.functional.jacobian(one, x[0])
    assert torch.allclose(ladj[0], torch.linalg.slogdet(jacobian)[1], atol=1e-12)
    out = compare(chain, x)
    assert out.stats is not None
    assert out.stats.inversions == 7
    both = nn.Sequential(*[cls(nn.Linear(4, 4 * wide), nn.Linear(4, 4 * wide), dim=-1, swap=swap) for _ in range(5)]).double()
    compare(both, x)


def test_a_law_for_each_branch() -> None:
    scaled = Law(lambda x, u: 2 * x + u, lambda y, u: (y - u) / 2, saves=True)
    fns = [nn.Linear(4, 4), nn.Linear(4, 8), nn.Linear(4, 4), nn.Linear(4, 4)]
    chain = rnn.ReversibleSequential(*fns, dim=-1, coupling=["additive", "affine", scaled, ADDITIVE]).double()
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(chain.inverse(chain(x)), x, atol=1e-12)
    compare(chain, x)
    with pytest.raises(ShapeError, match="as many of them as branches"):
        rnn.ReversibleSequential(*fns, coupling=["additive"])
