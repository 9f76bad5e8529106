"""Flows: the inverse direction of every layer, splines, masks, autoregression, ready models, and torch.distributions."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributions import (
    Categorical,
    Dirichlet,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
    Uniform,
)

import revhooks
from revhooks import flows
from revhooks import nn as rnn
from revhooks.errors import RegistrationError, ShapeError
from revhooks.functional import Law, additive, additive_inverse, affine_law, spline_law
from revhooks.registry import registered
from tests.conftest import Count, assert_same, step
from tests.devices import DEVICE, generator
from tests.test_nn_mixing import Case, D, everywhere, example, likelihood

# -- the inverse direction of every layer


class Back(nn.Module):
    """A chain of one layer by ``inverse_and_ladj``, as variational training calls it, or by ``inverse``."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...], depth: int, ladj: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(shape[1:], dtype=D))
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(depth))
        self.ladj = ladj

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x = y * self.scale
        total = torch.zeros(len(y), dtype=D)
        for layer in self.layers:
            if self.ladj:
                x, ladj = layer.inverse_and_ladj(x)
                total = total + ladj
            else:
                x = layer.inverse(x)
        return x, total


@everywhere
def test_inverse_and_ladj(case: Case) -> None:
    layer, x = example(case)
    y, ladj = layer.call_and_ladj(x)
    back, inverse_ladj = layer.inverse_and_ladj(y)
    assert torch.allclose(back, x, rtol=1e-10, atol=1e-10)
    assert torch.allclose(back, layer.inverse(y), rtol=1e-12, atol=1e-12)
    assert inverse_ladj.shape == (len(x),)
    assert inverse_ladj.dtype == D
    assert torch.allclose(inverse_ladj, -ladj, rtol=1e-9, atol=1e-9)


SQUASHING = {"sigmoid", "tanh", "softplus", "logit", "logit without margin", "flow", "nested flow"}


@everywhere
@pytest.mark.parametrize("ladj", [True, False])
def test_gradients_of_the_inverse(case: Case, ladj: bool) -> None:
    layer, x = example(case)
    y = layer(x).detach()
    chained = y.shape == x.shape and case.name not in SQUASHING
    if chained:
        y = 1.9 * y / y.abs().max()  # within the domain of the next one's, and not where a spline ends
    for count in (module for module in layer.modules() if isinstance(module, Count)):
        count.calls = 0
    y.requires_grad_()
    model = Back(layer, tuple(y.shape), 3 if chained else 1, ladj)
    plain, rev = (step(model, y, reverse=reverse, loss=likelihood) for reverse in (False, True))
    assert_same(plain, rev, 1e-10)
    assert set(rev.calls) <= {1, 2}
    assert rev.stats is not None
    assert rev.stats.held_bytes == rev.stats.second_evaluations == 0
    if any(registered(type(module)) for module in layer.modules()):
        assert rev.stats.frames >= len(model.layers)  # each is bracketed, or each of its parts


def directions(depth: int, make: Callable[[], list[nn.Module]]) -> list[nn.Module]:
    """A flow to be trained by data, and one to be trained by samples."""

    class ByData(rnn.FlowSequential):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.call_and_ladj(x)

    class BySamples(rnn.FlowSequential):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.inverse_and_ladj(x)

    torch.manual_seed(3)
    flow = rnn.FlowSequential(*[layer for _ in range(depth) for layer in make()]).double()
    flow(torch.randn(64, 6, 4, 4, dtype=D))
    for module in flow.modules():
        if isinstance(module, Count):
            module.calls = 0
    return [ByData(*flow), BySamples(*flow)]


def glow_step() -> list[nn.Module]:
    return [rnn.ActNorm(6), rnn.InvertibleConv1x1(6), rnn.AffineCoupling(Count(rnn.ConvNet(3, 6, 16)), scale="sigmoid")]


def spline_step() -> list[nn.Module]:
    net = rnn.ConvNet(3, 33, 16)
    nn.init.normal_(net.net[-1].weight, std=0.1)
    return [rnn.Permute(6), rnn.SplineCoupling(Count(net), sizes=(3, 3), bins=4)]


@pytest.mark.parametrize("make", [glow_step, spline_step])
def test_training_by_samples_holds_no_more_than_training_by_data(make: Callable[[], list[nn.Module]]) -> None:
    """Of a deep flow next to nothing is held in either direction, and each branch is evaluated twice."""
    held: list[list[int]] = []
    for depth in (4, 8):
        by_both = []
        for model in directions(depth, make):
            x = torch.randn(16, 6, 4, 4, dtype=D)
            plain, rev = (step(model, x, reverse=reverse, loss=likelihood) for reverse in (False, True))
            assert_same(plain, rev, 1e-10)
            assert sorted(rev.calls)[1:] == [2] * (depth - 1)  # the newest may be kept
            assert rev.stats is not None
            assert rev.stats.second_evaluations == 0
            assert rev.held_after_forward < rev.stats.packed_bytes / (depth / 2)
            by_both.append(rev.held_after_forward)
        held.append(by_both)
    (data, samples), (deep_data, deep_samples) = held
    assert samples < 1.3 * data
    assert deep_samples < 1.3 * deep_data
    assert deep_samples < 1.3 * samples  # twice as deep


