"""FrEIA under ``reversible()``, as its users write it."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import revhooks
from revhooks.adapters import adapter_of
from revhooks.registry import entry_of, registered
from tests.adapted import TOLERANCE, assert_alike, compare, real, train
from tests.conftest import Count

pytest.importorskip("FrEIA", reason="FrEIA is not installed")
import FrEIA.framework as Ff
import FrEIA.modules as Fm

pytestmark = pytest.mark.cpu(reason="who runs what")

HIDDEN = 16
VECTOR, IMAGE, SMALL = (8,), (2, 4, 4), (8, 2, 2)
BATCH = 12
IGNORED = "Invertible Autoencoder|Using non-full backward hooks|Deprecated: please use InvAutoAct"


def dense(inner: int, outer: int) -> nn.Module:
    """A net with batch norm: its statistics are updated once."""
    net = nn.Sequential(
        nn.Linear(inner, HIDDEN, bias=False), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh(),
        nn.Linear(HIDDEN, outer),
    )  # fmt: skip
    net[-1].weight.data.mul_(0.3)
    return Count(net)


def convolutions(inner: int, outer: int) -> nn.Module:
    layers = [nn.Conv2d(inner, HIDDEN, 3, padding=1), nn.Dropout(0.1), nn.Tanh(), nn.Conv2d(HIDDEN, outer, 3, padding=1)]
    net = nn.Sequential(*layers)
    net[-1].weight.data.mul_(0.3)
    return Count(net)


def net_for(shape: tuple[int, ...]) -> Callable[[int, int], nn.Module]:
    return dense if len(shape) == 1 else convolutions


def rotation(width: int) -> Tensor:
    return torch.linalg.qr(torch.randn(width, width))[0] * 1.1


COUPLINGS = ("NICECouplingBlock", "RNVPCouplingBlock", "GLOWCouplingBlock", "GINCouplingBlock", "AffineCouplingOneSided")
# a block, what it gets, and its options; "condition" if it has one
CASES: dict[str, tuple[str, tuple[int, ...], Callable[[], dict[str, Any]]]] = {
    "AllInOneBlock": ("AllInOneBlock", VECTOR, dict),
    "AllInOneBlock, images": ("AllInOneBlock", IMAGE, dict),
    "AllInOneBlock, householder": (
        "AllInOneBlock", VECTOR, lambda: {"learned_householder_permutation": 2, "reverse_permutation": True},
    ),
    "AllInOneBlock, GIN": ("AllInOneBlock", VECTOR, lambda: {"gin_block": True, "global_affine_type": "EXP"}),
    "AllInOneBlock, condition": ("AllInOneBlock", VECTOR, lambda: {"condition": True}),
    **{name: (name, VECTOR, dict) for name in COUPLINGS},
    "GLOWCouplingBlock, images": ("GLOWCouplingBlock", IMAGE, dict),
    "RNVPCouplingBlock, condition": ("RNVPCouplingBlock", VECTOR, lambda: {"condition": True, "clamp_activation": nn.Tanh()}),
    "ConditionalAffineTransform": ("ConditionalAffineTransform", VECTOR, lambda: {"condition": True}),
    "PermuteRandom": ("PermuteRandom", VECTOR, dict),
    "FixedLinearTransform": ("FixedLinearTransform", VECTOR, lambda: {"M": rotation(8), "b": torch.randn(8)}),
    "Fixed1x1Conv": ("Fixed1x1Conv", IMAGE, lambda: {"M": rotation(2)}),
    "InvertibleSigmoid": ("InvertibleSigmoid", VECTOR, dict),
    "InvAutoAct": ("InvAutoAct", VECTOR, dict),
    "InvAutoActFixed": ("InvAutoActFixed", VECTOR, lambda: {"learnable": False}),
    "InvAutoActTwoSided": ("InvAutoActTwoSided", IMAGE, dict),
    "LearnedElementwiseScaling": ("LearnedElementwiseScaling", VECTOR, dict),
    "InvAutoFC": ("InvAutoFC", VECTOR, dict),
    "InvAutoConv2D": ("InvAutoConv2D", IMAGE, dict),
    "ActNorm": ("ActNorm", VECTOR, dict),
    "ActNorm, images": ("ActNorm", IMAGE, dict),
    "IResNetLayer": ("IResNetLayer", VECTOR, lambda: {"internal_size": 32}),
    "OrthogonalTransform": ("OrthogonalTransform", VECTOR, lambda: {"correction_interval": 1}),
    "HouseholderPerm": ("HouseholderPerm", VECTOR, lambda: {"n_reflections": 4}),
    "HouseholderPerm, fixed": ("HouseholderPerm", VECTOR, lambda: {"n_reflections": 4, "fixed": True}),
    "IRevNetDownsampling": ("IRevNetDownsampling", IMAGE, dict),
    "IRevNetDownsampling, legacy": ("IRevNetDownsampling", IMAGE, lambda: {"legacy_backend": True}),
    "IRevNetUpsampling": ("IRevNetUpsampling", SMALL, dict),
    "HaarDownsampling": ("HaarDownsampling", IMAGE, dict),
    "HaarDownsampling, by wavelet": ("HaarDownsampling", IMAGE, lambda: {"order_by_wavelet": True, "rebalance": 0.5}),
    "HaarUpsampling": ("HaarUpsampling", SMALL, dict),
    "Flatten": ("Flatten", IMAGE, dict),
    "Reshape": ("Reshape", IMAGE, lambda: {"output_dims": SMALL}),
}  # fmt: skip
ONE_WAY = {"InvertibleSigmoid"}  # what comes in is not what comes out
CHANGES_SHAPE = ("IRevNet", "Haar", "Flatten", "Reshape")


def stack(name: str) -> Any:
    """The block between couplings, and between couplings again where its shape is the same."""
    cls, shape, options = CASES[name]
    inn = Ff.SequenceINN(*shape)

    def couple() -> None:
        inn.append(Fm.AllInOneBlock, subnet_constructor=net_for(inn.shapes[-1]))

    couple()
    for _ in range(1 if cls.startswith(CHANGES_SHAPE) else 2):
        given = options()
        if cls in COUPLINGS or cls in ("AllInOneBlock", "ConditionalAffineTransform"):
            given["subnet_constructor"] = net_for(shape)
        if given.pop("condition", False):
            given |= {"cond": 0, "cond_shape": (3,)}
        inn.append(getattr(Fm, cls), **given)
        couple()
    return inn


def nll(x: Tensor, c: Any = None, *, rev: bool = False, **options: Any) -> Callable[[Any], Tensor]:
    """The negative log-likelihood of data, or that of samples (reverse)."""

    def loss(inn: Any) -> Tensor:
        z, log_det = inn(x.clone(), c, rev=rev, **options)
        terms = sum(one.square().mean() for one in (z if isinstance(z, tuple) else (z,)))
        return terms - 0.01 * log_det.mean() if torch.is_tensor(log_det) else terms

    return loss


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """numpy's generator is seeded, and what some blocks print is swallowed."""
    np.random.seed(0)


