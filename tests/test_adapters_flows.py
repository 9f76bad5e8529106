"""Flow libraries under ``reversible()``, unmodified: normflows, nflows, zuko, torch.distributions."""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import revhooks
from revhooks.registry import entry_of
from tests.adapted import TOLERANCE, Trained, assert_alike, compare, real, train
from tests.conftest import Count


def slow(*names: str) -> list[Any]:
    """Parameters of `make test-all`."""
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.lu is deprecated"),  # of normflows
    pytest.mark.filterwarnings("ignore:torch.qr is deprecated"),  # of nflows
    pytest.mark.filterwarnings("ignore:Inputs to the softmax are not scaled down"),  # of nflows
    pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated"),  # of nflows
    pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar"),  # of normflows' ActNorm
]


def counted(model: nn.Module, networks: tuple[type, ...]) -> nn.Module:
    """The model, whose networks of these classes are counted."""
    found = [(parent, name) for parent in model.modules() for name, net in parent.named_children() if isinstance(net, networks)]
    for parent, name in found:
        parent._modules[name] = Count(parent._modules[name])
    return model


def check(
    model: nn.Module,
    loss: Callable[[nn.Module], torch.Tensor],
    networks: type | tuple[type, ...] = (),
    *,
    held: float = 1.0,
    **options: Any,
) -> Trained:
    """Three steps in float32 and float64 are those of plain autograd; returns those in float64."""
    model = counted(model, networks if isinstance(networks, tuple) else (networks,))
    for dtype, tolerance in reversed(TOLERANCE.items()):
        found = compare(copy.deepcopy(model).to(dtype), loss, tol=tolerance, **options)
    assert not networks or found.calls[-1]
    assert found.share <= held
    return found


def data(model: nn.Module, *shape: int) -> torch.Tensor:
    return real(*shape).to(next(model.parameters()).dtype)


# -- normflows


@pytest.fixture(scope="module")
def normflows() -> Any:
    return pytest.importorskip("normflows")


