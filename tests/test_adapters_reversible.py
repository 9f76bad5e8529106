"""memcnn, RevTorch, revlib, momentumnet and PyTorch Geometric under ``reversible()``, as their users write them."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revhooks
from revhooks.adapters import adapter_of
from revhooks.nn import AdditiveCoupling, ReversibleSequential
from revhooks.registry import entry_of
from tests.adapted import TOLERANCE, assert_alike, compare, real, train
from tests.conftest import Count
from tests.devices import DEVICE

memcnn = pytest.importorskip("memcnn", reason="memcnn is not installed")
revlib = pytest.importorskip("revlib", reason="revlib is not installed")
revtorch = pytest.importorskip("revtorch", reason="revtorch is not installed")
momentumnet = pytest.importorskip("momentumnet", reason="momentumnet is not installed")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    rev_gnn = pytest.importorskip("torch_geometric.nn.models.rev_gnn", reason="torch_geometric is not installed")
    from torch_geometric.nn import SAGEConv

pytestmark = pytest.mark.cpu(reason="who runs what")

CHANNELS, PAIRS = 4, 4
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def conv(out: int = CHANNELS) -> nn.Module:
    """Norm, dropout and convolution: buffers, generators and weights."""
    c = CHANNELS
    return Count(
        nn.Sequential(
            nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, c, 3, padding=1, bias=False), nn.Dropout(0.1),
            nn.GroupNorm(2, c), nn.Tanh(), nn.Conv2d(c, out, 3, padding=1, bias=False),
        )
    )  # fmt: skip


def pairs(fns: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, nn.Module]]:
    return zip(fns[::2], fns[1::2], strict=True)


def memcnn_chain(fns: Sequence[nn.Module], *, disable: bool = False) -> nn.Module:
    blocks = [memcnn.AdditiveCoupling(f, g) for f, g in pairs(fns)]
    return nn.Sequential(*[memcnn.InvertibleModuleWrapper(block, disable=disable) for block in blocks])


def revtorch_chain(fns: Sequence[nn.Module]) -> nn.Module:
    return revtorch.revtorch.ReversibleSequence(
        nn.ModuleList([revtorch.revtorch.ReversibleBlock(f, g, split_along_dim=1) for f, g in pairs(fns)])
    )


def additive(fns: Sequence[nn.Module], x: Tensor) -> Tensor:
    """What an additive chain computes, written down plainly."""
    a, b = x.chunk(2, 1)
    for f, g in pairs(fns):
        a = a + f(b)
        b = b + g(a)
    return torch.cat([a, b], 1)


def revtorch_plain(sequence: Any, x: Tensor) -> Tensor:
    return additive([fn for block in sequence.reversible_blocks for fn in (block.f_block, block.g_block)], x)


def images(dtype: torch.dtype) -> Tensor:
    return real(4, 2 * CHANNELS, 8, 8).to(dtype)


def square_of(x: Tensor) -> Callable[[nn.Module], Tensor]:
    return lambda model: model(x.clone()).square().mean()


CHAINS: dict[str, Callable[[Sequence[nn.Module]], nn.Module]] = {
    "memcnn": memcnn_chain,
    "memcnn, disabled": lambda fns: memcnn_chain(fns, disable=True),
    "memcnn, bare": lambda fns: nn.Sequential(*[memcnn.AdditiveCoupling(f, g) for f, g in pairs(fns)]),
    "RevTorch": revtorch_chain,
    **{
        f"revlib, {mode.name}": lambda fns, mode=mode: revlib.ReversibleSequential(*fns, split_dim=1, memory_mode=mode)  # type: ignore[misc]
        for mode in revlib.MemoryModes
    },
}


def plain_of(name: str, x: Tensor) -> Callable[[nn.Module], Tensor]:
    """The loss of a chain without its library's memory saving."""
    if name == "RevTorch":
        return lambda model: revtorch_plain(model, x).square().mean()
    if name.startswith("revlib"):
        return lambda model: additive([one.wrapped_module.wrapped_module for one in model], x).square().mean()
    return lambda model: (
        additive([fn for block in model for one in [getattr(block, "_fn", block)] for fn in (one.Fm, one.Gm)], x).square().mean()
    )


