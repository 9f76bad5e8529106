"""What costs the host: calls that are made as they are, checks by turns, the newest block, handles and books."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import revhooks
from bench.ordinary_measure import Contender, accounted, peer
from bench.ordinary_models import GPTBlock, gpt
from revhooks import nn as rnn
from revhooks.errors import ModifiedError, ReplayError
from revhooks.profiler.meters import AccountedMeter
from revhooks.runtime import whole
from revhooks.runtime.frames import newest
from revhooks.runtime.frames.newest import SHARE
from revhooks.runtime.handles import evidence
from revhooks.runtime.recompute import recipe
from revhooks.saved import Leaf, Saved
from tests.test_accelerator import Block
from tests.test_stats import saved_by_plain_autograd

VIEWS = {"view", "t", "transpose", "detach", "as_strided", "split", "_unsafe_view", "expand", "unsqueeze", "select", "slice"}
VIEWS |= {"alias", "permute", "reshape", "split_with_sizes", "squeeze"}


class Kernels(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.waits = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.removeprefix("aten::")
        self.count += name not in VIEWS
        self.waits += name in ("_local_scalar_dense", "equal", "item", "nonzero", "is_nonzero")
        return function(*args, **(kwargs or {}))


@pytest.fixture
def hooked(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many tensors were packed since it was asked last."""
    packed = []
    from revhooks.runtime.run import Run

    original = Run.pack

    def pack(self: Any, tensor: Tensor) -> Any:
        packed.append(tensor.shape)
        return original(self, tensor)

    monkeypatch.setattr(Run, "pack", pack)

    def since() -> int:
        count = len(packed)
        packed.clear()
        return count

    return since


def stack(depth: int = 4, width: int = 32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[Block(width) for _ in range(depth)])


def gradients(net: nn.Module, x: Tensor, context: contextlib.AbstractContextManager[Any]) -> list[Tensor]:
    net.zero_grad()
    with context:
        net(x).square().mean().backward()
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


# -- calls that are made as they are

IDLE: dict[str, dict[str, Any]] = {
    "ops=False": {"ops": False},
    "a budget": {"budget": "1GiB"},
    "a budget, replay": {"budget": "1GiB", "replay": Block},
    "all of it": {"budget": float("inf")},
}


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("case", IDLE)
def test_where_nothing_is_to_be_done_there_are_no_hooks(case: str, around: bool, hooked: Callable[[], int]) -> None:
    """Learned in three steps; then a model is called as it is, and the books are exact all the same."""
    net, x = stack(), torch.randn(8, 32)
    wanted = gradients(net, x, contextlib.nullcontext())
    expected = saved_by_plain_autograd(net, x)
    with revhooks.reversible(**IDLE[case]) if around else contextlib.nullcontext() as outer:
        for number in range(6):
            net.zero_grad()
            with contextlib.nullcontext(outer) if around else revhooks.reversible(**IDLE[case]) as run:
                hooked()
                loss = net(x).square().mean()
                packed = hooked()
                stats = run.stats
                loss.backward()
            assert packed <= 2 if number >= whole.LEARN else packed > 2 or "replay" in case  # those of the loss
            assert stats.packed_bytes == stats.held_bytes == sum(kept.bytes for kept in stats.kept) == expected
            assert run.stats.held_bytes == 0
            assert same(wanted, [p.grad for p in net.parameters()])


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "shapes": lambda net: None,
    "modes": lambda net: net.eval(),
    "an inner mode": lambda net: net[1].eval(),
    "parameters": lambda net: net[0].requires_grad_(False),
    "a part": lambda net: setattr(net[2], "up", nn.Sequential(nn.Linear(32, 128), nn.Tanh())),
    "a dtype": lambda net: net.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_is_learned_again_when_something_changes(change: str, hooked: Callable[[], int]) -> None:
    net, x = nn.Sequential(*stack(), nn.Dropout(0.5)), torch.randn(8, 32)
    for _ in range(5):
        gradients(net, x, revhooks.reversible(ops=False))
    CHANGES[change](net)
    x = x[:4] if change == "shapes" else x.to(net[0].up.weight.dtype)
    for _ in range(2):
        expected = saved_by_plain_autograd(net, x)
        hooked()
        with revhooks.reversible(ops=False) as run:
            loss = net(x).square().mean()
            assert run.stats.packed_bytes == expected
            assert hooked() > 4
            loss.backward()


