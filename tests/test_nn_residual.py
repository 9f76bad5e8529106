"""Contractive layers and the blocks made of them: norms, inverses, log-determinants, and gradients under ``reversible()``."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import revhooks
from revhooks.errors import BackwardError, FallbackWarning, InversionError, RegistrationError, RevhooksError, ShapeError
from revhooks.nn import InvertibleResidual, contract, conv_singular_values, lipschitz_bound, spectral
from revhooks.nn.spectral import SpectralLayer
from tests.conftest import Counts, assert_same, compare, step
from tests.devices import DEVICE, random_states, set_random_states

F64 = torch.float64


class Counted(Counts, nn.Module):
    """A branch that counts its evaluations."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x)

    def lipschitz_bound(self) -> float:
        return 0.9


def mlp(width: int = 6, hidden: int = 10, scale: float = 4.0) -> nn.Module:
    net = nn.Sequential(nn.Linear(width, hidden), nn.ELU(), nn.Linear(hidden, width))
    return scaled(net, scale)


def conv(channels: int = 4, hidden: int = 6, scale: float = 4.0, rank: int = 2, **options: Any) -> nn.Module:
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[rank]
    net = nn.Sequential(
        nn.ReLU(), kind(channels, hidden, 3, padding=1, **options),
        nn.ReLU(), kind(hidden, hidden, 1),
        nn.ReLU(), kind(hidden, channels, 3, padding=1, **options),
    )  # fmt: skip
    return scaled(net, scale)


def scaled(net: nn.Module, scale: float) -> nn.Module:
    """Weights so large that the constraint acts."""
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.mul_(scale if name.endswith("weight") else 1)
    return net


class Case(NamedTuple):
    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


CASES = [
    Case("linear", lambda: scaled(nn.Linear(6, 6), 4), (3, 6)),
    Case("mlp", mlp, (3, 6)),
    Case("mlp on a sequence", mlp, (3, 5, 6)),
    Case("mlp gelu", lambda: nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6)), (3, 6)),
    Case("conv", conv, (2, 4, 4, 4)),
    Case("conv circular", lambda: conv(2, padding_mode="circular"), (2, 2, 4, 5)),
    Case("conv groups", lambda: scaled(nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2), 4), (2, 4, 3, 4)),
    Case("conv 1d", lambda: conv(rank=1), (2, 4, 7)),
    Case("conv 3d", lambda: conv(2, 3, rank=3), (2, 2, 3, 4, 3)),
]
IDS = [case.name for case in CASES]


def block(case: Case, coeff: float = 0.9, **options: Any) -> InvertibleResidual:
    return InvertibleResidual(case.make(), coeff, **options).double()


def batch(case: Case, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(case.shape, dtype=dtype)


# ------------------------------------------------------------------------------------ spectral layers

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 7), (5,)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, padding=1), (3, 8)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 3, padding=1), (2, 3, 4, 3)),
    "no padding": (lambda: nn.Conv2d(3, 4, 3), (3, 5, 6)),
    "stride": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), (3, 6, 7)),
    "stride that leaves a rest": (lambda: nn.Conv2d(2, 4, 2, stride=3), (2, 7, 9)),
    "unequal": (lambda: nn.Conv2d(3, 4, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)), (3, 6, 7)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 5, 5)),
    "same, uneven": (lambda: nn.Conv2d(3, 4, (4, 3), padding="same", dilation=(2, 1)), (3, 7, 6)),
    "circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (3, 5, 6)),
    "circular wide": (lambda: nn.Conv2d(3, 4, 3, padding=2, padding_mode="circular"), (3, 5, 6)),
    "circular stride": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode="circular"), (3, 5, 6)),
    "reflect": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (3, 5, 6)),
    "replicate": (lambda: nn.Conv1d(3, 4, 5, padding=2, padding_mode="replicate"), (3, 8)),
}


def layer_of(name: str, coeff: float = 0.1) -> tuple[SpectralLayer, nn.Module, Tensor]:
    """A layer that has seen an input, the plain layer that it was, and the input."""
    make, shape = LAYERS[name]
    with torch.device("cpu"):  # how fast norms converge depends on what is drawn
        plain = make().double()
    plain.to(DEVICE)
    layer = contract(copy.deepcopy(plain), coeff)
    assert isinstance(layer, SpectralLayer)
    x = torch.randn(4, *shape, dtype=F64)
    layer(x)
    return layer, plain, x


