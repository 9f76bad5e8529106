"""What else a training script does around the blocks: other kinds of tensors, copies, data parallelism, workers, many steps."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import revhooks
from revhooks import nn as rnn
from revhooks.errors import InversionError, ModifiedError, ReplayError
from tests.conftest import mlp
from tests.test_semantics import KINDS, X, _registered, backward, kinds, loss, same_as_plain, small  # noqa: F401

# -- parameters that the first call makes


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Dropout(0.3), nn.ReLU(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("training", [True, False])
def test_lazy_modules(training: bool) -> None:
    """They are made in a block's first call, with random numbers, and without them in its replay."""

    def couplings() -> nn.Module:
        return nn.Sequential(*(rnn.AdditiveCoupling(Lazy(), Lazy()) for _ in range(3)))

    def chain() -> nn.Module:
        return rnn.ReversibleSequential(*(Lazy() for _ in range(4)))

    def stack() -> nn.Module:
        return nn.Sequential(*(Lazy() for _ in range(3)))

    def checkpointed(net: nn.Module, x: Tensor) -> Tensor:
        return revhooks.checkpoint(net, x)

    for make, width, options, run in (
        (couplings, 8, {}, None),
        (chain, 8, {}, None),
        (stack, 4, {"replay": Lazy}, None),
        (stack, 4, {}, checkpointed),
    ):
        seen = []
        for reverse in (False, True):
            torch.manual_seed(0)
            net = make().double().train(training)
            x = torch.randn(6, width, dtype=torch.float64, requires_grad=True)
            grads = []
            for _ in range(3):
                with revhooks.reversible(**options) if reverse else torch.enable_grad():
                    y = run(net, x) if run is not None and reverse else net(x)
                    grads += torch.autograd.grad(y.square().sum(), [x, *net.parameters()])
            seen.append([*grads, *net.buffers(), torch.get_rng_state()])
        assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(*seen, strict=True))


# -- copies


@kinds
def test_models_stay_what_they_are(kind: str) -> None:
    """revlib and momentumnet replace modules or keep state on them."""
    net = KINDS[kind](small, 3).double()
    names, state = [name for name, _ in net.named_modules()], {k: v.clone() for k, v in net.state_dict().items()}
    attributes = [set(vars(module)) for module in net.modules()]

    def check() -> None:
        assert [name for name, _ in net.named_modules()] == names
        assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
        assert list(net.state_dict()) == list(state)
        for copied in (copy.deepcopy(net), copy.copy(net), pickle.loads(pickle.dumps(net)), saved(net)):
            assert torch.equal(copied(X), net(X))
        assert [set(vars(module)) for module in net.modules()] == attributes

    check()
    with revhooks.reversible():
        value = loss(net(X))
        check()
        value.backward()
        check()
    check()
    assert next(net.float().parameters()).dtype is torch.float32


def saved(net: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@kinds
def test_a_copy_made_between_forward_and_backward(kind: str) -> None:
    net = KINDS[kind](small, 3).double()
    with revhooks.reversible():
        value = loss(net(X))
        other = copy.deepcopy(net)
        value.backward()
        loss(other(X)).backward()
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-12, rtol=0)


# -- edits behind autograd's back


@kinds
@pytest.mark.parametrize("what", ["output", "weight"])
def test_data_edits_are_caught_by_the_sample(kind: str, what: str) -> None:
    """Plain autograd and every peer take them in silence; here an anchor that was edited gives gradients of another net."""
    net = KINDS[kind](small, 4).double()
    x = X.clone().requires_grad_()
    with revhooks.reversible():
        h = net(x)
        value = loss(h)
        if what == "output":
            net(h)  # the next block opens, and the anchor is all that there is
            h.data.mul_(1.5)
        else:
            for p in net.parameters():
                p.data.mul_(1.5)
        with pytest.raises((InversionError, ReplayError, ModifiedError)):
            value.backward()


