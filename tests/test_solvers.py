"""Fixed-point iteration: what it finds, and the evidence that it gives."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from revhooks.errors import ShapeError
from revhooks.solvers import fixed_point, tolerance

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def linear(rate: float, width: int = 16, dtype: torch.dtype = torch.float64) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """A linear contraction of this rate, a start, and its solution."""
    basis = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))[0]
    matrix = rate * basis @ torch.diag(torch.linspace(-1, 1, width, dtype=torch.float64)) @ basis.T
    shift = torch.randn(5, width, dtype=torch.float64)
    solution = torch.linalg.solve(torch.eye(width, dtype=torch.float64) - matrix, shift.T).T
    matrix, shift = matrix.to(dtype), shift.to(dtype)
    return (lambda x: x @ matrix.T + shift), shift, solution


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("anderson", [0, 3])
def test_finds_the_solution_in_every_dtype(dtype: torch.dtype, anderson: int) -> None:
    fn, start, solution = linear(0.8, dtype=dtype)
    found = fixed_point(fn, start, anderson=anderson)
    assert found.converged
    assert found.residual <= tolerance(dtype)
    assert found.value.dtype == dtype
    assert found.value.shape == start.shape
    # within c / (1 - c) residuals, and what the dtype itself rounds
    error = ((found.value.double() - solution).norm(dim=1) / solution.norm(dim=1)).max()
    assert error <= 4 * tolerance(dtype) + 8 * torch.finfo(dtype).eps


def test_steps_are_calls() -> None:
    calls = 0

    def fn(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return 0.5 * x + 1

    found = fixed_point(fn, torch.zeros(2, 3))
    assert found.steps == calls
    still = fixed_point(lambda x: x.clone(), torch.ones(2, 3))
    assert still[1:] == (1, 0.0, True)


def test_every_sample_has_to_converge() -> None:
    """A slow sample of tiny norm beside fast ones of huge norm."""
    rate = torch.tensor([[0.1], [0.9]], dtype=torch.float64)
    shift = torch.tensor([[1e8], [1e-8]], dtype=torch.float64)
    found = fixed_point(lambda x: rate * x + shift, shift.clone(), rtol=1e-6)
    exact = shift / (1 - rate)
    assert found.converged
    assert ((found.value - exact).abs() / exact).max() <= 1e-5
    early = fixed_point(lambda x: rate * x + shift, shift.clone(), rtol=1e-6, max_steps=20)
    assert not early.converged
    assert early.residual > 1e-3  # the slow one's, not an average


def test_nothing_is_recorded_and_the_start_is_left_alone() -> None:
    weight = torch.full((3,), 0.5, requires_grad=True)
    start = torch.randn(2, 3, requires_grad=True)
    before = start.detach().clone()
    found = fixed_point(lambda x: weight * x + 1, start)
    assert not found.value.requires_grad
    assert torch.equal(start, before)
    assert found.value.data_ptr() != start.data_ptr()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("anderson", [0, 2])
def test_reports_what_has_not_converged(anderson: int) -> None:
    fn, start, _ = linear(0.99)
    found = fixed_point(fn, start, max_steps=4, anderson=anderson)
    assert (found.steps, found.converged) == (4, False)
    assert found.residual > tolerance(torch.float64)


def test_gives_up_on_what_diverges() -> None:
    found = fixed_point(lambda x: 3 * x + 1, torch.ones(2, 3))
    assert not found.converged
    assert found.steps < 60
    assert not fixed_point(lambda x: x * math.nan, torch.ones(2, 3)).converged
    assert fixed_point(lambda x: x / 0, torch.ones(2, 3)).residual == math.inf


def test_no_tolerance_iterates_to_the_end() -> None:
    fn, start, _ = linear(0.5)
    assert fixed_point(fn, start, rtol=0.0, max_steps=1000, patience=1000).steps == 1000
    stalled = fixed_point(fn, start, rtol=0.0, max_steps=1000)
    assert 50 < stalled.steps < 200  # rounding stops it
    assert stalled.residual <= 1e-15
    assert fixed_point(torch.zeros_like, start, rtol=0.0, max_steps=37).steps == 2  # nothing moves any more


def test_absolute_tolerance() -> None:
    start = torch.ones(2, 3, dtype=torch.float64)
    found = fixed_point(lambda x: 0.5 * x, start, rtol=0.0, atol=1e-9)
    assert found.converged
    assert 25 < found.steps < 35
    assert not fixed_point(lambda x: 0.5 * x, start, rtol=0.0, atol=0.0, max_steps=100).converged


def test_a_solution_near_zero_is_judged_by_the_start() -> None:
    """``y - g(x)`` is not known better than to the rounding of y, here a noise of 1e-7 y."""
    y = torch.ones(3, 50, dtype=torch.float64)
    found = fixed_point(lambda x: 0.5 * x + 1e-7 * torch.sin(1e12 * x), y, rtol=1e-6)
    assert found.converged
    assert found.value.abs().max() <= 1e-6


@pytest.mark.parametrize("rate", [0.9, 0.99])
def test_anderson_saves_steps(rate: float) -> None:
    fn, start, solution = linear(rate)
    plain = fixed_point(fn, start, rtol=1e-10, max_steps=5000)
    fast = fixed_point(fn, start, rtol=1e-10, max_steps=5000, anderson=5)
    assert plain.converged
    assert fast.converged
    assert fast.steps < plain.steps / 2
    assert (fast.value - solution).abs().max() <= 1e-7 * solution.abs().max()


def test_anderson_with_a_sample_that_is_done() -> None:
    """Its residuals vanish while others still move."""
    rate = torch.tensor([[0.0], [0.95], [-0.9]], dtype=torch.float64)
    shift = torch.randn(3, 4, dtype=torch.float64)
    found = fixed_point(lambda x: rate * torch.tanh(x) + shift, torch.zeros(3, 4, dtype=torch.float64), anderson=3)
    assert found.converged
    assert torch.allclose(found.value, rate * torch.tanh(found.value) + shift, atol=1e-12)
    assert torch.equal(found.value[0], shift[0])


@pytest.mark.parametrize("shape", [(0, 3), (4,), (2, 3, 4, 5), (2, 0)])
@pytest.mark.parametrize("anderson", [0, 2])
def test_shapes(shape: tuple[int, ...], anderson: int) -> None:
    start = torch.randn(shape)
    found = fixed_point(lambda x: 0.5 * torch.cos(x), start, anderson=anderson)
    assert found.converged
    assert found.value.shape == shape


def test_meta_tensors_take_one_step() -> None:
    found = fixed_point(lambda x: 0.5 * x, torch.empty(2, 3, device="meta"))
    assert found.steps == 1
    assert found.value.is_meta


@pytest.mark.parametrize("options", [{"max_steps": 0}, {"anderson": -1}])
def test_options_out_of_range(options: dict[str, int]) -> None:
    with pytest.raises(ShapeError, match=r"fixed_point: expected max_steps >= 1 and anderson >= 0"):
        fixed_point(torch.cos, torch.zeros(2), **options)


def test_a_function_that_leaves_the_space() -> None:
    with pytest.raises(ShapeError, match="keeps shape"):
        fixed_point(lambda x: x[:1], torch.zeros(2, 3))
    with pytest.raises(ShapeError, match="float32"):
        fixed_point(lambda x: x.double(), torch.zeros(2, 3))