def glow(nf: Any, levels: int = 2, depth: int = 3, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    shape, flows, merges, bases = (3, 16, 16), [], [], []
    for level in range(levels):
        channels = 3 * 2 ** (levels + 1 - level)
        blocks = [nf.flows.GlowBlock(channels, 16, **options) for _ in range(depth)]
        flows.append([*blocks, nf.flows.Squeeze()])
        if level:
            merges.append(nf.flows.Merge())
            latent = (3 * 2 ** (levels - level), *(side // 2 ** (levels - level) for side in shape[1:]))
        else:
            latent = (3 * 2 ** (levels + 1), *(side // 2**levels for side in shape[1:]))
        bases.append(nf.distributions.ClassCondDiagGaussian(latent, 4))
    return nf.MultiscaleFlow(bases, flows, merges)


@pytest.mark.parametrize("options", [{}, {"scale_map": "exp"}, {"scale": False}, {"use_lu": False}, {"net_actnorm": True}])
def test_glow_of_normflows(normflows: Any, options: dict[str, Any]) -> None:
    model = glow(normflows, **options)
    labels = torch.arange(8) % 4

    def loss(model: nn.Module) -> torch.Tensor:
        return model.forward_kld(data(model, 8, 3, 16, 16), labels) / 1000

    found = check(model, loss, normflows.nets.ConvNet2d, held=0.35)
    assert found.stats.inversions >= 3  # the newest is kept, and the first one of a level has its input
    assert not found.stats.second_evaluations


def test_glow_of_normflows_backwards(normflows: Any) -> None:
    """Reverse KL trains the other direction."""
    model = glow(normflows)
    target = torch.linspace(-1, 1, 16)

    def loss(model: nn.Module) -> torch.Tensor:
        z = [data(model, 8, 12 * 2, 4, 4), data(model, 8, 6, 8, 8)]
        x, log_det = model.forward_and_log_det(z)
        return ((x - target.to(x)).square().sum((1, 2, 3)) - log_det).mean() / 100

    found = check(model, loss, normflows.nets.ConvNet2d, held=0.4)
    assert found.stats.inversions >= 3
    assert not found.stats.second_evaluations


def vector_flows(nf: Any) -> dict[str, Callable[[], list[nn.Module]]]:
    mask = torch.tensor([1.0, 0.0] * 3)

    def masked() -> list[nn.Module]:
        return [
            nf.flows.MaskedAffineFlow(mask if i % 2 else 1 - mask, nf.nets.MLP([6, 32, 6]), nf.nets.MLP([6, 32, 6]))
            for i in range(4)
        ]

    def real_nvp() -> list[nn.Module]:
        return [
            flow
            for _ in range(4)
            for flow in (
                nf.flows.AffineCouplingBlock(nf.nets.MLP([3, 64, 6], init_zeros=False)),
                nf.flows.Permute(6, mode="swap"),
                nf.flows.ActNorm(6),
            )
        ]

    return {
        "masked": masked,
        "real_nvp": real_nvp,
        "spline": lambda: [
            flow for _ in range(4) for flow in (nf.flows.CoupledRationalQuadraticSpline(6, 2, 32), nf.flows.LULinearPermute(6))
        ],
        "circular": lambda: [
            nf.flows.CircularCoupledRationalQuadraticSpline(6, 2, 32, ind_circ=[0, 1], tail_bound=3.0) for _ in range(4)
        ],
        "autoregressive": lambda: [nf.flows.MaskedAffineAutoregressive(6, 32) for _ in range(4)],
        "autoregressive spline": lambda: [nf.flows.AutoregressiveRationalQuadraticSpline(6, 1, 32) for _ in range(4)],
        "planar": lambda: [nf.flows.Planar((6,)) for _ in range(3)],
        "reversed": lambda: [nf.flows.Reverse(flow) for flow in masked()],
        "composite": lambda: [nf.flows.Composite(masked())],
    }


NETWORKS = ("MLP", "ResidualNet", "MADE")


@pytest.mark.parametrize(
    "name",
    ["masked", "real_nvp", "spline", "autoregressive", "reversed", *slow("circular", "autoregressive spline")],
)
@pytest.mark.parametrize("direction", ["likelihood", "variational"])
def test_vector_flows_of_normflows(normflows: Any, name: str, direction: str) -> None:
    torch.manual_seed(0)
    model = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(6, trainable=False), vector_flows(normflows)[name]())

    def loss(model: nn.Module) -> torch.Tensor:
        z = data(model, 64, 6)
        if direction == "likelihood":
            return -model.log_prob(z).mean()
        log_q = 0
        for flow in model.flows:
            z, log_det = flow(z)
            log_q = log_q - log_det
        return (log_q + z.square().sum(1) / 3).mean()

    networks = tuple({type(m) for m in model.modules() if type(m).__name__ in NETWORKS})
    check(model, loss, networks, held=0.5)


def test_planar_flows_of_normflows(normflows: Any) -> None:
    torch.manual_seed(0)
    model = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(6), vector_flows(normflows)["planar"]())

    def loss(model: nn.Module) -> torch.Tensor:
        z, log_det = model.forward_and_log_det(data(model, 64, 6))
        return (z.square().sum(1) - log_det).mean()

    check(model, loss)


def test_residual_flows_of_normflows_draw_as_they_do(normflows: Any) -> None:
    """Their log-det is estimated with as many terms as numpy draws."""
    torch.manual_seed(0)
    net = normflows.nets.LipschitzMLP([6, 32, 32, 6], init_zeros=False, lipschitz_const=0.7)
    flows = [normflows.flows.Residual(copy.deepcopy(net), reduce_memory=reduce) for reduce in (True, False)]
    model = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(6), flows)

    def loss(model: nn.Module) -> torch.Tensor:
        return -model.log_prob(data(model, 64, 6)).mean()

    check(model, loss)


# -- nflows


@pytest.fixture(scope="module")
def nflows() -> Any:
    pytest.importorskip("nflows")
    import nflows.distributions
    import nflows.flows
    import nflows.nn.nets
    import nflows.transforms

    return nflows


def nflows_transforms(library: Any) -> dict[str, Callable[[], list[nn.Module]]]:
    t, mask = library.transforms, torch.tensor([1, 0] * 4)

    def net(context: int | None = None) -> Callable[[int, int], nn.Module]:
        return lambda i, o: library.nn.nets.ResidualNet(i, o, hidden_features=32, context_features=context)

    def couplings(kind: str, **options: Any) -> Callable[[], list[nn.Module]]:
        return lambda: [
            part
            for i in range(4)
            for part in (
                getattr(t, kind)(mask if i % 2 else 1 - mask, net(2), **options),
                t.ActNorm(8),
                t.LULinear(8),
                t.RandomPermutation(8),
            )
        ]

    spline = {"tails": "linear", "tail_bound": 4.0}
    return {
        "affine": couplings("AffineCouplingTransform"),
        "additive": couplings("AdditiveCouplingTransform"),
        "rational quadratic": couplings("PiecewiseRationalQuadraticCouplingTransform", **spline),
        "unconditional": couplings("PiecewiseRationalQuadraticCouplingTransform", apply_unconditional_transform=True, **spline),
        "quadratic": couplings("PiecewiseQuadraticCouplingTransform", **spline),
        "autoregressive": lambda: [t.MaskedAffineAutoregressiveTransform(8, 32, context_features=2) for _ in range(4)],
        "autoregressive spline": lambda: [
            t.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(8, 32, context_features=2, num_blocks=1, **spline)
            for _ in range(4)
        ],
        "linear": lambda: [t.NaiveLinear(8), t.QRLinear(8, 2), t.SVDLinear(8, 2), t.HouseholderSequence(8, 2)],
        "saturating": lambda: [t.AffineCouplingTransform(mask, net(2)), t.Sigmoid(), t.Logit(), t.Tanh(), t.LogTanh()],
        "batch norm": lambda: [part for _ in range(4) for part in (t.AffineCouplingTransform(mask, net(2)), t.BatchNorm(8))],
        "inverse": lambda: [t.InverseTransform(one) for one in couplings("AffineCouplingTransform")()],
    }


@pytest.mark.parametrize(
    "name",
    [
        "affine",
        "additive",
        "rational quadratic",
        "unconditional",
        "quadratic",
        "autoregressive",
        "autoregressive spline",
        "linear",
        "saturating",
        "batch norm",
        "inverse",
    ],
)
def test_flows_of_nflows(nflows: Any, name: str) -> None:
    torch.manual_seed(0)
    transform = nflows.transforms.CompositeTransform(nflows_transforms(nflows)[name]())
    model = nflows.flows.Flow(transform, nflows.distributions.StandardNormal([8]))

    def loss(model: nn.Module) -> torch.Tensor:
        return -model.log_prob(data(model, 64, 8) / 2, context=data(model, 64, 2)).mean()

    networks = tuple({type(m) for m in model.modules() if type(m).__name__ in NETWORKS})
    held = 0.5 if networks and name != "saturating" else 1.1
    check(model, loss, networks, held=held)


@pytest.mark.parametrize("name", ["affine", "rational quadratic", *slow("autoregressive spline")])
def test_sampling_direction_of_nflows(nflows: Any, name: str) -> None:
    torch.manual_seed(0)
    transform = nflows.transforms.CompositeTransform(nflows_transforms(nflows)[name]())

    def loss(model: nn.Module) -> torch.Tensor:
        x, log_det = model.inverse(data(model, 64, 8), data(model, 64, 2))
        return (x.square().sum(1) / 4 - log_det).mean()

    networks = tuple({type(m) for m in transform.modules() if type(m).__name__ in NETWORKS})
    check(transform, loss, networks, held=0.5)


def test_images_of_nflows(nflows: Any) -> None:
    """Cheap layers between couplings are inverted where their inputs are large, so that nothing of a chain is kept."""
    torch.manual_seed(0)
    t = nflows.transforms

    def step(channels: int) -> list[nn.Module]:
        return [
            t.ActNorm(channels),
            t.OneByOneConvolution(channels),
            t.AffineCouplingTransform(
                torch.arange(channels) % 2,
                lambda i, o: nflows.nn.nets.ConvResidualNet(i, o, hidden_channels=16, num_blocks=1),
            ),
        ]

    multiscale = t.MultiscaleCompositeTransform(2)
    hidden = (12, 16, 16)
    for _ in range(2):
        parts = [part for _ in range(3) for part in step(hidden[0])]
        hidden = multiscale.add_transform(t.CompositeTransform(parts), hidden)
    model = nflows.flows.Flow(
        t.CompositeTransform([t.SqueezeTransform(), multiscale]), nflows.distributions.StandardNormal([3 * 32 * 32])
    )

    def loss(model: nn.Module) -> torch.Tensor:
        return -model.log_prob(data(model, 16, 3, 32, 32)).mean() / 1000

    found = check(model, loss, nflows.nn.nets.ConvResidualNet, held=0.12)
    assert found.stats.inversions


@pytest.mark.parametrize("limit", ["16KiB"])
def test_a_budget_may_force_what_takes_d_passes(nflows: Any, limit: str) -> None:
    torch.manual_seed(0)
    parts = [nflows.transforms.MaskedAffineAutoregressiveTransform(8, 32) for _ in range(6)]
    model = nflows.transforms.CompositeTransform(parts)

    def loss(model: nn.Module) -> torch.Tensor:
        y, log_det = model(data(model, 256, 8))
        return (y.square().sum(1) - log_det).mean()

    free = check(model, loss)
    model = copy.deepcopy(model).double()
    tight = train(model, loss, reverse=True, budget=limit)
    assert_alike(train(model, loss, reverse=False), tight, 1e-9)
    assert not free.stats.inversions
    assert free.stats.replays == 5  # the newest is kept
    assert tight.stats.inversions
    assert tight.share < free.share


# -- zuko


@pytest.fixture(scope="module")
def zuko() -> Any:
    return pytest.importorskip("zuko")


@pytest.mark.parametrize("name", ["NSF", "MAF", "RealNVP", "NICE", "GF", "SOSPF", "NCSF", *slow("NAF", "UNAF", "BPF", "CNF")])
def test_flows_of_zuko(zuko: Any, name: str) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"atol": 1e-3, "rtol": 1e-3} if name == "CNF" else {"transforms": 4}
    if name in ("NAF", "UNAF"):
        options = {"transforms": 4, "signal": 4, "network": {"hidden_features": (16,)}}
    model = getattr(zuko.flows, name)(5, 2, hidden_features=(32, 32), **options)

    def loss(model: nn.Module) -> torch.Tensor:
        return -model(data(model, 64, 2)).log_prob(data(model, 64, 5) / 2).mean()

    networks = (zuko.nn.MaskedMLP, zuko.nn.MLP) if name not in ("GF", "CNF", "NAF", "UNAF") else ()
    held = {"CNF": 1.0, "GF": 0.8}.get(name, 0.4)
    check(model, loss, networks, held=held)


@pytest.mark.parametrize("name", ["NSF", "RealNVP"])
def test_sampling_direction_of_zuko(zuko: Any, name: str) -> None:
    torch.manual_seed(0)
    model = getattr(zuko.flows, name)(5, 2, transforms=3, hidden_features=(32, 32))

    def loss(model: nn.Module) -> torch.Tensor:
        flow = model(data(model, 64, 2))
        z = data(model, 64, 5)
        x, log_det = flow.transform.inv.call_and_ladj(z)
        return (x.square().sum(-1) - log_det).mean()

    check(model, loss, (zuko.nn.MaskedMLP, zuko.nn.MLP), held=0.5)


# -- torch.distributions


class Conditioned(torch.distributions.Transform):
    """A coupling as somebody writes it for torch.distributions."""

    domain = codomain = torch.distributions.constraints.real_vector
    bijective = True

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def _call(self, x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        log_scale, shift = self.net(a).tanh().chunk(2, -1)
        return torch.cat([b * log_scale.exp() + shift, a], -1)

    def _inverse(self, y: torch.Tensor) -> torch.Tensor:
        b, a = y.chunk(2, -1)
        log_scale, shift = self.net(a).tanh().chunk(2, -1)
        return torch.cat([a, (b - shift) * (-log_scale).exp()], -1)

    def log_abs_det_jacobian(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.net(x.chunk(2, -1)[0]).tanh().chunk(2, -1)[0].sum(-1)


class Transformed(nn.Module):
    def __init__(self, transforms: int = 4) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 8)) for _ in range(transforms))
        self.loc, self.scale = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.ones(8))

    def forward(self) -> torch.distributions.Distribution:
        d = torch.distributions
        base = d.Independent(d.Normal(torch.zeros_like(self.loc), torch.ones_like(self.loc)), 1)
        last = d.AffineTransform(self.loc, self.scale, event_dim=1)
        return d.TransformedDistribution(base, [*(Conditioned(net) for net in self.nets), last])


