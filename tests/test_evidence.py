"""What shows that a tensor is what it was sees every change of values and of their order (Rule 19)."""

from __future__ import annotations

import contextlib
import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import revhooks
from revhooks.errors import InversionError, ModifiedError, ReplayError
from revhooks.fingerprint import _weigh_words, fingerprint
from revhooks.nn import AdditiveCoupling, AffineCoupling, ReversibleSequential
from revhooks.runtime.recompute import recipe

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.int64, torch.int32, torch.uint8]


def by_words(x: Tensor) -> Tensor:
    """As on an accelerator."""
    return _weigh_words((torch.view_as_real(x) if x.is_complex() else x).reshape(-1).view(torch.int8))


FINGERPRINTS = {"rows": fingerprint, "words": by_words}


def numbers(dtype: torch.dtype, size: int) -> Tensor:
    x = torch.randn(size, dtype=torch.float64, generator=torch.Generator("cpu").manual_seed(0), device="cpu") * 50
    return (x.abs() if dtype is torch.uint8 else x).to(dtype)


@pytest.mark.parametrize("name", FINGERPRINTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 3, 300, 5000])
def test_every_element_counts(name: str, dtype: torch.dtype, size: int) -> None:
    x = numbers(dtype, size)
    before = FINGERPRINTS[name](x)
    assert torch.equal(FINGERPRINTS[name](x.clone()), before)
    for place in {0, size // 2, size - 1}:
        changed = x.clone()
        changed[place] += 1
        assert not torch.equal(FINGERPRINTS[name](changed), before)


@pytest.mark.parametrize("name", FINGERPRINTS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool], ids=str)
def test_order_counts(name: str, dtype: torch.dtype) -> None:
    x = numbers(torch.float32, 64 * 64) > 0 if dtype is torch.bool else numbers(dtype, 64 * 64)
    if dtype.is_floating_point:
        x = (x > 0).to(dtype)  # zeros and ones: the hardest to tell, for most of their bits are equal
    before = FINGERPRINTS[name](x)
    square = x.view(64, 64)
    swapped = x.clone()
    swapped[x.to(torch.float64 if not dtype.is_complex else dtype).abs().argmax()] = x[0]
    rows = square.clone()
    rows[[3, 40]] = rows[[40, 3]]
    edits = [x.flip(0), x.roll(1), x.roll(64), square.t().reshape(-1), rows.view(-1), x[torch.randperm(4096, device=x.device)]]
    for edited in edits:
        assert torch.equal(edited, x) or not torch.equal(FINGERPRINTS[name](edited), before)


def test_one_hot_rows_that_change_places() -> None:
    """Each row has the same sums of words, whatever its width is."""
    for width in (64, 256, 1000, 1024):
        x = torch.eye(width)
        assert not torch.equal(fingerprint(x.roll(1, 0)), fingerprint(x))
        assert not torch.equal(fingerprint(x.roll(1, 1)), fingerprint(x))


EDITS = {
    "shuffle": lambda h: h.copy_(h[torch.randperm(len(h))]),
    "flip": lambda h: h.copy_(h.flip(0)),
    "flip columns": lambda h: h.copy_(h.flip(1)),
    "sort": lambda h: h.copy_(h.sort(1).values),
    "roll": lambda h: h.copy_(h.roll(7, 1)),
    "transpose": lambda h: h[:64].copy_(h[:64].t().clone()),
    "two rows": lambda h: h.index_copy_(0, torch.tensor([3, 250]), h[[250, 3]]),
    "one element": lambda h: h[0, 0].add_(1),
}


def rms_norm(h: Tensor) -> Tensor:
    return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)


CHAINS = {
    "batch norm, relu": (nn.BatchNorm1d(64), torch.relu),
    "layer norm, silu": (nn.LayerNorm(64), F.silu),
    "tanh, relu": (torch.tanh, torch.relu),
    "gelu, times two": (F.gelu, lambda h: h * 2.0),
    "mul, relu": (lambda h: h * h.sigmoid(), torch.relu),
    "rms norm, gelu": (rms_norm, F.gelu),
}


