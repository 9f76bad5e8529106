"""What a thread or a process is set to while forward runs, a replay finds again: the default device, precision of products."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revhooks
from revhooks import capture, generators, precision
from revhooks import nn as rnn
from revhooks.errors import FallbackWarning
from revhooks.precision import coarse, precision_of, restored
from revhooks.runtime.frames.frame import Frame
from revhooks.runtime.policy.guard import is_again, tolerance
from tests.conftest import Notes
from tests.test_threads import in_thread, same

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)

# -- the default device


@contextlib.contextmanager
def default_device(name: str) -> Iterator[None]:
    before = torch.get_default_device()
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None if before.type == "cpu" else before)


WAYS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "set_default_device": lambda: default_device("meta"),
    "context": lambda: torch.device("meta"),
    "context in a default": lambda: contextlib.ExitStack(),
    "none": contextlib.nullcontext,
}


class Makes(nn.Module):
    """What it computes depends on where it makes tensors, as far as a CPU has places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width, device="cpu", dtype=torch.float64)
        self.seen = Notes()

    def forward(self, x: Tensor) -> Tensor:
        kind = torch.ones(3).device.type
        self.seen.append(kind)
        return (self.layer(x) * (2 if kind == "meta" else 1)).sin()


class Shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Makes(4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([a, b + self.net(a)], -1)

    def inverse(self, y: Tensor) -> Tensor:
        a, b = y.chunk(2, -1)
        return torch.cat([a, b - self.net(a)], -1)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Makes(8)

    def forward(self, x: Tensor) -> Tensor:
        return revhooks.checkpoint(self.inner, x)


def models() -> dict[str, nn.Module]:
    return {
        "replayed": nn.Sequential(*[Makes(8) for _ in range(3)]),
        "couplings": nn.Sequential(*[rnn.AdditiveCoupling(Makes(4), Makes(4), dim=-1) for _ in range(3)]),
        "third party": nn.Sequential(*[Shift() for _ in range(3)]),
        "checkpoint": nn.Sequential(*[Checkpointed() for _ in range(3)]),
    }


@pytest.fixture
def registered() -> Iterator[None]:
    revhooks.register(Shift, inverse="inverse")
    yield
    revhooks.unregister(Shift)


@pytest.mark.cpu(reason="its blocks are there; what differs is the meta device")
@pytest.mark.parametrize("where", ["here", "elsewhere", "after"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", models())
def test_a_replay_makes_its_tensors_where_forward_did(
    name: str, way: str, where: str, registered: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backward is in a thread without a default device; even in the same one torch takes the function mode off for it."""
    monkeypatch.setattr(generators, "_peeks", {}, raising=False)
    model = models()[name]
    blocks = [module for module in model.modules() if isinstance(module, Makes)]
    x = torch.randn(5, 8, dtype=torch.float64)

    def step(reverse: bool) -> list[Any]:
        leaf = x.clone().requires_grad_()
        with contextlib.ExitStack() as stack:
            stack.enter_context(WAYS[way]())
            if way == "context in a default":
                stack.enter_context(default_device("meta"))
                stack.enter_context(torch.device("cpu"))
            stack.enter_context(revhooks.reversible(replay=Makes) if reverse else contextlib.nullcontext())
            loss = model(leaf).square().sum()
            parameters = [leaf, *model.parameters()]
            if where == "here":
                return list(torch.autograd.grad(loss, parameters))
            if where == "elsewhere":
                return list(in_thread(lambda: torch.autograd.grad(loss, parameters)))
        return list(torch.autograd.grad(loss, parameters))

    want = step(False)
    for block in blocks:
        block.seen.taken()
    assert same(step(True), want)
    kind = "meta" if way in ("set_default_device", "context") else "cpu"
    seen = [block.seen.taken() for block in blocks]
    assert {one for notes in seen for one in notes} == {kind}
    assert max(map(len, seen)) > 1  # some were run again
    assert not torch.overrides._get_current_function_mode_stack()


@pytest.mark.cpu(reason="its blocks are there; what differs is the meta device")
def test_a_default_device_of_backward_is_not_forwards() -> None:
    block = nn.Sequential(Makes(8), Makes(8))
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    with revhooks.reversible(replay=Makes):
        loss = block(x).sum()

    class Under(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            with torch.device("meta"), torch.enable_grad():
                loss.backward()
            return grad

    Under.apply(torch.ones(1, requires_grad=True)).backward()  # type: ignore[no-untyped-call]
    assert block[0].seen.taken() == ["cpu", "cpu"]


EVERYWHERE = """
import torch
torch.set_default_device("meta")
import torch.nn as nn
import revhooks
from revhooks import nn as rnn
from revhooks.runtime.offload import parked as offload
from revhooks import modes, storage
from revhooks.runtime import packing
from revhooks.runtime.handles import codes
packing.SMALL = codes.LEAST = 0
cpu = torch.device("cpu")
x = torch.randn(4, 8, 6, 6, device="cpu", generator=torch.Generator("cpu").manual_seed(0))
branch = lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.Dropout(0.1))
residual = lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ELU(), nn.Conv2d(8, 8, 3, padding=1))
with cpu:
    model = nn.Sequential(
        nn.Conv2d(8, 8, 1), nn.GELU(), *[rnn.AdditiveCoupling(branch(), branch()) for _ in range(3)], nn.BatchNorm2d(8),
        nn.ReLU(), nn.Dropout(0.2), rnn.InvertibleResidual(residual()), rnn.ActNorm(8),
        rnn.InvertibleConv1x1(8), rnn.Permute.random(8, generator=torch.Generator("cpu")), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(72, 72), nn.LayerNorm(72), nn.SiLU(), nn.Linear(72, 3),
    )
for near in (True, False):
    storage._NEAR = frozenset({"cpu"} if near else ())
    for options in ({}, {"replay": nn.Linear}, {"offload": True}):
        grads = []
        for reverse in (False, True):
            torch.manual_seed(0)
            model.zero_grad()
            if reverse:
                with revhooks.reversible(**options):
                    model(x).square().mean().backward()
            else:
                model(x).square().mean().backward()
            grads.append([p.grad.clone() for p in model.parameters()])
        for a, b in zip(*grads, strict=True):
            assert a.device == b.device == cpu
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-4), (options, (a - b).abs().max())
storage._NEAR = frozenset({"cpu"})
assert revhooks.check(rnn.AdditiveCoupling(branch(), branch()).to_empty(device="cpu").eval(), x) is not None
print("fine")
"""


def test_a_package_that_is_imported_under_a_default_device() -> None:
    """No tensor of ours is made on the default device: `meta` has no values, so that one would be found out."""
    result = subprocess.run([sys.executable, "-c", EVERYWHERE], capture_output=True, text=True, timeout=120, check=False)
    assert result.stdout == "fine\n", result.stderr


def test_autocast_of_another_device_than_the_arguments() -> None:
    """A block gets indices on the CPU and computes on CUDA: both devices' autocast is put back."""
    modes = revhooks.modes.Modes  # type: ignore[attr-defined]
    torch.set_autocast_enabled("cuda", True)
    try:
        assert [kind for kind, _ in modes.of_call(CPU).autocast] == ["cuda"]
    finally:
        torch.set_autocast_enabled("cuda", False)
    after = modes.of_call(CPU)  # another default device is one
    assert after is None or not after.autocast


# -- generators


@pytest.mark.cpu(reason="marks of its generator")
def test_marks_tell_every_draw() -> None:
    tracker = generators.RngTracker()
    torch.manual_seed(1)

    def mark() -> object:
        return tracker.marks(torch.device("cpu"))[0]

    seen = [mark()]
    double = {"dtype": torch.float64}
    for draw in (torch.randn, torch.randn, torch.rand, torch.randn, torch.randn, torch.randperm):
        for options in ({}, double) if draw is not torch.randperm else ({},):
            state = torch.get_rng_state()
            draw(1 if draw is not torch.randperm else 5, **options)  # type: ignore[call-overload]
            seen.append(mark())
            torch.set_rng_state(state)
            assert mark() == seen[-2]
            draw(1 if draw is not torch.randperm else 5, **options)  # type: ignore[call-overload]
            assert mark() == seen[-1]
    assert len(set(seen)) == len(seen)
    torch.manual_seed(2)
    assert mark() not in seen


# -- generators of devices


class Philox:
    """As a CUDA device's generator is told."""

    def __init__(self) -> None:
        self.state = 5, 0

    def initial_seed(self) -> int:
        return self.state[0]

    def get_offset(self) -> int:
        return self.state[1]

    def manual_seed(self, seed: int) -> None:
        self.state = seed, 0

    def set_offset(self, offset: int) -> None:
        self.state = self.state[0], offset


@pytest.mark.parametrize("device", [CUDA, CPU], ids=str)
def test_a_call_may_draw_on_another_device_than_its_arguments(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its replay does so too; a call that gets indices on the CPU may draw on CUDA."""
    devices = Philox(), Philox()
    monkeypatch.setattr(torch.cuda, "default_generators", devices)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(capture, "_asks", lambda: False)
    tracker = generators.RngTracker()
    marks, torch_marks, before = tracker.marks(device), tracker.torch_marks(device), tracker.capture(device)
    assert not before.moved(tracker.capture(device))
    devices[1].set_offset(8)
    assert tracker.marks(device) != marks
    assert tracker.torch_marks(device) != torch_marks
    assert before.moved(tracker.capture(device)) == {"torch"}
    devices[0].manual_seed(7)
    before.restore()
    assert [one.state for one in devices] == [(5, 0), (5, 0)]


# -- precision


@pytest.fixture
def settings() -> Iterator[None]:
    """As torch begins; leaves the process as it was."""
    before, sums, words = precision._all(), precision._sums(), precision._words()
    _as_torch_begins()
    yield
    _as_torch_begins()
    precision._write(before, sums, words)
    assert precision._all() == before
    assert precision._words() == words


def _as_torch_begins() -> None:
    for kind in ("generic", "cuda", "mkldnn"):
        precision._set(kind, "all", "none")
    torch._C._set_float32_matmul_precision("highest")
    torch._C._set_cudnn_allow_tf32(True)


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that can do it."""
    monkeypatch.setattr(precision, "_rounds", lambda value, device: True)


def _newer(kind: str, op: str, value: str) -> None:
    torch._C._set_fp32_precision_setter(kind, op, value)


CHANGES: dict[str, Callable[[], Any]] = {
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "highest": lambda: torch.set_float32_matmul_precision("highest"),
    "matmul.allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "cudnn.allow_tf32": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "matmul.fp32_precision": lambda: _newer("cuda", "matmul", "tf32"),
    "conv.fp32_precision": lambda: _newer("cuda", "conv", "ieee"),
    "fp32_precision": lambda: _newer("generic", "all", "tf32"),
    "mkldnn": lambda: _newer("mkldnn", "matmul", "bf16"),
    "half": lambda: setattr(torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False),
    "bfloat16": lambda: setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False),
}


def _readable() -> list[Any]:
    """What the older functions say, or that they cannot."""
    said: list[Any] = []
    for read in (torch._C._get_float32_matmul_precision, torch._C._get_cudnn_allow_tf32, torch._C._get_cublas_allow_tf32):
        try:
            said.append(read())
        except RuntimeError:
            said.append(None)
    return [*said, precision._all(), precision._sums()]


def _plain(settings: Any) -> list[Any]:
    return ["ieee" if value == "none" else value for value in settings]


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("later", CHANGES)
@pytest.mark.parametrize("earlier", ["none", *CHANGES])
def test_settings_that_changed_are_put_back_for_a_while(earlier: str, later: str, device: torch.device, settings: None) -> None:
    CHANGES.get(earlier, lambda: None)()
    wanted = precision_of(device)
    CHANGES[later]()
    before = _readable()
    with restored(wanted, device):
        assert _plain(precision_of(device)) == _plain(wanted)
        if before[0] is not None and before[1] is not None:
            assert torch.get_float32_matmul_precision()  # who reads by the older functions goes on
    assert _readable() == before
    with pytest.raises(KeyError), restored(wanted, device):
        raise KeyError
    assert _readable() == before


class Asks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.seen = Notes()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((precision_of(CPU), torch.get_float32_matmul_precision()))
        return self.layer(x).sin()


@pytest.mark.cpu(reason="its products are told apart by their words")
def test_a_replay_multiplies_as_forward_did(settings: None) -> None:
    couplings = nn.Sequential(*[rnn.AdditiveCoupling(Asks(), Asks(), dim=-1) for _ in range(2)], nn.Linear(8, 4), Asks(), Asks())
    torch.set_float32_matmul_precision("medium")
    with revhooks.reversible(replay=Asks) as run:
        loss = couplings(torch.randn(3, 8)).sum()
    torch.set_float32_matmul_precision("highest")
    now = precision_of(CPU)
    loss.backward()
    assert precision_of(CPU) == now
    assert torch.get_float32_matmul_precision() == "highest"
    seen = [seen for module in couplings.modules() if isinstance(module, Asks) for seen in module.seen.taken()]
    assert len(seen) > 6  # some were run again
    assert set(seen) == {(("bf16", now[1], now[2]), "medium")}
    assert run.stats.held_bytes == 0


def test_what_float32_is_rounded_to(rounding: None) -> None:
    assert coarse(("ieee", "ieee", "ieee"), CUDA, convolves=True) is None
    assert coarse(("none", "none", "none"), CUDA, convolves=True) is None
    assert coarse(("none", "tf32", "tf32"), CUDA, convolves=True) is torch.float16  # as torch begins
    assert coarse(("none", "tf32", "tf32"), CUDA, convolves=False) is None
    assert coarse(("tf32", "none", "none"), CUDA, convolves=False) is torch.float16
    assert coarse(("bf16", "tf32", "none"), CPU, convolves=True) is torch.bfloat16
    assert coarse((), CPU, convolves=True) is None  # of a torch that does not say


def test_a_device_that_cannot_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    precision._rounds.cache_clear()
    try:
        assert coarse(("tf32", "tf32", "tf32"), CUDA, convolves=True) is None
        precision._rounds.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        assert coarse(("tf32", "tf32", "tf32"), CUDA, convolves=True) is torch.float16
    finally:
        precision._rounds.cache_clear()


def _bounds_seen(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> set[tuple[float, float]]:
    seen: list[tuple[float, float]] = []
    original = Frame.bounds

    def bounds(self: Frame, stream: Tensor) -> tuple[float, float]:
        seen.append(original(self, stream))
        return seen[-1]

    monkeypatch.setattr(Frame, "bounds", bounds)
    with revhooks.reversible():
        model(x).square().mean().backward()
    return set(seen)


@pytest.mark.cpu(reason="its words for products; CUDA has no bfloat16 among them")
def test_the_guards_bounds_see_it(rounding: None, settings: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def dense() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def model(branch: Callable[[], nn.Module]) -> nn.Module:
        return nn.Sequential(*[rnn.AdditiveCoupling(branch(), branch()) for _ in range(3)])

    x, image = torch.randn(3, 8), torch.randn(2, 8, 5, 5)
    assert _bounds_seen(model(dense), x, monkeypatch) == {tolerance(torch.float32)}
    for kind in ("cuda", "mkldnn"):
        _newer(kind, "conv", "tf32")
    assert _bounds_seen(model(dense), x, monkeypatch) == {tolerance(torch.float32)}  # no convolution there
    conv = lambda: nn.Conv2d(4, 4, 3, padding=1)
    assert _bounds_seen(model(conv), image, monkeypatch) == {tolerance(torch.float16)}
    torch.set_float32_matmul_precision("high")
    assert _bounds_seen(model(dense), x, monkeypatch) == {tolerance(torch.float16)}
    torch.set_float32_matmul_precision("medium")
    assert _bounds_seen(model(dense), x, monkeypatch) == {tolerance(torch.bfloat16)}
    assert _bounds_seen(model(dense).double(), x.double(), monkeypatch) == {tolerance(torch.float64)}


class Rounds(nn.Module):
    """A product as a device makes it whose factors have ten bits of mantissa."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + (x.half().float() - x).detach()
        return 2 * self.layer(x).tanh()


@pytest.mark.parametrize("setting", ["highest", "high"])
def test_a_chain_that_drifts_as_its_products_do(setting: str, rounding: None, settings: None) -> None:
    """It is within tolerance where they are coarse, and only there."""
    torch.manual_seed(0)
    model = nn.Sequential(*[rnn.AdditiveCoupling(Rounds(), Rounds(), dim=-1) for _ in range(32)])
    x = torch.randn(64, 32)
    torch.set_float32_matmul_precision(setting)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            with revhooks.reversible() as run:
                model(nn.Parameter(x) * 1).square().mean().backward()
    assert 1e-3 < run.stats.worst_error < 2e-2 or setting == "highest"
    warned = [one for one in caught if issubclass(one.category, FallbackWarning)]
    assert bool(warned) == (setting == "highest")


def test_what_is_made_again_is_known_up_to_that() -> None:
    x = torch.randn(100)
    drifted = x * (1 + 1e-3 * torch.randn(100))
    assert not is_again(drifted, x, exact=False)
    assert is_again(drifted, x, exact=False, computed=torch.float16)
    assert not is_again(drifted, x, exact=True, computed=torch.float16)