def test_transformed_distributions() -> None:
    torch.manual_seed(0)

    def loss(model: nn.Module) -> torch.Tensor:
        return -model().log_prob(data(model, 64, 8)).mean()

    check(Transformed(), loss, nn.Sequential, held=0.35)


def test_samples_of_transformed_distributions() -> None:
    torch.manual_seed(0)

    def loss(model: nn.Module) -> torch.Tensor:
        x = model().rsample(torch.Size([64]))
        return (x - 1).square().sum(-1).mean()

    check(Transformed(), loss, nn.Sequential, held=0.35)


# -- what all have in common


def test_adapters_can_be_turned_off(zuko: Any) -> None:
    torch.manual_seed(0)
    model = zuko.flows.MAF(4, transforms=2, hidden_features=(16,)).double()
    with revhooks.reversible() as on:
        (-model().log_prob(data(model, 8, 4)).mean()).backward()
    with revhooks.reversible(adapters=False) as off:
        (-model().log_prob(data(model, 8, 4)).mean()).backward()
    assert on.stats.frames == 2
    assert not off.stats.frames


def test_what_somebody_registers_comes_first(nflows: Any) -> None:
    cls = nflows.transforms.AffineCouplingTransform
    base = nflows.transforms.coupling.CouplingTransform
    with revhooks.reversible():
        pass
    assert entry_of(base, "forward").adapter == "nflows"
    revhooks.register(base, inverse=lambda m, out, *a: m.inverse(out[0], *a)[0])
    try:
        assert not revhooks.registered(cls).adapter
        with revhooks.reversible():
            pass
        assert not revhooks.registered(cls).adapter
    finally:
        revhooks.unregister(base, method="forward")
        from revhooks.adapters import adapter_of

        block = next(one for one in adapter_of("nflows").blocks if "CouplingTransform" in one.names)
        block.register(base, "nflows")
    assert revhooks.registered(cls).adapter == "nflows"


