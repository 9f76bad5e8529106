"""Linear and convolution layers whose spectral norm is held below a coefficient, and exact norms to verify them.

References:
    Invertible Residual Networks (Behrmann et al., 2018, arXiv:1811.00995), section 3.
    Regularisation of Neural Networks by Enforcing Lipschitz Continuity (Gouk et al., 2018, arXiv:1804.04368), section 3.
    The Singular Values of Convolutional Layers (Sedghi et al., 2018, arXiv:1805.10408), theorem 6.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ShapeError, explain

__all__ = [
    "SpectralConv1d",
    "SpectralConv2d",
    "SpectralConv3d",
    "SpectralLayer",
    "SpectralLinear",
    "contract",
    "conv_singular_values",
]

FIRST_STEPS = 50  # of power iteration, for a layer that has not seen this input shape
DENSE = 2**20  # elements of a convolution's matrix up to which it is written out

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class SpectralLayer(nn.Module):
    """What contractive layers have in common: ``W <- c W / sigma`` where ``sigma > c``.

    ``sigma = |A v|`` for the layer's linear map ``A`` and a unit vector ``v`` of the input space, brought closer to the
    leading singular vector by power iteration with ``A`` and its adjoint: the map itself on the input shape that it sees,
    not the kernel flattened to a matrix. It never exceeds the norm, so early in training the layer may exceed ``coeff`` a little;
    `lipschitz_bound` says by how much. ``v`` is a buffer; forward finds one where there is none yet for its
    input shape and otherwise leaves it alone: `advance` takes steps. Finding it draws no random numbers.

    The parameters keep their names and hold the weights before scaling.

    Attributes:
        coeff: the coefficient c.
        v: the singular vector, shape ``(1, *input shape)``; empty before the first call.
    """

    coeff: float
    v: Tensor
    weight: Tensor

    def operator(self, v: Tensor, weight: Tensor) -> Tensor:
        """``A v``: the layer's linear map with ``weight`` in place of its own."""
        raise NotImplementedError

    def adjoint(self, u: Tensor, weight: Tensor, shape: Sequence[int]) -> Tensor:
        """``A^T u``, of the input shape ``shape``."""
        raise NotImplementedError

    def scaled_weight(self, shape: Sequence[int]) -> Tensor:
        """``W / max(1, sigma / c)`` for inputs of shape ``shape`` (of one sample); differentiable."""
        if self.v.shape[1:] != torch.Size(shape):
            self.v = self._power(self._start(shape), FIRST_STEPS)
        weight: Tensor = self.weight / self.factor().to(self.weight.dtype)
        return weight

    def factor(self) -> Tensor:
        """``max(1, sigma / c)``, what the weights are divided by: a scalar of float32 or wider."""
        with _without_autocast(self.weight.device):
            v, weight = self._wide()
            sigma: Tensor = torch.linalg.vector_norm(self.operator(v, weight))
            return (sigma / self.coeff).clamp(min=1)

    @torch.no_grad()
    def advance(self, steps: int = 1) -> None:
        """Take ``steps`` steps of power iteration, if the layer has seen an input; training takes one a forward."""
        if self.v.numel():
            self.v = self._power(self.v, steps)

    @torch.no_grad()
    def operator_norm(self, *, rtol: float = 1e-10, max_steps: int = 10_000) -> float:
        """The spectral norm of the scaled map: power iteration in float64 until it grows by less than ``rtol``.

        Approached from below; exact for zero padding, strides, dilation and groups, on the input shape last seen.

        Raises:
            ShapeError: the layer has not seen an input yet.
        """
        self._need_shape()
        v, weight = self.v.double(), self.weight.double()
        before, sigma = 0.0, float(torch.linalg.vector_norm(self.operator(v, weight)))
        for _ in range(max_steps):
            if sigma <= before * (1 + rtol):
                break
            v = self._power(v, 1, weight)
            before, sigma = sigma, float(torch.linalg.vector_norm(self.operator(v, weight)))
        return sigma / float(self.factor())

    def lipschitz_bound(self) -> float:
        """An upper bound of the layer's Lipschitz constant as it stands, in float64; exact where its class says so.

        Raises:
            ShapeError: the layer has not seen an input yet.
        """
        self._need_shape()
        with torch.no_grad():
            return self._norm_bound(self.weight.double()) / float(self.factor())

    def _norm_bound(self, weight: Tensor) -> float:
        raise NotImplementedError

    def _power(self, v: Tensor, steps: int, weight: Tensor | None = None) -> Tensor:
        """A new tensor: a frame that holds the old one still finds in it what its forward saw."""
        with torch.no_grad(), _without_autocast(self.weight.device):
            if weight is None:
                v, weight = self._wide(v)
            for _ in range(steps):
                image = self.adjoint(self.operator(v, weight), weight, v.shape)
                norm = torch.linalg.vector_norm(image)
                v = torch.where(norm > 0, image / norm, v)  # zero weights must not swallow it
        return v

    def _wide(self, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return (self.v if v is None else v).to(self.weight.device, dtype), self.weight.to(dtype)

    def _start(self, shape: Sequence[int]) -> Tensor:
        noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0), device="cpu")
        start: Tensor = noise / torch.linalg.vector_norm(noise)
        return start.to(self.weight.device)

    def _need_shape(self) -> None:
        if not self.v.numel():
            raise ShapeError(
                explain(
                    type(self).__name__,
                    expected="a layer that knows its input shape",
                    got="one that was never called",
                    remedy="call it once on an input first",
                )
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """A checkpoint's ``v`` has the shape that the layer saw there."""
        saved = state_dict.get(f"{prefix}v")
        if isinstance(saved, Tensor) and saved.shape != self.v.shape:
            self.v = torch.empty_like(saved, device=self.weight.device)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """The layer's own, and the coefficient."""
        return f"{super().extra_repr()}, coeff={self.coeff}"


class SpectralLinear(SpectralLayer, nn.Linear):
    """A Linear layer of spectral norm at most ``coeff``; `lipschitz_bound` is exact. Made by `contract`.

    Shape:
        ``(*, in_features)`` to ``(*, out_features)``, any floating dtype.

    Example:
        >>> layer = contract(nn.Linear(3, 3), 0.5)
        >>> _ = layer(torch.randn(2, 3))
        >>> layer.lipschitz_bound() < 0.501
        True
    """

    def operator(self, v: Tensor, weight: Tensor) -> Tensor:
        """``W v``."""
        return F.linear(v, weight)

    def adjoint(self, u: Tensor, weight: Tensor, shape: Sequence[int]) -> Tensor:
        """``W^T u``."""
        return F.linear(u, weight.mT)

    def _norm_bound(self, weight: Tensor) -> float:
        return float(torch.linalg.matrix_norm(weight, 2))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name in nn.Linear
        """The layer with scaled weights."""
        return F.linear(input, self.scaled_weight((self.in_features,)), self.bias)


class _SpectralConv(SpectralLayer, nn.modules.conv._ConvNd):
    """A convolution of spectral norm at most ``coeff`` on the input shape that it sees.

    `lipschitz_bound` is exact for circular padding at stride 1 (by the FFT of the kernel) and on small shapes (by the
    matrix: 1,024 elements in and out). Elsewhere it is the norm of the circular convolution on the padded shape, of which the
    layer's is a part: a bound, a few percent above `operator_norm`.
    """

    def operator(self, v: Tensor, weight: Tensor) -> Tensor:
        """Pad, then convolve."""
        padded = F.pad(v, self._pads, mode=self._mode)
        return _CONV[self._rank](padded, weight, None, self.stride, 0, self.dilation, self.groups)

    def adjoint(self, u: Tensor, weight: Tensor, shape: Sequence[int]) -> Tensor:
        """Convolve transposed, then undo the padding: crop, or add up what was copied."""
        padded = self._padded(shape[2:])
        covered = [
            (n - 1) * s + d * (k - 1) + 1
            for n, s, d, k in zip(u.shape[2:], self.stride, self.dilation, self.kernel_size, strict=True)
        ]
        uncovered = tuple(p - c for p, c in zip(padded, covered, strict=True))
        spread = _TRANSPOSED[self._rank](u, weight, None, self.stride, 0, uncovered, self.groups, self.dilation)
        if self.padding_mode == "zeros":
            return F.pad(spread, [-p for p in self._pads])
        source = self._source(shape, u.device)
        gathered = spread.new_zeros(shape[1], math.prod(shape[2:]))
        return gathered.index_add(1, source, spread.reshape(shape[1], -1)).reshape(shape)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name in nn.Conv2d
        """The convolution with scaled weights."""
        weight = self.scaled_weight(input.shape[-self._rank - 1 :])
        return self._conv_forward(input, weight, self.bias)

    def _norm_bound(self, weight: Tensor) -> float:
        shape = self.v.shape[2:]
        if self.padding_mode == "circular" and self._outputs(shape) == list(shape):
            return _largest(weight, shape, self.dilation, self.groups)
        size = self.v.numel()
        if size * weight.shape[0] * math.prod(self._outputs(shape)) <= DENSE:
            units = torch.eye(size, dtype=weight.dtype, device=weight.device).reshape(size, *self.v.shape[1:])
            return float(torch.linalg.matrix_norm(self.operator(units, weight).flatten(1), 2))
        copies = 1.0
        if self.padding_mode != "zeros":
            copies = float(self._source(self.v.shape, weight.device).bincount().max()) ** 0.5
        return copies * _largest(weight, self._padded(shape), self.dilation, self.groups)

    @property
    def _rank(self) -> int:
        return len(self.kernel_size)

    @property
    def _pads(self) -> list[int]:
        return self._reversed_padding_repeated_twice  # for padding="same" too

    @property
    def _mode(self) -> str:
        return "constant" if self.padding_mode == "zeros" else self.padding_mode

    def _padded(self, shape: Iterable[int]) -> list[int]:
        pads = self._pads
        return [n + pads[-2 * i - 2] + pads[-2 * i - 1] for i, n in enumerate(shape)]

    def _outputs(self, shape: Iterable[int]) -> list[int]:
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        return [(n - r - 1) // s + 1 for n, r, s in zip(self._padded(shape), reach, self.stride, strict=True)]

    def _source(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Which position of the input each position of the padded one was copied from."""
        places = torch.arange(math.prod(shape[2:]), dtype=torch.float64, device=device).reshape(1, 1, *shape[2:])
        return F.pad(places, self._pads, mode=self._mode).flatten().long()


class SpectralConv1d(_SpectralConv, nn.Conv1d):
    """A Conv1d of spectral norm at most ``coeff``; made by `contract`."""


class SpectralConv2d(_SpectralConv, nn.Conv2d):
    """A Conv2d of spectral norm at most ``coeff``; made by `contract`.

    Example:
        >>> layer = contract(nn.Conv2d(4, 4, 3, padding=1), 0.5)
        >>> _ = layer(torch.randn(2, 4, 8, 8))
        >>> layer.operator_norm() < 0.51
        True
    """


class SpectralConv3d(_SpectralConv, nn.Conv3d):
    """A Conv3d of spectral norm at most ``coeff``; made by `contract`."""


_KINDS: dict[type[nn.Module], type[SpectralLayer]] = {
    nn.Linear: SpectralLinear,
    nn.Conv1d: SpectralConv1d,
    nn.Conv2d: SpectralConv2d,
    nn.Conv3d: SpectralConv3d,
}


def contract(module: nn.Module, coeff: float) -> nn.Module:
    """Make every Linear and Conv1d/2d/3d layer in ``module`` contractive.

    The layers inside are replaced in place by their `SpectralLayer` kind with the same parameters under the same names, so that
    optimizers made before stay valid. Subclasses of these layers are left alone.

    Args:
        module: any module; a single layer too.
        coeff: the largest spectral norm of a layer, above 0.

    Returns:
        The module; for a single layer, what stands in its place.

    Example:
        >>> contract(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), 0.9)
        Sequential(
          (0): SpectralLinear(in_features=2, out_features=2, bias=True, coeff=0.9)
          (1): ReLU()
        )
    """
    made: dict[nn.Module, nn.Module] = {}
    if type(module) in _KINDS:
        return _spectral(module, coeff)
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if type(child) in _KINDS:
                layer = cast(nn.Module, child)
                made[layer] = made.get(layer) or _spectral(layer, coeff)
                parent._modules[name] = made[layer]
    return module


def _spectral(layer: nn.Module, coeff: float) -> SpectralLayer:
    kind = _KINDS[type(layer)]
    spectral = kind.__new__(kind)
    spectral.__dict__.update({name: value.copy() if isinstance(value, dict) else value for name, value in vars(layer).items()})
    spectral.coeff = coeff
    weight = cast(Tensor, layer.weight)
    spectral.register_buffer("v", weight.new_empty(0, dtype=torch.promote_types(weight.dtype, torch.float32)))
    return spectral


def conv_singular_values(weight: Tensor, shape: Sequence[int], *, dilation: int | Sequence[int] = 1, groups: int = 1) -> Tensor:
    """All singular values of a convolution with circular padding and stride 1, exact, by the FFT of its kernel.

    They are those of the ``C_out x C_in`` matrices that the transformed kernel has at each of the ``N`` frequencies.

    Args:
        weight: kernel of shape ``(C_out, C_in / groups, *kernel)``, any floating dtype.
        shape: the spatial shape of the input, one size for each dimension of the kernel.
        dilation: as in `torch.nn.Conv2d`.
        groups: as in `torch.nn.Conv2d`.

    Returns:
        The values in descending order, float64, shape ``(N * min(C_out, C_in),)`` for one group.

    Raises:
        ShapeError: ``shape`` has another number of dimensions than the kernel.

    References:
        Sedghi et al., 2018, arXiv:1805.10408, theorem 6.

    Example:
        >>> conv_singular_values(torch.tensor([[[1.0, 1.0]]]), (4,)).round(decimals=3)
        tensor([2.0000, 1.4140, 1.4140, 0.0000], dtype=torch.float64)
    """
    if len(shape) != weight.dim() - 2:
        raise ShapeError(
            explain(
                "conv_singular_values",
                expected=f"{weight.dim() - 2} spatial sizes for a kernel of shape {tuple(weight.shape)}",
                got=repr(tuple(shape)),
                remedy="give the input's spatial shape, without batch and channels",
            )
        )
    steps = (dilation,) * len(shape) if isinstance(dilation, int) else dilation
    values = [torch.linalg.svdvals(part) for part in _transforms(weight.detach(), shape, steps, groups)]
    return torch.cat([part.flatten() for part in values]).sort(descending=True).values


def _largest(weight: Tensor, shape: Sequence[int], dilation: Sequence[int], groups: int) -> float:
    return max(float(torch.linalg.matrix_norm(part, 2).max()) for part in _transforms(weight, shape, dilation, groups))


def _transforms(weight: Tensor, shape: Sequence[int], dilation: Sequence[int], groups: int) -> Iterator[Tensor]:
    """The kernel's matrices ``(n, C_out / groups, C_in / groups)``, some frequencies of one group at a time."""
    kernel = torch.zeros(*shape, *weight.shape[:2], dtype=torch.float64, device=weight.device)
    taps = torch.cartesian_prod(*(torch.arange(n, device="cpu") for n in weight.shape[2:])).reshape(-1, len(shape))
    places = (taps * torch.tensor(dilation, device="cpu")) % torch.tensor(tuple(shape), device="cpu")
    values = weight.double().flatten(2).permute(2, 0, 1)
    kernel.index_put_(tuple(places.to(weight.device).T), values, accumulate=True)  # a kernel wider than the input wraps
    matrices = torch.fft.fftn(kernel, dim=tuple(range(len(shape)))).flatten(0, -3)
    for group in matrices.chunk(groups, 1):
        yield from group.split(256)


@contextlib.contextmanager
def _without_autocast(device: torch.device) -> Iterator[None]:
    """Norms in bfloat16 would be off by a percent."""
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield
