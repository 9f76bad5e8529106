"""Random nets of the kinds that real programs have: recurrent, three-dimensional, flows that take gradients inside, autocast.

Besides: tensors that are reordered behind autograd's back, subclasses of Tensor, auxiliary losses in lists. What comes out is
plain autograd's, or there is an error. `make test` tries 200, `make test-all` 2,000.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import revhooks
from revhooks.errors import InversionError, ModifiedError, ReplayError
from revhooks.nn import AdditiveCoupling, AffineCoupling, MomentumSequential, ReversibleSequential

WIDTH = 8
Layer = Callable[[Random], nn.Module]


class Tag(torch.Tensor):
    """Stays what it is through every operation."""


# ------------------------------------------------------------------------------------------------- layers


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], width: int, *, packed: bool) -> None:
        super().__init__()
        self.cell, self.packed = kind(width, width, batch_first=True), packed

    def forward(self, x: Tensor) -> Tensor:
        if not self.packed:
            y: Tensor = self.cell(x)[0]
            return y
        lengths = [x.shape[1] - i % 2 for i in range(len(x))]
        given = nn.utils.rnn.pack_padded_sequence(x, torch.tensor(lengths, device="cpu"), batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.cell(given)[0], batch_first=True, total_length=x.shape[1])[0]


class Residual(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.body(x)
        return y


class Experts(nn.Module):
    """Leaves a loss for the load of its experts in a list."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.router, self.expert, self.losses, self.calls = nn.Linear(width, 4), nn.Linear(width, width), [], 0

    def forward(self, x: Tensor) -> Tensor:
        shares = self.router(x).softmax(-1)
        self.losses.append(shares.flatten(0, -2).mean(0).square().sum())
        self.calls += 1
        return x + torch.tanh(self.expert(x)) * shares.amax(-1, keepdim=True)


class Edit(nn.Module):
    """Reorders what comes in behind autograd's back, in some calls."""

    def __init__(self, way: int, wait: int) -> None:
        super().__init__()
        self.way, self.wait, self.steps = way, wait, [0]

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(x) if self.way % 2 else x * torch.sigmoid(x)
        if self.steps[0] == self.wait:
            with torch.no_grad():
                y.copy_([y.flip(0), y.roll(1, -1), y.sort(-1).values, y.flip(-1)][self.way])
        return torch.relu(y) if self.way < 2 else F.gelu(y)


class Gradients(nn.Module):
    """A residual block whose forward differentiates through its branch for an estimate of the log-det."""

    def __init__(self, width: int, *, noise: bool, graph: bool) -> None:
        super().__init__()
        self.g = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
        for parameter in self.g.parameters():
            parameter.data.mul_(0.3)
        self.noise, self.graph = noise, graph
        self.register_buffer("direction", torch.randn(width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x if x.requires_grad else x.detach().requires_grad_()
        g = self.g(x)
        direction = torch.randn_like(x) if self.noise else self.direction.to(x.dtype).expand_as(x)
        (product,) = torch.autograd.grad(g, x, direction, create_graph=self.graph, retain_graph=True)
        return x + g, (product * direction).sum(-1) + (product * x).sum(-1)

    def inverse(self, y: Tensor, _: Tensor) -> Tensor:
        x = y
        for _ in range(80):
            x = y - self.g(x)
        return x


class Leapfrog(nn.Module):
    """A step of a Hamiltonian system: the force is the gradient of a potential, taken inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.potential = nn.Sequential(nn.Linear(width // 2, width), nn.Tanh(), nn.Linear(width, 1))

    def force(self, q: Tensor) -> Tensor:
        with torch.enable_grad():
            q = q if q.requires_grad else q.detach().requires_grad_()
            return torch.autograd.grad(self.potential(q).sum(), q, create_graph=torch.is_grad_enabled())[0]

    def forward(self, x: Tensor) -> Tensor:
        q, p = x.chunk(2, -1)
        p = p - 0.3 * self.force(q)
        return torch.cat([q + 0.3 * p, p], -1)

    def inverse(self, y: Tensor) -> Tensor:
        q, p = y.chunk(2, -1)
        q = q - 0.3 * p
        return torch.cat([q, p + 0.3 * self.force(q)], -1)


class Flow(nn.Module):
    """Blocks one after the other; the sum of their second outputs is kept for the loss."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks, self.losses = nn.ModuleList(blocks), []

    def forward(self, x: Tensor) -> Tensor:
        total: Any = 0
        for block in self.blocks:
            x = block(x)
            if isinstance(x, tuple):
                x, more = x
                total = total + more
        if isinstance(total, Tensor):
            self.losses.append(total.mean())
        return x


def mlp(width: int, out: int | None = None) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, out or width))


