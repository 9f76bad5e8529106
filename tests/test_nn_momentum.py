"""Momentum chains: the step and its inverse, gradients, evaluations, memory; exact chains to the bit."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import revhooks
from revhooks.errors import FallbackWarning, InversionError, RegistrationError, ShapeError
from revhooks.nn import ExactMomentumResidual, MomentumResidual, MomentumSequential, MomentumState
from revhooks.nn.exact import Grid, grow, on_grid, ratio_of, shrink, store_plan
from tests.conftest import Count, calls, compare, conv_branch, mlp, step
from tests.devices import DEVICE


def rectified(width: int) -> nn.Module:
    """Most of its outputs are exact zeros, and so are the velocities at first; one unit is dead."""
    net = nn.Sequential(nn.Linear(width, width), nn.ReLU())
    with torch.no_grad():
        net[0].weight[0] = 0
        net[0].bias[0] = -1
    return Count(net)


def dropped(width: int) -> nn.Module:
    return Count(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Dropout(0.3)))


class Case(NamedTuple):
    """A chain by name, its branch, the shape that it takes, and options."""

    name: str
    branch: Callable[[], nn.Module]
    shape: tuple[int, ...]
    options: dict[str, Any] = {}

    def chain(self, depth: int, **more: Any) -> MomentumSequential:
        return MomentumSequential(*[self.branch() for _ in range(depth)], **{**self.options, **more})


CASES = [
    Case("mlp", lambda: mlp(8), (3, 7, 8)),
    Case("conv with BatchNorm", lambda: conv_branch(4), (2, 4, 5, 5)),
    Case("ends in a ReLU", lambda: rectified(8), (16, 8)),
    Case("dropout", lambda: dropped(8), (16, 8)),
    Case("gamma 1/2", lambda: mlp(8), (3, 8), {"gamma": 0.5}),
    Case("exact", lambda: mlp(8), (16, 8), {"exact": True}),
    Case("exact conv", lambda: conv_branch(4), (2, 4, 5, 5), {"exact": True, "gamma": Fraction(7, 8)}),
    Case("exact, ends in a ReLU", lambda: rectified(8), (16, 8), {"exact": True}),
    Case("exact dropout", lambda: dropped(8), (16, 8), {"exact": True}),
]
cases = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
EXACT = [case for case in CASES if case.options.get("exact")]
exact_cases = pytest.mark.parametrize("case", EXACT, ids=[case.name for case in EXACT])


# -- what it computes


def test_the_step_is_that_of_the_paper() -> None:
    fs = [mlp(4) for _ in range(5)]
    x = torch.randn(3, 4)
    state = MomentumSequential(*fs, gamma=0.8).run(MomentumState(x, v := torch.randn(3, 4)))
    for f in fs:
        v = 0.8 * v + (1 - 0.8) * f(x)
        x = x + v
    assert torch.equal(state.x, x)
    assert torch.equal(state.v, v)


def test_it_begins_at_rest_or_as_told() -> None:
    x = torch.randn(3, 4)
    chain = MomentumSequential(mlp(4), init_speed=nn.Linear(4, 4))
    assert torch.equal(MomentumSequential(mlp(4)).start(x).v, torch.zeros(3, 4))
    assert torch.equal(chain.start(x).v, chain.init_speed(x))
    assert "init_speed.weight" in chain.state_dict()


def test_empty() -> None:
    x = torch.randn(2)
    assert torch.equal(MomentumSequential()(x), x)


@cases
def test_inverse(case: Case) -> None:
    chain = case.chain(20).double().eval()
    start = chain.start(torch.randn(case.shape, dtype=torch.float64))
    end = chain.run(start)
    back = chain.inverse(end)
    assert torch.allclose(back.x, start.x, rtol=0, atol=1e-10)
    assert torch.allclose(back.v, start.v, rtol=0, atol=1e-10)
    assert back.bits == ()
    assert torch.equal(chain(start.x), end.x)


def test_drift_is_as_documented() -> None:
    """gamma 0.9: float32 is good for 50 steps and useless after 200; float64 is not."""
    errors = []
    for steps, dtype in ((50, torch.float32), (200, torch.float32), (200, torch.float64)):
        torch.manual_seed(0)
        chain = MomentumSequential(*[nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(steps)]).to(dtype)
        x = torch.randn(32, 16, dtype=dtype)
        with torch.no_grad():
            errors.append(float((chain.inverse(chain.run(chain.start(x))).x - x).norm() / x.norm()))
    assert errors[0] < 1e-3
    assert errors[1] > 10
    assert errors[2] < 1e-4


# -- under reversible()


@cases
@pytest.mark.parametrize("grad", [False, True])
def test_gradients_float64(case: Case, grad: bool, no_gc: None) -> None:
    x = torch.randn(case.shape, dtype=torch.float64, requires_grad=grad)
    rev = compare(case.chain(6).double(), x, guard="raise")
    assert rev.stats is not None
    assert rev.stats.inversions == 4  # the first step is run again from the input, the newest is kept


@cases
def test_gradients_behind_ordinary_layers(case: Case) -> None:
    """Also with a chain after a chain."""
    ordinary = nn.Conv2d(4, 4, 1) if len(case.shape) == 4 else nn.Linear(8, 8)
    model = nn.Sequential(ordinary, nn.ReLU(), case.chain(3), case.chain(3), nn.Tanh())
    compare(model.double(), torch.randn(case.shape, dtype=torch.float64, requires_grad=True))


@cases
def test_evaluations(case: Case) -> None:
    """Two a branch, and one for the newest."""
    rev = compare(case.chain(8).double(), torch.randn(case.shape, dtype=torch.float64))
    assert rev.calls == [2] * 7 + [1]
    assert rev.stats is not None
    assert rev.stats.second_evaluations == 0


@pytest.mark.usefixtures("large_batches_only")
@cases
def test_memory_does_not_grow_with_depth(case: Case) -> None:
    x = torch.randn(case.shape, dtype=torch.float64)
    held = [step(case.chain(depth, hold_every=100).double(), x, reverse=True).held_after_forward for depth in (4, 20)]
    assert held[0] == held[1]


@cases
def test_two_forwards_before_one_backward(case: Case) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chain = case.chain(5)

        def forward(self, x: Tensor) -> Tensor:
            return self.chain(x) * self.chain(2 * x)

    compare(Twice().double(), torch.randn(case.shape, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("exact", [False, True])
def test_one_branch_many_times(exact: bool) -> None:
    f = mlp(8)
    rev = compare(MomentumSequential(*[f] * 7, exact=exact).double(), torch.randn(5, 8, dtype=torch.float64))
    assert rev.calls == [13]


@pytest.mark.parametrize("exact", [False, True])
def test_a_learned_first_velocity(exact: bool) -> None:
    chain = MomentumSequential(*[mlp(8) for _ in range(6)], init_speed=nn.Linear(8, 8), exact=exact)
    compare(chain.double(), torch.randn(5, 8, dtype=torch.float64, requires_grad=True), guard="raise")


@pytest.mark.parametrize("exact", [False, True])
def test_the_velocity_as_an_output(exact: bool) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chain = MomentumSequential(*[mlp(8) for _ in range(6)], exact=exact)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            state = self.chain.run(self.chain.start(x))
            return state.x, state.v * state.v

    compare(Both().double(), torch.randn(5, 8, dtype=torch.float64, requires_grad=True), guard="raise")


class Conditioned(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor, *, condition: Tensor, scale: float = 1.0) -> Tensor:
        return torch.tanh(self.linear(x) * mask + condition) * scale


@pytest.mark.parametrize("exact", [False, True])
def test_extra_arguments(exact: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(8, 8)
            self.chain = MomentumSequential(*[Conditioned(8) for _ in range(6)], exact=exact)

        def forward(self, x: Tensor, mask: Tensor, condition: Tensor) -> Tensor:
            return self.chain(x, mask, condition=self.embed(condition), scale=0.5)

    x, condition = (torch.randn(5, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    compare(Net().double(), x, (torch.rand(5, 8) > 0.5).double(), condition, guard="raise")


def test_autograd_grad_retain_graph_and_double_backward() -> None:
    chain = MomentumSequential(*[mlp(4) for _ in range(4)]).double()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def penalty() -> list[Tensor]:
        y = chain(x).square().sum()
        (grad,) = torch.autograd.grad(y, x, create_graph=True)
        return [*torch.autograd.grad(grad.square().sum(), [*chain.parameters()], retain_graph=True), grad]

    plain = penalty()
    with revhooks.reversible():
        rev = penalty()
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-11) for a, b in zip(plain, rev, strict=True))


@pytest.mark.parametrize("exact", [False, True])
def test_torch_func(exact: bool) -> None:
    chain = MomentumSequential(*[mlp(4) for _ in range(4)], exact=exact)
    x = torch.randn(3, 4, requires_grad=True)
    (expected,) = torch.autograd.grad(chain(x).sum(), x)
    assert torch.equal(torch.func.grad(lambda x: chain(x).sum())(x), expected)


# -- deep chains


def relative_errors(plain: list[Tensor | None], rev: list[Tensor | None]) -> float:
    return max(float((a - b).norm() / a.norm()) for a, b in zip(plain, rev, strict=True) if a is not None and b is not None)


@pytest.mark.parametrize(
    ("gamma", "dtype", "tol", "holds"),
    [(0.9, torch.float32, 1e-4, 3), (0.5, torch.float32, 1e-4, 23), (0.9, torch.float64, 1e-9, 1)],
)
def test_deep_chains_are_held_now_and_then(gamma: float, dtype: torch.dtype, tol: float, holds: int) -> None:
    """120 steps would lose every digit; both streams, held every so many steps, keep the error small."""
    x = torch.randn(64, 16, dtype=dtype)
    chain = MomentumSequential(*[mlp(16) for _ in range(120)], gamma=gamma).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain, rev = (step(chain, x, reverse=reverse) for reverse in (False, True))
    assert relative_errors(plain.grads, rev.grads) < tol
    assert rev.calls == [2] * 119 + [1]
    shallow = step(MomentumSequential(*[s.f for s in chain][:4], gamma=gamma), x, reverse=True)
    assert rev.held_after_forward - shallow.held_after_forward == holds * 2 * x.nbytes
    assert rev.stats is not None
    assert rev.stats.held_bytes == 0


def test_drift_never_gives_a_wrong_gradient_in_silence() -> None:
    """Without holds: a step raises, or warns, or is right; the one after an error is right."""
    chain = MomentumSequential(*[mlp(16) for _ in range(150)], hold_every=1000)
    x = torch.randn(64, 16)
    chain(x).square().mean().backward()
    expected = [p.grad for p in chain.parameters()]
    said, right = [], []
    for _ in range(3):
        chain.zero_grad()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                with revhooks.reversible():
                    chain(x).square().mean().backward()
            except InversionError as error:
                said.append(str(error))
                continue
        said.extend(str(w.message) for w in caught if issubclass(w.category, FallbackWarning))
        error = relative_errors(expected, [p.grad for p in chain.parameters()])
        assert error < 0.02  # within the guard's bounds (1e-3 a step) also where it only warned
        right.append(error)
    assert any("MomentumResidual" in text for text in said)
    assert len(right) >= 2
    assert right[-1] < 5e-3


# -- exact chains


@pytest.mark.parametrize("gamma", [0.9, Fraction(1, 2), 0.99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_200_steps_are_inverted_to_the_bit(gamma: float | Fraction, dtype: torch.dtype) -> None:
    chain = MomentumSequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(200)], gamma=gamma, exact=True)
    chain.to(dtype)
    with torch.no_grad():
        start = chain.start(torch.randn(64, 8, dtype=dtype))
        end = chain.run(start)
        back = chain.inverse(end)
    assert torch.equal(back.x, start.x)
    assert torch.equal(back.v, start.v)
    assert len(end.bits) == (4 if gamma == Fraction(1, 2) else 1)


@exact_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_to_the_bit(case: Case, dtype: torch.dtype) -> None:
    x = torch.randn(case.shape, dtype=dtype, requires_grad=True)
    rev = compare(case.chain(12).to(dtype), x, tol=0.0, guard="raise")
    assert rev.stats is not None
    assert rev.stats.worst_error == 0


def test_gradients_to_the_bit_after_200_steps() -> None:
    """One more evaluation a branch, and nothing more held than in a short chain but the bytes of the store."""
    x = torch.randn(64, 8)
    rev = compare(MomentumSequential(*[mlp(8) for _ in range(200)], exact=True), x, tol=0.0, guard="raise")
    assert rev.calls == [2] * 199 + [1]
    shallow = step(MomentumSequential(*[mlp(8) for _ in range(4)], exact=True), x, reverse=True)
    growth = store_plan(200, Fraction(9, 10))[1].itemsize - store_plan(4, Fraction(9, 10))[1].itemsize
    # the store before and after the newest step, whose inputs are held as long as it is kept, and one zero
    assert rev.held_after_forward - shallow.held_after_forward == growth * (2 * x.numel() + 1)


def test_gradients_to_the_bit_in_several_words() -> None:
    chain = MomentumSequential(*[mlp(8) for _ in range(70)], gamma=0.5, exact=True)
    x = torch.randn(16, 8)
    rev = compare(chain, x, tol=0.0, guard="raise")
    assert rev.calls == [2] * 69 + [1]
    assert len(chain.run(chain.start(x)).bits) == 2


def test_gradients_to_the_bit_with_branches_under_autocast() -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chain = MomentumSequential(*[mlp(8) for _ in range(20)], exact=True)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast(DEVICE.type, torch.bfloat16):
                return self.chain(x)

    compare(Cast(), torch.randn(16, 8, requires_grad=True), tol=0.0, guard="raise")


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 12), (torch.float64, 32)])
def test_the_grid_changes_little(dtype: torch.dtype, bits: int) -> None:
    chain = MomentumSequential(*[mlp(8) for _ in range(30)]).to(dtype)
    exact = MomentumSequential(*[s.f for s in chain], exact=True)
    x = torch.randn(64, 8, dtype=dtype)
    difference = (exact(x) - chain(x)).detach().abs()
    assert difference.mean() < 10 * 2.0**-bits
    assert difference.max() < 100 * 2.0**-bits


def test_the_gradient_is_that_of_the_step_without_a_grid() -> None:
    linear = nn.Linear(4, 4, dtype=torch.float64)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    grads = []
    for exact in (False, True):
        (grad,) = torch.autograd.grad(MomentumSequential(*[linear] * 5, exact=exact)(x).sum(), x)
        grads.append(grad)
    assert torch.allclose(*grads, rtol=1e-12)


def test_rounding_leaves_no_negative_zeros_and_the_gradient() -> None:
    x = torch.tensor([-0.1, 0.3, torch.nan], requires_grad=True)
    rounded = on_grid(x, 1)
    assert rounded[:2].tolist() == [0.0, 0.5]
    assert not rounded[0].signbit()
    assert rounded[2].isnan()
    (3 * rounded).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 3.0))


RATIOS = [Fraction(1, 2), Fraction(2, 3), Fraction(9, 10), Fraction(63, 64)]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(-(2**40), 2**40), min_size=1, max_size=5),
    st.sampled_from(RATIOS),
    st.lists(st.integers(-99, 99), max_size=40),
)
def test_shrink_and_grow(values: list[int], ratio: Fraction, pushes: list[int]) -> None:
    _, dtype = store_plan(len(pushes), ratio)
    value, store = torch.tensor(values, dtype=torch.float64), torch.zeros(len(values), dtype=dtype)
    for push in pushes:
        before = value.clone()
        value, store = shrink(value, store, ratio)
        assert (value - before * float(ratio)).abs().max() <= ratio.numerator
        value = value + push
    for push in reversed(pushes):
        value, store = grow(value - push, store, ratio)
    assert value.tolist() == values
    assert not store.any()


@pytest.mark.parametrize("ratio", RATIOS, ids=str)
def test_the_store_holds_the_worst(ratio: Fraction) -> None:
    """Remainders as large as can be, step by step, in integers of Python that never overflow."""
    n, d = ratio.numerator, ratio.denominator
    worst = 0
    for steps in range(1, store_plan(10**6, ratio)[0] + 1):
        assert worst * d + d - 1 < 2**53  # whole numbers of float64
        before, worst = worst, (worst * d + d - 1) // n
        assert before < worst
        if steps % 7 == 1:  # enough to meet every dtype
            assert store_plan(steps, ratio)[1] is next(t for t in STORES if worst <= torch.iinfo(t).max)


STORES = [torch.int8, torch.int16, torch.int32, torch.int64]


def test_bits_a_step() -> None:
    """log2(10/9) = 0.152 bits a step."""
    taken, dtype = store_plan(10**6, Fraction(9, 10))
    assert dtype is torch.int64
    assert 53 / taken < 0.18


# -- errors


@pytest.mark.parametrize("gamma", [0, 1, -0.5, 2])
@pytest.mark.parametrize("exact", [False, True])
def test_gamma_must_be_between(gamma: float, exact: bool) -> None:
    with pytest.raises(ShapeError, match="gamma between 0 and 1"):
        MomentumSequential(nn.Identity(), gamma=gamma, exact=exact)


def test_an_exact_gamma_is_a_fraction() -> None:
    assert ratio_of(0.95) == Fraction(19, 20)
    with pytest.raises(ShapeError, match="denominator up to 256"):
        MomentumSequential(nn.Identity(), gamma=0.912345, exact=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_exact_chain_needs_digits(dtype: torch.dtype) -> None:
    with pytest.raises(ShapeError, match="float32 or float64"):
        MomentumSequential(nn.Identity(), exact=True)(torch.ones(2, dtype=dtype))


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


@pytest.mark.parametrize(("factor", "step_"), [(1e4, 1), (float("nan"), 1), (float("inf"), 1), (30.0, 4)])
def test_leaving_the_range_of_the_grid_raises(factor: float, step_: int) -> None:
    chain = MomentumSequential(Times(1.0), *[Times(factor)] * 6, exact=True)
    with pytest.raises(InversionError, match=f"step {step_}: expected positions below 4096 and velocities below 256"):
        chain(torch.ones(3))
    assert Grid.of(torch.float32, Fraction(9, 10), 8).x_limit == 2**16


@pytest.mark.parametrize("exact", [False, True])
def test_shape_errors(exact: bool) -> None:
    with pytest.raises(ShapeError, match="shape of the position"):
        MomentumSequential(nn.Linear(4, 1), exact=exact)(torch.ones(2, 4))
    with pytest.raises(ShapeError, match="shape of the position"):
        MomentumSequential(nn.Linear(4, 4), init_speed=nn.Linear(4, 1), exact=exact)(torch.ones(2, 4))
    with pytest.raises(RegistrationError, match="f that is a module"):
        MomentumSequential([nn.Linear(4, 4)], exact=exact)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="hold_every of at least 1"):
        MomentumSequential(nn.Linear(4, 4), hold_every=0)
    with pytest.raises(IndexError):
        MomentumSequential(nn.Linear(4, 4))[1]


def test_a_chain_with_plain_layers_has_no_inverse() -> None:
    chain = MomentumSequential(nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(2, 2), plain=[1])
    assert chain(torch.ones(3, 4)).shape == (3, 2)
    with pytest.raises(InversionError, match="a plain layer Linear"):
        chain.run(chain.start(torch.ones(3, 4)))


# -- the user's objects


@pytest.mark.parametrize("exact", [False, True])
def test_copies_and_state_dicts(exact: bool) -> None:
    chain = MomentumSequential(*[nn.Linear(4, 4) for _ in range(3)], exact=exact)
    x = torch.randn(2, 4)
    with revhooks.reversible():
        loss = chain(x).square().mean()
        copied = pickle.loads(pickle.dumps(copy.deepcopy(chain)))
        loss.backward()
    assert torch.equal(copied(x), chain(x))
    assert list(chain.state_dict()) == [f"{i}.f.{name}" for i in range(3) for name in ("weight", "bias")]
    other = MomentumSequential(*[nn.Linear(4, 4) for _ in range(3)], exact=exact)
    other.load_state_dict(chain.state_dict())
    assert torch.equal(other(x), chain(x))


def test_the_state_dict_of_the_branches_loads() -> None:
    plain = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4)) for _ in range(3)])
    chain = MomentumSequential(*[nn.Sequential(nn.Linear(4, 4)) for _ in range(3)])
    chain.load_state_dict(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), chain.parameters(), strict=True))
    with pytest.raises(RuntimeError, match="Missing key"):
        chain.load_state_dict({"0.0.weight": torch.zeros(4, 4)})


def test_a_branch_that_has_a_child_of_the_same_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.weight = nn.Linear(2, 2, bias=False), nn.Parameter(torch.randn(2, 2))

    given, chain = nn.Sequential(Named()), MomentumSequential(Named())
    chain.load_state_dict(given.state_dict())
    assert torch.equal(chain[0].f.weight, given[0].weight)
    assert torch.equal(chain[0].f.f.weight, given[0].f.weight)


@pytest.mark.parametrize("cls", [MomentumResidual, ExactMomentumResidual])
def test_check(cls: type[MomentumResidual]) -> None:
    x, v = on_grid(torch.randn(2, 5, 8, dtype=torch.float64), 20)
    store = [torch.zeros(5, 8, dtype=torch.int8)] if cls is ExactMomentumResidual else []
    result = revhooks.check(cls(nn.Linear(8, 8)).double(), x, v, *store)
    assert result, str(result)
    assert result.evaluations == {"f": 2}


def test_chains_are_counted_by_their_branches() -> None:
    chain = MomentumSequential(*[mlp(4) for _ in range(3)])
    chain(torch.randn(2, 4))
    assert calls(chain) == [1, 1, 1]
    assert [type(s) for s in chain] == [MomentumResidual] * 3
    assert "gamma=0.9, exact=False" in repr(chain)


@pytest.mark.parametrize("branch", [lambda: nn.ReLU(inplace=True), lambda: nn.Dropout(0.2, inplace=True)])
def test_a_branch_that_writes_into_the_position(branch: Callable[[], nn.Module]) -> None:
    """Nothing can invert that; the block is kept, and the one before it, whose output it was."""
    net = nn.Sequential(
        revhooks.nn.AdditiveCoupling(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)),
        MomentumSequential(nn.Conv2d(8, 8, 1), nn.Sequential(branch(), nn.Conv2d(8, 8, 1)), nn.Conv2d(8, 8, 1), gamma=0.9),
    )
    compare(net.double(), torch.randn(2, 8, 4, 4, dtype=torch.float64))
