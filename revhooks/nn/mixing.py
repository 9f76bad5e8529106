"""Layers that scale and mix channels: activation normalisation, invertible matrices, permutations.

References:
    Glow (Kingma and Dhariwal, 2018, arXiv:1807.03039), sections 3.1 and 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InversionError, explain
from ..functional import wide
from ..registry import invertible, register
from .flow import Flow, inverse_of_forward, inverse_with_ladj, invertible_with_ladj, own_precision

__all__ = ["ActNorm", "InvertibleConv1x1", "InvertibleLinear", "Permute"]


class ActNorm(Flow):
    """``y = exp(log_scale) * x + shift``, a channel at a time, set on the first batch so that ``y`` has mean 0 and variance 1.

    The first call in training mode sets the parameters; a channel that does not vary in it, or is not finite, keeps scale 1.
    Before that call, in evaluation mode too, the layer is the identity; it stays where it is if the inverse is trained before, as
    in variational inference. Make it before wrapping the model in
    DistributedDataParallel, else every process starts from a batch of its own.

    Args:
        channels: how many channels there are.
        dim: the dimension that they are in.

    Shape:
        Input and output ``(B, *)`` with ``channels`` in ``dim``: ``(B, C)``, ``(B, C, *)``; any floating dtype, which is kept.

    Raises:
        ShapeError: the input has other channels (on the call).

    References:
        Kingma and Dhariwal, 2018, arXiv:1807.03039, section 3.1.

    Example:
        >>> layer = ActNorm(3)
        >>> x = 5 + 2 * torch.randn(64, 3, 8, 8)
        >>> y, ladj = layer.call_and_ladj(x)
        >>> bool(y.mean().abs() < 1e-4), bool((y.std() - 1).abs() < 1e-2), torch.allclose(layer.inverse(y), x, atol=1e-4)
        (True, True, True)
    """

    initialized: Tensor

    def __init__(self, channels: int, *, dim: int = 1) -> None:
        super().__init__()
        self.channels = channels
        self.dim = dim
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.shift = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.tensor(False))
        self._known = False  # that it is initialized: reading the buffer makes an accelerator wait

    def forward(self, x: Tensor) -> Tensor:
        """Normalise; on the first batch set the parameters before."""
        if self.training and not self._known and not x.is_meta:
            if not self.initialized:
                self._initialize(x)
            self._known = True
        return self._normalize(x)

    # What `reversible()` brackets: setting the parameters stays outside, so that the first call inverts as any other
    def _normalize(self, x: Tensor) -> Tensor:
        scale, shift = self._broadcast(x)
        return x * scale + shift

    def inverse(self, y: Tensor) -> Tensor:
        """``(y - shift) / exp(log_scale)``."""
        if self.training and not self._known and torch.is_grad_enabled() and not y.is_meta:
            self.initialized.fill_(True)  # what training has made of the identity is not set anew by a batch
            self._known = True
        return self._denormalize(y)

    @invertible(inverse="_normalize", log_det=lambda layer, _, y: -layer.log_det(y))
    def _denormalize(self, y: Tensor) -> Tensor:
        scale, shift = self._broadcast(y)
        return (y - shift) / scale

    def log_det(self, x: Tensor) -> Tensor:
        """The sum of the log-scales, at every position: ``(B,)``."""
        dim = self._channel_dim(x, self.dim, self.channels)
        total = self.log_scale.sum(dtype=wide(self.log_scale.dtype))
        return (total * _positions(x, dim)).expand(x.shape[0])

    def _broadcast(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = [1] * x.dim()
        shape[self._channel_dim(x, self.dim, self.channels)] = self.channels
        return self.log_scale.exp().to(x.dtype).view(shape), self.shift.to(x.dtype).view(shape)

    @torch.no_grad()
    def _initialize(self, x: Tensor) -> None:
        dim = self._channel_dim(x, self.dim, self.channels)
        values = x.detach().to(wide(x.dtype)).movedim(dim, 0).flatten(1)
        mean, std = values.mean(1), values.std(1, correction=0)
        std = torch.where((std > 1e-6 * mean.abs()) & std.isfinite(), std, 1.0)
        mean = torch.where(mean.isfinite(), mean, 0.0)
        self.log_scale.copy_(-std.log())
        self.shift.copy_(-mean / std)
        self.initialized.fill_(True)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._known = False

    def extra_repr(self) -> str:
        """Channels and where they are."""
        return f"{self.channels}, dim={self.dim}"


class InvertibleLinear(Flow):
    """``y = W x`` along one dimension, with an invertible matrix ``W`` that starts as a random rotation or reflection.

    Args:
        features: the size along ``dim``.
        dim: the dimension that is mixed; any but the batch.
        lu: store the factors of ``W = P L U``, so that it stays invertible and its determinant is a product; else ``W`` itself.
        generator: what the start is drawn from; torch's own when ``None``.

    Shape:
        Input and output ``(B, *)`` with ``features`` in ``dim``; any floating dtype, which is kept, also under autocast.

    Raises:
        ShapeError: the input has another size (on the call).
        InversionError: a matrix that is stored itself has become singular (on the inverse).

    References:
        Kingma and Dhariwal, 2018, arXiv:1807.03039, eq. 9-11.

    Example:
        >>> layer = InvertibleLinear(6)
        >>> x = torch.randn(5, 7, 6)
        >>> y, ladj = layer.call_and_ladj(x)
        >>> torch.allclose(layer.inverse(y), x, atol=1e-5), torch.allclose(ladj, torch.zeros(5), atol=1e-5)
        (True, True)
    """

    weight: nn.Parameter
    factors: nn.Parameter
    permutation: Tensor
    sign: Tensor

    def __init__(self, features: int, *, dim: int = -1, lu: bool = True, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.features = features
        self.dim = dim
        self.lu = lu
        dtype = torch.get_default_dtype()
        place = None if generator is None else generator.device
        drawn = torch.randn(features, features, dtype=torch.float64, generator=generator, device=place)
        matrix = torch.linalg.qr(drawn.to(torch.get_default_device()))[0]
        if not lu:
            self.weight = nn.Parameter(matrix.to(dtype))
            return
        permutation, lower, upper = torch.linalg.lu(matrix)
        diagonal = upper.diagonal()
        # below the diagonal L, above it U, on it the logarithms of U's diagonal
        self.factors = nn.Parameter((lower.tril(-1) + upper.triu(1) + diagonal.abs().log().diag()).to(dtype))
        self.register_buffer("permutation", permutation.argmax(1))  # (P M)[i] = M[permutation[i]]
        self.register_buffer("sign", diagonal.sign().to(dtype))

    def matrix(self) -> Tensor:
        """``W``, of shape ``(features, features)``."""
        if not self.lu:
            return self.weight
        lower, upper = self._triangles(self.factors)
        return (lower @ upper)[self.permutation]

    def inverse_matrix(self) -> Tensor:
        """The inverse of ``W``, computed in float64 where there is one, in the dtype of the parameters.

        Raises:
            InversionError: ``W`` is singular.
        """
        stored = self.factors if self.lu else self.weight
        # an inverse amplifies rounding by the matrix's condition; (features, features) is small beside the data
        precise = stored.to(torch.float32 if stored.device.type == "mps" else torch.float64)
        if not self.lu:
            return self._invert_dense(precise).to(stored.dtype)
        lower, upper = self._triangles(precise)
        identity = torch.eye(self.features, dtype=precise.dtype, device=precise.device)
        half = torch.linalg.solve_triangular(lower, identity[self.permutation.argsort()], upper=False, unitriangular=True)
        inverse: Tensor = torch.linalg.solve_triangular(upper, half, upper=True)
        return inverse.to(stored.dtype)

    def _triangles(self, factors: Tensor) -> tuple[Tensor, Tensor]:
        diagonal = self.sign.to(factors.dtype) * factors.diagonal().exp()
        lower = factors.tril(-1) + torch.eye(self.features, dtype=factors.dtype, device=factors.device)
        return lower, factors.triu(1) + diagonal.diag()

    def _invert_dense(self, matrix: Tensor) -> Tensor:
        try:
            inverse: Tensor = torch.linalg.inv(matrix)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            message = explain(type(self).__name__, expected="an invertible matrix", got="a singular one", remedy="use lu=True")
            raise InversionError(message) from error
        return inverse

    def forward(self, x: Tensor) -> Tensor:
        """``W x`` along ``dim``."""
        return self._apply_matrix(self.matrix, x)

    @inverse_of_forward
    def inverse(self, y: Tensor) -> Tensor:
        """``W^-1 y`` along ``dim``."""
        return self._apply_matrix(self.inverse_matrix, y)

    def _apply_matrix(self, matrix: Any, x: Tensor) -> Tensor:
        dim = self._channel_dim(x, self.dim, self.features)
        with own_precision(x):
            return _mix(matrix().to(x.dtype), x, dim)

    def log_det(self, x: Tensor) -> Tensor:
        """``log|det W|`` at every position: ``(B,)``."""
        dim = self._channel_dim(x, self.dim, self.features)
        if self.lu:
            log_det = self.factors.diagonal().sum(dtype=wide(self.factors.dtype))
        else:
            log_det = torch.linalg.slogdet(self.weight.to(wide(self.weight.dtype)))[1]
        return (log_det * _positions(x, dim)).expand(x.shape[0])

    @invertible_with_ladj  # the determinant of a dense matrix saves the matrix's factors
    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` and `log_det`."""
        return InvertibleLinear.forward(self, x), self.log_det(x)

    @inverse_with_ladj
    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """`inverse`, and minus the `log_det`."""
        return super().inverse_and_ladj(y)

    def extra_repr(self) -> str:
        """Size, dimension and parametrisation."""
        return f"{self.features}, dim={self.dim}, lu={self.lu}"


