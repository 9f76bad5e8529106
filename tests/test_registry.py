"""The registry: register, unregister, invertible, and look-up by MRO."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revhooks
from revhooks.errors import FallbackWarning, InversionError, RegistrationError
from revhooks.registry import Registration, add, lookup
from tests.conftest import Count, compare, mlp, step
from tests.devices import generator


class Coupling(nn.Module):
    """A coupling that knows nothing of revhooks."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.f, self.g = mlp(width), mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, -1)
        y1 = x1 + self.f(x2)
        return torch.cat([y1, x2 + self.g(y1)], -1)

    def inverse(self, y: Tensor) -> Tensor:
        y1, y2 = y.chunk(2, -1)
        x2 = y2 - self.g(y1)
        return torch.cat([y1 - self.f(x2), x2], -1)


@pytest.fixture
def registered() -> Any:
    classes: list[type] = []

    def register(cls: type, **options: Any) -> type:
        revhooks.register(cls, **options)
        classes.append(cls)
        return cls

    yield register
    for cls in classes:
        if lookup(cls) is not None:
            revhooks.unregister(cls)


X = torch.randn(3, 8, dtype=torch.float64, generator=generator(0))


def chain(make: Any, depth: int = 4) -> nn.Module:
    return nn.Sequential(*[make() for _ in range(depth)]).double()


def test_unregistered_is_left_alone() -> None:
    rev = compare(chain(Coupling), X)
    assert rev.stats is not None
    assert rev.stats.frames == 0


def test_registered_is_inverted(registered: Any, no_gc: None) -> None:
    registered(Coupling, inverse="inverse")
    rev = compare(chain(Coupling), X)
    assert rev.stats is not None
    assert (rev.stats.frames, rev.stats.inversions) == (4, 2)  # the first has its exact input, the last is kept
    assert rev.calls == [2] * 6 + [1] * 2
    assert rev.stats.second_evaluations == 0


def test_held_does_not_grow(registered: Any) -> None:
    registered(Coupling, inverse="inverse")
    held = [step(chain(Coupling, depth), X, reverse=True).held_after_forward for depth in (3, 9)]
    assert held[0] == held[1]


def test_unregister_restores_the_method(registered: Any) -> None:
    original = Coupling.forward
    registered(Coupling, inverse="inverse")
    assert Coupling.forward is not original
    revhooks.unregister(Coupling)
    assert Coupling.forward is original
    with pytest.raises(RegistrationError, match="registered class"):
        revhooks.unregister(Coupling)


def test_subclass_is_covered(registered: Any) -> None:
    class Sub(Coupling):
        pass

    registered(Coupling, inverse="inverse")
    assert lookup(Sub) is lookup(Coupling)
    rev = compare(chain(Sub), X)
    assert rev.stats is not None
    assert rev.stats.frames == 4


def test_subclass_that_wraps_the_method_and_overrides_the_inverse(registered: Any) -> None:
    class Flipped(Coupling):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flip(-1))

        def inverse(self, y: Tensor) -> Tensor:
            return super().inverse(y).flip(-1)

    registered(Coupling, inverse="inverse")
    rev = compare(chain(Flipped), X)
    assert rev.stats is not None
    assert rev.stats.frames == 4


def test_inherited_method_is_registered_on_the_subclass_only(registered: Any) -> None:
    class Sub(Coupling):
        pass

    registered(Sub, inverse="inverse")
    assert lookup(Coupling) is None
    assert step(chain(Coupling), X, reverse=True).stats.frames == 0  # type: ignore[union-attr]
    assert step(chain(Sub), X, reverse=True).stats.frames == 4  # type: ignore[union-attr]
    revhooks.unregister(Sub)
    assert "forward" not in vars(Sub)


def test_inverse_as_a_function(registered: Any) -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log = nn.Parameter(torch.randn(8) * 0.1)

        def forward(self, x: Tensor, shift: float, *, flip: bool = False) -> Tensor:
            y = x * self.log.exp() + shift
            return y.flip(-1) if flip else y

    def undo(module: Any, y: Tensor, shift: float, *, flip: bool = False) -> Tensor:
        y = y.flip(-1) if flip else y
        return (y - shift) / module.log.exp()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scales = nn.ModuleList(Scale() for _ in range(5))

        def forward(self, x: Tensor) -> Tensor:
            for i, scale in enumerate(self.scales):
                x = scale(x, 0.5, flip=bool(i % 2))
            return x

    registered(Scale, inverse=undo)
    rev = compare(Net().double(), X)
    assert rev.stats is not None
    assert rev.stats.inversions == 3


