"""The networks of bench/cifar_networks.py: those that MemCNN published, and trained as plain autograd trains them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import revhooks
from revhooks.nn import AdditiveCoupling, ReversibleSequential
from revhooks.profiler.meters import AccountedMeter
from tests.conftest import assert_same, step

pytestmark = pytest.mark.cpu(reason="memory that kernels of the CPU take")


def _load() -> ModuleType:
    path = Path(__file__).parent.parent / "bench" / "cifar_networks.py"
    spec = importlib.util.spec_from_file_location("cifar_networks", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cifar = _load()
PARAMETERS = {
    "resnet32": 466_906,
    "resnet110": 1_730_714,
    "resnet164": 1_704_154,
    "revnet38": 573_994,
    "revnet110": 1_854_890,
    "revnet164": 1_983_786,
}


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 32, 32, dtype=torch.float64)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_published(name: str) -> None:
    assert sum(p.numel() for p in cifar.network(name).parameters()) == PARAMETERS[name] == cifar.NETWORKS[name].parameters


@pytest.mark.parametrize("name", [name for name in PARAMETERS if name.startswith("rev")])
def test_every_block_that_keeps_its_shape_is_a_coupling(name: str) -> None:
    model, spec = cifar.network(name), cifar.NETWORKS[name]
    chained = sum(len(m) for m in model.modules() if isinstance(m, ReversibleSequential)) // 2
    couplings = sum(isinstance(m, AdditiveCoupling) for m in model.modules())
    plain = [m for m in model.modules() if isinstance(m, cifar.ResidualBlock)]
    assert chained + couplings + len(plain) == 3 * spec.blocks
    assert all(block.shortcut is not None for block in plain)


def test_segments_change_nothing_but_memory() -> None:
    torch.manual_seed(0)
    plain = cifar.network("revnet164")
    torch.manual_seed(0)
    replayed = cifar.network("revnet164", segment=cifar.Replayed)
    assert list(plain.state_dict()) == list(replayed.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), replayed.parameters(), strict=True))
    x = images().float()
    with torch.no_grad():
        assert torch.equal(plain(x), replayed(x))


def revnet38(segment: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return cifar.network("revnet38", segment=segment).double()


@pytest.mark.parametrize(("segment", "inversions"), [(nn.Sequential, 4), (cifar.Replayed, 3)])
def test_a_reversible_step_is_a_plain_one(segment: type[nn.Module], inversions: int) -> None:
    x = images()
    plain = step(revnet38(nn.Sequential), x, reverse=False)
    reversible = step(revnet38(segment), x, reverse=True)
    assert_same(plain, reversible, 1e-10)
    assert reversible.stats is not None
    assert reversible.stats.held_bytes == 0
    assert reversible.stats.inversions == inversions


def test_replayed_segments_hold_less() -> None:
    """Held after forward; the chains alone, and with everything else replayed."""
    x = images()
    held = [step(revnet38(segment), x, reverse=True).held_after_forward for segment in (nn.Sequential, cifar.Replayed)]
    stream = x.shape[0] * 32 * 32 * 32 * x.element_size()
    assert held[1] < 4 * stream < held[0]


def test_peak_of_a_step() -> None:
    """Less than half of what memcnn's module takes (bench/cifar_table.py): streams are inverted in their own memory."""
    x, model = images(8).float(), revnet38(cifar.Replayed).float()

    def one() -> None:
        with revhooks.reversible():
            model(x).square().mean().backward()

    one()
    one()  # gradients of parameters are there from now on, and added to in place
    with AccountedMeter() as meter:
        one()
    assert meter.peak < 5.75 * x.shape[0] * 32 * 32 * 32 * x.element_size()