def test_a_budget_that_no_longer_fits_is_kept() -> None:
    """Larger inputs are another kind of call; and what is held by somebody else counts."""
    net, x = stack(8), torch.randn(64, 32)
    need = saved_by_plain_autograd(net, x)
    budget = int(1.2 * need)
    options: dict[str, Any] = {"budget": budget, "replay": Block, "ops": False}
    for _ in range(5):
        with revhooks.reversible(**options) as run:
            net(x).square().mean().backward()
        assert run.stats.replays == 0
    with revhooks.reversible(**options) as run:
        net(torch.cat([x, x])).square().mean().backward()
    assert run.stats.replays > 0
    with revhooks.reversible(**options) as run:
        first = net(x).square().mean()
        second = net(x).square().mean()
        assert run.stats.held_bytes <= budget + need / 4
        (first + second).backward()
        assert run.stats.held_bytes == 0


def test_a_graph_of_a_call_as_it_is_may_be_retained_or_dropped() -> None:
    net, x = stack(), torch.randn(8, 32)
    with revhooks.reversible(ops=False) as run:
        for _ in range(4):
            net(x).square().mean().backward()
        loss = net(x).square().mean()
        held = run.stats.held_bytes
        loss.backward(retain_graph=True)
        assert run.stats.held_bytes == held
        loss.backward()
        assert run.stats.held_bytes == 0
        loss = net(x).square().mean()
        assert run.stats.held_bytes == held
        del loss
        assert run.stats.held_bytes == 0


def test_a_call_as_it_is_that_fails_leaves_the_hooks(hooked: Callable[[], int]) -> None:
    net, x = stack(), torch.randn(8, 32)
    with revhooks.reversible(ops=False):
        for _ in range(4):
            net(x).square().mean().backward()
        fails = net[3].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            net(x)
        fails.remove()
        hooked()
        (x.requires_grad_() * 2).exp().sum().backward()
        assert hooked() > 0


def test_blocks_that_may_be_inverted_are(hooked: Callable[[], int]) -> None:
    """With ``ops=False`` there is still something to do for them."""
    net = nn.Sequential(*[rnn.AdditiveCoupling(nn.Linear(8, 8), nn.Linear(8, 8), dim=-1) for _ in range(4)])
    for _ in range(6):
        with revhooks.reversible(ops=False) as run:
            net(torch.randn(4, 16)).square().mean().backward()
        assert run.stats.inversions == 3


# -- handles


def test_a_handle_that_only_holds_is_small_and_sees_changes() -> None:
    x = torch.randn(3, requires_grad=True)
    with revhooks.reversible():
        h = x * 1
        y = h.exp()  # saves its result
    handle = y.grad_fn._raw_saved_result.data
    assert type(handle) is Saved
    assert set(Saved.__slots__) == {"__weakref__", "kind", "tensor", "version"}
    assert handle.tensor.grad_fn is None
    assert handle.get().data_ptr() == y.data_ptr()
    y.add_(1)
    with pytest.raises(ModifiedError):
        y.sum().backward()


def test_parameters_are_not_counted() -> None:
    lin = nn.Linear(4, 4)
    with revhooks.reversible() as run:
        y = lin(torch.randn(2, 4, requires_grad=True) * 1)
    assert type(y.grad_fn._raw_saved_mat2.data) is Leaf
    assert run.stats.held_bytes == 2 * 4 * 4


def test_what_a_backward_saves_again_is_told_from_what_was_saved() -> None:
    """Torch's checkpoint draws other random numbers when it is told not to keep them: the same node, another tensor."""

    def step(context: contextlib.AbstractContextManager[Any]) -> list[Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid(), nn.Dropout(0.5), nn.Linear(8, 8))
        x = torch.randn(4, 8, requires_grad=True)
        with context:
            y = checkpoint(net, x * 1, use_reentrant=False, preserve_rng_state=False).square().mean()
            (grad,) = torch.autograd.grad(y, x, create_graph=True)
            (y + grad.square().sum()).backward()
        return [p.grad for p in net.parameters()]

    assert same(step(contextlib.nullcontext()), step(revhooks.reversible()))


def test_books_of_what_dies_before_backward(no_gc: None) -> None:
    """Handles that are gone are forgotten: no list grows, and the peak is that of one forward."""
    net, x = stack(2), torch.randn(8, 32)
    with revhooks.reversible() as run:
        for _ in range(60):
            y = net(x)
        one = run.stats
        assert len(run.ledger.handles) < 40
        y.sum().backward()
    assert one.held_bytes < one.packed_bytes
    assert run.stats.held_bytes == 0


# -- what a call saves, as the one before