# -- other tensors, other modes


@kinds
def test_forward_mode(kind: str) -> None:
    net = KINDS[kind](small, 2).double()
    tangent = torch.randn_like(X)
    with torch.autograd.forward_ad.dual_level():
        plain = torch.autograd.forward_ad.unpack_dual(net(torch.autograd.forward_ad.make_dual(X, tangent))).tangent
        with revhooks.reversible():
            rev = torch.autograd.forward_ad.unpack_dual(net(torch.autograd.forward_ad.make_dual(X, tangent))).tangent
    assert torch.allclose(plain, rev, atol=1e-12)


@kinds
def test_functional_transforms(kind: str) -> None:
    """What they give is what they give outside."""
    net = KINDS[kind](small, 2).double()
    gradient = torch.func.grad(lambda x: loss(net(x)))(X)
    with revhooks.reversible():
        assert torch.allclose(torch.func.vmap(net)(X.unsqueeze(1)).squeeze(1), net(X))
        _, out = torch.func.jvp(net, (X,), (torch.ones_like(X),))
        assert torch.allclose(out, torch.func.jvp(net, (X,), (torch.ones_like(X),))[1])
        assert torch.equal(torch.func.grad(lambda x: loss(net(x)))(X), gradient)
        loss(net(X)).backward()


@kinds
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("options", [{}, {"budget": 2048}, {"replay": nn.Linear, "ops": False}], ids=["", "budget", "replay"])
def test_jit_trace_inside(kind: str, options: dict[str, object]) -> None:
    """A trace is that of the model, without what is done to what it saves."""
    net = KINDS[kind](small, 2).double().eval()
    x = torch.randn(64, 8, dtype=torch.float64)
    outside = torch.jit.trace(net, x, check_trace=False)
    with revhooks.reversible(**options):  # type: ignore[arg-type]
        inside = torch.jit.trace(net, x, check_trace=False)
        loss(inside(x)).backward()
    assert str(inside.inlined_graph).count(" = ") == str(outside.inlined_graph).count(" = ")
    grads = [p.grad for p in net.parameters()]
    net.zero_grad()
    loss(net(x)).backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, net.parameters(), strict=True))


