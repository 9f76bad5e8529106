"""Law: every kind of tensor, at every place of a model, in every mode: gradients are those of plain PyTorch."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import revhooks
from revhooks.kinds import copy_of, is_allocated, same_values
from tests.devices import DEVICE

N = 8


class Tag(torch.Tensor):
    """The default ``__torch_function__``: results are of the class, too."""


class Wrapped(torch.Tensor):
    """A wrapper subclass: the elements are those of another tensor."""

    @staticmethod
    def __new__(cls, inner: Tensor, requires_grad: bool = False) -> Wrapped:
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device, requires_grad=requires_grad
        )

    def __init__(self, inner: Tensor, requires_grad: bool = False) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], _: None, size: Any, stride: Any) -> Wrapped:
        return Wrapped(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.utils._pytree import tree_map_only

        args, kwargs = tree_map_only(Wrapped, lambda t: t.inner, (args, kwargs or {}))
        out = function(*args, **kwargs)
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.sum):
            return out  # what comes out of it is plain
        return tree_map_only(torch.Tensor, Wrapped, out)


class Opening(torch.autograd.Function):
    """From a wrapper subclass to a plain tensor, with a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.inner.clone() if isinstance(x, Wrapped) else x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return Wrapped(grad) if isinstance(x, Wrapped) else grad


class Wrapping(torch.autograd.Function):
    """From a plain tensor to a wrapper subclass, with a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return Wrapped(x.detach().clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.inner if isinstance(grad, Wrapped) else grad


class Scaled(torch.autograd.Function):
    """A product whose backward reads an attribute of the factor, as those of quantised weights do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        ctx.factor = id(factor)
        return x @ factor * factor.scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        assert id(factor) == ctx.factor
        return grad @ factor.t() * factor.scale, None


def scaled(tensor: Tensor) -> Tensor:
    tensor.scale = 0.5
    return tensor


def square() -> Tensor:
    return torch.randn(N, N) / 3


def quantized() -> Tensor:
    return torch.quantize_per_tensor(square(), 0.1, 0, torch.qint8)


def nested(h: Tensor, layout: torch.layout) -> Tensor:
    return torch.nested.as_nested_tensor([h[:3], h[3:]], layout=layout)


def unnested(x: Tensor) -> Tensor:
    return torch.cat(list(x.unbind()))


class Kind(NamedTuple):
    """How a constant of the kind is made and used on ``h``, and how ``h`` becomes an activation of the kind and comes back.

    What cannot be differentiated in plain PyTorch is ``None``.
    """

    make: Callable[[], Tensor] | None
    use: Callable[[Tensor, Tensor], Tensor] | None = None
    to: Callable[[Tensor], Tensor] | None = None
    back: Callable[[Tensor], Tensor] | None = None


def dense(x: Tensor) -> Tensor:
    return x.to_dense()