class InvertibleConv1x1(InvertibleLinear):
    """A convolution with kernel size 1: `InvertibleLinear` over the channels of ``(B, C, *)``.

    Args:
        channels: how many channels there are.
        lu: as in `InvertibleLinear`.
        generator: as in `InvertibleLinear`.

    Shape:
        Input and output ``(B, C, *)`` with any number of spatial dimensions, none included.

    Raises:
        ShapeError: the input has other channels (on the call).
        InversionError: as in `InvertibleLinear`.

    References:
        Kingma and Dhariwal, 2018, arXiv:1807.03039, section 3.2, eq. 9-11.

    Example:
        >>> layer = InvertibleConv1x1(12, lu=False)
        >>> x = torch.randn(2, 12, 8, 8)
        >>> torch.allclose(layer.inverse(layer(x)), x, atol=1e-5)
        True
    """

    def __init__(self, channels: int, *, lu: bool = True, generator: torch.Generator | None = None) -> None:
        super().__init__(channels, dim=1, lu=lu, generator=generator)


def _mix(matrix: Tensor, x: Tensor, dim: int) -> Tensor:
    """``matrix`` times every fibre of ``x`` along ``dim``, in the memory format of ``x``.

    No convolution is called, for that would compute in TF32 on a GPU, which loses 13 bits.
    """
    last = x.movedim(dim, -1)
    positions = math.prod(x.shape[dim + 1 :])
    if last.is_contiguous() or positions < len(matrix):  # the batched product's gradient has a matrix a sample
        mixed = F.linear(last, matrix).movedim(-1, dim)
        return mixed.contiguous() if x.is_contiguous() else mixed
    samples = math.prod(x.shape[:dim])
    return torch.bmm(matrix.expand(samples, -1, -1), x.reshape(samples, len(matrix), positions)).view(x.shape)


