"""Predictions on hollow tensors: they say what is measured, allocate nothing, and find the size that fits."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import ordinary_models as ordinary
from revhooks import nn as rnn
from revhooks.errors import TargetError
from revhooks.hollow import empty, forecast_of, is_hollow
from revhooks.profiler.fitting import fit, integer_keywords, largest
from revhooks.profiler.hollow import Building, Hollow
from revhooks.profiler.predict import OPTIMIZERS, optimizer_bytes, predict
from revhooks.profiler.ways import PLAIN, REVERSIBLE, Way, ways_of
from revhooks.profiler.whatif import Trial
from revhooks.profiler.workload import Workload
from revhooks.record import Choice, Record

pytestmark = pytest.mark.cpu(reason="predicts what a step on the CPU takes")

Built = tuple[Any, ...]


def built(work: Workload) -> Built:
    return work.model, work.inputs, work.loss


def chain(body: Callable[..., nn.Module], depth: int = 2, channels: int = 8) -> Built:
    """The RevNet chain of bench/coupling_chain.py, narrower."""

    def branch() -> nn.Module:
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1, bias=False)]
        return nn.Sequential(*layers)

    fns = [branch() for _ in range(2 * depth)]
    return nn.Sequential(body(fns), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * channels, 10)), torch.randn(
        2, 2 * channels, 32, 32
    )


def couplings(fns: list[nn.Module]) -> nn.Module:
    return nn.Sequential(*[rnn.AdditiveCoupling(f, g) for f, g in zip(fns[::2], fns[1::2], strict=True)])


class _Attention(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        return self.dropout(self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))


def revvit(batch: int = 8, layers: int = 2, width: int = 64, dropout: float = 0.1) -> Built:
    """The net of examples/vit_digits.py, on larger images."""
    branches: list[nn.Module] = []
    for _ in range(layers):
        mlp = [nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)]
        branches += [_Attention(width, dropout), nn.Sequential(*mlp)]

    class RevViT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.layers = nn.Conv2d(3, width, 4, 4), rnn.ReversibleSequential(*branches, dim=-1)
            self.head = nn.Sequential(nn.LayerNorm(2 * width), nn.Linear(2 * width, 10))

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.patches(x).flatten(2).transpose(1, 2)
            return self.head(self.layers(torch.cat([tokens, tokens], -1)).mean(1))

    return RevViT(), torch.randn(batch, 3, 32, 32)


def glow(batch: int = 8, steps: int = 2, width: int = 16) -> Built:
    """One scale of examples/glow_photos.py."""

    def branch() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(6, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
            nn.ReLU(),
            nn.Conv2d(width, 12, 3, padding=1),
        )

    layers: list[nn.Module] = [rnn.Squeeze()]
    for _ in range(steps):
        layers += [rnn.ActNorm(12), rnn.InvertibleConv1x1(12), rnn.AffineCoupling(branch(), branch())]
    flow = rnn.FlowSequential(*layers)

    class Likelihood(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flow = flow

        def forward(self, x: Tensor) -> Tensor:
            z, ladj = self.flow.call_and_ladj(x)
            return (z.square().flatten(1).sum(1) / 2 - ladj).mean()

    return Likelihood(), torch.rand(batch, 3, 32, 32), lambda loss: loss


def autocast(batch: int = 2) -> Built:
    """The first blocks of a ResNet-50 under autocast, channels last, in a model that enters it itself."""

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(*list(ordinary.ResNet50().features.children())[:7]).to(memory_format=torch.channels_last)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.net(x.to(memory_format=torch.channels_last)).float()

    return Cast(), torch.randn(batch, 3, 48, 48)


def ordinary_layers(batch: int = 8) -> Built:
    """Max pooling, dropout, masks, an LSTM, an embedding of integers: what takes values to be decided."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.words = nn.Conv2d(3, 16, 3, padding=1), nn.Embedding(64, 16)
            self.lstm, self.out = nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 16)
            self.register_buffer("mask", torch.tril(torch.ones(128, 128)))

        def forward(self, x: Tensor, words: Tensor) -> Tensor:
            h = F.dropout(F.max_pool2d(F.silu(self.conv(x)), 2).relu(), 0.3, self.training).flatten(2).transpose(1, 2)
            found, _ = self.lstm(self.words(words) * 2)
            scores = (found @ found.transpose(1, 2)).masked_fill(self.mask == 0, float("-inf")).softmax(-1)
            return self.out(F.hardswish(scores @ found)).mean(1) + self.out(h * h.sigmoid()).mean(1)

    return Mixed(), (torch.randn(batch, 3, 32, 32), torch.randint(64, (batch, 128)))