def test_blocks_that_are_called_by_another_method_are_replayed_where_that_is_asked_for(normflows: Any) -> None:
    model = glow(normflows).double()
    labels = torch.arange(4) % 4
    for _ in range(2):
        with revhooks.reversible(replay=normflows.flows.GlowBlock) as run:
            model.forward_kld(data(model, 4, 3, 16, 16), labels).backward()
    assert run.stats.frames == 6
    assert not run.stats.inversions
    assert run.stats.replays == 5


def test_a_block_of_somebody_made_of_their_parts_is_one_frame(normflows: Any) -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = normflows.flows.ActNorm(6)
            self.coupling = normflows.flows.AffineCouplingBlock(normflows.nets.MLP([3, 32, 6], init_zeros=False))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.coupling(self.norm(x)[0])[0]

        def inverse(self, y: torch.Tensor) -> torch.Tensor:
            return self.norm.inverse(self.coupling.inverse(y)[0])[0]

    torch.manual_seed(0)
    revhooks.register(Step, inverse="inverse", prefer="invert")
    try:
        model = nn.Sequential(*(Step() for _ in range(4))).double()
        for _ in range(2):
            with revhooks.reversible() as run:
                model(torch.randn(8, 6).double()).square().sum().backward()
        assert run.stats.frames == 4
        assert run.stats.inversions == 2  # the newest is kept, and the first one has its input
    finally:
        revhooks.unregister(Step)