class Odd(nn.Module):
    """Saves other tensors when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.more = nn.Conv2d(4, 4, 3, padding=1), ""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).tanh()
        if self.more == "another":
            y = y.exp().tanh()
        elif self.more == "shape":
            y = (y[:, :, :2].exp().sum() + y).tanh()
        elif self.more == "in place":
            y = (y + 1).mul_(2).tanh()
        return x + y


@pytest.mark.parametrize("more", ["another", "shape", "in place", "format", "dtype", "none"])
def test_calls_that_save_something_else_than_those_before(more: str) -> None:
    """Without a warning, and right: in that step, and in those after it."""
    torch.manual_seed(0)
    net, x = nn.Sequential(*[Odd() for _ in range(4)]), torch.randn(2, 4, 6, 6)

    def both(x: Tensor) -> None:
        plain = gradients(net, x, contextlib.nullcontext())
        for _ in range(2):
            assert same(plain, gradients(net, x, revhooks.reversible(replay=Odd)))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            both(x)
        net[2].more = more
        if more == "format":
            net.to(memory_format=torch.channels_last)
        if more == "dtype":
            net.double()
            x = x.double()
        for _ in range(2):
            both(x)
        net[2].more = ""
        both(x)


@pytest.mark.parametrize("when", ["before the next block", "after it"])
def test_an_output_that_was_saved_and_is_changed(when: str) -> None:
    """By a block whose slots are empty when it has returned: it raises as in plain autograd."""

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).tanh()  # which saves its result

    net, x = nn.ModuleList([Last() for _ in range(3)]), torch.randn(4, 8)

    def step(*, edit: bool) -> None:
        with revhooks.reversible(replay=Last):
            h = net[0](x)
            if edit and when == "before the next block":
                h.add_(1)
            y = net[1](h * 1)
            if edit and when == "after it":
                h.add_(1)
            net[2](y * 1).sum().backward()

    for _ in range(5):
        step(edit=False)
    with pytest.raises(ModifiedError):
        step(edit=True)
    step(edit=False)


# -- the newest block


def test_the_newest_block_goes_where_it_makes_the_peak() -> None:
    """Before a large head replay peaks no higher than checkpointing, in accounted bytes; it is learned in one step."""
    work = gpt(3, batch=4, tokens=64)  # its head: a vocabulary that is larger than a block
    replay = Contender(work, lambda: revhooks.reversible(replay=GPTBlock, ops=False))
    for _ in range(6):
        replay.step()
    ours, theirs = accounted(replay)[1], accounted(peer(work, lambda model: model.blocks, "checkpoint"))[1]
    assert ours <= 1.001 * theirs  # some elements are held, by which replays are known


def test_the_newest_block_stays_where_it_does_not() -> None:
    torch.manual_seed(0)
    net, x = stack(6, 64), torch.randn(512, 64)
    for _ in range(4):
        with revhooks.reversible(replay=Block, ops=False) as run:
            net(x).square().mean().backward()
        assert run.stats.replays == 5


def test_the_newest_block_stays_where_the_backward_of_a_block_makes_the_peak() -> None:
    """What is held says that it goes; but a block's backward has gradients besides, and peaks as high without it."""
    work = gpt(3)  # its head: a vocabulary that is smaller than a block
    for ops in (False, True):
        replay = Contender(work, lambda ops=ops: revhooks.reversible(replay=GPTBlock, ops=ops))
        for _ in range(4):
            replay.step()
        with revhooks.reversible(replay=GPTBlock, ops=ops) as run:
            replay.loss().backward()
        assert run.stats.replays == 2
        ours, theirs = accounted(replay)[1], accounted(peer(work, lambda model: model.blocks, "checkpoint"))[1]
        assert ours <= (0.97 if ops else 1 + 1 / SHARE) * theirs


