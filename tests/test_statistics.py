"""Batch norms in calls that are run again: they normalise with the statistics that they computed in forward."""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import revhooks
from revhooks import nn as rnn
from revhooks.errors import ReplayError
from revhooks.runtime.recompute import statistics
from tests.conftest import Notes
from tests.devices import DEVICE

NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm2d(4),
    "cumulative": lambda: nn.BatchNorm2d(4, momentum=None),
    "without affine": lambda: nn.BatchNorm2d(4, affine=False),
    "without bias": lambda: _without(nn.BatchNorm2d(4), "bias"),
    "frozen": lambda: nn.BatchNorm2d(4).requires_grad_(False),
    "frozen weight": lambda: _frozen(nn.BatchNorm2d(4), "weight"),
    "without statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "a large eps": lambda: nn.BatchNorm2d(4, eps=0.3),
}


def _without(norm: nn.Module, name: str) -> nn.Module:
    norm.register_parameter(name, None)
    return norm


def _frozen(norm: nn.Module, name: str) -> nn.Module:
    norm.get_parameter(name).requires_grad_(False)
    return norm


def branch(norm: Callable[[], nn.Module] = NORMS["batch norm"], *, inplace: bool = False) -> nn.Module:
    first, second = norm(), norm()
    for parameter in (*first.parameters(), *second.parameters()):
        nn.init.normal_(parameter, 1.0, 0.3)
    conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    return nn.Sequential(first, nn.ReLU(inplace), conv, second, nn.ReLU(inplace), copy.deepcopy(conv))


class Residual(nn.Module):
    """Replayed by name."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Foreign(nn.Module):
    """A coupling of somebody else's, with its inverse."""

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        self.f, self.g = f, g

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        c = a + self.f(b)
        return torch.cat([c, b + self.g(c)], 1)

    def inverse(self, y: Tensor) -> Tensor:
        c, d = y.chunk(2, 1)
        b = d - self.g(c)
        return torch.cat([c - self.f(b), b], 1)