def test_two_inputs_and_two_outputs(registered: Any) -> None:
    class TwoStream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g = mlp(4), mlp(4)

        def forward(self, a: Tensor, b: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            a = a + self.f(b) * mask
            return a, b + self.g(a)

        def inverse(self, a: Tensor, b: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            b = b - self.g(a)
            return a - self.f(b) * mask, b

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(TwoStream() for _ in range(5))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            a, b = x[:, :4] * 2, x[:, 4:] * 3
            for block in self.blocks:
                a, b = block(a, b, torch.ones(4, dtype=x.dtype))
            return a, b

    registered(TwoStream, inverse="inverse")
    rev = compare(Net().double(), X)
    assert rev.stats is not None
    assert rev.stats.inversions == 3
    assert rev.stats.held_bytes == 0
    assert rev.calls == [2] * 8 + [1] * 2


def test_an_input_with_exact_zeros_among_several(registered: Any) -> None:
    """It is held as it is, and what is rebuilt starts from it, though the other input is rebuilt."""
    mask = torch.rand(16, 4) > 0.5
    speed = (torch.randn(16, 4, dtype=torch.float64) * 1024).round() / 1024  # so that the sum below is exact

    class Stop(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(mask, -2 * x - speed, 0.37)

    class Rectified(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 1.3 * torch.relu(x)

    class Momentum(nn.Module):
        def __init__(self, f: nn.Module) -> None:
            super().__init__()
            self.f = Count(f)

        def forward(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            v = 0.5 * v + 0.5 * self.f(x)
            return x + v, v

        def inverse(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            x = x - v
            return x, 2 * (v - 0.5 * self.f(x))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Momentum(f) for f in (Stop(), Rectified(), mlp(4), Rectified(), mlp(4)))
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            v = speed * self.scale
            for i, block in enumerate(self.blocks):
                x, v = block(x, v)
                assert bool((x == 0).any()) == (i == 0)
            return x

    registered(Momentum, inverse="inverse")
    x = (torch.randn(16, 4, dtype=torch.float64) * 1024).round() / 1024
    rev = compare(Net().double(), x.requires_grad_(), guard="raise")
    assert rev.stats is not None
    assert rev.stats.second_evaluations == 1


@pytest.mark.parametrize("keeps_zeros", [False, True, (1,)])
def test_inputs_that_keep_their_zeros_are_not_held(registered: Any, keeps_zeros: bool | tuple[int, ...]) -> None:
    class Momentum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = Count(nn.Sequential(nn.Linear(8, 8), nn.Threshold(0.5, 0)))

        def forward(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            v = 0.5 * v + self.f(x)
            return x + v, v

        def inverse(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            x = x - v
            return x, 2 * (v - self.f(x))

    class Net(nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Momentum() for _ in range(depth))

        def forward(self, x: Tensor) -> Tensor:
            v = torch.zeros_like(x)
            for block in self.blocks:
                x, v = block(x, v)
            return x

    registered(Momentum, inverse="inverse", keeps_zeros=keeps_zeros)
    held = [compare(Net(depth).double(), X.clone().requires_grad_()).held_after_forward for depth in (3, 8)]
    assert (held[0] == held[1]) is bool(keeps_zeros)


def test_flow_with_log_det(registered: Any) -> None:
    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(4, 8, 0.3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            a, b = x.chunk(2, -1)
            s, t = self.net(a).chunk(2, -1)
            s = torch.tanh(s)
            return torch.cat([b * s.exp() + t, a], -1), s.sum(-1)

        def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
            b, a = y.chunk(2, -1)
            s, t = self.net(a).chunk(2, -1)
            s = torch.tanh(s)
            return torch.cat([a, (b - t) * (-s).exp()], -1), -s.sum(-1)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flows = nn.ModuleList(Flow() for _ in range(6))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            total = torch.zeros(x.shape[0], dtype=x.dtype)
            for flow in self.flows:
                x, log_det = flow(x)
                total = total + log_det
            return x, total

    registered(Flow, inverse=lambda module, output: module.inverse(output[0])[0])
    rev = compare(Net().double(), X)
    assert rev.stats is not None
    assert rev.stats.inversions == 4
    assert rev.calls == [2] * 5 + [1]


def test_method_other_than_forward(registered: Any) -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = mlp(4)

        def encode(self, x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            return torch.cat([b + self.f(a), a], -1)

        def decode(self, y: Tensor) -> Tensor:
            b, a = y.chunk(2, -1)
            return torch.cat([a, b - self.f(a)], -1)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Backwards() for _ in range(5))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer.encode(x)
            return x

    registered(Backwards, inverse="decode", method="encode")
    rev = compare(Net().double(), X)
    assert rev.stats is not None
    assert rev.stats.inversions == 3


def test_one_module_as_both_branches(registered: Any) -> None:
    """f is g: an inverse calls it in the opposite order, so calls are matched by what they are called on."""

    class Twin(Coupling):
        def __init__(self) -> None:
            super().__init__()
            self.g = self.f

    registered(Twin, inverse="inverse")
    rev = compare(chain(Twin), X)
    assert rev.stats is not None
    assert rev.stats.inversions == 2
    assert rev.calls == [4] * 3 + [2]


def test_branches_called_through_forward(registered: Any) -> None:
    class Direct(Coupling):
        def forward(self, x: Tensor) -> Tensor:
            x1, x2 = x.chunk(2, -1)
            y1 = x1 + self.f.forward(x2)
            return torch.cat([y1, x2 + self.g.forward(y1)], -1)

        def inverse(self, y: Tensor) -> Tensor:
            y1, y2 = y.chunk(2, -1)
            x2 = y2 - self.g.forward(y1)
            return torch.cat([y1 - self.f.forward(x2), x2], -1)

    registered(Direct, inverse="inverse")
    assert compare(chain(Direct), X).calls == [2] * 6 + [1] * 2


def test_inverse_that_writes_into_its_argument(registered: Any) -> None:
    class Writes(Coupling):
        def inverse(self, y: Tensor) -> Tensor:
            y[:, 4:] -= self.g(y[:, :4].clone())
            y[:, :4] -= self.f(y[:, 4:].clone())
            return y

    registered(Writes, inverse="inverse")
    compare(chain(Writes), X)


def test_inverse_that_runs_other_branches_pays_a_second_evaluation(registered: Any) -> None:
    """A fixed point calls its branch on other inputs: nothing may be filled from those."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.g = Count(nn.Linear(8, 8))
            with torch.no_grad():
                self.g.net.weight.mul_(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return x + 0.3 * torch.tanh(self.g(x))

        def inverse(self, y: Tensor) -> Tensor:
            x = y
            for _ in range(60):
                x = y - 0.3 * torch.tanh(self.g(x))
            return x

    registered(Residual, inverse="inverse", cost=60)
    rev = compare(chain(Residual), X)
    assert rev.stats is not None
    assert rev.stats.inversions == 2
    assert rev.stats.second_evaluations > 0


def test_invertible_decorator() -> None:
    class Marked(Coupling):
        @revhooks.invertible(inverse="inverse")
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    rev = compare(chain(Marked), X)
    assert rev.stats is not None
    assert rev.stats.inversions == 2
    assert rev.calls == [2] * 6 + [1] * 2


@pytest.mark.parametrize("name", ["AdditiveCoupling", "AffineCoupling"])
def test_memcnn_in_one_line_each(name: str, registered: Any, no_gc: None) -> None:
    memcnn = pytest.importorskip("memcnn", reason="memcnn is a dev extra")
    registered(getattr(memcnn, name), inverse="inverse")

    def make() -> nn.Module:
        branches = [Count(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, padding=1))) for _ in "fg"]
        with torch.no_grad():
            for branch in branches:
                branch.net[2].weight.mul_(0.2)
        block: nn.Module = getattr(memcnn, name)(*branches)
        return block

    rev = compare(chain(make, 6), torch.randn(2, 8, 5, 5, dtype=torch.float64))
    assert rev.stats is not None
    assert rev.stats.inversions == 4
    assert rev.calls == [2] * 10 + [1] * 2


BAD: dict[str, tuple[Any, str]] = {
    "not an inverse": (lambda m, y: y, "off by"),
    "wrong count": (lambda m, y: (y, y), "2 values"),
    "wrong shape": (lambda m, y: y[:, :3], r"shape \(3, 3\)"),
    "wrong dtype": (lambda m, y: m.inverse(y).float(), "dtype torch.float32"),
    "no tensor": (lambda m, y: None, "NoneType"),
    "raises": (lambda m, y: 1 / 0, "ZeroDivisionError"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_inverse_falls_back(kind: str, registered: Any) -> None:
    inverse, message = BAD[kind]
    registered(Coupling, inverse=inverse)
    model = nn.Sequential(Coupling(), nn.Sequential(Coupling(), Coupling())).double()
    with pytest.warns(FallbackWarning, match=message) as warned:
        rev = compare(model, X)
    assert len({str(w.message) for w in warned}) == 3
    assert "Coupling" in str(warned[0].message)
    assert rev.stats is not None
    assert rev.stats.replays == 2
    assert rev.calls == [2] * 4 + [1] * 2


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_inverse_raises(kind: str, registered: Any) -> None:
    inverse, message = BAD[kind]
    registered(Coupling, inverse=inverse)
    with pytest.raises(InversionError, match=message) as caught:
        step(chain(Coupling), X, reverse=True, guard="raise")
    text = str(caught.value)
    assert "Coupling" in text
    assert "expected" in text
    assert "got" in text
    assert "Remedy" in text


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (3, {"inverse": "inverse"}, "subclass of torch.nn.Module"),
        (Coupling, {"inverse": "undo"}, "method 'undo'"),
        (Coupling, {"inverse": "inverse", "method": "run"}, "method 'run'"),
        (Coupling, {"inverse": 3}, "name or a function"),
        (Coupling, {"inverse": "inverse", "cost": -1}, "cost >= 0"),
        (Coupling, {"inverse": "inverse", "log_det": "nothing"}, "method 'nothing'"),
    ],
)
def test_registration_errors(cls: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RegistrationError, match=message):
        revhooks.register(cls, **options)
    assert lookup(Coupling) is None


def test_registering_twice(registered: Any) -> None:
    registered(Coupling, inverse="inverse")
    with pytest.raises(RegistrationError, match="second registration"):
        revhooks.register(Coupling, inverse="inverse")


def test_outside_nothing_happens(registered: Any) -> None:
    registered(Coupling, inverse="inverse")
    model = chain(Coupling)
    y = model(X)
    assert type(y.grad_fn).__name__ == "CatBackward0"
    assert all("forward" not in vars(m) for m in model.modules())


class Reset(nn.Module):
    """Sets a buffer's data in its first call, whose old memory another tensor may get."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("is_set", torch.zeros(64))
        self.scale = nn.Parameter(torch.zeros(64))

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_set.any():
            self.is_set.data = torch.ones(1)
        return x * self.scale.exp() * self.scale.cosh()


def test_memory_of_a_buffer_that_is_replaced_is_no_buffers_any_more() -> None:
    revhooks.register(Reset, inverse=None)
    try:
        for _ in range(20):  # where the next tensors lie is chance
            x = torch.randn(8, 64)
            with revhooks.reversible() as run:
                h = nn.Sequential(*(Reset() for _ in range(4)))(x)
                h.sum().backward()
            assert run.stats.frames == 4
    finally:
        revhooks.unregister(Reset)


@pytest.mark.parametrize("adapter_first", [True, False])
def test_what_an_adapter_has_stands_again_when_a_user_takes_his_own_back(adapter_first: bool) -> None:
    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

        def inverse(self, y: Tensor) -> Tensor:
            return y - 1

    plain, theirs = Block.forward, Registration(Block, "inverse", adapter="theirs")
    if adapter_first:
        add(theirs)
    revhooks.register(Block, inverse=lambda module, y: y - 1)
    if not adapter_first:
        add(theirs)
    assert not lookup(Block).adapter
    with pytest.raises(RegistrationError, match="second registration"):
        revhooks.register(Block, inverse="inverse")
    revhooks.unregister(Block)
    assert lookup(Block) is theirs
    revhooks.unregister(Block)
    assert lookup(Block) is None
    assert Block.forward is plain