@pytest.mark.parametrize("guard", ["off", "fallback"])
@pytest.mark.parametrize("kind", ["couplings", "streams"])
def test_the_newest_coupling_goes_with_its_streams(kind: str, guard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is let go of with it is what its branches saved and the streams that it gives back; learned once."""
    torch.manual_seed(0)
    monkeypatch.setattr(newest, "LEAST", 1 << 12)
    width, depth, x = 8, 10, torch.randn(8, 16, 12, 12)
    fns = [nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)) for _ in range(2 * depth)]
    pairs = zip(fns[::2], fns[1::2], strict=True)
    net = (
        nn.Sequential(*[rnn.AdditiveCoupling(f, g) for f, g in pairs]) if kind == "couplings" else rnn.ReversibleSequential(*fns)
    )
    expected = torch.autograd.grad(net(x).square().mean(), list(net.parameters()))
    peaks = []
    for _ in range(8):
        net.zero_grad()
        leaf = x.clone().requires_grad_()
        with AccountedMeter() as meter, revhooks.reversible(guard=guard):
            net(leaf).square().mean().backward()
        peaks.append(meter.peak / (x.nbytes // 2))  # in streams
    assert peaks[0] > 12
    assert max(peaks[2:]) < 11
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-3, atol=1e-5)  # type: ignore[arg-type]


# -- checks by turns


def edited(_: nn.Module, __: Any, y: Tensor) -> None:
    y.data.mul_(1.5)  # behind autograd's back


@pytest.mark.parametrize("case", ["ordinary", "replayed", "couplings"])
def test_checks_launch_next_to_nothing_and_wait_for_nothing(case: str, far: None) -> None:
    """In a steady step at most a twentieth of plain's kernels, by a count; nothing is read."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"replay": Block} if case == "replayed" else {}
    if case == "couplings":
        fns = [nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(24)]
        net: nn.Module = nn.Sequential(*[rnn.AdditiveCoupling(f, g, dim=-1) for f, g in zip(fns[::2], fns[1::2], strict=True)])
        x = torch.randn(4, 16)
    else:
        net, x = stack(12), torch.randn(4, 32)
    counts = {}
    for guard in ("off", "fallback"):
        for _ in range(8):
            gradients(net, x, revhooks.reversible(guard=guard, **options))
        with Kernels() as kernels:
            for _ in range(12):
                gradients(net, x, revhooks.reversible(guard=guard, **options))
        counts[guard] = kernels
    with Kernels() as plain:
        for _ in range(12):
            gradients(net, x, contextlib.nullcontext())
    assert 0 < counts["fallback"].count - counts["off"].count <= 0.05 * plain.count
    assert counts["fallback"].waits == 0


def chain(depth: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    recipe._trials.clear()  # one line of code has all of these nets
    return nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(depth)], nn.Linear(8, 8)), torch.randn(4, 8)


@pytest.mark.parametrize("place", [0, 11, 23])
def test_a_fault_that_is_there_in_every_step_is_found_by_turns(place: int, far: None) -> None:
    """Whatever place it is at: in as many steps as there are turns. What is wrong is named, in a later step."""
    net, x = chain(24)
    for _ in range(8):
        gradients(net, x, revhooks.reversible())
    period = evidence.rotation._period
    assert 1 < period <= 24
    net[place][1].register_forward_hook(edited)
    with pytest.raises(ReplayError, match="Gelu") as told:  # noqa: PT012 - in one of so many steps
        for _ in range(period + 2):
            gradients(net, x, revhooks.reversible())
    assert not place or "backward pass" in told.value.__notes__[0]  # before a parameter is met all is checked at once


def test_guard_raise_checks_everything_in_every_step(far: None) -> None:
    net, x = chain(24)
    for _ in range(8):
        gradients(net, x, revhooks.reversible(guard="raise"))
    net[17][1].register_forward_hook(edited)
    with pytest.raises(ReplayError, match="Gelu"), revhooks.reversible(guard="raise"):
        net(x).square().mean().backward()


@pytest.mark.parametrize("end", ["stats", "context"])
def test_a_late_error_is_told_when_stats_are_read_or_the_context_ends(end: str, far: None) -> None:
    net, x = chain(2)
    for _ in range(8):
        gradients(net, x, revhooks.reversible())
    net[1][1].register_forward_hook(edited)
    told = ""
    for _ in range(evidence.rotation._period + 2):  # until it has its turn
        told = "backward"
        with contextlib.suppress(ReplayError), revhooks.reversible() as run:
            net(x).square().mean().backward()
            told = "context"
            if end == "stats":
                try:
                    assert run.stats.replays == 0
                except ReplayError:
                    told = "stats"
                    break
            continue
        break
    assert told == end


def test_a_chain_is_checked_where_all_errors_arrive() -> None:
    """An inverse that goes wrong late is found in that step, wherever its block is: its error goes on to the second block."""
    torch.manual_seed(0)
    fns = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(48)]
    net = nn.Sequential(*[rnn.AdditiveCoupling(f, g, dim=-1) for f, g in zip(fns[::2], fns[1::2], strict=True)])
    for _ in range(6):
        gradients(net, torch.randn(4, 16), revhooks.reversible())
    for place in (5, 14, 22):
        calls = []

        def other(module: nn.Module, args: Any, y: Tensor, calls: list[int] = calls) -> Tensor:
            calls.append(1)
            return y + 1.0 if len(calls) == 2 else y  # in the rebuild

        handle = net[place].g.register_forward_hook(other)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(revhooks.errors.RevhooksError), revhooks.reversible():
                net(torch.randn(4, 16)).square().mean().backward()
        handle.remove()
        net = nn.Sequential(*[rnn.AdditiveCoupling(f, g, dim=-1) for f, g in zip(fns[::2], fns[1::2], strict=True)])
        for _ in range(6):
            gradients(net, torch.randn(4, 16), revhooks.reversible())
