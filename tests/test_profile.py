"""``revhooks.profile()``: what is told of steps is what they did."""

from __future__ import annotations

import contextlib
import gc
import json
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import revhooks
from revhooks.errors import RegistrationError
from revhooks.nn import AdditiveCoupling, ReversibleSequential
from revhooks.profiler.lives import Lives
from revhooks.profiler.meters import AccountedMeter
from revhooks.profiler.paths import Paths
from revhooks.profiler.profile import INVERTED, RECOMPUTED, REPLAYED, _annotate, _remedies
from revhooks.record import CATEGORIES, Kept, Record
from revhooks.watching import WATCHERS

pytestmark = pytest.mark.cpu(reason="accounted bytes of the CPU's kernels")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, depth: int = 4, width: int = 32) -> None:
        super().__init__()
        self.h = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 8)
        self.wrap: Callable[..., Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.h:
            x = block(x) if self.wrap is None else self.wrap(block, x, use_reentrant=False)
        return self.head(x)


def step(model: nn.Module, x: Tensor) -> None:
    model.zero_grad(set_to_none=False)
    model(x).square().mean().backward()


def chain(depth: int = 6, width: int = 32) -> nn.Module:
    def branch() -> nn.Module:
        return nn.Sequential(nn.Linear(width // 2, width // 2), nn.Tanh())

    return nn.Sequential(nn.Linear(8, width), *(AdditiveCoupling(branch(), branch()) for _ in range(depth)), nn.Linear(width, 4))


CONTEXTS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "plain": contextlib.nullcontext,
    "reversible": revhooks.reversible,
    "replay": lambda: revhooks.reversible(replay=Block),
}


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(64, 16, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CONTEXTS)
def test_what_modules_saved_and_hold_adds_up(name: str, net: Net, x: Tensor) -> None:
    for _ in range(5):
        with CONTEXTS[name]():
            step(net, x)
    with revhooks.profile(net) as prof:
        with CONTEXTS[name]():
            step(net, x)
    record = prof.record
    choice, rows = record.choices[0], record.modules
    assert sum(row.held_bytes for row in rows) == record.stats.held_bytes == choice.saved_bytes
    assert sum(row.saved_plain_bytes for row in rows) == record.stats.packed_bytes
    with AccountedMeter() as meter, CONTEXTS[name]():
        step(net, x)
    assert choice.accounted_peak_bytes == pytest.approx(
        meter.peak, rel=0.005
    )  # which blocks are sampled changes from step to step
    assert max(choice.timeline.total) <= choice.accounted_peak_bytes


def test_plain_saves_what_reversible_would_have(net: Net, x: Tensor) -> None:
    found = {}
    for name, context in CONTEXTS.items():
        with revhooks.profile(net) as prof, context():
            step(net, x)
        found[name] = prof.record.stats.packed_bytes
    assert len(set(found.values())) == 1, found


def test_a_run_around_it_is_measured_too(net: Net, x: Tensor) -> None:
    with revhooks.reversible(replay=Block) as run:
        step(net, x)
        with revhooks.profile(net) as prof:
            step(net, x)
        assert run.place is None
    assert prof.record.stats.replays
    assert prof.record.choices[0].name == "reversible()"
    assert all(row.held_bytes < row.saved_plain_bytes for row in prof.record.modules if row.type == "Block")


def test_calls_rebuilds_and_reasons(net: Net, x: Tensor) -> None:
    for _ in range(5):
        with revhooks.reversible(replay=Block):
            step(net, x)
    with revhooks.profile(net) as prof:
        for _ in range(2):
            with revhooks.reversible(replay=Block):
                step(net, x)
    rows = {row.path: row for row in prof.record.modules}
    blocks = [rows[f"h.{i}"] for i in range(4)]
    assert [row.calls for row in blocks] == [2] * 4
    assert sum(row.rebuilds for row in blocks) == prof.record.stats.replays
    assert all(row.rebuild_ns > 0 for row in blocks if row.rebuilds)
    assert "argument of a block" in rows["h.1"].why
    assert "inverse" in rows["h.1"].remedy
    slices = prof.record.slices
    assert sum(one.kind == "rebuild" for one in slices) == prof.record.stats.replays
    assert [one.name for one in slices if one.kind == "backward"] == ["backward"] * 2
    assert all(one.start_ns <= one.stop_ns for one in slices)
    assert sum(one.name == "h.0" for one in slices) == 2  # what runs again in backward is a rebuild, no call


def test_inversions_and_their_errors(x: Tensor) -> None:
    model = chain()
    data = torch.randn(64, 8)
    with revhooks.profile(model) as prof, revhooks.reversible():
        step(model, data)
    rows = [row for row in prof.record.modules if row.type == "AdditiveCoupling"]
    assert sum(row.rebuilds for row in rows) >= prof.record.stats.inversions > 0
    assert max(row.error for row in prof.record.modules) == prof.record.stats.worst_error > 0
    assert prof.record.choices[0].worst_block.split(" ")[0] in {row.path for row in rows}
    assert any(row.why == INVERTED for row in rows)


def test_two_streams() -> None:
    model = ReversibleSequential(*(nn.Linear(16, 16) for _ in range(6)), dim=-1)
    with revhooks.profile(model) as prof, revhooks.reversible():
        step(model, torch.randn(64, 32))
    row = prof.record.modules[0]
    assert (row.path, row.calls) == ("", 1)
    assert row.rebuilds > 0
    assert "model" in prof.record.choices[0].worst_block


def test_reasons_where_nothing_is_held(net: Net, x: Tensor) -> None:
    with revhooks.profile(net) as prof, revhooks.reversible():
        step(net, x)
    assert {row.why for row in prof.record.modules if not row.held_bytes} == {RECOMPUTED}
    nested = nn.Sequential(nn.Linear(32, 32), Net(2))
    for _ in range(5):
        with revhooks.reversible(replay=Net):
            step(nested, x)
    with revhooks.profile(nested) as prof, revhooks.reversible(replay=(Net, nn.Linear)):
        step(nested, x)
    assert {row.why for row in prof.record.modules} - {RECOMPUTED, REPLAYED}


def test_timeline_by_category(net: Net, x: Tensor) -> None:
    optimizer = torch.optim.AdamW(net.parameters())
    parameters = sum(p.nbytes for p in net.parameters())
    for name, rebuilt in (("plain", False), ("replay", True)):
        for _ in range(4):
            with CONTEXTS[name]():
                step(net, x)
            optimizer.step()
        with revhooks.profile(net) as prof:
            with CONTEXTS[name]():
                step(net, x)
            optimizer.step()
        record = prof.record
        line = record.choices[0].timeline
        assert set(line.bytes) == set(CATEGORIES)
        assert [phase for phase, _ in line.phases] == ["forward", "backward", "optimizer"]
        assert set(line.bytes["parameters"]) == {parameters} == {record.parameter_bytes}
        assert max(line.bytes["gradients"]) == parameters == record.gradient_bytes
        assert 2 * parameters <= max(line.bytes["optimizer"]) == record.optimizer_bytes < 2.1 * parameters
        assert record.optimizer == "AdamW"
        assert bool(max(line.bytes["rebuilt"])) == rebuilt
        # the loss too is made in forward and there when backward begins
        assert record.stats.held_bytes <= max(line.bytes["held"]) + parameters


def test_recomputation_of_checkpoint_is_rebuilt(net: Net, x: Tensor) -> None:
    net.wrap = checkpoint
    with Lives(net) as lives:
        step(net, x)
    line = lives.timeline()
    assert max(line.bytes["rebuilt"]) > max(line.bytes["temporary"])
    with Lives(net) as lives:
        loss = net.head(x).square().mean()
        gradients = torch.autograd.grad(loss, list(net.head.parameters()), create_graph=True)
        del gradients
    assert not max(lives.timeline().bytes["rebuilt"])


def test_gradients_that_come_and_go(net: Net, x: Tensor) -> None:
    parameters = sum(p.nbytes for p in net.parameters())
    step(net, x)
    with Lives(net) as lives:
        net.zero_grad()  # which frees them
        net(x).sum().backward()
    line = lives.timeline()
    assert line.bytes["gradients"][0] <= parameters
    assert min(line.bytes["gradients"]) == 0
    assert max(line.bytes["gradients"]) == parameters


def test_accumulation_and_several_models(x: Tensor) -> None:
    nets = nn.ModuleList([Net(2), Net(2)])
    with revhooks.profile(nets, name="two") as prof:
        for model in nets:
            with revhooks.reversible():
                for _ in range(2):
                    model(x).mean().backward()
    assert prof.record.target == "two"
    assert {row.path.split(".")[0] for row in prof.record.modules} == {
        "1"
    }  # of the pass that found the most, the latest of equals
    assert [phase for phase, _ in prof.record.choices[0].timeline.phases] == ["forward", "backward"] * 4


def test_nothing_is_left_behind(net: Net, x: Tensor) -> None:
    hooks = torch.nn.modules.module._global_forward_hooks, torch.nn.modules.module._global_forward_pre_hooks
    before = [len(found) for found in hooks]
    gradients = []
    for profiled in (False, True):
        context = revhooks.profile(net) if profiled else contextlib.nullcontext()
        with context, revhooks.reversible(replay=Block):
            step(net, x)
        gradients.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    assert all(map(torch.equal, *gradients))
    with pytest.raises(TypeError), revhooks.profile(net):
        net(x).backward(3)
    assert [len(found) for found in hooks] == before
    assert not WATCHERS
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def test_nothing_is_left_behind_where_it_cannot_begin(net: Net, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    hooks = torch.nn.modules.module._global_forward_hooks, torch.nn.modules.module._global_forward_pre_hooks
    before = [len(found) for found in hooks]

    def refuse(_: Any) -> None:
        raise RuntimeError("no hook here")

    monkeypatch.setattr("revhooks.profiler.lives.register_optimizer_step_post_hook", refuse)
    with pytest.raises(RuntimeError, match="no hook here"), revhooks.profile(net):
        pass
    with revhooks.reversible() as run:
        with pytest.raises(RuntimeError, match="no hook here"), revhooks.profile(net):
            pass
        assert run.place is None
    assert [len(found) for found in hooks] == before
    assert not WATCHERS
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    monkeypatch.undo()
    with revhooks.profile(net) as prof:
        step(net, x)
    assert prof.record.stats.packed_bytes


def test_what_it_remembered_is_let_go_of(net: Net, x: Tensor) -> None:
    with revhooks.profile(net) as prof:
        with revhooks.reversible() as run:
            step(net, x)
        refs = weakref.ref(run), weakref.ref(prof._lives)
        del run
    gc.collect()
    assert [ref() for ref in refs] == [None, None]
    assert prof.record.modules


def test_it_reports_and_saves(net: Net, x: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with revhooks.profile(net, name="a net") as prof, revhooks.reversible(replay=Block):
        step(net, x)
    prof.report(width=100)
    out = capsys.readouterr().out
    assert "a net" in out
    assert "h.0-" in out
    prof.save(tmp_path / "p.json")
    assert Record.load(tmp_path / "p.json") == prof.record
    for name, start in (("p.html", "<!doctype html>"), ("p.svg", "<svg"), ("p.folded", "model;h;0 "), ("p.trace.json", "{")):
        prof.save(tmp_path / name)
        assert start in (tmp_path / name).read_text().lower()
    assert json.loads((tmp_path / "p.trace.json").read_text())["traceEvents"]
    assert "<table" in prof._repr_html_()


def adds_up(record: Record) -> bool:
    stats = record.stats
    held, saved = sum(row.held_bytes for row in record.modules), sum(row.saved_plain_bytes for row in record.modules)
    return (held, saved) == (stats.held_bytes, stats.packed_bytes) and held == record.choices[0].saved_bytes


@pytest.mark.parametrize("name", CONTEXTS)
def test_several_contexts_in_one_backward_pass(name: str, net: Net, x: Tensor) -> None:
    with revhooks.profile(net) as prof:
        with CONTEXTS[name]():
            one = net(x).square().mean()
        with CONTEXTS[name]():
            other = net(x[:32]).square().mean()
        (one + other).backward()
    with revhooks.profile(net) as alone, CONTEXTS[name]():
        step(net, x)
    assert adds_up(prof.record)
    assert prof.record.stats.packed_bytes > 1.4 * alone.record.stats.packed_bytes
    assert prof.record.stats.held_bytes > 1.2 * alone.record.stats.held_bytes
    assert len([row for row in prof.record.modules if row.saved_plain_bytes]) > 4


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_graph_that_is_retained_is_told_by_module_in_each_pass(name: str, net: Net, x: Tensor) -> None:
    with revhooks.profile(net) as prof, CONTEXTS[name]():
        loss = net(x).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
    assert adds_up(prof.record)
    assert len([row for row in prof.record.modules if row.saved_plain_bytes]) > 4


@pytest.mark.parametrize("name", CONTEXTS)
def test_steps_without_a_backward_pass(name: str, net: Net, x: Tensor) -> None:
    with revhooks.profile(net) as prof, CONTEXTS[name]():
        net(x)
    assert adds_up(prof.record)
    assert not prof.record.stats.packed_bytes
    with revhooks.profile(net) as prof, CONTEXTS[name]():
        loss = net(x).square().mean()
    assert adds_up(prof.record)
    assert prof.record.stats.packed_bytes
    loss.backward()


def test_what_was_saved_before_is_in_no_module(net: Net, x: Tensor) -> None:
    with revhooks.reversible(replay=Block):
        loss = net(x).square().mean()
        with revhooks.profile(net) as prof:
            loss.backward()
    assert adds_up(prof.record)
    with revhooks.profile(net.head) as prof, revhooks.reversible(replay=Block):
        step(net, x)
    assert adds_up(prof.record)


@pytest.mark.parametrize("name", CONTEXTS)
def test_one_inside_another(name: str, net: Net, x: Tensor) -> None:
    with revhooks.profile(net) as outer:
        with revhooks.profile(net) as inner, CONTEXTS[name]():
            step(net, x)
        with CONTEXTS[name]():
            step(net, x[:8])
    with CONTEXTS[name](), revhooks.profile(net) as around:
        with revhooks.profile(net):
            step(net, x[:8])
        step(net, x)
    for prof in (outer, inner, around):
        assert adds_up(prof.record)
        assert prof.record.stats.packed_bytes == inner.record.stats.packed_bytes
    assert outer.record.stats.held_bytes == inner.record.stats.held_bytes


def test_hooks_around_it_do_what_they_did(net: Net, x: Tensor) -> None:
    packed: list[int] = []

    def pack(tensor: Tensor) -> tuple[Tensor]:
        packed.append(tensor.nbytes)
        return (tensor,)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held[0]), revhooks.profile(net) as prof:
        step(net, x)
    assert packed
    assert adds_up(prof.record)
    assert prof.record.stats.held_bytes


def test_what_is_let_go_counts_no_more_though_others_have_it(net: Net) -> None:
    batches = [torch.randn(64, 16, 32) for _ in range(4)]
    found = []
    for taken in (batches[:1], batches):
        with revhooks.profile(net) as prof:
            for x in taken:
                step(net, x)
        found.append(prof.record.stats.held_bytes)
    assert found[0] == found[1]


def test_what_is_changed_in_place_is_an_error_as_without_it(net: Net, x: Tensor) -> None:
    with revhooks.profile(net):
        y = net(x).exp()
        loss = y.sum()
        y.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_threads(x: Tensor) -> None:
    together, found = threading.Barrier(2), {}

    def measure(depth: int, name: str) -> None:
        model = Net(depth)
        with revhooks.profile(model) as prof:
            together.wait(30)
            with CONTEXTS[name]():
                step(model, x)
            together.wait(30)
        found[depth] = prof.record

    for name in CONTEXTS:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(measure, (1, 3), (name, name)))
        assert found[1].stats.packed_bytes < found[3].stats.packed_bytes
        assert all(map(adds_up, found.values()))
        assert [found[depth].stats.replays for depth in (1, 3)] == ([0, 2] if name == "replay" else [0, 0])


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_backward_pass_in_another_thread(name: str, net: Net, x: Tensor) -> None:
    with revhooks.profile(net) as prof, CONTEXTS[name]():
        loss = net(x).square().mean()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(loss.backward).result()
    assert adds_up(prof.record)
    assert prof.record.stats.held_bytes
    assert [phase for phase, _ in prof.record.choices[0].timeline.phases] == ["forward", "backward"]


def test_contexts_that_are_over_are_let_go(net: Net, x: Tensor) -> None:
    runs = []
    with revhooks.profile(net) as prof:
        for _ in range(70):
            with revhooks.reversible(replay=Block) as run:
                step(net, x[:1])
            runs.append(weakref.ref(run))
            del run
        gc.collect()
        assert sum(run() is not None for run in runs) < 40
    assert prof.record.stats.frames == 70 * 4
    assert adds_up(prof.record)


def test_snapshots_of_the_allocator_tell_paths(net: Net, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(torch.cuda.memory, "_set_memory_metadata", told.append, raising=False)
    with Paths(net, lambda: 0, enter=_annotate):
        net(x)
    assert told[:5] == ["", "h.0", "h.0.norm", "h.0", "h.0.up"]
    assert told[-4:] == ["head", "", "", ""]
    monkeypatch.delattr(torch.cuda.memory, "_set_memory_metadata")
    _annotate("nothing")


def test_closures_of_optimizers(net: Net, x: Tensor) -> None:
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        return loss

    with revhooks.profile(net) as prof:
        optimizer.step(closure)
    line = prof.record.choices[0].timeline
    assert [phase for phase, _ in line.phases[:4]] == ["optimizer", "forward", "backward", "optimizer"]
    assert max(line.bytes["held"]) >= prof.record.stats.held_bytes - x.nbytes > 0  # which was there before


def test_remedies_are_one_sentence(net: Net, x: Tensor) -> None:
    for _ in range(5):
        with revhooks.reversible(replay=Block):
            step(net, x)
    with revhooks.profile(net) as prof, revhooks.reversible(replay=Block):
        step(net, x)
    several = [row for row in prof.record.modules if "; " in row.why]
    assert several
    assert all("nothing" not in row.remedy for row in several if "inverse" in row.remedy)
    kept = [Kept("a", "h", 1, remedy="nothing: it goes"), Kept("b", "h", 1, remedy="nothing: it is small")]
    assert _remedies(kept) == "nothing: it goes; it is small"
    assert _remedies([*kept, Kept("c", "h", 1, remedy="an inverse")]) == "an inverse"
    assert not _remedies([])


def test_misuse(net: Net) -> None:
    with revhooks.profile(net) as prof, pytest.raises(RegistrationError, match="got one that is open"), prof:
        pass
    assert prof.record
    lazy = nn.Sequential(nn.LazyLinear(4))
    with (
        pytest.raises(RegistrationError, match=r"got '0\.weight' without one. Remedy: call it once before"),
        revhooks.profile(lazy),
    ):
        pass
    assert not WATCHERS
    lazy(torch.ones(1, 2))
    with revhooks.profile(lazy):
        lazy(torch.ones(1, 2)).sum().backward()
    with pytest.raises(RegistrationError, match=r"expected a torch\.nn\.Module, got function"):
        revhooks.profile(lambda: None)  # type: ignore[arg-type]
    with pytest.raises(RegistrationError, match="expected its context to be over"):
        _ = revhooks.profile(net).record