@pytest.mark.parametrize("terms", [None, 5])
def test_residual_block_by_samples(terms: int | None) -> None:
    """The fixed point of an i-ResNet block is differentiated by its implicit function, its log-abs-det at the point found."""
    net = nn.Sequential(nn.Linear(3, 8), nn.ELU(), nn.Linear(8, 3))
    block = rnn.InvertibleResidual(net, 0.6, terms=terms).double().eval()
    x = torch.randn(4, 3, dtype=D)
    y = block(x).detach()
    torch.manual_seed(0)
    ladj = block.call_and_ladj(x)[1]
    torch.manual_seed(0)
    back, inverse_ladj = block.inverse_and_ladj(y)
    assert torch.allclose(back, x, atol=1e-9)
    assert torch.allclose(inverse_ladj, -ladj, atol=1e-8)
    jacobian = torch.autograd.functional.jacobian(lambda one: block(one[None])[0], x[0])
    if terms is None:
        assert torch.allclose(inverse_ladj[0], -torch.linalg.slogdet(jacobian)[1], atol=1e-8)
    plain, rev = (step(Back(block, (4, 3), 2, True), y, reverse=reverse, loss=likelihood) for reverse in (False, True))
    assert_same(plain, rev, 1e-7)


# -- splines


@pytest.mark.parametrize("bins", [2, 5, 16])
def test_spline(bins: int) -> None:
    law, bound = spline_law(bins, 3.0, dim=-1), 3.0
    u = torch.randn(1, 3 * bins - 1, dtype=D)
    x = torch.linspace(-4, 4, 40001, dtype=D)[:, None]
    y, ladj = law.call_and_ladj(x, u.expand(len(x), -1))  # type: ignore[misc]
    outside = x.abs() > bound
    assert torch.equal(y[outside], x[outside])
    assert not ladj[outside].any()
    assert (y.diff(dim=0) > 0).all()
    assert (y[~outside].abs() <= bound + 1e-12).all()
    slopes = (y[2:] - y[:-2]) / (x[2:] - x[:-2])  # continuous, slopes too: finite differences see no step
    assert (slopes.log() - ladj[1:-1]).abs().quantile(0.999) < 0.02
    back, inverse_ladj = law.inverse_and_ladj(y, u.expand(len(x), -1))  # type: ignore[misc]
    assert torch.allclose(back, x, atol=1e-9)
    assert torch.allclose(inverse_ladj, -ladj, atol=1e-6)


def test_spline_at_its_knots_and_ends() -> None:
    """Values, slopes and gradients are finite and meet from both sides where pieces meet."""
    law, u = spline_law(4, 3.0, dim=-1), torch.randn(1, 11, dtype=D, requires_grad=True)
    widths = 1e-3 + (1 - 4e-3) * u[:, :4].detach().softmax(-1)
    knots = torch.cat([torch.zeros(1, 1, dtype=D), widths.cumsum(-1)], -1) * 6 - 3
    for knot in knots[0]:
        places = torch.stack([knot - 1e-9, knot, knot + 1e-9])[:, None].clone().requires_grad_()
        y, ladj = law.call_and_ladj(places, u.expand(3, -1))  # type: ignore[misc]
        assert torch.allclose(y, y[1].expand(3, 1), atol=1e-7)
        assert torch.allclose(ladj, ladj[1].expand(3, 1), atol=1e-6)
        gradients = torch.autograd.grad(y.sum() + ladj.sum(), (places, u))
        back = law.inverse(y.detach().requires_grad_(), u.expand(3, -1))
        gradients += torch.autograd.grad(back.sum(), u)
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert torch.allclose(back, places, atol=1e-9)


def test_spline_of_zeros_is_the_identity() -> None:
    x = 3 * torch.randn(50, 2)
    y, ladj = spline_law(8, dim=-1).call_and_ladj(x, torch.zeros(50, 46))  # type: ignore[misc]
    assert torch.allclose(y, x, atol=1e-5)
    assert torch.allclose(ladj, torch.zeros(50, 2), atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
def test_spline_of_wild_parameters(scale: float) -> None:
    """Steep and flat pieces in float32: nothing is infinite or no number, in either direction, gradients included."""
    law, bound = spline_law(8), 5.0
    u = (scale * torch.randn(200, 46)).requires_grad_()
    x = (2 * bound * torch.rand(200, 2) - bound).requires_grad_()
    for both in (law.call_and_ladj, law.inverse_and_ladj):
        y, ladj = both(x, u)  # type: ignore[misc]
        assert y.isfinite().all()
        assert ladj.isfinite().all()
        assert (y.abs() <= bound * (1 + 1e-3)).all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum() + ladj.sum(), (x, u)))


def test_spline_of_half_precision_is_computed_in_float32() -> None:
    law, u = spline_law(4), torch.randn(9, 22, dtype=torch.bfloat16)
    x = torch.randn(9, 2, dtype=torch.bfloat16)
    y, ladj = law.call_and_ladj(x, u)  # type: ignore[misc]
    exact, exact_ladj = law.call_and_ladj(x.float(), u.float())  # type: ignore[misc]
    assert torch.equal(y, exact.bfloat16())
    assert torch.equal(ladj, exact_ladj)


def test_spline_refuses() -> None:
    with pytest.raises(ShapeError, match="2 to 500 bins, got 1"):
        spline_law(1)
    with pytest.raises(ShapeError, match=r"a bound > 0, got -1\.0"):
        rnn.SplineCoupling(nn.Linear(1, 1), bound=-1.0)
    with pytest.raises(ShapeError, match=r"a branch output of size 46 along dim 1: 3 \* 8 - 1 times the stream's, got shape"):
        rnn.SplineCoupling(nn.Linear(2, 4))(torch.randn(3, 4))