@pytest.mark.parametrize("rev", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("name", CASES)
def test_blocks_in_a_sequence_train_as_plain(name: str, rev: bool) -> None:
    if rev and name in ONE_WAY:
        pytest.skip("what its other direction takes is in (0, 1)")
    _train(name, torch.float64, rev=rev)


ROUNDS = [name for name in CASES if name.startswith((*COUPLINGS, "AllIn", "Fixed", "Householder", "HaarDown"))]


@pytest.mark.parametrize("name", ROUNDS)
def test_blocks_in_a_sequence_train_as_plain_in_float32(name: str) -> None:
    _train(name, torch.float32, rev=False)


def _train(name: str, dtype: torch.dtype, *, rev: bool) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=IGNORED)
        inn = stack(name).to(dtype)
    shape = inn.shapes[-1 if rev else 0]
    # of digits its gradients in float32 are off by more than 1e-5, as float32 itself is: three steps multiply what is rounded
    rounds = name == "AllInOneBlock, householder" and dtype is torch.float32
    x = (torch.randn(BATCH, *shape) if rounds else real(BATCH, *shape)).to(dtype)
    c = [torch.randn(BATCH, 3, dtype=dtype)]
    if rev and "ActNorm" in name:
        inn(torch.randn(BATCH, *shape, dtype=dtype))  # its first call this way would blow up what comes after
    trained = compare(inn, nll(x, c, rev=rev), tol=TOLERANCE[dtype], ignored=IGNORED)
    assert trained.held.frames
    if not name.startswith("HaarUp" if not rev else "HaarDown"):  # it changes its input in place: the block before it is kept
        assert trained.calls == [2, 2, 2]
        assert trained.share < (0.9 if CASES[name][0].startswith(CHANGES_SHAPE) else 0.8)