Make = Callable[[], nn.Module]
KINDS: dict[str, Callable[[Make], nn.Module]] = {
    "replay": lambda fn: nn.Sequential(*[Residual(nn.Sequential(fn(), fn())) for _ in range(3)]),
    "coupling": lambda fn: nn.Sequential(*[rnn.AdditiveCoupling(fn(), fn()) for _ in range(3)]),
    "streams": lambda fn: rnn.ReversibleSequential(*[fn() for _ in range(6)]),
    "foreign": lambda fn: nn.Sequential(*[Foreign(fn(), fn()) for _ in range(3)]),
}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    revhooks.register(Foreign, inverse="inverse")
    yield
    revhooks.unregister(Foreign)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The inputs whose statistics batch norms in training computed."""
    seen: list[torch.Size] = []
    plain = torch.batch_norm

    def counting(x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *args: Any) -> Tensor:
        if training:
            seen.append(x.shape)
        return plain(x, weight, bias, mean, var, training, *args)

    monkeypatch.setattr(torch, "batch_norm", counting)
    return seen


Use = Callable[[nn.Module, Tensor], Any]


def backward(net: nn.Module, x: Tensor) -> None:
    net(x).square().mean().backward()


def trained(net: nn.Module, x: Tensor, use: Use, context: contextlib.AbstractContextManager[Any]) -> list[Tensor | None]:
    """Gradients and buffers after what ``use`` does with a copy."""
    net, x = copy.deepcopy(net), x.clone().requires_grad_()
    with context:
        use(net, x * 1)
    return [x.grad, *(p.grad for p in net.parameters()), *net.buffers()]


def same(net: nn.Module, x: Tensor, use: Use = backward, *, tol: float, **options: Any) -> None:
    """As plain autograd; bitwise for a tolerance of 0. Twice, for what is learned at first."""
    plain = trained(net, x, use, contextlib.nullcontext())
    for _ in range(2):
        ours = trained(net, x, use, revhooks.reversible(replay=Residual, guard="raise", **options))
        for a, b in zip(plain, ours, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                assert torch.equal(a, b) if not tol else torch.allclose(a.double(), b.double(), rtol=tol, atol=tol)
    assert not any("forward" in module.__dict__ for module in net.modules())


def exactness(kind: str) -> float:
    return 0.0 if kind == "replay" else 1e-9


def image(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 8, 9, 9)), dtype=torch.float64)


def net_of(kind: str, fn: Make, dtype: torch.dtype = torch.float64) -> nn.Module:
    return KINDS[kind](fn).to(dtype)


def input_of(kind: str, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 4 if kind == "replay" else 8, 9, 9, dtype=dtype)


@kinds
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("inplace", [False, True])
def test_gradients_and_buffers(kind: str, norm: str, inplace: bool) -> None:
    same(net_of(kind, lambda: branch(NORMS[norm], inplace=inplace)), input_of(kind), tol=exactness(kind))


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("options", [{}, {"ops": False}, {"budget": 20_000}, {"guard": "off"}], ids=str)
def test_a_replay_in_float32_is_bitwise(memory: torch.memory_format, options: dict[str, Any]) -> None:
    net = net_of("replay", branch, torch.float32).to(memory_format=memory)
    x = input_of("replay", torch.float32).to(memory_format=memory)
    plain = trained(net, x, backward, contextlib.nullcontext())
    ours = trained(net, x, backward, revhooks.reversible(replay=Residual, **options))
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True) if a is not None and b is not None)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_dimensions(dims: int) -> None:
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    net = KINDS["replay"](lambda: nn.Sequential(norm(4), nn.GELU(), conv(4, 4, 3, padding=1))).double()
    same(net, image(2, 4, *[5] * dims), tol=0.0)
    flat = KINDS["replay"](lambda: nn.Sequential(nn.BatchNorm1d(4), nn.GELU(), nn.Linear(4, 4))).double()
    same(flat, image(16, 4), tol=0.0)


@pytest.mark.cpu(reason="elsewhere they are computed again")
@pytest.mark.near(reason="where they are computed again")
@kinds
def test_no_statistics_are_computed_again(kind: str, passes: list[torch.Size]) -> None:
    net, x = net_of(kind, branch), input_of(kind)
    with revhooks.reversible(replay=Residual):  # the first try of a foreign inverse
        backward(net, x.clone().requires_grad_())
    passes.clear()
    with revhooks.reversible(replay=Residual) as run:
        value = net(x.clone().requires_grad_()).square().mean()
        forward = len(passes)
        value.backward()
    assert forward == 12
    assert len(passes) == forward
    assert run.stats.inversions + run.stats.replays > 0


@pytest.mark.cpu(reason="elsewhere they are computed again")
@pytest.mark.near(reason="where they are computed again")
def test_what_is_held_for_them() -> None:
    """Two numbers a channel for each batch norm of a block that was let go of, and they say what they are."""
    net, x = net_of("replay", branch), input_of("replay")
    with revhooks.reversible(replay=Residual) as run:
        value = net(x.requires_grad_()).square().mean()
        kept = [kept for kept in run.stats.kept if "batch norm" in kept.why]
    assert sum(k.bytes for k in kept) == 2 * 4 * 2 * 4 * 8  # blocks, norms, numbers, channels, bytes
    value.backward()
    assert run.stats.held_bytes == 0


def test_few_elements_a_channel_are_not_worth_it(monkeypatch: pytest.MonkeyPatch, passes: list[torch.Size]) -> None:
    monkeypatch.setattr(statistics, "WORTH", 163)
    with revhooks.reversible(replay=Residual):
        backward(net_of("replay", branch), input_of("replay").requires_grad_())
    assert len(passes) > 12


def two_forwards(net: nn.Module, x: Tensor) -> None:
    (net(x).square().mean() + net(2 * x).tanh().mean()).backward()


def retained(net: nn.Module, x: Tensor) -> None:
    value = net(x).square().mean()
    value.backward(retain_graph=True)
    value.backward()


def twice(net: nn.Module, x: Tensor) -> None:
    leaf = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(net(leaf).square().sum(), leaf, create_graph=True)
    gradient.square().mean().backward()


def by_turns(net: nn.Module, x: Tensor) -> None:
    for training in (True, False, True):
        value = net.train(training)(x).square().mean()
        net.train(not training)
        value.backward(retain_graph=True)


@kinds
@pytest.mark.parametrize("use", [two_forwards, retained, twice, by_turns], ids=lambda use: use.__name__)
def test_uses(kind: str, use: Use) -> None:
    same(net_of(kind, branch), input_of(kind), use, tol=exactness(kind))


class Repeated(nn.Module):
    """One norm at two places, and then again as often as its input says."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.relu(self.norm(x)))
        for _ in range(1 + (x.shape[-1] > 5)):
            x = self.norm(x).tanh()
        return x