MODELS: dict[str, Callable[[], Built]] = {
    "gpt": lambda: built(ordinary.gpt(2, 2, 64, 96)),
    "gpt, dropout": lambda: built(ordinary.gpt(2, 2, 64, 96, dropout=0.1)),
    "llama": lambda: built(ordinary.llama(2, 2, 64, 96)),
    "gpt2": lambda: built(ordinary.gpt2(2, 2, 48, 48)),
    "resnet110": lambda: built(ordinary.resnet110(4, 1)),
    "resnet50": lambda: built(ordinary.resnet50(2)),
    "revnet": lambda: chain(couplings),
    "revnet, two streams": lambda: chain(lambda fns: rnn.ReversibleSequential(*fns)),
    "revvit": revvit,
    "glow": glow,
    "autocast": autocast,
    "ordinary layers": ordinary_layers,
}


def some_ways(model: nn.Module) -> list[Way]:
    """One of each kind."""
    ways = ways_of(model, budgets=[0.5])
    kinds = {(way.replay is None, way.checkpoint is None, way.share, way.reverse): way for way in reversed(ways)}
    return [way for way in ways if way in kinds.values()]


def measured(build: Callable[[], Built], ways: list[Way]) -> list[Choice]:
    """What real steps take."""
    found: list[Choice] = []
    work = Workload.of(build())
    for way in ways:
        trial = Trial(way, work, work.model)
        trial.plain_bytes = found[0].saved_bytes if found else 0
        trial.measure("")
        assert trial.profile is not None
        found += trial.profile.record.choices
    return found


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "resnet50")) for name in MODELS])
def test_figures_are_those_of_real_steps(name: str) -> None:
    build = MODELS[name]
    try:
        ways = some_ways(Workload.of(build()).model)
    except ordinary.Skipped as skipped:
        pytest.skip(str(skipped))
    record = predict(build, ways=ways, target=name)
    assert record.kind == "prediction"
    assert record.choices[0].saved_bytes > record.choices[1].saved_bytes
    for found, real in zip(record.choices, measured(build, ways), strict=True):
        assert (found.problem, found.how) == ("", "predicted")
        assert found.saved_bytes == pytest.approx(real.saved_bytes, rel=0.05), found.name
        assert found.accounted_peak_bytes == pytest.approx(real.accounted_peak_bytes, rel=0.05), found.name


def test_a_record_has_lines_for_all_that_lies_beside_activations(tmp_path: Path) -> None:
    record = predict(lambda: (nn.Linear(1000, 1000, bias=False), torch.randn(2, 1000)), target="one layer", quick=True)
    assert (record.parameter_bytes, record.gradient_bytes) == (4_000_000, 4_000_000)
    assert (record.optimizer, record.optimizer_bytes) == ("adamw", 8_000_004)
    assert [choice.name for choice in record.choices] == ["plain", "reversible()"]
    assert not record.slices
    assert not any(choice.step_ns or choice.measured_peak_bytes for choice in record.choices)
    assert "CPU" in record.device
    assert max(record.choices[0].timeline.total) == record.choices[0].accounted_peak_bytes
    record.save(tmp_path / "record.json")
    assert Record.load(tmp_path / "record.json") == record


# ------------------------------------------------------------------------------------------- nothing is allocated


