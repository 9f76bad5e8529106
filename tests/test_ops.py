"""Ordinary layers: what is recomputed is bit-equal, holds less than plain autograd and never more, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import revhooks
from revhooks.errors import ModifiedError, ReplayError
from revhooks.runtime.handles import codes
from revhooks.runtime.recompute import recipe
from revhooks.runtime.recompute.recipe import TRUSTED
from tests.devices import DEVICE, generator

Net = Callable[[Tensor], Tensor]


def compare(net: nn.Module, *inputs: Tensor, less: float | None = None, steps: int = 2, **options: Any) -> Any:
    """Some steps plain and reversible, from one seed: bitwise the same. ``less``: the share of saved bytes to be spared."""
    results = []
    for reverse in (False, True):
        model = copy.deepcopy(net)
        leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
        torch.manual_seed(1)
        seen = []
        for _ in range(steps):
            model.zero_grad()
            with revhooks.reversible(**options) if reverse else torch.enable_grad() as run:
                value = model(*leaves).float().square().mean()
                if reverse:
                    assert run.stats.held_bytes <= run.stats.packed_bytes, run.stats
                    if less is not None:
                        assert run.stats.held_bytes <= (1 - less) * run.stats.packed_bytes, run.stats
                value.backward()
            if reverse:
                assert run.stats.held_bytes == 0, run.stats.kept
            seen += [value.detach(), *[t.grad.clone() for t in (*leaves, *model.parameters()) if t.grad is not None]]
            seen += [b.clone() for b in model.buffers()]
        results.append([*seen, torch.rand(1)])
    assert len(results[0]) == len(results[1])
    assert all(map(torch.equal, *results))
    return run


class Apply(nn.Module):
    """A function between two linear layers, so that what it makes is saved."""

    def __init__(self, fn: Net, width: int = 32, out: int = 32, **modules: nn.Module) -> None:
        super().__init__()
        self.first, self.fn, self.last = nn.Linear(width, width), fn, nn.Linear(out, 4)
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.fn(self.first(x)))


ACTIVATIONS: dict[str, Net] = {
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "elu": lambda x: F.elu(x, 0.7),
    "selu": F.selu,
    "celu": lambda x: F.celu(x, 1.3),
    "leaky relu": lambda x: F.leaky_relu(x, 0.2),
    "softplus": lambda x: F.softplus(x, beta=2, threshold=5),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "relu6": F.relu6,
    "mish": F.mish,
    "logsigmoid": F.logsigmoid,
    "sin": torch.sin,
    "square": lambda x: x**2,
    "swish by hand": lambda x: x * torch.sigmoid(1.702 * x),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "exp": lambda x: torch.exp(-x.square()),
    "scaled": lambda x: F.silu(x) * 0.5 / 3.0,
    "residual": lambda x: F.gelu(x) + F.silu(x) - 0.5 * x.sin(),
    "pad": lambda x: F.pad(F.gelu(x), (0, 0))[..., :32],
    "cat": lambda x: torch.cat([F.gelu(x[..., :16]), F.silu(x)[..., 16:]], -1),
    "transposed": lambda x: F.gelu(x).transpose(0, 1).reshape(x.shape),
    "half": lambda x: F.gelu(x).to(torch.bfloat16).float(),
    "in place": lambda x: F.relu_(x * 2),
    "in place twice": lambda x: (x * 2).add_(x).relu_(),
    "dropout": lambda x: F.dropout(F.gelu(x), 0.3),
    "view": lambda x: F.gelu(x).view(-1, 16).view(x.shape),
    "layer norm without affine": lambda x: F.layer_norm(x, (32,)),
    "group norm": lambda x: F.group_norm(x.reshape(-1, 32), 4).reshape(x.shape),
    "rms norm": lambda x: F.rms_norm(x, (32,)),
}
SPARES = {
    "gelu", "gelu tanh", "silu", "elu", "selu", "leaky relu", "softplus", "hardswish", "hardsigmoid", "relu6", "mish", "sin",
    "square", "swish by hand", "scaled", "transposed", "view", "layer norm without affine", "group norm", "rms norm",
}  # fmt: skip


@pytest.mark.parametrize("shape", [(64, 32), (8, 16, 32)], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str, shape: tuple[int, ...], no_gc: None) -> None:
    compare(Apply(ACTIVATIONS[name]), torch.randn(*shape), less=0.2 if name in SPARES else None)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer norm": lambda: nn.LayerNorm(32),
    "layer norm, other eps": lambda: nn.LayerNorm(32, eps=1e-6),
    "layer norm, odd eps": lambda: nn.LayerNorm(32, eps=3.3e-5),
    "layer norm without bias": lambda: nn.LayerNorm(32, bias=False),
    "rms norm": lambda: nn.RMSNorm(32),
    "batch norm": lambda: nn.BatchNorm1d(32),
    "batch norm, relu": lambda: nn.Sequential(nn.BatchNorm1d(32), nn.ReLU()),
    "batch norm, relu in place": lambda: nn.Sequential(nn.BatchNorm1d(32), nn.ReLU(inplace=True)),
    "batch norm, cumulative": lambda: nn.BatchNorm1d(32, momentum=None),
    "batch norm without affine": lambda: nn.BatchNorm1d(32, affine=False),
    "batch norm without statistics": lambda: nn.BatchNorm1d(32, track_running_stats=False),
    "group norm": lambda: nn.GroupNorm(4, 32),
}


@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("name", NORMS)
def test_norms(name: str, mode: str) -> None:
    """Statistics are updated once; in eval they are not touched."""
    net = nn.Sequential(nn.Linear(32, 32), NORMS[name](), nn.Linear(32, 4))
    for p in net[1].parameters():
        nn.init.normal_(p)
        p.requires_grad_(mode != "frozen")
    if mode == "eval":
        net(torch.randn(64, 32))
        net.eval()
    compare(net, torch.randn(64, 32), less=0.2 if mode != "frozen" and "odd" not in name and "without b" not in name else None)


class Block(nn.Module):
    """A transformer's, pre-norm."""

    def __init__(self, width: int = 64, norm: type[nn.Module] = nn.LayerNorm, dropout: float = 0.0, gated: bool = False) -> None:
        super().__init__()
        self.n1, self.n2 = norm(width), norm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, (8 if gated else 4) * width), nn.Linear(4 * width, width)
        self.gated, self.p = gated, dropout

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (s.view(b, t, 4, -1).transpose(1, 2) for s in self.qkv(self.n1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d)
        x = x + F.dropout(self.out(y), self.p, self.training)
        h = self.up(self.n2(x))
        h = F.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1] if self.gated else F.gelu(h)
        return x + F.dropout(self.down(h), self.p, self.training)