KINDS: dict[str, Kind] = {
    "plain": Kind(square, lambda k, h: h @ k, lambda h: h.clone(), torch.tanh),
    "coo": Kind(lambda: square().to_sparse(), torch.sparse.mm, lambda h: h.to_sparse(), dense),
    "uncoalesced": Kind(
        lambda: torch.sparse_coo_tensor(torch.tensor([[0, 0, 2], [1, 1, 3]]), torch.ones(3), (N, N)), torch.sparse.mm
    ),
    "hybrid": Kind(lambda: square().to_sparse(1), lambda k, h: k.to_dense() @ h, lambda h: h.to_sparse(1), dense),
    "csr": Kind(lambda: square().to_sparse_csr(), torch.sparse.mm, lambda h: h.to_sparse_csr(), dense),
    "csc": Kind(lambda: square().to_sparse_csc(), lambda k, h: k.to_dense() @ h, lambda h: h.to_sparse_csc(), dense),
    "bsr": Kind(lambda: square().to_sparse_bsr((2, 2)), lambda k, h: k.to_dense() @ h, lambda h: h.to_sparse_bsr((2, 2)), dense),
    "mkldnn": Kind(lambda: square().to_mkldnn(), lambda k, h: k.to_dense() @ h, lambda h: torch.relu(h.to_mkldnn()), dense),
    "quantized": Kind(quantized, lambda k, h: k.dequantize() @ h),
    "nested": Kind(
        lambda: nested(square(), torch.strided),
        lambda k, h: unnested(k) @ h,
        lambda h: torch.relu(nested(h, torch.strided)),
        lambda x: unnested(torch.tanh(x)),
    ),
    "jagged": Kind(
        lambda: nested(square(), torch.jagged),
        lambda k, h: unnested(torch.tanh(k)) @ h,
        lambda h: torch.relu(nested(h, torch.jagged)),
        lambda x: unnested(torch.tanh(x)),
    ),
    "complex": Kind(
        lambda: torch.complex(square(), square()),
        lambda k, h: (k @ h.to(k.dtype)).abs(),
        lambda h: torch.complex(h, h.sin()),
        lambda x: (x * x).imag,
    ),
    "conjugate": Kind(
        lambda: torch.complex(square(), square()).conj(),
        lambda k, h: (k * h).abs(),
        lambda h: torch.complex(h, h.sin()).conj(),
        lambda x: (x * x).real,
    ),
    "negative": Kind(
        lambda: torch.complex(square(), square()).conj().imag,
        lambda k, h: k * h,
        lambda h: torch.complex(h, h.sin()).conj().imag,
        torch.tanh,
    ),
    "empty": Kind(
        lambda: torch.zeros(0, N),
        lambda k, h: h + (k @ h).sum(),
        lambda h: h[:0] * 2,
        lambda x: torch.zeros(N, N) + torch.tanh(x).sum(),
    ),
    "expanded": Kind(
        lambda: torch.randn(1, N).expand(N, N),
        lambda k, h: k * h,
        lambda h: h[:1].exp().expand(N, N),
        lambda x: torch.tanh(x * x),
    ),
    "bool": Kind(lambda: torch.rand(N, N) > 0.5, lambda k, h: h.masked_fill(k, 0.0)),
    "tag": Kind(
        lambda: square().as_subclass(Tag), lambda k, h: h @ k, lambda h: h.as_subclass(Tag), lambda x: torch.tanh(F.gelu(x) * x)
    ),
    "wrapper": Kind(
        lambda: Wrapped(square()),
        lambda k, h: Opening.apply(k * 2) @ h,
        lambda h: Wrapping.apply(h),
        lambda x: Opening.apply(torch.tanh(x * x)),
    ),
    "attributes": Kind(lambda: scaled(square()), lambda k, h: Scaled.apply(h, k)),
    "tag with attributes": Kind(lambda: scaled(square().as_subclass(Tag)), lambda k, h: Scaled.apply(h, k)),
}
if DEVICE.type != "cpu":
    del KINDS["mkldnn"]  # of a CPU


class Block(nn.Module):
    """An MLP block that uses a constant, or makes its hidden activation one of the kind; it gives a tensor of the kind out."""

    def __init__(self, kind: Kind, place: str) -> None:
        super().__init__()
        self.first, self.last, self.norm = nn.Linear(N, N), nn.Linear(N, N), nn.LayerNorm(N)
        self.kind, self.place = [kind], place
        self.const: Tensor | None
        if place == "buffer":
            self.register_buffer("const", kind.make())  # type: ignore[misc]
        elif place == "attribute":
            self.const = kind.make()  # type: ignore[misc]
        elif place == "frozen parameter":
            self.const = nn.Parameter(made := kind.make(), requires_grad=False)  # type: ignore[misc]
            self.const.__dict__.update(made.__dict__)

    def forward(self, x: Tensor, const: Tensor | None = None) -> Tensor:
        kind = self.kind[0]
        if self.place == "output" and self.number:
            x = kind.back(x)  # type: ignore[misc]
        h = F.gelu(self.first(self.norm(x)))
        if self.place == "activation":
            h = kind.back(kind.to(h))  # type: ignore[misc]
        elif self.place != "output":
            h = kind.use(const if const is not None else self.const, h)  # type: ignore[misc,arg-type]
        h = x + torch.tanh(self.last(h))
        return kind.to(h) if self.place == "output" else h  # type: ignore[misc]

    number = 0


