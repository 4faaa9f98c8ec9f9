"""The one error budget: what an implementation may be off from the exact result, measured instead of guessed.

    budget = 2 * (error of the baseline + one rounding of the result)

The exact result is computed in float64; the baseline is what ATen and the plain formulas give in the dtype under test,
whichever is worse. Nothing here is a number that somebody chose.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from batchnorm.benchmarks.correctness import budget, largest_error


def assert_within_budget(actual: Tensor, baselines: Sequence[Tensor], exact: Tensor, name: str = "result") -> None:
    """Compare one tensor with its float64 value; inf and NaN must stand where a baseline has them."""
    assert exact.dtype == torch.float64
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)} is not {tuple(exact.shape)}"
    assert_same_nonfinite(actual, baselines, name)
    finite = exact.isfinite()
    for tensor in (actual, *baselines):
        finite = finite & tensor.isfinite()
    if not finite.any():
        return
    error = largest_error(actual, exact, finite)
    allowed = budget(baselines, exact, actual.dtype, finite)
    assert error <= allowed, f"{name}: error {error:.3g} exceeds the budget {allowed:.3g}"


def assert_same_nonfinite(actual: Tensor, baselines: Sequence[Tensor], name: str) -> None:
    def pattern(tensor: Tensor) -> Tensor:
        return torch.where(tensor.isnan(), 2.0, torch.where(tensor.isinf(), tensor.sign().double(), 0.0))

    same = [torch.equal(pattern(actual.detach()), pattern(baseline.detach())) for baseline in baselines]
    assert any(same), f"{name}: inf or NaN stand elsewhere than in the baseline:\n{actual}\n{baselines[0]}"


def results_and_gradients(f: Callable[..., Sequence[Tensor]], grad_output: Tensor, *tensors: Tensor) -> list[Tensor]:
    """All results of ``f(*tensors)``, and the gradients of the tensors where ``grad_output`` meets the first."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    results = f(*leaves)
    gradients = torch.autograd.grad(results[0], leaves, grad_output.to(results[0].dtype))
    return [*(result.detach() for result in results), *gradients]