def conv(width: int, out: int | None = None) -> nn.Module:
    return nn.Sequential(nn.Conv3d(width, width, 3, padding=1), nn.Tanh(), nn.Conv3d(width, out or width, 1))


def token_layer(draw: Random) -> nn.Module:
    kind, half = draw.randrange(9), WIDTH // 2
    cell = draw.choice([nn.GRU, nn.LSTM, nn.RNN])
    if kind == 0:
        return Residual(Recurrent(cell, WIDTH, packed=draw.random() < 0.4))
    if kind == 1:
        return AdditiveCoupling(*[Recurrent(cell, half, packed=draw.random() < 0.3) for _ in range(2)], dim=-1)
    if kind == 2:
        return ReversibleSequential(*[draw.choice([mlp(half), Experts(half)]) for _ in range(4)], dim=-1)
    if kind == 3:
        return Experts(WIDTH)
    if kind == 4:
        return nn.TransformerEncoderLayer(WIDTH, 2, 16, draw.choice([0.0, 0.1]), batch_first=True)
    if kind == 5:
        return MomentumSequential(*[mlp(WIDTH) for _ in range(3)], gamma=0.9)
    if kind == 6:
        return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.1))
    if kind == 7:
        return Flow([Leapfrog(WIDTH) for _ in range(2)])
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.RMSNorm(WIDTH), nn.SiLU())


def volume_layer(draw: Random) -> nn.Module:
    kind, half = draw.randrange(7), WIDTH // 2
    if kind == 0:
        return AdditiveCoupling(conv(half), conv(half))
    if kind == 1:
        return AffineCoupling(conv(half, 2 * half))
    if kind == 2:
        return nn.Sequential(nn.Conv3d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm3d(WIDTH), nn.ReLU(inplace=draw.random() < 0.5))
    if kind == 3:
        return nn.Sequential(nn.MaxPool3d(2, 1, 1), nn.AdaptiveAvgPool3d(4), nn.GroupNorm(2, WIDTH), nn.GELU())
    if kind == 4:
        return ReversibleSequential(*[conv(half) for _ in range(4)])
    if kind == 5:
        return nn.Sequential(nn.InstanceNorm3d(WIDTH, affine=True), nn.LeakyReLU(), nn.Dropout3d(0.1))
    return Residual(nn.Sequential(nn.BatchNorm3d(WIDTH), nn.SiLU(), nn.Conv3d(WIDTH, WIDTH, 1)))