class Net(nn.Module):
    def __init__(self, kind: Kind, place: str, blocks: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(kind, place) for _ in range(blocks))
        for number, block in enumerate(self.blocks):
            block.number = number
        self.const = kind.make() if place == "argument" and kind.make is not None else None
        self.kind, self.place = [kind], place

    def forward(self, x: Tensor, call: Callable[..., Any]) -> Tensor:
        for block in self.blocks:
            x = call(block, x, self.const) if self.place == "argument" else call(block, x)
        return self.kind[0].back(x) if self.place == "output" else x  # type: ignore[misc]


def plainly(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def twice(function: Callable[..., Any], *args: Any) -> Any:
    return revhooks.checkpoint(lambda *args: revhooks.checkpoint(function, *args), *args)


MODES: dict[str, tuple[dict[str, Any] | None, Callable[..., Any]]] = {
    "ops": ({}, plainly),
    "no ops": ({"ops": False}, plainly),
    "replay": ({"replay": Block}, plainly),
    "replay, no ops": ({"replay": Block, "ops": False}, plainly),
    "budget": ({"replay": Block, "budget": 3000}, plainly),
    "small budget": ({"budget": 1000}, plainly),
    "checkpoint": (None, revhooks.checkpoint),
    "checkpoint inside": ({}, revhooks.checkpoint),
    "checkpoint twice": ({}, twice),
    "checkpoint in replay": ({"replay": Net}, revhooks.checkpoint),
}
FEWER = ("ops", "replay", "budget", "checkpoint", "checkpoint twice")  # for constants
PLACES = ("activation", "argument", "buffer", "attribute", "frozen parameter", "output")


def gradients(net: Net, options: dict[str, Any] | None, call: Callable[..., Any], steps: int = 2) -> list[Tensor]:
    torch.manual_seed(1)
    found: list[Tensor] = []
    x = torch.randn(N, N, requires_grad=True)
    with contextlib.nullcontext() if options is None else revhooks.reversible(**options):
        for _ in range(steps):
            net.zero_grad()
            x.grad = None
            y = net(x * 1, call)
            y.square().mean().backward()
            found += [y.detach(), x.grad, *(p.grad for p in net.parameters() if p.grad is not None)]  # type: ignore[list-item]
    return [tensor.as_subclass(Tensor) if isinstance(tensor, Tag) else tensor for tensor in found]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        for message in ("Sparse", "The PyTorch API of nested tensors", "torch.quantize", ".*quantiz"):
            warnings.filterwarnings("ignore", message=message)
        yield


def cases() -> Iterator[Any]:
    for name, kind in KINDS.items():
        for place in PLACES:
            if (kind.to if place in ("activation", "output") else kind.make) is not None:
                if place == "output" and name in ("empty",):
                    continue  # it gives back less than it gets
                yield pytest.param(name, place, id=f"{name}-{place}")


@pytest.mark.parametrize(("name", "place"), list(cases()))
def test_law(name: str, place: str) -> None:
    torch.manual_seed(0)
    try:
        net = Net(KINDS[name], place)
        expected = gradients(net, None, plainly)
    except (RuntimeError, NotImplementedError) as why:
        pytest.skip(f"not in plain PyTorch: {str(why)[:60]}")
    for mode in MODES if place in ("activation", "output") else FEWER:
        options, call = MODES[mode]
        got = gradients(net, options, call)
        assert len(got) == len(expected), mode
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b), mode


# ------------------------------------------------------------------------------- registered blocks


class Half(nn.Module):
    """An invertible block whose branch uses a constant of the kind: its own, an argument, or one that the block has."""

    def __init__(self, kind: Kind, place: str) -> None:
        super().__init__()
        self.branch = Block(kind, "argument" if place == "owner" else place)
        self.own = [kind.make()] if place == "owner" else []  # type: ignore[misc]

    def call(self, a: Tensor, *const: Tensor) -> Tensor:
        return self.branch(a, *const, *self.own)

    def forward(self, x: Tensor, *const: Tensor) -> Tensor:
        a, b = x.chunk(2)
        return torch.cat([a, b + self.call(a, *const)])

    def inverse(self, y: Tensor, *const: Tensor) -> Tensor:
        a, b = y.chunk(2)
        return torch.cat([a, b - self.call(a, *const)])


class To(nn.Linear):
    convert: Any

    def forward(self, x: Tensor) -> Tensor:
        return self.convert[0](torch.tanh(super().forward(x)))


class Back(nn.Linear):
    convert: Any

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(self.convert[0](x)))


