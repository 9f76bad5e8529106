"""What bench/host_cost.py measures: models, their data, and the ways to run a step. Tiny on a CPU, of real sizes on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from ordinary_models import GPT, ResNet50
from peers import PEERS, pairs
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import revhooks
from revhooks.nn import AdditiveCoupling, ReversibleSequential

Around = Callable[[], AbstractContextManager[Any]]


class Work:
    """A loss and the parameters whose gradients a step makes.

    Args:
        loss: of the model's data.
        parameters: of all that it is computed with.
        around: a context for forward.
    """

    def __init__(self, loss: Callable[[], Tensor], parameters: Iterable[nn.Parameter], around: Around = nullcontext) -> None:
        self.loss = loss
        self.parameters = list(parameters)
        self.around = around


class Step:
    """One forward and backward.

    Args:
        work: what is computed.
        context: around both.
        regions_of: modules each of which is called in a region of torch's checkpoint.
    """

    def __init__(self, work: Work, context: Around = nullcontext, *, regions_of: Sequence[nn.Module] = ()) -> None:
        self._work = work
        self._context = context
        self._regions = regions_of

    def __call__(self) -> None:
        for parameter in self._work.parameters:
            parameter.grad = None
        with self._context(), regions(self._regions):
            with self._work.around():
                loss = self._work.loss()
            loss.backward()

    def gradients(self) -> list[Tensor]:
        self()
        return [p.grad.clone() for p in self._work.parameters if p.grad is not None]


class regions:
    """Each of these modules called in a region of `torch.utils.checkpoint`."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._blocks = blocks

    def __enter__(self) -> None:
        for block in self._blocks:
            block.__dict__["forward"] = _region(type(block).forward, block)

    def __exit__(self, *_: object) -> None:
        for block in self._blocks:
            del block.__dict__["forward"]


def _region(forward: Callable[..., Any], block: nn.Module) -> Callable[..., Any]:
    return lambda *args, **kwargs: checkpoint(forward, block, *args, use_reentrant=False, **kwargs)


def same(tensor: Tensor) -> Tensor:
    return tensor


def bfloat16(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, torch.bfloat16)


# ------------------------------------------------------------------------------------------- ordinary models


def ordinary(work: Work, blocks: list[nn.Module], device: str, *, offload: bool = False) -> dict[str, Step]:
    """What is compared on an ordinary model, by name; plain first."""
    replay, budget = type(blocks[0]), "auto" if device == "cuda" else "1GiB"
    modes: dict[str, dict[str, Any]] = {
        "ops=False": {"ops": False},
        "reversible()": {},
        'reversible(guard="off")': {"guard": "off"},
        "replay=": {"replay": replay},
        'replay=, guard="off"': {"replay": replay, "guard": "off"},
        "budget=, replay=": {"budget": budget, "replay": replay},
        "budget=": {"budget": budget},
        **({"offload=True": {"offload": True}} if offload else {}),
    }
    return {
        "plain": Step(work),
        "plain again": Step(work),
        "torch checkpoint": Step(work, regions_of=blocks),
        "hooks that return their argument": Step(work, lambda: saved_tensors_hooks(same, same)),
        **{title: Step(work, partial(revhooks.reversible, **options)) for title, options in modes.items()},
    }


def _gpt(device: str, sizes: tuple[int, int, int, int, int, int]) -> dict[str, Step]:
    width, layers, tokens, batch, words, heads = sizes if device == "cuda" else (32, 12, 8, 1, 64, 4)
    model = GPT(layers, width, heads, tokens)
    model.words, model.head = nn.Embedding(words, width), nn.Linear(width, words, bias=False)
    model.to(device)
    indices = torch.randint(0, words, (batch, tokens), device=device)
    target = torch.randint(0, words, (batch * tokens,), device=device)

    def loss() -> Tensor:
        return F.cross_entropy(model(indices).flatten(0, 1).float(), target)

    work = Work(loss, model.parameters(), lambda: bfloat16(device))
    return ordinary(work, list(model.blocks), device, offload=device == "cuda")


def gpt(device: str) -> dict[str, Step]:
    """12 layers under autocast: GPT-2 small, 8 x 1024 tokens, on a GPU."""
    return _gpt(device, (768, 12, 1024, 8, 50304, 12))


def wide(device: str) -> dict[str, Step]:
    """12 layers of width 1,024 on 32 x 1024 tokens of a vocabulary of 8,192."""
    return _gpt(device, (1024, 12, 1024, 32, 8192, 16))


