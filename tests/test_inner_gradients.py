"""Blocks whose forward differentiates: through its own branches, with noise, and with `torch.func`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revhooks
from revhooks.errors import ReplayError
from tests.conftest import Count


def net(width: int, gain: float = 0.4) -> nn.Module:
    inner = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
    with torch.no_grad():
        for parameter in inner.parameters():
            parameter.mul_(gain)
    return Count(inner)


class Residual(nn.Module):
    """``y = x + g(x)``, with an estimate of its log-det that takes gradients in forward."""

    estimate: Callable[[Any, Tensor, Tensor, Tensor], Tensor]

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.g = net(width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        source = x if x.requires_grad else x.detach().requires_grad_()
        update = self.g(source)
        return x + update, type(self).estimate(self, source, update, x + update)

    def inverse(self, y: Tensor, _: Tensor) -> Tensor:
        x = y
        for _ in range(150):
            x = y - self.g(x)
        return x


def pull(y: Tensor, x: Tensor, v: Tensor, *, create_graph: bool) -> Tensor:
    (product,) = torch.autograd.grad(y, x, v, retain_graph=True, create_graph=create_graph)
    return product


def hutchinson(block: Any, x: Tensor, update: Tensor, y: Tensor) -> Tensor:
    total = torch.zeros(len(x), dtype=x.dtype)
    for _ in range(3):
        noise = torch.randn_like(update)
        product = noise
        for k in range(1, 4):
            product = pull(update, x, product, create_graph=True)
            total = total + (product * noise).sum(1) * (-1) ** (k + 1) / k
    return total


ESTIMATES: dict[str, Callable[[Any, Tensor, Tensor, Tensor], Tensor]] = {
    "constant": lambda block, x, update, y: (x * pull(y, x, torch.cos(y.detach()), create_graph=False)).sum(1),
    "graph": lambda block, x, update, y: (x * pull(y, x, torch.cos(y), create_graph=True)).sum(1),
    "noise": hutchinson,
    "noise, no graph": lambda block, x, update, y: (pull(update, x, torch.randn_like(x), create_graph=False) * y).sum(1),
    "parameters": lambda block, x, update, y: (
        torch.autograd.grad(update.square().sum(), list(block.g.parameters()), create_graph=True)[0].square().sum() * x.sum(1)
    ),
    "unused": lambda block, x, update, y: (
        torch.autograd.grad(update.sum(), x, create_graph=True, allow_unused=True, materialize_grads=True)[0].square().sum(1)
    ),
    "second evaluation": lambda block, x, update, y: pull(block.g(x), x, torch.ones_like(x), create_graph=True).square().sum(1),
}


def flow(kind: type[nn.Module], depth: int = 4) -> nn.ModuleList:
    return nn.ModuleList(kind() for _ in range(depth)).double()


X = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def loss_of(blocks: Any, x: Tensor = X) -> Tensor:
    h, total = x.clone(), torch.zeros(())
    for block in blocks:
        h, ladj = block(h)
        total = total + ladj
    return (h.square().sum(1) / 2 - total).mean()


def gradients(blocks: nn.ModuleList, *, reverse: bool, steps: int = 2, **options: Any) -> tuple[list[Tensor], Any]:
    """Of the last of some steps: the first one tries the inverses."""
    stats = None
    for _ in range(steps):
        blocks.zero_grad()
        torch.manual_seed(3)
        if reverse:
            with revhooks.reversible(**{"guard": "raise", **options}) as run:
                loss_of(blocks).backward()
            stats = run.stats
        else:
            loss_of(blocks).backward()
    return [p.grad.clone() for p in blocks.parameters() if p.grad is not None], stats


def compare(blocks: nn.ModuleList, tol: float = 1e-10, **options: Any) -> Any:
    want, _ = gradients(blocks, reverse=False)
    for steps in (1, 2):
        got, stats = gradients(blocks, reverse=True, steps=steps, **options)
        assert len(want) == len(got)
        for a, b in zip(want, got, strict=True):
            assert (a - b).norm() <= tol * (1e-3 + a.norm())
    assert stats is not None
    assert stats.held_bytes == 0
    return stats


@pytest.mark.parametrize("estimate", ESTIMATES)
def test_forward_differentiates_through_its_branch(estimate: str, registered: Any, no_gc: None) -> None:
    class Estimated(Residual):
        pass

    Estimated.estimate = ESTIMATES[estimate]  # type: ignore[assignment]
    registered(Estimated, inverse="inverse")
    stats = compare(flow(Estimated))
    assert stats.inversions == 2


class Coupling(nn.Module):
    """Both branches are repeated by the inverse; the gradient goes through ``f`` alone."""

    branch: Callable[[], nn.Module] = staticmethod(lambda: net(2))

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = type(self).branch(), type(self).branch()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, 1)
        b = b if b.requires_grad else b.detach().requires_grad_()
        update = self.f(b)
        a = a + update
        slope = torch.autograd.grad(update.sum(), b, create_graph=True)[0]
        return torch.cat([a, b + self.g(a)], 1), (slope * b).sum(1)

    def inverse(self, y: Tensor, _: Tensor) -> Tensor:
        a, b = y.chunk(2, 1)
        b = b - self.g(a)
        return torch.cat([a - self.f(b), b], 1)


def test_only_the_branch_that_is_differentiated_is_run_again(registered: Any) -> None:
    registered(Coupling, inverse="inverse")
    blocks = flow(Coupling)
    stats = compare(blocks)
    assert stats.inversions == 2
    assert stats.second_evaluations == 2
    for module in blocks.modules():
        if isinstance(module, Count):
            module.calls = 0
    gradients(blocks, reverse=True, steps=1)
    assert [(block.f.calls, block.g.calls) for block in blocks] == [(2, 2), (3, 2), (3, 2), (1, 1)]


class Mix(nn.Module):
    """Saves nothing for backward: that forward differentiates through it shows in the graph only."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flip(1) + 2 * x