FUSED = DEVICE.type in ("cpu", "cuda")  # attention is one operation, which does not save its weights


def test_transformers_spare_a_third() -> None:
    x, more = torch.randn(2, 64, 64), 0.0 if FUSED else 0.1
    compare(nn.Sequential(*[Block() for _ in range(3)]), x, less=0.33 - more)
    compare(nn.Sequential(*[Block(norm=nn.RMSNorm, gated=True) for _ in range(3)]), x, less=0.35 - more)
    compare(nn.Sequential(*[Block(dropout=0.1) for _ in range(3)]), x, less=0.33 - more)
    layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.1, batch_first=True, activation="gelu", norm_first=True)
    compare(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), x, less=0.2 - more)


class Residual(nn.Module):
    def __init__(self, width: int, inplace: bool) -> None:
        super().__init__()
        self.c1, self.c2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.b1, self.b2, self.relu = nn.BatchNorm2d(width), nn.BatchNorm2d(width), nn.ReLU(inplace)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        h = self.b2(self.c2(self.relu(self.b1(self.c1(x)))))
        h = h.add_(x) if self.inplace else h + x
        return self.relu(h)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_residual_nets_spare_two_fifths(inplace: bool, layout: torch.memory_format) -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), *[Residual(16, inplace) for _ in range(12)]).to(memory_format=layout)
    run = compare(net, torch.randn(4, 3, 18, 18).to(memory_format=layout), less=0.4)
    assert run.stats.peak_held_bytes < 0.75 * run.stats.packed_bytes  # a long chain of recipes is not unrolled at once