class Scripted(nn.Module):
    """Its layers are a TorchScript module."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = torch.jit.script(nn.Sequential(*layers))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layers(x))  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kind", ["replay", "blocks"])
def test_torchscript_inside(kind: str, norm: bool) -> None:
    """Its parameters are watched, not swapped; a call that changes its buffers is kept. A named class can be scripted."""
    with revhooks.reversible(replay=nn.Linear):
        nn.Linear(2, 2)(torch.ones(1, 2)).sum().backward()

    def layers(width: int) -> nn.Module:
        return Scripted(nn.Linear(width, width), *[nn.BatchNorm1d(width)][: int(norm)], nn.GELU())

    results = []
    for context in (contextlib.nullcontext, lambda: revhooks.reversible(replay=Scripted)):
        torch.manual_seed(0)
        blocks = [layers(8) if kind == "replay" else rnn.AdditiveCoupling(layers(4), layers(4)) for _ in range(3)]
        net = nn.Sequential(*blocks).double()
        seen: list[Tensor] = []
        with context() as run:
            for training in (True, True, False, True):
                net.train(training)
                net.zero_grad()
                first, second = loss(net(X)), loss(net(2 * X))
                net.eval()
                (first + second).backward()
                assert not any(module.training for module in net.modules())
                seen += [p.grad.clone() for p in net.parameters()] + [b.clone().double() for b in net.buffers()]  # type: ignore[union-attr]
        results.append(seen)
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*results, strict=True))
    assert run.stats.replays + run.stats.inversions > 0
    assert run.stats.held_bytes == 0


RECORDED: dict[str, Callable[[], nn.Module]] = {
    "sequence": lambda: rnn.ReversibleSequential(*[nn.Linear(4, 4) for _ in range(3)]),
    "grid": lambda: rnn.ReversibleSequential(*[nn.Linear(4, 4) for _ in range(3)], grid_bits=10),
    "affine": lambda: rnn.AffineCoupling(nn.Linear(4, 8), nn.Linear(4, 8)),
    "momentum": lambda: rnn.MomentumSequential(nn.Linear(8, 8), nn.Linear(8, 8), exact=True),
    "residual": lambda: rnn.InvertibleResidual(nn.Linear(8, 8)),
    "mixing": lambda: rnn.FlowSequential(rnn.ActNorm(8), rnn.Permute.random(8), rnn.InvertibleLinear(8), rnn.LeakyReLU()),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore:Dynamo detected a call")
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch.export.load of torch 2.11
@pytest.mark.parametrize("how", ["trace", "export", "compile"])
@pytest.mark.parametrize("make", RECORDED.values(), ids=RECORDED)
def test_a_trained_block_is_deployed(make: Callable[[], nn.Module], how: str) -> None:
    """What is recorded of it is saved, loaded and run as any module is: no Python is left in it, and no value is asked for."""
    net, x, file = make(), torch.randn(3, 8), io.BytesIO()
    net(x)
    net.eval()
    with torch.no_grad():
        if how == "trace":
            torch.jit.save(torch.jit.trace(net, x), file)
            file.seek(0)
            loaded = torch.jit.load(file)
        elif how == "export":
            torch.export.save(torch.export.export(net, (x,)), file)
            file.seek(0)
            loaded = torch.export.load(file).module()
        else:
            torch._dynamo.reset()
            loaded = torch.compile(net, backend="aot_eager", fullgraph=True)
        assert torch.equal(loaded(x), net(x))


class Tagged(torch.Tensor):
    """A subclass."""


def test_tensors_that_are_left_alone() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    jagged = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=torch.jagged, requires_grad=True)
    matrix = torch.eye(4).to_sparse().requires_grad_()
    tagged = torch.randn(3, 4).as_subclass(Tagged).requires_grad_()
    linear = nn.Linear(4, 4)
    uses: list[tuple[Any, list[Tensor]]] = [
        (lambda: linear(jagged).sin().values().sum(), [jagged, linear.weight]),
        (lambda: torch.sparse.mm(matrix, x.T.sin()).sin().sum(), [x]),
        (lambda: linear(tagged).sin().sum(), [linear.weight]),
        (lambda: rnn.AdditiveCoupling(nn.Linear(2, 2), nn.Linear(2, 2), dim=-1)(tagged).sin().sum(), [tagged]),
        (lambda: torch.view_as_real((torch.complex(x, x) * 2).conj().sin()).sum(), [x]),
        (lambda: revhooks.checkpoint(lambda t: linear(t).sin(), jagged).values().sum(), [jagged]),
    ]
    for use, leaves in uses:
        torch.manual_seed(0)
        expected = torch.autograd.grad(use(), leaves)
        torch.manual_seed(0)
        with revhooks.reversible():
            got = torch.autograd.grad(use(), leaves)
        for a, b in zip(expected, got, strict=True):
            a, b = (t.values() if t.layout is torch.jagged else t.to_dense() for t in (a, b))
            assert torch.equal(a.as_subclass(Tensor), b.as_subclass(Tensor))


class Recursive(nn.Module):
    """A block whose branch calls the block itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp(4, gain=0.5)
        self.depth = 0
        self.block: list[nn.Module] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.depth < 2:
            self.depth += 1
            try:
                return self.inner(x) + self.block[0](torch.cat([x, x], -1))[..., :4].tanh()
            finally:
                self.depth -= 1
        return self.inner(x)