class Stretch(torch.distributions.Transform):
    """A few operations, and no module."""

    domain = codomain = torch.distributions.constraints.real
    bijective = True

    def _call(self, x: torch.Tensor) -> torch.Tensor:
        return x.sinh()

    def _inverse(self, y: torch.Tensor) -> torch.Tensor:
        return y.asinh()


@pytest.mark.parametrize(("size", "frames"), [(64, 0), (2**16, 1)])
def test_small_transforms_without_networks_are_left_alone(size: int, frames: int) -> None:
    x = torch.randn(size, requires_grad=True)
    with revhooks.reversible() as run:
        Stretch()(x).sum().backward()
    assert run.stats.frames == frames


def test_kept_networks_of_transforms_are_kept() -> None:
    model = Transformed(2)
    for keep, frames in ((nn.Sequential, 0), (nn.Conv2d, 4)):
        with revhooks.reversible(keep=keep) as run:
            (-model().log_prob(torch.randn(64, 8)).mean()).backward()
        assert run.stats.frames == frames


class Centred(Conditioned):
    """It carries statistics from call to call, as no module: numbers, a list, and tensors that it replaces or writes to."""

    def __init__(self, net: nn.Module, kind: str) -> None:
        super().__init__(net)
        self.kind = kind
        self.calls = [1]
        self.mean = torch.zeros(8, dtype=torch.float64)

    def _inverse(self, y: torch.Tensor) -> torch.Tensor:
        mean = y.detach().mean(0)
        if self.kind == "list":
            self.calls.append(self.calls[-1] + 1)
            return super()._inverse(y.tanh() * self.calls[-1])
        if self.kind == "written":
            self.mean.mul_(0.9).add_(mean, alpha=0.1)
        else:
            self.mean = self.mean * 0.9 + mean * 0.1
        return super()._inverse((y - self.mean).tanh())