@pytest.mark.parametrize("layer", [nn.MaxPool2d(2), nn.Dropout(0.4)])
def test_masks_and_indices_take_less(layer: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU saves numbers as a dropout's mask, a device truth values, of which there is less to spare."""
    monkeypatch.setattr(codes, "WORTH_WAITING", 0)  # on a device small ones are not read
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Tanh(), layer)
    compare(net, torch.randn(4, 3, 32, 32), less=0.15 if DEVICE.type == "cpu" or isinstance(layer, nn.MaxPool2d) else 0.09)


def test_a_mask_that_its_user_holds_is_left_alone() -> None:
    mask = (torch.rand(64, 512) > 0.5).float()
    x = torch.randn(64, 512, requires_grad=True)
    with revhooks.reversible() as run:
        y = (x * mask).sum()
        assert run.stats.held_bytes == mask.nbytes  # as in plain autograd, and shared with the user
        y.backward()


def test_one_memory_is_counted_and_kept_once() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    with revhooks.reversible() as run:
        h = x * 2
        y = (h.sin() * h.t().cos() * h.view(-1).view(64, 64).exp()).sum()
        y.backward(retain_graph=True)
        expected = x.grad.clone()
        x.grad = None
        y.backward()
    assert torch.equal(expected, x.grad)
    assert run.stats.held_bytes == 0


# -- attacks


def test_changes_under_no_grad_are_seen() -> None:
    """The graph does not know of them; plain autograd saves what is there."""
    net = nn.Linear(32, 4)
    for edit in (lambda h: h.mul_(2), lambda h: h[3:5].zero_(), lambda h: h.clamp_(min=0.1), lambda h: h.add_(0.25)):
        for fn in (F.gelu, F.relu, lambda t: F.relu_(t * 1), lambda t: F.layer_norm(t, (32,))):
            grads = []
            for reverse in (False, True):
                torch.manual_seed(0)
                x = torch.randn(64, 32, requires_grad=True)
                net.zero_grad()
                with revhooks.reversible() if reverse else torch.enable_grad():
                    h = fn(x * 1.5)
                    with torch.no_grad():
                        edit(h)
                    try:
                        net(h).sum().backward()
                    except RuntimeError:  # ReLU's own result was changed: both must say so
                        grads.append(None)
                        continue
                grads.append((net.weight.grad.clone(), x.grad))
            assert (grads[0] is None) == (grads[1] is None)
            assert grads[0] is None or all(map(torch.equal, *grads))


@pytest.mark.parametrize("edited", [F.gelu, lambda t: F.gelu(t) * 2.0, lambda t: (F.gelu(t) * 2.0).relu()])
def test_changes_that_are_rare_are_seen(edited: Net) -> None:
    """`torch.cosine_similarity` clamps norms under `torch.no_grad`: without effect as long as no row is zero."""
    net = nn.Linear(32, 4)
    x = torch.randn(64, 32, requires_grad=True)

    def clamped(least: float) -> Tensor:
        h = edited(x * 1.5)
        with torch.no_grad():
            h.clamp_(min=least)
        return torch.autograd.grad(net(h).sum(), net.weight)[0]

    rare = float(edited(x * 1.5).detach().amin()) + 1e-3  # at one element of 2048
    for least in (-100.0, rare) * 3:
        outcomes: list[Tensor | None] = []
        for context in (contextlib.nullcontext(), revhooks.reversible()):
            with context:
                try:
                    outcomes.append(clamped(least))
                except RuntimeError:  # ReLU's own result was changed: both must say so
                    outcomes.append(None)
        expected, got = outcomes
        assert (expected is None) == (got is None)
        assert expected is None or torch.equal(expected, got)
    for last in (1.0, 1.0, 0.0):
        rows = torch.ones(8, 1).index_fill(0, torch.tensor(7), last)
        grads = []
        for context in (contextlib.nullcontext(), revhooks.reversible()):
            with context:
                grads.append(torch.autograd.grad(F.cosine_similarity(x[:8] * rows, x[8:16]).sum(), x)[0])
        assert torch.equal(*grads)