def test_laws_are_pickled() -> None:
    x, u = torch.randn(3, 2), torch.randn(3, 46)
    for law, width in ((affine_law("exp"), 4), (spline_law(8), 46)):
        assert torch.equal(pickle.loads(pickle.dumps(law)).forward(x, u[:, :width]), law.forward(x, u[:, :width]))


# -- masks


def test_checkerboard() -> None:
    assert rnn.checkerboard(4).tolist() == [True, False, True, False]
    board = rnn.checkerboard(3, 4)
    assert (board[1:] ^ board[:-1]).all()
    assert (board[:, 1:] ^ board[:, :-1]).all()


@pytest.mark.parametrize("mask", [rnn.checkerboard(4, 6), torch.tensor([True, False, False]).view(3, 1, 1)])
def test_masked_coupling_changes_what_is_outside(mask: Tensor) -> None:
    net = rnn.ConvNet(3, 6, 8)
    nn.init.normal_(net.net[-1].weight)
    layer, x = rnn.MaskedCoupling(net, mask).double(), torch.randn(2, 3, 4, 6, dtype=D)
    y = layer(x)
    stays = mask.expand(3, 4, 6)
    assert torch.equal(y[:, stays], x[:, stays])
    assert (y[:, ~stays] != x[:, ~stays]).all()
    moved = torch.where(stays, x, x + 1.0)  # what changes does not condition
    assert torch.allclose((layer(moved) - y)[:, ~stays], net_scale(layer, x)[:, ~stays])


def net_scale(layer: rnn.MaskedCoupling, x: Tensor) -> Tensor:
    return layer.f(torch.where(layer.mask, x, 0.0)).chunk(2, 1)[0].tanh().exp()


