"""Flow libraries under ``reversible()``, their code unmodified: memory, evaluations and time, beside plain and inputs kept.

    python bench/flows.py                 # everything; JSON under bench/results, a table on the screen
    python bench/flows.py --quick         # small and few rounds, on the screen
    python bench/flows.py --only zuko     # some rows

Held is what lives when forward is over, peak the most in a step, both in accounted bytes: unique storages, over parameters, their
gradients and the data. Evaluations are calls of the networks in a step over those in its forward. Times are ratios of steps by
turns in one process, medians of rounds. "Inputs kept" is ``reversible(replay=...)`` of the blocks. The largest pictures of a Glow
are predicted on hollow tensors, as by `revhooks report --fake --fit`: parameters, gradients and Adam's state counted.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import platform
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

warnings.filterwarnings("ignore")

import numpy  # noqa: E402
import torch  # noqa: E402
from ordinary_measure import Contender, accounted, difference, timed  # noqa: E402
from peers import memcnn_chain  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import revhooks  # noqa: E402
from revhooks.profiler.fitting import fit  # noqa: E402
from revhooks.profiler.ways import PLAIN, REVERSIBLE  # noqa: E402
from revhooks.profiler.workload import Workload  # noqa: E402
from revhooks.record import human_bytes  # noqa: E402

RESULTS = Path(__file__).parent / "results"
MEMORY = 16 * 2**30  # for which the largest picture is looked for


class Row(NamedTuple):
    """One model: how it is made, its networks, and the blocks whose inputs are kept where they are replayed."""

    make: Callable[[], Workload]
    networks: tuple[type, ...]
    blocks: tuple[type, ...] = ()
    unwrapped: Callable[[], Workload] | None = None  # what plain is, where the library saves memory itself
    note: str = ""


class Likelihood(nn.Module):
    """A model whose call is its mean negative log-likelihood."""

    def __init__(self, flow: nn.Module, negative: Callable[..., Tensor]) -> None:
        super().__init__()
        self.flow, self.negative = flow, negative

    def forward(self, *args: Tensor) -> Tensor:
        return self.negative(self.flow, *args).mean()


def work(flow: nn.Module, inputs: tuple[Tensor, ...], negative: Callable[..., Tensor]) -> Workload:
    return Workload(Likelihood(flow, negative), inputs, lambda loss: loss)


# -- models


def normflows_glow(depth: int = 16, side: int = 32, batch: int = 32, levels: int = 3, hidden: int = 64) -> Workload:
    """Its own recipe of a Glow: levels of blocks, a squeeze, and a split."""
    import normflows as nf

    torch.manual_seed(0)
    bases, merges, flows = [], [], []
    for level in range(levels):
        channels = 3 * 2 ** (levels + 1 - level)
        flows.append([*(nf.flows.GlowBlock(channels, hidden) for _ in range(depth)), nf.flows.Squeeze()])
        merges += [nf.flows.Merge()] if level else []
        scale = 2 ** (levels - level)
        latent = (3 * (scale if level else 2 * scale), side // scale, side // scale)
        bases.append(nf.distributions.ClassCondDiagGaussian(latent, 10))
    model = nf.MultiscaleFlow(bases, flows, merges)
    inputs = torch.rand(batch, 3, side, side), torch.randint(10, (batch,))
    return work(model, inputs, lambda flow, x, y: -flow.log_prob(x, y) / x[0].numel())


def freia_sequence(depth: int = 16, features: int = 512, batch: int = 64) -> Workload:
    import FrEIA.framework
    import FrEIA.modules

    torch.manual_seed(0)
    numpy.random.seed(0)  # which its permutations are drawn by
    model = FrEIA.framework.SequenceINN(features)
    for _ in range(depth):
        model.append(FrEIA.modules.AllInOneBlock, subnet_constructor=_subnet)

    def negative(flow: nn.Module, x: Tensor) -> Tensor:
        z, log_det = flow(x)
        return (0.5 * z.square().sum(1) - log_det) / features

    return work(model, (torch.randn(batch, features),), negative)


class Subnet(nn.Sequential):
    """A network whose calls are counted."""


def _subnet(inputs: int, outputs: int) -> nn.Module:
    return Subnet(nn.Linear(inputs, 512), nn.ReLU(), nn.Linear(512, outputs))


def nflows_real_nvp(depth: int = 16, features: int = 64, hidden: int = 128, batch: int = 1024) -> Workload:
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.nn.nets import ResidualNet
    from nflows.transforms import AffineCouplingTransform, CompositeTransform

    torch.manual_seed(0)
    mask = torch.arange(features) % 2
    transforms = [
        AffineCouplingTransform(mask if i % 2 else 1 - mask, lambda i, o: ResidualNet(i, o, hidden_features=hidden))
        for i in range(depth)
    ]
    model = Flow(CompositeTransform(transforms), StandardNormal([features]))
    return work(model, (torch.randn(batch, features),), lambda flow, x: -flow.log_prob(x) / features)


def zuko_nsf(depth: int = 8, features: int = 16, batch: int = 1024) -> Workload:
    import zuko

    torch.manual_seed(0)
    model = zuko.flows.NSF(features, transforms=depth, hidden_features=(128, 128))
    return work(model, (torch.randn(batch, features),), lambda flow, x: -flow().log_prob(x) / features)


def branches(depth: int, channels: int = 24) -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        Subnet(
            nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        )
        for _ in range(2 * depth)
    ]  # fmt: skip


def memcnn(depth: int = 16, *, wrapped: bool = True) -> Workload:
    """The chain of coupling_chain.py, of memcnn's wrappers; not wrapped they save no memory."""
    import memcnn

    model = memcnn_chain(branches(depth))
    for block in model.modules():
        if isinstance(block, memcnn.InvertibleModuleWrapper):
            block.disable = not wrapped
    x = torch.randn(32, 48, 32, 32, generator=torch.Generator().manual_seed(2))
    return work(model, (x,), lambda flow, x: flow(x).square())


