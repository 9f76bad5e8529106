"""Base distributions that are part of a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, Transform

from ..errors import RegistrationError, ShapeError, explain

__all__ = ["Base", "as_base", "shape_of"]


def shape_of(distribution: Distribution) -> torch.Size:
    """The shape of a sample, of which what the distribution calls its batch is a part.

    Example:
        >>> shape_of(Normal(torch.zeros(3), torch.ones(3)))
        torch.Size([3])
    """
    shape: torch.Size = distribution.batch_shape + distribution.event_shape
    return shape


class Base(nn.Module):
    """A distribution of `torch.distributions` whose tensors are those of a module: they move, convert and load with the model.

    Called, it gives the distribution. What that calls its batch counts as part of a sample.

    Args:
        distribution: a distribution, whose tensors become buffers; or a function that makes one.
        **tensors: what the function is called with: parameters are trained, other tensors become buffers.

    Raises:
        RegistrationError: a distribution was made of tensors that require grad, which it may have copied, or what is given is
            neither a distribution nor a function.

    Example:
        >>> from torch.distributions import Independent, Normal
        >>> base = Base(Normal(torch.zeros(3), torch.ones(3)))
        >>> sorted(base.state_dict()), base.double()().loc.dtype
        (['loc', 'scale'], torch.float64)
        >>> def gaussian(loc, log_scale):
        ...     return Independent(Normal(loc, log_scale.exp()), 1)
        >>> learned = Base(gaussian, loc=nn.Parameter(torch.zeros(3)), log_scale=nn.Parameter(torch.zeros(3)))
        >>> len(list(learned.parameters())), learned.shape
        (2, torch.Size([3]))
    """

    def __init__(self, distribution: Distribution | Callable[..., Distribution], **tensors: Tensor) -> None:
        super().__init__()
        self._own: dict[str, Any] = {}  # the tensors and modules that the distribution was given with
        if isinstance(distribution, Distribution) and not tensors:
            self._own = dict(_parts(distribution, "", set()))
            for name, part in self._own.items():
                if isinstance(part, nn.Module):
                    self.add_module(name, part)
                elif part.requires_grad:
                    raise _refuse("tensors that need no grad", f"{name} that does", "Base(function, name=nn.Parameter(...))")
                else:
                    self.register_buffer(name, part.detach().clone(memory_format=torch.contiguous_format))
        elif isinstance(distribution, Distribution) or not callable(distribution):
            got = f"a distribution and {', '.join(tensors)}" if tensors else type(distribution).__name__
            raise _refuse("a distribution, or a function and tensors", got, "see help(revhooks.flows.Base)")
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, torch.as_tensor(tensor))
        self._made_of = distribution
        self._names = tuple(tensors)

    def forward(self) -> Distribution:
        """The distribution, of the tensors as they are now."""
        if isinstance(self._made_of, Distribution):
            return copy.deepcopy(self._made_of, {id(part): getattr(self, name) for name, part in self._own.items()})
        return self._made_of(**{name: getattr(self, name) for name in self._names})

    @property
    def shape(self) -> torch.Size:
        """Of a sample."""
        return shape_of(self())

    def extra_repr(self) -> str:
        """The distribution."""
        return f"{type(self._made_of).__name__}, {tuple(self.shape)}"


def as_base(base: Base | Distribution | Sequence[int] | int) -> Base:
    """A base: what is given, or standard normal of the shape that is given.

    Example:
        >>> as_base(2)().log_prob(torch.zeros(1, 2))
        tensor([-1.8379])
    """
    if isinstance(base, Base):
        return base
    if isinstance(base, Distribution):
        return Base(base)
    shape = (base,) if isinstance(base, int) else tuple(base)
    if not shape or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ShapeError(
            explain("base", expected="a distribution, or a shape", got=repr(base), remedy="as in Flow(transform, 2)")
        )
    return Base(_normal, loc=torch.zeros(shape), scale=torch.ones(shape))


def _normal(loc: Tensor, scale: Tensor) -> Distribution:
    return Independent(Normal(loc, scale, validate_args=False), loc.dim(), validate_args=False)


def _parts(thing: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """The tensors and modules in a distribution, by names, each once."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, (Tensor, nn.Module)):
        yield prefix, thing
    elif isinstance(thing, (Distribution, Transform, list, tuple)):
        items = enumerate(thing) if isinstance(thing, (list, tuple)) else vars(thing).items()
        for key, value in items:
            yield from _parts(value, f"{prefix}_{key}".strip("_"), seen)


def _refuse(expected: str, got: str, remedy: str) -> RegistrationError:
    return RegistrationError(explain("Base", expected=expected, got=got, remedy=remedy))
