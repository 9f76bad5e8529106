"""What the bench of ordinary models promises, as far as it does not depend on the clock."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.ordinary_measure import Contender, accounted, difference, memory, peer, rebuilds
from bench.ordinary_models import GPTBlock, Skipped, gpt, gpt2, llama, resnet50, resnet110
from revhooks import reversible
from revhooks.profiler.workload import Workload
from revhooks.storage import is_leaf

pytestmark = pytest.mark.cpu(reason="memory that kernels of the CPU take")

SMALL: dict[str, Any] = {"batch": 2, "tokens": 64}


def saved_bytes(work: Workload) -> int:
    """What plain autograd saves, counted without revhooks' own hooks: unique storages, leaves aside."""
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        if not is_leaf(tensor):
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()  # alive, so that no key comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        Contender(work).loss()
    return sum(storage.nbytes() for storage in storages.values())


CASES: dict[str, tuple[Callable[[], Workload], float]] = {
    "GPT": (partial(gpt, 2, **SMALL), 0.35),
    "Llama": (partial(llama, 2, **SMALL), 0.4),
    "ResNet-110": (partial(resnet110, 2), 0.45),
    "ResNet-50": (partial(resnet50, 2), 0.44),  # 0.45 from batch 4: running statistics count on both sides
}


@pytest.mark.parametrize("name", CASES)
def test_ordinary_models_hold_less(name: str) -> None:
    make, spared = CASES[name]
    work = make()
    found = memory(work)
    assert found.difference == 0
    assert found.spared >= spared
    assert found.packed == pytest.approx(saved_bytes(work), rel=0.01)


def test_resnet_110_is_that_of_the_tables() -> None:
    assert sum(p.numel() for p in resnet110(1).model.parameters()) == 1_730_714


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_replay_peaks_no_higher_than_checkpointing(dropout: float) -> None:
    work = gpt(4, **SMALL, dropout=dropout)
    plain, replay = Contender(work), Contender(work, partial(reversible, replay=GPTBlock))
    checkpoint = peer(work, lambda model: model.blocks, "checkpoint")
    without_ops = Contender(work, partial(reversible, replay=GPTBlock, ops=False))
    peaks = [accounted(contender)[1] for contender in (plain, checkpoint, without_ops, replay)]
    assert peaks[2] <= 1.01 * peaks[1] < 0.7 * peaks[0]
    assert peaks[3] < 0.97 * peaks[1]  # inside a replayed block too, what cheap operations make is made again
    assert rebuilds(plain) is rebuilds(checkpoint) is None
    assert rebuilds(replay) in (3, 4)  # the newest may still be there
    assert difference(plain.gradients(), replay.gradients()) == difference(plain.gradients(), checkpoint.gradients()) == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_hugging_face() -> None:
    try:
        work = gpt2(2, **SMALL)
    except Skipped as reason:
        pytest.skip(str(reason))
    found = memory(work)
    assert found.difference == 0
    assert found.spared >= 0.4


def test_a_difference_is_seen() -> None:
    a = torch.ones(4)
    assert difference([a, None], [a.clone(), None]) == 0
    assert difference([a], [a + 1e-6]) > 0
    assert difference([a], [None]) == float("inf")