@pytest.mark.near(reason="every site is compared in every step there, elsewhere by turns")
def test_edits_that_autograd_does_not_see_are_caught() -> None:
    """One that is there the first time makes the tensor be kept; one that comes later raises, and the next step is right."""
    net, norm = nn.Linear(32, 4), nn.BatchNorm1d(32)
    x = torch.randn(64, 32, requires_grad=True)

    def activated(edit: Callable[[Tensor], object]) -> Tensor:
        h = F.gelu(x * 1.5)
        edit(h)
        return torch.autograd.grad(net(h).sum(), net.weight)[0]

    def normed(edit: Callable[[Tensor], object]) -> Tensor:
        h = norm(net.weight.new_ones(64, 1) * x)
        edit(h)
        return torch.autograd.grad(net(h.relu()).sum(), net.weight)[0]

    def of_a_column(h: Tensor) -> None:
        h.data[:, 7] = 100.0

    def of_one_element(h: Tensor) -> None:
        with torch.no_grad():
            h[7, 7] = 100.0

    def always(h: Tensor) -> None:
        h.data.mul_(2)

    # what is edited is what is rebuilt: some elements are compared; where nobody saved it: the bits of all
    for step, edit, name in ((activated, of_a_column, "Gelu"), (normed, of_one_element, "Relu after NativeBatchNorm")):
        expected, edited = step(lambda h: None), step(edit)
        with revhooks.reversible() as run:
            for _ in range(TRUSTED):
                assert torch.equal(step(lambda h: None), expected)
            with pytest.raises(ReplayError, match=name):
                step(edit)
            assert torch.equal(step(edit), edited)
            assert torch.equal(step(lambda h: None), expected)
        assert run.stats.held_bytes == 0

    def other_site() -> Tensor:
        h = F.gelu(x * 1.5)
        always(h)
        return torch.autograd.grad(net(h).sum(), net.weight)[0]

    expected = other_site()
    with revhooks.reversible():
        assert torch.equal(other_site(), expected)
        assert torch.equal(other_site(), expected)


def test_what_the_attacks_have_found() -> None:
    x = torch.randn(16, 64, 4, 4)
    compare(nn.Sequential(nn.Conv2d(64, 64, 1), nn.GroupNorm(32, 64), nn.SiLU(), nn.Conv2d(64, 8, 1)), x, less=0.2)
    for fn in (
        lambda t: torch.cat([t[:, -8:].sigmoid(), t[:, :-8].exp()], 1),
        lambda t: F.pad(F.gelu(t), (1, 2), value=3.0)[:, :32],
        lambda t: F.pad(F.gelu(t), (-1, 1)),
        lambda t: torch.linalg.qr(t)[1].sigmoid() * t[:32],
        lambda t: F.batch_norm(t, None, None, None, torch.ones(32), training=True).relu(),
        lambda t: (torch.complex(t, t) * 2j).abs(),
        lambda t: F.layer_norm(t * 300, (32,), eps=2e-5),
        lambda t: F.layer_norm(torch.where(t > 3, torch.nan, t), (32,)).nan_to_num(),
        lambda t: F.layer_norm(t, (32,), eps=1e-5) + F.layer_norm(t, (32,), eps=3e-5),
    ):
        compare(Apply(fn), torch.randn(64, 32))
    compare(Apply(lambda t: torch.cat([t[:0, 0], F.gelu(t)], 1).sigmoid()), torch.randn(64, 32))  # an empty vector fits anything
    data = (torch.rand(256, 64) > 0.5).float()
    net = nn.Linear(64, 4)
    for rows in data.split(32):
        with revhooks.reversible():
            net(rows).sum().backward()


def test_what_takes_many_passes_is_held() -> None:
    """A recipe costs a few passes over memory: less memory is to cost next to no time."""
    x = torch.randn(64, 64, requires_grad=True)
    net = nn.Linear(64, 64)

    def held(fn: Callable[[Tensor], Tensor]) -> int:
        with revhooks.reversible() as run:
            y = net(fn(x * 1.5)).sum()
            held = run.stats.held_bytes
            y.backward()
        return held

    cheap = held(lambda h: F.silu(h) * h)
    dear = held(lambda h: 0.5 * h.sin() + 0.25 * h.cos() - h.exp())
    assert cheap < 1.5 * x.nbytes < dear