class Between(Half):
    """One with two branches, between which is an activation of the kind."""

    def __init__(self, kind: Kind, place: str) -> None:
        super().__init__(kind, "activation")
        del self.branch
        self.there, self.again = To(N, N), Back(N, N)
        self.there.convert, self.again.convert = (kind.to,), (kind.back,)

    def call(self, a: Tensor, *const: Tensor) -> Tensor:
        return self.again(self.there(a))


@pytest.fixture
def _registered() -> Iterator[None]:
    for cls in (Half, Between):
        revhooks.register(cls, inverse="inverse")
    yield
    for cls in (Half, Between):
        revhooks.unregister(cls)


def registered_gradients(net: nn.ModuleList, const: tuple[Tensor, ...], options: dict[str, Any]) -> tuple[list[Tensor], int]:
    torch.manual_seed(1)
    x = torch.randn(2 * N, N, requires_grad=True)
    found: list[Tensor] = []
    inversions = 0
    for _ in range(2):
        net.zero_grad()
        x.grad = None
        with revhooks.reversible(**options) as run:
            h = x * 1
            for block in net:
                h = block(h, *const)
            h.square().mean().backward()
        inversions += run.stats.inversions
        found += [x.grad, *(p.grad for p in net.parameters() if p.grad is not None)]  # type: ignore[list-item]
    return [tensor.as_subclass(Tensor) for tensor in found], inversions


def registered_cases() -> Iterator[Any]:
    for name, kind in KINDS.items():
        for place in ("activation", "argument", "buffer", "owner", "between"):
            if (kind.to if place in ("activation", "between") else kind.make) is not None:
                yield pytest.param(name, place, id=f"{name}-{place}")


@pytest.mark.usefixtures("_registered")
@pytest.mark.parametrize(("name", "place"), list(registered_cases()))
def test_law_of_registered_blocks(name: str, place: str) -> None:
    torch.manual_seed(0)
    kind = KINDS[name]
    net = nn.ModuleList((Between if place == "between" else Half)(kind, place) for _ in range(3))
    const = (kind.make(),) if place == "argument" else ()  # type: ignore[misc]
    try:
        expected, _ = registered_gradients(net, const, {"budget": float("inf")})
    except (RuntimeError, NotImplementedError) as why:
        pytest.skip(f"not in plain PyTorch: {str(why)[:60]}")
    for options in ({}, {"ops": False}, {"budget": 2000}, {"guard": "raise"}):
        got, inversions = registered_gradients(net, const, options)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
        if name == "coo" and place in ("activation", "owner", "buffer") and not options:
            assert inversions  # it is not left alone for what its branch has


def elements(tensor: Tensor) -> Tensor:
    """Of a gradient of any kind."""
    if isinstance(tensor, Wrapped):
        return tensor.inner
    if tensor.is_nested:
        return torch.cat(list(tensor.unbind()))
    return tensor.to_dense().as_subclass(Tensor)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.make is not None and "attributes" not in name])
@pytest.mark.parametrize("place", ["argument", "parameter"])
def test_law_of_what_needs_a_gradient(name: str, place: str) -> None:
    kind = KINDS[name]

    def step(options: dict[str, Any] | None, call: Callable[..., Any]) -> list[Tensor]:
        torch.manual_seed(0)
        net = Net(kind, "argument")
        consts = [net.const.requires_grad_()] if net.const is not None else []
        if place == "parameter":
            net.place = place
            for block in net.blocks:
                block.place, block.const = place, nn.Parameter(kind.make())  # type: ignore[misc]
            consts = [block.const for block in net.blocks]  # type: ignore[misc]
        x = torch.randn(N, N, requires_grad=True)
        with contextlib.nullcontext() if options is None else revhooks.reversible(**options):
            net(x * 1, call).square().mean().backward()
        return [elements(t.grad) for t in (x, *consts, *net.blocks[0].first.parameters()) if t.grad is not None]  # type: ignore[union-attr]

    try:
        expected = step(None, plainly)
    except (RuntimeError, NotImplementedError) as why:
        pytest.skip(f"not in plain PyTorch: {str(why)[:60]}")
    for mode, (options, call) in MODES.items():
        got = step(options, call)
        assert len(got) == len(expected), mode
        assert all(map(torch.equal, got, expected)), mode


# ---------------------------------------------------------------------------------- state


