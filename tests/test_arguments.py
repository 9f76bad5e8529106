"""Arguments of every shape: a replay is given them as what they were."""

from __future__ import annotations

import gc
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree

import revhooks
from revhooks.runtime.tree import flatten, leaves_of, map_tensors
from tests.devices import DEVICE


class Checked(namedtuple("Checked", "x scale")):
    """Checks what it is made of."""

    def __new__(cls, x: Tensor, scale: Tensor) -> Checked:
        if not isinstance(x, Tensor) or x.device.type != DEVICE.type:
            raise TypeError("no tensor")
        return super().__new__(cls, x, scale)


class Pair(NamedTuple):
    x: Tensor
    scale: Tensor


class Three(tuple):
    """A tuple whose constructor takes other things."""

    def __new__(cls, x: Tensor, scale: Tensor) -> Three:
        self = super().__new__(cls, (x, scale, None))
        self.name = "three"
        return self

    @property
    def x(self) -> Tensor:
        assert self.name == "three"
        return self[0]

    @property
    def scale(self) -> Tensor:
        return self[1]


class Listed(list):
    """A list with an attribute, which is a tensor."""

    def __init__(self, x: Tensor, scale: Tensor) -> None:
        super().__init__([x])
        self.scale = scale

    @property
    def x(self) -> Tensor:
        return self[0]


class Named(dict):
    """A dictionary whose entries are attributes, and whose constructor checks them."""

    def __init__(self, x: Tensor, scale: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError("no tensor")
        super().__init__(x=x, scale=scale)

    def __setitem__(self, key: str, value: Any) -> None:
        raise TypeError("read only")

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Ordered(OrderedDict):
    def __init__(self, x: Tensor, scale: Tensor) -> None:
        super().__init__()
        self["x"], self["scale"] = x, scale
        self.x = x

    @property
    def scale(self) -> Tensor:
        return self["scale"]


class Defaults(defaultdict):
    @property
    def x(self) -> Tensor:
        assert self["nothing"] == []
        return self["x"]

    @property
    def scale(self) -> Tensor:
        return self["scale"]


def defaults(x: Tensor, scale: Tensor) -> Defaults:
    made = Defaults(list)
    made.update(x=x, scale=scale)
    return made


@dataclass
class Batch:
    x: Tensor
    scale: Tensor
    names: list[str] = field(default_factory=lambda: ["a"])


@dataclass(frozen=True)
class Frozen:
    x: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.x, Tensor):
            raise TypeError("no tensor")


@dataclass(frozen=True, slots=True)
class Slotted:
    x: Tensor
    scale: Tensor


class Registered(dict):
    """A dictionary that PyTorch knows how to take apart."""

    def __init__(self, x: Tensor, scale: Tensor) -> None:
        super().__init__(x=x, scale=scale)
        self.made = True

    x = property(lambda self: self["x"])
    scale = property(lambda self: self["scale"])


_pytree.register_pytree_node(
    Registered, lambda tree: (list(tree.values()), None), lambda parts, _: Registered(*parts), serialized_type_name="Registered"
)


class Plain:
    def __init__(self, x: Tensor, scale: Tensor) -> None:
        self.x, self.scale = x, scale


def in_a_list(x: Tensor, scale: Tensor) -> Any:
    return Pair(x, Plain(scale, scale))  # type: ignore[arg-type]


CONTAINERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    cls.__name__: cls for cls in (Checked, Pair, Three, Listed, Named, Ordered, Batch, Frozen, Slotted, Registered, Plain)
} | {"Defaults": defaults}