def own_glow(depth: int = 16, side: int = 32, batch: int = 32, hidden: int = 64) -> Workload:
    torch.manual_seed(0)
    model = revhooks.flows.Glow((3, side, side), levels=3, steps=depth, hidden=hidden)
    return work(model, (torch.rand(batch, 3, side, side),), lambda flow, x: -flow.log_prob(x) / x[0].numel())


def rows(*, quick: bool) -> dict[str, Row]:
    import FrEIA.modules
    import nflows.nn.nets
    import nflows.transforms
    import normflows
    import zuko

    networks, blocks = (normflows.nets.ConvNet2d,), (normflows.flows.GlowBlock,)
    few: dict[str, int] = {"depth": 4} if quick else {}
    deep = {"depth": 6} if quick else {"depth": 48}
    couplings = (nflows.transforms.AffineCouplingTransform,)
    found = {
        "normflows Glow, L=3, K=16": Row(lambda: normflows_glow(**few), networks, blocks),
        "normflows Glow, L=3, K=48": Row(lambda: normflows_glow(**deep), networks, blocks),
        "FrEIA SequenceINN, 16 AllInOneBlock of 512": Row(
            lambda: freia_sequence(**few), (Subnet,), (FrEIA.modules.AllInOneBlock,)
        ),
        "nflows RealNVP, 16 couplings of 64": Row(lambda: nflows_real_nvp(**few), (nflows.nn.nets.ResidualNet,), couplings),
        "zuko NSF, 8 transforms of 16": Row(lambda: zuko_nsf(**few), (zuko.nn.MaskedMLP,)),
        "memcnn, 16 wrapped couplings": Row(lambda: memcnn(**few), (Subnet,), (), lambda: memcnn(**few, wrapped=False)),
        "revhooks.flows.Glow, levels=3, steps=16": Row(lambda: own_glow(**few), (revhooks.nn.ConvNet,)),
    }
    return found


# -- measures