NARROW = ("memcnn", "RevTorch", "revlib, autograd_function")


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float64) for name in CHAINS), *((name, torch.float32) for name in NARROW)]
)
def test_additive_chains_train_as_plain_and_cost_what_ours_do(name: str, dtype: torch.dtype) -> None:
    fns, x = [conv().to(dtype) for _ in range(2 * PAIRS)], images(dtype)
    model = CHAINS[name](fns)
    rev = compare(model, square_of(x), plain=plain_of(name, x), tol=TOLERANCE[dtype])
    joined = name.startswith(("revlib", "RevTorch"))
    ours = ReversibleSequential(*fns) if joined else nn.Sequential(*[AdditiveCoupling(f, g) for f, g in pairs(fns)])
    own = train(ours, square_of(x), reverse=True)
    assert rev.held.held_bytes == own.held.held_bytes
    assert rev.stats.peak_held_bytes <= own.stats.peak_held_bytes
    assert rev.share < 0.4
    assert rev.losses == own.losses


@DTYPES
@pytest.mark.parametrize("adapter", ["AffineAdapterNaive", "AffineAdapterSigmoid"])
def test_memcnn_affine(adapter: str, dtype: torch.dtype) -> None:
    out = 2 * CHANNELS if adapter == "AffineAdapterSigmoid" else CHANNELS
    couplings = [memcnn.AffineCoupling(conv(out), conv(out), adapter=getattr(memcnn, adapter)).to(dtype) for _ in range(5)]
    for net in couplings:
        for one in (net.Fm, net.Gm):
            one.f.net[-1].weight.data.mul_(0.2)  # factors near one

    def chain(disable: bool) -> nn.Module:
        return nn.Sequential(*[memcnn.InvertibleModuleWrapper(one, disable=disable) for one in couplings])

    loss = square_of(images(dtype))
    rev = train(chain(False), loss, reverse=True)
    assert_alike(train(chain(True), loss, reverse=False), rev, TOLERANCE[dtype])
    assert max(rev.calls) == 2
    assert rev.share < 0.3


class Rotate(nn.Module):
    """Somebody's own invertible function of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Count(nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 4)))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return y, x + self.net(y)

    def inverse(self, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return z - self.net(y), y


class Pair(nn.Module):
    def __init__(self, *, disable: bool, inverse: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([memcnn.InvertibleModuleWrapper(Rotate(), disable=disable) for _ in range(6)])
        self.inverted = inverse

    def forward(self, x: Tensor) -> Tensor:
        pair = (x * 1, x * 2)
        for block in self.blocks:
            pair = block.inverse(*pair) if self.inverted else block(*pair)
        return torch.cat(pair, 1)


@pytest.mark.parametrize("inverse", [False, True])
def test_memcnn_wraps_what_somebody_has_written(inverse: bool) -> None:
    x = torch.randn(16, 4, dtype=torch.float64)
    model = Pair(disable=False, inverse=inverse).double()
    other = Pair(disable=True, inverse=inverse).double()
    other.load_state_dict(model.state_dict())
    rev = train(model, square_of(x), reverse=True)
    assert_alike(train(other, square_of(x), reverse=False), rev, 1e-9)
    assert max(rev.calls) == 2
    assert rev.share < 0.5


@pytest.mark.parametrize("affine", [False, True])
def test_memcnn_couplings_train_through_their_inverse(affine: bool) -> None:
    x = images(torch.float64)

    def make(disable: bool) -> nn.Module:
        torch.manual_seed(3)
        kind = memcnn.AffineCoupling if affine else memcnn.AdditiveCoupling
        options = {"adapter": memcnn.AffineAdapterNaive} if affine else {}
        blocks = [kind(conv(), conv(), **options) for _ in range(4)]
        for block in blocks:
            for net in (block.Fm, block.Gm):
                (net.f if affine else net).net[-1].weight.data.mul_(0.2)
        return nn.ModuleList([memcnn.InvertibleModuleWrapper(block, disable=disable) for block in blocks]).double()

    def loss(model: Any) -> Tensor:
        y = x.clone()
        for block in model:
            y = block.inverse(y)
        return y.square().mean()

    rev = train(make(False), loss, reverse=True)
    assert_alike(train(make(True), loss, reverse=False), rev, 1e-9)
    assert max(rev.calls) == 2
    assert rev.share < 0.4


@pytest.mark.parametrize(
    "options",
    [{"budget": float("inf")}, {"budget": 10_000}, {"keep": memcnn.InvertibleModuleWrapper}, {"replay": nn.Sequential}],
    ids=["inf", "budget", "keep", "replay"],
)
def test_the_function_of_memcnn_never_runs(options: dict[str, Any]) -> None:
    x = images(torch.float64)
    model = nn.Sequential(nn.Conv2d(2 * CHANNELS, 2 * CHANNELS, 1), nn.ReLU(), memcnn_chain([conv() for _ in range(4)])).double()
    plain = nn.Sequential(*model[:2], *memcnn_chain([fn for b in model[2] for fn in (b._fn.Fm, b._fn.Gm)], disable=True))
    rev = train(model, square_of(x), reverse=True, **options)
    expected = train(plain, square_of(x), reverse=False)
    assert_alike(expected, rev, 1e-9)
    assert max(rev.calls) <= 2


class Outer(nn.Module):
    """Somebody's registered block, with memcnn's in its net."""

    def __init__(self, *, disable: bool) -> None:
        super().__init__()
        inner = memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(nn.Linear(2, 2), nn.Linear(2, 2)), disable=disable)
        self.net = Count(nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4), inner, nn.Tanh()))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return torch.cat([b, a + self.net(b)], 1)

    def inverse(self, y: Tensor) -> Tensor:
        b, c = y.chunk(2, 1)
        return torch.cat([c - self.net(b), b], 1)


def test_what_runs_in_its_place_runs_again_in_a_rebuild(registered: Callable[..., None]) -> None:
    registered(Outer, inverse="inverse")
    x = torch.randn(8, 8, dtype=torch.float64)
    models = [nn.Sequential(*[Outer(disable=disable) for _ in range(4)]).double() for disable in (False, True)]
    models[1].load_state_dict(models[0].state_dict())
    rev = train(models[0], square_of(x), reverse=True)
    assert_alike(train(models[1], square_of(x), reverse=False), rev, 1e-9)
    assert rev.calls == [2, 2, 2]
    assert rev.stats.inversions


@pytest.mark.parametrize("name", NARROW)
def test_steps_that_fit_a_budget_compute_what_others_do(name: str) -> None:
    """From the fourth on the model is called without hooks: not by its library's function either."""
    x = images(torch.float64)
    model = CHAINS[name]([conv() for _ in range(6)]).double()
    rev = train(model, square_of(x), reverse=True, steps=5, budget="1GiB")
    assert_alike(train(model, plain_of(name, x), reverse=False, steps=5), rev, 1e-9)
    assert rev.calls == [1] * 5
    assert rev.stats.frames == 0


