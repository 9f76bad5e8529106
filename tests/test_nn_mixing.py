"""Flow layers: laws over a list of layers, what each layer promises, and chains under ``reversible()``."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import revhooks
from revhooks import nn as rnn
from revhooks.errors import InversionError, RegistrationError, ShapeError
from revhooks.functional import Law, affine_law, sum_per_sample
from revhooks.registry import registered
from tests.conftest import Count, Outcome, assert_same, calls, compare, mlp, step
from tests.devices import DEVICE, generator

D = torch.float64


class Case(NamedTuple):
    """A layer by name, its maker, the shape that it takes, and the smallest and largest number in its domain."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    domain: tuple[float, float] = (-2.0, 2.0)


def affine(scale: str = "tanh", dim: int = 1, width: int = 4) -> nn.Module:
    half = width // 2
    return rnn.AffineCoupling(mlp(half, width, 0.5), mlp(half, width, 0.5), dim=dim, scale=scale)


def spline(sizes: tuple[int, int], bound: float) -> nn.Module:
    first, second = sizes
    return rnn.SplineCoupling(mlp(second, 11 * first), mlp(first, 11 * second), sizes=sizes, bins=4, bound=bound)


def conv(channels: int, out: int) -> nn.Module:
    return Count(nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, out, 3, padding=1)))


