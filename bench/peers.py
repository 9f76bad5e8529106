"""Chains of couplings by other packages, of the same branches F, G, F, G, ..."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn


def pairs(fns: Sequence[nn.Module]) -> list[tuple[nn.Module, nn.Module]]:
    return list(zip(fns[::2], fns[1::2], strict=True))


class _Copied(nn.Sequential):
    """Of a copy of what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = super().forward(x.clone())
        return found


def memcnn_chain(fns: Sequence[nn.Module]) -> nn.Module:
    """It frees the storage of what it is given: of a copy."""
    import memcnn

    blocks = [memcnn.AdditiveCoupling(f, g) for f, g in pairs(fns)]
    return _Copied(*[memcnn.InvertibleModuleWrapper(block, keep_input=False) for block in blocks])


def revtorch_chain(fns: Sequence[nn.Module]) -> nn.Module:
    from revtorch import ReversibleBlock, ReversibleSequence

    return ReversibleSequence(nn.ModuleList([ReversibleBlock(f, g, split_along_dim=1) for f, g in pairs(fns)]))


def revlib_chain(fns: Sequence[nn.Module]) -> nn.Module:
    import revlib

    return revlib.ReversibleSequential(*fns, split_dim=1, memory_mode=revlib.MemoryModes.autograd_function)


# they rebuild through inputs that require grad
PEERS: dict[str, Callable[[Sequence[nn.Module]], nn.Module]] = {
    "memcnn": memcnn_chain,
    "RevTorch": revtorch_chain,
    "revlib": revlib_chain,
}