def test_masked_coupling_over_a_half_is_an_affine_coupling() -> None:
    net, x = nn.Linear(2, 4).double(), torch.randn(5, 4, dtype=D)

    class Whole(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raw, shift = net(x[:, 2:]).chunk(2, 1)
            return torch.cat([raw, raw, shift, shift], 1)

    masked = rnn.MaskedCoupling(Whole(), torch.tensor([False, False, True, True]))
    for one, other in zip(masked.call_and_ladj(x), rnn.AffineCoupling(net).call_and_ladj(x), strict=True):
        assert torch.allclose(one, other)


def test_masked_coupling_refuses() -> None:
    with pytest.raises(ShapeError, match=r"a mask of booleans, got torch\.float32"):
        rnn.MaskedCoupling(nn.Linear(2, 4), torch.ones(2))
    with pytest.raises(ShapeError, match=r"samples that a mask of shape \(3,\) fits, got shape \(5, 2\)"):
        rnn.MaskedCoupling(nn.Linear(2, 4), rnn.checkerboard(3))(torch.randn(5, 2))
    for coupling in ("cubic", Law(additive, additive_inverse)):
        with pytest.raises(ShapeError, match=r"'spline' or a revhooks\.functional\.Law with call_and_ladj"):
            rnn.MaskedCoupling(nn.Linear(2, 4), rnn.checkerboard(2), coupling=coupling)


# -- autoregression


@pytest.mark.parametrize(("context", "order"), [(0, (0, 1, 2, 3, 4)), (0, (3, 1, 4, 0, 2)), (2, (4, 2, 0, 1, 3))])
def test_made_sees_what_comes_before(context: int, order: tuple[int, ...]) -> None:
    """A feature's numbers depend on every feature before it, on no other, and on the context."""
    net = rnn.MADE(5, 3, (32, 32), context=context, order=order).double()
    nn.init.normal_(net.net[-1].weight)
    conditions = (torch.randn(1, context, dtype=D),) if context else ()
    jacobian = torch.autograd.functional.jacobian(net, (torch.randn(1, 5, dtype=D), *conditions))
    by_features = jacobian[0].reshape(3, 5, 5)
    rank = {feature: place for place, feature in enumerate(order)}
    before = torch.tensor([[rank[source] < rank[target] for source in range(5)] for target in range(5)])
    assert torch.equal((by_features != 0).any(0), before)
    if context:
        assert (jacobian[1] != 0).any(-1).all()


def test_made_of_one_feature() -> None:
    net = rnn.MADE(1, 2, (8,), context=2)
    nn.init.normal_(net.net[-1].weight)
    c = torch.randn(4, 2)
    assert torch.equal(net(torch.zeros(4, 1), c), net(torch.ones(4, 1), c))
    assert not torch.equal(net(torch.zeros(4, 1), c), net(torch.zeros(4, 1), c + 1))


def test_maf_is_replayed() -> None:
    """Gradients are those of plain autograd to the last bit, and the networks are evaluated twice; sampling is trained, too."""
    layers = [rnn.MaskedAutoregressive(rnn.MADE(3, 2, (16,))) for _ in range(4)]
    for layer in layers:
        nn.init.normal_(layer.net.net[-1].weight, std=0.3)
        layer.net = Counted(layer.net)
    x = torch.randn(8, 3)
    for model, passes in zip(Both_of(layers), (1, 3), strict=True):
        plain, rev = (step(model, x, reverse=reverse, loss=likelihood) for reverse in (False, True))
        assert_same(plain, rev, 0.0)
        assert sorted(rev.calls) == [passes, *[2 * passes] * 3]
        assert rev.stats is not None
        assert rev.held_after_forward < rev.stats.packed_bytes / 2


class Counted(Count):
    """Counts, and is a `MADE` otherwise."""

    @property
    def features(self) -> int:
        return self.net.features  # type: ignore[no-any-return, union-attr]

    @property
    def order(self) -> Tensor:
        return self.net.order  # type: ignore[no-any-return, union-attr]


def Both_of(layers: list[nn.Module]) -> list[nn.Module]:
    class ByData(rnn.FlowSequential):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.call_and_ladj(x)

    return [ByData(*layers), ByData(*[rnn.Inverse(layer) for layer in reversed(layers)])]


def test_autoregression_refuses() -> None:
    with pytest.raises(ShapeError, match=r"an order of the features 0 \.\.\. 2"):
        rnn.MADE(3, 2, order=(0, 1, 1))
    with pytest.raises(ShapeError, match="a network with features and order, as MADE has, got Linear"):
        rnn.MaskedAutoregressive(nn.Linear(2, 4))
    with pytest.raises(ShapeError, match=r"an input \(B, 3\), got shape \(4, 2\)"):
        rnn.MaskedAutoregressive(rnn.MADE(3, 2))(torch.randn(4, 2))


# -- contexts, permutations, ActNorm


def test_conditioners_take_a_context_and_start_at_zero() -> None:
    for net, x in ((rnn.MLP(3, 5, context=2), torch.randn(4, 3)), (rnn.ConvNet(3, 5, 8, context=2), torch.randn(4, 3, 6, 5))):
        context = torch.randn(4, 2)
        assert not net(x, context).any()
        nn.init.normal_(net.net[-1].weight)
        assert not torch.equal(net(x, context), net(x, context + 1))
        with pytest.raises(ShapeError, match=r"a context of shape \(4, 2\), got none"):
            net(x)
        with pytest.raises(ShapeError, match=r"a context of shape \(4, 2\), got shape \(4, 3\)"):
            net(x, torch.randn(4, 3))
    wide = torch.randn(4, 2, 1, 1).expand(4, 2, 6, 5)
    assert torch.allclose(net(x, wide), net(x, wide[:, :, 0, 0]))
    with pytest.raises(ShapeError, match="MLP: expected no context, got shape"):
        rnn.MLP(3, 5)(torch.randn(4, 3), torch.randn(4, 2))


def test_generators() -> None:
    """What is drawn from a generator is drawn again from one of the same seed."""
    for make in (
        lambda g: rnn.Permute(20, generator=g).permutation,
        lambda g: rnn.InvertibleLinear(5, generator=g).matrix(),
        lambda g: rnn.InvertibleConv1x1(5, lu=False, generator=g).matrix(),
        lambda g: flows.RealNVP(9, generator=g).transform[2].permutation,
        lambda g: flows.NSF(9, generator=g).transform[2].permutation,
        lambda g: flows.MAF(9, generator=g).transform[2].permutation,
        lambda g: flows.Glow((3, 4, 4), 1, 1, 4, generator=g).transform.stages[0][2].matrix(),
    ):
        assert torch.equal(make(generator(1)), make(generator(1)))
        assert not torch.equal(make(generator(1)), make(generator(2)))
    with pytest.raises(ShapeError, match="a size of 1 or more, got 0"):
        rnn.Permute(0)


def test_actnorm_that_was_trained_by_its_inverse_is_not_set_anew() -> None:
    layer, y = rnn.ActNorm(3), torch.randn(8, 3)
    with torch.no_grad():
        layer.inverse(y)
    assert not layer.initialized  # a look at samples changes nothing
    layer.inverse_and_ladj(y)[0].sum().backward()
    assert layer.initialized
    assert torch.equal(layer(5 + y), 5 + y)


# -- ready models


class Made(NamedTuple):
    name: str
    make: Callable[..., flows.Flow]
    shape: tuple[int, ...]
    context: int = 0


MADE_BY = [
    Made("realnvp", lambda **o: flows.RealNVP(4, transforms=3, hidden=(8,), **o), (4,)),
    Made("realnvp odd", lambda **o: flows.RealNVP(5, 3, 2, (8,), **o), (5,), 3),
    Made("nsf", lambda **o: flows.NSF(3, transforms=2, hidden=(8,), bins=4, **o), (3,)),
    Made("nsf of two", lambda **o: flows.NSF(2, 2, 2, (8,), bins=4, bound=3.0, **o), (2,), 2),
    Made("maf", lambda **o: flows.MAF(4, transforms=3, hidden=(8,), **o), (4,)),
    Made("maf splines", lambda **o: flows.MAF(3, 2, 2, (8,), bins=4, **o), (3,), 2),
    Made("maf of one", lambda **o: flows.MAF(1, transforms=2, hidden=(8,), bins=4, **o), (1,)),
    Made("glow", lambda **o: flows.Glow((2, 4, 4), 2, 2, 8, **o), (2, 4, 4)),
    Made("glow of a context", lambda **o: flows.Glow((1, 4, 4), 2, 1, 8, context=2, **o), (1, 4, 4), 2),
]
models = pytest.mark.parametrize("made", MADE_BY, ids=[made.name for made in MADE_BY])


def trained(made: Made, dtype: torch.dtype = D) -> tuple[flows.Flow, Tensor, tuple[Tensor, ...]]:
    """A flow past its first call whose branches say something, data and a context."""
    flow = made.make().to(dtype)
    x = torch.randn(6, *made.shape, dtype=dtype)
    context = (torch.randn(6, made.context, dtype=dtype),) if made.context else ()
    with torch.no_grad():
        flow(x, *context)
        for parameter in flow.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return flow, x, context


@models
def test_log_prob_is_the_change_of_variables(made: Made) -> None:
    flow, x, context = trained(made)
    log_prob = flow.log_prob(x, *context)
    assert log_prob.shape == (6,)
    for i in range(2):
        rows = tuple(c[i : i + 1] for c in context)

        def latent(one: Tensor, rows: Any = rows) -> Tensor:
            z = flow.transform(one[None], *rows)
            return torch.cat([part.flatten() for part in (z if isinstance(z, tuple) else (z,))])

        jacobian = torch.autograd.functional.jacobian(latent, x[i]).reshape(x[i].numel(), -1)
        base = Normal(0.0, 1.0).log_prob(latent(x[i])).sum()
        assert torch.allclose(log_prob[i], base + torch.linalg.slogdet(jacobian)[1], rtol=1e-10, atol=1e-9)


@models
def test_samples_have_the_density_that_is_told(made: Made) -> None:
    flow, _, context = trained(made)
    x, log_prob = flow.rsample_and_log_prob(() if context else 6, *context)
    assert x.shape == (6, *made.shape)
    assert x.requires_grad
    assert torch.allclose(flow.log_prob(x, *context), log_prob, rtol=1e-8, atol=1e-8)
    samples = flow.sample((2, 3), *context)
    assert samples.shape == (2, 3, *((6,) if context else ()), *made.shape)
    assert not samples.requires_grad
    assert flow.sample(4, *context).shape[0] == 4


def by_data(flow: flows.Flow, x: Tensor, *context: Tensor) -> Tensor:
    return flow(x, *context)


class BySamples(nn.Module):
    def __init__(self, flow: flows.Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, count: Tensor, *context: Tensor) -> Tensor:
        x, log_prob = self.flow.rsample_and_log_prob(() if context else len(count), *context)
        return log_prob + x.flatten(1).square().sum(1) / 3 + x.flatten(1).sin().sum(1)


@models
@pytest.mark.parametrize("dtype", [D, torch.float32])
def test_both_trainings(made: Made, dtype: torch.dtype) -> None:
    flow, x, context = trained(made, dtype)
    loss: Callable[[Any], Tensor] = lambda output: output.mean()
    for model in (flow, BySamples(flow)):
        plain, rev = (step(model, x, *context, reverse=reverse, loss=loss) for reverse in (False, True))
        assert_same(plain, rev, 1e-10 if dtype is D else 1e-5)
        assert rev.stats is not None
        assert rev.stats.held_bytes == rev.stats.second_evaluations == 0
        assert rev.held_after_forward < 0.8 * rev.stats.packed_bytes


@models
def test_half_precision(made: Made) -> None:
    flow, x, context = trained(made, torch.float32)
    half = copy.deepcopy(flow).bfloat16()
    log_prob = half(x.bfloat16(), *[c.bfloat16() for c in context])
    assert log_prob.dtype is torch.float32
    assert torch.allclose(log_prob, flow(x, *context), rtol=0.2, atol=2.0)
    assert half.sample(3, *[c.bfloat16() for c in context]).dtype is torch.bfloat16


class UnderAutocast(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            return self.model(*args)


@models
def test_autocast(made: Made) -> None:
    """Branches compute in bfloat16, streams, splines and densities in float32, so that what is rebuilt is what was there."""
    flow, x, context = trained(made, torch.float32)
    loss: Callable[[Any], Tensor] = lambda output: output.mean()
    log_prob = UnderAutocast(flow)(x, *context)
    assert log_prob.dtype is torch.float32
    assert torch.allclose(log_prob, flow(x, *context), rtol=0.1, atol=1.0)
    for model in (flow, BySamples(flow)):
        plain, rev = (step(UnderAutocast(model), x, *context, reverse=reverse, loss=loss) for reverse in (False, True))
        assert_same(plain, rev, 1e-3)


@models
def test_models_are_carried_over(made: Made) -> None:
    flow, x, context = trained(made, torch.float32)
    loaded = made.make()
    loaded.load_state_dict(flow.state_dict())
    wide = copy.deepcopy(flow).double()
    expected = flow(x, *context)
    assert wide.log_prob(x.double(), *[c.double() for c in context]).dtype is D
    for other in (loaded, copy.deepcopy(flow)):
        assert torch.equal(other(x, *context), expected)
    if DEVICE.type == "cpu":
        assert torch.equal(pickle.loads(pickle.dumps(flow))(x, *context), expected)
    assert repr(flow)


@pytest.mark.parametrize("made", [made for made in MADE_BY if made.shape == (2,)] + [
    Made("realnvp", lambda: flows.RealNVP(2, transforms=3, hidden=(8,)), (2,)),
    Made("maf", lambda: flows.MAF(2, transforms=2, hidden=(8,), bins=4), (2,)),
], ids=["nsf", "realnvp", "maf"])  # fmt: skip
def test_density_integrates_to_one(made: Made) -> None:
    flow, _, context = trained(made)
    line = torch.linspace(-12, 12, 481, dtype=D)
    grid = torch.cartesian_prod(line, line)
    with torch.no_grad():
        log_prob = flow.log_prob(grid, *[c[:1].expand(len(grid), -1) for c in context])
    assert abs(float(log_prob.exp().sum()) * (24 / 480) ** 2 - 1) < 0.01


def two_moons(count: int) -> Tensor:
    angle, upper = math.pi * torch.rand(count), torch.rand(count) < 0.5
    sign = torch.where(upper, 1.0, -1.0)
    moons = torch.stack([angle.cos() * sign + torch.where(upper, 0.0, 1.0), angle.sin() * sign + torch.where(upper, 0.0, 0.5)], 1)
    return moons + 0.05 * torch.randn(count, 2)


@pytest.mark.parametrize("make", [
    lambda: flows.RealNVP(2, transforms=3, hidden=(32,)),
    lambda: flows.NSF(2, transforms=2, hidden=(32,)),
    lambda: flows.MAF(2, transforms=2, hidden=(32,), bins=8),
], ids=["realnvp", "nsf", "maf"])  # fmt: skip
def test_training_on_two_moons(make: Callable[[], flows.Flow]) -> None:
    flow, optimizer_of = make(), torch.optim.Adam
    held_out = two_moons(512)
    flow(two_moons(512))
    with torch.no_grad():
        before = float(flow(held_out).mean())
    optimizer = optimizer_of(flow.parameters(), lr=1e-2)
    for _ in range(60):
        with revhooks.reversible():
            loss = -flow(two_moons(128)).mean()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
    with torch.no_grad():
        after = float(flow(held_out).mean())
    gaussian = float(MultivariateNormal(held_out.mean(0), held_out.T.cov()).log_prob(held_out).mean())
    assert after > before + 0.3
    assert after > gaussian + 0.3


def test_variational_training() -> None:
    """The reverse divergence to a correlated Gaussian goes to zero."""
    target = MultivariateNormal(torch.tensor([2.0, -1.0]), torch.tensor([[1.0, 0.6], [0.6, 0.5]]))
    flow = flows.RealNVP(2, transforms=2, hidden=(16,))
    optimizer = torch.optim.Adam(flow.parameters(), lr=2e-2)

    def divergence() -> Tensor:
        x, log_prob = flow.rsample_and_log_prob(256)
        return (log_prob - target.log_prob(x)).mean()

    first = divergence().item()
    for _ in range(100):
        with revhooks.reversible():
            loss = divergence()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
    assert first > 1
    assert abs(divergence().item()) < 0.1


def test_models_refuse() -> None:
    with pytest.raises(ShapeError, match=r"2 features or more.*got features=1.*MAF takes a single feature"):
        flows.NSF(1)
    with pytest.raises(ShapeError, match="1 transform or more, got features=3, transforms=0"):
        flows.MAF(3, transforms=0)
    with pytest.raises(ShapeError, match=r"multiples of 2\*\*levels, got shape=\(3, 6, 8\), levels=2"):
        flows.Glow((3, 6, 8), 2)
    flow = flows.RealNVP(2, context=3)
    with pytest.raises(ShapeError, match=r"a context of shape \(5, 3\), got none"):
        flow(torch.randn(5, 2))
    with pytest.raises(ShapeError, match=r"RealNVP: expected a context of 5 rows, as the data, got shape \(4, 3\)"):
        flow(torch.randn(5, 2), torch.randn(4, 3))
    with pytest.raises(ShapeError, match="expected no context"):
        flows.MAF(2)(torch.randn(5, 2), torch.randn(5, 3))
    with pytest.raises(ShapeError, match="a number of samples, or a shape, got -1"):
        flow.sample(-1, torch.randn(1, 3))
    with pytest.raises(ShapeError, match=r"data of shape \(B, \*\)"):
        flow(torch.tensor(1.0))


@pytest.mark.cpu(reason="gloo")
@pytest.mark.filterwarnings("ignore")  # distributed's
def test_a_flow_under_ddp(tmp_path: Path) -> None:
    """Called as a module: hooks of DistributedDataParallel fire, and its gradients are those of the flow."""
    flow, x, context = trained(MADE_BY[1])
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain = step(flow, x, *context, reverse=False)
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(flow))
        with revhooks.reversible():
            wrapped(x, *context).square().mean().backward()
    finally:
        dist.destroy_process_group()
    for parameter, expected in zip(wrapped.parameters(), plain.grads, strict=True):
        assert expected is not None
        assert torch.allclose(parameter.grad, expected, atol=1e-10)


@pytest.mark.cpu(reason="dynamo compiles for the CPU")
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("made", [MADE_BY[i] for i in (1, 2, 5)], ids=["realnvp", "nsf", "maf"])
def test_compiled_models(made: Made) -> None:
    flow, x, context = trained(made)
    compiled = torch.compile(flow, backend="eager")
    assert torch.allclose(compiled(x, *context), flow(x, *context))
    torch.compiler.reset()


# -- Flow and its base


def test_a_flow_of_any_transform() -> None:
    flow = flows.Flow(rnn.SinhArcsinh(3), 3)
    assert torch.allclose(flow(torch.zeros(2, 3)), Normal(0.0, 1.0).log_prob(torch.zeros(3)).sum().expand(2), atol=1e-6)
    with pytest.raises(RegistrationError, match="a transform with a method 'inverse', got Linear"):
        flows.Flow(nn.Linear(2, 2), 2)
    with pytest.raises(ShapeError, match=r"samples of shape \(4,\), got \(3,\)"):
        flows.Flow(rnn.SinhArcsinh(3), 4)(torch.zeros(2, 3))
    with pytest.raises(ShapeError, match=r"Flow: expected 1 latents, got 2 of the transform"):
        flows.Flow(rnn.MultiScale(rnn.ActNorm(4), rnn.ActNorm(2)), [(2,)])(torch.zeros(2, 4))
    with pytest.raises(ShapeError, match="a distribution, or a shape, got 'normal'"):
        flows.Flow(rnn.ActNorm(2), "normal")


def mixture(loc: Tensor) -> MixtureSameFamily:
    return MixtureSameFamily(Categorical(torch.ones(len(loc))), Independent(Normal(loc, torch.ones_like(loc)), 1))


BASES = {
    "normal": lambda: Normal(torch.zeros(3), 2.0),
    "expanded": lambda: Normal(0.0, 1.0).expand([3]),
    "independent": lambda: Independent(Normal(torch.arange(3.0), torch.ones(3)), 1),
    "multivariate": lambda: MultivariateNormal(torch.zeros(3), torch.eye(3) + 0.5),
    "mixture": lambda: mixture(torch.randn(4, 3)),
    "transformed": lambda: TransformedDistribution(
        Normal(torch.zeros(3), torch.ones(3)), [torch.distributions.AffineTransform(torch.ones(3), 2 * torch.ones(3))]
    ),
}


@pytest.mark.parametrize("name", BASES)
def test_bases_follow_their_model(name: str) -> None:
    distribution = BASES[name]()
    flow = flows.Flow(rnn.Permute.reverse(3), distribution)
    x = torch.randn(5, 3)
    expected = distribution.log_prob(x.flip(1))
    expected = expected if expected.dim() == 1 else expected.sum(1)
    assert torch.allclose(flow(x), expected)
    assert flow.sample(7).shape == (7, 3)
    wide = copy.deepcopy(flow).double()
    assert wide(x.double()).dtype is D
    assert wide.sample(2).dtype is D
    assert all(buffer.dtype is D for buffer in wide.buffers() if buffer.is_floating_point())
    state = {key: 2 * value if value.is_floating_point() else value for key, value in flow.state_dict().items()}
    other = flows.Flow(rnn.Permute.reverse(3), BASES[name]())
    other.load_state_dict(flow.state_dict())
    assert torch.equal(other(x), flow(x))
    other.load_state_dict(state)
    assert not torch.allclose(other(x), flow(x))
    assert pickle.loads(pickle.dumps(flow.state_dict())).keys() == flow.state_dict().keys()


def test_a_base_that_is_trained() -> None:
    flow = flows.Flow(rnn.Permute.reverse(3), flows.Base(mixture, loc=nn.Parameter(torch.randn(4, 3))))
    assert [name for name, _ in flow.named_parameters()] == ["bases.0.loc"]
    flow(torch.randn(5, 3)).mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in flow.parameters())
    with pytest.raises(RegistrationError, match=r"a base with rsample, got MixtureSameFamily"):
        flow.rsample_and_log_prob(3)