class Keeps(nn.Module):
    """Carries a constant of the kind from call to call: another one each time, or one that is written to."""

    def __init__(self, kind: Kind, place: str) -> None:
        super().__init__()
        self.linear, self.kind = nn.Linear(N, N), [kind]
        self.written, self.calls = place.startswith("written"), 0
        self.more = [kind.make() for _ in range(3)]  # type: ignore[misc]
        self.state: Tensor
        if place.endswith("buffer"):
            self.register_buffer("state", self.more[0])
        else:
            self.state = self.more[0]

    def forward(self, x: Tensor) -> Tensor:
        y = x + torch.tanh(self.kind[0].use(self.state, torch.tanh(self.linear(x))))  # type: ignore[misc]
        if self.written:
            with torch.no_grad():
                self.state.mul_(0.5)
        else:
            self.state = self.more[int(1000 * float(x[0, 0].detach())) % 3]
        return y


@pytest.mark.parametrize("place", ["attribute", "buffer", "written attribute", "written buffer"])
@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.make is not None])
def test_state_of_any_kind(name: str, place: str) -> None:
    kind = KINDS[name]

    def step(call: Callable[..., Any], **options: Any) -> list[Tensor]:
        torch.manual_seed(0)
        blocks = [Keeps(kind, place) for _ in range(3)]
        x = torch.randn(N, N, requires_grad=True)
        found: list[Tensor] = []
        for _ in range(3):
            x.grad = None
            with revhooks.reversible(**options):
                h = x * 1
                for block in blocks:
                    block.zero_grad()
                    h = call(block, h)
                h.square().sum().backward()
            found += [x.grad, *(block.linear.weight.grad for block in blocks)]  # type: ignore[list-item]
        return [tensor.as_subclass(Tensor) for tensor in found]

    try:
        expected = step(plainly, budget=float("inf"))
    except (RuntimeError, NotImplementedError) as why:
        pytest.skip(f"not in plain PyTorch: {str(why)[:60]}")
    for got in (step(plainly, replay=Keeps), step(plainly, replay=Keeps, ops=False), step(revhooks.checkpoint)):
        assert all(map(torch.equal, got, expected))


# --------------------------------------------------------------------------------- other laws


