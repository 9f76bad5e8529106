"""Compiled blocks and models inside of ``reversible()``: right, replayed or inverted, and compiled as often as without it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import convert_frame
from torch._dynamo.utils import counters

import revhooks
from revhooks.nn import AdditiveCoupling, AffineCoupling, ReversibleSequential

_TORCH = str(Path(torch.__file__).parent)
BACKENDS = ("eager", "aot_eager")
pytestmark = [  # what dynamo does
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated"),
]


class Branch(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())


def fresh(name: str) -> type[nn.Module]:
    """A class of residual blocks that nobody has named yet, with code of its own."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = Branch(16)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(x)

    Block.forward.__code__ = Block.forward.__code__.replace(co_name="forward")
    Block.__name__ = name
    return Block


def shift_class() -> type[nn.Module]:
    """A class of third-party blocks that can be inverted."""

    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = Branch(8)

        def forward(self, x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            return torch.cat([a + self.f(b), b], -1)

        def inverse(self, y: Tensor) -> Tensor:
            a, b = y.chunk(2, -1)
            return torch.cat([a - self.f(b), b], -1)

    return Shift


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The code objects that dynamo compiles in a test."""
    torch._dynamo.reset()
    counters.clear()
    seen: list[Any] = []
    before = convert_frame._compile

    def compile_frame(code: Any, *args: Any, **kwargs: Any) -> Any:
        if not code.co_filename.startswith(_TORCH):  # whose frames around a module come and go with its version
            seen.append(code)
        return before(code, *args, **kwargs)

    monkeypatch.setattr(convert_frame, "_compile", compile_frame)
    yield seen
    torch._dynamo.reset()
    counters.clear()


def gradients(model: Callable[[Tensor], Tensor], net: nn.Module, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(model(x).square().mean(), list(net.parameters())))


def figures(stats: revhooks.record.Stats) -> tuple[int, ...]:
    return stats.frames, stats.inversions, stats.replays, stats.second_evaluations


def figures_of(net: nn.Module, x: Tensor, replay: Any = ()) -> tuple[int, ...]:
    """What a run does where nothing is compiled."""
    for _ in range(2):  # the first one learns
        with revhooks.reversible(replay=replay) as run:
            gradients(net, net, x)
    return figures(run.stats)


def chain(
    make: Callable[[], nn.Module], count: int = 3, *, exact: bool = True
) -> tuple[nn.Sequential, Tensor, Callable[..., None]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), *[make() for _ in range(count)])
    x = torch.randn(64, 16)
    reference = gradients(net, net, x)

    def check(found: list[Tensor]) -> None:
        tolerance = {} if not exact else {"rtol": 0, "atol": 0}
        for got, expected in zip(found, reference, strict=True):
            torch.testing.assert_close(got, expected, **tolerance)

    return net, x, check


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", ["sequential", "linear", "encoder", "user", "branches", "own branches"])
def test_parts_compiled_in_place(what: str, backend: str, compiled: list[Any]) -> None:
    """Dynamo skips torch's own frames, and leaves ours alone inside of them."""
    makers: dict[str, Callable[[], nn.Module]] = {
        "sequential": lambda: nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.LayerNorm(16)),
        "linear": lambda: nn.Linear(16, 16),
        "encoder": lambda: nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True),
        "user": lambda: Branch(16),
        "branches": lambda: AdditiveCoupling(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 8), dim=-1),
        "own branches": lambda: AdditiveCoupling(Branch(8), Branch(8), dim=-1),
    }
    net, x, check = chain(makers[what], exact="branches" not in what)
    expected = figures_of(net, x)
    assert bool(expected[1]) == ("branches" in what)
    for block in list(net)[1:]:
        for part in [block.f, block.g] if isinstance(block, AdditiveCoupling) else [block]:
            part.compile(backend=backend)
    for _ in range(2):
        with revhooks.reversible() as run:
            check(gradients(net, net, x))
    assert {code.co_filename for code in compiled} <= {__file__}
    assert len(compiled) == (1 if what in ("user", "own branches") else 0)
    assert figures(run.stats) == expected


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["in place", "wrapped"])
def test_a_compiled_class_that_is_named_is_replayed(how: str, backend: str, compiled: list[Any]) -> None:
    """Before and after it is named: as many frames are compiled as without us, once."""
    block = fresh("Block")
    net, x, check = chain(block, 5)
    model: nn.Module = net
    if how == "in place":
        for part in list(net)[1:]:
            part.compile(backend=backend)
    else:
        model = nn.Sequential(net[0], *[torch.compile(part, backend=backend) for part in list(net)[1:]])
    check(gradients(model, net, x))
    with revhooks.reversible():
        check(gradients(model, net, x))
    count = len(compiled)
    for _ in range(3):
        with revhooks.reversible(replay=block, guard="raise") as run:
            check(gradients(model, net, x))
        assert run.stats.replays == 4
        assert run.stats.peak_held_bytes < 0.6 * run.stats.packed_bytes
    assert len(compiled) == count == 1
    if backend == "eager":  # else what is compiled gives its memory away in backward
        with revhooks.reversible(replay=block, guard="raise"):
            loss = model(x).square().mean()
            loss.backward(retain_graph=True)
            loss.backward()
    assert len(compiled) == count


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_class_that_is_registered_is_inverted(backend: str) -> None:
    """Also if it is registered after it was compiled."""
    shift = shift_class()
    net, x, check = chain(shift, 4, exact=False)
    for part in list(net)[1:]:
        part.compile(backend=backend)
    check(gradients(net, net, x))
    revhooks.register(shift, inverse="inverse")
    try:
        for step in range(3):
            with revhooks.reversible(guard="raise") as run:
                check(gradients(net, net, x))
            assert not step or figures(run.stats)[:3] == (4, 2, 1)  # the newest is kept, and the first has its input
    finally:
        revhooks.unregister(shift)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_couplings_are_inverted(backend: str) -> None:
    net, x, check = chain(lambda: AffineCoupling(Branch2(), dim=-1), 4, exact=False)
    expected = figures_of(net, x)
    for part in list(net)[1:]:
        part.compile(backend=backend)
    check(gradients(net, net, x))
    for _ in range(2):
        with revhooks.reversible(guard="raise") as run:
            check(gradients(net, net, x))
        assert figures(run.stats) == expected
    assert expected[1] >= 3