def train(context: contextlib.AbstractContextManager[object], chain: str, edit: str, dtype: torch.dtype) -> Tensor:
    """The gradient of the third step, in which a tensor between two operations is edited behind autograd's back."""
    torch.manual_seed(0)
    first, second = CHAINS[chain]
    a, b = nn.Linear(64, 64, dtype=dtype), nn.Linear(64, 64, dtype=dtype)
    if isinstance(first, nn.Module):
        first = type(first)(64, dtype=dtype)
    x = torch.randn(300, 64, dtype=dtype)
    with context:
        for step in range(3):
            h = first(a(x))
            if step == 2:
                with torch.no_grad():
                    EDITS[edit](h)
            b.weight.grad = None
            b(second(h)).square().mean().backward()
    return b.weight.grad


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_between_two_operations(chain: str, edit: str) -> None:
    """Gradients are those of plain autograd, or there is an error: where a node on the way has saved what was edited, in both."""
    dtypes = (torch.float32, torch.float64, torch.bfloat16) if edit in ("shuffle", "sort") else (torch.float32,)
    for dtype in dtypes:
        try:
            wanted = train(contextlib.nullcontext(), chain, edit, dtype)
        except RuntimeError:
            wanted = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                got = train(revhooks.reversible(), chain, edit, dtype)
            except (ReplayError, ModifiedError):
                continue
        assert wanted is not None
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("edit", ["shuffle", "two rows", "one element"])
def test_an_edit_past_the_version_counter(edit: str) -> None:
    """What a recipe gives is not what the memory had: that is an error, and the step after it is right."""
    recipe._trials.clear()
    torch.manual_seed(0)
    a, b = nn.Linear(64, 64), nn.Linear(64, 64)
    x = torch.randn(300, 64)

    def step(*, edited: bool) -> Tensor:
        h = F.gelu(a(x))
        if edited:
            EDITS[edit](h.data)
        b.weight.grad = None
        b(h).square().mean().backward()
        return b.weight.grad

    with revhooks.reversible():
        for _ in range(3):
            step(edited=False)
        with pytest.raises(ReplayError, match="something was changed in place"):
            step(edited=True)
        torch.manual_seed(1)
        got = step(edited=True)
    torch.manual_seed(1)
    assert torch.equal(got, step(edited=True))


# ------------------------------------------------------------------- a backward that writes into what it has saved


class Reuses(torch.autograd.Function):
    """Triples; its backward computes in the memory of what it has saved."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return x.zero_().add_(g, alpha=3)


MAKERS = {
    "gelu": lambda: F.gelu,
    "relu": lambda: torch.relu,
    "layer norm": lambda: nn.LayerNorm(64),
    "product": lambda: lambda h: h * h.sigmoid(),
    "pooling": lambda: lambda h: F.max_pool1d(h[None], 1)[0],
    "dropout": lambda: nn.Dropout(0.5),
}


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("options", [{}, {"ops": False}, {"budget": 1e6}, {"replay": nn.Linear}], ids=str)
@pytest.mark.parametrize("maker", MAKERS)
def test_two_consumers_of_what_is_rebuilt(maker: str, options: dict[str, object], retain: bool) -> None:
    """Plain autograd raises; so is it here, or each of them has a tensor of its own."""
    a, b, make = nn.Linear(64, 64), nn.Linear(64, 64), MAKERS[maker]()
    x = torch.randn(300, 64)

    def step(reuses=Reuses.apply) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        h = make(a(x))
        loss = (b(h) + reuses(h)).square().mean()
        return torch.autograd.grad(loss, [a.weight, b.weight], retain_graph=retain)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        step()
    wanted = step(lambda h: 3 * h)
    with revhooks.reversible(**options):
        try:
            got = step()
        except ModifiedError:
            return
    torch.testing.assert_close(got, wanted)


class First(nn.Module):
    """A branch whose first operation owns its input's memory in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(Reuses.apply(x)))


class Own(nn.Module):
    """Registered: only its inverse is known."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = First(), First()

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        a = a + self.f(b)
        return torch.cat([a, b + self.g(a)], 1)

    def inverse(self, y: Tensor) -> Tensor:
        a, b = y.chunk(2, 1)
        b = b - self.g(a)
        return torch.cat([a - self.f(b), b], 1)


class Triples(Own):
    """The block itself owns its input, no branch of it."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(Reuses.apply(x))

    def inverse(self, y: Tensor) -> Tensor:
        return super().inverse(y) / 3