class _NothingReal(TorchDispatchMode):
    """Fails where an operation is really run that makes more than this."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not isinstance(tensor, FakeTensor) and not is_hollow(tensor):
                nbytes = tensor.untyped_storage().nbytes()
                assert nbytes <= 1 << 20, func
        return result


def resident() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096


def large(batch: int = 64, tokens: int = 4096) -> Built:
    return built(ordinary.gpt(2, batch, tokens, 16384, 128, dropout=0.1))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident set as Linux has it")
def test_nothing_is_allocated() -> None:
    predict(partial(large, 1, 32), quick=True)  # what is imported and cached is there
    gc.collect()
    before = resident()
    with _NothingReal():
        record = predict(large, ways=some_ways(ordinary.GPT(2, 8, 2, 8)))
    assert record.parameter_bytes > 24 << 30
    assert record.choices[0].accounted_peak_bytes > 300 << 30
    assert not any(choice.problem for choice in record.choices)
    assert resident() - before < 64 << 20


def test_a_meter_of_what_is_real_sees_what_is_real() -> None:
    with _NothingReal(), pytest.raises(AssertionError):
        torch.zeros(1 << 20)


def test_generators_are_as_they_were() -> None:
    before = torch.random.get_rng_state()
    predict(revvit, quick=True)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_later_real_steps_are_as_ever() -> None:
    """What is made once a process and kept, as weights of fingerprints, is not made hollow."""
    from revhooks import fingerprint, projection

    fingerprint._weights.cache_clear()
    projection._signs.cache_clear()
    predict(glow, quick=True)
    x = torch.arange(100_000.0)
    assert not torch.equal(fingerprint.fingerprint(x), fingerprint.fingerprint(x.flip(0)))
    assert float(projection.projection(x, 9)) != 0


# ------------------------------------------------------------------------------------------- hollow tensors


def test_a_hollow_tensor_looks_like_a_real_one() -> None:
    with Hollow():
        x = torch.randn(4, 6, requires_grad=True)
        y = (x.t() @ x).relu()
        y.sum().backward()
    assert type(x) is Tensor
    assert (x.device.type, x.is_meta, x.untyped_storage().nbytes()) == ("cpu", False, 96)
    assert (y.shape, y.stride(), x.grad.shape) == ((6, 6), (6, 1), (4, 6))
    assert is_hollow(x.grad)
    assert not is_hollow(torch.ones(2))


def test_views_and_changes_in_place_share_memory() -> None:
    with Hollow():
        x = torch.empty(8, 8)
        before = x._version
        views = [x.view(64), x[2:, ::2], x.t(), x.unflatten(0, (2, 4)), torch.ops.aten._unsafe_view(x, [4, 16])]
        assert x.mul_(2).add_(x) is x
        assert x._version > before
    assert {view.untyped_storage()._cdata for view in views} == {x.untyped_storage()._cdata}
    assert views[1].storage_offset() == 16


def test_small_tensors_made_of_numbers_have_them() -> None:
    with Hollow():
        indices = torch.arange(6).view(2, 3)
        rates = 1.0 / 10.0 ** torch.linspace(0, 1, 4)
        assert int(indices.sum()) == 15
        assert rates.tolist()[0] == 1.0
        assert torch.tensor([1, 0, 2]).nonzero().shape == (2, 1)
        assert is_hollow(torch.randn(3) * rates[0])


def test_forecasts() -> None:
    with Hollow():
        x = torch.randn(32, 8, 8)
        kept = F.dropout(x, 0.5)
        _, indices = F.max_pool2d(x, 2, return_indices=True)
        mask = torch.empty(9).bernoulli_(0.5).div_(0.5)
        assert (forecast_of(mask).mask, forecast_of(indices).most) == (2.0, 63)
        zeros = {
            name: forecast_of(y).zeros
            for name, y in {"relu": x.relu(), "drop": kept, "linear": x @ x, "pad": F.pad(x, (1, 1))}.items()
        }
        assert zeros == {"relu": True, "drop": True, "linear": False, "pad": True}
        assert not forecast_of(kept.add_(1)).zeros
        assert bool(x.isfinite().all())
        assert float(x.sum()) == 0.0


def looks(result: Any) -> list[tuple[Any, ...]]:
    """What can be seen of tensors without their values."""
    tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    return [(t.shape, t.stride(), t.dtype, t.untyped_storage().nbytes()) for t in tensors]


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a loss in the memory of what it is the mean of": F.mse_loss,
    "its sum": lambda x, y: F.smooth_l1_loss(x, y, reduction="sum"),
    "what is changed in shape": lambda x, y: x.clone().unsqueeze_(0).squeeze_(0).t_(),
    "what is changed in place": lambda x, y: x.clone().add_(y).relu_(),
    "several in one memory": lambda x, y: torch.cat([x, y]).chunk(3, 1),
    "an output given": lambda x, y: torch.add(x, y, out=torch.empty_like(x)),
    "a narrow norm with wide parameters": lambda x, y: torch.native_batch_norm(
        x.bfloat16(), y[0].float(), None, None, None, True, 0.1, 1e-5
    ),
    "its rows": lambda x, y: torch.native_layer_norm(x.bfloat16(), [12], y[0].float(), y[1].float(), 1e-5),
    "along a dimension": lambda x, y: (torch.aminmax(x, dim=0), x.all(1), torch.count_nonzero(x, 1), x.sort(1)),
    "attention": lambda x, y: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*[x.view(2, 4, 6, 2)] * 3),
    "lists": lambda x, y: torch._foreach_mul([x, y], [2.0, 3.0]),
    "a transposed one": lambda x, y: x.t().clone(memory_format=torch.preserve_format) + y.t(),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_inferred_is_what_kernels_give(name: str) -> None:
    operation = OPERATIONS[name]
    with Hollow():
        found = looks(operation(torch.randn(8, 12), torch.randn(8, 12)))
    assert found == looks(operation(torch.randn(8, 12), torch.randn(8, 12)))


def test_a_size_that_depends_on_values_is_named() -> None:
    class Sparse(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y[y > 0]

    with pytest.raises(TargetError, match=r"Sparse|nonzero|index"):
        predict(lambda: (Sparse(8, 8), torch.randn(2, 8)), quick=True)


def test_models_that_are_copied_while_they_are_made_and_ask_for_a_gpu() -> None:
    def build() -> Built:
        layer = nn.TransformerEncoderLayer(1024, 8, 1 << 16, batch_first=True)
        layer.register_buffer("table", torch.zeros(1 << 28))
        model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).to("cuda")
        return model.cuda(), torch.randn(4, 64, 1024, device="cuda")

    record = predict(build, quick=True)
    assert record.parameter_bytes > 4 << 30
    assert "cuda" in record.device
    with Hollow(), Building() as building:
        torch.ones(2, device="cpu")
    assert building.wanted is None


def test_what_is_compiled_is_predicted_as_it_is_eagerly() -> None:
    def build(compiled: bool) -> Built:
        model = nn.Sequential(nn.Linear(1 << 10, 1 << 18), nn.GELU(), nn.Linear(1 << 18, 8))
        if compiled:
            model.compile()
        return model, torch.randn(1 << 12, 1 << 10)

    before = resident()
    compiled, eager = (predict(partial(build, compiled), ways=[PLAIN]).choices[0] for compiled in (True, False))
    assert compiled.saved_bytes == eager.saved_bytes > 4 << 30
    assert resident() - before < 1 << 30


@pytest.mark.near(reason="values of masks are looked at")
def test_a_mask_of_a_hollow_tensor_is_as_large_as_it_is() -> None:
    from revhooks.runtime.handles.codes import code_of

    with Hollow():
        mask, other = torch.empty(1 << 16).bernoulli_(0.5).div_(0.5), torch.randn(1 << 16)
        code, none = code_of(mask, ""), code_of(other, "")
        assert none is None
        assert code is not None
        assert (code.encoded.nbytes, is_hollow(code.encoded)) == (1 << 13, True)
        assert code.tensor(mask_geometry(mask)).shape == mask.shape


def mask_geometry(mask: Tensor) -> Any:
    from revhooks.storage import Geometry

    return Geometry.of(mask)


def test_more_than_there_are_addresses_for_is_an_error() -> None:
    from revhooks.errors import RevhooksError

    with pytest.raises(RevhooksError, match="TiB"):
        empty((1 << 50,), torch.float32)


# ------------------------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize("name", [name for name, (cls, _) in OPTIMIZERS.items() if hasattr(torch.optim, cls)])
def test_optimizers_take_what_real_ones_take(name: str) -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 32, bias=False), nn.Linear(32, 8, bias=False))

    with Hollow():
        found = optimizer_bytes(name, model())
    real = model()
    cls, options = OPTIMIZERS[name]
    for parameter in real.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = getattr(torch.optim, cls)(real.parameters(), **options)
    optimizer.step()
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    assert found == sum(t.untyped_storage().nbytes() for t in tensors)


def test_an_unknown_optimizer_is_an_error() -> None:
    with pytest.raises(TargetError, match=r"'lion'.*"):
        predict(revvit, optimizer="lion")


# ------------------------------------------------------------------------------------------- what fits


def mlp(batch: int = 4, width: int = 64) -> Built:
    layers = [nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()) for _ in range(3)]
    return nn.Sequential(*layers, nn.Linear(width, 4)), torch.randn(batch, width)


def real_total(build: Callable[..., Built], way: Way, **keywords: int) -> int:
    """What a real step takes with all that lies beside it, with AdamW."""
    torch.manual_seed(0)
    work = Workload.of(build(**keywords))
    trial = Trial(way, work, work.model)
    if way.share:
        trial.plain_bytes = measured(partial(build, **keywords), [PLAIN])[0].saved_bytes
    trial.measure("")
    assert trial.profile is not None
    record = trial.profile.record
    beside = record.parameter_bytes + sum(t.nbytes for t in work.inputs) + record.gradient_bytes
    count = sum(1 for _ in work.model.parameters())
    return beside + 2 * record.parameter_bytes + 4 * count + record.choices[0].accounted_peak_bytes


@pytest.mark.parametrize("keyword", ["batch", pytest.param("width", marks=pytest.mark.slow)])
def test_what_fits_fits_and_one_more_does_not(keyword: str) -> None:
    limit = 2 << 20
    ways = some_ways(mlp()[0])
    if keyword == "batch":
        ways = [PLAIN, REVERSIBLE, ways[-1]]
    found = fit(mlp, limit, keyword=keyword, ways=ways)
    assert [one.name for one in found] == [way.name for way in ways]
    for one, way in zip(found, ways, strict=True):
        assert (one.keyword, one.limit_bytes) == (keyword, limit)
        assert one.bytes <= limit
        assert one.bytes == pytest.approx(real_total(mlp, way, **{keyword: one.largest}), rel=0.01)
        assert real_total(mlp, way, **{keyword: one.largest}) <= limit < real_total(mlp, way, **{keyword: one.largest + 1})
    assert found[0].largest < found[1].largest if keyword == "batch" else found[0].largest <= found[1].largest


def test_sizes_that_fail_leave_multiples_of_the_default() -> None:
    def build(width: int = 48) -> Built:
        return nn.MultiheadAttention(width, 6, batch_first=True), (*[torch.randn(2, 4, width)] * 3,), lambda found: found[0].sum()

    (found,) = fit(build, 8 << 20, ways=[PLAIN])
    assert found.largest > 48
    assert found.largest % 48 == 0


def test_nothing_fits() -> None:
    (found,) = fit(lambda batch=8: (nn.Linear(64, 64), torch.randn(batch, 64)), 100, ways=[PLAIN])
    assert (found.largest, found.bytes > 100) == (0, True)


def test_a_keyword_that_memory_does_not_depend_on_is_an_error() -> None:
    with pytest.raises(TargetError, match="memory depends on"):
        fit(lambda seed=1: (nn.Linear(64, 64), torch.randn(seed * 0 + 2, 64)), 1 << 30, ways=[PLAIN])


def test_which_keyword() -> None:
    def build(x: Tensor, batch: int, depth: int = 2, scale: float = 1.0, *, bias: bool = True, **rest: int) -> None: ...

    assert integer_keywords(build) == {"batch": None, "depth": 2}
    with pytest.raises(TargetError, match=r"batch, width.*--vary"):
        fit(mlp, 1 << 20)
    with pytest.raises(TargetError, match=r"'depth'.*batch, width"):
        fit(mlp, 1 << 20, keyword="depth")
    with pytest.raises(TargetError, match="none"):
        fit(lambda: None, 1 << 20)


@pytest.mark.parametrize("limit", [0, 9, 10, 11, 1000, 123_456_789])
@pytest.mark.parametrize("start", [1, 7, 1000])
@pytest.mark.parametrize(
    "total", [lambda n: 3 + 7 * n, lambda n: n * n, lambda n: 10 + 4096 * (n // 3), lambda n: 2 ** min(n, 200)]
)
def test_the_search_finds_the_edge(total: Callable[[int], int], start: int, limit: int) -> None:
    asked: list[int] = []

    def counted(size: int) -> int:
        asked.append(size)
        return total(size)

    size, nbytes = largest(counted, limit, start)
    assert total(size) <= limit if size else limit < total(1)
    assert limit < total(size + 1)
    assert nbytes == total(size or 1)
    assert len(asked) < 64
    assert len(set(asked)) == len(asked)


def test_the_search_of_a_line_takes_few_steps() -> None:
    asked: list[int] = []

    def line(size: int) -> int:
        asked.append(size)
        return 1000 + 37 * size

    assert largest(line, 10**9, 8)[0] == (10**9 - 1000) // 37
    assert len(asked) <= 8


def test_a_targets_own_error_is_told() -> None:
    def build() -> Built:
        raise ValueError("no such size")

    with pytest.raises(TargetError, match="ValueError: no such size"):
        predict(build)
    with pytest.raises(TargetError, match="expected"):
        predict(lambda: 3)


def test_a_way_that_fails_is_a_problem_of_its_own() -> None:
    class Twice(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            if "forward" in vars(self):
                raise RuntimeError("not like this")
            return super().forward(x)

    blocks = [Twice(nn.Linear(64, 64), nn.ReLU()) for _ in range(3)]
    record = predict(lambda: (nn.Sequential(*blocks), torch.randn(8, 64)))
    assert record.choice("checkpoint Twice").problem  # type: ignore[union-attr]
    assert not record.choice(REVERSIBLE.name).problem  # type: ignore[union-attr]
