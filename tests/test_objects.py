"""Objects among the arguments of a call that it changes: a replay gets them as they were, and leaves them as they are."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import revhooks
from revhooks import nn as rnn
from revhooks.errors import RevhooksError
from tests.conftest import Counts, Notes

WIDTH, HEADS, DEPTH = 16, 2, 3
X = torch.linspace(-1, 1, 2 * 5 * WIDTH, dtype=torch.float64).reshape(2, 5, WIDTH)


class Entry:
    """One layer's keys and values, made at the first call, as in Hugging Face's ``DynamicLayer``."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            self.keys, self.values = k, v
        else:
            self.keys, self.values = torch.cat([self.keys, k], 1), torch.cat([self.values, v], 1)
        return self.keys, self.values


class Cache:
    """All layers' entries: a list that grows, and what else such objects have."""

    def __init__(self, entries: int = 0) -> None:
        self.entries = [Entry() for _ in range(entries)]
        self.lock = threading.Lock()
        self.seen = 0
        self.owner = self  # a cycle

    def update(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        self.seen += 1
        while len(self.entries) <= layer:
            self.entries.append(Entry())
        return self.entries[layer].update(k, v)


class Dicts:
    """Tuples in a dictionary of a subclass, a deque and a set of what was seen, and a marker."""

    class Mode(Enum):
        GROWS = 1

    def __init__(self) -> None:
        self.pairs: defaultdict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self.order: deque[int] = deque()
        self.layers: set[int] = set()
        self.named: OrderedDict[str, int] = OrderedDict()
        self.mode = Dicts.Mode.GROWS

    def update(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        assert self.mode is Dicts.Mode.GROWS
        self.order.append(layer)
        self.layers.add(layer)
        self.named[str(layer)] = len(self.order)
        kept = self.pairs[f"layer {layer}"]
        kept.append((k, v))
        return torch.cat([a for a, _ in kept], 1), torch.cat([b for _, b in kept], 1)


class Pair(NamedTuple):
    """A cache inside of a tuple."""

    cache: Any
    mask: Tensor | None = None


class Layer(Counts, nn.Module):
    """Attention whose keys and values go through a cache."""

    def __init__(self, index: int, p: float = 0.0) -> None:
        super().__init__()
        self.index = index
        self.norm, self.qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.out, self.p = nn.Linear(WIDTH, WIDTH), p
        self.calls = 0

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        self.calls += 1
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        target = cache.cache if isinstance(cache, Pair) else cache
        if target is not None:
            k, v = target.update(k, v, self.index)
        weights = F.dropout(torch.softmax(q @ k.mT / WIDTH**0.5, -1), self.p)
        return x + self.out(weights @ v)


def net(p: float = 0.0) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(Layer(i, p) for i in range(DEPTH)).double()


Make = Callable[[], Any]
CACHES: dict[str, Make] = {
    "grows": Cache,
    "has its entries": lambda: Cache(DEPTH),
    "dictionaries": Dicts,
    "in a tuple": lambda: Pair(Cache()),
}
KINDS = pytest.mark.parametrize("kind", CACHES)
ENTRIES = pytest.mark.parametrize("entry", ["named", "checkpoint", "keyword", "nested"])
OPS = pytest.mark.parametrize("ops", [True, False], ids=["ops", "no ops"])


def run(layers: nn.ModuleList, x: Tensor, cache: Any, entry: str) -> Tensor:
    def through(x: Tensor, cache: Any) -> Tensor:
        for layer in layers:
            x = revhooks.checkpoint(layer, x, cache=cache) if entry in ("keyword", "nested") else call(layer, x, cache)
        return x

    def call(layer: nn.Module, x: Tensor, cache: Any) -> Tensor:
        return revhooks.checkpoint(layer, x, cache) if entry == "checkpoint" else layer(x, cache)

    return revhooks.checkpoint(through, x, cache) if entry == "nested" else through(x, cache)


def entries_of(cache: Any) -> list[Tensor]:
    """All tensors in a cache."""
    cache = cache.cache if isinstance(cache, Pair) else cache
    if isinstance(cache, Dicts):
        return [tensor for pairs in cache.pairs.values() for pair in pairs for tensor in pair]
    return [tensor for entry in cache.entries for tensor in (entry.keys, entry.values) if tensor is not None]


def outcome(make: Make, entry: str, steps: int, **options: Any) -> tuple[list[Tensor], Any]:
    """Gradients and what the cache has after several calls with it and one backward."""
    layers, cache, losses = net(0.2), make(), torch.zeros((), dtype=torch.float64)
    x = X.clone().requires_grad_()
    torch.manual_seed(1)
    with revhooks.reversible(**options):
        for step in range(steps):
            losses = losses + run(layers, x * (step + 1), cache, entry).square().sum()
        before = entries_of(cache)
        losses.backward()
    after = entries_of(cache)
    assert len(before) == len(after)
    assert all(a is b for a, b in zip(before, after, strict=True))  # backward leaves the objects alone
    found = [x.grad, *(p.grad for p in layers.parameters()), losses.detach(), *(t.detach() for t in after)]
    return [t for t in found if t is not None], cache


@OPS
@ENTRIES
@KINDS
@pytest.mark.parametrize("steps", [1, 3])
def test_a_cache_is_as_it_was(kind: str, entry: str, steps: int, ops: bool) -> None:
    """Keys and values of earlier calls too, gradients through them included."""
    expected, _ = outcome(CACHES[kind], "plain", steps, ops=False)
    options = {"replay": Layer} if entry == "named" else {}
    found, cache = outcome(CACHES[kind], entry, steps, ops=ops, **options)
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    inner = cache.cache if isinstance(cache, Pair) else cache
    if isinstance(inner, Cache):
        assert inner.seen == steps * DEPTH  # no replay has counted
    else:
        assert list(inner.order) == list(range(DEPTH)) * steps


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
def test_under_a_budget(share: float) -> None:
    expected, _ = outcome(Cache, "plain", 2, ops=False)
    with revhooks.reversible(ops=False) as stats:
        run(net(), X.clone().requires_grad_(), Cache(), "plain").sum().backward()
    found, _ = outcome(Cache, "named", 2, replay=Layer, budget=share * 2 * stats.stats.packed_bytes)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_it_is_run_again() -> None:
    """A cache does not mean that everything is kept."""
    layers = net()
    with revhooks.reversible(replay=Layer) as scope:
        run(layers, X.clone().requires_grad_(), Cache(), "named").sum().backward()
    assert [layer.calls for layer in layers] == [2, 2, 1]
    assert scope.stats.replays == 2
    assert not scope.stats.held_bytes


def test_retained_graph_and_double_backward() -> None:
    def go(entry: str) -> list[Tensor]:
        layers, x = net(), X.clone().requires_grad_()
        with revhooks.reversible(replay=Layer if entry == "named" else None):
            loss = run(layers, x, Cache(), entry).square().sum()
            (first,) = torch.autograd.grad(loss, x, retain_graph=True)
            (second,) = torch.autograd.grad(loss, x, create_graph=True)
            (third,) = torch.autograd.grad(second.square().sum(), x)
        return [first, second, third]

    assert all(torch.equal(a, b) for a, b in zip(go("plain"), go("named"), strict=True))


def test_keys_of_a_dropped_cache_are_not_held(no_gc: None) -> None:
    """A replay of one layer does not hold what the others put into the cache."""

    def held(make: Make | None) -> int:
        layers, x = net(), X.clone().requires_grad_()
        with revhooks.reversible(replay=Layer) as scope:
            loss = run(layers, x, make() if make is not None else None, "named").sum()
            bytes_held = scope.stats.held_bytes
            loss.backward()
        return bytes_held

    assert held(Cache) <= held(None)


def test_nothing_survives_a_forward_without_backward(no_gc: None) -> None:
    for make in CACHES.values():
        layers, x, cache = net(), X.clone().requires_grad_(), make()
        with revhooks.reversible(replay=Layer) as scope:
            y = run(layers, x, cache, "named")
            inner = cache.cache if isinstance(cache, Pair) else cache
            if isinstance(inner, Cache):
                inner.owner = None  # type: ignore[assignment]
            reference = weakref.ref(inner)
            del y, cache, inner
            assert reference() is None
            assert not scope.stats.held_bytes


def test_what_was_read_and_is_gone_is_found_out() -> None:
    """A layer reads what another has put there, and puts its own; then the cache goes. An error, not a wrong gradient."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, cache: Cache, index: int) -> Tensor:
            cache.entries[index].keys = self.linear(x).sin()
            return self.linear(x + cache.entries[0].keys).exp()

    def go(*, keep: bool, **options: Any) -> list[Tensor]:
        torch.manual_seed(0)
        module, cache = Reads().double(), Cache(3)
        with revhooks.reversible(**options):
            x = X.clone().requires_grad_()
            y = x
            for index in range(3):
                y = module(y, cache, index)
            if not keep:
                cache.entries.clear()
            y.sum().backward()
        return [t for t in (x.grad, *(p.grad for p in module.parameters())) if t is not None]

    expected, kept = go(keep=False, ops=False), go(keep=True, replay=Reads)
    assert all(torch.equal(a, b) for a, b in zip(expected, kept, strict=True))
    with pytest.raises((RevhooksError, RuntimeError), match="meta"):
        go(keep=False, replay=Reads)


class Static:
    """Keys are written into memory that is there from the start."""

    def __init__(self) -> None:
        self.keys, self.values = torch.zeros(2, 2, 5 * DEPTH, WIDTH, dtype=torch.float64)
        self.used = 0

    def update(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        self.keys[:, self.used : self.used + 5] = k.detach()
        self.values[:, self.used : self.used + 5] = v.detach()
        self.used += 5
        return k + self.keys.sum(1, keepdim=True), v + self.values.sum(1, keepdim=True)


def test_memory_that_is_written_in_place_is_kept() -> None:
    def go(**options: Any) -> tuple[list[Tensor | None], Any]:
        layers, x, cache = net(), X.clone().requires_grad_(), Static()
        with revhooks.reversible(**options) as scope:
            run(layers, x, cache, "named").square().sum().backward()
        return [x.grad, *(p.grad for p in layers.parameters())], scope.stats

    expected, _ = go(ops=False)
    found, stats = go(replay=Layer)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True) if a is not None and b is not None)
    assert not stats.replays


@pytest.mark.parametrize("make", [Cache, dict, list], ids=["object", "dict", "list"])
@pytest.mark.parametrize("kind", ["coupling", "sequential", "registered"])
def test_an_inverted_block_that_changes_an_object_is_kept(kind: str, make: Make) -> None:
    class Put(nn.Module):
        def __init__(self, index: int) -> None:
            super().__init__()
            self.index, self.linear = index, nn.Linear(WIDTH // 2, WIDTH // 2)

        def forward(self, x: Tensor, cache: Any) -> Tensor:
            before = cache.seen if isinstance(cache, Cache) else len(cache)
            if isinstance(cache, Cache):
                cache.seen += 1
            elif isinstance(cache, dict):
                cache[before] = self.index
            else:
                cache.append(self.index)
            return torch.tanh(self.linear(x)) * (1 + before)

    class Third(nn.Module):
        def __init__(self, index: int) -> None:
            super().__init__()
            self.f = Put(index)

        def forward(self, a: Tensor, b: Tensor, cache: Any) -> tuple[Tensor, Tensor]:
            return b, a + self.f(b, cache)

        def inverse(self, a: Tensor, b: Tensor, cache: Any) -> tuple[Tensor, Tensor]:
            return b - self.f(a, cache), a

    revhooks.register(Third, inverse="inverse")

    def build() -> list[nn.Module]:
        torch.manual_seed(0)
        if kind == "coupling":
            return [rnn.AdditiveCoupling(Put(2 * i), Put(2 * i + 1), dim=-1).double() for i in range(DEPTH)]
        if kind == "sequential":
            return [rnn.ReversibleSequential(*(Put(i) for i in range(2 * DEPTH)), dim=-1).double()]
        return [Third(i).double() for i in range(DEPTH)]

    def go(reversible: bool) -> tuple[list[Tensor], Any]:
        blocks, cache, x = build(), make(), X.clone().requires_grad_()
        with revhooks.reversible() if reversible else torch.enable_grad() as scope:
            streams: Any = x.chunk(2, -1) if kind == "registered" else (x,)
            for block in blocks:
                streams = block(*streams, cache)
                streams = streams if isinstance(streams, tuple) else (streams,)
            torch.cat(streams, -1).square().sum().backward()
        seen = cache.seen if isinstance(cache, Cache) else len(cache)
        assert seen == (DEPTH if kind == "registered" else 2 * DEPTH)
        found = [x.grad, *(p.grad for block in blocks for p in block.parameters())]
        return [t for t in found if t is not None], scope.stats if reversible else None

    try:
        expected, _ = go(False)
        found, stats = go(True)
        assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-10) for a, b in zip(expected, found, strict=True))
        assert not stats.held_bytes
    finally:
        revhooks.unregister(Third)


def test_other_objects_are_passed_as_they_are() -> None:
    """What a call does not change is not copied: a marker stays the one that it is."""
    marker = object()

    class Config:
        def __init__(self) -> None:
            self.marker, self.scale = marker, 0.5

    seen = Notes()

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, config: Config, cache: Cache) -> Tensor:
            seen.append(config)
            assert config.marker is marker
            cache.seen += 1
            return torch.tanh(self.linear(x)) * config.scale

    config, cache, module = Config(), Cache(), Scaled().double()
    with revhooks.reversible():
        for _ in range(2):
            revhooks.checkpoint(module, X, config, cache).sum().backward()
    assert len(seen) == 4
    assert all(one is config for one in seen.taken())
    assert cache.seen == 2


@pytest.mark.parametrize("make", [lambda t: defaultdict(list, a=t), lambda t: OrderedDict(a=t)], ids=["defaultdict", "ordered"])
def test_dictionaries_keep_their_type(make: Callable[[Tensor], Any]) -> None:
    noted = Notes()

    def scaled(x: Tensor, scales: dict[str, Tensor]) -> Tensor:
        noted.append((type(scales), getattr(scales, "default_factory", None)))
        return torch.tanh(x) * scales["a"]

    x, scale = X.clone().requires_grad_(), X[0].clone().requires_grad_()
    revhooks.checkpoint(scaled, x, make(scale)).sum().backward()
    kinds = noted.taken()
    assert len(kinds) == 2
    assert kinds[0] == kinds[1]
    expected = torch.autograd.grad((torch.tanh(x) * scale).sum(), (x, scale))
    assert x.grad is not None
    assert scale.grad is not None
    assert torch.equal(x.grad, expected[0])
    assert torch.equal(scale.grad, expected[1])


def test_hugging_face_models_with_their_cache() -> None:
    """Decoders make a cache whenever they are called: ``replay=`` of their layers has to stand it."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 32}
    configs = [
        transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16),
        transformers.LlamaConfig(**sizes, num_key_value_heads=1, max_position_embeddings=16),
        transformers.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=32, decoder_start_token_id=0),
    ]
    ids = torch.arange(12).reshape(2, 6)
    for config in configs:
        torch.manual_seed(0)
        auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
        model = auto.from_config(config).train()
        blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)
        found: list[list[Tensor]] = []
        for options in ({"ops": False}, {"replay": type(blocks[0])}):
            model.zero_grad()
            torch.manual_seed(1)
            with revhooks.reversible(**options) as scope:
                output = model(input_ids=ids, labels=ids)
                assert output.past_key_values is not None
                output.loss.backward()
            found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert scope.stats.replays
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