def matrix_of(layer: SpectralLayer, weight: Tensor) -> Tensor:
    units = torch.eye(layer.v.numel(), dtype=weight.dtype).reshape(-1, *layer.v.shape[1:])
    return layer.operator(units, weight).flatten(1).T


@pytest.mark.parametrize("name", LAYERS)
def test_operator_is_the_layers_and_adjoint_its_transpose(name: str) -> None:
    layer, plain, x = layer_of(name)
    zero = plain(torch.zeros_like(x))
    assert torch.allclose(layer.operator(x, plain.weight), plain(x) - zero, atol=1e-12)
    v = torch.randn_like(layer.v)
    u = torch.randn_like(layer.operator(v, layer.weight))
    forward = (layer.operator(v, layer.weight) * u).sum()
    backward = (layer.adjoint(u, layer.weight, v.shape) * v).sum()
    assert torch.allclose(forward, backward, rtol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_norms_against_the_matrix(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _, x = layer_of(name)
    layer.advance(2000)
    exact = float(torch.linalg.matrix_norm(matrix_of(layer, layer.scaled_weight(x.shape[1:])).detach(), 2))
    assert exact == pytest.approx(0.1, rel=1e-6)
    assert layer.operator_norm() == pytest.approx(exact, rel=1e-6)
    assert layer.lipschitz_bound() == pytest.approx(exact, rel=1e-9)
    monkeypatch.setattr(spectral, "DENSE", 0)  # as on large shapes
    bound = layer.lipschitz_bound()
    assert exact * (1 - 1e-9) <= bound <= 3 * exact
    if name in ("linear", "circular"):
        assert bound == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_is_the_plain_layer_with_scaled_weights(name: str) -> None:
    layer, plain, x = layer_of(name)
    with torch.no_grad():
        assert layer.factor() > 1
        plain.weight.div_(layer.factor())
    assert torch.allclose(layer(x), plain(x), atol=1e-14)
    assert torch.allclose(layer(x[0]), plain(x[0]), atol=1e-14)  # without a batch


def test_small_weights_are_left_alone_bit_by_bit() -> None:
    plain = scaled(nn.Conv2d(3, 3, 3, padding=1), 1e-3)
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(contract(copy.deepcopy(plain), 0.9)(x), plain(x))


def test_gradient_goes_through_the_norm() -> None:
    layer, plain, x = layer_of("linear", 0.3)
    layer.advance(5000)
    layer(x).square().sum().backward()
    plain.weight.grad = None
    sigma = torch.linalg.matrix_norm(plain.weight, 2)
    F.linear(x, plain.weight * 0.3 / sigma, plain.bias).square().sum().backward()
    assert torch.allclose(layer.weight.grad, plain.weight.grad, rtol=1e-8, atol=1e-10)


def test_zero_weights_keep_their_vector() -> None:
    layer = contract(nn.Linear(4, 4), 0.5)
    with torch.no_grad():
        layer.weight.zero_()
    layer(torch.randn(2, 4)).sum().backward()
    assert layer.weight.grad.isfinite().all()
    with torch.no_grad():
        layer.weight.copy_(3 * torch.eye(4))
    layer.advance(3)
    assert layer.lipschitz_bound() == pytest.approx(0.5, rel=1e-5)


def test_norms_are_taken_in_full_precision() -> None:
    layer = contract(nn.Linear(32, 32), 0.5)
    layer(torch.randn(2, 32))
    expected = layer.factor()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert torch.equal(layer.factor(), expected)
        assert layer(torch.randn(2, 32)).dtype == torch.bfloat16
    half = copy.deepcopy(layer).bfloat16()
    assert half(torch.randn(2, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert half.factor().dtype == torch.float32


def test_another_input_shape_gets_its_own_vector() -> None:
    layer = contract(nn.Conv2d(2, 2, 3, padding=1), 0.1).double()
    for size in (4, 7):
        layer(torch.randn(1, 2, size, size, dtype=F64))
        assert layer.v.shape == (1, 2, size, size)
        assert layer.operator_norm() == pytest.approx(0.1, rel=1e-2)


def test_finding_the_vector_draws_nothing() -> None:
    layer = contract(nn.Linear(4, 4), 0.5)
    x = torch.randn(2, 4)
    states = random_states()
    layer(x)
    assert all(map(torch.equal, random_states(), states))


def test_contract_keeps_parameters_names_and_sharing() -> None:
    shared = nn.Linear(4, 4)
    net = nn.Sequential(shared, nn.ReLU(), nn.Sequential(nn.Conv2d(1, 1, 1), shared))
    parameters = dict(net.named_parameters())
    handle = shared.register_forward_hook(lambda *_: None)
    assert contract(net, 0.5) is net
    assert all(a is b for a, b in zip(net.parameters(), parameters.values(), strict=True))
    assert list(dict(net.named_parameters())) == list(parameters)
    assert net[0] is net[2][1]
    assert handle.id in net[0]._forward_hooks
    assert type(shared) is nn.Linear
    assert not shared._buffers


# ----------------------------------------------------------------------------------- exact singular values


@pytest.mark.parametrize(
    ("kernel", "shape", "dilation", "groups"),
    [
        ((3,), (7,), 1, 1),
        ((3, 3), (5, 6), 1, 1),
        ((2, 3), (4, 6), (2, 1), 2),
        ((3, 3), (2, 2), 1, 1),
        ((2, 2, 2), (3, 3, 2), 1, 1),
    ],
)
def test_singular_values_of_circular_convolutions(
    kernel: tuple[int, ...], shape: tuple[int, ...], dilation: Any, groups: int
) -> None:
    """Against the matrix of a convolution that is written out tap by tap."""
    weight = torch.randn(4, 6 // groups, *kernel, dtype=F64)
    units = torch.eye(6 * math.prod(shape), dtype=F64).reshape(-1, 6, *shape)
    steps = (dilation,) * len(shape) if isinstance(dilation, int) else dilation
    out = torch.zeros(len(units), 4, *shape, dtype=F64)
    for tap in torch.cartesian_prod(*map(torch.arange, kernel)).reshape(-1, len(kernel)).tolist():
        moved = units.roll([-t * d for t, d in zip(tap, steps, strict=True)], tuple(range(2, 2 + len(shape))))
        for part in range(groups):
            rows, columns = (
                slice(part * 4 // groups, (part + 1) * 4 // groups),
                slice(part * 6 // groups, (part + 1) * 6 // groups),
            )
            out[:, rows] += torch.einsum("oi,bi...->bo...", weight[(rows, slice(None), *tap)], moved[:, columns])
    expected = torch.linalg.svdvals(out.flatten(1))
    values = conv_singular_values(weight, shape, dilation=dilation, groups=groups)
    assert torch.allclose(values, expected[: len(values)], atol=1e-10)
    assert expected[len(values) :].abs().max() <= 1e-10 if len(expected) > len(values) else True


def test_singular_values_need_a_shape() -> None:
    with pytest.raises(ShapeError, match="2 spatial sizes"):
        conv_singular_values(torch.randn(2, 2, 3, 3), (4,))


# ---------------------------------------------------------------------------------------- Lipschitz bounds

ACTIVATIONS = [
    nn.ReLU(), nn.ReLU6(), nn.Hardtanh(), nn.Tanh(), nn.Softplus(), nn.Softsign(), nn.CELU(), nn.LogSigmoid(), nn.Tanhshrink(),
    nn.Softshrink(), nn.Sigmoid(), nn.Hardsigmoid(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.Hardswish(), nn.SELU(),
    nn.ELU(), nn.ELU(2.0), nn.ELU(0.5), nn.LeakyReLU(), nn.LeakyReLU(-3.0), nn.PReLU(), nn.Identity(),
]  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_slopes_of_activations(activation: nn.Module) -> None:
    x = torch.linspace(-20, 20, 400_001, dtype=F64, requires_grad=True)
    activation = activation.double()
    (slope,) = torch.autograd.grad(activation(x).sum(), x)
    assert slope.abs().max() <= lipschitz_bound(activation) + 1e-8
    assert slope.abs().max() >= lipschitz_bound(activation) - 1e-3


def test_bounds_compose() -> None:
    net = nn.Sequential(nn.ELU(2.0), nn.Sequential(nn.GELU(), nn.Dropout(0.5)), Counted(nn.ReLU()))
    assert lipschitz_bound(net) == pytest.approx(2 * 1.129 * 2 * 0.9)
    assert lipschitz_bound(net.eval()) == pytest.approx(2 * 1.129 * 0.9)
    assert lipschitz_bound(nn.BatchNorm1d(3)) == math.inf
    assert lipschitz_bound(nn.Sequential(nn.Softmax(-1))) == math.inf


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_the_bound_holds(case: Case) -> None:
    made = block(case)
    made(batch(case))
    bound = made.contraction_bound()
    assert 0 < bound < 1
    x, y = batch(case), batch(case)
    for _ in range(20):  # towards the direction that is stretched most
        y = (x + F.normalize(made.g(y) - made.g(x), dim=1)).detach()
        stretch = (made.g(x) - made.g(y)).flatten(1).norm(dim=1) / (x - y).flatten(1).norm(dim=1)
        assert 0.01 < stretch.max() <= bound + 1e-9
    assert made.lipschitz_bound() == pytest.approx(1 + bound)


# ------------------------------------------------------------------------------------------------- the law


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("anderson", [0, 3])
def test_inverse(case: Case, anderson: int) -> None:
    made, x = block(case, anderson=anderson), batch(case)
    for _ in range(3):  # in training mode too: an inverse takes no power iteration
        assert torch.allclose(made.inverse(made(x)), x, atol=1e-10)
    made.eval()
    assert torch.allclose(made.inverse(made(x)), x, atol=1e-10)
    assert torch.allclose(made(made.inverse(x)), x, atol=1e-10)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_inverse_of_a_blank_sample(dtype: torch.dtype) -> None:
    """The output is all bias: next to nothing of the input is left to be relative to."""
    made = block(CASES[4]).to(dtype)
    x = batch(CASES[4], dtype)
    x[0] *= torch.finfo(dtype).eps
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.mul_(100 if name.endswith("bias") else 1)
        y = made(x)
        assert (made.inverse(y) - x).norm() <= 10 * torch.finfo(dtype).eps * y.norm()


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-2)])
def test_inverse_in_other_dtypes(case: Case, dtype: torch.dtype, tol: float) -> None:
    made, x = block(case).to(dtype), batch(case, dtype)
    with torch.no_grad():
        off = made.inverse(made(x)) - x
    assert off.dtype == dtype
    assert off.double().norm() <= tol * x.double().norm()


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("grad", [False, True])
def test_gradients_are_those_of_plain_autograd(case: Case, grad: bool, no_gc: None) -> None:
    model = nn.Sequential(*[block(case) for _ in range(4)])
    rev = compare(model, batch(case).requires_grad_(grad))
    assert rev.stats is not None
    assert rev.stats.inversions == 2
    assert rev.stats.second_evaluations == 0


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_log_det_is_that_of_the_jacobian(case: Case) -> None:
    made, x = block(case, terms=None), batch(case)
    y, ladj = made.call_and_ladj(x)
    assert ladj.shape == (len(x),)
    assert torch.equal(ladj, made.eval().log_det(x))
    assert torch.allclose(y, made(x), atol=1e-14)
    for sample, value in zip(x, ladj, strict=True):
        jacobian = torch.autograd.functional.jacobian(made, sample[None]).reshape(sample.numel(), -1)
        assert torch.allclose(torch.linalg.slogdet(jacobian)[1], value, atol=1e-10)


class Likelihood(nn.Module):
    """Blocks trained by their log-determinants."""

    def __init__(self, blocks: list[InvertibleResidual]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros(len(x), dtype=x.dtype)
        for made in self.blocks:
            x, ladj = made.call_and_ladj(x)
            total = total + ladj
        return x, total


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("terms", [None, 3])
def test_gradients_of_the_log_det(case: Case, terms: int | None) -> None:
    model = Likelihood([block(case, terms=terms) for _ in range(3)])
    rev = compare(model, batch(case))
    assert rev.stats is not None
    assert rev.stats.inversions + rev.stats.replays >= 1  # the input is small beside what the estimator saves


def test_training_by_log_det_saves_memory() -> None:
    def peak(depth: int) -> tuple[int, int]:
        model = Likelihood([block(CASES[1], terms=4) for _ in range(depth)])
        stats = step(model, torch.randn(32, 6, dtype=F64), reverse=True).stats
        assert stats is not None
        return stats.peak_held_bytes, stats.packed_bytes

    (few, _), (many, packed) = peak(3), peak(12)
    assert many < 1.5 * few
    assert many < packed / 4


# -------------------------------------------------------------------------------------- log-det estimates


def test_series_and_its_bias() -> None:
    """A diagonal branch: noise of plus and minus one gives every trace exactly, so only the cut is seen."""
    for rate in (0.3, 0.8, -0.8):
        layer = nn.Linear(5, 5, bias=False)
        with torch.no_grad():
            layer.weight.copy_(rate * torch.eye(5))
        x = torch.randn(2, 5, dtype=F64)
        for terms in (1, 4, 9):
            made = InvertibleResidual(layer, 0.9, terms=terms).double()
            cut = 5 * sum((-1) ** (k + 1) * rate**k / k for k in range(1, terms + 1))
            bias = 5 * abs(rate) ** (terms + 1) / ((terms + 1) * (1 - abs(rate)))
            assert torch.allclose(made.log_det(x), torch.full((2,), cut, dtype=F64))
            assert abs(cut - 5 * math.log(1 + rate)) <= bias


def test_estimate_is_unbiased_and_draws_from_torch() -> None:
    made, x = block(CASES[1], 0.5, terms=12, samples=150), batch(CASES[1])
    torch.manual_seed(3)
    estimate = made.log_det(x)
    torch.manual_seed(3)
    assert torch.equal(made.eval().log_det(x), estimate)
    made.terms = None
    assert torch.allclose(estimate, made.log_det(x), atol=0.1)
    made.terms, made.samples = 3, 1
    assert not torch.equal(made.log_det(x), made.log_det(x))


def test_gradient_of_the_estimate_is_that_of_the_exact_one() -> None:
    grads = []
    for terms in (None, 60):
        torch.manual_seed(0)
        layer = nn.Linear(5, 5)
        with torch.no_grad():
            layer.weight.copy_(torch.diag(torch.linspace(-0.6, 0.6, 5)))
        made = InvertibleResidual(layer, 0.9, terms=terms).double().eval()
        made.log_det(torch.randn(2, 5, dtype=F64)).sum().backward()
        grads.append(made.g.weight.grad.diagonal())
    assert torch.allclose(*grads, atol=1e-9)


@pytest.mark.parametrize("terms", [None, 3])
def test_log_det_without_grad(terms: int | None) -> None:
    made, x = block(CASES[1], terms=terms), batch(CASES[1])
    with torch.no_grad():
        y, ladj = made.call_and_ladj(x)
    assert not y.requires_grad
    assert not ladj.requires_grad
    assert not x.requires_grad


# ---------------------------------------------------------------------------------- state, and replays of it


def test_power_iteration_runs_once_a_training_forward_and_never_else() -> None:
    made, x = block(CASES[4]), batch(CASES[4])

    def vectors() -> list[Tensor]:
        return [layer.v.clone() for layer in made.layers()]

    def same(a: list[Tensor], b: list[Tensor]) -> bool:
        return all(map(torch.equal, a, b))

    y = made(x)
    first = vectors()
    expected = copy.deepcopy(made)
    for layer in expected.layers():
        layer.advance()
    made.inverse(y)
    made.inverse_with_evidence(y)
    made.transform(x)
    made.contraction_bound()
    made.eval()(x)
    assert same(vectors(), first)
    made.train()(x)
    assert not same(vectors(), first)
    assert same(vectors(), [layer.v for layer in expected.layers()])
    with revhooks.reversible() as run:
        model = nn.Sequential(made, block(CASES[4]), block(CASES[4]))
        loss = model(x).square().sum()
        during = vectors()
        loss.backward()
    assert run.stats.inversions + run.stats.replays > 0
    assert same(vectors(), during)


def test_two_forwards_before_a_backward() -> None:
    """Each inverse has to find the vectors that its own forward saw."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(*[InvertibleResidual(conv(scale=30.0), 0.9) for _ in range(4)])

        def forward(self, x: Tensor) -> Tensor:
            a = self.body(x)
            b = self.body(-x)
            return a * b

    model = Twice().double()
    x = torch.randn(2, 4, 5, 5, dtype=F64)
    model(x)
    for parameter in model.parameters():  # the vectors lag behind
        parameter.data.add_(torch.randn_like(parameter))
    rev = compare(model, x)
    assert rev.stats is not None
    assert rev.stats.inversions > 0


def test_another_shape_between_forward_and_backward() -> None:
    model = nn.Sequential(*[block(CASES[4]) for _ in range(3)])
    grads = []
    for reverse in (False, True):
        net = copy.deepcopy(model)
        torch.manual_seed(0)
        context = revhooks.reversible() if reverse else revhooks.reversible(keep=InvertibleResidual)
        with context:
            loss = net(torch.randn(2, 4, 5, 5, dtype=F64)).square().mean()
            other = net(torch.randn(2, 4, 7, 3, dtype=F64)).square().mean()
            (loss + other).backward()
        grads.append([p.grad for p in net.parameters()])
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_evaluations(dtype: torch.dtype) -> None:
    """Forward, the solver's steps, and the one that fills the slots, however the number of steps changes."""
    blocks = [InvertibleResidual(Counted(mlp()), 0.9).to(dtype) for _ in range(3)]
    model, x = nn.Sequential(*blocks), torch.randn(4, 6, dtype=dtype)
    optimizer, steps = torch.optim.SGD(model.parameters(), 0.3), set()
    for turn in range(4):
        for made in blocks:
            made.g.calls = 0
        optimizer.zero_grad()
        with revhooks.reversible(guard="raise") as run:
            model(x).square().mean().backward()
        optimizer.step()
        assert run.stats.second_evaluations == 0
        counts = [made.g.calls for made in blocks]
        if turn:
            assert counts[2] == 1  # the newest block is kept
            assert counts[0] == 2  # its input is held: replayed
            assert run.stats.inversions == 1
            assert 2 + 5 < counts[1] < 2 + 100
            steps.add(counts[1])
    assert len(steps) > 1 or dtype is not F64  # the test is about a number that changes


def test_memory_does_not_grow_with_depth() -> None:
    held = []
    for depth in (3, 9):
        model = nn.Sequential(*[block(CASES[4]) for _ in range(depth)])
        held.append(step(model, batch(CASES[4]), reverse=True).held_after_forward)
    assert held[0] == held[1]


def test_dropout_in_the_branch() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.1), nn.ELU(), nn.Linear(6, 6))
    model = nn.Sequential(*[InvertibleResidual(copy.deepcopy(net), 0.9) for _ in range(3)]).double()
    x = torch.randn(3, 6, dtype=F64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        assert_same(step(model, x, reverse=False), step(model, x, reverse=True), 1e-10)
    states = random_states()
    y = model[0](x)
    set_random_states(states)
    assert torch.allclose(model[0].inverse(y), x, atol=1e-10)


def test_autocast() -> None:
    model = nn.Sequential(*[InvertibleResidual(conv(), 0.9) for _ in range(3)])
    x = torch.randn(2, 4, 5, 5)
    grads = []
    for reverse in (False, True):
        net = copy.deepcopy(model)
        with revhooks.reversible() if reverse else revhooks.reversible(keep=InvertibleResidual):
            with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
                loss = net(x).square().mean()
            loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert (grads[0] - grads[1]).norm() <= 0.05 * grads[0].norm()


def test_copies_pickles_and_checkpoints() -> None:
    made, x = block(CASES[4]), batch(CASES[4])
    assert [name for name in made.state_dict() if name.endswith(".v")] == ["g.1.v", "g.3.v", "g.5.v"]
    keys = list(made.state_dict())
    pickle.loads(pickle.dumps(made))
    with revhooks.reversible():
        y = made(x)
        copies = [copy.deepcopy(made), pickle.loads(pickle.dumps(made))]
        y.sum().backward()
    fresh = block(CASES[4])
    fresh.load_state_dict(made.state_dict())
    assert list(made.state_dict()) == keys
    for other in (*copies, fresh):
        assert torch.equal(other.eval()(x), y)
        assert list(other.state_dict()) == keys
        assert torch.allclose(other.inverse(y), x, atol=1e-10)


def test_check() -> None:
    result = revhooks.check(block(CASES[4]), batch(CASES[4]))
    assert result, str(result)
    assert result.inverse_error <= 1e-12
    result = revhooks.check(nn.Sequential(*[block(CASES[4]) for _ in range(3)]), batch(CASES[4]))
    assert result, str(result)


# ------------------------------------------------------------------------------- the inverse, differentiated


@pytest.mark.parametrize("case", [CASES[1], CASES[4]], ids=["mlp", "conv"])
@pytest.mark.parametrize("reverse", [False, True])
def test_gradient_of_the_inverse(case: Case, reverse: bool) -> None:
    made, x = block(case).eval(), batch(case)
    y = made(x).detach().requires_grad_()
    weights = torch.randn_like(x)
    if reverse:
        with revhooks.reversible():
            (made.inverse(y) * weights).sum().backward()
    else:
        (made.inverse(y) * weights).sum().backward()
    got = [p.grad for p in made.parameters()]
    jacobian = torch.autograd.functional.jacobian(made, x).reshape(x.numel(), -1)
    cotangent = torch.linalg.solve(jacobian.T, weights.flatten()).reshape(x.shape)
    assert torch.allclose(y.grad, cotangent, atol=1e-10)
    expected = torch.autograd.grad(made(x), list(made.parameters()), -cotangent)
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(got, expected, strict=True))


def test_inverse_asks_for_grad_only_where_there_is_some() -> None:
    made, y, weights = block(CASES[1]), batch(CASES[1]), batch(CASES[1])
    (wanted,) = torch.autograd.grad(made.inverse(y.requires_grad_()), y, weights)
    made.requires_grad_(False)
    assert not made.inverse(y.detach()).requires_grad
    (got,) = torch.autograd.grad(made.inverse(y), y, weights)
    assert torch.equal(got, wanted)


def test_inverse_is_not_differentiated_twice() -> None:
    made = block(CASES[1])
    y = batch(CASES[1]).requires_grad_()
    with pytest.raises(BackwardError, match="create_graph=True"):
        torch.autograd.grad(made.inverse(y).sum(), y, create_graph=True)


# --------------------------------------------------------------------------------------------------- errors


def test_an_inverse_that_does_not_converge() -> None:
    made = InvertibleResidual(scaled(nn.Linear(4, 4), 20), None).double()
    y = torch.randn(2, 4, dtype=F64)
    assert not made.inverse_with_evidence(y).converged
    with pytest.raises(InversionError, match=r"InvertibleResidual \(inverse\).*residual.*contraction_bound"):
        made.inverse(y)
    slow = block(CASES[1], max_steps=2)
    with pytest.raises(InversionError, match="after 2"):
        slow.inverse(slow(batch(CASES[1])))


def test_what_does_not_invert_falls_back() -> None:
    model = nn.Sequential(*[InvertibleResidual(mlp(scale=30.0), None) for _ in range(3)]).double()
    x = torch.randn(3, 6, dtype=F64)
    plain = step(model, x, reverse=False)
    with pytest.warns(FallbackWarning, match="fixed point"):
        assert_same(plain, step(model, x, reverse=True), 1e-10)


class Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.linear(2 * x)


@pytest.mark.parametrize(
    ("g", "coeff", "error", "words"),
    [
        (lambda: torch.tanh, 0.9, RegistrationError, "a branch that is a module, got builtin"),
        (lambda: nn.Linear(4, 4), 1.0, ShapeError, "0 < coeff < 1"),
        (lambda: nn.Linear(4, 4), 0, ShapeError, "0 < coeff < 1"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), 0.9, RegistrationError, "BatchNorm1d has inf"),
        (Opaque, 0.9, RegistrationError, "Opaque has inf"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.GELU()), 0.9, RegistrationError, r"1\.016: GELU has 1\.129"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2)), 0.9, RegistrationError, r"Dropout has 1\.25"),
    ],
)
def test_what_is_refused(g: Callable[[], Any], coeff: float, error: type[RevhooksError], words: str) -> None:
    with pytest.raises(error, match=words):
        InvertibleResidual(g(), coeff)


def test_what_is_accepted() -> None:
    InvertibleResidual(nn.Sequential(nn.Linear(4, 4), nn.GELU()), 0.85)
    InvertibleResidual(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), None)
    InvertibleResidual(Counted(nn.Linear(4, 4)), 0.9)


def test_a_branch_that_changes_the_shape() -> None:
    with pytest.raises(ShapeError, match=r"branch SpectralLinear: expected a tensor of its input's shape \(2, 4\)"):
        InvertibleResidual(nn.Linear(4, 1), 0.9)(torch.randn(2, 4))


def test_a_bound_needs_a_shape() -> None:
    with pytest.raises(ShapeError, match="call it once"):
        InvertibleResidual(nn.Linear(4, 4), 0.9).contraction_bound()
    with pytest.raises(ShapeError, match="call it once"):
        contract(nn.Conv1d(1, 1, 1), 0.5).operator_norm()