def test_bases_refuse() -> None:
    with pytest.raises(RegistrationError, match=r"Base: expected tensors that need no grad, got loc that does"):
        flows.Base(Normal(nn.Parameter(torch.zeros(2)), 1.0))
    with pytest.raises(RegistrationError, match="a distribution, or a function and tensors, got a distribution and loc"):
        flows.Base(Normal(0.0, 1.0), loc=torch.zeros(2))
    with pytest.raises(RegistrationError, match="got int"):
        flows.Base(3)


def test_bounded_bases() -> None:
    flow = flows.Flow(rnn.Sigmoid(), Uniform(torch.zeros(2), torch.ones(2)))
    assert torch.allclose(flow(torch.zeros(1, 2)), torch.full((1,), 2 * math.log(0.25)))
    assert flows.Base(Dirichlet(torch.ones(3))).shape == (3,)


# -- torch.distributions


def density(flow: flows.Flow, context: Tensor | None = None) -> TransformedDistribution:
    like = next(flow.parameters())
    shape = flow.bases[0].shape
    base = Independent(Normal(torch.zeros(shape).to(like), torch.ones(shape).to(like)), len(shape))
    if context is not None:
        base = base.expand(context.shape[:-1])
    return TransformedDistribution(base, flows.as_transform(flow.transform, context, event_dim=len(shape)).inv)


