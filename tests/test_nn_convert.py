"""Ordinary residual stacks turned reversible: shared parameters, gradients, evaluations, memory."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import revhooks
from revhooks.errors import RegistrationError, ShapeError
from revhooks.nn import MomentumSequential, RevNetStack, WithoutSkip, to_momentum, to_revnet
from tests.conftest import Count, compare, conv_branch, mlp, step


class Residual(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fn(x)


class Down(nn.Module):
    """A block with a stride and a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1), nn.BatchNorm2d(2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


def encoder_layer(norm_first: bool, dropout: float = 0.1) -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout, batch_first=True, norm_first=norm_first)


class Case(NamedTuple):
    """A residual block by name, its maker, and the shape that it takes."""

    name: str
    block: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def stack(self, depth: int) -> nn.Sequential:
        return nn.Sequential(*[Count(self.block()) for _ in range(depth)])


CASES = [
    Case("mlp", lambda: Residual(mlp(8)), (3, 7, 8)),
    Case("conv", lambda: Residual(conv_branch(4)), (2, 4, 5, 5)),
    Case("post-activation", lambda: nn.Sequential(Residual(nn.Conv2d(4, 4, 3, padding=1)), nn.ReLU()), (2, 4, 5, 5)),
    Case("post-LN transformer", lambda: encoder_layer(False), (3, 5, 8)),
    Case("pre-LN transformer", lambda: encoder_layer(True), (3, 5, 8)),
]
CONVERT: dict[str, Callable[..., nn.Module]] = {
    "momentum": to_momentum,
    "exact momentum": lambda blocks, **options: to_momentum(blocks, exact=True, **options),
    "revnet": to_revnet,
    "revnet mean": lambda blocks, **options: to_revnet(blocks, merge="mean", **options),
}
cases = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
kinds = pytest.mark.parametrize("kind", CONVERT)


# -- under reversible()


@cases
@kinds
def test_gradients_and_evaluations(case: Case, kind: str, no_gc: None) -> None:
    """Two evaluations a block, one for the newest."""
    model = CONVERT[kind](case.stack(6)).double()
    x = torch.randn(case.shape, dtype=torch.float64, requires_grad=True)
    rev = compare(model, x, tol=0.0 if kind == "exact momentum" else 1e-10, guard="raise")
    outer = [m for m in model.modules() if isinstance(m, WithoutSkip)]
    counts = {id(m): n for m, n in zip((m for m in model.modules() if isinstance(m, Count)), rev.calls, strict=True)}
    assert [counts[id(f.block)] for f in outer] == [2] * 5 + [1]
    assert rev.stats is not None
    assert rev.stats.second_evaluations == 0


@pytest.mark.usefixtures("large_batches_only")
@cases
@kinds
def test_memory_does_not_grow_with_depth(case: Case, kind: str) -> None:
    x = torch.randn(case.shape, dtype=torch.float64)
    held = [step(CONVERT[kind](case.stack(depth)).double(), x, reverse=True).held_after_forward for depth in (4, 12)]
    assert held[0] == held[1]


@kinds
@pytest.mark.parametrize("norm_first", [False, True])
def test_transformers_with_masks(kind: str, norm_first: bool) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = CONVERT[kind](nn.ModuleList(encoder_layer(norm_first) for _ in range(5)))
            self.norm = nn.LayerNorm(8)

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
            return self.norm(self.layers(x, causal, src_key_padding_mask=padding, is_causal=True))

    padding = torch.zeros(3, 5, dtype=torch.float64)
    padding[1, 3:] = -torch.inf
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    rev = compare(Encoder().double(), x, padding, guard="raise")
    assert rev.stats is not None
    assert rev.stats.inversions >= 1
    assert not rev.stats.replays or "revnet" not in kind


