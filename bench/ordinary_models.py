"""Ordinary models, as people write them: none knows of revhooks.

Each maker returns a `revhooks.profiler.tracker.Workload`: a model in training mode, inputs, a loss. Sizes are arguments, so that
the bench, its quick form and the tests share them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revhooks.profiler.workload import Workload

VOCABULARY = 512  # small: a large one's logits would hide what the layers save


class Skipped(Exception):
    """A model that cannot be made here, and why."""


# -- GPT


class GPTBlock(nn.Module):
    """Pre-norm attention and GELU-MLP."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.project(attended.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    """Token and position embeddings, pre-norm blocks, a head: logits ``(B, T, V)`` from indices ``(B, T)``."""

    def __init__(self, depth: int, width: int, heads: int, tokens: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(tokens, width)
        self.blocks = nn.ModuleList([GPTBlock(width, heads, dropout) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, indices: Tensor) -> Tensor:
        x = self.words(indices) + self.places(torch.arange(indices.shape[1], device=indices.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


# -- Llama


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of ``(B, heads, T, C)``, in the form of Hugging Face's: halves, not pairs.

    References:
        RoFormer (Su et al., 2021, arXiv:2104.09864), eq. 34.
    """
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class LlamaBlock(nn.Module):
    """Pre-norm attention with rotary positions, and SwiGLU."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        hidden = 8 * width // 3 // 32 * 32
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (linear(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    """Logits ``(B, T, V)`` from indices ``(B, T)``."""

    def __init__(self, depth: int, width: int, heads: int, tokens: int) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList([LlamaBlock(width, heads) for _ in range(depth)])
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        channels = width // heads
        rates = 10000.0 ** (-torch.arange(0, channels, 2) / channels)
        angles = torch.outer(torch.arange(tokens), torch.cat([rates, rates]))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, indices: Tensor) -> Tensor:
        x = self.words(indices)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.head(self.norm(x))


# -- ResNet


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


class PreActivation(nn.Module):
    """BN-ReLU-Conv3x3 twice, and a shortcut; the net's first block comes after an activation and has none of its own."""

    def __init__(self, inputs: int, width: int, stride: int, *, first: bool = False) -> None:
        super().__init__()
        before = [] if first else [nn.BatchNorm2d(inputs), nn.ReLU(inplace=True)]
        self.net = nn.Sequential(
            *before, conv(inputs, width, 3, stride), nn.BatchNorm2d(width), nn.ReLU(inplace=True), conv(width, width)
        )
        same = stride == 1 and inputs == width
        self.shortcut = nn.Identity() if same else nn.Sequential(conv(inputs, width, 1, stride), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        out += self.shortcut(x)
        return out


class ResNet110(nn.Module):
    """The CIFAR net of memcnn's and the RevNet paper's tables: 18 blocks at each of 16, 32 and 64 channels.

    References:
        The Reversible Residual Network (Gomez et al., 2017, arXiv:1707.04585), table 2.
    """

    def __init__(self, blocks: int = 18) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv(3, 16), nn.BatchNorm2d(16), nn.ReLU()]
        inputs = 16
        for width in (16, 32, 64):
            for index in range(blocks):
                stride = 2 if index == 0 and width > 16 else 1
                layers.append(PreActivation(inputs, width, stride, first=len(layers) == 3))
                inputs = width
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1, each with BN; the ReLU after the sum in place, as in torchvision.

    References:
        Deep Residual Learning (He et al., 2015, arXiv:1512.03385), figure 5; stride in the 3x3 convolution.
    """

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = conv(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, outputs, 1), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        same = stride == 1 and inputs == outputs
        self.downsample = None if same else nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet50(nn.Module):
    """3, 4, 6, 3 bottlenecks, 1000 classes."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv(3, 64, 7, 2), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
        inputs = 64
        for stage, blocks in enumerate((3, 4, 6, 3)):
            width = 64 << stage
            for index in range(blocks):
                layers.append(Bottleneck(inputs, width, 2 if stage and not index else 1))
                inputs = 4 * width
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(inputs, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


# -- workloads


def of_text(model: nn.Module, batch: int, tokens: int) -> Workload:
    """Next-token prediction on random indices."""
    text = torch.randint(VOCABULARY, (batch, tokens + 1))
    targets = text[:, 1:].flatten()
    return Workload(model, (text[:, :-1].clone(),), lambda logits: F.cross_entropy(logits.flatten(0, 1), targets))


def of_images(model: nn.Module, batch: int, size: int, classes: int) -> Workload:
    """Classification of noise."""
    targets = torch.randint(classes, (batch,))
    return Workload(model, (torch.randn(batch, 3, size, size),), lambda logits: F.cross_entropy(logits, targets))


def gpt(depth: int, batch: int = 4, tokens: int = 256, width: int = 384, heads: int = 6, dropout: float = 0.0) -> Workload:
    return of_text(GPT(depth, width, heads, tokens, dropout), batch, tokens)


def llama(depth: int, batch: int = 4, tokens: int = 256, width: int = 384, heads: int = 6) -> Workload:
    return of_text(Llama(depth, width, heads, tokens), batch, tokens)


class Labelled(nn.Module):
    """A model of transformers that computes its own loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, indices: Tensor) -> Tensor:
        return self.model(input_ids=indices, labels=indices).loss


def gpt2(depth: int, batch: int = 4, tokens: int = 256, width: int = 384, heads: int = 6, **config: Any) -> Workload:
    """Hugging Face's class, from a configuration.

    Raises:
        Skipped: transformers is not installed.
    """
    try:
        from transformers import GPT2Config, GPT2LMHeadModel, logging
    except ImportError as error:
        raise Skipped(f"transformers cannot be imported: {error}") from error
    logging.set_verbosity_error()
    sizes = {"n_layer": depth, "n_embd": width, "n_head": heads, "n_positions": tokens, "vocab_size": VOCABULARY}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, **config))
    return Workload(Labelled(model).train(), (torch.randint(VOCABULARY, (batch, tokens)),), lambda loss: loss)


def resnet110(batch: int = 32, blocks: int = 18) -> Workload:
    return of_images(ResNet110(blocks), batch, 32, 10)


def resnet50(batch: int = 8) -> Workload:
    return of_images(ResNet50(), batch, 64, 1000)
