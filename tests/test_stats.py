"""``run.stats``: its fields, and that they are true."""

from __future__ import annotations

import torch
from torch import nn

import revhooks
from revhooks import nn as rnn
from tests.conftest import conv_branch


def net(depth: int) -> nn.Module:
    return nn.Sequential(*[rnn.AdditiveCoupling(conv_branch(4), conv_branch(4)) for _ in range(depth)])


def saved_by_plain_autograd(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes of unique storages, counted with hooks of the test's own; parameters and buffers do not count."""
    storages = {}
    external = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in external:
            storages[storage._cdata] = storage
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(x).square().mean()
    del loss
    return sum(storage.nbytes() for storage in storages.values())


def test_packed_bytes_are_what_plain_autograd_holds() -> None:
    model, x = net(5), torch.randn(2, 8, 6, 6)
    expected = saved_by_plain_autograd(model, x)
    with revhooks.reversible() as run:
        loss = model(x).square().mean()
    assert run.stats.packed_bytes == expected
    loss.backward()
    assert run.stats.packed_bytes == expected


def test_packed_bytes_do_not_add_up_over_a_training_loop() -> None:
    model, x = net(5), torch.randn(2, 8, 6, 6)
    with revhooks.reversible() as run:
        sizes = []
        for _ in range(4):
            model(x).square().mean().backward()
            sizes.append(run.stats.packed_bytes)
    assert len(set(sizes)) == 1
    assert run.stats.frames == 20
    assert run.stats.inversions == 16  # the newest of each step is kept


def test_held_bytes_and_kept_agree() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *net(4)), torch.randn(2, 3, 8, 8)
    with revhooks.reversible() as run:
        loss = model(x).square().mean()
        stats = run.stats
        assert stats.held_bytes == sum(kept.bytes for kept in stats.kept) > 0
        assert [k.bytes for k in stats.kept] == sorted((k.bytes for k in stats.kept), reverse=True)
        reasons = " ".join(k.why for k in stats.kept)
        assert "newest block" in reasons
        assert "outside any registered block" in reasons
        loss.backward()
    assert run.stats.held_bytes == 0
    assert run.stats.kept == ()
    assert run.stats.peak_held_bytes < run.stats.packed_bytes


def test_worst_error_is_zero_without_reconstruction() -> None:
    with revhooks.reversible() as run:
        nn.Linear(2, 2)(torch.randn(1, 2)).sum().backward()
    assert run.stats.worst_error == 0
    assert run.stats.frames == run.stats.inversions == run.stats.replays == 0


def test_worst_error_names_its_block() -> None:
    with revhooks.reversible() as run:
        net(6)(torch.randn(2, 8, 6, 6)).square().mean().backward()
    assert 0 < run.stats.worst_error < 1e-4
    assert "AdditiveCoupling" in run.stats.worst_error.block