@pytest.mark.usefixtures("large_batches_only")
@kinds
def test_plain_layers_between(kind: str) -> None:
    def make(depth: int) -> nn.Module:
        blocks = [*[Residual(conv_branch(4)) for _ in range(depth)], Down(4), *[Residual(conv_branch(8)) for _ in range(depth)]]
        return CONVERT[kind](blocks, plain=Down)

    x = torch.randn(2, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    compare(make(4).double(), x)
    held = [step(make(depth).double(), x, reverse=True).held_after_forward for depth in (3, 8)]
    assert held[0] == held[1]


# -- what it computes


@cases
@kinds
def test_parameters_are_shared(case: Case, kind: str) -> None:
    stack = case.stack(3)
    converted = CONVERT[kind](stack)
    assert [id(p) for p in stack.parameters()] == [id(p) for p in converted.parameters()]
    assert [id(b) for b in stack.buffers()] == [id(b) for b in converted.buffers()]


@cases
def test_without_momentum_it_is_the_stack(case: Case) -> None:
    stack = case.stack(4).double().eval()
    x = torch.randn(case.shape, dtype=torch.float64)
    errors = [(to_momentum(stack, gamma)(x) - stack(x)).abs().max() for gamma in (1e-3, 1e-6)]
    assert errors[1] < 1e-4
    assert 500 < errors[0] / errors[1] < 2000


@cases
def test_a_revnet_of_two_blocks_is_the_stack(case: Case) -> None:
    stack = case.stack(2).double().eval()
    x = torch.randn(case.shape, dtype=torch.float64)
    assert torch.allclose(to_revnet(stack)(x), stack(x), rtol=1e-10, atol=1e-10)


def test_a_revnet_agrees_to_first_order() -> None:
    class Small(nn.Module):
        def __init__(self, size: float) -> None:
            super().__init__()
            self.size = size

        def forward(self, x: Tensor) -> Tensor:
            return x + self.size * torch.sin(3 * x)

    x = torch.randn(20, dtype=torch.float64)
    sums, means = (
        [
            float((to_revnet(stack, merge=merge)(x) - stack(x)).norm())
            for stack in (nn.Sequential(*[Small(size) for _ in range(6)]) for size in (1e-3, 1e-4))
        ]
        for merge in ("sum", "mean")
    )
    assert 50 < sums[0] / sums[1] < 200
    assert 5 < means[0] / means[1] < 20


@kinds
def test_the_residual_itself(kind: str) -> None:
    """Taken from the block or by subtraction, it is the same; taken from it nothing is subtracted."""
    stack = nn.Sequential(*[Residual(mlp(8)) for _ in range(5)]).double()
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    own = CONVERT[kind](stack, residual=attrgetter("fn"))
    assert torch.allclose(own(x), CONVERT[kind](stack)(x), atol=1e-6 if "exact" in kind else 1e-12)
    assert not any(isinstance(m, WithoutSkip) for m in own.modules())
    compare(own, x, guard="raise")


def test_plain_layers_compute_what_they_did() -> None:
    blocks = nn.Sequential(nn.Linear(4, 8), Residual(mlp(8)), nn.Linear(8, 2)).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    for convert in (to_momentum, to_revnet):
        converted = convert(blocks, plain=lambda block: isinstance(block, nn.Linear))
        if convert is to_revnet:
            assert torch.allclose(converted(x), blocks(x))
        else:
            hidden = blocks[0](x)
            assert torch.allclose(converted(x), blocks[2](hidden + (1 - 0.9) * blocks[1].fn(hidden)))


def test_only_plain_layers_or_none() -> None:
    x = torch.randn(3, 4)
    layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    for convert in CONVERT.values():
        assert torch.equal(convert(layers, plain=nn.Module)(x), layers(x))
        assert torch.equal(convert([])(x), x)


# -- state dicts


@cases
@kinds
@pytest.mark.parametrize("residual", [None, attrgetter("net")])
def test_the_state_dict_of_the_stack_loads(case: Case, kind: str, residual: Any) -> None:
    given, other = case.stack(3), case.stack(3)
    other.insert(1, nn.BatchNorm1d(3))
    given.insert(1, nn.BatchNorm1d(3))
    nn.init.normal_(given[1].weight)
    converted = CONVERT[kind](other, residual=residual, plain=nn.BatchNorm1d)
    converted.load_state_dict(given.state_dict())
    for a, b in zip(given.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    again = CONVERT[kind](copy.deepcopy(given), residual=residual, plain=nn.BatchNorm1d)
    again.load_state_dict(converted.state_dict())  # its own keys too


@kinds
def test_copies(kind: str) -> None:
    converted = CONVERT[kind]([Residual(nn.Linear(4, 4)) for _ in range(3)])
    x = torch.randn(2, 4)
    with revhooks.reversible():
        loss = converted(x).square().mean()
        copied = pickle.loads(pickle.dumps(copy.deepcopy(converted)))
        loss.backward()
    assert torch.equal(copied(x), converted(x))
    assert all(not set(map(id, copied.parameters())) & {id(p)} for p in converted.parameters())


# -- errors


@kinds
def test_errors(kind: str) -> None:
    convert, x = CONVERT[kind], torch.randn(2, 4, 6, 6)
    with pytest.raises(ShapeError, match=r"residual block Down: .* name a layer that changes the shape in plain="):
        convert([Residual(conv_branch(4)), Down(4)])(x)
    with pytest.raises(ShapeError, match="tensor of the shape"):
        convert([nn.Sequential(nn.Flatten(), nn.Linear(144, 1))])(x)
    with pytest.raises(ShapeError, match="got tuple"):
        convert([nn.GRU(4, 4)])(torch.randn(2, 3, 4))
    with pytest.raises(RegistrationError, match="residual block: expected a module, got function"):
        convert([lambda x: x])
    with pytest.raises(RegistrationError, match="module"):
        convert([nn.Identity()], residual=lambda block: torch.relu)


def test_more_errors() -> None:
    with pytest.raises(ShapeError, match="'sum' or 'mean'"):
        to_revnet([nn.Identity()], merge="cat")
    with pytest.raises(ShapeError, match="gamma between 0 and 1"):
        to_momentum([nn.Identity()], 0)
    assert isinstance(to_momentum([]), MomentumSequential)
    assert isinstance(to_revnet([]), RevNetStack)