@pytest.mark.cpu(reason="both modes of its batch norm end in one kernel")
def test_batch_norm_again_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its statistics are saved, so that one pass gives its output again, to the bit."""
    original, modes = torch.batch_norm, []

    def noted(*args: Any) -> Tensor:
        modes.append(args[5])
        return original(*args)

    for layout, dtype in itertools.product((torch.contiguous_format, torch.channels_last), (torch.float32, torch.float64)):
        norm = nn.BatchNorm2d(9).to(dtype)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        net = nn.Sequential(nn.Conv2d(3, 9, 1), norm, nn.ReLU(inplace=True), nn.Conv2d(9, 9, 1)).to(dtype, memory_format=layout)
        x = (10 * torch.randn(7, 3, 11, 13, dtype=dtype) + 3).to(memory_format=layout)
        compare(net, x, less=0.3)
        modes.clear()
        with revhooks.reversible():
            loss = net(x).square().sum()
            with monkeypatch.context() as patch:
                patch.setattr(torch, "batch_norm", noted)
                loss.backward()
        assert modes == [False]


@pytest.mark.parametrize("case", ["transposed", "strided", "strided channels last", "weight", "bias"])
def test_batch_norm_in_its_other_kernel(case: str) -> None:
    """Where memory is not contiguous a CPU computes it otherwise; no trial shows that while the weight is one."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Conv2d(3, 9, 1), nn.BatchNorm2d(9), nn.Conv2d(9, 2, 1)
            if case in ("weight", "bias"):
                setattr(self.norm, case, nn.Parameter(getattr(self.norm, case).repeat(2)[::2]))

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            if case == "transposed":
                h = h.transpose(2, 3)
            elif "strided" in case:
                h = torch.cat([h, -h], 1)[:, ::2]
            y: Tensor = self.last(self.norm(h).relu())
            return y

    net, x = Normed(), 10 * torch.randn(5, 3, 6, 7) + 3
    if "last" in case:
        net, x = net.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    for _ in range(3):
        plain = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
        with revhooks.reversible():
            rev = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
        assert all(map(torch.equal, plain, rev))
        with torch.no_grad():
            net.norm.weight.normal_()
            net.norm.bias.normal_()