def test_a_branch_that_saves_nothing(registered: Any) -> None:
    class Linear(Coupling):
        branch = Mix

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y, ladj = super().forward(x * self.scale.exp())
            return y, ladj

        def inverse(self, y: Tensor, _: Tensor) -> Tensor:
            return super().inverse(y, _) * (-self.scale).exp()

    registered(Linear, inverse="inverse")
    compare(flow(Linear))


def test_a_gradient_that_is_taken_in_later_calls_only(registered: Any) -> None:
    class Sometimes(Coupling):
        on = False

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y, ladj = super().forward(x)
            return y, ladj if Sometimes.on else x.sum(1)

    class Plain(Sometimes):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            if Sometimes.on:
                return super().forward(x)
            a, b = x.chunk(2, 1)
            a = a + self.f(b)
            return torch.cat([a, b + self.g(a)], 1), x.sum(1)

    registered(Plain, inverse="inverse")
    blocks = flow(Plain)
    compare(blocks)
    Sometimes.on = True
    compare(blocks)


def test_noise_behind_a_branch_that_draws_and_is_run_again(registered: Any) -> None:
    """The generator goes on where the branch has left it."""

    class Noisy(Coupling):
        branch = staticmethod(lambda: nn.Sequential(net(2), nn.Dropout(0.3)))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y, ladj = super().forward(x)
            return y + torch.randn_like(y) * 0, ladj * torch.rand_like(ladj)

    registered(Noisy, inverse="inverse")
    compare(flow(Noisy))


def test_an_inverse_that_differentiates(registered: Any) -> None:
    """Newton's method: what the inverse takes gradients through is evaluated, not remembered."""

    class Newton(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.g = net(1)

        def f(self, x: Tensor) -> Tensor:
            return x + self.g(x.reshape(-1, 1)).reshape(x.shape)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.f(x), x.new_zeros(len(x))

        def inverse(self, y: Tensor, _: Tensor) -> Tensor:
            x = y
            for _ in range(20):
                with torch.enable_grad():
                    x = x.detach().requires_grad_()
                    value = self.f(x)
                    (slope,) = torch.autograd.grad(value.sum(), x)
                x = (x - (value - y) / slope).detach()
            return x

    registered(Newton, inverse="inverse")
    assert compare(flow(Newton)).inversions == 2


def test_every_output_of_a_replay_is_compared(registered: Any) -> None:
    """A log-det that is another in the replay raises: the gradients would be wrong."""

    class Drifts(Coupling):
        calls = 0

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            Drifts.calls += 1
            a, b = x.chunk(2, 1)
            a = a + self.f(b)
            return torch.cat([a, b + self.g(a)], 1), (x * Drifts.calls).sum(1).exp()

    registered(Drifts, inverse="inverse")
    for options in ({}, {"guard": "fallback"}):
        with pytest.raises(ReplayError, match="something else"):
            gradients(flow(Drifts), reverse=True, steps=1, **options)
        Drifts.calls = 0
    with pytest.raises(ReplayError, match="something else"):  # from the input, which is held
        gradients(flow(Drifts, 2), reverse=True, steps=1)


def test_a_log_det_of_next_to_nothing_is_no_error(registered: Any) -> None:
    class Rounding(Coupling):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            a, b = x.chunk(2, 1)
            a = a + self.f(b)
            y = torch.cat([a, b + self.g(a)], 1)
            return y, ((x * 3).sum(1) - x.sum(1) * 3) * 1e-3

    registered(Rounding, inverse="inverse")
    compare(flow(Rounding))


def test_retained_graphs_and_second_derivatives(registered: Any) -> None:
    class Estimated(Residual):
        estimate = ESTIMATES["graph"]  # type: ignore[assignment]

    registered(Estimated, inverse="inverse")
    blocks = flow(Estimated, 3)

    def penalty() -> list[Tensor]:
        x = X.clone().requires_grad_()
        loss = loss_of(blocks, x)
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        grads = torch.autograd.grad(slope.square().sum(), list(blocks.parameters()), retain_graph=True)
        return [*grads, *torch.autograd.grad(loss, list(blocks.parameters()))]

    want = penalty()
    for _ in range(2):
        with revhooks.reversible(guard="raise"):
            got = penalty()
        assert all((a - b).norm() <= 1e-10 * (1e-3 + a.norm()) for a, b in zip(want, got, strict=True))


TRANSFORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.cos(x))[0],
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.cos(x),))[1],
    "grad": lambda f, x: torch.func.grad(lambda t: f(t).square().sum())(x),
    "jacrev": lambda f, x: torch.func.vmap(torch.func.jacrev(lambda t: f(t[None])[0]))(x).sum(1),
    "jacfwd": lambda f, x: torch.func.vmap(torch.func.jacfwd(lambda t: f(t[None])[0]))(x).sum(1),
    "hessian": lambda f, x: torch.func.vmap(torch.func.hessian(lambda t: f(t[None]).sum()))(x).sum(1),
}