def llama(device: str) -> dict[str, Step]:
    """8 layers of width 2,048 on 4 x 2048 tokens of a vocabulary of 32,000, as transformers has them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width, tokens, batch, words, heads = (2048, 2048, 4, 32000, 16) if device == "cuda" else (32, 8, 1, 64, 4)
    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=8, intermediate_size=8 * width // 3, num_attention_heads=heads, vocab_size=words
    )
    model = LlamaForCausalLM(config).to(device).train()
    indices = torch.randint(0, words, (batch, tokens), device=device)

    def loss() -> Tensor:
        found: Tensor = model(input_ids=indices, labels=indices, use_cache=False).loss
        return found

    return ordinary(Work(loss, model.parameters(), lambda: bfloat16(device)), list(model.model.layers), device)


def resnet50(device: str) -> dict[str, Step]:
    """128 images of 224 pixels under autocast, channels last."""
    batch, size = (128, 224) if device == "cuda" else (2, 32)
    model = ResNet50().to(device, memory_format=torch.channels_last)
    x = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    target = torch.randint(0, 1000, (batch,), device=device)
    work = Work(lambda: F.cross_entropy(model(x).float(), target), model.parameters(), lambda: bfloat16(device))
    return ordinary(work, [block for block in model.features if hasattr(block, "downsample")], device)


# ------------------------------------------------------------------------------------------- reversible models


def reversible_models(
    fns: list[nn.Module],
    run: Callable[[nn.Module], Tensor],
    around: Around,
    *,
    dim: int,
    parameters: Iterable[nn.Parameter] = (),
    peers: bool = False,
) -> dict[str, Step]:
    """What is compared on branches F, G, F, G, ...: couplings, two streams, checkpointed couplings, peers.

    Args:
        run: loss of a body made of the branches.
        dim: of the two streams.
        parameters: those besides the branches'.
        peers: memcnn, RevTorch and revlib too, as far as they can be imported.
    """
    couplings = [AdditiveCoupling(f, g, dim=dim) for f, g in pairs(fns)]
    body = nn.Sequential(*couplings)
    every = [*body.parameters(), *parameters]
    chain, streams = (Work(partial(run, one), every, around) for one in (body, ReversibleSequential(*fns, dim=dim)))
    off = partial(revhooks.reversible, guard="off")
    steps: dict[str, Step] = {
        "plain": Step(chain),
        "plain again": Step(chain),
        "torch checkpoint": Step(chain, regions_of=list(couplings)),
        "reversible()": Step(chain, revhooks.reversible),
        'reversible(guard="off")': Step(chain, off),
        "two streams": Step(streams, revhooks.reversible),
        'two streams, guard="off"': Step(streams, off),
    }
    for name, make in PEERS.items() if peers else ():
        try:
            steps[name] = Step(Work(partial(run, make(fns).train()), every, around))
        except ImportError as error:
            print(f"{name} is left out: {error}")
    return steps


class _Conv(nn.Sequential):
    def __init__(self, channels: int) -> None:
        super().__init__(nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1, bias=False))


def revnet(device: str) -> dict[str, Step]:
    """Convolutional couplings: 32 of 64 + 64 channels on 64 images of 56 pixels, in TF32."""
    channels, size, batch, depth = (64, 56, 64, 32) if device == "cuda" else (4, 4, 1, 12)
    fns: list[nn.Module] = [_Conv(channels).to(device) for _ in range(2 * depth)]
    x = torch.randn(batch, 2 * channels, size, size, device=device)

    def run(body: nn.Module) -> Tensor:
        return body(x.detach().requires_grad_()).square().mean()  # the peers rebuild through inputs that require grad

    return reversible_models(fns, run, nullcontext, dim=1, peers=device == "cuda")


def streams(device: str) -> dict[str, Step]:
    """A chain over two streams of MLPs."""
    width, batch, depth = (1024, 8192, 48) if device == "cuda" else (16, 4, 24)
    fns = [nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)) for _ in range(depth)]
    model = ReversibleSequential(*fns, dim=-1).to(device)
    x = torch.randn(batch, 2 * width, device=device)
    work = Work(lambda: model(x).square().mean(), model.parameters())
    off = partial(revhooks.reversible, guard="off")
    return {
        "plain": Step(work),
        "plain again": Step(work),
        "torch checkpoint": Step(work, regions_of=list(fns)),
        "hooks that return their argument": Step(work, lambda: saved_tensors_hooks(same, same)),
        "reversible()": Step(work, revhooks.reversible),
        'reversible(guard="off")': Step(work, off),
    }


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.project = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        return self.project(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def revvit(device: str) -> dict[str, Step]:
    """24 blocks of width 1,024 on 64 images of 224 pixels in patches of 16, under autocast.

    References:
        Reversible Vision Transformers (Mangalam et al., 2022, arXiv:2302.04869), figure 2.
    """
    width, heads, batch, size, depth = (1024, 16, 64, 224, 24) if device == "cuda" else (16, 4, 1, 32, 6)
    fns: list[nn.Module] = []
    for _ in range(depth):
        mlp = [nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)]
        fns += [_Attention(width, heads), nn.Sequential(*mlp)]
    head = nn.Sequential(nn.LayerNorm(2 * width), nn.Linear(2 * width, 1000)).to(device)
    patches = nn.Conv2d(3, width, 16, 16).to(device)
    for fn in fns:
        fn.to(device)
    images = torch.randn(batch, 3, size, size, device=device)
    target = torch.randint(0, 1000, (batch,), device=device)

    def run(body: nn.Module) -> Tensor:
        tokens = patches(images).flatten(2).transpose(1, 2)
        return F.cross_entropy(head(body(torch.cat([tokens, tokens], -1)).mean(1)).float(), target)

    every = [*patches.parameters(), *head.parameters()]
    return reversible_models(fns, run, lambda: bfloat16(device), dim=-1, parameters=every)


PROXIES = {"gpt": gpt, "revnet": revnet, "streams": streams}  # of a GPU's host, on a CPU
WORKLOADS = {
    "gpt": gpt,
    "wide": wide,
    "llama": llama,
    "resnet50": resnet50,
    "revvit": revvit,
    "revnet": revnet,
    "streams": streams,
}