@pytest.mark.parametrize("context", [0, 2])
def test_as_transform(context: int) -> None:
    flow, x, rows = trained(Made("", lambda: flows.NSF(3, context, 2, (8,), bins=4), (3,), context))
    made = density(flow, *rows)
    assert torch.allclose(made.log_prob(x), flow.log_prob(x, *rows))
    samples = made.rsample((5,))
    assert samples.shape == (5, *((6,) if context else ()), 3)
    flat, repeated = samples.reshape(-1, 3), tuple(c.repeat(5, 1) for c in rows)
    assert torch.allclose(made.log_prob(samples).flatten(), flow.log_prob(flat, *repeated))
    transform = flows.as_transform(flow.transform, *rows)
    y = transform(x)
    assert torch.allclose(transform.inv(y), x)
    assert torch.allclose(transform.log_abs_det_jacobian(x, y), flow.transform.log_det(x, *rows))
    assert torch.allclose(transform.inv.log_abs_det_jacobian(y, x), -flow.transform.log_det(x, *rows))
    for one in (copy.deepcopy(transform), pickle.loads(pickle.dumps(transform))):
        assert torch.equal(one(x), y)


class Density(nn.Module):
    def __init__(self, flow: flows.Flow, way: str) -> None:
        super().__init__()
        self.flow, self.way = flow, way

    def forward(self, x: Tensor) -> Tensor:
        made = density(self.flow)
        if self.way == "data":
            return made.log_prob(x)
        samples = made.rsample((len(x),))
        return made.log_prob(samples) + samples.square().sum(1) / 3