def test_a_block_inside_its_own_branch() -> None:
    branch = Recursive()
    block = rnn.AdditiveCoupling(branch, mlp(4), dim=-1)
    branch.block.append(block)
    branch.block[0] = block
    net = nn.Sequential(block, block)
    x = X.clone().requires_grad_()
    net.double()
    results = []
    for reverse in (False, True):
        with revhooks.reversible() if reverse else torch.enable_grad():
            results.append(torch.autograd.grad(loss(net(x)), [x, *net.parameters()]))
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*results, strict=True))


# -- errors where they hurt


class Fails(nn.Module):
    """Raises in its n-th call."""

    when, error = -1, RuntimeError

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4, gain=0.5)

    def forward(self, x: Tensor) -> Tensor:
        Fails.when -= 1
        if Fails.when == 0:
            raise Fails.error("on purpose")
        return self.net(x)


@kinds
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_anywhere_and_then_a_step(kind: str, error: type[BaseException]) -> None:
    """In forward, in the first try of an inverse, in a replay, in an inverse: afterwards all is as before."""
    net = KINDS[kind](Fails, 3)
    Fails.error = error  # type: ignore[assignment]
    for when in range(1, 12):
        Fails.when = when
        try:
            with revhooks.reversible():
                loss(net.float()(X.float())).backward()
        except error:
            pass
        assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
        assert all("forward" not in vars(module) for module in net.modules())
        Fails.when = -1
        net.zero_grad()
        same_as_plain(net, backward, steps=1)


# -- data parallelism


def _parallel(rank: int, path: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)

    def branch() -> nn.Module:
        return nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Tanh())

    options: list[dict[str, Any]] = [
        {}, {"find_unused_parameters": True}, {"static_graph": True}, {"gradient_as_bucket_view": True},
    ]  # fmt: skip
    out = []
    for reverse in (False, True):
        for option in options:
            torch.manual_seed(0)
            net: nn.Module = nn.Sequential(
                rnn.AdditiveCoupling(branch(), branch()), rnn.ReversibleSequential(branch(), branch(), branch(), branch())
            )
            model = DistributedDataParallel(net.double(), **option)
            x = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
            for _ in range(3):
                model.zero_grad()
                with revhooks.reversible() if reverse else torch.enable_grad():
                    with model.no_sync() if not option else torch.enable_grad():
                        model(x * 2).square().mean().backward()
                    model(x).square().mean().backward()
            out.append([p.grad.clone() for p in net.parameters()] + [b.double().clone() for b in net.buffers()])
    half = len(out) // 2
    equal = [
        all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*pair, strict=True))
        for pair in zip(out[:half], out[half:], strict=True)
    ]
    results.put((rank, "ddp", equal))
    out = []
    for reverse in (False, True):
        torch.manual_seed(0)
        blocks = [rnn.AdditiveCoupling(branch(), branch()) for _ in range(2)]
        net = nn.Sequential(*blocks).double()
        for module in list(net.modules()):
            if isinstance(module, nn.Sequential) and isinstance(module[0], nn.BatchNorm1d):
                # SyncBatchNorm's forward runs on gloo; its module refuses tensors of the CPU
                module[0] = Synced(4).double()
        x = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
        for _ in range(2):
            with revhooks.reversible() if reverse else torch.enable_grad():
                net(x).square().mean().backward()
        out.append([p.grad.clone() for p in net.parameters()] + [b.double().clone() for b in net.buffers()])
    results.put((rank, "sync", [_close(*out)]))
    results.put((rank, "sharded", [_close(*[_sharded(how, rank, reverse) for reverse in (False, True)]) for how in SHARDED]))
    dist.destroy_process_group()


SHARDED = ("data", "tensor")


