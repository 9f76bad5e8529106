"""Bad input gets a clear error, and leaves everything as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import revhooks
from revhooks import errors
from revhooks import nn as rnn
from revhooks.errors import RegistrationError, ReplayError, ShapeError
from revhooks.functional import affine_law
from tests.conftest import Counts


def linear(a: int, b: int) -> nn.Module:
    return nn.Linear(a, b)


CASES = {
    "odd width": (lambda: rnn.AdditiveCoupling(linear(3, 3), linear(3, 3), dim=-1), torch.zeros(2, 7), "even size along dim -1"),
    "sizes do not add up": (
        lambda: rnn.AdditiveCoupling(linear(3, 3), linear(3, 3), dim=-1, sizes=(3, 3)),
        torch.zeros(2, 7),
        "6 = 3",
    ),
    "no such dim": (lambda: rnn.AdditiveCoupling(linear(3, 3), linear(3, 3), dim=4), torch.zeros(2, 6), "has dim 4"),
    "no tensor": (lambda: rnn.AdditiveCoupling(linear(3, 3), linear(3, 3)), [1, 2], "a tensor, got list"),
    "branch too wide": (
        lambda: rnn.AdditiveCoupling(linear(3, 4), linear(3, 3), dim=-1),
        torch.zeros(2, 6),
        r"shape \(2, 3\), got shape \(2, 4\)",
    ),
    "branch broadcasts up": (
        lambda: rnn.AdditiveCoupling(nn.Unflatten(-1, (1, 3)), linear(3, 3), dim=-1),
        torch.zeros(2, 6),
        "fits the stream",
    ),
    "affine branch too narrow": (
        lambda: rnn.AffineCoupling(linear(2, 2), linear(2, 2), dim=-1),
        torch.zeros(3, 4),
        "size 4 along dim -1",
    ),
    "affine branch odd": (
        lambda: rnn.AffineCoupling(linear(2, 3), linear(2, 3), dim=-1),
        torch.zeros(3, 4),
        "size 4 along dim -1",
    ),
    "branch gives a tuple": (
        lambda: rnn.AdditiveCoupling(nn.LSTM(3, 3), linear(3, 3), dim=-1),
        torch.zeros(2, 2, 6),
        "one tensor",
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("reverse", [False, True])
def test_shapes(case: str, reverse: bool) -> None:
    make, x, message = CASES[case]
    block = make()
    call = revhooks.reversible()(block) if reverse else block
    with pytest.raises(ShapeError, match=message) as caught:
        call(x)
    assert "Remedy" in str(caught.value)


def test_options_of_layers() -> None:
    with pytest.raises(ShapeError, match="two positive integers"):
        rnn.AdditiveCoupling(linear(1, 1), linear(1, 1), sizes=(0, 2))
    with pytest.raises(ShapeError, match="one of 'exp', 'sigmoid', 'tanh'"):
        rnn.AffineCoupling(linear(1, 2), linear(1, 2), scale="none")
    with pytest.raises(ShapeError, match="one of"):
        affine_law("none")
    with pytest.raises(ShapeError, match="'additive', 'affine'"):
        rnn.ReversibleSequential(linear(1, 1), coupling="none")
    with pytest.raises(RegistrationError, match="branches that are modules"):
        rnn.ReversibleSequential([linear(1, 1)])  # type: ignore[arg-type]
    with pytest.raises(IndexError):
        rnn.ReversibleSequential(linear(1, 1))[1]


class Unsteady(Counts, nn.Module):
    """Saves something else in every call."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.calls = 0
        self.linear, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        again = self.calls > 1
        if self.how == "more" and again:
            x = x.exp().sin()
        if self.how == "fewer" and not again:
            x = x.exp().sin()
        if self.how == "shape" and again:
            return self.linear(torch.cat([x, x]))[: len(x)]
        if self.how == "parameter" and again:
            return self.other(x)
        return self.linear(x)


@pytest.mark.parametrize(
    ("how", "message"),
    [("more", "saved tensors|shape"), ("fewer", "saved tensors|same"), ("shape", "shape"), ("parameter", "same parameter")],
)
def test_a_replay_that_differs(how: str, message: str) -> None:
    model = nn.Sequential(*[rnn.AdditiveCoupling(Unsteady(how), Unsteady("no"), dim=-1) for _ in range(3)])
    with revhooks.reversible():
        loss = model(torch.randn(2, 8)).square().mean()
    with pytest.raises(ReplayError, match=message) as caught:
        loss.backward()
    assert "AdditiveCoupling" in str(caught.value)
    assert "slot" in str(caught.value)


def test_one_tree() -> None:
    kinds = [getattr(errors, name) for name in errors.__all__ if name.endswith("Error")]
    assert all(issubclass(kind, errors.RevhooksError) for kind in kinds)
    assert issubclass(errors.ModifiedError, RuntimeError)
    assert issubclass(errors.ShapeError, ValueError)
