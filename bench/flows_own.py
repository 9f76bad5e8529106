"""Our own flows beside those of zuko and normflows: held-out log-likelihood at equal parameters, and the time of a step.

    python bench/flows_own.py            # JSON under bench/results, and a table
    python bench/flows_own.py --quick    # few steps, on the screen

Two data sets: two moons, and the table of 8x8 digits that scikit-learn ships (UCI, 1,797 rows of 64 features), dequantised by
uniform noise and standardised. Three kinds of flows: affine couplings, spline couplings, autoregressive splines. The peers'
networks are as wide as makes their number of parameters closest to ours. All train with the same batches, by Adam with a cosine
schedule; the parameters that are best on a validation set are those whose log-likelihood is told, of data that no training has
seen. Time is that of a step on a batch, contenders by turns in one process; ratios are medians of rounds, over zuko.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import revhooks
from revhooks import flows
from revhooks.profiler.meters import alternate

RESULTS = Path(__file__).parent / "results"
BINS, BOUND = 8, 5.0


class Data(NamedTuple):
    name: str
    train: Tensor
    validation: Tensor
    test: Tensor

    @property
    def features(self) -> int:
        return self.train.shape[1]


def two_moons() -> Data:
    from sklearn.datasets import make_moons

    parts = [make_moons(size, noise=0.05, random_state=seed)[0] for seed, size in enumerate((20000, 5000, 10000))]
    return Data("two moons", *(torch.tensor(part, dtype=torch.float32) for part in parts))


def digits() -> Data:
    from sklearn.datasets import load_digits

    generator = torch.Generator().manual_seed(0)
    table = torch.tensor(load_digits().data, dtype=torch.float32)
    table = table + torch.rand(table.shape, generator=generator)
    table = table[torch.randperm(len(table), generator=generator)]
    train, validation, test = table.split([1200, 250, len(table) - 1450])
    mean, std = train.mean(0), train.std(0)
    return Data("digits", *((part - mean) / std for part in (train, validation, test)))


# ------------------------------------------------------------------------------------------- contenders

Model = nn.Module
LogProb = Callable[[Model, Tensor], Tensor]


class Contender(NamedTuple):
    """A library's flow of a kind, by the width of its networks, and how its log-density is asked for."""

    library: str
    make: Callable[[int, int], Model]
    log_prob: LogProb


def ours(kind: str, pairs: int) -> Contender:
    made: dict[str, Callable[[int, int], Model]] = {
        "affine couplings": lambda features, width: flows.RealNVP(features, transforms=pairs, hidden=(width, width)),
        "spline couplings": lambda features, width: flows.NSF(
            features, transforms=pairs, hidden=(width, width), bins=BINS, bound=BOUND
        ),
        "autoregressive splines": lambda features, width: flows.MAF(
            features, transforms=pairs, hidden=(width, width), bins=BINS, bound=BOUND
        ),
    }
    return Contender("revhooks", made[kind], lambda model, x: model(x))


def of_zuko(kind: str, pairs: int) -> Contender:
    import zuko
    from zuko.flows.coupling import GeneralCouplingTransform
    from zuko.lazy import UnconditionalDistribution

    def couplings(features: int, width: int) -> Model:
        masks = [torch.arange(features) % 2 == i % 2 for i in range(2 * pairs)]
        spline = {"univariate": zuko.transforms.MonotonicRQSTransform, "shapes": [(BINS,), (BINS,), (BINS - 1,)]}
        each = [GeneralCouplingTransform(features, mask=mask, hidden_features=(width, width), **spline) for mask in masks]
        base = UnconditionalDistribution(zuko.distributions.DiagNormal, torch.zeros(features), torch.ones(features), buffer=True)
        return zuko.flows.Flow(each, base)

    made: dict[str, Callable[[int, int], Model]] = {
        "affine couplings": lambda features, width: zuko.flows.RealNVP(
            features, transforms=2 * pairs, hidden_features=(width, width)
        ),
        "spline couplings": couplings,
        "autoregressive splines": lambda features, width: zuko.flows.NSF(
            features, transforms=pairs, bins=BINS, hidden_features=(width, width)
        ),
    }
    return Contender("zuko", made[kind], lambda model, x: model().log_prob(x))


def of_normflows(kind: str, pairs: int) -> Contender:
    import normflows as nf

    def affine(features: int, width: int) -> list[nn.Module]:
        half = features // 2
        net = nf.nets.MLP([half, width, width, 2 * (features - half)], init_zeros=True)
        return [nf.flows.AffineCouplingBlock(net), nf.flows.Permute(features, mode="swap")]

    def spline(features: int, width: int) -> list[nn.Module]:
        coupling = nf.flows.CoupledRationalQuadraticSpline(features, 1, width, num_bins=BINS, tail_bound=BOUND)
        return [coupling, nf.flows.LULinearPermute(features)]

    def autoregressive(features: int, width: int) -> list[nn.Module]:
        layer = nf.flows.AutoregressiveRationalQuadraticSpline(features, 1, width, num_bins=BINS, tail_bound=BOUND)
        return [layer, nf.flows.LULinearPermute(features)]

    made = {"affine couplings": affine, "spline couplings": spline, "autoregressive splines": autoregressive}
    count = pairs if kind == "autoregressive splines" else 2 * pairs

    def make(features: int, width: int) -> Model:
        layers = [layer for _ in range(count) for layer in made[kind](features, width)]
        return nf.NormalizingFlow(nf.distributions.DiagGaussian(features, trainable=False), layers)

    return Contender("normflows", make, lambda model, x: model.log_prob(x))


