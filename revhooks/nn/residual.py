"""Residual blocks that invert because their branch is a contraction.

References:
    Invertible Residual Networks (Behrmann et al., 2018, arXiv:1811.00995), theorem 1; for the log-determinant its ICML 2019
    version.
    A Stochastic Estimator of the Trace of the Influence Matrix for Laplacian Smoothing Splines (Hutchinson, 1989).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BackwardError, InversionError, RegistrationError, ShapeError, explain
from ..generators import RngTracker
from ..registry import invertible, register
from ..solvers import Solution, fixed_point, tolerance
from .lipschitz import lipschitz_bound, nominal_bound
from .spectral import SpectralLayer, contract

__all__ = ["InvertibleResidual"]


class InvertibleResidual(nn.Module):
    """``y = x + g(x)`` with ``Lip(g) < 1``: the i-ResNet block. Its inverse is a fixed-point iteration, ``x <- y - g(x)``.

    Every Linear and Conv1d/2d/3d in ``g`` is held at a spectral norm of at most ``coeff`` (`SpectralLayer`): in training each
    forward takes one step of power iteration, on the shapes that the layers see. A replay and an inverse take none. The one
    step runs behind the weights, so the norm can exceed ``coeff`` a little while training moves fast: `contraction_bound` says
    what holds, and `refine` makes the estimates exact. An inverse checks its own result either way.

    Args:
        g: the branch, of Linear and convolution layers, Sequentials, and activations whose slope is known
            (`lipschitz_bound`): a module of another class has to say its constant by a method ``lipschitz_bound()``. Its layers
            are replaced in place by their contractive kind.
        coeff: the largest spectral norm of a layer, between 0 and 1. ``None`` leaves ``g`` as it is: an inverse may then
            not exist.
        rtol: the residual at which an inverse has converged; `revhooks.solvers.tolerance` of the dtype when ``None``.
        max_steps: how many evaluations of ``g`` an inverse may take.
        anderson: how many steps back its acceleration looks; 0 is plain iteration.
        terms: terms of the power series for the log-determinant; ``None`` computes it exactly from the Jacobian, one
            vector-Jacobian product a dimension.
        samples: noise vectors a sample that estimate the trace.

    Shape:
        Input and output ``(B, *)``, equal; any floating dtype that ``g`` takes.

    Raises:
        ShapeError: ``coeff`` is out of range; on the call, ``g`` changes the shape.
        RegistrationError: ``g`` is no module, or not bound below 1.

    References:
        Behrmann et al., 2018, arXiv:1811.00995, theorem 1.

    Example:
        >>> g = nn.Sequential(nn.Linear(4, 8), nn.ELU(), nn.Linear(8, 4))
        >>> block = InvertibleResidual(g, 0.9).double()
        >>> x = torch.randn(3, 4).double()
        >>> torch.allclose(block.inverse(block(x)), x, atol=1e-10)
        True
    """

    def __init__(
        self,
        g: nn.Module,
        coeff: float | None = 0.9,
        *,
        rtol: float | None = None,
        max_steps: int = 500,
        anderson: int = 0,
        terms: int | None = 10,
        samples: int = 1,
    ) -> None:
        super().__init__()
        if not isinstance(g, nn.Module):
            raise _refused("a branch that is a module", type(g).__name__, "pass the branch as a module")
        if coeff is not None and not 0 < coeff < 1:
            raise ShapeError(
                explain(
                    "InvertibleResidual",
                    expected="0 < coeff < 1",
                    got=f"coeff={coeff}",
                    remedy="0.9 is the usual choice; None constrains nothing",
                )
            )
        self.g = g if coeff is None else contract(g, coeff)
        self.coeff = coeff
        self.rtol = rtol
        self.max_steps = max_steps
        self.anderson = anderson
        self.terms = terms
        self.samples = samples
        self._seen: torch.Size | None = None  # the shape of a sample that the layers were last prepared for
        if coeff is not None and not nominal_bound(self.g) < 1:
            raise _refused(
                "a branch with a Lipschitz constant below 1",
                f"{nominal_bound(self.g):.4g}: {_blame(self.g)}",
                "lower coeff, replace that module (ReLU, ELU and Softplus have slope 1), or give its class lipschitz_bound()",
            )

    # -- forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``x + g(x)``; in training after one step of power iteration.

        Args:
            x: input of shape ``(B, *)``.
            *args: passed to ``g``.
            **kwargs: passed to ``g``.

        Returns:
            The output, of the input's shape.

        Raises:
            ShapeError: ``g`` changes the shape.
        """
        self._update(x, args, kwargs)
        return self.transform(x, *args, **kwargs)

    def transform(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``x + g(x)`` as the block stands: what `forward` computes after its power iteration, and what is inverted."""
        return x + self._kept(self.g(x, *args, **kwargs), x)

    def _update(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Power iteration comes before the bracketed call: that changes no buffer, and a replay or an inverse finds its own."""
        layers = list(self.layers())
        if self._seen != x.shape[1:] and layers:
            with torch.no_grad():
                self._repeatable(lambda z: self._evaluate(z, args, kwargs), x)(x)
            self._seen = x.shape[1:]
        elif self.training:
            for layer in layers:
                layer.advance()

    def layers(self) -> Iterator[SpectralLayer]:
        """The contractive layers of ``g``, each once."""
        return (module for module in self.g.modules() if isinstance(module, SpectralLayer))

    def refine(self, steps: int = 200) -> None:
        """Take more steps of power iteration, as after training; the block computes a slightly smaller ``g`` from then on.

        Example:
            >>> block = InvertibleResidual(nn.Linear(8, 8), 0.5)
            >>> _ = block(torch.randn(2, 8))
            >>> block.refine()
            >>> block.contraction_bound() < 0.5001
            True
        """
        for layer in self.layers():
            layer.advance(steps)

    def contraction_bound(self) -> float:
        """An upper bound of ``Lip(g)`` as it stands; below 1 an inverse exists, and its iteration converges from anywhere.

        Raises:
            ShapeError: a layer has not seen an input yet.
        """
        return lipschitz_bound(self.g)

    def lipschitz_bound(self) -> float:
        """An upper bound of the Lipschitz constant of the block, ``1 + Lip(g)``."""
        return 1 + self.contraction_bound()

    # -- inverse

    def inverse(self, y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The input that `forward` maps to ``y``; differentiable once, by the implicit function theorem.

        With dropout in training mode it belongs to no forward but one from the same generator state.

        Args:
            y: output of shape ``(B, *)``.
            *args: as in `forward`.
            **kwargs: as in `forward`.

        Raises:
            InversionError: the iteration has not converged.
        """
        x = self._required(self.inverse_with_evidence(y, *args, **kwargs), "inverse")
        leaves = (leaf for leaf in (y, *args, *kwargs.values(), *self.g.parameters()) if isinstance(leaf, Tensor))
        if not (torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)):
            return x
        update = self.g(x.requires_grad_(), *args, **kwargs)
        result: Tensor = y - update
        if result.requires_grad:
            result.register_hook(lambda grad: self._implicit(grad, update, x))
        return result

    def inverse_with_evidence(self, y: Tensor, *args: Any, **kwargs: Any) -> Solution:
        """What the iteration finds, with steps and residual; nothing is recorded for backward, and nothing raised.

        Example:
            >>> block = InvertibleResidual(nn.Linear(4, 4), 0.5)
            >>> solution = block.inverse_with_evidence(block(torch.randn(2, 4)))
            >>> solution.converged, solution.steps < 30
            (True, True)
        """
        step = self._repeatable(lambda x: y - self._kept(self._evaluate(x, args, kwargs), x), y)
        return self._solve(step, y)

    def _solve(self, step: Callable[[Tensor], Tensor], start: Tensor) -> Solution:
        rtol = self._tolerance(start)
        return fixed_point(step, start, rtol=rtol, max_steps=self.max_steps, anderson=self.anderson)

    def _tolerance(self, y: Tensor) -> float:
        """Under autocast the branch is coarser than the stream, and rounding stops the iteration earlier."""
        if self.rtol is not None:
            return self.rtol
        coarse = torch.is_autocast_enabled(y.device.type)
        own = tolerance(y.dtype)
        return max(own, tolerance(torch.get_autocast_dtype(y.device.type)) / 4) if coarse else own

    def _evaluate(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """``g(x)``, called past the instance.

        A runtime that watches the calls of ``g`` matches those of an inverse with those of forward by their order. The number of
        steps changes from call to call, so an iteration shows none; then its slots are filled by one call of forward.
        """
        forward = type(self.g).forward
        if forward is nn.Module.forward:  # torch.compile puts its own on the instance
            return self.g(x, *args, **kwargs)  # type: ignore[no-any-return]
        return forward(self.g, x, *args, **kwargs)  # type: ignore[no-any-return]

    @staticmethod
    def _repeatable(fn: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
        """``fn`` with the same random numbers in every call; the next one to draw gets them too."""
        state = RngTracker.capture(x.device, frozenset({"torch"}))

        def repeated(z: Tensor) -> Tensor:
            try:
                return fn(z)
            finally:
                state.restore()

        return repeated

    def _implicit(self, grad: Tensor, update: Tensor, x: Tensor) -> Tensor:
        """The gradient by ``y``: ``v = grad - J^T v``, for ``dx/dy = (I + J)^-1``."""
        if torch.is_grad_enabled():
            raise BackwardError(
                explain(
                    "InvertibleResidual.inverse",
                    expected="one backward pass through it",
                    got="create_graph=True",
                    remedy="differentiate twice through forward instead",
                )
            )

        def step(v: Tensor) -> Tensor:
            (pulled,) = torch.autograd.grad(update, x, v, retain_graph=True, materialize_grads=True)
            return grad - pulled

        return self._required(self._solve(step, grad), "gradient of its inverse")

    def _required(self, solution: Solution, what: str) -> Tensor:
        if solution.converged:
            return solution.value
        rtol = self._tolerance(solution.value)
        raise InversionError(
            explain(
                f"InvertibleResidual ({what})",
                expected=f"a fixed point with a residual of at most {rtol:g} within {self.max_steps} steps",
                got=f"{solution.residual:.2g} after {solution.steps}",
                remedy="see whether contraction_bound() is below 1 (a smaller coeff, refine()); raise max_steps or rtol",
            )
        )

    # -- log-determinant

    def call_and_ladj(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The output and ``log|det dy/dx|`` of each sample, differentiable; noise comes from torch's generator.

        The power series ``sum_k (-1)^(k+1) tr(J^k) / k`` of ``J = dg/dx`` is cut after `terms` terms, and each trace
        estimated by ``v^T J^k v`` with Rademacher ``v``. The estimator is unbiased for the cut series, which differs from
        the log-determinant by at most ``D L^(n+1) / ((n+1) (1-L))`` for D dimensions, n terms and ``L = Lip(g)``: 10 terms at
        L = 0.9 leave up to 0.28 D, at L = 0.5 up to 9e-5 D. With ``terms=None`` it is exact, at D products a call.

        Args:
            x: input of shape ``(B, *)``; ``g`` must treat each sample by itself.
            *args: passed to ``g``.
            **kwargs: passed to ``g``.

        Returns:
            The output and the log-abs-det, shape ``(B,)``.

        Raises:
            ShapeError: ``g`` changes the shape.

        References:
            Behrmann et al., ICML 2019 (arXiv:1811.00995), on the power series and its error; Hutchinson, 1989.

        Example:
            >>> block = InvertibleResidual(nn.Linear(3, 3), 0.5, terms=None)
            >>> _, ladj = block.call_and_ladj(torch.randn(2, 3))
            >>> jacobian = torch.eye(3) + block.g.scaled_weight((3,))
            >>> torch.allclose(ladj, torch.linalg.slogdet(jacobian)[1], atol=1e-5)
            True
        """
        self._update(x, args, kwargs)
        return self.transform_and_ladj(x, *args, **kwargs)

    @invertible(inverse=lambda block, out, *args, **kwargs: block.inverse(out[0], *args, **kwargs), branches="g", log_det=1)
    def transform_and_ladj(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """`call_and_ladj` as the block stands, without power iteration."""
        record = torch.is_grad_enabled()
        with torch.enable_grad():
            source = x if x.requires_grad else x.detach().requires_grad_()
            # past the instance: products with the Jacobian need the graph of this very evaluation, also in a replay
            update = self._kept(self._evaluate(source, args, kwargs), x)
            ladj = _exact(source, update) if self.terms is None else self._series(source, update, record=record)
        return x + update, ladj if record else ladj.detach()

    def inverse_and_ladj(self, y: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """`inverse`, and ``log|det dx/dy|`` of each sample: minus that of `call_and_ladj` there.

        What the iteration's last evaluation of ``g`` saves is kept for backward, also under ``reversible()``.
        """
        self._update(y, args, kwargs)
        x = self.inverse(y, *args, **kwargs)
        alias = x.view_as(x)  # whose gradient, taken inside, does not go by the hook of the inverse
        return x, -self.transform_and_ladj(alias, *args, **kwargs)[1]

    def log_det(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``log|det dy/dx|`` of each sample, shape ``(B,)``, as `call_and_ladj` gives it."""
        return self.call_and_ladj(x, *args, **kwargs)[1]

    def _series(self, x: Tensor, update: Tensor, *, record: bool) -> Tensor:
        total = update.new_zeros(len(x))
        for _ in range(self.samples):
            noise = torch.randint_like(update, 2, dtype=update.dtype) * 2 - 1
            product = noise
            for k in range(1, (self.terms or 0) + 1):
                product = _pull(update, x, product, create_graph=record)
                trace = (product * noise).flatten(1).sum(1)
                total = total + trace * ((-1) ** (k + 1) / (k * self.samples))
        return total

    def _kept(self, update: Tensor, x: Tensor) -> Tensor:
        if not isinstance(update, Tensor) or update.shape != x.shape:
            raise ShapeError(
                explain(
                    f"branch {type(self.g).__name__}",
                    expected=f"a tensor of its input's shape {tuple(x.shape)} from it",
                    got=str(tuple(update.shape)) if isinstance(update, Tensor) else type(update).__name__,
                    remedy="let g keep the shape",
                )
            )
        return update

    def extra_repr(self) -> str:
        """The coefficient."""
        return f"coeff={self.coeff}"


def _pull(update: Tensor, x: Tensor, cotangent: Tensor, *, create_graph: bool) -> Tensor:
    """``J^T v`` of each sample."""
    (product,) = torch.autograd.grad(update, x, cotangent, retain_graph=True, create_graph=create_graph, materialize_grads=True)
    return product


def _exact(x: Tensor, update: Tensor) -> Tensor:
    """The log-abs-det of ``I + J`` from the Jacobian ``J`` of each sample, row by row."""
    flat = update.flatten(1)
    units = torch.eye(flat.shape[1], dtype=flat.dtype, device=flat.device)
    rows = [_pull(flat, x, unit.expand_as(flat), create_graph=True).flatten(1) for unit in units]
    ladj: Tensor = torch.linalg.slogdet(units + torch.stack(rows, 1))[1]
    return ladj


def _blame(g: nn.Module) -> str:
    """The part of ``g`` that adds most to its bound."""
    parts = list(g) if isinstance(g, nn.Sequential) else [g]
    worst = max(parts, key=nominal_bound)
    return f"{type(worst).__name__} has {nominal_bound(worst):.4g}"


def _refused(expected: str, got: str, remedy: str) -> RegistrationError:
    return RegistrationError(explain("InvertibleResidual", expected=expected, got=got, remedy=remedy))


# no cost=: who takes this layer wants its input rebuilt, be it small
register(InvertibleResidual, inverse="inverse", method="transform", branches="g")
