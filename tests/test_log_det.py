"""`revhooks.log_det`: the log-det of any registered model beside its forward, against that of the Jacobian."""

from __future__ import annotations

import contextlib
import copy
import inspect
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import revhooks
from revhooks import nn as rnn
from revhooks.adapters import Adapter, Block
from revhooks.errors import RegistrationError, ShapeError
from revhooks.functional import Law
from revhooks.nn.volumes import NOT_BIJECTIVE
from revhooks.registry import ACTIVE
from tests.conftest import Count, calls

D = torch.float64


def mlp(source: int, target: int, hidden: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(source, hidden), nn.Tanh(), nn.Linear(hidden, target))


def conv(source: int, target: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(source, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, target, 3, padding=1))


class Momentum(nn.Module):
    """A position and a velocity as one tensor."""

    def __init__(self, *fs: nn.Module) -> None:
        super().__init__()
        self.chain = rnn.MomentumSequential(*fs, gamma=0.8)

    def forward(self, x: Tensor) -> Tensor:
        state = self.chain.run(rnn.MomentumState(*x.chunk(2, 1)))
        return torch.cat([state.x, state.v], 1)


class ExactMomentum(nn.Module):
    """One step on a grid, whose rounding its gradient does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.step = rnn.ExactMomentumResidual(mlp(2, 2), gamma=0.5)

    def forward(self, x: Tensor) -> Tensor:
        x, v = x.chunk(2, 1)
        return torch.cat(self.step(x, v, torch.zeros(x.shape, dtype=torch.int8))[:2], 1)


def flow_step(channels: int) -> rnn.FlowSequential:
    coupling = rnn.AffineCoupling(conv(channels // 2, channels))
    return rnn.FlowSequential(rnn.ActNorm(channels), rnn.InvertibleConv1x1(channels), coupling)


def glow() -> rnn.MultiScale:
    return rnn.MultiScale(
        rnn.FlowSequential(rnn.Squeeze(2), flow_step(4), flow_step(4)), rnn.FlowSequential(rnn.Squeeze(2), flow_step(8))
    )


ROW, IMAGE = (5, 4), (3, 4, 4, 4)
SQUARE = Law(lambda x, u: x * (1 + u * u), lambda y, u: y / (1 + u * u), log_det=lambda _, u: torch.log1p(u * u).sum(1))
# of each bijection of the package some, and the shape of their inputs
LAYERS: dict[str, list[tuple[Callable[[], nn.Module], tuple[int, ...]]]] = {
    "ActNorm": [(lambda: rnn.ActNorm(4), ROW), (lambda: rnn.ActNorm(4), IMAGE)],
    "AdditiveCoupling": [
        (lambda: rnn.AdditiveCoupling(mlp(2, 2), mlp(2, 2)), ROW),
        (lambda: rnn.AdditiveCoupling(conv(2, 2)), IMAGE),
    ],
    "AffineCoupling": [
        (lambda: rnn.AffineCoupling(mlp(2, 4), mlp(2, 4)), ROW),
        (lambda: rnn.AffineCoupling(mlp(3, 2), scale="exp", sizes=(1, 3)), ROW),
        (lambda: rnn.AffineCoupling(conv(2, 4), scale="sigmoid", swap=True), IMAGE),
    ],
    "ExactMomentumResidual": [(ExactMomentum, ROW)],
    "Flatten": [(lambda: rnn.Flatten((4, 4, 4)), IMAGE)],
    "FlowSequential": [(lambda: flow_step(4), IMAGE), (lambda: rnn.FlowSequential(rnn.Sigmoid(), rnn.Logit()), ROW)],
    "HaarDownsampling": [(rnn.HaarDownsampling, IMAGE)],
    "HaarUpsampling": [(rnn.HaarUpsampling, IMAGE)],
    "Inverse": [(lambda: rnn.Inverse(rnn.AffineCoupling(mlp(2, 4))), ROW), (lambda: rnn.Inverse(rnn.SinhArcsinh(4)), ROW)],
    "InvertibleConv1x1": [(lambda: rnn.InvertibleConv1x1(4), IMAGE), (lambda: rnn.InvertibleConv1x1(4, lu=False), IMAGE)],
    "InvertibleLinear": [(lambda: rnn.InvertibleLinear(4), ROW), (lambda: rnn.InvertibleLinear(4, lu=False), ROW)],
    "InvertibleResidual": [(lambda: rnn.InvertibleResidual(mlp(4, 4), terms=None), ROW)],
    "LeakyReLU": [(lambda: rnn.LeakyReLU(0.3), ROW)],
    "Logit": [(lambda: nn.Sequential(rnn.Sigmoid(), rnn.Logit(0.1)), ROW)],
    "MaskedAutoregressive": [(lambda: rnn.MaskedAutoregressive(rnn.MADE(4, 2, (8,), activation=nn.Tanh)), ROW)],
    "MaskedCoupling": [(lambda: rnn.MaskedCoupling(mlp(4, 8), torch.tensor([True, False, True, False])), ROW)],
    "MomentumResidual": [(lambda: Momentum(mlp(2, 2), mlp(2, 2)), ROW)],
    "MultiScale": [(glow, (2, 1, 8, 8))],
    "OrthogonalDownsampling": [(lambda: rnn.OrthogonalDownsampling(4), IMAGE)],
    "OrthogonalUpsampling": [(lambda: rnn.OrthogonalUpsampling(1), IMAGE)],
    "Permute": [(lambda: rnn.Permute.random(4), ROW)],
    "Reshape": [(lambda: rnn.Reshape((4, 4, 4), (8, 8)), IMAGE)],
    "ReversibleSequential": [
        (lambda: rnn.ReversibleSequential(*(mlp(2, 4) for _ in range(5)), coupling="affine"), ROW),
        (lambda: rnn.ReversibleSequential(mlp(2, 2), mlp(2, 2), mlp(2, 2), coupling=SQUARE), ROW),
        (lambda: rnn.ReversibleSequential(*(mlp(2, 2) for _ in range(4))), ROW),
    ],
    "Sigmoid": [(rnn.Sigmoid, ROW)],
    "SinhArcsinh": [(lambda: rnn.SinhArcsinh(4), ROW)],
    "Softplus": [(rnn.Softplus, ROW)],
    "SplineCoupling": [(lambda: rnn.SplineCoupling(mlp(2, 2 * 23)), ROW)],
    "Squeeze": [(rnn.Squeeze, IMAGE)],
    "Tanh": [(rnn.Tanh, ROW)],
    "Unsqueeze": [(rnn.Unsqueeze, IMAGE)],
}
# what is no bijection, or a part of one
OTHERS = {
    "ConvNet",
    "Coupling",
    "Flow",
    "MADE",
    "MLP",
    "MomentumSequential",
    "WithoutSkip",
    *(cls.__name__ for cls in NOT_BIJECTIVE),
}
CASES = [pytest.param(make, shape, id=f"{name}-{i}") for name, made in LAYERS.items() for i, (make, shape) in enumerate(made)]


def test_every_layer_of_the_package_is_here() -> None:
    """A new one fails here until it says whether it is a bijection, and below if its log-det is missed."""
    layers = {name for name in rnn.__all__ if inspect.isclass(one := getattr(rnn, name)) and issubclass(one, nn.Module)}
    assert layers == set(LAYERS) | OTHERS


def ready(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> tuple[nn.Module, Tensor]:
    """A model that has been called once, with parameters at random, and its input."""
    model, x = make().to(D), torch.randn(shape, dtype=D)
    model(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval(), x


def flat(y: Any) -> Tensor:
    """Each sample as a vector, of all latents."""
    return torch.cat([one.flatten(1) for one in (y if isinstance(y, tuple) else (y,))], 1)


def by_jacobian(call: Callable[[Tensor], Any], x: Tensor, *, create_graph: bool = False) -> Tensor:
    """The log-abs-det of each sample: no layer here mixes samples."""
    jacobians = [
        torch.autograd.functional.jacobian(lambda one: flat(call(one[None]))[0], sample, create_graph=create_graph)
        for sample in x
    ]
    return torch.stack([torch.linalg.slogdet(jacobian.flatten(1))[1] for jacobian in jacobians])


@contextlib.contextmanager
def both(order: str, **options: Any) -> Iterator[Any]:
    """``log_det()`` alone, in ``reversible()``, or around it."""
    with contextlib.ExitStack() as stack:
        if order == "inside":
            stack.enter_context(revhooks.reversible(**options))
        ld = stack.enter_context(revhooks.log_det())
        if order == "around":
            stack.enter_context(revhooks.reversible(**options))
        yield ld


ORDERS = ["alone", "inside", "around"]


def gradients(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]) -> list[Tensor]:
    x = x.clone().requires_grad_()
    wanted = [x, *model.parameters()]
    found = torch.autograd.grad(loss(x), wanted, allow_unused=True)
    return [torch.zeros_like(one) if grad is None else grad for one, grad in zip(wanted, found, strict=True)]


def assert_close(got: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-9) -> None:
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("make", "shape"), CASES)
def test_a_layer(make: Callable[[], nn.Module], shape: tuple[int, ...], order: str) -> None:
    model, x = ready(make, shape)
    with both(order) as ld:
        y = model(x)
    assert_close([flat(y)], [flat(model(x))], 1e-12)
    assert ld.value.shape == (len(x),) or not ld.value.dim()
    assert_close([ld.value.expand(len(x))], [by_jacobian(model, x)], 1e-10)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("make", "shape"), [one for one in CASES if one.id not in ("ExactMomentumResidual-0", "MultiScale-0")])
def test_gradients_of_a_layer(make: Callable[[], nn.Module], shape: tuple[int, ...], order: str) -> None:
    model, x = ready(make, shape)

    def loss(x: Tensor) -> Tensor:
        with both(order) as ld:
            y = model(x)
        return flat(y).square().mean() - ld.value.mean()

    def wanted(x: Tensor) -> Tensor:
        return flat(model(x)).square().mean() - by_jacobian(model, x, create_graph=True).mean()

    assert_close(gradients(model, x, loss), gradients(model, x, wanted))


@pytest.mark.parametrize(("make", "shape"), [one for one in CASES if not one.id.startswith(("Logit", "Momentum", "Exact"))])
def test_an_inverse_of_a_layer(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    model, x = ready(make, shape)
    y = model(x)
    with revhooks.log_det() as ld:
        again = model.inverse(y)  # type: ignore[operator]
    assert_close([again], [x])
    assert_close([-ld.value.expand(len(x))], [by_jacobian(model, x)], 1e-7)  # inverses of i-ResNets converge so far


def test_an_estimate_in_expectation() -> None:
    model, x = ready(lambda: rnn.InvertibleResidual(mlp(4, 4), 0.5, terms=20), ROW)
    values = []
    for _ in range(400):
        with revhooks.log_det() as ld, torch.no_grad():
            model(x)
        values.append(ld.value)
    drawn = torch.stack(values)
    error = drawn.std(0) / len(drawn) ** 0.5
    assert drawn.std(0).min() > 0
    assert ((drawn.mean(0) - by_jacobian(model, x)).abs() < 5 * error).all()


@pytest.mark.parametrize("cls", NOT_BIJECTIVE, ids=lambda cls: cls.__name__)
def test_what_is_no_bijection_says_so(cls: type) -> None:
    made: dict[type, Callable[[], nn.Module]] = {
        rnn.MomentumSequential: lambda: rnn.MomentumSequential(mlp(4, 4)),
        rnn.RevNetStack: lambda: rnn.to_revnet([mlp(4, 4)]),
        rnn.Pad: lambda: rnn.Pad(2),
    }
    with revhooks.log_det(), pytest.raises(RegistrationError, match=rf"log-det of {cls.__name__}: expected a bijection"):
        made[cls]()(torch.randn(ROW))


# ------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("order", ORDERS)
def test_each_branch_is_evaluated_once_in_forward_and_once_in_backward(order: str) -> None:
    def make() -> nn.Module:
        blocks = [rnn.AffineCoupling(Count(mlp(2, 4)), Count(mlp(2, 4))) for _ in range(2)]
        return nn.Sequential(*blocks, rnn.ReversibleSequential(*(Count(mlp(2, 4)) for _ in range(3)), coupling="affine"))

    model, x = ready(make, ROW)
    before = calls(model)
    for _ in range(2):
        with both(order) as ld:
            y = model(x)
        assert [now - then for now, then in zip(calls(model), before, strict=True)] == [1] * 7
        (y.square().mean() - ld.value.mean()).backward()
        after = calls(model)
        # the last step of all is kept
        wanted = [1] * 7 if order == "alone" else [2] * 6 + [1]
        assert [now - then for now, then in zip(after, before, strict=True)] == wanted
        before = after


@pytest.mark.parametrize("order", ["inside", "around"])
@pytest.mark.parametrize("chain", [True, False])
def test_savings_are_kept(order: str, chain: bool) -> None:
    """Nothing is held for a log-det but in the newest block, however many there are."""
    make: Callable[[int], nn.Module] = (
        (lambda depth: rnn.ReversibleSequential(*(mlp(8, 16, 64) for _ in range(2 * depth)), coupling="affine", dim=1))
        if chain
        else (lambda depth: nn.Sequential(*(rnn.AffineCoupling(mlp(8, 16, 64), mlp(8, 16, 64)) for _ in range(depth))))
    )

    def held(depth: int, *, counting: bool) -> tuple[int, int, int]:
        model, x = ready(lambda: make(depth), (32, 16))
        for _ in range(2):
            with contextlib.ExitStack() as stack:
                if order == "around" and counting:
                    ld = stack.enter_context(revhooks.log_det())
                run = stack.enter_context(revhooks.reversible())
                if order == "inside" and counting:
                    ld = stack.enter_context(revhooks.log_det())
                y = model(x.clone().requires_grad_() * 1)
                loss = y.square().mean() - (ld.value.mean() if counting else 0)
                after = run.stats.held_bytes
                loss.backward()
        assert not run.stats.held_bytes
        return after, run.stats.peak_held_bytes, run.stats.packed_bytes

    plain, counted = held(12, counting=False), held(12, counting=True)
    newest = 32 * 16 * 8  # log-scales of the block that is kept
    assert counted[0] <= plain[0] + newest
    assert counted[1] <= plain[1] + 2 * newest
    assert counted[2] > 5 * counted[1]
    assert held(24, counting=True)[:2] == counted[:2]


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_in_blocks_count_once(order: str) -> None:
    class Step(rnn.Flow):
        """A flow layer made of some: its own `log_det` is theirs."""

        def __init__(self) -> None:
            super().__init__()
            self.parts = rnn.FlowSequential(rnn.ActNorm(4), rnn.AffineCoupling(mlp(2, 4)))

        def forward(self, x: Tensor) -> Tensor:
            return self.parts(x)

        def inverse(self, y: Tensor) -> Tensor:
            return self.parts.inverse(y)

        def log_det(self, x: Tensor) -> Tensor:
            return self.parts.log_det(x)

    model, x = ready(lambda: nn.Sequential(Step(), rnn.AffineCoupling(nn.Sequential(rnn.Tanh(), nn.Linear(2, 4)))), ROW)
    with both(order) as ld:
        model(x)
    assert_close([ld.value], [by_jacobian(model, x)], 1e-10)


def test_a_layer_of_somebody_elses_is_counted_without_registration() -> None:
    class Cube(rnn.Flow):
        def forward(self, x: Tensor) -> Tensor:
            return x + x**3

        def log_det(self, x: Tensor) -> Tensor:
            return torch.log1p(3 * x * x).sum(1)

    class Twice(nn.Module):  # in a container of the package the methods are enough
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

        def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return 2 * x, x[0].numel() * x.new_full((len(x),), 2.0).log()

        def inverse(self, y: Tensor) -> Tensor:
            return y / 2

    x = torch.randn(ROW, dtype=D)
    inner = rnn.FlowSequential(Twice(), nn.Sequential(rnn.Tanh()))
    for model in (nn.Sequential(Cube(), Cube()), rnn.FlowSequential(Cube(), Twice()), rnn.MultiScale(inner, Twice())):
        with revhooks.log_det() as ld:
            model(x)
        assert_close([ld.value], [by_jacobian(model, x)], 1e-7)
    model = rnn.FlowSequential(Twice(), rnn.InvertibleResidual(mlp(4, 4), terms=None), rnn.FlowSequential(rnn.Tanh())).to(D)
    model(x)
    model.eval()
    with torch.no_grad(), revhooks.log_det() as there:
        y, ladj = model.call_and_ladj(x)
    with torch.no_grad(), revhooks.log_det() as back:
        model.inverse(y)
    assert_close([there.value, ladj, -back.value], [by_jacobian(model, x)] * 3, 1e-7)


def test_calls_add_up_and_questions_do_not() -> None:
    model, x = ready(lambda: rnn.AffineCoupling(mlp(2, 4)), ROW)
    wanted = model.log_det(x)  # type: ignore[operator]
    with revhooks.log_det() as ld:
        model(model(x))
        model.log_det(x)  # type: ignore[operator]
        _, ladj = model.call_and_ladj(x)  # type: ignore[operator]
    assert_close([ld.value], [wanted + model.log_det(model(x)) + ladj], 1e-12)  # type: ignore[operator]
    deep, _ = ready(lambda: rnn.FlowSequential(rnn.AffineCoupling(mlp(2, 4)), rnn.Tanh()), ROW)
    with revhooks.log_det() as ld:
        deep.log_det(x)  # type: ignore[operator]
    assert not ld.value.any()
    with revhooks.log_det() as ld:
        _, ladj = deep.call_and_ladj(x)  # type: ignore[operator]
    assert torch.equal(ld.value, ladj)


@pytest.mark.parametrize("container", [nn.Sequential, rnn.FlowSequential])
def test_a_module_is_called_once_with_its_hooks(container: type[nn.Sequential]) -> None:
    layers = lambda: (rnn.ActNorm(4), rnn.InvertibleLinear(4, lu=False), rnn.SinhArcsinh(4), rnn.AffineCoupling(mlp(2, 4)))
    model, x = ready(lambda: container(*layers()), ROW)
    seen: list[nn.Module] = []
    for layer in model:
        layer.register_forward_hook(lambda module, *_: seen.append(module))
    with revhooks.log_det():
        model(x)
    assert seen == list(model)


def test_the_first_call_of_an_actnorm() -> None:
    layer, x = rnn.ActNorm(4).to(D), 3 + 2 * torch.randn(ROW, dtype=D)
    with both("around") as ld:
        layer(x)
    assert layer.log_scale.abs().min() > 0
    assert_close([ld.value], [layer.log_det(x)], 1e-12)


def test_low_precision_is_summed_in_float32() -> None:
    model = nn.Sequential(rnn.AffineCoupling(mlp(2, 4)), rnn.Sigmoid()).bfloat16()
    with revhooks.log_det() as ld:
        y = model(torch.randn(ROW, dtype=torch.bfloat16))
    assert y.dtype is torch.bfloat16
    assert ld.value.dtype is torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16), both("around") as ld:
        y = nn.Sequential(rnn.ActNorm(4), rnn.AffineCoupling(mlp(2, 4)))(torch.randn(ROW))
    assert ld.value.dtype is torch.float32
    (y.sum() - ld.value.sum()).backward()


# ------------------------------------------------------------------------------------- third-party blocks


class Affine(nn.Module):
    """A coupling of another library, with its log-det as the tests register it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(2, 4)

    def _terms(self, a: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self.net(a).chunk(2, 1)
        return shift, log_scale.tanh()

    def forward(self, x: Tensor) -> Any:
        a, b = x.chunk(2, 1)
        shift, log_scale = self._terms(a)
        return self._output(torch.cat([b * log_scale.exp() + shift, a], 1), log_scale.sum(1))

    def inverse(self, y: Tensor, *_: Any) -> Tensor:
        b, a = y.chunk(2, 1)
        shift, log_scale = self._terms(a)
        return torch.cat([a, (b - shift) * (-log_scale).exp()], 1)

    def volume(self, x: Tensor) -> Tensor:
        return self._terms(x.chunk(2, 1)[0])[1].sum(1)

    def _output(self, y: Tensor, log_det: Tensor) -> Any:
        return y


class Paired(Affine):
    def _output(self, y: Tensor, log_det: Tensor) -> Any:
        return y, log_det


class OfTuples(Affine):
    """FrEIA's: a tuple in, a tuple and the log-det out, which may be ``None``, or a number."""

    answer: Any = True

    def forward(self, x: Any, rev: bool = False, jac: bool = True) -> Any:
        if rev:
            return (super().inverse(x[0]),), None
        return super().forward(x[0])

    def _output(self, y: Tensor, log_det: Tensor) -> Any:
        return (y,), log_det if self.answer is True else self.answer


class Chain(nn.Module):
    """Calls blocks, and drops what they give beside their outputs."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Any) -> Any:
        for block in self.blocks:
            if isinstance(block, OfTuples):
                (x,), _ = block((x,))
            else:
                x = block(x)
                x = x[0] if isinstance(x, tuple) else x
        return x


def volume_of(module: Any, _: Any, x: Tensor) -> Tensor:
    return module.volume(x)


FORMS: dict[str, tuple[type[Affine], dict[str, Any]]] = {
    "name": (Affine, {"log_det": "volume", "inverse": "inverse"}),
    "function": (Affine, {"log_det": volume_of, "inverse": "inverse"}),
    "function of both": (Affine, {"log_det": volume_of, "inverse": lambda module, y: module.inverse(y)}),
    "name beside a pair": (Paired, {"log_det": "volume", "inverse": "inverse"}),
    "position": (Paired, {"log_det": 1, "inverse": "inverse"}),
    "position from the end": (Paired, {"log_det": -1, "inverse": lambda module, out: module.inverse(out[0])}),
    "function of a pair": (Paired, {"log_det": lambda _, out, *__: out[1], "inverse": "inverse"}),
    "replayed": (Affine, {"log_det": "volume", "inverse": None}),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_log_det(form: str, order: str, registered: Callable[..., None]) -> None:
    cls, options = FORMS[form]
    registered(cls, **options)
    model, x = ready(lambda: Chain(*(cls() for _ in range(3))), ROW)

    def loss(x: Tensor) -> Tensor:
        with both(order) as ld:
            y = model(x)
        assert_close([ld.value], [by_jacobian(model, x.detach())], 1e-10)
        return y.square().mean() - ld.value.mean()

    def wanted(x: Tensor) -> Tensor:
        return model(x).square().mean() - by_jacobian(model, x, create_graph=True).mean()

    for _ in range(2):
        assert_close(gradients(model, x, loss), gradients(model, x, wanted))


@pytest.mark.parametrize("form", FORMS)
def test_blocks_of_each_form_are_inverted_still(form: str, registered: Callable[..., None]) -> None:
    cls, options = FORMS[form]
    registered(cls, **options)
    model, x = ready(lambda: Chain(*(cls() for _ in range(8))), (64, 4))
    for _ in range(2):
        with revhooks.reversible() as run, revhooks.log_det() as ld:
            y = model(x)
            held = run.stats.held_bytes
            (y.square().mean() - ld.value.mean()).backward()
    assert run.stats.packed_bytes > 3 * held
    assert run.stats.inversions == (0 if options["inverse"] is None else 6)  # not of the first, which has its input, nor the last
    assert not [kept for kept in run.stats.kept if kept.nbytes]


def test_tuples_and_no_log_det(registered: Callable[..., None]) -> None:
    registered(OfTuples, inverse=lambda module, out, *_: (module.inverse(out[0][0]),), log_det=1)
    model, x = ready(lambda: Chain(OfTuples(), OfTuples()), ROW)
    with both("around") as ld:
        model(x)
    assert_close([ld.value], [by_jacobian(model, x)], 1e-10)
    for answer, total in ((0.0, 0.0), (2, 4.0)):
        OfTuples.answer = answer
        with both("around") as ld:
            model(x)
        assert torch.equal(ld.value, torch.tensor(total))
    OfTuples.answer = None
    with both("around"), pytest.raises(RegistrationError, match=r"OfTuples.*expected its log-det, got None.*jac=True"):
        model(x)
    OfTuples.answer = torch.zeros(5, 4)
    with both("around"), pytest.raises(ShapeError, match=r"OfTuples.*\(B,\), or one, got shape \(5, 4\)"):
        model(x)
    OfTuples.answer = True
    assert ACTIVE.volume is None


def test_training_by_a_registered_inverse(registered: Callable[..., None]) -> None:
    """normflows' way: the log-det is that of the call."""

    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Affine()

        def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
            return self.inner.inverse(z), -self.inner.volume(self.inner.inverse(z))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.inner(x), self.inner.volume(x)

    registered(Backwards, method="inverse", inverse=lambda block, out: block.forward(out[0])[0], log_det=1)
    registered(Backwards, inverse=lambda block, out: block.inverse(out[0])[0], log_det=1)
    block = Backwards().to(D)
    x = torch.randn(ROW, dtype=D)
    with both("around") as ld:
        block.inverse(x)
    assert_close([ld.value], [by_jacobian(lambda one: block.inverse(one)[0], x)], 1e-10)
    with both("around") as ld:
        block(block.inverse(x)[0])
    assert_close([ld.value], [torch.zeros(5, dtype=D)], 1e-10)


def test_a_container_counts_part_by_part(registered: Callable[..., None]) -> None:
    class Stage(Chain):
        def inverse(self, y: Tensor) -> Tensor:
            for block in reversed(self.blocks):
                y = block.inverse(y)  # type: ignore[operator]
            return y

    registered(Stage, inverse="inverse")
    model, x = ready(lambda: nn.Sequential(Stage(rnn.AffineCoupling(mlp(2, 4)), rnn.ActNorm(4)), rnn.Tanh()), ROW)
    for order in ORDERS:
        with both(order) as ld:
            model(x)
        assert_close([ld.value], [by_jacobian(model, x)], 1e-10)


def test_a_block_that_does_not_know_its_own_is_named(registered: Callable[..., None]) -> None:
    class WithMore(Chain):
        """A part of it is registered, and it computes more than its parts."""

        def __init__(self) -> None:
            super().__init__(rnn.ActNorm(4))
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale

        def inverse(self, y: Tensor) -> Tensor:
            return self.blocks[0].inverse(y / self.scale)  # type: ignore[operator]

    registered(Affine, inverse="inverse")
    registered(WithMore, inverse="inverse")
    for block in (Affine(), WithMore()):
        name = type(block).__name__
        with revhooks.log_det(), pytest.raises(RegistrationError, match=rf"^{name}: .*knows its log-det.*log_det="):
            block(torch.randn(ROW))
    model = nn.Sequential(nn.Linear(4, 4), Affine())
    names = {module: path for path, module in model.named_modules()}
    with revhooks.reversible() as run, revhooks.log_det():
        run.name_blocks(names.__getitem__)
        with pytest.raises(RegistrationError, match=r"^1 \(Affine\): "):
            model(torch.randn(ROW))
    revhooks.unregister(Affine)
    registered(Affine, inverse="inverse", log_det=1)
    with revhooks.log_det(), pytest.raises(RegistrationError, match=r"its log-det as output 1, got Tensor"):
        model(torch.randn(ROW))
    assert ACTIVE.volume is ACTIVE.top is None


def test_a_layer_that_overrides_forward_says_its_own() -> None:
    class Scaled(rnn.AffineCoupling):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return 2 * super().forward(x)

    class Harder(rnn.Tanh):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x)

    class Right(Harder):
        def log_det(self, x: Tensor) -> Tensor:
            return super().log_det(2 * x) + x[0].numel() * torch.tensor(2.0, dtype=D).log()

    x = torch.randn(ROW, dtype=D)
    for layer in (Scaled(mlp(2, 4)).to(D), Harder()):
        with revhooks.log_det(), pytest.raises(RegistrationError, match=f"{type(layer).__name__}: expected a log_det of its own"):
            layer(x)
    with revhooks.log_det() as ld:
        Right()(x)
    assert_close([ld.value], [by_jacobian(Right(), x)], 1e-7)