def test_what_backward_saves_again_may_come_from_an_inversion(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream has the node of the copy that it was in forward, and is that copy up to rounding only."""
    monkeypatch.setattr(recipe, "TRUSTED", 1)

    def gradients(blocks: nn.Sequential, x: Tensor, *, reverse: bool) -> list[Tensor]:
        with revhooks.reversible() if reverse else torch.enable_grad():
            h = blocks[0](x)
            loss = blocks[1:](h).square().sum() + h.sin().sum()
            (grad,) = torch.autograd.grad(loss, x, create_graph=True)
            (loss + grad.square().sum()).backward()
        grads = [p.grad.clone() for p in blocks.parameters() if p.grad is not None]
        blocks.zero_grad()
        return grads

    for depth in (2, 2, 5):  # the newest block has its streams as they were: sites are known from then on
        branches = [nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh(), nn.Conv2d(4, 4, 1)).double() for _ in range(2 * depth)]
        blocks = nn.Sequential(*map(revhooks.nn.AdditiveCoupling, branches[::2], branches[1::2]))
        x = torch.randn(3, 8, 6, 6, dtype=torch.float64, requires_grad=True)
        plain, rev = (gradients(blocks, x, reverse=reverse) for reverse in (False, True))
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(plain, rev, strict=True))


def test_a_cache_that_is_empty_yet_and_parts_of_a_projection() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(32, 96)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (t.view(4, 16, 2, 16).transpose(1, 2) for t in self.qkv(x).split(32, -1))
            k, v = (torch.cat([torch.empty(0), t], -2) for t in (k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    compare(Attention(), torch.randn(4, 16, 32), less=0.1 if FUSED else None)
    compare(Apply(lambda t: torch.cat([torch.ones(64, 32), F.gelu(t)], 0)[32:96]), torch.randn(64, 32))
    compare(Apply(lambda t: torch.stack([part.sin() * part for part in F.silu(t).unbind(1)], 1)), torch.randn(64, 32))


def test_a_view_that_was_given_other_memory() -> None:
    """As torch's lazy parameters are."""
    scale = torch.ones(64)[:32]
    scale.data = torch.full((32,), 3.0)
    compare(Apply(lambda t: F.gelu(t) * scale), torch.randn(64, 32))


COMPLEX: dict[str, Callable[[Tensor], Tensor]] = {
    "as real": lambda x: torch.view_as_real(torch.fft.rfft(x)).sin(),
    "a part": lambda x: torch.fft.fft(x)[:16].real.sin() * torch.fft.fft(x)[:16].imag.exp(),
    "of one number": lambda x: torch.fft.fft(x).sum().real.sin(),
    "and back": lambda x: torch.view_as_complex(torch.view_as_real(torch.fft.fft(x)).tanh()).exp().abs(),
    "as complex": lambda x: torch.view_as_complex(x.exp().reshape(-1, 2)).tanh().abs(),
    "of a window": lambda x: torch.view_as_real(torch.stft(x, 32, return_complex=True, window=torch.ones(32).to(x))).sin(),
}


@pytest.mark.parametrize("name", COMPLEX)
@pytest.mark.parametrize("options", [{}, {"ops": False}, {"budget": 3000}], ids=str)
def test_real_views_of_complex_tensors(name: str, options: dict[str, Any]) -> None:
    """What was saved lies in the memory of a tensor of another dtype."""
    x = torch.randn(64, 512, dtype=torch.float64, requires_grad=True)

    def gradient() -> Tensor:
        loss = COMPLEX[name](x * 1.5).square().sum()
        return torch.autograd.grad(loss, x)[0]

    expected = gradient()
    for _ in range(3):
        with revhooks.reversible(**options):
            assert torch.equal(gradient(), expected)


@pytest.mark.parametrize("name", COMPLEX)
def test_real_views_of_complex_tensors_in_blocks(name: str) -> None:
    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + COMPLEX[name](x * 1.5).square().mean()

    net = nn.Sequential(Block(), Block())
    x = torch.randn(64, 512, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(net(x).square().sum(), x)
    for _ in range(3):
        with revhooks.reversible(replay=Block):
            assert torch.equal(torch.autograd.grad(net(x).square().sum(), x)[0], expected)


def test_a_recipe_does_not_hold_what_is_much_larger() -> None:
    x = torch.randn(64, 4096, requires_grad=True)
    net = nn.Linear(4096, 4)
    with revhooks.reversible() as run:
        whole = x * 2
        kept = (whole[:2] * 3).sigmoid()
        used = net(kept)
        del whole
        assert run.stats.held_bytes <= 4 * kept.nbytes
        used.sum().backward()


def test_a_changed_parameter_raises() -> None:
    net = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))
    with revhooks.reversible():
        y = net(torch.randn(64, 32)).sum()
        with torch.no_grad():
            net[1].bias.add_(1)
        with pytest.raises(ModifiedError):
            y.backward()


def test_a_changed_output_raises() -> None:
    net = nn.Linear(32, 4)
    x = torch.randn(64, 32, requires_grad=True)
    for context in (torch.enable_grad, revhooks.reversible):
        with context():
            h = F.gelu(x * 1)
            y = net(h).sum()
            h.add_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.backward()


def test_passes() -> None:
    net = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 4)).double()
    x = torch.randn(16, 8, dtype=torch.float64, requires_grad=True)

    def use() -> list[Tensor]:
        hidden = net[:3](x)
        y = net[3:](hidden).square().sum()
        out = [*torch.autograd.grad(y, [hidden, net[0].weight], retain_graph=True)]
        (g,) = torch.autograd.grad(y, x, create_graph=True)
        out += [g.detach(), *torch.autograd.grad(g.square().sum() + y, list(net.parameters()), retain_graph=True)]
        out += [*torch.autograd.grad(hidden.sin().sum(), x, retain_graph=True), *torch.autograd.grad(y, x)]
        return out

    plain = use()
    with revhooks.reversible() as run:
        rev = use()
    assert all(torch.allclose(a, b, atol=1e-14, rtol=0) for a, b in zip(plain, rev, strict=True))
    assert run.stats.held_bytes == 0
    with torch.autocast(DEVICE.type, torch.bfloat16):
        compare(net.float(), torch.randn(512, 8), less=0.15)