def test_every_block_has_its_line() -> None:
    def below(cls: type) -> set[type]:
        return {cls, *(one for sub in cls.__subclasses__() for one in below(sub))}

    lines = {f"{block.module}:{name}" for block in adapter_of("FrEIA").blocks for name in block.names}
    inherits = {"Split1D", "SplitChannel", "Concat1d", "ConcatChannel", "deprecated_class"}
    theirs = {f"{cls.__module__}:{cls.__name__}" for cls in below(Fm.InvertibleModule) if cls.__module__.startswith("FrEIA.")}
    assert {line for line in theirs if line.split(":")[1] not in inherits} == lines
    assert all(block.why for block in adapter_of("FrEIA").blocks if block.how != "invert")


def test_a_sequence_holds_little_and_evaluates_twice() -> None:
    inn = Ff.SequenceINN(64)
    for _ in range(16):
        inn.append(
            Fm.AllInOneBlock,
            subnet_constructor=lambda i, o: Count(nn.Sequential(nn.Linear(i, 64), nn.ReLU(), nn.Linear(64, o))),
        )
    trained = compare(inn, nll(real(128, 64).float()), tol=1e-5)
    assert trained.share < 0.1
    assert trained.peak < 0.11
    assert trained.stats.inversions > 12


def test_all_of_a_chain_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views, permutations and fixed maps between couplings begin no chain anew: its input and its output are held."""
    inn = Ff.SequenceINN(*IMAGE)
    for cls in (Fm.IRevNetDownsampling, Fm.Reshape, Fm.Flatten):
        inn.append(Fm.GLOWCouplingBlock, subnet_constructor=net_for(inn.shapes[-1]))
        inn.append(cls, **({"output_dims": IMAGE} if cls is Fm.Reshape else {}))
    for cls in (Fm.PermuteRandom, Fm.ActNorm, Fm.InvAutoAct, Fm.LearnedElementwiseScaling):
        inn.append(cls)
        inn.append(Fm.GLOWCouplingBlock, subnet_constructor=dense)
    from revhooks.runtime.frames import opaque

    monkeypatch.setattr(opaque, "_TINY", 1 << 40)  # small inputs are no reason to keep them
    trained = compare(inn.double(), nll(real(BATCH, *IMAGE)))
    assert trained.stats.replays <= 3


# -- graphs


def graph(*, split: bool, condition: bool, force: bool = False) -> Any:
    """Couplings, a split, couplings of one half, and the other half again or as an output of its own."""
    given = Ff.ConditionNode(3, name="condition")
    nodes = [Ff.InputNode(*VECTOR, name="in")]

    def couple(count: int) -> None:
        for _ in range(count):
            conditions = given if condition else None
            nodes.append(Ff.Node(nodes[-1], Fm.GLOWCouplingBlock, {"subnet_constructor": dense}, conditions=conditions))

    couple(3)
    nodes.append(Ff.Node(nodes[-1], Fm.PermuteRandom, {}))
    halves = Ff.Node(nodes[-1], Fm.Split, {}, name="split")
    nodes.append(halves)
    couple(3)
    if split:
        nodes += [Ff.OutputNode(nodes[-1], name="one"), Ff.OutputNode(halves.out1, name="two")]
    else:
        nodes.append(Ff.Node([nodes[-1].out0, halves.out1], Fm.Concat, {}))
        couple(3)
        nodes.append(Ff.OutputNode(nodes[-1], name="out"))
    return Ff.GraphINN([*nodes, given] if condition else nodes, force_tuple_output=force).double()


@pytest.mark.parametrize("rev", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("condition", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_graphs(split: bool, condition: bool, rev: bool) -> None:
    inn = graph(split=split, condition=condition)
    x = real(BATCH, 8)
    c = torch.randn(BATCH, 3, dtype=torch.float64) if condition else None

    def loss(inn: Any) -> Tensor:
        given = tuple(x.chunk(2, 1)) if split and rev else x
        z, log_det = inn(given, c, rev=rev)
        return sum(one.square().mean() for one in (z if isinstance(z, tuple) else (z,))) - 0.01 * log_det.mean()

    trained = compare(inn, loss)
    assert trained.share < 0.4


def test_a_graph_returns_what_it_does_outside() -> None:
    x, c = real(BATCH, 8), [torch.randn(BATCH, 3, dtype=torch.float64)]
    for force in (False, True):
        inn = graph(split=False, condition=True, force=force)
        for options in ({}, {"jac": False}, {"rev": True}, {"rev": True, "jac": False}):
            inn.eval()
            expected = inn(x, c, **options)
            with revhooks.reversible():
                found = inn(x, c, **options)
                assert isinstance(found[0], tuple) is isinstance(expected[0], tuple)
                for a, b in zip(found, expected, strict=True):
                    assert torch.equal(*(one[0] if isinstance(one, tuple) else one for one in (a, b)))
        outs, log_dets = inn(x, c, intermediate_outputs=True)
        with revhooks.reversible():
            found, found_dets = inn(x, c, intermediate_outputs=True)
        assert found.keys() == outs.keys()
        assert all(torch.equal(found[key], outs[key]) for key in outs)
        assert found_dets.keys() == log_dets.keys()


def test_a_graph_refuses_what_it_does_outside() -> None:
    inn = graph(split=False, condition=True)
    x, c = real(BATCH, 8), torch.randn(BATCH, 3, dtype=torch.float64)
    for args in ((x,), ((x, x), c), (x[:, :4], c)):
        with pytest.raises(Exception) as outside:
            inn(*args)
        with pytest.raises(type(outside.value)) as inside, revhooks.reversible():
            inn(*args)
        assert str(inside.value) == str(outside.value)


def test_a_graph_lets_go_of_what_is_used() -> None:
    import weakref

    inn = graph(split=False, condition=False)
    seen: list[Any] = []
    alive: list[int] = []

    def note(_: nn.Module, __: Any, output: Any) -> None:
        alive.append(sum(one() is not None for one in seen))
        seen.append(weakref.ref(output[0][0]))

    for module in inn.module_list:
        module.register_forward_hook(note)
    with revhooks.reversible():
        inn(real(BATCH, 8))
    assert max(alive) <= 3


def test_the_old_names_of_graphs_and_sequences() -> None:
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    x = real(BATCH, 8)
    nodes = [Ff.InputNode(8)]
    for _ in range(5):
        nodes.append(Ff.Node(nodes[-1], Fm.NICECouplingBlock, {"subnet_constructor": dense}))
    net = Ff.ReversibleGraphNet([*nodes, Ff.OutputNode(nodes[-1])], verbose=False).double()
    assert compare(net, nll(x), ignored="ReversibleGraphNet").share < 0.5
    sequence = Ff.ReversibleSequential(8)
    for _ in range(5):
        sequence.append(Fm.NICECouplingBlock, subnet_constructor=dense)
    assert compare(sequence.double(), nll(x)).share < 0.5


def test_a_sequence_in_a_graph() -> None:
    def sequence(dims: Any) -> Any:
        inn = Ff.SequenceINN(*dims[0], force_tuple_output=True)
        for _ in range(3):
            inn.append(Fm.AllInOneBlock, subnet_constructor=dense)
        return inn

    nodes = [Ff.InputNode(8)]
    nodes += [Ff.Node(nodes[-1], sequence, {})]
    nodes += [Ff.Node(nodes[-1], sequence, {})]
    inn = Ff.GraphINN([*nodes, Ff.OutputNode(nodes[-1])]).double()
    trained = compare(inn, nll(real(BATCH, 8)))
    assert trained.share < 0.4
    assert trained.held.frames == 6


class Around(Fm.InvertibleModule):
    """Somebody's own block that is made of a sequence."""

    def __init__(self, dims_in: Any) -> None:
        super().__init__(dims_in)
        self.inner = Ff.SequenceINN(*dims_in[0], force_tuple_output=True)
        for _ in range(3):
            self.inner.append(Fm.AllInOneBlock, subnet_constructor=dense)

    def forward(self, x: Any, rev: bool = False, jac: bool = True) -> Any:
        return self.inner(x, rev=rev, jac=jac)

    def output_dims(self, dims: Any) -> Any:
        return dims


