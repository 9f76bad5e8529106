"""Couplings by masks: any elements of a sample change by what a branch computes from the others, in place of two halves.

References:
    Density estimation using Real NVP (Dinh et al., 2016, arXiv:1605.08803), section 3.4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..functional import Law, elementwise_law, sum_per_sample
from ..registry import register
from .flow import Flow, inverse_of_forward, inverse_with_ladj, invertible_with_ladj

__all__ = ["MaskedCoupling", "checkerboard"]


def checkerboard(*sizes: int) -> Tensor:
    """A mask that alternates along every dimension and begins with ``True``; ``~mask`` is the other half.

    Args:
        *sizes: of the mask; ``checkerboard(features)`` alternates over features, ``checkerboard(height, width)`` over images.

    Example:
        >>> checkerboard(2, 3)
        tensor([[ True, False,  True],
                [False,  True, False]])
    """
    places = torch.meshgrid(*[torch.arange(size) for size in sizes], indexing="ij")
    return torch.stack(places).sum(0) % 2 == 0


class MaskedCoupling(Flow):
    """Elements where ``mask`` is true stay, and say how the others change: ``y = mask ? x : law(x, f(mask ? x : 0))``.

    ``f`` sees the whole sample, with zeros in place of what changes, and returns parameters for all elements; those for elements
    that stay are not used. An `AffineCoupling` computes half of that, so take it where two halves will do.

    Args:
        f: maps a masked sample (and the extra arguments) to the parameters of the law: for ``"affine"`` twice the channels, raw
            log-scales, then shifts; for ``"spline"`` 23 times.
        mask: a tensor of booleans that broadcasts to a sample's shape: ``(D,)`` over features, ``checkerboard(H, W)`` over the
            positions of an image, ``(C, 1, 1)`` over its channels.
        dim: the dimension along which ``f`` returns several parameters.
        coupling: ``"affine"``, ``"additive"``, ``"spline"``, or a `revhooks.functional.Law` with ``call_and_ladj``, such as
            ``affine_law("exp")``.

    Shape:
        Input and output ``(B, *)``, equal; any floating dtype.

    Raises:
        ShapeError: the mask has no booleans, the law does not treat each element by itself, or shapes do not fit (on the call).

    References:
        Dinh et al., 2016, arXiv:1605.08803, eq. 9.

    Example:
        >>> mask = torch.tensor([True, False, True])
        >>> layer = MaskedCoupling(nn.Linear(3, 6), mask)
        >>> x = torch.randn(4, 3)
        >>> torch.allclose(layer.inverse(layer(x)), x, atol=1e-5), torch.equal(layer(x)[:, mask], x[:, mask])
        (True, True)
    """

    mask: Tensor

    def __init__(self, f: nn.Module, mask: Tensor, *, dim: int = 1, coupling: str | Law = "affine") -> None:
        super().__init__()
        mask = torch.as_tensor(mask)
        if mask.dtype is not torch.bool:
            raise self._refuse("a mask of booleans", str(mask.dtype), "compare, as in mask > 0")
        elementwise_law(coupling, dim)  # another is refused here, not at the first call
        self.f = f
        self.dim = dim
        self.coupling = coupling
        self.register_buffer("mask", mask.detach().clone())

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Change the elements outside of the mask; extra arguments go to ``f``."""
        law, update = self._update(x, args, kwargs)
        return torch.where(self.mask, x, law.forward(x, update))

    @inverse_of_forward
    def inverse(self, y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Change them back."""
        law, update = self._update(y, args, kwargs)
        return torch.where(self.mask, y, law.inverse(y, update))

    @invertible_with_ladj
    def call_and_ladj(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """`forward`, and ``log|det dy/dx|`` of each sample, from one evaluation of ``f``."""
        law, update = self._update(x, args, kwargs)
        return self._masked(x, law.call_and_ladj(x, update))  # type: ignore[misc]

    @inverse_with_ladj
    def inverse_and_ladj(self, y: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """`inverse`, and ``log|det dx/dy|`` of each sample, from one evaluation of ``f``."""
        law, update = self._update(y, args, kwargs)
        return self._masked(y, law.inverse_and_ladj(y, update))  # type: ignore[misc]

    def log_det(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``log|det dy/dx|`` of each sample, of shape ``(B,)``."""
        return self.call_and_ladj(x, *args, **kwargs)[1]

    def _update(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Law, Tensor]:
        sizes, mask = x.shape[1:][::-1], self.mask.shape[::-1]
        if len(mask) > len(sizes) or any(m not in (1, s) for m, s in zip(mask, sizes, strict=False)):
            expected = f"samples that a mask of shape {tuple(self.mask.shape)} fits"
            raise self._refuse(expected, f"shape {tuple(x.shape)}", "choose the mask to fit them")
        return elementwise_law(self.coupling, self.dim), self.f(torch.where(self.mask, x, 0.0), *args, **kwargs)

    def _masked(self, x: Tensor, moved: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return torch.where(self.mask, x, moved[0]), sum_per_sample(torch.where(self.mask, 0.0, moved[1]))

    def extra_repr(self) -> str:
        """The shape of the mask, and the law."""
        name = self.coupling if isinstance(self.coupling, str) else "Law"
        return f"mask of shape {tuple(self.mask.shape)}, dim={self.dim}, coupling={name!r}"


register(MaskedCoupling, inverse="inverse", log_det="log_det")