def count_branches(module: nn.Module) -> None:
    for coupling in [m for m in module.modules() if isinstance(m, rnn.Coupling)]:
        coupling.f, coupling.g = Count(coupling.f), Count(coupling.g)


@pytest.mark.parametrize("way", ["data", "samples"])
def test_a_transform_trains_under_reversible(way: str) -> None:
    """A step of `TransformedDistribution` evaluates each branch as often as one of `Flow`, and holds as little."""
    flow, x, _ = trained(Made("", lambda: flows.RealNVP(4, 0, 6, (32,)), (4,)))
    count_branches(flow)
    loss: Callable[[Any], Tensor] = lambda output: output.mean()
    plain, rev = (step(Density(flow, way), x, reverse=reverse, loss=loss) for reverse in (False, True))
    assert set(plain.calls) == {1}
    assert_same(plain, rev, 1e-10)
    assert sorted(rev.calls)[2:] == [2] * 10  # the newest may be kept
    assert rev.stats is not None
    assert rev.held_after_forward < rev.stats.packed_bytes / 3


def test_a_transform_remembers_no_more_than_it_should() -> None:
    flow, x, _ = trained(Made("", lambda: flows.RealNVP(4, 0, 2, (8,)), (4,)))
    transform = flows.as_transform(flow.transform)
    with torch.no_grad():
        y = transform(x)
    assert transform.log_abs_det_jacobian(x, y).requires_grad  # what was made without gradients is made again
    y = transform(x)
    before = transform.log_abs_det_jacobian(x, y)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(1.1)
    assert not torch.allclose(transform(x), y)  # the module has changed
    assert not torch.allclose(transform.log_abs_det_jacobian(x, transform(x)), before)
    y = transform(x)
    del y
    assert not transform._latest


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("what", ["parameter", "sample", "context", "another context", "mode", "nothing"])
def test_a_transform_forgets_what_would_not_come_out_again(what: str, grad: bool) -> None:
    """A sample that was drawn before a step of the optimizer is judged by the model after it."""
    flow, _, (context,) = trained(Made("", lambda: flows.RealNVP(4, 3, 2, (8,)), (4,), 3))
    branch = next(module for module in flow.modules() if isinstance(module, rnn.Coupling)).f
    branch.register_forward_hook(lambda module, _, output: output * 2 if module.training else output)
    flow.eval()
    base = Independent(Normal(torch.zeros(4, dtype=D), torch.ones(4, dtype=D)), 1)
    transform = flows.as_transform(flow.transform, context)
    density = TransformedDistribution(base, transform.inv)
    with torch.set_grad_enabled(grad):
        x = density.rsample((len(context),))
        with torch.no_grad():
            if what == "parameter":
                next(branch.parameters()).add_(0.1)
            elif what == "sample":
                x.detach().mul_(1.1)
            elif what == "context":
                context.mul_(1.1)
            elif what == "another context":
                transform.context = context * 1.1
            elif what == "mode":
                flow.train()
        found = density.log_prob(x)
        want = flow.log_prob(x, transform.context)
    assert torch.allclose(found, want, rtol=1e-12)
    assert found.requires_grad == grad