def test_a_block_of_ones_own_that_is_made_of_a_sequence() -> None:
    inn = Ff.SequenceINN(8)
    inn.append(Around)
    inn.append(Around)
    trained = compare(inn.double(), nll(real(BATCH, 8)))
    assert trained.held.frames == 6
    assert trained.share < 0.4


# -- how blocks are called


@pytest.mark.parametrize("call", ["keywords", "positions", "no jac"])
@pytest.mark.parametrize("rev", [False, True])
def test_arguments_by_position_and_by_keyword(call: str, rev: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Fm.GLOWCouplingBlock([IMAGE], subnet_constructor=convolutions) for _ in range(3)])
            self.down = nn.ModuleList([Fm.HaarDownsampling([IMAGE]) for _ in range(3)])
            self.mix = nn.ModuleList([Fm.PermuteRandom([IMAGE]) for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            given, total = (x * 1,), 0.0
            for block, down, mix in zip(self.blocks, self.down, self.mix, strict=True):
                if call == "positions":  # which differ from block to block
                    given, log_det = block(given, [], rev, True)
                    given, _ = mix(given, rev, False)
                    given, _ = down(down(given, None, False, False)[0], None, True, True)
                else:
                    jac = call == "keywords"
                    given, log_det = block(list(given), rev=rev, jac=jac)
                    given, _ = mix(given, rev=rev, jac=jac)
                    given, _ = down(down(given, jac=jac)[0], rev=True, jac=jac)
                total = total + log_det
            return given[0].square().mean() - 0.01 * total.mean()

    x = real(BATCH, *IMAGE)
    assert compare(Net().double(), lambda net: net(x)).stats.frames


def test_gaussian_mixtures_are_left_as_they_are() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Count(nn.Linear(4, 3 + 3 * 8 + 3 * 36))
            self.flow = Fm.GaussianMixtureModel([VECTOR], [(3,), (3, 8), (3, 36), (1,)])

        def forward(self, x: Tensor, i: Any, rev: bool) -> Tensor:
            w, mu, u = self.net(x[:, :4]).split((3, 24, 108), 1)
            w, mu, u = self.flow.normalize_weights(w), mu.view(-1, 3, 8), 0.1 * u.view(-1, 3, 36)
            given = x if i is not None or not rev else x[:, None].expand(-1, 3, -1)
            (z,), log_det = self.flow([given * 1], [w, mu, u, i], rev=rev)
            return z.square().mean() - 0.01 * log_det.mean() + w.square().sum()

    x = torch.randn(BATCH, 8)
    for i, rev in ((None, False), (None, True), (torch.arange(BATCH) % 3, False), (5, False), (5, True)):
        trained = compare(Mixture(), lambda net, i=i, rev=rev: net(x, i, rev), tol=1e-6)  # type: ignore[misc]
        assert trained.held.frames == 0


def test_the_residual_of_an_iresnet_is_evaluated_once_more() -> None:
    inn = Ff.SequenceINN(8)
    for _ in range(3):
        inn.append(Fm.IResNetLayer, internal_size=32)
    for layer in inn:
        layer.residual = Count(layer.residual)
    x = real(BATCH, 8)
    trained = train(inn.double(), nll(x), reverse=True)
    assert_alike(train(inn, nll(x), reverse=False), trained, 1e-9)
    assert max(trained.calls) == 22  # twenty for the log-det

    def loss(inn: Any) -> Tensor:
        z = (x.clone(),)
        for layer in inn:
            z, _ = layer(z, jac=False)
        return z[0].square().mean()

    assert compare(inn, loss).share < 0.6


# -- users' own blocks


class Mine(Fm.InvertibleModule):
    """Somebody's own block, with nets of its own."""

    def __init__(self, dims_in: Any) -> None:
        super().__init__(dims_in)
        self.net = dense(4, 4)

    def forward(self, x: Any, rev: bool = False, jac: bool = True) -> Any:
        a, b = x[0].chunk(2, 1)
        return (torch.cat([b, a + self.net(b) if not rev else a], 1),) if not rev else self.back(x), 0.0

    def back(self, x: Any) -> Any:
        b, y = x[0].chunk(2, 1)
        return (torch.cat([y - self.net(b), b], 1),)

    def output_dims(self, dims: Any) -> Any:
        return dims


class OneWay(Mine):
    """One that says that it has no other direction."""

    def forward(self, x: Any, rev: bool = False, jac: bool = True) -> Any:
        if rev:
            raise NotImplementedError("one way only")
        return (x[0] + self.net(x[0][:, :4]).repeat(1, 2),), 0.0


class Wrong(Mine):
    """One whose other direction is none."""

    def forward(self, x: Any, rev: bool = False, jac: bool = True) -> Any:
        return (2 * x[0] + self.net(x[0][:, :4]).repeat(1, 2),), 0.0


@pytest.mark.parametrize("guard", ["fallback", "raise"])
@pytest.mark.parametrize("cls", [Mine, OneWay, Wrong])
def test_blocks_of_ones_own(cls: type, guard: str) -> None:
    """What inverts is inverted; what does not is run again, of which nobody is warned who has not said that it would."""
    inn = Ff.SequenceINN(8)
    for _ in range(6):
        inn.append(cls)
    x = real(BATCH, 8)
    trained = train(inn.double(), nll(x), reverse=True, guard=guard)
    assert_alike(train(inn, nll(x), reverse=False), trained, 1e-9)
    assert trained.calls[1:] == [2, 2]
    assert trained.calls[0] == (3 if cls is Wrong else 2)  # its first try calls the net
    assert trained.share < 0.5
    assert bool(trained.stats.inversions) is (cls is Mine)
    assert entry_of(cls, "forward").adapter == "FrEIA"


def test_what_its_user_registers_wins() -> None:
    def inverse(block: Any, output: Any, *, rev: bool, jac: bool) -> Any:
        return block.back(output[0])

    with revhooks.reversible():
        pass  # its adapter has seen it
    revhooks.register(Mine, inverse=inverse)
    try:
        inn = Ff.SequenceINN(8)
        for _ in range(6):
            inn.append(Mine)
        trained = compare(inn.double(), nll(real(BATCH, 8)))
        assert trained.stats.inversions
        assert not registered(Mine).adapter
    finally:
        revhooks.unregister(Mine)


# -- all of it


def small() -> Any:
    inn = Ff.SequenceINN(8)
    for cls in (Fm.AllInOneBlock, Fm.GLOWCouplingBlock, Fm.AllInOneBlock):
        inn.append(cls, subnet_constructor=dense)
    inn.append(Fm.ActNorm)
    inn.append(Fm.AllInOneBlock, subnet_constructor=dense)
    return inn.double()


def test_a_model_is_left_as_it_is() -> None:
    inn, x = small(), real(BATCH, 8)
    keys = list(inn.state_dict())
    nll(x)(inn)
    attributes = {id(m): set(vars(m)) for m in inn.modules()}
    with revhooks.reversible() as run:
        nll(x)(inn).backward()
        assert run.stats.frames == 5
        twin = copy.deepcopy(inn)
        twin.zero_grad()
        nll(x)(twin).backward()
    assert list(inn.state_dict()) == keys
    assert {id(m): set(vars(m)) for m in inn.modules()} == attributes
    block = Fm.GINCouplingBlock([VECTOR], subnet_constructor=lambda i, o: nn.Linear(i, o), clamp_activation=torch.tanh)
    with revhooks.reversible():
        block([x[:, :8].float()])[0][0].sum().backward()
    assert list(pickle.loads(pickle.dumps(block)).state_dict()) == list(block.state_dict())


def test_without_adapters_nothing_is_inverted() -> None:
    with revhooks.reversible(adapters=False) as run:
        nll(real(BATCH, 8))(small())
        assert run.stats.frames == 0


def test_gradients_of_gradients() -> None:
    inn, x = small().eval(), real(BATCH, 8)
    inn(x)
    learned = [parameter for parameter in inn.parameters() if parameter.requires_grad]
    found = []
    for adapters in (False, True):
        lead = x.clone().requires_grad_()
        with revhooks.reversible(adapters=adapters, ops=adapters):
            (grad,) = torch.autograd.grad(nll(lead * 1)(inn), lead, create_graph=True)
            found.append(torch.autograd.grad(grad.square().sum(), learned, allow_unused=True))
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-8, atol=1e-14)