def _sharded(how: str, rank: int, reverse: bool) -> list[Tensor]:
    """Gradients of blocks whose parameters lie in parts in both processes, and come together for a call or not at all."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    blocks = [rnn.AffineCoupling(*[nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 8)) for _ in "fg"]) for _ in range(3)]
    net = nn.Sequential(*blocks, nn.LayerNorm(8), nn.Linear(8, 8)).double()
    for block in blocks:
        if how == "data":
            fully_shard(block, mesh=mesh)
            continue
        for fn in (block.f, block.g):
            parallelize_module(fn, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})  # type: ignore[arg-type]
    if how == "data":
        fully_shard(net, mesh=mesh)
    x = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(rank if how == "data" else 0))
    for _ in range(3):
        net.zero_grad()
        with revhooks.reversible() if reverse else contextlib.nullcontext() as run:
            net(x).square().mean().backward()
        assert run is None or run.stats.inversions == 2
    grads = [p.grad for p in net.parameters()]
    return [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]  # type: ignore[misc]


def _close(plain: list[Tensor], rev: list[Tensor]) -> bool:
    return all(torch.allclose(a, b, atol=1e-10) for a, b in zip(plain, rev, strict=True))


class Synced(nn.BatchNorm1d):
    """Batch norm over all processes, as SyncBatchNorm: collectives in forward, in its replay, and in backward."""

    def forward(self, x: Tensor) -> Tensor:
        from torch.distributed.nn.functional import all_reduce

        mean = all_reduce(x.mean(0)) / 2
        var = all_reduce((x - mean).square().mean(0)) / 2
        with torch.no_grad():
            self.running_mean.lerp_(mean, 0.1)
            self.running_var.lerp_(var, 0.1)
            self.num_batches_tracked += 1
        return (x - mean) * (var + self.eps).rsqrt() * self.weight + self.bias


@pytest.mark.cpu(reason="gloo")
def test_data_parallel(tmp_path: Any) -> None:
    """memcnn and reformer-pytorch raise "marked ready twice"."""
    context = mp.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=_parallel, args=(rank, str(tmp_path / "store"), results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    got = [results.get(timeout=240) for _ in range(6)]
    for worker in workers:
        worker.join(timeout=60)
    assert all(all(equal) for _, _, equal in got), got


# -- workers, and many steps


class Rows:
    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> Tensor:
        return torch.full((8,), float(i)) / 24


@pytest.mark.cpu(reason="workers make batches there")
def test_workers_of_a_data_loader() -> None:
    net = KINDS["own"](small, 3)
    with revhooks.reversible() as run:
        for batch in DataLoader(Rows(), batch_size=6, num_workers=2):
            loss(net(batch)).backward()
    assert run.stats.inversions == 4 * 2
    assert run.stats.held_bytes == 0


@pytest.fixture
def resident() -> Any:
    process = psutil.Process()
    return lambda: process.memory_info().rss


@pytest.mark.cpu(reason="resident memory")
def test_a_thousand_steps_hold_memory_flat(resident: Any, no_gc: None) -> None:
    """revlib's hook modes and DataParallel users of memcnn see it grow."""
    net = KINDS["own"](lambda: nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Dropout(0.1)), 3)
    x = torch.randn(64, 128)

    def steps(n: int) -> None:
        for _ in range(n):
            with revhooks.reversible():
                loss(net(x)).backward()

    steps(200)
    before = resident()
    steps(1000)
    assert resident() - before < 2 << 20  # a step saves half a MiB


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_gradscaler_on_cuda(dtype: torch.dtype) -> None:
    results = []
    for reverse in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(*[rnn.AdditiveCoupling(mlp(32), mlp(32), dim=-1) for _ in range(4)]).cuda()
        optimizer, scaler = torch.optim.SGD(net.parameters(), lr=1e-2), torch.amp.GradScaler("cuda")
        x = torch.randn(16, 64, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
        for _ in range(3):
            optimizer.zero_grad()
            with revhooks.reversible() if reverse else torch.enable_grad():
                with torch.autocast("cuda", dtype):
                    value = net(x).float().square().mean()
                scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append([value.detach(), *[p.detach() for p in net.parameters()]])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=2e-3, rtol=2e-2)