class Field(nn.Module):
    """A branch inside of which a functional transform runs."""

    transform: Callable[[Any, Tensor], Tensor]

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = net(width)

    def forward(self, x: Tensor) -> Tensor:
        return 0.1 * type(self).transform(self.inner, x) + self.inner(x)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("how", ["inverted", "glue", "replay", "ordinary", "checkpoint", "coupling"])
def test_functional_transforms(name: str, how: str, registered: Any, no_gc: None) -> None:
    class Transformed(Field):
        transform = TRANSFORMS[name]  # type: ignore[assignment]

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g = Transformed(2), net(2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            if how == "checkpoint":
                return revhooks.checkpoint(self.run, x)
            return self.run(x)

        def run(self, x: Tensor) -> tuple[Tensor, Tensor]:
            a, b = x.chunk(2, 1)
            a = a + self.f(b)
            y = torch.cat([a, b + self.g(a)], 1)
            ladj = TRANSFORMS[name](self.g, a).sum(1) if how == "glue" else y.sum(1)
            return y, ladj

        def inverse(self, y: Tensor, _: Tensor) -> Tensor:
            a, b = y.chunk(2, 1)
            b = b - self.g(a)
            return torch.cat([a - self.f(b), b], 1)

    class Law(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.coupling = revhooks.nn.AdditiveCoupling(Transformed(2), net(2))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.coupling(x)
            return y, y.sum(1)

    if how in ("inverted", "glue"):
        registered(Block, inverse="inverse")
    options = {"replay": Block} if how == "replay" else {}
    stats = compare(flow(Law if how == "coupling" else Block), **options)
    assert how not in ("inverted", "glue", "coupling") or stats.inversions >= 2


def test_outside_hooks_are_refused_as_ever() -> None:
    """Somebody else's hooks do not step aside, and ours are where they were after an error."""
    x = torch.randn(3)
    with revhooks.reversible() as run:
        before = torch._C._autograd._top_saved_tensors_default_hooks(False)
        with (
            torch.autograd.graph.save_on_cpu(),
            pytest.raises(RuntimeError, match="saved tensor hooks"),
        ):
            torch.func.grad(lambda t: t.square().sum())(x)
        with pytest.raises(ZeroDivisionError):
            torch.func.grad(lambda t: t.sum() / 0 if False else 1 / 0)(x)
        assert torch._C._autograd._top_saved_tensors_default_hooks(False) == before
        y = x.clone().requires_grad_().exp().exp()
        assert run.stats.held_bytes > 0
        y.sum().backward()
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
        pytest.raises(RuntimeError, match="saved tensor hooks"),
    ):
        torch.func.grad(lambda t: t.square().sum())(x)


def test_compiled_transforms() -> None:
    """A compiler sees torch's own functions, whether it was there before the first run or not."""
    with revhooks.reversible():
        pass
    f = torch.compile(lambda t: torch.func.grad(lambda s: s.square().sum())(t) * 2, backend="eager", fullgraph=True)
    x = torch.ones(3, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        f(x).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 4.0))  # type: ignore[arg-type]