def test_a_transform_twice() -> None:
    """What came out of a direction goes in again: it is not taken for what the other direction made."""
    flow, x, _ = trained(Made("", lambda: flows.RealNVP(4, 0, 2, (8,)), (4,)))
    transform = flows.as_transform(flow.transform)
    assert torch.equal(transform(transform(x)), flow.transform(flow.transform(x)))
    assert torch.allclose(transform.inv(transform.inv(x)), flow.transform.inverse(flow.transform.inverse(x)))
    y = transform(x)
    assert transform.inv(y) is x
    assert transform.inv(y.clone()) is not x
    assert not torch.allclose(transform.log_abs_det_jacobian(y, x), transform.log_abs_det_jacobian(x, y))


def test_transforms_refuse() -> None:
    with pytest.raises(ShapeError, match="samples of 3 dimensions, got shape"):
        flows.as_transform(rnn.ActNorm(2), event_dim=3)(torch.zeros(2, 2))
    with pytest.raises(ShapeError, match=r"MultiScale: expected a module that keeps the shape \(4,\) of a sample, got tuple"):
        flows.as_transform(rnn.MultiScale(rnn.ActNorm(4), rnn.ActNorm(2)))(torch.zeros(2, 4))


def test_a_transform_of_zuko() -> None:
    zuko = pytest.importorskip("zuko")
    flow, x, _ = trained(Made("", lambda: flows.NSF(3, 0, 2, (8,), bins=4), (3,)))
    base = Independent(Normal(torch.zeros(3, dtype=D), torch.ones(3, dtype=D)), 1)
    made = zuko.distributions.NormalizingFlow(flows.as_transform(flow.transform), base)
    assert torch.allclose(made.log_prob(x), flow.log_prob(x))
    samples, log_prob = made.rsample_and_log_prob((5,))
    assert torch.allclose(flow.log_prob(samples), log_prob)