class Counted:
    """Calls of networks, counted where no replay puts the count back."""

    def __init__(self, networks: tuple[type, ...]) -> None:
        self._networks, self._count = networks, ctypes.c_long()
        self._originals = [vars(network).get("forward", network.forward) for network in networks]

    def __enter__(self) -> Counted:
        for network, original in zip(self._networks, self._originals, strict=True):
            network.forward = self._counting(original)  # type: ignore[attr-defined]
        return self

    def _counting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        count = self._count

        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            count.value += 1
            return original(module, *args, **kwargs)

        return forward

    def __exit__(self, *_: object) -> None:
        for network, original in zip(self._networks, self._originals, strict=True):
            network.forward = original  # type: ignore[attr-defined]

    def taken(self) -> int:
        """How many since the last time."""
        found, self._count.value = self._count.value, 0
        return found


def evaluations(contender: Contender, networks: tuple[type, ...]) -> float:
    """Calls in a step over those in its forward."""
    contender.step()
    with Counted(networks) as counted, contender.context():
        loss = contender.loss()
        forward = counted.taken()
        loss.backward()
        return round((forward + counted.taken()) / forward, 2)


def contenders(row: Row) -> dict[str, Contender]:
    plain = row.unwrapped or row.make
    found = {"plain": Contender(plain(), contextlib.nullcontext)}
    if row.blocks:
        found["inputs kept"] = Contender(row.make(), lambda: revhooks.reversible(replay=row.blocks))
    found["reversible"] = Contender(row.make(), revhooks.reversible)
    return found


def measured(row: Row, seconds: float) -> list[dict[str, Any]]:
    found = []
    all_of_them = contenders(row)
    for contender in all_of_them.values():
        contender.step()  # which may initialise it
    times = timed(all_of_them, seconds)
    want = all_of_them["plain"].gradients()
    for name, contender in all_of_them.items():
        live, peak = accounted(contender)
        found.append(
            {
                "contender": name,
                "held": live,
                "peak": peak,
                "evaluations": evaluations(contender, row.networks),
                "time": times.ratio(name, "plain"),
                "gradients": difference(want, contender.gradients()),
            }
        )
    return found


def picture(units: int = 4) -> tuple[nn.Module, tuple[Tensor, ...], Callable[..., Any]]:
    """A Glow of normflows on a picture with sides of eight times so many pixels, as a target of `revhooks report`."""
    made = normflows_glow(depth=16, side=8 * units, batch=1)
    return made.model, made.inputs, made.loss


def largest_pictures() -> dict[str, int]:
    """The side of the largest picture that a step of a Glow fits in the memory with, for each way."""
    found = fit(picture, MEMORY, keyword="units", ways=(PLAIN, REVERSIBLE), target="picture")
    return {one.name: 8 * one.largest for one in found}


# -- output


def table(name: str, found: list[dict[str, Any]]) -> Table:
    shown = Table(title=name, title_justify="left")
    for column in ("", "held", "peak", "peak / plain", "evaluations", "time / plain", "gradients"):
        shown.add_column(column, justify="right" if column else "left")
    plain = found[0]
    for one in found:
        shown.add_row(
            one["contender"],
            human_bytes(one["held"]),
            human_bytes(one["peak"]),
            f"1/{plain['peak'] / one['peak']:.1f}",
            f"{one['evaluations']:.2f}",
            f"{one['time']:.2f}",
            f"{one['gradients']:.1e}" if one["gradients"] else "bitwise",
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small models, few rounds, nothing written")
    parser.add_argument("--only", default="", help="rows whose name has this")
    options = parser.parse_args()
    console, results = Console(), []
    for name, row in rows(quick=options.quick).items():
        if options.only.lower() in name.lower():
            found = measured(row, 5 if options.quick else 40)
            results.append({"name": name, "rows": found})
            console.print(table(name, found))
    pictures = {} if options.quick or options.only else largest_pictures()
    for way, side in pictures.items():
        console.print(f"largest picture in 16 GiB, {way}: {side} x {side}")
    if options.quick or options.only:
        return
    RESULTS.mkdir(exist_ok=True)
    where = {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}
    (RESULTS / "flows.json").write_text(json.dumps({**where, "flows": results, "pictures": pictures}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
