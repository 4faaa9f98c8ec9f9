"""No case is timed before its results are right."""

from collections.abc import Sequence
from types import EllipsisType

import torch
from torch import Tensor

from batchnorm import reference
from batchnorm.benchmarks.cases import BENDS, BOTH, EVALUATION, FORWARD, Case, Inputs

GRADIENTS = ("grad_input", "grad_weight", "grad_bias", "grad_residual")
EPS, MOMENTUM = 1e-5, 0.1


def largest_error(tensor: Tensor, exact: Tensor, where: Tensor | EllipsisType = ...) -> float:
    return (tensor.detach().double() - exact)[where].abs().max().item()


def budget(baselines: Sequence[Tensor], exact: Tensor, dtype: torch.dtype, where: Tensor | EllipsisType = ...) -> float:
    """What a result of a dtype may be off from its float64 value: twice (the worst baseline's error + one rounding)."""
    rounding = torch.finfo(dtype).eps * exact[where].abs().max().item()
    return 2 * (max(largest_error(baseline, exact, where) for baseline in baselines) + rounding)


def without_gradient_near_bends(case: Case, inputs: Inputs) -> Inputs:
    """The same inputs with ``grad_output`` 0 where the derivative of the activation is undecided."""
    bends = BENDS.get(case.activation or "", ())
    if not bends:
        return inputs
    x, residual, _, weight, bias, _, _ = doubled(inputs)
    z = reference.batch_norm_train(x, weight, bias, residual=residual, eps=EPS).output
    # rounding decides on which side of a bend they lie
    near = third_of_the_digits(inputs.x.dtype)
    for bend in bends:
        inputs.grad_output[(z - bend).abs() < near] = 0
    return inputs


def third_of_the_digits(dtype: torch.dtype) -> float:
    """Relative; torch's own sum over 4 million values in float32 has lost half of them."""
    return torch.finfo(dtype).eps ** (1 / 3)


def doubled(inputs: Inputs) -> Inputs:
    return Inputs(*(None if tensor is None else tensor.double() for tensor in inputs))  # pyright: ignore[reportArgumentType]


def reference_results(case: Case, pass_: str, inputs: Inputs) -> list[Tensor]:
    """Output, gradients where the pass has them, and new running statistics, by ``reference`` in the inputs' dtype."""
    x, residual, grad_output, weight, bias, mean, var = inputs
    extra = {"residual": residual, "activation": case.activation, "eps": EPS}
    if pass_ == EVALUATION:
        return [reference.batch_norm_inference(x, mean, var, weight, bias, **extra)]
    leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias, residual) if tensor is not None]
    extra["residual"] = leaves[3] if case.residual else None
    output, batch_mean, batch_var, count = reference.batch_norm_train(*leaves[:3], **extra)
    gradients = () if pass_ == FORWARD else torch.autograd.grad(output, leaves, grad_output)
    unbiased = reference.var_unbiased(batch_var.detach(), count)
    new = [
        reference.running_average(mean, batch_mean.detach(), MOMENTUM).to(mean.dtype),
        reference.running_average(var, unbiased, MOMENTUM).to(var.dtype),
    ]
    return [output.detach(), *gradients, *new]


def result_names(case: Case, pass_: str) -> list[str]:
    if pass_ == EVALUATION:
        return ["output"]
    gradients = GRADIENTS[: 3 + case.residual] if pass_ == BOTH else ()
    return ["output", *gradients, "running_mean", "running_var"]


def beyond_budget(
    names: Sequence[str], actual: Sequence[Tensor], baselines: Sequence[Sequence[Tensor]], exact: Sequence[Tensor]
) -> str | None:
    """What the first result outside its budget is off by; None where all are right."""
    for name, result, bases, true in zip(names, actual, zip(*baselines, strict=True), exact, strict=True):
        if result.shape != true.shape or not result.isfinite().all():
            return f"{name} is not finite or of another shape"
        error, allowed = largest_error(result, true), budget(bases, true, result.dtype)
        if error > allowed:
            return f"{name} is off by {error:.3g}, allowed are {allowed:.3g}"
    return None


def another_function(names: Sequence[str], actual: Sequence[Tensor], exact: Sequence[Tensor]) -> str | None:
    """Why a peer does not compute the same: a third of the dtype's digits must agree."""
    for name, result, true in zip(names, actual, exact, strict=True):
        error = largest_error(result, true)
        if not error <= third_of_the_digits(result.dtype) * max(true.abs().max().item(), 1.0):
            return f"{name} is off by {error:.3g}"
    return None