class Derived(nn.BatchNorm2d):
    """Does more than a batch norm."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sin()


class Decorated(nn.BatchNorm2d):
    """Its forward says that it wraps the plain one."""

    @functools.wraps(nn.BatchNorm2d.forward)
    def forward(self, *args: Any) -> Tensor:
        return super().forward(*args).sin()


class Reading(nn.BatchNorm2d):
    """Reads what it writes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + 0.1 * float(self.num_batches_tracked or 0)) + self.running_mean.view(1, -1, 1, 1)


class Eager(nn.Module):
    """Asks for a gradient inside of its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            inner = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.norm(inner).pow(3).sum(), inner, create_graph=True)
        return self.norm(x).tanh() + slope.detach() + (x * slope.square()).tanh()


class Odd(nn.Module):
    """Calls its norm in some way of its own."""

    def __init__(self, call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.conv, self.call = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), call
        self.copies: list[nn.Module] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.call(self, x))


def _saves_nothing_before(module: Odd, x: Tensor) -> Tensor:
    """Where the first call saves nothing, the second one is at its place."""
    with torch.no_grad():
        gate = module.norm(2 * x + x.abs())
    y = module.norm(x)
    return torch.where(gate > 0.3, y, y.detach())


def _other_hooks_before(module: Odd, x: Tensor) -> Tensor:
    y = torch_checkpoint(module.norm, 2 * x + x.abs(), use_reentrant=False)
    return module.norm(y + 1).tanh()


def _through_functional(module: Odd, x: Tensor) -> Tensor:
    norm = module.norm
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=True).tanh()


def _wrong_first(module: Odd, x: Tensor) -> Tensor:
    with contextlib.suppress(ValueError):
        module.norm(x[0])
    return module.norm(x).tanh()


def _copied(module: Odd, x: Tensor) -> Tensor:
    module.copies = [copy.deepcopy(module.norm)]
    return copy.copy(module.norm)(x).tanh() + module.norm(x).sin()


def _functional_call(module: Odd, x: Tensor) -> Tensor:
    given = {name: 2 * weight.detach() + 1 for name, weight in module.norm.named_parameters()}
    given |= {"running_mean": x.new_zeros(4), "running_var": x.new_ones(4)}
    return torch.func.functional_call(module.norm, given, x).tanh() + module.norm(x)


ODD: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a call that saves nothing before": _saves_nothing_before,
    "a call under other hooks before": _other_hooks_before,
    "functional": _through_functional,
    "by its class": lambda module, x: nn.BatchNorm2d.forward(module.norm, x).tanh(),
    "a call that fails before": _wrong_first,
    "copies": _copied,
    "functional_call": _functional_call,
    "transposed": lambda module, x: module.norm(x.transpose(2, 3)).tanh(),
    "expanded": lambda module, x: module.norm(x[:, :, :1].expand_as(x)).tanh(),
    "strided": lambda module, x: module.norm(torch.cat([x, x], 3)[..., ::2]).tanh(),
}


@kinds
@pytest.mark.parametrize("name", ODD)
def test_odd_calls(kind: str, name: str) -> None:
    net = net_of(kind, lambda: Odd(ODD[name]))
    same(net, input_of(kind), tol=exactness(kind))
    assert not any("forward" in copied.__dict__ for module in net.modules() for copied in getattr(module, "copies", ()))


def test_what_is_not_repeated_before_a_norm_is_seen() -> None:
    """Its statistics are no evidence: they were given."""

    class Unsteady(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv, self.calls = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), 0

        def forward(self, x: Tensor) -> Tensor:
            slopes.pop()
            return self.conv(F.relu(self.norm(F.leaky_relu(x, slopes[-1]))))

    slopes = [1.3, 0.9, 0.5, 0.1, 0.0]  # the last for a device, which is asked when backward has ended
    with revhooks.reversible(replay=Unsteady, guard="raise"):
        y = nn.Sequential(Unsteady(), Residual(nn.Tanh()))(torch.randn(2, 4, 9, 9, requires_grad=True))
        value = revhooks.checkpoint(Unsteady(), y).sum()
    with pytest.raises(ReplayError, match="expected what its forward call computed"):
        value.backward()


def test_a_parametrization_is_not_evaluated_more_often() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, weight: Tensor) -> Tensor:
            self.calls += 1
            return weight * (1 + 0.1 * torch.rand_like(weight))

    def fn() -> nn.Module:
        norm = nn.BatchNorm2d(4)
        nn.utils.parametrize.register_parametrization(norm, "weight", Counting())
        return nn.Sequential(norm, nn.Tanh())

    same(net_of("replay", fn), input_of("replay"), seeded, tol=0.0)


@pytest.mark.parametrize("whole", [False, True])
def test_compiled_parts(whole: bool) -> None:
    """Traced without anything of ours around them."""

    def fn() -> nn.Module:
        net = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
        if whole:
            return torch.compile(net, backend="eager")  # type: ignore[return-value]
        net[0].compile(backend="eager")
        return net

    x, gradients = torch.randn(2, 4, 9, 9), []
    for wrap in (lambda net, x: net(x), revhooks.checkpoint):
        torch.manual_seed(0)
        net = fn()
        gradients.append(torch.autograd.grad(wrap(net, x.requires_grad_()).square().sum(), [*net.parameters()]))
    assert all(map(torch.equal, *gradients))
    torch._dynamo.reset()


def _patched() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    norm.forward = lambda x: type(norm).forward(norm, x) * 2  # type: ignore[method-assign]
    return nn.Sequential(norm, nn.Tanh())


def _shared() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    return nn.Sequential(norm, nn.Tanh(), nn.Conv2d(4, 4, 1), norm, nn.Tanh())


def _parametrized() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    nn.utils.parametrize.register_parametrization(norm, "weight", nn.Softplus())
    return nn.Sequential(norm, nn.Tanh())


BRANCHES: dict[str, Make] = {
    "one norm at three places": Repeated,
    "a derived norm": lambda: nn.Sequential(Derived(4), nn.Conv2d(4, 4, 1)),
    "a norm that reads what it writes": lambda: nn.Sequential(Reading(4), nn.Tanh(), nn.Conv2d(4, 4, 1)),
    "a decorated norm": lambda: nn.Sequential(Decorated(4), nn.Conv2d(4, 4, 1)),
    "a gradient inside": Eager,
    "shared": _shared,
    "parametrized": _parametrized,
    "a norm alone": lambda: nn.BatchNorm2d(4),
    "nothing after it": lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)),
    "eval": lambda: nn.Sequential(nn.BatchNorm2d(4).eval(), nn.Tanh(), nn.BatchNorm2d(4)),
    "dropout between": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Dropout(0.3), nn.Tanh(), nn.BatchNorm2d(4)),
}


def seeded(net: nn.Module, x: Tensor) -> None:
    torch.manual_seed(3)
    backward(net, x)


@kinds
@pytest.mark.parametrize("name", BRANCHES)
def test_branches(kind: str, name: str) -> None:
    same(net_of(kind, BRANCHES[name]), input_of(kind), seeded, tol=exactness(kind))


@pytest.mark.parametrize("swapped", [False, True])
def test_a_region_inside_that_shares_a_norm(*, swapped: bool) -> None:
    """What the inner region saves is not the outer one's, though nothing else is saved between the two calls."""
    norm = nn.BatchNorm2d(4).double()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, x: Tensor) -> Tensor:
            inner = revhooks.checkpoint if reverse else lambda fn, x: fn(x)
            first, second = (self.norm, lambda x: inner(self.norm, x)) if swapped else (lambda x: inner(self.norm, x), self.norm)
            return (first(x) - second(3 + 2 * x)).tanh() * x

    x = input_of("replay").requires_grad_()
    gradients = []
    for reverse in (False, True):
        y = revhooks.checkpoint(Outer(), x) if reverse else Outer()(x)
        gradients.append(torch.autograd.grad(y.square().sum(), [x, *norm.parameters()]))
    assert all(map(torch.equal, *gradients))


