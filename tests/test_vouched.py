"""Classes of other libraries that an adapter's table vouches for: running them again leaves nothing behind."""

from __future__ import annotations

import dis
from collections.abc import Callable, Iterator
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revhooks
from revhooks.adapters import LIBRARIES, adapter_of
from revhooks.adapters.table import _classes
from revhooks.buffers import modules_of
from revhooks.names import unbracketed
from revhooks.quiet import leaves_nothing

pytestmark = [
    pytest.mark.cpu(reason="whether code has to be looked over"),
    pytest.mark.filterwarnings("ignore:torch.lu is deprecated"),
]

normflows = pytest.importorskip("normflows")
nflows_nets = pytest.importorskip("nflows.nn.nets")
nflows_coupling = pytest.importorskip("nflows.transforms.coupling")
freia = pytest.importorskip("FrEIA.modules")

for name in ("normflows", "nflows", "FrEIA"):
    adapter_of(name).install()

SET_UP = {"__init__", "reset_parameters"}
# attributes that calls store: parameters' data and buffers, which are looked after elsewhere; and the rotation of a block with
# reflections, which is a tensor in an attribute and makes it loud
STORED = {
    ("ActNorm", "data"), ("ActNorm", "data_dep_init_done"), ("AllInOneBlock", "w_perm"), ("AllInOneBlock", "w_perm_inv"),
}  # fmt: skip
CHANGES = {
    "append",
    "extend",
    "insert",
    "pop",
    "remove",
    "clear",
    "update",
    "setdefault",
    "popitem",
    "add_module",
    "register_buffer",
}


def is_quiet(module: nn.Module) -> bool:
    return leaves_nothing(modules_of((module,)), (), SimpleNamespace(proof=None))


def vouched() -> list[type]:
    return [cls for library in LIBRARIES for named in adapter_of(library).quiet for cls in _classes(named)]


def steps(code: Any) -> Iterator[dis.Instruction]:
    yield from dis.get_instructions(code)
    for constant in code.co_consts:
        if hasattr(constant, "co_code"):
            yield from steps(constant)


@pytest.mark.parametrize("cls", vouched(), ids=lambda cls: f"{cls.__module__}.{cls.__name__}")
def test_their_methods_store_nothing(cls: type) -> None:
    """This fails when a new version of a library does."""
    for name, method in vars(cls).items():
        if isinstance(method, FunctionType) and name not in SET_UP:
            code = unbracketed(method).__code__
            found = [*steps(code)]
            stored = {(cls.__name__, step.argval) for step in found if step.opname in ("STORE_ATTR", "STORE_GLOBAL")}
            assert stored <= STORED
            assert not any(step.opname == "STORE_DEREF" and step.argval in code.co_freevars for step in found)
            assert CHANGES.isdisjoint(code.co_names)


class Net(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, outputs))


def one_of_nflows(**options: Any) -> nn.Module:
    def network(inputs: int, outputs: int) -> nn.Module:
        return nflows_nets.ResidualNet(inputs, outputs, hidden_features=8, **options)  # type: ignore[no-any-return]

    return nflows_coupling.AffineCouplingTransform(torch.arange(4) % 2, network)  # type: ignore[no-any-return]


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "Glow": lambda: normflows.flows.GlowBlock(12, 8),
    "a coupling": lambda: normflows.flows.AffineCouplingBlock(normflows.nets.MLP([2, 8, 4])),
    "a coupling of nflows": one_of_nflows,
    "AllInOneBlock": lambda: freia.AllInOneBlock([(4,)], subnet_constructor=Net),
    "NICE": lambda: freia.NICECouplingBlock([(4,)], subnet_constructor=Net),
    "GLOW": lambda: freia.GLOWCouplingBlock([(4,)], subnet_constructor=Net),
    "RNVP with a condition": lambda: freia.RNVPCouplingBlock([(4,)], [(2,)], subnet_constructor=Net, clamp_activation="TANH"),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_they_are_quiet(name: str) -> None:
    assert is_quiet(BLOCKS[name]())


def noting(value: Tensor) -> Tensor:
    NOTED.append(float(value.detach().sum()))
    return value.tanh()


NOTED: list[float] = []


class Noting(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        NOTED.append(1.0)
        return super().forward(x)


class Extended(normflows.flows.GlowBlock):  # type: ignore[misc, name-defined]
    def inverse(self, z: Tensor) -> Any:
        NOTED.append(2.0)
        return super().inverse(z)


class Helper(normflows.flows.ActNorm):  # type: ignore[misc, name-defined]
    """Has a method anew that the class above calls."""

    def inverse(self, z: Tensor) -> Any:
        return super().inverse(noting(z) + z - z)


def with_attribute(module: nn.Module, name: str, value: Any) -> nn.Module:
    setattr(module, name, value)
    return module


LOUD: dict[str, Callable[[], nn.Module]] = {
    "a function of the user's": lambda: one_of_nflows(activation=noting),
    "another": lambda: freia.GLOWCouplingBlock([(4,)], subnet_constructor=Net, clamp_activation=noting),
    "a network of the user's": lambda: normflows.flows.AffineCouplingBlock(nn.Sequential(Noting(2, 4))),
    "a subclass": lambda: Extended(12, 8),
    "a subclass of a part": lambda: Helper((4,)),
    "a method on an object": lambda: with_attribute(BLOCKS["Glow"](), "inverse", noting),
    "reflections": lambda: freia.AllInOneBlock([(4,)], subnet_constructor=Net, learned_householder_permutation=2),
}


@pytest.mark.parametrize("name", LOUD)
def test_what_users_put_into_them_is_read(name: str) -> None:
    module = LOUD[name]()
    if name == "reflections":  # they are made by a call
        module([torch.ones(3, 4)])
    assert not is_quiet(module)


def test_a_method_that_is_replaced_in_the_class_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    block = BLOCKS["Glow"]()
    facts = SimpleNamespace(proof=None)
    assert leaves_nothing(modules_of((block,)), (), facts)
    original = normflows.flows.Split.inverse
    monkeypatch.setattr(normflows.flows.Split, "inverse", lambda self, z: (NOTED.append(3.0), original(self, z))[1])
    assert not leaves_nothing(modules_of((block,)), (), facts)
    assert not is_quiet(BLOCKS["Glow"]())


def test_what_they_leave_is_what_plain_autograd_leaves() -> None:
    """A function of the user's notes what it sees, once for each call that the user makes."""
    torch.manual_seed(0)
    net = nn.ModuleList([one_of_nflows(activation=noting) for _ in range(3)])

    def step() -> list[float]:
        NOTED.clear()
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        for block in net:
            x, _ = block(x)
        x.square().sum().backward()
        return [*NOTED]

    want = step()
    for _ in range(3):
        with revhooks.reversible():
            assert step() == want