def test_transforms_that_are_no_modules_are_refused() -> None:
    class Shear(torch.distributions.Transform):
        domain = codomain = torch.distributions.constraints.real_vector
        bijective = True

        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(4, 4)

        def _call(self, x: Tensor) -> Tensor:
            return x + self.net(x)

    with revhooks.log_det(), pytest.raises(RegistrationError, match=r"Shear: expected modules.*torch\.distributions.*log_prob"):
        Shear()(torch.randn(ROW))


class Left(nn.Module):
    """Of a library whose table leaves it alone."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * x

    def inverse(self, y: Tensor) -> tuple[Tensor, float]:
        return y / 3, 0.0


def test_a_table_says_the_log_dets_of_what_it_inverts_and_leaves() -> None:
    triple = 4 * torch.tensor(3.0).log()
    said: dict[str, Any] = {"forward": lambda *_: triple, "inverse": lambda *_: -triple}
    ways = dict.fromkeys(("forward", "inverse"))
    original = dict(vars(Left))
    for how in ("leave", "invert"):
        table = Adapter("of_tests", "", (Block(f"{__name__}:Left", how, ways, log_det=said),))
        table.install()
        table.install()
        with revhooks.log_det() as ld:
            Left()(torch.randn(ROW))
        assert torch.equal(ld.value, triple)
        with revhooks.log_det() as ld:
            Left()(Left().inverse(torch.randn(ROW))[0])
        assert torch.equal(ld.value, torch.zeros(()))
        if how == "invert":
            revhooks.unregister(Left)
        for method in ways:
            setattr(Left, method, original[method])


def test_a_law_without_a_log_det_is_named() -> None:
    law = Law(lambda x, u: x * u.exp(), lambda y, u: y * (-u).exp())
    chain = rnn.ReversibleSequential(mlp(2, 2), mlp(2, 2), coupling=law)
    for order in ORDERS:
        with both(order), pytest.raises(RegistrationError, match="law of a coupling: expected a Law with log_det="):
            chain(torch.randn(ROW))


def test_a_subclass_that_changes_forward_is_not_answered_by_its_bases_pair(registered: Callable[..., None]) -> None:
    class Base(nn.Module):
        def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return 2 * x, x.new_full((len(x),), 4.0).log() * 2

    class Thrice(Base):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * x

        def inverse(self, y: Tensor) -> Tensor:
            return y / 3

    class Good(Base):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

        def inverse(self, y: Tensor) -> Tensor:
            return y / 2

        def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return super().call_and_ladj(x)

    x = torch.randn(ROW)
    registered(Thrice, inverse="inverse")
    with revhooks.log_det(), pytest.raises(RegistrationError, match="Thrice"):
        Thrice()(x)
    registered(Good, inverse="inverse")
    with revhooks.log_det() as ld:
        assert torch.equal(Good()(x), 2 * x)
    assert_close([ld.value], [torch.full((5,), 4 * torch.tensor(2.0).log())], 1e-6)


# ------------------------------------------------------------------------------------- the context


def test_nothing_is_zero() -> None:
    with revhooks.log_det() as ld:
        nn.Linear(4, 4)(torch.randn(ROW))
    assert torch.equal(ld.value, torch.zeros(()))


def test_contexts_in_contexts() -> None:
    model, x = ready(lambda: rnn.AffineCoupling(mlp(2, 4)), ROW)
    one = model.log_det(x)  # type: ignore[operator]
    with revhooks.log_det() as outer:
        model(x)
        with revhooks.log_det() as inner:
            model(x)
        with outer:  # it is open already
            model(x)
    assert torch.equal(inner.value, one)
    assert_close([outer.value], [3 * one], 1e-12)
    with outer:
        model(x)
    assert torch.equal(outer.value, one)
    assert ACTIVE.volume is ACTIVE.top is None


def test_two_batches_are_no_sum() -> None:
    model, x = ready(lambda: rnn.AffineCoupling(mlp(2, 4)), ROW)
    with revhooks.log_det():
        model(x)
        with pytest.raises(ShapeError, match=r"AffineCoupling: expected one for each sample, got shape \(3,\)"):
            model(x[:3])


def test_without_gradients() -> None:
    model, x = ready(glow, (2, 1, 8, 8))
    with torch.no_grad(), both("around") as ld:
        model(x)
    assert not ld.value.requires_grad
    assert_close([ld.value], [by_jacobian(model, x)], 1e-10)
    with torch.inference_mode(), revhooks.log_det() as ld:
        model(x)
    assert_close([ld.value.clone()], [by_jacobian(model, x)], 1e-10)


def test_an_exception_leaves_nothing_behind() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    model, x = rnn.AffineCoupling(Broken()), torch.randn(ROW)
    for order in ORDERS:
        with pytest.raises(KeyboardInterrupt), both(order):
            model(x)
        assert ACTIVE.volume is ACTIVE.top is ACTIVE.run is None
    with revhooks.log_det() as ld:
        with contextlib.suppress(KeyboardInterrupt):
            model(x)
        rnn.Tanh()(x)
    assert_close([ld.value], [rnn.Tanh().log_det(x)], 1e-6)


def test_threads_count_for_themselves() -> None:
    model, x = ready(lambda: rnn.AffineCoupling(mlp(2, 4)), ROW)
    values: dict[int, Tensor] = {}
    barrier = threading.Barrier(4)

    def count(times: int) -> None:
        with revhooks.log_det() as ld:
            for _ in range(times):
                barrier.wait(20)
                model(x)
        values[times] = ld.value

    threads = [threading.Thread(target=count, args=(3,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    with revhooks.log_det() as ld:
        for _ in range(3):
            barrier.wait(20)
            model(x)
    for thread in threads:
        thread.join(20)
    assert_close([values[3], ld.value], [3 * model.log_det(x)] * 2, 1e-12)  # type: ignore[operator]


@pytest.mark.usefixtures("no_gc")
def test_nothing_stays_alive() -> None:
    model, x = ready(lambda: nn.Sequential(*(rnn.AffineCoupling(mlp(2, 4)) for _ in range(3))), ROW)
    with both("around") as ld:
        y = model(x)

    class Mark:
        """Lives as long as the graph."""

    mark = y.grad_fn.metadata["mark"] = ld.value.grad_fn.metadata["mark"] = Mark()
    watched = weakref.ref(mark)
    (y.sum() - ld.value.sum()).backward()
    del mark, y, ld
    assert watched() is None


def test_outside_nothing_is_looked_at_twice() -> None:
    """Rule 14: a bracket costs one look-up, also of a layer that is counted and registered."""
    looks = [0]

    class Watched(type(ACTIVE)):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            looks[0] += name in ("top", "run", "volume")
            return super().__getattribute__(name)

    layer, x = rnn.LeakyReLU(), torch.randn(ROW)
    forward = rnn.LeakyReLU.forward
    assert hasattr(forward, "__revhooks__")
    assert hasattr(forward.__revhooks_before__, "__revhooks_counted__")
    (cell,) = (cell for cell in forward.__closure__ if cell.cell_contents is ACTIVE)
    cell.cell_contents = Watched()
    try:
        layer(x)
    finally:
        cell.cell_contents = ACTIVE
    assert looks == [1]
    assert list(inspect.signature(forward).parameters) == ["self", "x"]


# ------------------------------------------------------------------------------------- what is run again


class Residual(nn.Module):
    """A block that is to be replayed, with blocks inside that are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(rnn.AffineCoupling(mlp(2, 4)), rnn.SinhArcsinh(4), rnn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("backward", ["inside", "after"])
@pytest.mark.parametrize("how", ["replay", "predicate", "checkpoint", "checkpoint with an inverse", "budget", "no ops"])
def test_replays_repeat_it_and_count_nothing(how: str, backward: str) -> None:
    model, x = ready(lambda: nn.Sequential(Residual(), Residual()), ROW)
    options: dict[str, dict[str, Any]] = {
        "replay": {"replay": Residual},
        "predicate": {"replay": lambda module: isinstance(module, Residual)},
        "budget": {"budget": "1GiB"},
        "no ops": {"ops": False},
    }

    def call(x: Tensor) -> Tensor:
        if how == "checkpoint":
            return revhooks.checkpoint(model, x)
        if how == "checkpoint with an inverse":
            return revhooks.checkpoint(model[0].inner[0], x, inverse=model[0].inner[0].inverse)
        return model(x)

    def wanted(x: Tensor) -> Tensor:
        target = model[0].inner[0] if how == "checkpoint with an inverse" else model
        return target(x).square().mean() - by_jacobian(target, x, create_graph=True).mean()

    for _ in range(4):  # what fits a budget is left alone after some calls
        x = x.detach().clone().requires_grad_()
        model.zero_grad()
        with contextlib.ExitStack() as stack:
            ld = stack.enter_context(revhooks.log_det())
            stack.enter_context(revhooks.reversible(**options.get(how, {})))
            y = call(x)
            value = ld.value
            if backward == "inside":
                (y.square().mean() - ld.value.mean()).backward()
        if backward == "after":
            (y.square().mean() - ld.value.mean()).backward()
        assert torch.equal(ld.value, value)
        got = [x.grad, *(torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())]
        assert_close(got, gradients(model, x.detach(), wanted))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_of_torch_are_refused(reentrant: bool) -> None:
    model, x = ready(Residual, ROW)
    x.requires_grad_()
    with revhooks.log_det(), pytest.raises(RegistrationError, match=r"torch\.utils\.checkpoint.*revhooks\.checkpoint"):
        torch_checkpoint(model, x, use_reentrant=reentrant)
    y = torch_checkpoint(model, x, use_reentrant=reentrant)
    with revhooks.log_det() as ld:  # a backward pass counts nothing
        y.sum().backward()
    assert torch.equal(ld.value, torch.zeros(()))


# ------------------------------------------------------------------------------------- transforms and compilers


def test_transforms_of_functions() -> None:
    model, x = ready(lambda: nn.Sequential(rnn.ActNorm(4), rnn.AffineCoupling(mlp(2, 4)), rnn.Tanh()), ROW)

    def ladj(x: Tensor) -> Tensor:
        with revhooks.log_det() as ld:
            model(x)
        return ld.value

    wanted = by_jacobian(model, x)
    assert_close([torch.func.vmap(lambda one: ladj(one[None])[0])(x)], [wanted], 1e-10)
    (grad,) = torch.autograd.grad(ladj(x.requires_grad_()).sum(), x)
    assert_close([torch.func.grad(lambda x: ladj(x).sum())(x.detach())], [grad], 1e-10)
    state = {name: p.detach() * 1.0 for name, p in model.named_parameters()}
    with revhooks.log_det() as ld:
        torch.func.functional_call(model, state, (x,))
    assert_close([ld.value], [wanted], 1e-10)
    with revhooks.log_det(), pytest.raises(RegistrationError, match="open log_det\\(\\) in the function that is transformed"):
        torch.func.vmap(lambda one: model(one[None])[0])(x)


def test_double_backward() -> None:
    model, x = ready(lambda: nn.Sequential(rnn.AffineCoupling(mlp(2, 4)), rnn.SinhArcsinh(4)), ROW)

    def penalty(x: Tensor, order: str) -> Tensor:
        with both(order) as ld:
            model(x)
        (grad,) = torch.autograd.grad(ld.value.sum(), x, create_graph=True)
        return grad.square().sum()

    alone, inside = (gradients(model, x, lambda x, order=order: penalty(x, order)) for order in ("alone", "inside"))
    assert_close(inside, alone)


@pytest.mark.filterwarnings("ignore")
def test_what_is_compiled_runs_as_it_is() -> None:
    model, x = ready(lambda: nn.Sequential(rnn.AffineCoupling(mlp(2, 4)), rnn.Tanh()), ROW)
    whole, in_place = torch.compile(model, backend="eager"), copy.deepcopy(model)
    in_place.compile(backend="eager")
    for compiled in (whole, in_place):
        compiled(x)
        with both("around") as ld:
            compiled(x)
        assert_close([ld.value], [by_jacobian(model, x)], 1e-10)
    counters = torch._dynamo.utils.counters["frames"]
    before = dict(counters)
    torch.compile(nn.Sequential(rnn.Tanh()), backend="eager")(x)  # the compiler is at work again
    assert dict(counters) != before
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore")
def test_in_compiled_code_it_is_refused() -> None:
    model, x = ready(lambda: nn.Sequential(rnn.AffineCoupling(mlp(2, 4)), rnn.Tanh()), ROW)

    def likelihood(x: Tensor) -> Tensor:
        with revhooks.log_det() as ld:
            y = model(x)
        return y.sum() - ld.value.sum()

    with pytest.raises(RegistrationError, match=r"log_det\(\): expected eager code"):
        torch.compile(likelihood, backend="eager")(x)
    with pytest.raises(RegistrationError, match=r"log_det\(\): expected eager code"):
        torch.jit.trace(likelihood, x)
    torch.compiler.reset()
    assert ACTIVE.volume is None


def test_what_comes_to_be_compiled_inside_is_refused() -> None:
    """A compiler that was not there when counting began is not told to leave things as they are."""
    code = """
import sys, torch, revhooks
with revhooks.log_det() as ld:
    pass
assert "torch._dynamo" not in sys.modules
try:
    with revhooks.log_det() as ld:
        model = torch.compile(revhooks.nn.Tanh(), backend="eager")
        model(torch.ones(2, 3))
except revhooks.errors.RegistrationError as error:
    assert "expected what is compiled to be compiled before" in str(error)
else:
    assert ld.value.any()
with revhooks.log_det() as ld:
    model(torch.ones(2, 3))
assert ld.value.all()
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


# ------------------------------------------------------------------------------------- check


@pytest.mark.parametrize("form", FORMS)
def test_check_compares_each_form(form: str, registered: Callable[..., None]) -> None:
    cls, options = FORMS[form]
    registered(cls, **options)
    result = revhooks.check(cls().to(D), torch.randn(ROW, dtype=D))
    assert result.log_det_error is not None
    assert result.log_det_error < 1e-10
    assert not any("Jacobian" in problem for problem in result.problems)


@pytest.mark.parametrize(
    ("cls", "wrong"),
    [(Affine, "inverse"), (Paired, lambda _, out, *__: out[1] + 1), (Affine, lambda *_: None)],
    ids=["name", "function", "none"],
)
def test_check_tells_of_a_wrong_one(cls: type[Affine], wrong: Any, registered: Callable[..., None]) -> None:
    registered(cls, inverse="inverse", log_det=wrong)
    result = revhooks.check(cls().to(D), torch.randn(ROW, dtype=D))
    assert not result
    assert any("Jacobian" in problem for problem in result.problems)


# ------------------------------------------------------------------------------------- other libraries


@pytest.mark.parametrize("order", ORDERS)
def test_freia(order: str, registered: Callable[..., None]) -> None:
    framework, modules = pytest.importorskip("FrEIA.framework"), pytest.importorskip("FrEIA.modules")
    model = framework.SequenceINN(4)
    for _ in range(3):
        model.append(modules.AllInOneBlock, subnet_constructor=mlp, permute_soft=True)
    if revhooks.registry.entry_of(modules.AllInOneBlock, "forward") is None:

        def back(block: nn.Module, out: Any, *args: Any, **kwargs: Any) -> Any:
            return block(out[0], *args, **{**kwargs, "rev": not kwargs["rev"]})[0]

        registered(modules.AllInOneBlock, inverse=back, log_det=1)
    model, x = model.to(D), torch.randn(ROW, dtype=D)
    with both(order) as ld:
        z, jac = model(x)
    assert_close([ld.value], [jac], 1e-12)
    (z.square().sum() - ld.value.sum()).backward()
    with both(order) as ld:
        _, jac = model(z.detach(), rev=True)
    assert_close([ld.value], [jac], 1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_normflows(order: str, registered: Callable[..., None]) -> None:
    flows, nets = pytest.importorskip("normflows.flows"), pytest.importorskip("normflows.nets")
    parts = [[flows.AffineCouplingBlock(nets.MLP([2, 8, 4], init_zeros=False)), flows.LULinearPermute(4)] for _ in range(3)]
    model = nn.ModuleList([part for pair in parts for part in pair]).to(D)
    for cls in (flows.AffineCouplingBlock, flows.LULinearPermute):
        if revhooks.registry.entry_of(cls, "inverse") is None:
            registered(cls, method="inverse", inverse=lambda flow, out: flow.forward(out[0])[0], log_det=1)
    x, total = torch.randn(ROW, dtype=D), torch.zeros(5, dtype=D)
    with both(order) as ld:
        z = x
        for flow in reversed(model):
            z, log_det = flow.inverse(z)  # type: ignore[operator]
            total = total + log_det
    assert_close([ld.value], [total], 1e-12)
    (z.square().sum() - ld.value.sum()).backward()