def test_a_patched_norm() -> None:
    """On the instance; not a copy, whose patch would call the original."""
    net = KINDS["replay"](_patched).double()
    x = input_of("replay")
    gradients = []
    for context in (contextlib.nullcontext(), revhooks.reversible(replay=Residual)):
        with context:
            gradients.append(torch.autograd.grad(net(x).square().mean(), [*net.parameters()]))
    assert all(map(torch.equal, *gradients))


@kinds
def test_hooks_of_a_norm_fire_as_before(kind: str) -> None:
    """Hooks of what is inside a branch fire once more in its replay, as in any."""
    net, x = net_of(kind, branch), input_of(kind)
    fired = Notes()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda module, args, y: fired.append(y.detach().clone()))
    with revhooks.reversible(replay=Residual):
        value = net(x.requires_grad_()).square().mean()
        forward = fired.taken()
        value.backward()
    again = fired.taken()
    assert again
    assert all(any(torch.allclose(y, other, rtol=1e-9) for other in forward) for y in again)


def test_another_thread_that_calls_a_norm_meanwhile() -> None:
    """It computes statistics of its own; what it writes is forgotten with the replay that started it."""
    norm = nn.BatchNorm2d(4).double()
    results = Notes()
    other = image(2, 4, 9, 9)

    class Meanwhile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.calls = norm, Notes()

        def forward(self, x: Tensor) -> Tensor:
            self.calls.append(1)
            if len(self.calls) == 2:  # the replay
                thread = threading.Thread(target=lambda: results.append(norm(other).detach()))
                thread.start()
                thread.join()
            return self.norm(x).tanh()

    module = Meanwhile()
    revhooks.checkpoint(module, image(2, 4, 9, 9).requires_grad_()).square().mean().backward()
    assert torch.equal(results.taken()[0], nn.BatchNorm2d(4).double()(other).detach())
    assert module.norm.num_batches_tracked == 1