BLOCKS = {
    "registered": Own,
    "registered, outside of branches": Triples,
    "additive": lambda: AdditiveCoupling(First(), First(), dim=1),
    "affine": lambda: AffineCoupling(nn.Sequential(First(), nn.Linear(32, 64)), dim=1),
    "two streams": lambda: ReversibleSequential(*[First() for _ in range(6)], dim=1),
}


@pytest.mark.parametrize("block", BLOCKS)
def test_a_branch_that_owns_its_input(block: str, request: pytest.FixtureRequest) -> None:
    """Plain autograd needs the stream for nothing else: so each gets what it must have."""
    torch.manual_seed(0)
    for kind in (Own, Triples):
        if BLOCKS[block] is kind:
            revhooks.register(kind, inverse="inverse")
            request.addfinalizer(functools.partial(revhooks.unregister, kind))
    net = nn.Sequential(nn.Linear(64, 64), *[BLOCKS[block]() for _ in range(3)]).double()
    x = torch.randn(8, 64, dtype=torch.float64)
    wanted = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    for options in ({}, {"ops": False}, {"budget": 2e4}):
        for _ in range(3):
            with revhooks.reversible(**options) as run:
                loss = net(x).square().sum()
                got = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
                with pytest.raises(ModifiedError):  # as plain autograd does
                    loss.backward()
            assert run.stats.inversions
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.near(reason="what is saved again is compared at once there, elsewhere the step is lost")
@pytest.mark.parametrize("edit", ["roll", "two rows", "one element"])
@pytest.mark.parametrize("when", [(0, 0, 1, 1), (1, 1, 1)])
@pytest.mark.parametrize("budget", [0, 5e4])
def test_an_edit_between_two_saves_of_one_tensor(edit: str, when: tuple[int, ...], budget: float) -> None:
    """Past the version counter, so that plain autograd sees what is there now, for both: and so it is here."""

    def train(context: contextlib.AbstractContextManager[object]) -> list[Tensor]:
        recipe._trials.clear()
        torch.manual_seed(0)
        a, b, c = (nn.Linear(64, 64) for _ in range(3))
        x, seen = torch.randn(300, 64), []
        with context:
            for edited in when:
                h = torch.relu(F.silu(a(x)))
                z = b(h)
                if edited:
                    EDITS[edit](h.data)
                seen += torch.autograd.grad((z + c(h)).square().mean(), [a.weight, b.weight, c.weight])
        return seen

    got = train(revhooks.reversible(budget=budget))
    assert all(map(torch.equal, got, train(contextlib.nullcontext())))


@pytest.mark.near(reason="all that is rebuilt is compared there, elsewhere a few hundred elements")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_replay_that_differs_in_one_channel(dtype: torch.dtype) -> None:
    """Of 4,096: hardly any of the elements that are compared lie there."""
    net = nn.Linear(8, 4096, dtype=dtype)

    def forward(x: Tensor) -> Tensor:
        global _place
        _place += 1
        mask = torch.ones(4096, dtype=x.dtype)
        mask[_place] = 0
        return torch.sin(torch.tanh(net(x)) * mask)

    for options in ({"ops": False}, {}):
        with pytest.raises(ReplayError), revhooks.reversible(**options):
            revhooks.checkpoint(forward, torch.randn(64, 8, dtype=dtype)).square().sum().backward()


_place = 0  # a number that no call owns


@pytest.mark.near(reason="all that is rebuilt is compared there, elsewhere a few hundred elements")
def test_an_inverse_that_is_wrong_for_one_row(request: pytest.FixtureRequest) -> None:
    class Clamps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            a, b = x.chunk(2, 1)
            return torch.cat([a + self.f(b).tanh(), b], 1)

        def inverse(self, y: Tensor) -> Tensor:
            a, b = y.clamp(-20, 20).chunk(2, 1)
            return torch.cat([a - self.f(b).tanh(), b], 1)

    revhooks.register(Clamps, inverse="inverse")
    request.addfinalizer(lambda: revhooks.unregister(Clamps))
    net = nn.Sequential(*[Clamps() for _ in range(4)]).double()
    x = torch.randn(4096, 32, dtype=torch.float64)
    for step in range(2):
        given = x.clone()
        given[1234, :3] += 50 * step
        with pytest.raises(InversionError) if step else contextlib.nullcontext(), revhooks.reversible():
            net(given).square().mean().backward()