@pytest.mark.parametrize("kind", ["list", "written", "replaced"])
def test_transforms_may_carry_something_from_call_to_call(kind: str) -> None:
    torch.manual_seed(0)
    nets = nn.ModuleList(nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 8)) for _ in range(2)).double()
    d = torch.distributions
    base = d.Independent(d.Normal(torch.zeros(8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)), 1)
    x = torch.randn(64, 8, dtype=torch.float64)
    found: list[list[torch.Tensor]] = []
    frames = 0
    for plain in (True, False):
        transforms = [Centred(net, kind) for net in nets]
        results = []
        for _ in range(4):
            nets.zero_grad()
            with contextlib.nullcontext() if plain else revhooks.reversible() as run:
                flow = d.TransformedDistribution(base, list(transforms))
                (-flow.log_prob(x).mean() - flow.log_prob(x[:32]).mean()).backward()
            frames = run.stats.replays if run is not None else 0
            results += [p.grad.clone() for p in nets.parameters()]
            results += [part for t in transforms for part in (t.mean.clone(), torch.tensor(t.calls))]
        found.append(results)
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)
    assert frames == 8


class Remembering(Conditioned):
    """What one method computes is left for another one, in an attribute."""

    def _inverse(self, y: torch.Tensor) -> torch.Tensor:
        b, a = y.chunk(2, -1)
        self.log_scale, shift = self.net(a).tanh().chunk(2, -1)
        return torch.cat([a, (b - shift) * (-self.log_scale).exp()], -1)

    def log_abs_det_jacobian(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (self.log_scale + self.net(self.log_scale).sin().chunk(2, -1)[0]).sum(-1)


def test_methods_of_a_transform_may_leave_something_for_each_other() -> None:
    """A second call before backward leaves something else there."""
    torch.manual_seed(0)
    nets = nn.ModuleList(nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 8)) for _ in range(2)).double()
    d = torch.distributions
    base = d.Independent(d.Normal(torch.zeros(8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)), 1)
    x = torch.randn(64, 8, dtype=torch.float64)

    def loss() -> torch.Tensor:
        flow = d.TransformedDistribution(base, [Remembering(net) for net in nets])
        return -flow.log_prob(x).mean() - flow.log_prob(x / 2).mean()

    want = torch.autograd.grad(loss(), list(nets.parameters()))
    for _ in range(6):
        with revhooks.reversible() as run:
            found = torch.autograd.grad(loss(), list(nets.parameters()))
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)
        assert run.stats.replays >= 7
    assert not run.stats.held_bytes


