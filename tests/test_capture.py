"""A step in a CUDA graph: nothing is read while it is captured. No GPU here: a CPU stands for one whose reads then raise."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import revhooks
from revhooks import capture, storage
from revhooks import nn as rnn
from revhooks.errors import CaptureError
from revhooks.generators import RngTracker
from tests.conftest import conv_branch, mlp

pytestmark = pytest.mark.cpu(reason="its captures are played; those of a GPU are in test_gpu.py")

READS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "unique")


class Reads(TorchDispatchMode):
    """Raises as CUDA does where the host would have to wait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in READS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A switch: whether a graph is captured. Every device is far."""
    flag = [False]
    monkeypatch.setattr(storage, "_NEAR", frozenset())
    monkeypatch.setattr(capture, "_KINDS", frozenset({"cpu"}))
    monkeypatch.setattr(capture, "_asks", lambda: flag[0])
    return flag


class Shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([a, b + self.net(a)], -1)

    def inverse(self, y: Tensor) -> Tensor:
        a, b = y.chunk(2, -1)
        return torch.cat([a, b - self.net(a)], -1)


@pytest.fixture
def registered() -> Iterator[None]:
    revhooks.register(Shift, inverse="inverse")
    yield
    revhooks.unregister(Shift)


def models() -> dict[str, tuple[nn.Module, Tensor, dict[str, Any]]]:
    ordinary = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    images = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 1))
    couplings = nn.Sequential(nn.Linear(8, 8), *[rnn.AdditiveCoupling(mlp(4), mlp(4), dim=-1) for _ in range(3)])
    convs = nn.Sequential(nn.Conv2d(3, 8, 3), *[rnn.AdditiveCoupling(conv_branch(4), conv_branch(4)) for _ in range(3)])
    grid = nn.Sequential(nn.Linear(8, 8), *[rnn.AdditiveCoupling(mlp(4), mlp(4), dim=-1, grid_bits=12) for _ in range(3)])
    shifts = nn.Sequential(nn.Linear(8, 8), *[Shift() for _ in range(3)])
    layer = lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x, image = torch.randn(4, 8), torch.randn(2, 3, 8, 8)
    return {
        "ordinary": (ordinary, x, {}),
        "images": (images, image, {}),
        "couplings": (couplings, x, {}),
        "convolutions": (convs, image, {}),
        "grid": (grid, x, {}),
        "chain": (rnn.ReversibleSequential(*[mlp(4) for _ in range(6)], dim=-1), x, {}),
        "third party": (shifts, x, {}),
        "replayed": (nn.Sequential(layer(), layer()), torch.randn(2, 5, 8), {"replay": nn.TransformerEncoderLayer}),
        "offload": (couplings, x, {"offload": True}),
        "dropout outside": (nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), *[Shift() for _ in range(2)]), x, {}),
    }


def one_step(model: nn.Module, x: Tensor, reverse: bool, **options: Any) -> list[Any]:
    for parameter in model.parameters():
        parameter.grad = None
    leaf = x.clone().requires_grad_()
    torch.manual_seed(3)
    if reverse:
        with revhooks.reversible(**options) as run:
            model(leaf).square().mean().backward()
        assert run.stats.held_bytes == 0
    else:
        model(leaf).square().mean().backward()
    return [leaf.grad, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("again", [False, True], ids=["a run in the graph", "a graph in a run"])
@pytest.mark.parametrize("name", models())
def test_after_warming_up_a_capture_reads_nothing(name: str, again: bool, capturing: list[bool], registered: None) -> None:
    model, x, options = models()[name]
    plain = copy.deepcopy(model)
    for _ in range(5):
        want = one_step(plain, x, False)
    for _ in range(4):
        one_step(model, x, True, **options)
    capturing[0] = True
    if again:
        capturing[0] = False
        with revhooks.reversible(**options) as run:
            model(x.clone().requires_grad_()).square().mean().backward()
            capturing[0] = True
            for parameter in model.parameters():
                parameter.grad = None
            leaf = x.clone().requires_grad_()
            torch.manual_seed(3)
            with Reads():
                model(leaf).square().mean().backward()
            got = [leaf.grad, *(parameter.grad.clone() for parameter in model.parameters())]  # type: ignore[union-attr]
            capturing[0] = False
            model(x.clone().requires_grad_()).square().mean().backward()  # and on, as before
            assert not any("random" in kept.why for kept in run.stats.kept)
    else:
        with Reads():
            got = one_step(model, x, True, **options)
    for a, b in zip(want, got, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.layer(x), 0.5).sin()


def test_a_block_that_draws_is_refused_in_words(capturing: list[bool]) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), Dropping(), Dropping()), torch.randn(4, 8)
    for _ in range(3):
        one_step(model, x, True, replay=Dropping)
    capturing[0] = True
    with pytest.raises(CaptureError, match=r"Dropping.*draws no random numbers.*generator cannot be read.*keep="):
        one_step(model, x, True, replay=Dropping)
    one_step(model, x, True)  # which does not repeat it


def test_a_block_that_has_never_run_is_refused_in_words(capturing: list[bool]) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), rnn.AdditiveCoupling(mlp(4), mlp(4), dim=-1)), torch.randn(4, 8)
    capturing[0] = True
    with pytest.raises(CaptureError, match=r"AdditiveCoupling.*its first call.*before the capture"):
        one_step(model, x, True)
    capturing[0] = False
    one_step(model, x, True)
    model.eval()
    capturing[0] = True
    with pytest.raises(CaptureError, match="first call"):  # nor in this mode
        one_step(model, x, True)


def test_generators_of_a_device_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `CUDAGeneratorImpl::get_offset` raises."""
    device, flag, offset = torch.device("cuda", 0), [False], [0]

    class Generator:
        def initial_seed(self) -> int:
            return 0

        def get_offset(self) -> int:
            if flag[0]:
                raise RuntimeError("Cannot call CUDAGeneratorImpl::get_offset during CUDA graph capture")
            return offset[0]

    monkeypatch.setattr(capture, "_asks", lambda: flag[0])
    monkeypatch.setattr(torch.cuda, "default_generators", (Generator(),))
    tracker = RngTracker()
    before = tracker.marks(device)
    flag[0] = True
    assert tracker.marks(device) == before
    state = tracker.torch_state(device, tracker.torch_marks(device))
    assert not state.device
    state.restore()
    flag[0], offset[0] = False, 4
    assert tracker.marks(device) != before