class Branch2(Branch):
    def __init__(self) -> None:
        super().__init__(8)
        self.b = nn.Linear(32, 16)


def test_each_bracketed_class_has_a_limit_of_recompiles_of_its_own(compiled: list[Any]) -> None:
    """Dynamo counts them by code object, and gives up at eight."""
    classes = [fresh(f"Block{i}") for i in range(10)]
    for i, cls in enumerate(classes):
        cls.forward.__code__ = cls.forward.__code__.replace(co_firstlineno=1000 + i)
    _, x, _ = chain(nn.Identity, 0)
    net = nn.Sequential(*[cls() for cls in classes])
    expected = gradients(net, net, x)
    for block in net:
        block.compile(backend="eager")
    for _ in range(2):
        with revhooks.reversible(replay=tuple(classes)):
            for got, wanted in zip(gradients(net, net, x), expected, strict=True):
                torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert len(compiled) == counters["stats"]["unique_graphs"] == 10


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("named", ["before", "after"])
def test_a_compiled_model_of_named_blocks(backend: str, named: str, compiled: list[Any]) -> None:
    """The blocks are part of the graph: right, and compiled once a class was named."""
    block = fresh("Block")
    net, x, check = chain(block)
    if named == "before":
        revhooks.reversible(replay=block)
    model = torch.compile(net, backend=backend)
    check(gradients(model, net, x))
    for step in range(4):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with revhooks.reversible(replay=block):
                check(gradients(model, net, x))
        if step == 0:
            count = len(compiled)
    assert len(compiled) == count
    assert {code.co_filename for code in compiled} <= {__file__, nn.modules.container.__file__} | {
        torch._dynamo.external_utils.__file__
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "make",
    [
        lambda: ReversibleSequential(nn.Linear(4, 4), nn.Linear(4, 4), dim=-1),
        lambda: ReversibleSequential(nn.Linear(4, 4), nn.Linear(4, 4), dim=-1, grid_bits=12),
        lambda: AdditiveCoupling(nn.Linear(4, 4), nn.Linear(4, 4), dim=-1, grid_bits=10),
    ],
)
def test_one_graph(make: Callable[[], nn.Module], backend: str) -> None:
    net = make()
    x = torch.randn(2, 8)
    expected = gradients(net, net, x)
    for got, wanted in zip(gradients(torch.compile(net, backend=backend, fullgraph=True), net, x), expected, strict=True):
        torch.testing.assert_close(got, wanted)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_predicate_is_not_compiled(compiled: list[Any]) -> None:
    net, x, check = chain(fresh("Block"))
    for part in list(net)[1:]:
        part.compile(backend="eager")
    with revhooks.reversible(
        keep=lambda module: isinstance(module, nn.Linear), replay=lambda module: type(module).__name__ == "Block"
    ):
        check(gradients(net, net, x))
    assert [code.co_name for code in compiled] == ["forward"]


def test_a_step_that_is_compiled_around_the_context(compiled: list[Any]) -> None:
    """The graph breaks there; hooks, handles and replays run inside of compiled code, and are no part of it."""
    block = fresh("Block")
    net, x, check = chain(block)
    revhooks.reversible(replay=block)

    def step() -> list[Tensor]:
        with revhooks.reversible(replay=block, guard="raise"):
            return gradients(net, net, x)

    skipped = torch.compile(torch._dynamo.disable(step, recursive=False), backend="aot_eager")
    for _ in range(3):
        check(skipped())
    assert not {code.co_filename for code in compiled if "revhooks" in code.co_filename and "tests" not in code.co_filename}


def test_compiled_autograd() -> None:
    """A backward pass that is traced to be compiled has no end at which to let go."""
    import torch._dynamo.compiled_autograd as compiled_autograd

    net = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 64))
    x = torch.randn(64, 64)
    expected = gradients(net, net, x)
    with revhooks.reversible():
        loss = net(x).square().mean()
        with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")):
            loss.backward()
    for parameter, wanted in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted)


def test_named_blocks_of_a_compiled_model_are_told_of() -> None:
    """They are part of a larger graph, and not replayed."""
    block = fresh("Block")
    net, x, check = chain(block)
    model = torch.compile(net, backend="aot_eager")
    with pytest.warns(revhooks.errors.FallbackWarning, match="compiled into a larger graph"), revhooks.reversible(replay=block):
        check(gradients(model, net, x))