@pytest.mark.parametrize("steps", [0, 6])
@pytest.mark.parametrize("library", ["zuko", "torch"])
def test_what_a_transform_reads_may_not_be_changed_before_it_is_run_again(library: str, steps: int, zuko: Any) -> None:
    torch.manual_seed(0)
    if library == "zuko":
        model: nn.Module = zuko.flows.NSF(8, 3, transforms=2, hidden_features=(32,)).double()
        context = torch.randn(64, 3, dtype=torch.float64)
    else:
        model, context = Transformed(2).double(), torch.zeros(1, dtype=torch.float64)
        model.unused = nn.Linear(1, 1)
    x = torch.randn(64, 8, dtype=torch.float64)

    def loss() -> torch.Tensor:
        return -(model(context) if library == "zuko" else model()).log_prob(x).mean()

    for _ in range(steps):
        with revhooks.reversible():
            loss().backward()
    read = [p for name, p in model.named_parameters() if name not in ("loc", "scale", "unused.weight", "unused.bias")]
    unread = []
    for changed in [*read, context] if library == "zuko" else read:
        want = torch.autograd.grad(loss(), read)
        with revhooks.reversible():
            value = loss()
            with torch.no_grad():
                changed += 1e-3 * torch.rand_like(changed)
            with contextlib.suppress(revhooks.errors.ModifiedError):
                found = torch.autograd.grad(value, read)
                unread.append(changed)  # of the newest, which is not run again
                torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    assert len(unread) <= 4
    if library == "torch":
        with revhooks.reversible():
            value = loss()
            with torch.no_grad():
                model.unused.weight += 1
            value.backward()


def test_networks_that_a_transform_reaches_by_a_function_are_known() -> None:
    torch.manual_seed(0)
    nets = nn.ModuleList(
        nn.Sequential(nn.Linear(4, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 8)) for _ in range(2)
    )

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nets = nets

        def forward(self) -> torch.distributions.Distribution:
            d = torch.distributions
            weight = next(self.parameters())
            base = d.Independent(d.Normal(torch.zeros(8).to(weight), torch.ones(8).to(weight)), 1)
            return d.TransformedDistribution(base, [Conditioned(lambda x, net=net: net(x)) for net in self.nets])  # type: ignore[arg-type,misc]

    check(Both(), lambda model: -model().log_prob(data(model, 64, 8)).mean(), nn.Sequential, held=0.5)


SCRIPT = """
import torch
from {module} import {name}
import revhooks.registry
print(revhooks.registry.lookup({name}) is not None, {name}.__module__, __import__({module!r}).__loader__.__class__.__name__)
"""


@pytest.mark.parametrize("options", [[], ["--no-adapters"]])
def test_a_script_under_run_may_import_its_library(tmp_path: Path, options: list[str], zuko: Any) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(module="zuko.transforms", name="CouplingTransform"))
    command = [sys.executable, "-m", "revhooks", "run", "--quiet", *options, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == [str(not options), "zuko.transforms", "SourceFileLoader"]


def test_adapters_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    from revhooks.cli import main

    assert main(["adapters"]) == 0
    listed = capsys.readouterr().out
    for word in ("FrEIA", "normflows", "GlowBlock", "CompositeTransform", "AutoregressiveTransform", "GroupAddRev"):
        assert word in listed
    assert main(["adapters", "zuko"]) == 0
    assert "GlowBlock" not in capsys.readouterr().out
    assert main(["adapters", "glow"]) == 2
    assert "torch.distributions" in capsys.readouterr().err


def test_every_class_of_a_table_is_there() -> None:
    import importlib

    from revhooks.adapters import LIBRARIES, adapter_of

    for library in LIBRARIES:
        for block in adapter_of(library).blocks:
            module = (
                pytest.importorskip(block.module) if library != "torch.distributions" else importlib.import_module(block.module)
            )
            for name in block.names:
                cls = getattr(module, name)
                for method in block.methods if block.how != "leave" else ():
                    assert callable(getattr(cls, method))