def test_revtorch_seeds_its_branches() -> None:
    blocks = [
        revtorch.revtorch.ReversibleBlock(conv(), conv(), split_along_dim=1, fix_random_seed=True).double() for _ in range(4)
    ]
    model = revtorch.revtorch.ReversibleSequence(nn.ModuleList(blocks))
    x = images(torch.float64)

    def plain(model: Any) -> Tensor:
        a, b = x.chunk(2, 1)
        for block in model.reversible_blocks:
            block._init_seed("f")
            a = a + block.f_block(b)
            block._init_seed("g")
            b = b + block.g_block(a)
        return torch.cat([a, b], 1).square().mean()

    rev = compare(model, square_of(x), plain=plain)
    assert set(rev.model.reversible_blocks[0].random_seeds) == {"f", "g"}


def test_revtorch_trains_outside_of_it_as_it_does_inside() -> None:
    """Without batch norms and dropout, which its own function gets wrong."""
    nets = [nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)).double() for _ in range(6)]
    x = torch.randn(8, 8, dtype=torch.float64)
    model = revtorch_chain(nets)

    def loss(model: nn.Module) -> Tensor:
        return model((x * 1).requires_grad_()).square().mean()

    assert_alike(train(model, loss, reverse=False), train(model, loss, reverse=True), 1e-9)