class Block(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.linear, self.kind = nn.Linear(6, 6), kind

    def forward(self, given: Any) -> Tensor:
        assert type(given) is self.kind
        return given.x + torch.tanh(self.linear(given.x)) * given.scale.exp()


def gradients(make: Callable[[Tensor, Tensor], Any], call: Callable[..., Any], **options: Any) -> list[Tensor]:
    torch.manual_seed(0)
    x, scale = torch.randn(4, 6, requires_grad=True), torch.randn(6, requires_grad=True)
    kind = type(make(x, scale))
    blocks = [Block(kind), Block(kind)]
    h = x * 1
    with revhooks.reversible(**options):
        for block in blocks:
            h = call(block, make(h, scale))
        h.square().sum().backward()
    return [x.grad, scale.grad, *(p.grad for block in blocks for p in block.parameters())]  # type: ignore[list-item]


def plainly(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("ops", [False, True])
def test_containers(name: str, ops: bool) -> None:
    make = CONTAINERS[name]
    expected = gradients(make, plainly, budget=float("inf"))
    for got in (
        gradients(make, plainly, replay=Block, ops=ops),
        gradients(make, revhooks.checkpoint, ops=ops),
        gradients(make, lambda f, *a: revhooks.checkpoint(lambda *a: revhooks.checkpoint(f, *a), *a), ops=ops),
    ):
        assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_that_is_changed_after_the_call(name: str) -> None:
    """Its tensors are replaced: the replay is given those of the call."""
    make = CONTAINERS[name]
    if name in ("Pair", "Checked", "Three", "Frozen", "Slotted", "Named", "Ordered", "Listed"):
        pytest.skip("it does not change")
    linear = nn.Linear(6, 6)

    def call(given: Any) -> Tensor:
        return torch.tanh(linear(given.x)) * given.scale.exp()

    def step(call: Callable[..., Any]) -> list[Tensor]:
        torch.manual_seed(0)
        x, scale = torch.randn(4, 6, requires_grad=True), torch.randn(6, requires_grad=True)
        linear.zero_grad()
        given = make(x * 1, scale)
        for _ in range(3):
            y = call(given)
            if isinstance(given, dict):
                given["x"] = y
            else:
                given.x = y
        y.sum().backward()
        return [x.grad, scale.grad, linear.weight.grad]  # type: ignore[list-item]

    assert all(map(torch.equal, step(lambda given: revhooks.checkpoint(call, given)), step(call)))


def test_packed_sequences() -> None:
    for layer in (nn.LSTM(8, 16, num_layers=2), nn.GRU(8, 16, bidirectional=True)):
        x = [torch.rand(5, 8, requires_grad=True), torch.rand(2, 8, requires_grad=True)]

        def step(run: Any, call: Callable[..., Any], layer: Any = layer, x: Any = x) -> list[Tensor]:
            layer.zero_grad()
            for one in x:
                one.grad = None
            with run:
                with torch.device("cpu"):  # where it has the lengths
                    packed = nn.utils.rnn.pack_sequence(x, enforce_sorted=False)
                out, _ = call(layer, packed)
                with torch.device("cpu"):
                    padded, _ = nn.utils.rnn.pad_packed_sequence(out)
                padded.square().sum().backward()
            return [p.grad for p in (*layer.parameters(), *x)]

        expected = step(revhooks.reversible(budget=float("inf")), plainly)
        for run, call in (
            (revhooks.reversible(), plainly),
            (revhooks.reversible(replay=type(layer)), plainly),
            (revhooks.reversible(replay=type(layer), ops=False), plainly),
            (revhooks.reversible(), revhooks.checkpoint),
        ):
            assert all(map(torch.equal, step(run, call), expected))


def test_transformers_outputs() -> None:
    generic = pytest.importorskip("transformers.modeling_outputs")
    linear = nn.Linear(4, 4)

    def call(given: Any) -> Any:
        assert type(given) is generic.BaseModelOutput
        assert given["last_hidden_state"] is given.last_hidden_state
        return generic.BaseModelOutput(last_hidden_state=torch.tanh(linear(given.last_hidden_state)), hidden_states=(given[0],))

    def step(wrap: Callable[..., Any]) -> Tensor:
        linear.zero_grad()
        x = torch.ones(2, 4, requires_grad=True)
        out = generic.BaseModelOutput(last_hidden_state=x.exp())
        for _ in range(2):
            out = wrap(call, out)
        (out.last_hidden_state.sum() + out.hidden_states[0].sum()).backward()
        return x.grad  # type: ignore[return-value]

    assert torch.equal(step(revhooks.checkpoint), step(plainly))


# ------------------------------------------------------------------------------------- iterators


def counted(tensors: list[Tensor]) -> Iterator[Tensor]:
    yield from tensors


@pytest.mark.parametrize("make", [iter, counted, lambda t: map(torch.sin, t), lambda t: zip(t, t, strict=True)])
def test_an_iterator_is_not_given_to_a_replay(make: Callable[[list[Tensor]], Any]) -> None:
    class Eats(nn.Module):
        def forward(self, x: Tensor, rest: Iterator[Any]) -> Tensor:
            for one in rest:
                x = torch.tanh(x * (one if isinstance(one, Tensor) else one[0]))
            return x.exp()

    def step(call: Callable[..., Any], **options: Any) -> tuple[Tensor, list[Any]]:
        x = torch.linspace(0, 1, 8, requires_grad=True)
        with revhooks.reversible(**options) as run:
            y = call(Eats(), x * 1, make([torch.ones(8), torch.full((8,), 2.0)]))
            kept = [kept.why for kept in run.stats.kept]
            y.sum().backward()
        return x.grad, kept  # type: ignore[return-value]

    expected, _ = step(plainly, budget=float("inf"))
    assert torch.equal(step(plainly, replay=Eats)[0], expected)
    got, kept = step(revhooks.checkpoint)
    assert torch.equal(got, expected)
    assert any("iterator" in why for why in kept)


def test_an_iterator_is_not_given_to_an_inverse() -> None:
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(4, 4)

        def forward(self, x: Tensor, by: Iterator[float]) -> Tensor:
            a, b = x.chunk(2, 1)
            return torch.cat([a, b + self.f(a) * next(by)], 1)

        def inverse(self, y: Tensor, by: Iterator[float]) -> Tensor:
            a, b = y.chunk(2, 1)
            return torch.cat([a, b - self.f(a) * next(by)], 1)

    revhooks.register(Shift, inverse="inverse")
    try:
        blocks = [Shift(), Shift()]

        def step(**options: Any) -> Tensor:
            x = torch.linspace(0, 1, 24).view(3, 8).requires_grad_()
            with revhooks.reversible(**options):
                h, by = x * 1, iter([2.0, 3.0, 4.0])
                for block in blocks:
                    h = block(h, by)
                h.square().sum().backward()
            assert list(by) == [4.0]
            return x.grad  # type: ignore[return-value]

        assert torch.equal(step(), step(budget=float("inf")))
    finally:
        revhooks.unregister(Shift)


# -------------------------------------------------------------------------------------- identity


class Remembers(torch.autograd.Function):
    """Backward sees whether it gets the object that forward saved."""

    seen: list[tuple[bool, type, Any]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor, *constants: Tensor) -> Tensor:
        ctx.save_for_backward(*constants)
        ctx.constants = constants  # as no function should: they need no gradient, and make no cycle
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        for got, was in zip(ctx.saved_tensors, ctx.constants, strict=True):
            Remembers.seen.append((got is was, type(got), getattr(got, "scale", None)))
        return grad, *(None for _ in ctx.constants)


class Weight(torch.Tensor):
    """A subclass."""


def constants() -> list[Tensor]:
    base = torch.randn(100, 100)
    some = [
        torch.ones(4),
        base,
        base[3:],
        base.t(),
        torch.randn(64, 64) > 0,  # a mask
        torch.arange(70_000).view(700, 100),  # small numbers
        torch.rand(5).as_subclass(Weight),
        nn.Parameter(torch.ones(3), requires_grad=False),
        torch.eye(3).to_sparse(),
        torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
        torch.ones(3, dtype=torch.complex64).conj(),
        (torch.ones(2000, requires_grad=True) * 2).detach(),
    ]
    for index, constant in enumerate(some):
        constant.scale = index  # type: ignore[attr-defined]
    return some


class Saves(nn.Module):
    def __init__(self, held: list[Tensor] | None = None) -> None:
        super().__init__()
        self.held = held

    def forward(self, x: Tensor, *given: Tensor) -> Tensor:
        return torch.tanh(Remembers.apply(torch.sin(x), *(given or self.held)))


@pytest.mark.filterwarnings("ignore:.*quantiz.*")
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({}, plainly),
        ({"ops": False}, plainly),
        ({"replay": Saves}, plainly),
        ({"replay": Saves, "ops": False}, plainly),
        ({"replay": Saves, "budget": 20_000}, plainly),
        ({"budget": 1000}, plainly),
        ({}, revhooks.checkpoint),
        ({}, lambda f, *a: revhooks.checkpoint(lambda *a: revhooks.checkpoint(f, *a), *a)),
    ],
)
def test_a_saved_tensor_without_a_gradient_is_the_object_that_it_was(
    options: dict[str, Any], call: Callable[..., Any], inside: bool
) -> None:
    Remembers.seen = []
    held = constants()
    net = [Saves(held if inside else None) for _ in range(3)]
    with revhooks.reversible(**options):
        x = torch.ones(3000, requires_grad=True)
        h = x * 1
        for block in net:
            h = call(block, h) if inside else call(block, h, *held)
        h.sum().backward()
    assert len(Remembers.seen) == 3 * len(held)
    for index, (same, kind, scale) in enumerate(Remembers.seen):
        assert same
        assert kind is type(held[index % len(held)])
        assert scale == index % len(held)