LIBRARIES = {"revhooks": ours, "zuko": of_zuko, "normflows": of_normflows}
KINDS = {"affine couplings": (4, 64), "spline couplings": (2, 64), "autoregressive splines": (2, 64)}  # pairs, our width


def size_of(model: Model) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def as_large(contender: Contender, features: int, parameters: int) -> Model:
    """The contender's model whose number of parameters is closest to that."""
    low, high = 2, 512
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size_of(contender.make(features, middle)) <= parameters else (low, middle)
    width = min((low, high), key=lambda one: abs(size_of(contender.make(features, one)) - parameters))
    torch.manual_seed(0)
    return contender.make(features, width)


# ------------------------------------------------------------------------------------------- measures


@torch.no_grad()
def mean_log_prob(contender: Contender, model: Model, x: Tensor) -> float:
    model.eval()
    found = contender.log_prob(model, x).mean().item()
    model.train()
    return found


def train(contender: Contender, model: Model, data: Data, *, steps: int, batch: int, lr: float) -> float:
    """The log-likelihood of the test data by the parameters that are best on the validation data."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best, kept = -float("inf"), copy.deepcopy(model.state_dict())
    for step in range(steps):
        rows = torch.randint(len(data.train), (batch,), generator=generator)
        loss = -contender.log_prob(model, data.train[rows]).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        if step % max(steps // 20, 1) == 0 or step == steps - 1:
            found = mean_log_prob(contender, model, data.validation)
            if found > best:
                best, kept = found, copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)
    return mean_log_prob(contender, model, data.test)


class Step:
    """A training step without the optimizer's."""

    def __init__(self, contender: Contender, model: Model, x: Tensor, *, reversible: bool) -> None:
        self.contender, self.model, self.x = contender, model, x
        self.reversible = reversible

    def __call__(self) -> None:
        self.model.zero_grad()
        if not self.reversible:
            self._step()
            return
        with revhooks.reversible():
            self._step()

    def _step(self) -> None:
        (-self.contender.log_prob(self.model, self.x).mean()).backward()


def held(step: Step) -> dict[str, int]:
    with revhooks.reversible() as run:
        loss = -step.contender.log_prob(step.model, step.x).mean()
        found = run.stats.held_bytes
        loss.backward()
    return {"saved_bytes": run.stats.packed_bytes, "held_bytes": found}


def measure(data: Data, kind: str, *, steps: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each library."""
    pairs, width = KINDS[kind]
    contenders = {name: make(kind, pairs) for name, make in LIBRARIES.items()}
    torch.manual_seed(0)
    own = contenders["revhooks"].make(data.features, width)
    models = {name: own if name == "revhooks" else as_large(one, data.features, size_of(own)) for name, one in contenders.items()}
    batch = data.train[:256]
    timed = {name: Step(contenders[name], model, batch, reversible=False) for name, model in models.items()}
    for step in timed.values():
        step()
    timed["revhooks, reversible()"] = Step(contenders["revhooks"], own, batch, reversible=True)
    for _ in range(3):  # first steps learn
        timed["revhooks, reversible()"]()
    times = dict(zip(timed, alternate(list(timed.values()), rounds=rounds, warmup=3), strict=True))
    memory = held(timed["revhooks, reversible()"])
    rows = []
    for name, taken in times.items():
        row: dict[str, Any] = {"data": data.name, "kind": kind, "contender": name}
        row["ms"] = round(statistics.median(taken) / 1e6, 2)
        row["over_zuko"] = round(statistics.median(a / b for a, b in zip(taken, times["zuko"], strict=True)), 3)
        if name in models:
            row["parameters"] = size_of(models[name])
            fresh = models[name]
            row["log_likelihood"] = round(train(contenders[name], fresh, data, steps=steps, batch=256, lr=3e-3), 4)
        else:
            row |= memory
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    shown = Table("data", "kind", "contender", "parameters", "log-likelihood", "ms", "over zuko")
    for row in rows:
        cells = [row.get(key, "") for key in ("data", "kind", "contender", "parameters", "log_likelihood", "ms", "over_zuko")]
        shown.add_row(*map(str, cells))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps and rounds; nothing is written")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    steps, rounds = ({"two moons": 60, "digits": 30}, 5) if options.quick else ({"two moons": 800, "digits": 200}, 20)
    started, rows = time.perf_counter(), []
    for data in (two_moons(), digits()):
        for kind in KINDS:
            found = measure(data, kind, steps=steps[data.name], rounds=rounds)
            Console(stderr=True).print(table(found))  # as it comes
            rows += found
    Console().print(table(rows))
    if options.quick:
        return
    facts: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}
    facts |= {"seconds": round(time.perf_counter() - started), "steps": steps, "rounds": rounds, "rows": rows}
    (RESULTS / "flows_own.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