def test_an_exception_in_a_replay_leaves_nothing_behind() -> None:
    net = nn.Sequential(nn.BatchNorm2d(4), nn.Tanh()).double()
    fail = [False]

    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            y = self.net(x)
            if fail[0]:
                raise KeyError("told to")
            return y.tanh() * y

    value = revhooks.checkpoint(Failing(), image(2, 4, 9, 9).requires_grad_()).sum()
    fail[0] = True
    with pytest.raises(KeyError, match="told to"):
        value.backward()
    assert not any("forward" in module.__dict__ for module in net.modules())
    assert net[0].num_batches_tracked == 1


def test_autocast() -> None:
    """What comes in as bfloat16 is normalised as it was."""
    net = KINDS["replay"](branch)
    x = torch.randn(2, 4, 9, 9)

    def use(net: nn.Module, x: Tensor) -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            value = net(x).float().square().mean()
        value.backward()

    same(net, x, use, tol=0.0)


@pytest.mark.cpu(reason="elsewhere they are computed again")
@pytest.mark.near(reason="where they are computed again")
def test_a_norm_whose_class_was_named_once(passes: list[torch.Size]) -> None:
    """A class stays bracketed when the run that named it is over."""
    with revhooks.reversible(replay=nn.BatchNorm2d):
        pass
    with revhooks.reversible(replay=Residual):
        backward(net_of("replay", branch), input_of("replay").requires_grad_())
    assert len(passes) == 12
    same(net_of("replay", branch), input_of("replay"), tol=0.0)