def test_a_subclass_that_sees_operations_sees_none_of_ours() -> None:
    seen: list[str] = []

    class Sees(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(getattr(function, "__name__", str(function)))
            return super().__torch_function__(function, types, args, kwargs or {})

    def step(**options: Any) -> list[str]:
        seen.clear()
        with revhooks.reversible(**options):
            x = torch.ones(4, 4, requires_grad=True)
            y = torch.tanh(torch.nn.functional.gelu(x.as_subclass(Sees) * 2) @ torch.ones(4, 4))
            y.sum().backward()
        return list(seen)

    assert step() == step(budget=float("inf"))


def test_a_change_of_any_kind_of_tensor_in_place_is_seen() -> None:
    for name in ("coo", "csr", "tag", "wrapper", "conjugate", "jagged"):
        kind = KINDS[name]
        for options in ({}, {"replay": Block}):
            torch.manual_seed(0)
            net = Net(kind, "argument")
            with revhooks.reversible(**options):  # type: ignore[arg-type]
                y = net(torch.randn(N, N, requires_grad=True) * 1, plainly)
            if name in ("coo", "csr"):
                with torch.no_grad():
                    net.const.mul_(2)  # type: ignore[union-attr]
            else:
                net.const.mul_(2)  # type: ignore[union-attr]
            try:
                plain = None
                torch.manual_seed(0)
                again = Net(kind, "argument")
                z = again(torch.randn(N, N, requires_grad=True) * 1, plainly)
                again.const.mul_(2)  # type: ignore[union-attr]
                z.sum().backward()
            except RuntimeError as error:
                plain = error
            if plain is not None:
                with pytest.raises(RuntimeError, match="modified"):
                    y.sum().backward()


def test_graphs_of_kinds_may_be_kept() -> None:
    """Backward twice, and two forwards before one backward."""
    for name in ("coo", "tag", "conjugate", "jagged", "wrapper", "attributes"):
        kind = KINDS[name]
        place = "buffer" if kind.to is None else "activation"
        torch.manual_seed(0)
        net = Net(kind, place)

        def step(call: Callable[..., Any], options: dict[str, Any] | None, net: Net = net) -> list[Tensor]:
            torch.manual_seed(1)
            net.zero_grad()
            x = torch.randn(N, N, requires_grad=True)
            with contextlib.nullcontext() if options is None else revhooks.reversible(**options):
                one, two = net(x * 1, call), net(x * 2, call)
                two.sum().backward(retain_graph=True)
                (one.sum() * two.square().sum()).backward()
            return [t.as_subclass(Tensor) for t in (x.grad, *(p.grad for p in net.parameters())) if t is not None]

        expected = step(plainly, None)
        for mode, (options, call) in MODES.items():
            assert all(map(torch.equal, step(call, options), expected)), (name, mode)


DISTRIBUTED = """
import torch, revhooks, torch.nn as nn, torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
mesh = init_device_mesh("cpu", (1,))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(distribute_tensor(torch.randn(8, 8) / 3, mesh, [Shard(0)]))
        self.register_buffer("b", distribute_tensor(torch.randn(8), mesh, [Replicate()]))

    def forward(self, x, c):
        return x + torch.tanh(x @ self.w + self.b) * c


def step(call, options):
    torch.manual_seed(0)
    net = [Block() for _ in range(3)]
    c = distribute_tensor(torch.randn(8), mesh, [Replicate()])
    x = distribute_tensor(torch.randn(4, 8), mesh, [Shard(0)]).requires_grad_()
    found = []
    for _ in range(2):
        with revhooks.reversible(**options):
            h = x * 1
            for block in net:
                h = call(block, h, c)
            h.square().sum().backward()
        found += [x.grad.full_tensor().clone(), *(b.w.grad.full_tensor().clone() for b in net)]
    return found


plainly = lambda f, *a: f(*a)
expected = step(plainly, dict(budget=float("inf")))
for call, options in ((plainly, {}), (plainly, dict(ops=False)), (plainly, dict(replay=Block)),
                      (plainly, dict(replay=Block, ops=False)), (plainly, dict(replay=Block, budget=2000)),
                      (revhooks.checkpoint, {})):
    assert all(map(torch.equal, step(call, options), expected)), options
print("right")
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="no distributed package")
def test_distributed_tensors() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", DISTRIBUTED], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "right", done.stderr[-2000:]


def test_functional_tensors() -> None:
    """Inside of a functional transform nothing is saved for us; around it all is as in plain PyTorch."""
    linear = nn.Linear(N, N)

    def block(x: Tensor) -> Tensor:
        y = torch.tanh(linear(x))
        z = y * 1
        z.mul_(2)
        return z + x

    def step(call: Callable[..., Any], **options: Any) -> list[Tensor]:
        torch.manual_seed(1)
        linear.zero_grad()
        x = torch.randn(N, N, requires_grad=True)
        with revhooks.reversible(**options):
            call(torch.func.functionalize(block), call(torch.func.functionalize(block), x * 1)).square().sum().backward()
        return [x.grad, linear.weight.grad]  # type: ignore[list-item]

    expected = step(plainly, budget=float("inf"))
    for got in (step(plainly), step(plainly, ops=False), step(revhooks.checkpoint)):
        assert all(map(torch.equal, got, expected))


def test_memory_that_is_not_there_is_not_read() -> None:
    x = torch.zeros(4)
    assert is_allocated(x)
    x.untyped_storage().resize_(0)
    assert not is_allocated(x)
    assert copy_of(x) is x
    assert same_values(x, torch.zeros(4))
    assert not is_allocated(Wrapped(x))
    assert is_allocated(torch.empty(0))
    assert is_allocated(torch.empty(3, device="meta"))


def test_copies_are_of_the_same_kind() -> None:
    for name, kind in KINDS.items():
        tensor = kind.make() if kind.make is not None else kind.to(square())  # type: ignore[misc]
        copy = copy_of(tensor)
        assert copy is not tensor, name
        assert type(copy) is type(tensor), name
        assert copy.layout is tensor.layout, name
        assert (copy.is_conj(), copy.is_neg(), copy.is_quantized) == (tensor.is_conj(), tensor.is_neg(), tensor.is_quantized)
        assert same_values(copy, tensor), name
        assert copy.__dict__.keys() == tensor.__dict__.keys(), name
