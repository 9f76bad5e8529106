"""FrEIA: a block is its own inverse, ``block(x, c, rev, jac)`` with ``rev`` flipped; both directions may be trained.

`SequenceINN` and `GraphINN` are what their blocks are: each of these is inverted, so that the chain is held at one place. Views,
permutations and fixed maps are inverted too, which costs next to nothing, for a block that is not would begin a chain anew.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..registry import register
from .table import LEAVE, REPLAY, Adapter, Block
from .twins import Branch, twin_of, unbracketed

__all__ = ["ADAPTER"]


def _given(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What comes behind the input, by name: some blocks take ``rev`` before ``jac``, some ``jac`` before ``rev``."""
    if not args:
        return kwargs
    forward = type(module).forward
    names = _names.get(forward)
    if names is None:
        names = _names[forward] = [*inspect.signature(forward).parameters][2:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


_names: weakref.WeakKeyDictionary[Any, list[str]] = weakref.WeakKeyDictionary()  # of what comes behind the input


def _flip(module: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
    """The inputs, by the other direction of the block."""
    given = _given(module, args, kwargs)
    return module(output[0], **{**given, "rev": not given.get("rev", False), "jac": False})[0]


def _solve(module: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
    """The input of a fixed linear map, whose own inverse is as exact as the dtype in which it was made."""
    given = _given(module, args, kwargs)
    (y,), rev = output[0], given.get("rev", False)
    if hasattr(module, "fixed"):
        matrix, offset = module.W.t() if rev else module.W, 0.0
    else:
        matrix, offset = module.M_inv if rev else module.M, getattr(module, "b", 0.0)
    if matrix.dim() == 4:
        return (torch.linalg.solve(matrix.flatten(1), y.flatten(2)).view_as(y),)
    x = torch.linalg.solve(matrix, y if rev else y - offset, left=False)
    return (x + offset if rev else x,)


def _householder(module: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
    return (_solve if module.fixed else _flip)(module, output, *args, **kwargs)


def _subnets(module: nn.Module) -> Iterable[nn.Module]:
    return module.children()


# -- sequences and graphs


def _sequence(net: Any, *args: Any, **kwargs: Any) -> Any:
    """`SequenceINN.forward` as it is; a block that is made of sequences is known by them as one that is made of blocks."""
    return unbracketed(sys.modules["FrEIA.framework.sequence_inn"].SequenceINN.forward)(net, *args, **kwargs)


def _graph(net: Any, x_or_z: Any, c: Any = None, rev: bool = False, jac: bool = True, *args: Any, **kwargs: Any) -> Any:
    """`GraphINN.forward`, which holds the output of every node until it returns; here until it is used."""
    if args or kwargs or x_or_z is None:  # all outputs are wanted, or an old name is used
        return _own_graph()(net, x_or_z, c, rev, jac, *args, **kwargs)
    inputs = (x_or_z,) if torch.is_tensor(x_or_z) else x_or_z
    conditions = () if c is None else (c,) if torch.is_tensor(c) else c
    starts, ends = (net.out_nodes, net.in_nodes) if rev else (net.in_nodes, net.out_nodes)
    if len(inputs) != len(starts) or len(conditions) != len(net.condition_nodes):
        return _own_graph()(net, x_or_z, c, rev, jac)
    outs = {(node, 0): tensor for node, tensor in zip(starts, inputs, strict=True)}
    given = dict(zip(net.condition_nodes, conditions, strict=True))
    special = {*net.in_nodes, *net.out_nodes, *net.condition_nodes}
    nodes = [node for node in net.node_list[:: -1 if rev else 1] if node not in special]
    last = [(node.outputs if rev else node.inputs)[0] for node in ends]
    uses = Counter([*(use for node in nodes for use in (node.outputs if rev else node.inputs)), *last])
    jacobian = torch.zeros(inputs[0].shape[0]).to(inputs[0])
    del x_or_z, inputs
    for node in nodes:
        taken = [_take(outs, uses, use) for use in (node.outputs if rev else node.inputs)]
        found, log_det = _call_node(net, node, taken, [given[one] for one in node.conditions], rev, jac)
        outs.update({(node, i): value for i, value in enumerate(found)})
        del found
        jacobian = jacobian + log_det if jac else jacobian
    results = tuple(outs[use] for use in last)
    return (results[0] if len(results) == 1 and not net.force_tuple_output else results), jacobian


def _own_graph() -> Any:
    return unbracketed(sys.modules["FrEIA.framework.graph_inn"].GraphINN.forward)


def _take(outs: dict[Any, Tensor], uses: Counter[Any], use: Any) -> Tensor:
    """The output of a node, which is let go of at its last use."""
    uses[use] -= 1
    return outs[use] if uses[use] else outs.pop(use)


def _call_node(net: Any, node: Any, given: list[Tensor], conditions: list[Tensor], rev: bool, jac: bool) -> Any:
    keywords: dict[str, Any] = {"c": tuple(conditions)} if conditions else {}
    given_once = tuple(given)
    given.clear()
    try:
        found = node.module(given_once, **keywords, rev=rev, jac=jac)
    except Exception as error:
        raise RuntimeError(f"{node} encountered an error.") from error
    return net._check_output(node, found, jac, rev)


# -- i-ResNets


class _Residual(nn.Module):
    """The residual of an `IResNetLayer`, run again from its input."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.branch = Branch(net)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.branch(x)
        return found


register(_Residual, inverse=None)


def _iresnet(layer: Any, x: Any, c: Any = (), rev: bool = False, jac: bool = True) -> Any:
    """`IResNetLayer.forward`: its log-det saves nothing, its last evaluation of the residual is run again."""
    log_det = layer._jacobian(x, c, rev=rev) if jac else None
    residual = twin_of(layer, (layer.residual,), lambda: _Residual(layer.residual))
    if not rev:
        return [x[0] + residual(x[0])], log_det
    with torch.no_grad():
        found = x[0]
        for _ in range(layer.fixed_point_iterations):
            found = x[0] - layer.residual(found)
    return [x[0] - residual(found.detach())], log_det


_CALLS = {"forward": _flip}

ADAPTER = Adapter(
    library="FrEIA",
    versions="0.2",
    blocks=(
        Block("FrEIA.modules.base:InvertibleModule", methods=_CALLS, log_det=1, subclasses=True),
        Block("FrEIA.modules.all_in_one_block:AllInOneBlock", methods=_CALLS, log_det=1, branches=_subnets),
        Block(
            "FrEIA.modules.coupling_layers:_BaseCouplingBlock NICECouplingBlock RNVPCouplingBlock GLOWCouplingBlock "
            "GINCouplingBlock AffineCouplingOneSided ConditionalAffineTransform",
            methods=_CALLS,
            log_det=1,
            branches=_subnets,
        ),
        Block(
            "FrEIA.modules.fixed_transforms:PermuteRandom",
            methods=_CALLS,
            log_det=1,
            keeps_zeros=True,
        ),
        Block("FrEIA.modules.fixed_transforms:FixedLinearTransform Fixed1x1Conv", methods={"forward": _solve}, log_det=1),
        Block("FrEIA.modules.fixed_transforms:InvertibleSigmoid", REPLAY, log_det=1, why="it saturates"),
        Block(
            "FrEIA.modules.inv_auto_layers:InvAutoAct InvAutoActFixed InvAutoActTwoSided LearnedElementwiseScaling",
            methods=_CALLS,
            log_det=1,
        ),
        Block(
            "FrEIA.modules.inv_auto_layers:InvAutoFC InvAutoConv2D",
            LEAVE,
            log_det=1,
            why="it inverts only where it has converged; it saves its input and no more",
        ),
        Block("FrEIA.modules.invertible_resnet:ActNorm", methods=_CALLS, log_det=1),
        Block(
            "FrEIA.modules.invertible_resnet:IResNetLayer",
            LEAVE,
            log_det=1,
            why="its inverse takes fifty passes: its residual is run again from its input",
            instead={"forward": _iresnet},
        ),
        Block("FrEIA.modules.orthogonal:HouseholderPerm", methods={"forward": _householder}, log_det=1),
        Block(
            "FrEIA.modules.orthogonal:OrthogonalTransform",
            REPLAY,
            log_det=1,
            why="its matrix is orthogonal after its corrections only",
        ),
        Block(
            "FrEIA.modules.reshapes:IRevNetDownsampling IRevNetUpsampling Flatten Reshape",
            methods=_CALLS,
            log_det=1,
            keeps_zeros=True,
        ),
        Block("FrEIA.modules.reshapes:HaarDownsampling HaarUpsampling", methods=_CALLS, log_det=1),
        Block("FrEIA.modules.graph_topology:Split Concat", methods=_CALLS, log_det=1, keeps_zeros=True),
        Block(
            "FrEIA.modules.gaussian_mixture:GaussianMixtureModel",
            LEAVE,
            log_det=1,
            why="it saves no more than its conditions, from which it would be run again",
        ),
        Block(
            "FrEIA.framework.sequence_inn:SequenceINN",
            LEAVE,
            why="its blocks are inverted one by one",
            instead={"forward": _sequence},
        ),
        Block(
            "FrEIA.framework.graph_inn:GraphINN",
            LEAVE,
            why="its blocks are inverted one by one, and it lets go of what they return once it is used",
            instead={"forward": _graph},
        ),
        Block(
            "FrEIA.framework.reversible_graph_net:ReversibleGraphNet",
            LEAVE,
            why="it calls GraphINN",
        ),
        Block("FrEIA.framework.reversible_sequential_net:ReversibleSequential", LEAVE, why="it is a SequenceINN"),
    ),
    own=("FrEIA.",),
    quiet=(
        "FrEIA.modules.base:InvertibleModule",
        "FrEIA.modules.all_in_one_block:AllInOneBlock",
        "FrEIA.modules.coupling_layers:_BaseCouplingBlock NICECouplingBlock RNVPCouplingBlock GLOWCouplingBlock GINCouplingBlock "
        "AffineCouplingOneSided ConditionalAffineTransform",
        "FrEIA.modules.fixed_transforms:PermuteRandom FixedLinearTransform",
    ),
)
ADAPTER.install()