def test_an_object_that_is_saved_is_watched_for_changes() -> None:
    for options in ({}, {"replay": Saves}):
        for view in (False, True):
            constant = torch.ones(2000)
            with revhooks.reversible(**options):
                h = torch.ones(2000, requires_grad=True) * 1
                for _ in range(2):
                    h = Saves()(h, constant, constant[1:] if view else constant)
                (constant[5:] if view else constant).mul_(2)
                with pytest.raises((revhooks.errors.ModifiedError, RuntimeError), match="modified"):
                    h.sum().backward()


def test_attributes_of_an_argument_with_a_gradient_are_there_in_a_replay() -> None:
    def call(x: Tensor) -> Tensor:
        return torch.tanh(x * x.scale).exp()  # type: ignore[attr-defined]

    def step(wrap: Callable[..., Any]) -> Tensor:
        x = torch.linspace(0, 1, 5, requires_grad=True)
        h = x * 1
        h.scale = 3.0  # type: ignore[attr-defined]
        wrap(call, h).sum().backward()
        return x.grad  # type: ignore[return-value]

    assert torch.equal(step(revhooks.checkpoint), step(plainly))


# ------------------------------------------------------------------------------------------ tree


def test_a_tree_is_made_again() -> None:
    x = torch.ones(2)
    for make in CONTAINERS.values():
        if make is Plain:
            continue
        tree = make(x, x * 2)
        again = map_tensors(lambda t: t + 1, tree)
        assert type(again) is type(tree)
        assert again is not tree
        assert torch.equal(again.x, x + 1)
        assert torch.equal(again.scale, x * 2 + 1)
        assert torch.equal(tree.x, x)
    looped: list[Any] = [x]
    looped.append(looped)
    assert leaves_of(looped)[0] is x
    assert len(leaves_of(looped)) == 2
    assert leaves_of((torch.Size([1, 2]), UserDict(a=1))) == [torch.Size([1, 2]), {"a": 1}]
    values = torch.max(torch.rand(2, 3), 1)
    assert type(map_tensors(lambda t: t, values)) is type(values)