class Takes(nn.Module):
    """A branch with extra arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Count(nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 4)))

    def forward(self, x: Tensor, scale: Tensor, *, shift: float = 0.0) -> Tensor:
        return self.net(x) * scale + shift


def half(x: Tensor, update: Tensor) -> Tensor:
    return 0.9 * x + update


def unhalf(y: Tensor, update: Tensor) -> Tensor:
    return (y - update) / 0.9


@pytest.mark.parametrize("count", [6, 5], ids=["even", "odd"])
def test_revlib_couplings_and_arguments(count: int) -> None:
    def make(mode: Any) -> nn.Module:
        torch.manual_seed(3)
        return revlib.ReversibleSequential(
            *[Takes() for _ in range(count)],
            split_dim=-1, memory_mode=mode, coupling_forward=[None, half], coupling_inverse=[None, unhalf],
        ).double()  # fmt: skip

    x, scale = torch.randn(2, 8, 8, dtype=torch.float64)
    model = make(revlib.MemoryModes.autograd_function)
    rev = train(model, lambda m: m(x, scale[:, :4], shift=0.5).square().mean(), reverse=True)
    off = make(revlib.MemoryModes.no_savings)
    plain = train(off, lambda m: m(x, scale[:, :4], shift=0.5).square().mean(), reverse=False)
    assert_alike(plain, rev, 1e-9)
    assert max(rev.calls) == 2
    assert rev.share < 0.5


@pytest.mark.parametrize("kind", ["momentum_net", "module_list", "modules"])
def test_revlib_momentum_nets_and_modules_by_hand(kind: str) -> None:
    from revlib import utils

    def make(mode: Any) -> nn.Module:
        torch.manual_seed(3)
        nets = [Count(nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 4))) for _ in range(6)]
        if kind == "momentum_net":
            return utils.momentum_net(*nets, split_dim=-1, memory_mode=mode).double()
        if kind == "module_list":
            return utils.module_list_to_momentum_net(nn.ModuleList(nets), memory_mode=mode, beta=0.9).double()
        saves = mode != revlib.MemoryModes.no_savings
        return nn.ModuleList([revlib.ReversibleModule(net, memory_savings=saves) for net in nets]).double()

    x = torch.randn(8, 4 if kind == "module_list" else 8, dtype=torch.float64)

    def loss(model: Any) -> Tensor:
        if kind == "momentum_net":
            return model(x).square().mean()
        if kind == "module_list":
            y = x
            for module in model:
                y = module(y)
            return y.square().mean()
        streams = (x[:, :4] * 1, x[:, 4:] * 1, torch.zeros(8, 4), torch.zeros(8, 4))
        for module in model:
            streams = module(streams)
        return revlib.core.replace_grad(*streams)[1].square().mean() if len(streams) == 4 else streams[1].square().mean()

    rev = train(make(revlib.MemoryModes.autograd_function), loss, reverse=True)
    assert_alike(train(make(revlib.MemoryModes.no_savings), loss, reverse=False), rev, 1e-9)
    assert max(rev.calls) == 2
    assert rev.share < 0.6


def test_revlib_that_steps_during_backward_is_left_alone() -> None:
    torch.manual_seed(3)
    nets = [Count(nn.Linear(4, 4)) for _ in range(4)]
    model = revlib.ReversibleSequential(*nets, split_dim=-1, fused_optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    before = [p.clone() for p in model.parameters()]
    x = torch.randn(8, 8).requires_grad_()
    with revhooks.reversible() as run:
        model(x).square().mean().backward()
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    assert run.stats.frames == 0
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# -- momentumnet


def functions(residual: bool) -> list[nn.Module]:
    c = CHANNELS
    return [
        Count(nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c), nn.Tanh(), nn.Dropout(0.1), nn.Conv2d(c, c, 1)))
        for _ in range(8 if residual else 5)
    ]


@DTYPES
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("init", [True, False])
def test_momentumnet_with_backpropagation(init: bool, residual: bool, dtype: torch.dtype) -> None:
    options = {"init_speed": True, "init_function": nn.Conv2d(CHANNELS, CHANNELS, 1)} if init else {}
    model = momentumnet.MomentumNet(functions(residual), gamma=0.9, is_residual=residual, **options).to(dtype)
    rev = compare(model, square_of(images(dtype)[:, :CHANNELS]), tol=TOLERANCE[dtype])
    assert rev.share < 0.5


def by_fraction(network: Any, x: Tensor) -> Tensor:
    """What the network without backpropagation computes, with its fraction near gamma."""
    ratio = int(network.gamma * 2**16 + 1) / 2**16
    v = network.init_function(x) if network.init_speed else torch.zeros_like(x)
    for function in network.functions:
        f = function(x) if network.is_residual else function(x) - x
        v = ratio * v + (1 - network.gamma) * f
        x = x + v
    return x


@DTYPES
@pytest.mark.parametrize("residual", [True, False])
def test_momentumnet_without_backpropagation(residual: bool, dtype: torch.dtype) -> None:
    model = momentumnet.MomentumNet(functions(residual), gamma=0.9, is_residual=residual, use_backprop=False).to(dtype)
    x = images(dtype)[:, :CHANNELS]
    rev = compare(model, square_of(x), plain=lambda m: by_fraction(m.network, x.clone()).square().mean(), tol=TOLERANCE[dtype])
    assert rev.share < 0.5
    torch.manual_seed(0)
    theirs = model(x)
    torch.manual_seed(0)
    with revhooks.reversible():
        assert torch.allclose(model(x), theirs, rtol=1e-5, atol=1e-5)


def test_momentumnet_with_one_function_many_times() -> None:
    net = Count(nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4)))
    model = momentumnet.MomentumNet([net] * 6, gamma=0.9).double()
    rev = compare(model, square_of(torch.randn(8, 4, dtype=torch.float64)), evaluations=12)
    assert rev.share < 0.5


def test_momentumnet_passes_arguments_and_what_does_not_invert() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Count(nn.Linear(4, 4))

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.net(x) * scale

    x, scale = torch.randn(2, 8, 4, dtype=torch.float64)
    for gamma in (0.5, 0.0):
        model = momentumnet.MomentumNet([Scaled() for _ in range(4)], gamma=gamma).double()
        given = nn.Parameter(scale.clone())
        model.scale = given
        compare(model, lambda m: m(x, m.scale).square().mean())


# -- PyTorch Geometric


@functools.cache
def digits() -> tuple[Tensor, Tensor, Tensor]:
    """A graph of written digits, each with its four nearest: 16 features in [-1, 1], edges, labels."""
    from sklearn.datasets import load_digits
    from sklearn.neighbors import kneighbors_graph

    data = load_digits()
    x = torch.from_numpy(data.images[:60]).reshape(60, 4, 2, 4, 2).mean((2, 4)).flatten(1) / 8 - 1
    near = kneighbors_graph(x.numpy(), 4).tocoo()
    edges = torch.stack([torch.from_numpy(ends).long() for ends in (near.row, near.col)])
    return x.to(DEVICE), edges.to(DEVICE), torch.from_numpy(data.target[:60]).to(DEVICE)


class Conv(nn.Module):
    """A graph convolution with a mask that its layers share."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.lin = nn.Linear(width, width)

    def forward(self, x: Tensor, edge_index: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.norm(x).relu()
        if mask is not None:
            x = x * mask
        row, col = edge_index
        return self.lin(torch.zeros_like(x).index_add(0, row, x[col]))


@DTYPES
@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_reversible_graph_networks(groups: int, dtype: torch.dtype) -> None:
    def make(disable: bool) -> nn.ModuleList:
        torch.manual_seed(3)
        convs = [nn.ModuleList([Count(Conv(16 // groups)) for _ in range(groups)]) for _ in range(6)]
        return nn.ModuleList([rev_gnn.GroupAddRev(one, disable=disable) for one in convs]).to(dtype)

    x, edges, _ = digits()
    x = x.to(dtype)

    def loss(model: Any) -> Tensor:
        mask = (torch.rand(60, 16) > 0.2).to(dtype) / 0.8
        y = x * 1
        for layer in model:
            y = layer(y, edges, mask)
        return y.square().mean()

    rev = train(make(False), loss, reverse=True)
    assert_alike(train(make(True), loss, reverse=False), rev, TOLERANCE[dtype])
    assert max(rev.calls) == 2
    assert rev.share < 0.3
    assert rev.peak < 0.35


class Layer(nn.Module):
    """Of the library's own example."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv = SAGEConv(width, width)

    def forward(self, x: Tensor, edge_index: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.norm(x).relu()
        return self.conv(x * mask if self.training and mask is not None else x, edge_index)


class RevGNN(nn.Module):
    def __init__(self, *, disable: bool) -> None:
        super().__init__()
        self.lin1, self.norm, self.lin2 = nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 10)
        self.convs = nn.ModuleList([rev_gnn.GroupAddRev(Layer(16), num_groups=2, disable=disable) for _ in range(8)])

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = self.lin1(x)
        mask = torch.zeros_like(x).bernoulli_(0.5).requires_grad_(False) / 0.5
        for conv in self.convs:
            x = conv(x, edge_index, mask)
        return self.lin2(nn.functional.dropout(self.norm(x).relu(), 0.5, self.training))


def test_the_example_of_pytorch_geometric() -> None:
    models = [RevGNN(disable=disable) for disable in (False, True)]
    models[1].load_state_dict(models[0].state_dict())
    x, edges, labels = digits()

    def loss(model: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(model(x.float(), edges), labels)

    rev = train(models[0], loss, reverse=True)
    assert_alike(train(models[1], loss, reverse=False), rev, 1e-5)
    assert rev.share < 0.25
    assert rev.stats.inversions
    assert rev.stats.second_evaluations == 0


def test_graph_networks_train_through_their_inverse_and_by_the_seed_alone() -> None:
    x, edges, _ = digits()
    models = [rev_gnn.GroupAddRev(Count(Conv(8)).double(), num_groups=2, disable=disable) for disable in (False, True)]
    models[1].load_state_dict(models[0].state_dict())

    def loss(model: Any) -> Tensor:
        return model.inverse(model.inverse(x * 1, edges), edges).square().mean()

    rev = train(models[0], loss, reverse=True)
    assert_alike(train(models[1], loss, reverse=False), rev, 1e-9)
    assert max(rev.calls) <= 4  # of two calls


# -- all of them

Case = tuple[nn.Module, Tensor, Callable[[nn.Module, Tensor], Tensor], Callable[[nn.Module, Tensor], Tensor]]


def chain_case(name: str) -> Case:
    def plain(model: nn.Module, x: Tensor) -> Tensor:
        return plain_of(name, x)(model)

    model = CHAINS[name]([conv() for _ in range(6)]).double().eval()
    return model, images(torch.float64), lambda m, x: m(x * 1).square().mean(), plain


def momentum_case() -> Case:
    model = momentumnet.MomentumNet(functions(True), gamma=0.9, use_backprop=False).double().eval()
    x = images(torch.float64)[:, :CHANNELS]
    return model, x, lambda m, x: m(x * 1).square().mean(), lambda m, x: by_fraction(m.network, x).square().mean()


def graph_case() -> Case:
    model = rev_gnn.GroupAddRev(Conv(8), num_groups=2).double()
    x, edges, _ = digits()
    return model, x.clone(), lambda m, x: m(x * 1, edges).square().mean(), lambda m, x: m._forward(x, edges).square().mean()


MODELS: dict[str, Callable[[], Case]] = {
    **{name: lambda name=name: chain_case(name) for name in CHAINS},  # type: ignore[misc]
    "momentumnet": momentum_case,
    "torch_geometric": graph_case,
}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_gradients(name: str) -> None:
    """Which the functions of these libraries do not have."""
    model, x, loss, plain = MODELS[name]()
    found = []
    for reverse in (False, True):
        lead = x.clone().requires_grad_()
        with revhooks.reversible() if reverse else contextlib.nullcontext():
            (grad,) = torch.autograd.grad((loss if reverse else plain)(model, lead), lead, create_graph=True)
            found.append(torch.autograd.grad(grad.square().sum(), [*model.parameters()], allow_unused=True))
    assert any(grad is not None for grad in found[0])
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("name", MODELS)
def test_models_are_left_as_they_are(name: str) -> None:
    model, x, loss, _ = MODELS[name]()
    keys, attributes = list(model.state_dict()), {id(m): set(vars(m)) for m in model.modules()}
    with revhooks.reversible() as run:
        loss(model, x).backward()
        assert run.stats.frames
        twin = copy.deepcopy(model)
        loss(twin, x).backward()
    assert list(model.state_dict()) == keys
    assert {id(m): set(vars(m)) for m in model.modules()} == attributes
    other = pickle.loads(pickle.dumps(model)) if "revlib" not in name else model  # lambdas of its own
    assert list(other.state_dict()) == keys
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert a.grad is not None
        assert torch.allclose(a.grad, b.grad)


def nodes(value: Tensor) -> list[str]:
    """What the graph of a value is made of."""
    found, stack = [], [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None:
            found.append(node.name())
            stack += [before for before, _ in node.next_functions]
    return sorted(found)


@pytest.mark.parametrize("name", MODELS)
def test_without_adapters_the_library_runs_as_it_is(name: str) -> None:
    model, x, loss, _ = MODELS[name]()
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
    with revhooks.reversible(adapters=False) as run:
        inside = loss(model, x.clone().requires_grad_())
        assert run.stats.frames == 0
    outside = loss(model, x.clone().requires_grad_())
    assert nodes(inside) == nodes(outside)


LIBRARIES = ("memcnn", "momentumnet", "revlib", "revtorch", "torch_geometric")


@pytest.mark.parametrize("library", LIBRARIES)
def test_tables_name_classes_that_are_there(library: str) -> None:
    import importlib

    for block in adapter_of(library).blocks:
        module = importlib.import_module(block.module)
        assert block.names
        assert all(isinstance(getattr(module, name), type) for name in block.names)
        assert block.why or block.how == "invert"


def test_what_its_user_registers_wins() -> None:
    adapter_of("memcnn").install()
    cls = memcnn.AdditiveCoupling
    assert entry_of(cls, "forward").adapter == "memcnn"
    revhooks.register(cls, inverse="inverse")
    try:
        assert not entry_of(cls, "forward").adapter
        x = images(torch.float64)
        model = CHAINS["memcnn, bare"]([conv() for _ in range(6)]).double()
        rev = compare(model, square_of(x), plain=plain_of("memcnn, bare", x))
        assert any("AdditiveCoupling" in kept.what for kept in rev.held.kept)
    finally:
        revhooks.unregister(cls, method="forward")
        for block in adapter_of("memcnn").blocks:
            if "AdditiveCoupling" in block.names:
                block.register(cls, "memcnn")
    assert entry_of(cls, "forward").adapter == "memcnn"


# -- twins


class Owner(nn.Module):
    """Whose coupling is a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        nets = [nn.Linear(4, 4) for _ in range(4)]
        self.body = revlib.ReversibleSequential(*nets, split_dim=-1, coupling_forward=[self.mix], coupling_inverse=[self.unmix])

    def mix(self, x: Tensor, update: Tensor) -> Tensor:
        return half(x, update)

    def unmix(self, y: Tensor, update: Tensor) -> Tensor:
        return unhalf(y, update)


@pytest.mark.parametrize("make", [Owner, *(lambda name=name: MODELS[name]()[0] for name in MODELS)], ids=["owner", *MODELS])
def test_a_twin_goes_with_its_block(make: Callable[[], Any]) -> None:
    model = make()
    with revhooks.reversible():
        if isinstance(model, Owner):
            model.body(torch.randn(2, 8)).sum().backward()
        elif isinstance(model, rev_gnn.GroupAddRev):
            model(*digits()[:2]).sum().backward()
        else:
            x = images(torch.float64)
            model(x[:, :CHANNELS] if isinstance(model, momentumnet.MomentumNet) else x * 1).sum().backward()
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_a_branch_that_is_replaced_is_seen() -> None:
    model = memcnn_chain([conv() for _ in range(4)]).double().eval()
    x = images(torch.float64)
    with revhooks.reversible():
        model(x * 1).sum().backward()
    model[0]._fn.Fm = conv().double().eval()
    with revhooks.reversible():
        y = model(x * 1)
    assert torch.equal(y, additive([fn for b in model for fn in (b._fn.Fm, b._fn.Gm)], x))


def test_hooks_on_what_a_twin_does_not_call_fire() -> None:
    seen: list[nn.Module] = []
    model = revtorch_chain([nn.Linear(4, 4) for _ in range(4)])
    model.reversible_blocks[1].register_forward_hook(lambda module, *_: seen.append(module))
    with revhooks.reversible():
        model(torch.randn(2, 8).requires_grad_()).sum().backward()
    assert seen == [model.reversible_blocks[1]]


def test_what_is_no_tensor_goes_the_way_of_its_library() -> None:
    class Lists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 4)

        def forward(self, x: Any) -> Any:
            return [self.net(x[0] if isinstance(x, list) else x), torch.ones(1)]

    model = nn.ModuleList([revlib.ReversibleModule(Lists(), memory_savings=False)])
    with revhooks.reversible():
        x1, y1 = model[0](tuple(torch.randn(2, 3, 4)))
    assert isinstance(y1, list)
    assert x1.shape == y1[0].shape


def test_blocks_are_called_by_the_names_of_theirs() -> None:
    model = memcnn_chain([conv() for _ in range(4)])
    with revhooks.reversible() as run:
        y = model(images(torch.float32))
        assert {kept.what.split("(")[1] for kept in run.stats.kept if "block" in kept.what} == {"AdditiveCoupling)"}
    del y