def test_around_and_inside_checkpoints_and_blocks() -> None:
    mlp = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlps = nn.ModuleList([copy.deepcopy(mlp) for _ in range(4)])
            self.block = revhooks.nn.AdditiveCoupling(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(2)), dim=-1)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.mlps[0](x)
            x = x + checkpoint(self.mlps[1], F.silu(x), use_reentrant=False)
            x = x + revhooks.checkpoint(self.mlps[2], F.gelu(x))
            return F.gelu(self.block(F.gelu(x)).float()) * self.mlps[3](x)

    compare(Mixed(), torch.randn(64, 32))


def test_nothing_survives(no_gc: None) -> None:
    net = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))
    for backward in (True, False):
        with revhooks.reversible() as run:
            y = net(torch.randn(64, 32)).sum()
            if backward:
                y.backward()
            del y
        assert run.stats.held_bytes == 0
        assert not run.values


def test_off() -> None:
    net = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4))
    compare(net, torch.randn(64, 32), ops=False)
    with revhooks.reversible(ops=False) as run:
        y = net(torch.randn(64, 32)).sum()
        assert run.stats.held_bytes == run.stats.packed_bytes
        y.backward()


@pytest.mark.parametrize("seed", range(40))
def test_random_ordinary_nets(seed: int) -> None:
    draws = generator(seed)
    names = [name for name in ACTIVATIONS if name not in ("half",)]
    picks = [names[int(i)] for i in torch.randint(0, len(names), (6,), generator=draws)]

    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linears = nn.ModuleList([nn.Linear(32, 32) for _ in picks])

        def forward(self, x: Tensor) -> Tensor:
            states = [x]
            for i, (name, linear) in enumerate(zip(picks, self.linears, strict=True)):
                h = ACTIVATIONS[name](states[-1])
                states.append(linear(h) if i % 3 else linear(h) + h * states[i // 2])
            return sum(itertools.starmap(torch.mul, itertools.pairwise(states)), torch.zeros(()))

    compare(Random(), torch.randn(64, 32, generator=draws))


def test_every_kept_byte_is_explained() -> None:
    net = nn.Sequential(
        nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), revhooks.nn.AdditiveCoupling(nn.Linear(16, 16), nn.Tanh(), dim=-1)
    )
    with revhooks.reversible() as run:
        y = net(torch.randn(64, 32, requires_grad=True)).square().sum()
        kept = run.stats.kept
        assert sum(one.bytes for one in kept) == run.stats.held_bytes
        assert all(one.why and one.what and one.remedy for one in kept)
        assert {"Addmm", "data without a gradient"} & {one.op for one in kept}
        y.backward()


@pytest.mark.parametrize("replayed", [False, True])
def test_what_is_known_of_a_site_is_known_in_the_next_step(replayed: bool) -> None:
    """Inputs are new in every step, parameters are not: only these tell sites apart."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return x + F.gelu(self.linear(self.norm(x)))

    net, inputs, known = nn.Sequential(*(Block() for _ in range(3))), [], []
    for _ in range(TRUSTED + 4):
        inputs.append(torch.randn(64, 32, requires_grad=True))
        with revhooks.reversible(replay=Block if replayed else None):
            net(inputs[-1]).sum().backward()
        known.append(len(recipe._trials))
    assert known[-1] == known[4] > 0


class Compressed(torch.autograd.Function):
    """Saves its input in a narrower dtype, which nobody else holds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward((x * 3).to(dtype))
        return x.sin()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.saved_tensors[0].to(gradient.dtype), None


NARROW = [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.int16, torch.bool]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("options", [{}, {"replay": nn.Sequential}], ids=["ordinary", "replay"])
def test_what_custom_functions_save_in_any_dtype(dtype: torch.dtype, options: dict[str, Any]) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return Compressed.apply(self.linear(x), dtype)

    net, x = nn.Sequential(*[nn.Sequential(Layer(), nn.GELU()) for _ in range(2)]), torch.randn(300, 64)
    gradients = []
    for context in (contextlib.nullcontext(), revhooks.reversible(**options)):
        with context:
            gradients.append(torch.autograd.grad(net(x).square().mean(), [*net.parameters()]))
    assert all(map(torch.equal, *gradients))