def flow_layer(draw: Random) -> nn.Module:
    kind = draw.randrange(5)
    if kind < 2:
        return Flow([Gradients(WIDTH, noise=draw.random() < 0.5, graph=draw.random() < 0.7) for _ in range(draw.randrange(1, 4))])
    if kind == 2:
        return Flow([Leapfrog(WIDTH) for _ in range(draw.randrange(1, 4))])
    if kind == 3:
        return AffineCoupling(mlp(WIDTH // 2, WIDTH), dim=-1)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())


FAMILIES: dict[str, tuple[Layer, tuple[int, ...]]] = {
    "tokens": (token_layer, (4, 5, WIDTH)),
    "volumes": (volume_layer, (2, WIDTH, 4, 4, 4)),
    "flows": (flow_layer, (6, WIDTH)),
}


# -------------------------------------------------------------------------------------------------- a trial


@contextlib.contextmanager
def registered() -> Iterator[None]:
    revhooks.register(Gradients, inverse="inverse")
    revhooks.register(Leapfrog, inverse="inverse")
    try:
        yield
    finally:
        revhooks.unregister(Gradients)
        revhooks.unregister(Leapfrog)


def losses_of(net: nn.Module) -> list[Tensor]:
    return [loss for module in net.modules() for loss in getattr(module, "losses", ())]


def step(net: nn.Module, x: Tensor, mode: int, cast: contextlib.AbstractContextManager[Any]) -> None:
    with cast:
        h = net(x)
    losses = losses_of(net)
    first, second = h.double().square().mean(), torch.tanh(h.double()).mean() + sum(loss.double() for loss in losses)
    if mode == 0:
        (first + second).backward()
    elif mode == 1:
        first.backward(retain_graph=True)
        second.backward()
    elif mode == 2:
        (first + second).backward(retain_graph=True)
        (first + second).backward()
    else:
        (grad,) = torch.autograd.grad(first, x, create_graph=True)
        (second + grad.square().sum()).backward()


def outcome(net: nn.Module, data: Tensor, trial: Trial, options: dict[str, Any] | None) -> list[Tensor | int]:
    """Of three steps: gradients, buffers, lists, and where the generator is."""
    seen: list[Any] = []
    torch.manual_seed(0)
    for _ in range(3):
        x = data.clone().requires_grad_()
        given = x.as_subclass(Tag) if trial.tagged else x
        net.zero_grad()
        cast = torch.autocast("cpu", torch.bfloat16) if trial.cast else contextlib.nullcontext()
        with revhooks.reversible(**options) if options is not None else contextlib.nullcontext():
            step(net, given, trial.mode, cast)
        seen += [x.grad, *[p.grad for p in net.parameters()], *[b.clone() for b in net.buffers()]]
        for module in net.modules():
            if hasattr(module, "losses"):
                seen += [len(module.losses), getattr(module, "calls", 0)]
                module.losses.clear()
            if isinstance(module, Edit):
                module.steps[0] += 1
    return [*seen, torch.rand(1)]


class Trial:
    """What is drawn of a trial besides its net."""

    def __init__(self, draw: Random, family: str) -> None:
        self.mode = draw.randrange(3 if family == "tokens" else 4)  # a recurrent net has no second derivative on every device
        self.cast = family != "flows" and draw.random() < 0.2
        self.tagged = not self.cast and draw.random() < 0.15

    def options(self, draw: Random, net: nn.Module) -> dict[str, Any]:
        plain = [Recurrent, Residual, Experts, nn.TransformerEncoderLayer, nn.Sequential]
        options: dict[str, Any] = {"ops": draw.random() < 0.8, "guard": draw.choice(["fallback", "fallback", "raise"])}
        if draw.random() < 0.5:
            options["replay"] = draw.choice(plain)
        if draw.random() < 0.3:
            options["budget"] = draw.choice([2000, 10000, 50000, float("inf")])
        return options


def is_close(a: Any, b: Any, tolerance: float) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a is b or a == b
    a, b = a.detach().double(), b.detach().double()
    return a.shape == b.shape and bool((a - b).norm() <= tolerance * (b.norm() + 1e-3 * b.numel() ** 0.5))


def check(seed: int) -> None:
    draw = Random(seed)
    torch.manual_seed(seed)
    family = draw.choice(list(FAMILIES))
    make, shape = FAMILIES[family]
    trial = Trial(draw, family)
    layers = [make(draw) for _ in range(draw.randrange(2, 6))]
    edits = not trial.tagged and draw.random() < 0.3
    if edits:
        layers.insert(draw.randrange(len(layers) + 1), Edit(draw.randrange(4), draw.randrange(1, 3)))
    net = nn.Sequential(*layers)
    dtype = torch.float32 if trial.cast else torch.float64
    net, data = net.to(dtype), torch.randn(shape, dtype=dtype)
    options = trial.options(draw, net)
    try:
        plain = outcome(copy.deepcopy(net), data, trial, None)
    except RuntimeError:  # plain autograd refuses some edits, and some second derivatives
        return
    try:
        got = outcome(copy.deepcopy(net), data, trial, options)
    except (InversionError, ModifiedError, ReplayError):
        assert edits or (trial.cast and options["guard"] == "raise"), f"seed {seed}: {options}"
        return
    tolerance = 0.05 if trial.cast else 1e-7
    assert all(is_close(a, b, tolerance) for a, b in zip(got, plain, strict=True)), f"seed {seed}: {options}"


@pytest.mark.parametrize("part", range(8))
@pytest.mark.filterwarnings("ignore")
def test_random_nets_of_many_kinds(part: int) -> None:
    with registered():
        for seed in range(25 * part, 25 * (part + 1)):
            check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8, 88))
@pytest.mark.filterwarnings("ignore")
def test_more_random_nets_of_many_kinds(part: int) -> None:
    test_random_nets_of_many_kinds(part)