def test_a_tree_leaves_no_cycle() -> None:
    tree = [make(torch.ones(1), torch.ones(1)) for make in CONTAINERS.values()]
    gc.collect()
    gc.disable()
    try:
        leaves, again = flatten(tree)
        again(leaves)
        del leaves, again
        assert gc.collect() == 0
    finally:
        gc.enable()


class _Seeds(torch.autograd.Function):
    """Saves a tensor whose device is another one from call to call, as attention's seeds under a CUDA graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, device: str) -> Tensor:
        ctx.save_for_backward(x, torch.zeros(2, device=device))
        ctx.device = device
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, seeds = ctx.saved_tensors
        assert seeds.device.type == ctx.device
        return grad * x.cos(), None


@pytest.mark.parametrize("ops", [True, False])
def test_a_saved_tensor_on_another_device_than_the_time_before(ops: bool) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, device: str) -> Tensor:
            made: Tensor = _Seeds.apply(self.layer(x), device)
            return made.tanh()

    blocks = nn.ModuleList([Block() for _ in range(3)])

    def step(device: str) -> Sequence[Tensor]:
        h = torch.ones(2, 4)
        for block in blocks:
            h = block(h, device)
        return torch.autograd.grad(h.sum(), list(blocks.parameters()))

    want = step("meta")
    for _ in range(4):
        for device in (DEVICE.type, "meta"):
            with revhooks.reversible(replay=Block, ops=ops) as run:
                assert all(map(torch.equal, step(device), want))
            assert run.stats.replays