def glow_step(channels: int, lu: bool = True) -> list[nn.Module]:
    f, g = (conv(channels // 2, channels) for _ in range(2))
    return [rnn.ActNorm(channels), rnn.InvertibleConv1x1(channels, lu=lu), rnn.AffineCoupling(f, g)]


def glow(depth: int, lu: bool = True) -> nn.Module:
    return rnn.FlowSequential(*[layer for _ in range(depth) for layer in glow_step(4, lu)]).double()


EXP = affine_law("exp")
CHECKERS = rnn.checkerboard(3)
MASK = torch.tensor([True, False, True]).view(3, 1, 1)

CASES = [
    Case("actnorm vectors", lambda: rnn.ActNorm(4), (3, 4)),
    Case("actnorm images", lambda: rnn.ActNorm(2), (3, 2, 2, 3)),
    Case("actnorm tokens", lambda: rnn.ActNorm(3, dim=-1), (2, 4, 3)),
    Case("linear lu", lambda: rnn.InvertibleLinear(4), (3, 2, 4)),
    Case("linear dense", lambda: rnn.InvertibleLinear(4, lu=False), (3, 2, 4)),
    Case("linear in the middle", lambda: rnn.InvertibleLinear(3, dim=2), (2, 2, 3, 2)),
    Case("conv1x1 vectors", lambda: rnn.InvertibleConv1x1(4), (3, 4)),
    Case("conv1x1 signals", lambda: rnn.InvertibleConv1x1(3), (3, 3, 4)),
    Case("conv1x1 few positions", lambda: rnn.InvertibleConv1x1(4), (2, 4, 2)),
    Case("conv1x1 images dense", lambda: rnn.InvertibleConv1x1(3, lu=False), (2, 3, 2, 2)),
    Case("conv1x1 volumes", lambda: rnn.InvertibleConv1x1(2), (2, 2, 2, 2, 2)),
    Case("permute random", lambda: rnn.Permute.random(5), (2, 5, 2)),
    Case("permute reverse", lambda: rnn.Permute.reverse(3, dim=-1), (2, 2, 3)),
    Case("squeeze 1-D", lambda: rnn.Squeeze(3), (2, 2, 6)),
    Case("squeeze 2-D", lambda: rnn.Squeeze(2), (2, 2, 4, 2)),
    Case("squeeze 3-D", lambda: rnn.Squeeze(2), (2, 1, 2, 4, 2)),
    Case("squeeze by 1", lambda: rnn.Squeeze(1), (2, 2, 3)),
    Case("unsqueeze 2-D", lambda: rnn.Unsqueeze(2), (2, 8, 1, 2)),
    Case("unsqueeze 3-D", lambda: rnn.Unsqueeze(2), (2, 8, 1, 2, 1)),
    Case("haar 1-D", lambda: rnn.HaarDownsampling(), (2, 2, 4)),
    Case("haar 2-D", lambda: rnn.HaarDownsampling(), (2, 2, 4, 2)),
    Case("haar 3-D", lambda: rnn.HaarDownsampling(), (2, 1, 2, 2, 4)),
    Case("haar up", lambda: rnn.HaarUpsampling(), (2, 8, 1, 2)),
    Case("orthogonal 1-D", lambda: rnn.OrthogonalDownsampling(2, ndim=1, factor=3), (2, 2, 6)),
    Case("orthogonal 2-D", lambda: rnn.OrthogonalDownsampling(2), (2, 2, 4, 2)),
    Case("orthogonal 3-D", lambda: rnn.OrthogonalDownsampling(1, ndim=3, method="cayley"), (2, 1, 2, 2, 4)),
    Case("orthogonal up", lambda: rnn.OrthogonalUpsampling(2, method="cayley"), (2, 8, 1, 2)),
    Case("reshape", lambda: rnn.Reshape((2, 3), (3, 2)), (2, 2, 3)),
    Case("flatten", lambda: rnn.Flatten((2, 3)), (2, 2, 3)),
    Case("leaky relu", lambda: rnn.LeakyReLU(0.2), (3, 2, 2)),
    Case("steep leaky relu", lambda: rnn.LeakyReLU(3.0), (3, 4)),
    Case("sinh-arcsinh", lambda: rnn.SinhArcsinh(2), (3, 2, 2), (-9.0, 9.0)),
    Case("softplus", lambda: rnn.Softplus(), (3, 4), (-25.0, 60.0)),
    Case("tanh", lambda: rnn.Tanh(), (3, 2, 2)),
    Case("sigmoid", lambda: rnn.Sigmoid(), (3, 4), (-4.0, 4.0)),
    Case("logit", lambda: rnn.Logit(), (3, 4), (0.0, 1.0)),
    Case("logit without margin", lambda: rnn.Logit(0.0), (3, 4), (0.01, 0.99)),
    Case("additive coupling", lambda: rnn.AdditiveCoupling(mlp(2), mlp(2)), (3, 4)),
    Case("affine tanh", affine, (3, 4)),
    Case("affine exp", lambda: affine("exp"), (3, 4)),
    Case("affine sigmoid", lambda: affine("sigmoid", -1), (2, 2, 4)),
    Case("affine chain", lambda: rnn.ReversibleSequential(*[mlp(2, 4, 0.5) for _ in range(5)], coupling="affine"), (3, 4)),
    Case("affine one-sided", lambda: rnn.AffineCoupling(mlp(3, 4, 0.5), sizes=(2, 3), swap=False), (3, 5)),
    Case("affine swapped", lambda: rnn.AffineCoupling(mlp(2, 6, 0.5), sizes=(2, 3), swap=True), (3, 5)),
    Case("spline coupling", lambda: spline((2, 3), bound=2.0), (3, 5), (-2.5, 2.5)),
    Case("spline images", lambda: rnn.SplineCoupling(conv(2, 22), bins=4, bound=1.5), (2, 4, 2, 3)),
    Case("spline tokens", lambda: rnn.SplineCoupling(mlp(2, 22), dim=-1, bins=4), (2, 3, 4)),
    Case("masked features", lambda: rnn.MaskedCoupling(mlp(3, 6), rnn.checkerboard(3)), (4, 3)),
    Case("masked images", lambda: rnn.MaskedCoupling(conv(2, 4), rnn.checkerboard(3, 2), coupling=EXP), (2, 2, 3, 2)),
    Case("masked channels", lambda: rnn.MaskedCoupling(conv(3, 3), MASK, coupling="additive"), (2, 3, 2, 2)),
    Case("masked spline", lambda: rnn.MaskedCoupling(mlp(3, 69), CHECKERS, coupling="spline"), (4, 3), (-6.0, 6.0)),
    Case("autoregressive", lambda: rnn.MaskedAutoregressive(rnn.MADE(4, 2, (9,), order=(2, 0, 3, 1))), (3, 4)),
    Case("autoregressive spline", lambda: rnn.MaskedAutoregressive(rnn.MADE(3, 23, (8,)), "spline"), (3, 3), (-6.0, 6.0)),
    Case("autoregressive of one", lambda: rnn.MaskedAutoregressive(rnn.MADE(1, 2, (8,))), (3, 1)),
    Case("inverse of a coupling", lambda: rnn.Inverse(affine()), (3, 4)),
    Case("inverse of autoregressive", lambda: rnn.Inverse(rnn.MaskedAutoregressive(rnn.MADE(3, 2, (8,)))), (3, 3)),
    Case("flow", lambda: rnn.FlowSequential(rnn.ActNorm(4), rnn.InvertibleLinear(4), affine(), rnn.Permute.reverse(4)), (3, 4)),
    Case("nested flow", lambda: rnn.FlowSequential(rnn.FlowSequential(affine(), rnn.Tanh()), rnn.Tanh()), (3, 4)),
]
IDS = [case.name for case in CASES]
everywhere = pytest.mark.parametrize("case", CASES, ids=IDS)


def example(case: Case, dtype: torch.dtype = D) -> tuple[nn.Module, Tensor]:
    """The layer, past its first call and with parameters that are not at their start, and an input."""
    layer = case.make().to(dtype)
    low, high = case.domain
    x = (low + (high - low) * torch.rand(case.shape, dtype=D)).to(dtype)
    with torch.no_grad():
        layer(x)
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer, x


class Both(nn.Module):
    """A layer by ``call_and_ladj``, as maximum likelihood calls it, behind a layer that has parameters."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...], depth: int = 1) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(shape[1:], dtype=D))
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(depth))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * self.scale
        total = torch.zeros(len(x), dtype=D)
        for layer in self.layers:
            y, ladj = layer.call_and_ladj(y)
            total = total + ladj
        return y, total


def likelihood(output: Any) -> Tensor:
    """A loss that no orthogonal map leaves as it is."""
    y, ladj = output
    weights = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view(y.shape)
    return (weights * torch.tanh(y)).sum() - ladj.sum() / 10


# -- laws


@everywhere
def test_inverse(case: Case) -> None:
    layer, x = example(case)
    y = layer(x)
    kept = y.detach().clone()
    assert torch.allclose(layer.inverse(y), x, rtol=1e-10, atol=1e-10)
    assert torch.allclose(layer(layer.inverse(y)), y, rtol=1e-10, atol=1e-10)
    assert torch.equal(y, kept)  # an inverse does not write into its argument


@everywhere
def test_inverse_float32(case: Case) -> None:
    layer, x = example(case, torch.float32)
    y = layer(x)
    assert y.dtype is torch.float32
    assert torch.allclose(layer.inverse(y), x, rtol=1e-3, atol=2e-5)


@everywhere
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_stays_half(case: Case, dtype: torch.dtype) -> None:
    layer, x = example(case)
    layer, x = layer.float(), x.to(dtype)
    if any(isinstance(module, (rnn.Coupling, rnn.MaskedCoupling, rnn.MaskedAutoregressive)) for module in layer.modules()):
        layer = layer.to(dtype)
    y, ladj = layer.call_and_ladj(x)
    assert (y.dtype, layer.inverse(y).dtype, ladj.dtype) == (dtype, dtype, torch.float32)


@everywhere
def test_log_det_is_that_of_the_jacobian(case: Case) -> None:
    layer, x = example(case)
    y, ladj = layer.call_and_ladj(x)
    assert ladj.shape == (len(x),)
    assert ladj.dtype == D
    assert torch.equal(y, layer(x))
    assert torch.equal(layer.log_det(x), ladj)
    for i in range(len(x)):
        jacobian = torch.autograd.functional.jacobian(lambda one: layer(one[None])[0], x[i])
        expected = torch.linalg.slogdet(jacobian.reshape(x[i].numel(), -1))[1]
        assert torch.allclose(ladj[i], expected, rtol=1e-10, atol=1e-10)


@everywhere
def test_ladj_has_the_gradient_of_the_jacobian(case: Case) -> None:
    layer, x = example(case)
    x = x[:1].requires_grad_()
    leaves = [x, *layer.parameters()]

    def gradients(ladj: Tensor) -> list[Tensor]:
        if not ladj.requires_grad:
            return [torch.zeros_like(leaf) for leaf in leaves]
        return list(torch.autograd.grad(ladj, leaves, allow_unused=True, materialize_grads=True))

    jacobian = torch.autograd.functional.jacobian(lambda one: layer(one[None])[0], x[0], create_graph=True)
    expected = torch.linalg.slogdet(jacobian.reshape(x.numel(), -1))[1]
    for got, wanted in zip(gradients(layer.log_det(x)[0]), gradients(expected), strict=True):
        assert torch.allclose(got, wanted, rtol=1e-8, atol=1e-9)


@everywhere
@pytest.mark.parametrize("depth", [1, 3])
def test_gradients(case: Case, depth: int) -> None:
    layer, x = example(case)
    if layer(x).shape != x.shape or "logit" in case.name:
        depth = 1
    x.requires_grad_()
    plain = step(Both(layer, case.shape, depth), x, reverse=False, loss=likelihood)
    rev = step(Both(layer, case.shape, depth), x, reverse=True, loss=likelihood)
    assert_same(plain, rev, 1e-10)
    assert rev.stats is not None
    assert rev.stats.held_bytes == 0


@everywhere
def test_check(case: Case) -> None:
    layer, x = example(case)
    if not any(registered(type(module)) for module in layer.modules()):
        assert case.name.startswith(("reshape", "flatten", "softplus", "tanh", "sigmoid", "logit"))
        return
    result = revhooks.check(layer, x)
    assert result, str(result)
    passes = x.shape[1] if case.name == "inverse of autoregressive" else 1
    assert set(result.evaluations.values()) <= {2 * passes}


@everywhere
def test_round_trips(case: Case) -> None:
    layer, x = example(case)
    loaded = case.make().double()
    loaded.load_state_dict(layer.state_dict())
    for other in (loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
        assert torch.equal(other.log_det(x), layer.log_det(x))
    assert repr(layer)


@everywhere
def test_other_memory_formats(case: Case) -> None:
    layer, x = example(case)
    flipped = x.transpose(0, -1).contiguous().transpose(0, -1)
    assert torch.allclose(layer(flipped), layer(x), rtol=1e-12, atol=1e-12)
    assert torch.allclose(layer.inverse(layer(flipped)), x, rtol=1e-10, atol=1e-10)


def test_every_exported_layer_is_covered() -> None:
    made = {type(module) for case in CASES for module in case.make().modules()}
    layers = {getattr(rnn, name) for name in rnn.__all__ if isinstance(getattr(rnn, name), type)}
    flows = {layer for layer in layers if hasattr(layer, "call_and_ladj")}
    assert flows - made <= {rnn.Flow, rnn.Coupling, rnn.MultiScale, rnn.InvertibleResidual}  # tests/test_nn_residual.py


# -- ActNorm


def test_actnorm_normalises_its_first_batch() -> None:
    layer = rnn.ActNorm(3).double()
    x = 5 + 3 * torch.randn(8, 3, 4, 4, dtype=D)
    y = layer(x)
    assert torch.allclose(y.mean((0, 2, 3)), torch.zeros(3, dtype=D), atol=1e-12)
    assert torch.allclose(y.std((0, 2, 3), correction=0), torch.ones(3, dtype=D))
    before = copy.deepcopy(layer.state_dict())
    layer(x + 7)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_actnorm_waits_for_training() -> None:
    layer = rnn.ActNorm(3).eval()
    x = 5 + torch.randn(4, 3)
    assert torch.equal(layer(x), x)
    assert not layer.initialized
    layer.train()(x)
    assert layer.initialized


def test_actnorm_with_channels_that_do_not_vary() -> None:
    x = torch.randn(4, 3)
    x[:, 1] = 2.0
    x[0, 2] = torch.inf
    layer = rnn.ActNorm(3)
    y = layer(x)
    assert torch.equal(y[:, 1], torch.zeros(4))
    assert layer.log_scale[1:].tolist() == [0, 0]
    assert torch.allclose(y[:, 0].mean(), torch.zeros(()), atol=1e-6)
    assert rnn.ActNorm(3)(torch.randn(1, 3)).isfinite().all()


@pytest.mark.parametrize("carry", ["state_dict", "deepcopy", "pickle"])
def test_actnorm_that_is_carried_over_is_not_initialised_again(carry: str) -> None:
    x = 5 + torch.randn(4, 3)
    source = rnn.ActNorm(3)
    source(x)
    target = rnn.ActNorm(3)
    if carry == "state_dict":
        target.load_state_dict(source.state_dict())
    else:
        target = copy.deepcopy(source) if carry == "deepcopy" else pickle.loads(pickle.dumps(source))
    assert torch.equal(target(x + 3), source(x + 3))


def test_actnorm_that_loads_a_fresh_state_is_initialised_again() -> None:
    layer, x = rnn.ActNorm(3), torch.randn(4, 3)
    fresh = copy.deepcopy(layer.state_dict())
    layer(x)
    layer.load_state_dict(fresh)
    assert torch.allclose(layer(x + 9).mean(0), torch.zeros(3), atol=1e-5)


@pytest.mark.parametrize("ladj", [False, True])
def test_actnorms_first_call_under_reversible(ladj: bool) -> None:
    """The call that sets the parameters inverts as any other: nothing of it is kept, its gradients are exact."""
    model = Both(rnn.FlowSequential(*glow_step(4)[:2]).double(), (2, 4, 5, 5), 6) if ladj else glow(4)
    x = 3 + 2 * torch.randn(2, 4, 5, 5, dtype=D)
    options: dict[str, Any] = {"loss": likelihood} if ladj else {}
    plain, rev = (step(model, x, reverse=reverse, **options) for reverse in (False, True))
    assert_same(plain, rev, 1e-10)
    assert all(not buffer.dtype.is_floating_point or buffer.isfinite().all() for buffer in rev.buffers)
    assert rev.stats is not None
    assert rev.stats.frames - rev.stats.inversions <= 2
    assert not any("changed" in kept.why for kept in rev.stats.kept)


# -- matrices


@pytest.mark.parametrize("lu", [True, False])
def test_linear_starts_orthogonal(lu: bool) -> None:
    layer = rnn.InvertibleLinear(16, lu=lu).double()
    matrix = layer.matrix()
    assert torch.allclose(matrix @ matrix.mT, torch.eye(16, dtype=D), atol=1e-6)
    assert not torch.allclose(matrix, torch.eye(16, dtype=D), atol=0.1)
    assert sum(p.numel() for p in layer.parameters()) == 256


@pytest.mark.parametrize("lu", [True, False])
def test_linear_is_its_matrix(lu: bool) -> None:
    layer, x = rnn.InvertibleLinear(5, lu=lu).double(), torch.randn(3, 7, 5, dtype=D)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    assert torch.allclose(layer(x), x @ layer.matrix().T, atol=1e-12)
    assert torch.allclose(layer.matrix() @ layer.inverse_matrix(), torch.eye(5, dtype=D), atol=1e-12)
    expected = 7 * torch.linalg.slogdet(layer.matrix())[1]
    assert torch.allclose(layer.log_det(x), expected.expand(3), atol=1e-10)


@pytest.mark.parametrize("shape", [(2, 6, 5, 5), (2, 6, 2, 2), (2, 6, 1, 1)])
def test_conv1x1_is_a_convolution(shape: tuple[int, ...]) -> None:
    layer, x = rnn.InvertibleConv1x1(6).double(), torch.randn(shape, dtype=D)
    expected = F.conv2d(x, layer.matrix()[:, :, None, None])
    y, channels_last = layer(x), layer(x.contiguous(memory_format=torch.channels_last))
    assert torch.allclose(y, expected, atol=1e-12)
    assert torch.allclose(channels_last, expected, atol=1e-12)
    assert y.is_contiguous()
    assert channels_last.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("lu", [True, False])
def test_inverse_of_an_ill_conditioned_matrix_in_float32(lu: bool) -> None:
    """It is computed in float64, so that what is left is the rounding of the products."""
    layer = rnn.InvertibleLinear(64, lu=lu)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn(64, 64))
    got, exact = layer.inverse_matrix(), torch.linalg.inv(copy.deepcopy(layer).double().matrix())
    assert torch.linalg.cond(exact.detach()) > 100
    assert (got - exact).norm() / exact.norm() < 1e-7


def test_singular_matrix() -> None:
    layer = rnn.InvertibleLinear(3, lu=False)
    nn.init.zeros_(layer.weight)
    with pytest.raises(InversionError, match=r"InvertibleLinear: expected an invertible matrix, got a singular one.*lu=True"):
        layer.inverse(torch.randn(2, 3))


@pytest.mark.parametrize("case", ["linear lu", "conv1x1 images dense", "orthogonal 2-D", "haar 2-D", "actnorm images"])
def test_mixing_keeps_the_streams_precision_under_autocast(case: str) -> None:
    layer, x = example(CASES[IDS.index(case)], torch.float32)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        y = layer(x)
        back = layer.inverse(y)
    assert torch.equal(y, layer(x))
    assert torch.allclose(back, x, atol=1e-5)


def test_permute() -> None:
    x = torch.randn(2, 5, 3)
    assert torch.equal(rnn.Permute.reverse(5)(x), x.flip(1))
    order = torch.tensor([3, 0, 1, 4, 2])
    assert torch.equal(rnn.Permute(order)(x), x[:, order])
    generators = [generator(3) for _ in range(2)]
    a, b = (rnn.Permute.random(20, generator=generator) for generator in generators)
    assert torch.equal(a.permutation, b.permutation)


# -- resampling


def test_squeeze_is_pixel_unshuffle() -> None:
    x = torch.randn(2, 3, 4, 6)
    assert torch.equal(rnn.Squeeze(2)(x), F.pixel_unshuffle(x, 2))
    assert torch.equal(rnn.Unsqueeze(2)(F.pixel_unshuffle(x, 2)), x)
    volume = torch.arange(8).view(1, 1, 2, 2, 2)
    assert torch.equal(rnn.Squeeze(2)(volume).flatten(), torch.arange(8))


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_haar_by_its_kernels(ndim: int) -> None:
    """A convolution with the wavelet's kernels, whose stride is their size; the inverse is the transposed convolution."""
    x = torch.randn(2, 1, *[4] * ndim, dtype=D)
    low, high = torch.tensor([1.0, 1.0], dtype=D) / 2**0.5, torch.tensor([1.0, -1.0], dtype=D) / 2**0.5
    kernels = torch.ones(1, dtype=D)
    for axis in range(ndim):
        parts = [k.view(2, *[1] * (ndim - 1 - axis)) for k in (low, high)]
        kernels = torch.stack([kernel * part for kernel in kernels for part in parts]) if axis else torch.stack(parts)
    kernels = kernels.view(2**ndim, 1, *[2] * ndim)
    conv = (F.conv1d, F.conv2d, F.conv3d)[ndim - 1]
    transposed = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[ndim - 1]
    y = rnn.HaarDownsampling()(x)
    assert torch.allclose(y, conv(x, kernels, stride=2), atol=1e-12)
    assert torch.allclose(rnn.HaarUpsampling()(y), transposed(y, kernels, stride=2), atol=1e-12)


@pytest.mark.parametrize("method", ["exp", "cayley"])
def test_orthogonal_stays_orthogonal(method: str) -> None:
    layer = rnn.OrthogonalDownsampling(3, method=method)
    x = torch.randn(2, 3, 4, 4)
    assert torch.allclose(layer(x), rnn.HaarDownsampling()(x), atol=1e-6)  # as it starts
    nn.init.normal_(layer.skew)
    matrix = layer.matrix(layer(x), 2)
    assert matrix.shape == (3, 4, 4)
    assert torch.allclose(matrix @ matrix.mT, torch.eye(4).expand(3, 4, 4), atol=3e-7)
    assert not torch.allclose(matrix[0], matrix[1], atol=0.1)
    expected = F.conv2d(x, matrix.reshape(12, 1, 2, 2), stride=2, groups=3)
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_pad() -> None:
    layer = rnn.Pad(3)
    x = torch.randn(2, 4, 5)
    y = layer(x)
    assert y.shape == (2, 7, 5)
    assert torch.equal(y[:, 4:], torch.zeros(2, 3, 5))
    assert torch.equal(layer.inverse(y), x)
    noise = torch.randn(2, 7, 5)
    assert torch.equal(layer.inverse(noise), noise[:, :4])  # a projection
    assert not hasattr(layer, "call_and_ladj")


def test_pad_in_a_chain() -> None:
    """Its zeros do not survive an inversion, so its output starts a chain; the chain before it is rebuilt as ever."""

    def block(width: int) -> nn.Module:
        return rnn.AdditiveCoupling(mlp(width), mlp(width), dim=-1)

    model = nn.Sequential(block(2), block(2), rnn.Pad(4, dim=-1), nn.ReLU(), block(4), block(4)).double()
    compare(model, torch.randn(3, 4, dtype=D))


# -- activations


@pytest.mark.parametrize("layer", [rnn.Tanh(), rnn.Sigmoid(), rnn.Softplus()], ids=["tanh", "sigmoid", "softplus"])
def test_squashing_is_kept(layer: nn.Module) -> None:
    """Saturated, it has no inverse; its gradients are right all the same, for what it saves is kept."""
    assert registered(type(layer)) is None
    model = Both(layer, (3, 4))
    for scale in (1.0, 1e3):  # the first step would teach the runtime that it inverts
        x = scale * torch.randn(3, 4, dtype=D)
        plain, rev = (step(model, x, reverse=reverse, loss=likelihood) for reverse in (False, True))
        assert_same(plain, rev, 1e-12)


def test_log_derivatives_far_out() -> None:
    x = torch.tensor([[-300.0, -40.0, 40.0, 300.0]], dtype=D)
    for layer in (rnn.Tanh(), rnn.Sigmoid(), rnn.Softplus(), rnn.SinhArcsinh(4).double()):
        assert layer.log_det(x).isfinite().all()
    assert torch.allclose(rnn.Tanh().log_derivative(x)[0, -1], torch.tensor(2 * (0.6931471805599453 - 300), dtype=D))


# -- couplings


@pytest.mark.parametrize("scale", ["exp", "sigmoid", "tanh"])
def test_affine_ladj_takes_one_evaluation_a_branch(scale: str) -> None:
    layer, x = affine(scale).double(), torch.randn(3, 4, dtype=D)
    layer.call_and_ladj(x)
    assert calls(layer) == [1, 1]
    model = Both(layer, (3, 4), 3)
    for count in (m for m in model.modules() if isinstance(m, Count)):
        count.calls = 0
    rev = step(model, x, reverse=True, loss=likelihood)
    assert rev.calls == [2] * 4 + [1] * 2  # the newest is kept
    assert rev.stats is not None
    assert rev.stats.second_evaluations == 0


def test_additive_keeps_volume() -> None:
    layer, x = rnn.AdditiveCoupling(mlp(2), mlp(2)), torch.randn(3, 4)
    assert torch.equal(layer.log_det(x), torch.zeros(3))


def test_a_law_of_ones_own() -> None:
    def multiply(x: Tensor, u: Tensor) -> Tensor:
        return x * (1.5 + torch.tanh(u))

    def divide(y: Tensor, u: Tensor) -> Tensor:
        return y / (1.5 + torch.tanh(u))

    def log_det(x: Tensor, u: Tensor) -> Tensor:
        return sum_per_sample(torch.log(1.5 + torch.tanh(u)))

    branches = [mlp(2) for _ in range(3)]
    layer = rnn.ReversibleSequential(*branches, coupling=Law(multiply, divide, log_det=log_det)).double()
    x = torch.randn(3, 4, dtype=D)
    jacobian = torch.autograd.functional.jacobian(lambda one: layer(one[None])[0], x[0])
    assert torch.allclose(layer.log_det(x)[0], torch.linalg.slogdet(jacobian)[1], atol=1e-10)
    unknown = rnn.ReversibleSequential(*branches, coupling=Law(multiply, divide)).double()
    assert torch.equal(unknown(x), layer(x))
    with pytest.raises(RegistrationError, match="expected a Law with log_det=, got none"):
        unknown.call_and_ladj(x)


def test_ladj_needs_a_batch() -> None:
    layer = rnn.AdditiveCoupling(mlp(4), mlp(4), dim=0)
    with pytest.raises(ShapeError, match="not split along the batch"):
        layer.log_det(torch.randn(4, 4))


# -- containers


class Conditioned(nn.Module):
    """A branch that takes a context."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.net = mlp(2 * width, out, 0.5)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.net(torch.cat([x, context], -1))


@pytest.mark.parametrize("by_name", [False, True])
def test_context_goes_where_it_is_taken(by_name: bool) -> None:
    def flow() -> nn.Module:
        steps = [(rnn.ActNorm(4), rnn.AffineCoupling(Conditioned(2, 4), Conditioned(2, 4))) for _ in range(3)]
        return rnn.FlowSequential(rnn.Permute.reverse(4), rnn.FlowSequential(*[layer for one in steps for layer in one]))

    class Likelihood(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flow = flow()

        def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
            return self.flow.call_and_ladj(x, context=context) if by_name else self.flow.call_and_ladj(x, context)

    model = Likelihood().double()
    x, context = torch.randn(5, 4, dtype=D), torch.randn(5, 2, dtype=D)
    z = model(x, context)[0]
    assert torch.equal(model.flow(x, context), z)
    assert torch.allclose(model.flow.inverse(z, context=context), x, atol=1e-10)
    assert not torch.allclose(model.flow.inverse(z, context + 1), x, atol=1e-2)
    context.requires_grad_()
    plain, rev = (step(model, x, context, reverse=reverse, loss=likelihood) for reverse in (False, True))
    assert_same(plain, rev, 1e-10)
    assert plain.input_grads[1] is not None


def test_unknown_names_are_not_passed_on() -> None:
    class Temperature(rnn.Tanh):
        def forward(self, x: Tensor, *, temperature: float = 1.0) -> Tensor:
            return super().forward(x) / temperature

    flow = rnn.FlowSequential(Temperature(), rnn.Permute.reverse(3))
    x = torch.randn(2, 3)
    assert torch.equal(flow(x, temperature=2.0, context=x), (torch.tanh(x) / 2).flip(1))


def test_sequential_is_a_sequential() -> None:
    flow = rnn.FlowSequential(rnn.ActNorm(3), rnn.Permute.reverse(3), rnn.LeakyReLU())
    assert len(flow) == 3
    assert isinstance(flow[1:], rnn.FlowSequential)
    assert next(iter(flow.state_dict())) == "0.log_scale"
    x = torch.randn(2, 3)
    assert torch.equal(rnn.FlowSequential()(x), x)
    assert torch.equal(rnn.FlowSequential().log_det(x), torch.zeros(2))


def test_sequential_names_a_layer_that_is_no_flow() -> None:
    flow = rnn.FlowSequential(rnn.ActNorm(3), nn.ReLU())
    x = torch.randn(2, 3)
    with pytest.raises(RegistrationError, match="ReLU: expected a layer with a method 'inverse', got none"):
        flow.inverse(x)
    with pytest.raises(RegistrationError, match="ReLU: expected a layer with a method 'call_and_ladj', got none"):
        flow.log_det(x)


def multiscale() -> nn.Module:
    stages = [rnn.FlowSequential(rnn.Squeeze(2), *glow_step(channels)) for channels in (4, 8, 16)]
    return rnn.MultiScale(*stages).double()


def test_multiscale() -> None:
    flow, x = multiscale(), torch.randn(2, 1, 8, 8, dtype=D)
    latents, ladj = flow.call_and_ladj(x)
    assert [tuple(z.shape[1:]) for z in latents] == [(2, 4, 4), (4, 2, 2), (16, 1, 1)]
    assert sum(z[0].numel() for z in latents) == x[0].numel()
    assert torch.allclose(flow.inverse(latents), x, atol=1e-10)
    assert torch.equal(flow.log_det(x), ladj)
    jacobian = torch.autograd.functional.jacobian(lambda one: torch.cat([z.flatten() for z in flow(one[None])]), x[0])
    assert torch.allclose(torch.linalg.slogdet(jacobian.reshape(64, 64))[1], ladj[0], atol=1e-9)


def test_multiscale_under_reversible() -> None:
    class Likelihood(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flow = multiscale()

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            latents, ladj = self.flow.call_and_ladj(x)
            return *latents, ladj

    x = torch.randn(2, 1, 8, 8, dtype=D)
    rev = compare(Likelihood(), x)
    assert rev.stats is not None
    assert rev.stats.inversions > 0


# -- chains


def held(depth: int, lu: bool, ladj: bool) -> tuple[Outcome, Outcome]:
    model = glow(depth, lu)
    options: dict[str, Any] = {"loss": likelihood} if ladj else {}
    wrapped = Both(model, (2, 4, 8, 8)) if ladj else model
    x = torch.randn(2, 4, 8, 8, dtype=D)
    plain, rev = (step(wrapped, x, reverse=reverse, **options) for reverse in (False, True))
    assert_same(plain, rev, 1e-10)
    return plain, rev


@pytest.mark.parametrize("lu", [True, False])
def test_a_glow_holds_no_more_with_depth(lu: bool) -> None:
    outcomes = [held(depth, lu, ladj=False)[1] for depth in (2, 8)]
    stats = [outcome.stats for outcome in outcomes]
    assert outcomes[0].held_after_forward == outcomes[1].held_after_forward
    assert stats[0] is not None
    assert stats[1] is not None
    assert stats[0].peak_held_bytes == stats[1].peak_held_bytes
    assert stats[1].packed_bytes > 5 * stats[1].peak_held_bytes
    assert stats[1].second_evaluations == 0


@pytest.mark.parametrize("lu", [True, False])
def test_a_glow_by_likelihood_holds_its_ladjs_only(lu: bool) -> None:
    """A step adds one number for its convolution, and none for its coupling."""
    shallow, deep = (held(depth, lu, ladj=True)[1] for depth in (2, 8))
    assert deep.held_after_forward - shallow.held_after_forward == 6 * 8
    assert deep.stats is not None
    assert deep.stats.packed_bytes > 5 * deep.stats.peak_held_bytes


def test_a_glow_under_autocast() -> None:
    """The branches run in bfloat16, the stream stays in float32: it inverts, and nothing falls back."""

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flow = glow(6).float()

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
                z = self.flow(x)
            assert z.dtype is torch.float32
            return z

    rev = compare(Cast(), torch.randn(2, 4, 8, 8), tol=5e-2)
    assert rev.stats is not None
    assert rev.stats.inversions == 6 * 3 - 2
    assert rev.stats.worst_error < 1e-2


PAIRS: dict[str, Callable[[], list[nn.Module]]] = {
    "permute": lambda: [rnn.Permute.random(8)],
    "squeeze": lambda: [rnn.Squeeze(), rnn.Unsqueeze()],
    "haar": lambda: [rnn.HaarDownsampling(), rnn.HaarUpsampling()],
    "orthogonal": lambda: [rnn.OrthogonalDownsampling(8), rnn.OrthogonalUpsampling(8)],
    "linear": lambda: [rnn.InvertibleLinear(4)],
    "activations": lambda: [rnn.LeakyReLU(0.5), rnn.SinhArcsinh(8)],
}


@pytest.mark.parametrize("between", PAIRS)
def test_layers_between_couplings_do_not_end_the_chain(between: str) -> None:
    x = torch.randn(2, 8, 4, 4, dtype=D)
    sizes = []
    for depth in (2, 6):
        layers = [layer for _ in range(depth) for layer in (rnn.AdditiveCoupling(conv(4, 4), conv(4, 4)), *PAIRS[between]())]
        sizes.append(compare(nn.Sequential(*layers).double(), x).held_after_forward)
    assert sizes[0] == sizes[1]


# -- errors

X = torch.zeros(2, 3, 5, 6)
ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "actnorm channels": (lambda: rnn.ActNorm(4)(X), r"ActNorm: expected .*4 channels in dim 1.*got shape \(2, 3, 5, 6\)"),
    "actnorm batch": (lambda: rnn.ActNorm(2, dim=0)(X), "which is not the batch"),
    "linear features": (lambda: rnn.InvertibleLinear(5)(X), "InvertibleLinear: expected .*5 channels in dim -1"),
    "linear vector": (lambda: rnn.InvertibleLinear(3)(torch.zeros(3)), "which is not the batch"),
    "conv channels": (lambda: rnn.InvertibleConv1x1(4).inverse(X), "InvertibleConv1x1: expected .*4 channels in dim 1"),
    "permute twice": (lambda: rnn.Permute([0, 0, 1]), r"Permute: expected a permutation of 0 ... n - 1, got \[0, 0, 1\]"),
    "permute matrix": (lambda: rnn.Permute(torch.zeros(2, 2, dtype=torch.long)), "expected a permutation"),
    "permute size": (lambda: rnn.Permute.reverse(4)(X), "Permute: expected size 4 in dim 1"),
    "squeeze odd": (lambda: rnn.Squeeze(2)(X), "Squeeze: expected .*multiples of 2, got shape"),
    "squeeze vectors": (lambda: rnn.Squeeze(2)(torch.zeros(2, 4)), "Squeeze: expected"),
    "squeeze factor": (lambda: rnn.Squeeze(0), "Squeeze: expected factor >= 1, got 0"),
    "unsqueeze channels": (lambda: rnn.Unsqueeze(2)(X), r"Unsqueeze: expected .*multiple of 2\^2"),
    "haar odd": (lambda: rnn.HaarDownsampling()(X), "HaarDownsampling: expected .*multiples of 2"),
    "haar channels": (lambda: rnn.HaarUpsampling()(X), r"HaarUpsampling: expected .*multiple of 2\^2"),
    "haar vectors": (lambda: rnn.HaarUpsampling()(torch.zeros(2, 4)), "HaarUpsampling: expected"),
    "orthogonal method": (lambda: rnn.OrthogonalDownsampling(3, method="qr"), "expected method 'exp' or 'cayley', got 'qr'"),
    "orthogonal ndim": (lambda: rnn.OrthogonalDownsampling(3, ndim=0), "expected ndim >= 1"),
    "orthogonal channels": (lambda: rnn.OrthogonalDownsampling(4)(X[:, :, :4]), "expected 4 channels in 2 spatial dimensions"),
    "orthogonal dims": (lambda: rnn.OrthogonalUpsampling(1)(torch.zeros(1, 8, 2, 2, 2)), "expected 1 channels in 2 spatial"),
    "reshape numbers": (lambda: rnn.Reshape((2, 3), (5,)), r"Reshape: expected two shapes of as many elements, got \(2, 3\) and"),
    "flatten shape": (lambda: rnn.Flatten((3, 5, 7))(X), r"Flatten: expected samples of shape \(3, 5, 7\), got \(3, 5, 6\)"),
    "pad negative": (lambda: rnn.Pad(-1), "Pad: expected extra >= 0"),
    "pad dim": (lambda: rnn.Pad(1, dim=4)(X), "Pad: expected an input with dim 4"),
    "pad inverse": (lambda: rnn.Pad(4).inverse(X), "Pad: expected 4 channels or more in dim 1"),
    "leaky relu": (lambda: rnn.LeakyReLU(0.0), "LeakyReLU: expected negative_slope > 0, got 0.0"),
    "logit": (lambda: rnn.Logit(0.5), r"Logit: expected margin in \[0, 0.5\)"),
    "sinh-arcsinh": (lambda: rnn.SinhArcsinh(4)(X), "SinhArcsinh: expected .*4 channels in dim 1"),
    "no stages": (lambda: rnn.MultiScale(), "MultiScale: expected one stage or more"),
    "odd stage": (lambda: rnn.MultiScale(rnn.ActNorm(3), rnn.ActNorm(1))(X), "MultiScale: expected an even size along dim 1"),
    "latents": (lambda: multiscale().inverse([X]), "MultiScale: expected 3 latents, one a stage, got 1"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    act, message = ERRORS[name]
    with pytest.raises(ShapeError, match=message):
        act()