def _positions(x: Tensor, dim: int) -> int:
    """How many fibres along ``dim`` a sample has."""
    return math.prod(x.shape[1:dim]) * math.prod(x.shape[dim + 1 :])


class Permute(Flow):
    """A fixed permutation along one dimension: ``y[i] = x[order[i]]``.

    Args:
        order: the permutation, of the numbers ``0 ... n - 1``; or ``n``, for one at random.
        dim: the dimension that is permuted.
        generator: what a random one is drawn from; torch's own when ``None``.

    Shape:
        Input and output ``(*)``, of size ``n`` in ``dim``; any dtype.

    Raises:
        ShapeError: ``order`` is no permutation, or the input has another size (on the call).

    Example:
        >>> layer = Permute([2, 0, 1])
        >>> layer(torch.tensor([[10, 11, 12]]))
        tensor([[12, 10, 11]])
        >>> Permute.reverse(3).inverse(torch.tensor([[10, 11, 12]]))
        tensor([[12, 11, 10]])
        >>> Permute(64, generator=torch.Generator().manual_seed(0))(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    permutation: Tensor

    def __init__(self, order: Sequence[int] | Tensor | int, *, dim: int = 1, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if isinstance(order, int):
            if order < 1:
                raise self._refuse("a size of 1 or more", str(order), "pass the size of the dimension")
            place = None if generator is None else generator.device
            order = torch.randperm(order, generator=generator, device=place).to(torch.get_default_device())
        permutation = torch.as_tensor(order).detach().clone()
        numbers = torch.arange(permutation.numel()).to(permutation)
        if permutation.dim() != 1 or not (permutation.is_meta or torch.equal(permutation.sort()[0], numbers)):
            raise self._refuse("a permutation of 0 ... n - 1", f"{order!r}", "pass each index once")
        self.dim = dim
        self.register_buffer("permutation", permutation.long())

    @classmethod
    def random(cls, size: int, *, dim: int = 1, generator: torch.Generator | None = None) -> Permute:
        """A random permutation."""
        return cls(size, dim=dim, generator=generator)

    @classmethod
    def reverse(cls, size: int, *, dim: int = 1) -> Permute:
        """The last first."""
        return cls(torch.arange(size).flip(0), dim=dim)

    def forward(self, x: Tensor) -> Tensor:
        """Permute."""
        return self._select(x, self.permutation)

    @inverse_of_forward
    def inverse(self, y: Tensor) -> Tensor:
        """Permute back."""
        return self._select(y, self.permutation.argsort())

    def _select(self, x: Tensor, index: Tensor) -> Tensor:
        if not -x.dim() <= self.dim < x.dim() or x.shape[self.dim] != len(index):
            raise self._refuse(f"size {len(index)} in dim {self.dim}", f"shape {tuple(x.shape)}", "choose dim= to fit the input")
        return x.index_select(self.dim, index)

    def extra_repr(self) -> str:
        """Size and dimension."""
        return f"{len(self.permutation)}, dim={self.dim}"


register(ActNorm, inverse="_denormalize", method="_normalize", log_det="log_det")
register(InvertibleLinear, inverse="inverse", log_det="log_det")
# It saves nothing, but what is not registered ends the chain: the output before it and its own would both be held.
register(Permute, inverse="inverse", log_det="log_det")
