"""`revhooks.checkpoint`: the semantics of `torch.utils.checkpoint` without reentrance, and inversion of functions."""

from __future__ import annotations

import functools
import gc
import itertools
import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import checkpoint as torch_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

import revhooks
from revhooks.errors import InversionError, ModifiedError, ReplayError
from tests.conftest import Counts, Notes
from tests.devices import DEVICE

CONTEXTS = pytest.mark.parametrize("inside", [False, True], ids=["alone", "reversible"])
EARLY = pytest.mark.parametrize("early_stop", [True, False])


def wrap(fn: Callable[..., Any]) -> Callable[..., Any]:
    return functools.partial(revhooks.checkpoint, fn)


def theirs(fn: Callable[..., Any]) -> Callable[..., Any]:
    return functools.partial(torch_checkpoint.checkpoint, fn, use_reentrant=False)


def scope(inside: bool) -> Any:
    return revhooks.reversible() if inside else torch.enable_grad()


def chain(x: Tensor) -> Tensor:
    return x.sin().exp().sin()


def grads_inside(x: Tensor) -> Tensor:
    a, b = x.sin().exp().sin(), x.sin().exp().sin()
    torch.autograd.grad(a, x)
    torch.autograd.grad(b, x)
    return x.sin()


def grad(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrapper(x: Tensor) -> Tensor:
        with torch.enable_grad():
            (result,) = torch.autograd.grad(fn(x), inputs=(x,), create_graph=True)
        return result

    return wrapper


NESTS: list[tuple[Callable[..., Any], Callable[..., Any]]] = [
    (lambda f: f, wrap),
    (lambda f: f, lambda f: wrap(wrap(f))),
    (grad, lambda f: grad(wrap(f))),
    (grad, lambda f: grad(wrap(wrap(f)))),
    (lambda f: grad(grad(f)), lambda f: grad(wrap(grad(f)))),
    (lambda f: grad(grad(f)), lambda f: wrap(grad(grad(wrap(f))))),
    (lambda f: grad(grad(f)), lambda f: grad(wrap(grad(wrap(f))))),
]


@EARLY
@CONTEXTS
@pytest.mark.parametrize("fn", [chain, grads_inside])
@pytest.mark.parametrize("nest", range(len(NESTS)))
def test_nested(nest: int, fn: Callable[..., Tensor], inside: bool, early_stop: bool, no_gc: None) -> None:
    plain, ours = NESTS[nest]
    x = torch.randn((), dtype=torch.float64, requires_grad=True)
    with torch_checkpoint.set_checkpoint_early_stop(early_stop), scope(inside):
        expected, got = plain(fn)(x), ours(fn)(x)
        assert torch.equal(expected, got)
        expected, got = (torch.autograd.grad(y, x, allow_unused=True)[0] for y in (expected, got))
    assert expected is got is None or torch.equal(expected, got)


class Count(Counts):
    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.fn(*args, **kwargs)


def case_one(ck: Any) -> tuple[Any, list[Count]]:
    f = Count(chain)
    return ck(f), [f]


def case_two_children(ck: Any) -> tuple[Any, list[Count]]:
    f, g = Count(chain), Count(lambda x: x.cos().sin().exp())
    h = Count(lambda x: ck(g)(ck(f)(x.exp())).sin())
    return ck(h), [f, g, h]


def case_three_deep(ck: Any) -> tuple[Any, list[Count]]:
    a = Count(lambda x: x.exp().sin())
    b = Count(lambda x: ck(a)(x.cos()).exp() * x.sin())
    c = Count(lambda x: ck(b)(x.exp()).cos())
    return ck(c), [a, b, c]


def case_sequence(ck: Any) -> tuple[Any, list[Count]]:
    fs = [Count(chain) for _ in range(3)]
    return (lambda x: functools.reduce(lambda h, f: ck(f)(h), fs, x)), fs


def case_output_only(ck: Any) -> tuple[Any, list[Count]]:
    f = Count(lambda x: (x.exp() + 1).clone())
    return ck(f), [f]


def case_nothing_saved(ck: Any) -> tuple[Any, list[Count]]:
    f = Count(lambda x: x + 1)
    return ck(f), [f]


@EARLY
@CONTEXTS
@pytest.mark.parametrize(
    "case",
    [case_one, case_two_children, case_three_deep, case_sequence, case_output_only, case_nothing_saved],
    ids=lambda case: case.__name__,
)
def test_recompute_counts_are_those_of_torch(case: Any, inside: bool, early_stop: bool) -> None:
    x = torch.randn(3, dtype=torch.float64)
    results = []
    for ck in (theirs, wrap):
        fn, counters = case(ck)
        leaf = x.clone().requires_grad_()
        with torch_checkpoint.set_checkpoint_early_stop(early_stop), scope(inside and ck is wrap):
            fn(leaf * 1).sum().backward()
        results.append((leaf.grad, [c.calls for c in counters]))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_early_stop_spares_the_ops_after_the_last_saved_tensor() -> None:
    class Sines(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.n += func is torch.ops.aten.sin.default
            return func(*args, **(kwargs or {}))

    x = torch.randn(3, requires_grad=True)
    with Sines() as mode:
        revhooks.checkpoint(lambda x: x.exp().sin(), x).sum().backward()
    assert mode.n == 1


@CONTEXTS
def test_what_it_saves_is_let_go_of_at_once(inside: bool) -> None:
    seen = Notes()

    def fn(x: Tensor) -> Tensor:
        h = x.exp()
        seen.append(weakref.ref(h.untyped_storage()))
        return h.sin().sum()

    with scope(inside):
        x = torch.randn(1000, requires_grad=True)
        y = revhooks.checkpoint(fn, x)
        assert torch._C._autograd._saved_tensors_hooks_is_enabled()
        y.backward()
    assert len(seen) == 2


def test_memory_is_that_of_the_inputs() -> None:
    x = torch.randn(1000, requires_grad=True)
    with revhooks.reversible() as run:
        h = x
        for _ in range(5):
            h = revhooks.checkpoint(lambda h: h.sin().exp().sin().exp(), h)
        assert run.stats.held_bytes == 5 * 4000
        assert {kept.why for kept in run.stats.kept} == {"argument of a block: needed to repeat its call"}
        h.sum().backward()
        assert run.stats.held_bytes == 0
        assert run.stats.replays == 5


def test_arguments_and_outputs_of_any_kind() -> None:
    def fn(a: Tensor, table: dict[str, Any], n: int, *, scale: float, names: tuple[str, ...] = ()) -> dict[str, Any]:
        return {"y": (a.exp() * table["b"]).sin() * scale, "n": n + 1, "names": [*names, None], "same": a}

    a, b = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    out = revhooks.checkpoint(fn, a * 1, {"b": b * 1, "c": None}, 3, scale=2.0, names=("x",))
    assert (out["n"], out["names"]) == (4, ["x", None])
    got = torch.autograd.grad(out["y"].sum() + out["same"].sum(), (a, b))
    plain = fn(a * 1, {"b": b * 1}, 3, scale=2.0)
    expected = torch.autograd.grad(plain["y"].sum() + plain["same"].sum(), (a, b))
    assert all(map(torch.equal, got, expected))


@CONTEXTS
def test_one_tensor_given_twice_is_one(inside: bool) -> None:
    """Attention takes another way where query, key and value are one."""
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(3, 5, 8, requires_grad=True)
    leaves = (x, *attention.parameters())
    h = x * 1
    expected = torch.autograd.grad(attention(h, h, value=h)[0].square().sum(), leaves)
    with scope(inside):
        h = x * 1
        loss = revhooks.checkpoint(attention, h, h, value=h)[0].square().sum()
        assert all(map(torch.equal, torch.autograd.grad(loss, leaves), expected))

    class Pair:
        def __init__(self, a: Tensor) -> None:
            self.a, self.b, self.uses = a, a, 0

    def fn(x: Tensor, pair: Pair) -> Tensor:
        pair.uses += 1
        same = pair.a is pair.b
        return (x * pair.a).exp() if same else x.sin().sin()

    y = torch.randn(3, 5, 8)
    with scope(inside):
        (grad,) = torch.autograd.grad(revhooks.checkpoint(fn, x * 1, Pair(y)).sum(), x)
    assert torch.equal(grad, torch.autograd.grad(fn(x * 1, Pair(y)).sum(), x)[0])


def test_self_attention_replayed_by_name() -> None:
    net = nn.Sequential(*[nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(3)])
    x = torch.randn(3, 5, 8, requires_grad=True)
    leaves = (x, *net.parameters())
    results = []
    for replay in (None, nn.MultiheadAttention, (nn.MultiheadAttention, nn.Linear), nn.TransformerEncoderLayer):
        torch.manual_seed(0)
        with revhooks.reversible(replay=replay) if replay else torch.enable_grad():
            results.append(torch.autograd.grad(net(x * 1).square().sum(), leaves))
    assert all(all(map(torch.equal, results[0], result)) for result in results[1:])


def test_no_tensors_and_no_grad() -> None:
    assert revhooks.checkpoint(lambda a, b: a + b, 1, 2) == 3
    with torch.no_grad():
        assert not revhooks.checkpoint(torch.exp, torch.ones(2, requires_grad=True)).requires_grad
    module = nn.Linear(2, 2)
    revhooks.checkpoint(module, torch.ones(1, 2)).sum().backward()  # no input that requires grad
    assert module.weight.grad is not None


@CONTEXTS
def test_generators(inside: bool) -> None:
    numpy = pytest.importorskip("numpy")

    def fn(x: Tensor) -> Tensor:
        y = torch.dropout(x.exp(), 0.5, train=True) * random.random() * float(numpy.random.rand())
        return y.sin() * torch.rand(())

    def run(ck: Any) -> tuple[Tensor, Any]:
        torch.manual_seed(0), random.seed(0), numpy.random.seed(0)
        x = torch.linspace(0, 1, 20, requires_grad=True)
        with scope(inside):
            ck(ck(fn))(x).sum().backward()
        return x.grad, (torch.rand(1).item(), random.random(), numpy.random.rand())

    for _ in range(2):
        expected, got = run(lambda f: f), run(wrap)
        assert torch.equal(expected[0], got[0])
        assert expected[1] == got[1]


def test_buffers_of_modules_it_reaches() -> None:
    """`torch.utils.checkpoint` updates BatchNorm's statistics twice."""
    layers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.utils.spectral_norm(nn.Linear(4, 4)))
    x = torch.randn(8, 4, requires_grad=True)
    state = {k: v.clone() for k, v in layers.state_dict().items()}

    class Owner:
        inner = layers

        def method(self, x: Tensor) -> Tensor:
            return self.inner(x).sin()

    ways = [layers, lambda x: layers(x), functools.partial(lambda m, x: m(x), layers), layers.forward]
    results = []
    for ck, way in [(lambda f: f, layers), *((wrap, way) for way in ways)]:
        layers.load_state_dict(state)
        layers.zero_grad()
        for _ in range(3):
            ck(way)(x * 1).square().mean().backward()
        grads = [p.grad.clone() for p in layers.parameters()]
        results.append((grads, {k: v.clone() for k, v in layers.state_dict().items()}))
    for grads, buffers in results[1:]:
        assert all(map(torch.equal, grads, results[0][0]))
        assert all(torch.equal(buffers[k], results[0][1][k]) for k in buffers)


def test_autocast_is_that_of_the_call() -> None:
    f = nn.Linear(4, 4)
    x = torch.randn(2, 4, requires_grad=True)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = revhooks.checkpoint(lambda x: f(x).sin().exp(), x)
        plain = f(x).sin().exp()
    assert y.dtype is plain.dtype
    assert torch.equal(*(torch.autograd.grad(t.float().sum(), x)[0] for t in (y, plain)))


@CONTEXTS
def test_another_recomputation_raises(inside: bool) -> None:
    calls = itertools.count()

    def other_count(x: Tensor) -> Tensor:
        return x.exp().sin() if next(calls) % 2 == 0 else x.sin() + 1

    def other_shape(x: Tensor) -> Tensor:
        return x.exp().sin() if next(calls) % 2 == 0 else x[:2].exp().sin()

    def other_values(x: Tensor) -> Tensor:  # unnoticed by torch.utils.checkpoint
        return x.exp().sin() if next(calls) % 2 == 0 else (2 * x).exp().sin()

    for fn in (other_count, other_shape, other_values):
        x = torch.linspace(1, 2, 3, requires_grad=True)
        with scope(inside):
            y = revhooks.checkpoint(fn, x * 1)
            with pytest.raises(ReplayError, match="checkpoint"):
                y.sum().backward()
        next(calls)


def test_modified_argument_raises() -> None:
    x = torch.ones(3, requires_grad=True)
    h = x * 1
    y = revhooks.checkpoint(lambda h: h.exp().sin(), h)
    with torch.no_grad():
        h.add_(1)
    with pytest.raises(ModifiedError, match="argument of checkpoint"):
        y.sum().backward()


def test_in_place_inside() -> None:
    def fn(x: Tensor) -> Tensor:
        return (x.exp() * 2).add_(1).relu_().sin()

    def writes_its_input(x: Tensor) -> Tensor:
        return x.mul_(2).exp()

    for f in (fn, writes_its_input):
        x = torch.randn(5, requires_grad=True)
        expected, got = (torch.autograd.grad(ck(f)(x * 1).sum(), x)[0] for ck in (lambda f: f, wrap))
        assert torch.equal(expected, got)


@CONTEXTS
def test_passes(inside: bool) -> None:
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    with scope(inside):
        y = revhooks.checkpoint(chain, x * 1).sum()
        first, second = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
        (once,) = torch.autograd.grad(y, x, create_graph=True)
        (twice,) = torch.autograd.grad(once.sum(), x)
        with pytest.raises(RuntimeError, match="second time"):
            y.backward()
    plain = chain(x * 1).sum()
    (expected,) = torch.autograd.grad(plain, x, create_graph=True)
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
    assert torch.equal(once, expected)
    assert torch.equal(twice, torch.autograd.grad(expected.sum(), x)[0])


def test_errors_leave_nothing_behind(no_gc: None) -> None:
    def fails(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    x = torch.randn(3, requires_grad=True)
    with pytest.raises(KeyboardInterrupt):
        revhooks.checkpoint(fails, x)
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    calls = itertools.count()

    def fails_in_backward(x: Tensor) -> Tensor:
        if next(calls):
            raise ValueError("no")
        return x.exp().sin()

    y = revhooks.checkpoint(fails_in_backward, x * 1).sum()
    with pytest.raises(ValueError, match="no"):
        y.backward()
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    revhooks.checkpoint(chain, x).sum().backward()
    assert torch.allclose(x.grad, torch.autograd.grad(chain(x).sum(), x)[0])


@CONTEXTS
def test_the_graph_dies(inside: bool, no_gc: None) -> None:
    x = torch.randn(1000, requires_grad=True)
    for backward in (False, True):
        with scope(inside):
            h = x * 1
            seen = weakref.ref(h)
            y = wrap(wrap(chain))(h).sum()
            if backward:
                y.backward()
        del h, y
        assert seen() is None


def test_in_and_around_blocks() -> None:
    block = revhooks.nn.AdditiveCoupling(
        nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.3)), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), dim=-1
    ).double()
    inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double()

    class Branch(nn.Module):
        def __init__(self, ck: Any) -> None:
            super().__init__()
            self.inner, self.ck = inner, ck

        def forward(self, x: Tensor) -> Tensor:
            return self.ck(self.inner)(x).sin()

    def net(ck: Any, x: Tensor) -> Tensor:
        outer = revhooks.nn.AdditiveCoupling(Branch(ck), Branch(ck), dim=-1)
        return ck(block)(outer(ck(block)(block(x)))).square().sum()

    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        grads = []
        for ck in (lambda f: f, wrap, theirs):
            torch.manual_seed(0)
            with revhooks.reversible() if ck is not grads else torch.enable_grad():
                grads.append(torch.autograd.grad(net(ck, x), [x, *block.parameters(), *inner.parameters()]))
        for got in grads[1:]:
            assert all(torch.allclose(a, b, atol=1e-12, rtol=0) for a, b in zip(grads[0], got, strict=True))


# -- with an inverse


@pytest.mark.parametrize("activation", [F.silu, F.hardtanh, F.relu])
@CONTEXTS
def test_what_a_dropped_graph_saved_may_be_written_to(inside: bool, activation: Callable[..., Tensor]) -> None:
    gate, linear = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
    x = torch.randn(2, 4, 12, 12, requires_grad=True)

    def fn(x: Tensor) -> Tensor:
        h = linear(x)
        mask = gate(h) > 0  # its graph is gone
        return torch.where(mask, activation(h, inplace=True), h) * 1.5

    leaves = (x, *linear.parameters())
    expected = torch.autograd.grad(fn(x * 1).square().sum(), leaves)
    with scope(inside):
        got = torch.autograd.grad(revhooks.checkpoint(fn, x * 1).square().sum(), leaves)
    assert all(map(torch.equal, got, expected))


def test_what_is_all_rounding_may_round_otherwise() -> None:
    """The mean of what was normalised is next to nothing, and differs after an inversion; it tells nothing of the replay."""

    class Region(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return revhooks.checkpoint(self.norm, x)

    for dtype, tol in ((torch.float64, 1e-10), (torch.float32, 1e-3)):
        branches = [nn.Sequential(nn.BatchNorm2d(4), Region()) if i % 2 else nn.Conv2d(4, 4, 1) for i in range(8)]
        net, x = revhooks.nn.ReversibleSequential(*branches).to(dtype), torch.randn(3, 8, 6, 6, dtype=dtype)
        weights = torch.randn_like(x)
        plain = torch.autograd.grad((net(x) * weights).sum(), list(net.parameters()))
        with revhooks.reversible():
            rev = torch.autograd.grad((net(x) * weights).sum(), list(net.parameters()))
        scale = max(float(grad.abs().max()) for grad in plain)
        assert max(float((a - b).abs().max()) for a, b in zip(plain, rev, strict=True)) < tol * scale


def test_inverse_drops_the_inputs() -> None:
    f, g = (nn.Sequential(nn.Linear(50, 50), nn.Tanh()).double() for _ in range(2))
    counts = [Count(f), Count(g)]

    def forward(x: Tensor, scale: float) -> Tensor:
        a, b = x.chunk(2, -1)
        a = a + scale * counts[0].fn(b)
        return torch.cat((a, b + counts[1].fn(a)), -1)

    def inverse(y: Tensor, scale: float) -> Tensor:
        a, b = y.chunk(2, -1)
        b = b - g(a)
        return torch.cat((a - scale * f(b), b), -1)

    x = torch.randn(8, 100, dtype=torch.float64, requires_grad=True)

    def net(ck: bool, depth: int) -> Tensor:
        h = x * 1.5
        for _ in range(depth):
            h = revhooks.checkpoint(forward, h, 0.5, inverse=inverse) if ck else forward(h, 0.5)
        return h.square().sum()

    leaves = [x, *f.parameters(), *g.parameters()]
    expected = torch.autograd.grad(net(False, 12), leaves)
    for inside in (False, True, True):
        with scope(inside):
            got = torch.autograd.grad(net(True, 12), leaves)
        assert all(torch.allclose(a, b, atol=1e-10, rtol=0) for a, b in zip(got, expected, strict=True))
    held = []
    for depth in (4, 12):
        with revhooks.reversible() as run:
            y = net(True, depth)
            held.append(run.stats.held_bytes)
        del y
    assert held[0] == held[1]


def test_what_is_no_inverse() -> None:
    x = torch.randn(3, requires_grad=True)
    with pytest.warns(revhooks.errors.FallbackWarning, match="lambda"):
        y = revhooks.checkpoint(lambda x: x.exp().exp(), x * 1, inverse=lambda y: y.log())
    assert torch.allclose(torch.autograd.grad(y.sum(), x)[0], (x.exp().exp() * x.exp()))
    with revhooks.reversible(guard="raise"), pytest.raises(InversionError, match="inverse that gives the inputs back"):
        revhooks.checkpoint(lambda x: x.exp().sin(), x * 1, inverse=lambda y: y * 2)


def test_cheap_operations_inside_are_recomputed(no_gc: None) -> None:
    """In the newest region, and in one that is run again: less is there at once, to the bit the same."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 128), nn.Linear(128, 32)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(F.gelu(self.up(self.norm(x))))

    net, x = nn.Sequential(*[Block() for _ in range(4)]), torch.randn(64, 32)
    expected = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    after, peaks = [], []
    for ops in (False, True):
        with revhooks.reversible(replay=Block, ops=ops) as run:
            loss = net(x).square().sum()
            after.append(run.stats.held_bytes)
            for retain in (True, False):
                grads = torch.autograd.grad(loss, list(net.parameters()), retain_graph=retain)
                assert all(map(torch.equal, grads, expected))
            assert run.stats.held_bytes == 0
            peaks.append(run.stats.peak_held_bytes)
    hidden = 64 * 128 * 4
    assert after[0] - after[1] >= hidden
    assert peaks[1] < 0.8 * peaks[0]


def test_a_tensor_that_an_inverted_block_saved_is_no_source() -> None:
    """It comes back up to rounding only, so nothing that must be equal to the bit is made from it."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            return torch.cat([a + self.net(b).sigmoid() * b.tanh(), b], -1)

        def inverse(self, y: Tensor) -> Tensor:
            a, b = y.chunk(2, -1)
            return torch.cat([a - self.net(b).sigmoid() * b.tanh(), b], -1)

    revhooks.register(Shifted, inverse="inverse")
    try:
        net, x = nn.Sequential(nn.Linear(32, 32), *[Shifted() for _ in range(4)]), torch.randn(64, 32)
        with revhooks.reversible():
            y = net(x)
            (y * y.exp()).sum().backward()
    finally:
        revhooks.unregister(Shifted)
    grads = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    y = net(x)
    (y * y.exp()).sum().backward()
    assert all(torch.allclose(a, p.grad, rtol=1e-3, atol=1e-3) for a, p in zip(grads, net.parameters(), strict=True))  # type: ignore[arg-type]


def test_ambient_run_keeps_nothing() -> None:
    x = torch.randn(1000, requires_grad=True)
    y = revhooks.checkpoint(torch.exp, x * 1, inverse=torch.log)
    del y
    gc.collect()
    from revhooks.context import _AMBIENT

    assert _AMBIENT.run.stats.held_bytes == 0


def test_what_is_saved_may_change_where_the_arguments_look_alike() -> None:
    """In dtype, layout, shape or number, from one step to another: a replay is compared with its own call."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.form: Callable[[Tensor], Tensor] = lambda x: x

        def forward(self, x: Tensor) -> Tensor:
            return self.form(x).exp().sin().to(x.dtype).mean() * x

    net, x = nn.Sequential(*[Block() for _ in range(3)]), torch.randn(4, 4, requires_grad=True)
    forms: list[Callable[[Tensor], Tensor]] = [
        lambda x: x,
        lambda x: x.double(),
        lambda x: x.bfloat16(),
        lambda x: x.t(),
        lambda x: x.t().contiguous(),
        lambda x: x[:3],
        lambda x: x.reshape(2, 8),
        lambda x: x.exp().cos(),
    ]
    for turn in range(24):
        for block in net:
            block.form = forms[turn * 5 % len(forms)]
        for _ in range(1 + turn % 3):
            (expected,) = torch.autograd.grad(net(x).sum(), x)
            with revhooks.reversible(replay=Block, ops=False):
                (got,) = torch.autograd.grad(net(x).sum(), x)
            assert torch.equal(got, expected)
